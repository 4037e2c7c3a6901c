"""Start of a ladder's side: the backbone's blocks with all but their most important channels pruned away."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu.hosts.architecture import Architecture, Block, Matrix, UnsupportedArchitecture, read_architecture
from danlu.optim.backward import GradientConsumer
from danlu.tuning.ladder.blocks import rotated_channels

Scores = dict[tuple[str, int], tuple[Tensor, Tensor]]  # matrix (name, first row) -> importance of its rows and columns


@dataclass(frozen=True)
class Channels:
    """What pruning keeps of one block; all index tensors are int64.

    Args:
        feed_forward: hidden units.
        query: rows of the query projection, head by head of the side.
        key: rows of the key projection.
        value: rows of the value projection.
        output: columns of the output projection.
        within_key: channel inside its head for each kept channel of the first key head.
    """

    feed_forward: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    within_key: Tensor


def importance(backbone: Any, rule: str, samples: Iterable[Mapping[str, Tensor]] | None) -> Scores:
    """Importance of every row and column of the backbone's matrices.

    Args:
        backbone: host model.
        rule: ``"fisher"`` or ``"magnitude"``.
        samples: for ``"fisher"``, batches with ``labels``.

    Raises:
        UnsupportedArchitecture: weights that cannot be read, such as quantised ones.
        ValueError: no samples for ``"fisher"``, or one without labels.
    """
    if rule == "fisher" and samples is None:
        raise ValueError("init='fisher' needs samples=, batches with labels; init='magnitude' needs none")
    try:
        architecture = read_architecture(backbone)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(
            f"init={rule!r} needs the backbone's weights ({error}); use init='random'"
        ) from error
    if rule == "magnitude" or samples is None:
        return magnitude_scores(architecture)
    return fisher_scores(architecture, samples)


def magnitude_scores(architecture: Architecture) -> Scores:
    """Sum of absolute weights of every row and column (the L1 rule)."""
    scores = {}
    for matrix in _matrices(architecture):
        size = matrix.weight.detach().abs().double()
        scores[matrix.name, matrix.start] = size.sum(1), size.sum(0)
    return scores


def fisher_scores(architecture: Architecture, samples: Iterable[Mapping[str, Tensor]]) -> Scores:
    """Empirical Fisher information of every row and column: squared gradients of the loss, summed over samples.

    Each row of a batch is a sample of its own. Gradients are reduced inside the backward pass, so at most one is alive
    at a time. Afterwards no parameter has a gradient, and each requires one if it did before.

    Args:
        architecture: reading of the backbone.
        samples: batches of inputs with ``labels`` for the backbone's own loss.

    Raises:
        ValueError: no samples, or one without labels.
    """
    model: Any = architecture.model
    by_parameter: dict[int, list[Matrix]] = {}
    scores: Scores = {}
    for matrix in _matrices(architecture):
        by_parameter.setdefault(id(matrix.module.weight), []).append(matrix)
        rows, columns = matrix.weight.shape
        zeros = torch.zeros(rows + columns, dtype=torch.float64, device=matrix.weight.device)
        scores[matrix.name, matrix.start] = zeros[:rows], zeros[rows:]

    def consume(parameter: nn.Parameter, gradient: Tensor) -> None:
        square = gradient.double().square()
        for matrix in by_parameter[id(parameter)]:
            part = (square.T if matrix.transposed else square)[matrix.start : matrix.stop]
            rows, columns = scores[matrix.name, matrix.start]
            rows += part.sum(1)
            columns += part.sum(0)

    seen = 0
    with _only_trainable(model, by_parameter) as parameters:
        consumer = GradientConsumer(parameters, consume)
        try:
            for batch in samples:
                if batch.get("labels") is None:
                    raise ValueError("samples must hold labels for the backbone's own loss, got a batch without")
                for index in range(len(batch["labels"])):
                    one = {name: value[index : index + 1].to(model.device) for name, value in batch.items()}
                    model(**one).loss.backward()
                    seen += 1
        finally:
            consumer.remove()
    if not seen:
        raise ValueError("samples must hold at least one batch, got none")
    return scores


@contextlib.contextmanager
def _only_trainable(model: nn.Module, wanted: Mapping[int, object]) -> Iterator[list[nn.Parameter]]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            yield [parameter for parameter, _ in before if parameter.requires_grad]
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag


def residual_channels(architecture: Architecture, scores: Scores, keep: int) -> Tensor:
    """The channels of the residual stream to keep, rising: one set for the embeddings and all blocks.

    A channel counts with every matrix that reads it (queries, keys, values, up, gate), every one that writes it
    (attention output, down) and the token table.
    """
    table = next(iter(architecture.embeddings))
    total = scores[table, 0][1].clone()
    for block in architecture.blocks:
        attention, feed = block.attention, block.feed_forward
        for matrix in (attention.query, attention.key, attention.value, feed.up, feed.gate):
            if matrix is not None:
                total += scores[matrix.name, matrix.start][1].to(total.device)
        for matrix in (attention.output, feed.down):
            total += scores[matrix.name, matrix.start][0].to(total.device)
    return _top(total, keep)


def block_channels(block: Block, scores: Scores, small: Any, config: Any) -> Channels:
    """The hidden units and head channels of one block to keep.

    Queries and keys share their channels within a group of heads, and so do values and outputs. Rotated channels are
    kept in pairs, one of each r neighbouring frequencies, because the side's k-th frequency is the backbone's (r k)-th.
    Where the side merges g heads into one, their channels compete with each other. Models that norm queries or keys
    by head use one choice for all heads, as they have one gain for all.
    """
    attention, feed = block.attention, block.feed_forward

    def rows(matrix: Matrix) -> Tensor:
        return scores[matrix.name, matrix.start][0]

    hidden = rows(feed.up) + scores[feed.down.name, feed.down.start][1]
    if feed.gate is not None:
        hidden = hidden + rows(feed.gate)
    groups, size, each = attention.kv_heads, attention.head_dim, attention.heads // attention.kv_heads
    turned = rows(attention.key).view(groups, size) + rows(attention.query).view(groups, each, size).sum(1)
    output = scores[attention.output.name, attention.output.start][1]
    carried = rows(attention.value).view(groups, size) + output.view(groups, each, size).sum(1)
    small_groups = getattr(small, "num_key_value_heads", None) or small.num_attention_heads
    merged = groups // small_groups
    small_size = getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads
    if attention.query_norm is not None:
        turned = turned.sum(0, keepdim=True).expand(groups, -1)
    shape = (small_groups, merged, size)
    keys = [
        _head_channels(part, small_size, rotated_channels(config, size), rotated_channels(small, small_size), block)
        for part in turned.reshape(shape)
    ]
    values = [_top(part.flatten(), small_size) for part in carried.reshape(shape)]

    def kv_rows(picks: list[Tensor]) -> Tensor:
        # a pick is (head within the merged ones) * size + channel
        return torch.cat([group * merged * size + pick for group, pick in enumerate(picks)])

    def q_rows(picks: list[Tensor]) -> Tensor:
        return torch.cat(
            [
                ((group * merged + pick // size) * each + head) * size + pick % size
                for group, pick in enumerate(picks)
                for head in range(each)
            ]
        )

    units = len(hidden) * small.hidden_size // config.hidden_size
    return Channels(_top(hidden, units), q_rows(keys), kv_rows(keys), kv_rows(values), q_rows(values), keys[0] % size)


def _head_channels(scores: Tensor, keep: int, rotated: int, small_rotated: int, block: Block) -> Tensor:
    """Choose ``keep`` channels of (merged heads, size): rotated pairs by frequency band, then the rest by score."""
    merged, size = scores.shape
    if not rotated:
        return _top(scores.flatten(), keep)
    first, second = _pairs(block, rotated)
    heads = torch.arange(merged, device=scores.device)[:, None] * size
    pairs = (scores[:, first] + scores[:, second]).T.flatten()  # by frequency, then by head
    band = len(pairs) * 2 // small_rotated
    best = pairs.view(-1, band).argmax(1) + torch.arange(small_rotated // 2, device=scores.device) * band
    ones, others = (heads + first.to(heads)).T.flatten()[best], (heads + second.to(heads)).T.flatten()[best]
    if _interleaved(block):
        turned = torch.stack((ones, others), 1).flatten()
    else:
        turned = torch.cat((ones, others))
    if keep == small_rotated:
        return turned
    still = (heads + torch.arange(rotated, size, device=scores.device)).flatten()
    return torch.cat((turned, still[_top(scores[:, rotated:].flatten(), keep - small_rotated)]))


def _pairs(block: Block, rotated: int) -> tuple[Tensor, Tensor]:
    half = torch.arange(rotated // 2)
    return (2 * half, 2 * half + 1) if _interleaved(block) else (half, half + rotated // 2)


def _interleaved(block: Block) -> bool:
    """Whether the host turns channels (2i, 2i + 1) together, as its own ``rotate_half`` tells."""
    rotate = getattr(sys.modules[type(block.attention.module).__module__], "rotate_half", None)
    return rotate is not None and bool(rotate(torch.tensor([0.0, 1.0, 2.0, 3.0]))[0] == -1)


@torch.no_grad()
def prune_into(side: Any, backbone: Any, layers: Sequence[int], scores: Scores) -> Tensor:
    """Copy the kept channels of the backbone's blocks into a narrow base model.

    Args:
        side: host base model with the narrow configuration; changed in place.
        backbone: host model with plain floating-point weights.
        layers: the backbone layer of each side block.
        scores: from :func:`fisher_scores` or :func:`magnitude_scores`.

    Returns:
        The kept channels of the residual stream, rising, int64 (d / r,).

    Source: arXiv:2206.06522, section on initialisation by structured pruning
    """
    host, small = read_architecture(backbone), read_architecture(side)
    residual = residual_channels(host, scores, small.config.hidden_size)
    for index, target in zip(layers, small.blocks, strict=True):
        source = host.blocks[index]
        kept = block_channels(source, scores, small.config, host.config)
        old, new = source.attention, target.attention
        _copy(new.query, old.query, kept.query, residual)
        _copy(new.key, old.key, kept.key, residual)
        _copy(new.value, old.value, kept.value, residual)
        _copy(new.output, old.output, residual, kept.output)
        _copy(target.feed_forward.up, source.feed_forward.up, kept.feed_forward, residual)
        _copy(target.feed_forward.down, source.feed_forward.down, residual, kept.feed_forward)
        if source.feed_forward.gate is not None and target.feed_forward.gate is not None:
            _copy(target.feed_forward.gate, source.feed_forward.gate, kept.feed_forward, residual)
        for norm, wide in zip(target.norms.values(), source.norms.values(), strict=True):
            if wide in (old.query_norm, old.key_norm):
                whole = kept.query if wide is old.query_norm else kept.key
                _copy_norm(norm, wide, kept.within_key if _size(wide) == old.head_dim else whole)
            else:
                _copy_norm(norm, wide, residual)
    if host.final_norm is not None and small.final_norm is not None:
        _copy_norm(small.final_norm[1], host.final_norm[1], residual)
    return residual


def _copy(target: Matrix, source: Matrix, rows: Tensor, columns: Tensor) -> None:
    target.weight.copy_(source.weight[rows.to(source.weight.device)][:, columns.to(source.weight.device)])
    if source.bias is not None and target.bias is not None:
        target.bias.copy_(source.bias[rows.to(source.bias.device)])


def _copy_norm(target: nn.Module, source: nn.Module, channels: Tensor) -> None:
    for name, parameter in source.named_parameters(recurse=False):
        target.get_parameter(name).copy_(parameter[channels.to(parameter.device)])


def _size(norm: nn.Module) -> int:
    return next(norm.parameters()).numel()


def _matrices(architecture: Architecture) -> Iterator[Matrix]:
    yield from architecture.matrices()
    name, table = next(iter(architecture.embeddings.items()))
    yield Matrix(name, table)


def _top(scores: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` largest, rising; of equals the first."""
    return torch.sort(torch.sort(scores, descending=True, stable=True).indices[:keep]).values
