"""Answers that a model shall learn to give, from preferences or a user's own rows; general data.

    PreferenceGroup ──demonstrations──▶ Demonstration ◀──load_demonstrations── JSONL, Parquet, text

Every row says where it came from, and what became no demonstration is counted with its reason. Knows
no tokenizer and no model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import msgspec

from prefopt.data.candidates import ANSWER_COLUMNS, answer_text
from prefopt.data.prompts import messages_from, prompt_from
from prefopt.data.rows import Source, read_rows
from prefopt.types import Candidate, PreferenceGroup, Prompt, content_hash

logger = logging.getLogger(__name__)

NoDemonstration = Literal[
    "no_preference", "tie", "uncertain", "contradicted", "empty_answer", "cut_off", "repeated"
]
"""Why a preference group, or an answer of it, became no demonstration.

    no_preference   nobody compared its answers
    tie             every preference has p_chosen = 0.5
    uncertain       no preference is as sure as `min_p` asks for
    contradicted    every answer that was preferred was also beaten
    empty_answer    the best answer has no text
    cut_off         the best answer ended at the token limit, so it breaks off
    repeated        the same answer to the same prompt is there already
"""

_SCHEMA = "prefopt.demonstration/1"
_CANDIDATE_SCHEMA = "prefopt.candidate/1"


class Demonstration(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag=_SCHEMA,
):
    """One text to learn: an answer to a prompt, or with `prompt` None plain text.

    Of an answer its tokens are learned and, if it is `complete`, that it ends there; of plain text,
    which is an excerpt, every token but the first, and no end. `source` says where it came from.
    """

    prompt: Prompt | None
    text: str
    complete: bool = True
    source: str

    @property
    def title(self) -> str:
        """The words by which a person recognises it."""
        return (self.text if self.prompt is None else self.prompt.text)[:50]


class LeftOutDemonstration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A preference group, or an answer of one, that gave no demonstration."""

    prompt_id: str
    reason: NoDemonstration
    detail: str = ""


