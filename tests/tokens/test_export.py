"""Other libraries' tokenizers against BytePiece: the same ids, or a stated difference."""

import copy
import json
import math
import pickle
import random
import re
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.export import _survive, byte_characters, to_sentencepiece, to_tokenizers
from danlu.tokens.vocabulary import Vocabulary

LANGUAGES = (
    "The quick brown fox jumps over 13 lazy dogs.\nİstanbul'da yağmur yağıyor.\r\nДобрый день, мир!\n\n\n"
    "天气很好，我们去公园。\n東京は夜の七時。\n대한민국 만세\nสวัสดีชาวโลก\nمرحبا بالعالم\nשלום עולם\nनमस्ते दुनिया\n"
    "Ça va très bien, merci; l'été né à Zürich.\n👩‍👩‍👧‍👦🏳️‍🌈 emoji\t\ttabs "
    "\x00\x01\x7f\x85\u2028\u2029\ufeff controls\n"
    "e\u0301 a\u0323\u0302 \u1100\u1161\u11a8 \u212b \u0958 composed\n"
    "    def f(x):\n        return x  # \u2581 \u00a0 end" + " " * 61 + "\n" * 7 + "\r\r\n"
)


def _random_text(rng: random.Random, size: int) -> str:
    ranges = [
        (0, 128),
        (32, 127),
        (0x80, 0x300),
        (0x370, 0x700),
        (0x3041, 0xA000),
        (0xAC00, 0xD7A4),
        (0x1F300, 0x1FA00),
    ]
    chosen = (
        chr(rng.randrange(*rng.choice(ranges))) if rng.random() < 0.85 else rng.choice(" \n\n\r\u2028")
        for _ in range(size)
    )
    return "".join(chosen)


def _ids(exported: tokenizers.Tokenizer, text: str) -> list[int]:
    return exported.encode(text, add_special_tokens=False).ids


def _copies(exported: tokenizers.Tokenizer, path) -> list[tokenizers.Tokenizer]:
    exported.save(str(path))
    saved = tokenizers.Tokenizer.from_file(str(path))
    return [exported, saved, copy.deepcopy(saved), pickle.loads(pickle.dumps(copy.copy(exported)))]


def test_ids_are_the_same_also_after_saving_and_copying(tokenizer, tmp_path):
    rng = random.Random(0)
    texts = [LANGUAGES, "", "\n", "\n\nthe", "a" * 3000, " " * 999 + "the"] + [
        _random_text(rng, 300) for _ in range(20)
    ]
    for exported in _copies(to_tokenizers(tokenizer), tmp_path / "tokenizer.json"):
        for text in texts:
            assert _ids(exported, text) == tokenizer.encode(text), text
            assert exported.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_ties_fall_the_same_way(lattices, tmp_path):
    # Counts of powers of two, equal counts and runs of one letter: exact ties, and ties up to rounding.
    for model, _ in lattices:
        rng = random.Random(1)
        texts = ["".join(rng.choices("abc", k=rng.randint(1, 60))) for _ in range(50)] + ["ab" * 400]
        for exported in _copies(to_tokenizers(model), tmp_path / "tokenizer.json"):
            assert [_ids(exported, text) for text in texts] == model.encode_batch(texts)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 10**15), min_size=256, max_size=300), st.randoms(use_true_random=False))
def test_scores_of_any_counts_survive_json(counts, rng):
    words = [f"{i}x".encode() for i in range(len(counts) - 256)]
    model = BytePiece(Vocabulary.sorted(zip([*(bytes([i]) for i in range(256)), *words], counts, strict=True)))
    exported = to_tokenizers(model)
    again = tokenizers.Tokenizer.from_str(exported.to_str())
    scores, kept = (
        np.array([score for _, score in json.loads(item.to_str())["model"]["vocab"][3:]]) for item in (exported, again)
    )
    assert (scores == kept).all()
    scale = scores[0] / model.vocabulary.scores[0]
    assert np.log2(scale) == int(np.log2(scale)) and (scores == model.vocabulary.scores * scale).all()


def test_a_scale_that_json_rounds_is_not_taken():
    rng = random.Random(6)
    model = BytePiece(Vocabulary.sorted((bytes([i]), int(100 ** rng.random())) for i in range(256)))
    scores = model.vocabulary.scores.tolist()
    assert not _survive([math.ldexp(score, 51) for score in scores])
    exported = json.loads(to_tokenizers(model).to_str())["model"]["vocab"][3:]
    assert [score for _, score in exported] == [math.ldexp(score, 52) for score in scores]


def test_the_published_models_agree_on_all_text(published, tmp_path):
    rng = random.Random(2)
    text = LANGUAGES * 3 + _random_text(rng, 20_000)
    line = text.replace("\n", " ")
    for path in published.values():
        model = BytePiece.from_file(path)
        loaded = _copies(to_tokenizers(model), tmp_path / "tokenizer.json")[1]
        assert _ids(loaded, text) == model.encode(text)
        assert _ids(loaded, line) == model.encode(line)


def test_a_line_of_megabytes_is_no_trouble(tokenizer):
    line = "the watch " * 300_000
    assert _ids(to_tokenizers(tokenizer), line) == tokenizer.encode(line)


def test_without_normalization(tokenizer):
    plain = BytePiece(tokenizer.vocabulary, normalization=None)
    assert _ids(to_tokenizers(plain), LANGUAGES) == plain.encode(LANGUAGES)
    assert plain.encode(LANGUAGES) != tokenizer.encode(LANGUAGES)


