"""The engine against the definition: every segmentation listed, in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.tokens.unigram import Unigram, in_threads, starts_of
from reference import unigram_dense as dense


def _model(scores: dict[bytes, float]) -> tuple[Unigram, list[bytes], dict[bytes, float]]:
    scores = {**{bytes([i]): -9.0 for i in range(256)}, **scores}
    pieces = list(scores)  # any order
    return Unigram(pieces, np.array([scores[piece] for piece in pieces])), pieces, scores


def _segment(model: Unigram, pieces: list[bytes], data: bytes) -> tuple[bytes, ...]:
    return tuple(pieces[i] for i in model.segment(np.frombuffer(data, np.uint8)))


@settings(deadline=None, max_examples=200)
@given(
    # Few distinct scores make many ties.
    st.dictionaries(
        st.text("abn", min_size=1, max_size=4), st.sampled_from([-1.0, -2.0, -3.0, -0.1, -0.3]), max_size=14
    ),
    st.text("abn", max_size=12),
)
def test_equals_the_best_of_all_segmentations_with_its_ties(words, text):
    model, pieces, scores = _model({word.encode(): value for word, value in words.items()})
    data = text.encode()
    found = _segment(model, pieces, data)
    assert found == dense.best(data, scores)
    top = max(dense.score(path, scores) for path in dense.segmentations(data, scores))
    assert abs(dense.score(found, scores) - top) < 1e-9


def test_of_equal_segmentations_the_longest_last_piece_wins():
    model, pieces, _ = _model({b"ab": -1.0, b"c": -2.0, b"a": -1.0, b"bc": -2.0, b"abc": -3.0})
    assert _segment(model, pieces, b"abc") == (b"abc",)
    model, pieces, _ = _model({b"ab": -1.0, b"c": -2.0, b"a": -1.0, b"bc": -2.0})
    assert _segment(model, pieces, b"abc") == (b"a", b"bc")


def test_no_piece_crosses_a_line():
    model, pieces, _ = _model({b"a\nb": -0.1, b"\n\n": -0.1, b"b\n": -0.1, b"\na": -0.1})
    assert _segment(model, pieces, b"a\nb\n\na") == (b"a", b"\n", b"b", b"\n\n", b"a")
    assert _segment(model, pieces, b"\n\n\n") == (b"\n", b"\n\n")


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_batches_equal_single_texts_for_any_number_of_threads(threads):
    model, _, _ = _model({b"ab": -1.0, b"abab": -1.5, b"ba": -1.2})
    rng = np.random.default_rng(0)
    texts = [bytes(rng.choice(list(b"ab\n"), size)) for size in (0, 1, 5, 0, 300_000, 2, 70_000, 0)]
    data = np.frombuffer(b"".join(texts), np.uint8)
    offsets = starts_of(np.array([len(text) for text in texts]))
    out, counts = model.segment_batch(data, offsets, threads)
    for i, text in enumerate(texts):
        alone = model.segment(np.frombuffer(text, np.uint8))
        assert np.array_equal(out[offsets[i] + i :][: counts[i]], alone)


def test_threads_cover_every_document_once():
    for sizes in ([0] * 5, [10**6], [1, 10**6, 1, 1], [200_000] * 9):
        seen = []
        in_threads(lambda first, last, seen=seen: seen.extend(range(first, last)), starts_of(np.array(sizes)), 4)
        assert sorted(seen) == list(range(len(sizes)))


@settings(deadline=None, max_examples=60)
@given(st.text("ab", min_size=1, max_size=40), st.text("ab\n", max_size=20))
def test_settled_pieces_are_those_of_the_whole(begin, rest):
    # 0.1 + 0.2 is 0.3 or a little more, depending on what it is added to: ties fall as the score so far rounds.
    model, _, _ = _model({b"ab": -0.3, b"a": -0.1, b"b": -0.2, b"ba": -0.3, b"bb": -0.4, b"aab": -0.4})
    size, settled, score = model.segment_open(np.frombuffer(begin.encode(), np.uint8), 0.0)
    whole = model.segment(np.frombuffer((begin + rest).encode(), np.uint8))
    tail = model.segment(np.frombuffer((begin[size:] + rest).encode(), np.uint8), score)
    assert np.concatenate([settled, tail]).tolist() == whole.tolist()
    assert score == pytest.approx(model.scores[settled].sum(), abs=1e-12)


def test_paths_that_never_meet_settle_nothing():
    # With a and aa alike the best path depends on whether the length is even, to the very end.
    model, _, _ = _model({b"aa": -1.0, b"a": -3.0})
    assert model.segment_open(np.full(1000, ord("a"), np.uint8), 0.0)[0] <= 1
