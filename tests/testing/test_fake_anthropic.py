"""The fake must be as strict as the API and fail in the ways the API fails, or it tests nothing."""

import asyncio
import json
import subprocess
import sys
import time

import anthropic
import httpx2
import msgspec
import pytest

from prefopt.testing import (
    FakeAnthropic,
    ModelSpec,
    broken_json,
    dropped_connection,
    html_200,
    no_answer,
    read_bills,
    refusal,
    refused_connection,
    request_hash,
    shown_responses,
    status_fault,
    timeout_fault,
    truncation,
    verdict_reply,
)

REQUEST = {
    "model": "claude-sonnet-5-5",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello?"}],
}


def with_schema(part):
    """An output_config whose schema is an object with one field."""
    schema = {"type": "object", "additionalProperties": False, "properties": {"x": part}}
    return {"format": {"type": "json_schema", "schema": schema}}


def marked(text, **control):
    """A system text that ends a cached part."""
    return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral", **control}}]


def talk(fake, conversation, **client_options):
    """Run `conversation(client)` with a client that does not try again."""

    async def main():
        async with fake.client(**{"max_retries": 0} | client_options) as client:
            return await conversation(client)

    return asyncio.run(main())


def ask(fake, *, client_options=None, **changes):
    """One request without retries; what is not an argument of the SDK goes into the body as is."""
    request = {name: v for name, v in (REQUEST | changes).items() if v is not None}
    body = {"temperature": request.pop("temperature")} if "temperature" in request else None

    async def call():
        async with fake.client(max_retries=0, **(client_options or {})) as client:
            return await client.messages.create(**request, extra_body=body)

    return asyncio.run(call())


def test_an_answer_comes_after_a_thinking_block_and_reports_usage():
    fake = FakeAnthropic(lambda params: "x" * 40)
    message = ask(fake)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[1].text == "x" * 40
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 40 + 10  # thinking, and a quarter of the characters
    assert fake.requests == [REQUEST]
    assert fake.messages[0]["usage"]["output_tokens"] == 50


def test_the_answer_function_sees_the_request_and_can_replace_fields():
    fake = FakeAnthropic(
        lambda params: {"text": params["messages"][0]["content"], "stop_reason": "odd"}
    )
    message = ask(fake)
    assert (message.content[1].text, message.stop_reason) == ("Hello?", "odd")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"temperature": 0}, "temperature: Extra inputs are not permitted"),
        ({"messages": []}, "messages: Field required"),
        ({"messages": [{"role": "user", "content": ""}]}, "non-empty content"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [*REQUEST["messages"], {"role": "assistant", "content": "{"}]}, "prefill"),
        ({"max_tokens": 0}, "max_tokens: Field required"),
        ({"max_tokens": 100.5}, "max_tokens: Input should be a valid integer"),
        ({"thinking": {"type": "disabled"}}, "thinking.type.disabled"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.type.enabled"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
        ({"output_config": {"tone": "kind"}}, "output_config.tone: Extra inputs"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "needs a schema"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
            "additionalProperties",
        ),
        ({"output_config": with_schema({"type": "integer", "minimum": 1})}, "'minimum' is not"),
        (
            {"output_config": with_schema({"anyOf": [{"type": "object"}, {"type": "null"}]})},
            "additionalProperties",
        ),
        ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 10**6, "timeout": 60}, "maximum allowed number of output tokens"),
        ({"system": [{"type": "text", "text": ""}]}, "system.0: text content blocks"),
        ({"system": marked("x", ttl="2h")}, "system.0.cache_control.ttl"),
        ({"system": marked("x") * 5}, "A maximum of 4 blocks"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name: Extra"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "0.type: Field required"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type: Input should be one of"),
        (
            {
                "model": "claude-haiku-5-5",
                "thinking": {"type": "disabled"},
                "output_config": {"effort": "max"},
            },
            "not supported at effort 'max'",
        ),
        (
            {
                "model": "claude-opus-4-5",
                "thinking": {"type": "enabled", "budget_tokens": 2_000},
            },
            "must be greater than `thinking.budget_tokens`",
        ),
        ({"messages": [{"role": "user", "content": "x" * 900_000}]}, "prompt is too long"),
    ],
)
def test_what_the_api_would_reject_is_rejected_with_400(changes, complaint):
    fake = FakeAnthropic(lambda params: "x")
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(fake, **changes)
    assert complaint in caught.value.api_message
    assert fake.messages == []  # nothing to bill


