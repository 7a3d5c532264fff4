"""OneStepPipeline: what people call, and packages that hold all that it needs."""

import ast
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dd2.checkpoints.runs import open_run
from dd2.cli import main
from dd2.errors import InputError
from dd2.pipeline import OneStepPipeline
from dd2.shipping.card import Card, card_text
from dd2.teachers.conditions import ClassLabels
from models import tiny_mar, tiny_teacher, tiny_var
from shipped import NAMES, tiny_generator, tiny_package


def test_images_come_as_people_want_them(pipe):
    kinds = {kind: pipe([0, "Bee"], [4, 5], output_type=kind) for kind in ("pil", "np", "pt")}
    assert [image.size for image in kinds["pil"].images] == [(16, 16)] * 2
    assert kinds["np"].images.shape == (2, 16, 16, 1)
    assert kinds["pt"].images.shape == (2, 1, 16, 16)
    levels = np.stack([np.asarray(image) for image in kinds["pil"].images])
    np.testing.assert_allclose(levels / 255, kinds["np"].images[..., 0], atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(kinds["pt"].images.permute(0, 2, 3, 1).numpy(), kinds["np"].images)
    found = kinds["pt"]
    assert (found.labels, found.seeds, found.tokens.shape) == ([0, 1], [4, 5], (2, 16, 4))
    assert 0 < found.seconds < 60
    assert 0 <= found.images.min() < found.images.max() <= 1


def test_an_image_depends_on_its_label_and_seed_alone(pipe):
    whole = pipe([0, 1, 2, 0, 1], [9, 8, 7, 6, 5], output_type="pt")
    tiles = pipe([0, 1, 2, 0, 1], [9, 8, 7, 6, 5], output_type="pt", batch_size=2)
    torch.testing.assert_close(whole.images, tiles.images, atol=1e-5, rtol=0)
    assert not torch.allclose(pipe(0, [9], output_type="pt").tokens, pipe(0, [8], output_type="pt").tokens)
    torch.testing.assert_close(pipe("cat", [7], output_type="pt").images, whole.images[2:3], atol=1e-5, rtol=0)


def test_generators_give_seeds(pipe):
    def of(seed: int):
        return torch.Generator().manual_seed(seed)

    a, b = pipe([0, 1], generator=of(3)), pipe([0, 1], generator=of(3))
    assert a.seeds == b.seeds
    assert len(set(a.seeds)) == 2
    assert pipe([0, 1], generator=[of(3), of(4)]).seeds == [a.seeds[0], pipe(0, generator=of(4)).seeds[0]]
    assert pipe([0, 1]).seeds == [0, 1]


def test_numbers_of_other_libraries(pipe):
    import numpy as np

    expected = pipe([1, 2], [3, 4]).tokens
    assert torch.equal(pipe(np.array([1, 2]), np.array([3, 4])).tokens, expected)
    assert torch.equal(pipe(torch.tensor([1, 2]), torch.tensor([3, 4])).tokens, expected)
    assert pipe(np.int64(2)).labels == [2]


def test_names(pipe):
    assert pipe.id2label == dict(enumerate(NAMES))
    assert pipe.get_label_ids(["cat", 0, "ANT"]) == [2, 0, 0]
    assert pipe.get_label_ids("bee") == [1]


def test_more_steps_and_the_teacher(pipe, folder):
    run = open_run(folder, torch.device("cpu"))
    assert pipe.max_inference_steps == 17
    labels, seeds = [0, 1, 2], [1, 2, 3]
    all_redrawn = pipe(labels, seeds, num_inference_steps=17, output_type="pt")
    taught = pipe.teacher(labels, seeds, output_type="pt")
    torch.testing.assert_close(all_redrawn.images, taught.images)
    expected = run.teacher.sample(torch.tensor(labels), run.sampling, seeds)
    torch.testing.assert_close(taught.tokens, expected)
    one, few = pipe(labels, seeds, output_type="pt").tokens, pipe(labels, seeds, num_inference_steps=5, output_type="pt").tokens
    torch.testing.assert_close(few[:, :12], one[:, :12])
    assert not torch.allclose(few[:, 12:], one[:, 12:])
    guided = pipe.teacher(labels, seeds, guidance_scale=4.0, output_type="pt")
    assert not torch.allclose(guided.tokens, taught.tokens)


def test_a_walk_begins_and_ends_at_its_seeds(pipe):
    walk = pipe.interpolate(3, 4, 70, "bee", output_type="pt")  # more than a batch
    ends = pipe([1, 1], [3, 4], output_type="pt").images
    assert walk.shape == (70, 1, 16, 16)
    torch.testing.assert_close(walk[[0, -1]], ends, atol=1e-4, rtol=0)
    assert (walk[0] - walk[35]).abs().max() > 1e-3


def test_what_cannot_be_drawn_is_said(pipe, folder, tmp_path):
    alone = OneStepPipeline(pipe.generator)
    assert alone.max_inference_steps == 1
    for wrong, said in (
        (lambda: pipe([]), "labels are empty"),
        (lambda: pipe([3]), "its classes are 0 to 2"),
        (lambda: pipe(["dog"]), "did you mean|they are ant"),
        (lambda: pipe([0, 1], [1]), "2 labels, 1 seeds"),
        (lambda: pipe([0], [-1]), "seeds must be in 0"),
        (lambda: pipe([0], [1], generator=torch.Generator()), "give one of them"),
        (lambda: pipe([0], guidance_scale=2.0), "no effect in one step"),
        (lambda: pipe([0], num_inference_steps=18), "steps must be 1"),
        (lambda: pipe([0], output_type="jpeg"), "output_type"),
        (lambda: pipe([0], batch_size=0), "batch_size"),
        (lambda: pipe([0], batch_size=1.5), "batch_size"),
        (lambda: pipe([0], [1.7]), "seeds must be whole"),
        (lambda: pipe([0], 5), "seeds must be several"),
        (lambda: pipe(None), "labels must be"),
        (lambda: pipe([0.5]), "labels must be whole"),
        (lambda: pipe([0], num_inference_steps=2.0), "num_inference_steps"),
        (lambda: pipe.teacher([0], guidance_scale=-3), "guidance_scale must be"),
        (lambda: pipe.interpolate(0, 1, 2, output_type="jpg"), "output_type"),
        (lambda: alone([0], num_inference_steps=2), "teacher is unknown here"),
        (lambda: alone.teacher([0]), "teacher is unknown here"),
        (lambda: alone.save_pretrained(tmp_path / "x", teacher=True), "no teacher here to ship"),
        (lambda: pipe.interpolate(0, 1, 1), "at least 2"),
        (lambda: pipe.save_pretrained(folder), "exists; choose another"),
        (lambda: OneStepPipeline.from_pretrained(folder, local_files_only=True), "is a folder here"),
        (lambda: OneStepPipeline.from_pretrained(tmp_path / "no" / "thing"), "does not exist"),
    ):
        with pytest.raises(InputError, match=said):
            wrong()


def ar_diffusion_teacher():
    """What stage 1 makes: a teacher whose head is ours."""
    return tiny_generator(tiny_teacher()).as_teacher.eval().requires_grad_(False)


@pytest.mark.parametrize("make", [tiny_teacher, tiny_var, tiny_mar, ar_diffusion_teacher])
def test_a_package_is_whole(make, tmp_path, monkeypatch):
    """It may go anywhere, names no path of this machine, and draws what was packed, with its teacher."""
    first = tiny_package(tmp_path / "a", make())
    pipe = OneStepPipeline.from_pretrained(first, device="cpu", dtype="float32")
    pipe.save_pretrained(tmp_path / "b", teacher=True, card=Card(name="me/model", license="mit"))
    for file in (*first.rglob("*.json"), *(tmp_path / "b").rglob("*.json"), tmp_path / "b" / "README.md"):
        assert str(tmp_path) not in file.read_text(), file
    moved = (tmp_path / "b").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(moved.parent)
    again = OneStepPipeline.from_pretrained("elsewhere", device="cpu", dtype="float32")
    for steps in (1, 3):
        was, now = (p([0, 1, 2], [3, 4, 5], num_inference_steps=steps, output_type="pt").images for p in (pipe, again))
        assert torch.equal(was, now)
    assert main(["sample", "elsewhere", "--count", "3", "--steps", "2", "--out", "few.png"]) == 0
    assert main(["inspect", "elsewhere"]) == 0


def test_the_card_has_what_the_hub_reads(folder, tmp_path):
    from huggingface_hub import ModelCard

    numbers = json.loads((Path(__file__).parents[1] / "docs" / "results" / "demo.json").read_text())
    card = Card("me/digits", "mit", "me/teacher", ("me/data",), "a teacher", {"cfg_scale": 1.5}, numbers)
    OneStepPipeline.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "m", card=card)
    found = ModelCard((tmp_path / "m" / "README.md").read_text())
    data = found.data.to_dict()
    assert (data["license"], data["library_name"], data["base_model"]) == ("mit", "dd2", "me/teacher")
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert "arxiv:2510.21003" in data["tags"]
    results = getattr(found.data, "eval_results", None) or []
    measured = {result.metric_type: result.metric_value for result in results}
    assert measured["frechet_distance"] == pytest.approx(numbers["metrics"]["generator"]["frechet"], abs=1e-3)
    for wanted in ("samples.png", "10,000 images against teacher", "cfg_scale 1.5", "Labels: ant, bee, cat", "gap", "Limits"):
        assert wanted in found.text, wanted
    with Image.open(tmp_path / "m" / "samples.png") as picture:
        assert picture.size[0] > 300
    bare = ModelCard((folder / "README.md").read_text())
    assert "license" not in bare.data.to_dict()
    assert "Nobody has said under which licence" in bare.text
    assert not re.search(r"num_inference_steps", (tmp_path / "m" / "README.md").read_text())  # it has no teacher


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"license": "MIT License"}, "short name"),
        ({"base_model": "teacher"}, "owner/name"),
        ({"datasets": ("a b",)}, "owner/name"),
    ],
)
def test_cards_that_the_hub_would_refuse(wrong, said):
    with pytest.raises(InputError, match=said):
        Card(**wrong)


