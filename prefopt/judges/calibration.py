"""Probabilities of a judge fitted to people's labels.

A judge's mean grade g (in favour of a) becomes P(people prefer a), by a logistic curve (Platt 1999)
or a monotone step function (isotonic regression). Exchanging the answers gives exactly 1 - p: both
are fitted to every pair and its mirror image. A calibration holds for one judge and one rubric, and
says so when it is used with another. It fits; measuring agreement is `prefopt.judges.agreement`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from prefopt.errors import DataError
from prefopt.types import JudgedComparison, Winner

Method = Literal["platt", "isotonic"]
Floats = NDArray[np.float64]

_FOLDS = 5
_LOWEST, _HIGHEST = 0.01, 0.99
"""No number of labels here makes a judge surer than this."""


UNINFORMATIVE = (
    "On labels they were not fitted to, these probabilities are no better than one half throughout: "
    "the judge says nothing about these pairs that people would confirm."
)


class Calibration(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.calibration/1",
):
    """P(people prefer a) as a function of the mean grade in favour of a.

    "platt": p = 1 / (1 + exp(-slope * g)). "isotonic": `grades` and `probabilities` are the corners
    of a line that rises. `ece`, `brier` and `log_loss` are cross-validated, on pairs not fitted to.
    """

    judge: str
    rubric_hash: str
    method: Method
    slope: float = 0.0
    grades: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()
    n_labels: int
    ece: float
    brier: float
    log_loss: float
    log_loss_uninformed: float
    """Of a judge that always says one half: ln 2."""

    @property
    def informative(self) -> bool:
        """Whether it foretold the labels it was not fitted to better than one half throughout."""
        return self.log_loss < self.log_loss_uninformed

    def p_a(self, grade: float) -> float:
        """P(people prefer a) for a mean grade."""
        return float(_predict(self, np.array([grade]))[0])

    def apply(self, judged: JudgedComparison) -> float:
        """P(people prefer a) for a judged comparison; 0.5 where a verdict failed."""
        grade = judged.mean_grade
        return 0.5 if grade is None else self.p_a(grade)

    def check(self, judge: str, rubric_hash: str) -> None:
        """Raise DataError when the calibration is another judge's or another rubric's."""
        if judge != self.judge or rubric_hash != self.rubric_hash:
            raise DataError(
                f"this calibration was fitted for {self.judge} (rubric {self.rubric_hash}), and the "
                f"verdicts are by {judge} (rubric {rubric_hash}). Calibrate that judge, with "
                "`prefopt judge calibrate`."
            )


def fit_calibration(
    judged: Sequence[JudgedComparison],
    labels: Sequence[Winner],
    *,
    judge: str,
    rubric_hash: str,
    method: Method | Literal["auto"] = "auto",
    seed: int = 0,
) -> Calibration:
    """Fit a judge's probabilities to people's labels.

    A label "tie" counts half for either side; pairs with a failed verdict are left out. "auto" takes
    the method with the smaller cross-validated log loss (five folds, whole prompts).

    Raises:
        DataError: fewer than 20 usable pairs.
    """
    usable = [
        (item.mean_grade, label, item.comparison.prompt.prompt_id)
        for item, label in zip(judged, labels, strict=True)
        if item.mean_grade is not None
    ]
    if len(usable) < 20:
        raise DataError(
            f"calibration needs at least 20 labelled pairs with verdicts, got {len(usable)}. Label "
            "more; 200 are worth the name."
        )
    grades = np.array([g for g, _, _ in usable], dtype=np.float64)
    wins = np.array([{"a": 1.0, "tie": 0.5, "b": 0.0}[label] for _, label, _ in usable])
    fold = _folds([prompt for _, _, prompt in usable], seed)
    base = {"judge": judge, "rubric_hash": rubric_hash, "n_labels": len(usable)}
    methods: tuple[Method, ...] = ("platt", "isotonic") if method == "auto" else (method,)
    found = []
    for name in methods:
        held_out = np.empty(len(grades))
        for i in range(_FOLDS):
            inside, outside = fold != i, fold == i
            if outside.any() and inside.any():
                fitted = _fit(name, grades[inside], wins[inside], base)
                held_out[outside] = _predict(fitted, grades[outside])
            elif outside.any():
                held_out[outside] = 0.5
        found.append(
            msgspec.structs.replace(
                _fit(name, grades, wins, base),
                ece=expected_calibration_error(held_out, wins),
                brier=float(np.mean((held_out - wins) ** 2)),
                log_loss=_log_loss(held_out, wins),
            )
        )
    return min(found, key=lambda c: c.log_loss)


def expected_calibration_error(p: Floats, wins: Floats, *, n_bins: int = 10) -> float:
    """Mean |average p - average win| over bins of max(p, 1 - p), weighted by how many are in each.

    Pairs and their mirror images are the same here: p below one half is looked at from the other
    side.
    """
    sure, right = np.maximum(p, 1 - p), np.where(p >= 0.5, wins, 1 - wins)
    place = np.minimum(((sure - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    gaps = [
        abs(sure[place == i].mean() - right[place == i].mean()) * (place == i).sum()
        for i in range(n_bins)
        if (place == i).any()
    ]
    return float(sum(gaps) / len(p))


def save_calibration(calibration: Calibration, path: str | Path) -> None:
    """Write a calibration as JSON."""
    from prefopt.data.records import write_bytes

    write_bytes(Path(path), msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")


def load_calibration(path: str | Path) -> Calibration:
    """Read what `save_calibration` wrote. Raises DataError where that cannot be done."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Calibration)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DataError(
            f"cannot read the calibration {path}: {error}. `prefopt judge calibrate` writes one."
        ) from error


