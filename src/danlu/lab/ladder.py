"""Ladder side-tuning: accuracy on few labels, memory and time, against LoRA, full tuning and no ladder at all."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from danlu.lab import digits
from danlu.lab.backward_memory import SavedForBackward
from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.lab.training import Schedule, seeded, train, trained

_LABELS, _STEPS, _CLASSES = 80, 200, 3
_RATES = {"ladder": 5e-3, "probe": 1e-2, "full": 3e-4, "LoRA": 3e-3, "scratch": 1e-3}
_PRETRAINING = Schedule(steps=600, batch=64, learning_rate=2e-3)


@claim(
    name="ladder",
    title="A ladder trains in a fraction of LoRA's memory and time",
    source="archive 9138; arXiv:2206.06522",
    statement="A narrow network fed by a frozen backbone needs far less memory and time to train than LoRA or full "
    "tuning, because nothing is propagated back through the backbone, and its links are what make it good.",
    measurement="Accuracy on a new task with 80 labels (drawn digits modulo 3) of ladders, the same side without "
    "links, LoRA, full tuning and a linear probe; bytes that autograd keeps and seconds of a step for a Llama of 12 "
    "layers of width 512.",
    seeds=(0, 1),
    budget=180,
)
def ladder(context: Context) -> Evidence:
    """Accuracy on digits, then memory and time on a larger backbone."""
    scores = few_labels(context)
    costs = step_costs()
    mean = {name: statistics.mean(values) for name, values in scores.items()}
    kept = {name: cost["bytes"] / 2**20 for name, cost in costs.items()}
    ratio = {name: cost["ratio"] for name, cost in costs.items()}
    best = "ladder r=8, every 3rd"
    checks = [
        Check(
            f"links raise accuracy by 0.12 at r={r}",
            mean[f"ladder r={r}"] - mean[f"no links r={r}"] >= 0.12,
            f"{mean[f'ladder r={r}']:.3f}, {mean[f'no links r={r}']:.3f}",
        )
        for r in (4, 8)
    ]
    low = min(mean["ladder r=4"], mean["ladder r=8"])
    checks += [
        Check("no worse than full tuning with 80 labels", low >= mean["full tuning"], f"{mean['full tuning']:.3f}"),
        Check("within 0.04 of a linear probe", low >= mean["linear probe"] - 0.04, f"{mean['linear probe']:.3f}"),
        _at_most("memory at r=8", kept["ladder r=8"], kept["full tuning"], 0.30, "full tuning"),
        _at_most("memory at r=8", kept["ladder r=8"], kept["LoRA"], 0.40, "LoRA"),
        _at_most("step time at r=8, a link every 3rd layer", ratio[best], 1, 0.50, "LoRA"),
        _at_most("step time at r=8, all links", ratio["ladder r=8"], 1, 0.60, "LoRA"),
        _at_most("step time from cached states", ratio["ladder r=8, cached"], 1, 0.20, "LoRA"),
    ]
    return Evidence(
        summary=f"With 80 labels: ladder r=8 {mean['ladder r=8']:.3f}, without links {mean['no links r=8']:.3f}, full "
        f"tuning {mean['full tuning']:.3f}, LoRA {mean['LoRA']:.3f}. Against LoRA a step keeps "
        f"{kept['ladder r=8'] / kept['LoRA']:.2f} of the memory and takes {ratio['ladder r=8']:.2f} of the time "
        f"({ratio[best]:.2f} with every third link, {ratio['ladder r=8, cached']:.2f} from cached states).",
        checks=tuple(checks),
        tables=(
            Table(
                "Accuracy with 80 labels, digit modulo 3",
                ("method", "mean", *(f"seed {seed}" for seed in context.seeds)),
                tuple((name, mean[name], *values) for name, values in scores.items()),
            ),
            Table(
                "One training step, Llama of 12 layers of width 512, 4 x 256 tokens",
                ("method", "kept for backward, MiB", "of LoRA's memory", "of LoRA's time", "trained numbers"),
                tuple(
                    (name, kept[name], kept[name] / kept["LoRA"], ratio[name], cost["parameters"])
                    for name, cost in costs.items()
                ),
            ),
        ),
        plots=(
            Plot(
                "Accuracy with 80 labels",
                "method",
                "accuracy",
                tuple(float(i) for i in range(len(mean))),
                {"mean over seeds": tuple(mean.values())},
                x_names=tuple(mean),
            ),
            Plot(
                "Cost of a step, LoRA = 1",
                "method",
                "share of LoRA's",
                tuple(float(i) for i in range(len(costs))),
                {"memory": tuple(kept[name] / kept["LoRA"] for name in costs), "time": tuple(ratio.values())},
                x_names=tuple(costs),
            ),
        ),
        notes=(
            "Digits are drawn, not scanned: ten 5 x 7 glyphs, turned, sheared and shifted at random, with noise.",
            "Backbone for accuracy: 4 layers of width 64, 1300 labels of ten classes, "
            f"{scores_note(context)} on 2000 new digits.",
            "Time is the median over five interleaved steps of the ratio to LoRA's step in the same round.",
            "Heads of the side are merged to 32 channels in the row with every third link.",
        ),
    )


def _at_most(what: str, ours: float, other: float, share: float, name: str) -> Check:
    return Check(f"{what} at most {share:.2f} of {name}'s", ours <= share * other, f"{ours / other:.2f}")


# --- accuracy ---------------------------------------------------------------------------------------------------------


def reader(context: Context) -> Any:
    """The backbone, trained on all ten classes."""
    images, labels = digits.draw(1300, 0)

    def batches(generator: torch.Generator) -> dict[str, Any]:
        rows = torch.randint(len(images), (_PRETRAINING.batch,), generator=generator)
        return {"images": images[rows], "targets": labels[rows]}

    return trained(
        f"digits-{_PRETRAINING.steps}",
        digits.Reader,
        lambda model: train(model, batches, _PRETRAINING, 0, context, "backbone"),
        0,
        context,
    )


def scores_note(context: Context) -> str:
    """Accuracy of the backbone on its own task, in words."""
    images, labels = digits.draw(2000, 1)
    with torch.no_grad():
        return f"right on {digits.accuracy(reader(context)(images).logits, labels):.3f}"


def few_labels(context: Context) -> dict[str, list[float]]:
    """Accuracy on the new task for each method, one number for each seed."""
    from danlu.tuning.ladder.model import LadderConfig, LadderModel

    model = reader(context)
    images, labels = digits.draw(_LABELS, 2)
    test, answers = digits.draw(2000, 1)
    labels, answers = labels % _CLASSES, answers % _CLASSES
    scores: dict[str, list[float]] = {}

    def run(name: str, subject: nn.Module, give: Callable[[Tensor], dict[str, Any]], rate: float, seed: int) -> None:
        inputs = give(images)
        schedule = Schedule(steps=_STEPS, batch=_LABELS, learning_rate=rate)
        train(subject, lambda _: {**inputs, "targets": labels}, schedule, seed, context, name)
        with torch.no_grad():
            logits = subject(**give(test)).logits
        scores.setdefault(name, []).append(digits.accuracy(logits, answers))

    def embedded(rows: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            return {"inputs_embeds": model.embed(rows)}

    def last(rows: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            return {"states": model.states(rows)}

    def links(subject: LadderModel) -> Callable[[Tensor], dict[str, Any]]:
        return lambda rows: {"features": subject.states(**embedded(rows))}

    for seed in context.seeds:
        for reduction in (4, 8):
            shape: dict[str, Any] = {"reduction": reduction, "init": "random", "seed": seed}
            shape |= {"head": "classification", "num_labels": _CLASSES}
            variants: dict[str, dict[str, Any]] = {
                f"ladder r={reduction}": {},
                f"no links r={reduction}": {"gate": "constant", "gate_value": 1.0},
                f"pruned start r={reduction}": {"init": "magnitude"},
            }
            for name, options in variants.items():
                side = LadderModel(copy.deepcopy(model.base), LadderConfig(**{**shape, **options}))
                run(name, side, links(side), _RATES["ladder"], seed)
        with seeded(seed):
            probe, full, low_rank = _Linear(), copy.deepcopy(model), copy.deepcopy(model)
            full.head = nn.Linear(64, _CLASSES)
            low_rank.requires_grad_(False).head = nn.Linear(64, _CLASSES)
            low_rank.base = with_lora(low_rank.base)
            scratch = digits.Reader(_CLASSES)
        run("linear probe", probe, last, _RATES["probe"], seed)
        run("LoRA", low_rank, lambda rows: {"images": rows}, _RATES["LoRA"], seed)
        run("full tuning", full, lambda rows: {"images": rows}, _RATES["full"], seed)
        run("from scratch", scratch, lambda rows: {"images": rows}, _RATES["scratch"], seed)
    return scores


class _Linear(nn.Module):
    """A linear probe."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, _CLASSES)

    def forward(self, states: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(states))


