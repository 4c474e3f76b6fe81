"""The fake must be as strict as the API and fail in the ways the API fails, or it tests nothing."""

import asyncio
import json
import subprocess
import sys

import anthropic
import pytest

from prefopt.testing import (
    FakeAnthropic,
    broken_json,
    dropped_connection,
    html_200,
    no_answer,
    refusal,
    refused_connection,
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


def test_verdict_reply_is_the_json_a_judge_writes():
    assert json.loads(verdict_reply("tie", "Equal.")) == {"rationale": "Equal.", "verdict": "tie"}
    assert list(json.loads(verdict_reply("tie"))) == ["rationale", "verdict"]


def test_shown_responses_refuses_a_request_that_shows_none():
    with pytest.raises(ValueError, match="expected one <response_1>"):
        shown_responses(REQUEST)


def test_importing_the_fake_does_not_import_the_sdk():
    code = (
        "import sys, prefopt.testing, prefopt.judges.anthropic\n"
        "print([m for m in ('anthropic', 'httpx2', 'tenacity') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
