"""Parts of the claims on the probability-flow ODE, at tiny sizes."""

import pytest
import torch

from danlu.diffusion.processes import EDM, VP, RectifiedFlow
from danlu.lab import ode


@pytest.mark.parametrize("process", [VP(), EDM()], ids=["VP", "EDM"])
def test_ddim_is_euler(process):
    assert ode.euler_difference(process, steps=4) < 1e-12


def test_endpoint_error_falls_by_the_order():
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = ode.endpoint("dpm2", 256, noise)
    coarse, fine = (float((ode.endpoint("ddim", steps, noise) - exact).norm()) for steps in (32, 64))
    assert 1.5 < coarse / fine < 3
    assert float((ode.endpoint("heun", 64, noise) - exact).norm()) < fine / 5


def test_density_error_is_small_and_priors_differ():
    pytest.importorskip("torchdiffeq")
    data = ode.correlated_gaussian(2)
    x = data.draw(3, 0)
    error, calls = ode.density_error(data, RectifiedFlow(), x)
    assert error < 1e-4 and calls > 20
    rough, fewer = ode.density_error(data, RectifiedFlow(), x, solver="rk4", steps=3)
    assert rough > error and fewer == 12
    assert ode.density_error(data, VP(), x, exact_prior=False)[0] > 1e-4 > ode.density_error(data, VP(), x)[0]
