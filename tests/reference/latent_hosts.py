"""Tiny random models of every latent attention family of the host library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

VOCABULARY = 64
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=20,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
INDEXED = dict(index_topk=8, index_head_dim=8, index_n_heads=2)
LINEAR = dict(linear_head_dim=8, linear_num_heads=4)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
VISION = dict(depth=1, num_hidden_layers=1, hidden_size=16, num_heads=2, num_attention_heads=2, intermediate_size=16)

#: name: (model class, configuration class, own settings); ``text`` marks settings of a composite's text part.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "axk1": ("AXK1ForCausalLM", "AXK1Config", {}),
    "axk2": ("AXK2ForCausalLM", "AXK2Config", {**INDEXED, "gated_norm_rank": 4}),
    "bailing_hybrid": (
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        {"layer_group_size": 2, "head_dim": 8, "num_local_experts": 4},
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {}),
    "deepseek_v32": ("DeepseekV32ForCausalLM", "DeepseekV32Config", INDEXED),
    "dots3_note": (
        "Dots3NoteForCausalLM",
        "Dots3NoteTextConfig",
        {
            **INDEXED,
            "sliding_window": 6,
            "num_hidden_layers": 3,
            "layer_types": ["indexed_attention", "sliding_attention", "full_attention"],
            "shared_experts_intermediate_size": 16,
        },
    ),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", {}),
    "glm5_next": (
        "Glm5NextForConditionalGeneration",
        "Glm5NextConfig",
        {
            "text": {
                **INDEXED,
                **LINEAR,
                "qk_rope_head_dim": 0,
                "index_kpool": 4,
                "layer_types": ["linear_attention", "full_attention", "full_attention"],
                "indexer_types": ["full", "full", "shared"],
            }
        },
    ),
    "glm_moe_dsa": (
        "GlmMoeDsaForCausalLM",
        "GlmMoeDsaConfig",
        {**INDEXED, "indexer_types": ["full", "shared", "full"]},
    ),
    "hy_v4": ("HYV4ForCausalLM", "HYV4Config", {**INDEXED, "learnable_sink_init": 0.7}),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {**LINEAR, "layer_types": ["full_attention", "linear_attention", "full_attention"], "num_local_experts": 4},
    ),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "moe_topk": 2,
            "zero_expert_num": 2,
            "head_dim": 4,
        },
    ),
    "minicpm3": ("MiniCPM3ForCausalLM", "MiniCPM3Config", {"dim_model_base": 32, "head_dim": 4}),
    "mistral4": (
        "Mistral4ForCausalLM",
        "Mistral4Config",
        {
            # queries are scaled by position from 8 tokens on
            "rope_parameters": {
                **YARN,
                "original_max_position_embeddings": 8,
                "max_position_embeddings": 64,
                "llama_4_scaling_beta": 0.1,
                "partial_rotary_factor": 4 / 12,
            }
        },
    ),
    "mistral_large4": (
        "MistralLarge4ForConditionalGeneration",
        "MistralLarge4Config",
        {
            "text": {
                **INDEXED,
                "no_rope_layers": [1, 0, 1],
                "kv_source_layers": [0, 1, 0],
                "indexer_types": ["full", "full", "shared"],
            }
        },
    ),
    "youtu": ("YoutuForCausalLM", "YoutuConfig", {}),
}


def latent_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model; weights are large enough for attention to be far from uniform."""
    model_class, config_class, own = FAMILIES[family]
    if not hasattr(transformers, model_class):
        pytest.skip(f"transformers {transformers.__version__} has no {model_class}")
    implementation = changes.pop("attn_implementation", None)
    settings = {**COMMON, **own.get("text", own), **changes}
    if family == "longcat_flash":
        settings = {k: v for k, v in settings.items() if k not in ("num_hidden_layers", "intermediate_size")}
    config_type = getattr(transformers, config_class)
    if "text" in own:
        config = config_type(text_config=settings, vision_config=dict(VISION), image_token_id=60, video_token_id=61)
    else:
        config = config_type(**settings)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = getattr(transformers, model_class)._from_config(config, attn_implementation=implementation)
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                torch.nn.init.normal_(p, std=1.0 / p.shape[-1] ** 0.5 if "embed" not in name else 1.0)
            elif "norm" in name:
                torch.nn.init.uniform_(p, 0.5, 1.5)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def needs_latents(model: Any) -> None:
    """Skip a test of latent caches where the installed host caches expanded keys."""
    if not caches_latents(model):
        pytest.skip(f"transformers {transformers.__version__} caches expanded keys")


def caches_latents(model: Any) -> bool:
    """Whether the installed host caches latents for this model, as newer releases do."""
    return all(hasattr(module, "expand_kv") for module in model.modules() if hasattr(module, "kv_b_proj"))
