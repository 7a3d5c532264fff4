"""Every wire between a field and the mathematics: change one field of a tiny run, and the first number that differs is the
first that may.

`WIRES` has each field of the configurations that decide training, another value, and where the two runs part. All that a run
logs and saves before that place must be equal to the last bit. Below it are the wires that two runs cannot tell apart.
"""

import dataclasses
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dd2 import seeding
from dd2.checkpoints.native import load_generator, load_teacher, save_teacher
from dd2.commands.distill import distill
from dd2.commands.distill_config import DistillConfig
from dd2.config import find_yaml, load_config
from dd2.errors import InputError
from dd2.fields import with_fields
from dd2.losses import noised
from dd2.method.config import AlignConfig, CSDConfig, NetworksConfig, RegressConfig, TuneConfig
from dd2.method.csd import generated, generator_loss, guidance_loss
from dd2.method.networks import Networks, starting_networks
from dd2.method.recipe import csd_stage
from dd2.method.tune import tune_loss
from dd2.scores import ConditionalScore, HeadScore
from dd2.student import HeadConfig, Student
from dd2.teachers.code import require_codes
from dd2.teachers.filtering import MASKED, Sampling
from dd2.training.ema import ema_update
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.metrics import MetricsLog
from dd2.training.samples import TeacherSamples
from dd2.training.schedule import OptimConfig, ema_rate
from dd2.trajectory import OdeConfig
from models import TINY_HEAD, tiny_teacher

SAMPLING = Sampling(cfg_scale=1.5, top_k=8, top_p=0.95, temperature=0.9)
OPTIM = OptimConfig(lr=1e-3, clip_norm=0.5, weight_decay=0.1)
TINY = DistillConfig(
    teacher_samples=24,
    sample_batch=24,
    head=HeadConfig(depth=1, width=16, frequencies=4),
    tune=TuneConfig(head_iterations=1, iterations=2, batch=4, accumulate=2, draws=2, sampling=SAMPLING, optim=OPTIM),
    csd=CSDConfig(
        iterations=3,
        k=2,
        batch=4,
        accumulate=2,
        guidance_draws=2,
        generator_draws=2,
        weight_floor=0.3,
        validation=8,
        sampling=SAMPLING,
        generator=OPTIM,
        guidance=OPTIM,
    ),
    regress=RegressConfig(pairs=8, batch=4, accumulate=2, ode=OdeConfig(steps=3), optim=OPTIM),
    align=AlignConfig(iterations=1, then_iterations=2),
    loop=LoopConfig(log_every=1, save_every=1, keep=99, preview_every=0),
)
REGRESS: dict[str, Any] = {
    **{
        "regress.iterations": 2,
        "regress.guidance_iterations": 1,
        "regress.pairs": 8,
        "regress.batch": 4,
        "regress.accumulate": 2,
    },
    **{"regress.ode.steps": 3, "regress.optim": OPTIM, "csd.iterations": 0, "align": AlignConfig(), "tune.iterations": 0},
}
"""What a run with the ODE's regression has beside `TINY`."""

MATCH: dict[str, Any] = {
    "csd.match.weight": 0.5,
    "csd.match.features": ("tokens",),
    "csd.match.projections": 4,
    "csd.match.prime": 8,
}
"""What a run that matches sequences has beside `TINY`, whose few samples allow few features."""
NYSTROM = {**MATCH, "csd.match.distance": "nystrom", "csd.match.landmarks": 8}
LATER = {**MATCH, "csd.match.weight": 0.0, "csd.match.then_iterations": 2}

LOGIT_NORMAL = "logit_normal"
FIRST_TUNE, FIRST_CSD, TARGET = "tune_head 1 student/loss", "csd 1 guidance/loss", "csd 1 generator/loss"
FIRST_SECOND = "csd 2 guidance/loss"
MATCHED = "csd 1 generator/match"  # the loss itself is divided by its own value

