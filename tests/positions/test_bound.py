"""The lower bound of the rotary base against a dense numpy sum and the published values."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig

from danlu.positions import check_base, max_length, recommended_base, similarity_sum


def dense_minimum(base: float, dim: int, length: int) -> float:
    distances = np.arange(length)[:, None]
    return float(np.cos(distances / base ** (np.arange(dim // 2) * 2.0 / dim)).sum(1).min())


def test_similarity_sum() -> None:
    values = similarity_sum([0, 1, 1707], 1e4, 128)
    assert values[0] == 64
    assert values[2] == pytest.approx(sum(np.cos(1707 * 1e4 ** (-2 * i / 128)) for i in range(64)))
    assert similarity_sum(3.5, 1e4, 8).shape == ()


def test_longest_length_of_the_usual_base() -> None:
    assert max_length(1e4, 128) == 1707
    assert dense_minimum(1e4, 128, 1707) >= 0 > dense_minimum(1e4, 128, 1708)
    assert max_length(1e4, 128, limit=1000) is None
    assert max_length(1e6, 128, limit=2000) is None
    assert max_length(1e4, 2) == 2  # cos 2 is the first negative one


def test_feasibility_is_not_monotone() -> None:
    for base, feasible in [
        (4293, False),
        (4300, True),
        (4330, True),
        (4340, False),
        (5620, True),
        (5800, False),
        (6100, True),
    ]:
        assert (max_length(base, 128, limit=1024) is None) == feasible == (dense_minimum(base, 128, 1024) >= 0)


def test_published_bases() -> None:
    bound = recommended_base(1024, 128)
    assert bound.b_star == pytest.approx(4293.8, rel=1e-3)
    assert bound.b_safe == pytest.approx(6020, rel=2e-3)
    assert len(bound.islands) == 3
    assert bound.islands[0][0] == bound.b_star and bound.islands[-1] == (bound.b_safe, bound.max_base)
    for low, high in bound.islands:
        assert dense_minimum(low * (1 + 1e-5), 128, 1024) >= 0
        assert dense_minimum(low * (1 - 1e-5), 128, 1024) < 0
        assert dense_minimum(min(high, 3e4) * (1 - 1e-5), 128, 1024) >= 0
    for length, base in [(2048, 1.2e4), (4096, 2.7e4), (16384, 2.3e5)]:
        quick = recommended_base(length, 128, safe=False)
        assert quick.b_star == pytest.approx(base, rel=0.04)  # two published digits
        assert quick.b_safe is None and quick.islands == ()


def test_base_of_a_128k_context() -> None:
    assert recommended_base(131072, 128, safe=False).b_star == pytest.approx(4.87e6, rel=0.02)


def test_unrotated_dims_lift_the_bound() -> None:
    rng = np.random.default_rng(0)
    for base in 10 ** rng.uniform(0.1, 7, 20):
        assert max_length(float(base), 64, pass_through=64, limit=5000) is None
    quarter = max_length(1e3, 96, pass_through=32, limit=1 << 20)
    plain = max_length(1e3, 96)
    assert plain is not None and (quarter is None or quarter > plain)
    assert (
        recommended_base(1024, 96, pass_through=32, safe=False).b_star < recommended_base(1024, 96, safe=False).b_star
    )


def test_few_dims_may_have_no_base() -> None:
    with pytest.raises(ValueError, match="max_base"):
        recommended_base(1024, 4)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: max_length(1e4, 127), "dim"),
        (lambda: max_length(1.0, 128), "base"),
        (lambda: max_length(1e4, 128, limit=0), "limit"),
        (lambda: max_length(1e4, 128, pass_through=-2), "pass_through"),
        (lambda: recommended_base(1, 128), "length"),
        (lambda: recommended_base(64, 7), "dim"),
        (lambda: recommended_base(64, 8, max_base=0.5), "max_base"),
        (lambda: similarity_sum(1, 1e4, 0), "dim"),
    ],
)
def test_refuses_bad_input(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()


def test_check_of_a_model(caplog: pytest.LogCaptureFixture) -> None:
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=1024)
    (report,) = check_base(config)
    assert report.ok and report.max_length is None and report.length == 1024
    assert not caplog.records
    (report,) = check_base(config, 4096)
    assert not report.ok and report.max_length == 1707 and (report.dim, report.pass_through) == (128, 0)
    assert "2.69" in report.advice or "2.7" in report.advice
    assert report.advice in caplog.text


def test_check_reads_the_real_table() -> None:
    scaled = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    )
    (report,) = check_base(scaled, 4096)
    assert report.ok  # four times denser positions: good to about 4 * 1707
    neox = GPTNeoXConfig(
        hidden_size=256,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e2, "partial_rotary_factor": 0.5},
    )
    (report,) = check_base(neox, 100_000)
    assert report.ok and report.pass_through == 64 and "no lower bound" in report.advice
    by_layer = check_base(Gemma3TextConfig(sliding_window=512), 131072)
    assert [r.length for r in sorted(by_layer, key=lambda r: r.base)] == [512, 131072]
    with pytest.raises(ValueError, match="rotary"):
        check_base(GPT2Config(), 1024)
    with pytest.raises(ValueError, match="length"):
        check_base(scaled, 1)
