import numpy as np
import pytest

from danlu.tokens.vocabulary import Vocabulary

BYTES = {bytes([i]): 1 for i in range(256)}


def test_sorted_by_length_then_bytes_with_scores_that_are_probabilities():
    made = Vocabulary.sorted({b"ba": 5, **BYTES, b"ab": 7}.items(), note="small")
    assert made.pieces[:256] == tuple(BYTES) and made.pieces[256:] == (b"ab", b"ba")
    assert made.counts.dtype == np.int64 and made.counts[256:].tolist() == [7, 5]
    assert np.exp(made.scores).sum() == pytest.approx(1, abs=1e-12)
    assert len(made) == 258 and made.note == "small"
    assert made == Vocabulary.sorted({**BYTES, b"ab": 7, b"ba": 5}.items())
    assert made != Vocabulary.sorted({**BYTES, b"ab": 7, b"ba": 6}.items()) and made != 3


def test_counts_may_pass_32_bits():
    made = Vocabulary.sorted({**BYTES, b"ab": 2**40}.items())
    assert made.counts[-1] == 2**40


@pytest.mark.parametrize(
    ("pieces", "counts", "error", "message"),
    [
        ([*BYTES, "ab"], [1] * 257, TypeError, "pieces must be bytes, got 'ab' of type str: encode text as UTF-8"),
        ([*BYTES, b""], [1] * 257, ValueError, "pieces must not be empty, got b'' at index 256"),
        ([*BYTES, b"ab", b"c", b"ab"], [1] * 259, ValueError, "pieces must be distinct, got b'c' twice"),
        ([b"ab", b"b"], [1] * 2, ValueError, "all 256 single bytes, 255 are missing: 0x00, 0x01, 0x02, 0x03, ...;"),
        (list(BYTES)[:-1], [1] * 255, ValueError, "1 are missing: 0xff; add them with count 1"),
        (list(BYTES), [1] * 255, ValueError, r"counts must hold one number per piece, 256, got shape \(255,\)"),
        (list(BYTES), [1] * 255 + [0], ValueError, r"counts must be at least 1, got 0 for piece b'\\xff'"),
        (list(BYTES), [1] * 255 + [-4], ValueError, "counts must be at least 1, got -4"),
        (list(BYTES), [1] * 255 + [1.5], TypeError, "counts must be whole numbers that fit 64 bits, got 1.5"),
        (list(BYTES), [1] * 255 + [2**70], TypeError, "counts must be whole numbers"),
        ([], [], ValueError, "all 256 single bytes, 256 are missing"),
    ],
)
def test_wrong_vocabularies(pieces, counts, error, message):
    with pytest.raises(error, match=message):
        Vocabulary(tuple(pieces), counts)
