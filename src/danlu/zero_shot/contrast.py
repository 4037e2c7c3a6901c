"""Labels for pairs from how their scores compare with each other: needs no labelled pair, only the label shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["SamplesContrast"]

Rule = Literal["midpoint", "largest"]


class SamplesContrast:
    """Sort pairs by score and cut the sorted list by the shares of the labels.

    Labels are numbered by closeness: 0 different, 1 same; or 0 contradiction, 1 neutral, 2 entailment. :meth:`segment`
    labels a whole set (transductive: a pair's label depends on the other pairs, so say so beside the result, and do
    not do it on small sets or on sets sorted by class). :meth:`fit` learns thresholds from a set, labelled or not,
    and :meth:`predict` applies them to any pair.

    Args:
        shares: share of each label, from the least to the most close, summing to 1; or their number, for equal shares.
        rule: where a threshold lies between two neighbours of different labels: at the ``midpoint``, or, as in the
            published code, at the ``largest`` score below the cut. The latter gives the pair with that very score the
            next label, not its own.

    Raises:
        ValueError: fewer than two labels, shares that are not positive or do not sum to 1, an unknown rule.

    Source: Scientific Spaces archive 8671; arXiv:2109.03564
    """

    def __init__(self, shares: int | Sequence[float], rule: Rule = "midpoint") -> None:
        listed = [1 / shares] * shares if isinstance(shares, int) and shares > 0 else shares
        if isinstance(listed, int) or len(listed) < 2:
            raise ValueError(f"shares must name at least two labels, got {shares}")
        if min(listed) <= 0 or abs(sum(listed) - 1) > 1e-6:
            raise ValueError(f"shares must be positive and sum to 1, got {shares} with sum {sum(listed):g}")
        if rule not in get_args(Rule):
            raise ValueError(f"rule must be midpoint or largest, got {rule!r}")
        self.shares = tuple(float(share) for share in listed)
        self.rule = rule
        self.thresholds: tuple[float, ...] | None = None

    def fit(self, scores: Sequence[float] | Tensor) -> SamplesContrast:
        """Learn the thresholds between labels.

        Args:
            scores: (pairs,), at least one pair for each label; a sample of what will be classified, in any order.

        Returns:
            This object, with ``thresholds``.

        Raises:
            ValueError: too few pairs, or scores that are not finite.
        """
        ordered, cuts = self._cuts(scores)
        if min(stop - start for start, stop in zip([0, *cuts], [*cuts, len(ordered)], strict=True)) < 1:
            raise ValueError(
                f"scores must hold a pair for each of {len(self.shares)} labels at shares {self.shares}, got "
                f"{len(ordered)} pairs: take more"
            )
        below, above = ordered[[cut - 1 for cut in cuts]], ordered[cuts]
        self.thresholds = tuple((below if self.rule == "largest" else (below + above) / 2).tolist())
        return self

    def predict(self, scores: Sequence[float] | Tensor) -> Tensor:
        """Label pairs one by one: the number of thresholds that a score reaches.

        Args:
            scores: (pairs,).

        Returns:
            int64 (pairs,).

        Raises:
            ValueError: not fitted yet.
        """
        if self.thresholds is None:
            raise ValueError("fit must come before predict; to label a whole set by itself take segment")
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
        return torch.searchsorted(thresholds, _vector(scores), right=True)

    def segment(self, scores: Sequence[float] | Tensor) -> Tensor:
        """Label a whole set: the lowest scores get label 0 and so on, ``floor(share N)`` each, the last one the rest.

        Only the order of the scores counts; equal scores stay in the order in which they are given.

        Args:
            scores: (pairs,).

        Returns:
            int64 (pairs,).
        """
        ordered, cuts = self._cuts(scores)
        labels = torch.zeros(len(ordered), dtype=torch.int64)
        for cut in cuts:
            labels[cut:] += 1
        return torch.empty_like(labels).scatter_(0, _vector(scores).argsort(stable=True), labels)

    def _cuts(self, scores: Sequence[float] | Tensor) -> tuple[Tensor, list[int]]:
        ordered = _vector(scores).sort(stable=True).values
        cuts = [0]
        for share in self.shares[:-1]:
            cuts.append(cuts[-1] + int(share * len(ordered) + 1e-9))
        return ordered, cuts[1:]


def _vector(scores: Sequence[float] | Tensor) -> Tensor:
    vector = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
    if vector.ndim != 1 or not bool(vector.isfinite().all()):
        raise ValueError(f"scores must be finite numbers, one per pair, got a shape of {tuple(vector.shape)}")
    return vector
