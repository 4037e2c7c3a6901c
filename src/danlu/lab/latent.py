"""Claims on latent attention: what the cache holds, and what a decoding step costs in absorbed form."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danlu.attention.latent.absorb import absorb
from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.measuring import peak_bytes
from danlu.lab.runner import claim

_CONTEXTS, _REPEATS, _PROMPT, _NEW = (256, 1024, 4096), 5, 64, 16
_LATENT = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def small_model(heads: int = 16, layers: int = 4, hidden: int = 512, seed: int = 0, **sizes: Any) -> Any:
    """A random dense DeepSeek-V3 with the head shapes of V2-Lite (16 heads, latent 512 + 64, no query latent)."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=None,
        max_position_embeddings=16384,
        eos_token_id=None,
        **{**_LATENT, **sizes},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DeepseekV3ForCausalLM(config).eval()


def filled_cache(model: Any, tokens: int, seed: int = 0) -> Any:
    """The cache that a model makes, by one real step, and filled with random normalised latents and keys."""
    cache = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    generator = torch.Generator().manual_seed(seed)
    for layer in cache.layers:
        more = [torch.randn(1, 1, tokens - 1, x.shape[-1], generator=generator) for x in (layer.keys, layer.values)]
        layer.update(*(x.to(layer.keys.dtype) for x in more))
    return cache


def step(model: Any, cache: Any) -> Tensor:
    """Logits of one token behind the cache, which is left as it was."""
    with torch.no_grad():
        logits: Tensor = model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True).logits
    cache.crop(-1)
    return logits


def attention_step(model: Any, cache: Any) -> Callable[[], Tensor]:
    """One step of the first attention layer alone, cache update included."""
    layer, position = model.model.layers[0].self_attn, torch.tensor([[cache.get_seq_length()]])
    x = torch.randn(1, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    angles = model.model.rotary_emb(x, position)

    def call() -> Tensor:
        with torch.no_grad():
            out: Tensor = layer(x, position_embeddings=angles, attention_mask=None, past_key_values=cache)[0]
        cache.layers[0].crop(-1)
        return out

    return call


def interleaved(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Median seconds of two calls run in turn, and the median ratio of neighbours; the first pair is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for call, record in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            record.append(time.perf_counter() - start)
    a, b = (record[1:] for record in times)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in zip(a, b, strict=True))


@claim(
    name="absorbed-decode",
    title="A decoding step reads the latents as they are",
    source="archive 10091; arXiv:2405.04434",
    statement="At decoding time latent attention is an attention with one shared key: the up-projections move to the "
    "query and the output, the outputs are the same, and the work per cached token falls by two orders of magnitude.",
    measurement="A random DeepSeek-V3 of the host library (4 dense layers, width 512, 16 heads, latent 512 + 64) as it "
    "is and after danlu.absorb: greedy tokens, logits, time of one attention layer and of the whole model per step, "
    "peak memory of a step, at up to 4096 cached tokens, float32, batch 1.",
    seeds=(0,),
    budget=40,
)
def absorbed_decode(context: Context) -> Evidence:
    """Time and compare steps, the stock model and an absorbed copy in turn."""
    stock = small_model(seed=context.seeds[0])
    ours = absorb(copy.deepcopy(stock))
    prompt = torch.randint(4096, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}
    same = torch.equal(stock.generate(prompt, **options), ours.generate(prompt, **options))
    rows: list[tuple[float, ...]] = []
    for tokens in context.track(_CONTEXTS, description="cached tokens", total=len(_CONTEXTS)):
        with torch.no_grad():
            caches = [filled_cache(model, tokens) for model in (stock, ours)]
        expected, got = step(stock, caches[0]), step(ours, caches[1])
        error = float((got - expected).abs().max() / expected.abs().max())
        layer = interleaved(attention_step(stock, caches[0]), attention_step(ours, caches[1]), _REPEATS)
        steps = [partial(step, model, cache) for model, cache in zip((stock, ours), caches, strict=True)]
        whole = interleaved(steps[0], steps[1], _REPEATS)
        peaks = [peak_bytes(call) / 2**20 for call in steps]
        rows.append((tokens, error, *layer, *whole, *peaks))
    by_tokens = {row[0]: row for row in rows}
    first, last = by_tokens[1024], by_tokens[4096]
    worst = max(row[1] for row in rows)
    return Evidence(
        summary=f"At 4096 cached tokens a step of one attention layer is {last[4]:.0f} times and of the whole model "
        f"{last[7]:.0f} times faster ({first[4]:.0f} and {first[7]:.0f} times at 1024); logits differ by {worst:.0e}.",
        checks=(
            Check("greedy tokens are the same", same, f"{_NEW} tokens after {_PROMPT}"),
            Check("logits agree to 1e-5 of the largest", worst <= 1e-5, f"{worst:.1e}"),
            Check("one attention layer at 1024 tokens: at least 8 times faster", first[4] >= 8, f"{first[4]:.1f}"),
            Check("one attention layer at 4096 tokens: at least 15 times faster", last[4] >= 15, f"{last[4]:.1f}"),
            Check("whole model at 4096 tokens: at least 10 times faster", last[7] >= 10, f"{last[7]:.1f}"),
            Check(
                "memory of a step at 4096 tokens: at most a fifth", last[9] <= last[8] / 5, f"{last[9] / last[8]:.3f}"
            ),
        ),
        tables=(
            Table(
                "One decoding step",
                (
                    "cached tokens",
                    "relative error",
                    "layer, stock, ms",
                    "layer, absorbed, ms",
                    "ratio",
                    "model, stock, ms",
                    "model, absorbed, ms",
                    "ratio",
                    "peak, stock, MiB",
                    "peak, absorbed, MiB",
                ),
                tuple(
                    (int(n), e, 1e3 * a, 1e3 * b, r, 1e3 * c, 1e3 * d, s, p, q) for n, e, a, b, r, c, d, s, p, q in rows
                ),
            ),
        ),
        plots=(
            Plot(
                "Speed of a decoding step, absorbed over stock",
                "cached tokens",
                "times faster",
                tuple(row[0] for row in rows),
                {"one attention layer": tuple(row[4] for row in rows), "whole model": tuple(row[7] for row in rows)},
                log_x=True,
            ),
        ),
        notes=(
            "The count of multiplications falls by 121; reading the cache once more to append a token, and the "
            "projections of the new token, take the rest.",
            "The 256 to 4096 cached latents are random; only the 64 prompt tokens of the greedy run are real ones.",
        ),
    )


@dataclass(frozen=True)
class Geometry:
    """Head shapes of a released model; `groups` counts cached key heads, None stands for a latent."""

    name: str
    layers: int
    heads: int
    groups: int | None
    elements: int
    bytes_per_token: int


GEOMETRIES = (
    Geometry("Llama-2-7B, MHA", 32, 32, 32, 8192, 524288),
    Geometry("Llama-3-8B, GQA 8", 32, 32, 8, 2048, 131072),
    Geometry("Llama-2-70B, GQA 8", 80, 64, 8, 2048, 327680),
    Geometry("DeepSeek-V2 as MHA", 60, 128, 128, 32768, 3932160),
    Geometry("DeepSeek-V2, MLA", 60, 128, None, 576, 69120),
    Geometry("DeepSeek-V3, MLA", 61, 128, None, 576, 70272),
    Geometry("DeepSeek-V2-Lite, MLA", 27, 16, None, 576, 31104),
)


def cached_bytes(geometry: Geometry, kind: str, tokens: int = 3) -> int:
    """Bytes that the tensors of a cache really hold per token and layer, in bfloat16.

    Args:
        geometry: head shapes; the hidden size is cut to 128, which a cache never sees.
        kind: "dynamic" or "static", the host's caches, or "ours", the cache of the latent layer.
        tokens: how many are cached.

    Returns:
        Bytes, whole ones: a cache that does not divide by its tokens is an error.

    Raises:
        ValueError: another kind.
    """
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    if kind not in ("dynamic", "static", "ours"):
        raise ValueError(f"kind must be 'dynamic', 'static' or 'ours', got {kind!r}")
    if geometry.groups is None:
        model = small_model(geometry.heads, layers=1, hidden=128)
    else:
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=geometry.heads,
            num_key_value_heads=geometry.groups,
            head_dim=128,
        )
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    cache: Any
    if kind == "ours":
        from transformers import Cache

        from danlu.attention.latent.cache import LatentLayer

        cache = Cache(layer_class_to_replicate=LatentLayer)
    else:
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=tokens)
    with torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(x.numel() * x.element_size() for x in (cache.layers[0].keys, cache.layers[0].values))
    per_token, rest = divmod(held, tokens)
    if rest:
        raise ValueError(f"the cache of {geometry.name} holds {held} bytes for {tokens} tokens")
    return per_token


