"""Official LlamaGen checkpoints: transformer (class- or text-conditional) and VQ model to a `CodeTeacher`."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dd2.checkpoints.foreign import Origin, Shapes, Source, fill, need, numbered, read_state
from dd2.errors import InputError
from dd2.processes import note
from dd2.teachers.code import CodeTeacher
from dd2.teachers.conditions import CaptionLabels
from dd2.teachers.filtering import Sampling
from dd2.teachers.llamagen import LlamaGenConfig, llamagen_teacher
from dd2.text.encoder import EncoderSpec
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.vq import VQTokenizer

NESTS = (("model",), ("module",), ("state_dict",), ("ema",))
"""Where state dicts lie; the official sampler prefers "model" to "ema"."""

HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 3200: 32}
"""Heads of the released widths (B, L, XL, XXL, 3B); files do not tell them."""

IMAGE_SIZES = (256, 384, 512)
ENCODERS = {2048: "google/flan-t5-xl", 1024: "google/flan-t5-large", 768: "google/flan-t5-base", 512: "google/flan-t5-small"}
"""Flan-T5 by the channels of its features; the released text models have the first."""

TEXT_SAMPLING = Sampling(cfg_scale=7.5, top_k=1000)
"""Of LlamaGen's text sampler."""

GPT, VQ = "LlamaGen's transformer", "LlamaGen's VQ model"


def load_llamagen(gpt: Source, vq: Source, *, num_heads: int | None = None, image_size: int | None = None) -> CodeTeacher:
    """A LlamaGen teacher, `.tokenizer` included, from official files. It reads exact codes only, until `dd2 adapt`.

    Args:
        gpt: e.g. c2i_L_256.pt, t2i_XL_stage1_256.pt: {"model": …}, {"ema": …}, a bare state dict, or its file.
        vq: e.g. vq_ds16_c2i.pt.
        num_heads: attention heads; known for the released widths.
        image_size: pixels the transformer was trained at. The tensors do not tell; None takes it from a released file's name
            (…_384.pt), else 256.

    Returns:
        The teacher in evaluation mode, float32, without standardisation (mean 0, std 1).

    Raises:
        InputError: a file is missing or damaged, a key is missing, extra or mis-shaped, or the heads are unknown.
    """
    state, vq_state = read_state(gpt, NESTS), read_state(vq, NESTS)
    if "quantize.embedding.weight" in state and "tok_embeddings.weight" in vq_state:
        raise InputError("the transformer and the VQ model are swapped: give the transformer (c2i_L_256.pt) first")
    tokenizer = VQTokenizer(vq_config(vq_state, size_in_name(gpt) if image_size is None else image_size))
    fill(tokenizer, vq_state, lambda shapes: {key: Origin(key) for key in shapes}, vq_ignored, VQ, _vq_cause)
    teacher = llamagen_teacher(gpt_config(state, tokenizer.config.grid, num_heads), tokenizer)
    fill(teacher, state, gpt_origins, lambda key: key == "freqs_cis", GPT, _gpt_cause)
    if isinstance(labels := teacher.conditions, CaptionLabels):
        encoder = EncoderSpec("flan-t5", ENCODERS.get(labels.channels, ""), length=labels.length, channels=labels.channels)
        teacher.conditions = CaptionLabels(labels.length, labels.channels, encoder=encoder)
        teacher.usual_sampling = TEXT_SAMPLING
        usual = f"cfg_scale {TEXT_SAMPLING.cfg_scale} and top_k {TEXT_SAMPLING.top_k}"
        note(f"{GPT}: conditioned on text, by features of {encoder.said()}, drawn at {usual} unless told otherwise")
    return teacher.eval().requires_grad_(False)


def vq_config(state: Mapping[str, Tensor], image_size: int) -> VQConfig:
    """Sizes of LlamaGen's VQ model, read off its tensors."""
    cause = "is this a VQ model of LlamaGen, such as vq_ds16_c2i.pt?"
    codes, code_dim = need(state, "quantize.embedding.weight", VQ, cause, 2).shape
    channels, image_channels = need(state, "encoder.conv_in.weight", VQ, cause, 4).shape[:2]
    levels = numbered(state, "encoder.conv_blocks.")
    widths = [need(state, f"encoder.conv_blocks.{i}.res.0.conv1.weight", VQ, cause, 4).shape[0] for i in range(levels)]
    return VQConfig(
        codebook_size=codes,
        code_dim=code_dim,
        image_size=image_size,
        image_channels=image_channels,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=numbered(state, "encoder.conv_blocks.0.res."),
        z_channels=need(state, "encoder.conv_out.weight", VQ, cause, 4).shape[0],
    )


