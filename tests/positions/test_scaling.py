"""Frequency rescalings against loops written from the formulas, against each other and against the host's functions."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from danlu.positions.scaling import (
    METHODS,
    attention_scaling,
    frequency_factors,
    geometric_base,
    rescaled,
    rope_inv_freq,
    stretch_factor,
)

STRETCHED = ("pi", "ntk-old", "ntk", "ntk-fixed", "ntk-mixed", "yarn", "yarn-turns")
L = 4096


def expected_frequency(
    method: str, i: int, d: int, base: float, s: float, power: float = 0.75, tau: float = 32
) -> float:
    """The definition of one frequency, in plain arithmetic."""
    if method == "pi":
        return base ** (-2 * i / d) / s
    if method == "ntk-old":
        return (base * s) ** (-2 * i / d)
    if method == "ntk":
        return (base * s ** (d / (d - 2))) ** (-2 * i / d)
    if method == "ntk-fixed":  # digit m = i + 1 of radix beta * lambda, over one more lambda
        radix = s ** (2 / d)
        return 1 / (radix * (base ** (2 / d) * radix) ** i)
    if method == "ntk-mixed":
        product = 1.0
        steps = [m**power - (m - 1) ** power for m in range(1, d // 2 + 1)]
        for step in steps[: i + 1]:  # lambda_1 * ... * lambda_(i+1), the exponents adding up to 1 over all digits
            product *= s ** (step / (d / 2) ** power)
        return base ** (-2 * i / d) / product
    turns = base ** (-2 * i / d) * L / (2 * math.pi)
    keep = 1.0 if turns > tau else 0.0 if turns < 1 else (turns - 1) / (tau - 1)
    return base ** (-2 * i / d) * (keep + (1 - keep) / s)


@pytest.mark.parametrize("method", ["pi", "ntk-old", "ntk", "ntk-fixed", "ntk-mixed", "yarn-turns"])
@pytest.mark.parametrize(("d", "base", "s"), [(128, 1e4, 8.0), (32, 5e5, 2.5), (4, 1e4, 16.0)])
def test_matches_the_definition(method: str, d: int, base: float, s: float) -> None:
    inv_freq, _ = rope_inv_freq(method, d, base, factor=s, trained_length=L)
    expected = torch.tensor([expected_frequency(method, i, d, base, s) for i in range(d // 2)], dtype=torch.float64)
    assert inv_freq.dtype == torch.float64
    torch.testing.assert_close(inv_freq, expected, rtol=1e-12, atol=0)


def host_table(
    kind: str, seq_len: int | None = None, head_dim: int = 128, **parameters: float
) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=L,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters},
    )
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=seq_len)
    return inv_freq.double(), scaling


@pytest.mark.parametrize("s", [1.5, 4.0, 16.0])
def test_agrees_with_the_host(s: float) -> None:
    close = {"rtol": 1e-6, "atol": 0}
    linear, _ = host_table("linear", factor=s)
    plain = rope_inv_freq("none", 128, 1e4)[0]
    assert torch.equal((plain.float() / s).double(), linear) or torch.allclose(plain / s, linear, **close)
    torch.testing.assert_close(rope_inv_freq("pi", 128, 1e4, factor=s)[0], linear, **close)
    dynamic, _ = host_table("dynamic", seq_len=int(s * L), factor=1.0)
    torch.testing.assert_close(rope_inv_freq("ntk", 128, 1e4, factor=s)[0], dynamic, **close)
    llama3, _ = host_table(
        "llama3", factor=s, low_freq_factor=1.0, high_freq_factor=32.0, original_max_position_embeddings=L
    )
    torch.testing.assert_close(rope_inv_freq("yarn-turns", 128, 1e4, factor=s, trained_length=L)[0], llama3, **close)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("length", "fast", "slow"), [(4096, 32.0, 1.0), (256, 32.0, 1.0), (32768, 16.0, 2.0), (1_000_000, 32.0, 1.0)]
)
def test_yarn_agrees_with_the_host(length: int, fast: float, slow: float, truncate: bool) -> None:
    host, scaling = host_table(
        "yarn",
        factor=4.0,
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
        original_max_position_embeddings=length,
    )
    ours, ours_scaling = rope_inv_freq(
        "yarn", 128, 1e4, factor=4.0, trained_length=length, beta_fast=fast, beta_slow=slow, truncate=truncate
    )
    torch.testing.assert_close(ours, host, rtol=1e-6, atol=0)
    assert ours_scaling == pytest.approx(scaling, abs=1e-12) == 1 + 0.1 * math.log(4)


def test_the_two_yarn_ramps_differ() -> None:
    index, _ = rope_inv_freq("yarn", 128, 1e4, factor=4.0, trained_length=L)
    turns, _ = rope_inv_freq("yarn-turns", 128, 1e4, factor=4.0, trained_length=L)
    assert float((index / turns - 1).abs().max()) > 0.7


@pytest.mark.parametrize("method", STRETCHED)
def test_factor_one_changes_nothing(method: str) -> None:
    plain, _ = rope_inv_freq("none", 64, 1e4)
    same, scaling = rope_inv_freq(method, 64, 1e4, factor=1, trained_length=L)
    assert torch.equal(same, plain)
    assert scaling == 1.0


@pytest.mark.parametrize("method", ["pi", "ntk", "ntk-fixed", "ntk-mixed", "yarn", "yarn-turns"])
def test_slowest_pair_is_interpolated_in_full(method: str) -> None:
    inv_freq, _ = rope_inv_freq("none", 128, 1e4)
    assert float(inv_freq[-1]) * L < 2 * math.pi
    g = frequency_factors(method, inv_freq, factor=7.0, trained_length=L)
    assert float(g[-1]) == pytest.approx(1 / 7, abs=1e-12)
    assert bool((g <= 1).all()) and bool((g >= 1 / 7 - 1e-12).all())
    if method in ("ntk", "yarn", "yarn-turns"):
        assert float(g[0]) == 1.0


def test_limits_of_the_mixed_radix() -> None:
    inv_freq, _ = rope_inv_freq("none", 64, 1e4)
    fixed = frequency_factors("ntk-fixed", inv_freq, factor=6.0)
    assert torch.allclose(frequency_factors("ntk-mixed", inv_freq, factor=6.0, power=1.0), fixed, rtol=1e-14)
    interpolated = frequency_factors("pi", inv_freq, factor=6.0)
    assert torch.allclose(frequency_factors("ntk-mixed", inv_freq, factor=6.0, power=1e-6), interpolated, rtol=1e-5)
    g = frequency_factors("ntk-mixed", inv_freq, factor=6.0)
    lambdas = torch.cat([torch.ones(1, dtype=torch.float64), g[:-1]]) / g  # g_i = 1 / (lambda_1 ... lambda_(i+1))
    assert float(lambdas.prod()) == pytest.approx(6.0, rel=1e-12)
    assert bool((lambdas[1:] < lambdas[:-1]).all()) and bool((lambdas > 1).all())


def test_new_base_is_a_new_table() -> None:
    plain, _ = rope_inv_freq("none", 64, 1e4)
    expected, _ = rope_inv_freq("none", 64, 1e6)
    torch.testing.assert_close(rescaled(plain, "abf", new_base=1e6)[0], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(rope_inv_freq("abf", 64, 1e4, new_base=1e6)[0], expected, rtol=1e-12, atol=0)


def test_base_is_read_from_a_table() -> None:
    table = rope_inv_freq("none", 96, 5e5)[0]
    assert geometric_base(table) == pytest.approx(5e5, rel=1e-9)
    assert geometric_base(table.float() / 8) == pytest.approx(5e5, rel=1e-4)
    assert geometric_base(rope_inv_freq("yarn", 96, 5e5, factor=8, trained_length=L)[0]) is None
    assert geometric_base(table[:1]) is None


def test_yarn_on_a_table_without_a_base() -> None:
    table, _ = host_table(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=L
    )
    assert geometric_base(table) is None
    g = frequency_factors("yarn", table, factor=4.0, trained_length=8 * L, truncate=False)
    turns = table * 8 * L / (2 * math.pi)
    assert bool((g[turns > 32] == 1).all()) and bool((g[turns < 1] == 0.25).all())
    ramp = (turns <= 32) & (turns >= 1)
    assert int(ramp.sum()) > 3 and bool((g[ramp].diff() < 0).all())
    with pytest.raises(ValueError, match="yarn-turns"):
        frequency_factors("yarn", table.flip(0), factor=4.0, trained_length=L)
    with pytest.raises(ValueError, match="geometric"):
        frequency_factors("abf", table, new_base=1e6)


def test_yarn_on_a_linearly_scaled_host_looks_at_turns() -> None:
    """On theta / 4 the ramp sits where it would for a quarter of the trained length."""
    table = rope_inv_freq("none", 128, 1e4)[0]
    quarter = frequency_factors("yarn", table / 4, factor=2.0, trained_length=L)
    assert torch.equal(quarter, frequency_factors("yarn", table, factor=2.0, trained_length=L // 4))


def test_pairs_that_do_not_rotate_are_no_digits() -> None:
    table = rope_inv_freq("none", 32, 1e4)[0]
    padded = torch.cat([table, torch.zeros(5, dtype=torch.float64)])
    for method in STRETCHED:
        g = frequency_factors(method, padded, factor=4.0, trained_length=L)
        assert torch.equal(g[:16], frequency_factors(method, table, factor=4.0, trained_length=L))
        assert torch.equal(g[16:], torch.ones(5, dtype=torch.float64))


def test_attention_scaling() -> None:
    assert attention_scaling("yarn", 8.0) == 1 + 0.1 * math.log(8)
    assert attention_scaling("ntk", 8.0) == 1.0
    assert rescaled([1.0, 0.1], "yarn-turns", factor=8.0, trained_length=64, attention_factor=1.0)[1] == 1.0


def test_stretch_factor() -> None:
    assert stretch_factor("pi", None, trained_length=256, target_length=1024) == 4.0
    assert stretch_factor("pi", None, trained_length=256, target_length=100) == 1.0
    by_length, _ = rope_inv_freq("ntk", 64, 1e4, trained_length=256, target_length=1024)
    assert torch.equal(by_length, rope_inv_freq("ntk", 64, 1e4, factor=4.0)[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(method="pi", dim=63, factor=2), "dim"),
        (dict(method="pi", dim=64, base=1.0, factor=2), "base"),
        (dict(method="pi", dim=64, factor=0.5), "factor"),
        (dict(method="pi", dim=64, factor=math.nan), "factor"),
        (dict(method="pi", dim=64, factor=math.inf), "factor"),
        (dict(method="pi", dim=64), "factor"),
        (dict(method="pi", dim=64, factor=2, target_length=8, trained_length=4), "not both"),
        (dict(method="pi", dim=64, target_length=8), "trained_length"),
        (dict(method="yarn", dim=64, factor=2), "trained_length"),
        (dict(method="ntk-mixed", dim=64, factor=2, power=0.0), "power"),
        (dict(method="ntk-mixed", dim=64, factor=2, power=1.5), "power"),
        (dict(method="yarn-turns", dim=64, factor=2, trained_length=L, turns=1.0), "turns"),
        (dict(method="yarn", dim=64, factor=2, trained_length=L, beta_fast=1, beta_slow=2), "beta_fast"),
        (dict(method="abf", dim=64), "new_base"),
        (dict(method="ntk", dim=2, factor=2), "pairs"),
        (dict(method="pi", dim=64, factor=2, attention_factor=-1.0), "attention_factor"),
        (dict(method="ntk-mixd", dim=64, factor=2), "did you mean 'ntk-mixed'"),
    ],
)
def test_refuses_bad_input(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rope_inv_freq(**arguments)


@pytest.mark.parametrize("table", [[], [[1.0]], [1.0, math.nan], [1.0, -0.1]])
def test_refuses_bad_tables(table: list) -> None:
    for method in METHODS:
        with pytest.raises(ValueError, match="inv_freq"):
            frequency_factors(method, table, factor=2.0, trained_length=8, new_base=2.0)
