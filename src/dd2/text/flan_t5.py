"""Flan-T5's encoder by the library transformers: what LlamaGen's text models were trained with."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dd2.errors import InputError
from dd2.text.encoder import EncoderSpec, TextEncoder


class FlanT5(TextEncoder):
    """As LlamaGen's models read it: texts lower-cased, 120 positions, the end token last; the empty text is that token alone.

    LlamaGen's clean-up of web captions (HTML, addresses, repeated marks) is not applied: prompts are taken as they are.

    Args:
        spec: name, revision and length.
        device: where it computes, in float32.

    Raises:
        InputError: transformers or the weights are not there.
    """

    def __init__(self, spec: EncoderSpec, device: torch.device) -> None:
        self._tokenizer, self._encoder = _loaded(spec)
        self._encoder = self._encoder.to(device).eval()
        self.device = device
        self.spec = replace(spec, channels=int(self._encoder.config.d_model), digest=_digest(self._encoder))

    def words(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer([text.lower() for text in texts])["input_ids"]]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        given = self._tokenizer(
            [text.lower() for text in texts],
            max_length=self.spec.length,
            padding="max_length",
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        ids, mask = given["input_ids"].to(self.device), given["attention_mask"].to(self.device)
        with torch.autocast(self.device.type, enabled=False):  # float16 overflows in T5, and bfloat16 rounds features
            features = self._encoder(input_ids=ids, attention_mask=mask)["last_hidden_state"].float()
        return features.cpu(), mask.cpu()


def _loaded(spec: EncoderSpec) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError as error:
        raise InputError('the text encoder Flan-T5 needs transformers; pip install "dd2[t2i]"') from error
    library: Any = transformers
    name = spec.name or "google/flan-t5-xl"
    # Nothing is fetched but a revision that somebody named; a folder is no more than itself.
    where: dict[str, Any] = {"local_files_only": not spec.revision or Path(name).is_dir()}
    where |= {"revision": spec.revision} if spec.revision else {}
    try:
        return library.AutoTokenizer.from_pretrained(name, **where), library.T5EncoderModel.from_pretrained(name, **where)
    except (OSError, ValueError, ImportError) as error:
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"text encoder {name} is not on this machine ({why}); give the folder of its weights with --text-encoder, or "
            "owner/name@revision to fetch it"
        ) from error


def _digest(encoder: Any) -> str:
    """Hash of the vectors of the first words and of the last norm: of 5 GB of weights, what tells them from others'."""
    content = hashlib.sha256()
    for tensor in (encoder.get_input_embeddings().weight[:1000], encoder.encoder.final_layer_norm.weight):
        content.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()
