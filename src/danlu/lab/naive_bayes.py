"""Claims on naive-Bayes context extension: which pooling survives many contexts, and recall from many contexts."""

from __future__ import annotations

import torch

from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.recall import LENGTH, PAIRS, read_work, recall_model, recall_rates
from danlu.lab.runner import claim

_VOCABULARY, _TRIALS, _MASS = 1000, 400, 0.85
_COUNTS = (2, 4, 8, 16, 32)
_POOLINGS = {
    "min entropy, beta 0.25": ("min_entropy", 0.25, 0.95),
    "mean, beta n - 1": ("mean", None, 0.95),
    "max, beta 0.25": ("max", 0.25, 0.95),
    "mean, beta n - 1, uncut": ("mean", None, 1.0),
}

_CONTEXTS = (1, 2, 4, 8, 20)
_BETAS = (-0.5, 0.0, 0.25, 1.0, 4.0)
_EXAMPLES = 150


@claim(
    name="nbce-pooling",
    title="The surest context speaks: least entropy stays right where averages fail",
    source="archive 9617, 9632",
    statement="Pooling by least entropy answers right from one relevant context among many, greedily and when drawn; "
    "the mean of naive Bayes turns to on-topic nonsense as contexts are added, and the maximum only works greedily.",
    measurement="Synthetic rows over 1000 tokens: a Zipf prior, irrelevant rows with normal noise on its logits, one "
    "relevant row with 0.85 of its mass on a random answer; share of 400 trials in which the best token is the answer, "
    "and the probability that a draw is.",
    budget=15,
)
def nbce_pooling(context: Context) -> Evidence:
    """Three poolings at 2 to 32 contexts."""
    seed = context.seeds[0]
    found = {
        (name, count): pooled_rates(name, count, _TRIALS, seed)
        for name, count in context.track(
            [(name, count) for name in _POOLINGS for count in _COUNTS],
            description="pooling",
            total=len(_POOLINGS) * len(_COUNTS),
        )
    }
    least, mean, most, uncut = ([found[name, count] for count in _COUNTS] for name in _POOLINGS)
    lost = most[0][1] - most[-1][1]
    checks = (
        Check("least entropy: greedy at least .95 at every n", min(g for g, _ in least) >= 0.95, _list(least, 0)),
        Check("least entropy: a draw is right with .9 at every n", min(s for _, s in least) >= 0.9, _list(least, 1)),
        Check("mean: greedy below .3 from n = 4 on", max(g for g, _ in mean[1:]) < 0.3, _list(mean, 0)),
        Check("max: a draw loses at least .3 from n = 2 to 32", lost >= 0.3, _list(most, 1)),
    )
    rows = tuple((name, count, *found[name, count]) for name in _POOLINGS for count in _COUNTS)
    return Evidence(
        summary=f"At 32 contexts, greedy / drawn: least entropy {least[-1][0]:.2f} / {least[-1][1]:.2f}, mean "
        f"{mean[-1][0]:.2f} / {mean[-1][1]:.2f}, max {most[-1][0]:.2f} / {most[-1][1]:.2f}.",
        checks=checks,
        tables=(Table("Right answers", ("pooling", "contexts", "greedy", "drawn"), rows),),
        plots=(
            Plot(
                "One relevant context among n: a draw is right",
                "contexts",
                "probability",
                _COUNTS,
                {name: tuple(found[name, count][1] for count in _COUNTS) for name in _POOLINGS},
                log_x=True,
            ),
            Plot(
                "One relevant context among n: the best token is right",
                "contexts",
                "share of trials",
                _COUNTS,
                {name: tuple(found[name, count][0] for count in _COUNTS) for name in _POOLINGS},
                log_x=True,
            ),
        ),
        notes=(
            "All rows are cut to top-p 0.95, the uncut ones excepted, which are exact naive Bayes; in the mean a token "
            "outside a row's nucleus counts -100 nats there.",
            f"Uncut, the mean falls more slowly: greedy {_list(uncut, 0)}. Irrelevant contexts break its assumption.",
        ),
    )


def pooled_rates(name: str, count: int, trials: int, seed: int) -> tuple[float, float]:
    """Share of trials with the right best token, and mean probability of drawing it.

    Args:
        name: a key of the poolings above.
        count: contexts, one of them relevant.
        trials: number of random rows and answers.
        seed: of them; the same for all poolings.
    """
    from danlu.context.naive_bayes.combine import Settings, combine

    pooling, beta, top_p = _POOLINGS[name]
    settings = Settings(count - 1 if beta is None else beta, 0.0, top_p, pooling)
    generator = torch.Generator().manual_seed(seed)
    prior = -torch.arange(1, _VOCABULARY + 1, dtype=torch.float64).log()
    right, drawn = 0, 0.0
    for _ in range(trials):
        logits = prior.repeat(count + 1, 1)
        logits[1:] += torch.randn(count, _VOCABULARY, generator=generator, dtype=torch.float64)
        answer = int(torch.randint(_VOCABULARY, (), generator=generator))
        relevant = 1 + int(torch.randint(count, (), generator=generator))
        mixed = (1 - _MASS) * logits[relevant].softmax(-1)
        mixed[answer] += _MASS
        logits[relevant] = mixed.log()
        scores = combine(logits, settings).scores
        right += int(scores.argmax()) == answer
        drawn += float(scores.softmax(-1)[answer])
    return right / trials, drawn / trials


