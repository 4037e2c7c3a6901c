"""AMED: the arithmetic of its steps, the predictor, the solver and its files."""

import json
import math

import pytest
import torch
from tests.reference import amed as reference
from torch import nn

from danlu.diffusion.amed import AMED, Captured, default_ends, pooled, time_of_ratio
from danlu.diffusion.amed_predictor import AMEDPredictor
from danlu.diffusion.amed_steps import BASES, AMEDStepper, AMEDTable, Coefficients, check_order
from danlu.diffusion.custom import CustomProcess
from danlu.diffusion.grids import time_grid
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.multistep import IPNDM, HostScheduler
from danlu.diffusion.processes import EDM, VP, Cosine, RectifiedFlow
from danlu.diffusion.solvers import sample
from danlu.diffusion.steps import DDIM, Heun, Midpoint
from danlu.diffusion.targets import Denoiser

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.5, 0.2]), torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.3, -1.2]]), torch.tensor([0.05, 0.1, 0.2])
)
ORDERS = [(base, order) for base in BASES for order in {"ipndm": (1, 2, 3, 4), "dpm++": (1, 2, 3)}.get(base, (None,))]


def noise(count: int = 7, width: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def waves(z: torch.Tensor, s) -> torch.Tensor:
    """A network that is no exact model: every place of its time in the formulas shows."""
    s = torch.as_tensor(s, dtype=torch.float64)
    s = s[:, None] if s.dim() else s
    return z * s / (s**2 + 0.3) + 0.3 * torch.sin(3 * z) / (1 + s)


def table(steps: int, r: float = 0.5) -> AMEDTable:
    return AMEDTable((r,) * steps)


def walked(stepper: AMEDStepper, z: torch.Tensor, epsilon=waves) -> torch.Tensor:
    z = stepper.begin(z)
    while not stepper.done:
        z = stepper.advance(z, epsilon(z, stepper.time))
    return z


def solver(steps: int = 3, coefficients=None, process=None, **options) -> AMED:
    process = process or EDM()
    first, last = default_ends(process)
    times = time_grid(process, steps, "logsnr", start=first, end=last)
    return AMED(process, times, coefficients or table(steps), **options)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize(("base", "order"), ORDERS)
def test_every_base_equals_its_plain_formulas_with_coefficients_of_each_sample(base, order, afs):
    ratios = [20.0, 6.0, 1.5, 0.4, 0.01]
    g = torch.Generator().manual_seed(3)
    r = 0.1 + 0.8 * torch.rand(7, 4, generator=g, dtype=torch.float64)
    c, a = (0.8 + 0.4 * torch.rand(7, 4, generator=g, dtype=torch.float64) for _ in range(2))
    a[:, -1] = 1.1  # a ratio below the last one is another test's subject
    stepper = AMEDStepper(ratios, lambda i, z, e: Coefficients(r[:, i], c[:, i], a[:, i]), base, order, afs)
    z = 20 * noise()
    expected = reference.walk(waves, z, ratios, r, c, a, base, order or 1, afs)
    assert torch.allclose(walked(stepper, z), expected, rtol=1e-11, atol=1e-11)
    assert stepper.calls == stepper.evaluations == 8 - afs


@pytest.mark.parametrize("process", [EDM(), VP()])
def test_half_with_ones_is_dpm_solver_2(process):
    amed = solver(4, process=process, afs=False)
    denoiser = MIXTURE.denoiser(process)
    one = sample(denoiser, solver=amed, times=amed.times, noise=noise()).samples
    other = sample(denoiser, solver=Midpoint(), times=amed.times, noise=noise()).samples
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", [0.2, 0.5, 1.0])
def test_the_base_dpm2_is_dpm_solver_2_with_its_place_between(r):
    amed = solver(4, table(4, r), base="dpm2", afs=False)
    one = sample(MIXTURE.denoiser(EDM()), solver=amed, times=amed.times, noise=noise()).samples
    other = sample(MIXTURE.denoiser(EDM()), solver=Midpoint(r), times=amed.times, noise=noise()).samples
    assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_a_middle_at_the_start_is_euler():
    amed = solver(4, table(4, 1e-9), afs=False)
    one = sample(MIXTURE.denoiser(EDM()), solver=amed, times=amed.times, noise=noise()).samples
    other = sample(MIXTURE.denoiser(EDM()), solver=DDIM(), times=amed.times, noise=noise()).samples
    assert torch.allclose(one, other, atol=1e-7)


def test_order_is_two_at_the_half_and_one_elsewhere():
    exact = sample(MIXTURE.denoiser(EDM()), solver=Heun(), steps=800, spacing="logsnr", noise=noise(), progress=None)

    def errors(r):
        found = []
        for steps in (32, 64):
            amed = solver(steps, table(steps, r), afs=False)
            end = sample(MIXTURE.denoiser(EDM()), solver=amed, times=amed.times, noise=noise(), progress=None).samples
            found.append(float((end - exact.samples).norm(dim=1).mean()))
        return math.log2(found[0] / found[1])

    assert errors(0.5) == pytest.approx(2, abs=0.2)
    assert errors(0.3) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("order", [2, 3])
def test_plug_in_with_ones_is_the_solver_on_the_times_with_middles(order):
    pytest.importorskip("diffusers")
    amed = solver(4, table(4, 0.4), base="dpm++", order=order, afs=False)
    ratios = amed.ratios
    middles = ratios[1:] ** 0.4 * ratios[:-1] ** 0.6
    times = torch.cat([torch.stack([ratios[:-1], middles], 1).flatten(), ratios[-1:]])
    host = HostScheduler("DPMSolverMultistepScheduler", {"solver_order": order})
    one = sample(MIXTURE.denoiser(EDM()), solver=amed, times=amed.times, noise=noise()).samples
    other = sample(MIXTURE.denoiser(EDM()), solver=host, times=times, noise=noise()).samples
    assert torch.allclose(one, other, atol=2e-4)  # diffusers computes these steps in float32
    amed = solver(4, table(4, 0.4), base="ipndm", order=order, afs=False)
    one = sample(MIXTURE.denoiser(EDM()), solver=amed, times=amed.times, noise=noise()).samples
    other = sample(MIXTURE.denoiser(EDM()), solver=IPNDM(order), times=times, noise=noise()).samples
    assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_counted_calls_are_two_for_each_interval_less_the_analytical_one(steps, afs, base):
    calls = 0

    def model(x, t):
        nonlocal calls
        calls += 1
        return MIXTURE.denoise(x, t, EDM())

    amed = solver(steps, base=base, afs=afs)
    output = sample(model, EDM(), "sample", solver=amed, times=amed.times, noise=noise(2), trajectory=True)
    assert calls == output.evaluations == amed.evaluations == amed.stepper().evaluations == 2 * steps - afs
    assert len(output.trajectory) == steps + 1


def test_analytical_first_direction_is_right_to_8e_5_for_unit_variance():
    unit = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
    z = 80 * noise()
    stepper = AMEDStepper([80.0, 1.0], table(1), afs=True)
    direction = (stepper.begin(z) - z) / (stepper.place - 80)
    true = unit.epsilon(z, 80.0, EDM())
    assert float((direction - true).norm() / true.norm()) == pytest.approx(7.8e-5, rel=5e-3)
    assert stepper.calls == 0


def test_grids_have_the_published_numbers():
    values = time_grid(EDM(), 3, "polynomial"), time_grid(EDM(), 3, "time_uniform")
    assert values[0].tolist() == pytest.approx([80, 9.72320136, 0.469979058, 0.002], rel=1e-8)
    assert values[1].tolist() == pytest.approx([80, 6.95023541, 1.28666891, 0.002], rel=1e-8)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("process", [VP(), RectifiedFlow(), Cosine()])
def test_samples_do_not_depend_on_the_process_beyond_its_noise_ratios(process, base):
    ratios = torch.tensor([30.0, 5.0, 0.6, 0.02], dtype=torch.float64)
    coefficients = AMEDTable((0.3, 0.5, 0.7), (0.9, 1.1, 1.0), (1.1, 0.9, 1.05))

    def ends(kind):
        times = kind.time_of(-ratios.log())
        x = sample(
            MIXTURE.denoiser(kind),
            solver=AMED(kind, times, coefficients, base),
            times=times,
            start=kind.alpha(times[0]) * z,
        ).samples
        return x / kind.alpha(times[-1])

    z = 30 * noise()
    assert torch.allclose(ends(process), ends(EDM()), rtol=1e-9, atol=1e-9)


def test_time_and_place_of_the_walk_and_of_the_table_agree():
    ratios = torch.tensor([10.0, 2.0, 0.1], dtype=torch.float64)
    coefficients = AMEDTable((0.25, 0.5), (1, 1), (1.2, 1.0))
    for afs in (False, True):
        stepper = AMEDStepper(ratios, coefficients, afs=afs)
        told, z = [], stepper.begin(noise())
        while not stepper.done:
            told.append(float(stepper.time))
            z = stepper.advance(z, waves(z, stepper.time))
        assert told == pytest.approx(coefficients.told(ratios, afs).tolist())
        assert float(stepper.ratios[-1]) == 0.1
    assert coefficients.told(ratios).tolist() == pytest.approx([10, 1.2 * 2**0.25 * 10**0.75, 2, (2 * 0.1) ** 0.5])


def test_the_network_is_never_told_a_ratio_outside_the_walk():
    low = AMEDTable((0.99,), (1,), (0.5,))
    stepper = AMEDStepper([1.0, 0.1], low)
    z = stepper.advance(noise(), noise(seed=1))
    assert float(stepper.time) == 0.1
    data = z - 0.1 * waves(z, 0.1)
    m = stepper.place
    expected = noise() + (0.1 - 1.0) * (z - data) / m
    assert torch.allclose(stepper.advance(z, waves(z, 0.1)), expected)


def test_float32_and_bfloat16_models_and_one_sample():
    amed = solver(3)
    exact = sample(MIXTURE.denoiser(EDM()), solver=amed, times=amed.times, noise=noise()).samples
    single = sample(MIXTURE.denoiser(EDM()), solver=amed, times=amed.times, noise=noise().float()).samples
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), exact, atol=2e-4)
    net = nn.Linear(2, 2).to(torch.bfloat16)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            assert x.dtype == torch.bfloat16 and t.dtype == torch.float32
            return self.net(x)

    half = sample(Half(), EDM(), "sample", solver=amed, times=amed.times, noise=noise(1).float()).samples
    assert half.dtype == torch.float32 and bool(torch.isfinite(half).all())


