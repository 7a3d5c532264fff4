"""A KL tokenizer and a MAR trained on one's own images, and what the two reach on digits."""

import json
from collections.abc import Mapping

import pytest
import torch

from dd2.checkpoints.native import load_teacher, load_tokenizer
from dd2.checkpoints.runs import embedded
from dd2.cli import main
from dd2.data import digits
from dd2.evaluation.features import classifier_features, read_features
from dd2.teachers.diffusion import DiffusionHead
from dd2.teachers.filtering import Sampling
from dd2.tokenizers.kl import KLConfig, KLTokenizer
from dd2.tokenizers.train import measured_deviation

CPU = torch.device("cpu")
SIZES = {
    "tokenizer.image-size": 16,
    "tokenizer.image-channels": 1,
    "tokenizer.channels": 16,
    "tokenizer.multipliers": "1 2 2",
    "tokenizer.res-blocks": 1,
    "tokenizer.groups": 8,
    "latent-channels": 4,
}
MAR = {
    "width": 48,
    "depth": 2,
    "heads": 4,
    "decoder-width": 48,
    "decoder-depth": 2,
    "decoder-heads": 4,
    "buffer": 4,
    "head-depth": 2,
    "head-width": 48,
    "start": 985,
}


def flags(fields: Mapping[str, object], prefix: str = "") -> list[str]:
    return [text for name, value in fields.items() for text in (f"--{prefix}{name}", *str(value).split())]


def test_the_divergence_is_that_of_gaussians_and_draws_have_the_posteriors_moments():
    torch.manual_seed(0)
    tokenizer = KLTokenizer(
        KLConfig(image_size=8, image_channels=1, channels=4, multipliers=(1, 2), res_blocks=1, groups=2, z_channels=3)
    )
    with torch.no_grad():
        posterior = tokenizer.posterior(torch.rand(2, 1, 8, 8) * 2 - 1)
    normal = torch.distributions.Normal(posterior.mean, (posterior.log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl, expected)
    random = torch.Generator().manual_seed(1)
    draws = torch.stack([posterior.sample(random) for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), posterior.mean, atol=0.08, rtol=0)
    torch.testing.assert_close(draws.std(0), (posterior.log_variance / 2).exp(), atol=0.08, rtol=0)


def test_the_heads_time_embedding_starts_small():
    """As the official one: N(0, 0.02²), where other linear maps have Xavier's weights; the output starts at 0."""
    torch.manual_seed(0)
    head = DiffusionHead(4, 32, 64, 2)
    for index in (0, 2):
        assert float(head.time_embed.mlp[index].get_parameter("weight").std()) == pytest.approx(0.02, rel=0.1)
    assert float(head.cond_embed.weight.std()) == pytest.approx((2 / (32 + 64)) ** 0.5, rel=0.1)
    eps, fraction = head(torch.randn(5, 4), torch.arange(5), torch.randn(5, 32))
    assert not eps.any()
    assert not fraction.any()


@pytest.mark.e2e
def test_trained_on_ones_own_images_from_the_command_line(tmp_path, capsys):
    tokenizer = ["train-tokenizer", "--out", str(tmp_path / "tok"), *flags(SIZES), "--iterations", "3", "--batch", "8"]
    assert main([*tokenizer, "--loop.preview-every", "2"]) == 0
    made = load_tokenizer(tmp_path / "tok" / "tokenizer")
    assert isinstance(made, KLTokenizer)
    images, _ = digits.batch("train", 64, torch.Generator().manual_seed(5))
    tokens = torch.cat([made.encode_for_training(images, torch.Generator().manual_seed(seed)) for seed in range(4)])
    assert float(tokens.std()) == pytest.approx(1.0, abs=0.1)  # as measured on other images
    assert measured_deviation(made, images) * made.config.scale == pytest.approx(1.0, abs=0.1)
    assert "latents have a deviation of" in capsys.readouterr().out
    teacher = ["train-teacher", "--tokenizer", str(tmp_path / "tok" / "tokenizer"), "--out", str(tmp_path / "mar")]
    teacher += [*flags(MAR, "mar."), "--iterations", "3", "--batch", "4", "--token-images", "64", "--loop.preview-every", "2"]
    assert main([*teacher, "--loop.save-every", "1"]) == 0
    said = capsys.readouterr().out
    assert "loss per token of held-out images" in said
    found = load_teacher(tmp_path / "mar" / "teacher")
    sampling = Sampling(ar_steps=3, diffusion_steps=3)
    assert found.decode(found.sample(torch.tensor([1]), sampling, [0]), torch.tensor([1])).shape == (1, 1, 16, 16)
    for name in ("00000002", "00000003"):  # killed after its first iteration
        path = tmp_path / "mar" / "checkpoints" / "teacher" / name
        if path.exists():
            path.rename(tmp_path / name)
    before = found.fingerprint()
    assert main([*teacher, "--loop.save-every", "1"]) == 0
    assert load_teacher(tmp_path / "mar" / "teacher").fingerprint() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--patch-nums", "1", "2", "4"], "give one"),
        (["--latent-channels", "-1"], "must not be negative"),
        (["--kl-weight", "-1"], "must not be negative"),
    ],
)
def test_bad_tokenizers(tmp_path, capsys, more, said):
    assert main(["train-tokenizer", "--out", str(tmp_path / "t"), *flags(SIZES), *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_sizes_of_another_kind_are_refused(tmp_path, capsys):
    short = ["--iterations", "1", "--batch", "4", "--loop.preview-every", "0"]
    assert main(["train-tokenizer", "--out", str(tmp_path / "t"), *flags(SIZES), *short]) == 0
    arguments = ["train-teacher", "--tokenizer", str(tmp_path / "t" / "tokenizer"), "--out", str(tmp_path / "m")]
    assert main([*arguments, "--teacher.depth", "3", *short]) == 2
    assert "this is a KL tokenizer: its teacher's sizes are mar.*, not teacher.*" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.long
def test_what_a_small_mar_reaches_on_digits(tmp_path):
    """A few minutes of training: its samples are nearer to real digits than another class's digits are, and of their class."""
    tokenizer = ["train-tokenizer", "--out", str(tmp_path / "tok"), *flags(SIZES), "--iterations", "600", "--batch", "64"]
    assert main([*tokenizer, "--optim.lr", "2e-3", "--optim.decay", "cosine", "--loop.preview-every", "0"]) == 0
    made = load_tokenizer(tmp_path / "tok" / "tokenizer")
    assert isinstance(made, KLTokenizer)
    teacher = ["train-teacher", "--tokenizer", str(tmp_path / "tok" / "tokenizer"), "--out", str(tmp_path / "mar")]
    teacher += [
        *flags(MAR, "mar."),
        "--iterations",
        "1500",
        "--batch",
        "64",
        "--token-images",
        "20000",
        "--loop.preview-every",
        "0",
    ]
    assert main([*teacher, "--optim.lr", "2e-3", "--optim.decay", "cosine", "--mar.dropout", "0"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "mar" / "metrics.jsonl").read_text().splitlines()]
    held_out = rows[-1]
    assert held_out["loss_per_token"] < 1.15 * held_out["training_loss_per_token"]
    found = load_teacher(tmp_path / "mar" / "teacher")
    labels = torch.arange(500) % 10
    network = classifier_features(embedded("classifier"), CPU)
    drawn = found.sample(labels, Sampling(cfg_scale=2.0, ar_steps=16, diffusion_steps=25), range(500))
    with torch.no_grad():
        features = read_features(network, found.decode(drawn, labels))
    accuracy = float((features["probabilities"].argmax(1) == labels).float().mean())
    assert accuracy > 0.8
