"""How one judge grades: an ordered logit with a position bias and, perhaps, an error it repeats.

The probability of a judge's verdicts on one pair is a function of one number, the gap q_x - q_y. It
is held on the fixed grid `GAP`. See `prefopt.label_model` for the equations. This module knows one
judge and one pair at a time.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GRADES = (-2, -1, 0, 1, 2)
"""Grades in favour of the answer shown first, in the order of a table's columns."""

GAP_VARIANCE = 2.0
"""Prior variance of q_x - q_y: the unit of quality is one standard deviation of a prompt's answers."""

# Grid of gaps q_x - q_y: 5 prior standard deviations either side. The sum over it is exact to about
# 1e-4 for posteriors no narrower than one step.
GAP = np.linspace(-7.0, 7.0, 141)
STEP = float(GAP[1] - GAP[0])
LOG_PRIOR = -0.5 * GAP**2 / GAP_VARIANCE - 0.5 * np.log(2 * np.pi * GAP_VARIANCE)
# Weights of the share of gaps > 0: the trapezium rule with its first end correction at the node 0.
ABOVE_ZERO = np.where(GAP > 1e-9, 1.0, np.where(GAP < -1e-9, 0.0, 0.5))
ABOVE_ZERO[[69, 71]] += -1 / 24, 1 / 24
PRIOR_WEIGHT = np.exp(LOG_PRIOR) * STEP

_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(11)
_LOG_NODE_WEIGHTS = np.log(_NODE_WEIGHTS / _NODE_WEIGHTS.sum())


class JudgeParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One judge. All are in logits except `reliability`, which is in (0, 1].

    `slope` is per standard deviation of quality; `tie` and `strong` are the thresholds between a tie
    and "better", and between "better" and "much better". A `..._se` is the posterior standard error,
    None for a parameter that was not fitted. `n_verdicts` is 0 for a prior.
    """

    slope: float
    position_bias: float
    tie: float
    strong: float
    reliability: float = 1.0
    slope_se: float | None = None
    position_bias_se: float | None = None
    tie_se: float | None = None
    strong_se: float | None = None
    reliability_se: float | None = None
    n_verdicts: int = 0

    def __post_init__(self) -> None:
        if not (self.slope > 0 and 0 < self.tie < self.strong and 0 < self.reliability <= 1):
            raise ValueError(
                "a judge needs slope > 0, 0 < tie < strong and 0 < reliability <= 1, got "
                f"slope={self.slope}, tie={self.tie}, strong={self.strong}, "
                f"reliability={self.reliability}."
            )

    @property
    def first_share_of_equals(self) -> float:
        """Of two equally good answers, how often the first is named among verdicts that name one."""
        first = float(expit(self.position_bias - self.tie))
        second = float(expit(-self.position_bias - self.tie))
        return first / (first + second)


def log_grade_probabilities(judge: JudgeParameters, opinion: Floats) -> Floats:
    """log P(grade | opinion u of the answer shown first), shape (..., 5) in the order of GRADES."""
    m = judge.slope * np.asarray(opinion) + judge.position_bias
    return np.stack([_log_p(grade, m, judge.tie, judge.strong) for grade in GRADES], axis=-1)


def log_state_likelihood(judge: JudgeParameters, counts: Ints) -> Floats:
    """log P(a judge's verdicts on one pair | gap) for each state, shape (states, gaps of GAP).

    `counts` is (states, 2 orders, 5 grades): how often each grade was given. In order 0 the gap's
    first answer is shown first; grades favour the answer shown first.
    """
    return state_likelihood_by_node(judge, counts)[0]


def _log_p(grade: int, m: Floats, tie: float, strong: float) -> Floats:
    """log P(grade | latent m), from expit(a) - expit(b) = expit(a) expit(-b) (1 - exp(b - a))."""
    if grade < 0:
        return _log_p(-grade, -m, tie, strong)
    if grade == 0:
        inside = np.log(-np.expm1(-2 * tie))
        return np.asarray(inside - np.logaddexp(0, m - tie) - np.logaddexp(0, -m - tie))
    if grade == 1:
        inside = np.log(-np.expm1(tie - strong))
        return np.asarray(inside - np.logaddexp(0, tie - m) - np.logaddexp(0, m - strong))
    return np.asarray(-np.logaddexp(0, strong - m))


def state_likelihood_by_node(judge: JudgeParameters, counts: Ints) -> tuple[Floats, Floats]:
    """The log-likelihood of each state, and how much each error node weighs in it."""
    rows = log_rows(judge)
    summed = counts.reshape(len(counts), 10).astype(np.float64) @ rows.reshape(10, -1)
    summed = summed.reshape(len(counts), *rows.shape[1:])
    if judge.reliability >= 1.0:
        return summed[..., 0], np.ones_like(summed)
    summed += _LOG_NODE_WEIGHTS
    top = summed.max(axis=-1, initial=-np.inf, keepdims=True)
    weight = np.exp(summed - top)
    total = weight.sum(axis=-1, keepdims=True)
    return (top + np.log(total))[..., 0], weight / total


def log_rows(judge: JudgeParameters) -> Floats:
    """log P(grade | gap, error) for 2 orders x 5 grades, shape (10, gaps, error nodes)."""
    gap, r = GAP[:, None], judge.reliability
    opinion = np.sqrt(r) * gap + np.sqrt(GAP_VARIANCE * (1 - r)) * _NODES if r < 1.0 else gap
    both = np.stack([opinion, -opinion])
    rows = log_grade_probabilities(judge, both).transpose(0, 3, 1, 2)
    return rows.reshape(10, *opinion.shape)