def test_special_tokens_have_their_ids_and_stay_whole(tokenizer):
    model = BytePiece(tokenizer.vocabulary, special_tokens=("<pad>", "<bos>", "<eos>", "<|user|>", "né!"))
    exported = to_tokenizers(model)
    assert exported.get_vocab_size() == model.vocab_size
    for name, identifier in model.special_ids.items():
        assert exported.token_to_id(name) == identifier
        assert _ids(exported, f"the{name}the") == [*model.encode("the"), identifier, *model.encode("the")]
    exported.encode_special_tokens = True
    assert _ids(exported, "the<bos>") == model.encode("the<bos>")


def test_what_cannot_be_exact_is_refused(tokenizer):
    clash = BytePiece(tokenizer.vocabulary, special_tokens=("<pad>", "<bos>", "<eos>", "Ġthe"))
    with pytest.raises(ValueError, match=r"special_tokens .*'Ġthe'"):
        to_tokenizers(clash)


def test_no_scale_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr("danlu.tokens.export._SHIFTS", ())
    with pytest.raises(ValueError, match="scores of this vocabulary cannot be exported exactly"):
        to_tokenizers(tokenizer)


def test_byte_characters_are_those_of_the_library():
    characters = byte_characters()
    assert len(set(characters)) == 256
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in [*map(chr, range(128)), "é", "天", "👩"]:
        assert split.pre_tokenize_str(character)[0][0] == "".join(characters[byte] for byte in character.encode())


# SentencePiece


def _lines(text: str) -> list[str]:
    return re.findall(r"[^\n]*\n+|[^\n]+", unicodedata.normalize("NFC", text))


def _load(path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_sentencepiece_has_the_same_ids_for_the_same_pieces(tokenizer, tmp_path, caplog):
    model = BytePiece(tokenizer.vocabulary, special_tokens=("<pad>", "<bos>", "<eos>", "<|user|>"))
    left_out = to_sentencepiece(model, tmp_path / "x.model")
    assert left_out == {b"\xe5\xa4": "not whole UTF-8 characters", b"\x80\x81": "not whole UTF-8 characters"}
    assert "2 of" in caplog.text
    loaded = _load(tmp_path / "x.model")
    assert (loaded.pad_id(), loaded.bos_id(), loaded.eos_id()) == (0, 1, 2)
    for name, identifier in model.special_ids.items():
        assert loaded.id_to_piece(identifier) == name and loaded.is_control(identifier)
    for identifier, piece in enumerate(model.vocabulary.pieces, 3):
        if piece in left_out:
            assert loaded.is_unused(identifier)
        elif piece == b"\0" or piece[0] >= 0x80 and len(piece) == 1:
            assert loaded.is_byte(identifier) and loaded.id_to_piece(identifier) == f"<0x{piece[0]:02X}>"
        else:
            assert loaded.id_to_piece(identifier) == piece.decode().replace(" ", "\u2581")
            assert loaded.get_score(identifier) == np.float32(model.vocabulary.scores[identifier - 3])
    assert loaded.is_unknown(loaded.unk_id()) and loaded.unk_id() == model.vocab_size


def test_sentencepiece_writes_everything_back(tokenizer, tmp_path):
    to_sentencepiece(tokenizer, tmp_path / "x.model")
    loaded = _load(tmp_path / "x.model")
    rng = random.Random(5)
    for line in _lines(LANGUAGES.replace("\u2581", "") + _random_text(rng, 2000).replace("\u2581", "")):
        ids = loaded.encode(line)
        assert loaded.decode(ids) == line
        assert max(ids) < tokenizer.vocab_size


def test_sentencepiece_is_the_same_where_characters_are_pieces(tokenizer, tmp_path):
    to_sentencepiece(tokenizer, tmp_path / "x.model")
    loaded = _load(tmp_path / "x.model")
    rng = random.Random(6)
    for _ in range(300):
        line = (
            "".join(rng.choices(["the", " ", "watching", " of", "é", "zq", "    ", "0", ".", "天气", "in"], k=12))
            + "\n"
        )
        ours, theirs = tokenizer.encode(line), loaded.encode(line)
        score = [sum(tokenizer.vocabulary.scores[i - 3] for i in ids) for ids in (ours, theirs)]
        assert score[0] == pytest.approx(score[1], abs=1e-4)  # other ids only where float32 cannot tell them apart


def test_sentencepiece_reads_the_lower_block_as_a_space(tokenizer, tmp_path):
    words = {
        **dict.fromkeys((bytes([i]) for i in range(256)), 2),
        "\u2581the".encode(): 9,
        b" the": 9,
        b"<bos>": 5,
        b"a\0": 4,
    }
    model = BytePiece(Vocabulary.sorted(words.items()))
    left_out = to_sentencepiece(model, tmp_path / "x.model")
    assert set(left_out) == {"\u2581the".encode(), b"<bos>", b"a\0"}
    loaded = _load(tmp_path / "x.model")
    assert loaded.encode("a\u2581the") == loaded.encode("a the") == model.encode("a the")
    assert loaded.decode(loaded.encode("a\u2581the")) == "a the"
    assert loaded.decode(loaded.encode("a\0b")) == "a\0b"


def test_published_models_in_sentencepiece_need_as_many_tokens(published, tmp_path):
    for path in published.values():
        model = BytePiece.from_file(path)
        left_out = to_sentencepiece(model, tmp_path / "x.model")
        loaded = _load(tmp_path / "x.model")
        lines = _lines(LANGUAGES.split("👩")[0] * 5)
        ours, theirs = (sum(len(encode(line)) for line in lines) for encode in (model.encode, loaded.encode))
        assert len(left_out) == sum(_is_partial(piece) for piece in model.vocabulary.pieces)
        assert ours <= theirs <= (1.1 if left_out else 1) * ours


def _is_partial(piece: bytes) -> bool:
    return len(piece) > 1 and piece != piece.decode(errors="ignore").encode()
