"""The metrics of text-to-image papers against values of the official packages (tests/golden/README.md), and their commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dd2.cli import main
from dd2.errors import InputError
from dd2.evaluation.clean import as_coco, as_stored, centre_square
from dd2.evaluation.clip import CLIP_SCORES, ClipScore
from dd2.evaluation.features import open_features, pictures, read_features, read_pictures
from dd2.frechet import fit_gaussian, frechet_distance

GOLDEN = Path(__file__).parent / "golden" / "t2i"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clean_values() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "clean_fid.npz") as content:
        return dict(content)


@pytest.fixture(scope="module")
def clip_values() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "clip_golden.npz") as content:
        return dict(content)


def files() -> list[Path]:
    return [GOLDEN / name for name in json.loads((GOLDEN / "clean_fid_meta.json").read_text())["files"]]


def stored(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.mark.parametrize("row", range(9))
def test_the_resize_is_clean_fids(row, clean_values):
    pixels = stored(files()[row])
    for name, prepare in (("clean", as_stored), ("gigagan", as_coco)):
        found = prepare(pixels).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found[::23, ::23], clean_values[f"{name}_{row}"], rtol=0, atol=1e-4)
        assert found.mean(dtype=np.float64) == pytest.approx(float(clean_values[f"{name}_{row}_mean"]), abs=1e-3)
        assert found.shape == (299, 299, 3)
    square = np.asarray(centre_square(Image.fromarray(pixels)))
    assert np.array_equal(square[::23, ::23], clean_values[f"gigagan256_{row}"])


def test_grey_images_have_three_equal_channels(clean_values):
    grey = np.asarray(Image.open(GOLDEN / "images_extra" / "mode_grey.png"))[..., None]
    found = as_stored(grey).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found[::23, ::23], clean_values["mode_grey"], atol=1e-4)


def test_the_distance_is_clean_fids(clean_values):
    fits = [fit_gaussian([torch.from_numpy(clean_values[name])]) for name in ("fd_feats1", "fd_feats2")]
    assert frechet_distance(*fits) == pytest.approx(float(clean_values["fd_value"]), rel=1e-8)


@pytest.mark.parametrize("model", ["quick", "gelu"])
@pytest.mark.parametrize(("variant", "key"), [("clip_b32", "cos"), ("clip_b32_prefix", "prefix_cos")])
def test_the_clip_score_is_open_clips(model, variant, key, clip_values):
    score = ClipScore(f"{variant}@{GOLDEN / f'clip_{model}'}", CPU)
    texts = [str(text) for text in clip_values["prompts"]]
    images = [stored(file) for file in files()[:6]]
    found = np.stack([score([image] * len(texts), texts).numpy() for image in images])
    np.testing.assert_allclose(found, clip_values[f"{model}_{key}"], rtol=0, atol=2e-6)
    assert clip_values[f"{model}_{key}"].std(1).min() > 0.05


@pytest.mark.parametrize("prefix", [False, True])
def test_clips_tokens(prefix, clip_values):
    """All prompts, long ones at the borders of the cut included. Spellings of special tokens in a caption are the library's."""
    score = ClipScore(f"{'clip_b32_prefix' if prefix else 'clip_b32'}@{GOLDEN / 'clip_quick'}", CPU)
    name = "prefix_ids" if prefix else "ids"
    known = [*zip(clip_values["prompts"], clip_values[name], strict=True)]
    known += zip(clip_values["extra_prompts"], clip_values[f"extra_{name}"], strict=True)
    compared = 0
    for text, expected in known:
        if "<" in str(text):
            continue
        found, end = score.ids(str(text)), list(expected).index(913)
        assert len(found) == 77
        assert found[: end + 1] == expected[: end + 1].tolist()
        compared += 1
    assert compared > 25


