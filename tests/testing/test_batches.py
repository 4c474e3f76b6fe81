"""Message batches of the fake: what the API refuses, how a batch lives and ends, who pays."""

import asyncio
import json
from collections import Counter

import anthropic
import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.testing import (
    FAULT_KINDS,
    FakeAnthropic,
    ModelSpec,
    broken_off,
    cut_off,
    processed_then_timeout,
    read_bills,
    request_hash,
    timeout_fault,
)

PARAMS = {
    "model": "claude-sonnet-5-5",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello?"}],
}
DAY_S = 24 * 3600


class Clock:
    now = 1_800_000_000.0  # 2027-01-15T08:00:00Z

    def __call__(self):
        return self.now


def echo(params):
    return params["messages"][0]["content"]


def items(n, **changes):
    return [
        {
            "custom_id": f"id-{i}",
            "params": PARAMS | {"messages": [{"role": "user", "content": f"Say {i}"}]} | changes,
        }
        for i in range(n)
    ]


def run(fake, talk, **options):
    """Run `talk(batches)` on a client's batches, without retries."""

    async def main():
        async with fake.client(**{"max_retries": 0} | options) as client:
            return await talk(client.messages.batches)

    return asyncio.run(main())


async def ended(batches, batch_id):
    while (batch := await batches.retrieve(batch_id)).processing_status != "ended":
        pass
    return batch


async def results_of(batches, batch_id):
    await ended(batches, batch_id)
    return [line async for line in await batches.results(batch_id)]


def create_and_collect(fake, requests):
    async def talk(batches):
        batch = await batches.create(requests=requests)
        return await ended(batches, batch.id), await results_of(batches, batch.id)

    return run(fake, talk)


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("custom_id", ["", "a b", "ä", "a" * 65, "a.b", "a\n", 7, None])
def test_a_custom_id_outside_the_pattern_is_refused(custom_id):
    fake = FakeAnthropic(echo)
    with pytest.raises(anthropic.BadRequestError, match=r"requests\.0\.custom_id: String should"):
        run(fake, lambda b: b.create(requests=[{"custom_id": custom_id, "params": PARAMS}]))
    assert fake.batches == {}


def test_every_allowed_character_may_be_in_a_custom_id():
    fake = FakeAnthropic(echo)
    allowed = ["azAZ09_-", "x" * 64]
    requests = [{"custom_id": i, "params": PARAMS} for i in allowed]
    run(fake, lambda b: b.create(requests=requests))
    assert [r["custom_id"] for r in fake.batches["msgbatch_fake1"].requests] == allowed


@pytest.mark.parametrize(
    ("requests", "complaint"),
    [
        ([], "requests: Field required"),
        (items(2) + items(1), "requests.2.custom_id: Duplicate"),
        (["x"], "requests.0: Input should be"),
        ([{"custom_id": "a"}], "requests.0.params: Field required"),
        ([items(1)[0] | {"priority": 1}], "requests.0.priority: Extra inputs"),
    ],
)
def test_a_batch_of_the_wrong_shape_is_refused(requests, complaint):
    fake = FakeAnthropic(echo)
    with pytest.raises(anthropic.BadRequestError) as caught:
        run(fake, lambda b: b.create(requests=requests))
    assert complaint in caught.value.api_message
    assert fake.batches == {}


def test_a_batch_may_have_only_so_many_requests():
    fake = FakeAnthropic(echo)
    assert fake.max_batch_requests == 100_000
    fake.max_batch_requests = 3
    with pytest.raises(anthropic.BadRequestError, match="at most 3 items"):
        run(fake, lambda b: b.create(requests=items(4)))
    batch = run(fake, lambda b: b.create(requests=items(3)))
    assert batch.request_counts.processing == 3


def test_a_body_above_the_limit_is_too_large():
    fake = FakeAnthropic(echo)
    assert fake.max_batch_bytes == 256 * 2**20
    fake.max_batch_bytes = 1_000
    run(fake, lambda b: b.create(requests=items(1)))
    with pytest.raises(anthropic.RequestTooLargeError):
        run(fake, lambda b: b.create(requests=items(10)))
    assert len(fake.batches) == 1


def test_params_are_looked_at_only_when_the_batch_is_processed():
    fake = FakeAnthropic(echo)
    good, *bad = items(5)
    bad[0]["params"]["temperature"] = 0
    bad[1]["params"]["stream"] = True
    bad[2]["params"]["speed"] = "fast"
    bad[3]["params"]["model"] = "gpt-0"
    batch, lines = create_and_collect(fake, [good, *bad])
    assert (batch.request_counts.succeeded, batch.request_counts.errored) == (1, 4)
    by_id = {line.custom_id: line.result for line in lines}
    assert by_id["id-0"].type == "succeeded"
    said = [by_id[f"id-{i}"].error.error for i in range(1, 5)]
    assert [e.type for e in said] == ["invalid_request_error"] * 3 + ["not_found_error"]
    assert "temperature: Extra inputs" in said[0].message
    assert "stream: not supported" in said[1].message
    assert "speed: not supported" in said[2].message
    assert len(fake.messages) == 1


