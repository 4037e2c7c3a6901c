"""Codebooks of quantised keys: nearest codes, and an exponential moving average that follows the keys in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danlu.attention.linear.inputs import widen

# A code with less than this much weight is divided by this instead: it moves towards zero and not to infinity.
_LEAST_COUNT = 0.01


def nearest_codes(k: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest to each key; ties go to the first.

    Args:
        k: (batch, kv_heads, length, dim).
        codebook: (kv_heads, codes, dim).

    Returns:
        int64 tensor (batch, kv_heads, length).
    """
    with torch.no_grad():
        k = widen(k)
        codebook = codebook.to(k.dtype)
        return (k @ codebook.mT - codebook.square().sum(-1)[:, None] / 2).argmax(-1)


def look_up(codes: Tensor, codebook: Tensor) -> Tensor:
    """Rows of a codebook per head.

    Args:
        codes: (batch, kv_heads, length) int64.
        codebook: (kv_heads, codes, dim).

    Returns:
        Tensor (batch, kv_heads, length, dim).
    """
    heads = torch.arange(codebook.shape[0], device=codebook.device)[None, :, None]
    return codebook[heads, codes]


class VQCodebook(nn.Module):
    """One codebook per key-value head, moved by keys and not by gradients.

    Training forwards :meth:`record` their keys; the average moves when the next one begins (:meth:`apply_pending`), so
    that a forward, its backward pass and its recomputation under gradient checkpointing all see one codebook. Each
    forward counts as one step, also within gradient accumulation. Numbers stay in float32 when the model is cast. With
    ``torch.distributed`` initialised, sums are added over all ranks, which must take the same number of training steps.

    Args:
        kv_heads: number of codebooks.
        codes: codes per head, >= 1.
        dim: length of a code.
        decay: of the average, in [0, 1).
        revive_below: a code whose count falls below this is replaced by a random key of the batch; 0: never.
        seed: of the first codes and of those draws.

    Attributes:
        frozen: no more moving; set it for a codebook that is fixed.

    Raises:
        ValueError: a size or rate out of range.

    Source: Scientific Spaces archive 9844; arXiv:2309.16354; arXiv:1711.00937 (the moving average)
    """

    sums: Tensor
    counts: Tensor
    steps: Tensor
    pending_sums: Tensor
    pending_counts: Tensor
    pending_keys: Tensor

    def __init__(
        self, kv_heads: int, codes: int, dim: int, *, decay: float = 0.99, revive_below: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        if min(kv_heads, codes, dim) < 1:
            raise ValueError(f"kv_heads, codes and dim must be at least 1, got {kv_heads}, {codes} and {dim}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}; 0.99 is usual")
        if revive_below < 0:
            raise ValueError(f"revive_below must be at least 0, got {revive_below}")
        self.decay = decay
        self.revive_below = revive_below
        self.seed = seed
        self.frozen = False
        shape = (kv_heads, codes, dim)
        self.register_buffer("sums", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("counts", torch.empty(shape[:2], dtype=torch.float32))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        # statistics of the last training forward; counts below zero: there are none
        self.register_buffer("pending_sums", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.register_buffer("pending_counts", torch.empty(shape[:2], dtype=torch.float32), persistent=False)
        kept = codes if revive_below else 0
        self.register_buffer("pending_keys", torch.empty((kv_heads, kept, dim), dtype=torch.float32), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Standard normal codes, each with a count of 1."""
        self.steps.zero_()
        self.set(torch.randn(self.sums.shape, generator=self._generator(), device="cpu"))

    @torch.no_grad()
    def set(self, codebook: Tensor) -> None:
        """Start from given codes, for instance the centres that ``compress_keys`` found.

        Args:
            codebook: (kv_heads, codes, dim).

        Raises:
            ValueError: another shape.
        """
        if codebook.shape != self.sums.shape:
            raise ValueError(f"codebook must have shape {tuple(self.sums.shape)}, got {tuple(codebook.shape)}")
        self.sums.copy_(codebook)
        self.counts.fill_(1.0)
        self._forget_pending()

    @property
    def codebook(self) -> Tensor:
        """The codes, float32 (kv_heads, codes, dim)."""
        return self.sums / self.counts.clamp_min(_LEAST_COUNT)[..., None]

    @torch.no_grad()
    def record(self, k: Tensor, codes: Tensor, valid: Tensor | None = None) -> None:
        """Keep the statistics of a training forward, in place of those of the one before.

        Args:
            k: keys (batch, kv_heads, length, dim); non-finite ones are left out.
            codes: (batch, kv_heads, length), from :func:`nearest_codes`.
            valid: (batch, length) bool, True = counts; None: all.
        """
        if self.frozen:
            return
        k = k.detach().float()
        weight = k.isfinite().all(-1)
        if valid is not None:
            weight = weight & valid[:, None]
        k = torch.where(weight[..., None], k, torch.zeros_like(k)).transpose(0, 1).flatten(1, 2)
        codes, weight = codes.transpose(0, 1).flatten(1, 2), weight.transpose(0, 1).flatten(1, 2)
        self.pending_counts.zero_().scatter_add_(1, codes, weight.float())
        self.pending_sums.zero_().scatter_add_(1, codes[..., None].expand_as(k), k)
        if self.pending_keys.numel():
            order = torch.rand(weight.shape, generator=self._generator(), device="cpu").to(k.device)
            count = self.pending_keys.shape[1]
            real = weight.sum(1, keepdim=True).clamp_min(1)
            drawn = order.masked_fill(~weight, 2.0).argsort(1)
            drawn = drawn.gather(1, torch.arange(count, device=k.device) % real)
            self.pending_keys.copy_(k.gather(1, drawn[..., None].expand(-1, -1, k.shape[-1])))

    @torch.no_grad()
    def apply_pending(self) -> None:
        """Move the average by the last recorded statistics; nothing to do where there are none."""
        if self.frozen or self.pending_counts.is_meta or bool(self.pending_counts.flatten()[0] < 0):
            return
        self._add_over_ranks()
        # a step without a single real token teaches nothing
        taught = self.pending_counts.sum(-1, keepdim=True) > 0
        for average, new, where in (
            (self.counts, self.pending_counts, taught),
            (self.sums, self.pending_sums, taught[..., None]),
        ):
            average.copy_(torch.where(where, self.decay * average + (1 - self.decay) * new, average))
        if self.revive_below:
            dead = (self.counts < self.revive_below) & taught
            self.sums.copy_(torch.where(dead[..., None], self.pending_keys, self.sums))
            self.counts.masked_fill_(dead, 1.0)
        self.steps += 1
        self._forget_pending()

    def _add_over_ranks(self) -> None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(self.pending_sums)
            distributed.all_reduce(self.pending_counts)
            if self.revive_below:
                distributed.broadcast(self.pending_keys, 0)

    def _forget_pending(self) -> None:
        self.pending_counts.fill_(-1.0)
        self.pending_sums.zero_()
        self.pending_keys.zero_()

    def _generator(self) -> torch.Generator:
        step = 0 if self.steps.is_meta else int(self.steps)
        return torch.Generator(device="cpu").manual_seed(self.seed * 1_000_003 + step)

    def _apply(self, fn, recurse: bool = True):
        """Move between devices, but stay in float32: an average in bfloat16 would stop moving."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
