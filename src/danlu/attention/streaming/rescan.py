"""Recurrences that read the whole history again at every token: attention is one of them.

At step i a cell with a state of constant size runs over tokens 1..i once more. Memory is constant and time quadratic.
Softmax attention is the case of the cell (m, z, y), read from the newest token to the first, with a fresh state each
time. Taken at its word for a whole decoder, with nothing kept but token ids, the same idea gives a constant hidden
working set and a number of steps that grows as a binomial: `depth_first_logits` runs that and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from danlu.attention.streaming.rerun import Stop, first_arguments
from danlu.attention.streaming.state import SoftmaxState
from danlu.hosts.architecture import Architecture, UnsupportedArchitecture, read_architecture

__all__ = ["AttentionCell", "DepthFirstCount", "RecurrentCell", "RescanCell", "RescanRNN", "depth_first_logits"]


class RescanCell(Protocol):
    """What :class:`RescanRNN` needs of a cell; a state may be anything of constant size."""

    def start(self, x: Tensor) -> Any:
        """A fresh state for the scan of the token x, shape (batch, features)."""

    def step(self, state: Any, x: Tensor, token: Tensor) -> Any:
        """The state after reading ``token`` of the history, during the scan of x; both of shape (batch, features)."""

    def read(self, state: Any, x: Tensor) -> Tensor:
        """The output of the scan, shape (batch, out_features)."""


class RescanRNN(nn.Module):
    """A recurrence that reads the whole history again at every token.

    Args:
        cell: see :class:`RescanCell`; :class:`AttentionCell` gives causal softmax attention, :class:`RecurrentCell`
            wraps the cells of PyTorch.
        order: ``"backward"``: from the newest token to the first; ``"forward"``: from the first to the newest.
        carry_state: a scan begins in the state in which the one before it ended, instead of a fresh one.

    Raises:
        ValueError: unknown order.

    Source: Scientific Spaces archive 10017, whose text gives no reading order for cells other than attention; the
    carried variant is only drawn there.
    """

    def __init__(
        self, cell: RescanCell, order: Literal["backward", "forward"] = "backward", carry_state: bool = False
    ) -> None:
        super().__init__()
        if order not in ("backward", "forward"):
            raise ValueError(f'order must be "backward" or "forward", got {order!r}')
        self.cell, self.order, self.carry_state = cell, order, carry_state

    def forward(self, x: Tensor) -> Tensor:
        """Scan.

        Args:
            x: shape ``(batch, length, features)``.

        Returns:
            Shape ``(batch, length, out_features)``. Takes length * (length + 1) / 2 steps of the cell.

        Raises:
            ValueError: x has another number of dimensions, or no token.
        """
        if x.ndim != 3 or x.shape[1] == 0:
            raise ValueError(f"x must be (batch, length >= 1, features), got {tuple(x.shape)}")
        outs = []
        state: Any = None
        for i in range(x.shape[1]):
            if i == 0 or not self.carry_state:
                state = self.cell.start(x[:, i])
            history = range(i + 1)
            for j in history if self.order == "forward" else reversed(history):
                state = self.cell.step(state, x[:, i], x[:, j])
            outs.append(self.cell.read(state, x[:, i]))
        return torch.stack(outs, 1)


class AttentionCell(nn.Module):
    """Softmax attention as a cell: its state is (m, z, y).

    Args:
        query: map from features to the query, as the next two.
        key: map to the key, of the same width.
        value: map to the value.
        scale: factor of the scores; default width ** -0.5.
    """

    def __init__(
        self,
        query: Callable[[Tensor], Tensor],
        key: Callable[[Tensor], Tensor],
        value: Callable[[Tensor], Tensor],
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.scale = query, key, value, scale

    def start(self, x: Tensor) -> SoftmaxState:
        """The empty state."""
        width = self.value(x).shape[-1]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return SoftmaxState.empty((len(x), 1, 1), width, dtype=dtype, device=x.device)

    def step(self, state: SoftmaxState, x: Tensor, token: Tensor) -> SoftmaxState:
        """One more key."""
        q, k = self.query(x), self.key(token)
        scores = (q * k).sum(-1) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        return state.update(scores[:, None, None, None], self.value(token)[:, None, None])

    def read(self, state: SoftmaxState, x: Tensor) -> Tensor:
        """The quotient y / z."""
        return state.finalize()[0][:, 0, 0].to(x.dtype)


class RecurrentCell(nn.Module):
    """A cell of PyTorch, such as ``torch.nn.GRUCell``, as a :class:`RescanCell`.

    Args:
        cell: its input is the token that is read; the scanned token enters as the last or the first one read.
    """

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def start(self, x: Tensor) -> None:
        """None: the cell begins with zeros."""
        return None

    def step(self, state: Any, x: Tensor, token: Tensor) -> Any:
        """One step of the cell."""
        return self.cell(token, state)

    def read(self, state: Any, x: Tensor) -> Tensor:
        """The hidden state; of an LSTM's two, the first."""
        return state[0] if isinstance(state, tuple) else state


