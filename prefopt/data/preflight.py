"""What preference data will be in training -> a report of everything worth knowing beforehand.

In: groups, the tokenizer, the maximum length. Out: findings with the pairs they concern and what to
do. Looks at the token ids that will be trained on, not at guesses from the text. Changes nothing,
drops nothing, and imports no torch.
"""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from prefopt.chat import (
    TokenizedAnswer,
    TokenizedPreference,
    end_token_ids,
    join_answers,
    tokenize_candidate,
)
from prefopt.errors import DataError, ModelError
from prefopt.types import Candidate, Preference, PreferenceGroup, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Severity = Literal["error", "warning", "info"]

FEW_PAIRS = 100
"""Below this many pairs a warning is given: held-out figures from so few are mostly noise."""

ONE_SIDED_SHARE = 0.8
"""From this share on, length alone explains the preferences well enough to warn."""

_KEPT_ROWS = 20
_SHOWN_ROWS = 8


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was found. `rows` are the first 20 of the `n_rows` pairs concerned.

    A pair's number is its row in `preference_rows(groups)`, from 0.
    """

    severity: Severity
    check: str
    message: str
    remedy: str = ""
    rows: tuple[int, ...] = ()
    n_rows: int = 0


class PreflightReport(msgspec.Struct, frozen=True, kw_only=True):
    """The findings and the figures behind them.

    Lengths are in tokens of the answer, end token included, before truncation. A share is of all
    pairs that could be tokenized: those of equal length count to neither. Means and shares are None
    when there is no such pair.
    """

    findings: tuple[Finding, ...]
    n_pairs: int
    n_prompts: int
    max_length: int | None
    n_chosen_truncated: int
    n_rejected_truncated: int
    shortest_wins_share: float | None
    longest_wins_share: float | None
    mean_length_prompt: float | None
    mean_length_chosen: float | None
    mean_length_rejected: float | None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings with which training must not start."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings a person should look at."""
        return tuple(f for f in self.findings if f.severity == "warning")

    def raise_for_errors(self) -> None:
        """Raise one DataError that lists all errors, if there are any."""
        if self.errors:
            raise DataError(
                f"the preference data has {len(self.errors)} error(s); training would be wrong or "
                "could not start.",
                [f"{f.check}: {f.message}{_places(f)} {f.remedy}".rstrip() for f in self.errors],
            )

    def to_text(self) -> str:
        """The report for a terminal: the figures, then the findings, worst first."""
        limit = "none" if self.max_length is None else f"{self.max_length} tokens"
        lines = [
            f"{self.n_pairs} pairs, {self.n_prompts} prompts, maximum length {limit}",
            f"mean tokens: prompt {_number(self.mean_length_prompt)}, "
            f"chosen {_number(self.mean_length_chosen)}, "
            f"rejected {_number(self.mean_length_rejected)}",
            f"the longer answer is chosen in {_percent(self.longest_wins_share)}, "
            f"the shorter in {_percent(self.shortest_wins_share)} of the pairs",
            "",
        ]
        if not self.findings:
            return "\n".join([*lines, "nothing found"])
        check_width = max(len(f.check) for f in self.findings)
        rows_width = max(5, *(len(str(f.n_rows)) for f in self.findings))
        lines.append(f"{'severity':8}  {'check':{check_width}}  {'pairs':>{rows_width}}  finding")
        margin = " " * (8 + 2 + check_width + 2 + rows_width + 2)
        for finding in self.findings:
            head = (
                f"{finding.severity:8}  {finding.check:{check_width}}  "
                f"{finding.n_rows or '':>{rows_width}}  "
            )
            text = f"{finding.message}{_places(finding)} {finding.remedy}".rstrip()
            lines += textwrap.wrap(text, 110, initial_indent=head, subsequent_indent=margin)
        return "\n".join(lines)


class _Pair(NamedTuple):
    row: int
    prompt: Prompt
    chosen: Candidate
    rejected: Candidate
    preference: Preference
    tokens: TokenizedPreference | None

    @property
    def texts(self) -> tuple[str, str, str]:
        return (self.prompt.prompt_id, self.chosen.text, self.rejected.text)


