"""dd2 plan against real passes, and dd2 export of any checkpoint."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import plan_memory
from dd2.checkpoints.native import load_generator, save_teacher
from dd2.checkpoints.released import RELEASED, sketch
from dd2.cli import main
from dd2.commands.needs import needs
from dd2.commands.plan_config import PlanConfig
from dd2.config import load_config
from dd2.masked_student import MaskedStudent, MaskedStudentConfig
from dd2.method.config import CSDConfig, MatchConfig, RegressConfig
from dd2.method.networks import Networks
from dd2.method.recipe import catching_up_stage, csd_stage, regress_stage
from dd2.student import Student
from dd2.teachers.filtering import Sampling
from dd2.training.footprint import footprint
from dd2.training.samples import TeacherSamples
from dd2.trajectory import OdeConfig, Pairs
from models import TINY_HEAD, tiny_mar, tiny_teacher, tiny_var
from plan_memory import CASES


def test_parameters_of_released_models():
    counts = {"var_d16": 310.3, "var_d36_512": 2353.9, "llamagen_b": 110.9, "llamagen_l": 342.9}
    counts |= {"mar_b": 207.924768, "mar_l": 478.326304, "mar_h": 942.403104}
    for name, millions in counts.items():
        teacher = sketch(name)
        found = sum(p.numel() for part in teacher.stored_parts.values() for p in part.parameters()) / 1e6
        if name.startswith("llamagen"):  # the embedding table is a small continuous layer here
            table = teacher.backbone.width * 16384 / 1e6
            layer = sum(p.numel() for key, p in teacher.backbone.named_parameters() if "tok_embeddings" in key) / 1e6
            found += table - layer
        assert found == pytest.approx(millions, rel=1e-3), name
    assert set(RELEASED) >= {"var_d20", "var_d24", "var_d30", "llamagen_t2i_xl"}


@pytest.mark.parametrize("matched", [0.0, 1.0])
@pytest.mark.parametrize("build", [tiny_teacher, tiny_var])
def test_operations_are_those_of_a_real_iteration(build, matched):
    """Counted on real tensors, forward and backward, K guidance updates and one generator update."""
    teacher = build()
    match = MatchConfig(weight=matched, projections=4, features=("projected", "tokens"), prime=16)
    csd = CSDConfig(
        k=2, batch=4, accumulate=1, guidance_draws=3, generator_draws=2, sampling=Sampling(), iterations=1, match=match
    )
    config = replace(PlanConfig(), head=TINY_HEAD, csd=csd)
    planned = needs(config, copy.deepcopy(teacher).to("meta"))
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(12, (64, teacher.order.n), generator=random)
    teacher.standardise(ids)
    student = Student.from_teacher(teacher, TINY_HEAD)
    samples = TeacherSamples(teacher, ids, torch.arange(64) % 3)
    stage = csd_stage(Networks.from_tuned(student), teacher.requires_grad_(False), samples, csd)
    stage.updates[1].loss(random)  # the distance begins by looking at its reference
    counter = FlopCounterMode(display=False)
    with counter:
        for update in stage.updates:
            for _ in range(update.repeats):
                update.loss(torch.Generator().manual_seed(0))[0].backward(inputs=update.parameters)
    assert planned.flops == pytest.approx(counter.get_total_flops(), rel=0.15)
    without = needs(replace(config, csd=replace(csd, match=MatchConfig())), copy.deepcopy(teacher).to("meta"))
    assert (
        (planned.flops > 1.05 * without.flops) == (planned.memory["activations"] > without.memory["activations"]) == bool(matched)
    )
    assert planned.parameters["head"] == sum(p.numel() for p in student.head.parameters())


@pytest.mark.parametrize("own_share", [0.0, 0.5])
def test_operations_of_the_start_from_the_teachers_ode(tmp_path, own_share):
    """A regression of other batches than stage 2's, and the guidance network that catches up."""
    teacher = tiny_teacher()
    ode = OdeConfig(solver="euler", steps=1)  # Eq. 1's own operations are in no plan
    regress = RegressConfig(iterations=3, guidance_iterations=2, pairs=32, own_share=own_share, batch=8, accumulate=2, ode=ode)
    csd = CSDConfig(k=3, batch=4, accumulate=1, guidance_draws=2, sampling=Sampling(), iterations=1, d="dmd")
    planned = needs(replace(PlanConfig(), head=TINY_HEAD, csd=csd, regress=regress), copy.deepcopy(teacher).to("meta"))
    teacher.standardise()
    samples = TeacherSamples(teacher, torch.randint(12, (64, 16)), torch.arange(64) % 3)
    pairs = Pairs(tmp_path, teacher, Sampling(), regress.ode, 32, 0)
    networks = Networks.from_tuned(Student.from_teacher(teacher, TINY_HEAD))
    stages = (
        (3, regress_stage(networks, teacher.requires_grad_(False), samples, pairs, regress, Sampling())),
        (2, catching_up_stage(networks, teacher, samples, csd, regress)),
    )
    counted = 0.0
    for iterations, stage in stages:
        counter = FlopCounterMode(display=False)
        with counter:
            for update in stage.updates:
                update.loss(torch.Generator().manual_seed(0))[0].backward(inputs=update.parameters)
        counted += iterations * sum(update.accumulate * update.repeats for update in stage.updates) * counter.get_total_flops()
    assert planned.start == pytest.approx(counted, rel=0.15)
    assert needs(replace(PlanConfig(), head=TINY_HEAD, csd=csd), copy.deepcopy(teacher).to("meta")).start == 0


