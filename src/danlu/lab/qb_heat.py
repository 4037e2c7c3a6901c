"""Claims on QB-Heat: prediction of hidden parts of an image, and features learned by it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.lab.training import Schedule, seeded, tens, train
from danlu.lab.waves import SIDE, WAVES, sequence_error, waves

CELL = 4
FILLS: dict[str, dict[str, str]] = {
    "[MASK]": {"fill": "mask"},
    "copy": {"fill": "copy"},
    "tied": {"fill": "linear", "mode": "tied"},
    "inverse": {"fill": "linear", "mode": "inverse"},
    "untied": {"fill": "linear", "mode": "untied"},
    "quadratic": {"fill": "quadratic"},
}
_STEPS = 1000
_FEATURES = ("random", "QB-Heat", "supervised")


@claim(
    name="qb-heat",
    title="Linear extrapolation of features predicts what is hidden, where [MASK] cannot",
    source="archive 9359; arXiv:2211.13228",
    statement="An encoder that sees a quarter of the image, and linear steps in its feature map that fill the rest, "
    "are a self-supervised task for convolutional networks, whose features serve later tasks.",
    measurement="Sums of 4 plane waves of random phases, 16 x 16 pixels; an encoder of 4 x 4 patches and a decoder of "
    "one 3 x 3 convolution, trained alike with each fill: squared error on hidden pixels of new images. Then linear "
    "probes of the encoder's features of whole images (which wave is the strongest; handwritten digits) against the "
    "same encoder untrained and trained with labels.",
    seeds=(0,),
    budget=125,
)
def qb_heat(context: Context) -> Evidence:
    """Train with each fill, judge by position; then probe."""
    seed = context.seeds[0]
    errors: dict[str, tuple[float, float]] = {}
    curves: dict[str, tuple[float, ...]] = {}
    encoder: nn.Module = _encoder(seed)
    for name, options in FILLS.items():
        model, losses = pretrain(waves_batch, options, Schedule(_STEPS, 128, 2e-3, 0.0, 0), seed, context, name)
        errors[name] = hidden_error(model, waves(2000, torch.Generator().manual_seed(seed + 1))[0])
        curves[name] = tens(losses)
        if name == "untied":
            encoder = model.export_encoder()
    probes = wave_probes(encoder, seed, context) | digit_probes(seed, context)
    sequences = {name: sequence_error(name, _STEPS // 2, seed, context) for name in ("[MASK]", "interpolation")}
    return evidence(errors, curves, probes, sequences)


def evidence(
    errors: dict[str, tuple[float, float]],
    curves: dict[str, tuple[float, ...]],
    probes: dict[str, dict[str, float]],
    sequences: dict[str, float],
) -> Evidence:
    """The verdict by the numbers.

    Args:
        errors: by fill, masked squared error at the corners and at the centre.
        curves: by fill, the loss of ten steps each.
        probes: by task and kind of features, the accuracy on new images.
        sequences: by fill, the squared error on hidden places of sequences.
    """
    corner = {name: pair[0] for name, pair in errors.items()}
    gains = {task: found["QB-Heat"] - found["random"] for task, found in probes.items()}
    checks = [
        Check(
            "at the corners, untied is below 0.05 of [MASK]",
            corner["untied"] < 0.05 * corner["[MASK]"],
            f"{corner['untied']:.4f} against {corner['[MASK]']:.3f}",
        ),
        Check(
            "at the corners, tied < copy < [MASK]",
            corner["tied"] < corner["copy"] < corner["[MASK]"],
            f"{corner['tied']:.3f}, {corner['copy']:.3f}, {corner['[MASK]']:.3f}",
        ),
        *(
            Check(
                f"{task}: features of QB-Heat beat those of the untrained encoder by 0.02 of accuracy",
                gains[task] >= 0.02,
                f"{probes[task]['QB-Heat']:.3f} against {probes[task]['random']:.3f}",
            )
            for task in probes
        ),
        Check(
            "sequences with half of the places hidden: interpolation is below [MASK]",
            sequences["interpolation"] < sequences["[MASK]"],
            f"{sequences['interpolation']:.4f} against {sequences['[MASK]']:.4f}",
        ),
    ]
    rows = tuple((name, (4 * a + b) / 5, a, b) for name, (a, b) in errors.items())
    count = min(len(curve) for curve in curves.values())
    return Evidence(
        summary=f"Hidden pixels at the corners: error {corner['untied']:.4f} with untied steps, {corner['copy']:.3f} "
        f"with copies of the edge, {corner['[MASK]']:.3f} with [MASK]. A linear probe of QB-Heat's features gains "
        f"{gains['waves']:+.3f} on waves and {gains['digits']:+.3f} on digits over the untrained encoder, of pooled "
        f"features {gains['waves, pooled']:+.3f} and {gains['digits, pooled']:+.3f}.",
        checks=tuple(checks),
        tables=(
            Table("Squared error on hidden pixels", ("fill", "5 positions", "4 corners", "centre"), rows),
            Table("Squared error on hidden places of sequences", ("fill", "error"), tuple(sequences.items())),
            Table(
                "Accuracy of a linear probe",
                ("features", *probes),
                tuple((kind, *(probes[task][kind] for task in probes)) for kind in _FEATURES),
            ),
        ),
        plots=(
            Plot(
                "Error of hidden pixels in training",
                "step",
                "squared error",
                tuple(10.0 * (i + 1) for i in range(count)),
                {name: curve[:count] for name, curve in curves.items()},
            ),
        ),
        notes=(
            "At the centre [MASK] is as good as any fill: every hidden cell touches a visible one, and the decoder's "
            "convolution reads it. Corners decide.",
            f"Each fill is trained for {_STEPS} steps at one rate that was tuned for none of them.",
            "Probes read the flat map, 512 numbers for 256 pixels, or its mean over cells, which was added when the "
            "flat ones had shown no difference. An encoder of single patches is no test of what a deep one learns.",
            "The source reports ImageNet; a probe on these images says nothing about it.",
        ),
    )


def waves_batch(generator: torch.Generator, count: int) -> Tensor:
    """Images alone."""
    return waves(count, generator)[0]


def pretrain(
    draw: Callable[[torch.Generator, int], Tensor],
    options: dict[str, str],
    schedule: Schedule,
    seed: int,
    context: Context,
    label: str,
) -> tuple[Any, list[float]]:
    """Train an encoder and a decoder from the same start with a fill.

    Args:
        draw: images (count, 1, 16, 16) of a generator and a count.
        options: of ``QBHeatConfig``.
        schedule: steps and rates.
        seed: of weights, images and positions.
        context: for its progress bar.
        label: beside the bar.

    Returns:
        The model, and the loss of every step.
    """
    from danlu.vision.qb_heat import QBHeatConfig, QBHeatForPreTraining

    config = QBHeatConfig(size=SIDE, image_channels=1, seed=seed, **options)  # type: ignore[arg-type]
    model = QBHeatForPreTraining(_encoder(seed), config=config)

    def batches(generator: torch.Generator) -> dict[str, Any]:
        return {"pixel_values": draw(generator, schedule.batch), "targets": torch.zeros(1)}

    return model, train(_Losses(model), batches, schedule, seed, context, label, lambda loss, _: loss.squeeze())


def hidden_error(model: Any, images: Tensor) -> tuple[float, float]:
    """Squared error on hidden pixels: mean over the four corners, and at the centre."""
    with torch.no_grad():
        found = [model(images, position=name).loss.item() for name in model.masker.positions]
    return sum(found[:4]) / 4, found[4]


def wave_probes(encoder: nn.Module, seed: int, context: Context) -> dict[str, dict[str, float]]:
    """Accuracies of naming the strongest wave from the features of three encoders."""
    generator = torch.Generator().manual_seed(seed + 2)
    (images, labels), (new, wanted) = waves(2000, generator), waves(2000, generator)
    return _probes("waves", encoder, (images, labels), (new, wanted), len(WAVES), seed, context)


def digit_probes(seed: int, context: Context) -> dict[str, dict[str, float]]:
    """Accuracies of naming handwritten digits, after pre-training on the same images without labels."""
    from danlu.assets import digits

    images, labels = digits()
    images = F.interpolate(images[:, None], SIDE, mode="bilinear", align_corners=False)
    mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[mixed], labels[mixed]
    known, new = (images[:1200], labels[:1200]), (images[1200:], labels[1200:])

    def draw(generator: torch.Generator, count: int) -> Tensor:
        return known[0][torch.randint(len(known[0]), (count,), generator=generator)]

    model, _ = pretrain(draw, FILLS["untied"], Schedule(600, 128, 2e-3, 0.0, 0), seed, context, "digits")
    return _probes("digits", model.export_encoder(), known, new, 10, seed, context)


def probe(features: Tensor, labels: Tensor, new: Tensor, wanted: Tensor) -> float:
    """Fit a linear classifier of standardised features, and return its accuracy on new ones."""
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs, others = (features - mean) / scale, (new - mean) / scale
    classes = int(labels.max()) + 1
    weight, bias = torch.zeros(classes, inputs.shape[1], requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        return (F.linear(others, weight, bias).argmax(1) == wanted).float().mean().item()


def _probes(
    task: str,
    encoder: nn.Module,
    known: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    classes: int,
    seed: int,
    context: Context,
) -> dict[str, dict[str, float]]:
    untrained = _encoder(seed)
    with seeded(seed):
        taught = _Classifier(copy.deepcopy(untrained), classes)

    def batches(generator: torch.Generator) -> dict[str, Any]:
        rows = torch.randint(len(known[0]), (128,), generator=generator)
        return {"images": known[0][rows], "targets": known[1][rows]}

    train(taught, batches, Schedule(600, 128, 2e-3, 0.0, 0), seed, context, "supervised")
    found: dict[str, dict[str, float]] = {task: {}, f"{task}, pooled": {}}
    for name, one in zip(_FEATURES, (untrained, encoder, taught.encoder), strict=True):
        with torch.no_grad():
            old, fresh = one(known[0]), one(new[0])
        found[task][name] = probe(old.flatten(1), known[1], fresh.flatten(1), new[1])
        found[f"{task}, pooled"][name] = probe(old.mean((2, 3)), known[1], fresh.mean((2, 3)), new[1])
    return found


def _encoder(seed: int) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, 64, CELL, CELL), nn.GELU(), nn.Conv2d(64, 64, 1), nn.GELU(), nn.Conv2d(64, 32, 1)
        )


class _Losses(nn.Module):
    """The loss of a model as logits (1, 1), for the lab's training loop."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(pixel_values).loss.view(1, 1))


class _Classifier(nn.Module):
    """An encoder with a linear head on its flat map."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(32 * (SIDE // CELL) ** 2, classes)

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.encoder(images).flatten(1)))
