"""dd2 evaluate on anybody's images, references in every form, export, and two processes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dd2.checkpoints.runs import embedded
from dd2.cli import main
from dd2.data import digits
from dd2.errors import InputError
from dd2.evaluation import inception
from dd2.evaluation.features import classifier_features, inception_features, open_features, read_features
from dd2.evaluation.images import ImageSet
from dd2.evaluation.metrics import MetricConfig, scores
from dd2.frechet import FeatureStatistics, fit_gaussian, frechet_distance
from dd2.images import grid, to_uint8
from dd2.writers import FolderWriter, NpzWriter, open_writer

pytestmark = pytest.mark.e2e


def draw(seed: int, count: int = 200) -> Tensor:
    return digits.batch("train", count, torch.Generator().manual_seed(seed))[0]


def write(images: Tensor, path: Path) -> Path:
    """As a folder, a zip or an .npz, by the ending."""
    labels = [0] * len(images)
    if path.suffix == ".npz":
        save(path, images, labels, list(range(len(images))))
    elif path.suffix == ".zip":
        folder = path.with_suffix("")
        write(images, folder)
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, f"some/where/{file.name}")
    else:
        path.mkdir()
        save(path, images, labels, list(range(len(images))))
    return path


def save(path: Path, images: Tensor, labels: list[int], seeds: list[int]) -> None:
    with open_writer(path) as writer:
        for part in torch.arange(len(images)).split(7):  # as a command does: batch by batch
            writer.add(images[part], [labels[i] for i in part], [seeds[i] for i in part])


def evaluated(images: Path, reference: Path, *more: object) -> dict[str, float]:
    arguments = ["evaluate", "--images", images, "--reference", reference, "--batch", 64, *more]
    assert main([str(a) for a in arguments]) == 0
    return json.loads((images.with_name(f"{images.name}.dd2") / "metrics.json").read_text())["metrics"]["images"]


def test_the_distance_is_the_same_in_every_form(tmp_path, capsys):
    a, b = draw(1), draw(2)
    network = classifier_features(embedded("classifier"), torch.device("cpu"))
    fits = []
    for images in (a, b):
        statistics = FeatureStatistics()
        statistics.add(read_features(network, images)["pool"])
        fits.append(statistics.fit())
    expected = frechet_distance(*fits)
    references = [write(b, tmp_path / name) for name in ("ref", "ref2.zip", "ref3.npz")]
    assert main(["reference", str(references[0]), str(tmp_path / "stats.npz")]) == 0
    for name in ("a", "a2.zip", "a3.npz"):
        images = write(a, tmp_path / name)
        for reference in (*references, tmp_path / "stats.npz"):
            assert evaluated(images, reference)["frechet"] == pytest.approx(expected, rel=1e-6)
    found = evaluated(tmp_path / "a", references[0])
    assert {"precision", "recall", "kid", "sfid", "inception_score", "frechet_95"} <= found.keys()
    assert "precision" not in evaluated(tmp_path / "a", tmp_path / "stats.npz")  # statistics alone
    with np.load(tmp_path / "stats.npz") as stats:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(stats.files)
    assert "SHA-256" in capsys.readouterr().out


def test_statistics_with_images_for_precision_and_recall(tmp_path):
    """ADM's VIRTUAL files: statistics of the training set, and images that serve precision and recall alone."""
    images, others = draw(1), draw(2)
    write(images, tmp_path / "a")
    write(others, tmp_path / "b")
    assert main(["reference", str(tmp_path / "b"), str(tmp_path / "plain.npz")]) == 0
    with np.load(tmp_path / "plain.npz") as stats:
        np.savez(tmp_path / "virtual.npz", **{k: stats[k] for k in ("mu", "sigma", "mu_s", "sigma_s")}, arr_0=to_uint8(others))
    found, plain = evaluated(tmp_path / "a", tmp_path / "virtual.npz"), evaluated(tmp_path / "a", tmp_path / "b")
    for name in ("frechet", "sfid", "precision", "recall"):
        assert found[name] == pytest.approx(plain[name], rel=1e-5)


