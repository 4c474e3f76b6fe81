"""A training log -> what it means, in plain language.

Pure functions over the logged points; no model, no trainer. Every note says what was seen, whether
it matters, and what to change. `diagnose` reads a finished run; `findings_so_far` says of a run under
way only what already holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Literal

import msgspec

# Fraction of |log-probability under the reference| by which chosen answers may fall before it is
# worth a warning (likelihood displacement, Razin et al. 2024, arXiv:2410.08847).
_CHOSEN_FALL = 0.10
# exp(-20): a pair with this implicit-reward margin no longer contributes a gradient.
_MARGIN_EXPLODED = 20.0
# Share of its early value to which the entropy of the answers' tokens may fall.
_ENTROPY_LEFT = 0.5
# Share of its early value by which the cost of general rows may rise.
_NLL_RISE = 0.05
# Below this a gradient norm is what rounding leaves of a gradient of 0 (about 2e-7 in float32).
_NO_GRADIENT = 1e-6
# How many times its earlier median a gradient norm may be.
_GRADIENT_GROWTH = 10.0
# Below these a run whose margin no longer grows has learned next to nothing.
_STALLED_MARGIN, _STALLED_ACCURACY = 0.1, 0.6
# Smallest loss of held-out accuracy, and share of held-out loss, that counts as overfitting.
_ACCURACY_LOST, _LOSS_GAINED = 0.02, 0.02


class TrainingPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One logged training step. Rewards are implicit: beta * (logp - reference logp), in nats.

    `entropy` is the mean of the policy's next-token entropies over the answers' tokens, in nats, and
    `replay_nll` what a token of replayed general rows costs it. What a trainer did not log is None, or
    NaN where a number is needed; no check reads it as a zero.
    """

    step: int
    epoch: float
    loss: float
    margin: float
    accuracy: float
    chosen_reward: float
    rejected_reward: float
    chosen_logp: float
    rejected_logp: float
    learning_rate: float
    grad_norm: float | None
    entropy: float | None = None
    replay_nll: float | None = None


class EvaluationPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One evaluation on held-out pairs; None is what was not logged. `n_rows` counts the pairs."""

    step: int
    loss: float | None = None
    margin: float | None = None
    accuracy: float | None = None
    n_rows: int | None = None


class HealthNote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finding about a training run. `level` "problem" means: do not ship this as it is.

    `check` names the check that found it, so that the same finding can be told once.
    """

    level: Literal["ok", "warning", "problem"]
    message: str
    check: str = ""


NOTHING_LOGGED = HealthNote(
    level="warning", message="Nothing was logged, so nothing can be said.", check="log"
)


def training_points(log_history: Iterable[Mapping[str, Any]]) -> tuple[TrainingPoint, ...]:
    """The training steps of a Trainer's `state.log_history`, in the names TRL and prefopt share."""

    def number(entry: Mapping[str, Any], name: str) -> float:
        return float(entry.get(name, math.nan))

    return tuple(
        TrainingPoint(
            step=int(entry.get("step", 0)),
            epoch=number(entry, "epoch"),
            loss=float(entry["loss"]),
            margin=number(entry, "rewards/margins"),
            accuracy=number(entry, "rewards/accuracies"),
            chosen_reward=number(entry, "rewards/chosen"),
            rejected_reward=number(entry, "rewards/rejected"),
            chosen_logp=number(entry, "logps/chosen"),
            rejected_logp=number(entry, "logps/rejected"),
            learning_rate=number(entry, "learning_rate"),
            grad_norm=optional_figure(entry, "grad_norm"),
            entropy=optional_figure(entry, "entropy"),
            replay_nll=optional_figure(entry, "replay/nll"),
        )
        for entry in log_history
        if "loss" in entry
    )


