"""Preferences -> a file that another training stack reads, checked by that stack's rules first.

In: preference data, or the folder of a run or a labelling job. Out: one JSONL file (and for
LLaMA-Factory its entry in `dataset_info.json`), and an `Export` that counts what was left out and
why. Nothing is written before every row and the file as a whole have passed.
"""

from __future__ import annotations

import json
import logging
import os
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from prefopt.data.export_formats import (
    Format,
    encode_row,
    format_named,
    llama_factory_entry,
    row_problems,
    size_problems,
)
from prefopt.data.preference_data import load_preferences
from prefopt.data.records import read_records, write_bytes
from prefopt.data.rows import Source
from prefopt.data.shards import read_manifest, total_counts
from prefopt.errors import DataError
from prefopt.types import LeftOut, PreferenceGroup

logger = logging.getLogger(__name__)

REASONS = {
    "tie": "p_chosen is 0.5, so no answer is the better one",
    "more_likely_wrong": "p_chosen is below 0.5, so the label is more likely wrong than right",
    "below_min_p": "p_chosen is below min_p",
    "identical_answers": "both answers are the same text",
    "no_preference": "a prompt whose answers were never told apart",
    "cut_off": "the chosen answer was cut off by the token limit; it is no example to imitate",
    "also_rejected": "the chosen answer lost another comparison of the same prompt",
    "already_written": "the chosen answer is in an earlier row",
    "unfit": "the stack would not take the row",
}
"""Why a preference is in no row."""


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """What was written, and how many preferences were left out for which of `REASONS`.

    `left_out_before` counts the comparisons that were no preferences to begin with, by the reasons
    in the folder's `left_out.jsonl`.
    """

    path: str
    format: str
    rows: int
    left_out: dict[str, int]
    left_out_before: dict[str, int]
    also_wrote: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows for {self.format} in {self.path}"]
        lines += [f"also written: {path}" for path in self.also_wrote]
        lines += [
            f"left out, {reason}: {count:,} ({REASONS[reason]})"
            for reason, count in self.left_out.items()
        ]
        lines += [
            f"left out when the labels were made, {reason}: {count:,}"
            for reason, count in self.left_out_before.items()
        ]
        return "\n".join(lines)


def export_preferences(
    data: Source,
    path: str | os.PathLike[str],
    *,
    format: str,
    min_p: float = 0.5,
    unfit: Literal["refuse", "leave_out"] = "refuse",
) -> Export:
    """Write preferences as another stack reads them.

    These formats hold a winner and a loser, no probability: what has no winner is left out and
    counted. A group of K answers gives a row for each preference; for imitation ("sft" formats) a
    row for each chosen answer that was never rejected.

    Args:
        data: whatever `load_preferences` reads, or the folder of a run or a labelling job.
        path: the .jsonl file to write. For "llama-factory", `dataset_info.json` beside it gets an
            entry named after the file; its other entries are kept.
        format: one of `prefopt.data.export_formats.FORMATS`.
        min_p: the least `p_chosen` of a preference, in [0.5, 1]. Exactly 0.5 is a tie in any case.
        unfit: "refuse" writes nothing if any row breaks the stack's rules; "leave_out" counts it.

    Raises:
        DataError: unusable data, nothing left to write, or anything that the stack would not take;
            all problems are listed and nothing is written.
        ValueError: an unknown format, another suffix, or `min_p` out of range.
    """
    form = format_named(format)
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"exports are .jsonl files, got {path.name!r}.")
    if not 0.5 <= min_p <= 1.0:
        raise ValueError(f"min_p must be in [0.5, 1], got {min_p}.")
    if unfit not in ("refuse", "leave_out"):
        raise ValueError(f"unfit must be refuse or leave_out, got {unfit!r}.")
    info = _dataset_info(path) if form.name == "llama-factory" else None
    groups, before = _read(data)
    left_out: Counter[str] = Counter()
    lines: list[bytes] = []
    problems: list[str] = []
    n_bad = 0
    for where, group, pair in _pairs(form, groups, min_p, left_out):
        chosen, rejected, _ = pair
        try:
            line = encode_row(form.make(group.prompt.messages, chosen.text, rejected.text))
            wrong = row_problems(form, line)
        except ValueError as error:
            wrong = [str(error)]
        if not wrong:
            lines.append(line)
        elif unfit == "leave_out":
            left_out["unfit"] += 1
            logger.warning("%s is left out: %s", where, "; ".join(wrong))
        else:
            n_bad += 1
            problems += [f"{where}: {problem}" for problem in wrong]
    n_bytes = sum(len(line) + 1 for line in lines)
    result = Export(
        path=str(path),
        format=form.name,
        rows=len(lines),
        left_out=dict(left_out),
        left_out_before=before,
        also_wrote=() if info is None else (str(path.with_name("dataset_info.json")),),
    )
    problems += size_problems(form, len(lines) + n_bad, n_bytes)
    if problems:
        counted = "".join(f" Left out: {name} {n:,}." for name, n in left_out.items())
        advice = "" if unfit == "leave_out" else ", or leave such rows out with unfit=leave_out"
        raise DataError(
            f"{len(problems)} problem(s) with this data for {form.name}; nothing was written."
            f"{counted} Mend the data{advice}. The rules are those of {form.source}.",
            problems,
        )
    write_bytes(path, b"".join(line + b"\n" for line in lines))
    if info is not None:
        info[path.stem] = llama_factory_entry(path.name)
        encoded = json.dumps(info, indent=2, ensure_ascii=False)
        write_bytes(path.with_name("dataset_info.json"), encoded.encode() + b"\n")
    return result


