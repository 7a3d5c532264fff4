"""What a run folder says of itself: run.json, written when the run starts and read once by whatever opens it."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dd2.checkpoints.folder import construct
from dd2.code_student import CodeStudentConfig
from dd2.errors import InputError
from dd2.files import write_atomic
from dd2.masked_student import MaskedStudentConfig
from dd2.places import absolute
from dd2.records import Shape, read_record
from dd2.student import HeadConfig
from dd2.teachers.filtering import Sampling

FILE = "run.json"

SHAPE: dict[Any, Shape] = {"command": str, "teacher": str, "captions": str, "sampling": dict, "from_run?": {str: str}}


@dataclass(frozen=True)
class RunRecord:
    """What later commands need to know of a run.

    Attributes:
        command: that made it: "distill", "dd1".
        teacher: as its configuration names it.
        captions: a list of prompts or a file of their features, or empty.
        sampling: the teacher's distribution that is distilled.
        head: sizes of the students' heads, where the method has them.
        codes: of a generator over codes (`dd2.code_student`), what its teacher does not say; None where it has a head.
        masked: the same of a masked teacher's copy (`dd2.masked_student`).
        from_run: "teacher" and "captions" as the run's folder sees them, which holds where all was moved together.
    """

    command: str
    teacher: str
    captions: str
    sampling: Sampling
    head: HeadConfig | None = None
    codes: CodeStudentConfig | None = None
    masked: MaskedStudentConfig | None = None
    from_run: dict[str, str] = field(default_factory=dict)

    def write(self, run: Path) -> None:
        """Put it into a run folder, with paths that hold from every working directory."""
        names = {"teacher": absolute(self.teacher), "captions": absolute(self.captions)}
        seen = {name: os.path.relpath(path, run.resolve()) for name, path in names.items() if Path(path).is_absolute()}
        content = dataclasses.asdict(dataclasses.replace(self, **names, from_run=seen))
        write_atomic(run / FILE, json.dumps(content, indent=2) + "\n")

    def at(self, run: Path) -> "RunRecord":
        """The same with the paths under which a run in `run` finds its teacher and captions today."""
        moved = {name: str(run / path) for name, path in self.from_run.items() if not Path(getattr(self, name)).exists()}
        return dataclasses.replace(self, **{name: path for name, path in moved.items() if Path(path).exists()})

    @classmethod
    def read(cls, run: Path) -> "RunRecord":
        """What a run folder says.

        Raises:
            InputError: the folder is no run, or the record is damaged.
        """
        file = run / FILE
        if not run.exists():
            raise InputError(f"{run} does not exist; give a run folder of dd2 distill, dd2 dd1 or dd2 demo")
        if not file.is_file():
            older = (run / "config.yaml").is_file()
            what = "it was made by an older dd2: start the command that made it again, which writes it" if older else ""
            raise InputError(f"{run} has no {FILE}; " + (what or "give a run folder of dd2 distill, dd2 dd1 or dd2 demo"))
        found = read_record(file, SHAPE, "start its command again, which writes it")
        head, codes, masked = found.get("head"), found.get("codes"), found.get("masked")
        record = cls(
            **{name: found[name] for name in ("command", "teacher", "captions")},
            sampling=construct(Sampling, found["sampling"], file),
            head=None if head is None else construct(HeadConfig, head, file),
            codes=None if codes is None else construct(CodeStudentConfig, codes, file),
            masked=None if masked is None else construct(MaskedStudentConfig, masked, file),
            from_run={name: path for name, path in found.get("from_run", {}).items() if name in ("teacher", "captions")},
        )
        return record.at(run)
