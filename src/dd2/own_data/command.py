"""dd2 own-data: one path from images to tokenizer, teacher, one-step generator and report."""

import dataclasses
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from dd2.commands.distill import distill
from dd2.commands.evaluate import evaluate
from dd2.commands.train_classifier import train_classifier
from dd2.commands.train_teacher import train_teacher
from dd2.commands.train_tokenizer import SIGNS, train_tokenizer
from dd2.data.source import open_data, some_shapes
from dd2.device import pick_device
from dd2.errors import InputError, Interrupted, TrainingFailed
from dd2.evaluation.features import open_features
from dd2.files import writable_folder, write_atomic
from dd2.own_data.budget import Budget, planned
from dd2.own_data.rates import Rates, measured, quietly
from dd2.own_data.recipe import SIDES, SIZES, Counts, Runs, Sizes, Task, runs
from dd2.places import absolute
from dd2.processes import say
from dd2.records import Shape, read_record
from dd2.resources import is_memory
from dd2.training.health import STATE, Health
from dd2.training.metrics import MetricsLog

PLAN = "plan.json"
STOPPING = ("divergence", "collapse", "memorised", "dead codes")
"""Signs after which the next stage would be built on sand."""

BATCHES = (64, 32, 16, 8)


@dataclass(frozen=True)
class OwnDataConfig:
    """From a folder or zip of images to a measured one-step generator: dd2 own-data photos.zip --size 64 --minutes 60.

    Looks at the images, times a little of every stage here, chooses sizes and iterations for the time, says what it will do, and
    does it: OUT/tokenizer, OUT/teacher, OUT/classifier, OUT/one_step with its report. Each stage's health is judged before the
    next one starts. Run the same command again to go on after an interruption.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder or zip of CLASS/IMAGE files (docs/edges.md), or of MNIST's."""
    size: int = 64
    """Height and width of the images: 16, 32, 64, 128 or 256."""
    minutes: float = 60.0
    """Time for all of it, about."""
    out: Path = Path("runs/own_data")
    """Folder of all its runs."""
    features: str = ""
    """Features of the evaluation, as dd2 evaluate takes them; by default a classifier is trained on the images' classes."""
    despite: tuple[str, ...] = ()
    """Signs of failure (memorised, dead codes, …) after which it goes on all the same."""
    dry_run: bool = False
    """Time and choose, print the plan, and stop."""
    seed: int = 0
    """Seed of everything."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not halve, and no time at all."""
        if self.size not in SIDES:
            raise InputError(f"size must be one of {', '.join(map(str, SIDES))}, got {self.size}")
        if not self.minutes > 0:
            raise InputError(f"minutes must be positive, got {self.minutes}")
        if unknown := [sign for sign in self.despite if sign not in STOPPING]:
            raise InputError(f"despite knows {', '.join(STOPPING)}, not {unknown[0]}")


@dataclass(frozen=True)
class Plan:
    """What was decided, once, and kept in plan.json."""

    task: Task
    sizes: Sizes
    budget: Budget


def own_data(config: OwnDataConfig) -> None:
    """Do all of it, or what is left of it.

    Raises:
        InputError: the images cannot be used, or the time is too short.
        TrainingFailed: a stage's result is nothing to build on.
        Interrupted: by a signal; what was done is kept.
    """
    task = _looked_at(config)
    again = _again(config)
    plan = _plan(config, task)
    say(_described(plan))
    if plan.budget.short and not (config.out / "tokenizer").exists():
        raise InputError(
            f"{config.minutes:g} minutes are too few for these images here: give --minutes {plan.budget.short:.0f} or more"
            + (", or a smaller --size" if config.size > SIDES[0] else "")
        )
    if config.dry_run:
        return
    if not (config.out / PLAN).exists():
        writable_folder(config.out, "output folder")
        _write(config.out / PLAN, config, plan)
    chosen = runs(task, plan.sizes, plan.budget.counts, config.out, stop="divergence" not in config.despite)
    began = time.perf_counter()
    for number, stage in enumerate(task.stages, 1):
        say(f"[{number} of {len(task.stages)}] {stage}, about {plan.budget.seconds[stage] / 60:.0f} minutes")
        try:
            _calls(chosen)[stage]()
        except (Interrupted, KeyboardInterrupt) as stop:
            raise Interrupted(f"{stop or 'interrupted'}; or go on with all of it by: {again}") from None
        if stage != "evaluate":
            _judge(stage, config)
    say(f"done in {(time.perf_counter() - began) / 60:.0f} minutes of this session; open {config.out}/one_step/report.html")
    say(f"images: dd2 sample {shlex.quote(str(config.out / 'one_step'))}")