def preflight(
    groups: Sequence[PreferenceGroup],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    held_out: Sequence[Prompt] | None = None,
) -> PreflightReport:
    """Check preference data against the tokenizer it will be trained with.

    Errors: no pairs, an empty chosen answer, a chosen answer that equals the rejected one (as a
    whole or up to `max_length`), a prompt that alone fills `max_length`, a conversation the chat
    template refuses, training prompts among the held-out ones, nothing but contradictions.
    Warnings: contradicting pairs (the same prompt and the same two texts preferred both ways; they
    pull in opposite directions and mostly cancel, which wastes training but does no further harm),
    repeated pairs, ties and labels below 1/2, empty rejected answers, truncation, lost end tokens,
    BOS or EOS inside an answer, tokens merged across the prompt's end, one-sided lengths, fewer
    than 100 pairs.

    Args:
        groups: the training data.
        tokenizer: the one of the model to be trained.
        max_length: tokens of prompt and answer at which training truncates, or None.
        held_out: prompts that must not be trained on.
    """
    refused: dict[int, str] = {}
    pairs = list(_tokenized_pairs(groups, tokenizer, refused))
    tokens = [p.tokens for p in pairs if p.tokens is not None]
    chosen = [len(t.chosen_ids) for t in tokens]
    rejected = [len(t.rejected_ids) for t in tokens]
    longest = _share(c > r for c, r in zip(chosen, rejected, strict=True))
    shortest = _share(c < r for c, r in zip(chosen, rejected, strict=True))
    cut_chosen = [p.row for p in pairs if _is_truncated(p, "chosen", max_length)]
    cut_rejected = [p.row for p in pairs if _is_truncated(p, "rejected", max_length)]

    findings = [
        *_size(pairs),
        *_template(refused),
        *_texts(pairs),
        *_labels(pairs),
        *_overlap(pairs, held_out),
        *_length(pairs, max_length, cut_chosen, cut_rejected),
        *_tokens(pairs, tokenizer, max_length),
        *_length_gap(pairs, longest, shortest),
        *_finish_reasons(pairs),
    ]
    order: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
    return PreflightReport(
        findings=tuple(sorted(findings, key=lambda f: order[f.severity])),
        n_pairs=len(pairs),
        n_prompts=len({p.prompt.prompt_id for p in pairs}),
        max_length=max_length,
        n_chosen_truncated=len(cut_chosen),
        n_rejected_truncated=len(cut_rejected),
        shortest_wins_share=shortest,
        longest_wins_share=longest,
        mean_length_prompt=_mean([len(t.prompt_ids) for t in tokens]),
        mean_length_chosen=_mean(chosen),
        mean_length_rejected=_mean(rejected),
    )


def _tokenized_pairs(
    groups: Sequence[PreferenceGroup],
    tokenizer: PreTrainedTokenizerBase,
    refused: dict[int, str],
) -> Iterator[_Pair]:
    row = 0
    for group in groups:
        known: dict[int, TokenizedAnswer] = {}
        for p in group.preferences:
            tokens = None
            try:
                for index in (p.chosen, p.rejected):
                    if index not in known:
                        known[index] = tokenize_candidate(tokenizer, group.answers[index])
                tokens = join_answers(known[p.chosen], known[p.rejected])
            except (DataError, ModelError) as error:
                refused[row] = str(error)
            chosen, rejected = group.answers[p.chosen], group.answers[p.rejected]
            yield _Pair(row, group.prompt, chosen, rejected, p, tokens)
            row += 1


def _size(pairs: list[_Pair]) -> Iterator[Finding]:
    if not pairs:
        yield Finding(
            severity="error",
            check="no_pairs",
            message="there is not one preference to train on.",
            remedy="Look at what was left out when the pairs were made, and why.",
        )
    elif len(pairs) < FEW_PAIRS:
        yield Finding(
            severity="warning",
            check="few_pairs",
            message=f"{len(pairs)} pairs are few; training may only learn noise.",
            remedy=f"Sample more prompts or answers: {FEW_PAIRS} at least, 1000 are better.",
        )


def _template(refused: dict[int, str]) -> Iterator[Finding]:
    if refused:
        yield _finding(
            "error",
            "template",
            refused,
            f"cannot be tokenized; the first: {next(iter(refused.values()))}",
            "",
        )


