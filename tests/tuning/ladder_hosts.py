"""Small backbones for the tests of ladders, with weights wide enough that every part of a formula shows."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hosts

VOCABULARY = 61
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}


def widened(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.25 if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.to(dtype).eval()


def llama(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    settings = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, **options}
    settings |= {"bos_token_id": 1, "eos_token_id": None}
    return widened(hosts.LlamaForCausalLM(hosts.LlamaConfig(**settings)), dtype)


def gpt2(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    settings = {"n_embd": 32, "n_head": 4, "n_layer": 4, "vocab_size": VOCABULARY, "n_positions": 64, **options}
    settings |= {"bos_token_id": 1, "eos_token_id": 2}
    return widened(hosts.GPT2LMHeadModel(hosts.GPT2Config(**settings)), dtype)


def bert(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    settings = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 64, **options}
    return widened(hosts.BertForMaskedLM(hosts.BertConfig(**settings)), dtype)


def roberta(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    settings = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 1, **options}
    return widened(hosts.RobertaForMaskedLM(hosts.RobertaConfig(**settings)), dtype)


FAMILIES = {"llama": llama, "gpt2": gpt2, "bert": bert, "roberta": roberta}


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def unset(model: Any, seed: int = 5) -> Any:
    """Move every trained number of a ladder away from its start, so that biases, gains and gates matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model
