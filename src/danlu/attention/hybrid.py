"""Hybrid window-full attention: short windows and a little full attention, trained that way from the start."""

from __future__ import annotations

import copy
import logging
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, SmolLM3Config

__all__ = ["hwfa_config", "suggest_window"]

logger = logging.getLogger("danlu.attention")

# These families have the very block of SmolLM3, so that sizes (and even weights) carry over one to one.
_SAME_BLOCK = ("llama", "mistral", "smollm3")
_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "tie_word_embeddings",
    "head_dim",
    "dtype",
)


def suggest_window(layers: int, trained_length: int, alpha: float = 0.75) -> int:
    """Find the widest window whose stack of layers still sees no further than a share of the trained length.

    With one full layer on top, ``layers - 1`` windows of ``w`` tokens see ``(w - 1) * (layers - 1) + 1`` tokens; this
    is the largest ``w`` for which that is at most ``alpha * trained_length``. (24 layers and 512 tokens allow 17.)

    Args:
        layers: layers of the model, the full one included, >= 2.
        trained_length: training length in tokens, >= 2.
        alpha: share of the training length, in (0, 1]; 3/4 or less is recommended.

    Returns:
        The window in tokens, the token itself included; at least 2.

    Raises:
        ValueError: an argument is out of range, or the model is too deep for the length (the window would be below 2).

    Source: Scientific Spaces archive 9603
    """
    if layers < 2:
        raise ValueError(f"layers must be >= 2, got {layers}; there must be a window layer below the full one")
    if trained_length < 2:
        raise ValueError(f"trained_length must be >= 2, got {trained_length}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}; the windows must not see past the trained length")
    window = int((alpha * trained_length - 1) // (layers - 1)) + 1
    if window < 2:
        raise ValueError(
            f"{layers} layers are too deep for trained_length {trained_length} at alpha {alpha}: even windows of 2 "
            f"see further; train on {math.ceil(layers / alpha)} tokens or more, or pass a window"
        )
    return window


def hwfa_config(
    base_config: PretrainedConfig,
    trained_length: int,
    window: int | None = None,
    full_layers: int = 1,
    nope_last: bool = True,
) -> SmolLM3Config:
    """Configure a model with hybrid window-full attention, in a class of the host library that has all its parts.

    ``nope_last=True`` is HWFA: windows with rotary positions, and a last layer of full attention without positions.
    ``nope_last=False`` is HWFA2: windows, and ``full_layers`` layers of full attention *with* rotary positions, evenly
    spread; at lengths beyond the trained one it wants ReRoPE in the full layers.

    The full layers also want their queries multiplied by ``ln n / ln trained_length``, in training and after:
    ``danlu.extend(model, LogN(trained_length, clip=False))`` ties that on; it is not part of a configuration.

    Args:
        base_config: a configuration of the Llama, Mistral or SmolLM3 family, for its sizes; not changed.
        trained_length: training length in tokens, >= 2; becomes ``max_position_embeddings``.
        window: keys that a window layer sees, the token itself included, 2..trained_length. None: for HWFA
            :func:`suggest_window`, for HWFA2 three times ``trained_length / layers``.
        full_layers: layers of full attention, 1..layers-1; exactly 1 for HWFA.
        nope_last: True for HWFA, False for HWFA2.

    Returns:
        A ``SmolLM3Config``: ``AutoModelForCausalLM.from_config(config)`` builds the model, ``Trainer`` trains it, and
        ``generate`` keeps ``window - 1`` cache entries in every window layer.

    Raises:
        ValueError: an argument is out of range, or the base configuration has rescaled rotary frequencies.
        TypeError: ``base_config`` is of another family.

    Source: Scientific Spaces archive 9603 (HWFA), 9731 (HWFA2)
    """
    kind = getattr(base_config, "model_type", None)
    if kind not in _SAME_BLOCK:
        raise TypeError(
            f"base_config must be of the families {', '.join(_SAME_BLOCK)}, got {kind or type(base_config).__name__}; "
            "make a LlamaConfig with the same sizes"
        )
    base: Any = base_config
    layers = base.num_hidden_layers
    rope = copy.deepcopy(base.rope_parameters)
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"base_config has rope_type {rope['rope_type']!r}; HWFA is trained with plain rotary positions"
        )
    if layers < 2:
        raise ValueError(f"base_config has {layers} layer; HWFA needs a window layer and a full one, so 2 or more")
    if not 1 <= full_layers < layers:
        raise ValueError(f"full_layers must be in 1..{layers - 1}, got {full_layers}")
    if nope_last and full_layers != 1:
        raise ValueError(f"full_layers must be 1 with nope_last=True, got {full_layers}; nope_last=False allows more")
    if window is None:
        if trained_length < 2:
            raise ValueError(f"trained_length must be >= 2, got {trained_length}")
        window = suggest_window(layers, trained_length) if nope_last else _wide_window(layers, trained_length)
    if not 2 <= window <= trained_length:
        raise ValueError(
            f"window must be in 2..{trained_length} (the trained length), got {window}; None chooses a good one"
        )
    reach = (window - 1) * (layers - 1) + 1
    if nope_last and reach > trained_length:
        logger.warning(
            "windows of %d in %d layers see %d tokens, more than the %d trained; suggest_window gives a safe one",
            window,
            layers - 1,
            reach,
            trained_length,
        )
    full = {layers - 1} if nope_last else {j * layers // (full_layers + 1) for j in range(1, full_layers + 1)}

    from transformers import SmolLM3Config

    return SmolLM3Config(
        **{key: copy.deepcopy(getattr(base, key)) for key in _COPIED if hasattr(base, key)},
        max_position_embeddings=trained_length,
        rope_parameters=rope,
        use_sliding_window=True,
        sliding_window=window,
        layer_types=["full_attention" if i in full else "sliding_attention" for i in range(layers)],
        # The host's name says the opposite of what it does: 1 turns rotary positions ON in a layer.
        no_rope_layers=[0 if nope_last and i in full else 1 for i in range(layers)],
    )


def _wide_window(layers: int, trained_length: int) -> int:
    # The published range is 2 to 4 times trained_length / layers; its best point was 3 times (w = 64, 24 layers, 512).
    return max(2, min(trained_length, round(3 * trained_length / layers)))
