"""General data: what a model shall not forget while it learns something else.

    a user's file, Hub dataset or rows ──load_general──▶ Demonstration

No row may hold a text on which forgetting is measured: a model that rehearses the examination would
seem to have forgotten nothing. Knows no tokenizer and no model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prefopt.data.demonstrations import Demonstration, draw_general, load_demonstrations
from prefopt.data.prompts import plain_texts
from prefopt.data.rows import Source, read_rows
from prefopt.errors import DataError
from prefopt.types import Prompt

OWN_ANSWERS = "own_answers"
"""In the place of a source: the model's own answers, given before it is trained."""

# So many words in a row are no coincidence (Brown et al. 2020, arXiv:2005.14165, appendix C), nor is
# a whole message of so many: shorter ones ("Yes.", "Thank you.") are anybody's.
_N_WORDS, _N_WORDS_OF_MESSAGE = 13, 5
_WORDS = re.compile(r"\w+")
_TASKS = Path(__file__).parents[1] / "evaluation" / "capability_tasks"

Words = tuple[str, ...]


def load_general(
    source: Source,
    *,
    most: int | None = None,
    seed: int = 0,
    held_out: Sequence[Prompt] = (),
    split: str = "train",
) -> list[Demonstration]:
    """Read general data, draw from it, and make sure that it is none that forgetting is measured on.

    Args:
        source: texts, answers to prompts, or conversations, as `load_demonstrations` reads them.
        most: how many rows are needed at most; None takes all. Rows are drawn without replacement.
        seed: of the draw. The order of the rows does not matter.
        held_out: prompts on which the trained model will be compared with the base model.
        split: the split of a Hub dataset.

    Raises:
        DataError: a missing, empty or unreadable source; any bad row; or drawn rows that
            `refuse_measured` refuses. All are listed.
    """
    rows = load_demonstrations(source, split=split)
    drawn = rows if most is None else draw_general(rows, min(most, len(rows)), seed=seed)
    refuse_measured(drawn, held_out=held_out)
    return drawn


def refuse_measured(rows: Sequence[Demonstration], *, held_out: Sequence[Prompt] = ()) -> None:
    """Nothing, if no row holds a text on which forgetting is measured.

    These are the built-in passages of prose, the items of the built-in capability tasks, and
    `held_out`. A row holds one if 13 words in a row are the same, if one of its messages is the same
    up to case and punctuation (from five words on), or if it answers a held-out prompt.

    Raises:
        DataError: the rows that do, all at once, each with what it holds.
    """
    measured = _built_in() + [(p.text, f"the held-out prompt {p.text[:40]!r}") for p in held_out]
    asked = {prompt.prompt_id: f"the held-out prompt {prompt.text[:40]!r}" for prompt in held_out}
    phrases = {phrase: name for text, name in measured for phrase in _phrases(_words(text))}
    wholes = {_words(text): name for text, name in measured}
    problems = []
    for row in rows:
        found = None if row.prompt is None else asked.get(row.prompt.prompt_id)
        for text in _texts(row) if found is None else ():
            found = found or _measured_in(_words(text), phrases, wholes)
        if found is not None:
            problems.append(f"{row.title!r} ({row.source}): holds {found}")
    if problems:
        raise DataError(
            f"{len(problems)} general row(s) hold text on which forgetting is measured. Trained on "
            "them, the model would seem to forget less than it does. Leave them out.",
            problems,
        )


def _texts(row: Demonstration) -> Iterator[str]:
    if row.prompt is not None:
        for message in row.prompt.messages:
            yield message.content
    yield row.text


def _words(text: str) -> Words:
    return tuple(_WORDS.findall(text.casefold()))


def _phrases(words: Words) -> Iterator[Words]:
    return (words[i : i + _N_WORDS] for i in range(len(words) - _N_WORDS + 1))


def _measured_in(
    words: Words, phrases: Mapping[Words, str], wholes: Mapping[Words, str]
) -> str | None:
    if len(words) >= _N_WORDS_OF_MESSAGE and words in wholes:
        return wholes[words]
    return next((phrases[phrase] for phrase in _phrases(words) if phrase in phrases), None)


@functools.cache
def _built_in() -> list[tuple[str, str]]:
    """Texts that the library measures forgetting on, each with what it is."""
    found = [(text, f"the passage of prose {text[:40]!r}") for text in plain_texts()]
    for path in sorted(_TASKS.rglob("*.jsonl")):
        for _, item in read_rows(path).rows:
            values = item.values() if isinstance(item, Mapping) else ()
            found += [(v, f"an item of {path.stem}") for v in values if isinstance(v, str)]
    return found
