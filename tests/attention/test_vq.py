"""Attention to quantised keys: every block equals the quadratic form; gradients, states, codebooks and the layer."""

from __future__ import annotations

import pytest
import torch

from danlu.attention.linear.engine import linear_attention
from danlu.attention.linear.feature_maps import HardVQ
from danlu.attention.vq.codebook import VQCodebook, nearest_codes
from danlu.attention.vq.engine import vq_attention
from danlu.attention.vq.layer import VQAttention
from danlu.positions.rotary import Rotary, inverse_frequencies
from reference import linear as dense

D, C = 4, 5
SCALE = D**-0.5


def data(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def inputs(length: int, batch: int = 2, heads: int = 4, kv_heads: int = 2):
    return data(batch, heads, length, D), data(batch, kv_heads, length, D), data(batch, kv_heads, length, 3)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 13])
@pytest.mark.parametrize("block", [1, 3, 4, 20])
def test_every_block_is_the_quadratic_form(length, block):
    q, k, v = inputs(length)
    codebook = data(2, C, D)
    for reach in (None, 0, block // 2, block):
        bias = None if reach is None else data(4, reach + 1)
        out, codes, state = vq_attention(q, k, v, codebook, block=block, bias=bias)
        expected = dense.vq_dense(q, k, v, codebook, scale=SCALE, bias=bias)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(dense.quantised(k, codebook)[:, 1], codebook[1][codes[:, 1]])
    assert state.counts.sum() == 2 * 2 * max(0, length - block)


def turn(x: torch.Tensor, distance: int) -> torch.Tensor:
    """Two pairs (0, 2) and (1, 3) of a head of 4, frequencies 1 and 1/100, as complex numbers."""
    angle = distance * torch.tensor([1.0, 0.01], dtype=torch.float64)
    turned = torch.complex(x[:2], x[2:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag))


@pytest.mark.parametrize("block", [1, 3, 4, 20])
def test_rotation_is_true_inside_the_block_distance_and_stands_still_beyond(block):
    q, k, v = (x.requires_grad_() for x in inputs(11))
    codebook, rotary = data(2, C, D), Rotary(inverse_frequencies(D, 10000.0))
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 3:6] = False
    for real in (None, mask):
        out, _, _ = vq_attention(q, k, v, codebook, block=block, rotary=rotary, mask=real)
        expected = dense.vq_dense(
            q, k, v, codebook, scale=SCALE, mask=real, turn=turn, reach=block, block=None if real is not None else block
        )
        seen = mask if real is not None else torch.ones_like(mask)
        for b in range(2):
            torch.testing.assert_close(out[b][:, seen[b]], expected[b][:, seen[b]], rtol=1e-11, atol=1e-11)
        if real is None:
            weight = torch.randn_like(out)
            found = torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True)
            for a, b in zip(found, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_float32_stays_within_1e_5():
    q, k, v = inputs(50)
    codebook = data(2, C, D)
    wide = vq_attention(q, k, v, codebook, block=8)[0]
    narrow = vq_attention(*(x.float() for x in (q, k, v, codebook)), block=8)[0]
    assert (narrow - wide).abs().max() < 1e-5


@pytest.mark.parametrize("codes", ["one", "unused", "equal keys", "equal codes"])
def test_degenerate_codebooks_and_keys(codes):
    q, k, v = inputs(9)
    codebook = data(2, C, D)
    if codes == "one":
        codebook = codebook[:, :1]
    elif codes == "unused":
        codebook[:, 1:] += 1000.0
    elif codes == "equal keys":
        k = k[:, :, :1].expand_as(k)
    else:
        codebook = codebook[:, :1].expand(-1, 3, -1)
    out = vq_attention(q, k, v, codebook, block=2)[0]
    torch.testing.assert_close(out, dense.vq_dense(q, k, v, codebook, scale=SCALE), rtol=1e-12, atol=1e-12)


def test_a_codebook_that_holds_the_keys_is_exact_softmax_attention():
    q, k, v = data(1, 2, 14, D), data(1, 2, 14, D), data(1, 2, 14, 3)
    out = vq_attention(q, k, v, k[0][:, torch.randperm(14)], block=3)[0]
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)


