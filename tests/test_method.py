"""The stages' losses: which networks they reach, and what they are zero at."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dd2.losses import noised
from dd2.method import recipe
from dd2.method.align import load_average
from dd2.method.config import AlignConfig, CSDConfig, TuneConfig
from dd2.method.csd import SharedBatches, generated, generator_loss, guidance_loss
from dd2.method.networks import Networks
from dd2.method.tune import tune_loss
from dd2.scores import velocity
from dd2.student import Student
from dd2.teachers.filtering import Sampling
from dd2.training.samples import TeacherSamples
from dd2.training.schedule import NoiseLevelConfig, OptimConfig, ema_rate
from models import TINY_HEAD, tiny_teacher

LABELS = torch.tensor([0, 1, 2, 1])
TUNE = TuneConfig(sampling=Sampling(), draws=1)
CSD = CSDConfig(sampling=Sampling(), guidance_draws=1)


def random_student(seed: int) -> Student:
    student = Student.from_teacher(tiny_teacher(), TINY_HEAD)
    g = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2, generator=g)
    return student


def touched(student: nn.Module) -> set[str]:
    return {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("loss", ["gts", "diffusion"])
def test_tune_reaches_the_student_alone(loss):
    teacher, student = tiny_teacher().requires_grad_(True), random_student(0)
    tokens = teacher.codebook[teacher.generate(LABELS, Sampling(), range(4))].detach()
    config = replace(TUNE, draws=3, loss=loss)
    value, _ = tune_loss(student, teacher, tokens, LABELS, config, torch.Generator().manual_seed(0))
    value.backward()
    assert touched(student) == {name for name, _ in student.named_parameters()}
    assert not touched(teacher)


def test_head_only_leaves_the_backbone():
    teacher, student = tiny_teacher(), random_student(0)
    tokens = teacher.codebook[teacher.generate(LABELS, Sampling(), range(4))]
    random = torch.Generator().manual_seed(0)
    tune_loss(student, teacher, tokens, LABELS, TUNE, random, head_only=True)[0].backward()
    assert {name.split(".")[0] for name in touched(student)} == {"head"}


def test_gts_target_is_the_teachers_velocity():
    """A student that is the closed-form velocity has loss 0; the Monte-Carlo loss at it is the noise's variance."""
    teacher, student = tiny_teacher(), random_student(0)
    tokens = teacher.codebook[teacher.generate(LABELS, Sampling(), range(4))]
    log_p = teacher.distribution(tokens, LABELS, Sampling()).dense()

    class Exact(nn.Module):
        def forward(self, x_t, t, features):
            return torch.stack([velocity(x, level, log_p, teacher.codebook) for x, level in zip(x_t, t, strict=True)])

    student.head = Exact()  # pyright: ignore[reportAttributeAccessIssue]
    losses = [
        float(tune_loss(student, teacher, tokens, LABELS, config, torch.Generator().manual_seed(0))[0])
        for config in (replace(TUNE, draws=2), replace(TUNE, draws=2, loss="diffusion"))
    ]
    assert losses[0] < 1e-10
    assert losses[1] > 0.1


@pytest.mark.parametrize("d", ["sid", "dmd"])
@pytest.mark.parametrize("snap", [False, True])
def test_stage_two_gradients(d, snap):
    """Guidance updates reach the guidance network alone, generator updates the generator alone (Eq. 4, 5)."""
    teacher, generator, guidance = tiny_teacher().requires_grad_(True), random_student(1), random_student(2)
    random = torch.Generator().manual_seed(0)
    config = CSDConfig(
        sampling=Sampling(top_k=5), d=d, guidance_draws=2, generator_draws=2, snap_teacher=snap, snap_guidance=snap
    )
    with torch.no_grad():
        q = generated(generator, LABELS, random)
    guidance_loss(guidance, q, teacher, LABELS, config, random)[0].backward()
    assert touched(guidance) == {name for name, _ in guidance.named_parameters()}
    assert not touched(generator)
    guidance.zero_grad()
    value, numbers = generator_loss(generator, guidance, teacher, LABELS, config, random)
    value.backward()
    assert touched(generator) == {name for name, _ in generator.named_parameters()}
    assert not touched(guidance)
    assert not touched(teacher)
    assert ("to_nearest_code" in numbers) == snap


def test_generator_gradient_does_not_pass_through_the_condition(monkeypatch):
    """Position i's gradient in q comes from term i alone: the conditions q_<i are detached (Eq. 4)."""
    teacher, guidance = tiny_teacher(), random_student(2)
    seen = {}

    class Leaf(Student):
        def as_generator(self, noise, cond):
            q = noise.clone().requires_grad_()
            seen["q"] = q
            return q

    generator = random_student(1)
    generator.__class__ = Leaf
    hook = {}
    features = guidance.features
    monkeypatch.setattr(guidance, "features", lambda q, c: hook.setdefault("condition", q) is None or features(q, c))
    generator_loss(generator, guidance, teacher, LABELS, CSD, torch.Generator().manual_seed(0))[0].backward()
    assert seen["q"].grad is not None
    assert not hook["condition"].requires_grad


