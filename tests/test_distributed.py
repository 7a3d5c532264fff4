"""Two real processes (gloo): the same training as one, exact resume, other process counts, and faults of single processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dd2.checkpoints.native import save_teacher
from dd2.cli import main
from dd2.errors import InputError
from dd2.teachers.base import Teacher
from dd2.training import checkpoint
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.metrics import MetricsLog
from models import HANG, tiny_mar, tiny_teacher, tiny_var
from test_training import OVER_CODES, regression

pytestmark = pytest.mark.e2e

SMALL = [
    "--teacher-samples", "64", "--head.depth", "1", "--head.width", "16", "--head.frequencies", "4",
    "--tune.iterations", "4", "--tune.batch", "4", "--tune.accumulate", "2", "--tune.sampling.cfg-scale", "None",
    "--csd.iterations", "6", "--csd.k", "2", "--csd.batch", "4", "--csd.accumulate", "2",
    "--csd.sampling.cfg-scale", "None", "--align.iterations", "2", "--align.then-iterations", "2",
    "--loop.save-every", "2", "--loop.log-every", "1", "--loop.preview-every", "3",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(*arguments: object) -> subprocess.Popen:
    """Torchrun, in a process group of its own."""
    command = [str(part) for part in (sys.executable, "-m", "torch.distributed.run", *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def start(processes: int, *arguments: object) -> subprocess.Popen:
    """Dd2 under torchrun."""
    return launch("--nproc-per-node", processes, "--master-port", free_port(), "-m", "dd2", *arguments)


def finish(run: Path, processes: int, *arguments: object) -> str:
    """Run to the end; judged by its result, as a process may rarely abort after everything is written."""
    process = start(processes, "distill", "--out", run, *arguments)
    _, errors = process.communicate(timeout=HANG)
    assert (run / "generator" / "config.json").is_file(), errors
    return errors


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.time() + HANG
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.01)


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


def rows(run: Path) -> list[dict]:
    return MetricsLog(run / "metrics.jsonl").reproducible_rows()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "generator" / "model.safetensors")


def flags_of(teacher: Teacher, folder: Path) -> list[str]:
    save_teacher(folder, teacher)
    return ["--teacher", str(folder), *SMALL]


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    return flags_of(tiny_teacher(), tmp_path_factory.mktemp("teacher") / "teacher")


REGRESSED = (
    *("--regress.iterations", "2", "--regress.pairs", "32", "--regress.batch", "4", "--regress.accumulate", "2"),
    *("--regress.ode.steps", "4", "--regress.guidance-iterations", "2", "--sample-in-loop"),
)


MASKED = (
    *("--tune.sampling.ar-steps", "4", "--tune.sampling.diffusion-steps", "3", "--csd.sampling.ar-steps", "8"),
    *("--csd.sampling.cfg-scale", "2.0", "--csd.match.weight", "1.0", "--csd.match.projections", "6", "--csd.match.prime", "16"),
    *("--csd.match.features", "projected", "condition", *REGRESSED[:-1], "--csd.validation", "32"),
)


@pytest.mark.parametrize(
    ("build", "parallel", "more"),
    [
        (tiny_teacher, ("ddp",), ()),
        (tiny_var, ("fsdp2", "--loop.recompute", "--loop.save-async", "always"), REGRESSED),
        (tiny_teacher, ("ddp",), OVER_CODES),
        (tiny_var, ("fsdp2",), OVER_CODES),
        (tiny_mar, ("fsdp2", "--loop.recompute"), MASKED),
    ],
    ids=["ddp", "fsdp2", "codes-ddp", "codes-fsdp2", "masked-fsdp2"],
)
def test_two_processes_train_as_one(tmp_path, build, parallel, more):
    flags = [*flags_of(build(), tmp_path / "teacher"), *more]
    assert main(["distill", "--out", str(tmp_path / "one"), *flags]) == 0
    finish(tmp_path / "two", 2, *flags, "--loop.parallel", *parallel)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    texts = [[(row.pop("stage"), row.pop("health", {})) for row in run] for run in (one, two)]  # what is no number
    assert texts[0] == texts[1]
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "two" / "versions.json").read_text())["processes"] == 2


@pytest.mark.long
def test_compiled_shards_train_as_plain_networks_do(tmp_path, flags):
    """On two processes, traced ahead of time (tests/compiled_dd2.py), against one process without any of it."""
    short = [*flags, "--csd.iterations", "2", "--align.iterations", "0", "--align.then-iterations", "0"]
    assert main(["distill", "--out", str(tmp_path / "plain"), *short]) == 0
    compiled = ("--loop.parallel", "fsdp2", "--loop.compile", "--loop.recompute")
    worker = Path(__file__).with_name("compiled_dd2.py")
    process = launch(
        "--nproc-per-node", 2, "--master-port", free_port(), worker, "distill", "--out", tmp_path / "run", *short, *compiled
    )
    errors = process.communicate(timeout=HANG)[1]
    assert process.returncode == 0, errors
    graphs = [int(number) for number in re.findall(r"graphs: (\d+)", errors)]
    assert len(graphs) == 2
    assert min(graphs) > 0
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "run"), strict=True):
        assert a.pop("stage") == b.pop("stage")
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


@pytest.mark.long
def test_a_killed_process_ends_the_job_and_the_resumed_run_is_bit_exact(tmp_path, flags):
    """Sharded over two processes; benchmarks/faults.py does it often, whole copies too."""
    whole, killed, sharded = tmp_path / "whole", tmp_path / "killed", ("--loop.parallel", "fsdp2")
    finish(whole, 2, *flags, *sharded)
    process = start(2, "distill", "--out", killed, *flags, *sharded)
    wait_for(killed / "checkpoints" / "csd" / "00000002", process)
    os.kill(workers(process)[-1], signal.SIGKILL)
    process.communicate(timeout=HANG)  # the other one does not wait for it forever
    assert not (killed / "generator").exists()
    finish(killed, 2, *flags, *sharded)
    assert rows(killed) == rows(whole)
    a, b = weights(whole), weights(killed)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
def test_checkpoints_load_on_other_process_counts(tmp_path, flags):
    """Begun sharded on two processes, finished whole on one."""
    assert main(["distill", "--out", str(tmp_path / "one"), *flags]) == 0
    run = tmp_path / "run"
    process = start(2, "distill", "--out", run, *flags, "--loop.parallel", "fsdp2")
    wait_for(run / "checkpoints" / "csd" / "00000002", process)
    for number in (*workers(process), process.pid):
        os.kill(number, signal.SIGKILL)
    process.communicate(timeout=HANG)
    assert main(["distill", "--out", str(run), *flags]) == 0
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(tmp_path / "one")]
    a, b = weights(tmp_path / "one"), weights(run)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_pre_emption_saves_once_for_all(tmp_path, flags):
    run = tmp_path / "run"
    process = start(2, "distill", "--out", run, *flags, "--tune.iterations", 100_000, "--loop.save-every", 100_000)
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=HANG)
    assert errors.count("interrupted: tune saved at step") == 1
    (saved,) = checkpoint.steps(run / "checkpoints" / "tune")
    assert f"saved at step {saved} of 100000" in errors
    assert f"resume with: dd2 distill {run}/config.yaml" in errors


@pytest.mark.long
def test_two_agents_make_one_job(tmp_path, flags):
    """As on two hosts: two torchrun agents that know each other by an address alone, a process each; one of them is killed."""
    assert main(["distill", "--out", str(tmp_path / "one"), *flags]) == 0
    run = tmp_path / "run"

    def agents(*more: object) -> list[subprocess.Popen]:
        port = free_port()
        return [
            launch("--nnodes", 2, "--node-rank", node, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port,
                   "-m", "dd2", "distill", "--out", run, *flags, *more)
            for node in (0, 1)
        ]  # fmt: skip

    jobs = agents("--loop.parallel", "fsdp2")
    wait_for(run / "checkpoints" / "csd" / "00000002", jobs[0])
    for number in (*workers(jobs[1]), jobs[1].pid):  # a host is gone, worker and agent
        os.kill(number, signal.SIGKILL)
    jobs[0].communicate(timeout=HANG)
    jobs[1].communicate(timeout=HANG)
    assert jobs[0].returncode != 0
    assert not (run / "generator").exists()
    for job in agents("--loop.parallel", "fsdp2"):
        job.communicate(timeout=HANG)
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(tmp_path / "one")]
    a, b = weights(tmp_path / "one"), weights(run)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


NAN = """
import sys
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from dd2.cli import FAILED, _fail
from dd2.errors import NumericalError
from dd2.processes import rank
from dd2.training.loop import LoopConfig, Trainer
from test_training import regression
stage = regression(20, accumulate=2, spoil=9 if rank() == 1 else None)
try:
    Trainer(Path({run!r}), 7, LoopConfig(log_every=1, save_every=2), torch.device("cpu"), "again").run(stage)
