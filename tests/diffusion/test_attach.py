"""Predictors attached to pipelines, and training from a pipeline."""

from __future__ import annotations

import diffusers
import pytest
import torch

from danlu.diffusion.amed import AMED
from danlu.diffusion.amed_predictor import AMEDPredictor, Captured
from danlu.diffusion.amed_table import AMEDTable
from danlu.diffusion.amed_training import AMEDRecipe
from danlu.diffusion.attachment import attach
from danlu.diffusion.networks import PassFeatures, guided, inner_module, network_of, sample_shape
from danlu.diffusion.schedulers import AMEDScheduler
from reference.tiny_pipelines import GaussianUNet, counted, dit, stable_diffusion, unet


def solver_for(scheduler, steps=2, features="sample", shape=None, constant=False, gain=5.0):
    """A solver with random heads, so that every sample has its own times."""
    predictor = AMEDPredictor([0.3, 0.6, 0.5][:steps], scale_c=0.2, scale_a=0.2)
    if not constant:
        generator = torch.Generator().manual_seed(3)
        for head in predictor.heads.values():  # the first four weights see the features, through layers turned up
            head.weight.data[:, :4].normal_(0, 1.0, generator=generator)
        predictor.inner.weight.data.mul_(gain)
        predictor.outer.bias.data.normal_(0, 0.1, generator=generator)
    predictor.requires_grad_(False)
    config = scheduler.config
    times = scheduler.grid(steps)
    average = predictor.table() if constant else AMEDTable((0.4,) * steps, (1.0,) * steps, (1.0,) * steps)
    return AMED(
        scheduler.host.process, times, predictor, config.base, config.base_order, config.afs, features, shape, average
    )


def scheduler_for(source=None, **options):
    return AMEDScheduler.from_config(
        source or diffusers.DDPMScheduler(), **{"base": "amed", "untrained": "midpoint", **options}
    )


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def told(model):
    """Timesteps of every call of a network, after all hooks."""
    seen = []
    forward = model.forward

    def watching(sample, timestep, *args, **kwargs):
        seen.append(torch.as_tensor(timestep).clone())
        return forward(sample, timestep, *args, **kwargs)

    model.forward = watching
    return seen


@pytest.mark.parametrize("base", ["amed", "ipndm", "dpm++"])
def test_a_pipeline_with_times_of_each_sample_ends_where_the_solver_alone_ends(base):
    model, scheduler = GaussianUNet(), scheduler_for(base=base)
    solver = solver_for(scheduler, 3)
    pipe = quiet(diffusers.DDPMPipeline(model, scheduler))
    with attach(scheduler, pipe, solver):
        images = pipe(batch_size=4, num_inference_steps=3, generator=seeded(), output_type="pt").images
    noise = torch.randn(4, 2, 4, 4, generator=seeded()).double()
    process, stepper = scheduler.host.process, solver.stepper()
    z = stepper.begin(noise / process.alpha(999.0))
    times = []
    while not stepper.done:
        t = process.time_of(-stepper.time.log())
        times.append(t)
        alpha = process.alpha(t).reshape(-1, 1, 1, 1)
        z = stepper.advance(z, model.noise(alpha * z, t))
    x = z * process.alpha(solver.times[-1])
    assert torch.allclose(images.double(), (x / 2 + 0.5).clamp(0, 1), atol=2e-5)
    assert float(times[3].std()) > 1  # the samples do have times of their own
    for (_, seen), t in zip(model.seen, times, strict=True):
        assert torch.allclose(seen.double(), t, atol=1e-3)
    assert model.calls == scheduler.calls == 6


def test_constant_heads_are_the_static_mode():
    results = []
    for dynamic in (True, False):
        model, scheduler = GaussianUNet(), scheduler_for()
        solver = solver_for(scheduler, 3, constant=True)
        pipe = quiet(diffusers.DDPMPipeline(model, scheduler))
        if dynamic:
            attach(scheduler, pipe, solver)
        else:
            scheduler.store(solver)
        results.append(pipe(batch_size=3, num_inference_steps=3, generator=seeded(), output_type="pt").images)
    assert torch.allclose(*results, atol=1e-6)


