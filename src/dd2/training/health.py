"""Signs that a training has failed, read off the numbers that it logs anyway, each with its likely cause and a remedy."""

import bisect
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

STATE = "health"
"""Key of a row that holds what was first noticed at its step: kind -> sentence."""


KINDS = ("divergence", "collapse", "lagging guidance", "plateau", "dead codes", "off-code tokens", "average behind", "memorised")
"""What signs are called."""

WINDOW = 5
"""Rows whose median stands for the last of them, where a number is as noisy as a loss."""


@dataclass
class Course:
    """One number of a stage so far.

    Attributes:
        total: iterations of the whole stage.
        steps, values: where it was logged, and what it was.
        smooth: the medians of `WINDOW` values that end at each step; of as many as there are before.
        rate: the present learning rate as a share of the highest; 1 where none is logged.
    """

    total: int
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    smooth: list[float] = field(default_factory=list)
    rate: float = 1.0
    _highest: float = 0.0

    def add(self, step: int, value: float, rate: float) -> None:
        """The next row."""
        self.steps.append(step)
        self.values.append(value)
        self.smooth.append(statistics.median(self.values[-WINDOW:]))
        self._highest = max(self._highest, rate)
        self.rate = rate / self._highest if self._highest else 1.0

    @property
    def share(self) -> float:
        """How much of the stage is over."""
        return self.steps[-1] / self.total


Rule = Callable[[Course], str]
"""What is wrong with a course, as the end of a sentence that begins with its name; empty where nothing is."""


@dataclass(frozen=True)
class Rises:
    """A rule: a number is far above its own best.

    Attributes:
        factor: how far.
        noisy: look at medians.
        of_first: share of the first value below which a rise is none: of a loss that is nearly 0.
    """

    factor: float
    noisy: bool = True
    of_first: float = 0.0

    def __call__(self, course: Course) -> str:
        values, steps = (course.smooth, course.steps) if self.noisy else (course.values, course.steps)
        values, steps = values[self.first :], steps[self.first :]
        if (
            len(values) < max(2, self.first + 1)
            or not (best := min(values)) > 0
            or values[-1] <= max(self.factor * best, self.of_first * course.values[0])
        ):
            return ""
        where = steps[values.index(best)]
        return f"has risen to {values[-1]:.3g}, {values[-1] / best:.1f} times its best ({best:.3g} at step {where})"

    @property
    def first(self) -> int:
        """Rows before there is a median, and then as many before it is believed."""
        return WINDOW - 1 if self.noisy else 0


@dataclass(frozen=True)
class Stalls:
    """A rule: nothing has been gained for a share of the stage, though the rate is still high.

    Attributes:
        share: of the iterations.
        gain: as a share of the best before.
        rate: as a share of the highest.
    """

    share: float = 0.3
    gain: float = 0.01
    rate: float = 0.5

    def __call__(self, course: Course) -> str:
        split = bisect.bisect_right(course.steps, course.steps[-1] - self.share * course.total)
        old, new = course.smooth[WINDOW - 1 : split], course.smooth[split:]
        if not old or len(new) < 2 * WINDOW or course.rate < self.rate or min(new) < min(old) - self.gain * abs(min(old)):
            return ""
        return (
            f"has gained nothing for {self.share:.0%} of the iterations (best {min(old):.3g}), at {course.rate:.0%} of the rate"
        )


@dataclass(frozen=True)
class Below:
    """A rule: a value is too low once a share of the stage is over."""

    limit: float
    after: float = 0.5

    def __call__(self, course: Course) -> str:
        low = course.share >= self.after and course.values[-1] < self.limit
        return f"is {course.values[-1]:.3g}, below {self.limit:g}" if low else ""


@dataclass(frozen=True)
class EndsAbove:
    """A rule: a value is too high at the end of the stage."""

    limit: float

    def __call__(self, course: Course) -> str:
        high = course.share >= 1 and course.values[-1] > self.limit
        return f"is {course.values[-1]:.3g} at the end, above {self.limit:g}" if high else ""


@dataclass(frozen=True)
class Sign:
    """A way in which a stage fails, and how it shows.

    Attributes:
        kind: what it is called: "divergence", "collapse", …
        number: the key of the number that shows it.
        rule: when.
        meaning: its likely cause, and what to do.
        rate: the key of the learning rate that the rule looks at.
    """

    kind: str
    number: str
    rule: Rule
    meaning: str
    rate: str = ""


def loss_rises(number: str, factor: float = 2.0) -> Sign:
    """The sign of a loss that can only fall."""
    return Sign(
        "divergence",
        number,
        Rises(factor, of_first=0.1),
        "lower the learning rate, or clip the gradient at less (optim.clip_norm)",
    )


class Health:
    """Watches a stage.

    Args:
        signs: what to look for.
        total: iterations of the stage.
        rows: what was logged before, of earlier sessions.
    """

    def __init__(self, signs: Iterable[Sign], total: int, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.signs = tuple(signs)
        self.known: dict[str, str] = {}
        self._courses = {sign: Course(total) for sign in self.signs}
        for row in rows:
            self.see(row)

    @property
    def standing(self) -> dict[str, str]:
        """What the last row still shows, by kind: a sign that was noticed may have passed."""
        shown = {sign: sign.rule(course) for sign, course in self._courses.items() if course.steps}
        return {sign.kind: f"{sign.number} {seen}: {sign.meaning}" for sign, seen in shown.items() if seen}

    def see(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Look at a row of metrics.jsonl: what is noticed for the first time, by kind."""
        found: dict[str, str] = {}
        for sign, course in self._courses.items():
            if sign.number not in row:
                continue
            course.add(int(row["step"]), float(row[sign.number]), float(row.get(sign.rate, 0.0)))
            if sign.kind not in self.known and (seen := sign.rule(course)):
                found[sign.kind] = f"{sign.number} {seen}: {sign.meaning}"
                self.known |= found
        return found


def findings(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a run's rows say of its health, in their order, as sentences."""
    return [
        f"{kind} in {row['stage']} at step {row['step']}: {text}"
        for row in rows
        if isinstance(row.get(STATE), dict)
        for kind, text in row[STATE].items()
    ]
