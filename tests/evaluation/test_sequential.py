"""Stopping early: the interval by hand, its error rate over all looks, and judging in waves."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.evaluation.sequential import (
    ConfidenceSequence,
    SequentialResult,
    decide,
    judge_until_decided,
)
from prefopt.judges.scripted import ScriptedJudge
from prefopt.types import Candidate, Comparison, Prompt, Verdict


def comparisons(n: int, answers: int = 1) -> list[Comparison]:
    return [
        Comparison(
            a=Candidate(prompt=prompt, text=f"tuned {j}", model="tuned", sample_index=j),
            b=Candidate(prompt=prompt, text=f"base {j}", model="base", sample_index=j),
        )
        for prompt in (Prompt.from_text(str(i)) for i in range(n))
        for j in range(answers)
    ]


def run(n: int, decide_by, answers: int = 1, **options):
    asked: list[str] = []

    def answer(comparison):
        asked.append(comparison.prompt.prompt_id)
        return decide_by(comparison)

    found = judge_until_decided(
        comparisons(n, answers), ScriptedJudge(answer), progress=False, **options
    )
    return found, asked


def tuned_wins(comparison):
    return "a" if comparison.a.model == "tuned" else "b"


def test_the_first_two_bets_by_hand() -> None:
    """Against m = 0.2 after scores 1 and 0, with alpha 0.05."""
    sequence = ConfidenceSequence()
    sequence.add(1.0)
    first = min(math.sqrt(2 * math.log(40) / (0.25 * 1 * math.log(2))), 0.5 / 0.2)
    assert sequence._up[0, 200] == pytest.approx(math.log(1 + first * 0.8))
    first_down = min(math.sqrt(2 * math.log(40) / (0.25 * math.log(2))), 0.5 / 0.8)
    assert sequence._down[0, 200] == pytest.approx(math.log(1 - first_down * 0.8))
    sequence.add(0.0)
    # After the score 1 the mean, with half a score at 1/2 before it, is 0.75.
    variance = (0.25 + (1 - 0.75) ** 2) / 2
    second = min(math.sqrt(2 * math.log(40) / (variance * 2 * math.log(3))), 2.5)
    assert sequence._up[0, 200] == pytest.approx(
        math.log(1 + first * 0.8) + math.log(1 - second * 0.2)
    )
    assert sequence.interval == (0.0, 1.0)
    assert sequence.mean == 0.5


def test_a_known_number_of_scores_adds_two_gamblers_by_hand() -> None:
    sequence = ConfidenceSequence(horizon=100)
    sequence.add(1.0)
    bets = [math.sqrt(2 * math.log(40) / (0.25 * n)) for n in (math.log(2), 25, 100)]
    wealth = [math.log(1 + min(bet, 0.5 / 0.2) * 0.8) for bet in bets]
    assert sequence._up[:, 200] == pytest.approx(wealth)
    # All m up to the one at which the mean wealth reaches 40 stay: none is left out yet.
    assert sequence.interval == (0.0, 1.0)
    for _ in range(19):
        sequence.add(1.0)
    low, high = sequence.interval
    mean_up = np.exp(sequence._up).mean(axis=0)
    assert high == 1
    assert mean_up[round(1000 * low)] >= 40 > mean_up[round(1000 * low) + 1]


def test_before_any_score_everything_is_possible() -> None:
    assert ConfidenceSequence().interval == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ConfidenceSequence().add(1.2)
    with pytest.raises(ValueError, match="confidence"):
        ConfidenceSequence(confidence=1.0)
    with pytest.raises(ValueError, match="horizon"):
        ConfidenceSequence(horizon=0)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=60),
    st.sampled_from([None, 1, 40, 10_000]),
)
def test_the_interval_only_narrows_and_mirrors(scores: list[float], horizon: int | None) -> None:
    there, back = (ConfidenceSequence(horizon=horizon) for _ in range(2))
    low, high = 0.0, 1.0
    for score in scores:
        there.add(score)
        back.add(1 - score)
        new_low, new_high = there.interval
        assert low <= new_low <= new_high <= high
        low, high = new_low, new_high
        assert back.interval == pytest.approx((1 - high, 1 - low))


def _misses(runs: int, rate: float, ties: float, horizon: int | None) -> float:
    """How often the truth is left out at any of 150 looks."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(runs):
        win = rate - ties / 2
        sequence = ConfidenceSequence(horizon=horizon)
        for score in rng.choice([1.0, 0.5, 0.0], size=150, p=[win, ties, 1 - win - ties]):
            sequence.add(float(score))
        low, high = sequence.interval  # what was left out once stays out
        missed += not low <= rate <= high
    return missed / runs