def test_features_come_from_the_middle_block_at_the_start_of_each_interval():
    model, scheduler = unet(size=8), scheduler_for()
    captured = []
    model.mid_block.register_forward_hook(lambda _, __, output: captured.append(output.detach().clone()))
    solver = solver_for(scheduler, 2)
    seen = []
    inner = solver.coefficients.forward
    solver.coefficients.forward = lambda i, features, t, u: seen.append(features.clone()) or inner(i, features, t, u)
    pipe = quiet(diffusers.DDPMPipeline(model, scheduler))
    with attach(scheduler, pipe, solver, feature="mid_block"):
        pipe(batch_size=3, num_inference_steps=2, generator=seeded(), output_type="pt")
    assert len(captured) == 4 and len(seen) == 2
    for features, output in zip(seen, captured[::2], strict=True):
        # (3, 32, 4, 4): mean over channels, every place four times
        want = output.mean(1).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        assert features.shape == (3, 64) and torch.allclose(features, want, atol=1e-6)
        assert not features.requires_grad


def test_a_features_gradient_is_cut():
    model, scheduler = unet(size=8), scheduler_for()
    solver = solver_for(scheduler, 1)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with attach(scheduler, model, solver, feature="mid_block") as attachment:
        scheduler.set_timesteps(1)
        output = model(x, scheduler.timesteps[0]).sample
        assert output.requires_grad
        assert not attachment.features(x).requires_grad


def test_stable_diffusion_with_guidance_shares_times_between_its_passes(tmp_path):
    source = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    for afs in (False, True):
        scheduler = scheduler_for(source, afs=afs)
        pipe = quiet(stable_diffusion(scheduler, tmp_path))
        rows, seen = counted(pipe.unet), told(pipe.unet)
        with attach(scheduler, pipe, solver_for(scheduler, 2), feature="mid_block"):
            latents = pipe(["a", "b"], num_inference_steps=2, generator=seeded(), output_type="latent").images
        assert torch.isfinite(latents).all() and scheduler.calls == 4 - afs
        assert rows == [4] * (4 - afs)
        for times in seen[1 - afs :: 2]:  # inside the intervals
            assert times.shape == (4,) and torch.equal(times[:2], times[2:])
        inside = seen[3 - afs]
        assert inside[0] != inside[1]
        if afs:  # nothing has been seen of the samples yet
            assert seen[0][0] == seen[0][1] != scheduler.timesteps[0]


def test_dit_with_guidance_repeats_its_samples_and_shares_times():
    scheduler = scheduler_for(diffusers.DDIMScheduler())
    pipe = quiet(dit(scheduler))
    seen = told(pipe.transformer)
    with attach(scheduler, pipe, solver_for(scheduler, 2, gain=0.1), feature="mid_block", passes=2):
        pipe([1, 2, 3], 4.0, seeded(), num_inference_steps=2, output_type="pt")
    for times in seen[1::2]:
        assert times.shape == (6,) and torch.equal(times[:3], times[3:]) and times[0] != times[1]
    scheduler = scheduler_for(diffusers.DDIMScheduler())
    pipe.scheduler = scheduler
    with attach(scheduler, pipe, solver_for(scheduler, 2), feature="mid_block"):
        pipe([1, 2, 3], 1.0, seeded(), num_inference_steps=2, output_type="pt")
    assert scheduler.calls == 4


def test_a_preconditioned_network_gets_the_scale_of_each_samples_time():
    scheduler = scheduler_for(diffusers.EDMEulerScheduler())
    model, given = GaussianUNet(), []

    class Network(torch.nn.Module):
        def forward(self, sample, timestep):
            given.append((sample, timestep))
            return 0.2 * sample

    network = Network()
    with attach(scheduler, network, solver_for(scheduler, 2)):
        scheduler.set_timesteps(2)
        x = 80 * torch.randn(3, 2, 4, 4, dtype=torch.float64)
        for t in scheduler.timesteps:
            before = x
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    sigma = (4 * given[3][1].double()).exp()
    assert given[3][1].shape == (3,)
    assert torch.allclose(given[3][0], before / (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1), rtol=1e-5)
    assert model.calls == 0


