"""dd2 text-features: captions to the features that a text-conditional LlamaGen reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dd2.device import pick_device
from dd2.errors import InputError
from dd2.files import text_lines, writable_folder, write_atomic
from dd2.processes import say
from dd2.progress import progress
from dd2.teachers.captions import left_padded


@dataclass(frozen=True)
class TextFeaturesConfig:
    """Encode captions with Flan-T5, as LlamaGen's text models were trained: 120 positions, padded on the left.

    Needs the extra `t2i` (transformers) and the encoder's weights on this machine; nothing is downloaded. Captions are
    lower-cased and stripped; LlamaGen's clean-up of web captions (HTML, URLs) is not applied.
    """

    captions: Path
    """Text file, one caption a line; line numbers from 0 become the labels."""
    out: Path
    """File to write, .safetensors: features (N, P, C) float16, mask (N, P) uint8."""
    model: str = "google/flan-t5-xl"
    """Folder of the encoder, or its name in the local Hugging Face cache. LlamaGen's released models need flan-t5-xl."""
    length: int = 120
    """Positions P."""
    batch: int = 32
    """Captions at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse counts below 1 and other file types."""
        if self.length < 1 or self.batch < 1:
            raise InputError(f"length and batch must be at least 1, got {self.length} and {self.batch}")
        if self.out.suffix != ".safetensors":
            raise InputError(f"out must end in .safetensors, got {self.out}")


def text_features(config: TextFeaturesConfig) -> Path:
    """Encode and write the file."""
    lines = _captions(config.captions)
    device = pick_device(config.device)
    tokenizer, encoder = _encoder(config.model, device)
    writable_folder(config.out.parent, "output folder")
    features: list[Tensor] = []
    masks: list[Tensor] = []
    with progress("text features", len(lines), "caption") as bar, torch.inference_mode():
        for start in range(0, len(lines), config.batch):
            part = lines[start : start + config.batch]
            given = tokenizer(
                part,
                max_length=config.length,
                padding="max_length",
                truncation=True,
                add_special_tokens=True,
                return_tensors="pt",
            )
            ids, mask = given["input_ids"].to(device), given["attention_mask"].to(device)
            encoded = encoder(input_ids=ids, attention_mask=mask)["last_hidden_state"]
            moved, words = left_padded(encoded.float(), mask)
            features.append(moved.half().cpu())
            masks.append(words.to(torch.uint8).cpu())
            bar.update(len(part))
    tensors = {"features": torch.cat(features), "mask": torch.cat(masks)}
    write_atomic(config.out, save(tensors, metadata={"model": config.model, "captions": json.dumps(lines)}))
    say(f"wrote the features of {len(lines)} captions to {config.out}")
    return config.out


def _captions(file: Path) -> list[str]:
    lines = [line.strip().lower() for line in text_lines(file, "captions", "give a text file, one caption a line")]
    if not all(lines):
        raise InputError(f"captions {file}: line {lines.index('') + 1} is empty; give one caption a line")
    return lines


def _encoder(name: str, device: torch.device) -> tuple[Any, Any]:
    try:
        from transformers import AutoTokenizer, T5EncoderModel  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError('text features need transformers; pip install "dd2[t2i]"') from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        encoder = T5EncoderModel.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"text encoder {name} is not on this machine ({str(error).splitlines()[0]}); fetch its weights and give their folder "
            "with --model"
        ) from error
    return tokenizer, encoder.to(device).eval()
