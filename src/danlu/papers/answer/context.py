"""Fitting a paper into what a model reads at once: the sections that matter to a question, or windows of the text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from danlu.papers.answer.types import PaperText, Question, Section

#: Roles that matter to each question, the most telling first; the abstract goes with all of them.
ROLES = {
    1: ("abstract", "introduction"),
    2: ("abstract", "related", "introduction"),
    3: ("abstract", "method"),
    4: ("abstract", "experiments"),
    5: ("abstract", "limitations", "conclusion", "discussion"),
    6: ("abstract", "conclusion", "introduction"),
}
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
#: Sentences in a paper that speak to whoever reads it by machine.
_INSTRUCTIONS = re.compile(
    r"ignore (?:all |any |the )?(?:previous|prior|above|earlier)|"
    r"disregard (?:all |the |any )?(?:previous|prior|above|instructions)|"
    r"give (?:a |only )?(?:positive|favou?rable) review|do not (?:highlight|mention) any (?:negative|weakness)|"
    r"as (?:a|an) (?:large )?language model|you (?:are|must|should) now|system prompt|recommend accept(?:ance|ing)|"
    r"忽略(?:之前|以上|上述|前面)的?(?:所有|一切)?(?:指令|指示|提示|内容)|给出(?:积极|正面|好)的?评".replace(
        " ", r"\s+"
    ),
    re.IGNORECASE,
)


def count_tokens(text: str) -> int:
    """About how many tokens a text has, on the safe side: one for three and a half characters, one for each of CJK."""
    dense = len(_CJK.findall(text))
    return dense + int((len(text) - dense) / 3.5) + 1


def routed(paper: PaperText, question: Question) -> list[Section]:
    """The sections that matter to a question, in the order of the paper; all but the references where none does."""
    wanted = ROLES[question.number]
    found = [section for section in paper.sections if section.role in wanted]
    telling = [section for section in found if section.role != "abstract"]
    if telling:
        return found
    return [section for section in paper.sections if section.role not in ("references", "acknowledgements", "appendix")]


def body(paper: PaperText, sections: Sequence[Section] | None = None) -> str:
    """The text of some sections, or of all but the references, with the page at the start of each."""
    chosen = sections if sections is not None else [each for each in paper.sections if each.role != "references"]
    parts = []
    for section in chosen:
        page = f" (page {section.page_from})" if section.page_from else ""
        parts.append(f"## {section.title}{page}\n{paper.text[section.start : section.end].strip()}\n")
    return "\n".join(parts)


def windows(paper: PaperText, sections: Sequence[Section], tokens: int, overlap: float = 0.1) -> list[str]:
    """Pieces of some sections, each of at most so many tokens, overlapping, cut at line ends where possible."""
    text = body(paper, sections)
    found, start = [], 0
    while start < len(text):
        end = _longest(text, start, tokens)
        found.append(text[start:end])
        if end >= len(text):
            break
        start = max(end - int((end - start) * overlap), start + 1)
    return found


def _longest(text: str, start: int, tokens: int) -> int:
    """End of the longest piece from a place that has at most so many tokens."""
    low, high = start + 1, min(len(text), start + 4 * tokens)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_tokens(text[start:middle]) <= tokens else (low, middle - 1)
    if low < len(text):
        stop = max(
            text.rfind("\n", start + (low - start) // 2, low), text.rfind(". ", start + (low - start) // 2, low) + 1
        )
        low = stop + 1 if stop > start else low
    return low


def instruction_note(paper: PaperText) -> str | None:
    """A note where the paper holds text that seems to be written for a machine that reads it."""
    if _INSTRUCTIONS.search(paper.text):
        return (
            "The text of this paper holds sentences that look like instructions to a model: read the answers with care."
        )
    return None


def delimited(text: str) -> str:
    """A paper between marks that it cannot close itself."""
    clean = text.replace("<<<", "‹‹‹").replace(">>>", "›››")
    return f"<<<PAPER\n{clean}\nPAPER>>>"