def test_operations_of_a_masked_teacher():
    """The plan takes every token as known; so does this iteration, where the last AR step alone is imitated."""
    teacher = tiny_mar()
    csd = CSDConfig(
        **{"k": 2, "batch": 4, "accumulate": 1, "guidance_draws": 3, "generator_draws": 2, "iterations": 1, "d": "dmd"},
        sampling=Sampling(cfg_scale=2.0, ar_steps=16, diffusion_steps=3),
    )
    planned = needs(replace(PlanConfig(), csd=csd), copy.deepcopy(teacher).to("meta"))
    kept = torch.randn(64, 16, 4)
    samples = TeacherSamples(teacher, kept, torch.arange(64) % 3)
    networks = Networks.from_tuned(MaskedStudent.from_teacher(teacher, MaskedStudentConfig()))
    last = torch.ones(4, 16, dtype=torch.bool)
    last[:, 0] = False
    teacher.known_sets = lambda batch, sampling, random: last  # pyright: ignore[reportAttributeAccessIssue]
    counter = FlopCounterMode(display=False)
    with counter:
        for update in csd_stage(networks, teacher, samples, csd).updates:
            for _ in range(update.repeats):
                update.loss(torch.Generator().manual_seed(0))[0].backward(inputs=update.parameters)
    assert planned.flops == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert "head" not in planned.parameters  # it is the backbone's


def test_what_is_kept_for_backward():
    """On known layers: the inputs of two linear maps and what the activation keeps."""
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).to("meta")
    x = torch.empty(5, 8, device="meta")
    found = footprint(lambda: network(x), network)
    assert found.saved == 4 * 5 * (8 + 16)  # x, and the ReLU's output, which the second map reads as well
    assert found.flops == 2 * 5 * (8 * 16 + 16 * 4)


