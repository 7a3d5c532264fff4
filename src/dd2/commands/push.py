"""dd2 push: a distilled generator to the Hugging Face Hub."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dd2.checkpoints.record import FILE, RunRecord
from dd2.config import RunFolder
from dd2.errors import InputError
from dd2.external import is_code
from dd2.pipeline import OneStepPipeline
from dd2.processes import say
from dd2.provenance import read_versions
from dd2.shipping.card import NAME, Card, measured


@dataclass(frozen=True)
class PushConfig:
    """Put a generator on the Hugging Face Hub: dd2 push runs/mine owner/name (extra hub).

    What is sent is what --format folder of dd2 export writes: weights, tokenizer and a model card with the results of the run's
    evaluation, what decides them, and pictures. Log in first by hf auth login, or set HF_TOKEN.
    """

    run: RunFolder
    """Run folder of dd2 distill, best after dd2 evaluate; or a generator folder."""
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """The repository; made where there is none."""
    private: bool = False
    """Of a new repository: for its owner alone."""
    revision: str | None = None
    """A branch, made where there is none; by default the main one."""
    with_teacher: bool = False
    """Send the teacher too, so that more than one step can be drawn."""
    license: str = ""
    """Of the weights, as the Hub names it: mit, apache-2.0, cc-by-nc-4.0, other, … The teacher's licence binds."""
    base_model: str = ""
    """The teacher's own repository on the Hub."""
    datasets: tuple[str, ...] = ()
    """What the teacher was trained on, by owner/name on the Hub."""
    trust: tuple[str, ...] = ()
    """Modules of yours that the run may import, because its teacher was module:function."""
    message: str = "Add a one-step generator"
    """Of the commit."""

    def __post_init__(self) -> None:
        """Refuse a name that cannot be one."""
        if not NAME.fullmatch(self.repo):
            raise InputError(f"the repository must be named owner/name, got {self.repo!r}")


def push(config: PushConfig) -> None:
    """Write the package and send it.

    Raises:
        InputError: there is no generator, or the Hub refuses.
    """
    card = card_of(config.run, config.repo, config.license, config.base_model, config.datasets)
    pipeline = OneStepPipeline.from_pretrained(config.run, device="cpu", dtype="float32", trust=config.trust)
    address = pipeline.push_to_hub(
        config.repo,
        private=config.private,
        revision=config.revision,
        commit_message=config.message,
        teacher=config.with_teacher,
        card=card,
    )
    say(f"pushed {config.run} to {config.repo}: {address}")


def card_of(
    run: Path,
    name: str = "one-step generator",
    license: str = "",
    base_model: str = "",
    datasets: tuple[str, ...] = (),
    changed: str = "",
) -> Card:
    """What a run's folder says for a model card; what it does not say is told.

    Args:
        run: the folder.
        name, license, base_model, datasets: as `Card`.
        changed: what is shipped otherwise than dd2 evaluate measures it.
    """
    if not (run / FILE).is_file():
        say(f"note: {run} is no run folder, so the card has no results and does not name the teacher", sys.stderr)
        return Card(name, license, base_model, datasets, changed=changed)
    if not license:
        say("note: the card states no licence (--license)", sys.stderr)
    record, numbers = RunRecord.read(run), None if changed else measured(run)
    if changed:
        say(f"note: the card has no results, as this is not what dd2 evaluate has measured: {changed}", sys.stderr)
    elif numbers is None:
        say(f"note: {run} was not evaluated, so the card has no results (dd2 evaluate {run})", sys.stderr)
    versions = run / "versions.json"
    return Card(
        name,
        license,
        base_model,
        datasets,
        teacher=_said(record.teacher),
        sampling=record.sampling.described(),
        numbers=numbers,
        made=read_versions(versions) if versions.is_file() else {},
        changed=changed,
    )


def _said(teacher: str) -> str:
    """A teacher in words: no path of this machine."""
    if teacher == "digits":
        return "dd2's embedded digits teacher"
    return f"the AR model of {teacher}" if is_code(teacher) else "an image AR model"
