"""When to ask again about one pair, when to keep it, when to drop it: an optimal stopping policy.

A pair can be asked about in a few *slots*: one for each judge, order and sample. Its state is what
each slot answered. For a given worth of a kept pair the best policy over all states is found exactly
by dynamic programming (Wald's sequential test, with five-valued and biased observations):

    V(state) = max( 0,  a + e max(p, 1 - p),  max over free slots of  -price + E V(state, answer) )

where max(p, 1 - p) is the probability that the kept label is right. `solve_pair_policy` finds the
worth (a, e) that buys the wanted mean accuracy with the fewest calls for each kept pair, or the best
accuracy for a given number of calls, as a linear programme over policies, solved by adding one
policy at a time. Its optimum may mix two policies; a number drawn for each pair picks one.

This module knows nothing of prompts or files. Calls are counted at the judges' prices.
"""

from __future__ import annotations

import itertools
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from prefopt.label_model import LabelModel
from prefopt.labelling.judge_likelihood import (
    ABOVE_ZERO,
    GAP,
    PRIOR_WEIGHT,
    JudgeParameters,
    log_state_likelihood,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_SLOTS = 6
"""The most slots a pair can have: its 6 ** 6 states are solved in half a second."""

_BASE = 6  # a slot is unasked (0) or holds one of five grades (1 .. 5)


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question that can be asked about a pair once; order 0 shows its first answer first."""

    judge: int
    order: int
    sample: int = 0


class _Solved(msgspec.Struct, frozen=True, eq=False):
    """One policy: optimal for the worth a + e max(p, 1 - p) of a kept pair."""

    a: float
    e: float
    value: Floats  # (states,) V times the probability of the state's answers
    price: float  # expected, a pair
    kept: float
    right: float


class PairPolicy(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What to do in each state, and what that should bring under the model it was made for.

    `least_p`: a pair is worth keeping when max(p, 1 - p) is at least this. `accuracy` is of the kept
    pairs, `keep_share` of all pairs; `price_per_kept` counts calls spent on dropped pairs too.
    `reachable` is False when what was wanted cannot be had; the policy is then the nearest.
    """

    slots: tuple[Slot, ...]
    prices: tuple[float, ...]
    least_p: float
    accuracy: float
    keep_share: float
    price_per_kept: float
    reachable: bool
    solved: tuple[_Solved, ...]
    weights: tuple[float, ...]
    mass: Floats
    right: Floats

    def next_slots(
        self, answers: Ints, blocked: NDArray[np.bool_], draw: Floats
    ) -> tuple[Ints, Floats]:
        """The slot to ask next about each pair, or -1 to stop.

        Args:
            answers: (n, slots); 0 for unasked, else 3 plus the grade in favour of the answer that
                was shown first.
            blocked: (n, slots); True where a slot must not be asked, as it failed before.
            draw: (n,) numbers in [0, 1), one a pair and the same at each call. They choose between
                equally good slots and between mixed policies.

        Returns:
            The slot or -1, and by how many calls asking is expected to be better than stopping.
        """
        n, m = answers.shape
        radix = _BASE ** np.arange(m)[::-1]
        code = answers @ radix
        mass = self.mass[code]
        which = np.searchsorted(np.cumsum(self.weights)[:-1], draw, side="right")
        values = np.full((n, m), -np.inf)
        stop = np.zeros(n)
        for number, policy in enumerate(self.solved):
            mine = which == number
            p = np.maximum(self.right[code[mine]], mass[mine] - self.right[code[mine]]) / mass[mine]
            stop[mine] = np.maximum(0.0, policy.a + policy.e * p)
            for k, slot in enumerate(self.slots):
                free = mine & (answers[:, k] == 0) & ~blocked[:, k]
                after = code[free, None] + radix[k] * np.arange(1, _BASE)
                value = policy.value[after].sum(axis=1) / mass[free]
                values[free, k] = value - self.prices[slot.judge]
        best = values.max(axis=1)
        # Orders of equal value are drawn at random, so that position bias can be told from quality.
        ties = values >= (best - 1e-7)[:, None]
        nth = np.floor(((draw * 9973.0) % 1.0) * ties.sum(axis=1)).astype(np.int64)
        chosen = (np.cumsum(ties, axis=1) > nth[:, None]).argmax(axis=1)
        untouched = (answers == 0).all(axis=1) & ~blocked.any(axis=1)
        ask = np.isfinite(best) & ((best > stop + 1e-9) | untouched)
        return np.where(ask, chosen, -1), np.where(ask, best - stop, 0.0)


def pair_slots(n_judges: int, samples: int = 1) -> tuple[Slot, ...]:
    """Every judge in both orders, `samples` times each, in a fixed order.

    Raises:
        ValueError: more than MAX_SLOTS slots.
    """
    slots = tuple(
        Slot(judge, order, sample)
        for judge in range(n_judges)
        for sample in range(samples)
        for order in (0, 1)
    )
    if not 1 <= len(slots) <= MAX_SLOTS:
        raise ValueError(
            f"{n_judges} judge(s) x 2 orders x {samples} sample(s) are {len(slots)} questions a "
            f"pair, and a policy can weigh 1 to {MAX_SLOTS}. Use fewer judges or samples."
        )
    return slots


def solve_pair_policy(
    model: LabelModel,
    *,
    goal: Literal["accuracy", "price_per_kept"],
    target: float,
    prices: tuple[float, ...] | None = None,
    samples: int = 1,
) -> PairPolicy:
    """The policy that reaches the goal best when pairs are independent.

    Args:
        model: the judges, fitted.
        goal: "accuracy" reaches a mean accuracy of kept pairs with the least spent for each;
            "price_per_kept" gets the best accuracy for a price, calls on dropped pairs included.
        target: the mean accuracy, in (0.5, 1), or the price of a kept pair.
        prices: what a call to each judge costs, in any one unit; 1 each by default.
        samples: how often a judge may be asked the same question in the same order.

    Raises:
        ValueError: a target or price out of range, or too many slots.
    """
    n_judges = len(model.judges)
    cost = (1.0,) * n_judges if prices is None else prices
    if len(cost) != n_judges or min(cost) <= 0:
        raise ValueError(f"prices must be {n_judges} positive number(s), got {cost}.")
    if (goal == "accuracy" and not 0.5 < target < 1.0) or target <= 0:
        raise ValueError(f"the target {goal} is out of range: {target}.")
    slots = pair_slots(n_judges, samples)
    mass, right = _state_masses(model.judges, slots)
    slot_prices = np.array([cost[slot.judge] for slot in slots])

    def solve(a: float, e: float) -> _Solved:
        return _solve(mass, right, slot_prices, a, e)

    unit = float(slot_prices.min())
    found = [
        solve(-c * e * unit, e * unit)
        for c in (0.5, 0.7, 0.85, 0.95)
        for e in (3.0, 10.0, 30.0, 100.0, 1000.0)
    ]
    best_state = float(np.maximum(right / mass, 1 - right / mass).max())
    found += [
        solve(-c * 1e5 * unit, 1e5 * unit) for c in (target, best_state - 1e-3) if 0.5 < c < 1
    ]
    found = [policy for policy in found if policy.kept > 1e-9]

    reachable, weights = True, None
    for _ in range(40):
        solution = _mix(found, goal, target)
        if solution is None:
            break
        weights, a, e = solution
        better = solve(a, e)
        gain = a * better.kept + e * better.right - better.price
        if gain < 1e-6 * unit or better.kept < 1e-9:
            break
        found.append(better)
    if weights is None:
        reachable = False
        nearest = max if goal == "accuracy" else min
        score = [
            policy.right / policy.kept if goal == "accuracy" else policy.price / policy.kept
            for policy in found
        ]
        weights = np.zeros(len(found))
        weights[score.index(nearest(score))] = 1.0
        chosen = found[int(weights.argmax())]
        a, e = chosen.a, chosen.e
    used = np.flatnonzero(weights > 1e-9 * weights.max())
    share = weights[used] / weights[used].sum()
    price, kept, hits = (
        float(sum(w * getattr(found[k], name) for w, k in zip(share, used, strict=True)))
        for name in ("price", "kept", "right")
    )
    return PairPolicy(
        slots=slots,
        prices=cost,
        # A hair below the threshold: states that lie on it are kept, whatever the rounding.
        least_p=float(np.clip(-a / e - 1e-9, 0.5, 1.0)) if e > 0 else 0.5,
        accuracy=hits / kept,
        keep_share=kept,
        price_per_kept=price / kept,
        reachable=reachable,
        solved=tuple(found[k] for k in used),
        weights=tuple(float(w) for w in share),
        mass=mass,
        right=right,
    )


def _mix(found: list[_Solved], goal: str, target: float) -> tuple[Floats, float, float] | None:
    """The best mixture of known policies, and the worth (a, e) in calls that its duals imply.

    Weights are per kept pair: sum(weight * kept) = 1. None when no mixture reaches the target.
    """
    price, kept, hits = (np.array([getattr(p, name) for p in found]) for name in
                         ("price", "kept", "right"))  # fmt: skip
    if goal == "accuracy":
        answer = linprog(price, [target * kept - hits], [0.0], [kept], [1.0], method="highs")
        if answer.status != 0:
            return None
        worth = float(answer.eqlin.marginals[0])
        slope = -float(answer.ineqlin.marginals[0])
        return answer.x, worth - slope * target, slope
    answer = linprog(-hits, [price], [target], [kept], [1.0], method="highs")
    if answer.status != 0:
        return None
    per_call = max(-float(answer.ineqlin.marginals[0]), 1e-9)
    return answer.x, float(answer.eqlin.marginals[0]) / per_call, 1.0 / per_call


def _state_masses(
    judges: tuple[JudgeParameters, ...], slots: tuple[Slot, ...]
) -> tuple[Floats, Floats]:
    """For every state: the probability of its answers, and of its answers and gap > 0."""
    blocks = []
    for number, judge in enumerate(judges):
        orders = [slot.order for slot in slots if slot.judge == number]
        answers = np.array(list(itertools.product(range(_BASE), repeat=len(orders))))
        counts = np.zeros((len(answers), 2, 5), dtype=np.int64)
        for k, order in enumerate(orders):
            given = answers[:, k] > 0
            counts[np.flatnonzero(given), order, answers[given, k] - 1] += 1
        blocks.append(np.exp(log_state_likelihood(judge, counts)))
    left, rest = blocks[0], blocks[1:]
    while len(rest) > 1:
        left = (left[:, None, :] * rest.pop(0)[None]).reshape(-1, len(GAP))
    last = rest[0] if rest else np.ones((1, len(GAP)))
    mass = ((left * PRIOR_WEIGHT) @ last.T).ravel()
    right = ((left * (PRIOR_WEIGHT * ABOVE_ZERO)) @ last.T).ravel()
    return mass, np.clip(right, 0.0, mass)


def _solve(mass: Floats, right: Floats, prices: Floats, a: float, e: float) -> _Solved:
    """Backward induction over all states, grouped by which slots were asked."""
    m = len(prices)
    shape = (_BASE,) * m
    hit = np.maximum(right, mass - right)
    stop = a * mass + e * hit
    keep = stop > 0
    value = np.where(keep, stop, 0.0).reshape(shape)
    kept = np.where(keep, mass, 0.0).reshape(shape)
    hits = np.where(keep, hit, 0.0).reshape(shape)
    spent = np.zeros(shape)
    weight = mass.reshape(shape)
    for asked in sorted(itertools.product((False, True), repeat=m), key=sum, reverse=True):
        here = tuple(slice(1, None) if done else slice(0, 1) for done in asked)
        root = not any(asked)
        best = np.full_like(value[here], -np.inf) if root else value[here].copy()
        parts = [kept[here].copy(), hits[here].copy(), spent[here].copy()]
        for k in (k for k in range(m) if not asked[k]):
            after = (*here[:k], slice(1, None), *here[k + 1 :])
            price = prices[k] * weight[here]
            worth = value[after].sum(axis=k, keepdims=True) - price
            better = worth > best + 1e-12 * price
            best = np.where(better, worth, best)
            for part, source in zip(parts, (kept, hits, spent), strict=True):
                paid = price if source is spent else 0.0
                part[...] = np.where(better, source[after].sum(axis=k, keepdims=True) + paid, part)
        value[here] = best
        kept[here], hits[here], spent[here] = parts
    top = (0,) * m
    return _Solved(a=a, e=e, value=value.ravel(), price=float(spent[top]), kept=float(kept[top]),
                   right=float(hits[top]))  # fmt: skip
