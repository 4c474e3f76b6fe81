"""Verdicts of biased, noisy judges -> the probability that one answer is better than another.

Answer i of a prompt has an unknown quality q_i ~ N(0, 1). A judge that is shown x first and y second
grades the first answer's favour as -2 .. 2 by an ordered logit with an order effect:

    u = sqrt(r) (q_x - q_y) + sqrt(2 (1 - r)) e,   e ~ N(0, 1) once per judge and pair    (opinion)
    P(grade >= c) = expit(slope * u + position_bias - t_c),   t = (-strong, -tie, tie, strong)

`slope`, `position_bias`, `tie` and `strong` are fitted for each judge by marginal likelihood over
all verdicts of a run, with weak priors. `r`, the reliability, is the squared correlation of a judge's
settled opinion with quality. Prompts with one compared pair are integrated on a grid; prompts with
more use expectation propagation, whose factors are one-dimensional here.

Sources: Agresti (1992), ordinal paired comparisons; Davidson and Beaver (1977), order effects;
Liusie et al. (2405.05894), products of pairwise experts; Minka (2001) and Rasmussen and Williams
(2006, sec. 3.6), expectation propagation. The reliability term is a one-factor model.

What the verdicts cannot show, whatever their number:
  * With one verdict a pair the slope rests mostly on its prior; verdicts of both orders, on some
    pairs at least, show how far a judge repeats itself.
  * When the first place was not drawn at random, position bias and "the answers of this source are
    better" are the same thing.
  * An error that a judge makes each time it sees a pair looks like an opinion. With one judge the
    result is about what this judge would say on average (r = 1). Two judges show only the product
    of their reliabilities, which the prior then shares out; three judges, or people, separate them.

This module knows nothing of texts, prompts, files or prices. A failed verdict is not an observation
and must not be passed as a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit, logit, ndtr

from prefopt.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GRADES = (-2, -1, 0, 1, 2)
"""Grades in favour of the answer shown first, in the order of a table's columns."""

GAP_VARIANCE = 2.0
"""Prior variance of q_x - q_y: the unit of quality is one standard deviation of a prompt's answers."""

# Grid of gaps q_x - q_y: 5 prior standard deviations either side. The sum over it is exact to about
# 1e-4 for posteriors no narrower than one step.
GAP = np.linspace(-7.0, 7.0, 141)
_STEP = float(GAP[1] - GAP[0])
_LOG_PRIOR = -0.5 * GAP**2 / GAP_VARIANCE - 0.5 * np.log(2 * np.pi * GAP_VARIANCE)
# Weights of the share of gaps > 0: the trapezium rule with its first end correction at the node 0.
ABOVE_ZERO = np.where(GAP > 1e-9, 1.0, np.where(GAP < -1e-9, 0.0, 0.5))
ABOVE_ZERO[[69, 71]] += -1 / 24, 1 / 24
PRIOR_WEIGHT = np.exp(_LOG_PRIOR) * _STEP

_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(11)
_LOG_NODE_WEIGHTS = np.log(_NODE_WEIGHTS / _NODE_WEIGHTS.sum())

# Priors of the transformed parameters: log slope, bias, log tie, log(strong - tie), logit r.
# The means describe a middling judge; two standard deviations reach from useless to near perfect.
_PRIOR_MEAN = np.array([np.log(1.5), 0.0, np.log(0.5), np.log(1.5), 1.5])
_PRIOR_SD = np.array([0.7, 1.0, 0.8, 0.7, 1.5])
_LOW = np.array([-4.0, -8.0, -6.0, -4.0, -4.0])
_HIGH = np.array([3.0, 8.0, 3.0, 3.0, 6.0])
_N_PARAMETERS = 5
_CERTAIN = 1e-12  # no posterior is closer to 0 or 1 than this
_CHUNK = 2_000_000  # grid values held at once by expectation propagation


class Observations(msgspec.Struct, frozen=True, eq=False):
    """Verdicts as columns of equal length; build them with `observe`, which checks them.

    `prompt`, `first`, `second` and `judge` are integers without further meaning: `first` and `second`
    tell the answers of one prompt apart, judges are numbered from 0. `grade` is in -2 .. 2 and
    favours the answer shown first when positive.
    """

    prompt: Ints
    first: Ints
    second: Ints
    judge: Ints
    grade: Ints

    def __len__(self) -> int:
        return len(self.prompt)


class JudgeParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One judge. All are in logits except `reliability`, which is in (0, 1].

    `slope` is per standard deviation of quality; `tie` and `strong` are the thresholds between a tie
    and "better", and between "better" and "much better". A `..._se` is the posterior standard error,
    NaN for a parameter that was not fitted. `n_verdicts` is 0 for a prior.
    """

    slope: float
    position_bias: float
    tie: float
    strong: float
    reliability: float = 1.0
    slope_se: float = float("nan")
    position_bias_se: float = float("nan")
    tie_se: float = float("nan")
    strong_se: float = float("nan")
    reliability_se: float = float("nan")
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


class PairPosterior(msgspec.Struct, frozen=True, eq=False):
    """For each requested pair (i, j): P(q_i > q_j | verdicts), and the mean and sd of q_i - q_j."""

    p: Floats
    mean: Floats
    sd: Floats


class LabelModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Judges and how they grade. `fit_label_model` makes one; `prior_label_model` needs no data.

    `log_likelihood` is the marginal log-likelihood of the verdicts at the fitted parameters.
    """

    judges: tuple[JudgeParameters, ...]
    log_likelihood: float = 0.0
    n_verdicts: int = 0
    n_prompts: int = 0
    converged: bool = True

    def p_prefer(self, observations: Observations, pairs: ArrayLike) -> PairPosterior:
        """Work out the wanted pairs from all verdicts of their prompts.

        Args:
            observations: every verdict that there is about these prompts.
            pairs: rows (prompt, i, j). Pairs that nobody was asked about are answered through the
                other answers of their prompt; with no verdict at all p is 0.5.

        Returns:
            PairPosterior in the order of `pairs`. (j, i) gives exactly 1 - p, whatever the names of
            the answers of a two-answer prompt, and the order of the rows changes nothing.

        Raises:
            DataError: an observation names a judge that the model does not have.
            ValueError: `pairs` is not an (n, 3) array of integers, or a row has i == j.
        """
        wanted = np.asarray(pairs, dtype=np.int64)
        if wanted.size == 0:
            wanted = wanted.reshape(0, 3)
        if wanted.ndim != 2 or wanted.shape[1] != 3 or bool((wanted[:, 1] == wanted[:, 2]).any()):
            raise ValueError(
                "pairs must be rows (prompt, i, j) with i != j, got an array of shape "
                f"{wanted.shape}{' with equal answers' if wanted.ndim == 2 else ''}."
            )
        return _p_prefer(self, observations, wanted)


class Beliefs(msgspec.Struct, frozen=True, eq=False):
    """Joint normal beliefs about the qualities: `mean` is (prompts, K), `cov` (prompts, K, K)."""

    mean: Floats
    cov: Floats


def observe(
    prompt: ArrayLike, first: ArrayLike, second: ArrayLike, judge: ArrayLike, grade: ArrayLike
) -> Observations:
    """Check columns of verdicts and hold them together.

    Args:
        prompt: integer names of prompts.
        first: the answer shown first; any integer that names it within its prompt.
        second: the answer shown second.
        judge: judge numbers from 0.
        grade: integers in -2 .. 2, in favour of the answer shown first.

    Raises:
        DataError: columns of different lengths, values that are not whole numbers, an answer compared
            with itself, a negative judge, or a grade out of range; all at once.
    """
    raw = {"prompt": prompt, "first": first, "second": second, "judge": judge, "grade": grade}
    columns, problems = {}, []
    for name, values in raw.items():
        column = np.asarray(values)
        if column.size == 0:
            column = np.zeros(0, dtype=np.int64)
        if column.ndim != 1 or column.dtype.kind not in "iuf":
            problems.append(f"{name}: expected a list of whole numbers, got {column.dtype} values")
        elif column.dtype.kind == "f" and not bool((column == np.round(column)).all()):
            problems.append(f"{name}: expected whole numbers, got some that are not (a failed verdict?)")
        else:
            columns[name] = column.astype(np.int64)
    if not problems and len({len(column) for column in columns.values()}) != 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        problems.append(f"expected columns of equal length, got {lengths}")
    if not problems:
        c = columns
        checks = {
            "an answer is compared with itself": c["first"] == c["second"],
            "the grade is not in -2 .. 2": np.abs(c["grade"]) > 2,
            "the judge's number is negative": c["judge"] < 0,
        }
        for what, bad in checks.items():
            problems += [f"row {row}: {what}" for row in np.flatnonzero(bad)[:1000]]
    if problems:
        raise DataError("These verdicts cannot be used. Leave failed verdicts out.", problems)
    return Observations(**columns)


def grade_from_p_first(p_first: ArrayLike) -> Ints:
    """Grades for a judge that gives P(first is better), such as a model's token probability.

    The cuts are 0.1, 0.4, 0.6 and 0.9. They need not be right: the fitted thresholds say what each
    grade of this judge means. What is lost is the difference between probabilities of one grade.

    Raises:
        ValueError: a value outside [0, 1], or NaN.
    """
    p = np.asarray(p_first, dtype=np.float64)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("p_first must be probabilities in [0, 1]; leave missing ones out.")
    strength = (np.abs(p - 0.5) > 0.1).astype(np.int64) + (np.abs(p - 0.5) > 0.4)
    return np.asarray(np.sign(p - 0.5) * strength, dtype=np.int64)


