"""The model that a conversion fills: DeepSeek-V3 of the host library, with dense layers only."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from danlu.positions.export import to_longrope
from danlu.positions.rotary import inverse_frequencies
from danlu.tuning.latent.source import Source
from danlu.tuning.latent.weights import Sizes

#: Settings of the host that mean the same in the target.
_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "dtype",
)


def build_target(model: Any, source: Source, sizes: Sizes, frequencies: Tensor) -> Any:
    """An empty target: parameters are on the meta device until they are filled.

    Args:
        model: the host model.
        source: its reading.
        sizes: of the latent attention.
        frequencies: (rope / 2,) radians per position of the shared rotary key.
    """
    from accelerate import init_empty_weights
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    before = model.config
    base = source.arch.config.rope_parameters["rope_theta"]
    config = DeepseekV3Config(
        **{name: getattr(before, name) for name in _KEPT if hasattr(before, name)},
        num_key_value_heads=source.heads,
        first_k_dense_replace=before.num_hidden_layers,
        num_mtp_layers=0,
        kv_lora_rank=sizes.rank,
        q_lora_rank=source.heads * source.head_dim if source.query_bias else None,
        qk_rope_head_dim=sizes.rope,
        qk_nope_head_dim=sizes.nope,
        v_head_dim=sizes.value,
        attention_bias=source.latent_bias,
        rope_interleave=True,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    if not torch.allclose(frequencies, inverse_frequencies(sizes.rope, base), rtol=1e-12, atol=0):
        config.rope_parameters = to_longrope(frequencies, config)
    eager = before._attn_implementation == "eager"
    with init_empty_weights(include_buffers=False):
        target = DeepseekV3ForCausalLM._from_config(config, attn_implementation="eager" if eager else "sdpa")
    target = target.eval()
    if getattr(model, "generation_config", None) is not None:
        target.generation_config = copy.deepcopy(model.generation_config)
    for name, buffer in target.named_buffers():
        owner, _, local = name.rpartition(".")
        setattr(target.get_submodule(owner), local, buffer.to(model.device))
    return target


def fill_rest(target: Any, source: Source) -> None:
    """Copy everything but attention: embedding, norms, feed-forward layers, head."""
    model: Any = source.arch.model
    pairs = [(target.model.embed_tokens, model.model.embed_tokens), (target.model.norm, model.model.norm)]
    for new, old in zip(target.model.layers, model.model.layers, strict=True):
        pairs += [(getattr(new, name), getattr(old, name)) for name in ("input_layernorm", "post_attention_layernorm")]
        pairs += [(getattr(new.mlp, name), getattr(old.mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")]
    if not source.arch.tied:
        pairs.append((target.lm_head, model.lm_head))
    for new, old in pairs:
        new.weight = nn.Parameter(old.weight.detach().clone())
    if source.arch.tied:
        target.lm_head.weight = target.model.embed_tokens.weight


def fill_layer(module: nn.Module, weights: dict[str, Tensor], model: Any) -> None:
    """Put the parameters of one attention module in, in the dtype and place of the host.

    Raises:
        ValueError: the host library builds this module with other parameters than were computed.
    """
    built = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    made = {name: tuple(weight.shape) for name, weight in weights.items()}
    if built != made:
        raise ValueError(f"the host library's latent attention has parameters {built}, but {made} were made for it")
    for name, weight in weights.items():
        owner, _, local = name.rpartition(".")
        value = weight.to(model.device, model.dtype, copy=True).contiguous()
        setattr(module.get_submodule(owner), local, nn.Parameter(value))
