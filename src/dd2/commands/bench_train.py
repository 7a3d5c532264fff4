"""dd2 bench train: seconds and memory of a stage-2 iteration, and the rates that dd2 plan can count with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dd2.commands.bench import BenchConfig, bench_teacher, matmul_rate, paper_recipe, peak_of_process, write_results
from dd2.commands.distill_config import DistillConfig
from dd2.commands.needs import needs
from dd2.commands.plan_config import PlanConfig
from dd2.config import load_config
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.columns import Column
from dd2.evaluation.speed import seconds_per_call
from dd2.method.networks import Networks
from dd2.method.recipe import csd_stage
from dd2.processes import say
from dd2.seeding import stream
from dd2.student import Student
from dd2.training.layers import prepare_layers
from dd2.training.loop import Trainer
from dd2.training.samples import TeacherSamples


@dataclass(frozen=True)
class BenchTrainConfig(BenchConfig):
    """Seconds, operations a second and peak memory of one iteration of stage 2 by the paper's recipe.

    Released models have their sizes and random weights. An iteration is K guidance updates and one generator update of one
    micro-batch each, optimisers and average included.
    """

    models: tuple[str, ...] = ("digits",)
    """digits, var_d16 … var_d30, var_d36_512, llamagen_b, llamagen_l, llamagen_xl_384."""
    batch: int = 2
    """Sequences per micro-batch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """As loop.precision of dd2 distill: autocast around float32 weights."""
    recompute: bool = False
    """As loop.recompute."""
    out: Path = Path("bench_train")
    """OUT.json and OUT.md are written; dd2 plan --rates OUT.json reads it."""

    def __post_init__(self) -> None:
        """Refuse nothing to time."""
        super().__post_init__()
        if self.batch < 1 or not self.models:
            raise InputError("models must name at least one, and batch be at least 1")


COLUMNS = {
    "model": Column("model", ""),
    "batch": Column("batch", "d"),
    "precision": Column("precision", ""),
    "guidance": Column("guidance update (s)", ".3g"),
    "generator": Column("generator update (s)", ".3g"),
    "k": Column("K", "d"),
    "iteration": Column("iteration (s)", ".3g"),
    "gflops_per_second": Column("GFLOP/s", ".0f"),
    "share": Column("share of matmul", ".0%"),
    "peak_gb": Column("peak (GB)", ".2f"),
}


def bench_train(config: BenchTrainConfig) -> None:
    """Measure and write the table."""
    device = pick_device(config.device)
    limit = matmul_rate(device, getattr(torch, config.precision))
    rows = []
    for name in config.models:
        rows.append(_measured(name, config, device, limit))
        say(f"{name}: {rows[-1]['iteration']:.3g} s an iteration")
    write_results(config, "train", device, rows, COLUMNS, matmul_flops_per_second={config.precision: limit})


def _measured(name: str, config: BenchTrainConfig, device: torch.device, limit: float) -> dict[str, Any]:
    teacher = bench_teacher(name, device, config.seed)
    run = load_config(DistillConfig, paper_recipe(name))
    csd = replace(run.csd, batch=config.batch, accumulate=1, validation=0)
    labels = teacher.conditions.default_labels(torch.arange(max(config.batch, 2)))
    ids = torch.randint(len(teacher.codebook), (len(labels), teacher.order.n), generator=stream("bench", config.seed))
    samples = TeacherSamples(teacher, ids, labels)
    networks = Networks.from_tuned(Student.from_teacher(teacher, run.head))
    for network in networks.modules().values():
        prepare_layers(network, config.recompute, compiled=False)
    stage = csd_stage(networks, teacher, samples, csd)
    loop = replace(run.loop, recompute=config.recompute, precision=config.precision)
    trainer = Trainer(config.out.parent, config.seed, loop, device, "")
    guidance, generator = stage.updates

    def generator_step() -> None:
        trainer.optimise(stage, generator, 0)
        stage.after(0)

    calls = {"guidance": lambda: trainer.optimise(stage, guidance, 0), "generator": generator_step}

    def iteration() -> None:
        for call in calls.values():
            call()

    peak = peak_of_process(iteration, device)
    seconds = seconds_per_call(calls, config.repeats)
    whole = csd.k * seconds["guidance"] + seconds["generator"]
    planned = replace(PlanConfig(), head=run.head, csd=csd, loop=loop)
    flops = needs(planned, teacher.to("meta")).flops
    return {
        **{"model": name, "batch": config.batch, "precision": config.precision, "k": csd.k},
        **seconds,
        **{"iteration": whole, "flops": flops, "gflops_per_second": flops / whole / 1e9, "share": flops / whole / limit},
        "peak_gb": peak / 1e9,
    }
