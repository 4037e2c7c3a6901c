"""Processes read from schedulers of diffusers agree with those schedulers."""

from __future__ import annotations

import json
import math

import diffusers
import numpy
import pytest
import torch

from danlu.diffusion.discrete import DiscreteProcess
from danlu.diffusion.hosts import _EDM, _FLOWS, _REFUSED, _TABLES, process_from_scheduler
from danlu.diffusion.processes import EDM, VP, Cosine, RectifiedFlow
from danlu.diffusion.targets import convert, split


def products(betas):
    """The table's alpha^2 in plain Python."""
    total, out = 1.0, []
    for beta in betas.tolist():
        total *= 1 - beta
        out.append(total)
    return out


@pytest.mark.parametrize("name", _TABLES)
def test_every_scheduler_with_a_table_gives_its_alphas_at_whole_times(name):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)()
    host = process_from_scheduler(scheduler)
    times = torch.arange(1000)
    shares = scheduler.alphas_cumprod.double()
    assert torch.allclose(host.process.alpha(times) ** 2, shares, rtol=2e-4)
    assert torch.allclose(host.process.alpha(times) ** 2 + host.process.sigma(times) ** 2, torch.ones(1000).double())
    assert host.process.t_max == 999 and host.prediction == "epsilon"
    assert host.timestep(12.5) == 12.5 and host.init_noise_sigma == 1.0


def test_products_of_betas_are_taken_in_float64():
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    process = process_from_scheduler(scheduler).process
    whole = torch.tensor(products(scheduler.betas), dtype=torch.float64)
    assert torch.allclose(process.alpha(torch.arange(1000)) ** 2, whole, rtol=1e-12, atol=0)
    assert torch.allclose(process.sigma(torch.arange(1000)) ** 2, 1 - whole, rtol=1e-11, atol=0)
    # float32 products are off by far more, most of all in the noise near the data
    assert not torch.allclose(scheduler.alphas_cumprod.double(), whole, rtol=1e-9, atol=0)


def test_add_noise_is_the_hosts_own():
    scheduler = diffusers.DDPMScheduler()
    x, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    times = torch.tensor([0, 500, 999])
    ours = process_from_scheduler(scheduler).process.add_noise(x, noise, times)
    assert torch.allclose(ours, scheduler.add_noise(x, noise, times), atol=1e-5)


def test_between_whole_times_the_half_log_ratio_is_linear_and_its_inverse_exact():
    process = process_from_scheduler(diffusers.DDIMScheduler()).process
    times = torch.tensor([0.0, 0.25, 3.75, 500.5, 998.0, 998.9, 999.0], dtype=torch.float64)
    assert torch.allclose(process.time_of(process.half_log_snr(times)), times, rtol=0, atol=1e-9)
    low, high = process.half_log_snr(3.0), process.half_log_snr(4.0)
    assert torch.allclose(process.half_log_snr(3.75), low + 0.75 * (high - low), atol=1e-14)
    assert process.half_log_snr(torch.tensor([2.0])).shape == (1,) and process.half_log_snr(2.0).shape == ()
    assert process.time_of(1e3) == 0 and process.time_of(-1e3) == 999


def test_derivatives_of_a_table_are_those_of_its_interpolation():
    process = process_from_scheduler(diffusers.DDIMScheduler()).process
    for t in (0.3, 400.5, 998.7):
        step = 1e-5
        for function, derivative in ((process.alpha, process.alpha_prime), (process.sigma, process.sigma_prime)):
            quotient = (function(t + step) - function(t - step)) / (2 * step)
            assert math.isclose(float(derivative(t)), float(quotient), rel_tol=1e-4)
    times = torch.tensor([10.2, 300.7], dtype=torch.float64)
    _, slope = torch.func.jvp(process.log_alpha, (times,), (torch.ones_like(times),))
    assert torch.allclose(slope, process.drift(times), rtol=1e-9)
    beta = -2 * process.drift(times)  # of a process that keeps the variance
    assert torch.allclose(process.diffusion_squared(times), beta, rtol=1e-9)


def test_a_fine_table_approaches_the_continuous_process():
    # DDPM's betas over 1000 steps are VP(0.1, 20): index i is time (i + 1) / 1000.
    process = process_from_scheduler(diffusers.DDPMScheduler()).process
    times = torch.tensor([9.0, 99.0, 499.0, 899.0])
    assert torch.allclose(process.log_alpha(times), VP().log_alpha((times + 1) / 1000), rtol=6e-2)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_ddim_step_by_the_converted_prediction_is_the_hosts_step(kind):
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    host = process_from_scheduler(scheduler)
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    data, noise = split(output, x, 700, host.process, host.prediction)
    ours = host.process.add_noise(data, noise, 600)
    assert torch.allclose(ours, scheduler.step(output, 700, x).prev_sample, atol=2e-5)


