"""Randomised positions: train on stretched position ids, so that a longer test text brings none that is new.

Two draws, one per sample. *subset* (the paper): the n positions are a sorted random subset of 0..max_length-1; the
model learns order, not ids. *equal_mean* (the article): positions 0..n-1 are multiplied by one random real number per
sample, so that their mean is (nearly) the plain 0, 1, 2, ...; real positions need a position encoding that is a
function, such as RoPE, and not a table. Both are for encoders and for causal models that score a text of known length:
at test time a subset model wants positions spread over the whole range, which generation, whose final length is
unknown, cannot give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["subset", "equal_mean"]
Distribution = Literal["exponential", "beta"]
Seed = int | torch.Generator | np.random.Generator


def subset_positions(length: int, max_length: int, *, batch: int = 1, seed: Seed = 0) -> Tensor:
    """Draw sorted random subsets of 0..max_length-1, uniformly over all subsets.

    Args:
        length: Positions per sample, 1..max_length.
        max_length: Size of the range, more than the longest test text.
        batch: Samples, >= 1; each has its own subset.
        seed: An integer, a torch.Generator or a numpy Generator (both are advanced).

    Returns:
        int64 tensor (batch, length), strictly increasing along the last axis.

    Raises:
        ValueError: A value outside its range.

    Source: Scientific Spaces archive 9444; arXiv:2305.16843.
    """
    _check_count("batch", batch, 1)
    _check_count("max_length", max_length, 1)
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= max_length:
        raise ValueError(f"length must be in 1..{max_length} (max_length), got {length!r}")
    rng = _numpy_generator(seed)
    rows = [np.sort(rng.choice(max_length, length, replace=False, shuffle=False)) for _ in range(batch)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def equal_mean_positions(
    length: int,
    trained_length: int,
    *,
    max_length: int | None = None,
    distribution: Distribution = "exponential",
    concentration: float = 1.0,
    batch: int = 1,
    seed: Seed = 0,
) -> Tensor:
    """Draw equally spaced real positions whose mean over draws is that of the plain positions.

    Per sample one n >= 0 with mean N = trained_length is drawn, and position j is j * n / (N - 1), which for a text of
    N tokens is the article's linspace(0, n, N). The mean of position j is j * N / (N - 1), as in the article; with n of
    mean N - 1 it would be j exactly.

    Args:
        length: Positions per sample, >= 1.
        trained_length: N, tokens, >= 2.
        max_length: M, the longest test text; needed by "beta", must exceed N, and bounds n. "exponential" has no bound
            (it exceeds 4 N in 2 % of the draws) and takes none.
        distribution: "exponential" or "beta": n = M * Beta(a, b) with a = concentration and b = a * (M / N - 1).
        concentration: a of the beta distribution, > 0.
        batch: Samples, >= 1; each has its own n.
        seed: An integer, a torch.Generator or a numpy Generator (both are advanced).

    Returns:
        float32 tensor (batch, length), starting at 0. At test time use plain positions 0, 1, 2, ...

    Raises:
        ValueError: A value outside its range.

    Source: Scientific Spaces archive 9444.
    """
    _check_count("batch", batch, 1)
    _check_count("length", length, 1)
    _check_equal_mean(trained_length, max_length, distribution, concentration)
    rng = _numpy_generator(seed)
    if distribution == "exponential":
        ends = rng.exponential(trained_length, size=(batch, 1))
    else:
        assert max_length is not None
        ends = max_length * rng.beta(concentration, concentration * (max_length / trained_length - 1), size=(batch, 1))
    return torch.from_numpy(np.arange(length) * ends / (trained_length - 1)).to(torch.float32)


def evenly_spaced_positions(length: int, max_length: int) -> Tensor:
    """Test-time positions for a model trained with `subset_positions`: `length` points spread over 0..max_length-1.

    Args:
        length: Tokens of the test text, 1..max_length.
        max_length: The range that training drew from.

    Returns:
        float32 tensor (length,); a text of one token is at 0. Pass it as `position_ids` with an explicit
        attention mask.

    Raises:
        ValueError: A value outside its range.

    Source: Scientific Spaces archive 9444 (better than drawing at test time).
    """
    _check_count("max_length", max_length, 1)
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= max_length:
        raise ValueError(f"length must be in 1..{max_length} (max_length), got {length!r}")
    return torch.linspace(0, max_length - 1, length, dtype=torch.float64).to(torch.float32)


class RandomPositionCollator:
    """Wrap a data collator so that every training batch carries random `position_ids` and an explicit mask.

    The mask matters: without one, and without a cache, transformers takes any step between positions other than 1 for
    the border of two packed documents and cuts attention there. Padding keeps its place: the first real token of a row
    gets the first drawn position, on whichever side the padding is.

    Real positions are float32 and stay so through a transformers model. DeepSpeed casts float inputs to the training
    dtype; in bf16 neighbouring positions merge, so use kind="subset" there. Models with a table of learned positions
    take kind="subset" only, with max_length at most the size of the table.

    Use the wrapped collator for training; evaluate with the bare one, and with `evenly_spaced_positions` after
    "subset". Do not generate with a "subset" model: the final length, and so the spacing, is unknown.

    Args:
        collator: Any collator that returns a mapping with `input_ids` (batch, length) as a tensor.
        kind: "subset" or "equal_mean".
        trained_length: N, longest training text, tokens, >= 2; a longer batch is refused.
        max_length: Range of "subset" (needed, > N); M of "equal_mean" with "beta".
        distribution: For "equal_mean": "exponential" (default) or "beta".
        concentration: As in `equal_mean_positions`.
        seed: An integer, or a torch.Generator to draw one from. Data-loader workers get streams of their own.

    Raises:
        ValueError: A value outside its range.

    Source: Scientific Spaces archive 9444; arXiv:2305.16843.
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Any]], Mapping[str, Any]],
        kind: Kind = "subset",
        *,
        trained_length: int,
        max_length: int | None = None,
        distribution: Distribution = "exponential",
        concentration: float = 1.0,
        seed: int | torch.Generator = 0,
    ) -> None:
        if kind not in ("subset", "equal_mean"):
            raise ValueError(f"kind must be 'subset' or 'equal_mean', got {kind!r}")
        _check_count("trained_length", trained_length, 2)
        if kind == "subset":
            if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length <= trained_length:
                raise ValueError(
                    f"max_length must be an integer > trained_length={trained_length} for kind='subset' "
                    f"(more than the longest test text), got {max_length!r}"
                )
        else:
            _check_equal_mean(trained_length, max_length, distribution, concentration)
        self.collator, self.kind = collator, kind
        self.trained_length, self.max_length = trained_length, max_length
        self.distribution, self.concentration = distribution, concentration
        self.seed = _integer_seed(seed)
        self._rng, self._stream = np.random.default_rng(self.seed), -1

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """Collate, then add `position_ids` and, where it is missing, `attention_mask`."""
        batch = dict(self.collator(features))
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise ValueError("the wrapped collator must return input_ids as a tensor (batch, length): ask it for 'pt'")
        if "position_ids" in batch:
            raise ValueError(
                "the wrapped collator already sets position_ids (packed documents?): use one that does not"
            )
        if ids.shape[1] > self.trained_length:
            raise ValueError(f"texts must have at most trained_length={self.trained_length} tokens, got {ids.shape[1]}")
        if batch.get("attention_mask") is None:
            batch["attention_mask"] = torch.ones_like(ids)
        mask = batch["attention_mask"]
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask must have shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
        batch["position_ids"] = self._positions(mask != 0)
        return batch

    def _positions(self, real: Tensor) -> Tensor:
        rng = self._generator()
        rank = (real.cumsum(-1) - 1).clamp(min=0)  # of a token among the real ones of its row
        if self.kind == "equal_mean":
            drawn = equal_mean_positions(
                real.shape[1],
                self.trained_length,
                max_length=self.max_length,
                distribution=self.distribution,
                concentration=self.concentration,
                batch=real.shape[0],
                seed=rng,
            )
        else:
            assert self.max_length is not None
            drawn = torch.zeros(real.shape, dtype=torch.int64)
            for row, count in enumerate(real.sum(-1).tolist()):
                if count:  # as many as there are tokens: the head of a longer subset would favour small positions
                    drawn[row, :count] = subset_positions(count, self.max_length, seed=rng)[0]
        return drawn.to(real.device).gather(1, rank)

    def _generator(self) -> np.random.Generator:
        # A worker starts each epoch with a copy of this object. Its own per-epoch seed keeps workers and epochs apart.
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.seed != self._stream:
            self._rng, self._stream = np.random.default_rng([self.seed, worker.seed]), worker.seed
        return self._rng


def _check_equal_mean(trained_length: int, max_length: int | None, distribution: str, concentration: float) -> None:
    _check_count("trained_length", trained_length, 2)
    if distribution not in ("exponential", "beta"):
        raise ValueError(f"distribution must be 'exponential' or 'beta', got {distribution!r}")
    if distribution == "exponential":
        if max_length is not None:
            raise ValueError(f"max_length must be None for 'exponential' (it has no upper end), got {max_length!r}")
    elif isinstance(max_length, bool) or not isinstance(max_length, int) or max_length <= trained_length:
        raise ValueError(f"max_length must be an integer > trained_length={trained_length}, got {max_length!r}")
    if not isinstance(concentration, (int, float)) or not 0 < concentration < float("inf"):
        raise ValueError(f"concentration must be a finite number > 0, got {concentration!r}")


def _check_count(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")


def _numpy_generator(seed: Seed) -> np.random.Generator:
    return seed if isinstance(seed, np.random.Generator) else np.random.default_rng(_integer_seed(seed))


def _integer_seed(seed: int | torch.Generator) -> int:
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**62, (1,), generator=seed, device=seed.device))
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0 or a torch.Generator, got {seed!r}")
    return seed
