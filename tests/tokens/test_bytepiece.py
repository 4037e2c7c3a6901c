import copy
import hashlib
import pickle
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from danlu.tokens.bytepiece import BytePiece

from .conftest import vocabulary

TEXTS = [
    "",
    "the watching",
    "天气 né\n\n\nab",
    "\n",
    "\r\n\u2028\x85\x00",
    "👩‍🚀 𐍈",
    "e\u0301 \u1100\u1161\u11a8 \u212b",
    "aaa" * 99,
]


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([None, 0.0, 0.3, 1.0, 30.0]))
@example(b"\xff\xfe\x80\n\n", None)
def test_bytes_come_back(tokenizer, data, alpha):
    ids = tokenizer.encode(data, alpha=alpha, seed=0)
    assert tokenizer.decode_bytes(ids) == data
    assert all(3 <= i < tokenizer.vocab_size for i in ids)


@settings(deadline=None)
@given(st.text(max_size=100))
@example("e\u0301\u0323 \u1100\u1161 \r\n \u2028")
def test_text_comes_back_in_normal_form(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), errors="strict") == unicodedata.normalize("NFC", text)
    as_it_is = BytePiece(tokenizer.vocabulary, normalization=None)
    assert as_it_is.decode(as_it_is.encode(text), errors="strict") == text
    assert b"".join(tokenizer.tokenize(text)) == unicodedata.normalize("NFC", text).encode()


def test_no_piece_crosses_a_line(tokenizer):
    for piece in tokenizer.tokenize("ab\n\n\nab the.\n\nthe"):
        assert b"\n" not in piece.rstrip(b"\n")


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_batch_equals_single_texts(tokenizer, alpha):
    ids = tokenizer.encode_batch(TEXTS, alpha=alpha, seed=list(range(len(TEXTS))), add_bos=True, add_eos=True)
    alone = [tokenizer.encode(t, alpha=alpha, seed=i, add_bos=True, add_eos=True) for i, t in enumerate(TEXTS)]
    assert ids == alone
    assert all(row[0] == 1 and row[-1] == 2 for row in ids)
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch([b"ab", "ab"]) == [tokenizer.encode("ab")] * 2


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=60), st.sampled_from([None, 0.2]))
def test_offsets(tokenizer, text, alpha):
    ids, spans = tokenizer.encode_with_offsets(text, alpha=alpha, seed=2, unit="byte")
    normal = unicodedata.normalize("NFC", text).encode()
    assert ids == tokenizer.encode(text, alpha=alpha, seed=2)
    assert [normal[a:b] for a, b in spans.tolist()] == [tokenizer.decode_bytes([i]) for i in ids]
    _, places = tokenizer.encode_with_offsets(text, alpha=alpha, seed=2)
    assert places.shape == (len(ids), 2)
    for (begin, end), identifier in zip(places.tolist(), ids, strict=True):
        assert 0 <= begin < end <= len(text)
        # The characters that a token is given hold its bytes.
        assert tokenizer.decode_bytes([identifier]) in unicodedata.normalize("NFC", text[begin:end]).encode()
    if ids:
        assert places[0, 0] == 0 and places[-1, 1] == len(text)
        assert (places[1:, 0] <= places[:-1, 1]).all() and (np.diff(places[:, 0]) >= 0).all()


def test_character_offsets_are_those_of_the_text_before_normalisation(tokenizer):
    text = "e\u0301n \u1112\u1161\u11abx"  # e + acute becomes one character, three letters one syllable
    ids, places = tokenizer.encode_with_offsets(text)
    spans = {tokenizer.decode_bytes([i]): tuple(span) for i, span in zip(ids, places.tolist(), strict=True)}
    assert spans["é".encode()] == (0, 2)
    assert spans[b"n"] == (2, 3)
    assert spans[b"x"] == (7, 8)
    with pytest.raises(ValueError, match="unit must be 'character' or 'byte', got 'word'"):
        tokenizer.encode_with_offsets("a", unit="word")
    with pytest.raises(ValueError, match="unit 'character' needs a str, got bytes"):
        tokenizer.encode_with_offsets(b"a")


def test_special_tokens():
    made = BytePiece(vocabulary(), special_tokens=("<pad>", "<bos>", "<eos>", "<|user|>", "<|end|>"))
    assert made.special_ids == {
        "<pad>": 0,
        "<bos>": 1,
        "<eos>": 2,
        "<|user|>": made.vocab_size - 2,
        "<|end|>": made.vocab_size - 1,
    }
    assert made.vocab_size == len(made) == 3 + len(made.vocabulary) + 2
    ids = [1, *made.encode("the"), made.special_ids["<|end|>"], 2, 0]
    assert made.decode(ids) == "the"
    assert made.decode(ids, special_tokens=True) == "<bos>the<|end|><eos><pad>"
    assert 1 not in made.encode("<bos>") and made.decode(made.encode("<bos>")) == "<bos>"


