"""Text conditioning: padding, features, and DD2 on a teacher whose captions are the digits' names."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dd2.checkpoints.native import load_tokenizer, save_teacher
from dd2.checkpoints.runs import embedded, open_run
from dd2.cli import main
from dd2.data import digits
from dd2.errors import InputError
from dd2.evaluation.classifier import load_classifier
from dd2.pipeline import OneStepPipeline
from dd2.sampling import one_step
from dd2.teachers.captions import Captions, attention_mask, caption_condition, left_padded
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling
from dd2.teachers.llamagen import LlamaGenConfig, llamagen_teacher
from dd2.teachers.train import ar_loss
from models import tiny_text

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_padding_is_never_read():
    teacher = tiny_text()
    labels = torch.tensor([0, 1, 2])
    cond = teacher.conditions(labels)
    tokens = teacher.codebook[teacher.generate(cond, Sampling(), range(3))]
    features, mask = cond[..., :-1], cond[..., -1]
    other = torch.where(mask.unsqueeze(-1) > 0, features, torch.randn_like(features))
    torch.testing.assert_close(teacher.logits(tokens, caption_condition(other, mask)), teacher.logits(tokens, cond))
    read = teacher.logits(tokens, caption_condition(other, torch.ones_like(mask)))
    assert (read[:2] - teacher.logits(tokens, cond)[:2]).abs().amax((1, 2)).min() > 1e-3
    null = teacher.backbone.null_condition(cond)
    assert torch.equal(null[..., -1], mask)
    assert (null[0, :, :-1] == null[1, :, :-1]).all()


def test_attention_mask_is_causal_without_padding_and_with_oneself():
    mask = attention_mask(torch.tensor([[False, True]]), 0, 4)[0, 0]
    assert mask.tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, True, True, False],
        [False, True, True, True],
    ]
    assert torch.equal(attention_mask(torch.tensor([[False, True]]), 3, 4)[0, 0], mask[3:])


def test_left_padding_moves_words_to_the_end():
    features = torch.arange(1.0, 9.0).view(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    moved, words = left_padded(features, mask)
    assert moved.flatten().tolist() == [0, 0, 1, 2, 5, 6, 7, 8]
    assert words.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


class FakeTokenizer:
    """One token a word."""

    @classmethod
    def from_pretrained(cls, name: str, local_files_only: bool) -> "FakeTokenizer":
        assert local_files_only
        if name != "there":
            raise OSError(f"{name} is not a local folder\nand more")
        return cls()

    def __call__(self, texts: list[str], max_length: int, **_: object) -> dict[str, Tensor]:
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        for row, text in enumerate(texts):
            words = [len(word) for word in text.split()][:max_length]
            ids[row, : len(words)] = torch.tensor(words)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class FakeEncoder(nn.Module):
    """The feature of a word is its length, twice."""

    from_pretrained = classmethod(lambda cls, name, local_files_only: cls())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": input_ids.unsqueeze(-1).float().expand(-1, -1, 2) + 0.5}


def test_text_features(tmp_path, monkeypatch, capsys):
    (tmp_path / "captions.txt").write_text("A Red fox\nSnow\n")
    arguments = ["text-features", "--captions", tmp_path / "captions.txt", "--out", tmp_path / "f.safetensors", "--length", 4]

    def run(*more: object) -> str:
        assert main([str(a) for a in (*arguments, *more)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "dd2[t2i]"' in run()
    fake = types.SimpleNamespace(AutoTokenizer=FakeTokenizer, T5EncoderModel=FakeEncoder)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    assert "is not on this machine" in run()
    assert not (tmp_path / "f.safetensors").exists()
    assert main([str(a) for a in (*arguments, "--model", "there", "--batch", 1)]) == 0
    capsys.readouterr()
    made = load_file(tmp_path / "f.safetensors")
    assert made["mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert made["features"][0, :, 0].tolist() == [0, 1.5, 3.5, 3.5]
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert json.loads(file.metadata()["captions"]) == ["a red fox", "snow"]
    (tmp_path / "captions.txt").write_text("fox\n\nsnow\n")
    assert "line 2 is empty" in run("--model", "there")
    for content, said in ((b"", "is empty"), (b"\n\n", "is empty"), (b"caf\xe9", "not UTF-8"), (b"a\0b", "no text file")):
        (tmp_path / "captions.txt").write_bytes(content)
        assert said in run("--model", "there")
    # A byte-order mark is no word, other systems' newlines end lines, and nothing else does.
    (tmp_path / "captions.txt").write_bytes("\ufeffA fox\u2028in\x0bsnow\r\nsnow\n".encode())
    assert main([str(a) for a in (*arguments, "--model", "there", "--batch", 1)]) == 0
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert json.loads(file.metadata()["captions"]) == ["a fox\u2028in\x0bsnow", "snow"]


@pytest.mark.parametrize(
    ("features", "mask", "said"),
    [
        (torch.full((1, 4, 3), torch.nan), torch.ones(1, 4), "not finite"),
        (torch.ones(1, 4, 3, dtype=torch.int64), torch.ones(1, 4), "not finite"),
        (torch.ones(1, 4, 3), torch.tensor([[1.0, 1, 0, 0]]), "the mask must be"),
        (torch.ones(1, 4, 3), torch.tensor([[0.0, 1, 0, 1]]), "the mask must be"),
        (torch.ones(1, 4, 3), torch.full((1, 4), 0.5), "the mask must be"),
        (torch.ones(1, 4, 3), torch.zeros(1, 4), "the mask must be"),
        (torch.ones(1, 4, 3), torch.ones(1, 3), "this model needs"),
    ],
)
def test_caption_features_that_are_none(tmp_path, features, mask, said):
    save_file({"features": features, "mask": mask}, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=said):
        Captions.load(tmp_path / "c.safetensors", 4, 3)
    save_file(
        {"features": torch.ones(2, 4, 3).half(), "mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}, tmp_path / "c.safetensors"
    )
    assert len(Captions.load(tmp_path / "c.safetensors", 4, 3)) == 2


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    """The digits' names as features: a fixed vector per letter, padded on the left to six positions."""
    letters = 5 * torch.randn(26, 12, generator=torch.Generator().manual_seed(0))
    features, mask = torch.zeros(10, 6, 12), torch.zeros(10, 6)
    for row, name in enumerate(NAMES):
        features[row, 6 - len(name) :] = letters[[ord(letter) - ord("a") for letter in name]]
        mask[row, 6 - len(name) :] = 1
    file = tmp_path_factory.mktemp("captions") / "names.safetensors"
    save_file({"features": features.half(), "mask": mask.to(torch.uint8)}, file)
    return file


