"""Preference groups and how they were made -> a dataset card in Markdown with YAML front matter.

Every figure is counted from the groups given. Writes no file and asks no model.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import msgspec

from prefopt.types import LeftOut, PreferenceGroup

T = TypeVar("T")

COLUMNS = {
    "prompt": "the conversation, as `role`/`content` messages",
    "chosen": "the preferred answer, one assistant message",
    "rejected": "the other answer, one assistant message",
    "p_chosen": "probability that the preference is right, in [0, 1]",
    "margin": "how much better, as the mean signed grade of the verdicts (at most 2) where a judge "
    "gave grades",
    "p_source": "where `p_chosen` comes from: prior (uncalibrated default), calibrated (against "
    "human labels), human, given (came with the data)",
    "chosen_finish_reason": "stop, length (cut off by the token limit) or unknown",
    "rejected_finish_reason": "the same for the rejected answer",
    "prompt_id": "hash of the prompt's messages; equal prompts have equal ids",
    "category": "the prompt's category, may be empty",
    "chosen_model": "what wrote the chosen answer",
    "rejected_model": "what wrote the rejected answer",
    "chosen_sample_index": "which sample of that model it was",
    "rejected_sample_index": "the same for the rejected answer",
    "chosen_n_tokens": "its length in that model's tokens, where known",
    "rejected_n_tokens": "the same for the rejected answer",
}
"""What each column of a row holds, in the order of the columns."""

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))


def dataset_card(
    groups: Sequence[PreferenceGroup],
    *,
    judge: str | None = None,
    left_out: Sequence[LeftOut] = (),
    cost_usd: float | None = None,
    source: str | None = None,
) -> str:
    """Describe preference data for whoever trains on it.

    Args:
        groups: the data.
        judge: which judge gave the labels, in words.
        left_out: the comparisons that became no preference; counted by reason.
        cost_usd: what judging cost, in US dollars.
        source: where the prompts come from, in words.

    Returns:
        Markdown: counts, lengths in words (split at white space), provenance of the labels, what
        was left out and why, the columns, and the caveats that follow from these figures.
    """
    pairs = [pair for group in groups for pair in group.pairs()]
    chosen = [len(c.text.split()) for c, _, _ in pairs]
    rejected = [len(r.text.split()) for _, r, _ in pairs]
    longer = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    shorter = sum(c < r for c, r in zip(chosen, rejected, strict=True))
    sizes = Counter(len(group.answers) for group in groups)
    sources: Counter[str] = Counter(p.p_source for _, _, p in pairs)
    models = Counter(a.model for group in groups for a in group.answers)
    categories = Counter(group.prompt.category or "(none)" for group in groups)

    def share(count: int) -> str:
        return f"{count} ({count / len(pairs):.0%})" if pairs else "0"

    sections = [
        _front_matter(len(pairs)),
        "# Preference data",
        "Pairs of answers to the same prompt, with the one that was preferred. Made with prefopt; "
        "readable by TRL's `DPOTrainer` and `RewardTrainer` as a conversational preference "
        "dataset.",
        "## What is in it",
        _table(
            ["", "count"],
            [
                ["pairs (rows)", len(pairs)],
                ["prompts", len({group.prompt.prompt_id for group in groups})],
                *[[f"groups with {k} answers", sizes[k]] for k in sorted(sizes)],
                *[[f"answers by {inert(name)}", n] for name, n in models.most_common()],
                *[
                    [f"groups of category {inert(name)}", n]
                    for name, n in sorted(categories.items())
                ],
            ],
        ),
        f"Source of the prompts: {inert(source or 'not stated')}.",
        "## Lengths, in words",
        _table(
            ["", "mean", "median", "shortest", "longest"],
            [_lengths("chosen", chosen), _lengths("rejected", rejected)],
        ),
        f"The longer answer is the chosen one in {share(longer)} of the pairs, the shorter one in "
        f"{share(shorter)}.",
        "## Where the labels come from",
        f"Judge: {inert(judge or 'not stated')}. "
        + ("Cost: not stated." if cost_usd is None else f"Cost: ${cost_usd:.2f}."),
        _table(
            ["`p_source`", "pairs", "mean `p_chosen`"],
            [
                [name, n, _mean([p.p_chosen for _, _, p in pairs if p.p_source == name])]
                for name, n in sources.most_common()
            ],
        ),
        "## What was left out",
        _left_out(left_out),
        "## Columns",
        _table(["column", "holds"], [[f"`{name}`", text] for name, text in COLUMNS.items()]),
        "A group of K answers gives one row for each of its preferences, so an answer can occur "
        "in several rows.",
        "## Caveats",
        "\n".join(f"- {c}" for c in _caveats(groups, max(longer, shorter), sources)),
    ]
    return "\n\n".join(sections) + "\n"


def inert(value: T) -> T:
    """Text in which Markdown opens no HTML, link, picture or code; of whatever holds text, all of it.

    Names, categories and notes come from models and from other people's files, and pages with such a
    card are shown beside others of the same site.
    """
    found: Any = value
    if isinstance(value, str):
        found = re.sub(r"([\\`\[\]])", r"\\\1", value).replace("<", "&lt;")
    elif isinstance(value, dict):
        found = {inert(name): inert(item) for name, item in value.items()}
    elif isinstance(value, list | tuple):
        found = type(value)(inert(item) for item in value)
    elif isinstance(value, msgspec.Struct):
        fields = {name: inert(getattr(value, name)) for name in value.__struct_fields__}
        found = msgspec.structs.replace(value, **fields)
    return cast("T", found)


def _front_matter(n_pairs: int) -> str:
    size = next((name for limit, name in _SIZES if n_pairs < limit), "n>100K")
    return (
        "---\ntask_categories:\n- text-generation\ntags:\n- preference\n- dpo\n- prefopt\n"
        f"size_categories:\n- {size}\n---"
    )


def _left_out(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return "No record of comparisons left out came with these groups."
    reasons = Counter(item.reason for item in left_out)
    rows: list[list[object]] = [[reason, count] for reason, count in reasons.most_common()]
    return _table(["reason", "comparisons"], [*rows, ["all", len(left_out)]])


def _caveats(groups: Sequence[PreferenceGroup], one_sided: int, sources: Counter[str]) -> list[str]:
    pairs = [pair for group in groups for pair in group.pairs()]
    caveats = ["Preferences are a judge's opinion under its rubric, not statements of fact."]
    if pairs and one_sided >= 0.8 * len(pairs):
        caveats.append(
            "One length wins in four pairs of five or more: a model can fit much of this data by "
            "length alone."
        )
    if sources["prior"]:
        caveats.append(
            f"{sources['prior']} pair(s) carry an uncalibrated `p_chosen`: a default, not a "
            "measured probability."
        )
    cut = sum("length" in (c.finish_reason, r.finish_reason) for c, r, _ in pairs)
    if cut:
        caveats.append(
            f"{cut} pair(s) hold an answer that was cut off by the token limit; train such an "
            "answer without an end token."
        )
    unknown = sum("unknown" in (c.finish_reason, r.finish_reason) for c, r, _ in pairs)
    if unknown:
        caveats.append(f"In {unknown} pair(s) it is not known whether both answers were finished.")
    unpaired = sum(
        index not in {i for p in group.preferences for i in (p.chosen, p.rejected)}
        for group in groups
        for index in range(len(group.answers))
    )
    if unpaired:
        caveats.append(f"{unpaired} answer(s) take part in no preference and are in no row.")
    return caveats


def _lengths(name: str, words: list[int]) -> list[object]:
    if not words:
        return [name, "-", "-", "-", "-"]
    return [name, _mean(words), f"{statistics.median(words):g}", min(words), max(words)]


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3g}"


def _table(head: list[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        return (
            "| "
            + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
            + " |"
        )

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
