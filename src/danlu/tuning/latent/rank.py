"""The joint low rank of keys and values: balancing, principal directions, what is lost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """Keys and values Y = [k, v] written as c = E' Y and read as Y ~ E c, with the keys balanced against the values.

    Args:
        down: (rank, n) map from the inputs to the latent.
        up_keys: (width of keys, rank) from the latent to the keys, balancing undone.
        up_values: (width of values, rank) from the latent to the values.
        balance: what the keys were divided by.
        eigenvalues: all eigenvalues of the second moment of the balanced Y, falling.
    """

    down: Tensor
    up_keys: Tensor
    up_values: Tensor
    balance: float
    eigenvalues: Tensor

    @property
    def kept(self) -> float:
        """Share of the energy of the balanced [k, v] that the latent keeps."""
        total = self.eigenvalues.sum()
        return 1.0 if total <= 0 else (self.eigenvalues[: len(self.down)].sum() / total).item()


def low_rank(keys: Tensor, values: Tensor, moment: Tensor, rank: int, *, balance: bool) -> LowRank:
    """The projection of [k, v] to ``rank`` numbers with the least mean square error.

    With the second moment of activations this is their principal component analysis (not centred: biases are a column
    of the maps). With the identity in its place it is the singular value decomposition of the weights.

    Args:
        keys: (width, n) map from the inputs to the keys that lose their rotation; the width may be 0.
        values: (width, n) map to the values.
        moment: (n, n) second moment of the inputs.
        rank: size of the latent, at most the width of both.
        balance: divide the keys by the ratio of mean column norms, so that both count alike; undone in the up-maps.

    Source: arXiv:2502.07864 (TransMLA).
    """
    ratio = 1.0
    if balance and len(keys):
        norms = [torch.einsum("an,nk,ak->a", part, moment, part).clamp(min=0).sqrt().mean() for part in (keys, values)]
        ratio = (norms[0] / norms[1]).item() if min(norms) > 0 else 1.0
    joint = torch.cat((keys / ratio, values))
    eigenvalues, vectors = torch.linalg.eigh(joint @ moment @ joint.T)
    basis = vectors[:, -rank:].flip(1)
    return LowRank(
        down=basis.T @ joint,
        up_keys=ratio * basis[: len(keys)],
        up_values=basis[len(keys) :],
        balance=ratio,
        eigenvalues=eigenvalues.flip(0).clamp(min=0),
    )


def relative_error(exact: Tensor, approximate: Tensor, moment: Tensor) -> float:
    """Root of the mean square of (exact - approximate) x over that of exact x.

    Args:
        exact: (m, n) map of the inputs.
        approximate: (m, n).
        moment: (n, n) second moment of the inputs.
    """
    if not len(exact):
        return 0.0
    lost, whole = (torch.einsum("an,nk,ak->", part, moment, part).clamp(min=0) for part in (exact - approximate, exact))
    return 0.0 if whole <= 0 else (lost / whole).sqrt().item()