except NumericalError as error:
    sys.exit(_fail(f"rank {{rank()}} {{error}}", FAILED))
"""


def test_nan_on_one_process_stops_all(tmp_path):
    (tmp_path / "job.py").write_text(NAN.format(tests=str(Path(__file__).parent), run=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run([*command, tmp_path / "job.py"], capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode != 0
    said = re.findall(r"rank \d fit iteration (\d+): .* not finite", done.stderr)
    assert said  # two losses an iteration on each process: the ninth is in the fifth
    assert set(said) == {"5"}
    assert checkpoint.steps(tmp_path / "checkpoints" / "fit") == [2, 4]


def test_a_sign_of_failure_stops_all(tmp_path, flags):
    """After the same iteration, also the process that writes no log."""
    failing = ["--csd.generator.lr", "0.1", "--csd.generator.decay", "constant", "--csd.generator.warmup", "0"]
    job = [*flags, *failing, "--loop.stop-on", "average behind", "--align.iterations", "0", "--align.then-iterations", "0"]
    process = start(2, "distill", "--out", tmp_path / "run", *job)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode != 0
    assert errors.count("dd2: csd stopped at step 6 of 6 as loop.stop_on says: average behind: generator/ema_lag is") == 2
    assert "dd2/cli.py" not in errors  # the only traceback is torchrun's own
    assert not (tmp_path / "run" / "generator").exists()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints" / "csd")[-1] == 6


@pytest.mark.long
def test_micro_batches_must_divide_among_processes(tmp_path, flags):
    process = start(2, "distill", "--out", tmp_path / "run", *flags, "--tune.accumulate", 3)
    _, errors = process.communicate(timeout=HANG)
    assert errors.count("dd2: accumulate 3 of the student is no multiple of the 2 processes") == 1


def test_other_commands_do_not_shard(capsys, tmp_path):
    assert main(["train-classifier", "--loop.parallel", "fsdp2", "--out", str(tmp_path / "run")]) == 2
    assert "knows ddp alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_skipped_and_said(tmp_path, capsys):
    def trainer(run: Path) -> Trainer:
        run.mkdir(exist_ok=True)
        config = LoopConfig(log_every=1, save_every=4, keep=9)
        return Trainer(run, 7, config, torch.device("cpu"), "again")

    trainer(tmp_path / "whole").run(regression(20))
    trainer(tmp_path / "run").run(regression(20))
    folder = tmp_path / "run" / "checkpoints" / "fit"
    for later in ("00000016", "00000020"):
        shutil.rmtree(folder / later)
    torn = folder / "00000012" / "average.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    (folder / "00000008" / "net.optimizer.safetensors").unlink()
    stage = regression(20)
    trainer(tmp_path / "run").run(stage)
    errors = capsys.readouterr().err
    assert "skipped: checkpoint" in errors
    assert "going on from step 4" in errors
    ends = [load_file(tmp_path / run / "checkpoints" / "fit" / "00000020" / "network.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    for damaged in (tmp_path / "run" / "checkpoints" / "fit").glob("*/state.json"):
        damaged.write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        trainer(tmp_path / "run").run(regression(24))
