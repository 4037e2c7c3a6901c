"""How much of a codebook is used, counted over a whole data set and over all processes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from danlu.vision.quantizer import Quantizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CodebookUse:
    """Use of one codebook.

    Attributes:
        size: number of codes.
        tokens: number of indices counted.
        used: codes that occur.
        perplexity: exp of the entropy of the counts: as many equally likely codes would carry as much.
        counts: how often each used code occurs, most frequent first.
    """

    size: int
    tokens: int
    used: int
    perplexity: float
    counts: tuple[int, ...]

    @property
    def dead(self) -> int:
        """Codes that never occur."""
        return self.size - self.used

    @property
    def share(self) -> float:
        """Used codes as a share of all codes."""
        return self.used / self.size

    @property
    def attainable_share(self) -> float:
        """Used codes as a share of what this many tokens can use at most: below 1 on little data is no collapse."""
        return self.used / min(self.size, self.tokens) if self.tokens else math.nan


@dataclass(frozen=True)
class UsageReport:
    """Use of every codebook of a quantizer.

    Attributes:
        codebooks: one entry per codebook.
    """

    codebooks: tuple[CodebookUse, ...]

    def __str__(self) -> str:
        header = f"{'codes':>12} {'tokens':>10} {'used':>10} {'share':>7} {'of attainable':>13} {'perplexity':>11}"
        lines = [
            f"{use.size:>12} {use.tokens:>10} {use.used:>10} {use.share:>7.1%} {use.attainable_share:>13.1%} "
            f"{use.perplexity:>11.1f}"
            for use in self.codebooks
        ]
        return "\n".join([header, *lines])

    def to_json(self) -> str:
        """The numbers as a JSON document, with the derived ones."""
        derived = ("dead", "share", "attainable_share")
        entries = []
        for use in self.codebooks:
            numbers = asdict(use) | {name: getattr(use, name) for name in derived}
            finite = {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in numbers.items()}
            entries.append(finite)
        return json.dumps({"format": 1, "codebooks": entries}, indent=2, allow_nan=False)

    def figure(self) -> Figure:
        """Counts by rank, both axes logarithmic: a flat line uses all codes alike, an early end leaves codes dead."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(
            xlabel="rank of the code", ylabel="times used", xscale="log", yscale="log", title="Use of the codebook"
        )
        for number, use in enumerate(self.codebooks):
            label = (
                f"codebook {number}: {use.used} of {use.size}"
                if len(self.codebooks) > 1
                else f"{use.used} of {use.size}"
            )
            (line,) = axes.plot(range(1, use.used + 1), use.counts, label=label)
            axes.axvline(use.size, color=line.get_color(), linestyle=":", linewidth=1)
        axes.legend()
        return figure


class CodebookUsage:
    """Counts indices batch by batch. What it holds grows with the codes that occur, not with the size of the codebook.

    Args:
        codebook_sizes: of each codebook, or a quantizer that has them.

    Raises:
        ValueError: no sizes, or one below 1.
    """

    def __init__(self, codebook_sizes: Sequence[int] | Quantizer) -> None:
        sizes = codebook_sizes.codebook_sizes if isinstance(codebook_sizes, Quantizer) else tuple(codebook_sizes)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"codebook_sizes must be numbers >= 1, at least one, got {sizes}")
        self.codebook_sizes = sizes
        empty = torch.zeros(0, dtype=torch.int64)
        self._counts = [(empty, empty) for _ in sizes]

    def update(self, indices: Tensor) -> None:
        """Count a batch.

        Args:
            indices: integers; with several codebooks, one per codebook in the last axis.

        Raises:
            TypeError: indices are not integers.
            ValueError: an index out of range, or another number of codebooks.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        several = len(self.codebook_sizes) > 1
        if several and (indices.ndim == 0 or indices.shape[-1] != len(self.codebook_sizes)):
            raise ValueError(
                f"indices must have a last axis of {len(self.codebook_sizes)}, one per codebook, got "
                f"{tuple(indices.shape)}"
            )
        columns = indices.unbind(-1) if several else [indices]
        found = []
        for column, size in zip(columns, self.codebook_sizes, strict=True):
            codes, counts = column.detach().long().flatten().unique(return_counts=True)
            if len(codes) and not (codes[0] >= 0 and int(codes[-1]) < size):
                raise ValueError(f"indices must be in 0..{size - 1}, got {int(codes[0])} to {int(codes[-1])}")
            found.append((codes.cpu(), counts.cpu()))
        self._counts = [_merge([old, new]) for old, new in zip(self._counts, found, strict=True)]

    def codes(self, codebook: int = 0) -> tuple[Tensor, Tensor]:
        """Codes that occur, in ascending order, and how often; over all processes, which must all call it.

        Args:
            codebook: which one.

        Returns:
            Two int64 tensors on the CPU.
        """
        return _merge(_from_all(self._counts[codebook]))

    def report(self) -> UsageReport:
        """The numbers so far; with ``torch.distributed`` initialised, of all processes, which must all call it."""
        uses = []
        for number, size in enumerate(self.codebook_sizes):
            _, counts = self.codes(number)
            tokens = int(counts.sum())
            p = counts.double() / max(tokens, 1)
            perplexity = float(torch.special.entr(p).sum().exp()) if tokens else math.nan
            ordered = tuple(counts.sort(descending=True).values.tolist())
            uses.append(CodebookUse(size, tokens, len(counts), perplexity, ordered))
        return UsageReport(tuple(uses))


def measure_usage(model: Any, batches: Iterable[Tensor]) -> UsageReport:
    """Encode a whole data set and report the use of the codebooks.

    Args:
        model: a quantizer or an autoencoder of this package: ``encode`` gives indices, ``codebook_sizes`` their range.
        batches: inputs of ``encode``; with several processes, each one's share.

    Returns:
        The report, over all processes.
    """
    from danlu.progress import watched

    usage = CodebookUsage(model.codebook_sizes)
    for batch in watched(batches, "codebook use") if isinstance(batches, Sequence) else batches:
        usage.update(model.encode(batch))
    return usage.report()


def _merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    codes, place = torch.cat([part[0] for part in parts]).unique(return_inverse=True)
    return codes, torch.zeros_like(codes).index_add_(0, place, torch.cat([part[1] for part in parts]))


def _from_all(counts: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The counts of every process; tensors only, so that nothing is unpickled."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [counts]
    device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    world = distributed.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    distributed.all_gather(lengths, torch.tensor([len(counts[0])], device=device))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(2, longest, dtype=torch.int64, device=device)
    padded[:, : len(counts[0])] = torch.stack(counts).to(device)
    gathered = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(gathered, padded)
    return [(both[0, : int(n)].cpu(), both[1, : int(n)].cpu()) for both, n in zip(gathered, lengths, strict=True)]