def prior_label_model(n_judges: int = 1) -> LabelModel:
    """The model before any verdict: every judge is the middling judge of the priors."""
    if n_judges < 1:
        raise ValueError(f"n_judges must be at least 1, got {n_judges}.")
    theta = np.tile(_PRIOR_MEAN, (n_judges, 1))
    return LabelModel(judges=tuple(_judge(row, reliability=1.0) for row in theta))


def fit_label_model(
    observations: Observations,
    *,
    n_judges: int | None = None,
    people: Sequence[int] = (),
    reliability: float | Literal["fitted"] = 1.0,
    start: LabelModel | None = None,
) -> LabelModel:
    """Fit every judge's parameters to all verdicts of a run (maximum a posteriori).

    Args:
        observations: the verdicts; an empty set gives the priors.
        n_judges: how many judges there are; by default the highest number seen, plus one.
        people: judges that are people. They have no position bias and reliability 1.
        reliability: assumed for all judges that are not people, in (0, 1]; or "fitted", which needs
            pairs with verdicts by two judges (see the module's text for what two can tell).
        start: an earlier fit of the same judges, from which the search starts. It saves time and
            moves the result only within the search's tolerance.

    Returns:
        A LabelModel. Judges without verdicts keep the priors, with `n_verdicts` 0.

    Raises:
        ValueError: an unknown judge among `people`, a reliability out of range, or "fitted" where no
            pair was seen by two judges.
    """
    seen = int(observations.judge.max()) + 1 if len(observations) else 1
    count = seen if n_judges is None else n_judges
    if count < seen:
        raise ValueError(f"n_judges is {n_judges}, but the verdicts name judge {seen - 1}.")
    if not set(people) <= set(range(count)):
        raise ValueError(f"people must be judges of 0 .. {count - 1}, got {sorted(people)}.")
    if reliability != "fitted" and not 0.0 < reliability <= 1.0:
        raise ValueError(f"reliability must be in (0, 1] or 'fitted', got {reliability}.")

    encoded = _encode(observations, count)
    free = np.ones((count, _N_PARAMETERS), dtype=bool)
    free[list(people), 1] = False
    free[:, 4] = False
    fixed_reliability = np.ones(count)
    machines = [j for j in range(count) if j not in set(people)]
    if reliability == "fitted":
        overlap = (encoded.states != 0).sum(axis=1) >= 2
        if not overlap.any():
            raise ValueError(
                "reliability='fitted' needs pairs with verdicts by two judges (or a judge and a "
                "person), and there is none. Pass a number, or ask a second judge about some pairs."
            )
        free[machines, 4] = True
    else:
        fixed_reliability[machines] = reliability
    verdicts = np.bincount(observations.judge, minlength=count)
    free[verdicts == 0] = False

    theta = np.tile(_PRIOR_MEAN, (count, 1))
    if not free.any():
        judges = tuple(_judge(t, r) for t, r in zip(theta, fixed_reliability, strict=True))
        return LabelModel(judges=judges)
    if start is not None:
        if len(start.judges) != count:
            raise ValueError(f"start has {len(start.judges)} judge(s), and {count} are fitted.")
        theta[:, :4] = _theta(start)[:, :4]
        theta[free[:, 4], 4] = logit(np.minimum(_reliabilities(start)[free[:, 4]], 0.99))
        theta = np.clip(np.where(free, theta, _PRIOR_MEAN), _LOW, _HIGH)
        theta[list(people), 1] = 0.0
    return _fit(encoded, theta, free, fixed_reliability, verdicts)


def beliefs(model: LabelModel, observations: Observations, n_prompts: int, k: int) -> Beliefs:
    """What the verdicts say of the qualities of prompts 0 .. n_prompts - 1 with answers 0 .. k - 1.

    The joint posterior is approximated by a normal distribution (expectation propagation). Prompts
    without verdicts keep the prior N(0, I).

    Raises:
        ValueError: a prompt or an answer out of range.
    """
    for name, column, end in (
        ("prompt", observations.prompt, n_prompts),
        ("answer", np.concatenate([observations.first, observations.second]), k),
    ):
        if len(column) and not (0 <= int(column.min()) and int(column.max()) < end):
            raise ValueError(f"every {name} must be in 0 .. {end - 1}, got one that is not.")
    encoded = _encode(observations, len(model.judges))
    mean = np.zeros((n_prompts, k))
    cov = np.broadcast_to(np.eye(k), (n_prompts, k, k)).copy()
    table = _pair_table(encoded, _theta(model), _reliabilities(model))
    for batch in _batches(encoded, np.unique(encoded.prompt), k, names=np.arange(k)):
        fitted = _propagate(batch, table, k)
        mean[batch.prompts], cov[batch.prompts] = fitted.mean, fitted.cov
    return Beliefs(mean=mean, cov=cov)


