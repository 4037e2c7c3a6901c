"""Tiny randomly initialised host models, one for each rotary habit, and what a reference has to know of them.

Weights are drawn wide, so that attention is peaked and a wrong angle shows: with the library's usual 0.02 every softmax
is flat and every method computes the same mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

TRAINED = 16  # tokens that the models claim to be trained on
LENGTH = 56  # tokens that the tests read
VOCABULARY = 97
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 100.0}
HALF_ROPE = PLAIN_ROPE | {"partial_rotary_factor": 0.5}
YARN_ROPE = PLAIN_ROPE | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED,
    "rope_parameters": PLAIN_ROPE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, **MIXED_LAYERS}


STACKS = [
    "rerope:window=7",
    "leaky:window=5:stride=4.0",
    "dynamic-ntk",
    "window:window=9:sinks=2",
    "rerope:window=7+logn",
]
NEW = 30  # tokens to generate: prompts of 9 to 12 cross the window, the trained length and its double


def _always(module: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class Family:
    """How to build one model, and where it rotates.

    Attributes:
        config: name of the host's configuration class.
        options: what differs from ``COMMON``.
        rotates: whether an attention module has positions at all.
        from_end: the rotated dims are the last of the head, not the first.
    """

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    rotates: Callable[[nn.Module], bool] = _always
    from_end: bool = False

    def build(self, dtype: torch.dtype = torch.float64, **options: Any) -> transformers.PreTrainedModel:
        """A model in evaluation mode, always with the same weights."""
        config = getattr(transformers, self.config)(**{**COMMON, **self.options, **options})
        # experts in eager form: the grouped kernel has no float64
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
        return widen(model).to(dtype).eval()

    def __str__(self) -> str:
        return self.name


def widen(model: nn.Module, seed: int = 0) -> Any:
    """Draw all parameters anew, wide enough for peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.22)
            elif name.endswith("sinks"):
                parameter.copy_(noise * 2)
            elif "bias" in name:
                parameter.copy_(noise * 0.2)
            else:  # gains of norms; queries and keys that are normed need larger ones for peaked scores
                parameter.add_(noise * 0.1 + (0.8 if "q_norm" in name or "k_norm" in name else 0.0))
    return model


SUPPORTED = [
    Family("llama", "LlamaConfig"),
    Family("llama-yarn-host", "LlamaConfig", {"rope_parameters": YARN_ROPE}),
    Family("qwen2", "Qwen2Config"),
    Family("qwen2-mixed", "Qwen2Config", {"use_sliding_window": True, **MIXED_LAYERS}),
    Family("qwen3", "Qwen3Config", {"head_dim": 16}),
    Family("mistral-wide-window", "MistralConfig", {"sliding_window": 24}),
    Family("gemma", "GemmaConfig", {"head_dim": 16}),
    Family("gemma2", "Gemma2Config", {**GEMMA, "attn_logit_softcapping": 5.0}),
    Family(
        "gemma3",
        "Gemma3TextConfig",
        {
            **GEMMA,
            "rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE | {"rope_theta": 30.0}},
        },
    ),
    Family("phi", "PhiConfig", {"rope_parameters": HALF_ROPE}),
    Family("phi3", "Phi3Config", {"rope_parameters": HALF_ROPE}),
    Family("gpt-neox", "GPTNeoXConfig", {"rope_parameters": HALF_ROPE}),
    Family("stablelm", "StableLmConfig", {"rope_parameters": HALF_ROPE, "use_qkv_bias": True}),
    Family("cohere", "CohereConfig", {"logit_scale": 1.0}),
    Family(
        "cohere2-wide-window",
        "Cohere2Config",
        {"logit_scale": 1.0, **MIXED_LAYERS, "sliding_window": 24},
        rotates=lambda module: module.sliding_window is not None,
    ),
    Family("glm", "GlmConfig", {"rope_parameters": HALF_ROPE, "head_dim": 16}),
    Family("glm4", "Glm4Config", {"rope_parameters": HALF_ROPE, "head_dim": 16}),
    Family("olmo2", "Olmo2Config"),
    Family("granite", "GraniteConfig", {"attention_multiplier": 0.3, "residual_multiplier": 0.8}),
    Family(
        "smollm3",
        "SmolLM3Config",
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
        rotates=lambda module: bool(module.use_rope),
    ),
    Family("ernie4.5", "Ernie4_5Config", {"head_dim": 16}),
    Family("starcoder2", "Starcoder2Config"),
    Family("nemotron", "NemotronConfig", {"rope_parameters": HALF_ROPE}),
    Family(
        "deepseek-v3",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
        },
        from_end=True,
    ),
    Family(
        "gpt-oss",
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 2, **MIXED_LAYERS},
    ),
]
BY_NAME = {family.name: family for family in SUPPORTED}


def tokens(batch: int = 1, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Random token ids (batch, length), none of them padding."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of rows (length,) of different lengths, padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


def right_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of rows (length,) of different lengths, padded on the right."""
    width = max(len(row) for row in rows)
    ids = torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (0, width - len(row))) for row in rows])
    return ids, mask


def in_pieces(
    model: transformers.PreTrainedModel, ids: Tensor, pieces: list[int], mask: Tensor | None = None
) -> Tensor:
    """Logits of a prompt that is fed in pieces through one cache."""
    cache, out, start = DynamicCache(config=model.config), [], 0
    for size in pieces:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        step = model(ids[:, start:stop], attention_mask=seen, position_ids=positions, past_key_values=cache)
        out.append(step.logits)
        start = stop
    return torch.cat(out, 1)


def generate(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    return model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **options)
