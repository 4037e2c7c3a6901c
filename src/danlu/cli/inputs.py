"""Reading what a command is given: models, texts, lengths. Everything wrong is a ValueError that says what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder or a hub name.

    Args:
        name: folder with a ``config.json``, or a hub name.
        device: ``auto`` (a GPU when there is one), or what ``torch.device`` takes.
        dtype: ``auto`` (float32 on a CPU, the checkpoint's elsewhere), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ValueError: no such model, a damaged checkpoint, or an unknown device or dtype.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as host_logging

    place = _device(device)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto" and dtype not in dtypes:
        raise ValueError(f"--dtype must be auto, {', '.join(dtypes)}, got {dtype!r}")
    kind = dtypes.get(dtype, torch.float32 if place.type == "cpu" else "auto")
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"--model must be a folder with a config.json or a hub name, got {name}")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"--model {name} does not exist")
    host_logging.set_verbosity_error()
    host_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except SafetensorError as error:
        raise ValueError(f"the checkpoint in {name} is truncated or damaged ({error}): fetch it again") from error
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load a causal language model and its tokenizer from {name}: {first}") from error
    return model.to(place).eval(), tokenizer


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:1, ..., got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no CUDA GPU that torch can use")
    return device


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
    if not content.strip():
        raise ValueError(f"{what} is empty: pass a text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not UTF-8 text (byte 0x{content[error.start]:02x} at offset {error.start}): pass a text file"
        ) from error
    if "\0" in text:
        raise ValueError(f"{what} is binary (a zero byte at offset {content.index(0)}): pass a text file")
    return text


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
