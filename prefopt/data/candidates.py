"""Answers that are there already -> `Candidate`s: from logs, other models, other people's data.

    rows with a prompt and its answers, in any usual spelling ──load_candidates──▶ Candidate

What comes out is what `prefopt sample` writes, so such answers can be judged, compared and evaluated
alike. All bad rows are reported at once. An empty answer is data: what becomes of it is not decided
here. Knows no judge and no tokenizer.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from prefopt.data.preference_data import pair_from_row
from prefopt.data.prompts import checked_prompt, messages_from, prompt_from
from prefopt.data.rows import Rows, Source, stream_rows
from prefopt.errors import DataError
from prefopt.types import Candidate, FinishReason, PreferenceGroup, Prompt

_CANDIDATE_SCHEMA = "prefopt.candidate/1"
_GROUP_SCHEMA = "prefopt.preference_group/1"
PROMPT_COLUMNS = ("prompt", "instruction", "question")
"""What a row may call its prompt."""

ANSWER_COLUMNS = ("completion", "response", "answer", "output")
"""What a row may call its one answer."""

_SEVERAL = ("answers", "responses", "completions", "generations")
PAIR_COLUMNS = (("response_a", "response_b"), ("answer_a", "answer_b"))
"""What a row may call its two answers, where neither is the better one by its name."""


class _Extras(msgspec.Struct, frozen=True, kw_only=True):
    """The optional columns of a row; None where it has none. Other columns are ignored."""

    category: str | None = None
    model: str | None = None
    models: tuple[str, ...] | None = None
    generation_models: tuple[str, ...] | None = None  # distilabel's name
    model_a: str | None = None
    model_b: str | None = None
    finish_reason: FinishReason | None = None


def load_candidates(
    source: Source, *, split: str = "train", model: str = "unknown"
) -> list[Candidate]:
    """Read answers, with their prompts, in the order of the rows.

    A row is an answer record as `prefopt sample` writes it, a `Candidate`, or an object with

    * `prompt`, `instruction` or `question` (text or messages), and one answer in `completion`,
      `response`, `answer` or `output`; or several in `answers`, `responses`, `completions` or
      `generations` (a list); or two in `response_a` and `response_b`, or `answer_a` and `answer_b`;
    * `messages` that end with the assistant's, which is the answer;
    * `chosen` and `rejected`, as `load_preferences` reads them: two answers, whose label is not read.

    An answer is a text, or messages that hold one of the assistant. Optional columns: `model` (or
    `models` or `generation_models`, one an answer; `model_a` and `model_b`), `finish_reason`,
    `category`. Answers by the same model to the same prompt are numbered in order. The same answers in
    several rows of `chosen` and `rejected` are one.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, a folder of shards, a Hub dataset id, a
            `datasets.Dataset`, or a sequence of rows.
        split: the split of a Hub dataset.
        model: who gave the answers of rows that do not say.

    Raises:
        DataError: a missing, empty or unreadable source, or any bad row; all are listed.
    """
    found = list(stream_candidates(source, split=split, model=model))
    if not found:
        raise DataError(f"{_name(source)} is empty: expected at least one row.")
    return found


def stream_candidates(
    source: Source, *, split: str = "train", model: str = "unknown"
) -> Iterator[Candidate]:
    """`load_candidates` for answers that do not fit the memory.

    Bad rows are raised as one error at the end, so that it lists all of them; nothing that came from a
    source with a bad row may be used before that.
    """
    numbers: Counter[tuple[str, str]] = Counter()
    paired: set[tuple[str, str, str]] = set()
    problems: list[str] = []
    unreadable: DataError | None = None
    rows = stream_rows(source, split=split)
    try:
        for where, value in rows:
            try:
                answers = _as_they_are(value)
                if answers is None:
                    row = {name: item for name, item in value.items() if item is not None}
                    answers = _from_row(row, model)
                    if _is_pair(row):
                        answers = _new(answers, paired)
                    answers = [_numbered(answer, numbers) for answer in answers]
            except (ValueError, msgspec.ValidationError) as error:
                problems.append(f"{where}: {error}")
                continue
            yield from answers
    except DataError as error:
        if not error.problems:
            raise
        unreadable = error
    if problems or unreadable:
        lines = [*(unreadable.problems if unreadable else ()), *problems]
        raise Rows(_name(source), [], []).bad("usable answers", lines)


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else "the given rows"


def _as_they_are(value: Any) -> list[Candidate] | None:
    """What is an answer, or a group of them, already; None for a row of columns."""
    if isinstance(value, Mapping):
        schema = value.get("schema")
        if schema == _CANDIDATE_SCHEMA:
            value = msgspec.convert(dict(value), Candidate)
        elif schema == _GROUP_SCHEMA:
            value = msgspec.convert(dict(value), PreferenceGroup)
        elif isinstance(schema, str) and schema.startswith("prefopt."):
            raise ValueError(f"is a {schema} record, expected {_CANDIDATE_SCHEMA}.")
        else:
            return None
    if isinstance(value, PreferenceGroup):
        answers = list(value.answers)
    elif isinstance(value, Candidate):
        answers = [value]
    else:
        raise ValueError(f"expected an object with a prompt and an answer, got {_kind(value)}.")
    for answer in answers:
        checked_prompt(answer.prompt)
    return answers


def _is_pair(row: Mapping[str, Any]) -> bool:
    return "chosen" in row and "rejected" in row


def _new(answers: list[Candidate], seen: set[tuple[str, str, str]]) -> list[Candidate]:
    """Those that no earlier row had. Two of one row that are alike stay two, and are told of later."""
    keys = [(answer.prompt.prompt_id, answer.model, answer.text) for answer in answers]
    found = [answer for answer, key in zip(answers, keys, strict=True) if key not in seen]
    seen.update(keys)
    return found


def _numbered(answer: Candidate, numbers: Counter[tuple[str, str]]) -> Candidate:
    key = (answer.prompt.prompt_id, answer.model)
    number = numbers[key]
    numbers[key] += 1
    return msgspec.structs.replace(answer, sample_index=number)


def _from_row(row: Mapping[str, Any], model: str) -> list[Candidate]:
    if _is_pair(row):
        pair = pair_from_row(row)
        return [
            msgspec.structs.replace(answer, model=said or model)
            for answer, said in (
                (pair.chosen, row.get("chosen_model")),
                (pair.rejected, row.get("rejected_model")),
            )
        ]
    extras = msgspec.convert(
        {name: row[name] for name in _Extras.__struct_fields__ if name in row}, _Extras
    )
    prompt, answers = _prompt_and_answers(row, extras.category or "")
    models = _models(extras, len(answers)) or [model] * len(answers)
    return [
        Candidate(
            prompt=prompt,
            text=answer_text(answer),
            model=name,
            finish_reason=extras.finish_reason or "unknown",
        )
        for answer, name in zip(answers, models, strict=True)
    ]


def _prompt_and_answers(row: Mapping[str, Any], category: str) -> tuple[Prompt, list[Any]]:
    prompts = [name for name in PROMPT_COLUMNS if name in row]
    forms: dict[str, list[Any]] = {name: [row[name]] for name in ANSWER_COLUMNS if name in row}
    forms |= {name: _several(name, row[name]) for name in _SEVERAL if name in row}
    forms |= {f"{a}` and `{b}": [row[a], row[b]] for a, b in PAIR_COLUMNS if a in row and b in row}
    if not forms and "messages" in row:
        messages = messages_from(row["messages"])
        return Prompt.from_messages(messages[:-1], category), [messages[-1:]]
    if len(prompts) != 1 or len(forms) != 1:
        columns = ", ".join(f"`{name}`" for name in row) or "no columns"
        many = [names for names in (prompts, list(forms)) if len(names) > 1]
        if many:
            raise ValueError(
                f"several columns for one thing: {', '.join(f'`{name}`' for name in many[0])}; "
                "keep one."
            )
        missing = "prompt" if not prompts else "answer"
        raise ValueError(
            f"no {missing}: it has {columns}, and needs `prompt` (or `instruction`, `question`) with "
            "`answer` (or `completion`, `response`, `output`), `answers` (a list), `response_a` and "
            "`response_b`; or `messages`; or `chosen` and `rejected`."
        )
    (answers,) = forms.values()
    return prompt_from(row[prompts[0]], category), answers


def _several(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"`{name}` must be a list of answers, got {_kind(value)}.")
    return list(value)


def _models(extras: _Extras, n: int) -> list[str] | None:
    """Who gave each of n answers, or None where the row does not say."""
    models = extras.generation_models if extras.models is None else extras.models
    if models is not None:
        if len(models) != n:
            raise ValueError(f"`models` names {len(models)} for {n} answer(s).")
        return list(models)
    if n == 2 and extras.model_a is not None and extras.model_b is not None:
        return [extras.model_a, extras.model_b]
    return None if extras.model is None else [extras.model] * n


def answer_text(answer: Any) -> str:
    """An answer's text, from a text or one message of the assistant's; else ValueError."""
    if isinstance(answer, str):
        return answer
    messages = messages_from(answer)
    if [message.role for message in messages] != ["assistant"]:
        got = ", ".join(message.role for message in messages) or "no message"
        raise ValueError(f"the answer must be one assistant message, got {got}.")
    return messages[0].content


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} ({value!r:.40})"
