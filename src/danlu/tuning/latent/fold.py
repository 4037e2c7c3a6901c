"""Which keys keep their rotation: the mixing of every layer, and how many neighbouring frequencies to fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.positions.rotary import Rotary
from danlu.progress import watched
from danlu.tuning.latent.moments import Moments
from danlu.tuning.latent.rope import keep, kept_frequencies, mix, split, turning
from danlu.tuning.latent.source import Source, affine

#: What ``freq_fold="auto"`` tries, where it divides the pairs of a head.
FOLDS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Rotation:
    """Which mixtures of keys keep their rotation, by layer, and the frequencies they share.

    Args:
        fold: neighbouring frequencies that were treated as one.
        frequencies: (kept pairs,) radians per position.
        layers: per layer the kept mixtures (rope width, width of keys) and the rest.
        change: how much attention changes on the probe, see ``attention_change``; None without one.
    """

    fold: int
    frequencies: Tensor
    layers: Sequence[tuple[Tensor, Tensor]]
    change: float | None = None


def whole_rotation(source: Source) -> Rotation:
    """All key channels keep their rotation: nothing is mixed, nothing lost."""
    pairs = source.head_dim // 2
    counts = torch.full((pairs,), source.groups)
    one = torch.eye(source.groups, dtype=torch.float64).expand(pairs, -1, -1)
    return Rotation(
        1,
        kept_frequencies(source.frequencies, counts),
        [split(one, counts, source.groups)] * len(source.arch.blocks),
    )


def choose_rotation(
    source: Source,
    second: Sequence[Tensor],
    moments: Moments | None,
    rope_dim: int,
    length: int,
    fold: int | str,
    *,
    concentrate: bool,
) -> Rotation:
    """Mix the keys of every layer and choose the pairs that keep their rotation.

    Args:
        source: the host.
        second: per layer the second moment of [x, 1] that the mixing is computed from.
        moments: with the probe, which ``fold="auto"`` compares on.
        rope_dim: channels that keep their rotation.
        length: tokens of a text, for the distances.
        fold: neighbouring frequencies treated as one, or ``auto``.
        concentrate: mix; otherwise whole heads compete as they are.
    """
    pairs = source.head_dim // 2
    folds = [fold] if isinstance(fold, int) else [one for one in FOLDS if pairs % one == 0]
    maps = [(affine(b.attention.query), affine(b.attention.key)) for b in source.arch.blocks]
    found = []
    for one in folds:
        weights = turning(source.frequencies[::one], length)
        mixed = [
            mix(keys, queries, moment, weights, source.groups, source.heads, one, pca=concentrate)
            for (queries, keys), moment in zip(maps, second, strict=True)
        ]
        counts = keep([layer.importance for layer in mixed], rope_dim // 2)
        layers = [split(layer.matrices, counts, source.groups) for layer in mixed]
        frequencies = kept_frequencies(source.frequencies, counts)
        change = None
        if moments is not None and len(folds) > 1:
            change = sum(
                attention_change(source, queries, keys, *parts, frequencies, x.flatten(0, -2)[: x.shape[-2]])
                for (queries, keys), parts, x in watched(
                    list(zip(maps, layers, moments.inputs, strict=True)), f"folding {one} frequencies"
                )
            ) / len(maps)
        found.append(Rotation(one, frequencies, layers, change))
    return min(found, key=lambda rotation: rotation.change or 0.0)


def attention_change(
    source: Source, queries: Tensor, keys: Tensor, turned: Tensor, rest: Tensor, frequencies: Tensor, x: Tensor
) -> float:
    """Mean Kullback-Leibler divergence of attention when only the kept pairs turn, over heads and tokens, in nats.

    Args:
        source: the host.
        queries: map of [x, 1] to all queries.
        keys: map of [x, 1] to all keys.
        turned: mixtures of keys that keep their rotation.
        rest: the other mixtures.
        frequencies: radians per position of the kept pairs.
        x: (length, hidden) inputs of the layer on one text.
    """
    x = x.to("cpu", torch.float64)
    x = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), 1)
    positions = torch.arange(len(x))
    own = torch.arange(source.heads) // (source.heads // source.groups)
    q = (x @ queries.T).unflatten(1, (source.heads, -1)).transpose(0, 1)
    k = x @ keys.T
    whole = Rotary(source.frequencies)
    by_head = k.unflatten(1, (source.groups, -1)).transpose(0, 1)
    exact = whole.rotate(q, positions) @ whole.rotate(by_head, positions)[own].mT
    part = Rotary(frequencies, "interleaved")
    asked = torch.einsum("hnd,rhd->hnr", q, turned.unflatten(1, (source.groups, -1))[:, own])
    still = torch.einsum("hnd,rhd->hnr", q, rest.unflatten(1, (source.groups, -1))[:, own])
    changed = part.rotate(asked, positions) @ part.rotate(k @ turned.T, positions).mT + still @ (k @ rest.T).mT
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    before, after = (
        (source.score_scale * scores).masked_fill(later, -torch.inf).log_softmax(-1) for scores in (exact, changed)
    )
    gap = (before.exp() * (before - after)).masked_fill(later, 0.0)
    return gap.sum(-1).mean().item()
