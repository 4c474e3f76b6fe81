"""How good a reward model is on labelled pairs: figures with intervals, and what they are worth.

Pure statistics over scores; no model. Accuracy is over pairs that people decide, equal scores
counting one half. Calibration is of p = s(score difference) against the labels; pairs and their
mirror images are the same. Intervals: Wilson where every pair has its own prompt, and else, as for
the other figures, a percentile bootstrap that draws whole prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from prefopt.judges.agreement import Interval, wilson
from prefopt.judges.calibration import expected_calibration_error

Floats = NDArray[np.float64]
_RESAMPLES = 1_000
_BINS = 10
FEW_PAIRS = 200


class ScoredPair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two scored answers; `p_a` is the label: 1 people prefer a, 0 they prefer b, 0.5 a tie."""

    prompt_id: str
    category: str
    score_a: float
    score_b: float
    n_tokens_a: int
    n_tokens_b: int
    p_a: float


class ReliabilityBin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pairs whose stated probability of being right lies in [low, high)."""

    low: float
    high: float
    n: int
    stated: float
    right: float


class RewardReport(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.reward_report/1",
):
    """A reward model on one set of labelled pairs.

    `accuracy` is over decided pairs. `log_loss` is of p = s(score difference), ln 2 being what no
    model at all has; `ece` its expected calibration error. `length_correlation` is Spearman's between
    the differences of scores and of lengths within pairs, `label_length_correlation` the same of
    labels: the first far above the second is a model that pays for length. `longest_accuracy` is what
    "the longer answer wins" reaches. `mean_score` and `score_sd` are over all answers.
    """

    name: str
    n: int
    n_ties: int
    accuracy: Interval | None
    longest_accuracy: Interval | None
    log_loss: Interval
    ece: Interval
    length_correlation: Interval | None
    label_length_correlation: Interval | None
    mean_score: float
    score_sd: float
    bins: tuple[ReliabilityBin, ...]
    categories: dict[str, Interval]
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """A few lines for the terminal."""

        def show(value: Interval | None) -> str:
            return (
                "–" if value is None else f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
            )

        lines = [
            f"{self.name}: {self.n} pairs, {self.n_ties} ties",
            f"  accuracy            {show(self.accuracy)}",
            f"  longer answer wins  {show(self.longest_accuracy)}",
            f"  log loss            {show(self.log_loss)}",
            f"  calibration error   {show(self.ece)}",
            f"  length correlation  {show(self.length_correlation)}, of the labels "
            f"{show(self.label_length_correlation)}",
            f"  scores              mean {self.mean_score:.3f}, sd {self.score_sd:.3f}",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def measure_reward(pairs: Sequence[ScoredPair], *, name: str = "", seed: int = 0) -> RewardReport:
    """Hold scores against labels.

    Args:
        pairs: scored answers with their labels.
        name: of the data set.
        seed: of the bootstrap.

    Raises:
        ValueError: there are no pairs, or a score is not finite.
    """
    if not pairs:
        raise ValueError("a reward model is measured on labelled pairs, got none.")
    gap = np.array([p.score_a - p.score_b for p in pairs])
    if not np.isfinite(gap).all():
        raise ValueError("every score must be a finite number.")
    label = np.array([p.p_a for p in pairs])
    length = np.array([p.n_tokens_a - p.n_tokens_b for p in pairs], dtype=np.float64)
    prompts = [p.prompt_id for p in pairs]
    resample = _Bootstrap(prompts, seed)
    decided = label != 0.5
    accuracy = _accuracy(gap, label, resample)
    longest = _accuracy(length, label, resample)
    p = 1 / (1 + np.exp(-np.clip(gap, -500, 500)))

    def log_loss(rows: NDArray[np.int64]) -> float:
        g, y = gap[rows], label[rows]
        return float((y * np.logaddexp(0, -g) + (1 - y) * np.logaddexp(0, g)).mean())

    found_loss = resample(log_loss)
    found_ece = resample(lambda rows: expected_calibration_error(p[rows], label[rows]))
    assert found_loss is not None
    assert found_ece is not None
    scores = np.array([[p.score_a, p.score_b] for p in pairs])
    categories = {}
    for category in sorted({p.category for p in pairs} - {""}):
        rows = np.array([i for i, pair in enumerate(pairs) if pair.category == category])
        part = _accuracy(gap[rows], label[rows], _Bootstrap([prompts[i] for i in rows], seed))
        if part is not None:
            categories[category] = part
    report = RewardReport(
        name=name,
        n=len(pairs),
        n_ties=int((~decided).sum()),
        accuracy=accuracy,
        longest_accuracy=longest,
        log_loss=found_loss,
        ece=found_ece,
        length_correlation=resample(lambda rows: _spearman(gap[rows], length[rows])),
        label_length_correlation=resample(lambda rows: _spearman(label[rows], length[rows])),
        mean_score=float(scores.mean()),
        score_sd=float(scores.std()),
        bins=_reliability(p, label),
        categories=categories,
        notes=(),
    )
    return msgspec.structs.replace(report, notes=tuple(_notes(report)))


class _Bootstrap:
    """A figure of chosen rows -> the figure over all rows, with its interval over prompts."""

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        places: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            places.setdefault(prompt, []).append(i)
        self.n, self.distinct = len(prompts), len(places) == len(prompts)
        groups = [np.array(rows) for rows in places.values()]
        rng = np.random.default_rng(seed)
        self._draws = [
            np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
            for _ in range(_RESAMPLES)
        ]

    def __call__(self, figure: Callable[[NDArray[np.int64]], float]) -> Interval | None:
        """None where the figure is not defined on all rows."""
        value = figure(np.arange(self.n))
        if not np.isfinite(value):
            return None
        values = np.array([figure(rows) for rows in self._draws])
        low, high = np.quantile(values[np.isfinite(values)], [0.025, 0.975])
        return Interval(value, float(low), float(high), self.n)


def _accuracy(gap: Floats, label: Floats, resample: _Bootstrap) -> Interval | None:
    decided = label != 0.5
    right = np.where(gap == 0, 0.5, (gap > 0) == (label > 0.5))
    if resample.distinct:
        return wilson(float(right[decided].sum()), int(decided.sum()))

    def share(rows: NDArray[np.int64]) -> float:
        kept = rows[decided[rows]]
        return float(right[kept].mean()) if len(kept) else float("nan")

    return resample(share)


def _spearman(x: Floats, y: Floats) -> float:
    """Over pairs and their mirror images, since which answer is called a means nothing."""
    x, y = np.concatenate([x, -x]), np.concatenate([y, -y])
    if (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(x: Floats) -> Floats:
    """Ranks from 0, equal values sharing their mean rank."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts + 1) / 2)[place]
    return ranks