@dataclass
class DepthFirstCount:
    """What a depth-first evaluation did.

    Attributes:
        evaluations: layers evaluated at a position: C(i + n - 1, n - 1) in sum for n layers at the i-th position.
        exponentials: scores exponentiated, per head: C(i + n, n) - 1.
        live_numbers: most floating-point numbers held at once in unfinished layers (input, query and state of each).
    """

    evaluations: int = 0
    exponentials: int = 0
    live_numbers: int = 0


def depth_first_logits(model: nn.Module, ids: Tensor) -> tuple[Tensor, DepthFirstCount]:
    """Next-token logits with nothing kept but token ids: every layer input is computed again whenever it is read.

    Each unfinished layer holds its input (for the residual), its query and its softmax state: a number that does not
    depend on the length. An argument about memory and not a way to run a model: see
    :class:`danlu.attention.streaming.recompute.RecomputeCache` for useful points on the same curve.

    Args:
        model: a host decoder of the Llama or GPT-2 kind with full causal attention, in evaluation mode.
        ids: token ids, shape ``(length,)`` or ``(1, length)``.

    Returns:
        Logits of the next token, shape ``(vocabulary,)``, and the count.

    Raises:
        UnsupportedArchitecture: the model is of another kind.
        ValueError: no token, or more than one text.

    Source: Scientific Spaces archive 10017. There a layer holds query and state only, 2 d + 2 numbers for one head of
    width d; real layers add their input for the residual sum.
    """
    ids = ids.reshape(1, -1) if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"ids must be (length,) or (1, length) with at least one token, got {tuple(ids.shape)}")
    architecture = read_architecture(model)
    kinds = set(getattr(architecture.config, "layer_types", None) or ())
    if architecture.family == "bert" or len(kinds) > 1 or "sliding_attention" in kinds or architecture.head is None:
        raise UnsupportedArchitecture(f"model must be a decoder with full attention in every layer, got {type(model)}")
    run = _DepthFirst(architecture, ids)
    with torch.no_grad(), run.attending():
        hidden = run.output(len(architecture.blocks), ids.shape[1] - 1)
        if architecture.final_norm is not None:
            hidden = architecture.final_norm[1](hidden)
        return architecture.head.module(hidden)[0, -1], run.count


class _DepthFirst:
    """The recursion: output of layer n at a position, from outputs of layer n - 1 at all positions up to it."""

    def __init__(self, architecture: Architecture, ids: Tensor):
        self.architecture, self.ids = architecture, ids
        self.count = DepthFirstCount()
        self._live = 0
        # what the attention function is to do when a block calls it: nothing but give away key and value, or scan
        self._scan: tuple[int, int] | None = None
        self._captured: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Let the host's attention layers call this evaluation."""
        name = self.architecture.config._attn_implementation
        before = ALL_ATTENTION_FUNCTIONS.get(name)
        ALL_ATTENTION_FUNCTIONS[name] = self._attend
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[name]
            if before is not None and ALL_ATTENTION_FUNCTIONS.get(name) is not before:
                ALL_ATTENTION_FUNCTIONS[name] = before

    def output(self, n: int, i: int) -> Tensor:
        """Output (1, 1, hidden) of layer n, counted from 1, at position i, counted from 0; the embedding for n = 0."""
        arguments = self._arguments(i)
        if n == 0:
            return arguments["hidden_states"]
        x = self.output(n - 1, i)
        self.count.evaluations += 1
        self._live += x.numel()
        self._scan = (n, i)
        out = self.architecture.blocks[n - 1].module(**{**arguments, "hidden_states": x})
        self._live -= x.numel()
        return out if isinstance(out, Tensor) else out[0]

    def _arguments(self, i: int) -> dict[str, Any]:
        """What the host passes to its first block for one token."""
        position = torch.tensor([[i]], device=self.ids.device)
        return first_arguments(self.architecture, input_ids=self.ids[:, i : i + 1], position_ids=position)

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        if self._scan is None:
            self._captured = key, value
            raise Stop
        (n, i), self._scan = self._scan, None
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        state = SoftmaxState.empty(query.shape[:3], value.shape[-1], dtype=dtype, device=query.device)
        held = query.numel() + state.numbers()
        self._live += held
        self.count.live_numbers = max(self.count.live_numbers, self._live)
        for j in range(i, -1, -1):  # the token itself first: its query stays in hand
            if j < i:
                key, value = self._key_and_value(n, j)
            group = query.shape[1] // key.shape[1]
            scores = (query.to(dtype) * scale) @ key.to(dtype).repeat_interleave(group, 1).mT
            state = state.update(scores, value)
            self.count.exponentials += 1
        self._live -= held
        return state.finalize()[0].to(query.dtype).transpose(1, 2).contiguous(), None

    def _key_and_value(self, n: int, j: int) -> tuple[Tensor, Tensor]:
        """Key and value of layer n at position j, from the output of the layer below."""
        x = self.output(n - 1, j)
        self._scan = None
        try:
            self.architecture.blocks[n - 1].module(**{**self._arguments(j), "hidden_states": x})
        except Stop:
            pass
        captured = self._captured
        self._captured = None
        if captured is None:
            raise UnsupportedArchitecture("attention must go through the host's registry (AttentionInterface)")
        return captured
