"""The parts of the claims on naive-Bayes contexts, at sizes that take no time."""

from __future__ import annotations

import torch

from danlu.lab import naive_bayes, recall


def test_least_entropy_finds_the_relevant_row_and_the_mean_loses_it():
    least, drawn = naive_bayes.pooled_rates("min entropy, beta 0.25", 16, 20, 0)
    assert least >= 0.95 and drawn >= 0.9
    assert naive_bayes.pooled_rates("mean, beta n - 1", 16, 20, 0)[0] < 0.3
    assert naive_bayes.pooled_rates("min entropy, beta 0.25", 16, 20, 0) == (least, drawn)


def test_training_rows_ask_for_pairs_that_are_there():
    draw = recall.recall_batches(5)
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(20):
        batch = draw(generator)
        ids, targets = batch["input_ids"], batch["targets"]
        counted = targets != -100
        questions = int(counted[0].sum())
        pairs = (ids.shape[1] - 2 * questions) // 2
        sizes.add(pairs)
        assert questions == max(pairs, 1)
        for row, target in zip(ids.tolist(), targets.tolist(), strict=True):
            known = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
            asked = [(row[i], target[i]) for i in range(len(row)) if target[i] != -100]
            assert pairs == 0 or all(known[key] == value for key, value in asked)
        assert int(batch["position_ids"].max()) == 2 * pairs + 1 < recall.LENGTH
    assert sizes == {0, 1, 2, 3, 4}


def test_packed_questions_do_not_see_each_other():
    seen = recall.packed_mask(2, 2)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_trials_hold_the_answer_in_one_context():
    parts, question, answer = recall.recall_trial(6, torch.Generator().manual_seed(1))
    assert [len(part) for part in parts] == [2 * recall.PAIRS] * 6
    holding = [dict(zip(part[::2], part[1::2], strict=True)) for part in parts if question[1] in part[::2]]
    assert [found[question[1]] for found in holding] == [answer]


def test_the_whole_claim_at_tiny_sizes(monkeypatch, tmp_path):
    from danlu.lab import training
    from danlu.lab.claim import Context
    from danlu.lab.training import Schedule

    monkeypatch.setattr(training, "_MEMORY", {})
    monkeypatch.setattr(recall, "_SCHEDULE", Schedule(steps=2, batch=4))
    monkeypatch.setattr(naive_bayes, "_CONTEXTS", (1, 2))
    monkeypatch.setattr(naive_bayes, "_EXAMPLES", 3)
    evidence = naive_bayes.nbce_lookup.experiment(Context((0,), tmp_path))
    work = evidence.tables[2]
    assert evidence.checks[4].met, "work is linear whatever the model has learnt"
    assert work.columns == ("contexts", "combined", "concatenated")
