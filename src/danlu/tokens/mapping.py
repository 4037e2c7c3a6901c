"""What is done to every shard of a corpus: two tasks, run by threads that share memory or by a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from danlu.kernels import cuts, ngrams
from danlu.tokens.corpus import Corpus, Shard
from danlu.tokens.counting import GramTable

#: Most characters of one line in a chunk, and most line feeds after them, as published.
CHARACTERS = 10_000
NEWLINES = 100

Arrays = dict[str, np.ndarray]


@cache
def _digits() -> np.ndarray:
    """Whether each code point is a decimal digit, as the digit class of regular expressions has it."""
    return np.fromiter((chr(code).isdecimal() for code in range(0x110000)), np.bool_, 0x110000)


def rules(isolate_digits: bool) -> tuple[int, int, bool, np.ndarray]:
    """What compiled loops need to know about chunks: characters, line feeds, whether digits stand alone, and which."""
    return CHARACTERS, NEWLINES, isolate_digits, _digits() if isolate_digits else np.zeros(1, np.bool_)


@dataclass(frozen=True)
class CountGrams:
    """Counts the longest n-grams of a shard: ``keys`` in ascending order and ``counts``."""

    order: int
    isolate_digits: bool

    def __call__(self, shard: Shard) -> Arrays:
        """Count."""
        keys, counts = ngrams.count_keys(shard.data, shard.ends, self.order, *rules(self.isolate_digits))
        return {"keys": keys, "counts": counts}


@dataclass(frozen=True)
class CutPieces:
    """Cuts a shard at its most probable places: ``data`` holds the pieces, ``offsets`` their bounds; and ``counts``."""

    table: GramTable
    isolate_digits: bool
    ensure_unicode: bool

    def __call__(self, shard: Shard) -> Arrays:
        """Cut and count."""
        table = self.table
        _, entries, arena, used = cuts.count_cut_pieces(
            shard.data, shard.ends, *rules(self.isolate_digits), table.order, self.ensure_unicode,
            table.ones, table.twos, table.layout, table.slots, table.slots.view(np.int32), table.logs, table.log_total,
        )  # fmt: skip
        entries = entries[: used[0]]
        offsets = np.append(entries[:, 0], used[1])
        return {"data": arena[: used[1]].copy(), "offsets": offsets, "counts": entries[:, 2].copy()}


#: What is done to a shard; for Ray it must be possible to send it.
Task = Callable[[Shard], Arrays]


def map_shards(
    task: Task, corpus: Corpus, indices: Sequence[int], *, workers: int, ray: str | None
) -> Iterator[tuple[int, Arrays]]:
    """Run a task on some shards.

    Args:
        task: what to do.
        corpus: the shards.
        indices: which of them.
        workers: threads; with Ray it is the cluster's business.
        ray: address of a Ray cluster, ``"auto"`` for the running one or a new one on this machine, or None.

    Yields:
        Number of a shard and what the task gave, in the order in which they are finished. Only a few are held at once.

    Raises:
        ImportError: Ray is wanted and not installed.
    """
    if ray is not None:
        yield from _on_ray(task, corpus, indices, ray)
    elif workers == 1 or len(indices) == 1:
        for index in indices:
            yield index, task(corpus.read(index))
    else:
        yield from _in_threads(task, corpus, indices, workers)


def _in_threads(task: Task, corpus: Corpus, indices: Sequence[int], workers: int) -> Iterator[tuple[int, Arrays]]:
    def work(index: int) -> tuple[int, Arrays]:
        return index, task(corpus.read(index))

    waiting = iter(indices)
    running: set[Future[tuple[int, Arrays]]] = set()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="danlu-train")
    try:
        while True:
            for index in waiting:
                running.add(pool.submit(work, index))
                if len(running) > workers:  # one more than work, so that no thread waits for the merging
                    break
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _on_ray(task: Task, corpus: Corpus, indices: Sequence[int], address: str) -> Iterator[tuple[int, Arrays]]:
    ray = connected(address)
    remote = ray.remote(num_cpus=1)(_run)
    shared = ray.put(task)
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(indices)
    running: dict[Any, int] = {}
    try:
        while True:
            for index in waiting:
                shard = corpus.read(index)
                running[remote.remote(shared, shard.data, shard.ends)] = index
                if len(running) >= limit:
                    break
            if not running:
                return
            for ready in ray.wait(list(running), num_returns=1)[0]:
                yield running.pop(ready), ray.get(ready)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _run(task: Task, data: np.ndarray, ends: np.ndarray) -> Arrays:
    # Shared arrays come read-only, a type of their own to compiled loops; the small ones are copied into plain ones.
    return task(Shard(data.copy(), ends.copy()))


def connected(address: str) -> Any:
    """The module ray, connected to a cluster.

    Args:
        address: of a cluster; ``"auto"`` is the running one, or a new one on this machine.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ImportError(f"ray={address!r} needs Ray, which is not installed: pip install 'danlu[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError:
            if address != "auto":
                raise
            ray.init(log_to_driver=False)
    return ray