def log_grade_probabilities(judge: JudgeParameters, opinion: Floats) -> Floats:
    """log P(grade | opinion u of the answer shown first), shape (..., 5) in the order of GRADES."""
    m = judge.slope * np.asarray(opinion) + judge.position_bias
    return np.stack([_log_p(grade, m, judge.tie, judge.strong) for grade in GRADES], axis=-1)


def log_state_likelihood(judge: JudgeParameters, counts: Ints) -> Floats:
    """log P(a judge's verdicts on one pair | gap) for each state, shape (states, gaps of GAP).

    `counts` is (states, 2 orders, 5 grades): how often each grade was given. In order 0 the gap's
    first answer is shown first; grades favour the answer shown first.
    """
    if not len(counts):
        return np.zeros((0, len(GAP)))
    gap, r = GAP[:, None], judge.reliability
    opinion = np.sqrt(r) * gap + np.sqrt(GAP_VARIANCE * (1 - r)) * _NODES if r < 1.0 else gap
    ahead = log_grade_probabilities(judge, opinion)
    behind = log_grade_probabilities(judge, -opinion)
    rows = np.stack([ahead, behind]).reshape(2, -1, 5).transpose(0, 2, 1).reshape(10, -1)
    summed = counts.reshape(len(counts), 10).astype(np.float64) @ rows
    summed = summed.reshape(len(counts), *opinion.shape)
    if r >= 1.0:
        return np.asarray(summed[..., 0])
    return np.asarray(np.logaddexp.reduce(summed + _LOG_NODE_WEIGHTS, axis=-1))


# --- One judge's likelihood ---------------------------------------------------------------------


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


# --- Verdicts as counted states -----------------------------------------------------------------


class _Encoded(msgspec.Struct, frozen=True, eq=False):
    """Each compared pair once, as a state for each judge; equal pairs share all work.

    A pair is turned so that its verdicts come in a fixed order; `sign` is -1 where that exchanged
    `low` and `high`. So a pair and its mirror image are one state, and give p and 1 - p exactly.
    """

    prompt: Ints  # (pairs,)
    low: Ints  # (pairs,)
    high: Ints  # (pairs,)
    sign: Floats  # (pairs,)
    balanced: NDArray[np.bool_]  # (pair states,) its own mirror image
    state: Ints  # (pairs,) row of `states`
    states: Ints  # (pair states, judges) row of each judge's counts
    counts: tuple[Ints, ...]  # per judge (judge states, 2, 5)
    alone: NDArray[np.bool_]  # (pairs,) the only compared pair of its prompt


def _encode(observations: Observations, n_judges: int) -> _Encoded:
    if len(observations) and int(observations.judge.max()) >= n_judges:
        raise DataError(
            f"The verdicts name judge {int(observations.judge.max())}, but the model knows "
            f"{n_judges} judge(s), numbered from 0. Fit the model to these verdicts."
        )
    low = np.minimum(observations.first, observations.second)
    high = np.maximum(observations.first, observations.second)
    pairs, row = np.unique(
        np.stack([observations.prompt, low, high], axis=1), axis=0, return_inverse=True
    )
    row = row.reshape(-1)
    n = len(pairs)
    backwards = (observations.first != low).astype(np.int64)
    cell = ((row * n_judges + observations.judge) * 2 + backwards) * 5 + observations.grade + 2
    counts = np.bincount(cell, minlength=n * n_judges * 10).reshape(n, n_judges, 2, 5)
    difference = (counts - counts[:, :, ::-1]).reshape(n, n_judges * 10)
    leading = np.take_along_axis(difference, (difference != 0).argmax(axis=1)[:, None], axis=1)[:, 0]
    counts[leading < 0] = counts[leading < 0][:, :, ::-1]

    per_judge, columns = [], []
    for j in range(n_judges):
        flat = np.concatenate([np.zeros((1, 10), dtype=np.int64), counts[:, j].reshape(n, 10)])
        unique, inverse = np.unique(flat, axis=0, return_inverse=True)
        per_judge.append(unique.reshape(-1, 2, 5))
        columns.append(inverse.reshape(-1)[1:])
    # The empty state sorts first, so 0 always means "this judge said nothing about the pair".
    states, state, first_row = (
        np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True, return_index=True)[i]
        for i in (0, 2, 1)
    )
    _, prompt_row, pairs_there = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    return _Encoded(
        prompt=pairs[:, 0],
        low=pairs[:, 1],
        high=pairs[:, 2],
        sign=np.where(leading < 0, -1.0, 1.0),
        balanced=(leading == 0)[first_row],
        state=state.reshape(-1),
        states=states,
        counts=tuple(per_judge),
        alone=(pairs_there == 1)[prompt_row.reshape(-1)],
    )


