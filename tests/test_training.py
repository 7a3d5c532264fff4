"""The loop: exact resume, interruption, killed saves, NaN, schedules of saving; all with real processes where it matters."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from dd2.checkpoints.native import save_teacher
from dd2.commands.distill_config import DistillConfig
from dd2.commands.run_folder import start_run
from dd2.config import load_config
from dd2.errors import InputError, Interrupted, NumericalError
from dd2.files import atomic_folder, save_tensors, write_atomic
from dd2.teachers.filtering import Sampling
from dd2.training import checkpoint
from dd2.training.ema import ema_copy, ema_lag, ema_update
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.metrics import MetricsLog
from dd2.training.samples import TeacherSamples
from dd2.training.schedule import OptimConfig
from dd2.training.stage import Stage, Update
from dd2.training.timing import part
from models import HANG, tiny_teacher

CPU = torch.device("cpu")


def regression(
    iterations: int = 30,
    *,
    accumulate: int = 1,
    spoil: int | None = None,
    spoilt: Callable[[torch.Tensor], torch.Tensor] = lambda value: value * float("nan"),
) -> Stage:
    """A network with dropout that learns to negate; the loss of update `spoil` is `spoilt`."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.2), nn.Linear(16, 3))
    average = ema_copy(network)
    calls = {"n": 0}

    def loss(random: torch.Generator):
        x = torch.randn(8, 3, generator=random)
        calls["n"] += 1
        value = (network(x) + x).square().mean()
        return (spoilt(value) if calls["n"] == spoil else value), {"size": x.abs().mean()}

    update = Update("net", list(network.parameters()), OptimConfig(lr=1e-2, decay="cosine"), loss, 2, accumulate)
    modules = {"network": network, "average": average}
    return Stage("fit", iterations, [update], modules, after=lambda step: ema_update(average, network, 0.9))


def trainer(run: Path, **loop) -> Trainer:
    run.mkdir(exist_ok=True)
    return Trainer(run, 7, LoopConfig(**{"log_every": 1, "save_every": 4, **loop}), CPU, "dd2 resume")


def rows(run: Path) -> list[dict]:
    return MetricsLog(run / "metrics.jsonl").reproducible_rows()


def test_resume_is_bit_exact_at_every_step(tmp_path):
    whole = regression()
    trainer(tmp_path / "whole").run(whole)
    for stop in (1, 4, 13, 29):
        run = tmp_path / str(stop)
        interrupted, t = regression(), trainer(run)
        after = interrupted.after

        def stop_there(step, t=t, stop=stop, after=after):
            after(step)
            t._stop = step + 1 == stop

        interrupted.after = stop_there
        with pytest.raises(Interrupted, match=f"saved at step {stop} of 30.*dd2 resume"):
            t.run(interrupted)
        resumed = regression()
        for parameter in resumed.modules["network"].parameters():  # whatever the fresh weights are
            nn.init.zeros_(parameter)
        trainer(run).run(resumed)
        assert rows(run) == rows(tmp_path / "whole")
        for name, module in whole.modules.items():
            for key, value in module.state_dict().items():
                assert torch.equal(value, resumed.modules[name].state_dict()[key]), (stop, name, key)


def test_a_finished_stage_is_loaded_not_repeated(tmp_path):
    first = regression()
    trainer(tmp_path).run(first)
    log = (tmp_path / "metrics.jsonl").read_text()
    again = regression(spoil=1)
    trainer(tmp_path).run(again)
    assert (tmp_path / "metrics.jsonl").read_text() == log
    assert torch.equal(again.modules["network"].state_dict()["0.weight"], first.modules["network"].state_dict()["0.weight"])
    with pytest.raises(InputError, match="beyond the 10 iterations"):
        trainer(tmp_path).run(regression(10))


def test_accumulation_averages(tmp_path):
    stage = regression(1, accumulate=3)
    trainer(tmp_path).run(stage)
    (row,) = rows(tmp_path)
    assert 0.5 < row["net/size"] < 1.2


def test_nan_stops_before_anything_is_saved(tmp_path):
    with pytest.raises(NumericalError, match=r"fit iteration 6: the loss of the net .* last checkpoint is step 4"):
        trainer(tmp_path).run(regression(spoil=11))
    assert checkpoint.steps(tmp_path / "checkpoints" / "fit") == [4]
    for file in (tmp_path / "checkpoints" / "fit" / "00000004").glob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(file).values())


