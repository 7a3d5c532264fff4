"""The losses against hand computations, and what their gradients may reach."""

import pytest
import torch
from torch import Tensor, nn

from dd2.losses import csd_loss, fcs_loss, gts_loss, noised
from dd2.scores import ConditionalScore


class Known(ConditionalScore):
    """A posterior mean that is a function of x_t."""

    def __init__(self, function):
        self.function = function

    def x0_hat(self, x_t, t):
        return self.function(x_t)


def gaussian_x0_hat(mean: float, variance: float, t: Tensor):
    """Posterior mean of x_0 ~ N(mean, variance) under RectFlow: exact, with slope dx0_hat/dx_t."""
    level = t.unsqueeze(-1)
    slope = (1 - level) * variance / ((1 - level) ** 2 * variance + level**2)
    return slope, Known(lambda x_t: mean + slope * (x_t - (1 - level) * mean))


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(6, 4, 3, generator=g, dtype=torch.float32).requires_grad_()
    t = torch.rand(6, 4, generator=g) * 0.9 + 0.05
    eps = torch.randn(6, 4, 3, generator=g)
    return q, t, eps


@pytest.mark.parametrize("alpha", [1.0, 1.2, 0.5])
def test_sid_gradient_on_gaussians(case, alpha):
    q, t, eps = case
    (slope_a, teacher), (slope_b, guidance) = gaussian_x0_hat(1.0, 0.5, t), gaussian_x0_hat(-0.3, 2.0, t)
    csd_loss(q, t, eps, teacher, guidance, d="sid", alpha=alpha)[0].backward()
    with torch.no_grad():
        q_t = noised(q, t, eps)
        a, b = teacher.x0_hat(q_t, t), guidance.x0_hat(q_t, t)
        w = 1 / (q - a).abs().mean(-1, keepdim=True)
        da, db = slope_a * (1 - t.unsqueeze(-1)), slope_b * (1 - t.unsqueeze(-1))  # d/dq through q_t
        # w (a-b)((a-q) - alpha (a-b)), product rule, w constant
        by_hand = w * ((da - db) * ((a - q) - alpha * (a - b)) + (a - b) * ((da - 1) - alpha * (da - db)))
    torch.testing.assert_close(q.grad, by_hand / q.numel(), rtol=1e-4, atol=1e-7)


def test_dmd_gradient_is_the_weighted_score_difference(case):
    q, t, eps = case
    (_, teacher), (_, guidance) = gaussian_x0_hat(1.0, 0.5, t), gaussian_x0_hat(-0.3, 2.0, t)
    loss, difference = csd_loss(q, t, eps, teacher, guidance, d="dmd")
    loss.backward()
    with torch.no_grad():
        level, q_t = t.unsqueeze(-1), noised(q, t, eps)
        a, b = teacher.x0_hat(q_t, t), guidance.x0_hat(q_t, t)
        w = 1 / (q - a).abs().mean(-1, keepdim=True)
        scores = [((1 - level) * x - q_t) / level**2 for x in (b, a)]
        # s_guidance - s_teacher = (1 - t) / t^2 (b - a)
        by_hand = w * (scores[0] - scores[1]) * level**2 / (1 - level)
    torch.testing.assert_close(q.grad, by_hand / q.numel(), rtol=1e-3, atol=1e-6)
    assert loss.item() == pytest.approx(float((w * (a - b).square()).mean()) / 2, rel=1e-5)
    assert difference.item() == pytest.approx(float((a - b).square().mean().sqrt()), rel=1e-5)


def test_sid_expectation_vanishes_at_the_optimal_guidance():
    """At alpha = 1 and b = E[q | q_t] the loss is 0 in expectation, whatever the teacher (before weighting)."""
    g = torch.Generator().manual_seed(1)
    q = torch.randn(400_000, 1, generator=g)
    t, eps = torch.full((400_000,), 0.6), torch.randn(400_000, 1, generator=g)
    _, teacher = gaussian_x0_hat(0.7, 0.3, t)
    _, guidance = gaussian_x0_hat(0.0, 1.0, t)
    unweighted = csd_loss(q, t, eps, teacher, guidance, weight_floor=1e6)[0] * 1e6
    assert abs(unweighted.item()) < 5e-3


