"""Whole runs of small image models: equal after a kill, loadable by the host, and refused before work begins."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline

import danlu.training.diffusion
from danlu.diffusion.class_pipeline import ClassPipeline, guided
from danlu.diffusion.processes import RectifiedFlow
from danlu.diffusion.schedulers import AMEDScheduler
from danlu.diffusion.solvers import sample
from danlu.training.diffusion import trained_image_model
from danlu.training.diffusion_model import ImageModel, build_scheduler, build_unet
from danlu.training.diffusion_report import draw_errors, sample_images, solver_errors, trained_amed
from danlu.training.image_tables import ImageRecipe, Network, Noise, load_image_recipe, parse_image_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "sample").glob("*.toml"))
SMALL = ["network.channels=[8]", "network.attention=none", "training.batch=4", "training.warmup=2"]


def recipe(*settings: str) -> ImageRecipe:
    return load_image_recipe("digits", [*SMALL, "training.steps=6", "training.save_every=2", *settings])


def weights(model: ImageModel) -> dict[str, torch.Tensor]:
    return model.unet.state_dict()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    return out, trained_image_model(recipe(), out)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plain"
    return out, trained_image_model(recipe("data.classes=false"), out)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_train(path, tmp_path):
    settings = [*SMALL, "training.steps=2", "data.source=digits", "data.resize=false", "data.size=8"]
    read = load_image_recipe(path, settings)
    assert read.name == path.stem
    assert load_image_recipe(path).noise == read.noise
    model = trained_image_model(read, tmp_path / "run")
    assert len(json.loads((tmp_path / "run" / "training.json").read_text())["losses"]) == 2
    output, _, _ = sample_images(model, 2, steps=3)
    assert output.samples.shape == (2, 1, 8, 8) and bool(torch.isfinite(output.samples).all())


def test_recipes_are_documented_and_the_default_is_one_of_them():
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")
    assert RECIPES
    for path in RECIPES:
        assert f"recipes/sample/{path.name}" in page
    shipped = next(path for path in RECIPES if path.stem == "digits")
    assert load_image_recipe(shipped) == ImageRecipe()


def test_a_trained_model_is_found_again(run, monkeypatch):
    out, model = run
    assert sorted(path.name for path in out.iterdir()) == ["model", "recipe.json", "training.json"]
    monkeypatch.setattr(danlu.training.diffusion, "read_images", None)  # nothing is read, let alone trained
    again = trained_image_model(recipe(), out)
    for name, value in weights(model).items():
        assert torch.equal(weights(again)[name], value)
    assert again.classes == model.classes == tuple("0123456789")


def test_two_runs_are_equal_and_so_is_one_that_was_killed(run, tmp_path):
    _, model = run

    class Kill(Exception):
        pass

    def kill(done, total, what):
        if done == 5:
            raise Kill

    with pytest.raises(Kill):
        trained_image_model(recipe(), tmp_path / "run", progress=kill)
    assert (tmp_path / "run" / "checkpoint.pt").is_file() and not (tmp_path / "run" / "model").exists()
    steps = []
    resumed = trained_image_model(recipe(), tmp_path / "run", progress=lambda done, total, what: steps.append(done))
    assert steps == [5, 6]
    for name, value in weights(model).items():
        assert torch.equal(weights(resumed)[name], value)
    other = trained_image_model(recipe("training.seed=1"), tmp_path / "other")
    assert any(not torch.equal(weights(other)[name], value) for name, value in weights(model).items())


def test_the_saved_weights_are_the_average(run, monkeypatch, tmp_path):
    """With decays of at most 0 the average is the last step; the run's own lies elsewhere."""
    _, model = run
    last = trained_image_model(recipe("training.ema=0"), tmp_path / "run")
    assert any(not torch.equal(weights(last)[name], value) for name, value in weights(model).items())


@pytest.mark.parametrize(("share", "learnt", "kept"), [(1.0, 10, slice(0, 10)), (0.0, slice(0, 10), 10)])
def test_hidden_classes_teach_the_model_without_class(share, learnt, kept, tmp_path):
    steps = ["training.steps=2", "training.warmup=0", "training.batch=64", "training.ema=0"]
    read = recipe(f"training.label_dropout={share}", *steps)
    before = build_unet(read.network, 8, 1, 10, read.training.seed).class_embedding.weight.detach()
    moved = (trained_image_model(read, tmp_path / "run").unet.class_embedding.weight - before).abs()
    assert float(moved[learnt].mean()) > 20 * float(moved[kept].mean())


