"""The fills of QB-Heat against fields of which every cell is known."""

import copy

import numpy as np
import pytest
import torch

from danlu.vision.extrapolation import LinearExtrapolator
from danlu.vision.interpolation import Interpolator1d
from danlu.vision.second_order import QuadraticExtrapolator
from reference import heat

CORNERS = [(0, 0), (0, 3), (3, 0), (3, 3), (2, 1)]
SIZE = 5


def tensor(array):
    return torch.tensor(array, dtype=torch.float64)


def linear(a, b, mode="untied", back=None, **options):
    made = LinearExtrapolator(len(a), mode=mode, **options).double()
    with torch.no_grad():
        made.a.copy_(tensor(a))
        made.b.copy_(tensor(b))
        if mode == "untied":
            made.a_back.copy_(tensor(back[0]))
            made.b_back.copy_(tensor(back[1]))
    return made


def pairs(seed=0, commuting=True):
    rng = np.random.default_rng(100 + seed)
    a, b = heat.commuting_pair(SIZE, seed)
    if not commuting:
        b = 0.2 * rng.standard_normal((SIZE, SIZE))
    return a, b, rng.standard_normal(SIZE)


def inverses(*matrices):
    eye = np.eye(SIZE)
    return [np.linalg.inv(eye + m) - eye for m in matrices]


def cut(full, top, left):
    return tensor(full[None, :, top : top + 3, left : left + 3])


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("mode", ["inverse", "untied"])
def test_a_field_of_the_system_is_recovered_from_any_quarter(corner, mode):
    a, b, z0 = pairs()
    full = heat.field(np.eye(SIZE) + a, np.eye(SIZE) + b, z0, 6, 6)
    found = linear(a, b, mode, inverses(a, b))(cut(full, *corner), *corner, 6, 6)
    assert (found[0] - tensor(full)).abs().max() < 1e-10


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("order", ["xy", "yx", "mean"])
@pytest.mark.parametrize("steps", ["recursive", "oneshot", "exp"])
@pytest.mark.parametrize("mode", ["tied", "inverse", "untied"])
def test_every_fill_is_the_one_written_cell_by_cell(corner, order, steps, mode):
    a, b, _ = pairs(1, commuting=False)
    rng = np.random.default_rng(2)
    back = [0.2 * rng.standard_normal((SIZE, SIZE)) for _ in range(2)]
    block, eye = rng.standard_normal((SIZE, 3, 4)), np.eye(SIZE)

    def at(forward, backward):
        def distance(n):
            generator = forward if n > 0 else {"tied": -forward, "inverse": forward, "untied": backward}[mode]
            if n < 0 and mode == "inverse":
                return np.linalg.inv(distance(-n))
            if steps == "exp":
                return heat.exponential(abs(n) * generator)
            return eye + abs(n) * generator if steps == "oneshot" else heat.power(eye + generator, abs(n))

        return distance

    args = (corner[0], corner[1], 7, 8, at(a, back[0]), at(b, back[1]))
    expected = {"xy": heat.fill(block, *args), "yx": heat.fill(block, *args, rows_first=False)}
    expected["mean"] = (expected["xy"] + expected["yx"]) / 2
    found = linear(a, b, mode, back, steps=steps, order=order)(tensor(block)[None], *corner, 7, 8)
    assert np.abs(found[0].detach().numpy() - expected[order]).max() < 1e-11


def test_the_tied_step_back_misses_by_the_square_of_a():
    a, b, z0 = pairs()
    errors = []
    for scale in (1e-2, 1e-3):
        full = heat.field(np.eye(SIZE) + scale * a, np.eye(SIZE) + scale * b, z0, 6, 6)
        found = linear(scale * a, scale * b, "tied")(cut(full, 3, 3), 3, 3, 6, 6)
        errors.append((found[0] - tensor(full)).abs().max().item())
    assert errors[0] > 1e-6
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)
    ahead = linear(1e-2 * a, 1e-2 * b, "tied")(cut(full, 0, 0), 0, 0, 6, 6)
    assert torch.equal(ahead, linear(1e-2 * a, 1e-2 * b, "inverse")(cut(full, 0, 0), 0, 0, 6, 6))


