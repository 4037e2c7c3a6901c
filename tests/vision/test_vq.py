"""Learnt codebooks, rotation, SimVQ, lookup-free bits, and quantizers made of quantizers."""

import pytest
import torch

from danlu.vision.composed import GroupedQuantizer, ResidualQuantizer
from danlu.vision.fsq import FSQ
from danlu.vision.quantizer import build_quantizer
from danlu.vision.vq import LFQ, VectorQuantizer
from reference.quantize import entropies, nearest, rotation_matrix

KINDS = {
    "vq": {},
    "ema": {"update": "ema"},
    "rotation": {"estimator": "rotation"},
    "simvq": {"transform": True},
    "rotated ema": {"update": "ema", "estimator": "rotation"},
}


VQ = {"kind": "vq", "codebook_size": 4, "dim": 2}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_each_vector_becomes_its_nearest_code(kind):
    quantizer = VectorQuantizer(37, 6, **KINDS[kind])
    z = values(5, 11, 6)
    out = quantizer(z)
    assert torch.equal(out.indices.flatten(), nearest(z.reshape(-1, 6), quantizer.codebook.detach()))
    assert out.indices.shape == (5, 11) and out.indices.dtype == torch.int64
    assert torch.equal(out.quantized, quantizer.codebook[out.indices])
    assert torch.equal(quantizer.decode(out.indices), out.quantized)
    assert torch.equal(quantizer.encode(z), out.indices)
    assert torch.equal(quantizer.eval()(z).quantized, out.quantized)


def test_nearest_codes_are_found_in_parts_with_bounded_memory(monkeypatch):
    from danlu.vision import vq

    whole = VectorQuantizer(50, 4)
    z = values(301, 4)
    expected = whole.encode(z)
    seen = []
    found = vq.nearest_codes
    monkeypatch.setattr(vq, "_CHUNK_ELEMENTS", 50 * 7)
    monkeypatch.setattr(vq, "nearest_codes", lambda k, e: seen.append(k.shape[2]) or found(k, e))
    assert torch.equal(whole.encode(z), expected)
    assert max(seen) == 7 and sum(seen) == 301


def test_loss_moves_codes_by_beta_and_vectors_by_gamma():
    quantizer = VectorQuantizer(9, 3, beta=0.7, gamma=0.2)
    z = values(40, 3).requires_grad_()
    out = quantizer(z)
    e = quantizer.rows.detach()[out.indices]
    distance = (z.detach() - e).square().sum(1).mean()
    assert out.loss.item() == pytest.approx(0.9 * distance.item(), rel=1e-5)
    out.loss.backward()
    assert torch.allclose(z.grad, 0.2 * 2 * (z.detach() - e) / 40, atol=1e-6)
    expected = torch.zeros(9, 3).index_add_(0, out.indices, 0.7 * 2 * (e - z.detach()) / 40)
    assert torch.allclose(quantizer.rows.grad, expected, atol=1e-6)


def test_straight_through_passes_the_gradient_unchanged_and_none_to_the_codes():
    quantizer = VectorQuantizer(9, 3)
    z = values(40, 3).requires_grad_()
    weight = values(40, 3, seed=1)
    (quantizer(z).quantized * weight).sum().backward()
    assert torch.equal(z.grad, weight) and quantizer.rows.grad is None


def test_rotation_turns_the_gradient_as_it_turns_the_vector():
    quantizer = VectorQuantizer(9, 5, estimator="rotation").double()
    z = values(30, 5).double().requires_grad_()
    weight = values(30, 5, seed=1).double()
    out = quantizer(z)
    (out.quantized * weight).sum().backward()
    e = quantizer.rows.detach()[out.indices]
    for row in range(30):
        matrix = rotation_matrix(z[row].detach(), e[row])
        assert torch.allclose(matrix @ z[row].detach(), e[row], atol=1e-9)  # forward: e
        assert torch.allclose(z.grad[row], matrix.T @ weight[row], atol=1e-9)
    ratio = e.norm(dim=1) / z.detach().norm(dim=1)
    assert torch.allclose(z.grad.norm(dim=1) / weight.norm(dim=1), ratio)


def test_the_rotated_vector_is_the_code_up_to_rounding():
    from danlu.vision.vq import _rotate

    z, e = values(200, 8), values(200, 8, seed=1)
    assert torch.allclose(_rotate(z, e), e, atol=1e-5)


