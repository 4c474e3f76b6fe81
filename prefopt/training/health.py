"""A training log -> what it means, in plain language.

Pure functions over the logged points; no model, no trainer. Every note says what was seen, whether
it matters, and what to change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

# Fraction of |log-probability under the reference| by which chosen answers may fall before it is
# worth a warning (likelihood displacement, Razin et al. 2024, arXiv:2410.08847).
_CHOSEN_FALL = 0.10
# exp(-20): a pair with this implicit-reward margin no longer contributes a gradient.
_MARGIN_EXPLODED = 20.0


class TrainingPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One logged training step. Rewards are implicit: beta * (logp - reference logp), in nats."""

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
    grad_norm: float


class HealthNote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finding about a training run. `level` "problem" means: do not ship this as it is."""

    level: Literal["ok", "warning", "problem"]
    message: str


def diagnose(
    points: Sequence[TrainingPoint],
    *,
    beta: float,
    words_chosen: float | None = None,
    words_rejected: float | None = None,
) -> tuple[HealthNote, ...]:
    """What a DPO log says about the run, the most serious first.

    Args:
        points: logged steps in order, at least one.
        beta: the run's beta; implicit rewards are divided by it to get log-probability changes.
        words_chosen: mean length of chosen answers, if known.
        words_rejected: mean length of rejected answers, if known.
    """
    if not points:
        return (HealthNote(level="warning", message="Nothing was logged, so nothing can be said."),)
    if any(not math.isfinite(p.loss) for p in points):
        bad = next(p for p in points if not math.isfinite(p.loss))
        return (
            HealthNote(
                level="problem",
                message=f"The loss became {bad.loss} at step {bad.step}. The adapter is not usable. "
                "Lower the learning rate, or train in float32.",
            ),
        )
    notes = [
        note
        for note in (
            _chosen_falling(points, beta),
            _margins(points),
            _accuracy(points),
            _lengths(words_chosen, words_rejected),
        )
        if note is not None
    ]
    if not any(note.level != "ok" for note in notes):
        notes.append(HealthNote(level="ok", message="Nothing in the log calls for a change."))
    order = {"problem": 0, "warning": 1, "ok": 2}
    return tuple(sorted(notes, key=lambda note: order[note.level]))


def _tail(points: Sequence[TrainingPoint]) -> Sequence[TrainingPoint]:
    """The last third of the run, at least five points: single batches are too noisy to judge by."""
    return points[-max(5, len(points) // 3) :]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _chosen_falling(points: Sequence[TrainingPoint], beta: float) -> HealthNote | None:
    tail = _tail(points)
    change = _mean([p.chosen_reward for p in tail]) / beta  # nats, against the reference
    reference = abs(_mean([p.chosen_logp - p.chosen_reward / beta for p in tail]))
    if reference == 0:
        return None
    share = change / reference
    if share < -_CHOSEN_FALL:
        return HealthNote(
            level="warning",
            message=f"The chosen answers themselves became less likely: their log-probability fell "
            f"by {-share:.0%} of its size. Some fall is normal for DPO; this much can make the model "
            "drift to answers nobody chose. Add an NLL term on the chosen answers "
            "(loss: [sigmoid, sft]), lower the learning rate, or raise beta.",
        )
    return HealthNote(
        level="ok",
        message=f"Log-probability of chosen answers changed by {share:+.1%} of its size: no "
        "displacement to worry about.",
    )


def _margins(points: Sequence[TrainingPoint]) -> HealthNote | None:
    margin = _mean([p.margin for p in _tail(points)])
    if margin > _MARGIN_EXPLODED:
        return HealthNote(
            level="problem",
            message=f"The margin between chosen and rejected grew to {margin:.0f}. The model is far "
            "from its reference and has stopped learning from most pairs. Raise beta, lower the "
            "learning rate, or train for fewer steps.",
        )
    if margin <= 0.0:
        return HealthNote(
            level="problem",
            message=f"At the end the margin is {margin:.3f}: the model does not prefer the chosen "
            "answers. Raise the learning rate, train longer, or check that chosen and rejected are "
            "not exchanged.",
        )
    if margin < 0.05:
        return HealthNote(
            level="warning",
            message=f"The margin only reached {margin:.3f}; the model has barely moved. Raise the "
            "learning rate or train longer.",
        )
    return HealthNote(level="ok", message=f"The margin reached {margin:.2f}.")


def _accuracy(points: Sequence[TrainingPoint]) -> HealthNote | None:
    early = points[: max(1, len(points) // 3)]
    if len(points) >= 10 and _mean([p.accuracy for p in early[1:] or early]) > 0.97:
        return HealthNote(
            level="warning",
            message="The model told chosen from rejected almost perfectly within the first third of "
            "training. The pairs may differ in something trivial (length, a fixed phrase); look at "
            "the shares in the preflight report, or use harder pairs.",
        )
    accuracy = _mean([p.accuracy for p in _tail(points)])
    if accuracy < 0.55:
        return HealthNote(
            level="warning",
            message=f"At the end chosen beats rejected in {accuracy:.0%} of pairs, which is close to "
            "chance. The labels may be noisy, or the learning rate too low.",
        )
    return HealthNote(
        level="ok", message=f"Chosen beats rejected in {accuracy:.0%} of pairs at the end."
    )


def _lengths(words_chosen: float | None, words_rejected: float | None) -> HealthNote | None:
    if not words_chosen or not words_rejected:
        return None
    ratio = words_chosen / words_rejected
    if 0.67 <= ratio <= 1.5:
        return None
    direction = "longer" if ratio > 1 else "shorter"
    return HealthNote(
        level="warning",
        message=f"Chosen answers are much {direction} than rejected ones ({words_chosen:.0f} against "
        f"{words_rejected:.0f} words), so length alone may be what is learned. If that is not "
        "wanted, balance the lengths of the pairs.",
    )
