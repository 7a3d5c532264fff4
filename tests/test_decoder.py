"""dd2 align-decoder: the distance that is trained on, what it reaches, and what evaluation then says."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from dd2.checkpoints.native import load_generator, save_teacher
from dd2.cli import main
from dd2.code_student import CodeStudent
from dd2.errors import InputError
from dd2.evaluation.features import open_features
from dd2.frechet import fit_gaussian, frechet_distance
from dd2.generator import Generator
from dd2.method.decoder import DecoderConfig, DecoderMatch, decoder_stage, trainable_decoder
from dd2.sampling import one_step
from dd2.teachers.filtering import Sampling
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.samples import TeacherSamples
from dd2.training.schedule import OptimConfig
from models import tiny_teacher, tiny_var

CPU = torch.device("cpu")


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1) @ torch.linspace(-1, 1, 256 * 3).view(256, 3).sin()


def test_the_distance_is_the_one_of_all_images_and_its_gradient_that_of_the_batch():
    random = torch.Generator().manual_seed(0)
    images, other = (torch.rand(60, 1, 16, 16, generator=random) * 2 - 1 for _ in range(2))
    reference = fit_gaussian([flat(other) * 2 + 1])
    match = DecoderMatch({"flat": flat}, {"flat": reference}, DecoderConfig(beta=0.25, prime=60, epsilon=0.5), CPU)
    match.prime(lambda rows: images[rows], 60, 7)
    batch = images[:20].clone().requires_grad_()
    loss, measured = match(batch)
    (gradient,) = torch.autograd.grad(loss, batch)
    assert gradient.abs().sum() > 0
    both = torch.cat([flat(images), flat(images[:20])]).double()
    weights = torch.cat([torch.full((60,), 0.25 / 60), torch.full((20,), 0.75 / 20)]).double()
    mean = weights @ both
    covariance = (both - mean).T @ ((both - mean) * weights[:, None])
    expected = frechet_distance(type(reference)(mean, covariance), reference)
    assert float(measured["flat"]) == pytest.approx(expected, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(expected / (expected + 0.5), rel=1e-4)


@pytest.mark.parametrize("build", [tiny_teacher, tiny_var])
def test_a_decoder_learns_what_it_is_matched_to_and_nothing_else_changes(build, tmp_path):
    """Negatives of the teacher's images are the reference; the tokenizer's own decoder is far from them."""
    teacher = build()
    samples = TeacherSamples.prepare(tmp_path / "samples", teacher, Sampling(), 300, seed=0)
    teacher.standardise(samples.kept)
    generator = Generator.of(CodeStudent.from_teacher(teacher), teacher)
    tokenizer = trainable_decoder(generator.tokenizer)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokens, labels = samples.take(torch.arange(300))
    with torch.no_grad():
        reference = fit_gaussian([flat(-teacher.decode(tokens, teacher.conditions(labels)))])
    config = DecoderConfig(iterations=150, batch=32, beta=0.9, prime=320, optim=OptimConfig(lr=2e-3, decay="cosine", warmup=5))
    match = DecoderMatch({"flat": flat}, {"flat": reference}, config, CPU)
    stage = decoder_stage(generator, tokenizer, samples, match, config)
    (tmp_path / "run").mkdir()
    Trainer(tmp_path / "run", 0, LoopConfig(preview_every=0), CPU, "").run(stage)

    @torch.no_grad()
    def distance(decoder) -> float:
        cond = teacher.conditions(torch.arange(300) % 3)
        drawn = one_step(generator.student, cond, range(300))
        found = fit_gaussian([flat(decoder.decode_tiled(generator.student.backbone.to_codes(drawn)))])
        return frechet_distance(found, reference)

    assert distance(tokenizer) < 0.2 * distance(generator.tokenizer)
    trained = {name for name, value in tokenizer.state_dict().items() if not torch.equal(value, before[name])}
    assert trained
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in trained)


SMALL = {
    "teacher_samples": 120,
    "networks.generator": "codes",
    "networks.guidance": "codes",
    "regress.iterations": 2,
    "regress.pairs": 24,
    "regress.batch": 8,
    "csd.iterations": 2,
    "csd.batch": 8,
    "csd.match.weight": 0,
    "csd.validation": 0,
    "loop.preview_every": 0,
}


def arguments(fields: dict[str, object]) -> list[str]:
    return [text for name, value in fields.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("decoder")
    save_teacher(home / "teacher", tiny_teacher())
    assert main(["distill", "digits", "--teacher", str(home / "teacher"), "--out", str(home / "run"), *arguments(SMALL)]) == 0
    return home / "run"


ALIGN = {
    "decoder.iterations": 4,
    "decoder.optim.lr": 0.01,
    "decoder.optim.warmup": 1,
    "decoder.batch": 8,
    "decoder.prime": 80,
    "loop.preview_every": 0,
    "loop.save_every": 2,
}


@pytest.mark.e2e
def test_the_command_resumes_and_evaluation_names_the_decoder(run, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["align-decoder", str(run), "--out", str(whole), *arguments(ALIGN)]) == 0
    short = arguments({**ALIGN, "loop.save_every": 1, "loop.keep": 9})
    assert main(["align-decoder", str(run), "--out", str(parts), *short]) == 0
    for kept in ("00000003", "00000004"):  # as if it had been killed after the second iteration
        for path in (parts / "checkpoints" / "decoder").glob(kept):
            path.rename(tmp_path / kept)
    shutil.rmtree(parts / "generator")
    assert [path.name for path in sorted((parts / "checkpoints" / "decoder").iterdir())] == ["00000001", "00000002"]
    assert main(["align-decoder", str(run), "--out", str(parts), *short]) == 0
    weights = [load_generator(folder / "generator").tokenizer.state_dict() for folder in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    own = load_generator(run / "generator")
    made = load_generator(whole / "generator")
    assert own.tokenizer.aligned is None
    assert made.tokenizer.aligned is not None
    assert made.tokenizer.aligned.digests == (open_features("digits", CPU).digest,)
    same = own.student.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in made.student.state_dict().items())
    capsys.readouterr()
    assert main(["evaluate", str(whole), "--count", "90", "--no-speed", "--steps", "1", "3"]) == 0
    said = capsys.readouterr().out
    assert "decoder: aligned to the teacher's images in digits classifier" in said
    assert "warning: the decoder was trained on the distance in digits classifier" in said
    numbers = json.loads((whole / "metrics.json").read_text())
    titles = numbers["methods"]
    assert titles["teacher_aligned"].endswith("aligned decoder")
    assert titles["generator"] == "Generator, one step, aligned decoder"
    assert titles["generator_3_steps"].endswith("aligned decoder")
    assert not titles["teacher"].endswith("aligned decoder")
    assert not titles["onestep_marginal"].endswith("aligned decoder")
    assert main(["evaluate", str(run), "--count", "90", "--no-speed", "--cache", str(whole / "features")]) == 0
    before = json.loads((run / "metrics.json").read_text())
    assert before["evaluation"]["decoder"] == "the tokenizer's own"
    for name in ("teacher", "onestep_marginal"):
        assert before["metrics"][name]["frechet"] == numbers["metrics"][name]["frechet"]
    assert before["metrics"]["generator"]["frechet"] != numbers["metrics"]["generator"]["frechet"]
    assert before["metrics"]["generator"]["teacher_nll"] == numbers["metrics"]["generator"]["teacher_nll"]


FIELDS = {
    "decoder.iterations": 5,
    "decoder.batch": 4,
    "decoder.accumulate": 2,
    "decoder.beta": 0.5,
    "decoder.prime": 40,
    "decoder.epsilon": 50.0,
    "decoder.optim.lr": 0.02,
    "features": "test_decoder:pixels",
    "count": 60,
    "seed": 1,
}
"""Every field that decides what is learned, and another value."""


@pytest.mark.e2e
def test_every_field_arrives(run, tmp_path):
    def learned(name: str, fields: dict[str, object]) -> torch.Tensor:
        assert main(["align-decoder", str(run), "--out", str(tmp_path / name), *arguments({**ALIGN, **fields})]) == 0
        state = load_generator(tmp_path / name / "generator").tokenizer.state_dict()
        return torch.cat([state[key].flatten() for key in sorted(state)])

    base = learned("base", {})
    assert torch.equal(learned("again", {}), base)
    for name, value in FIELDS.items():
        assert not torch.equal(learned(name, {name: value}), base), name
    assert {f"decoder.{field.name}" for field in dataclasses.fields(DecoderConfig)} - {"decoder.optim"} <= FIELDS.keys()


def pixels(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, ::32]


@pytest.mark.e2e
def test_a_named_reference_and_what_it_refuses(run, tmp_path, capsys):
    images = tmp_path / "images.npz"
    random = torch.Generator().manual_seed(0)
    np.savez(images, arr_0=torch.randint(256, (120, 16, 16, 1), generator=random, dtype=torch.uint8).numpy())
    statistics = tmp_path / "statistics.npz"
    assert main(["reference", str(images), str(statistics), "--features", "digits"]) == 0
    made = {}
    for reference in (images, statistics):
        out = tmp_path / reference.stem
        assert main(["align-decoder", str(run), "--out", str(out), "--reference", str(reference), *arguments(ALIGN)]) == 0
        made[reference.stem] = load_generator(out / "generator").tokenizer
        assert made[reference.stem].aligned is not None
        assert f"to {reference.name} (SHA-256 " in str(made[reference.stem].aligned)
    weights = [made[name].state_dict() for name in ("images", "statistics")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
    capsys.readouterr()
    other = ["--reference", str(statistics), "--features", "test_decoder:pixels"]
    assert main(["align-decoder", str(run), "--out", str(tmp_path / "other"), *other, *arguments(ALIGN)]) == 2
    assert "made with" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main(["align-decoder", str(tmp_path / "images"), "--out", str(tmp_path / "twice"), *arguments(ALIGN)]) == 2
    assert "give the run that it was made from" in capsys.readouterr().err


def no_gradient(images: torch.Tensor) -> torch.Tensor:
    return images.detach().flatten(1)[:, :5]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--features", "test_decoder:no_gradient"], "give no gradient"),
        (["--features", "nowhere"], "features must be"),
        (["--features", "digits", "digits"], "each once"),
        (["--decoder.beta", "1"], "decoder.beta must be in [0, 1)"),
        (["--decoder.iterations", "0"], "decoder.iterations must be at least 1"),
        (["--count", "1"], "count must be at least 2"),
    ],
)
def test_what_is_refused(run, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["align-decoder", str(run), "--out", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_its_own_output(run, capsys):
    assert main(["align-decoder", str(run), "--out", str(run)]) == 2
    assert "is the run itself" in capsys.readouterr().err


def test_tokenizers_that_say_nothing_of_their_decoder():
    teacher = tiny_teacher()
    tokenizer = teacher.tokenizer
    tokenizer.__class__ = type("Other", (type(tokenizer),), {"decoding": []})
    with pytest.raises(InputError, match="decoder"):
        trainable_decoder(tokenizer)
