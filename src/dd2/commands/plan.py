"""dd2 plan: does a distillation fit, and how long does it take, before any GPU is asked for."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dd2.checkpoints.released import RELEASED, sketch
from dd2.checkpoints.runs import open_teacher
from dd2.code_student import CodeGuidance, CodeStudent
from dd2.commands.bench import measured_rate
from dd2.commands.distill_config import DistillConfig, refuse_without_codes
from dd2.device import tile_rows
from dd2.errors import InputError
from dd2.external import is_code
from dd2.masked_student import MaskedStudent
from dd2.method.csd import Guidance
from dd2.method.match import feature_sizes
from dd2.method.networks import copied_student, networks_over_codes
from dd2.processes import say
from dd2.scores import HeadScore
from dd2.student import OneStepNetwork, Student
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher, require_codes
from dd2.teachers.filtering import Sampling
from dd2.teachers.layers import layer_stacks
from dd2.teachers.masked import MaskedBackbone
from dd2.training.footprint import Footprint, footprint

GB = 1e9
RESERVE = 0.9
"""Share of a GPU's memory that plans may fill; the rest is for fragments and libraries."""


@dataclass(frozen=True)
class PlanConfig(DistillConfig):
    """What a distillation needs: dd2 plan configs/var_d16.yaml --model var_d16 --gpus 8 --memory 80GB.

    Networks are laid out without weights, and nothing is computed. Parameters and operations are exact; memory adds up
    what must be there at once; time assumes a share of the peak rate.
    """

    model: str = ""
    """A released model (var_d16 …, llamagen_b …) whose sizes to plan with; by default the teacher's folder."""
    gpus: int = 1
    """Processes, one GPU each."""
    memory: str = "80GB"
    """Of each GPU."""
    tflops: float = 990.0
    """Peak rate of a GPU in the configured precision (H100, bfloat16: 990)."""
    utilisation: float = 0.35
    """Share of the peak rate that is reached."""
    rates: Path | None = None
    """Results of dd2 bench train on such a GPU: its measured rate in place of tflops and utilisation."""

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        super().__post_init__()
        if self.gpus < 1 or self.tflops <= 0 or not 0 < self.utilisation <= 1:
            raise InputError("gpus must be at least 1, tflops positive, utilisation in (0, 1]")
        if not re.fullmatch(r"\d+(\.\d+)?\s*(GB)?", self.memory):
            raise InputError(f"memory must be a number of gigabytes such as 80GB, got {self.memory!r}")

    @property
    def bytes_per_gpu(self) -> float:
        """Memory of each GPU."""
        return float(self.memory.removesuffix("GB")) * GB


