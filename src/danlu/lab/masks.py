"""Claims about who sees whom: decoder-only against prefix-LM, and heads of mixed direction in a masked LM."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.lab import corpora
from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.lab.training import Schedule, seeded, tens, train

_LENGTH, _WIDTH, _HEADS, _LAYERS = 128, 64, 4, 2
_MASK_ID = 256
_MASKED = 0.15
_SCHEDULE = Schedule(steps=300, batch=16, learning_rate=3e-3)


@claim(
    name="prefix-lm",
    title="A decoder that sees its input in both directions is no better than one that does not",
    source="archive 9529, 9547",
    statement="With the same parameters, data and loss on the output tokens, letting input tokens see each other in "
    "both directions (UniLM) brings nothing over the causal mask (GPT).",
    measurement="Two models of 2 layers and width 64 over bytes of the standard library, equal but for the mask among "
    "the first 64 of 128 bytes, trained on the loss of the second half; held-out loss of that half, three seeds.",
    seeds=(0, 1, 2),
    budget=110,
)
def prefix_lm(context: Context) -> Evidence:
    """Both masks over all seeds."""
    text, held_out = code_bytes()
    losses: dict[str, list[float]] = {}
    curves: dict[str, tuple[float, ...]] = {}
    for mask in ("causal", "prefix"):
        for seed in context.seeds:
            value, steps = fitted_decoder(mask, text, held_out, seed, _SCHEDULE, context)
            losses.setdefault(mask, []).append(value)
            curves.setdefault(mask, tens(steps))
    mean = {mask: sum(values) / len(values) for mask, values in losses.items()}
    gain = mean["causal"] - mean["prefix"]
    differences = [a - b for a, b in zip(losses["causal"], losses["prefix"], strict=True)]
    noise = _standard_error(differences)
    return Evidence(
        summary=f"Held-out loss of the output half: {mean['causal']:.3f} causal, {mean['prefix']:.3f} prefix-LM; "
        f"difference {gain:+.3f}, standard error {noise:.3f} over {len(differences)} seeds.",
        checks=(
            Check(
                "prefix-LM is better by less than 0.02 nats, or by less than twice the standard error",
                gain < max(0.02, 2 * noise),
                f"{gain:+.3f}",
            ),
        ),
        tables=(
            Table(
                "Held-out loss of the output half, nats per byte",
                ("seed", "causal", "prefix-LM"),
                tuple(zip(map(str, context.seeds), losses["causal"], losses["prefix"], strict=True)),
            ),
        ),
        plots=(_curve_plot("Training loss of the output half", curves),),
        notes=(
            "The source used a billion parameters and tasks with an input and an output; here both are halves of code.",
            "The loss is on the output alone, as in the source; a causal model could learn from its input as well.",
        ),
    )


@claim(
    name="mixed-directions",
    title="Half of the heads looking back and half ahead",
    source="archive 9529",
    statement="In a masked language model, heads of which one half is causal and the other anti-causal (or layers that "
    "alternate) reach a slightly lower loss than heads that see everything.",
    measurement="Masked language models of 2 layers and 4 heads, width 64, over bytes of the standard library, 15 % "
    "masked, three masks; loss of masked bytes on held-out modules, three seeds.",
    seeds=(0, 1, 2),
    budget=150,
)
def mixed_directions(context: Context) -> Evidence:
    """Three masks over all seeds."""
    text, held_out = code_bytes()
    names = {"bidirectional": "all see all", "mixed_heads": "mixed heads", "mixed_layers": "mixed layers"}
    losses: dict[str, list[float]] = {}
    curves: dict[str, tuple[float, ...]] = {}
    for mask, name in names.items():
        for seed in context.seeds:
            value, steps = fitted_encoder(mask, text, held_out, seed, _SCHEDULE, context)
            losses.setdefault(name, []).append(value)
            curves.setdefault(name, tens(steps))
    mean = {name: sum(values) / len(values) for name, values in losses.items()}
    full = names["bidirectional"]
    errors = {
        name: _standard_error([a - b for a, b in zip(values, losses[full], strict=True)])
        for name, values in losses.items()
    }
    checks = [
        Check(f"{name}: held-out loss at most 0.02 above {full}", mean[name] <= mean[full] + 0.02, f"{mean[name]:.3f}")
        for name in list(names.values())[1:]
    ]
    best = min(mean, key=lambda name: mean[name])
    checks.append(
        Check(
            "one of them is below by twice the standard error of the difference",
            best != full and mean[full] - mean[best] > 2 * errors[best],
            f"{best} {mean[best]:.3f}, {full} {mean[full]:.3f} (standard error {errors[best]:.3f})",
        )
    )
    listed = ", ".join(f"{value:.3f} {name}" for name, value in mean.items())
    return Evidence(
        summary=f"Held-out loss of masked bytes: {listed} (mean of {len(context.seeds)} seeds).",
        checks=tuple(checks),
        tables=(
            Table(
                "Held-out loss of masked bytes, nats",
                ("mask", *(f"seed {seed}" for seed in context.seeds), "mean", f"error of the difference to {full}"),
                tuple((name, *values, mean[name], errors[name]) for name, values in losses.items()),
            ),
        ),
        plots=(_curve_plot("Training loss of masked bytes", curves),),
        notes=(
            "The source shows one curve of a base-size model; here models are three orders of magnitude smaller.",
            "Masked bytes are all replaced by a mask token; the source's recipe keeps or exchanges a fifth of them.",
        ),
    )


def fitted_decoder(
    mask: str, text: Tensor, held_out: Tensor, seed: int, schedule: Schedule, context: Context
) -> tuple[float, list[float]]:
    """Train a decoder on the second halves of windows; held-out loss of second halves, and the loss of every step.

    Args:
        mask: ``causal`` or ``prefix``.
        text: uint8 (bytes,) to train on.
        held_out: uint8 (bytes,) to test on.
        seed: of weights and batches.
        schedule: of the training.
        context: for its progress bar.
    """
    from danlu.models.decoder.heads import DanluForCausalLM

    half = _LENGTH // 2

    def inputs(windows: Tensor) -> dict[str, Any]:
        given = {"input_ids": windows[:, :-1], "use_cache": False}
        return given | ({"prefix_lengths": torch.full((len(windows),), half)} if mask == "prefix" else {})

    def batches(generator: torch.Generator) -> dict[str, Any]:
        windows = corpora.windows(text, schedule.batch, _LENGTH + 1, generator)
        targets = windows[:, 1:].clone()
        targets[:, : half - 1] = -100
        return {**inputs(windows), "targets": targets}

    with seeded(seed):
        model = DanluForCausalLM(_config(mask))
    losses = train(model, batches, schedule, seed, context, f"{mask} mask, seed {seed}")
    windows = corpora.windows(held_out, 256, _LENGTH + 1, torch.Generator().manual_seed(7919))
    with torch.no_grad():
        logits = model(**inputs(windows)).logits[:, half - 1 :]
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, half:].flatten())), losses


def fitted_encoder(
    mask: str, text: Tensor, held_out: Tensor, seed: int, schedule: Schedule, context: Context
) -> tuple[float, list[float]]:
    """Train a masked language model; held-out loss of masked bytes, and the loss of every step.

    Args:
        mask: ``bidirectional``, ``mixed_heads`` or ``mixed_layers``.
        text: uint8 (bytes,) to train on.
        held_out: uint8 (bytes,) to test on.
        seed: of weights, batches and masks.
        schedule: of the training.
        context: for its progress bar.
    """
    from danlu.models.decoder.heads import DanluForMaskedLM

    def masked(windows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        hidden = torch.rand(windows.shape, generator=generator) < _MASKED
        ids = windows.masked_fill(hidden, _MASK_ID)
        return {"input_ids": ids, "targets": windows.masked_fill(~hidden, -100)}

    def batches(generator: torch.Generator) -> dict[str, Any]:
        return masked(corpora.windows(text, schedule.batch, _LENGTH, generator), generator)

    with seeded(seed):
        model = DanluForMaskedLM(_config(mask))
    losses = train(model, batches, schedule, seed, context, f"{mask} mask, seed {seed}")
    generator = torch.Generator().manual_seed(7919)
    test = masked(corpora.windows(held_out, 256, _LENGTH, generator), generator)
    with torch.no_grad():
        logits = model(test["input_ids"]).logits
    return float(F.cross_entropy(logits.flatten(0, 1), test["targets"].flatten())), losses


def code_bytes() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library to train on, and of held-out modules."""
    corpus = corpora.code(2_000_000, 200_000)
    return corpora.as_bytes(corpus.train), corpora.as_bytes(corpus.test)


def _config(mask: str) -> Any:
    from danlu.models.decoder.config import DanluConfig

    return DanluConfig(
        vocab_size=_MASK_ID + 1, hidden_size=_WIDTH, num_hidden_layers=_LAYERS, num_attention_heads=_HEADS, mask=mask,
        max_position_embeddings=_LENGTH, initializer_range=0.05,
    )  # fmt: skip


def _standard_error(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5


def _curve_plot(title: str, curves: dict[str, tuple[float, ...]]) -> Plot:
    points = len(next(iter(curves.values())))
    return Plot(title, "step", "nats per byte (mean of 10 steps)", tuple(10.0 * (i + 1) for i in range(points)), curves)
