"""How one axis of activations grows, and what that does to a parameter, to its gradient and to its noise.

A grown axis shows ``write[j] * x[index[j]]`` where the small model has ``x``, and what reads it multiplies by
``read[j]``, so that the sum over the copies of a channel gives that channel back. Each dimension of a parameter either
writes an axis or reads one. Its gradient grows by the same map with the two factors exchanged, which is all that the
states of optimisers need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Axis:
    """One grown axis.

    Args:
        old: size in the small model.
        index: (new,) the old channel that each new one comes from.
        write: (new,) float64 factor for what writes the axis; 0 keeps a new channel silent.
        read: (new,) float64 factor for what reads the axis, and the share of the gradient that comes back.
        tied: (new,) groups of written entries whose sum is all that matters, so that noise of sum zero in each group
            changes nothing; -1 marks entries that do not matter at all. None: written entries take no noise.
        centred: what writes the axis first loses its mean over the axis.
    """

    old: int
    index: Tensor
    write: Tensor
    read: Tensor
    tied: Tensor | None = None
    centred: bool = False

    @property
    def heard(self) -> Tensor:
        """(new,) groups of copies among the channels that say something; -1 for the silent ones."""
        return torch.where(self.write != 0, self.index, -1)


@dataclass(frozen=True, eq=False)
class Dimension:
    """One dimension of a parameter: it reads an axis, or it writes one."""

    axis: Axis
    reads: bool

    @property
    def factor(self) -> Tensor:
        """What the parameter is multiplied by."""
        return self.axis.read if self.reads else self.axis.write

    @property
    def gradient_factor(self) -> Tensor:
        """What its gradient is multiplied by."""
        return self.axis.write if self.reads else self.axis.read


@dataclass(frozen=True, eq=False)
class ParameterMap:
    """Where a parameter of the grown model comes from.

    Args:
        source: name of the parameter in the small model.
        dimensions: one entry per dimension; None where it stays.
        offset: added to the parameter by its module before use (Gemma's 1 + weight).
        silent: the parameter multiplies or adds nothing at first (new blocks).
        fresh: the parameter belongs to a new block.
    """

    source: str
    dimensions: tuple[Dimension | None, ...]
    offset: float = 0.0
    silent: bool = False
    fresh: bool = False

    def shape(self, old: torch.Size) -> tuple[int, ...]:
        """The grown shape; sizes of the small model that do not fit raise ValueError."""
        for size, dimension in zip(old, self.dimensions, strict=True):
            if dimension is not None and dimension.axis.old != size:
                raise ValueError(f"{self.source} has shape {tuple(old)}, expected {dimension.axis.old} channels")
        return tuple(
            size if dimension is None else len(dimension.axis.index)
            for size, dimension in zip(old, self.dimensions, strict=True)
        )

    def apply(self, tensor: Tensor) -> Tensor:
        """The grown parameter without noise, in float32 or better; a new tensor."""
        grown = _wide(tensor).add(self.offset) if self.offset else _wide(tensor)
        for i, dimension in reversed(list(enumerate(self.dimensions))):  # columns first, while there are few rows
            if dimension is not None:
                if dimension.axis.centred and not dimension.reads:
                    grown = grown - grown.mean(i, keepdim=True)
                grown = _take(grown, i, dimension.axis.index, dimension.factor)
        if all(dimension is None for dimension in self.dimensions):
            grown = grown.clone()
        if self.silent:
            grown.zero_()
        return grown.sub_(self.offset) if self.offset else grown

    def apply_to_gradient(self, tensor: Tensor, power: int) -> Tensor:
        """Grow what is linear (power 1) or quadratic (power 2) in the gradient.

        Entries whose gradient the map does not know (new channels, new blocks) start at 0 where linear. Where quadratic
        they get the mean of the others (in a new block, what its source has), so that Adam's first steps on them are
        no larger than on the rest.
        """
        grown = _wide(tensor)
        known = torch.ones((), device=tensor.device)
        for i, dimension in enumerate(self.dimensions):
            if dimension is not None:
                factor = dimension.gradient_factor
                grown = _take(grown, i, dimension.axis.index, factor**power)
                shape = [-1 if j == i else 1 for j in range(tensor.ndim)]
                alive = (factor != 0) & (dimension.factor != 0)
                known = known * alive.to(tensor.device).reshape(shape)
        known = (known > 0).expand_as(grown)
        if power == 1:
            return grown.mul_(0 if self.fresh else known)
        return torch.where(known, grown, grown[known].mean() if bool(known.any()) else 0.0)

    def add_noise(self, grown: Tensor, scale: float, generator: torch.Generator, *, lossy: bool = False) -> Tensor:
        """Add noise that the function cannot see (or, lossy, that it can) to a grown matrix, in place.

        Args:
            grown: what :meth:`apply` gave.
            scale: standard deviation in units of each output's own root-mean-square weight.
            generator: on the CPU.
            lossy: independent noise instead of noise of sum zero.
        """
        if len(self.dimensions) != 2 or scale == 0:
            return grown
        reading = next((i for i, d in enumerate(self.dimensions) if d is not None and d.reads), 1)
        root = math.sqrt(grown.shape[reading])
        size = torch.linalg.vector_norm(grown, dim=reading, keepdim=True).mul_(scale / root)
        for i, dimension in enumerate(self.dimensions):
            groups = None if dimension is None else dimension.axis.heard if dimension.reads else dimension.axis.tied
            if groups is None:
                continue
            sizes = _group_sizes(groups)
            if lossy:
                grown.add_(_noise(grown, generator).mul_(size))
            elif _in_pairs(groups):
                # Neighbours are copies of one channel: half the draws, once with each sign.
                pairs = grown.unflatten(i, (-1, 2))
                unit = size if i == reading else size.unflatten(i, (-1, 2)).select(i + 1, 0)
                noise = _noise(pairs.select(i + 1, 0), generator).mul_(unit)
                pairs.select(i + 1, 0).add_(noise)
                pairs.select(i + 1, 1).sub_(noise)
            elif bool((sizes != 1).any()):
                grown.add_(_cancelling(_noise(grown, generator).mul_(size), i, groups, sizes))
        return grown


def copies(old: int, new: int) -> Tensor:
    """(new,) which of ``old`` channels each of ``new`` copies, in place and as even as can be: 0, 0, 1, 1, ..."""
    return torch.arange(new) * old // new


def counts(index: Tensor) -> Tensor:
    """(new,) float64: how many entries share each entry's index."""
    return torch.bincount(index)[index].double()


def copied(old: int, new: int) -> Axis:
    """Channels repeated in place; readers split."""
    index = copies(old, new)
    return Axis(old, index, torch.ones(new, dtype=torch.float64), 1 / counts(index))


def joined(axes: list[Axis]) -> Axis:
    """The axes of a fused projection, one after another."""
    starts = [sum(axis.old for axis in axes[:i]) for i in range(len(axes))]
    groups: list[Tensor] = []
    for start, axis in zip(starts, axes, strict=True):
        # Groups are kept apart by an offset beyond anything in use; entries without noise are groups of one.
        tied = torch.arange(len(axis.index)) if axis.tied is None else axis.tied
        top = max((int(group.max()) + 1 for group in groups), default=start)
        groups.append(torch.where(tied < 0, -1, tied + top))
    return Axis(
        sum(axis.old for axis in axes),
        torch.cat([axis.index + start for start, axis in zip(starts, axes, strict=True)]),
        torch.cat([axis.write for axis in axes]),
        torch.cat([axis.read for axis in axes]),
        torch.cat(groups) if any(axis.tied is not None for axis in axes) else None,
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _take(tensor: Tensor, dim: int, index: Tensor, factor: Tensor) -> Tensor:
    """Pick channels and multiply them; one factor for all is multiplied while there are few of them."""
    factor = factor.to(tensor)
    picked = index.to(tensor.device)
    if bool((factor == factor[0]).all()):
        return (tensor if factor[0] == 1 else tensor * factor[0]).index_select(dim, picked)
    shape = [-1 if i == dim else 1 for i in range(tensor.ndim)]
    return tensor.index_select(dim, picked).mul_(factor.reshape(shape))


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of mean 0 and standard deviation 1, uniform over 256 values: eight from each random word, for speed."""
    count = like.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    noise = words.view(torch.int8)[:count].to(like.dtype).add_(0.5).mul_(math.sqrt(12 / (256**2 - 1)))
    return noise.reshape(like.shape).to(like.device)


def _in_pairs(groups: Tensor) -> bool:
    """Whether each even entry and its right neighbour are of one group."""
    return len(groups) % 2 == 0 and bool((groups[::2] == groups[1::2]).all() and (groups >= 0).all())


def _group_sizes(groups: Tensor) -> Tensor:
    """(new,) how many entries share the group; 0 for entries outside all groups."""
    sizes = torch.bincount((groups + 1).clamp(min=0))
    return torch.where(groups < 0, 0, sizes[groups + 1])


def _cancelling(noise: Tensor, dim: int, groups: Tensor, sizes: Tensor) -> Tensor:
    """Make noise sum to zero within each group along ``dim`` and keep its size; entries of no group keep theirs."""
    groups, sizes = groups.to(noise.device), sizes.to(noise.device)
    shape = list(noise.shape)
    shape[dim] = int(groups.max()) + 2
    sums = noise.new_zeros(shape).index_add_(dim, groups + 1, noise)
    sides = [-1 if i == dim else 1 for i in range(noise.ndim)]
    n = sizes.clamp(min=1).to(noise.dtype).reshape(sides)
    mean = sums.index_select(dim, groups + 1) / n
    grouped = (sizes > 0).to(noise.dtype).reshape(sides)
    regained = torch.where(sizes > 1, (sizes / (sizes - 1).clamp(min=1)).sqrt(), torch.where(sizes == 0, 1.0, 0.0))
    return noise.sub_(mean * grouped).mul_(regained.to(noise.dtype).reshape(sides))


def head_sources(heads: int, kv_heads: int, new_heads: int, new_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which heads the grown heads copy: whole groups of a key head and its query heads, and more heads inside a group.

    Args:
        heads: query heads now, a multiple of ``kv_heads``.
        kv_heads: key and value heads now.
        new_heads: query heads wanted; at least as many per key head as now.
        new_kv_heads: key and value heads wanted.

    Returns:
        Source of each query head, source of each key head, and each query head's share of the output.
    """
    group, new_group = heads // kv_heads, new_heads // new_kv_heads
    keys = copies(kv_heads, new_kv_heads)
    queries = (keys[:, None] * group + copies(group, new_group)).flatten()
    return queries, keys, 1 / counts(queries)


@dataclass(frozen=True, eq=False)
class HeadDim:
    """How the channels of a head grow: sources and factors of queries and keys, sources of values.

    The factors belong to the gains where queries and keys are normed. ``tied`` are groups for noise, as in ``Axis``.
    """

    index: Tensor
    query: Tensor
    key: Tensor
    tied: Tensor
    value: Tensor


def grow_head_dim(old: int, new: int, rotated: int, score: float) -> HeadDim:
    """Grow a head without a change of its scores.

    A rotated pair j of k times as many must sit where its frequency is, at pair k*j. The pairs between repeat the query
    and have no key: they say nothing at first and can learn at once. Channels without rotation are repeated.

    Args:
        old: channels per head now.
        new: channels per head wanted; a multiple of ``old`` where any channel is rotated.
        rotated: leading channels that are rotated, in pairs (i, i + rotated / 2).
        score: scale of the scores now over the scale in the grown model.
    """
    plain = copies(old - rotated, new - (rotated * new // old)) + rotated
    n = counts(plain)
    root = math.sqrt(score)
    factor, tied = root / n.sqrt(), plain
    query = key = factor
    index = plain
    if rotated:
        k, half = new // old, rotated // 2
        pairs = torch.arange(half * k)
        source = torch.cat([pairs // k, pairs // k + half])
        used = (pairs % k == 0).repeat(2)
        index = torch.cat([source, plain])
        turning = torch.full((len(source),), root, dtype=torch.float64)
        query = torch.cat([turning, factor])
        key = torch.cat([turning * used, factor])
        tied = torch.cat([torch.where(used, source, -1), tied])
    return HeadDim(index, query, key, tied, copies(old, new))