def _pair_table(encoded: _Encoded, theta: Floats, reliability: Floats) -> Floats:
    """log P(all verdicts on a pair | gap), shape (pair states, gaps)."""
    total = np.zeros((len(encoded.states), len(GAP)))
    for j, counts in enumerate(encoded.counts):
        judge = _judge(theta[j], float(reliability[j]))
        total += log_state_likelihood(judge, counts)[encoded.states[:, j]]
    return total


# --- Fitting ------------------------------------------------------------------------------------


def _fit(
    encoded: _Encoded, start: Floats, free: NDArray[np.bool_], fixed: Floats, verdicts: Ints
) -> LabelModel:
    """Maximise log posterior. The gradient is Fisher's identity: E[d log P(verdicts | gap)]."""
    rows = np.bincount(encoded.state[encoded.alone], minlength=len(encoded.states)).astype(float)
    names = np.unique(encoded.prompt[~encoded.alone])
    batches = _batches(encoded, names, None)
    reliability_free = free[:, 4]

    def unpack(x: Floats) -> tuple[Floats, Floats]:
        theta = start.copy()
        theta[free] = x
        return theta, np.where(reliability_free, expit(theta[:, 4]), fixed)

    def objective(x: Floats) -> tuple[float, Floats, float]:
        theta, reliability = unpack(x)
        table = _pair_table(encoded, theta, reliability)
        weight, log_z = _posterior_rows(table + _LOG_PRIOR)
        total = float(rows @ log_z)
        mass = weight * rows[:, None]
        for batch in batches:
            fitted = _propagate(batch, table, batch.k)
            total += fitted.log_z
            mass += fitted.mass
        gradient = np.zeros_like(theta)
        for j, counts in enumerate(encoded.counts):
            if not free[j].any():
                continue
            by_state = _sum_rows(mass, encoded.states[:, j], len(counts))
            for k in np.flatnonzero(free[j]):
                gradient[j, k] = float((by_state * _slope_of_table(counts, theta[j], reliability[j],
                                                                   int(k))).sum())  # fmt: skip
        z = ((theta - _PRIOR_MEAN) / _PRIOR_SD)[free]
        return (
            float(0.5 * (z @ z)) - total,
            z / np.broadcast_to(_PRIOR_SD, free.shape)[free] - gradient[free],
            total,
        )

    bounds = [
        (float(_LOW[k]), float(_HIGH[k])) for _, k in zip(*np.nonzero(free), strict=True)
    ]
    found = minimize(
        lambda x: objective(x)[:2],
        start[free],
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 200, "ftol": 1e-10, "gtol": 1e-3},
    )
    theta, reliability = unpack(found.x)
    errors = np.full(free.shape, np.nan)
    errors[free] = _standard_errors(lambda x: objective(x)[1], found.x)
    judges = tuple(
        _judge(theta[j], float(reliability[j]), errors[j], int(verdicts[j]))
        for j in range(len(theta))
    )
    return LabelModel(
        judges=judges,
        log_likelihood=objective(found.x)[2],
        n_verdicts=int(verdicts.sum()),
        n_prompts=len(np.unique(encoded.prompt)),
        converged=bool(found.success),
    )


def _slope_of_table(counts: Ints, theta: Floats, reliability: float, k: int) -> Floats:
    """d log P(verdicts | gap) / d theta_k by central differences of the (small) table."""
    step = np.zeros_like(theta)
    step[k] = 1e-5
    ends = []
    for side in (1.0, -1.0):
        moved = theta + side * step
        judge = _judge(moved, float(expit(moved[4])) if k == 4 else reliability)
        ends.append(log_state_likelihood(judge, counts))
    return (ends[0] - ends[1]) / 2e-5


def _standard_errors(gradient: object, x: Floats) -> Floats:
    """Posterior standard errors from the curvature at x; the priors keep it positive."""
    assert callable(gradient)
    curvature = np.stack(
        [
            (gradient(x + 1e-3 * unit) - gradient(x - 1e-3 * unit)) / 2e-3
            for unit in np.eye(len(x))
        ]
    )
    values, vectors = np.linalg.eigh(0.5 * (curvature + curvature.T))
    floor = float(1.0 / (_PRIOR_SD.max() ** 2))
    return np.asarray(np.sqrt(((vectors**2) / np.maximum(values, floor)).sum(axis=1)))


