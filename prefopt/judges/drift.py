"""Whether a judge changed while it was asked: another model behind its name, or other habits.

In: a ledger, in the order in which its verdicts came. Out: findings in plain words. A service may put
another model behind a name, and a server may be restarted with other settings, in the middle of a job
whose verdicts are then of two kinds. It compares nothing with people and knows no wording.
"""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Sequence

import msgspec

from prefopt.judges.ledger import Ledger
from prefopt.types import Winner

_PLACES = 19
_LEAST = 20
"""Verdicts on either side of a change, below which nothing is said."""

_P, _DIFFERENCE = 1e-3, 0.1


class _Said(msgspec.Struct, frozen=True):
    preferred: Winner | None = None
    shown_first: Winner = "a"
    strength: int = 0


def drift_findings(book: Ledger, *, one_kind: bool = True) -> tuple[str, ...]:
    """What changed about each judge of a ledger over time; empty where nothing did.

    Args:
        book: the verdicts.
        one_kind: whether its pairs are of one kind from first to last. Where they are not, as when a
            tuned model's answers come after the base model's, only habits are looked at that do not
            hang on what is compared.

    Habits are the share of decided verdicts that name the answer shown first, of verdicts that are
    ties, and of decided ones that are strong. Each is tried for a change at 19 places in time by a
    chi-squared test of the verdicts before against those after; a finding has p < 0.001 over all of
    these tests together and a difference of 10 points or more. Both orders of a pair are asked close
    to each other, so the first share does not hang on what the pairs are like; the others may, where
    a data set is sorted.
    """
    return (*_models(book), *itertools.chain.from_iterable(_habits(book, one_kind)))


def _models(book: Ledger) -> list[str]:
    rows = book.count(
        "SELECT v.judge, a.model, COUNT(*), MIN(a.id), MIN(a.ended_at) FROM attempts a "
        "JOIN verdicts v ON v.key = a.key AND v.failure IS NULL "
        "WHERE a.outcome = 'answered' AND a.model IS NOT NULL GROUP BY v.judge, a.model "
        "ORDER BY v.judge, MIN(a.id)"
    )
    found = []
    for judge, group in itertools.groupby(rows, key=lambda row: row[0]):
        models = list(group)
        if len(models) < 2:
            continue
        listed = ", then ".join(
            f"{_plain(model)} ({n:,} verdicts, the first at {_time(at)})"
            for _, model, n, _, at in models
        )
        found.append(
            f"Behind {_plain(judge)} not always the same model answered: {listed}. Their verdicts are "
            "not of one kind. Name a dated model, and ask anew with an empty ledger, or compare both "
            "parts before training on them."
        )
    return found


def _habits(book: Ledger, one_kind: bool) -> list[list[str]]:
    rows = book.count(
        "SELECT judge, verdict, recorded_at FROM verdicts WHERE failure IS NULL ORDER BY judge, id"
    )
    decoder = msgspec.json.Decoder(_Said)
    found = []
    for judge, group in itertools.groupby(rows, key=lambda row: row[0]):
        said = [(decoder.decode(text), at) for _, text, at in group]
        decided = [(s, at) for s, at in said if s.preferred in ("a", "b")]
        times, all_times = [at for _, at in decided], [at for _, at in said]
        habits: list[tuple[str, list[bool], list[float]]] = [
            (
                "name the answer shown first",
                [s.preferred == s.shown_first for s, _ in decided],
                times,
            )
        ]
        if one_kind:
            habits += [
                ("are ties", [s.preferred == "tie" for s, _ in said], all_times),
                ("say much better", [s.strength == 2 for s, _ in decided], times),
            ]
        lines = []
        for words, values, at in habits:
            place = change_point(values, n_tests=len(habits))
            if place is None:
                continue
            before, after = values[:place], values[place:]
            lines.append(
                f"{_plain(judge)} changed while it was asked: {sum(before) / len(before):.0%} of its "
                f"first {place:,} verdicts {words}, and {sum(after) / len(after):.0%} of the "
                f"{len(after):,} since {_time(at[place])}. Verdicts from then on are of another kind: "
                "look whether the service, its model or the order of the data changed, and leave one "
                "part out or ask it anew with an empty ledger."
            )
        found.append(lines)
    return found


def change_point(values: Sequence[bool], *, n_tests: int = 1) -> int | None:
    """Where the share of true values changes most, if it surely does; None where it need not have.

    Args:
        values: in the order of time.
        n_tests: how many such series are looked at together.
    """
    n, total = len(values), sum(values)
    sums = [0, *itertools.accumulate(values)]
    places = {round(n * i / (_PLACES + 1)) for i in range(1, _PLACES + 1)}
    best, at = 0.0, None
    for place in sorted(p for p in places if _LEAST <= p <= n - _LEAST):
        before, after = sums[place] / place, (total - sums[place]) / (n - place)
        pooled = total / n
        if abs(before - after) < _DIFFERENCE:
            continue
        variance = pooled * (1 - pooled) * (1 / place + 1 / (n - place))
        # With Yates' correction: few verdicts make no finding.
        gap = max(abs(before - after) - 0.5 * (1 / place + 1 / (n - place)), 0.0)
        if gap * gap / variance > best:
            best, at = gap * gap / variance, place
    p = math.erfc(math.sqrt(best / 2)) * _PLACES * n_tests  # Bonferroni over all that was tried
    return at if p < _P else None


def _time(at: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):  # a clock that was far off
        return "an unknown time"


def _plain(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(name).split()))[:100]