def _reliability(p: Floats, label: Floats) -> tuple[ReliabilityBin, ...]:
    sure, right = np.maximum(p, 1 - p), np.where(p >= 0.5, label, 1 - label)
    place = np.minimum(((sure - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    return tuple(
        ReliabilityBin(
            low=0.5 + i / (2 * _BINS),
            high=0.5 + (i + 1) / (2 * _BINS),
            n=int((place == i).sum()),
            stated=float(sure[place == i].mean()),
            right=float(right[place == i].mean()),
        )
        for i in range(_BINS)
        if (place == i).any()
    )


def _notes(report: RewardReport) -> list[str]:
    notes = []
    if report.n < FEW_PAIRS:
        notes.append(f"{report.n} pairs are few: the intervals are wide.")
    if report.accuracy is not None and report.accuracy.low <= 0.5:
        notes.append("Not shown to be better than a coin; do not optimise against it.")
    elif (
        report.accuracy is not None
        and report.longest_accuracy is not None
        and report.longest_accuracy.value >= report.accuracy.value
    ):
        notes.append("'The longer answer wins' does as well or better.")
    if report.log_loss.value > float(np.log(2)):
        notes.append(
            "Its probabilities are worse than one half throughout: it is too sure. Fewer epochs, or a "
            "lower learning rate."
        )
    own, labels = report.length_correlation, report.label_length_correlation
    if own is not None and abs(own.value) > 0.3 + abs(labels.value if labels else 0.0):
        direction = "longer" if own.value > 0 else "shorter"
        notes.append(f"It pays for {direction} answers well beyond what the labels do.")
    return notes
