"""QB-Heat as a model: what the encoder sees, what it learns from, and its life in the host library."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    ResNetBackbone,
    ResNetConfig,
    ResNetModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from danlu.vision.qb_heat import QBHeatConfig, QBHeatForPreTraining, SmallDecoder
from danlu.vision.quarter_block import QuarterBlockMasker
from reference import heat

CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")


class Patches(nn.Module):
    """One linear map of each patch: a cell depends on its own pixels alone."""

    def __init__(self, channels=6, stride=4, image_channels=1):
        super().__init__()
        self.conv = nn.Conv2d(image_channels, channels, stride, stride)
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.conv(images)


def model(backbone=None, decoder=None, **options):
    options = {"size": 16, "image_channels": 1, "decoder_width": 8, **options}
    return QBHeatForPreTraining(backbone or Patches(), decoder, QBHeatConfig(**options))


def stir(made, scale=0.1):
    """Move the fill away from its start at zero."""
    with torch.no_grad():
        for parameter in made.fill.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
        made.positions.add_(0.1 * torch.randn_like(made.positions))
    return made


def images(batch=4, size=16, channels=1):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


# --- the masker ------------------------------------------------------------------------------------------------------


def test_blocks_lie_where_their_names_say():
    masker = QuarterBlockMasker(16, 2)
    pixels = torch.arange(256.0).view(1, 1, 16, 16)
    starts = {"top-left": (0, 0), "top-right": (0, 8), "bottom-left": (8, 0), "bottom-right": (8, 8), "centre": (4, 4)}
    for name, (top, left) in starts.items():
        k = masker.index(name)
        assert torch.equal(masker.crop(pixels, k), pixels[..., top : top + 8, left : left + 8])
        hidden = torch.ones(8, 8, dtype=torch.bool)
        hidden[top // 2 : top // 2 + 4, left // 2 : left // 2 + 4] = False
        assert torch.equal(masker.hidden(k), hidden)


def test_oblong_images_and_own_positions_and_an_uneven_centre():
    masker = QuarterBlockMasker((12, 24), 2, ["centre", (2, 6)])
    pixels = torch.arange(288.0).view(1, 1, 12, 24)
    assert torch.equal(masker.crop(pixels, 0), pixels[..., 2:8, 6:18])
    assert torch.equal(masker.crop(pixels, masker.index((2, 6))), pixels[..., 2:8, 6:18])


def test_split_shows_four_corners_which_join_to_one_map():
    masker = QuarterBlockMasker(16, 2, ["split"])
    pixels = images(3)
    blocks = masker.crop(pixels, 0)
    assert blocks.shape == (12, 1, 4, 4)
    assert torch.equal(blocks[3:6], pixels[..., :4, 12:]) and torch.equal(blocks[6:9], pixels[..., 12:, :4])
    joined = masker.join(F.avg_pool2d(blocks, 2), 0)
    keep = [0, 1, 6, 7]
    assert torch.equal(joined, F.avg_pool2d(pixels, 2)[:, :, keep][..., keep])
    assert masker.hidden(0).sum() == 64 - 16 and not masker.hidden(0)[0, 7]


def test_positions_are_drawn_evenly_and_by_the_seed():
    masker = QuarterBlockMasker(16, 4)
    drawn = [masker.draw(f"0/{n}") for n in range(1000)]
    assert drawn == [masker.draw(f"0/{n}") for n in range(1000)] != [masker.draw(f"1/{n}") for n in range(1000)]
    assert torch.tensor(drawn).bincount().min() > 150
    assert masker.draw("0", 1000).bincount().min() > 150


def test_the_masker_names_bad_input():
    with pytest.raises(ValueError, match=r"even number of cells to halve, got \(224, 224\); resize to 256"):
        QuarterBlockMasker(224, 32)
    with pytest.raises(ValueError, match=r"a block at \(3, 0\) is not aligned: .* the stride 4"):
        QuarterBlockMasker(16, 4, [(3, 0)])
    with pytest.raises(ValueError, match="is not aligned"):
        QuarterBlockMasker(16, 4, [(12, 0)])
    with pytest.raises(ValueError, match="among top-left"):
        QuarterBlockMasker(16, 4, ["middle"])
    with pytest.raises(ValueError, match="at least one block"):
        QuarterBlockMasker(16, 4, [])
    with pytest.raises(ValueError, match="alone"):
        QuarterBlockMasker(16, 4, ["split", "centre"])
    with pytest.raises(ValueError, match="multiple of 16 pixels for 'split'"):
        QuarterBlockMasker(24, 4, ["split"])
    with pytest.raises(ValueError, match="at least 1"):
        QuarterBlockMasker(16, 0)
    masker = QuarterBlockMasker(16, 4)
    with pytest.raises(ValueError, match="position must be one of"):
        masker.index("split")
    with pytest.raises(ValueError, match=r"a list of sizes \[\(16, 16\), \(20, 16\)\]; resize or crop"):
        masker.check([torch.zeros(1, 16, 16), torch.zeros(1, 20, 16)])
    with pytest.raises(ValueError, match=r"images must be \(batch, channels, 16, 16\), got \(1, 1, 16, 20\)"):
        masker.crop(torch.zeros(1, 1, 16, 20), 0)
    with pytest.raises(TypeError, match="got str"):
        masker.check("image.png")


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["mask", "copy", "linear", "quadratic"])
def test_the_encoder_sees_the_block_alone_and_learns_from_hidden_cells(fill):
    made = model(fill=fill).train()
    pixels = images().requires_grad_()
    for name in made.masker.positions:
        made.backbone.seen.clear()
        image = made(pixels, position=name).reconstruction
        (seen,) = made.backbone.seen
        assert torch.equal(seen, made.masker.crop(pixels, made.masker.index(name)))
        hidden = ~made(pixels, position=name).mask[0]
        (gradient,) = torch.autograd.grad(image.square().sum(), pixels, retain_graph=True)
        assert (gradient[:, 0, hidden] != 0).any() and (gradient[:, 0, ~hidden] == 0).all()
    # The far corner of the map is four cells from the block; only a fill carries its gradient back.
    cells = made.filled(pixels, made.masker.index("top-left"))
    found = torch.autograd.grad(cells[..., -1, -1].sum(), made.backbone.conv.weight, allow_unused=True)[0]
    assert (found is None or not found.any()) if fill == "mask" else found.any()


def test_the_fill_is_the_operator_on_the_encoded_block():
    made = stir(model(mode="inverse")).double()
    pixels = images().double()
    eye = torch.eye(6, dtype=torch.float64)
    across, along = ((eye + matrix.detach()).numpy() for matrix in (made.fill.a, made.fill.b))
    for position in ("bottom-left", "centre"):
        k = made.masker.index(position)
        block = made.backbone.conv(made.masker.crop(pixels, k))
        found = made.filled(pixels, k)
        corner = made.masker.visible[k].corner
        for i in range(len(pixels)):
            expected = heat.fill(
                block[i].detach().numpy(),
                *corner,
                4,
                4,
                lambda n: heat.power(across, n),
                lambda n: heat.power(along, n),
            )
            assert torch.allclose(found[i], torch.tensor(expected), atol=1e-10)


@pytest.mark.parametrize("fill", ["mask", "copy"])
def test_the_other_fills_are_what_they_say(fill):
    made = model(fill=fill)
    k = made.masker.index("top-right")
    block = made.backbone.conv(made.masker.crop(images(), k))
    found = made.filled(images(), k)
    assert torch.allclose(found[..., :2, 2:], block, atol=1e-6)
    if fill == "copy":
        assert torch.allclose(found, F.pad(block, (2, 0, 0, 2), mode="replicate"), atol=1e-6)
    else:
        hidden = made.masker.hidden(k)
        assert torch.equal(found[..., hidden], made.mask_token[None, :, None].expand(4, 6, 12))


def test_copy_is_linear_with_zero_matrices():
    torch.manual_seed(0)
    backbone, pixels = Patches(), images()
    losses = [model(copy.deepcopy(backbone), fill=fill)(pixels).loss for fill in ("copy", "linear")]
    assert torch.equal(*losses)


def test_interpolation_between_four_corners_is_exact_for_bilinear_maps():
    class Ramp(nn.Module):
        def forward(self, images):
            return F.avg_pool2d(images, 2)

    made = model(Ramp(), fill="interpolate", size=16)
    assert made.config.positions == ("split",) and made.masker.stride == 2
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    pixels = (1 + 2 * x - 3 * y + 0.1 * x * y)[None, None]
    assert torch.allclose(made.filled(pixels, 0), F.avg_pool2d(pixels, 2), atol=1e-4)
    copied = model(Ramp(), fill="copy", positions=["split"], size=16)
    near = torch.tensor([0, 1, 1, 1, 6, 6, 6, 7])
    assert torch.equal(copied.filled(pixels, 0), F.avg_pool2d(pixels, 2)[:, :, near][..., near])
    assert torch.isfinite(model(Ramp(), fill="mask", positions=["split"], size=16)(pixels).loss)


def test_positions_for_each_image_give_what_positions_for_the_batch_give():
    made = stir(model()).eval()
    pixels = images(7)
    numbers = torch.tensor([3, 0, 4, 0, 1, 2, 3])
    each = made.filled(pixels, numbers)
    for i, k in enumerate(numbers.tolist()):
        assert torch.allclose(each[i], made.filled(pixels[i : i + 1], k)[0], atol=1e-6)
    out = made(pixels, position=numbers)
    single = [made(pixels[i : i + 1], position=made.masker.positions[k]).loss for i, k in enumerate(numbers.tolist())]
    assert torch.allclose(out.loss, torch.stack(single).mean(), atol=1e-6)
    # In evaluation without a position, images take turns.
    assert torch.equal(made(pixels).loss, made(pixels, position=torch.arange(7) % 5).loss)


def test_training_draws_a_position_that_a_checkpoint_goes_on_with():
    made = model(per_sample=False).train()
    masks = [made(images()).mask for _ in range(6)]
    assert all((mask == mask[0]).all() for mask in masks)
    other = model().train()
    assert all(torch.equal(other(images()).mask, mask) for mask in masks[:3])
    twin = model().train()
    twin.load_state_dict(other.state_dict())
    assert all(torch.equal(twin(images()).mask, mask) for mask in masks[3:])
    assert len({tuple(mask[0].flatten().tolist()) for mask in masks}) > 1
    mixed = model(per_sample=True).train()(images(16)).mask
    assert len({tuple(mask.flatten().tolist()) for mask in mixed}) > 1


def test_losses_are_what_they_say():
    pixels = images()
    made = model()
    out = made(pixels, position="top-left")
    error = (out.reconstruction - pixels) ** 2
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[:8, :8] = False
    assert torch.equal(out.mask, outside.expand(4, 16, 16))
    assert torch.allclose(out.loss, error[:, 0, outside].mean())
    made.config.loss_on = "all"
    assert torch.allclose(made(pixels, position="top-left").loss, error.mean())
    assert made(pixels, return_loss=False).loss is None
    assert isinstance(made(pixels, return_dict=False), tuple)


def test_normalised_targets_are_those_of_each_patch():
    pixels = images(2, 8, 3)
    made = model(Patches(image_channels=3), image_channels=3, size=8, normalise_targets=True, loss_on="all")
    out = made(pixels)
    target = torch.empty_like(pixels)
    for b in range(2):
        for top in (0, 4):
            for left in (0, 4):
                patch = pixels[b, :, top : top + 4, left : left + 4]
                target[b, :, top : top + 4, left : left + 4] = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    assert torch.allclose(out.loss, (out.reconstruction - target).square().mean(), atol=1e-5)


def test_extra_losses_are_added_with_their_weights():
    made = stir(model())
    pixels, name = images(), "top-right"
    plain = made(pixels, position=name).loss
    made.config.commutator = 0.5
    assert torch.allclose(made(pixels, position=name).loss, plain + 0.5 * made.fill.commutator_penalty())
    made.config.commutator, made.config.feature = 0.0, 2.0
    k = made.masker.index(name)
    gap = (made.filled(pixels, k) - made.backbone.conv(pixels)).square().mean(1)[:, made.masker.hidden(k)].mean()
    made.zero_grad()
    loss = made(pixels, position=name).loss
    assert torch.allclose(loss, plain + 2.0 * gap)
    loss.backward()
    found = made.backbone.conv.weight.grad.clone()
    # No gradient reaches the map of the whole image.
    made.zero_grad()
    whole = made.backbone.conv(pixels).detach()
    gap = (made.filled(pixels, k) - whole).square().mean(1)[:, made.masker.hidden(k)].mean()
    made.config.feature = 0.0
    (made(pixels, position=name).loss + 2.0 * gap).backward()
    assert torch.allclose(made.backbone.conv.weight.grad, found, atol=1e-6)


def test_a_few_steps_learn_and_bfloat16_keeps_the_operators_in_float32():
    made = model(mode="inverse").bfloat16().train()
    assert made.fill.a.dtype == torch.float32 and made.backbone.conv.weight.dtype == torch.bfloat16
    out = made(images().bfloat16())
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)
    made = model().train()
    optimiser = torch.optim.AdamW(made.parameter_groups(0.1), lr=1e-2)
    x = torch.arange(16.0)
    pixels = torch.sin(0.5 * x[:, None] + 0.3 * x + torch.arange(8.0)[:, None, None])[:, None]
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        losses.append(made(pixels).loss)
        losses[-1].backward()
        optimiser.step()
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    free = {id(p) for p in made.parameter_groups(0.1)[1]["params"]}
    assert {id(p) for p in (*made.fill.parameters(), made.positions, made.backbone.conv.bias)} <= free
    assert id(made.backbone.conv.weight) not in free
    assert sum(len(group["params"]) for group in made.parameter_groups(0.1)) == len(list(made.parameters()))


# --- backbones of the host library -----------------------------------------------------------------------------------

RESNET = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=3, out_features=["stage2"]
)
CONVNEXT = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4)
VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
)
HOSTS = {
    "resnet": (lambda: ResNetModel(RESNET), 8, 16),
    "resnet backbone": (lambda: ResNetBackbone(RESNET), 8, 16),
    "convnext": (lambda: ConvNextModel(CONVNEXT), 8, 16),
    "vit": (lambda: ViTModel(VIT, add_pooling_layer=False), 8, 16),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_backbones_of_the_host_library_are_read_saved_and_exported(kind, tmp_path):
    build, stride, channels = HOSTS[kind]
    backbone = build()
    made = model(backbone, size=32, image_channels=3).train()
    assert made.masker.stride == stride and made.fill.channels == channels
    assert backbone.training
    pixels = images(2, 32, 3)
    made(pixels).loss.backward()
    without = {name for name, p in made.backbone.named_parameters() if p.grad is None}
    # The norm of ConvNext's pooled output takes no part.
    assert without == ({"layernorm.weight", "layernorm.bias"} if kind == "convnext" else set())
    made = stir(made).eval()
    assert made.encode(pixels).shape == (2, channels, 4, 4)
    out = made(pixels)
    made.save_pretrained(tmp_path)
    loaded = QBHeatForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels).reconstruction, out.reconstruction) and not loaded.training
    encoder = made.export_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    again = type(encoder).from_pretrained(tmp_path / "encoder").eval()
    mine, theirs = (encoder(pixel_values=pixels), again(pixel_values=pixels))
    first = (lambda out: out.feature_maps[-1]) if kind == "resnet backbone" else (lambda out: out.last_hidden_state)
    assert torch.equal(first(mine), first(theirs))
    read = first(mine)[:, 1:].mT.unflatten(2, (4, 4)) if kind == "vit" else first(mine)
    assert torch.allclose(made.encode(pixels), read, atol=1e-6)


def test_own_modules_and_decoders_are_handed_over_on_loading(tmp_path):
    decoder = nn.Sequential(nn.Conv2d(6, 16, 1), nn.PixelShuffle(4))
    made = stir(model(decoder=decoder, positions=["centre", (4, 8)])).eval()
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["fill"] == "linear" and saved["backbone_record"] is None
    with pytest.raises(ValueError, match="backbone must be given"):
        QBHeatForPreTraining.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights of another backbone or decoder"):
        QBHeatForPreTraining.from_pretrained(tmp_path, Patches())
    other = nn.Sequential(nn.Conv2d(6, 16, 1), nn.PixelShuffle(4))
    loaded = QBHeatForPreTraining.from_pretrained(tmp_path, Patches(), other)
    assert loaded.config.positions == ("centre", (4, 8)) and loaded.config.size == (16, 16)
    assert torch.equal(loaded(images()).reconstruction, made(images()).reconstruction)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        QBHeatForPreTraining.from_pretrained(tmp_path / "nothing")


def test_the_hosts_trainer_trains_evaluates_and_resumes(tmp_path):
    made = model(ConvNextModel(CONVNEXT), size=32, image_channels=3)
    data = [{"pixel_values": image} for image in images(8, 32, 3)]

    def trainer(model, steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, save_steps=2, report_to=[],
            logging_steps=1, use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)

    start = copy.deepcopy(made)
    first = trainer(made, 4)
    first.train()
    assert first.evaluate()["eval_loss"] > 0 and made._draws == 4
    saved = QBHeatForPreTraining.from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), made.parameters(), strict=True))
    second = trainer(start, 4)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    gaps = [(a - b).abs().max() for a, b in zip(start.parameters(), made.parameters(), strict=True)]
    assert max(gaps) < 1e-6


def test_gradient_checkpointing_reaches_the_backbone():
    made = model(ViTModel(VIT, add_pooling_layer=False), size=32, image_channels=3).train()
    pixels = images(2, 32, 3)
    made(pixels, position="centre").loss.backward()
    plain = [p.grad.clone() for p in made.parameters()]
    made.zero_grad()
    made.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in made.backbone.modules())
    made(pixels, position="centre").loss.backward()
    assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(made.parameters(), plain, strict=True))


@pytest.mark.parametrize("fill", ["mask", "copy", "linear", "quadratic", "interpolate"])
def test_every_fill_runs_under_autocast(fill):
    made = model(fill=fill).train()
    plain = made(images(), position=made.masker.positions[-1]).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = made(images(), position=made.masker.positions[-1])
    assert out.loss.dtype == torch.float32 and out.reconstruction.dtype == torch.bfloat16
    assert torch.allclose(out.loss, plain, rtol=0.03)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_accelerate_prepares_it():
    from accelerate import Accelerator

    made = model()
    accelerator = Accelerator(cpu=True)
    prepared, optimiser = accelerator.prepare(made, torch.optim.AdamW(made.parameter_groups(0.0), lr=1e-2))
    before = made.fill.a.detach().clone()
    for _ in range(2):
        accelerator.backward(prepared(images()).loss)
        optimiser.step()
        optimiser.zero_grad()
    assert not torch.equal(made.fill.a, before)


def test_the_global_random_state_stays_as_it_was():
    backbone = Patches()
    before = torch.random.get_rng_state()
    made = model(backbone, fill="mask").train()
    made(images())
    assert torch.equal(torch.random.get_rng_state(), before)
    again = model(copy.deepcopy(backbone), fill="mask")
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    other = model(copy.deepcopy(backbone), fill="mask", seed=1)
    assert not torch.equal(made.mask_token, other.mask_token)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_backbones_without_a_map_are_refused():
    with pytest.raises(ValueError, match="pooling"):
        model(nn.Sequential(Patches(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(ValueError, match="pools its map to one cell"):
        model(nn.Sequential(Patches(), nn.AdaptiveAvgPool2d(1)))
    with pytest.raises(ValueError, match="must be half the map"):
        model(nn.Conv2d(1, 4, 3, 2))
    with pytest.raises(ValueError, match="must be half the map"):
        model(nn.Conv2d(1, 4, (4, 2), (4, 2)))
    with pytest.raises(ValueError, match=r"stride must be that of Patches.*a stride of 4 x 4, got 8"):
        model(Patches(), stride=8)
    with pytest.raises(ValueError, match="must be even"):
        model(Patches(), size=15)

    class Pair(Patches):
        def forward(self, images):
            return self.conv(images), 0

    with pytest.raises(TypeError, match="got tuple"):
        model(Pair())

    class Many(Patches):
        def forward(self, images):
            return [images, self.conv(images)]

    assert model(Many()).masker.stride == 4


def test_odd_maps_are_refused():
    with pytest.raises(ValueError, match="half the map"):
        model(Patches(), size=(12, 16))
    with pytest.raises(ValueError, match="half the map"):
        model(Patches(), size=20)
    with pytest.raises(ValueError, match="half the map"):
        model(ViTModel(VIT, add_pooling_layer=False), size=24, image_channels=3)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="fill must be one of mask, copy, linear, quadratic, interpolate, got 'heat'"):
        QBHeatConfig(fill="heat")
    with pytest.raises(ValueError, match="mode must be one of"):
        QBHeatConfig(mode="none")
    with pytest.raises(ValueError, match="loss_on must be one of"):
        QBHeatConfig(loss_on="visible")
    for fill, positions in (("interpolate", CORNERS), ("linear", ["split"])):
        with pytest.raises(ValueError, match="positions must be"):
            QBHeatConfig(fill=fill, positions=positions)
    with pytest.raises(ValueError, match="commutator must be at least 0"):
        QBHeatConfig(commutator=-1)
    with pytest.raises(ValueError, match="commutator needs"):
        QBHeatConfig(commutator=1.0, fill="copy")
    with pytest.raises(ValueError, match=r"decoder must turn \(1, 6, 4, 4\) into an image \(1, 1, 16, 16\), got"):
        model(decoder=nn.Conv2d(6, 1, 1))
    with pytest.raises(ValueError, match=r"into an image \(1, 1, 16, 16\), got \(1, 3, 16, 16\)"):
        model(decoder=SmallDecoder(6, 3, 4, 8))
    made = model()
    with pytest.raises(ValueError, match="resize or crop"):
        made(images(size=20))
    with pytest.raises(ValueError, match="a list of sizes"):
        made([torch.zeros(1, 16, 16), torch.zeros(1, 24, 24)])
    with pytest.raises(ValueError, match="position must be one of"):
        made(images(), position="middle")
    with pytest.raises(ValueError, match=r"numbers in 0\.\.4 for each of 4 images"):
        made(images(), position=torch.tensor([0, 1]))
