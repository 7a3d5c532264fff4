"""The bench that needs language: what captions allow, how images are judged, and its commands from images to prompts."""

import itertools
import json
import shlex
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dd2.checkpoints.native import load_teacher
from dd2.checkpoints.runs import embedded
from dd2.cli import main
from dd2.code_student import CodeStudent
from dd2.data import digits, scenes
from dd2.data.scene_captions import CELL_NAMES, agreement, captions
from dd2.data.source import open_data
from dd2.errors import InputError
from dd2.evaluation.classifier import Classifier, ClassifierConfig, save_classifier
from dd2.evaluation.features import open_features, read_features
from dd2.pipeline import OneStepPipeline
from dd2.seeding import stream
from dd2.serving.api import build_api
from dd2.serving.page import Visitors, build_page
from dd2.serving.studio import Studio
from dd2.text.prompts import typed

ALL = {caption.text: caption for part in ("seen", "unseen") for caption in captions(part)}


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("a four", {(5, 0, 0, 0), (0, 5, 0, 0), (0, 0, 5, 0), (0, 0, 0, 5)}),
        ("a tilted four in the top right", {(0, 15, 0, 0)}),
        ("a three above a seven", {(4, 0, 8, 0), (0, 4, 0, 8)}),
        ("a seven below a three", {(4, 0, 8, 0), (0, 4, 0, 8)}),
        ("an eight to the left of an eight", {(9, 9, 0, 0), (0, 0, 9, 9)}),
        ("a zero to the right of a one", {(2, 1, 0, 0), (0, 0, 2, 1)}),
        ("four sixes", {(7, 7, 7, 7)}),
        ("three fives and a nine", {(10, 6, 6, 6), (6, 10, 6, 6), (6, 6, 10, 6), (6, 6, 6, 10)}),
    ],
)
def test_what_captions_allow(text, held):
    assert set(ALL[text].scenes) == held


def test_two_fives_and_a_nine_by_enumeration():
    wanted = {cells for cells in itertools.product(range(21), repeat=4) if Counter(cells) == {6: 2, 10: 1, 0: 1}}
    assert set(ALL["two fives and a nine"].scenes) == wanted
    assert len(wanted) == 12


def test_what_is_kept_from_training():
    """No scene of an unseen caption is allowed by a seen one that says as much, every word is seen, and a part of each kind is
    kept.
    """
    seen, unseen = ({caption.scenes for caption in captions(part)} for part in ("seen", "unseen"))
    assert not seen & unseen
    words = [{word for caption in captions(part) for word in caption.text.split()} for part in ("seen", "unseen")]
    assert words[1] <= words[0]
    assert 0.08 < len(captions("unseen")) / len(ALL) < 0.2
    assert Counter(caption.kind for caption in ALL.values()) == {"digit": 10, "tilt": 50, "place": 40, "pair": 400, "count": 390}
    for mark in (" above ", " to the left of ", " in the ", "tilted", " and ", "three "):
        assert any(mark in caption.text for caption in captions("unseen")), mark


def test_agreement_is_exact():
    texts = ["a three above a seven", "A  three above a SEVEN", "two fives", "two fives"]
    cells = torch.tensor([[4, 0, 8, 0], [8, 0, 4, 0], [6, 0, 0, 6], [6, 6, 6, 0]])
    assert agreement(texts, cells).tolist() == [True, False, True, False]
    with pytest.raises(InputError, match="no caption of the scenes"):
        agreement(["a red fox"], cells[:1])


