"""Makes what tables need, each thing once: folders are named by the hash of everything that decides their content."""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dd2.commands.dd1 import DD1RunConfig, distil_dd1
from dd2.commands.distill import distill
from dd2.commands.distill_config import DistillConfig
from dd2.commands.evaluate import evaluate
from dd2.commands.train_classifier import train_classifier
from dd2.commands.train_teacher import train_teacher
from dd2.commands.train_tokenizer import train_tokenizer
from dd2.errors import InputError
from dd2.evaluation.config import EvaluateConfig
from dd2.evaluation.metrics import MetricConfig
from dd2.fields import defaults, flat, with_fields
from dd2.files import atomic_folder, write_atomic
from dd2.places import with_absolute
from dd2.records import read_record
from dd2.reproduce.benches import Bench
from dd2.yaml_files import read_yaml

Changes = tuple[tuple[str, Any], ...]
"""Fields by dotted name that differ from the bench's configuration."""

CHECKPOINTS = 6
"""Of stage 2, for curves of quality against iterations."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        kind: of the paper's recipe stage1 and dd2 (stage 2, from its stage 1); best, the bench's own recipe; or dd1.
        seed: of everything in it.
        changes: what differs from the bench's configuration.
        continues: the run whose finished stage 2 this one goes on from (alignment).
    """

    kind: Literal["stage1", "dd2", "best", "dd1"]
    seed: int
    changes: Changes = ()
    continues: "Cell | None" = None

    @property
    def stage1(self) -> "Cell":
        """The stage 1 that a dd2 run starts from."""
        return Cell("stage1", self.seed, tuple(change for change in self.changes if change[0].startswith("tune.")))

    def __str__(self) -> str:
        """As a plan lists it."""
        changed = "".join(f", {name} {value}" for name, value in self.changes)
        return f"{self.kind} seed {self.seed}{changed}"


