"""Made-up topics for next-sentence classification: words, sentences, pairs, and a tiny BERT that can read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from danlu.lab.training import seeded

#: Topics, words of each, and words of all.
TOPICS = 6
_TOPIC_WORDS, _COMMON = 12, 20
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_FIRST_TOPIC_ID = len(_SPECIAL) + _COMMON
_SENTENCES = 50  # of each topic, in the test


def small_bert(seed: int) -> Any:
    """An untrained BERT with a next-sentence head; initial deviation 0.1, below which it does not leave chance."""
    from transformers import BertConfig, BertForNextSentencePrediction

    config = BertConfig(
        vocab_size=_FIRST_TOPIC_ID + TOPICS * _TOPIC_WORDS, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, max_position_embeddings=32, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with seeded(seed):
        return BertForNextSentencePrediction(config)


def word_tokenizer() -> Any:
    """A BERT tokenizer whose vocabulary is the words c0, c1, ... and t0w0, t0w1, ..."""
    from transformers import BertTokenizer

    topics = [f"t{topic}w{word}" for topic in range(TOPICS) for word in range(_TOPIC_WORDS)]
    words = [*_SPECIAL, *(f"c{i}" for i in range(_COMMON)), *topics]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def labels(words: int) -> dict[str, str]:
    """Topic to its first words."""
    return {str(t): " ".join(f"t{t}w{w}" for w in range(words)) for t in range(TOPICS)}


def sentence_ids(topics: Tensor, generator: torch.Generator) -> Tensor:
    """Sentences of 4 to 7 words, each of the topic with probability 0.7, else common; padded with 0.

    Args:
        topics: (rows,) int64.
        generator: source of the words.

    Returns:
        int64 (rows, 7).
    """
    rows = len(topics)
    own = _FIRST_TOPIC_ID + topics[:, None] * _TOPIC_WORDS + torch.randint(_TOPIC_WORDS, (rows, 7), generator=generator)
    common = len(_SPECIAL) + torch.randint(_COMMON, (rows, 7), generator=generator)
    ids = torch.where(torch.rand(rows, 7, generator=generator) < 0.7, own, common)
    lengths = torch.randint(4, 8, (rows, 1), generator=generator)
    return ids.where(torch.arange(7) < lengths, torch.zeros(()).long())


def pairs(generator: torch.Generator, rows: int) -> dict[str, Any]:
    """Model inputs of sentence pairs, and targets: 0 where the second is of the first's topic, 1 where it is random."""
    topics = torch.randint(TOPICS, (rows,), generator=generator)
    random = torch.randint(2, (rows,), generator=generator)
    others = torch.randint(TOPICS, (rows,), generator=generator)
    first = sentence_ids(topics, generator)
    second = sentence_ids(torch.where(random.bool(), others, topics), generator)
    cls, sep = (torch.full((rows, 1), _SPECIAL.index(name)) for name in ("[CLS]", "[SEP]"))
    ids = torch.cat([cls, first, sep, second, sep], 1)
    kinds = torch.cat([torch.zeros(rows, 9), torch.ones(rows, 8)], 1).long()
    # the padding inside a row moves behind it, as a tokenizer writes it
    order = (ids == 0).long().argsort(dim=1, stable=True)
    ids, kinds = ids.gather(1, order), kinds.gather(1, order)
    return {
        "input_ids": ids,
        "token_type_ids": kinds.where(ids != 0, torch.zeros(()).long()),
        "attention_mask": (ids != 0).long(),
        "targets": random,
    }


def pair_texts(drawn: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """The sentences of model inputs as text."""
    words = word_tokenizer().convert_ids_to_tokens
    sides: tuple[list[str], list[str]] = ([], [])
    for ids, kinds in zip(drawn["input_ids"], drawn["token_type_ids"], strict=True):
        for kind, side in enumerate(sides):
            chosen = ids[(kinds == kind) & (ids >= len(_SPECIAL))]
            side.append(" ".join(words(chosen.tolist())))
    return sides


def sentences_to_classify(seed: int) -> tuple[list[str], Tensor]:
    """New sentences as text, and their topics."""
    topics = torch.arange(TOPICS).repeat(_SENTENCES)
    ids = sentence_ids(topics, torch.Generator().manual_seed(7919 + seed))
    words = word_tokenizer().convert_ids_to_tokens
    return [" ".join(words(row[row != 0].tolist())) for row in ids], topics
