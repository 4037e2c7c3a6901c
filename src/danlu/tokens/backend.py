"""The host library's back end for BytePiece: its own for all but segmentation, which the compiled engine does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer, models, normalizers

from danlu.tokens import sampling, unicode
from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.storage import RESERVED
from danlu.tokens.unigram import starts_of


class Backend:
    """The host's back end, but for how it segments.

    Args:
        backend: the host's.
        bytepiece: what segments.
        names: of all ids of ``bytepiece``.
        alpha: as for ``BytePiece.encode``.
        seed: one integer, one for each row of a batch, or None.
    """

    def __init__(
        self, backend: Tokenizer, bytepiece: BytePiece, names: list[str], alpha: float | None, seed: Any
    ) -> None:
        self.__dict__.update(
            backend=backend,
            bytepiece=bytepiece,
            names=names,
            sampler=bytepiece.sampler(alpha),
            seed=seed,
            added=backend.get_added_tokens_decoder(),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["backend"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.backend, name, value)

    def encode_batch(
        self, inputs: Sequence[Any], add_special_tokens: bool = True, is_pretokenized: bool = False
    ) -> Any:
        """Encodings of texts, of pairs of texts, or of either as lists of words."""
        rows = [[[self._split(text) for text in side] for side in _sides(item, is_pretokenized)] for item in inputs]
        self._segment([[part for side in row for text in side for part in text] for row in rows])
        backend, padding = self.backend, self.backend.padding
        frame = _frame(backend, add_special_tokens)
        made: list[Any]
        if frame and not is_pretokenized and all(len(row) == 1 for row in rows):
            made = [_Light(self, row[0][0], frame) for row in rows]
        else:
            sides = [[self.encoding(side, kind, is_pretokenized) for kind, side in enumerate(row)] for row in rows]
            made = [backend.post_process(*row, add_special_tokens=add_special_tokens) for row in sides]
        if padding:
            length = padding.pop("length")
            multiple = padding.pop("pad_to_multiple_of") or 1
            length = max((len(item) for item in made), default=0) if length is None else length
            for item in made:
                item.pad(-(-length // multiple) * multiple, **padding)
        return made

    def _segment(self, rows: list[list[_Part]]) -> None:
        """Give the parts of each row their ids."""
        rows = [[part for part in row if not part.ids] for row in rows]
        parts = [part for row in rows for part in row]
        data = [unicode.to_utf8(part.text) for part in parts]
        offsets = starts_of(np.fromiter(map(len, data), np.int64, len(data)))
        joined = np.frombuffer(b"".join(data), np.uint8)
        if self.sampler is None:
            out, counts = self.bytepiece.engine.segment_batch(joined, offsets)
        else:
            # The first part of a row gets the random numbers that BytePiece.encode_batch gives the text.
            first = sampling.random_states(self.seed, len(rows)).tolist()
            places = [(state, k) for state, row in zip(first, rows, strict=True) for k in range(len(row))]
            others = sampling.random_states([(state + k) % 2**64 for state, k in places], len(places))
            states = np.where([k == 0 for _, k in places], np.array([s for s, _ in places], np.uint64), others)
            out, counts = self.sampler.segment_batch(joined, offsets, states)
        out += len(RESERVED)
        for i, (part, begin, count) in enumerate(zip(parts, offsets[:-1].tolist(), counts.tolist(), strict=True)):
            part.ids = out[begin + i : begin + i + count].tolist()

    def encoding(self, texts: list[list[_Part]], kind: int = 0, as_words: bool = False) -> Encoding:
        """The library's own object, for the first (0) or second (1) text of a row."""
        ids: list[int] = []
        tokens: list[str] = []
        spans: list[list[int]] = []
        words: list[int] = []
        for number, parts in enumerate(texts):
            count = 0
            for part in parts:
                some, places, lines = part.tokens(self.names, self.bytepiece.engine.lengths)
                ids += part.ids
                tokens += some
                spans += places.tolist()
                # The library takes lines and added tokens for the words of a text.
                words += [number] * len(some) if as_words else (lines + count).tolist()
                count += int(lines[-1]) + 1
        size = len(ids)
        state = {
            "ids": ids, "type_ids": [kind] * size, "tokens": tokens, "words": words, "offsets": spans,
            "special_tokens_mask": [0] * size, "attention_mask": [1] * size, "overflowing": [], "sequence_ranges": {},
        }  # fmt: skip
        return _restored(state)

    def _split(self, text: str) -> list[_Part]:
        """The added tokens in a text and what lies between them, split in two rounds as the host does."""
        form = self.bytepiece.normalization
        normal = unicode.normalize(text, form)
        if not any(
            unicode.normalize(token.content, form) in normal if token.normalized else token.content in text
            for token in self.added.values()
        ):
            return [_Part(normal, _Gap(0, text, normal))] if text else []
        parts = []
        for begin, part, identifier in self._matches(text, normalized=False):
            if identifier is not None:
                parts.append(_Part(part, _Gap(begin, part, part), ids=[identifier], added=True))
                continue
            gap = _Gap(begin, part, unicode.normalize(part, form))
            for place, inner, token in self._matches(gap.normal, normalized=True):
                ids = [] if token is None else [token]
                parts.append(_Part(inner, gap, place, ids, added=bool(ids)))
        return parts

    def _matches(self, text: str, normalized: bool) -> Iterator[tuple[int, str, int | None]]:
        rules = tuple(
            (identifier, *sorted(token.__getstate__().items()))
            for identifier, token in self.added.items()
            if token.normalized == normalized
        )
        finder, ids = _finder(rules, self.bytepiece.normalization if normalized else None)
        finder.encode_special_tokens = self.backend.encode_special_tokens
        found = finder.encode(text, add_special_tokens=False)
        at = 0
        for place, (begin, end) in zip(found.ids, found.offsets, strict=True):
            if place in ids:
                if at < begin:
                    yield at, text[at:begin], None
                yield begin, text[begin:end], ids[place]
                at = end
        if at < len(text):
            yield at, text[at:], None