def gpt_config(state: Mapping[str, Tensor], grid: int, num_heads: int | None = None) -> LlamaGenConfig:
    """Sizes of a LlamaGen transformer, read off its tensors.

    Args:
        state: official tensors.
        grid: tokens per side of an image.
        num_heads: see `load_llamagen`.
    """
    cause = "is this a transformer of LlamaGen, such as c2i_L_256.pt?"
    width = need(state, "tok_embeddings.weight", GPT, cause, 2).shape[1]
    heads = HEADS.get(width) if num_heads is None else num_heads
    if num_heads is None and heads:
        note(f"{GPT}: {heads} heads, as the released model of width {width} has: the file does not tell (num_heads)")
    if not heads or heads < 0 or width % heads:
        known = ", ".join(f"{size}: {count}" for size, count in HEADS.items())
        raise InputError(
            f"{GPT}: width {width} with {'unknown' if heads is None else heads} heads; give num_heads (released widths: {known})"
        )
    rows = need(state, "layers.0.attention.wqkv.weight", GPT, cause, 2).shape[0]
    pairs = (rows - width) * heads // width  # keys and values together
    if pairs < 2 or pairs % 2 or rows != width + pairs * (width // heads):
        raise InputError(
            f"{GPT}: layers.0.attention.wqkv.weight has {rows} rows, which {heads} heads of width {width} cannot have"
        )
    hidden = need(state, "layers.0.feed_forward.w1.weight", GPT, cause, 2).shape[0]
    multiple = next((m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if -(-int(8 * width / 3) // m) * m == hidden), None)
    if multiple is None:
        raise InputError(f"{GPT}: layers.0.feed_forward.w1.weight has {hidden} rows, not 8/3 of the width {width} rounded up")
    captions = state.get("cls_embedding.uncond_embedding")
    classes = None if captions is not None else need(state, "cls_embedding.embedding_table.weight", GPT, cause, 2)
    return LlamaGenConfig(
        depth=numbered(state, "layers."),
        width=width,
        heads=heads,
        kv_heads=0 if pairs == 2 * heads else pairs // 2,
        ffn_multiple=multiple,
        rows=grid,
        columns=grid,
        num_classes=1000 if classes is None else classes.shape[0] - 1,
        caption_dim=0 if captions is None else captions.shape[1],
        caption_length=120 if captions is None else captions.shape[0],
        input_layer="table",
    )


def gpt_origins(ours: Shapes) -> dict[str, Origin]:
    """Where the tensors of a LlamaGen teacher (without tokenizer) come from."""
    renamed = {"cls_embedding.weight": "cls_embedding.embedding_table.weight"}
    origins = {}
    for key in ours:
        if key not in ("backbone.token_mean", "backbone.token_std"):
            name = key.removeprefix("backbone.")
            origins[key] = Origin(renamed.get(name, name))
    return origins


def vq_ignored(key: str) -> bool:
    """A statistic of LlamaGen's training."""
    return key == "quantize.codebook_used"


def size_in_name(source: Source) -> int:
    """The image size in a file's name, e.g. 384 of c2i_L_384.pt, as released files have it; 256 if there is none. It is said."""
    stem = Path(source).stem if isinstance(source, str | Path) else ""
    found = re.search(rf"(?<!\d)({'|'.join(map(str, IMAGE_SIZES))})(?!\d)", stem)
    size = int(found[1]) if found else 256
    why = f"as its name {stem} says" if found else "the usual size"
    note(f"{GPT}: images of {size} pixels, {why}: the file does not tell (image_size)")
    return size


def _gpt_cause(key: str) -> str:
    if key.startswith("cls_embedding"):
        return "the file mixes class and text conditioning, or is truncated; download it again"
    if key in ("tok_embeddings.weight", "output.weight"):
        return "the VQ model has another codebook than the transformer was trained with; give the matching pair"
    if key.startswith("layers."):
        return "its depth, width or heads are not those of the other layers: the file is truncated or mixed; download it again"
    return "it is not a LlamaGen transformer, or of a version with other parts"


def _vq_cause(key: str) -> str:
    if key.startswith(("layers.", "tok_embeddings", "output")):
        return "this is a transformer; give the VQ model (vq_ds16_c2i.pt)"
    return "its widths or blocks are not those of the other levels: the file is truncated or of another model; download it again"
