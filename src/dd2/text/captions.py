"""Features of prompts: made once, kept under the hash of what decides them, and looked up by row."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dd2.errors import InputError
from dd2.files import cache_folder, writable_folder, write_atomic
from dd2.processes import barrier, note, rank
from dd2.progress import progress
from dd2.records import parsed_text
from dd2.text.encoder import EncoderSpec, TextEncoder, left_padded
from dd2.text.encoders import open_encoder
from dd2.text.prompts import EMBEDDED, Prompts, read_prompts

AT_ONCE = 64
"""Prompts in the encoder at a time."""

KEPT_ABOVE = 32
"""Prompts up to here are encoded anew each time."""


class Captions:
    """The captions of a run; their row numbers are its labels.

    Args:
        features: (N, P, caption_dim) features of a text encoder, padding on the left.
        mask: (N, P), 1 for a word and 0 for padding.
        texts: what they say; empty where the file does not tell.
        encoder: that made them; None where the file does not tell.
    """

    def __init__(self, features: Tensor, mask: Tensor, texts: Sequence[str] = (), encoder: EncoderSpec | None = None) -> None:
        self.features, self.mask, self.texts, self.encoder = features, mask, tuple(texts), encoder

    @classmethod
    def load(cls, file: Path) -> "Captions":
        """Read what `dd2 text-features` wrote.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            tensors = load_file(file)
            features, mask = tensors["features"], tensors["mask"]
            with safe_open(file, "pt") as opened:
                said: dict[str, str] = opened.metadata() or {}
            texts = parsed_text(said.get("captions", "[]"))
            encoder = parsed_text(said["encoder"]) if "encoder" in said else None
            spec = None if encoder is None else EncoderSpec(**encoder)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"captions {file} cannot be read ({error}); make it with dd2 text-features") from error
        if features.ndim != 3 or mask.shape != features.shape[:2] or not len(mask):
            raise InputError(
                f"captions {file} hold features {tuple(features.shape)} and mask {tuple(mask.shape)}, not (N, P, channels) and "
                "(N, P); make it with dd2 text-features"
            )
        if not (features.is_floating_point() and all(torch.isfinite(part).all() for part in features.split(512))):
            raise InputError(f"captions {file} hold features that are not finite numbers; make them again with dd2 text-features")
        words = mask.float()
        if not ((words == 0) | (words == 1)).all() or (words.diff(dim=1) < 0).any() or (words[:, -1] == 0).any():
            raise InputError(
                f"captions {file}: the mask must be 0 for padding, which comes first, and 1 for words, of which there is one at "
                "least; make it again with dd2 text-features"
            )
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) not in (0, len(mask)):
            raise InputError(f"captions {file}: its texts are not as many as its features; make it with dd2 text-features")
        return cls(features, mask, texts, spec)

    @classmethod
    def encoded(cls, prompts: Prompts, encoder: TextEncoder) -> "Captions":
        """What an encoder makes of prompts."""
        found = []
        with progress("text features", len(prompts), "prompt", shown=len(prompts) > KEPT_ABOVE) as bar:
            for start in range(0, len(prompts), AT_ONCE):
                part = prompts.texts[start : start + AT_ONCE]
                features, mask = left_padded(*encoder.encode(part))
                found.append((features.half(), mask.to(torch.uint8)))
                bar.update(len(part))
        features, mask = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cls(features, mask, prompts.texts, encoder.spec)

    def save(self, file: Path) -> None:
        """Write them as `load` reads them."""
        said = {"captions": json.dumps(self.texts)}
        if self.encoder is not None:
            said["encoder"] = json.dumps(asdict(self.encoder))
        write_atomic(file, save({"features": self.features, "mask": self.mask}, metadata=said))

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, labels: Tensor) -> Tensor:
        """Conditions of row numbers (B,), on their device."""
        rows = labels.cpu()
        return caption_condition(self.features[rows], self.mask[rows]).to(labels.device)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of what decides them: texts and encoder where these are known, as features are rounded by every machine in its own
        way; else of features and mask.
        """
        content = hashlib.sha256()
        if self.texts and self.encoder is not None and self.encoder.digest:
            content.update(json.dumps([self.texts, self.encoder.digest, self.encoder.length]).encode())
            return content.hexdigest()
        for tensor in (self.features, self.mask):
            for part in tensor.split(512):
                content.update(part.float().contiguous().numpy().tobytes())
        return content.hexdigest()


def caption_condition(features: Tensor, mask: Tensor) -> Tensor:
    """Features (B, P, caption_dim) and mask (B, P) as one condition tensor (B, P, caption_dim + 1)."""
    return torch.cat([features.float(), mask.float().unsqueeze(-1)], -1)


def listed(source: str) -> str | Prompts:
    """What a command line names: prompts of a list, or the name of a file of features as it is.

    Raises:
        InputError: there is no such list.
    """
    return source if not source or is_features(source) else read_prompts(source)


def is_features(source: str) -> bool:
    """Whether a name is that of a file of features, and not of a list of prompts."""
    return source not in EMBEDDED and source.endswith(".safetensors")


def captions_of(source: str | Prompts, spec: EncoderSpec | None, place: str = "", device: torch.device | None = None) -> Captions:
    """Captions by what names them: a file of features, or prompts, which are encoded (once, if they are many).

    Args:
        source: a file of `dd2 text-features`, prompts, or the name of a list of prompts.
        spec: the encoder that the model was trained with; None where it does not say.
        place, device: as `open_encoder`.

    Raises:
        InputError: they cannot be read, are another encoder's, or there is no encoder for them.
    """
    if isinstance(source, str) and is_features(source):
        if place:
            raise InputError(f"text_encoder has no effect: {source} holds features already; leave it out")
        found = Captions.load(Path(source))
        if spec is not None and found.encoder is not None and spec.differs_from(found.encoder):
            raise InputError(
                f"captions {source} were made by another text encoder ({found.encoder.said()}, {found.encoder.digest[:8]}) than "
                f"this model was trained with ({spec.said()}, {spec.digest[:8]}); make them again with dd2 text-features"
            )
        return found
    prompts = read_prompts(source) if isinstance(source, str) else source
    if spec is None:
        raise InputError(
            f"prompts {prompts.source}: this model does not say which text encoder it was trained with, so features are needed; "
            "make them with dd2 text-features, and give that file"
        )
    if len(prompts) <= KEPT_ABOVE:
        encoder = open_encoder(spec, place, device)
        say_cut(prompts, encoder)
        return Captions.encoded(prompts, encoder)
    return _kept(prompts, spec, place, device)


def _kept(prompts: Prompts, spec: EncoderSpec, place: str, device: torch.device | None) -> Captions:
    """Features of many prompts, made once on a machine. The encoder does not stay in memory."""
    encoder = None if spec.digest and not place else open_encoder(spec, place, device)
    known = spec if encoder is None else encoder.spec
    file = _cached(prompts, known)
    found = _readable(file, prompts) if rank() == 0 else None
    if rank() == 0 and found is None:
        found = _made(file, prompts, encoder or open_encoder(spec, place, device))
    barrier()
    found = _readable(file, prompts) if found is None else found
    if found is None:  # another machine of the job, which shares no home with the first
        found = _made(file, prompts, encoder or open_encoder(spec, place, device))
    open_encoder.cache_clear()
    return found


def _readable(file: Path, prompts: Prompts) -> Captions | None:
    """What is kept, if it is whole and of these prompts."""
    try:
        found = Captions.load(file)
    except InputError:
        return None
    return found if found.texts == prompts.texts else None


def _made(file: Path, prompts: Prompts, encoder: TextEncoder) -> Captions:
    say_cut(prompts, encoder)
    writable_folder(file.parent, "cache folder")
    Captions.encoded(prompts, encoder).save(file)
    return Captions.load(file)  # mapped from the file, so that they need not lie in memory


def say_cut(prompts: Prompts, encoder: TextEncoder) -> None:
    """Say how many prompts an encoder reads a part of only, and which is the first."""
    length = encoder.spec.length
    if long := [row for row, words in enumerate(encoder.words(prompts.texts), 1) if words > length]:
        which = f"{len(long):,} of {len(prompts):,} prompts are" if len(prompts) > 1 else "the prompt is"
        note(f"{which} longer than {length} positions (first: number {long[0]}): what comes after is not read")


def _cached(prompts: Prompts, spec: EncoderSpec) -> Path:
    """Where their features are kept."""
    identity: dict[str, Any] = {"prompts": prompts.digest(), "count": len(prompts), "length": spec.length, "digest": spec.digest}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "text" / f"{key[:24]}.safetensors"
