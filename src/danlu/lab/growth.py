"""Claim on exact growth: it starts where the small model stood, and gets there sooner than from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.lab import corpora
from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.lab.training import Batch, Schedule, train

#: Tokens (bytes) per window; the window is also the longest position.
WINDOW = 64
BATCH = 16
#: Steps of the large model from scratch, and of the small one before growth; the grown one gets this share of them.
BUDGETS, SHARE = (600, 1200), 0.6
NOISES = (0.0, 0.5, 1.0)
_GROWN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
_SMOOTH = 60


@dataclass(frozen=True)
class Steady(Schedule):
    """A warm-up and then one rate: a model that is to be grown is not cooled down before."""

    def factor(self, step: int) -> float:
        """Learning rate of a step as a share of the peak."""
        return min(1.0, (step + 1) / self.warmup)


@claim(
    name="growth",
    title="Growth starts where the small model stood and gets there sooner",
    source="archive 8444; arXiv:2110.07143",
    statement="A small model can be made larger without a change of its outputs, and training goes on from its loss.",
    measurement="Bytes of the standard library, 2-layer Llamas of width 32 and 64. A small one is trained for N steps, "
    "grown, and trained for 0.6 N more; a large one from scratch gets N steps (N = 600 and 1200). Loss on held-out "
    "modules.",
    budget=150,
)
def growth(context: Context) -> Evidence:
    """Small models grown after two budgets, with three kinds of noise, against the large model from scratch."""
    from danlu.tuning.growth.grow import grow, verify_growth

    seed = context.seeds[0]
    text, test = texts()
    batches, windows = draw(text), held_out(test)
    curves: dict[str, list[float]] = {}
    final: dict[str, float] = {}

    def measure(name: str, model: nn.Module, steps: int, *, steady: bool = False) -> nn.Module:
        schedule = (Steady if steady else Schedule)(steps=steps, batch=BATCH, learning_rate=2e-3)
        curves[name] = train(model, batches, schedule, 2 * seed + steady, context, name)
        final[name] = loss(model, windows)
        return model

    small, later = (measure(f"small, {n}", llama(32, seed), n, steady=True) for n in BUDGETS)
    short, long = (round(SHARE * budget) for budget in BUDGETS)
    moved = 0.0
    for noise in NOISES:
        grown = grow(small, **_GROWN, symmetry="antisymmetric" if noise else "none", noise=noise, seed=seed)
        moved = max(moved, abs(loss(grown, windows) - final[f"small, {BUDGETS[0]}"]))
        check = verify_growth(small, grown, windows[:64, :-1])
        measure(f"grown, {short}" if noise == 1 else f"grown, {short}, noise {noise:g}", grown, short)
    measure(f"grown, {long}", grow(later, **_GROWN, seed=seed), long)
    for steps in (short, *BUDGETS):
        measure(f"scratch, {steps}", llama(64, seed), steps)
    cost = cost_of(small) / cost_of(llama(64, seed))
    measure(f"small, {short} more", small, short)

    best, none = final[f"grown, {short}"], final[f"grown, {short}, noise 0"]
    equal = final[f"scratch, {short}"] - best
    pairs = [(n, final[f"grown, {round(SHARE * n)}"], final[f"scratch, {n}"]) for n in BUDGETS]
    return Evidence(
        summary=f"Growth moves the loss by {moved:.0e}. "
        + "; ".join(f"{SHARE} x {n} steps after it reach {a:.3f}, {n} from scratch {b:.3f}" for n, a, b in pairs)
        + f". Without noise {short} steps reach {none:.3f} instead of {best:.3f}.",
        checks=(
            Check(
                "growth keeps the loss to 1e-4 and the logits to 1e-5 of the largest",
                moved <= 1e-4 and check.relative_error <= 1e-5,
                f"{moved:.1e}, {check.relative_error:.1e}",
            ),
            Check("after equal steps of the large model, 0.1 below from scratch", equal >= 0.1, f"{equal:.3f}"),
            *(
                Check(f"{SHARE} times {n} steps reach the loss of {n} from scratch", a <= b, f"{a:.3f} against {b:.3f}")
                for n, a, b in pairs
            ),
            Check("noise 1 beats no noise", best < none, f"{best:.3f} against {none:.3f}"),
        ),
        tables=(_table(curves, final, cost),),
        plots=(_steps_plot(curves), _compute_plot(curves, cost)),
        notes=(
            "Models from scratch and grown ones have a cosine schedule of their own length; in its middle a curve is "
            "above what a shorter schedule would give: compare the ends. Small models keep one rate until they grow.",
            "Grown models start with a fresh optimiser and the learning rate of the large one from scratch.",
            "Compute counts the weights that a token is multiplied by, the small model's own training included.",
            "Models of 0.04 and 0.14 million weights: the gain at a real size is not measured here.",
        ),
    )


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes of modules that are held out."""
    corpus = corpora.code(4_000_000, 400_000)
    train_bytes, test_bytes = ("".join(part).encode() for part in (corpus.train, corpus.test))
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train_bytes, test_bytes))  # type: ignore[return-value]