def _looked_at(config: OwnDataConfig) -> Task:
    """What the images are."""
    pick_device(config.device)
    shapes = some_shapes(config.data)
    channels, sides = max(shape[0] for shape in shapes), shapes[0][1:]
    if (grey := sum(shape[0] <= 2 for shape in shapes)) and channels > 2:
        say(
            f"note: {grey} of {len(shapes)} images looked at are grey, and taken as colour like the rest",
            sys.stderr,
        )
    data = open_data(config.data, config.size, 3 if channels > 2 else 1)
    if data.captions:
        raise InputError(
            f"data {config.data} has captions, and own-data makes models of classes: train a text-conditional one stage by stage "
            "(docs/text-to-image.md)"
        )
    if min(sides) < config.size:
        say(f"note: the first image is {sides[0]} x {sides[1]}; {config.size} px makes it larger", sys.stderr)
    if config.features:
        open_features(config.features, torch.device("cpu"))
    elif data.num_classes < 2:
        raise InputError(
            f"data {config.data} has one class, so no classifier can be trained whose features would measure the result: give "
            "--features (docs/evaluation.md), or sort the images into classes"
        )
    return Task(
        absolute(config.data),
        config.size,
        3 if channels > 2 else 1,
        data.num_training,
        data.num_classes,
        config.features,
        config.seed,
        config.device,
    )


def _calls(chosen: Runs) -> dict[str, Callable[[], Any]]:
    return {
        "tokenizer": lambda: train_tokenizer(chosen.tokenizer),
        "teacher": lambda: train_teacher(chosen.teacher),
        "classifier": lambda: train_classifier(chosen.classifier),
        "one_step": lambda: distill(chosen.one_step),
        "evaluate": lambda: evaluate(chosen.evaluate),
    }


def _judge(stage: str, config: OwnDataConfig) -> None:
    """Stop where a stage's numbers say that it failed."""
    run = config.out / stage
    rows = MetricsLog(run / "metrics.jsonl").rows()
    seen = {kind: text for row in rows for kind, text in row.get(STATE, {}).items()}
    if stage == "tokenizer":  # codes that were dead early on have been revived since
        standing = Health(SIGNS, max(row["step"] for row in rows), rows).standing
        seen = {kind: text for kind, text in seen.items() if kind in standing}
    if failed := [kind for kind in seen if kind in STOPPING and kind not in config.despite]:
        again = _again(dataclasses.replace(config, despite=(*config.despite, failed[0])))
        raise TrainingFailed(
            f"{stage} shows {failed[0]}: {seen[failed[0]]}. Nothing was built on it; {run} holds it. To go on all the same: "
            f"{again}"
        )


def _plan(config: OwnDataConfig, task: Task) -> Plan:
    """What plan.json says, or a new one."""
    file = config.out / PLAN
    if file.exists():
        return _read(file, config, task)
    if begun := [stage for stage in task.stages if (config.out / stage).exists()]:
        raise InputError(f"{config.out} has a {begun[0]} and no {PLAN} that says what was to come; choose another --out")
    gpu = pick_device(config.device).type == "cuda"
    for sizes in SIZES:
        if task.images < sizes.images or (sizes.gpu and not gpu):
            continue
        found = _budget(config, task, sizes)
        if found is not None and (not found.short or sizes is SIZES[-1]):
            return Plan(task, sizes, found)
    raise InputError(f"not even the smallest networks fit into memory at {config.size} px; give a smaller --size")


