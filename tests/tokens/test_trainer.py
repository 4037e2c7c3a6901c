"""The trainer against the slow reference, against the published trainer, and against itself run otherwise."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from danlu.tokens import mapping
from danlu.tokens.pruning import Pieces, prune
from danlu.tokens.trainer import BytePieceTrainer
from danlu.tokens.vocabulary import Vocabulary
from reference import bytepiece_dense

WORDS = [
    "def ", "return ", "self", ".", "(", ")", ":\n", "    ", "x", "value", "né", "中文", "字", "😀", "12", "٣", "\n\n",
    "#", "e\u0301", "\u0338", "qu",
]  # fmt: skip


def golden_documents(state: int):
    """Text that no version of a random library can change; the published trainer saw the same."""
    for _ in range(120):
        text = ""
        for _ in range(60):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            high = state >> 33
            text += WORDS[high // 67 % len(WORDS)] if high % 67 else chr(0x3400 + high // 67 % 6000)
        yield text


def mixed_documents(seed: int) -> list[str]:
    """Languages, digits, long lines, many line feeds, characters that occur once."""
    draw = random.Random(seed)
    documents = []
    for _ in range(12):
        words = draw.choices(
            [*WORDS, "the ", "ing", " of", "привет", "각", "ß", "2023", "\x00", "\x00\x00", "\r\n"], k=50
        )
        text = "".join(words)
        if draw.random() < 0.3:
            text += chr(draw.randrange(0x4E00, 0x9000)) + "the value"
        documents.append(text)
    documents.append("ab" * 5100 + "é" + "\n" * 230 + "1" * 30 + "\n")
    return documents


def counts_of(vocabulary: Vocabulary) -> dict[bytes, int]:
    return dict(zip(vocabulary.pieces, vocabulary.counts.tolist(), strict=True))


OPTIONS = [
    {},
    {"order": 1},
    {"order": 2, "min_count": 1},
    {"order": 3, "isolate_digits": True, "max_piece_length": 6},
    {"order": 4, "min_count": 4, "ensure_unicode": False},
    {"order": 5, "max_piece_length": 1},
    {"order": 6, "isolate_digits": True, "min_count": 3},
    {"order": 7, "ensure_unicode": False, "min_count": 1, "max_piece_length": 200},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_vocabulary_and_counts_of_the_reference(options, seed):
    documents, sizes = mixed_documents(seed), [900, 420, 330, 259]
    trained = BytePieceTrainer(sizes, workers=1, **options).train(documents)
    expected = bytepiece_dense.train(documents, sizes, **options)
    assert list(trained) == sizes
    for size in sizes:
        assert counts_of(trained[size]) == expected[size]


def test_without_normalisation():
    documents = mixed_documents(3)
    trained = BytePieceTrainer(400, normalization=None, workers=1).train(documents)
    assert counts_of(trained[400]) == bytepiece_dense.train(documents, [400], normalize=False)[400]
    assert counts_of(trained[400]) != counts_of(BytePieceTrainer(400, workers=1).train(documents)[400])


@pytest.mark.parametrize(
    ("seed", "options", "expected"),
    [
        (1, {}, {450: (445, 7758, "84b8099ceffafc2b"), 350: (347, 8400, "76bd2c7fb62be997")}),
        (2, {"order": 4, "min_count": 3, "isolate_digits": True}, {340: (337, 7881, "d2b415a96fe02060")}),
        (3, {"order": 7, "ensure_unicode": False, "max_piece_length": 9}, {500: (491, 5585, "c7f5b427f6023e28")}),
        (4, {"min_count": 1}, {1500: (752, 6564, "69727721a59f5e84")}),
    ],
)
def test_vocabulary_and_counts_of_the_published_trainer(seed, options, expected):
    trained = BytePieceTrainer(list(expected), **options).train(golden_documents(seed))
    for size, (number, total, digest) in expected.items():
        made = trained[size]
        content = b"".join(b"%s\0%d\0" % item for item in zip(made.pieces, made.counts.tolist(), strict=True))
        assert (len(made), made.counts.sum()) == (number, total)
        assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_same_however_it_is_run(tmp_path):
    documents, sizes = mixed_documents(5) * 40, [500, 300]
    expected = BytePieceTrainer(sizes, workers=1).train(documents)
    assert BytePieceTrainer(sizes, workers=4, shard_bytes=700).train(documents) == expected
    assert BytePieceTrainer(sizes, workers=3, shard_bytes=1).train(documents[:13] * 40) == expected
    shuffled = random.Random(0).sample(documents, len(documents))
    assert BytePieceTrainer(sizes, workers=2, shard_bytes=10_000).train(iter(shuffled)) == expected
    paths = []
    for number, text in enumerate(documents):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_bytes(text.encode())
    assert BytePieceTrainer(sizes, shard_bytes=5000).train(paths) == expected
    assert BytePieceTrainer(sizes).train_files(list(map(str, paths))) == expected
    assert BytePieceTrainer([500, 300, 300]).train(tuple(documents)) == expected


def test_same_when_counts_do_not_fit_in_memory(caplog):
    draw = np.random.default_rng(0)
    documents = ["".join(map(chr, draw.integers(0x61, 0x7B, 4000))) for _ in range(60)]
    expected = BytePieceTrainer(400, workers=1).train(documents)
    with caplog.at_level(logging.INFO, logger="danlu.tokens.trainer"):
        spilled = BytePieceTrainer(400, workers=2, memory=1 << 20, shard_bytes=20_000).train(documents)
    assert sum("outgrow the memory limit" in record.message for record in caplog.records) > 2
    assert spilled == expected


def test_several_sizes_are_nested():
    trained = BytePieceTrainer([300, 450, 1200]).train(golden_documents(1))
    assert list(trained) == [1200, 450, 300]
    assert set(trained[300].pieces) < set(trained[450].pieces) < set(trained[1200].pieces)
    for size, made in trained.items():
        assert len(made) <= size - 3 and min(map(len, made.pieces)) == 1 and max(map(len, made.pieces)) <= 36


def test_pieces_write_the_corpus():
    documents = list(golden_documents(2))
    made = BytePieceTrainer(350, normalization=None).train(documents)[350]
    written = sum(len(piece) * count for piece, count in counts_of(made).items())
    # A byte that the cut left nowhere alone counts once more.
    alone = written - sum(len(text.encode()) for text in documents)
    assert 256 - len(set("".join(documents).encode())) <= alone < 256


def test_pruning_conserves_bytes_at_every_size():
    draw = random.Random(1)
    words = {bytes(draw.choices(b"abc", k=draw.randint(1, 9))): draw.randint(1, 30) for _ in range(300)}
    words |= {bytes([byte]): 1 for byte in range(256) if bytes([byte]) not in words}
    pieces = Pieces.of(list(words), np.array(list(words.values())))
    sizes = [400, 300, 257, 256]
    options = {"min_count": 3, "max_piece_length": 6}
    found = prune(pieces, sizes, workers=3, **options)
    expected = bytepiece_dense.prune(words, [size + 3 for size in sizes], **options)
    for size, (kept, limited) in zip(sizes, found, strict=True):
        strings = kept.strings()
        assert strings == sorted(strings) and len(strings) <= size
        assert dict(zip(strings, kept.counts.tolist(), strict=True)) == expected[size + 3]
        assert (kept.lengths * kept.counts).sum() == sum(len(word) * count for word, count in words.items())
        assert limited == (len(expected[403]) > size)


def test_no_piece_begins_within_a_character_or_holds_two_digits():
    documents = list(golden_documents(3))
    whole = BytePieceTrainer(500, isolate_digits=True).train(documents)[500]
    for piece in whole.pieces[256:]:
        assert not 0x80 <= piece[0] < 0xC0
        assert not re.search(r"\d.|.\d", piece.decode(errors="ignore"))
    # Few different last bytes after many different first ones.
    draw = random.Random(1)
    characters = [chr(0x4E00 + 64 * draw.randrange(300) + tail) for tail in range(2) for _ in range(40)]
    documents = ["".join(draw.choice(characters) + draw.choice("ab ") for _ in range(1000)) for _ in range(6)]
    for ensure_unicode in (True, False):
        made = BytePieceTrainer(700, ensure_unicode=ensure_unicode).train(documents)[700]
        assert any(0x80 <= piece[0] < 0xC0 for piece in made.pieces[256:]) is not ensure_unicode


def test_the_note_says_why_it_is_smaller(caplog):
    trained = BytePieceTrainer([1500, 450, 350]).train(golden_documents(1))
    assert "tokens instead of 1500: the corpus has no more pieces that are worth keeping" in trained[1500].note
    assert trained[350].note == "" and len(trained[350]) == 347
    assert "448 tokens instead of 450: cutting it to size left pieces" in trained[450].note
    assert any(trained[1500].note == record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 258}, ValueError, "vocab_size must be at least 259, got 258: 256 bytes and 3 specials"),
        ({"vocab_size": []}, ValueError, "vocab_size must name at least one size"),
        ({"vocab_size": [300, 100]}, ValueError, "vocab_size must be at least 259, got 100"),
        ({"vocab_size": "300"}, TypeError, "vocab_size must be a whole number or a list of them, got '300'"),
        ({"vocab_size": 300.5}, TypeError, "vocab_size must be a whole number or a list"),
        ({"vocab_size": True}, TypeError, "vocab_size must be a whole number, got True"),
        ({"order": 0}, ValueError, "order must be 1 to 7, got 0"),
        ({"order": 8}, ValueError, "order must be 1 to 7, got 8"),
        ({"order": 6.0}, TypeError, "order must be a whole number, got 6.0 of type float"),
        ({"min_count": 0}, ValueError, "min_count must be at least 1, got 0"),
        ({"max_piece_length": 0}, ValueError, "max_piece_length must be at least 1"),
        ({"normalization": "nfkc"}, ValueError, "normalization must be 'nfc' or None, got 'nfkc'"),
        ({"workers": 0}, ValueError, "workers must be at least 1, got 0"),
        ({"memory": 1000}, ValueError, "memory must be at least 1048576, got 1000"),
        ({"shard_bytes": 0}, ValueError, "shard_bytes must be at least 1"),
        ({"ray": True}, TypeError, "ray must be an address, such as 'auto', or None, got True"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        BytePieceTrainer(**{"vocab_size": 300, **options})


def test_wrong_corpora():
    trainer = BytePieceTrainer(300)
    with pytest.raises(TypeError, match="got one str: put it in a list"):
        trainer.train("text")
    with pytest.raises(TypeError, match="paths must be an iterable of paths, got one str"):
        trainer.train_files("text")
    with pytest.raises(ValueError, match="corpus must hold text"):
        trainer.train(iter([]))
    with pytest.raises(
        ValueError, match="vocab_size must be at most 259 for a corpus of 32 bytes and min_count=25, got 300"
    ):
        BytePieceTrainer(300, min_count=25).train(["small corpus"] + ["\n"] * 20)


def test_order_one_warns_and_finds_single_bytes(caplog):
    made = BytePieceTrainer(300, order=1).train(["some text, and some more text " * 20])[300]
    assert len(made) == 256 and "order is 1" in caplog.text


def test_progress_counts_shards_and_rounds():
    calls = []
    BytePieceTrainer(300, workers=2, shard_bytes=3000, progress=lambda *call: calls.append(call)).train(
        golden_documents(1)
    )
    for what in ("counting n-grams", "counting pieces"):
        done = [call[:2] for call in calls if call[2] == what]
        total = done[0][1]
        assert total > 3 and done == [(number, total) for number in range(total + 1)]
    assert [call for call in calls if call[2] == "pruning"][0] == (1, 0, "pruning")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("where", [("counting n-grams", 2), ("counting pieces", 3)])
def test_interrupted_training_goes_on(workers, where, tmp_path, monkeypatch):
    def stop(done, total, what):
        if (what, done) == where:
            raise Interrupted

    options = {"workers": workers, "shard_bytes": 3000, "work_dir": tmp_path / "work"}
    expected = BytePieceTrainer([450, 350]).train(golden_documents(1))
    with pytest.raises(Interrupted):
        BytePieceTrainer([450, 350], progress=stop, **options).train(golden_documents(1))
    finished = sorted((tmp_path / "work").glob("*.safetensors"))
    assert finished and not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]

    worked = []
    for task in (mapping.CountGrams, mapping.CutPieces):
        call = task.__call__
        monkeypatch.setattr(task, "__call__", lambda self, shard, call=call: worked.append(self) or call(self, shard))
    assert BytePieceTrainer([450, 350], **options).train(golden_documents(1)) == expected
    shards = len(list((tmp_path / "work").glob("n-grams-*")))
    assert len(worked) == 2 * shards - len(finished)

    worked.clear()  # everything is there now; other sizes come from the same counts
    assert BytePieceTrainer(350, max_piece_length=9, **options).train(golden_documents(1)) == BytePieceTrainer(
        350, max_piece_length=9
    ).train(golden_documents(1))
    assert len(worked) == 2


def test_another_training_in_the_folder_is_refused(tmp_path):
    options = {"shard_bytes": 3000, "work_dir": tmp_path}
    BytePieceTrainer(350, **options).train(golden_documents(1))
    with pytest.raises(ValueError, match="belongs to another training: corpus is '.*' there .* choose an empty folder"):
        BytePieceTrainer(350, **options).train(golden_documents(2))
    with pytest.raises(ValueError, match="belongs to another training: order is 6 there and 5 now"):
        BytePieceTrainer(350, order=5, **options).train(golden_documents(1))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="has a manifest.json that is not readable"):
        BytePieceTrainer(350, **options).train(golden_documents(1))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has results but no manifest.json"):
        BytePieceTrainer(350, **options).train(golden_documents(1))


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"ray='auto' needs Ray, which is not installed: pip install 'danlu\[ray\]'"):
        BytePieceTrainer(300, ray="auto").train(["text " * 100])


@pytest.mark.slow
def test_same_on_a_ray_cluster():
    pytest.importorskip("ray")
    program = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import ray
        from test_trainer import BytePieceTrainer, golden_documents
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        options = dict(isolate_digits=True, shard_bytes=3000)
        here = BytePieceTrainer([450, 350], **options).train(golden_documents(1))
        there = BytePieceTrainer([450, 350], ray="auto", **options).train(golden_documents(1))
        assert here == there
        ray.shutdown()
        """
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
