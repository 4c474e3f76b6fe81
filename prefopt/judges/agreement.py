"""How far a judge agrees with people: figures with intervals, chance taken out.

Pure statistics over verdicts and labels. A failed verdict is not a wrong one and not a tie; it is
counted apart, and the worst case says what it could hide. It asks nobody and fits nothing.

Cohen's kappa: k = (p_o - p_e) / (1 - p_e) (Cohen 1960). Gwet's AC1 replaces p_e by a chance agreement
that skewed labels do not inflate (Gwet 2008). Intervals: Wilson for shares; for kappa a percentile
bootstrap that draws whole prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from prefopt.evaluation.win_rate import wilson_interval
from prefopt.types import JudgedComparison, Winner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CLASSES: tuple[Winner, ...] = ("a", "tie", "b")
FEW_LABELS = 200
_RESAMPLES = 2_000


class Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure with its 95 % interval; `n` is what it was taken over."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}, n {self.n})"


class CategoryAgreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of pairs; `accuracy` is over pairs that both decide, None where there are none."""

    category: str
    n: int
    n_failed: int
    accuracy: Interval | None


class Agreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A judge against people on one set of pairs.

    `accuracy` is over the pairs that people decide, a judge's tie or flip counting one half;
    `accuracy_decided` over those that the judge decides as well. `agreement` is exact, three ways (a,
    tie, b). `worst_case` takes every failed verdict for a wrong one. `confusion[label][verdict]`
    counts answered pairs. `longest_accuracy` is what "the longer answer wins" reaches on these pairs,
    `labels_longer` how often people prefer the longer one. `annotator_agreement` is how often a single
    annotator agrees with the others' majority, where there are several: a ceiling.
    """

    name: str
    n: int
    n_failed: int
    failures: dict[str, int]
    agreement: Interval | None
    accuracy: Interval | None
    accuracy_decided: Interval | None
    worst_case: float
    kappa: Interval | None
    kappa_decided: Interval | None
    ac1: float | None
    confusion: dict[str, dict[str, int]]
    flip_rate: Interval | None
    first_place: Interval | None
    tie_rate: Interval | None
    longer_wins: Interval | None
    labels_longer: Interval | None
    longest_accuracy: Interval | None
    annotator_agreement: Interval | None
    categories: tuple[CategoryAgreement, ...]
    warnings: tuple[str, ...]


def judge_class(item: JudgedComparison) -> Winner | None:
    """What the judge says over all verdicts: the sign of the mean grade; None where one failed."""
    grade = item.mean_grade
    if grade is None:
        return None
    return "tie" if grade == 0 else "a" if grade > 0 else "b"


def wilson(k: float, n: int) -> Interval | None:
    """A share with its Wilson interval; k may hold halves. None for n = 0."""
    if n == 0:
        return None
    low, high = wilson_interval(k / n, n)
    return Interval(k / n, low, high, n)


def cohen_kappa(table: NDArray[np.float64]) -> np.float64 | NDArray[np.float64]:
    """Cohen's kappa of a square table of counts, NaN where one class is all there is.

    (..., C, C) gives one kappa for each table.
    """
    import numpy as np

    total = table.sum(axis=(-1, -2))
    observed = np.trace(table, axis1=-2, axis2=-1) / total
    chance = (table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1) / total**2
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.float64 | NDArray[np.float64] = (observed - chance) / (1 - chance)
    return found


def gwet_ac1(table: NDArray[np.float64]) -> float | None:
    """Gwet's AC1 of a square table of counts; None for an empty table."""
    import numpy as np

    total = table.sum()
    if total == 0:
        return None
    share = (table.sum(axis=0) + table.sum(axis=1)) / (2 * total)
    chance = float((share * (1 - share)).sum() / (len(table) - 1))
    observed = float(np.trace(table) / total)
    return (observed - chance) / (1 - chance) if chance < 1 else None


