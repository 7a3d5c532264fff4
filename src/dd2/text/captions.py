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
from dd2.text.encoder import EncoderSpec, TextEncoder
from dd2.text.encoders import open_encoder
from dd2.text.prompts import EMBEDDED, Prompts, read_prompts

AT_ONCE = 64
"""Prompts in the encoder at a time."""

KEPT_ABOVE = 32
"""Prompts up to here are encoded anew each time."""


class Captions:
    """The captions of a run; their row numbers are its labels.

    Of each caption only its words are kept: at 120 positions most captions are nine tenths padding, and thirty thousand of them,
    of 2048 channels, would be 15 GB.

    Args:
        words: (W, caption_dim) features of a text encoder, caption after caption.
        counts: (N,) words of each caption, at least one each; W in all.
        length: P, positions of a condition.
        texts: what they say; empty where the file does not tell.
        encoder: that made them; None where the file does not tell.

    Raises:
        InputError: they do not go together, or are no finite numbers.
    """

    def __init__(
        self, words: Tensor, counts: Tensor, length: int, texts: Sequence[str] = (), encoder: EncoderSpec | None = None
    ) -> None:
        if words.ndim != 2 or counts.ndim != 1 or not len(counts) or counts.is_floating_point():
            raise InputError(
                f"features {tuple(words.shape)} and counts {tuple(counts.shape)} are not (W, channels) and whole (N,)"
            )
        if not (words.is_floating_point() and all(torch.isfinite(part).all() for part in words.split(65536))):
            raise InputError("the features are not finite numbers")
        if counts.min() < 1 or counts.max() > length or counts.sum() != len(words):
            raise InputError(f"a caption has 1 to {length} words, {len(words)} in all, and the counts say otherwise")
        if len(texts) not in (0, len(counts)):
            raise InputError(f"the texts are {len(texts)}, the features those of {len(counts)} captions")
        self.words, self.counts, self.length, self.texts, self.encoder = words, counts.long(), length, tuple(texts), encoder
        self._ends = self.counts.cumsum(0)

    @classmethod
    def of_padded(
        cls, features: Tensor, mask: Tensor, texts: Sequence[str] = (), encoder: EncoderSpec | None = None
    ) -> "Captions":
        """From features (N, P, caption_dim) and mask (N, P), 1 for a word and 0 for padding, which comes first.

        Raises:
            InputError: as the class, or the mask is another.
        """
        if features.ndim != 3 or mask.shape != features.shape[:2] or not len(mask):
            raise InputError(f"features {tuple(features.shape)} and mask {tuple(mask.shape)} are not (N, P, channels) and (N, P)")
        chosen = mask != 0
        if not ((mask == 0) | (mask == 1)).all() or (chosen.long().diff(dim=1) < 0).any():
            raise InputError("the mask must be 0 for padding, which comes first, and 1 for words")
        return cls(features[chosen], chosen.sum(1), mask.shape[1], texts, encoder)

    @classmethod
    def load(cls, file: Path) -> "Captions":
        """Read what `dd2 text-features` wrote, now or before it left the padding out.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            tensors = load_file(file)
            with safe_open(file, "pt") as opened:
                said: dict[str, str] = opened.metadata() or {}
            texts = parsed_text(said.get("captions", "[]"))
            spec = EncoderSpec(**parsed_text(said["encoder"])) if "encoder" in said else None
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError("its texts are no list of them")
            if "mask" in tensors:
                return cls.of_padded(tensors["features"], tensors["mask"], texts, spec)
            return cls(tensors["features"], tensors["counts"], int(said["length"]), texts, spec)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, InputError) as error:
            raise InputError(f"captions {file} cannot be read ({error}); make it with dd2 text-features") from error

    @classmethod
    def encoded(cls, prompts: Prompts, encoder: TextEncoder) -> "Captions":
        """What an encoder makes of prompts."""
        words: list[Tensor] = []
        counts: list[Tensor] = []
        with progress("text features", len(prompts), "prompt", shown=len(prompts) > KEPT_ABOVE) as bar:
            for start in range(0, len(prompts), AT_ONCE):
                part = prompts.texts[start : start + AT_ONCE]
                features, mask = encoder.encode(part)
                words.append(features[mask != 0].half())
                counts.append(mask.long().sum(1))
                bar.update(len(part))
        return cls(torch.cat(words), torch.cat(counts), encoder.spec.length, prompts.texts, encoder.spec)

    def save(self, file: Path) -> None:
        """Write them as `load` reads them."""
        said = {"captions": json.dumps(self.texts), "length": str(self.length)}
        if self.encoder is not None:
            said["encoder"] = json.dumps(asdict(self.encoder))
        write_atomic(file, save({"features": self.words, "counts": self.counts.to(torch.int32)}, metadata=said))

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, labels: Tensor) -> Tensor:
        """Conditions of row numbers (B,), on their device."""
        return caption_condition(*self.padded(labels.cpu())).to(labels.device)

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, P, caption_dim) and mask (B, P) uint8 of row numbers (B,), the words at the end as in LlamaGen's models,
        which see a caption's last word right before the first token.
        """
        counts = self.counts[rows].unsqueeze(1)
        behind = torch.arange(self.length) - self.length  # -1 is the last position
        mask = behind >= -counts
        source = (self._ends[rows].unsqueeze(1) + behind).clamp(min=0)
        return self.words[source] * mask.unsqueeze(-1), mask.to(torch.uint8)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of what decides them: texts and encoder where these are known, as features are rounded by every machine in its own
        way; else of features and mask.
        """
        content = hashlib.sha256()
        if self.texts and self.encoder is not None and self.encoder.digest:
            content.update(json.dumps([self.texts, self.encoder.digest, self.encoder.length]).encode())
            return content.hexdigest()
        masks = []
        for rows in torch.arange(len(self)).split(512):
            features, mask = self.padded(rows)
            content.update(features.float().numpy().tobytes())
            masks.append(mask)
        content.update(torch.cat(masks).float().numpy().tobytes())
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
