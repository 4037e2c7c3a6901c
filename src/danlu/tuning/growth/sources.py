"""Where each parameter of a grown model comes from, and what about it is not exact."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from danlu.hosts.architecture import Architecture, Block, Matrix
from danlu.hosts.parameters import is_norm, rests_at_zero
from danlu.tuning.growth.maps import Axis, Dimension, ParameterMap, copied, counts, grow_head_dim, head_sources, joined
from danlu.tuning.growth.sizes import Sizes, rope_type


@dataclass
class Sources:
    """Makes the map of every parameter and notes what is not exact."""

    old: Architecture
    new: Architecture
    before: Sizes
    after: Sizes
    layers: list[tuple[int, bool]]
    widening: str
    lossy: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        before, after = self.before, self.after
        #: stream: what blocks add up. features: what a norm makes of it. unit: by how much the stream is enlarged.
        self.stream = self.features = copied(before.hidden_size, after.hidden_size)
        self.unit = 1.0
        norm = self.old.final_norm or self.old.embedding_norm
        centred = norm is not None and isinstance(norm[1], nn.LayerNorm)
        obstacle = None
        if self.old.post_norm:
            obstacle = "norms after the residual sum write the new channels"
        elif centred and self.old.tied:
            obstacle = "a LayerNorm needs a centred table, which changes what the tied head reads"
        even = after.hidden_size % before.hidden_size == 0
        sizes = f"hidden_size {before.hidden_size} -> {after.hidden_size}"
        if self.widening == "pad" or (self.widening == "auto" and not even and obstacle is None):
            if obstacle:
                self.lossy.append(f"{sizes} by padding: {obstacle}")
            self._pad(centred)
        elif not even:
            self.lossy.append(f"{sizes} by uneven copies: they change the statistics of every norm")
        if self.old.post_norm and any(new for _, new in self.layers):
            self.lossy.append("num_hidden_layers: a new block of a post-norm model normalises its input again")
        # Gemma multiplies the table by sqrt(hidden_size), rounded to the type of the weights.
        scale = 1.0
        if self.old.config.model_type.startswith("gemma"):
            dtype = next(iter(self.old.embeddings.values())).weight.dtype
            roots = [torch.tensor(size**0.5).to(dtype).item() for size in (before.hidden_size, after.hidden_size)]
            scale = roots[0] / roots[1]
        stream = self.stream
        self.table = Axis(stream.old, stream.index, stream.write * scale, stream.read / scale, None, stream.centred)
        self.last, self.last_gain = self.features, torch.ones(after.hidden_size, dtype=torch.float64)
        if self.old.tied:
            # The head reads the table itself, so the norm before it makes up for what the table repeats or enlarges.
            spoken = self.table.write != 0
            times = torch.bincount(stream.index[spoken])[stream.index]
            self.last_gain = 1 / (times * self.table.write[spoken][0])
            self.last = Axis(stream.old, stream.index, self.last_gain * spoken, self.table.write)
        self.rotated = _rotated_channels(self.old, self.new, after.head_dim // before.head_dim)

    def _pad(self, centred: bool) -> None:
        old, new = self.before.hidden_size, self.after.hidden_size
        index = torch.arange(new) % old
        used = (torch.arange(new) < old).double()
        # A stream enlarged by this much keeps its mean square, so that the norms' epsilon need not change.
        self.unit = math.sqrt(new / old)
        self.stream = Axis(old, index, used * self.unit, used / self.unit, None, centred)
        self.features = Axis(old, index, used, torch.ones_like(used))

    def maps(self) -> Iterator[tuple[str, ParameterMap]]:
        """Name and map of every parameter of the grown model; a tied one may come twice."""
        for index, (source, fresh) in enumerate(self.layers):
            yield from self._block(self.old.blocks[source], self.new.blocks[index], fresh)
        done = {f"{block.name}." for block in self.old.blocks}
        for i, name in enumerate(self.old.embeddings):
            done.add(f"{name}.")
            yield f"{name}.weight", _map(f"{name}.weight", None, _writes(self.table if i == 0 else self.stream))
        for name, module in self.old.model.named_modules():
            if not any(f"{name}.".startswith(prefix) for prefix in done):
                yield from self._outer(name, module)

    def _block(self, old: Block, new: Block, fresh: bool) -> Iterator[tuple[str, ParameterMap]]:
        attention, feed = old.attention, old.feed_forward
        query, key, value, mixed, gains = self._heads(old, new)
        hidden = copied(self.before.intermediate_size, self.after.intermediate_size)
        endings = _branch_ends(old)
        parts: list[tuple[Matrix, Axis, Axis]] = [
            (attention.query, query, self.features),
            (attention.key, key, self.features),
            (attention.value, value, self.features),
            (attention.output, self.stream, mixed),
            (feed.up, hidden, self.features),
            (feed.down, self.stream, hidden),
        ]
        if feed.gate is not None:
            parts.append((feed.gate, hidden, self.features))

        def renamed(name: str) -> str:
            return new.name + name.removeprefix(old.name)

        for name in dict.fromkeys(matrix.name for matrix, _, _ in parts):
            fused = sorted((part for part in parts if part[0].name == name), key=lambda part: part[0].start)
            out = fused[0][1] if len(fused) == 1 else joined([part[1] for part in fused])
            # A new block adds nothing: its branches end in zeros, or in a norm of gain zero.
            silent = fresh and not endings and name in (attention.output.name, feed.down.name)
            dimensions = (_writes(out), _reads(fused[0][2]))
            if fused[0][0].transposed:
                dimensions = dimensions[::-1]
            yield renamed(f"{name}.weight"), _map(f"{name}.weight", *dimensions, silent=silent, fresh=fresh)
            yield renamed(f"{name}.bias"), _map(f"{name}.bias", _writes(out), silent=silent, fresh=fresh)
        for name, module in old.norms.items():
            offset = 1.0 if rests_at_zero(module) else 0.0
            if module is attention.query_norm or module is attention.key_norm:
                axis = gains[0 if module is attention.query_norm else 1]
                yield renamed(f"{name}.weight"), _map(f"{name}.weight", _writes(axis), offset=offset, fresh=fresh)
                continue
            for local, made in self._norm(name, module, self.stream if name in endings else self.features):
                made = ParameterMap(made.source, made.dimensions, offset, fresh and name in endings, fresh)
                yield renamed(f"{name}.{local}"), made

    def _heads(self, old: Block, new: Block) -> tuple[Axis, Axis, Axis, Axis, tuple[Axis, Axis]]:
        """Axes of queries, keys, values and mixed values, and of the gains of the norms of queries and keys."""
        before, after = self.before, self.after
        queries, keys, share = head_sources(
            before.num_attention_heads, before.num_key_value_heads, after.num_attention_heads, after.num_key_value_heads
        )
        scale, grown_scale = (
            getattr(block.attention.module, "scaling", block.attention.head_dim**-0.5) for block in (old, new)
        )
        score = scale / grown_scale
        dim = grow_head_dim(before.head_dim, after.head_dim, self.rotated, score)
        size, key_share, normed = before.head_dim, 1 / counts(keys), old.attention.query_norm is not None
        value_share = 1 / counts(dim.value)
        ones = torch.ones_like(dim.query)

        def heads(sources: Tensor, index: Tensor, write: Tensor, share: Tensor, read: Tensor, old_heads: int) -> Axis:
            channels = (sources[:, None] * size + index).flatten()
            return Axis(
                old_heads * size,
                channels,
                write.expand(len(sources), -1).flatten(),
                (share[:, None] * read).flatten(),
            )

        many, few = before.num_attention_heads, before.num_key_value_heads
        # With a norm over the head, its gain carries the factors instead of the rows, which are repeated as they are.
        both = dim.query * dim.key / score
        query = heads(
            queries, dim.index, ones if normed else dim.query, share, both if normed else dim.key / score, many
        )
        key = heads(keys, dim.index, ones if normed else dim.key, key_share, both if normed else dim.query / score, few)
        if not normed:
            offsets = torch.arange(len(queries))[:, None] * size
            tied = torch.where(dim.tied < 0, -1, dim.tied + offsets).flatten()
            query = Axis(query.old, query.index, query.write, query.read, tied)
        value = heads(keys, dim.value, ones, key_share, value_share, few)
        mixed = heads(queries, dim.value, ones, share, value_share, many)
        gains = (Axis(size, dim.index, dim.query, dim.key / score), Axis(size, dim.index, dim.key, dim.query / score))
        return query, key, value, mixed, gains

    def _outer(self, name: str, module: Any) -> Iterator[tuple[str, ParameterMap]]:
        """Maps of what belongs to a module outside the blocks: norms, heads, poolers."""
        arch = self.old
        final = arch.final_norm[1] if arch.final_norm else None
        if is_norm(module):
            transform = arch.post_norm and module is not (arch.embedding_norm or (None, None))[1]
            offset = 1.0 if rests_at_zero(module) else 0.0
            last = module is final or transform
            for local, made in self._norm(name, module, self.last if last else self.features, last):
                yield f"{name}.{local}", ParameterMap(made.source, made.dimensions, offset)
            return
        reads = _reads(self.features if arch.post_norm else self.last)
        if arch.head is not None and module is arch.head.module:
            yield f"{name}.weight", _map(f"{name}.weight", None, _reads(self.last))
        elif isinstance(module, nn.Linear) and name.rpartition(".")[2] == "dense":
            yield f"{name}.weight", _map(f"{name}.weight", _writes(self.features), reads)
            yield f"{name}.bias", _map(f"{name}.bias", _writes(self.features))
            return
        elif isinstance(module, nn.Linear):
            yield f"{name}.weight", _map(f"{name}.weight", None, reads)
        # What is left has the size of the vocabulary or of the labels.
        for local, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 and local == "bias":
                yield f"{name}.{local}", ParameterMap(f"{name}.{local}", (None,))

    def _norm(self, name: str, module: Any, target: Axis, last: bool = False) -> Iterator[tuple[str, ParameterMap]]:
        """Gain and bias of a norm that reads the stream and writes ``target``."""
        level = self.unit if target is self.stream else 1.0
        gain = (self.last_gain if last else torch.ones(len(target.index), dtype=torch.float64)) * level / self.unit
        heard = self.stream.write != 0
        axis = Axis(target.old, target.index, gain, target.read * self.unit * heard)
        yield "weight", _map(f"{name}.weight", _writes(axis))
        yield "bias", _map(f"{name}.bias", _writes(target))


def _branch_ends(block: Block) -> set[str]:
    """Names of the norms that end a branch, in blocks that have norms before and after each (Gemma 2 and 3)."""
    by_leaf = {name.rpartition(".")[2]: name for name in block.norms}
    if "pre_feedforward_layernorm" not in by_leaf:
        return set()
    return {by_leaf[leaf] for leaf in ("post_attention_layernorm", "post_feedforward_layernorm")}


def _writes(axis: Axis) -> Dimension | None:
    return None if _stays(axis, axis.write) else Dimension(axis, reads=False)


def _reads(axis: Axis) -> Dimension | None:
    return None if _stays(axis, axis.read) else Dimension(axis, reads=True)


def _stays(axis: Axis, factor: Tensor) -> bool:
    return torch.equal(axis.index, torch.arange(axis.old)) and bool((factor == 1).all())


def _map(
    source: str, *dimensions: Dimension | None, offset: float = 0.0, silent: bool = False, fresh: bool = False
) -> ParameterMap:
    return ParameterMap(source, dimensions, offset, silent, fresh)


def _rotated_channels(old: Architecture, new: Architecture, k: int) -> int:
    """Rotated channels per head now, 0 without rotation; checks that pair j turns as pair k*j of the grown model."""
    rotated = 0
    buffers = dict(new.base.named_buffers())
    for name, before in old.base.named_buffers():
        if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
            continue
        after, owner = buffers[name], name.rpartition(".")[0]
        rotated = 2 * len(before)
        scales = [
            [value for key, value in vars(arch.base.get_submodule(owner)).items() if key.endswith("attention_scaling")]
            for arch in (old, new)
        ]
        picked = after[::k].to(before.dtype).double().cpu()
        same = len(after) == k * len(before) and torch.allclose(picked, before.double().cpu(), rtol=1e-6, atol=0)
        if k > 1 and not (same and scales[0] == scales[1]):
            raise ValueError(
                f"head_dim cannot grow by {k} here: {name} has frequencies that the grown model lacks, because its "
                f"scaling ({rope_type(old.config)}) depends on the head size"
            )
    return rotated
