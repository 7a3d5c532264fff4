"""Official VAR checkpoints: transformer and VQVAE to a `CodeTeacher`. Sizes and flags are read off the tensors."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from dd2.checkpoints.foreign import Origin, Shapes, Source, fill, need, numbered, read_state
from dd2.errors import InputError
from dd2.processes import note
from dd2.teachers.code import CodeTeacher
from dd2.teachers.var import var_teacher
from dd2.teachers.var_blocks import VARConfig
from dd2.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

TRANSFORMER_NESTS = (("trainer", "var_wo_ddp"), ("var_wo_ddp",), ("model",), ("state_dict",))
VQVAE_NESTS = (("trainer", "vae_local"), ("vae_local",), ("model",), ("state_dict",))

Q_K_V = ("q", "k", "v")


def load_var(
    transformer: Source,
    vqvae: Source,
    *,
    patch_nums: Sequence[int] = PATCH_NUMS_256,
    num_heads: int | None = None,
) -> CodeTeacher:
    """A VAR teacher, `.tokenizer` included, from official files.

    Args:
        transformer: e.g. var_d16.pth, or a training checkpoint with trainer.var_wo_ddp, or a state dict.
        vqvae: e.g. vae_ch160v4096z32.pth, or a state dict.
        patch_nums: sides of the token maps; `PATCH_NUMS_512` for the 512 px models.
        num_heads: attention heads, for models without q/k norm whose heads are not 64 wide (the files do not say).

    Returns:
        The teacher in evaluation mode, float32, without standardisation (mean 0, std 1).

    Raises:
        InputError: a file is missing or damaged, or a key is missing, extra or mis-shaped.
    """
    if not patch_nums:
        raise InputError("patch_nums are empty; give the sides of the token maps, e.g. 1,2,3,4,5,6,8,10,13,16")
    vqvae_state = read_state(vqvae, VQVAE_NESTS)
    state = read_state(transformer, TRANSFORMER_NESTS)
    _refuse_swapped(state, vqvae_state)
    tokenizer = MultiScaleTokenizer(vqvae_config(vqvae_state, patch_nums))
    fill(tokenizer, vqvae_state, vqvae_origins, vqvae_ignored, "VAR's VQVAE", _vqvae_cause)
    config = var_config(state, num_heads)
    _check_positions(state, patch_nums)
    teacher = var_teacher(config, tokenizer)
    fill(teacher, state, var_origins, var_ignored, "VAR's transformer", _var_cause)
    return teacher.eval().requires_grad_(False)


def vqvae_config(state: Mapping[str, Tensor], patch_nums: Sequence[int]) -> MultiScaleConfig:
    """Sizes of VAR's VQVAE, read off its tensors."""
    what, cause = "VAR's VQVAE", "is this a VQVAE of VAR, such as vae_ch160v4096z32.pth?"
    codes, code_dim = need(state, "quantize.embedding.weight", what, cause, 2).shape
    channels, image_channels = need(state, "encoder.conv_in.weight", what, cause, 4).shape[:2]
    levels = numbered(state, "encoder.down.")
    widths = [need(state, f"encoder.down.{i}.block.0.conv1.weight", what, cause, 4).shape[0] for i in range(levels)]
    convolutions = numbered(state, "quantize.quant_resi.qresi_ls.")
    if not convolutions:
        raise InputError(
            f"{what}: no key quantize.quant_resi.qresi_ls.N: only the partially shared φ of the released models "
            "(share_quant_resi > 1) is supported"
        )
    return MultiScaleConfig(
        codebook_size=codes,
        code_dim=code_dim,
        image_size=patch_nums[-1] * 2 ** (levels - 1),
        image_channels=image_channels,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=numbered(state, "encoder.down.0.block."),
        z_channels=need(state, "encoder.conv_out.weight", what, cause, 4).shape[0],
        patch_nums=tuple(patch_nums),
        phi=convolutions,
    )


def var_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> VARConfig:
    """Sizes and flags of a VAR transformer, read off its tensors."""
    what, cause = "VAR's transformer", "is this a VAR transformer, such as var_d16.pth?"
    width = need(state, "pos_1LC", what, cause, 3).shape[2]
    scale = state.get("blocks.0.attn.scale_mul_1H11")
    if scale is not None and num_heads not in (None, scale.shape[1]):
        raise InputError(f"{what}: num_heads {num_heads} was given, but blocks.0.attn.scale_mul_1H11 has {scale.shape[1]} heads")
    if scale is None and num_heads is None and width % 64:
        raise InputError(
            f"{what}: without q/k norm the file does not tell its heads, and width {width} is no multiple of 64; give num_heads"
        )
    if scale is None and num_heads is None:
        note(f"{what}: {width // 64} heads, 64 wide as the released models': the file does not tell (num_heads)")
    heads = scale.shape[1] if scale is not None else width // 64 if num_heads is None else num_heads
    hidden = need(state, "blocks.0.ffn.fc1.weight", what, cause, 2).shape[0]
    return VARConfig(
        depth=numbered(state, "blocks."),
        width=width,
        heads=heads,
        mlp_ratio=hidden / width,
        num_classes=need(state, "class_emb.weight", what, cause, 2).shape[0] - 1,
        attn_l2_norm=scale is not None,
        shared_aln="shared_ada_lin.1.weight" in state,
    )


