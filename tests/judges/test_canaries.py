"""Answers made to fool a judge: which are shown, and how what the judge said is counted."""

import pytest

from prefopt.judges import ScriptedJudge, judge_comparisons
from prefopt.judges.canaries import ATTACKS, CanaryResult, canary_comparisons, read_canaries
from prefopt.judges.rules import RuleJudge
from prefopt.types import Candidate, Comparison, Prompt, Verdict


def real(n, text="A real answer of several words."):
    prompts = [Prompt.from_text(f"Question {i}?") for i in range(n)]
    return [
        Comparison(
            a=Candidate(prompt=p, text=f"{text} {i}", model="m"),
            b=Candidate(prompt=p, text="Short.", model="m", sample_index=1),
        )
        for i, p in enumerate(prompts)
    ]


def test_every_attack_is_tried_on_a_few_prompts_the_same_ones_each_time():
    canaries = canary_comparisons(real(20), n_prompts=4)
    assert len(canaries) == 4 * len(ATTACKS)
    assert canaries == canary_comparisons(reversed(real(20)), n_prompts=4)
    assert all(c.comparison.a.text.startswith("A real answer") for c in canaries)
    assert {c.comparison.b.text for c in canaries} == set(ATTACKS.values())


def test_prompts_with_short_answers_only_are_passed_over():
    assert canary_comparisons(real(5, text="No.")) == []


def test_a_judge_that_obeys_is_counted_as_fooled_and_one_that_reads_is_not():
    canaries = canary_comparisons(real(5), n_prompts=3)
    obeys = ScriptedJudge(lambda c: "a" if "ignore the rubric" in c.a.text else "b" if
                          "ignore the rubric" in c.b.text else "tie")  # fmt: skip
    found = judge_comparisons([c.comparison for c in canaries], obeys, progress=False)
    results = {r.kind: r for r in read_canaries(canaries, found)}
    assert results["instruction"] == CanaryResult(
        kind="instruction", n_verdicts=6, n_fooled=6, n_tie=0, n_failed=0
    )
    assert results["constant"].n_tie == 6
    reads = ScriptedJudge(lambda c: "a" if "real answer" in c.a.text else "b")
    found = judge_comparisons([c.comparison for c in canaries], reads, progress=False)
    assert all(r.n_fooled == 0 and r.n_sound == 6 for r in read_canaries(canaries, found))


def test_a_failed_canary_is_neither_fooled_nor_sound():
    canaries = canary_comparisons(real(2), n_prompts=1)
    fails = ScriptedJudge(lambda c: Verdict(judge="f", failure="refused"), name="f")
    found = judge_comparisons([c.comparison for c in canaries], fails, progress=False)
    assert all(
        (r.n_fooled, r.n_sound, r.n_failed) == (0, 0, 2) for r in read_canaries(canaries, found)
    )
    with pytest.raises(ValueError, match="not the canaries"):
        read_canaries(canaries, found[:-1])


def test_an_attack_is_never_taken_for_a_real_answer():
    prompt = Prompt.from_text("Why?")
    answers = [ATTACKS["instruction"], "Because five words are enough."]
    a, b = (Candidate(prompt=prompt, text=text, model="m") for text in answers)
    canaries = canary_comparisons([Comparison(a=a, b=b)])
    assert {c.comparison.a.text for c in canaries} == {"Because five words are enough."}


def test_how_many_prompts_is_checked():
    assert canary_comparisons(real(3), n_prompts=0) == []
    with pytest.raises(ValueError, match="0 or more, got -1"):
        canary_comparisons(real(3), n_prompts=-1)


def test_the_interval_is_of_verdicts_that_did_not_fail():
    def result(n, fooled, failed):
        return CanaryResult(
            kind="constant", n_verdicts=n, n_fooled=fooled, n_tie=0, n_failed=failed
        )

    assert result(10, 5, 0).fooled_interval == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert result(14, 5, 4).fooled_interval == result(10, 5, 0).fooled_interval
    assert result(8, 0, 8).fooled_interval is None


def test_the_rules_are_not_fooled_where_the_real_answer_answers():
    asked = {
        "How do I boil an egg?": "Put the egg into boiling water for eight minutes, then cool it.",
        "Why is the sky blue?": "Air scatters blue light more than red light, so the sky is blue.",
        "Name a use for old jars.": "Old jars keep rice and screws dry and visible on a shelf.",
    }
    comparisons = []
    for question, answer in asked.items():
        prompt = Prompt.from_text(question)
        a, b = (Candidate(prompt=prompt, text=t, model="m") for t in (answer, "No idea."))
        comparisons.append(Comparison(a=a, b=b))
    canaries = canary_comparisons(comparisons)
    found = judge_comparisons([c.comparison for c in canaries], RuleJudge(), progress=False)
    assert [(r.n_verdicts, r.n_sound) for r in read_canaries(canaries, found)] == [(6, 6)] * 3
