"""What to ask the judges next, in waves, and what to keep: pure functions of the verdicts so far.

`next_questions` takes a fitted model and every prompt's verdicts and returns the next wave, empty
when nothing more is worth its price. Between waves the caller asks the judges and fits the model
again, so what one pair teaches about a judge serves all others, and a pair that was left alone is
taken up again when the judge turns out noisier than thought.

    prompts with two answers    the optimal stopping policy of `pair_policy`
    prompts with more           the question with the largest expected gain per price, over all pairs,
                                orders and judges (knowledge gradient; Frazier and Powell 2010; Xu
                                et al., 2607.02104, choose comparisons for a top-k in this spirit)

The plan asks a judge the same question in the same order once, unless `samples` says otherwise: real
judges repeat their errors, and a cached answer is no second answer. It knows nothing of texts,
judges' names, files or money beyond relative prices. It draws no random numbers; ties are broken by
a hash of the prompt's key and the seed, so orders are random with respect to quality and the same
in every run.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from prefopt.label_model import Beliefs, LabelModel, Observations, beliefs, observe
from prefopt.labelling.judge_likelihood import GAP, JudgeParameters, log_state_likelihood
from prefopt.labelling.pair_policy import PairPolicy, Slot, pair_slots, solve_pair_policy

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(15)
_NODE_WEIGHTS = _NODE_WEIGHTS / _NODE_WEIGHTS.sum()
_FEW_NODES, _FEW_WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_FEW_WEIGHTS = _FEW_WEIGHTS / _FEW_WEIGHTS.sum()


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question that was asked and its grade in favour of `first`, or None when it failed.

    A failed question is not asked again by the plan: trying again is the judge's own business.
    """

    first: int
    second: int
    judge: int
    grade: int | None
    sample: int = 0


