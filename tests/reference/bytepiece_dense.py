"""Training of a byte-level unigram vocabulary, spelled out with dictionaries. Slow and obvious."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

import numpy as np

NEVER = -np.inf


def chunks(text: str, isolate_digits: bool = False, longest: int = 10000, normalize: bool = True) -> list[bytes]:
    if normalize:
        text = unicodedata.normalize("NFC", text)
    line = rf"[^\n\d]{{0,{longest}}}\n{{1,100}}|[^\n\d]{{1,{longest}}}"
    plain = rf"[^\n]{{0,{longest}}}\n{{1,100}}|[^\n]{{1,{longest}}}"
    return [chunk.encode() for chunk in re.findall(r"\d|" + line if isolate_digits else plain, text)]


def log_probabilities(texts: Iterable[bytes], order: int, min_count: int) -> dict[bytes, float]:
    """log p(last byte | the bytes before it) of every gram that is kept."""
    counts = Counter(text[i : i + j] for text in texts for j in range(1, order + 1) for i in range(len(text) - j + 1))
    for byte in range(256):
        counts.setdefault(bytes([byte]), 1)
    counts[b""] = sum(count for gram, count in counts.items() if len(gram) == 1)
    logs = {gram: np.log(count) for gram, count in counts.items() if len(gram) < 2 or count >= min_count}
    return {gram: logs[gram] - logs[gram[:-1]] for gram in logs if gram}


def cut(text: bytes, order: int, logs: dict[bytes, float], ensure_unicode: bool) -> list[bytes]:
    """Viterbi over states j, "number j of its piece"; the last state is "order - 1 or later"."""
    states = range(order)
    best: list[list[float]] = []
    origin: list[list[int]] = []
    for i, byte in enumerate(text):
        node = [logs.get(text[i - j : i + 1], NEVER) if j <= i else NEVER for j in states]
        if ensure_unicode and 0x80 <= byte < 0xC0:
            node[0] = NEVER
        if i == 0:
            best.append(node)
            origin.append([0] * order)
            continue
        row, came = [], []
        for j in states:
            reach = [best[-1][k] + node[j] if j in (0, min(k + 1, order - 1)) else NEVER for k in states]
            row.append(max(reach))
            came.append(reach.index(max(reach)))
        best.append(row)
        origin.append(came)
    state = best[-1].index(max(best[-1]))
    pieces, end = [], len(text)
    for i in reversed(range(len(text))):
        if state == 0:
            pieces.append(text[i:end])
            end = i
        state = origin[i][state]
    return pieces[::-1]


def split(text: bytes, scores: dict[bytes, float]) -> list[bytes]:
    """The most probable pieces; of equal ones the last piece is as long as can be, at every prefix."""
    longest = max(map(len, scores))
    best = [0.0] + [NEVER] * len(text)
    start = [0] * (len(text) + 1)
    for end in range(1, len(text) + 1):
        for begin in range(max(0, end - longest), end):
            score = best[begin] + scores.get(text[begin:end], NEVER)
            if score > best[end]:
                best[end], start[end] = score, begin
    pieces, end = [], len(text)
    while end:
        pieces.append(text[start[end] : end])
        end = start[end]
    return pieces[::-1]


def split_all(keep: dict[bytes, int], drop: dict[bytes, int]) -> Counter[bytes]:
    total = np.log(sum(keep.values()))
    scores = {piece: np.log(count) - total for piece, count in keep.items()}
    found: Counter[bytes] = Counter()
    for text, count in drop.items():
        for piece in split(text, scores):
            found[piece] += count
    return found


def without_waste(keep: dict[bytes, int]) -> dict[bytes, int]:
    while True:
        size, keep = len(keep), split_all(keep, keep)
        if len(keep) == size:
            return keep


def prune(
    pieces: dict[bytes, int], sizes: Iterable[int], min_count: int, max_piece_length: int
) -> dict[int, dict[bytes, int]]:
    pieces = {bytes([byte]): 1 for byte in range(256)} | pieces
    good = {p for p, n in pieces.items() if len(p) == 1 or (len(p) <= max_piece_length and n >= min_count)}
    keep = {p: n for p, n in pieces.items() if p in good}
    keep = Counter(keep) + split_all(keep, {p: n for p, n in pieces.items() if p not in good})
    keep = without_waste(keep)
    results = {}
    for size in sorted(set(sizes), reverse=True):
        if len(keep) > size - 3:
            ranked = sorted(keep, key=lambda p: (len(p) > 1, -keep[p], -len(p), p))
            stay = {p: keep[p] for p in ranked[: size - 3]}
            keep = Counter(stay) + split_all(stay, {p: keep[p] for p in ranked[size - 3 :]})
            keep = without_waste(keep)
        results[size] = dict(keep)
    return results


def train(
    documents: Iterable[str],
    sizes: Iterable[int],
    order: int = 6,
    min_count: int = 2,
    max_piece_length: int = 36,
    isolate_digits: bool = False,
    ensure_unicode: bool = True,
    normalize: bool = True,
) -> dict[int, dict[bytes, int]]:
    texts = [chunk for document in documents for chunk in chunks(document, isolate_digits, normalize=normalize)]
    logs = log_probabilities(texts, order, min_count)
    pieces = Counter(piece for text in texts for piece in cut(text, order, logs, ensure_unicode))
    return prune(dict(pieces), sizes, min_count, max_piece_length)
