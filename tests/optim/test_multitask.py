"""Combined gradients against a dense Jacobian in float64."""

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor, nn

from danlu.optim.gradient_solvers import solve_min_norm, solve_mixed, solve_primary
from danlu.optim.multitask import MultiTaskBackward
from danlu.optim.task_gradients import inner_products
from reference.tiny import tiny_llama


class Shared(nn.Module):
    """A trunk and a head per task, all in float64; task k of n conflicts with the others."""

    def __init__(self, tasks: int = 3, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(tasks))
        self.to(dtype)

    def losses(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features = self.trunk(x)
        targets = [x.sum(1, keepdim=True) * (-1) ** k + k for k in range(len(self.heads))]
        pairs = zip(self.heads, targets, strict=True)
        return [(head(features) - target).square().mean() for head, target in pairs], features


def batch(rows: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flat(tensors) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(tensor.reshape(-1).double() for tensor in tensors)])


def jacobian(losses: list[Tensor], params: list[nn.Parameter]) -> Tensor:
    """(tasks, p), by one plain gradient per task."""
    made = []
    for loss in losses:
        found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        made.append(flat(torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)))
    return torch.stack(made)


def gradient(params) -> Tensor:
    return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in params)


@pytest.fixture
def model() -> Shared:
    return Shared()


def expected_step(method: str, M: Tensor, losses: Tensor) -> Tensor:
    G = M @ M.T
    weights = {
        "primary_auxiliary": lambda: torch.cat((torch.ones(1), solve_primary(G[1:, 1:], G[1:, 0]))),
        "min_norm": lambda: solve_min_norm(G),
        "mixed": lambda: solve_mixed(G, 2),
        "grad_norm": lambda: 1 / M.norm(dim=1),
        "geo_mean": lambda: 1 / losses,
        "sum": lambda: torch.ones(len(M)),
    }[method]()
    return weights.double() @ M


