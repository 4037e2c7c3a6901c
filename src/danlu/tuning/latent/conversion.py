"""Turning a trained model with multi-head or grouped-query attention into one with multi-head latent attention."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu.progress import watched
from danlu.tuning.latent.fold import Rotation, choose_rotation, whole_rotation
from danlu.tuning.latent.moments import Moments, collect, token_loss
from danlu.tuning.latent.norm import freeze_silent
from danlu.tuning.latent.rank import relative_error
from danlu.tuning.latent.report import ConversionReport, LayerConversion
from danlu.tuning.latent.source import Source, check_arguments, read_source
from danlu.tuning.latent.target import build_target, fill_layer, fill_rest
from danlu.tuning.latent.weights import LatentLayer, Sizes, compress, layer_weights

__all__ = ["ConversionReport", "ConversionResult", "freeze_silent", "to_mla"]

logger = logging.getLogger("danlu.tuning")


@dataclass(frozen=True)
class ConversionResult:
    """A converted model and what the conversion did."""

    model: Any
    report: ConversionReport


@torch.no_grad()
def to_mla(
    model: Any,
    kv_rank: int | None = None,
    rope_dim: int | None = None,
    *,
    method: str = "pca",
    calibration: Tensor | None = None,
    norm: str = "silent",
    balance: bool = True,
    concentrate: bool = True,
    freq_fold: int | str = 1,
    damping: float = 0.01,
) -> ConversionResult:
    """Convert a trained model to multi-head latent attention, as a DeepSeek-V3 checkpoint of dense layers.

    Per token and layer the result caches ``kv_rank + rope_dim`` numbers. The rotary keys are concentrated into
    ``rope_dim`` channels that all heads share, and the rest of the keys joins the values in one latent. A result of
    ``method="pca"`` is a start for a short fine-tuning; ``method="exact"`` gives the model's own outputs and saves
    nothing, but runs on code for latent attention.

    Departures from the source: which pairs keep their rotation is chosen over all layers, by what dropping it would
    change in the scores, and not the first ones by energy; their frequencies are written as the host's ``longrope``
    table, so that no frequency has to be moved; the source's damping of the key covariance adds a multiple of the
    identity, which changes no eigenvector, so here it is added to the inputs' second moment, where it does something.

    Args:
        model: a ``transformers`` Llama, Mistral or Qwen2 for causal language modelling, full attention. Not changed.
        kv_rank: size of the latent, 1..(keys + values - rope_dim); left out for ``exact``.
        rope_dim: channels that keep their rotation, even, at most the width of all keys; None is min(64, head size).
        method: ``pca`` of the activations on ``calibration``, ``weight-svd`` (no text needed), or ``exact``.
        calibration: int64 (n, length) token ids without padding, of text like the model's use; ten times ``kv_rank``
            tokens or more.
        norm: the target has an RMSNorm between latent and up-projection. ``silent`` makes it an exact multiplication
            (see :mod:`danlu.tuning.latent.norm`), not in float16, and freezes the projections before it.
            ``calibrated`` lets it work at the mean size of the latent, an approximation in which every weight can be
            trained.
        balance: divide keys by the ratio of their size to that of the values before the joint low rank.
        concentrate: mix key heads so that few pairs carry most of the rotary keys.
        freq_fold: neighbouring frequencies that are mixed as if they were one, a divisor of head size / 2; ``auto``
            takes the one that changes attention on the calibration text least.
        damping: added to the diagonal of the inputs' second moment, as a share of its mean, >= 0; counts directions
            that the calibration text did not show.

    Returns:
        ``model``: a ``DeepseekV3ForCausalLM`` in the dtype and place of the host, in evaluation mode. ``report``.

    Raises:
        TypeError: a size is no integer, or the calibration is no tensor of token ids.
        ValueError: a size out of range, too little calibration, or a model of another kind
            (``UnsupportedArchitecture``): norms of queries or keys, sliding windows, quantised weights, partial
            rotation, biases of feed-forward layers.

    Source: arXiv:2502.07864 (TransMLA); Scientific Spaces archive 10091; arXiv:2405.04434 (DeepSeek-V2).
    """
    source = read_source(model)
    rank, rope = check_arguments(source, method, kv_rank, rope_dim, calibration, norm, freq_fold, damping)
    if norm == "silent" and model.dtype == torch.float16:
        raise ValueError("norm='silent' needs the range of bfloat16 or float32, got a float16 model: convert it first")
    moments = None if calibration is None else collect(model, source, calibration)
    second = _moments_for(source, method, moments, damping)
    exact = method == "exact"
    if exact:
        rotation = whole_rotation(source)
    else:
        length = min(model.config.max_position_embeddings, 4096) if calibration is None else calibration.shape[1]
        rotation = choose_rotation(source, second, moments, rope, length, freq_fold, concentrate=concentrate)
    nope = 0 if rope == source.groups * source.head_dim else source.head_dim
    sizes = Sizes(rank, rope, nope, source.head_dim)
    target = build_target(model, source, sizes, rotation.frequencies)
    fill_rest(target, source)
    rows = []
    for index in watched(range(len(source.arch.blocks)), "layers"):
        attention = source.arch.blocks[index].attention
        layer = compress(attention, *rotation.layers[index], second[index], rank, exact=exact, balance=balance)
        module = target.model.layers[index].self_attn
        rms = None if norm == "silent" else _mean_size(layer, _need(moments).inputs[index])
        block: Any = source.arch.blocks[index].module
        gain = block.input_layernorm.weight.detach().to("cpu", torch.float64)
        eps = module.kv_a_layernorm.variance_epsilon
        fill_layer(module, layer_weights(source, attention, layer, sizes, gain, eps, rms), model)
        measured = second[index] if moments is None else moments.second[index]
        error = None if moments is None else _output_error(target, index, moments)
        rows.append(_row(layer, measured, error))
    frozen = freeze_silent(target)
    if frozen:
        logger.info("froze %d parameters in front of silent norms", len(frozen))
    return ConversionResult(target, _report(model, target, source, sizes, method, norm, rotation, rows, moments))


def _moments_for(source: Source, method: str, moments: Moments | None, damping: float) -> list[Tensor]:
    """The second moments that principal directions are taken from, by layer."""
    one = torch.eye(source.hidden + 1, dtype=torch.float64)
    if method != "pca" or moments is None:
        return [one] * len(source.arch.blocks)
    ridge = one.clone()
    ridge[-1, -1] = 0  # the constant is known
    return [moment + damping * moment.diagonal()[:-1].mean() * ridge for moment in moments.second]


def _need(moments: Moments | None) -> Moments:
    if moments is None:
        raise ValueError("norm='calibrated' needs calibration")
    return moments


def _mean_size(layer: LatentLayer, x: Tensor) -> float:
    """Mean over tokens of the root mean square of the latent: the gain with which a working norm is off least."""
    x = x.flatten(0, -2).to("cpu", torch.float64)
    latent = x @ layer.low.down[:, :-1].T + layer.low.down[:, -1]
    return latent.pow(2).mean(-1).sqrt().mean().item()


def _output_error(target: nn.Module, index: int, moments: Moments) -> float:
    """Relative error of what attention gives back on the probe, from the inputs that the host's layer had."""
    x, exact = moments.inputs[index], moments.outputs[index]
    length = x.shape[-2]
    positions = torch.arange(length, device=x.device)[None]
    mask = torch.full((1, 1, length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
    host: Any = target
    base = host.model
    angles = base.rotary_emb(x, positions)
    found = base.layers[index].self_attn(hidden_states=x, position_embeddings=angles, attention_mask=mask)[0]
    lost, whole = (found - exact).double().norm(), exact.double().norm()
    return 0.0 if whole <= 0 else (lost / whole).item()


def _row(layer: LatentLayer, moment: Tensor, output_error: float | None) -> LayerConversion:
    keys, values = layer.key_map, layer.values
    whole, turned = (
        torch.einsum("an,nk,ak->", part, moment, part).item() for part in (layer.keys, layer.turned @ layer.keys)
    )
    return LayerConversion(
        rope_energy=1.0 if whole <= 0 else turned / whole,
        latent_energy=layer.low.kept,
        balance=layer.low.balance,
        key_error=relative_error(keys, layer.low.up_keys @ layer.low.down, moment),
        value_error=relative_error(values, layer.low.up_values @ layer.low.down, moment),
        output_error=output_error,
    )


def _report(
    model: Any,
    target: Any,
    source: Source,
    sizes: Sizes,
    method: str,
    norm: str,
    rotation: Rotation,
    rows: Sequence[LayerConversion],
    moments: Moments | None,
) -> ConversionReport:
    return ConversionReport(
        model=f"{type(model).__name__} -> {type(target).__name__}",
        method=method,
        norm=norm,
        kv_rank=sizes.rank,
        rope_dim=sizes.rope,
        freq_fold=rotation.fold,
        layers=tuple(rows),
        calibration_tokens=0 if moments is None else moments.tokens,
        elements_before=source.width,
        element_bytes=model.dtype.itemsize,
        loss_before=None if moments is None else moments.loss,
        loss_after=None if moments is None else token_loss(target, moments.probe_ids),
    )