# field: (another value, the first place where the runs part[, what both runs have beside that])
WIRES: dict[str, tuple[Any, ...]] = {
    "head.depth": (2, "tune_head 1 student/grad_norm"),  # a fresh head's velocity is 0 whatever its size
    "head.width": (24, "tune_head 1 student/grad_norm"),
    "head.frequencies": (6, "tune_head 1 student/grad_norm"),
    "tune.head_iterations": (2, "tune_head 2 student/loss"),
    "tune.iterations": (3, "tune 3 student/loss"),
    "tune.batch": (3, FIRST_TUNE),
    "tune.accumulate": (1, FIRST_TUNE),
    "tune.draws": (3, FIRST_TUNE),
    "tune.loss": ("diffusion", FIRST_TUNE),
    "csd.iterations": (2, "csd 3 guidance/loss"),
    "csd.k": (3, FIRST_CSD),
    "csd.share_generated": (True, FIRST_CSD),
    "csd.batch": (3, FIRST_CSD),
    "csd.accumulate": (1, FIRST_CSD),
    "csd.guidance_draws": (3, FIRST_CSD),
    "csd.generator_draws": (3, TARGET),
    "csd.d": ("dmd", TARGET),
    "csd.alpha": (1.3, TARGET),
    "csd.weight_floor": (0.9, TARGET),
    "csd.snap_teacher": (True, TARGET),
    "csd.snap_guidance": (True, FIRST_CSD),
    "csd.initialised": ("neither", FIRST_CSD),
    "csd.ema": (0.05, ("csd 1 validation", "csd 1 generator/ema_lag")),
    "csd.further_emas": ((0.5,), "csd 1 file generator_ema_0.5"),
    "csd.validation": (0, "csd 1 validation"),
    "align.iterations": (2, "align 2 guidance/loss"),
    "align.then_iterations": (1, "csd_aligned 2 guidance/loss"),
    "align.then_k": (1, "csd_aligned 1 guidance/loss"),
    "align.then_lr": (0.5, "csd_aligned 1 guidance/loss"),
    "networks.generator": ("codes", FIRST_CSD),
    "networks.guidance": ("codes", FIRST_CSD),
    # New layers are identities: the first loss is the same, the gradient is not.
    "networks.extra_layers": (1, "csd 1 generator/grad_norm", {"networks.generator": "codes"}),
    # Of a round that starts as the teacher, behind one that is not yet any good.
    "networks.rounds": (2, "regress 1 generator/loss", {"networks.generator": "codes", "regress.iterations": 2}),
    "csd.regression_weight": (0.5, TARGET),
    "csd.match.weight": (0.7, TARGET, MATCH),
    "csd.match.distance": ("mmd", MATCHED, MATCH),
    "csd.match.features": (("projected",), MATCHED, MATCH),
    "csd.match.projections": (3, MATCHED, MATCH),
    "csd.match.beta": (0.5, MATCHED, MATCH),
    "csd.match.prime": (12, MATCHED, MATCH),
    "csd.match.reference": (16, MATCHED, MATCH),
    "csd.match.landmarks": (6, MATCHED, NYSTROM),
    "csd.match.then_iterations": (1, "match 2 generator/loss", LATER),
    "csd.match.then_lr": (0.5, "match 1 generator/lr", LATER),
    "regress.own_share": (0.5, "regress 1 generator/loss", REGRESS),
    "regress.iterations": (1, "regress 2 generator/loss", REGRESS),
    "regress.guidance_iterations": (2, "guidance 2 guidance/loss", REGRESS),
    "regress.pairs": (7, "regress 1 generator/loss", REGRESS),
    "regress.batch": (3, "regress 1 generator/loss", REGRESS),
    "regress.accumulate": (1, "regress 1 generator/loss", REGRESS),
    "regress.ode.steps": (4, "regress 1 generator/loss", REGRESS),
    "regress.ode.solver": ("euler", "regress 1 generator/loss", REGRESS),
    "regress.ema": (0.05, "regress 1 file generator_ema", REGRESS),
}
for section, loss in (("tune", FIRST_TUNE), ("csd", TARGET)):  # of stage 1 it decides the samples too: see below
    WIRES |= {
        f"{section}.sampling.cfg_scale": (2.5, loss),
        f"{section}.sampling.cfg_interval": (2, loss),
        f"{section}.sampling.temperature": (1.4, loss),
        f"{section}.sampling.top_k": (4, loss),
        f"{section}.sampling.top_p": (0.5, loss),
    }
