"""Official checkpoints as files: every layout loads, every defect is one clear error, dd2 convert and inspect."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dd2.checkpoints import load_llamagen, load_var
from dd2.checkpoints.foreign import read_state
from dd2.checkpoints.llamagen import size_in_name
from dd2.checkpoints.native import load_teacher
from dd2.cli import main
from dd2.errors import InputError
from dd2.teachers.code import require_codes
from dd2.teachers.filtering import Sampling
from golden_weights import golden_model, golden_sizes

PATCH_NUMS = golden_sizes("var_tiny")["patch_nums"]


@pytest.fixture
def transformer() -> dict[str, Tensor]:
    return golden_model("var_tiny", "var_shapes")


@pytest.fixture(scope="module")
def vqvae() -> dict[str, Tensor]:
    return golden_model("var_tiny", "vqvae_shapes")


@pytest.mark.parametrize("layout", ["pth", "legacy", "safetensors", "trainer", "ddp"])
def test_every_layout_gives_the_same_teacher(tmp_path, transformer, vqvae, layout):
    file = tmp_path / ("var.safetensors" if layout == "safetensors" else "var.pth")
    buffers = {"lvl_1L": torch.zeros(1, 14, dtype=torch.long), "blocks.0.attn.zero_k_bias": torch.zeros(64)}
    if layout == "safetensors":
        save_file(transformer, file)
    elif layout == "trainer":
        torch.save({"epoch": 3, "trainer": {"var_wo_ddp": transformer | buffers, "var_opt": {"state": {}}}}, file)
    elif layout == "ddp":
        torch.save({f"module.{key}": value for key, value in transformer.items()}, file)
    else:
        torch.save(transformer | buffers, file, _use_new_zipfile_serialization=layout == "pth")
    torch.save({"trainer": {"vae_local": vqvae}} if layout == "trainer" else vqvae, tmp_path / "vae.pth")
    teacher = load_var(file, tmp_path / "vae.pth", patch_nums=PATCH_NUMS)
    expected = load_var(transformer, vqvae, patch_nums=PATCH_NUMS)
    for key, value in expected.state_dict().items():
        assert torch.equal(teacher.state_dict()[key], value), key


def without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in keys}


DEFECTS = {
    "depth": (lambda s: without(s, "blocks.1.ffn.fc1.weight"), r"key blocks.1.ffn.fc1.weight is missing.*truncated"),
    "qk norm": (lambda s: without(s, "blocks.1.attn.scale_mul_1H11"), r"scale_mul_1H11 is missing.*attn_l2_norm"),
    "adaln": (lambda s: without(s, "blocks.0.ada_lin.1.bias"), r"ada_lin.1.bias is missing.*shared_aln"),
    "extra": (lambda s: s | {"blocks.0.ffn.fc3.weight": torch.zeros(2)}, r"fc3.weight is not part of such a model"),
    "shape": (
        lambda s: s | {"blocks.0.attn.proj.weight": torch.zeros(64, 63)},
        r"proj.weight has shape \(64, 63\), expected \(64, 64\)",
    ),
    "levels": (lambda s: s | {"lvl_embed.weight": torch.zeros(10, 64)}, r"lvl_embed.weight has shape.*patch_nums"),
    "codebook": (lambda s: s | {"head.weight": torch.zeros(4096, 64)}, r"head.weight has shape.*another codebook"),
    "rank": (lambda s: s | {"pos_1LC": torch.zeros(14, 64)}, r"pos_1LC has shape \(14, 64\), expected 3 dimensions"),
    "something else": (lambda s: {"conv1.weight": torch.zeros(3, 3)}, r"key pos_1LC is missing; is this a VAR transformer"),
    "empty": (lambda s: {}, r"holds no state dict"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_names_the_key_and_its_likely_cause(transformer, vqvae, name):
    damage, message = DEFECTS[name]
    with pytest.raises(InputError, match=message):
        load_var(damage(transformer), vqvae, patch_nums=PATCH_NUMS)


def test_wrong_arguments_are_explained(transformer, vqvae):
    with pytest.raises(InputError, match=r"pos_1LC has 14 positions, but patch_nums .* have 680"):
        load_var(transformer, vqvae)
    with pytest.raises(InputError, match="swapped"):
        load_var(vqvae, transformer, patch_nums=PATCH_NUMS)
    with pytest.raises(InputError, match=r"num_heads 4 was given, but .* has 2 heads"):
        load_var(transformer, vqvae, patch_nums=PATCH_NUMS, num_heads=4)
    with pytest.raises(InputError, match=r"quantize.embedding.weight is missing.*VQVAE of VAR"):
        load_var(transformer, transformer, patch_nums=PATCH_NUMS)
    with pytest.raises(InputError, match=r"qresi_ls.N: only the partially shared"):
        load_var(transformer, {k: v for k, v in vqvae.items() if "qresi" not in k}, patch_nums=PATCH_NUMS)
    with pytest.raises(InputError, match=r"key decoder.up.4.attn.0.qkv.bias is missing"):
        load_var(transformer, without(vqvae, "decoder.up.4.attn.0.qkv.bias"), patch_nums=PATCH_NUMS)


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


def test_files_that_are_not_plain_tensors_are_refused(tmp_path, transformer, vqvae, capsys):
    file = tmp_path / "var.pth"
    torch.save(transformer | {"extra": Harmful()}, file)
    with pytest.raises(InputError, match=r"var.pth is no checkpoint of plain tensors"):
        load_var(file, vqvae, patch_nums=PATCH_NUMS)
    assert "ran" not in capsys.readouterr().out
    torch.save(transformer, file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match="damaged"):
        load_var(file, vqvae, patch_nums=PATCH_NUMS)
    (tmp_path / "var.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="damaged"):
        load_var(tmp_path / "var.safetensors", vqvae, patch_nums=PATCH_NUMS)
    torch.save([1, 2], file)
    with pytest.raises(InputError, match="holds a list"):
        load_var(file, vqvae, patch_nums=PATCH_NUMS)
    with pytest.raises(InputError, match="does not exist"):
        load_var(tmp_path / "none.pth", vqvae, patch_nums=PATCH_NUMS)


@pytest.fixture
def files(tmp_path, transformer, vqvae) -> tuple[Path, Path]:
    torch.save({"trainer": {"var_wo_ddp": transformer}}, tmp_path / "var.pth")
    torch.save(vqvae, tmp_path / "vae.pth")
    return tmp_path / "var.pth", tmp_path / "vae.pth"


def test_convert_and_inspect(tmp_path, files, capsys):
    out = tmp_path / "teacher"
    arguments = ["convert", "var", "--transformer", files[0], "--vqvae", files[1], "--out", out, "--patch-nums", 1, 2, 3]
    assert main([str(a) for a in arguments]) == 0
    teacher = require_codes(load_teacher(out), "a test")
    expected = load_var(*files, patch_nums=PATCH_NUMS)
    labels = torch.tensor([1, 7])
    sampling = Sampling(cfg_scale=1.5, top_k=5)
    assert torch.equal(teacher.generate(labels, sampling, [0, 1]), expected.generate(labels, sampling, [0, 1]))
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    assert "exists already" in capsys.readouterr().err
    reports = {}
    for path in (*files, out):
        assert main(["inspect", str(path)]) == 0
        reports[path.name] = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert reports["var.pth"]["what"] == "VAR transformer"
    assert {k: reports["var.pth"][k] for k in ("depth", "width", "heads", "num_classes", "attn_l2_norm", "shared_aln")} == {
        "depth": "2", "width": "64", "heads": "2", "num_classes": "10", "attn_l2_norm": "True", "shared_aln": "False",
    }  # fmt: skip
    count = sum(value.numel() for value in torch.load(files[0], weights_only=True)["trainer"]["var_wo_ddp"].values())
    assert reports["var.pth"]["parameters"].startswith(f"{count:,} ")
    assert (reports["vae.pth"]["what"], reports["vae.pth"]["codebook_size"]) == ("VAR VQVAE", "64")
    assert (reports["teacher"]["family"], reports["teacher"]["depth"]) == ("var", "2")


@pytest.mark.parametrize("layout", ["pth", "legacy", "safetensors"])
def test_names_and_shapes_are_read_without_the_numbers(tmp_path, transformer, layout):
    file = tmp_path / ("var.safetensors" if layout == "safetensors" else "var.pth")
    if layout == "safetensors":
        save_file(transformer, file)
    else:
        torch.save(transformer, file, _use_new_zipfile_serialization=layout == "pth")
    state = read_state(file, (), device="meta")
    assert all(value.is_meta for value in state.values())
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in transformer.items()}


LLAMAGEN_DEFECTS = {
    "depth": (lambda s: without(s, "layers.1.ffn_norm.weight"), r"key layers.1.ffn_norm.weight is missing.*truncated"),
    "extra": (lambda s: s | {"layers.0.attention.bias": torch.zeros(2)}, r"attention.bias is not part of such a model"),
    "shape": (lambda s: s | {"layers.1.attention.wo.weight": torch.zeros(64, 32)}, r"wo.weight has shape \(64, 32\)"),
    "codebook": (lambda s: s | {"output.weight": torch.zeros(99, 64)}, r"output.weight has shape.*another codebook"),
    "heads": (lambda s: s | {"layers.0.attention.wqkv.weight": torch.zeros(100, 64)}, r"wqkv.weight has 100 rows"),
    "hidden": (lambda s: s | {"layers.0.feed_forward.w1.weight": torch.zeros(100, 64)}, r"w1.weight has 100 rows"),
    "condition": (lambda s: without(s, "cls_embedding.embedding_table.weight"), r"embedding_table.weight is missing"),
    "something else": (lambda s: {"conv1.weight": torch.zeros(3, 3)}, r"tok_embeddings.weight is missing; is this a transformer"),
}


@pytest.mark.parametrize("name", LLAMAGEN_DEFECTS)
def test_llamagen_defects_name_the_key_and_its_likely_cause(name):
    damage, message = LLAMAGEN_DEFECTS[name]
    gpt, vq = golden_model("llamagen_tiny", "gpt_shapes"), golden_model("llamagen_tiny", "vq_shapes")
    with pytest.raises(InputError, match=message):
        load_llamagen(damage(gpt), vq, num_heads=2, image_size=16)


def test_llamagen_layouts_and_arguments(tmp_path):
    gpt, vq = golden_model("llamagen_tiny", "gpt_shapes"), golden_model("llamagen_tiny", "vq_shapes")
    expected = load_llamagen(gpt, vq, num_heads=2, image_size=16).state_dict()
    statistics = {"quantize.codebook_used": torch.zeros(65536)}
    for index, (a, b) in enumerate(
        (
            ({"model": gpt, "steps": 3, "args": Namespace(lr=1e-4)}, {"model": vq | statistics}),
            ({"ema": gpt}, {"ema": vq}),
            (gpt | {"freqs_cis": torch.zeros(3)}, vq),
        )
    ):
        torch.save(a, tmp_path / f"gpt{index}.pt")
        torch.save(b, tmp_path / f"vq{index}.pt")
        teacher = load_llamagen(tmp_path / f"gpt{index}.pt", tmp_path / f"vq{index}.pt", num_heads=2, image_size=16)
        assert all(torch.equal(value, expected[key]) for key, value in teacher.state_dict().items())
        assert not teacher.backbone.continuous
    with pytest.raises(InputError, match="width 64 with unknown heads; give num_heads"):
        load_llamagen(gpt, vq)
    with pytest.raises(InputError, match="swapped"):
        load_llamagen(vq, gpt, num_heads=2)
    with pytest.raises(InputError, match="VQ model of LlamaGen"):
        load_llamagen(gpt, gpt, num_heads=2)
    sizes = {384: ("c2i_L_384.pt", "c2i_XL_384 (1).pt", "c2i-XL-384.pt", "c2i_XL_384px.pt"), 512: ("x/t2i_XL_stage2_512.pt",)}
    for size, names in (sizes | {256: ("c2i_B_256.pt", "mine.pt", "v13840.pt")}).items():
        assert [size_in_name(name) for name in names] == [size] * len(names)
    with pytest.raises(InputError, match="with 0 heads"):  # a value, and not "unset"
        load_llamagen(gpt | {"tok_embeddings.weight": torch.zeros(8, 768)}, vq, num_heads=0, image_size=16)


def test_inspect_llamagen(tmp_path, capsys):
    for model, kind in (("llamagen_tiny", "class"), ("llamagen_t2i_tiny", "text")):
        torch.save({"model": golden_model(model, "gpt_shapes")}, tmp_path / "gpt.pt")
        assert main(["inspect", str(tmp_path / "gpt.pt")]) == 0
        report = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
        assert report["what"] == f"LlamaGen transformer, {kind}-conditional"
        assert (report["depth"], report["width"]) == ("2", "64")
    torch.save(golden_model("llamagen_tiny", "vq_shapes"), tmp_path / "vq.pt")
    assert main(["inspect", str(tmp_path / "vq.pt")]) == 0
    assert "LlamaGen VQ model" in capsys.readouterr().out


def test_inspect_refuses_what_it_does_not_know(tmp_path, capsys):
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps({"kind": "teacher"}))
    for path, message in (
        (tmp_path / "other.safetensors", "no family"),
        (tmp_path, "no folder of dd2"),
        (tmp_path / "half", "restore"),
    ):
        assert main(["inspect", str(path)]) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert len(errors.strip().splitlines()) == 1