def test_images_are_mapped_not_loaded(tmp_path):
    images = draw(3, 20)
    write(images, tmp_path / "a.npz")
    opened = ImageSet(tmp_path / "a.npz")
    assert isinstance(opened._array, np.memmap)
    torch.testing.assert_close(opened[torch.tensor([3, 0])], images[[3, 0]], atol=1 / 127, rtol=0)
    assert opened.seeds == list(range(20))
    np.savez_compressed(tmp_path / "b.npz", arr_0=to_uint8(images))
    assert torch.equal(ImageSet(tmp_path / "b.npz")[torch.arange(20)], opened[torch.arange(20)])
    with np.load(tmp_path / "a.npz") as content:
        assert np.array_equal(content["arr_0"], to_uint8(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.parametrize("name", ["a.npz", "a.png", "a"])
def test_what_was_written_before_an_interruption_is_whole(tmp_path, name):
    images, out = draw(3, 20), tmp_path / name
    if not out.suffix:
        out.mkdir()
    with pytest.raises(KeyboardInterrupt), open_writer(out, first=5, keep_partial=True) as writer:  # noqa: PT012
        writer.add(images[:7], range(7), range(7))
        writer.add(images[7:14], range(7), range(7, 14))
        raise KeyboardInterrupt
    assert writer.kept == 14
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if out.suffix == ".npz":
        with np.load(out) as content:
            assert np.array_equal(content["arr_0"], to_uint8(images[:14]))
            assert content["seeds"].tolist() == list(range(14))
    elif out.suffix == ".png":
        assert np.array_equal(np.asarray(Image.open(out)), np.asarray(grid(images[:14])))
    else:
        assert sorted(path.name for path in out.iterdir())[13] == "000018_label6_seed13.png"
        assert np.array_equal(np.asarray(Image.open(out / "000005_label0_seed0.png")), to_uint8(images)[0, ..., 0])


def test_what_must_be_whole_is_not_written_in_part(tmp_path):
    """An export that an error ended leaves the file of before: a smaller set would give another FID, and nobody would see it."""
    images = draw(3, 20)
    save(tmp_path / "a.npz", images, [0] * 20, list(range(20)))
    before = (tmp_path / "a.npz").read_bytes()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), NpzWriter(tmp_path / "a.npz") as writer:  # noqa: PT012
            writer.add(images[:7], [0] * 7, range(7))
            raise error
        assert writer.kept == 0
        assert (tmp_path / "a.npz").read_bytes() == before
    with pytest.raises(RuntimeError), NpzWriter(tmp_path / "a.npz", keep_partial=True) as writer:  # noqa: PT012
        writer.add(images[:7], [0] * 7, range(7))
        raise RuntimeError
    assert (tmp_path / "a.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_an_interruption_while_the_file_is_finished_waits_for_it(tmp_path, monkeypatch, capsys):
    copy = shutil.copyfileobj

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        copy(*arguments)

    monkeypatch.setattr("dd2.writers.shutil.copyfileobj", interrupted)
    save(tmp_path / "a.npz", draw(3, 20), [0] * 20, list(range(20)))
    assert "finishing the file" in capsys.readouterr().err
    with np.load(tmp_path / "a.npz") as content:
        assert len(content["arr_0"]) == 20


def test_nothing_is_written_where_nothing_was_done_and_a_failing_disk_is_told(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / "a.npz"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    images = draw(3, 6)
    with pytest.raises(OSError, match="gone"), FolderWriter(tmp_path / "gone") as writer:  # noqa: PT012
        writer.add(images, [0] * 6, range(6))
        writer.add(images, [0] * 6, range(6))
    with pytest.raises(OSError, match="gone"):
        NpzWriter(tmp_path / "gone" / "a.npz")


def test_an_npz_is_written_without_holding_it_in_memory(tmp_path):
    """64 MiB of pixels in batches of 4 MiB."""
    images = torch.zeros(16, 1, 512, 512)
    tracemalloc.start()
    with NpzWriter(tmp_path / "a.npz") as writer:
        for _ in range(16):
            writer.add(images, [0] * 16, range(16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 64 * 2**20
    assert peak < 36 * 2**20  # numpy's and Python's own: a batch on its way, and a buffer of 16 MiB


def refused(capsys, *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("dd2: ") for line in lines) == 1
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def test_bad_images_and_references(tmp_path, capsys):
    a = write(draw(1, 12), tmp_path / "a.npz")
    r = write(draw(2, 12), tmp_path / "r")
    capsys.readouterr()
    assert "images have no teacher" in refused(capsys, "evaluate", "--images", a)
    assert "there is no such folder" in refused(capsys, "evaluate", "--images", tmp_path / "none", "--reference", r)
    assert "there is no such folder" in refused(capsys, "evaluate", "--images", a, "--reference", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "there are no images in it" in refused(capsys, "evaluate", "--images", tmp_path / "empty", "--reference", r)
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((4, 16, 16, 1)))
    assert "must be uint8" in refused(capsys, "evaluate", "--images", tmp_path / "float.npz", "--reference", r)
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    assert "no arr_0" in refused(capsys, "evaluate", "--images", tmp_path / "other.npz", "--reference", r)
    (tmp_path / "broken.npz").write_bytes(b"PK nonsense")
    assert "cannot be read" in refused(capsys, "evaluate", "--images", tmp_path / "broken.npz", "--reference", r)
    save(tmp_path / "uneven.npz", draw(1, 12), [0] * 7 + [1] * 5, list(range(12)))
    assert "5 to 7 of each of 2 labels" in refused(capsys, "evaluate", "--images", tmp_path / "uneven.npz", "--reference", r)
    save(tmp_path / "twice.npz", draw(1, 12), [0] * 12, [1] * 12)
    assert "11 of 12 were drawn with a seed" in refused(capsys, "evaluate", "--images", tmp_path / "twice.npz", "--reference", r)
    Image.new("L", (8, 8)).save(tmp_path / "r" / "small.png")
    assert "differ in size" in refused(capsys, "evaluate", "--images", a, "--reference", r)
    (tmp_path / "r" / "small.png").write_bytes(b"no picture")
    assert "small.png cannot be read" in refused(capsys, "evaluate", "--images", a, "--reference", r)
    colours = write(torch.zeros(5, 3, 8, 8), tmp_path / "colour.npz")
    assert "reads 1 x 16 x 16" in refused(capsys, "evaluate", "--images", colours, "--reference", colours)
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    assert "both mu and sigma" in refused(capsys, "evaluate", "--images", a, "--reference", tmp_path / "half.npz")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    assert "must be (F,) and (F, F)" in refused(capsys, "evaluate", "--images", a, "--reference", tmp_path / "odd.npz")
    assert "out must end in .npz" in refused(capsys, "reference", a, tmp_path / "x.txt")
    for name, arrays, said in (
        ("text", {"mu": np.array(["a"]), "sigma": np.eye(64)}, "mu is <U1, it must hold real numbers"),
        ("json", {"mu": np.zeros(64), "sigma": np.eye(64), "described": np.array("[1]")}, "described is no JSON object"),
        ("nan", {"mu": np.zeros(64), "sigma": np.full((64, 64), np.nan)}, "NaN"),
        ("uneven", {"mu": np.zeros(64), "sigma": np.triu(np.ones((64, 64)))}, "is no covariance"),
        ("negative", {"mu": np.zeros(64), "sigma": -np.eye(64)}, "is no covariance"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        assert said in refused(capsys, "evaluate", "--images", a, "--reference", tmp_path / f"{name}.npz")
    np.savez(tmp_path / "long.npz", mu=np.zeros(64, np.longdouble), sigma=np.eye(64, dtype=np.int64))  # other real numbers serve
    assert evaluated(a, tmp_path / "long.npz")["frechet"] > 0


class Mixed6(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3), keepdim=True)


class FakeInception(nn.Module):
    """NVIDIA's file by its calls and the names of its layers: pixels in 0 to 255, features or unbiased probabilities."""

    def __init__(self, names: tuple[str, ...] = inception.BEFORE_MIXED_6) -> None:
        super().__init__()
        pooling = {name: nn.AvgPool2d(3, 2, 1) for name in names}
        self.layers = nn.Sequential(OrderedDict([*pooling.items(), ("mixed_6", Mixed6())]))
        if names:
            self.layers.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        # TensorFlow 1's resize, written out: sample points at whole multiples of the ratio.
        rows, columns = [torch.arange(299) * (float(side) / 299) for side in x.shape[2:]]
        x = lerp(lerp(x, rows, 2), columns, 3)
        pool = self.layers((x - 128) / 128).flatten(1)
        return pool if return_features else (pool * 4).softmax(1)


def lerp(x: Tensor, at: Tensor, dim: int) -> Tensor:
    low = at.floor().long()
    high = (low + 1).clamp(max=x.shape[dim] - 1)
    share = (at - low).view([-1, 1] if dim == 2 else [-1])
    return x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share


def test_grey_pictures_among_colour_ones_and_broken_archives(tmp_path, capsys):
    (tmp_path / "mixed").mkdir()
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "mixed" / "a.png")
    Image.new("L", (8, 8), 40).save(tmp_path / "mixed" / "b.png")
    images = ImageSet(tmp_path / "mixed")
    assert ((images[torch.tensor([1])] + 1) * 127.5).round().unique().tolist() == [40]
    assert images[torch.tensor([0, 1])].shape == (2, 3, 8, 8)
    Image.new("I;16", (8, 8), 4000).save(tmp_path / "mixed" / "0.png")
    assert "the first is grey" in refused(capsys, "evaluate", "--images", tmp_path / "mixed", "--reference", tmp_path / "mixed")
    whole = write(draw(1, 8), tmp_path / "z.zip").read_bytes()
    (tmp_path / "z.zip").write_bytes(whole[:200] + b"\0" * 100 + whole[300:])
    assert "cannot be read" in refused(capsys, "evaluate", "--images", tmp_path / "z.zip", "--reference", tmp_path / "z.zip")


def test_other_networks_and_sources_are_other_features(tmp_path, monkeypatch):
    """Features on disk are not taken for those of an edited function."""
    images, real = write(draw(1, 40), tmp_path / "a.npz"), write(draw(2, 40), tmp_path / "r")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for scale in (1, 2):
        (tmp_path / "own.py").write_text(f"def f(images):\n    return {scale} * images.mean(-1).flatten(1)[:, 4:8]\n")
        sys.modules.pop("own", None)
        found.append(evaluated(images, real, "--features", "own:f")["frechet"])
    sys.modules.pop("own", None)
    assert found[1] == pytest.approx(4 * found[0], rel=1e-4)


def test_inception_is_verified_and_gets_bytes(tmp_path, monkeypatch):
    file = tmp_path / "inception-2015-12-05.pt"
    with pytest.raises(InputError, match="do not exist"):
        inception_features(file, torch.device("cpu"))
    torch.jit.script(FakeInception()).save(str(file))
    with pytest.raises(InputError, match="SHA-256"):
        inception_features(file, torch.device("cpu"))
    monkeypatch.setenv("DD2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "URL", file.as_uri())
    with pytest.raises(InputError, match="expected f58cb9b6"):
        open_features("inception", torch.device("cpu"))
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    images = torch.rand(3, 1, 20, 31) * 2 - 1
    found = read_features(inception_features(file, torch.device("cpu")), images)
    pixels = to_uint8(images).astype("float32")
    whole = torch.jit.load(str(file))(torch.tensor(pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1), return_features=True)
    torch.testing.assert_close(found["pool"], whole)
    torch.testing.assert_close(found["probabilities"].sum(1), torch.ones(3))
    side = round((found["spatial"].shape[1] / 7) ** 0.5)
    maps = found["spatial"].view(3, side, side, 7)  # as ADM's NHWC graph flattens it
    torch.testing.assert_close(maps.mean((1, 2)), found["pool"][:, :7], rtol=1e-4, atol=1e-4)
    assert open_features("inception", torch.device("cpu")).name.startswith("Inception")
    file.rename(tmp_path / "gone")
    assert open_features("inception", torch.device("cpu")).name.startswith("Inception")  # from the cache
    monkeypatch.setenv("DD2_CACHE", str(tmp_path / "other"))
    with pytest.raises(InputError, match="cannot be fetched"):
        open_features("inception", torch.device("cpu"))


def test_inception_without_the_known_layers_gives_no_spatial_features(tmp_path, monkeypatch):
    torch.jit.script(FakeInception(())).save(str(tmp_path / "other.pt"))
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256((tmp_path / "other.pt").read_bytes()).hexdigest())
    assert not inception.Inception(tmp_path / "other.pt", torch.device("cpu")).spatial


def test_interrupted_and_resumed_is_the_same_number(tmp_path, monkeypatch):
    monkeypatch.setattr("dd2.evaluation.bank.SHARD", 50)
    a, r = write(draw(1), tmp_path / "a.npz"), write(draw(2), tmp_path / "r.npz")
    whole = evaluated(write(draw(1), tmp_path / "b.npz"), r)
    calls: list[int] = []
    real = ImageSet.__getitem__

    def interrupted(self: ImageSet, index: Tensor) -> Tensor:
        calls.append(len(index))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, index)

    monkeypatch.setattr(ImageSet, "__getitem__", interrupted)
    assert main(["evaluate", "--images", str(a), "--reference", str(r), "--batch", "64"]) == 130
    assert not (tmp_path / "a.npz.dd2" / "metrics.json").exists()
    assert evaluated(a, r) == whole
    assert sum(calls[3:]) == 100  # half was kept


def test_two_processes_make_the_same_numbers(tmp_path, monkeypatch):
    a, r = write(draw(1, 300), tmp_path / "a.npz"), write(draw(2, 300), tmp_path / "r.npz")
    script = tmp_path / "job.py"
    lines = ["import sys", "import dd2.evaluation.bank as bank", "from dd2.cli import main", "bank.SHARD = 40"]
    script.write_text("\n".join([*lines, "sys.exit(main(sys.argv[1:]))"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29619", str(script)]
    arguments = ["evaluate", "--images", str(a), "--reference", str(r), "--metrics.kid-subsets", "5"]
    done = subprocess.run([*command, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    result = tmp_path / "a.npz.dd2" / "metrics.json"
    assert result.exists(), done.stderr
    two = json.loads(result.read_text())["metrics"]["images"]
    (tmp_path / "a.npz").rename(tmp_path / "same.npz")
    monkeypatch.setattr("dd2.evaluation.bank.SHARD", 40)
    one = evaluated(tmp_path / "same.npz", r, "--metrics.kid-subsets", 5)
    assert one == pytest.approx(two, rel=1e-6, abs=1e-6)


def test_a_stored_array_is_checked_by_its_sum(tmp_path, capsys):
    """Stored arrays are mapped, so that nothing else would see the damage."""
    np.savez(tmp_path / "x.npz", arr_0=np.random.default_rng(0).integers(0, 256, (40, 16, 16, 1), dtype=np.uint8))
    ImageSet(tmp_path / "x.npz")
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[3000:3400] = bytes(400)
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match="its checksum is wrong: it is damaged, fetch it again"):
        ImageSet(tmp_path / "x.npz")


@pytest.mark.parametrize("count", [2, 3, 8, 9, 19, 20])
def test_any_number_of_images_is_scored(count):
    """The inception score's splits are never more than a half of the images has, of which its interval is made."""
    random = torch.Generator().manual_seed(0)
    pool, logits = torch.randn(count, 3, generator=random), torch.randn(count, 4, generator=random)
    kept = {"pool": pool, "probabilities": logits.softmax(1), "labels": torch.arange(count) % 2}
    bank: Any = SimpleNamespace(load=kept.__getitem__, names=lambda: set(kept))
    reference: Any = SimpleNamespace(fits={"pool": fit_gaussian([torch.randn(50, 3, generator=random)])}, pool=None)
    found = scores(bank, reference, MetricConfig())
    assert 1 <= found["inception_score"] <= 4
    assert ("inception_score_95" in found) == (count >= 8)


@pytest.mark.parametrize(("scale", "shift"), [(5.0, 0.0), (9.0, -1.0)])
def test_what_is_no_probability_is_refused(scale, shift):
    read = lambda images: {"pool": images.flatten(1), "probabilities": images.flatten(1)[:, :8].abs() * scale + shift}  # noqa: E731
    network: Any = SimpleNamespace(name="mine", read=read, prepare=None)
    with pytest.raises(InputError, match="probabilities must not be negative and must sum to 1"):
        read_features(network, torch.rand(4, 1, 4, 4))
