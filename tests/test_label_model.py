"""The label model: recovery of known judges, calibration, symmetry, and runs too small to trust."""

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.errors import DataError
from prefopt.label_model import (
    JudgeParameters,
    LabelModel,
    beliefs,
    count_rings,
    fit_label_model,
    grade_from_p_first,
    observe,
    prior_label_model,
)
from prefopt.labelling.judge_likelihood import log_grade_probabilities

TRUE = JudgeParameters(slope=1.5, position_bias=0.6, tie=0.5, strong=2.0)


def simulate(judge, gap, rng, repeated=0.0):
    """Grades drawn from the latent variable, not from the library's probabilities."""
    latent = judge.slope * (gap + repeated) + judge.position_bias + rng.logistic(size=np.shape(gap))
    size = np.abs(latent)
    return np.sign(latent).astype(int) * ((size > judge.tie).astype(int) + (size > judge.strong))


def both_orders(n, rng, judge=TRUE, number=0, q=None):
    """Verdicts of both orders on n pairs; returns the columns and the true gaps."""
    q = rng.normal(size=(n, 2)) if q is None else q
    gap = q[:, 0] - q[:, 1]
    rows, zero = np.arange(n), np.zeros(n, dtype=int)
    columns = [
        np.r_[rows, rows],
        np.r_[zero, zero + 1],
        np.r_[zero + 1, zero],
        np.full(2 * n, number),
        np.r_[simulate(judge, gap, rng), simulate(judge, -gap, rng)],
    ]
    return columns, gap


def pairs(n):
    return [(row, 0, 1) for row in range(n)]


def tournament(n, k, m, rng, judge=TRUE):
    """m random questions about each of n prompts with k answers."""
    q = rng.normal(size=(n, k))
    asked = list(itertools.permutations(range(k), 2))
    rows = [
        (prompt, *asked[c]) for prompt in range(n) for c in rng.choice(len(asked), m, replace=False)
    ]
    prompt, first, second = np.array(rows).T
    grade = simulate(judge, q[prompt, first] - q[prompt, second], rng)
    return observe(prompt, first, second, np.zeros_like(prompt), grade), q


def assert_near(found, truth, widths=4.0):
    for name in ("slope", "position_bias", "tie", "strong"):
        error = abs(getattr(found, name) - getattr(truth, name))
        assert error < widths * getattr(found, f"{name}_se"), name


def test_the_five_grades_are_a_distribution_and_mirror_each_other():
    u = np.linspace(-6, 6, 25)
    p = np.exp(log_grade_probabilities(TRUE, u))
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-12)
    unbiased = JudgeParameters(slope=1.5, position_bias=0.0, tie=0.5, strong=2.0)
    p = log_grade_probabilities(unbiased, u)
    np.testing.assert_allclose(p, p[::-1, ::-1], atol=1e-12)


def test_a_judges_parameters_are_recovered_from_pairs():
    columns, _ = both_orders(4000, np.random.default_rng(0))
    model = fit_label_model(observe(*columns))
    assert model.converged
    assert model.n_verdicts == 8000
    assert model.judges[0].slope_se < 0.1
    assert_near(model.judges[0], TRUE)


def test_a_judges_parameters_are_recovered_from_tournaments():
    observations, _ = tournament(120, 5, 8, np.random.default_rng(1))
    model = fit_label_model(observations)
    assert model.converged
    assert_near(model.judges[0], TRUE)


def test_three_judges_and_their_reliabilities_are_told_apart():
    rng = np.random.default_rng(2)
    n = 600
    q = rng.normal(size=(n, 2))
    judges = [
        JudgeParameters(slope=2.0, position_bias=1.0, tie=0.5, strong=2.0),
        JudgeParameters(slope=1.5, position_bias=-0.5, tie=0.3, strong=1.5),
        JudgeParameters(slope=1.0, position_bias=0.0, tie=0.7, strong=2.5),
    ]
    sd = (0.0, 0.7, 1.2)
    parts = []
    for number, judge in enumerate(judges):
        shifted = q.copy()
        shifted[:, 0] += rng.normal(size=n) * sd[number]
        parts.append(both_orders(n, rng, judge, number, shifted)[0])
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    model = fit_label_model(observe(*columns), reliability="fitted")
    for found, judge, error in zip(model.judges, judges, sd, strict=True):
        assert abs(found.position_bias - judge.position_bias) < 0.15
        assert abs(found.reliability - 2 / (2 + error**2)) < 0.12


