"""Linear recurrent units: initialisation, the layer against its definition, padding, packing, caches, groups."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from danlu.attention.recurrent.block import LRUBlock, recurrent_param_groups
from danlu.attention.recurrent.lru import LRU, SLRU, ring_log_rate
from danlu.attention.recurrent.rwkv import RWKV4Mix
from reference.scan import naive_lru

H, N = 6, 5
MIXERS = {
    "lru": lambda: LRU(hidden_size=H, state_size=N),
    "slru": lambda: SLRU(hidden_size=H, state_size=N),
    "rwkv": lambda: RWKV4Mix(hidden_size=H, state_size=N, layer=1, layers=3),
    "block": lambda: LRUBlock(hidden_size=H, state_size=N),
}
mixers = pytest.mark.parametrize("kind", MIXERS)


def seeded(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return MIXERS[kind]()


def inputs(length: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, H, generator=torch.Generator().manual_seed(2))


def test_rates_of_the_ring_are_the_known_ones():
    radius = torch.exp(-ring_log_rate(torch.tensor([0, 0.25, 0.5, 1], dtype=torch.float64), 0.9, 0.999).exp())
    expected = torch.tensor([0.9, 0.92574308, 0.95078941, 0.999], dtype=torch.float64)
    torch.testing.assert_close(radius, expected, rtol=0, atol=1e-7 / 2)
    assert torch.isfinite(ring_log_rate(torch.zeros(1), 0, 0.5)).all()


def largest_gap(sample: Tensor, low: float, high: float) -> float:
    """Kolmogorov-Smirnov distance from the uniform distribution."""
    expected = (sample.sort().values - low) / (high - low)
    rank = torch.arange(1, len(sample) + 1, dtype=sample.dtype) / len(sample)
    return max((rank - expected).abs().max().item(), (rank - 1 / len(sample) - expected).abs().max().item())


@pytest.mark.parametrize("unit", [LRU, SLRU])
def test_squared_radii_are_uniform_and_gamma_normalises(unit):
    layer = unit(hidden_size=2, state_size=4000, radius_min=0.5, radius_max=0.99)
    squared = layer.factors().detach().abs().double().square()
    assert largest_gap(squared, 0.5**2, 0.99**2) < 1.63 / 4000**0.5  # one in a hundred
    assert largest_gap(squared.sqrt(), 0.5, 0.99) > 1.63 / 4000**0.5
    torch.testing.assert_close(layer.gamma_log.detach().double().exp(), (1 - squared).sqrt(), rtol=1e-4, atol=0)


def test_angles_are_uniform_up_to_the_largest():
    layer = LRU(hidden_size=2, state_size=4000, max_phase=math.pi / 10)
    assert largest_gap(layer.theta_log.detach().double().exp(), 0, math.pi / 10) < 1.63 / 4000**0.5
    torch.testing.assert_close(layer.factors().angle(), layer.theta_log.exp(), rtol=1e-4, atol=1e-6)


def test_weights_have_the_prescribed_spread():
    layer = LRU(hidden_size=300, state_size=200)
    for weight, spread in ((layer.B, (1 / 600) ** 0.5), (layer.C, (1 / 200) ** 0.5), (layer.D, 1.0)):
        assert abs(weight.std().item() / spread - 1) < (0.2 if weight.ndim == 1 else 0.02)
    layer = SLRU(hidden_size=300, state_size=200)
    for weight, spread in ((layer.B, (1 / 300) ** 0.5), (layer.C, (1 / 200) ** 0.5)):
        assert abs(weight.std().item() / spread - 1) < 0.02


@pytest.mark.parametrize("radius", [0.9, 0.99])
def test_gain_of_white_noise(radius):
    from danlu.kernels.scan import linear_scan

    u = torch.randn(1, 60, 100_000)
    power = linear_scan(torch.full((100_000,), radius), u)[0].square().mean(-1)
    expected = (1 - radius ** (2 * torch.arange(1.0, 61))) / (1 - radius**2)
    torch.testing.assert_close(power, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("unit", [LRU, SLRU])
def test_output_starts_with_variance_one(unit):
    layer = unit(hidden_size=64, state_size=256, radius_min=0.5, radius_max=0.95)
    nn.init.zeros_(layer.D)
    with torch.no_grad():
        y = layer(torch.randn(16, 600, 64))[:, 200:]
    assert abs(y.var().item() - 1) < 0.1


def test_a_generator_decides_all_draws_and_the_global_one_is_left_alone():
    for kind in ("lru", "slru", "rwkv"):
        layer = seeded(kind)
        state = torch.random.get_rng_state()
        layer.reset_parameters(torch.Generator().manual_seed(3))
        first = copy.deepcopy(layer.state_dict())
        layer.reset_parameters(torch.Generator().manual_seed(3))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(first[name], value) for name, value in layer.state_dict().items())


def test_two_real_products_are_the_complex_layer():
    layer = seeded("lru").double()
    x, cache = inputs(40).double(), layer.make_cache()
    expected, states = naive_lru(layer, x)
    torch.testing.assert_close(layer(x, cache=cache), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(cache.state.h, states[:, -1], rtol=0, atol=1e-12)


def test_gamma_and_factors_are_free_parameters():
    layer = seeded("lru").double()
    with torch.no_grad():
        layer.gamma_log.add_(0.3)
        layer.nu_log.sub_(0.2)
    x = inputs(20).double()
    torch.testing.assert_close(layer(x), naive_lru(layer, x)[0], rtol=0, atol=1e-12)


def test_a_real_unit_is_a_complex_one_without_angles():
    real = seeded("slru").double()
    layer = LRU(hidden_size=H, state_size=N).double()
    with torch.no_grad():
        for name in ("nu_log", "gamma_log", "D"):
            getattr(layer, name).copy_(getattr(real, name))
        layer.theta_log.fill_(-torch.inf)
        layer.B.copy_(torch.stack((real.B, torch.zeros_like(real.B)), 1))
        layer.C.copy_(torch.stack((real.C, torch.randn_like(real.C)), -1))
    torch.testing.assert_close(real(inputs().double()), layer(inputs().double()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["lru", "slru"])
def test_gradients_match_finite_differences(kind):
    layer = (LRU if kind == "lru" else SLRU)(hidden_size=2, state_size=2).double()
    names = [name for name, _ in layer.named_parameters()]

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [value.detach().clone().requires_grad_() for value in layer.parameters()]
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (x, *values))


@mixers
def test_any_chunks_and_single_tokens_give_the_whole(kind):
    layer, x = seeded(kind), inputs()
    positions = torch.arange(12)
    whole, cache = layer(x, positions), layer.make_cache()
    sizes = [4, 1, 5, 1, 1]
    chunks = zip(x.split(sizes, 1), positions.split(sizes), strict=True)
    parts = [layer(part, where, cache=cache) for part, where in chunks]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 12 and cache.get_mask_sizes(3) == (15, 0)
    assert layer(x[:, :0]).shape == (2, 0, H)


@mixers
def test_later_tokens_do_not_matter(kind):
    layer, x = seeded(kind), inputs()
    other = torch.cat((x[:, :7], torch.randn_like(x[:, 7:])), 1)
    assert torch.equal(layer(x)[:, :7], layer(other)[:, :7])
    assert not torch.allclose(layer(x)[:, 7:], layer(other)[:, 7:])


@mixers
def test_padding_on_any_side_changes_no_token(kind):
    layer, x = seeded(kind), inputs(8)
    rows = [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]]
    mask = torch.tensor(rows, dtype=torch.bool)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    noise = torch.where(mask[..., None], x, 50 * torch.randn_like(x)).requires_grad_()
    cache = layer.make_cache()
    out = layer(noise, positions, mask, cache)
    assert torch.isfinite(out).all()
    for row, real in enumerate(mask):
        alone = layer.make_cache()
        torch.testing.assert_close(out[row : row + 1, real], layer(x[row : row + 1, real], cache=alone))
        for padded, plain in zip(cache.state, alone.state, strict=True):
            torch.testing.assert_close(padded[row : row + 1], plain)
    out[mask].square().sum().backward()
    assert not noise.grad[~mask].any() and noise.grad[mask].all()


@mixers
def test_decoding_goes_on_after_a_padded_prefill_and_with_padding_between(kind):
    layer, x = seeded(kind), inputs(9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = mask[1, 2:5] = mask[1, 7] = False
    positions, cache = (mask.cumsum(1) - 1).clamp(min=0), layer.make_cache()
    parts = [layer(x[:, a:b], positions[:, a:b], mask[:, :b], cache) for a, b in ((0, 5), (5, 6), (6, 9))]
    out = torch.cat(parts, 1)
    for row, real in enumerate(mask):
        torch.testing.assert_close(out[row : row + 1, real], layer(x[row : row + 1, real]), rtol=0, atol=1e-5)


@mixers
def test_a_row_of_padding_alone_and_no_rows_are_allowed(kind):
    layer, x = seeded(kind), inputs()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0] = False
    out = layer(x, torch.arange(12), mask)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[1:], layer(x[1:]))
    assert layer(x[:0]).shape == (0, 12, H)


@mixers
def test_packed_texts_do_not_see_each_other(kind):
    layer, x = seeded(kind), inputs()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]).expand(2, -1)
    alone = [layer(part) for part in x.split([5, 4, 3], 1)]
    torch.testing.assert_close(layer(x, positions), torch.cat(alone, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(x, positions[:1]), torch.cat(alone, 1), rtol=0, atol=1e-5)


def test_backwards_is_forwards_on_the_turned_row():
    back, forth = LRU(hidden_size=H, state_size=N, reverse=True), LRU(hidden_size=H, state_size=N)
    forth.load_state_dict(back.state_dict())
    x = inputs()
    torch.testing.assert_close(back(x), forth(x.flip(1)).flip(1))
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2])
    packed = torch.cat([back(part) for part in x.split([5, 4, 3], 1)], 1)
    torch.testing.assert_close(back(x, positions), packed)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 5:7] = False
    positions = torch.tensor([0, 1, 2, 3, 4, 4, 4, 0, 1, 2, 3, 4])
    torch.testing.assert_close(back(x, positions, mask)[:, :5], back(x[:, :5]))
    with pytest.raises(ValueError, match="reverse=True must see the whole sequence"):
        back.make_cache()
    with pytest.raises(ValueError, match="reverse=True must see the whole sequence"):
        back(x, cache=forth.make_cache())


def test_block_is_its_parts_and_both_directions_meet_in_the_gate():
    block = LRUBlock(hidden_size=H, state_size=N, bidirectional=True).double()
    x = inputs().double()
    z = block.norm(x)
    both = torch.cat((block.recurrence(z), block.backwards(z)), -1)
    value, gate = block.glu(nn.functional.gelu(both)).chunk(2, -1)
    torch.testing.assert_close(block(x), x + value * gate.sigmoid())
    changed = x.clone()
    changed[:, -1, 0] += 1
    assert not torch.allclose(block(changed)[:, 0], block(x)[:, 0], atol=1e-4)
    with pytest.raises(ValueError, match="whole sequence"):
        block.make_cache()


def test_dropout_acts_in_training_alone():
    block, x = LRUBlock(hidden_size=H, dropout=0.5), inputs()
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@mixers
def test_half_precision_keeps_a_float32_state(kind):
    layer, x = seeded(kind), inputs()
    exact = layer(x)
    half, cache = copy.deepcopy(layer).to(torch.bfloat16), layer.make_cache()
    out = half(x.bfloat16(), cache=cache)
    assert out.dtype == torch.bfloat16
    assert cache.state[0].dtype in (torch.complex64, torch.float32)
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    out.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())


@pytest.mark.parametrize("kind", ["lru", "slru"])
def test_autocast_is_off_inside(kind):
    layer, x = seeded(kind), inputs()
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain)


@mixers
def test_compiled_and_checkpointed_layers_are_the_plain_one(kind):
    layer, x, positions = seeded(kind), inputs(), torch.arange(12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = False

    def gradients(function) -> list[Tensor]:
        layer.zero_grad()
        function(x, positions, mask).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    plain = gradients(layer)
    torch.testing.assert_close(gradients(torch.compile(layer, backend="aot_eager")), plain)
    torch.testing.assert_close(gradients(lambda *a: checkpoint(layer, *a, use_reentrant=False)), plain)


@mixers
def test_cache_layer_follows_the_host_protocol(kind):
    layer, x = seeded(kind), inputs()
    cache = layer.make_cache()
    assert isinstance(cache, CacheLayerMixin)
    assert not cache.is_croppable and not cache.is_sliding and not cache.is_compileable
    assert cache.get_seq_length() == 0 and cache.get_max_length() == -1
    layer(x[:, :6], cache=cache)
    before = [t.clone() for t in cache.state]
    holder = DynamicCache()
    holder.layers = [cache]
    holder.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(new, old.flip(0)) for new, old in zip(cache.state, before, strict=True))
    holder.batch_repeat_interleave(2)
    holder.batch_select_indices(torch.tensor([0, 3]))
    cache.offload()
    cache.prefetch()
    out = layer(x.flip(0)[:, 6:], cache=cache)
    torch.testing.assert_close(out, layer(x.flip(0))[:, 6:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"cannot take tokens back \(crop\(-1\)\)"):
        cache.crop(-1)
    cache.crop(0)
    with pytest.raises(ValueError, match="keeps a state and no keys"):
        cache.update(x, x)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(layer(x, cache=cache), layer(x))


def test_save_and_load(tmp_path):
    from safetensors.torch import load_model, save_model

    first, second = LRUBlock(hidden_size=H, bidirectional=True), LRUBlock(hidden_size=H, bidirectional=True)
    save_model(first, str(tmp_path / "block.safetensors"))
    load_model(second, tmp_path / "block.safetensors")
    assert torch.equal(first(inputs()), second(inputs()))


def test_parameter_groups_keep_logarithms_from_decay():
    model = nn.Sequential(nn.Linear(3, H), LRUBlock(hidden_size=H, state_size=N), SLRU(hidden_size=H), nn.Linear(H, 2))
    model[3].weight.requires_grad_(False)
    groups = recurrent_param_groups(model, 0.01, 0.25, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    slow, plain, decayed = (0.0025, 0.0), (0.01, 0.0), (0.01, 0.1)
    recurrence = {"nu_log": slow, "theta_log": slow, "gamma_log": slow, "B": slow, "C": decayed, "D": plain}
    expected = {
        "0.weight": decayed, "0.bias": plain, "1.norm.weight": plain, "1.norm.bias": plain, "1.glu.weight": decayed,
        "1.glu.bias": plain, "3.bias": plain,
    }  # fmt: skip
    expected |= {f"1.recurrence.{name}": value for name, value in recurrence.items()}
    expected |= {f"2.{name}": value for name, value in recurrence.items() if name != "theta_log"}
    assert found == expected
    nu_log = model[2].nu_log.detach().clone()
    optimiser = torch.optim.AdamW(groups)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimiser.step()
    assert torch.equal(model[2].nu_log, nu_log)


def test_what_cannot_be_is_refused():
    x, mask = inputs(), torch.ones(2, 12, dtype=torch.bool)
    for low, high in ((0.9, 0.9), (0.99, 0.9), (0.9, 1.0), (-0.1, 0.9)):
        with pytest.raises(ValueError, match="0 <= radius_min < radius_max < 1, got"):
            LRU(hidden_size=H, radius_min=low, radius_max=high)
    with pytest.raises(ValueError, match="max_phase must be in"):
        LRU(hidden_size=H, max_phase=0)
    with pytest.raises(ValueError, match="state_size must be at least 1, got 0"):
        SLRU(hidden_size=H, state_size=0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        LRUBlock(hidden_size=H, dropout=1)
    with pytest.raises(ValueError, match=r"layer must be in 0..1, got 2"):
        RWKV4Mix(hidden_size=H, layer=2, layers=2)
    for layer in (seeded("lru"), seeded("rwkv")):
        with pytest.raises(ValueError, match=r"x must be \(batch, length, 6\), got \(2, 12, 3\)"):
            layer(x[..., :3])
        with pytest.raises(ValueError, match=r"mask must be bool \(2, 12\)"):
            layer(x, mask=mask.float())
        with pytest.raises(ValueError, match=r"mask must be bool \(2, 12\).*no mask of pairs"):
            layer(x, mask=mask[:, None, None].expand(2, 1, 12, 12))
        with pytest.raises(ValueError, match=r"positions must be \(12,\) or \(2, 12\), got \(5,\)"):
            layer(x, torch.arange(5))
        cache = layer.make_cache()
        layer(x, cache=cache)
        with pytest.raises(ValueError, match=r"mask must be bool \(2, 24\)"):
            layer(x, mask=mask, cache=cache)
        with pytest.raises(ValueError, match="cache must hold 1 rows as x has, got 2"):
            layer(x[:1], cache=cache)
    layer = seeded("lru")
    with torch.no_grad():
        layer.nu_log[2] = torch.nan
    with pytest.raises(ValueError, match="nu_log must be a number in every channel, got NaN in 1 of 5"):
        layer(x)
    with pytest.raises(ValueError, match="Linear has no LRU or SLRU layer"):
        recurrent_param_groups(nn.Linear(2, 2), 0.1)
    for words in ({"lr": 0}, {"lambda_factor": 0}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(words))} must be"):
            recurrent_param_groups(layer, **{"lr": 0.1} | words)
