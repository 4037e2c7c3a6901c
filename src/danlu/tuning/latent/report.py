"""What a conversion to latent attention did: errors by layer, loss and cache before and after."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from danlu.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

FORMAT = 1


@dataclass(frozen=True)
class LayerConversion:
    """One layer. Errors are roots of mean squares over those of the exact value; None where there was no text.

    Args:
        rope_energy: share of the keys' energy in the channels that keep their rotation.
        latent_energy: share of the energy of the (balanced) rest and the values that the latent keeps.
        balance: what the keys in the latent were divided by.
        key_error: of the keys that lost their rotation, as the latent gives them back.
        value_error: of the values, as the latent gives them back.
        output_error: of what the layer's attention gives to the residual stream, all causes together.
    """

    rope_energy: float
    latent_energy: float
    balance: float
    key_error: float
    value_error: float
    output_error: float | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`to_mla` did.

    Args:
        model: class of the host and of the result.
        method: ``exact``, ``pca`` or ``weight-svd``.
        norm: ``silent`` or ``calibrated``.
        kv_rank: numbers of the latent per token and layer.
        rope_dim: numbers of the rotary key per token and layer.
        freq_fold: neighbouring frequencies that were treated as one.
        layers: by layer.
        calibration_tokens: number of tokens that statistics are from.
        elements_before: numbers per token and layer in the host's cache.
        element_bytes: size of one of them.
        loss_before: nats per token on the first calibration texts.
        loss_after: the same for the result.
    """

    model: str
    method: str
    norm: str
    kv_rank: int
    rope_dim: int
    freq_fold: int
    layers: tuple[LayerConversion, ...]
    calibration_tokens: int
    elements_before: int
    element_bytes: int
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def elements_after(self) -> int:
        """Numbers per token and layer in the cache of the result."""
        return self.kv_rank + self.rope_dim

    @property
    def bytes_before(self) -> int:
        """Bytes per token of the host's cache, all layers."""
        return self.elements_before * self.element_bytes * len(self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes per token of the result's cache, all layers."""
        return self.elements_after * self.element_bytes * len(self.layers)

    def summary(self) -> str:
        """Cache and loss in one sentence."""
        text = (
            f"Cache {self.bytes_before:,} -> {self.bytes_after:,} bytes per token "
            f"({self.elements_after / self.elements_before:.1%}; {self.elements_before} -> {self.kv_rank} + "
            f"{self.rope_dim} numbers per layer)"
        )
        if self.loss_before is None or self.loss_after is None:
            return f"{text}."
        return f"{text}, loss {self.loss_before:.4f} -> {self.loss_after:.4f} nats per token of the calibration text."

    def table(self) -> Table:
        """The layers as a ``rich`` table."""
        from rich.table import Table

        table = Table(title=f"{self.model}: {self.method}, norm {self.norm}", caption=self.summary())
        for name in ("layer", "rotary keys", "latent", "balance", "key error", "value error", "output error"):
            table.add_column(name, justify="right")
        for index, row in enumerate(self.layers):
            output = "-" if row.output_error is None else f"{row.output_error:.2e}"
            table.add_row(
                str(index),
                f"{row.rope_energy:.1%}",
                f"{row.latent_energy:.2%}",
                f"{row.balance:.2f}",
                f"{row.key_error:.2e}",
                f"{row.value_error:.2e}",
                output,
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def figure(self) -> Figure:
        """Errors by layer, and the energy that the kept channels hold."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter

        figure = Figure(figsize=(9.2, 4.0), layout="constrained")
        errors, energies = figure.subplots(1, 2)
        places = range(len(self.layers))
        for name, marker in (("key_error", "o"), ("value_error", "s"), ("output_error", "D")):
            values = [getattr(row, name) for row in self.layers]
            shown = [math.nan if value is None or value <= 0 else value for value in values]
            errors.plot(places, shown, marker=marker, label=name.replace("_", " "))
        errors.set_yscale("log")
        errors.set_title("Relative error")
        for name, marker in (("rope_energy", "o"), ("latent_energy", "s")):
            energies.plot(places, [getattr(row, name) for row in self.layers], marker=marker, label=name.split("_")[0])
        energies.yaxis.set_major_formatter(PercentFormatter(1.0))
        energies.set_title("Energy kept: rotary keys, latent")
        for axes in (errors, energies):
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(frameon=False)
        return figure

    def to_json(self) -> str:
        """The report as JSON text."""
        after = {name: getattr(self, name) for name in ("elements_after", "bytes_before", "bytes_after")}
        return json.dumps({"format": FORMAT, **asdict(self), **after}, indent=1)

    def save(self, path: str | Path) -> Path:
        """Write the JSON to ``path``, whole or not at all."""
        return write_whole(path, self.to_json() + "\n")
