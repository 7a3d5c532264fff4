"""Tiny text encoders and prompts for tests: a Flan-T5 of random weights in the form of the library that reads it."""

from pathlib import Path

import torch
from torch import Tensor, nn


def tiny_flan_t5(folder: Path, seed: int = 0) -> Path:
    """A T5 encoder of 8 channels whose tokens are words, in a folder that transformers opens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "an", "the", "red", "fox", "snow", "three", "seven", "above", "below", "two", "nine"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.normalizer = normalizers.NFKC()  # pyright: ignore[reportAttributeAccessIssue]
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = T5Config(vocab_size=len(words), d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    T5EncoderModel(sizes).save_pretrained(folder)
    return folder


class StandIn(nn.Module):
    """In the place of Inception's file: its layers see what they are given, at 299 pixels."""

    class Layers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.mean((2, 3)), x[:, :, 150, 150]], 1)

    def __init__(self) -> None:
        super().__init__()
        self.layers = StandIn.Layers()

    def forward(self, x: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        return x.mean((2, 3))
