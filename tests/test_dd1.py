"""DD1, the baseline: the ODE against closed forms, the student's mask, training, and the commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal

from dd2.baselines.dd1.student import DD1Config, DD1Student
from dd2.baselines.dd1.train import DD1TrainConfig, dd1_loss, dd1_stage
from dd2.checkpoints.native import load_generator, save_generator, save_teacher
from dd2.cli import main
from dd2.distribution import CodeDistribution
from dd2.errors import InputError
from dd2.generator import Generator
from dd2.sampling import one_step, two_passes
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling
from dd2.teachers.head import token_noise
from dd2.teachers.own_token import ReadsOwnToken
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.samples import sample_seed
from dd2.training.schedule import OptimConfig
from dd2.trajectory import OdeConfig, Pairs, data_of_noise, flow_to_codes
from models import tiny_teacher, tiny_var

LABELS = torch.tensor([0, 1, 2, 1])


def random_log_p(rows: int, codes: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, codes, generator=torch.Generator().manual_seed(seed)).mul(1.5).log_softmax(-1)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_in_one_dimension_the_ode_is_the_quantile_function(solver):
    """Trajectories on a line cannot cross, and normal noise must become p: only the monotone map does both."""
    codes = torch.tensor([-1.7, -0.4, 0.3, 0.9, 2.0]).unsqueeze(1)
    log_p = random_log_p(1, 5, 0)
    quantiles = (torch.arange(2000) + 0.5) / 2000
    noise = Normal(0.0, 1.0).icdf(quantiles).unsqueeze(1)
    found = flow_to_codes(noise, CodeDistribution.over_all(log_p.expand(2000, 5)), codes, steps=200, solver=solver)
    expected = torch.searchsorted(log_p[0].exp().cumsum(0)[:4], quantiles)
    assert (found != expected).float().mean() < 0.01
    assert (found.diff() >= 0).all()


def test_normal_noise_becomes_the_distribution():
    g = torch.Generator().manual_seed(0)
    codes, log_p = torch.randn(12, 4, generator=g), random_log_p(1, 12, 1)
    log_p[0, 3] = -torch.inf
    noise = torch.randn(20_000, 4, generator=g)
    p = log_p[0].softmax(-1)
    for steps, bound in ((4, 0.2), (40, 0.015)):  # sampling alone gives about 0.008
        ids = flow_to_codes(noise, CodeDistribution.over_all(log_p.expand(20_000, 12)), codes, steps=steps, solver="heun")
        assert (ids != 3).all()
        assert (ids.bincount(minlength=12) / 20_000 - p).abs().sum() / 2 < bound
    with pytest.raises(InputError, match="at least 1 step"):
        flow_to_codes(noise, CodeDistribution.over_all(log_p.expand(20_000, 12)), codes, steps=0, solver="heun")


@pytest.mark.parametrize("build", [tiny_teacher, tiny_var])
def test_pairs_step_by_step_are_those_of_the_whole_sequence(build):
    """Every position's code is the ODE's under the distribution that the finished sequence's prefix gives it."""
    teacher: CodeTeacher = build()
    sampling, noise = Sampling(top_k=5), token_noise(teacher.backbone, [3, 4, 5, 6])
    ids = data_of_noise(teacher, noise, LABELS, sampling, steps=8)
    log_p = teacher.distribution(teacher.codebook[ids], LABELS, sampling).dense()
    assert torch.equal(flow_to_codes(noise, CodeDistribution.over_all(log_p), teacher.codebook, steps=8, solver="heun"), ids)
    assert torch.equal(data_of_noise(teacher, noise[1:], LABELS[1:], sampling, steps=8), ids[1:])


def test_pairs_keep_ids_and_draw_their_noise_again(tmp_path):
    teacher = tiny_teacher()
    teacher.standardise()
    pairs = Pairs(tmp_path, teacher, Sampling(top_k=5), OdeConfig(steps=6), 40, seed=2)
    noise, ids, labels = pairs.batch(9, torch.Generator().manual_seed(0))
    assert torch.equal(data_of_noise(teacher, noise, labels, Sampling(top_k=5), steps=6), ids)
    with pytest.raises(InputError, match="samples of another ode"):
        Pairs(tmp_path, teacher, Sampling(top_k=5), OdeConfig(steps=7), 40, seed=2)


