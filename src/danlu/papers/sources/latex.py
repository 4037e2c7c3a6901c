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
    r"\{?\\(?:([`'^\"~=.])\s*|([uvHcdbrk])(?=[\s{\\])\s*)(?:\{\s*(?:\\([ij])(?![a-zA-Z])|([^\W\d_]))\s*\}|\\([ij])(?![a-zA-Z])\s?|([^\W\d_]))\}?"
)
_SPECIAL = re.compile(r"\{?\\(" + "|".join(sorted(_LETTERS, key=len, reverse=True)) + r")(?:\{\}|\}|(?![a-zA-Z])\s?)")
_STYLE = re.compile(r"\\(?:emph|textit|textbf|texttt|textsc|textrm|mbox|textsuperscript|textsubscript)\s*\{([^{}]*)\}")


def plain(text: str) -> str:
    """Text with TeX accents as Unicode letters in composed form and white space folded; mathematics is left alone.

    Args:
        text: a title, a name or an abstract as its source gives it.
    """
    parts, place = [], 0
    for match in _MATH.finditer(text):
        parts += [_outside(text[place : match.start()]), match.group()]
        place = match.end()
    parts.append(_outside(text[place:]))
    return unicodedata.normalize("NFC", " ".join("".join(parts).split()))


def _outside(text: str) -> str:
    if "\\" not in text and "~" not in text:
        return text
    text = _STYLE.sub(r"\1", text)
    text = _ACCENT.sub(_accented, text)
    text = _SPECIAL.sub(lambda match: _LETTERS[match.group(1)], text)
    return re.sub(r"\\([&%$#_{}])", r"\1", text).replace("~", " ")


def _accented(match: re.Match[str]) -> str:
    sign = match.group(1) or match.group(2)
    letter = next(part for part in match.groups()[2:] if part)
    composed = unicodedata.normalize("NFC", letter + _ACCENTS[sign])
    braces = match.group().startswith("{") and not match.group().endswith("}")
    return ("{" if braces else "") + composed


def without_braces(text: str) -> str:
    """Text without the braces that BibTeX uses to keep capitals; those inside mathematics stay."""
    parts, place = [], 0
    for match in _MATH.finditer(text):
        parts += [re.sub(r"(?<!\\)[{}]", "", text[place : match.start()]), match.group()]
        place = match.end()
    parts.append(re.sub(r"(?<!\\)[{}]", "", text[place:]))
    return "".join(parts)