def draw(text: Tensor) -> Batch:
    """Random windows of bytes, each byte the target of those before it."""

    def batch(generator: torch.Generator) -> dict[str, Any]:
        starts = torch.randint(len(text) - WINDOW - 1, (BATCH,), generator=generator)
        tokens = text[starts[:, None] + torch.arange(WINDOW + 1)].long()
        return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}

    return batch


def held_out(text: Tensor, count: int = 512) -> Tensor:
    """(count, WINDOW + 1) windows at fixed places."""
    starts = torch.arange(count) * ((len(text) - WINDOW - 1) // count)
    return text[starts[:, None] + torch.arange(WINDOW + 1)].long()


@torch.no_grad()
def loss(model: nn.Module, windows: Tensor) -> float:
    """Mean loss in nats per byte."""
    model.eval()
    total = 0.0
    for rows in windows.split(64):
        logits = model(input_ids=rows[:, :-1]).logits
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


def llama(width: int, seed: int) -> nn.Module:
    """A 2-layer Llama over bytes with heads of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
        num_attention_heads=width // 16, num_key_value_heads=width // 16, head_dim=16, max_position_embeddings=WINDOW,
        use_cache=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def cost_of(model: nn.Module) -> int:
    """Weights that each token is multiplied by: all matrices but the table of the inputs."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    return sum(p.numel() for p in model.parameters() if p.ndim > 1) - table.weight.numel()


def _smoothed(curve: list[float]) -> list[float]:
    """Means of the training loss over stretches of ``_SMOOTH`` steps."""
    return [sum(curve[i : i + _SMOOTH]) / _SMOOTH for i in range(0, len(curve) - _SMOOTH + 1, _SMOOTH)]


def _table(curves: dict[str, list[float]], final: dict[str, float], cost: float) -> Table:
    rows = []
    for name, value in final.items():
        steps = len(curves[name])
        before = _steps_before(name)
        large = 0 if name.startswith("small") else steps
        spent = cost * (before + steps - large) + large
        rows.append((name, before + steps - large, large, round(spent), round(value, 4)))
    columns = ("run, steps", "steps of the small model", "of the large", "compute, in large steps", "held-out loss")
    return Table("Loss in nats per byte", columns, tuple(rows))


def _steps_before(name: str) -> int:
    """Steps of the small model that a run starts from."""
    if name.endswith("more"):
        return BUDGETS[0]
    return next((n for n in BUDGETS if name.startswith(f"grown, {round(SHARE * n)}")), 0)


def _steps_plot(curves: dict[str, list[float]]) -> Plot:
    lines = {name: _smoothed(curve) for name, curve in curves.items() if not name.startswith("small")}
    longest = max(map(len, lines.values()))
    return Plot(
        "Training loss over steps of the large model",
        f"steps (means of {_SMOOTH})",
        "nats per byte",
        tuple(_SMOOTH * (i + 0.5) for i in range(longest)),
        {name: tuple(line) + (None,) * (longest - len(line)) for name, line in lines.items()},
    )


def _compute_plot(curves: dict[str, list[float]], cost: float) -> Plot:
    """Training loss over compute, the small model's included, each line read off at common places."""
    lines = {}
    for n in BUDGETS:
        lines[f"scratch, {n}"] = _timed(curves[f"scratch, {n}"], 1.0, 0.0)
        grown = _timed(curves[f"grown, {round(SHARE * n)}"], 1.0, cost * n)
        lines[f"small {n}, then grown"] = _timed(curves[f"small, {n}"], cost, 0.0) + grown
    end = max(line[-1][0] for line in lines.values())
    places = [end * i / 50 for i in range(1, 51)]
    return Plot(
        "Training loss over compute",
        "compute, in steps of the large model",
        "nats per byte",
        tuple(places),
        {name: tuple(_read_off(line, place) for place in places) for name, line in lines.items()},
    )


def _timed(curve: list[float], cost: float, start: float) -> list[tuple[float, float]]:
    return [(start + cost * _SMOOTH * (i + 0.5), value) for i, value in enumerate(_smoothed(curve))]


def _read_off(line: list[tuple[float, float]], place: float) -> float | None:
    """Linear between points, None outside."""
    for (a, before), (b, after) in zip(line, line[1:], strict=False):
        if a <= place <= b:
            return before + (after - before) * (place - a) / (b - a)
    return None
