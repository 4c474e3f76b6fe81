"""A training log in plain language: each finding appears when it should and not otherwise."""

import math

import pytest

from prefopt.training.dpo import default_learning_rate
from prefopt.training.health import TrainingPoint, diagnose


def log(n=20, *, margin=1.0, accuracy=0.8, chosen_reward=0.0, chosen_logp=-50.0, loss=0.4):
    """A run of n steps that rises linearly to the given values; beta is 0.1 in all tests."""
    return [
        TrainingPoint(
            step=i + 1,
            epoch=(i + 1) / n,
            loss=loss,
            margin=margin * (i + 1) / n,
            accuracy=0.5 + (accuracy - 0.5) * (i + 1) / n,
            chosen_reward=chosen_reward * (i + 1) / n,
            rejected_reward=0.0,
            chosen_logp=chosen_logp,
            rejected_logp=-60.0,
            learning_rate=1e-5,
            grad_norm=1.0,
        )
        for i in range(n)
    ]


def levels(points, **options):
    return [note.level for note in diagnose(points, beta=0.1, **options)]


def test_a_sound_run_has_only_good_notes():
    assert set(levels(log())) == {"ok"}


@pytest.mark.parametrize(
    ("points", "level", "says"),
    [
        # The chosen reward falls to -1, so log-probability by 10 nats of about 40: a quarter.
        (log(chosen_reward=-1.0), "warning", "became less likely"),
        (log(margin=30.0), "problem", "far from its reference"),
        (log(margin=-0.5), "problem", "does not prefer the chosen"),
        (log(margin=0.02), "warning", "barely moved"),
        (log(accuracy=0.5), "warning", "close to chance"),
        (log(loss=math.nan), "problem", "not usable"),
    ],
)
def test_each_finding_is_told_with_what_to_do(points, level, says):
    (note, *_) = [n for n in diagnose(points, beta=0.1) if says in n.message]
    assert note.level == level


def test_accuracy_that_saturates_at_once_points_to_trivial_pairs():
    points = [p.__class__(**{**{f: getattr(p, f) for f in p.__struct_fields__}, "accuracy": 1.0})
              for p in log()]  # fmt: skip
    assert any("trivial" in n.message for n in diagnose(points, beta=0.1))


def test_lengths_that_differ_much_are_a_warning():
    assert "warning" in levels(log(), words_chosen=20, words_rejected=60)
    assert "warning" not in levels(log(), words_chosen=50, words_rejected=60)


def test_one_noisy_last_batch_does_not_condemn_a_run():
    points = log(14, margin=0.5)
    last = points[-1]
    fields = {f: getattr(last, f) for f in last.__struct_fields__}
    points[-1] = TrainingPoint(**{**fields, "margin": -0.8, "accuracy": 0.0})
    assert "problem" not in levels(points)


def test_an_empty_log_says_so():
    assert levels([]) == ["warning"]


@pytest.mark.parametrize(
    ("n_parameters", "rate"), [(135e6, 5e-5), (1.5e9, 2e-5), (8e9, 1e-5), (70e9, 5e-6)]
)
def test_the_default_learning_rate_falls_with_size(n_parameters, rate):
    assert default_learning_rate(int(n_parameters)) == rate
