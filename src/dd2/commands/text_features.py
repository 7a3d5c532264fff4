"""dd2 text-features: prompts to the features that a text-conditional model reads, in a file of their own."""

from dataclasses import dataclass
from pathlib import Path

from dd2.device import pick_device
from dd2.errors import InputError
from dd2.files import writable_folder
from dd2.processes import say
from dd2.text.captions import Captions, say_cut
from dd2.text.encoder import spec_of
from dd2.text.encoders import open_encoder
from dd2.text.prompts import read_prompts


@dataclass(frozen=True)
class TextFeaturesConfig:
    """Encode prompts once, where the encoder is: other machines then need the file alone (distill --captions FILE).

    Flan-T5 as LlamaGen's text models were trained with it: lower-cased, 120 positions, padded on the left; its clean-up of web
    captions (HTML, URLs) is not applied. Needs the extra `t2i`.
    """

    prompts: str
    """Text file, one prompt a line; a .csv, .json or .jsonl of prompts; or "scenes". Their numbers from 0 become the labels."""
    out: Path
    """File to write, .safetensors: features of all words (W, C) float16, counts (N,) of each prompt's, and what they say."""
    text_encoder: str = "google/flan-t5-xl"
    """"wordllama"; or a Flan-T5: folder, owner/name in the local cache of the Hub, owner/name@revision. LlamaGen's released
    models need flan-t5-xl."""
    length: int = 0
    """Positions P; 0: the encoder's usual number (Flan-T5: 120, wordllama: 32)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse counts below 0 and other file types."""
        if self.length < 0:
            raise InputError(f"length must not be negative, got {self.length}")
        if self.out.suffix != ".safetensors":
            raise InputError(f"out must end in .safetensors, got {self.out}")


def text_features(config: TextFeaturesConfig) -> Path:
    """Encode and write the file."""
    prompts = read_prompts(config.prompts)
    encoder = open_encoder(spec_of(config.text_encoder, config.length), device=pick_device(config.device))
    say_cut(prompts, encoder)
    writable_folder(config.out.parent, "output folder")
    Captions.encoded(prompts, encoder).save(config.out)
    say(f"wrote the features of {len(prompts):,} prompts, by {encoder.spec.said()}, to {config.out}")
    return config.out
