"""How much memory a forward pass will need, how much there is, and how much one took."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("danlu.memory")

#: What ``PeakMemory`` reads, by device type; printed beside the numbers.
PEAK_KIND = {
    "cuda": "CUDA allocator peak above the level before the prefill",
    "cpu": "resident memory peak (VmHWM) above the level before the prefill",
}


def prefill_bytes(model: nn.Module, length: int, *, batch: int = 1, logits: int) -> int:
    """Estimate what one prefill adds to the weights: key/value cache, activations of one layer, attention, logits.

    The estimate counts what grows with the length and is meant to be right within a factor of two: it decides whether
    to start, it is not a measurement.

    Args:
        model: a Hugging Face causal language model.
        length: tokens per row, >= 1.
        batch: rows, >= 1.
        logits: positions per row whose logits are kept, in 1..length.

    Returns:
        Bytes.
    """
    host: Any = model
    config = host.config.get_text_config()
    element = next(model.parameters()).element_size()
    hidden = config.hidden_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    cache = config.num_hidden_layers * 2 * kv_heads * head_dim * element
    # Residual, normalised input, q, k, v, attention output and the three arrays of a gated feed-forward layer.
    layer = (4 * hidden + (2 * heads + 2 * kv_heads) * head_dim + 3 * inner) * element
    per_token = cache + layer
    # Only the eager path holds the score matrix: once as scores, once as float32 softmax.
    square = heads * length * (element + 4) if getattr(config, "_attn_implementation", "") == "eager" else 0
    scores = logits * config.vocab_size * (element + 4)
    return batch * (length * (per_token + square) + scores)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on ``device``; None where the system does not say.

    On the CPU this is the smaller of the system's available memory and what the control group leaves.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    if device.type != "cpu":
        return None
    found = [value for value in (_system_available(), _group_available()) if value is not None]
    return min(found) if found else None


def _system_available() -> int | None:
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        match = None
    if match:
        return int(match[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _group_available() -> int | None:
    """What the control group (version 2) of this process leaves; None without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = (group / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cached = re.search(r"^inactive_file (\d+)", statistics, re.MULTILINE)
    return max(0, int(limit) - used + (int(cached[1]) if cached else 0))


def check_memory(model: nn.Module, length: int, *, batch: int = 1, logits: int) -> int:
    """Refuse a prefill that cannot fit, before it starts.

    Returns:
        The estimate in bytes.

    Raises:
        ValueError: the estimate exceeds the available memory; says how much is needed and how much there is.
    """
    needed = prefill_bytes(model, length, batch=batch, logits=logits)
    device = next(model.parameters()).device
    available = available_bytes(device)
    if available is None:
        logger.debug("no memory figure for %s: the check is skipped", device)
    elif needed > available:
        raise ValueError(
            f"length {length} needs about {readable(needed)} of memory on {device} (batch {batch}), but only "
            f"{readable(available)} is available: choose shorter lengths, a smaller batch or a narrower dtype"
        )
    return needed


def readable(count: float) -> str:
    """A byte count for people: ``1536`` gives ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class PeakMemory:
    """Context manager: ``.bytes`` is the peak above the level at entry, None where it cannot be read.

    On CUDA the allocator's own counter; on Linux CPUs the resident high-water mark, reset at entry after the heap's
    free pages were handed back, so that a run does not hide in what an earlier one left behind.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        self._before = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu" and sys.platform == "linux":
            _trim_heap()
            try:
                Path("/proc/self/clear_refs").write_text("5")  # 5 resets the high-water mark
            except OSError:
                self._before = -1
            else:
                self._before = _status("VmRSS") or -1
        else:
            self._before = -1
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before < 0:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            peak = _status("VmHWM")
            self.bytes = None if peak is None else max(0, peak - self._before)


def _status(field: str) -> int | None:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else None


def _trim_heap() -> None:
    """Return free heap pages to the system, where the C library can (glibc)."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