class Workshop:
    """The runs of one bench.

    Args:
        bench: scaled to the budget.
        root: folder of everything that is kept.
        count: images per method of every evaluation.
        device: where everything runs.
    """

    def __init__(self, bench: Bench, root: Path, count: int, device: str) -> None:
        self.bench, self.root, self.count, self.device = bench, root, count, device

    def folder(self, cell: Cell) -> Path:
        """Where a run is, made or not."""
        return self._folder(cell.kind, self._config(cell))

    def made(self, cell: Cell) -> bool:
        """Whether a run is finished."""
        return (self.folder(cell) / "generator" / "config.json").is_file()

    def prepare(self) -> None:
        """Train tokenizer, teacher and classifier, where the bench has its own."""
        if self.bench.tokenizer is not None and not (self._tokenizer_run() / "tokenizer").is_dir():
            train_tokenizer(replace(self.bench.tokenizer, out=self._tokenizer_run(), device=self.device))
        if self.bench.teacher is not None and not Path(self._teacher()).is_dir():
            tokenizer = self._tokenizer_run() / "tokenizer"
            train_teacher(replace(self.bench.teacher, out=self._teacher_run(), tokenizer=tokenizer, device=self.device))
        if self.bench.classifier is not None and not Path(self._features()).is_dir():
            train_classifier(replace(self.bench.classifier, out=self._classifier_run(), device=self.device))

    def prepared(self) -> bool:
        """Whether `prepare` has nothing left to do."""
        parts = [] if self.bench.teacher is None else [Path(self._teacher())]
        return all(path.is_dir() for path in [*parts, *([Path(self._features())] if self.bench.classifier else [])])

    def prepared_runs(self) -> list[Path]:
        """The runs that `prepare` makes, as far as they are there."""
        runs = [self._tokenizer_run()] if self.bench.tokenizer is not None else []
        runs += [self._teacher_run()] if self.bench.teacher is not None else []
        runs += [self._classifier_run()] if self.bench.classifier is not None else []
        return [run for run in runs if (run / "versions.json").is_file()]

    def run(self, cell: Cell) -> Path:
        """A run, made now unless it is there; an interrupted one goes on."""
        folder, config = self.folder(cell), self._config(cell)
        if self.made(cell):
            _check_defaults(folder, config)
            return folder
        if cell.kind == "dd2":
            self.run(cell.stage1)
        if cell.continues is not None:
            self._continue(self.run(cell.continues), folder)
        if isinstance(config, DistillConfig):
            distill(replace(config, out=folder))
        else:
            distil_dd1(replace(config, out=folder))
        return folder

    def evaluated(self, cell: Cell, **fields: Any) -> dict[str, Any]:
        """The numbers of a run under the evaluation that every run gets, plus `fields`."""
        folder = self.run(cell)
        config = EvaluateConfig(
            run=folder,
            features=self._features(),
            count=self.count,
            cache=self.root / "features",
            metrics=MetricConfig(kid_subsets=10),
            device=self.device,
            trust=(self._teacher(),),  # named by the user, if it is code
            **fields,
        )
        file = folder / "evaluations" / f"{self._digest(config, ('run', 'cache', 'device', 'trust'))}.json"
        if not file.is_file() or not _evaluated_alike(file, config):
            numbers = evaluate(config)
            file.parent.mkdir(exist_ok=True)
            write_atomic(file, json.dumps(numbers, indent=2) + "\n")
        return read_record(file, {"evaluation": dict}, "delete it, and it is made again")

    def _config(self, cell: Cell) -> DistillConfig | DD1RunConfig:
        base = {"dd1": self.bench.dd1, "best": self.bench.distill}.get(cell.kind, self.bench.paper)
        config = with_fields(base, {"seed": cell.seed, "device": self.device, "teacher": self._teacher(), **dict(cell.changes)})
        if cell.kind == "dd2":  # for curves
            every = max(1, config.csd.iterations // CHECKPOINTS)
            config = replace(config, loop=replace(config.loop, save_every=every, keep=2 * CHECKPOINTS))
        if isinstance(config, DD1RunConfig) or cell.kind == "best":
            return config
        if cell.kind == "stage1":
            return replace(config, csd=replace(config.csd, iterations=0))
        return replace(config, stage1=str(self.folder(cell.stage1)))

    def _folder(self, kind: str, config: Any) -> Path:
        return self.root / f"{kind}-{self._digest(config, FREE)}"

    def _digest(self, config: Any, without: tuple[str, ...]) -> str:
        """Hash of what decides a run; of other runs, the names of their folders, which are hashes themselves.

        Fields that have their defaults are no part of it, so that a field which dd2 gets later changes no name; nor is where the
        root and the images lie, so that what is made stays made where it is moved.
        """
        usual = defaults(type(config))
        kept = {
            name: self._named(name, value)
            for name, value in flat(config).items()
            if name not in without and not name.startswith("loop.") and (name not in usual or usual[name] != value)
        }
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:10]

    def _named(self, name: str, value: Any) -> Any:
        if name in ("stage1", "tokenizer", "run", "data") and value:
            return Path(value).name
        if name in ("teacher", "features") and Path(value).is_relative_to(self.root):
            return str(Path(value).relative_to(self.root))
        return value

    def _tokenizer_run(self) -> Path:
        return self._folder("tokenizer", self.bench.tokenizer)

    def _teacher_run(self) -> Path:
        assert self.bench.teacher is not None
        return self._folder("teacher", replace(self.bench.teacher, tokenizer=self._tokenizer_run()))

    def _classifier_run(self) -> Path:
        return self._folder("classifier", self.bench.classifier)

    def _teacher(self) -> str:
        return self.bench.distill.teacher if self.bench.teacher is None else str(self._teacher_run() / "teacher")

    def _features(self) -> str:
        if self.bench.classifier is None:
            return "digits"
        return str(self._classifier_run() / "classifier")

    def _continue(self, before: Path, folder: Path) -> None:
        """Start a run folder with another's finished stage 2, which it would repeat bit by bit."""
        if not folder.exists():
            with atomic_folder(folder) as partial:
                shutil.copytree(before / "checkpoints", partial / "checkpoints", dirs_exist_ok=True)
                shutil.copy(before / "metrics.jsonl", partial / "metrics.jsonl")


ELSEWHERE = ("run", "device", "trust", "cache", "features", "reference")
"""Fields of an evaluation that its numbers do not hold as they were given."""


def _evaluated_alike(file: Path, config: EvaluateConfig) -> bool:
    """Whether stored numbers are of the same fields, defaults included, as far as both know them."""
    kept = read_record(file, {"evaluation": dict}, "delete it, and it is made again")["evaluation"]
    now = {name: value for name, value in flat(config).items() if name not in ELSEWHERE}
    return all(kept[name] == value for name, value in now.items() if name in kept)


FREE = ("out", "device", "sample_batch")
"""Fields of a run that do not decide its content."""


def _check_defaults(folder: Path, config: Any) -> None:
    """Refuse a finished run that is known by the same name, but was made when a field had another default."""
    kept, now = with_absolute(read_yaml(folder / "config.yaml")), with_absolute(flat(config))
    for name, value in now.items():
        if name in (*FREE, "stage1", "teacher") or name.startswith("loop."):
            continue
        if name in kept and kept[name] != value:
            raise InputError(f"{folder} was made with {name} {kept[name]}, which is {value} now; remove it, and it is made again")
