import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.kernels.trie import HALF, LOW, build, first, follow


def _trie(pieces: list[bytes]):
    pieces = sorted({*pieces, *(bytes([i]) for i in range(256))})
    offsets = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    scores = -np.arange(1.0, len(pieces) + 1)
    data = np.frombuffer(b"".join(pieces), np.uint8)
    return pieces, scores, *build(data, offsets, scores)


def _walk(links, data: bytes) -> int:
    array = np.frombuffer(data, np.uint8)
    unit = first(array, 0)
    for at in range(1, len(data)):
        if unit >= 0:
            unit = follow(links, unit, array, at, len(data))
    return unit


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.binary(min_size=1, max_size=6), max_size=80), st.lists(st.binary(min_size=1, max_size=7), max_size=20)
)
def test_the_trie_holds_the_pieces_and_nothing_else(words, others):
    pieces, scores, links, unit_scores, piece, length = _trie(words)
    for i, word in enumerate(pieces):
        unit = _walk(links, word)
        assert (piece[unit], length[unit], unit_scores[unit]) == (i, len(word), scores[i])
    prefixes = {word[:end] for word in pieces for end in range(1, len(word) + 1)}
    for other in others:
        unit = _walk(links, other)
        assert (unit >= 0) == (other in prefixes)
        if unit >= 0 and other not in pieces:
            assert piece[unit] == -1 and length[unit] == 0 and unit_scores[unit] == -np.inf


def test_many_pieces_with_many_children():
    rng = np.random.default_rng(0)
    words = [rng.bytes(n) for n in (2, 3, 4, 9) for _ in range(5000)]
    words += [bytes([a, b]) for a in range(60) for b in range(256)]
    pieces, _, links, _, piece, length = _trie(words)
    assert sorted(piece[piece >= 0].tolist()) == list(range(len(pieces)))
    for i in rng.permutation(len(pieces))[:3000].tolist():
        unit = _walk(links, pieces[i])
        assert piece[unit] == i and length[unit] == len(pieces[i])
    # The array is dense: no more than three units for each that is used.
    assert links.size < 3 * (links >> HALF != LOW).sum()


def test_nothing_follows_the_end():
    _, _, links, *_ = _trie([b"ab"])
    data = np.frombuffer(b"ab", np.uint8)
    assert follow(links, first(data, 0), data, 1, 1) == -1
    assert follow(links, first(data, 0), data, 1, 2) >= 0


@pytest.mark.parametrize("size", [1, 36, 255, 256, 1000])
def test_long_pieces(size):
    pieces, _, links, _, piece, length = _trie([b"x" * size, b"x" * (size - 1) + b"y"])
    assert length[_walk(links, b"x" * size)] == size
    assert piece[_walk(links, b"x" * size)] == pieces.index(b"x" * size)
