"""The stage-1 model as an AR teacher: continuous tokens under a velocity head, from the interface to a one-step generator."""

import json
from pathlib import Path

import pytest
import torch

from dd2.checkpoints.native import load_ar_teacher
from dd2.cli import main
from dd2.errors import InputError
from dd2.sampling import ar_diffusion
from dd2.student import Student
from dd2.teachers.filtering import Sampling
from dd2.teachers.head import HeadTeacher
from models import TINY_HEAD, tiny_teacher, tiny_var

LABELS = torch.tensor([0, 1, 2, 1])


def random_student(build) -> Student:
    teacher = build()
    teacher.standardise()
    student = Student.from_teacher(teacher, TINY_HEAD)
    g = torch.Generator().manual_seed(0)
    for parameter in student.head.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=g)
    return student.eval()


@pytest.fixture(params=[tiny_teacher, tiny_var])
def pair(request) -> tuple[Student, HeadTeacher]:
    code_teacher, student = request.param(), random_student(request.param)
    return student, student.as_teacher(code_teacher.tokenizer, code_teacher.conditions).requires_grad_(False)


def test_its_score_is_the_heads(pair):
    student, teacher = pair
    tokens, x_t = torch.randn(4, teacher.order.n, 4), torch.randn(3, 4, teacher.order.n, 4)
    t = torch.rand(3, 4, teacher.order.n) * 0.9 + 0.05
    v = student.head(x_t, t, student.features(tokens, LABELS))
    given = teacher.given(tokens, LABELS, Sampling())
    torch.testing.assert_close(given.velocity(x_t, t), v)
    torch.testing.assert_close(given.x0_hat(x_t, t), x_t - t.unsqueeze(-1) * v)


def test_it_has_no_map_from_noise_to_data_to_regress(pair):
    with pytest.raises(InputError, match=r"a HeadTeacher lacks \(Teacher.follow_ode\)"):
        pair[1].check_ode(5)  # what dd2 distill asks before anything is drawn


def test_it_is_sampled_by_ar_diffusion_and_continues_any_prefix(pair):
    student, teacher = pair
    seeds = [5, 6, 7, 8]
    whole = teacher.sample(LABELS, Sampling(), seeds)
    assert torch.equal(whole, ar_diffusion(student, LABELS, seeds))
    for step in (0, 1, teacher.order.num_steps - 1):
        start = teacher.order.steps[step].start
        again = teacher.sample(LABELS, Sampling(), seeds, prefix=whole[:, :start], first_step=step)
        torch.testing.assert_close(again, whole, atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match="one seed per condition"):
        teacher.sample(LABELS, Sampling(), [1])
    with pytest.raises(ValueError, match="needs a prefix of"):
        teacher.sample(LABELS, Sampling(), seeds, prefix=whole[:, :2], first_step=1)


def test_its_tokens_are_any_and_are_kept_as_they_are(pair):
    _, teacher = pair
    tokens = teacher.sample(LABELS, Sampling(), range(4))
    assert teacher.snap(tokens) is tokens
    kept = teacher.stored(tokens)
    assert (kept.dtype, kept.shape) == (torch.float32, tokens.shape)
    torch.testing.assert_close(teacher.restored(kept), tokens)
    before = teacher.backbone.token_mean.clone()
    teacher.standardise(kept + 3)
    assert torch.equal(teacher.backbone.token_mean, before)
    fingerprint = teacher.fingerprint()
    teacher.backbone.normalise_by(before + 1, teacher.backbone.token_std)  # the head would read other tokens
    assert teacher.fingerprint() != fingerprint


def test_settings_without_effect_are_said(pair):
    _, teacher = pair
    for sampling in (Sampling(), Sampling(cfg_scale=1.0)):
        assert teacher.check(sampling) == ""
    for sampling in (Sampling(cfg_scale=2.0), Sampling(top_k=3), Sampling(top_p=0.9), Sampling(temperature=0.5)):
        assert "have no effect" in teacher.check(sampling)


