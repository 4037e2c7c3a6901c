"""What a model's cache costs: numbers per token and layer, bytes by length, and what a conversion would save.

Only a configuration is read; no weights are loaded and no model is built.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from danlu.context.memory import readable
from danlu.tuning.kv_cache.layers import LayerCache, attention_heads, cache_layers

if TYPE_CHECKING:
    import torch
    from rich.table import Table

__all__ = ["CacheRow", "KVCacheReport", "LayerCache", "kv_cache_report"]

FORMAT = 1
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}


@dataclass(frozen=True)
class CacheRow:
    """A way to cache, and its cost.

    Args:
        name: what it is.
        numbers: per token and layer while nothing is dropped, mean over layers.
        bytes_per_token: all layers, one row of a batch.
        totals: bytes by length, whole batch.
        outputs: what happens to the model's outputs.
    """

    name: str
    numbers: float
    bytes_per_token: float
    totals: tuple[int, ...]
    outputs: str


@dataclass(frozen=True)
class KVCacheReport:
    """What :func:`kv_cache_report` found; the first row is the model as the host library caches it."""

    model: str
    layers: int
    dtype: str
    batch: int
    lengths: tuple[int, ...]
    rows: tuple[CacheRow, ...]
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> CacheRow:
        """The row of a name.

        Raises:
            ValueError: no such row.
        """
        for one in self.rows:
            if one.name == name:
                return one
        raise ValueError(f"no row {name!r}: have {', '.join(one.name for one in self.rows)}")

    def table(self) -> Table:
        """The report as a ``rich`` table, with the share of the first row at the longest length."""
        from rich.table import Table

        caption = "\n".join(self.notes)
        table = Table(title=f"{self.model}: {self.layers} layers, {self.dtype}, batch {self.batch}", caption=caption)
        table.add_column("cache", no_wrap=True)
        for name in (
            "numbers per\ntoken, layer",
            "bytes per\ntoken",
            *(f"{n:,}\ntokens" for n in self.lengths),
            "of now",
        ):
            table.add_column(name, justify="right")
        table.add_column("outputs")
        now = self.rows[0].totals[-1]
        for one in self.rows:
            table.add_row(
                one.name,
                f"{one.numbers:,.6g}",
                f"{one.bytes_per_token:,.0f}",
                *(readable(total) for total in one.totals),
                f"{one.totals[-1] / now:.1%}" if now else "-",
                one.outputs,
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


def kv_cache_report(
    model_or_config: Any,
    lengths: Sequence[int] = (4096, 32768, 131072),
    batch: int = 1,
    dtype: str | torch.dtype | None = None,
    *,
    kv_ranks: Sequence[int] | None = None,
    rope_dim: int | None = None,
    groups: Sequence[int] | None = None,
    window: int = 1024,
) -> KVCacheReport:
    """Count what a model caches and what it would cache after each conversion.

    Args:
        model_or_config: a ``transformers`` model, its configuration, or a configuration with a method
            ``cache_elements()`` that gives a ``LayerCache`` for each layer.
        lengths: tokens, each >= 1.
        batch: rows, >= 1.
        dtype: ``float32``, ``bfloat16``, ``float16``, ``float8_e4m3fn``, ``float8_e5m2`` or ``int8``; None is the
            model's, or bfloat16 where it names none.
        kv_ranks: sizes of a latent to compare, each >= 1; None: 512 where that is smaller, and what halves and quarters
            the cache.
        rope_dim: channels of the shared rotary key beside them, even, >= 2; None is min(64, head size).
        groups: numbers of key heads to compare; None: 8 and 1 where they are fewer.
        window: tokens of a sliding window for the hybrid of windows and one full layer, >= 2.

    Returns:
        A report; it prints as a table.

    Raises:
        TypeError: neither a model nor a configuration.
        ValueError: an argument out of range, an encoder-decoder, or a model without an attention cache.

    Source: Scientific Spaces archive 10091, 9603; arXiv:2405.04434.
    """
    _check(lengths, batch, kv_ranks, rope_dim, groups, window)
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"model_or_config must be a transformers model or configuration, got {type(config).__name__}")
    if config.is_encoder_decoder:
        raise ValueError(f"model must be decoder-only, got {config.model_type}, which also caches an encoder's outputs")
    text = config.get_text_config(decoder=True)
    named = _dtype_name(dtype, model_or_config, text)
    layers = cache_layers(text)
    size = _SIZES[named]
    notes = []
    if any(layer.state is None for layer in layers):
        notes.append("The states of its linear layers do not grow with the length; their size is not known here.")
    if any(layer.tokens is not None for layer in layers):
        notes.append("Layers with a window keep its tokens less one, as the host library does.")

    def row(name: str, some: Sequence[LayerCache], size: int, outputs: str) -> CacheRow:
        width = sum(layer.width for layer in some)
        totals = tuple(batch * size * sum(layer.numbers(length) for layer in some) for length in lengths)
        return CacheRow(name, width / len(some), width * size, totals, outputs)

    rows = [row("now", layers, size, "as they are")]
    rows += [
        row(name, some, size, outputs)
        for name, some, outputs in _variants(text, layers, kv_ranks, rope_dim, groups, window)
    ]
    if size > 1:
        rows.append(row("now, 8 bits per number", layers, 1, "rounded"))
    return KVCacheReport(config.model_type, len(layers), named, batch, tuple(lengths), tuple(rows), tuple(notes))


def _variants(
    config: Any,
    layers: Sequence[LayerCache],
    kv_ranks: Sequence[int] | None,
    rope_dim: int | None,
    groups: Sequence[int] | None,
    window: int,
) -> list[tuple[str, list[LayerCache], str]]:
    """Other ways to cache: name, layers, what happens to the outputs."""
    found: list[tuple[str, list[LayerCache], str]] = []
    plain = [layer.kind == "attention" for layer in layers]
    full = [is_plain and layer.tokens is None for is_plain, layer in zip(plain, layers, strict=True)]

    def changed(where: Sequence[bool], **change: Any) -> list[LayerCache]:
        return [replace(layer, **change) if here else layer for layer, here in zip(layers, where, strict=True)]

    if any(full):
        _, now, dim = attention_heads(config)
        width = next(layer.width for layer, here in zip(layers, full, strict=True) if here)
        for few in (8, 1) if groups is None else groups:
            if few < now and any(plain):
                name = "one key head (MQA)" if few == 1 else f"{few} key heads (GQA)"
                found.append((name, changed(plain, width=width // now * few), "other: train from scratch, or heal"))
        found.append(("latent, exact", changed(full, kind="latent"), "as they are"))
        rope = min(64, dim) if rope_dim is None else rope_dim
        usual = {512, width // 2 - rope, width // 4 - rope}
        for rank in sorted((r for r in usual if 0 < r < width - rope), reverse=True) if kv_ranks is None else kv_ranks:
            found.append(
                (f"latent {rank} + {rope}", changed(full, kind="latent", width=rank + rope), "near: calibrate and heal")
            )
        if sum(full) > 1:
            windows = list(full)
            windows[len(full) - 1 - full[::-1].index(True)] = False
            found.append(
                (
                    f"windows of {window:,}, one full layer",
                    changed(windows, tokens=window - 1),
                    "other: train from scratch",
                )
            )
    return found


def _dtype_name(dtype: Any, model: Any, config: Any) -> str:
    named = (
        dtype if dtype is not None else getattr(model, "dtype", None) or getattr(config, "dtype", None) or "bfloat16"
    )
    named = str(named).removeprefix("torch.")
    if named not in _SIZES:
        raise ValueError(f"dtype must be one of {', '.join(_SIZES)}, got {dtype!r}")
    return named


def _check(
    lengths: Sequence[int],
    batch: int,
    kv_ranks: Sequence[int] | None,
    rope_dim: int | None,
    groups: Sequence[int] | None,
    window: int,
) -> None:
    if not lengths or any(not isinstance(length, int) or length < 1 for length in lengths):
        raise ValueError(f"lengths must be at least one integer >= 1, got {lengths!r}")
    for name, value, least in (("batch", batch, 1), ("window", window, 2)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    for name, values in (("kv_ranks", kv_ranks), ("groups", groups)):
        if values is not None and any(not isinstance(value, int) or value < 1 for value in values):
            raise ValueError(f"{name} must be integers >= 1, got {values!r}")
    if rope_dim is not None and (rope_dim < 2 or rope_dim % 2):
        raise ValueError(f"rope_dim must be an even number >= 2, got {rope_dim}")