@pytest.mark.parametrize("sees", ["save", "preview", "end", "log"])
def test_a_nan_between_the_looks_is_found_at_the_next(tmp_path, sees):
    """One update of iteration 6 has no finite loss, and all later ones have: seen when something is about to depend on it."""
    stage = regression(spoil=11, spoilt=lambda value: value + float("nan"), iterations=12)
    never = {"log_every": 1000, "save_every": 1000, "preview_every": 0}
    stage.preview = lambda: torch.zeros(1, 1, 8, 8)
    looks = {"save": {"save_every": 4}, "preview": {"preview_every": 4}, "end": {}, "log": {"log_every": 4}}
    with pytest.raises(NumericalError, match="fit iteration 6: the loss of the net"):
        trainer(tmp_path, **{**never, **looks[sees]}).run(stage)
    assert checkpoint.steps(tmp_path / "checkpoints" / "fit") == ([4] if sees == "save" else [])
    assert [path.name for path in (tmp_path / "samples").glob("*")] == (["fit-00000004.png"] if sees == "preview" else [])
    assert [row["step"] for row in MetricsLog(tmp_path / "metrics.jsonl").rows()] == ([1, 4] if sees == "log" else [1])


def test_a_nan_before_a_signal_is_not_saved(tmp_path):
    stage = regression(spoil=3, spoilt=lambda value: value + float("nan"))
    run = trainer(tmp_path, log_every=1000, save_every=1000, preview_every=0)

    def after(step: int) -> None:
        run._stop = step == 2

    stage.after = after
    with pytest.raises(NumericalError, match="fit iteration 2"):
        run.run(stage)
    assert checkpoint.steps(tmp_path / "checkpoints" / "fit") == []


def test_only_the_newest_checkpoints_stay(tmp_path):
    trainer(tmp_path, keep=3).run(regression())
    assert checkpoint.steps(tmp_path / "checkpoints" / "fit") == [24, 28, 30]


def test_damaged_checkpoint_is_named(tmp_path):
    trainer(tmp_path, keep=1).run(regression(8))
    file = tmp_path / "checkpoints" / "fit" / "00000008" / "network.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match=r"00000008 cannot be loaded.*delete it"):
        trainer(tmp_path).run(regression(8))


def test_log_forgets_rows_beyond_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in range(5):
        log.append({"stage": "a", "step": step})
    log.append({"stage": "b", "step": 9})
    with open(log.path, "a") as file:
        file.write('{"stage": "a", "st')  # torn by a kill
    log.rewind("a", 2)
    assert [row["step"] for row in log.rows()] == [0, 1, 2, 9]


def test_atomic_writes_leave_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    write_atomic(file, "old")
    with pytest.raises(TypeError):
        write_atomic(file, 3)  # pyright: ignore[reportArgumentType]
    assert file.read_text() == "old"

    def fill_half() -> None:
        with atomic_folder(tmp_path / "folder") as partial:
            (partial / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill_half()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json"]
    theirs = {tmp_path / f"folder.{ending}" / "thesis.txt" for ending in ("old", "partial")}
    for file in theirs:
        file.parent.mkdir()
        file.write_text("mine")
    for _ in range(2):
        with atomic_folder(tmp_path / "folder") as partial:
            (partial / "whole").write_text("x")
    assert {file.read_text() for file in theirs} == {"mine"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "folder.old", "folder.partial", "x.json"]


def test_the_best_checkpoint_has_a_number(tmp_path):
    for step, value in ((10, float("nan")), (20, 0.5), (30, 0.7), (40, float("-inf"))):
        (tmp_path / f"{step:08d}").mkdir()
        state = {"stage": "a", "step": step, "seconds": 0.0, "validation": value}
        (tmp_path / f"{step:08d}" / "state.json").write_text(json.dumps(state))
    assert checkpoint.best_step(tmp_path) == 20


def test_teacher_samples_are_reproducible_and_resumable(tmp_path, monkeypatch):
    from dd2.training import samples

    monkeypatch.setattr(samples, "SHARD", 16)
    teacher = tiny_teacher()
    whole = TeacherSamples.prepare(tmp_path / "a", teacher, Sampling(), 40, seed=1, batch=16)
    assert whole.kept.dtype == torch.uint16
    assert whole.kept.shape == (40, 16)
    assert torch.bincount(whole.labels).tolist() == [14, 13, 13]
    other = TeacherSamples.prepare(tmp_path / "b", teacher, Sampling(), 40, seed=1, batch=5)
    assert torch.equal(other.kept, whole.kept)
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:30])  # torn
    shards[2].unlink()  # never written
    kept = shards[0].stat().st_mtime_ns
    with pytest.raises(InputError, match="is damaged"):
        TeacherSamples.load(tmp_path / "b", teacher)
    again = TeacherSamples.prepare(tmp_path / "b", teacher, Sampling(), 40, seed=1)
    assert torch.equal(again.kept, whole.kept)
    assert shards[0].stat().st_mtime_ns == kept
    assert torch.equal(TeacherSamples.load(tmp_path / "b", teacher).kept, whole.kept)
    content = bytearray(shards[1].read_bytes())
    content[-3] ^= 1  # one bit of one id
    shards[1].write_bytes(content)
    assert torch.equal(TeacherSamples.prepare(tmp_path / "b", teacher, Sampling(), 40, seed=1).kept, whole.kept)
    for change in ({"seed": 2}, {"sampling": Sampling(top_k=3)}, {"teacher": tiny_teacher(seed=1)}):
        arguments = {"teacher": teacher, "sampling": Sampling(), "seed": 1, **change}
        with pytest.raises(InputError, match=f"another {next(iter(change))}"):
            TeacherSamples.prepare(tmp_path / "b", count=40, **arguments)
    with pytest.raises(InputError, match="no teacher samples"):
        TeacherSamples.load(tmp_path / "none", teacher)


