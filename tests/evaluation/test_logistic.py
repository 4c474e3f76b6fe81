"""The regression under length control and rankings, against another library and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit

from prefopt.evaluation.logistic import (
    NOT_SAMPLED,
    equal_shares,
    fit_logit,
    interval,
    number_clusters,
    share_interval,
    standard_error,
)


def test_one_feature_by_hand() -> None:
    """Three won of four: the coefficient is logit(3/4); errors sqrt(sum r²)/(4·p·(1-p))."""
    fit = fit_logit(np.ones((4, 1)), np.array([1.0, 1, 1, 0]), np.arange(4), ridge=0.0)
    assert fit.coefficients[0] == pytest.approx(logit(0.75), abs=1e-7)
    residuals = 3 * 0.25**2 + 0.75**2
    by_hand = np.sqrt(4 / 3 * residuals) / (4 * 0.75 * 0.25)
    assert fit.standard_error(np.array([1.0])) == pytest.approx(by_hand, rel=1e-6)


def test_it_agrees_with_statsmodels() -> None:
    """Figures of statsmodels 0.15: GLM(y, x, Binomial()).fit(cov_type="cluster", groups=...).

    Its errors hold a further factor sqrt((N - 1)/(N - K)).
    """
    i = np.arange(120)
    x = np.column_stack([np.ones(120), np.sin(i), np.cos(3 * i)])
    y = np.round((1 + np.sin(1.7 * i + 1)) * 1.2) / 2
    y = np.clip(y, 0, 1)
    fit = fit_logit(x, y, i // 3, ridge=0.0)
    assert fit.coefficients == pytest.approx(STATSMODELS_COEFFICIENTS, abs=1e-6)
    found = [fit.standard_error(e) * np.sqrt(119 / 117) for e in np.eye(3)]
    assert found == pytest.approx(STATSMODELS_ERRORS, rel=1e-5)


STATSMODELS_COEFFICIENTS = [0.25134906, -0.06835301, 0.00783206]
STATSMODELS_ERRORS = [0.06330029, 0.25475461, 0.17866947]


def test_repeating_every_row_of_a_prompt_changes_nothing_but_a_fixed_weight() -> None:
    rng = np.random.default_rng(0)
    x, prompts = rng.normal(size=(30, 2)), np.arange(30)
    y = (rng.random(30) < expit(x[:, 0])).astype(float)
    once = fit_logit(x, y, prompts)
    twice, names = np.vstack([x, x]), np.concatenate([prompts, prompts])
    again = fit_logit(twice, np.concatenate([y, y]), names, weights=equal_shares(names))
    assert again.coefficients == pytest.approx(once.coefficients, abs=1e-8)
    assert again.influence == pytest.approx(once.influence, abs=1e-8)


def test_known_rows_shape_the_fit_and_add_no_error() -> None:
    x, y = np.ones((6, 1)), np.array([1.0, 1, 0, 0, 0, 0])
    clusters = np.array([0, 1, 2, NOT_SAMPLED, NOT_SAMPLED, NOT_SAMPLED])
    fit = fit_logit(x, y, clusters, ridge=0.0)
    assert fit.coefficients[0] == pytest.approx(logit(1 / 3), abs=1e-7)
    assert fit.influence.shape == (3, 1)


def test_one_sided_scores_have_a_finite_coefficient() -> None:
    fit = fit_logit(np.ones((50, 1)), np.ones(50), np.arange(50))
    assert 5 < fit.coefficients[0] < 12


def test_one_prompt_gives_no_interval() -> None:
    assert standard_error(np.array([0.3])) == float("inf")
    assert interval(0.0, float("inf"), 1) == (-float("inf"), float("inf"))
    assert share_interval(0.6, float("inf"), 1) == (0.0, 1.0)


def test_names_become_numbers_in_order() -> None:
    assert number_clusters(["x", "y", "x", "z"]).tolist() == [0, 1, 0, 2]
    assert equal_shares(np.array([0, 1, 0, 2])).tolist() == [0.5, 1.0, 0.5, 1.0]
