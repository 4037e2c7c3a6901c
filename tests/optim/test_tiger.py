"""Tiger: its rules, accumulation, gradients that are not finite, half precision, and that it resumes to the bit."""

import copy
import io
import logging

import pytest
import torch
from torch import nn

from danlu.optim.groups import tiger_param_groups
from danlu.optim.momentum import SignMomentum
from danlu.optim.schedule import piecewise_linear
from danlu.optim.tiger import Tiger
from reference import sign_momentum

PATHS = {
    "loops": {},
    "plain": {"fused": False},
    "foreach": {"foreach": True},
}


def tensors(count: int, *shape: int, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(count)]


def feed(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad()


def momentum_of(optimizer, parameter, k=1, b=0.965):
    return optimizer.state[parameter]["momentum"] * (1 - b) / k


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", ["rms", "row_rms", "half", "plain"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 8])
def test_windows_equal_the_article(k, rule, path):
    start, *gradients = tensors(24 + 1, 6, 5)
    theta, m = sign_momentum.tiger(start, gradients, k=k, alpha=0.03, lam=0.1, rule=rule)
    parameter = nn.Parameter(start.clone())
    optimizer = Tiger([parameter], 0.03, weight_decay=0.1, accumulation_steps=k, rule=rule, **PATHS[path])
    feed(optimizer, parameter, gradients)
    assert torch.allclose(parameter, theta, atol=1e-14, rtol=0)
    assert torch.allclose(momentum_of(optimizer, parameter, k), m, atol=1e-14, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 8])
def test_accumulation_equals_averaged_gradients(k, path):
    start, *gradients = tensors(24 + 1, 300, 40, dtype=torch.float32)
    long = nn.Parameter(start.double())
    short = nn.Parameter(start.double())
    in_momentum = Tiger([long], 0.01, accumulation_steps=k, **PATHS[path])
    averaged = Tiger([short], 0.01, **PATHS[path])
    feed(in_momentum, long, [g.double() for g in gradients])
    feed(averaged, short, [sum(g.double() for g in gradients[i : i + k]) / k for i in range(0, 24, k)])
    assert torch.allclose(long, short, atol=1e-14, rtol=0)
    assert torch.allclose(momentum_of(in_momentum, long, k), momentum_of(averaged, short), atol=1e-14, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_single_precision_follows_double(path):
    start, *gradients = tensors(24 + 1, 70, 1001)
    theta, m = sign_momentum.tiger(start, gradients, k=4, alpha=0.01)
    parameter = nn.Parameter(start.float())
    optimizer = Tiger([parameter], 0.01, accumulation_steps=4, **PATHS[path])
    feed(optimizer, parameter, [g.float() for g in gradients])
    sure = (m.abs() > 1e-6).double()
    assert ((parameter - theta) * sure).abs().max() < 2e-6
    assert (momentum_of(optimizer, parameter, 4) - m).abs().max() < 1e-6


def test_accumulated_gradients_are_taken():
    (start, gradient) = tensors(2, 3, 3)
    parameter = nn.Parameter(start)
    optimizer = Tiger([parameter], accumulation_steps=2)
    parameter.grad = gradient
    optimizer.step()
    assert parameter.grad is None


def test_automatic_rule_goes_by_dimensions():
    matrix, vector = nn.Parameter(torch.full((4, 4), 3.0)), nn.Parameter(torch.full((4,), 3.0))
    optimizer = Tiger([matrix, vector], 0.1, weight_decay=0.5)
    matrix.grad, vector.grad = torch.ones(4, 4), -torch.ones(4)
    optimizer.step()
    assert torch.allclose(matrix, torch.tensor(3 - 0.3 * (1 + 0.5 * 3)))
    assert torch.equal(vector, torch.full((4,), 3 + 0.05))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**7])
def test_scale_of_all_gradients_is_ignored(factor, path):
    start, *gradients = tensors(13, 90, 70, dtype=torch.float32)
    ends = []
    for scale in (1.0, factor):
        parameter = nn.Parameter(start.clone())
        feed(Tiger([parameter], accumulation_steps=3, **PATHS[path]), parameter, [scale * g for g in gradients])
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_relative_change_does_not_depend_on_the_size_of_a_matrix():
    start, *gradients = tensors(7, 9, 8)
    ends = []
    for scale in (1.0, 64.0):
        parameter = nn.Parameter(scale * start)
        optimizer = Tiger([parameter], 0.05, weight_decay=0.0)
        feed(optimizer, parameter, gradients)
        ends.append(parameter.detach() / scale)
    assert torch.allclose(*ends, atol=1e-14)


