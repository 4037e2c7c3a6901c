"""Finding the sections of a paper in its text, and what part each plays."""

from __future__ import annotations

import re

from danlu.papers.answer.types import PaperText, Section

#: Roles by the words that a title begins with or holds, the first that fits.
_ROLES = (
    ("abstract", r"abstract|摘要"),
    ("references", r"references|bibliography|literature cited|works cited|参考文献"),
    ("acknowledgements", r"acknowledge?ments?|致谢"),
    ("appendix", r"appendix|appendices|supplement|附录"),
    ("limitations", r"limitations?|ethic|broader impact|局限"),
    ("conclusion", r"conclusions?|concluding|summary|future work|outlook|结论|总结"),
    ("related", r"related works?|prior works?|previous works?|background|preliminar|literature review|相关工作|背景"),
    ("introduction", r"introduction|motivation|引言|介绍"),
    ("experiments", r"experiment|evaluation|results?|ablation|benchmark|empirical|实验|结果"),
    ("discussion", r"discussions?|analysis|讨论|分析"),
    ("method", r"methods?|methodology|approach|model|architecture|algorithm|framework|proposed|theory|our |方法|模型"),
)
_KNOWN = re.compile(
    r"(?:abstract|introduction|motivation|background|preliminaries|related works?|prior work|methods?|methodology|"
    r"approach|experiments?|experimental (?:setup|results|settings?)|evaluation|results(?: and discussion)?|"
    r"ablation(?: stud(?:y|ies))?|discussion|limitations|conclusions?(?: and future work)?|future work|"
    r"acknowledge?ments?|references|bibliography|appendix|摘要|引言|相关工作|方法|实验|结论|参考文献)\Z",
    re.IGNORECASE,
)
_NUMBERED = re.compile(
    r"((?:[0-9]{1,2}(?:\.[0-9]{1,2}){0,2}\.?|[IVX]{1,5}\.|[A-Z](?:\.[0-9]{1,2}){0,2}\.))\s+(\S.{0,78})\Z"
)
#: "Abstract—We show", but not "abstract-level".
RUN_IN = re.compile(r"(Abstract|ABSTRACT|摘要)\s*(?:[—–:.]\s*|-\s*(?=[A-Z])|-\s+)(?=\S)")
#: Small capitals come apart: "I NTRODUCTION".
_APART = re.compile(r"\b([A-Z]) (?=[A-Z]{2,}\b)")
_NUMBER = re.compile(r"(?:[0-9]{1,2}(?:\.[0-9]{1,2})*\.?|[IVX]{1,5}\.|[A-Z](?:\.[0-9]{1,2})*\.)\s+")
#: Numbers of subsections: "3.1", and the letters that are no Roman numbers of sections.
_BELOW = re.compile(r"[0-9]{1,2}\.[0-9]|[A-HJ-UW]\.\s")
#: A list of references is longer than this; shorter ones are lines of a table of contents.
_REFERENCES = 200
_VERB = re.compile(
    r"\b(?:is|are|was|were|be|been|has|have|had|does|do|did|can|could|will|would|may|might|should|must|used|uses|use|shows?|"
    r"gives?|takes?|took|per|trained|achieves?|outperforms?)\b"
)
_OTHER = re.compile(
    r"(?:table|figure|fig|algorithm|theorem|lemma|definition|proposition|equation|corollary)\b", re.IGNORECASE
)
_LINE = 80
#: Text without headings is cut into windows of about this many characters.
_WINDOW = 6000


def role_of(title: str) -> str:
    """The part that a section plays, from its title."""
    whole = _APART.sub(r"\1", title.strip())
    bare = _NUMBER.sub("", whole, count=1).lower() or whole.lower()
    for role, pattern in _ROLES:
        if re.match(rf"(?:{pattern})", bare):
            return role
    for role, pattern in _ROLES[4:]:
        if re.search(rf"\b(?:{pattern})", bare):
            return role
    return "other"


