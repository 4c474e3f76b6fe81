"""The paid judge against somebody else's stand-in for the API, over TCP: not our idea of it alone."""

import functools

import anthropic
import httpx2
import pytest
import uvicorn
from llmock.scenarios import Fail, Match, Reply
from llmock.testing import LLMockServer

from prefopt.errors import BudgetExceeded
from prefopt.judges import judge_comparisons
from prefopt.judges.anthropic import AnthropicJudge
from prefopt.testing import verdict_reply
from prefopt.types import Candidate, Comparison, Prompt

# The server is on this machine; nothing else can be reached.
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

MODEL = "claude-sonnet-5-5"
MESSAGES = Match(provider="anthropic", path="*/v1/messages")


@pytest.fixture(scope="module")
def llmock_server():
    """The plugin's, for these tests alone, on the loop of the standard library.

    Twice the first of these tests waited for ever, at the end of a whole run; why is not known. So the
    server has no part that it can do without: no uvloop, and no logging set up anew for the process.
    """
    config = functools.partial(uvicorn.Config, loop="asyncio", log_config=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Config", config)
        server = LLMockServer().start()
    yield server
    server.stop()


@pytest.fixture
def client(llmock):
    # Keeps no connection open, as a judge does not close a client that was given to it.
    http_client = anthropic.DefaultAsyncHttpxClient(
        limits=httpx2.Limits(max_keepalive_connections=0)
    )
    base_url = llmock.base_url("anthropic")
    return anthropic.AsyncAnthropic(api_key="test", base_url=base_url, http_client=http_client)


@pytest.fixture
def waits():
    """The seconds the judge would have waited between tries."""
    return []


@pytest.fixture
def judge(client, waits):
    async def sleep(seconds):
        waits.append(seconds)

    # An answer that never comes is an error here, and not a run that stands still.
    return AnthropicJudge(MODEL, max_usd=1.0, client=client, sleep=sleep, timeout_s=60)


def pairs(n):
    prompt = Prompt.from_text("What does a fox eat?")
    return [
        Comparison(
            a=Candidate(prompt=prompt, text=f"mice {i}", model="m"),
            b=Candidate(prompt=prompt, text=f"berries {i}", model="m"),
        )
        for i in range(n)
    ]


def judged(judge, n=1):
    return judge_comparisons(pairs(n), judge, orders="one", progress=False)


def says(verdict, **options):
    return Reply(text=verdict_reply(verdict), match=MESSAGES, **options)


def fails(status, **options):
    return Fail(status, match=MESSAGES, **options)


def asked(llmock):
    """The status of every answer to a request for a message, in order."""
    return [r.status for r in llmock.requests if r.path.endswith("/v1/messages")]


@pytest.mark.parametrize(
    ("verdict", "preferred", "strength"),
    [
        ("first_much", "a", 2),
        ("first", "a", 1),
        ("tie", "tie", 0),
        ("second", "b", 1),
        ("second_much", "b", 2),
    ],
)
def test_a_scripted_verdict_is_read(llmock, judge, verdict, preferred, strength):
    llmock.add(says(verdict))
    [one] = judged(judge)
    assert (one.forward.preferred, one.forward.strength) == (preferred, strength)
    assert one.forward.usage.cost_usd > 0
    assert asked(llmock) == [200]


def test_many_verdicts_come_over_many_connections(llmock, judge):
    llmock.add(says("first", times=None))
    found = judged(judge, 40)
    assert {one.forward.preferred for one in found} == {"a"}
    assert asked(llmock) == [200] * 40
    spent = sum(one.forward.usage.cost_usd for one in found)
    assert judge.spent_usd == pytest.approx(spent)


def test_a_wait_that_the_server_asks_for_is_kept(llmock, judge, waits):
    llmock.add(fails(429, times=2, retry_after=7), says("second"))
    [one] = judged(judge)
    assert one.forward.preferred == "b"
    assert asked(llmock) == [429, 429, 200]
    assert len([seconds for seconds in waits if seconds >= 7]) >= 2


@pytest.mark.parametrize("status", [529, 500, 503])
def test_a_passing_error_is_tried_again(llmock, judge, status):
    llmock.add(fails(status, times=3), says("first"))
    [one] = judged(judge)
    assert one.forward.preferred == "a"
    assert asked(llmock) == [status] * 3 + [200]


def test_a_refusal_is_a_failed_verdict_and_not_a_tie(llmock, judge):
    llmock.add(Reply(text="", finish_reason="content_filter", match=MESSAGES))
    [one] = judged(judge)
    assert one.forward.failure == "refused"
    assert one.forward.preferred is None
    assert asked(llmock) == [200]


def test_a_reply_cut_off_at_its_limit_gets_one_larger_try(llmock, judge):
    cut = Reply(text='{"rationale": "It bre', finish_reason="length", match=MESSAGES)
    llmock.add(cut, says("first"))
    [one] = judged(judge)
    assert one.forward.preferred == "a"
    assert asked(llmock) == [200, 200]

    llmock.reset().add(cut, cut)
    [one] = judged(judge)
    assert one.forward.failure == "truncated"
    assert asked(llmock) == [200, 200]


def test_prose_is_no_verdict(llmock, judge):
    llmock.add(Reply(text="The first one, clearly.", match=MESSAGES))
    [one] = judged(judge)
    assert one.forward.failure == "malformed"
    assert one.forward.preferred is None


def test_the_limit_of_money_holds_over_a_real_connection(llmock, client):
    llmock.add(says("first", times=None))
    judge = AnthropicJudge(MODEL, max_usd=0.05, client=client, concurrency=1, timeout_s=60)
    with pytest.raises(BudgetExceeded):
        judged(judge, 200)
    assert 0 < judge.spent_usd <= 0.05
    assert 0 < len(asked(llmock)) < 200


@pytest.mark.slow
def test_the_server_finds_nothing_to_complain_of_in_how_faults_are_taken(llmock, client):
    """`llmock` judges the client's own behaviour, with the waits it asked for really waited."""
    llmock.add(fails(429, retry_after=0.2), fails(529, retry_after=0.2), says("first", times=None))
    found = judged(AnthropicJudge(MODEL, max_usd=1.0, client=client), 3)
    assert {one.forward.preferred for one in found} == {"a"}
    llmock.assert_resilient()
