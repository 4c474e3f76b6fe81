"""Pairs with a human label, to measure a judge against.

In: rows with two answers and who of people prefer, in any of the usual spellings. Out: comparisons
with their labels. A row that cannot be read is an error that names it; an empty answer is data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from prefopt.data.candidates import PAIR_COLUMNS, PROMPT_COLUMNS
from prefopt.data.rows import Source, read_rows
from prefopt.types import Candidate, Comparison, Prompt, Winner

_SPELLINGS: dict[str, Winner] = {
    **dict.fromkeys(("a", "1", "first", "response_a", "model_a", "answer_a"), "a"),
    **dict.fromkeys(("b", "2", "second", "response_b", "model_b", "answer_b"), "b"),
    **dict.fromkeys(("tie", "0", "both", "equal", "c"), "tie"),
}
_ANSWER_NAMES = (*PAIR_COLUMNS, ("chosen", "rejected"))


class LabelledPair(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison and what people said: `label` in its own names a and b, `annotators` one by one."""

    comparison: Comparison
    label: Winner
    annotators: tuple[Winner, ...] = ()


def load_labelled(source: Source, *, split: str = "train") -> list[LabelledPair]:
    """Read labelled pairs.

    Args:
        source: a file (.jsonl, .json, .parquet, .csv), a Hub dataset, or rows. A row has `prompt` or
            `instruction` (text, or messages), then `response_a` and `response_b` with `label` (A, B,
            tie; 1, 2, 0 are understood too), or `chosen` and `rejected`. `subset` or `category` names
            its kind; `annotators` is a list of single labels.
        split: of a Hub dataset.

    Raises:
        DataError: rows that cannot be used, all at once, with their place.
    """
    found = read_rows(source, split=split)
    pairs: list[LabelledPair] = []
    problems: list[str] = []
    for where, row in found.rows:
        try:
            pairs.append(_pair(row))
        except (ValueError, TypeError, msgspec.ValidationError) as error:
            problems.append(f"{where}: {error}")
    if problems or found.problems:
        raise found.bad("labelled pairs", problems)
    return pairs


def _pair(row: Any) -> LabelledPair:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a row with named columns, got {type(row).__name__}")
    prompt = _prompt(row)
    for name_a, name_b in _ANSWER_NAMES:
        if name_a in row and name_b in row:
            break
    else:
        raise ValueError("expected response_a and response_b, or chosen and rejected")
    texts = []
    for name in (name_a, name_b):
        value = row[name]
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected a text, got {type(value).__name__}")
        texts.append(value)
    label = "a" if name_a == "chosen" else _label(row.get("label"), "label")
    annotators = row.get("annotators") or ()
    if not isinstance(annotators, list | tuple):
        raise ValueError(f"annotators: expected a list, got {type(annotators).__name__}")
    a, b = (
        Candidate(prompt=prompt, text=text, model=name, sample_index=index)
        for index, (name, text) in enumerate(zip((name_a, name_b), texts, strict=True))
    )
    return LabelledPair(
        comparison=Comparison(a=a, b=b),
        label=label,
        annotators=tuple(_label(value, "annotators") for value in annotators),
    )


def _prompt(row: Mapping[str, Any]) -> Prompt:
    category = row.get("subset") or row.get("category") or ""
    if not isinstance(category, str):
        raise ValueError(f"subset: expected a text, got {type(category).__name__}")
    for name in PROMPT_COLUMNS:
        value = row.get(name)
        if isinstance(value, str):
            return Prompt.from_text(value, category)
        if isinstance(value, list | tuple):
            return Prompt.from_messages(value, category)
    raise ValueError(f"expected a text or messages in one of {', '.join(PROMPT_COLUMNS)}")


def _label(value: Any, name: str) -> Winner:
    known = _SPELLINGS.get(str(value).strip().casefold()) if value is not None else None
    if known is None or isinstance(value, bool):
        raise ValueError(f"{name}: expected A, B or tie (or 1, 2, 0), got {value!r}")
    return known
