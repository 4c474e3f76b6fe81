"""The log of a PPO run -> what it means, in plain language.

Pure functions over the logged points; no model, no trainer. A point is one rollout batch. Every
finding says what was seen, whether it matters, and what to change; "problem" means: do not ship
this as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from prefopt.training.health import NOTHING_LOGGED, HealthNote, by_level, optional_figure

# Rollout batches before anything is said that noise could explain.
_ENOUGH = 8
# Nats a token: a policy this far picks tokens that its reference hardly ever would.
_FAR_PER_TOKEN = 1.0
# How many times its target KL may be.
_KL_OVER_TARGET = 2.0
# Share of its early value to which entropy may fall, and nats a token below which answers repeat.
_ENTROPY_LEFT, _ENTROPY_GONE = 0.5, 0.05
# How much longer or shorter answers may become.
_LONGER, _SHORTER = 1.5, 0.5
# Below this share of answers that end by themselves most are cut off.
_ENDED = 0.5
_FAILED = 0.05
# Steps that change this much at once are outside of what the clipped loss is good for.
_CLIPPED, _STEP_KL = 0.4, 0.1
# Nats a token between what sampled and what trains: more than rounding, and another policy.
_ENGINE_OFF, _ENGINE_ELSEWHERE = 0.1, 0.5
# Smallest fall of a held-out win rate that counts against a rising score.
_GOLD_LOST = 0.05


class PPOPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rollout batch as it was logged. KL and length are means of answers, entropy of tokens.

    What was not logged is None.
    """

    step: int
    score: float
    kl: float
    length: float
    entropy: float
    rlhf_reward: float
    kl_coef: float | None = None
    ended: float | None = None
    failed: float | None = None
    explained_variance: float | None = None
    clipfrac: float | None = None
    approxkl: float | None = None
    engine_gap: float | None = None


class GoldPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A measure of the answers that the reward does not see, such as a judge's win rate."""

    step: int
    value: float


def ppo_points(log_history: Iterable[Mapping[str, Any]]) -> tuple[PPOPoint, ...]:
    """The rollout batches in a Trainer's `state.log_history`."""
    return tuple(
        PPOPoint(
            step=int(entry.get("step", 0)),
            score=float(entry["objective/scores"]),
            kl=float(entry["objective/kl"]),
            length=float(entry["rollout/length"]),
            entropy=float(entry["objective/entropy"]),
            rlhf_reward=float(entry["objective/rlhf_reward"]),
            kl_coef=optional_figure(entry, "kl_coef"),
            ended=optional_figure(entry, "rollout/ended"),
            failed=optional_figure(entry, "rollout/failed"),
            explained_variance=optional_figure(entry, "value/explained_variance"),
            clipfrac=optional_figure(entry, "policy/clipfrac"),
            approxkl=optional_figure(entry, "policy/approxkl"),
            engine_gap=optional_figure(entry, "rollout/engine_gap"),
        )
        for entry in log_history
        if "objective/scores" in entry
    )


def gold_points(
    log_history: Iterable[Mapping[str, Any]], metric: str = "eval_win_rate"
) -> tuple[GoldPoint, ...]:
    """A held-out metric in a Trainer's `state.log_history`."""
    found = ((entry.get("step", 0), entry.get(metric)) for entry in log_history)
    return tuple(
        GoldPoint(step=int(step), value=float(value))
        for step, value in found
        if value is not None and math.isfinite(value)
    )


def diagnose_ppo(
    points: Sequence[PPOPoint],
    *,
    kl_target: float | None = None,
    cuts_off: bool = True,
    gold: Sequence[GoldPoint] = (),
) -> tuple[HealthNote, ...]:
    """What the log says about a finished run, the most serious first.

    Args:
        points: rollout batches in order.
        kl_target: what KL was to be held at, if anything.
        cuts_off: False where answers have a fixed length, so that not to end is no fault.
        gold: measures that the reward does not see, in order.
    """
    if not points:
        return (NOTHING_LOGGED,)
    found = list(ppo_findings_so_far(points, kl_target=kl_target, cuts_off=cuts_off, gold=gold))
    if len(points) >= 2 * _ENOUGH and not _not_finite(points):
        stalled = _stalled(points)
        found += [stalled] if stalled else []
    if not found:
        first, last = _means(points, "score")
        message = (
            f"The score went from {first:.3g} to {last:.3g} at a KL of {_means(points, 'kl')[1]:.3g} "
            "nats. Nothing in the log calls for a change."
        )
        found.append(HealthNote(level="ok", message=message, check="log"))
    return by_level(found)


