"""One classification of parameters, on real hosts."""

import pytest
import torch
import transformers
from torch import nn

from danlu.hosts.parameters import Kind, classify_parameters, is_norm, rests_at_zero

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 23}
FEW_HEADS = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}


def build(name: str, **options) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**options)
    return transformers.AutoModel.from_config(config)


def test_llama():
    kinds = classify_parameters(build("Llama", **FEW_HEADS))
    assert kinds["embed_tokens.weight"] is Kind.EMBEDDING
    assert kinds["layers.0.self_attn.q_proj.weight"] is Kind.MATRIX
    assert kinds["layers.0.input_layernorm.weight"] is kinds["norm.weight"] is Kind.GAIN


def test_bert_and_gpt2():
    kinds = classify_parameters(build("Bert", **SMALL))
    assert kinds["embeddings.position_embeddings.weight"] is Kind.EMBEDDING
    assert kinds["encoder.layer.0.attention.self.query.bias"] is Kind.BIAS
    assert kinds["embeddings.LayerNorm.weight"] is Kind.GAIN and kinds["embeddings.LayerNorm.bias"] is Kind.BIAS
    kinds = classify_parameters(build("GPT2", n_embd=16, n_layer=1, n_head=2, vocab_size=23))
    assert kinds["h.0.mlp.c_fc.weight"] is Kind.MATRIX and kinds["wpe.weight"] is Kind.EMBEDDING


def test_expert_banks_are_matrices():
    kinds = classify_parameters(build("Mixtral", **FEW_HEADS, num_local_experts=2))
    banks = {name: kind for name, kind in kinds.items() if "experts" in name}
    assert banks and set(banks.values()) == {Kind.MATRIX}


def test_a_tied_table_is_an_embedding_and_met_once():
    config = transformers.LlamaConfig(**FEW_HEADS, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    kinds = classify_parameters(model)
    assert "lm_head.weight" not in kinds and kinds["model.embed_tokens.weight"] is Kind.EMBEDDING
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    # whichever is met first
    head = nn.Linear(4, 7, bias=False)
    table = nn.Embedding(7, 4)
    head.weight = table.weight
    assert list(classify_parameters(nn.Sequential(head, table)).values()) == [Kind.EMBEDDING]


def test_lone_vectors_and_scalars():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.gate = nn.Parameter(torch.ones(3))
            self.table = nn.Parameter(torch.ones(3, 2))

    assert list(classify_parameters(Gated()).values()) == [Kind.VECTOR, Kind.VECTOR, Kind.MATRIX]


def test_overrides_win_and_must_match():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    kinds = classify_parameters(model, {r"^0\.weight": "embedding", "weight": Kind.VECTOR})
    assert list(kinds.values()) == [Kind.EMBEDDING, Kind.BIAS, Kind.VECTOR, Kind.BIAS]
    with pytest.raises(ValueError, match="must match parameter names, got 'nothing'"):
        classify_parameters(model, {"nothing": "matrix"})
    with pytest.raises(ValueError, match=r"overrides\['0'\] must be one of matrix, .* got 'tensor'"):
        classify_parameters(model, {"0": "tensor"})


@pytest.mark.parametrize(
    ("name", "options", "at_zero"),
    [
        ("Gemma", FEW_HEADS, True),
        ("Gemma2", FEW_HEADS, True),
        ("Nemotron", FEW_HEADS, True),
        ("Llama", FEW_HEADS, False),
        ("Bert", SMALL, False),
    ],
)
def test_norms_that_rest_at_zero_are_asked(name, options, at_zero):
    model = build(name, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    norms = [module for module in model.modules() if is_norm(module)]
    assert norms and {rests_at_zero(module) for module in norms} == {at_zero}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_norms_that_rest_at_zero_on_other_types_and_devices():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    assert rests_at_zero(GemmaRMSNorm(8).bfloat16())
    assert rests_at_zero(GemmaRMSNorm(8).to("meta"))
    assert not rests_at_zero(nn.LayerNorm(8)) and not rests_at_zero(nn.Linear(2, 2))


def test_gated_norms_rest_at_one():
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

    assert rests_at_zero(Qwen3NextRMSNorm(8))
    assert not rests_at_zero(Qwen3NextRMSNormGated(8))
