"""Whole answers: against rows read one by one without a cache, against the host's generate, and bad input."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
)

import danlu.context.naive_bayes.rows as rows_module
from context.families import BY_NAME, widen
from danlu.context.extend import extended
from danlu.context.naive_bayes.contexts import NaiveBayesContexts
from danlu.context.naive_bayes.select import Selection
from reference import naive_bayes as reference
from reference.tiny import Copyist, byte_tokenizer, tiny_config, tiny_llama

ROOM = {"max_length": 200}
PREFIX, QUESTION = [5, 9, 4], [11, 3, 8, 2]
NEW = 8


def contexts(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 97, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def llama():
    return BY_NAME["llama"].build()


@pytest.fixture(scope="module")
def gpt2():
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None
    )
    return widen(GPT2LMHeadModel(config)).double().eval()


def by_hand(model, parts, count=NEW, prefix=PREFIX, **settings):
    rows = [[*prefix, *part, *QUESTION] for part in ([], *parts)]
    return reference.greedy(model, rows, count, **{"beta": 0.25, "eta": 0.1, "top_p": 0.95, **settings})


def generate(model, parts, prefix=PREFIX, count=NEW, question=QUESTION, **options):
    own = {name: options.pop(name) for name in list(options) if name in _OWN}
    reader = NaiveBayesContexts(model, prefix=prefix, **{**ROOM, **own})
    return reader.generate(parts, question, max_new_tokens=count, output_scores=True, **options)


_OWN = ("beta", "eta", "top_p", "pooling", "selection", "batch_tokens", "max_padding", "max_length")


def same(result, expected, tolerance=1e-8):
    tokens, chosen, scores = expected
    assert list(result.tokens) == tokens
    if chosen[0] is not None:
        assert [entry.source for entry in result.trace] == chosen
    # the host's processors work in float32
    np.testing.assert_allclose(
        result.scores.double().numpy(), np.stack(scores).astype(np.float32), rtol=2e-6, atol=1e-5
    )


@pytest.mark.parametrize("pooling", ["min_entropy", "mean", "max"])
@pytest.mark.parametrize("prefix", [[], PREFIX])
def test_an_answer_is_that_of_rows_read_alone(llama, pooling, prefix):
    parts = contexts(9, 3, 17, 1)
    same(generate(llama, parts, prefix, pooling=pooling), by_hand(llama, parts, prefix=prefix, pooling=pooling))


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen2-mixed", "deepseek-v3", "phi"])
def test_other_kinds_of_positions_and_caches(gpt2, name):
    model = gpt2 if name == "gpt2" else BY_NAME[name].build()
    parts = contexts(9, 3, 17, 12, 9)
    options = {"max_length": 64} if name == "gpt2" else {}
    for padding in (0.0, 9.0):
        same(generate(model, parts, max_padding=padding, **options), by_hand(model, parts))


@pytest.mark.parametrize(
    "options", [{"batch_tokens": 1}, {"batch_tokens": 30}, {"max_padding": 0}, {"max_padding": 99.0}]
)
def test_batching_and_padding_change_nothing(llama, options):
    parts = contexts(9, 3, 17, 2, 16, 30, 8)
    same(generate(llama, parts, **options), by_hand(llama, parts))


def test_caches_that_cannot_be_joined_stay_single_rows(llama, monkeypatch):
    for name in ("can_join", "can_pad_right"):
        monkeypatch.setattr(rows_module, name, lambda cache: False)
    monkeypatch.setattr("danlu.context.naive_bayes.caches.can_join", lambda cache: False)
    parts = contexts(9, 3, 17)
    reader = NaiveBayesContexts(llama, prefix=PREFIX, **ROOM)
    prepared = reader.prepare(parts)
    assert [group.rows for group in prepared.rows.groups] == [[3], [1], [2], [0]]
    for _ in range(2):
        same(prepared.answer(QUESTION, max_new_tokens=NEW, output_scores=True), by_hand(llama, parts))


def test_similar_rows_are_one_group_and_a_lone_prior_does_not_pad_a_long_one(llama):
    reader = NaiveBayesContexts(llama, prefix=PREFIX, **ROOM)
    groups = reader.prepare(contexts(*[40] * 6, 39, 38)).rows.groups
    assert [sorted(group.rows) for group in groups] == [list(range(9))]
    assert [group.rows for group in reader.prepare(contexts(40)).rows.groups] == [[1], [0]]


class Counting:
    """Real tokens that the model was given, call by call."""

    def __init__(self, model):
        self.calls: list[int] = []
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.calls.append(kwargs["input_ids"].numel())


def test_what_rows_share_is_read_once(llama):
    shared = contexts(20, seed=8)[0]
    parts = [[*shared, *part] for part in contexts(6, 6, 6, 6)]
    counting = Counting(llama)
    try:
        result = generate(llama, [*parts, parts[1]], count=1)
    finally:
        counting.handle.remove()
    # prefix, common beginning, four contexts (the fifth is a duplicate), the question in five rows
    assert sum(counting.calls) == len(PREFIX) + 20 + 4 * 6 + 5 * len(QUESTION)
    same(result, by_hand(llama, [*parts, parts[1]], count=1))


@pytest.mark.parametrize("pooling", ["min_entropy", "mean", "max"])
def test_a_duplicate_is_computed_once_and_counts_twice(llama, pooling):
    parts = contexts(9, 5)
    parts = [*parts, parts[0]]
    same(generate(llama, parts, pooling=pooling), by_hand(llama, parts, pooling=pooling))


def test_one_context_may_be_the_beginning_of_another(llama):
    long = contexts(12)[0]
    parts = [long, long[:5], long[:1]]
    same(generate(llama, parts), by_hand(llama, parts))


def test_prepared_contexts_answer_many_questions_without_reading_again(llama):
    parts = contexts(9, 3, 17)
    reader = NaiveBayesContexts(llama, prefix=PREFIX, **ROOM)
    prepared = reader.prepare(parts)
    counting = Counting(llama)
    try:
        first = prepared.answer(QUESTION, max_new_tokens=NEW)
        assert sum(counting.calls) == 4 * len(QUESTION) + 4 * (NEW - 1)
    finally:
        counting.handle.remove()
    other = prepared.answer([40, 41], max_new_tokens=NEW)
    assert other.tokens == reader.generate(parts, [40, 41], max_new_tokens=NEW).tokens
    again = prepared.answer(QUESTION, max_new_tokens=NEW, release=True)
    assert again == first and other.tokens != first.tokens
    with pytest.raises(ValueError, match="released to an answer: prepare them again"):
        prepared.answer(QUESTION)


@pytest.mark.parametrize("stack", ["rerope:window=7", "rerope:window=7+logn", "dynamic-ntk", "yarn:factor=4"])
def test_extended_models(llama, stack):
    parts = contexts(9, 30, 17, 16)
    with extended(llama, stack):
        result = generate(llama, parts, max_length=None)
        same(result, by_hand(llama, parts))
        prepared = NaiveBayesContexts(llama, prefix=PREFIX).prepare(parts)
        for _ in range(2):
            assert prepared.answer(QUESTION, max_new_tokens=NEW).tokens == result.tokens


@pytest.mark.parametrize("lengths", [(9, 30, 17, 16), (3, 3, 3)])
def test_extended_models_with_a_prefix_beyond_the_trained_length(llama, lengths):
    prefix, parts = contexts(20, seed=8)[0], contexts(*lengths)
    with extended(llama, "dynamic-ntk"):
        result = generate(llama, parts, prefix, max_length=None, max_padding=0.0)
        same(result, by_hand(llama, parts, prefix=prefix))


@pytest.mark.parametrize("stack", [None, "dynamic-ntk"])
def test_answers_may_be_interleaved(llama, stack):
    parts = contexts(9, 30, 17)
    with extended(llama, stack) if stack else nullcontext():
        prepared = NaiveBayesContexts(llama, prefix=contexts(20, seed=8)[0], **ROOM).prepare(parts)
        first, second = (prepared.answer(one, max_new_tokens=NEW) for one in (QUESTION, [40, 41]))
        inner = []

        def ask_another(entry):
            if len(inner) < 2:
                inner.append(prepared.answer([40, 41], max_new_tokens=NEW))

        assert prepared.answer(QUESTION, max_new_tokens=NEW, on_token=ask_another) == first
        assert inner == [second, second]


def prompt_of(part, model):
    ids = torch.tensor([[*PREFIX, *part, *QUESTION]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}


def plain(model, part, count=NEW, **options):
    given = prompt_of(part, model)
    return model.generate(**given, max_new_tokens=count, **options)[0, given["input_ids"].shape[1] :].tolist()


def test_one_context_with_beta_zero_is_plain_generation(llama):
    part = contexts(9)[0]
    for top_p in (1.0, 0.95):
        assert list(generate(llama, [part], beta=0.0, top_p=top_p, count=20).tokens) == plain(llama, part, 20)


def test_beta_minus_one_is_generation_without_context(llama):
    parts = contexts(9, 4)
    assert list(generate(llama, parts, beta=-1.0, top_p=1.0, count=20).tokens) == plain(llama, [], 20)


def test_one_context_is_classifier_free_guidance(llama):
    part = contexts(9)[0]
    without = torch.tensor([[*PREFIX, *QUESTION]])
    host = plain(llama, part, 20, guidance_scale=1.25, negative_prompt_ids=without)
    assert list(generate(llama, [part], top_p=1.0, count=20).tokens) == host
    assert host != plain(llama, part, 20)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.1, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [8]]},
        {"min_new_tokens": 9, "eos_token_id": [3, 5, 7, 20]},
    ],
)
def test_one_context_samples_as_the_host_with_the_same_seed(llama, options):
    part = contexts(9)[0]
    for seed in range(3):
        torch.manual_seed(seed)
        host = plain(llama, part, 20, do_sample=True, **options)
        reader = NaiveBayesContexts(llama, prefix=PREFIX, beta=0.0, top_p=1.0, **ROOM)
        state = torch.get_rng_state()
        ours = reader.generate([part], QUESTION, max_new_tokens=20, do_sample=True, seed=seed, **options)
        assert list(ours.tokens) == host
        assert torch.equal(torch.get_rng_state(), state), "the global state is not ours"
        given = torch.Generator().manual_seed(seed)
        again = reader.generate([part], QUESTION, max_new_tokens=20, do_sample=True, generator=given, **options)
        assert again == ours


def test_draws_follow_the_combined_distribution(llama):
    parts = contexts(9, 4)
    prepared = NaiveBayesContexts(llama, prefix=PREFIX, top_p=0.8, **ROOM).prepare(parts)
    scores = by_hand(llama, parts, count=1, top_p=0.8)[2][0]
    expected = np.exp(scores - scores.max())
    expected /= expected.sum()
    generator = torch.Generator().manual_seed(0)
    draws = [
        prepared.answer(QUESTION, max_new_tokens=1, do_sample=True, top_k=0, generator=generator).tokens[0]
        for _ in range(400)
    ]
    counts = np.bincount(draws, minlength=97)
    assert (counts[expected == 0] == 0).all()
    order = np.argsort(-expected)
    bins = np.array_split(order[: (expected > 0).sum()], 6)
    observed = np.array([counts[one].sum() for one in bins])
    wanted = 400 * np.array([expected[one].sum() for one in bins])
    assert ((observed - wanted) ** 2 / wanted).sum() < 20.5  # 0.999 of chi-square with 5 degrees


def test_the_hosts_processors_see_all_contexts_as_one_prompt(llama):
    parts = contexts(9, 4)
    seen = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((input_ids[0].tolist(), tuple(scores.shape)))
            return scores

    result = generate(llama, parts, count=3, logits_processor=LogitsProcessorList([Spy()]))
    read = [*PREFIX, *parts[0], *parts[1], *QUESTION]
    assert [ids for ids, _ in seen] == [[*read, *result.tokens[:i]] for i in range(3)]
    assert {shape for _, shape in seen} == {(1, 97)}


def test_stopping_criteria_end_tokens_and_configurations_are_the_hosts(llama):
    part = contexts(9)[0]
    tokens = generate(llama, [part], count=12).tokens
    end = tokens[4]
    assert generate(llama, [part], count=12, eos_token_id=end, pad_token_id=0).tokens == tokens[: tokens.index(end) + 1]

    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= len(PREFIX) + 9 + len(QUESTION) + 3])

    assert generate(llama, [part], count=12, stopping_criteria=[Third()]).tokens == tokens[:3]
    config = GenerationConfig(max_new_tokens=5)
    reader = NaiveBayesContexts(llama, prefix=PREFIX, **ROOM)
    assert reader.generate([part], QUESTION, generation_config=config).tokens == tokens[:5]
    assert config.max_new_tokens == 5 and config.max_length == GenerationConfig(max_new_tokens=5).max_length
    assert len(reader.generate([part], QUESTION, generation_config=config, max_new_tokens=2).tokens) == 2


def test_streamers_and_callbacks_get_tokens_as_they_come(llama):
    class Streamer:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    parts, streamer, traces = contexts(9, 4), Streamer(), []
    result = generate(llama, parts, streamer=streamer, on_token=traces.append)
    assert streamer.ended
    assert streamer.got[0] == [*PREFIX, *parts[0], *parts[1], *QUESTION]
    assert [one for put in streamer.got[1:] for one in put] == list(result.tokens)
    assert tuple(traces) == result.trace


@torch.no_grad()
def test_the_trace_holds_the_rows_own_probabilities(llama):
    parts = contexts(9, 4, 6)
    result = generate(llama, parts)
    _, chosen, _ = by_hand(llama, parts)
    rows = [[*PREFIX, *part, *QUESTION] for part in ([], *parts)]
    for entry, k in zip(result.trace, chosen, strict=True):
        logits = [llama(torch.tensor([row])).logits[0, -1] for row in rows]
        assert entry.probability == pytest.approx(float(logits[k + 1].softmax(-1)[entry.token]), rel=1e-5)
        assert entry.prior == pytest.approx(float(logits[0].softmax(-1)[entry.token]), rel=1e-5)
        entropies = reference.step(torch.stack(logits).numpy(), 0.25, 0.1, 0.95)[2]
        np.testing.assert_allclose(entry.entropies, entropies, rtol=1e-5)
        assert entry.gain == pytest.approx(np.log(entry.probability / entry.prior))
        for row in rows:
            row.append(entry.token)
    flat = [source for source, start, end in result.runs() for _ in range(start, end)]
    assert flat == [entry.source for entry in result.trace]
    assert json.loads(json.dumps(result.to_dict()))["tokens"] == list(result.tokens)


def test_a_selection_answers_as_the_contexts_that_stay(llama):
    parts = contexts(9, 4, 6, 12, 5)
    rows = [[*PREFIX, *part, *QUESTION] for part in ([], *parts)]
    gains = []
    for row in rows:
        logs = llama(torch.tensor([row])).logits[0].log_softmax(-1)
        gains.append(float(np.mean([logs[len(row) - 4 + i, QUESTION[i + 1]].item() for i in range(3)])))
    best = sorted(np.argsort(-np.array(gains[1:]))[:2].tolist())
    result = generate(llama, parts, selection=Selection(keep=2))
    assert sorted({0, 1, 2, 3, 4} - {entry.source for entry in result.dropped}) == best
    alone = generate(llama, [parts[i] for i in best])
    assert result.tokens == alone.tokens
    assert [entry.source for entry in result.trace] == [best[entry.source] for entry in alone.trace]
    worst = min(result.dropped, key=lambda entry: gains[entry.source + 1])
    assert worst.reason == f"rank 5 of 5: question gains {gains[worst.source + 1] - gains[0]:+.2f} nats per token"
    assert result.trace[0].entropies[worst.source] is None


def test_rows_may_be_kept_and_dropped_by_entropy(llama):
    parts = contexts(9, 4, 6, 12)
    entropies = generate(llama, parts, count=1).trace[0].entropies
    best = int(np.argmin(entropies))
    kept = generate(llama, parts, selection=Selection(keep=1, by="entropy"))
    assert {entry.source for entry in kept.trace} == {best}
    middle = sorted(entropies)[1] + 1e-3
    limited = generate(llama, parts, selection=Selection(max_entropy=middle))
    assert len(limited.dropped) == 2 and all("nats, above" in entry.reason for entry in limited.dropped)
    strict = generate(llama, parts, selection=Selection(max_entropy=1e-6))
    assert {entry.source for entry in strict.trace} == {best}, "the surest row stays"


def test_rows_that_begin_with_a_refusal_are_dropped(llama):
    parts = contexts(9, 4, 6)
    answers = [plain(llama, part, 3) for part in parts]
    assert len({answer[0] for answer in answers}) == 3
    wrong_end = [*answers[0][:2], (answers[0][2] + 1) % 97]
    result = generate(llama, [*parts, parts[1]], selection=Selection(refusals=[wrong_end, answers[1], [96, 1]]))
    assert [(entry.source, entry.reason) for entry in result.dropped] == [
        (1, f"its answer begins with {answers[1]!r}"),
        (3, f"its answer begins with {answers[1]!r}"),
    ]
    assert result.tokens == generate(llama, [parts[0], parts[2]]).tokens
    assert not result.refused
    single = generate(llama, parts, selection=Selection(refusals=[answers[2][:1]]))
    assert [entry.source for entry in single.dropped] == [2]
    every = generate(llama, parts, selection=Selection(refusals=answers))
    assert every.refused and not every.dropped
    assert every.tokens == generate(llama, parts).tokens


def test_half_precision_models(llama):
    model = BY_NAME["llama"].build(torch.bfloat16)
    result = generate(model, contexts(9, 4))
    assert len(result.tokens) == NEW and result.scores.dtype == torch.float32


def test_the_training_flag_returns(llama):
    llama.train()
    try:
        assert generate(llama, contexts(9)).tokens == generate(llama, contexts(9)).tokens
        assert llama.training
    finally:
        llama.eval()


# Text


@pytest.fixture(scope="module")
def bytes_model():
    return tiny_llama(max_position_embeddings=64), byte_tokenizer()


def test_text_follows_the_template_and_the_prefix_comes_first(bytes_model):
    model, tokenizer = bytes_model
    reader = NaiveBayesContexts(model, tokenizer, template="<{context}|{question}>", prefix="Say:")
    prepared = reader.prepare(["one", "two"])
    result = prepared.answer("why", max_new_tokens=4)
    layout = [tokenizer.decode(part) for part in (reader.layout.head, reader.layout.middle, reader.layout.tail)]
    assert layout == ["Say:\n\n<", "|", ">"]
    by_ids = NaiveBayesContexts(model, prefix=tokenizer("Say:\n\n<")["input_ids"]).generate(
        [tokenizer("one")["input_ids"], torch.tensor([tokenizer("two")["input_ids"]])],
        tokenizer("|why>")["input_ids"],
        max_new_tokens=4,
    )
    assert result.tokens == by_ids.tokens and by_ids.text == ""
    assert result.text == tokenizer.decode(result.tokens)


def test_a_chat_template_is_used_and_its_system_message_is_the_prefix(bytes_model):
    model, _ = bytes_model
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content }}]{% else %}<{{ m.content }}>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    layout = NaiveBayesContexts(model, tokenizer, prefix="Be {context}.").layout
    parts = [tokenizer.decode(part) for part in (layout.head, layout.middle, layout.tail)]
    assert parts == ["[Be {context}.]<", "\n\n", ">A:"]
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match="refuses the prompt .* pass template= .* or leave out prefix"):
        NaiveBayesContexts(model, tokenizer, prefix="x")


def test_a_start_token_stands_in_front_once(bytes_model):
    from tokenizers.processors import TemplateProcessing

    model, _ = bytes_model
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 256)]
    )
    assert tokenizer("x")["input_ids"][0] == 256
    assert NaiveBayesContexts(model, tokenizer, template="{context}{question}").layout.head == [256]
    assert NaiveBayesContexts(model, tokenizer, template="<|end|>{context}{question}").layout.head == [256]


def test_stop_strings(bytes_model):
    model, tokenizer = bytes_model
    reader = NaiveBayesContexts(model, tokenizer, template="{context}{question}", beta=0.0)
    whole = reader.generate(["abc"], "d", max_new_tokens=20)
    letters = [tokenizer.decode([token]) for token in whole.tokens]
    place = next(i for i, letter in enumerate(letters) if i > 0 and letter.isascii() and letter.isalpha())
    stop = letters[place]
    result = reader.generate(["abc"], "d", max_new_tokens=20, stop_strings=[stop])
    assert result.text.endswith(stop)
    assert result.tokens == whole.tokens[: letters.index(stop) + 1]
    with pytest.raises(ValueError, match="stop_strings needs a tokenizer"):
        NaiveBayesContexts(model).generate([[5]], [6], max_new_tokens=2, stop_strings=["a"])


def test_long_contexts_are_split_where_the_caller_says_so(bytes_model):
    model, tokenizer = bytes_model
    text = "First one.\n\nSecond paragraph here, longer.\n\nThird."
    reader = NaiveBayesContexts(model, tokenizer, template="{context}{question}")
    with pytest.raises(ValueError, match=r"contexts\[1\] has 50 tokens; .* that is \d+ more than the 64 .*split=True"):
        reader.generate(["short", text], "and what is it?", max_new_tokens=10)
    result = reader.generate(["short", text], "and what is it?", max_new_tokens=10, split=True)
    assert [source.context for source in result.sources] == [0, 1, 1]
    assert [text[s.start : s.end] for s in result.sources[1:]] == [text[:10], text[12:]]
    by_ids = reader.prepare([[5] * 100], split=True, room=44)
    assert [(s.start, s.end) for s in by_ids.sources] == [(0, 20), (20, 40), (40, 60), (60, 80), (80, 100)]


def test_the_answer_ends_where_the_longest_row_is_full(bytes_model):
    model, tokenizer = bytes_model
    reader = NaiveBayesContexts(model, tokenizer, template="{context}{question}")
    assert len(reader.generate(["a" * 50], "?").tokens) <= 13
    with pytest.raises(ValueError, match=r"20 for the answer that is 7 more than the 64"):
        reader.prepare(["a" * 50]).answer("?", max_new_tokens=20)


# Bad input


@pytest.mark.parametrize(
    ("parts", "question", "error", "message"),
    [
        ([], "q", ValueError, "at least one context, got none"),
        ("text", "q", TypeError, r"a single text: pass \[text\]"),
        (["a", "  "], "q", ValueError, r"contexts\[1\] is empty"),
        (["a", []], "q", ValueError, r"contexts\[1\] is empty"),
        (["a"], " ", ValueError, "question is empty"),
        ([1.5], "q", TypeError, r"contexts\[0\] must be text or 1-D token ids"),
    ],
)
def test_bad_contexts(bytes_model, parts, question, error, message):
    reader = NaiveBayesContexts(*bytes_model, template="{context}{question}")
    with pytest.raises(error, match=message):
        reader.generate(parts, question, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_beams": 2}, ValueError, "num_beams=2 is not possible .* token by token"),
        ({"num_return_sequences": 3, "do_sample": True}, ValueError, "another seed"),
        ({"guidance_scale": 1.5}, ValueError, "beta = guidance_scale - 1"),
        ({"max_length": 9}, ValueError, "pass max_new_tokens"),
        ({"cache_implementation": "static"}, ValueError, "growing caches"),
        ({"prompt_lookup_num_tokens": 3}, ValueError, "one prompt"),
        ({"use_cache": False}, ValueError, "every row is kept in a cache"),
        ({"input_ids": torch.ones(1, 1)}, TypeError, "input_ids is set by NaiveBayesContexts itself"),
        ({"temprature": 2.0}, TypeError, "temprature is no option of generate"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1, got 0"),
    ],
)
def test_options_for_one_prompt_are_refused_before_anything_is_read(llama, options, error, message):
    counting = Counting(llama)
    try:
        with pytest.raises(error, match=message):
            NaiveBayesContexts(llama, **ROOM).generate([[5]], [6], **{"max_new_tokens": 2, **options})
    finally:
        counting.handle.remove()
    assert counting.calls == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": -2.0}, ValueError, "beta must be"),
        ({"eta": -1.0}, ValueError, "eta must be"),
        ({"max_padding": -0.1}, ValueError, "max_padding must be >= 0, got -0.1"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens must be >= 1"),
        ({"max_length": 0}, ValueError, "max_length must be >= 1"),
        ({"template": "{context}{question}"}, TypeError, "template needs a tokenizer"),
        ({"prefix": "text"}, TypeError, "prefix is text, which needs a tokenizer"),
    ],
)
def test_bad_settings(llama, options, error, message):
    with pytest.raises(error, match=message):
        NaiveBayesContexts(llama, **options)


@pytest.mark.parametrize("template", ["{question}{context}", "{context}", "{context}{context}{question}", ""])
def test_templates_without_their_places(bytes_model, template):
    with pytest.raises(ValueError, match="template must hold {context} once and {question} once behind it"):
        NaiveBayesContexts(*bytes_model, template=template)


def test_models_that_cannot_be_used():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        NaiveBayesContexts(t5)
    with pytest.raises(TypeError, match="Copyist has no key/value cache"):
        NaiveBayesContexts(Copyist(tiny_config()))

    class Forgetful(type(tiny_llama())):
        def forward(self, *args, past_key_values=None, **kwargs):
            return super().forward(*args, **{**kwargs, "use_cache": False})

    with pytest.raises(ValueError, match="Forgetful returned no cache"):
        NaiveBayesContexts(Forgetful(tiny_config())).generate([[5]], [6], max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep must be >= 1, got 0"),
        ({"by": "luck"}, ValueError, "by must be likelihood or entropy, got 'luck'"),
        ({"max_entropy": 0.0}, ValueError, "max_entropy must be above 0"),
        ({"refusals": "I cannot"}, TypeError, "a sequence of texts, got the single text"),
    ],
)
def test_bad_selections(options, error, message):
    with pytest.raises(error, match=message):
        Selection(**options)