@dataclass(frozen=True)
class Needs:
    """What stage 2 takes.

    Attributes:
        parameters: of teacher, tokenizer, backbone and head.
        memory: bytes of each part on one GPU.
        flops: of one iteration, all GPUs together.
        seconds: of one iteration.
        rate: that the seconds are counted with, and where it is from.
        start: operations of the generator's start (regress.*) in all, samples and pairs not counted.
    """

    parameters: dict[str, int]
    memory: dict[str, float]
    flops: float
    seconds: float
    rate: str
    start: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on one GPU."""
        return sum(self.memory.values())

    def fits(self, available: float) -> bool:
        """Whether it leaves enough of `available` bytes for what is not counted."""
        return self.total <= RESERVE * available


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


def needs(config: PlanConfig, teacher: Teacher) -> Needs:
    """Parameters, memory, operations and time of stage 2 on a teacher without weights; stage 1 needs less at the same batch."""
    csd, batch = config.csd, config.csd.batch
    generator_network, guidance_network = _networks(config, teacher)
    guided = 2 if _is_guided(teacher, csd.sampling) else 1
    passes, drawn = (_passes(config, teacher, network, guided) for network in (guidance_network, generator_network))
    backbone_size, teacher_size = _count(generator_network.backbone), sum(map(_count, teacher.stored_parts.values()))
    sizes = {"teacher": teacher_size, "tokenizer": _count(teacher.tokenizer), "backbone": backbone_size}
    if head_size := _count(generator_network) - backbone_size:  # of a masked network it is part of the backbone
        sizes["head"] = head_size
    network = 4.0 * _count(generator_network)
    both = network + 4.0 * _count(guidance_network)
    shards = config.gpus if config.loop.parallel == "fsdp2" else 1
    whole = teacher_size - _count(teacher.backbone) + sizes["tokenizer"]
    frozen = 4.0 * (_count(teacher.backbone) / shards + whole)
    averages = 1 + len(csd.further_emas)
    half = 0.5 if config.loop.precision == "bfloat16" else 1.0
    codes, channels = teacher.num_codes if isinstance(teacher, CodeTeacher) else 0, teacher.backbone.token_shape[1]
    rows, allowed = batch * teacher.order.n, min(csd.sampling.top_k or codes, codes)
    prior = min(4.0 * codes, 8.0 * allowed) * rows  # log p of all codes, or log p and ids of the kept ones
    tile = 4.0 * codes * tile_rows(codes, torch.device("cuda")) if codes else 0.0
    # The residual stream is float32 whatever the autocast: a layer keeps it twice, or once if the layer is computed again.
    backbone_of = generator_network.backbone
    layers, kept = sum(map(len, layer_stacks(backbone_of))), drawn["backbone"].saved
    stream = 4.0 * layers * batch * backbone_of.positions * backbone_of.width
    if config.loop.recompute and layers:
        kept = (kept - 2 * stream) / layers  # the inside of one layer at a time
    else:
        kept, stream = kept - 2 * stream, 2 * stream
    guidance = kept + passes["guidance_head"].saved
    # SiD's and SIM's gradient needs the guidance head's activations; DMD's is a difference of two values.
    generator = kept + drawn["one_head"].saved + (passes["generator_head"].saved if csd.d != "dmd" else 0.0)
    memory = {
        "teacher and tokenizer": frozen,
        "generator and guidance": both / shards,
        "averages": averages * network / shards,
        "gradients": both / shards,
        "Adam": 2 * both / shards,
        "activations": half * max(guidance, generator) + stream,
        "log p and Eq. 1": prior
        + 3 * min(tile, 4.0 * csd.generator_draws * rows * codes)
        + 4.0 * csd.generator_draws * rows * channels * 8,
    }
    # Of one network over codes at a time: logits, their log-softmax and the gradient, in float32.
    rounds = generator_network.config.rounds if isinstance(generator_network, CodeStudent) else 0
    if deciding := max(rounds, int(isinstance(guidance_network, CodeGuidance))):
        memory["logits"] = 3 * 4.0 * rows * codes * deciding
    backbone, heads = passes["backbone"], passes["generator_head"]
    generated = drawn["backbone"].flops + drawn["one_head"].flops
    again = backbone.flops if config.loop.recompute else 0.0
    guidance_update = again + sum(part.flops + part.backward for part in (backbone, passes["guidance_head"]))
    batches = 1 if csd.share_generated else csd.k
    # SiD and SIM differentiate the guidance head in its input alone: half of a backward pass.
    redone = drawn["backbone"].flops if config.loop.recompute else 0.0
    generator_update = generated + redone + drawn["backbone"].backward + drawn["one_head"].backward
    generator_update += backbone.flops + passes["teacher"].flops
    through = 1 if codes else 1 + guided  # heads that are differentiated in their input: a masked teacher's too
    generator_update += heads.flops + (through * heads.backward / 2 if csd.d != "dmd" else 0.0)
    matched = passes["matched"]
    if csd.match.weight:
        generator_update += matched.flops + matched.backward
        memory["activations"] += half * matched.saved
        memory["matching"] = _of_matching(config, teacher)
    flops = csd.accumulate * (csd.k * guidance_update + batches * generated + generator_update)
    rate, described = _rate(config)
    regress = config.regress
    regression = generated + redone + drawn["backbone"].backward + drawn["one_head"].backward
    regression += regress.own_share * passes["teacher"].flops  # sequences without a pair ask the teacher
    start = regress.iterations * regress.accumulate * (regress.batch / batch) * regression
    start += regress.guidance_iterations * csd.accumulate * (guidance_update + generated)
    return Needs(sizes, memory, flops, flops / (config.gpus * rate), described, start)


def _of_matching(config: PlanConfig, teacher: Teacher) -> float:
    """Bytes of fixed projections and of the moments: memory, batch, sum, reference and what their distance is found with."""
    sizes, (positions, channels) = feature_sizes(teacher, config.csd.match), teacher.backbone.token_shape
    read = {"projected": positions * teacher.backbone.width, "tokens": positions * channels, "condition": teacher.backbone.width}
    squared = 8.0 * sum(sizes.values()) ** 2
    return sum(4.0 * read[name] * size for name, size in sizes.items() if name in read) + 8 * squared


Network = OneStepNetwork | CodeGuidance


def _is_guided(teacher: Teacher, sampling: Sampling) -> bool:
    """Whether it needs a pass without the condition."""
    if isinstance(teacher, CodeTeacher):
        return bool((teacher.cfg_weights(sampling) != 1).any())
    return sampling.cfg_scale not in (None, 1.0)


def _networks(config: PlanConfig, teacher: Teacher) -> tuple[OneStepNetwork, Guidance]:
    """Generator and guidance network without weights."""
    generator, guidance = networks_over_codes(config.networks, teacher)
    with_head = (copied_student(teacher, config.networks) or Student.from_teacher(teacher, config.head)).to("meta")
    return (
        with_head if generator is None else generator.to("meta"),
        with_head if guidance is None else guidance.to("meta"),
    )


def _passes(config: PlanConfig, teacher: Teacher, network: Network, guided: int) -> dict[str, Footprint]:
    """Forward passes of one micro-batch; of masked networks as if all tokens were known, the most that a pass can cost."""
    csd, order = config.csd, teacher.order
    tokens = torch.empty(csd.batch, *teacher.backbone.token_shape, device="meta")
    cond = teacher.conditions.empty(csd.batch, "meta")

    def features() -> Tensor:
        if isinstance(network, CodeStudent):
            found = network.own.own_features(tokens, cond, lambda index, x: x)
            for _ in range(network.config.rounds - 1):
                assert network.again is not None
                found = found + network.again.features(tokens, tokens, cond)
            return found
        return network.backbone(tokens, cond)

    def head(draws: int) -> Footprint:
        given = torch.empty(csd.batch, order.n, network.backbone.width, device="meta", requires_grad=True)
        x = tokens.expand(draws, *tokens.shape)
        if isinstance(network, MaskedStudent):
            masked = network.masked
            return footprint(lambda: masked.head(x, x[..., 0].long(), given)[0], network)
        if isinstance(network, Student):
            velocity_head = network.head
            return footprint(lambda: HeadScore(velocity_head, given).velocity(x, x[..., 0]), network)
        assert isinstance(network, CodeStudent | CodeGuidance)
        classifier, rounds = network.output, network.config.rounds if isinstance(network, CodeStudent) else 1
        return footprint(lambda: classifier(given.repeat(rounds, 1, 1)), network)  # once a round, whatever the draws

    frozen = copy.deepcopy(teacher).requires_grad_(False)
    twice = tokens.repeat(guided, 1, 1), teacher.conditions.empty(guided * csd.batch, "meta")

    def asked() -> Tensor:
        if isinstance(teacher, CodeTeacher):
            return teacher.logits(*twice)
        assert isinstance(teacher.backbone, MaskedBackbone)
        x = twice[0].expand(csd.generator_draws, *twice[0].shape)
        return teacher.backbone.head(x, x[..., 0].long(), teacher.features(*twice))[0]

    return {
        "backbone": footprint(features, network),
        "one_head": head(1),
        "guidance_head": head(csd.guidance_draws),
        "generator_head": head(csd.generator_draws),
        "teacher": footprint(asked, teacher),
        "matched": footprint(lambda: frozen.features(tokens.detach().requires_grad_(), cond), frozen),
    }


def _rate(config: PlanConfig) -> tuple[float, str]:
    """Operations a second of one GPU, and where the number is from."""
    if config.rates is None:
        return config.tflops * 1e12 * config.utilisation, f"{config.tflops:g} TFLOP/s at {config.utilisation:.0%}"
    rate, source = measured_rate(config.rates, config.model, config.loop.precision)
    return rate, f"{rate / 1e12:.3g} TFLOP/s {source}"


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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
        hours = found.start / found.flops * found.seconds / 3600
        lines.append(
            f"before it, regress.*: {found.start:.3g} operations in all, about {hours:.1f} hours, beside samples and pairs"
        )
    if csd.accumulate % config.gpus:
        lines.append(f"accumulate {csd.accumulate} is no multiple of {config.gpus} processes: choose another csd.accumulate")
    return "\n".join([*lines, *([] if fits else _advice(config, found))])


def _advice(config: PlanConfig, found: Needs) -> list[str]:
    """What to change, the cheapest first."""
    free = RESERVE * config.bytes_per_gpu - (found.total - found.memory["activations"] - found.memory["log p and Eq. 1"])
    per_sequence = (found.memory["activations"] + found.memory["log p and Eq. 1"]) / config.csd.batch
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
