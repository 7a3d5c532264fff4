"""What a run folder says of itself: run.json, written when the run starts and read once by whatever opens it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dd2.checkpoints.folder import construct
from dd2.code_student import CodeStudentConfig
from dd2.errors import InputError
from dd2.files import write_atomic
from dd2.masked_student import MaskedStudentConfig
from dd2.student import HeadConfig
from dd2.teachers.filtering import Sampling

FILE = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """What later commands need to know of a run.

    Attributes:
        command: that made it: "distill", "dd1".
        teacher: as its configuration names it.
        captions: file of the captions' features, or empty.
        sampling: the teacher's distribution that is distilled.
        head: sizes of the students' heads, where the method has them.
        codes: of a generator over codes (`dd2.code_student`), what its teacher does not say; None where it has a head.
        masked: the same of a masked teacher's copy (`dd2.masked_student`).
    """

    command: str
    teacher: str
    captions: str
    sampling: Sampling
    head: HeadConfig | None = None
    codes: CodeStudentConfig | None = None
    masked: MaskedStudentConfig | None = None

    def write(self, run: Path) -> None:
        """Put it into a run folder."""
        write_atomic(run / FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

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
        try:
            found: dict[str, Any] = json.loads(file.read_text())
            texts = {name: found[name] for name in ("command", "teacher", "captions")}
            if not all(isinstance(text, str) for text in texts.values()):
                raise TypeError("command, teacher and captions must be texts")
            head, codes, masked = found.get("head"), found.get("codes"), found.get("masked")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} does not describe a run ({error}); start its command again, which writes it") from error
        sampling = construct(Sampling, found.get("sampling"), file)
        return cls(
            **texts,
            sampling=sampling,
            head=None if head is None else construct(HeadConfig, head, file),
            codes=None if codes is None else construct(CodeStudentConfig, codes, file),
            masked=None if masked is None else construct(MaskedStudentConfig, masked, file),
        )
