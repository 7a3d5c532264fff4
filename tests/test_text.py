"""Text conditioning: padding, features, and DD2 on a teacher whose captions are the digits' names."""

from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dd2.checkpoints.native import load_tokenizer, save_teacher
from dd2.checkpoints.runs import embedded, open_run
from dd2.cli import main
from dd2.data import digits
from dd2.errors import InputError
from dd2.evaluation.classifier import load_classifier
from dd2.pipeline import OneStepPipeline
from dd2.sampling import one_step
from dd2.teachers.captions import attention_mask
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling
from dd2.teachers.llamagen import LlamaGenConfig, llamagen_teacher
from dd2.teachers.own_token import ReadsOwnToken
from dd2.teachers.train import ar_loss
from dd2.text.captions import Captions, caption_condition
from models import tiny_text

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


BOTH = pytest.mark.parametrize("next_scale", [False, True], ids=["raster", "next_scale"])


@BOTH
def test_padding_is_never_read(next_scale):
    teacher = tiny_text(next_scale=next_scale)
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


@BOTH
def test_the_cache_and_the_words_order(next_scale):
    """Step by step with a cache is a whole pass, position i sees earlier steps alone, and the same words in another order say
    something else.
    """
    teacher = tiny_text(next_scale=next_scale)
    backbone, cond = teacher.backbone, teacher.conditions(torch.tensor([2, 1]))
    tokens = teacher.codebook[torch.randint(teacher.num_codes, (2, teacher.order.n), generator=torch.Generator().manual_seed(0))]
    whole = backbone(tokens, cond)
    cache = backbone.new_cache()
    for step in teacher.order.steps:
        found = backbone.next_features(cache, tokens[:, : step.start], cond)
        torch.testing.assert_close(found, whole[:, step], rtol=1e-4, atol=1e-5)
    last = teacher.order.steps[-1].start
    changed = torch.cat([tokens[:, :last], -tokens[:, last:]], 1)
    torch.testing.assert_close(backbone(changed, cond), whole)
    swapped = cond.clone()
    swapped[0, [3, 4]] = cond[0, [4, 3]]
    difference = (backbone(tokens, swapped) - whole).abs().amax((1, 2))
    assert difference[0] > 1e-2
    assert difference[1] == 0


@BOTH
def test_own_features_read_the_caption_and_not_its_padding(next_scale):
    teacher = tiny_text(next_scale=next_scale)
    cond = teacher.conditions(torch.tensor([0, 1]))
    noise = torch.randn(2, *teacher.backbone.token_shape, generator=torch.Generator().manual_seed(0))

    def features(given: Tensor) -> Tensor:
        assert isinstance(teacher.backbone, ReadsOwnToken)
        return teacher.backbone.own_features(noise, given, lambda index, x: x)

    assert features(cond).shape == (2, teacher.order.n, teacher.backbone.width)
    padded = torch.where(cond[..., -1:] > 0, cond, torch.cat([torch.ones(2, 5, 6), torch.zeros(2, 5, 1)], -1))
    assert not torch.equal(padded, cond)
    torch.testing.assert_close(features(padded), features(cond))
    assert (features(cond.flip(0)) - features(cond)).abs().amax((1, 2)).min() > 1e-2


def test_attention_mask_is_causal_without_padding_and_with_oneself():
    mask = attention_mask(torch.tensor([[False, True]]), 0, 4)[0, 0]
    assert mask.tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, True, True, False],
        [False, True, True, True],
    ]
    assert torch.equal(attention_mask(torch.tensor([[False, True]]), 3, 4)[0, 0], mask[3:])


