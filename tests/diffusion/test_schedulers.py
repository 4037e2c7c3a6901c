"""AMEDScheduler inside unmodified pipelines of diffusers."""

from __future__ import annotations

import json
import math

import diffusers
import pytest
import torch

from danlu.diffusion.amed import AMED
from danlu.diffusion.amed_steps import AMEDStepper
from danlu.diffusion.amed_table import AMEDTable
from danlu.diffusion.hosts import KNOWN, process_from_scheduler
from danlu.diffusion.schedulers import AMEDScheduler
from reference.tiny_pipelines import GaussianUNet, counted, dit, stable_diffusion, unet

TABLE = AMEDTable((0.1, 0.4, 0.6), (1.01, 0.99, 1.0), (0.98, 1.02, 1.0))


def scheduler_for(source=None, table=None, **options):
    source = source if source is not None else diffusers.DDPMScheduler()
    options = {"base": "amed", "schedule": "time_uniform", "untrained": "midpoint", **options}
    scheduler = AMEDScheduler.from_config(source, **options)
    if table is not None:
        scheduler.store(solver_for(scheduler, table))
    return scheduler


def solver_for(scheduler, table, times=None):
    config = scheduler.config
    times = scheduler.grid(len(table)) if times is None else times
    return AMED(scheduler.host.process, times, table, config.base, config.base_order, config.afs)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(model, noise, ratios, table):
    """AMED on the exact model, in float64 and in the coordinates of data plus noise, written out."""
    z = noise.double() * math.sqrt(1 + ratios[0] ** 2)
    for t, u, r, c, a in zip(ratios[:-1], ratios[1:], table.r, table.c, table.a, strict=True):
        m = u**r * t ** (1 - r)
        y = z + (m - t) * predicted(model, z, t)
        z = z + c * (u - t) * a * predicted(model, y, a * m)
    return z / math.sqrt(1 + ratios[-1] ** 2)


def predicted(model, z, ratio):
    """Noise in z for data N(mean, std^2) and noise of this ratio."""
    mean, variance = model.config.mean, model.config.std**2
    return ratio * (z - mean) / (variance + ratio**2)


@pytest.mark.parametrize("table", [None, TABLE])
def test_a_pipeline_ends_where_amed_by_hand_ends(table):
    model = GaussianUNet()
    pipe = quiet(diffusers.DDPMPipeline(model, scheduler_for(table=table)))
    images = pipe(batch_size=2, num_inference_steps=3, generator=seeded(), output_type="pt").images
    noise = torch.randn(2, 2, 4, 4, generator=seeded())
    times = pipe.scheduler.grid(3)
    ratios = pipe.scheduler.host.process.noise_ratio(times).tolist()
    x = by_hand(model, noise, ratios, table or AMEDTable((0.5,) * 3))
    assert torch.allclose(images.double(), (x / 2 + 0.5).clamp(0, 1), atol=2e-6)
    assert 0.02 < images.std() < 0.4


