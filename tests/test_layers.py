"""Recomputed and compiled layers give what plain ones give; samples drawn inside the loop; the validation distance."""

import copy

import pytest
import torch

from dd2.cli import main
from dd2.device import pick_device
from dd2.frechet import fit_gaussian, frechet_distance
from dd2.method.config import CSDConfig, TuneConfig
from dd2.method.networks import Networks
from dd2.method.recipe import csd_stage, tune_stages
from dd2.method.validation import FIRST_SEED, TeacherDistance
from dd2.sampling import one_step
from dd2.student import Student
from dd2.teachers.filtering import Sampling
from dd2.teachers.layers import layer_stacks
from dd2.tokenizers.base import nearest_ids
from dd2.training.layers import prepare_layers
from dd2.training.samples import LiveSamples, TeacherSamples
from models import TINY_HEAD, tiny_teacher, tiny_text, tiny_var

CSD = CSDConfig(k=1, batch=3, accumulate=1, guidance_draws=2, sampling=Sampling(), iterations=1)


def gradients(build, recompute: bool, compiled: bool, d) -> list[torch.Tensor]:
    """Of both networks of stage 2 after one loss each."""
    teacher = build()
    teacher.standardise()
    torch.manual_seed(1)
    student = Student.from_teacher(teacher, TINY_HEAD)
    torch.nn.init.normal_(student.head.output.weight, std=0.1)
    networks = Networks.from_tuned(student)
    samples = TeacherSamples(teacher, torch.zeros(6, teacher.order.n, dtype=torch.long), torch.arange(6) % 3)
    stage = csd_stage(networks, teacher, samples, CSDConfig(**{**CSD.__dict__, "d": d}))
    for network in (networks.generator, networks.guidance, networks.ema):
        network.train()  # dropout, where there is any
        prepare_layers(network.backbone, recompute, compiled, compiler="aot_eager")
    found = []
    for update in stage.updates:
        torch.manual_seed(3)
        loss, _ = update.loss(torch.Generator().manual_seed(0))
        loss.backward(inputs=update.parameters)
        found += [p.grad for p in update.parameters if p.grad is not None]
    return found


def dropping():
    return tiny_teacher(dropout=0.2)


@pytest.mark.parametrize("build", [tiny_teacher, dropping, tiny_var, tiny_text])
def test_recomputed_layers_give_the_same_gradients(build):
    plain, again = (gradients(build, recompute, False, "sid") for recompute in (False, True))
    assert len(plain) == len(again) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recomputing_runs_the_layers_again():
    teacher = tiny_teacher()
    student = Student.from_teacher(teacher, TINY_HEAD)
    calls = []
    (stack,) = layer_stacks(student)
    for layer in stack:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.randn(2, 16, 4)
    for recompute, expected in ((False, 2), (True, 4)):
        calls.clear()
        prepare_layers(student.backbone, recompute, compiled=False)
        student.features(tokens, torch.tensor([0, 1])).sum().backward()
        assert len(calls) == expected
    calls.clear()
    with torch.no_grad():
        student.features(tokens, torch.tensor([0, 1]))
    assert len(calls) == 2


@pytest.mark.parametrize(("build", "recompute"), [(tiny_teacher, False), (tiny_var, True)])
def test_compiled_layers_give_the_same_gradients(build, recompute):
    """Traced and differentiated ahead of time, without a code generator, which a CPU takes too long for."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = gradients(build, False, False, "dmd"), gradients(build, recompute, True, "dmd")
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # One graph for each kind of pass (with and without gradient, …), not for each layer; dynamo gives up after 8.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


def test_compilation_is_refused_where_it_is_of_no_use(capsys, tmp_path):
    for command, flags, said in (
        ("distill", ["--loop.compile"], "is for CUDA"),
        ("train-classifier", ["--loop.recompute"], "trains none"),
        ("distill", ["--stage1", "x", "--sample-in-loop"], "give one of them"),
        ("distill", ["--csd.validation", "1"], "at least 2"),
        ("distill", ["--teacher-samples", "1"], "at least 2 teacher_samples"),
        ("distill", ["--loop.save-async", "maybe"], "save-async"),
    ):
        assert main([command, "--device", "cpu", "--out", str(tmp_path / "run"), *flags]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_samples_of_the_loop_follow_the_teacher():
    teacher = tiny_teacher()
    live = LiveSamples(teacher, Sampling(top_k=4))
    tokens, labels = live.batch(5000, torch.Generator().manual_seed(0))
    again, _ = live.batch(5000, torch.Generator().manual_seed(0))
    other, _ = live.batch(5000, torch.Generator().manual_seed(1))
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)
    ids = teacher.ids(tokens)
    assert set(labels.tolist()) == {0, 1, 2}
    zeros = torch.zeros(1, 16, 4)
    for label in range(3):  # the first token's frequencies are its probabilities
        p = teacher.distribution(zeros, torch.tensor([label]), Sampling(top_k=4)).dense()[0, 0].exp()
        found = ids[labels == label, 0].bincount(minlength=12) / (labels == label).sum()
        torch.testing.assert_close(found, p, rtol=0, atol=0.05)


def test_stage_one_trains_on_samples_of_the_loop():
    teacher = tiny_teacher()
    student = Student.from_teacher(teacher, TINY_HEAD)
    config = TuneConfig(iterations=1, batch=4, accumulate=1, draws=1, sampling=Sampling())
    (stage,) = tune_stages(student, teacher, LiveSamples(teacher, Sampling()), config)
    losses = [float(stage.updates[0].loss(torch.Generator().manual_seed(seed))[0].detach()) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_validation_distance_is_the_frechet_distance_in_the_teachers_features():
    teacher = tiny_teacher()
    ids = teacher.generate(torch.arange(300) % 3, Sampling(), range(300))
    samples = TeacherSamples(teacher, ids, torch.arange(300) % 3)
    teacher.standardise(ids)
    generator = Student.from_teacher(teacher, TINY_HEAD).eval()
    found = TeacherDistance(teacher, samples, 256, batch=100)(generator)

    def features(some: torch.Tensor) -> torch.Tensor:
        return teacher.features(teacher.codebook[some], torch.arange(256) % 3).mean(1).detach()

    seeds = range(FIRST_SEED, FIRST_SEED + 256)
    drawn = nearest_ids(one_step(generator, torch.arange(256) % 3, seeds), teacher.codebook)
    expected = frechet_distance(fit_gaussian([features(drawn)]), fit_gaussian([features(ids[:256])]))
    assert found["validation"] == pytest.approx(expected, rel=1e-6)
    assert TeacherDistance(teacher, samples, 10_000, batch=64)(copy.deepcopy(generator))["validation"] > 0  # as many as there are


def test_every_process_has_its_own_gpu(monkeypatch):
    """Without a GPU: what is asked of CUDA, of a process whose local rank is 3."""
    current = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    for name in ("auto", "cuda", "cuda:1"):
        assert pick_device(name) == current[-1]
    assert current == [torch.device("cuda:3"), torch.device("cuda:3"), torch.device("cuda:1")]


@pytest.mark.parametrize("build", [tiny_teacher, tiny_var, tiny_text])
def test_positions_are_what_the_layers_read(build):
    teacher = build()
    lengths = []
    layer_stacks(teacher)[0][0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    teacher.features(torch.randn(3, teacher.order.n, 4), teacher.conditions(torch.arange(3)))
    assert lengths == [teacher.backbone.positions]