@pytest.mark.parametrize("d", ["sid", "dmd"])
def test_nothing_but_q_receives_a_gradient(case, d):
    q, t, eps = case
    networks = [nn.Linear(3, 3), nn.Linear(3, 3)]
    csd_loss(q, t, eps, Known(networks[0]), Known(networks[1]), d=d)[0].backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0
    assert all(p.grad is None for network in networks for p in network.parameters())


def test_sid_gradient_flows_through_both_networks(case):
    """Cutting either network's dependence on q_t changes the gradient: both paths are there."""
    q, t, eps = case
    _, teacher = gaussian_x0_hat(1.0, 0.5, t)
    _, guidance = gaussian_x0_hat(-0.3, 2.0, t)
    grads = []
    for a, b in (
        (teacher, guidance),
        (Known(lambda x: teacher.x0_hat(x.detach(), t)), guidance),
        (teacher, Known(lambda x: guidance.x0_hat(x.detach(), t))),
    ):
        (grad,) = torch.autograd.grad(csd_loss(q, t, eps, a, b, alpha=1.2)[0], q)
        grads.append(grad)
    assert not torch.allclose(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


def test_regression_losses_detach_their_targets():
    prediction, target, eps = (torch.randn(5, 3, requires_grad=True) for _ in range(3))
    gts_loss(prediction, target).backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction - target).detach() / 15)
    assert target.grad is None
    prediction.grad = None

    class Predicted(ConditionalScore):
        def x0_hat(self, x_t, t):
            raise NotImplementedError

        def velocity(self, x_t, t):
            torch.testing.assert_close(x_t, 0.7 * target.detach() + 0.3 * eps.detach())
            return prediction

    fcs_loss(Predicted(), target, torch.full((5,), 0.3), eps.detach()).backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction - (eps - target)).detach() / 15)
    assert target.grad is None


@pytest.mark.parametrize("d", ["sid", "dmd", "sim"])
def test_positions_where_the_score_does_not_hold_count_for_nothing(d):
    """The loss of a few valid positions is that of these alone, and q gets no gradient at the others, whatever stands there."""
    g = torch.Generator().manual_seed(0)
    q, eps = torch.randn(3, 4, 5, generator=g), torch.randn(2, 3, 4, 5, generator=g)
    t = torch.rand(2, 3, 4, generator=g) * 0.8 + 0.1
    valid = torch.rand(3, 4, generator=g) < 0.5
    results = []
    for chosen in (None, valid):
        a, b = Known(lambda x: 0.6 * x), Known(lambda x: torch.tanh(x))
        a.valid = b.valid = chosen
        leaf = (q if chosen is not None else q[valid].unsqueeze(0)).clone().requires_grad_()
        levels = t if chosen is not None else t[:, valid].unsqueeze(1)
        noise = eps if chosen is not None else eps[:, valid].unsqueeze(1)
        loss, difference = csd_loss(leaf.expand(noise.shape), levels, noise, a, b, d=d)
        loss.backward()
        results.append((loss.detach(), difference, leaf.grad))
    (loss, difference, alone), (masked, masked_difference, grad) = results
    torch.testing.assert_close(masked, loss)
    torch.testing.assert_close(masked_difference, difference)
    torch.testing.assert_close(grad[valid], alone[0])
    assert not grad[~valid].any()
    a.valid = valid
    guidance = fcs_loss(a, q, t, eps)
    torch.testing.assert_close(
        guidance, fcs_loss(Known(lambda x: 0.6 * x), q[valid].unsqueeze(0), t[:, valid].unsqueeze(1), eps[:, valid].unsqueeze(1))
    )


def test_unknown_distance():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="sid"):
        csd_loss(x, torch.full((1,), 0.5), x, Known(lambda y: y), Known(lambda y: y), d="kl")  # pyright: ignore[reportArgumentType]
