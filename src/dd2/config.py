"""Typed configurations: dataclasses, YAML files and command-line overrides are three spellings of the same fields."""

import contextlib
import difflib
import io
import itertools
import math
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from dd2.errors import InputError
from dd2.fields import defaults, field_of, field_types, with_fields
from dd2.values import check_value
from dd2.yaml_files import read_yaml

C = TypeVar("C")

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
OutPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
"""Fields that a command line gives without a flag."""

RENAMED = {"distill": "csd"}
"""Sections of older configurations, and what they are called now."""

CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""module:function."""


def to_arguments(values: dict[str, Any], config_class: type, file: Path) -> list[str]:
    """The command-line flags that a person would type for the fields of a YAML file.

    Raises:
        InputError: a field does not exist; the message names the nearest one that does.
    """
    known, places = dict(field_types(config_class)), positional(config_class)
    arguments: list[str] = []
    bare: dict[str, list[str]] = {}
    for name, value in values.items():
        section, _, rest = name.partition(".")
        if section in RENAMED and name not in known:
            now = f"{RENAMED[section]}.{rest}".rstrip(".")
            raise InputError(f"{file}: {name} is called {now} now; rename the section {section} to {RENAMED[section]}")
        if name not in known and any(field.startswith(f"{name}.") for field in known):
            inner = ", ".join(field for field in known if field.startswith(f"{name}."))
            raise InputError(f"{file}: {name} is a section, not a value; give fields of it: {inner[:120]}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; see --help for the fields of {config_class.__name__}"
            raise InputError(f"{file}: there is no field {name}{hint}")
        check_value(name, value, known[name], file)
        flag = f"--{name.replace('_', '-')}"
        texts = [str(entry) for entry in value] if isinstance(value, list) else [str(value)]
        if (isinstance(value, list) or name in places) and any(_is_flag(text) for text in texts):
            raise InputError(f"{file}: {name} holds {next(filter(_is_flag, texts))!r}, which is a flag and no value")
        if name in places:
            bare[name] = texts
        elif isinstance(value, bool):
            arguments.append(flag if value else _negated(flag))
        elif isinstance(value, list):
            arguments += [flag, *texts]
        else:
            arguments.append(f"{flag}={value}")
    return [*(text for name in places for text in bare.get(name, [])), *arguments]


def _is_flag(text: str) -> bool:
    return text.startswith("-") and not re.fullmatch(r"-[\d.]+(e[+-]?\d+)?", text)


def positional(config_class: Any) -> list[str]:
    """The fields that a command line gives without a flag, in their order."""
    hints = get_type_hints(config_class, include_extras=True)
    marked = [(name, getattr(hint, "__metadata__", ())) for name, hint in hints.items()]
    return [name for name, marks in marked if tyro.conf.Positional in marks]


CODE_FIELDS = ("teacher", "features", "trust")
"""Fields that may name code of the user's: module:function, or modules."""


def refuse_unnamed_code(config: Any, typed: Sequence[str], file: Path) -> None:
    """Refuse code that a file brought in: reading somebody's file must not run what they chose.

    Args:
        config: as parsed from the file and what was typed.
        typed: the command line without the file.
        file: that file.

    Raises:
        InputError: a field names code, and its flag was not typed with it.
    """
    for name in CODE_FIELDS:
        flag, value = f"--{name}", getattr(config, name, ())
        texts = {str: (value,), tuple: value}.get(type(value), ())  # in another command the field may be something else
        for text in texts:
            if (name == "trust" or CODE.fullmatch(text)) and text not in _values_of(flag, typed):
                raise InputError(
                    f"{file}: {name} names the code {text}, which a file alone does not get to run; if you trust it, add "
                    f"{flag} {text}"
                )


def _values_of(flag: str, typed: Sequence[str]) -> set[str]:
    """What was typed behind a flag."""
    found: set[str] = set()
    for index, word in enumerate(typed):
        if word == flag:
            found |= set(itertools.takewhile(lambda text: not text.startswith("-"), typed[index + 1 :]))
        elif word.startswith(f"{flag}="):
            found.add(word.removeprefix(f"{flag}="))
    return found


def _negated(flag: str) -> str:
    """Tyro's spelling of a false boolean: --a.no-b."""
    head, _, last = flag.removeprefix("--").rpartition(".")
    return f"--{head}.no-{last}" if head else f"--no-{last}"


