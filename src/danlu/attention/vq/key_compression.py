"""Codebooks for the keys of a trained model by k-means, and what quantised keys would do to its attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu.attention.vq.codebook import look_up, nearest_codes
from danlu.hosts.architecture import read_architecture
from danlu.positions.export import host_frequencies
from danlu.positions.rotary import Rotary

__all__ = ["CompressedKeys", "HeadError", "compress_keys", "kmeans"]

_NAME = "danlu_key_capture"
_POINTS = 4096


@dataclass(frozen=True)
class HeadError:
    """Relative error of the attention output of one key-value head, ``|approximate - exact| / |exact|``.

    Attributes:
        layer: index of the layer.
        kv_head: index of the key-value head.
        rotated: keys quantised as the cache holds them, after rotation. For a model without rotation, the only entry.
        unrotated: keys quantised before rotation and rotated to their own places: exact distances. A code then stands
            at many places, so that this cannot be folded into a state of fixed size; it bounds what is possible.
        offset: the same, but tokens beyond the window are all at the distance ``window`` (ReRoPE), which can be folded.
        mean_value: each token's output is the mean of all values so far: what knowing nothing gives.
    """

    layer: int
    kv_head: int
    rotated: float
    unrotated: float | None
    offset: float | None
    mean_value: float


@dataclass(frozen=True)
class CompressedKeys:
    """Codebooks and the errors they make.

    Attributes:
        rotated: per layer, float32 (kv_heads, codes, head_dim), of keys after rotation.
        unrotated: the same of keys before rotation; empty for a model without rotation.
        errors: one entry per layer and key-value head.
        window: distance up to which ``offset`` keeps exact distances.
    """

    rotated: tuple[Tensor, ...]
    unrotated: tuple[Tensor, ...]
    errors: tuple[HeadError, ...]
    window: int

    def mean_errors(self) -> dict[str, float]:
        """Mean over layers and heads of each kind of error that was measured."""
        kinds = ("rotated", "unrotated", "offset", "mean_value")
        columns = {kind: [getattr(error, kind) for error in self.errors] for kind in kinds}
        return {kind: sum(values) / len(values) for kind, values in columns.items() if None not in values}


def kmeans(points: Tensor, codes: int, *, iterations: int = 25, seed: int = 0) -> Tensor:
    """Centres by Lloyd's algorithm from a k-means++ start.

    Args:
        points: (n, dim), n >= codes.
        codes: number of centres, >= 1.
        iterations: of Lloyd; it ends early when no point changes its centre. A centre without points stays.
        seed: of the start.

    Returns:
        Centres (codes, dim), float32, or float64 for float64 points.

    Raises:
        ValueError: codes < 1, fewer points than codes, or points that are not finite.

    Source: Scientific Spaces archive 9844 (converting a trained model); k-means++: Arthur and Vassilvitskii, 2007
    """
    if codes < 1:
        raise ValueError(f"codes must be at least 1, got {codes}")
    if points.ndim != 2 or len(points) < codes:
        raise ValueError(f"points must be (n, dim) with n >= codes = {codes}, got {tuple(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError("points must be finite; look for an overflow where they come from")
    points = points.detach() if points.dtype == torch.float64 else points.detach().float()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    centres = points.new_empty(codes, points.shape[1])
    nearest = torch.full_like(points[:, 0], torch.inf)
    for i in range(codes):
        # points that are centres already have weight 0; when all are, any point will do
        weight = nearest if i and bool(nearest.sum() > 0) else torch.ones_like(nearest)
        level = weight.double().cumsum(0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64, device="cpu").to(level.device) * level[-1]
        centres[i] = points[int(torch.searchsorted(level, drawn, right=True).clamp_max(len(points) - 1))]
        nearest = torch.minimum(nearest, (points - centres[i]).square().sum(-1))
    before = None
    for _ in range(iterations):
        assigned = torch.cat([nearest_codes(x[None, None], centres[None])[0, 0] for x in points.split(_POINTS)])
        if before is not None and torch.equal(assigned, before):
            break
        before = assigned
        counts = torch.zeros_like(centres[:, 0]).index_add_(0, assigned, torch.ones_like(points[:, 0]))
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], centres)
    return centres


def compress_keys(
    model: nn.Module,
    calibration_ids: Tensor,
    *,
    codes: int = 256,
    test_ids: Tensor | None = None,
    window: int = 64,
    iterations: int = 25,
    seed: int = 0,
) -> CompressedKeys:
    """Cluster the keys of each layer and key-value head of a trained model, and measure the error of its attention.

    The model runs unchanged, so that each layer's error is its own. A codebook starts a
    :class:`danlu.attention.vq.layer.VQAttention` that is made from the layer's projections (``normalise=False``, then
    ``mixer.codebook.set(...)``); fine-tune afterwards.

    Args:
        model: a host causal language model of the Llama or GPT-2 kind, as ``read_architecture`` knows them.
        calibration_ids: (rows, length) int64 without padding; at least ``codes`` tokens, better 20 per code.
        codes: centres per key-value head.
        test_ids: tokens to measure errors on; default: the calibration itself, which flatters.
        window: see ``offset`` of :class:`HeadError`, >= 1.
        iterations: of k-means.
        seed: of k-means.

    Returns:
        Codebooks and errors.

    Raises:
        ValueError: too few tokens, a window below 1, or a model whose attention is not plain causal softmax.

    Source: Scientific Spaces archive 9844; arXiv:2309.16354
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    for name, ids in (("calibration_ids", calibration_ids), ("test_ids", test_ids)):
        if ids is not None and (ids.ndim != 2 or not ids.numel()):
            raise ValueError(f"{name} must be (rows, length) with at least one token, got {tuple(ids.shape)}")
    if codes < 1 or calibration_ids.numel() < codes:
        raise ValueError(f"codes must be between 1 and the {calibration_ids.numel()} calibration tokens, got {codes}")
    architecture = read_architecture(model)
    if architecture.family == "bert":
        raise ValueError(f"{type(model).__name__} is an encoder: keys are compressed for causal attention")
    rotary = None
    if architecture.family == "llama":
        rotary = Rotary(host_frequencies(architecture.config)[0])
    rotated, unrotated, errors = [], [], []
    seen = _capture(model, calibration_ids)
    tested = seen if test_ids is None else _capture(model, test_ids)
    for layer, block in enumerate(architecture.blocks):
        if block.attention.module not in seen:
            raise ValueError(f"{block.attention.name} does not call attention through the host's registry")
        call = seen[block.attention.module]
        rotated.append(_centres(call.key, codes, iterations, seed))
        plain = None
        if rotary is not None:
            places = torch.arange(call.key.shape[2], device=call.key.device)
            plain = _centres(rotary.rotate(call.key, -places), codes, iterations, seed)
            unrotated.append(plain)
        errors += _errors(layer, tested[block.attention.module], rotary, rotated[-1], plain, window)
    return CompressedKeys(tuple(rotated), tuple(unrotated), tuple(errors), window)


