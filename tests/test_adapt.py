"""Stage 0: a continuous input layer for LlamaGen's embedding table, and the way from official files to a one-step generator."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dd2.checkpoints.native import load_teacher, save_teacher
from dd2.checkpoints.runs import embedded, open_run
from dd2.cli import main
from dd2.commands.adapt import adapt
from dd2.errors import InputError
from dd2.method.adapt import compare
from dd2.method.config import AdaptConfig
from dd2.teachers.adaptation import adapted_copy, table_of
from dd2.teachers.code import CodeTeacher, require_codes
from dd2.teachers.conditions import CaptionLabels
from dd2.teachers.filtering import Sampling
from dd2.teachers.llamagen import LlamaGenBackbone, llamagen_teacher
from dd2.text.captions import Captions
from dd2.text.encoder import spec_of
from dd2.text.encoders import open_encoder
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.schedule import OptimConfig
from golden_weights import golden_model
from models import tiny_teacher, tiny_text


@pytest.fixture(scope="module")
def original() -> CodeTeacher:
    """The embedded digits teacher as an official model would be: an embedding row per code, a shuffled and noisy one."""
    digits = require_codes(load_teacher(embedded("teacher")), "a test")
    assert isinstance(digits.backbone, LlamaGenBackbone)
    teacher = llamagen_teacher(replace(digits.backbone.config, input_layer="table"), digits.tokenizer)
    state = {key: value for key, value in digits.state_dict().items() if ".tok_embeddings." not in key}
    rows = digits.backbone.tok_embeddings(digits.tokenizer.codebook)
    state["backbone.tok_embeddings.weight"] = rows
    teacher.load_state_dict(state)
    return teacher.eval().requires_grad_(False)


def rates(lr: float) -> OptimConfig:
    return OptimConfig(lr=lr, decay="cosine", betas=(0.9, 0.99))


def test_the_table_twin_is_the_digits_teacher(original):
    digits = require_codes(load_teacher(embedded("teacher")), "a test")
    labels = torch.arange(10)
    ids = digits.generate(labels, Sampling(), range(10))
    assert torch.equal(original.generate(labels, Sampling(), range(10)), ids)
    torch.testing.assert_close(
        original.logits(original.codebook[ids], labels), digits.logits(digits.codebook[ids], labels), atol=1e-4, rtol=0
    )


@pytest.mark.long
def test_adapted_digits_teacher_is_within_a_hundredth_of_a_nat(original, tmp_path, capsys):
    config = AdaptConfig(
        fit_iterations=120, fit=rates(3e-3), sequences=4000, iterations=150, batch=64, accumulate=1, optim=rates(7e-4)
    )
    trainer = Trainer(tmp_path, 0, LoopConfig(log_every=30, save_every=1000, preview_every=0), torch.device("cpu"), "again")
    adapted, _ = adapt(original, config, trainer)
    assert adapted.backbone.continuous
    report = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert report["stage"] == "adapt_report"
    assert 0 <= report["kl_after"] <= 0.01
    assert report["kl_after"] < report["kl_before"] < 3
    assert abs(report["nll_after"] - report["nll_original_after"]) <= 0.01
    assert "KL to the original" in capsys.readouterr().out
    # The report's numbers are what an independent count gives, on other sequences.
    labels = torch.arange(400) % 10
    ids = original.generate(labels, Sampling(), range(10**6, 10**6 + 400))
    again = compare(require_codes(load_teacher(tmp_path / "teacher"), "a test"), original, ids, labels, 100)
    assert again["kl"] == pytest.approx(report["kl_after"], rel=0.5)
    # What is generated and what is scored agree.
    greedy = adapted.generate(labels, Sampling(top_k=1), range(400))
    assert torch.equal(adapted.logits(adapted.codebook[greedy], labels).argmax(-1), greedy)


@pytest.mark.e2e
def test_part_a_alone_fits_the_table(original, tmp_path):
    config = AdaptConfig(fit_iterations=600, fit=rates(3e-3), sequences=64, iterations=0)
    trainer = Trainer(tmp_path, 0, LoopConfig(preview_every=0), torch.device("cpu"), "again")
    adapted, _ = adapt(original, config, trainer)
    fitted = adapted.backbone.tok_embeddings(original.tokenizer.codebook)  # pyright: ignore[reportCallIssue]
    assert (fitted - table_of(original)).square().mean() < 1e-2 * table_of(original).var()


@pytest.mark.e2e
def test_real_images_as_data(original, tmp_path):
    save_teacher(tmp_path / "official", original)
    arguments = ["--adapt.data", "digits", "--adapt.sequences", "256", "--adapt.iterations", "2", "--adapt.fit-iterations", "2"]
    out = tmp_path / "run"
    assert main(["adapt", "--teacher", str(tmp_path / "official"), "--out", str(out), *arguments]) == 0
    assert require_codes(load_teacher(out / "teacher"), "a test").backbone.continuous
    assert main(["adapt", str(out / "config.yaml")]) == 0  # finished: it finds everything done
    (_, *rows) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any(row["stage"] == "adapt" and 0 < row["teacher/loss"] < 6 for row in rows)


@pytest.mark.e2e
def test_pictures_with_captions_as_data(tmp_path, capsys):
    """Of a teacher of texts: the data's captions are read by the encoder that it remembers, the run's own are compared on."""
    teacher = tiny_teacher(caption_dim=256, caption_length=12, input_layer="table")
    teacher.conditions = CaptionLabels(12, 256, encoder=open_encoder(spec_of("wordllama", 12)).spec)
    save_teacher(tmp_path / "text", teacher)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    channels, side, _ = teacher.tokenizer.image_shape
    for number, text in enumerate(["a red fox", "snow"]):
        Image.new("RGB" if channels == 3 else "L", (side, side)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(text)
    (tmp_path / "asked.txt").write_text("a three above a seven\ntwo fives\na nine\n")
    arguments = ["adapt", "--teacher", tmp_path / "text", "--captions", tmp_path / "asked.txt", "--out", tmp_path / "run"]
    arguments += ["--adapt.sequences", 32, "--adapt.iterations", 2, "--adapt.fit-iterations", 2]
    assert main([str(a) for a in [*arguments, "--adapt.data", pictures]]) == 0
    assert "2 different captions" in capsys.readouterr().out
    assert require_codes(load_teacher(tmp_path / "run" / "teacher"), "a test").backbone.continuous
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row["stage"] == "adapt" for row in rows)
    save_teacher(tmp_path / "unsaid", tiny_teacher(caption_dim=6, caption_length=5, input_layer="table"))
    features = tmp_path / "features.safetensors"
    Captions(torch.randn(3, 6), torch.ones(3, dtype=torch.int64), 5).save(features)
    unsaid = ["adapt", "--teacher", tmp_path / "unsaid", "--captions", features, "--out", tmp_path / "other", "--adapt.data"]
    for wrong, message in (
        ([*arguments, "--adapt.data", "digits"], "has classes, and the teacher reads captions"),
        ([*unsaid, pictures], "does not say which text encoder"),
    ):
        assert main([str(a) for a in wrong]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_teacher_that_needs_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="needs no adaptation"):
        adapted_copy(require_codes(load_teacher(embedded("teacher")), "a test"))
    assert main(["adapt", "--teacher", "digits", "--out", str(tmp_path / "run")]) == 2
    assert "needs no adaptation" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_stage_0_cannot_use_is_refused_before_a_run_exists(original, tmp_path, capsys):
    save_teacher(tmp_path / "digits", original)
    save_teacher(tmp_path / "text", tiny_text())
    for label in ("a", "b"):
        (tmp_path / "two" / label).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / "two" / label / "1.png")
    run, images = tmp_path / "run", ["--adapt.data", tmp_path / "two"]
    raster = embedded("teacher") / "tokenizer"
    for arguments, message in (
        (["adapt", "--teacher", tmp_path / "digits", *images], "has 2 classes, the teacher has 10 classes"),
        (["distill", "--teacher", tmp_path / "digits", *images], "has 2 classes, the teacher has 10 classes"),
        (["distill", "--teacher", tmp_path / "text"], "give prompts, a list of them"),
        (
            ["train-teacher", "--tokenizer", raster, "--teacher.caption-dim", 4],
            "teacher.caption_dim 4 is decided by the text encoder",
        ),
    ):
        assert main([str(a) for a in (*arguments, "--out", run)]) == 2
        assert message in capsys.readouterr().err
        assert not run.exists()


@pytest.mark.e2e
def test_from_official_files_to_a_one_step_generator_with_one_config(tmp_path, monkeypatch, capsys):
    torch.save({"model": golden_model("llamagen_tiny", "gpt_shapes")}, tmp_path / "gpt.pt")
    torch.save({"model": golden_model("llamagen_tiny", "vq_shapes")}, tmp_path / "vq.pt")
    files = ["--gpt", tmp_path / "gpt.pt", "--vq", tmp_path / "vq.pt", "--num-heads", 2, "--image-size", 16]
    assert main([str(a) for a in ["convert", "llamagen", *files, "--out", tmp_path / "official"]]) == 0
    few = {"iterations": 3, "batch": 8, "accumulate": 1, "sampling": {"cfg_scale": 1.5, "top_k": 32}}
    config = {
        "teacher": str(tmp_path / "official"),
        "out": str(tmp_path / "run"),
        "teacher_samples": 64,
        "head": {"depth": 1, "width": 16, "frequencies": 4},
        "adapt": {"fit_iterations": 50, "sequences": 64, "iterations": 3, "batch": 8, "accumulate": 1},
        "tune": few,
        "csd": {**few, "k": 1},
        "loop": {"preview_every": 0},
    }
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    assert main(["distill", str(tmp_path / "one.yaml")]) == 0
    run = open_run(tmp_path / "run", torch.device("cpu"))
    assert run.teacher.backbone.continuous  # what was distilled is the adapted teacher
    (tmp_path / "features_of_test.py").write_text("def pool(images):\n    return images.mean((2, 3))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    evaluated = ["evaluate", str(tmp_path / "run"), "--count", "40", "--batch", "20", "--features", "features_of_test:pool"]
    assert main(evaluated) == 0
    sys.modules.pop("features_of_test")
    numbers = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"adapt", "tune", "csd", "evaluate"} <= numbers["seconds"].keys()
    capsys.readouterr()
    assert main(["distill", str(tmp_path / "one.yaml")]) == 0  # finished: it finds everything done
    assert main(["sample", str(tmp_path / "run"), "--steps", "3", "--count", "4", "--out", str(tmp_path / "grid.png")]) == 0
    assert Path(tmp_path / "grid.png").exists()
