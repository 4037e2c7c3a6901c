import pytest
import torch
import transformers as hosts
from torch import nn

from danlu.hosts.architecture import UnsupportedArchitecture, find_blocks, read_architecture

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}


def build(name, **options):
    return getattr(hosts, name)(getattr(hosts, options.pop("config"))(**options)).eval()


def llama(**options):
    return build("LlamaForCausalLM", config="LlamaConfig", **SIZES, intermediate_size=64, num_key_value_heads=2,
                 **options)  # fmt: skip


def gpt2():
    return build("GPT2LMHeadModel", config="GPT2Config", n_embd=32, n_head=4, n_layer=3, vocab_size=61,
                 bos_token_id=1, eos_token_id=2)  # fmt: skip


def bert():
    return build("BertForMaskedLM", config="BertConfig", **SIZES, intermediate_size=64)


def neox():
    return build("GPTNeoXForCausalLM", config="GPTNeoXConfig", **SIZES, intermediate_size=64)


@pytest.mark.parametrize(("make", "name", "norm"), [
    (llama, "layers", "norm"), (gpt2, "h", "ln_f"), (bert, "encoder.layer", None), (neox, "layers", "final_layer_norm"),
])  # fmt: skip
def test_blocks_are_found_with_the_norms_around_them(make, name, norm):
    model = make()
    for subject in (model, model.base_model):
        stack = find_blocks(subject)
        assert stack.base is model.base_model and stack.name == name
        assert stack.blocks is model.base_model.get_submodule(name) and len(stack.blocks) == 3
        assert stack.norms[1] is (None if norm is None else model.base_model.get_submodule(norm))
    assert (find_blocks(model).norms[0] is not None) == (make is bert)


def test_blocks_are_found_whatever_their_projections_are_made_of():
    model = llama()
    for block in model.model.layers:
        block.self_attn.q_proj = nn.Identity()
    assert len(find_blocks(model).blocks) == 3
    with pytest.raises(UnsupportedArchitecture, match="q_proj must be a plain floating-point linear layer"):
        read_architecture(model)


def test_an_unusual_name_is_found_as_the_longest_list_of_one_kind():
    model = build("DistilBertForMaskedLM", config="DistilBertConfig", dim=32, n_heads=4, hidden_dim=64, n_layers=3,
                  vocab_size=61)  # fmt: skip
    assert find_blocks(model).name == "transformer.layer"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("T5Model", config="T5Config", d_model=32, num_layers=2, vocab_size=61, d_kv=8, num_heads=4,
                       d_ff=32), "one stack of blocks, T5Model has two"),
        (lambda: build("AlbertModel", config="AlbertConfig", **SIZES, embedding_size=16, intermediate_size=32),
         "AlbertModel has 1 in encoder.albert_layer_groups for num_hidden_layers=3"),
        (lambda: build("GPT2Model", config="GPT2Config", n_embd=32, n_head=4, n_layer=2, vocab_size=61,
                       add_cross_attention=True, bos_token_id=1, eos_token_id=2), "no cross-attention, got one in h"),
    ],
)  # fmt: skip
def test_what_is_no_single_stack_is_refused(make, message):
    with pytest.raises(UnsupportedArchitecture, match=message):
        find_blocks(make())


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_the_projections_that_are_read_compute_what_the_block_computes(make):
    """Queries, keys, values and the way back by the views, against the block's own attention with one token."""
    model = make()
    block = read_architecture(model).blocks[1]
    attention = block.attention
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))

    def apply(matrix, x):
        return nn.functional.linear(x, matrix.weight, matrix.bias)

    value = apply(attention.value, x)
    group = attention.heads // attention.kv_heads
    shared = value.view(1, 1, attention.kv_heads, attention.head_dim).repeat_interleave(group, 2).flatten(2)
    expected = apply(attention.output, shared)  # one token attends to itself alone
    if make is llama:
        cos = torch.ones(1, 1, 8)
        out = attention.module(x, position_embeddings=(cos, cos * 0), attention_mask=None)[0]
    elif make is gpt2:
        out = attention.module(x)[0]
    else:
        inner = attention.module.self(x)[0]
        out = attention.module.output.dense(inner)
    assert torch.allclose(out, expected, atol=1e-6)
