"""One-line faults in the wiring between fields and mathematics, each put into a copy of dd2: do the tests see it?

python benchmarks/mutants.py                  all, each against tests/test_wires.py; half an hour on one core
python benchmarks/mutants.py --only align     those whose name contains a word

Writes benchmarks/results/mutants.json and docs/results/mutants.md. A mutant survives if the tests pass.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: in words.
        file: under src/dd2.
        old, new: the text that stands there once, and the fault.
    """

    name: str
    file: str
    old: str
    new: str


def without(setting: str) -> str:
    """A sampling of whose settings one is forgotten."""
    kept = [name for name in ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p") if name != setting]
    return "type(config.sampling)(" + ", ".join(f"{name}=config.sampling.{name}" for name in kept) + ")"


STAGE1 = "wanted = teacher.given(tokens, cond, config.sampling)"
STAGE2 = "wanted = teacher.given(snapped if config.snap_teacher else detached, cond, config.sampling, known)"
LEVELS1 = "t = config.noise_level.draw((config.draws, *tokens.shape[:-1]), random)"
LEVELS2 = "t = config.noise_level.draw((draws, *q.shape[:-1]), random)"
KEY = "key = (self.seed, stage.stream or stage.name, update.name, step, repeat, micro)"

MUTANTS = [
    Mutant("alpha is not passed on", "method/csd.py", "alpha=config.alpha,", "alpha=1.0,"),
    Mutant("weight_floor is not passed on", "method/csd.py", "weight_floor=config.weight_floor,", "weight_floor=1e-2,"),
    *(
        Mutant(f"{name} of stage 1 is forgotten", "method/tune.py", STAGE1, STAGE1.replace("config.sampling", without(name)))
        for name in ("cfg_scale", "top_k", "top_p")
    ),
    *(
        Mutant(f"{name} of stage 2 is forgotten", "method/csd.py", STAGE2, STAGE2.replace("config.sampling", without(name)))
        for name in ("cfg_scale", "top_k", "top_p")
    ),
    Mutant("weight decay is left out", "training/stage.py", "weight_decay=self.optim.weight_decay,", "weight_decay=0.0,"),
    Mutant("betas are not passed on", "training/stage.py", "betas=self.optim.betas,", "betas=(0.9, 0.95),"),
    Mutant(
        "gradients are not clipped", "training/loop.py", 'limit = update.optim.clip_norm or float("inf")', 'limit = float("inf")'
    ),
    Mutant("then_k is not passed on", "method/config.py", "k=self.then_k, ", ""),
    Mutant(
        "then_lr does not reach the generator", "method/config.py", "lr=csd.generator.lr * self.then_lr", "lr=csd.generator.lr"
    ),
    Mutant("then_lr does not reach the guidance", "method/config.py", "lr=csd.guidance.lr * self.then_lr", "lr=csd.guidance.lr"),
    Mutant(
        "the generator has the guidance's optimiser",
        "method/recipe.py",
        'Update("generator", trained, config.generator, train_generator',
        'Update("generator", trained, config.guidance, train_generator',
    ),
    Mutant("snap_teacher is ignored", "method/csd.py", STAGE2, STAGE2.replace("snapped if config.snap_teacher else ", "")),
    Mutant("snap_teacher follows snap_guidance", "method/csd.py", STAGE2, STAGE2.replace("snap_teacher", "snap_guidance")),
    Mutant(
        "snap_guidance follows snap_teacher in the generator's loss",
        "method/csd.py",
        "guidance.given(snapped if snap_guidance",
        "guidance.given(snapped if config.snap_teacher",
    ),
    Mutant(
        "snap_guidance follows snap_teacher in the guidance's loss",
        "method/csd.py",
        "teacher.snap(q) if config.snap_guidance else q",
        "teacher.snap(q) if config.snap_teacher else q",
    ),
    Mutant(
        "one t per sequence in stage 1",
        "method/tune.py",
        LEVELS1,
        LEVELS1.replace("*tokens.shape[:-1])", "len(tokens), 1)") + ".expand(config.draws, *tokens.shape[:-1])",
    ),
    Mutant(
        "one t per sequence in stage 2",
        "method/csd.py",
        LEVELS2,
        LEVELS2.replace("*q.shape[:-1])", "len(q), 1)") + ".expand(draws, *q.shape[:-1])",
    ),
    Mutant("the EMA counts from 0 after alignment", "commands/distill.py", ", averaged=seen", ""),
    Mutant(
        "alignment does not load the EMA",
        "commands/distill.py",
        '    if not steps(trainer.folder / "checkpoints" / "align"):\n        networks.restart_from_average()\n',
        "",
    ),
    Mutant("alignment trains the generator", "commands/distill.py", ', name="align", generator_frozen=True)', ', name="align")'),
    Mutant("the head-only phase trains everything", "method/recipe.py", 'head_only = name == "tune_head"', "head_only = False"),
    Mutant("the head-only phase is skipped", "method/recipe.py", "        if iterations:\n", '        if name == "tune":\n'),
    Mutant("tokens are not standardised", "commands/distill.py", "    teacher.standardise(samples.kept)\n", ""),
    Mutant("the same noise in every micro-batch", "training/loop.py", KEY, KEY.replace(", micro)", ")")),
    Mutant("the same noise in all K updates", "training/loop.py", KEY, KEY.replace("repeat, micro)", "micro)")),
    Mutant("noise and uniforms of one stream", "seeding.py", '_per_image(seeds, "uniform"', '_per_image(seeds, "noise"'),
    Mutant(
        "the generator's head at t = 0.5",
        "student.py",
        "noise.new_ones(noise.shape[:-1])",
        "noise.new_full(noise.shape[:-1], 0.5)",
    ),
    Mutant(
        "the guidance's posterior mean without t",
        "scores.py",
        "x_t - t.unsqueeze(-1) * self.velocity(x_t, t).float()",
        "x_t - self.velocity(x_t, t).float()",
    ),
]


def tried(mutant: Mutant | None) -> tuple[bool, str, float]:
    """Whether the tests pass on a copy with a fault, what failed first, and the seconds that took."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src", Path(folder) / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        if mutant:
            file = Path(folder) / "src" / "dd2" / mutant.file
            text = file.read_text()
            if text.count(mutant.old) != 1:
                raise SystemExit(f"{mutant.name}: its text stands {text.count(mutant.old)} times in {mutant.file}")
            file.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/test_wires.py"]
        environment = os.environ | {"PYTHONPATH": str(Path(folder) / "src"), "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED")]
        if done.returncode not in (0, 1):
            raise SystemExit(f"{mutant}: pytest could not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 0, failed[0].partition("::")[2] if failed else "", time.perf_counter() - start


def main() -> None:
    """Try the mutants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a word in their names")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    if not tried(None)[0]:
        raise SystemExit("the tests fail without any fault: mend them first")
    rows = []
    for mutant in chosen:
        survives, failed, seconds = tried(mutant)
        rows.append({"name": mutant.name, "file": mutant.file, "survives": survives, "failed": failed, "seconds": round(seconds)})
        print(f"{'SURVIVES' if survives else 'killed':9} {mutant.name}  ({failed or '–'}, {seconds:.0f} s)", flush=True)
    killed = sum(not row["survives"] for row in rows)
    print(f"{killed} of {len(rows)} killed")
    if arguments.only:
        return
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    made = {"command": "python benchmarks/mutants.py", "commit": commit.stdout.strip(), "rows": rows}
    faults = [asdict(mutant) for mutant in chosen]
    (ROOT / "benchmarks" / "results" / "mutants.json").write_text(json.dumps(made | {"mutants": faults}, indent=2) + "\n")
    lines = [
        "# One-line faults in the wiring",
        "",
        f"`{made['command']}`, commit {made['commit']}: {killed} of {len(rows)} killed.",
    ]
    lines += [
        "Each fault is put into a copy of `src/` and tests/test_wires.py is run on it; the last column is the first test that"
    ]
    lines += ["fails.", "", "| fault | file | | first test that fails |", "|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['file']} | {'**survives**' if row['survives'] else 'killed'} | {row['failed']} |" for row in rows
    ]
    (ROOT / "docs" / "results" / "mutants.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