@claim(
    name="nbce-lookup",
    title="Recall from contexts that together are 16 times the trained length",
    source="archive 9617; NAACL 2024 long 431",
    statement="A model that was trained on one short context answers from many that together far exceed its length, "
    "without training and at linear cost, where concatenation and truncation fail.",
    measurement=f"A 2-layer Llama trained on recall from up to {PAIRS} key-value pairs ({LENGTH} tokens, question "
    f"included); accuracy of the value of a key that is in one of k contexts, k up to {_CONTEXTS[-1]} "
    f"({2 * PAIRS * _CONTEXTS[-1]} tokens of pairs), combined, concatenated, and cut to the last {LENGTH} tokens.",
    budget=60,
)
def nbce_lookup(context: Context) -> Evidence:
    """Train, then ask among 1 to 18 contexts in several ways."""
    model = recall_model(context.seeds[0], context)
    settings = {
        "least entropy, beta 0.25": ("min_entropy", 0.25, 0.95),
        "mean, beta 0": ("mean", 0.0, 0.95),
        "mean, beta k - 1": ("mean", None, 1.0),
        "max, beta 0.25": ("max", 0.25, 0.95),
    }
    rates: dict[str, list[float]] = {}
    for count in context.track(_CONTEXTS, description="asking", total=len(_CONTEXTS)):
        for name, rate in recall_rates(model, count, settings, _EXAMPLES, context.seeds[0]).items():
            rates.setdefault(name, []).append(rate)
    betas = {f"beta {beta:g}": ("min_entropy", beta, 0.95) for beta in _BETAS}
    by_beta = recall_rates(model, 8, betas, _EXAMPLES, context.seeds[0])
    work = {count: (read_work(model, count, False), read_work(model, count, True)) for count in (4, 8, 16)}
    growth = [(work[16][i] - work[8][i]) / (work[8][i] - work[4][i]) for i in (0, 1)]
    best = rates["least entropy, beta 0.25"]
    joined, cut = rates["concatenated"], rates[f"last {LENGTH} tokens"]
    total = 2 * PAIRS * _CONTEXTS[-1] / LENGTH
    checks = (
        Check("one context: at least .95", best[0] >= 0.95, f"{best[0]:.2f}"),
        Check("combined: within .1 of one context at every k", best[0] - min(best) <= 0.1, _values(best)),
        Check(f"concatenated: at most half as good at {total:.0f} times the length", joined[-1] <= best[0] / 2,
              f"{joined[-1]:.2f}"),
        Check(f"cut to the last {LENGTH} tokens: at most .3 there", cut[-1] <= 0.3, f"{cut[-1]:.2f}"),
        Check("work per context is the same: doubling k from 8 adds 2.0 times what doubling it from 4 did",
              abs(growth[0] - 2) <= 0.02, f"{growth[0]:.3f}, concatenated {growth[1]:.3f}"),
    )  # fmt: skip
    return Evidence(
        summary=f"{_CONTEXTS[-1]} contexts, {total:.0f} times the trained length: {best[-1]:.2f} combined by least "
        f"entropy, {joined[-1]:.2f} concatenated, {cut[-1]:.2f} truncated; {best[0]:.2f} with one.",
        checks=checks,
        tables=(
            Table(
                "Accuracy by number of contexts",
                ("method", *(str(count) for count in _CONTEXTS)),
                tuple((name, *values) for name, values in rates.items()),
            ),
            Table(
                "Least entropy at 8 contexts, by beta",
                ("beta", "accuracy"),
                tuple((beta, by_beta[f"beta {beta:g}"]) for beta in _BETAS),
            ),
            Table(
                "Work of reading and one token, millions of multiply-adds",
                ("contexts", "combined", "concatenated"),
                tuple((count, *(value / 2e6 for value in values)) for count, values in work.items()),
            ),
        ),
        plots=(
            Plot(
                "Recall from many contexts",
                f"contexts of {PAIRS} pairs",
                "accuracy",
                _CONTEXTS,
                {name: tuple(values) for name, values in rates.items()},
                log_x=True,
            ),
        ),
        notes=(
            "In the second half of training a quarter of the questions ask for a key that is not there, with a random "
            "value as target, and a fifth of all batches have no context: a model that has never met an unanswerable "
            "question is sure of nonsense, and least entropy then picks it. What is lost as k grows are such rows: 19 "
            "of 20 contexts lack the key. With half of the questions unanswerable, from a third of training on, the "
            "model recalled .83 from one context and .31 from 20.",
            "The pairs are independent, which is the case that the method assumes; reasoning across contexts is not.",
        ),
    )


def _list(rates: list[tuple[float, float]], which: int) -> str:
    return _values([rate[which] for rate in rates])


def _values(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