@pytest.mark.parametrize("base", ["amed", "euler", "ipndm", "dpm2", "dpm++"])
@pytest.mark.parametrize("afs", [False, True])
def test_steps_of_every_base_are_the_steppers(base, afs):
    scheduler = scheduler_for(table=TABLE, base=base, afs=afs)
    scheduler.set_timesteps(3)
    model = GaussianUNet()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    ratios = scheduler.host.process.noise_ratio(scheduler.grid(3))
    stepper = AMEDStepper(ratios, TABLE, base, None, afs)
    z = stepper.begin(x * (1 + ratios[0] ** 2).sqrt())
    while not stepper.done:
        z = stepper.advance(z, predicted(model, z, stepper.time))
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(given, t).sample, t, x).prev_sample
    assert torch.allclose(x, z / (1 + ratios[-1] ** 2).sqrt(), atol=1e-6)  # timesteps are told in float32


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_ends_at_the_same_sample(kind):
    scheduler = scheduler_for(diffusers.DDIMScheduler(prediction_type=kind), TABLE)
    scheduler.set_timesteps(3)
    model, process = GaussianUNet(), scheduler.host.process
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    ratios = process.noise_ratio(scheduler.grid(3)).tolist()
    want = by_hand(model, x, ratios, TABLE)
    for t in scheduler.timesteps:
        noise = model.noise(x, t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        data = (x - sigma * noise) / alpha
        output = {"epsilon": noise, "sample": data, "v_prediction": alpha * noise - sigma * data}[kind]
        x = scheduler.step(output, t, x, return_dict=False)[0]
    assert torch.allclose(x, want, atol=1e-5)


def test_a_preconditioned_network_gets_scaled_input_and_its_own_timesteps():
    source = diffusers.EDMEulerScheduler(sigma_data=0.7)
    scheduler = scheduler_for(source, TABLE)
    scheduler.set_timesteps(3)
    mean, variance, seen = 0.3, 0.25, []
    ratios = scheduler.host.process.noise_ratio(scheduler.grid(3)).tolist()
    assert ratios[0] == pytest.approx(80) and ratios[-1] == pytest.approx(0.002)
    assert scheduler.init_noise_sigma == 80
    noise = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    z = noise * 80
    for t, u, r, c, a in zip(ratios[:-1], ratios[1:], TABLE.r, TABLE.c, TABLE.a, strict=True):
        m = u**r * t ** (1 - r)
        y = z + (m - t) * t * (z - mean) / (variance + t**2)
        z = z + c * (u - t) * a * (a * m) * (y - mean) / (variance + (a * m) ** 2)
        seen += [t, a * m]
    x = noise * 80
    for t, ratio in zip(scheduler.timesteps, seen, strict=True):
        given = scheduler.scale_model_input(x, t)
        assert torch.allclose(given, x / math.sqrt(ratio**2 + 0.49))
        assert float(t) == pytest.approx(0.25 * math.log(ratio), abs=1e-6)
        data = (variance * x + ratio**2 * mean) / (variance + ratio**2)
        skip, out = 0.49 / (ratio**2 + 0.49), ratio * 0.7 / math.sqrt(ratio**2 + 0.49)
        x = scheduler.step((data - skip * x) / out, t, x).prev_sample
    assert torch.allclose(x, z, atol=1e-9)


def test_a_flow_network_is_told_a_thousandth_and_predicts_a_velocity():
    scheduler = scheduler_for(diffusers.FlowMatchEulerDiscreteScheduler(), table=TABLE)
    scheduler.set_timesteps(3)
    assert scheduler.timesteps[0] == pytest.approx(1000 * (1 - 2**-12))
    ratios = scheduler.host.process.noise_ratio(scheduler.grid(3)).tolist()
    mean, variance = 0.3, 0.25
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    z = x * 2**12
    for t, u, r, c, a in zip(ratios[:-1], ratios[1:], TABLE.r, TABLE.c, TABLE.a, strict=True):
        m = u**r * t ** (1 - r)
        y = z + (m - t) * t * (z - mean) / (variance + t**2)
        z = z + c * (u - t) * a * (a * m) * (y - mean) / (variance + (a * m) ** 2)
    for t in scheduler.timesteps.double():
        s = t / 1000
        ratio = s / (1 - s)
        noise = ratio * (x / (1 - s) - mean) / (variance + ratio**2)
        x = scheduler.step(noise - (x - s * noise) / (1 - s), t, x).prev_sample
    assert torch.allclose(x, z / (1 + ratios[-1]), atol=1e-3)
    assert float(abs(x.mean() - mean)) < 1


def test_network_calls_are_counted_and_one_timestep_stands_for_each():
    for afs, steps in ((False, 1), (False, 4), (True, 1), (True, 4)):
        model = unet(size=8)
        rows = counted(model)
        scheduler = scheduler_for(afs=afs)
        scheduler.set_timesteps(steps)
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(model(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
        assert len(rows) == scheduler.calls == scheduler.evaluations == len(scheduler.timesteps) == 2 * steps - afs
        assert scheduler.num_inference_steps == steps and torch.isfinite(x).all()


def test_ddim_pipeline_runs_it_and_passes_eta(tmp_path):
    pipe = quiet(diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler()))
    rows = counted(pipe.unet)
    pipe.scheduler = scheduler_for(pipe.scheduler.config)
    images = pipe(batch_size=1, num_inference_steps=3, generator=seeded(), output_type="pt").images
    assert images.shape == (1, 3, 16, 16) and rows == [1] * 6 and pipe.scheduler.calls == 6
    with pytest.raises(ValueError, match="eta must be 0 and nothing clipped"):
        pipe(batch_size=1, num_inference_steps=3, eta=0.5)
    # its constructor turns every scheduler into a DDIMScheduler, with the process that ours was made from
    back = diffusers.DDIMPipeline(pipe.unet, pipe.scheduler).scheduler
    assert type(back) is diffusers.DDIMScheduler and back.config.beta_end == pipe.scheduler.config.beta_end


def test_dit_pipeline_runs_it_with_and_without_guidance():
    pipe = quiet(dit(scheduler_for(diffusers.DDIMScheduler())))
    rows = counted(pipe.transformer)
    for guidance, copies in ((4.0, 2), (1.0, 1)):
        for afs in (False, True):
            rows.clear()
            pipe.scheduler = scheduler_for(pipe.scheduler.config, afs=afs)
            images = pipe([1, 2], guidance, seeded(), num_inference_steps=3, output_type="pt").images
            assert rows == [2 * copies] * (6 - afs) and pipe.scheduler.calls == 6 - afs
            assert images.shape == (2, 3, 16, 16) and torch.isfinite(images).all()


def test_stable_diffusion_pipeline_runs_it(tmp_path):
    source = diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    pipe = quiet(stable_diffusion(source, tmp_path))
    rows = counted(pipe.unet)
    results = {}
    for afs in (False, True):
        pipe.scheduler = scheduler_for(source, afs=afs)
        rows.clear()
        seen = []

        def note(_, index, t, values, seen=seen):
            seen.append(float(t))
            return values

        results[afs] = pipe(
            "a cat", num_inference_steps=3, generator=seeded(), output_type="latent", callback_on_step_end=note
        ).images
        assert rows == [2] * (6 - afs) and pipe.scheduler.calls == 6 - afs
        assert seen == pipe.scheduler.timesteps.tolist()
    assert torch.isfinite(results[False]).all() and not torch.allclose(results[False], results[True])


def test_a_pipeline_gives_what_the_loop_alone_gives(tmp_path):
    source = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    pipe = quiet(stable_diffusion(scheduler_for(source, TABLE), tmp_path))
    latents = torch.randn(1, 4, 8, 8, generator=seeded())
    out = pipe("a cat", num_inference_steps=3, guidance_scale=3.0, latents=latents, output_type="latent").images
    host = pipe.scheduler.host
    with torch.no_grad():
        words, nothing = pipe.encode_prompt("a cat", "cpu", 1, True)

        def model(x, timesteps):
            empty = pipe.unet(x, timesteps, encoder_hidden_states=nothing).sample
            return empty + 3.0 * (pipe.unet(x, timesteps, encoder_hidden_states=words).sample - empty)

        denoiser = host.denoiser(model)
        ratios = host.process.noise_ratio(pipe.scheduler.grid(3))
        stepper = AMEDStepper(ratios, TABLE)
        z = stepper.begin(latents.double() * ratios[0])
        while not stepper.done:
            time = host.process.time_of(-stepper.time.log())
            x = host.process.alpha(time) * z
            z = stepper.advance(z, denoiser.epsilon(x.float(), time).double())
        x = z * host.process.alpha(host.end)
    assert torch.allclose(out.double(), x, atol=5e-4 * float(x.abs().max()))


def test_image_to_image_starts_at_an_interval(tmp_path):
    source = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    pipe = quiet(stable_diffusion(scheduler_for(source, TABLE), tmp_path, diffusers.StableDiffusionImg2ImgPipeline))
    rows = counted(pipe.unet)
    image = torch.rand(1, 3, 16, 16)
    call = {"prompt": "a cat", "image": image, "num_inference_steps": 3, "strength": 0.7, "output_type": "latent"}
    assert torch.isfinite(pipe(**call, generator=seeded()).images).all()
    assert rows == [2] * 4 and pipe.scheduler.calls == 4  # two of three intervals
    assert pipe.scheduler.step_index == 6
    pipe.scheduler = AMEDScheduler.from_config(pipe.scheduler.config, afs=True)
    with pytest.raises(ValueError, match="inside an interval: start at the beginning of one \\(with afs=False"):
        pipe(**call)


def test_a_run_from_the_middle_takes_the_coefficients_of_its_intervals():
    scheduler, model = scheduler_for(table=TABLE), GaussianUNet()
    scheduler.set_timesteps(3)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    ratios = scheduler.host.process.noise_ratio(scheduler.grid(3)).tolist()
    want = by_hand(model, x, ratios[1:], AMEDTable(TABLE.r[1:], TABLE.c[1:], TABLE.a[1:]))
    assert scheduler.begin_index is None
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    assert torch.allclose(x, want, atol=1e-5)
    assert scheduler.calls == 4
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="cannot start at network call 2, inside an interval"):
        scheduler.step(x, scheduler.timesteps[1], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_leaves_the_state_in_full(dtype):
    model = GaussianUNet()
    x = torch.randn(4, 2, 4, 4).to(dtype)
    ends = {}
    for kind in (torch.float64, dtype):
        scheduler = scheduler_for()
        scheduler.set_timesteps(20)
        moving = x.to(kind)
        for t in scheduler.timesteps:
            output = model.noise(moving.double(), t).to(kind)
            moved = scheduler.step(output, t, moving).prev_sample
            assert moved.dtype == kind
            moving = moved
        ends[kind] = moving.double()
    naive = scheduler_for()
    naive.set_timesteps(20)
    moving = x
    for t in naive.timesteps:  # a new tensor each time, as if someone had edited it: rounded at every step
        moving = naive.step(model.noise(moving.double(), t).to(dtype), t, moving).prev_sample + 0
        naive._walk._handed = None
    spacing = torch.finfo(dtype).eps
    kept = float((ends[dtype] - ends[torch.float64]).abs().mean())
    assert kept < 0.5 * spacing
    assert kept < float((moving.double() - ends[torch.float64]).abs().mean())


def test_a_pipeline_in_bfloat16_runs(tmp_path):
    pipe = quiet(dit(scheduler_for(diffusers.DDIMScheduler()))).to(torch.bfloat16)
    images = pipe([1], 4.0, seeded(), num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(images).all()
    pipe = quiet(stable_diffusion(scheduler_for(diffusers.DDIMScheduler(steps_offset=1)), tmp_path)).to(torch.bfloat16)
    latents = pipe("a cat", num_inference_steps=2, generator=seeded(), output_type="latent").images
    assert latents.dtype == torch.bfloat16 and torch.isfinite(latents).all()


def test_an_edited_sample_is_taken_as_it_is():
    scheduler, model = scheduler_for(), GaussianUNet()
    scheduler.set_timesteps(2)
    x = torch.randn(1, 2, 4, 4)
    for index, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
        if index == 1:
            x.copy_(torch.zeros_like(x))  # in place, at the end of an interval
            middle = x.clone()
    other = scheduler_for()
    other.set_timesteps(2)
    for t in other.timesteps[2:]:
        middle = other.step(model(middle, t).sample, t, middle).prev_sample
    assert torch.allclose(x, middle, atol=1e-6)


def test_coefficients_of_several_numbers_of_steps_survive_saving(tmp_path):
    scheduler = AMEDScheduler.from_config(diffusers.PNDMScheduler(beta_schedule="scaled_linear"), afs=True)
    tables = {2: AMEDTable((0.03, 0.7)), 3: TABLE}
    for steps, table in tables.items():
        assert len(scheduler.grid(steps)) == steps + 1
        scheduler.store(solver_for(scheduler, table))
    scheduler.save_pretrained(tmp_path)
    for again in (
        AMEDScheduler.from_pretrained(tmp_path),
        AMEDScheduler.from_config(scheduler.config),
        AMEDScheduler.from_config(json.loads((tmp_path / "scheduler_config.json").read_text())),
    ):
        assert again.trained_steps == [2, 3] and again.config.afs and again.host == scheduler.host
        assert (
            again.host.process.half_log_snrs
            == process_from_scheduler(diffusers.PNDMScheduler(beta_schedule="scaled_linear")).process.half_log_snrs
        )
        for steps, table in tables.items():
            scheduler.set_timesteps(steps)
            again.set_timesteps(steps)
            assert torch.equal(again.timesteps, scheduler.timesteps) and again._table == table


def test_a_pipeline_with_it_survives_saving(tmp_path):
    pipe = quiet(diffusers.DDPMPipeline(unet(), scheduler_for(table=TABLE)))
    images = pipe(num_inference_steps=3, generator=seeded(), output_type="pt").images
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "danlu.diffusion.schedulers",
        "AMEDScheduler",
    ]
    again = quiet(diffusers.DDPMPipeline.from_pretrained(tmp_path))
    assert type(again.scheduler) is AMEDScheduler and again.scheduler.trained_steps == [3]
    assert torch.equal(again(num_inference_steps=3, generator=seeded(), output_type="pt").images, images)


@pytest.mark.parametrize("name", KNOWN)
def test_it_is_made_from_the_config_of_every_known_scheduler_and_gives_it_back(name):
    if name in ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"):
        pytest.importorskip("torchsde")
    kind = getattr(diffusers, name)
    source = kind()
    scheduler = AMEDScheduler.from_config(source.config)
    assert scheduler.host == process_from_scheduler(source)
    given_back = kind.from_config(scheduler.config)
    assert process_from_scheduler(given_back) == scheduler.host
    ours = set(AMEDScheduler().config) - set(diffusers.DDIMScheduler().config)
    assert not ours & set(source.config) - {"_use_default_values"}


def test_defaults_of_the_host_win_over_ours():
    # HeunDiscreteScheduler starts its betas elsewhere, and its config says that it left them at the default.
    source = diffusers.HeunDiscreteScheduler()
    assert "beta_start" in source.config["_use_default_values"] and source.config.beta_start != 1e-4
    assert AMEDScheduler.from_config(source.config).config.beta_start == source.config.beta_start
    changed = AMEDScheduler.from_config(diffusers.EDMEulerScheduler().config, sigma_max=40.0, afs=True)
    assert changed.host.process.t_max == 40 and changed.config.afs


def test_steps_without_coefficients_are_refused_or_taken_at_the_midpoint():
    scheduler = AMEDScheduler.from_config(diffusers.DDIMScheduler().config)
    with pytest.raises(
        ValueError, match=r"no coefficients for 5 steps \(there are none\). Train them with scheduler.train"
    ):
        scheduler.set_timesteps(5)
    scheduler.store(solver_for(scheduler, TABLE))
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"there are those of 3\).*untrained='midpoint'"):
        scheduler.set_timesteps(5)
    scheduler = AMEDScheduler.from_config(scheduler.config, untrained="midpoint")
    scheduler.set_timesteps(5)
    ratios = scheduler.host.process.noise_ratio(scheduler.grid(5))
    told = scheduler.host.process.noise_ratio(scheduler.timesteps)
    assert torch.allclose(told[1::2], (ratios[:-1] * ratios[1:]).sqrt(), rtol=1e-4)


def test_coefficients_for_another_process_are_refused():
    scheduler = AMEDScheduler.from_config(diffusers.DDIMScheduler())
    scheduler.store(solver_for(scheduler, TABLE))
    with pytest.raises(
        ValueError, match="coefficients of 3 steps were trained for another process: there .* was \\[157.4,"
    ):
        AMEDScheduler.from_config(scheduler.config, beta_end=0.01).set_timesteps(3)
    with pytest.raises(ValueError, match="another process"):
        AMEDScheduler.from_config(scheduler.config, num_train_timesteps=100).set_timesteps(3)
    other = AMEDScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="another process: .* for this RectifiedFlow it is"):
        other.store(solver_for(scheduler, TABLE))
    with pytest.raises(
        ValueError, match=r"trained with base='dpm\+\+' \(here 'ipndm'\), order=3 \(here 4\): make the sched"
    ):
        scheduler.store(AMED(scheduler.host.process, scheduler.grid(3), TABLE, "dpm++", None, False))
    with pytest.raises(ValueError, match=r"trained with afs=True \(here False\)"):
        scheduler.store(AMED(scheduler.host.process, scheduler.grid(3), TABLE, "ipndm", afs=True))
    with pytest.raises(
        ValueError, match=r"no coefficients for 3 steps ending at noise ratios \[157.4, .*there are those of 3"
    ):
        scheduler.set_timesteps(timesteps=[999, 600, 300, 0])


