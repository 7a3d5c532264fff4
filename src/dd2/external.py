"""Code of the user's: functions named module:function, imported only when the user has named them."""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dd2.config import CODE
from dd2.errors import InputError


def is_code(name: str) -> bool:
    """Whether a name is module:function rather than a folder or a file."""
    return bool(CODE.fullmatch(name)) and not Path(name).exists()


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """A function `module:function` of the user's, found in the current folder or among installed packages.

    Args:
        spec: its name.
        what: it is for, for errors: "teacher", "features".

    Raises:
        InputError: there is no such module or function.
    """
    module_name, _, function = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # and it stays: the function may import more when it is called
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise InputError(f"{what} {spec}: the module cannot be imported ({type(error).__name__}: {error})") from error
    called = getattr(module, function, None)
    if not callable(called):
        raise InputError(f"{what} {spec}: module {module_name} has no function {function}")
    return called


def check_trust(spec: str, trust: Sequence[str], where: Path) -> None:
    """Refuse code that a folder names, unless the user has named it too.

    Args:
        spec: module:function.
        trust: modules, or whole names, that the user has given on the command line.
        where: the folder that names it.

    Raises:
        InputError: the user has not.
    """
    module = spec.partition(":")[0]
    if spec not in trust and module not in trust:
        raise InputError(
            f"{where} needs the code {spec}, which a folder alone does not get to run; if you trust it, add --trust {module}"
        )
