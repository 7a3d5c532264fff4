"""Whole sequences matched: distances against references, gradients, memory, and what is refused."""

from dataclasses import replace

import pytest
import torch

from dd2.cli import main
from dd2.code_student import CodeStudent
from dd2.errors import InputError
from dd2.frechet import distance_between, fit_gaussian, frechet_distance
from dd2.method.config import MatchConfig
from dd2.method.match import FrechetMatch, KernelMatch, SequenceFeatures, SequenceMatch, sequence_match
from dd2.method.validation import TeacherDistance
from dd2.teachers.filtering import Sampling
from dd2.teachers.layers import call_layer
from dd2.training.samples import TeacherSamples
from models import tiny_teacher, tiny_text, tiny_var

CONFIG = MatchConfig(weight=1.0, projections=6, prime=64, features=("tokens", "projected", "condition"), landmarks=40)
TEACHERS = {"raster": tiny_teacher, "next-scale": tiny_var, "text": tiny_text}


def samples_of(tmp_path, teacher, count=200) -> TeacherSamples:
    samples = TeacherSamples.prepare(tmp_path / "samples", teacher, Sampling(), count, seed=0)
    teacher.standardise(samples.kept)
    return samples


def distance_of(tmp_path, kind="raster", **changes) -> tuple[SequenceMatch, TeacherSamples]:
    teacher = TEACHERS[kind]()
    samples = samples_of(tmp_path, teacher)
    match = sequence_match(teacher, samples, replace(CONFIG, **changes), 50)
    match.learn_reference()
    return match, samples


def test_the_differentiable_frechet_distance_is_the_other_and_its_gradient_is_right():
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 4, generator=random).double(), torch.randn(80, 4, generator=random).double() * 1.5 + 0.3
    fit, reference = fit_gaussian([a]), fit_gaussian([b])
    value = distance_between(fit.mean, fit.covariance, reference)
    assert float(value) == pytest.approx(frechet_distance(fit, reference))
    mean = fit.mean.clone().requires_grad_()
    root = torch.linalg.cholesky(fit.covariance).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, r: distance_between(m, r @ r.T, reference, ridge=1e-6), (mean, root))


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("distance", ["frechet", "mmd", "nystrom"])
def test_the_teachers_own_sequences_are_near_and_others_far(tmp_path, kind, distance):
    match, _ = distance_of(tmp_path, kind, distance=distance, beta=0.0)
    teacher = match.features.teacher
    labels = torch.arange(120) % 3
    cond = teacher.conditions(labels)
    own = teacher.sample(cond, Sampling(), range(1000, 1120))
    shuffled = torch.stack(
        [own[torch.randperm(120, generator=torch.Generator().manual_seed(i)), i] for i in range(own.shape[1])], 1
    )
    with torch.no_grad():
        near, far = float(match(own, cond)), float(match(shuffled, cond))
    assert 0 <= near < 0.7 * far  # equal marginals, other sequences
    with torch.no_grad():
        wrong = float(match(own, cond.roll(1, 0)))
    assert wrong > near  # the condition is part of what is matched


@pytest.mark.parametrize("distance", ["frechet", "mmd", "nystrom"])
def test_its_gradient_reaches_tokens_and_generator_alone(tmp_path, distance):
    match, _ = distance_of(tmp_path, distance=distance)
    teacher = match.features.teacher
    generator = CodeStudent.from_teacher(teacher)  # pyright: ignore[reportArgumentType]
    match.begin(generator)
    cond = torch.tensor([0, 1, 2])
    tokens = generator.as_generator(torch.randn(3, 16, 4), cond)
    tokens.retain_grad()
    match(tokens, cond).backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
    assert generator.output.weight.grad.abs().sum() > 0  # pyright: ignore
    assert not any(p.requires_grad for p in teacher.parameters())  # or the distance would reach them through its features