def test_words_are_kept_without_padding_and_come_last_in_a_condition(tmp_path):
    captions = Captions(torch.arange(1.0, 8.0).view(7, 1).half(), torch.tensor([2, 4, 1]), 4)
    captions.save(tmp_path / "c.safetensors")
    again = Captions.load(tmp_path / "c.safetensors")
    cond = again[torch.tensor([2, 0, 1])]
    assert cond[..., 0].tolist() == [[0, 0, 0, 7], [0, 0, 1, 2], [3, 4, 5, 6]]
    assert cond[..., 1].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    old = {"features": cond[..., :1].half(), "mask": cond[..., 1].to(torch.uint8)}  # as files had them once
    save_file(old, tmp_path / "old.safetensors")
    content = old["features"].float().numpy().tobytes() + old["mask"].float().numpy().tobytes()
    padded = Captions.load(tmp_path / "old.safetensors")
    assert torch.equal(padded[torch.arange(3)], cond)
    assert padded.words.flatten().tolist() == [7, 1, 2, 3, 4, 5, 6]
    assert padded.digest == sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("features", "mask", "said"),
    [
        (torch.full((1, 4, 3), torch.nan), torch.ones(1, 4), "not finite"),
        (torch.ones(1, 4, 3, dtype=torch.int64), torch.ones(1, 4), "not finite"),
        (torch.ones(1, 4, 3), torch.tensor([[1.0, 1, 0, 0]]), "the mask must be"),
        (torch.ones(1, 4, 3), torch.tensor([[0.0, 1, 0, 1]]), "the mask must be"),
        (torch.ones(1, 4, 3), torch.full((1, 4), 0.5), "the mask must be"),
        (torch.ones(1, 4, 3), torch.zeros(1, 4), "a caption has 1 to 4 words"),
        (torch.ones(1, 4, 3), torch.ones(1, 3), r"not \(N, P, channels\)"),
    ],
)
def test_padded_caption_features_that_are_none(tmp_path, features, mask, said):
    save_file({"features": features, "mask": mask}, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=said):
        Captions.load(tmp_path / "c.safetensors")
    save_file(
        {"features": torch.ones(2, 4, 3).half(), "mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}, tmp_path / "c.safetensors"
    )
    assert len(Captions.load(tmp_path / "c.safetensors")) == 2


@pytest.mark.parametrize(
    ("changed", "metadata", "said"),
    [
        ({"counts": torch.tensor([2, 2])}, {"length": "4"}, "a caption has 1 to 4 words, 3 in all"),
        ({"counts": torch.tensor([3, 0])}, {"length": "4"}, "a caption has 1 to 4 words"),
        ({"counts": torch.tensor([1, 2])}, {"length": "1"}, "a caption has 1 to 1 words"),
        ({"counts": torch.tensor([1.0, 2.0])}, {"length": "4"}, "whole"),
        ({"counts": torch.zeros(0, dtype=torch.int32)}, {"length": "4"}, "whole"),
        ({"features": torch.full((3, 2), torch.inf)}, {"length": "4"}, "not finite"),
        ({"features": torch.ones(3)}, {"length": "4"}, "channels"),
        ({}, {"length": "four"}, "four"),
        ({}, {}, "length"),
        ({}, {"length": "4", "captions": '["one"]'}, "the texts are 1, the features those of 2"),
        ({}, {"length": "4", "captions": '"one"'}, "no list"),
        ({}, {"length": "4", "encoder": "[]"}, "cannot be read"),
    ],
)
def test_caption_features_that_are_none(tmp_path, changed, metadata, said):
    good = {"features": torch.ones(3, 2).half(), "counts": torch.tensor([1, 2])}
    save_file({**good, **changed}, tmp_path / "c.safetensors", metadata)
    with pytest.raises(InputError, match=said):
        Captions.load(tmp_path / "c.safetensors")
    save_file(good, tmp_path / "c.safetensors", {"length": "4"})
    assert len(Captions.load(tmp_path / "c.safetensors")) == 2


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
    teacher.conditions = teacher.conditions.of_texts(str(captions))
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
        (["sample", out / "generator", "--out", tmp_path / "h.png"], "give prompts, a list of them"),
        (["distill", "--teacher", "digits", "--captions", captions, "--out", tmp_path / "r"], "conditioned on classes"),
        (
            ["distill", "--teacher", tmp_path / "teacher", "--captions", out / "config.yaml", "--out", tmp_path / "r"],
            "does not say which text encoder",
        ),
    ):
        assert main([str(a) for a in wrong]) == 2
        assert message in capsys.readouterr().err


def test_captions_that_do_not_fit_are_refused(captions):
    with pytest.raises(Exception, match="of 6 positions and 12 channels; this model needs 5 and 6"):
        tiny_text().conditions.of_texts(str(captions))
    assert Captions.load(captions).digest != Captions(torch.zeros(6, 12), torch.tensor([6]), 6).digest
