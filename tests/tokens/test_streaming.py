import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.tokens import streaming
from danlu.tokens.bytepiece import BytePiece

from .conftest import vocabulary


def _cut(text, cuts):
    places = sorted({min(cut, len(text)) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def _ids(parts) -> list[int]:
    return [i for part in parts for i in part.tolist()]


@settings(deadline=None)
@given(
    st.text(st.sampled_from("ab the天e\u0301\u0323\u1100\u1161\u11a8\n"), max_size=120),
    st.lists(st.integers(0, 120), max_size=12),
    st.sampled_from([1, 5, 1 << 20]),
    st.sampled_from([None, 0.4]),
)
def test_equals_the_whole_however_it_is_cut(tokenizer, text, cuts, patience, alpha):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "PATIENCE", patience)
        for whole in (text, text.encode()):
            parts = list(tokenizer.stream(_cut(whole, cuts), alpha=alpha, seed=3))
            assert _ids(parts) == tokenizer.encode(whole, alpha=alpha, seed=3)


def test_lines_leave_as_they_are_finished(tokenizer):
    taken = [
        tokenizer.decode(part.tolist()) for part in tokenizer.stream(["ab\nthe", " of", "\n", "\n", "ab", "\n", "x"])
    ]
    assert taken == ["ab\n", "the of\n\n", "ab\n", "x"]


def test_memory_is_bounded_on_a_line_without_end(tokenizer, monkeypatch):
    monkeypatch.setattr(streaming, "PATIENCE", 1000)
    largest = 0
    engine_open = type(tokenizer.engine).segment_open

    def watch(engine, data, score):
        nonlocal largest
        largest = max(largest, data.size)
        return engine_open(engine, data, score)

    monkeypatch.setattr(type(tokenizer.engine), "segment_open", watch)
    rng = random.Random(0)
    text = "".join(rng.choice(["the ", "watching ", "abab", "天气", "aa"]) for _ in range(20_000))
    ids = _ids(tokenizer.stream(text[i : i + 37] for i in range(0, len(text), 37)))
    assert ids == tokenizer.encode(text)
    assert largest < 1200


def test_a_line_whose_paths_never_meet_waits_for_its_end(monkeypatch):
    monkeypatch.setattr(streaming, "PATIENCE", 16)
    made = BytePiece(vocabulary({b"aa": 10**6, b"a": 10}))
    for size in (999, 1000):
        parts = list(made.stream("a" for _ in range(size)))
        assert _ids(parts) == made.encode("a" * size)


def test_a_mixed_source_is_refused(tokenizer):
    with pytest.raises(TypeError, match="source must be all str or all bytes, got bytes after str"):
        list(tokenizer.stream(["a", b"b"]))
    with pytest.raises(TypeError, match="source must be str or bytes, got 3"):
        list(tokenizer.stream([3]))


def test_nothing_gives_nothing(tokenizer):
    assert _ids(tokenizer.stream([])) == _ids(tokenizer.stream(["", ""])) == []


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40))
def test_decoding_holds_back_unfinished_characters(tokenizer, text):
    ids = tokenizer.encode(text.encode())
    parts = list(tokenizer.decode_stream(ids))
    assert "".join(parts) == text and "" not in parts


def test_decoding_ends_with_what_cannot_be_finished(tokenizer):
    ids = [3 + byte for byte in "天".encode()[:2]]
    assert list(tokenizer.decode_stream(ids)) == ["\ufffd"]
