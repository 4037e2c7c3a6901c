"""Training of AMED: gradients, the order of its stages, what it measures and what it refuses."""

import logging

import pytest
import torch
from torch import nn

from danlu.diffusion import amed_training
from danlu.diffusion.amed import AMED, Captured
from danlu.diffusion.amed_predictor import AMEDPredictor
from danlu.diffusion.amed_steps import AMEDStepper, AMEDTable
from danlu.diffusion.amed_student import Student
from danlu.diffusion.amed_training import AMEDRecipe, train_amed
from danlu.diffusion.custom import CustomProcess
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.processes import EDM, VP
from danlu.diffusion.solvers import sample
from danlu.diffusion.targets import Denoiser

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.5, 0.2]),
    torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.3, -1.2]]),
    torch.tensor([0.02, 0.05, 0.1]),
    dtype=torch.float32,
)
SMALL = dict(trajectories=128, batch=64, extra=4, endpoint_iterations=2)
RATIOS = torch.tensor([20.0, 2.0, 0.3, 0.01], dtype=torch.float64)


def noise(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(**changes) -> AMED:
    options = {name: changes.pop(name) for name in ("seed", "held_out", "features") if name in changes}
    recipe = AMEDRecipe(**{**SMALL, **changes})
    return train_amed(MIXTURE.denoiser(EDM()), (2,), 2, recipe=recipe, progress=None, **options)


def student(process, base="ipndm", afs=True, predictor=None) -> Student:
    exact = GaussianMixture(MIXTURE.log_weights.exp(), MIXTURE.means, MIXTURE.variances)
    predictor = predictor or AMEDPredictor((0.2, 0.6, 0.5), 0.2, 0.2, seed=3)
    return Student(exact.denoiser(process), RATIOS, predictor.double(), base, None, afs, "sample")


def test_a_short_training_beats_its_start_and_the_best_ipndm_on_samples_it_has_not_seen():
    amed = train_amed(
        MIXTURE.denoiser(EDM()),
        (2,),
        2,
        recipe=AMEDRecipe(trajectories=256, batch=64, endpoint_iterations=100, extra=9),
        held_out=128,
        progress=None,
    )
    assert amed.errors["student"] < 0.5 * amed.errors["untrained"]
    assert amed.errors["student"] < 0.5 * amed.errors["ipndm"]
    assert amed.errors["teacher"] < 0.34 * amed.errors["untrained"]
    fresh = torch.randn(200, 2, generator=torch.Generator().manual_seed(77))
    output = sample(MIXTURE.denoiser(EDM()), solver=amed, times=amed.times, noise=fresh)
    exact = sample(MIXTURE.denoiser(EDM()), solver="heun", steps=200, noise=fresh, progress=None).samples
    assert output.evaluations == 3
    assert float((output.samples - exact).norm(dim=1).mean()) == pytest.approx(amed.errors["student"], rel=0.5)


@pytest.mark.parametrize("base", ["amed", "euler", "ipndm", "dpm2", "dpm++"])
def test_gradients_of_places_factors_and_times_are_those_of_finite_differences(base):
    slow = CustomProcess(lambda t: torch.exp(-2 * t), lambda t: t, t_min=1e-4, t_max=2.0)
    for process in (EDM(), slow):
        one = student(process, base)
        z = 20 * noise()
        loss = one(z).square().sum()
        weights = [one.predictor.offsets, one.shares]
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            for place in range(weight.numel()):
                ends = []
                for step in (1e-5, -1e-5):
                    with torch.no_grad():
                        weight.view(-1)[place] += step
                        ends.append(float(one(z).square().sum()))
                        weight.view(-1)[place] -= step
                numeric = (ends[0] - ends[1]) / 2e-5
                assert float(gradient.view(-1)[place]) == pytest.approx(
                    numeric, rel=2e-3, abs=2e-3 * float(gradient.norm())
                )


def test_every_weight_of_a_published_predictor_gets_a_gradient_by_intervals():
    one = student(EDM(), "amed", predictor=AMEDPredictor(None, 0.1, 0.2))
    states = torch.stack([20 * noise(), 2 * noise(seed=1), noise(seed=2), noise(seed=3)])
    distances = list(one.by_interval(states))
    assert len(distances) == 3 and distances[0].shape == (6,)
    for name, weight in one.predictor.named_parameters():
        (gradient,) = torch.autograd.grad(distances[1].sum(), weight, retain_graph=True)
        assert bool(gradient.any()), name


@pytest.mark.parametrize("base", ["amed", "euler", "dpm2", "ipndm", "dpm++"])
def test_intervals_start_from_the_teacher_or_with_a_memory_from_the_students_own_state(base):
    one = student(EDM(), base)
    states = torch.stack([20 * noise(), 2 * noise(seed=1), noise(seed=2), noise(seed=3)])
    found = torch.stack([distance.detach() for distance in one.by_interval(states)])
    table = one.predictor.table()
    stepper = AMEDStepper(RATIOS, table, base, afs=True)
    z, expected = states[0], []
    for i in range(3):
        z = one.cross(stepper, z if base in ("ipndm", "dpm++") else states[i])
        expected.append((z - states[i + 1]).square().sum(1))
    assert torch.allclose(found, torch.stack(expected).detach(), rtol=1e-9)


def test_the_search_finds_the_best_place_of_one_interval():
    denoiser = MIXTURE.denoiser(EDM())
    one = Student(denoiser, RATIOS[:2], AMEDPredictor((0.5,)), "amed", None, False, "sample")
    wanted = AMEDStepper(RATIOS[:2], AMEDTable((0.2,)), "amed")
    z = 20 * noise()
    with torch.no_grad():
        states = torch.stack([z, one.cross(wanted, z)])
    assert one.search(states) == [0.2]


def test_a_static_recipe_gives_a_table_that_is_all_that_was_trained():
    amed = trained(static=True, endpoint_iterations=10)
    assert isinstance(amed.coefficients, AMEDTable)
    assert amed.static() is amed and amed.shape is None
    assert amed.errors["static"] == amed.errors["student"]
    assert amed.coefficients.c != (1.0, 1.0) and amed.coefficients.a != (1.0, 1.0)


def test_averages_are_means_over_samples():
    amed = trained(learn_times=False, trajectories=64)
    predictor = amed.coefficients
    assert isinstance(predictor, AMEDPredictor)
    seen = []
    predictor.register_forward_hook(lambda module, inputs, output: seen.append(output.r))
    generator = torch.Generator().manual_seed(9)
    sample(MIXTURE.denoiser(EDM()), solver=amed, times=amed.times, noise=torch.randn(4000, 2, generator=generator))
    assert [float(r.mean()) for r in seen] == pytest.approx(list(amed.average.r), abs=1e-2)


def test_times_move_between_their_ends_only_if_they_may():
    start = trained(endpoint_iterations=0).times
    assert torch.equal(trained(endpoint_iterations=5, learn_times=False).times, start)
    moved = trained(endpoint_iterations=5).times
    assert torch.equal(moved[[0, -1]], start[[0, -1]])
    assert not torch.allclose(moved[1], start[1], rtol=1e-3)


def test_one_seed_gives_one_solver_and_another_seed_another():
    one, two, other = trained(), trained(), trained(seed=1)
    assert torch.equal(one.times, two.times) and one.errors == two.errors
    for a, b in zip(one.coefficients.parameters(), two.coefficients.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.errors != other.errors


def test_the_published_recipe_trains_by_intervals_from_random_weights_and_leaves_the_times():
    recipe = AMEDRecipe.published(trajectories=256, batch=64, iterations=30, extra=9)
    assert (recipe.base, recipe.teacher, recipe.init, recipe.scale_c, recipe.scale_a) == (
        "amed",
        "heun",
        "paper",
        0.01,
        0,
    )
    plugged = AMEDRecipe.published("ipndm")
    assert (plugged.teacher, plugged.extra, plugged.scale_a, plugged.spacing) == ("ipndm", 2, 0.2, "polynomial")
    assert plugged.trajectories == plugged.iterations * plugged.batch == 10112
    amed = train_amed(MIXTURE.denoiser(EDM()), (2,), 2, recipe=recipe, progress=None)
    assert amed.coefficients.intervals is None
    assert amed.times.tolist() == pytest.approx([80.0, 3.5, 0.002], rel=0.3)
    assert amed.errors["student"] < amed.errors["untrained"]


class Net(nn.Module):
    """A tiny convolutional denoiser of 8 x 8 pictures."""

    def __init__(self, mode: str = "plain"):
        super().__init__()
        torch.manual_seed(0)
        self.bottleneck = nn.Conv2d(1, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 1, 3, padding=1)
        self.mode = mode

    def forward(self, x, t):
        if self.mode == "rounded":
            t = t.round()
        level = t.reshape(-1, 1, 1, 1)
        hidden = self.out(torch.tanh(self.bottleneck(x))) + 0.1 * torch.sin(level) * x
        return hidden.detach() if self.mode == "detached" else hidden


def test_pictures_with_features_from_inside_on_a_vp_process_and_the_model_stays_as_it_was():
    net = Net().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    captured = Captured(net.bottleneck)
    recipe = AMEDRecipe(**{**SMALL, "trajectories": 64, "iterations": 1})
    amed = train_amed(net, (1, 8, 8), 2, VP(), recipe=recipe, features=captured, held_out=32, progress=None)
    assert amed.features is captured and amed.shape == (1, 8, 8)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in net.parameters())
    assert not any(weight.requires_grad for weight in amed.coefficients.parameters())
    output = sample(net, VP(), solver=amed, times=amed.times, shape=(3, 1, 8, 8), seed=0)
    assert output.samples.shape == (3, 1, 8, 8) and output.evaluations == 3


@pytest.mark.parametrize("how", ["detached", "no_grad", "inference"])
def test_a_model_without_gradients_is_refused(how):
    net = Net("detached" if how == "detached" else "plain").requires_grad_(False)
    wrapped = {"detached": lambda f: f, "no_grad": torch.no_grad(), "inference": torch.inference_mode()}[how](
        net.forward
    )
    with pytest.raises(RuntimeError, match="no gradient flows through the model to its samples"):
        train_amed(wrapped, (1, 8, 8), 2, VP(), recipe=AMEDRecipe(**SMALL), progress=None)


def test_a_model_that_rounds_its_times_is_named(caplog):
    with caplog.at_level(logging.WARNING, logger="danlu.diffusion"):
        amed_training._check_gradients(
            Denoiser(Net("rounded"), VP()), torch.tensor([1.0, 0.5, 0.01]), torch.ones(2, 1, 8, 8)
        )
    assert "no gradient flows through the model to its times" in caplog.text


def test_a_coarse_teacher_is_named(caplog):
    with caplog.at_level(logging.WARNING, logger="danlu.diffusion"):
        trained(extra=0, base="amed", spacing="time_uniform")
    assert "has little to teach; raise extra above 0" in caplog.text


def test_a_gradient_that_is_no_number_counts_as_zero():
    weight = nn.Parameter(torch.tensor([0.0, 4.0]))
    amed_training._set_gradients(weight.sqrt().sum() * torch.tensor(1.0), [weight])
    assert weight.grad.tolist() == [0.0, 0.25]


def test_wrong_input_is_named():
    cases = [
        (lambda: AMEDRecipe(extra=-1), "extra must be an integer of at least 0, got -1"),
        (lambda: AMEDRecipe(batch=0), "batch must be an integer of at least 1"),
        (lambda: AMEDRecipe(teacher="dpm"), "teacher must be one of heun, ipndm, got 'dpm'"),
        (lambda: AMEDRecipe(learning_rate=0), "learning_rate must be above 0"),
        (lambda: AMEDRecipe(static=True, init="paper"), "static needs init='residual'"),
        (lambda: AMEDRecipe(base="heun"), "base must be one of"),
        (lambda: trained(held_out=0), "held_out must be at least 1, got 0"),
        (lambda: train_amed(MIXTURE.denoiser(EDM()), (), 2), "shape must be that of one sample"),
        (lambda: train_amed(MIXTURE.denoiser(EDM()), (2,), 0), "steps must be an integer of at least 1"),
        (lambda: train_amed(lambda x, t: x, (2,), 2), "give the process"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
