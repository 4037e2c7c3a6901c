"""Training of a small image model, or the trained one where there is one: killed runs go on where they were."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from danlu.diffusion.losses import denoising_loss
from danlu.diffusion.times import LogitNormalTimes, UniformTimes
from danlu.files import replacing, write_whole
from danlu.training.diffusion_model import ImageModel, build_scheduler, build_unet
from danlu.training.image_tables import Fit, ImageRecipe
from danlu.training.images import ImageData, read_images
from danlu.training.recipe import differences

logger = logging.getLogger("danlu.training.diffusion")

Progress = Callable[[int, int, str], None]


def trained_image_model(
    recipe: ImageRecipe, out: str | Path, device: str | torch.device = "cpu", progress: Progress | None = None
) -> ImageModel:
    """The model of a recipe: from ``out`` if it is there, else trained now.

    Args:
        recipe: what to train.
        out: folder of the run: ``recipe.json``, ``checkpoint.pt`` while it trains, ``model`` and ``training.json`` at
            the end. A run that was stopped goes on at its checkpoint, with the losses that it would have had.
        device: to train on.
        progress: called with steps done, all steps, and a text.

    Returns:
        The model with its averaged weights, in evaluation mode.

    Raises:
        ValueError: ``out`` holds another run, or its images have changed, or cannot be learnt from.
        ImportError: diffusers or Pillow is missing.
        FloatingPointError: the loss is not finite.
    """
    out = Path(out)
    _check_folder(out, recipe)
    folder = out / "model"
    if (folder / "model_index.json").is_file():
        return ImageModel.load(folder, device)
    scheduler = build_scheduler(recipe.noise)
    data = read_images(recipe.data)
    channels, side = data.pixels.shape[1:3]
    unet = build_unet(recipe.network, side, channels, len(data.classes), recipe.training.seed).to(device)
    model = ImageModel(unet, scheduler, data.classes)
    write_whole(out / "recipe.json", json.dumps(recipe.fingerprint(), indent=1) + "\n")
    losses = _fit(model, data, recipe, out / "checkpoint.pt", progress)
    unet.eval().requires_grad_(False)
    model.save(folder)
    write_whole(out / "training.json", json.dumps({"losses": losses}) + "\n")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return model


def _check_folder(out: Path, recipe: ImageRecipe) -> None:
    """Refuse a folder that is not this recipe's own."""
    kept = out / "recipe.json"
    if kept.is_file():
        if changed := differences(recipe, json.loads(kept.read_text(encoding="utf-8"))):
            raise ValueError(
                f"--out {out} holds the run of another recipe, which differs in {', '.join(changed)}: name another one"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} must be an empty folder or that of a run: name another one")


def _fit(
    model: ImageModel, data: ImageData, recipe: ImageRecipe, checkpoint: Path, progress: Progress | None
) -> list[float]:
    """Train in place, to the averaged weights; returns the loss of every step."""
    from diffusers.training_utils import EMAModel

    fit, unet, host = recipe.training, model.unet, model.host
    times = LogitNormalTimes() if recipe.noise.times == "logit-normal" else UniformTimes()
    optimiser = torch.optim.AdamW(unet.parameters(), fit.learning_rate)
    average = EMAModel(unet.parameters(), decay=fit.ema)
    generator = torch.Generator().manual_seed(fit.seed)
    losses: list[float] = []
    state: dict[str, Any] = {"digest": _digest(data)}
    if checkpoint.is_file():
        losses = _restore(checkpoint, state["digest"], unet, optimiser, average, generator)
        logger.info("going on at step %d", len(losses))
    unet.train()
    while len(losses) < fit.steps:
        step = len(losses)
        for group in optimiser.param_groups:
            group["lr"] = fit.learning_rate * _factor(fit, step)
        places = torch.randint(len(data.pixels), (fit.batch,), generator=generator)
        labels = None
        if data.labels is not None:
            hidden = torch.rand(fit.batch, generator=generator) < fit.label_dropout
            labels = torch.where(hidden, len(data.classes), data.labels[places]).to(unet.device)
        denoiser = model.denoiser(labels)
        loss = denoising_loss(
            denoiser.model,
            data.batch(places).to(unet.device),
            host.process,
            host.prediction,
            times=times,
            seed=generator,
        ).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower training.learning_rate")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        average.step(unet.parameters())
        losses.append(loss.item())
        if progress is not None:
            recent = losses[-50:]
            progress(len(losses), fit.steps, f"training, loss {sum(recent) / len(recent):.3f}")
        if len(losses) % fit.save_every == 0 and len(losses) < fit.steps:
            state |= {
                "losses": losses,
                "weights": unet.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average.state_dict(),
                "generator": generator.get_state(),
            }
            with replacing(checkpoint) as part:
                torch.save(state, part)
    average.copy_to(unet.parameters())
    return losses


def _restore(
    checkpoint: Path, digest: str, unet: Any, optimiser: Any, average: Any, generator: torch.Generator
) -> list[float]:
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    if state["digest"] != digest:
        raise ValueError(
            f"the images have changed since {checkpoint} was written: name another folder, or delete it to start again"
        )
    unet.load_state_dict(state["weights"])
    optimiser.load_state_dict(state["optimiser"])
    average.load_state_dict(state["average"])
    average.to(unet.device)
    generator.set_state(state["generator"])
    return state["losses"]


def _digest(data: ImageData) -> str:
    """Of pixels, labels and names: what a resumed run must find again."""
    digest = hashlib.sha256(data.pixels.numpy().tobytes())
    digest.update(repr((tuple(data.pixels.shape), data.classes)).encode())
    if data.labels is not None:
        digest.update(data.labels.numpy().tobytes())
    return digest.hexdigest()


def _factor(fit: Fit, step: int) -> float:
    """Learning rate of a step as a share of the peak."""
    if step < fit.warmup:
        return (step + 1) / fit.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - fit.warmup) / max(1, fit.steps - fit.warmup)))
