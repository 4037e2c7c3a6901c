"""What a conversion to multi-head latent attention needs of a host model, and which models it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.hosts.architecture import Architecture, Matrix, UnsupportedArchitecture, read_architecture
from danlu.positions.export import host_frequencies, rope_tables

#: Host families whose block is DeepSeek's dense block but for the attention.
MODEL_TYPES = ("llama", "mistral", "qwen2")
METHODS = ("pca", "exact", "weight-svd")
NORMS = ("silent", "calibrated")


@dataclass(frozen=True)
class Source:
    """The attention of a host model, read once.

    Args:
        arch: the reading of the model.
        hidden: width of the residual stream.
        heads: query heads.
        groups: key and value heads.
        head_dim: channels of a head, even.
        frequencies: (head_dim / 2,) float64, radians per position.
        score_scale: what the model multiplies scores by, the host's scale on cosines and sines included.
        query_bias: whether queries have a bias.
        latent_bias: whether keys, values or attention outputs have one.
    """

    arch: Architecture
    hidden: int
    heads: int
    groups: int
    head_dim: int
    frequencies: Tensor
    score_scale: float
    query_bias: bool
    latent_bias: bool

    @property
    def width(self) -> int:
        """Numbers per token and layer that the host caches."""
        return 2 * self.groups * self.head_dim


def read_source(model: Any) -> Source:
    """Read a model that can be converted.

    Raises:
        UnsupportedArchitecture: another family, or a part that DeepSeek's block does not have.
        ValueError: a rotary type whose frequencies depend on the input's length.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in MODEL_TYPES or not hasattr(model, "lm_head"):
        raise UnsupportedArchitecture(
            f"model must be a causal language model of the kind {', '.join(MODEL_TYPES)}, got {type(model).__name__}"
            + ("" if kind in MODEL_TYPES else f" of the kind {kind}")
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        raise UnsupportedArchitecture(
            "model has quantised weights: load it without quantization_config and convert that"
        )
    if getattr(model, "peft_config", None):
        raise UnsupportedArchitecture("model has adapters: merge them into the weights first (merge_and_unload)")
    if str(getattr(config, "_attn_implementation", "")).startswith("danlu"):
        raise UnsupportedArchitecture("model is extended by danlu.extend: call danlu.restore(model) first")
    windows = [i for i, name in enumerate(getattr(config, "layer_types", None) or ()) if name != "full_attention"]
    if windows or getattr(config, "sliding_window", None) is not None:
        where = f"in layers {windows}" if windows else f"of {config.sliding_window} tokens in every layer"
        raise UnsupportedArchitecture(
            f"model has sliding-window attention {where}, which latent attention does not have; if your texts fit into "
            "the window, set config.sliding_window = None before loading"
        )
    if getattr(config, "mlp_bias", False):
        raise UnsupportedArchitecture(
            "model has biases in its feed-forward layers, which DeepSeek's block does not have"
        )
    arch = read_architecture(model)
    for block in arch.blocks:
        if block.attention.query_norm is not None or block.attention.key_norm is not None:
            raise UnsupportedArchitecture(
                f"{block.attention.name} normalises queries or keys per head; a norm behind the projection cannot be "
                "folded into a latent"
            )
    first = arch.blocks[0].attention
    rotated = float(rope_tables(config)[None].get("partial_rotary_factor", 1.0))
    if rotated != 1:
        raise UnsupportedArchitecture(f"model rotates {rotated:g} of each head; only whole heads can be converted")
    frequencies, factor = host_frequencies(config)
    biases = [
        [has_bias(matrix) for matrix in (b.attention.query, b.attention.key, b.attention.value, b.attention.output)]
        for b in arch.blocks
    ]
    return Source(
        arch=arch,
        hidden=config.hidden_size,
        heads=first.heads,
        groups=first.kv_heads,
        head_dim=first.head_dim,
        frequencies=frequencies,
        score_scale=float(first.module.scaling) * factor**2,  # type: ignore[arg-type]
        query_bias=any(one[0] for one in biases),
        latent_bias=any(any(one) for one in biases),
    )


def has_bias(matrix: Matrix) -> bool:
    """Whether a linear map of the host adds a bias."""
    return getattr(matrix.module, "bias", None) is not None


def affine(matrix: Matrix) -> Tensor:
    """``[weight | bias]`` as float64 (out, in + 1) on the CPU: a map of ``[x, 1]``."""
    weight = matrix.weight.detach().to("cpu", torch.float64)
    bias = matrix.module.bias.detach() if has_bias(matrix) else torch.zeros(len(weight))  # type: ignore[operator]
    return torch.cat((weight, bias.to("cpu", torch.float64)[:, None]), 1)


def check_arguments(
    source: Source,
    method: str,
    kv_rank: int | None,
    rope_dim: int | None,
    calibration: Tensor | None,
    norm: str,
    freq_fold: int | str,
    damping: float,
) -> tuple[int, int]:
    """Check what the user asked for, before any work.

    Returns:
        kv_rank and rope_dim.

    Raises:
        TypeError: a size that is no integer.
        ValueError: anything out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    keys = source.groups * source.head_dim
    for name, value in (("kv_rank", kv_rank), ("rope_dim", rope_dim)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if method == "exact":
        for name, value in (("kv_rank", kv_rank), ("rope_dim", rope_dim)):
            if value not in (None, keys):
                raise ValueError(f"{name} must be {keys} (or left out) for method='exact', got {value}")
        kv_rank = rope_dim = keys
    rope_dim = min(64, source.head_dim) if rope_dim is None else rope_dim
    if rope_dim < 2 or rope_dim % 2 or rope_dim > keys:
        raise ValueError(
            f"rope_dim must be an even number in 2..{keys} (the width of all keys): positions turn pairs of channels; "
            f"got {rope_dim}"
        )
    widest = source.width - rope_dim
    if kv_rank is None:
        raise ValueError(f"kv_rank must be given for method={method!r}: 1..{widest} numbers per token and layer")
    if not 1 <= kv_rank <= widest:
        raise ValueError(
            f"kv_rank must be in 1..{widest} (keys and values have {source.width} channels, {rope_dim} of them keep "
            f"their rotation), got {kv_rank}"
        )
    _check_calibration(source, method, norm, calibration, kv_rank)
    pairs = source.head_dim // 2
    if freq_fold != "auto" and (
        isinstance(freq_fold, bool) or not isinstance(freq_fold, int) or freq_fold < 1 or pairs % freq_fold
    ):
        raise ValueError(f"freq_fold must be 'auto' or a divisor of {pairs} (pairs of a head), got {freq_fold!r}")
    if freq_fold == "auto" and calibration is None:
        raise ValueError("freq_fold='auto' compares on calibration text: pass calibration, or a number")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be a finite number of at least 0, got {damping}")
    return kv_rank, rope_dim


def _check_calibration(source: Source, method: str, norm: str, calibration: Tensor | None, kv_rank: int) -> None:
    if calibration is None:
        if method == "pca" or norm == "calibrated":
            which = "method='pca'" if method == "pca" else "norm='calibrated'"
            raise ValueError(f"{which} needs calibration: token ids (n, length) of text that the model is used on")
        return
    if not isinstance(calibration, Tensor) or calibration.ndim != 2 or calibration.is_floating_point():
        got = (
            f"{calibration.dtype} {tuple(calibration.shape)}" if isinstance(calibration, Tensor) else type(calibration)
        )
        raise TypeError(f"calibration must be a tensor of token ids (n, length), got {got}")
    if method == "pca" and calibration.numel() < kv_rank:
        raise ValueError(
            f"calibration must hold at least kv_rank = {kv_rank} tokens to find as many directions, and should "
            f"hold ten times as many; got {calibration.numel()}"
        )
    if calibration.shape[1] < 2:
        raise ValueError(f"calibration must hold texts of at least 2 tokens, got length {calibration.shape[1]}")
    words = source.arch.config.vocab_size
    if calibration.numel() and not 0 <= int(calibration.min()) <= int(calibration.max()) < words:
        raise ValueError(f"calibration must hold token ids in 0..{words - 1}, got up to {int(calibration.max())}")
