"""Rows of tokens for training: tokenized once into a file that is mapped into memory, or on the fly."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from danlu.files import replacing
from danlu.positions.randomised import equal_mean_positions, subset_positions
from danlu.tokens.idfiles import id_type, read_ids
from danlu.training.tables import Positions, Source
from danlu.training.texts import documents, stamp

logger = logging.getLogger("danlu.training")

#: Characters of a document that are tokenized at once; a longer one is cut behind a line feed.
PIECE = 1 << 20
Progress = Callable[[int, int, str], None]


def tokenize(
    source: Source,
    tokenizer: Any,
    folder: Path,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """All tokens of a source, each document followed by the end token, in a file that is made once.

    Args:
        source: what to read.
        tokenizer: a host tokenizer with an end token.
        folder: where the file of ids lies; its name says what it was made from.
        limit: read so many documents only.
        progress: called with (documents done, 0, what).

    Returns:
        The ids, mapped into memory.

    Raises:
        ValueError: a tokenizer without an end token, or a source without text.
    """
    end = end_token(tokenizer)
    size = len(tokenizer)
    probe = tokenizer("The quick brown fox, 42 + 7;\n\t中文", add_special_tokens=False)["input_ids"]
    key = json.dumps([stamp(source), limit, end, size, probe], default=str)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.bin"
    if not path.is_file():
        count, total = 0, 0
        with replacing(path) as part, part.open("wb") as out:
            for parts in documents(source, limit):
                if tokens := _ids(tokenizer, parts):
                    out.write(np.array([*tokens, end], id_type(size)).tobytes())
                    count, total = count + 1, total + len(tokens) + 1
                if progress is not None and count % 16 == 0:
                    progress(count, 0, f"tokenizing: {count:,} documents, {total:,} tokens")
        logger.info("tokenized %d documents, %d tokens", count, total)
    ids = read_ids(path, size)
    if not ids.size:
        path.unlink(missing_ok=True)
        raise ValueError(f"data source must hold text, got none in {_named(source)}")
    return ids


def end_token(tokenizer: Any) -> int:
    """The id that ends a document.

    Raises:
        ValueError: the tokenizer has none.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ValueError("tokenizer must have an end token (eos or sep), which parts documents; set its eos_token")
    return int(end)


class Order:
    """Where item i of a training run is found among ``size`` rows: a new order for each pass, the same in every run.

    Args:
        size: rows of one pass.
        seed: of the orders; none keeps the order of the text.
    """

    def __init__(self, size: int, seed: int | None):
        self.size, self.seed = size, seed
        self._pass, self._places = -1, np.arange(size)

    def __call__(self, index: int) -> int:
        """The row of item ``index``."""
        number, place = divmod(index, self.size)
        if self.seed is not None and number != self._pass:
            self._pass, self._places = number, np.random.default_rng([self.seed, number]).permutation(self.size)
        return int(self._places[place])


class Shuffled(Dataset):
    """``count`` items of a data set that has a fixed order, pass after pass; see ``Order``."""

    def __init__(self, data: Any, count: int, seed: int):
        self.data, self.count, self.order = data, count, Order(len(data), seed)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.data[self.order(index)]