def test_the_learning_rate_rises_and_falls_on_a_cosine(tmp_path):
    fit = recipe("training.steps=110", "training.warmup=10").training
    shares = [danlu.training.diffusion._factor(fit, step) for step in (0, 9, 10, 60, 109)]
    assert shares == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0], abs=1e-3)
    models = [trained_image_model(recipe(f"training.warmup={warmup}"), tmp_path / str(warmup)) for warmup in (0, 6)]
    assert any(not torch.equal(weights(models[0])[name], value) for name, value in weights(models[1]).items())


def test_schedulers_stand_for_the_processes_of_their_names():
    place = torch.tensor([100, 500, 900])
    share = (place + 1) / 1000
    expected = {
        "linear": -0.5 * (0.1 * share + 9.95 * share**2),
        "cosine": (torch.cos((share + 0.008) / 1.008 * torch.pi / 2) / math.cos(0.008 / 1.008 * torch.pi / 2)).log(),
    }
    for kind, log_alpha in expected.items():
        host = ImageModel(None, build_scheduler(Noise(kind=kind)), ()).host
        torch.testing.assert_close(host.process.log_alpha(place), log_alpha.double(), rtol=0.02, atol=0)
        assert host.prediction == "v"
    flow = ImageModel(None, build_scheduler(Noise(kind="flow", prediction="velocity")), ()).host
    assert isinstance(flow.process, RectifiedFlow) and flow.prediction == "velocity"
    assert float(flow.timestep(0.25)) == 250


def test_other_recipes_changed_images_and_foreign_folders_are_refused(run, tmp_path, monkeypatch):
    out, _ = run
    with pytest.raises(ValueError, match="holds the run of another recipe, which differs in training.steps"):
        trained_image_model(recipe("training.steps=7"), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be an empty folder or that of a run"):
        trained_image_model(recipe(), tmp_path / "full")

    def stop(done, total, what):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_image_model(recipe(), tmp_path / "run", progress=stop)
    read = danlu.training.diffusion.read_images

    def changed(data):
        images = read(data)
        images.pixels[0] += 1
        return images

    monkeypatch.setattr(danlu.training.diffusion, "read_images", changed)
    with pytest.raises(ValueError, match="the images have changed since .*checkpoint.pt was written"):
        trained_image_model(recipe(), tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trainig": {}}, "unknown key 'trainig'; the nearest known one is 'training'"),
        ({"training": {"step": 3}}, "unknown key 'training.step'; the nearest known one is 'steps'"),
        ({"training": {"steps": 0}}, "training.steps should be greater than or equal to 1, got 0"),
        ({"noise": {"kind": "flow"}}, "noise.prediction must be 'velocity' for the kind 'flow'"),
        ({"noise": {"prediction": "velocity"}}, "noise.prediction must be 'velocity' for the kind 'flow' and another"),
        ({"network": {"channels": [12]}}, r"network.channels must be multiples of 8, got \[12\]"),
        ({"data": {"resize": True}}, "data.resize needs data.size"),
    ],
)
def test_bad_recipes_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        parse_image_recipe(values)


def test_a_side_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="a side that can be halved 2 times for 3 levels, got 6"):
        build_unet(Network(channels=(8, 8, 8)), 6, 1, 0, 0)


def test_the_host_loads_the_folder_and_samples_the_same_images(unconditional):
    """DDIM by diffusers and by danlu, from one noise, over the same times."""
    out, model = unconditional
    pipeline = DDPMPipeline.from_pretrained(out / "model")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.scheduler.set_timesteps(4)
    times = pipeline.scheduler.timesteps.double()  # 999, 749, 499, 249, and then the end of the table
    ours = sample(model.denoiser(), solver="ddim", times=torch.cat([times, times.new_zeros(1)]), noise=noise)
    expected = torch.from_numpy(images.images).permute(0, 3, 1, 2)
    torch.testing.assert_close((ours.samples / 2 + 0.5).clamp(0, 1), expected, atol=2e-3, rtol=0)


