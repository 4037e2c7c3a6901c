"""Small models and a tokenizer, built on the spot: nothing is fetched."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

TRAINED = 32


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end token that it never adds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def tiny_config(**changes: object) -> LlamaConfig:
    settings = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TRAINED,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**{**settings, **changes})


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """Random weights, large enough that positions and context matter to the output."""
    torch.manual_seed(1)
    return LlamaForCausalLM(tiny_config(**changes)).eval()


class Copyist(PreTrainedModel):
    """Predicts what followed the latest earlier occurrence of the last ``order`` tokens, within ``reach`` tokens.

    It stands in for a model that retrieves perfectly up to a known distance. Its forward takes no ``logits_to_keep``.
    """

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig, order: int = 8, reach: int = 10**9):
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(1))
        self.order, self.reach = order, reach

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:  # noqa: ARG002
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            seen: dict[tuple[int, ...], int] = {}
            for end in range(self.order, len(ids)):
                key = tuple(ids[end - self.order : end])
                place = seen.get(key)
                if place is not None and end - place <= self.reach:
                    logits[row, end - 1, ids[place]] = 20.0
                seen[key] = end
        return CausalLMOutput(logits=logits)
