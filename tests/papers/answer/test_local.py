from __future__ import annotations

import asyncio

import pytest
import torch

from danlu.assets import nano_path
from danlu.context.naive_bayes.combine import Settings, combine
from danlu.context.naive_bayes.contexts import NaiveBayesContexts
from danlu.hosts.loading import load_causal_lm
from danlu.papers.answer import local
from danlu.papers.answer.engines import make
from danlu.papers.answer.local import LocalEngine
from danlu.papers.answer.questions import questions, system_prompt
from danlu.papers.answer.sections import from_abstract, from_text
from danlu.papers.answer.types import EngineRefused
from danlu.papers.settings import EngineSettings

LINE = "The boats of the river are sorted by the sound that they make at night. "
PAPER = from_text(
    "".join(f"{title}\n" + LINE * 8 + "\n" for title in ("Abstract", "1 Introduction", "2 Method", "3 Results"))
)
THREE = questions()[2]


@pytest.fixture(scope="module")
def nano():
    return load_causal_lm(str(nano_path()), device="cpu")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(local, "OUTPUT", 12)


def _answer(engine, paper=PAPER, question=THREE):
    async def go():
        return "".join([piece.text async for piece in engine.answer(paper, question, [])])

    return asyncio.run(go())


def _plain(model, ids, count):
    done = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, attention_mask=torch.ones(1, len(ids))
    )
    return done[0, len(ids) :]


def test_one_section_without_a_contrast_is_plain_decoding(nano, short):
    """n = 1 and beta = 0: the same tokens as the model gives for the same prompt by itself."""
    model, tokenizer = nano
    paper = from_abstract("T", LINE * 2, "")
    engine = LocalEngine(model, tokenizer, beta=0.0)
    reader = engine._load("en")
    context = f"Section Abstract:\n{paper.text.strip()}"
    ids = [*reader.layout.head, *reader.layout.encode(context, "c"), *reader.layout.question(THREE.text)]
    assert _answer(engine, paper) == tokenizer.decode(_plain(model, ids, 12), skip_special_tokens=True)


def test_its_logits_are_those_of_the_model(nano):
    model, tokenizer = nano
    reader = NaiveBayesContexts(model.float(), tokenizer, beta=0.0, top_p=1.0)
    context, question = LINE, THREE.text
    rows = reader.prepare([context]).rows
    with torch.no_grad():
        logits, _ = rows.feed(torch.tensor(reader.layout.question(question)))
    scores = combine(logits, Settings(0.0, 0.1, 1.0)).scores
    ids = [*reader.layout.head, *reader.layout.encode(context, "c"), *reader.layout.question(question)]
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert float((scores - plain).abs().max()) <= 1e-5


def test_naive_bayes_with_the_mean_is_the_textbook_formula():
    logits = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logs = logits.log_softmax(-1)
    scores = combine(logits, Settings(3.0, 0.0, 1.0, "mean")).scores
    assert float((scores - (logs[1:].sum(0) - 3 * logs[0])).abs().max()) <= 1e-12


def test_many_sections_are_read_side_by_side_each_behind_its_heading(nano):
    model, tokenizer = nano
    engine = LocalEngine(model, tokenizer)
    reader = engine._load("en")
    parts = engine.contexts(reader, PAPER, THREE, reader.room_for(THREE.text, 16))
    assert {part.split("\n")[0] for part in parts} == {"Section Abstract:", "Section 2 Method:"} and len(parts) > 2
    assert all("Section " not in part[8:] for part in parts)
    room = reader.max_length - len(reader.layout.head) - reader.room_for(THREE.text, 16)
    assert all(len(reader.layout.encode(part, "p")) <= room for part in parts)
    prepared = reader.prepare(parts, split=True, room=reader.room_for(THREE.text, 16))
    assert len(prepared.sources) == len(parts), "nothing is cut a second time, away from its heading"


def test_of_too_many_parts_those_that_fit_the_question_are_read(nano):
    model, tokenizer = nano
    telling = "We propose an algorithm and a model: this is the method of our approach. "
    text = "Abstract\nShort one.\n1 Introduction\nx\n2 Method\n" + LINE * 60 + telling + LINE * 60 + "\n3 Results\nx\n"
    engine = LocalEngine(model, tokenizer)
    reader = engine._load("en")
    parts = engine.contexts(reader, from_text(text), THREE, reader.room_for(THREE.text, 16))
    assert len(parts) == local.CONTEXTS and any("algorithm" in part for part in parts)
    assert parts[0].startswith("Section Abstract:") or len(parts) == local.CONTEXTS


def test_each_language_has_its_own_instructions(nano, short):
    model, tokenizer = nano
    engine = LocalEngine(model, tokenizer)
    heads = [tuple(engine._load(lang).layout.head) for lang in ("en", "zh", "en")]
    assert heads[0] == heads[2] != heads[1]
    assert _answer(engine, question=questions("zh")[2])


def test_answers_do_not_change_and_a_paper_longer_than_the_model_reads_is_read(nano, short):
    model, tokenizer = nano
    engine = LocalEngine(model, tokenizer)
    assert len(tokenizer(PAPER.text)["input_ids"]) > model.config.max_position_embeddings
    assert _answer(engine).strip() and _answer(engine) == _answer(engine)


def test_an_answer_that_nobody_waits_for_any_more_ends(nano, monkeypatch):
    monkeypatch.setattr(local, "OUTPUT", 60)
    model, tokenizer = nano
    engine, written = LocalEngine(model, tokenizer), []

    class Counting(local._Streamer):
        def put(self, value):
            written.append(value)
            super().put(value)

    monkeypatch.setattr(local, "_Streamer", Counting)

    async def go():
        pieces = engine.answer(PAPER, THREE, [])
        await anext(pieces)
        await pieces.aclose()
        # The lock is free again long before 60 tokens are there.
        await asyncio.wait_for(asyncio.to_thread(engine._lock.acquire), 20)
        engine._lock.release()

    asyncio.run(go())
    assert 2 <= len(written) < 40


def test_a_model_that_is_not_there_is_a_typed_error_without_paths(tmp_path):
    with pytest.raises(EngineRefused) as caught:
        _answer(LocalEngine(str(tmp_path / "none")))
    assert str(tmp_path) not in str(caught.value)


def test_engines_are_made_from_settings():
    assert make(EngineSettings(kind="none")) is None
    assert make(EngineSettings()).name == "extractive"
    endpoint = make(EngineSettings(kind="endpoint", url="http://localhost:1/v1", model="m", context=9000))
    assert (endpoint.name, endpoint.tokens, endpoint.label) == ("endpoint", 9000, "m")
    made = make(EngineSettings(kind="local", model="danlu-nano"))
    assert made.name == "local" and made.label == "danlu-nano"
    keys = {
        make(EngineSettings()).key(),
        endpoint.key(),
        made.key(),
        LocalEngine("other").key(),
        LocalEngine("other", beta=0.5).key(),
    }
    assert len(keys) == 5


def test_a_model_that_reads_little_is_told_its_task_briefly():
    assert len(system_prompt("en", short=True)) < len(system_prompt("en")) / 5