@lru_cache(maxsize=8)
def _finder(rules: tuple[tuple[Any, ...], ...], normalization: str | None) -> tuple[Tokenizer, dict[int, int]]:
    """The host's own search for these added tokens, around a model that knows nothing, and the ids they have."""
    finder = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    if normalization:
        finder.normalizer = normalizers.NFC()
    tokens = {identifier: AddedToken(**dict(fields)) for identifier, *fields in rules}
    finder.add_special_tokens([token for token in tokens.values() if token.special])
    finder.add_tokens([token for token in tokens.values() if not token.special])
    places = finder.get_vocab()
    return finder, {places[token.content]: identifier for identifier, token in tokens.items()}


def _sides(item: Any, is_pretokenized: bool) -> list[list[str]]:
    """One text or two, each as a list: of the words, or of the text alone."""
    if not is_pretokenized and isinstance(item, str):
        return [[item]]
    if isinstance(item, list | tuple):
        if is_pretokenized and all(isinstance(word, str) for word in item):
            return [list(item)]
        kind = list | tuple if is_pretokenized else str
        if len(item) == 2 and all(isinstance(side, kind) for side in item):
            sides = [list(side) if is_pretokenized else [side] for side in item]
            if all(isinstance(text, str) for side in sides for text in side):
                return sides
    what = "a list of words, or a pair of such lists" if is_pretokenized else "a str, or a pair of str"
    raise TypeError(f"text must be {what} for each row of the batch, got {item!r} of type {type(item).__name__}")


class _Gap(NamedTuple):
    """A stretch of the original text and its normal form."""

    begin: int
    text: str
    normal: str


