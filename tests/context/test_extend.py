"""Putting methods on and taking them off, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from context.families import BY_NAME, COMMON, PLAIN_ROPE, TRAINED, in_pieces, tokens, widen
from danlu.attention.key_norm import add_key_norm, remove_key_norm
from danlu.context.extend import active_methods, extend, extended, restore
from danlu.context.methods import (
    NTK,
    DynamicNTK,
    KeyNorm,
    LeakyReRoPE,
    LogN,
    NTKMixed,
    ReRoPE,
    Window,
    YaRN,
)
from reference.host import Wide


@pytest.fixture(scope="module")
def model():
    """A float64 model; every test leaves it plain."""
    return BY_NAME["llama"].build()


@pytest.fixture
def wide():
    """Float64 throughout, no gradients."""
    with Wide(), torch.no_grad():
        yield


def test_extend_twice_is_extend_once_and_the_last_call_counts(model, wide):
    ids = tokens()
    plain = model(ids).logits
    once = extend(model, ReRoPE(window=7), LogN())(ids).logits
    assert torch.equal(extend(model, "rerope:window=7+logn")(ids).logits, once)
    extend(model, NTKMixed(factor=4))
    extend(model, ReRoPE(window=7), LogN())
    assert torch.equal(model(ids).logits, once)
    assert torch.equal(restore(model)(ids).logits, plain)
    assert torch.equal(restore(model)(ids).logits, plain), "restoring a plain model does nothing"
    assert active_methods(model) == ()
    assert not hasattr(model.config, "danlu_methods")


def test_extended_restores_what_was_there_even_after_an_error(model, wide):
    ids = tokens()
    plain = model(ids).logits
    with pytest.raises(RuntimeError, match="inside"), extended(model, DynamicNTK()):
        raise RuntimeError("inside")
    assert torch.equal(model(ids).logits, plain)
    extend(model, DynamicNTK(), trained_length=12)
    before = model(ids).logits
    with extended(model, Window(window=5), trained_length=30):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    with extended(model):
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ValueError, match="window"), extended(model, ReRoPE(window=99)):
        pass
    assert torch.equal(model(ids).logits, before)
    restore(model)


def test_a_failing_extend_leaves_the_model_as_it_was(model, wide):
    ids = tokens()
    extend(model, ReRoPE(window=7))
    before = model(ids).logits
    for bad in ((ReRoPE(window=TRAINED),), (YaRN(),), ("rerop",), (ReRoPE(window=3), Window(window=3))):
        with pytest.raises(ValueError):
            extend(model, *bad)
        assert torch.equal(model(ids).logits, before)
    restore(model)


def test_a_deep_copy_of_an_extended_model_works_alone(model, wide):
    ids = tokens(1, 40)
    plain = model(ids).logits
    for methods in (
        (ReRoPE(window=7), LogN()),
        (LeakyReRoPE(window=5, stride=4.0),),
        (DynamicNTK(),),
        (NTK(factor=4),),
    ):
        extend(model, *methods)
        expected = model(ids).logits
        twin = copy.deepcopy(model)
        restore(model)
        assert torch.equal(twin(ids).logits, expected)
        torch.testing.assert_close(in_pieces(twin, ids, [20, 1, 19]), expected, rtol=0, atol=1e-10)
        assert torch.equal(restore(twin)(ids).logits, plain)
        assert torch.equal(model(ids).logits, plain)


def small(config: str, model: str | None = None, **options):
    built = getattr(transformers, config)(**{**COMMON, **options})
    if model is not None:
        return getattr(transformers, model)(built)
    return widen(transformers.AutoModelForCausalLM.from_config(built, attn_implementation="eager")).eval()


def gpt(kind: str, **options):
    config = getattr(transformers, f"{kind}Config")(vocab_size=97, n_layer=1, n_head=2, **options)
    return getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)


LLAMA4 = {"head_dim": 16, "intermediate_size_mlp": 80, "num_local_experts": 2, "no_rope_layers": [1, 1]}
MULTIMODAL = PLAIN_ROPE | {"mrope_section": [2, 3, 3]}
DYNAMIC = PLAIN_ROPE | {"rope_type": "dynamic", "factor": 2.0}
REFUSED = {
    "gpt2": (lambda: gpt("GPT2", n_embd=32), "GPT2LMHeadModel has no rotary positions"),
    "bloom": (lambda: gpt("Bloom", hidden_size=32), "BloomForCausalLM has no rotary positions"),
    "gptj": (lambda: gpt("GPTJ", n_embd=32, rotary_dim=8), "GPTJForCausalLM has no rotary positions"),
    "falcon": (lambda: small("FalconConfig", num_kv_heads=2), "FalconForCausalLM does not call attention through"),
    "llama4": (
        lambda: small("Llama4TextConfig", attention_chunk_size=64, **LLAMA4),
        r"Llama4TextRotaryEmbedding does not return \(cos, sin\)",
    ),
    "qwen2-vl": (
        lambda: small("Qwen2VLTextConfig", "Qwen2VLTextModel", rope_parameters=MULTIMODAL),
        r"Qwen2VLTextModel rotates along several axes \(mrope_section\)",
    ),
    "dynamic-host": (
        lambda: small("LlamaConfig", rope_parameters=DYNAMIC),
        "LlamaForCausalLM uses rope_type 'dynamic', which changes with the length",
    ),
    "mistral-narrow": (
        lambda: small("MistralConfig", sliding_window=8),
        "every layer of MistralForCausalLM with positions looks back at most 8 tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_with_its_name_and_the_reason(name):
    build, sentence = REFUSED[name]
    model = build()
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=sentence):
        extend(model, ReRoPE(window=7), trained_length=TRAINED)
    assert model.config._attn_implementation == implementation
    assert not hasattr(model.config, "danlu_methods")
    with torch.no_grad():
        model(tokens(1, 5))


def test_sinks_under_the_host_s_own_window_are_refused():
    with pytest.raises(ValueError, match="MistralForCausalLM: its own sliding window drops them"):
        extend(BY_NAME["mistral-wide-window"].build(), Window(window=9, sinks=2))


def test_key_norm_comes_and_goes_with_its_method_and_composes(model, wide):
    ids = tokens()
    plain = model(ids).logits
    add_key_norm(model)
    normed = model(ids).logits
    with extended(model, ReRoPE(window=7)):
        both = model(ids).logits
    assert torch.equal(model(ids).logits, normed), "a key norm that extend did not add stays"
    assert remove_key_norm(model) == model.config.num_hidden_layers
    assert (normed - plain).abs().max() > 0.1
    with extended(model, KeyNorm()):
        assert torch.equal(model(ids).logits, normed)
    with extended(model, ReRoPE(window=7), KeyNorm()):
        torch.testing.assert_close(model(ids).logits, both, rtol=0, atol=1e-12)
        torch.testing.assert_close(in_pieces(model, ids, [5] + [1] * (ids.shape[1] - 5)), both, rtol=0, atol=1e-10)
    assert torch.equal(model(ids).logits, plain)
    assert not hasattr(model.config, "danlu_key_norm")


def test_what_is_no_host_model_is_refused():
    with pytest.raises(TypeError, match="Hugging Face causal language model, got Linear"):
        extend(torch.nn.Linear(2, 2), ReRoPE(window=7))
