import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.tokens import unicode

#: Characters that normal form C joins with others, or moves.
RESTLESS = st.text(
    st.sampled_from("ae\u0301\u0323\u0327\u0338\u093c\u09be\u09c7\u1100\u1161\u11a8\uac00\u0b3e\u0b47n \n")
)


def test_boundaries_are_the_characters_that_nothing_before_them_can_join():
    joining = set()
    for code in range(sys.maxunicode + 1):
        parts = unicodedata.decomposition(chr(code))
        if parts and not parts.startswith("<") and len(parts.split()) == 2:
            joining.add(chr(int(parts.split()[1], 16)))
    joining |= {chr(code) for code in [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if character in joining or unicodedata.combining(character):
            assert not unicode.is_boundary(character), hex(code)
    assert all(unicode.is_boundary(character) for character in "a 天한é\n\u1100😀")


@given(RESTLESS, RESTLESS)
def test_a_safe_cut_is_safe_whatever_follows(text, rest):
    cut = unicode.safe_cut(text)
    whole = unicodedata.normalize("NFC", text + rest)
    assert whole == unicodedata.normalize("NFC", text[:cut]) + unicodedata.normalize("NFC", text[cut:] + rest)


@given(RESTLESS)
def test_spans_cover_the_text_and_hold_the_characters(text):
    normal = unicodedata.normalize("NFC", text)
    starts, ends = unicode.character_spans(text, normal)
    assert len(starts) == len(ends) == len(normal)
    for character, begin, end in zip(normal, starts.tolist(), ends.tolist(), strict=True):
        assert character in unicodedata.normalize("NFC", text[begin:end])
    if normal:
        assert starts[0] == 0 and ends[-1] == len(text)


def test_character_offsets():
    data = np.frombuffer("a天b".encode(), np.uint8)
    spans = np.array([[0, 1], [0, 2], [1, 4], [2, 3], [3, 5]])
    assert unicode.character_offsets(data, spans).tolist() == [[0, 1], [0, 2], [1, 2], [1, 2], [1, 3]]


def test_surrogates_are_told():
    with pytest.raises(
        ValueError, match=r"text must be encodable as UTF-8, got the lone surrogate '\\udcff' at character 1"
    ):
        unicode.to_utf8("a\udcff")
