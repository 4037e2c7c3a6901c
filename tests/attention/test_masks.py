from __future__ import annotations

import pytest
import torch

from danlu.attention.masks import make_mask


def listed(kind: str, length: int, past: int, real: list[bool], prefix: int, head: int, heads: int) -> torch.Tensor:
    """The definition, one pair at a time."""
    first = real.index(True) if True in real else 0
    rows = torch.zeros(length, past + length, dtype=torch.bool)
    for i in range(length):
        for j in range(past + length):
            back, ahead = j <= past + i, j >= past + i
            seen = {
                "causal": back,
                "anticausal": ahead,
                "bidirectional": True,
                "prefix": back or j < first + prefix,
                "mixed_heads": back if head < heads // 2 else ahead,
            }[kind]
            rows[i, j] = seen and real[j]
    return rows


@pytest.mark.parametrize("kind", ["causal", "anticausal", "bidirectional", "prefix", "mixed_heads"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_every_kind_is_its_definition(kind, side):
    past = 2 if kind in ("causal", "prefix") else 0
    length, heads, prefix = 5, 4, 3
    real = [True] * (past + length)
    if side != "none":
        gone = slice(0, 2) if side == "left" else slice(-2, None)
        real[gone] = [False, False]
    mask = make_mask(
        kind,
        length,
        past=past,
        padding=None if side == "none" else torch.tensor([real]),
        prefix_lengths=torch.tensor([prefix]) if kind == "prefix" else None,
        heads=heads if kind == "mixed_heads" else None,
    ).expand(1, heads, -1, -1)
    for head in range(heads):
        assert torch.equal(mask[0, head], listed(kind, length, past, real, prefix, head, heads))


def test_prefix_lengths_of_zero_and_of_everything_are_causal_and_bidirectional():
    lengths = torch.tensor([0, 4])
    mask = make_mask("prefix", 4, prefix_lengths=lengths)
    assert torch.equal(mask[0], make_mask("causal", 4)[0])
    assert mask[1].all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "causal", "length": 0}, "length must be at least 1"),
        ({"kind": "bidirectional", "length": 3, "past": 1}, "past must be 0 for bidirectional"),
        ({"kind": "prefix", "length": 3}, "prefix_lengths must be"),
        ({"kind": "prefix", "length": 3, "prefix_lengths": torch.tensor([-1])}, "prefix_lengths must be"),
        ({"kind": "mixed_heads", "length": 3, "heads": 3}, "heads must be an even number"),
        ({"kind": "causal", "length": 3, "padding": torch.ones(1, 2)}, "padding must be"),
        ({"kind": "sideways", "length": 3}, "kind must be one of"),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        make_mask(**options)