@pytest.mark.parametrize(("scale_c", "scale_a", "count"), [(0, 0, 8929), (0.01, 0, 8950), (0.01, 0.2, 8971)])
def test_predictor_has_the_published_number_of_weights(scale_c, scale_a, count):
    assert sum(weight.numel() for weight in AMEDPredictor(None, scale_c, scale_a).parameters()) == count


def test_predictor_by_hand_and_inside_its_ranges():
    predictor = AMEDPredictor(None, 0.1, 0.2, seed=4)
    h, t, u = 9 * noise(5, 64, dtype=torch.float32), torch.tensor(7.0), torch.tensor(0.5)
    with torch.no_grad():
        found = predictor(0, h, t, u)
    w = {name: value.double() for name, value in predictor.state_dict().items()}

    def silu(x):
        return x / (1 + torch.exp(-x))

    def embed(value):
        waves = [math.sin(value * 10000 ** (-k / 3)) for k in range(4)] + [
            math.cos(value * 10000 ** (-k / 3)) for k in range(4)
        ]
        return silu(w["embedding.weight"] @ torch.tensor(waves, dtype=torch.float64) + w["embedding.bias"])

    for row in range(5):
        inner = silu(w["inner.weight"] @ h[row].double() + w["inner.bias"])
        joint = torch.cat([w["outer.weight"] @ inner + w["outer.bias"], embed(7.0), embed(0.5)])
        heads = {name: torch.sigmoid(w[f"heads.{name}.weight"] @ joint + w[f"heads.{name}.bias"]) for name in "rca"}
        assert float(found.r[row]) == pytest.approx(float(heads["r"]), rel=1e-5)
        assert float(found.c[row]) == pytest.approx(float(0.9 + 0.2 * heads["c"]), rel=1e-5)
        assert float(found.a[row]) == pytest.approx(float(0.8 + 0.4 * heads["a"]), rel=1e-5)
    assert len({float(value) for value in found.r}) == 5


