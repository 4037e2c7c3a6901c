"""The residual block around a linear recurrent unit, and how to group the parameters of models made of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.attention.recurrent.lru import LRU, SLRU
from danlu.hosts.parameters import Kind, classify_parameters

if TYPE_CHECKING:
    from danlu.attention.recurrent.cache import RecurrentLayer

__all__ = ["LRUBlock", "recurrent_param_groups"]


class LRUBlock(nn.Module):
    """Residual block of the paper: norm, LRU, GELU, dropout, gated linear unit, dropout, plus the input.

    The norm is a layer norm: batch norm, which the paper uses on its benchmark, would let padding change other tokens.

    Args:
        hidden_size: width of input and output.
        state_size: complex channels of the recurrence; None: as wide as the input.
        dropout: share of features dropped in training, in [0, 1).
        bidirectional: a second LRU reads from the last token to the first; both outputs enter the gated unit.
        radius_min: see :class:`LRU`.
        radius_max: see :class:`LRU`.
        max_phase: see :class:`LRU`.

    Source: Scientific Spaces archive 9554; arXiv:2303.06349, appendix A.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        state_size: int | None = None,
        dropout: float = 0.0,
        bidirectional: bool = False,
        radius_min: float = 0.9,
        radius_max: float = 0.999,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")

        def unit(reverse: bool) -> LRU:
            return LRU(
                hidden_size=hidden_size, state_size=state_size, radius_min=radius_min, radius_max=radius_max,
                max_phase=max_phase, reverse=reverse,
            )  # fmt: skip

        self.norm = nn.LayerNorm(hidden_size)
        self.recurrence = unit(reverse=False)
        self.backwards = unit(reverse=True) if bidirectional else None
        self.glu = nn.Linear(hidden_size * (2 if bidirectional else 1), 2 * hidden_size)
        self.dropout = nn.Dropout(dropout)

    def make_cache(self) -> RecurrentLayer:
        """A fresh cache layer.

        Raises:
            ValueError: the block is bidirectional.
        """
        return (self.backwards or self.recurrence).make_cache()

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: RecurrentLayer | None = None,
    ) -> Tensor:
        """The block's output; arguments and errors as :meth:`LRU.forward`."""
        z = self.norm(x)
        if self.backwards is None:
            z = self.recurrence(z, positions, mask, cache)
        else:
            z = torch.cat((self.recurrence(z, positions, mask), self.backwards(z, positions, mask, cache)), -1)
        z = self.dropout(F.gelu(z))
        return x + self.dropout(F.glu(self.glu(z), -1))


def recurrent_param_groups(
    model: nn.Module, lr: float, lambda_factor: float = 0.25, weight_decay: float = 0.05
) -> list[dict[str, Any]]:
    """Parameter groups for training a model with linear recurrent units.

    Logarithms must not decay: decay pulls ``nu_log`` to 0, a factor of 0.37 that remembers one token. Factors,
    normalisation and ``B`` of the units learn at a smaller rate. Of all others, matrices and embeddings decay.

    Args:
        model: any module that holds :class:`LRU` or :class:`SLRU` layers.
        lr: learning rate of all other parameters, > 0.
        lambda_factor: what the units' rate is of it, in (0, 1]; the paper tries 0.25 to 0.5.
        weight_decay: of matrices and embeddings, >= 0.

    Returns:
        Groups for an optimiser such as ``torch.optim.AdamW``, none empty; frozen parameters are left out.

    Raises:
        ValueError: a number out of range, or a model without such layers.

    Source: Scientific Spaces archive 9554; arXiv:2303.06349, appendix C.
    """
    if not lr > 0:
        raise ValueError(f"lr must be > 0, got {lr}")
    if not 0 < lambda_factor <= 1:
        raise ValueError(f"lambda_factor must be in (0, 1], got {lambda_factor}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    units = [module for module in model.modules() if isinstance(module, LRU | SLRU)]
    if not units:
        raise ValueError(f"{type(model).__name__} has no LRU or SLRU layer; use the parameters as they are")
    slow = {
        id(p)
        for unit in units
        for name, p in unit.named_parameters(recurse=False)
        if name.endswith("_log") or name == "B"
    }
    kinds = classify_parameters(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in slow:
            key = (lr * lambda_factor, 0.0)
        else:
            key = (lr, weight_decay if kinds[name] in (Kind.MATRIX, Kind.EMBEDDING) else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
