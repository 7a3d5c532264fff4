"""The documentation: commands are run, or it says why not; its notebook runs from top to bottom; its site has no dead link."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dd2.cli import main
from models import HANG
from test_readme import REGRESS, ROOT, SHORT, commands

RUN_HERE = ("index.md", "use.md", "baselines.md", "evaluation.md")
"""Pages whose unmarked commands are run below."""

BLOCK = re.compile(r"(<!-- not run in the tests: [^\n]+ -->\n)?```sh\n(.*?)```", re.DOTALL)

MORE = {**SHORT, "report": [], "export": [], "reproduce": [], "dd1": []}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the runs are that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["distill", "digits", "--out", "runs/demo", *SHORT["distill"], *REGRESS]) == 0
        assert main(["evaluate", "runs/demo", *SHORT["evaluate"]]) == 0
        assert main(["distill", "digits_paper", "--out", "runs/mine", *SHORT["distill"]]) == 0
    finally:
        os.chdir(before)
    return folder


def test_every_command_is_run_or_says_why_not():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for mark, text in BLOCK.findall(page.read_text()):
            run = page.name in RUN_HERE or (page.name == "README.md" and text.startswith(("make demo", "dd2 demo ")))
            assert mark or run, f"{page.name}: {text[:60]}"


@pytest.mark.e2e
@pytest.mark.parametrize("page", RUN_HERE)
def test_the_commands_of_a_page(page, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    seen = 0
    for mark, text in BLOCK.findall((ROOT / "docs" / page).read_text()):
        if mark:
            continue
        for name, *rest in commands(text):
            assert main([name, *rest, *MORE[name]]) == 0, f"{name} {rest}: {capsys.readouterr().err}"
            seen += 1
    assert seen >= 2


@pytest.mark.e2e
def test_the_code_of_use(place, monkeypatch):
    """As a reader would type it, one block after the other."""
    monkeypatch.chdir(place)
    if not Path("one_pass.onnx").exists():
        assert main(["export", "runs/demo", "one_pass.onnx", "--format", "onnx"]) == 0
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "use.md").read_text(), re.DOTALL):
        exec(code, names)
    assert len(names["walk"]) == 8
    assert names["images"].shape == (4, 1, 16, 16)


@pytest.mark.e2e
def test_the_notebook(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    client = NotebookClient(notebook, timeout=HANG, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    found = re.search(r"gap closed: (-?[\d.]+)", said)
    assert found is not None
    assert float(found[1]) > 0.3  # short as it is, it learns
    assert "(4, 1, 16, 16)" in str(notebook.cells[-1].outputs)


@pytest.mark.e2e
def test_the_site_has_no_dead_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "OneStepPipeline" in (tmp_path / "site" / "api" / "index.html").read_text()


def test_completion_and_env_say_what_there_is(capsys):
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    for wanted in ("dd2", "torch", "extra hub", "cpu", "working directory"):
        assert re.search(rf"^{wanted} +\S", said, re.MULTILINE), wanted
    scripts = {}
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        scripts[shell] = capsys.readouterr().out
    probe = scripts["bash"] + "\n"
    for words, number in ((["dd2", "exp"], 1), (["dd2", "export", "r", "--format", ""], 4), (["dd2", "convert", ""], 2)):
        probe += f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={number}; _dd2; echo ${{COMPREPLY[@]}}\n"
    done = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["export", "folder torch onnx", "var llamagen mar"]
    assert "-l format -x -a 'folder torch onnx'" in scripts["fish"]
    assert "bashcompinit" in scripts["zsh"]
    assert main(["completion", "powershell"]) == 2


def test_one_version():
    """pyproject.toml, the package and the citation say the same."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")

    from dd2 import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dd2.__version__"}
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_workflow_runs_what_ci_runs():
    import yaml

    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert "bash .ci/run" in [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        found = yaml.safe_load(form.read_text())
        assert form.name == "config.yml" or "dd2 env" in str(found)
