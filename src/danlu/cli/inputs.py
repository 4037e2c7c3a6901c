"""Reading what a command is given: models, texts, lengths. Everything wrong is a ValueError that says what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danlu.context.documents import decode_text


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """The model and tokenizer that ``--model`` names; see ``danlu.hosts.loading.load_causal_lm``."""
    from danlu.hosts.loading import load_causal_lm

    return load_causal_lm(name, device=device, dtype=dtype, argument="--model")


def read_texts(names: Sequence[str]) -> str:
    """The files one after another; ``-`` is standard input.

    Raises:
        ValueError: a file that is empty or not UTF-8 text.
        OSError: a file that cannot be read.
    """
    return "\n".join(_read(name) for name in names)


def _read(name: str) -> str:
    what = "standard input" if name == "-" else name
    content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    return decode_text(content, what)


def parse_lengths(text: str, trained_length: int) -> list[int]:
    """``1x,4x,6000`` as token counts; ``x`` is times the trained length.

    Raises:
        ValueError: not a length, or a factor below 1.
    """
    lengths = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(x?)\s*", part)
        if match is None or (not match[2] and "." in match[1]):
            raise ValueError(f"--lengths must be tokens or factors such as 1x,2x,4096, got {part.strip()!r}")
        if match[2] and float(match[1]) < 1:
            raise ValueError(f"--lengths: a factor must be at least 1x, got {part.strip()}")
        lengths.append(round(float(match[1]) * trained_length) if match[2] else int(match[1]))
    return sorted(set(lengths))


def start_token(tokenizer: Any) -> int | None:
    """The start token, where the tokenizer puts one in front of every text; None where it does not."""
    ids = tokenizer("x")["input_ids"]
    start = getattr(tokenizer, "bos_token_id", None)
    return start if start is not None and ids and ids[0] == start else None