def var_origins(ours: Shapes) -> dict[str, Origin]:
    """Where the tensors of a `VARTeacher` (without tokenizer) come from; what it makes itself is left out."""
    made = ("backbone.token_mean", "backbone.token_std", "backbone.order.")
    return {
        key: Origin(key.replace("output.", "head.", 1) if key.startswith("output.") else key.removeprefix("backbone."))
        for key in ours
        if not key.startswith(made)
    }


def var_ignored(key: str) -> bool:
    """Buffers that follow from patch_nums and the architecture."""
    return key in ("lvl_1L", "attn_bias_for_masking") or key.endswith(".attn.zero_k_bias")


def vqvae_origins(ours: Shapes) -> dict[str, Origin]:
    """Where the tensors of a `MultiScaleTokenizer` come from. VAR numbers decoder levels from high to low resolution, and
    its attention has one convolution for q, k and v.
    """
    origins = {}
    for key in ours:
        name = latent_diffusion_name(key, ours).replace("quantize.phi.", "quantize.quant_resi.qresi_ls.")
        fused = re.fullmatch(r"(.*attn(?:_1|\.\d+))\.([qkv])\.(weight|bias)", name)
        origins[key] = Origin(f"{fused[1]}.qkv.{fused[3]}", Q_K_V.index(fused[2]), 3) if fused else Origin(name)
    return origins


def latent_diffusion_name(key: str, ours: Shapes) -> str:
    """What a tensor of our encoder or decoder is called in files of latent diffusion's layout, VAR's and MAR's among them, which
    number the decoder's levels from high to low resolution.
    """
    last = numbered(ours, "decoder.conv_blocks.") - 1
    name = re.sub(r"^encoder\.conv_blocks\.(\d+)", r"encoder.down.\1", key)
    name = re.sub(r"^decoder\.conv_blocks\.(\d+)", lambda found: f"decoder.up.{last - int(found[1])}", name)
    name = re.sub(r"^((?:en|de)coder\.(?:down|up)\.\d+)\.res\.", r"\1.block.", name)
    for index, block in enumerate(("block_1", "attn_1", "block_2")):
        name = re.sub(rf"^((?:en|de)coder\.mid)\.{index}\.", rf"\1.{block}.", name)
    return name


def vqvae_ignored(key: str) -> bool:
    """A statistic of VAR's training."""
    return key == "quantize.ema_vocab_hit_SV"


def _check_positions(state: Mapping[str, Tensor], patch_nums: Sequence[int]) -> None:
    positions, expected = state["pos_1LC"].shape[1], sum(side**2 for side in patch_nums)
    if positions != expected:
        raise InputError(
            f"VAR's transformer: pos_1LC has {positions} positions, but patch_nums {list(patch_nums)} have {expected}; "
            "give the patch_nums it was trained with (256 px: 680 positions, 512 px: 2240)"
        )


def _refuse_swapped(transformer: Mapping[str, Tensor], vqvae: Mapping[str, Tensor]) -> None:
    if "quantize.embedding.weight" in transformer and "pos_1LC" in vqvae:
        raise InputError("the transformer and the VQVAE are swapped: give the transformer (var_d16.pth) first")


def _var_cause(key: str) -> str:
    if "scale_mul_1H11" in key:
        return "the blocks disagree about attn_l2_norm: the file mixes models with and without q/k norm"
    if any(part in key for part in ("ada_lin", "ada_gss")) and not key.startswith("head_nm"):
        return "the blocks disagree about shared_aln: the file mixes models with shared and own adaLN projections"
    if key in ("lvl_embed.weight", "pos_start", "pos_1LC"):
        return "patch_nums differ from those it was trained with: give them (256 px: 1,2,3,4,5,6,8,10,13,16)"
    if key.startswith("blocks."):
        return "its depth or width is not that of the other blocks: the file is truncated or mixed; download it again"
    if key in ("word_embed.weight", "head.weight", "head.bias"):
        return "the VQVAE has another codebook than the transformer was trained with; give the matching pair"
    return "it is not a VAR transformer, or of a version with other parts"


def _vqvae_cause(key: str) -> str:
    if key.startswith(("pos_", "blocks.", "word_embed")):
        return "this is a transformer; give the VQVAE (vae_ch160v4096z32.pth)"
    return "its widths or blocks are not those of the other levels: the file is truncated or of another model; download it again"