@pytest.mark.parametrize("name", _EDM)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_preconditioned_models_are_read_as_their_scheduler_reads_them(name, kind):
    if name == "CosineDPMSolverMultistepScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)(prediction_type=kind, sigma_data=0.7)
    host = process_from_scheduler(scheduler)
    assert host.process == EDM(scheduler.config.sigma_min, scheduler.config.sigma_max)
    x, raw, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), 3.0
    assert torch.allclose(host.input(x, sigma), scheduler.precondition_inputs(x, sigma), atol=1e-6)
    assert torch.allclose(host.timestep(sigma), scheduler.precondition_noise(torch.tensor(sigma)).double(), atol=1e-6)
    assert torch.allclose(host.output(raw, x, sigma), scheduler.precondition_outputs(x, raw, sigma), atol=1e-5)
    assert math.isclose(float(host.time(host.timestep(sigma))), sigma, rel_tol=1e-12)
    each = host.output(raw, x, torch.tensor([3.0, 5.0]))
    assert torch.allclose(each[1], host.output(raw, x, 5.0)[1])
    assert host.prediction == "sample" and host.init_noise_sigma == scheduler.config.sigma_max


def test_eulers_continuous_v_prediction_is_a_preconditioned_model():
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0
    )
    host = process_from_scheduler(scheduler)
    scheduler.set_timesteps(sigmas=[700.0, 10.0, 1.0, 0.0])
    x, raw = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    given = scheduler.scale_model_input(x, scheduler.timesteps[0])
    assert torch.allclose(host.input(x, 700.0), given, atol=1e-6)
    assert torch.allclose(host.timestep(700.0).float(), scheduler.timesteps[0], atol=1e-6)
    data = scheduler.step(raw, scheduler.timesteps[0], x).pred_original_sample
    assert torch.allclose(host.output(raw, x, 700.0), data, atol=1e-4)


@pytest.mark.parametrize("name", _FLOWS)
def test_flows_are_rectified_flow_with_scaled_timesteps(name):
    scheduler = getattr(diffusers, name)()
    host = process_from_scheduler(scheduler)
    assert isinstance(host.process, RectifiedFlow) and host.prediction == "velocity"
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[1]
    time = float(host.time(t))
    x, noise = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    noised = scheduler.scale_noise(x, t[None], noise)
    assert torch.allclose(host.process.add_noise(x, noise, time), noised, atol=1e-5)
    # the exact model of one point predicts noise - data: the step of the host ends on the line of the two
    assert torch.allclose(convert(noise - x, noised, time, host.process, "velocity", "sample"), x, atol=1e-4)
    assert host.start < 1 and 0 < host.end < 0.01
    assert host.process.alpha(host.start) > 0


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_sigmas_of_a_table_scheduler_are_a_flow(name):
    kind = getattr(diffusers, name)
    host = process_from_scheduler(kind(use_flow_sigmas=True, prediction_type="flow_prediction"))
    assert isinstance(host.process, RectifiedFlow) and float(host.timestep(0.25)) == 250
    with pytest.raises(ValueError, match="needs use_flow_sigmas=True"):
        process_from_scheduler(kind(prediction_type="flow_prediction"))


def test_ipndms_sine_schedule_is_the_cosine_process():
    scheduler = diffusers.IPNDMScheduler()
    host = process_from_scheduler(scheduler)
    assert isinstance(host.process, Cosine) and host.prediction == "v"
    times = scheduler.timesteps.double()
    keep = slice(1, 990)  # float32 betas say nothing at the very ends
    assert torch.allclose(host.process.sigma(times)[keep], scheduler.betas[:-1].double()[keep], atol=1e-6)
    assert torch.allclose(host.process.alpha(times)[keep], scheduler.alphas[:-1].double()[keep], atol=1e-4)
    assert float(host.process.alpha(host.start)) == pytest.approx(2**-12)
    with pytest.raises(ValueError, match="trained_betas is not understood"):
        process_from_scheduler(diffusers.IPNDMScheduler(10, trained_betas=[0.5] * 11))


def test_sde_ve_is_told_its_noise_and_predicts_a_score():
    host = process_from_scheduler(diffusers.ScoreSdeVeScheduler())
    assert host.process == EDM(0.01, 1348.0) and host.prediction == "score" and host.timestep(3.0) == 3.0


def test_no_data_left_at_the_end_gets_the_ratio_that_euler_gives_it():
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    short = {**options, "num_train_timesteps": 100, "beta_end": 0.2}
    scheduler = diffusers.EulerDiscreteScheduler(**short)
    process = process_from_scheduler(diffusers.DDIMScheduler(**short)).process
    assert float(process.alpha(99.0)) ** 2 == pytest.approx(2**-24, rel=1e-9)
    assert float(process.noise_ratio(99.0)) == pytest.approx(float(scheduler.sigmas[0]), rel=1e-4)
    # with a table so fine that the time before has less still, Euler's ratios fall and rise; ours do not
    assert diffusers.EulerDiscreteScheduler(**options).sigmas[:2].diff() > 0
    process = process_from_scheduler(diffusers.DDIMScheduler(**options)).process
    assert float(process.alpha(999.0) / process.alpha(998.0)) == pytest.approx(0.5)