def test_scenes_hold_what_their_captions_allow():
    """By pixels: what is drawn is somewhere that the caption allows, and cut back into cells it is the digits' own images."""
    data = open_data("scenes", 32, 1)
    images, labels = data.batch("train", 200, stream(0, "scenes"))
    assert images.shape == (200, 1, 32, 32)
    assert float(images.min()) >= -1
    full = scenes.cut(images).view(200, 4, -1).amax(2) > 0
    for label, held in zip(labels.tolist(), full.tolist(), strict=True):
        assert tuple(held) in {tuple(cell > 0 for cell in scene) for scene in ALL[data.captions[label]].scenes}
    again, same = data.batch("train", 200, stream(0, "scenes"))
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    cells = torch.tensor([[1, 0, 0, 12]])
    drawn = scenes.draw(cells, "test", stream(0, "one"))
    parts = scenes.cut(drawn)
    assert parts.shape == (4, 1, 16, 16)
    assert (parts[1:3] == -1).all()
    assert torch.equal(torch.cat([torch.cat([parts[0], parts[1]], 2), torch.cat([parts[2], parts[3]], 2)], 1), drawn[0])


def test_tilted_digits_are_turned():
    """The moments of a one, a stroke that stands upright: tilted, it leans by about 40 degrees to either side."""

    def lean(image: torch.Tensor) -> float:
        mass = image[0] + 1
        rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        rows, columns = rows - (mass * rows).sum() / mass.sum(), columns - (mass * columns).sum() / mass.sum()
        vertical, across, both = ((mass * a * b).sum() for a, b in ((rows, rows), (columns, columns), (rows, columns)))
        return float(torch.rad2deg(0.5 * torch.atan2(2 * both, vertical - across)))

    images, labels = digits.load("train")
    ones = images[labels == 1][:100]
    upright = [lean(image) for image in digits.augment(ones, stream(0, "a"), tilted=torch.zeros(100, dtype=torch.bool))]
    tilted = [lean(image) for image in digits.augment(ones, stream(0, "a"), tilted=torch.ones(100, dtype=torch.bool))]
    assert np.abs(upright).mean() < 15
    assert 30 < np.abs(tilted).mean() < 50
    assert 20 < sum(angle > 0 for angle in tilted) < 80


def test_a_classifier_of_cells_judges(tmp_path):
    """Its features are those of the four cells beside each other, and whether they agree is read off the most probable ones."""
    torch.manual_seed(0)
    sizes = ClassifierConfig(num_classes=len(CELL_NAMES), width=4, features=8, trained_on="scenes-cells", cells=2)
    classifier = Classifier(sizes)
    save_classifier(tmp_path / "judge", classifier)
    network = open_features(str(tmp_path / "judge"), torch.device("cpu"))
    images, _ = open_data("scenes", 32, 1).batch("test", 6, stream(0, "judge"))
    found = read_features(network, images)
    rounded = scenes.cut((images * 127.5 + 127.5).round() / 127.5 - 1)
    expected = classifier.pool(classifier.maps(rounded)).view(6, 32)
    torch.testing.assert_close(found["pool"], expected.detach())
    held = classifier(rounded).argmax(-1).view(6, 4)
    assert torch.equal(found["cells"].long(), held)
    assert network.agrees is not None
    texts = [ALL["a three"].text] * 6
    assert torch.equal(network.agrees(found, texts), agreement(texts, held))
    with pytest.raises(InputError, match="reads 1 x 32 x 32 images"):
        read_features(network, images[..., :16, :16])


@dataclass(frozen=True)
class Bench:
    """Folders of a bench that was trained for a moment."""

    judge: Path
    teacher: Path
    run: Path
    next_scale: bool


QUICK = ["--loop.preview-every", "0", "--loop.log-every", "1"]


