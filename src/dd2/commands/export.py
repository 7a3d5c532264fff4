"""dd2 export: a generator to ship, from any checkpoint of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dd2.checkpoints.folder import check_sizes
from dd2.checkpoints.native import network_of, save_generator
from dd2.checkpoints.record import FILE, RunRecord
from dd2.checkpoints.runs import open_record_teacher
from dd2.config import OutPath, RunFolder
from dd2.errors import InputError
from dd2.generator import Generator
from dd2.method.networks import average_name
from dd2.processes import say
from dd2.training.checkpoint import best_step, load_network, steps

STAGES = ("match", "csd_aligned", "csd")
"""Stages that train a generator, the later one first."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a generator folder (one safetensors file, config.json, tokenizer) from a run, finished or not.

    dd2 distill writes RUN/generator by itself when it ends; this takes any checkpoint that is still kept, and any average.
    """

    run: RunFolder
    """Run folder of dd2 distill."""
    out: OutPath = Path("generator")
    """Folder to write."""
    average: str = "ema"
    """ema; one of csd.further_emas by its number, e.g. 0.999; or none, the weights as trained."""
    step: str = "newest"
    """Iteration of the checkpoint; newest, or best: the one whose average (csd.ema) has the lowest csd.validation. After
    alignment, or a stage of matching, these are the checkpoints of that further training."""
    trust: tuple[str, ...] = ()
    """Modules of yours that the run may import, because its teacher was module:function."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Format on disk. What it is drawn in is chosen where it is used (--precision)."""


def export(config: ExportConfig) -> Path:
    """Write the folder.

    Raises:
        InputError: there is no such run, checkpoint or average, or the folder exists.
    """
    if not (config.run / "config.yaml").is_file():
        raise InputError(f"{config.run} is no run of dd2 distill: it has no config.yaml")
    if config.out.exists():
        raise InputError(f"out {config.out} exists; choose another OUT")
    checkpoint = _checkpoint(config)
    file = checkpoint / f"{_file_name(config.average)}.safetensors"
    if not file.is_file():
        kept = sorted(path.stem for path in checkpoint.glob("generator*.safetensors") if "optimizer" not in path.name)
        raise InputError(f"{checkpoint} has no average {config.average}; it holds {', '.join(kept)}")
    record = RunRecord.read(config.run)
    if record.head is None:
        raise InputError(f"{config.run} is a run of dd2 {record.command}; its generator/ folder is all there is to ship")
    teacher = open_record_teacher(record, config.run, torch.device("cpu"), trust=config.trust)
    sizes = record.masked or record.codes or record.head
    check_sizes(sizes, file, config.run / FILE)
    student = network_of(teacher, sizes)
    load_network(file, student)
    save_generator(config.out, Generator.of(student, teacher), getattr(torch, config.dtype))
    say(f"wrote {config.out}: {_file_name(config.average)} of {checkpoint}")
    return config.out


def _file_name(average: str) -> str:
    if average in ("ema", "none"):
        return {"ema": "generator_ema", "none": "generator"}[average]
    try:
        return average_name(float(average))
    except ValueError:
        raise InputError(f"average must be ema, none or a number of csd.further_emas, got {average!r}") from None


def _checkpoint(config: ExportConfig) -> Path:
    """The checkpoint of stage 2 that is asked for; the later stage first."""
    if config.step not in ("newest", "best") and not config.step.isdigit():
        raise InputError(f"step must be newest, best or a number, got {config.step!r}")
    known = {stage: config.run / "checkpoints" / stage for stage in STAGES}
    for folder in known.values():
        step = {"newest": max(steps(folder), default=None), "best": best_step(folder)}.get(config.step, config.step)
        if step is not None and int(step) in steps(folder):
            return folder / f"{int(step):08d}"
    found = "; ".join(f"{stage}: {', '.join(map(str, steps(folder)))}" for stage, folder in known.items() if steps(folder))
    why = ", or none was judged: csd.validation is 0" if config.step == "best" else ""
    raise InputError(f"{config.run} keeps no checkpoint {config.step} of stage 2 (kept: {found or 'none'}){why}")
