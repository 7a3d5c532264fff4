"""Files that are either whole or absent."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dd2.errors import InputError

PARTIAL, OLD = ".dd2-partial", ".dd2-old"
"""Ending of folders that are still being written."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def behind_links(path: Path) -> Path:
    """Where a path leads: what is put in the place of a link would leave what it points to as it was."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write to a temporary neighbour; when the block ends well it is flushed to the disk and renamed over `path`, or over what
    `path` is a link to.
    """
    path = behind_links(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file; call it inside `atomic_folder`.

    Raises:
        OSError: the disk is full or the file cannot be written (safetensors has an error of its own for that).
    """
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(file)) from error


def text_lines(file: Path, what: str, hint: str) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte-order mark; they end at newlines (of any system) alone.

    Args:
        file: where it is.
        what: it is to the user, for messages.
        hint: what to give instead.

    Raises:
        InputError: it cannot be read, is no text, or has no lines.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or f"it is not UTF-8: {error}"
        raise InputError(f"{what} {file} cannot be read ({why}); {hint}") from error
    if "\0" in text:
        raise InputError(f"{what} {file} is no text file; {hint}")
    if not text.strip():
        raise InputError(f"{what} {file} is empty; {hint}")
    return text.removesuffix("\n").split("\n")


def writable_folder(path: Path, what: str) -> Path:
    """Make a folder and prove that it can be written to, before any work is done for it.

    Raises:
        InputError: it cannot be made or written to.
    """
    path = behind_links(path)
    probe = path / f".probe.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be written to ({error.strerror}); choose another one") from error
    return path


def cache_folder() -> Path:
    """Where what can be had again is kept: ~/.cache/dd2, or $DD2_CACHE."""
    return Path(os.environ.get("DD2_CACHE", Path.home() / ".cache" / "dd2"))


def fetched(url: str, sha256: str) -> Path:
    """A file of the internet, downloaded once into ~/.cache/dd2 (or $DD2_CACHE) and verified.

    Raises:
        InputError: it cannot be fetched, or is not the file with that SHA-256.
    """
    folder = cache_folder()
    file = folder / f"{sha256[:16]}-{url.rpartition('/')[2]}"
    if file.is_file() and file_digest(file) == sha256:
        return file
    writable_folder(folder, "download folder")
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url) as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target)
        found = file_digest(temporary)
        if found != sha256:
            raise InputError(f"{url} gave a file with SHA-256 {found}, expected {sha256}; fetch it by hand and give its path")
        os.replace(temporary, file)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{url} cannot be fetched ({error}); fetch it by hand and give its path") from error
    finally:
        temporary.unlink(missing_ok=True)
    return file


def file_digest(file: Path) -> str:
    """SHA-256 of a file of any size."""
    content = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def weights_digest(*modules: nn.Module, without: str = "\0") -> str:
    """SHA-256 of the modules' tensors, leaving out those whose names start with `without`."""
    digest = hashlib.sha256()
    for module in modules:
        for key, value in sorted(module.state_dict().items()):
            if not key.startswith(without):
                digest.update(key.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary neighbour; when the block ends well it is flushed and takes the place of `path`.

    A process killed at any moment leaves the old folder or the new one whole; between the two renames the new one still
    is hidden beside it as .NAME.dd2-partial and the old one as .NAME.dd2-old. Of a link it is what it points to that is replaced.
    """
    path = behind_links(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}{ending}") for ending in (PARTIAL, OLD))
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for entry in sorted(partial.rglob("*")):
        _sync(entry)
    _sync(partial)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
