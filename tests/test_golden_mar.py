"""MAR and its KL autoencoder against the official code's outputs and key tables."""

import argparse
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dd2.checkpoints import load_mar
from dd2.checkpoints.foreign import official_shapes
from dd2.checkpoints.mar import kl_config, kl_origins, mar_origins
from dd2.checkpoints.native import load_teacher
from dd2.cli import main
from dd2.errors import InputError
from dd2.teachers.diffusion import DiffusionSchedule
from dd2.teachers.diffusion_score import COSINE, index_of, level_of
from dd2.teachers.filtering import Sampling
from dd2.teachers.mar import MARTeacher, fill
from dd2.teachers.mar_network import MARConfig
from dd2.teachers.mar_train import diffusion_loss, random_known
from dd2.teachers.masked import fill_steps, masked_after
from dd2.tokenizers.kl import KLConfig, KLTokenizer
from golden_weights import GOLDEN, golden_model, golden_sizes, golden_values


def close(found: Tensor, expected: Tensor, atol: float = 1e-4, rtol: float = 0.0) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), atol=atol, rtol=rtol)


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return golden_values("mar_tiny")


@pytest.fixture(scope="module")
def teacher() -> MARTeacher:
    return load_mar({"model_ema": golden_model("mar_tiny", "mar_shapes"), "model": {}}, num_heads=4)


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    with np.load(GOLDEN / "mar_trained_tiny.npz") as content:
        return {name: torch.from_numpy(content[name]) for name in content.files}


@pytest.fixture(scope="module")
def trained_teacher(trained) -> MARTeacher:
    state = {name.removeprefix("mar/state/"): value for name, value in trained.items() if name.startswith("mar/state/")}
    return load_mar(state, num_heads=4)