@pytest.mark.parametrize("gradients", ["kept", "layerwise"])
@pytest.mark.parametrize("method", ["primary_auxiliary", "min_norm", "mixed", "grad_norm", "geo_mean", "sum"])
def test_gradient_is_the_weighted_sum_and_heads_get_the_plain_one(model, method, gradients):
    losses, _ = model.losses(batch())
    shared, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    M, plain = jacobian(losses, shared), jacobian(losses, heads).sum(0)
    mt = MultiTaskBackward(shared, method, heads=heads, gradients=gradients)
    main, aux = (losses[:2], losses[2:]) if method == "mixed" else (losses[0], losses[1:])
    result = mt.backward(main, aux)
    expected = expected_step(method, M, torch.stack(losses).detach())
    torch.testing.assert_close(gradient(shared), expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(gradient(heads), plain, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(result.weights.double() @ M, expected, atol=1e-12, rtol=1e-10)
    if result.gram is not None:
        torch.testing.assert_close(result.gram, M @ M.T, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(result.progress, M @ expected, atol=1e-12, rtol=1e-10)
        cosines = (M @ M.T) / (M.norm(dim=1) * M.norm(dim=1)[:, None])
        torch.testing.assert_close(result.cosines, cosines)
        assert (result.conflicts == (cosines < 0)).all() and result.conflicts.any()


def test_float32_gradient_equals_that_of_the_re_weighted_loss():
    model = Shared(dtype=torch.float32)
    losses, _ = model.losses(batch(dtype=torch.float32))
    params = list(model.parameters())
    result = MultiTaskBackward(params).backward({"main": losses[0], "second": losses[1], "third": losses[2]})
    assert result.names == ("main", "second", "third")
    total = sum(
        weight.float() * loss for weight, loss in zip(result.weights, model.losses(batch().float())[0], strict=True)
    )
    expected = flat(torch.autograd.grad(total, params))
    torch.testing.assert_close(gradient(params), expected, atol=1e-6, rtol=1e-6)


def test_tasks_conflict_in_the_fixture_and_auxiliary_losses_do_not_rise(model):
    losses, _ = model.losses(batch())
    params = list(model.parameters())
    M = jacobian(losses, params)
    assert (M[1:] @ M[0] < 0).any()
    MultiTaskBackward(params).backward(losses[0], losses[1:])
    step = gradient(params)
    assert (M[1:] @ step >= -1e-10 * M.norm(dim=1)[1:] * M[0].norm()).all()
    assert M[0] @ step == pytest.approx(float(step @ step))


def test_a_gradient_that_is_there_is_added_to(model):
    losses, _ = model.losses(batch())
    params = list(model.parameters())
    mt = MultiTaskBackward(params)
    mt.backward(losses[0], losses[1:])
    once = gradient(params)
    for gradients in ("kept", "layerwise"):
        losses, _ = model.losses(batch())
        MultiTaskBackward(params, gradients=gradients).backward(losses[0], losses[1:])
    torch.testing.assert_close(gradient(params), 3 * once)


@pytest.mark.parametrize("gradients", ["kept", "layerwise"])
def test_unused_frozen_and_tied_parameters(gradients):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.only_main, self.only_aux = (nn.Linear(4, 4).double() for _ in range(3))
            self.frozen, self.unused = nn.Linear(4, 4).double().requires_grad_(False), nn.Linear(4, 4).double()

        def losses(self, x):
            x = self.first(torch.tanh(self.first(x)))
            main = self.only_main(self.frozen(x)).square().mean()
            return [main, (self.only_aux(x) - 1).square().mean() - main.detach(), -0.5 * self.first(x).square().mean()]

    model, x = Tied(), torch.randn(6, 4, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    M = jacobian(model.losses(x), trained)
    MultiTaskBackward(model.parameters(), gradients=gradients).backward(*[(a, b) for a, *b in [model.losses(x)]][0])
    torch.testing.assert_close(gradient(trained), expected_step("primary_auxiliary", M, None), atol=1e-12, rtol=1e-10)
    assert all(p.grad is None for p in model.frozen.parameters())
    assert model.unused.weight.grad is None or not model.unused.weight.grad.any()


def test_no_auxiliary_task_falls_back_to_the_main_gradient(model):
    losses, _ = model.losses(batch())
    params = list(model.parameters())
    expected = jacobian(losses[:1], params)[0]
    result = MultiTaskBackward(params).backward(losses[0])
    assert result.weights.tolist() == [1] and result.gram is None
    torch.testing.assert_close(gradient(params), expected)


def test_normalised_min_norm_is_that_of_unit_gradients(model):
    losses, _ = model.losses(batch())
    losses[1] = 1000 * losses[1]
    params = list(model.parameters())
    M = jacobian(losses, params)
    unit = M / M.norm(dim=1, keepdim=True)
    MultiTaskBackward(params, "min_norm", normalize=True).backward(losses)
    torch.testing.assert_close(gradient(params), solve_min_norm(unit @ unit.T) @ unit, atol=1e-10, rtol=1e-8)


def test_normalised_primary_keeps_its_direction(model):
    steps = []
    params = list(model.parameters())
    for normalize in (False, True):
        model.zero_grad()
        losses, _ = model.losses(batch())
        mt = MultiTaskBackward(params, normalize=normalize, drift=0.5, reference={"aux_0": 0.1, "aux_1": 5.0})
        mt.backward(losses[0], losses[1:])
        steps.append(gradient(params))
    torch.testing.assert_close(steps[1] / steps[1].norm(), steps[0] / steps[0].norm(), atol=1e-10, rtol=1e-8)


def test_invariance_of_grad_norm_to_scales_and_offsets(model):
    params, steps = list(model.parameters()), []
    for scale, offset in ((1.0, 0.0), (100.0, 3.0)):
        model.zero_grad()
        losses, _ = model.losses(batch())
        MultiTaskBackward(params, "grad_norm").backward([losses[0], scale * losses[1] + offset, losses[2]])
        steps.append(gradient(params))
    torch.testing.assert_close(*steps)


def adam_step(optimizer, params) -> Tensor:
    before = flat(p.detach().clone() for p in params)
    optimizer.step()
    return before - flat(p.detach() for p in params)


@pytest.mark.parametrize("gradients", ["kept", "layerwise"])
def test_the_metric_of_adam_makes_the_preconditioned_step_safe(model, gradients):
    params = list(model.parameters())
    groups = [{"params": params[:3], "lr": 1e-3}, {"params": params[3:], "lr": 3e-3}]
    adam = torch.optim.Adam(groups, betas=(0.0, 0.9))
    for seed in range(5):
        sum(model.losses(batch(seed=seed))[0]).backward()
        adam.step()
        adam.zero_grad()
    D = flat(
        (lr / 3e-3) / ((adam.state[p]["exp_avg_sq"] / (1 - 0.9**5)).sqrt() + 1e-8)
        for p, lr in zip(params, [1e-3] * 3 + [3e-3] * (len(params) - 3), strict=True)
    )
    losses, _ = model.losses(batch())
    M = jacobian(losses, params)
    MultiTaskBackward(params, metric=adam, gradients=gradients).backward(losses[0], losses[1:])
    step = gradient(params)
    assert (M[1:] @ M[0] < 0).any()
    progress, size = M[1:] @ (D * step), (M * D.sqrt()).norm(dim=1)
    assert (progress >= -1e-10 * size[1:] * size[0]).all()
    assert (progress.abs() < 1e-10 * size[1:] * size[0]).any()  # one binds
    model.zero_grad()
    losses, _ = model.losses(batch())
    MultiTaskBackward(params, metric={p: torch.full_like(p, 2.0) for p in params}).backward(losses[0], losses[1:])
    torch.testing.assert_close(gradient(params), expected_step("primary_auxiliary", M, None))


def test_constrained_step_keeps_the_actual_step_safe_where_momentum_breaks_it(model):
    params = list(model.parameters())
    broken = 0
    for seed in range(4):
        for constrained in (False, True):
            torch.manual_seed(seed)
            model = Shared()
            params = list(model.parameters())
            adam = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
            mt = MultiTaskBackward(params)
            for step_seed in range(8):
                losses, _ = model.losses(batch(seed=step_seed))
                M = jacobian(losses, params)
                adam.zero_grad()
                mt.backward(losses[0], losses[1:], keep=True)
                before = flat(p.detach().clone() for p in params)
                if constrained:
                    multipliers = mt.constrained_step(adam)
                    assert len(multipliers) == 2 and (multipliers >= 0).all()
                else:
                    adam.step()
                step = before - flat(p.detach() for p in params)
                worst = (M[1:] @ step / (M[1:].norm(dim=1) * step.norm())).min()
                if constrained:
                    assert worst >= -1e-9
                else:
                    broken += bool(worst < -1e-3)
    assert broken > 3
    with pytest.raises(ValueError, match=r"call backward\(\.\.\., keep=True\) before it"):
        mt.constrained_step(adam)


def test_drift_control_asks_for_a_fall_in_proportion_to_the_excess_and_never_for_more_than_a_full_step():
    theta = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    for rate, reference, expected in ((0.5, 1.25, 0.5 * 0.75), (1e6, 1.25, 2.0 * 2**0.5), (0.5, 3.0, 0.0)):
        theta.grad = None
        main, aux = -2 * theta.sum() / 2**0.5, theta.sum()  # lengths 2 and sqrt(2), opposite
        mt = MultiTaskBackward([theta], drift=rate, reference={"aux_0": reference})
        result = mt.backward(main, [aux])
        assert result.target.item() == pytest.approx(expected)
        assert result.progress[1].item() == pytest.approx(expected, abs=1e-12)
        assert (torch.ones(2, dtype=torch.float64) @ theta.grad).item() == pytest.approx(expected, abs=1e-12)


def test_drift_control_holds_to_the_lowest_loss_seen_and_its_state_is_saved():
    theta = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    mt = MultiTaskBackward([theta], drift=0.1)
    for shift, target in ((0.0, 0.0), (0.5, 0.05), (0.2, 0.02), (-1.0, 0.0), (0.0, 0.1)):
        result = mt.backward(-theta.sum(), {"keep": theta.square().sum() + shift})
        assert result.target.item() == pytest.approx(target)
    again = MultiTaskBackward([theta], drift=0.1)
    again.load_state_dict(mt.state_dict())
    assert again.backward(-theta.sum(), {"keep": theta.square().sum()}).target.item() == pytest.approx(0.1)


def test_features_solve_on_the_shared_output_and_pass_the_trunk_once(model):
    shared, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    losses, features = model.losses(batch())
    Z = torch.stack([torch.autograd.grad(loss, features, retain_graph=True)[0].reshape(-1) for loss in losses])
    M, plain = jacobian(losses, shared), jacobian(losses, heads).sum(0)
    calls = []
    model.trunk[0].register_full_backward_hook(lambda *_: calls.append(1))
    losses, features = model.losses(batch())
    mt = MultiTaskBackward(shared, "min_norm", heads=heads, via="features")
    result = mt.backward(losses, features=features)
    torch.testing.assert_close(result.weights, solve_min_norm(Z @ Z.T))
    torch.testing.assert_close(gradient(shared), solve_min_norm(Z @ Z.T) @ M)
    torch.testing.assert_close(gradient(heads), plain)
    assert len(calls) == 1


def test_refresh_uses_weights_again(model):
    params = list(model.parameters())
    mt = MultiTaskBackward(params, "min_norm", refresh=3)
    seen = []
    for seed in range(5):
        losses, _ = model.losses(batch(seed=seed))
        M = jacobian(losses, params)
        model.zero_grad()
        seen.append(mt.backward(losses))
        torch.testing.assert_close(gradient(params), seen[-1].weights @ M)
    assert [result.gram is not None for result in seen] == [True, False, False, True, False]
    assert (seen[0].weights == seen[2].weights).all() and (seen[2].weights != seen[3].weights).any()


@pytest.mark.parametrize("method", ["primary_auxiliary", "min_norm", "grad_norm", "geo_mean", "sum"])
def test_a_window_of_accumulation_combines_the_summed_gradients(model, method):
    params = list(model.parameters())
    whole, _ = model.losses(batch(12))
    M = jacobian(whole, params)
    mt = MultiTaskBackward(params, method)
    for part in range(3):
        losses, _ = model.losses(batch(12)[4 * part : 4 * part + 4])
        result = mt.backward(losses[0] / 3, [loss / 3 for loss in losses[1:]], last=part == 2)
        assert (result is None) == (part < 2)
    torch.testing.assert_close(
        gradient(params), expected_step(method, M, torch.stack(whole).detach()), atol=1e-12, rtol=1e-10
    )
    torch.testing.assert_close(result.losses, torch.stack(whole).detach())


def test_layerwise_gradients_freeze_the_weights_of_a_window(model):
    params = list(model.parameters())
    mt = MultiTaskBackward(params, gradients="layerwise")
    results = []
    for part in range(4):
        losses, _ = model.losses(batch(seed=part))
        results.append(mt.backward(losses[0], losses[1:], last=part % 2 == 1))
    assert [result.gram is not None for result in results] == [True, False, True, False]


@pytest.mark.parametrize("gradients", ["kept", "layerwise"])
@pytest.mark.parametrize("method", ["primary_auxiliary", "grad_norm"])
def test_a_gradient_scaler_changes_nothing_but_the_scale(model, gradients, method):
    params = list(model.parameters())
    losses, _ = model.losses(batch())
    M = jacobian(losses, params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(params, lr=1.0)
    mt = MultiTaskBackward(params, method, gradients=gradients)
    result = mt.backward(losses[0], losses[1:], scaler=scaler)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(gradient(params), expected_step(method, M, None), atol=1e-12, rtol=1e-8)
    torch.testing.assert_close(result.gram, M @ M.T, atol=1e-12, rtol=1e-8)


def test_an_overflow_under_a_scaler_skips_the_step():
    theta = nn.Parameter(torch.tensor([1.0, 1.0]))
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**100), torch.optim.SGD([theta], lr=1.0)
    losses = [theta.sum() * 1e20, -theta[0] * 1e20, theta[1] * 1.0]
    MultiTaskBackward([theta]).backward(losses[0], losses[1:], scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert theta.tolist() == [1, 1] and scaler.get_scale() < 2.0**100


def test_autocast_does_not_round_inner_products():
    rows = torch.randn(3, 1000)
    expected = inner_products(rows)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(inner_products(rows), expected, atol=0, rtol=0)


def test_bfloat16_parameters_are_combined_in_float32():
    model = Shared(2, torch.bfloat16)
    params = list(model.parameters())
    losses, _ = model.losses(batch(dtype=torch.bfloat16))
    M = jacobian(losses, params)
    result = MultiTaskBackward(params).backward(losses[0], losses[1:])
    torch.testing.assert_close(result.gram, M @ M.T, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient(params), result.weights @ M, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layerwise_equals_kept_on_a_host_model(implementation):
    steps = []
    for gradients in ("kept", "layerwise"):
        model = tiny_llama(attn_implementation=implementation).double().train()
        ids = torch.randint(0, 257, (3, 10), generator=torch.Generator().manual_seed(0))
        logits = model(input_ids=ids).logits
        losses = {
            name: nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten())
            for name, target in (("next", ids[:, 1:]), ("same", ids[:, :-1]), ("zero", 0 * ids[:, 1:]))
        }
        result = MultiTaskBackward(model.parameters(), gradients=gradients).backward(losses)
        assert result.conflicts.any()
        steps.append(gradient(model.parameters()))
    assert (steps[1] - steps[0]).norm() < 1e-6 * steps[0].norm()  # the host normalises in float32


def test_layerwise_holds_no_gradient_beyond_its_layer():
    """The batched gradients are freed one by one: what is left are zeros without storage."""
    model = Shared(3)
    losses, _ = model.losses(batch())
    from danlu.optim import task_gradients

    alive, sizes = [], []

    def spy(matrix, scale=None, original=task_gradients.inner_products):
        import weakref

        alive.append(weakref.ref(matrix))
        sizes.append(sum(1 for ref in alive if ref() is not None))
        return original(matrix, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_gradients, "inner_products", spy)
        MultiTaskBackward(model.parameters(), gradients="layerwise").backward(losses[0], losses[1:])
    assert len(sizes) == len(list(model.parameters())) and max(sizes) == 1


def test_hooks_that_use_up_gradients_see_the_last_pass_of_layerwise(model):
    from danlu.optim.backward import GradientConsumer

    losses, _ = model.losses(batch())
    params = list(model.parameters())
    expected = expected_step("primary_auxiliary", jacobian(losses, params), None)
    seen = {}
    consumer = GradientConsumer(params, lambda parameter, grad: seen.__setitem__(id(parameter), grad))
    MultiTaskBackward(params, gradients="layerwise").backward(losses[0], losses[1:])
    consumer.remove()
    torch.testing.assert_close(flat(seen[id(p)] for p in params), expected, atol=1e-12, rtol=1e-10)
    assert all(p.grad is None for p in params)


# TorchJD


@pytest.mark.parametrize("name", ["PCD", "IMTLG", "MGDA", "AlignedMTL", "Mean", "ConFIG"])
@pytest.mark.parametrize("gradients", ["kept", "layerwise"])
def test_aggregators_of_torchjd_give_what_torchjd_gives(model, name, gradients):
    aggregation = pytest.importorskip("torchjd.aggregation")
    losses, _ = model.losses(batch())
    params = list(model.parameters())
    expected = getattr(aggregation, name)()(jacobian(losses, params))
    method = name if gradients == "kept" else getattr(aggregation, name)()
    whole = name in ("ConFIG", "Mean")
    if whole and gradients == "layerwise":
        with pytest.raises(ValueError, match="needs whole gradients"):
            MultiTaskBackward(params, method, gradients=gradients)
        return
    result = MultiTaskBackward(params, method, gradients=gradients).backward(losses)
    torch.testing.assert_close(gradient(params), expected, atol=1e-7, rtol=1e-5)
    assert (result.weights is None) == whole


def test_torchjd_without_its_package_names_the_extra(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r"pip install 'danlu\[multitask\]'"):
        MultiTaskBackward(model.parameters(), "UPGrad")


def test_primary_equals_pcd_without_demand_up_to_its_length():
    aggregation = pytest.importorskip("torchjd.aggregation")
    generator = torch.Generator().manual_seed(0)
    for tasks in (2, 3, 5, 8):
        M = torch.randn(tasks, 12, generator=generator, dtype=torch.float64)
        M[0] -= M[1:].sum(0)
        G = M @ M.T
        step = M[0] + solve_primary(G[1:, 1:], G[1:, 0]) @ M[1:]
        peer = aggregation.PCD(tau=0.0)(M)
        torch.testing.assert_close(peer, step * M[0].norm() / step.norm(), atol=1e-6, rtol=1e-5)


def test_primary_equals_dual_projection_and_upgrad_is_its_mean():
    aggregation = pytest.importorskip("torchjd.aggregation")
    from torchjd.linalg import DualConeProjector

    class ByEnumeration(DualConeProjector):  # the peer's own solver is an extra that need not be installed
        def __call__(self, U, G):
            return torch.stack([self.one(u, G) for u in U]) if U.ndim == 2 else self.one(U, G)

        def one(self, u, G):
            """Minimise v^T G v over v >= u."""
            best = None
            for free in itertools.product((False, True), repeat=len(u)):
                v, free = u.clone(), torch.tensor(free)
                if free.any():
                    v[free] = torch.linalg.solve(G[free][:, free], -G[free][:, ~free] @ u[~free])
                if (v >= u - 1e-12).all() and (best is None or v @ G @ v < best @ G @ best):
                    best = v
            return best

    generator = torch.Generator().manual_seed(0)
    for tasks in (2, 4, 6):
        M = torch.randn(tasks, 10, generator=generator, dtype=torch.float64)
        G = M @ M.T

        def projected(row, M=M, G=G):  # on the cone of all tasks, as the peer does
            return M[row] + solve_primary(G, G[row]) @ M

        step = M[0] + solve_primary(G[1:, 1:], G[1:, 0]) @ M[1:]
        torch.testing.assert_close(projected(0), step, atol=1e-9, rtol=1e-9)
        preference = torch.zeros(tasks, dtype=torch.float64)
        preference[0] = 1
        peer = aggregation.DualProj(preference, projector=ByEnumeration())(M)
        torch.testing.assert_close(peer, step, atol=1e-9, rtol=1e-9)
        mean = aggregation.UPGrad(projector=ByEnumeration())(M)
        torch.testing.assert_close(mean, sum(projected(row) for row in range(tasks)) / tasks, atol=1e-9, rtol=1e-9)


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "primary"}, "method must be one of primary_auxiliary, min_norm.*got 'primary'"),
        ({"method": "UpGrad"}, r"method must be an aggregator of TorchJD \(.*UPGrad.*got 'UpGrad'"),
        ({"via": "heads"}, "via must be 'losses' or 'features', got 'heads'"),
        ({"gradients": "all"}, "gradients must be 'kept' or 'layerwise', got 'all'"),
        ({"refresh": 0}, "refresh must be at least 1, got 0"),
        ({"drift": -1.0}, "drift must be a finite rate of at least 0, got -1"),
        ({"drift": 1.0, "method": "min_norm"}, "drift is for method 'primary_auxiliary', got method 'min_norm'"),
        ({"via": "features", "gradients": "layerwise"}, "never sees gradients of parameters"),
        ({"method": "grad_norm", "normalize": True}, "normalize is for methods that solve for weights"),
    ],
)
def test_bad_options_are_named(model, options, message):
    if options.get("method", "x")[0].isupper():
        pytest.importorskip("torchjd")
    with pytest.raises(ValueError, match=message):
        MultiTaskBackward(model.parameters(), **options)


def test_bad_parameters_are_named(model):
    with pytest.raises(ValueError, match="params must hold at least one parameter that requires gradients"):
        MultiTaskBackward(model.requires_grad_(False).parameters())
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="heads must have no parameter in common"):
        MultiTaskBackward(model.parameters(), heads=model.heads.parameters())
    with pytest.raises(TypeError, match="params must hold parameters, got str"):
        MultiTaskBackward(dict(model.named_parameters()))
    with pytest.raises(TypeError, match="method must be a name or an aggregator of TorchJD, got Linear"):
        pytest.importorskip("torchjd")
        MultiTaskBackward(model.parameters(), nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"metric must have shape \(7, 5\), got \(7,\)"):
        MultiTaskBackward(model.parameters(), metric={model.trunk[0].weight: torch.ones(7)})


