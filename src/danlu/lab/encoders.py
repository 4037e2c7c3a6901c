"""Claims about encoders: classification by the next-sentence head, and residual warm-up of post-norm models."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu.lab import corpora
from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.lab.topics import TOPICS, labels, pair_texts, pairs, sentences_to_classify, small_bert, word_tokenizer
from danlu.lab.training import Schedule, seeded, train

_HEADS = 6  # random ones; a single one may point anywhere, also the right way

_MASK, _BYTES = 256, 257
_LENGTH, _ROWS = 64, 16
_STEPS, _RATE = 260, 2e-3


class Constant(Schedule):
    """The full learning rate from the first step on, or after a linear warm-up, and no decay."""

    def factor(self, step: int) -> float:
        """Share of the rate at a step."""
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0


@claim(
    name="nsp-zero-shot",
    title="A next-sentence head classifies topics it was never trained to name",
    source="archive 8671; arXiv:2109.03564",
    statement="The head that BERT was pre-trained with tells which label sentence belongs to a text, without training "
    "on any labelled text.",
    measurement="A BERT of 2 layers and width 64, trained on the spot to tell whether two sentences have the same of 6 "
    "topics (words of 6 lists and of a common one); then 300 new sentences classified with label sentences of another "
    "form than its training sentences. Chance is 0.17.",
    seeds=(0,),
    budget=30,
)
def nsp_zero_shot(context: Context) -> Evidence:
    """Train on pairs, classify by labels; controls: the other index, a random head."""
    from danlu.zero_shot import NSPClassifier, SamplesContrast

    seed = context.seeds[0]
    model, tokenizer = small_bert(seed), word_tokenizer()
    schedule = Schedule(steps=1500, batch=48, learning_rate=2e-3)
    losses = train(model, lambda generator: pairs(generator, schedule.batch), schedule, seed, context, "next sentences")
    sentences, topics = sentences_to_classify(seed + 1)
    accuracy: dict[tuple[str, str, int], float] = {}
    counts = (1, 2, 4)
    classifier = NSPClassifier(model, tokenizer, template="c0 c1 c2 {}", progress=False)
    for position in ("prefix", "suffix"):
        for words in counts:
            scores = classifier.scores(sentences, labels(words), position=position)
            accuracy["trained", position, words] = share_right(scores, topics)
            accuracy["index swapped", position, words] = share_right(-scores, topics)
    blind = copy.deepcopy(model)
    controls: dict[int, list[float]] = {words: [] for words in counts}
    for head in range(_HEADS):
        with seeded(seed + 100 + head):
            for module in (blind.bert.pooler.dense, blind.cls.seq_relationship):
                nn.init.normal_(module.weight, std=0.1)
        classifier = NSPClassifier(blind, tokenizer, template="c0 c1 c2 {}", progress=False)
        for words in counts:
            controls[words].append(share_right(classifier.scores(sentences[::5], labels(words)), topics[::5]))
    accuracy |= {("random heads, mean", "prefix", words): sum(found) / _HEADS for words, found in controls.items()}
    generator = torch.Generator().manual_seed(seed + 3)
    drawn = pairs(generator, 400)
    first, second = pair_texts(drawn)
    scores = NSPClassifier(model, tokenizer, progress=False).score_pairs(first, second)
    same = 1 - drawn["targets"]
    halves = SamplesContrast(2).fit(scores[:200])
    contrast = float((halves.predict(scores[200:]) == same[200:]).float().mean())
    return topics_evidence(accuracy, contrast, losses)


def topics_evidence(
    accuracy: Mapping[tuple[str, str, int], float], contrast: float, losses: Sequence[float]
) -> Evidence:
    """Checks, tables and plots from the measured numbers.

    Args:
        accuracy: by (model, side of the label sentence, topic words in it).
        contrast: accuracy of samples-contrast on pairs.
        losses: of each training step.
    """
    prefix, suffix = (accuracy["trained", position, 2] for position in ("prefix", "suffix"))
    blind = accuracy["random heads, mean", "prefix", 2]
    swapped = max(accuracy["index swapped", position, 2] for position in ("prefix", "suffix"))
    checks = (
        Check("label sentence before the text: accuracy above 0.9", prefix > 0.9, f"{prefix:.2f}"),
        Check("label sentence behind the text: accuracy above 0.9", suffix > 0.9, f"{suffix:.2f}"),
        Check(f"control, mean of {_HEADS} random heads on the trained encoder: below 0.5", blind < 0.5, f"{blind:.2f}"),
        Check("control, the other index of the head: below chance", swapped < 1 / TOPICS, f"{swapped:.2f}"),
        Check("samples-contrast, thresholds from other pairs: above 0.75", contrast > 0.75, f"{contrast:.2f}"),
    )
    counts = sorted({words for _, _, words in accuracy})
    lines = {
        f"{name}, {position}": tuple(accuracy[name, position, words] for words in counts)
        for name, position in dict.fromkeys((name, position) for name, position, _ in accuracy)
    }
    tens = range(0, len(losses) - 49, 50)
    return Evidence(
        summary=f"Six topics by label sentences: accuracy {prefix:.2f} (prefix) and {suffix:.2f} (suffix), "
        f"{blind:.2f} with random heads, {swapped:.2f} with the other index; pairs by samples-contrast "
        f"{contrast:.2f}.",
        checks=checks,
        tables=(
            Table(
                "Accuracy by number of topic words in the label sentence",
                ("model and side", *map(str, counts)),
                tuple((name, *values) for name, values in lines.items()),
            ),
        ),
        plots=(
            Plot("Six topics", "topic words in the label sentence", "accuracy", tuple(map(float, counts)), lines),
            Plot(
                "Training on sentence pairs",
                "step",
                "loss (mean of 50 steps)",
                tuple(float(start + 50) for start in tens),
                {"next sentence": tuple(sum(losses[start : start + 50]) / 50 for start in tens)},
            ),
        ),
        notes=(
            "Made-up topics and a model trained on the spot stand for a language and a pre-trained BERT; the accuracy "
            "says that the method's arithmetic works, not what it reaches on real text.",
            "One in six of the pairs called random has the same topic by chance, which bounds samples-contrast.",
            "Whether so small a model learns at all depends on its training: at a constant rate without warm-up it "
            "stayed at chance, and so does one with the usual initial deviation of 0.02.",
        ),
    )


def share_right(scores: Tensor, topics: Tensor) -> float:
    """Accuracy of the best label."""
    return float((scores.argmax(1) == topics).float().mean())


@claim(
    name="residual-warmup",
    title="A post-norm encoder learns when its branches are let in slowly",
    source="archive 8998",
    statement="A post-norm Transformer trained from scratch does better when the factor of its branches rises from 0 "
    "to 1 over the first steps.",
    measurement="Masked bytes of the standard library's source with RoFormerV2 of 12 layers and width 64, Adam at 2e-3 "
    "constant, 260 steps: factor 1 from the start, the factor warmed up over 130 steps, and, as a control, the "
    "learning rate warmed up over 130 steps. Mean loss of the last 50 steps.",
    seeds=(0,),
    budget=70,
)
def residual_warmup(context: Context) -> Evidence:
    """Three trainings per seed."""
    text = torch.frombuffer(bytearray("\n".join(corpora.code(400_000, 1).train).encode()), dtype=torch.uint8)
    runs = [(name, seed) for seed in context.seeds for name in ("factor 1", "factor warm-up", "rate warm-up")]
    losses = {
        (name, seed): masked_training(text, seed, context, _STEPS, alpha=name == "factor warm-up",
                                      rate=name == "rate warm-up")
        for name, seed in runs
    }  # fmt: skip
    return warmup_evidence(losses, float(unigram(text)))


def warmup_evidence(losses: Mapping[tuple[str, int], Sequence[float]], chance: float) -> Evidence:
    """Checks, tables and plots from the losses.

    Args:
        losses: loss of every step by (variant, seed).
        chance: entropy of byte frequencies.
    """
    ends = {run: sum(values[-50:]) / len(values[-50:]) for run, values in losses.items()}
    seeds = sorted({seed for _, seed in losses})
    names = list(dict.fromkeys(name for name, _ in losses))
    checks = tuple(
        Check(
            f"seed {seed}: the factor's warm-up ends 0.3 nats below factor 1",
            ends["factor warm-up", seed] < ends["factor 1", seed] - 0.3,
            f"{ends['factor warm-up', seed]:.2f} against {ends['factor 1', seed]:.2f}",
        )
        for seed in seeds
    )
    means = {name: sum(ends[name, seed] for seed in seeds) / len(seeds) for name in names}
    shown = range(0, len(next(iter(losses.values()))) - 19, 20)
    return Evidence(
        summary="Loss per masked byte at the end: "
        + ", ".join(f"{value:.2f} ({name})" for name, value in means.items())
        + f"; byte frequencies alone {chance:.2f}.",
        checks=checks,
        tables=(
            Table(
                "Mean loss of the last 50 steps",
                ("seed", *names),
                tuple((seed, *(ends[name, seed] for name in names)) for seed in seeds),
            ),
        ),
        plots=(
            Plot(
                f"Masked bytes, seed {seeds[0]}",
                "step",
                "loss (mean of 20 steps)",
                tuple(float(start + 20) for start in shown),
                {
                    name: tuple(sum(losses[name, seeds[0]][start : start + 20]) / 20 for start in shown)
                    for name in names
                },
            ),
        ),
        notes=(
            "A small network at one rate, found after several tries; at 24 layers, or at other rates, the factor's "
            "warm-up made no difference on some seeds.",
            "Warming up the learning rate over the same steps is a control and not part of the criterion.",
        ),
    )


def masked_training(
    text: Tensor, seed: int, context: Context, steps: int, *, alpha: bool = False, rate: bool = False, layers: int = 12
) -> list[float]:
    """Train RoFormerV2 on masked bytes and return the loss of every step.

    Args:
        text: uint8 (bytes,).
        seed: of weights and data.
        context: for its progress bar.
        steps: of training.
        alpha: raise the factor of the branches from 0 to 1 over the first half.
        rate: raise the learning rate from 0 over the first half.
        layers: of the encoder.
    """
    from danlu.models.roformer_v2.heads import RoFormerV2Config, RoFormerV2ForMaskedLM

    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    with seeded(seed):
        model = RoFormerV2ForMaskedLM(
            RoFormerV2Config(
                vocab_size=_BYTES, num_hidden_layers=layers, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, max_position_embeddings=_LENGTH, **sizes,
            )
        )  # fmt: skip
    half = max(1, steps // 2)
    step = 0

    def batches(generator: torch.Generator) -> dict[str, Any]:
        nonlocal step
        if alpha:
            model.residual_alpha = min(1.0, step / half)
        step += 1
        return masked(text, generator)

    warmup = half if rate else 0
    schedule = Constant(steps=steps, batch=_ROWS, learning_rate=_RATE, weight_decay=0.0, warmup=warmup)
    kind = "factor" if alpha else "rate" if rate else "no"
    return train(model, batches, schedule, seed, context, f"{kind} warm-up, seed {seed}")


def masked(text: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Windows with 15 % of their bytes masked, and the masked bytes as targets."""
    starts = torch.randint(len(text) - _LENGTH, (_ROWS, 1), generator=generator)
    ids = text[starts + torch.arange(_LENGTH)].long()
    hidden = torch.rand(ids.shape, generator=generator) < 0.15
    return {"input_ids": ids.masked_fill(hidden, _MASK), "targets": ids.masked_fill(~hidden, -100)}


def unigram(text: Tensor) -> Tensor:
    """Entropy of the byte frequencies, in nats."""
    shares = torch.bincount(text.long(), minlength=256).double() / len(text)
    return -(shares * shares.clamp_min(1e-12).log()).sum()