def _texts(pairs: list[_Pair]) -> Iterator[Finding]:
    yield from _found(
        "error",
        "identical",
        (p.row for p in pairs if p.chosen.text == p.rejected.text or _same_ids(p)),
        "pairs have the same answer as chosen and rejected.",
        "Leave them out: they carry no preference, and their loss cannot fall.",
    )
    yield from _found(
        "error",
        "empty_chosen",
        (p.row for p in pairs if not p.chosen.text.strip()),
        "pairs prefer an empty answer.",
        "Leave them out: they teach the model to say nothing.",
    )
    yield from _found(
        "warning",
        "empty_rejected",
        (p.row for p in pairs if not p.rejected.text.strip()),
        "pairs reject an empty answer.",
        "Leave them out unless the model really answers nothing at times.",
    )
    seen: set[tuple[str, str, str]] = set()
    repeats = []
    for pair in pairs:
        if pair.texts in seen:
            repeats.append(pair.row)
        seen.add(pair.texts)
    yield from _found(
        "warning",
        "duplicates",
        repeats,
        "pairs repeat an earlier one (same prompt, chosen and rejected) and weigh double.",
        "Keep one of each unless the weight is meant.",
    )


def _labels(pairs: list[_Pair]) -> Iterator[Finding]:
    yield from _found(
        "warning",
        "ties",
        (p.row for p in pairs if p.preference.p_chosen == 0.5),
        "pairs have p_chosen = 0.5.",
        "They carry no preference and only hold the model in place; leave them out or judge again.",
    )
    yield from _found(
        "warning",
        "p_below_half",
        (p.row for p in pairs if p.preference.p_chosen < 0.5),
        "pairs have p_chosen below 0.5: the label itself says that the rejected answer is better.",
        "Exchange the two answers (and take 1 - p_chosen), or leave the pairs out.",
    )
    rows: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for pair in pairs:
        rows[pair.texts].append(pair.row)
    conflicting = sorted(
        row
        for (prompt_id, chosen, rejected), places in rows.items()
        if chosen != rejected and (prompt_id, rejected, chosen) in rows
        for row in places
    )
    hopeless = len(conflicting) == len(pairs)
    yield from _found(
        "error" if hopeless else "warning",
        "conflicts",
        conflicting,
        "pairs contradict another: the same prompt and the same two answers, preferred both ways."
        + (" That is all of them, so nothing consistent is left to learn." if hopeless else ""),
        "Judge these again, or leave both out; noise does not make a preference.",
    )


def _overlap(pairs: list[_Pair], held_out: Sequence[Prompt] | None) -> Iterator[Finding]:
    ids = {prompt.prompt_id for prompt in held_out or ()}
    yield from _found(
        "error",
        "held_out_overlap",
        (p.row for p in pairs if p.prompt.prompt_id in ids),
        "pairs have a prompt that is also held out; every held-out figure would be flattered.",
        "Split by prompt before sampling (`split_by_prompt`).",
    )


def _length(
    pairs: list[_Pair], max_length: int | None, cut_chosen: list[int], cut_rejected: list[int]
) -> Iterator[Finding]:
    yield from _found(
        "error",
        "prompt_fills_max_length",
        (p.row for p in pairs if _prompt_fills(p, max_length)),
        f"pairs have a prompt of {max_length} tokens (max_length) or more: nothing of the answers "
        "is left to train on.",
        "Raise max_length or leave these prompts out.",
    )
    yield from _found(
        "error",
        "identical_when_truncated",
        (p.row for p in pairs if _same_when_truncated(p, max_length)),
        f"pairs differ only beyond max_length={max_length}, where nothing is trained.",
        "Raise max_length or leave these pairs out.",
    )
    yield from _found(
        "warning",
        "truncation",
        sorted({*cut_chosen, *cut_rejected}),
        f"pairs are truncated at max_length={max_length}: {len(cut_chosen)} chosen and "
        f"{len(cut_rejected)} rejected answers.",
        "Raise max_length, or sample shorter answers; a preference may rest on what is cut away.",
    )


