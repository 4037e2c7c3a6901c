"""Rows of tokens: what is in them, in which order, whatever the text is stored in."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from transformers import LlamaConfig, LlamaForCausalLM

from danlu.training.data import LiveRows, Rows, tokenize
from danlu.training.tables import Positions, Source
from danlu.training.texts import documents
from reference.tiny import byte_tokenizer

END = 256


def joined(source: Source, **options) -> list[str]:
    return ["".join(parts) for parts in documents(source, **options)]


@pytest.fixture
def ids():
    """Six documents of 1 to 6 tokens, each with its end token: 27 ids."""
    return np.array([x for n in range(1, 7) for x in [*range(10 * n, 10 * n + n), END]], np.uint16)


def test_documents_come_from_text_folders_json_lines_and_tables(tmp_path):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first ü", encoding="utf-8")
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "one"}\n\n{"text": "two", "n": 1}\n', encoding="utf-8")
    table = tmp_path / "rows.csv"
    table.write_text("body,n\nalpha,1\nbeta,2\n", encoding="utf-8")
    assert joined(Source(files=(str(tmp_path),))) == ["first ü", "second"]
    assert joined(Source(files=(str(tmp_path / "*.txt"), str(lines)))) == ["first ü", "second", "one", "two"]
    assert joined(Source(files=(str(lines),)), limit=1) == ["one"]
    assert joined(Source(files=(str(table),), field="body")) == ["alpha", "beta"]


def test_a_local_data_set_is_read_by_its_folder(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert joined(Source(dataset=str(tmp_path))) == ["one", "two"]
    with pytest.raises(ValueError, match="column 'body', got text; set field"):
        joined(Source(dataset=str(tmp_path), field="body"))
    with pytest.raises(ValueError, match="cannot load data set 'no-such-set'"):
        joined(Source(dataset="no-such-set"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "does not exist; give a file, a folder or a pattern"),
        ("x.jsonl", b'{"other": 1}', "line 1 must be a JSON object with 'text'"),
        ("x.jsonl", b'{"text": 1}', "'text' must be text, got int"),
        ("x.txt", b"ok \xff", "UTF-8"),
    ],
)
def test_sources_that_cannot_be_read_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        joined(Source(files=(str(path),)))


def test_tokens_are_written_once_and_documents_end(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("ab\n", encoding="utf-8")
    source = Source(files=(str(path), str(path)))
    tokenizer = byte_tokenizer()
    found = tokenize(source, tokenizer, tmp_path / "ids")
    one = [*tokenizer("ab\n")["input_ids"], tokenizer.eos_token_id]
    assert found.tolist() == one * 2
    tokenize(source, tokenizer, tmp_path / "ids")
    assert len(list((tmp_path / "ids").iterdir())) == 1
    path.write_text("longer", encoding="utf-8")
    assert len(tokenize(source, tokenizer, tmp_path / "ids")) == 14


def test_long_documents_are_cut_at_line_feeds_without_losing_a_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("danlu.training.data.PIECE", 50)
    monkeypatch.setattr("danlu.tokens.idfiles._BLOCK", 64)
    text = "".join(f"word {i} ü\n" * (i % 3 + 1) for i in range(60)) + "x" * 200
    path = tmp_path / "x.txt"
    path.write_text(text, encoding="utf-8")
    tokenizer = byte_tokenizer()
    found = tokenize(Source(files=(str(path),)), tokenizer, tmp_path)
    assert tokenizer.decode(found[:-1].tolist()) == text


def test_empty_sources_and_tokenizers_without_an_end_are_refused(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("", encoding="utf-8")
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="must hold text, got none in .*x.txt"):
        tokenize(Source(files=(str(path),)), tokenizer, tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an end token"):
        tokenize(Source(files=(str(path),)), tokenizer, tmp_path)


def test_every_pass_holds_every_row_once_in_another_order(ids):
    rows = Rows(ids, END, length=5, count=13, seed=1)
    assert rows.rows_per_pass == 5
    items = [tuple(rows[i]["input_ids"].tolist()) for i in range(13)]
    straight = [tuple(ids[i : i + 5].tolist()) for i in range(0, 25, 5)]
    assert sorted(items[:5]) == sorted(items[5:10]) == sorted(straight)
    assert items[:5] != items[5:10]
    # Any row of any pass can be asked for first, as a resumed run does.
    assert tuple(Rows(ids, END, length=5, count=13, seed=1)[12]["input_ids"].tolist()) == items[12]
    assert [tuple(rows[i]["input_ids"].tolist()) for i in range(13)] == items


def test_documents_of_one_row_each_are_padded_and_not_counted(ids):
    rows = Rows(ids, END, length=4, packing="none", pad=7)
    assert rows.rows_per_pass == 6
    first, last = rows[0], rows[5]
    assert first["input_ids"].tolist() == [10, END, 7, 7]
    assert first["labels"].tolist() == [10, END, -100, -100]
    assert first["attention_mask"].tolist() == [1, 1, 0, 0]
    assert last["input_ids"].tolist() == [60, 61, 62, 63]


def test_packed_documents_do_not_see_each_other():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=2, initializer_range=0.3)  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    first, second = [1, 2, 3, END], [4, 5, 6, 7, 8, END]
    item = Rows(np.array([*first, *second]), END, length=10, packing="documents")[0]
    assert item["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert item["labels"].tolist() == [1, 2, 3, END, -100, 5, 6, 7, 8, END]
    batch = default_collate([item, item])
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    alone = [model(torch.tensor([document])).logits[0] for document in (first, second)]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-12)


@pytest.mark.parametrize("kind", ["subset", "equal_mean"])
def test_randomised_positions_depend_on_the_row_alone(ids, kind):
    positions = Positions(kind=kind, max_length=99 if kind == "subset" else None)
    rows = Rows(ids, END, length=5, count=10, seed=4, positions=positions)
    drawn = [rows[i]["position_ids"] for i in range(10)]
    assert torch.equal(Rows(ids, END, length=5, count=10, seed=4, positions=positions)[7]["position_ids"], drawn[7])
    assert not torch.equal(drawn[0], drawn[5])
    assert all((row.diff() > 0).all() for row in drawn)
    assert rows[0]["attention_mask"].tolist() == [1] * 5


def test_rows_are_kept_evenly_for_validation(ids):
    rows = Rows(ids, END, length=5)
    rows.keep_evenly(2)
    assert len(rows) == 2
    assert [rows[i]["input_ids"][0].item() for i in range(2)] == [ids[0], ids[20]]


def test_a_text_shorter_than_a_row_is_refused():
    with pytest.raises(ValueError, match="data.train must hold at least one row of 8 tokens, got 5 tokens"):
        Rows(np.arange(5), END, length=8, name="data.train")


def test_live_rows_hold_the_same_tokens_and_repeat(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [f"document {i} " * (i % 4 + 1) for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer = byte_tokenizer()
    made = {"length": 8, "packing": "documents", "seed": 0, "limit": None, "buffer": 4}
    source = Source(files=(str(path),))
    flat = tokenize(source, tokenizer, tmp_path)
    wanted = {tuple(flat[i : i + 8].tolist()) for i in range(0, len(flat) - 7, 8)}

    def take(count):
        return [row for row, _ in zip(LiveRows(source, tokenizer, **made), range(count), strict=False)]

    rows = take(len(wanted) - 4)
    assert {tuple(row["input_ids"].tolist()) for row in rows} <= wanted
    assert [row["input_ids"].tolist() for row in take(9)] == [row["input_ids"].tolist() for row in rows[:9]]
    assert {"position_ids", "labels"} <= set(rows[0])
    with pytest.raises(ValueError, match="must hold text"):
        path.write_text("", encoding="utf-8")
        take(1)
