"""Preference data in and out: files, the Hub and datasets <-> `PreferenceGroup`s.

Reads TRL's preference formats (text or conversational, prompt given or implied) and prefopt's own
records; writes TRL's conversational format with a few more columns. Reports all bad rows at once.
Knows nothing of tokens; whether data is fit for training is `prefopt.data.preflight`'s question.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from prefopt.data.dataset_card import COLUMNS, dataset_card
from prefopt.data.prompts import checked_prompt, messages_from, prompt_from
from prefopt.data.records import atomic_writer
from prefopt.data.rows import Source, read_rows
from prefopt.errors import DataError
from prefopt.types import (
    Candidate,
    FinishReason,
    Message,
    Preference,
    PreferenceGroup,
    Prompt,
    PSource,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "dataset_card",
    "load_preferences",
    "preference_rows",
    "push_preferences",
    "save_preferences",
    "to_dataset",
]

_GROUP_SCHEMA = "prefopt.preference_group/1"
_ASSISTANT = re.compile(r"^Assistant:", re.MULTILINE)


class AnswerPair(NamedTuple):
    """The two answers of a row, and the fields of its `Preference`."""

    prompt: Prompt
    chosen: Candidate
    rejected: Candidate
    preference: dict[str, Any]


class _Extras(msgspec.Struct, frozen=True, kw_only=True):
    """The optional columns of a row; None where it has none. Other columns are ignored."""

    p_chosen: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    p_source: PSource | None = None
    margin: float | None = None
    category: str | None = None
    chosen_finish_reason: FinishReason | None = None
    rejected_finish_reason: FinishReason | None = None
    chosen_model: str | None = None
    rejected_model: str | None = None
    chosen_sample_index: int | None = None
    rejected_sample_index: int | None = None
    chosen_n_tokens: int | None = None
    rejected_n_tokens: int | None = None


def load_preferences(source: Source, *, split: str = "train") -> list[PreferenceGroup]:
    """Read preference data; rows with the same prompt, wherever they are, become one group.

    A row has `chosen` and `rejected`, each a text or a list of messages that ends in the one
    assistant message being compared, and usually `prompt`:

    * `prompt` is a text (it becomes one user message) or messages. Where `chosen` and `rejected`
      repeat the prompt's messages, the repetition is removed.
    * Without `prompt`, it is what `chosen` and `rejected` begin with in common. Messages: all but
      the last. Texts: the common beginning, cut back to the end of the last "Assistant:" that opens
      a line in it, or else to the end of its last whole line, or else to before its last white
      space. White space after "Assistant:" or a word stays with the answers, and no answer is left
      empty. Prompt and answer together are always the text that was given.

    Optional columns are those of `preference_rows`. A row without `p_chosen` is a certain label:
    p_chosen = 1, p_source "given". A missing finish reason is "unknown", a missing model too.
    Within a group equal answers (text and all they carry) are one answer; preferences keep the
    order of the rows. prefopt's own group records are taken as they are, each its own group.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, a folder of shards, a Hub dataset id, a
            `datasets.Dataset`, or a sequence of rows (dicts or `PreferenceGroup`s).
        split: the split of a Hub dataset.

    Raises:
        DataError: a missing, empty or unreadable source, missing columns, or any bad row (all are
            listed); among these, answers of more than one message after the prompt.
    """
    table = read_rows(source, split=split)
    columns = table.columns()
    plain = table.rows and all(isinstance(row.value, Mapping) for row in table.rows)
    if plain and "schema" not in columns and not {"chosen", "rejected"} <= set(columns):
        raise DataError(
            f"{table.name} has no columns `chosen` and `rejected`; found "
            f"{', '.join(f'`{c}`' for c in columns)}. Rename the columns that hold the preferred "
            "and the other answer."
        )
    items: list[PreferenceGroup | _GroupInMaking] = []
    by_prompt: dict[str, _GroupInMaking] = {}
    problems: list[str] = []
    for where, value in table.rows:
        try:
            group = _group_from(value)
            if group is not None:
                items.append(group)
                continue
            pair = pair_from_row(value)
            making = by_prompt.get(pair.prompt.prompt_id)
            if making is None:
                making = by_prompt[pair.prompt.prompt_id] = _GroupInMaking(pair.prompt)
                items.append(making)
            making.add(pair)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems or table.problems:
        raise table.bad("usable preferences", problems)
    return [i if isinstance(i, PreferenceGroup) else i.finished() for i in items]


def preference_rows(groups: Iterable[PreferenceGroup]) -> list[dict[str, Any]]:
    """One row for each preference, in TRL's conversational format with prefopt's columns.

    `prefopt.data.dataset_card.COLUMNS` says what each column holds. For groups of two answers
    nothing is lost: `load_preferences` gives the same groups again, with the chosen answer of the
    first preference first. For K > 2 a group becomes as many rows as it has preferences and is
    found again by its prompt; answers in no preference are in no row (`write_records` keeps them).
    """
    rows = []
    for group in groups:
        messages = [{"role": m.role, "content": m.content} for m in group.prompt.messages]
        for chosen, rejected, preference in group.pairs():
            rows.append(
                {
                    "prompt": messages,
                    "chosen": [{"role": "assistant", "content": chosen.text}],
                    "rejected": [{"role": "assistant", "content": rejected.text}],
                    "p_chosen": preference.p_chosen,
                    "margin": preference.margin,
                    "p_source": preference.p_source,
                    "chosen_finish_reason": chosen.finish_reason,
                    "rejected_finish_reason": rejected.finish_reason,
                    "prompt_id": group.prompt.prompt_id,
                    "category": group.prompt.category,
                    "chosen_model": chosen.model,
                    "rejected_model": rejected.model,
                    "chosen_sample_index": chosen.sample_index,
                    "rejected_sample_index": rejected.sample_index,
                    "chosen_n_tokens": chosen.n_tokens,
                    "rejected_n_tokens": rejected.n_tokens,
                }
            )
    return rows


def to_dataset(groups: Iterable[PreferenceGroup]) -> Dataset:
    """`preference_rows` as a `datasets.Dataset` whose column types do not depend on the data.

    Raises DataError when there is no preference.
    """
    import datasets

    return datasets.Dataset.from_list(_some_rows(groups), features=_features())


def preference_table(groups: Iterable[PreferenceGroup]) -> Any:
    """`to_dataset` as a `pyarrow.Table`, perhaps without a row."""
    import pyarrow

    return pyarrow.Table.from_pylist(preference_rows(groups), schema=_features().arrow_schema)


def _features() -> Any:
    import datasets

    turns = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    types: dict[str, Any] = dict.fromkeys(COLUMNS, datasets.Value("string"))
    types |= dict.fromkeys(("prompt", "chosen", "rejected"), turns)
    types |= dict.fromkeys(("p_chosen", "margin"), datasets.Value("float64"))
    for side in ("chosen", "rejected"):
        types[f"{side}_sample_index"] = types[f"{side}_n_tokens"] = datasets.Value("int64")
    return datasets.Features(types)


def save_preferences(groups: Iterable[PreferenceGroup], path: str | os.PathLike[str]) -> int:
    """Write `preference_rows` to a .jsonl or .parquet file atomically; returns how many rows.

    Raises:
        ValueError: another suffix.
        DataError: there is no preference, or the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    groups = list(groups)
    if suffix == ".jsonl":
        rows = _some_rows(groups)
        with atomic_writer(path) as file:
            for row in rows:
                file.write(msgspec.json.encode(row) + b"\n")
        return len(rows)
    if suffix == ".parquet":
        import pyarrow.parquet

        dataset = to_dataset(groups)
        with atomic_writer(path) as file:
            pyarrow.parquet.write_table(dataset.data.table, file)
        return len(dataset)
    raise ValueError(f"preferences are saved as .jsonl or .parquet, got {path.name!r}.")