def test_shifted_products_win_over_betas():
    scheduler = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=True)
    process = process_from_scheduler(scheduler).process
    times = torch.arange(999)
    assert torch.allclose(process.alpha(times) ** 2, scheduler.alphas_cumprod.double()[:-1], rtol=1e-6)


def test_a_config_and_a_file_give_what_the_scheduler_gives(tmp_path):
    scheduler = diffusers.PNDMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    host = process_from_scheduler(scheduler)
    file = tmp_path / "scheduler_config.json"
    for source in (scheduler.config, tmp_path, str(file), json.loads(file.read_text())):
        assert process_from_scheduler(source) == host
    assert hash(host.process) == hash(process_from_scheduler(tmp_path).process)
    assert process_from_scheduler(diffusers.PNDMScheduler()) != host
    assert len(repr(host)) < 400


def test_a_learned_variance_is_left_out():
    host = process_from_scheduler(diffusers.DDPMScheduler(variance_type="learned_range"))
    raw, x = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(host.output(raw, x, 3.0), raw[:, :3])
    assert torch.equal(process_from_scheduler(diffusers.DDPMScheduler()).output(raw, x, 3.0), raw)


def test_a_denoiser_speaks_to_the_model_as_the_host_does():
    scheduler = diffusers.EDMEulerScheduler()
    host = process_from_scheduler(scheduler)
    seen = []

    def model(given, timesteps):
        seen.append((given, timesteps))
        return 0.1 * given

    x = torch.randn(2, 3, 4, 4)
    data = host.denoiser(model).sample(x, 3.0)
    assert torch.allclose(seen[0][0], scheduler.precondition_inputs(x, 3.0))
    assert torch.allclose(seen[0][1], torch.full((2,), 0.25 * math.log(3.0)))
    assert torch.allclose(data, scheduler.precondition_outputs(x, 0.1 * seen[0][0], 3.0), atol=1e-6)


def test_a_subclass_is_read_as_its_parent():
    class Mine(diffusers.DDIMScheduler):
        pass

    assert process_from_scheduler(Mine()) == process_from_scheduler(diffusers.DDIMScheduler())


@pytest.mark.parametrize("name", sorted(_REFUSED))
def test_what_follows_no_ode_is_refused_by_name(name):
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip("not in this diffusers")
    scheduler = (
        kind(mask_token_id=5) if name == "AmusedScheduler" else kind(num_vec_classes=5) if "VQ" in name else kind()
    )
    with pytest.raises(ValueError, match=f"{name} is not supported: its"):
        process_from_scheduler(scheduler)


def test_what_is_not_understood_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="KarrasVeScheduler is not understood: known are DDIM"):
        process_from_scheduler(diffusers.KarrasVeScheduler())
    with pytest.raises(ValueError, match="must be a scheduler of diffusers, got 'UNet2DModel'"):
        process_from_scheduler({"_class_name": "UNet2DModel"})
    with pytest.raises(ValueError, match="must be a scheduler of diffusers, got None"):
        process_from_scheduler({"beta_start": 1e-4})
    with pytest.raises(ValueError, match="its config or a path, got int"):
        process_from_scheduler(3)
    with pytest.raises(ValueError, match="invert_sigmas=True counts its time from noise"):
        process_from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="'continuous' is understood with 'v_prediction' only, got 'epsilon'"):
        process_from_scheduler(diffusers.EulerDiscreteScheduler(timestep_type="continuous"))
    scheduler = diffusers.DDIMScheduler()
    scheduler.register_to_config(prediction_type="noise")
    with pytest.raises(ValueError, match="DDIMScheduler with prediction_type 'noise' is not understood"):
        process_from_scheduler(scheduler)
    with pytest.raises(FileNotFoundError):
        process_from_scheduler(tmp_path / "absent.json")


def test_tables_that_are_no_tables_are_refused():
    with pytest.raises(ValueError, match="betas must be one axis of numbers between 0 and 1, got \\[0.1, 1.5\\]"):
        DiscreteProcess.from_betas([0.1, 1.5])
    with pytest.raises(ValueError, match="betas must be one axis"):
        DiscreteProcess.from_betas([0.1, 1.0, 0.2])
    with pytest.raises(ValueError, match="alphas_cumprod must be one axis"):
        DiscreteProcess.from_alphas_cumprod([1.0, 0.5])
    with pytest.raises(ValueError, match="does not after time 1"):
        DiscreteProcess.from_alphas_cumprod([0.9, 0.5, 0.6])
    with pytest.raises(ValueError, match="at least two times, got 1"):
        DiscreteProcess((1.0,))
    with pytest.raises(ValueError, match="must be finite, got nan at time 1"):
        DiscreteProcess((1.0, math.nan))
    assert DiscreteProcess.from_betas(numpy.array([0.1, 0.2])) == DiscreteProcess.from_betas([0.1, 0.2])