@pytest.mark.parametrize(("rate", "ties"), [(0.5, 0.3), (0.9, 0.1)])
def test_the_truth_is_rarely_left_out_at_any_look(rate: float, ties: float) -> None:
    assert _misses(60, rate, ties, 150) <= 0.09


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [None, 150])
@pytest.mark.parametrize(("rate", "ties"), [(0.5, 0.0), (0.5, 0.6), (0.97, 0.02)])
def test_the_truth_is_left_out_at_any_look_less_often_than_promised(rate, ties, horizon) -> None:
    assert _misses(800, rate, ties, horizon) < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 800)


@pytest.mark.parametrize(
    ("low", "high", "margin", "decision"),
    [(0.51, 0.9, 0.05, "better"), (0.1, 0.49, 0.05, "worse"), (0.46, 0.54, 0.05, "equivalent"),
     (0.44, 0.54, 0.05, "undecided"), (0.4, 0.6, 0.05, "undecided"), (0.51, 0.54, 0.05, "better"),
     (0.5, 0.5, 0.0, "equivalent")],
)  # fmt: skip
def test_decisions(low, high, margin, decision) -> None:
    assert decide(low, high, margin) == decision


def test_a_clear_difference_stops_early_and_unasked_prompts_are_counted() -> None:
    looks: list[SequentialResult] = []
    found, asked = run(200, tuned_wins, wave=10, on_wave=looks.append)
    result = found.result
    assert result.decision == "better"
    assert result.low > 0.5
    assert result.n_prompts < 40
    assert result.n_prompts + result.n_unscored + result.n_not_asked == result.n_total == 200
    assert len(found.judged) == result.n_prompts
    assert len(asked) == 2 * result.n_prompts  # both orders
    assert looks[-1] == result
    assert [look.n_waves for look in looks] == list(range(1, len(looks) + 1))
    assert all(look.decision == "undecided" for look in looks[:-1])


def test_ties_throughout_end_as_equivalent() -> None:
    found, _ = run(300, lambda c: "tie", margin=0.1)
    assert found.result.decision == "equivalent"
    assert found.result.n_not_asked > 0
    assert found.result.win_rate == 0.5


def test_without_a_decision_everything_is_judged() -> None:
    found, _ = run(30, lambda c: "tie", margin=0.0)
    assert found.result.decision == "undecided"
    assert found.result.n_not_asked == 0
    assert [j.comparison.comparison_id for j in found.judged] == [
        c.comparison_id for c in comparisons(30)
    ]


def test_failed_verdicts_are_no_scores() -> None:
    def refuses_some(comparison):
        if int(comparison.prompt.text) % 3 == 0:
            return Verdict(judge="s", failure="refused")
        return "tie"

    result = run(30, refuses_some, margin=0.0)[0].result
    assert (result.n_prompts, result.n_unscored) == (20, 10)
    nothing = run(5, lambda c: Verdict(judge="s", failure="refused"))[0].result
    assert (nothing.win_rate, nothing.decision, nothing.n_unscored) == (None, "undecided", 5)
    assert (nothing.low, nothing.high) == (0.0, 1.0)


def test_the_answers_of_a_prompt_stay_together_and_count_once() -> None:
    found, asked = run(60, tuned_wins, answers=3, wave=5)
    assert len(found.judged) == 3 * found.result.n_prompts
    assert all(asked.count(name) == 6 for name in set(asked))
    assert found.result.n_total == 60


def test_the_order_is_random_and_set_by_the_seed() -> None:
    one, two, other = (run(100, tuned_wins, seed=s)[1] for s in (1, 1, 2))
    assert one == two
    assert one != other


def test_a_second_call_on_the_ledger_asks_nothing(tmp_path) -> None:
    first, _ = run(100, tuned_wins, ledger=tmp_path / "l.sqlite")
    again, asked = run(100, tuned_wins, ledger=tmp_path / "l.sqlite")
    assert asked == []
    assert again.result == first.result


def test_senseless_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        judge_until_decided([], ScriptedJudge(tuned_wins))
    with pytest.raises(ValueError, match="margin"):
        run(3, tuned_wins, margin=0.5)
    with pytest.raises(ValueError, match="wave"):
        run(3, tuned_wins, wave=0)


def test_a_result_can_be_written_and_read() -> None:
    result = run(20, tuned_wins)[0].result
    assert msgspec.json.decode(msgspec.json.encode(result), type=SequentialResult) == result