def check_export(path: str | os.PathLike[str], *, format: str | Format) -> int:
    """Check a file by a stack's rules, line by line; returns how many rows it has.

    Raises:
        DataError: it cannot be read, or breaks a rule; all problems are listed by their line.
    """
    form = format_named(format) if isinstance(format, str) else format
    problems: list[str] = []
    n_rows = n_bytes = 0
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                n_bytes += len(line)
                if line.strip():
                    n_rows += 1
                    problems += [f"line {number}: {p}" for p in row_problems(form, line)]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
    problems += size_problems(form, n_rows, n_bytes)
    if problems:
        raise DataError(
            f"{path} has {len(problems)} problem(s) as a file for {form.name}. The rules are those "
            f"of {form.source}.",
            problems,
        )
    return n_rows


def _read(data: Source) -> tuple[list[PreferenceGroup], dict[str, int]]:
    """The groups, and the counts of what the folder says was left out of them."""
    if not isinstance(data, str | os.PathLike) or not Path(data).is_dir():
        return load_preferences(data), {}
    folder = Path(data)
    if read_manifest(folder) is not None:
        return load_preferences(folder), {}
    if read_manifest(folder / "preferences") is not None:  # of a job over shards
        why = read_manifest(folder / "left_out")
        return load_preferences(folder / "preferences"), {} if why is None else total_counts(why)
    preferences = folder / "preferences.jsonl"
    if not preferences.exists():
        raise DataError(
            f"{folder} holds no preferences.jsonl: expected the folder of a run or of a labelling "
            "job that got as far as its labels. Finish it, or give a file."
        )
    left_out = folder / "left_out.jsonl"
    reasons: Counter[str] = Counter(
        item.reason for item in (read_records(left_out, LeftOut) if left_out.exists() else [])
    )
    return load_preferences(preferences), dict(reasons)


def _pairs(
    form: Format, groups: list[PreferenceGroup], min_p: float, left_out: Counter[str]
) -> Iterator[tuple[str, PreferenceGroup, Any]]:
    """The preferences to write, each with its place; counts the others."""
    number = 0
    for group in groups:
        if not group.preferences:
            left_out["no_preference"] += 1
        kept = []
        for pair in group.pairs():
            number += 1
            chosen, rejected, preference = pair
            if chosen.text == rejected.text:
                left_out["identical_answers"] += 1
            elif preference.p_chosen == 0.5:
                left_out["tie"] += 1
            elif preference.p_chosen < 0.5:
                left_out["more_likely_wrong"] += 1
            elif preference.p_chosen < min_p:
                left_out["below_min_p"] += 1
            else:
                kept.append((number, pair))
        lost = {rejected.text for _, (_, rejected, _) in kept}
        written: set[str] = set()
        for place, pair in kept:
            answer = pair[0]
            if form.kind == "sft":
                if answer.text in lost:
                    left_out["also_rejected"] += 1
                    continue
                if answer.text in written:
                    left_out["already_written"] += 1
                    continue
                if answer.finish_reason == "length":
                    left_out["cut_off"] += 1
                    continue
                written.add(answer.text)
            shown = textwrap.shorten(group.prompt.text, width=40, placeholder=" …")
            yield f'preference {place} (prompt {group.prompt.prompt_id}, "{shown}")', group, pair


def _dataset_info(path: Path) -> dict[str, Any]:
    """LLaMA-Factory's list of data sets beside `path`; empty where there is none."""
    file = path.with_name("dataset_info.json")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}. Mend it or move it away.") from error
    if not isinstance(info, dict):
        raise DataError(f"{file} should hold an object, got {type(info).__name__}. Move it away.")
    there = info.get(path.stem)
    if there is not None and (not isinstance(there, dict) or there.get("file_name") != path.name):
        raise DataError(
            f"{file} has an entry {path.stem!r} for something else than {path.name}. Choose another "
            "file name, or remove the entry."
        )
    return info