def first_run(folder: Path, iterations: int, samples: int) -> Path:
    """A run on digits whose stage 1 becomes a teacher."""
    flags = ["--tune.iterations", str(iterations), "--csd.iterations", "2", "--teacher-samples", str(samples)]
    assert (
        main(["distill", "digits_paper", "--out", str(folder), *flags, "--csd.validation", "0", "--loop.preview-every", "0"]) == 0
    )
    return folder


def distilled(first: Path, out: Path, iterations: int, samples: int, count: int) -> dict:
    """Sampled by AR-diffusion, stage 1 skipped, stage 2, and evaluated against that teacher."""
    command = ["distill", "digits_paper", "--teacher", str(first / "ar_diffusion"), "--out", str(out), "--csd.validation", "256"]
    command += ["--csd.iterations", str(iterations), "--teacher-samples", str(samples), "--loop.preview-every", "0"]
    assert main(command) == 0
    assert main(["evaluate", str(out), "--count", str(count), "--steps", "1", "3", "--metrics.halves", "2", "--no-speed"]) == 0
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.long
def test_a_stage_one_model_is_distilled_to_one_step(tmp_path):
    """At a fixed seed, with a fifth more iterations than the demo: most of the way from independent tokens to that teacher."""
    numbers = distilled(first_run(tmp_path / "first", 400, 20_480), tmp_path / "run", 600, 20_480, 5000)
    assert numbers["gap_closed"] >= 0.8
    assert numbers["frechet"]["generator_3_steps"] < numbers["frechet"]["generator"]


@pytest.mark.e2e
def test_every_command_takes_such_a_teacher(tmp_path, capsys):
    first, out = first_run(tmp_path / "first", 4, 256), tmp_path / "run"
    capsys.readouterr()
    numbers = distilled(first, out, 3, 256, 100)
    printed = capsys.readouterr()
    assert "stage 1 is skipped" in printed.err
    assert "not measured: teacher NLL: a HeadTeacher has continuous tokens" in printed.out
    assert not (out / "ar_diffusion").exists()
    assert {json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()} == {"csd"}
    assert {"teacher", "generator", "generator_3_steps", "onestep_marginal"} == numbers["metrics"].keys()
    assert not any("teacher_nll" in found for found in numbers["metrics"].values())
    assert "Not measured" in (out / "report.html").read_text()
    for more in (["--steps", "4"], ["--method", "teacher"], ["--decoding", "nearest"]):
        assert main(["sample", str(out), "--count", "8", "--out", str(tmp_path / f"{more[-1]}.png"), *more]) == 0
    capsys.readouterr()
    assert main(["sample", str(out), "--count", "4", "--steps", "2", "--top-k", "5", "--out", str(tmp_path / "k.png")]) == 0
    assert "note: guidance, temperature, top-k and top-p have no effect" in capsys.readouterr().err
    assert main(["report", str(out), "--out", str(tmp_path / "page.html"), "--data", "digits"]) == 0
    assert main(["distill", str(out / "config.yaml")]) == 0  # finished: it finds everything done
    assert main(["export", str(out), str(tmp_path / "shipped")]) == 0
    capsys.readouterr()
    ar, x = ["--teacher", str(first / "ar_diffusion"), "--out"], str(tmp_path / "x")
    for wrong, message in (
        (["sample", str(out), "--method", "ar_diffusion"], "there is no stage-1 model"),
        (["evaluate", str(out), "--skip", "2"], "skip-2 needs a teacher over codes"),
        (["distill", "--teacher", str(out / "generator"), "--out", x], "one-step generator, which is no AR model"),
        (["dd1", *ar, x], "dd2 dd1 needs a teacher over codes"),
        (["adapt", *ar, x], "dd2 adapt needs a teacher over codes"),
        (["distill", *ar, x, "--regress.iterations", "2"], "regress.* needs a map from noise to data, which a HeadTeacher lacks"),
        (["distill", *ar, x, "--stage1", str(first)], "an AR-diffusion model itself; leave it out"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
    assert not Path(x).exists()
    assert isinstance(load_ar_teacher(first / "ar_diffusion"), HeadTeacher)
    with pytest.raises(InputError, match="can be no teacher"):
        load_ar_teacher(first / "generator")