def test_it_is_linear_attention_with_one_hot_keys():
    q, k, v = inputs(15)
    codebook = data(2, C, D)
    hard = linear_attention(q, k, v, HardVQ(codebook * D**-0.25), chunk=4)[0]
    torch.testing.assert_close(vq_attention(q, k, v, codebook, block=4)[0], hard, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", [(13,), (4, 5, 4), (1,) * 13, (2, 1, 9, 1)])
def test_a_state_goes_on_exactly_from_any_place(sizes):
    q, k, v = inputs(13)
    codebook, bias = data(2, C, D), data(4, 4)
    whole = vq_attention(q, k, v, codebook, block=4, bias=bias)[0]
    state, outs, start = None, [], 0
    for size in sizes:
        part = (x[:, :, start : start + size] for x in (q, k, v))
        out, _, state = vq_attention(*part, codebook, block=4, bias=bias, state=state)
        outs.append(out)
        start += size
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-12, atol=1e-12)
    assert state.codes.shape[2] == 4 and state.counts.sum() == 2 * 2 * 9


def test_packed_documents_are_separate_runs():
    q, k, v = inputs(14)
    codebook, bias = data(2, C, D), data(4, 3)
    # an id that comes back is another document
    segments = torch.tensor([[1] * 3 + [0] * 2 + [1] * 9, [2] * 13 + [4]])
    for block in (2, 4, 20):
        out, _, state = vq_attention(q, k, v, codebook, block=block, bias=bias[:, : block + 1], segment_ids=segments)
        expected = dense.vq_dense(q, k, v, codebook, scale=SCALE, bias=bias[:, : block + 1], segments=segments)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        alone = vq_attention(*(x[:1, :, 5:] for x in (q, k, v)), codebook, block=block, bias=bias[:, : block + 1])[0]
        torch.testing.assert_close(out[:1, :, 5:], alone, rtol=1e-12, atol=1e-12)
    # going on: the first token is of the last document, then a new one comes
    more = [torch.cat((x, y), 2) for x, y in zip((q, k, v), inputs(6), strict=True)]
    tail = torch.tensor([[9, 9, 9, 9, 2, 2], [5, 5, 5, 5, 5, 5]])
    whole = torch.cat((segments, torch.tensor([[1] * 4 + [7] * 2, [4] * 6])), 1)
    for block in (2, 20):
        short = bias[:, : block + 1]
        state = vq_attention(q, k, v, codebook, block=block, bias=short, segment_ids=segments)[2]
        rest = (x[:, :, 14:] for x in more)
        out = vq_attention(*rest, codebook, block=block, bias=short, segment_ids=tail, state=state)[0]
        expected = dense.vq_dense(*more, codebook, scale=SCALE, bias=short, segments=whole)[:, :, 14:]
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_loud_document_leaves_nothing_in_the_means():
    q, k, v = (x.float() for x in inputs(12))
    codebook = data(2, C, D).float()
    segments = torch.tensor([[0] * 6 + [1] * 6] * 2)
    v[:, :, :6] *= 1e30
    out = vq_attention(q, k, v, codebook, block=2, segment_ids=segments)[0]
    alone = vq_attention(*(x[:, :, 6:] for x in (q, k, v)), codebook, block=2)[0]
    torch.testing.assert_close(out[:, :, 6:], alone)


@pytest.mark.parametrize("block", [1, 2, 4, 20])
def test_padding_on_either_side_and_in_the_middle_changes_nothing(block):
    q, k, v = inputs(11, batch=3)
    codebook, bias = data(2, C, D), data(4, min(block, 3) + 1)
    mask = torch.tensor([[0] * 5 + [1] * 6, [1] * 4 + [0] * 5 + [1] * 2, [1, 0] * 5 + [1]]).bool()
    out, _, _ = vq_attention(q, k, v, codebook, block=block, bias=bias, mask=mask)
    expected = dense.vq_dense(q, k, v, codebook, scale=SCALE, bias=bias, mask=mask)
    for b in range(3):
        torch.testing.assert_close(out[b][:, mask[b]], expected[b][:, mask[b]], rtol=1e-12, atol=1e-12)
    assert out.isfinite().all()
    # in two calls, of which the second knows no mask where it is all real
    first = (x[:, :, :8] for x in (q, k, v))
    state = vq_attention(*first, codebook, block=block, bias=bias, mask=mask[:, :8])[2]
    rest = (x[:, :, 8:] for x in (q, k, v))
    again = vq_attention(*rest, codebook, block=block, bias=bias, mask=mask[:, 8:], state=state)[0]
    for b in range(3):
        real = mask[b, 8:]
        torch.testing.assert_close(again[b][:, real], out[b, :, 8:][:, real], rtol=1e-12, atol=1e-12)