def test_times_of_each_sample_may_be_passed_by_own_loops():
    scheduler, model = scheduler_for(), GaussianUNet()
    with attach(scheduler, model, solver_for(scheduler, 2)):
        scheduler.set_timesteps(2)
        x = torch.randn(3, 2, 4, 4)
        x = scheduler.step(model(x, scheduler.timesteps[0]).sample, scheduler.timesteps[0], x).prev_sample
        times = scheduler.times_to_tell(scheduler.timesteps[1], 3)
        moved = scheduler.step(model(x, times).sample, times, x).prev_sample
        assert torch.isfinite(moved).all() and scheduler.calls == 2
        with pytest.raises(ValueError, match="one time for the whole batch, got \\(2,\\)"):
            scheduler.step(x, torch.zeros(2), x)


def test_calls_of_the_network_outside_the_run_are_left_alone():
    scheduler, model = scheduler_for(), GaussianUNet()
    with attach(scheduler, model, solver_for(scheduler, 2)):
        model(torch.randn(2, 2, 4, 4), torch.tensor(7.0))  # before set_timesteps
        scheduler.set_timesteps(2)
        x = torch.randn(2, 2, 4, 4)
        scheduler.step(model(x, scheduler.timesteps[0]).sample, scheduler.timesteps[0], x)
        model(x, torch.tensor(7.0))
        model(torch.randn(3, 2, 4, 4), scheduler.timesteps[1])
        assert [seen.dim() for _, seen in model.seen] == [0, 0, 0, 0]
        model(sample=x, timestep=scheduler.timesteps[1])
        assert model.seen[-1][1].shape == (2,)


def test_detaching_leaves_no_hook():
    scheduler, model = scheduler_for(), unet(size=8)
    attachment = attach(scheduler, model, solver_for(scheduler, 2), feature="mid_block")
    assert model._forward_pre_hooks and model.mid_block._forward_hooks
    with pytest.raises(ValueError, match="has a predictor attached: detach it first"):
        attach(scheduler, model, solver_for(scheduler, 2))
    attachment.detach()
    attachment.detach()
    assert not model._forward_pre_hooks and not model.mid_block._forward_hooks and scheduler.attachment is None
    scheduler.set_timesteps(4)
    assert len(scheduler.timesteps) == 8


