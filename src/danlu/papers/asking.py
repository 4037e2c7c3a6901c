"""Asking about one paper from the command line: a file, or an identifier whose PDF is fetched and thrown away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from danlu.papers.answer import context
from danlu.papers.answer.engines import make
from danlu.papers.answer.pdf import extract
from danlu.papers.answer.types import PaperText, Question
from danlu.papers.answering import read_paper, stream_answers
from danlu.papers.ids import SOURCES, InvalidIdentifier, parse_id, pdf_url
from danlu.papers.net.fetch import PDF_BYTES, Fetcher
from danlu.papers.settings import Settings
from danlu.papers.store import Store

#: Called with the number of a question, its text with its first piece and nothing later, and the next piece.
Show = Callable[[int, str, str], None]


async def answers_about(
    settings: Settings, paper: str, questions: Sequence[Question], show: Show | None = None
) -> dict[str, Any]:
    """Answer questions about a paper.

    Args:
        settings: of the site, whose engine answers.
        paper: a file, or an identifier.
        questions: to ask.
        show: called with every piece as it comes.

    Returns:
        ``answers`` (question, text, quotes), ``notes`` and ``engine``.

    Raises:
        ValueError: neither a file nor an identifier, no engine, or an identifier without a contact.
        AnswerError: the paper cannot be read, or the engine cannot answer.
        FetchError: the source cannot be asked.
    """
    engine = make(settings.engine)
    if engine is None:
        raise ValueError("engine.kind is none in the settings: nobody answers")
    text = await _text(settings, paper)
    found: dict[int, dict[str, Any]] = {}
    try:
        async for question, piece in stream_answers(text, engine, questions):
            first = question.number not in found
            entry = found.setdefault(question.number, {"question": question.text, "text": "", "quotes": []})
            if piece.restart:
                entry |= {"text": "", "quotes": []}
            entry["text"] += piece.text
            entry["quotes"] += [asdict(quote) for quote in piece.quotes]
            if show is not None:
                show(question.number, question.text if first else "", piece.text)
    finally:
        await engine.close()
    warning = context.instruction_note(text)
    notes = [*text.notes, *([warning] if warning else [])]
    return {"engine": engine.label, "answers": [{"number": n, **entry} for n, entry in found.items()], "notes": notes}


async def _text(settings: Settings, paper: str) -> PaperText:
    path = Path(paper)
    if path.is_file():
        return await asyncio.to_thread(read_paper, path)
    try:
        identifier = parse_id(paper)
    except InvalidIdentifier as error:
        raise ValueError(f"neither a file nor an identifier of a paper: {paper!r} ({error})") from error
    address = pdf_url(identifier)
    if address is None:
        raise ValueError(f"{identifier} has no PDF at a stable address: download it and give the file")
    if not settings.contact:
        raise ValueError("--contact must be given to fetch a paper: sources want to know whom to write to")
    store = Store(settings.database_url)
    try:
        fetcher = Fetcher(store, settings.contact)
        fetched = await fetcher.get(
            address, SOURCES[identifier.source], max_bytes=PDF_BYTES, accept=("application/pdf",)
        )
    finally:
        store.close()
    return await asyncio.to_thread(extract, fetched.body, str(identifier))