@pytest.fixture(scope="module", params=["raster", "next_scale"])
def bench(request, tmp_path_factory) -> Bench:
    """Every command of the bench for a few iterations: images to tokenizer, teacher, one step."""
    folder, kind = tmp_path_factory.mktemp("scenes"), "var_" if request.param == "next_scale" else ""
    section = "var" if kind else "teacher"
    commands = [
        ["train-classifier", "configs/scenes_classifier.yaml", "--iterations", 3, "--out", folder / "judge"],
        ["train-tokenizer", f"configs/scenes_{kind}tokenizer.yaml", "--iterations", 3, "--batch", 8, "--out", folder / "tok"],
        [
            *["train-teacher", f"configs/scenes_{kind}teacher.yaml", "--iterations", 3, "--batch", 8, "--token-images", 64],
            *["--tokenizer", folder / "tok" / "tokenizer", "--out", folder / "teacher"],
            *[f"--{section}.depth", 2, f"--{section}.width", 16, f"--{section}.heads", 2],
        ],
        [
            *["distill", f"configs/scenes{'_var' if kind else ''}.yaml", "--teacher", folder / "teacher" / "teacher"],
            *["--out", folder / "run", "--teacher-samples", 777, "--regress.iterations", 2, "--regress.pairs", 32],
            *["--regress.guidance-iterations", 1, "--csd.iterations", 2, "--csd.validation", 32, "--csd.match.prime", 64],
            *["--csd.batch", 8, "--regress.batch", 8, "--regress.ode.steps", 2],
        ],
    ]
    for command in commands:
        assert main([str(word) for word in [*command, *QUICK]]) == 0
    return Bench(folder / "judge" / "classifier", folder / "teacher" / "teacher", folder / "run", bool(kind))


@pytest.mark.e2e
def test_a_typed_prompt_becomes_an_image(bench, tmp_path, capsys):
    """From the run, from its generator alone, by the pipeline: the same image; another prompt, another image."""
    prompt = "a three above a seven"
    for source in (bench.run, bench.run / "generator"):
        out = tmp_path / f"{source.name}.png"
        command = ["sample", source, "--prompt", prompt, "--out", out, "--precision", "float32"]
        assert main([str(word) for word in command]) == 0
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "generator.png").read_bytes()
    pipe = OneStepPipeline.from_pretrained(bench.run / "generator", device="cpu", dtype="float32")
    drawn = pipe([prompt, prompt, "two fives and a nine", ""], seeds=[0, 1, 0, 0], output_type="np")
    assert drawn.images.shape == (4, 32, 32, 1)
    alone = pipe(prompt, seeds=[0], output_type="np")
    np.testing.assert_allclose(alone.images[0], drawn.images[0], atol=1e-5)
    student, noise = (
        pipe.generator.student,
        torch.randn(1, *pipe.generator.student.backbone.token_shape, generator=stream(0, "noise")),
    )
    assert isinstance(student, CodeStudent)
    cond = pipe.generator.conditions.of_texts(typed([prompt, "a seven above a three", "two fives", ""]))(torch.arange(4))
    logits = student.draw(noise.expand(4, -1, -1), cond).logits
    assert logits is not None
    assert torch.pdist(logits.flatten(1)).min() > 1e-3  # trained for a moment, it may choose the same codes for all
    with pytest.raises(InputError, match="give prompts"):
        pipe([3])  # a generator alone knows no captions by number
    whole = OneStepPipeline.from_pretrained(bench.run, device="cpu", dtype="float32")
    number = whole.get_label_ids(["a three above a six"])[0]
    assert torch.equal(whole([number], seeds=[5]).tokens, whole(["a three above a six"], seeds=[5]).tokens)
    assert whole(prompt, num_inference_steps=3).tokens.shape == alone.tokens.shape
    with pytest.raises(InputError, match="not some of each"):
        whole([3, prompt])
    assert len(whole.interpolate(0, 1, 3, prompt)) == 3