def test_a_model_without_batches_fails_every_request_of_one():
    fake = FakeAnthropic(echo, models={"claude-sonnet-5-5": ModelSpec(batch=False)})
    batch, _ = create_and_collect(fake, items(2))
    assert batch.request_counts.errored == 2


def test_an_error_in_the_answer_function_fails_that_request_only():
    def answer(params):
        if "Say 1" in echo(params):
            raise KeyError("oops")
        return "x"

    _, lines = create_and_collect(FakeAnthropic(answer), items(3))
    failed = [line for line in lines if line.result.type == "errored"]
    assert [line.custom_id for line in failed] == ["id-1"]
    assert "answer function raised KeyError" in failed[0].result.error.error.message


# --- How a batch lives ------------------------------------------------------------------------


def test_a_batch_ends_at_its_second_retrieval_and_tells_nothing_before():
    fake = FakeAnthropic(echo, clock=Clock())

    async def talk(batches):
        new = await batches.create(requests=items(3))
        first = await batches.retrieve(new.id)
        for early in (new, first):
            assert early.processing_status == "in_progress"
            assert early.request_counts.model_dump() == {
                "processing": 3, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0,
            }  # fmt: skip
            assert early.results_url is None
            assert early.ended_at is None
        return new, await batches.retrieve(new.id)

    new, last = run(fake, talk)
    assert fake.calls == ["batches.create", "batches.retrieve", "batches.retrieve"]
    assert last.processing_status == "ended"
    assert last.request_counts.model_dump() == {
        "processing": 0, "succeeded": 3, "errored": 0, "canceled": 0, "expired": 0,
    }  # fmt: skip
    assert last.results_url == f"https://api.anthropic.com/v1/messages/batches/{new.id}/results"
    assert (last.expires_at - last.created_at).total_seconds() == DAY_S
    assert new.created_at.isoformat() == "2027-01-15T08:00:00+00:00"


def test_results_before_the_end_are_not_there():
    fake = FakeAnthropic(echo)

    async def talk(batches):
        batch = await batches.create(requests=items(1))
        with pytest.raises(anthropic.AnthropicError, match="results_url"):
            await batches.results(batch.id)

    run(fake, talk)
    assert fake.messages == []


def test_a_batch_can_end_by_time_instead_and_is_billed_though_nobody_asked():
    clock = Clock()
    fake = FakeAnthropic(echo, clock=clock, batch_time_s=600)

    async def talk(batches):
        batch = await batches.create(requests=items(2))
        for _ in range(5):
            assert (await batches.retrieve(batch.id)).processing_status == "in_progress"
        clock.now += 601
        [listed] = (await batches.list()).data
        assert listed.processing_status == "ended"
        assert (listed.ended_at - listed.created_at).total_seconds() == 600
        await batches.create(requests=items(3))

    run(fake, talk)
    assert len(fake.messages) == 2
    fake.end_batches()
    assert len(fake.messages) == 5


def test_a_batch_that_is_not_over_after_a_day_expires_unbilled():
    clock = Clock()
    fake = FakeAnthropic(echo, clock=clock, batch_time_s=2 * DAY_S)

    async def talk(batches):
        batch = await batches.create(requests=items(2))
        clock.now += DAY_S - 1
        assert (await batches.retrieve(batch.id)).processing_status == "in_progress"
        clock.now += 1
        return await batches.retrieve(batch.id), await results_of(batches, batch.id)

    batch, lines = run(fake, talk)
    assert batch.request_counts.expired == 2
    assert {line.result.type for line in lines} == {"expired"}
    assert fake.messages == []


def test_results_are_gone_after_twenty_nine_days():
    clock = Clock()
    fake = FakeAnthropic(echo, clock=clock)

    async def talk(batches):
        batch = await batches.create(requests=items(1))
        await ended(batches, batch.id)
        clock.now += 29 * DAY_S
        return await batches.retrieve(batch.id)

    batch = run(fake, talk)
    assert batch.results_url is None
    assert batch.archived_at is not None


def test_a_canceled_batch_ends_at_the_next_retrieval_and_costs_nothing():
    fake = FakeAnthropic(echo)

    async def talk(batches):
        batch = await batches.create(requests=items(4))
        canceling = await batches.cancel(batch.id)
        assert canceling.processing_status == "canceling"
        assert canceling.cancel_initiated_at is not None
        assert canceling.request_counts.processing == 4
        assert (await batches.cancel(batch.id)).processing_status == "canceling"
        last = await batches.retrieve(batch.id)
        with pytest.raises(anthropic.BadRequestError, match="already ended"):
            await batches.cancel(batch.id)
        return last, await results_of(batches, batch.id)

    batch, lines = run(fake, talk)
    assert (batch.processing_status, batch.request_counts.canceled) == ("ended", 4)
    assert {line.result.type for line in lines} == {"canceled"}
    assert fake.messages == []


