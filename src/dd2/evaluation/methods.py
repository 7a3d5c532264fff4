"""What an evaluation compares: the ways to draw from a run, each with its name, its title and what decides its images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from dd2.baselines.marginal import MarginalSampler
from dd2.baselines.skip import skipped
from dd2.errors import InputError
from dd2.files import weights_digest
from dd2.precision import autocast
from dd2.sampling import Draw, Ways
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher, require_codes
from dd2.teachers.filtering import OtherSampling, Sampling

Drawn = tuple[Tensor, Tensor | None]
"""Images (B, channels, H, W), and their tokens (B, n, C) where the sequences are whole."""


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        title: what it is called in tables and pictures.
        draw: labels (B,) and B seeds to images and tokens.
        decides: what its images depend on beyond teacher, sampling and seeds, as JSON.
        floor: whether it is the teacher itself, whose row is drawn from other seeds than the reference.
    """

    title: str
    draw: Callable[[Tensor, list[int]], Drawn]
    decides: dict[str, Any] = field(default_factory=dict)
    floor: bool = False


def few_steps(k: int) -> str:
    """Name of the generator with k - 1 AR steps redrawn by the teacher."""
    return f"generator_{k}_steps"


def in_rounds(k: int) -> str:
    """Name of the generator with another number of rounds than it was trained with."""
    return f"generator_{k}_rounds"


def skip(m: int) -> str:
    """Name of the teacher without its last m AR steps."""
    return f"teacher_skip_{m}"


def teacher_in(steps: int) -> str:
    """Name of the teacher in so many AR steps."""
    return f"teacher_{steps}_steps"


def methods(
    ways: Ways,
    teacher: Teacher,
    marginal: MarginalSampler,
    marginal_of: object,
    steps: Sequence[int] = (),
    skips: Sequence[int] = (),
    teacher_steps: Sequence[int] = (),
    teacher_at: OtherSampling | None = None,
    guidance: Teacher | None = None,
    rounds: Sequence[int] = (),
) -> dict[str, Method]:
    """What is compared, by name, in the order in which it is shown.

    Args:
        ways: the run's networks.
        teacher: theirs.
        marginal: onestep*.
        marginal_of: what its samples are.
        steps: also the generator with the teacher redrawing its last k - 1 AR steps, for each k > 1 (Alg. 4).
        skips: also the teacher without its last m AR steps, for each m.
        teacher_steps: also the teacher in so many AR steps, where their number is free.
        teacher_at: also the teacher with other settings.
        guidance: also the guidance network, as the AR model that it is.
        rounds: also the generator in so many rounds, of one that was trained in several.

    Raises:
        InputError: a number of steps or rounds is not possible, or needs a teacher over codes.
    """
    one_step = one_step_method(ways, teacher)
    generator = one_step.decides
    own = _with_own_decoder(ways)
    aligned = _decoder(ways)
    own_steps = teacher.num_steps(ways.sampling)
    all_steps = _counted(own_steps, "AR step")

    def whole(draw: Draw, snap: bool = False) -> Callable[[Tensor, list[int]], Drawn]:
        return _whole(ways, teacher, draw, snap)

    found = {"teacher": Method(f"Teacher, {all_steps}", _whole(own, teacher, own.by_teacher()), floor=True)}
    if aligned:
        found["teacher_aligned"] = Method(f"Teacher, {all_steps}, aligned decoder", whole(ways.by_teacher()), aligned)
    if ways.tuned is not None:
        tuned = {"weights": weights_digest(ways.tuned.student), **aligned}
        found["ar_diffusion"] = Method(f"AR-diffusion (stage 1), {all_steps}", whole(ways.ar_diffusion()), tuned)
    found["generator"] = one_step
    if isinstance(teacher, CodeTeacher):
        nearest = whole(ways.one_step(), snap=True)
        found["generator_nearest"] = Method("Generator, one step, nearest codes", nearest, generator)
    trained = ways.generator.student.rounds
    for k in sorted({*rounds} - {trained}):
        drawn = whole(ways.in_rounds(k).one_step())
        found[in_rounds(k)] = Method(f"Generator, one step, {_counted(k, 'round')}", drawn, {**generator, "rounds": k})
    if ways.generator.student.has_two_passes:
        found["generator_two_passes"] = Method("Generator, two passes of its own", whole(ways.two_passes()), generator)
    if guidance is not None:
        drawn = replace(ways, teacher=guidance, sampling=Sampling()).by_teacher()
        decides = {"weights": weights_digest(guidance.backbone), **aligned}
        found["guidance"] = Method(f"Guidance network, {all_steps}", whole(drawn), decides)
    for k in sorted({k for k in steps if k > 1}):
        decides = {**generator, "prefix": ways.prefix}
        found[few_steps(k)] = Method(f"Generator and teacher, {k} steps", whole(ways.few_steps(k)), decides)
    if teacher_at is not None and teacher_at.given:
        found["teacher_at"] = _teacher_at(own, teacher, teacher_at)
    for m in skips:
        found[skip(m)] = Method(f"Teacher without its last {m} AR steps (skip-{m})", _skipped(ways, m))

    for count in sorted({*teacher_steps} - {own_steps}, reverse=True):
        found[teacher_in(count)] = _teacher_in(own, teacher, count, f"Teacher, {_counted(count, 'AR step')}")
    if teacher.in_steps(ways.sampling, 1) is None:
        found["onestep_marginal"] = _independent(own, teacher, marginal, marginal_of)
    else:
        found["onestep_marginal"] = _teacher_in(own, teacher, 1, "onestep*, all tokens at once (teacher, 1 AR step)")
    if aligned:
        own_decoder = {"teacher", "teacher_at", "teacher_aligned", "onestep_marginal"}
        own_decoder |= {*map(skip, skips), *map(teacher_in, teacher_steps)}
        for name in found.keys() - own_decoder:
            found[name] = replace(found[name], title=f"{found[name].title}, aligned decoder")
    return found


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _independent(ways: Ways, teacher: Teacher, marginal: MarginalSampler, marginal_of: object) -> Method:
    def drawn(labels: Tensor, seeds: list[int]) -> Drawn:
        tokens = marginal.draw(labels, seeds)
        return ways.decode(tokens, teacher.conditions(labels)), tokens

    decides = {"samples": marginal_of, "over": marginal.over}
    return Method(f"onestep*, independent tokens (per {marginal.over})", drawn, decides)


