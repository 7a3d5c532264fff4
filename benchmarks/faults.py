"""Kill -9 at random moments, saves included: is every resumed run, bit for bit, the undisturbed one?

    python benchmarks/faults.py [--kills 50] [--processes 1] [--parallel ddp] [--save-async never]

A tiny distillation (all stages, alignment too, a checkpoint every second iteration) is killed again and again at random moments
and started again until it ends; then the next one is, until there were enough kills. Every second kill waits, after its random
moment, for the next save to begin, and strikes inside it. With several processes one of torchrun's workers, a random one, is
killed, and the others must end by themselves. Writes docs/results/faults.md and benchmarks/results/faults.json, a row per
setting.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from dd2.checkpoints.native import save_teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.llamagen import LlamaGenConfig, llamagen_teacher
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.vq import VQTokenizer
from dd2.training.metrics import MetricsLog

ROOT = Path(__file__).resolve().parent.parent
RUN = [
    "--teacher-samples", "64", "--head.depth", "1", "--head.width", "16", "--head.frequencies", "4",
    "--tune.iterations", "12", "--tune.batch", "4", "--tune.accumulate", "2", "--tune.sampling.cfg-scale", "None",
    "--csd.iterations", "24", "--csd.k", "2", "--csd.batch", "4", "--csd.accumulate", "2",
    "--csd.sampling.cfg-scale", "None", "--align.iterations", "6", "--align.then-iterations", "12",
    "--loop.save-every", "2", "--loop.log-every", "1", "--loop.preview-every", "0",
]  # fmt: skip


@dataclass
class Tally:
    """What the kills hit."""

    kills: int = 0
    runs: int = 0
    inside_a_save: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    longest_end_seconds: float = 0.0


def main() -> None:
    """Kill, resume, compare, and write the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--save-async", choices=("always", "never"), default="never")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance, tally = random.Random(arguments.seed), Tally()
    folder = Path(tempfile.mkdtemp())
    save_teacher(folder / "teacher", _teacher())
    begun = time.perf_counter()
    _start(folder / "whole", arguments).wait()
    seconds = time.perf_counter() - begun
    expected = _result(folder / "whole")
    while tally.kills < arguments.kills:
        run = folder / f"killed{tally.runs}"
        while not (run / "generator").is_dir():
            if tally.kills < arguments.kills:
                _disturbed(run, arguments, chance, seconds, tally)
            else:
                _start(run, arguments).wait()
        tally.runs += 1
        if _result(run) != expected:
            sys.exit(f"{run} ended differently from the undisturbed {folder / 'whole'}, after {tally.kills} kills in all")
        print(f"{tally.kills} kills, {tally.inside_a_save} inside a save, {tally.runs} runs, all bit-exact", flush=True)
    shutil.rmtree(folder)
    setting = f"{arguments.processes} process{'es' if arguments.processes > 1 else ''}, {arguments.parallel}"
    setting += ", saved in the background" if arguments.save_async == "always" else ""
    _write({"setting": setting, **vars(tally), "longest_end_seconds": round(tally.longest_end_seconds, 1)})


def _teacher() -> CodeTeacher:
    torch.manual_seed(0)
    sizes = LlamaGenConfig(depth=2, width=32, heads=2, ffn_multiple=16, rows=4, columns=4, num_classes=3)
    images = {"image_size": 16, "image_channels": 1}
    vq = VQConfig(codebook_size=12, code_dim=4, channels=8, multipliers=(1, 1, 2), z_channels=8, groups=4, **images)
    return llamagen_teacher(sizes, VQTokenizer(vq))


def _start(run: Path, arguments: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable]
    if arguments.processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(arguments.processes), "--master-port", str(port)]
    command += ["-m", "dd2", "distill", "--teacher", str(run.parent / "teacher"), "--out", str(run)]
    command += ["--loop.parallel", arguments.parallel, "--loop.save-async", arguments.save_async, *RUN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _disturbed(run: Path, arguments: argparse.Namespace, chance: random.Random, seconds: float, tally: Tally) -> None:
    """Start or resume a run and kill it, unless it ends first; every second kill is aimed at a save."""
    aimed = tally.kills % 2 == 1
    before = _unfinished(run)
    process = _start(run, arguments)
    try:
        process.wait(chance.uniform(0, (0.8 if aimed else 1.1) * seconds))
    except subprocess.TimeoutExpired:
        while aimed and process.poll() is None and not _unfinished(run) - before:
            time.sleep(0.0005)
    victims = _workers(process) if arguments.processes > 1 else [process.pid]
    if process.poll() is not None or not victims:  # ended, or no worker yet
        process.wait()
        return
    os.kill(chance.choice(victims), signal.SIGKILL)
    begun = time.perf_counter()
    process.wait(120)
    tally.longest_end_seconds = max(tally.longest_end_seconds, time.perf_counter() - begun)
    tally.kills += 1
    tally.inside_a_save += bool(_unfinished(run) - before)
    rows = MetricsLog(run / "metrics.jsonl").rows()
    tally.stages[rows[-1]["stage"] if rows else "start"] += 1


def _unfinished(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when a process died; the number tells one from its successor."""
    found = set()
    for path in run.glob("checkpoints/*/.*.dd2-partial"):
        with contextlib.suppress(FileNotFoundError):  # finished in this moment
            found.add((str(path), path.stat().st_ctime_ns))
    return found


def _workers(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def _result(run: Path) -> tuple[list[dict], list[tuple[str, bytes]]]:
    """The metrics without their times, and all weights."""
    rows = MetricsLog(run / "metrics.jsonl").reproducible_rows()
    tensors = [load_file(run / network / "model.safetensors") for network in ("generator", "ar_diffusion")]
    return rows, [(name, value.numpy().tobytes()) for part in tensors for name, value in sorted(part.items())]


def _write(row: dict) -> None:
    file = ROOT / "benchmarks" / "results" / "faults.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    rows = [*(old for old in rows if old["setting"] != row["setting"]), row]
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(rows, indent=2) + "\n")
    lines = [
        "# Kill -9 at random moments",
        "",
        "`python benchmarks/faults.py --kills N --processes P --parallel KIND --save-async WHEN`: a tiny distillation is",
        "killed at random moments, every second time in the first save after such a moment, and started again until it ends;",
        "metrics and weights must equal those of an undisturbed run bit for bit, or the script stops. With several processes",
        "one worker is killed, and the job must end by itself. A kill is inside a save where it left an unfinished checkpoint;",
        "with several processes the survivors may still have finished it.",
        "",
        "| setting | kills | last logged stage | inside a save | runs | all bit-exact | longest until the job had ended |",
        "|---|---:|---|---:|---:|---|---:|",
        *(
            f"| {r['setting']} | {r['kills']} | {', '.join(f'{n} {stage}' for stage, n in r['stages'].items())} |"
            f" {r['inside_a_save']} | {r['runs']} | yes | {r['longest_end_seconds']} s |"
            for r in rows
        ),
    ]
    (ROOT / "docs" / "results" / "faults.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