def test_trained_steps_keep_the_times_they_were_trained_for():
    scheduler = AMEDScheduler.from_config(diffusers.DDIMScheduler(), schedule="polynomial")
    times = torch.tensor([990.0, 700.0, 200.5, 3.0], dtype=torch.float64)
    scheduler.store(solver_for(scheduler, TABLE, times))
    assert torch.equal(scheduler.grid(3), times)
    scheduler.set_timesteps(3)
    assert torch.allclose(scheduler.timesteps[::2], times[:-1].float(), atol=1e-3)
    assert scheduler.grid(4)[0] == 999


def test_own_times_are_ends_of_intervals():
    scheduler = scheduler_for()
    scheduler.set_timesteps(timesteps=[999.0, 400.0, 20.5])
    assert scheduler.timesteps[0] == 999 and scheduler.timesteps[2] == 400 and len(scheduler.timesteps) == 4
    ratios = scheduler.host.process.noise_ratio(torch.tensor([999.0, 400.0, 20.5]))
    other = scheduler_for()
    other.set_timesteps(sigmas=ratios.tolist())
    assert torch.allclose(other.timesteps, scheduler.timesteps, atol=1e-3)
    flow = scheduler_for(diffusers.FlowMatchEulerDiscreteScheduler())
    flow.set_timesteps(sigmas=[0.9, 0.5, 0.01], device="cpu")
    assert torch.allclose(flow.timesteps[::2], torch.tensor([900.0, 500.0]))
    other.store(solver_for(other, AMEDTable((0.2, 0.3)), torch.tensor([999.0, 400.0, 20.5])))
    other.set_timesteps(timesteps=[999.0, 400.0, 20.5])
    assert not torch.allclose(other.timesteps, scheduler.timesteps)


