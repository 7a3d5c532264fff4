"""What every object that can be shipped does by the names that people know: `save_pretrained` and `push_to_hub`."""

import tempfile
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

from dd2.checkpoints.record import RunRecord
from dd2.errors import InputError
from dd2.generator import Generator
from dd2.shipping.card import Card
from dd2.shipping.hub import upload
from dd2.shipping.package import write_package
from dd2.teachers.base import Teacher


class PushToHubMixin(ABC):
    """Of what holds a generator, and perhaps the run that it comes from."""

    generator: Generator

    @abstractmethod
    def teacher_to_ship(self) -> tuple[Teacher, RunRecord] | None:
        """The teacher and the record of the run, which a package may hold too; None where they are not at hand."""

    def save_pretrained(self, folder: str | Path, *, teacher: bool = False, card: Card | None = None) -> None:
        """Write a package folder: the generator, its tokenizer and a model card, and the teacher if asked for.

        Args:
            folder: where to; it must not exist, or be empty.
            teacher: ship it too, so that more than one step can be drawn.
            card: what the card says.

        Raises:
            InputError: the folder is in use, or there is no teacher that could be shipped.
        """
        shipped = self.teacher_to_ship() if teacher else None
        if teacher and shipped is None:
            raise InputError("there is no teacher here to ship; load a run folder of dd2 distill")
        whole = {"teacher": shipped[0], "record": shipped[1]} if shipped else {}
        write_package(Path(folder), self.generator, card or Card(), **whole)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Add a one-step generator",
        teacher: bool = False,
        card: Card | None = None,
    ) -> str:
        """Write a package and put it on the Hub (needs `pip install "dd2[hub]"`).

        Args:
            repo_id: "owner/name"; made where there is none.
            private: of a new repository, for the owner alone.
            revision: a branch; made where there is none.
            token: of an account; by default the one that `hf auth login` kept.
            commit_message: of the commit.
            teacher, card: as `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            InputError: as `save_pretrained`, or the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "package"
            self.save_pretrained(folder, teacher=teacher, card=replace(card or Card(), name=repo_id))
            return upload(folder, repo_id, private=private, revision=revision, token=token, message=commit_message)
