"""Eq. 1 against autograd of the log-density, in float64 and float32, and at its limits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dd2.distribution import CodeDistribution
from dd2.scores import CodeMixture, posterior_mean, score, velocity
from dd2.teachers.filtering import Sampling, filtered


def problem(seed: int, rows: int = 40, codes: int = 11, channels: int = 5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    codebook = torch.randn(codes, channels, generator=g, dtype=torch.float64) + 1.5
    log_p = (2 * torch.randn(rows, codes, generator=g, dtype=torch.float64)).log_softmax(-1)
    log_p[: rows // 2, : codes // 3] = -math.inf
    t = torch.rand(rows, generator=g, dtype=torch.float64) * 0.96 + 0.02
    x_0 = codebook[torch.randint(codes, (rows,), generator=g)]
    eps = torch.randn(rows, channels, generator=g, dtype=torch.float64)
    x_t = (1 - t[:, None]) * x_0 + t[:, None] * eps
    return x_t.to(dtype), t.to(dtype), log_p.to(dtype), codebook.to(dtype)


def log_density(x_t: Tensor, t: Tensor, log_p: Tensor, codebook: Tensor) -> Tensor:
    """Log sum_j p_j N(x_t; (1 - t) c_j, t^2 I), written out."""
    difference = x_t[:, None] - (1 - t[:, None, None]) * codebook
    return torch.logsumexp(log_p - difference.square().sum(-1) / (2 * t[:, None] ** 2), -1)


def autograd_score(x_t: Tensor, t: Tensor, log_p: Tensor, codebook: Tensor) -> Tensor:
    x = x_t.double().clone().requires_grad_()
    return torch.autograd.grad(log_density(x, t.double(), log_p.double(), codebook.double()).sum(), x)[0]


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("seed", range(5))
def test_score_is_the_gradient_of_the_log_density(seed):
    assert relative_error(score(*problem(seed)), autograd_score(*problem(seed))) < 1e-9
    single = problem(seed, dtype=torch.float32)
    assert score(*single).dtype == torch.float32
    assert relative_error(score(*single), autograd_score(*single)) < 1e-4


def test_posterior_mean_and_velocity_agree_with_the_score():
    x_t, t, log_p, codebook = problem(1)
    s, level = autograd_score(x_t, t, log_p, codebook), t[:, None]
    x0_hat = (x_t + level**2 * s) / (1 - level)  # Tweedie
    assert relative_error(posterior_mean(x_t, t, log_p, codebook), x0_hat) < 1e-9
    assert relative_error(velocity(x_t, t, log_p, codebook), -(level * s + x_t) / (1 - level)) < 1e-9


def test_gradient_in_x_t():
    x_t, t, log_p, codebook = problem(2, rows=6)
    x_t.requires_grad_()
    for function in (posterior_mean, velocity, score):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, t, log_p, codebook), (x_t,), rtol=1e-5)


@pytest.mark.parametrize("max_elements", [1, 12, 100, 10**9])
def test_chunks_change_nothing(max_elements):
    x_t, t, log_p, codebook = problem(3)
    whole, parted = x_t.clone().requires_grad_(), x_t.clone().requires_grad_()
    a = posterior_mean(whole, t, log_p, codebook)
    b = posterior_mean(parted, t, log_p, codebook, max_elements=max_elements)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(whole.grad, parted.grad)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made; views of given ones are none of them."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.numel = max(self.numel, tensor.numel())
        return found


@pytest.mark.parametrize("kept", [None, 3])
def test_memory_is_bounded_by_max_elements(kept):
    x_t, t, log_p, codebook = problem(4, rows=100, codes=1000)
    prior = CodeDistribution.over_all(log_p) if kept is None else filtered(log_p, Sampling(top_k=kept))
    x_t.requires_grad_()
    with Largest(prior.log_p) as largest:
        posterior_mean(x_t, t, prior, codebook, max_elements=7500).sum().backward()
    assert largest.numel <= 7500  # the 100,000 weights of all rows at once are never there


@pytest.mark.parametrize("kept", [1, 2, 40, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_kept_codes_alone_give_the_same_as_all_of_them(kept, top_p):
    """Rows that keep fewer codes than others are padded; t reaches far below where training goes."""
    x_t, t, log_p, codebook = problem(11, rows=60, codes=200)
    prior = filtered(3 * log_p, Sampling(top_k=kept, top_p=top_p))
    assert prior.ids is not None
    assert prior.ids.shape[-1] <= kept
    for level in (t, t.clamp_max(0.01), torch.full_like(t, 1e-9)):
        found = []
        for distribution in (prior, prior.dense().double()):
            x = x_t.clone().requires_grad_()
            mean = posterior_mean(x, level, distribution, codebook, max_elements=3000)
            (grad,) = torch.autograd.grad((mean * x_t.roll(1, 0)).sum(), x)
            found += [mean, grad]
        assert relative_error(found[0].detach(), found[2].detach()) < 1e-6  # log_p itself is float32
        assert (found[1] - found[3]).norm() <= 1e-5 * found[3].norm()  # both are exactly 0 where one code is all


def test_kept_codes_in_float32_against_float64():
    for seed, level in itertools.product(range(5), (0.01, 0.1, 0.5, 0.98)):
        x_t, _, log_p, codebook = problem(seed, rows=50, codes=300)
        prior = filtered(4 * log_p, Sampling(top_k=30))
        t = torch.full((50,), level, dtype=torch.float64)
        x_0 = codebook[prior.draw(torch.rand(50, generator=torch.Generator().manual_seed(seed)))]
        x_t = (1 - level) * x_0 + level * (x_t - x_t.mean())
        exact = posterior_mean(x_t, t, prior, codebook)
        found = posterior_mean(x_t.float(), t.float(), prior, codebook.float())
        assert relative_error(found.double(), exact) < 1e-5


@pytest.mark.parametrize("max_elements", [None, 3000])
@pytest.mark.parametrize("kept", [0, 30])
def test_gradients_in_float32_where_one_code_is_all(kept, max_elements):
    """On data at small t the posterior is one code and the gradient nearly 0: no rounding may be blown up by 1 / t^2."""
    x_t, _, log_p, codebook = problem(3, rows=50, codes=300, channels=32)
    prior = filtered(4 * log_p, Sampling(top_k=kept))
    x_0 = codebook[prior.draw(torch.rand(50, generator=torch.Generator().manual_seed(0)))]
    grad = torch.randn(50, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for level in (0.01, 0.02, 0.05, 0.2):
        t = torch.full((50,), level, dtype=torch.float64)
        found = []
        for dtype in (torch.float32, torch.float64):
            x = ((1 - level) * x_0 + level * (x_t - x_t.mean())).to(dtype).requires_grad_()
            mean = posterior_mean(x, t.to(dtype), prior, codebook.to(dtype), max_elements=max_elements)
            found += torch.autograd.grad(mean, x, grad.to(dtype))
        assert (found[0].double() - found[1]).abs().max() < 1e-4 * (1 + found[1].abs().max())


def test_a_codebook_far_from_zero_and_few_or_no_positions():
    x_t, t, log_p, codebook = problem(5, rows=6, codes=200)
    shift = torch.full((1, codebook.shape[1]), 100.0)
    moved = x_t.float() + (1 - t.float()).unsqueeze(1) * shift
    near = posterior_mean(moved, t.float(), log_p.float(), codebook.float() + shift) - shift
    assert (near.double() - posterior_mean(x_t, t, log_p, codebook)).abs().max() < 1e-3  # float32 holds 1e-5 of 100
    prior = filtered(log_p[:0].view(0, 3, 200), Sampling(top_k=3))
    assert CodeMixture(prior, codebook).x0_hat(torch.zeros(2, 0, 3, 5), torch.ones(2, 0, 3) / 2).shape == (2, 0, 3, 5)
    one = posterior_mean(x_t[:1].expand(500, -1), t[:1].expand(500), log_p[1], codebook, max_elements=1000)
    torch.testing.assert_close(one, one[:1].expand(500, -1))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    t=st.floats(1e-12, 1 - 1e-7),
    scale=st.floats(1e-3, 1e3),
    only_one=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_finite_everywhere(t, scale, only_one, seed):
    x_t, _, log_p, codebook = problem(seed, rows=8, dtype=torch.float32)
    if only_one:
        log_p = torch.full_like(log_p, -math.inf)
        log_p[:, seed % log_p.shape[1]] = -5.0
    level = torch.full((8,), t, dtype=torch.float32).clamp(1e-12, 1 - 1e-7)
    x = (x_t * scale).requires_grad_()
    mean = posterior_mean(x, level, log_p, codebook * scale)
    mean.sum().backward()
    assert torch.isfinite(mean).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(velocity(x, level, log_p, codebook * scale)).all()
    assert torch.isfinite(score(x, level, log_p, codebook * scale)).all()
    if only_one:
        the_code = (codebook * scale)[seed % log_p.shape[1]].expand_as(mean)
        torch.testing.assert_close(mean, the_code, rtol=1e-5, atol=1e-6 * scale)


def test_any_leading_shape_and_low_precision():
    x_t, t, log_p, codebook = problem(5, rows=24)
    flat = posterior_mean(x_t, t, log_p, codebook)
    shaped = posterior_mean(x_t.view(2, 3, 4, -1), t.view(2, 3, 4), log_p.view(2, 3, 4, -1), codebook)
    torch.testing.assert_close(shaped.flatten(0, 2), flat)
    assert posterior_mean(x_t.bfloat16(), t.bfloat16(), log_p, codebook).dtype == torch.float32
    assert posterior_mean(x_t[:0], t[:0], log_p[:0], codebook).shape == (0, 5)


def test_gradient_under_autocast_is_that_without():
    """The backward runs inside the caller's autocast; half precision divided by t^2 would be garbage."""
    grads = []
    for enabled in (False, True):
        x_t, t, log_p, codebook = problem(7, codes=200, dtype=torch.float32)
        x_t.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = posterior_mean(x_t, t, log_p, codebook).square().sum()
            grads += torch.autograd.grad(loss, x_t)
    assert torch.equal(grads[0], grads[1])


def test_bad_input_is_refused():
    x_t, t, log_p, codebook = problem(6)
    all_cut = log_p.clone()
    all_cut[3] = -math.inf
    with_nan = log_p.clone()
    with_nan[3, 2] = math.nan
    cases = [
        ((x_t[:, :4], t, log_p, codebook), "codebook's C"),
        ((x_t, t[:-1], log_p, codebook), "t must have"),
        ((x_t, t, log_p[:, :-1], codebook), "log_p must be"),
        ((x_t, t, log_p, codebook[0]), "codebook must be"),
        ((x_t, torch.zeros_like(t), log_p, codebook), "open interval"),
        ((x_t, torch.ones_like(t), log_p, codebook), "open interval"),
        ((x_t, t * math.nan, log_p, codebook), "open interval"),
        ((x_t, t, all_cut, codebook), "all -inf"),
        ((x_t, t, with_nan, codebook), "NaN"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            posterior_mean(*arguments)
    with pytest.raises(ValueError, match="max_elements"):
        posterior_mean(x_t, t, log_p, codebook, max_elements=0)
