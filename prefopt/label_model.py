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
  * An error that a judge makes each time it sees a pair looks like an opinion. It shows where one
    judge compared three or more answers of a prompt in a ring and contradicts itself around it, or
    where other judges saw the pair: two judges show only the product of their reliabilities, which
    the prior then shares out; three separate them. With one judge and two answers a prompt the
    result is about what this judge would say on average (r = 1).
  * A taste for one answer, such as for the longer one, never contradicts itself. Only other judges,
    best of all people, show it.
  * One person's label a pair cannot tell that person's slips from the judge's repeated errors. Two
    labels on some pairs can; they count as one judge of `people`.

This module knows nothing of texts, prompts, files or prices. A failed verdict is not an observation
and must not be passed as a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit, ndtr

from prefopt.labelling.judge_likelihood import (
    ABOVE_ZERO,
    GAP,
    GAP_VARIANCE,
    LOG_PRIOR,
    JudgeParameters,
    log_rows,
    log_state_likelihood,
    state_likelihood_by_node,
)
from prefopt.labelling.observations import (
    Encoded,
    Observations,
    count_rings,
    encode,
    grade_from_p_first,
    observe,
)
from prefopt.labelling.propagation import batches_of, posterior_rows, propagate, sum_rows

__all__ = [
    "Beliefs",
    "JudgeParameters",
    "LabelModel",
    "Observations",
    "PairPosterior",
    "beliefs",
    "count_rings",
    "fit_label_model",
    "grade_from_p_first",
    "observe",
    "prior_label_model",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Reliability = float | Literal["fitted"]
"""An assumed squared correlation of a judge's settled opinion with quality, or the wish to fit it."""

# Priors of the transformed parameters: log slope, bias, log tie, log(strong - tie), logit r.
# The means describe a middling judge; two standard deviations reach from useless to near perfect.
_PRIOR_MEAN = np.array([np.log(1.5), 0.0, np.log(0.5), np.log(1.5), 1.5])
_PRIOR_SD = np.array([0.7, 1.0, 0.8, 0.7, 1.5])
_LOW = np.array([-4.0, -8.0, -6.0, -4.0, -4.0])
_HIGH = np.array([3.0, 8.0, 3.0, 3.0, 6.0])
_N_PARAMETERS = 5
_CERTAIN = 1e-12  # no posterior is closer to 0 or 1 than this


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


def prior_label_model(n_judges: int = 1) -> LabelModel:
    """The model before any verdict: every judge is the middling judge of the priors.

    Raises:
        ValueError: fewer than one judge.
    """
    if n_judges < 1:
        raise ValueError(f"n_judges must be at least 1, got {n_judges}.")
    theta = np.tile(_PRIOR_MEAN, (n_judges, 1))
    return LabelModel(judges=tuple(_judge(row, reliability=1.0) for row in theta))


def fit_label_model(
    observations: Observations,
    *,
    n_judges: int | None = None,
    people: Sequence[int] = (),
    reliability: Reliability | Sequence[Reliability] = 1.0,
    start: LabelModel | None = None,
) -> LabelModel:
    """Fit every judge's parameters to all verdicts of a run (maximum a posteriori).

    Args:
        observations: the verdicts; an empty set gives the priors.
        n_judges: how many judges there are; by default the highest number seen, plus one.
        people: judges that are people. They have no position bias and reliability 1.
        reliability: assumed for all judges that are not people, in (0, 1]; or "fitted", which needs
            pairs with verdicts by two judges, or answers that one judge compared in a ring (see the
            module's text for what these tell). Or one such value a judge: ("fitted", 1.0) measures a
            cheap judge by a strong one that is trusted.
        start: an earlier fit of the same judges, from which the search starts. It saves time and
            moves the result only within the search's tolerance.

    Returns:
        A LabelModel. Judges without verdicts keep the priors, with `n_verdicts` 0.

    Raises:
        ValueError: an unknown judge among `people`, a reliability out of range, or "fitted" where no
            pair was seen by two judges and no answers were compared in a ring.
    """
    seen = int(observations.judge.max()) + 1 if len(observations) else 1
    count = seen if n_judges is None else n_judges
    if count < seen:
        raise ValueError(f"n_judges is {n_judges}, but the verdicts name judge {seen - 1}.")
    if not set(people) <= set(range(count)):
        raise ValueError(f"people must be judges of 0 .. {count - 1}, got {sorted(people)}.")
    each: list[Reliability] = (
        [reliability] * count if isinstance(reliability, str | float | int) else list(reliability)
    )
    if len(each) != count or not all(r == "fitted" or 0.0 < float(r) <= 1.0 for r in each):
        raise ValueError(
            f"reliability must be in (0, 1] or 'fitted', once or for each of {count} judge(s), "
            f"got {reliability}."
        )

    encoded = encode(observations, count)
    free = np.ones((count, _N_PARAMETERS), dtype=bool)
    free[list(people), 1] = False
    free[:, 4] = False
    fixed_reliability = np.ones(count)
    for j in sorted(set(range(count)) - set(people)):
        free[j, 4] = each[j] == "fitted"
        fixed_reliability[j] = 1.0 if each[j] == "fitted" else float(each[j])
    by_two = ((encoded.states != 0).sum(axis=1) >= 2).any()
    if free[:, 4].any() and not by_two and not count_rings(observations):
        raise ValueError(
            "reliability='fitted' needs pairs with verdicts by two judges (or a judge and a "
            "person), or three answers of a prompt that were all compared, and there is none. Pass a "
            "number, or ask a second judge about some pairs."
        )
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
        if len(column) and not (int(column.min()) >= 0 and int(column.max()) < end):
            raise ValueError(f"every {name} must be in 0 .. {end - 1}, got one that is not.")
    encoded = encode(observations, len(model.judges))
    mean = np.zeros((n_prompts, k))
    cov = np.broadcast_to(np.eye(k), (n_prompts, k, k)).copy()
    table = _pair_table(encoded, _theta(model), _reliabilities(model))
    for batch in batches_of(encoded, np.unique(encoded.prompt), k, names=np.arange(k)):
        fitted = propagate(batch, table, k)
        mean[batch.prompts], cov[batch.prompts] = fitted.mean, fitted.cov
    return Beliefs(mean=mean, cov=cov)


def _pair_table(encoded: Encoded, theta: Floats, reliability: Floats) -> Floats:
    """log P(all verdicts on a pair | gap), shape (pair states, gaps)."""
    total = np.zeros((len(encoded.states), len(GAP)))
    for j, counts in enumerate(encoded.counts):
        judge = _judge(theta[j], float(reliability[j]))
        total += log_state_likelihood(judge, counts)[encoded.states[:, j]]
    return total


def _fit(
    encoded: Encoded, start: Floats, free: NDArray[np.bool_], fixed: Floats, verdicts: Ints
) -> LabelModel:
    """Maximise log posterior. The gradient is Fisher's identity: E[d log P(verdicts | gap)]."""
    rows = np.bincount(encoded.state[encoded.alone], minlength=len(encoded.states)).astype(float)
    names = np.unique(encoded.prompt[~encoded.alone])
    batches = batches_of(encoded, names, None)
    reliability_free = free[:, 4]

    def unpack(x: Floats) -> tuple[Floats, Floats]:
        theta = start.copy()
        theta[free] = x
        return theta, np.where(reliability_free, expit(theta[:, 4]), fixed)

    def objective(x: Floats) -> tuple[float, Floats, float]:
        theta, reliability = unpack(x)
        table = _pair_table(encoded, theta, reliability)
        weight, log_z = posterior_rows(table + LOG_PRIOR)
        total = float(rows @ log_z)
        mass = weight * rows[:, None]
        for batch in batches:
            fitted = propagate(batch, table, batch.k)
            total += fitted.log_z
            mass += fitted.mass
        gradient = np.zeros_like(theta)
        for j, counts in enumerate(encoded.counts):
            by_state = sum_rows(mass, encoded.states[:, j], len(counts))
            gradient[j] = _gradient(counts, by_state, theta[j], float(reliability[j]), free[j])
        z = ((theta - _PRIOR_MEAN) / _PRIOR_SD)[free]
        return (
            float(0.5 * (z @ z)) - total,
            z / np.broadcast_to(_PRIOR_SD, free.shape)[free] - gradient[free],
            total,
        )

    bounds = [(float(_LOW[k]), float(_HIGH[k])) for _, k in zip(*np.nonzero(free), strict=True)]
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


def _gradient(
    counts: Ints, mass: Floats, theta: Floats, reliability: float, free: NDArray[np.bool_]
) -> Floats:
    """E[d log P(a judge's verdicts | gap, error) / d theta], `mass` being the gaps' posterior."""
    gradient = np.zeros_like(theta)
    if not free.any():
        return gradient
    _, weight = state_likelihood_by_node(_judge(theta, reliability), counts)
    # Expected number of verdicts of each kind at each gap and error node.
    expected = np.einsum("sk,sgh->kgh", counts.reshape(len(counts), 10), weight * mass[..., None],
                         optimize=True)  # fmt: skip
    for k in np.flatnonzero(free):
        ends = []
        for side in (1e-5, -1e-5):
            moved = theta.copy()
            moved[k] += side
            r = float(expit(moved[4])) if k == 4 else reliability
            ends.append(log_rows(_judge(moved, r)))
        gradient[k] = float((expected * (ends[0] - ends[1])).sum()) / 2e-5
    return gradient


def _standard_errors(gradient: Callable[[Floats], Floats], x: Floats) -> Floats:
    """Posterior standard errors from the curvature at x; the priors keep it positive."""
    curvature = np.stack(
        [(gradient(x + 1e-3 * unit) - gradient(x - 1e-3 * unit)) / 2e-3 for unit in np.eye(len(x))]
    )
    values, vectors = np.linalg.eigh(0.5 * (curvature + curvature.T))
    floor = float(1.0 / (_PRIOR_SD.max() ** 2))
    return np.asarray(np.sqrt(((vectors**2) / np.maximum(values, floor)).sum(axis=1)))


def _judge(
    theta: Floats, reliability: float, errors: Floats | None = None, n_verdicts: int = 0
) -> JudgeParameters:
    slope, tie, step = (float(np.exp(theta[k])) for k in (0, 2, 3))
    se = np.full(_N_PARAMETERS, np.nan) if errors is None else errors
    by_name = {
        "slope_se": slope * se[0],
        "position_bias_se": se[1],
        "tie_se": tie * se[2],
        "strong_se": np.hypot(tie * se[2], step * se[3]),
        "reliability_se": reliability * (1 - reliability) * se[4],
    }
    return JudgeParameters(
        slope=slope,
        position_bias=float(theta[1]),
        tie=tie,
        strong=tie + step,
        reliability=reliability,
        n_verdicts=n_verdicts,
        **{name: None if np.isnan(value) else float(value) for name, value in by_name.items()},
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


def _p_prefer(model: LabelModel, observations: Observations, wanted: Ints) -> PairPosterior:
    # Only the wanted prompts' verdicts count, and asking about one must not cost a look at all.
    inside = np.isin(observations.prompt, wanted[:, 0])
    if not inside.all():
        columns = msgspec.structs.astuple(observations)
        observations = Observations(*(column[inside] for column in columns))
    encoded = encode(observations, len(model.judges))
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
        weight, _ = posterior_rows(table + LOG_PRIOR)
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
    p = _representable(weight @ ABOVE_ZERO)
    mean = weight @ GAP
    var = np.maximum(weight @ GAP**2 - mean**2, _CERTAIN)
    return np.where(balanced, 0.5, p), np.where(balanced, 0.0, mean), var


def _representable(p: Floats) -> Floats:
    """`p` inside (0, 1), rounded so that 1 - (1 - p) is p again: a swap must be exact both ways."""
    return np.asarray(1.0 - (1.0 - np.clip(p, _CERTAIN, 1 - _CERTAIN)))


def _orient(p: Floats, mean: Floats, rows: Ints, sign: Floats) -> None:
    """Turn the answers of `rows` round where `sign` is -1."""
    turn = rows[sign < 0]
    p[turn] = 1.0 - p[turn]
    mean[turn] = -mean[turn]


def _fill(
    encoded: Encoded,
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
    for batch in batches_of(encoded, np.array(sorted(by_prompt)), None):
        fitted = propagate(batch, table, batch.k)
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
                p[index] = _representable(ndtr(mean[index] / np.sqrt(var[index])))
