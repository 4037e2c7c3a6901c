from __future__ import annotations

import pytest

from danlu.lab.papers_ingest import WAYS, read_day


@pytest.mark.parametrize(
    ("way", "found"),
    [
        ("interface, once", (122, 122, 0)),
        ("feed, once", (132, 132, 0)),
        ("both, once", (132, 132, 0)),
        ("both, again and again", (133, 133, 1)),
    ],
)
def test_what_each_way_of_reading_shows(way, found):
    assert read_day(WAYS[way], 0.0, 0) == found


@pytest.mark.parametrize("seed", range(3))
def test_faults_cost_no_paper_where_one_looks_again(seed):
    assert read_day(WAYS["both, again and again"], 0.5, seed)[:2] == (133, 133)


def test_the_same_seed_fails_in_the_same_way():
    assert read_day(WAYS["both, once"], 0.5, 7) == read_day(WAYS["both, once"], 0.5, 7)
