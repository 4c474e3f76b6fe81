"""Candidates -> comparisons -> preference groups, with a reason for everything left out.

`pair_candidates` says what to compare; `build_preferences` turns verdicts into labels. How sure a
label is comes from all verdicts of the run together (`prefopt.label_model`). Text and numbers only:
no language model, no tensor, no file.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from prefopt.errors import DataError
from prefopt.label_model import (
    JudgeParameters,
    LabelModel,
    Observations,
    PairPosterior,
    count_rings,
    fit_label_model,
    observe,
)
from prefopt.types import (
    Candidate,
    Comparison,
    JudgedComparison,
    LeftOut,
    LeftOutReason,
    Preference,
    PreferenceGroup,
    PSource,
    content_hash,
    group_by_prompt,
)

LabelRule = Literal["mean_grade", "inferred"]

_ENOUGH_TO_FIT = 30
"""With fewer verdicts than this the judge's habits are mostly the model's prior, and p says so."""


class Preferences(msgspec.Struct, frozen=True, kw_only=True):
    """What `build_preferences` returns: the groups, and every comparison that gave no preference."""

    groups: tuple[PreferenceGroup, ...]
    left_out: tuple[LeftOut, ...]
    n_comparisons: int
    n_flipped: int
    judges: dict[str, JudgeParameters] = {}
    """What the verdicts show of each judge: how sharp it is, and how it leans to a position."""

    @property
    def n_preferences(self) -> int:
        """The number of (chosen, rejected) pairs over all groups."""
        return sum(len(group.preferences) for group in self.groups)

    def reasons(self) -> dict[str, int]:
        """How many comparisons were left out, by reason, most frequent first."""
        return dict(Counter(item.reason for item in self.left_out).most_common())

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.reasons().items()) or "none"
        return (
            f"{self.n_preferences} preferences over {len(self.groups)} prompts from "
            f"{self.n_comparisons} comparisons; left out: {reasons}"
        )


def pair_candidates(
    candidates: Sequence[Candidate], *, scheme: Literal["all", "chain"] = "all"
) -> list[Comparison]:
    """Comparisons among the candidates of each prompt.

    Args:
        candidates: answers, any number a prompt, in any order.
        scheme: "all" gives the K(K-1)/2 pairs of each prompt; "chain" gives K pairs in a ring, so
            that every answer is compared twice (for K > 2 at less cost).

    Which answer of a pair is shown first is decided by a hash, so it is random with respect to
    quality and the same in every run.

    Raises:
        DataError: when a prompt has fewer than two candidates, all such prompts at once.
    """
    comparisons = []
    lonely = []
    for prompt_id, group in group_by_prompt(candidates).items():
        if len(group) < 2:
            lonely.append(f"prompt {prompt_id} ({group[0].prompt.text[:60]!r})")
            continue
        if scheme == "all" or len(group) == 2:
            pairs = list(itertools.combinations(group, 2))
        else:
            pairs = list(zip(group, group[1:] + group[:1], strict=True))
        for a, b in pairs:
            comparison = Comparison(a=a, b=b)
            first = int(content_hash([a.candidate_id, b.candidate_id])[:8], 16) % 2
            comparisons.append(comparison.swapped() if first else comparison)
    if lonely:
        raise DataError(
            f"{len(lonely)} prompt(s) have one candidate only, and a comparison needs two. Sample "
            "with k >= 2 or leave these prompts out.",
            lonely,
        )
    return comparisons


def build_preferences(
    judged: Sequence[JudgedComparison],
    *,
    rule: LabelRule = "mean_grade",
    min_margin: float = 1.0,
    min_p: float = 0.5,
    pairs_per_prompt: int | None = None,
    reliability: float | Literal["fitted"] | None = None,
    calibrated_p_a: Callable[[JudgedComparison], float] | None = None,
    fitted: FittedJudges | None = None,
) -> Preferences:
    """Turn judged comparisons into preference groups.

    Two rules say which answer is chosen and what is kept:

    "mean_grade": no verdict failed and the mean signed grade g of the verdicts has
        |g| >= `min_margin`; its sign names the chosen answer. Ties, flips (opposite winners), weak
        and failed ones are left out. Easy to explain, and blind to what the judge is like.
    "inferred": the probability p that a is better, worked out from all verdicts of the run together
        with each judge's sharpness and position bias (`prefopt.label_model`), has
        max(p, 1 - p) >= `min_p`. One failed verdict of two is no reason to leave a pair out.

    Args:
        judged: comparisons with verdicts.
        rule: one of the above.
        min_margin: the least |g| for "mean_grade", in (0, 2]. With grades of 1 ("better") and 2
            ("much better"), 1.0 asks that both orders agree or one says "much better" and the other
            "better".
        min_p: the least p_chosen, in [0.5, 1); 0.5 keeps all that the rule keeps.
        pairs_per_prompt: keep at most this many preferences a prompt, between the answers that lie
            furthest apart (1: the best and the worst); None keeps all. Under "inferred" a pair that
            was never compared directly may be among them, placed by the others.
        reliability: how far a judge's settled opinion can be trusted: a number in (0, 1], where 1
            takes it as the truth, or "fitted". By default it is fitted where two judges saw the same
            pairs, or one compared three or more answers of 30 prompts in a ring (repeated errors
            contradict each other there), and 1 otherwise. Lower it, or calibrate, where people
            disagree with the judge.
        calibrated_p_a: P(a is better) of a judged comparison as fitted to people's labels, such as
            `Calibration.apply`; it takes the place of what is inferred.
        fitted: the judges as `fit_judges` found them, where `judged` is a part of a larger run;
            `reliability` is not read then. By default they are fitted to `judged`.

    Returns:
        Preferences with groups in order of first appearance. `p_chosen` is inferred under either
        rule; its source is "prior" below 30 verdicts, and "calibrated" where that is given.

    Raises:
        ValueError: numbers out of range or an unknown rule; all at once.
    """
    problems = []
    if rule not in ("mean_grade", "inferred"):
        problems.append(f"rule must be mean_grade or inferred, got {rule!r}")
    if not 0.0 < min_margin <= 2.0:
        problems.append(f"min_margin must be in (0, 2], got {min_margin}")
    if not 0.5 <= min_p < 1.0:
        problems.append(f"min_p must be in [0.5, 1), got {min_p}")
    if pairs_per_prompt is not None and pairs_per_prompt < 1:
        problems.append(f"pairs_per_prompt must be at least 1 or None, got {pairs_per_prompt}")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    inference = infer(judged, reliability=reliability, fitted=fitted)
    p_a = inference.p_a(judged) if calibrated_p_a is None else [calibrated_p_a(j) for j in judged]
    by_prompt: dict[str, list[_Labelled]] = {}
    for item, p in zip(judged, p_a, strict=True):
        labelled = _Labelled(item, p, _favours_a(item, p, rule))
        by_prompt.setdefault(item.comparison.prompt.prompt_id, []).append(labelled)

    n_verdicts = _count_verdicts(judged) if fitted is None else fitted.n_verdicts
    source: PSource = "inferred" if n_verdicts >= _ENOUGH_TO_FIT else "prior"
    if calibrated_p_a is not None:
        source = "calibrated"
    groups, left_out = [], []
    for items in by_prompt.values():
        usable: list[_Labelled] = []
        for labelled in items:
            reason = _why_left_out(labelled, rule, min_margin, min_p)
            if reason is None:
                usable.append(labelled)
            else:
                left_out.append(reason)
        if pairs_per_prompt is not None and rule == "inferred" and calibrated_p_a is None:
            group, reasons = _widest_inferred(
                items, inference, pairs_per_prompt, max(min_p, 0.5 + 1e-9), source
            )
            kept_ids = set() if group is None else _pair_ids(group)
            named = {x.comparison_id for x in left_out}
            left_out += [
                reasons.get(x.item.comparison.comparison_id) or _left_out(x.item, "not_selected")
                for x in items
                if x.item.comparison.comparison_id not in kept_ids | named
            ]
            if group is not None:
                groups.append(group)
            continue
        if pairs_per_prompt is not None and len(usable) > pairs_per_prompt:
            kept = _widest(usable, pairs_per_prompt)
            left_out += [_left_out(x.item, "not_selected") for x in usable if x not in kept]
            usable = kept
        if usable:
            groups.append(_group(usable, source))
    return Preferences(
        groups=tuple(groups),
        left_out=tuple(left_out),
        n_comparisons=len(judged),
        n_flipped=sum(item.flipped and not item.judges_disagree for item in judged),
        judges=dict(zip(inference.judges, inference.model.judges, strict=False)),
    )


class Inference(NamedTuple):
    """The judges fitted to all verdicts of a run, and the verdicts themselves as numbers."""

    model: LabelModel
    judges: tuple[str, ...]
    observations: Observations
    prompts: dict[str, int]
    answers: dict[tuple[str, str], int]

    def between(self, pairs: Sequence[tuple[Candidate, Candidate]]) -> PairPosterior:
        """P(first is better than second), with mean and sd of the gap in quality, for each pair.

        The two answers of a pair differ in text. A pair that was never compared is judged through
        the other answers of its prompt; exchanging the answers gives exactly 1 - p.
        """
        wanted = [(self._prompt(x), self._answer(x), self._answer(y)) for x, y in pairs]
        return self.model.p_prefer(self.observations, wanted)

    def p_a(self, judged: Sequence[JudgedComparison]) -> list[float]:
        """P(a is better) for every comparison; 0.5 for two answers with the same text."""
        pairs = [(j.comparison.a, j.comparison.b) for j in judged]
        found = iter(self.between([(a, b) for a, b in pairs if a.text != b.text]).p.tolist())
        return [0.5 if a.text == b.text else next(found) for a, b in pairs]

    def _prompt(self, answer: Candidate) -> int:
        return self.prompts[answer.prompt.prompt_id]

    def _answer(self, answer: Candidate) -> int:
        return self.answers[(answer.prompt.prompt_id, answer.text)]


class FittedJudges(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.fitted_judges/1",
):
    """Judges as fitted to a run's verdicts: `names` in the order of `model.judges`.

    `n_verdicts` counts the verdicts that were not failures.
    """

    names: tuple[str, ...]
    model: LabelModel
    n_verdicts: int


def fit_judges(
    portions: Iterable[Sequence[JudgedComparison]],
    *,
    reliability: float | Literal["fitted"] | None = None,
) -> FittedJudges:
    """The judges fitted to the verdicts of a run that comes in portions, which are not kept.

    Args:
        portions: judged comparisons; those of one prompt are all in one portion.
        reliability: as in `build_preferences`.
    """
    numbers = _Numbers()
    n_verdicts = 0
    for portion in portions:
        numbers.add(portion)
        numbers.forget_answers()
        n_verdicts += _count_verdicts(portion)
    model = _fit(numbers.observations(), len(numbers.judges), reliability)
    return FittedJudges(names=tuple(numbers.judges), model=model, n_verdicts=n_verdicts)


def infer(
    judged: Sequence[JudgedComparison],
    *,
    reliability: float | Literal["fitted"] | None = None,
    fitted: FittedJudges | None = None,
) -> Inference:
    """Fit every judge's sharpness, position bias and thresholds to all verdicts together.

    Failed verdicts are no observations. Answers of a prompt are told apart by their text. With
    `fitted`, judges are taken as they are there.

    Raises:
        DataError: a judge that is not among `fitted`.
    """
    numbers = _Numbers(() if fitted is None else fitted.names)
    numbers.add(judged)
    judges = tuple(numbers.judges)
    observations = numbers.observations()
    if fitted is None:
        model = _fit(observations, len(judges), reliability)
    elif judges == fitted.names:
        model = fitted.model
    else:
        raise DataError(
            f"there are verdicts by {', '.join(judges[len(fitted.names) :])}, and the judges were "
            f"fitted without: {', '.join(fitted.names) or 'none'}. Fit them to all verdicts."
        )
    return Inference(model, judges, observations, numbers.prompts, numbers.answers)


def _fit(
    observations: Observations, n_judges: int, reliability: float | Literal["fitted"] | None
) -> LabelModel:
    if reliability is None:
        known = seen_by_two(observations) or count_rings(observations) >= _ENOUGH_TO_FIT
        reliability = "fitted" if known else 1.0
    return fit_label_model(observations, n_judges=max(n_judges, 1), reliability=reliability)


class _Numbers:
    """Verdicts as rows of numbers: prompts, answers and judges are numbered as they come."""

    def __init__(self, judges: Sequence[str] = ()) -> None:
        self.prompts: dict[str, int] = {}
        self.answers: dict[tuple[str, str], int] = {}
        self.judges = {name: number for number, name in enumerate(judges)}
        self._n_prompts = self._n_answers = 0
        self._rows: list[tuple[int, int, int, int, int]] = []

    def add(self, judged: Iterable[JudgedComparison]) -> None:
        for item in judged:
            a, b = item.comparison.a, item.comparison.b
            prompt = self.prompts.setdefault(
                a.prompt.prompt_id, self._n_prompts + len(self.prompts)
            )
            index_a, index_b = (
                self.answers.setdefault(
                    (c.prompt.prompt_id, c.text), self._n_answers + len(self.answers)
                )
                for c in (a, b)
            )
            if a.text == b.text:
                continue
            for verdict in item.verdicts:
                grade = verdict.grade
                if grade is None:
                    continue
                judge = self.judges.setdefault(verdict.judge, len(self.judges))
                shown = (index_a, index_b, grade)
                if verdict.shown_first == "b":
                    shown = (index_b, index_a, -grade)
                self._rows.append((prompt, shown[0], shown[1], judge, shown[2]))

    def forget_answers(self) -> None:
        """Drop the names of prompts and answers, none of which comes again; the numbers go on."""
        self._n_prompts += len(self.prompts)
        self._n_answers += len(self.answers)
        self.prompts, self.answers = {}, {}

    def observations(self) -> Observations:
        return observe(*(list(zip(*self._rows, strict=True)) if self._rows else [()] * 5))


def _count_verdicts(judged: Iterable[JudgedComparison]) -> int:
    return sum(v.failure is None for item in judged for v in item.verdicts)


def seen_by_two(observations: Observations) -> bool:
    """Whether some pair has verdicts by two judges; without that nothing shows whom to trust."""
    judges_of: dict[tuple[int, int, int], int] = {}
    rows = zip(
        observations.prompt.tolist(),
        observations.first.tolist(),
        observations.second.tolist(),
        observations.judge.tolist(),
        strict=True,
    )
    for prompt, first, second, judge in rows:
        pair = (prompt, min(first, second), max(first, second))
        if judges_of.setdefault(pair, judge) != judge:
            return True
    return False


class _Labelled(NamedTuple):
    """A judged comparison, P(a is better), and whether its label favours a (None: neither)."""

    item: JudgedComparison
    p_a: float
    favours_a: bool | None

    @property
    def p_chosen(self) -> float:
        return self.p_a if self.favours_a else 1.0 - self.p_a


def _favours_a(item: JudgedComparison, p_a: float, rule: LabelRule) -> bool | None:
    if rule == "inferred":
        return None if p_a == 0.5 else p_a > 0.5
    grade = item.mean_grade
    return None if not grade else grade > 0


def _why_left_out(
    labelled: _Labelled, rule: LabelRule, min_margin: float, min_p: float
) -> LeftOut | None:
    item = labelled.item
    a, b = item.comparison.a.text, item.comparison.b.text
    if a.strip() == b.strip():
        return _left_out(item, "identical_answers")
    if item.failures and (rule == "mean_grade" or len(item.failures) == len(item.verdicts)):
        return _left_out(item, "judge_failed", ", ".join(item.failures))
    grade = item.mean_grade
    if rule == "mean_grade":
        assert grade is not None, "a comparison without failures has a grade"
        if item.flipped:
            return _left_out(item, "judges_disagree" if item.judges_disagree else "flipped")
        if grade == 0:
            return _left_out(item, "tie")
        if abs(grade) < min_margin:
            return _left_out(item, "weak", f"mean grade {grade:+.1f}")
    if labelled.favours_a is None or labelled.p_chosen < min_p:
        return _left_out(item, "uncertain", f"p {max(labelled.p_a, 1 - labelled.p_a):.2f}")
    if not (a if labelled.favours_a else b).strip():
        return _left_out(item, "empty_answer", "the preferred answer is empty")
    return None


def _left_out(
    item: JudgedComparison,
    reason: LeftOutReason,
    detail: str = "",
) -> LeftOut:
    return LeftOut(
        prompt_id=item.comparison.prompt.prompt_id,
        comparison_id=item.comparison.comparison_id,
        reason=reason,
        detail=detail,
    )


def _widest(usable: list[_Labelled], n: int) -> list[_Labelled]:
    """The n decided comparisons whose answers lie furthest apart, each answer used once if possible.

    Answers are placed by their mean grade over all decided comparisons they took part in. Of equals
    the first is taken, so the choice is repeatable; the order of `usable` is kept.
    """
    grades: dict[str, list[float]] = {}
    for labelled in usable:
        grade = _signed_margin(labelled)
        grades.setdefault(labelled.item.comparison.a.candidate_id, []).append(grade)
        grades.setdefault(labelled.item.comparison.b.candidate_id, []).append(-grade)
    mean = {key: sum(values) / len(values) for key, values in grades.items()}

    def gap(labelled: _Labelled) -> float:
        comparison = labelled.item.comparison
        between = mean[comparison.a.candidate_id] - mean[comparison.b.candidate_id]
        return between if labelled.favours_a else -between

    kept: list[_Labelled] = []
    used: set[str] = set()

    def rank(labelled: _Labelled) -> tuple[int, float]:
        return (-len(_answer_ids(labelled.item) & used), gap(labelled))

    for _ in range(n):
        best = max((x for x in usable if x not in kept), key=rank)
        kept.append(best)
        used.update(_answer_ids(best.item))
    return [x for x in usable if x in kept]


def _widest_inferred(
    items: list[_Labelled],
    inference: Inference,
    n: int,
    min_p: float,
    source: PSource,
) -> tuple[PreferenceGroup | None, dict[str, LeftOut]]:
    """The n pairs of a prompt's answers that lie furthest apart, asked about directly or not."""
    answers: dict[str, Candidate] = {}
    for x in items:
        for candidate in (x.item.comparison.a, x.item.comparison.b):
            if candidate.text.strip():
                answers.setdefault(candidate.text, candidate)
    pairs = list(itertools.combinations(answers.values(), 2))
    posterior = inference.between(pairs)
    rows = [
        (pair if mean > 0 else pair[::-1], max(p, 1.0 - p), abs(mean))
        for pair, p, mean in zip(pairs, posterior.p.tolist(), posterior.mean.tolist(), strict=True)
    ]
    sure = sorted((r for r in rows if r[1] >= min_p), key=lambda r: -r[2])
    kept: list[tuple[tuple[Candidate, Candidate], float, float]] = []
    used: set[str] = set()
    while sure and len(kept) < n:
        best = min(sure, key=lambda r: (len({c.text for c in r[0]} & used), -r[2]))
        sure.remove(best)
        kept.append(best)
        used |= {c.text for c in best[0]}
    uncertain = {
        x.item.comparison.comparison_id: _left_out(x.item, "uncertain", f"p {x.p_chosen:.2f}")
        for x in items
        if max(x.p_a, 1.0 - x.p_a) < min_p
    }
    if not kept:
        return None, uncertain
    chosen_from = {c.candidate_id: c for pair, _, _ in kept for c in pair}
    index = {key: position for position, key in enumerate(chosen_from)}
    group = PreferenceGroup(
        prompt=items[0].item.comparison.prompt,
        answers=tuple(chosen_from.values()),
        preferences=tuple(
            Preference(
                chosen=index[chosen.candidate_id],
                rejected=index[rejected.candidate_id],
                p_chosen=p,
                p_source=source,
                margin=gap,
            )
            for (chosen, rejected), p, gap in kept
        ),
    )
    return group, uncertain


