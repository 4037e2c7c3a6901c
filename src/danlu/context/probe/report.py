"""What an ``AttentionProbe`` found: numbers by layer and head, verdict, table, figure, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.context.report import finite_or_none, nan_if_none
from danlu.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

FORMAT = 1


@dataclass(frozen=True)
class HeadReport:
    """One head, averaged over rows (queries); rows that see no key, and padding, are left out.

    Attributes:
        layer: index of the layer.
        head: index of the query head.
        rows: queries that were measured.
        keys: mean number of visible candidates n.
        effective_tokens: mean of 1 / sum p^2.
        effective_share: mean of effective tokens over n.
        sparsity: mean of S, the root of that share.
        entropy: mean Shannon entropy in nats.
        max_probability: mean of the largest probability.
        distance: mean of the attended distance in tokens.
        sink_mass: mean share of the first tokens and of a learnt sink.
        local_mass: mean share of the nearest tokens.
        effective_rank: exponential of the entropy of the singular values, of ``rank_rows`` rows of one text.
        rank_rows: rows of the matrix whose rank that is: the largest value it could have.
        alpha: spread (standard deviation) of a row's logits: the present scale on scores of unit variance.
        objective: gradient that passes at alpha, ``median alpha (1 - sum p^2)``.
        best_alpha: the scale at which that objective peaks on these scores; NaN where it has no peak.
        best_objective: the objective there.
    """

    layer: int
    head: int
    rows: int
    keys: float
    effective_tokens: float
    effective_share: float
    sparsity: float
    entropy: float
    max_probability: float
    distance: float
    sink_mass: float
    local_mass: float
    effective_rank: float
    rank_rows: int
    alpha: float
    objective: float
    best_alpha: float
    best_objective: float


@dataclass(frozen=True)
class AttentionReport:
    """Attention of a model on some texts.

    Attributes:
        model: name.
        layers: dotted names of the attention modules, by layer index as a string.
        heads: one entry per layer and head.
        texts: sequences that were read.
        tokens: real tokens that were read.
        sinks: how many first tokens count as sinks.
        local: keys closer than this count as near.
        positions: first position of each bin of positions; bins double.
        by_position: per layer (as in ``layers``), the effective tokens in each bin, averaged over heads; NaN: no row.
        text: what was read.
        notes: what the reader should know.
    """

    model: str
    layers: dict[str, str]
    heads: tuple[HeadReport, ...]
    texts: int
    tokens: int
    sinks: int
    local: int
    positions: tuple[int, ...]
    by_position: dict[str, tuple[float, ...]]
    text: str = ""
    notes: tuple[str, ...] = ()

    def at(self, layer: int, head: int) -> HeadReport:
        """One head.

        Raises:
            KeyError: it was not probed.
        """
        for row in self.heads:
            if (row.layer, row.head) == (layer, head):
                return row
        raise KeyError(f"layer {layer}, head {head} was not probed")

    def of_layer(self, layer: int) -> list[HeadReport]:
        """The heads of one layer, in order."""
        return [row for row in self.heads if row.layer == layer]

    def indices(self) -> list[int]:
        """The layers, in order."""
        return sorted(map(int, self.layers))

    def verdict(self) -> list[str]:
        """What stands out, in sentences."""
        heads = [row for row in self.heads if row.rows]
        if not heads:
            return ["No row of attention was measured."]
        sharp = min(heads, key=lambda row: row.effective_tokens)
        wide = max(heads, key=lambda row: row.effective_share)
        lines = [
            f"Sharpest: layer {sharp.layer} head {sharp.head}, {sharp.effective_tokens:.1f} effective tokens of "
            f"{sharp.keys:.0f}. Most diffuse: layer {wide.layer} head {wide.head}, {wide.effective_tokens:.1f} of "
            f"{wide.keys:.0f} ({wide.effective_share:.0%} of what its rows see)."
        ]
        for what, name in (
            (f"the first {self.sinks} tokens", "sink_mass"),
            (f"{self.local} near tokens", "local_mass"),
        ):
            count = sum(getattr(row, name) > 0.5 for row in heads)
            lines.append(f"{count} of {len(heads)} heads put more than half of their attention on {what}.")
        scaled = [row for row in heads if math.isfinite(row.best_alpha) and row.alpha > 0]
        if scaled:
            ratios = sorted(row.best_alpha / row.alpha for row in scaled)
            lines.append(
                f"Gradient through softmax would peak at {ratios[len(ratios) // 2]:.2g} times the present scale of the "
                f"logits (median over {len(ratios)} heads, {ratios[0]:.2g} to {ratios[-1]:.2g})."
            )
        return lines

    def table(self, by: str = "layer") -> Table:
        """The report as a ``rich`` table.

        Args:
            by: ``"layer"``: a row per layer, means over heads with the range of effective tokens; ``"head"``: a row per
                head.

        Raises:
            ValueError: another word.
        """
        from rich.table import Table

        if by not in ("layer", "head"):
            raise ValueError(f'by must be "layer" or "head", got {by!r}')
        texts = f"{self.texts} text{'' if self.texts == 1 else 's'}"
        table = Table(title=f"Attention on {self.tokens} tokens in {texts}, by {by}")
        table.add_column(by, no_wrap=True)
        columns = (
            "effective\ntokens",
            *(("over heads",) if by == "layer" else ()),
            "of keys",
            "entropy\nnats",
            "max p",
        )
        rest = (f"first {self.sinks}", f"near {self.local}", "distance", "effective\nrank", "scale", "best\nscale")
        for name in (*columns, *rest):
            table.add_column(name, justify="right")
        groups = {str(layer): self.of_layer(layer) for layer in self.indices()}
        if by == "head":
            groups = {f"{row.layer}.{row.head}": [row] for row in self.heads}
        for label, heads in groups.items():
            span = [row.effective_tokens for row in heads]
            table.add_row(
                label,
                _number(_mean(heads, "effective_tokens")),
                *((f"{_number(min(span))}-{_number(max(span))}",) if by == "layer" else ()),
                _number(_mean(heads, "keys")),
                *(f"{_mean(heads, name):.2f}" for name in ("entropy", "max_probability", "sink_mass", "local_mass")),
                _number(_mean(heads, "distance")),
                f"{_number(_mean(heads, 'effective_rank'))} / {max(row.rank_rows for row in heads)}",
                *(f"{_mean(heads, name):.2f}" for name in ("alpha", "best_alpha")),
            )
        return table

    def figure(self) -> Figure:
        """Heat maps by layer and head, and effective tokens by position."""
        from danlu.context.probe.figures import overview

        return overview(self)

    def to_json(self) -> str:
        """The report as JSON text; numbers that are not finite become null."""
        return json.dumps({"format": FORMAT, **finite_or_none(asdict(self))}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> AttentionReport:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: not JSON, or another format version.
        """
        data: dict[str, Any] = json.loads(text)
        if data.pop("format", None) != FORMAT:
            raise ValueError(f"not an attention report of format {FORMAT}")
        data["heads"] = tuple(
            HeadReport(**{name: nan_if_none(value) for name, value in row.items()})  # type: ignore[arg-type]
            for row in data["heads"]
        )
        data["by_position"] = {key: tuple(map(nan_if_none, row)) for key, row in data["by_position"].items()}
        for name in ("positions", "notes"):
            data[name] = tuple(data[name])
        return cls(**data)

    def save(self, path: str | Path) -> Path:
        """Write the JSON to ``path``, whole or not at all."""
        return write_whole(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> AttentionReport:
        """Read what ``save`` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def grid(report: AttentionReport, value: Callable[[HeadReport], float]) -> list[list[float]]:
    """A value by layer (down) and head (across); NaN where a layer has fewer heads."""
    width = max((row.head for row in report.heads), default=-1) + 1
    found = {(row.layer, row.head): value(row) for row in report.heads}
    return [[found.get((layer, head), math.nan) for head in range(width)] for layer in report.indices()]


def _mean(heads: Sequence[HeadReport], name: str) -> float:
    values = [value for row in heads if math.isfinite(value := getattr(row, name))]
    return sum(values) / len(values) if values else math.nan


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
