"""A BytePiece vocabulary in the formats of other libraries: ``tokenizers`` and SentencePiece."""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from danlu.files import write_whole
from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.storage import RESERVED

logger = logging.getLogger("danlu.tokens")

#: Score of a special token in a model that must never find it in a text.
_NEVER = -1e300
#: Powers of two to scale scores by. 51 serves where the counts add up to 10**7 .. 10**15, and one of the first two
#: served every vocabulary tried.
_SHIFTS = (51, 52, 50, 53, 49, 54, 48)
#: What SentencePiece writes in place of a space.
_SPACE = "\u2581"


def to_tokenizers(tokenizer: BytePiece) -> tokenizers.Tokenizer:
    """The same tokenizer for the ``tokenizers`` library, with the same ids.

    It is a unigram model over GPT-2's printable characters for bytes. It finds the same ids, those among equally good
    segmentations included, since it too adds float64 scores from left to right and lets the longest last piece win.
    That needs the scores to be exact to the last bit, which the library's JSON reader does not promise (and saving,
    ``pickle`` and ``copy.deepcopy`` all go through it). So scores are multiplied by a power of two, which changes no
    comparison and for which writing and reading is found to be exact.

    Two things differ. Bytes that are not UTF-8 have no counterpart there: it takes ``str`` only. And its normal form C
    knows Unicode 9: combining marks and compositions added since (98 and 1 up to Unicode 14) are not put in order or
    composed there as in Python.

    Args:
        tokenizer: what to export.

    Returns:
        The tokenizer, without post-processor.

    Raises:
        ValueError: a special token is written like a piece, or no scale survives writing and reading; the result would
            not be exact then.
    """
    names = token_names(tokenizer)
    count = len(RESERVED) + len(tokenizer.vocabulary)
    scores = _stable([float(score) for score in tokenizer.vocabulary.scores])
    model = models.Unigram(
        [*((name, _NEVER) for name in names[: len(RESERVED)]), *zip(names[len(RESERVED) : count], scores, strict=True)]
    )
    result = tokenizers.Tokenizer(model)
    if tokenizer.normalization == "nfc":
        result.normalizer = normalizers.NFC()
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A line with the line feeds after it. Without backtracking: a line may have millions of characters.
            pre_tokenizers.Split(Regex(r"[^\n]++\n*+|\n++"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    special = (*names[: len(RESERVED)], *names[count:])
    result.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return result


def token_names(tokenizer: BytePiece) -> list[str]:
    """What ``tokenizers`` calls each id: pieces in GPT-2's characters, special tokens by their names.

    Text about tokenizers can make ``<pad>`` a piece. The reserved token is then called ``<|pad|>``, since the other
    library has one id for each string.

    Raises:
        ValueError: a further special token has the name of a piece.
    """
    characters = byte_characters()
    pieces = ["".join(characters[byte] for byte in piece) for piece in tokenizer.vocabulary.pieces]
    taken = {*pieces, *tokenizer.special_tokens[len(RESERVED) :]}
    reserved = []
    for name in RESERVED:
        while name in taken:
            name = f"<|{name[1:-1]}|>"
        reserved.append(name)
    clash = set(pieces).intersection(tokenizer.special_tokens[len(RESERVED) :])
    if clash:
        raise ValueError(
            f"special_tokens must not be written like a piece for export, got {sorted(clash)}: the other library has "
            "one id for each string, so that ids would not be the same; rename the special token"
        )
    return [*reserved, *pieces, *tokenizer.special_tokens[len(RESERVED) :]]


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: itself where it is printable, else the next free one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _stable(scores: list[float]) -> list[float]:
    """The scores times a power of two that the JSON of ``tokenizers`` keeps to the last bit."""
    distinct = sorted(set(scores))
    for shift in _SHIFTS:
        scaled = [math.ldexp(score, shift) for score in distinct]
        if _survive(scaled):
            return [math.ldexp(score, shift) for score in scores]
    raise ValueError(
        "the scores of this vocabulary cannot be exported exactly: the JSON of tokenizers rounds them at every scale "
        f"2**k, k in {_SHIFTS}; change any one count by 1"
    )


def _survive(scores: list[float]) -> bool:
    probe = tokenizers.Tokenizer(models.Unigram([(str(i), score) for i, score in enumerate(scores)]))
    for _ in range(2):
        probe = tokenizers.Tokenizer.from_str(probe.to_str())
    return [score for _, score in json.loads(probe.to_str())["model"]["vocab"]] == scores


def to_sentencepiece(tokenizer: BytePiece, path: str | Path) -> dict[bytes, str]:
    """Write a SentencePiece unigram model that segments text nearly alike, with the same ids.

    Identity normalisation, no dummy prefix, no removal of spaces, byte fallback. Every piece that SentencePiece can
    hold keeps its id; behind the ids of the tokenizer come an unknown token and a fallback entry for each ASCII byte,
    which text never gets. All text is covered and comes back from decoding.

    With four published models, 1.3 MB of Python and English take as many tokens to 0.01 %, and 98.9 % of lines or more
    have the very same ids. Where a thousand pieces must be left out, rare characters take a tenth more.

    What SentencePiece cannot do as BytePiece does, so that a few tokens differ:

    * Pieces that are not whole characters are left out. A character that is no piece by itself is written byte by byte
      there, at the price of its least likely piece less 10, not of its bytes.
    * Scores are float32 and are added up over the whole text. Encode line by line, with the line feeds at the end of
      each line: a megabyte at once takes up to a hundred-thousandth more tokens.
    * U+2581 stands for the space. In a text it is read as a space and comes back as one; pieces with it are left out.
    * Text is not normalised. Bring it to normal form C first where the tokenizer has ``normalization="nfc"``.

    Args:
        tokenizer: what to export.
        path: of the model file, usually ``.model``.

    Returns:
        The pieces that were left out, each with the reason. Their ids stay unused.

    Source: the format is sentencepiece_model.proto of google/sentencepiece.
    """
    vocabulary = tokenizer.vocabulary
    entries = [(name, 0.0, _CONTROL) for name in tokenizer.special_tokens[:3]]
    taken = {*tokenizer.special_tokens, "<unk>", *(_byte_name(byte) for byte in range(256))}
    left_out: dict[bytes, str] = {}
    fallback = set(range(256))
    for identifier, (piece, score) in enumerate(zip(vocabulary.pieces, vocabulary.scores.tolist(), strict=True), 3):
        text, reason = _as_sentencepiece(piece, taken)
        if not reason:
            entries.append((text, score, _NORMAL))
        elif len(piece) == 1:
            entries.append((_byte_name(piece[0]), 0.0, _BYTE))
            fallback.remove(piece[0])
        else:
            entries.append((f"<unused {identifier}>", 0.0, _UNUSED))
            left_out[piece] = reason
    entries += [(name, 0.0, _CONTROL) for name in tokenizer.special_tokens[3:]]
    unknown = len(entries)
    entries += [("<unk>", 0.0, _UNKNOWN), *((_byte_name(byte), 0.0, _BYTE) for byte in sorted(fallback))]
    if left_out:
        logger.warning(
            "%d of %d pieces have no place in a SentencePiece model and are left out, so that some text gets other "
            "tokens: %s",
            len(left_out),
            len(vocabulary),
            "; ".join(sorted(set(left_out.values()))),
        )
    write_whole(path, _model(entries, unknown, tokenizer.special_tokens))
    return left_out


def _as_sentencepiece(piece: bytes, taken: set[str]) -> tuple[str, str]:
    """The text of a piece, or why there is none."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "", "not whole UTF-8 characters"
    if _SPACE in text:
        return "", "holds U+2581, which stands for the space there"
    if "\0" in text:
        return "", "holds U+0000, which ends a string there"
    if text in taken:
        return "", "written like a special token"
    return text.replace(" ", _SPACE), ""


def _byte_name(byte: int) -> str:
    return f"<0x{byte:02X}>"


# The protobuf message, written by hand: a tag (field number and wire type), then a number or a length and its bytes.
# sentencepiece's own classes for it need a package that it does not install.

_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6


def _model(entries: Iterable[tuple[str, float, int]], unknown: int, special_tokens: tuple[str, ...]) -> bytes:
    pieces = [
        _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind))
        for text, score, kind in entries
    ]
    pad, bos, eos = (name.encode() for name in special_tokens[:3])
    unigram = 1
    trainer: dict[int, int | bytes] = {
        3: unigram, 4: len(pieces), 22: 0, 35: 1,  # split_by_whitespace, byte_fallback
        40: unknown, 41: 1, 42: 2, 43: 0, 45: b"<unk>", 46: bos, 47: eos, 48: pad,
    }  # fmt: skip
    # name, charsmap, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer: dict[int, int | bytes] = {1: b"identity", 2: b"", 3: 0, 4: 0, 5: 1}
    return b"".join(pieces) + _field(2, _message(trainer)) + _field(3, _message(normalizer))


def _message(fields: dict[int, int | bytes]) -> bytes:
    return b"".join(_field(number, value) for number, value in fields.items())


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
