"""Other people's pictures: what folders and zips hold, what their folders mean, and any bytes in place of a picture."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dd2.cli import main
from dd2.data.layout import layout
from dd2.data.pictures import LARGEST_FILE, Pictures
from dd2.data.source import open_data
from dd2.errors import InputError
from dd2.evaluation.images import ImageSet
from edges import result_or_one_line


def put(folder: Path, count: int = 2, level: int = 100, size: int = 8, mode: str = "L") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new(mode, (size, size), level).save(folder / f"{index:03d}.png")
    return folder


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def levels_read(path: Path) -> tuple[list[int], list[int]]:
    """The grey levels that training and evaluation find in a folder of one class."""
    trained = open_data(str(path), 8, 1).batch("train", 4, torch.Generator().manual_seed(0))[0]
    evaluated = ImageSet(path)[torch.tensor([0])]
    return tuple((((x + 1) * 127.5).round().int().unique().tolist()) for x in (trained, evaluated))  # pyright: ignore


@pytest.mark.parametrize(
    ("image", "level"),
    [
        (Image.new("L", (8, 8), 90), 90),
        (Image.fromarray(np.full((8, 8), 90 * 257, np.uint16)), 90),  # 16 bits a channel
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), 255),
        (Image.new("1", (8, 8), 1), 255),
        (Image.new("LA", (8, 8), (90, 3)), 90),
        (Image.new("RGB", (8, 8), (90, 90, 90)), 90),
        (Image.new("RGBA", (8, 8), (90, 90, 90, 3)), 90),
        (Image.new("P", (8, 8), 0), 0),
    ],
    ids=["grey", "16 bits", "16 bits, white", "1 bit", "grey with alpha", "colour", "colour with alpha", "palette"],
)
def test_training_and_evaluation_read_the_same(tmp_path, image, level):
    (tmp_path / "d" / "c").mkdir(parents=True)
    for index in range(2):
        image.save(tmp_path / "d" / "c" / f"{index}.png")
    assert levels_read(tmp_path / "d") == ([level], [level])


def test_values_without_a_known_range_are_refused_by_both(tmp_path):
    folder = tmp_path / "d" / "c"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "x.tif")
    with pytest.raises(InputError, match=r"data .*x\.tif holds floating-point"):
        open_data(str(tmp_path / "d"), 8, 1).batch("train", 1, torch.Generator())
    with pytest.raises(InputError, match=r"reference .*x\.tif holds floating-point"):
        ImageSet(tmp_path / "d", "reference")


def test_what_a_folder_lists(tmp_path, capsys):
    put(tmp_path / "d" / "cat", 3)
    put(tmp_path / "real" / "dog", 2)
    (tmp_path / "d" / "dog").symlink_to(tmp_path / "real" / "dog")
    (tmp_path / "d" / "cat" / "loop").symlink_to(tmp_path / "d")
    put(tmp_path / "d" / ".cache" / "x")
    put(tmp_path / "d" / "__MACOSX")
    (tmp_path / "d" / "cat" / "folder.png").mkdir()
    (tmp_path / "d" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "d" / "cat" / "notes.txt").write_text("x")
    os.rename(tmp_path / "d" / "cat" / "000.png", os.fsencode(tmp_path / "d" / "cat") + b"/caf\xe9.PNG")
    data = open_data(str(tmp_path / "d"), 8, 1)
    assert data.class_names == ("cat", "dog")
    said = capsys.readouterr().out
    assert "5 images (left out: 1 .txt, 5 hidden), 2 classes (cat, dog); 4 to train on, 1 held out" in said
    assert len(ImageSet(tmp_path / "d")) == 5
    assert ImageSet(tmp_path / "d").digest()


def test_two_links_to_one_folder_are_two_classes(tmp_path):
    put(tmp_path / "d" / "real")
    (tmp_path / "d" / "alias").symlink_to(tmp_path / "d" / "real")
    assert open_data(str(tmp_path / "d"), 8, 1).class_names == ("alias", "real")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "gone.png").symlink_to(tmp_path / "nothing")
    for name, said in (("pipe", "neither a folder nor a file"), ("loop", "there is no such")):
        with pytest.raises(InputError, match=said):
            ImageSet(tmp_path / name)
    assert main(["evaluate", "--images", str(tmp_path / "loop"), "--reference", str(tmp_path / "d")]) == 2
    with pytest.raises(InputError, match=r"gone\.png cannot be read"):
        ImageSet(tmp_path / "d")
    (tmp_path / "d" / "gone.png").unlink()
    (tmp_path / "d" / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.png cannot be read as an image \(of no known format\)"):
        ImageSet(tmp_path / "d")


@pytest.mark.e2e
def test_a_name_that_is_not_utf8_is_scored_like_any(tmp_path, capsys):
    images, real = put(tmp_path / "x", 40), put(tmp_path / "r", 40, level=30)
    for folder in (images, real):
        rng = np.random.default_rng(len(folder.name))
        for file in folder.iterdir():
            Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(file)
    os.rename(images / "000.png", os.fsencode(images) + b"/caf\xe9.png")
    assert main(["evaluate", "--images", str(images), "--reference", str(real)]) == 0
    assert "40 images, 16 x 16 grey" in capsys.readouterr().out


def test_zips_of_other_systems(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        for index in range(2):
            for place in ("cat\\", "./dog/", "__MACOSX/cat/._"):
                archive.writestr(f"{place}{index}.png", encoded(Image.new("L", (8, 8), 7)))
        archive.writestr("cat/", b"")
        archive.writestr("../out.png", b"")
    data = open_data(str(tmp_path / "w.zip"), 8, 1)
    assert data.class_names == ("cat", "dog")
    assert Pictures(tmp_path / "w.zip", "data").left_out == {"hidden": 3}
    assert data.batch("train", 2, torch.Generator())[0].shape == (2, 1, 8, 8)


def test_damaged_and_encrypted_zips(tmp_path, monkeypatch):
    file = tmp_path / "w.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("cat/0.png", encoded(Image.new("L", (8, 8), 7)))
    whole = file.read_bytes()
    at = whole.index(b"\x89PNG")
    file.write_bytes(whole[: at + 30] + b"\xff" + whole[at + 31 :])
    with pytest.raises(InputError, match=r"0\.png cannot be read as an image \(Bad CRC"):
        Pictures(file, "data").image("cat/0.png")
    central = whole.index(b"PK\x01\x02")
    file.write_bytes(whole[:6] + b"\x01" + whole[7 : central + 8] + b"\x01" + whole[central + 9 :])
    with pytest.raises(InputError, match="is encrypted"):
        Pictures(file, "data")
    file.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="neither a folder nor a whole zip"):
        Pictures(file, "data")
    file.write_bytes(whole)
    monkeypatch.setattr("dd2.data.pictures.LARGEST_FILE", 20)
    with pytest.raises(InputError, match="it has"):
        Pictures(file, "data").image("cat/0.png")
    assert LARGEST_FILE > 2**26


LAYOUTS = {
    "classes": (["cat/0", "cat/1", "dog/0"], ("cat", "dog")),
    "a folder around them": (["set/cat/0", "set/dog/0"], ("cat", "dog")),
    "two folders around them": (["a/b/cat/0", "a/b/dog/0"], ("cat", "dog")),
    "folders in classes": (["cat/indoor/0", "cat/outdoor/0", "dog/indoor/0"], ("cat", "dog")),
    "one class": (["cat/0", "cat/1"], ("cat",)),
    "numbers": (["0/a", "2/a", "10/a", "1/a"], ("0", "1", "2", "10")),
    "numbers and words": (["0/a", "10/a", "2/a", "x/a"], ("0", "10", "2", "x")),
    "splits": (["train/cat/0", "train/dog/0", "val/cat/0"], ("cat", "dog")),
    "long names of splits": (["set/Training/cat/0", "set/Testing/cat/0"], ("cat",)),
    "train alone": (["train/cat/0", "train/dog/0"], ("cat", "dog")),
    "classes with names of splits": (["train/0", "bus/0", "test/1"], ("bus", "test", "train")),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(case):
    names, classes = LAYOUTS[case]
    found = layout(names, "data d")
    assert found.class_names == classes
    assert found.own == (case not in ("splits", "long names of splits"))
    for name, label in found.items["train"] + found.items["test"]:
        assert classes[label] in name.split("/")
    assert {name for items in found.items.values() for name, _ in items} == set(names)
    if not found.own:
        assert all("/Train" in f"/{name.title()}" for name, _ in found.items["train"])
        assert all(name.split("/")[-3].lower() in ("val", "testing") for name, _ in found.items["test"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/cat/0", "train/dog/0", "test/0", "test/1"], "test/ holds 2 images and no class folders"),
        (["train/cat/0", "test/unknown/0"], "unknown is a class of the test images alone"),
        (["test/cat/0", "val/cat/0"], "and no train/"),
        (["set/val/cat/0", "set/val/dog/0"], "has val alone, and no train/"),
        (["train/cat/0", "more/dog/0"], "has train beside more"),
        (["train/cat/0", "test/cat/0", "x"], "has images beside test, train, such as x"),
        (["cat/0", "dog/sub/0"], "several depths (1 like cat/0, 1 like dog/sub/0)"),
        (["cat/0", "x"], "several depths (1 like x, 1 like cat/0)"),
        (["train/cat/0", "train/dog/a/0", "test/cat/0"], "train holds images at several depths"),
        (["0", "1", "2"], "holds 3 images and no class folders"),
        (["train/0", "test/0"], "images and no class folders"),
    ],
)
def test_layouts_without_a_meaning(names, said):
    with pytest.raises(InputError) as refusal:
        layout(names, "data d")
    assert said in str(refusal.value)


@given(
    st.lists(st.lists(st.sampled_from(["train", "test", "a", "b", "10", "2"]), min_size=1, max_size=4), min_size=1, max_size=12)
)
def test_any_layout_gives_classes_or_one_line(folders):
    names = sorted({"/".join([*inner, f"{index}.png"]) for index, inner in enumerate(folders)})
    with result_or_one_line("data d"):
        found = layout(names, "data d")
        assert {name for items in found.items.values() for name, _ in items} == set(names)
        assert {label for _, label in found.items["train"]} <= set(range(len(found.class_names)))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["PNG", "BMP", "GIF", "TIFF", "JPEG", "WEBP", "PPM", "TGA", ""]), st.data())
def test_any_bytes_are_a_picture_or_one_line(tmp_path_factory, noise, kind, data):
    """Bytes of no format, and pictures of every format with some of their bytes changed."""
    content = bytearray(encoded(Image.new("RGB", (9, 7), (1, 2, 3)), kind) if kind else noise)
    if kind:
        for value in noise[:6]:
            content[data.draw(st.integers(0, len(content) - 1))] = value
        content = content[: data.draw(st.integers(0, len(content)))]
    file = tmp_path_factory.mktemp("p") / f"x.{(kind or 'png').lower()}"
    file.write_bytes(content)
    pictures = Pictures(file.parent, "images")
    for mode in ("L", "RGB", None):
        with result_or_one_line(file.name):
            assert pictures.image(pictures.names[0], mode).mode in ((mode,) if mode else ("L", "RGB"))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 10**6), st.booleans())
def test_any_bytes_are_a_zip_or_one_line(tmp_path_factory, noise, at, whole):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/0.png", "b/0.png"):
            archive.writestr(name, encoded(Image.new("L", (8, 8), 7)))
    content = bytearray(buffer.getvalue() if whole else noise)
    if whole:
        for offset, value in enumerate(noise[:4]):
            content[(at + 7 * offset) % len(content)] = value
    file = tmp_path_factory.mktemp("z") / "x.zip"
    file.write_bytes(content)
    with result_or_one_line(file.name):
        open_data(str(file), 8, 1).batch("train", 2, torch.Generator())
    with result_or_one_line(file.name):
        images = ImageSet(file)
        images[torch.arange(len(images))]


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(["uint8", "float32", "int64", "bool", "U3", "complex64"]),
    shape=st.sampled_from([(4, 8, 8, 1), (4, 8, 8, 3), (4, 8, 8), (0, 8, 8, 3), (), (4,), (4, 8, 8, 4)]),
    others=st.sampled_from([None, (4,), (4, 1), (3,), (4, 2), ()]),
    compressed=st.booleans(),
    damage=st.one_of(st.none(), st.tuples(st.integers(0, 10**6), st.integers(0, 255))),
)
def test_any_array_is_images_or_one_line(tmp_path_factory, kind, shape, others, compressed, damage):
    file = tmp_path_factory.mktemp("n") / "x.npz"
    more = {} if others is None else {"labels": np.ones(others, np.int64), "seeds": np.ones(others, np.float32)}
    (np.savez_compressed if compressed else np.savez)(file, arr_0=np.zeros(shape).astype(kind), **more)
    if damage:
        content = bytearray(file.read_bytes())
        content[damage[0] % len(content)] ^= damage[1]
        file.write_bytes(content)
    with result_or_one_line(file.name):
        images = ImageSet(file)
        assert images[torch.arange(len(images))].shape == (4, images.shape[2], 8, 8)
        assert (kind, shape[0]) == ("uint8", 4) or damage


def test_a_header_that_promises_more_than_there_is(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 3)})
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", kind) as archive:
            archive.writestr("arr_0.npy", header.getvalue() + bytes(64))
        with pytest.raises(InputError, match="not what it holds"):
            ImageSet(tmp_path / "x.npz")
