"""docs/add-a-model.md, executed: its teacher goes through every command and every call that the page shows."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dd2.cli import main
from dd2.errors import InputError
from dd2.pipeline import OneStepPipeline

pytestmark = pytest.mark.e2e

PAGE = (Path(__file__).parents[1] / "docs" / "add-a-model.md").read_text()
SHORT = ["--tune.iterations", "3", "--csd.iterations", "3", "--teacher-samples", "300", "--loop.preview-every", "0"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with the page's file in it, as a user has it."""
    (tmp_path / "bag.py").write_text(blocks("python")[0])
    (tmp_path / "pixels.py").write_text("def read(images):\n    return images.mean(-1).flatten(1)[:, ::4]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bag", raising=False)
    return tmp_path


def fresh() -> None:
    """As in a new process: nothing of the user's is imported yet."""
    sys.modules.pop("bag", None)


def test_the_example_is_short():
    assert len(blocks("python")[0].splitlines()) <= 80


def test_the_commands_of_the_page(here, capsys):
    commands = [shlex.split(line)[1:] for line in blocks("sh")[0].splitlines()]
    assert [command[0] for command in commands] == ["distill", "sample", "sample", "evaluate", "export"]
    for command in commands:
        fresh()
        assert main(command + (SHORT if command[0] == "distill" else [])) == 0, capsys.readouterr().err
        assert "bag" in sys.modules
    numbers = json.loads(Path("runs/bag/metrics.json").read_text())
    assert {"teacher_nll", "frechet"} <= numbers["metrics"]["generator_nearest"].keys()
    config = json.loads(Path("shipped/config.json").read_text())
    assert (config["code"], "family" in config) == ("bag:teacher", False)
    assert main(["inspect", "shipped"]) == 0
    assert "of the code bag:teacher" in capsys.readouterr().out
    assert main(["plan", "digits_paper", "--teacher", "bag:teacher"]) == 0
    images = OneStepPipeline.from_pretrained("shipped", device="cpu", trust=["bag"])([0, 2], [5, 6], output_type="pt").images
    assert images.shape == (2, 1, 16, 16)
    capsys.readouterr()


def test_a_folder_alone_imports_nothing(here, capsys):
    assert main(["distill", "digits_paper", "--teacher", "bag:teacher", "--out", "runs/bag", *SHORT]) == 0
    assert "resume" not in capsys.readouterr().err
    asked = [
        ["sample", "runs/bag"],
        ["sample", "runs/bag", "--steps", "2"],
        ["sample", "runs/bag/generator"],
        ["evaluate", "runs/bag", "--count", "300"],
        ["export", "runs/bag", "shipped"],
        ["distill", "--teacher", "runs/bag/ar_diffusion", "--out", "runs/other"],
    ]
    for command in asked:
        fresh()
        assert main(command) == 2
        assert "which a folder alone does not get to run; if you trust it, add --trust bag" in capsys.readouterr().err
        assert "bag" not in sys.modules
    fresh()
    assert main(["distill", "runs/bag/config.yaml"]) == 2
    assert "add --teacher bag:teacher" in capsys.readouterr().err
    Path("trusting.yaml").write_text("run: runs/bag\ntrust: [bag]\n")
    assert main(["sample", "trusting.yaml"]) == 2
    assert "trust names the code bag" in capsys.readouterr().err
    assert "bag" not in sys.modules
    smuggled = (
        "csd: {further_emas: ['0.9', '--teacher=bag:teacher']}",
        "csd: {further_emas: ['0.9', '--teacher', 'bag:teacher']}",
        "csd: {further_emas: ['0.9', '--trust=bag']}",
        "teacher: bag:teacher",
    )
    for text in smuggled:
        Path("smuggling.yaml").write_text(text)
        assert main(["distill", "smuggling.yaml", "--out", "runs/x"]) == 2
        assert "bag" not in sys.modules
    Path("smuggling.yaml").write_text("run: [runs/bag, '--features=bag:teacher']")
    assert main(["evaluate", "smuggling.yaml"]) == 2
    assert "bag" not in sys.modules
    assert not Path("runs/x").exists()
    assert not Path("shipped").exists()
    Path("odd_name.yaml").write_text("teacher: bag:teacher\nout: runs:x")  # overridden, and no code
    assert main(["distill", "odd_name.yaml", "--teacher", "digits", "--loop.save-every", "0"]) == 2
    assert "save_every must be at least 1" in capsys.readouterr().err
    assert main(["distill", "runs/bag/config.yaml", "--teacher", "bag:teacher"]) == 0  # the same flag again


def test_a_stage_one_model_of_such_a_teacher_is_one_too(here, capsys):
    assert main(["distill", "digits_paper", "--teacher", "bag:teacher", "--out", "runs/bag", *SHORT]) == 0
    fresh()
    again = ["distill", "digits_paper", "--teacher", "runs/bag/ar_diffusion", "--trust", "bag", "--out", "runs/ar", *SHORT]
    assert main(again) == 0, capsys.readouterr().err
    fresh()
    assert main(["sample", "runs/ar", "--steps", "3", "--count", "4", "--trust", "bag"]) == 0
    assert main(["export", "runs/ar", "shipped", "--trust", "bag"]) == 0


def test_its_own_ways_to_decode_go_with_it(here):
    """A teacher whose decoding is more than its tokenizer's: what is shipped decodes alike."""
    text = Path("bag.py").read_text().replace("return CodeTeacher(backbone", "return Dark(backbone")
    text += (
        "\n\nclass Dark(CodeTeacher):\n    def decode(self, tokens, cond):\n        return 0 * super().decode(tokens, cond) - 1\n"
    )
    Path("bag.py").write_text(text)
    fresh()
    assert main(["distill", "digits_paper", "--teacher", "bag:teacher", "--out", "runs/bag", *SHORT]) == 0
    dark = OneStepPipeline.from_pretrained("runs/bag", device="cpu", trust=["bag"])([0, 1], output_type="np").images
    assert np.max(dark) == 0


def test_what_is_no_teacher_is_refused(here, capsys):
    Path("odd.py").write_text("def teacher():\n    return 3\n")
    for name, message in (
        ("nowhere:teacher", "cannot be imported"),
        ("bag:student", "has no function student"),
        ("odd:teacher", "must give a dd2.teachers.base.Teacher, it gave a int"),
    ):
        assert main(["distill", "digits_paper", "--teacher", name, "--out", "runs/x", *SHORT]) == 2
        assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_calls_of_the_page(here):
    names: dict = {}
    sys.path.insert(0, str(here))
    try:
        exec(blocks("python")[1], names)
    finally:
        sys.path.pop(0)
    from dd2.checkpoints.native import load_generator
    from dd2.sampling import ar_diffusion, one_step

    labels = torch.tensor([0, 1, 1])
    trained, loaded = names["networks"].ema, names["generator"].student
    assert torch.equal(one_step(loaded, labels, range(3)), one_step(trained, labels, range(3)))
    assert ar_diffusion(loaded, labels, range(3)).shape == (3, 16, 4)
    with pytest.raises(InputError, match="--trust bag"):
        load_generator(here / "runs" / "by_hand" / "generator")