def test_older_models_may_be_told_not_to_think():
    fake = FakeAnthropic(lambda params: "x")
    assert ask(fake, model="claude-haiku-5-5", thinking={"type": "disabled"}).content


def test_a_bad_key_and_an_unknown_model_are_refused():
    fake = FakeAnthropic(lambda params: "x")
    with pytest.raises(anthropic.AuthenticationError):
        ask(fake, client_options={"api_key": "bad"})
    with pytest.raises(anthropic.NotFoundError):
        ask(fake, model="gpt-0")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (status_fault(429), anthropic.RateLimitError),
        (status_fault(529), anthropic.OverloadedError),
        (status_fault(500), anthropic.InternalServerError),
        (status_fault(402), anthropic.PaymentRequiredError),
        (timeout_fault, anthropic.APITimeoutError),
        (dropped_connection, anthropic.APIConnectionError),
        (refused_connection, anthropic.APIConnectionError),
        (broken_json, json.JSONDecodeError),
    ],
)
def test_a_fault_hits_one_request_and_the_next_is_answered(fault, error):
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [None, fault]
    assert ask(fake).content[1].text == "x"
    with pytest.raises(error):
        ask(fake)
    assert ask(fake).content[1].text == "x"
    assert len(fake.requests) == 3
    assert len(fake.messages) == 2


def test_a_status_fault_carries_its_header_code_and_message():
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [
        status_fault(429, retry_after=7, code="enforced_spend_limit_reached", message="No more.")
    ]
    with pytest.raises(anthropic.RateLimitError) as caught:
        ask(fake)
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.error_code == "enforced_spend_limit_reached"
    assert caught.value.api_message == "No more."


def test_an_html_page_reaches_the_caller_as_text():
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [html_200]
    assert "<html>" in ask(fake)


def test_a_refusal_is_a_message_with_a_category_and_no_content():
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [refusal("frontier_llm")]
    message = ask(fake)
    assert (message.stop_reason, message.content) == ("refusal", [])
    assert message.stop_details.category == "frontier_llm"
    assert len(fake.messages) == 1


def test_a_truncation_is_billed_up_to_the_limit():
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [truncation]
    message = ask(fake)
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 100


def test_an_answer_longer_than_the_limit_is_cut_off():
    fake = FakeAnthropic(lambda params: "x" * 4000)
    message = ask(fake)
    assert message.stop_reason == "max_tokens"
    assert message.content[1].text == "x" * 240  # 100 tokens, less 40 of thinking
    assert message.usage.output_tokens == 100