def _judge(
    theta: Floats, reliability: float, errors: Floats | None = None, n_verdicts: int = 0
) -> JudgeParameters:
    slope, tie, step = (float(np.exp(theta[k])) for k in (0, 2, 3))
    se = np.full(_N_PARAMETERS, np.nan) if errors is None else errors
    return JudgeParameters(
        slope=slope,
        position_bias=float(theta[1]),
        tie=tie,
        strong=tie + step,
        reliability=reliability,
        slope_se=slope * float(se[0]),
        position_bias_se=float(se[1]),
        tie_se=tie * float(se[2]),
        strong_se=float(np.hypot(tie * se[2], step * se[3])),
        reliability_se=reliability * (1 - reliability) * float(se[4]),
        n_verdicts=n_verdicts,
    )


def _theta(model: LabelModel) -> Floats:
    return np.array(
        [
            [np.log(j.slope), j.position_bias, np.log(j.tie), np.log(j.strong - j.tie), 0.0]
            for j in model.judges
        ]
    )


def _reliabilities(model: LabelModel) -> Floats:
    return np.array([j.reliability for j in model.judges])


# --- One compared pair: the grid ----------------------------------------------------------------


def _posterior_rows(log_density: Floats) -> tuple[Floats, Floats]:
    """Normalised weights on the grid and the log normaliser of each row."""
    top = log_density.max(axis=-1, keepdims=True)
    weight = np.exp(log_density - top)
    total = weight.sum(axis=-1, keepdims=True)
    return weight / total, (top + np.log(total * _STEP))[..., 0]


def _sum_rows(values: Floats, group: Ints, n_groups: int) -> Floats:
    """Sum rows of `values` with the same group."""
    n = len(group)
    chooser = csr_matrix((np.ones(n), (group, np.arange(n))), shape=(n_groups, n))
    return np.asarray(chooser @ values)


# --- Several compared pairs: expectation propagation --------------------------------------------


class _Batch(msgspec.Struct, frozen=True, eq=False):
    """Prompts worked on together, padded to the same numbers of answers and compared pairs."""

    prompts: Ints  # (n,) their names
    names: tuple[Ints, ...]  # (n,) each prompt's answers
    k: int
    low: Ints  # (n, m) answer numbers 0 .. k - 1
    high: Ints  # (n, m)
    sign: Floats  # (n, m)
    state: Ints  # (n, m) row of the pair table
    real: NDArray[np.bool_]  # (n, m) False for padding
    pair: Ints  # (n, m) row of the encoded pairs
    tau: Floats  # (n, m) site precisions, kept between calls as a warm start
    nu: Floats  # (n, m)


class _Propagated(msgspec.Struct, frozen=True, eq=False):
    mean: Floats  # (n, k)
    cov: Floats  # (n, k, k)
    log_z: float
    mass: Floats  # (pair states, gaps) summed posteriors of the gaps
    tilted: Floats  # (n, m, gaps)


