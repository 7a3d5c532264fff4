"""Official MAR checkpoints: transformer with head, and its KL autoencoder, to a `MARTeacher`. Sizes are read off the tensors."""

import math
from collections.abc import Mapping

from torch import Tensor

from dd2.checkpoints.foreign import Origin, Shapes, Source, fill, need, numbered, read_nested, read_state
from dd2.checkpoints.var import latent_diffusion_name
from dd2.errors import InputError
from dd2.processes import note
from dd2.teachers.mar import MARTeacher
from dd2.teachers.mar_network import MARConfig
from dd2.tokenizers.kl import KLConfig, KLTokenizer

MAR_NESTS = (("model_ema",), ("model",), ("state_dict",))
"""Where state dicts lie: the average first, which the official evaluation uses."""
KL_NESTS = (("model",), ("state_dict",))

HEADS = {768: 12, 1024: 16, 1280: 16}
"""Heads of the released widths (B, L, H); files do not tell them."""

MAR, KL = "MAR's transformer", "MAR's KL autoencoder"
NO_MAR = "is this a MAR of LTH14/mar, such as mar_base/checkpoint-last.pth?"
NO_KL = "is this the autoencoder of LTH14/mar, kl16.ckpt?"


def load_mar(mar: Source, vae: Source | None = None, *, num_heads: int | None = None) -> MARTeacher:
    """A MAR teacher, `.tokenizer` included, from official files.

    Args:
        mar: e.g. mar_base/checkpoint-last.pth ({"model_ema": …, "model": …}; the average is taken), mar-base.safetensors, or a
            state dict.
        vae: e.g. kl16.ckpt or kl16.safetensors; None gives an untrained tokenizer of the sizes that go with it, which draws
            nothing that can be looked at.
        num_heads: attention heads of encoder and decoder; known for the released widths.

    Returns:
        The teacher in evaluation mode, float32.

    Raises:
        InputError: a file is missing or damaged, a key is missing, extra or mis-shaped, or the heads are unknown.
    """
    state = read_state(mar, MAR_NESTS)
    vae_state = {} if vae is None else read_state(vae, KL_NESTS)
    if "encoder.conv_in.weight" in state and "z_proj.weight" in vae_state:
        raise InputError("the transformer and the autoencoder are swapped: give the transformer (checkpoint-last.pth) first")
    config = mar_config(state, num_heads)
    if vae is None:
        tokenizer = KLTokenizer(KLConfig(z_channels=config.code_dim, image_size=16 * config.rows))
    else:
        tokenizer = KLTokenizer(kl_config(vae_state, config.rows))
        fill(tokenizer, vae_state, kl_origins, lambda key: False, KL, _kl_cause)
    teacher = MARTeacher(config, tokenizer)
    fill(teacher, state, mar_origins, lambda key: False, MAR, _mar_cause)
    return teacher.eval().requires_grad_(False)


def weights_of(source: Source) -> str:
    """Which weights `load_mar` takes of a file that may hold several: model_ema, model, state_dict or "its only weights"."""
    return read_nested(source, MAR_NESTS, device="meta")[1] or "its only weights"


def mar_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> MARConfig:
    """Sizes of a MAR, read off its tensors."""
    classes, width = need(state, "class_emb.weight", MAR, NO_MAR, 2).shape
    inner = need(state, "decoder_embed.weight", MAR, NO_MAR, 2).shape[0]
    positions = need(state, "diffusion_pos_embed_learned", MAR, NO_MAR, 3).shape[1]
    side = math.isqrt(positions)
    if side * side != positions:
        raise InputError(f"{MAR}: {positions} positions are no square of tokens; {NO_MAR}")
    heads = [HEADS.get(size) if num_heads is None else num_heads for size in (width, inner)]
    if None in heads:
        raise InputError(f"{MAR}: the file does not tell its heads, and width {width} is none of the released; give num_heads")
    if num_heads is None:
        note(f"{MAR}: {heads[0]} heads, as the released model of width {width} has: the file does not tell (num_heads)")
    return MARConfig(
        width=width,
        depth=numbered(state, "encoder_blocks."),
        heads=heads[0] or 0,
        decoder_width=inner,
        decoder_depth=numbered(state, "decoder_blocks."),
        decoder_heads=heads[1] or 0,
        mlp_ratio=need(state, "encoder_blocks.0.mlp.fc1.weight", MAR, NO_MAR, 2).shape[0] / width,
        head_depth=numbered(state, "diffloss.net.res_blocks."),
        head_width=need(state, "diffloss.net.input_proj.weight", MAR, NO_MAR, 2).shape[0],
        rows=side,
        columns=side,
        code_dim=need(state, "z_proj.weight", MAR, NO_MAR, 2).shape[1],
        num_classes=classes,
        buffer=need(state, "encoder_pos_embed_learned", MAR, NO_MAR, 3).shape[1] - positions,
    )


def kl_config(state: Mapping[str, Tensor], side: int) -> KLConfig:
    """Sizes of the autoencoder, read off its tensors; `side` is the number of tokens per row, which they do not tell."""
    if any(key.startswith("decoder.up.") and ".attn." in key for key in state):
        raise InputError(
            f"{KL}: its decoder has attention at its lowest resolution, as the original kl-f16 of latent diffusion has; MAR was "
            "trained with an autoencoder of its own without it: give kl16.ckpt of LTH14/mar"
        )
    channels, image_channels = need(state, "encoder.conv_in.weight", KL, NO_KL, 4).shape[:2]
    levels = numbered(state, "encoder.down.")
    widths = [need(state, f"encoder.down.{i}.block.0.conv1.weight", KL, NO_KL, 4).shape[0] for i in range(levels)]
    return KLConfig(
        image_size=side * 2 ** (levels - 1),
        image_channels=image_channels,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=numbered(state, "encoder.down.0.block."),
        encoder_attention=any(key.startswith("encoder.down.") and ".attn." in key for key in state),
        z_channels=need(state, "post_quant_conv.weight", KL, NO_KL, 4).shape[0],
    )


def mar_origins(ours: Shapes) -> dict[str, Origin]:
    """Where the tensors of a `MARTeacher` (without tokenizer) come from: under the same names."""
    return {key: Origin(key.removeprefix("backbone.mar.")) for key in ours if key.startswith("backbone.mar.")}


def kl_origins(ours: Shapes) -> dict[str, Origin]:
    """Where the tensors of a `KLTokenizer` come from."""
    return {key: Origin(latent_diffusion_name(key, ours)) for key in ours}


def _mar_cause(key: str) -> str:
    if key.startswith(("encoder_blocks.", "decoder_blocks.", "diffloss.")):
        return "its depth or width is not that of the other blocks: the file is truncated or mixed; download it again"
    return "it is not a MAR, or of a version with other parts"


def _kl_cause(key: str) -> str:
    if key.startswith(("encoder_blocks.", "z_proj", "diffloss")):
        return "this is a transformer; give the autoencoder (kl16.ckpt)"
    return "its widths or blocks are not those of the other levels: the file is truncated or of another model; download it again"
