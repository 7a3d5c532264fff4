"""Picture files of a folder or a zip: one listing and one reader, for training and for evaluation."""

import io
import os
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from dd2.errors import InputError

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".avif"),
)
"""Endings of pictures: what Pillow reads by itself (of an animation the first frame), so not EPS, which it hands
to Ghostscript."""

NO_PICTURES = ("__MACOSX", "__pycache__", "@eaDir")
"""Folders that systems leave beside pictures, with files in them that look like some; others begin with a dot."""

LARGEST_FILE = 2**28
"""Bytes of one picture file, unpacked: what is larger was made to fill the memory."""

READ_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    Image.DecompressionBombError,
)
"""What reading a damaged, encrypted or foreign picture or archive raises: every format of Pillow's has its own."""


class Pictures:
    """The picture files below a folder or in a zip, by name. Links to folders are followed.

    Args:
        path: a folder or a .zip.
        what: it is to the user ("data", "images", "reference"), for messages.

    Attributes:
        names: of the pictures in order, with "/" between folders.
        beside: names of the other files, hidden ones left out.
        left_out: ending (or "hidden") -> how many other files there are.

    Raises:
        InputError: there is nothing, it is neither folder nor zip, or the zip is encrypted or damaged.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._entries: dict[str, zipfile.ZipInfo] = {}
        self._zip: zipfile.ZipFile | None = None
        if not path.exists():
            raise InputError(f"{what} {path} does not exist; give a folder or a zip of pictures")
        if not (path.is_dir() or path.is_file()):
            raise InputError(f"{what} {path} is neither a folder nor a file; give a folder or a zip of pictures")
        if path.is_dir():
            found = list(_files_below(path))
        else:
            self._open_zip()
            found = list(self._entries)
        shown = [name for name in found if not _is_hidden(name)]
        self.names = sorted(name for name in shown if name.lower().endswith(SUFFIXES))
        self.beside = sorted(name for name in shown if not name.lower().endswith(SUFFIXES))
        self.left_out = Counter(_ending(name) for name in self.beside)
        if hidden := len(found) - len(shown):
            self.left_out["hidden"] = hidden

    def read(self, name: str) -> bytes:
        """The bytes of one file.

        Raises:
            InputError: it cannot be read.
        """
        try:
            size = self._entries[name].file_size if self._zip else (self.path / name).stat().st_size
            if size > LARGEST_FILE:
                raise ValueError(f"it has {size:,} bytes")
            return self._zip.read(self._entries[name]) if self._zip else (self.path / name).read_bytes()
        except READ_ERRORS as error:
            raise self._unreadable(name, error) from error

    def image(self, name: str, mode: Literal["L", "RGB"] | None = None) -> Image.Image:
        """One picture with 8 bits a channel: grey ("L") or colour ("RGB"), by default as the file has it.

        16 bits a channel are brought to 8. Transparency is dropped, as the field's readers drop it.

        Raises:
            InputError: it cannot be read, or its values have no known range.
        """
        content = self.read(name)
        try:
            with Image.open(io.BytesIO(content)) as file:
                file.load()
                if file.mode in ("I", "F"):
                    kind = "integers of more than 8 bits" if file.mode == "I" else "floating-point numbers"
                    raise InputError(f"{self.what} {self.path}: {name} holds {kind}, whose range is unknown; bring it to 8 bits")
                if file.mode.startswith("I;16"):
                    image = Image.fromarray(np.round(np.array(file, dtype=np.float64) / 257).astype(np.uint8))
                else:
                    image = file.convert("L") if file.mode in ("1", "L", "LA", "La") else file.convert("RGB")
                return image if mode in (None, image.mode) else image.convert(mode)
        except InputError:
            raise
        except READ_ERRORS as error:
            raise self._unreadable(name, error) from error

    def said(self) -> str:
        """How many pictures there are, and what was left out."""
        others = f" (left out: {self._others})" if self.left_out else ""
        return f"{len(self.names):,} image{'' if len(self.names) == 1 else 's'}{others}"

    def none(self) -> InputError:
        """The error that there are no pictures, with what there is."""
        return InputError(
            f"{self.what} {self.path}: there are no images in it{f', only {self._others}' if self.left_out else ''}; known are "
            f"{' '.join(SUFFIXES)}"
        )

    @property
    def _others(self) -> str:
        return ", ".join(f"{count:,} {ending}" for ending, count in sorted(self.left_out.items()))

    def _unreadable(self, name: str, error: BaseException) -> InputError:
        why = "of no known format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        return InputError(
            f"{self.what} {self.path}: {name} cannot be read as an image{f' ({why})' if why else ''}; remove or replace it"
        )

    def _open_zip(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.path)
            entries = [entry for entry in self._zip.infolist() if not entry.is_dir()]
        except READ_ERRORS as error:
            raise InputError(f"{self.what} {self.path} is neither a folder nor a whole zip file ({error})") from error
        for entry in entries:
            # Windows' archives have "\"; nothing is ever unpacked, so that ".." leads nowhere.
            parts = [part for part in entry.filename.replace("\\", "/").split("/") if part not in ("", ".")]
            if parts and not entry.filename.endswith("\\"):
                self._entries["/".join(parts)] = entry
        if any(entry.flag_bits & 1 for entry in entries):
            raise InputError(f"{self.what} {self.path} is encrypted; unpack it and give the folder")


def _files_below(root: Path) -> Iterator[str]:
    """Names of all files, through links to folders; one that lies in itself, as in a loop of links, is not entered again."""
    above: dict[str, frozenset[tuple[int, int]]] = {}
    for folder, inner, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        known, parents = (status.st_dev, status.st_ino), above.get(os.path.dirname(folder), frozenset())
        if known in parents:
            inner.clear()
            continue
        above[folder] = parents | {known}
        inside = Path(folder).relative_to(root).as_posix()
        yield from (name if inside == "." else f"{inside}/{name}" for name in names)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in NO_PICTURES for part in name.split("/")) or name.endswith("Thumbs.db")


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an ending"