def test_rotation_stays_finite_where_it_is_singular():
    quantizer = VectorQuantizer(1, 3, estimator="rotation")
    with torch.no_grad():
        quantizer.rows.copy_(torch.tensor([[0.0, 2.0, 0.0]]))
    z = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    out = quantizer(z)
    assert torch.equal(out.quantized, quantizer.rows.detach().expand(3, 3))
    out.quantized.sum().backward()
    assert torch.isfinite(z.grad).all()


def test_the_moving_average_ends_at_the_means_of_the_clusters():
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]])
    z = centres.repeat(20, 1) + 0.2 * values(60, 2)
    quantizer = VectorQuantizer(3, 2, update="ema", decay=0.8)
    quantizer.initialise(z)
    with torch.no_grad():
        quantizer.average.set(quantizer.codebook[None] + 0.5)  # off, but each in its cluster
    for _ in range(120):
        out = quantizer(z)
    means = torch.stack([z[out.indices == code].mean(0) for code in range(3)])
    assert torch.allclose(quantizer.codebook, means, atol=1e-5)
    assert not list(quantizer.parameters()) and out.loss.item() > 0
    still = quantizer.eval().codebook.clone()
    quantizer(z + 1)
    assert torch.equal(quantizer.codebook, still)


def test_one_step_of_the_moving_average():
    quantizer = VectorQuantizer(2, 1, update="ema", decay=0.9)
    quantizer.average.set(torch.tensor([[[-1.0], [1.0]]]))
    z = torch.tensor([[0.5], [2.0], [-3.0]])
    assert torch.equal(quantizer(z).quantized, torch.tensor([[1.0], [1.0], [-1.0]]))
    quantizer(z)  # the first forward takes effect when the second begins
    expected = torch.tensor([[(0.9 * -1 + 0.1 * -3) / (0.9 + 0.1)], [(0.9 + 0.1 * 2.5) / (0.9 + 0.1 * 2)]])
    assert torch.allclose(quantizer.codebook, expected)


def test_simvq_trains_the_map_and_not_the_rows():
    quantizer = VectorQuantizer(7, 4, transform=True)
    assert [name for name, _ in quantizer.named_parameters()] == ["weight"]
    z = values(30, 4)
    out = quantizer(z)
    out.loss.backward()
    e = quantizer.rows[out.indices]
    expected = 2 * e.T @ (e - z) / 30
    assert torch.allclose(quantizer.weight.grad, expected, atol=1e-5)
    with torch.no_grad():
        quantizer.weight.mul_(2)
    assert torch.equal(quantizer.codebook, 2 * quantizer.rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z).quantized, quantizer.codebook[quantizer.encode(z)])


@pytest.mark.parametrize("kind", ["vq", "ema", "simvq"])
def test_initialise_starts_at_k_means_centres(kind):
    centres = 5 * values(4, 3)
    z = centres.repeat(25, 1) + 0.1 * values(100, 3, seed=1)
    quantizer = VectorQuantizer(4, 3, **KINDS[kind])
    quantizer.initialise(z)
    assert sorted(quantizer.encode(z).bincount().tolist()) == [25] * 4
    assert (quantizer(z).quantized - z).abs().max() < 0.5
    with pytest.raises(ValueError, match="n >= codes = 4"):
        quantizer.initialise(z[:3])


