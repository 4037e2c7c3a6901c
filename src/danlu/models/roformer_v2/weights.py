"""RoFormerV2 weights of other frameworks under the names of the PyTorch checkpoints: pure functions on arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["convert_paddle", "convert_tensorflow"]

#: (pattern, replacement, stored as (in, out))
_Rules = tuple[tuple[str, str, bool], ...]

_TENSORFLOW: _Rules = (
    (r"bert/embeddings/(word|token_type)_embeddings", r"roformer.embeddings.\1_embeddings.weight", False),
    (r"bert/embeddings/embedding_hidden_mapping_in/kernel", "roformer.embeddings_project.weight", True),
    (
        r"bert/encoder/layer_(\d+)/attention/self/(query|key|value)/kernel",
        r"roformer.encoder.layer.\1.attention.self.\2.weight",
        True,
    ),
    (
        r"bert/encoder/layer_(\d+)/attention/output/dense/kernel",
        r"roformer.encoder.layer.\1.attention.output.dense.weight",
        True,
    ),
    (
        r"bert/encoder/layer_(\d+)/(intermediate|output)/dense/kernel",
        r"roformer.encoder.layer.\1.\2.dense.weight",
        True,
    ),
)
_PADDLE: _Rules = (
    (
        r"roformerv2\.embeddings\.(word|token_type)_embeddings\.weight",
        r"roformer.embeddings.\1_embeddings.weight",
        False,
    ),
    *(
        (
            rf"roformerv2\.encoder\.layers\.(\d+)\.self_attn\.{short}_proj\.weight",
            rf"roformer.encoder.layer.\1.attention.{name}.weight",
            True,
        )
        for short, name in {"q": "self.query", "k": "self.key", "v": "self.value", "out": "output.dense"}.items()
    ),
    (
        r"roformerv2\.encoder\.layers\.(\d+)\.linear1\.weight",
        r"roformer.encoder.layer.\1.intermediate.dense.weight",
        True,
    ),
    (r"roformerv2\.encoder\.layers\.(\d+)\.linear2\.weight", r"roformer.encoder.layer.\1.output.dense.weight", True),
)
#: Optimiser state and counters of TensorFlow; rotation tables and the tied output of Paddle.
_TENSORFLOW_EXTRA = re.compile(r"global_step|.*/(adam_[mv]|lamb_[mv]|Adam(_1)?|LAMB(_1)?)|_CHECKPOINTABLE_OBJECT_GRAPH")
_PADDLE_EXTRA = re.compile(
    r".*\.rotary\.(sin|cos)|cls\.(predictions\.)?decoder_weight|cls\.predictions\.decoder\.weight"
)
_V1 = re.compile(r"(LayerNorm|norm\d?)[./](gamma|beta|weight|bias)$|[./]bias$|output_bias$|predictions[./]transform")


def convert_tensorflow(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name the variables of a TensorFlow checkpoint as PyTorch's models do, and transpose kernels.

    Read the checkpoint with ``tf.train.load_checkpoint`` on a machine that has TensorFlow, or from an ``.npz`` file of
    its variables. Optimiser state is dropped.

    Args:
        weights: variable name (``bert/encoder/layer_0/...``, with or without ``:0``) to array.

    Returns:
        State dict for :class:`RoFormerV2ForMaskedLM` (``load_state_dict(..., strict=False)``: the output map is tied
        and ``residual_alpha`` keeps its 1), contiguous.

    Raises:
        ValueError: biases or LayerNorm weights (a V1 model), or names that are not known.
    """
    named = {name.removesuffix(":0"): value for name, value in weights.items()}
    return _convert(named, _TENSORFLOW, _TENSORFLOW_EXTRA)


def convert_paddle(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name the parameters of a PaddleNLP RoFormerv2 checkpoint as PyTorch's models do, and transpose kernels.

    Read ``model_state.pdparams`` with ``paddle.load(path, return_numpy=True)``.

    Args:
        weights: parameter name (``roformerv2.encoder.layers.0...``) to array.

    Returns:
        State dict, as from :func:`convert_tensorflow`.

    Raises:
        ValueError: biases or LayerNorm weights (a V1 model), or names that are not known.
    """
    return _convert(weights, _PADDLE, _PADDLE_EXTRA)


def _convert(weights: Mapping[str, Any], rules: _Rules, extra: re.Pattern[str]) -> dict[str, Tensor]:
    wanted = [name for name in weights if not extra.fullmatch(name)]
    if foreign := sorted(filter(_V1.search, wanted)):
        raise ValueError(
            f"the checkpoint must have no biases and no LayerNorm weights, got {', '.join(foreign[:6])}"
            f"{', ...' if len(foreign) > 6 else ''}: this is a RoFormer (V1) model"
        )
    found: dict[str, Tensor] = {}
    unknown = []
    for name in wanted:
        for pattern, replacement, transposed in rules:
            if match := re.fullmatch(pattern, name):
                value = torch.as_tensor(weights[name])
                found[match.expand(replacement)] = (value.T if transposed else value).contiguous()
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"names must be those of a RoFormerV2 checkpoint, got {', '.join(sorted(unknown)[:6])}")
    return found