def test_one_rms_per_tensor_not_per_group():
    small, large = nn.Parameter(torch.full((2, 2), 0.1)), nn.Parameter(torch.full((2, 2), 10.0))
    optimizer = Tiger([small, large], 0.1, weight_decay=0.0)
    small.grad = large.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.allclose(small, torch.tensor(0.09)) and torch.allclose(large, torch.tensor(9.0))


def test_a_frozen_sign_leads_to_the_inverse_of_the_decay():
    eta, lam, n = 0.05, 0.5, 40
    start = torch.randn(5, dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    feed(Tiger([parameter], eta, weight_decay=lam, rule="plain"), parameter, [torch.ones(5, dtype=torch.float64)] * n)
    assert torch.allclose(parameter, -1 / lam + (start + 1 / lam) * (1 - eta * lam) ** n, atol=1e-13)


@pytest.mark.parametrize("path", PATHS)
def test_maximize_mirrors(path):
    start, *gradients = tensors(9, 4, 4)
    ends = []
    for sign in (1, -1):
        parameter = nn.Parameter(start.clone())
        feed(Tiger([parameter], maximize=sign < 0, **PATHS[path]), parameter, [sign * g for g in gradients])
        ends.append(parameter.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("centre", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_shrinks_and_nothing_else(value, centre, path):
    start, good, bad = tensors(3, 5, 4)
    bad[2, 1] = value
    parameter = nn.Parameter(start.clone())
    optimizer = Tiger([parameter], centre=centre, **PATHS[path])
    feed(optimizer, parameter, [good])
    theta, m = parameter.detach().clone(), optimizer.state[parameter]["momentum"].clone()
    feed(optimizer, parameter, [bad])
    assert torch.allclose(parameter, 0.99 * (theta - centre) + centre, atol=1e-14)
    assert torch.equal(optimizer.state[parameter]["momentum"], m)
    feed(optimizer, parameter, [good])
    assert torch.isfinite(parameter).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrong", [(0,), (1,), (2,), (0, 1), (0, 1, 2), (0, 2, 4, 5), (3, 4, 5)])
def test_windows_go_on_without_what_is_not_finite(wrong, path):
    start, *gradients = tensors(10, 5, 4)
    for place in wrong:
        gradients[place][0, 0] = float("nan")
    theta, m = sign_momentum.tiger(start, gradients, k=3, alpha=0.02)
    parameter = nn.Parameter(start.clone())
    optimizer = Tiger([parameter], 0.02, accumulation_steps=3, **PATHS[path])
    feed(optimizer, parameter, gradients)
    assert torch.allclose(parameter, theta, atol=1e-14)
    assert torch.allclose(momentum_of(optimizer, parameter, 3), m, atol=1e-14)


def test_skipping_leaves_theta_and_raising_leaves_everything():
    start, bad = tensors(2, 3, 3)
    bad[0, 0] = float("nan")
    parameter, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    feed(Tiger([parameter], nonfinite="skip"), parameter, [bad])
    assert torch.equal(parameter, start)
    optimizer = Tiger([other, parameter], nonfinite="raise")
    other.grad, parameter.grad = torch.ones_like(other), bad
    with pytest.raises(FloatingPointError, match=r"gradient of parameter 1, shape \(3, 3\), is not finite"):
        optimizer.step()
    assert torch.equal(other, start)


@pytest.mark.parametrize("path", PATHS)
def test_not_looking_changes_nothing_for_finite_gradients(path):
    start, *gradients = tensors(7, 6, 5)
    ends = []
    for answer in ("shrink", "ignore"):
        parameter = nn.Parameter(start.clone())
        optimizer = Tiger([parameter], accumulation_steps=2, nonfinite=answer, **PATHS[path])
        feed(optimizer, parameter, gradients)
        ends.append(parameter.detach())
    assert torch.equal(*ends)
    feed(optimizer, parameter, [torch.full((6, 5), float("nan"), dtype=torch.float64)])
    assert optimizer.state[parameter]["momentum"].isnan().all()


def test_rows_without_a_gradient_rest():
    start, *gradients = tensors(13, 6, 4)
    for place, gradient in enumerate(gradients):
        gradient[torch.arange(6) % 3 != place % 3] = 0
        gradient[5] = 0
    parameter = nn.Parameter(start.clone())
    optimizer = Tiger([parameter], 0.02, rule="row_rms", accumulation_steps=2)
    feed(optimizer, parameter, gradients)
    # Each row is a problem of its own that sees the windows in which it has a gradient.
    for row in range(5):
        windows = [w for w in zip(gradients[::2], gradients[1::2], strict=True) if w[0][row].any() or w[1][row].any()]
        own = [g[row : row + 1] for window in windows for g in window]
        theta, m = sign_momentum.tiger(start[row : row + 1], own, k=2, alpha=0.02, rule="row_rms")
        assert torch.allclose(parameter[row], theta[0], atol=1e-14)
        assert torch.allclose(momentum_of(optimizer, parameter, 2)[row], m[0], atol=1e-14)
    assert torch.equal(parameter[5], start[5])


def test_a_rare_row_drifts_to_the_inverse_of_the_decay_unless_rows_are_lazy():
    ends = []
    for lazy in (False, True):
        table = nn.Parameter(torch.full((3, 2), 0.02))
        optimizer = Tiger([table], 0.05, 0.999, weight_decay=0.5, rule="row_rms", lazy_rows=lazy)
        once = torch.zeros(3, 2)
        once[0] = -1
        feed(optimizer, table, [once] + [torch.zeros(3, 2)] * 600)
        ends.append(table.detach()[0])
    assert torch.allclose(ends[0], torch.tensor(2.0), atol=0.05)
    assert torch.allclose(ends[1], torch.tensor(0.02), atol=2e-3)


def test_zero_matrices_need_a_floor(caplog):
    zero = nn.Parameter(torch.zeros(3, 3))
    with caplog.at_level(logging.WARNING, "danlu.optim"):
        feed(Tiger([zero]), zero, [torch.ones(3, 3)] * 3)
    assert torch.equal(zero, torch.zeros(3, 3))
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "parameter 0 of shape (3, 3), or a row of it, is all zeros"
    ]
    feed(Tiger([zero], 0.1, min_rms=0.5), zero, [torch.ones(3, 3)])
    assert torch.allclose(zero, torch.tensor(-0.05))


def test_schedule_counts_updates_and_equals_a_torch_scheduler():
    knots = {4: 1.0, 10: 0.1}
    start, *gradients = tensors(25, 5, 4)
    first, second = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    inside = Tiger([first], 0.02, accumulation_steps=2, schedule=knots)
    outside = Tiger([second], 0.02)
    rates = torch.optim.lr_scheduler.LambdaLR(outside, piecewise_linear(knots))
    feed(inside, first, gradients)
    for one, two in zip(gradients[::2], gradients[1::2], strict=True):
        feed(outside, second, [one + two])
        rates.step()
    assert torch.allclose(first, second, atol=1e-14)


def test_piecewise_linear_multipliers():
    warm = piecewise_linear({10: 1.0, 20: 0.5})
    assert [warm(step) for step in (0, 5, 10, 15, 20, 1000)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    assert piecewise_linear({0: 2.0})(7) == 2.0
    with pytest.raises(ValueError, match="at least one step"):
        piecewise_linear({})
    with pytest.raises(TypeError, match="integer steps, got 0.5"):
        piecewise_linear({0.5: 1.0})
    with pytest.raises(ValueError, match=">= 0, got 3: -1"):
        piecewise_linear({3: -1})


def save_and_load(optimizer):
    """Through a file that holds no code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["rms", "row_rms"])
def test_resumes_to_the_bit_in_the_middle_of_a_window(rule, dtype, state_dtype):
    start, *gradients = tensors(12, 40, 30, dtype=dtype)
    gradients[5][0, 0] = float("nan")
    for gradient in gradients:
        gradient[torch.rand(40) < 0.5] = 0
    whole, half = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.01, "accumulation_steps": 3, "rule": rule, "state_dtype": state_dtype, "seed": 7}
    one = Tiger([whole], **options)
    feed(one, whole, gradients)
    two = Tiger([half], **options)
    feed(two, half, gradients[:7])
    rest = nn.Parameter(half.detach().clone())
    three = Tiger([rest], **options)
    three.load_state_dict(save_and_load(two))
    feed(three, rest, gradients[7:])
    assert torch.equal(rest, whole)
    end, resumed = one.state[whole], three.state[rest]
    assert end.keys() == resumed.keys() and resumed["momentum"].dtype == (state_dtype or dtype)
    assert all(torch.equal(torch.as_tensor(end[key]), torch.as_tensor(resumed[key])) for key in end)


def test_state_is_one_tensor_per_parameter_between_windows():
    start, *gradients = tensors(5, 6, 4, dtype=torch.float32)
    for rule, dtype in (("rms", None), ("row_rms", torch.bfloat16)):
        parameter = nn.Parameter(start.clone())
        optimizer = Tiger([parameter], rule=rule, accumulation_steps=2, state_dtype=dtype)
        feed(optimizer, parameter, gradients)
        (state,) = optimizer.state_dict()["state"].values()
        assert list(state) == ["momentum"] and state["momentum"].element_size() == (2 if dtype else 4)


def test_kept_sums_of_squares_change_nothing_and_see_changes():
    start, *gradients = tensors(7, 300, 50, dtype=torch.float32)
    kept, fresh = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one, two = Tiger([kept]), Tiger([fresh])
    for step, gradient in enumerate(gradients):
        two._squares.clear()
        if step == 3:
            with torch.no_grad():
                kept.mul_(5)
                fresh.mul_(5)
        feed(one, kept, [gradient])
        feed(two, fresh, [gradient])
        assert torch.equal(kept, fresh)
    assert one._squares


def test_copies_keep_their_options():
    start, gradient = tensors(2, 3, 3)
    parameter = nn.Parameter(start)
    optimizer = Tiger([parameter], accumulation_steps=2, schedule={0: 0.5}, shrink=0.9)
    parameter.grad = gradient
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert (twin.accumulation_steps, twin.schedule, twin.shrink) == (2, {0: 0.5}, 0.9)
    twin.param_groups[0]["params"][0].grad = gradient.clone()
    twin.step()
    assert twin.param_groups[0]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_small_steps_on_average(dtype):
    alpha, steps = 1e-4, 100
    start = torch.randn(128, 256).to(dtype)
    moved = {}
    for rounding in (True, False):
        parameter = nn.Parameter(start.clone())
        optimizer = Tiger([parameter], alpha, weight_decay=0.0, stochastic_rounding=rounding)
        feed(optimizer, parameter, [torch.ones_like(start)] * steps)
        moved[rounding] = (start.float() - parameter.float()).mean() / (alpha * steps)
    assert abs(moved[True] - 1) < 0.05
    assert moved[False] < 0.5


def test_small_gradients_do_not_vanish_in_float16():
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.float16))
    optimizer = Tiger([parameter], 0.01, accumulation_steps=64, weight_decay=0.0)
    feed(optimizer, parameter, [torch.full((4, 4), 1e-5, dtype=torch.float16)] * 64)
    assert (parameter < 1).all()


def test_float16_momentum_saturates():
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.float16))
    optimizer = Tiger([parameter], 0.01, weight_decay=0.0)
    feed(optimizer, parameter, [torch.full((4, 4), 60000.0, dtype=torch.float16)] * 4)
    assert torch.isfinite(optimizer.state[parameter]["momentum"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_paths_agree_on_awkward_shapes(dtype):
    shapes = [(), (1,), (0,), (3, 0), (1, 1), (70000,), (5, 3, 2), (257, 301)]
    ends = []
    for options in PATHS.values():
        torch.manual_seed(3)
        parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        parameters.append(nn.Parameter(torch.randn(31, 17).to(dtype).T))
        optimizer = Tiger(parameters, 0.01, stochastic_rounding=False, **options)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape).to(dtype)
            optimizer.step()
        ends.append([parameter.detach().float() for parameter in parameters])
    for other in ends[1:]:
        assert all(torch.allclose(a, b, atol=1e-6, rtol=0) for a, b in zip(ends[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["rms", "row_rms"])
def test_compiled_step_equals_the_plain_one(rule, dtype):
    from danlu.kernels import signs

    if not signs._compiles(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    start, *gradients = tensors(7, 128, 65, dtype=dtype)
    ends = []
    for fused in (False, True):
        parameter = nn.Parameter(start.clone())
        # float64 momentum: the loops do not take it, so that fused means torch.compile
        optimizer = Tiger([parameter], rule=rule, accumulation_steps=2, fused=fused, state_dtype=torch.float64)
        feed(optimizer, parameter, gradients)
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_without_a_compiler_the_plain_step_is_taken_and_said(caplog, monkeypatch):
    from danlu.kernels import signs

    def broken(*kind):
        raise RuntimeError("no compiler\nof any kind")

    monkeypatch.setattr(signs, "_compiled", broken)
    signs._compiles.cache_clear()
    start, *gradients = tensors(3, 128, 65, dtype=torch.bfloat16)
    ends = []
    for fused in (False, True):
        parameter = nn.Parameter(start.clone())
        feed(Tiger([parameter], fused=fused, stochastic_rounding=False), parameter, gradients)
        ends.append(parameter.detach())
    signs._compiles.cache_clear()
    assert torch.equal(*ends)
    assert caplog.messages == ["torch.compile does not work here, the plain step is used: no compiler"]


def test_groups_follow_the_modules():
    from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=7))
    names = {id(parameter): name for name, parameter in gpt2.named_parameters()}
    found = {
        names[id(parameter)]: (group["rule"], group["centre"])
        for group in tiger_param_groups(gpt2)
        for parameter in group["params"]
    }
    assert found["transformer.wte.weight"] == found["transformer.wpe.weight"] == ("row_rms", 0.0)
    assert found["transformer.h.0.attn.c_attn.weight"] == ("rms", 0.0)
    assert found["transformer.h.0.attn.c_attn.bias"] == found["transformer.ln_f.bias"] == ("half", 0.0)
    assert found["transformer.ln_f.weight"] == ("half", 1.0)
    assert found.keys() == set(names.values())
    gemma = GemmaForCausalLM(
        GemmaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=11,
                    num_key_value_heads=1, head_dim=8)
    )  # fmt: skip
    gains = {group["centre"] for group in tiger_param_groups(gemma) if group["rule"] == "half"}
    assert gains == {0.0}


def test_groups_take_options_and_leave_out_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].weight.requires_grad_(False)
    groups = tiger_param_groups(model, {"0.bias": "matrix"}, min_rms=0.1)
    assert [(g["rule"], len(g["params"]), g["min_rms"]) for g in groups] == [
        ("rms", 1, 0.1),
        ("half", 1, 0.1),
        ("half", 1, 0.1),
    ]
    with pytest.raises(ValueError, match="must have parameters that require gradients"):
        tiger_param_groups(model.requires_grad_(False))


def test_bad_arguments_are_refused():
    parameter = nn.Parameter(torch.ones(2, 2))
    for options, error, text in [
        ({"lr": -1.0}, ValueError, "lr must be in"),
        ({"lr": "1"}, TypeError, "lr must be a number"),
        ({"beta": 1.0}, ValueError, r"beta must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be in"),
        ({"min_rms": -0.1}, ValueError, "min_rms must be in"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be at least 1, got 0"),
        ({"accumulation_steps": 2.0}, TypeError, "accumulation_steps must be an integer"),
        ({"nonfinite": "zero"}, ValueError, "nonfinite must be one of shrink, skip, raise, ignore"),
        ({"shrink": 0.0}, ValueError, r"shrink must be in \(0, 1\]"),
        ({"rule": "rows"}, ValueError, "rule must be one of auto, rms"),
        ({"foreach": True, "fused": True}, ValueError, "foreach and fused must not both be True"),
        ({"state_dtype": torch.int32}, ValueError, "state_dtype must be None or a floating type"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"schedule": {}}, ValueError, "knots must hold at least one step"),
    ]:
        with pytest.raises(error, match=text):
            Tiger([parameter], **options)
    with pytest.raises(ValueError, match="row_rms is for tables of two dimensions, got 1"):
        Tiger([nn.Parameter(torch.ones(2))], rule="row_rms")
    with pytest.raises(TypeError, match="real floating-point tensors"):
        Tiger([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = Tiger(table.parameters(), rule="row_rms")
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradients must be dense"):
        optimizer.step()


def test_groups_added_late_join_the_window():
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Tiger([first], accumulation_steps=2)
    feed(optimizer, first, [torch.ones(2, 2)] * 3)
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones(2, 2)
    feed(optimizer, first, [torch.ones(2, 2)])
    assert (second < 1).all()
    assert {(group["step"], group["micro"]) for group in optimizer.param_groups} == {(2, 0)}


def test_closures_are_evaluated_with_gradients():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = Tiger([parameter], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert (parameter < 1).all()
    assert isinstance(optimizer, SignMomentum)