def test_what_was_done_before_a_cancelation_is_kept_and_billed():
    fake = FakeAnthropic(echo, finished_at_cancel=0.5)

    async def talk(batches):
        batch = await batches.create(requests=items(4))
        await batches.cancel(batch.id)
        return await results_of(batches, batch.id)

    types = Counter(line.result.type for line in run(fake, talk))
    assert types == {"succeeded": 2, "canceled": 2}
    assert len(fake.messages) == 2


def test_only_an_ended_batch_can_be_deleted_and_then_it_is_gone():
    fake = FakeAnthropic(echo)

    async def talk(batches):
        batch = await batches.create(requests=items(1))
        with pytest.raises(anthropic.BadRequestError, match="in progress; cancel it first"):
            await batches.delete(batch.id)
        await ended(batches, batch.id)
        assert (await batches.delete(batch.id)).type == "message_batch_deleted"
        for call in (batches.retrieve, batches.cancel, batches.delete, batches.results):
            with pytest.raises(anthropic.NotFoundError):
                await call(batch.id)
        assert (await batches.list()).data == []

    run(fake, talk)
    assert fake.batches["msgbatch_fake1"].deleted


# --- What comes out ---------------------------------------------------------------------------


def test_every_type_of_result_can_be_had_and_only_successes_are_billed():
    kinds = ["succeeded", "errored", "canceled", "expired", "paused"]
    fake = FakeAnthropic(echo, batch_result=lambda custom_id, params: kinds[int(custom_id[3:]) % 5])
    batch, lines = create_and_collect(fake, items(10))
    assert {line.custom_id: line.result.type for line in lines} == {
        f"id-{i}": kinds[i % 5] for i in range(10)
    }
    # A type that clients do not know is among the errored, so that the sum is right.
    assert batch.request_counts.model_dump() == {
        "processing": 0, "succeeded": 2, "errored": 4, "canceled": 2, "expired": 2,
    }  # fmt: skip
    error = next(line.result.error for line in lines if line.result.type == "errored")
    assert error.error.type == "api_error"
    assert sorted(message["content"][1]["text"] for message in fake.messages) == ["Say 0", "Say 5"]


def test_an_answer_in_a_batch_belongs_to_its_request_and_has_the_batch_tier():
    fake = FakeAnthropic(echo)
    _, lines = create_and_collect(fake, items(20))
    for line in lines:
        assert line.result.message.content[1].text == f"Say {line.custom_id[3:]}"
        assert line.result.message.usage.service_tier == "batch"


def test_results_come_in_an_order_of_their_own_that_the_seed_decides():
    def order(seed):
        _, lines = create_and_collect(FakeAnthropic(echo, seed=seed), items(30))
        return [line.custom_id for line in lines]

    asked = [item["custom_id"] for item in items(30)]
    assert order(0) == order(0) != order(1)
    assert asked not in (order(0), order(1))
    assert sorted(order(0)) == sorted(asked)


@settings(max_examples=20, deadline=None)
@given(
    kinds=st.lists(
        st.sampled_from(["succeeded", "errored", "canceled", "expired"]), min_size=1, max_size=12
    ),
    cancel=st.booleans(),
    polls=st.integers(1, 3),
    share=st.floats(0, 1),
)
def test_every_request_has_one_result_and_the_counts_add_up(kinds, cancel, polls, share):
    fake = FakeAnthropic(
        echo,
        batch_polls=polls,
        finished_at_cancel=share,
        batch_result=lambda custom_id, params: kinds[int(custom_id[3:])],
    )

    async def talk(batches):
        batch = await batches.create(requests=items(len(kinds)))
        if cancel:
            await batches.cancel(batch.id)
        return await ended(batches, batch.id), await results_of(batches, batch.id)

    batch, lines = run(fake, talk)
    assert sorted(line.custom_id for line in lines) == sorted(f"id-{i}" for i in range(len(kinds)))
    counts = batch.request_counts.model_dump()
    assert sum(counts.values()) == len(kinds)
    assert Counter(line.result.type for line in lines) == {k: n for k, n in counts.items() if n}
    assert len(fake.messages) == len(fake.bills) == counts["succeeded"]


# --- Listing ----------------------------------------------------------------------------------


