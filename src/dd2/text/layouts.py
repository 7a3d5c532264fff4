"""Folders of images as the scorers of others read them: which file belongs to which prompt."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Literal

from dd2.errors import InputError
from dd2.files import write_atomic
from dd2.text.prompts import Prompts

LayoutName = Literal["plain", "captions", "geneval", "hpsv2", "mjhq"]


class Layout(ABC):
    """Names of images, and the files beside them.

    Args:
        prompts: whose images they are; image i is of prompt i modulo their number.

    Attributes:
        called: on the command line.
        needs: what of `Prompts` it is made of.
        needed: that, in words.
        remedy: what to give, so that it is there.

    Raises:
        InputError: the list of prompts lacks what the layout is made of.
    """

    called: LayoutName
    needs: tuple[str, ...] = ()
    needed: str = ""
    remedy: str = ""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        if not all(getattr(prompts, name) for name in self.needs):
            raise InputError(f"layout {self.called} needs {self.needed}: give {self.remedy}, not {prompts.source}")

    def check(self) -> None:
        """Refuse lists of which two prompts would share a file."""
        places = Counter(self.name(number).lower() for number in range(len(self.prompts)))
        if shared := [name for name, count in places.items() if count > 1]:
            raise InputError(f"prompts {self.prompts.source}: two of them would be the file {shared[0]}; give them other names")

    def place(self, number: int) -> tuple[int, int]:
        """Number of the prompt of an image, and of the image among that prompt's."""
        return number % len(self.prompts), number // len(self.prompts)

    @abstractmethod
    def name(self, number: int) -> str:
        """Path of an image in the folder."""

    def files(self, count: int) -> dict[str, str]:
        """Path -> text of the other files, for `count` images; by default there are none."""
        return {}


class CaptionsLayout(Layout):
    """images/0.png … and captions.txt, whose line k is what image k is of: LlamaGen's, GigaGAN's and DMD2's evaluators."""

    called = "captions"

    def name(self, number: int) -> str:
        return f"images/{number}.png"

    def files(self, count: int) -> dict[str, str]:
        return {
            "captions.txt": "".join(" ".join(self.prompts.texts[self.place(number)[0]].split()) + "\n" for number in range(count))
        }


class GenEvalLayout(Layout):
    """00000/samples/0000.png … and 00000/metadata.jsonl: a folder for each prompt, with its line of evaluation_metadata.jsonl."""

    called = "geneval"
    needs = ("records",)
    needed = "the records that its scorer reads"
    remedy = "GenEval's evaluation_metadata.jsonl as prompts"

    def name(self, number: int) -> str:
        prompt, sample = self.place(number)
        return f"{prompt:05d}/samples/{sample:04d}.png"

    def files(self, count: int) -> dict[str, str]:
        return {f"{k:05d}/metadata.jsonl": record for k, record in enumerate(self.prompts.records[:count])}


class HPSv2Layout(Layout):
    """STYLE/00000.jpg …, in the order of each style's prompts."""

    called = "hpsv2"
    needs = ("groups",)
    needed = "styles"
    remedy = "a .json of {style: [prompts]}, as hpsv2.benchmark_prompts('all') gives it"

    def __init__(self, prompts: Prompts) -> None:
        super().__init__(prompts)
        seen: Counter[str] = Counter()
        self._rows = []
        for group in prompts.groups:
            self._rows.append(seen[group])
            seen[group] += 1

    def name(self, number: int) -> str:
        prompt, sample = self.place(number)
        if sample:
            raise InputError("layout hpsv2 has room for one image of each prompt; leave per_prompt at 1")
        return f"{_safe(self.prompts.groups[prompt])}/{self._rows[prompt]:05d}.jpg"


class MJHQLayout(Layout):
    """CATEGORY/NAME.png, by the names of meta_data.json."""

    called = "mjhq"
    needs = ("keys", "groups")
    needed = "names and categories"
    remedy = "MJHQ's meta_data.json as prompts"

    def name(self, number: int) -> str:
        prompt, sample = self.place(number)
        again = f"_{sample}" if sample else ""
        return f"{_safe(self.prompts.groups[prompt])}/{_safe(self.prompts.keys[prompt])}{again}.png"


LAYOUTS: dict[str, type[Layout]] = {kind.called: kind for kind in (CaptionsLayout, GenEvalLayout, HPSv2Layout, MJHQLayout)}


def write_files(folder: Path, layout: Layout | None, count: int, described: dict[str, object]) -> None:
    """The files beside `count` images, and dd2.json, which says how they were made."""
    beside = {} if layout is None else layout.files(count)
    for name, text in {**beside, "dd2.json": json.dumps(described, indent=2) + "\n"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, text if text.endswith("\n") else text + "\n")


def _safe(name: str) -> str:
    """A name from somebody's file as that of a file or a folder: it leads nowhere else."""
    found = "".join(character if character.isalnum() or character in "-_. " else "_" for character in name).strip(". ")
    if not found:
        raise InputError(f"{name!r} cannot be the name of a file; give the list of prompts other names")
    return found
