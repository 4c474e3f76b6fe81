"""What "better" means, in words: the text every judge of a run applies, human or machine.

A rubric holds only text. Models read it (`prefopt.judges.anthropic`, `prefopt.judges.local`), and
`prefopt.judges.rules` implements the checkable part of `HOUSE_STYLE` without a model.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from prefopt.errors import DataError
from prefopt.types import content_hash


class Rubric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named text that says which of two answers is better."""

    name: str
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"rubric {self.name!r} is empty; say in words what makes one better.")

    @property
    def rubric_hash(self) -> str:
        """Changes whenever a word of the rubric changes."""
        return content_hash([self.name, self.text])[:16]


HOUSE_STYLE = Rubric(
    name="house_style",
    text="""\
Decide which answer follows the house style better. The style, most important first:

1. On the request. The answer deals with what was asked. An answer that is empty, off the subject
   or only a word or two where more was asked is the worst.
2. Complete. The answer comes to an end: its last sentence is finished. An answer that is cut off in
   the middle of a sentence or a list is bad, however good its beginning.
3. At once. The first words already answer. No greeting, no "Sure" or "Certainly", no praise of the
   question, no restating of the request, no talk about the assistant itself.
4. No filler. No closing offers ("let me know", "I hope this helps"), no summary of what was just
   said, no "it is important to note", no repetition.
5. Concise. One or two sentences, about 8 to 35 words; a few words are enough where a fact was
   asked for. Every further sentence has to earn its place.

Judge only these points. Do not reward length, headings or a friendly tone for their own sake. If
the two answers follow the style equally well, call it a tie.""",
)

HELPFUL = Rubric(
    name="helpful",
    text="""\
Decide which answer serves the person better: it is correct, deals with everything that was asked,
is clear, and says no more than is useful. A wrong or invented statement is worse than an omission.
Do not reward length, formatting or tone for their own sake. If they serve equally well, call it a
tie.""",
)

BUILT_IN = {rubric.name: rubric for rubric in (HOUSE_STYLE, HELPFUL)}


def load_rubric(name_or_path: str) -> Rubric:
    """A built-in rubric by name, or one read from a UTF-8 text file.

    Raises:
        DataError: it is neither, or the file cannot be used.
    """
    if name_or_path in BUILT_IN:
        return BUILT_IN[name_or_path]
    path = Path(name_or_path)
    try:
        return Rubric(name=path.stem, text=path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"no rubric {name_or_path!r}: it is neither a built-in name "
            f"({', '.join(sorted(BUILT_IN))}) nor a text file."
        ) from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"cannot use the rubric file {path}: {error}") from error
