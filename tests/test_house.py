"""CONTRIBUTING.md's house is the one that stands: no import goes up, and names stay in their rooms."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

from mutants import MUTANTS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dd2"
FILES = sorted(SOURCE.rglob("*.py"))
BLOCK = re.search(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
FLOORS = [line.split() for line in (BLOCK[1] if BLOCK else "").splitlines()]


def room(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """The modules of dd2 that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dd2":
            found |= {f"dd2.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("dd2.") and not name.startswith("dd2.__")}


def test_every_mutant_has_its_place():
    """A fault whose line has changed since would be put in nowhere (benchmarks/mutants.py)."""
    counts = {mutant.name: (SOURCE / mutant.file).read_text().count(mutant.old) for mutant in MUTANTS}
    assert {name: count for name, count in counts.items() if count != 1} == {}


def test_every_room_is_on_a_floor():
    listed = [name for floor in FLOORS for name in floor]
    assert len(listed) == len(set(listed))
    assert set(listed) == {room(file) for file in FILES} - {"__init__", "__main__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_no_import_goes_up(file):
    if file.name in ("__init__.py", "__main__.py") and file.parent == SOURCE:
        return  # the package's front door
    if file.parent.name == "diffusers":
        return  # written into packages, for diffusers to run
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    here = room(file)
    for module in imports(file):
        there = module.split(".")[1]
        assert there == here or floor_of[there] < floor_of[here], f"{here} imports {module}"


def test_no_two_modules_import_each_other():
    modules = {
        ".".join(("dd2", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): file for file in FILES
    }
    below: dict[str, set[str]] = {}
    for name, file in modules.items():
        # `from dd2.a import b` may mean the module dd2.a.b.
        below[name] = {module for module in imports(file) if module in modules and module != name}
    done: set[str] = set()
    while ready := {name for name, needed in below.items() if name not in done and needed <= done}:
        done |= ready
    assert sorted(below.keys() - done - {"dd2"}) == []


def test_family_names_stay_in_their_rooms():
    for file in FILES:
        if room(file) in ("teachers", "order", "checkpoints"):
            continue
        families = {f"dd2.teachers.{name}" for name in ("llamagen", "var", "var_blocks", "next_scale", "adaptation")}
        allowed = {"commands/adapt.py": {"dd2.teachers.adaptation"}}.get(str(file.relative_to(SOURCE)), set())
        assert not (imports(file) & families) - allowed, file
        with open(file) as opened:
            names = {token.string for token in tokenize.generate_tokens(opened.readline) if token.type == tokenize.NAME}
        assert not [name for name in names if re.search(r"(?i:llamagen)|^VAR[A-Z]|^var_", name)], file


def test_evaluation_measures_by_nothing_that_is_trained_on():
    for file in FILES:
        if room(file) == "evaluation":
            assert not [name for name in imports(file) if name in ("dd2.losses",) or name.startswith("dd2.method")], file


def test_a_generator_is_a_network():
    """Streams of random numbers are called `random`; but where people call us by diffusers' words."""
    for file in FILES:
        if room(file) == "pipeline" or file.parent.name == "diffusers":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.arg) and node.annotation is not None:
                assert "torch.Generator" not in ast.unparse(node.annotation) or node.arg == "random", f"{file}: {node.arg}"


def test_packages_say_what_is_in_them():
    for file in FILES:
        if file.name == "__init__.py":
            assert len((ast.get_docstring(ast.parse(file.read_text())) or "").split()) >= 6, file
