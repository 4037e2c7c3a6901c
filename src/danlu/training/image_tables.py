"""Recipes of ``danlu sample``: an image model, its data and its training, as a TOML file in typed and strict tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from danlu.training.recipe import read_values, set_value, validated
from danlu.training.tables import Positive, Rate, Table

#: The bundled data set, which stands for a recipe of the defaults too.
DIGITS = "digits"
#: Kinds of files that are read as images.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Images(Table):
    """What to learn from.

    Args:
        source: ``digits``, the bundled handwritten digits, or a folder of images, relative to the recipe.
        classes: learn one class for each subfolder (for the digits, each digit).
        size: side of the square images; as they are unless given.
        resize: bring images of other sizes to ``size`` (the shorter side; the middle is kept) in place of refusing.
        colour: ``gray``, ``rgb``, or ``auto``: gray where all images are.
    """

    source: str = DIGITS
    classes: bool = True
    size: Positive | None = None
    resize: bool = False
    colour: Literal["auto", "gray", "rgb"] = "auto"

    @model_validator(mode="after")
    def _resize_needs_a_size(self) -> Self:
        if self.resize and self.size is None:
            raise ValueError("data.resize needs data.size")
        return self


class Network(Table):
    """The U-Net, diffusers' ``UNet2DModel``.

    Args:
        channels: of every level; each level after the first halves the side.
        layers: residual blocks for each level.
        attention: levels with self-attention.
    """

    channels: tuple[Positive, ...] = (32, 64)
    layers: Positive = 1
    attention: Literal["none", "last", "all"] = "last"

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if not self.channels or any(count % 8 for count in self.channels):
            raise ValueError(f"network.channels must be multiples of 8, got {list(self.channels)}")
        return self


class Noise(Table):
    """The process, by the scheduler of diffusers that the model is saved with.

    Args:
        kind: ``linear`` or ``cosine``, a table of 1,000 variance-preserving steps; or ``flow``, straight lines.
        prediction: what the network predicts; ``velocity`` for ``flow``, another for the tables.
        times: drawn in training: ``uniform``, or ``logit-normal``, mostly the middle.
    """

    kind: Literal["linear", "cosine", "flow"] = "linear"
    prediction: Literal["epsilon", "sample", "v", "velocity"] = "v"
    times: Literal["uniform", "logit-normal"] = "uniform"

    @model_validator(mode="after")
    def _prediction_fits(self) -> Self:
        if (self.kind == "flow") != (self.prediction == "velocity"):
            raise ValueError(
                f"noise.prediction must be 'velocity' for the kind 'flow' and another for a table, got "
                f"{self.prediction!r} for {self.kind!r}"
            )
        return self


class Fit(Table):
    """How to train.

    Args:
        steps: updates of the weights.
        batch: images for each.
        learning_rate: of AdamW at its peak; it rises over ``warmup`` steps and falls to 0 on a cosine.
        warmup: steps.
        ema: largest decay of the averaged weights, which are the ones that are saved.
        label_dropout: share of images whose class is hidden, so that the model can sample without one: guidance.
        save_every: steps between checkpoints.
        seed: of everything.
    """

    steps: Positive = 1500
    batch: Positive = 64
    learning_rate: Rate = 2e-3
    warmup: int = Field(default=50, ge=0)
    ema: float = Field(default=0.995, ge=0, lt=1)
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    save_every: Positive = 250
    seed: int = 0


class ImageRecipe(Table):
    """A whole recipe: each table may be left out."""

    name: str = DIGITS
    data: Images = Images()
    network: Network = Network()
    noise: Noise = Noise()
    training: Fit = Fit()

    def fingerprint(self) -> dict[str, Any]:
        """What the weights depend on."""
        values = self.model_dump(mode="json", exclude={"name"})
        del values["training"]["save_every"]
        return values


def load_image_recipe(path: str | Path, settings: Sequence[str] = ()) -> ImageRecipe:
    """Read a recipe of an image model.

    Args:
        path: a TOML file, whose image folder is relative to its own; or ``digits``, for the defaults.
        settings: changes such as ``training.steps=100``.

    Raises:
        ValueError: not TOML, an unknown key (the nearest known one is named), or values that contradict each other.
        OSError: the file cannot be read.
    """
    if str(path) == DIGITS:
        values: dict[str, Any] = {}
        for setting in settings:
            set_value(values, setting)
        return parse_image_recipe(values)
    path = Path(path)
    recipe = parse_image_recipe(read_values(path, settings), str(path))
    if recipe.data.source == DIGITS:
        return recipe
    data = recipe.data.model_copy(update={"source": str(path.parent.absolute() / recipe.data.source)})
    return recipe.model_copy(update={"data": data})


def folder_recipe(folder: Path, settings: Sequence[str] = ()) -> ImageRecipe:
    """The defaults on a folder of images: with classes where it has no image outside its subfolders.

    Raises:
        ValueError: settings that cannot be.
    """
    loose = any(path.is_file() and path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    values: dict[str, Any] = {
        "name": folder.absolute().name,
        "data": {"source": str(folder.absolute()), "classes": not loose},
    }
    for setting in settings:
        set_value(values, setting)
    return parse_image_recipe(values, str(folder))


def parse_image_recipe(values: Mapping[str, Any], what: str = "recipe") -> ImageRecipe:
    """A recipe from plain values; ``what`` names it in errors."""
    return validated(ImageRecipe, values, what)