def test_a_hanging_request_ends_only_when_cancelled():
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [no_answer]

    async def wait_a_little():
        await asyncio.wait_for(fake.client(max_retries=0).messages.create(**REQUEST), 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(wait_a_little())
    assert fake.messages == []


def test_a_long_marked_system_text_is_written_to_the_cache_once_and_then_read():
    fake = FakeAnthropic(lambda params: "x")
    system = [{"type": "text", "text": "r" * 4000, "cache_control": {"type": "ephemeral"}}]
    first, second = ask(fake, system=system).usage, ask(fake, system=system).usage
    assert first.cache_creation_input_tokens == second.cache_read_input_tokens > 1000
    assert first.cache_read_input_tokens == second.cache_creation_input_tokens == 0
    unmarked = ask(fake, system="r" * 4000).usage
    assert unmarked.input_tokens == first.input_tokens + 1000


def test_an_error_in_the_answer_function_is_told_and_not_taken_for_a_lost_connection():
    fake = FakeAnthropic(lambda params: params["no such field"])
    with pytest.raises(anthropic.BadRequestError, match="answer function raised KeyError"):
        ask(fake)


def test_a_stream_is_refused_rather_than_answered_wrongly():
    fake = FakeAnthropic(lambda params: "x")
    with pytest.raises(anthropic.BadRequestError, match="does not stream"):
        ask(fake, stream=True)


def test_a_body_that_is_no_json_or_too_large_and_a_missing_version_are_refused():
    fake = FakeAnthropic(lambda params: "x")
    url = "https://api.anthropic.com/v1/messages"
    headers = {"x-api-key": "k", "anthropic-version": "2026-10-21"}

    def status(content, headers=headers):
        response = fake.handle(httpx2.Request("POST", url, headers=headers, content=content))
        assert response.json()["type"] == ("message" if response.is_success else "error")
        return response.status_code

    whole = json.dumps(REQUEST).encode()
    assert status(whole) == 200
    assert status(whole[:-1]) == 400
    assert status(b"[]") == 400
    assert status(whole, {"x-api-key": "k"}) == 400
    assert status(whole, {"anthropic-version": "2026-10-21"}) == 401
    fake.max_request_bytes = len(whole) - 1
    assert status(whole) == 413
    assert len(fake.messages) == 1


def test_a_model_told_not_to_think_sends_no_thinking_and_bills_none():
    fake = FakeAnthropic(lambda params: "x" * 40)
    message = ask(fake, thinking={"type": "between_tools"})
    assert [block.type for block in message.content] == ["text"]
    assert message.usage.output_tokens == 10
    assert message.usage.output_tokens_details.thinking_tokens == 0


def test_usage_says_which_cache_was_written_and_the_cache_ends():
    now = [0.0]
    fake = FakeAnthropic(lambda params: "x", clock=lambda: now[0])
    written = []
    for now[0] in (0, 3_599, 7_198, 10_799):
        usage = ask(fake, system=marked("r" * 4_000, ttl="1h")).usage
        assert usage.cache_creation.ephemeral_5m_input_tokens == 0
        assert usage.cache_creation_input_tokens == usage.cache_creation.ephemeral_1h_input_tokens
        written.append(usage.cache_creation_input_tokens > 0)
    assert written == [True, False, False, True]  # each reading keeps it for an hour more


def test_counting_tokens_agrees_with_usage_and_is_not_billed():
    fake = FakeAnthropic(lambda params: "x")
    request = {"model": REQUEST["model"], "messages": REQUEST["messages"], "system": "s" * 400}
    counted = talk(fake, lambda c: c.messages.count_tokens(**request)).input_tokens
    assert fake.messages == fake.requests == []
    assert counted == ask(fake, system=request["system"]).usage.input_tokens
    assert fake.calls == ["messages.count_tokens", "messages.create"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"max_tokens": 5}, "max_tokens: Extra inputs"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": []}, "messages: Field required"),
    ],
)
def test_counting_tokens_is_as_strict_as_asking(changes, complaint):
    fake = FakeAnthropic(lambda params: "x")
    body = {"model": REQUEST["model"], "messages": REQUEST["messages"]} | changes
    with pytest.raises(anthropic.BadRequestError) as caught:
        talk(fake, lambda c: c.messages.count_tokens(model="", messages=[], extra_body=body))
    assert complaint in caught.value.api_message


@pytest.mark.filterwarnings("ignore:Using Claude with:UserWarning")  # the SDK's own advice
def test_what_a_model_says_it_accepts_is_what_it_accepts():
    """Read by the SDK's own types, every capability agrees with what a request with it gets."""
    fake = FakeAnthropic(lambda params: "x")

    async def models(client):
        return [model async for model in client.models.list()]

    def accepted(model, **changes):
        try:
            ask(fake, model=model.id, max_tokens=5_000, **changes)
        except anthropic.BadRequestError:
            return False
        return True

    listed = talk(fake, models)
    assert {"claude-sonnet-5-5", "claude-haiku-5-5", "claude-opus-5-5"} <= {m.id for m in listed}
    for model in listed:
        assert model == talk(fake, lambda c, model=model: c.models.retrieve(model.id))
        said = model.capabilities
        for kind in ("adaptive", "between_tools", "disabled", "enabled"):
            thinking = {"type": kind} | ({"budget_tokens": 2_000} if kind == "enabled" else {})
            wanted = getattr(said.thinking.types, kind).supported
            assert accepted(model, thinking=thinking) == wanted, (model.id, kind)
        for effort in ("low", "medium", "high", "xhigh", "max"):
            wanted = getattr(said.effort, effort).supported
            assert accepted(model, output_config={"effort": effort}) == wanted
        schema = with_schema({"type": "string"})
        assert accepted(model, output_config=schema) == said.structured_outputs.supported
        assert said.batch.supported


def test_a_model_can_be_added_or_made_less_able():
    fake = FakeAnthropic(lambda params: "x", models={"own-1": ModelSpec(structured_outputs=False)})
    assert ask(fake, model="own-1").content
    assert not talk(
        fake, lambda c: c.models.retrieve("own-1")
    ).capabilities.structured_outputs.supported
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format: not supported"):
        ask(fake, model="own-1", output_config=with_schema({"type": "string"}))


