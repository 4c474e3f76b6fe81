"""Token buckets and what the headers say of them, by a clock that only moves when told to."""

import asyncio

import anthropic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.testing import FakeAnthropic
from prefopt.testing.rate_limits import TokenBucket

REQUEST = {
    "model": "claude-sonnet-5-5",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello?"}],
}
START = 1_800_000_000.0  # 2027-01-15T08:00:00Z


class Clock:
    def __init__(self, now=START):
        self.now = now

    def __call__(self):
        return self.now


def limited(**options):
    clock = Clock()
    return FakeAnthropic(lambda params: "x" * 40, clock=clock, **options), clock


def ask(fake, **changes):
    async def call():
        async with fake.client(max_retries=0) as client:
            return await client.messages.with_raw_response.create(**REQUEST | changes)

    return asyncio.run(call()).headers


def refusal_of(fake, **changes):
    with pytest.raises(anthropic.RateLimitError) as caught:
        ask(fake, **changes)
    return caught.value


def test_every_answer_says_how_much_is_left_even_without_a_limit():
    fake, _ = limited()
    headers = ask(fake)
    for name in ("requests", "input-tokens", "output-tokens"):
        limit = int(headers[f"anthropic-ratelimit-{name}-limit"])
        assert int(headers[f"anthropic-ratelimit-{name}-remaining"]) == limit > 0
        assert headers[f"anthropic-ratelimit-{name}-reset"] == "2027-01-15T08:00:00Z"


def test_errors_carry_the_headers_too():
    fake, _ = limited(requests_per_minute=10)
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(fake, messages=[{"role": "user", "content": ""}])
    assert caught.value.response.headers["anthropic-ratelimit-requests-limit"] == "10"


def test_requests_beyond_the_limit_are_refused_until_the_bucket_fills_again():
    fake, clock = limited(requests_per_minute=3)
    left = [ask(fake)["anthropic-ratelimit-requests-remaining"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    error = refusal_of(fake)
    assert error.type == "rate_limit_error"
    assert "requests per minute" in error.api_message
    assert error.response.headers["retry-after"] == "20"  # 3 a minute
    assert error.response.headers["anthropic-ratelimit-requests-reset"] == "2027-01-15T08:01:00Z"
    clock.now += 19.9
    refusal_of(fake)
    clock.now += 0.2
    ask(fake)
    refusal_of(fake)
    assert len(fake.messages) == 4
    assert fake.n_calls == 7


def test_a_request_refused_for_the_limit_costs_nothing_of_it():
    fake, clock = limited(requests_per_minute=1)
    ask(fake)
    for _ in range(5):
        refusal_of(fake)
    clock.now += 60
    ask(fake)


def test_input_tokens_are_limited_but_not_those_read_from_a_cache():
    system = [{"type": "text", "text": "r" * 8_000, "cache_control": {"type": "ephemeral"}}]
    fake, _ = limited(input_tokens_per_minute=2_100)
    ask(fake, system=system)  # writes 2,000 to the cache
    for _ in range(3):  # reads them
        ask(fake, system=system)
    error = refusal_of(fake, system="s" * 8_000)
    assert "input tokens per minute" in error.api_message


def test_output_tokens_are_limited_after_the_fact():
    fake, clock = limited(output_tokens_per_minute=60)
    ask(fake)  # 50 tokens
    ask(fake)  # 10 are left, which is enough to begin
    error = refusal_of(fake)
    assert "output tokens per minute" in error.api_message
    assert error.response.headers["anthropic-ratelimit-output-tokens-remaining"] == "0"
    assert error.response.headers["retry-after"] == "41"  # 40 too many, and one to begin with
    clock.now += 41
    ask(fake)


def test_token_counts_and_models_have_limits_of_their_own():
    fake, _ = limited(requests_per_minute=1)
    ask(fake)

    async def others():
        async with fake.client(max_retries=0) as client:
            messages = REQUEST["messages"]
            await client.messages.count_tokens(model=REQUEST["model"], messages=messages)
            await client.models.retrieve(REQUEST["model"])
            await client.messages.batches.list()
            with pytest.raises(anthropic.RateLimitError):
                await client.messages.batches.list()

    asyncio.run(others())


@given(
    per_minute=st.floats(1, 1e6),
    steps=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1e4)), max_size=20),
)
def test_a_bucket_never_gives_more_than_its_size_and_what_flowed_in(per_minute, steps):
    clock = Clock(0.0)
    bucket = TokenBucket(per_minute, clock)
    taken = 0.0
    for seconds, amount in steps:
        clock.now += seconds
        amount = min(amount, per_minute)
        if bucket.wait_s(amount) == 0:
            bucket.take(amount)
            taken += amount
        assert bucket.level() >= -1e-6 * per_minute
        assert bucket.level() <= per_minute
    assert taken <= per_minute + clock.now * per_minute / 60 + 1e-3 * per_minute


@given(per_minute=st.floats(1, 1e4), share=st.floats(0.01, 1))
def test_after_the_wait_a_bucket_names_it_can_be_taken_from(per_minute, share):
    clock = Clock(0.0)
    bucket = TokenBucket(per_minute, clock)
    bucket.take(per_minute)
    clock.now += bucket.wait_s(share * per_minute) + 1e-6
    assert bucket.wait_s(share * per_minute) == 0


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_lets_nothing_or_everything_through_is_refused(limit):
    with pytest.raises(ValueError, match="must be above 0"):
        FakeAnthropic(lambda params: "x", requests_per_minute=limit)
