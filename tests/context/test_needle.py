"""Needles: prompts of the right make, and scores that a model of known reach must get."""

from __future__ import annotations

import pytest
import torch

from danlu.context.needle import WORDS, build_prompt, needle_scores
from reference.tiny import Copyist, byte_tokenizer, tiny_config, tiny_llama

TEXT = "".join(f"line {i} of a text that says little\n" for i in range(400))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    return torch.tensor(tokenizer(TEXT)["input_ids"])


def breaks(ids, tokenizer):
    return ids == tokenizer("\n")["input_ids"][0]


@pytest.mark.parametrize("length", [200, 301, 1000])
def test_prompt_holds_each_needle_at_its_depth_and_asks_for_it(ids, tokenizer, length):
    prompt = build_prompt(ids, breaks(ids, tokenizer), tokenizer, length, (0.2, 0.8), seed=5)
    text = tokenizer.decode(prompt.ids)
    assert len(prompt.ids) == length == len(text)
    values = [text[answer] for answer in prompt.answers]
    needles = [text[text.rindex("\n", 0, answer.start) : answer.stop] + " = None" for answer in prompt.answers]
    assert text.endswith(needles[-1])
    hay = length - 2 * sum(map(len, needles))
    for depth, value, needle in zip(prompt.depths, values, needles, strict=True):
        assert value in WORDS and needle.endswith(f"_{value} = None") and text.count(needle) == 2
        place = text.index(needle)
        assert text[place + len(needle)] == "\n", "a needle stands on a line of its own"
        before = sum(len(other) for other in needles if text.index(other) < place)
        assert abs(place - before - depth * hay) <= 20, "no line of the text is longer than 40"
    assert prompt.questions_start == min(answer.start for answer in prompt.answers) - 1


def test_prompts_are_drawn_from_the_seed(ids, tokenizer):
    first, same, other = (
        build_prompt(ids, breaks(ids, tokenizer), tokenizer, 300, (0.5,), seed=seed).ids for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_text_without_lines(tokenizer):
    ids = torch.tensor(tokenizer("word " * 200)["input_ids"])
    prompt = build_prompt(ids, breaks(ids, tokenizer), tokenizer, 300, (0.0, 1.0), seed=0)
    assert len(prompt.ids) == 300


def test_a_perfect_copyist_finds_all_and_a_short_sighted_one_the_near_ones(ids, tokenizer):
    depths = (0.1, 0.5, 0.95)
    perfect = needle_scores(Copyist(tiny_config()), ids, tokenizer, [400, 800], ["plain"], depths=depths, trials=2)
    assert [(row.length, row.depth) for row in perfect] == [(length, d) for length in (400, 800) for d in depths]
    assert all(row.accuracy == row.token_accuracy == 1 and row.log_probability > -0.01 for row in perfect)
    near = Copyist(tiny_config(), reach=200)
    found = {row.depth: row.accuracy for row in needle_scores(near, ids, tokenizer, [800], ["plain"], depths=depths)}
    assert found == {0.1: 0, 0.5: 0, 0.95: 1}


def test_scores_of_a_random_model_are_those_of_chance(ids, tokenizer):
    rows = needle_scores(tiny_llama(), ids, tokenizer, [256], ["plain", "rerope"], depths=(0.5,), trials=2)
    assert {row.stack for row in rows} == {"plain", "rerope"}
    assert all(row.accuracy == 0 and row.trials == 2 and row.log_probability < -2 for row in rows)


def test_first_token_is_put_in_front(ids, tokenizer):
    seen = []

    class Spy(Copyist):
        def forward(self, input_ids, use_cache=False):
            seen.append(int(input_ids[0, 0]))
            return super().forward(input_ids)

    needle_scores(Spy(tiny_config()), ids, tokenizer, [300], ["plain"], depths=(0.5,), trials=2, first_token=256)
    assert seen == [256, 256]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [64]}, "length 64 cannot hold 5 needles"),
        ({"lengths": [10**5]}, "the text has .* tokens, but length 100000 needs"),
        ({"lengths": [512], "depths": (1.5,)}, "depths must be"),
        ({"lengths": [512], "depths": ()}, "depths must be"),
        ({"lengths": [512], "trials": 0}, "trials must be >= 1, got 0"),
    ],
)
def test_bad_arguments(ids, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        needle_scores(tiny_llama(), ids, tokenizer, methods=["plain"], **arguments)