@pytest.mark.parametrize("build", [tiny_teacher, tiny_var])
def test_a_position_reads_itself_and_earlier_steps_only(build):
    teacher: CodeTeacher = build()
    order = teacher.order
    tokens = torch.randn(2, order.n, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert isinstance(teacher.backbone, ReadsOwnToken)
    features = teacher.backbone.own_features(tokens, LABELS[:2], lambda index, x: x)
    assert features.shape == (2, order.n, 32)
    for position in (0, 3, order.n - 1):
        (grad,) = torch.autograd.grad(features[0, position].sum(), tokens, retain_graph=True)
        read = grad[0].abs().sum(-1) > 0
        expected = order.step_of < order.step_of[position]
        expected[position] = True
        assert torch.equal(read, expected)
        assert grad[1].abs().sum() == 0


def student_of(teacher: CodeTeacher, **config: int) -> DD1Student:
    torch.manual_seed(0)
    return DD1Student.from_teacher(teacher, DD1Config(**config))


@pytest.mark.parametrize("build", [tiny_teacher, tiny_var])
def test_losses_reach_what_they_should(build):
    teacher: CodeTeacher = build().requires_grad_(True)
    student = student_of(teacher, logits_steps=1, second_step=2)
    noise = token_noise(teacher.backbone, [0, 1, 2, 3])
    ids = data_of_noise(teacher, noise, LABELS, Sampling(), steps=4)
    loss, numbers = dd1_loss(student, ids, noise, LABELS, torch.Generator().manual_seed(1), weight=2.0)
    assert loss.item() == pytest.approx(float(numbers["cross_entropy"] + 2 * numbers["squared_error"]))
    loss.backward()
    assert {name for name, p in student.named_parameters() if p.grad is None} <= {"backbone.cls_embedding.null"}
    assert all(p.grad is None for p in teacher.parameters())
    only = student_of(teacher, logits_steps=teacher.order.num_steps)
    assert dd1_loss(only, ids, noise, LABELS, torch.Generator(), 1.0)[1].keys() == {"cross_entropy"}


def test_heads_and_passes_share_the_sequence():
    teacher = tiny_var()
    student = student_of(teacher, logits_steps=1, second_step=2)
    torch.nn.init.normal_(student.flag_maps[0].weight, std=0.5)  # pyright: ignore[reportArgumentType]
    one, two = one_step(student, LABELS, range(4)), two_passes(student, LABELS, range(4))
    first = teacher.order.steps[0].stop
    nearest = torch.cdist(one[:, :first], teacher.codebook).min(-1).values
    assert nearest.max() < 1e-3  # decided by the classifier: codes
    assert torch.cdist(one[:, first:], teacher.codebook).min(-1).values.min() > 1e-3
    kept = teacher.order.steps[2].start
    assert torch.equal(two[:, :kept], one[:, :kept])
    assert not torch.allclose(two[:, kept:], one[:, kept:])
    with pytest.raises(InputError, match="trained for one pass"):
        two_passes(student_of(teacher, logits_steps=1), LABELS, range(4))
    with pytest.raises(InputError, match="within the teacher's 3 AR steps"):
        student_of(teacher, logits_steps=4)


@pytest.mark.parametrize("build", [tiny_teacher, tiny_var])
def test_a_saved_student_draws_the_same(tmp_path, build):
    teacher: CodeTeacher = build()
    teacher.standardise()
    student = student_of(teacher, logits_steps=2).eval()
    save_generator(tmp_path / "generator", Generator(student, teacher.tokenizer, teacher.conditions))
    loaded = load_generator(tmp_path / "generator")
    assert isinstance(loaded.student, DD1Student)
    assert torch.equal(one_step(loaded.student, LABELS, range(4)), one_step(student, LABELS, range(4)))
    with pytest.raises(InputError, match="no AR-diffusion model"):
        _ = loaded.as_teacher
    config = json.loads((tmp_path / "generator" / "config.json").read_text())
    (tmp_path / "generator" / "config.json").write_text(json.dumps(config | {"method": "dd3"}))
    with pytest.raises(InputError, match="unknown method 'dd3'"):
        load_generator(tmp_path / "generator")


@pytest.mark.e2e
def test_commands_and_pipeline_know_dd1s_folders():
    """In a process that has imported nothing else."""
    for front_door in ("dd2.commands", "dd2.pipeline"):
        code = f"import {front_door}; from dd2.checkpoints.native import NETWORKS; assert 'dd1' in NETWORKS"
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.e2e
def test_training_learns_the_map(tmp_path):
    """On a fixed set of pairs the student gives most data back from their noise, and hardly any from other noise."""
    teacher = tiny_teacher()
    teacher.standardise()
    pairs = Pairs(tmp_path / "pairs", teacher, Sampling(), OdeConfig(steps=10), 48, seed=5)
    student = student_of(teacher, logits_steps=16)
    config = DD1TrainConfig(iterations=200, batch=48, ema=0.9, optim=OptimConfig(lr=3e-3, decay="cosine"))
    stage, average = dd1_stage(student, teacher, pairs, config)
    Trainer(tmp_path, 5, LoopConfig(preview_every=0), torch.device("cpu"), "").run(stage)
    ids, labels = pairs.samples.kept.long(), pairs.samples.labels

    def agreement(seeds: list[int]) -> float:
        tokens = average.as_generator(token_noise(teacher.backbone, seeds), labels)
        return float((torch.cdist(tokens, teacher.codebook).argmin(-1) == ids).float().mean())

    known = agreement([sample_seed(5, row) for row in range(48)])
    assert known > 0.9
    assert agreement(list(range(48))) < known - 0.2


@pytest.mark.parametrize("build", [tiny_teacher, tiny_var])
@pytest.mark.e2e
def test_the_commands(tmp_path: Path, capsys, monkeypatch, build):
    save_teacher(tmp_path / "teacher", build())
    run, steps = tmp_path / "run", 3 if build is tiny_var else 16
    command = [
        *("dd1", "--teacher", tmp_path / "teacher", "--out", run, "--pairs", 60, "--standardise-samples", 30, "--ode.steps", 3),
        *("--sampling.cfg-scale", "None", "--sampling.top-k", 0, "--train.batch", 8, "--train.iterations", 6),
        *("--heads.logits-steps", 2, "--heads.second-step", 1, "--loop.save-every", 3),
    ]
    assert main([str(a) for a in command]) == 0
    before = (run / "generator" / "model.safetensors").read_bytes()
    for old in (run / "checkpoints" / "dd1" / "00000006").iterdir():
        old.unlink()
    (run / "checkpoints" / "dd1" / "00000006").rmdir()
    assert main([str(a) for a in command]) == 0  # resumes at step 3
    assert (run / "generator" / "model.safetensors").read_bytes() == before
    features = tmp_path / "pixels.py"
    features.write_text("def read(images):\n    return images.mean(-1).flatten(1)[:, ::4]\n")
    monkeypatch.chdir(tmp_path)
    evaluate = ["evaluate", run, "--count", 60, "--features", "pixels:read", "--steps", 1, 2, "--skip", 1, "--no-speed"]
    assert main([str(a) for a in evaluate]) == 0
    found = json.loads((run / "metrics.json").read_text())
    assert {"generator_two_passes", "generator_2_steps", "teacher_skip_1", "onestep_marginal"} <= found["metrics"].keys()
    assert "teacher_nll" not in found["metrics"]["teacher_skip_1"]
    assert "skip-1" in capsys.readouterr().out
    for method in ("generator", "two_passes"):
        assert main(["sample", str(run), "--method", method, "--count", "6", "--out", str(tmp_path / f"{method}.png")]) == 0
    assert main(["evaluate", str(run), "--skip", str(steps)]) == 2
    assert f"skip must be 1 to {steps - 1}" in capsys.readouterr().err
    assert main([str(a) for a in [*command, "--heads.logits-steps", 99]]) == 2
    assert "AR steps" in capsys.readouterr().err
    assert main([str(a) for a in [*command, "--ode.steps", 0]]) == 2
