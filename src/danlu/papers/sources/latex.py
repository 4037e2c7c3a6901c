r"""TeX in titles, names and abstracts: accents become letters, mathematics stays as it is.

``Schr\"{o}dinger`` is found by nobody who types his name. Between dollars, ``\(`` and ``\[`` nothing is touched.
"""

from __future__ import annotations

import re
import unicodedata

_ACCENTS = {
    "`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", "=": "\u0304", "u": "\u0306", ".": "\u0307",
    '"': "\u0308", "r": "\u030a", "H": "\u030b", "v": "\u030c", "d": "\u0323", "c": "\u0327", "k": "\u0328",
    "b": "\u0331",
}  # fmt: skip
_LETTERS = {
    "o": "ø", "O": "Ø", "l": "ł", "L": "Ł", "ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "aa": "å", "AA": "Å",
    "i": "ı", "j": "ȷ", "dh": "ð", "DH": "Ð", "th": "þ", "TH": "Þ", "ng": "ŋ", "NG": "Ŋ", "dj": "đ", "DJ": "Đ",
    "textendash": "–", "textemdash": "—", "textquoteright": "’", "textquoteleft": "‘",
}  # fmt: skip
_MATH = re.compile(r"(?<!\\)\$\$.*?(?<!\\)\$\$|(?<!\\)\$.*?(?<!\\)\$|\\\(.*?\\\)|\\\[.*?\\\]", re.DOTALL)
#: An accent of signs, or of a letter that is followed by a brace or a space, over one letter with or without braces.
_ACCENT = re.compile(
    r"(\{)?\\(?:([`'^\"~=.])\s*|([uvHcdbrk])(?=[\s{\\])\s*)"
    r"(?:\{\s*(?:\\([ij])(?![a-zA-Z])|([^\W\d_]))\s*\}|\\([ij])(?![a-zA-Z])\s?|([^\W\d_]))(?(1)(\})?)"
)
_SPECIAL = re.compile(
    r"(\{)?\\("
    + "|".join(sorted(_LETTERS, key=len, reverse=True))
    + r")(?:\{\}|(?![a-zA-Z])(?(1)(?=\})|\s?))(?(1)(\})?)"
)
_STYLE = re.compile(r"\\(?:emph|textit|textbf|texttt|textsc|textrm|mbox|textsuperscript|textsubscript)\s*\{([^{}]*)\}")
#: A tie joins what stands on both sides of it; a tilde before a number means about, and one in an address is its own.
_TIE = re.compile(r"(?<=[^\s/\\~])~(?=[^\s~])")
#: Control characters and halves of characters, which databases refuse, and marks that turn the direction of text.
_UNFIT = re.compile("[\x00-\x08\x0e-\x1b\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """Text with TeX accents as Unicode letters in composed form and white space folded; mathematics is left alone.

    Args:
        text: a title, a name or an abstract as its source gives it.

    Returns:
        Text that any database can hold.
    """
    text = text.strip().replace("\n", " ")
    tex = "\\" in text or "~" in text
    if not tex and "  " not in text and text.isascii() and text.isprintable():
        return text
    if tex:
        parts, place = [], 0
        for match in _MATH.finditer(text):
            parts += [_outside(text[place : match.start()]), match.group()]
            place = match.end()
        text = "".join([*parts, _outside(text[place:])])
    text = " ".join(text.split())
    if text.isascii() and text.isprintable():
        return text
    return unicodedata.normalize("NFC", " ".join(_UNFIT.sub("", text).split()))


def _outside(text: str) -> str:
    text = _STYLE.sub(r"\1", text)
    text = _ACCENT.sub(_accented, text)
    text = _SPECIAL.sub(_special, text)
    return _TIE.sub(" ", re.sub(r"\\([&%$#_{}])", r"\1", text))


def _accented(match: re.Match[str]) -> str:
    opened, *found, closed = match.groups()
    sign, letter = (next(part for part in parts if part) for parts in (found[:2], found[2:]))
    composed = unicodedata.normalize("NFC", letter + _ACCENTS[sign])
    return ("{" if opened and not closed else "") + composed


def _special(match: re.Match[str]) -> str:
    opened, name, closed = match.groups()
    return ("{" if opened and not closed else "") + _LETTERS[name]


def without_braces(text: str) -> str:
    """Text without the braces that BibTeX uses to keep capitals; those inside mathematics stay."""
    parts, place = [], 0
    for match in _MATH.finditer(text):
        parts += [re.sub(r"(?<!\\)[{}]", "", text[place : match.start()]), match.group()]
        place = match.end()
    parts.append(re.sub(r"(?<!\\)[{}]", "", text[place:]))
    return "".join(parts)


def doi(text: str) -> str:
    """A DOI in one form: the first of several, without address, in lower case; empty where it is none."""
    words = plain(text).split()
    found = re.sub(r"(?:https?://(?:dx\.)?doi\.org/|doi:)", "", words[0].lower()) if words else ""
    return found if found.startswith("10.") else ""


def originals(**texts: str) -> dict[str, str]:
    """Texts that `plain` changes, as their source gives them, under names that begin with ``raw_``.

    They are kept beside what is shown, so that a better reading of TeX can be applied later.
    """
    kept = {}
    for name, text in texts.items():
        if "\\" in text:
            folded = _UNFIT.sub("", " ".join(text.split()))
            if folded != plain(text):
                kept[f"raw_{name}"] = folded
    return kept
