"""The claim on finite scalar quantisation against learnt codebooks."""

from __future__ import annotations

import math
from typing import Any

import torch

from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.lab.training import seeded

#: Nominal codes, and the levels of the paper whose product comes nearest.
SIZES = {16: (5, 3), 64: (8, 8), 1024: (8, 5, 5, 5), 4096: (7, 5, 5, 5, 5)}
#: At which sizes each method runs; the moving average is there to show whether it cures plain VQ.
METHODS = {"FSQ": tuple(SIZES), "VQ": tuple(SIZES), "VQ, moving average": (64, 1024)}
_TRAIN, _TOKENS, _DIM = 1500, 4, 32
_COLUMNS = {
    "train": "error, training images",
    "test": "error, other images",
    "use": "share of codes used",
    "perplexity": "perplexity",
}


@claim(
    name="fsq-against-vq",
    title="Rounding a few numbers against learning a codebook",
    source="archive 9826, arXiv:2309.15505",
    statement="Finite scalar quantisation equals a learnt codebook at about a thousand codes, is better above and "
    "worse below, because its codes stay in use without any help while a learnt codebook collapses.",
    measurement="Handwritten digits of 8 x 8 pixels in -1..1, 1500 to train on, as 4 tokens each between two "
    "perceptrons of two hidden layers of 256; squared error per training image, and codes that occur over all 1797.",
    seeds=(0,),
    budget=150,
)
def fsq_against_vq(context: Context) -> Evidence:
    """Train the methods at their sizes and read off the crossing."""
    sums: dict[tuple[int, str], dict[str, float]] = {(s, m): {} for s in SIZES for m in METHODS if s in METHODS[m]}
    runs = [(*cell, seed) for cell in sums for seed in context.seeds]
    for size, method, seed in context.track(runs, description="autoencoders", total=len(runs)):
        for key, value in reconstruct(size, method, seed).items():
            cell = sums[size, method]
            cell[key] = cell.get(key, 0.0) + value / len(context.seeds)
    error = {key: cell["train"] for key, cell in sums.items()}
    use = {key: cell["use"] for key, cell in sums.items()}
    checks = [
        Check(
            f"{size} codes: {better} reconstructs training images better than {worse}",
            error[size, better] < error[size, worse],
            f"{error[size, better]:.2f} against {error[size, worse]:.2f}",
        )
        for size, better, worse in (
            (16, "VQ", "FSQ"), (64, "VQ", "FSQ"), (1024, "FSQ", "VQ"), (4096, "FSQ", "VQ")
        )
    ]  # fmt: skip
    checks += [
        Check("1000 codes: FSQ uses at least 95 % of them", use[1024, "FSQ"] >= 0.95, f"{use[1024, 'FSQ']:.0%}"),
        Check("1024 codes: plain VQ uses less than half", use[1024, "VQ"] < 0.5, f"{use[1024, 'VQ']:.0%}"),
    ]
    rows = tuple(
        (
            size if method != "FSQ" else math.prod(SIZES[size]),
            method,
            cell["train"],
            cell["test"],
            cell["use"],
            cell["perplexity"],
        )
        for (size, method), cell in sums.items()
    )
    sizes = tuple(float(size) for size in SIZES)
    return Evidence(
        summary=f"Squared error per image at 16 codes {error[16, 'FSQ']:.2f} (FSQ) and {error[16, 'VQ']:.2f} (VQ), at "
        f"4096 {error[4096, 'FSQ']:.2f} and {error[4096, 'VQ']:.2f}; at 1024 FSQ uses {use[1024, 'FSQ']:.0%} of its "
        f"codes, VQ {use[1024, 'VQ']:.0%}.",
        checks=tuple(checks),
        tables=(
            Table(
                "After training",
                ("codes", "method", *_COLUMNS.values()),
                rows,
            ),
        ),
        plots=(
            Plot(
                "Reconstruction", "codes", "squared error per training image", sizes,
                {method: tuple(error.get((size, method)) for size in SIZES) for method in METHODS}, log_x=True,
            ),
            Plot(
                "Use of the codebook", "codes", "share of what 7188 tokens can use", sizes,
                {method: tuple(use.get((size, method)) for size in SIZES) for method in METHODS}, log_x=True,
            ),
        ),
        notes=(
            "Small images and perceptrons in place of ImageNet and convolutions.",
            "FSQ has 15, 64, 1000 and 4375 codes, the paper's levels; 1000 steps per run.",
            "The share counts codes over all 1797 images, of at most as many as there are tokens (7188).",
        ),
    )  # fmt: skip


def reconstruct(size: int, method: str, seed: int, steps: int = 1000, batch: int = 256) -> dict[str, float]:
    """Train one autoencoder on the digits and measure it on all of them.

    Args:
        size: a key of ``SIZES``.
        method: one of ``METHODS``.
        seed: of weights and batches.
        steps: of Adam, with a cosine to zero.
        batch: images per step.

    Returns:
        ``train`` and ``test``: squared error per image; ``use``: used share of the attainable codes; ``perplexity``.
    """
    from danlu.assets import digits
    from danlu.vision.autoencoder import QuantizedAutoencoder
    from danlu.vision.usage import measure_usage
    from danlu.vision.vq import VectorQuantizer

    images = 2 * digits()[0][:, None] - 1
    with seeded(seed):
        model = QuantizedAutoencoder(
            _quantizer(size, method), (1, 8, 8), architecture="mlp", hidden=256, tokens=_TOKENS
        )
    if isinstance(model.quantizer, VectorQuantizer) and method == "VQ, moving average":
        with torch.no_grad():
            model.quantizer.initialise(model.latents(images[:_TRAIN]), iterations=0)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        loss = model.loss(images[torch.randint(_TRAIN, (batch,), generator=generator)])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rates.step()
    model.eval()
    with torch.no_grad():
        errors = (model(images).images - images).square().sum((1, 2, 3))
    use = measure_usage(model, [images]).codebooks[0]
    return {
        "train": errors[:_TRAIN].mean().item(),
        "test": errors[_TRAIN:].mean().item(),
        "use": use.attainable_share,
        "perplexity": use.perplexity,
    }


def _quantizer(size: int, method: str) -> dict[str, Any]:
    if method == "FSQ":
        return {"kind": "fsq", "levels": SIZES[size]}
    update = "ema" if method == "VQ, moving average" else "gradient"
    return {"kind": "vq", "codebook_size": size, "dim": _DIM, "update": update}