def test_the_order_does_not_matter_where_a_and_b_commute_and_does_where_they_do_not():
    block = torch.randn(2, SIZE, 3, 3, dtype=torch.float64)
    for commuting in (True, False):
        a, b, _ = pairs(commuting=commuting)
        one, other = (linear(a, b, "inverse", order=order)(block, 0, 0, 6, 6) for order in ("xy", "yx"))
        gap = (one - other).abs().max()
        assert gap < 1e-12 if commuting else gap > 1e-2
        penalty = linear(a, b, "inverse").commutator_penalty()
        assert penalty < 1e-25 if commuting else penalty > 1e-2


def test_the_commutator_penalty_is_the_mean_over_all_pairs():
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.standard_normal((SIZE, SIZE)) for _ in range(4))

    def single(p, q):
        return np.linalg.norm(p @ q - q @ p) ** 2 / (np.linalg.norm(p) * np.linalg.norm(q)) ** 2

    expected = np.mean([single(p, q) for p in (a, c) for q in (b, d)])
    assert linear(a, b, "untied", (c, d)).commutator_penalty().item() == pytest.approx(expected, rel=1e-12)
    assert linear(a, b, "tied").commutator_penalty().item() == pytest.approx(single(a, b), rel=1e-12)
    zero = LinearExtrapolator(4)
    zero.commutator_penalty().backward()
    assert zero.commutator_penalty() == 0 and torch.equal(zero.a.grad, torch.zeros(4, 4))


@pytest.mark.parametrize("mode", ["tied", "inverse", "untied"])
@pytest.mark.parametrize("steps", ["recursive", "oneshot", "exp"])
def test_zero_matrices_repeat_the_edge(mode, steps):
    block = torch.randn(2, 4, 3, 3)
    padded = torch.nn.functional.pad(block, (1, 4, 2, 3), mode="replicate")
    assert torch.equal(LinearExtrapolator(4, mode, steps)(block, 2, 1, 8, 8), padded)


def test_exp_solves_the_anisotropic_laplace_equation():
    a, b, z0 = pairs()
    made = linear(a, b, "inverse", steps="exp")

    def at(x, y):
        return heat.exponential(x * a + y * b) @ z0

    # The derivatives of exp(xA + yB) z0 are known: A^2 z and B^2 z.
    z = at(0.3, -0.7)
    residual = a @ a @ z + made.anisotropy().detach().numpy() @ (b @ b @ z)
    assert np.abs(residual).max() < 1e-12
    h = 1e-3
    z_xx = (at(0.3 + h, -0.7) - 2 * z + at(0.3 - h, -0.7)) / h**2
    assert np.abs(z_xx - a @ a @ z).max() < 1e-5
    full = np.stack([np.stack([at(x, y) for x in range(6)], -1) for y in range(6)], 1)
    for corner in CORNERS:
        assert (made(cut(full, *corner), *corner, 6, 6)[0] - tensor(full)).abs().max() < 1e-10


def test_least_squares_on_one_field_recovers_the_matrices():
    a, b, z0 = pairs()
    full = tensor(heat.field(np.eye(SIZE) + a, np.eye(SIZE) + b, z0, 6, 6))[None]
    for mode in ("untied", "inverse"):
        made = LinearExtrapolator(SIZE, mode).double().fit(full)
        assert (made.a - tensor(a)).abs().max() < 1e-10
        assert (made.b - tensor(b)).abs().max() < 1e-10
    made = LinearExtrapolator(SIZE, "untied").double().fit(full)
    assert (made(full[:, :, 3:, 3:], 3, 3, 6, 6) - full).abs().max() < 1e-10


def test_least_squares_is_exact_to_the_last_digits_for_a_well_conditioned_field():
    # An orthogonal step keeps all directions equally long, so the 6 x 6 cells span the channels evenly.
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0]
    full = tensor(heat.field(turn, turn @ turn, np.ones(4), 6, 6))[None]
    made = LinearExtrapolator(4, "inverse").double().fit(full)
    assert (made.a - tensor(turn - np.eye(4))).abs().max() < 1e-12
    assert (made.b - tensor(turn @ turn - np.eye(4))).abs().max() < 1e-12