def test_a_bfloat16_pipeline_takes_a_predictor():
    scheduler = scheduler_for(diffusers.DDIMScheduler())
    pipe = quiet(dit(scheduler)).to(torch.bfloat16)
    with attach(scheduler, pipe, solver_for(scheduler, 2), feature="mid_block", passes=2):
        images = pipe([1, 2], 4.0, seeded(), num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(images).all()


def test_features_of_several_passes_are_averaged():
    module = torch.nn.Identity()
    features = PassFeatures(module)
    data = torch.zeros(2, 3)
    module(torch.tensor([[1.0], [2.0], [5.0], [8.0]]))
    assert features(data).tolist() == [[3.0], [5.0]]
    with pytest.raises(ValueError, match="whole copies of the 3 samples, but 4 rows went through"):
        features(torch.zeros(3, 3))
    again = PassFeatures(module, passes=2)
    with pytest.raises(ValueError, match="whole copies of the 2 samples, but no call went through"):
        again(data)
    module(torch.tensor([[1.0], [2.0], [5.0], [8.0]]))
    assert again(torch.zeros(4, 3)).tolist() == [[3.0], [5.0], [3.0], [5.0]]
    module(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="a batch of 3 is not 2 passes"):
        again(torch.zeros(3, 3))


def test_modules_for_features_are_found_by_name():
    transformer = dit(diffusers.DDIMScheduler()).transformer
    assert inner_module(transformer, "mid_block") is transformer.transformer_blocks[1]
    assert inner_module(transformer, "transformer_blocks.2") is transformer.transformer_blocks[2]
    net = unet()
    assert inner_module(net, "mid_block") is net.mid_block
    with pytest.raises(ValueError, match="UNet2DModel has no module 'middle': name one \\(it has conv_in, "):
        inner_module(net, "middle")
    with pytest.raises(ValueError, match="has no module ''"):
        inner_module(net, "")
    pipe = diffusers.DDPMPipeline(net, diffusers.DDPMScheduler())
    assert network_of(pipe) is net and sample_shape(net) == (3, 16, 16)
    with pytest.raises(TypeError, match="must be a network or a pipeline with a unet or a transformer, got int"):
        network_of(3)
    with pytest.raises(ValueError, match="shape must be given: the config of Linear"):
        sample_shape(torch.nn.Linear(1, 1))


def test_solvers_that_do_not_fit_are_refused():
    scheduler, model = scheduler_for(), GaussianUNet()
    with pytest.raises(ValueError, match="must have a predictor, got a table of coefficients: scheduler.store"):
        attach(scheduler, model, solver_for(scheduler, 2).static())
    with pytest.raises(ValueError, match="trained for another process"):
        attach(scheduler_for(diffusers.EDMEulerScheduler()), model, solver_for(scheduler, 2))
    with pytest.raises(ValueError, match=r"trained with afs=False \(here True\)"):
        attach(scheduler_for(afs=True), model, solver_for(scheduler, 2))
    with pytest.raises(ValueError, match="passes must be at least 1, got 0"):
        attach(scheduler, model, solver_for(scheduler, 2), passes=0)
    with pytest.raises(ValueError, match="Linear must take a timestep, but it takes input"):
        attach(scheduler, torch.nn.Linear(1, 1), solver_for(scheduler, 2))
    with attach(scheduler, model, solver_for(scheduler, 2, shape=(2, 8, 8))):
        with pytest.raises(
            ValueError, match="num_inference_steps must be 2, which the attached predictor was trained for, g"
        ):
            scheduler.set_timesteps(3)
        with pytest.raises(ValueError, match="times must be those of the attached predictor, \\[999, "):
            scheduler.set_timesteps(timesteps=[999, 400, 0])
        scheduler.set_timesteps(2)
        x = torch.randn(1, 2, 4, 4)
        with pytest.raises(ValueError, match=r"trained for, \(2, 8, 8\), got \(2, 4, 4\): train again, or store"):
            scheduler.step(x, scheduler.timesteps[0], x)
    assert not model._forward_pre_hooks


def test_guidance_is_one_call_of_both_passes():
    class Network(torch.nn.Module):
        calls = 0

        def forward(self, hidden_states, timestep, words, scale=1.0):
            self.calls += 1
            return (torch.cat([hidden_states * words + timestep[:, None] * scale, hidden_states], 1),)

    network = Network()
    x, t = torch.randn(3, 2), torch.tensor([1.0, 2.0, 3.0])
    model = guided(
        network, {"words": torch.tensor([[3.0]]), "scale": 2.0}, {"words": torch.tensor([[1.0]]), "scale": 2.0}, 4.0
    )
    assert torch.allclose(model(x, t), x + 2 * t[:, None] + 4.0 * (2 * x)) and network.calls == 1
    assert torch.allclose(guided(network, {"words": torch.full((3, 1), 3.0)})(x, t), 3 * x + t[:, None])
    with pytest.raises(
        ValueError, match=r"guidance_scale 4.0 needs unconditional with the names of conditions, \['words'\]"
    ):
        guided(network, {"words": x}, None, 4.0)


TINY = dict(base="amed", afs=False, extra=1, trajectories=4, batch=4, endpoint_iterations=2)


def test_training_from_a_pipeline_stores_coefficients_and_leaves_the_network(tmp_path):
    scheduler = AMEDScheduler.from_config(diffusers.DDPMScheduler(), base="amed")
    pipe = quiet(diffusers.DDPMPipeline(unet(size=8).train(), scheduler))
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    states = set()
    watch = pipe.unet.register_forward_pre_hook(
        lambda network, _: states.add((network.training, next(network.parameters()).requires_grad))
    )
    solver = scheduler.train(pipe, 2, recipe=AMEDRecipe(static=True, **TINY), held_out=2, progress=None)
    watch.remove()
    assert states == {(False, False)}  # in evaluation mode, and no graph of its weights
    assert scheduler.trained_steps == [2] and isinstance(solver.coefficients, AMEDTable)
    assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())
    assert pipe.unet.training and all(weight.requires_grad for weight in pipe.unet.parameters())
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    pipe.unet.eval()
    images = pipe(num_inference_steps=2, generator=seeded(), output_type="pt").images
    pipe.save_pretrained(tmp_path)
    again = quiet(diffusers.DDPMPipeline.from_pretrained(tmp_path))
    assert torch.equal(again.scheduler.grid(2), solver.times)
    assert torch.allclose(again(num_inference_steps=2, generator=seeded(), output_type="pt").images, images, atol=1e-3)
    with pytest.raises(ValueError, match="recipe must have base='amed' like the scheduler, got 'ipndm'"):
        scheduler.train(pipe, 2, recipe=AMEDRecipe())


