"""Models of the library transformers: opened whole, in float32, or refused in one line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dd2.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
"""Of which a folder must have one: without them the library makes a tokenizer up."""

PROBE = ["A red fox's 3 cafés, two fives & a nine", "snow"]
"""Texts by whose tokens tokenizers are told from each other."""

SAMPLED = 64
"""Numbers of each tensor that its hash is made of."""


def opened(place: str, model: str, tokenizer: str, what: str, remedy: str, revision: str = "") -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer.

    Args:
        place: a folder, or owner/name.
        model, tokenizer: names of the library's classes.
        what: it is, for messages.
        remedy: what to do if it is not there.
        revision: of owner/name, which then may be fetched; nothing else is.

    Raises:
        InputError: the library or the weights are missing, damaged, incomplete or another model's.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(f'{what} needs transformers; pip install "dd2[t2i]"') from error
    library: Any = transformers
    folder = Path(place)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{what} {place} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy all of its files")
    where: dict[str, Any] = {"local_files_only": not revision or folder.is_dir()} | ({"revision": revision} if revision else {})
    try:
        found, said = getattr(library, model).from_pretrained(place, output_loading_info=True, **where)
        words = getattr(library, tokenizer).from_pretrained(place, **where)
    except Exception as error:  # every format and validator of the library's has its own
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{what} {place} is not on this machine, or damaged ({why}); {remedy}") from error
    if wrong := [*map(str, said.get("missing_keys", ())), *map(str, said.get("mismatched_keys", ()))]:
        raise InputError(
            f"{what} {place} lacks {len(wrong)} tensors of such a model (first {wrong[0]}): it is another model, or not all of "
            "it was copied; copy it again"
        )
    return found.float().eval().requires_grad_(False), words


def digest(model: nn.Module, tokenizer: Any) -> str:
    """Hash of some numbers of every tensor and of how texts are cut: what tells a model of gigabytes from another at once."""
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].to(torch.float32).cpu().contiguous()
        content.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    content.update(json.dumps([tokenizer(text)["input_ids"] for text in PROBE]).encode())
    return content.hexdigest()
