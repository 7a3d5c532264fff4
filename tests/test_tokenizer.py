"""The VQ tokenizer: its training passes, dead codes, and the data it is trained on."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dd2.data import digits
from dd2.data.source import ImageFolder, open_data
from dd2.errors import InputError
from dd2.teachers.next_scale import order_of
from dd2.tokenizers.base import TrainableTokenizer
from dd2.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from dd2.tokenizers.train import CodeUsage, VQLossConfig, vq_loss
from dd2.tokenizers.vq import VQTokenizer
from models import TINY_MULTISCALE, TINY_VQ


@pytest.fixture(params=["vq", "multiscale"])
def tokenizer(request) -> TrainableTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(TINY_VQ) if request.param == "vq" else MultiScaleTokenizer(TINY_MULTISCALE)


def test_straight_through_and_commitment(tokenizer):
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    usage = CodeUsage(12)
    loss, numbers = vq_loss(tokenizer, usage, images, VQLossConfig())
    loss.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0  # through the quantiser
    assert tokenizer.embedding.weight.grad.abs().sum() > 0
    assert 1 <= numbers["perplexity"] <= 12.01
    out = tokenizer.quantise(images)
    assert torch.equal(out.ids, tokenizer.encode(images))
    nearest = (out.vectors.unsqueeze(-2) - tokenizer.codebook).square().sum(-1).argmin(-1)
    torch.testing.assert_close(out.reconstruction.clamp(-1, 1), tokenizer.decode(out.ids).clamp(-1, 1))
    assert nearest.bincount(minlength=12).tolist() == out.ids.flatten().bincount(minlength=12).tolist()


def test_the_raster_tokenizer_lives_on_the_unit_sphere():
    torch.manual_seed(0)
    out = VQTokenizer(TINY_VQ).quantise(torch.rand(4, 1, 16, 16) * 2 - 1)
    torch.testing.assert_close(out.vectors.norm(dim=-1), torch.ones(64))


def test_each_scale_codes_what_the_earlier_ones_left():
    """With φ the identity, one scale's residual is what remains of the features, as the paper's Algorithm 1 of VAR."""
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(TINY_MULTISCALE)
    with torch.no_grad():
        for phi in tokenizer.quantize.phi:
            nn.init.dirac_(phi.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(phi.bias)  # pyright: ignore[reportArgumentType]
        tokenizer.embedding.weight.copy_(torch.randn(12, 4))
        images = torch.rand(2, 1, 16, 16) * 2 - 1
        left = tokenizer.quant_conv(tokenizer.encoder(images))
        ids = tokenizer.encode(images)
        for side, part in zip((1, 2, 4), ids.split([1, 4, 16], 1), strict=True):
            small = nn.functional.adaptive_avg_pool2d(left, side).flatten(2).transpose(1, 2)
            assert torch.equal(part, torch.cdist(small, tokenizer.codebook).argmin(-1))
            codes = tokenizer.codebook[part].transpose(1, 2).unflatten(2, (side, side))
            left = left - (nn.functional.interpolate(codes, (4, 4), mode="bicubic") if side < 4 else codes)
        torch.testing.assert_close(
            tokenizer.quant_conv(tokenizer.encoder(images)) - left, tokenizer.f_hat(tokenizer.codebook[ids])
        )


def test_next_scale_inputs_are_linear_in_the_codes_and_stop_where_the_tokens_do():
    torch.manual_seed(0)
    order = order_of(MultiScaleTokenizer(TINY_MULTISCALE))
    assert (order.n, order.num_steps, order.steps) == (21, 3, (slice(0, 1), slice(1, 5), slice(5, 21)))
    a, b = torch.randn(2, 3, 21, 4).unbind()
    zero = order.inputs(torch.zeros(3, 21, 4))  # φ's biases
    torch.testing.assert_close(order.inputs(a + b) - zero, order.inputs(a) + order.inputs(b) - 2 * zero)
    for kept in (0, 1, 5):
        torch.testing.assert_close(order.inputs(a[:, :kept]), order.inputs(a)[:, : (0, 4, 20)[(0, 1, 5).index(kept)]])
    with pytest.raises(ValueError, match="no whole number of scales"):
        order.inputs(a[:, :3])
    a.requires_grad_(True)
    (gradient,) = torch.autograd.grad(order.inputs(a)[:, 4:].sum(), a)
    assert (gradient[:, :5] != 0).all()
    assert (gradient[:, 5:] == 0).all()


def test_attention_reads_whole_earlier_scales_however_it_is_computed(monkeypatch):
    torch.manual_seed(0)
    order = order_of(MultiScaleTokenizer(TINY_MULTISCALE))
    q, k, v = torch.randn(3, 2, 2, 21, 8).unbind()
    mask = torch.tensor([[(i > 0) + (i > 4) >= (j > 0) + (j > 4) for j in range(21)] for i in range(21)])
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for dense_below in (0, 128):
        monkeypatch.setattr("dd2.teachers.next_scale.DENSE_BELOW", dense_below)
        torch.testing.assert_close(order.attend(q, k, v), expected)
        torch.testing.assert_close(order.attend(q[:, :, 1:], k, v), expected[:, :, 1:])
        torch.testing.assert_close(order.attend(q[:, :, 1:5], k[:, :, :5], v[:, :, :5]), expected[:, :, 1:5])


def test_scales_that_do_not_fit_are_refused():
    for sides in ((), (1, 2), (1, 4, 2), (0, 4), (1, 2, 4, 8)):
        with pytest.raises(InputError, match="patch_nums"):
            MultiScaleConfig(**TINY_VQ.__dict__, patch_nums=sides)


def test_dead_codes_come_back(tokenizer):
    config = VQLossConfig(usage_rate=0.5, revive_every=4)
    usage, random = CodeUsage(12), torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokenizer.embedding.weight[5:] = -tokenizer.embedding.weight[:1]  # far from all outputs
        images = torch.rand(8, 1, 16, 16) * 2 - 1
        used = tokenizer.encode(images).unique()
        tokenizer.embedding.weight[5:] = tokenizer.codebook[5] + 0.01 * torch.randn(7, 4, generator=random)
    before = tokenizer.embedding.weight.detach().clone()
    for _ in range(4):
        vq_loss(tokenizer, usage, images, config)
        usage.settle(tokenizer.embedding, config, random)
    moved = (tokenizer.embedding.weight != before).any(-1)
    assert moved.any()
    assert not moved[used[used < 5]].any()
    z = torch.nn.functional.normalize(torch.randn(20, 4), dim=-1)
    usage = CodeUsage(12)
    usage.saw(torch.tensor([[0, 1, 2] * 4]), z[:10])
    usage.saw(torch.tensor([[0, 1, 2] * 4]), z[10:])
    usage.settle(tokenizer.embedding, VQLossConfig(usage_rate=0.0, revive_every=1), random)
    assert all((z == tokenizer.embedding.weight[code]).all(-1).any() for code in range(3, 12))
    assert len(tokenizer.embedding.weight[3:].unique(dim=0)) > 4  # of both micro-batches


def test_perplexity_counts_codes_in_use():
    usage = CodeUsage(8)
    usage.share.zero_()
    usage.saw(torch.tensor([[0, 1, 2, 3]] * 5), torch.zeros(20, 4))
    usage.settle(nn.Embedding(8, 4), VQLossConfig(usage_rate=0.0, revive_every=0), torch.Generator())
    assert usage.perplexity.item() == pytest.approx(4)


def test_digits_are_real_split_and_augmented():
    train, labels = digits.load("train")
    test, _ = digits.load("test")
    assert (len(train), len(test)) == (1500, 297)
    assert labels.bincount().min() > 130
    assert (train.min(), train.max()) == (-1, 1)
    seen = {tuple(image.flatten().tolist()) for image in train}
    assert sum(tuple(image.flatten().tolist()) in seen for image in test) < 3
    plain = digits.enlarge(train[:50])
    assert plain.shape == (50, 1, 16, 16)
    down = torch.nn.functional.avg_pool2d(plain, 2)
    assert (down - train[:50]).abs().mean() < 0.1
    g = torch.Generator().manual_seed(0)
    moved = digits.augment(train[:50], g)
    assert 0.01 < (moved - plain).square().mean() < 0.3
    a, _ = digits.batch("train", 8, torch.Generator().manual_seed(1))
    b, _ = digits.batch("train", 8, torch.Generator().manual_seed(1))
    assert torch.equal(a, b)


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(30):
            colour = (250, 10, 10) if name == "cat" else (10, 10, 250)
            pixels = np.clip(np.array(colour) + rng.integers(-9, 9, (20, 30, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("zipped", [False, True])
def test_image_folders_and_zips(folder, zipped):
    path = folder
    if zipped:
        path = folder.with_suffix(".zip")
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*.png"):
                archive.write(file, f"train/{file.relative_to(folder)}")
    data = open_data(str(path), 16, 3)
    assert data.num_classes == 2
    images, labels = data.batch("train", 12, torch.Generator().manual_seed(0))
    assert images.shape == (12, 3, 16, 16)
    assert -1 <= images.min() < images.max() <= 1
    red = images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2))
    assert torch.equal(red, labels == 0)
    again, _ = data.batch("train", 12, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)
    assert ImageFolder(path, 16, 1).batch("test", 2, torch.Generator())[0].shape == (2, 1, 16, 16)
