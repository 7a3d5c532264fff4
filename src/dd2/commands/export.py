"""dd2 export: a generator to ship, from any checkpoint of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dd2.checkpoints.folder import check_sizes
from dd2.checkpoints.native import network_of
from dd2.checkpoints.record import FILE, RunRecord
from dd2.checkpoints.runs import open_generator, open_record_teacher
from dd2.commands.push import card_of
from dd2.config import OutPath, RunFolder
from dd2.errors import InputError
from dd2.files import writable_folder
from dd2.generator import Generator
from dd2.method.networks import average_name
from dd2.processes import say
from dd2.shipping.graph import ENDINGS, LIMITS, write_graph
from dd2.shipping.hub import located
from dd2.shipping.package import write_package
from dd2.teachers.base import Teacher
from dd2.training.checkpoint import best_step, load_network, steps

STAGES = ("match", "csd_aligned", "csd")
"""Stages that train a generator, the later one first."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a generator to ship from a run, finished or not, from a generator folder, or from owner/name on the Hub.

    folder: weights, tokenizer, model card, pictures (what dd2 push sends). torch, onnx: the one pass from noise and label to
    image as a static graph that needs no dd2; it is written once its images equal PyTorch's.
    """

    run: RunFolder
    """Run folder of dd2 distill; or a generator folder, or owner/name on the Hub."""
    out: OutPath = Path("generator")
    """Folder to write; or a file that ends in .pt2 or .onnx."""
    format: Literal["folder", "torch", "onnx"] = "folder"
    """folder; torch (torch.export, .pt2); onnx (extra onnx)."""
    average: str = "ema"
    """ema; one of csd.further_emas by its number, e.g. 0.999; or none, the weights as trained."""
    step: str = "newest"
    """Iteration of the checkpoint; newest, or best: the one whose average (csd.ema) has the lowest csd.validation. After
    alignment, or a stage of matching, these are the checkpoints of that further training."""
    rounds: int = 0
    """Of a generator trained in several rounds (networks.rounds), how many a pass has: fewer are faster; 0: as trained."""
    with_teacher: bool = False
    """Put the teacher into the folder too, so that more than one step can be drawn."""
    license: str = ""
    """Of the weights, for the folder's model card, as the Hub names it: mit, apache-2.0, cc-by-nc-4.0, other, …"""
    trust: tuple[str, ...] = ()
    """Modules of yours that the run may import, because its teacher was module:function."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of a folder, the format on disk (what it is drawn in is chosen where it is used). Of a graph, its arithmetic."""

    def __post_init__(self) -> None:
        """Refuse an ending that does not go with the format."""
        ending = ENDINGS.get(self.format, "") if self.format != "folder" else ""
        if ending and self.out.suffix != ending:
            raise InputError(f"out must end in {ending} for --format {self.format}, got {self.out}")
        if not ending and self.out.suffix in ENDINGS.values():
            raise InputError(f"out {self.out} is a file, and --format folder writes a folder; give --format torch or onnx")
        if self.format == "onnx" and self.dtype == "bfloat16":
            raise InputError("ONNX Runtime computes no convolution in bfloat16 on a CPU; give --dtype float16 or float32")
        if ending and (self.with_teacher or self.license):
            raise InputError("with_teacher and license are about --format folder, and a graph is the one pass alone; leave out")


