"""The main job on real digits at a fixed seed, shortened: what it must reach, and that its files can be used."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dd2 import OneStepPipeline
from dd2.cli import main
from dd2.commands.train_classifier import TrainClassifierConfig
from dd2.config import load_config
from dd2.evaluation.config import EvaluateConfig
from dd2.training.metrics import MetricsLog

pytestmark = pytest.mark.e2e


def made(folder: Path, tune: int, csd: int, samples: int, count: int) -> Path:
    """A run of the paper's recipe with fewer iterations, evaluated."""
    short = ["--tune.iterations", tune, "--csd.iterations", csd, "--teacher-samples", samples, "--loop.preview-every", csd]
    short += ["--csd.validation", 128]
    assert main([str(part) for part in ("distill", "digits_paper", "--out", folder, *short)]) == 0
    evaluation = ("--count", count, "--metrics.kid-subsets", 2, "--metrics.halves", 2, "--batch", 100)
    assert main([str(part) for part in ("evaluate", folder, *evaluation)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("digits"), 50, 20, 2048, 400)


def test_what_the_digits_reach(run):
    """A tenth of the demo's training: far from its quality, and past independent tokens in what the teacher thinks of them."""
    numbers = json.loads((run / "metrics.json").read_text())
    frechet, nll = numbers["frechet"], numbers["teacher_nll"]
    span = frechet["onestep_marginal"] - frechet["floor"]
    assert (frechet["ar_diffusion"] - frechet["floor"]) / span < 1  # stage 1 works: nearer than independent tokens
    assert nll["teacher"] < nll["generator"] < nll["onestep_marginal"]
    assert numbers["accuracy"]["teacher"] > 0.95
    assert numbers["accuracy"]["generator"] > 0.6
    assert numbers["distinct_sequences"]["generator"] > 390  # no collapse
    assert numbers["speedup_vs_teacher"] > 0
    losses = [row["student/loss"] for row in MetricsLog(run / "metrics.jsonl").rows() if row["stage"] == "tune"]
    assert losses[-1] < 0.4 * losses[0]


def by_our_recipe(folder: Path, count: int, *more: object) -> dict:
    """The numbers of a run of the demo's configuration with some fields changed."""
    assert main([str(part) for part in ("distill", "digits", "--out", folder, "--loop.preview-every", 0, *more)]) == 0
    evaluation = ("--count", count, "--metrics.kid-subsets", 2, "--metrics.halves", 2, "--batch", 100, "--no-speed")
    assert main([str(part) for part in ("evaluate", folder, *evaluation)]) == 0
    return json.loads((folder / "metrics.json").read_text())


def test_what_our_recipe_reaches(tmp_path):
    """A thirteenth of the demo's training: far past independent tokens already, and past the paper's recipe in `run`."""
    short = ("--regress.iterations", 150, "--regress.guidance-iterations", 10, "--regress.pairs", 2048, "--teacher-samples", 2048)
    stage2 = ("--csd.iterations", 15, "--csd.validation", 128, "--csd.match.prime", 512)
    numbers = by_our_recipe(tmp_path / "run", 400, *short, *stage2)
    assert numbers["gap_closed"] > 0.5  # 0.64 when it was written
    assert numbers["teacher_nll"]["generator"] < 65  # 61
    assert numbers["accuracy"]["generator"] > 0.9  # 0.955
    assert numbers["distinct_sequences"]["generator"] > 390


@pytest.mark.long
def test_what_the_demo_reaches(tmp_path):
    numbers = by_our_recipe(tmp_path / "run", 10_000)
    assert numbers["gap_closed"] > 0.94  # 0.955 when it was written
    assert numbers["teacher_nll"]["generator"] < 51  # 48.9
    assert numbers["accuracy"]["generator"] > 0.97


@pytest.mark.long
def test_what_the_digits_reach_with_more_time(tmp_path):
    numbers = json.loads((made(tmp_path / "run", 150, 150, 8192, 2000) / "metrics.json").read_text())
    frechet, nll = numbers["frechet"], numbers["teacher_nll"]
    span = frechet["onestep_marginal"] - frechet["floor"]
    assert (frechet["ar_diffusion"] - frechet["floor"]) / span < 0.35
    assert numbers["gap_closed"] > 0.4  # the generator is far better than independent tokens
    assert nll["teacher"] < nll["generator"] < nll["onestep_marginal"]
    assert numbers["accuracy"]["generator"] > 0.7


def test_a_run_documents_itself(run):
    for name in ("config.yaml", "versions.json", "metrics.jsonl", "metrics.json", "report.html", "seconds.json"):
        assert (run / name).stat().st_size > 50
    for name in ("samples.png", "curves.png", "samples/tune-00000040.png", "samples/csd-00000020.png"):
        with Image.open(run / name) as picture:
            assert picture.size[0] > 300


def test_pipeline(run):
    pipeline = OneStepPipeline.from_pretrained(run, device="cpu")
    images = pipeline([3, "five", 7], seeds=[4, 5, 6], output_type="np").images
    same = OneStepPipeline.from_pretrained(run / "generator", device="cpu")([3, 5, 7], seeds=[4, 5, 6], output_type="np")
    np.testing.assert_array_equal(same.images, images)
    snapped = pipeline([3, 5, 7], seeds=[4, 5, 6], nearest=True, output_type="np").images
    assert 0 < np.abs(np.subtract(snapped, images)).mean() < 0.15


@pytest.mark.long
def test_from_scratch_trains_every_part(tmp_path, monkeypatch):
    """`dd2 demo --from-scratch`, every part shortened: the parts are trained, used and reported."""
    from dd2.commands import demo

    short = {
        "digits": ["--regress.iterations", "4", "--regress.pairs", "64", "--csd.iterations", "4", "--teacher-samples", "512"],
        "digits_tokenizer": ["--iterations", "6"],
        "digits_teacher": ["--iterations", "6", "--token-images", "600", "--teacher.depth", "1", "--loop.preview-every", "0"],
    }
    load, classifier, evaluate = load_config, TrainClassifierConfig, EvaluateConfig
    monkeypatch.setattr(demo, "load_config", lambda kind, name: load(kind, name, short[name]))
    monkeypatch.setattr(demo, "TrainClassifierConfig", lambda **fields: classifier(**fields, iterations=5))
    monkeypatch.setattr(demo, "EvaluateConfig", lambda **fields: evaluate(**fields, count=200))
    assert main(["demo", "--from-scratch", "--out", str(tmp_path / "demo")]) == 0
    for part in ("tokenizer/tokenizer", "teacher/teacher", "classifier/classifier"):
        assert (tmp_path / "demo" / "parts" / part / "model.safetensors").is_file()
    assert (tmp_path / "demo" / "report.html").is_file()
    teacher = tmp_path / "demo" / "parts" / "teacher" / "teacher"
    assert f"teacher: {teacher}" in (tmp_path / "demo" / "config.yaml").read_text()