def with_lora(model: nn.Module) -> nn.Module:
    """LoRA of rank 8 on queries and values, by PEFT."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("the claim on ladders compares with PEFT: pip install 'danlu[lab]'") from error
    wrapped: nn.Module = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    return wrapped


# --- memory and time --------------------------------------------------------------------------------------------------


def step_costs(
    width: int = 512, depth: int = 12, batch: int = 4, length: int = 256, repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Bytes kept for backward and seconds of a training step, by method.

    Args:
        width: hidden size, a multiple of 64.
        depth: blocks.
        batch: rows of a step.
        length: tokens of a row.
        repeats: interleaved timed steps.

    Returns:
        ``bytes``, ``seconds`` (median), ``ratio`` (median over LoRA's of the same round) and ``parameters`` for each.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from danlu.tuning.ladder.model import LadderConfig, LadderModel

    config = LlamaConfig(
        vocab_size=2048, hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64, num_hidden_layers=depth,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=length,
    )  # fmt: skip

    def backbone() -> Any:
        with seeded(0):
            return LlamaForCausalLM(config)

    ids = torch.randint(2048, (batch, length), generator=torch.Generator().manual_seed(0))
    narrow = LadderConfig(init="random")
    models: dict[str, Any] = {
        "full tuning": backbone(),
        "LoRA": with_lora(backbone()),
        "ladder r=8": LadderModel(backbone(), narrow),
        "ladder r=8, every 3rd": LadderModel(
            backbone(), LadderConfig(init="random", layers="every:3", min_head_dim=32)
        ),
    }
    models["ladder r=8, cached"] = models["ladder r=8"]
    inputs: dict[str, dict[str, Any]] = {name: {"input_ids": ids, "use_cache": False} for name in models}
    inputs["ladder r=8, cached"] = {"features": models["ladder r=8"].states(input_ids=ids)}

    def step(name: str) -> float:
        start = time.perf_counter()
        models[name](**inputs[name], labels=ids).loss.backward()
        seconds = time.perf_counter() - start
        models[name].zero_grad(set_to_none=True)
        return seconds

    costs: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        model.train()
        with SavedForBackward(model) as counter:
            step(name)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        costs[name] = {"bytes": counter.peak, "parameters": trainable}
    rounds = [{name: step(name) for name in models} for _ in range(repeats)]
    for name, cost in costs.items():
        cost["seconds"] = statistics.median(times[name] for times in rounds)
        cost["ratio"] = statistics.median(times[name] / times["LoRA"] for times in rounds)
    return costs
