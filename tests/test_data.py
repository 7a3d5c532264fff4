"""Data sets in the forms in which they are published."""

import gzip
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dd2.cli import main
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


def _pictures(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        left = np.zeros((8, 8), np.uint8)
        left[:, :4] = 100 + shade
        Image.fromarray(left).save(folder / name)


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv", "txt"])
@pytest.mark.parametrize("zipped", [False, True])
def test_pictures_with_captions(tmp_path, kind, zipped, capsys):
    """In each form, in a folder and in a zip: every picture has its caption, captions that are equal are one label, and nothing
    is mirrored, as captions may speak of sides.
    """
    names = [f"{split}/{number}.png" for split in ("train", "val") for number in range(3)]
    folder = tmp_path / "pictures"
    _pictures(folder, *names)
    texts = {name: "a fox to the left" if "1" in name else f"snow,  {name}" for name in names}
    for name, text in texts.items():
        if kind == "txt":
            (folder / name).with_suffix(".txt").write_text(text + "\n")
    if kind == "metadata.jsonl":
        for split in ("train", "val"):
            records = [{"file_name": name.split("/")[1], "text": text} for name, text in texts.items() if split in name]
            (folder / split / kind).write_text("\n".join(json.dumps(record) for record in records))
    elif kind == "metadata.csv":
        rows = "\n".join(f'{name},"{text}"' for name, text in texts.items())
        (folder / kind).write_text("file_name,caption\n" + rows)
    path = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder)) if zipped else folder
    data = open_data(str(path), 8, 1)
    assert data.num_classes == len(data.captions) == 5
    assert data.class_names == ()
    assert data.num_training == 3
    images, labels = data.batch("train", 64, torch.Generator().manual_seed(0))
    shades = ((images[:, 0, 0, 0] + 1) * 127.5).round().long() - 100
    assert (images[:, 0, :, 4:] == -1).all()
    for shade, label in zip(shades.tolist(), labels.tolist(), strict=True):
        assert data.captions[label] == " ".join(texts[names[shade]].split())
    assert "5 different captions; 3 to train on, 3 for tests" in capsys.readouterr().out


def test_own_data_is_of_classes(tmp_path, capsys):
    _pictures(tmp_path / "a", "x.png", "y.png")
    (tmp_path / "a" / "metadata.jsonl").write_text(
        '{"file_name": "x.png", "text": "fox"}\n{"file_name": "y.png", "text": "snow"}\n'
    )
    assert main(["own-data", str(tmp_path / "a"), "--size", "16", "--out", str(tmp_path / "out")]) == 2
    assert "own-data makes models of classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"file_name": "none.png", "text": "fox"}', "names none.png, which is not beside it"),
        (
            '{"file_name": "a.png", "text": "fox"}\n{"file_name": "b.png"}',
            "record 2 needs file_name and prompt or caption or text",
        ),
        ('{"file_name": "a.png", "text": " "}', "record 1 needs file_name and prompt or caption or text"),
        ('{"file_name": "a.png", "text": 3}', "record 1 needs file_name and prompt or caption or text"),
        ("[1]", "something else than records"),
        ("nonsense", "not valid JSON"),
        ("", "name no picture"),
        (b"\xe9", "not UTF-8"),
    ],
)
def test_lists_of_captions_that_are_none(tmp_path, content, said):
    _pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said) as caught:
        open_data(str(tmp_path), 8, 1)
    assert "\n" not in str(caught.value)


def test_pictures_of_which_some_have_captions(tmp_path, capsys):
    """A list leaves pictures out, which is said; text files beside some pictures alone are none of captions."""
    _pictures(tmp_path / "a", "x.png", "y.png", "z.png")
    (tmp_path / "a" / "metadata.jsonl").write_text(
        '{"file_name": "x.png", "text": "fox"}\n{"file_name": "y.png", "text": "snow"}\n'
    )
    assert open_data(str(tmp_path / "a"), 8, 1).captions == ("fox", "snow")
    assert "(1 without one are left out)" in capsys.readouterr().out
    _pictures(tmp_path / "b", "fox/x.png", "snow/y.png")
    (tmp_path / "b" / "fox" / "x.txt").write_text("a note")
    assert open_data(str(tmp_path / "b"), 8, 1).class_names == ("fox", "snow")
    (tmp_path / "b" / "metadata.csv").write_text("file_name,label\nfox/x.png,1\n")  # a table about something else
    assert open_data(str(tmp_path / "b"), 8, 1).class_names == ("fox", "snow")
    (tmp_path / "a" / "metadata.csv").write_text("file_name,text\nx.png,another fox\n")
    with pytest.raises(InputError, match=r"x\.png is listed with two captions"):
        open_data(str(tmp_path / "a"), 8, 1)
    _pictures(tmp_path / "c", "train/x.png", "test/y.png", "z.png")
    for name in ("train/x", "test/y", "z"):
        (tmp_path / "c" / f"{name}.txt").write_text(name)
    with pytest.raises(InputError, match=r"outside of them, such as z\.png"):
        open_data(str(tmp_path / "c"), 8, 1)
    (tmp_path / "b" / "snow" / "y.txt").write_text("")
    with pytest.raises(InputError, match=r"y\.txt is empty"):
        open_data(str(tmp_path / "b"), 8, 1)
