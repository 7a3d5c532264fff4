"""The commands on a GPU, as far as a machine without one can tell: no tensor is left behind on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from dd2.checkpoints.native import save_teacher
from dd2.cli import main
from dd2.method.config import CSDConfig
from dd2.method.networks import Networks
from dd2.method.recipe import csd_stage
from dd2.sampling import one_step
from dd2.student import Student
from dd2.teachers.filtering import Sampling
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.metrics import MetricsLog
from dd2.training.samples import TeacherSamples
from models import TINY_HEAD, tiny_teacher, tiny_text, tiny_var
from test_training import OVER_CODES
from virtual_gpu import virtual_gpu

pytestmark = pytest.mark.e2e

DISTILL = [
    "--teacher-samples", "64", "--head.depth", "1", "--head.width", "16", "--head.frequencies", "4",
    "--tune.iterations", "2", "--tune.batch", "4", "--tune.accumulate", "2", "--regress.iterations", "2",
    "--regress.pairs", "32", "--regress.batch", "4", "--regress.ode.steps", "2", "--regress.guidance-iterations", "2",
    "--csd.iterations", "4", "--csd.k", "2", "--csd.batch", "4", "--csd.validation", "20",
    "--align.iterations", "2", "--align.then-iterations", "2",
    "--loop.save-every", "2", "--loop.log-every", "1", "--loop.preview-every", "2",
]  # fmt: skip


def test_the_rules():
    with virtual_gpu():
        there, here = torch.randn(3, 4, device="cuda"), torch.zeros(4)
        assert (
            (there * 2).device.type == (there + torch.tensor(1.0)).device.type == there[torch.tensor([0])].device.type == "cuda"
        )
        assert there.cpu().device.type == here.to("cuda").to(here).device.type == here.device.type == "cpu"
        network = torch.nn.Linear(4, 2).to("cuda")
        network(there).sum().backward()
        assert network.weight.device == network.weight.grad.device == there.device  # pyright: ignore
        for mixed in (
            lambda: there + here,
            lambda: network(here),
            lambda: torch.cat([there, here.view(1, 4)]),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: here * there.sum(),
            lambda: torch.randn(3, generator=torch.Generator(), device="cuda"),
            lambda: torch.randn(3, generator=torch.Generator("cuda")),
            lambda: there.numpy(),
        ):
            with pytest.raises(RuntimeError):
                mixed()


def test_a_tensor_left_behind_is_found():
    teacher = tiny_teacher()
    student = Student.from_teacher(teacher, TINY_HEAD)
    with virtual_gpu():
        student.to("cuda")
        student.backbone.token_mean.data = student.backbone.token_mean.cpu()
        with pytest.raises(RuntimeError, match="different devices"):
            one_step(student, torch.tensor([0], device="cuda"), [0])


@pytest.mark.parametrize(
    ("build", "precision", "more"),
    [
        pytest.param(tiny_teacher, "float32", ["--csd.d", "dmd", "--csd.generator-draws", "2"], marks=pytest.mark.long),
        (tiny_var, "bfloat16", ["--csd.snap-guidance", "--loop.recompute", "--sample-in-loop"]),
    ],
)
def test_distil_sample_and_evaluate(tmp_path, build, precision, more):
    save_teacher(tmp_path / "teacher", build())
    run = tmp_path / "run"
    with virtual_gpu() as gpu:
        flags = ["--teacher", str(tmp_path / "teacher"), "--out", str(run), "--loop.precision", precision]
        assert main(["distill", *flags, *DISTILL, *more]) == 0
        assert gpu.operations["cuda"] > 5 * gpu.operations["cpu"] > 0
        assert main(["sample", str(run), "--count", "6", "--steps", "2", "--out", str(tmp_path / "grid.png")]) == 0
        assert main(["evaluate", str(run), "--count", "30", "--skip", "1", "--path-length", "4", "--batch", "16"]) == 0
    rows = MetricsLog(run / "metrics.jsonl").rows()
    assert {row["stage"] for row in rows} == {"tune", "regress", "guidance", "csd", "align", "csd_aligned"}
    assert all("seconds/backward" in row for row in rows)  # timed by events
    assert json.loads((run / "metrics.json").read_text())["frechet"]["generator"] > 0


@pytest.mark.parametrize("build", [tiny_teacher, tiny_var])
def test_networks_over_codes_and_all_that_goes_with_them(tmp_path, build):
    """Extra layers, rounds, the noise they are told: each is made beside copies of the teacher, and must be where they are."""
    save_teacher(tmp_path / "teacher", build())
    run = tmp_path / "run"
    with virtual_gpu():
        flags = ["--teacher", str(tmp_path / "teacher"), "--out", str(run), *DISTILL, *OVER_CODES]
        flags += ["--align.iterations", "0", "--align.then-iterations", "0"]  # which goes with no matching behind stage 2
        assert main(["distill", *flags]) == 0
        assert main(["sample", str(run), "--count", "6", "--rounds", "1", "--out", str(tmp_path / "grid.png")]) == 0
        assert main(["evaluate", str(run), "--count", "30", "--rounds", "3", "--guidance", "--batch", "16"]) == 0
    assert {row["stage"] for row in MetricsLog(run / "metrics.jsonl").rows()} >= {"regress", "guidance", "csd"}
    assert json.loads((run / "metrics.json").read_text())["frechet"]["generator_3_rounds"] > 0


@pytest.mark.parametrize("build", [tiny_teacher, tiny_var, tiny_text])
@pytest.mark.parametrize("d", ["sid", "dmd"])
def test_a_training_step_waits_for_nothing(build, d):
    """A step that looks at a value makes the GPU idle until it has been looked at."""
    teacher = build()
    sampling = Sampling(cfg_scale=2.0, top_k=4, top_p=0.9)
    kept = teacher.stored(teacher.sample(teacher.conditions.default(4, torch.device("cpu")), sampling, range(4)))
    samples = TeacherSamples(teacher, kept, torch.tensor([0, 1, 2, 0]))
    teacher.standardise(kept)
    networks = Networks.from_tuned(Student.from_teacher(teacher, TINY_HEAD))
    config = CSDConfig(
        batch=4, accumulate=1, k=2, d=d, snap_teacher=True, snap_guidance=True, generator_draws=2, sampling=sampling, validation=0
    )
    with virtual_gpu() as gpu:
        networks = networks.placed(lambda network: network.to("cuda"))
        stage = csd_stage(networks, teacher.to("cuda"), samples, config)
        trainer = Trainer(Path(), 0, LoopConfig(), torch.device("cuda"), "")
        gpu.waits.clear()
        before = gpu.operations["cuda"]
        for step in range(2):
            trainer._iteration(stage, step)
            stage.after(step)
        assert gpu.operations["cuda"] > before + 100
        assert gpu.waits == {}
        trainer._refuse_nan(stage)
        assert gpu.waits == {"tolist": 1}


def test_captions():
    teacher = tiny_text()
    student = Student.from_teacher(teacher, TINY_HEAD)
    with virtual_gpu():
        teacher.to("cuda")
        student.to("cuda")
        cond = teacher.conditions.default(2, teacher.device)
        assert one_step(student, cond, [0, 1]).device.type == cond.device.type == "cuda"
