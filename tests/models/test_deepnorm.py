"""DeepNorm: constants, residual objects, initial weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from danlu.hosts.architecture import read_architecture
from danlu.hosts.parameters import Kind, classify_parameters
from danlu.models.deepnorm import apply_deepnorm
from danlu.models.initialise import xavier_normal_
from danlu.models.residual import DeepNormResidual, PostNorm, PreNorm, deepnorm_constants, scaled_residual
from reference.deepnorm_hosts import bert, gpt2, llama, shake

# constants


def test_the_constants_are_those_of_the_table():
    six = deepnorm_constants(n_decoder=6)
    assert six == (None, None, pytest.approx(12**0.25, abs=1e-12), pytest.approx(48**-0.25, abs=1e-12))
    assert [round(value, 4) for value in six[2:]] == [1.8612, 0.3799]
    assert [round(value, 4) for value in deepnorm_constants(n_encoder=1000)[:2]] == [6.6874, 0.1057]
    both = deepnorm_constants(6, 6)
    assert [round(value, 4) for value in both] == [1.4179, 0.4970, 2.0598, 0.3433]
    expected = (0.81 * 6 ** (5 / 16), 0.87 * 6 ** (-5 / 16), 18**0.25, 72**-0.25)
    assert both == pytest.approx(expected, abs=1e-12)
    uneven = deepnorm_constants(18, 4)
    assert uneven == pytest.approx(
        (0.81 * (18**4 * 4) ** (1 / 16), 0.87 * (18**4 * 4) ** (-1 / 16), 12**0.25, 48**-0.25), abs=1e-12
    )


@pytest.mark.parametrize("layers", [1, 6, 24, 1000])
def test_each_recipe_meets_its_condition(layers):
    conditions = {
        "sgd": lambda a, b: (b / a) ** 2 * 2 * layers,
        "adam": lambda a, b: b / a * 2 * layers,
        "lamb": lambda a, b: b * b / a * 2 * layers,
    }
    for optimizer, condition in conditions.items():
        for norm in ("post", "pre"):
            constants = deepnorm_constants(n_decoder=layers, optimizer=optimizer, norm=norm)
            alpha, beta = constants.decoder_alpha, constants.decoder_beta
            assert condition(alpha, beta) == pytest.approx(1, abs=1e-12)
            if norm == "pre" or optimizer == "lamb":
                assert alpha == 1
            else:
                assert alpha * beta == pytest.approx(1, abs=1e-12)
            assert deepnorm_constants(layers, 0, optimizer, norm)[:2] == (alpha, beta)
    paper = deepnorm_constants(n_decoder=layers)
    assert paper.decoder_beta / paper.decoder_alpha == pytest.approx((4 * layers) ** -0.5, abs=1e-12)


def test_constants_refuse_what_has_no_recipe():
    with pytest.raises(ValueError, match="must be >= 1, got 0 layers"):
        deepnorm_constants()
    with pytest.raises(ValueError, match="n_decoder must be a whole number of layers >= 0, got -2"):
        deepnorm_constants(n_decoder=-2)
    with pytest.raises(ValueError, match="n_encoder must be a whole number"):
        deepnorm_constants(n_encoder=2.0)
    with pytest.raises(ValueError, match="'paper': it has post-norm alone"):
        deepnorm_constants(n_decoder=2, norm="pre")
    with pytest.raises(ValueError, match="must be 'paper' for an encoder with a decoder, got 'adam'"):
        deepnorm_constants(2, 2, "adam")
    with pytest.raises(ValueError, match="optimizer must be one of paper, sgd, adam, lamb, got 'tiger'"):
        deepnorm_constants(n_decoder=2, optimizer="tiger")
    with pytest.raises(ValueError, match="norm must be one of post, pre, got 'mid'"):
        deepnorm_constants(n_decoder=2, optimizer="adam", norm="mid")


# residual objects


def test_residual_objects_compute_their_formulas():
    g = torch.Generator().manual_seed(2)
    x, w = (torch.randn(shape, dtype=torch.float64, generator=g) for shape in ((2, 5, 8), (8, 8)))
    norm = shake(nn.LayerNorm(8).double())

    def branch(h):
        return torch.tanh(h @ w)

    def dense_norm(h):
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    cases = {
        PreNorm(norm): x + branch(dense_norm(x)),
        PostNorm(norm): dense_norm(x + branch(x)),
        DeepNormResidual(1.7, norm): dense_norm(1.7 * x + branch(x)),
        DeepNormResidual(1, norm): dense_norm(x + branch(x)),
    }
    for residual, expected in cases.items():
        assert torch.allclose(residual(x, branch), expected, atol=1e-12, rtol=0)
    assert "alpha=1.7" in repr(DeepNormResidual(1.7, norm))
    assert [name for name, _ in DeepNormResidual(1.7, norm).named_parameters()] == ["norm.weight", "norm.bias"]


def test_the_scale_moves_into_eps():
    g = torch.Generator().manual_seed(3)
    x, update = (torch.randn(4, 16, dtype=torch.float64, generator=g) * 0.01 for _ in range(2))
    alpha, eps = 1.8612, 1e-3
    for norm in (F.layer_norm, F.rms_norm):
        scaled = norm(alpha * x + update, (16,), eps=eps)
        assert torch.allclose(scaled, norm(x + update / alpha, (16,), eps=eps / alpha**2), atol=1e-12, rtol=0)
        assert (scaled - norm(x + update / alpha, (16,), eps=eps)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_rounds_once_in_half_precision(dtype):
    g = torch.Generator().manual_seed(4)
    x, update = (torch.randn(64, 64, generator=g).to(dtype) for _ in range(2))
    alpha = torch.tensor(6.6874, dtype=dtype).item()  # the CPU kernel takes the scale in the tensors' type
    exact = (alpha * x.double() + update.double()).to(dtype)
    ours = scaled_residual(x, update, 6.6874)
    assert ours.dtype == dtype
    assert torch.equal(ours, exact)
    assert (alpha * x + update != exact).float().mean() > 0.05


def test_gradients_of_the_residual_match_finite_differences():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(3, 4, dtype=torch.float64, generator=g, requires_grad=True)
    w = torch.randn(4, 4, dtype=torch.float64, generator=g, requires_grad=True)
    norm = nn.LayerNorm(4).double()
    assert torch.autograd.gradcheck(lambda a, b: DeepNormResidual(2.5, norm)(a, lambda h: torch.tanh(h @ b)), (x, w))


@pytest.mark.parametrize("alpha", [0, -1.0, math.inf, math.nan, "2", True])
def test_alpha_must_be_a_positive_number(alpha):
    with pytest.raises(ValueError, match="alpha must be a finite number > 0"):
        DeepNormResidual(alpha, nn.LayerNorm(4))
    with pytest.raises(ValueError, match="alpha must be a finite number > 0"):
        apply_deepnorm(llama(), alpha=alpha)


# initial weights


def test_a_large_matrix_has_the_spread_of_xavier_times_the_gain():
    weight = torch.empty(1024, 1024)
    xavier_normal_(weight, 0.3799, torch.Generator().manual_seed(0))
    assert weight.std().item() == pytest.approx(0.3799 * math.sqrt(2 / 2048), rel=0.02)
    assert abs(weight.mean().item()) < 1e-4
    kurtosis = (weight / weight.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, rel=0.02)  # a normal; 1.8 would be uniform


def wide(kind: str):
    size = dict(hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=8)
    if kind == "gpt2":
        return gpt2().__class__(
            transformers.GPT2Config(vocab_size=64, n_embd=256, n_inner=384, n_layer=2, n_head=8, n_positions=16)
        )
    if kind == "bert":
        return bert(**size)
    return llama(kind, **{**size, "num_key_value_heads": 2})


@pytest.mark.parametrize("kind", ["Llama", "Phi3", "Qwen2", "Qwen3", "Gemma", "Mistral", "gpt2", "bert"])
def test_every_part_of_a_model_has_its_own_spread(kind):
    model = wide(kind)
    outside = {name: p.clone() for name, p in model.named_parameters() if "layers." not in name and ".h." not in name}
    done = apply_deepnorm(model, gain=0.37)
    assert done.gain == 0.37
    assert done.layers == 2
    assert done.alpha == pytest.approx(4**0.25)
    for matrix in read_architecture(model).matrices():
        rows, columns = matrix.weight.shape
        measured = matrix.weight.std().item() / math.sqrt(2 / (rows + columns))
        read_by_softmax = any(part in matrix.name for part in ("q_proj", "k_proj", "query", "key"))
        if "qkv_proj" in matrix.name or "c_attn" in matrix.name:
            read_by_softmax = matrix.start < model.config.hidden_size + (64 if kind == "Phi3" else 256)
        assert measured == pytest.approx(1.0 if read_by_softmax else 0.37, rel=0.03), matrix.name
    kinds = classify_parameters(model)
    names = dict(model.named_parameters())
    blocks = [name for name in names if "layer" in name or ".h." in name]
    for name in blocks:
        if kinds[name] is Kind.BIAS:
            assert not names[name].any(), name
        if kinds[name] is Kind.GAIN:
            assert torch.equal(names[name], torch.full_like(names[name], 0.0 if kind == "Gemma" else 1.0)), name
    for name, parameter in outside.items():
        assert torch.equal(names[name], parameter) or name in blocks, name


def test_a_seed_gives_the_same_weights_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    one, two, three = (llama() for _ in range(3))
    torch.set_rng_state(before)
    apply_deepnorm(one, seed=3)
    apply_deepnorm(two, seed=torch.Generator().manual_seed(3))
    apply_deepnorm(three, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.model.layers[0].mlp.up_proj.weight, three.model.layers[0].mlp.up_proj.weight)