@pytest.mark.parametrize(
    "names",
    [
        ("<pad>", "<bos>"),
        ("<pad>", "<bos>", "<eos>", "<pad>"),
        ("<bos>", "<pad>", "<eos>"),
        ("<pad>", "<bos>", "<eos>", ""),
    ],
)
def test_wrong_special_tokens(names):
    with pytest.raises(ValueError, match="special_tokens must be distinct names that begin with <pad>, <bos>, <eos>"):
        BytePiece(vocabulary(), special_tokens=names)


def test_copies_and_pickles(tokenizer):
    special = BytePiece(vocabulary(), special_tokens=("<pad>", "<bos>", "<eos>", "<x>"), normalization=None)
    for made in (tokenizer, special):
        for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
            assert other == made and hash(other) == hash(made)
            assert other.encode("watching the e\u0301") == made.encode("watching the e\u0301")
    assert special != tokenizer and tokenizer != "tokenizer"
    assert repr(tokenizer) == f"BytePiece({tokenizer.vocab_size} ids, longest piece 7 bytes)"


def test_many_samplers_are_not_kept(tokenizer):
    for i in range(20):
        tokenizer.encode("the", alpha=i / 10)
    assert len(tokenizer._samplers) <= 8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.encode(3), TypeError, "text must be str or bytes, got 3 of type int"),
        (lambda t: t.encode(None), TypeError, "text must be str or bytes, got None"),
        (lambda t: t.encode_batch("text"), TypeError, "texts must be a sequence of texts, got one str"),
        (lambda t: t.encode_batch(["a", 1]), TypeError, r"texts\[1\] must be str or bytes, got 1"),
        (lambda t: t.encode_batch(["a"], threads=0), ValueError, "threads must be at least 1, got 0"),
        (lambda t: t.encode("ab\ud800"), ValueError, r"lone surrogate '\\ud800' at character 2: replace it"),
        (lambda t: t.decode([3, 10**6]), ValueError, r"ids must be in 0\.\.\d+, got 1000000"),
        (lambda t: t.decode([-1]), ValueError, r"ids must be in 0\.\.\d+, got -1"),
        (lambda t: t.decode([4.5]), TypeError, "ids must be integers, got 4.5"),
        (lambda t: t.decode("ab"), TypeError, "ids must be integers, got 'a'"),
        (lambda t: t.decode([3 + 0xFF], errors="strict"), ValueError, "can't decode byte 0xff"),
        (lambda t: BytePiece(t.vocabulary, normalization="NFKC"), ValueError, "normalization must be 'nfc' or None"),
    ],
)  # fmt: skip
def test_bad_input(tokenizer, call, error, message):
    with pytest.raises(error, match=message):
        call(tokenizer)


def test_decode_replaces_ignores_and_takes_arrays(tokenizer):
    ids = tokenizer.encode(b"a\xffb")
    assert tokenizer.decode(ids) == "a\ufffdb"
    assert tokenizer.decode(np.array(ids), errors="ignore") == "ab"
    assert (
        list(tokenizer.decode_stream(tokenizer.encode("a天气né")))
        and "".join(tokenizer.decode_stream(tokenizer.encode("a天气né"))) == "a天气né"
    )


def _text_of_many_scripts() -> str:
    rng = random.Random(9752)
    ranges = [(32, 126)] * 6 + [
        (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE5B),
        (0x1100, 0x11FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F),
    ]  # fmt: skip
    between = ["", " ", "\n", "\n\n", "\r\n", " the ", "import ", "的", "000", "aaaaaaaa", "        "]
    parts = []
    for _ in range(600):
        low, high = rng.choice(ranges)
        parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12))))
        parts.append(rng.choice(between))
    return "".join(parts)


@pytest.mark.parametrize(
    ("name", "count", "digest"),
    [
        ("bytepiece.eu.plus.40k.model", 8875, "01f709278b8b759e"),
        ("bytepiece.id.plus.40k.model", 8671, "168f35e0764ece3f"),
        ("bytepiece.zh.id.eu.40k.model", 9500, "c871da33fbb1a061"),
        ("bytepiece_80k.model", 8368, "406357223add57c0"),
    ],
)
def test_published_models_segment_as_the_published_package(published, name, count, digest):
    # Digests of the ids that the published package, version 0.6.3, gives for this text.
    ids = BytePiece.from_file(published[name]).encode_array(_text_of_many_scripts())
    assert ids.size == count
    assert hashlib.sha256(ids.astype("int32").tobytes()).hexdigest()[:16] == digest