def ppo_findings_so_far(
    points: Sequence[PPOPoint],
    *,
    kl_target: float | None = None,
    cuts_off: bool = True,
    gold: Sequence[GoldPoint] = (),
) -> tuple[HealthNote, ...]:
    """What the log of a run under way already shows, the most serious first; empty if nothing.

    Args:
        points: rollout batches until now, in order.
        kl_target: what KL is to be held at, if anything.
        cuts_off: see `diagnose_ppo`.
        gold: see `diagnose_ppo`.
    """
    if not points:
        return ()
    broken = _not_finite(points)
    if broken is not None:
        return (broken,)
    notes = [_far(points), _failed(points), _engine(points)]
    if len(points) >= _ENOUGH:
        notes += [
            _over_target(points, kl_target),
            _costs_more(points),
            _entropy(points),
            _value(points),
            _lengths(points),
            _cut_off(points) if cuts_off else None,
            _steps(points),
            _hacking(points, gold),
        ]
    return by_level([note for note in notes if note is not None])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _ends(points: Sequence[PPOPoint], name: str) -> tuple[list[float], list[float]]:
    """What a field was in the first and in the last quarter of the batches, two at least of each."""
    n = max(2, len(points) // 4)
    known = [value for p in points if (value := getattr(p, name)) is not None]
    return known[:n], known[-n:]


def _means(points: Sequence[PPOPoint], name: str) -> tuple[float, float]:
    first, last = _ends(points, name)
    return _mean(first), _mean(last)


def _rose(points: Sequence[PPOPoint], name: str) -> bool:
    """Whether a field rose by more than noise explains."""
    first, last = _ends(points, name)
    return _mean(last) - _mean(first) > 2 * math.hypot(_error(first), _error(last))


def _not_finite(points: Sequence[PPOPoint]) -> HealthNote | None:
    for point in points:
        if not math.isfinite(point.score + point.kl + point.entropy):
            return HealthNote(
                level="problem",
                check="finite",
                message=f"Score, KL or entropy is not a number at step {point.step}. The policy is "
                "not usable. Lower the learning rate, or train in float32.",
            )
    return None


def _far(points: Sequence[PPOPoint]) -> HealthNote | None:
    last = points[-2:]
    kl, length = _mean([p.kl for p in last]), _mean([p.length for p in last])
    if kl / length <= _FAR_PER_TOKEN:
        return None
    return HealthNote(
        level="problem",
        check="kl",
        message=f"KL runs away: {kl:.1f} nats an answer, {kl / length:.2f} a token. The policy "
        "writes what its reference hardly ever would, and a learned reward knows nothing of such "
        "text. Go back to an earlier checkpoint, raise kl_coef or set kl_target, and "
        "lower the learning rate.",
    )


def _engine(points: Sequence[PPOPoint]) -> HealthNote | None:
    gap = points[-1].engine_gap
    if gap is None or gap <= _ENGINE_OFF:
        return None
    return HealthNote(
        level="problem" if gap > _ENGINE_ELSEWHERE else "warning",
        check="engine",
        message=f"What samples and what trains differ by {gap:.2f} nats a token, more than rounding "
        "does: the answers come from another policy than the one that learns from them. Check that "
        "both have the same base weights, precision, temperature and adapter, or sample with "
        "rollout_engine='transformers'.",
    )


def _over_target(points: Sequence[PPOPoint], target: float | None) -> HealthNote | None:
    if target is None:
        return None
    kl = _mean([p.kl for p in points[-3:]])
    if kl <= _KL_OVER_TARGET * target:
        return None
    return HealthNote(
        level="warning",
        check="kl_target",
        message=f"KL is {kl:.1f} nats, its target {target:g}: kl_coef is adapted too slowly. Lower "
        "kl_horizon, start with a larger kl_coef, or lower the learning rate.",
    )


def _costs_more(points: Sequence[PPOPoint]) -> HealthNote | None:
    """The score less the KL penalty is what is optimised; it must not fall."""
    first, last = _ends(points, "rlhf_reward")
    fall = _mean(first) - _mean(last)
    if not (fall > 3 * math.hypot(_error(first), _error(last)) and _rose(points, "kl")):
        return None
    coefs = [p.kl_coef for p in points if p.kl_coef is not None]
    if coefs and coefs[-1] > 1.05 * coefs[0]:
        return None  # the measure itself has become stricter
    return HealthNote(
        level="problem",
        check="objective",
        message=f"What is optimised, the score less the KL penalty, fell from {_mean(first):.3g} "
        f"to {_mean(last):.3g} while KL grew: the updates go the wrong way. Lower the learning "
        "rate, or use a larger rollout batch.",
    )


def _entropy(points: Sequence[PPOPoint]) -> HealthNote | None:
    first, last = _means(points, "entropy")
    if last >= _ENTROPY_LEFT * first and last >= _ENTROPY_GONE:
        return None
    return HealthNote(
        level="problem" if last < _ENTROPY_GONE else "warning",
        check="entropy",
        message=f"Entropy went from {first:.2f} to {last:.2f} nats a token: the policy settles on "
        "few answers and no longer explores. Raise kl_coef, lower the learning rate, or stop earlier.",
    )


def _value(points: Sequence[PPOPoint]) -> HealthNote | None:
    known = [p.explained_variance for p in points if p.explained_variance is not None]
    if len(known) < _ENOUGH:
        return None
    found = _mean(known[-max(2, len(known) // 4) :])
    if found >= 0.0:
        return None
    return HealthNote(
        level="warning",
        check="value",
        message=f"The value explains {found:.2f} of the returns' variance, less than a constant "
        "would, so advantages are noise on top of noise. Raise value_learning_rate, raise "
        "cliprange_value where scores are much larger than 1, start the value from a reward model, "
        "or use advantage_estimator='rloo'.",
    )


def _lengths(points: Sequence[PPOPoint]) -> HealthNote | None:
    first, last = _means(points, "length")
    if _SHORTER * first <= last <= _LONGER * first:
        return None
    longer = last > first
    with_score = longer and _rose(points, "score")
    message = f"Answers went from {first:.0f} to {last:.0f} tokens"
    if with_score:
        message += (
            ", and the score rose with them: a sign of reward hacking by length. Compare answers "
            "of equal length, train the reward with a length penalty, or raise kl_coef."
        )
    elif longer:
        message += ". Look at rollouts.jsonl; a missing_eos_penalty keeps answers that end."
    else:
        message += (
            ". Short answers may be what the reward wants, or the missing_eos_penalty is large "
            "beside the scores."
        )
    return HealthNote(level="warning", check="length", message=message)


def _cut_off(points: Sequence[PPOPoint]) -> HealthNote | None:
    known = [p.ended for p in points if p.ended is not None]
    if not known or _mean(known[-3:]) >= _ENDED:
        return None
    return HealthNote(
        level="warning",
        check="cut_off",
        message=f"Only {_mean(known[-3:]):.0%} of answers end by themselves; the others are cut "
        "off at max_new_tokens, and the reward judges torsos. Raise max_new_tokens or "
        "missing_eos_penalty, and check stop_token_ids.",
    )


def _failed(points: Sequence[PPOPoint]) -> HealthNote | None:
    known = [p.failed for p in points if p.failed is not None]
    if not known or _mean(known[-3:]) <= _FAILED:
        return None
    return HealthNote(
        level="warning",
        check="failed",
        message=f"{_mean(known[-3:]):.0%} of answers got no score and are left out. If what they "
        "have in common is bad, the policy never learns to avoid it.",
    )


def _steps(points: Sequence[PPOPoint]) -> HealthNote | None:
    clipped = [p.clipfrac for p in points[-3:] if p.clipfrac is not None]
    moved = [p.approxkl for p in points[-3:] if p.approxkl is not None]
    if not clipped or not moved:
        return None
    if _mean(clipped) <= _CLIPPED and _mean(moved) <= _STEP_KL:
        return None
    return HealthNote(
        level="warning",
        check="steps",
        message=f"Within one rollout batch {_mean(clipped):.0%} of tokens are clipped and the "
        f"policy moves by {_mean(moved):.2f} nats a token. Lower the learning rate, or use "
        "fewer num_ppo_epochs.",
    )


def _hacking(points: Sequence[PPOPoint], gold: Sequence[GoldPoint]) -> HealthNote | None:
    """The score rises and what it stands for does not."""
    if len(gold) < 2 or not _rose(points, "score"):
        return None
    best = max(g.value for g in gold)
    now = gold[-1].value
    if best - now < _GOLD_LOST:
        return None
    first, last = _means(points, "score")
    at = next(g.step for g in gold if g.value == best)
    return HealthNote(
        level="problem",
        check="hacking",
        message=f"The score rose from {first:.3g} to {last:.3g}, but the held-out measure fell "
        f"from {best:.3g} (step {at}) to {now:.3g}: the policy exploits the reward. Use the "
        f"checkpoint of step {at}, raise kl_coef, or train the reward on answers of this policy.",
    )


def _stalled(points: Sequence[PPOPoint]) -> HealthNote | None:
    if _rose(points, "score"):
        return None
    first, last = _means(points, "score")
    return HealthNote(
        level="warning",
        check="stall",
        message=f"The score went from {first:.3g} to {last:.3g}, which is within its noise. Raise "
        "the learning rate, lower kl_coef, or check that answers to a prompt differ in score at all.",
    )