def test_the_list_is_newest_first_and_comes_in_pages():
    fake = FakeAnthropic(echo)

    async def talk(batches):
        ids = [(await batches.create(requests=items(1))).id for _ in range(5)]
        page = await batches.list(limit=2)
        assert [b.id for b in page.data] == [ids[4], ids[3]]
        assert (page.has_more, page.first_id, page.last_id) == (True, ids[4], ids[3])
        assert [b.id async for b in batches.list(limit=2)] == ids[::-1]
        after = await batches.list(after_id=ids[1])
        assert ([b.id for b in after.data], after.has_more) == ([ids[0]], False)
        before = await batches.list(before_id=ids[1], limit=2)
        assert ([b.id for b in before.data], before.has_more) == ([ids[3], ids[2]], True)
        assert {b.processing_status for b in page.data} == {"in_progress"}

    run(fake, talk)


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0},
        {"limit": 1001},
        {"limit": "many"},
        {"after_id": "msgbatch_none"},
        {"after_id": "msgbatch_fake1", "before_id": "msgbatch_fake1"},
    ],
)
def test_a_list_that_makes_no_sense_is_refused(query):
    fake = FakeAnthropic(echo)

    async def talk(batches):
        await batches.create(requests=items(1))
        await batches.list(**query)

    with pytest.raises(anthropic.BadRequestError):
        run(fake, talk)


def test_an_unknown_batch_is_not_found():
    with pytest.raises(anthropic.NotFoundError, match="msgbatch_other"):
        run(FakeAnthropic(echo), lambda b: b.retrieve("msgbatch_other"))


# --- Faults -----------------------------------------------------------------------------------


def test_a_creation_that_times_out_may_have_made_the_batch():
    fake = FakeAnthropic(echo)
    fake.faults = [processed_then_timeout]
    with pytest.raises(anthropic.APITimeoutError):
        run(fake, lambda b: b.create(requests=items(2)))
    assert len(fake.batches) == 1
    [listed] = run(fake, lambda b: b.list()).data
    assert listed.request_counts.processing == 2


def test_a_client_that_tries_again_by_itself_makes_the_batch_three_times(monkeypatch):
    async def no_wait(seconds):
        pass

    monkeypatch.setattr("anthropic._base_client.anyio.sleep", no_wait)
    fake = FakeAnthropic(echo)
    fake.faults = [processed_then_timeout] * 3
    with pytest.raises(anthropic.APITimeoutError):
        run(fake, lambda b: b.create(requests=items(2)), max_retries=2)
    assert len(fake.batches) == 3


def test_a_creation_that_times_out_may_have_made_nothing():
    fake = FakeAnthropic(echo)
    fake.faults = [timeout_fault]
    with pytest.raises(anthropic.APITimeoutError):
        run(fake, lambda b: b.create(requests=items(2)))
    assert fake.batches == {}


@pytest.mark.parametrize(
    ("fault", "error"),
    [(cut_off(0.5), json.JSONDecodeError), (broken_off(0.5), httpx2.RemoteProtocolError)],
)
def test_results_that_break_off_give_the_lines_before_and_can_be_had_again(fault, error):
    fake = FakeAnthropic(echo)
    got = []

    async def talk(batches):
        batch = await batches.create(requests=items(20))
        await ended(batches, batch.id)
        fake.faults = [None, fault]  # `results` retrieves the batch first

        async def read_on():
            async for line in await batches.results(batch.id):
                got.append(line.custom_id)

        with pytest.raises(error):
            await read_on()
        return [line.custom_id async for line in await batches.results(batch.id)]

    whole = run(fake, talk)
    assert 5 < len(got) < 15
    assert got == whole[: len(got)]
    assert len(whole) == len(fake.messages) == 20


def test_results_that_are_not_found_once_can_be_had_later():
    fake = FakeAnthropic(echo)

    async def talk(batches):
        batch = await batches.create(requests=items(2))
        await ended(batches, batch.id)
        fake.faults = [None, FAULT_KINDS["results_404"].fault]
        with pytest.raises(anthropic.NotFoundError):
            await batches.results(batch.id)
        return await results_of(batches, batch.id)

    assert len(run(fake, talk)) == 2


# --- Bills ------------------------------------------------------------------------------------


def test_bills_name_the_batch_and_the_request(tmp_path):
    fake = FakeAnthropic(echo, log=tmp_path / "bills.jsonl", clock=Clock())
    requests = items(3)
    create_and_collect(fake, requests)
    bills = read_bills(tmp_path / "bills.jsonl")
    assert bills == fake.bills
    assert {bill.custom_id: bill.request_hash for bill in bills} == {
        item["custom_id"]: request_hash(item["params"]) for item in requests
    }
    assert {(b.batch_id, b.service_tier, b.time_s) for b in bills} == {
        ("msgbatch_fake1", "batch", Clock.now)
    }
    assert sum(b.output_tokens for b in bills) == sum(
        m["usage"]["output_tokens"] for m in fake.messages
    )
