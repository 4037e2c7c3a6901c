"""The planner: blocks cover a part's pairs exactly once, and no row of a block is blind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.kernels.regions import Part, can_plan, plan


def covered(part: Part, n_queries: int, n_keys: int, tile: int | None) -> torch.Tensor:
    counts = torch.zeros(n_queries, n_keys, dtype=torch.int64)
    for block in plan(part, n_queries, n_keys, tile):
        (r0, r1), (c0, c1) = block.rows, block.columns
        if block.kind == "full":
            seen = torch.ones(r1 - r0, c1 - c0, dtype=torch.int64)
        elif block.kind == "causal":
            assert r1 - r0 == c1 - c0
            seen = torch.ones(r1 - r0, c1 - c0, dtype=torch.int64).tril()
        else:
            assert block.tiles * block.tile == r1 - r0
            assert c1 - c0 == r1 - r0 + block.width - 1
            seen = torch.zeros(r1 - r0, c1 - c0, dtype=torch.int64)
            one = (block.mask(torch.float64, torch.device("cpu")) == 0).long()
            for g in range(0, r1 - r0, block.tile):
                seen[g : g + block.tile, g : g + one.shape[1]] += one
        assert (seen.sum(1) > 0).all()
        counts[r0:r1, c0:c1] += seen
    return counts


def wanted(part: Part, n_queries: int, n_keys: int) -> torch.Tensor:
    distance = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if part.nearest is not None:
        visible &= distance >= part.nearest
    if part.farthest is not None:
        visible &= distance < part.farthest
    if part.columns is not None:
        slots = torch.arange(n_keys)
        visible &= (slots >= part.columns[0]) & (slots < part.columns[1])
    return visible.long()


@st.composite
def cases(draw):
    n_keys = draw(st.integers(1, 40))
    n_queries = draw(st.integers(0, n_keys))
    nearest = draw(st.none() | st.integers(0, 45))
    farthest = None if nearest is None else draw(st.none() | st.integers(nearest, 60))
    start = draw(st.integers(0, n_keys))
    stop = n_keys if farthest is not None else draw(st.integers(start, n_keys + 3))
    columns = draw(st.sampled_from([None, (min(start, stop), stop)]))
    return Part(nearest=nearest, farthest=farthest, columns=columns), n_queries, n_keys, draw(st.integers(1, 9))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_every_pair_exactly_once(case):
    part, n_queries, n_keys, tile = case
    assert can_plan(part, n_keys)
    assert torch.equal(covered(part, n_queries, n_keys, tile), wanted(part, n_queries, n_keys))


def test_default_tiles_and_few_calls():
    part = Part(farthest=512)
    assert torch.equal(covered(part, 2000, 2000, None), wanted(part, 2000, 2000))
    assert len(plan(part, 8192, 8192)) == 2  # the first rows, and one call for all tiles
    assert len(plan(Part(nearest=512), 8192, 8192)) == 1


def test_more_queries_than_keys_only_without_a_causal_limit():
    assert [b.rows for b in plan(Part(nearest=None), 5, 3)] == [(0, 5)]


@pytest.mark.parametrize("part", [Part(nearest=None, farthest=3), Part(farthest=3, columns=(0, 4))])
def test_refused_parts(part):
    assert not can_plan(part, 10)
    with pytest.raises(ValueError, match="a farthest distance must be causal"):
        plan(part, 10, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nearest": -1}, "nearest must be 0 or more, or None, got -1"),
        ({"nearest": 3, "farthest": 2}, "farthest must be at least nearest = 3, got 2"),
        ({"columns": (3, 2)}, "columns must be"),
        ({"columns": (-1, 2)}, "columns must be"),
    ],
)
def test_bad_parts(options, message):
    with pytest.raises(ValueError, match=message):
        Part(**options)