@dataclass(slots=True)
class _Part:
    """An added token or what lies between two."""

    text: str
    gap: _Gap
    place: int = 0  # in the gap's normal form
    ids: list[int] = field(default_factory=list)
    added: bool = False

    def tokens(self, names: list[str], lengths: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Names, spans in the original text, and the line of each token."""
        if self.added:
            names_here, spans, lines = [self.text], np.array([[0, len(self.text)]]), np.zeros(1, np.int64)
        else:
            names_here = [names[identifier] for identifier in self.ids]
            data = np.frombuffer(self.text.encode(), np.uint8)
            ends = np.cumsum(lengths[np.array(self.ids) - len(RESERVED)], dtype=np.int64)
            starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
            spans = unicode.character_offsets(data, np.stack([starts, ends], axis=1))
            feed = data == 10
            lines = np.concatenate([np.zeros(1, np.int64), np.cumsum(feed[:-1] & ~feed[1:])])[starts]
        spans = spans + self.place
        if self.gap.text != self.gap.normal:
            first, last = unicode.character_spans(self.gap.text, self.gap.normal)
            spans = np.stack([first[spans[:, 0]], last[spans[:, 1] - 1]], axis=1)
        return names_here, spans + self.gap.begin, lines


def _restored(state: dict[str, Any]) -> Encoding:
    encoding = Encoding()
    encoding.__setstate__(json.dumps(state).encode())  # the one way to make one: what pickle reads
    return encoding


class _Frame(NamedTuple):
    """What the host puts around one text, and how many tokens of the text it keeps."""

    processor: Any
    add_special_tokens: bool
    before: list[int]
    behind: list[int]
    types: list[int]  # of what is before, of the text, of what is behind
    keep: int | None
    side: str


def _frame(backend: Tokenizer, add_special_tokens: bool) -> _Frame | None:
    """The frame, or None where the host does more than frame and cut."""
    processor, cut = backend.post_processor, backend.truncation
    before: list[int] = []
    behind, types, keep = before, [0], None
    if processor is not None:
        one = {"ids": [0], "type_ids": [0], "tokens": [""], "words": [None], "offsets": [[0, 0]]}
        more = {"special_tokens_mask": [0], "attention_mask": [1], "overflowing": [], "sequence_ranges": {}}
        framed = processor.process(_restored(one | more), None, add_special_tokens)
        if framed.special_tokens_mask.count(0) != 1:
            return None
        at = framed.special_tokens_mask.index(0)
        before, behind, types = framed.ids[:at], framed.ids[at + 1 :], framed.type_ids
    if cut:
        keep = cut["max_length"] - len(before) - len(behind)
        if keep < 1 or cut["stride"] or cut["strategy"] == "only_second":
            return None
    return _Frame(processor, add_special_tokens, before, behind, types, keep, cut["direction"] if cut else "right")


class _Light:
    """An encoding of one text that has what the host reads of each, and makes the library's own for anything else."""

    n_sequences = 1

    def __init__(self, backend: Backend, parts: list[_Part], frame: _Frame):
        self._made_of = backend, parts, frame
        self._padding: tuple[int, dict[str, Any]] = (0, {})
        ids = parts[0].ids if len(parts) == 1 else [identifier for part in parts for identifier in part.ids]
        if frame.keep is not None and len(ids) > frame.keep:
            ids = ids[: frame.keep] if frame.side == "right" else ids[-frame.keep :]
        self.ids = frame.before + ids + frame.behind
        self.attention_mask = [1] * len(self.ids)
        self._size = len(ids)

    @cached_property
    def type_ids(self) -> list[int]:
        """As the library's."""
        frame = self._made_of[2]
        at = len(frame.before)
        return self._around(frame.types[:at], frame.types[at], frame.types[at + 1 :], "pad_type_id")

    @cached_property
    def special_tokens_mask(self) -> list[int]:
        """As the library's."""
        frame = self._made_of[2]
        return self._around([1] * len(frame.before), 0, [1] * len(frame.behind), None)

    def _around(self, before: list[int], inside: int, behind: list[int], fill: str | None) -> list[int]:
        row = before + [inside] * self._size + behind
        more = len(self.ids) - len(row)
        if not more:
            return row
        options = self._padding[1]
        padding = [options[fill] if fill else 1] * more
        return padding + row if options["direction"] == "left" else row + padding

    def __len__(self) -> int:
        return len(self.ids)

    def pad(self, length: int, **options: Any) -> None:
        """As the library's."""
        self._padding = length, options
        more = length - len(self.ids)
        if more > 0:
            ids, mask = [options["pad_id"]] * more, [0] * more
            left = options["direction"] == "left"
            self.ids = ids + self.ids if left else self.ids + ids
            self.attention_mask = mask + self.attention_mask if left else self.attention_mask + mask

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        return getattr(self._whole, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self._whole,)

    @cached_property
    def _whole(self) -> Encoding:
        backend, parts, frame = self._made_of
        whole = backend.encoding([parts])
        if frame.keep is not None:
            whole.truncate(frame.keep, direction=frame.side)
        if frame.processor is not None:
            whole = frame.processor.process(whole, None, frame.add_special_tokens)
        length, options = self._padding
        whole.pad(length, **options)
        return whole


def _same(encoding: Encoding) -> Encoding:
    return encoding
