"""The captions of the scenes: texts that say which digits are where, and the scenes that each of them allows.

A scene is four cells, row by row: nothing, a digit, or a tilted digit. A caption is the set of scenes that it describes, so that
drawing one and judging an image by its cells are both a look into that set.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dd2.data.digits import CLASS_NAMES
from dd2.errors import InputError

SIDE = 2
"""Cells on a side."""

CELLS = SIDE**2

CELL_NAMES = ("nothing", *CLASS_NAMES, *(f"tilted {name}" for name in CLASS_NAMES))
"""What a cell may hold, by its number."""

PLACES = ("top left", "top right", "bottom left", "bottom right")

PLURALS = tuple(f"{name}{'es' if name in ('zero', 'six') else 's'}" for name in CLASS_NAMES)

HELD_OUT = 8
"""One set of scenes in so many is never trained on, under none of its captions."""

Part = Literal["seen", "unseen"]

Scene = tuple[int, ...]
"""Numbers of `CELL_NAMES`, four of them."""

Said = tuple[str, str, set[Scene]]
"""Kind, text and scenes of a caption."""


@dataclass(frozen=True)
class SceneCaption:
    """One caption.

    Attributes:
        text: what is said.
        scenes: all that it allows, in order.
        kind: what has to be read: "digit", "tilt", "place", "pair", "count".
    """

    text: str
    scenes: tuple[Scene, ...]
    kind: str

    @property
    def unseen(self) -> bool:
        """Whether it is kept from training. Of one digit anywhere none is, so that every word is learned."""
        if self.kind in ("digit", "tilt") and len(self.scenes) == CELLS:
            return False
        return int.from_bytes(hashlib.sha256(repr(self.scenes).encode()).digest()[:4], "big") % HELD_OUT == 0


@functools.cache
def captions(part: Part) -> tuple[SceneCaption, ...]:
    """All captions that training sees, or all that it does not."""
    return tuple(caption for caption in _all() if caption.unseen == (part == "unseen"))


@functools.cache
def _by_text() -> dict[str, frozenset[Scene]]:
    return {caption.text: frozenset(caption.scenes) for caption in _all()}


def agreement(texts: Sequence[str], cells: Tensor) -> Tensor:
    """Whether images hold exactly what their captions say.

    Args:
        texts: B captions of `captions`, in any case.
        cells: (B, 4) what is in the images' cells.

    Returns:
        (B,) booleans.

    Raises:
        InputError: a text is no caption of a scene.
    """
    known, said = _by_text(), [" ".join(text.lower().split()) for text in texts]
    if strange := [text for text, plain in zip(texts, said, strict=True) if plain not in known]:
        raise InputError(
            f"{strange[0]!r} is no caption of the scenes, so nobody can tell what belongs there; they are like "
            f"{_all()[-1].text!r}"
        )
    found = [tuple(cell) in known[plain] for plain, cell in zip(said, cells.tolist(), strict=True)]
    return torch.tensor(found, dtype=torch.bool)


@functools.cache
def _all() -> tuple[SceneCaption, ...]:
    said = itertools.chain(_single(), _pairs(), _counts())
    return tuple(SceneCaption(text, tuple(sorted(scenes)), kind) for kind, text, scenes in said)


def _single() -> Iterator[Said]:
    """One digit, upright or tilted, anywhere or somewhere."""
    for tilt, (digit, name) in itertools.product((0, len(CLASS_NAMES)), enumerate(CLASS_NAMES)):
        said = f"a tilted {name}" if tilt else f"{_article(name)} {name}"
        each = [_scene({place: 1 + digit + tilt}) for place in range(CELLS)]
        yield "tilt" if tilt else "digit", said, set(each)
        for place, scene in zip(PLACES, each, strict=True):
            yield "tilt" if tilt else "place", f"{said} in the {place}", {scene}


def _pairs() -> Iterator[Said]:
    """Two digits side by side, or one above the other."""
    apart = {"above": (0, 2, 1), "below": (2, 0, 1), "to the left of": (0, 1, 2), "to the right of": (1, 0, 2)}
    for (relation, (first, second, step)), a, b in itertools.product(apart.items(), range(10), range(10)):
        a_name, b_name = CLASS_NAMES[a], CLASS_NAMES[b]
        scenes = {_scene({first + k * step: 1 + a, second + k * step: 1 + b}) for k in range(SIDE)}
        yield "pair", f"{_article(a_name)} {a_name} {relation} {_article(b_name)} {b_name}", scenes


def _counts() -> Iterator[Said]:
    """Two to four digits of one kind or two, anywhere."""
    for number, digit in itertools.product((2, 3, 4), range(10)):
        yield "count", _many(number, digit), _arranged([digit] * number)
    for (m, n), a, b in itertools.product(((1, 1), (2, 1), (3, 1), (2, 2)), range(10), range(10)):
        if a != b:
            yield "count", f"{_many(m, a)} and {_many(n, b)}", _arranged([a] * m + [b] * n)


def _many(number: int, digit: int) -> str:
    name = CLASS_NAMES[digit]
    return f"{_article(name)} {name}" if number == 1 else f"{CLASS_NAMES[number]} {PLURALS[digit]}"


def _arranged(digits: Sequence[int]) -> set[Scene]:
    cells = [1 + digit for digit in digits] + [0] * (CELLS - len(digits))
    return set(itertools.permutations(cells))


def _scene(held: dict[int, int]) -> Scene:
    return tuple(held.get(place, 0) for place in range(CELLS))


def _article(name: str) -> str:
    return "an" if name == "eight" else "a"
