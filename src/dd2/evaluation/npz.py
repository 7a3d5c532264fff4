"""Images in an .npz, mapped where they are stored as they are; every claim of the file is checked before it is believed."""

import io
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dd2.data.pictures import READ_ERRORS
from dd2.errors import InputError

ARRAY = "arr_0.npy"


def read_npz(path: Path, what: str) -> tuple[np.ndarray, list[int] | None, list[int] | None]:
    """The images of an .npz in ADM's layout, and labels and seeds of those that dd2 sample wrote.

    Args:
        path: the file.
        what: it is to the user, for messages.

    Returns:
        arr_0, uint8 (N, H, W, 1 or 3), without reading it where it is not compressed; N labels and N seeds, or None.

    Raises:
        InputError: it is damaged, or holds something else.
    """
    where = f"{what} {path}"
    try:
        with zipfile.ZipFile(path) as archive:
            if ARRAY not in archive.namelist():
                raise InputError(f"{where}: no arr_0 in it, only {', '.join(archive.namelist()[:8])}")
            entry = archive.getinfo(ARRAY)
            with archive.open(entry) as member:
                shape, fortran, kind = _header(member)
                bytes_of_header = member.tell()
            if kind != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
                raise InputError(f"{where}: arr_0 is {kind} {shape}, it must be uint8 (N, H, W, 1 or 3)")
            if min(shape) < 0 or bytes_of_header + int(np.prod(shape, dtype=object)) != entry.file_size:
                raise ValueError(f"its header says {shape}, which is not what it holds")
            labels, seeds = (_integers(archive, name, shape[0], where) for name in ("labels", "seeds"))
        if entry.compress_type == zipfile.ZIP_STORED:
            start = _start_of(path, entry)
            order = "F" if fortran else "C"
            array = (
                np.memmap(path, np.uint8, "r", start + bytes_of_header, shape, order) if shape[0] else np.empty(shape, np.uint8)
            )
        else:
            with np.load(path, allow_pickle=False) as content:
                array = content["arr_0"]
    except InputError:
        raise
    except READ_ERRORS as error:
        raise InputError(f"{where} cannot be read ({error}); give an .npz with arr_0, uint8 NHWC") from error
    return array, labels, seeds


def _header(file: object) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)  # pyright: ignore[reportArgumentType]
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)  # pyright: ignore[reportArgumentType]


def _integers(archive: zipfile.ZipFile, name: str, count: int, where: str) -> list[int] | None:
    """Labels or seeds: one integer an image."""
    if f"{name}.npy" not in archive.namelist():
        return None
    values = np.lib.format.read_array(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)
    if values.dtype.kind not in "iu" or values.size != count or values.shape not in ((count,), (count, 1)):
        raise InputError(
            f"{where}: {name} is {values.dtype} {values.shape}, it must be {count} integers, one an image; leave it out"
        )
    return values.ravel().tolist()


def _start_of(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored entry begin, once they are known to be those that were written: nothing else would look.

    Raises:
        ValueError: its checksum is another.
    """
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
        start = entry.header_offset + 30 + name_length + extra_length
        file.seek(start)
        if _checksum(file, entry.file_size) != entry.CRC:
            raise ValueError("its checksum is wrong: it is damaged, fetch it again")
    return start


def _checksum(file: BinaryIO, size: int) -> int:
    found = 0
    while size and (part := file.read(min(size, 2**24))):
        found, size = zlib.crc32(part, found), size - len(part)
    return found