@pytest.mark.slow
@pytest.mark.parametrize("repeated", [0.0, 0.7, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_judge_that_contradicts_itself_around_a_ring_shows_its_repeated_errors(repeated):
    """One judge, three answers a prompt: each pair has an error of its own, in both orders."""
    rng = np.random.default_rng(5)
    n = 1000
    q = rng.normal(size=(n, 3))
    parts = []
    for low, high in [(0, 1), (1, 2), (0, 2)]:
        shown = q[:, [low, high]].copy()
        shown[:, 0] += rng.normal(size=n) * repeated
        (prompt, first, second, judge, grade), _ = both_orders(n, rng, TRUE, 0, shown)
        names = np.array([low, high])
        parts.append((prompt, names[first], names[second], judge, grade))
    seen = observe(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    assert count_rings(seen) == n
    model = fit_label_model(seen, reliability="fitted")
    assert abs(model.judges[0].reliability - 2 / (2 + repeated**2)) < 0.06
    wanted = [(row, i, j) for row in range(n) for i, j in [(0, 1), (1, 2), (0, 2)]]
    found = model.p_prefer(seen, wanted)
    better = np.array([q[row, i] > q[row, j] for row, i, j in wanted])
    sure, right = np.maximum(found.p, 1 - found.p), (found.p > 0.5) == better
    assert abs(sure.mean() - right.mean()) < 0.02
    if repeated:
        trusting = fit_label_model(seen).p_prefer(seen, wanted)
        sure, right = np.maximum(trusting.p, 1 - trusting.p), (trusting.p > 0.5) == better
        assert sure.mean() - right.mean() > 0.02


@pytest.mark.parametrize(
    ("pairs_of_one_prompt", "rings"),
    [
        ([], 0),
        ([(0, 1)], 0),
        ([(0, 1), (1, 0), (0, 1)], 0),
        ([(0, 1), (1, 2)], 0),
        ([(0, 1), (1, 2), (2, 0)], 1),
        ([(0, 1), (1, 2), (2, 3), (3, 0)], 1),
        ([(0, 1), (2, 3), (4, 5), (5, 6), (6, 4)], 1),
        ([(0, 1), (0, 2), (0, 3), (3, 4)], 0),
    ],
)
def test_rings_are_counted(pairs_of_one_prompt, rings):
    first, second = zip(*pairs_of_one_prompt, strict=True) if pairs_of_one_prompt else ((), ())
    n = len(first)
    assert count_rings(observe([7] * n, first, second, [0] * n, [1] * n)) == rings
    # Of two judges each needs its own ring; two prompts have two.
    alternating = [i % 2 for i in range(n)]
    if n == 3:
        assert count_rings(observe([7] * n, first, second, alternating, [1] * n)) == 0
    doubled = observe([7] * n + [8] * n, first * 2, second * 2, [0] * 2 * n, [1] * 2 * n)
    assert count_rings(doubled) == 2 * rings


def test_people_show_an_error_that_the_judge_repeats():
    rng = np.random.default_rng(3)
    n, labelled = 2000, 500
    q = rng.normal(size=(n, 2))
    wrong = q.copy()
    wrong[:, 0] += rng.normal(size=n) * 0.9
    machine, _ = both_orders(n, rng, TRUE, 0, wrong)
    person = JudgeParameters(slope=2.5, position_bias=0.0, tie=0.5, strong=2.0)
    human, _ = both_orders(labelled, rng, person, 1, q[:labelled])
    both = observe(*(np.concatenate(pair) for pair in zip(machine, human, strict=True)))
    trusting = fit_label_model(both, people=[1])
    model = fit_label_model(both, people=[1], reliability="fitted")
    assert trusting.judges[0].reliability == 1.0
    assert abs(model.judges[0].reliability - 2 / (2 + 0.81)) < 3 * model.judges[0].reliability_se
    assert model.judges[1].position_bias == 0.0
    assert model.judges[1].position_bias_se is None

    alone = observe(*machine)
    right = q[labelled:, 0] > q[labelled:, 1]
    gaps = []
    for fitted in (trusting, model):
        p = fitted.p_prefer(alone, pairs(n)).p[labelled:]
        gaps.append(np.maximum(p, 1 - p).mean() - ((p > 0.5) == right).mean())
    assert gaps[0] > 0.04  # overclaims
    assert abs(gaps[1]) < 0.03


@pytest.mark.parametrize("seed", [4, 5])
def test_the_probabilities_are_calibrated_on_pairs(seed):
    columns, gap = both_orders(4000, np.random.default_rng(seed))
    observations = observe(*columns)
    p = fit_label_model(observations).p_prefer(observations, pairs(4000)).p
    sure, right = np.maximum(p, 1 - p), (p > 0.5) == (gap > 0)
    place = np.minimum(((sure - 0.5) * 20).astype(int), 9)
    error = sum(
        abs(sure[place == b].mean() - right[place == b].mean()) * (place == b).mean()
        for b in np.unique(place)
    )
    assert error < 0.03
    assert sure.mean() > 0.8  # says something, too


def test_the_probabilities_are_calibrated_on_pairs_that_were_never_compared():
    observations, q = tournament(250, 6, 7, np.random.default_rng(6))
    model = fit_label_model(observations)
    asked = {
        (p, *sorted((i, j)))
        for p, i, j in zip(
            observations.prompt.tolist(),
            observations.first.tolist(),
            observations.second.tolist(),
            strict=True,
        )
    }
    rest = np.array(
        [
            (prompt, i, j)
            for prompt in range(250)
            for i, j in itertools.combinations(range(6), 2)
            if (prompt, i, j) not in asked
        ]
    )
    found = model.p_prefer(observations, rest)
    truth = q[rest[:, 0], rest[:, 1]] - q[rest[:, 0], rest[:, 2]]
    sure, right = np.maximum(found.p, 1 - found.p), (found.p > 0.5) == (truth > 0)
    assert abs(sure.mean() - right.mean()) < 0.03
    z = (truth - found.mean) / found.sd
    assert abs(z.std() - 1.0) < 0.08


def test_expectation_propagation_agrees_with_brute_force_on_three_answers():
    rows = [(0, 1, 2), (1, 0, 1), (1, 2, -1), (2, 0, 1), (2, 1, 0)]
    observations = observe([0] * 5, [r[0] for r in rows], [r[1] for r in rows], [0] * 5,
                           [r[2] for r in rows])  # fmt: skip
    model = LabelModel(judges=(TRUE,))
    axis = np.linspace(-4.5, 4.5, 91)
    q = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))
    log_density = -0.5 * (q**2).sum(axis=0)
    for first, second, grade in rows:
        log_density = (
            log_density + log_grade_probabilities(TRUE, q[first] - q[second])[..., grade + 2]
        )
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    found = model.p_prefer(observations, [(0, 0, 1), (0, 1, 2), (0, 2, 0)])
    for k, (i, j) in enumerate([(0, 1), (1, 2), (2, 0)]):
        gap = q[i] - q[j]
        p = weight[gap > 1e-9].sum() + 0.5 * weight[np.abs(gap) <= 1e-9].sum()
        mean = (weight * gap).sum()
        assert found.p[k] == pytest.approx(p, abs=0.01)
        assert found.mean[k] == pytest.approx(mean, abs=0.02)
        assert found.sd[k] == pytest.approx(np.sqrt((weight * gap**2).sum() - mean**2), abs=0.02)
    together = beliefs(model, observations, 1, 3)
    np.testing.assert_allclose(
        together.mean[0], [(weight * q[i]).sum() for i in range(3)], atol=0.02
    )


def test_a_pair_on_the_grid_agrees_with_fine_quadrature():
    model = LabelModel(judges=(TRUE,))
    observations = observe([0, 0], [0, 1], [1, 0], [0, 0], [2, 1])
    found = model.p_prefer(observations, [(0, 0, 1)])
    gap = np.linspace(-12, 12, 240_001)
    density = np.exp(
        -(gap**2) / 4
        + log_grade_probabilities(TRUE, gap)[:, 4]
        + log_grade_probabilities(TRUE, -gap)[:, 3]
    )
    density /= density.sum()
    assert found.p[0] == pytest.approx(density[gap > 0].sum(), abs=1e-4)
    assert found.mean[0] == pytest.approx((density * gap).sum(), abs=1e-4)


def test_swapped_names_give_exactly_one_minus_p():
    columns, _ = both_orders(300, np.random.default_rng(7))
    prompt, first, second, judge, grade = columns
    model = fit_label_model(observe(*columns))
    turned = prompt % 3 == 0
    other = observe(prompt, np.where(turned, 1 - first, first),
                    np.where(turned, 1 - second, second), judge, grade)  # fmt: skip
    again = fit_label_model(other)
    assert again.judges == model.judges
    p = model.p_prefer(observe(*columns), pairs(300)).p
    q = again.p_prefer(other, pairs(300)).p
    flipped = np.arange(300) % 3 == 0
    assert (q[~flipped] == p[~flipped]).all()
    assert (q[flipped] == 1.0 - p[flipped]).all()


def test_asking_for_a_pair_backwards_gives_exactly_one_minus_p_with_more_answers():
    observations, _ = tournament(20, 5, 6, np.random.default_rng(8))
    model = prior_label_model()
    forward = [
        (prompt, i, j) for prompt in range(20) for i, j in itertools.combinations(range(5), 2)
    ]
    backward = [(prompt, j, i) for prompt, i, j in forward]
    there, back = model.p_prefer(observations, forward), model.p_prefer(observations, backward)
    assert (back.p == 1.0 - there.p).all()
    assert (back.mean == -there.mean).all()
    assert (back.sd == there.sd).all()


def test_the_order_of_the_rows_changes_nothing():
    for observations, k in (
        (tournament(30, 4, 5, np.random.default_rng(9))[0], 4),
        (observe(*both_orders(60, np.random.default_rng(10))[0]), 2),
    ):
        shuffle = np.random.default_rng(11).permutation(len(observations))
        mixed = observe(*(getattr(observations, name)[shuffle]
                          for name in observations.__struct_fields__))  # fmt: skip
        model, again = fit_label_model(observations), fit_label_model(mixed)
        assert again == model
        wanted = [(prompt, 0, k - 1) for prompt in range(30)]
        assert (again.p_prefer(mixed, wanted).p == model.p_prefer(observations, wanted).p).all()


verdicts = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(1, 3),
        st.integers(0, 1),
        st.integers(-2, 2),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=25, deadline=None)
