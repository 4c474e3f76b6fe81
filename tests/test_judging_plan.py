"""The plan: it ends, never asks twice, is the same every time, and spends calls well."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import quality_labels
from prefopt.judging_plan import (
    Asked,
    PlanSettings,
    PromptState,
    choose_pairs,
    next_questions,
    observations_of,
)
from prefopt.label_model import JudgeParameters, LabelModel, beliefs, prior_label_model

MODEL = LabelModel(judges=(JudgeParameters(slope=1.5, position_bias=0.6, tie=0.5, strong=2.0),))


def run(model, sizes, plan, answer):
    """Ask until the plan ends; `answer(question)` gives a grade or None. Returns states and waves."""
    asked = {str(row): [] for row in range(len(sizes))}
    waves = []
    while True:
        states = [PromptState(str(row), k, tuple(asked[str(row)])) for row, k in enumerate(sizes)]
        questions = next_questions(model, states, plan)
        if not questions:
            return states, waves
        waves.append(questions)
        assert len(waves) < 400, "the plan does not end"
        for q in questions:
            asked[q.key].append(Asked(q.first, q.second, q.judge, answer(q), q.sample))


plans = st.builds(
    PlanSettings,
    goal=st.just("accuracy"),
    target=st.sampled_from([0.8, 0.95, 0.99]),
    samples=st.integers(1, 2),
    pilot=st.integers(0, 3),
    select=st.sampled_from(["best_and_worst", "pairs"]),
    calls_per_answer=st.sampled_from([0.3, 1.0, 3.0, 50.0]),
    least_gain=st.sampled_from([0.0, 0.01]),
    per_wave=st.integers(1, 3),
    seed=st.integers(0, 3),
)
sizes_of_prompts = st.lists(st.sampled_from([2, 2, 3, 4]), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None)
@given(plans, sizes_of_prompts, st.randoms(use_true_random=False))
def test_the_plan_ends_and_never_asks_the_same_question_twice(plan, sizes, random):
    grades = [-2, -1, 0, 1, 2, None]
    states, waves = run(prior_label_model(), sizes, plan, lambda q: random.choice(grades))
    for state, k in zip(states, sizes, strict=True):
        seen = Counter((a.first, a.second, a.judge, a.sample) for a in state.asked)
        assert max(seen.values(), default=1) == 1
        assert all(a.first != a.second and a.sample < plan.samples for a in state.asked)
        if k > 2:
            assert len(state.asked) <= plan.calls_per_answer * k + 1e-9
    assert all(waves)


def test_the_same_verdicts_give_the_same_questions_in_any_order_of_prompts():
    states = [PromptState(str(row), 2 + row % 3) for row in range(12)]
    there = next_questions(MODEL, states, PlanSettings())
    again = next_questions(MODEL, states, PlanSettings())
    back = next_questions(MODEL, states[::-1], PlanSettings())
    assert there == again
    assert sorted(map(str, there)) == sorted(map(str, back))
    other = next_questions(MODEL, states, PlanSettings(seed=1))
    assert other != there


def test_the_first_place_is_drawn_at_random():
    two = [PromptState(str(row), 2) for row in range(400)]
    first = [q.first for q in next_questions(prior_label_model(), two, PlanSettings(pilot=0))]
    assert 0.4 < np.mean(first) < 0.6
    four = [PromptState(str(row), 4) for row in range(200)]
    swapped = [q.first > q.second for q in next_questions(prior_label_model(), four)]
    assert 0.4 < np.mean(swapped) < 0.6


def test_a_pilot_is_seen_by_every_judge_in_both_orders_first():
    states = [PromptState(str(row), 2) for row in range(100)]
    questions = next_questions(prior_label_model(2), states, PlanSettings(pilot=15))
    count = Counter(q.key for q in questions)
    assert len(count) == 10  # a tenth of all, no more
    assert set(count.values()) == {4}
    alone = Counter(q.key for q in next_questions(prior_label_model(1), states, PlanSettings()))
    assert Counter(alone.values()) == {2: 10, 1: 90}


def test_the_first_wave_shows_each_of_many_answers_once():
    (first,) = {q.key for q in next_questions(MODEL, [PromptState("p", 8)])}
    assert first == "p"
    shown = [a for q in next_questions(MODEL, [PromptState("p", 8)]) for a in (q.first, q.second)]
    assert sorted(shown) == list(range(8))


def test_a_cheap_judge_is_asked_before_a_dear_one():
    strong = JudgeParameters(slope=3.0, position_bias=0.0, tie=0.5, strong=2.0)
    cheap = JudgeParameters(slope=1.2, position_bias=0.6, tie=0.5, strong=2.0, reliability=0.7)
    model = LabelModel(judges=(cheap, strong))
    for k in (2, 5):
        plan = PlanSettings(prices=(0.05, 1.0), pilot=0)
        questions = next_questions(model, [PromptState("p", k)], plan)
        assert {q.judge for q in questions} == {0}
    plan = PlanSettings(target=0.97, prices=(0.05, 1.0), pilot=0)
    passed_on = {
        (x, y)
        for x, y in itertools.product(range(-2, 3), repeat=2)
        for state in [PromptState("p", 2, (Asked(0, 1, 0, x), Asked(1, 0, 0, y)))]
        if any(q.judge == 1 for q in next_questions(model, [state], plan))
    }
    assert passed_on
    assert (0, 0) not in passed_on  # a tie is dropped, not bought an opinion for
    assert all((y, x) in passed_on for x, y in passed_on)  # whichever answer was shown first


def test_a_failed_question_is_left_to_the_judge():
    state = PromptState("p", 2, (Asked(0, 1, 0, None),))
    for question in next_questions(MODEL, [state], PlanSettings(target=0.96, pilot=0)):
        assert (question.first, question.second) == (1, 0)
    both = PromptState("p", 2, (Asked(0, 1, 0, None), Asked(1, 0, 0, None)))
    assert next_questions(MODEL, [both]) == []
    assert len(observations_of([state, both])) == 0


def test_best_and_worst_of_eight_are_found_with_a_quarter_of_round_robins_calls():
    rng = np.random.default_rng(0)
    n, k = 60, 8
    q = rng.normal(size=(n, k))
    judge = MODEL.judges[0]

    def answer(question):
        gap = q[int(question.key), question.first] - q[int(question.key), question.second]
        latent = judge.slope * gap + judge.position_bias + rng.logistic()
        return int(np.sign(latent)) * (
            int(abs(latent) > judge.tie) + int(abs(latent) > judge.strong)
        )

    states, _ = run(MODEL, [k] * n, PlanSettings(per_wave=2), answer)
    calls = sum(len(state.asked) for state in states) / n
    mean = beliefs(MODEL, observations_of(states), n, k).mean
    rows = np.arange(n)
    gap = q[rows, mean.argmax(1)] - q[rows, mean.argmin(1)]
    assert 8 < calls <= 18
    assert gap.mean() > 0.85 * (q.max(1) - q.min(1)).mean()
    assert (gap > 0).mean() > 0.95


def test_the_surest_pairs_are_kept_and_equals_are_drawn_by_a_hash():
    p = np.array([0.99, 0.9, 0.9, 0.9, 0.9, 0.6])
    keys = list("abcdef")
    keep = choose_pairs(p, keys, goal="accuracy", target=0.93)
    assert keep.sum() == 3
    assert keep[0]
    assert not keep[5]
    turned = choose_pairs(p[::-1], keys[::-1], goal="accuracy", target=0.93)
    assert (turned[::-1] == keep).all()
    assert choose_pairs(p, keys, goal="price_per_kept", target=3.0, spent=11.0).sum() == 4
    assert choose_pairs(p, keys, goal="accuracy", target=0.999).sum() == 0
    assert choose_pairs(np.zeros(0), [], goal="accuracy", target=0.9).sum() == 0
    with pytest.raises(ValueError, match="a key for each pair"):
        choose_pairs(p, ["a"], goal="accuracy", target=0.9)


def test_states_that_cannot_be_are_all_named():
    states = [
        PromptState("one", 1),
        PromptState("twice", 2, (Asked(0, 1, 0, 1), Asked(0, 1, 0, 1))),
        PromptState("who", 2, (Asked(0, 1, 7, 1),)),
        PromptState("what", 2, (Asked(0, 2, 0, 1),)),
        PromptState("grade", 2, (Asked(0, 1, 0, 3),)),
        PromptState("one", 2),
    ]
    with pytest.raises(ValueError, match="cannot be") as caught:
        next_questions(MODEL, states)
    for text in ("1 answer(s)", "asked twice", "no judge 7", "no pair", "not in -2", "there twice"):
        assert text in str(caught.value)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="samples must be at least 1; prices must be positive"):
        PlanSettings(samples=0, prices=(0.0,))
    with pytest.raises(ValueError, match="prices must name 1 judge"):
        next_questions(MODEL, [PromptState("p", 2)], PlanSettings(prices=(1.0, 2.0)))
    more = PromptState("p", 2, (Asked(0, 1, 0, 1, 1),))
    with pytest.raises(ValueError, match="sample 1 was asked"):
        next_questions(MODEL, [more])


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_what_it_prints(tmp_path, capsys):
    quality_labels.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert (tmp_path / "quality_labels.md").read_text(encoding="utf-8") in printed
    report = json.loads((tmp_path / "quality_labels.json").read_text(encoding="utf-8"))
    rows = report["results"]["pairs"]
    assert {row["world"] for row in rows} == {quality_labels.REFERENCE}
    assert all(0.5 < row["accuracy"] <= 1 and 0 < row["yield"] <= 1 for row in rows)
