"""People's labels of some of the judged pairs: asking for them, reading them, what they show.

In: judged comparisons with the tuned answer as `a`. Out: a file of pairs to label, blind and in
random order; from a filled-in one a `HumanCheck`: how far the judge agrees with people, and the win
rate by their standard. The statistics are `prefopt.judges.agreement`'s and
`prefopt.evaluation.human_correction`'s.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from prefopt.data.labelled import load_labelled
from prefopt.data.records import write_bytes
from prefopt.data.rows import Source, read_rows
from prefopt.errors import DataError
from prefopt.evaluation.human_correction import CorrectedWinRate, human_corrected_win_rate
from prefopt.evaluation.win_rate import clustered_wilson_interval
from prefopt.judges.agreement import Agreement, measure_agreement
from prefopt.types import Comparison, JudgedComparison, Prompt, Winner

_OTHER: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
_POINTS: dict[Winner, float] = {"a": 1.0, "tie": 0.5, "b": 0.0}
_NEEDED = ("prompt", "response_a", "response_b")


class HumanCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What people's labels say of the judge and of the win rate.

    Fields:
        agreement: the judge against people on the labelled pairs.
        people_rate, people_low, people_high: the win rate on the labelled prompts by the labels
            alone, with its 95 % interval; n_prompts of them.
        corrected: the win rate by people's standard; None where it cannot be worked out.
        why_not: the reason then.
        n_not_labelled: rows of the file whose label was left empty.
        n_elsewhere: labels of pairs that are not in this evaluation, in no other figure.
    """

    agreement: Agreement
    people_rate: float
    people_low: float
    people_high: float
    n_prompts: int
    corrected: CorrectedWinRate | None
    why_not: str
    n_not_labelled: int
    n_elsewhere: int


def write_to_label(
    comparisons: Sequence[Comparison], path: str | Path, *, n: int, seed: int = 0
) -> int:
    """Write pairs for people to label: one a prompt, drawn at random, sides in random order.

    Each line has `prompt`, `response_a`, `response_b` and an empty `label`, to be filled with A, B or
    tie. Which answer is whose is not said, so that nobody labels by it. Pairs with the same text on
    both sides are not among them.

    Args:
        comparisons: what was or will be judged.
        path: JSONL file.
        n: how many prompts.
        seed: of the draw and the order of the sides.

    Returns:
        how many were written: fewer than `n` where there are fewer prompts.

    Raises:
        ValueError: n below 1.
        DataError: the file is there already, perhaps with labels in it, or cannot be written.
    """
    if n < 1:
        raise ValueError(f"the number of pairs to label must be at least 1, got {n}.")
    path = Path(path)
    if path.exists():
        raise DataError(
            f"{path} is there already and may hold labels. Pass it with --human_labels, or move it "
            "away."
        )
    by_prompt: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.a.text != comparison.b.text:
            by_prompt.setdefault(comparison.prompt.prompt_id, []).append(comparison)
    chance = random.Random(seed)
    drawn = chance.sample(sorted(by_prompt), min(n, len(by_prompt)))
    rows = []
    for prompt_id in drawn:
        comparison = chance.choice(by_prompt[prompt_id])
        first, second = (comparison.a, comparison.b)
        if chance.random() < 0.5:
            first, second = second, first
        rows.append(
            {
                "prompt": _plain(comparison.prompt),
                "response_a": first.text,
                "response_b": second.text,
                "label": "",
            }
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(path, lines.encode("utf-8", "surrogatepass"))
    return len(rows)


def check_against_people(judged: Sequence[JudgedComparison], labels: Source) -> HumanCheck:
    """Read labels and hold the judge against them.

    Args:
        judged: comparisons with verdicts.
        labels: a file that `write_to_label` wrote and people filled in, or rows of that form; labels
            are found again by prompt and answers, so the order of rows and sides is free. Rows with an
            empty label are passed over and counted.

    Raises:
        DataError: the file cannot be read, a row is no labelled pair, a pair is labelled twice in
            different ways, or none of the labels is of a pair of this evaluation.
    """
    rows = read_rows(labels)
    if rows.problems:
        raise rows.bad("labelled pairs", [])
    filled = [row.value for row in rows.rows if not _is_unlabelled(row.value)]
    empty = len(rows.rows) - len(filled)
    if not filled:
        raise DataError(
            f"{rows.name}: none of the {len(rows.rows)} rows has a label. Fill in `label` with A, B "
            "or tie."
        )
    places: dict[tuple[str, str, str], tuple[int, bool]] = {}
    for i, item in enumerate(judged):
        pair = item.comparison
        places.setdefault((pair.prompt.prompt_id, pair.b.text, pair.a.text), (i, True))
        places[pair.prompt.prompt_id, pair.a.text, pair.b.text] = (i, False)
    found: dict[int, Winner] = {}
    elsewhere, problems = 0, []
    for given in load_labelled(filled):
        comparison = given.comparison
        place = places.get((comparison.prompt.prompt_id, comparison.a.text, comparison.b.text))
        if place is None:
            elsewhere += 1
            continue
        index, exchanged = place
        label = _OTHER[given.label] if exchanged else given.label
        if found.setdefault(index, label) != label:
            problems.append(f"{comparison.prompt.text[:60]!r} has two different labels")
    if problems:
        raise DataError(
            f"{rows.name}: some pairs are labelled twice. Keep one label a pair, such as the "
            "majority's.",
            problems,
        )
    if not found:
        raise DataError(
            f"{rows.name}: none of its {elsewhere} labels is of a pair of this evaluation: they go by "
            "the prompt and both answers, letter by letter. Label the pairs of this very evaluation "
            "(--to_label writes them)."
        )
    labelled = [judged[i] for i in sorted(found)]
    said = [found[i] for i in sorted(found)]
    by_prompt: dict[str, list[float]] = {}
    for item, label in zip(labelled, said, strict=True):
        by_prompt.setdefault(item.comparison.prompt.prompt_id, []).append(_POINTS[label])
    means = [fmean(points) for points in by_prompt.values()]
    low, high = clustered_wilson_interval(means)
    corrected, why_not = None, ""
    try:
        corrected = human_corrected_win_rate(
            judged, {j.comparison.comparison_id: s for j, s in zip(labelled, said, strict=True)}
        )
    except ValueError as error:
        why_not = str(error)
    return HumanCheck(
        agreement=measure_agreement(labelled, said, name=rows.name),
        people_rate=fmean(means),
        people_low=low,
        people_high=high,
        n_prompts=len(means),
        corrected=corrected,
        why_not=why_not,
        n_not_labelled=empty,
        n_elsewhere=elsewhere,
    )


def _is_unlabelled(row: Any) -> bool:
    """Of `write_to_label`'s form with nothing filled in; a row without any `label` is an error."""
    if not isinstance(row, Mapping) or not all(name in row for name in _NEEDED):
        return False
    label = row.get("label", "missing")
    return label is None or (isinstance(label, str) and not label.strip())


def _plain(prompt: Prompt) -> Any:
    """A text where it is one user message, else the messages."""
    if len(prompt.messages) == 1 and prompt.messages[0].role == "user":
        return prompt.text
    return [{"role": m.role, "content": m.content} for m in prompt.messages]
