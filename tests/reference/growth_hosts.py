"""Tiny hosts of every family that can grow, with weights wide enough for peaked attention, and a dense Llama."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 100.0}
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_parameters": PLAIN_ROPE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GEMMA = {"query_pre_attn_scalar": 11, "tie_word_embeddings": True, **MIXED}
BERT = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 48,
    "n_inner": 40,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"use_sliding_window": True, **MIXED}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"rms_norm_eps": 1e-2}),
    "gemma": ("GemmaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | GEMMA | {"attn_logit_softcapping": 5.0}),
    "gemma3": (
        "Gemma3ForCausalLM",
        LLAMA
        | GEMMA
        | {
            "rms_norm_eps": 1e-2,
            "rope_parameters": {
                "full_attention": PLAIN_ROPE,
                "sliding_attention": PLAIN_ROPE | {"rope_theta": 30.0},
            },
        },
    ),
    "phi3": ("Phi3ForCausalLM", LLAMA | {"rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.5}}),
    "granite": (
        "GraniteForCausalLM",
        LLAMA | {"attention_multiplier": 0.3, "residual_multiplier": 0.8, "embedding_multiplier": 2.0},
    ),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA | {"no_rope_layers": [1, 0]}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        GPT2 | {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
    ),
    "bert": ("BertForMaskedLM", BERT),
    "bert-untied": ("BertForMaskedLM", BERT | {"tie_word_embeddings": False, "hidden_act": "relu"}),
    "roberta": ("RobertaForMaskedLM", BERT),
}
COUPLED = ("gpt2", "gpt2-untied", "bert", "bert-untied", "roberta")
#: Everything at once, by kind of host.
ALL_LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 67,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 5,
}
ALL_COUPLED = {"hidden_size": 96, "intermediate_size": 67, "num_attention_heads": 8}


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    cls, settings = HOSTS[name]
    return make(cls, settings | changes, dtype)


def make(cls: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    kind = getattr(transformers, cls)
    model = kind(kind.config_class(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.3)
            elif "bias" in name:
                parameter.copy_(noise * 0.3)
            else:
                parameter.add_(noise * 0.2)
    return model.to(dtype).eval()


def everything(name: str) -> dict[str, int]:
    """All sizes that the host can grow at once."""
    if name not in COUPLED:
        return ALL_LLAMA
    return ALL_COUPLED if name.startswith(("bert", "roberta")) else ALL_COUPLED | {"num_hidden_layers": 5}


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(2, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def dense_llama(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a Llama in float64 from its parameters alone: every head and position by itself, no host code."""
    config: Any = model.config
    state = {name: value.detach().double() for name, value in model.state_dict().items()}
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    base = config.rope_parameters["rope_theta"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * state[name]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : width // 2].contiguous(), x[..., width // 2 :].contiguous())
        # The host keeps its frequencies in float32, so both models must turn by those.
        frequencies = (1.0 / (base ** (torch.arange(0, width, 2).float() / width))).double()
        angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    rows = []
    for row in ids:
        x = state["model.embed_tokens.weight"][row]
        past = torch.ones(len(row), len(row), dtype=torch.bool).tril()
        for i in range(config.num_hidden_layers):
            at = f"model.layers.{i}"
            h = norm(x, f"{at}.input_layernorm.weight")
            q, k, v = (linear(h, f"{at}.self_attn.{part}_proj") for part in "qkv")
            outs = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                one = turned(q[:, head * width : (head + 1) * width])
                other = turned(k[:, group * width : (group + 1) * width])
                scores = (one @ other.T / math.sqrt(width)).masked_fill(~past, -math.inf)
                outs.append(scores.softmax(-1) @ v[:, group * width : (group + 1) * width])
            x = x + linear(torch.cat(outs, -1), f"{at}.self_attn.o_proj")
            h = norm(x, f"{at}.post_attention_layernorm.weight")
            gate, up = linear(h, f"{at}.mlp.gate_proj"), linear(h, f"{at}.mlp.up_proj")
            x = x + linear(gate * gate.sigmoid() * up, f"{at}.mlp.down_proj")
        rows.append(norm(x, "model.norm.weight") @ state["lm_head.weight"].T)
    return torch.stack(rows)
