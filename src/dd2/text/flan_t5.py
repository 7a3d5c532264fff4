"""Flan-T5's encoder by the library transformers: what LlamaGen's text models were trained with."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dd2.text.encoder import EncoderSpec, TextEncoder
from dd2.text.pretrained import digest, opened


class FlanT5(TextEncoder):
    """As LlamaGen's models read it: texts lower-cased, the end token last; the empty text is that token alone.

    LlamaGen's clean-up of web captions (HTML, addresses, repeated marks) is not applied: prompts are taken as they are.

    Args:
        spec: name, revision and length.
        device: where it computes, in float32.

    Raises:
        InputError: transformers or the weights are not there.
    """

    def __init__(self, spec: EncoderSpec, device: torch.device) -> None:
        remedy = "give the folder of its weights with --text-encoder, or owner/name@revision to fetch it"
        place = spec.name or "google/flan-t5-xl"
        found, self._tokenizer = opened(place, "T5EncoderModel", "AutoTokenizer", "text encoder", remedy, spec.revision)
        self._encoder, self.device = found.to(device), device
        self.spec = replace(spec, channels=int(found.config.d_model), digest=digest(found, self._tokenizer))

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