for section, loss in (("tune", FIRST_TUNE), ("csd", FIRST_CSD)):
    normal = {f"{section}.noise_level.kind": LOGIT_NORMAL}
    WIRES |= {
        f"{section}.noise_level.kind": (LOGIT_NORMAL, loss),
        f"{section}.noise_level.low": (0.4, loss),
        f"{section}.noise_level.high": (0.6, loss),
        f"{section}.noise_level.mean": (0.7, loss, normal),
        f"{section}.noise_level.std": (0.3, loss, normal),
    }
ADAM = {  # section: its rate's first trace, its first step's, and those of what shows in the second step at the latest
    "tune.optim": ("tune_head 1 student/lr", "tune_head 1 file student", ("tune_head 1", "tune 1", "tune 2 student/loss"), {}),
    "csd.guidance": (FIRST_CSD, FIRST_CSD, ("csd 1 guidance", "csd 1 generator/loss"), {}),
    "csd.generator": ("csd 1 generator/lr", "csd 1 generator/ema_lag", ("csd 1 generator", "csd 1 file", FIRST_SECOND), {}),
    "regress.optim": (
        "regress 1 generator/lr",
        "regress 1 file generator",
        ("regress 1 file generator", "regress 2 generator/loss", "regress 2 file generator"),
        REGRESS,
    ),
}
"""Adam's first step is the same whatever its betas and the gradient's norm, but for rounding: those show a step later on some
machines, and `WIRES` then has the places where they may.
"""
for prefix, (rate, step, later, beside) in ADAM.items():
    cosine = {"tune.optim": "tune 2 student/lr", "csd.guidance": "csd 2 guidance/loss", "csd.generator": "csd 2 generator/lr"}
    WIRES |= {
        f"{prefix}.lr": (5e-4, rate, beside),
        f"{prefix}.decay": ("cosine", cosine.get(prefix, "regress 2 generator/lr"), beside),
        f"{prefix}.warmup": (4, rate, beside),
        f"{prefix}.warmup_from": (1e-4, rate, {**beside, f"{prefix}.warmup": 5}),
        f"{prefix}.weight_decay": (0.0, step, beside),
        f"{prefix}.betas": ((0.5, 0.6), later, beside),
        f"{prefix}.clip_norm": (0.01, later, beside),
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wires")
    save_teacher(folder / "teacher", tiny_teacher())
    return folder


def run_of(home: Path, fields: dict[str, Any]) -> Path:
    """The folder of a tiny run, made once."""
    key = hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()[:12]
    out = home / key
    if not out.exists():
        config = replace(with_fields(TINY, fields), teacher=str(home / "teacher"), out=out)
        distill(config)
    return out


def told(run: Path) -> dict[str, Any]:
    """All that a run says, in its order: the numbers of every iteration, and a hash of every file that it saved."""
    found: dict[str, Any] = {}
    for row in MetricsLog(run / "metrics.jsonl").reproducible_rows():
        at = f"{row['stage']} {row['step']}"
        found |= {f"{at} {name}": value for name, value in row.items() if name not in ("stage", "step")}
        for file in sorted((run / "checkpoints" / row["stage"] / f"{row['step']:08d}").glob("*.safetensors")):
            if "optimizer" not in file.name:
                found[f"{at} file {file.stem}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def first_difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first place where two runs differ, or where only one of them has anything."""
    for here, there in zip([*a, ""], [*b, ""], strict=False):
        if here != there:
            longer = a if len(a) > len(b) else b
            return next(name for name in longer if name not in (a if longer is b else b))
        if a.get(here) != b.get(here):
            return here
    return "nowhere"


@pytest.mark.parametrize("field", WIRES)
def test_a_field_changes_what_it_must_and_nothing_before(home, field):
    value, where, *beside = WIRES[field]
    # The stages before the place, and no others.
    section = field.partition(".")[0]
    same = {} if section == "align" else {"align": AlignConfig()}
    same |= {"csd.iterations": 0} if section in ("head", "tune") else {}
    same |= beside[0] if beside else {}
    before, after = told(run_of(home, same)), told(run_of(home, {**same, field: value}))
    found = first_difference(before, after)
    assert found.startswith(where) if isinstance(where, tuple) else found == where


def test_the_table_has_every_field():
    def fields(config: object, prefix: str) -> set[str]:
        names: set[str] = set()
        for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
            inner = getattr(config, field.name)
            inside = fields(inner, f"{prefix}{field.name}.") if dataclasses.is_dataclass(inner) else {prefix + field.name}
            names |= inside
        return names

    sections = {
        "networks": NetworksConfig(),
        "head": HeadConfig(),
        "tune": TuneConfig(),
        "csd": CSDConfig(),
        "align": AlignConfig(),
        "regress": RegressConfig(),
    }
    every = set().union(*(fields(config, f"{name}.") for name, config in sections.items()))
    masked = {f"{section}.sampling.{name}" for section in ("tune", "csd") for name in MASKED} | {"networks.level"}  # test_masked
    assert set(WIRES) == every - masked


@pytest.mark.parametrize("field", MASKED)
def test_settings_of_masked_models_are_refused_elsewhere(home, tmp_path, field):
    value = {"cfg_schedule": "constant", "ar_steps": 3, "diffusion_steps": 7}[field]
    config = with_fields(TINY, {f"csd.sampling.{field}": value})
    with pytest.raises(InputError, match=f"sampling.{field} belongs to MAR"):
        distill(replace(config, teacher=str(home / "teacher"), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# What two runs cannot tell apart.


class Known(ConditionalScore):
    def x0_hat(self, x_t, t):
        return 0.5 * x_t


def networks_and_teacher() -> tuple[Student, Student, Any]:
    students = []
    for seed in (1, 2):
        student = Student.from_teacher(tiny_teacher(), TINY_HEAD)
        g = torch.Generator().manual_seed(seed)
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=g)
        students.append(student)
    return students[0], students[1], tiny_teacher()


LABELS = torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("change", [{"cfg_scale": 2.5}, {"top_k": 3}, {"top_p": 0.4}, {"temperature": 0.5}])
def test_the_teachers_distribution_reaches_the_targets(change):
    """On the same tokens: of stage 1 the table's runs have other samples too."""
    generator, guidance, teacher = networks_and_teacher()
    tokens = teacher.sample(LABELS, Sampling(), range(4))
    losses = []
    for sampling in (SAMPLING, replace(SAMPLING, **change)):
        tune = TuneConfig(sampling=sampling, draws=2)
        csd = CSDConfig(sampling=sampling)
        losses.append(
            (
                float(tune_loss(guidance, teacher, tokens, LABELS, tune, torch.Generator().manual_seed(0))[0].detach()),
                float(generator_loss(generator, guidance, teacher, LABELS, csd, torch.Generator().manual_seed(0))[0].detach()),
            )
        )
    assert losses[0][0] != losses[1][0]
    assert losses[0][1] != losses[1][1]


@pytest.mark.parametrize("snap_teacher", [False, True])
@pytest.mark.parametrize("snap_guidance", [False, True])
def test_each_network_reads_the_condition_that_is_asked_for(monkeypatch, snap_teacher, snap_guidance):
    generator, guidance, teacher = networks_and_teacher()
    read: dict[str, list[torch.Tensor]] = {"teacher": [], "guidance": []}

    def spied(name, network):
        given = network.given
        monkeypatch.setattr(network, "given", lambda tokens, *rest: read[name].append(tokens) or given(tokens, *rest))

    spied("teacher", teacher)
    spied("guidance", guidance)
    config = CSDConfig(sampling=Sampling(), snap_teacher=snap_teacher, snap_guidance=snap_guidance)
    random = torch.Generator().manual_seed(0)
    guidance_loss(guidance, generated(generator, LABELS, random).detach(), teacher, LABELS, config, random)
    generator_loss(generator, guidance, teacher, LABELS, config, torch.Generator().manual_seed(0))
    assert [len(tokens) for tokens in read.values()] == [1, 2]
    for name, snaps in (("teacher", snap_teacher), ("guidance", snap_guidance)):
        for tokens in read[name]:
            assert torch.equal(tokens, teacher.snap(tokens)) == snaps


def test_noise_levels_are_drawn_per_token_and_draw(monkeypatch):
    generator, guidance, teacher = networks_and_teacher()
    levels = []
    velocity = HeadScore.velocity

    def spied(self, x_t, t):
        levels.append(t)
        return velocity(self, x_t, t)

    monkeypatch.setattr(HeadScore, "velocity", spied)
    random = torch.Generator().manual_seed(0)
    tokens = teacher.sample(LABELS, Sampling(), range(4))
    tune_loss(guidance, teacher, tokens, LABELS, TuneConfig(sampling=Sampling(), draws=3), random)
    csd = CSDConfig(sampling=Sampling(), guidance_draws=3, generator_draws=3)
    guidance_loss(guidance, generated(generator, LABELS, random).detach(), teacher, LABELS, csd, random)
    generator_loss(generator, guidance, teacher, LABELS, csd, random)
    drawn = [t for t in levels if t.ndim == 3]
    assert len(drawn) == 3
    for t in drawn:
        assert t.shape == (3, 4, 16)
        assert len(t.unique()) == t.numel()
    one_pass = [t for t in levels if t.ndim == 2]
    assert len(one_pass) == 2  # the generator, in both updates
    assert all((t == 1).all() for t in one_pass)  # its head works at t = 1 (App. E.1)


def test_the_students_posterior_mean_is_x_minus_t_v():
    g = torch.Generator().manual_seed(0)
    x_t, t, features = torch.randn(2, 3, 5, 4, generator=g), torch.rand(2, 3, 5, generator=g), torch.zeros(3, 5, 8)
    given = HeadScore(lambda x, level, f: 3 * x + level.unsqueeze(-1), features)
    torch.testing.assert_close(given.x0_hat(x_t, t), x_t - t.unsqueeze(-1) * (3 * x_t + t.unsqueeze(-1)))


def test_velocity_and_score_of_a_conditional_score():
    x_t, t = torch.randn(3, 2, 5, 4), torch.rand(3, 2, 5) * 0.8 + 0.1
    level = t.unsqueeze(-1)
    torch.testing.assert_close(Known().velocity(x_t, t), (x_t - 0.5 * x_t) / level)
    torch.testing.assert_close(Known().score(x_t, t), ((1 - level) * 0.5 * x_t - x_t) / level**2)
    torch.testing.assert_close(noised(x_t, t, 2 * x_t), (1 - level) * x_t + level * 2 * x_t)


def test_every_micro_batch_and_update_has_its_own_noise(tmp_path):
    """Of all micro-batches, all K updates, both networks and all iterations."""
    generator, guidance, teacher = networks_and_teacher()
    networks = Networks(generator, guidance, generator)
    samples = TeacherSamples(teacher, torch.zeros(4, 16, dtype=torch.long), torch.arange(4) % 3)
    stage = csd_stage(networks, teacher, samples, replace(TINY.csd, iterations=2, validation=0))
    seeds: list[int] = []
    for update in stage.updates:
        inner = update.loss
        update.loss = lambda random, inner=inner: seeds.append(random.initial_seed()) or inner(random)
    Trainer(tmp_path, 0, replace(TINY.loop, save_every=9), torch.device("cpu"), "").run(stage)
    assert len(seeds) == 2 * (2 * 2 + 2)  # iterations x (K x accumulate + accumulate)
    assert len(set(seeds)) == len(seeds)


def test_noise_and_uniforms_of_one_image_are_different_streams(monkeypatch):
    made: list[int] = []
    seed_of = seeding.seed_of
    monkeypatch.setattr(seeding, "seed_of", lambda *parts: made.append(seed_of(*parts)) or made[-1])
    seeding.image_noise([3, 4], (2,))
    seeding.image_uniforms([3, 4], (2,))
    assert len(made) == len(set(made)) == 4


def checkpoint(run: Path, stage: str, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / stage / f"{step:08d}" / f"{name}.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_head_only_means_the_head_and_only_it(home):
    run, teacher = run_of(home, {}), require_codes(load_teacher(home / "teacher"), "a test")
    student = checkpoint(run, "tune_head", 1, "student")
    for name, value in teacher.backbone.named_parameters():
        assert torch.equal(student[f"backbone.{name}"], value)
    assert student["head.output.weight"].abs().sum() > 0  # it started at 0
    tuned = checkpoint(run, "tune", 2, "student")
    assert not any(torch.equal(tuned[f"backbone.{name}"], value) for name, value in teacher.backbone.named_parameters())


def test_tokens_are_standardised_by_the_samples(home):
    run, teacher = run_of(home, {}), require_codes(load_teacher(home / "teacher"), "a test")
    codes = teacher.tokenizer.codebook[TeacherSamples.load(run / "teacher_samples", teacher).kept.long()].flatten(0, 1)
    for name in ("ar_diffusion", "generator"):
        backbone = load_generator(run / name).student.backbone
        torch.testing.assert_close(backbone.token_mean, codes.mean(0))
        torch.testing.assert_close(backbone.token_std, codes.std(0, correction=0))


def test_alignment_freezes_the_average_and_what_follows_counts_on(home):
    run = run_of(home, {})
    average = checkpoint(run, "csd", 3, "generator_ema")
    for name in ("generator", "generator_ema"):
        assert equal(checkpoint(run, "align", 1, name), average)
    assert not equal(checkpoint(run, "align", 1, "guidance"), checkpoint(run, "csd", 3, "guidance"))
    modules = {}
    for name, weights in (("ema", average), ("generator", checkpoint(run, "csd_aligned", 1, "generator"))):
        modules[name] = Student.from_teacher(require_codes(load_teacher(home / "teacher"), "a test"), TINY.head)
        modules[name].load_state_dict(weights)
    ema_update(modules["ema"], modules["generator"], ema_rate(3, TINY.csd.ema))  # the fourth update that it sees
    found = checkpoint(run, "csd_aligned", 1, "generator_ema")
    assert equal(modules["ema"].state_dict(), found)


def test_the_second_half_has_what_alignment_says():
    half = AlignConfig(iterations=5, then_iterations=7, then_k=4, then_lr=0.25).second_half(
        CSDConfig(generator=OptimConfig(lr=1.0, warmup=3), guidance=OptimConfig(lr=2.0, warmup=3))
    )
    assert (half.iterations, half.k, half.generator.lr, half.guidance.lr) == (7, 4, 0.25, 0.5)
    assert half.generator.warmup == half.guidance.warmup == 0


@pytest.mark.parametrize("initialised", ["both", "guidance", "generator", "neither"])
def test_what_starts_from_stage_one(initialised):
    tuned, fresh, _ = networks_and_teacher()
    networks = starting_networks(CSDConfig(initialised=initialised), tuned, fresh)
    for name in ("generator", "guidance"):
        start = tuned if initialised in ("both", name) else fresh
        assert equal(getattr(networks, name).state_dict(), start.state_dict())
    assert equal(networks.ema.state_dict(), networks.generator.state_dict())


def test_random_weights_have_nothing_of_the_teacher():
    tuned, fresh, _ = networks_and_teacher()
    torch.manual_seed(5)
    networks = starting_networks(CSDConfig(initialised="random"), tuned, fresh, seed=3)
    torch.manual_seed(6)  # whatever has been drawn before, and on any process
    again = starting_networks(CSDConfig(initialised="random"), tuned, fresh, seed=3)
    assert equal(networks.generator.state_dict(), again.generator.state_dict())
    assert equal(networks.generator.state_dict(), networks.guidance.state_dict())
    other = starting_networks(CSDConfig(initialised="random"), tuned, fresh, seed=4)
    assert not equal(networks.generator.state_dict(), other.generator.state_dict())
    for network in (networks.generator, networks.guidance):
        before = dict(fresh.backbone.named_parameters())
        for name, parameter in network.backbone.named_parameters():
            if parameter.dim() > 1:
                assert not torch.isclose(parameter, before[name], rtol=1e-3).float().mean() > 0.05, name
                assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
        assert equal(network.get_submodule("head").state_dict(), fresh.head.state_dict())
    assert equal(networks.ema.state_dict(), networks.generator.state_dict())


LLAMAGEN_L_STAGE2 = {"iterations": 12_000, "k": 5, "guidance.lr": 2e-4, "generator.lr": 1e-4, "generator.warmup": 8000}
TABLES_10_AND_11: dict[str, dict[str, Any]] = {
    "var_d16": {
        **{"tune.head_iterations": 300_000, "tune.iterations": 30_000, "tune.optim.lr": 2e-4},
        **{"csd.iterations": 8000, "csd.k": 5, "csd.guidance.lr": 2e-4, "csd.generator.lr": 2e-4, "csd.generator.warmup": 8000},
        **{"align.iterations": 8000, "align.then_iterations": 7500, "align.then_k": 2, "batch": (512, 512)},
    },
    "var_d20": {
        **{"tune.head_iterations": 300_000, "tune.iterations": 30_000, "tune.optim.lr": 2e-4},
        **{"csd.iterations": 16_000, "csd.k": 5, "csd.guidance.lr": 2e-4, "csd.generator.lr": 2e-4, "csd.generator.warmup": 8000},
        **{"align.iterations": 8000, "align.then_iterations": 18_000, "align.then_k": 2, "batch": (512, 512)},
    },
    "var_d24": {
        **{"tune.head_iterations": 200_000, "tune.iterations": 30_000, "tune.optim.lr": 2e-4},
        **{
            "csd.iterations": 15_000,
            "csd.k": 2,
            "csd.guidance.lr": 4e-4,
            "csd.generator.lr": 5e-5,
            "csd.generator.warmup": 10_000,
        },
        **{"align.iterations": 0, "batch": (512, 1024)},
    },
    "llamagen_l": {
        **{"tune.head_iterations": 0, "tune.iterations": 100_000, "tune.optim.lr": 1e-4},
        **{f"csd.{name}": value for name, value in LLAMAGEN_L_STAGE2.items()},
        **{"align.iterations": 0, "batch": (512, 1024)},
    },
}
"""Value by value; "batch" is the global batch of both stages. Warm-up counts generator updates: 40k (d24: 20k) guidance ones."""


@pytest.mark.parametrize("name", TABLES_10_AND_11)
def test_the_full_size_configurations_are_the_papers(name):
    from dd2.fields import flat

    config = load_config(DistillConfig, f"{name}_paper")
    found, expected = flat(config), dict(TABLES_10_AND_11[name])
    assert (config.tune.batch * config.tune.accumulate, config.csd.batch * config.csd.accumulate) == expected.pop("batch")
    expected |= {f"{optim}.betas": [0.9, 0.95] for optim in ("tune.optim", "csd.generator", "csd.guidance")}
    expected |= {"csd.generator.warmup_from": 1e-6, "csd.d": "sid", "csd.alpha": 1.0, "csd.ema": 0.9999}
    expected |= {"tune.sampling.cfg_scale": 2.0, "csd.sampling.cfg_scale": 2.0, "csd.sampling.top_k": 900}
    next_scale = name.startswith("var")
    expected |= {"tune.sampling.top_k": 900 if next_scale else 8000, "csd.sampling.top_p": 0.95 if next_scale else 1.0}
    assert {field: found[field] for field in expected} == expected


RECIPE = {
    **{"networks.generator": "codes", "networks.guidance": "codes", "regress.ode.solver": "heun", "regress.ode.steps": 8},
    **{"csd.d": "dmd", "csd.k": 2, "csd.generator_draws": 4, "csd.noise_level.low": 0.1},
    **{"csd.regression_weight": 0.1, "csd.match.weight": 1.0, "csd.match.distance": "frechet"},
}
"""What this library's recipe is on the benches where it stands beside the paper's, and at full size."""
BENCHES = ("digits", "digits_var", "fashion")
FULL_SIZE = sorted(
    file.stem for file in find_yaml("digits").parent.glob("*.yaml") if re.fullmatch(r"(var_d|llamagen_)\w+(?<!_paper)", file.stem)
)


@pytest.mark.parametrize("name", [*BENCHES, *FULL_SIZE])
def test_the_full_size_configurations_are_the_recipe_of_the_benches(name):
    from dd2.fields import flat

    config = load_config(DistillConfig, name)
    found = flat(config)
    assert {field: found[field] for field in RECIPE} == RECIPE
    assert config.tune.sampling == config.csd.sampling  # the reference is of the distribution that is aimed at
    assert len(FULL_SIZE) == 10
    if name in FULL_SIZE:
        assert config.csd.batch * config.csd.accumulate == config.regress.batch * config.regress.accumulate == 512
