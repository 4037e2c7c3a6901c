"""Concentrating rotary keys: mix the key heads so that few rotated pairs carry most of them.

Pair p of every key head turns with the same frequency. The g planar vectors of one frequency may therefore be mixed by
one orthogonal g x g matrix, the same for both coordinates: it commutes with the rotation, and what it does to the keys
is undone in the queries. Taken from a principal component analysis of the keys it moves their energy into few pairs,
which keep their rotation; the others lose it and go into the latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """Mixed pairs of one layer, by group of neighbouring frequencies.

    Args:
        matrices: (groups of frequencies, a, a) orthogonal, row i makes component i from the a = key heads x fold
            components (head, neighbour) of the group; rows in falling order of importance.
        importance: (groups of frequencies, a) what dropping the rotation of a component costs, see ``mix``.
    """

    matrices: Tensor
    importance: Tensor


def pairs_of(keys: Tensor, heads: int, fold: int) -> Tensor:
    """Rows of a key or query map by group of frequencies.

    Args:
        keys: (heads * head_dim, n) in the half layout: pair p of a head is rows p and p + head_dim / 2.
        heads: number of heads.
        fold: neighbouring frequencies per group.

    Returns:
        (groups of frequencies, heads, fold, 2, n).
    """
    return keys.unflatten(0, (heads, 2, -1, fold)).permute(2, 0, 3, 1, 4)


def unpaired(pairs: Tensor) -> Tensor:
    """The inverse of ``pairs_of``."""
    return pairs.permute(1, 3, 0, 2, 4).flatten(0, 3)


def mix(
    keys: Tensor, queries: Tensor, moment: Tensor, weights: Tensor, groups: int, heads: int, fold: int, *, pca: bool
) -> Mixing:
    """Find the mixing of one layer and how much each mixed pair needs its rotation.

    The importance of a pair is E|k|^2 E|q|^2 (the queries summed over heads) times the mean of 2 (1 - cos(w t)) over
    the distances t of a text: the mean square by which a score changes when a key and a query of random directions are
    no longer turned.

    Args:
        keys: (groups * head_dim, n) map from the inputs to all keys.
        queries: (heads * head_dim, n).
        moment: (n, n) second moment of the inputs.
        weights: (pairs / fold,) that mean, by group of frequencies.
        groups: key heads.
        heads: query heads.
        fold: neighbouring frequencies that are treated as one.
        pca: mix; otherwise the heads stay as they are and are only ordered.
    """
    by_frequency = pairs_of(keys, groups, fold).flatten(1, 2)  # (m, a, 2, n)
    second = torch.einsum("maxn,nk,mbxk->mab", by_frequency, moment, by_frequency)
    size = second.shape[-1]
    if pca:
        energies, vectors = torch.linalg.eigh(second)
        matrices, energies = vectors.mT.flip(1), energies.flip(1).clamp(min=0)
    else:
        matrices = torch.eye(size, dtype=second.dtype).expand(len(second), -1, -1)
        energies = second.diagonal(dim1=1, dim2=2)
    asked = pairs_of(queries, heads, fold)  # (m, heads, fold, 2, n)
    # What one head asks of component i: the rows of its own key head, for all neighbours.
    own = torch.arange(heads) // (heads // groups)
    turned = matrices.unflatten(2, (groups, fold))[:, :, own]  # (m, a, heads, fold)
    moved = torch.einsum("mahf,mhfxn->mahxn", turned, asked)
    power = torch.einsum("mahxn,nk,mahxk->ma", moved, moment, moved)
    importance = energies * power * weights[:, None]
    order = importance.argsort(dim=1, descending=True, stable=True)
    return Mixing(matrices.gather(1, order[:, :, None].expand_as(matrices)).contiguous(), importance.gather(1, order))


def turning(frequencies: Tensor, length: int) -> Tensor:
    """Mean of 2 (1 - cos(w t)) over the distances t of all pairs of tokens of a text.

    Args:
        frequencies: (m,) radians per position.
        length: tokens of the text.
    """
    distance = torch.arange(length, dtype=torch.float64)
    share = (length - distance) / (length - distance).sum()
    return (2 * (1 - torch.cos(frequencies[:, None] * distance)) * share).sum(1)


def keep(importance: Sequence[Tensor], pairs: int) -> Tensor:
    """How many components of each group of frequencies keep their rotation, the same in all layers.

    One table of angles serves every layer of a model, so the choice is made for all of them: the pairs with the largest
    sum of importance over layers.

    Args:
        importance: per layer (groups of frequencies, a), falling along the second axis.
        pairs: number of pairs to keep in all.

    Returns:
        int64 (groups of frequencies,), in sum ``pairs``.
    """
    total = torch.stack(list(importance)).sum(0)
    chosen = torch.zeros(total.numel(), dtype=torch.int64)
    chosen[total.flatten().argsort(descending=True, stable=True)[:pairs]] = 1
    return chosen.view_as(total).sum(1)


def split(matrices: Tensor, counts: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The mixing of a layer as two maps of its keys: what keeps its rotation, and the rest.

    Args:
        matrices: ``Mixing.matrices``.
        counts: ``keep``.
        groups: key heads.

    Returns:
        (2 * kept pairs, groups * head_dim), pairs adjacent and in order of frequency, and the rest, likewise; together
        they are orthogonal.
    """
    m, size = matrices.shape[:2]
    fold = size // groups
    # Component (m, i, x) takes matrices[m, i, (head, neighbour)] of coordinate x of pair (m, neighbour) of each head.
    whole = torch.zeros(m, size, 2, m, groups, fold, 2, dtype=matrices.dtype)
    for x in range(2):
        index = torch.arange(m)
        whole[index, :, x, index, :, :, x] = matrices.unflatten(2, (groups, fold))
    rows = whole.flatten(3).flatten(0, 2)
    rows = unpaired(rows.T.reshape(m, groups, fold, 2, -1)).T
    kept = torch.arange(size)[None] < counts[:, None]
    mask = kept[..., None].expand(-1, -1, 2).flatten()
    return rows[mask], rows[~mask]


def kept_frequencies(frequencies: Tensor, counts: Tensor) -> Tensor:
    """Radians per position of each kept pair: the first of its group of neighbours.

    Args:
        frequencies: (pairs of a head,) of the host.
        counts: ``keep``.
    """
    return frequencies[:: len(frequencies) // len(counts)].repeat_interleave(counts)