def _pair_ids(group: PreferenceGroup) -> set[str]:
    return {Comparison(a=c, b=r).comparison_id for c, r, _ in group.pairs()}


def _signed_margin(labelled: _Labelled) -> float:
    """The mean grade of the verdicts that were given, in favour of a; never of the wrong sign."""
    grades = [g for v in labelled.item.verdicts if (g := v.grade) is not None]
    size = abs(sum(grades) / len(grades)) if grades else 0.0
    return size if labelled.favours_a else -size


def _answer_ids(item: JudgedComparison) -> set[str]:
    return {item.comparison.a.candidate_id, item.comparison.b.candidate_id}


def _group(usable: list[_Labelled], source: PSource) -> PreferenceGroup:
    answers: dict[str, Candidate] = {}
    for labelled in usable:
        for candidate in (labelled.item.comparison.a, labelled.item.comparison.b):
            answers.setdefault(candidate.candidate_id, candidate)
    index = {key: position for position, key in enumerate(answers)}
    preferences = []
    for labelled in usable:
        comparison = labelled.item.comparison
        a, b = index[comparison.a.candidate_id], index[comparison.b.candidate_id]
        chosen, rejected = (a, b) if labelled.favours_a else (b, a)
        preferences.append(
            Preference(
                chosen=chosen,
                rejected=rejected,
                p_chosen=labelled.p_chosen,
                p_source=source,
                margin=abs(_signed_margin(labelled)),
            )
        )
    return PreferenceGroup(
        prompt=usable[0].item.comparison.prompt,
        answers=tuple(answers.values()),
        preferences=tuple(preferences),
    )