class PromptState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt: a key that stays the same between waves, its number of answers, what was asked."""

    key: str
    n_answers: int
    asked: tuple[Asked, ...] = ()


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Show judge `judge` answer `first` before answer `second`. `sample` counts repeats from 0."""

    key: str
    first: int
    second: int
    judge: int
    sample: int = 0


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the labels are for and what may be spent.

    `goal` and `target` are those of `solve_pair_policy`: a mean accuracy of kept pairs, or a price
    for each. `prices` are per judge, in any one unit (1 each by default). `pilot` is how many
    two-answer prompts, at most a tenth of all but at least 10, every judge sees in both orders first:
    they show how far each judge can be trusted before its verdicts decide what is asked.

    For prompts with more than two answers `select` says what is wanted: "best_and_worst", the pair
    to train on with the widest gap, or "pairs", as many good pairs as possible. `calls_per_answer`
    times the number of answers is the most that is spent on a prompt (in calls to the dearest
    judge); `least_gain` stops earlier, when the best question would widen the chosen gap by less than
    this (in standard deviations of quality, for the price of such a call). `per_wave`
    questions are asked about a prompt at once: more finishes in fewer waves, fewer learns more.
    """

    goal: Literal["accuracy", "price_per_kept"] = "accuracy"
    target: float = 0.95
    prices: tuple[float, ...] = ()
    samples: int = 1
    pilot: int = 100
    select: Literal["best_and_worst", "pairs"] = "best_and_worst"
    calls_per_answer: float = 3.0
    least_gain: float = 0.009
    per_wave: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            text
            for text, bad in {
                "samples must be at least 1": self.samples < 1,
                "per_wave must be at least 1": self.per_wave < 1,
                "pilot must be at least 0": self.pilot < 0,
                "calls_per_answer must be positive": self.calls_per_answer <= 0,
                "least_gain must be at least 0": self.least_gain < 0,
                "prices must be positive": any(price <= 0 for price in self.prices),
            }.items()
            if bad
        ]
        if problems:
            raise ValueError("; ".join(problems) + f", got {self}.")


def next_questions(
    model: LabelModel, states: Sequence[PromptState], settings: PlanSettings | None = None
) -> list[Question]:
    """The next wave of questions, or an empty list when no further question is worth its price.

    Args:
        model: the judges as fitted to all verdicts so far; `prior_label_model` before the first wave.
        states: every prompt of the run with all that was asked, in any order.
        settings: what is wanted; the defaults when None.

    Returns:
        Questions in the order of `states`. The same arguments give the same questions.

    Raises:
        ValueError: a state that cannot be (unknown judge or answer, the same question twice, fewer
            than two answers, a repeated key), all at once; or settings that do not fit the model.
    """
    wanted = settings or PlanSettings()
    n_judges = len(model.judges)
    prices = wanted.prices or (1.0,) * n_judges
    if len(prices) != n_judges:
        raise ValueError(f"prices must name {n_judges} judge(s), got {len(prices)} price(s).")
    _check(states, n_judges)
    questions: dict[str, list[Question]] = {}
    two = [state for state in states if state.n_answers == 2]
    if two:
        _ask_pairs(model, two, wanted, prices, questions)
    for k in sorted({state.n_answers for state in states} - {2}):
        same = [state for state in states if state.n_answers == k]
        _ask_answers(model, same, wanted, prices, questions)
    return [question for state in states for question in questions.get(state.key, [])]


def observations_of(states: Iterable[PromptState]) -> Observations:
    """The verdicts of all states as observations; prompts are numbered in the order of the states."""
    rows = [
        (number, asked.first, asked.second, asked.judge, asked.grade)
        for number, state in enumerate(states)
        for asked in state.asked
        if asked.grade is not None
    ]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    return observe(*columns)


def choose_pairs(
    p_right: Floats,
    keys: Sequence[str],
    *,
    goal: Literal["accuracy", "price_per_kept"],
    target: float,
    spent: float = 0.0,
    seed: int = 0,
) -> NDArray[np.bool_]:
    """Which pairs to keep in the end: the surest ones, as many as the goal allows or asks for.

    Args:
        p_right: max(p, 1 - p) of each pair under the final model.
        keys: a name for each pair. Verdicts are few and graded, so many pairs are equally sure; of
            these, a hash of the key and the seed decides which are kept.
        goal: "accuracy" keeps the most pairs whose mean p_right is at least `target`;
            "price_per_kept" keeps the fewest pairs for which `spent` buys them at `target` each.
        target: as in PlanSettings.
        spent: what all calls cost, in the unit of the prices; needed for "price_per_kept".

    Returns:
        True where the pair is kept. With "accuracy" none is kept when even the surest is too unsure.

    Raises:
        ValueError: columns of different lengths.
    """
    p = np.asarray(p_right, dtype=np.float64)
    if len(p) != len(keys):
        raise ValueError(f"expected a key for each pair, got {len(keys)} keys for {len(p)} pairs.")
    order = np.lexsort((_draws(keys, seed), -np.round(p, 9)))
    if goal == "accuracy":
        running = np.cumsum(p[order]) / np.arange(1, len(p) + 1)
        reached = np.flatnonzero(running >= target)
        count = int(reached[-1]) + 1 if len(reached) else 0
    else:
        count = min(len(p), int(np.ceil(spent / target - 1e-9)))
    keep = np.zeros(len(p), dtype=bool)
    keep[order[:count]] = True
    return keep


def _check(states: Sequence[PromptState], n_judges: int) -> None:
    problems = []
    keys = set()
    for state in states:
        if state.key in keys:
            problems.append(f"{state.key}: the key is there twice")
        keys.add(state.key)
        if state.n_answers < 2:
            problems.append(f"{state.key}: {state.n_answers} answer(s), and a comparison needs two")
        seen = set()
        for asked in state.asked:
            answers = {asked.first, asked.second}
            if len(answers) != 2 or not answers <= set(range(state.n_answers)):
                problems.append(f"{state.key}: no pair of its answers: {asked}")
            if not 0 <= asked.judge < n_judges:
                problems.append(f"{state.key}: the model has no judge {asked.judge}")
            if asked.grade is not None and not -2 <= asked.grade <= 2:
                problems.append(f"{state.key}: the grade is not in -2 .. 2: {asked}")
            question = (asked.first, asked.second, asked.judge, asked.sample)
            if question in seen:
                problems.append(f"{state.key}: asked twice: {asked}")
            seen.add(question)
    if problems:
        raise ValueError("These states cannot be: " + "; ".join(problems[:20]))


def _draws(keys: Iterable[str], seed: int) -> NDArray[np.uint64]:
    """64 bits for each key that depend on the key and the seed only."""
    digests = (hashlib.sha256(f"{seed}\x00{key}".encode()).digest()[:8] for key in keys)
    return np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)


# --- Two answers --------------------------------------------------------------------------------


def _ask_pairs(
    model: LabelModel,
    states: list[PromptState],
    settings: PlanSettings,
    prices: tuple[float, ...],
    into: dict[str, list[Question]],
) -> None:
    slots = pair_slots(len(model.judges), settings.samples)
    answers, blocked = _slot_answers(states, slots)
    draws = _draws((state.key for state in states), settings.seed)
    pilot = min(settings.pilot, max(10, len(states) // 10))
    in_pilot = np.argsort(np.argsort(draws, kind="stable"), kind="stable") < pilot
    first_sample = np.array([slot.sample == 0 for slot in slots])
    missing = in_pilot[:, None] & first_sample & (answers == 0) & ~blocked
    if missing.any():
        for row, slot in zip(*np.nonzero(missing), strict=True):
            into.setdefault(states[row].key, []).append(_question(states[row], slots[slot]))
        if len(model.judges) == 1:
            for row in np.flatnonzero(
                ~in_pilot & (answers == 0).all(axis=1) & ~blocked.any(axis=1)
            ):
                slot = Slot(0, int(draws[row] >> np.uint64(7)) & 1)
                into[states[row].key] = [_question(states[row], slot)]
        return
    policy = pair_policy(model, settings, prices)
    chosen, _ = policy.next_slots(answers, blocked, draws.astype(np.float64) / 2.0**64)
    for row in np.flatnonzero(chosen >= 0):
        into[states[row].key] = [_question(states[row], slots[chosen[row]])]


def pair_policy(
    model: LabelModel, settings: PlanSettings, prices: tuple[float, ...] | None = None
) -> PairPolicy:
    """The stopping policy for two-answer prompts that `next_questions` follows under `settings`."""
    return solve_pair_policy(
        model,
        goal=settings.goal,
        target=settings.target,
        prices=prices or settings.prices or None,
        samples=settings.samples,
    )


def _slot_answers(
    states: list[PromptState], slots: tuple[Slot, ...]
) -> tuple[Ints, NDArray[np.bool_]]:
    place = {(slot.judge, slot.order, slot.sample): k for k, slot in enumerate(slots)}
    answers = np.zeros((len(states), len(slots)), dtype=np.int64)
    blocked = np.zeros(answers.shape, dtype=bool)
    for row, state in enumerate(states):
        for asked in state.asked:
            k = place.get((asked.judge, asked.first, asked.sample))
            if k is None:
                raise ValueError(
                    f"{state.key}: sample {asked.sample} was asked, but the settings allow "
                    f"{len({slot.sample for slot in slots})} sample(s) of a question."
                )
            if asked.grade is None:
                blocked[row, k] = True
            else:
                answers[row, k] = asked.grade + 3
    return answers, blocked


def _question(state: PromptState, slot: Slot) -> Question:
    return Question(state.key, slot.order, 1 - slot.order, slot.judge, slot.sample)


# --- More answers -------------------------------------------------------------------------------


def _ask_answers(
    model: LabelModel,
    states: list[PromptState],
    settings: PlanSettings,
    prices: tuple[float, ...],
    into: dict[str, list[Question]],
) -> None:
    k = states[0].n_answers
    limit = settings.calls_per_answer * k * max(prices) + 1e-9
    spent = np.array([sum(prices[asked.judge] for asked in state.asked) for state in states])
    open_rows = np.flatnonzero(spent + min(prices) <= limit)
    if not len(open_rows):
        return
    active = [states[row] for row in open_rows]
    belief = beliefs(model, observations_of(active), len(active), k)
    pairs = np.array(list(itertools.combinations(range(k), 2)))
    worth = (1.0, 1.0)
    if settings.select == "pairs":
        policy = pair_policy(model, settings, prices).solved[0]
        worth = (policy.a, policy.e)
    gains = np.stack(
        [_gains(judge, belief, pairs, settings.select, worth) for judge in model.judges], axis=-1
    )  # (prompts, pairs, 2 orders, judges)
    count = _times_asked(active, pairs, len(model.judges))
    gains = np.where(count < settings.samples, gains / np.array(prices), -np.inf)
    seeds = _draws((state.key for state in active), settings.seed).tolist()
    jitter = np.stack(
        [np.random.Generator(np.random.Philox(key=key)).random(gains.shape[1:]) for key in seeds]
    )
    gains = np.where(gains > -np.inf, gains * (1 + 1e-6 * jitter) + 1e-12 * jitter, -np.inf)
    # Worth is in the unit of the prices; a widening is weighed against the dearest call.
    least = 1.0 if settings.select == "pairs" else settings.least_gain / max(prices)
    purse = limit - spent[open_rows]
    per_wave = settings.per_wave
    for row, state in enumerate(active):
        # Nothing is known yet of a new prompt: each answer may as well be seen once.
        room = per_wave if state.asked else max(per_wave, k // 2)
        own = gains[row].copy()
        money = purse[row]
        for _ in range(room):
            own[..., np.array(prices) > money + 1e-9] = -np.inf
            at = np.unravel_index(int(own.argmax()), own.shape)
            if not own[at] > (least if state.asked else -np.inf):
                break
            pair, order, judge = (int(x) for x in at)
            i, j = (int(x) for x in pairs[pair])
            first, second = (i, j) if order == 0 else (j, i)
            question = Question(
                state.key, first, second, judge, int(count[row, pair, order, judge])
            )
            into.setdefault(state.key, []).append(question)
            money -= prices[judge]
            own[(pairs == i).any(axis=1) | (pairs == j).any(axis=1)] = -np.inf


def _times_asked(states: list[PromptState], pairs: Ints, n_judges: int) -> Ints:
    place = {(int(i), int(j)): row for row, (i, j) in enumerate(pairs)}
    count = np.zeros((len(states), len(pairs), 2, n_judges), dtype=np.int64)
    for row, state in enumerate(states):
        for asked in state.asked:
            order = int(asked.first > asked.second)
            pair = place[min(asked.first, asked.second), max(asked.first, asked.second)]
            # One past the highest sample, so that a failed or missing one is not asked again.
            at = (row, pair, order, asked.judge)
            count[at] = max(int(count[at]), asked.sample + 1)
    return count


def _gains(
    judge: JudgeParameters, belief: Beliefs, pairs: Ints, select: str, worth: tuple[float, float]
) -> Floats:
    """Expected gain of asking `judge` about each pair in each order: (prompts, pairs, 2)."""
    i, j = pairs.T
    mean, cov = belief.mean, belief.cov
    gap = mean[:, i] - mean[:, j]
    var = cov[:, i, i] + cov[:, j, j] - 2 * cov[:, i, j]
    chance, new_gap, new_var = _after_one(judge, gap, var)
    # How far each answer's mean moves when the gap's does.
    loading = (cov[:, :, i] - cov[:, :, j]).transpose(0, 2, 1) / var[..., None]
    if select == "best_and_worst":
        return _widening(mean, loading, var, (chance * new_var).sum(axis=-1))
    shift = new_gap - gap[..., None, None]  # (n, pairs, 2, 5)
    moved = loading[:, :, i] - loading[:, :, j]  # (n, pairs, pairs)
    gaps_after = gap[:, None, None, None] + moved[:, :, None, None] * shift[..., None]
    fall = (var[:, :, None, None] - new_var)[..., None]
    vars_after = var[:, None, None, None] - moved[:, :, None, None] ** 2 * fall
    value = (chance * _worth_of(gaps_after, vars_after, worth)).sum(axis=-1)
    return np.asarray(value - _worth_of(gap, var, worth)[:, None, None])


def _widening(mean: Floats, loading: Floats, var: Floats, var_after: Floats) -> Floats:
    """Expected widening of max(mean) - min(mean) per question, the best of 1, 2 and 4 like questions.

    One question often changes no ranking and two would (Frazier and Powell 2010: KG(*)), so a run of
    m like questions is weighed and its gain divided by m. Their joint outcome is taken as normal.
    """
    information = 1 / var_after - 1 / var[..., None]  # of one question; (n, pairs, 2)
    now = (mean.max(axis=-1) - mean.min(axis=-1))[:, None, None]
    gains = []
    for m in (1, 2, 4):
        left = 1 / (1 / var[..., None] + m * information)
        spread = np.sqrt(np.maximum(var[..., None] - left, 0.0))
        move = loading[:, :, None, None, :] * (spread[..., None] * _FEW_NODES)[..., None]
        after = mean[:, None, None, None, :] + move
        width = (after.max(axis=-1) - after.min(axis=-1)) @ _FEW_WEIGHTS
        gains.append((width - now) / m)
    return np.asarray(np.max(gains, axis=0))


def _worth_of(gap: Floats, var: Floats, worth: tuple[float, float]) -> Floats:
    a, e = worth
    sure = ndtr(np.abs(gap) / np.sqrt(np.maximum(var, 1e-9)))
    return np.asarray(np.maximum(0.0, a + e * sure).sum(axis=-1))


def _after_one(judge: JudgeParameters, gap: Floats, var: Floats) -> tuple[Floats, Floats, Floats]:
    """For each order and grade: its probability, and the gap's mean and variance after it."""
    counts = np.zeros((5, 2, 5), dtype=np.int64)
    counts[np.arange(5), 0, np.arange(5)] = 1
    table = np.exp(log_state_likelihood(judge, counts))  # (5, gaps), first answer shown first
    table = np.stack([table, table[:, ::-1]])  # order 1 sees the opposite gap
    step = GAP[1] - GAP[0]
    at = gap[..., None] + np.sqrt(var)[..., None] * _NODES  # (n, pairs, nodes)
    spot = np.clip((at - GAP[0]) / step, 0, len(GAP) - 1.001)
    left = spot.astype(np.int64)
    part = spot - left
    chance = table[:, :, left] * (1 - part) + table[:, :, left + 1] * part
    weight = chance * _NODE_WEIGHTS
    total = np.maximum(weight.sum(axis=-1), 1e-12)
    new_gap = (weight * at).sum(axis=-1) / total
    new_var = np.maximum((weight * at**2).sum(axis=-1) / total - new_gap**2, 1e-9)
    by_pair = [np.moveaxis(x, (0, 1), (-2, -1)) for x in (total, new_gap, new_var)]
    return by_pair[0], by_pair[1], by_pair[2]
