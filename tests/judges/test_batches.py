"""Message batches: half price, never sent twice, every kind of result accounted for."""

import asyncio
import json

import anthropic
import pytest

from prefopt.errors import BudgetExceeded, JudgeUnavailable
from prefopt.judges import judge_comparisons
from prefopt.judges.anthropic import Abilities, AnthropicJudge
from prefopt.judges.ledger import Ledger
from prefopt.testing import (
    FakeAnthropic,
    dropped_connection,
    shown_responses,
    status_fault,
    verdict_reply,
)
from prefopt.testing.faults import cut_off, processed_then_timeout
from prefopt.types import Candidate, Comparison, Prompt

MODEL = "claude-sonnet-5-5"


def pairs(n):
    """n comparisons in which the answer with the word "good" is the better one."""
    made = []
    for i in range(n):
        prompt = Prompt.from_text(f"Question {i}?")
        a, b = (f"good {i}", f"bad {i}") if i % 2 else (f"bad {i}", f"good {i}")
        made.append(
            Comparison(
                a=Candidate(prompt=prompt, text=a, model="m"),
                b=Candidate(prompt=prompt, text=b, model="m", sample_index=1),
            )
        )
    return made


def prefer_good(params):
    first, _ = shown_responses(params)
    return verdict_reply("first" if first.startswith("good") else "second")


def batch_judge(fake, **options):
    async def sleep(seconds):
        pass

    options = {"max_usd": 100.0, "transport": "batch", "reconcile_s": 0.0} | options
    return AnthropicJudge(MODEL, client=fake.client(), sleep=sleep, **options)


def winners(judged):
    return ["b" if j.comparison.b.text.startswith("good") else "a" for j in judged]


def created(fake):
    return [name for name in fake.calls if name == "batches.create"]


def test_a_batch_gives_the_same_verdicts_as_asking_one_by_one_for_half_the_price(tmp_path):
    items = pairs(6)
    sync_fake, fake = FakeAnthropic(prefer_good), FakeAnthropic(prefer_good)
    one_by_one = judge_comparisons(
        items, batch_judge(sync_fake, transport="sync"), ledger=tmp_path / "s", progress=False
    )
    judged = judge_comparisons(items, batch_judge(fake), ledger=tmp_path / "b", progress=False)
    assert [j.forward.preferred for j in judged] == winners(judged)
    assert [j.mean_grade for j in judged] == [j.mean_grade for j in one_by_one]
    assert len(created(fake)) == 1
    assert len(fake.batches) == 1
    assert len(fake.requests) == 1  # the trial
    with Ledger(tmp_path / "b") as book, Ledger(tmp_path / "s") as sync_book:
        spent, unknown, reserved = book.money()
        assert (unknown, reserved) == (0, pytest.approx(0))
        assert spent == pytest.approx(
            sum(j.forward.usage.cost_usd for j in judged)
            + sum(j.backward.usage.cost_usd for j in judged)
        )
        trial = max(j.forward.usage.cost_usd for j in judged)
        assert spent < 0.6 * sync_book.spent_usd() + trial