def _budget(config: OwnDataConfig, task: Task, sizes: Sizes) -> Budget | None:
    """What the time allows with networks of some sizes, in batches that fit; None where none does."""
    for batch in BATCHES:
        began = time.perf_counter()
        say(f"timing a little of every stage ({sizes.name} networks, batches of {batch}) …", sys.stderr)
        try:
            with tempfile.TemporaryDirectory(prefix="dd2-timing-") as scratch:
                rates: Rates = quietly(lambda batch=batch, folder=Path(scratch): measured(task, sizes, batch, folder))
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            continue
        return planned(task, rates, config.minutes - (time.perf_counter() - began) / 60, batch)
    return None


SHAPE: dict[Any, Shape] = {
    "task": dict,
    "minutes": float,
    "sizes": str,
    "counts": {str: int},
    "seconds": {str: float},
}


def _write(file: Path, config: OwnDataConfig, plan: Plan) -> None:
    content = {
        "task": dataclasses.asdict(plan.task),
        "minutes": config.minutes,
        "sizes": plan.sizes.name,
        "counts": dataclasses.asdict(plan.budget.counts),
        "seconds": dict(plan.budget.seconds),
    }
    write_atomic(file, json.dumps(content, indent=2) + "\n")


def _read(file: Path, config: OwnDataConfig, task: Task) -> Plan:
    remedy = "restore it, or choose another --out"
    found = read_record(file, SHAPE, remedy)
    now = dataclasses.asdict(task) | {"minutes": config.minutes}
    before = found["task"] | {"minutes": found["minutes"]}
    if changed := [name for name in now if now[name] != before.get(name) and name != "device"]:
        name = changed[0]
        raise InputError(
            f"{config.out} was begun with {name} {before.get(name)}, now {now[name]}; go on with the old value, or choose "
            "another --out"
        )
    sizes = {sizes.name: sizes for sizes in SIZES}.get(found["sizes"])
    names = {field.name for field in dataclasses.fields(Counts)}
    if sizes is None or found["counts"].keys() != names or not found["seconds"].keys() >= set(task.stages):
        raise InputError(f"{file} is damaged or of another dd2; {remedy}")
    return Plan(task, sizes, Budget(Counts(**found["counts"]), found["seconds"]))


def _again(config: OwnDataConfig) -> str:
    words = ["dd2", "own-data", config.data]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("data", "dry_run") and value != field.default:
            if field.name == "despite":
                words += ["--despite", *value]
                continue
            words += [f"--{field.name}", repr(value) if isinstance(value, float) else str(value)]
    return shlex.join(words)


def _described(plan: Plan) -> str:
    """The plan as a table."""
    task, sizes, counts = plan.task, plan.sizes, plan.budget.counts
    kind = "grey" if task.channels == 1 else "colour"
    of = {
        "tokenizer": f"{counts.tokenizer:,} iterations; {sizes.codes} codes",
        "teacher": f"{counts.teacher:,} iterations; {sizes.depth} layers of {sizes.width}",
        "classifier": f"{counts.classifier:,} iterations",
        "one_step": f"{counts.samples:,} samples and pairs, {counts.regress:,} + {counts.csd:,} iterations",
        "evaluate": f"{counts.evaluated:,} images a row",
    }
    lines = [f"{task.images:,} images of {task.classes} classes to train on, {kind}, {task.size} px; batches of {counts.batch}"]
    lines += [f"  {stage:<11}{of[stage]:<58} about {plan.budget.seconds[stage] / 60:5.1f} min" for stage in task.stages]
    return "\n".join([*lines, f"  {'in all':<69} about {sum(plan.budget.seconds.values()) / 60:5.1f} min"])
