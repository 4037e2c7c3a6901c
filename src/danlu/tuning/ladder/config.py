"""What a ladder looks like: which backbone layers it is fed by, how wide it is, how it mixes and how it starts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

FORMAT = 1
GATES = ("sigmoid", "constant", "none")
MIXES = ("before", "after")
INITS = ("fisher", "magnitude", "random")
LINKS = ("random", "select")
HEADS = ("lm", "classification", "tokens")


@dataclass(frozen=True)
class LadderConfig:
    """Shape of a side network.

    Args:
        reduction: r; every width of the side is the backbone's divided by it, at least 1. With 1 and
            ``links="select"`` the side starts as a copy of the backbone's blocks.
        layers: backbone layers that feed the side, one side block each: ``"all"``, ``"every:3"`` (the last of each
            three) or 0-based indices in rising order.
        gate: how a link is mixed in. ``"sigmoid"``: ``mu * Y + (1 - mu) * D(H)`` with ``mu = sigmoid(a / T)``, a
            learned and 0 at the start; ``"constant"``: the same with ``mu = gate_value``; ``"none"``: ``Y + D(H)``.
        gate_value: mu of a constant gate, in 0..1; 1 closes the ladder.
        temperature: T of the sigmoid, above 0. Without it (T = 1) gates learn about ten times as slowly.
        mix: ``"before"`` or ``"after"`` the side block.
        init: start of the side blocks: ``"fisher"`` or ``"magnitude"`` prune the backbone's blocks by the importance
            of their channels, ``"random"`` draws them as the host draws a new model.
        links: start of D and Up: ``"random"``, or ``"select"``, which picks the channels that pruning kept, so that
            the side starts as a pruned backbone.
        head: ``"lm"`` is the backbone's own frozen head; ``"classification"`` a new linear map of one token of the
            side (the last for causal models, else the first); ``"tokens"`` the same for every token.
        num_labels: classes of a new head, at least 2.
        merge_last: the head reads ``g * Up(Y) + (1 - g) * H`` with H the backbone's own last hidden state and
            ``g = sigmoid(a / T)`` learned, 1/2 at the start. All blocks of the backbone run then.
        min_head_dim: heads of the side are merged until each has so many channels. 1 keeps their number, as the
            reference code does. Attention costs by the head, not by the channel, so 32 makes the side faster.
        seed: of everything that is drawn.

    Raises:
        ValueError, TypeError: a value out of its range, or options that contradict each other.

    Source: Scientific Spaces archive 9138; arXiv:2206.06522
    """

    reduction: int = 8
    layers: str | Sequence[int] = "all"
    gate: str = "sigmoid"
    gate_value: float = 0.5
    temperature: float = 0.1
    mix: str = "before"
    init: str = "fisher"
    links: str = "random"
    head: str = "lm"
    num_labels: int | None = None
    merge_last: bool = False
    min_head_dim: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("reduction", "min_head_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, known in (("gate", GATES), ("mix", MIXES), ("init", INITS), ("links", LINKS), ("head", HEADS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 <= self.gate_value <= 1:
            raise ValueError(f"gate_value must be in 0..1, got {self.gate_value}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")
        if self.links == "select" and self.init == "random":
            raise ValueError("links='select' needs channels to select: use init='magnitude' or 'fisher'")
        if self.head == "lm" and self.num_labels is not None:
            raise ValueError(f"num_labels must be left out with head='lm', got {self.num_labels}")
        if self.head != "lm" and (self.num_labels is None or self.num_labels < 2):
            raise ValueError(f"num_labels must be at least 2 with head={self.head!r}, got {self.num_labels}")
        if isinstance(self.layers, str):
            step = re.fullmatch(r"every:(\d+)", self.layers)
            if self.layers != "all" and (step is None or int(step[1]) < 1):
                raise ValueError(f"layers must be 'all', 'every:N' or a list of layers, got {self.layers!r}")
        elif not self.layers or any(isinstance(i, bool) or not isinstance(i, int) for i in self.layers):
            raise ValueError(f"layers must be 'all', 'every:N' or a list of layers, got {self.layers!r}")
        elif list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must rise and name each layer once, got {self.layers}")

    def resolve_layers(self, depth: int) -> tuple[int, ...]:
        """The 0-based layers of a backbone of ``depth`` blocks.

        Raises:
            ValueError: a layer that the backbone does not have, or no layer at all.
        """
        if self.layers == "all":
            return tuple(range(depth))
        if isinstance(self.layers, str):
            step = int(self.layers.split(":")[1])
            if step > depth:
                raise ValueError(f"layers must leave at least one of {depth} layers, got {self.layers!r}")
            return tuple(range(step - 1, depth, step))
        if self.layers[0] < 0 or self.layers[-1] >= depth:
            raise ValueError(f"layers must be in 0..{depth - 1}, got {self.layers}")
        return tuple(self.layers)

    def to_json(self) -> str:
        """The configuration as a JSON document."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LadderConfig:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, or a key that is not an option; the message names the nearest.
        """
        try:
            values: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a ladder configuration: {error}") from error
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"{key!r} is no option of LadderConfig; the nearest is {near!r}")
        return cls(**values)