@given(verdicts, st.randoms(use_true_random=False))
def test_any_verdicts_give_probabilities_that_are_symmetric_and_ignore_row_order(rows, random):
    rows = [(p, i, (i + step) % 4, judge, grade) for p, i, step, judge, grade in rows]
    model = prior_label_model(2)
    wanted = [(p, i, j) for p in range(5) for i, j in itertools.permutations(range(4), 2)]
    found = model.p_prefer(observe(*zip(*rows, strict=True)), wanted)
    assert ((found.p > 0) & (found.p < 1)).all()
    assert (found.sd > 0).all()
    by_pair = dict(zip(wanted, found.p.tolist(), strict=True))
    for (p, i, j), value in by_pair.items():
        if i < j:
            assert by_pair[p, j, i] == 1.0 - value
        if p == 4:
            assert value == 0.5  # nothing is known of this prompt
    random.shuffle(rows)
    again = model.p_prefer(observe(*zip(*rows, strict=True)), wanted)
    assert (again.p == found.p).all()


@settings(max_examples=12, deadline=None)
@given(verdicts)
def test_any_small_run_can_be_fitted_and_saved(rows):
    rows = [(p, i, (i + step) % 4, judge, grade) for p, i, step, judge, grade in rows]
    model = fit_label_model(observe(*zip(*rows, strict=True)), n_judges=2)
    for judge in model.judges:
        assert np.isfinite([judge.slope, judge.position_bias, judge.tie, judge.strong]).all()
    assert msgspec.json.decode(msgspec.json.encode(model), type=LabelModel) == model