def test_half_precision_and_channels_on_another_axis():
    plain = VectorQuantizer(11, 4)
    images = values(2, 4, 3, 5)
    moved = VectorQuantizer(11, 4, channel_dim=1)
    out = moved(images)
    assert torch.equal(out.indices, plain.encode(images.movedim(1, -1))) and out.quantized.shape == images.shape
    assert torch.equal(moved.decode(out.indices), out.quantized)
    half = VectorQuantizer(11, 4).bfloat16()
    low = half(values(6, 4).bfloat16().requires_grad_())
    assert low.quantized.dtype == torch.bfloat16 and low.loss.dtype == torch.float32
    assert torch.equal(low.indices, nearest(values(6, 4).bfloat16(), half.rows.detach()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain.encode(values(500, 4)), nearest(values(500, 4), plain.rows.detach()))
    empty = plain(values(0, 4))
    assert empty.indices.shape == (0,) and empty.loss.item() == 0


def test_lookup_free_bits_are_signs_with_entropy_and_commitment():
    z = values(50, 5).double().requires_grad_()
    codes = torch.where(z > 0, 1.0, -1.0).double()
    quantizer = LFQ(5, commitment=0.3, entropy=0.7, diversity=1.3, temperature=2.0)
    out = quantizer(z)
    assert torch.equal(out.quantized, codes)
    weights = 2 ** torch.arange(5)
    assert torch.equal(out.indices, ((codes > 0).long() * weights).sum(1))
    sure, spread = entropies(z.detach(), 2.0)
    distance = (z - codes).square().sum(1).mean().item()
    assert out.loss.item() == pytest.approx(0.3 * distance + 0.7 * (sure - 1.3 * spread), rel=1e-5)
    (gradient,) = torch.autograd.grad(out.loss, z, retain_graph=True)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    out.quantized.sum().backward()
    sigmoid = z.detach().sigmoid()
    assert torch.allclose(z.grad, 2 * sigmoid * (1 - sigmoid), atol=1e-9)


def test_entropy_of_many_bits_is_summed_over_groups_of_eight():
    z = values(20, 10).double()
    quantizer = LFQ(10, commitment=0, entropy=1, diversity=1, temperature=1)
    spreads = [entropies(z[:, part], 1.0) for part in (slice(0, 8), slice(8, 10))]
    assert quantizer(z).loss.item() == pytest.approx(sum(sure - spread for sure, spread in spreads), rel=1e-5)
    assert LFQ(63)(values(4, 63)).loss.isfinite()


def test_residual_parts_quantize_what_is_left_over():
    parts = [VectorQuantizer(16, 3, seed=seed) for seed in range(3)]
    quantizer = ResidualQuantizer(parts, scales=[1.0, 0.5, 0.25])
    z = values(40, 3).requires_grad_()
    out = quantizer(z)
    rest, total, loss = z.detach(), torch.zeros(40, 3), 0.0
    for j, (part, scale) in enumerate(zip(parts, (1.0, 0.5, 0.25), strict=True)):
        single = part(rest / scale)
        assert torch.equal(out.indices[:, j], single.indices)
        rest, total, loss = rest - single.quantized * scale, total + single.quantized * scale, loss + single.loss
    assert torch.equal(out.quantized, total) and torch.equal(quantizer.decode(out.indices), total)
    assert out.loss.item() == pytest.approx(loss.item()) and torch.equal(quantizer.encode(z), out.indices)
    weight = values(40, 3, seed=9)
    (out.quantized * weight).sum().backward()
    assert torch.allclose(z.grad, weight, atol=1e-6)  # once, not once per part
    assert quantizer.codebook_sizes == (16, 16, 16) and quantizer.codebook_size == 16


def test_residual_scales_refine_finite_scalar_codes():
    z = values(2000, 2).tanh()
    errors = []
    for depth in (1, 2, 3):
        parts = [{"kind": "fsq", "levels": [5, 5]}] * depth
        quantizer = ResidualQuantizer(parts, scales=[0.25**stage for stage in range(depth)])
        out = quantizer(z)
        assert torch.equal(quantizer.encode(z), out.indices) and torch.equal(
            quantizer.decode(out.indices), out.quantized
        )
        errors.append((out.quantized - z).square().mean().item())
    assert errors[0] > 3 * errors[1] > 6 * errors[2]


def test_groups_quantize_their_own_channels():
    quantizer = GroupedQuantizer([FSQ([8, 5]), VectorQuantizer(7, 3), FSQ([3], num_codebooks=2)], channel_dim=1)
    z = values(4, 7, 6)
    out = quantizer(z)
    assert out.indices.shape == (4, 6, 4) and quantizer.codebook_sizes == (40, 7, 3, 3)
    assert torch.equal(out.quantized[:, :2].movedim(1, -1), FSQ([8, 5])(z[:, :2].movedim(1, -1)).quantized)
    assert torch.equal(out.quantized[:, 2:5].movedim(1, -1), quantizer.quantizers[1].rows[out.indices[..., 1]])
    assert torch.equal(quantizer.encode(z), out.indices) and torch.equal(quantizer.decode(out.indices), out.quantized)
    with pytest.raises(ValueError, match=r"different sizes \(40, 7, 3, 3\)"):
        _ = quantizer.codebook_size
    with pytest.raises(ValueError, match=r"indices must be in 0\.\.6"):
        quantizer.decode(out.indices + torch.tensor([0, 7, 0, 0]))
    nested = ResidualQuantizer([GroupedQuantizer([FSQ([8, 5]), FSQ([5])]), FSQ([5, 5, 5])])
    found = nested(values(9, 3))
    assert found.indices.shape == (9, 3) and torch.equal(nested.decode(found.indices), found.quantized)


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "fsq", "levels": [8, 5], "bound": "sigmoid"},
        {"kind": "lfq", "bits": 6, "dim": 4, "temperature": 0.5},
        {"kind": "vq", "codebook_size": 12, "dim": 4},
        {"kind": "vq", "codebook_size": 12, "dim": 4, "update": "ema", "decay": 0.9, "revive_below": 0.5},
        {"kind": "vq", "codebook_size": 12, "dim": 4, "transform": True, "estimator": "rotation"},
        {"kind": "residual", "parts": [{"kind": "vq", "codebook_size": 5, "dim": 4}] * 2, "scales": [1.0, 0.5]},
        {"kind": "grouped", "parts": [{"kind": "fsq", "levels": [5]}, {"kind": "vq", "codebook_size": 5, "dim": 3}]},
    ],
    ids=lambda config: config["kind"],
)
def test_a_configuration_and_a_state_make_the_same_quantizer(config):
    quantizer = build_quantizer(config)
    z = values(30, quantizer.dim)
    quantizer(z), quantizer(z)
    twin = build_quantizer(quantizer.config)
    assert twin.config == quantizer.config
    assert all(quantizer.config[key] == value for key, value in config.items() if key != "parts")
    twin.load_state_dict(quantizer.state_dict())
    assert torch.equal(twin.eval()(z).quantized, quantizer.eval()(z).quantized)


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"kind": "vqq"}, ValueError, "kind must be one of .*the nearest is 'vq'"),
        ({"levels": [5]}, ValueError, "kind must be one of"),
        ({"kind": "vq", "codebook_size": 0, "dim": 2}, ValueError, "codebook_size must be an int >= 1, got 0"),
        (VQ | {"update": "adam"}, ValueError, "update must be"),
        (VQ | {"estimator": "x"}, ValueError, "estimator must be"),
        (VQ | {"update": "ema", "transform": True}, ValueError, "transform=True"),
        (VQ | {"update": "ema", "beta": 1.0}, ValueError, "beta must be None or 0"),
        (VQ | {"revive_below": 1.0}, ValueError, "revive_below needs"),
        (VQ | {"gamma": -1.0}, ValueError, "beta and gamma must be at least 0"),
        (VQ | {"decay": 1.0, "update": "ema"}, ValueError, "decay must be"),
        ({"kind": "lfq", "bits": 64}, ValueError, "bits must be an int from 1 to 63, got 64"),
        ({"kind": "lfq", "bits": 4, "temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"kind": "lfq", "bits": 4, "entropy": -1.0}, ValueError, "at least 0, got 0.25, -1.0 and 1.0"),
        ({"kind": "residual", "parts": []}, ValueError, "at least one quantizer"),
        ({"kind": "residual", "parts": [{"kind": "fsq", "levels": [5]}, {"kind": "fsq", "levels": [5, 5]}]}, ValueError,
         "one dim"),
        ({"kind": "residual", "parts": [{"kind": "fsq", "levels": [5]}], "scales": [0.0]}, ValueError, "1 positive"),
        ({"kind": "grouped", "parts": [{"kind": "fsq", "levels": [5], "channel_dim": 1}]}, ValueError, "channel_dim"),
    ],
)  # fmt: skip
def test_bad_options(config, error, match):
    with pytest.raises(error, match=match):
        build_quantizer(config)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_vectors_that_are_not_finite_are_refused(bad):
    z = values(5, 3)
    z[2, 1] = bad
    for quantizer in (VectorQuantizer(4, 3), VectorQuantizer(4, 3, update="ema")):
        for call in (quantizer, quantizer.encode):
            with pytest.raises(ValueError, match="z must be finite"):
                call(z)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    quantizer = VectorQuantizer(9, 3, estimator="rotation", transform=True)
    z = values(10, 3).requires_grad_()
    out = torch.compile(lambda x: quantizer(x), fullgraph=True, backend="aot_eager")(z)
    assert torch.equal(out.indices, quantizer.encode(z)) and torch.allclose(out.quantized, quantizer(z).quantized)
    (out.loss + out.quantized.sum()).backward()
    torch._dynamo.reset()
