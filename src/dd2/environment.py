"""What notebooks, schedulers and old terminals leave in the environment of a command, put right in one place."""

import os
import sys


def prepare() -> None:
    """For a process that is this command's alone.

    Pictures are drawn to files, whatever window or notebook MPLBACKEND names; and text that an output stream has no characters
    for is written in escapes.
    """
    os.environ["MPLBACKEND"] = "Agg"
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (closed ones are None, and everything writes to them)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