def evaluation_points(
    log_history: Iterable[Mapping[str, Any]], prefix: str = "eval"
) -> tuple[EvaluationPoint, ...]:
    """The evaluations in a Trainer's `state.log_history`, of the data set that `prefix` names."""
    points = []
    for entry in log_history:
        if f"{prefix}_loss" not in entry:
            continue
        seconds = optional_figure(entry, f"{prefix}_runtime")
        rate = optional_figure(entry, f"{prefix}_samples_per_second")
        points.append(
            EvaluationPoint(
                step=int(entry.get("step", 0)),
                loss=optional_figure(entry, f"{prefix}_loss"),
                margin=optional_figure(entry, f"{prefix}_rewards/margins"),
                accuracy=optional_figure(entry, f"{prefix}_rewards/accuracies"),
                n_rows=round(seconds * rate) if seconds and rate else None,
            )
        )
    return tuple(points)


def optional_figure(entry: Mapping[str, Any], name: str) -> float | None:
    """A figure of a log's entry, None where it was not logged."""
    value = entry.get(name)
    return None if value is None else float(value)


def diagnose(
    points: Sequence[TrainingPoint],
    *,
    beta: float | None,
    words_chosen: float | None = None,
    words_rejected: float | None = None,
    evaluations: Sequence[EvaluationPoint] = (),
) -> tuple[HealthNote, ...]:
    """What a DPO log says about a finished run, the most serious first.

    Args:
        points: logged steps in order.
        beta: the run's beta; implicit rewards are divided by it to get log-probability changes. None
            leaves out what needs it.
        words_chosen: mean length of chosen answers, if known.
        words_rejected: mean length of rejected answers, if known.
        evaluations: evaluations on held-out pairs in order, if there were any.
    """
    if not points:
        return (NOTHING_LOGGED,)
    broken = _not_finite(points)
    if broken is not None:
        return (broken,)
    margins = _margins(points)
    notes = [
        _chosen_falling(points, beta),
        margins,
        _accuracy(points),
        _lengths(words_chosen, words_rejected),
        _gradient(points),
        _entropy(points),
        _forgetting(points),
        _overfitting(points, evaluations),
        # A margin that went nowhere is told once.
        _stalled(points) if margins is None or margins.level == "ok" else None,
    ]
    found = [note for note in notes if note is not None]
    if not any(note.level != "ok" for note in found):
        message = "Nothing in the log calls for a change."
        found.append(HealthNote(level="ok", message=message, check="log"))
    return by_level(found)


def findings_so_far(
    points: Sequence[TrainingPoint],
    *,
    beta: float | None,
    evaluations: Sequence[EvaluationPoint] = (),
) -> tuple[HealthNote, ...]:
    """What the log of a run under way already shows, the most serious first; empty if nothing.

    Only warnings and problems, and none that more steps may simply cure: a margin that is still
    small, or a single noisy batch.

    Args:
        points: steps logged until now, in order.
        beta: the run's beta; None leaves out what needs it.
        evaluations: evaluations until now, in order.
    """
    if not points:
        return ()
    broken = _not_finite(points)
    if broken is not None:
        return (broken,)
    notes = [_gradient(points), _forgetting(points), _overfitting(points, evaluations)]
    if len(points) >= 10:
        notes += [_chosen_falling(points, beta), _exploded(points), _entropy(points)]
    if len(points) >= 15:
        notes.append(_saturated(points))
    if len(points) >= 20:
        notes += [_moving_away(points), _stalled(points)]
    return by_level([note for note in notes if note is not None and note.level != "ok"])


def by_level(notes: Sequence[HealthNote]) -> tuple[HealthNote, ...]:
    """The notes, the most serious first."""
    order = {"problem": 0, "warning": 1, "ok": 2}
    return tuple(sorted(notes, key=lambda note: order[note.level]))