SMALL_RUN = [
    "--teacher-samples", "64", "--head.depth", "1", "--head.width", "16", "--head.frequencies", "4",
    "--tune.iterations", "6", "--tune.batch", "8", "--tune.accumulate", "1", "--tune.sampling.cfg-scale", "1",
    "--csd.iterations", "8", "--csd.k", "2", "--csd.batch", "8", "--csd.accumulate", "2",
    "--csd.sampling.cfg-scale", "1", "--align.iterations", "3", "--align.then-iterations", "4",
    "--loop.save-every", "2", "--loop.log-every", "1", "--loop.preview-every", "0",
]  # fmt: skip


def dd2(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "dd2", *arguments], stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> list[str]:
    """Flags of a distillation of seconds, on a tiny teacher."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    save_teacher(folder, tiny_teacher())
    return ["--teacher", str(folder), *SMALL_RUN]


OVER_CODES = [
    "--networks.generator", "codes", "--networks.guidance", "codes", "--networks.extra-layers", "1", "--networks.rounds", "2",
    "--regress.iterations", "4", "--regress.own-share", "0.5", "--regress.pairs", "32", "--regress.batch", "8",
    "--regress.accumulate", "2", "--regress.ode.steps", "2", "--csd.regression-weight", "0.2", "--csd.match.weight", "0.5",
    "--csd.match.features", "tokens", "--csd.match.projections", "8", "--csd.match.prime", "16",
    "--csd.match.then-iterations", "2",
]  # fmt: skip
"""Everything beyond the paper."""


@pytest.mark.e2e
@pytest.mark.parametrize("beyond", [False, True], ids=["paper", "beyond"])
def test_killed_distillation_resumes_bit_exact(tmp_path, small_run, beyond):
    """Kill -9 at many moments, saves included; the run that is left is that of an undisturbed process."""
    small_run = [*small_run, *OVER_CODES] if beyond else small_run
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert dd2("distill", "--out", str(whole), *small_run).wait() == 0
    kills, code = 0, None
    for attempt in range(40):
        process = dd2("distill", "--out", str(killed), *small_run)
        before = progress(killed)
        while process.poll() is None and progress(killed) < before + 11 + attempt % 3:
            time.sleep(0.003)
        time.sleep(0.002 * (attempt % 7))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        code = process.returncode
        if code == 0:
            break
    assert code == 0
    assert kills >= 3
    assert rows(killed) == rows(whole)
    for network in ("generator",) if beyond else ("generator", "ar_diffusion"):
        a, b = (load_file(run / network / "model.safetensors") for run in (whole, killed))
        assert all(torch.equal(a[key], b[key]) for key in a)


def progress(run: Path) -> int:
    """Checkpoints ever begun in a run, an increasing number."""
    return sum(int(p.name.strip(".").split(".")[0]) + 1 for p in run.glob("checkpoints/*/*")) if run.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.e2e
def test_signal_saves_and_says_how_to_resume(tmp_path, small_run, number):
    run = tmp_path / "run"
    process = dd2("distill", "--out", str(run), *small_run, "--tune.iterations", "100000", "--loop.save-every", "100000")
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"resume with: dd2 distill {run}/config.yaml" in errors
    (saved,) = checkpoint.steps(run / "checkpoints" / "tune")
    assert f"saved at step {saved} of 100000" in errors
    assert json.loads((run / "checkpoints" / "tune" / f"{saved:08d}" / "state.json").read_text())["step"] == saved
    assert os.listdir(run / "checkpoints" / "tune") == [f"{saved:08d}"]


def test_bfloat16_follows_float32(tmp_path):
    """Autocast changes the networks' arithmetic, not the losses' meaning."""
    from dd2.method.config import CSDConfig, TuneConfig
    from dd2.method.networks import Networks
    from dd2.method.recipe import csd_stage, tune_stages
    from dd2.student import Student
    from models import TINY_HEAD

    logged = {}
    for precision in ("float32", "bfloat16"):
        teacher = tiny_teacher()
        samples = TeacherSamples.prepare(tmp_path / precision / "samples", teacher, Sampling(), 64, 0)
        teacher.standardise(samples.kept)
        torch.manual_seed(0)
        student = Student.from_teacher(teacher, TINY_HEAD)
        t = trainer(tmp_path / precision, preview_every=0, precision=precision)
        tune = TuneConfig(iterations=5, batch=8, accumulate=1, sampling=Sampling(), optim=OptimConfig(lr=1e-3))
        csd = CSDConfig(iterations=5, k=1, batch=8, accumulate=1, sampling=Sampling(), snap_teacher=True)
        t.run(tune_stages(student, teacher, samples, tune)[0])
        t.run(csd_stage(Networks.from_tuned(student), teacher, samples, csd))
        logged[precision] = rows(tmp_path / precision)
    for a, b in zip(logged["float32"], logged["bfloat16"], strict=True):
        for name in a:
            if name.endswith("loss"):
                assert b[name] == pytest.approx(a[name], rel=0.1, abs=0.02)
                assert b[name] != a[name]


def test_tensorboard_is_written_when_asked_for(tmp_path, monkeypatch):
    trainer(tmp_path / "with", tensorboard=True).run(regression(3))
    assert list((tmp_path / "with" / "tensorboard").glob("events.*"))
    trainer(tmp_path / "without").run(regression(3))
    assert not (tmp_path / "without" / "tensorboard").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(InputError, match=r"dd2\[logs\]"):
        trainer(tmp_path / "missing", tensorboard=True)


def validated(values: dict[int, float]) -> Stage:
    """`regression`, with a validation value for each checkpoint."""
    stage = regression(24)
    seen = iter(values.values())
    stage.validate = lambda: {"validation": next(seen)}
    return stage


@pytest.mark.parametrize("save_async", ["never", "always"])
def test_the_best_checkpoint_stays(tmp_path, save_async):
    values = {4: 3.0, 8: 1.0, 12: 1.0, 16: 2.0, 20: 5.0, 24: 4.0}
    trainer(tmp_path, keep=2, save_async=save_async).run(validated(values))
    folder = tmp_path / "checkpoints" / "fit"
    assert checkpoint.steps(folder) == [8, 20, 24]
    assert checkpoint.best_step(folder) == 8
    logged = {row["step"]: row["validation"] for row in rows(tmp_path) if "validation" in row}
    assert logged == values


def test_saving_in_the_background_saves_what_was_there(tmp_path, monkeypatch):
    """The thread is held back until training has gone on; it must write the weights of the step that it was begun at."""
    trainer(tmp_path / "never", keep=9).run(regression())
    changed, threads = threading.Event(), []

    def held_back(tensors: dict[str, torch.Tensor], file: Path) -> None:
        threads.append(threading.current_thread().name)
        assert changed.wait(30)
        save_tensors(tensors, file)

    monkeypatch.setattr(checkpoint, "save_tensors", held_back)
    stage = regression()
    after = stage.after

    def gone_on(step: int) -> None:
        after(step)
        if (step + 1) % 4:
            changed.set()
            return
        for thread in threading.enumerate():  # the checkpoint before this one: on a busy machine it may still be on its way
            if thread.name == "checkpoint":
                thread.join()
        changed.clear()

    stage.after = gone_on
    monkeypatch.setattr(checkpoint.CheckpointWriter, "__exit__", lambda writer, *_: changed.set() or writer.wait())
    trainer(tmp_path / "always", keep=9, save_async="always").run(stage)
    assert set(threads) == {"checkpoint"}
    folders = [tmp_path / name / "checkpoints" / "fit" for name in ("never", "always")]
    assert checkpoint.steps(folders[0]) == checkpoint.steps(folders[1])
    for file in folders[0].rglob("*.safetensors"):
        assert (folders[1] / file.relative_to(folders[0])).read_bytes() == file.read_bytes()


def test_stopping_validates_nothing_and_resumes_exactly(tmp_path):
    """There may be seconds left before the job is killed, and an undisturbed run has no row there."""

    def judged() -> Stage:
        stage = regression(12)
        weight = stage.modules["average"].state_dict()["0.weight"]
        stage.validate = lambda: {"validation": float(weight.sum())}
        return stage

    trainer(tmp_path / "whole", log_every=100).run(judged())
    stage, t = judged(), trainer(tmp_path / "run", log_every=100)
    after = stage.after

    def stop(step: int) -> None:
        after(step)
        t._stop = step == 5

    stage.after = stop
    with pytest.raises(Interrupted):
        t.run(stage)
    trainer(tmp_path / "run", log_every=100).run(judged())
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 4, 8, 12]


def test_an_older_run_lacks_younger_fields(tmp_path):
    """It had their defaults, so its own file resumes it with them, and other values are refused."""
    start_run(tmp_path / "run", load_config(DistillConfig, "digits", ["--out", str(tmp_path / "run")]), "distill")
    file = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    del values["regress"], values["csd"]["validation"]
    file.write_text(yaml.safe_dump(values))
    config = load_config(DistillConfig, str(file))
    start_run(tmp_path / "run", config, "distill")
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=r"regress.iterations was 0, now 5"):
        start_run(tmp_path / "run", replace(config, regress=replace(config.regress, iterations=5)), "distill")


def test_a_run_is_resumed_only_if_wanted(tmp_path):
    """--resume never for a first start; the run's own file resumes it all the same."""
    first = load_config(DistillConfig, "digits", ["--out", str(tmp_path / "run"), "--resume", "never"])
    assert first.loop.resume == "never"
    start_run(tmp_path / "run", first, "distill")
    with pytest.raises(InputError, match="holds a run; go on with it by --resume auto, or choose another --out"):
        start_run(tmp_path / "run", first, "distill")
    start_run(tmp_path / "run", load_config(DistillConfig, str(tmp_path / "run" / "config.yaml")), "distill")
    start_run(
        tmp_path / "run", load_config(DistillConfig, "digits", ["--out", str(tmp_path / "run"), "--resume", "auto"]), "distill"
    )