def test_the_cap_holds_for_every_step():
    a, b, _ = pairs(4, commuting=False)
    block = torch.randn(1, SIZE, 3, 3, dtype=torch.float64)
    for mode in ("tied", "inverse", "untied"):
        free = linear(3 * a, 3 * b, mode, (3 * b, 3 * a))(block, 3, 3, 9, 9)
        held = linear(3 * a, 3 * b, mode, (3 * b, 3 * a), max_norm=1.05)(block, 3, 3, 9, 9)
        grown = held[:, :, 3:6, 6:].norm(dim=1) / held[:, :, 3:6, 5:6].norm(dim=1)
        assert (grown <= 1.05 ** torch.arange(1, 4) + 1e-12).all()
        assert free.norm() > held.norm()
    small = linear(0.01 * a, 0.01 * b, "tied")
    capped = linear(0.01 * a, 0.01 * b, "tied", max_norm=2.0)
    assert torch.equal(small(block, 0, 0, 6, 6), capped(block, 0, 0, 6, 6))


@pytest.mark.parametrize("mode", ["tied", "inverse", "untied"])
def test_gradients_match_finite_differences(mode):
    a, b, _ = pairs()
    made = linear(a, b, mode, (b, a), order="mean")
    block = torch.randn(1, SIZE, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(block, *matrices):
        names = [name for name, _ in made.named_parameters()]
        return torch.func.functional_call(made, dict(zip(names, matrices, strict=True)), (block, 1, 1, 4, 4))

    assert torch.autograd.gradcheck(call, (block, *made.parameters()))


def test_matrices_stay_in_float32_and_so_do_the_steps():
    made = LinearExtrapolator(8, "inverse")
    torch.nn.init.normal_(made.a, std=0.05)
    wanted = made.a.detach().clone()
    half = copy.deepcopy(made).to(torch.bfloat16)
    assert half.a.dtype == torch.float32 and torch.equal(half.a, wanted)
    block = torch.randn(2, 8, 2, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = half(block, 0, 0, 4, 4)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, made(block.float(), 0, 0, 4, 4).bfloat16())
    assert copy.deepcopy(made).double().a.dtype == torch.float64


def waves(height, width, frequencies=((0.5, 0.2), (-0.3, 0.6), (0.9, -0.4))):
    """Real plane waves of random phases, mixed into as many channels as there are waves and sheared."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:height, :width]
    own = np.stack([np.cos(k * x + m * y + rng.uniform(0, 6)) for k, m in frequencies])
    mix = rng.standard_normal((len(frequencies),) * 2)
    return np.tensordot(mix, own, 1), mix, np.array(frequencies)


@pytest.mark.parametrize("corner", CORNERS)
def test_plane_waves_are_continued_exactly_by_the_quadratic_form(corner):
    full, mix, frequencies = waves(6, 6)
    made = QuadraticExtrapolator(3).double()
    with torch.no_grad():
        for matrix, k in ((made.p, frequencies[:, 0]), (made.q, frequencies[:, 1])):
            matrix.copy_(tensor(mix @ np.diag(2 * np.cos(k) - 2) @ np.linalg.inv(mix)))
    found = made(cut(full, *corner), *corner, 6, 6)
    assert (found[0] - tensor(full)).abs().max() < 1e-10
    narrow = made(tensor(full[None, :, 2:4, 1:3]), 2, 1, 6, 6)
    assert (narrow[0] - tensor(full)).abs().max() < 1e-10
    fitted = QuadraticExtrapolator(3).double().fit(tensor(full)[None])
    assert (fitted.p - made.p).abs().max() < 1e-9 and (fitted.q - made.q).abs().max() < 1e-9


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("corner", CORNERS)
def test_the_exact_quadratic_form_continues_solutions_of_the_laplace_equation(isotropic, corner):
    """z = cosh(x sqrt(P)) cosh(y sqrt(Q)) z0 solves z_xx = Pz, z_yy = Qz where P and Q commute."""
    p, q = heat.commuting_pair(SIZE, 7)
    q = -p if isotropic else q
    z0 = np.random.default_rng(8).standard_normal(SIZE)
    made = QuadraticExtrapolator(SIZE, isotropic, steps="exp").double()
    with torch.no_grad():
        made.p.copy_(tensor(p))
        if not isotropic:
            made.q.copy_(tensor(q))

    def at(x, y):
        along = heat.hyperbolic_cosine_of_root(y**2 * q)
        return heat.hyperbolic_cosine_of_root(x**2 * p) @ along @ z0

    full = np.stack([np.stack([at(x - 1.3, y - 2.1) for x in range(6)], -1) for y in range(6)], 1)
    found = made(cut(full, *corner), *corner, 6, 6)
    assert (found[0] - tensor(full)).abs().max() < 1e-10
    s = made.anisotropy().detach().numpy()
    assert np.abs(p @ z0 + s @ q @ z0).max() < 1e-10
    if isotropic:
        assert np.abs(s - np.eye(SIZE)).max() < 1e-10
    h = 1e-3
    z_xx = (at(0.4 + h, 0.7) - 2 * at(0.4, 0.7) + at(0.4 - h, 0.7)) / h**2
    z_yy = (at(0.4, 0.7 + h) - 2 * at(0.4, 0.7) + at(0.4, 0.7 - h)) / h**2
    assert np.abs(z_xx + s @ z_yy).max() < 1e-5


def test_quadratic_steps_without_a_matrix_are_straight_lines():
    y, x = np.mgrid[:6, :6]
    full = np.stack([1 + 2.0 * x - y, 3.0 * y + 0.5 * x * y])
    for steps in ("recursive", "oneshot", "exp"):
        for corner in CORNERS:
            found = QuadraticExtrapolator(2, steps=steps).double()(cut(full, *corner), *corner, 6, 6)
            assert (found[0] - tensor(full)).abs().max() < 1e-12


def test_the_quadratic_oneshot_is_the_recursion_up_to_the_first_order():
    block = torch.randn(1, SIZE, 3, 3, dtype=torch.float64)
    p, q, _ = pairs(9, commuting=False)
    gaps = []
    for scale in (1e-2, 1e-3):
        fills = []
        for steps in ("recursive", "oneshot"):
            made = QuadraticExtrapolator(SIZE, steps=steps).double()
            with torch.no_grad():
                made.p.copy_(tensor(scale * p))
            fills.append(made(block, 0, 3, 3, 7))
        gaps.append((fills[0] - fills[1]).abs().max().item())
    assert 1e-6 < gaps[0] and gaps[0] / gaps[1] == pytest.approx(100, rel=0.1)


def test_a_quadratic_step_undoes_itself_and_a_first_order_system_is_one():
    a, b, z0 = pairs()
    full = heat.field(np.eye(SIZE) + a, np.eye(SIZE) + b, z0, 6, 6)
    made = QuadraticExtrapolator(SIZE).double().fit(tensor(full)[None])
    found = made(cut(full, 3, 0), 3, 0, 6, 6)
    back = made(found[:, :, :3, 3:], 0, 3, 6, 6)
    assert (found[0] - tensor(full)).abs().max() < 1e-9 and (back - found).abs().max() < 1e-9


@pytest.mark.parametrize("ends", ["copy", "extrapolate"])
def test_hidden_places_lie_on_lines_between_the_visible(ends):
    rng = np.random.default_rng(0)
    made = Interpolator1d(ends)
    positions = np.stack([np.sort(rng.permutation(12)[:5]) for _ in range(20)])
    values = rng.standard_normal((20, 5, 3))
    found = made(tensor(values), torch.tensor(positions), 12).numpy()
    for one, place, value in zip(found, positions, values, strict=True):
        expected = heat.interpolated(value, place, 12)
        inside = slice(place[0], place[-1] + 1)
        assert np.abs(one[inside] - expected[inside]).max() < 1e-12
        if ends == "copy":
            assert np.abs(one - expected).max() < 1e-12
        line = 2.0 * np.arange(12)[:, None] - np.arange(3)
        if ends == "extrapolate":
            exact = made(tensor(line[place][None]), torch.tensor(place), 12)[0].numpy()
            assert np.abs(exact - line).max() < 1e-12


def test_interpolation_keeps_dtype_gradients_and_edges():
    values = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([1, 4, 6])
    assert torch.autograd.gradcheck(lambda v: Interpolator1d()(v, places, 8), (values,))
    assert torch.equal(Interpolator1d()(values, places, 8)[:, places], values)
    assert Interpolator1d()(values.bfloat16(), places, 8).dtype == torch.bfloat16
    single = Interpolator1d()(values[:, :1], torch.tensor([5]), 8)
    assert torch.equal(single, values[:, :1].expand(2, 8, 4))
    assert torch.equal(Interpolator1d()(values, torch.arange(3), 3), values)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="mode must be one of tied, inverse, untied, got 'free'"):
        LinearExtrapolator(4, "free")
    with pytest.raises(ValueError, match="steps must be one of"):
        LinearExtrapolator(4, steps="twice")
    with pytest.raises(ValueError, match="order must be one of"):
        QuadraticExtrapolator(4, order="xx")
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        LinearExtrapolator(0)
    with pytest.raises(TypeError, match="channels must be a whole number"):
        LinearExtrapolator(4.0)
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        LinearExtrapolator(4, max_norm=0.0)
    with pytest.raises(ValueError, match="max_norm needs"):
        LinearExtrapolator(4, steps="oneshot", max_norm=1.05)
    with pytest.raises(ValueError, match=r"block must be \(batch, 4, rows, columns\), got \(1, 5, 2, 2\)"):
        LinearExtrapolator(4)(torch.zeros(1, 5, 2, 2), 0, 0, 4, 4)
    with pytest.raises(ValueError, match="must lie inside the map of 4 x 4"):
        LinearExtrapolator(4)(torch.zeros(1, 4, 2, 2), 3, 0, 4, 4)
    with pytest.raises(ValueError, match="at least 2 cells wide"):
        QuadraticExtrapolator(4)(torch.zeros(1, 4, 2, 1), 0, 0, 4, 4)
    with pytest.raises(ValueError, match="exp needs its logarithm"):
        LinearExtrapolator(4, steps="exp").fit(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="at least 3 rows"):
        QuadraticExtrapolator(4).fit(torch.zeros(1, 4, 2, 4))
    with pytest.raises(ValueError, match="at least 2 rows"):
        LinearExtrapolator(4).fit(torch.zeros(1, 4, 1, 4))
    for positions in ([3, 1], [1, 1], [0, 8], [-1, 2]):
        with pytest.raises(ValueError, match=r"positions must rise strictly in 0\.\.7"):
            Interpolator1d()(torch.zeros(1, 2, 4), torch.tensor(positions), 8)
    with pytest.raises(ValueError, match="2 with ends='extrapolate', got 1"):
        Interpolator1d("extrapolate")(torch.zeros(1, 1, 4), torch.tensor([0]), 8)
    with pytest.raises(ValueError, match="positions"):
        Interpolator1d()(torch.zeros(1, 2, 4), torch.tensor([0]), 8)
    with pytest.raises(ValueError, match="a row for each of 3"):
        Interpolator1d()(torch.zeros(3, 2, 4), torch.tensor([[0, 1], [0, 1]]), 8)


def test_a_step_that_cannot_be_inverted_is_refused():
    made = LinearExtrapolator(3, "inverse")
    with torch.no_grad():
        made.a.copy_(torch.diag(torch.tensor([0.0, 0.0, -1 + 1e-5])))
    with pytest.raises(ValueError, match=r"condition of I \+ A must be at most 10000"):
        made(torch.zeros(1, 3, 2, 2), 0, 0, 4, 4)
    with torch.no_grad():
        made.a.zero_()
        made.b.copy_(-torch.eye(3))
    with pytest.raises(ValueError, match=r"condition of I \+ B"):
        made(torch.zeros(1, 3, 2, 2), 0, 0, 4, 4)