def test_a_learned_scheduler_goes_into_the_pipeline(unconditional, run):
    out, _ = unconditional
    pipeline = ClassPipeline.from_pretrained(out / "model")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = AMEDScheduler.from_config(pipeline.scheduler.config, untrained="midpoint")
    images = pipeline(batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert images.images.shape == (2, 1, 8, 8) and len(pipeline.scheduler.timesteps) == 4
    assert float(images.images.std()) > 0.01


def test_the_class_pipeline_draws_what_the_denoiser_draws(run):
    out, model = run
    assert type(DiffusionPipeline.from_pretrained(out / "model")) is DDPMPipeline
    pipeline = ClassPipeline.from_pretrained(out / "model")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 8, 8)
    given = {"class_labels": [3, 7], "guidance_scale": 2.0, "num_inference_steps": 4}
    images = pipeline(**given, latents=noise, output_type="pt").images
    times = torch.tensor([999.0, 749, 499, 249, 0], dtype=torch.float64)
    ours = sample(model.denoiser(torch.tensor([3, 7]), 2.0), solver="ddim", times=times, noise=noise)
    torch.testing.assert_close((ours.samples / 2 + 0.5).clamp(0, 1), images, atol=2e-3, rtol=0)
    assert pipeline(**given, generator=torch.Generator().manual_seed(0)).images[0].size == (8, 8)
    assert pipeline(num_inference_steps=1, batch_size=3, return_dict=False)[0][2].size == (8, 8)


@torch.no_grad()
def test_guidance_is_a_line_through_both_predictions(run):
    unet = copy.deepcopy(run[1].unet)
    # Two steps of training tell classes apart by less than a test can see.
    unet.class_embedding.weight.mul_(30)
    unet.conv_out.weight.mul_(30)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([300.0, 700.0]), torch.tensor([1, 8])
    of_class = unet(x, t, class_labels=labels).sample
    of_none = unet(x, t, class_labels=torch.tensor([10, 10])).sample
    assert float((of_class - of_none).abs().max()) > 0.1
    for weight in (0.0, 1.0, 2.5):
        expected = of_none + weight * (of_class - of_none)
        torch.testing.assert_close(guided(unet, x, t, labels, weight), expected, atol=1e-4, rtol=1e-4)


def test_bad_classes_are_refused(run, unconditional):
    _, model = run
    _, plain = unconditional
    with pytest.raises(ValueError, match="class must be one of 0, 1, .* got 'x'"):
        sample_images(model, 2, classes=["x"])
    with pytest.raises(ValueError, match="trained without classes"):
        sample_images(plain, 2, classes=["1"])
    with pytest.raises(ValueError, match="guidance 2 needs a model that was trained with classes"):
        sample_images(plain, 2, guidance=2.0)
    pipeline = ClassPipeline(plain.unet, plain.scheduler)
    with pytest.raises(ValueError, match="need a model with classes"):
        pipeline(class_labels=[1])
    pipeline = ClassPipeline(model.unet, model.scheduler)
    with pytest.raises(ValueError, match=r"class_labels must be in 0..9 \(10 is no class\), got \[11\]"):
        pipeline(class_labels=[11])
    with pytest.raises(ValueError, match="guidance_scale 2.0 needs class_labels"):
        pipeline(guidance_scale=2.0)


def test_labels_go_around_the_named_classes(run):
    _, model = run
    assert model.labels(["3", "5"], 5).tolist() == [3, 5, 3, 5, 3]
    assert model.labels([], 12).tolist() == [*range(10), 0, 1]


def test_solver_errors_fall_with_the_calls(run, monkeypatch):
    monkeypatch.setattr(danlu.training.diffusion_report, "REFERENCE_STEPS", 40)
    monkeypatch.setattr(danlu.training.diffusion_report, "BUDGETS", (4, 24))
    _, model = run
    noise = torch.randn(2, 1, 8, 8)
    errors = solver_errors(model.denoiser(model.labels(["1"], 2)), noise, ["ddim", "heun"])
    assert list(errors) == ["ddim", "heun"]
    for values in errors.values():
        assert list(values) == [4, 24] and values[24] < values[4]
    axes = draw_errors(errors).axes[0]
    assert [line.get_label() for line in axes.lines] == ["ddim", "heun"]


def test_amed_is_trained_for_the_model(run, monkeypatch):
    import danlu.diffusion.amed_training as training

    _, model = run
    made = training.AMEDRecipe
    monkeypatch.setattr(
        training,
        "AMEDRecipe",
        lambda **words: made(**{**words, "endpoint_iterations": 2, "trajectories": 4, "batch": 4, "extra": 1}),
    )
    amed = trained_amed(model, 2)
    output, denoiser, noise = sample_images(model, 3, solver=amed)
    assert output.evaluations == 3 and output.samples.shape == (3, 1, 8, 8)
    monkeypatch.setattr(danlu.training.diffusion_report, "REFERENCE_STEPS", 6)
    errors = solver_errors(denoiser, noise, [], amed=amed)
    assert list(errors["amed"]) == [3] and 0 < errors["amed"][3] < 10
    start, end = float(amed.times[0]), float(amed.times[-1])
    assert (start, end) == (999, 0)  # the ends of all other solvers, or the distances would not compare