@pytest.mark.parametrize("base", BASES)
def test_static_equals_dynamic_with_constant_heads(base):
    places = (0.2, 0.6, 0.45)
    predictor = AMEDPredictor(places, 0.2, 0.1).double()
    with torch.no_grad():
        predictor.offsets[0] = torch.tensor(places, dtype=torch.float64).logit()
        predictor.offsets[1:] = torch.tensor([[0.5, -1.0, 0.0], [1.0, 0.3, -2.0]])
    dynamic = solver(3, predictor, base=base)
    static = solver(3, predictor.table(), base=base)
    assert predictor.table().r == pytest.approx(places)
    assert predictor.table().c[0] == pytest.approx(0.8 + 0.4 / (1 + math.exp(-0.5)))
    ends = [sample(MIXTURE.denoiser(EDM()), solver=s, times=s.times, noise=noise()).samples for s in (dynamic, static)]
    assert torch.allclose(*ends, rtol=1e-10, atol=1e-10)


def test_coefficients_follow_each_sample_and_not_its_neighbours():
    amed = solver(3, AMEDPredictor(None, 0.1, 0.1, seed=1), shape=(2,))
    denoiser = MIXTURE.denoiser(EDM())
    together = sample(denoiser, solver=amed, times=amed.times, noise=noise()).samples
    alone = [sample(denoiser, solver=amed, times=amed.times, noise=noise()[i : i + 1]).samples for i in range(7)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-6, atol=1e-7)


