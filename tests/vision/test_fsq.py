"""Finite scalar quantisation: digits, codes, indices, gradients, wrappers, and its place in host libraries."""

import copy
import math

import pytest
import torch

from danlu.vision.composed import VQModelQuantizer
from danlu.vision.fsq import FSQ, MOST_LEVELS, RECOMMENDED
from danlu.vision.quantizer import QuantizerOutput, build_quantizer
from reference.quantize import digits_of, fsq_border, fsq_code, fsq_digit, fsq_slope, mixed_radix

# Values of z at which the code of the tanh bound changes.
THRESHOLDS = {
    3: [-0.548640, 0.548640],
    4: [-1.149720, -0.346199, 0.457322],
    5: [-0.971245, -0.255146, 0.255146, 0.971245],
    8: [-1.422951, -0.792490, -0.437278, -0.143695, 0.149887, 0.505099, 1.135561],
}


def values(*shape: int, seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def kinds(quantizer: FSQ) -> list[str]:
    auto = ["sigmoid" if count == 2 else "tanh" for count in quantizer.levels]
    return auto if quantizer.bound_kind == "auto" else [quantizer.bound_kind] * len(quantizer.levels)


@pytest.mark.parametrize("levels", THRESHOLDS)
def test_codes_change_at_the_known_thresholds(levels):
    quantizer = FSQ([levels])
    borders = torch.tensor(THRESHOLDS[levels])[:, None]
    assert quantizer.encode(borders - 2e-6).tolist() == list(range(levels - 1))
    assert quantizer.encode(borders + 2e-6).tolist() == list(range(1, levels))
    assert [fsq_border(k, levels, "tanh") for k in range(1, levels)] == pytest.approx(THRESHOLDS[levels], abs=1e-6)


@pytest.mark.parametrize("bound", ["auto", "sigmoid"])
@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [2, 3, 4], [33], [7, 2], [1001, 6], [16, 9]])
def test_digits_codes_and_indices_are_those_of_the_reference(levels, bound):
    quantizer = FSQ(levels, bound=bound)
    z = values(200, len(levels))
    out = quantizer(z)
    for row in range(len(z)):
        digits = [fsq_digit(x, n, kind) for x, n, kind in zip(z[row].tolist(), levels, kinds(quantizer), strict=True)]
        assert quantizer.digits(out.indices[row]).tolist() == digits
        assert out.indices[row].item() == mixed_radix(digits, levels)
        codes = [fsq_code(k, n, kind) for k, n, kind in zip(digits, levels, kinds(quantizer), strict=True)]
        assert out.codes[row].tolist() == pytest.approx(codes, abs=1e-7)


@pytest.mark.parametrize("levels", list(RECOMMENDED.values()))
def test_the_recommended_levels_count_their_codes_one_to_one(levels):
    quantizer = FSQ(levels)
    indices = torch.arange(quantizer.codebook_size)
    codes = quantizer.decode(indices)
    assert torch.equal(codes, quantizer.codebook)
    # codes are values of z that land in their own cell only after inverting the bound: go by digits
    inside = torch.tensor([[_middle(k, n) for k in range(n)] + [0.0] * (8 - n) for n in levels])
    digits = quantizer.digits(indices)
    z = torch.stack([inside[j][digits[:, j]] for j in range(len(levels))], -1)
    assert torch.equal(quantizer.encode(z), indices)
    assert torch.equal(quantizer(z).codes, codes)
    assert len(codes.unique(dim=0)) == quantizer.codebook_size == math.prod(levels)


def _middle(digit: int, levels: int) -> float:
    borders = [-9.0, *(fsq_border(k, levels, "tanh") for k in range(1, levels)), 9.0]
    return (borders[digit] + borders[digit + 1]) / 2


