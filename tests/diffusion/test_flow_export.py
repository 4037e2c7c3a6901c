"""Networks of diffusers as flows, and flows as pipelines of diffusers: sign and time."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from danlu.diffusion.flow import flow_matching_loss
from danlu.diffusion.flow_export import FlowNetwork, export_flow, flow_scheduler
from danlu.diffusion.hosts import process_from_scheduler
from danlu.diffusion.pair_cache import generate_pairs
from danlu.diffusion.processes import RectifiedFlow
from danlu.diffusion.reflow import distill, reflow
from danlu.diffusion.solvers import sample


def unet(**options):
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
            norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            **options,
        ).eval()  # fmt: skip


class Ball(nn.Module):
    """A network with no parameters whose output tells time, sign and input apart."""

    def forward(self, x, timestep):
        return (x.sin() + timestep.view(-1, *[1] * (x.dim() - 1)) / 1000,)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_the_grid_of_the_scheduler_is_ours(steps):
    scheduler = flow_scheduler(steps)
    scheduler.set_timesteps(steps)
    grid = torch.linspace(1, 0, steps + 1)
    assert torch.allclose(scheduler.sigmas, grid, atol=2e-6)
    assert torch.allclose(scheduler.timesteps, 1000 * grid[:-1], atol=2e-3)
    loaded = type(scheduler).from_config(dict(scheduler.config))
    loaded.set_timesteps(steps)
    assert torch.equal(loaded.sigmas, scheduler.sigmas)


@pytest.mark.parametrize("steps", [1, 4])
def test_scheduler_and_network_give_our_samples(steps):
    network, x1 = Ball(), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = sample(FlowNetwork(network), RectifiedFlow(), "velocity", solver="euler", steps=steps, noise=x1).samples
    scheduler, x = flow_scheduler(steps), x1
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(3))[0], t, x).prev_sample
    assert torch.allclose(x, ours, atol=1e-5)
    assert not torch.allclose(2 * x1 - x, ours, atol=1e-2)  # the other sign
    host = process_from_scheduler(scheduler)
    assert host.process == RectifiedFlow() and host.prediction == "velocity"


@pytest.mark.parametrize("steps", [1, 3])
def test_an_exported_pipeline_gives_our_samples(tmp_path, steps):
    from diffusers import DiffusionPipeline

    model = FlowNetwork(unet())
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "left-over").write_text("old")
    assert export_flow(model, tmp_path / "flow", steps) == tmp_path / "flow"
    assert not (tmp_path / "flow" / "left-over").exists()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "flow")
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="pt").images
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = sample(model, RectifiedFlow(), "velocity", solver="euler", steps=steps, noise=noise).samples
    assert torch.allclose(made, (ours / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert float(made.std()) > 0.1


def test_a_unet_is_reflowed_distilled_and_exported(tmp_path):
    model = FlowNetwork(unet())
    cache = generate_pairs(model, tmp_path / "pairs", 12, (1, 8, 8), seed=0, steps=2, batch_size=6)
    loader = DataLoader(cache, batch_size=6)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    first = list(reflow(model, loader, optimiser))
    for _ in range(8):
        last = list(distill(model, loader, optimiser, 2))
    assert len(first) == len(last) == 2 and last[0] < first[0]
    with pytest.raises(ValueError, match="weights of another model"):
        generate_pairs(model, tmp_path / "pairs", 12, (1, 8, 8), seed=0, steps=2, batch_size=6)
    with pytest.raises(ValueError, match="steps must be 2, which the model was distilled for, got 4"):
        export_flow(model, tmp_path / "flow", 4)
    export_flow(model, tmp_path / "flow")
    assert '"shift_terminal": 0.5' in (tmp_path / "flow" / "scheduler" / "scheduler_config.json").read_text()


def test_class_labels_are_conditions():
    model = FlowNetwork(unet(num_class_embeds=3))
    x0, x1 = torch.randn(2, 4, 1, 8, 8)
    t = torch.full((4,), 0.5)
    labels = torch.tensor([0, 1, 2, 0])
    loss = flow_matching_loss(model, x0, x1, t, condition={"class_labels": labels})
    other = flow_matching_loss(model, x0, x1, t, condition={"class_labels": labels.flip(0)})
    assert loss.shape == (4,) and not torch.allclose(loss, other)


def test_a_transformer_of_diffusers_serves():
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=1,
    ).eval()  # fmt: skip
    x = torch.randn(2, 1, 8, 8)
    out = FlowNetwork(network)(x, torch.tensor([0.1, 0.9]), class_labels=torch.tensor([1, 2]))
    expected = network(x, timestep=torch.tensor([100.0, 900.0]), class_labels=torch.tensor([1, 2])).sample
    assert out.shape == x.shape and torch.allclose(out, expected, atol=1e-6)


def test_code_in_which_one_is_data_is_turned_round():
    class Published(nn.Module):
        """Of data at one: dz/dt' = z' at t' = 1 - t, told 999 t'."""

        def forward(self, z, told):
            return z * (1 + told[:, None] / 999)

    model = FlowNetwork(Published(), 999, data_at_one=True)
    x1 = torch.tensor([[1.0], [-0.5]], dtype=torch.float64)
    ours = sample(model, RectifiedFlow(), "velocity", solver="euler", steps=5, noise=x1).samples
    z, network = x1, Published()
    for step in range(5):  # the published sampler, forwards from noise
        z = z + network(z, torch.full((2,), 999 * step / 5, dtype=torch.float64)) / 5
    assert torch.allclose(ours, z, atol=1e-12)


def test_a_bfloat16_network_gets_its_own_type_and_exact_times():
    seen = []

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x, timestep):
            seen.append((x.dtype, timestep))
            return x * self.scale

    flow_matching_loss(FlowNetwork(Half()), *torch.randn(2, 1, 3), torch.tensor([0.999]))
    assert seen[0][0] == torch.bfloat16 and torch.allclose(seen[0][1], torch.tensor([999.0]))


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = FlowNetwork(unet())
    with pytest.raises(ValueError, match="steps must be given for a model that was not distilled"):
        export_flow(model, tmp_path / "flow")
    for options in ({"time_scale": 999.0}, {"data_at_one": True}):
        with pytest.raises(ValueError, match="takes noise minus data, but this one has"):
            export_flow(FlowNetwork(unet(), **options), tmp_path / "flow", 2)
    with pytest.raises(TypeError, match="FlowNetwork around a UNet2DModel, got Ball"):
        export_flow(FlowNetwork(Ball()), tmp_path / "flow", 2)
    with pytest.raises(TypeError, match="got UNet2DModel"):
        export_flow(unet(), tmp_path / "flow", 2)
    for steps in (0, 1001, 2.0):
        with pytest.raises(ValueError, match="steps must be an integer in 1..1000"):
            flow_scheduler(steps)
    with pytest.raises(ValueError, match="time_scale must be above 0"):
        FlowNetwork(Ball(), 0)
    assert not (tmp_path / "flow").exists()


def test_a_missing_diffusers_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "danlu\[diffusion\]"'):
        flow_scheduler(2)
    with pytest.raises(ImportError, match=r'pip install "danlu\[diffusion\]"'):
        export_flow(FlowNetwork(Ball()), tmp_path, 2)
