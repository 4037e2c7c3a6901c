"""Attention put together from parts against dense softmax: values, log-sum-exps, gradients, routes."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from danlu.kernels import chunked, vendor
from danlu.kernels.flash import attend, choose_route, merge
from danlu.kernels.regions import Part
from reference import dense

BAND_AND_REST = [Part(1, 1, nearest=5), Part(0, 0, farthest=5)]


def draw(batch=2, heads=4, kv_heads=2, n_queries=13, n_keys=13, dim=8, value_dim=8, dtype=torch.float64):
    def one(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

    queries = [one(batch, heads, n_queries, dim) for _ in range(2)]
    keys = [one(batch, kv_heads, n_keys, dim) for _ in range(2)]
    return queries, keys, one(batch, kv_heads, n_keys, value_dim)


def reference(queries, keys, value, parts, scale=None, softcap=None, bias=None):
    """One score matrix, each entry from the part that holds its pair."""
    heads, n_queries, dim = queries[0].shape[1:]
    n_keys = value.shape[2]
    distance, slots = dense.distances(n_queries, n_keys), torch.arange(n_keys)
    scores = torch.full((queries[0].shape[0], heads, n_queries, n_keys), -math.inf, dtype=queries[0].dtype)
    for part in parts:
        product = queries[part.query] @ dense.expand_groups(keys[part.key], heads).mT
        product = product * (dim**-0.5 if scale is None else scale)
        if softcap is not None:
            product = softcap * torch.tanh(product / softcap)
        low = -math.inf if part.nearest is None else part.nearest
        high = math.inf if part.farthest is None else part.farthest
        first, last = part.columns or (0, n_keys)
        visible = (distance >= low) & (distance < high) & (slots >= first) & (slots < last)
        scores = torch.where(visible, product, scores)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    return dense.weighted(scores, value)


def gradients(outputs, tensors):
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for x in outputs:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        total = total + (x.masked_fill(x == -math.inf, 0) * weight).sum()
    grads = torch.autograd.grad(total, tensors, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, tensors, strict=True)]


PART_LISTS = {
    "causal": [Part()],
    "all": [Part(nearest=None)],
    "prefix": [Part(nearest=None, columns=(0, 4)), Part(columns=(4, 13))],
    "band and rest": BAND_AND_REST,
    "three": [Part(0, 0, farthest=2), Part(1, 0, nearest=2, farthest=7), Part(1, 1, nearest=7, columns=(2, 13))],
    "sinks": [Part(farthest=3), Part(nearest=3, columns=(0, 2))],
    "blind rows": [Part(nearest=6)],
    "ahead": [Part(nearest=None, farthest=4)],
    "nothing": [Part(nearest=50)],
    "none": [],
}


@pytest.mark.parametrize("name", PART_LISTS)
@pytest.mark.parametrize("route", ["flash", "math"])
@pytest.mark.parametrize("n_queries", [13, 5, 1])
@pytest.mark.parametrize("value_dim", [8, 5, 11])
def test_equals_dense_with_gradients(name, route, n_queries, value_dim):
    queries, keys, value = draw(n_queries=n_queries, value_dim=value_dim)
    parts = PART_LISTS[name]
    if route == "flash":
        result = attend(queries, keys, value, parts)
    else:
        result = chunked.attend(queries, keys, value, parts, 8**-0.5, chunk=4)
    expected = reference(queries, keys, value, parts)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    if not parts or name == "nothing":
        assert (result[1] == -math.inf).all()
        return
    tensors = [*queries, *keys, value]
    for ours, theirs in zip(gradients(result, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_long_enough_for_many_tiles():
    parts = [Part(1, 1, nearest=70), Part(0, 0, farthest=70)]
    queries, keys, value = draw(n_queries=300, n_keys=411)
    result = attend(queries, keys, value, parts, 0.7)
    expected = reference(queries, keys, value, parts, 0.7)
    tensors = [*queries, *keys, value]
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for ours, theirs in zip(gradients(result, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_short_key_tensor_holds_the_last_keys():
    queries, keys, value = draw(n_queries=3)
    short = [keys[0][:, :, -7:], keys[1]]
    for route in (attend, lambda *a: chunked.attend(*a, 8**-0.5)):
        torch.testing.assert_close(
            route(queries, short, value, BAND_AND_REST)[0],
            attend(queries, keys, value, BAND_AND_REST)[0],
            atol=1e-12,
            rtol=0,
        )
    with pytest.raises(ValueError, match="must hold the last 7 keys"):
        attend(queries, [keys[0][:, :, -6:], keys[1]], value, BAND_AND_REST)


@pytest.mark.parametrize("kind", ["bool", "float", "per head"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bias_and_softcap(kind, softcap):
    queries, keys, value = draw()
    shape = (1, 4, 13, 13) if kind == "per head" else (2, 1, 13, 13)
    bias = torch.randn(shape, dtype=torch.float64)
    if kind == "bool":
        bias = bias > 0
        bias[1, :, 3] = False  # a row that sees nothing
    result = attend(queries, keys, value, BAND_AND_REST, softcap=softcap, bias=bias)
    expected = reference(queries, keys, value, BAND_AND_REST, softcap=softcap, bias=bias)
    tensors = [*queries, *keys, value]
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    ours = gradients(result, tensors)
    assert all(torch.isfinite(g).all() for g in ours)
    if kind != "bool":
        for a, b in zip(ours, gradients(expected, tensors), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_query_slots():
    queries, keys, value = draw(n_queries=3)
    slots = torch.tensor([[4, 5, 6], [9, 11, 12]])
    out, lse = attend(queries, keys, value, BAND_AND_REST, q_slots=slots)
    for b in range(2):
        for r in range(3):
            stop = int(slots[b, r]) + 1
            one = attend(
                [q[b : b + 1, :, r : r + 1] for q in queries],
                [k[b : b + 1, :, :stop] for k in keys],
                value[b : b + 1, :, :stop],
                BAND_AND_REST,
            )
            torch.testing.assert_close(out[b : b + 1, :, r : r + 1], one[0], atol=1e-12, rtol=0)
            torch.testing.assert_close(lse[b : b + 1, :, r : r + 1], one[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ["flash", "math"])
def test_dtypes(dtype, route):
    queries, keys, value = draw(n_queries=90, n_keys=90, dtype=dtype)
    parts = [Part(1, 1, nearest=20), Part(0, 0, farthest=20)]
    bias = None if route == "flash" else torch.zeros(1, 1, 90, 90)
    result = attend(queries, keys, value, parts, bias=bias)
    exact = [[x.detach().double().requires_grad_() for x in group] for group in (queries, keys, [value])]
    expected = reference(exact[0], exact[1], exact[2][0], parts)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert result[0].dtype == dtype
    assert result[1].dtype == torch.float32
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=0)
    ours = gradients(result[:1], [*queries, *keys, value])
    theirs = gradients(expected[:1], [*exact[0], *exact[1], *exact[2]])
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=20 * tolerance, rtol=0)


@pytest.mark.parametrize("foldable", [True, False])
def test_grouped_heads_equal_repeated_ones(foldable, monkeypatch):
    queries, keys, value = draw(batch=1, heads=6, kv_heads=2)
    monkeypatch.setattr(vendor, "_foldable", lambda x: foldable)  # one query: products or the kernel
    for n_queries in (13, 4, 1):
        rows = [q[:, :, -n_queries:] for q in queries]
        grouped = attend(rows, keys, value, BAND_AND_REST)
        repeated = attend(rows, [dense.expand_groups(k, 6) for k in keys], dense.expand_groups(value, 6), BAND_AND_REST)
        for a, b in zip(grouped, repeated, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("parts", [BAND_AND_REST, [Part()], [Part(nearest=9)]])
def test_gradcheck(parts):
    queries, keys, value = draw(batch=1, heads=2, kv_heads=1, n_queries=7, n_keys=9, dim=3, value_dim=3)

    def call(*tensors):
        out, lse = attend(tensors[:2], tensors[2:4], tensors[4], parts)
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(call, (*queries, *keys, value))


def test_only_what_is_wanted_gets_a_gradient():
    queries, keys, value = draw()
    frozen = [k.detach() for k in keys]
    attend(queries, frozen, value.detach(), BAND_AND_REST)[0].sum().backward()
    assert queries[0].grad is not None and value.grad is None
    _, lse = attend([q.detach() for q in queries], keys, value, BAND_AND_REST)
    assert torch.autograd.grad(lse.sum(), value)[0].abs().max() == 0


def test_merge_of_any_number_of_parts():
    scores = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    v = torch.randn(9, 5, dtype=torch.float64)
    pieces = [(0, 2), (2, 3), (3, 9)]
    outs = [torch.softmax(scores[..., a:b], -1) @ v[a:b] for a, b in pieces]
    lses = [torch.logsumexp(scores[..., a:b], -1) for a, b in pieces]
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ v, atol=1e-13, rtol=0)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1), atol=1e-13, rtol=0)
    ours = torch.autograd.grad(out.sin().sum(), scores, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad((torch.softmax(scores, -1) @ v).sin().sum(), scores)[0])


def test_merge_with_empty_parts():
    empty = torch.full((3,), -math.inf)
    out, lse = merge([torch.ones(3, 2), torch.zeros(3, 2)], [torch.tensor([1.0, 2.0, -math.inf]), empty])
    assert torch.equal(out, torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(lse, torch.tensor([1.0, 2.0, -math.inf]))
    with pytest.raises(ValueError, match="one log-sum-exp per output, got 0 outputs"):
        merge([], [])


def test_route_rule_is_written_and_logged(caplog, monkeypatch):
    q, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    assert choose_route(q, v, [Part()])[0] == "cpu"
    assert choose_route(q, v, [Part()], softcap=3.0) == ("math", "softcap is given")
    assert choose_route(q, v, [Part()], bias=q)[0] == "math"
    assert choose_route(q, v, [Part()], q_slots=q)[0] == "math"
    assert choose_route(q, v, [Part(nearest=None, farthest=1)])[0] == "math"
    assert choose_route(q[:, :, :1], v, [Part()])[0] == "row"
    assert choose_route(q[:, :, :1].bfloat16(), v.bfloat16(), [Part()])[0] == "cpu"
    strided = torch.zeros(2, 5, 3, 4).transpose(1, 2)
    assert choose_route(strided[:, :, :1], strided, [Part()])[0] == "cpu"
    assert choose_route(q[:, :, :0], v, [Part()])[0] == "math"
    assert choose_route(q.to("meta"), v, [Part()]) == ("math", "no flash kernel for meta tensors")
    with caplog.at_level(logging.DEBUG, "danlu.kernels"):
        attend([q], [q], v, [Part()])
    assert "cpu route" in caplog.text
    monkeypatch.setattr(vendor, "CPU_WORKS", False)
    assert choose_route(q, v, [Part()])[0] == "math"


def test_a_changed_kernel_is_noticed(monkeypatch):
    def log2_kernel(q, k, v, *args, **kwargs):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, *args, **kwargs)
        return out, lse / math.log(2)

    monkeypatch.setattr(vendor, "_cpu_forward_op", lambda: log2_kernel)
    assert not vendor.try_cpu()


def test_no_queries():
    queries, keys, value = draw(n_queries=0)
    out, lse = attend(queries, keys, value, BAND_AND_REST)
    assert out.shape == (2, 4, 0, 8)
    assert lse.shape == (2, 4, 0)


def test_compiles_without_graph_breaks():
    queries, keys, value = draw(n_queries=1, dtype=torch.float32)
    with torch.no_grad():
        compiled = torch.compile(
            lambda q, p, k, m, v: attend([q, p], [k, m], v, BAND_AND_REST), backend="aot_eager", fullgraph=True
        )
        ours = compiled(*queries, *keys, value)
        torch.testing.assert_close(ours[0], attend(queries, keys, value, BAND_AND_REST)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: ([], k, v, [Part()]), "at least one query and one key"),
        (lambda q, k, v: ([q[0], q[1][:, :, :3]], k, v, [Part()]), "queries must all be"),
        (lambda q, k, v: (q, [k[0][..., :3], k[1]], v, [Part()]), "keys must be"),
        (lambda q, k, v: (q, k, v[:, :, :4], [Part()]), "keys must be"),
        (lambda q, k, v: ([x[:, :3] for x in q], k, v, [Part()]), "kv_heads must divide heads = 3, got 2"),
        (lambda q, k, v: (q, k, v.float(), [Part()]), "share one dtype"),
        (lambda q, k, v: (q, k, v, [Part(query=2)]), "parts must name one of 2 queries"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        attend(*change(*draw()))