@pytest.mark.parametrize("levels", [[8] * 9, [16] * 9, [4] * 16, [2] * 63, [1000, 999, 998, 997], [7] * 22])
def test_indices_beyond_float_precision_are_exact(levels):
    quantizer = FSQ(levels)
    assert quantizer.codebook_size == math.prod(levels) <= 2**63
    assert sum(tensor.numel() for tensor in quantizer.buffers()) == 6 * 64 * len(levels)  # nothing grows with the codes
    z = values(300, len(levels), scale=2.0)
    z[0], z[1] = -torch.inf, torch.inf
    out = quantizer(z)
    assert out.indices.dtype == torch.int64
    assert out.indices[0].item() == 0 and out.indices[1].item() == quantizer.codebook_size - 1
    for row in range(2, 100):
        digits = [fsq_digit(x, n, kind) for x, n, kind in zip(z[row].tolist(), levels, kinds(quantizer), strict=True)]
        assert out.indices[row].item() == mixed_radix(digits, levels)
        assert quantizer.digits(out.indices[row]).tolist() == digits_of(out.indices[row].item(), levels) == digits
    assert torch.equal(quantizer.decode(out.indices), out.codes)


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 500, 501, 1000, 1001, 1002, 4095, MOST_LEVELS - 1, MOST_LEVELS])
@pytest.mark.parametrize("bound", ["auto", "sigmoid"])
def test_infinite_values_take_the_outer_codes_without_gradient(levels, bound):
    z = torch.tensor([[-torch.inf], [torch.inf]], requires_grad=True)
    out = FSQ([levels], bound=bound)(z)
    assert out.indices.tolist() == [0, levels - 1]
    out.quantized.sum().backward()
    assert torch.equal(z.grad, torch.zeros(2, 1))


@pytest.mark.parametrize("levels", range(2, 40))
def test_zero_is_bounded_to_zero(levels):
    assert FSQ([levels]).bound(torch.zeros(1)).abs().item() < 1e-6
    if levels > 2:
        assert FSQ([levels])(torch.zeros(1, 1)).codes.item() == 0


@pytest.mark.parametrize("levels", [3, 5, 9, 33])
def test_sigmoid_at_twice_the_value_is_tanh_for_odd_levels(levels):
    z = values(4000, 1)
    # the two differ by eps, and only between the borders that it moves
    borders = torch.tensor([fsq_border(k, levels, "tanh") for k in range(1, levels)])
    moved = (torch.tensor([fsq_border(k, levels, "sigmoid") for k in range(1, levels)]) / 2 - borders).abs()
    z = z[((z - borders).abs() > moved + 1e-5).all(1)]
    assert len(z) > 3900 and moved.max() < 0.02
    assert torch.equal(FSQ([levels], bound="sigmoid").encode(2 * z), FSQ([levels]).encode(z))


@pytest.mark.parametrize("levels", range(2, 12))
def test_sigmoid_is_symmetric_and_even_tanh_is_not(levels):
    z = values(500, 1)
    quantizer = FSQ([levels], bound="sigmoid")
    assert torch.equal(quantizer(-z).codes, -quantizer(z).codes)
    assert quantizer.codebook.aminmax() == (-1, 1)
    assert FSQ([levels]).codebook.max().item() == pytest.approx(
        1 - (2 / levels if levels % 2 == 0 and levels > 2 else 0)
    )


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 600])
@pytest.mark.parametrize("bound", ["auto", "sigmoid"])
def test_gradients_are_those_of_the_bound(levels, bound):
    quantizer = FSQ([levels], bound=bound)
    z = values(50, 1).double().requires_grad_()
    quantizer(z).quantized.sum().backward()
    slopes = [fsq_slope(x, levels, kinds(quantizer)[0]) for x in z.detach().flatten().tolist()]
    assert z.grad.flatten().tolist() == pytest.approx(slopes, abs=1e-6)
    half = levels // 2 if kinds(quantizer)[0] == "tanh" else (levels - 1) / 2
    again = z.detach().requires_grad_()
    (quantizer.bound(again) / half).sum().backward()
    assert torch.allclose(again.grad, z.grad, atol=1e-12)


def test_gradient_of_the_gradient_is_that_of_the_bound():
    z = values(6, 1).double().requires_grad_()
    (slope,) = torch.autograd.grad(FSQ([5])(z).quantized.sum(), z, create_graph=True)
    slope.sum().backward()
    assert torch.allclose(z.grad, -2 * z.tanh() * (1 - z.tanh() ** 2) * 2.002 / 2, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [33, 2, 256]])