def test_torchmetrics_own_scale_and_what_is_refused(clip_values):
    folder = GOLDEN / "clip_quick"
    texts, image = [str(text) for text in clip_values["prompts"]], stored(files()[0])
    plain = clip_values["quick_cos_raw_images"][0]
    scaled = ClipScore(f"clipscore_l14@{folder}", CPU)([image] * len(texts), texts).numpy()
    np.testing.assert_allclose(scaled, (100 * plain).clip(0), atol=1e-3)
    with pytest.raises(InputError, match="no variant of the CLIP score"):
        ClipScore("clip_b16", CPU)
    with pytest.raises(InputError, match="not on this machine"):
        ClipScore(f"clip_b32@{folder / 'nowhere'}", CPU)
    assert {ClipScore(f"{name}@{folder}", CPU).digest for name in CLIP_SCORES} == {
        ClipScore(f"{name}@{GOLDEN / 'clip_quick'}", CPU).digest for name in CLIP_SCORES
    }
    assert len({ClipScore(f"{name}@{folder}", CPU).digest for name in CLIP_SCORES}) == len(CLIP_SCORES)


def test_inception_behind_the_protocols(inception_file):
    """Images of any sizes, each brought to 299 pixels as the protocol says, (x - 128) / 128; drawn ones as they would be
    stored.
    """
    for name, prepare in (("inception-clean", as_stored), ("inception-coco", as_coco)):
        network = open_features(f"{name}@{inception_file}", CPU)
        images = [stored(file) for file in files()[:4]]
        found = read_pictures(network, images, CPU)["pool"]
        expected = torch.stack([(prepare(image) - 128) / 128 for image in images])
        torch.testing.assert_close(found[:, :3], expected.mean((2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[:, 3:], expected[:, :, 150, 150], rtol=1e-4, atol=1e-5)
        drawn = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
        torch.testing.assert_close(read_features(network, drawn), read_pictures(network, pictures(drawn), CPU))
    names = {open_features(f"{name}@{inception_file}", CPU).name for name in ("inception-clean", "inception-coco")}
    digests = {open_features(f"{name}@{inception_file}", CPU).digest for name in ("inception-clean", "inception-coco")}
    assert len(names) == len(digests) == 2


def test_folders_of_images_and_captions(inception_file, tmp_path, capsys, clip_values):
    """64 images of others, in the layout of LlamaGen's evaluator, against a reference of images of all sizes."""
    random = np.random.default_rng(0)
    made, reference = tmp_path / "made", tmp_path / "reference"
    (made / "images").mkdir(parents=True)
    reference.mkdir()
    levels = [random.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(64)]
    for number, pixels in enumerate(levels):
        Image.fromarray(pixels).save(made / "images" / f"{number}.png")
        Image.fromarray(random.integers(0, 256, (20 + number, 40, 3), dtype=np.uint8)).save(reference / f"{number}.jpg")
    texts = [f"prompt {'a' * number}" for number in range(64)]
    (made / "captions.txt").write_text("\n".join(texts) + "\n")
    clip = f"clip_b32_prefix@{GOLDEN / 'clip_quick'}"
    command = ["evaluate", "--images", made, "--reference", reference, "--features", f"inception-coco@{inception_file}"]
    assert main([str(a) for a in [*command, "--clip", clip]]) == 0
    numbers = json.loads((tmp_path / "made.dd2" / "metrics.json").read_text())
    expected = ClipScore(clip, CPU)(levels, texts)  # image k is line k, although "10.png" comes before "2.png" in the folder
    assert numbers["metrics"]["images"]["clip_b32_prefix"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert numbers["evaluation"]["prompts_count"] == 64
    assert "COCO-30k" in numbers["features"]
    network = open_features(f"inception-coco@{inception_file}", CPU)
    folders = [[stored(file) for file in sorted(folder.rglob("*.*g"))] for folder in (made, reference)]
    fits = [fit_gaussian([read_pictures(network, images, CPU)["pool"]]) for images in folders]
    assert numbers["metrics"]["images"]["frechet"] == pytest.approx(frechet_distance(*fits), rel=1e-4)
    capsys.readouterr()
    for wrong, said in (
        ([*command, "--prompts", "scenes"], "prompts have no effect on images"),
        ([*command, "--clip", clip, "--prompts", "scenes"], "prompts scenes are 777, the images 64"),
        ([*command, "--clip", "clip_b33"], "no variant"),
    ):
        assert main([str(a) for a in wrong]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
