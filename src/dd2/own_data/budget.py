"""Iterations and counts that a time allows, and what each stage will take of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from dd2.commands.train_teacher import HELD_OUT
from dd2.own_data.rates import Rates
from dd2.own_data.recipe import Counts, Task

SHARES = {"tokenizer": 0.12, "teacher": 0.33, "classifier": 0.04, "one_step": 0.42, "evaluate": 0.09}
"""Of the time; what a stage does not use goes to the later ones. About as docs/results/fashion.md spent it."""

EPOCHS = 200
"""Times that a teacher sees every image, at most: its best checkpoint is kept, and comes earlier."""

MOST = {"tokenizer": 5000, "classifier": 1500, "regress": 8000, "guidance": 100, "csd": 600}
LEAST = {"tokenizer": 200, "teacher": 300, "classifier": 100, "regress": 200, "csd": 30}
"""Iterations; below these nothing good can come of it."""

SAMPLES = (2048, 20480)
"""Sequences of the teacher, at least and at most."""

IMAGES = (1000, 10_000)
"""Evaluated, at least and at most."""

REGRESSED = 0.7
"""Share of the distillation's training that regresses the ODE; the rest matches scores and sequences."""

DRAWN = 2.5
"""Times that evaluation draws as many sequences as it counts, in the time of the teacher's."""


@dataclass(frozen=True)
class Budget:
    """What is to be done.

    Attributes:
        counts: of everything.
        seconds: of each stage, as estimated.
        short: minutes that would be enough, where these are too few; else 0.
    """

    counts: Counts
    seconds: Mapping[str, float]
    short: float = 0.0


def planned(task: Task, rates: Rates, minutes: float, batch: int) -> Budget:
    """How much of everything fits into the time."""
    left, shares = 60 * minutes, {stage: SHARES[stage] for stage in task.stages}
    seconds: dict[str, float] = {}

    def given(stage: str) -> float:
        """Seconds of a stage: its share of what the stages before have left."""
        rest = sum(shares[later] for later in task.stages if later not in seconds)
        return (left - sum(seconds.values())) * shares[stage] / rest

    tokenizer = _within(given("tokenizer") / rates.tokenizer, LEAST["tokenizer"], MOST["tokenizer"])
    seconds["tokenizer"] = tokenizer * rates.tokenizer
    token_images = min(2 * task.images, 120_000, max(4096, int(0.2 * given("teacher") / rates.token_image)))
    encoding = (token_images + HELD_OUT) * rates.token_image
    most = max(LEAST["teacher"], EPOCHS * task.images // batch)
    teacher = _within((given("teacher") - encoding) / rates.teacher, LEAST["teacher"], most)
    seconds["teacher"] = encoding + teacher * rates.teacher
    classifier = 0
    if "classifier" in task.stages:
        classifier = _within(given("classifier") / rates.classifier, LEAST["classifier"], MOST["classifier"])
        seconds["classifier"] = classifier * rates.classifier
    drawing = rates.sample + rates.pair
    samples = _within(0.2 * given("one_step") / drawing, *SAMPLES)
    training = given("one_step") - samples * drawing - rates.csd_start
    csd = _within((1 - REGRESSED) * training / rates.csd, LEAST["csd"], MOST["csd"])
    guidance = _within(0.05 * training / rates.guidance, 20, MOST["guidance"])
    regress = _within((training - csd * rates.csd - guidance * rates.guidance) / rates.regress, LEAST["regress"], MOST["regress"])
    seconds["one_step"] = samples * drawing + rates.csd_start
    seconds["one_step"] += regress * rates.regress + guidance * rates.guidance + csd * rates.csd
    evaluated = _within(given("evaluate") / (DRAWN * rates.sample), *IMAGES)
    seconds["evaluate"] = evaluated * DRAWN * rates.sample
    counts = Counts(tokenizer, token_images, teacher, classifier, samples, regress, guidance, csd, evaluated, batch)
    whole = sum(seconds.values())
    return Budget(counts, seconds, whole / 60 if whole > 1.1 * left else 0.0)


def _within(wanted: float, least: int, most: int) -> int:
    return max(least, min(most, int(wanted)))
