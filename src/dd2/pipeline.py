"""A distilled generator for use: labels and seeds in, images out."""

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

import dd2.baselines  # noqa: F401  (folders may hold their networks)
from dd2.checkpoints.record import FILE, RunRecord
from dd2.checkpoints.runs import FinishedRun, open_generator, open_run
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.evaluation.path_length import slerp
from dd2.generator import Generator
from dd2.images import picture, to_uint8
from dd2.precision import Precision, pick_precision
from dd2.sampling import Draw, Ways
from dd2.seeding import image_noise, seeds_of, whole_number
from dd2.shipping.hub import located
from dd2.shipping.mixin import PushToHubMixin
from dd2.teachers.base import Teacher
from dd2.teachers.conditions import CaptionLabels, Conditions
from dd2.text.prompts import typed

BATCH = 64
"""Images at a time unless told otherwise."""

OutputType = Literal["pil", "np", "pt"]

Labels = int | str | Sequence[int | str]
"""What images are asked for by: one, or one each."""


class _Asked(NamedTuple):
    """Labels as numbers, and what they stand for."""

    numbers: list[int]
    conditions: Conditions


@dataclass(frozen=True)
class OneStepOutput:
    """What a call gives.

    Attributes:
        images: of each label, as `output_type` says: a list of Pillow images; numpy (B, H, W, channels) or torch (B, channels,
            H, W), float32 in [0, 1] on the CPU.
        tokens: (B, n, C) standardised, on the CPU, in the AR order.
        labels, seeds: as they were drawn, as numbers; of prompts the labels count them.
        seconds: that drawing and decoding took.
    """

    images: Any
    tokens: Tensor
    labels: list[int]
    seeds: list[int]
    seconds: float


