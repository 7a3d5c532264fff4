"""A masked teacher (MAR) distilled: known sets, levels, the student in both roles, its ODE, few steps, the commands."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dd2.checkpoints.native import load_generator, save_teacher
from dd2.checkpoints.runs import open_run
from dd2.cli import main
from dd2.distribution import CodeDistribution
from dd2.errors import InputError
from dd2.files import weights_digest
from dd2.losses import csd_loss, noised
from dd2.masked_student import MaskedStudent, MaskedStudentConfig
from dd2.method.config import CSDConfig, NetworksConfig
from dd2.method.csd import generator_loss, guidance_loss
from dd2.method.networks import Networks, copied_student, fresh_student
from dd2.method.recipe import csd_stage
from dd2.method.regress import regress_loss
from dd2.pipeline import OneStepPipeline
from dd2.sampling import one_step, refine
from dd2.scores import CodeMixture, follow_ode
from dd2.seeding import stream
from dd2.student import HeadConfig
from dd2.teachers.diffusion_score import COSINE, DiffusionScore, level_of
from dd2.teachers.filtering import Sampling
from dd2.teachers.mar import MARBackbone, MARTeacher
from dd2.teachers.mar_network import MARConfig
from dd2.teachers.masked import MaskedBackbone, known_before
from dd2.teachers.table import TableTeacher
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.samples import TeacherSamples
from dd2.training.schedule import NoiseLevelConfig, OptimConfig
from enumeration import distance_of
from models import tiny_mar, tiny_teacher

LABELS = torch.tensor([0, 1, 2, 0])
SAMPLING = Sampling(ar_steps=8, diffusion_steps=6)
CSD = CSDConfig(sampling=SAMPLING, batch=4, accumulate=1, guidance_draws=2, generator_draws=2, d="dmd", validation=0)


def a_stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def student_of(teacher: MARTeacher, level: int = 928) -> MaskedStudent:
    return MaskedStudent.from_teacher(teacher, MaskedStudentConfig(level))


def test_known_sets_are_those_of_the_samplers_steps_in_random_places():
    teacher = tiny_mar()
    known = teacher.known_sets(20_000, SAMPLING, a_stream())
    sizes = known_before(16, 8)
    assert sizes[0] == 0
    counts = known.sum(1).bincount(minlength=17)
    assert counts.nonzero().flatten().tolist() == sorted(sizes)
    assert counts[sizes].float().std() / 2500 < 0.05  # each as often
    share = known.float().mean(0)
    assert (share - sum(sizes) / 8 / 16).abs().max() < 0.015  # no position is favoured
    pairs = known[known.sum(1) == sizes[3]]
    assert len(pairs.unique(dim=0)) > 100


def test_a_copy_of_the_teacher_knows_the_teachers_score():
    """Without guidance the two scores agree, so there is no gradient: a guidance network starts where the teacher is."""
    teacher = tiny_mar()
    network = student_of(teacher)
    tokens, eps = torch.randn(4, 16, 4, generator=a_stream()), torch.randn(3, 4, 16, 4, generator=a_stream(1))
    known = teacher.known_sets(4, SAMPLING, a_stream(2))
    wanted, found = teacher.given(tokens, LABELS, SAMPLING, known), network.given(tokens, LABELS, known)
    t = wanted.levels(torch.rand(3, 4, 16, generator=a_stream(3)) * 0.9 + 0.05)
    with torch.no_grad():
        q = tokens.clone().requires_grad_()
    loss, difference = csd_loss(q.expand(eps.shape), t, eps, wanted, found, d="dmd")
    loss.backward()
    assert float(difference) < 1e-6
    assert q.grad is not None
    assert q.grad.abs().max() < 1e-7
    guided = teacher.given(tokens, LABELS, Sampling(cfg_scale=3.0, ar_steps=8), known)
    assert float(csd_loss(q.expand(eps.shape), t, eps, guided, found, d="dmd")[1]) > 1e-3


def test_levels_are_the_heads_own():
    score = student_of(tiny_mar()).given(torch.zeros(1, 16, 4), LABELS[:1], torch.zeros(1, 16, dtype=torch.bool))
    t = torch.linspace(0.02, 0.98, 400).view(1, 400)
    found = score.levels(t)
    assert torch.isin(found, level_of(torch.arange(1000))).all()
    assert (found - t).abs().max() < 0.002
    assert torch.equal(score.levels(found), found)


def test_the_guidance_loss_is_the_error_of_the_noise_where_nothing_is_known():
    teacher, network = tiny_mar(), student_of(tiny_mar(1))
    q = torch.randn(4, 16, 4, generator=a_stream())
    value, _ = guidance_loss(network, q, teacher, LABELS, CSD, a_stream(5))
    random = a_stream(5)
    known = teacher.known_sets(4, SAMPLING, random)
    t = CSD.noise_level.draw((2, 4, 16), random)
    eps = torch.randn(2, 4, 16, 4, generator=random)
    index = torch.tensor([[(level_of(torch.arange(1000)) - level).abs().argmin() for level in row] for row in t.view(8, 16)])
    index = index.view(2, 4, 16)
    x = COSINE.noised(q.expand(eps.shape), index, eps)
    z = network.masked.features_given(q, known, LABELS)
    errors = (network.masked.head(x, index, z)[0] - eps).square()
    torch.testing.assert_close(value, errors[:, ~known].mean(), rtol=1e-4, atol=1e-6)
    value.backward()
    assert all(parameter.grad is not None for parameter in network.masked.parameters())


def test_both_networks_are_asked_at_the_heads_own_levels(monkeypatch):
    asked: list[Tensor] = []

    def watched(name: str) -> None:
        original = getattr(DiffusionScore, name)

        def watching(self: DiffusionScore, x_t: Tensor, t: Tensor, *more: Tensor) -> Tensor:
            asked.append(t)
            return original(self, x_t, t, *more)

        monkeypatch.setattr(DiffusionScore, name, watching)

    watched("x0_hat")
    watched("denoising_error")
    teacher, generator, guidance = tiny_mar(), student_of(tiny_mar(1)), student_of(tiny_mar(2))
    guidance_loss(guidance, torch.randn(4, 16, 4), teacher, LABELS, CSD, a_stream())
    generator_loss(generator, guidance, teacher, LABELS, CSD, a_stream())
    assert len(asked) == 3
    assert all(torch.isin(t, level_of(torch.arange(1000))).all() for t in asked)


def test_guidance_is_that_of_each_sequences_own_known_set():
    teacher, sampling = tiny_mar(), Sampling(cfg_scale=4.0, ar_steps=8)
    tokens, known = torch.randn(4, 16, 4, generator=a_stream()), torch.zeros(4, 16, dtype=torch.bool)
    for row, count in enumerate(known_before(16, 8)[:4]):
        known[row, :count] = True
    x, t = torch.randn(4, 16, 4, generator=a_stream(1)), level_of(torch.full((4, 16), 500))
    together = teacher.given(tokens, LABELS, sampling, known).x0_hat(x, t)
    for row in range(4):
        part = slice(row, row + 1)
        alone = teacher.given(tokens[part], LABELS[part], sampling, known[part]).x0_hat(x[part], t[part])
        torch.testing.assert_close(together[part], alone, rtol=1e-3, atol=1e-3)


def test_features_of_the_condition_know_it_alone():
    """What is matched beside the tokens' features must not be moved by the tokens."""
    backbone = tiny_mar().backbone
    a, b = (backbone.condition_features(backbone(torch.randn(4, 16, 4), LABELS), LABELS) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (4, backbone.width)
    assert torch.equal(a[0], a[3])  # the same class
    assert not torch.allclose(a[0], a[1])


def test_tokens_without_codes_are_regressed_by_their_squared_error():
    teacher, generator = tiny_mar(), student_of(tiny_mar(1))
    noise, data = torch.randn(4, 16, 4, generator=a_stream()), torch.randn(4, 16, 4, generator=a_stream(1))
    loss, _ = regress_loss(generator, teacher, noise, data, LABELS)
    torch.testing.assert_close(loss, (generator.as_generator(noise, LABELS) - data).square().mean())


def test_known_tokens_of_the_generator_get_no_gradient():
    teacher = tiny_mar()
    generator, guidance = student_of(tiny_mar(1)), student_of(tiny_mar(2))
    kept: list[Tensor] = []
    draw = generator.as_generator

    def watched(noise: Tensor, cond: Tensor) -> Tensor:
        tokens = draw(noise, cond)
        tokens.retain_grad()
        kept.append(tokens)
        return tokens

    generator.as_generator = watched  # pyright: ignore[reportAttributeAccessIssue]
    generator_loss(generator, guidance, teacher, LABELS, CSD, a_stream(7))[0].backward()
    random = a_stream(7)
    torch.randn(4, 16, 4, generator=random)  # the generator's noise
    known = teacher.known_sets(4, SAMPLING, random)
    grad = kept[0].grad
    assert grad is not None
    assert known.any()
    assert not grad[known].any()
    assert grad[~known].abs().min() > 0
    assert all(parameter.grad is None for parameter in guidance.parameters())


def test_the_generator_reads_noise_as_if_it_were_known():
    teacher = tiny_mar()
    noise = torch.randn(4, 16, 4, generator=a_stream())
    for level in (495, 928):
        student = student_of(teacher, level)
        with torch.no_grad():
            z = teacher.mar.features(noise, torch.ones(4, 16, dtype=torch.bool), LABELS)
            eps, _ = teacher.mar.head(noise, torch.full((4, 16), level), z)
            expected = COSINE.clean(noise, torch.full((4, 16), level), eps)
            torch.testing.assert_close(student.as_generator(noise, LABELS), expected, rtol=1e-4, atol=1e-4)


class Gaussian(MaskedBackbone):
    """Normal tokens of deviation 0.5, around 1 and 0.3 times the sum of the known ones: its noise prediction is exact."""

    def __init__(self) -> None:
        super().__init__(3, 3, 1, 1)

    def features_given(self, tokens: Tensor, known: Tensor | None, cond: Tensor) -> Tensor:
        assert known is not None
        return (1 + 0.3 * (tokens * known.unsqueeze(-1)).sum(1, keepdim=True)).expand(-1, 3, -1)

    def head(self, x: Tensor, index: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        a, s = (COSINE.at(table, index, x) for table in (COSINE.alphas_cumprod.sqrt(), (1 - COSINE.alphas_cumprod).sqrt()))
        return s * (x - a * features) / (a * a * 0.25 + s * s), torch.zeros_like(x)

    def condition_features(self, features: Tensor, cond: Tensor) -> Tensor:
        raise NotImplementedError

    def forget_head(self) -> None:
        raise NotImplementedError

    def null_condition(self, cond: Tensor) -> Tensor:
        raise NotImplementedError


def teacher_of(backbone: Gaussian, start: int) -> MARTeacher:
    """A MAR whose network is another."""
    teacher: Any = tiny_mar()
    teacher.backbone = backbone
    network: Any = torch.nn.Identity()
    network.config = MARConfig(start=start)
    teacher.backbone.mar = network
    return teacher


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_the_ode_of_normal_tokens_scales_the_noise(solver):
    """Its map is known: mean + 0.5 noise, token after token along one order, whatever the batch."""
    teacher = teacher_of(Gaussian(), 985)
    noise = torch.randn(500, 3, 1, generator=a_stream())
    cond = torch.zeros(500, dtype=torch.long)
    steps = 60 if solver == "heun" else 600
    found = teacher.follow_ode(noise, cond, Sampling(ar_steps=3), steps, solver)
    order = torch.randperm(3, generator=stream("order of the ODE")).tolist()
    expected = torch.zeros(500, 3, 1)
    for position in reversed(order):  # orders are filled from their ends
        expected[:, position] = 1 + 0.3 * expected.sum(1) + 0.5 * noise[:, position]
    # It starts at t = 0.98, where the noise is not yet all: there x = 0.02 mean + … is taken for 0.
    torch.testing.assert_close(found, expected, atol=0.06, rtol=0.02)
    torch.testing.assert_close(teacher.follow_ode(noise[7:9], cond[:2], Sampling(ar_steps=3), steps, solver), found[7:9])


def test_the_guided_ode_is_the_guided_scores():
    """With the last token alone unknown it ends where that score's own ODE does."""
    teacher, sampling = tiny_mar(), Sampling(cfg_scale=3.0, ar_steps=16)
    noise, cond = torch.randn(4, 16, 4, generator=a_stream()), LABELS
    found = teacher.follow_ode(noise, cond, sampling, 12, "heun")
    last = torch.randperm(16, generator=stream("order of the ODE"))[0]
    known = torch.ones(4, 16, dtype=torch.bool)
    known[:, last] = False
    levels = [*COSINE.respaced(12, 928).rect_flow_levels.flip(0).tolist(), 0.0]
    expected = follow_ode(teacher.given(found, cond, sampling, known), noise, levels, "heun")
    torch.testing.assert_close(found[:, last], expected[:, last], rtol=1e-3, atol=1e-3)
    plain = teacher.follow_ode(noise, cond, Sampling(ar_steps=16), 12, "heun")
    assert (plain - found).abs().max() > 0.1


def test_the_ode_does_not_start_where_errors_explode():
    """An official model samples from level 999; a head that errs by a thousandth must not spoil its pairs."""

    class Erring(Gaussian):
        def head(self, x: Tensor, index: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
            eps, fraction = super().head(x, index, features)
            return eps + 1e-3 * torch.sin(7 * x), fraction

    noise, cond, found = torch.randn(500, 3, 1, generator=a_stream()), torch.zeros(500, dtype=torch.long), []
    for backbone in (Gaussian(), Erring()):
        found.append(teacher_of(backbone, 999).follow_ode(noise, cond, Sampling(ar_steps=3), 10, "heun"))
    assert (found[0] - found[1]).square().mean().sqrt() < 0.05


def test_few_steps_draw_the_last_groups_again():
    """The teacher's own image is what it would have drawn: redrawing its last groups with the same seeds gives it back."""
    teacher, seeds = tiny_mar(), [3, 4, 5, 6]
    whole = teacher.sample(LABELS, SAMPLING, seeds)
    for first_step in (0, 5, 7):
        again = teacher.redrawn(whole, whole, LABELS, SAMPLING, seeds, first_step)
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)
    generator = student_of(tiny_mar(1))
    one = one_step(generator, LABELS, seeds)
    few = refine(generator, teacher, LABELS, SAMPLING, seeds, 3)
    kept = known_before(16, 8)[6]  # 8 steps, of which 2 are redrawn
    assert ((few == one).all(-1).sum(1) == kept).all()
    with pytest.raises(InputError, match=r"steps must be 1 .* to 9"):
        refine(generator, teacher, LABELS, SAMPLING, seeds, 10)


def test_which_networks_start_how():
    teacher = tiny_mar()
    copied = copied_student(teacher, NetworksConfig(level=700))
    assert isinstance(copied, MaskedStudent)
    assert copied.config.level == 700
    fresh = fresh_student(teacher, copied, HeadConfig())
    assert isinstance(fresh, MaskedStudent)
    zeros = torch.zeros(1, 16, 4)
    eps, _ = fresh.masked.head(zeros, torch.zeros(1, 16, dtype=torch.long), torch.randn(1, 16, 32))
    assert not eps.any()
    same = [torch.equal(a, b) for a, b in zip(fresh.masked.parameters(), copied.masked.parameters(), strict=True)]
    assert any(same)
    assert not all(same)
    with pytest.raises(InputError, match="no masked network"):
        MaskedStudent.from_teacher(tiny_teacher(), MaskedStudentConfig())
    with pytest.raises(InputError, match=r"networks.level must be in 0 to 999"):
        NetworksConfig(level=1000)
    with pytest.raises(ValueError, match="known"):
        copied.given(torch.zeros(1, 16, 4), LABELS[:1])


class MaskedTable(TableTeacher):
    """A table asked in any order: p(q_i | the known q, whichever they are), whose conditionals are those of one joint."""

    def known_sets(self, batch: int, sampling: Sampling, random: torch.Generator) -> Tensor:
        sizes = torch.randint(self.order.n, (batch, 1), generator=random)
        return torch.rand(batch, self.order.n, generator=random).argsort(1) < sizes

    def given(self, tokens: Tensor, cond: Tensor, sampling: Sampling, known: Tensor | None = None) -> CodeMixture:
        assert known is not None
        found = CodeMixture(CodeDistribution.over_all(self.conditionals(self.ids(tokens), known)), self.codebook)
        found.valid = ~known
        return found

    def conditionals(self, ids: Tensor, known: Tensor) -> Tensor:
        """(B, n, V) log-probabilities of each token given the known ones of ids (B, n)."""
        every = torch.cartesian_prod(*[torch.arange(self.joint.shape[0])] * self.order.n)
        fits = ((every == ids.unsqueeze(1)) | ~known.unsqueeze(1)).all(-1)  # (B, V^n)
        weight = fits * self.joint.flatten()
        shown = torch.nn.functional.one_hot(every, self.joint.shape[0]).to(weight)
        p = torch.einsum("bs,snv->bnv", weight, shown)
        return (p / p.sum(-1, keepdim=True).clamp_min(1e-30)).clamp_min(1e-12).log()


def masked_networks(positions: int, codes: int) -> Networks:
    torch.manual_seed(0)
    sizes = MARConfig(
        **{"width": 48, "depth": 2, "heads": 3, "decoder_width": 48, "decoder_depth": 2, "decoder_heads": 3, "head_depth": 2},
        **{"head_width": 64, "rows": 1, "columns": positions, "code_dim": codes, "num_classes": 1, "buffer": 1, "dropout": 0.0},
    )
    generator, guidance = (MaskedStudent(MARBackbone(sizes, positions), MaskedStudentConfig(800)) for _ in range(2))
    return Networks.starting_from(generator, guidance)


def test_the_masked_tables_conditionals_are_its_joints():
    joint = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    teacher = MaskedTable(joint)
    ids, known = torch.tensor([[1, 0]] * 3), torch.tensor([[True, False], [False, True], [False, False]])
    p = teacher.conditionals(ids, known).exp()
    torch.testing.assert_close(p[0, 1], joint[1] / joint[1].sum())
    torch.testing.assert_close(p[1, 0], joint[:, 0] / joint[:, 0].sum())
    torch.testing.assert_close(p[2, 0], joint.sum(1))
    torch.testing.assert_close(p[2, 1], joint.sum(0))


@pytest.mark.long
@pytest.mark.e2e
def test_proposition_1_in_any_order(tmp_path):
    """Networks that have never seen the teacher, asked at random known sets, end at its joint distribution (TV 0.5 at first)."""
    joint = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
    teacher = MaskedTable(joint)
    networks = masked_networks(2, 2)
    ids = teacher.sequences(5000, a_stream())
    samples = TeacherSamples(teacher, ids, torch.zeros(len(ids), dtype=torch.long))
    rates = OptimConfig(lr=1e-3, betas=(0.5, 0.99))
    csd = CSDConfig(
        **{"iterations": 400, "k": 5, "batch": 256, "accumulate": 1, "d": "dmd", "guidance_draws": 2, "generator_draws": 2},
        sampling=Sampling(),
        ema=0.95,
        validation=0,
        noise_level=NoiseLevelConfig(low=0.1, high=0.95),
        generator=rates,
        guidance=rates,
    )
    assert distance_of(networks.ema, teacher, 20_000) > 0.3
    trainer = Trainer(tmp_path, 0, LoopConfig(log_every=50, save_every=10**9, preview_every=0), torch.device("cpu"), "again")
    trainer.run(csd_stage(networks, teacher, samples, csd))
    assert distance_of(networks.ema, teacher, 20_000) < 0.05


CONFIG = """
teacher: {teacher}
out: {out}
teacher_samples: 96
sample_batch: 32
tune: {{sampling: {{cfg_scale: 1.5, top_k: 0, ar_steps: 4, diffusion_steps: 4}}}}
regress: {{iterations: 3, guidance_iterations: 1, pairs: 32, ode: {{steps: 3}}, batch: 8, accumulate: 1}}
csd:
  iterations: 4
  k: 2
  batch: 8
  accumulate: 2
  validation: 32
  match: {{weight: 1.0, projections: 8, prime: 64}}
  sampling: {{cfg_scale: 1.5, top_k: 0, ar_steps: 4, diffusion_steps: 4}}
loop: {{log_every: 1, save_every: 1, keep: 9, preview_every: 2}}
"""


@pytest.mark.e2e
def test_distilled_from_the_command_line(tmp_path, capsys):
    """One configuration: distil, resume after a kill, evaluate, sample, export, report."""
    save_teacher(tmp_path / "teacher", tiny_mar())
    run = tmp_path / "run"
    (tmp_path / "mar.yaml").write_text(CONFIG.format(teacher=tmp_path / "teacher", out=run))
    assert main(["distill", str(tmp_path / "mar.yaml")]) == 0
    assert "stage 1 is skipped" in capsys.readouterr().err
    assert not (run / "ar_diffusion").exists()
    first = load_generator(run / "generator")
    assert isinstance(first.student, MaskedStudent)
    (run / "checkpoints" / "csd" / "00000004").rename(tmp_path / "gone")
    (run / "checkpoints" / "csd" / "00000003").rename(tmp_path / "gone3")
    assert main(["distill", str(tmp_path / "mar.yaml")]) == 0
    assert weights_digest(load_generator(run / "generator").student) == weights_digest(first.student)
    assert main(["evaluate", str(run), "--count", "60", "--steps", "1", "3", "--teacher-steps", "3", "2", "4", "--no-speed"]) == 0
    said = capsys.readouterr().out
    assert "Teacher, 4 AR steps" in said
    assert "Teacher, 2 AR steps" in said
    assert "onestep*, all tokens at once" in said
    numbers = json.loads((run / "metrics.json").read_text())
    assert list(numbers["metrics"]) == [
        *("teacher", "generator", "generator_3_steps", "teacher_3_steps", "teacher_2_steps", "onestep_marginal")
    ]
    one = numbers["metrics"]["onestep_marginal"]
    assert numbers["ar_steps"] == 4
    assert numbers["gap_closed"] == pytest.approx(
        (one["frechet"] - numbers["frechet"]["generator"]) / (one["frechet"] - numbers["frechet"]["floor"])
    )
    opened = open_run(run, torch.device("cpu"))
    one_image = one_step(opened.generator.student, torch.tensor([1]), [0])
    for more in (["--steps", "1"], ["--steps", "3"], ["--method", "teacher", "--ar-steps", "2", "--diffusion-steps", "3"]):
        out = tmp_path / f"{len(more)}{more[1]}.npz"
        assert main(["sample", str(run), "--count", "4", "--out", str(out), *more]) == 0
    for more, said in (
        (["--teacher-steps", "1"], "teacher_steps must be at least 2"),
        (["--teacher-steps", "17"], "sampling.ar_steps must be in 1 to 16"),
        (["--skip", "1"], "skip-1 needs a teacher over codes"),
        (["--steps", "6"], "steps must be 1 (the generator alone) to 5"),
    ):
        assert main(["evaluate", str(run), "--count", "60", *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "shipped"), "--step", "2", "--average", "none"]) == 0
    shipped = load_generator(tmp_path / "shipped")
    assert not torch.equal(one_step(shipped.student, torch.tensor([1]), [0]), one_image)
    whole, half = (
        OneStepPipeline.from_pretrained(run, dtype=dtype)([1, 2], [5, 6], output_type="np").images
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < np.abs(np.subtract(whole, half)).mean() < 0.025
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--networks.generator", "codes"], "networks.generator codes needs a teacher over codes"),
        (["--regress.iterations", "1", "--regress.own-share", "0.5"], "regress.own_share needs a teacher over codes"),
        (["--csd.regression-weight", "0.1"], "csd.regression_weight needs a teacher over codes"),
        (["--csd.sampling.ar-steps", "17"], "sampling.ar_steps must be in 1 to 16"),
        (["--csd.sampling.ar-steps", "-1"], "ar_steps must be >= 0"),
        (["--stage1", "somewhere"], "this teacher is an AR-diffusion model itself"),
        (["--networks.level", "1000"], "networks.level must be in 0 to 999"),
        (["--regress.ode.steps", "1"], "regress.ode.steps must be in 2 to 929"),
        (["--regress.ode.steps", "930"], "regress.ode.steps must be in 2 to 929"),
    ],
)
def test_what_a_masked_teacher_cannot_do(tmp_path, capsys, more, said):
    save_teacher(tmp_path / "teacher", tiny_mar())
    (tmp_path / "mar.yaml").write_text(CONFIG.format(teacher=tmp_path / "teacher", out=tmp_path / "run"))
    assert main(["distill", str(tmp_path / "mar.yaml"), *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert not (tmp_path / "run").exists()


def test_what_has_no_effect_is_said(tmp_path, capsys):
    save_teacher(tmp_path / "teacher", tiny_mar())
    (tmp_path / "mar.yaml").write_text(CONFIG.format(teacher=tmp_path / "teacher", out=tmp_path / "run"))
    short = ["--regress.iterations", "0", "--regress.guidance-iterations", "0", "--csd.iterations", "1"]
    flags = ["--csd.sampling.temperature", "0.9", "--csd.snap-teacher", "--csd.sampling.ar-steps", "1"]
    assert main(["distill", str(tmp_path / "mar.yaml"), *short, *flags]) == 0
    said = capsys.readouterr().err
    assert "the generator learns temperature 1" in said
    assert "csd.snap_* has no effect" in said
    assert main(["evaluate", str(tmp_path / "run"), "--count", "30", "--no-speed", "--marginal", "dataset"]) == 0
    said = capsys.readouterr().out
    for text in ("gap_closed compares noise", "marginal has no effect", "at another temperature than 1"):
        assert text in said


def test_plans_refuse_what_distill_does(capsys):
    plan = ["plan", "mar_b", "--model", "mar_b"]
    for more, said in (
        (["--regress.own-share", "0.5"], "regress.own_share needs a teacher over codes"),
        (["--csd.sampling.ar-steps", "300"], "sampling.ar_steps must be in 1 to 256"),
    ):
        assert main([*plan, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(plan) == 0
    assert "before it, regress.*" in capsys.readouterr().out


def test_other_teachers_have_no_free_number_of_steps(tmp_path, capsys):
    save_teacher(tmp_path / "teacher", tiny_teacher())
    run = ["distill", "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "run"), "--teacher-samples", "64"]
    run += ["--csd.iterations", "1", "--tune.iterations", "1", "--csd.batch", "8", "--csd.accumulate", "1", "--tune.batch", "8"]
    run += ["--tune.accumulate", "1", "--csd.validation", "0", "--loop.preview-every", "0", "--networks.level", "5"]
    assert main([*run, "--csd.k", "1", "--head.width", "24"]) == 0
    assert "networks.level has no effect" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--count", "30", "--teacher-steps", "4"]) == 2
    assert "this one has 16 AR steps" in capsys.readouterr().err


def test_a_score_holds_where_nothing_is_known():
    known = torch.tensor([[True, False, False]])
    valid = DiffusionScore(Gaussian(), torch.zeros(1, 3, 1), known).valid
    assert valid is not None
    assert torch.equal(valid, ~known)
    x_t = noised(torch.full((1, 3, 1), 1.2), torch.full((1, 3), 0.5), torch.full((1, 3, 1), -0.4))
    score = DiffusionScore(Gaussian(), torch.ones(1, 3, 1), known)
    t = score.levels(torch.full((1, 3), 0.5))
    # x_0 ~ N(1, 0.25): the posterior mean of 1 + k (x_t - (1 - t)), k = (1 - t) 0.25 / ((1 - t)^2 0.25 + t^2).
    gain = (1 - t) * 0.25 / ((1 - t).square() * 0.25 + t.square())
    torch.testing.assert_close(score.x0_hat(x_t, t)[..., 0], 1 + gain * (x_t[..., 0] - (1 - t)))
    assert math.isfinite(float(score.score(x_t, t).sum()))