@pytest.mark.e2e
def test_lists_of_prompts_on_the_command_line(bench, tmp_path, capsys):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a three above a seven\ntwo fives\n")
    out = tmp_path / "images"
    command = ["sample", bench.run, "--prompts", prompts, "--precision", "float32", "--seed", 7]
    layout = ["--layout", "captions", "--per-prompt", 2]
    assert main([str(word) for word in [*command, *layout, "--out", out, "--steps", 2]]) == 0
    assert sorted(file.name for file in (out / "images").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    assert (out / "captions.txt").read_text().splitlines() == ["a three above a seven", "two fives"] * 2
    said = json.loads((out / "dd2.json").read_text())
    assert (said["prompts_count"], said["steps"], said["prompts"]) == (2, 2, str(prompts))
    assert "top_k" in said["sampling"]
    assert main([str(word) for word in [*command, "--out", tmp_path / "plain"]]) == 0
    names = sorted(file.name for file in (tmp_path / "plain").glob("*.png"))
    assert names == ["000000_label0_seed7.png", "000001_label1_seed8.png"]
    capsys.readouterr()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "long.txt").write_text("word " * 10_000)
    for more, said in (
        (["--prompts", tmp_path / "empty.txt"], "is empty"),
        (["--prompts", tmp_path / "latin.txt"], "not UTF-8"),
        (["--prompts", tmp_path / "long.txt"], "10,000 words"),
        (["--prompts", prompts, "--layout", "geneval"], "needs the records"),
        (["--prompts", prompts, "--prompt", "a four"], "both given"),
        (["--prompts", prompts, "--labels", "3"], "leave one of them out"),
        (["--prompts", tmp_path / "none.txt"], "cannot be read"),
        (["--prompts", prompts, "--layout", "captions", "--first", 3], "counts its images from 0"),
        (["--prompt", "a four", "--text-encoder", tmp_path], "is a flan-t5"),
    ):
        wrong = ["sample", bench.run, *more, "--out", tmp_path / "wrong"]
        assert main([str(word) for word in wrong]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "wrong").exists()


