"""Every way to fail does what it says, and the random mix of them can be repeated."""

import asyncio
import json
from collections import Counter

import anthropic
import httpx2
import pytest

from prefopt.testing import (
    FAULT_KINDS,
    FakeAnthropic,
    FaultKind,
    FaultPlan,
    broken_off,
    cut_off,
    empty_text,
    json_200,
    processed_then_dropped,
    processed_then_timeout,
    random_faults,
    refusal,
    status_fault,
)

REQUEST = {
    "model": "claude-sonnet-5-5",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello?"}],
}
PASSING = [name for name, kind in FAULT_KINDS.items() if kind.effect == "passing"]


def ask(fake, **client_options):
    async def call():
        async with fake.client(**{"max_retries": 0} | client_options) as client:
            return await client.messages.create(**REQUEST)

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (processed_then_timeout, anthropic.APITimeoutError),
        (processed_then_dropped, anthropic.APIConnectionError),
        (cut_off(0.5), json.JSONDecodeError),
        (broken_off(0.5), anthropic.APIConnectionError),
    ],
)
def test_an_answer_that_is_lost_on_the_way_is_billed(fault, error):
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [fault]
    with pytest.raises(error):
        ask(fake)
    assert len(fake.messages) == fake.n_billed == 1
    assert ask(fake).content[1].text == "x"


def test_a_message_without_text_claims_to_have_ended_well():
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [empty_text]
    message = ask(fake)
    assert (message.content[1].text, message.stop_reason) == ("", "end_turn")
    assert len(fake.messages) == 1


@pytest.mark.parametrize("value", ["ok", {"ok": True}, [1, 2], 7, None])
def test_any_json_value_can_stand_in_for_a_message(value):
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [json_200(value)]

    async def call():
        async with fake.client(max_retries=0) as client:
            raw = await client.messages.with_raw_response.create(**REQUEST)
            return raw.http_response.json()

    assert asyncio.run(call()) == value
    assert fake.messages == []


def test_the_sdk_obeys_the_word_on_whether_to_try_again(monkeypatch):
    waits = []

    async def no_wait(seconds):
        waits.append(seconds)

    monkeypatch.setattr("anthropic._base_client.anyio.sleep", no_wait)
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [status_fault(400, should_retry="true"), None]
    assert ask(fake, max_retries=2).content[1].text == "x"
    fake.faults = [status_fault(500, should_retry="false"), None]
    with pytest.raises(anthropic.InternalServerError):
        ask(fake, max_retries=2)
    assert len(waits) == 1


def test_a_fault_that_is_a_message_says_so_where_none_is_due():
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [refusal()]

    async def call():
        async with fake.client(max_retries=0) as client:
            await client.messages.batches.list()

    with pytest.raises(anthropic.BadRequestError, match=r"batches\.list answers with none"):
        asyncio.run(call())


def test_looking_up_a_model_uses_up_no_fault_of_a_list():
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [status_fault(500)]

    async def look_up():
        async with fake.client(max_retries=0) as client:
            await client.models.retrieve(REQUEST["model"])

    asyncio.run(look_up())
    with pytest.raises(anthropic.InternalServerError):
        ask(fake)


# --- The random mix ---------------------------------------------------------------------------


def drawn(plan, n=4_000, endpoint="messages.create"):
    for _ in range(n):
        plan.draw(endpoint)
    return plan.drawn


def test_the_same_seed_gives_the_same_faults_and_another_gives_others():
    assert drawn(random_faults(seed=1)) == drawn(random_faults(seed=1))
    assert drawn(random_faults(seed=1)) != drawn(random_faults(seed=2))


def test_the_share_of_faults_is_what_was_asked_for_and_every_kind_comes_up():
    names = drawn(random_faults(0.3))
    failed = [name for name in names if name]
    assert len(failed) / len(names) == pytest.approx(0.3, abs=0.03)  # 4 standard errors
    counts = Counter(failed)
    possible = {
        name
        for name, kind in FAULT_KINDS.items()
        if kind.effect != "run" and "messages.create" in kind.endpoints
    }
    assert set(counts) == possible
    assert min(counts.values()) > 0.4 * len(failed) / len(possible)


def test_a_request_has_the_same_luck_whatever_came_before_it():
    mixed, plain = random_faults(seed=3), random_faults(seed=3)
    for i in range(500):
        mixed.draw("messages.create" if i % 2 else "batches.results")
        plain.draw("messages.create")
    assert mixed.drawn[1::2] == plain.drawn[1::2]


@pytest.mark.parametrize("endpoint", ["batches.create", "batches.results", "models.retrieve"])
def test_only_faults_that_can_happen_at_an_endpoint_happen_there(endpoint):
    names = {name for name in drawn(random_faults(1.0), endpoint=endpoint) if name}
    assert names == {
        name
        for name, kind in FAULT_KINDS.items()
        if kind.effect != "run" and endpoint in kind.endpoints
    }
    assert "refusal" not in names
    assert ("cut_results" in names) == (endpoint == "batches.results")


def test_kinds_can_be_chosen_and_added():
    assert set(drawn(random_faults(1.0, kinds=["timeout", "refusal"]))) == {"timeout", "refusal"}
    own = FaultKind(fault=status_fault(418))
    plan = FaultPlan(1.0, kinds=["teapot"], extra={"teapot": own})
    assert plan.draw("messages.create") is own.fault


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"share": 1.5}, "share must be 0 to 1"),
        ({"kinds": ["earthquake"]}, r"unknown kinds of faults: \['earthquake'\]"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        random_faults(**arguments)


@pytest.mark.parametrize(
    "name", [n for n in PASSING if "messages.create" in FAULT_KINDS[n].endpoints]
)
def test_after_a_passing_fault_the_same_request_is_answered(name):
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [FAULT_KINDS[name].fault]
    try:
        spoilt = ask(fake)
    except (anthropic.APIError, json.JSONDecodeError, httpx2.HTTPError):
        pass
    else:
        text = getattr(spoilt, "content", None) and spoilt.content[-1].text
        assert text != "x"
    assert ask(fake).content[1].text == "x"


def test_a_stubborn_client_gets_every_answer_through_thirty_percent_of_faults():
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = plan = random_faults(0.3, seed=5, kinds=PASSING)

    async def until_answered(client):
        while True:
            try:
                message = await client.messages.create(**REQUEST)
            except (anthropic.APIError, json.JSONDecodeError):
                continue
            content = getattr(message, "content", None)
            if content and content[-1].text == "x":
                return

    async def main():
        async with fake.client(max_retries=0) as client:
            await asyncio.gather(*(until_answered(client) for _ in range(60)))

    asyncio.run(main())
    failed = [name for name in plan.drawn if name]
    assert len(plan.drawn) == fake.n_calls == 60 + len(failed)
    billed = {"processed_then_timeout", "processed_then_dropped", "broken_off", "empty_text",
              "truncation"}  # fmt: skip
    assert len(fake.messages) == 60 + sum(name in billed for name in failed)
