"""The weights of one latent attention layer of DeepSeek's kind, from the maps of a host layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.hosts.architecture import Attention
from danlu.tuning.latent.norm import silent_scale
from danlu.tuning.latent.rank import LowRank, low_rank
from danlu.tuning.latent.source import Source, affine, has_bias


@dataclass(frozen=True)
class Sizes:
    """Sizes of a latent attention layer: numbers per token in the latent and in the rotary key, channels per head."""

    rank: int
    rope: int
    nope: int
    value: int


@dataclass(frozen=True)
class LatentLayer:
    """One layer on its way: keys split into a part that keeps its rotation and a part that joins the values.

    Args:
        queries: (heads * head_dim, hidden + 1) float64 map of [x, 1], like the next three.
        keys: (groups * head_dim, hidden + 1).
        values: (groups * head_dim, hidden + 1).
        turned: (rope width, groups * head_dim) which mixtures of key channels keep their rotation, pairs adjacent.
        rest: the other mixtures.
        low: the latent.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    turned: Tensor
    rest: Tensor
    low: LowRank

    @property
    def key_map(self) -> Tensor:
        """Map from the inputs to all mixtures of keys that lose their rotation."""
        return self.rest @ self.keys


def compress(
    attention: Attention, turned: Tensor, rest: Tensor, moment: Tensor, rank: int, *, exact: bool, balance: bool
) -> LatentLayer:
    """Split the keys of a host layer, and join what loses its rotation with the values in one latent.

    Args:
        attention: the host layer.
        turned: see ``LatentLayer``.
        rest: see ``LatentLayer``.
        moment: (hidden + 1, hidden + 1) second moment of [x, 1].
        rank: size of the latent.
        exact: the latent is the values themselves; the keys all keep their rotation.
        balance: see ``low_rank``.
    """
    queries, keys, values = (affine(m) for m in (attention.query, attention.key, attention.value))
    if exact:
        one = torch.eye(rank, dtype=torch.float64)
        low = LowRank(values, one[:0], one, 1.0, torch.ones(rank, dtype=torch.float64))
    else:
        low = low_rank(rest @ keys, values, moment, rank, balance=balance)
    return LatentLayer(queries, keys, values, turned, rest, low)


def layer_weights(
    source: Source, attention: Attention, layer: LatentLayer, sizes: Sizes, gain: Tensor, eps: float, rms: float | None
) -> dict[str, Tensor]:
    """The parameters of DeepSeek's attention module by local name, float64.

    A query of head s reads the rest of its own key head's mixtures through the up-map, and the turned ones directly:
    k^s = [rest_s' E c, R (turned k)] and q^s = [q, turned_s q], so that q^s k^s' = q R k' where nothing was dropped.
    The host's scale of scores is put into the queries, because the target's follows from its own sizes.

    Args:
        source: reading of the host.
        attention: the host layer.
        layer: its compressed form.
        sizes: of the target.
        gain: (hidden,) gain of the norm before attention.
        eps: of the target's norms inside attention.
        rms: mean size of the latent, which the norm's gain restores; None makes the norm silent.
    """
    scale = source.score_scale * math.sqrt(sizes.nope + sizes.rope)
    group = [head * source.groups // source.heads for head in range(source.heads)]
    turned = layer.turned.unflatten(1, (source.groups, -1))
    rest = layer.rest.unflatten(1, (source.groups, -1))
    up_values = layer.low.up_values.unflatten(0, (source.groups, -1))
    one = torch.eye(source.head_dim, dtype=torch.float64)[: sizes.nope]
    asks = [scale * torch.cat((one, turned[:, j])) for j in group]
    ups = [torch.cat(((rest[:, j].T @ layer.low.up_keys)[: sizes.nope], up_values[j])) for j in group]
    if rms is None:
        shrink = silent_scale(layer.low.down, gain, eps)
        restore = math.sqrt(eps) / shrink
    else:
        shrink, restore = 1.0, rms
    joint = torch.cat((layer.low.down * shrink, layer.turned @ layer.keys))
    found = {
        "kv_a_proj_with_mqa.weight": joint[:, :-1],
        "kv_a_layernorm.weight": torch.full((sizes.rank,), restore, dtype=torch.float64),
        "kv_b_proj.weight": torch.cat(ups),
        "o_proj.weight": attention.output.weight.detach(),
    }
    if source.latent_bias:
        zeros = torch.zeros(source.hidden, dtype=torch.float64)
        found["kv_a_proj_with_mqa.bias"] = joint[:, -1]
        found["o_proj.bias"] = attention.output.module.bias.detach() if has_bias(attention.output) else zeros  # type: ignore[operator]
    if not source.query_bias:
        by_head = layer.queries[:, :-1].unflatten(0, (source.heads, -1))
        found["q_proj.weight"] = torch.cat([ask @ q for ask, q in zip(asks, by_head, strict=True)])
        return found
    # The target's q_proj has no bias. Its two-step form has one before a norm, and that norm is made silent too.
    shrink = silent_scale(layer.queries, gain, eps)
    found["q_a_proj.weight"] = layer.queries[:, :-1] * shrink
    found["q_a_proj.bias"] = layer.queries[:, -1] * shrink
    found["q_a_layernorm.weight"] = torch.full((len(layer.queries),), math.sqrt(eps) / shrink, dtype=torch.float64)
    found["q_b_proj.weight"] = torch.block_diag(*asks)
    return found
