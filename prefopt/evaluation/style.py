"""How an answer looks, in numbers: length and Markdown. In: two texts. Out: named differences.

The features are those that Arena-Hard and LMSYS's style control hold constant (Li et al. 2024,
"Does style matter?", lmsys.org/blog/2024-08-28-style-control). It fits nothing.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from prefopt.evaluation.win_rate import word_count

StyleFeature = Literal["length", "headers", "lists", "bold"]

STYLE_FEATURES: tuple[StyleFeature, ...] = ("length", "headers", "lists", "bold")

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_HEADER = re.compile(r"^#{1,6}\s", re.MULTILINE)
_LIST = re.compile(r"^\s*(?:[-*+]|\d+\.)\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


class TextStyle(NamedTuple):
    """Counts in one text; Markdown inside code blocks is code and not counted."""

    words: int
    headers: int
    lists: int
    bold: int


def text_style(text: str) -> TextStyle:
    """Words (code included), Markdown headers, list items and bold passages."""
    prose = _CODE.sub("", text)
    return TextStyle(
        words=word_count(text),
        headers=len(_HEADER.findall(prose)),
        lists=len(_LIST.findall(prose)),
        bold=len(_BOLD.findall(prose)),
    )


def style_difference(a: str, b: str) -> dict[StyleFeature, float]:
    """Each feature of `a` against `b`, between -1 and 1; 0 for equal texts, its negative for (b, a).

        length = (words_a - words_b) / (words_a + words_b)
        others = (x_a - x_b) / (x_a + x_b + 1), with x = count / (words + 1)

    as in Arena-Hard, with words for its tokens. Two empty texts have length 0.
    """
    first, second = text_style(a), text_style(b)
    words = first.words + second.words
    found: dict[StyleFeature, float] = {
        "length": (first.words - second.words) / words if words else 0.0
    }
    for name in STYLE_FEATURES[1:]:
        x, y = (getattr(side, name) / (side.words + 1) for side in (first, second))
        found[name] = (x - y) / (x + y + 1)
    return found
