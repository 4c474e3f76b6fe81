"""Demonstrations and general texts -> token ids: what is read, what is learned.

Knows no model and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from prefopt.chat import tokenize_answer, tokenize_text
from prefopt.data.demonstrations import Demonstration
from prefopt.errors import DataError


class TokenRow(NamedTuple):
    """A row as it is trained on: what is read, what is learned, and whether it was cut."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    is_cut: bool


def tokenize_demonstrations(
    rows: Sequence[Demonstration], tokenizer: Any, *, max_length: int | None
) -> list[TokenRow]:
    """Tokenize rows and cut them to length; a row that is cut is learned without an end.

    Args:
        rows: answers to prompts, or plain texts, of which all tokens but the first are learned.
        tokenizer: the model's.
        max_length: tokens of prompt and answer together; None cuts nothing.

    Raises:
        DataError: rows with nothing to learn, all at once.
    """
    found: list[TokenRow] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            if row.prompt is None:
                ids = tokenize_text(tokenizer, row.text)
            else:
                ids = tokenize_answer(tokenizer, row.prompt, row.text, complete=row.complete)
        except DataError as error:
            problems.append(f"row {number} ({row.title!r}; {row.source}): {error}")
            continue
        room = len(ids.answer_ids) if max_length is None else max_length - len(ids.prompt_ids)
        if not ids.answer_ids:
            problems.append(f"row {number} ({row.title!r}; {row.source}): no answer")
        elif room < 1:
            problems.append(
                f"row {number} ({row.title!r}; {row.source}): the prompt alone has "
                f"{len(ids.prompt_ids)} tokens"
            )
        found.append(TokenRow(ids.prompt_ids, ids.answer_ids[:room], len(ids.answer_ids) > room))
    if problems:
        raise DataError(
            f"{len(problems)} row(s) have nothing to learn at max_length={max_length}. Raise "
            "max_length or leave them out.",
            problems,
        )
    return found
