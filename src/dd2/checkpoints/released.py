"""The released models' sizes, to plan with before any file is there."""

from collections.abc import Callable
from functools import partial

import torch

from dd2.checkpoints.var import PATCH_NUMS_256, PATCH_NUMS_512
from dd2.errors import InputError
from dd2.teachers.base import Teacher
from dd2.teachers.code import CodeTeacher
from dd2.teachers.llamagen import LlamaGenConfig, llamagen_teacher
from dd2.teachers.mar import MARTeacher
from dd2.teachers.mar_network import MARConfig
from dd2.teachers.var import var_teacher
from dd2.teachers.var_blocks import VARConfig
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.kl import KLConfig, KLTokenizer
from dd2.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from dd2.tokenizers.vq import VQTokenizer


def _var(depth: int, size: int = 256) -> CodeTeacher:
    patch_nums = PATCH_NUMS_512 if size == 512 else PATCH_NUMS_256
    config = VARConfig(depth=depth, width=64 * depth, heads=depth, shared_aln=size == 512)
    return var_teacher(config, MultiScaleTokenizer(MultiScaleConfig(image_size=size, patch_nums=patch_nums)))


def _llamagen(depth: int, width: int, heads: int, size: int, caption_dim: int = 0) -> CodeTeacher:
    side = size // 16
    config = LlamaGenConfig(depth=depth, width=width, heads=heads, rows=side, columns=side, caption_dim=caption_dim)
    return llamagen_teacher(config, VQTokenizer(VQConfig(image_size=size)))


def _mar(width: int, depth: int, heads: int, head_depth: int, head_width: int) -> MARTeacher:
    config = MARConfig(
        width=width,
        depth=depth,
        heads=heads,
        decoder_width=width,
        decoder_depth=depth,
        decoder_heads=heads,
        head_depth=head_depth,
        head_width=head_width,
    )
    return MARTeacher(config, KLTokenizer(KLConfig()))


RELEASED: dict[str, Callable[[], Teacher]] = {
    **{f"var_d{depth}": partial(_var, depth) for depth in (16, 20, 24, 30)},
    "var_d36_512": partial(_var, 36, 512),
    "llamagen_b": partial(_llamagen, 12, 768, 12, 256),
    "llamagen_l": partial(_llamagen, 24, 1024, 16, 256),
    "llamagen_xl_384": partial(_llamagen, 36, 1280, 20, 384),
    "llamagen_t2i_xl": partial(_llamagen, 36, 1280, 20, 256, 2048),
    "llamagen_t2i_xl_512": partial(_llamagen, 36, 1280, 20, 512, 2048),
    "mar_b": partial(_mar, 768, 12, 12, 6, 1024),
    "mar_l": partial(_mar, 1024, 16, 16, 8, 1280),
    "mar_h": partial(_mar, 1280, 20, 16, 12, 1536),
}
"""Name -> builder, after stage 0 where there is one."""


def sketch(name: str) -> Teacher:
    """A released model without weights (on the meta device).

    Raises:
        InputError: there is no such model.
    """
    if name not in RELEASED:
        raise InputError(f"there is no released model {name}; known are {', '.join(RELEASED)}")
    with torch.device("meta"):
        return RELEASED[name]()