def test_every_dtype_gets_the_exact_codes_of_its_values(dtype, levels):
    quantizer = FSQ(levels)
    z = values(500, len(levels)).to(dtype).requires_grad_()
    out = quantizer(z)
    assert out.quantized.dtype == dtype and out.indices.dtype == torch.int64
    # decided in float32 or better whatever the dtype
    assert torch.equal(out.indices, quantizer.encode(z.detach().double()))
    half = torch.tensor([n // 2 if n > 2 else 0.5 for n in levels], dtype=torch.float64)
    exact = quantizer.decode(out.indices, torch.float64)
    assert torch.equal((exact * half).round(decimals=1), exact * half)
    assert torch.equal(out.quantized, exact.to(dtype))
    assert torch.equal(out.quantized, quantizer.decode(out.indices, dtype))
    out.quantized.sum().backward()
    assert z.grad.dtype == dtype and torch.isfinite(z.grad).all()


def test_training_and_evaluation_agree_and_encode_is_forward():
    quantizer = FSQ([8, 5, 5, 5], dim=7)
    z = values(3, 5, 7)
    trained, evaluated = quantizer.train()(z), quantizer.eval()(z)
    assert torch.equal(trained.quantized, evaluated.quantized) and torch.equal(trained.indices, quantizer.encode(z))
    assert torch.equal(quantizer.decode(trained.indices), trained.quantized)
    assert trained.loss.item() == 0 and trained.codes.shape == (3, 5, 4)


def test_autocast_quantizes_in_float32():
    plain, projected = FSQ([33, 33]), FSQ([33, 33], dim=5)
    z = values(400, 2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = plain(z)
        mixed = projected(values(6, 5))
        assert torch.equal(projected.decode(mixed.indices).float(), mixed.quantized)
    assert torch.equal(inside.indices, plain.encode(z)) and inside.quantized.dtype == torch.float32
    mixed.quantized.sum().backward()
    assert projected.project_in.weight.grad.abs().sum() > 0
    rounded = FSQ([33, 33]).encode(z.bfloat16())
    assert 0 < (rounded != inside.indices).float().mean() < 0.2


def test_casting_a_module_keeps_its_constants():
    quantizer = FSQ([1000, 333], dim=2)
    z = values(300, 2)
    expected = quantizer.encode(z)
    assert torch.equal(quantizer.half().encode(z), expected)
    assert torch.equal(quantizer.to(torch.bfloat16).encode(z), expected)
    with torch.device("meta"):
        empty = FSQ([1000, 333])
    assert torch.equal(empty.to_empty(device="cpu").encode(z), expected)
    projected = FSQ([5, 5], dim=3).to(torch.bfloat16)
    out = projected(values(4, 3).bfloat16())
    assert out.quantized.dtype == torch.bfloat16 and torch.equal(projected.decode(out.indices), out.quantized)


@pytest.mark.parametrize("channel_dim", [1, -3, -1, 3, 0])
def test_channels_may_be_on_any_axis(channel_dim):
    quantizer = FSQ([8, 5, 5], channel_dim=channel_dim)
    z = values(2, 4, 6, 3)
    reference = FSQ([8, 5, 5])(z)
    moved = z.movedim(-1, channel_dim)
    out = quantizer(moved)
    assert torch.equal(out.indices, reference.indices) and torch.equal(quantizer.encode(moved), reference.indices)
    assert torch.equal(out.quantized.movedim(channel_dim, -1), reference.quantized)
    assert torch.equal(quantizer.decode(out.indices), out.quantized)


def test_several_codebooks_are_several_quantizers():
    quantizer = FSQ([8, 5], num_codebooks=3)
    z = values(4, 7, 6)
    out = quantizer(z)
    assert out.indices.shape == (4, 7, 3) and quantizer.codebook_sizes == (40, 40, 40)
    for j in range(3):
        assert torch.equal(out.indices[..., j], FSQ([8, 5]).encode(z[..., 2 * j : 2 * j + 2]))
    assert torch.equal(quantizer.decode(out.indices), out.quantized)
    projected = FSQ([8, 5], dim=9, num_codebooks=3)
    again = projected(values(4, 9))
    assert again.quantized.shape == (4, 9) and again.codes.shape == (4, 6)
    assert torch.equal(projected.decode(again.indices), again.quantized)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (3, 0, 4), (1, 4), (255, 4), (256, 4), (257, 4), (2, 3, 5, 7, 4)])
def test_any_number_of_vectors(shape):
    quantizer = FSQ([8, 5, 5, 5])
    z = values(*shape)
    out = quantizer(z)
    assert out.indices.shape == shape[:-1] and out.quantized.shape == shape
    one_by_one = [quantizer.encode(row).item() for row in z.reshape(-1, 4)]
    assert out.indices.flatten().tolist() == one_by_one
    assert torch.equal(quantizer.decode(out.indices), out.codes)


def test_views_and_transposed_inputs():
    quantizer = FSQ([8, 5])
    z = values(2, 64, 10).transpose(1, 2)[..., ::32]
    z = z.detach().requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.quantized, quantizer(z.detach().contiguous()).quantized)
    out.quantized.sum().backward()
    assert z.grad.shape == z.shape


