"""What stage 2 takes, counted on networks without weights: parameters, memory, operations and time."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dd2.code_student import CodeGuidance, CodeStudent
from dd2.commands.bench import measured_rate
from dd2.commands.plan_config import PlanConfig
from dd2.device import tile_rows
from dd2.masked_student import MaskedStudent
from dd2.method.csd import Guidance
from dd2.method.match import channels_read, feature_sizes
from dd2.method.networks import copied_student, networks_over_codes
from dd2.scores import HeadScore
from dd2.student import OneStepNetwork, Student
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling
from dd2.teachers.layers import layer_stacks
from dd2.teachers.masked import MaskedBackbone
from dd2.training.footprint import Footprint, footprint

RESERVE = 0.9
"""Share of a GPU's memory that plans may fill; the rest is for fragments and libraries."""
OF_A_MICRO_BATCH = ("activations", "log p and Eq. 1", "logits")
"""Parts of the memory that grow with csd.batch."""


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

    @property
    def start_seconds(self) -> float:
        """Of the generator's start, all GPUs together."""
        return self.start / self.flops * self.seconds

    def fits(self, available: float) -> bool:
        """Whether it leaves enough of `available` bytes for what is not counted."""
        return self.total <= RESERVE * available


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
    if decisions := max(_decisions(generator_network), _decisions(guidance_network)):
        memory["logits"] = 3 * 4.0 * rows * codes * decisions
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
    sizes, read = feature_sizes(teacher, config.csd.match), channels_read(teacher)
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
        classifier = network.output
        return footprint(lambda: classifier(given.repeat(_decisions(network), 1, 1)), network)  # whatever the draws

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


def _decisions(network: Network) -> int:
    """How often a network over codes decides every token: once a round; 0 of one that is not."""
    if isinstance(network, CodeStudent):
        return network.config.rounds
    return int(isinstance(network, CodeGuidance))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