def test_training_by_default_takes_the_schedulers_own_choices(monkeypatch):
    from danlu.diffusion import amed_training

    asked = {}

    def noted(denoiser, shape, steps, **options):
        asked.update(options, shape=shape, steps=steps)
        config = scheduler.config
        return AMED(denoiser.process, scheduler.grid(steps), AMEDTable((0.5,) * steps), config.base, None, config.afs)

    monkeypatch.setattr(amed_training, "train_amed", noted)
    scheduler = AMEDScheduler.from_config(diffusers.DDPMScheduler(), base="dpm++", afs=True, schedule="polynomial")
    scheduler.train(unet(), 3)
    recipe = asked["recipe"]
    assert (recipe.base, recipe.afs, recipe.spacing, recipe.static) == ("dpm++", True, "polynomial", True)
    assert asked["shape"] == (3, 16, 16) and asked["steps"] == 3 and scheduler.trained_steps == [3]


def test_training_lowers_the_distance_to_the_end_of_the_ode():
    model, mean, std = GaussianUNet(std=0.2), 0.3, 0.2
    scheduler = AMEDScheduler.from_config(diffusers.DDPMScheduler(), base="amed", schedule="logsnr")
    recipe = AMEDRecipe(
        static=True,
        base="amed",
        afs=False,
        spacing="logsnr",
        extra=14,
        trajectories=32,
        batch=16,
        endpoint_iterations=80,
    )
    scheduler.train(model, 2, recipe=recipe, held_out=16, progress=None)
    errors = {}
    for runner in (scheduler, scheduler_for(base="amed"), scheduler_for(base="amed", schedule="logsnr")):
        runner.set_timesteps(2)
        x = torch.randn(16, 2, 4, 4, generator=seeded(5)) * runner.init_noise_sigma
        process, times = runner.host.process, runner.grid(2)
        start, ratios = x / process.alpha(times[0]), process.noise_ratio(times)
        for t in runner.timesteps:
            x = runner.step(model(x, t).sample, t, x).prev_sample
        # the ODE of one Gaussian keeps (z - mean) / sqrt(std^2 + s^2)
        exact = mean + (start - mean) * ((std**2 + ratios[-1] ** 2) / (std**2 + ratios[0] ** 2)).sqrt()
        errors[runner] = float((x / process.alpha(times[-1]) - exact).flatten(1).norm(dim=1).mean())
    trained, *untrained = errors.values()
    assert trained < 0.3 * min(untrained)


def test_a_predictor_trained_from_a_pipeline_with_guidance_attaches(tmp_path):
    source = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    scheduler = AMEDScheduler.from_config(source, base="amed")
    pipe = quiet(stable_diffusion(scheduler, tmp_path))
    with torch.no_grad():
        words, nothing = pipe.encode_prompt("a cat", "cpu", 1, True)
    solver = scheduler.train(
        pipe,
        1,
        conditions={"encoder_hidden_states": words},
        unconditional={"encoder_hidden_states": nothing},
        guidance_scale=3.0,
        feature="mid_block",
        recipe=AMEDRecipe(**TINY),
        held_out=2,
        progress=None,
    )
    assert isinstance(solver.coefficients, AMEDPredictor) and isinstance(solver.features, Captured)
    assert not pipe.unet.mid_block._forward_hooks and scheduler.trained_steps == [1]
    with attach(scheduler, pipe, solver, feature="mid_block"):
        latents = pipe(
            "a cat", num_inference_steps=1, guidance_scale=3.0, generator=seeded(), output_type="latent"
        ).images
    assert torch.isfinite(latents).all() and scheduler.calls == 2
