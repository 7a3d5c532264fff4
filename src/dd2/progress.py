"""Progress bars with rate and remaining time, quiet where nobody watches."""

import contextlib
import sys
from typing import Any

from tqdm import tqdm

from dd2.processes import rank


class _Forgiving:
    """The error output, whose troubles are no reason to end the work."""

    def write(self, text: str) -> int:
        """Write, if it can be."""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if it can be."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def progress(title: str, total: int, unit: str, done: int = 0, *, shown: bool = True) -> Any:
    """A tqdm bar; in a log file it writes a line every 20 seconds rather than twice a second."""
    interval = 0.5 if sys.stderr.isatty() else 20
    return tqdm(
        file=_Forgiving(),
        total=total,
        initial=done,
        desc=title,
        unit=unit,
        dynamic_ncols=True,
        mininterval=interval,
        disable=rank() != 0 or not shown,  # one bar a job
    )