def test_compiles_into_one_graph():
    quantizer = FSQ([8, 5, 5], dim=4)
    z = values(6, 11, 4).requires_grad_()
    torch._dynamo.reset()
    step = torch.compile(lambda x: quantizer(x), fullgraph=True, backend="aot_eager")
    out, expected = step(z), quantizer(z)
    assert isinstance(out, QuantizerOutput)
    assert torch.equal(out.indices, expected.indices) and torch.allclose(out.quantized, expected.quantized)
    (gradient,) = torch.autograd.grad(out.quantized.square().sum(), z)
    (wanted,) = torch.autograd.grad(expected.quantized.square().sum(), z)
    assert torch.allclose(gradient, wanted, atol=1e-6)
    with pytest.raises(RuntimeError, match="z must not be NaN"):
        step(z.detach() * torch.nan)
    back = torch.compile(quantizer.decode, fullgraph=True, backend="aot_eager")
    assert torch.allclose(back(expected.indices), expected.quantized)
    with pytest.raises(RuntimeError, match=r"indices must be in 0\.\.199"):
        back(expected.indices + 200)
    torch._dynamo.reset()


def test_noise_replaces_the_rounding_of_some_values_in_training_only():
    quantizer = FSQ([5, 8], noise=0.25)
    z = values(4000, 2)
    out = quantizer(z)
    rounded = FSQ([5, 8])(z)
    assert torch.equal(out.indices, rounded.indices) and torch.equal(out.codes, rounded.codes)
    moved = out.quantized != rounded.quantized
    assert 0.22 < moved.float().mean().item() < 0.28
    # in levels: within half a level of the bounded value, and as often above as below
    off = (out.quantized * torch.tensor([2.0, 4.0]) - quantizer.bound(z))[moved]
    assert off.abs().max() <= 0.5 + 1e-5 and abs(off.mean().item()) < 0.03
    assert off.var().item() == pytest.approx(1 / 12, rel=0.1)
    assert torch.equal(FSQ([5, 8], noise=0.25)(z).quantized, out.quantized)  # a seed decides
    assert not torch.equal(FSQ([5, 8], noise=0.25, seed=1)(z).quantized, out.quantized)
    assert not torch.equal(copy.deepcopy(quantizer)(z).quantized, out.quantized)  # the stream goes on
    assert torch.equal(quantizer.eval()(z).quantized, rounded.quantized)
    leaf = z.double().requires_grad_()
    quantizer.train()(leaf).quantized.sum().backward()
    plain = z.double().requires_grad_()
    FSQ([5, 8])(plain).quantized.sum().backward()
    assert torch.allclose(leaf.grad, plain.grad)