def trained_teacher(captions: Path, steps: int) -> CodeTeacher:
    """A text-conditional LlamaGen of the digits, trained for a moment or for some seconds."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(embedded("teacher") / "tokenizer")
    config = LlamaGenConfig(
        depth=3, width=48, heads=3, ffn_multiple=16, rows=4, columns=4, caption_dim=12, caption_length=6, class_dropout=0.1
    )
    teacher = llamagen_teacher(config, tokenizer)  # pyright: ignore[reportArgumentType]
    teacher.conditions.use_captions(captions)
    random = torch.Generator().manual_seed(0)
    images, labels = digits.batch("train", 2000, random)
    ids = tokenizer.encode(images)
    trained = [*teacher.backbone.parameters(), *teacher.output.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=4e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        rows = torch.randint(len(ids), (64,), generator=random)
        loss, _ = ar_loss(teacher, ids[rows], teacher.conditions(labels[rows]), 0.1, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)


def distilled(teacher: CodeTeacher, captions: Path, folder: Path, tune: int, csd: int, samples: int) -> Path:
    save_teacher(folder / "teacher", teacher)
    out = folder / "run"
    arguments = ["distill", "configs/digits_paper.yaml", "--teacher", folder / "teacher", "--captions", captions, "--out", out]
    arguments += ["--teacher-samples", samples, "--tune.iterations", tune, "--csd.iterations", csd]
    assert main([str(a) for a in [*arguments, "--csd.validation", 0, "--loop.preview-every", 0]]) == 0
    return out


@pytest.mark.long
def test_what_a_text_conditional_teacher_reaches(captions, tmp_path):
    run = open_run(distilled(trained_teacher(captions, 400), captions, tmp_path, 60, 40, 1024), torch.device("cpu"))
    labels = torch.arange(400) % 10
    classifier = load_classifier(embedded("classifier"))

    def recognised(images: Tensor) -> float:
        return float((classifier(images).argmax(-1) == labels).float().mean())

    cond = run.teacher.conditions(labels)
    of_teacher = recognised(run.teacher.decode(run.teacher.sample(cond, Sampling(), range(400)), cond))
    of_generator = recognised(run.teacher.decode(one_step(run.generator.student, cond, range(400)), cond))
    assert of_teacher > 0.5
    assert of_generator > 0.5 * of_teacher


@pytest.mark.e2e
def test_the_commands_of_a_text_conditional_teacher(captions, tmp_path, capsys):
    out = distilled(trained_teacher(captions, 5), captions, tmp_path, 2, 2, 64)
    assert (
        main(["evaluate", str(out), "--count", "100", "--no-speed", "--metrics.halves", "2", "--metrics.kid-subsets", "2"]) == 0
    )
    assert main(["sample", str(out), "--labels", "3,7", "--count", "4", "--steps", "2", "--out", str(tmp_path / "g.png")]) == 0
    pipeline = OneStepPipeline.from_pretrained(out / "generator", device="cpu", captions=str(captions))
    assert torch.equal(pipeline([3, 7]).tokens, OneStepPipeline.from_pretrained(out, device="cpu")([3, 7]).tokens)
    capsys.readouterr()
    for wrong, message in (
        (["sample", out / "generator", "--out", tmp_path / "h.png"], "give their features with --captions"),
        (["distill", "--teacher", "digits", "--captions", captions, "--out", tmp_path / "r"], "conditioned on classes"),
        (
            ["distill", "--teacher", tmp_path / "teacher", "--captions", out / "config.yaml", "--out", tmp_path / "r"],
            "cannot be read",
        ),
    ):
        assert main([str(a) for a in wrong]) == 2
        assert message in capsys.readouterr().err


def test_captions_that_do_not_fit_are_refused(captions, tmp_path, capsys):
    with pytest.raises(Exception, match=r"this model needs \(N, 5, 6\)"):
        tiny_text().conditions.use_captions(captions)
    assert Captions.load(captions, 6, 12).digest() != Captions(torch.zeros(1, 6, 12), torch.ones(1, 6)).digest()
