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
    ones = np.ones(len(pairs))
    log_loss = label * np.logaddexp(0, -gap) + (1 - label) * np.logaddexp(0, gap)
    found_loss = resample(np.stack([log_loss, ones], axis=1), lambda x: x[..., 0] / x[..., 1])
    sure, right, place = _stated(gap, label)
    off = np.where(place[:, None] == np.arange(_BINS), (sure - right)[:, None], 0.0)
    found_ece = resample(
        np.column_stack([off, ones]), lambda x: np.abs(x[..., :-1]).sum(-1) / x[..., -1]
    )
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
        n_ties=int((label == 0.5).sum()),
        accuracy=_accuracy(gap, label, resample),
        longest_accuracy=_accuracy(length, label, resample),
        log_loss=found_loss,
        ece=found_ece,
        length_correlation=_spearman(gap, length, resample),
        label_length_correlation=_spearman(label - 0.5, length, resample),
        mean_score=float(scores.mean()),
        score_sd=float(scores.std()),
        bins=_reliability(sure, right, place),
        categories=categories,
        notes=(),
    )
    return msgspec.structs.replace(report, notes=tuple(_notes(report)))


class _Bootstrap:
    """A figure of sums over pairs -> the figure with its interval, whole prompts drawn again."""

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        _, place = np.unique(np.array(prompts), return_inverse=True)
        n = int(place.max()) + 1
        self.n, self.distinct = len(prompts), n == len(prompts)
        # How often each prompt is drawn: the same as drawing prompts with replacement.
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
        self._weights = drawn[:, place].astype(np.float64)

    def __call__(self, parts: Floats, figure: Callable[[Floats], Floats]) -> Interval | None:
        """None where the figure is not defined.

        Args:
            parts: (n, F) what each pair adds to the sums.
            figure: (..., F) sums -> (...).
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            value = float(figure(parts.sum(axis=0)))
            values = figure(self._weights @ parts)
        if not np.isfinite(value):
            return None
        low, high = np.quantile(values[np.isfinite(values)], [0.025, 0.975])
        return Interval(value, float(low), float(high), self.n)


def _accuracy(gap: Floats, label: Floats, resample: _Bootstrap) -> Interval | None:
    decided = (label != 0.5).astype(np.float64)
    right = np.where(gap == 0, 0.5, (gap > 0) == (label > 0.5)) * decided
    if resample.distinct:
        return wilson(float(right.sum()), int(decided.sum()))
    return resample(np.stack([right, decided], axis=1), lambda x: x[..., 0] / x[..., 1])


def _spearman(x: Floats, y: Floats, resample: _Bootstrap) -> Interval | None:
    """Over pairs and their mirror images, since which answer is called a means nothing."""
    a, b = _centred_ranks(x), _centred_ranks(y)
    return resample(
        np.stack([a * b, a * a, b * b], axis=1),
        lambda sums: sums[..., 0] / np.sqrt(sums[..., 1] * sums[..., 2]),
    )


def _centred_ranks(x: Floats) -> Floats:
    """The ranks of x among x and -x, their mean taken off; equal values share their mean rank."""
    _, place, counts = np.unique(np.concatenate([x, -x]), return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts + 1) / 2)[place[: len(x)]]
    return ranks - (2 * len(x) - 1) / 2


def _stated(gap: Floats, label: Floats) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """How sure the model is of its choice, whether people agree, and the bin of the former."""
    sure = 1 / (1 + np.exp(-np.minimum(np.abs(gap), 500)))
    # By the gap: near zero its probability rounds to a half on one side before it does on the other.
    right = np.where(gap == 0, 0.5, np.where(gap > 0, label, 1 - label))
    return sure, right, np.minimum(((sure - 0.5) * 2 * _BINS).astype(np.int64), _BINS - 1)


def _reliability(
    sure: Floats, right: Floats, place: NDArray[np.int64]
) -> tuple[ReliabilityBin, ...]:
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
