"""Files of a tokenizer: danlu's own (safetensors, versioned) and the published ``.model`` (JSON), read and written."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from danlu.files import replacing, write_whole
from danlu.tokens.vocabulary import Vocabulary

FORMAT, VERSION = "danlu-bytepiece", 1
#: Ids of the reserved tokens; the first piece comes after them.
RESERVED = ("<pad>", "<bos>", "<eos>")
#: A file of danlu's own inside a folder.
FILE_NAME = "bytepiece.safetensors"


@dataclass(frozen=True)
class Stored:
    """What a file holds."""

    vocabulary: Vocabulary
    special_tokens: tuple[str, ...] = RESERVED
    normalization: str | None = "nfc"


def load(path: str | Path) -> Stored:
    """Read either format, told apart by content; a folder is searched for ``bytepiece.safetensors``.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: the file is damaged, of another kind, of a newer version, or holds no valid vocabulary.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    content = path.read_bytes()
    try:
        if content[8:9] == b"{":
            return _from_safetensors(content)
        if content[:64].lstrip()[:1] == b"{":
            return Stored(_from_json(content))
        raise ValueError("it is neither a published BytePiece .model (JSON) nor a danlu tokenizer (safetensors)")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a BytePiece tokenizer: {error}") from error


def save(path: str | Path, stored: Stored) -> Path:
    """Write whole or not at all: the published format where the name ends in ``.model``, danlu's own elsewhere.

    Raises:
        ValueError: the published format cannot hold what the tokenizer has.
    """
    path = Path(path)
    if path.suffix == ".model":
        if stored.special_tokens != RESERVED or stored.normalization != "nfc":
            raise ValueError(
                f"{path.name}: the published format has no room for special tokens beyond {', '.join(RESERVED)} or for "
                "another normalization; save under a name that ends in .safetensors"
            )
        return write_whole(path, _to_json(stored.vocabulary))
    from safetensors.numpy import save_file

    header = {
        "format": FORMAT,
        "version": VERSION,
        "special_tokens": list(stored.special_tokens),
        "normalization": stored.normalization,
        "note": stored.vocabulary.note,
    }
    pieces = stored.vocabulary.pieces
    arrays = {
        "pieces": np.frombuffer(b"".join(pieces), np.uint8),
        "lengths": np.fromiter(map(len, pieces), np.int32, len(pieces)),
        "counts": stored.vocabulary.counts,
    }
    with replacing(path) as temporary:
        # One entry, because safetensors does not promise an order among several and files should be equal to the byte.
        save_file(arrays, temporary, {"danlu": json.dumps(header, ensure_ascii=False, sort_keys=True)})
    return path


def _from_safetensors(content: bytes) -> Stored:
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_arrays

    try:
        arrays = load_arrays(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["danlu"])
        if header["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT!r}, got {header['format']!r}")
        if header["version"] > VERSION:
            raise ValueError(f"version must be at most {VERSION}, got {header['version']}: update danlu")
        lengths = arrays["lengths"].astype(np.int64)
        ends = np.cumsum(lengths).tolist()
        if (lengths < 1).any() or ends[-1:] != [arrays["pieces"].size]:
            raise ValueError(f"lengths must add up to the {arrays['pieces'].size} bytes of the pieces, got {ends[-1:]}")
        data = arrays["pieces"].tobytes()
        pieces = tuple(data[end - size : end] for end, size in zip(ends, lengths.tolist(), strict=True))
        vocabulary = Vocabulary(pieces, arrays["counts"], header["note"])
        return Stored(vocabulary, tuple(header["special_tokens"]), header["normalization"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"damaged or foreign safetensors file ({type(error).__name__}: {error})") from error


def _from_json(content: bytes) -> Vocabulary:
    try:
        entries = json.loads(content, object_pairs_hook=_pairs)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"damaged JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError("it has no pieces")
    found: list[tuple[int, bytes, Any]] = []
    for key, entry in entries:
        try:
            identifier, _, count = entry
            found.append((identifier, base64.b64decode(key, validate=True), count))
        except (ValueError, TypeError, binascii.Error):
            raise ValueError(f"entry {key!r} must be base64 of a piece with [id, text, count], got {entry!r}") from None
        if type(identifier) is not int or type(count) is not int:
            raise ValueError(f"entry {key!r} must have whole numbers for id and count, got {entry!r}")
    found.sort(key=lambda item: item[0])
    for place, (identifier, piece, _) in enumerate(found, len(RESERVED)):
        if identifier != place:
            raise ValueError(
                f"ids must be {len(RESERVED)}, 4, ... without gaps, got {identifier} for {piece!r} at {place}"
            )
    return Vocabulary(tuple(piece for _, piece, _ in found), np.array([count for _, _, count in found]))


def _pairs(pairs: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """JSON objects as pairs, so that a piece that occurs twice is seen."""
    return list(pairs)


def _to_json(vocabulary: Vocabulary) -> str:
    entries = {
        base64.b64encode(piece).decode(): [identifier, piece.decode(errors="ignore"), count]
        for identifier, (piece, count) in enumerate(
            zip(vocabulary.pieces, vocabulary.counts.tolist(), strict=True), len(RESERVED)
        )
    }
    return json.dumps(entries, indent=4, ensure_ascii=False)
