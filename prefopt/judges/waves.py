"""Asks judges in waves, each question chosen by what the last wave showed.

`prefopt.judging_plan` decides what is worth asking; this module turns its numbers into comparisons,
has them asked through the ledger, and turns the verdicts into numbers again. A run that was stopped
plans the same waves again and finds their verdicts in the ledger. It knows nothing of how a verdict
is reached or what becomes of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from prefopt.judges.asking import ask_missing, verdict_key
from prefopt.judges.base import Judge
from prefopt.judges.ledger import Ledger
from prefopt.judging_plan import Asked, PlanSettings, PromptState, next_questions, observations_of
from prefopt.label_model import (
    LabelModel,
    Observations,
    fit_label_model,
    prior_label_model,
)
from prefopt.preferences import seen_by_two
from prefopt.types import Candidate, Comparison, JudgedComparison, Verdict, group_by_prompt

logger = logging.getLogger(__name__)

_FREE = 0.01
"""The price of a call that costs nothing, next to the cheapest that does: its time is not nothing."""

_SAMPLE = 50


def judge_in_waves(
    candidates: Sequence[Candidate],
    judges: Sequence[Judge],
    *,
    settings: PlanSettings | None = None,
    ledger: str | Path | None = None,
    progress: bool = True,
) -> list[JudgedComparison]:
    """Ask about the candidates of each prompt only what is worth its price.

    With two answers a prompt, a pair is asked about until it is sure enough or not worth more; with
    more, the questions that tell most about the best and the worst are asked. A first judge that is
    cheap and a second that is dear make a cascade: the second sees what the first leaves open.

    Args:
        candidates: answers, any number a prompt. Answers with the same text count as one; a prompt
            with fewer than two different answers is not asked about.
        judges: one or more, the cheapest first. A question is asked of a judge once.
        settings: what is wanted and what may be spent; `prices` are worked out from the judges'
            estimates where they are not given.
        ledger: as in `judge_comparisons`.
        progress: show a bar for each wave.

    Returns:
        One JudgedComparison for each pair that was asked about, with all its verdicts: `forward` has
        the answer that was shown first the first time as a; verdicts beyond one in each order by
        the first judge are in `more`. Failed verdicts are there too.

    Raises:
        JudgeError: as in `judge_comparisons`.
    """
    answers = {
        prompt_id: list({c.text: c for c in reversed(group)}.values())[::-1]
        for prompt_id, group in group_by_prompt(candidates).items()
    }
    answers = {key: group for key, group in answers.items() if len(group) > 1}
    wanted = settings or PlanSettings()
    if not wanted.prices:
        wanted = _with_prices(wanted, judges, answers)
    fingerprints = [judge.fingerprint for judge in judges]
    asked: dict[str, list[Asked]] = {key: [] for key in answers}
    verdicts: dict[str, list[tuple[Asked, Verdict]]] = {key: [] for key in answers}
    model = prior_label_model(len(judges))
    wave = 0
    with Ledger(ledger) as book:
        book.check()
        while True:
            states = [PromptState(key, len(answers[key]), tuple(a)) for key, a in asked.items()]
            questions = next_questions(model, states, wanted)
            if not questions:
                break
            wave += 1
            logger.info("wave %d: %s questions", wave, f"{len(questions):,}")
            for number, judge in enumerate(judges):
                mine = [q for q in questions if q.judge == number]
                shown = [
                    Comparison(a=answers[q.key][q.first], b=answers[q.key][q.second]) for q in mine
                ]
                ask_missing(
                    shown, judge, book, total=len(shown), progress=progress, announce=wave == 1
                )
                keys = [verdict_key(fingerprints[number], c) for c in shown]
                outcomes = book.outcomes(keys)
                for q, key in zip(mine, keys, strict=True):
                    verdict = outcomes[key]
                    entry = Asked(q.first, q.second, number, verdict.grade)
                    asked[q.key].append(entry)
                    verdicts[q.key].append((entry, verdict))
            states = [PromptState(key, len(answers[key]), tuple(a)) for key, a in asked.items()]
            model = _fit(observations_of(states), wanted, model)
    return [item for key in answers for item in _judged(answers[key], verdicts[key])]


def _fit(observations: Observations, settings: PlanSettings, start: LabelModel) -> LabelModel:
    """Fit the judges; several that saw the same pairs also show how far each can be trusted.

    A judge that costs much more than the others is taken as the measure of them.
    """
    n = len(start.judges)
    prices = settings.prices
    trusted = max(prices) if prices and max(prices) > 2 * min(prices) else None
    reliability: list[float | Literal["fitted"]] = [
        1.0 if n == 1 or prices[j : j + 1] == (trusted,) else "fitted" for j in range(n)
    ]
    if n > 1 and not seen_by_two(observations):
        reliability = [1.0] * n
    return fit_label_model(observations, n_judges=n, reliability=reliability, start=start)


def _with_prices(
    settings: PlanSettings, judges: Sequence[Judge], answers: dict[str, list[Candidate]]
) -> PlanSettings:
    import msgspec

    sample = [Comparison(a=group[0], b=group[1]) for group in list(answers.values())[:_SAMPLE]]
    dollars = []
    for judge in judges:
        cost = judge.estimate(sample) if sample else None
        dollars.append(0.0 if cost is None else (cost.low_usd + cost.high_usd) / 2 / len(sample))
    paid = [usd for usd in dollars if usd > 0]
    unit = min(paid) if paid else 1.0
    prices = tuple(usd / unit if usd else (_FREE if paid else 1.0) for usd in dollars)
    return msgspec.structs.replace(settings, prices=prices)


def _judged(
    answers: Sequence[Candidate], verdicts: Sequence[tuple[Asked, Verdict]]
) -> list[JudgedComparison]:
    pairs: dict[frozenset[int], list[tuple[Asked, Verdict]]] = {}
    for entry, verdict in verdicts:
        pairs.setdefault(frozenset((entry.first, entry.second)), []).append((entry, verdict))
    found = []
    for given in pairs.values():
        given = sorted(given, key=lambda g: g[0].judge)
        a, b = given[0][0].first, given[0][0].second
        named = [v if entry.first == a else v.swapped() for entry, v in given]
        backward = next(
            (
                i
                for i, (entry, _) in enumerate(given)
                if entry.first == b and entry.judge == given[0][0].judge
            ),
            None,
        )
        rest = [v for i, v in enumerate(named) if i not in (0, backward)]
        found.append(
            JudgedComparison(
                comparison=Comparison(a=answers[a], b=answers[b]),
                forward=named[0],
                backward=None if backward is None else named[backward],
                more=tuple(rest),
            )
        )
    return found
