"""The result of an evaluation by length: numbers, verdict, table, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.context.memory import readable
from danlu.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

FORMAT = 1


@dataclass(frozen=True)
class Measurement:
    """One stack of methods at one length.

    ``losses`` has the mean loss of each window in nats per token; ``methods`` is the Python spelling of the stack.
    """

    stack: str
    length: int
    methods: str
    losses: tuple[float, ...]
    accuracy: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None = None
    peak_bytes: int | None = None

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return sum(self.losses) / len(self.losses)

    @property
    def standard_error(self) -> float:
        """Standard error of ``loss`` over windows; nan for a single window."""
        return _standard_error(self.losses)


@dataclass(frozen=True)
class NeedleScore:
    """Retrieval of the needles of one stack, length and depth (0 = start of the text, 1 = just before the question)."""

    stack: str
    length: int
    depth: float
    trials: int
    accuracy: float
    token_accuracy: float
    log_probability: float


@dataclass(frozen=True)
class LengthReport:
    """What ``evaluate_lengths`` found. Every loss is measured on the same target tokens, so lengths can be compared."""

    model: str
    trained_length: int
    lengths: tuple[int, ...]
    stacks: tuple[str, ...]
    targets: int
    windows: int
    device: str
    dtype: str
    measurements: tuple[Measurement, ...]
    needles: tuple[NeedleScore, ...] = ()
    bytes_per_token: float | None = None
    memory_kind: str = ""
    text: str = ""
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def at(self, stack: str, length: int) -> Measurement:
        """The measurement of one stack at one length.

        Raises:
            ValueError: that pair was not measured.
        """
        for row in self.measurements:
            if row.stack == stack and row.length == length:
                return row
        raise ValueError(f"no measurement of stack {stack!r} at length {length}: have {self.stacks} at {self.lengths}")

    def best(self, length: int | None = None) -> str:
        """The stack with the lowest finite loss at ``length`` (default: the longest).

        Raises:
            ValueError: no stack has a finite loss there.
        """
        length = self.lengths[-1] if length is None else length
        rows = [self.at(stack, length) for stack in self.stacks]
        finite = [row for row in rows if math.isfinite(row.loss)]
        if not finite:
            raise ValueError(f"no method has a finite loss at length {length}")
        return min(finite, key=lambda row: row.loss).stack

    def change(self, stack: str, other: str | None = None) -> tuple[float, float]:
        """How the loss changes with context, paired by window.

        Args:
            stack: a label of this report.
            other: None compares the longest length with the shortest; a label, ``stack`` with it at the longest.

        Returns:
            Mean difference in nats per token (negative: ``stack`` gained) and its standard error.
        """
        long = self.at(stack, self.lengths[-1]).losses
        reference = (self.at(stack, self.lengths[0]) if other is None else self.at(other, self.lengths[-1])).losses
        differences = tuple(a - b for a, b in zip(long, reference, strict=True))
        return sum(differences) / len(differences), _standard_error(differences)

    def needle_accuracy(self, stack: str, length: int) -> tuple[float, float] | None:
        """Over all depths: share of needles found whole, share of their tokens. None when they were not tried."""
        rows = [row for row in self.needles if row.stack == stack and row.length == length]
        if not rows:
            return None
        trials = sum(row.trials for row in rows)
        whole = sum(row.accuracy * row.trials for row in rows) / trials
        return whole, sum(row.token_accuracy * row.trials for row in rows) / trials

    def bits_per_byte(self, loss: float) -> float | None:
        """A loss in nats per token as bits per byte of text; None when no tokenizer was given."""
        return None if self.bytes_per_token is None else loss / math.log(2) / self.bytes_per_token

    def verdict(self) -> list[str]:
        """The findings in sentences: the best stack, what more context did, who finds the needle."""
        longest, shortest = self.lengths[-1], self.lengths[0]
        best = self.best()
        row = self.at(best, longest)
        lines = [f"Best at {longest} tokens: {best}, loss {row.loss:.3f} nats/token."]
        if longest > shortest:
            change, error = self.change(best)
            # Two standard errors of the paired difference; a single window gives no error to judge by.
            clear = math.isfinite(error) and abs(change) > 2 * error
            word = "lowers" if change < 0 else "raises"
            word = f"Longer context {word} its loss" if clear else "Longer context makes no clear difference to it"
            lines.append(f"{word}: {change:+.3f} ± {error:.3f} from {shortest} to {longest} tokens.")
        if compared := self._against_window(best):
            lines.append(compared)
        scores = {stack: self.needle_accuracy(stack, longest) for stack in self.stacks}
        found = {stack: score for stack, score in scores.items() if score is not None}
        if found:
            # By tokens: a small model seldom has a whole needle right, and then the share of tokens still tells.
            finder = max(found, key=lambda stack: (found[stack][1], stack == best))
            said = [
                f"{found[name][1]:.0%} of tokens, {found[name][0]:.0%} whole, with {name}" for name in (finder, best)
            ]
            lines.append(f"Needles at {longest} tokens: {'; '.join(dict.fromkeys(said))}.")
        return lines

    def _against_window(self, best: str) -> str | None:
        """The best stack that sees the whole text against the best sliding window, where the report has both."""
        longest = self.lengths[-1]
        ranked = sorted(self.stacks, key=lambda stack: _nan_last(self.at(stack, longest).loss))
        near = [stack for stack in ranked if "Window(" in self.at(stack, longest).methods]
        whole = [stack for stack in ranked if stack not in near]
        if not near or not whole:
            return None
        change, error = self.change(whole[0], near[0])
        label = f"Best that sees the whole text: {whole[0]}, " if whole[0] != best else ""
        return f"{label}{change:+.3f} ± {error:.3f} against {near[0]} at {longest} tokens."

    def table(self) -> Table:
        """The report as a ``rich`` table: loss by length, needles, speed and memory at the longest length."""
        from rich.table import Table

        longest, best = self.lengths[-1], self.best()
        table = Table(title=f"Loss (nats/token) of the same {self.targets * self.windows} tokens, by context length")
        table.add_column("method", no_wrap=True)
        for length in self.lengths:
            table.add_column(str(length), justify="right")
        if self.needles:
            table.add_column(f"needle@{longest}\ntokens (whole)", justify="right")
        for name in ("prefill tok/s", "decode tok/s", "peak memory"):
            table.add_column(name, justify="right")
        for stack in self.stacks:
            row = self.at(stack, longest)
            cells = [stack, *(f"{self.at(stack, length).loss:.3f}" for length in self.lengths)]
            if self.needles:
                score = self.needle_accuracy(stack, longest)
                cells.append("-" if score is None else f"{score[1]:.0%} ({score[0]:.0%})")
            cells.append(f"{row.prefill_tokens_per_second:,.0f}")
            cells.append("-" if row.decode_tokens_per_second is None else f"{row.decode_tokens_per_second:,.0f}")
            cells.append("-" if row.peak_bytes is None else readable(row.peak_bytes))
            table.add_row(*cells, style="bold" if stack == best else None)
        return table

    def figure(self) -> Figure:
        """Loss, needles and cost by length, side by side."""
        from danlu.context.figures import overview

        return overview(self)

    def to_json(self) -> str:
        """The report as JSON text; numbers that are not finite become null."""
        return json.dumps({"format": FORMAT, **finite_or_none(asdict(self))}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> LengthReport:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: not JSON, or another format version.
        """
        data: dict[str, Any] = json.loads(text)
        if data.pop("format", None) != FORMAT:
            raise ValueError(f"not a length report of format {FORMAT}")
        data["measurements"] = tuple(
            Measurement(**{**row, "losses": tuple(nan_if_none(x) for x in row["losses"])})
            for row in data["measurements"]
        )
        data["needles"] = tuple(
            NeedleScore(**{**row, "log_probability": nan_if_none(row["log_probability"])}) for row in data["needles"]
        )
        for name in ("lengths", "stacks", "notes"):
            data[name] = tuple(data[name])
        return cls(**data)

    def save(self, path: str | Path) -> Path:
        """Write the JSON to ``path``, whole or not at all."""
        return write_whole(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LengthReport:
        """Read what ``save`` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _standard_error(values: Sequence[float]) -> float:
    count = len(values)
    if count < 2:
        return math.nan
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def finite_or_none(value: Any) -> Any:
    """Replace numbers that JSON does not know by None, inside dictionaries and sequences too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


def _nan_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def nan_if_none(value: float | None) -> float:
    """Undo ``finite_or_none`` for one number."""
    return math.nan if value is None else value