def test_dated_and_unlisted_claude_models_are_known_and_others_are_not():
    fake = FakeAnthropic(lambda params: "x")
    for model in ("claude-haiku-4-5-20251001", "claude-next-7"):
        assert talk(fake, lambda c, model=model: c.models.retrieve(model)).id == model
        assert ask(fake, model=model).content
    with pytest.raises(anthropic.NotFoundError):
        talk(fake, lambda c: c.models.retrieve("gpt-0"))


def test_unknown_paths_are_not_found_and_any_prefix_may_come_before_the_version():
    fake = FakeAnthropic(lambda params: "x")
    prefixed = {"base_url": "https://gateway.example/anthropic"}
    assert ask(fake, client_options=prefixed).content
    with pytest.raises(anthropic.NotFoundError):
        talk(fake, lambda c: c.post("/v1/complete", body={}, cast_to=object))
    assert fake.calls == ["messages.create", ""]


def test_latency_delays_an_answer_that_is_already_billed():
    fake = FakeAnthropic(lambda params: "x", latency_s=30)

    async def give_up(client):
        await asyncio.wait_for(client.messages.create(**REQUEST), 0.05)

    with pytest.raises(TimeoutError):
        talk(fake, give_up)
    assert len(fake.messages) == 1


def test_many_requests_wait_side_by_side():
    fake = FakeAnthropic(lambda params: "x", latency_s=0.2)

    async def all_at_once(client):
        start = time.monotonic()
        await asyncio.gather(*(client.messages.create(**REQUEST) for _ in range(20)))
        return time.monotonic() - start

    assert 0.2 <= talk(fake, all_at_once) < 2.0  # one after another they would take 4 s


def test_every_billed_answer_is_in_the_log_before_it_is_sent(tmp_path):
    log = tmp_path / "bills.jsonl"
    assert read_bills(log) == []
    fake = FakeAnthropic(lambda params: "x", log=log)
    fake.faults = [None, status_fault(529), None]
    ask(fake)
    assert len(read_bills(log)) == 1
    with pytest.raises(anthropic.OverloadedError):
        ask(fake)
    ask(fake)
    bills = read_bills(log)
    assert bills == fake.bills
    assert [b.message_id for b in bills] == [m["id"] for m in fake.messages]
    assert {b.request_hash for b in bills} == {request_hash(REQUEST)}
    assert {(b.batch_id, b.custom_id, b.service_tier) for b in bills} == {(None, None, "standard")}
    usage = fake.messages[0]["usage"]
    assert (bills[0].input_tokens, bills[0].output_tokens) == (
        usage["input_tokens"],
        usage["output_tokens"],
    )


def test_two_fakes_can_share_one_log(tmp_path):
    log = tmp_path / "bills.jsonl"
    for _ in range(2):
        ask(FakeAnthropic(lambda params: "x", log=log))
    assert len(read_bills(log)) == 2


def test_a_line_that_is_no_bill_is_an_error(tmp_path):
    log = tmp_path / "bills.jsonl"
    log.write_text('{"time_s": 1}\n')
    with pytest.raises(msgspec.DecodeError):
        read_bills(log)


def test_a_fake_that_keeps_nothing_still_counts(tmp_path):
    fake = FakeAnthropic(lambda params: "x", keep=False, log=tmp_path / "bills.jsonl")
    ask(fake)
    ask(fake)
    assert (fake.n_calls, fake.n_billed) == (2, 2)
    assert fake.requests == fake.messages == fake.bills == fake.calls == []
    assert len(read_bills(tmp_path / "bills.jsonl")) == 2


def test_verdict_reply_is_the_json_a_judge_writes():
    assert json.loads(verdict_reply("tie", "Equal.")) == {"rationale": "Equal.", "verdict": "tie"}
    assert list(json.loads(verdict_reply("tie"))) == ["rationale", "verdict"]


def test_shown_responses_refuses_a_request_that_shows_none():
    with pytest.raises(ValueError, match="expected one <response_1>"):
        shown_responses(REQUEST)


def test_importing_the_fake_does_not_import_the_sdk():
    code = (
        "import sys, prefopt.testing, prefopt.judges.anthropic\n"
        "print([m for m in ('anthropic', 'httpx2', 'h11', 'tenacity') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
