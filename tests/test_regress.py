"""The start that is not the paper's: the generator regresses the teacher's ODE before stage 2."""

import json

import pytest
import torch

from dd2.checkpoints.native import load_generator, save_teacher
from dd2.checkpoints.runs import open_teacher
from dd2.cli import main
from dd2.method.config import RegressConfig
from dd2.method.networks import Networks
from dd2.method.recipe import regress_stage
from dd2.method.regress import regress_loss
from dd2.student import HeadConfig, Student
from dd2.teachers.code import require_codes
from dd2.teachers.filtering import Sampling
from dd2.teachers.head import token_noise
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.metrics import MetricsLog
from dd2.training.samples import sample_seed
from dd2.training.schedule import OptimConfig
from dd2.trajectory import OdeConfig, Pairs, data_of_noise
from models import TINY_HEAD, tiny_teacher


def test_the_loss_is_the_squared_error_and_reaches_the_generator():
    teacher = tiny_teacher()
    teacher.standardise()
    generator = Student.from_teacher(teacher, TINY_HEAD)
    torch.nn.init.normal_(generator.head.output.weight, std=0.1)
    noise, labels = torch.randn(3, 16, 4), torch.tensor([0, 1, 2])
    ids = torch.randint(12, (3, 16))
    loss, numbers = regress_loss(generator, teacher, noise, ids, labels)
    q = generator.as_generator(noise, labels)
    torch.testing.assert_close(loss, (q - teacher.codebook[ids]).square().mean())
    right = torch.cdist(q, teacher.codebook).argmin(-1) == ids
    torch.testing.assert_close(numbers["right_codes"], right.float().mean())
    loss.backward()
    assert all(p.grad is not None for p in generator.head.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_generator_learns_the_teachers_map(tmp_path):
    """On a fixed set of pairs it gives most data back from their noise."""
    teacher = tiny_teacher()
    teacher.standardise()
    pairs = Pairs(tmp_path / "pairs", teacher, Sampling(), OdeConfig(steps=10), 32, seed=5)
    networks = Networks.from_tuned(Student.from_teacher(teacher, TINY_HEAD))
    optim = OptimConfig(lr=5e-3, decay="cosine")
    config = RegressConfig(iterations=200, batch=32, accumulate=1, ema=0.9, optim=optim)
    stage = regress_stage(networks, teacher, pairs.samples, pairs, config, Sampling())
    Trainer(tmp_path, 5, LoopConfig(preview_every=0), torch.device("cpu"), "").run(stage)
    networks.restart_from_average()
    ids, labels = pairs.samples.kept.long(), pairs.samples.labels
    noise = token_noise(teacher.backbone, [sample_seed(5, row) for row in range(32)])
    found = torch.cdist(networks.generator.as_generator(noise, labels), teacher.codebook).argmin(-1)
    assert (found == ids).float().mean() > 0.8


@pytest.mark.long
def test_one_pass_learns_real_digits(tmp_path):
    """At a fixed seed, on the embedded teacher: most of what a short regression gets right holds for noise it never saw."""
    teacher = require_codes(open_teacher("digits", torch.device("cpu")), "this test")
    teacher.standardise()
    pairs = Pairs(tmp_path / "pairs", teacher, Sampling(), OdeConfig(steps=12), 3072, seed=0, batch=512)
    torch.manual_seed(0)
    networks = Networks.from_tuned(Student.from_teacher(teacher, HeadConfig(depth=2, width=64, frequencies=16)))
    optim = OptimConfig(lr=2e-3, decay="cosine", warmup=20)
    config = RegressConfig(iterations=150, batch=64, accumulate=1, ema=0.98, optim=optim)
    stage = regress_stage(networks, teacher, pairs.samples, pairs, config, Sampling())
    unseen = token_noise(teacher.backbone, list(range(512)))
    labels = torch.arange(512) % 10
    ids = data_of_noise(teacher, unseen, labels, Sampling(), steps=12)

    def right() -> float:
        return float(regress_loss(networks.ema, teacher, unseen, ids, labels)[1]["right_codes"])

    before = right()
    Trainer(tmp_path, 0, LoopConfig(preview_every=0), torch.device("cpu"), "").run(stage)
    assert before < 0.08
    assert right() > 0.15


def test_the_command(tmp_path, capsys):
    """Regression, the guidance network's catching up, and stage 2 in one run, from where it was interrupted."""
    save_teacher(tmp_path / "teacher", tiny_teacher())
    flags = [
        *("--teacher", tmp_path / "teacher", "--teacher-samples", 64, "--tune.iterations", 2, "--tune.batch", 4),
        *("--tune.accumulate", 1, "--tune.sampling.cfg-scale", "None", "--csd.iterations", 3, "--csd.batch", 4),
        *("--csd.accumulate", 1, "--csd.sampling.cfg-scale", "None", "--csd.k", 1, "--head.depth", 1),
        *("--head.width", 16, "--head.frequencies", 4, "--loop.preview-every", 0, "--loop.log-every", 1),
        *("--regress.iterations", 4, "--regress.pairs", 32, "--regress.batch", 4, "--regress.accumulate", 1),
        *("--regress.ode.steps", 4, "--regress.guidance-iterations", 2, "--csd.further-emas", 0.5),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["distill", "--out", str(whole), *map(str, flags)]) == 0
    rows = MetricsLog(whole / "metrics.jsonl").reproducible_rows()
    assert [row["stage"] for row in rows] == ["tune"] * 2 + ["regress"] * 4 + ["guidance"] * 2 + ["csd"] * 3
    assert "regress" in json.loads((whole / "seconds.json").read_text())
    assert main(["distill", "--out", str(parts), *map(str, flags)]) == 0
    for gone in ("generator", "checkpoints/csd", "checkpoints/guidance"):
        for file in sorted((parts / gone).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (parts / gone).rmdir()
    assert main(["distill", "--out", str(parts), *map(str, flags)]) == 0
    assert MetricsLog(parts / "metrics.jsonl").reproducible_rows()[-5:] == rows[-5:]
    ends = [load_generator(run / "generator").student.state_dict() for run in (whole, parts)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    capsys.readouterr()
    assert main(["distill", "--out", str(tmp_path / "x"), "--regress.guidance-iterations", "5"]) == 2
    assert "give regress.iterations too" in capsys.readouterr().err
    assert RegressConfig().iterations == 0  # the paper's method is the default
