"""Zero-shot classification by the next-sentence head of an untouched BERT: does this label belong next to this text?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danlu.zero_shot.scorer import Cut, Ids, PairScorer, Row, refuse_kind
from danlu.zero_shot.sentences import PAIRS, SelfTest
from danlu.zero_shot.templates import Position, find_template, label_sentences

__all__ = ["NSPClassifier", "rank_rows"]

logger = logging.getLogger("danlu.zero_shot")

Labels = Sequence[str] | Mapping[str, str]


class NSPClassifier:
    """Classify texts, mentions and blanks by how well each label sentence follows or precedes the text.

    The score of a pair is logit_0 - logit_1 of the head (index 0: "B follows A"), in float32. Labels are ranked by
    scores and not by the head's probabilities, which are equal to 1 in float32 from a score of about 17 on.

    Args:
        model: BERT, ERNIE, FNet, MegatronBERT or MobileBERT with a next-sentence head that was trained.
        tokenizer: its tokenizer.
        template: label sentence with ``{}`` where the label goes, or a name in ``danlu.zero_shot.TEMPLATES``.
        position: ``prefix`` puts the label sentence before the text, ``suffix`` behind it; None is the named
            template's own side, or ``prefix``.
        batch_tokens: tokens of a batch, padding included; None suits the device. Results do not depend on it.
        max_length: tokens of a pair; None is what the model allows. Longer texts are cut, label sentences never.
        trust_head: take a head that was not in the checkpoint, because it has been trained since.
        progress: draw a bar on a terminal when scoring takes long.

    Raises:
        ValueError: RoBERTa-like models, ALBERT (its head tells the order of sentences), a head that was not in the
            checkpoint, a tokenizer without token types, a template without ``{}``.

    Source: Scientific Spaces archive 8671; arXiv:2109.03564
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: str = "{}",
        position: Position | None = None,
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        trust_head: bool = False,
        progress: bool = True,
    ) -> None:
        self.template = find_template(template, position)
        self.scorer = PairScorer(model, tokenizer, batch_tokens, max_length, trust_head, progress)

    @classmethod
    def from_pretrained(cls, name: str, *, device: str = "auto", dtype: str = "auto", **settings: Any) -> NSPClassifier:
        """Load model and tokenizer from a folder or a hub name; a checkpoint without a trained head is refused.

        Args:
            name: folder or hub name.
            device: ``auto``, ``cpu``, ``cuda``, ...
            dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; the head is float32 in any case.
            settings: as for the class.

        Raises:
            ValueError: as for the class; or no such model.
        """
        from transformers import AutoConfig

        from danlu.hosts.loading import load_next_sentence_model

        try:
            kind = AutoConfig.from_pretrained(name).model_type
        except (OSError, ValueError, KeyError):
            kind = None  # the loading below says what is wrong
        if kind is not None:
            refuse_kind(kind)
        return cls(*load_next_sentence_model(name, device=device, dtype=dtype), **settings)

    def __call__(
        self,
        texts: str | Sequence[str],
        labels: Labels,
        *,
        multi_label: bool = False,
        calibrate: bool | Sequence[str] = False,
        template: str | None = None,
        position: Position | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Classify texts.

        Args:
            texts: one text or several.
            labels: names, or name to the words that go into the template.
            multi_label: each label for itself: its probability against "random sentence".
            calibrate: subtract each label's prior, see :meth:`prior`; or texts to take the prior from.
            template: in place of the object's own.
            position: likewise.

        Returns:
            What the host's zero-shot pipeline returns, one dictionary per text: ``sequence``, ``labels`` from best to
            worst, ``scores`` (probabilities; they sum to 1 unless ``multi_label``).

        Raises:
            ValueError: fewer than two labels (one with ``multi_label``), equal or empty labels, an empty text.
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        fewest = 1 if multi_label else 2
        options = {"template": template, "position": position, "fewest": fewest}
        scores = self.scores(several, labels, calibrate=calibrate, **options)  # type: ignore[arg-type]
        results = [_ranked(text, list(labels), row, multi_label) for text, row in zip(several, scores, strict=True)]
        return results[0] if isinstance(texts, str) else results

    def scores(
        self,
        texts: Sequence[str],
        labels: Labels,
        *,
        calibrate: bool | Sequence[str] = False,
        template: str | None = None,
        position: Position | None = None,
        fewest: int = 2,
    ) -> Tensor:
        """Scores of every text with every label.

        Args:
            texts: as for the call.
            labels: as there.
            calibrate: as there.
            template: as there.
            position: as there.
            fewest: how many labels there must be.

        Returns:
            float32 (texts, labels).

        Raises:
            ValueError: as there.
        """
        chosen = self.template
        if template is not None:
            chosen = find_template(template, position)
        elif position is not None:
            chosen = find_template(chosen.text, position)
        _, sentences = label_sentences(labels, chosen, fewest)
        label_ids, text_ids = self.scorer.encode(sentences), self.scorer.encode(texts)
        rows = (self._beside(text, label, chosen.position) for text in text_ids for label in label_ids)
        scores = self.scorer.score(rows, len(texts) * len(sentences)).view(len(texts), len(sentences))
        if calibrate is not False:
            neutral = None if calibrate is True else calibrate
            scores = scores - self.prior(labels, neutral, template=chosen.text, position=chosen.position, fewest=fewest)
        return scores

    def prior(self, labels: Labels, texts: Sequence[str] | None = None, **options: Any) -> Tensor:
        """What a label scores beside texts that say nothing: contextual calibration, which the source does not have.

        Args:
            labels: as for the call.
            texts: neutral texts, or a sample of your own texts where labels are about equally frequent; None is
                ``N/A`` and the mask token.
            options: ``template`` and ``position``.

        Returns:
            float32 (labels,), the mean score over ``texts``.
        """
        if texts is None:
            texts = ["N/A", self.scorer.tokenizer.mask_token]
        return self.scores(texts, labels, **options).mean(0)

    def score_pairs(self, first: Sequence[str], second: Sequence[str], truncate: Cut = "longest_first") -> Tensor:
        """Scores of sentence pairs, for :class:`SamplesContrast` or a ranking of your own.

        Args:
            first: first sentences.
            second: second sentences, as many.
            truncate: which sentence is cut in pairs that are too long: ``longest_first``, ``only_first``,
                ``only_second``.

        Returns:
            float32 (pairs,): logit_0 - logit_1; its sigmoid is the head's probability that the second follows.

        Raises:
            ValueError: lists of different lengths, an empty sentence, an unknown ``truncate``.
        """
        if len(first) != len(second):
            raise ValueError(f"first and second must be equally many, got {len(first)} and {len(second)}")
        if truncate not in ("longest_first", "only_first", "only_second"):
            raise ValueError(f"truncate must be longest_first, only_first or only_second, got {truncate!r}")
        pairs = zip(self.scorer.encode(first), self.scorer.encode(second), strict=True)
        return self.scorer.score((self.scorer.fit(a, b, truncate) for a, b in pairs), len(first))

    def rank(
        self, texts: Sequence[str], candidates: Sequence[Sequence[str]], position: Position | None = None
    ) -> list[dict[str, Any]]:
        """Rank sentences of its own for each text: answers, descriptions, continuations.

        Args:
            texts: the texts.
            candidates: for each text at least two sentences, which are taken as they are.
            position: side of the candidates; None is the object's own.

        Returns:
            As for the call, with the sentences as labels.
        """
        side = find_template("{}", position or self.template.position).position
        return rank_rows(self, texts, candidates, lambda i, ids, candidate: self._beside(ids, candidate, side))

    def self_test(self) -> SelfTest:
        """Whether the head was trained: true continuations must outscore sentences of another pair.

        Twelve built-in pairs in English and in Chinese; a language that the vocabulary does not know is left out.
        Takes 48 short rows. Logs a warning below 70 %: many checkpoints called BERT were trained without next
        sentences, and may ship a head or a pooler that never learnt anything.
        """
        found: dict[str, float] = {}
        for language, pairs in PAIRS.items():
            first, second = [a for a, _ in pairs], [b for _, b in pairs]
            ids = self.scorer.encode([*first, *second])
            unknown = self.scorer.tokenizer.unk_token_id
            if sum(one.count(unknown) for one in ids) > 0.2 * sum(map(len, ids)):
                continue
            half = len(pairs) // 2
            scores = self.score_pairs(first * 2, second + second[half:] + second[:half])
            true, other = scores[: len(pairs)], scores[len(pairs) :]
            found[language] = float((true > other).float().mean())
        result = SelfTest(found)
        if not result.passed:
            logger.warning("%s; scores of this model may mean nothing", result)
        return result

    def _beside(self, text: Ids, label: Ids, position: Position) -> Row:
        if position == "prefix":
            return self.scorer.fit(label, text, "only_second")
        return self.scorer.fit(text, label, "only_first")


def rank_rows(
    classifier: NSPClassifier,
    texts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    row: Callable[[int, Ids, Ids], Row],
    template: str = "{}",
) -> list[dict[str, Any]]:
    """Rank candidates of each text by rows that the caller builds.

    Args:
        classifier: scores the rows.
        texts: what is encoded and named in the results.
        candidates: for each text at least two.
        row: of text number, text ids and candidate ids.
        template: what a candidate is put into.

    Returns:
        As of a call of the classifier, with the candidates as labels.
    """
    if isinstance(texts, str) or len(candidates) != len(texts):
        raise ValueError(f"candidates must be one list for each text, got {len(candidates)} lists for {texts!r:.60}")
    chosen = find_template(template)
    encode = classifier.scorer.encode
    encoded = [encode(label_sentences(own, chosen)[1]) for own in candidates]
    text_ids = encode(texts)
    rows = (row(i, text_ids[i], candidate) for i, own in enumerate(encoded) for candidate in own)
    scores = classifier.scorer.score(rows, sum(map(len, encoded))).split([len(own) for own in encoded] or [0])
    return [_ranked(text, list(own), one, False) for text, own, one in zip(texts, candidates, scores, strict=False)]


def _ranked(text: str, names: list[str], scores: Tensor, independent: bool) -> dict[str, Any]:
    # float64, and sorted by score: probabilities of a confident model are equal long before its scores are
    wide = scores.double()
    probabilities = wide.sigmoid() if independent else wide.softmax(-1)
    order = torch.argsort(wide, descending=True, stable=True).tolist()
    return {
        "sequence": text,
        "labels": [names[i] for i in order],
        "scores": [float(probabilities[i]) for i in order],
    }