@pytest.mark.e2e
def test_seen_and_unseen_prompts_are_measured(bench, capsys):
    """Agreement and distance of the captions of training, and, in a folder of their own, of those that are kept from it."""
    quick = ["--features", bench.judge, "--no-speed", "--metrics.halves", 2, "--metrics.kid-subsets", 2]
    assert main([str(word) for word in ["evaluate", bench.run, *quick, "--count", 777]]) == 0
    numbers = json.loads((bench.run / "metrics.json").read_text())
    assert set(numbers["agreement"]) == set(numbers["methods"])
    assert 0 <= numbers["agreement"]["teacher"] <= 1
    assert set(numbers["groups"]) == {"digit", "tilt", "place", "pair", "count"}
    assert sum(found["generator"]["count"] for found in numbers["groups"].values()) == 777
    assert "scenes-cells" in numbers["features"]
    assert main([str(word) for word in ["evaluate", bench.run, *quick, "--prompts", "scenes-unseen", "--count", 113]]) == 0
    assert json.loads((bench.run / "metrics.json").read_text()) == numbers
    unseen = json.loads((bench.run / "prompts" / "scenes-unseen" / "metrics.json").read_text())
    assert unseen["evaluation"]["prompts_count"] == 113
    assert any("onestep*" in warning for warning in unseen["warnings"])
    assert (bench.run / "prompts" / "scenes-unseen" / "report.html").is_file()
    capsys.readouterr()
    for command in ("sample", "evaluate", "report", "align-decoder", "serve"):
        out = {
            "report": ["--out", bench.run.with_name("no.html")],
            "align-decoder": ["--out", bench.run.with_name("no"), "--features", bench.judge],
        }
        wrong = [command, bench.run, *out.get(command, []), "--text-encoder", bench.run]
        wrong += ["--port", 0, "--api"] if command == "serve" else []
        assert main([str(word) for word in wrong]) == 2, command
        assert "is a flan-t5" in capsys.readouterr().err.strip().splitlines()[-1], command
    for more, said in (
        (["--count", 100], "choose another count (1554 or 777)"),
        (["--clip", "clip_b33"], "no variant"),
        (["--prompts", "scenes-unseen", "--curve", "--count", 113], "leave prompts out"),
    ):
        assert main([str(word) for word in ["evaluate", bench.run, *quick, *more]]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.e2e
def test_prompts_of_models_that_know_classes_alone(folder, tmp_path, capsys):
    tokenizer = ["--tokenizer", embedded("teacher") / "tokenizer"]
    for command, said in (
        (["sample", folder, "--prompt", "a three"], "conditioned on classes"),
        (["sample", folder, "--text-encoder", tmp_path], "text_encoder has no effect"),
        (["evaluate", folder, "--prompts", "scenes"], "conditioned on classes"),
        (["distill", "configs/digits.yaml", "--captions", "scenes"], "conditioned on classes"),
        (["distill", "configs/digits.yaml", "--text-encoder", tmp_path], "text_encoder has no effect"),
        (["train-teacher", "configs/digits_teacher.yaml", *tokenizer, "--text-encoder", "wordllama"], "has classes, no captions"),
        (["train-classifier", "--data", "scenes"], "needs classes"),
    ):
        out = [] if command[0] == "evaluate" else ["--out", tmp_path / "out.png" if command[0] == "sample" else tmp_path / "out"]
        assert main([str(word) for word in [*command, *out]]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1], command


@pytest.mark.e2e
def test_groups_of_prompts_and_clip_scores_of_a_run(bench, tmp_path, capsys):
    """Each group's distance stands beside the whole, but for groups of one image; CLIP scores are of the prompts, for every
    method.
    """
    prompts = tmp_path / "groups.jsonl"
    tags = {"a three above a seven": "pair", "two fives": "count", "three ones": "count", "a four": "alone"}
    prompts.write_text("\n".join(json.dumps({"prompt": text, "tag": tag}) for text, tag in tags.items()))
    clip = f"clip_b32_prefix@{Path(__file__).parent / 'golden' / 't2i' / 'clip_quick'}"
    quick = [
        "--features",
        bench.judge,
        "--no-speed",
        "--metrics.halves",
        0,
        "--metrics.kid-subsets",
        2,
        "--metrics.neighbours",
        1,
    ]
    command = ["evaluate", bench.run, *quick, "--prompts", prompts, "--count", 8, "--clip", clip]
    assert main([str(word) for word in command]) == 0
    (folder,) = (bench.run / "prompts").glob("groups-*")
    numbers = json.loads((folder / "metrics.json").read_text())
    assert set(numbers["groups"]) == {"pair", "count", "alone"}
    assert {group: found["generator"]["count"] for group, found in numbers["groups"].items()} == {
        "pair": 2,
        "count": 4,
        "alone": 2,
    }
    assert numbers["evaluation"]["clip_digests"].keys() == {"clip_b32_prefix"}
    scores = {name: found["clip_b32_prefix"] for name, found in numbers["metrics"].items()}
    assert all(-1 <= score <= 1 for score in scores.values())
    assert len({*scores.values()}) > 2
    of_groups = sum(found["generator"]["count"] * found["generator"]["clip_b32_prefix"] for found in numbers["groups"].values())
    assert of_groups / 8 == pytest.approx(scores["generator"], abs=1e-6)
    assert main([str(word) for word in [*command, "--count", 4]]) == 0
    assert set(json.loads((folder / "metrics.json").read_text())["groups"]) == {"count"}
    capsys.readouterr()
    assert main([str(word) for word in [*command, "--clip", clip, clip]]) == 2
    assert "names a variant twice" in capsys.readouterr().err


@pytest.mark.e2e
def test_features_that_resize_stored_images_have_no_path_length_and_train_no_decoder(bench, inception_file, tmp_path, capsys):
    features = f"inception-coco@{inception_file}"
    for command, said in (
        (["evaluate", bench.run, "--features", features, "--path-length", 4], "path_length needs features"),
        (["align-decoder", bench.run, "--features", features, "--out", tmp_path / "aligned"], "without gradient"),
    ):
        assert main([str(word) for word in command]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.e2e
def test_a_run_whose_captions_are_gone_still_reads_prompts(bench, tmp_path):
    """Its captions are looked at when one is asked for by number; so is the place of the encoder, by the teacher too."""
    run = tmp_path / "run"
    shutil.copytree(bench.run, run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "captions": str(tmp_path / "gone.txt")}))
    pipe = OneStepPipeline.from_pretrained(run, device="cpu", dtype="float32")
    own = OneStepPipeline.from_pretrained(bench.run, device="cpu", dtype="float32")
    assert torch.equal(pipe("a four").tokens, own("a four").tokens)
    with pytest.raises(InputError, match=r"gone\.txt cannot be read"):
        pipe([3])
    assert main(["export", str(run), str(tmp_path / "package"), "--format", "folder"]) == 0
    elsewhere = OneStepPipeline.from_pretrained(bench.run, device="cpu", text_encoder=str(tmp_path))
    for steps in (1, 2):
        with pytest.raises(InputError, match="is a flan-t5"):
            elsewhere("a four", num_inference_steps=steps)


