"""What the page and the endpoint draw with: one pipeline, one drawing at a time, limits, and drawings that can be stopped."""

import math
import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL.Image import Image

from dd2.errors import InputError
from dd2.images import one_picture, png
from dd2.pipeline import OneStepPipeline
from dd2.precision import name_of
from dd2.seeding import SEEDS

Who = Literal["generator", "teacher"]

AT_ONCE = 8
"""Images between two looks at whether somebody still wants them."""

PROMPT = 1_000
"""Characters of a prompt, at most."""

FRAMES = 32
"""Of a walk, at most."""


class Busy(Exception):
    """Too many drawings wait already."""


class Stopped(Exception):
    """Whoever asked has left."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        images: at most.
        waiting: drawings that may wait for the one that runs.
    """

    images: int = 36
    waiting: int = 4


@dataclass(frozen=True)
class Drawing:
    """Images and what they took.

    Attributes:
        levels: uint8 (B, H, W, channels).
        labels, seeds: of each; classes by number, or prompts.
        seconds: for all.
    """

    levels: np.ndarray
    labels: list[int | str]
    seeds: list[int]
    seconds: float

    def grid(self) -> bytes:
        """One PNG of all, the same as dd2 sample writes."""
        return png(one_picture(self.levels))

    def enlarged(self, pixels: int) -> bytes:
        """The same, enlarged by a whole number to about so many pixels for the eye; never smaller."""
        height = self.levels.shape[1] * math.ceil(math.sqrt(len(self.levels)))
        return png(one_picture(self.levels, zoom=max(1, pixels // height)))


class Studio:
    """Draws for many, one after the other.

    Args:
        pipeline: what draws.
        name: under which the command line finds it.
        limits: of a request.
        trust: modules that it was told to import, for the commands that it prints.
    """

    def __init__(
        self, pipeline: OneStepPipeline, name: str | Path, limits: Limits | None = None, trust: Sequence[str] = ()
    ) -> None:
        self.pipeline, self.name, self.limits, self.trust = pipeline, str(name), limits or Limits(), tuple(trust)
        self.steps = pipeline.max_inference_steps
        self._turn, self._count, self._asked = threading.Lock(), threading.Lock(), 0

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher can be drawn from too."""
        return self.steps > 1

    def draw(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int],
        steps: int = 1,
        guidance_scale: float | None = None,
        who: Who = "generator",
        stop: threading.Event | None = None,
    ) -> Drawing:
        """Draw, once it is this request's turn.

        Args:
            labels, seeds: one of each per image.
            steps, guidance_scale: as `OneStepPipeline` knows them; of the teacher, the guidance alone.
            who: draws.
            stop: set by somebody else, ends it within a few images.

        Raises:
            InputError: what is asked for does not exist, or is too much.
            Busy: too many wait.
            Stopped: `stop` was set.
        """
        if not 1 <= len(labels) <= self.limits.images:
            raise InputError(f"images must be 1 to {self.limits.images} a request, got {len(labels)}")
        asked: list[int | str] = [self.known(label) for label in labels]
        parts = []
        with self._in_turn(stop):
            for start in range(0, len(asked), AT_ONCE):
                if stop is not None and stop.is_set():
                    raise Stopped
                chosen = slice(start, start + AT_ONCE)
                some, of = asked[chosen], list(seeds[chosen])
                if who == "teacher":
                    parts.append(self.pipeline.teacher(some, of, guidance_scale=guidance_scale))
                else:
                    more = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
                    parts.append(self.pipeline(some, of, **more))
        levels = _levels([image for part in parts for image in part.images])
        return Drawing(levels, asked, list(seeds), sum(part.seconds for part in parts))

    def known(self, label: int | str) -> int | str:
        """The number of a class that is named by number or name; of a text-conditional model a prompt as it is.

        Raises:
            InputError: it is neither.
        """
        if not (self.pipeline.by_text and isinstance(label, str)):
            return self.pipeline.get_label_ids([label])[0]
        if len(label) > PROMPT:
            raise InputError(f"a prompt may have {PROMPT:,} characters here, this one has {len(label):,}")
        return label

    def walk(self, a: int, b: int, frames: int, label: int | str, stop: threading.Event | None = None) -> bytes:
        """A PNG of frames from one seed's image to another's. Errors as `draw`."""
        if not 2 <= frames <= FRAMES:
            raise InputError(f"frames must be 2 to {FRAMES}, got {frames}")
        with self._in_turn(stop):
            images = self.pipeline.interpolate(a, b, frames, label)
        return png(one_picture(_levels(images), columns=min(frames, 8)))

    def warm_up(self) -> None:
        """Draw once, so that the first visitor's times are not those of allocations."""
        self.draw([self.first_label], [0])
        if self.has_teacher:
            self.draw([self.first_label], [0], who="teacher")

    @property
    def first_label(self) -> int | str:
        """Something that can be drawn."""
        return next(iter(self.pipeline.id2label.values()), "") if self.pipeline.by_text else 0

    def command(
        self, label: int | str, seed: int, count: int, steps: int, guidance_scale: float | None = None, who: Who = "generator"
    ) -> str:
        """The command that draws the same PNG."""
        prompt = self.pipeline.by_text and isinstance(label, str)
        asked = [f"--prompt={label}"] if prompt else ["--labels", str(label)]
        words = ["dd2", "sample", self.name, *asked, "--seed", str(seed), "--count", str(count)]
        words += ["--steps", str(steps)] if who == "generator" else ["--method", "teacher"]
        words += [] if guidance_scale is None else ["--cfg-scale", f"{guidance_scale:g}"]
        words += ["--trust", *self.trust] if self.trust else []
        words += ["--batch", str(AT_ONCE), "--precision", name_of(self.pipeline.dtype), "--out", f"{who}.png"]
        return shlex.join(words)

    @contextmanager
    def _in_turn(self, stop: threading.Event | None) -> Iterator[None]:
        with self._count:
            if self._asked > self.limits.waiting:
                raise Busy(f"{self._asked} drawings are under way or wait; try again in a moment")
            self._asked += 1
        try:
            while not self._turn.acquire(timeout=0.1):
                if stop is not None and stop.is_set():
                    raise Stopped
            try:
                yield
            finally:
                self._turn.release()
        finally:
            with self._count:
                self._asked -= 1


def seed_of(text: object) -> int:
    """A seed that somebody typed.

    Raises:
        InputError: it is none.
    """
    try:
        seed = int(str(text).strip()) if len(str(text)) < 40 else -1
    except ValueError:
        seed = -1
    if not 0 <= seed < SEEDS - 1000:
        raise InputError(f"seed must be a whole number from 0 to 2^62 - 1000, got {str(text)[:40]!r}")
    return seed


def _levels(images: Sequence[Image]) -> np.ndarray:
    """Pictures as uint8 (B, H, W, channels)."""
    found = np.stack([np.asarray(image) for image in images])
    return found if found.ndim == 4 else found[..., None]
