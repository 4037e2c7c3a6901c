"""The autoencoder around a quantizer: shapes, loss, training, files."""

import json

import pytest
import torch

from danlu.vision.autoencoder import QuantizedAutoencoder
from danlu.vision.fsq import FSQ
from danlu.vision.usage import measure_usage
from danlu.vision.vq import VectorQuantizer

QUANTIZERS = {
    "fsq": {"kind": "fsq", "levels": [8, 5]},
    "projected": {"kind": "fsq", "levels": [8, 5], "dim": 6},
    "codebooks": {"kind": "fsq", "levels": [8, 5], "num_codebooks": 2},
    "lfq": {"kind": "lfq", "bits": 4},
    "vq": {"kind": "vq", "codebook_size": 12, "dim": 4},
    "ema": {"kind": "vq", "codebook_size": 12, "dim": 4, "update": "ema"},
    "simvq": {"kind": "vq", "codebook_size": 12, "dim": 4, "transform": True},
    "residual": {"kind": "residual", "parts": [{"kind": "vq", "codebook_size": 5, "dim": 3}] * 2},
}


def images(count: int, *shape: int) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ["conv", "mlp"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_any_quantizer_trains_and_survives_files(quantizer, architecture, tmp_path):
    model = QuantizedAutoencoder(QUANTIZERS[quantizer], (2, 8, 8), architecture=architecture, hidden=8)
    x = images(3, 2, 8, 8)
    out = model(x)
    codebooks = () if model.quantizer.num_codebooks == 1 else (2,)
    assert out.images.shape == x.shape
    assert out.indices.shape == (3, *((2, 2) if architecture == "conv" else (4,)), *codebooks)
    expected = (out.images - x).square().sum().item() / 3 + 4 * out.loss.item()
    assert model.loss(x, out).item() == pytest.approx(expected, rel=1e-4)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = model.loss(x)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    indices = model.encode(x)
    assert torch.equal(model(x).indices, indices) and torch.allclose(model.decode(indices), model(x).images, atol=1e-6)
    model.save_pretrained(tmp_path / "model")
    loaded = QuantizedAutoencoder.from_pretrained(tmp_path / "model")
    assert not loaded.training and loaded.config == model.config
    assert torch.equal(loaded(x).images, model(x).images) and torch.equal(loaded.encode(x), indices)
    use = measure_usage(loaded, [x[:1], x[1:]]).codebooks[0]
    assert use.tokens == 12 and use.size == model.codebook_sizes[0]


def test_convolutions_take_any_multiple_of_their_step():
    model = QuantizedAutoencoder(FSQ([8, 5]), (1, 16, 16), hidden=4, downsample=3)
    out = model(images(2, 1, 8, 24))
    assert out.indices.shape == (2, 1, 3) and out.images.shape == (2, 1, 8, 24)
    with pytest.raises(ValueError, match=r"multiples of 2\*\*downsample = 8, got 8 and 20"):
        model(images(2, 1, 8, 20))


def test_half_precision_round_trip(tmp_path):
    model = QuantizedAutoencoder(QUANTIZERS["ema"], (1, 8, 8), hidden=4).bfloat16().eval()
    x = images(2, 1, 8, 8).bfloat16()
    assert model(x).images.dtype == torch.bfloat16
    assert torch.equal(model.decode(model.encode(x)), model(x).images)
    model.save_pretrained(tmp_path)
    loaded = QuantizedAutoencoder.from_pretrained(tmp_path)
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert torch.equal(loaded(x).images, model(x).images)


def test_saving_leaves_other_files_and_half_a_model_is_refused(tmp_path):
    model = QuantizedAutoencoder(FSQ([8, 5]), (1, 8, 8), architecture="mlp", hidden=4)
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, match in (
        ({"format": 2}, "format of .* must be 1, got 2"),
        ({"hidden": 5}, "do not fit"),
        ({"depth": 3}, "do not fit: .*depth"),
        ({"quantizer": {"kind": "fsq", "levels": [8, 5, 5]}}, "do not fit"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=match):
            QuantizedAutoencoder.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="must hold config.json and model.safetensors"):
        QuantizedAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantizer": FSQ([5], channel_dim=1)}, "channel_dim=-1, got 1"),
        ({"image_shape": (8, 8)}, r"image_shape must be \(channels, height, width\)"),
        ({"image_shape": (1, 6, 8)}, r"multiples of 2\*\*downsample = 4, got 6 and 8"),
        ({"hidden": 0}, "hidden, downsample and tokens must be at least 1, got 0, 2, 4"),
        ({"architecture": "vit"}, "architecture must be 'conv' or 'mlp', got 'vit'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        QuantizedAutoencoder(**({"quantizer": VectorQuantizer(4, 2), "image_shape": (1, 8, 8)} | options))


def test_bad_images():
    model = QuantizedAutoencoder(FSQ([8, 5]), (1, 8, 8), architecture="mlp", hidden=4)
    with pytest.raises(ValueError, match=r"images must be \(batch, 1, height, width\), got \(2, 8, 8\)"):
        model(images(2, 8, 8))
    with pytest.raises(ValueError, match="images must be 8 x 8 for architecture 'mlp', got"):
        model(images(2, 1, 8, 12))