def test_features_are_zero_where_the_analytical_step_saved_the_call():
    seen = []

    class Watching(AMEDPredictor):
        def forward(self, interval, features, t, u):
            seen.append((interval, features.clone()))
            return super().forward(interval, features, t, u)

    amed = solver(2, Watching((0.5, 0.5)))
    trajectory = sample(
        MIXTURE.denoiser(EDM()), solver=amed, times=amed.times, noise=noise(), trajectory=True
    ).trajectory
    assert [interval for interval, _ in seen] == [0, 1]
    assert seen[0][1].shape == (7, 64) and not seen[0][1].any()
    data = MIXTURE.denoise(trajectory[1], amed.times[1], EDM())
    assert torch.allclose(seen[1][1][:, :2].double(), data, atol=1e-6)
    assert not seen[1][1][:, 2:].any()


def test_pooled_brings_every_kind_to_64_numbers():
    g = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 16, 16, generator=g, requires_grad=True)
    expected = images.mean(1).reshape(2, 8, 2, 8, 2).mean((2, 4)).flatten(1)
    assert torch.allclose(pooled(images), expected, atol=1e-6)
    assert not pooled(images).requires_grad
    video = torch.randn(2, 3, 5, 8, 8, generator=g)
    assert torch.allclose(pooled(video), video.mean((1, 2)).flatten(1), atol=1e-6)
    tokens = torch.randn(2, 128, 6, generator=g)
    assert torch.allclose(pooled(tokens), tokens.mean(2).reshape(2, 64, 2).mean(2), atol=1e-6)
    vectors = torch.randn(2, 64, generator=g).to(torch.bfloat16)
    assert torch.equal(pooled(vectors), vectors.float())
    assert torch.equal(pooled(torch.ones(2, 3))[0], torch.tensor([1.0] * 3 + [0.0] * 61))
    assert pooled(torch.ones(2, 4, 4, 4)).shape == (2, 64)
    with pytest.raises(ValueError, match=r"features must be \(batch, ...\) with at least one number each, got \(3,\)"):
        pooled(torch.ones(3))


def test_captured_features_come_from_inside_the_model():
    net = nn.Conv2d(1, 5, 3, padding=1)

    def model(x, t):
        return net(x).mean(1, keepdim=True)

    captured = Captured(net)
    with pytest.raises(ValueError, match="no call went through it"):
        captured(torch.zeros(1, 1, 8, 8))
    amed = solver(2, AMEDPredictor(None, 0.1, seed=2), features=captured)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    output = sample(model, EDM(), "epsilon", solver=amed, times=amed.times, noise=x)
    assert output.evaluations == 3
    seen = captured(x)
    assert seen.shape == (3, 5, 8, 8) and not seen.requires_grad
    with pytest.raises(ValueError, match="for the 2 samples of each model call, but a batch of 3"):
        captured(x[:2])
    captured.remove()
    model(x[:1], None)
    assert len(captured(x)) == 3