class Rows(Dataset):
    """Rows of ``length`` tokens, shuffled anew for each pass; item i is the same in every run.

    Args:
        ids: tokens of all documents, each followed by ``end``.
        end: the end token.
        length: tokens per row.
        count: rows in all; more than one pass over the text when it is larger than what the text gives.
        packing: ``stream``, ``documents`` or ``none``.
        seed: of the order, and of randomised positions; none keeps the order of the text.
        positions: randomised positions.
        pad: fills rows that a document does not (``none``).
        name: for errors.

    Raises:
        ValueError: the text gives not a single row.
    """

    def __init__(
        self,
        ids: np.ndarray,
        end: int,
        *,
        length: int,
        count: int | None = None,
        packing: str = "stream",
        seed: int | None = None,
        positions: Positions | None = None,
        pad: int = 0,
        name: str = "the corpus",
    ):
        self.ids, self.end, self.length, self.packing = ids, end, length, packing
        self.seed, self.positions, self.pad = seed, positions, pad
        if packing == "none":
            ends = np.flatnonzero(ids == end) + 1
            self.starts = np.concatenate(([0], ends[:-1]))
            self.stops = np.minimum(ends, self.starts + length)
        else:
            self.starts = np.arange(0, ids.size - length + 1, length)
            self.stops = self.starts + length
        if not self.starts.size:
            raise ValueError(f"{name} must hold at least one row of {length} tokens, got {ids.size} tokens")
        self.count = self.starts.size if count is None else count
        self.order = Order(self.starts.size, seed)

    @property
    def rows_per_pass(self) -> int:
        """Rows that the text gives."""
        return int(self.starts.size)

    def keep_evenly(self, count: int) -> None:
        """Keep at most ``count`` rows, spread evenly over the text."""
        if self.rows_per_pass > count:
            chosen = np.linspace(0, self.rows_per_pass - 1, count).astype(np.int64)
            self.starts, self.stops = self.starts[chosen], self.stops[chosen]
        self.count, self.order = self.rows_per_pass, Order(self.rows_per_pass, self.seed)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.order(index)
        taken = torch.from_numpy(self.ids[self.starts[row] : self.stops[row]].astype(np.int64))
        ids = torch.full((self.length,), self.pad)
        ids[: len(taken)] = taken
        item = {"input_ids": ids, "labels": ids.clone()}
        if self.packing == "none":
            item["labels"][len(taken) :] = -100
            item["attention_mask"] = (torch.arange(self.length) < len(taken)).long()
        if self.packing == "documents":
            item |= _apart(item, self.end)
        if self.positions is not None:
            item["position_ids"] = self._drawn(index)
            item.setdefault("attention_mask", torch.ones_like(ids))
        return item

    def _drawn(self, index: int) -> Tensor:
        """Positions by the number of the row, so that a resumed run draws the same."""
        generator = np.random.default_rng([0 if self.seed is None else self.seed, 7, index])
        assert self.positions is not None
        if self.positions.kind == "subset":
            assert self.positions.max_length is not None
            return subset_positions(self.length, self.positions.max_length, seed=generator)[0]
        return equal_mean_positions(self.length, self.length, seed=generator)[0]


class LiveRows(IterableDataset):
    """Rows that are tokenized while they are used, in the order of the source, shuffled within a buffer.

    Args:
        source: what to read, again and again.
        tokenizer: a host tokenizer.
        length: tokens per row.
        packing: ``stream`` or ``documents``.
        seed: of the shuffling.
        limit: read so many documents of each pass only.
        buffer: rows to shuffle among.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        *,
        length: int,
        packing: str,
        seed: int,
        limit: int | None,
        buffer: int = 256,
    ):
        self.source, self.tokenizer, self.length, self.packing = source, tokenizer, length, packing
        self.seed, self.limit, self.buffer, self.end = seed, limit, buffer, end_token(tokenizer)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator, held = random.Random(self.seed), []
        for row in self._in_order():
            held.append(row)
            if len(held) >= self.buffer:
                place = generator.randrange(len(held))
                held[place], held[-1] = held[-1], held[place]
                yield held.pop()

    def _in_order(self) -> Iterator[dict[str, Tensor]]:
        waiting: list[int] = []
        while True:
            some = False
            for parts in documents(self.source, self.limit, streaming=True):
                ids_of_text = _ids(self.tokenizer, parts)
                some |= bool(ids_of_text)
                waiting += [*ids_of_text, self.end] if ids_of_text else []
                while len(waiting) >= self.length:
                    ids = torch.tensor(waiting[: self.length])
                    del waiting[: self.length]
                    item = {"input_ids": ids, "labels": ids.clone()}
                    yield item | (_apart(item, self.end) if self.packing == "documents" else {})
            if not some:
                raise ValueError(f"data source must hold text, got none in {_named(self.source)}")


def _apart(item: dict[str, Tensor], end: int) -> dict[str, Tensor]:
    """Positions that start anew in each document, and labels that do not ask for its first token.

    The host keeps attention inside a document when positions step back and no mask is given.
    """
    ids = item["input_ids"]
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[1:] = ids[:-1] == end
    places = torch.arange(len(ids))
    starts = torch.where(first, places, 0).cummax(0).values
    labels = item["labels"].masked_fill(first, -100)
    return {"position_ids": places - starts, "labels": labels}


def _ids(tokenizer: Any, parts: Iterable[str]) -> list[int]:
    """Tokens of one document, in pieces of bounded size, cut behind line feeds."""
    ids: list[int] = []
    held = ""

    def add(text: str) -> None:
        if text:
            ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    for part in parts:
        held += part
        if len(held) > PIECE:
            cut = held.rfind("\n") + 1 or len(held)
            add(held[:cut])
            held = held[cut:]
    add(held)
    return ids


def _named(source: Source) -> str:
    return source.dataset or ", ".join(source.files)
