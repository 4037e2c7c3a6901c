"""Making the engine that the settings ask for."""

from __future__ import annotations

from danlu.papers.answer.types import Engine
from danlu.papers.settings import EngineSettings


def make(settings: EngineSettings) -> Engine | None:
    """The engine of a site; None where nobody answers.

    Args:
        settings: of the engine.

    Raises:
        ImportError: a package that it needs is missing.
        ValueError: a model that cannot be loaded.
    """
    if settings.kind == "none":
        return None
    if settings.kind == "extractive":
        from danlu.papers.answer.extractive import ExtractiveEngine

        return ExtractiveEngine()
    if settings.kind == "endpoint":
        from danlu.papers.answer.endpoint import EndpointEngine

        key = settings.key.get_secret_value()
        return EndpointEngine(settings.url, settings.model, key, settings.context, settings.parameters)
    from danlu.papers.answer.local import LocalEngine

    return LocalEngine(settings.model)
