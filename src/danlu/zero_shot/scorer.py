"""Next-sentence scores of token pairs: which models can give them, what is cut, how pairs are batched."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from danlu.progress import watched

__all__ = ["PairScorer", "Row", "cut_longest", "refuse_kind"]

Ids = Sequence[int]
Cut = Literal["longest_first", "only_first", "only_second"]

#: Pairs whose rows are built at once; bounds memory when there are many texts and many labels.
_CHUNK = 8192


class Row(NamedTuple):
    """One pair without special tokens: first and second sentence, and position ids of the whole row or None."""

    first: Ids
    second: Ids
    positions: Ids | None = None


def refuse_kind(model_type: str) -> None:
    """Raise ValueError for model types that have no next-sentence head, with the reason."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES as KNOWN

    if model_type == "albert":
        raise ValueError(
            "model must have been trained on next sentences, got albert: its head tells the right ORDER of two "
            "sentences, which is another question; take a BERT"
        )
    if model_type not in KNOWN:
        raise ValueError(
            f"model must have a next-sentence head ({', '.join(KNOWN)}), got {model_type}: RoBERTa and its kin were "
            "trained without one; take a BERT"
        )


def cut_longest(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two sentences cut to fit a row, the longer one first; as the host's ``longest_first``.

    Args:
        first: tokens of the first sentence.
        second: tokens of the second.
        room: tokens for both.

    Returns:
        Tokens to keep of each.
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (room - shorter, shorter) if first > second else (shorter, room - shorter)


class PairScorer:
    """Scores logit_0 - logit_1 of a next-sentence head for rows of tokens, in batches of equal cost.

    Args:
        model: BERT, ERNIE, FNet, MegatronBERT or MobileBERT with a next-sentence head; not copied.
        tokenizer: its tokenizer.
        batch_tokens: tokens of a batch, padding included; None is 1024 on a CPU, whose caches are small, else 16384.
        max_length: tokens of a row; None is what model and tokenizer allow.
        trust_head: take a head that was not in the checkpoint, because it has been trained since.
        progress: draw a bar on a terminal when scoring takes long.

    Raises:
        ValueError: no such head, one that was not in the checkpoint, a tokenizer that does not write
            ``[CLS] A [SEP] B [SEP]`` with token types, or limits that leave no room.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_tokens: int | None,
        max_length: int | None,
        trust_head: bool = False,
        progress: bool = True,
    ) -> None:
        refuse_kind(model.config.model_type)
        head = getattr(getattr(model, "cls", None), "seq_relationship", None)
        self.base = model.base_model
        pooler = getattr(self.base, "pooler", None)
        if head is None or pooler is None or head.out_features != 2:
            raise ValueError(
                "model must be loaded with AutoModelForNextSentencePrediction (or ForPreTraining), got "
                f"{type(model).__name__}, which has no next-sentence head and pooler"
            )
        # The host marks what a checkpoint filled. A marked encoder under an unmarked head: the head is random.
        loaded = any(getattr(one, "_is_hf_initialized", False) for one in self.base.encoder.parameters())
        blank = [one for one in (*pooler.parameters(), *head.parameters()) if not _from_checkpoint(one)]
        if loaded and blank and not trust_head:
            raise ValueError(
                "model must have a trained next-sentence head, but its checkpoint had no weights for the head or the "
                "pooler, so they are random; take another checkpoint, or pass trust_head=True if you trained them"
            )
        self.model, self.tokenizer, self.head, self.pooler = model, tokenizer, head, pooler
        self.cls, self.sep, self.pad = (getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad"))
        probe = tokenizer("a", "b", return_token_type_ids=True)
        first, second = self.encode(["a", "b"])
        if list(probe["input_ids"]) != [self.cls, *first, self.sep, *second, self.sep]:
            raise ValueError("tokenizer must write pairs as [CLS] A [SEP] B [SEP], as BERT's does")
        if list(probe["token_type_ids"]) != [0] * (len(first) + 2) + [1] * (len(second) + 1):
            raise ValueError("tokenizer must give token type 1 to the second sentence, as BERT's does")
        limits = (max_length, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
        self.max_length = min(limit for limit in limits if limit is not None)
        if self.max_length < 5:
            raise ValueError(f"max_length must leave room for two sentences, >= 5, got {self.max_length}")
        if batch_tokens is None:
            batch_tokens = max(self.max_length, 1024 if model.device.type == "cpu" else 16384)
        if batch_tokens < self.max_length:
            raise ValueError(f"batch_tokens must hold a row of {self.max_length} tokens, got {batch_tokens}")
        self.batch_tokens = batch_tokens
        takes = inspect.signature(self.base.forward).parameters
        self.takes_mask = "attention_mask" in takes
        self.room = self.max_length - 3
        self.progress = progress

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens, uncut.

        Raises:
            ValueError: a text that is empty, or has no token.
        """
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"text {i} must be a string with something in it, got {text!r}")
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for i, one in enumerate(ids):
            if not one:
                raise ValueError(f"text {i} must have a token, got {texts[i]!r}")
        return ids

    def fit(self, first: Ids, second: Ids, cut: Cut) -> Row:
        """A row of two sentences, cut where it is too long.

        Raises:
            ValueError: the sentence that is not to be cut leaves no room for the other.
        """
        if len(first) + len(second) <= self.room:
            return Row(first, second)
        if cut == "longest_first":
            keep = cut_longest(len(first), len(second), self.room)
        elif cut == "only_first":
            keep = (self.space_beside(len(second)), len(second))
        else:
            keep = (len(first), self.space_beside(len(first)))
        return Row(first[: keep[0]], second[: keep[1]])

    def space_beside(self, fixed: int) -> int:
        """Tokens that are left for a text beside a sentence of ``fixed`` tokens.

        Raises:
            ValueError: none.
        """
        if fixed >= self.room:
            raise ValueError(
                f"a label sentence must leave room for the text in {self.max_length} tokens, got one of {fixed}; "
                "labels are never cut: shorten it, or raise max_length"
            )
        return self.room - fixed

    def score(self, rows: Iterable[Row], total: int) -> Tensor:
        """Scores of rows, float32 on the CPU, in their order.

        Args:
            rows: pairs of tokens; an iterator is read in chunks.
            total: how many there are.

        Returns:
            (total,) logit_0 - logit_1: how much likelier the second sentence follows the first than not, in nats.
        """
        scores = torch.empty(total)
        source = iter(rows)
        starts = range(0, total, _CHUNK)
        outer, inner = self.progress and len(starts) > 1, self.progress and len(starts) == 1
        for start in watched(starts, "scoring pairs") if outer else starts:
            chunk = list(islice(source, _CHUNK))
            batches = self._batches(chunk)
            for batch in watched(batches, "scoring pairs") if inner else batches:
                scores[[start + i for i in batch]] = self.score_batch([chunk[i] for i in batch])
        return scores

    def _batches(self, rows: Sequence[Row]) -> list[list[int]]:
        """Rows sorted by length, longest first, packed by padded tokens."""
        lengths = [len(row.first) + len(row.second) + 3 for row in rows]
        batches: list[list[int]] = []
        longest = 0
        for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
            # A model that takes no mask (FNet) sees padding, so its batches have rows of one length only.
            alike = self.takes_mask or lengths[i] == longest
            if not batches or not alike or (len(batches[-1]) + 1) * longest > self.batch_tokens:
                batches.append([])
                longest = lengths[i]
            batches[-1].append(i)
        return batches

    @torch.no_grad()
    def score_batch(self, rows: Sequence[Row]) -> Tensor:
        """Scores (rows,) of one batch; the head is computed in float32 whatever the model's type."""
        ids = [[self.cls, *row.first, self.sep, *row.second, self.sep] for row in rows]
        width = max(map(len, ids))
        inputs: dict[str, Any] = {
            "input_ids": [one + [self.pad] * (width - len(one)) for one in ids],
            "token_type_ids": [
                [0] * (len(row.first) + 2) + [1] * (len(row.second) + 1) + [0] * (width - len(one))
                for row, one in zip(rows, ids, strict=True)
            ],
        }
        if self.takes_mask:
            inputs["attention_mask"] = [[1] * len(one) + [0] * (width - len(one)) for one in ids]
        if any(row.positions is not None for row in rows):
            plain = [
                range(len(one)) if row.positions is None else row.positions for row, one in zip(rows, ids, strict=True)
            ]
            inputs["position_ids"] = [[*one, *[0] * (width - len(one))] for one in plain]
        device = self.model.device
        training = self.model.training
        self.model.eval()
        try:
            hidden = self.base(**{name: torch.tensor(value, device=device) for name, value in inputs.items()})[0]
            pooled = _in_float32(self.pooler, hidden[:, :1])
            logits = _in_float32(self.head, pooled)
        finally:
            self.model.train(training)
        return (logits[:, 0] - logits[:, 1]).cpu()


def _from_checkpoint(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def _in_float32(module: Any, x: Tensor) -> Tensor:
    """A module's output with its weights and input in float32; casts cost nothing where they are that already."""
    weights = {name: weight.float() for name, weight in module.named_parameters()}
    output: Tensor = functional_call(module, weights, (x.float(),))
    return output
