"""Two revisions in turn, each in a git worktree of its own: the same work by old and new code, and the ratio.

    python benchmarks/revisions.py OLD [--new REVISION] [--only digits var_d16 llamagen_b] [--rounds 2]

Rounds alternate, so that a busy machine slows both alike; the lower time of each counts. Drawing one image with a released
model's sizes and random weights: teacher, one step, decoding, in float32 and in bfloat16 (old revisions: under autocast).
Training: one iteration of stage 2 of the demo, whose losses must agree. Writes benchmarks/results/revisions.json and a table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = ("digits", "var_d16", "llamagen_b")


def draw(name: str) -> dict[str, float]:
    """Seconds of one image, by any revision."""
    import torch

    from dd2.checkpoints.released import RELEASED
    from dd2.sampling import one_step
    from dd2.student import HeadConfig, Student
    from dd2.teachers.code import require_codes
    from dd2.teachers.filtering import Sampling

    torch.manual_seed(0)
    teacher = require_codes(RELEASED[name](), "this benchmark").eval().requires_grad_(False)
    teacher.standardise()
    student = Student.from_teacher(teacher, HeadConfig()).eval().requires_grad_(False)
    cond, sampling = teacher.conditions(torch.tensor([3])), Sampling(cfg_scale=1.5, top_k=900)
    seconds = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            a_teacher, a_student = teacher, student
            if hasattr(teacher, "in_precision"):
                from dd2.precision import in_precision

                a_teacher, a_student = teacher.in_precision(dtype), in_precision(student, dtype)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                tokens = one_step(a_student, cond, [0]).float()
                work = {
                    "teacher": lambda t=a_teacher: t.sample(cond, sampling, [0]),
                    "one step": lambda s=a_student: one_step(s, cond, [0]),
                    "decoding": lambda t=a_teacher, x=tokens: t.decode(x, cond),
                }
                for what, call in work.items():
                    if what != "teacher":
                        call()
                    start = time.perf_counter()
                    call()
                    seconds[f"{what}, {str(dtype).removeprefix('torch.')}"] = time.perf_counter() - start
    return seconds


def train() -> dict[str, float]:
    """Seconds of an iteration of the demo's stage 2, and what its losses were."""
    import torch

    from dd2.checkpoints.runs import open_teacher
    from dd2.commands.distill_config import DistillConfig
    from dd2.config import load_config
    from dd2.method.networks import Networks
    from dd2.method.recipe import csd_stage
    from dd2.student import Student
    from dd2.training.samples import TeacherSamples

    config = load_config(DistillConfig, "digits_paper")
    teacher = open_teacher("digits", torch.device("cpu"))
    labels = teacher.conditions.default_labels(torch.arange(512))
    tokens = teacher.sample(teacher.conditions(labels), config.tune.sampling, range(512))
    samples = TeacherSamples(teacher, teacher.stored(tokens), labels)
    teacher.standardise(samples.kept)
    torch.manual_seed(0)
    stage = csd_stage(Networks.from_tuned(Student.from_teacher(teacher, config.head)), teacher, samples, config.csd)
    found, start = {}, 0.0
    for step in range(23):
        if step == 3:  # the first ones warm up
            start = time.perf_counter()
        for update in stage.updates:
            for repeat in range(update.repeats):
                update.optimizer.zero_grad(set_to_none=True)
                loss, _ = update.loss(torch.Generator().manual_seed(10 * step + repeat))
                loss.backward(inputs=update.parameters)
                torch.nn.utils.clip_grad_norm_(update.parameters, 1.0)
                update.optimizer.step()
                if step == 0:  # later ones also carry what rounding did to the weights
                    found[f"loss of {update.name} {repeat}"] = float(loss.detach())
        stage.after(step)
    return {"iteration": (time.perf_counter() - start) / 20, **found}


def git(*arguments: str) -> str:
    """What git says."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Run the rounds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("--new", default="HEAD")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--inside", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(train() if arguments.inside == "digits" else draw(arguments.inside)))
        return
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        places = {}
        for side, revision in (("old", arguments.old), ("new", arguments.new)):
            places[side] = Path(scratch) / side
            git("worktree", "add", "--detach", str(places[side]), revision)
        try:
            for case in arguments.only:
                found[case] = {"old": [], "new": []}
                for _ in range(arguments.rounds):
                    for side, place in places.items():
                        command = [sys.executable, __file__, arguments.old, "--inside", case]
                        environment = {**os.environ, "PYTHONPATH": str(place / "src")}
                        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                        found[case][side].append(json.loads(done.stdout.splitlines()[-1]))
                        print(case, side, done.stdout.splitlines()[-1], flush=True)
        finally:
            for place in places.values():
                git("worktree", "remove", "--force", str(place))
    revisions = {side: git("rev-parse", "--short", r) for side, r in (("old", arguments.old), ("new", arguments.new))}
    rows = [
        {"case": case, "what": what, **{side: min(run[what] for run in runs) for side, runs in sides.items()}}
        for case, sides in found.items()
        for what in sides["old"][0]
    ]
    lines = [f"| what | {revisions['old']} | {revisions['new']} | ratio |", "|---|---:|---:|---:|"]
    for row in rows:
        unit = "" if row["what"].startswith("loss") else " s"
        ratio = f"{row['old'] / row['new']:.2f}" if unit else f"{abs(row['old'] / row['new'] - 1):.0e} off"
        lines.append(f"| {row['case']}: {row['what']} | {row['old']:.4g}{unit} | {row['new']:.4g}{unit} | {ratio} |")
    print("\n".join(lines))
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    result = {"revisions": revisions, "threads": os.environ.get("OMP_NUM_THREADS", ""), "rounds": arguments.rounds, "rows": rows}
    (folder / "revisions.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "revisions.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