def test_plans_say_what_to_change(capsys):
    assert main(["plan", "llamagen_b", "--model", "llamagen_b", "--gpus", "8", "--memory", "20GB"]) == 0
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "--csd.batch" in said
    assert "fsdp2" in said
    config = load_config(PlanConfig, "llamagen_b", ["--model", "llamagen_b", "--gpus", "8"])
    whole = needs(config, sketch("llamagen_b"))
    sharded = needs(replace(config, loop=replace(config.loop, parallel="fsdp2")), sketch("llamagen_b"))
    assert sharded.memory["Adam"] == whole.memory["Adam"] / 8
    assert sharded.memory["teacher and tokenizer"] < 0.6 * whole.memory["teacher and tokenizer"]  # its backbone is sharded too
    assert whole.memory["logits"] == 3 * 4 * config.csd.batch * 256 * 16384
    width, found = 768, config.csd.match.projections
    assert whole.memory["matching"] > 4 * 256 * width * found + 8 * (width + found) ** 2  # the largest projection, a covariance
    paper = needs(load_config(PlanConfig, "llamagen_l_paper", ["--model", "llamagen_b", "--gpus", "8"]), sketch("llamagen_b"))
    assert not {"logits", "matching"} & paper.memory.keys()
    frugal = needs(replace(config, loop=replace(config.loop, recompute=True)), sketch("llamagen_b"))
    assert frugal.memory["activations"] < 0.5 * whole.memory["activations"]
    assert whole.flops < frugal.flops < 4 / 3 * whole.flops
    for arguments, said in (
        (["--model", "var_d17"], "no released model"),
        (["--teacher", "nowhere"], "give --model"),
        (["--memory", "much"], "gigabytes"),
    ):
        assert main(["plan", *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.long
def test_memory_is_that_of_a_real_process():
    """What the tensors of a training hold at most, and a little more; benchmarks/plan_memory.py asks more cases."""
    case = CASES["tiny batch"]
    measured = subprocess.run(
        [sys.executable, plan_memory.__file__, "--case", "tiny batch"], capture_output=True, text=True, check=True
    ).stdout
    teacher = plan_memory.build(case["family"]).to("meta")
    assert 1 <= needs(plan_memory.config_of(case), teacher).total / float(measured.split()[-1]) < 1.2


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    save_teacher(folder / "teacher", tiny_teacher())
    flags = [
        *("--teacher", folder / "teacher", "--out", folder / "run", "--teacher-samples", 64, "--tune.iterations", 2),
        *("--tune.batch", 4, "--tune.accumulate", 1, "--tune.sampling.cfg-scale", "None", "--csd.iterations", 6),
        *("--csd.batch", 4, "--csd.accumulate", 1, "--csd.sampling.cfg-scale", "None", "--csd.k", 1),
        *("--csd.further-emas", 0.05, 0.3, "--csd.generator.warmup", 0, "--loop.save-every", 2, "--loop.keep", 3),
        *("--head.depth", 1, "--head.width", 16, "--head.frequencies", 4, "--loop.preview-every", 0),
    ]
    assert main(["distill", *map(str, flags)]) == 0
    return folder / "run"


def test_export_of_any_checkpoint_and_average(run, tmp_path, capsys):
    def exported(name: str, *flags: str) -> dict[str, torch.Tensor]:
        assert main(["export", str(run), str(tmp_path / name), *flags]) == 0
        return load_generator(tmp_path / name).student.state_dict()

    shipped = load_generator(run / "generator").student.state_dict()
    newest = exported("newest")
    assert all(torch.equal(newest[name], shipped[name]) for name in shipped)
    key = "head.output.bias"
    raw, short, long = (exported(a, "--average", a)[key] for a in ("none", "0.05", "0.3"))
    assert (raw - short).norm() < (raw - long).norm()  # the shorter average is nearer to the weights of now
    earlier = exported("earlier", "--step", "2")
    state = run / "checkpoints" / "csd" / "00000004" / "state.json"
    assert json.loads(state.read_text())["validation"] > 0
    state.write_text(json.dumps(json.loads(state.read_text()) | {"validation": 0.0}))
    best, fourth = exported("best", "--step", "best"), exported("fourth", "--step", "4")
    assert torch.equal(best[key], fourth[key])
    assert not torch.equal(earlier[key], newest[key])
    half = exported("half", "--dtype", "float16")
    torch.testing.assert_close(half[key], newest[key], rtol=1e-2, atol=1e-3)
    size = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "newest")]
    assert size[0] < 0.6 * size[1]
    assert main(["sample", str(tmp_path / "half"), "--count", "4", "--out", str(tmp_path / "x.png")]) == 0
    capsys.readouterr()
    for flags, said in (
        (["--step", "3"], "keeps no checkpoint 3"),
        (["--step", "last"], "newest, best or a number"),
        (["--average", "0.2"], "generator_ema_0.05"),
        (["--average", "best"], "must be ema, none or a number"),
    ):
        assert main(["export", str(run), str(tmp_path / "bad"), *flags]) == 2
        assert said in capsys.readouterr().err
    card = (tmp_path / "best" / "README.md").read_text()
    assert "generator_ema of checkpoints/csd/" in card  # it says which weights they are
    assert main(["export", str(run), str(tmp_path / "half")]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "bad")]) == 2
    assert not (tmp_path / "bad").exists()


def test_averages_must_differ(capsys, tmp_path):
    assert main(["distill", "digits_paper", "--out", str(tmp_path / "r"), "--csd.further-emas", "0.999"]) == 2
    assert "different numbers" in capsys.readouterr().err
