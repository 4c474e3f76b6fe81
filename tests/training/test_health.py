"""A training log in plain language: each finding appears when it should and not otherwise."""

import math
import random

import msgspec
import pytest

from prefopt.training.dpo import default_learning_rate
from prefopt.training.health import (
    EvaluationPoint,
    TrainingPoint,
    diagnose,
    evaluation_points,
    findings_so_far,
    training_points,
)


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


def changed(points, **columns):
    """The log with whole columns replaced; a column is a list or one value."""
    return [
        msgspec.structs.replace(
            p, **{name: v[i] if isinstance(v, list) else v for name, v in columns.items()}
        )
        for i, p in enumerate(points)
    ]


def norms(*last):
    """A run of 20 steps with these gradient norms at its end, and 1 before."""
    return changed(log(), grad_norm=[1.0] * (20 - len(last)) + list(last))


def noise(n, mean, width, seed=0):
    draw = random.Random(seed)
    return [mean + draw.uniform(-width, width) for _ in range(n)]


def evaluations(accuracies=None, losses=None, n_rows=None):
    n = len(accuracies or losses)
    return [
        EvaluationPoint(
            step=5 * (i + 1),
            accuracy=accuracies and accuracies[i],
            loss=losses and losses[i],
            n_rows=n_rows,
        )
        for i in range(n)
    ]


FALLING = [1.0 - 0.03 * i for i in range(20)]
FLAT = changed(log(), margin=noise(20, 0.06, 0.02), accuracy=0.52)

# check, level, words it must say, the log, the evaluations; both functions must tell all of these.
FINDINGS = [
    ("loss", "problem", "not usable", changed(log(), loss=[0.5] * 19 + [math.nan]), []),
    ("chosen", "warning", "became less likely", log(chosen_reward=-1.0), []),
    ("margin", "problem", "far from its reference", log(margin=30.0), []),
    ("gradient_zero", "problem", "is 0 since step 18", norms(*[0.0] * 3), []),
    ("gradient_zero", "problem", "is 2e-07 since step 18", norms(*[2e-7] * 3), []),
    ("gradient_not_finite", "problem", "most of the last steps", norms(*[math.inf] * 3), []),
    ("gradient_not_finite", "warning", "inf at step 2", norms(math.inf, *[1.0] * 18), []),
    ("gradient_growing", "warning", "grew from 1 to 30", norms(*[30.0] * 5), []),
    ("entropy", "warning", "fell from", changed(log(), entropy=FALLING), []),
    ("accuracy", "warning", "trivial", changed(log(), accuracy=1.0), []),
    ("stall", "warning", "Learning stalls", FLAT, []),
    ("overfitting", "warning", "checkpoint of step 5", log(), evaluations([0.7, 0.66, 0.64])),
    (
        "overfitting",
        "warning",
        "rose from 0.600 at step 5",
        changed(log(), loss=FALLING),
        evaluations(None, [0.6, 0.65, 0.7]),
    ),
]


@pytest.mark.parametrize(("check", "level", "says", "points", "held_out"), FINDINGS)
def test_what_holds_already_is_said_during_and_after_training(check, level, says, points, held_out):
    for notes in (
        findings_so_far(points, beta=0.1, evaluations=held_out),
        diagnose(points, beta=0.1, evaluations=held_out),
    ):
        (note,) = [n for n in notes if n.check == check]
        assert note.level == level
        assert says in note.message


def test_a_run_that_moves_to_the_rejected_answers_is_a_problem_before_its_end():
    points = changed(log(), margin=noise(20, -0.3, 0.2), accuracy=0.4)
    (note,) = [n for n in findings_so_far(points, beta=0.1) if n.check == "margin"]
    assert (note.level, "exchanged" in note.message) == ("problem", True)
    # The same mean with noise that explains it is no finding.
    wide = changed(log(), margin=noise(20, -0.3, 4.0))
    assert not [n for n in findings_so_far(wide, beta=0.1) if n.check == "margin"]


