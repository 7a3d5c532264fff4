"""Opening somebody's checkpoint: what a file is, by its first bytes, and one line in our words where it is none."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dd2.errors import InputError

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")

NO_CHECKPOINTS = {
    b"<!doctype html": "is a web page: the download asked for a log-in, or the file has moved; fetch it in a browser",
    b"<html": "is a web page: the download asked for a log-in, or the file has moved; fetch it in a browser",
    b'{"error': "is an error message of a server, no checkpoint: the download has failed; fetch it again",
    b"<?xml": "is an error message of a server, no checkpoint: the download has failed; fetch it again",
    b"entry not found": "is an error message of a server, no checkpoint: the download has failed; fetch it again",
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself; run git lfs pull where it came from",
}
"""How files that are often taken for checkpoints begin, in lower case, and what they are."""


def read_file(file: Path, device: str) -> Mapping[str, Any]:
    """The content of a checkpoint file, whatever it is called.

    Args:
        file: safetensors, or what torch.save wrote; nothing in it can run code.
        device: "cpu", or "meta" to learn names and shapes alone.

    Raises:
        InputError: it is missing, damaged, something else, or holds other things than plain data.
    """
    head = _head(file)
    by_torch = head.startswith((b"PK", b"\x80"))
    if (file.suffix == ".safetensors" and not by_torch) or _is_safetensors(head, file.stat().st_size):
        return _read_safetensors(file, device)
    try:
        if _is_torchscript(file):
            raise InputError(f"{file} holds a TorchScript program, not a state dict; give the checkpoint that it was made of")
        if device != "meta":
            _check_sums(file)
        # LlamaGen's trainer keeps its argparse arguments beside the weights: plain data, which cannot run code.
        with torch.serialization.safe_globals([argparse.Namespace]), open(file, "rb") as opened:
            mapped = zipfile.is_zipfile(file) and file.suffix != ".safetensors"  # of which torch has a reader by the name alone
            content = torch.load(file if mapped else opened, map_location=device, weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f"it holds a {found[1]}" if found else "it is damaged, or it holds other Python objects"
        raise InputError(
            f"{file} is no checkpoint of plain tensors: {held}, and objects could run code when read; save its state dict alone "
            "and give that"
        ) from error
    except (InputError, MemoryError):
        raise
    except Exception as error:  # whatever bytes make the reader do
        raise InputError(f"{file} cannot be read as a checkpoint: it is cut off or damaged; fetch it again") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _check_sums(file: Path) -> None:
    """Refuse a torch file with bytes that are not those that were written: torch itself does not look.

    Raises:
        InputError: there are such.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
        if broken:
            raise InputError(
                f"{file} is damaged: the checksum of {broken} is wrong; fetch it again (or save it with checksums: "
                "torch.serialization.set_crc32_options)"
            )


def _head(file: Path) -> bytes:
    """The first bytes of a file that may be a checkpoint."""
    if file.is_dir():
        raise InputError(f"checkpoint {file} is {folder_said(file)}")
    if not file.is_file():
        raise InputError(f"checkpoint {file} does not exist; give a .pth, .pt or .safetensors file")
    try:
        with open(file, "rb") as opened:
            head = opened.read(64)
    except OSError as error:
        raise InputError(f"checkpoint {file} cannot be read ({error.strerror})") from error
    if not head:
        raise InputError(f"checkpoint {file} is empty: its download has failed; fetch it again")
    for start, what in NO_CHECKPOINTS.items():
        if head.lstrip().lower().startswith(start):
            raise InputError(f"checkpoint {file} {what}")
    return head


def folder_said(folder: Path) -> str:
    """What a folder in place of a file is, and what to give."""
    names = sorted(path.name for path in folder.iterdir())
    inside = [name for name in names if name.endswith(SUFFIXES)]
    if ".metadata" in names:
        merge = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
        return f"a distributed checkpoint of torch; bring it into one file with {merge}, and give that"
    if any(name.endswith(".index.json") for name in names):
        return f"a folder of {len(inside)} shards of one model; save their tensors as one .safetensors file, and give that"
    return "a folder; give " + (f"a file in it, such as {inside[0]}" if inside else f"a file ({', '.join(SUFFIXES)})")


def _is_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and 0 < int.from_bytes(head[:8], "little") <= size - 8 and head[8:9] == b"{"


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_safetensors(file: Path, device: str) -> Mapping[str, Any]:
    try:
        with safe_open(file, "pt") as tensors:
            if device == "meta":
                return {k: torch.empty(tensors.get_slice(k).get_shape(), device="meta") for k in tensors.keys()}  # noqa: SIM118
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{file} cannot be read as safetensors: it is cut off or damaged; fetch it again") from error
