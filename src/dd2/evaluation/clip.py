"""CLIP scores, by the library transformers: how well images go with their prompts, in the field's named variants."""

import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dd2.errors import InputError
from dd2.evaluation.clean import centre_square, rgb
from dd2.processes import note
from dd2.text.pretrained import digest, opened

PREFIX = "A photo depicts"
"""What GigaGAN's evaluator, and who follows it, puts before every caption: as tokens, behind the start token."""


@dataclass(frozen=True)
class ClipVariant:
    """One way to compute it, whose numbers compare with no other's.

    Attributes:
        model: its weights on the Hub.
        prefix: whether captions get `PREFIX`.
        square: whether images are first cropped and brought to 256 pixels (GigaGAN's protocol).
        scaled: 100 times the cosine and not below 0, as torchmetrics has it; else the cosine itself.
    """

    model: str
    prefix: bool
    square: bool
    scaled: bool = False


B32, G14, L14 = "openai/clip-vit-base-patch32", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "openai/clip-vit-large-patch14"

CLIP_SCORES = {
    "clip_b32_prefix": ClipVariant(B32, prefix=True, square=True),
    "clip_b32": ClipVariant(B32, prefix=False, square=True),
    "clip_g14_prefix": ClipVariant(G14, prefix=True, square=True),
    "clip_g14": ClipVariant(G14, prefix=False, square=True),
    "clipscore_l14": ClipVariant(L14, prefix=False, square=False, scaled=True),
}
"""By the name that is printed beside every number: GigaGAN's, LlamaGen's and DMD2's (ViT-B/32; ViT-g/14 is the usual one in
distillation papers), the same without the prefix, and torchmetrics' default."""


class ClipScore:
    """One variant, with its weights.

    Args:
        spec: name of a variant; "NAME@FOLDER" or "NAME@owner/name" where its weights lie elsewhere than in the Hub's local cache.
        device: where it computes, in float32.

    Attributes:
        name: of the variant.
        digest: what decides its numbers, as a hash.

    Raises:
        InputError: there is no such variant, or its library or weights are not there.
    """

    def __init__(self, spec: str, device: torch.device) -> None:
        self.name, _, place = spec.partition("@")
        if self.name not in CLIP_SCORES:
            raise InputError(f"clip {self.name!r} is no variant of the CLIP score; they are {', '.join(CLIP_SCORES)}")
        self.variant, self.device = CLIP_SCORES[self.name], device
        place = place or self.variant.model
        remedy = f"fetch it (hf download {place}), or give NAME@FOLDER with --clip"
        found, self._tokenizer = opened(place, "CLIPModel", "CLIPTokenizer", "CLIP", remedy)
        self._model, self._side = found.to(device), int(found.config.vision_config.image_size)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        known = f"{self.name} {digest(found, self._tokenizer)} {_ftfy() is not None}"
        self.digest = hashlib.sha256(known.encode()).hexdigest()

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> Tensor:
        """Scores (B,) of images, each uint8 (H, W, 1 or 3), and what they are to show."""
        pixels = torch.stack([self._pixels(image) for image in images]).to(self.device)
        ids = torch.tensor([self.ids(text) for text in texts], device=self.device)
        seen = _embedding(self._model.get_image_features(pixel_values=pixels))
        read = _embedding(self._model.get_text_features(input_ids=ids))
        cosine = torch.nn.functional.cosine_similarity(seen, read).cpu()
        return (100 * cosine).clamp_min(0) if self.variant.scaled else cosine

    def ids(self, text: str) -> list[int]:
        """Tokens of a caption, 77 of them: begin, prefix, caption, end, padding. A caption that is too long is cut before its
        end.
        """
        length = int(self._model.config.text_config.max_position_embeddings)
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        words = self._tokenizer(_cleaned(text), add_special_tokens=False, verbose=False)["input_ids"][: length - 2]
        found = [*self._prefix, *words, end][: length - 1]
        found[-1] = end if len(found) == length - 1 else found[-1]
        return [begin, *found] + [end] * (length - 1 - len(found))  # only the first end is read

    @property
    def _prefix(self) -> list[int]:
        return self._tokenizer(PREFIX.lower(), add_special_tokens=False)["input_ids"] if self.variant.prefix else []

    def _pixels(self, image: np.ndarray) -> Tensor:
        """One image as CLIP's own preprocessing has it: shorter side by bicubic, middle square, normalised."""
        picture = Image.fromarray(rgb(image))
        picture = centre_square(picture) if self.variant.square else picture
        scale = self._side / min(picture.size)
        width, height = (self._side if length == min(picture.size) else int(scale * length) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self._side) / 2), round((height - self._side) / 2)
        picture = picture.crop((left, top, left + self._side, top + self._side))
        values = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
        return (values - self._mean) / self._std


def _embedding(found: Any) -> Tensor:
    """Of transformers 4, a tensor; of 5, an object that holds one."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _ftfy() -> Any:
    """The library that repairs texts; None where it is not installed."""
    try:
        import ftfy
    except ImportError:
        return None
    return ftfy


def _cleaned(text: str) -> str:
    """As CLIP's authors do before they tokenise: repaired, unescaped, single blanks, lower case."""
    if (ftfy := _ftfy()) is None:
        note("ftfy is not installed, so odd marks in captions are not repaired as CLIP's authors do (pip install ftfy)")
    else:
        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP was trained on; OpenAI's and LAION's models share them."""