def _folds(prompts: Sequence[str], seed: int) -> NDArray[np.int64]:
    names = sorted(set(prompts))
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {name: int(order[i]) % _FOLDS for i, name in enumerate(names)}
    return np.array([fold_of[prompt] for prompt in prompts])


def _fit(method: Method, grades: Floats, wins: Floats, base: dict[str, object]) -> Calibration:
    # Each pair and its mirror image: then p(-g) = 1 - p(g), whatever side people were shown.
    g, y = np.concatenate([grades, -grades]), np.concatenate([wins, 1 - wins])
    empty = {"ece": 0.0, "brier": 0.0, "log_loss": 0.0, "log_loss_uninformed": float(np.log(2))}
    if method == "platt":
        from scipy.optimize import minimize_scalar

        def loss(slope: float) -> float:
            # With a faint pull to 0, so that a judge without a mistake has a finite slope.
            return float(np.logaddexp(0, -slope * g) @ y + np.logaddexp(0, slope * g) @ (1 - y)) + (
                0.5 * slope**2 / 100
            )

        slope = float(minimize_scalar(loss, bounds=(-20, 20), method="bounded").x)
        return msgspec.convert({**base, **empty, "method": "platt", "slope": slope,
                                "schema": "prefopt.calibration/1"}, Calibration)  # fmt: skip
    from scipy.optimize import isotonic_regression

    corners = np.unique(g)
    mean = np.array([y[g == c].mean() for c in corners])
    weight = np.array([(g == c).sum() for c in corners], dtype=np.float64)
    # One made-up win and loss at each grade: three labels are no certainty.
    fitted = isotonic_regression((mean * weight + 0.5) / (weight + 1), weights=weight + 1).x
    fitted = (fitted + (1 - fitted[::-1])) / 2  # the mirror image exactly, rounding included
    return msgspec.convert(
        {**base, **empty, "method": "isotonic", "grades": corners.tolist(),
         "probabilities": fitted.tolist(), "schema": "prefopt.calibration/1"},
        Calibration,
    )  # fmt: skip


def _predict(calibration: Calibration, grades: Floats) -> Floats:
    if calibration.method == "platt":
        p = 1 / (1 + np.exp(-calibration.slope * grades))
    else:
        corners, values = np.array(calibration.grades), np.array(calibration.probabilities)
        # Both directions, so that what is between corners is a mirror image as well.
        p = (np.interp(grades, corners, values) + 1 - np.interp(-grades, corners, values)) / 2
    return np.clip(p, _LOWEST, _HIGHEST)


def _log_loss(p: Floats, wins: Floats) -> float:
    return float(-np.mean(wins * np.log(p) + (1 - wins) * np.log(1 - p)))