def _tail(points: Sequence[TrainingPoint]) -> Sequence[TrainingPoint]:
    """The last third of the run, at least five points: single batches are too noisy to judge by."""
    return points[-max(5, len(points) // 3) :]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _not_finite(points: Sequence[TrainingPoint]) -> HealthNote | None:
    bad = next((p for p in points if not math.isfinite(p.loss)), None)
    if bad is None:
        return None
    return HealthNote(
        level="problem",
        check="loss",
        message=f"The loss became {bad.loss} at step {bad.step}. The adapter is not usable. "
        "Lower the learning rate, or train in float32.",
    )


def _chosen_falling(points: Sequence[TrainingPoint], beta: float | None) -> HealthNote | None:
    tail = _tail(points)
    if beta is None:
        return None
    change = _mean([p.chosen_reward for p in tail]) / beta  # nats, against the reference
    reference = abs(_mean([p.chosen_logp - p.chosen_reward / beta for p in tail]))
    if reference == 0 or not math.isfinite(change / reference):
        return None
    share = change / reference
    if share < -_CHOSEN_FALL:
        return HealthNote(
            level="warning",
            check="chosen",
            message=f"The chosen answers themselves became less likely: their log-probability fell "
            f"by {-share:.0%} of its size. Some fall is normal for DPO; this much can make the model "
            "drift to answers nobody chose. Add an NLL term on the chosen answers "
            "(loss: [sigmoid, sft]), lower the learning rate, or raise beta.",
        )
    return HealthNote(
        level="ok",
        check="chosen",
        message=f"Log-probability of chosen answers changed by {share:+.1%} of its size: no "
        "displacement to worry about.",
    )


def _exploded(points: Sequence[TrainingPoint]) -> HealthNote | None:
    margin = _mean([p.margin for p in _tail(points)])
    if not margin > _MARGIN_EXPLODED:
        return None
    return HealthNote(
        level="problem",
        check="margin",
        message=f"The margin between chosen and rejected grew to {margin:.0f}. The model is far "
        "from its reference and has stopped learning from most pairs. Raise beta, lower the "
        "learning rate, or train for fewer steps.",
    )


def _margins(points: Sequence[TrainingPoint]) -> HealthNote | None:
    margin = _mean([p.margin for p in _tail(points)])
    if math.isnan(margin):
        return None
    exploded = _exploded(points)
    if exploded is not None:
        return exploded
    if margin <= 0.0:
        return HealthNote(
            level="problem",
            check="margin",
            message=f"At the end the margin is {margin:.3f}: the model does not prefer the chosen "
            "answers. Raise the learning rate, train longer, or check that chosen and rejected are "
            "not exchanged.",
        )
    if margin < 0.05:
        return HealthNote(
            level="warning",
            check="margin",
            message=f"The margin only reached {margin:.3f}; the model has barely moved. Raise the "
            "learning rate or train longer.",
        )
    return HealthNote(level="ok", check="margin", message=f"The margin reached {margin:.2f}.")


def _moving_away(points: Sequence[TrainingPoint]) -> HealthNote | None:
    """A margin below 0 by more than its noise, in the second half of the steps so far."""
    margins = [p.margin for p in points[len(points) // 2 :]]
    mean, error = _mean(margins), _standard_error(margins)
    if not mean + 3 * error < 0:
        return None
    return HealthNote(
        level="problem",
        check="margin",
        message=f"The margin is {mean:.3f} and its noise does not explain that: the model moves "
        "towards the rejected answers. Check that chosen and rejected are not exchanged, and lower "
        "the learning rate.",
    )


def _stalled(points: Sequence[TrainingPoint]) -> HealthNote | None:
    """No growth of the margin from one half of the steps to the next, and little learned."""
    highest = max((p.learning_rate for p in points), default=0.0)
    # Steps of the warm-up and of the schedule's end do not count: nothing could be learned there.
    warm = [p for p in points if not p.learning_rate < highest / 2]
    if len(warm) < 20:
        return None
    first, second = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    before, now = [p.margin for p in first], [p.margin for p in second]
    noise = math.hypot(_standard_error(before), _standard_error(now))
    accuracy = _mean([p.accuracy for p in second])
    little = _mean(now) < _STALLED_MARGIN and accuracy < _STALLED_ACCURACY
    if not (little and _mean(now) - _mean(before) <= 2 * noise):
        return None
    return HealthNote(
        level="warning",
        check="stall",
        message=f"Learning stalls: the margin went from {_mean(before):.3f} to {_mean(now):.3f} "
        f"between steps {first[0].step} and {second[-1].step}, which is within its noise, and "
        f"chosen beats rejected in {accuracy:.0%} of pairs. More steps alone will not help. Raise "
        "the learning rate, lower beta, or look at whether the labels can be learned (swapped, "
        "random, or cut off by max_length).",
    )


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _saturated(points: Sequence[TrainingPoint]) -> HealthNote | None:
    early = points[: max(1, len(points) // 3)]
    early = early[1:] or early
    if not _mean([p.accuracy for p in early]) > 0.97:
        return None
    return HealthNote(
        level="warning",
        check="accuracy",
        message="The model told chosen from rejected almost perfectly within the first third of "
        f"training (by step {early[-1].step}). The pairs may differ in something trivial (length, "
        "a fixed phrase); look at the shares in the preflight report, or use harder pairs.",
    )


def _accuracy(points: Sequence[TrainingPoint]) -> HealthNote | None:
    saturated = _saturated(points) if len(points) >= 10 else None
    if saturated is not None:
        return saturated
    accuracy = _mean([p.accuracy for p in _tail(points)])
    if math.isnan(accuracy):
        return None
    if accuracy < 0.55:
        return HealthNote(
            level="warning",
            check="accuracy",
            message=f"At the end chosen beats rejected in {accuracy:.0%} of pairs, which is close to "
            "chance. The labels may be noisy, or the learning rate too low.",
        )
    return HealthNote(
        level="ok",
        check="accuracy",
        message=f"Chosen beats rejected in {accuracy:.0%} of pairs at the end.",
    )


def _gradient(points: Sequence[TrainingPoint]) -> HealthNote | None:
    """A gradient that is 0, not finite, or growing."""
    known = [(p.step, p.grad_norm) for p in points if p.grad_norm is not None]
    last = [norm for _, norm in known[-5:]]
    if len(known) >= 3 and all(norm < _NO_GRADIENT for norm in last[-3:]):
        return HealthNote(
            level="problem",
            check="gradient_zero",
            message=f"The gradient norm is {last[-1]:.1g} since step {known[-3][0]} or before, which "
            "is nothing but rounding: nothing is learned. Either no parameter trains (an adapter "
            "that is frozen or not attached), or no pair has a gradient left (both answers the same "
            "after truncation, or margins so large that the loss is flat).",
        )
    wild = [(step, norm) for step, norm in known if not math.isfinite(norm)]
    if wild:
        lasting = sum(not math.isfinite(norm) for norm in last) >= 3
        now = (
            "in most of the last steps, so training no longer moves or moves at random"
            if lasting
            else "which clipping turns into no step or a wrong one; the first steps in float16 may "
            "show it while the loss scale is found"
        )
        return HealthNote(
            level="problem" if lasting else "warning",
            check="gradient_not_finite",
            message=f"The gradient norm was {wild[-1][1]} at step {wild[-1][0]}, {now}. Train in "
            "bfloat16 or float32, or lower the learning rate.",
        )
    if len(known) < 10:
        return None
    before, now_norm = median(norm for _, norm in known[:-5]), median(last)
    if now_norm <= _GRADIENT_GROWTH * before or before == 0.0:
        return None
    return HealthNote(
        level="warning",
        check="gradient_growing",
        message=f"The gradient norm grew from {before:.3g} to {now_norm:.3g}. Clipping keeps the "
        "steps small but no longer their direction steady, and the loss often breaks next. Lower "
        "the learning rate, lengthen the warm-up, or look at the rows of the last steps.",
    )


def _entropy(points: Sequence[TrainingPoint]) -> HealthNote | None:
    known = [p.entropy for p in points if p.entropy is not None]
    if len(known) < 10:
        return None
    before, now = _mean(known[: len(known) // 5]), _mean(known[-max(3, len(known) // 5) :])
    if not now < _ENTROPY_LEFT * before:
        return None
    return HealthNote(
        level="warning",
        check="entropy",
        message=f"The model grows sure of itself: the entropy of its next token fell from "
        f"{before:.2f} to {now:.2f} nats. Its answers will vary less and may repeat themselves; "
        "look at sampled ones. Raise beta, lower the learning rate, or stop earlier.",
    )


def _forgetting(points: Sequence[TrainingPoint]) -> HealthNote | None:
    """General rows that cost more at the end than in the beginning, by more than their noise."""
    known = [p.replay_nll for p in points if p.replay_nll is not None]
    if len(known) < 10:
        return None
    part = max(3, len(known) // 5)
    before, now = known[:part], known[-part:]
    noise = math.hypot(_standard_error(before), _standard_error(now))
    risen = _mean(now) - _mean(before)
    if not risen > max(2 * noise, _NLL_RISE * _mean(before)):
        return None
    return HealthNote(
        level="warning",
        check="forgetting",
        message=f"The model forgets: a token of the replayed general rows cost it {_mean(before):.2f} "
        f"nats in the beginning and {_mean(now):.2f} at the end. Lower the learning rate, raise "
        "replay_weight or replay_share, or train for fewer steps.",
    )


def _overfitting(
    points: Sequence[TrainingPoint], evaluations: Sequence[EvaluationPoint]
) -> HealthNote | None:
    """Held-out pairs get worse in two evaluations in a row while the training pairs get better."""
    by_accuracy = _fallen_accuracy(points, evaluations)
    if by_accuracy is not None:
        best, last = by_accuracy
        seen = (
            f"chosen beats rejected in {best.accuracy:.0%} of held-out pairs at step {best.step} and "
            f"in {last.accuracy:.0%} at step {last.step}, while the margin on training pairs grew"
        )
    else:
        by_loss = _risen_loss(points, evaluations)
        if by_loss is None:
            return None
        best, last = by_loss
        seen = (
            f"the loss on held-out pairs rose from {best.loss:.3f} at step {best.step} to "
            f"{last.loss:.3f} at step {last.step}, while the training loss fell"
        )
    return HealthNote(
        level="warning",
        check="overfitting",
        message=f"Overfitting: {seen}. What is learned now does not carry over. Use the checkpoint "
        f"of step {best.step} (load_best_model_at_end), train fewer epochs, lower the learning "
        "rate, or add pairs.",
    )


def _fallen_accuracy(
    points: Sequence[TrainingPoint], evaluations: Sequence[EvaluationPoint]
) -> tuple[EvaluationPoint, EvaluationPoint] | None:
    known = [(e.accuracy, e) for e in evaluations if e.accuracy is not None]
    if len(known) < 3:
        return None
    top, best = max(known[:-2], key=lambda item: item[0])
    # The same pairs every time, so a difference is less noisy than one evaluation's standard error.
    error = math.sqrt(top * (1 - top) / best.n_rows) if best.n_rows else 0.0
    if any(top - value <= max(_ACCURACY_LOST, error) for value, _ in known[-2:]):
        return None
    change = _change([(p.step, p.margin) for p in points], best.step)
    return (best, known[-1][1]) if change is not None and change > 0 else None


def _risen_loss(
    points: Sequence[TrainingPoint], evaluations: Sequence[EvaluationPoint]
) -> tuple[EvaluationPoint, EvaluationPoint] | None:
    known = [(e.loss, e) for e in evaluations if e.loss is not None]
    if len(known) < 3:
        return None
    least, best = min(known[:-2], key=lambda item: item[0])
    if any(value - least <= _LOSS_GAINED * abs(least) for value, _ in known[-2:]):
        return None
    change = _change([(p.step, p.loss) for p in points], best.step)
    return (best, known[-1][1]) if change is not None and change < 0 else None


def _change(values: Sequence[tuple[int, float]], step: int) -> float | None:
    """The mean of the last values after `step` less that of as many before it, at most five."""
    before = [value for at, value in values if at <= step][-5:]
    after = [value for at, value in values if at > step][-5:]
    return _mean(after) - _mean(before) if before and after else None


def _lengths(words_chosen: float | None, words_rejected: float | None) -> HealthNote | None:
    if not words_chosen or not words_rejected:
        return None
    ratio = words_chosen / words_rejected
    if 0.67 <= ratio <= 1.5:
        return None
    direction = "longer" if ratio > 1 else "shorter"
    return HealthNote(
        level="warning",
        check="lengths",
        message=f"Chosen answers are much {direction} than rejected ones ({words_chosen:.0f} against "
        f"{words_rejected:.0f} words), so length alone may be what is learned. If that is not "
        "wanted, balance the lengths of the pairs.",
    )
