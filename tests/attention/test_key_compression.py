"""Clustering keys: k-means, capture from host models, errors against attention computed by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from danlu.attention.vq.engine import vq_attention
from danlu.attention.vq.key_compression import compress_keys, kmeans
from danlu.positions.rotary import Rotary, inverse_frequencies
from reference.tiny import tiny_llama


def inertia(points, centres):
    return torch.cdist(points, centres).square().amin(1).sum()


def test_kmeans_finds_separate_clusters_and_does_not_get_worse():
    true = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]], dtype=torch.float64)
    points = (true[:, None] + torch.randn(4, 25, 2, dtype=torch.float64)).flatten(0, 1)
    centres = kmeans(points, 4)
    order = torch.cdist(true, centres).argmin(1)
    torch.testing.assert_close(centres[order], points.view(4, 25, 2).mean(1))
    noise = torch.randn(300, 3)
    steps = [inertia(noise, kmeans(noise, 12, iterations=n)) for n in (0, 1, 4, 25)]
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1]


def test_kmeans_follows_its_seed_and_takes_few_or_equal_points():
    points = torch.randn(50, 3, dtype=torch.float64)
    before = torch.get_rng_state()
    assert torch.equal(kmeans(points, 5, seed=2), kmeans(points, 5, seed=2))
    assert torch.equal(before, torch.get_rng_state())
    assert inertia(points, kmeans(points, 50)) < 1e-6
    assert torch.equal(kmeans(torch.ones(4, 2), 3), torch.ones(3, 2))
    assert kmeans(points, 1, iterations=1)[0] == pytest.approx(points.mean(0), abs=1e-6)


@pytest.mark.parametrize(
    ("points", "codes", "message"),
    [
        (torch.zeros(3, 2), 0, "codes must be at least 1, got 0"),
        (torch.zeros(3, 2), 4, r"points must be \(n, dim\) with n >= codes = 4, got \(3, 2\)"),
        (torch.full((3, 2), torch.nan), 2, "points must be finite"),
    ],
)
def test_wrong_arguments_of_kmeans_are_named(points, codes, message):
    with pytest.raises(ValueError, match=message):
        kmeans(points, codes)


def first_layer(model, ids):
    """Queries, keys and values of the first layer of a Llama, before rotation, by hand."""
    block = model.model.layers[0]
    x = block.input_layernorm(model.model.embed_tokens(ids))
    projections = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    return [p(x).unflatten(-1, (-1, block.self_attn.head_dim)).transpose(1, 2) for p in projections]


def relative(out, exact):
    return ((out - exact).square().sum((0, 1, 3)).sum() / exact.square().sum()).sqrt().item()


@torch.no_grad()
def test_errors_are_those_of_the_engine_on_keys_taken_by_hand():
    model = tiny_llama().eval()
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    ids = torch.randint(config.vocab_size, (3, 20))
    test = torch.randint(config.vocab_size, (2, 17))
    result = compress_keys(model, ids, codes=9, test_ids=test, window=4)
    q, k, v = first_layer(model, test)
    places = torch.arange(17)[None]
    turned = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(q, places))
    exact = torch.nn.functional.scaled_dot_product_attention(*turned, v, is_causal=True, enable_gqa=True)
    rotary = Rotary(inverse_frequencies(q.shape[-1], config.rope_parameters["rope_theta"]))
    outs = {
        "rotated": vq_attention(*turned, v, result.rotated[0], block=4)[0],
        "unrotated": vq_attention(q, k, v, result.unrotated[0], block=32, rotary=rotary)[0],
        "offset": vq_attention(q, k, v, result.unrotated[0], block=4, rotary=rotary)[0],
        "mean_value": (v.cumsum(2) / torch.arange(1, 18)[:, None]).repeat_interleave(heads // kv_heads, 1),
    }
    for error in result.errors[:kv_heads]:
        group = slice(error.kv_head * heads // kv_heads, (error.kv_head + 1) * heads // kv_heads)
        assert error.layer == 0
        for kind, out in outs.items():
            assert getattr(error, kind) == pytest.approx(relative(out[:, group], exact[:, group]), rel=1e-3, abs=1e-5)
    assert len(result.errors) == config.num_hidden_layers * kv_heads
    assert result.mean_errors()["offset"] == pytest.approx(sum(e.offset for e in result.errors) / len(result.errors))


@torch.no_grad()
def test_as_many_codes_as_keys_leave_no_error():
    model = tiny_llama().eval()
    ids = torch.randint(model.config.vocab_size, (1, 16))
    result = compress_keys(model, ids, codes=16, window=16)
    for error in result.errors:
        assert max(error.rotated, error.unrotated, error.offset) < 1e-3 < error.mean_value


@torch.no_grad()
def test_codebooks_start_a_layer_with_the_projections_of_the_model():
    from danlu.attention.vq.layer import VQAttention

    model = tiny_llama().eval()
    config, block = model.config, model.model.layers[0]
    ids = torch.randint(config.vocab_size, (2, 24))
    result = compress_keys(model, ids, codes=48, window=24)
    mixer = VQAttention(
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=block.self_attn.head_dim,
        codes=48,
        block=24,
        position="rotary",
        rope_base=config.rope_parameters["rope_theta"],
        normalise=False,
    ).eval()
    mixer.load_state_dict(block.self_attn.state_dict(), strict=False)
    mixer.codebook.set(result.unrotated[0])
    x = block.input_layernorm(model.model.embed_tokens(ids))
    places = torch.arange(24)[None]
    exact, _ = block.self_attn(x, position_embeddings=model.model.rotary_emb(x, places), attention_mask=None)
    # as many codes as keys, and no distance beyond the block: nothing is lost
    torch.testing.assert_close(mixer(x, places), exact, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_model_without_rotation_has_one_kind_of_error_and_stays_as_it_was():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)).train()
    ids = torch.randint(40, (2, 20))
    before = model.config._attn_implementation
    result = compress_keys(model, ids, codes=8)
    assert result.unrotated == () and result.errors[0].offset is None
    assert set(result.mean_errors()) == {"rotated", "mean_value"} and len(result.errors) == 4
    assert model.config._attn_implementation == before and model.training and model.transformer.h[0].training


def test_wrong_models_and_arguments_are_named():
    model = tiny_llama()
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="codes must be between 1 and the 8 calibration tokens, got 9"):
        compress_keys(model, ids, codes=9)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        compress_keys(model, ids, codes=2, window=0)
    with pytest.raises(ValueError, match=r"test_ids must be \(rows, length\)"):
        compress_keys(model, ids, codes=2, test_ids=ids[0])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="is an encoder"):
        compress_keys(BertLMHeadModel(BertConfig(vocab_size=40, **sizes)), ids, codes=2)
    narrow = MistralForCausalLM(MistralConfig(vocab_size=40, num_key_value_heads=1, sliding_window=4, **sizes))
    with pytest.raises(ValueError, match="has a softcap or a sliding window"):
        compress_keys(narrow, ids, codes=2)
    assert narrow.config._attn_implementation != "danlu_key_capture"
