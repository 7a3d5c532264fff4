"""dd2 bench sample: seconds per image of the teacher and of one step, and how near the machine's limit they are."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dd2.commands.bench import BenchConfig, bench_teacher, matmul_rate, paper_recipe, peak_of_process, write_results
from dd2.commands.distill_config import DistillConfig
from dd2.config import load_config
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.columns import Column
from dd2.evaluation.speed import seconds_per_call
from dd2.files import write_atomic
from dd2.generator import Generator
from dd2.precision import Precision, fast_bfloat16, name_of, pick_precision
from dd2.processes import say
from dd2.progress import progress
from dd2.sampling import Ways
from dd2.student import Student
from dd2.teachers.code import CodeTeacher
from dd2.training.footprint import footprint

PAPER = {"var_d16": 7.0, "var_d20": 8.0, "var_d24": 8.1, "llamagen_l": 238.0}
"""Speed-up of one step over the teacher in the paper (Tables 1 and 2, on an A800)."""


@dataclass(frozen=True)
class BenchSampleConfig(BenchConfig):
    """Seconds per image with and without decoding, beside the KV-cached teacher of the same run.

    Released models have their sizes and random weights, digits its own teacher; one step is that of the paper's networks, and
    sampling the paper's, or that of the nearest model it has. A share is of the rate of a large matrix product in the same
    precision, measured in the same run.
    """

    models: tuple[str, ...] = ("digits",)
    """digits, var_d16 … var_d30, var_d36_512, llamagen_b, llamagen_l, llamagen_xl_384."""
    batches: tuple[int, ...] = (1, 16)
    """Images at a time."""
    precisions: tuple[Precision, ...] = ()
    """float32, bfloat16, float16 (CUDA); by default float32 and, where the device computes in it, bfloat16."""
    profile: bool = False
    """Also write OUT_profile.md: where the time of one step with decoding goes, by operation, for the first batch."""
    out: Path = Path("bench_sample")
    """OUT.json and OUT.md are written."""

    def __post_init__(self) -> None:
        """Refuse nothing to time."""
        super().__post_init__()
        if not self.models or not self.batches or min(self.batches) < 1:
            raise InputError("models and batches must name at least one, and batches be at least 1")


COLUMNS = {
    "model": Column("model", ""),
    "batch": Column("batch", "d"),
    "precision": Column("precision", ""),
    "teacher": Column("teacher (s)", ".3g"),
    "one_step": Column("one step (s)", ".3g"),
    "decoding": Column("decoding (s)", ".3g"),
    "images_per_second": Column("images/s", ".3g"),
    "faster_tokens": Column("times faster, tokens", ".1f"),
    "faster": Column("with decoding", ".1f"),
    "share": Column("share of matmul", ".0%"),
    "decoding_share": Column("decoder's", ".0%"),
    "peak_gb": Column("peak (GB)", ".2f"),
    "paper": Column("paper's times", ".1f"),
}
"""Seconds are per image."""


def bench_sample(config: BenchSampleConfig) -> None:
    """Measure and write the table."""
    device = pick_device(config.device)
    default: list[Precision] = ["float32", *(["bfloat16"] if fast_bfloat16(device) else [])]  # pyright: ignore
    dtypes = [pick_precision(name, device) for name in config.precisions or default]
    matmul = {dtype: matmul_rate(device, dtype) for dtype in dtypes}
    rows: list[dict[str, Any]] = []
    profiles: list[str] = []
    with progress("bench", len(config.models) * len(config.batches) * len(dtypes), "case") as bar:
        for name in config.models:
            teacher, ways = _networks(name, config, device)
            flops = _flops(teacher, ways)
            for batch in config.batches:
                for dtype in dtypes:
                    lowered = ways.in_precision(dtype)
                    found = _measured(lowered, batch, config.repeats)
                    if config.profile and batch == config.batches[0]:
                        profiles.append(_profile(lowered, batch, f"{name}, batch {batch}, {name_of(dtype)}"))
                    shares = {
                        "share": flops["one_step"] / found["one_step"] / matmul[dtype],
                        "decoding_share": flops["decoding"] / found["decoding"] / matmul[dtype],
                    }
                    named = {"model": name, "batch": batch, "precision": name_of(dtype), "paper": PAPER.get(name)}
                    rows.append({**named, **found, **shares, "flops": flops})
                    say(f"{name}, batch {batch}, {name_of(dtype)}: {found['faster']:.1f} times faster than the teacher")
                    bar.update()
    rates = {name_of(dtype): rate for dtype, rate in matmul.items()}
    write_results(config, "sample", device, rows, COLUMNS, matmul_flops_per_second=rates)
    if profiles:
        write_atomic(config.out.with_name(f"{config.out.name}_profile.md"), "\n".join(profiles))


def _profile(ways: Ways, batch: int, title: str) -> str:
    """Operations that take at least a hundredth of the time, as a table."""
    teacher = ways.known_teacher
    cond, one_step = teacher.conditions.default(batch, teacher.device), ways.one_step()
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        ways.decode(one_step(cond, range(batch)), cond)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    lines = [f"{title}:", "", "| operation | calls | share |", "|---|---:|---:|"]
    for event in events:
        share = event.self_cpu_time_total / whole
        if share >= 0.01:
            lines.append(f"| {event.key.removeprefix('aten::')} | {event.count} | {share:.1%} |")
    return "\n".join([*lines, ""])


def _networks(name: str, config: BenchSampleConfig, device: torch.device) -> tuple[CodeTeacher, Ways]:
    teacher = bench_teacher(name, device, config.seed)
    run = load_config(DistillConfig, paper_recipe(name))
    student = Student.from_teacher(teacher, run.head).eval().requires_grad_(False)
    nn.init.normal_(student.head.output.weight, std=0.01)
    return teacher, Ways(Generator.of(student, teacher), teacher, run.csd.sampling)


def _measured(ways: Ways, batch: int, repeats: int) -> dict[str, float]:
    teacher = ways.known_teacher
    cond = teacher.conditions.default(batch, teacher.device)
    seeds, tokens = list(range(batch)), torch.randn(batch, *teacher.backbone.token_shape, device=teacher.device)
    one_step, by_teacher = ways.one_step(), ways.by_teacher()
    calls: dict[str, Callable[[], object]] = {
        "teacher": lambda: by_teacher(cond, seeds),
        "one_step": lambda: one_step(cond, seeds),
        "decoding": lambda: ways.decode(tokens, cond),
    }
    with torch.inference_mode():
        seconds = {name: value / batch for name, value in seconds_per_call(calls, repeats).items()}
        peak = peak_of_process(lambda: ways.decode(one_step(cond, seeds), cond), teacher.device)
    whole = seconds["one_step"] + seconds["decoding"]
    return {
        **seconds,
        "images_per_second": 1 / whole,
        "faster_tokens": seconds["teacher"] / seconds["one_step"],
        "faster": (seconds["teacher"] + seconds["decoding"]) / whole,
        "peak_gb": peak / 1e9,
    }


def _flops(teacher: CodeTeacher, ways: Ways) -> dict[str, float]:
    """Operations of one pass of the generator and of decoding, of one image, counted and not computed."""
    student, tokenizer = copy.deepcopy(ways.generator.student).to("meta"), copy.deepcopy(teacher.tokenizer).to("meta")
    noise = torch.empty(1, *teacher.backbone.token_shape, device="meta")
    cond = teacher.conditions.empty(1, "meta")
    return {
        "one_step": footprint(lambda: student.as_generator(noise, cond), student).flops,
        "decoding": footprint(lambda: tokenizer.decode_codes(noise), tokenizer).flops,
    }