def _batches(
    encoded: _Encoded, prompts: Ints, k: int | None, names: Ints | None = None
) -> list[_Batch]:
    """Cut the compared pairs of `prompts` into batches of like size."""
    if not len(prompts):
        return []
    inside = np.flatnonzero(np.isin(encoded.prompt, prompts))
    starts = np.searchsorted(encoded.prompt[inside], prompts)
    ends = np.searchsorted(encoded.prompt[inside], prompts, side="right")
    sizes = ends - starts
    order = np.argsort(sizes, kind="stable")
    batches, at = [], 0
    while at < len(order):
        m = max(int(sizes[order[at]]), 1)
        # Prompts up to a third larger share a batch: little padding, few batches.
        limit = max(m + 1, (4 * m) // 3)
        stop = at
        while (
            stop < len(order)
            and sizes[order[stop]] <= limit
            and (stop - at + 1) * limit * len(GAP) <= _CHUNK + limit * len(GAP)
        ):
            stop += 1
        rows = order[at:stop]
        batches.append(_batch(encoded, inside, starts[rows], sizes[rows], prompts[rows], k, names))
        at = stop
    return batches


def _batch(
    encoded: _Encoded,
    inside: Ints,
    starts: Ints,
    sizes: Ints,
    prompts: Ints,
    k: int | None,
    names: Ints | None,
) -> _Batch:
    m = max(int(sizes.max()), 1)
    real = np.arange(m)[None, :] < sizes[:, None]
    if len(inside):
        pair = inside[np.where(real, starts[:, None] + np.arange(m), 0)]
    else:
        pair = np.zeros(real.shape, dtype=np.int64)
    low, high = np.zeros(pair.shape, dtype=np.int64), np.ones(pair.shape, dtype=np.int64)
    answers = []
    for n, size in enumerate(sizes):
        own = pair[n, :size]
        if names is None:
            mine = np.unique(np.concatenate([encoded.low[own], encoded.high[own]]))
        else:
            mine = names
        low[n, :size] = np.searchsorted(mine, encoded.low[own])
        high[n, :size] = np.searchsorted(mine, encoded.high[own])
        answers.append(mine)
    return _Batch(
        prompts=prompts,
        names=tuple(answers),
        k=k or max(2, *(len(mine) for mine in answers)),
        low=low,
        high=high,
        sign=np.where(real, encoded.sign[pair], 1.0) if len(inside) else np.ones(pair.shape),
        state=np.where(real, encoded.state[pair], 0) if len(inside) else pair,
        real=real,
        pair=pair,
        tau=np.zeros(pair.shape),
        nu=np.zeros(pair.shape),
    )


def _propagate(batch: _Batch, table: Floats, k: int) -> _Propagated:
    """Parallel expectation propagation with damping. Every factor is log-concave, so it settles.

    A factor depends on one gap only, so its moments come from the grid. `batch.tau` and `batch.nu`
    are left at the solution as the next start.
    """
    tau, nu = batch.tau, batch.nu
    n, m = tau.shape
    at = np.arange(n)[:, None]
    factor = np.where(batch.real[..., None], table[batch.state] if len(table) else 0.0, 0.0)
    for sweep in range(60):
        mean, cov, gap_mean, gap_var = _moments(batch, k)
        cavity_precision = np.maximum(1.0 / gap_var - tau, 1e-6)
        cavity_var = 1.0 / cavity_precision
        cavity_mean = cavity_var * (gap_mean / gap_var - nu)
        spread = (GAP - cavity_mean[..., None]) ** 2
        log_density = factor - 0.5 * spread * cavity_precision[..., None]
        tilted, log_sum = _posterior_rows(log_density)
        tilted_mean = tilted @ GAP
        tilted_var = np.maximum(tilted @ GAP**2 - tilted_mean**2, 1e-8)
        new_tau = np.where(batch.real, np.maximum(1.0 / tilted_var - cavity_precision, 0.0), 0.0)
        new_nu = np.where(batch.real, tilted_mean / tilted_var - cavity_mean * cavity_precision, 0.0)
        change = float(np.maximum(np.abs(new_tau - tau), np.abs(new_nu - nu)).max())
        if change < 1e-4:
            break
        rate = 0.8 if sweep < 20 else 0.4
        tau += rate * (new_tau - tau)
        nu += rate * (new_nu - nu)
    # log Z of expectation propagation; each site is scaled to match its tilted normaliser.
    log_tilted = log_sum - 0.5 * np.log(2 * np.pi * cavity_var)
    var = 1.0 / (cavity_precision + tau)
    centre = var * (cavity_mean * cavity_precision + nu)
    log_scale = (
        log_tilted
        - 0.5 * np.log(var / cavity_var)
        - 0.5 * centre**2 / var
        + 0.5 * cavity_mean**2 * cavity_precision
    )
    _, log_det = np.linalg.slogdet(cov)
    pull = np.zeros((n, k))
    signed = nu * batch.sign
    np.add.at(pull, (at, batch.low), signed)
    np.add.at(pull, (at, batch.high), -signed)
    log_z = float(log_scale[batch.real].sum() + 0.5 * log_det.sum() + 0.5 * (pull * mean).sum())
    mass = _sum_rows(tilted[batch.real], batch.state[batch.real], len(table))
    return _Propagated(mean=mean, cov=cov, log_z=log_z, mass=mass, tilted=tilted)


def _moments(batch: _Batch, k: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Posterior of the qualities given the sites, and the mean and variance of each compared gap."""
    n, _ = batch.tau.shape
    at = np.arange(n)[:, None]
    precision = np.broadcast_to(np.eye(k), (n, k, k)).copy()
    np.add.at(precision, (at, batch.low, batch.low), batch.tau)
    np.add.at(precision, (at, batch.high, batch.high), batch.tau)
    np.add.at(precision, (at, batch.low, batch.high), -batch.tau)
    np.add.at(precision, (at, batch.high, batch.low), -batch.tau)
    cov = np.linalg.inv(precision)
    pull = np.zeros((n, k))
    np.add.at(pull, (at, batch.low), batch.nu * batch.sign)
    np.add.at(pull, (at, batch.high), -batch.nu * batch.sign)
    mean = np.einsum("nij,nj->ni", cov, pull)
    gap_mean = (mean[at, batch.low] - mean[at, batch.high]) * batch.sign
    gap_var = (
        cov[at, batch.low, batch.low]
        + cov[at, batch.high, batch.high]
        - 2 * cov[at, batch.low, batch.high]
    )
    return mean, cov, gap_mean, gap_var


# --- Posteriors of the wanted pairs -------------------------------------------------------------


def _p_prefer(model: LabelModel, observations: Observations, wanted: Ints) -> PairPosterior:
    encoded = _encode(observations, len(model.judges))
    table = _pair_table(encoded, _theta(model), _reliabilities(model))
    low, high = np.minimum(wanted[:, 1], wanted[:, 2]), np.maximum(wanted[:, 1], wanted[:, 2])
    turned = wanted[:, 1] != low
    row_of = {
        key: row
        for row, key in enumerate(
            zip(encoded.prompt.tolist(), encoded.low.tolist(), encoded.high.tolist(), strict=True)
        )
    }
    keys = zip(wanted[:, 0].tolist(), low.tolist(), high.tolist(), strict=True)
    row = np.array([row_of.get(key, -1) for key in keys], dtype=np.int64)
    p = np.full(len(wanted), 0.5)
    mean, var = np.zeros(len(wanted)), np.full(len(wanted), GAP_VARIANCE)

    if len(table):
        direct = row >= 0
        direct[direct] = encoded.alone[row[direct]]
        weight, _ = _posterior_rows(table + _LOG_PRIOR)
        state = encoded.state[row[direct]]
        p[direct], mean[direct], var[direct] = (
            values[state] for values in _summaries(weight, encoded.balanced)
        )
        _orient(p, mean, np.flatnonzero(direct), encoded.sign[row[direct]])
        others = np.flatnonzero(~direct & np.isin(wanted[:, 0], encoded.prompt))
        if len(others):
            _fill(encoded, table, wanted[:, 0], low, high, row, others, (p, mean, var))
    _orient(p, mean, np.flatnonzero(turned), np.full(int(turned.sum()), -1.0))
    return PairPosterior(p=p, mean=mean, sd=np.sqrt(var))


def _summaries(weight: Floats, balanced: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """P(gap > 0), mean and variance of each row of normalised grid weights."""
    p = np.clip(weight @ ABOVE_ZERO, _CERTAIN, 1 - _CERTAIN)
    mean = weight @ GAP
    var = np.maximum(weight @ GAP**2 - mean**2, _CERTAIN)
    return np.where(balanced, 0.5, p), np.where(balanced, 0.0, mean), var


def _orient(p: Floats, mean: Floats, rows: Ints, sign: Floats) -> None:
    """Turn the answers of `rows` round where `sign` is -1."""
    turn = rows[sign < 0]
    p[turn] = 1.0 - p[turn]
    mean[turn] = -mean[turn]


def _fill(
    encoded: _Encoded,
    table: Floats,
    prompt: Ints,
    low: Ints,
    high: Ints,
    row: Ints,
    others: Ints,
    into: tuple[Floats, Floats, Floats],
) -> None:
    """Pairs of prompts with several compared pairs, and pairs never compared."""
    p, mean, var = into
    by_prompt: dict[int, list[int]] = {}
    for index in others.tolist():
        by_prompt.setdefault(int(prompt[index]), []).append(index)
    for batch in _batches(encoded, np.array(sorted(by_prompt)), None):
        fitted = _propagate(batch, table, batch.k)
        for n, name in enumerate(batch.prompts.tolist()):
            place = {answer: at for at, answer in enumerate(batch.names[n].tolist())}
            site = {pair: at for at, pair in enumerate(batch.pair[n][batch.real[n]].tolist())}
            for index in by_prompt[name]:
                i, j = place.get(int(low[index])), place.get(int(high[index]))
                if int(row[index]) in site:
                    at = site[int(row[index])]
                    balanced = np.zeros(1, dtype=bool)
                    found = _summaries(fitted.tilted[n, at][None], balanced)
                    p[index], mean[index], var[index] = (float(value[0]) for value in found)
                    _orient(p, mean, np.array([index]), batch.sign[n, at : at + 1])
                    continue
                # An answer that nobody was shown keeps its prior, N(0, 1).
                m_i, v_i = (0.0, 1.0) if i is None else (fitted.mean[n, i], fitted.cov[n, i, i])
                m_j, v_j = (0.0, 1.0) if j is None else (fitted.mean[n, j], fitted.cov[n, j, j])
                shared = 0.0 if i is None or j is None else float(fitted.cov[n, i, j])
                mean[index], var[index] = m_i - m_j, v_i + v_j - 2 * shared
                p[index] = np.clip(ndtr(mean[index] / np.sqrt(var[index])), _CERTAIN, 1 - _CERTAIN)
