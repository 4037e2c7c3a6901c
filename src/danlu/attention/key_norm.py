"""Key normalisation: attention that sees the direction of a key and never its length."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["add_key_norm", "key_norm", "remove_key_norm"]

logger = logging.getLogger("danlu.attention")

CONFIG_FLAG = "danlu_key_norm"
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj", "att_proj")
_OWN_NORMS = ("k_norm", "key_norm", "k_layernorm", "key_layernorm", "qk_norm", "k_ln", "k_proj_norm")
_LATENT = ("kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj", "kv_down_proj")


def key_norm(k: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale every key to root-mean-square 1 over the head, without a gain.

    With the usual logit scale ``1/sqrt(head_dim)`` this is key normalisation as published, ``q.k/|k|`` with no scale.
    It commutes with any rotation of the key, so normalised keys can be cached before or after rotary encoding.

    Args:
        k: keys, shape ``(..., head_dim)``, any floating dtype; statistics are taken in float32 (float64 for float64).
        eps: added to the mean square before the root, > 0; keeps a zero key at zero.

    Returns:
        The normalised keys, same shape and dtype as ``k``.

    Raises:
        TypeError: ``k`` is not a floating tensor.
        ValueError: ``eps`` is not positive.

    Source: Scientific Spaces archive 9859; arXiv:2010.04245 (query-key normalisation, of which this is the key half)
    """
    if not k.is_floating_point():
        raise TypeError(f"k must be a floating-point tensor, got {k.dtype}; convert it first")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}; 1e-6 is usual")
    # float16 squares overflow beyond |k| = 255, and bfloat16 sums lose two digits: both go through float32.
    wide = k if k.dtype == torch.float64 else k.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(k.dtype)


class _KeyNormHook:
    """Normalise the output of a key projection head by head; a class, so that a hooked model can be copied."""

    def __init__(self, head_dim: int, eps: float) -> None:
        self.head_dim = head_dim
        self.eps = eps

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return key_norm(output.unflatten(-1, (-1, self.head_dim)), self.eps).flatten(-2)


def add_key_norm(model: nn.Module, eps: float = 1e-6) -> list[RemovableHandle]:
    """Make every attention layer of a Hugging Face model use normalised keys, by forward hooks on its ``k_proj``.

    This is a choice of architecture: add it to a freshly initialised model and train with it. A checkpoint that was
    trained without it computes something else afterwards. ``model.config.danlu_key_norm`` is set to True, so that a
    saved model says what it needs; hooks are not saved, hence **call this again after** ``from_pretrained``. With PEFT,
    call it after wrapping: an adapter put on a hooked projection would add its part to the normalised key.

    Since the projection's output is what the layer rotates and caches, caches hold normalised keys and every attention
    backend works unchanged. The logits are ``scaling * sqrt(head_dim) * q.k/|k|``, with the model's own ``scaling``.

    Args:
        model: a decoder whose attention layers have separate ``q_proj`` and ``k_proj`` and a ``head_dim``.
        eps: as in :func:`key_norm`.

    Returns:
        One handle per attention layer; :func:`remove_key_norm` undoes everything, the config entry included.

    Raises:
        ValueError: the layers have a fused projection, a norm of their own on the keys, or latent keys (MLA); or the
            model already has key normalisation, or has no attention layer that can be recognised.

    Source: Scientific Spaces archive 9859
    """
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}; 1e-6 is usual")
    layers: list[Any] = [layer for layer in model.modules() if _is_attention(layer)]
    name = type(model).__name__
    if not layers:
        raise ValueError(f"{name} has no attention layer with a k_proj or a known fused projection; key_norm needs one")
    for layer in layers:
        _check_layer(layer)
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; key normalisation is made for decoders with rotary positions")
    checkpoint = getattr(config, "_name_or_path", "")
    if checkpoint and not getattr(config, CONFIG_FLAG, False):
        logger.warning(
            "%s (%s) seems to be trained without key normalisation; its outputs are wrong until it is trained with it",
            name,
            checkpoint,
        )
    handles = [layer.k_proj.register_forward_hook(_KeyNormHook(layer.head_dim, eps)) for layer in layers]
    if config is not None:
        setattr(config, CONFIG_FLAG, True)
    return handles


def remove_key_norm(model: nn.Module) -> int:
    """Take the hooks of :func:`add_key_norm` and its config entry away again.

    Args:
        model: the model, hooked or not, or a copy of a hooked one.

    Returns:
        The number of attention layers that had a hook; 0 leaves the model as it is.

    Source: Scientific Spaces archive 9859
    """
    removed = 0
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _KeyNormHook):
                del module._forward_hooks[key]
                removed += 1
    config: Any = getattr(model, "config", None)
    if removed and hasattr(config, CONFIG_FLAG):
        delattr(config, CONFIG_FLAG)
    return removed


def _is_attention(module: nn.Module) -> bool:
    if not any(part in type(module).__name__ for part in ("Attention", "Attn")):
        return False
    return any(isinstance(getattr(module, key, None), nn.Module) for key in ("k_proj", *_FUSED, *_LATENT))


def _check_layer(layer: Any) -> None:
    name = type(layer).__name__

    def has(key: str) -> bool:
        return isinstance(getattr(layer, key, None), nn.Module)

    found = next(filter(has, _LATENT), None)
    if found:
        raise ValueError(f"{name} builds its keys from a latent ({found}, MLA); key_norm needs a k_proj of whole keys")
    found = next(filter(has, _OWN_NORMS), None)
    if found:
        raise ValueError(f"{name} already normalises its keys with {found}; key_norm before it would have no effect")
    found = next(filter(has, _FUSED), None)
    if found:
        raise ValueError(f"{name} computes keys in the fused projection {found}; key_norm needs a separate k_proj")
    if not has("q_proj") or not isinstance(getattr(layer, "head_dim", None), int):
        raise ValueError(f"{name} has a k_proj but no q_proj and integer head_dim beside it; its heads cannot be told")
    # An adapter may have wrapped a hooked projection: look inside as well.
    if any(isinstance(hook, _KeyNormHook) for part in layer.k_proj.modules() for hook in part._forward_hooks.values()):
        raise ValueError(f"{name} has key normalisation already; call remove_key_norm(model) first to change it")
