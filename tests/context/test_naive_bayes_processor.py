"""The logits processor inside the host's plain generate: one draw per group, the right one, and state per call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from context.families import BY_NAME, left_padded
from danlu.context.naive_bayes.combine import Settings, combine
from danlu.context.naive_bayes.contexts import NaiveBayesContexts
from danlu.context.naive_bayes.processor import NaiveBayesLogitsProcessor

PARTS = [[[8, 30, 41], [9, 55, 60, 61, 70], [33]], [[12, 13, 14, 15], [70, 20]]]
QUESTION = [11, 3, 8, 2]


@pytest.fixture(scope="module")
def llama():
    return BY_NAME["llama"].build(torch.float32)  # the host's padded prompts are nan in float64


def batch(requests=PARTS):
    rows = [torch.tensor([*part, *QUESTION]) for parts in requests for part in ([], *parts)]
    ids, mask = left_padded(rows)
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}


def run(model, processor, requests=PARTS, count=8, **options):
    given = batch(requests)
    out = model.generate(**given, logits_processor=[processor], max_new_tokens=count, **{"do_sample": False, **options})
    return out[:, given["input_ids"].shape[1] :]


@pytest.mark.parametrize("pooling", ["min_entropy", "mean", "max"])
def test_greedy_answers_of_two_requests_are_those_of_the_reader(llama, pooling):
    processor = NaiveBayesLogitsProcessor([4, 3], pooling=pooling)
    out = run(llama, processor)
    reader = NaiveBayesContexts(llama, pooling=pooling, max_length=200)
    for first, size, parts in ((0, 4, PARTS[0]), (4, 3, PARTS[1])):
        expected = reader.generate(parts, QUESTION, max_new_tokens=8)
        assert (out[first : first + size] == torch.tensor(expected.tokens)).all()
        if pooling == "min_entropy":
            group = 0 if first == 0 else 1
            assert [step[group] for step in processor.chosen] == [entry.source for entry in expected.trace]


def test_the_choice_is_forgotten_between_calls(llama):
    processor = NaiveBayesLogitsProcessor([4, 3], eta=0.7)
    first = run(llama, processor)
    chosen = list(processor.chosen)
    assert torch.equal(run(llama, processor), first)
    assert processor.chosen == chosen
    # a prompt that is longer by just one token is not a continuation
    run(llama, processor, [[[*part, 5] for part in parts] for parts in PARTS], count=1)
    assert len(processor.chosen) == 1


def test_rows_that_sample_draw_one_token_per_group(llama):
    processor = NaiveBayesLogitsProcessor([4, 3], sample=True, temperature=1.5, seed=3)
    out = run(llama, processor, do_sample=True, top_k=2, top_p=0.5, temperature=0.3)
    assert (out[:4] == out[0]).all() and (out[4:] == out[4]).all()
    assert torch.equal(run(llama, processor), out), "the host's own options and sampling change nothing"
    other = NaiveBayesLogitsProcessor([4, 3], sample=True, temperature=1.5, seed=4)
    assert not torch.equal(run(llama, other), out)


def test_plain_scores_in_sampling_rows_would_drift_apart(llama):
    torch.manual_seed(0)
    out = run(llama, NaiveBayesLogitsProcessor([4, 3]), do_sample=True, top_k=0, temperature=1.5)
    assert not (out[:4] == out[0]).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"sampling_top_p": 0.5}])
def test_draws_follow_the_combined_scores(options):
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(3, 12, generator=generator)
    scores = combine(logits, Settings()).scores / options.get("temperature", 1.0)
    if "top_k" in options:
        scores[scores < scores.topk(3).values[-1]] = -torch.inf
    if "sampling_top_p" in options:
        order = scores.softmax(-1).argsort(descending=True)
        before = scores.softmax(-1)[order].cumsum(0) - scores.softmax(-1)[order]
        scores[order[before >= 0.5]] = -torch.inf
    expected = scores.softmax(-1).numpy()
    processor = NaiveBayesLogitsProcessor([3], sample=True, generator=generator, **options)
    ids = torch.zeros(3, 5, dtype=torch.long)
    counts = np.zeros(12)
    for _ in range(2000):
        out = processor(ids, logits)
        assert (out == out[0]).all() and (out[0] == 0).sum() == 1 and out[0].isneginf().sum() == 11
        counts[int(out[0].argmax())] += 1
    live = expected > 0
    assert counts[~live].sum() == 0
    statistic = ((counts[live] - 2000 * expected[live]) ** 2 / (2000 * expected[live])).sum()
    assert statistic < 32  # 0.999 of chi-square with 11 degrees is 31.3; fewer are lower


def test_beams_and_several_sequences_do_not_fit_the_groups(llama):
    message = r"the batch has {} rows, but group_sizes \[4, 3\] make 7: .* no beams, no num_return_sequences"
    with pytest.raises(ValueError, match=message.format(14)):
        run(llama, NaiveBayesLogitsProcessor([4, 3]), num_beams=2)
    with pytest.raises(ValueError, match=message.format(21)):
        run(llama, NaiveBayesLogitsProcessor([4, 3]), num_return_sequences=3, do_sample=True)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([], {}, "at least one group"),
        ([3, 1], {}, "every entry of group_sizes must be >= 2, got 1"),
        ([3], {"temperature": 0.0}, "temperature must be above 0"),
        ([3], {"top_k": -1}, "top_k must be >= 0"),
        ([3], {"sampling_top_p": 0.0}, r"sampling_top_p must be in \(0, 1\]"),
        ([3], {"beta": -2.0}, "beta must be"),
    ],
)
def test_bad_input(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        NaiveBayesLogitsProcessor(sizes, **options)
