import random
from collections import Counter

import numpy as np
import pytest

from danlu.kernels import usage
from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.corpus import Shard
from danlu.tokens.mapping import rules
from danlu.tokens.refine import CountUsage
from danlu.tokens.unigram import Unigram, starts_of
from reference import unigram_dense as dense

from .conftest import vocabulary


def _corpus(documents: int = 60) -> list[str]:
    rng = random.Random(1)
    words = ["the cat", "sat on", "the mat", "天气很好", "in 2024", "1999", "né", "watching", "  indented", "of the"]
    return [
        "".join(rng.choice(words) + rng.choice([" ", " ", "\n", ".\n\n"]) for _ in range(80)) for _ in range(documents)
    ]


@pytest.fixture(scope="module")
def trained():
    return {refine: BytePiece.train(_corpus(), 320, refine=refine) for refine in (0, 2)}


def test_a_refined_vocabulary_writes_with_fewer_tokens(trained):
    texts = _corpus(80)[60:]
    sizes = {refine: sum(map(len, made.encode_batch(texts))) for refine, made in trained.items()}
    assert sizes[2] < 0.9 * sizes[0]
    assert trained[2].vocab_size <= 320
    assert all(trained[2].decode(trained[2].encode(text)) == text for text in texts)


def test_pieces_keep_the_rules(trained):
    isolated = BytePiece.train(_corpus(), 320, refine=2, isolate_digits=True)
    for made in (trained[2], isolated):
        for piece in made.vocabulary.pieces:
            assert b"\n" not in piece.rstrip(b"\n")
            assert len(piece) == 1 or piece.decode()
    assert not any(len(p) > 1 and any(c.isdecimal() for c in p.decode()) for p in isolated.vocabulary.pieces)
    short = BytePiece.train(_corpus(), 320, refine=2, max_piece_length=5)
    assert max(map(len, short.vocabulary.pieces)) == 5
    assert any(any(c.isdecimal() for c in p.decode()) for p in trained[2].vocabulary.pieces if len(p) > 1)


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 3, "shard_bytes": 999}, {"shard_bytes": 200}])
def test_workers_shards_and_order_change_nothing(trained, options):
    texts = _corpus()
    random.Random(5).shuffle(texts)
    assert BytePiece.train(texts, 320, refine=2, **options) == trained[2]


def test_counts_are_those_of_its_own_use(trained):
    made = trained[2]
    used = Counter(piece for text in _corpus() for piece in made.tokenize(text))
    # The last counts were taken under scores of the step before; use under the scores of these may differ a little.
    counts = dict(zip(made.vocabulary.pieces, made.vocabulary.counts.tolist(), strict=True))
    assert sum(abs(counts[p] - max(used[p], 1)) for p in counts) < 0.02 * sum(counts.values())


@pytest.mark.parametrize("isolate_digits", [False, True])
def test_usage_and_pairs_are_counted_within_chunks(isolate_digits):
    made = vocabulary()
    model = Unigram(made.pieces, made.scores)
    text = "the watching of 天气 12 ab\n\nan né 3\n" * 3
    data = np.frombuffer(text.encode(), np.uint8)
    found = CountUsage(model, isolate_digits, True)(Shard(data, np.array([40, data.size])))
    scores = dict(zip(made.pieces, made.scores.tolist(), strict=True))
    singles, pairs = Counter(), Counter()
    for document in (bytes(data[:40]), bytes(data[40:])):
        for line in dense.chunks(document):
            cut, parts = b"", []
            for byte in line:
                if isolate_digits and chr(byte).isdigit():
                    parts += [cut, bytes([byte])]
                    cut = b""
                else:
                    cut += bytes([byte])
            for chunk in [*parts, cut]:
                pieces = dense.best(chunk, scores)
                singles.update(pieces)
                pairs.update(zip(pieces, pieces[1:], strict=False))
    assert {p: c for p, c in zip(made.pieces, found["counts"].tolist(), strict=True) if c} == dict(singles)
    keys = found["keys"].tolist()
    assert keys == sorted(keys)
    named = {(made.pieces[key >> 32], made.pieces[key & 0xFFFFFFFF]) for key in keys}
    assert dict(zip(((made.pieces[k >> 32], made.pieces[k & 0xFFFFFFFF]) for k in keys), found["tallies"].tolist(),
                    strict=True)) == dict(pairs)  # fmt: skip
    assert len(named) == len(pairs)


def test_many_pairs_make_the_table_grow():
    made = vocabulary()
    model = Unigram(made.pieces, made.scores)
    data = np.random.default_rng(0).integers(0, 256, 400_000).astype(np.uint8)
    data[data == 10] = 0
    data.setflags(write=False)
    counts = np.zeros(len(made), np.int64)
    keys, tallies = usage.count_usage(
        data, np.array([data.size]), *rules(False),
        model.links, model.unit_scores, model.ended, model.longest, counts, True,
    )  # fmt: skip
    assert len(set(keys.tolist())) == keys.size > 60_000
    # Every piece but the last of a chunk begins a pair.
    assert counts.sum() - tallies.sum() < 0.001 * counts.sum()


def test_parts_without_equals_the_best_of_all_other_segmentations():
    rng = random.Random(2)
    words = {bytes(rng.choices(b"ab", k=rng.randint(2, 7))): rng.choice([1, 5, 30, 200]) for _ in range(40)}
    made = vocabulary(words)
    model = Unigram(made.pieces, made.scores)
    parts = np.zeros(len(made), np.int64)
    data = np.frombuffer(b"".join(made.pieces), np.uint8)
    usage.parts_without(data, starts_of(model.lengths), model.links, model.unit_scores, parts)
    scores = dict(zip(made.pieces, made.scores.tolist(), strict=True))
    for piece, count in zip(made.pieces, parts.tolist(), strict=True):
        if len(piece) == 1:
            assert count == 1
            continue
        others = [path for path in dense.segmentations(piece, scores) if len(path) > 1]
        top = max(dense.score(path, scores) for path in others)
        assert count in {len(path) for path in others if dense.score(path, scores) >= top - 1e-9}


@pytest.mark.parametrize("rounds", [-1, 1.5])
def test_wrong_rounds(rounds):
    with pytest.raises((ValueError, TypeError), match="refine must be"):
        BytePiece.train(["text"], 300, refine=rounds)
