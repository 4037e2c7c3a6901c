"""Classification without labelled data. Importing this registers the host pipeline ``nsp-zero-shot-classification``."""

from __future__ import annotations

from danlu.zero_shot.contrast import SamplesContrast
from danlu.zero_shot.inside import fill_blank, two_stage
from danlu.zero_shot.nsp import NSPClassifier
from danlu.zero_shot.pipeline import TASK, NSPZeroShotClassificationPipeline
from danlu.zero_shot.sentences import SelfTest
from danlu.zero_shot.templates import TEMPLATES, Template

__all__ = [
    "TASK",
    "TEMPLATES",
    "NSPClassifier",
    "NSPZeroShotClassificationPipeline",
    "SamplesContrast",
    "SelfTest",
    "Template",
    "fill_blank",
    "two_stage",
]
