"""Caches under late positions: what is kept, what is turned again, and what edits do to it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from context.families import BY_NAME, LENGTH, TRAINED, tokens
from danlu.context import turning
from danlu.context.cache import LAYER, TurnedKeysLayer
from danlu.context.extend import extend, extended, restore


@pytest.fixture(scope="module")
def model():
    """A float64 model; every test leaves it plain."""
    return BY_NAME["llama"].build()


@pytest.fixture
def turned(monkeypatch):
    """Number of keys that each call of the rotation turned; keys have two heads here and queries four."""
    counts = []
    original = turning.Turner.turn

    def spy(self, x, start):
        if x.shape[1] == 2:
            counts.append(x.shape[2])
        return original(self, x, start)

    monkeypatch.setattr(turning.Turner, "turn", spy)
    return counts


def step(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def fill(model, ids):
    cache = DynamicCache(config=model.config)
    step(model, ids, cache)
    return cache


def test_a_decoding_step_of_rerope_turns_no_more_keys_than_the_window(model, turned):
    ids = tokens()
    with extended(model, "rerope:window=7"):
        cache = fill(model, ids[:, :40])
        turned.clear()
        for i in range(40, LENGTH):
            step(model, ids[:, i : i + 1], cache)
    assert max(turned) <= 7


def test_dynamic_decoding_turns_each_key_once_between_two_factors(model, turned):
    ids = tokens()
    layers = len(model.model.layers)
    with extended(model, "dynamic-ntk"):
        cache = DynamicCache(config=model.config)
        for i in range(LENGTH):
            step(model, ids[:, i : i + 1], cache)
    # factor 1 up to 16 tokens, 2 up to 32, 4 up to 64: 16 + 32 + 56 keys, and not 1 + 2 + ... + 56
    assert sum(turned) == layers * (TRAINED + 2 * TRAINED + LENGTH)


def test_the_host_s_cache_holds_unturned_keys_and_nothing_else(model):
    ids = tokens()
    with extended(model, "rerope:window=7"):
        late = fill(model, ids)
        early = fill(model, torch.cat([ids[:, 20:21], ids[:, 1:]], 1))
    # the first layer's keys depend on the token alone: no position, so no rotation
    assert torch.equal(late.layers[0].keys[:, :, 20], early.layers[0].keys[:, :, 0])
    assert type(late.layers[0]).__name__ == "DynamicLayer"
    plain = fill(model, ids)
    sizes = [sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) for cache in (late, plain)]
    assert sizes[0] == sizes[1]


EDITS = {
    "crop": (lambda cache: cache.crop(-11), lambda ids: ids[:, :-11]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), lambda ids: ids[[1, 0]]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda ids: ids[[1]]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), lambda ids: ids.repeat_interleave(2, 0)),
}


@pytest.mark.parametrize(
    "stack", ["rerope:window=7", "leaky:window=5:stride=4.0", "dynamic-ntk", "window:window=9:sinks=2"]
)
@pytest.mark.parametrize("edit", EDITS)
def test_edited_caches_go_on_as_if_they_had_been_read_anew(model, edit, stack):
    change_cache, change_ids = EDITS[edit]
    ids, more = tokens(2, 45), tokens(2, 11, seed=9)
    with extended(model, stack):
        cache = fill(model, ids)
        step(model, more[:, :1], cache)
        cache.crop(-1)
        change_cache(cache)
        kept = change_ids(ids)
        added = more[:1].expand(len(kept), -1)
        expected = fill_logits(model, torch.cat([kept, added], 1))[:, -11:]
        logits = torch.cat([step(model, added[:, i : i + 1], cache) for i in range(11)], 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def fill_logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_reset_caches_start_anew(model):
    ids, other = tokens(1, 45), tokens(1, 45, seed=8)
    with extended(model, "dynamic-ntk"):
        cache = fill(model, ids)
        assert all(isinstance(layer, TurnedKeysLayer) for layer in cache.layers)
        cache.reset()
        cache = DynamicCache(config=model.config) if cache.get_seq_length() else cache
        torch.testing.assert_close(step(model, other, cache), fill_logits(model, other), rtol=0, atol=1e-9)


def test_keys_turned_by_one_dynamic_method_are_not_taken_for_another_s(model):
    ids = tokens(1, 40)  # from 33 tokens on both methods have the factor 4
    logits = []
    for forget in (False, True):
        with extended(model, "dynamic-ntk"):
            cache = fill(model, ids[:, :35])
        assert all(isinstance(layer, TurnedKeysLayer) for layer in cache.layers)
        if forget:
            for layer in cache.layers:
                layer.drop()
        with extended(model, "dynamic-yarn"):
            logits.append(step(model, ids[:, 35:], cache))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)


def test_keys_can_be_trained_through_a_cache():
    model, ids = BY_NAME["llama"].build(), tokens(1, 40)
    gradients = []
    with extended(model, "dynamic-ntk"):
        for use_cache in (False, True):
            model.zero_grad()
            model(ids, labels=ids, use_cache=use_cache).loss.backward()
            gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_two_caches_at_once_do_not_mix(model):
    one, two = tokens(1, 40, seed=1), tokens(1, 40, seed=2)
    with extended(model, "dynamic-ntk"):
        caches, parts = [DynamicCache(config=model.config) for _ in range(2)], ([], [])
        for i in range(40):
            for ids, cache, part in zip((one, two), caches, parts, strict=True):
                part.append(step(model, ids[:, i : i + 1], cache))
        for ids, part in zip((one, two), parts, strict=True):
            torch.testing.assert_close(torch.cat(part, 1), fill_logits(model, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "stack", ["rerope:window=7", "leaky:window=5:stride=4.0", "dynamic-ntk", "rerope:window=7+logn"]
)
def test_a_static_cache_fed_in_pieces_equals_the_whole(model, stack):
    ids = tokens(2)
    with extended(model, stack):
        whole = fill_logits(model, ids)
        cache, parts, start = StaticCache(config=model.config, max_cache_len=LENGTH + 8), [], 0
        for size in (20, 1, 1, 12, 1, 21):
            parts.append(step(model, ids[:, start : start + size], cache))
            start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


def test_restore_leaves_nothing_on_the_modules(model):
    names = {name: set(module.__dict__) for name, module in model.named_modules()}
    extend(model, "dynamic-ntk+logn")
    fill(model, tokens())
    restore(model)
    for name, module in model.named_modules():
        assert set(module.__dict__) == names[name]
        assert LAYER not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks
