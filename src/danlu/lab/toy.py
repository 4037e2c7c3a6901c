"""The toy of the lab: a tiny Llama that learns to repeat permutations.

A sample is p distinct random tokens, repeated to fill the length. Only targets after the first period count, so that
all of the loss asks for retrieval at distance p and nothing can be guessed. Models are the host library's Llama,
so that ``danlu.extend`` applies to them as to any model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from danlu.lab.claim import Context, Plot, Table
from danlu.lab.training import Batch, Schedule, train, trained

VOCABULARY = 64
TRAINED_LENGTH = 32
TEST_LENGTH = 256
#: Period ranges at test: those of training, and one that only distances beyond the trained length can reach.
NEAR, FAR = (6, 24), (60, 60)

#: A note on the toy, for evidence.
SETTING = (
    "Toy: a pre-norm Llama of 2 layers, width 64, 2 heads, 1000 steps at 32 tokens; the source used a 100 M parameter "
    "gated-attention model on text."
)


@dataclass(frozen=True)
class Toy:
    """A repeated-permutation model: what it is and how it is trained.

    Args:
        seed: of weights and data.
        base: rotary base.
        schedule: of training.
        length: trained length.
        methods: danlu methods that are in force during training.
        build: name and function of the model, ``(base) -> model``; the name is part of the cache key.
    """

    seed: int = 0
    base: float = 10000.0
    schedule: Schedule = field(default_factory=Schedule)
    length: int = TRAINED_LENGTH
    methods: tuple[Any, ...] = ()
    build: tuple[str, Callable[[float], nn.Module]] | None = None

    @property
    def key(self) -> str:
        """Cache key: everything that the trained weights depend on."""
        from danlu import __version__

        document = {
            "version": __version__,
            "seed": self.seed,
            "base": self.base,
            "schedule": asdict(self.schedule),
            "length": self.length,
            "methods": [repr(method) for method in self.methods],
            "build": self.build[0] if self.build else "llama",
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def llama(base: float = 10000.0) -> nn.Module:
    """The toy Llama: 2 pre-norm layers, width 64, 2 heads of 32, 64 tokens, about 0.1 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**toy_shape(base)))