def test_bad_losses_name_the_task(model):
    mt = MultiTaskBackward(model.parameters())
    (a, b, _), features = model.losses(batch())
    cases = [
        ((a, {"vector": features}), ValueError, r"loss of task 'vector' must be a scalar, got shape \(8, 6\)"),
        ((a, {"lost": b.detach()}), ValueError, "loss of task 'lost' has no gradient"),
        ((a, {"broken": b * torch.nan}), ValueError, "loss of task 'broken' must be finite, got nan"),
        ((a, {"huge": b * torch.inf}), ValueError, "loss of task 'huge' must be finite, got inf"),
        ((a, {"number": 1.0}), TypeError, "loss of task 'number' must be a tensor, got float"),
        ((a, {"main": b}), ValueError, "tasks must have different names, got 'main' twice"),
        (({}, [a]), ValueError, "main must hold at least one loss, got none"),
        (([a, b], [a]), ValueError, "main must be one loss for method 'primary_auxiliary', got 2; use method='mixed'"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            mt.backward(*arguments)
    with pytest.raises(ValueError, match="loss of task 'task_0' must be positive for method 'geo_mean', got -"):
        MultiTaskBackward(model.parameters(), "geo_mean").backward([-a, b])
    with pytest.raises(ValueError, match="features must be given with via='features', and only then"):
        mt.backward(a, [b], features=features)
    with pytest.raises(ValueError, match="features must be tensors with gradients"):
        MultiTaskBackward(model.parameters(), via="features").backward(a, [b], features=features.detach())
    assert all(p.grad is None for p in model.parameters())


def test_tasks_that_share_nothing_are_refused_before_any_work(model):
    one, two = nn.Linear(3, 1), nn.Linear(3, 1)
    x = torch.ones(2, 3)
    calls = []
    one.register_full_backward_hook(lambda *_: calls.append(1))
    params = [*one.parameters(), *two.parameters()]
    with pytest.raises(ValueError, match="task 'main' shares no parameter with another task"):
        MultiTaskBackward(params).backward(one(x).sum(), [two(x).sum()])
    with pytest.raises(ValueError, match="task 'aux_0' depends on none of params"):
        MultiTaskBackward(one.parameters()).backward(one(x).sum(), [two(x).sum()])
    losses, _ = model.losses(batch())
    with pytest.raises(ValueError, match="task 'main' depends on 2 trainable tensors outside params and heads"):
        MultiTaskBackward(model.trunk.parameters()).backward(losses[0], losses[1:])
    assert not calls and all(p.grad is None for p in params)


def test_gradients_that_are_not_finite_name_the_task():
    theta = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="squared length of the gradient of task 'root' must be finite"):
        MultiTaskBackward([theta]).backward(theta.sum(), {"root": theta.sqrt().sum()})


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    losses = [table(torch.tensor([1, 2])).sum(), -table(torch.tensor([2, 3])).sum()]
    with pytest.raises(ValueError, match="task 'main' must have dense gradients, got torch.sparse_coo"):
        MultiTaskBackward(table.parameters()).backward(losses[0], losses[1:])


def test_calls_that_do_not_go_together_are_refused(model):
    (a, b, c), _ = model.losses(batch())
    mt = MultiTaskBackward(model.parameters())
    mt.backward(a, [b], last=False)
    with pytest.raises(ValueError, match="tasks must be the same in all calls of a window"):
        mt.backward(a, [b, c])
    with pytest.raises(ValueError, match="keep holds the gradients of all tasks"):
        MultiTaskBackward(model.parameters(), gradients="layerwise").backward(a, [b], keep=True)
    with pytest.raises(ValueError, match="last=False with method 'grad_norm' needs gradients='kept'"):
        MultiTaskBackward(model.parameters(), "grad_norm", gradients="layerwise").backward([a, b], last=False)
    with pytest.raises(ValueError, match="reference must have a loss for every auxiliary task, got none for 'aux_1'"):
        MultiTaskBackward(model.parameters(), drift=1.0, reference={"aux_0": 1.0}).backward(a, [b, c])
    with pytest.raises(ValueError, match="scaler needs refresh=1"):
        scaler = torch.amp.GradScaler("cpu")
        MultiTaskBackward(model.parameters(), refresh=2).backward(a, [b], scaler=scaler)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(model.losses(batch())[0]).backward()
    sgd.step()
    (a, b, c), _ = model.losses(batch())
    with pytest.raises(TypeError, match=r"metric must be an optimizer with exp_avg_sq \(Adam, AdamW\), got SGD"):
        MultiTaskBackward(model.parameters(), metric=sgd).backward(a, [b])
    with pytest.raises(ValueError, match="state must have the keys"):
        mt.load_state_dict({"weights": None})


# several processes

SCRIPT = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from danlu.optim.multitask import MultiTaskBackward

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
trunk, heads = nn.Linear(4, 6).double(), nn.ModuleList(nn.Linear(6, 1).double() for _ in range(3))
x = torch.randn(8, 4, dtype=torch.float64)
y = torch.randn(8, 3, dtype=torch.float64)
y[:, 1] = -y[:, 0]

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.heads = trunk, heads

    def forward(self, x):
        self.features = torch.tanh(self.trunk(x))
        return torch.cat([head(self.features) for head in self.heads], 1)

def run(model, rows, via, average):
    inner = getattr(model, "module", model)
    for p in inner.parameters():
        p.grad = None
    mt = MultiTaskBackward(trunk.parameters(), "min_norm", heads=heads.parameters(), via=via)
    for _ in range(2):  # twice, because an unfinished reduction shows at the next call
        for p in inner.parameters():
            p.grad = None
        import contextlib
        with model.no_sync() if average else contextlib.nullcontext():
            out = model(x[rows])
        losses = list((out - y[rows]).square().mean(0))
        result = mt.backward(losses, features=inner.features if via == "features" else None)
    return result, torch.cat([p.grad.flatten() for p in inner.parameters()])

model = Model()
for via in ("losses", "features"):
    mine, step = run(DistributedDataParallel(model), slice(4 * rank, 4 * rank + 4), via, True)
    other = step.clone()
    dist.broadcast(other, 0)
    assert (other == step).all(), "processes differ"
    import danlu.optim.task_gradients as tg
    tg.world, kept = (lambda: 1), tg.world
    whole, expected = run(model, slice(0, 8), via, False)
    tg.world = kept
    torch.testing.assert_close(mine.losses, whole.losses)
    torch.testing.assert_close(mine.weights, whole.weights)
    torch.testing.assert_close(mine.gram, whole.gram)
    torch.testing.assert_close(step, expected)
try:
    out = model(x)
    MultiTaskBackward(model.parameters(), gradients="layerwise").backward(out[:, 0].sum(), [out[:, 1].sum()])
except ValueError as error:
    assert "works in one process" in str(error)
else:
    raise SystemExit("layerwise was not refused")
print("equal", rank)
dist.destroy_process_group()
"""


def test_two_processes_combine_the_mean_gradients(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
