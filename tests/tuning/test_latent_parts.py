"""The pieces of a conversion to latent attention, each against arithmetic that is written out."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from context.families import COMMON, tokens, widen
from danlu.positions.rotary import Rotary
from danlu.tuning.latent.fold import attention_change, choose_rotation
from danlu.tuning.latent.moments import collect
from danlu.tuning.latent.norm import silent_scale
from danlu.tuning.latent.rank import low_rank, relative_error
from danlu.tuning.latent.rope import keep, kept_frequencies, mix, pairs_of, split, turning, unpaired
from danlu.tuning.latent.source import affine, read_source
from reference.conversion import turned_scores

GROUPS, HEADS, DIM, WIDTH = 3, 6, 8, 20
FREQUENCIES = torch.tensor([1.0, 0.4, 0.15, 0.05], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps():
    return draw(GROUPS * DIM, WIDTH, seed=1), draw(HEADS * DIM, WIDTH, seed=2)


def moment(seed=3):
    factor = draw(WIDTH, WIDTH, seed=seed) * torch.linspace(0.1, 2, WIDTH, dtype=torch.float64)
    return factor.T @ factor / WIDTH


def mixed(fold=1, pca=True):
    keys, queries = maps()
    weights = turning(FREQUENCIES[::fold], 30)
    return mix(keys, queries, moment(), weights, GROUPS, HEADS, fold, pca=pca)


def scores_of(turned, rest, frequencies, q, k):
    """Scores after conversion: (heads, length, length)."""
    positions = torch.arange(k.shape[1])
    rotary = Rotary(frequencies, "interleaved")
    flat = k.transpose(0, 1).flatten(1)
    out = []
    for s, query in enumerate(q):
        j = s // (HEADS // GROUPS)
        own = slice(j * DIM, (j + 1) * DIM)
        asked = rotary.rotate(query @ turned[:, own].T, positions) @ rotary.rotate(flat @ turned.T, positions).T
        out.append(asked + (query @ rest[:, own].T) @ (flat @ rest.T).T)
    return torch.stack(out)


@pytest.mark.parametrize("fold", [1, 2])
def test_pairs_come_back(fold):
    keys, _ = maps()
    assert torch.equal(unpaired(pairs_of(keys, GROUPS, fold)), keys)
    # group 1, head 2, neighbour 0, second coordinate: row 2 * 8 + 4 + fold
    assert torch.equal(pairs_of(keys, GROUPS, fold)[1, 2, 0, 1], keys[2 * DIM + DIM // 2 + fold])


@pytest.mark.parametrize("pca", [True, False])
def test_mixing_heads_of_one_frequency_changes_no_score(pca):
    q, k = draw(HEADS, 17, DIM, seed=4), draw(GROUPS, 17, DIM, seed=5)
    counts = torch.full((4,), GROUPS)
    turned, rest = split(mixed(pca=pca).matrices, counts, GROUPS)
    assert not len(rest)
    exact = turned_scores(q, k, FREQUENCIES)
    found = scores_of(turned, rest, kept_frequencies(FREQUENCIES, counts), q, k)
    assert (found - exact).abs().max() < 1e-12


def test_a_rotation_that_mixes_otherwise_does_change_scores():
    q, k = draw(HEADS, 17, DIM, seed=4), draw(GROUPS, 17, DIM, seed=5)
    exact = turned_scores(q, k, FREQUENCIES)
    counts = torch.full((4,), GROUPS)
    turned, rest = split(mixed().matrices, counts, GROUPS)
    free, _ = torch.linalg.qr(draw(len(turned), len(turned), seed=6))
    two = turned.clone()
    two[[0, 2]] = two[[2, 0]]  # the first coordinates of two pairs of one frequency, without the second ones
    for other in (free @ turned, two):
        found = scores_of(other, rest, kept_frequencies(FREQUENCIES, counts), q, k)
        assert (found - exact).abs().max() > 0.1


def test_folding_is_exact_where_neighbours_are_equal_and_only_there():
    q, k = draw(HEADS, 17, DIM, seed=4), draw(GROUPS, 17, DIM, seed=5)
    counts = torch.full((2,), 2 * GROUPS)
    turned, rest = split(mixed(fold=2).matrices, counts, GROUPS)
    equal = FREQUENCIES[[0, 0, 2, 2]]
    found = scores_of(turned, rest, kept_frequencies(equal, counts), q, k)
    assert (found - turned_scores(q, k, equal)).abs().max() < 1e-12
    assert (found - turned_scores(q, k, FREQUENCIES)).abs().max() > 0.1


@pytest.mark.parametrize("fold", [1, 2])
def test_dropped_pairs_lose_their_rotation_and_nothing_else(fold):
    layer = mixed(fold)
    counts = keep([layer.importance], 5)
    turned, rest = split(layer.matrices, counts, GROUPS)
    assert len(turned) == 10 and len(rest) == GROUPS * DIM - 10
    both = torch.cat((turned, rest))
    assert torch.allclose(both @ both.T, torch.eye(len(both), dtype=torch.float64), atol=1e-12)
    q, k = draw(HEADS, 17, DIM, seed=4), draw(GROUPS, 17, DIM, seed=5)
    still = scores_of(turned, rest, torch.full((5,), 1e-300, dtype=torch.float64), q, k)
    plain = torch.stack([q[s] @ k[s // 2].T for s in range(HEADS)])
    assert (still - plain).abs().max() < 1e-12


def test_concentration_moves_energy_to_the_front_and_loses_none():
    keys, _ = maps()
    plain, front = mixed(pca=False), mixed()

    def energies(layer):
        rows = torch.einsum("mia,maxn->mixn", layer.matrices, pairs_of(keys, GROUPS, 1).flatten(1, 2))
        return torch.einsum("mixn,nk,mixk->mi", rows, moment(), rows)

    before, after = energies(plain), energies(front)
    assert torch.allclose(before.sum(1), after.sum(1))
    assert (after.max(1).values > before.max(1).values).all()


def test_importance_is_the_mean_square_change_of_scores_of_random_directions():
    keys, queries = maps()
    layer = mixed(pca=False)
    m = moment()
    weights = turning(FREQUENCIES, 30)
    expected = torch.zeros(4, GROUPS, dtype=torch.float64)
    for p in range(4):
        for j in range(GROUPS):
            energy = sum(keys[j * DIM + p + x] @ m @ keys[j * DIM + p + x] for x in (0, 4))
            power = sum(
                queries[s * DIM + p + x] @ m @ queries[s * DIM + p + x] for s in (2 * j, 2 * j + 1) for x in (0, 4)
            )
            expected[p, j] = energy * power * weights[p]
    assert torch.allclose(layer.importance, expected.sort(1, descending=True).values)


def test_turning_is_a_mean_over_pairs_of_tokens():
    total = sum(2 * (1 - math.cos(0.4 * (t - i))) for t in range(30) for i in range(t + 1)) / (30 * 31 / 2)
    assert turning(FREQUENCIES, 30)[1].item() == pytest.approx(total)


def test_pairs_are_chosen_over_all_layers():
    one = torch.tensor([[5.0, 1.0], [4.0, 3.0]])
    two = torch.tensor([[1.0, 0.0], [6.0, 5.0]])
    assert keep([one], 2).tolist() == [1, 1]
    assert keep([one, two], 2).tolist() == [0, 2]
    assert keep([one, two], 3).tolist() == [1, 2]
    found = kept_frequencies(FREQUENCIES, torch.tensor([0, 2, 0, 1]))
    assert found.tolist() == FREQUENCIES[[1, 1, 3]].tolist()
    assert kept_frequencies(FREQUENCIES, torch.tensor([1, 1])).tolist() == FREQUENCIES[[0, 2]].tolist()


@pytest.mark.parametrize("rank", [1, 7, 16, 23, 24])
def test_error_of_principal_directions_is_the_sum_of_dropped_eigenvalues(rank):
    keys, values, m = draw(10, WIDTH, seed=7), draw(14, WIDTH, seed=8), moment()
    found = low_rank(keys, values, m, rank, balance=False)
    joint = torch.cat((keys, values))
    gap = joint - torch.cat((found.up_keys, found.up_values)) @ found.down
    lost = torch.trace(gap @ m @ gap.T)
    values_of = torch.linalg.eigvalsh(joint @ m @ joint.T).flip(0)
    assert lost.item() == pytest.approx(values_of[rank:].sum().item(), abs=1e-9)
    assert found.kept == pytest.approx(1 - lost.item() / torch.trace(joint @ m @ joint.T).item())
    weights = low_rank(keys, values, torch.eye(WIDTH, dtype=torch.float64), rank, balance=False)
    other = joint - torch.cat((weights.up_keys, weights.up_values)) @ weights.down
    assert lost <= torch.trace(other @ m @ other.T) + 1e-9
    if rank in (7, 16):
        assert lost < 0.8 * torch.trace(other @ m @ other.T)


def test_weights_alone_give_the_singular_value_decomposition():
    keys, values = draw(10, WIDTH, seed=7), draw(14, WIDTH, seed=8)
    found = low_rank(keys, values, torch.eye(WIDTH, dtype=torch.float64), 6, balance=False)
    u, s, v = torch.linalg.svd(torch.cat((keys, values)))
    expected = u[:, :6] @ torch.diag(s[:6]) @ v[:6]
    assert torch.allclose(torch.cat((found.up_keys, found.up_values)) @ found.down, expected, atol=1e-10)


def test_balance_is_the_ratio_of_mean_column_norms():
    keys, values, m = draw(10, WIDTH, seed=7) * 5, draw(14, WIDTH, seed=8), moment()
    found = low_rank(keys, values, m, 24, balance=True)
    sizes = [torch.stack([(row @ m @ row).sqrt() for row in part]).mean() for part in (keys, values)]
    assert found.balance == pytest.approx((sizes[0] / sizes[1]).item())
    assert torch.allclose(found.up_keys @ found.down, keys, atol=1e-10)
    assert torch.allclose(found.up_values @ found.down, values, atol=1e-10)
    assert low_rank(keys[:0], values, m, 5, balance=True).balance == 1
    assert low_rank(0 * keys, values, m, 5, balance=True).balance == 1


def test_relative_error_is_a_ratio_of_sizes():
    a, x = draw(3, WIDTH, seed=1), draw(50, WIDTH, seed=2)
    b = a + 0.1 * draw(3, WIDTH, seed=3)
    expected = ((x @ (a - b).T).norm() / (x @ a.T).norm()).item()
    assert relative_error(a, b, x.T @ x / 50) == pytest.approx(expected)
    assert relative_error(a[:0], b[:0], x.T @ x) == 0 and relative_error(0 * a, 0 * b, x.T @ x) == 0


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_silent_norm_is_a_multiplication_for_the_worst_input_there_is(size):
    gain = draw(WIDTH, seed=2).abs() + 0.1
    down = size * draw(7, WIDTH + 1, seed=1)
    scale = silent_scale(down, gain, 1e-6)
    assert math.log2(scale) == round(math.log2(scale))
    _, _, v = torch.linalg.svd(down[:, :-1] * gain)
    worst = gain * v[0] * math.sqrt(WIDTH)  # as long as RMSNorm lets it be, along the strongest direction
    for sign in (1, -1):
        latent = down[:, :-1] @ (sign * worst) + down[:, -1]
        assert (scale * latent).pow(2).mean() <= 2.0**-54 * 1e-6
    norm = DeepseekV3RMSNorm(7, eps=1e-6)
    norm.weight.data.fill_(math.sqrt(1e-6) / scale)
    found = norm((scale * latent).float())
    assert torch.allclose(found.double(), latent, rtol=1e-6, atol=0)
    # The bound is not wasteful: random inputs are within a factor of 1000 of it.
    assert (scale * latent).pow(2).mean() > 1e-6 * 2.0**-54 * 1e-6


def test_no_norm_is_silent_by_accident():
    with pytest.raises(ValueError, match="calibrated"):
        silent_scale(1e30 * draw(7, WIDTH + 1), torch.ones(WIDTH), 1e-6)


def llama(**options):
    config = transformers.LlamaConfig(**{**COMMON, **options})
    return widen(AutoModelForCausalLM.from_config(config)).double().eval()


def test_moments_are_means_over_all_tokens_and_the_probe_is_kept():
    model, ids = llama(), tokens(20)
    seen = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = model(ids[:9], labels=ids[:9]).loss
    model(ids)
    handle.remove()
    found = collect(model, read_source(model), ids)
    x = torch.cat((seen[1].flatten(0, 1), torch.ones(ids.numel(), 1)), 1).detach()
    assert torch.allclose(found.second[1], x.T @ x / len(x), atol=1e-12)
    assert found.tokens == 20 * 56 and found.probe_ids.shape == (9, 56)
    assert torch.allclose(found.inputs[1], seen[0], atol=1e-12) and len(found.inputs) == len(found.outputs) == 2
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)


def test_change_of_attention_is_a_divergence():
    model, ids = llama(), tokens(1, 24)
    source = read_source(model)
    moments = collect(model, source, ids)
    x = moments.inputs[0][0]
    queries, keys = (affine(m) for m in (source.arch.blocks[0].attention.query, source.arch.blocks[0].attention.key))
    frequencies = source.frequencies
    pairs = frequencies.numel()
    # Pairs 0 and 3 of key head 0, pair 0 of key head 1 keep their rotation; heads are not mixed.
    kept = torch.zeros(2, pairs, dtype=torch.bool)
    kept[0, 0] = kept[0, 3] = kept[1, 0] = True
    order = [(j, p) for p in range(pairs) for j in range(2)]
    row = {(j, p, c): torch.eye(32, dtype=torch.float64)[j * 16 + c * 8 + p] for j, p in order for c in (0, 1)}
    turned = torch.stack([row[j, p, c] for j, p in order if kept[j, p] for c in (0, 1)])
    rest = torch.stack([row[j, p, c] for j, p in order if not kept[j, p] for c in (0, 1)])
    table = torch.stack([frequencies[p] for j, p in order if kept[j, p]])
    found = attention_change(source, queries, keys, turned, rest, table, x)
    q = (x @ queries[:, :-1].T).unflatten(-1, (4, 16)).transpose(0, 1)
    k = (x @ keys[:, :-1].T).unflatten(-1, (2, 16)).transpose(0, 1)
    before = turned_scores(q, k, frequencies)
    after = torch.cat(
        [turned_scores(q[2 * j : 2 * j + 2], k[j : j + 1], frequencies.where(kept[j], 0.0)) for j in (0, 1)]
    )
    total = 0.0
    for s in range(4):
        for t in range(24):
            one, two = ((0.25 * scores[s, t, : t + 1]).softmax(0) for scores in (before, after))
            total += (one * (one / two).log()).sum().item()
    assert found == pytest.approx(total / (4 * 24), rel=1e-9)
    every = torch.cat([torch.stack([row[j, p, 0], row[j, p, 1]]) for j, p in order])
    whole = attention_change(source, queries, keys, every, rest[:0], frequencies.repeat_interleave(2), x)
    assert abs(whole) < 1e-12


def test_auto_takes_the_fold_that_changes_attention_least():
    model, ids = llama(rope_parameters={"rope_type": "default", "rope_theta": 4.0}), tokens(6, 24)
    source = read_source(model)
    moments = collect(model, source, ids)
    found = choose_rotation(source, moments.second, moments, 8, 24, "auto", concentrate=True)
    changes = {}
    for fold in (1, 2, 4, 8):
        one = choose_rotation(source, moments.second, moments, 8, 24, fold, concentrate=True)
        assert one.change is None and len(one.frequencies) == 4
        changes[fold] = sum(
            attention_change(source, affine(b.attention.query), affine(b.attention.key), *parts, one.frequencies, x[0])
            for b, parts, x in zip(source.arch.blocks, one.layers, moments.inputs, strict=True)
        )
    assert found.fold == min(changes, key=lambda fold: changes[fold])
    assert found.change == pytest.approx(changes[found.fold] / 2)
