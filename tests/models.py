"""Tiny models for the tests: the same classes as the full-size ones."""

import math
from typing import Any

import torch
from torch import nn

from dd2.student import HeadConfig
from dd2.teachers.code import CodeTeacher
from dd2.teachers.conditions import CaptionLabels
from dd2.teachers.llamagen import LlamaGenConfig, llamagen_teacher
from dd2.teachers.mar import MARTeacher
from dd2.teachers.mar_network import MARConfig
from dd2.teachers.var import var_teacher
from dd2.teachers.var_blocks import VARConfig
from dd2.text.captions import Captions
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.kl import KLConfig, KLTokenizer
from dd2.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from dd2.tokenizers.vq import VQTokenizer

HANG = 1200
"""Seconds after which a process is taken to hang; a busy machine may be slow, and that is no failure."""

TINY_HEAD = HeadConfig(depth=2, width=24, frequencies=8)
TINY_VQ = VQConfig(
    codebook_size=12,
    code_dim=4,
    image_size=16,
    image_channels=1,
    channels=8,
    multipliers=(1, 1, 2),
    res_blocks=1,
    z_channels=8,
    groups=4,
)
TINY_MULTISCALE = MultiScaleConfig(**TINY_VQ.__dict__, patch_nums=(1, 2, 4), phi=2)
TINY_LLAMAGEN = LlamaGenConfig(depth=2, width=32, heads=2, ffn_multiple=16, rows=4, columns=4, num_classes=3)

TINY_MAR: dict[str, Any] = {
    **{"width": 24, "depth": 1, "heads": 2, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2, "head_depth": 1},
    **{"head_width": 24, "rows": 4, "columns": 4, "code_dim": 4, "num_classes": 3, "buffer": 2, "start": 928, "dropout": 0.0},
}

TINY_VAR = VARConfig(depth=2, width=32, heads=2, mlp_ratio=2.0, num_classes=3)


def tiny_teacher(seed: int = 0, **changes: Any) -> CodeTeacher:
    """A random teacher with a peaked distribution, 4 x 4 tokens, V = 12, C = 4, 3 classes."""
    torch.manual_seed(seed)
    config = LlamaGenConfig(**{**TINY_LLAMAGEN.__dict__, **changes})
    teacher = llamagen_teacher(config, VQTokenizer(TINY_VQ))
    return _peaked(teacher)


def tiny_var(seed: int = 0, **changes: Any) -> CodeTeacher:
    """A random next-scale teacher with a peaked distribution: scales 1, 2, 4 (21 tokens), V = 12, C = 4, 3 classes."""
    torch.manual_seed(seed)
    config = VARConfig(**{**TINY_VAR.__dict__, **changes})
    return _peaked(var_teacher(config, MultiScaleTokenizer(TINY_MULTISCALE)))


def tiny_text(seed: int = 0, *, next_scale: bool = False) -> CodeTeacher:
    """`tiny_teacher`, or `tiny_var`, conditioned on three captions of one to three words, padded on the left."""
    teacher = (tiny_var if next_scale else tiny_teacher)(seed, caption_dim=6, caption_length=5)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 5, 6, generator=generator)
    mask = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
    teacher.conditions = CaptionLabels(5, 6, Captions.of_padded(features, mask))
    return teacher


def _peaked(teacher: CodeTeacher) -> CodeTeacher:
    nn.init.normal_(teacher.output.weight, std=0.4)  # pyright: ignore[reportArgumentType]
    for name, parameter in teacher.backbone.named_parameters():
        if parameter.ndim > 1 and "scale_mul" not in name:
            nn.init.normal_(parameter, std=1.2 / math.sqrt(parameter.shape[-1]))
    return teacher.eval().requires_grad_(False)


def tiny_mar(seed: int = 0, **changes: Any) -> MARTeacher:
    """A random masked teacher: 4 x 4 continuous tokens of 4 channels, 3 classes; its tokens depend on each other."""
    torch.manual_seed(seed)
    sizes = KLConfig(image_size=16, image_channels=1, channels=8, multipliers=(1, 1, 2), res_blocks=1, groups=4, z_channels=4)
    teacher = MARTeacher(MARConfig(**{**TINY_MAR, **changes}), KLTokenizer(sizes), steps=16)
    for name, parameter in teacher.mar.diffloss.named_parameters():
        if "final_layer" in name or "adaLN" in name:
            nn.init.normal_(parameter, std=0.1)  # else it predicts no noise, whatever is known
    return teacher.eval().requires_grad_(False)