def export(config: ExportConfig) -> Path:
    """Write it.

    Raises:
        InputError: there is no such run, checkpoint or average, or OUT exists.
        NumericalError: a graph does not compute what the network does.
    """
    empty = config.format == "folder" and config.out.is_dir() and not any(config.out.iterdir())
    if config.out.exists() and not empty:
        raise InputError(f"out {config.out} exists; choose another OUT")
    writable_folder(config.out.parent, "output folder")
    run, dtype = located(config.run), getattr(torch, config.dtype)
    record = RunRecord.read(run) if (run / FILE).is_file() else None
    generator, teacher, origin = _chosen(config, run, record)
    generator = generator.in_rounds(config.rounds)
    if config.format != "folder":
        difference = write_graph(config.out, generator, config.format, dtype)
        by = "at most" if dtype == torch.float32 else "on average"
        (n, channels), shape = generator.student.backbone.token_shape, generator.tokenizer.image_shape
        say(
            f"wrote {config.out} ({config.out.stat().st_size / 1e6:.1f} MB) from {origin}: noise (B, {n}, {channels}) and "
            f"condition to images (B, {', '.join(map(str, shape))}); {by} {difference:.1g} from PyTorch on random inputs "
            f"(allowed: {LIMITS[config.dtype]})"
        )
        return config.out
    if config.with_teacher and teacher is None:
        if record is None:
            raise InputError(f"{run} is no run, so its teacher is unknown; leave --with-teacher out")
        teacher = open_record_teacher(record, run, torch.device("cpu"), trust=config.trust)
    chosen = "" if (config.average, config.step) == ("ema", "newest") else f"{origin.replace(f'{run}/', '')} of its run"
    drawing = f"drawing in rounds: {config.rounds}" if config.rounds else ""
    card = card_of(run, config.out.name, config.license, changed=", ".join(filter(None, (chosen, drawing))))
    write_package(config.out, generator, card, dtype, teacher=teacher if config.with_teacher else None, record=record)
    say(f"wrote {config.out}: {origin}")
    return config.out


def _chosen(config: ExportConfig, run: Path, record: RunRecord | None) -> tuple[Generator, Teacher | None, str]:
    """The generator that is asked for, its teacher where that had to be opened, and where it is from."""
    kept = any(steps(run / "checkpoints" / stage) for stage in STAGES)
    if record is None or record.head is None or not kept:
        if config.average != "ema" or config.step != "newest":
            raise InputError(f"{run} keeps no checkpoints of stage 2, so there is no step or average to choose; leave them out")
        return open_generator(run, torch.device("cpu"), trust=config.trust), None, str(run)
    checkpoint = _checkpoint(config, run)
    file = checkpoint / f"{_file_name(config.average)}.safetensors"
    if not file.is_file():
        found = sorted(path.stem for path in checkpoint.glob("generator*.safetensors") if "optimizer" not in path.name)
        raise InputError(f"{checkpoint} has no average {config.average}; it holds {', '.join(found)}")
    teacher = open_record_teacher(record, run, torch.device("cpu"), trust=config.trust)
    sizes = record.masked or record.codes or record.head
    check_sizes(sizes, file, run / FILE)
    student = network_of(teacher, sizes)
    load_network(file, student)
    generator = Generator.of(student.eval().requires_grad_(False), teacher)
    return generator, teacher, f"{_file_name(config.average)} of {checkpoint}"


def _file_name(average: str) -> str:
    if average in ("ema", "none"):
        return {"ema": "generator_ema", "none": "generator"}[average]
    try:
        return average_name(float(average))
    except ValueError:
        raise InputError(f"average must be ema, none or a number of csd.further_emas, got {average!r}") from None


def _checkpoint(config: ExportConfig, run: Path) -> Path:
    """The checkpoint of stage 2 that is asked for; the later stage first."""
    if config.step not in ("newest", "best") and not config.step.isdigit():
        raise InputError(f"step must be newest, best or a number, got {config.step!r}")
    known = {stage: run / "checkpoints" / stage for stage in STAGES}
    for folder in known.values():
        step = {"newest": max(steps(folder), default=None), "best": best_step(folder)}.get(config.step, config.step)
        if step is not None and int(step) in steps(folder):
            return folder / f"{int(step):08d}"
    found = "; ".join(f"{stage}: {', '.join(map(str, steps(folder)))}" for stage, folder in known.items() if steps(folder))
    why = ", or none was judged: csd.validation is 0" if config.step == "best" else ""
    raise InputError(f"{run} keeps no checkpoint {config.step} of stage 2 (kept: {found or 'none'}){why}")
