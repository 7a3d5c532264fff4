"""What docs/security.md promises to who opens somebody else's files."""

import ast
import os
import re
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from dd2 import OneStepPipeline
from dd2.checkpoints.foreign_file import read_file
from dd2.cli import main
from dd2.data.pictures import Pictures
from dd2.errors import InputError

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dd2"

CALLS = {
    "eval": set(),
    "exec": set(),
    "__import__": set(),
    "extract": set(),
    "extractall": set(),
    "unpack_archive": set(),
    "system": set(),
    "Popen": set(),
    "run": {"provenance.py"},
    "urlopen": {"files.py"},
    "import_module": {"cli.py", "external.py"},
}
"""Functions that could run or fetch what a file chose, and the only files that may call them."""


def calls(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_nothing_is_unpickled_run_or_unpacked(file):
    here = str(file.relative_to(SOURCE))
    modules = {
        alias.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import) for alias in node.names
    }
    assert not modules & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"} or here == "checkpoints/foreign_file.py"
    for call in calls(file):
        name, words = name_of(call), {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name == "torch.load":
            assert words.get("weights_only") == "True"
        if name in ("np.load", "numpy.load") or name.endswith("format.read_array"):
            assert words.get("allow_pickle") == "False"
        if name == "torch.jit.load":
            assert here == "evaluation/inception.py"  # whose hash is looked at before
        if name == "yaml.load":
            assert [ast.unparse(argument) for argument in call.args[1:]] == ["_Loader"]
        for function, allowed in CALLS.items():
            if name == function or (
                name.endswith(f".{function}") and name.split(".")[0] in ("os", "subprocess", "importlib", "shutil")
            ):
                assert here in allowed, f"{name} in {here}"
            if function.startswith("extract") and name.endswith(f".{function}"):
                assert here in allowed, f"{name} in {here}"


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_checkpoint_runs_nothing(tmp_path):
    for name, content in (("a.pth", Exploit(tmp_path / "ran")), ("b.ckpt", {"model": {"x": Exploit(tmp_path / "ran")}})):
        torch.save(content, tmp_path / name)
        for device in ("cpu", "meta"):
            with pytest.raises(InputError, match="objects could run code"):
                read_file(tmp_path / name, device)
        assert main(["inspect", str(tmp_path / name)]) == 2
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)  # elsewhere it would have
    assert (tmp_path / "ran").exists()


def test_a_configuration_alone_runs_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\ndef make():\n    pass\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("teacher: evil_module:make")
    assert main(["distill", "c.yaml"]) == 2
    assert "which a file alone does not get to run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert main(["distill", "c.yaml", "--teacher", "evil_module:make"]) == 2  # named, it runs, and gives no teacher
    assert (tmp_path / "ran").exists()
    sys.modules.pop("evil_module", None)


def test_a_zip_writes_nothing_anywhere(tmp_path):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "x.zip", "w") as archive:
        for name in ("../../out.png", "/out.png", "a/../../out.png", "a/0.png"):
            archive.writestr(name, b"no picture")
    pictures = Pictures(tmp_path / "in" / "x.zip", "data")
    for name in pictures.names:
        with pytest.raises(InputError):
            pictures.image(name)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "x.zip"]


def test_a_hub_download_takes_no_code_and_the_revision_asked_for(tmp_path, monkeypatch):
    asked: list[dict] = []
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, **more: asked.append({"name": name, **more}) or str(tmp_path)  # pyright: ignore
    hub.errors = types.SimpleNamespace()  # pyright: ignore
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for revision in (None, "0123abc"):
        with pytest.raises(InputError):  # there is nothing in it
            OneStepPipeline.from_pretrained("owner/name", revision=revision)
    assert [call["revision"] for call in asked] == [None, "0123abc"]
    assert all(call["allow_patterns"] == ["*.json", "*.safetensors"] for call in asked)
    with pytest.raises(InputError, match="is a folder here"):
        OneStepPipeline.from_pretrained(tmp_path, revision="main")


def test_every_promise_names_a_test_that_exists():
    page = (ROOT / "docs" / "security.md").read_text() + (ROOT / "docs" / "edges.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", page)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), f"{file}.py::{test}"
    rows = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("|---", "| Promise", "| Kind"))]
    assert all("::test_" in row for row in rows)
