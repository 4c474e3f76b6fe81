"""What a PPO log means: each finding on a log that shows it, and silence on one that does not."""

import math

import pytest

from prefopt.training.ppo_health import (
    GoldPoint,
    PPOPoint,
    diagnose_ppo,
    gold_points,
    ppo_findings_so_far,
    ppo_points,
)


def log(n=20, **changes):
    """A healthy run: the score rises, KL stays near 5 nats; `changes` are functions of progress."""
    healthy = {
        "score": lambda t: t,
        "kl": lambda t: 5 * t,
        "length": lambda t: 20.0,
        "entropy": lambda t: 2.0 - 0.5 * t,
        "rlhf_reward": lambda t: 0.8 * t,
        "kl_coef": lambda t: 0.05,
        "ended": lambda t: 0.9,
        "failed": lambda t: 0.0,
        "explained_variance": lambda t: 0.5,
        "clipfrac": lambda t: 0.1,
        "approxkl": lambda t: 0.01,
        "engine_gap": lambda t: 0.02,
    }
    return [
        PPOPoint(step=4 * i, **{k: f(i / (n - 1)) for k, f in {**healthy, **changes}.items()})
        for i in range(n)
    ]


def checks(points, **about):
    return {note.check: note.level for note in diagnose_ppo(points, **about)}


def test_a_healthy_run():
    (note,) = diagnose_ppo(log())
    assert note.level == "ok"
    assert "Nothing in the log calls for a change" in note.message
    assert ppo_findings_so_far(log()) == ()


def test_nothing_logged():
    assert diagnose_ppo([])[0].message == "Nothing was logged, so nothing can be said."
    assert ppo_findings_so_far([]) == ()


@pytest.mark.parametrize(
    ("check", "level", "changes"),
    [
        ("finite", "problem", {"score": lambda t: math.nan}),
        ("kl", "problem", {"kl": lambda t: 60 * t}),
        ("objective", "problem", {"rlhf_reward": lambda t: -t}),
        ("engine", "warning", {"engine_gap": lambda t: 0.2 * t}),
        ("engine", "problem", {"engine_gap": lambda t: 0.01 + t}),
        ("entropy", "warning", {"entropy": lambda t: 2 - 1.5 * t}),
        ("entropy", "problem", {"entropy": lambda t: 2 * math.exp(-6 * t)}),
        ("value", "warning", {"explained_variance": lambda t: -0.3}),
        ("length", "warning", {"length": lambda t: 20 + 40 * t}),
        ("length", "warning", {"length": lambda t: 20 - 15 * t}),
        ("cut_off", "warning", {"ended": lambda t: 0.2}),
        ("failed", "warning", {"failed": lambda t: 0.2}),
        ("steps", "warning", {"clipfrac": lambda t: 0.6}),
        ("stall", "warning", {"score": lambda t: 0.0}),
    ],
)
def test_each_finding(check, level, changes):
    assert checks(log(**changes))[check] == level


def test_a_longer_answer_with_a_higher_score_is_told_as_such():
    (note,) = [n for n in diagnose_ppo(log(length=lambda t: 20 + 40 * t)) if n.check == "length"]
    assert "reward hacking by length" in note.message


def test_a_target_that_is_missed():
    assert checks(log(kl=lambda t: 15 * t), kl_target=6.0)["kl_target"] == "warning"
    assert "kl_target" not in checks(log(kl=lambda t: 15 * t))


def test_a_score_that_rises_while_the_held_out_measure_falls():
    falls = [GoldPoint(step=20, value=0.6), GoldPoint(step=70, value=0.5)]
    (note,) = [n for n in diagnose_ppo(log(), gold=falls) if n.check == "hacking"]
    assert note.level == "problem"
    assert "(step 20)" in note.message
    rises = [GoldPoint(step=20, value=0.5), GoldPoint(step=70, value=0.6)]
    assert "hacking" not in checks(log(), gold=rises)


def test_a_stricter_kl_coefficient_is_no_wrong_way():
    changes = {"rlhf_reward": lambda t: -t, "kl_coef": lambda t: 0.05 * (1 + t)}
    assert "objective" not in checks(log(**changes))


def test_answers_of_a_fixed_length_are_not_cut_off():
    assert "cut_off" not in checks(log(ended=lambda t: 0.0), cuts_off=False)


def test_points_of_a_trainers_log():
    history = [
        {"step": 4, "loss": 1.0, "objective/scores": 0.5, "objective/kl": 1.0, "rollout/length": 9,
         "objective/entropy": 2.0, "objective/rlhf_reward": 0.4, "policy/clipfrac": 0.1},
        {"step": 5, "loss": 1.0},
        {"step": 5, "eval_win_rate": 0.6},
        {"step": 6, "eval_win_rate": math.nan},
    ]  # fmt: skip
    (point,) = ppo_points(history)
    assert (point.step, point.score, point.clipfrac, point.ended) == (4, 0.5, 0.1, None)
    assert gold_points(history) == (GoldPoint(step=5, value=0.6),)
