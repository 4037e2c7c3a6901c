"""BytePiece: a lossless byte-level unigram tokenizer that needs no pre-tokenisation and knows no language."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from danlu.kernels.viterbi import close_gaps
from danlu.tokens import sampling, storage, unicode
from danlu.tokens.storage import RESERVED, Stored
from danlu.tokens.unigram import Unigram, starts_of
from danlu.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from danlu.tokens.host import BytePieceTokenizer

Text = str | bytes


class BytePiece:
    """A byte-level unigram tokenizer.

    Text is brought to normal form C, encoded as UTF-8 and cut into lines; each line is written as the pieces with the
    highest product of probabilities. Bytes are taken as they are. Since every byte is a piece, nothing is unknown and
    ``decode_bytes(encode(data)) == data`` for any data.

    Args:
        vocabulary: pieces and counts.
        special_tokens: names of the tokens that are no text: ``<pad>``, ``<bos>``, ``<eos>`` with ids 0, 1, 2, then any
            others, whose ids come after the pieces.
        normalization: ``"nfc"`` or None.

    Raises:
        ValueError: the special tokens do not begin with the three reserved ones, or repeat.

    Source: Scientific Spaces archives 9752, 9768, 9811.
    """

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        special_tokens: Sequence[str] = RESERVED,
        normalization: str | None = "nfc",
    ):
        special_tokens = tuple(special_tokens)
        if special_tokens[:3] != RESERVED or len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
            raise ValueError(
                f"special_tokens must be distinct names that begin with {', '.join(RESERVED)}, got {special_tokens}"
            )
        self.vocabulary = vocabulary
        self.special_tokens = special_tokens
        self.normalization = unicode.check_normalization(normalization)
        #: the unigram model that segments bytes
        self.engine = Unigram(vocabulary.pieces, vocabulary.scores)
        self._samplers: dict[float, sampling.Sampler] = {}
        others = [b""] * (len(special_tokens) - 3)
        self._bytes_of = [b"", b"", b"", *vocabulary.pieces, *others]
        self.special_ids = dict(
            zip(special_tokens, [0, 1, 2, *range(3 + len(vocabulary), len(self._bytes_of))], strict=True)
        )

    # Files

    @classmethod
    def from_file(cls, path: str | Path) -> BytePiece:
        """Read a tokenizer: danlu's own file or folder, or a published BytePiece ``.model``.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: the file is damaged or of another kind.
        """
        stored = storage.load(path)
        return cls(stored.vocabulary, special_tokens=stored.special_tokens, normalization=stored.normalization)

    def save(self, path: str | Path) -> Path:
        """Write a file whole or not at all; a name that ends in ``.model`` gets the published format.

        Raises:
            ValueError: the published format cannot hold further special tokens or another normalization.
        """
        return storage.save(path, Stored(self.vocabulary, self.special_tokens, self.normalization))

    @classmethod
    def train(cls, corpus: Iterable[Any], vocab_size: int, **options: Any) -> BytePiece:
        """Train on text files or texts.

        Args:
            corpus: paths of UTF-8 files, or an iterable of ``str``, one document each.
            vocab_size: how many ids, the three reserved ones included; at least 259. The result can be a little
                smaller.
            options: of :class:`danlu.BytePieceTrainer`.

        Returns:
            The tokenizer.
        """
        from danlu.tokens.trainer import BytePieceTrainer

        trainer = BytePieceTrainer(vocab_size, **options)
        return cls(trainer.train(corpus)[vocab_size], normalization=trainer.normalization)

    def to_transformers(self, **options: Any) -> BytePieceTokenizer:
        """The tokenizer as one of the host library's, for ``Trainer``, chat templates and ``AutoTokenizer``.

        Args:
            options: of the host's tokenizer, such as ``model_max_length`` or ``chat_template``.
        """
        from danlu.tokens.host import BytePieceTokenizer

        return BytePieceTokenizer(bytepiece=self, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        # The trie is built again where it is unpickled: that takes less time than sending it.
        return _rebuilt, (self.vocabulary, self.special_tokens, self.normalization)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BytePiece) and self.__reduce__()[1] == other.__reduce__()[1]

    def __hash__(self) -> int:
        return hash((self.vocab_size, self.special_tokens))

    def __repr__(self) -> str:
        return f"BytePiece({self.vocab_size} ids, longest piece {self.engine.longest} bytes)"

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._bytes_of)

    def __len__(self) -> int:
        return self.vocab_size

    # Encoding

    def encode(
        self,
        text: Text,
        *,
        alpha: float | None = None,
        seed: int | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
    ) -> list[int]:
        """Ids of a text.

        Args:
            text: ``str``, which is normalised, or ``bytes``, which are not.
            alpha: None for the best segmentation; else one is drawn with probability proportional to exp(alpha *
                score), alpha in 0..inf. 0.1 to 0.3 are usual in training, 0 is uniform over all segmentations.
            seed: of the draw, in 0..2**64 - 1; None is fresh randomness.
            add_bos: put ``<bos>`` in front.
            add_eos: put ``<eos>`` behind.

        Returns:
            The ids.

        Raises:
            TypeError: the text is neither ``str`` nor bytes.
            ValueError: alpha is negative or NaN, the seed is out of range, or the text holds a lone surrogate.
        """
        ids = self.encode_array(text, alpha=alpha, seed=seed).tolist()
        return [self.bos_id] * add_bos + ids + [self.eos_id] * add_eos

    def encode_array(self, text: Text, *, alpha: float | None = None, seed: int | None = None) -> np.ndarray:
        """As :meth:`encode`, as an int32 array of shape (tokens,); the quickest form for long texts."""
        data = self.to_array(text)
        sampler = self.sampler(alpha)
        if sampler is None:
            ids = self.engine.segment(data)
        else:
            ids, _ = sampler.segment(data, sampling.random_states(seed, 1))
        ids += len(RESERVED)
        return ids

    def encode_batch(
        self,
        texts: Sequence[Text],
        *,
        alpha: float | None = None,
        seed: int | Sequence[int] | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        threads: int | None = None,
    ) -> list[list[int]]:
        """Ids of many texts, on several cores.

        Args:
            texts: ``str`` or ``bytes`` each.
            alpha: as for :meth:`encode`.
            seed: one integer for all, from which each text gets random numbers of its own, or one per text. The result
                does not depend on the number of threads; with one seed per text not on the order either.
            add_bos: put ``<bos>`` in front of each.
            add_eos: put ``<eos>`` behind each.
            threads: None is all cores.

        Returns:
            One list of ids per text.

        Raises:
            TypeError: ``texts`` is a single text, or an item is neither ``str`` nor bytes.
            ValueError: as for :meth:`encode`; ``threads`` below 1.
        """
        if isinstance(texts, str | bytes):
            raise TypeError(
                f"texts must be a sequence of texts, got one {type(texts).__name__}: use encode, or put it in []"
            )
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        data, offsets = self._joined(texts)
        sampler = self.sampler(alpha)
        if sampler is None:
            out, counts = self.engine.segment_batch(data, offsets, threads)
        else:
            out, counts = sampler.segment_batch(data, offsets, sampling.random_states(seed, len(texts)), threads)
        ids = out[: close_gaps(out, offsets, counts, len(RESERVED))].tolist()
        bounds = starts_of(counts).tolist()
        before, behind = [self.bos_id] * add_bos, [self.eos_id] * add_eos
        rows = (ids[begin:end] for begin, end in itertools.pairwise(bounds))
        return [before + row + behind for row in rows] if before or behind else list(rows)

    def encode_with_offsets(
        self, text: Text, *, unit: str = "character", alpha: float | None = None, seed: int | None = None
    ) -> tuple[list[int], np.ndarray]:
        """Ids of a text and where each token comes from.

        Args:
            text: as for :meth:`encode`.
            unit: ``"character"``: places in the text as given, before normalisation (tokens that share a character both
                span it); ``"byte"``: places in the UTF-8 bytes of the normalised text.
            alpha: as for :meth:`encode`.
            seed: as for :meth:`encode`.

        Returns:
            Ids, and first and one-past-last place of each, (tokens, 2), int64.

        Raises:
            ValueError: unknown unit, or characters asked of bytes.
        """
        if unit not in ("character", "byte"):
            raise ValueError(f"unit must be 'character' or 'byte', got {unit!r}")
        if unit == "character" and not isinstance(text, str):
            raise ValueError("unit 'character' needs a str, got bytes: use unit='byte'")
        ids = self.encode_array(text, alpha=alpha, seed=seed)
        ends = np.cumsum(self.engine.lengths[ids - len(RESERVED)], dtype=np.int64)
        offsets = np.stack([ends - self.engine.lengths[ids - len(RESERVED)], ends], axis=1)
        if unit == "character" and ids.size:
            offsets = self._in_text(str(text), offsets)
        return ids.tolist(), offsets

    def _in_text(self, original: str, offsets: np.ndarray) -> np.ndarray:
        normalized = unicode.normalize(original, self.normalization)
        places = unicode.character_offsets(self.to_array(original), offsets)
        starts, ends = unicode.character_spans(original, normalized)
        return np.stack([starts[places[:, 0]], ends[places[:, 1] - 1]], axis=1)

    def tokenize(self, text: Text, *, alpha: float | None = None, seed: int | None = None) -> list[bytes]:
        """The pieces of a text, as bytes; joined they are the normalised text."""
        return [self._bytes_of[i] for i in self.encode_array(text, alpha=alpha, seed=seed)]

    def stream(
        self, source: Iterable[Text], *, alpha: float | None = None, seed: int | None = None
    ) -> Iterator[np.ndarray]:
        """Ids of a text that arrives in parts and may never end, see :func:`danlu.tokens.streaming.stream`."""
        from danlu.tokens.streaming import stream

        return stream(self, source, alpha=alpha, seed=seed)

    # Decoding

    def decode_bytes(self, ids: Iterable[int], *, special_tokens: bool = False) -> bytes:
        """The bytes that ids stand for.

        Args:
            ids: integers in 0..vocab_size - 1.
            special_tokens: also write the names of special tokens, which are left out otherwise.

        Raises:
            ValueError: an id out of range.
            TypeError: an id that is not an integer.
        """
        ids = list(ids)
        try:
            if ids and min(ids) < 0:
                raise IndexError
            if special_tokens:
                names = {identifier: name.encode() for name, identifier in self.special_ids.items()}
                return b"".join(names.get(i) or self._bytes_of[i] for i in ids)
            return b"".join([self._bytes_of[i] for i in ids])
        except IndexError:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"ids must be in 0..{self.vocab_size - 1}, got {wrong}") from None
        except TypeError:
            wrong = next(i for i in ids if not hasattr(i, "__index__"))
            raise TypeError(f"ids must be integers, got {wrong!r}") from None

    def decode(self, ids: Iterable[int], *, errors: str = "replace", special_tokens: bool = False) -> str:
        """The text that ids stand for.

        Args:
            ids: integers in 0..vocab_size - 1.
            errors: what becomes of bytes that are not UTF-8: ``"replace"``, ``"strict"``, ``"ignore"``, or another of
                Python's error handlers.
            special_tokens: as for :meth:`decode_bytes`.

        Raises:
            ValueError: an id out of range; bytes that are not UTF-8 under ``errors="strict"``.
        """
        return self.decode_bytes(ids, special_tokens=special_tokens).decode(errors=errors)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as soon as it is complete: the bytes of an unfinished character are held back."""
        from danlu.tokens.streaming import decode_stream

        return decode_stream(self, ids)

    # The distribution over segmentations, and what encoding is made of

    def segmentations(self, text: Text, alpha: float = 1.0) -> sampling.Segmentations:
        """All segmentations of a text with their probabilities: draws, log Z, entropy, boundary marginals.

        Args:
            text: as for :meth:`encode`.
            alpha: inverse temperature, at least 0 and finite.

        Raises:
            ValueError: alpha is negative, NaN or infinite.
        """
        return sampling.Segmentations(self.engine, self.to_array(text), alpha, first_id=len(RESERVED))

    def sampler(self, alpha: float | None) -> sampling.Sampler | None:
        """What draws at this alpha; None where the best segmentation is asked for."""
        finite = sampling.check_alpha(alpha)
        if finite is None:
            return None
        if finite not in self._samplers:
            if len(self._samplers) >= 8:  # a weight for every unit of the trie each; a schedule must not collect them
                self._samplers.clear()
            self._samplers[finite] = sampling.Sampler(self.engine, finite)
        return self._samplers[finite]

    def to_array(self, text: Text, what: str = "text") -> np.ndarray:
        """What is segmented: the UTF-8 bytes of the normalised text, or the bytes as given, (length,), uint8."""
        return np.frombuffer(self._raw(text, what), np.uint8)

    def _joined(self, texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray]:
        """The texts one after another as bytes, and where each begins."""
        # ASCII needs nothing done text by text.
        whole = "".join(texts) if set(map(type, texts)) == {str} else ""  # type: ignore[arg-type]
        if whole and whole.isascii():
            return np.frombuffer(whole.encode(), np.uint8), starts_of(
                np.fromiter(map(len, texts), np.int64, len(texts))
            )
        parts = [self._raw(item, f"texts[{i}]") for i, item in enumerate(texts)]
        return np.frombuffer(b"".join(parts), np.uint8), starts_of(np.fromiter(map(len, parts), np.int64, len(parts)))

    def _raw(self, item: Text, what: str) -> bytes:
        if isinstance(item, str):
            return unicode.to_utf8(unicode.normalize(item, self.normalization), what)
        if isinstance(item, bytes | bytearray | memoryview):
            return bytes(item)
        raise TypeError(f"{what} must be str or bytes, got {item!r} of type {type(item).__name__}")


def _rebuilt(vocabulary: Vocabulary, special_tokens: tuple[str, ...], normalization: str | None) -> BytePiece:
    return BytePiece(vocabulary, special_tokens=special_tokens, normalization=normalization)
