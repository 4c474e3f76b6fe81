"""What the verdicts of a labelling job are worth, in numbers and in plain words.

In: judged comparisons (read once, so a million fit), the labels made of them, the canaries and the
ledger. Out: `LabelReport`, as a terminal table, JSON and one HTML page. It judges nothing and keeps no
text of any answer.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from prefopt.evaluation.win_rate import wilson_interval
from prefopt.judges.canaries import CanaryResult
from prefopt.judges.drift import drift_findings
from prefopt.judges.ledger import Ledger
from prefopt.judges.rubric import Rubric
from prefopt.preferences import Preferences
from prefopt.types import JudgedComparison, Verdict

GRADES = (2, 1, 0, -1, -2)
_FEW = 30
_P_BINS = 10


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """k of n, with the Wilson 95 % interval (Wilson 1927); all shares are in [0, 1]."""

    k: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, k: int, n: int) -> Share | None:
        """None where there is nothing to take a share of."""
        return None if n == 0 else cls(k, n, *wilson_interval(k / n, n))

    @property
    def share(self) -> float:
        """k / n."""
        return self.k / self.n

    def __str__(self) -> str:
        return f"{self.share:6.1%}  ({self.low:.1%} to {self.high:.1%}, {self.k:,} of {self.n:,})"


class CategoryRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One category of prompts."""

    category: str
    n: int
    n_flipped: int
    n_tie: int
    n_failed: int


P_CHOSEN_NOTE = (
    "By the verdicts alone. Errors that a judge repeats do not show: `prefopt judge calibrate`."
)