def test_time_of_a_ratio_has_the_right_derivative_for_every_process():
    slow = CustomProcess(lambda t: torch.exp(-2 * t**2), lambda t: 0.01 + t, t_min=0.0, t_max=1.0)
    for process in (EDM(), VP(), RectifiedFlow(), Cosine(), slow):
        ratio = torch.tensor([0.3, 1.7], dtype=torch.float64, requires_grad=True)
        time = time_of_ratio(process, ratio)
        assert torch.allclose(process.noise_ratio(time), ratio, rtol=1e-9)
        (slope,) = torch.autograd.grad(time.sum(), ratio)
        step = 1e-6
        numeric = (process.time_of(-(ratio + step).log()) - process.time_of(-(ratio - step).log())) / (2 * step)
        assert torch.allclose(slope, numeric, rtol=1e-5)


def test_default_ends_leave_noise_and_data_on_both_sides():
    assert default_ends(EDM()) == (80.0, 0.002)
    first, last = default_ends(RectifiedFlow())
    assert first == pytest.approx(80 / 81) and last == pytest.approx(0.002 / 1.002)
    assert default_ends(VP()) == (1.0, 1e-3)


@pytest.mark.parametrize("process", [EDM(), VP(0.2, 15.0)])
def test_saved_and_loaded_solver_gives_the_same_samples(tmp_path, process):
    predictor = AMEDPredictor((0.3, 0.5), 0.1, 0.2, seed=5)
    nn.init.normal_(predictor.heads["r"].weight, generator=torch.Generator().manual_seed(1))
    average = AMEDTable((0.3, 0.5), (0.9, 1.1))
    for base, coefficients, kept in (("ipndm", predictor, average), ("amed", average, None)):
        made = solver(
            2,
            coefficients,
            process,
            base=base,
            order=3 if base == "ipndm" else None,
            shape=(2,),
            average=kept,
            errors={"student": 0.25},
        )
        folder = made.save(tmp_path / base)
        for loaded in (AMED.load(folder), AMED.load(folder, process)):
            assert loaded.process == process and loaded.errors == {"student": 0.25} and loaded.order == made.order
            ends = [
                sample(MIXTURE.denoiser(process), solver=s, times=s.times, noise=noise()).samples
                for s in (made, loaded)
            ]
            assert torch.equal(*ends)
        assert AMED.load(folder).static().coefficients == average
        made.save(tmp_path / base)  # over itself
    assert {path.name for path in (tmp_path / "amed").iterdir()} == {"amed_config.json"}
    assert {path.name for path in (tmp_path / "ipndm").iterdir()} == {"amed_config.json", "amed.safetensors"}


