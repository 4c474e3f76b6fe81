"""Verdicts as checked columns, and as counted states of compared pairs.

Two pairs with the same verdicts, or with mirror images of them, share one state, so that all later
work is done once for each state and swapping two answers gives exactly 1 - p. This module knows no
probabilities.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Observations(msgspec.Struct, frozen=True, eq=False):
    """Verdicts as columns of equal length; build them with `observe`, which checks them.

    `prompt`, `first`, `second` and `judge` are integers without further meaning: `first` and `second`
    tell the answers of one prompt apart, judges are numbered from 0. `grade` is in -2 .. 2 and
    favours the answer shown first when positive.
    """

    prompt: Ints
    first: Ints
    second: Ints
    judge: Ints
    grade: Ints

    def __len__(self) -> int:
        return len(self.prompt)


def observe(
    prompt: ArrayLike, first: ArrayLike, second: ArrayLike, judge: ArrayLike, grade: ArrayLike
) -> Observations:
    """Check columns of verdicts and hold them together.

    Args:
        prompt: integer names of prompts.
        first: the answer shown first; any integer that names it within its prompt.
        second: the answer shown second.
        judge: judge numbers from 0.
        grade: integers in -2 .. 2, in favour of the answer shown first.

    Raises:
        DataError: columns of different lengths, values that are not whole numbers, an answer compared
            with itself, a negative judge, or a grade out of range; all at once.
    """
    raw = {"prompt": prompt, "first": first, "second": second, "judge": judge, "grade": grade}
    columns, problems = {}, []
    for name, values in raw.items():
        column = np.asarray(values)
        if column.size == 0:
            column = np.zeros(0, dtype=np.int64)
        if column.ndim != 1 or column.dtype.kind not in "iuf":
            problems.append(f"{name}: expected a list of whole numbers, got {column.dtype} values")
        elif column.dtype.kind == "f" and not bool((column == np.round(column)).all()):
            problems.append(
                f"{name}: expected whole numbers, got some that are not (a failed verdict?)"
            )
        else:
            columns[name] = column.astype(np.int64)
    if not problems and len({len(column) for column in columns.values()}) != 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        problems.append(f"expected columns of equal length, got {lengths}")
    if not problems:
        c = columns
        checks = {
            "an answer is compared with itself": c["first"] == c["second"],
            "the grade is not in -2 .. 2": np.abs(c["grade"]) > 2,
            "the judge's number is negative": c["judge"] < 0,
        }
        for what, bad in checks.items():
            problems += [f"row {row}: {what}" for row in np.flatnonzero(bad)[:1000]]
    if problems:
        raise DataError("These verdicts cannot be used. Leave failed verdicts out.", problems)
    return Observations(**columns)


def count_rings(observations: Observations) -> int:
    """How often one judge compared answers of one prompt in a ring, as in a : b, b : c, c : a.

    A judge that errs anew for each pair contradicts itself around a ring, however often it repeats
    each verdict; that is how its repeated errors show without anybody else.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(observations):
        return 0
    o = observations
    low, high = np.minimum(o.first, o.second), np.maximum(o.first, o.second)
    pairs = np.unique(np.stack([o.judge, o.prompt, low, high], axis=1), axis=0)
    ends = np.concatenate([pairs[:, [0, 1, 2]], pairs[:, [0, 1, 3]]])
    answers, place = np.unique(ends, axis=0, return_inverse=True)
    start, stop = place.reshape(2, -1)
    n = len(answers)
    graph = coo_array((np.ones(len(pairs)), (start, stop)), shape=(n, n))
    n_parts, part = connected_components(graph, directed=False)
    # A connected graph without a ring has one line less than it has points.
    lines = np.bincount(part[start], minlength=n_parts)
    points = np.bincount(part, minlength=n_parts)
    return int((lines >= points).sum())


