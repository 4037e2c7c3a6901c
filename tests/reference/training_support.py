"""A recipe small enough to run in a second."""

from __future__ import annotations

import copy
from typing import Any

LINES = [f"line {i} says {i * i % 97} and {'abcdefgh'[i % 8] * 5}\n" for i in range(4000)]

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        }
    },
    "tokenizer": {"path": "danlu-nano"},
    "data": {"train": "text", "length": 16, "held_out": 0.05},
    "optimizer": {"name": "adamw", "learning_rate": 3e-3},
    "training": {"steps": 8, "batch": 4, "log_every": 1, "save_every": 2, "evaluate_every": 4, "evaluate_rows": 8},
}


def values(**changes: Any) -> dict[str, Any]:
    """The tiny recipe with dotted keys changed (double underscores part tables); None removes a key."""
    made = copy.deepcopy(TINY)
    for key, value in changes.items():
        *tables, last = key.split("__")
        table = made
        for name in tables:
            table = table.setdefault(name, {})
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    return made
