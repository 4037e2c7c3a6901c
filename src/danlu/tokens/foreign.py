"""Tokenizers of other libraries behind one face, so that all can be given the same text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.storage import FILE_NAME

#: What a folder that the host library can load a tokenizer from has at least one of.
_HOST_FILES = ("tokenizer*", "vocab.*", "*.model", "config.json")


@dataclass(frozen=True)
class Candidate:
    """A tokenizer that can be compared.

    Args:
        name: what it is called in tables.
        kind: library, and model where that is known.
        vocab_size: number of ids, special tokens included.
        encode: ids of a text, without special tokens around it.
        decode: the text of ids.
    """

    name: str
    kind: str
    vocab_size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def open_tokenizer(source: str | Path | BytePiece, name: str | None = None) -> Candidate:
    """Open a tokenizer, told apart by what it is.

    Args:
        source: a ``BytePiece``; a file of BytePiece (either format), SentencePiece (``.model``) or tokenizers
            (``tokenizer.json``); a folder of BytePiece or of the host library; a hub name; or ``tiktoken:NAME``.
        name: what to call it; None takes the name from the source.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file of an unknown kind or a damaged one, or the library that reads it is not installed.
    """
    if isinstance(source, BytePiece):
        return _bytepiece(source, name or "BytePiece")
    text = str(source)
    if text.startswith("tiktoken:"):
        return _tiktoken(text.partition(":")[2], name or text)
    path = Path(text)
    name = name or path.name or path.resolve().name
    if path.is_dir():
        if (path / FILE_NAME).is_file():
            return _bytepiece(BytePiece.from_file(path), name)
        if not any(next(path.glob(pattern), None) for pattern in _HOST_FILES):
            raise ValueError(f"folder {path} holds no tokenizer: neither {FILE_NAME} nor files of the host library")
        return _host(text, name)
    if path.exists():
        return _file(path, name)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text) or path.suffix in (".model", ".json", ".safetensors"):
        raise FileNotFoundError(2, "there is no such tokenizer", text)
    return _host(text, name)


def _file(path: Path, name: str) -> Candidate:
    with path.open("rb") as file:
        head = file.read(64)
    if head.lstrip()[:1] == b"{" and head[8:9] != b"{":
        if _is_tokenizers(path):
            return _tokenizers(path, name)
    elif head[:1] == b"\x0a":  # the first field of SentencePiece's protocol buffer
        return _sentencepiece(path, name)
    return _bytepiece(BytePiece.from_file(path), name)


def _is_tokenizers(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False  # a damaged file: the reader of BytePiece says so
    return isinstance(content, dict) and isinstance(content.get("model"), dict)


def _bytepiece(tokenizer: BytePiece, name: str) -> Candidate:
    return Candidate(name, "BytePiece", tokenizer.vocab_size, tokenizer.encode, tokenizer.decode)


def _tokenizers(path: Path, name: str) -> Candidate:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path} is not a file that tokenizers reads: {error}") from error
    return Candidate(
        name,
        f"tokenizers {type(tokenizer.model).__name__}",
        tokenizer.get_vocab_size(with_added_tokens=True),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
    )


def _sentencepiece(path: Path, name: str) -> Candidate:
    processor = _module("sentencepiece", f"to read the SentencePiece model {path}").SentencePieceProcessor()
    try:
        processor.Load(str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    return Candidate(name, "SentencePiece", processor.GetPieceSize(), processor.EncodeAsIds, processor.DecodeIds)


def _tiktoken(encoding: str, name: str) -> Candidate:
    tiktoken = _module("tiktoken", f"for tiktoken:{encoding}")
    try:
        tokenizer = tiktoken.get_encoding(encoding)
    except ValueError as error:
        known = ", ".join(tiktoken.list_encoding_names())
        raise ValueError(f"tiktoken has no encoding {encoding!r}, it has {known}") from error
    return Candidate(name, "tiktoken", tokenizer.n_vocab, tokenizer.encode_ordinary, tokenizer.decode)


def _host(source: str, name: str) -> Candidate:
    from transformers import AutoTokenizer
    from transformers.utils import logging as host_logging

    verbosity = host_logging.get_verbosity()
    host_logging.set_verbosity_error()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"cannot load a tokenizer from {source}: {first}") from error
    finally:
        host_logging.set_verbosity(verbosity)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return Candidate(name, f"transformers {type(tokenizer).__name__}", len(tokenizer), encode, decode)


def _module(name: str, purpose: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"the package {name} is needed {purpose}: pip install {name}") from error
