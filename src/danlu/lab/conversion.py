"""Claim on the conversion of trained attention to a latent: activations tell what may go, weights alone do not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.growth import WINDOW, draw, held_out, loss, texts
from danlu.lab.runner import claim
from danlu.lab.training import Schedule, train, trained

HIDDEN, HEADS, GROUPS, HEAD_DIM, LAYERS = 128, 4, 2, 32, 2
#: Keys and values of a layer, and the sizes of a latent that stands for them.
FULL = 2 * GROUPS * HEAD_DIM
RANKS = (128, 64, 48, 32, 16, 8)
HEALED = 16
STEPS, HEALING_STEPS = 450, 150
#: (latent, rotary) sizes that danlu-nano is converted to; it caches 256 numbers per token and layer.
NANO = ((192, 64), (128, 64), (96, 64), (64, 64), (96, 32), (64, 32))
#: Windows of the training text that activations are taken from.
_CALIBRATION = 256


class Layer(nn.Module):
    """Grouped-query attention without positions in queries and keys, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.query = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.key: nn.Module = nn.Linear(HIDDEN, GROUPS * HEAD_DIM, bias=False)
        self.value: nn.Module = nn.Linear(HIDDEN, GROUPS * HEAD_DIM, bias=False)
        self.output = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states to hidden states, (batch, length, HIDDEN)."""
        normed = self.attention_norm(x)
        q = self.query(normed).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = (
            part(normed).unflatten(-1, (GROUPS, HEAD_DIM)).transpose(1, 2).repeat_interleave(HEADS // GROUPS, 1)
            for part in (self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.feed_norm(x))))


class Characters(nn.Module):
    """A byte model with learned positions; its output has ``logits``, like a host model's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(256, HIDDEN), nn.Embedding(WINDOW, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256, bias=False)

    def forward(self, input_ids: Tensor) -> Any:
        """(batch, length) bytes to logits."""
        x = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(self.norm(x)))