def test_the_jacobian_is_lower_triangular():
    q, k, v = inputs(8, batch=1)
    codebook = data(2, C, D)

    def by_position(q, k, v):
        return vq_attention(q, k, v, codebook, block=3)[0].sum((0, 1, 3))

    for jacobian in torch.autograd.functional.jacobian(by_position, (q, k, v)):
        assert jacobian.abs().sum((1, 2, 4)).triu(1).max() == 0


def test_gradients_stop_at_the_cache_and_are_straight_through_inside_the_window():
    q, k, v = (x.requires_grad_() for x in inputs(11))
    codebook, bias = data(2, C, D), data(4, 3).requires_grad_()
    weight = data(2, 4, 11, 3)
    for block in (2, 3, 20):
        found = torch.autograd.grad(
            (vq_attention(q, k, v, codebook, block=block, bias=bias)[0] * weight).sum(), (q, k, v, bias)
        )
        reference = dense.vq_dense(q, k, v, codebook, scale=SCALE, bias=bias, block=block)
        expected = torch.autograd.grad((reference * weight).sum(), (q, k, v, bias))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    out, _, state = vq_attention(q, k, v, codebook, block=3)
    (dk,) = torch.autograd.grad(out[:, :, 9:].sum(), k)
    assert (dk[:, :, :6] == 0).all() and (dk[:, :, 6:] != 0).any()
    assert not any(x.requires_grad for x in state if x is not None)


def test_logits_of_a_thousand_are_exact():
    q, k, v = inputs(12)
    codebook = data(2, C, D)
    out = vq_attention(100 * q.float(), k.float(), v.float(), 10 * codebook.float(), block=3)[0]
    expected = dense.vq_dense(100 * q, k, v, 10 * codebook, scale=SCALE)
    assert out.isfinite().all() and (out - expected).abs().max() < 2e-3


def test_a_later_token_moves_no_earlier_output_by_a_bit():
    q, k, v = (x.float() for x in inputs(13))
    codebook = data(2, C, D).float()
    before = vq_attention(q, k, v, codebook, block=8)[0]
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 10:] *= 1e4
    assert torch.equal(vq_attention(*changed, codebook, block=8)[0][:, :, :10], before[:, :, :10])


def test_counts_go_on_beyond_256_and_means_do_not_grow_in_bfloat16():
    ones = torch.ones(1, 1, 2000, 2, dtype=torch.bfloat16)
    out, _, state = vq_attention(ones, ones, ones, torch.ones(1, 1, 2), block=10)
    assert state.counts.item() == 1990 and state.counts.dtype == torch.int64
    assert state.means.dtype == torch.float32 and torch.allclose(state.means, torch.ones(1, 1, 1, 2))
    assert out.dtype == torch.bfloat16 and (out == 1).all()