@dataclass
class _Call:
    """Float32 queries, keys and values of one layer, as the host hands them to attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


@torch.no_grad()
def _capture(model: Any, ids: Tensor) -> dict[nn.Module, _Call]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls: dict[nn.Module, _Call] = {}

    def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **words: Any) -> Any:
        reach = words.get("sliding_window")
        if words.get("softcap") or (reach is not None and reach < key.shape[2]):
            raise ValueError(f"{type(module).__name__} has a softcap or a sliding window; compress_keys knows neither")
        scaling = words.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        calls[module] = _Call(query.float(), key.float(), value.float(), scaling)
        return plain(module, query, key, value, mask, **words)

    AttentionInterface.register(_NAME, keep)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    with _in_evaluation(model):
        before = model.config._attn_implementation
        model.set_attn_implementation(_NAME)
        try:
            model(input_ids=ids.to(model.device), use_cache=False)
        finally:
            model.set_attn_implementation(before)
    return calls


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _centres(keys: Tensor, codes: int, iterations: int, seed: int) -> Tensor:
    return torch.stack([kmeans(x.flatten(0, 1), codes, iterations=iterations, seed=seed) for x in keys.transpose(0, 1)])


def _errors(
    layer: int, call: _Call, rotary: Rotary | None, rotated: Tensor, plain: Tensor | None, window: int
) -> list[HeadError]:
    query = call.query.unflatten(1, (call.key.shape[1], -1))
    length = call.key.shape[2]
    places = torch.arange(length, device=call.key.device)
    later = places > places[:, None]
    far = places[:, None] - places > window
    hat = look_up(nearest_codes(call.key, rotated), rotated)
    bare = None
    if rotary is not None and plain is not None:
        bare = look_up(nearest_codes(rotary.rotate(call.key, -places), plain), plain)
    found = []
    for head in range(call.key.shape[1]):
        sums = {kind: 0.0 for kind in ("exact", "rotated", "unrotated", "offset", "mean_value")}
        for row in range(len(query)):
            q, value = query[row, head], call.value[row, head]

            def answer(logits: Tensor, value: Tensor = value) -> Tensor:
                return (logits * call.scaling).masked_fill(later, -torch.inf).softmax(-1) @ value

            exact = answer(q @ call.key[row, head].mT)
            answers = {
                "rotated": answer(q @ hat[row, head].mT),
                "mean_value": answer(q.new_zeros(len(q), length, length)),
            }
            if rotary is not None and bare is not None:
                near = q @ rotary.rotate(bare[row, head], places).mT
                answers["unrotated"] = answer(near)
                standing = rotary.rotate(rotary.rotate(q, -places), torch.full_like(places[:1], window))
                answers["offset"] = answer(torch.where(far, standing @ bare[row, head].mT, near))
            sums["exact"] += float(exact.square().sum())
            for kind, out in answers.items():
                sums[kind] += float((out - exact).square().sum())
        relative = {kind: (value / sums["exact"]) ** 0.5 for kind, value in sums.items()}
        if bare is None:
            del relative["unrotated"], relative["offset"]
        found.append(
            HeadError(
                layer,
                head,
                relative["rotated"],
                relative.get("unrotated"),
                relative.get("offset"),
                relative["mean_value"],
            )
        )
    return found
