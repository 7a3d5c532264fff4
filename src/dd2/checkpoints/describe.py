"""What a checkpoint is, from its tensors' names and shapes."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dd2.checkpoints import llamagen, mar, var
from dd2.checkpoints.folder import construct, read_config
from dd2.checkpoints.foreign import parameters, read_state
from dd2.checkpoints.foreign_file import folder_said, read_file
from dd2.errors import InputError
from dd2.records import parsed
from dd2.tokenizers.base import DecoderAlignment

NESTS = (*var.TRANSFORMER_NESTS, *var.VQVAE_NESTS, *mar.MAR_NESTS, *llamagen.NESTS)

NOT_PARAMETERS = ("freqs_cis", "token_mean", "token_std", "order.phi_weight", "order.phi_bias")
"""Buffers that are not counted."""

Reader = Callable[[Mapping[str, Tensor]], dict[str, str]]


def describe(path: Path) -> dict[str, str]:
    """Family, sizes, flags and parameter count of a file, or of a folder of dd2's own, as text.

    Raises:
        InputError: there is nothing, or it is of no known family.
    """
    if path.is_dir():
        return _describe_folder(path)
    state = read_state(path, NESTS, device="meta")
    for key, read in READERS.items():
        if key in state:
            return read(state) | _count(state)
    some = ", ".join(list(state)[:4])
    raise InputError(f"{path} is of no family that dd2 knows (VAR, LlamaGen, MAR or its own folders); its keys start with {some}")


def _describe_folder(folder: Path) -> dict[str, str]:
    inner = next((f for f in (folder, folder / "generator", folder / "teacher") if (f / "config.json").is_file()), None)
    if inner is None:
        raise InputError(
            f"{folder} is no folder of dd2: neither it nor its generator/ or teacher/ has a config.json; it is "
            f"{folder_said(folder)}"
        )
    try:
        config: dict[str, Any] = parsed(inner / "config.json")
        sizes = {**config.get("config", {}), **{f"head.{key}": value for key, value in config.get("head", {}).items()}}
        # A generator of a user's own teacher names code in place of a family.
        named = "kind" if config["kind"] == "classifier" else "family"
        family = f"of the code {config['code']}" if "code" in config else str(config[named])
        role = f" ({config['role']})" if "role" in config else ""
        described = {"what": f"dd2 {config['kind']} folder {inner}{role}", "family": family}
        if names := config.get("class_names"):
            described["classes"] = ", ".join(map(str, names[:12])) + (f", … ({len(names)})" if len(names) > 12 else "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{inner / 'config.json'} does not describe a model of dd2 ({error}); restore it") from error
    beside = inner / "tokenizer" / "config.json"
    if beside.is_file() and (aligned := read_config(beside.parent, "tokenizer").get("aligned")):
        described["decoder"] = str(construct(DecoderAlignment, aligned, beside))
    return described | _sizes(sizes) | _count(read_file(inner / "model.safetensors", "meta"))


def _var_transformer(state: Mapping[str, Tensor]) -> dict[str, str]:
    positions = state["pos_1LC"].shape[1]
    known = {sum(side**2 for side in sides): sides for sides in (var.PATCH_NUMS_256, var.PATCH_NUMS_512)}
    patch_nums = known.get(positions)
    scales = list(patch_nums) if patch_nums else f"not among the released ones: {positions} positions"
    sizes = dataclasses.asdict(var.var_config(state))
    for training in ("drop_path", "class_dropout"):
        sizes.pop(training)
    return {"what": "VAR transformer", "family": "var"} | _sizes(sizes) | {"patch_nums": str(scales)}


def _var_vqvae(state: Mapping[str, Tensor]) -> dict[str, str]:
    sizes = dataclasses.asdict(var.vqvae_config(state, (1,)))
    for unknown in ("image_size", "patch_nums"):  # they are the user's choice, not in the file
        sizes.pop(unknown)
    return {"what": "VAR VQVAE", "family": "multiscale"} | _sizes(sizes)


def _llamagen_gpt(state: Mapping[str, Tensor]) -> dict[str, str]:
    width = state["tok_embeddings.weight"].shape[1]
    heads = llamagen.HEADS.get(width)
    sizes = dataclasses.asdict(llamagen.gpt_config(state, 1, heads or 1))
    for unknown in ("rows", "columns", "dropout", "class_dropout", "code_hidden", *(() if heads else ("heads", "kv_heads"))):
        sizes.pop(unknown)
    kind = "text" if sizes["caption_dim"] else "class"
    return {"what": f"LlamaGen transformer, {kind}-conditional", "family": "llamagen"} | _sizes(sizes)


def _llamagen_vq(state: Mapping[str, Tensor]) -> dict[str, str]:
    sizes = dataclasses.asdict(llamagen.vq_config(state, 256))
    sizes.pop("image_size")  # the user's choice, not in the file
    return {"what": "LlamaGen VQ model", "family": "vq"} | _sizes(sizes)


def _mar(state: Mapping[str, Tensor]) -> dict[str, str]:
    known = state["class_emb.weight"].shape[1] in mar.HEADS and state["decoder_embed.weight"].shape[0] in mar.HEADS
    sizes = dataclasses.asdict(mar.mar_config(state, None if known else 1))
    for unknown in ("dropout", "class_dropout", *(() if known else ("heads", "decoder_heads"))):
        sizes.pop(unknown)
    return {"what": "MAR transformer with its diffusion head", "family": "mar"} | _sizes(sizes)


def _kl(state: Mapping[str, Tensor]) -> dict[str, str]:
    sizes = dataclasses.asdict(mar.kl_config(state, 16))
    for unknown in ("image_size", "groups", "scale"):  # not in the file
        sizes.pop(unknown)
    return {"what": "KL autoencoder of MAR", "family": "kl"} | _sizes(sizes)


READERS: dict[str, Reader] = {
    "pos_1LC": _var_transformer,
    "quantize.quant_resi.qresi_ls.0.weight": _var_vqvae,
    "tok_embeddings.weight": _llamagen_gpt,
    "encoder.conv_blocks.0.res.0.conv1.weight": _llamagen_vq,
    "diffusion_pos_embed_learned": _mar,
    "post_quant_conv.weight": _kl,
}
"""A key that only one kind of checkpoint has -> how to read its sizes."""


def _sizes(sizes: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(list(value) if isinstance(value, tuple) else value) for name, value in sizes.items()}


def _count(state: Mapping[str, Tensor]) -> dict[str, str]:
    made = (var.var_ignored, var.vqvae_ignored, llamagen.vq_ignored, lambda key: key.endswith(NOT_PARAMETERS))
    count = parameters(tuple(value.shape) for key, value in state.items() if not any(is_made(key) for is_made in made))
    return {"parameters": f"{count:,} in {len(state)} tensors"}
