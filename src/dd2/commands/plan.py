"""dd2 plan: does a distillation fit, and how long does it take, before any GPU is asked for."""

from pathlib import Path

import torch

from dd2.checkpoints.released import RELEASED, sketch
from dd2.checkpoints.runs import open_teacher
from dd2.commands.distill_config import refuse_without_codes
from dd2.commands.needs import OF_A_MICRO_BATCH, RESERVE, Needs, needs
from dd2.commands.plan_config import GB, PlanConfig
from dd2.errors import InputError
from dd2.external import is_code
from dd2.processes import say
from dd2.teachers.base import Teacher
from dd2.teachers.code import require_codes
from dd2.teachers.masked import MaskedBackbone


def plan(config: PlanConfig) -> Needs:
    """Print what the distillation needs and what to change if it does not fit.

    Raises:
        InputError: neither a released model nor a teacher's folder is named.
    """
    teacher = _teacher(config)
    teacher.check(config.csd.sampling)
    refuse_without_codes(config, teacher)
    found = needs(config, teacher)
    say(_described(config, found))
    return found


def _teacher(config: PlanConfig) -> Teacher:
    if config.model:
        return sketch(config.model)
    if not (is_code(config.teacher) or config.teacher == "digits" or Path(config.teacher).is_dir()):
        raise InputError(
            f"teacher {config.teacher} is not there, so its sizes are unknown; give --model, one of {', '.join(RELEASED)}"
        )
    teacher = open_teacher(config.teacher, torch.device("cpu"), trust=config.trust)
    if not isinstance(teacher.backbone, MaskedBackbone):
        require_codes(teacher, "dd2 plan")
    return teacher.to("meta")


def _described(config: PlanConfig, found: Needs) -> str:
    csd = config.csd
    lines = [
        "parameters: " + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in found.parameters.items()),
        f"memory of each of {config.gpus} GPU{'s' if config.gpus > 1 else ''} ({config.loop.parallel}, {config.loop.precision}, "
        f"micro-batch {csd.batch}):",
    ]
    lines += [f"  {name:24}{size / GB:8.1f} GB" for name, size in found.memory.items()]
    fits = found.fits(config.bytes_per_gpu)
    lines.append(f"  {'in all':24}{found.total / GB:8.1f} GB of {config.memory}: {'fits' if fits else 'does not fit'}")
    iterations = csd.iterations + config.align.then_iterations
    hours = found.seconds * iterations / 3600
    lines.append(
        f"stage 2: {found.flops:.3g} operations an iteration (global batch {csd.batch * csd.accumulate}, K = {csd.k}), about "
        f"{found.seconds:.2f} s at {found.rate}; {iterations:,} iterations: about {hours:.1f} hours, "
        f"{hours * config.gpus:.0f} GPU hours"
    )
    if found.start:
        lines.append(
            f"before it, regress.*: {found.start:.3g} operations in all, about {found.start_seconds / 3600:.1f} hours, "
            "beside samples and pairs"
        )
    if csd.accumulate % config.gpus:
        lines.append(f"accumulate {csd.accumulate} is no multiple of {config.gpus} processes: choose another csd.accumulate")
    return "\n".join([*lines, *([] if fits else _advice(config, found))])


def _advice(config: PlanConfig, found: Needs) -> list[str]:
    """What to change, the cheapest first."""
    of_batch = sum(found.memory.get(name, 0.0) for name in OF_A_MICRO_BATCH)
    free = RESERVE * config.bytes_per_gpu - (found.total - of_batch)
    per_sequence = of_batch / config.csd.batch
    said = []
    if free > per_sequence:
        smaller = int(free / per_sequence)
        product = config.csd.batch * config.csd.accumulate
        said.append(f"- --csd.batch {smaller} or less, with csd.accumulate so that their product stays about {product}")
    if not config.loop.recompute:
        said.append("- --loop.recompute: activations shrink to what goes into the layers, for a third more operations")
    if config.loop.precision == "float32":
        said.append("- --loop.precision bfloat16: activations about halve")
    if config.loop.parallel == "ddp" and config.gpus > 1:
        said.append("- --loop.parallel fsdp2: all networks, averages, gradients and Adam are divided by the number of GPUs")
    if not said:
        said.append("- more GPUs, or larger ones: what is left is divided by nothing but their number")
    return ["to make it fit:", *said]
