"""The softmax state and what is built on it, against a dense softmax in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.attention.streaming.state import SoftmaxState, attention_over_parts, chunked_attention
from danlu.lab.measuring import peak_bytes
from reference.dense import expand_groups, masked_attention, window_visible

F64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def blocks(scores: Tensor, values: Tensor, size: int) -> list[SoftmaxState]:
    empty = SoftmaxState.empty(scores.shape[:3], values.shape[-1], dtype=scores.dtype)
    return [empty.update(s, v) for s, v in zip(scores.split(size, -1), values.split(size, 2), strict=True)]


def dense(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    return p @ expand_groups(values, scores.shape[1]), scores.logsumexp(-1)


def same(state: SoftmaxState, expected: tuple[Tensor, Tensor], tolerance: float = 1e-12) -> None:
    for found, wanted in zip(state.finalize(), expected, strict=True):
        assert torch.allclose(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [1, 7, 23, 50])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_any_order_of_merging_gives_the_dense_softmax(size, dtype):
    scores, values = 3 * draw(2, 4, 3, 23), draw(2, 2, 23, 5, seed=1)
    expected = dense(scores, values)
    tolerance = 1e-12 if dtype == F64 else 2e-6
    states = blocks(scores.to(dtype), values.to(dtype), size)
    shuffled = [states[i] for i in torch.randperm(len(states), generator=torch.Generator().manual_seed(2))]
    for order in (states, states[::-1], shuffled):
        total = order[0]
        for state in order[1:]:
            total = total.merge(state)
        same(total, expected, tolerance)
    while len(states) > 1:
        states = [a.merge(b) for a, b in zip(states[::2], states[1::2], strict=False)] + states[len(states) // 2 * 2 :]
    same(states[0], expected, tolerance)
    grown = SoftmaxState.empty((2, 4, 3), 5, dtype=dtype)
    for s, v in zip(scores.to(dtype).split(size, -1), values.to(dtype).split(size, 2), strict=True):
        grown = grown.update(s, v)
    same(grown, expected, tolerance)


@pytest.mark.parametrize("size", [5000.0, 1e-4])
def test_huge_scores_hidden_keys_and_rows_without_a_key(size):
    scores, values = size * draw(1, 2, 4, 9), draw(1, 2, 9, 3, seed=1)
    scores[:, :, 1] = -torch.inf
    scores[:, :, 2, 3:] = -torch.inf
    scores[:, :, 3, :6] = -torch.inf
    state, *others = blocks(scores, values, 2)
    for other in others:
        state = other.merge(state)
    same(state, dense(scores, values))
    out, lse = state.finalize()
    assert torch.equal(out[:, :, 1], torch.zeros(1, 2, 3, dtype=F64)) and (lse[:, :, 1] == -torch.inf).all()
    near = torch.full((1, 1, 1, 70_000), 3.0)
    assert SoftmaxState.empty((1, 1, 1), 1).update(near, torch.ones(1, 1, 70_000, 1)).z.item() == 70_000


def test_the_empty_state_is_an_exact_identity():
    scores, values = draw(1, 2, 3, 5), draw(1, 2, 5, 4, seed=1)
    empty = SoftmaxState.empty((1, 2, 3), 4, dtype=F64)
    state = empty.update(scores, values)
    for merged in (empty.merge(state), state.merge(empty)):
        assert all(torch.equal(a, b) for a, b in zip(vars(merged).values(), vars(state).values(), strict=True))
    both = empty.merge(empty)
    assert torch.equal(both.finalize()[0], torch.zeros(1, 2, 3, 4, dtype=F64)) and not both.y.isnan().any()
    assert state.update(scores[..., :0], values[:, :, :0]) is state


def test_from_output_and_back_and_merging_with_a_kernel():
    q, k, v = draw(1, 2, 4, 8), draw(1, 2, 10, 8, seed=1), draw(1, 2, 10, 8, seed=2)
    out, lse = chunked_attention(q, k[:, :, :6], v[:, :, :6], return_lse=True)
    state = SoftmaxState.from_output(out, lse)
    same(state, (out, lse))
    state = state.update(q @ k[:, :, 6:].mT / 8**0.5, v[:, :, 6:])
    same(state, masked_attention(q, k, v, torch.ones(4, 10, dtype=torch.bool)))
    blank = SoftmaxState.from_output(torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -torch.inf))
    assert blank.z.item() == 0 and not blank.y.isnan().any()


def test_state_gradients_and_dropout_after_the_softmax():
    scores, values = draw(1, 2, 3, 6).requires_grad_(), draw(1, 1, 6, 2, seed=1).requires_grad_()

    def run(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        a, b = blocks(s, v, 4)
        return a.merge(SoftmaxState.from_output(*b.finalize())).finalize()

    assert torch.autograd.gradcheck(run, (scores, values))
    keep = (draw(1, 2, 3, 6, seed=4) > -0.5).double() / 0.7
    first = SoftmaxState.empty((1, 2, 3), 2, dtype=F64).update(scores[..., :4], values[:, :, :4], keep[..., :4])
    out, lse = first.update(scores[..., 4:], values[:, :, 4:], keep[..., 4:]).finalize()
    assert torch.allclose(out, (scores.softmax(-1) * keep) @ values.expand(1, 2, 6, 2), atol=1e-14)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-14)


def test_size_is_constant_and_moves_keep_the_state():
    state = SoftmaxState.empty((1, 2, 3), 4, dtype=F64)
    assert state.numbers() == 2 * 3 * (4 + 2)
    grown = state.update(draw(1, 2, 3, 50), draw(1, 2, 50, 4))
    assert grown.numbers() == state.numbers()
    single = grown.to(dtype=torch.float32)
    assert single.y.dtype == single.m.dtype == torch.float32 and single.to(device="cpu").z.dtype == torch.float32
    assert torch.allclose(single.finalize()[0].double(), grown.finalize()[0], atol=1e-6)


DISTRIBUTED = """
import os, sys
import torch, torch.distributed as dist
from danlu.attention.streaming.state import SoftmaxState
dist.init_process_group("gloo")
rank = dist.get_rank()
g = torch.Generator().manual_seed(0)
scores, values = torch.randn(1, 2, 3, 8, generator=g) * 9, torch.randn(1, 2, 8, 4, generator=g)
scores[:, :, 0, 4:] = -torch.inf
scores[:, :, 1] = -torch.inf
empty = SoftmaxState.empty((1, 2, 3), 4)
half = slice(4 * rank, 4 * rank + 4)
whole = empty.update(scores, values).finalize()
both = empty.update(scores[..., half], values[:, :, half]).all_reduce().finalize()
good = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, both))
dist.barrier()
print("equal" if good else "DIFFERENT", flush=True)
dist.destroy_process_group()
os._exit(0)
"""


def test_halves_of_the_keys_on_two_processes_are_the_whole(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(DISTRIBUTED)
    source = str(Path(__file__).parents[2] / "src")
    setting = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29631",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    setting["PYTHONPATH"] = source + os.pathsep + setting.get("PYTHONPATH", "")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)], env={**setting, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["equal", "equal"]


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 5},
    "padding": {"causal": True, "mask": "padding"},
    "heads": {"mask": "heads"},
    "additive": {"causal": True, "mask": "additive"},
    "segments": {"causal": True, "segment_ids": "segments"},
    "bias": {"causal": True, "window": 9, "score_bias": "slope"},
    "rule": {"score_bias": "even"},
}


def options(case: str, shape: tuple[int, int, int, int]) -> tuple[dict, Tensor, Tensor | None]:
    """Arguments of a case, and the same as dense (visible, additive)."""
    batch, heads, n_rows, n_keys = shape
    given = dict(CASES[case])
    visible = torch.ones(shape, dtype=torch.bool)
    if given.get("causal"):
        visible = visible & window_visible(n_rows, n_keys, given.get("window", n_keys))
    bias = None
    if given.get("mask") == "padding":
        given["mask"] = torch.arange(n_keys) >= torch.tensor([[0], [4]])
        visible = visible & given["mask"][:, None, None]
    elif given.get("mask") == "heads":
        given["mask"] = draw(1, heads, n_rows, n_keys, seed=8) > 0.3
        visible = visible & given["mask"]
    elif given.get("mask") == "additive":
        given["mask"] = bias = draw(batch, 1, n_rows, n_keys, seed=8)
    if "segment_ids" in given:
        given["segment_ids"] = ids = torch.stack((torch.arange(n_keys) // 6, torch.arange(n_keys) * 2 // n_keys))
        visible = visible & (ids[:, n_keys - n_rows :, None] == ids[:, None, :])[:, None]
    slots = torch.arange(n_keys - n_rows, n_keys)[:, None], torch.arange(n_keys)
    if given.get("score_bias") == "slope":
        slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=F64)[:heads, None, None]
        given["score_bias"] = lambda i, j: -slopes * (i[:, None] - j)
        bias = -slopes * (slots[0] - slots[1])
    elif given.get("score_bias") == "even":
        given["score_bias"] = lambda i, j: (i[:, None] + j) % 3 != 0
        visible = visible & ((slots[0] + slots[1]) % 3 != 0)
    return given, visible, bias


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunks", [(1, 1), (7, 5), (64, 64)])
def test_chunked_attention_equals_dense_forward_and_backward(case, chunks):
    shape = (2, 4, 13, 19)
    given, visible, bias = options(case, shape)
    q, k, v = draw(2, 4, 13, 8), draw(2, 2, 19, 8, seed=1), draw(2, 2, 19, 6, seed=2)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = chunked_attention(*leaves, **given, q_chunk=chunks[0], kv_chunk=chunks[1], return_lse=True, scale=0.6)
    copies = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted, wanted_lse = masked_attention(*copies, visible, scale=0.6, bias=bias)
    assert torch.allclose(out, wanted, atol=1e-12) and torch.allclose(lse, wanted_lse, atol=1e-12)
    weight, finite = draw(*out.shape, seed=5), wanted_lse.isfinite()
    for o, level in ((out, lse), (wanted, wanted_lse)):
        ((o * weight).sum() + level[finite].square().sum()).backward()
    for a, b in zip(leaves, copies, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-11)


def test_block_gradients_by_finite_differences():
    q, k, v = (draw(1, 2, 5, 3, seed=s).requires_grad_() for s in range(3))
    mask = torch.ones(1, 5, dtype=torch.bool)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_attention(*tensors, causal=True, mask=mask, q_chunk=2, kv_chunk=3, return_lse=True)

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_single_precision_gradients_are_those_of_the_host_kernel():
    q, k, v = (draw(1, 2, 40, 16, seed=s, dtype=torch.float32).requires_grad_() for s in range(3))
    mask = torch.ones(1, 40, dtype=torch.bool)
    grads = []
    for out in (
        chunked_attention(q, k, v, causal=True, mask=mask, q_chunk=8, kv_chunk=8),
        F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ):
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_half_precision_errs_no_more_than_the_host_kernel():
    q, k, v = (draw(1, 2, 200, 32, seed=s, dtype=torch.bfloat16) for s in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    host = (F.scaled_dot_product_attention(q, k, v, is_causal=True).double() - exact).abs().max()
    ids = torch.zeros(1, 200, dtype=torch.long)
    out = chunked_attention(q, k, v, causal=True, segment_ids=ids, q_chunk=64, kv_chunk=32)
    assert out.dtype == torch.bfloat16 and (out.double() - exact).abs().max() <= 2 * host


def test_masked_attention_takes_linear_memory():
    def peak(length: int) -> int:
        q, k, v = (draw(1, 1, length, 16, seed=s, dtype=torch.float32).requires_grad_() for s in range(3))
        ids = torch.arange(length)[None] // 300

        def run() -> None:
            chunked_attention(q, k, v, segment_ids=ids, q_chunk=64, kv_chunk=64).sum().backward()

        return peak_bytes(run)

    assert peak(4096) < 2.5 * peak(2048) < 0.2 * 4096 * 4096 * 4


@pytest.mark.parametrize("causal", [True, False])
def test_unlike_parts_of_a_cache_are_one_attention(causal):
    q = draw(2, 4, 5, 8)
    pieces = [(draw(2, heads, n, 8, seed=n), draw(2, heads, n, 6, seed=n + 1)) for heads, n in ((1, 7), (4, 3), (2, 9))]
    per_key = draw(2, 1, 1, 3, seed=9)
    parts = [(*pieces[0], -0.7), (*pieces[1], per_key), pieces[2]]
    k = torch.cat([expand_groups(k, 4) for k, _ in pieces], 2)
    v = torch.cat([expand_groups(v, 4) for _, v in pieces], 2)
    bias = torch.cat(
        (torch.full((2, 1, 5, 7), -0.7, dtype=F64), per_key.expand(2, 1, 5, 3), torch.zeros(2, 1, 5, 9)), -1
    )
    visible = torch.ones(5, 19, dtype=torch.bool)
    if causal:
        visible = window_visible(5, 19, 19)
        visible[:, :10] = True
    out, lse = attention_over_parts(q, parts, causal=causal, return_lse=True)
    wanted, wanted_lse = masked_attention(q, k, v, visible, bias=bias)
    assert torch.allclose(out, wanted, atol=1e-12) and torch.allclose(lse, wanted_lse, atol=1e-12)


def test_parts_that_are_empty_hidden_or_single():
    q, k, v = draw(1, 2, 3, 8), draw(1, 2, 5, 8, seed=1), draw(1, 2, 5, 8, seed=2)
    alone = attention_over_parts(q, [(k, v)])
    hidden = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert torch.allclose(attention_over_parts(q, [(k[:, :, :0], v[:, :, :0]), (k, v)]), alone, atol=1e-14)
    assert torch.allclose(attention_over_parts(q, [(k, v), (k, v, hidden)]), alone, atol=1e-14)
    assert torch.equal(attention_over_parts(q, [(k, v, hidden)]), torch.zeros_like(q))
    learnt = torch.tensor(0.3, dtype=F64, requires_grad=True)
    attention_over_parts(q, [(k[:, :, :2], v[:, :, :2], learnt), (k[:, :, 2:], v[:, :, 2:])]).sum().backward()
    assert learnt.grad.abs() > 0


def test_bad_input():
    state = SoftmaxState.empty((1, 2, 3), 4)
    with pytest.raises(ValueError, match="float32 or float64, got torch.float16"):
        SoftmaxState.empty((1, 2, 3), 4, dtype=torch.float16)
    with pytest.raises(ValueError, match="got torch.bfloat16"):
        state.to(dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="SoftmaxState.from_output"):
        state.merge(state.finalize())
    with pytest.raises(ValueError, match="states must agree"):
        state.merge(SoftmaxState.empty((1, 2, 3), 5))
    with pytest.raises(ValueError, match="scores must be"):
        state.update(torch.zeros(1, 2, 3, 6), torch.zeros(1, 2, 5, 4))
    with pytest.raises(ValueError, match="lse must be"):
        SoftmaxState.from_output(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2))
    q, k = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    for given, message in (
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, "mask must be"),
        ({"segment_ids": torch.zeros(1, 4)}, "segment_ids must be"),
        ({"window": 3}, "needs causal=True"),
        ({"causal": True, "window": 0}, "window must be >= 1"),
        ({"q_chunk": 0}, "must be >= 1, got 0"),
        ({"mask": torch.zeros(1, 1, 5, 5, requires_grad=True)}, "must not require a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            chunked_attention(q, k, k, **given)
    with pytest.raises(ValueError, match="dividing heads"):
        chunked_attention(q[:, :3], k, k)
    with pytest.raises(ValueError, match="one dtype"):
        chunked_attention(q, k, k.double())
    with pytest.raises(ValueError, match="Lq <= Lk"):
        chunked_attention(q, k[:, :, :3], k[:, :, :3], causal=True)
    with pytest.raises(ValueError, match="non-empty list"):
        attention_over_parts(q, [])
