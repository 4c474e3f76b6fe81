"""Judging in waves: only what is worth asking, through the ledger, the same waves again."""

import random

import pytest

from prefopt.errors import JudgeError
from prefopt.judges import ScriptedJudge
from prefopt.judges.base import CostEstimate
from prefopt.judges.waves import judge_in_waves
from prefopt.judging_plan import PlanSettings
from prefopt.preferences import build_preferences
from prefopt.types import Candidate, Prompt, Verdict


def candidates(n, k):
    return [
        Candidate(prompt=prompt, text=f"{i}.{j}", model="m", sample_index=j)
        for i in range(n)
        for prompt in [Prompt.from_text(f"Question {i}?")]
        for j in range(k)
    ]


def quality(candidate):
    return random.Random(f"q{candidate.text}").gauss(0, 1)


class Noisy(ScriptedJudge):
    """Prefers the better answer, with noise and a lean to the first place; counts its calls."""

    def __init__(self, name="noisy", slope=3.0, price=None):
        self.calls = []
        self.price = price

        def decide(c):
            self.calls.append((c.a.text, c.b.text))
            rng = random.Random(f"{name}{c.a.text}|{c.b.text}")
            x = slope * (quality(c.a) - quality(c.b)) + 0.5 + rng.gauss(0, 1.7)
            preferred = "tie" if abs(x) < 0.5 else "a" if x > 0 else "b"
            strength = 0 if preferred == "tie" else 2 if abs(x) > 2 else 1
            return Verdict(judge=name, preferred=preferred, strength=strength)

        super().__init__(decide, name=name)

    def estimate(self, comparisons):
        if self.price is None:
            return None
        n = len(list(comparisons))
        usd = self.price * n
        return CostEstimate(calls=n, input_tokens=n, output_tokens=n, low_usd=usd, high_usd=usd)


def truly_better(found):
    pairs = [(c, r) for g in found.groups for c, r, _ in g.pairs()]
    return sum(quality(c) > quality(r) for c, r in pairs) / len(pairs)


def test_pairs_cost_fewer_calls_than_both_orders_of_everything(tmp_path):
    judge = Noisy()
    judged = judge_in_waves(candidates(200, 2), [judge], ledger=tmp_path / "l", progress=False)
    assert len(judged) == 200
    assert 200 <= len(judge.calls) < 400
    found = build_preferences(judged, rule="inferred", min_p=0.8)
    assert truly_better(found) > 0.9
    calls = len(judge.calls)
    again = judge_in_waves(candidates(200, 2), [judge], ledger=tmp_path / "l", progress=False)
    assert again == judged
    assert len(judge.calls) == calls  # the same waves, all answered by the ledger


def test_best_and_worst_of_eight_take_two_calls_an_answer(tmp_path):
    judge = Noisy()
    judged = judge_in_waves(candidates(14, 8), [judge], progress=False)
    assert len(judge.calls) <= 14 * 16
    found = build_preferences(judged, rule="inferred", pairs_per_prompt=1)
    assert found.n_preferences == 14
    assert truly_better(found) > 0.95


def test_a_dear_judge_sees_only_what_a_cheap_one_leaves_open():
    cheap, dear = Noisy("cheap", slope=1.5, price=0.001), Noisy("dear", slope=6.0, price=0.02)
    settings = PlanSettings(pilot=20)
    judged = judge_in_waves(candidates(80, 2), [cheap, dear], settings=settings, progress=False)
    assert len(dear.calls) < len(cheap.calls)
    assert {v.judge for j in judged for v in j.verdicts} == {"cheap", "dear"}
    for j in judged:
        shown = {(v.judge, v.shown_first) for v in j.verdicts}
        assert len(shown) == len(j.verdicts)  # nobody is asked the same twice


def test_answers_with_the_same_text_count_once_and_lonely_ones_are_left_alone():
    prompt = Prompt.from_text("Name a colour.")
    same = [Candidate(prompt=prompt, text="red", model="m", sample_index=i) for i in range(3)]
    judge = Noisy()
    assert judge_in_waves(same, [judge], progress=False) == []
    assert judge.calls == []


def test_a_failed_verdict_is_kept_and_not_asked_again_in_the_run():
    calls = []

    def decide(c):
        calls.append((c.a.text, c.b.text))
        return Verdict(judge="never", failure="refused")

    judged = judge_in_waves(
        candidates(12, 2), [ScriptedJudge(decide, name="never")], progress=False
    )
    assert len(calls) == len(set(calls))
    assert all(v.failure == "refused" for j in judged for v in j.verdicts)
    assert build_preferences(judged, rule="inferred").reasons() == {"judge_failed": 12}


def test_a_judge_that_cannot_go_on_stops_the_waves():
    def decide(c):
        raise JudgeError("no more")

    with pytest.raises(JudgeError, match="no more"):
        judge_in_waves(candidates(12, 2), [ScriptedJudge(decide)], progress=False)