def test_no_tokens_give_no_output():
    q, k, v = inputs(0)
    assert vq_attention(q, k, v, data(2, C, D))[0].shape == (2, 4, 0, 3)
    assert vq_attention(q.requires_grad_(), k, v, data(2, C, D))[0].shape == (2, 4, 0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"bias": torch.zeros(4, 5)}, r"bias must be \(heads, reach \+ 1\) = \(4, 1 to 4\)"),
        ({"codebook": torch.zeros(1, 3, D)}, r"codebook must be \(kv_heads, codes, dim\) = \(2, >= 1, 4\)"),
        ({"codebook": torch.zeros(2, 0, D)}, "codebook must be"),
        ({"mask": torch.ones(2, 2).bool()}, "mask must be"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    q, k, v = inputs(5)
    arguments = {"q": q, "k": k, "v": v, "codebook": data(2, C, D), "block": 3}
    with pytest.raises(ValueError, match=message):
        vq_attention(**(arguments | change))


# codebooks


def test_one_step_of_the_average_by_hand():
    codebook = VQCodebook(1, 2, 2, decay=0.9)
    codebook.set(torch.tensor([[[0.0, 0.0], [10.0, 10.0]]]))
    k = torch.tensor([[[[1.0, 0.0], [9.0, 9.0], [2.0, 0.0], [500.0, 0.0]]]])
    codes = nearest_codes(k, codebook.codebook)
    assert codes.tolist() == [[[0, 1, 0, 1]]]
    codebook.record(k, codes, torch.tensor([[True, True, True, False]]))
    assert torch.equal(codebook.counts, torch.ones(1, 2))  # nothing moves before the step is over
    codebook.apply_pending()
    torch.testing.assert_close(codebook.counts, torch.tensor([[0.9 + 0.1 * 2, 0.9 + 0.1 * 1]]))
    torch.testing.assert_close(codebook.sums, torch.tensor([[[0.3, 0.0], [9.0 + 0.9, 9.0 + 0.9]]]))
    torch.testing.assert_close(codebook.codebook, torch.tensor([[[0.3 / 1.1, 0.0], [9.9, 9.9]]]))
    codebook.apply_pending()
    assert int(codebook.steps) == 1


def test_a_code_without_keys_keeps_its_place_until_its_count_is_below_a_hundredth():
    codebook = VQCodebook(1, 2, 1, decay=0.5)
    codebook.set(torch.tensor([[[0.0], [8.0]]]))
    k = torch.zeros(1, 1, 3, 1)
    for _ in range(6):
        codebook.record(k, nearest_codes(k, codebook.codebook))
        codebook.apply_pending()
    assert codebook.codebook[0, 1, 0] == 8.0
    codebook.record(k, nearest_codes(k, codebook.codebook))
    codebook.apply_pending()
    assert codebook.codebook[0, 1, 0] == pytest.approx(8 * 0.5**7 / 0.01)


def test_bad_batches_teach_nothing_and_a_frozen_codebook_does_not_move():
    codebook = VQCodebook(2, 3, 2)
    before = codebook.codebook.clone()
    k = torch.full((1, 2, 4, 2), torch.nan)
    codebook.record(k, torch.zeros(1, 2, 4, dtype=torch.int64))
    codebook.apply_pending()
    codebook.record(torch.ones(1, 2, 4, 2), torch.zeros(1, 2, 4, dtype=torch.int64), torch.zeros(1, 4).bool())
    codebook.apply_pending()
    assert torch.equal(codebook.codebook, before)
    codebook.frozen = True
    codebook.record(torch.ones(1, 2, 4, 2), torch.zeros(1, 2, 4, dtype=torch.int64))
    codebook.apply_pending()
    assert torch.equal(codebook.codebook, before)


def test_dead_codes_become_keys_of_the_batch_on_request():
    codebook = VQCodebook(1, 3, 2, decay=0.5, revive_below=0.4)
    codebook.set(torch.tensor([[[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]]]))
    k = torch.randn(2, 1, 20, 2)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[:, 10:] = False
    k[:, :, 10:] = 7.0
    for _ in range(2):
        codebook.record(k, nearest_codes(k[:, :, :20], codebook.codebook).masked_fill(~mask[:, None], 0), mask)
        codebook.apply_pending()
    real = k[:, :, :10].reshape(-1, 2)
    for code in codebook.codebook[0, 1:]:
        assert (real - code).abs().sum(-1).min() == 0
    assert (codebook.counts[0, 1:] == 1).all()


def test_codebooks_stay_in_float32_and_follow_their_seed():
    before = torch.get_rng_state()
    codebook = VQCodebook(2, 3, 4, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(codebook.codebook, VQCodebook(2, 3, 4, seed=1).codebook)
    assert not torch.equal(codebook.codebook, VQCodebook(2, 3, 4).codebook)
    kept = codebook.sums.clone()
    codebook.bfloat16()
    assert codebook.sums.dtype == torch.float32 and torch.equal(codebook.sums, kept)
    assert set(codebook.state_dict()) == {"sums", "counts", "steps"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"codes": 0}, "kv_heads, codes and dim must be at least 1, got 2, 0 and 4"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"revive_below": -1}, "revive_below must be at least 0"),
    ],
)
def test_wrong_arguments_of_a_codebook_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        VQCodebook(**({"kv_heads": 2, "codes": 3, "dim": 4} | words))
    with pytest.raises(ValueError, match="codebook must have shape"):
        VQCodebook(2, 3, 4).set(torch.zeros(1, 3, 4))


