"""Training, adapters, compilation and half precision with extended models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from context.families import BY_NAME, NEW, STACKS, TRAINED, generate, tokens
from danlu.context.extend import extend, extended, restore
from reference.host import Spec, Wide, reference


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_bfloat16_is_close_to_float32(stack):
    model, ids = BY_NAME["llama"].build(torch.float32), tokens(2, 50)
    for parameter in model.parameters():  # flatter attention than elsewhere: peaks multiply any rounding
        parameter.mul_(0.5 if parameter.ndim > 1 else 1)
    with extended(model, stack):
        full = model(ids).logits
        plain = (model(ids).logits - restore(model)(ids).logits).abs().mean()
    model.to(torch.bfloat16)
    with extended(model, stack):
        half = model(ids).logits
    assert half.dtype == torch.bfloat16
    error = (half.float() - full).abs().mean()
    assert error < 0.02 * full.abs().mean() + 1e-4
    assert error < plain / 3, "what bfloat16 rounds off must be small beside what the method does"


@pytest.mark.parametrize(
    "stack", ["rerope:window=7+logn", *(pytest.param(s, marks=pytest.mark.slow) for s in STACKS[1:4])]
)
@torch.no_grad()
def test_the_traced_graph_computes_the_same(stack):
    model, ids = BY_NAME["llama"].build(), tokens(2, 40)
    torch.compiler.reset()
    with extended(model, stack):
        eager = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, eager, rtol=0, atol=1e-10)
        other = tokens(2, 47)
        expected = model(other, use_cache=False).logits
        torch.testing.assert_close(compiled(other, use_cache=False).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["rerope:window=7+logn", "dynamic-ntk"])
@torch.no_grad()
def test_compiled_models_compute_the_same(stack):
    model, ids = BY_NAME["llama"].build(torch.float32), tokens(2, 40)
    torch.compiler.reset()
    with extended(model, stack):
        eager, generated = model(ids, use_cache=False).logits, generate(model, ids[:, :9])
        compiled = torch.compile(model)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, eager, rtol=0, atol=1e-3)
        assert torch.equal(generate(compiled, ids[:, :9]), generated)


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


SPECS = {
    "rerope:window=7": Spec(window=7),
    "leaky:window=5:stride=4.0": Spec(window=5, stride=4.0),
    "leaky:window=5:stride=0.5": Spec(window=5, stride=0.5),
    "dynamic-ntk": Spec(dynamic="ntk"),
    "window:window=9:sinks=2": Spec(band=9, sinks=2),
    "rerope:window=7+logn": Spec(window=7, log_n=TRAINED),
    "ntk-mixed:factor=4": Spec(rescale="ntk-mixed", factor=4),
}


@pytest.mark.parametrize("stack", SPECS)
@pytest.mark.parametrize("name", ["llama", "gpt-oss", "gemma2"])
def test_gradients_equal_those_of_the_definition(name, stack):
    if name != "llama" and stack not in ("rerope:window=7", "dynamic-ntk"):
        stack = "rerope:window=7+logn"
    family = BY_NAME[name]
    model, ids = family.build(), tokens(2, 40)
    with Wide():
        with reference(model, SPECS[stack], TRAINED):
            expected = gradients(model, ids)
        with extended(model, stack):
            actual = gradients(model, ids)
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(actual[key], gradient, rtol=0, atol=1e-10 * max(scale, 1), msg=key)


@pytest.mark.parametrize("stack", ["rerope:window=7+logn", "dynamic-ntk", "leaky:window=5:stride=0.5"])
def test_gradient_checkpointing_gives_the_same_gradients(stack):
    model, ids = BY_NAME["llama"].build(), tokens(2, 40)
    model.train()
    extend(model, stack)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    actual = gradients(model, ids)
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stack", ["rerope:window=7+logn", "dynamic-ntk"])
def test_an_adapter_trains_on_an_extended_model(stack):
    peft = pytest.importorskip("peft")
    base, ids = BY_NAME["llama"].build(torch.float32), tokens(2, 40)
    with torch.no_grad(), extended(base, stack):
        expected = base(ids).logits
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
    )
    assert extend(wrapped, stack) is wrapped
    with torch.no_grad():
        assert torch.equal(wrapped(ids).logits, expected), "a fresh adapter changes nothing"
        assert generate(wrapped, ids[:, :9]).shape == (2, 9 + NEW)
    optimiser = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = wrapped(ids).logits
        assert not torch.equal(restore(wrapped)(ids).logits, trained)
        extend(wrapped, stack)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, trained, rtol=0, atol=5e-3)


def test_attention_dropout_in_training_is_refused():
    model, ids = BY_NAME["llama"].build(torch.float32, attention_dropout=0.1), tokens(1, 20)
    extend(model, "rerope:window=7")
    model(ids)  # evaluation has no dropout
    model.train()
    with pytest.raises(ValueError, match=r"attention dropout must be 0 .* got 0.1: set config.attention_dropout = 0"):
        model(ids)