@pytest.mark.parametrize("save_async", ["never", "always"])
@pytest.mark.e2e
def test_a_full_disk_ends_the_run_and_spares_what_was_saved(tmp_path, save_async):
    """The system refuses files beyond 600 bytes from step 7 on; a real process, as the limit cannot be lifted again."""
    script = f"""
import resource, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_training import regression, trainer
stage = regression()
after = stage.after
def full(step):
    after(step)
    if step == 6:
        while not Path({str(tmp_path / "run" / "checkpoints" / "fit" / "00000004")!r}).exists():
            time.sleep(0.01)  # it may still be on its way, in the background
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
stage.after = full
from dd2.cli import _fail, FAILED
try:
    trainer(Path({str(tmp_path / "run")!r}), log_every=1000, save_async={save_async!r}).run(stage)
except OSError as error:
    sys.exit(_fail(f"{{error.strerror or error}}: {{error.filename}}", FAILED))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "run" / "checkpoints" / "fit"
    assert checkpoint.steps(folder) == [4]
    resumed = regression()
    trainer(tmp_path / "run").run(resumed)
    whole = regression()
    trainer(tmp_path / "whole").run(whole)
    for key, value in whole.modules["network"].state_dict().items():
        assert torch.equal(value, resumed.modules["network"].state_dict()[key])


def test_rows_tell_where_the_time_goes(tmp_path):
    stage = regression(6)
    inner = stage.updates[0].loss

    def slow(random: torch.Generator):
        with part("teacher"):
            time.sleep(0.01)
        return inner(random)

    stage.updates[0].loss = slow
    trainer(tmp_path, log_every=3).run(stage)
    logged = MetricsLog(tmp_path / "metrics.jsonl").rows()
    for row in logged:
        assert row["seconds/teacher"] >= 0.02  # two optimiser steps an iteration
        assert {"seconds/backward", "seconds/optimiser"} <= row.keys()
    with part("teacher"):  # outside of training it counts nowhere
        pass


def test_lag_of_an_average():
    network = nn.Linear(3, 2)
    average = ema_copy(network)
    assert ema_lag(average, network) == 0
    with torch.no_grad():
        network.weight.add_(1.0)
    norm = torch.cat([p.detach().flatten() for p in network.parameters()]).norm()
    assert ema_lag(average, network) == pytest.approx(float(6**0.5 / norm))
