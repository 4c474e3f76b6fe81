"""Scores in [0, 1] -> coefficients of a logistic model, with errors that count prompts, not rows.

The one regression behind length control and rankings. In: features, scores, the prompt of each row.
Out: a `LogitFit`. It knows no comparison and no report. statsmodels and scikit-learn each lack a
part (a faint penalty, scores between 0 and 1, errors by cluster); scipy does the optimising.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Floats = NDArray[np.float64]

RIDGE = 0.01
"""Precision of the prior on each coefficient (standard deviation 10 logits).

Too faint to see where the data speak; it keeps the coefficients finite where one side always wins.
"""

NOT_SAMPLED = -1
"""The cluster of rows that are taken as known: they shape the fit and add no sampling error."""


class LogitFit(NamedTuple):
    """Coefficients (K,) in logits, and how much each prompt moves them, (G, K).

    The sum of the rows of `influence` is the first-order error of the coefficients, so that
    covariance = G / (G - 1) · sum of outer products: the cluster-robust sandwich (Liang and Zeger
    1986, Biometrika 73, eq. 6). It holds for ties and probabilities as scores (quasi-likelihood;
    Papke and Wooldridge 1996) and for any number of rows a prompt.
    """

    coefficients: Floats
    influence: Floats

    def standard_error(self, direction: Floats) -> float:
        """Of the sum of direction · coefficients, in logits."""
        return standard_error(self.influence @ direction)


def fit_logit(
    features: Floats,
    scores: Floats,
    clusters: NDArray[np.int64],
    *,
    weights: Floats | None = None,
    ridge: float = RIDGE,
) -> LogitFit:
    """Maximise sum w·[y·log p + (1 - y)·log(1 - p)] - ridge/2·|b|², p = 1 / (1 + exp(-features · b)).

    Args:
        features: (N, K), without a column of ones unless one is wanted.
        scores: (N,) in [0, 1].
        clusters: (N,) the number of each row's prompt, from 0; `NOT_SAMPLED` for known rows.
        weights: (N,) of the rows; ones by default.
        ridge: see `RIDGE`.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    total = float(weights.sum())

    def gradient(b: Floats) -> Floats:
        error = weights * (special.expit(features @ b) - scores)
        result: Floats = (features.T @ error + ridge * b) / total
        return result

    def hessian(b: Floats) -> Floats:
        p = special.expit(features @ b)
        curved = features.T @ (features * (weights * p * (1 - p))[:, None])
        result: Floats = (curved + ridge * np.eye(len(b))) / total
        return result

    def loss(b: Floats) -> float:
        eta = features @ b
        fit = weights @ (np.logaddexp(0, eta) - scores * eta)
        return float(fit + 0.5 * ridge * b @ b) / total

    found = optimize.minimize(
        loss, np.zeros(features.shape[1]), method="trust-exact", jac=gradient, hess=hessian,
        options={"gtol": 1e-9, "maxiter": 1_000},
    ).x  # fmt: skip
    by_row = features * (weights * (scores - special.expit(features @ found)))[:, None]
    sampled = clusters != NOT_SAMPLED
    by_cluster = np.zeros((int(clusters.max()) + 1, features.shape[1]))
    np.add.at(by_cluster, clusters[sampled], by_row[sampled])
    influence = np.linalg.solve(total * hessian(found), by_cluster.T).T
    return LogitFit(found, influence.astype(np.float64))


def standard_error(influence: Floats) -> float:
    """From what each of G prompts adds to an estimate's error (G,): sqrt(G/(G - 1)·sum of squares)."""
    n = len(influence)
    return float(np.sqrt(n / (n - 1) * (influence**2).sum())) if n > 1 else float("inf")


def interval(
    value: float, error: float, n: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """value ± t·error with n - 1 degrees of freedom, n the number of prompts."""
    if not np.isfinite(error) or n < 2:
        return -float("inf"), float("inf")
    reach = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    return value - reach, value + reach


def share_interval(
    value: float, error: float, n: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """The same for a share strictly between 0 and 1, made in logits so that it stays between them."""
    middle = float(special.logit(value))
    low, high = interval(middle, error / (value * (1 - value)), n, confidence=confidence)
    return float(special.expit(low)), float(special.expit(high))


def number_clusters(names: list[str]) -> NDArray[np.int64]:
    """Numbers from 0 in order of first appearance."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int64)


def equal_shares(groups: NDArray[np.int64]) -> Floats:
    """Row weights with which each group counts once: one over the rows of its group."""
    shares: Floats = 1.0 / np.bincount(groups)[groups]
    return shares