@pytest.mark.parametrize(
    ("points", "held_out"),
    [
        (log(), []),
        (log(5, margin=0.01, accuracy=0.5), []),  # too early to say
        (log(12, margin=0.01, accuracy=0.5), []),
        (changed(log(9), accuracy=1.0), []),
        # Still warming up: the rate rises, so a flat margin says nothing.
        (changed(log(), margin=0.01, accuracy=0.5, learning_rate=[i * 1e-6 for i in range(20)]), []),
        # A run that has learned and then stays there is finished, not stalled.
        (changed(log(), margin=noise(20, 1.5, 0.2), accuracy=0.9), []),
        (changed(log(), grad_norm=[1.0] * 19 + [0.0]), []),  # the last step of a schedule
        (changed(log(), grad_norm=None), []),
        (changed(log(), grad_norm=[1.0] * 19 + [50.0]), []),  # one wild batch
        (changed(log(), entropy=[1.0 - 0.02 * i for i in range(20)]), []),
        (log(), evaluations([0.7, 0.66, 0.71])),  # it came back
        (log(), evaluations([0.70, 0.69, 0.69])),
        (log(), evaluations([0.70, 0.60, 0.60], n_rows=10)),  # within the noise of ten pairs
        (log(), evaluations([0.60, 0.66, 0.70])),
        (changed(log(), margin=0.5), evaluations([0.7, 0.66, 0.64])),  # nothing grew meanwhile
        (log(), evaluations(None, [0.6, 0.65, 0.7])),  # the training loss did not fall
    ],
)  # fmt: skip
def test_a_sound_run_is_left_in_peace(points, held_out):
    assert findings_so_far(points, beta=0.1, evaluations=held_out) == ()


def test_more_pairs_make_the_same_fall_a_finding():
    held_out = evaluations([0.70, 0.60, 0.60], n_rows=1000)
    assert [n.check for n in findings_so_far(log(), beta=0.1, evaluations=held_out)] == [
        "overfitting"
    ]


def test_the_most_serious_finding_comes_first():
    points = changed(log(margin=30.0), entropy=FALLING)
    assert [n.level for n in findings_so_far(points, beta=0.1)] == ["problem", "warning"]


def test_a_trainers_log_becomes_points_and_what_is_missing_stays_missing():
    history = [
        {"step": 1, "epoch": 0.1, "loss": 0.7, "grad_norm": 2.0, "learning_rate": 1e-5,
         "rewards/margins": 0.2, "rewards/accuracies": 0.6, "rewards/chosen": 0.1,
         "rewards/rejected": -0.1, "logps/chosen": -50.0, "logps/rejected": -60.0, "entropy": 1.5},
        {"step": 1, "epoch": 0.1, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7,
         "eval_runtime": 2.0, "eval_samples_per_second": 25.0},
        {"step": 1, "eval_other_loss": 0.9, "eval_other_rewards/margins": 0.3},
        {"step": 2, "epoch": 0.2, "loss": 0.6, "learning_rate": 1e-5},
        {"step": 2, "train_runtime": 3.0, "train_loss": 0.65},
    ]  # fmt: skip
    first, second = training_points(history)
    assert (first.margin, first.grad_norm, first.entropy) == (0.2, 2.0, 1.5)
    assert math.isnan(second.margin)
    assert (second.loss, second.grad_norm, second.entropy) == (0.6, None, None)
    (held_out,) = evaluation_points(history)
    assert (held_out.loss, held_out.accuracy, held_out.margin, held_out.n_rows) == (
        0.6, 0.7, None, 50,
    )  # fmt: skip
    assert [e.margin for e in evaluation_points(history, "eval_other")] == [0.3]


def test_a_log_without_preferences_is_judged_by_loss_and_gradient_only():
    history = [{"step": i, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0} for i in range(30)]
    assert {n.level for n in diagnose(training_points(history), beta=None)} == {"ok"}
    assert findings_so_far(training_points(history), beta=None) == ()
    history[-1]["loss"] = math.inf
    assert [n.check for n in findings_so_far(training_points(history), beta=None)] == ["loss"]


@pytest.mark.parametrize(
    ("n_parameters", "rate"), [(135e6, 5e-5), (1.5e9, 2e-5), (8e9, 1e-5), (70e9, 5e-6)]
)
def test_the_default_learning_rate_falls_with_size(n_parameters, rate):
    assert default_learning_rate(int(n_parameters)) == rate
