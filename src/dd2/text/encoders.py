"""Opening the text encoder that a model was trained with."""

import functools
from dataclasses import replace

import torch

from dd2.errors import InputError
from dd2.text.encoder import EncoderSpec, TextEncoder, spec_of
from dd2.text.flan_t5 import FlanT5
from dd2.text.wordllama import WordLlama


@functools.lru_cache(maxsize=1)
def open_encoder(spec: EncoderSpec, place: str = "", device: torch.device | None = None) -> TextEncoder:
    """Load an encoder; the last one stays loaded.

    Args:
        spec: which.
        place: where its weights lie on this machine (a folder, or a name as `spec_of` takes), if not where the specification
            says.
        device: where it computes.

    Raises:
        InputError: its library or its weights are missing, or they are another encoder's.
    """
    if place:
        named = spec_of(place, spec.length)
        if named.kind != spec.kind:
            raise InputError(f"this model was trained with the text encoder {spec.said()}; {place} is a {named.kind}")
        spec = replace(spec, name=named.name, revision=named.revision)
    made = WordLlama(spec.length) if spec.kind == "wordllama" else FlanT5(spec, device or torch.device("cpu"))
    known = spec if spec.channels > 1 else replace(spec, channels=made.spec.channels)
    if known.differs_from(made.spec):
        raise InputError(
            f"the text encoder {made.spec.said()} found here has other weights than the one that this model was trained with "
            f"({made.spec.channels} channels, digest {made.spec.digest[:8]}, not {known.channels} and {known.digest[:8]}); "
            "give its place with --text-encoder"
        )
    return made
