"""What the host library's own dynamic scaling gets wrong, and ours does not."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from context.families import BY_NAME, PLAIN_ROPE, TRAINED, right_padded, tokens
from danlu.context.extend import extended
from reference.host import Spec, Wide, reference

DYNAMIC_HOST = PLAIN_ROPE | {"rope_type": "dynamic", "factor": 1.0}  # factor 1: NTK-aware scaling
SHORT = TRAINED - 2  # the host only goes back to its first frequencies below the trained length


def one_by_one(model, ids):
    cache = DynamicCache(config=model.config)
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
    return torch.cat(steps, 1)


@pytest.fixture(scope="module")
def models():
    """The same weights twice: the host's dynamic scaling, and a plain model to extend."""
    family = BY_NAME["llama"]
    return family.build(rope_parameters=DYNAMIC_HOST), family.build()


@torch.no_grad()
def test_decoding_equals_reading_at_once_under_ours_and_not_under_the_host_s(models):
    host, plain = models
    ids = tokens(1, 3 * TRAINED)
    host_error = (one_by_one(host, ids) - host(ids, use_cache=False).logits).abs().max()
    assert host_error > 1e-3
    with Wide(), extended(plain, "dynamic-ntk"):
        error = (one_by_one(plain, ids) - plain(ids, use_cache=False).logits).abs().max()
    assert error < 1e-9


@torch.no_grad()
def test_a_longer_neighbour_in_the_batch_changes_nothing_under_ours(models):
    host, plain = models
    rows = [tokens(1, SHORT, seed=3)[0], tokens(1, 3 * TRAINED, seed=4)[0]]
    ids, mask = right_padded(rows)

    def last_row_error(model):
        alone = model(rows[0][None], use_cache=False).logits[0]
        beside = model(ids, attention_mask=mask, use_cache=False).logits[0, :SHORT]
        return (alone - beside).abs().max()

    assert last_row_error(host) > 1e-3
    with Wide(), extended(plain, "dynamic-ntk"):
        assert last_row_error(plain) < 1e-9


@torch.no_grad()
def test_inside_the_trained_length_dynamic_scaling_is_the_plain_model(models):
    _, plain = models
    ids = tokens(2, TRAINED)
    with Wide():
        expected = plain(ids).logits
        with extended(plain, "dynamic-yarn"):
            torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits_under_ours(models):
    host, plain = models
    ids = tokens(1, 3 * TRAINED)
    host_change = host(ids, use_cache=False).logits[:, :SHORT] - host(ids[:, :SHORT], use_cache=False).logits
    assert host_change.abs().max() > 1e-3
    with Wide(), extended(plain, "dynamic-ntk"):
        whole, part = plain(ids).logits, plain(ids[:, :TRAINED]).logits
        torch.testing.assert_close(whole[:, :TRAINED], part, rtol=0, atol=1e-10)
        with torch.no_grad():
            longer = plain(ids).logits
    with Wide(), reference(plain, Spec(dynamic="ntk"), TRAINED):
        torch.testing.assert_close(longer, plain(ids).logits, rtol=0, atol=1e-10)