def test_sizes_are_read_off_the_tensors(teacher, trained_teacher):
    sizes = golden_sizes("mar_tiny")
    config = teacher.backbone.config
    assert (config.width, config.depth, config.decoder_width, config.decoder_depth) == (48, 2, 40, 2)
    assert (config.head_width, config.head_depth, config.buffer, config.num_classes) == (32, 2, 5, 10)
    assert config.rows * config.columns == (sizes["img_size"] // sizes["vae_stride"]) ** 2
    assert trained_teacher.backbone.config.decoder_width == 48


@pytest.mark.parametrize("mask", ["all", "some", "last"])
def test_features(teacher, values, mask):
    known = values[f"mask_{mask}"] == 0
    labels = values["labels"]
    with torch.no_grad():
        close(teacher.mar.features(values["tokens"], known, labels), values[f"z_{mask}"])
        null = teacher.null_condition(labels)
        close(teacher.mar.features(values["tokens"], known, null), values[f"z_uncond_{mask}"])


def test_what_stands_at_unknown_positions_does_not_matter_and_rows_may_know_different_numbers(teacher, values):
    tokens, labels = values["tokens"], values["labels"]
    known = values["mask_some"] == 0
    known[0] = False
    known[1, :5] = True
    with torch.no_grad():
        together = teacher.mar.features(tokens, known, labels)
        other = torch.where(known.unsqueeze(-1), tokens, torch.full_like(tokens, 7.0))
        close(teacher.mar.features(other, known, labels), together, atol=1e-6)
        for row in range(3):
            close(
                teacher.mar.features(tokens[row : row + 1], known[row : row + 1], labels[row : row + 1])[0], together[row], 1e-5
            )


def test_head(teacher, values):
    features = values["z_some"].reshape(48, -1)
    with torch.no_grad():
        eps, fraction = teacher.mar.head(values["x_t"], values["t"], features)
    close(torch.cat([eps, fraction], -1), values["net"])


def test_trained_network_and_head(trained_teacher, trained):
    mar = trained_teacher.mar
    tokens, labels, known = trained["mar/in/tokens"], trained["mar/in/labels"], trained["mar/in/mask"] == 0
    with torch.no_grad():
        close(mar.encode(tokens, known, labels)[0], trained["mar/out/encoder"])
        close(mar.features(tokens, known, labels), trained["mar/out/z"])
        close(mar.features(tokens, torch.zeros_like(known), labels), trained["mar/out/z_all_masked"])
        close(mar.features(tokens, known, trained_teacher.null_condition(labels)), trained["mar/out/z_null_class"])
        found = mar.head(trained["head/in/x"], trained["head/in/t"], trained["head/in/c"])
    close(torch.cat(found, -1), trained["head/out"])


def test_schedule(values, trained):
    close(COSINE.alphas_cumprod, values["alphas_cumprod"], atol=0, rtol=1e-9)
    chain = COSINE.respaced(10)
    assert chain.indices.tolist() == trained["schedule/timestep_map_10"].tolist()
    close(chain.betas, trained["schedule/betas_10"], atol=0, rtol=1e-9)
    close(chain.posterior_log_variance, trained["schedule/posterior_log_variance_clipped_10"], atol=1e-9)
    for found, number in zip(chain.posterior_mean_coefficients, (1, 2), strict=True):
        close(found, trained[f"schedule/posterior_mean_coef{number}_10"], atol=1e-12, rtol=1e-9)
    for steps, indices in {100: [0, 10, 20], 50: [0, 20, 41, 61, 82, 102], 25: [0, 42, 83, 125, 166, 208]}.items():
        found = COSINE.respaced(steps).indices.tolist()
        assert found[: len(indices)] == indices
        assert found[-1] == 999
    close(COSINE.noised(values["x_start"], values["t"], values["noise"]), values["q_sample"])


@pytest.mark.parametrize(("name", "n", "steps"), [("16_5", 16, 5), ("256_64", 256, 64), ("256_32", 256, 32)])
def test_how_many_tokens_each_step_draws(trained, name, n, steps):
    found = masked_after(n, steps)
    table = trained[f"schedule/steps_{name}"]
    assert found == table[:, 1].tolist()
    orders = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    plan = fill_steps(orders, steps, lambda share: share)
    assert [step.drawn.sum(1).tolist() for step in plan] == [[size, size] for size in table[:, 0].tolist()]
    assert all(not (step.known & step.drawn).any() for step in plan)
    assert (torch.stack([step.drawn for step in plan]).sum(0) == 1).all()
    assert plan[0].drawn[0].nonzero()[:, 0].tolist() == [int(orders[0, -1])]  # revealed from the end of the order


def test_one_step_of_the_chain(trained_teacher, trained):
    x, k = trained["psample/x"], trained["psample/t_index"]
    chain = COSINE.respaced(10)
    with torch.no_grad():
        eps, fraction = trained_teacher.mar.head(x, chain.indices[k], trained["psample/c"])
    close(chain.clean(x, k, eps), trained["psample/x0"], atol=1e-4, rtol=1e-4)
    noise = trained["psample/temperature"] * trained["psample/noise"]
    close(chain.step_back(x, k, eps, fraction, noise), trained["psample/out"], atol=1e-4, rtol=1e-4)


def relative(found: Tensor, latent: Tensor) -> float:
    expected = latent.flatten(2).transpose(1, 2)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("run", ["plain", "cfg"])
def test_whole_sampling_runs_of_a_trained_model(trained_teacher, trained, run):
    cfg, temperature = float(trained[f"sample/{run}/cfg"]), float(trained[f"sample/{run}/temperature"])
    sampling = Sampling(cfg_scale=cfg, temperature=temperature, ar_steps=5, diffusion_steps=10)
    steps = fill_steps(trained["mar/in/order"], 5, lambda share: 1 + (cfg - 1) * share)

    def noise(step: int, draw: int, drawn: Tensor) -> Tensor:
        return trained[f"sample/{run}/noise/{11 * step + draw:03d}"][: int(drawn.sum())]

    empty = torch.zeros(3, 16, 4)
    found = fill(trained_teacher, empty, trained["mar/in/labels"], steps, sampling, noise)
    assert relative(found, trained[f"sample/{run}/latent"]) < 1e-4


@pytest.mark.parametrize("run", ["plain", "cfg"])
def test_whole_sampling_runs_of_a_random_model(teacher, values, run):
    cfg, temperature = (1.0, 1.0) if run == "plain" else (2.5, 0.0)
    sampling = Sampling(cfg_scale=cfg, temperature=temperature or 1e-30, ar_steps=4, diffusion_steps=10)
    steps = fill_steps(values["orders"], 4, lambda share: 1 + (cfg - 1) * share)

    def noise(step: int, draw: int, drawn: Tensor) -> Tensor:
        count = int(drawn.sum())
        if draw == 0:
            return values[f"sample_{run}_init_{step}"][:count]
        return values[f"sample_plain_noise_{step}"][draw - 1, :count] if run == "plain" else torch.zeros(count, 6)

    found = fill(teacher, torch.zeros(3, 16, 6), values["labels"], steps, sampling, noise)
    assert relative(found, values[f"sample_{run}"]) < 1e-4


def test_one_seed_an_image(trained_teacher):
    sampling = Sampling(cfg_scale=2.0, ar_steps=4, diffusion_steps=5)
    labels = torch.tensor([0, 1, 2])
    together = trained_teacher.sample(labels, sampling, [5, 6, 7])
    alone = trained_teacher.sample(labels[1:2], sampling, [6])
    assert relative(alone, together[1:2].transpose(1, 2).unflatten(2, (4, 4))) < 1e-4
    again = trained_teacher.sample(labels, sampling, [5, 6, 7], prefix=together, first_step=2)
    assert relative(again, together.transpose(1, 2).unflatten(2, (4, 4))) < 1e-4
    assert trained_teacher.check(Sampling(top_k=3)) == "top_k have no effect: a MAR teacher draws no codes"


def test_the_head_stays_float32_in_half_precision(trained_teacher, trained):
    """At the last levels its rounding would be multiplied by thousands."""
    lowered = trained_teacher.in_precision(torch.bfloat16)
    assert lowered.mar.diffloss.net.input_proj.weight.dtype == torch.float32
    assert lowered.mar.encoder_blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = lowered.mar.head(trained["head/in/x"], trained["head/in/t"], trained["head/in/c"])
    close(torch.cat(found, -1), trained["head/out"])


def test_rect_flow_and_the_heads_levels():
    t = level_of(torch.arange(1000))
    assert torch.equal(index_of(t), torch.arange(1000))
    for level, index in ((0.02, 6.34), (0.1, 62.5), (0.5, 495.0), (0.9, 928.0), (0.98, 985.9)):
        assert abs(int(index_of(torch.tensor([level]))) - index) <= 0.6
    assert float(t[0]) == pytest.approx(0.0064, abs=1e-4)
    assert float(t[998]) == pytest.approx(0.9984, abs=1e-4)
    assert DiffusionSchedule.cosine().alphas_cumprod[999] == pytest.approx(2.4288e-9, rel=1e-3)


@pytest.mark.parametrize("cfg", [None, 2.5])
def test_the_conditional_score_is_the_heads_in_rect_flows_terms(trained_teacher, trained, cfg):
    tokens, labels = trained["mar/in/tokens"], trained["mar/in/labels"]
    known = trained["mar/in/mask"] == 0
    given = trained_teacher.given(tokens, labels, Sampling(cfg_scale=cfg, ar_steps=5), known)
    assert torch.equal(given.valid, ~known)
    random = torch.Generator().manual_seed(0)
    index = torch.randint(5, 990, (2, 3, 16), generator=random)
    x_0 = torch.randn(2, 3, 16, 4, generator=random)
    noise = torch.randn(2, 3, 16, 4, generator=random)
    t = level_of(index)
    x_t = (1 - t).unsqueeze(-1) * x_0 + t.unsqueeze(-1) * noise
    with torch.no_grad():
        found = given.x0_hat(x_t, t)
        x = COSINE.noised(x_0, index, noise)
        features = trained_teacher.mar.features(tokens, known, labels)
        eps = trained_teacher.mar.head(x, index, features)[0]
        if cfg is not None:
            null = trained_teacher.mar.features(tokens, known, trained_teacher.null_condition(labels))
            without = trained_teacher.mar.head(x, index, null)[0]
            known_after = next(16 - left for left in masked_after(16, 5) if 16 - left > int(known[0].sum()))
            eps = without + (1 + (cfg - 1) * known_after / 16) * (eps - without)
        close(found, COSINE.clean(x, index, eps), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="not all"):
        trained_teacher.given(tokens, labels, Sampling(), torch.ones_like(known))


def test_autoencoder():
    values, sizes = golden_values("kl_tiny"), golden_sizes("kl_tiny")
    state = golden_model("kl_tiny", "vae_shapes")
    config = kl_config(state, 8)
    assert (config.z_channels, config.multipliers, config.image_size) == (sizes["embed_dim"], tuple(sizes["ch_mult"]), 32)
    tokenizer = KLTokenizer(config)
    shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
    origins = kl_origins(shapes)
    tokenizer.load_state_dict({key: state[origin.key] for key, origin in origins.items()})
    with torch.no_grad():
        posterior = tokenizer.posterior(values["images"])
        close(posterior.mean, values["mean"])
        close(posterior.log_variance, values["logvar"])
        close(tokenizer.encode(values["images"]), tokenizer.tokens(values["mean"]), atol=3e-5)
        close(tokenizer.decode(tokenizer.tokens(values["z"])), values["decoded"])
    assert tokenizer.tokens(values["z"])[0, 9].tolist() == pytest.approx((0.2325 * values["z"][0, :, 1, 1]).tolist())


def test_full_size_key_tables():
    """On the meta device: every key and shape of the released models."""
    with torch.device("meta"):
        for sizes, millions in (
            (MARConfig(), 207.924768),
            (
                replace(
                    MARConfig(),
                    width=1024,
                    depth=16,
                    heads=16,
                    decoder_width=1024,
                    decoder_depth=16,
                    decoder_heads=16,
                    head_depth=8,
                    head_width=1280,
                ),
                478.326304,
            ),
            (
                replace(
                    MARConfig(),
                    width=1280,
                    depth=20,
                    heads=16,
                    decoder_width=1280,
                    decoder_depth=20,
                    decoder_heads=16,
                    head_depth=12,
                    head_width=1536,
                ),
                942.403104,
            ),
        ):
            teacher = MARTeacher(sizes, KLTokenizer(KLConfig()))
            assert sum(p.numel() for p in teacher.mar.parameters()) / 1e6 == pytest.approx(millions, abs=1e-6)
            if sizes == MARConfig():
                shapes = {k: tuple(v.shape) for k, v in teacher.state_dict().items() if not k.startswith("tokenizer.")}
                assert official_shapes(mar_origins(shapes), shapes) == table("keys_mar_base")
        tokenizer = KLTokenizer(KLConfig())
        shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
        assert official_shapes(kl_origins(shapes), shapes) == table("keys_kl16")
        assert sum(p.numel() for p in tokenizer.parameters()) == 66_456_019


def table(name: str) -> dict[str, tuple[int, ...]]:
    found = golden_sizes(name)
    return {key: tuple(shape) for key, shape in found.get("shapes", found).items()}


def test_what_does_not_fit_is_refused():
    state, kl = golden_model("mar_tiny", "mar_shapes"), golden_model("kl_tiny", "vae_shapes")
    with pytest.raises(InputError, match="swapped"):
        load_mar(kl, state)
    with pytest.raises(InputError, match="give num_heads"):
        load_mar(state)
    with pytest.raises(InputError, match="class_emb"):
        load_mar(kl)
    with pytest.raises(InputError, match="is missing"):
        load_mar({key: value for key, value in state.items() if key != "encoder_blocks.1.mlp.fc1.bias"}, num_heads=4)
    with pytest.raises(InputError, match="original kl-f16"):
        load_mar(state, {**kl, "decoder.up.2.attn.0.q.weight": torch.zeros(1)}, num_heads=4)
    with pytest.raises(InputError, match="ar_steps must be in 1 to 16"):
        masked_after(16, 0)
    with pytest.raises(InputError, match="ar_steps must be in 1 to 256"):
        masked_after(256, 257)
    with pytest.raises(InputError, match="diffusion_steps"):
        COSINE.respaced(1001)
    trained = golden_model("mar_tiny", "mar_shapes") | {"z_proj.weight": torch.zeros(48, 4)}
    trained = {key: value for key, value in trained.items() if not key.startswith("diffloss.net.")}
    head = {"input_proj.weight": (32, 4), "final_layer.linear.weight": (8, 32), "final_layer.linear.bias": (8,)}
    rest = {key: value for key, value in state.items() if key.startswith("diffloss.net.")}
    rest |= {f"diffloss.net.{key}": torch.zeros(shape) for key, shape in head.items()}
    with pytest.raises(InputError, match="not trained together"):
        load_mar(trained | rest, kl, num_heads=4)


def test_converted_it_is_the_same_and_inspected(tmp_path, capsys):
    state = golden_model("mar_tiny", "mar_shapes")
    arguments = argparse.Namespace(diffloss_d=2)  # as in checkpoints of training
    torch.save({"model_ema": state, "model": {}, "args": arguments}, tmp_path / "checkpoint-last.pth")
    torch.save({"model": golden_model("kl_tiny", "vae_shapes")}, tmp_path / "kl.ckpt")
    files = ["--mar", str(tmp_path / "checkpoint-last.pth"), "--vae", str(tmp_path / "kl.ckpt")]
    assert main(["convert", "mar", *files, "--out", str(tmp_path / "out"), "--num-heads", "4"]) == 0
    assert "of model_ema" in capsys.readouterr().out
    loaded = load_teacher(tmp_path / "out")
    original = load_mar(tmp_path / "checkpoint-last.pth", tmp_path / "kl.ckpt", num_heads=4)
    assert loaded.fingerprint() == original.fingerprint()
    labels, sampling = torch.tensor([1, 2]), Sampling(ar_steps=3, diffusion_steps=4)
    drawn = loaded.sample(labels, sampling, [0, 1])
    assert torch.equal(drawn, original.sample(labels, sampling, [0, 1]))
    with torch.no_grad():
        assert loaded.decode(drawn, labels).shape == (2, 3, 16, 16)
    assert torch.equal(loaded.restored(loaded.stored(drawn)), drawn)
    for path, said in (("out", "mar"), ("checkpoint-last.pth", "MAR transformer"), ("kl.ckpt", "KL autoencoder")):
        assert main(["inspect", str(tmp_path / path)]) == 0
        assert said in capsys.readouterr().out
    run = ["distill", "--teacher", str(tmp_path / "out"), "--out", str(tmp_path / "run"), "--teacher-samples", "16"]
    short = ["--iterations", "1", "--batch", "4", "--accumulate", "1", "--k", "1", "--validation", "8"]
    csd = [text.replace("--", "--csd.") for text in short]
    steps = ["--csd.sampling.diffusion-steps", "3", "--tune.sampling.diffusion-steps", "3", "--tune.sampling.ar-steps", "4"]
    assert main([*run, *csd, *steps, "--csd.sampling.ar-steps", "4", "--loop.preview-every", "0"]) == 0
    assert main(["sample", str(tmp_path / "run"), "--count", "2", "--out", str(tmp_path / "images.png")]) == 0


def test_training_loss(trained_teacher, trained):
    with torch.no_grad():
        arguments = (trained[f"loss/{name}"] for name in ("target", "c", "t", "noise"))
        found = diffusion_loss(trained_teacher.mar, *arguments)
    mask = trained["loss/mask"]
    close((found * mask).sum() / mask.sum(), trained["loss/value"])


def test_known_sets_of_training():
    random = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(2000):
        known = random_known(2, 256, random)
        counts = known.sum(1)
        assert counts[0] == counts[1]
        shares.append(1 - float(counts[0]) / 256)
    shares = torch.tensor(shares)
    assert 0.7 <= float(shares.min()) < 0.71
    assert float(shares.max()) == 1.0
    # A normal about 1 with deviation 0.25, cut off to [0.7, 1]: mean 1 - 0.25 (phi(0) - phi(1.2)) / (Phi(1.2) - 1/2).
    density = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    mean = 1 - 0.25 * (density(0) - density(1.2)) / (math.erf(1.2 / math.sqrt(2)) / 2)
    assert float(shares.mean()) == pytest.approx(mean, abs=0.01)  # ceil adds half of 1/256