def push_preferences(
    groups: Iterable[PreferenceGroup],
    repo_id: str,
    *,
    private: bool = True,
    card: str | None = None,
) -> str:
    """Upload preferences and their card to the Hub as a dataset; returns its address.

    Args:
        groups: what to upload, as `preference_rows`.
        repo_id: "organisation/name"; made if it does not exist.
        private: refuse to upload to a repository that others can read.
        card: the README; `dataset_card(groups)` if None.

    Raises:
        DataError: there is no preference, the repository is public although `private` was asked
            for (nothing is uploaded), or the Hub refuses.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    groups = list(groups)
    dataset = to_dataset(groups)
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if private and not api.repo_info(repo_id, repo_type="dataset").private:
            raise DataError(
                f"the Hub dataset {repo_id} already exists and is public, and private=True was "
                "asked for. Nothing was uploaded; make it private or pass private=False."
            )
        # The card goes first: uploading the data then adds its own entries to the front matter.
        api.upload_file(
            path_or_fileobj=(card or dataset_card(groups)).encode(),
            path_in_repo="README.md",
            repo_id=repo_id,
            repo_type="dataset",
            commit_message="Describe the preference data",
        )
        dataset.push_to_hub(repo_id, private=private)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DataError(
            f"cannot upload to the Hub dataset {repo_id}: {error}. Check the name and the "
            "connection, and log in with `hf auth login` using a token that may write."
        ) from error
    return f"https://huggingface.co/datasets/{repo_id}"


class _GroupInMaking:
    """Collects the pairs of one prompt."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.answers: list[Candidate] = []
        self.preferences: list[Preference] = []

    def add(self, pair: AnswerPair) -> None:
        if pair.prompt.category != self.prompt.category:
            raise ValueError(
                f"category {pair.prompt.category!r}, but an earlier row with the same prompt has "
                f"{self.prompt.category!r}."
            )
        chosen = self._index(pair.chosen)
        # A preference needs two answers even when their texts are equal; preflight reports those.
        rejected = self._index(pair.rejected, other_than=chosen)
        self.preferences.append(Preference(chosen=chosen, rejected=rejected, **pair.preference))

    def _index(self, answer: Candidate, other_than: int | None = None) -> int:
        for index, known in enumerate(self.answers):
            if known == answer and index != other_than:
                return index
        self.answers.append(answer)
        return len(self.answers) - 1

    def finished(self) -> PreferenceGroup:
        return PreferenceGroup(
            prompt=self.prompt, answers=tuple(self.answers), preferences=tuple(self.preferences)
        )