@claim(
    name="kv-cache-sizes",
    title="What a token costs in the cache",
    source="archive 10091; arXiv:2405.04434",
    statement="Grouped heads cut the cache of multi-head attention by the number of heads per group; a latent holds "
    "576 numbers per token and layer whatever the number of heads, 57 times less than the same heads cached whole.",
    measurement="One attention layer with the head shapes of each released model, three bfloat16 tokens: bytes of the "
    "tensors that the host's growing and static caches and ours really hold, against the formula.",
    seeds=(0,),
    budget=10,
)
def kv_cache_sizes(context: Context) -> Evidence:
    """Measure bytes on tensors and put them beside the formula."""
    rows, wrong = [], []
    for geometry in context.track(GEOMETRIES, description="geometries", total=len(GEOMETRIES)):
        kinds = ("dynamic", "static") if geometry.groups is not None else ("dynamic", "static", "ours")
        measured = {kind: cached_bytes(geometry, kind) for kind in kinds}
        if set(measured.values()) != {2 * geometry.elements}:
            wrong.append(geometry.name)
        total = measured["dynamic"] * geometry.layers
        rows.append((geometry.name, geometry.layers, geometry.elements, measured["dynamic"] // 2, total))
    totals = {row[0]: row[4] for row in rows}
    off = [g.name for g in GEOMETRIES if totals[g.name] != g.bytes_per_token]
    ratio = totals["DeepSeek-V2 as MHA"] / totals["DeepSeek-V2, MLA"]
    return Evidence(
        summary=f"Every cache holds what the formula says; DeepSeek-V2's is {ratio:.1f} times smaller than its heads "
        "cached whole.",
        checks=(
            Check("numbers per token and layer equal the formula in every cache", not wrong, ", ".join(wrong) or "all"),
            Check("bytes per token of all layers equal the published sizes", not off, ", ".join(off) or "all"),
            Check("DeepSeek-V2: 56 to 58 times below multi-head attention", 56 <= ratio <= 58, f"{ratio:.1f}"),
        ),
        tables=(
            Table(
                "Cache per token",
                ("model", "layers", "numbers per layer, formula", "measured", "bytes, all layers, bfloat16"),
                tuple(rows),
            ),
        ),
        plots=(
            Plot(
                "Cache per token, all layers, bfloat16",
                "",
                "KiB",
                tuple(range(len(rows))),
                {"measured": tuple(row[4] / 1024 for row in rows)},
                x_names=tuple(row[0] for row in rows),
            ),
        ),
        notes=(
            "Hidden sizes are cut to 128 and one layer stands for all: neither changes what a token costs per layer.",
        ),
    )
