"""wordllama: a vector for each of 32,000 pieces of words, inside an ordinary Python package. Small, static, and no download."""

import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dd2.errors import InputError
from dd2.text.encoder import EncoderSpec, TextEncoder

TABLE, TOKENIZER = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"
"""Files of the package. Its own code, which averages vectors to one of a text, is not imported."""


FORM = b"places 1"
"""What is made of the files: another form of features is another encoder."""

SIZE = 0.7
"""Of the codes of places."""


class WordLlama(TextEncoder):
    """Vectors of the pieces of a text, lower-cased, behind one that begins it: the empty text has that one alone.

    They know nothing of each other; each bears a code of its place (`places`), so that "a three above a seven" can be told from
    "a seven above a three" by a model that has no positions of its own for captions, as LlamaGen has none.

    Args:
        length: P, positions.

    Raises:
        InputError: the packages wordllama and tokenizers are not installed.
    """

    def __init__(self, length: int) -> None:
        self._tokenizer, self._table, digest = _loaded()
        self._places = places(length, self._table.shape[1])
        self.spec = EncoderSpec("wordllama", length=length, channels=self._table.shape[1], digest=digest)

    def words(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._ids(texts)]

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        length = self.spec.length
        features = torch.zeros(len(texts), length, self._table.shape[1])
        mask = torch.zeros(len(texts), length, dtype=torch.long)
        for row, ids in enumerate(self._ids(texts)):
            kept = ids[:length]
            features[row, : len(kept)], mask[row, : len(kept)] = self._table[kept] + self._places[: len(kept)], 1
        return features, mask

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._tokenizer.encode_batch([text.lower() for text in texts])]


def places(length: int, channels: int) -> Tensor:
    """Codes (length, channels) of places 0 … length - 1: sines and cosines of growing wavelengths (Vaswani et al., 2017), as
    large as the vectors of words are.
    """
    angles = torch.arange(length).unsqueeze(1) * 10_000.0 ** (-torch.arange(0, channels, 2) / channels)
    return SIZE * torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


@functools.cache
def _loaded() -> tuple[Any, Tensor, str]:
    """Tokenizer, vectors (32000, 256) float32, and the hash of both files."""
    missing = 'the text encoder wordllama needs its package; pip install "dd2[t2i]"'
    found = importlib.util.find_spec("wordllama")
    if found is None or found.origin is None:
        raise InputError(missing)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError(missing) from error
    folder, content = Path(found.origin).parent, hashlib.sha256(FORM)
    try:
        for name in (TABLE, TOKENIZER):
            content.update((folder / name).read_bytes())
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer, load_file(folder / TABLE)["embedding.weight"].float(), content.hexdigest()
    except Exception as error:  # the tokenizers library has none of its own
        raise InputError(
            f"the package wordllama has other files than 0.4 ({error}); pip install 'wordllama>=0.4,<0.5'"
        ) from error