def find_yaml(name: str) -> Path:
    """The file that a name means: a path, or the name of a configuration that dd2 brings along.

    Raises:
        InputError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    stem = Path(name).stem
    if stem in packaged() and name in (stem, f"{stem}.yaml", f"configs/{stem}.yaml"):
        return Path(str(files("dd2") / "configs" / f"{stem}.yaml"))
    raise InputError(f"configuration {name} does not exist; give a YAML file, or one of dd2's own: {', '.join(packaged())}")


def packaged() -> list[str]:
    """Names of the configurations that dd2 brings along."""
    return sorted(Path(str(entry)).stem for entry in (files("dd2") / "configs").iterdir())


def load_config(config_class: type[C], name: str, overrides: Sequence[str] = (), command: str = "dd2") -> C:
    """A configuration from a YAML file and flags typed after it, which win.

    Args:
        config_class: the dataclass to fill.
        name: a path or the name of a packaged configuration; "" starts from the defaults.
        overrides: command-line flags.
        command: shown in help and errors.

    Raises:
        InputError: a field does not exist or a value does not fit; one line.
        SystemExit: the flags ask for help.
    """
    arguments: list[str] = []
    source = ""
    for flag in overrides:
        section, _, rest = flag.removeprefix("--").partition(".")
        if flag.startswith("--") and rest and section in RENAMED:
            raise InputError(f"{flag} is called --{RENAMED[section]}.{rest} now")
    if name:
        file = find_yaml(name)
        source = f"{file}: "
        values = read_yaml(file) | _own_folder(file, config_class)
        typed = sum(1 for _ in itertools.takewhile(lambda text: not text.startswith("-"), overrides))
        typed_fields = positional(config_class)[:typed]
        kept = {field: value for field, value in values.items() if field not in typed_fields}
        arguments = to_arguments(kept, config_class, file)
    overrides = _with_spaces(overrides, config_class)
    _refuse_empty(overrides, config_class)
    try:
        config = _parse(config_class, _in_places(arguments, overrides), command)
    except InputError as error:
        if source:
            _parse(config_class, overrides, command)  # the flags' own fault is reported as such
        raise InputError(f"{source}{error}") from None
    if name:
        refuse_unnamed_code(config, overrides, find_yaml(name))
    return config


def _refuse_empty(words: Sequence[str], config_class: Any) -> None:
    """Refuse the empty text where it is not a field's default: to a path it would be the working directory.

    Raises:
        InputError: a word, or a flag's value, is empty, as where a shell's variable is not set.
    """
    usual = defaults(config_class)
    for before, word in itertools.pairwise(["", *words]):
        flag, given, value = word.partition("=")
        name = (flag if given else before).removeprefix("--").replace("-", "_")
        if (word == "" or (given and word.startswith("--") and not value)) and usual.get(name) != "":
            raise InputError(f"{f'--{name}' if name else 'an argument'} is empty; is a variable of the shell not set?")


OF_RUNS = ("versions.json", "run.json", "metrics.jsonl", "checkpoints", "teacher_samples")
"""What lies beside the configuration in a run's folder, some of it from the start."""


def _own_folder(file: Path, config_class: Any) -> dict[str, Any]:
    """{"out": the folder} of the configuration that lies in a run's folder: a run is where it lies, whatever it was called."""
    own = file.name == "config.yaml" and any((file.parent / name).exists() for name in OF_RUNS)
    return {"out": str(file.parent)} if own and "out" in dict(field_types(config_class)) else {}


def _with_spaces(overrides: Sequence[str], config_class: Any) -> list[str]:
    """The same with lists of numbers in one spelling: --steps 1,3 is --steps 1 3."""
    lists = {
        f"--{name.replace('_', '-')}"
        for name, kind in field_types(config_class)
        if get_origin(kind) is tuple and get_args(kind)[0] in (int, float)
    }
    words: list[str] = []
    inside = False
    for word in overrides:
        flag, given, value = word.partition("=")
        if word.startswith("--"):
            inside = flag in lists
            words += [flag, *value.split(",")] if inside and given else [word]
        else:
            words += [part for part in word.split(",") if part] if inside else [word]
    return words


def _in_places(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """A file's arguments and those typed after it, what has no flag first."""
    bare = [list(itertools.takewhile(lambda text: not text.startswith("-"), part)) for part in (overrides, arguments)]
    return [*bare[0], *bare[1], *arguments[len(bare[1]) :], *overrides[len(bare[0]) :]]


def _parse(config_class: type[C], arguments: Sequence[str], command: str) -> C:
    """Tyro's parsing, its boxed error message reduced to one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return _at_home(_finite(tyro.cli(config_class, prog=command, args=arguments)))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(box.getvalue(), command, positional(config_class))) from None


def _finite(config: C) -> C:
    """The same, whose numbers are all finite, and whose names can be written down.

    Raises:
        InputError: one is NaN or infinite, or no UTF-8.
    """
    for name, _ in field_types(type(config)):
        value = field_of(config, name)
        parts = value if isinstance(value, tuple) else (value,)
        if any("\ud800" <= c <= "\udfff" for part in parts if isinstance(part, str | Path) for c in str(part)):
            raise InputError(f"{name} {value} is no UTF-8, which safetensors cannot open: rename it")
        for number in parts:
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{name} must be a finite number, got {number}")
    return config


def _at_home(config: C) -> C:
    """The same with ~ at the start of a path as the home folder, which a shell does not see behind --flag= or in a file."""
    expanded: dict[str, Any] = {}
    for name, _ in field_types(type(config)):
        value = field_of(config, name)
        if isinstance(value, str | Path) and str(value).startswith("~/"):
            expanded[name] = type(value)(os.path.expanduser(value))
    return with_fields(config, expanded) if expanded else config


def _one_line(box: str, command: str, places: Sequence[str]) -> str:
    lines = [line.strip("│╭╮╰╯─ ").strip() for line in box.splitlines()]
    lines = ["" if set(line) <= {"-"} else line for line in lines]  # a rule, where the terminal knows ASCII alone
    message: list[str] = []
    for line in lines[1:]:  # the first is the box's title
        if line:
            message.append(line)
        elif message:
            break
    text = " ".join(message) or " ".join(filter(None, lines))
    suggestions = [line.split()[0] for line in lines if line.startswith("--")]
    if suggestions and "nrecognized" in text:
        text += f"; perhaps you meant {suggestions[0]}"
    text = re.sub(r"^Error parsing \w*Config: ", "", text)
    bare = re.search(r"nrecognized options: ([^-\s]\S*)$|arguments: \[.*'([^'-][^']*)'\]$", text)
    if bare:  # perhaps a word that has no flag, behind options that take it for one of theirs
        first = " ".join([command, *map(str.upper, places), *(() if places else ("CONFIG.yaml",))])
        if (bare[1] or bare[2]).lower() in ("true", "false", "yes", "no", "on", "off", "0", "1"):
            text += "; a switch takes no value: --FIELD, or --no-FIELD (--GROUP.no-FIELD)"
        text += f"; what has no flag comes before the options: {first} [--field value ...]"
    return f"{text}; see {command} --help"
