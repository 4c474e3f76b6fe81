"""Prompts in, checked: files, the Hub, datasets or plain Python -> a list of distinct `Prompt`s.

Also splits prompts into training and held-out ones, and gives the built-in everyday prompts and
plain texts. All bad rows are reported at once. Knows nothing of answers, models or tokens.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from prefopt.data.records import read_records
from prefopt.data.rows import Rows, Source, read_rows, stream_rows
from prefopt.errors import DataError
from prefopt.types import Message, Prompt, content_hash

logger = logging.getLogger(__name__)

EVERYDAY = "everyday"
"""The name of the built-in requests of daily life, which quickstart and examples answer."""

GENERAL = "general"
"""The name of the built-in prompts about all sorts of skills, none of which is in "everyday"."""

_HERE = Path(__file__).parent
_PROMPT_SCHEMA = "prefopt.prompt/1"


def load_prompts(source: Source, *, split: str = "train", limit: int | None = None) -> list[Prompt]:
    """Read prompts and return each distinct one once, in order.

    A row is a text, a list of `{"role", "content"}` messages, a `Prompt`, a prefopt prompt record,
    or an object with a column `prompt` (text or messages) or `messages` (a trailing assistant turn
    is removed) and optionally `category`. A text becomes one user message. Rows that repeat a
    prompt are left out and named in a warning.

    Args:
        source: "everyday" or "general" for built-in prompts; a .jsonl, .json, .parquet, .csv or .txt
            file (one prompt a line; blank lines separate); a folder of shards; a Hub dataset id; a
            `datasets.Dataset`; or a sequence of rows.
        split: the split of a Hub dataset.
        limit: how many distinct prompts to return, from the first. None for all.

    Raises:
        DataError: a missing, empty or unreadable source, or any bad row; all are listed.
        ValueError: `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all prompts, got {limit}.")
    if isinstance(source, str) and source in (EVERYDAY, GENERAL):
        source = _HERE / f"{source}_prompts.jsonl"
    table = read_rows(source, split=split)
    _require_prompt_column(table.name, table.columns(), [row.value for row in table.rows])

    prompts: dict[str, Prompt] = {}
    problems: list[str] = []
    repeated: list[str] = []
    for where, value in table.rows:
        try:
            prompt = _prompt_from_row(value)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        if prompt.prompt_id in prompts:
            repeated.append(where)
        else:
            prompts[prompt.prompt_id] = prompt
    if problems or table.problems:
        raise table.bad("usable prompts", problems)
    if repeated:
        more = f" and {len(repeated) - 20} more" if len(repeated) > 20 else ""
        logger.warning(
            "%s: %d row(s) repeat an earlier prompt and were left out: %s%s.",
            table.name,
            len(repeated),
            ", ".join(repeated[:20]),
            more,
        )
    return list(prompts.values())[:limit]


def stream_prompts(source: Source, *, split: str = "train") -> Iterator[Prompt]:
    """`load_prompts` for prompts that do not fit the memory: yields each distinct one, in order.

    The source is read twice; in between, eight bytes a prompt are kept. Files, folders of Parquet
    files and folders of shards are read piece by piece.

    Raises:
        DataError: as in `load_prompts`, before the first prompt is yielded.
    """
    import numpy as np

    name = str(source) if isinstance(source, str | os.PathLike) else "the given rows"
    if isinstance(source, str) and source in (EVERYDAY, GENERAL):
        source = _HERE / f"{source}_prompts.jsonl"
    elif isinstance(source, Iterator):
        source = list(source)
    ids = array("Q")
    problems: list[str] = []
    for where, value in stream_rows(source, split=split):
        try:
            ids.append(int(_prompt_from_row(value).prompt_id, 16))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise Rows(name, [], []).bad("usable prompts", problems)
    if not ids:
        raise DataError(f"{name} is empty: expected at least one row.")
    _, first = np.unique(np.frombuffer(ids, dtype=np.uint64), return_index=True)
    is_first = np.zeros(len(ids), dtype=bool)
    is_first[first] = True
    repeated = len(ids) - len(first)
    if repeated:
        logger.warning("%s: %s row(s) repeat an earlier prompt and were left out.", name, repeated)
    for row, wanted in zip(stream_rows(source, split=split), is_first, strict=True):
        if wanted:
            yield _prompt_from_row(row.value)


def split_by_prompt(
    prompts: Sequence[Prompt], *, held_out: float | int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Split into (training prompts, held-out prompts), each in the given order.

    Within a category, prompts are ordered by a hash of (seed, prompt_id). The held-out ones are
    those with the smallest place (rank + 1/2) / (prompts in the category), so each category gives
    its share, and without categories simply the smallest hashes are held out. Neither the order
    of the prompts nor the process matters, and adding a prompt moves at most those at the border.
    All copies of a prompt land on the same side.

    Args:
        prompts: what to split; `category` may be empty.
        held_out: how many distinct prompts to hold out, or the share of them if a float in (0, 1).
        seed: another seed gives another split.

    Raises:
        ValueError: `held_out` is neither a positive count nor a share in (0, 1).
        DataError: a side would be empty.
    """
    is_share = isinstance(held_out, float)
    if (is_share and not 0.0 < held_out < 1.0) or (not is_share and held_out < 1):
        raise ValueError(f"held_out must be a count from 1 or a share in (0, 1), got {held_out}.")
    hashes: dict[str, dict[str, str]] = defaultdict(dict)
    category = {p.prompt_id: p.category for p in reversed(prompts)}
    for prompt_id, name in category.items():
        hashes[name][prompt_id] = content_hash([seed, prompt_id])
    places = [
        ((rank + 0.5) / len(members), members[prompt_id], prompt_id)
        for members in hashes.values()
        for rank, prompt_id in enumerate(sorted(members, key=members.__getitem__))
    ]
    count = round(held_out * len(places)) if is_share else int(held_out)
    if not 0 < count < len(places):
        side = "held-out" if count <= 0 else "training"
        raise DataError(
            f"the {side} side of the split would be empty: {len(places)} distinct prompt(s), of "
            f"which held_out={held_out} holds out {max(count, 0)}. Give more prompts or another "
            "held_out."
        )
    chosen = {prompt_id for _, _, prompt_id in sorted(places)[:count]}
    return (
        [p for p in prompts if p.prompt_id not in chosen],
        [p for p in prompts if p.prompt_id in chosen],
    )


class _PlainText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: str
    text: str


def plain_texts() -> list[str]:
    """The built-in prose passages, on which perplexity is measured."""
    return [row.text for row in read_records(_HERE / "plain_texts.jsonl", _PlainText)]


def prompt_from(value: Any, category: str = "") -> Prompt:
    """A prompt from a text (one user message) or a list of messages; ValueError if unusable."""
    if isinstance(value, str):
        return Prompt.from_text(value, category)
    return Prompt.from_messages(messages_from(value), category)


def messages_from(value: Any) -> tuple[Message, ...]:
    """Messages from a list of `{"role", "content"}`; ValueError says which one is wrong.

    Further keys are allowed only when they are None, as `datasets` fills them.
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected text or a list of messages, got {_kind(value)}.")
    messages = []
    for index, turn in enumerate(value):
        if isinstance(turn, Mapping):
            turn = {key: item for key, item in turn.items() if item is not None}
        try:
            messages.append(msgspec.convert(turn, Message))
        except msgspec.ValidationError as error:
            raise ValueError(f"message {index} is not a role and a text: {error}.") from error
    return tuple(messages)


def checked_prompt(prompt: Prompt) -> Prompt:
    """The same prompt, after a check that its id belongs to its messages; else ValueError."""
    made = Prompt.from_messages(prompt.messages, prompt.category)
    if made.prompt_id != prompt.prompt_id:
        raise ValueError(
            f"prompt_id {prompt.prompt_id!r} does not belong to the messages beside it (theirs is "
            f"{made.prompt_id!r}); give the messages alone to have the id made anew."
        )
    return prompt


def _prompt_from_row(value: Any) -> Prompt:
    if isinstance(value, Prompt):
        return checked_prompt(value)
    if not isinstance(value, Mapping):
        return prompt_from(value)
    schema = value.get("schema")
    if schema == _PROMPT_SCHEMA:
        return checked_prompt(msgspec.convert(dict(value), Prompt))
    if isinstance(schema, str) and schema.startswith("prefopt."):
        raise ValueError(f"is a {schema} record, expected {_PROMPT_SCHEMA}.")
    category = value.get("category")
    if not isinstance(category, str | None):
        raise ValueError(f"category must be text, got {_kind(category)}.")
    if value.get("prompt") is not None:
        return prompt_from(value["prompt"], category or "")
    if value.get("messages") is not None:
        messages = messages_from(value["messages"])
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        return Prompt.from_messages(messages, category or "")
    raise ValueError(f"no prompt in this row; it has {_names(value)}.")


def _require_prompt_column(name: str, columns: list[str], values: list[Any]) -> None:
    if not values or not all(isinstance(value, Mapping) for value in values):
        return
    if not {"prompt", "messages", "schema"} & set(columns):
        raise DataError(
            f"{name} has no prompt column: expected `prompt` (text or messages) or `messages`, "
            f"found {_names(columns)}. Rename the column that holds the prompts."
        )


def _names(columns: Any) -> str:
    return ", ".join(f"`{column}`" for column in columns) or "no columns"


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} ({value!r:.40})"
