"""dd2 demo: the whole method on the embedded digits, in minutes."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dd2.commands.distill import distill
from dd2.commands.distill_config import DistillConfig
from dd2.commands.evaluate import evaluate
from dd2.commands.train_classifier import TrainClassifierConfig, train_classifier
from dd2.commands.train_teacher import TrainTeacherConfig, train_teacher
from dd2.commands.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from dd2.config import load_config
from dd2.evaluation.config import EvaluateConfig
from dd2.evaluation.metrics import MetricConfig


@dataclass(frozen=True)
class DemoConfig:
    """Distil the embedded digits teacher into a one-step generator and report how good it is.

    Runs dd2 distill configs/digits.yaml, then dd2 evaluate: minutes on two cores. Look at OUT/report.html.
    """

    out: Path | None = None
    """Run folder; an interrupted demo in it is resumed. runs/demo, or with the choices below runs/demo_paper, …_from_scratch."""
    recipe: Literal["best", "paper"] = "best"
    """best: configs/digits.yaml, which goes beyond the paper (docs/method.md). paper: configs/digits_paper.yaml."""
    from_scratch: bool = False
    """Train tokenizer, teacher and classifier too, as the embedded ones were (about 20 minutes more)."""


def demo(config: DemoConfig) -> None:
    """Run the demo, or what is left of it."""
    chosen = ("_paper" if config.recipe == "paper" else "", "_from_scratch" if config.from_scratch else "")
    out = config.out or Path("runs/demo" + "".join(chosen))
    run = load_config(DistillConfig, "digits" + chosen[0])
    features = "digits"
    if config.from_scratch:
        parts = out / "parts"
        tokenizer = train_tokenizer(replace(load_config(TrainTokenizerConfig, "digits_tokenizer"), out=parts / "tokenizer"))
        teacher = train_teacher(
            replace(load_config(TrainTeacherConfig, "digits_teacher"), tokenizer=tokenizer, out=parts / "teacher")
        )
        features = str(train_classifier(TrainClassifierConfig(out=parts / "classifier")))
        run = replace(run, teacher=str(teacher))
    flags = (" --recipe paper" if config.recipe == "paper" else "") + (" --from-scratch" if config.from_scratch else "")
    again = f"dd2 demo --out {shlex.quote(str(out))}{flags}"
    distill(replace(run, out=out), resume=again)
    evaluate(EvaluateConfig(run=out, features=features, metrics=MetricConfig(kid_subsets=10)))