class LedgerCounts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a ledger holds, all jobs that share it together. Dollars are US dollars."""

    spent_usd: float
    unknown_usd: float
    input_tokens: int
    output_tokens: int
    answered: dict[str, int]
    """Answers by transport: "sync" and "batch"."""
    other_attempts: dict[str, int]
    """Tries that brought no verdict, by what became of them."""
    open_batches: int


class LabelReport(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.label_report/1",
):
    """The figures of one labelling job; `label_report` makes one.

    `outcomes` says what became of every comparison; its values add up to `n_comparisons`.
    `flips` is of pairs whose two orders both named a winner. `first_place` is of the verdicts that
    named one, in pairs asked about in both orders: with one order, a lean to a place cannot be told
    from better answers there. Its interval is too wide, never too narrow, since the two orders of a
    pair mostly cancel. `longer_wins` is of pairs, each counted once: those without a failed verdict
    whose mean grade is not 0 and whose answers differ in length (words split at white space).
    `grades` counts decided verdicts in favour of the answer shown first, 2 to -2. `both_orders`
    counts (grade with a first, grade with b first), both in favour of a, as "2/-1".
    """

    judge: str
    rubric: str
    n_prompts: int
    n_comparisons: int
    n_labels: int
    outcomes: dict[str, int]
    n_verdicts: int
    failures: dict[str, int]
    refusals: dict[str, int]
    flips: Share | None
    first_place: Share | None
    ties: Share | None
    longer_wins: Share | None
    same_length: Share | None
    grades: dict[str, int]
    both_orders: dict[str, int]
    one_order: int
    position_bias: dict[str, float]
    p_chosen: list[int]
    mean_p_chosen: float | None
    p_sources: dict[str, int]
    canaries: tuple[CanaryResult, ...]
    categories: tuple[CategoryRow, ...]
    ledger: LedgerCounts | None
    warnings: tuple[str, ...]
    created_at: str

    def to_text(self) -> str:
        """A table for the terminal."""
        return _text(self)

    def to_html(self) -> str:
        """One page that needs nothing else."""
        from prefopt.judges.label_page import label_page

        return label_page(self)


def label_report(
    judged: Iterable[JudgedComparison],
    *,
    judge: str,
    rubric: Rubric,
    preferences: Preferences,
    canaries: Sequence[CanaryResult] = (),
    ledger: Ledger | None = None,
    created_at: str | None = None,
) -> LabelReport:
    """Count everything about a job's verdicts and labels, and say what to do about it.

    Args:
        judged: the comparisons with their verdicts; read once.
        judge: the name of the judge or judges, for the heading.
        rubric: what it was asked to apply.
        preferences: what `build_preferences` made of `judged`.
        canaries: how the judge did on answers made to fool it.
        ledger: for what was paid; None leaves money out.
        created_at: the date shown; now by default.

    Raises:
        ValueError: `preferences` were made of other comparisons than `judged`.
    """
    tally = _Tally()
    for item in judged:
        tally.add(item)
    if preferences.n_comparisons != tally.n:
        raise ValueError(
            f"the labels were made of {preferences.n_comparisons:,} comparisons, but "
            f"{tally.n:,} judged ones came. Build the preferences from the same comparisons."
        )
    pairs = [p for group in preferences.groups for p in group.preferences]
    bins = [0] * _P_BINS
    for p in pairs:
        # Rounded: 0.7 - 0.5 is a little less than 0.2 in binary and would fall a bin too low.
        place = int(round((p.p_chosen - 0.5) * 2 * _P_BINS, 9))
        bins[min(max(place, 0), _P_BINS - 1)] += 1
    left_out = Counter(item.reason for item in preferences.left_out)
    n_left_out = sum(left_out.values())
    outcomes: dict[str, int] = {
        "labelled": tally.n - n_left_out,
        **dict(left_out.most_common()),
    }
    report = LabelReport(
        judge=judge,
        rubric=rubric.name,
        n_prompts=len(tally.prompts),
        n_comparisons=tally.n,
        n_labels=len(pairs),
        outcomes=outcomes,
        n_verdicts=tally.n_verdicts,
        failures=dict(tally.failures.most_common()),
        refusals=dict(tally.refusals.most_common()),
        flips=Share.of(tally.flipped, tally.both_decided),
        first_place=Share.of(tally.first_named, tally.named),
        ties=Share.of(tally.tied, tally.n_verdicts - sum(tally.failures.values())),
        longer_wins=Share.of(tally.longer_named, tally.longer_or_shorter),
        same_length=Share.of(tally.same_length, tally.n),
        grades={str(g): tally.grades[g] for g in GRADES},
        both_orders={f"{f}/{b}": n for (f, b), n in sorted(tally.both.items(), reverse=True)},
        one_order=tally.one_order,
        position_bias={
            name: round(fitted.first_share_of_equals, 4)
            for name, fitted in preferences.judges.items()
        },
        p_chosen=bins,
        mean_p_chosen=sum(p.p_chosen for p in pairs) / len(pairs) if pairs else None,
        p_sources=dict(Counter(p.p_source for p in pairs).most_common()),
        canaries=tuple(canaries),
        categories=tally.category_rows(),
        ledger=None if ledger is None else _ledger_counts(ledger),
        warnings=(),
        created_at=created_at or datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    drift = () if ledger is None else drift_findings(ledger)
    return msgspec.structs.replace(report, warnings=(*drift, *_warnings(report)))


def write_label_report(report: LabelReport, folder: str | Path) -> dict[str, Path]:
    """Write label_report.json, .txt and .html into a folder; returns their paths by ending."""
    from prefopt.data.records import write_bytes

    folder = Path(folder)
    contents = {
        "json": msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n",
        "txt": report.to_text().encode() + b"\n",
        "html": report.to_html().encode(),
    }
    paths = {ending: folder / f"label_report.{ending}" for ending in contents}
    for ending, content in contents.items():
        write_bytes(paths[ending], content)
    return paths


class _Tally:
    """Counters over judged comparisons; nothing of the comparisons is kept but prompt ids."""

    def __init__(self) -> None:
        self.prompts: set[str] = set()
        self.n = self.n_verdicts = self.tied = self.named = self.first_named = 0
        self.flipped = self.both_decided = self.one_order = 0
        self.longer_named = self.longer_or_shorter = self.same_length = 0
        self.failures: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.grades: Counter[int] = Counter()
        self.both: Counter[tuple[int, int]] = Counter()
        self.categories: dict[str, Counter[str]] = {}

    def add(self, item: JudgedComparison) -> None:
        comparison = item.comparison
        a, b = comparison.a.text, comparison.b.text
        self.n += 1
        self.prompts.add(comparison.prompt.prompt_id)
        lengths = len(a.split()), len(b.split())
        self.same_length += lengths[0] == lengths[1]
        row = self.categories.setdefault(comparison.prompt.category, Counter())
        row["n"] += 1
        row["failed"] += bool(item.failures)
        if a == b:
            return  # nobody was asked
        mean = item.mean_grade
        row["tie"] += mean == 0 and not item.flipped
        both_asked = len({verdict.shown_first for verdict in item.verdicts}) == 2
        for verdict in item.verdicts:
            self._add_verdict(verdict, both_asked)
        if mean and lengths[0] != lengths[1]:
            # A pair, not a verdict: its two orders mostly agree and are no two observations.
            self.longer_or_shorter += 1
            self.longer_named += (lengths[0] > lengths[1]) == (mean > 0)
        forward, backward = item.forward.grade, item.backward.grade if item.backward else None
        if item.backward is None and not item.more:
            self.one_order += 1
        if forward is not None and backward is not None:
            self.both[forward, backward] += 1
            if forward and backward:
                self.both_decided += 1
                self.flipped += (forward > 0) != (backward > 0)
                row["flipped"] += (forward > 0) != (backward > 0)

    def _add_verdict(self, verdict: Verdict, both_asked: bool) -> None:
        self.n_verdicts += 1
        if verdict.failure is not None:
            self.failures[verdict.failure] += 1
            if verdict.failure == "refused":
                found = re.search(r"category: (.{1,60}?)\.?$", verdict.rationale)
                self.refusals[found[1] if found else "none given"] += 1
            return
        grade = verdict.grade or 0
        self.grades[grade if verdict.shown_first == "a" else -grade] += 1
        if grade == 0:
            self.tied += 1
            return
        if both_asked:
            self.named += 1
            self.first_named += verdict.preferred == verdict.shown_first

    def category_rows(self) -> tuple[CategoryRow, ...]:
        if set(self.categories) <= {""}:
            return ()
        return tuple(
            CategoryRow(
                category=name or "(none)",
                n=row["n"],
                n_flipped=row["flipped"],
                n_tie=row["tie"],
                n_failed=row["failed"],
            )
            for name, row in sorted(self.categories.items())
        )


def _ledger_counts(book: Ledger) -> LedgerCounts:
    money = book.money()
    tokens = book.count(
        "SELECT COALESCE(SUM(input_tokens), 0), COALESCE(SUM(output_tokens), 0) FROM attempts"
    )[0]
    answered = book.count(
        "SELECT transport, COUNT(*) FROM attempts WHERE outcome = 'answered' GROUP BY transport"
    )
    others = book.count(
        "SELECT outcome, COUNT(*) FROM attempts WHERE outcome != 'answered' GROUP BY outcome"
    )
    open_batches = book.count(
        "SELECT COUNT(*) FROM batches WHERE state IN ('intended', 'submitted')"
    )
    return LedgerCounts(
        spent_usd=money.spent_usd,
        unknown_usd=money.unknown_usd,
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        answered={str(name): int(n) for name, n in answered},
        other_attempts={str(name): int(n) for name, n in others},
        open_batches=open_batches[0][0],
    )


def _warnings(report: LabelReport) -> list[str]:
    """What a reader should do something about, the gravest first."""
    found = []
    for canary in report.canaries:
        if canary.n_fooled:
            found.append(
                f"The judge fell for the canary '{canary.kind}' in {canary.n_fooled} of "
                f"{canary.n_verdicts - canary.n_failed} verdicts: an answer can win by a trick. Use a "
                "stronger judge, or read the labels of odd-looking answers before training on them."
            )
        elif canary.n_failed == canary.n_verdicts:
            found.append(
                f"All {canary.n_verdicts} verdicts on the canary '{canary.kind}' failed, so it is "
                "not known whether the judge can be fooled that way. Run again with the same ledger."
            )
        elif canary.n_tie:
            found.append(
                f"The judge called the canary '{canary.kind}' as good as a real answer in "
                f"{canary.n_tie} of {canary.n_verdicts - canary.n_failed} verdicts. Read its "
                "rationales, and use a stronger judge if it cannot tell the two apart."
            )
    n_failed = sum(report.failures.values())
    malformed = report.failures.get("malformed", 0)
    if malformed > report.n_verdicts / 2:
        found.append(
            f"{malformed:,} of {report.n_verdicts:,} replies are not in the form that was asked for, "
            "so asking again will hardly help. Use a model that keeps to it, or a server that holds "
            "replies to a JSON schema; judged.jsonl has every reply."
        )
    elif report.n_verdicts and n_failed / report.n_verdicts > 0.02:
        reasons = ", ".join(f"{n} {name}" for name, n in report.failures.items())
        found.append(
            f"{n_failed / report.n_verdicts:.0%} of the verdicts failed ({reasons}). Run again with "
            "the same ledger to ask just for these; if they are refusals, look at their categories."
        )
    if report.flips and report.flips.share > 0.25:
        found.append(
            f"In {report.flips.share:.0%} of the pairs the winner changed with the order: position "
            "decides too much. Use a stronger judge or a clearer rubric, or keep only sure labels "
            "(--rule inferred --min_p 0.9)."
        )
    first = report.first_place
    if first and report.one_order == 0 and (first.low > 0.55 or first.high < 0.45):
        place = "first" if first.low > 0.55 else "second"
        found.append(
            f"The judge leans to the answer shown {place} ({first.share:.0%} first). Both orders were "
            "asked and the labels take it into account, but fewer of them are sure."
        )
    longer = report.longer_wins
    if longer and longer.low > 0.6:
        found.append(
            f"The longer answer wins {longer.share:.0%} of the decided pairs. If length is not "
            "what you want, say so in the rubric, or compare answers of similar length."
        )
    if report.one_order:
        found.append(
            f"{report.one_order:,} pairs were asked about in one order only: a preference for a place "
            "can pass for a preference for an answer. Use both orders."
        )
    if report.n_labels < _FEW:
        found.append(
            f"{report.n_labels} labels are few: every share here is rough, and so is training on them."
        )
    if report.ledger and report.ledger.open_batches:
        found.append(
            f"{report.ledger.open_batches} message batches are still open: `prefopt judge resume` "
            "fetches them."
        )
    return found


def _text(report: LabelReport) -> str:
    lines = [
        f"Labels by {_plain(report.judge)} under the rubric '{report.rubric}' ({report.created_at})",
        "",
        f"{report.n_comparisons:,} comparisons over {report.n_prompts:,} prompts, "
        f"{report.n_verdicts:,} verdicts, {report.n_labels:,} labels",
        "",
        "What became of the comparisons",
    ]
    lines += [
        f"  {name.replace('_', ' '):<18} {n:>9,}  {n / max(report.n_comparisons, 1):6.1%}"
        for name, n in report.outcomes.items()
    ]
    lines += ["", "What the verdicts are like (share, 95 % interval)"]
    shares = {
        "flip with the order": report.flips,
        "first place wins": report.first_place,
        "ties": report.ties,
        "longer answer wins": report.longer_wins,
        "pairs of one length": report.same_length,
    }
    lines += [f"  {name:<22} {share if share else '     -'}" for name, share in shares.items()]
    for name, share in report.position_bias.items():
        lines.append(f"  of two equally good answers {name} names the first in {share:.0%}")
    if report.failures:
        lines += ["", "Failed verdicts"]
        lines += [f"  {name:<18} {n:>9,}" for name, n in report.failures.items()]
        lines += [f"    refused: {_plain(name):<12} {n:>6,}" for name, n in report.refusals.items()]
    if report.canaries:
        lines += ["", "Canaries (verdicts that named the answer made to fool the judge)"]
        lines += [
            f"  {c.kind:<14} {Share.of(c.n_fooled, c.n_verdicts - c.n_failed) or '     -'}; "
            f"{c.n_tie} ties, {c.n_failed} failed"
            for c in report.canaries
        ]
    if report.mean_p_chosen is not None:
        sources = ", ".join(f"{n:,} {name}" for name, n in report.p_sources.items())
        lines += ["", f"p_chosen: {report.mean_p_chosen:.3f} on average ({sources})"]
        most = max(report.p_chosen)
        for i, n in enumerate(report.p_chosen):
            low = 0.5 + i * 0.5 / _P_BINS
            lines.append(f"  {low:.2f} to {low + 0.05:.2f} {n:>8,} {'#' * round(40 * n / most)}")
        if set(report.p_sources) - {"calibrated"}:
            lines.append(f"  {P_CHOSEN_NOTE}")
    if report.categories:
        lines += ["", f"  {'category':<20} {'pairs':>7} {'flipped':>8} {'ties':>6} {'failed':>7}"]
        lines += [
            f"  {_plain(r.category)[:20]:<20} {r.n:>7,} {r.n_flipped:>8,} {r.n_tie:>6,} "
            f"{r.n_failed:>7,}"
            for r in report.categories
        ]
    if report.ledger:
        lines += ["", *_money_lines(report)]
    if report.warnings:
        import textwrap

        lines += ["", "Look at this"]
        for warning in report.warnings:
            lines += textwrap.wrap(warning, 78, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def _plain(name: str) -> str:
    """A name on one line, without characters that move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(name.split()))


def _money_lines(report: LabelReport) -> list[str]:
    counts = report.ledger
    assert counts is not None
    answered = ", ".join(f"{n:,} {name}" for name, n in sorted(counts.answered.items())) or "0"
    lines = [
        f"Paid: ${counts.spent_usd:.4f}"
        + (f", and up to ${counts.unknown_usd:.4f} for lost requests" if counts.unknown_usd else "")
        + (f"; ${counts.spent_usd / report.n_labels:.5f} a label" if report.n_labels else ""),
        f"  answers: {answered}; tokens: {counts.input_tokens:,} in, {counts.output_tokens:,} out",
    ]
    if counts.other_attempts:
        others = ", ".join(f"{n:,} {name}" for name, n in sorted(counts.other_attempts.items()))
        lines.append(f"  other tries: {others}")
    return lines