def test_the_frechet_memory_is_an_exponential_mean_that_checkpoints_hold(tmp_path):
    match, _ = distance_of(tmp_path, beta=0.75)
    assert isinstance(match, FrechetMatch)
    teacher, cond = match.features.teacher, torch.tensor([0, 1, 2])
    generator = CodeStudent.from_teacher(teacher)  # pyright: ignore[reportArgumentType]
    match.begin(generator)
    before = match.moments.first.clone()
    assert before.abs().sum() > 0
    match.begin(generator)  # filled once
    assert (match.moments.first == before).all()
    tokens = [torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for part in tokens:  # micro-batches of one iteration
        match(part.requires_grad_(), cond)
    assert (match.moments.first == before).all()  # not before the iteration is over
    match.remember()
    new = torch.stack([match.scaled(part, cond).double().mean(0) for part in tokens]).mean(0).detach()
    torch.testing.assert_close(match.moments.first, 0.75 * before + 0.25 * new)
    again, _ = distance_of(tmp_path, beta=0.75)
    again.load_state_dict(match.state_dict())
    again.begin(generator)  # the checkpoint's memory is filled already
    with torch.no_grad():
        assert float(again(tokens[0], cond)) == float(match(tokens[0], cond))


def test_nystrom_with_every_point_is_the_exact_distance(tmp_path):
    exact, _ = distance_of(tmp_path, distance="mmd")
    some, _ = distance_of(tmp_path, distance="nystrom", landmarks=200)
    cond = torch.tensor([0, 1, 2])
    tokens = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float(some(tokens, cond)) == pytest.approx(float(exact(tokens, cond)), rel=2e-2)


def test_mmd_is_its_formula(tmp_path):
    match, samples = distance_of(tmp_path, distance="mmd")
    assert isinstance(match, KernelMatch)
    cond = torch.tensor([0, 1, 2])
    tokens = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = match.scaled(tokens, cond).double()
        y = match.scaled(samples.take(torch.arange(200))[0], samples.labels).double()
        width = torch.pdist(y).median()
        kernel = lambda a, b: (-(torch.cdist(a, b) ** 2) / (2 * width**2)).exp().mean()  # noqa: E731
        by_hand = kernel(x, x) - 2 * kernel(x, y) + kernel(y, y)
        assert float(match(tokens, cond)) == pytest.approx(float(by_hand), rel=1e-3)


def test_validation_looks_elsewhere(tmp_path):
    """With matching on, at the middle layer: other numbers than the last layer's, 0 for the teacher's own sequences."""
    teacher = tiny_teacher()
    samples = samples_of(tmp_path, teacher, 60)
    last, middle = (TeacherDistance(teacher, samples, 60, 20, middle=middle) for middle in (False, True))
    assert not torch.allclose(last.reference.fit.mean, middle.reference.fit.mean)
    kept: list[torch.Tensor] = []
    handle = teacher.backbone.stack[1].register_forward_hook(lambda module, read, given: kept.append(given))  # pyright: ignore
    teacher.features(samples.take(torch.arange(60))[0], samples.labels)
    handle.remove()
    torch.testing.assert_close(middle.reference.fit.mean, kept[0].mean(1).double().mean(0), rtol=1e-4, atol=1e-5)


def test_few_projections_are_random_and_many_are_all(tmp_path):
    teacher = tiny_teacher()
    samples_of(tmp_path, teacher)
    few, all_of_them = (SequenceFeatures(teacher, MatchConfig(features=("tokens",), projections=p)) for p in (6, 64))
    tokens, cond = torch.randn(3, 16, 4), torch.tensor([0, 1, 2])
    assert few(tokens, cond).shape == (3, 6)
    torch.testing.assert_close(all_of_them(tokens, cond), tokens.flatten(1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": ("mean", "colour")}, "features must be some of mean, projected, tokens, condition"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\)"),
        ({"beta": float("nan")}, r"beta must be in \[0, 1\)"),
        ({"weight": -1.0}, "weight must not be negative"),
        ({"distance": "l2"}, 'distance must be "frechet"'),
    ],
)
def test_bad_settings_get_one_line(changes, said):
    with pytest.raises(InputError, match=said):
        MatchConfig(**changes)


def test_a_reference_smaller_than_the_features_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"compares 44 features by 30 teacher samples; at least 45 are needed"):
        distance_of(tmp_path, reference=30)
    with pytest.raises(InputError, match="at least 40 are needed"):
        distance_of(tmp_path, reference=30, distance="nystrom")


def test_it_is_refused_before_anything_is_made(tmp_path, capsys):
    arguments = ("distill", "digits", "--out", tmp_path / "run", "--teacher-samples", 100)
    assert main([str(part) for part in arguments]) == 2
    assert "compares 224 features by 100 teacher samples; at least 225 are needed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_it_is_float32_whatever_the_autocast(tmp_path):
    """Of the same features: sums of many squares in bfloat16 would differ by more than what is compared."""
    for distance in ("frechet", "mmd", "nystrom"):
        match, samples = distance_of(tmp_path, distance=distance)
        tokens, labels = samples.take(torch.arange(40))
        features = match.features.teacher.features(tokens, labels)
        match.features.teacher.features = lambda *given, kept=features: kept  # pyright: ignore
        with torch.no_grad():
            plain = float(match(tokens, labels))
            with torch.autocast("cpu", torch.bfloat16):
                assert float(match(tokens, labels)) == pytest.approx(plain, rel=1e-5)


def test_validation_sees_the_middle_layer_of_compiled_layers_too(tmp_path):
    teacher = tiny_teacher()
    samples = samples_of(tmp_path, teacher, 40)
    plain = TeacherDistance(teacher, samples, 40, 20, middle=True).reference
    teacher.backbone.stack.call = torch.compile(call_layer, backend="eager")  # pyright: ignore
    compiled = TeacherDistance(teacher, samples, 40, 20, middle=True).reference
    torch.testing.assert_close(plain.fit.mean, compiled.fit.mean)