def test_a_second_call_asks_nothing(tmp_path):
    fake = FakeAnthropic(prefer_good)
    first = judge_comparisons(pairs(4), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    calls = len([c for c in fake.calls if not c.startswith("models.")])
    again = judge_comparisons(pairs(4), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert again == first
    assert len([c for c in fake.calls if not c.startswith("models.")]) == calls


def test_auto_takes_batches_from_500_calls_on(tmp_path):
    fake = FakeAnthropic(prefer_good)
    judge_comparisons(pairs(249), batch_judge(fake, transport="auto"), progress=False)
    assert created(fake) == []
    judge_comparisons(pairs(250), batch_judge(fake, transport="auto"), progress=False)
    assert len(created(fake)) == 1


def test_large_jobs_are_cut_into_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.judges.anthropic_batches.MAX_REQUESTS", 5)
    fake = FakeAnthropic(prefer_good)
    judged = judge_comparisons(pairs(8), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert [j.forward.preferred for j in judged] == winners(judged)
    assert len(fake.batches) == 3  # 15 after the trial


@pytest.mark.parametrize(
    ("kind", "failure"), [("canceled", "canceled"), ("expired", "expired"), ("errored", None)]
)
def test_every_kind_of_result_is_accounted_for_and_failures_are_asked_again(
    tmp_path, kind, failure
):
    hit = []

    def result(custom_id, params):
        if not hit:
            hit.append(custom_id)
        return kind if custom_id == hit[0] else "succeeded"

    fake = FakeAnthropic(prefer_good, batch_result=result)
    judge = batch_judge(fake)
    judged = judge_comparisons(pairs(4), judge, ledger=tmp_path / "l", progress=False)
    failures = [v.failure for j in judged for v in j.verdicts if v.failure]
    assert failures in ([failure], ["api_error"], [])
    if failure:
        assert failures == [failure]
    fake2 = FakeAnthropic(prefer_good)
    healed = judge_comparisons(
        pairs(4), batch_judge(fake2, transport="sync"), ledger=tmp_path / "l", progress=False
    )
    assert [j.forward.preferred for j in healed] == winners(healed)
    assert len(fake2.requests) == len(failures)


def test_a_result_of_an_unknown_kind_is_asked_again_and_its_bill_is_unknown(tmp_path):
    odd = []

    def result(custom_id, params):
        odd.append(custom_id)
        return "postponed" if custom_id == odd[0] else "succeeded"

    fake = FakeAnthropic(prefer_good, batch_result=result)
    judged = judge_comparisons(pairs(4), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert [j.forward.preferred for j in judged] == winners(judged)
    assert [j.mean_grade for j in judged] == [1 if w == "a" else -1 for w in winners(judged)]
    with Ledger(tmp_path / "l") as book:
        assert book.money().unknown_usd > 0


def test_a_reply_cut_off_in_a_batch_gets_its_larger_try_at_once(tmp_path):
    def answer(params):
        if "Question 2" in json.dumps(params["messages"]) and params["max_tokens"] == 2048:
            return {"text": '{"rationale": "It br', "stop_reason": "max_tokens"}
        return prefer_good(params)

    fake = FakeAnthropic(answer)
    judged = judge_comparisons(pairs(4), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert [j.mean_grade for j in judged] == [1 if w == "a" else -1 for w in winners(judged)]
    assert [r["max_tokens"] for r in fake.requests] == [2048, 8192, 8192]


def test_a_trial_that_is_rejected_stops_before_any_batch(tmp_path):
    fake = FakeAnthropic(prefer_good)
    fake.faults = [None, status_fault(400, message="output_config.format.schema: not like this")]
    with pytest.raises(JudgeUnavailable, match=r"no batch was sent.*not like this"):
        judge_comparisons(pairs(4), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert created(fake) == []


def test_a_create_whose_answer_is_lost_is_found_again_and_not_sent_twice(tmp_path):
    fake = FakeAnthropic(prefer_good)
    fake.faults = [None, None, processed_then_timeout]
    judged = judge_comparisons(pairs(4), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert [j.forward.preferred for j in judged] == winners(judged)
    assert len(fake.batches) == 1
    assert fake.n_billed == 8


def test_a_create_that_never_arrived_is_sent_again(tmp_path):
    fake = FakeAnthropic(prefer_good)
    fake.faults = [None, None, dropped_connection]
    judged = judge_comparisons(pairs(4), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert [j.forward.preferred for j in judged] == winners(judged)
    assert len(fake.batches) == 1
    assert fake.n_billed == 8


def test_another_programs_batch_of_the_same_size_is_not_taken_for_ours(tmp_path):
    fake = FakeAnthropic(prefer_good)
    fake.faults = [None, None, processed_then_timeout]

    async def someone_else():
        requests = [
            {
                "custom_id": f"theirs-{i}",
                "params": {
                    "model": MODEL,
                    "max_tokens": 10,
                    "messages": [{"role": "user", "content": "hi"}],
                },
            }
            for i in range(7)
        ]
        await fake.client().messages.batches.create(requests=requests)

    # Made first; ours comes after it in time and before it in the list.
    faults, fake.faults = fake.faults, []
    fake_answer = fake.answer
    fake.answer = lambda params: "hi" if params["max_tokens"] == 10 else fake_answer(params)
    asyncio.run(someone_else())
    fake.faults = faults
    judged = judge_comparisons(pairs(4), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert [j.forward.preferred for j in judged] == winners(judged)
    assert len(fake.batches) == 2


def test_results_that_break_off_are_read_again_without_counting_twice(tmp_path):
    fake = FakeAnthropic(prefer_good, batch_polls=1)
    fake.faults = [None, None, None, None, cut_off()]  # list, trial, create, retrieve, results
    judged = judge_comparisons(pairs(10), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert [j.forward.preferred for j in judged] == winners(judged)
    with Ledger(tmp_path / "l") as book:
        attempts = book.count("SELECT COUNT(*) FROM attempts")[0][0]
        assert attempts == 20
        assert book.money().unknown_usd == 0


@pytest.mark.slow
def test_a_limit_that_fits_part_of_the_job_sends_that_part_and_leaves_the_rest(tmp_path):
    fake = FakeAnthropic(prefer_good)
    judge = batch_judge(fake)
    worst = judge.request(pairs(1)[0]).worst_usd
    limited = batch_judge(fake, max_usd=worst * 2.2)
    with pytest.raises(BudgetExceeded, match="higher max_usd"):
        judge_comparisons(pairs(200), limited, ledger=tmp_path / "l", progress=False)
    with Ledger(tmp_path / "l") as book:
        spent, unknown, reserved = book.money()
    assert 0 < spent <= worst * 2.2
    assert (unknown, reserved) == (0, pytest.approx(0))
    judged = judge_comparisons(pairs(200), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert [j.forward.preferred for j in judged] == winners(judged)
    assert fake.n_billed == 400


def test_a_batch_left_open_by_a_process_that_ended_is_fetched_and_not_paid_for_twice(tmp_path):
    fake = FakeAnthropic(prefer_good, batch_polls=3)

    class Killed(BaseException):
        pass

    async def die(seconds):
        raise Killed

    judge = AnthropicJudge(MODEL, client=fake.client(), sleep=die, max_usd=100.0, transport="batch")
    with pytest.raises(Killed):
        judge_comparisons(pairs(4), judge, ledger=tmp_path / "l", progress=False)
    assert len(fake.batches) == 1
    judged = judge_comparisons(
        pairs(4), batch_judge(fake, transport="sync"), ledger=tmp_path / "l", progress=False
    )
    assert [j.forward.preferred for j in judged] == winners(judged)
    assert len(fake.batches) == 1
    assert fake.n_billed == 8


def test_a_model_without_batches_says_so(tmp_path):
    fake = FakeAnthropic(prefer_good)
    judge = batch_judge(fake)
    judge._known_abilities = Abilities(batch=False)
    with pytest.raises(JudgeUnavailable, match="transport='sync'"):
        judge_comparisons(pairs(2), judge, progress=False)


def test_the_sdk_is_told_not_to_send_a_batch_twice(tmp_path):
    fake = FakeAnthropic(prefer_good)
    fake.faults = [None, None, status_fault(503)]
    judge_comparisons(pairs(2), batch_judge(fake), ledger=tmp_path / "l", progress=False)
    assert len(created(fake)) == 2  # one refused, one made, after looking for the first
    assert len(fake.batches) == 1
    assert anthropic.DEFAULT_MAX_RETRIES > 0