def measure_agreement(
    judged: Sequence[JudgedComparison],
    labels: Sequence[Winner],
    *,
    name: str = "",
    annotators: Sequence[Sequence[Winner]] = (),
    seed: int = 0,
) -> Agreement:
    """Compare a judge's verdicts with people's labels.

    Args:
        judged: comparisons with verdicts.
        labels: one a comparison, in its names a and b.
        name: of the data set, for the report.
        annotators: single labels a comparison, where there are several people.
        seed: of the bootstrap.

    Raises:
        ValueError: not one label a comparison, or none at all.
    """
    import numpy as np

    if len(judged) != len(labels) or not judged:
        raise ValueError(
            f"expected one label for each of the comparisons, got {len(labels)} for {len(judged)}."
        )
    said = [judge_class(item) for item in judged]
    rows = [
        (CLASSES.index(label), CLASSES.index(verdict), item)
        for item, label, verdict in zip(judged, labels, said, strict=True)
        if verdict is not None
    ]
    table = np.zeros((3, 3))
    for label, verdict, _ in rows:
        table[label, verdict] += 1
    decided = table[np.ix_([0, 2], [0, 2])]
    halves = decided[0, 0] + decided[1, 1] + 0.5 * (table[0, 1] + table[2, 1])
    n_decided_by_people = int(table[[0, 2]].sum())
    kappa, kappa_decided = _kappas(rows, seed)
    lengths = [(len(j.comparison.a.text.split()), len(j.comparison.b.text.split())) for j in judged]
    longer = ["a" if a > b else "b" if b > a else "tie" for a, b in lengths]
    by_length = [(w, label) for w, label in zip(longer, labels, strict=True) if label != "tie"]
    unequal = [(w, label) for w, label in by_length if w != "tie"]
    verdicts = [
        (v, side)
        for item, side in zip(judged, longer, strict=True)
        for v in item.verdicts
        if v.failure is None
    ]
    named = [(v, side) for v, side in verdicts if v.preferred != "tie"]
    both = [j for j in judged if j.backward is not None and not j.failures]
    named_both = [v for j in both for v in j.verdicts if v.preferred != "tie"]
    failures = Counter(f for j in judged for f in j.failures)
    n_failed = len(judged) - len(rows)
    right = float(np.trace(table))
    report = Agreement(
        name=name,
        n=len(judged),
        n_failed=n_failed,
        failures=dict(failures.most_common()),
        agreement=wilson(right, len(rows)),
        accuracy=wilson(float(halves), n_decided_by_people),
        accuracy_decided=wilson(float(np.trace(decided)), int(decided.sum())),
        worst_case=right / len(judged),
        kappa=kappa,
        kappa_decided=kappa_decided,
        ac1=gwet_ac1(table),
        confusion={
            label: {said: int(table[i, j]) for j, said in enumerate(CLASSES)}
            for i, label in enumerate(CLASSES)
        },
        flip_rate=wilson(sum(j.flipped for j in both), len(both)),
        first_place=wilson(sum(v.preferred == v.shown_first for v in named_both), len(named_both)),
        tie_rate=wilson(sum(v.preferred == "tie" for v, _ in verdicts), len(verdicts)),
        longer_wins=wilson(
            sum(v.preferred == side for v, side in named if side != "tie"),
            sum(side != "tie" for _, side in named),
        ),
        labels_longer=wilson(sum(w == label for w, label in unequal), len(unequal)),
        longest_accuracy=wilson(
            sum(1.0 if w == label else 0.5 * (w == "tie") for w, label in by_length),
            len(by_length),
        ),
        annotator_agreement=_ceiling(annotators),
        categories=_categories(judged, labels, said),
        warnings=(),
    )
    return msgspec.structs.replace(report, warnings=tuple(_warnings(report)))


def _kappas(
    rows: Sequence[tuple[int, int, JudgedComparison]], seed: int
) -> tuple[Interval | None, Interval | None]:
    """Kappa over all answered pairs and over those both decide, whole prompts drawn again."""
    import numpy as np

    prompts: dict[str, int] = {}
    for _, _, item in rows:
        prompts.setdefault(item.comparison.prompt.prompt_id, len(prompts))
    tables = np.zeros((len(prompts), 3, 3))
    for label, verdict, item in rows:
        tables[prompts[item.comparison.prompt.prompt_id], label, verdict] += 1
    rng = np.random.default_rng(seed)
    found: list[Interval | None] = []
    for classes in ([0, 1, 2], [0, 2]):
        part = tables[:, classes][:, :, classes]
        whole = part.sum(axis=0)
        if whole.sum() == 0 or not np.isfinite(value := float(cohen_kappa(whole))):
            found.append(None)
            continue
        # Counts of how often each prompt is drawn: the same as drawing prompts with replacement.
        weights = rng.multinomial(len(part), np.full(len(part), 1 / len(part)), size=_RESAMPLES)
        drawn = np.einsum("rp,pij->rij", weights, part)
        drawn = drawn[drawn.sum(axis=(1, 2)) > 0]
        values = np.asarray(cohen_kappa(drawn))
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
        found.append(Interval(value, float(low), float(high), int(whole.sum())))
    return found[0], found[1]


def _ceiling(annotators: Sequence[Sequence[Winner]]) -> Interval | None:
    agreed = asked = 0
    for given in annotators:
        if len(given) < 3:
            continue
        for i, one in enumerate(given):
            others = Counter(given[:i]) + Counter(given[i + 1 :])
            (most, count), *rest = others.most_common()
            if rest and rest[0][1] == count:
                continue  # the others do not agree on anything
            asked += 1
            agreed += one == most
    return wilson(agreed, asked)


def _categories(
    judged: Sequence[JudgedComparison],
    labels: Sequence[Winner],
    said: Sequence[Winner | None],
) -> tuple[CategoryAgreement, ...]:
    groups: dict[str, list[tuple[Winner, Winner | None]]] = {}
    for item, label, verdict in zip(judged, labels, said, strict=True):
        groups.setdefault(item.comparison.prompt.category, []).append((label, verdict))
    if set(groups) <= {""}:
        return ()
    return tuple(
        CategoryAgreement(
            category=category or "(none)",
            n=len(rows),
            n_failed=sum(verdict is None for _, verdict in rows),
            accuracy=wilson(
                sum(label == v for label, v in rows if "tie" not in (label, v) and v is not None),
                sum("tie" not in (label, v) and v is not None for label, v in rows),
            ),
        )
        for category, rows in sorted(groups.items())
    )


def _warnings(report: Agreement) -> list[str]:
    found = []
    if report.n < FEW_LABELS:
        found.append(
            f"{report.n} labels are few: at {FEW_LABELS} an agreement of 80 % is known to about 5.5 "
            "points either way. Label more before relying on this."
        )
    if report.n_failed / report.n > 0.02:
        found.append(
            f"{report.n_failed} of {report.n} pairs have a failed verdict; if all were wrong, exact "
            f"agreement would be {report.worst_case:.3f}."
        )
    if report.kappa_decided and report.kappa_decided.low <= 0:
        found.append(
            "The interval of kappa reaches 0: on these pairs the judge is not shown to be better than "
            "chance. Do not train on its labels."
        )
    if (
        report.accuracy
        and report.longest_accuracy
        and report.accuracy.value <= report.longest_accuracy.value
    ):
        found.append(
            f"'The longer answer wins' does as well or better ({report.longest_accuracy.value:.3f} "
            f"against {report.accuracy.value:.3f})."
        )
    return found