def toy_shape(base: float = 10000.0) -> dict[str, Any]:
    """Keyword arguments of a host configuration with the toy's sizes."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 176,  # gated, so three matrices: the parameters of an ordinary MLP x 4
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": TRAINED_LENGTH,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "tie_word_embeddings": False,
        "use_cache": False,
    }


def repeated_permutation(
    generator: torch.Generator, batch: int, length: int, periods: tuple[int, int] = NEAR
) -> tuple[Tensor, Tensor]:
    """Samples of a random permutation prefix, repeated.

    Args:
        generator: source of randomness.
        batch: number of samples.
        length: number of inputs; one more token is drawn for the last target.
        periods: least and greatest period, inclusive, at most the vocabulary.

    Returns:
        Tokens, int64 (batch, length + 1), and which targets count, bool (batch, length).

    Raises:
        ValueError: periods out of range.
    """
    low, high = periods
    if not 1 <= low <= high <= VOCABULARY:
        raise ValueError(f"periods must satisfy 1 <= low <= high <= {VOCABULARY}, got {periods}")
    order = torch.rand(batch, VOCABULARY, generator=generator).argsort(dim=1)
    period = torch.randint(low, high + 1, (batch, 1), generator=generator)
    places = torch.arange(length + 1)
    tokens = order.gather(1, places.remainder(period))
    return tokens, places[1:] >= period


def permutation_batch(length: int, batch: int) -> Batch:
    """Training batches of the repeated permutation, as inputs with targets -100 where nothing counts."""

    def draw(generator: torch.Generator) -> dict[str, Any]:
        tokens, counted = repeated_permutation(generator, batch, length)
        return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:].masked_fill(~counted, -100)}

    return draw


def train_toy(toy: Toy, context: Context) -> nn.Module:
    """The trained model of a ``Toy``, cached by its key."""

    def build() -> nn.Module:
        return toy.build[1](toy.base) if toy.build else llama(toy.base)

    def fit(model: nn.Module) -> None:
        label = f"training {toy.build[0] if toy.build else 'llama'}, seed {toy.seed}"
        with applied(model, *toy.methods):
            train(model, permutation_batch(toy.length, toy.schedule.batch), toy.schedule, toy.seed, context, label)

    return trained(toy.key, build, fit, toy.seed, context)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    length: int = TEST_LENGTH,
    periods: tuple[int, int] = NEAR,
    *,
    samples: int = 128,
    seed: int = 7919,
) -> float:
    """Share of counted targets that the model ranks first, on fresh samples that are the same in every call.

    Args:
        model: a host causal model.
        length: test length.
        periods: see ``repeated_permutation``.
        samples: number of samples.
        seed: of the samples.

    Returns:
        A number in 0..1.
    """
    tokens, counted = repeated_permutation(torch.Generator().manual_seed(seed), samples, length, periods)
    hits = torch.zeros((), dtype=torch.int64)
    for rows, mask in zip(tokens.split(32), counted.split(32), strict=True):
        best = model(input_ids=rows[:, :-1]).logits.argmax(-1)
        hits += ((best == rows[:, 1:]) & mask).sum()
    return (hits / counted.sum()).item()


def scores(model: nn.Module, *methods: Any) -> dict[str, float]:
    """Accuracy at the trained length, and near and far at the test length, under some methods."""
    with applied(model, *methods):
        return {
            "trained": accuracy(model, TRAINED_LENGTH),
            "near": accuracy(model, TEST_LENGTH, NEAR),
            "far": accuracy(model, TEST_LENGTH, FAR),
        }


def mean_scores(context: Context, runs: dict[str, tuple[Toy, tuple[Any, ...]]]) -> dict[str, dict[str, float]]:
    """Mean over the context's seeds of ``scores``, for several models and stacks.

    Args:
        context: seeds, cache and progress.
        runs: label to a toy (its own seed is replaced) and the methods at test.

    Returns:
        Label to the means of ``trained``, ``near`` and ``far``.
    """
    found: dict[str, list[dict[str, float]]] = {label: [] for label in runs}
    for seed in context.seeds:
        models = {label: train_toy(replace(model, seed=seed), context) for label, (model, _) in runs.items()}
        for label, (_, methods) in context.track(runs.items(), description=f"testing, seed {seed}", total=len(runs)):
            found[label].append(scores(models[label], *methods))
    return {
        label: {key: sum(score[key] for score in by_seed) / len(by_seed) for key in ("trained", "near", "far")}
        for label, by_seed in found.items()
    }


def score_table(mean: dict[str, dict[str, float]]) -> Table:
    """One row per label: accuracy at the trained length, and near and far at the test length."""
    columns = (
        "method",
        f"{TRAINED_LENGTH} tokens",
        f"{TEST_LENGTH} tokens, periods {NEAR[0]} to {NEAR[1]} (near)",
        f"{TEST_LENGTH} tokens, period {FAR[0]} (far)",
    )
    rows = tuple((label, score["trained"], score["near"], score["far"]) for label, score in mean.items())
    return Table("Toy accuracy, mean over seeds", columns, rows)


def score_plot(mean: dict[str, dict[str, float]], title: str) -> Plot:
    """Accuracy of each label: within the trained length, near, far."""
    lines = {label: (score["trained"], score["near"], score["far"]) for label, score in mean.items()}
    return Plot(title, f"1: {TRAINED_LENGTH} tokens, 2: near, 3: far", "accuracy", (1, 2, 3), lines)


@contextlib.contextmanager
def applied(model: nn.Module, *methods: Any) -> Iterator[nn.Module]:
    """The model under danlu methods; with none, the model as it is."""
    if not methods:
        yield model
        return
    from danlu.context.extend import extended

    with extended(model, *methods):
        yield model
