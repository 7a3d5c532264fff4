"""Data sets in the forms in which they are published."""

import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dd2.data.idx import IMAGES, LABELS, IdxImages
from dd2.data.source import ImageFolder, open_data
from dd2.errors import InputError


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_files(tmp_path: Path, zipped: bool):
    pixels = {split: np.random.default_rng(i).integers(0, 256, (40, 8, 8), np.uint8) for i, split in enumerate(("train", "t10k"))}
    labels = np.arange(40, dtype=np.uint8) % 4
    files = {f"{split}{IMAGES}": idx(array) for split, array in pixels.items()}
    files |= {f"{split}{LABELS}": idx(labels) for split in pixels}
    path = tmp_path / "set.zip" if zipped else tmp_path
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
    data = open_data(str(path), 8, 1)
    assert isinstance(data, IdxImages)
    assert data.num_classes == 4
    for split, array in (("train", pixels["train"]), ("test", pixels["t10k"])):
        images, found = data.batch(split, 30, torch.Generator().manual_seed(0))
        for image, label in zip(images, found, strict=True):
            rows = np.flatnonzero((array == ((image[0] + 1) * 127.5).round().byte().numpy()).all((1, 2)))
            assert labels[rows].tolist() == [int(label)]
    assert data.batch("train", 3, torch.Generator())[0].shape == (3, 1, 8, 8)
    assert IdxImages(path, 16).batch("train", 3, torch.Generator())[0].shape == (3, 1, 16, 16)
    with pytest.raises(InputError, match="is grey"):
        open_data(str(path), 8, 3)


def test_damaged_mnist_files(tmp_path: Path):
    (tmp_path / f"train{IMAGES}").write_bytes(idx(np.zeros((4, 8, 8), np.uint8))[:-20])
    with pytest.raises(InputError, match="missing or damaged"):
        open_data(str(tmp_path), 8, 1)
    (tmp_path / f"train{IMAGES}").write_bytes(idx(np.zeros((4, 8, 8), np.uint8)))
    with pytest.raises(InputError, match=r"train-labels.*missing or damaged"):
        open_data(str(tmp_path), 8, 1)


def test_mnist_files_that_do_not_agree(tmp_path: Path):
    for split in ("train", "t10k"):
        (tmp_path / f"{split}{IMAGES}").write_bytes(idx(np.zeros((4, 8, 8), np.uint8)))
        (tmp_path / f"{split}{LABELS}").write_bytes(idx(np.zeros(3 if split == "t10k" else 4, np.uint8)))
    with pytest.raises(InputError, match=r"labels of test are \(4, 8, 8\) and \(3,\)"):
        open_data(str(tmp_path), 8, 1)


def test_published_splits_are_kept(tmp_path: Path):
    for split, level in (("train", 10), ("val", 200)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(3):
                Image.new("L", (8, 8), level).save(tmp_path / split / label / f"{index}.png")
    data = ImageFolder(tmp_path, 8, 1)
    assert data.num_classes == 2
    for split, level in (("train", 10), ("test", 200)):
        images, _ = data.batch(split, 20, torch.Generator().manual_seed(0))
        assert ((images + 1) * 127.5).round().unique().tolist() == [level]
