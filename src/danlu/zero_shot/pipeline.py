"""The host library's pipeline for next-sentence classification: ``pipeline("nsp-zero-shot-classification", ...)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForNextSentencePrediction, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from danlu.zero_shot.nsp import NSPClassifier

__all__ = ["TASK", "NSPZeroShotClassificationPipeline"]

TASK = "nsp-zero-shot-classification"


class NSPZeroShotClassificationPipeline(Pipeline):
    """Zero-shot classification with a next-sentence head, called like the host's zero-shot pipeline.

    ``pipeline(TASK, model=...)(sequences, candidate_labels=[...])`` with, as there, ``hypothesis_template`` and
    ``multi_label``; and ``position`` and ``calibrate`` of :class:`NSPClassifier`. A list of texts is scored as one
    set of pairs sorted by length, so ``batch_size`` is not needed.

    Args:
        batch_tokens: as for :class:`NSPClassifier`.
        max_length: as there.
        trust_head: as there.
        settings: what every pipeline of the host takes.

    Raises:
        ValueError: as there.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(
        self,
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        trust_head: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        limits: dict[str, Any] = {"batch_tokens": batch_tokens, "max_length": max_length, "trust_head": trust_head}
        self.classifier = NSPClassifier(self.model, self.tokenizer, **limits)

    def __call__(
        self, sequences: str | Sequence[str], candidate_labels: Sequence[str] | str | None = None, **options: Any
    ) -> Any:
        """Classify one text (a dictionary) or a list of texts (a list of dictionaries).

        Args:
            sequences: the texts; also a dataset or generator, which is answered one by one.
            candidate_labels: a list, or a string with commas.
            options: ``hypothesis_template``, ``position``, ``multi_label``, ``calibrate``.

        Returns:
            ``sequence``, ``labels`` and ``scores``, as the host's zero-shot pipeline.
        """
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        # a tuple is one input to the host, so a whole list goes through the model together
        return super().__call__(tuple(sequences) if isinstance(sequences, list) else sequences, **options)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = ("candidate_labels", "hypothesis_template", "position", "multi_label", "calibrate")
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"options must be among {', '.join(known)}, got {unknown[0]!r}")
        return {}, {name: value for name, value in options.items() if value is not None}, {}

    def preprocess(self, inputs: Any) -> dict[str, Any]:
        """Nothing: pairs are cut and batched together with the labels."""
        return {"texts": inputs}

    def _forward(self, inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        labels = options.pop("candidate_labels", None)
        if labels is None:
            raise ValueError("candidate_labels must be given, at least two of them")
        if isinstance(labels, str):
            labels = [label.strip() for label in labels.split(",") if label.strip()]
        template = options.pop("hypothesis_template", None)
        return {"result": self.classifier(inputs["texts"], labels, template=template, **options)}

    def postprocess(self, outputs: dict[str, Any]) -> Any:
        """Nothing: the classifier answers in the host's form."""
        return outputs["result"]


def _register() -> None:
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=NSPZeroShotClassificationPipeline,
            pt_model=AutoModelForNextSentencePrediction,
            type="text",
        )


_register()