def test_files_of_another_process_or_damaged_are_refused(tmp_path):
    folder = solver(2).save(tmp_path / "solver")
    with pytest.raises(ValueError, match=r"process must be the one that the solver was trained for, EDM .*, got VP"):
        AMED.load(folder, VP())
    with pytest.raises(ValueError, match="process must be the one"):
        AMED.load(folder, EDM(t_max=70.0))
    with pytest.raises(FileNotFoundError, match=r"amed_config\.json is missing"):
        AMED.load(tmp_path)
    document = json.loads((folder / "amed_config.json").read_text())
    for change, message in (({"format": 7}, "format must be 1, got 7"), ({"times": None}, "damaged")):
        (folder / "amed_config.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(ValueError, match=message):
            AMED.load(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        solver(2).save(folder)
    mine = solver(2, AMEDPredictor((0.5, 0.5)), features=lambda data: data).save(tmp_path / "mine")
    with pytest.raises(ValueError, match="features must be given"):
        AMED.load(mine)
    assert AMED.load(mine, features="sample").features == "sample"
    (mine / "amed.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        AMED.load(mine, features="sample")


def test_a_process_of_functions_must_be_given_to_load(tmp_path):
    process = CustomProcess(lambda t: torch.exp(-2 * t**2), lambda t: 0.01 + t, t_min=0.0, t_max=1.0)
    folder = solver(2, process=process).save(tmp_path / "custom")
    with pytest.raises(ValueError, match="process must be given"):
        AMED.load(folder)
    assert AMED.load(folder, process).process is process


def test_other_times_processes_and_shapes_are_refused():
    amed = solver(2, AMEDPredictor((0.5, 0.5)), shape=(2,))
    denoiser = MIXTURE.denoiser(EDM())
    with pytest.raises(
        ValueError, match=r"times must be those that the solver was trained for, \(80, .*times=amed.times"
    ):
        sample(denoiser, solver=amed, steps=2, spacing="polynomial", noise=noise())
    with pytest.raises(ValueError, match="analytic_first must be off"):
        sample(denoiser, solver=amed, times=amed.times, noise=noise(), analytic_first=True)
    with pytest.raises(ValueError, match=r"shape that the predictor was trained for, \(2,\), got \(3,\)"):
        sample(lambda x, t: x, EDM(), solver=amed, times=amed.times, noise=noise(4, 3))
    half = CustomProcess(lambda t: torch.ones_like(t), lambda t: t / 2, t_min=0.001, t_max=100.0)
    with pytest.raises(ValueError, match="process must be the one that the solver was trained for"):
        sample(lambda x, t: x, half, solver=amed, times=amed.times, noise=noise())
    with pytest.raises(ValueError, match="average must be given"):
        amed.static()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AMEDTable(()), "one number for each interval"),
        (lambda: AMEDTable((0.5, 0.0)), r"r must be above 0 and at most 1, got 0\.0"),
        (lambda: AMEDTable((0.5,), (1.0, 1.0)), "c must hold one number for each interval, 1, got 2"),
        (lambda: AMEDTable((0.5,), (1.0,), (-1.0,)), "a must be above 0, got -1"),
        (lambda: AMEDStepper([1.0, 0.0], table(1)), "must be finite and above 0, got .*no geometric middle"),
        (lambda: AMEDStepper([1.0, 2.0], table(1)), r"must descend strictly, got \[1\.0, 2\.0\]"),
        (lambda: AMEDStepper([1.0], table(1)), "at least two noise ratios"),
        (lambda: AMEDStepper([2.0, 1.0, 0.5], table(3)), "the table is for 3 intervals, but 3 times make 2"),
        (lambda: AMEDStepper([2.0, 1.0], table(1), "unipc"), "base must be one of amed, euler"),
        (lambda: check_order("amed", 2), "order is a choice of ipndm and dpm"),
        (lambda: check_order("ipndm", 5), r"order must be an integer in 1\.\.4 for base 'ipndm', got 5"),
        (lambda: AMEDPredictor((0.5, 1.0)), "r must hold a place between 0 and 1"),
        (lambda: AMEDPredictor(None, 1.0), "scale_c must be at least 0 and below 1"),
        (lambda: AMEDPredictor(None).table(), "no offsets"),
        (lambda: solver(3, AMEDPredictor((0.5, 0.5))), "the predictor is for 2 intervals, but 4 times make 3"),
        (lambda: solver(3, features="mid_block"), "features must be 'sample' or a callable, got 'mid_block'"),
        (lambda: AMED(RectifiedFlow(), torch.tensor([1.0, 0.5]), table(1)), "finite and above 0"),
    ],
)
def test_wrong_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_walk_is_refused_out_of_turn():
    stepper = AMEDStepper([2.0, 1.0], table(1), afs=True)
    with pytest.raises(ValueError, match=r"begin\(z\) must come before"):
        stepper.advance(noise(), noise())
    z = stepper.begin(noise())
    with pytest.raises(ValueError, match="begin must be called once"):
        stepper.begin(z)
    with pytest.raises(ValueError, match="epsilon must have the shape of z"):
        stepper.advance(z, noise(3))
    stepper.advance(z, z)
    with pytest.raises(ValueError, match="the walk is over after 1 evaluations"):
        stepper.advance(z, z)


def test_features_of_another_batch_are_refused():
    amed = solver(2, AMEDPredictor((0.5, 0.5)), features=lambda data: data[:3])
    with pytest.raises(ValueError, match="features must have one row for each of 7 samples, got 3"):
        sample(Denoiser(lambda x, t: x, EDM()), solver=amed, times=amed.times, noise=noise())
