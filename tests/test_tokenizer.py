"""The VQ tokenizer: its training passes, dead codes, and the data it is trained on."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dd2.data import digits
from dd2.data.source import ImageFolder, open_data
from dd2.tokenizers.train import CodeUsage, VQLossConfig, vq_loss
from dd2.tokenizers.vq import VQTokenizer, revive
from models import TINY_VQ


@pytest.fixture
def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(TINY_VQ)


def test_straight_through_and_commitment(tokenizer):
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    usage = CodeUsage(12)
    loss, numbers = vq_loss(tokenizer, usage, images, VQLossConfig(), torch.Generator().manual_seed(0))
    loss.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0  # through the quantiser
    assert tokenizer.quantize.embedding.weight.grad.abs().sum() > 0
    assert 1 <= numbers["perplexity"] <= 12.01
    z, codes, ids = tokenizer.quantise(images)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(4, 16))
    assert torch.equal(ids, (z.unsqueeze(-2) - tokenizer.codebook).square().sum(-1).argmin(-1))
    torch.testing.assert_close(codes, tokenizer.codebook[ids])


def test_dead_codes_come_back(tokenizer):
    config = VQLossConfig(usage_rate=0.5, revive_every=4)
    usage, random = CodeUsage(12), torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[5:] = -tokenizer.quantize.embedding.weight[:1]  # far from all outputs
        images = torch.rand(8, 1, 16, 16) * 2 - 1
        used = tokenizer.encode(images).unique()
        tokenizer.quantize.embedding.weight[5:] = tokenizer.codebook[5] + 0.01 * torch.randn(7, 4, generator=random)
    before = tokenizer.quantize.embedding.weight.detach().clone()
    for _ in range(4):
        vq_loss(tokenizer, usage, images, config, random)
    moved = (tokenizer.quantize.embedding.weight != before).any(-1)
    assert moved.any()
    assert not moved[used[used < 5]].any()
    dead = torch.zeros(12, dtype=torch.bool)
    dead[3] = True
    z = torch.nn.functional.normalize(torch.randn(20, 4), dim=-1)
    revive(tokenizer.quantize, dead, z, random)
    assert (z == tokenizer.quantize.embedding.weight[3]).all(-1).any()


def test_perplexity_counts_codes_in_use():
    usage = CodeUsage(8)
    usage.share.zero_()
    usage.update(torch.tensor([[0, 1, 2, 3]] * 5), 0.0)
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
