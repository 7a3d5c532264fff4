"""Seconds of one stage-1 and one stage-2 iteration of a configuration, by part, and of the same with other sizes.

    python benchmarks/training_step.py [CONFIG.yaml] [--repeats 10] [--field value …]

Prints a table and writes benchmarks/results/training_step.json. Ratios between rows of one run mean something;
seconds depend on the machine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from dd2.checkpoints.runs import open_teacher
from dd2.commands.distill_config import DistillConfig
from dd2.config import load_config
from dd2.method.networks import Networks
from dd2.method.recipe import csd_stage, tune_stages
from dd2.student import Student
from dd2.training.samples import TeacherSamples
from dd2.training.stage import Stage


def seconds_of(stage: Stage, repeats: int) -> dict[str, float]:
    """Median seconds of one optimiser step of each of the stage's updates."""
    taken: dict[str, list[float]] = {update.name: [] for update in stage.updates}
    for index in range(repeats + 1):
        for update in stage.updates:
            start = time.perf_counter()
            update.optimizer.zero_grad(set_to_none=True)
            loss, _ = update.loss(torch.Generator().manual_seed(index))
            loss.backward(inputs=update.parameters)
            torch.nn.utils.clip_grad_norm_(update.parameters, 1.0)
            update.optimizer.step()
            if index:  # the first is the warm-up
                taken[update.name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="digits_paper")
    parser.add_argument("--repeats", type=int, default=10)
    arguments, overrides = parser.parse_known_args()
    config = load_config(DistillConfig, arguments.config, overrides)
    teacher = open_teacher(config.teacher, torch.device("cpu"))
    labels = teacher.conditions.default_labels(torch.arange(256))
    tokens = teacher.sample(teacher.conditions(labels), config.tune.sampling, range(256))
    samples = TeacherSamples(teacher, teacher.stored(tokens), labels)
    teacher.standardise(samples.kept)
    student = Student.from_teacher(teacher, config.head)
    tune = seconds_of(tune_stages(student, teacher, samples, config.tune)[-1], arguments.repeats)
    parts = seconds_of(csd_stage(Networks.from_tuned(student), teacher, samples, config.csd), arguments.repeats)
    iteration = config.csd.k * parts["guidance"] + parts["generator"]
    rows = {
        "stage 1 iteration": tune["student"],
        "guidance update": parts["guidance"],
        "generator update": parts["generator"],
        f"stage 2 iteration (K = {config.csd.k})": iteration,
    }
    print("| part | ms |\n|---|---:|")
    for name, value in rows.items():
        print(f"| {name} | {1000 * value:.1f} |")
    folder = Path(__file__).resolve().parent / "results"
    folder.mkdir(exist_ok=True)
    result = {"config": arguments.config, "overrides": overrides, "threads": torch.get_num_threads(), "seconds": rows}
    (folder / "training_step.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
