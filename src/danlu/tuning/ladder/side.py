"""The side network of a ladder: the backbone's own kind of blocks, made narrow, with one link before or after each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu.hosts.architecture import Stack, UnsupportedArchitecture, find_blocks
from danlu.tuning.ladder.config import LadderConfig


class Rung(nn.Module):
    """One side block with its link; takes the place of the block in the host's list."""

    def __init__(self, block: nn.Module, mix: str) -> None:
        super().__init__()
        self.block = block
        self.mix = mix
        self.start: Tensor | None = None
        self.link: Callable[[Tensor], Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        # Host code asks its blocks for more than a forward pass (attention_type and the like).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block with its link mixed in; the host's own arguments pass through."""
        if self.link is None:
            raise RuntimeError("a ladder's side must be run by its LadderModel: its links are not set")
        # What the host made of its inputs before the first block is not the side's start.
        state = hidden_states if self.start is None else self.start
        if self.mix == "before":
            return self.block(self.link(state), *args, **kwargs)
        output = self.block(state, *args, **kwargs)
        return (self.link(output[0]), *output[1:]) if isinstance(output, tuple) else self.link(output)


class Side(nn.Module):
    """Everything of a ladder that is trained, but for a new head: D, gates, blocks, norm and Up.

    Args:
        base: narrow host model from ``ladder_blocks.build_blocks``.
        config: of the ladder.
        wide: the backbone's hidden size d.
        post_norm: the host's blocks end in a norm of their own, and the base model has none after them.
        with_up: whether the head reads states of width d.
    """

    def __init__(self, base: Any, config: LadderConfig, wide: int, *, post_norm: bool, with_up: bool):
        super().__init__()
        stack = find_blocks(base)
        narrow, depth = base.config.hidden_size, len(stack.blocks)
        self.mix, self.gate, self.temperature = config.mix, config.gate, config.temperature
        self.gate_value = config.gate_value
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            # D of the embeddings, then one D for each link
            self.down: Any = nn.ModuleList(nn.Linear(wide, narrow) for _ in range(depth + 1))
            self.up = nn.Linear(narrow, wide) if with_up else None
        self.gates = nn.Parameter(torch.zeros(depth)) if config.gate == "sigmoid" else None
        eps = getattr(base.config, "layer_norm_eps", 1e-5)
        self.norm: nn.Module = nn.LayerNorm(narrow, eps=eps) if post_norm else nn.Identity()
        for index, block in enumerate(stack.blocks):
            stack.blocks[index] = Rung(block, config.mix)
        self.base = base
        self._check()

    @property
    def rungs(self) -> list[Rung]:
        """The side blocks with their links, in order."""
        return [module for module in self.base.modules() if isinstance(module, Rung)]

    @torch.no_grad()
    def select(self, channels: Tensor) -> None:
        """Make each D pick these channels of the backbone's state, and Up put them back where they were."""
        for down in self.down:
            down.weight.zero_()[torch.arange(len(channels)), channels] = 1
            down.bias.zero_()
        if self.up is not None:
            self.up.weight.zero_()[channels, torch.arange(len(channels))] = 1
            self.up.bias.zero_()

    def _check(self) -> None:
        """Run two tokens, so that a block that cannot be linked is found before any work."""
        parts = [torch.ones(1, 2, self.base.config.hidden_size) for _ in self.down]
        self.eval()
        try:
            with torch.no_grad():
                out = self(parts)
        except Exception as error:
            raise UnsupportedArchitecture(f"blocks of {type(self.base).__name__} cannot be linked: {error}") from error
        self.train()
        if out.shape != parts[0].shape:
            raise UnsupportedArchitecture(f"{type(self.base).__name__} must return {parts[0].shape}, got {out.shape}")

    def forward(self, parts: Sequence[Tensor], **inputs: Any) -> Tensor:
        """Run the side.

        Args:
            parts: D(H) for the embeddings and each link, (batch, length, d / r).
            inputs: mask, positions and the side's own cache, as the host's base model takes them.

        Returns:
            Norm(Y), shape (batch, length, d / r).
        """
        start, *links = parts
        with self._linked(start, links):
            out = self.base(inputs_embeds=torch.zeros_like(start), use_cache="past_key_values" in inputs, **inputs)
        return self.norm(out.last_hidden_state)

    @contextlib.contextmanager
    def _linked(self, start: Tensor, links: Sequence[Tensor]) -> Iterator[None]:
        rungs = self.rungs
        try:
            rungs[0].start = start
            for index, (rung, link) in enumerate(zip(rungs, links, strict=True)):
                rung.link = self._mixer(index, link)
            yield
        finally:
            for rung in rungs:
                rung.start = rung.link = None

    def _mixer(self, index: int, link: Tensor) -> Callable[[Tensor], Tensor]:
        if self.gate == "none":
            return lambda state: state + link
        mu: Any = self.gate_value if self.gates is None else torch.sigmoid(self.gates[index] / self.temperature)
        return lambda state: mu * state + (1 - mu) * link


class _Enough(Exception):
    """The last tapped block has run."""


def run_backbone(
    stack: Stack, layers: Sequence[int], inputs: dict[str, Any], take: Callable[[int, Tensor], None], *, to_end: bool
) -> Tensor | None:
    """Run the backbone without gradients and hand out its states as they appear; none of them is kept here.

    Args:
        stack: the backbone's blocks.
        layers: which outputs to hand out.
        inputs: of the base model.
        take: called with 0 and the first block's input, then with j + 1 and the output of block ``layers[j]``. It runs
            in the caller's gradient mode.
        to_end: whether the last hidden state is wanted; without it the blocks above ``layers[-1]`` do not run.

    Returns:
        The base model's last hidden state, none without ``to_end``.
    """
    gradients = torch.is_grad_enabled()
    order = {layer: position + 1 for position, layer in enumerate(layers)}

    def hand_out(position: int, state: Tensor) -> None:
        with torch.set_grad_enabled(gradients):
            take(position, state)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hand_out(0, args[0] if args else kwargs["hidden_states"])

    def after(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hand_out(order[layer], output[0] if isinstance(output, tuple) else output)
            if layer == layers[-1] and not to_end:
                raise _Enough

        return hook

    handles = [stack.blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [stack.blocks[layer].register_forward_hook(after(layer)) for layer in layers]
    try:
        with torch.no_grad():
            return stack.base(**inputs).last_hidden_state
    except _Enough:
        return None
    finally:
        for handle in handles:
            handle.remove()