def test_guidance_loss_is_flow_matching_on_the_generators_tokens():
    generator, guidance, teacher = random_student(1), random_student(2), tiny_teacher()
    random = torch.Generator().manual_seed(3)
    value, _ = guidance_loss(guidance, generated(generator, LABELS, random).detach(), teacher, LABELS, CSD, random)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        q = generator.as_generator(torch.randn(4, 16, 4, generator=g), LABELS)
        t = CSD.noise_level.draw((1, 4, 16), g)
        eps = torch.randn((1, 4, 16, 4), generator=g)
        v = guidance.given(q, LABELS).velocity(noised(q, t, eps), t)
        torch.testing.assert_close(value, (v - (eps - q)).square().mean())


def test_networks_start_alike_and_apart():
    student = random_student(0)
    networks = Networks.from_tuned(student)
    for module in (networks.generator, networks.guidance, networks.ema):
        for (name, a), b in zip(module.named_parameters(), student.parameters(), strict=True):
            assert torch.equal(a, b), name
    with torch.no_grad():
        next(networks.generator.parameters()).add_(1)
    assert torch.equal(next(networks.guidance.parameters()), next(student.parameters()))
    load_average(networks.generator, networks.ema)
    assert torch.equal(next(networks.generator.parameters()), next(student.parameters()))
    assert all(not p.requires_grad for p in networks.ema.parameters())


def test_schedules():
    optim = OptimConfig(lr=1.0, warmup=10, warmup_from=0.1, decay="cosine")
    assert optim.rate(9, 110) == 1.0
    assert optim.rate(0, 110) == pytest.approx(0.19)
    assert optim.rate(60, 110) == pytest.approx(0.5)
    assert optim.rate(110, 110) == pytest.approx(0, abs=1e-12)
    assert OptimConfig(lr=0.3).rate(10**6, 10) == 0.3
    assert [ema_rate(i, 0.9999) for i in (0, 9)] == [pytest.approx(0.1), pytest.approx(10 / 19)]
    assert ema_rate(10**6, 0.99) == 0.99
    g = torch.Generator().manual_seed(0)
    t = NoiseLevelConfig(low=0.1, high=0.7).draw((20_000,), g)
    assert (t.min() >= 0.1, t.max() <= 0.7, abs(float(t.mean()) - 0.4) < 0.01) == (True, True, True)
    t = NoiseLevelConfig(kind="logit_normal", mean=1.0, std=0.5).draw((20_000,), g)
    assert abs(float(t.median()) - 1 / (1 + math.exp(-1))) < 0.01


def test_defaults_are_the_papers():
    """Tables 10 and 11, LlamaGen-L; App. C.3 and E.3."""
    tune, csd = TuneConfig(), CSDConfig()
    assert (tune.optim.lr, tune.batch * tune.accumulate, tune.iterations) == (1e-4, 512, 100_000)
    assert (csd.guidance.lr, csd.generator.lr, csd.batch * csd.accumulate) == (2e-4, 1e-4, 1024)
    assert tune.accumulate % 8 == csd.accumulate % 8 == 0  # the paper's eight GPUs share the micro-batches
    assert (csd.iterations, csd.k, csd.d, csd.alpha, csd.ema) == (12_000, 5, "sid", 1.0, 0.9999)
    assert csd.generator.warmup * csd.k == 40_000
    assert csd.generator.warmup_from == 1e-6
    assert csd.generator.betas == tune.optim.betas == (0.9, 0.95)
    assert (tune.sampling.cfg_scale, tune.sampling.top_k, csd.sampling.top_k) == (2.0, 8000, 900)
    assert AlignConfig().then_k == 2


def test_guidance_updates_share_their_batches_where_that_is_asked_for():
    """Three updates of two micro-batches each."""
    for micro_batches, expected in ((0, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 1, 0, 1, 0, 1, 2])):
        shared, drawn = SharedBatches(micro_batches), iter(range(10))
        found = [shared.next(lambda: (torch.tensor(next(drawn)), LABELS))[0] for _ in range(6)]  # noqa: B023
        shared.clear()
        found.append(shared.next(lambda: (torch.tensor(next(drawn)), LABELS))[0])  # noqa: B023
        assert [int(batch) for batch in found] == expected


def test_every_iteration_draws_new_batches_to_share(monkeypatch):
    """K = 3 guidance updates of two micro-batches, two iterations: two batches each where they are shared, six where not."""
    teacher, drawn = tiny_teacher(), []
    samples = TeacherSamples(teacher, torch.zeros(4, 16, dtype=torch.long), LABELS)
    monkeypatch.setattr(recipe, "generated", lambda generator, *rest: drawn.append(1) or generated(generator, *rest))
    for share, expected in ((True, 2), (False, 6)):
        config = CSDConfig(batch=2, accumulate=2, k=3, share_generated=share, sampling=Sampling(), validation=0)
        stage = recipe.csd_stage(Networks.from_tuned(random_student(1)), teacher, samples, config)
        for step in range(2):
            drawn.clear()
            for call in range(6):
                stage.updates[0].loss(torch.Generator().manual_seed(call))
            stage.after(step)
            assert len(drawn) == expected