def _some_rows(groups: Iterable[PreferenceGroup]) -> list[dict[str, Any]]:
    rows = preference_rows(groups)
    if not rows:
        raise DataError(
            "there are no preferences to write. If groups were made by a judge, look at what was "
            "left out and why."
        )
    return rows


def _group_from(value: Any) -> PreferenceGroup | None:
    """A group record, or None when `value` is a row of columns."""
    if isinstance(value, PreferenceGroup):
        group = value
    elif not isinstance(value, Mapping):
        raise ValueError(
            f"expected an object with `chosen` and `rejected`, got {type(value).__name__}."
        )
    elif value.get("schema") == _GROUP_SCHEMA:
        group = msgspec.convert(dict(value), PreferenceGroup)
    elif str(value.get("schema")).startswith("prefopt."):
        raise ValueError(f"is a {value['schema']} record, expected {_GROUP_SCHEMA}.")
    else:
        return None
    checked_prompt(group.prompt)
    if any(answer.prompt.prompt_id != group.prompt.prompt_id for answer in group.answers):
        raise ValueError("holds an answer to another prompt than the group's.")
    return group


def pair_from_row(row: Mapping[str, Any]) -> AnswerPair:
    """A row of columns, as `load_preferences` reads it; ValueError says what is wrong with it."""
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise ValueError(f"no `{name}`; the row has {', '.join(f'`{c}`' for c in row)}.")
    extras = msgspec.convert(
        {name: row[name] for name in _Extras.__struct_fields__ if name in row}, _Extras
    )
    for name, number in (("p_chosen", extras.p_chosen), ("margin", extras.margin)):
        if number is not None and not math.isfinite(number):
            raise ValueError(f"`{name}` must be a finite number, got {number}.")
    turns, chosen, rejected = _prompt_and_answers(row)
    prompt = Prompt.from_messages(turns, extras.category or "")
    preference: dict[str, Any] = {"p_chosen": 1.0, "p_source": "given"}
    if extras.p_chosen is not None:
        preference = {"p_chosen": extras.p_chosen, "p_source": extras.p_source or "given"}
    if extras.margin is not None:
        preference["margin"] = extras.margin
    return AnswerPair(
        prompt,
        Candidate(
            prompt=prompt,
            text=chosen,
            model=extras.chosen_model or "unknown",
            sample_index=extras.chosen_sample_index or 0,
            finish_reason=extras.chosen_finish_reason or "unknown",
            n_tokens=extras.chosen_n_tokens,
        ),
        Candidate(
            prompt=prompt,
            text=rejected,
            model=extras.rejected_model or "unknown",
            sample_index=extras.rejected_sample_index or 0,
            finish_reason=extras.rejected_finish_reason or "unknown",
            n_tokens=extras.rejected_n_tokens,
        ),
        preference,
    )