@claim(
    name="latent-conversion",
    title="A trained cache can be made smaller by what it holds, not by its weights",
    source="arXiv:2502.07864; archive 10091",
    statement="Keys and values of a trained model have a low rank on real text; a joint principal component analysis "
    "of balanced activations keeps the loss where a decomposition of the weights does not.",
    measurement="A 2-layer byte model (4 heads, 2 key heads of 32) on the standard library; keys and values (128 "
    "numbers) written as a latent of 64 to 8 by weights, activations and balanced activations; loss on held-out "
    "modules. danlu-nano converted to multi-head latent attention at several sizes.",
    budget=90,
)
def latent_conversion(context: Context) -> Evidence:
    """One model, three ways to compress it, a short healing; and the bundled model converted."""
    from danlu import __version__

    seed = context.seeds[0]
    text, test = texts()
    schedule = Schedule(steps=STEPS, batch=16, learning_rate=3e-3)

    def fit(model: nn.Module) -> None:
        train(model, draw(text), schedule, seed, context, "byte model")

    model = trained(f"conversion-{seed}-{STEPS}-{__version__}", Characters, fit, seed, context)
    windows = held_out(test)
    moments = attention_moments(model, held_out(text, _CALIBRATION)[:, :-1])
    before = loss(model, windows)
    ways = {
        "weights": ([torch.eye(HIDDEN, dtype=torch.float64)] * LAYERS, False),
        "activations": (moments, False),
        "balanced activations": (moments, True),
    }
    grown: dict[str, list[float]] = {name: [] for name in ways}
    for rank in context.track(RANKS, description="compressing", total=len(RANKS)):
        for name, (second, balance) in ways.items():
            grown[name].append(loss(compressed(model, second, rank, balance=balance), windows) - before)
    small = compressed(model, moments, HEALED, balance=True)
    healing = Schedule(steps=HEALING_STEPS, batch=16, learning_rate=1e-3)
    train(small, draw(text), healing, seed + 1, context, f"healing at {HEALED}")
    healed = loss(small, windows) - before
    weights, best = grown["weights"], grown["balanced activations"]
    wide = [i for i, rank in enumerate(RANKS) if FULL // 4 <= rank < FULL]
    columns = ("latent", *ways)
    shown = range(1, len(RANKS))
    return Evidence(
        summary=f"Loss above {before:.3f} at a latent of 64, 32, 16 (of {FULL}): by weights "
        + ", ".join(f"{weights[RANKS.index(rank)]:.4f}" for rank in (64, 32, 16))
        + ", by balanced activations "
        + ", ".join(f"{best[RANKS.index(rank)]:.4f}" for rank in (64, 32, 16))
        + f"; after {HEALING_STEPS} steps of healing at {HEALED}: {healed:+.4f}.",
        checks=(
            Check("no change at full size", max(abs(row[0]) for row in grown.values()) < 1e-4, f"{best[0]:.1e}"),
            Check(
                "balanced activations never above weights",
                all(best[i] <= weights[i] for i in shown),
                ", ".join(f"{RANKS[i]}: {best[i]:.4f} against {weights[i]:.4f}" for i in shown),
            ),
            Check(
                f"less than half of it at {FULL // 4} or more",
                all(best[i] < weights[i] / 2 for i in wide),
                ", ".join(f"{RANKS[i]}: {best[i] / weights[i]:.2f}" for i in wide),
            ),
            Check(f"healed at {HEALED}, at or below the loss before", healed <= 0, f"{healed:+.4f}"),
        ),
        tables=(
            Table(
                "Loss above the model's own",
                columns,
                tuple((r, *(row[i] for row in grown.values())) for i, r in enumerate(RANKS)),
            ),
            nano_table(context),
        ),
        plots=(
            Plot(
                "What a smaller latent costs",
                "numbers per token and layer",
                "loss above the model's own, nats per byte",
                RANKS[1:],
                {name: tuple(row[1:]) for name, row in grown.items()},
                log_x=True,
            ),
        ),
        notes=(
            "The byte model has no rotation, so that the low rank is measured alone; danlu-nano has one.",
            f"A model of 0.5 million weights after {STEPS} steps; activations of {_CALIBRATION * WINDOW} bytes.",
            "Healing trains all weights on, so it also gains what more training would give without compression.",
        ),
    )


@torch.no_grad()
def attention_moments(model: nn.Module, windows: Tensor) -> list[Tensor]:
    """Second moments of what the keys and values of each layer are made of, float64."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).double()
        found.append(rows.T @ rows / len(rows))

    layers: Any = model.layers
    handles = [layer.key.register_forward_pre_hook(hook) for layer in layers]
    model(windows)
    for handle in handles:
        handle.remove()
    return found


def compressed(model: nn.Module, moments: Sequence[Tensor], rank: int, *, balance: bool) -> nn.Module:
    """A copy whose keys and values come from a latent that both share."""
    from danlu.tuning.latent.rank import low_rank

    small: Any = copy.deepcopy(model)
    for layer, moment in zip(small.layers, moments, strict=True):
        keys, values = (part.weight.detach().double() for part in (layer.key, layer.value))
        found = low_rank(keys, values, moment, rank, balance=balance)
        latent = _linear(found.down)  # one module in both places: one latent
        layer.key = nn.Sequential(latent, _linear(found.up_keys))
        layer.value = nn.Sequential(latent, _linear(found.up_values))
    return small


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.float())
    return made


def nano_table(context: Context) -> Table:
    """The bundled model converted at several sizes: loss on held-out text, before any healing."""
    from danlu.context.text import held_out_text, training_files
    from danlu.hosts.loading import load_causal_lm
    from danlu.tuning.latent.conversion import to_mla
    from danlu.tuning.latent.moments import token_loss

    model, tokenizer = load_causal_lm(str(context.model) if context.model else "danlu-nano")

    def ids(text: str, rows: int) -> Tensor:
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"][: rows * 256]).view(rows, 256)

    seen = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in training_files()[200:215])
    calibration, test = ids(seen[:60_000], 24), ids(held_out_text()[300_000:330_000], 12)
    before = token_loss(model, test)
    rows: list[tuple[Any, ...]] = []
    for rank, rope in context.track(NANO, description="converting danlu-nano", total=len(NANO)):
        pca = to_mla(model, rank, rope, calibration=calibration)
        working = to_mla(model, rank, rope, calibration=calibration, norm="calibrated")
        svd = to_mla(model, rank, rope, method="weight-svd")
        share = pca.report.elements_after / pca.report.elements_before
        losses = [token_loss(one.model, test) for one in (pca, working, svd)]
        rows.append((f"{rank} + {rope}", share, *losses))
    columns = ("latent + rotary", "share of the cache", "activations", "activations, norm at work", "weights")
    return Table(f"danlu-nano converted, held-out loss (before: {before:.3f}), not healed", columns, tuple(rows))