def _rank(rank: int, world: int, path: str) -> None:
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=world)
    codebook = VQCodebook(1, 3, 2, decay=0.5, revive_below=0.3)
    for step in range(3):
        k = torch.randn(1, 1, 8, 2, generator=torch.Generator().manual_seed(2 * step + rank))
        codebook.record(k, nearest_codes(k, codebook.codebook))
        codebook.apply_pending()
    torch.save(codebook.state_dict(), f"{path}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_add_their_keys(tmp_path):
    torch.multiprocessing.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in one:
        assert torch.equal(one[name], two[name])
    whole = VQCodebook(1, 3, 2, decay=0.5)
    generators = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    k = torch.cat([torch.randn(1, 1, 8, 2, generator=g) for g in generators], 2)
    whole.record(k, nearest_codes(k, whole.codebook))
    whole.apply_pending()
    assert whole.pending_counts.min() < 0 and int(one["steps"]) == 3


# the layer


def layer(**words) -> VQAttention:
    sizes = {"hidden_size": 12, "heads": 4, "kv_heads": 2, "head_dim": D, "codes": C, "block": 3, "position": "bias"}
    mixer = VQAttention(**(sizes | words)).double()
    if mixer.position_bias is not None:
        torch.nn.init.normal_(mixer.position_bias)
    return mixer


def test_a_layer_is_softmax_over_quantised_normalised_keys():
    mixer, x = layer().eval(), data(2, 10, 12)

    def heads(projection, n):
        return projection(x).unflatten(-1, (n, D)).transpose(1, 2)

    q, k, v = heads(mixer.q_proj, 4), heads(mixer.k_proj, 2), heads(mixer.v_proj, 2)
    q, k = (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
    out = dense.vq_dense(q, k, v, mixer.codebook.codebook.double(), scale=SCALE, bias=mixer.position_bias)
    expected = mixer.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, torch.arange(10)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("position", ["bias", "rotary"])
def test_a_cached_layer_is_the_uncached_layer(position):
    mixer, x = layer(position=position).eval(), data(2, 10, 12)
    places = torch.arange(10)
    whole = mixer(x, places)
    for sizes in ((10,), (4, 3, 1, 1, 1), (1,) * 10):
        cache, outs, start = mixer.make_cache(), [], 0
        for size in sizes:
            outs.append(mixer(x[:, start : start + size], places[start : start + size], cache=cache))
            start += size
        torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-11, atol=1e-11)
    assert cache.get_seq_length() == 10 and cache.get_mask_sizes(2) == (12, 0)
    assert sum(x.numel() for x in cache.state if x is not None) == 2 * 2 * (C * (1 + D) + 3 * (1 + D))


def test_padding_and_cache_rows_of_a_layer():
    mixer, x = layer().eval(), data(2, 9, 12)
    mask = torch.tensor([[False] * 4 + [True] * 5, [True] * 9])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    alone = mixer(x[:1, 4:], torch.arange(5))
    cache = mixer.make_cache()
    mixer(x[:, :7], places[:, :7], mask[:, :7], cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 3]))
    rows = torch.tensor([0, 0])
    outs = [mixer(x[rows, i : i + 1], places[rows, i : i + 1], mask[rows, : i + 1], cache) for i in (7, 8)]
    torch.testing.assert_close(torch.cat(outs, 1), alone[:, 3:].expand(2, -1, -1), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="VQCache cannot take tokens back"):
        cache.crop(-1)