class Demonstrations(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `demonstrations` returns: the rows, and a reason for all that gave none."""

    rows: tuple[Demonstration, ...]
    left_out: tuple[LeftOutDemonstration, ...]

    def reasons(self) -> dict[str, int]:
        """How many were left out, by reason, most frequent first."""
        return dict(Counter(item.reason for item in self.left_out).most_common())

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.reasons().items()) or "none"
        return f"{len(self.rows)} demonstrations; left out: {reasons}"


def demonstrations(
    groups: Sequence[PreferenceGroup],
    *,
    min_p: float = 0.5,
    cut_off: Literal["leave_out", "keep"] = "leave_out",
) -> Demonstrations:
    """The best answers of preference groups, as demonstrations.

    An answer is one if it is preferred to another answer and no other is preferred to it; of a pair
    that is the chosen side. A preference with `p_chosen` below 0.5 counts for its other side.

    Args:
        groups: preferences, as `build_preferences` or `load_preferences` return them.
        min_p: preferences count only if they are surer than this, in [0.5, 1).
        cut_off: what becomes of answers that ended at the token limit: an example that breaks off is
            a poor one. Where they are kept, they are learned without an end.

    Raises:
        ValueError: `min_p` out of range.
    """
    if not 0.5 <= min_p < 1.0:
        raise ValueError(f"min_p must be in [0.5, 1), got {min_p}.")
    rows: list[Demonstration] = []
    left_out: list[LeftOutDemonstration] = []
    seen: set[tuple[str, str]] = set()
    for number, group in enumerate(groups):

        def leave_out(
            reason: NoDemonstration, detail: str = "", prompt: Prompt = group.prompt
        ) -> None:
            left_out.append(
                LeftOutDemonstration(prompt_id=prompt.prompt_id, reason=reason, detail=detail)
            )

        won, lost = _wins(group, min_p)
        if not won:
            leave_out(_nothing_counts(group))
            continue
        best = [index for index in won if index not in lost]
        if not best:
            leave_out("contradicted", f"answers {sorted(won)} each win and lose")
        for index in best:
            answer = group.answers[index]
            key = (group.prompt.prompt_id, answer.text)
            if not answer.text.strip():
                leave_out("empty_answer", f"answer {index} by {answer.model}")
            elif cut_off == "leave_out" and answer.finish_reason == "length":
                leave_out("cut_off", f"answer {index} by {answer.model}")
            elif key in seen:
                leave_out("repeated", f"answer {index} by {answer.model}")
            else:
                seen.add(key)
                rows.append(
                    Demonstration(
                        prompt=group.prompt,
                        text=answer.text,
                        complete=answer.finish_reason != "length",
                        source=f"preference group {number}: answer {index} by {answer.model}, "
                        f"preferred to {won[index]} of {len(group.answers) - 1}",
                    )
                )
    return Demonstrations(rows=tuple(rows), left_out=tuple(left_out))


def _wins(group: PreferenceGroup, min_p: float) -> tuple[dict[int, int], set[int]]:
    """How many others each answer is preferred to, and which answers lost to any."""
    beaten: dict[int, set[int]] = {}
    for preference in group.preferences:
        pair = (preference.chosen, preference.rejected)
        winner, loser = pair if preference.p_chosen >= 0.5 else pair[::-1]
        if max(preference.p_chosen, 1.0 - preference.p_chosen) > min_p:
            beaten.setdefault(winner, set()).add(loser)
    return {i: len(others) for i, others in sorted(beaten.items())}, set().union(*beaten.values())


def _nothing_counts(group: PreferenceGroup) -> NoDemonstration:
    if not group.preferences:
        return "no_preference"
    return "tie" if all(p.p_chosen == 0.5 for p in group.preferences) else "uncertain"


def load_demonstrations(source: Source, *, split: str = "train") -> list[Demonstration]:
    """Read demonstrations, or general data, from a user's own rows.

    A row is a text or an object with `text` (plain text, of which every token is learned); with
    `messages` that end with the assistant's (the last message is learned); with `prompt` (text or
    messages) and `completion`, `response`, `answer` or `output` (text, or one assistant message); or
    a record of this library: a demonstration, or an answer that a model gave (`candidates.jsonl`).
    Answers count as complete, but for those of a model that were cut off.

    Args:
        source: a .jsonl, .json, .parquet, .csv or .txt file (a text a line), a Hub dataset id, a
            `datasets.Dataset`, or a sequence of rows.
        split: the split of a Hub dataset.

    Raises:
        DataError: a missing, empty or unreadable source, or any bad row; all are listed.
    """
    table = read_rows(source, split=split)
    rows: list[Demonstration] = []
    problems: list[str] = []
    for where, value in table.rows:
        try:
            rows.append(_from_row(value, f"{table.name}, {where}"))
        except (ValueError, msgspec.ValidationError) as error:
            problems.append(f"{where}: {error}")
    if problems or table.problems:
        raise table.bad("usable demonstrations", problems)
    return rows


def _from_row(value: Any, source: str) -> Demonstration:
    if isinstance(value, Demonstration):
        return value
    if isinstance(value, Candidate):
        return _of_a_model(value, source)
    if isinstance(value, str):
        return _plain(value, source)
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a text or an object, got {type(value).__name__}.")
    row = {key: item for key, item in value.items() if item is not None}
    if row.get("schema") == _SCHEMA:
        return msgspec.convert(dict(value), Demonstration)
    if row.get("schema") == _CANDIDATE_SCHEMA:
        return _of_a_model(msgspec.convert(dict(value), Candidate), source)
    answers = [name for name in ANSWER_COLUMNS if name in row]
    if "prompt" in row and answers:
        if len(answers) > 1:
            raise ValueError(f"several answers in one row: {', '.join(answers)}; keep one.")
        return _answer(prompt_from(row["prompt"]), row[answers[0]], source)
    if "messages" in row:
        messages = messages_from(row["messages"])
        return _answer(Prompt.from_messages(messages[:-1]), messages[-1:], source)
    if "text" in row:
        return _plain(row["text"], source)
    raise ValueError(
        "no `text`, no `messages`, and no `prompt` with a `completion`, `response`, `answer` or "
        f"`output`; it has {', '.join(f'`{name}`' for name in row) or 'no columns'}."
    )


def _plain(text: Any, source: str) -> Demonstration:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected some text, got {text!r:.40}.")
    return Demonstration(prompt=None, text=text, complete=False, source=source)


def _answer(prompt: Prompt, answer: Any, source: str) -> Demonstration:
    text = answer_text(answer)
    if not text.strip():
        raise ValueError("the answer has no text.")
    return Demonstration(prompt=prompt, text=text, source=source)


def _of_a_model(answer: Candidate, source: str) -> Demonstration:
    if not answer.text.strip():
        raise ValueError("the answer has no text.")
    return Demonstration(
        prompt=answer.prompt,
        text=answer.text,
        complete=answer.finish_reason != "length",
        source=f"{source}: answer {answer.sample_index} by {answer.model}",
    )


def mix_replay(
    rows: Sequence[Demonstration], general: Sequence[Demonstration], *, share: float, seed: int
) -> list[Demonstration]:
    """The rows, followed by as many general ones as make up `share` of the whole.

    With n rows these are the whole number of general rows nearest to n * share / (1 - share): the
    share is one of rows, not of tokens. They are drawn without replacement; where there are too few,
    each is taken equally often first, which is said in the log.

    Args:
        rows: what shall be learned.
        general: data of the kind that shall not be forgotten.
        share: in [0, 1).
        seed: of the draw. The order of `general` does not matter.

    Raises:
        ValueError: `share` out of range, or above 0 with no general data.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share must be in [0, 1), got {share}.")
    part = Fraction(str(share))
    wanted = round(len(rows) * part / (1 - part))
    if wanted and not general:
        raise ValueError(f"a share of {share:g} of general data was asked for, but there is none.")
    if not wanted:
        return list(rows)
    if wanted > len(general):
        logger.warning(
            "%d general rows were asked for and there are %d, so rows are repeated. Give more, or "
            "lower the share.", wanted, len(general),
        )  # fmt: skip
    return [*rows, *draw_general(general, wanted, seed=seed)]


def draw_general(general: Sequence[Demonstration], n: int, *, seed: int) -> list[Demonstration]:
    """Draw n rows in an order that depends on the seed and not on the order of `general`.

    Without replacement; of more rows than there are, each is taken equally often first.
    """

    def place(row: Demonstration) -> str:
        return content_hash([seed, row.prompt and row.prompt.prompt_id, row.text])

    order = sorted(general, key=place)
    passes, rest = divmod(n, len(order))
    return [*(order * passes), *order[:rest]]