def _tokens(
    pairs: list[_Pair], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Iterator[Finding]:
    tokenized = [(p, p.tokens) for p in pairs if p.tokens is not None]
    if not tokenized:
        return
    yield from _found(
        "warning",
        "boundary_merge",
        (p.row for p, t in tokenized if t.boundary_merged),
        "pairs tokenize differently at the end of the prompt once the answer follows; training "
        "sees another prompt than generation does.",
        "Strip leading white space from the answers, or use a chat template that writes the prompt "
        "the same way in both cases.",
    )
    ends = end_token_ids(tokenizer)
    bos = tokenizer.bos_token_id
    lost, inside, doubled = [], [], []
    for pair, ids in tokenized:
        room = None if max_length is None else max(max_length - len(ids.prompt_ids), 0)
        for answer, answer_ids in (
            (pair.chosen, ids.chosen_ids),
            (pair.rejected, ids.rejected_ids),
        ):
            trained = answer_ids[:room]
            if answer.finish_reason != "length" and trained and trained[-1] not in ends:
                lost.append(pair.row)
            if ends.intersection(answer_ids[:-1]):
                inside.append(pair.row)
            if bos is not None and bos not in ends and bos in answer_ids:
                doubled.append(pair.row)
    yield from _found(
        "warning",
        "missing_eos",
        _distinct(lost),
        "pairs hold a finished answer whose end token is cut away by max_length: from them the "
        "model does not learn to stop.",
        "Raise max_length.",
    )
    yield from _found(
        "warning",
        "eos_inside",
        _distinct(inside),
        "pairs hold an answer with an end token before its end.",
        "Remove the special tokens from the answers' text; templates write them.",
    )
    yield from _found(
        "warning",
        "doubled_bos",
        _distinct(doubled),
        "pairs hold an answer with a BOS token in it, a second one in the conversation.",
        "Remove the special tokens from the answers' text; templates write them.",
    )


def _length_gap(
    pairs: list[_Pair], longest: float | None, shortest: float | None
) -> Iterator[Finding]:
    if longest is None or shortest is None:
        return
    equal = max(0.0, 1.0 - longest - shortest)
    for name, word, share in (("longest", "longer", longest), ("shortest", "shorter", shortest)):
        if share >= ONE_SIDED_SHARE:
            yield Finding(
                severity="warning",
                check=f"{name}_wins",
                message=f"the {word} answer is chosen in {share:.0%} of the pairs; choosing by "
                f"'{name} wins' alone would score {share + equal / 2:.0%}.",
                remedy="If length is not what is meant, balance the pairs by length or use a "
                "length-normalised loss; in any case compare results at equal length.",
            )


def _finish_reasons(pairs: list[_Pair]) -> Iterator[Finding]:
    reasons = {p.row: {p.chosen.finish_reason, p.rejected.finish_reason} for p in pairs}
    yield from _found(
        "info",
        "cut_answers",
        (row for row, found in reasons.items() if "length" in found),
        "pairs hold an answer that was cut off when it was sampled; it is trained without an end "
        "token.",
        "",
    )
    yield from _found(
        "info",
        "unknown_finish",
        (row for row, found in reasons.items() if "unknown" in found),
        "pairs do not say whether both answers were finished; they are trained as finished.",
        "",
    )


def _found(
    severity: Severity, check: str, rows: Iterable[int], message: str, remedy: str
) -> Iterator[Finding]:
    listed = list(rows)
    if listed:
        yield _finding(severity, check, listed, message, remedy)


def _finding(
    severity: Severity, check: str, rows: Iterable[int], message: str, remedy: str
) -> Finding:
    listed = tuple(rows)
    return Finding(
        severity=severity,
        check=check,
        message=f"{len(listed)} {message}",
        remedy=remedy,
        rows=listed[:_KEPT_ROWS],
        n_rows=len(listed),
    )


def _same_ids(pair: _Pair) -> bool:
    return pair.tokens is not None and pair.tokens.chosen_ids == pair.tokens.rejected_ids


def _prompt_fills(pair: _Pair, max_length: int | None) -> bool:
    return (
        max_length is not None
        and pair.tokens is not None
        and len(pair.tokens.prompt_ids) >= max_length
    )


def _same_when_truncated(pair: _Pair, max_length: int | None) -> bool:
    ids = pair.tokens
    if max_length is None or ids is None or _prompt_fills(pair, max_length) or _same_ids(pair):
        return False
    room = max_length - len(ids.prompt_ids)
    return ids.chosen_ids[:room] == ids.rejected_ids[:room]


def _is_truncated(pair: _Pair, side: Literal["chosen", "rejected"], max_length: int | None) -> bool:
    if max_length is None or pair.tokens is None or _prompt_fills(pair, max_length):
        return False
    answer = pair.tokens.chosen_ids if side == "chosen" else pair.tokens.rejected_ids
    return len(pair.tokens.prompt_ids) + len(answer) > max_length


def _distinct(rows: list[int]) -> list[int]:
    return list(Counter(rows))


def _places(finding: Finding) -> str:
    if not finding.rows:
        return ""
    shown = finding.rows[:_SHOWN_ROWS]
    more = ", …" if finding.n_rows > len(shown) else ""
    return f" (pairs {', '.join(map(str, shown))}{more})"


def _share(flags: Iterable[bool]) -> float | None:
    listed = list(flags)
    return sum(listed) / len(listed) if listed else None


def _mean(values: Sequence[int]) -> float | None:
    return fmean(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