def heading(line: str) -> str | None:
    """The title that a line is, or None.

    A title is a short line with a number in front, a capital at the start, no verb and no stop at its end, or one of
    the titles that every paper uses. "2 GPUs were used" and "3.2 seconds per step" are not, nor are captions and lines
    of a table of contents.
    """
    found = line.strip()
    text = _APART.sub(r"\1", found)
    if not text or len(text) > _LINE or "...." in text or ". . ." in text or re.search(r"\s[0-9]+\Z", text):
        return None
    if _KNOWN.match(text):
        return found if text[0].isupper() or not text.isascii() else None
    match = _NUMBERED.match(text)
    if match is None:
        return None
    title = match.group(2)
    if title[-1] in ".,;:?!" and not title.endswith("..."):
        return None
    if not title[0].isupper() and not title[0] > "\u2e80":
        return None
    letters = sum(character.isalpha() for character in title)
    if letters < 0.6 * len(title.replace(" ", "")) or _VERB.search(title) or _OTHER.match(title):
        return None
    # Four letters at least: "3 M" and "2 GPUs" are numbers of something.
    if title.isascii() and (letters < 4 or re.fullmatch(r"[A-Z]{2,}s", title)):
        return None
    return found


def split(text: str, page_starts: tuple[int, ...] = ()) -> tuple[Section, ...]:
    """The sections of a text, in order, without gaps or overlaps.

    Args:
        text: of the paper.
        page_starts: place of the first character of each page.

    Returns:
        Sections from heading to heading; what stands before the first is called the front. Without headings: windows.
    """
    marks: list[tuple[int, str]] = []
    place = 0
    for line in text.splitlines(keepends=True):
        found = heading(line)
        run_in = RUN_IN.match(line.lstrip()) if found is None else None
        if found is not None:
            marks.append((place, found))
        elif run_in is not None:
            marks.append((place, run_in.group(1).capitalize()))
        place += len(line)
    if sum(role_of(title) != "references" for _, title in marks) < 2:
        lists = [start for start, title in marks if role_of(title) == "references"]
        if not lists:
            return _windows(text, len(text), page_starts)
        references = _section("References", "references", lists[-1], len(text), page_starts)
        return (*_windows(text, lists[-1], page_starts), references)
    if marks[0][0] > 0:
        marks.insert(0, (0, "Front"))
    ends = [start for start, _ in marks[1:]] + [len(text)]
    found_roles: list[Section] = []
    behind_references = False
    for (start, title), end in zip(marks, ends, strict=True):
        role = (
            "abstract"
            if title == "Front" and len(marks) > 1 and role_of(marks[1][1]) == "introduction"
            else role_of(title)
        )
        if behind_references and role not in ("references", "acknowledgements"):
            role = "appendix"
        behind_references = behind_references or (role == "references" and end - start > _REFERENCES)
        found_roles.append(_section(title, role, start, end, page_starts))
    return tuple(_inherit(found_roles))


def _inherit(sections: list[Section]) -> list[Section]:
    """A subsection without a role of its own plays that of the section it is in."""
    result: list[Section] = []
    held = "other"
    for section in sections:
        below = section.role != "appendix" and _BELOW.match(section.title) is not None
        if not below:
            held = section.role
        role = held if below and section.role == "other" else section.role
        # What stands between introduction and experiments without a telling title is what the paper does.
        if (
            role == "other"
            and not below
            and any(each.role == "introduction" for each in result)
            and not any(each.role == "experiments" for each in result)
        ):
            role = held = "method"
        result.append(Section(section.title, role, section.start, section.end, section.page_from, section.page_to))
    return result


def _windows(text: str, last: int, page_starts: tuple[int, ...]) -> tuple[Section, ...]:
    sections: list[Section] = []
    start = 0
    while start < last:
        end = min(start + _WINDOW, last)
        if end < last:
            stop = text.rfind("\n", start + _WINDOW // 2, end)
            end = stop + 1 if stop > 0 else end
        role = "introduction" if start == 0 else "conclusion" if end == last else "other"
        sections.append(_section(f"Part {len(sections) + 1}", role, start, end, page_starts))
        start = end
    return tuple(sections)


def _section(title: str, role: str, start: int, end: int, page_starts: tuple[int, ...]) -> Section:
    def page(place: int) -> int:
        return sum(each <= place for each in page_starts)

    return Section(title, role, start, end, page(start), page(max(start, end - 1)))


def from_abstract(title: str, abstract: str, note: str) -> PaperText:
    """What an answer rests on where there is no full text.

    Args:
        title: of the paper.
        abstract: of the paper.
        note: that tells the reader why.
    """
    section = Section("Abstract", "abstract", 0, len(abstract))
    return PaperText(abstract, title, (), (section,), (note,))


def from_text(text: str, title: str = "", page_starts: tuple[int, ...] = (), notes: tuple[str, ...] = ()) -> PaperText:
    """A text with its sections."""
    return PaperText(text, title, page_starts, split(text, page_starts), notes)