def test_add_noise_is_the_hosts():
    for source in (
        diffusers.DDPMScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.EDMEulerScheduler(),
    ):
        scheduler = scheduler_for(source)
        scheduler.set_timesteps(4)
        x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        times = scheduler.timesteps[[2, 5]]
        process, t = scheduler.host.process, scheduler.host.time(times)
        want = process.alpha(t).view(-1, 1, 1, 1) * x + process.sigma(t).view(-1, 1, 1, 1) * noise
        assert torch.allclose(scheduler.add_noise(x, noise, times), want.float(), rtol=1e-4)
        assert scheduler.add_noise(x.half(), noise.half(), times).dtype == torch.float16
    assert len(scheduler_for()) == 1000


def test_afs_needs_a_pipeline_that_scales_its_input():
    pipe = quiet(diffusers.DDPMPipeline(unet(), scheduler_for(afs=True)))
    with pytest.raises(
        ValueError, match="does not call scale_model_input, which afs needs: use another pipeline, or afs=F"
    ):
        pipe(num_inference_steps=2)
    pipe.scheduler = scheduler_for(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match="which its kind of network needs: use another pipeline$"):
        pipe(num_inference_steps=2)


def test_wrong_options_are_refused():
    for options, words in (
        ({"base": "heun"}, "base must be one of amed, euler"),
        ({"base": "ipndm", "base_order": 5}, "order must be an integer in 1..4"),
        ({"schedule": "karras"}, "schedule must be one of uniform, polynomial"),
        ({"untrained": "guess"}, "untrained must be one of refuse, midpoint, got 'guess'"),
        ({"ratio_min": 0.0}, "ratio_min must be above 0 and finite, got 0.0: the last step ends with noise left"),
        ({"coefficients": {"2": {"r": [0.5]}}}, "coefficients of 2 steps lack c, a, times, ratios"),
        (
            {"coefficients": {"2": {"r": [0.5], "c": [1], "a": [1], "times": [2, 1], "ratios": [2, 1]}}},
            "coefficients of 2 steps must hold 2 numbers each and one more of times and ratios, got 1 and 2",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            AMEDScheduler(**options)
    with pytest.raises(
        ValueError, match="thresholding of the predicted data is not supported: pass thresholding=False"
    ):
        AMEDScheduler.from_config(diffusers.DDPMScheduler(thresholding=True))
    AMEDScheduler.from_config(diffusers.DDPMScheduler(thresholding=True), thresholding=False)
    with pytest.raises(ValueError, match="LCMScheduler is not supported: its models are distilled"):
        AMEDScheduler.from_config(diffusers.LCMScheduler().config)
    with pytest.raises(ValueError, match="_class_name must be a scheduler of diffusers, got None"):
        AMEDScheduler.from_config({"beta_start": 0.1})


def test_wrong_times_are_refused():
    scheduler = scheduler_for()
    for call, words in (
        ({}, "give exactly one of num_inference_steps, timesteps and sigmas"),
        ({"num_inference_steps": 2, "sigmas": [2.0, 1.0]}, "give exactly one"),
        ({"num_inference_steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"timesteps": [300, 500]}, "must descend strictly from noise to data, got 300 before 500"),
        ({"timesteps": [1200, 500]}, "must be in 0..999 for DiscreteProcess, got 1200"),
        ({"sigmas": [3.0, 1.0, 0.0]}, "must be finite and above 0"),
        ({"sigmas": [1.0, 3.0]}, "must descend strictly"),
    ):
        with pytest.raises(ValueError, match=words):
            scheduler.set_timesteps(**call)
    flow = scheduler_for(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="must be finite and above 0"):
        flow.set_timesteps(sigmas=[0.9, 0.5, 0.0])


def test_wrong_calls_are_refused():
    x = torch.randn(2, 2, 4, 4)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler_for().step(x, 3, x)
    scheduler = scheduler_for()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="timestep must be one of timesteps \\[999, "):
        scheduler.step(x, 998, x)
    with pytest.raises(ValueError, match="one time for the whole batch, got \\(2,\\)"):
        scheduler.step(x, scheduler.timesteps[:1].expand(2), x)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="one time for the whole batch"):
        scheduler.scale_model_input(x, scheduler.timesteps[1:2].expand(2))
    with pytest.raises(ValueError, match="timestep 999 is not the next one, .* \\(call 2 of 4\\): every network call"):
        scheduler.step(x, scheduler.timesteps[0], x)
    bad = x.clone()
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="output is not finite at call 2 of 4, timestep "):
        scheduler.step(bad, scheduler.timesteps[1], x)
    for t in scheduler.timesteps[1:]:
        scheduler.step(0.1 * x, t, x)
    with pytest.raises(ValueError, match="the run is over after 4 network calls: call set_timesteps again"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_a_second_run_needs_only_new_timesteps():
    scheduler, model = scheduler_for(table=TABLE, base="ipndm"), GaussianUNet()
    ends = []
    for _ in range(2):
        scheduler.set_timesteps(3)
        x = torch.randn(1, 2, 4, 4, generator=seeded())
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)
