"""dd2 own-data: from a folder of images to a report, with what it decides, judges and refuses."""

import dataclasses
import json
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dd2.cli import main
from dd2.commands.train_teacher import train_teacher
from dd2.config import load_config
from dd2.errors import TrainingFailed
from dd2.own_data import budget, command
from dd2.own_data.budget import planned
from dd2.own_data.rates import Rates
from dd2.own_data.recipe import SIZES, Task, runs, side_of_tokens
from dd2.training.health import STATE
from dd2.training.metrics import MetricsLog

RATES = Rates(
    tokenizer=0.1, token_image=0.001, teacher=0.2, classifier=0.05, sample=0.005, pair=0.005, regress=0.3, guidance=0.5, csd=1.0
)
TASK = Task("photos", 32, 1, 20_000, 10)
OPEN = {  # as if there were no least and no most
    "LEAST": dict.fromkeys(("tokenizer", "teacher", "classifier", "regress", "csd"), 0),
    "MOST": dict.fromkeys(("tokenizer", "classifier", "regress", "guidance", "csd"), 10**9),
    "SAMPLES": (0, 10**9),
    "IMAGES": (0, 10**9),
    "EPOCHS": 10**9,
}


def pictures(file: Path, count: int = 240, side: int = 20, classes: int = 2) -> Path:
    """Grey squares at random places, of a brightness that depends on the class."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(file, "w") as archive:
        for index in range(count):
            image = rng.integers(0, 40, (side, side), dtype=np.uint8)
            top, left, size = *rng.integers(0, side - 8, 2).tolist(), rng.integers(4, 9)
            image[top : top + size, left : left + size] = 120 + 100 * (index % classes)
            with archive.open(f"class{index % classes}/{index}.png", "w") as entry:
                Image.fromarray(image).save(entry, "PNG")
    return file


@pytest.mark.parametrize("minutes", [30.0, 60.0, 240.0])
def test_a_plan_fills_its_time(minutes, monkeypatch):
    for name, value in OPEN.items():
        monkeypatch.setattr(budget, name, value)
    found = planned(TASK, RATES, minutes, 64)
    assert not found.short
    assert sum(found.seconds.values()) == pytest.approx(60 * minutes, rel=0.05)
    for stage, share in budget.SHARES.items():
        assert found.seconds[stage] / (60 * minutes) == pytest.approx(share, rel=0.35), stage
    twice = planned(TASK, RATES, 2 * minutes, 64).counts
    assert twice.regress == pytest.approx(2 * found.counts.regress, rel=0.15)


def test_what_is_spared_goes_to_later_stages():
    few = dataclasses.replace(TASK, images=500)
    assert planned(few, RATES, 600, 64).counts.teacher == 500 * budget.EPOCHS // 64
    slow, fast = planned(TASK, RATES, 120, 64), planned(TASK, dataclasses.replace(RATES, tokenizer=0.001), 120, 64)
    assert fast.counts.tokenizer == budget.MOST["tokenizer"]
    assert fast.seconds["teacher"] > 1.05 * slow.seconds["teacher"]
    assert "classifier" not in planned(dataclasses.replace(TASK, features="inception"), RATES, 60, 64).seconds


def test_too_little_time_says_how_much_would_do():
    found = planned(TASK, RATES, 1, 64)
    assert found.short > 1
    assert not planned(TASK, RATES, found.short, 64).short


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_networks_fit_images_of_every_size(size):
    task = dataclasses.replace(TASK, size=size, channels=3)
    for sizes in SIZES:
        found = runs(task, sizes, planned(task, RATES, 60, 64).counts, Path("out"))
        tokens = side_of_tokens(size)
        assert found.tokenizer.tokenizer.grid == tokens
        assert (tokens, size // tokens >= 4) == ({16: 4, 32: 8, 64: 8, 128: 16, 256: 16}[size], True)
        assert found.one_step.teacher == "out/teacher/teacher"
        assert found.evaluate.count % task.classes == 0


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Path:
    """Images, and a plan that runs in seconds."""
    monkeypatch.chdir(tmp_path)
    least = {"tokenizer": 6, "teacher": 8, "classifier": 6, "regress": 6, "csd": 4}
    monkeypatch.setattr(budget, "LEAST", least)
    monkeypatch.setattr(budget, "MOST", least | {"guidance": 4})
    monkeypatch.setattr(budget, "EPOCHS", 0)
    monkeypatch.setattr(budget, "SAMPLES", (400, 400))
    monkeypatch.setattr(budget, "IMAGES", (60, 60))
    return pictures(tmp_path / "photos.zip")


@pytest.mark.e2e
def test_from_images_to_a_report_with_an_interruption(quick, monkeypatch, capsys):
    words = ["own-data", "photos.zip", "--size", "16", "--minutes", "20", "--out", "out"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "228 images of 2 classes" in said
    assert "in all" in said
    assert not Path("out").exists()
    with monkeypatch.context() as patched:
        patched.setattr(command, "train_classifier", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 130
    assert "go on with all of it by: dd2 own-data photos.zip --size 16 --minutes 20.0 --out out" in capsys.readouterr().err
    plan = json.loads(Path("out/plan.json").read_text())
    assert plan["sizes"] == "small"
    teacher = Path("out/teacher/teacher/model.safetensors").read_bytes()
    assert main([*words, "--despite", "collapse", "dead codes", "memorised"]) == 0, capsys.readouterr().err
    assert Path("out/teacher/teacher/model.safetensors").read_bytes() == teacher
    assert json.loads(Path("out/plan.json").read_text()) == plan
    for file in ("report.html", "metrics.json", "generator/model.safetensors"):
        assert Path("out/one_step", file).stat().st_size > 500
    rows = MetricsLog(Path("out/teacher/metrics.jsonl")).rows()
    validated = {row["step"]: row["validation"] for row in rows if "validation" in row}
    assert len(validated) == 8  # every checkpoint was judged
    assert f"held-out images were known best at step {min(validated, key=validated.__getitem__)}," in capsys.readouterr().out
    for changed, name in ((["--size", "32"], "size"), (["--minutes", "30"], "minutes"), (["--seed", "1"], "seed")):
        assert main([*words, *changed]) == 2
        assert f"was begun with {name}" in capsys.readouterr().err
    Path("out/plan.json").write_text("{}")
    assert main(words) == 2
    assert "plan.json is damaged" in capsys.readouterr().err
    Path("out/plan.json").unlink()
    assert main(words) == 2
    assert "no plan.json that says what was to come" in capsys.readouterr().err


@pytest.mark.e2e
def test_a_teacher_that_memorised_stops_it(quick, monkeypatch, capsys):
    """Whatever a stage logs as a sign of failure, unless the user insists."""

    def memorising(config):
        folder = train_teacher(config)
        log = MetricsLog(config.out / "metrics.jsonl")
        log.rewind("judged", -1)
        log.append({"stage": "judged", "step": 1, STATE: {"memorised": "held-out images are much worse"}})
        return folder

    monkeypatch.setattr(command, "train_teacher", memorising)
    words = ["own-data", "photos.zip", "--size", "16", "--minutes", "20", "--out", "out", "--despite", "dead codes"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "teacher shows memorised: held-out images are much worse" in said
    assert "--despite 'dead codes' memorised" in said
    assert not Path("out/one_step").exists()


def test_the_command_that_goes_on_is_the_same_one():
    given = command.OwnDataConfig("my photos.zip", 32, 30.123456789, Path("o"), despite=("memorised", "dead codes"), seed=3)
    words = shlex.split(command._again(given))
    assert words[:2] == ["dd2", "own-data"]
    assert load_config(command.OwnDataConfig, "", words[2:]) == given


def test_one_grey_image_does_not_make_all_grey(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as archive:
        for index in range(20):
            with archive.open(f"c{index % 2}/{index:02d}.png", "w") as entry:
                Image.new("L" if index == 0 else "RGB", (20, 20), 100 if index == 0 else (200, 10, 10)).save(entry, "PNG")
    task = command._looked_at(command.OwnDataConfig(str(tmp_path / "mixed.zip"), 16))
    assert task.channels == 3
    assert "1 of 20 images looked at are grey" in capsys.readouterr().err


def test_divergence_stops_unless_told_otherwise():
    counts = planned(TASK, RATES, 60, 64).counts
    for stop in (True, False):
        found = runs(TASK, SIZES[1], counts, Path("out"), stop=stop)
        for run in (found.tokenizer, found.teacher, found.classifier, found.one_step):
            assert run.loop.stop_on == (("divergence",) if stop else ())


@pytest.mark.parametrize(("usage", "stops"), [((0.08, 0.3, 0.95), False), ((0.6, 0.3, 0.2), True)])
def test_dead_codes_may_have_been_revived(usage, stops, tmp_path):
    """A tokenizer is judged by how it ended, not by what was noticed on the way."""
    (tmp_path / "tokenizer").mkdir()
    log = MetricsLog(tmp_path / "tokenizer" / "metrics.jsonl")
    for step, value in enumerate(usage, 1):
        health = {STATE: {"dead codes": "so few"}} if step == 2 else {}
        log.append({"stage": "tokenizer", "step": 100 * step, "tokenizer/usage": value, "tokenizer/loss": 1.0 / step, **health})
    config = command.OwnDataConfig("x", out=tmp_path)
    if stops:
        with pytest.raises(TrainingFailed, match="dead codes"):
            command._judge("tokenizer", config)
    else:
        command._judge("tokenizer", config)


def test_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "one.zip", classes=1)
    pictures(tmp_path / "two.zip")
    (tmp_path / "empty").mkdir()
    for words, said in (
        (["two.zip", "--size", "48"], "size must be one of 16, 32"),
        (["two.zip", "--minutes", "0"], "minutes must be positive"),
        (["two.zip", "--despite", "bad luck"], "despite knows"),
        (["one.zip"], "has one class"),
        (["empty"], "empty"),
        (["none.zip"], "none.zip"),
        (["two.zip", "--features", "nowhere"], "nowhere"),
        ([], "DATA"),
    ):
        assert main(["own-data", *words, "--out", "out"]) == 2, words
        assert said in capsys.readouterr().err
        assert not Path("out").exists()