def numbers_of(reference: str, frechet: float) -> dict:
    """metrics.json of an evaluation, changed."""
    numbers = json.loads((Path(__file__).parents[1] / "docs" / "results" / "demo.json").read_text())
    numbers["evaluation"]["reference"] = {"reference": reference, "count": 240, "sha256": "0" * 64}
    numbers["metrics"]["generator"]["frechet"] = frechet
    numbers["warnings"] = ["the features of /home/me/secret/features.pt are others"]
    return numbers


def test_a_card_says_nothing_of_this_machine_and_no_number_that_is_none():
    card = Card(numbers=numbers_of("/home/me/secret/photos", math.nan))
    text = card_text(card, tiny_generator(tiny_teacher()), has_teacher=False, has_picture=False)
    assert "/home" not in text
    for wanted in ("photos, 240 images", "features.pt are others", "arxiv.org/abs/2510.21003", "precision"):
        assert wanted in text, wanted
    assert "frechet_distance" not in text


@pytest.mark.parametrize(
    "names", [("1", "2", "3"), ("a", 'say "hi"', "c"), ("a", "back\\slash", "c"), ("a", "two\nlines", "<b>`x`|*</b>")]
)
def test_a_card_with_odd_names(names):
    """Its code can be run and draws class 1, and its text is text."""
    teacher = tiny_teacher()
    assert isinstance(teacher.conditions, ClassLabels)
    teacher.conditions.call(names)
    generator = tiny_generator(teacher)
    text = card_text(Card(), generator, has_teacher=False, has_picture=False)
    (shown,) = re.findall(r"labels=(\[.*\]), seeds", text)
    assert [generator.conditions.label(label) for label in ast.literal_eval(shown)] == [0, 1]
    (line,) = [line for line in text.splitlines() if line.startswith("Labels: ")]
    assert "<b>" not in line
    assert not re.search(r"(?<!\\)[`|*]", line)