@pytest.mark.parametrize(
    ("grades", "most"),
    [
        ([0] * 10, 0.501),  # all ties, both orders
        ([2, -2] * 5, 0.999),  # five unanimous pairs
        ([1] * 10, 0.501),  # always the first place
    ],
)
def test_five_pairs_are_fitted_without_overclaiming(grades, most):
    prompt = np.repeat(np.arange(5), 2)
    first = np.tile([0, 1], 5)
    observations = observe(prompt, first, 1 - first, np.zeros(10), grades)
    model = fit_label_model(observations)
    assert model.judges[0].slope_se > 0.2
    assert model.judges[0].slope < 6
    p = model.p_prefer(observations, pairs(5)).p
    assert (np.maximum(p, 1 - p) <= most).all()


def test_one_order_only_leaves_the_bias_near_the_share_of_first_verdicts():
    # First verdicts of one order: the fit cannot tell bias from "a is better", and stays modest.
    n = 50
    observations = observe(np.arange(n), np.zeros(n), np.ones(n), np.zeros(n), np.ones(n))
    model = fit_label_model(observations)
    assert model.judges[0].position_bias > 0.5
    assert model.p_prefer(observations, [(0, 0, 1)]).p[0] < 0.8


def test_no_verdicts_give_the_prior():
    model = fit_label_model(observe([], [], [], [], []), n_judges=2)
    assert model == prior_label_model(2)
    assert model.judges[0].n_verdicts == 0
    assert model.p_prefer(observe([], [], [], [], []), [(9, 0, 1)]).p.tolist() == [0.5]
    assert len(model.p_prefer(observe([], [], [], [], []), []).p) == 0
    found = beliefs(model, observe([], [], [], [], []), 2, 3)
    assert found.mean.tolist() == [[0.0] * 3] * 2


