"""Decoding with less than keys and values: the same tokens and logits as the default cache, and the predicted costs."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from context.families import BY_NAME, in_pieces, left_padded, tokens
from danlu.attention.streaming.cost import recompute_cost
from danlu.attention.streaming.recompute import RecomputeCache
from danlu.hosts.architecture import UnsupportedArchitecture

POLICIES = [("kv", 1), ("x", 1), ("x", 2), ("x", 3), ("ids", 1)]
FAMILIES = ["llama", "qwen3", "gemma", "phi3", "granite", "ernie4.5", "qwen2"]


def build(name: str = "llama", dtype: torch.dtype = torch.float64, **options):
    sizes = {"num_hidden_layers": 3, "num_key_value_heads": 4, "max_position_embeddings": 64}
    model = BY_NAME[name].build(dtype, **{**sizes, **options})
    model.set_attn_implementation("sdpa")
    return model


def decode(model, cache, ids, steps):
    """Logits of greedy decoding through a cache, and its tokens."""
    rows = [model(ids, past_key_values=cache).logits[:, -1]]
    chosen = []
    for _ in range(steps):
        chosen.append(rows[-1].argmax(-1, keepdim=True))
        rows.append(model(chosen[-1], past_key_values=cache).logits[:, -1])
    return torch.stack(rows, 1), torch.cat(chosen, 1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("policy", "every"), POLICIES)
def test_every_policy_gives_the_tokens_and_logits_of_the_default_cache(name, policy, every):
    model, ids = build(name), tokens(2, 24)
    with torch.no_grad():
        wanted, chosen = decode(model, transformers.DynamicCache(config=model.config), ids, 16)
        logits, found = decode(model, RecomputeCache(model, policy, every=every), ids, 16)
    # Ernie turns its keys in float32 whatever the model's type
    assert torch.equal(chosen, found) and torch.allclose(logits, wanted, atol=1e-5 if name == "ernie4.5" else 1e-9)


@pytest.mark.parametrize(("policy", "every"), POLICIES[1:])
def test_generate_with_left_padding_and_beams(policy, every):
    model = build()
    ids, mask = left_padded([tokens(1, n, seed=n)[0] for n in (5, 11)])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        wanted = model.generate(ids, num_beams=beams, **options)
        cache = RecomputeCache(model, policy, every=every)
        assert torch.equal(model.generate(ids, num_beams=beams, past_key_values=cache, **options), wanted)
        cache.close()


@pytest.mark.parametrize(("policy", "every"), POLICIES[1:])
def test_prompts_in_pieces_cropping_and_selecting(policy, every):
    model, ids = build(), tokens(2, 20)
    with torch.no_grad():
        wanted = in_pieces(model, ids, [20])
        cache = RecomputeCache(model, policy, every=every)
        model(ids[:, :7], past_key_values=cache)
        model(ids[:, 7:15].flip(1), past_key_values=cache)
        cache.crop(-8)
        assert cache.get_seq_length() == 7 and cache.get_mask_sizes(3, 0) == (10, 0)
        for start, stop in ((7, 12), (12, 13)):
            found = model(ids[:, start:stop], past_key_values=cache).logits
            assert torch.allclose(found, wanted[:, start:stop], atol=1e-9)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        found = model(ids[1:].repeat(2, 1)[:, 13:], past_key_values=cache).logits
        assert torch.allclose(found, wanted[1:, 13:].repeat(2, 1, 1), atol=1e-9)
        cache.reset()
        assert cache.get_seq_length() == cache.numbers() == 0


def test_what_is_kept_and_what_is_computed_is_as_predicted():
    model, length = build(dtype=torch.float32), 40
    model.set_attn_implementation("eager")  # whose products the counter sees
    ids = tokens(1, length + 1)
    flops, numbers = {}, {}
    for policy, every in POLICIES:
        cache = RecomputeCache(model, policy, every=every)
        with torch.no_grad():
            model(ids[:, :length], past_key_values=cache)
            numbers[policy, every] = cache.numbers()
            with FlopCounterMode(display=False) as counter:
                model(ids[:, length:], past_key_values=cache)
        flops[policy, every] = counter.get_total_flops()
        cost = recompute_cost(model, length, policy, every)
        assert numbers[policy, every] == cost.numbers
        # some releases of the host count the rotation table as a product
        assert flops[policy, every] - flops["kv", 1] == pytest.approx(cost.flops, rel=2e-3)
    # d = 64, 3 layers, 4 heads: the table of the four policies
    assert [numbers[key] for key in POLICIES] == [3 * 128 * 40, 3 * 64 * 40, 2 * 64 * 40, 64 * 40, 0]
    assert recompute_cost(model, length, "x").flops == 3 * 4 * length * 64 * 64


@pytest.mark.parametrize(("policy", "every"), [("x", 1), ("x", 2), ("ids", 1)])
def test_half_precision_stays_near(policy, every):
    model, ids = build(dtype=torch.bfloat16), tokens(1, 20)
    with torch.no_grad():
        exact = build(dtype=torch.float64)(ids).logits
        wanted = in_pieces(model, ids, [12, 4, 4]).double()
        cache, out, start = RecomputeCache(model, policy, every=every), [], 0
        for size in (12, 4, 4):
            out.append(model(ids[:, start : start + size], past_key_values=cache).logits)
            start += size
    error = (torch.cat(out, 1).double() - exact).abs().mean()
    assert error <= 1.5 * (wanted - exact).abs().mean()


def test_grouped_heads_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "danlu.attention"):
        RecomputeCache(build())
        assert not caplog.records
        RecomputeCache(build(num_key_value_heads=1), "x", every=2)
    assert "keeps 32 numbers per layer and token, keys and values of 1 grouped heads only 32" in caplog.text
    assert "take every=3 or more" in caplog.text
    with torch.no_grad():
        ids, model = tokens(1, 12), build(num_key_value_heads=2)
        logits, _ = decode(model, RecomputeCache(model), ids, 5)
        assert torch.allclose(logits, decode(model, transformers.DynamicCache(), ids, 5)[0], atol=1e-9)


def test_a_cache_that_is_gone_leaves_no_hook_and_other_calls_are_not_seen():
    model, ids = build(), tokens(1, 6)
    first, second = RecomputeCache(model), RecomputeCache(model)
    with torch.no_grad():
        model(ids, past_key_values=first)
        model(ids)
    assert (first.get_seq_length(), second.get_seq_length()) == (6, 0)
    del first
    second.close()
    gc.collect()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bad_input():
    model, ids = build(), tokens(1, 6)
    with pytest.raises(ValueError, match='policy must be "kv", "x" or "ids"'):
        RecomputeCache(model, "q")
    with pytest.raises(ValueError, match="every must be >= 1, and 1 but for policy 'x', got 2 with policy 'ids'"):
        RecomputeCache(model, "ids", every=2)
    with pytest.raises(UnsupportedArchitecture, match="full attention in every layer"):
        RecomputeCache(BY_NAME["gemma2"].build())
    with pytest.raises(UnsupportedArchitecture, match="use every=2 or more"):
        RecomputeCache(build("olmo2"))
    with torch.no_grad():
        olmo = build("olmo2")
        logits, _ = decode(olmo, RecomputeCache(olmo, "x", every=2), ids, 4)
        assert torch.allclose(logits, decode(olmo, transformers.DynamicCache(), ids, 4)[0], atol=1e-9)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, past_key_values=RecomputeCache(model), attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
    cache = RecomputeCache(model, "ids")
    with pytest.raises(ValueError, match="input_ids must be given"):
        model(inputs_embeds=torch.zeros(1, 3, 64, dtype=torch.float64), past_key_values=cache)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        RecomputeCache(build().train())
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        model.train()(ids, past_key_values=cache)
