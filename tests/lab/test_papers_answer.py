"""The parts of the claims on answering questions about papers, at sizes that take no time."""

from __future__ import annotations

import torch
from torch import nn

from danlu.lab import papers_answer
from danlu.lab.claim import Context
from danlu.papers.answer.questions import questions
from danlu.papers.answer.sentences import sentences


def test_planted_sentences_and_decoys_stand_where_they_should():
    for seed in range(5):
        paper, planted, decoys = papers_answer.synthetic_paper(seed)
        where = {" ".join(paper.text[s.start : s.end].split()): s.section.title for s in sentences(paper)}
        titles = papers_answer._SECTIONS
        for number in range(1, 7):
            home = {titles[place] for place in papers_answer._HOME[number]}
            assert where[planted[number]] in home and where[decoys[number]] not in home
            words = [sorted(text.lower().rstrip(".").split()) for text in (planted[number], decoys[number])]
            assert words[0] == words[1] and planted[number] != decoys[number]
    assert papers_answer.synthetic_paper(3) == papers_answer.synthetic_paper(3)


def test_baselines_have_the_room_that_quotes_have():
    paper, _, _ = papers_answer.synthetic_paper(0)
    first = papers_answer._first_three(paper, questions()[0])
    assert [s.section.role for s in first] == ["abstract"] * 3
    found = papers_answer._searched(paper, questions()[0])
    assert 3 <= len(found) <= 6 and sum(len(s.words) for s in found) <= 120


def test_the_claim_on_quotes_measures_all_three(tmp_path, monkeypatch):
    monkeypatch.setattr(papers_answer, "_PAPERS", 3)
    evidence = papers_answer.papers_extractive.experiment(Context((0,), tmp_path))
    rows = {row[0]: row for row in evidence.tables[0].rows}
    assert len(rows) == 3 and all(0 <= cell <= 1 for row in rows.values() for cell in row[1:])
    assert rows["quotes (ours)"][7] > rows["first three of the abstract"][7]


def test_sections_of_a_document_are_found_and_routed():
    parts = [[n, n + 1] for n in range(16)]
    paper = papers_answer.document(parts)
    assert [section.title for section in paper.sections] == list(papers_answer._TITLES)
    roles = {section.title: section.role for section in paper.sections}
    assert roles["3.2 Decoder"] == "method" and roles["4.5 Speed"] == "experiments"
    from danlu.papers.answer.context import routed

    read = [len(routed(paper, question)) for question in questions()]
    assert read == [2, 3, 5, 7, 4, 3]


class _Oracle(nn.Module):
    """Looks a key up in what it is shown."""

    def __call__(self, ids, **_):
        row, logits = ids[0].tolist(), torch.zeros(1, ids.shape[1], 97)
        pairs = dict(zip(row[:-2:2], row[1:-2:2], strict=False))
        if row[-1] in pairs:
            logits[0, -1, pairs[row[-1]]] = 9.0
        return type("Out", (), {"logits": logits})()


def test_a_model_that_looks_up_perfectly_is_right_as_far_as_it_sees(monkeypatch):
    from danlu.context.naive_bayes import contexts

    class Reader:
        def __init__(self, model):
            self.model = model

        def prepare(self, parts):
            self.parts, self.rows = parts, self
            return self

        def feed(self, asked):
            rows = [self.model(torch.tensor([[*part, *asked.tolist()]])).logits[0, -1] for part in [[], *self.parts]]
            return torch.stack(rows), None

    monkeypatch.setattr(contexts, "NaiveBayesContexts", Reader)
    found = papers_answer.reading_rates(_Oracle(), 8, 0)
    assert set(found["routed sections"].values()) == set(found["all sections"].values()) == {1.0}
    assert set(found["concatenated"].values()) == {1.0}
    assert max(found["last part"].values()) < 1.0 and max(found["outside"].values()) < 0.6