def grade_from_p_first(p_first: ArrayLike) -> Ints:
    """Grades for a judge that gives P(first is better), such as a model's token probability.

    The cuts are 0.1, 0.4, 0.6 and 0.9. They need not be right: the fitted thresholds say what each
    grade of this judge means. What is lost is the difference between probabilities of one grade.

    Raises:
        ValueError: a value outside [0, 1], or NaN.
    """
    p = np.asarray(p_first, dtype=np.float64)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("p_first must be probabilities in [0, 1]; leave missing ones out.")
    strength = (np.abs(p - 0.5) > 0.1).astype(np.int64) + (np.abs(p - 0.5) > 0.4)
    return np.asarray(np.sign(p - 0.5) * strength, dtype=np.int64)


class Encoded(msgspec.Struct, frozen=True, eq=False):
    """Each compared pair once, as a state for each judge; equal pairs share all work.

    A pair is turned so that its verdicts come in a fixed order; `sign` is -1 where that exchanged
    `low` and `high`. So a pair and its mirror image are one state, and give p and 1 - p exactly.
    """

    prompt: Ints  # (pairs,)
    low: Ints  # (pairs,)
    high: Ints  # (pairs,)
    sign: Floats  # (pairs,)
    balanced: NDArray[np.bool_]  # (pair states,) its own mirror image
    state: Ints  # (pairs,) row of `states`
    states: Ints  # (pair states, judges) row of each judge's counts
    counts: tuple[Ints, ...]  # per judge (judge states, 2, 5)
    alone: NDArray[np.bool_]  # (pairs,) the only compared pair of its prompt


def encode(observations: Observations, n_judges: int) -> Encoded:
    """Count the verdicts of each compared pair; the order of the observations changes nothing.

    Raises:
        DataError: a verdict by a judge that is not among 0 .. n_judges - 1.
    """
    if len(observations) and int(observations.judge.max()) >= n_judges:
        raise DataError(
            f"The verdicts name judge {int(observations.judge.max())}, but the model knows "
            f"{n_judges} judge(s), numbered from 0. Fit the model to these verdicts."
        )
    low = np.minimum(observations.first, observations.second)
    high = np.maximum(observations.first, observations.second)
    pairs, row = np.unique(
        np.stack([observations.prompt, low, high], axis=1), axis=0, return_inverse=True
    )
    row = row.reshape(-1)
    n = len(pairs)
    backwards = (observations.first != low).astype(np.int64)
    cell = ((row * n_judges + observations.judge) * 2 + backwards) * 5 + observations.grade + 2
    counts = np.bincount(cell, minlength=n * n_judges * 10).reshape(n, n_judges, 2, 5)
    difference = (counts - counts[:, :, ::-1]).reshape(n, n_judges * 10)
    leading = np.take_along_axis(difference, (difference != 0).argmax(axis=1)[:, None], axis=1)[
        :, 0
    ]
    counts[leading < 0] = counts[leading < 0][:, :, ::-1]

    per_judge, columns = [], []
    for j in range(n_judges):
        flat = np.concatenate([np.zeros((1, 10), dtype=np.int64), counts[:, j].reshape(n, 10)])
        unique, inverse = np.unique(flat, axis=0, return_inverse=True)
        per_judge.append(unique.reshape(-1, 2, 5))
        columns.append(inverse.reshape(-1)[1:])
    # The empty state sorts first, so 0 always means "this judge said nothing about the pair".
    states, state, first_row = (
        np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True, return_index=True)[i]
        for i in (0, 2, 1)
    )
    _, prompt_row, pairs_there = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    return Encoded(
        prompt=pairs[:, 0],
        low=pairs[:, 1],
        high=pairs[:, 2],
        sign=np.where(leading < 0, -1.0, 1.0),
        balanced=(leading == 0)[first_row],
        state=state.reshape(-1),
        states=states,
        counts=tuple(per_judge),
        alone=(pairs_there == 1)[prompt_row.reshape(-1)],
    )