def _prompt_and_answers(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    given = row.get("prompt")
    if given is None and isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        text, chosen, rejected = _split_texts(row["chosen"], row["rejected"])
        return Prompt.from_text(text).messages, chosen, rejected
    prompt = None if given is None else prompt_from(given).messages
    context, chosen = _last_answer("chosen", row["chosen"])
    other_context, rejected = _last_answer("rejected", row["rejected"])
    if context != other_context:
        raise ValueError(
            f"`chosen` and `rejected` differ before their last message ({len(context) + 1} and "
            f"{len(other_context) + 1} messages); only single assistant messages after the same "
            "prompt can be compared. Cut the conversations where they part."
        )
    if prompt is None:
        if not context:
            raise ValueError(
                "no prompt: there is no `prompt`, and `chosen` holds nothing before the answer."
            )
        return context, chosen, rejected
    if context and context[-len(prompt) :] != prompt:
        raise ValueError(
            f"`chosen` and `rejected` hold {len(context) + 1} messages after the prompt; only a "
            "single assistant message can be compared. Move the earlier ones into `prompt`."
        )
    return context or prompt, chosen, rejected


def _last_answer(name: str, value: Any) -> tuple[tuple[Message, ...], str]:
    """What stands before the last message, and the last message's text."""
    if isinstance(value, str):
        return (), value
    try:
        messages = messages_from(value)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error
    if not messages or messages[-1].role != "assistant":
        got = messages[-1].role if messages else "no message"
        raise ValueError(f"`{name}` must end with an assistant message, got {got}.")
    return messages[:-1], messages[-1].content


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    # One character at least is left to each answer.
    room = max(min(len(chosen), len(rejected)) - 1, 0)
    shared = next((i for i in range(room) if chosen[i] != rejected[i]), room)
    common = chosen[:shared]
    markers = [match.end() for match in _ASSISTANT.finditer(common)]
    if markers:
        cut = markers[-1]
    elif "\n" in common:
        cut = common.rfind("\n") + 1
    else:
        cut = max((i for i, character in enumerate(common) if character.isspace()), default=0)
    if not common[:cut].strip():
        raise ValueError(
            "no prompt: there is no `prompt`, and `chosen` and `rejected` share no beginning that "
            "ends between two words."
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]