@pytest.mark.e2e
def test_the_page_and_the_endpoint_take_prompts(bench, tmp_path, monkeypatch):
    """Of a run with its teacher, and of a generator alone: drawn as the command draws that they print; too long ones are
    refused.
    """
    from starlette.testclient import TestClient

    monkeypatch.chdir(tmp_path)
    prompt = "two fives and a nine"
    for source in (bench.run, bench.run / "generator"):
        studio = Studio(OneStepPipeline.from_pretrained(source, device="cpu", dtype="float32"), source)
        studio.warm_up()
        drawn = studio.draw([prompt] * 3, range(5, 8))
        assert drawn.labels == [prompt] * 3
        assert main(shlex.split(studio.command(prompt, 5, 3, 1))[1:]) == 0
        assert Path("generator.png").read_bytes() == drawn.grid()
        with pytest.raises(InputError, match="a prompt may have"):
            studio.draw(["x" * 1001], [0])
        assert build_page(studio, tmp_path / "files", Visitors()) is not None
        assert studio.walk(0, 1, 3, prompt).startswith(b"\x89PNG")
        client = TestClient(build_api(studio), base_url="http://127.0.0.1")
        assert client.get("/api/model").json()["text_to_image"] is True
        answer = client.post("/api/generate", json={"labels": [prompt], "seeds": [5]})
        assert answer.status_code == 200
        assert answer.json()["labels"] == [prompt]


@pytest.mark.e2e
def test_dd1_of_texts(bench, tmp_path):
    """The baseline whose text variant was never released: pairs, student, evaluation by unseen prompts, two passes."""
    out = tmp_path / "dd1"
    command = [
        *[
            "dd1",
            f"configs/digits{'_var' if bench.next_scale else ''}_dd1.yaml",
            "--teacher",
            bench.teacher,
            "--captions",
            "scenes",
            "--out",
            out,
            "--pairs",
            777,
        ],
        *["--standardise-samples", 64, "--ode.steps", 2, "--train.iterations", 2, "--train.batch", 8, *QUICK],
        *["--heads.second-step", 2],
    ]
    assert main([str(word) for word in command]) == 0
    sample = ["sample", out, "--prompt", "a three above a seven", "--method", "two_passes", "--out", tmp_path / "two.png"]
    assert main([str(word) for word in sample]) == 0
    quick = ["--features", bench.judge, "--no-speed", "--metrics.halves", 2, "--metrics.kid-subsets", 2, "--skip", 1]
    quick += ["--prompts", "scenes-unseen", "--count", 113]
    assert main([str(word) for word in ["evaluate", out, *quick]]) == 0
    numbers = json.loads((out / "prompts" / "scenes-unseen" / "metrics.json").read_text())
    assert {"teacher", "generator", "generator_two_passes", "teacher_skip_1"} <= set(numbers["agreement"])


@pytest.mark.e2e
def test_shipping_a_model_of_texts(bench, tmp_path, capsys):
    """Its folder, and the teacher's, say which encoder reads prompts, so that a package needs nothing else."""
    encoder = load_teacher(bench.teacher).conditions.encoder  # pyright: ignore[reportAttributeAccessIssue]
    assert (encoder.kind, encoder.length, encoder.channels) == ("wordllama", 12, 256)
    package = tmp_path / "package"
    assert main(["export", str(bench.run), str(package), "--format", "folder"]) == 0
    pipe = OneStepPipeline.from_pretrained(package, device="cpu", dtype="float32")
    own = OneStepPipeline.from_pretrained(bench.run, device="cpu", dtype="float32")
    assert torch.equal(pipe("a four").tokens, own("a four").tokens)
