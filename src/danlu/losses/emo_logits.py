"""Where the logits of a loss come from and its gradients go to: logits that are there, or hidden states and a head."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums over the vocabulary are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Workspace:
    """Buffers that are allocated once and used for every tile."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """An uninitialised (rows, columns) matrix; the next call with the same name may reuse its memory."""
        size = rows * columns
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._flat[name][:size].view(rows, columns)


class LogitSource(Protocol):
    """Where tiles of logits come from and gradients go to."""

    rows: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device

    def begin(self, wanted: tuple[bool, ...], chunks: int) -> None:
        """Make room for gradients, one flag for each tensor; ``chunks`` groups of rows will add to them."""

    def tile(self, index: Tensor, start: int, stop: int, space: Workspace) -> Tensor:
        """Logits of some rows and columns, in the space's dtype, free to be overwritten."""

    def pull_back(self, index: Tensor, start: int, stop: int, dz: Tensor) -> None:
        """Take the gradient to the last tile that was made; it is free to be overwritten."""

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors of the source."""


class GivenLogits:
    """Logits that are there already, shape (N, V); tiles are whole rows."""

    def __init__(self, logits: Tensor):
        self.logits = logits
        self.rows, self.vocabulary = logits.shape
        self.dtype, self.device = logits.dtype, logits.device
        self._gradient: Tensor | None = None

    def begin(self, wanted: tuple[bool, ...], chunks: int) -> None:
        """Make room for the gradients that are wanted."""
        self._gradient = torch.zeros_like(self.logits, memory_format=torch.contiguous_format) if wanted[0] else None

    def tile(self, index: Tensor, start: int, stop: int, space: Workspace) -> Tensor:
        """Logits of some rows and columns."""
        out = space.take("logits", len(index), stop - start)
        if self.dtype == out.dtype:
            return torch.index_select(self.logits, 0, index, out=out)
        return out.copy_(self.logits.index_select(0, index))

    def pull_back(self, index: Tensor, start: int, stop: int, dz: Tensor) -> None:
        """Take the gradient to the last tile."""
        if self._gradient is not None:
            self._gradient.index_copy_(0, index, dz.to(self.dtype))

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors."""
        return (self._gradient,)


class HeadLogits:
    """Logits softcap * tanh(logit_scale * (h W^T + b) / softcap), which are never all there at once.

    Args:
        hidden: h, shape (N, d).
        weight: W, shape (V, d).
        bias: b, shape (V,), or none.
        softcap: none means no cap.
        logit_scale: factor of the logits.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None, logit_scale: float = 1
    ):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.softcap, self.logit_scale = softcap, logit_scale
        self.rows, self.vocabulary = len(hidden), len(weight)
        self.dtype, self.device = hidden.dtype, hidden.device
        self._slope: Tensor | None = None
        self._sums: list[Tensor | None] = [None, None, None]

    def begin(self, wanted: tuple[bool, ...], chunks: int) -> None:
        """Make room for the gradients that are wanted."""
        # Sums over chunks are wide: a bfloat16 sum of many terms loses most of the small ones.
        head = self.dtype if chunks == 1 else wide(self.dtype)
        tensors, types = (self.hidden, self.weight, self.bias), (wide(self.dtype), head, head)
        self._sums = [
            torch.zeros_like(tensor, dtype=dtype) if want and tensor is not None else None
            for tensor, dtype, want in zip(tensors, types, wanted, strict=True)
        ]

    def tile(self, index: Tensor, start: int, stop: int, space: Workspace) -> Tensor:
        """Logits of some rows and columns."""
        out = space.take("logits", len(index), stop - start)
        h, columns = self.hidden.index_select(0, index), self.weight[start:stop]
        if out.dtype == self.dtype:
            torch.mm(h, columns.T, out=out)
        else:
            out.copy_(h @ columns.T)
        if self.bias is not None:
            out += self.bias[start:stop]
        if self.logit_scale != 1:
            out *= self.logit_scale
        if self.softcap is not None:
            out.div_(self.softcap).tanh_()
            self._slope = torch.mul(out, out, out=space.take("slope", *out.shape)).neg_().add_(1)
            out *= self.softcap
        return out

    def pull_back(self, index: Tensor, start: int, stop: int, dz: Tensor) -> None:
        """Take the gradient to the last tile."""
        if self._slope is not None:
            dz *= self._slope
        of_hidden, of_weight, of_bias = self._sums
        if of_bias is not None:
            of_bias[start:stop].add_(dz.sum(0).to(of_bias.dtype), alpha=self.logit_scale)
        dz = dz.to(self.dtype)
        if of_hidden is not None:
            of_hidden.index_add_(0, index, (dz @ self.weight[start:stop]).to(of_hidden.dtype), alpha=self.logit_scale)
        if of_weight is not None:
            h = self.hidden.index_select(0, index)
            if of_weight.dtype == self.dtype:
                of_weight[start:stop].addmm_(dz.T, h, alpha=self.logit_scale)
            else:
                of_weight[start:stop].add_(dz.T @ h, alpha=self.logit_scale)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors."""
        tensors = (self.hidden, self.weight, self.bias)
        return tuple(
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(self._sums, tensors, strict=True)
        )
