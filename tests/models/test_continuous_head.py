"""The diffusion head equals its formula in float64, and its loss and sampler equal what is known in closed form."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from danlu.diffusion.mixtures import GaussianMixture
from danlu.models.continuous import DiffusionHead
from reference.continuous import flow_token, head, two_point_floor


def shaken(**options):
    """A head whose weights are all random, the zeros too."""
    made = DiffusionHead(**{"token_dim": 3, "cond_dim": 5, "width": 8, "depth": 2} | options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


class Exact(DiffusionHead):
    """A head with the exact velocity of a mixture in place of its network."""

    def __init__(self, mixture):
        super().__init__(mixture.means.shape[1], 1, width=4, depth=1)
        self.mixture = mixture
        self.double()

    def _denoise(self, y, t, projected):
        flat = y.reshape(-1, y.shape[-1])
        return self.mixture.velocity(flat, t.reshape(-1).expand(len(flat)).double(), self.process).view(y.shape)


def test_the_head_is_its_formula():
    made = shaken()
    y, z = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.999, 1.0], dtype=torch.float64)
    expected = torch.stack([head(made.state_dict(), 2, *each) for each in zip(y, t.tolist(), z, strict=True)])
    assert torch.allclose(made(y, t, z), expected, atol=1e-12)


def test_a_fresh_head_predicts_zero():
    made = DiffusionHead(3, 5, 8, 2)
    assert not made(torch.randn(4, 3), torch.rand(4), torch.randn(4, 5)).any()


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_the_loss_of_a_fresh_head_is_the_size_of_its_target(objective):
    made = DiffusionHead(3, 5, 8, 2, objective).double()
    x, z = torch.randn(20000, 3, dtype=torch.float64), torch.randn(20000, 5, dtype=torch.float64)
    # E|eps - x|^2 is 1 + E|x|^2 for each dimension, E|eps|^2 is 1
    expected = 1 + float(x.square().mean()) if objective == "flow" else 1.0
    assert float(made.loss(x, z, mul=4).detach()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_the_loss_is_the_mean_error_over_all_draws(objective):
    made = shaken(objective=objective)
    x, z = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    measured = made.loss(x, z, mul=2, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    t = made.times(12, made.process, generator).tolist()
    noise = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    errors = []
    for draw in range(12):
        token, condition, eps = x.view(6, 3)[draw % 6], z.view(6, 5)[draw % 6], noise[draw]
        if objective == "flow":
            y, target = (1 - t[draw]) * token + t[draw] * eps, eps - token
        else:
            y = math.cos(math.pi * t[draw] / 2) * token + math.sin(math.pi * t[draw] / 2) * eps
            target = eps
        errors.append((head(made.state_dict(), 2, y, t[draw], condition) - target).square().mean())
    assert float(measured.detach()) == pytest.approx(float(torch.stack(errors).mean()), abs=1e-12)


def test_times_of_the_flow_are_logit_normal_and_those_of_epsilon_uniform():
    flow, epsilon = DiffusionHead(1, 1, 2, 1), DiffusionHead(1, 1, 2, 1, "epsilon")
    logits = torch.logit(flow.times(20000, flow.process, torch.Generator().manual_seed(0)))
    assert abs(float(logits.mean())) < 0.03 and float(logits.std()) == pytest.approx(1, abs=0.03)
    t = epsilon.times(20000, epsilon.process, torch.Generator().manual_seed(0))
    assert float(t.mean()) == pytest.approx(0.495, abs=1e-3) and 0.98 < float(t.max()) < 0.99


def test_more_draws_leave_the_expected_loss_as_it_is():
    made = shaken()
    x, z = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ones, eights = (
        torch.stack([made.loss(x, z, mul=mul, generator=generator) for _ in range(250)]).detach() for mul in (1, 8)
    )
    error = float((ones.var() / 250 + eights.var() / 250).sqrt())
    assert abs(float(ones.mean() - eights.mean())) < 3 * error
    assert float(eights.var()) < float(ones.var()) / 4


def test_the_floor_of_a_two_point_token_is_far_from_zero():
    mixture = GaussianMixture(torch.ones(2), torch.tensor([[1.0], [-1.0]]), torch.full((2,), 1e-9))
    made = Exact(mixture)
    made.times = lambda count, process, generator: torch.full((count,), 0.5, dtype=torch.float64)
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(20000, 1)
    assert two_point_floor(0.5) == pytest.approx(1.80, abs=0.01)
    assert float(made.loss(x, torch.zeros(40000, 1).double(), mul=1)) == pytest.approx(two_point_floor(0.5), rel=0.03)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_exact_velocity_samples_its_mixture(solver):
    mixture = GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.0]]), torch.tensor([0.01, 0.04]))
    drawn = Exact(mixture).sample(torch.zeros(4000, 1).double(), 100, solver, generator=2)[:, 0]
    assert float((drawn < 0).double().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(drawn[drawn < 0].mean()) == pytest.approx(-1, abs=0.02)
    assert float(drawn[drawn > 0].std()) == pytest.approx(0.2, abs=0.03)


def test_one_step_from_pure_noise_gives_the_conditional_mean_as_an_mse_head_would():
    mixture = GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.0]]), torch.tensor([0.01, 0.04]))
    drawn = Exact(mixture).sample(torch.zeros(9, 1).double(), steps=1)
    assert torch.allclose(drawn, torch.full_like(drawn, 0.4), atol=1e-9)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_guided_sampling_is_eulers_loop_with_one_noise_for_both(w):
    made = shaken()
    z, null = torch.randn(2, 3, 5, dtype=torch.float64)
    measured = made.sample(z, 4, "euler", 0.7, w, 5, null=null)
    noise = 0.7 * torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = [flow_token(made.state_dict(), 2, *each, 4) for each in
                zip(z, null, [w] * 3, noise, strict=True)]  # fmt: skip
    assert torch.allclose(measured, torch.stack(expected), atol=1e-12)
    if w == 1:
        assert torch.allclose(made.sample(z, 4, temperature=0.7, generator=5), measured, atol=1e-12)


def test_the_epsilon_objective_samples_with_any_solver():
    made = DiffusionHead(1, 1, 32, 2, "epsilon")
    optimiser = torch.optim.Adam(made.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        x = torch.randint(0, 2, (256, 1), generator=generator) * 2.0 - 1
        optimiser.zero_grad()
        made.loss(x, torch.zeros(256, 1), mul=1, generator=generator).backward()
        optimiser.step()
    for solver in ("ddim", "heun", "ancestral", "ipndm"):
        drawn = made.sample(torch.zeros(500, 1), 30, solver)
        assert float((drawn.abs() - 1).abs().median()) < 0.25, solver
        assert 0.35 < float((drawn > 0).float().mean()) < 0.65, solver


def test_a_mask_leaves_tokens_out_and_an_empty_one_gives_zero():
    made = shaken()
    x, z = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    masked = made.loss(x, z, mask, 2, torch.Generator().manual_seed(0))
    assert torch.equal(masked, made.loss(x[mask], z[mask], None, 2, torch.Generator().manual_seed(0)))
    masked.backward()
    assert z.grad[mask].abs().min() > 0 and not z.grad[~mask].any()
    empty = made.loss(x, z, torch.zeros_like(mask))
    assert empty.item() == 0
    empty.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters())


def test_low_precision_stays_out_of_losses_and_states():
    made = DiffusionHead(3, 5, 8, 2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1)
    x, z = torch.randn(64, 3), torch.randn(64, 5)
    plain = made.loss(x, z, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.loss(x, z, generator=torch.Generator().manual_seed(0)), plain)
        assert torch.equal(made.sample(z, 2), made.sample(z, 2))
    half = made.bfloat16()
    loss = half.loss(x.bfloat16(), z.bfloat16(), generator=torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain.item(), rel=0.05)
    assert half.sample(z.bfloat16(), 2).dtype == torch.float32


def test_tokens_far_from_unit_variance_are_warned_about_once(caplog):
    made = DiffusionHead(3, 5, 8, 1)
    with caplog.at_level(logging.WARNING, "danlu.models.continuous"):
        for _ in range(2):
            made.loss(10 * torch.randn(64, 3), torch.randn(64, 5))
        DiffusionHead(3, 5, 8, 1).loss(torch.randn(64, 3), torch.randn(64, 5))
    assert len(caplog.records) == 1 and "token_std" in caplog.text


def test_the_same_seed_gives_the_same_tokens_whatever_the_global_state():
    made, z = DiffusionHead(3, 5, 8, 1), torch.randn(4, 5)
    first = made.sample(z, 3, generator=1)
    torch.rand(3)
    assert torch.equal(first, made.sample(z, 3, generator=1))
    assert not torch.equal(first, made.sample(z, 3, generator=2))


def test_wrong_arguments_are_refused():
    made, z = DiffusionHead(3, 5, 8, 1), torch.randn(4, 5)
    with pytest.raises(ValueError, match="objective must be one of flow, epsilon, got 'v'"):
        DiffusionHead(3, 5, objective="v")
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        DiffusionHead(3, 5, depth=0)
    with pytest.raises(ValueError, match="guidance 2 needs null"):
        made.sample(z, guidance=2)
    with pytest.raises(ValueError, match="temperature and guidance must be at least 0"):
        made.sample(z, temperature=-1)
    with pytest.raises(ValueError, match="solver must be one of"):
        made.sample(z, solver="rk9")
    with pytest.raises(ValueError, match=r"z must be \(tokens, 5\)"):
        made.sample(z[:, :4])
    with pytest.raises(ValueError, match="same leading shape"):
        made.loss(torch.randn(3, 3), z)
    with pytest.raises(ValueError, match="mul must be at least 1"):
        made.loss(torch.randn(4, 3), z, mul=0)
    with pytest.raises(ValueError, match="mask must be bool"):
        made.loss(torch.randn(4, 3), z, torch.ones(4))