def test_codebooks_move_at_the_next_training_forward_and_not_in_evaluation():
    mixer, x = layer(), data(2, 10, 12)
    places = torch.arange(10)
    first = mixer.codebook.codebook.clone()
    mixer(x, places)
    assert torch.equal(mixer.codebook.codebook, first) and mixer.commitment_loss > 0
    mixer(x, places)
    second = mixer.codebook.codebook.clone()
    assert not torch.equal(second, first)
    mixer.eval()
    for _ in range(2):
        mixer(x, places)
    assert torch.equal(mixer.codebook.codebook, second) and mixer.commitment_loss is None


def test_the_commitment_loss_is_the_formula_and_pulls_keys_to_their_codes():
    mixer, x = layer(normalise=False), data(2, 6, 12)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    mixer(x, torch.arange(6), mask)
    k = mixer.k_proj(x).unflatten(-1, (2, D)).transpose(1, 2)
    distance = (k - dense.quantised(k, mixer.codebook.codebook.double())).square().sum((1, 3))
    torch.testing.assert_close(mixer.commitment_loss.double(), distance[mask].mean(), rtol=1e-5, atol=0)
    before = mixer.commitment_loss.item()
    (gradient,) = torch.autograd.grad(mixer.commitment_loss, mixer.k_proj.weight)
    with torch.no_grad():
        mixer.k_proj.weight -= 0.01 * gradient
    mixer.codebook.frozen = True
    mixer(x, torch.arange(6), mask)
    assert mixer.commitment_loss < before


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_sees_one_codebook_and_counts_keys_once(reentrant):
    from torch.utils.checkpoint import checkpoint

    plain, saved = layer(), layer()
    saved.load_state_dict(plain.state_dict())
    places = torch.arange(10)
    for step in range(3):
        x = data(2, 10, 12).requires_grad_()
        gradients = []
        for mixer, run in ((plain, plain), (saved, lambda *a: checkpoint(saved, *a, use_reentrant=reentrant))):
            mixer.zero_grad()
            run(x, places).square().sum().backward()
            gradients.append(mixer.k_proj.weight.grad.clone())
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(plain.codebook.codebook, saved.codebook.codebook)
        assert int(saved.codebook.steps) == step


def test_truncated_back_propagation_carries_the_state():
    mixer, x = layer(), data(1, 12, 12)
    mixer.codebook.frozen = True
    whole = mixer(x, torch.arange(12))
    cache = mixer.make_cache()
    mixer(x[:, :6], torch.arange(6), cache=cache).sum().backward()
    out = mixer(x[:, 6:], torch.arange(6, 12), cache=cache)
    torch.testing.assert_close(out, whole[:, 6:], rtol=1e-11, atol=1e-11)
    out.sum().backward()


def test_a_layer_in_bfloat16_keeps_its_codebook_and_state_wide():
    mixer = layer().bfloat16().eval()
    cache = mixer.make_cache()
    out = mixer(torch.randn(1, 9, 12).bfloat16(), torch.arange(9), cache=cache)
    assert out.dtype == torch.bfloat16 and cache.state.means.dtype == torch.float32
    assert mixer.codebook.codebook.dtype == torch.float32


def test_positions_are_rotary_unless_a_bias_is_asked_for():
    assert VQAttention(hidden_size=8, heads=2).position_bias is None
    mixer = VQAttention(hidden_size=8, heads=2, position="bias", block=7, window=3)
    assert mixer.position_bias.shape == (2, 4) and mixer.rotary is None
    with pytest.raises(ValueError, match="dim must be an even number"):
        VQAttention(hidden_size=6, heads=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"codes": 0}, "codes and block must be at least 1, got 0 and 3"),
        ({"position": "none"}, 'position must be "rotary" or "bias"'),
        ({"window": 4}, "window must be between 0 and block = 3, got 4"),
        ({"kv_heads": 3}, "kv_heads must divide heads = 4, got 3"),
        ({"hidden_size": 0}, "hidden_size and heads must be at least 1"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    ],
)
def test_wrong_sizes_of_a_layer_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        layer(**words)


def test_a_reset_layer_is_the_fresh_one():
    mixer = layer()
    mixer(data(2, 5, 12), torch.arange(5))
    mixer.reset_parameters()
    assert (mixer.position_bias == 0).all()
    assert torch.equal(mixer.codebook.codebook, layer().codebook.codebook)
    assert int(mixer.codebook.steps) == 0