def test_a_judge_without_verdicts_keeps_the_prior():
    columns, _ = both_orders(50, np.random.default_rng(12))
    model = fit_label_model(observe(*columns), n_judges=3)
    prior = prior_label_model(3)
    assert model.judges[1:] == prior.judges[1:]
    assert model.judges[0].n_verdicts == 100


def test_starting_from_an_earlier_fit_ends_at_the_same_place():
    columns, _ = both_orders(500, np.random.default_rng(13))
    observations = observe(*columns)
    model = fit_label_model(observations)
    again = fit_label_model(observations, start=prior_label_model())
    warm = fit_label_model(observations, start=model)
    for other in (again, warm):
        assert other.judges[0].slope == pytest.approx(model.judges[0].slope, rel=1e-3)
        assert other.log_likelihood == pytest.approx(model.log_likelihood, abs=1e-3)


def test_a_less_reliable_judge_is_believed_less():
    observations = observe([0, 0], [0, 1], [1, 0], [0, 0], [2, -2])
    p = [
        LabelModel(judges=(msgspec.structs.replace(TRUE, reliability=r),))
        .p_prefer(observations, [(0, 0, 1)])
        .p[0]
        for r in (1.0, 0.8, 0.5, 0.1)
    ]
    assert p == sorted(p, reverse=True)
    assert p[0] > 0.95
    assert 0.5 < p[-1] < 0.7


def test_the_share_of_first_verdicts_among_equals_follows_the_bias():
    assert prior_label_model().judges[0].first_share_of_equals == 0.5
    assert TRUE.first_share_of_equals > 0.6


def test_probabilities_become_grades_symmetrically():
    p = np.array([0.0, 0.05, 0.2, 0.45, 0.5, 0.55, 0.8, 0.95, 1.0])
    grades = grade_from_p_first(p)
    assert grades.tolist() == [-2, -2, -1, 0, 0, 0, 1, 2, 2]
    assert (grade_from_p_first(1 - p) == -grades).all()
    with pytest.raises(ValueError, match="probabilities"):
        grade_from_p_first([0.5, float("nan")])


def test_every_unusable_row_is_named_at_once():
    with pytest.raises(DataError) as caught:
        observe([0, 0, 0], [0, 1, 0], [0, 0, 1], [0, -1, 0], [1, 1, 3])
    text = str(caught.value)
    assert "row 0: an answer is compared with itself" in text
    assert "row 1: the judge's number is negative" in text
    assert "row 2: the grade is not in -2 .. 2" in text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([0], [0], [1], [0], [None]), "grade: expected a list of whole numbers"),
        (([0], [0], [1], [0], [float("nan")]), "a failed verdict"),
        (([0], [0], [1], [0], [0.5]), "whole numbers"),
        (([0, 1], [0], [1], [0], [1]), "equal length"),
    ],
)
def test_columns_that_are_no_verdicts_are_refused(columns, message):
    with pytest.raises(DataError, match=message):
        observe(*columns)


def test_wrong_arguments_are_refused():
    observations = observe([0], [0], [1], [1], [1])
    with pytest.raises(ValueError, match="verdicts name judge 1"):
        fit_label_model(observations, n_judges=1)
    with pytest.raises(ValueError, match="people must be judges"):
        fit_label_model(observations, people=[2])
    with pytest.raises(ValueError, match="two judges"):
        fit_label_model(observations, reliability="fitted")
    with pytest.raises(ValueError, match="reliability must be"):
        fit_label_model(observations, reliability=0.0)
    with pytest.raises(ValueError, match="start has 1 judge"):
        fit_label_model(observations, start=prior_label_model(1))
    with pytest.raises(DataError, match="name judge 1"):
        prior_label_model(1).p_prefer(observations, [(0, 0, 1)])
    with pytest.raises(ValueError, match="i != j"):
        prior_label_model(2).p_prefer(observations, [(0, 1, 1)])
    with pytest.raises(ValueError, match="n_judges"):
        prior_label_model(0)
    with pytest.raises(ValueError, match="every answer"):
        beliefs(prior_label_model(2), observe([0], [0], [5], [0], [1]), 1, 3)
    with pytest.raises(ValueError, match="0 < tie < strong"):
        JudgeParameters(slope=1.0, position_bias=0.0, tie=2.0, strong=1.0)
