"""Compiled loops of the trainer against dictionaries, regular expressions and all possible cuts."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.kernels import cuts, ngrams, pieces
from danlu.tokens.counting import GramTable, Runs
from danlu.tokens.mapping import _digits
from danlu.tokens.pruning import Pieces, _Model
from reference import bytepiece_dense

TEXT = st.text(st.sampled_from("ab\n07٣é中😀𝟘\r\u2028\x00"), max_size=60)


def array_of(content: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(content), np.uint8)


def chunks_of(data: np.ndarray, characters: int, newlines: int, isolate: bool) -> list[bytes]:
    start, found = 0, []
    while start < data.size:
        end = ngrams.training_chunk_end(data, start, data.size, characters, newlines, isolate, _digits())
        found.append(data[start:end].tobytes())
        start = end
    return found


def pattern(characters: int, newlines: int, isolate: bool) -> str:
    if isolate:
        return rf"\d|[^\n\d]{{,{characters}}}\n{{1,{newlines}}}|[^\n\d]{{1,{characters}}}"
    return rf".{{,{characters}}}\n{{1,{newlines}}}|.{{1,{characters}}}"


@settings(max_examples=400, deadline=None)
@given(TEXT, st.integers(1, 7), st.integers(1, 4), st.booleans())
def test_chunks_are_those_of_the_regular_expression(text, characters, newlines, isolate):
    expected = [found.encode() for found in re.findall(pattern(characters, newlines, isolate), text)]
    assert chunks_of(array_of(text.encode()), characters, newlines, isolate) == expected


def test_every_digit_of_unicode_is_isolated():
    digits = [chr(code) for code in range(0x110000) if chr(code).isdecimal()]
    text = "x".join(digits) + "x²½Ⅷ"
    expected = [found.encode() for found in re.findall(pattern(10000, 100, True), text)]
    assert chunks_of(array_of(text.encode()), 10000, 100, True) == expected


def test_chunks_at_the_published_limits():
    text = "é" * 10001 + "\n" + "b" * 10000 + "\n" * 101 + "c" * 9999 + "\n" * 100 + "d" * 30000 + "\n" * 250
    expected = [found.encode() for found in re.findall(pattern(10000, 100, False), text)]
    assert chunks_of(array_of(text.encode()), 10000, 100, False) == expected


def runs_of(texts: list[bytes], order: int, tmp_path) -> Runs:
    """Each text is one chunk, counted on its own, and the runs are merged."""
    runs = Runs(1 << 30, tmp_path)
    for text in texts:
        runs.add(*ngrams.count_keys(array_of(text), np.array([len(text)]), order, 10000, 100, False, np.zeros(1, bool)))
    return runs


def grams_of(texts: list[bytes], length: int) -> Counter:
    return Counter(text[i : i + length] for text in texts for i in range(len(text) - length + 1))


def log_count(table: GramTable, gram: bytes) -> float:
    """Log count of a gram of one to seven bytes as the table has it, -inf where it has none."""
    if len(gram) == 1:
        return table.ones[gram[0]]
    if len(gram) == 2:
        return table.twos[int.from_bytes(gram, "big")]
    at = ngrams.find(np.uint64(int.from_bytes(gram, "big")), *table.layout[len(gram)], table.slots)
    return -np.inf if at < 0 else table.logs[table.slots.view(np.int32)[2 * at + len(gram) - 1]]


@pytest.mark.parametrize("order", range(1, 8))
@pytest.mark.parametrize("min_count", [1, 2, 5])
def test_table_holds_the_counts_of_all_grams(order, min_count, tmp_path):
    draw = np.random.default_rng(order)
    texts = [bytes(draw.choice([0, 1, 97, 98, 255], size=size).astype(np.uint8)) for size in (1, 2, 3, 5, 8, 300, 900)]
    table = GramTable.from_runs(runs_of(texts, order, tmp_path), order, min_count)
    absent = 256 - len(grams_of(texts, 1))
    assert table.log_total == np.log(sum(map(len, texts)) + absent)
    codes = table.slots.view(np.int32)
    for length in range(1, order + 1):
        counts = grams_of(texts, length)
        for gram in map(bytes, itertools.product([0, 1, 97, 98, 255], repeat=length)):
            count = counts[gram] if length > 1 else max(1, counts[gram])
            kept = count > 0 and (length == 1 or count >= min_count)
            assert log_count(table, gram) == (np.log(count) if kept else -np.inf), (gram, count)
            if kept and length > 3:
                at = ngrams.find(np.uint64(int.from_bytes(gram, "big")), *table.layout[length], table.slots)
                own = [table.logs[code] for code in codes[2 * at + 2 : 2 * at + length]]
                assert own == [log_count(table, gram[-short:]) for short in range(3, length + 1)]


def test_counts_too_large_for_their_own_place_are_kept_exactly(tmp_path):
    texts = [b"a" * 9000 + b"bcd" * 300] * 12
    table = GramTable.from_runs(runs_of(texts, 6, tmp_path), 6, 2)
    assert 12 * 8995 > ngrams.SMALL_COUNTS
    for gram in (b"aaa", b"aaaa", b"aaaaaa", b"aab", b"bcdbcd"):
        assert log_count(table, gram) == np.log(grams_of(texts, len(gram))[gram])


def test_counting_outgrows_its_first_table(tmp_path):
    text = np.random.default_rng(0).integers(0, 256, 20000, dtype=np.uint8).tobytes().replace(b"\n", b"")[:9900]
    keys, counts = ngrams.count_keys(array_of(text), np.array([len(text)]), 7, 10000, 100, False, np.zeros(1, bool))
    assert (keys[1:] > keys[:-1]).all() and counts.sum() == len(text)
    assert len(keys) == len(grams_of([text], 7)) + 6


def test_merging_adds_up_common_keys():
    keys, counts = np.zeros(5, np.uint64), np.zeros(5, np.int64)
    first = np.array([1, 5, 9], np.uint64), np.array([1, 2, 3])
    second = np.array([5, 7], np.uint64), np.array([10, 20])
    assert ngrams.merge_keys(*first, *second, keys, counts) == 4
    assert keys[:4].tolist() == [1, 5, 7, 9] and counts[:4].tolist() == [1, 12, 20, 3]


def cut(table: GramTable, text: bytes, ensure_unicode: bool) -> Counter:
    _, entries, arena, used = cuts.count_cut_pieces(
        array_of(text), np.array([len(text)]), 10000, 100, False, np.zeros(1, bool), table.order, ensure_unicode,
        table.ones, table.twos, table.layout, table.slots, table.slots.view(np.int32), table.logs, table.log_total,
    )  # fmt: skip
    return Counter({arena[at : at + size].tobytes(): int(count) for at, size, count in entries[: used[0]]})


def score(table: GramTable, cuts: list[bytes], ensure_unicode: bool) -> float:
    total = 0.0
    for piece in cuts:
        if ensure_unicode and 0x80 <= piece[0] < 0xC0:
            return -np.inf
        for i in range(len(piece)):
            context = piece[max(0, i + 1 - table.order) : i + 1]
            before = log_count(table, context[:-1]) if len(context) > 1 else table.log_total
            if log_count(table, context) == -np.inf:
                return -np.inf
            total += log_count(table, context) - before
    return total


def all_cuts(text: bytes):
    for bits in range(1 << (len(text) - 1)):
        places = [0, *(i for i in range(1, len(text)) if bits >> (i - 1) & 1), len(text)]
        yield [text[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("order", [2, 3, 4, 6, 7])
@pytest.mark.parametrize("ensure_unicode", [False, True])
def test_no_cut_is_better_than_the_one_found(order, ensure_unicode, tmp_path):
    draw = np.random.default_rng(order)
    alphabet = np.frombuffer("abé".encode(), np.uint8)
    texts = [bytes(draw.choice(alphabet, size=40)) for _ in range(4)] + [b"abab\xc3\xa9" * 6]
    table = GramTable.from_runs(runs_of(texts, order, tmp_path), order, 2)
    for size in (1, 2, 3, 7, 12, 12, 12):
        text = bytes(draw.choice(alphabet, size=size))
        scores = {tuple(cuts): score(table, cuts, ensure_unicode) for cuts in all_cuts(text)}
        best = max(scores.values())
        found = cut(table, text, ensure_unicode)
        # The counter has lost the order; every cut with the same pieces is a candidate.
        same = [value for cuts, value in scores.items() if Counter(cuts) == found]
        assert same and (max(same) == pytest.approx(best, abs=1e-9) or best == -np.inf)


def test_a_dead_end_leaves_single_bytes_behind_it(tmp_path):
    table = GramTable.from_runs(runs_of([b"the the the " * 20, "中".encode()], 6, tmp_path), 6, 2)
    text = b"the the " + "中".encode() + b"the "
    found = cut(table, text, True)
    # From the first continuation byte on every byte is a piece: no state has a score any more.
    assert found == Counter([b"the the ", *(bytes([byte]) for byte in text[8:])])
    assert cut(table, text, False)[b"the "] + cut(table, text, False)[b"the the "] > 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=5), st.integers(1, 1 << 40)), max_size=40))
def test_counter_adds_up_weights(items):
    expected: Counter = Counter()
    for piece, weight in items:
        expected[piece] += weight
    data = array_of(b"".join(piece for piece, _ in items))
    offsets = np.cumsum([0, *(len(piece) for piece, _ in items)])
    _, entries, arena, used = pieces.add_pieces(
        pieces.empty_counter(1), data, offsets, np.array([weight for _, weight in items], np.int64)
    )
    assert {arena[at : at + size].tobytes(): count for at, size, count in entries[: used[0]].tolist()} == expected


def test_counter_grows_and_forgets_nothing():
    words = [str(number).encode() for number in range(20000)] * 2
    data, offsets = array_of(b"".join(words)), np.cumsum([0, *map(len, words)])
    counter = pieces.empty_counter(1)
    for _ in range(2):
        counter = pieces.add_pieces(counter, data, offsets, np.ones(len(words), np.int64))
    _, entries, arena, used = counter
    assert used[0] == 20000 and (entries[:20000, 2] == 4).all()
    assert {arena[at : at + size].tobytes() for at, size, _ in entries[:20000]} == set(words)


@pytest.mark.parametrize("order", range(2, 8))
@pytest.mark.parametrize(("decimals", "ensure_unicode"), [(0, False), (0, True), (1, False)])
def test_ties_fall_as_in_the_reference(order, decimals, ensure_unicode, tmp_path):
    """Rounded logarithms make most cuts equal; with one decimal some are equal only once the step is added."""
    draw = random.Random(order)
    alphabet = "aabé"
    texts = ["".join(draw.choices(alphabet, k=60)).encode() for _ in range(12)]
    exact = GramTable.from_runs(runs_of(texts, order, tmp_path), order, 2)
    table = dataclasses.replace(
        exact,
        ones=np.round(exact.ones, decimals),
        twos=np.round(exact.twos, decimals),
        logs=np.round(exact.logs, decimals),
        log_total=round(exact.log_total, decimals),
    )
    logs = {}
    for gram in {text[i : i + j] for text in texts for j in range(1, order + 1) for i in range(len(text) - j + 1)}:
        if log_count(table, gram) > -np.inf:
            before = log_count(table, gram[:-1]) if len(gram) > 1 else table.log_total
            logs[gram] = log_count(table, gram) - before
    for size in range(1, 151):
        text = "".join(draw.choices(alphabet, k=size)).encode()
        assert cut(table, text, ensure_unicode) == Counter(bytepiece_dense.cut(text, order, logs, ensure_unicode))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=7), st.integers(1, 4)), min_size=1, max_size=25), st.data()
)
def test_parts_and_their_ties_are_those_of_the_reference(words, data):
    keep = {bytes([byte]): 1 for byte in range(256)} | {word.encode(): count for word, count in words}
    texts = data.draw(
        st.lists(st.text("abcd", min_size=1, max_size=20).map(str.encode), min_size=1, max_size=8, unique=True)
    )
    model = Pieces.of(sorted(keep), np.array([keep[piece] for piece in sorted(keep)]))
    drop = {text: 3 + number for number, text in enumerate(texts)}
    with ThreadPoolExecutor(1) as pool:
        found = _Model(model, pool, 1)._parts(model.counts, Pieces.of(list(drop), np.array(list(drop.values()))))
    parts = {piece: count for piece, count in zip(sorted(keep), found.tolist(), strict=True) if count}
    assert parts == bytepiece_dense.split_all(keep, drop)
