"""Kill -9 at random moments, saves included: is every resumed run, bit for bit, the undisturbed one?

    python benchmarks/faults.py [--kills 50] [--processes 1] [--parallel ddp] [--save-async never]

A tiny distillation (all stages, alignment too, a checkpoint every second iteration) is killed again and again at random moments
and started again until it ends; then the next one is, until there were enough kills. With several processes one of torchrun's
workers is killed, and the others must end by themselves. Writes docs/results/faults.md and benchmarks/results/faults.json, a row
per setting.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from dd2.checkpoints.native import save_teacher
from dd2.teachers.llamagen import LlamaGenConfig, llamagen_teacher
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.vq import VQTokenizer
from dd2.training.metrics import MetricsLog

ROOT = Path(__file__).resolve().parent.parent
RUN = [
    "--teacher-samples", "64", "--head.depth", "1", "--head.width", "16", "--head.frequencies", "4",
    "--tune.iterations", "12", "--tune.batch", "4", "--tune.accumulate", "2", "--tune.sampling.cfg-scale", "None",
    "--distill.iterations", "24", "--distill.k", "2", "--distill.batch", "4", "--distill.accumulate", "2",
    "--distill.sampling.cfg-scale", "None", "--align.iterations", "6", "--align.then-iterations", "12",
    "--loop.save-every", "2", "--loop.log-every", "1", "--loop.preview-every", "0",
]  # fmt: skip


def main() -> None:
    """Kill, resume, compare, and write the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--save-async", choices=("always", "never"), default="never")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    kills, runs, inside_saves, longest = 0, 0, 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        sizes = LlamaGenConfig(depth=2, width=32, heads=2, ffn_multiple=16, rows=4, columns=4, num_classes=3)
        vq = VQConfig(
            codebook_size=12,
            code_dim=4,
            image_size=16,
            image_channels=1,
            channels=8,
            multipliers=(1, 1, 2),
            z_channels=8,
            groups=4,
        )
        save_teacher(folder / "teacher", llamagen_teacher(sizes, VQTokenizer(vq)))
        begun = time.perf_counter()
        _finish(_start(folder / "whole", arguments, folder / "teacher"))
        seconds = time.perf_counter() - begun
        expected = _result(folder / "whole")
        while kills < arguments.kills:
            run = folder / f"killed{runs}"
            while not (run / "generator").is_dir():
                process = _start(run, arguments, folder / "teacher")
                if kills < arguments.kills:
                    killed, waited = _kill(process, chance.uniform(0, 1.1 * seconds), arguments.processes)
                    kills, longest = kills + killed, max(longest, waited)
                    inside_saves += bool(killed and list(run.glob("checkpoints/*/*.partial")))
                _finish(process)
            runs += 1
            if _result(run) != expected:
                sys.exit(f"run {runs} ended differently from the undisturbed one after {kills} kills: see {run}")
            print(f"{kills} kills, {inside_saves} of them inside a save, {runs} runs, all bit-exact", flush=True)
    setting = f"{arguments.processes} process{'es' if arguments.processes > 1 else ''}, {arguments.parallel}"
    setting += ", saved in the background" if arguments.save_async == "always" else ""
    row = {
        "setting": setting,
        "kills": kills,
        "inside_a_save": inside_saves,
        "runs": runs,
        "longest_end_seconds": round(longest, 1),
    }
    _write(row)


def _start(run: Path, arguments: argparse.Namespace, teacher: Path) -> subprocess.Popen:
    launcher = [sys.executable]
    if arguments.processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(arguments.processes), "--master-port", str(port)]
    command = [
        *launcher,
        "-m",
        "dd2",
        "distill",
        "--teacher",
        str(teacher),
        "--out",
        str(run),
        "--loop.parallel",
        arguments.parallel,
        "--loop.save-async",
        arguments.save_async,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *RUN], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _kill(process: subprocess.Popen, after: float, processes: int) -> tuple[bool, float]:
    """Kill a process, or one worker of a job, after some seconds unless it has ended; the seconds until all had ended."""
    try:
        process.wait(after)
        return False, 0.0
    except subprocess.TimeoutExpired:
        pass
    victim = process.pid
    if processes > 1:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout.split()
        if not found:
            return False, 0.0
        victim = int(found[-1])
    os.kill(victim, signal.SIGKILL)
    begun = time.perf_counter()
    process.wait(120)
    return True, time.perf_counter() - begun


def _finish(process: subprocess.Popen) -> None:
    process.wait()


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
        "killed at random moments and started again until it ends; metrics and weights must equal those of an undisturbed run",
        "bit for bit, or the script stops. With several processes one worker is killed, and the job must end by itself.",
        "",
        "| setting | kills | inside a save | runs | all bit-exact | longest until the job had ended |",
        "|---|---:|---:|---:|---|---:|",
        *(
            f"| {r['setting']} | {r['kills']} | {r['inside_a_save']} | {r['runs']} | yes | {r['longest_end_seconds']} s |"
            for r in rows
        ),
    ]
    (ROOT / "docs" / "results" / "faults.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
