"""Claims on answering questions about papers: quotes that find what is asked for, and long papers for short models."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.papers.answer.extractive import SENTENCES, WORDS, select
from danlu.papers.answer.questions import questions
from danlu.papers.answer.sections import from_text
from danlu.papers.answer.sentences import Sentence, sentences
from danlu.papers.answer.types import PaperText, Question

_PAPERS = 30
_LEVEL, _LEAD = 0.8, 0.2

_SUBJECTS = (
    *("graph pooling", "protein folding", "speech separation", "route planning", "code search", "image deblurring"),
    *("crop forecasting", "query rewriting", "motion capture", "fraud detection"),
)
_NOUNS = (
    *("encoder", "estimate", "signal", "layer", "graph", "token", "kernel", "budget", "schedule", "gradient", "index"),
    *("buffer", "sample", "prior", "operator", "horizon", "boundary", "residual", "cluster", "window"),
)
#: What planted sentences say: some with the words that such sentences often have, some without any of them.
_PLANTED: dict[int, tuple[str, ...]] = {
    1: (
        "However, {subject} remains difficult whenever the {a} changes faster than the {b}.",
        "Nobody knows how to do {subject} once the {a} and the {b} disagree.",
        "The challenge of {subject} is that each {a} hides its {b} from view.",
        "Current systems for {subject} lack any control over the {a} of the {b}.",
    ),
    2: (
        "Previous studies of {subject} by Kim et al. keep the {a} and drop the {b}.",
        "Existing approaches to {subject} [12] treat every {a} as a {b}.",
        "Two lines of research on {subject} differ in where the {a} meets the {b}.",
        "Lee and Park were the first to link {subject} with a {a} and its {b}.",
    ),
    3: (
        "We propose to solve {subject} by coupling the {a} to a second {b}.",
        "Our approach to {subject} consists of a {a} that feeds back into the {b}.",
        "For {subject}, every {a} is first mixed with its {b} and then projected.",
        "We introduce a {a} for {subject} whose {b} is computed in one pass.",
    ),
    4: (
        "On the largest dataset for {subject} our {a} outperforms the {b} baseline by {number} points.",
        "The error of {subject} falls from {number} to {other} once the {a} replaces the {b}.",
        "Table 3 shows that {subject} reaches an accuracy of {number} % with a {a} and no {b}.",
        "Across nine benchmarks for {subject}, the {a} improves on every {b} we tried.",
    ),
    5: (
        "A limitation is that {subject} still needs a {a} for each new {b}.",
        "Future work could extend {subject} to a {a} without any {b}.",
        "We leave the question of {subject} with a moving {a} and a fixed {b} open.",
        "It would be interesting to run {subject} where neither the {a} nor the {b} is known.",
    ),
    6: (
        "In this paper we show that {subject} works with a {a} and without a {b}.",
        "Overall, {subject} becomes feasible once the {a} shares its memory with the {b}.",
        "In summary, {subject} can be done by a {a} that never sees the {b}.",
        "We show that {subject} and a {a} need only one {b} between them.",
    ),
}
#: Everything else, in any section: half of it has words of questions or cues, half of it names the subject.
_FILLING = (
    "For {subject}, the {a} of each {b} is stored next to the {c}.",
    "A {a} with {number} entries of {subject} is kept for the {b} and the {c}.",
    "When the {a} grows, the {b} follows the {c} after {number} steps.",
    "Both the {a} and the {b} are aligned with the {c} at every step.",
    "However, in {subject} the {a} may drift away from the {b} and the {c}.",
    "We use the {a} of Chen et al. for {subject} together with a {b} and a {c}.",
    "The results for the {a} depend on the {b} and on the {c}.",
    "This {a} was proposed to keep the {b} close to the {c}.",
)
_SECTIONS = (
    "Abstract",
    "1 Introduction",
    "2 Related Work",
    "3 Method",
    "4 Experiments",
    "5 Limitations",
    "6 Conclusion",
)
_HOME = {1: (0, 1), 2: (2,), 3: (3,), 4: (4,), 5: (5, 6), 6: (0, 6)}


@claim(
    name="papers-extractive",
    title="Six questions answered by quotes: section, words, cues and centrality find what was planted",
    source="archive 9907",
    statement="A fixed set of six questions lets a reader decide whether to read a paper; quotes that are chosen by "
    "section, words and cues answer them where neither the abstract's beginning nor a search for the question does.",
    measurement=f"{_PAPERS} synthetic papers of seven sections with one planted answer for each question in a section "
    "where it belongs, and a decoy with the same words in another order in a section where it does not; share of "
    "(paper, question) whose answer, at most six sentences and 120 words, quotes the planted sentence. Baselines: the "
    "first three sentences of the abstract, and BM25 of the question's text with the same room.",
    budget=10,
)
def papers_extractive(context: Context) -> Evidence:
    """Three ways to choose quotes, on the same papers."""
    ways: dict[str, Callable[[PaperText, Question], list[Sentence]]] = {
        "quotes (ours)": select,
        "first three of the abstract": _first_three,
        "BM25 of the question": _searched,
    }
    hits = {name: dict.fromkeys(range(1, 7), 0) for name in ways}
    decoys = dict.fromkeys(ways, 0)
    for number in context.track(range(_PAPERS), description="quoting", total=_PAPERS):
        paper, planted, decoy = synthetic_paper(1000 * context.seeds[0] + number)
        for question in questions():
            for name, way in ways.items():
                quoted = [" ".join(paper.text[s.start : s.end].split()) for s in way(paper, question)]
                hits[name][question.number] += planted[question.number] in quoted
                decoys[name] += decoy[question.number] in quoted
    rates = {name: sum(found.values()) / (6 * _PAPERS) for name, found in hits.items()}
    by_question = {name: tuple(found[q] / _PAPERS for q in range(1, 7)) for name, found in hits.items()}
    ours, first, searched = rates.values()
    return Evidence(
        summary=f"The planted sentence is quoted for {ours:.0%} of 180 pairs; for {first:.0%} by the abstract's first "
        f"three sentences, for {searched:.0%} by BM25 of the question.",
        checks=(
            Check(f"ours: at least {_LEVEL:.0%}", ours >= _LEVEL, f"{ours:.1%}"),
            Check("20 points above the abstract's first three", ours - first >= _LEAD, f"{ours - first:+.1%}"),
            Check("20 points above BM25 of the question", ours - searched >= _LEAD, f"{ours - searched:+.1%}"),
        ),
        tables=(
            Table(
                "Share of papers whose answer quotes the planted sentence",
                ("way", *(f"Q{q}" for q in range(1, 7)), "all", "decoy quoted"),
                tuple((name, *by_question[name], rates[name], decoys[name] / (6 * _PAPERS)) for name in ways),
            ),
        ),
        plots=(
            Plot(
                "Planted sentences that were quoted",
                "question",
                "share of papers",
                tuple(range(1, 7)),
                by_question,
                x_names=tuple(f"Q{q}" for q in range(1, 7)),
            ),
        ),
        notes=(
            "Papers from templates are easier than real ones: sections are found without fail, and one sentence is the "
            "answer. What is shown is that section, words and cues together do what neither does alone.",
            "A quarter to a half of the planted sentences, by question, have no cue word; a third of the filling "
            "sentences have one, and a half name the subject.",
        ),
    )


def synthetic_paper(seed: int) -> tuple[PaperText, dict[int, str], dict[int, str]]:
    """A paper, and the planted sentence and the decoy of each question.

    Args:
        seed: of everything.
    """
    dice = random.Random(seed)
    subject = dice.choice(_SUBJECTS)
    bodies = [[_filled(dice.choice(_FILLING), subject, dice) for _ in range(dice.randint(10, 18))] for _ in _SECTIONS]
    bodies[0] = bodies[0][:5]
    planted, decoys = {}, {}
    for number, templates in _PLANTED.items():
        planted[number] = _filled(dice.choice(templates), subject, dice)
        decoys[number] = _shuffled(planted[number], dice)
        homes = _HOME[number]
        wrong = dice.choice([place for place in range(1, len(_SECTIONS)) if place not in homes])
        for place, sentence in ((dice.choice(homes), planted[number]), (wrong, decoys[number])):
            bodies[place].insert(dice.randint(0, len(bodies[place])), sentence)
    text = "\n".join(f"{title}\n{' '.join(body)}\n" for title, body in zip(_SECTIONS, bodies, strict=True))
    return from_text(text, f"A Study of {subject.title()}"), planted, decoys


def _filled(template: str, subject: str, dice: random.Random) -> str:
    a, b, c = dice.sample(_NOUNS, 3)
    numbers = {"number": dice.randint(20, 90), "other": dice.randint(2, 19)}
    return template.format(subject=subject, a=a, b=b, c=c, **numbers)


def _shuffled(sentence: str, dice: random.Random) -> str:
    """The same words in another order, as a sentence."""
    parts = sentence.rstrip(".").split()
    while True:
        dice.shuffle(parts)
        text = " ".join(parts).lower()
        text = text[0].upper() + text[1:] + "."
        if text != sentence and text[0].isalpha():
            return text


def _first_three(paper: PaperText, question: Question) -> list[Sentence]:
    return [sentence for sentence in sentences(paper) if sentence.section.role == "abstract"][:3]


def _searched(paper: PaperText, question: Question) -> list[Sentence]:
    from danlu.papers.answer.extractive import bm25
    from danlu.papers.tokens import stop_words, words

    pool = sentences(paper)
    scores = bm25([each.words for each in pool], [w for w in words(question.text) if w not in stop_words()])
    chosen: list[Sentence] = []
    for index in sorted(range(len(pool)), key=lambda index: -scores[index]):
        if len(chosen) < SENTENCES and sum(len(each.words) for each in chosen) + len(pool[index].words) <= WORDS:
            chosen.append(pool[index])
    return chosen


_TITLES = (
    *("Abstract", "1 Introduction", "2 Related Work", "3 Method", "3.1 Encoder", "3.2 Decoder", "3.3 Training"),
    *("4 Experiments", "4.1 Data", "4.2 Baselines", "4.3 Main Results", "4.4 Ablation", "4.5 Speed"),
    *("5 Discussion", "6 Limitations", "7 Conclusion"),
)
_TRIALS = 100


@claim(
    name="papers-long-document",
    title="A long paper for a model with a short context: sections side by side, those that matter alone",
    source="archive 9617",
    statement="A model with a short context answers questions about a document many times as long when every section "
    "is a context of its own; sections that do not matter to a question are better left out.",
    measurement=f"The 2-layer model of the recall task, trained on 10 tokens, and documents of {len(_TITLES)} sections "
    "under the titles of a paper, four key-value pairs in each. A question is one of the six and a key from a section "
    "that it is routed to; accuracy of the value, with the routed sections, with all of them, concatenated, and cut.",
    budget=60,
)
def papers_long_document(context: Context) -> Evidence:
    """The recall model reads documents in five ways."""
    from danlu.lab.recall import LENGTH, PAIRS, recall_model

    model = recall_model(context.seeds[0], context)
    found = reading_rates(model, _TRIALS, context.seeds[0], context)
    ways = [name for name in found if name not in ("sections", "outside")]
    rates = {name: sum(found[name].values()) / 6 for name in ways}
    routed, whole = rates["routed sections"], rates["all sections"]
    joined, cut = rates["concatenated"], max(rates["first part"], rates["last part"])
    outside = sum(found["outside"].values()) / 6
    length = 2 * PAIRS * len(_TITLES)
    return Evidence(
        summary=f"Documents of {length} tokens, a model of {LENGTH}: {routed:.2f} right with the routed sections, "
        f"{whole:.2f} with all, {joined:.2f} concatenated, {cut:.2f} cut to what it can read.",
        checks=(
            Check("routed sections: at least .9", routed >= 0.9, f"{routed:.3f}"),
            Check("all sections: at least .8", whole >= 0.8, f"{whole:.3f}"),
            Check("routed at least as good as all", routed >= whole, f"{routed - whole:+.3f}"),
            Check("concatenated: at most half of routed", joined <= routed / 2, f"{joined:.3f}"),
            Check("cut to what the model can read: at most .3", cut <= 0.3, f"{cut:.3f}"),
        ),
        tables=(
            Table(
                "Right answers by question",
                ("way", *(f"Q{q}" for q in range(1, 7)), "mean"),
                tuple((name, *(found[name][q] for q in range(1, 7)), rates[name]) for name in ways),
            ),
            Table(
                "The price of leaving out",
                ("measure", *(f"Q{q}" for q in range(1, 7))),
                (
                    ("sections read of " + str(len(_TITLES)), *(found["sections"][q] for q in range(1, 7))),
                    ("right where the key is in another section", *(found["outside"][q] for q in range(1, 7))),
                ),
            ),
        ),
        plots=(
            Plot(
                "Questions on documents 13 times the trained length",
                "question",
                "accuracy",
                tuple(range(1, 7)),
                {name: tuple(found[name][q] for q in range(1, 7)) for name in ways},
                x_names=tuple(f"Q{q}" for q in range(1, 7)),
            ),
        ),
        notes=(
            f"Where the key stands in a section that its question is not routed to, {outside:.2f} are right: routing "
            "by title is a bet on where authors write things. The routed sections hold the abstract, which is why the "
            "first part of a document does better than the last.",
            "A key and its value stand in one section. Answers that need two sections are what this reading cannot do.",
            "The model has learnt to look up, and that a key may be missing; it has no language. The engine's "
            "template, headings and refusals are not part of this. What is lost as sections are added is what the "
            "claim nbce-lookup measures: sections without the key that are sure of a wrong value.",
        ),
    )


def reading_rates(model: Any, trials: int, seed: int, context: Context | None = None) -> dict[str, dict[int, float]]:
    """Accuracy by way of reading and question; sections read; accuracy for keys of sections that are left out.

    Args:
        model: of the recall task.
        trials: for each question.
        seed: of them.
        context: shows progress.
    """
    import torch

    from danlu.context.naive_bayes.combine import Settings, combine
    from danlu.context.naive_bayes.contexts import NaiveBayesContexts
    from danlu.lab.recall import LENGTH, recall_trial
    from danlu.papers.answer.context import routed

    reader, settings = NaiveBayesContexts(model), Settings(0.25, 0.1, 0.95)
    generator = torch.Generator().manual_seed(seed + 15485863)

    def best(parts: Sequence[list[int]], asked: list[int]) -> int:
        logits, _ = reader.prepare(parts).rows.feed(torch.tensor(asked))
        return int(combine(logits, settings).scores.argmax())

    def alone(ids: list[int]) -> int:
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())

    ways = ("routed sections", "all sections", "concatenated", "first part", "last part", "outside", "sections")
    found: dict[str, dict[int, float]] = {name: {} for name in ways}
    asking = context.track(questions(), description="reading", total=6) if context else questions()
    for question in asking:
        hits, inside, outside = dict.fromkeys(ways, 0), 0, 0
        while inside < trials:
            parts, asked, answer = recall_trial(len(_TITLES), generator)
            paper = document(parts)
            matter = [paper.sections.index(section) for section in routed(paper, question)]
            chosen = [parts[place] for place in matter]
            with torch.no_grad():
                if not any(asked[1] in part[::2] for part in chosen):
                    if outside < trials:
                        outside += 1
                        hits["outside"] += best(chosen, asked) == answer
                    continue
                inside += 1
                flat = [token for part in parts for token in part]
                room = LENGTH - len(asked)
                hits["routed sections"] += best(chosen, asked) == answer
                hits["all sections"] += best(parts, asked) == answer
                hits["concatenated"] += alone([*flat, *asked]) == answer
                hits["first part"] += alone([*flat[:room], *asked]) == answer
                hits["last part"] += alone([*flat[-room:], *asked]) == answer
                hits["sections"] = len(chosen)
        for name in ways:
            count = {"outside": max(1, outside), "sections": 1}.get(name, inside)
            found[name][question.number] = hits[name] / count
    return found


def document(parts: Sequence[Sequence[int]]) -> PaperText:
    """Contexts as the sections of a paper, so that what finds and routes sections does so here."""
    return from_text("".join(f"{t}\n{' '.join(map(str, p))}\n" for t, p in zip(_TITLES, parts, strict=True)))