def _teacher_in(ways: Ways, teacher: Teacher, steps: int, title: str) -> Method:
    """The teacher in another number of AR steps.

    Raises:
        InputError: it has its own number of them.
    """
    sampling = in_steps(teacher, ways.sampling, steps)
    draw = _whole(ways, teacher, replace(ways, sampling=sampling).by_teacher())
    return Method(title, draw, {"ar_steps": steps})


def _teacher_at(ways: Ways, teacher: Teacher, other: OtherSampling) -> Method:
    """The teacher with settings of its own.

    Raises:
        InputError: they contradict what it is.
    """
    sampling = other.applied(ways.sampling)
    teacher.check(sampling)
    said = ", ".join(f"{name} {value}" for name, value in other.given.items())
    draw = _whole(ways, teacher, replace(ways, sampling=sampling).by_teacher())
    return Method(f"Teacher at {said}", draw, {"teacher_at": sampling.described()})


def in_steps(teacher: Teacher, sampling: Sampling, steps: int) -> Sampling:
    """The sampling that draws an image in so many AR steps.

    Raises:
        InputError: the teacher has its own number of them, or cannot take that many.
    """
    found = teacher.in_steps(sampling, steps)
    if found is None:
        raise InputError(f"teacher_steps is about masked teachers (MAR): this one has {teacher.num_steps(sampling)} AR steps")
    teacher.check(found)
    return found


def one_step_method(ways: Ways, teacher: Teacher) -> Method:
    """The generator as it is now."""
    decides = {"weights": weights_digest(ways.generator.student), **_decoder(ways)}
    several = ways.generator.student.rounds
    title = "Generator, one step" + (f" of {_counted(several, 'round')}" if several > 1 else "")
    return Method(title, _whole(ways, teacher, ways.one_step()), decides)


def _decoder(ways: Ways) -> dict[str, Any]:
    """What decides images beside their tokens, where the decoder is not the teacher's own (dd2 align-decoder)."""
    tokenizer = ways.generator.tokenizer
    return {} if tokenizer.aligned is None else {"decoder": weights_digest(tokenizer)}


def _with_own_decoder(ways: Ways) -> Ways:
    """The same, decoding as the teacher does: baselines keep the decoder that they are known with."""
    if ways.generator.tokenizer.aligned is None or ways.teacher is None:
        return ways
    return replace(ways, generator=replace(ways.generator, tokenizer=ways.teacher.tokenizer))


def _whole(ways: Ways, teacher: Teacher, draw: Draw, snap: bool = False) -> Callable[[Tensor, list[int]], Drawn]:
    def drawn(labels: Tensor, seeds: list[int]) -> Drawn:
        cond = teacher.conditions(labels)
        tokens = draw(cond, seeds)
        tokens = teacher.snap(tokens) if snap else tokens
        return ways.decode(tokens, cond), tokens

    return drawn


def _skipped(ways: Ways, m: int) -> Callable[[Tensor, list[int]], Drawn]:
    codes = require_codes(ways.known_teacher, f"skip-{m}")

    def drawn(labels: Tensor, seeds: list[int]) -> Drawn:
        with autocast(labels.device, ways.precision):
            return skipped(codes, codes.conditions(labels), ways.sampling, seeds, m), None

    return drawn


def absent(teacher: Teacher) -> list[str]:
    """What cannot be measured on a teacher, with the reason."""
    if isinstance(teacher, CodeTeacher):
        return []
    why = f"a {type(teacher).__name__} has continuous tokens, no codes"
    return [f"{name}: {why}" for name in ("teacher NLL", "distinct sequences", "nearest codes")]