def test_recommended_sizes_and_configuration_round_trip():
    quantizer = FSQ.from_codebook_size(2**10, dim=16, channel_dim=1)
    assert quantizer.levels == (8, 5, 5, 5) and quantizer.codebook_size == 1000 and quantizer.dim == 16
    twin = build_quantizer(quantizer.config)
    assert isinstance(twin, FSQ) and twin.config == quantizer.config
    twin.load_state_dict(quantizer.state_dict())
    assert torch.equal(twin.encode(values(2, 16, 3)), quantizer.encode(values(2, 16, 3)))
    assert FSQ([8, 5]).state_dict() == {}
    with pytest.raises(ValueError, match="size must be one of 16, 64, 256.*got 1000"):
        FSQ.from_codebook_size(1000)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"levels": []}, ValueError, "at least one"),
        ({"levels": [5, 1]}, ValueError, r"levels must be from 2 to 2\*\*20 each, got 1"),
        ({"levels": [2**20 + 1]}, ValueError, "got 1048577"),
        ({"levels": [5.0]}, TypeError, "levels must be ints, got 5.0"),
        ({"levels": [True, 5]}, TypeError, "got True"),
        ({"levels": [2] * 64}, ValueError, r"give 18446744073709551616 codes, at most 2\*\*63"),
        ({"levels": [5, 2], "bound": "tanh"}, ValueError, "at least 3 with bound='tanh'"),
        ({"levels": [5], "bound": "clamp"}, ValueError, "bound must be 'auto', 'tanh' or 'sigmoid', got 'clamp'"),
        ({"levels": [5], "num_codebooks": 0}, ValueError, "num_codebooks must be an int >= 1, got 0"),
        ({"levels": [5], "dim": 0}, ValueError, "dim must be an int >= 1, got 0"),
        ({"levels": [5], "noise": 1.5}, ValueError, r"noise must be None or in \(0, 1\], got 1.5"),
        ({"levels": [5], "channel_dim": 1.0}, TypeError, "channel_dim must be an int, got 1.0"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        FSQ(**options)


def test_bad_inputs():
    quantizer = FSQ([8, 5])
    with pytest.raises(ValueError, match="dim = 2 channels at axis -1"):
        quantizer(values(3, 4))
    with pytest.raises(ValueError, match="dim = 2 channels at axis 1"):
        FSQ([8, 5], channel_dim=1)(values(2))
    with pytest.raises(TypeError, match="floating-point tensor, got torch.int64"):
        quantizer(torch.ones(3, 2, dtype=torch.long))
    spoilt = values(300, 2)
    spoilt[7, 1] = torch.nan
    for call in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match="z must not be NaN"):
            call(spoilt)
    for bad in (torch.tensor([0, 40]), torch.tensor([-1]), torch.tensor([2**40])):
        for call in (quantizer.decode, quantizer.digits):
            with pytest.raises(ValueError, match=r"indices must be in 0\.\.39"):
                call(bad)
    for call in (quantizer.decode, quantizer.digits):
        with pytest.raises(TypeError, match="indices must be integers, got torch.float32"):
            call(torch.ones(3))
    with pytest.raises(ValueError, match="last axis of 2, one per codebook"):
        FSQ([8, 5], num_codebooks=2).decode(torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="a table of 134217728 codes is too large"):
        _ = FSQ([8] * 9).codebook
    assert torch.equal(quantizer.decode(torch.tensor([39], dtype=torch.int32)), quantizer.codebook[39:])
    assert FSQ([1024] * 6).decode(torch.tensor([5], dtype=torch.uint8)).shape == (1, 6)


def test_the_codes_and_weights_of_vector_quantize_pytorch_are_ours():
    peer_module = pytest.importorskip("vector_quantize_pytorch")
    peer = peer_module.FSQ([8, 5, 5, 5], dim=6)
    ours = FSQ([8, 5, 5, 5], dim=6)
    ours.load_state_dict(peer.state_dict())
    z = values(5, 30, 6)
    quantized, indices = peer(z)
    out = ours(z)
    assert torch.equal(out.indices, indices.long())
    assert torch.allclose(out.quantized, quantized, atol=1e-6)


def test_takes_the_place_of_the_quantizer_of_a_diffusers_vq_model(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.VQModel(
        in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, vq_embed_dim=3,
        num_vq_embeddings=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        lookup_from_codebook=True,
    )  # fmt: skip
    quantizer = FSQ([8, 5, 5], channel_dim=1)
    model.quantize = VQModelQuantizer(quantizer)
    images = values(2, 1, 16, 16)
    latents = model.encode(images).latents
    indices = quantizer.encode(latents)
    assert indices.shape == (2, 8, 8)
    out = model(images)
    direct = model.decode(indices.flatten(), force_not_quantize=True, shape=(2, 8, 8, 3))
    assert torch.equal(out.sample, direct.sample)
    out.sample.square().mean().backward()
    assert model.quant_conv.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = diffusers.VQModel.from_pretrained(tmp_path)
    loaded.quantize = VQModelQuantizer(FSQ([8, 5, 5], channel_dim=1))
    assert torch.equal(loaded(images).sample, out.sample)
    with pytest.raises(ValueError, match="channel_dim=1, got -1"):
        VQModelQuantizer(FSQ([8, 5, 5]))
