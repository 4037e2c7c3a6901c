"""Training of byte-level unigram vocabularies: count byte n-grams, cut the text where they say, keep good pieces."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from danlu.kernels import cuts, ngrams, pieces
from danlu.kernels.compiling import announce
from danlu.kernels.split import count_parts
from danlu.kernels.trie import build
from danlu.tokens.corpus import Corpus, files, open_corpus
from danlu.tokens.counting import GramTable, Runs
from danlu.tokens.mapping import Arrays, CountGrams, CutPieces, Task, connected, map_shards
from danlu.tokens.pruning import Pieces, prune
from danlu.tokens.refine import refine
from danlu.tokens.resume import Work
from danlu.tokens.storage import RESERVED
from danlu.tokens.unicode import check_normalization
from danlu.tokens.unigram import cores
from danlu.tokens.vocabulary import Vocabulary

logger = logging.getLogger("danlu.tokens.trainer")

_SMALLEST = 256 + len(RESERVED)
_SHARD_BYTES = 4 << 20

#: Called with how much is done, how much there is (0 when unknown) and what it is.
Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None:
    pass


class BytePieceTrainer:
    """Trains the vocabulary of a byte-level unigram tokenizer.

    A language model of byte n-grams cuts the corpus into its most probable pieces: with C(g) the count of gram g, a
    piece w has log p(w) = sum_j [log C(g_j) - log C(g_j without its last byte)], where g_j are the last ``order``
    bytes of w up to byte j, or all of them where there are fewer. The pieces are counted, and those that the counts
    do not justify are split into others. No step is random, and the vocabulary does not depend on the workers, the
    shards or the order of the documents.

    Vocabulary and counts equal those of the published trainer, with three departures: a corpus that cannot fill the
    vocabulary is refused, an order above 7 too, and without ``normalization`` the text is taken as it is.

    Args:
        vocab_size: tokens in all, with 256 bytes and 3 specials: at least 259. Several sizes give nested vocabularies.
        order: longest n-gram in bytes, 1 to 7; pieces may be longer. With 1 there are only single bytes.
        min_count: n-grams and pieces that occur less often are dropped, at least 1.
        max_piece_length: longest piece in bytes, at least 1.
        isolate_digits: whether every decimal digit stands alone in training, so that no piece holds two.
        ensure_unicode: whether a piece must not begin within a character.
        normalization: ``"nfc"``, or None to take the text as it is.
        workers: threads; None is all cores.
        memory: bytes of which half may hold counts of n-grams before these are kept in files; None is half of the
            machine's. The table of n-grams with ``min_count`` and the distinct pieces must fit in memory beside it.
        work_dir: folder for finished shards; the same training goes on from there when it was interrupted. Only
            ``vocab_size``, ``max_piece_length``, ``workers``, ``memory`` and ``ray`` may differ from the time before.
        refine: rounds of :func:`danlu.tokens.refine.refine` after the published training, 0 for none; 4 are enough.
            Each reads the corpus several times and gives fewer tokens per byte.
        ray: address of a Ray cluster that works instead of threads, or ``"auto"``.
        shard_bytes: about how much text is one piece of work.
        progress: called with (done, total, what); total 0 means that it is not known.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
        ImportError: ``ray`` is given, and Ray is not installed.

    Source: Scientific Spaces archive 9752.
    """

    def __init__(
        self,
        vocab_size: int | Sequence[int],
        *,
        order: int = 6,
        min_count: int = 2,
        max_piece_length: int = 36,
        isolate_digits: bool = False,
        ensure_unicode: bool = True,
        normalization: str | None = "nfc",
        workers: int | None = None,
        memory: int | None = None,
        work_dir: str | os.PathLike[str] | None = None,
        refine: int = 0,
        ray: str | None = None,
        shard_bytes: int = _SHARD_BYTES,
        progress: Progress | None = None,
    ):
        self.sizes = _sizes(vocab_size)
        self.order = _whole("order", order, 1, 7, "6 is a good choice")
        self.min_count = _whole("min_count", min_count, 1)
        self.max_piece_length = _whole("max_piece_length", max_piece_length, 1)
        self.isolate_digits = bool(isolate_digits)
        self.ensure_unicode = bool(ensure_unicode)
        self.normalization = check_normalization(normalization)
        self.workers = cores() if workers is None else _whole("workers", workers, 1)
        self.memory = _half_of_memory() if memory is None else _whole("memory", memory, 1 << 20)
        self.work_dir = None if work_dir is None else Path(work_dir)
        self.refine = _whole("refine", refine, 0)
        if ray is not None and not isinstance(ray, str):
            raise TypeError(f"ray must be an address, such as 'auto', or None, got {ray!r}")
        self.ray = ray
        self.shard_bytes = _whole("shard_bytes", shard_bytes, 1)
        self._progress = progress or _silent
        if self.order == 1:
            logger.warning(
                "order is 1: single bytes tell nothing about their neighbours, so no longer piece will be found"
            )

    def train(self, corpus: Iterable[str] | Iterable[os.PathLike[str]]) -> dict[int, Vocabulary]:
        """Train on a corpus.

        Args:
            corpus: ``pathlib.Path`` objects, each a plain UTF-8 text file, or strings, each a document. Documents are
                read once, so an iterator will do; they are kept in a file while training lasts.

        Returns:
            A vocabulary for every size asked for. It may be smaller than asked for; its note says why.

        Raises:
            TypeError: the corpus is a single string or path, or holds something else.
            ValueError: there is no text, a text is not valid, the corpus is too small for the vocabulary, or
                ``work_dir`` belongs to another training.
            OSError: a file cannot be read.
        """
        with self._folder() as folder:
            opened = open_corpus(corpus, normalization=self.normalization, shard_bytes=self.shard_bytes, folder=folder)
            return self._train(opened, folder)

    def train_files(self, paths: Iterable[str | os.PathLike[str]]) -> dict[int, Vocabulary]:
        """Train on plain UTF-8 text files, whose paths may be strings; otherwise as :meth:`train`."""
        if isinstance(paths, str | bytes | os.PathLike):
            raise TypeError(f"paths must be an iterable of paths, got one {type(paths).__name__}: put it in a list")
        with self._folder() as folder:
            opened = files(list(paths), normalization=self.normalization, shard_bytes=self.shard_bytes)
            return self._train(opened, folder)

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        if self.work_dir is not None:
            self.work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="danlu-", dir=self.work_dir, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def _train(self, corpus: Corpus, folder: Path) -> dict[int, Vocabulary]:
        if self.ray is not None:
            connected(self.ray)
        for loop in (ngrams.count_table, cuts.count_cut_pieces, build, count_parts):
            announce(loop)
        work = None if self.work_dir is None else Work(self.work_dir, self._settings(corpus))
        runs = Runs(self.memory // 2, folder, np.uint32 if corpus.size < 1 << 30 else np.int64)
        for arrays in self._map("n-grams", CountGrams(self.order, self.isolate_digits), corpus, work):
            runs.add(arrays["keys"], arrays["counts"])
        self._check_size(runs.total)
        table = GramTable.from_runs(runs, self.order, self.min_count)
        del runs, arrays
        counter = pieces.empty_counter(1 << 10)
        for arrays in self._map("pieces", CutPieces(table, self.isolate_digits, self.ensure_unicode), corpus, work):
            counter = pieces.add_pieces(counter, arrays["data"], arrays["offsets"], arrays["counts"])
        del table, arrays
        pruned = self._prune(counter)
        return {size: self._refined(vocabulary, size, corpus) for size, vocabulary in pruned.items()}

    def _refined(self, vocabulary: Vocabulary, size: int, corpus: Corpus) -> Vocabulary:
        if not self.refine:
            return vocabulary
        passes = 0

        def run(task: Task) -> Iterator[Arrays]:
            nonlocal passes
            passes += 1
            shards = map_shards(task, corpus, range(len(corpus)), workers=self.workers, ray=self.ray)
            for done, (_, arrays) in enumerate(shards, 1):
                yield arrays
                self._progress(done, len(corpus), f"refining, pass {passes}")

        return refine(
            vocabulary,
            size - len(RESERVED),
            self.refine,
            run,
            isolate_digits=self.isolate_digits,
            ensure_unicode=self.ensure_unicode,
            max_piece_length=self.max_piece_length,
            min_count=self.min_count,
        )

    def _map(self, what: str, task: Task, corpus: Corpus, work: Work | None) -> Iterator[Arrays]:
        """The task's results on all shards; those found in the work folder are not computed again."""
        total = len(corpus)
        label = f"counting {what}"
        self._progress(0, total, label)
        todo = []
        for index in range(total):
            found = work.load(what, index) if work else None
            if found is None:
                todo.append(index)
                continue
            yield found
            self._progress(index + 1 - len(todo), total, label)
        done = total - len(todo)
        for index, arrays in map_shards(task, corpus, todo, workers=self.workers, ray=self.ray):
            if work:
                work.save(what, index, arrays)
            yield arrays
            done += 1
            self._progress(done, total, label)

    def _settings(self, corpus: Corpus) -> dict[str, Any]:
        names = ("order", "min_count", "isolate_digits", "ensure_unicode", "normalization", "shard_bytes")
        return {name: getattr(self, name) for name in names} | {"corpus": corpus.fingerprint()}

    def _check_size(self, size: int) -> None:
        """Refuse what no corpus of this size can give: a piece that is kept has min_count times two bytes or more."""
        possible = _SMALLEST + size // (2 * self.min_count)
        if max(self.sizes) > possible:
            raise ValueError(
                f"vocab_size must be at most {possible} for a corpus of {size} bytes and min_count={self.min_count}, "
                f"got {max(self.sizes)}: train on more text or ask for less"
            )

    def _prune(self, counter: tuple[np.ndarray, ...]) -> dict[int, Vocabulary]:
        _, entries, arena, used = counter
        entries = entries[: used[0]]
        found = Pieces(arena, entries[:, 0].copy(), entries[:, 1].copy(), entries[:, 2].copy())
        rounds = 0

        def progress(size: int) -> None:
            nonlocal rounds
            rounds += 1
            self._progress(rounds, 0, "pruning")

        pruned = prune(
            found,
            [size - len(RESERVED) for size in self.sizes],
            min_count=self.min_count,
            max_piece_length=self.max_piece_length,
            workers=self.workers,
            progress=progress,
        )
        vocabularies = {}
        for size, (kept, limited) in zip(self.sizes, pruned, strict=True):
            note = _note(size, len(kept) + len(RESERVED), limited)
            if note:
                logger.log(logging.INFO if limited else logging.WARNING, "%s", note)
            vocabularies[size] = Vocabulary.sorted(zip(kept.strings(), kept.counts.tolist(), strict=True), note)
        return vocabularies


def _note(wanted: int, got: int, limited: bool) -> str:
    if got == wanted:
        return ""
    if limited:
        why = "cutting it to size left pieces that it would rather write as several others, and these went too"
    else:
        why = "the corpus has no more pieces that are worth keeping; more text or a lower min_count gives more"
    return f"the vocabulary has {got} tokens instead of {wanted}: {why}"


def _sizes(vocab_size: Any) -> list[int]:
    sizes = [vocab_size] if isinstance(vocab_size, int | np.integer) else vocab_size
    if isinstance(sizes, str | bytes) or not isinstance(sizes, Sequence | np.ndarray):
        raise TypeError(f"vocab_size must be a whole number or a list of them, got {vocab_size!r}")
    if not len(sizes):
        raise ValueError("vocab_size must name at least one size, got an empty list")
    return sorted(
        {_whole("vocab_size", size, _SMALLEST, why="256 bytes and 3 specials are always there") for size in sizes}
    )[::-1]


def _whole(name: str, value: Any, least: int, most: int | None = None, why: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}")
    if value < least or (most is not None and value > most):
        legal = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} must be {legal}, got {value}" + (f": {why}" if why else ""))
    return int(value)


def _half_of_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 4 << 30
