"""The stopping policy: what it promises is what it brings, and no fixed rule does better."""

import itertools

import numpy as np
import pytest

from prefopt.label_model import JudgeParameters, LabelModel, observe
from prefopt.labelling.judge_likelihood import GAP, PRIOR_WEIGHT, log_grade_probabilities
from prefopt.labelling.pair_policy import MAX_SLOTS, pair_slots, solve_pair_policy

JUDGE = JudgeParameters(slope=1.5, position_bias=0.6, tie=0.5, strong=2.0)
MODEL = LabelModel(judges=(JUDGE,))


def play(policy, judges, n, seed=0):
    """Follow the policy on simulated pairs; returns p, whether it is right, and the price of all."""
    rng = np.random.default_rng(seed)
    gap = rng.normal(size=n) * np.sqrt(2)
    answers = np.zeros((n, len(policy.slots)), dtype=np.int64)
    draw = rng.random(n)
    blocked = np.zeros(answers.shape, dtype=bool)
    price = 0.0
    while True:
        chosen, _ = policy.next_slots(answers, blocked, draw)
        asked = np.flatnonzero(chosen >= 0)
        if not len(asked):
            break
        for row in asked:
            slot = policy.slots[chosen[row]]
            judge = judges[slot.judge]
            latent = judge.slope * gap[row] * (1 - 2 * slot.order) + judge.position_bias
            latent += rng.logistic()
            size = abs(latent)
            answers[row, chosen[row]] = 3 + int(np.sign(latent)) * (
                int(size > judge.tie) + int(size > judge.strong)
            )
            price += policy.prices[slot.judge]
    rows, slots = np.nonzero(answers)
    order = np.array([slot.order for slot in policy.slots])[slots]
    number = np.array([slot.judge for slot in policy.slots])[slots]
    verdicts = observe(rows, order, 1 - order, number, answers[rows, slots] - 3)
    p = LabelModel(judges=judges).p_prefer(verdicts, [(row, 0, 1) for row in range(n)]).p
    return p, (p > 0.5) == (gap > 0), price


def test_two_questions_a_pair_reach_96_percent_at_3_7_calls_a_kept_pair():
    policy = solve_pair_policy(MODEL, goal="price_per_kept", target=3.7)
    assert policy.reachable
    assert policy.price_per_kept == pytest.approx(3.7)
    assert 0.961 < policy.accuracy < 0.964
    cheap = solve_pair_policy(MODEL, goal="price_per_kept", target=2.0)
    assert 0.904 < cheap.accuracy < 0.907


def test_the_promise_is_kept_on_simulated_pairs():
    policy = solve_pair_policy(MODEL, goal="accuracy", target=0.95)
    p, right, price = play(policy, (JUDGE,), 6000)
    sure = np.maximum(p, 1 - p)
    keep = sure >= policy.least_p
    assert policy.accuracy == pytest.approx(0.95, abs=1e-6)
    assert right[keep].mean() == pytest.approx(sure[keep].mean(), abs=0.015)
    assert price / keep.sum() == pytest.approx(policy.price_per_kept, rel=0.1)


def test_no_fixed_rule_is_cheaper_at_its_own_accuracy():
    grades = np.exp(log_grade_probabilities(JUDGE, GAP))
    back = np.exp(log_grade_probabilities(JUDGE, -GAP))
    rules = {
        "agree": lambda g, h: np.sign(g) == np.sign(h) != 0,
        "mean": lambda g, h: abs(g + h) >= 2,
        "lean": lambda g, h: g + h != 0,
    }
    for rule in rules.values():
        kept = hits = 0.0
        for x, y in itertools.product(range(5), repeat=2):
            g, h = x - 2, 2 - y  # both in favour of the pair's first answer
            if rule(g, h):
                weight = PRIOR_WEIGHT * grades[:, x] * back[:, y]
                kept += weight.sum()
                sign = np.sign(g + h)
                hits += weight[GAP * sign > 1e-9].sum() + 0.5 * weight[np.abs(GAP) < 1e-9].sum()
        policy = solve_pair_policy(MODEL, goal="accuracy", target=hits / kept)
        assert policy.price_per_kept < 2 / kept + 1e-6


def test_more_samples_never_hurt_and_more_accuracy_costs_more():
    prices = [
        solve_pair_policy(MODEL, goal="accuracy", target=target).price_per_kept
        for target in (0.85, 0.9, 0.95, 0.97)
    ]
    assert prices == sorted(prices)
    once, twice = (
        solve_pair_policy(MODEL, goal="accuracy", target=0.96, samples=samples).price_per_kept
        for samples in (1, 2)
    )
    assert twice < once


def test_a_cheap_judge_goes_first_and_saves_money():
    strong = JudgeParameters(slope=3.0, position_bias=0.0, tie=0.5, strong=2.0)
    both = LabelModel(judges=(JUDGE, strong))
    cascade = solve_pair_policy(both, goal="accuracy", target=0.95, prices=(0.05, 1.0))
    alone = solve_pair_policy(LabelModel(judges=(strong,)), goal="accuracy", target=0.95)
    assert cascade.price_per_kept < 0.7 * alone.price_per_kept
    nothing = np.zeros((20, 4), dtype=np.int64)
    chosen, _ = cascade.next_slots(nothing, nothing > 0, np.linspace(0, 0.99, 20))
    assert {cascade.slots[k].judge for k in chosen} == {0}


def test_repeating_a_judge_that_repeats_its_errors_is_worth_less():
    weak = LabelModel(
        judges=(
            JudgeParameters(slope=1.5, position_bias=0.6, tie=0.5, strong=2.0, reliability=0.6),
        )
    )
    policy = solve_pair_policy(weak, goal="accuracy", target=0.97)
    assert not policy.reachable
    assert policy.accuracy < 0.95
    assert policy.keep_share > 0


def test_both_orders_come_first_equally_often_without_a_bias():
    fair = LabelModel(judges=(JudgeParameters(slope=1.5, position_bias=0.0, tie=0.5, strong=2.0),))
    for model in (fair, MODEL):
        policy = solve_pair_policy(model, goal="accuracy", target=0.95)
        n = 2000
        nothing = np.zeros((n, 2), dtype=np.int64)
        chosen, _ = policy.next_slots(nothing, nothing > 0, np.random.default_rng(0).random(n))
        assert 0.45 < chosen.mean() < 0.55


def test_a_blocked_slot_is_never_chosen():
    policy = solve_pair_policy(MODEL, goal="accuracy", target=0.96)
    blocked = np.array([[True, False], [False, True], [True, True]])
    chosen, _ = policy.next_slots(np.zeros((3, 2), dtype=np.int64), blocked, np.full(3, 0.5))
    assert chosen[0] in (-1, 1)
    assert chosen[1] in (-1, 0)
    assert chosen[2] == -1


def test_the_slots_are_bounded_and_arguments_are_checked():
    assert len(pair_slots(3)) == MAX_SLOTS
    with pytest.raises(ValueError, match="8 questions a pair"):
        pair_slots(4)
    with pytest.raises(ValueError, match="target accuracy"):
        solve_pair_policy(MODEL, goal="accuracy", target=1.0)
    with pytest.raises(ValueError, match="1 positive number"):
        solve_pair_policy(MODEL, goal="accuracy", target=0.9, prices=(1.0, 2.0))