class OneStepPipeline(PushToHubMixin):
    """Images of labels in one forward pass, or in a few with the teacher.

        pipe = OneStepPipeline.from_pretrained("runs/mine")
        pipe(labels=[3, "seven"], seeds=[0, 1]).images[0].save("three.png")

    Args:
        generator: the distilled network and its tokenizer, on one device.
        dtype: the arithmetic that it draws in.
        open_run: gives the run with its teacher, for more than one step; None where there is no teacher.
        text_encoder: where that of a text-conditional model lies, if not where it says.
    """

    def __init__(
        self,
        generator: Generator,
        dtype: torch.dtype = torch.float32,
        open_run: Callable[[], FinishedRun] | None = None,
        text_encoder: str = "",
    ) -> None:
        self.generator, self._text_encoder = generator, text_encoder
        self._dtype, self._open_run = dtype, open_run
        self._one_step = Ways(generator).in_precision(dtype)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        revision: str | None = None,
        device: str = "auto",
        dtype: Precision = "auto",
        token: str | None = None,
        *,
        local_files_only: bool = False,
        captions: str = "",
        text_encoder: str = "",
        trust: Sequence[str] = (),
        rounds: int = 0,
    ) -> "OneStepPipeline":
        """Load a run folder, a generator folder, or a Hugging Face repository that holds one.

        Args:
            name: a path, or "owner/name" on the Hub (needs `pip install "dd2[hub]"`).
            revision: of a repository on the Hub: a commit, which never changes, a tag or a branch.
            device: auto, cpu, cuda or cuda:N.
            dtype: "float32", "bfloat16", "float16" (CUDA), or "auto": bfloat16 where the device computes in it.
            token: of an account on the Hub; by default the one that `hf auth login` kept.
            local_files_only: take a repository from the cache alone.
            captions: for text-conditional models, what numbers as labels mean: a list of prompts, or a file of dd2
                text-features. By default the run's. Texts need none.
            text_encoder: for text-conditional models, where the encoder lies on this machine, if not where it was trained with
                it.
            trust: modules of yours that the generator may import, because its teacher was module:function.
            rounds: of a generator that was trained in several (`networks.rounds`), how many a pass has; 0: as trained.

        Raises:
            InputError: there is nothing to load, it is damaged, or was not trained in rounds.
        """
        place = pick_device(device)
        precision = pick_precision(dtype, place)
        path = located(name, revision, token, local_files_only=local_files_only)
        generator = open_generator(path, place, captions, trust, text_encoder).in_rounds(whole_number("rounds", rounds))
        opened = functools.partial(open_run, path, place, captions, trust, text_encoder) if (path / FILE).is_file() else None
        return cls(generator, precision, opened, text_encoder)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.generator.device

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic that it draws in."""
        return self._one_step.precision

    @property
    def by_text(self) -> bool:
        """Whether labels are prompts."""
        return isinstance(self.generator.conditions, CaptionLabels)

    @property
    def id2label(self) -> dict[int, str]:
        """Number of each label -> its name; the number again where nobody has named the classes. Of a text-conditional model its
        run's captions, or nothing where there are none: any text is a label then.
        """
        conditions = self.generator.conditions
        if self.by_text:
            return dict(enumerate(conditions.class_names))
        names = conditions.class_names or tuple(map(str, range(conditions.num_labels)))
        return dict(enumerate(names))

    def get_label_ids(self, labels: int | str | Sequence[int | str]) -> list[int]:
        """The numbers of labels that are named by number or name, in any case.

        Raises:
            InputError: one is not a class.
        """
        wanted = [labels] if isinstance(labels, str | Integral) else labels
        if not isinstance(wanted, Iterable):
            raise InputError(f"labels must be classes by number or name, got {labels!r}")
        return [self.generator.conditions.label(x if isinstance(x, str) else whole_number("labels", x)) for x in wanted]

    @property
    def max_inference_steps(self) -> int:
        """1 where the teacher is not at hand; with it, one more than its AR steps."""
        if self._open_run is None:
            return 1
        ways = self._with_teacher
        return ways.known_teacher.num_steps(ways.sampling) + 1

    def __call__(
        self,
        labels: Labels,
        seeds: Sequence[int] | None = None,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 1,
        guidance_scale: float | None = None,
        output_type: OutputType = "pil",
        nearest: bool = False,
        batch_size: int = BATCH,
    ) -> OneStepOutput:
        """Draw one image per label.

        Args:
            labels: classes by number or name; of a text-conditional model prompts, or numbers of the run's captions. One, or B.
            seeds: B seeds, one per image, below 2^62; by default 0 … B - 1.
            generator: random numbers that the seeds are drawn from, in their place; one, or one per image.
            num_inference_steps: 1: the generator alone. k: the teacher redraws the last k - 1 of its AR steps (Alg. 4).
            guidance_scale: of the teacher in those steps; by default as it was distilled. One step has its guidance built in.
            output_type: "pil", "np" or "pt".
            nearest: snap tokens to their nearest codes before decoding.
            batch_size: images at a time, which bounds the memory.

        Raises:
            InputError: a label is not a class, the seeds are not one per image, or what is asked for has no effect or no teacher.
        """
        asked = self._asked(labels)
        chosen = seeds_of(seeds, generator, len(asked.numbers))
        ways = self._ways(whole_number("num_inference_steps", num_inference_steps), guidance_scale)
        return self._drawn(ways, ways.few_steps(num_inference_steps), asked, chosen, batch_size, output_type, nearest=nearest)

    def teacher(
        self,
        labels: Labels,
        seeds: Sequence[int] | None = None,
        *,
        guidance_scale: float | None = None,
        output_type: OutputType = "pil",
        batch_size: int = BATCH,
    ) -> OneStepOutput:
        """The teacher's images of the same labels, step by step, to compare with. Arguments and errors as a call."""
        asked = self._asked(labels)
        chosen = seeds_of(seeds, None, len(asked.numbers))
        ways = self._guided(guidance_scale)
        return self._drawn(ways, ways.by_teacher(), asked, chosen, batch_size, output_type)

    def _drawn(
        self,
        ways: Ways,
        draw: Draw,
        asked: _Asked,
        seeds: list[int],
        batch: int,
        output_type: OutputType,
        *,
        nearest: bool = False,
    ) -> OneStepOutput:
        if whole_number("batch_size", batch) < 1:
            raise InputError(f"batch_size must be at least 1, got {batch}")
        if not asked.numbers:
            raise InputError("labels are empty; give one class per image")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what was asked of it before is not this call's
        start = time.perf_counter()
        batches = ways.batches(draw, asked.numbers, seeds, batch, nearest=nearest, conditions=asked.conditions)
        drawn = [(tokens.cpu(), images.cpu()) for tokens, images in batches]
        tokens, images = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return OneStepOutput(_as(images, output_type), tokens, asked.numbers, seeds, time.perf_counter() - start)

    def _asked(self, labels: Labels) -> _Asked:
        """Labels as numbers, and what these stand for. Of a text-conditional model all texts are prompts."""
        wanted = [labels] if isinstance(labels, str | Integral) else labels
        known = self.generator.conditions
        if not self.by_text or not isinstance(wanted, Iterable):
            return _Asked(self.get_label_ids(labels), known)
        wanted = list(wanted)
        texts = [text for text in wanted if isinstance(text, str)]
        if not texts:
            return _Asked(self.get_label_ids(wanted), known)
        if len(texts) < len(wanted):
            raise InputError("labels are prompts or numbers of captions, not some of each; draw them in two calls")
        return _Asked(list(range(len(texts))), known.of_texts(typed(texts), self._text_encoder, self.device))

    @torch.inference_mode()
    def interpolate(self, a: int, b: int, n: int, label: int | str = 0, *, output_type: OutputType = "pil") -> Any:
        """A walk from the image of seed a to that of seed b in n images of one label, ends included.

        The noise turns along the great circle between the two, so that each image in between is one of the model's own.

        Raises:
            InputError: the label is not a class, or n is below 2.
        """
        if n < 2:
            raise InputError(f"n must be at least 2, the two ends, got {n}")
        (number,), conditions = self._asked(label)
        shape = self.generator.student.backbone.token_shape
        ends = image_noise(seeds_of([a, b], None, 2), shape).flatten(1).to(self.device)
        noise = slerp(ends[:1], ends[1:], torch.linspace(0, 1, n, device=self.device)).view(n, *shape)
        ways, drawn = self._one_step, []
        for part in noise.split(BATCH):
            cond = conditions(torch.full((len(part),), number, device=self.device))
            drawn.append(ways.decode(ways.of_noise(part, cond), cond).cpu())
        return _as(torch.cat(drawn), output_type)

    @functools.cached_property
    def _teacher(self) -> tuple[Teacher, RunRecord] | None:
        """The teacher, opened when it is first needed."""
        if self._open_run is None:
            return None
        run = self._open_run()
        return run.teacher, run.record

    def teacher_to_ship(self) -> tuple[Teacher, RunRecord] | None:
        """As `PushToHubMixin.teacher_to_ship`."""
        return self._teacher

    @functools.cached_property
    def _with_teacher(self) -> Ways:
        """The networks with the teacher."""
        if self._teacher is None:
            raise InputError(
                "the teacher is unknown here, so there is one step only: load a run folder, or a package that holds the teacher"
            )
        teacher, record = self._teacher
        return Ways(self.generator, teacher, record.sampling).in_precision(self._dtype)

    def _ways(self, steps: int, guidance_scale: float | None) -> Ways:
        if steps != 1:
            return self._guided(guidance_scale)
        if guidance_scale is not None:
            raise InputError(
                "guidance_scale has no effect in one step, whose guidance was decided when it was distilled; leave it out, or "
                "give num_inference_steps"
            )
        return self._one_step

    def _guided(self, guidance_scale: float | None) -> Ways:
        ways = self._with_teacher
        if guidance_scale is None:
            return ways
        if not 0 <= guidance_scale < math.inf:
            raise InputError(f"guidance_scale must be a number from 0, got {guidance_scale}")
        sampling = replace(ways.sampling, cfg_scale=float(guidance_scale))
        ways.known_teacher.check(sampling)
        return replace(ways, sampling=sampling)


def _as(images: Tensor, output_type: OutputType) -> list[Image] | np.ndarray | Tensor:
    """Images (B, channels, H, W) in about [-1, 1] as the user wants them."""
    if output_type not in ("pil", "np", "pt"):
        raise InputError(f'output_type must be "pil", "np" or "pt", got {output_type!r}')
    if output_type == "pil":
        return [picture(levels) for levels in to_uint8(images)]
    unit = (images.float() / 2 + 0.5).clamp(0, 1)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).numpy()
