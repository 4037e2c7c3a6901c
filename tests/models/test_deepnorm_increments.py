"""The table of one step's increments: what it measures, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from danlu.models.deepnorm import apply_deepnorm, vector_rate_groups
from danlu.models.increments import check_increments
from reference.deepnorm_hosts import BUILD, bert, gpt2, llama, shake, tokens

BATCH = {"input_ids": tokens(), "labels": tokens()}


def adam(rate: float):
    return lambda parameters: torch.optim.Adam(parameters, rate)


def wide_gpt2(layers: int, **constants):
    """A byte-sized GPT whose logits have a spread near 1."""
    model = gpt2(layers, initializer_range=0.125)
    apply_deepnorm(model, **constants)
    return model


@pytest.mark.parametrize("kind", BUILD)
def test_the_change_is_that_of_a_step_taken_by_hand(kind):
    model = BUILD[kind]()
    apply_deepnorm(model)
    shake(model)
    report = check_increments(model, BATCH, adam(1e-3))
    assert list(report.logit_change) == ["matrices", "vectors", "embeddings, head", "all parameters"]
    output = model(**BATCH)
    assert report.loss == pytest.approx(output.loss.item(), abs=1e-6)
    output.loss.backward()
    gradients = dict(model.named_parameters())
    down = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.mlp.c_proj.weight"}
    name = down.get(kind, "bert.encoder.layer.1.output.dense.weight")
    assert report.gradient_norms["down"][1] == pytest.approx(gradients[name].grad.norm().item(), rel=1e-5)
    if kind == "gpt2":
        fused = gradients["transformer.h.1.attn.c_attn.weight"].grad
        assert report.gradient_norms["value"][1] == pytest.approx(fused[:, 64:].norm().item(), rel=1e-5)
        assert report.gradient_norms["query"][1] == pytest.approx(fused[:, :32].norm().item(), rel=1e-5)
    assert ("gate" in report.gradient_norms) == (kind == "llama")
    adam(1e-3)([parameter for parameter in model.parameters() if parameter.requires_grad]).step()
    after = model(**BATCH)
    expected = (after.logits - output.logits).square().mean().sqrt().item()
    assert report.logit_change["all parameters"] == pytest.approx(expected, rel=1e-4)
    assert report.loss_change["all parameters"] == pytest.approx((after.loss - output.loss).item(), abs=1e-5)


def test_each_scope_moves_its_own_parameters():
    model = llama()
    moved: list[set[int]] = []

    def factory(parameters):
        moved.append({id(parameter) for parameter in parameters})
        return torch.optim.SGD(parameters, 0.1)

    check_increments(model, BATCH, factory)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, vectors, tables, everything = ({names[i] for i in scope} for scope in moved)
    assert all("_proj" in name for name in matrices)
    assert len(matrices) == 21
    assert all("norm" in name for name in vectors)
    assert tables == {"model.embed_tokens.weight", "lm_head.weight"}
    assert everything == set(names.values()) == matrices | vectors | tables


def test_the_model_is_as_before():
    model = bert().train()
    model.bert.encoder.layer[0].eval()
    old = torch.ones_like(model.bert.embeddings.word_embeddings.weight)
    model.bert.embeddings.word_embeddings.weight.grad = old
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    check_increments(model, BATCH, adam(1.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert model.bert.embeddings.word_embeddings.weight.grad is old
    assert model.bert.encoder.layer[0].output.dense.weight.grad is None

    def fails(parameters):
        nn.init.zeros_(parameters[0])
        raise RuntimeError("no optimiser")

    with pytest.raises(RuntimeError, match="no optimiser"):
        check_increments(model, BATCH, fails)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropout_does_not_count():
    model = gpt2(resid_pdrop=0.5).train()
    one, two = (check_increments(model, BATCH, adam(1e-3)) for _ in range(2))
    assert one == two
    still = check_increments(model, BATCH, lambda parameters: torch.optim.SGD(parameters, 0.0))
    assert set(still.logit_change.values()) == {0.0}


def test_increments_follow_the_law_of_the_recipes():
    def matrices(layers, factory, **constants):
        return check_increments(wide_gpt2(layers, **constants), BATCH, factory).logit_change["matrices"]

    def sgd(parameters):
        return torch.optim.SGD(parameters, 0.1)

    flat = matrices(16, adam(1e-4), optimizer="adam") / matrices(4, adam(1e-4), optimizer="adam")
    assert 1 / 1.5 < flat < 1.5
    root = matrices(16, adam(1e-4)) / matrices(4, adam(1e-4))
    assert root == pytest.approx(2, rel=0.25)  # the paper's constants under Adam: N^(1/2)
    grows = matrices(16, adam(1e-4), alpha=1, gain=1) / matrices(4, adam(1e-4), alpha=1, gain=1)
    assert grows > 3
    assert 0.5 < matrices(16, sgd) / matrices(4, sgd) < 2


def test_slower_vectors_shrink_the_increment():
    model = wide_gpt2(16)
    plain = check_increments(model, BATCH, adam(1e-4)).logit_change["vectors"]
    factor = vector_rate_groups(model, 1e-4)[1]["lr"]
    slower = check_increments(model, BATCH, adam(factor)).logit_change["vectors"]
    assert slower == pytest.approx(plain / 32, rel=0.05)


def test_the_report_prints_as_a_table():
    text = str(check_increments(llama(), BATCH, adam(1e-3)))
    assert text.startswith("3 layers, loss 4.1")
    for word in ("logit change", "loss change", "matrices", "all parameters", "first layer", "median", "down"):
        assert word in text


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="such as labels"):
        check_increments(llama(), {"input_ids": tokens()}, adam(1e-3))
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="loss on batch must be finite"):
        check_increments(broken, BATCH, adam(1e-3))
    with pytest.raises(ValueError, match="requires_grad, got none"):
        check_increments(llama().requires_grad_(False), BATCH, adam(1e-3))
    consumed = llama()
    for parameter in consumed.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(ValueError, match="take hooks that consume them off"):
        check_increments(consumed, BATCH, adam(1e-3))
