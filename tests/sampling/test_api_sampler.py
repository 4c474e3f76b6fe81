"""Claude and OpenAI's protocol as generators: each answer is asked for and paid once."""

import json
import logging

import pytest

from prefopt import sample_candidates
from prefopt.errors import BudgetExceeded, DataError, ModelError
from prefopt.judges.prices import ModelPrice
from prefopt.sampling.api_sampler import AnswerLedger, AnthropicSampler, OpenAISampler
from prefopt.sampling.candidates import SamplingSettings
from prefopt.sampling.sampler import load_sampler
from prefopt.testing import FakeAnthropic, status_fault
from prefopt.types import Prompt
from tests.judges.test_openai import FakeOpenAI

PROMPTS = [
    Prompt.from_text("What does a fox eat?"),
    Prompt.from_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi!"},
            {"role": "user", "content": "And why?"},
        ]
    ),
    Prompt.from_text("Wie heißt die Hauptstadt von Österreich? 🦊"),
]
SETTINGS = SamplingSettings(temperature=0.9, top_p=0.8, top_k=40, min_p=0.1, max_new_tokens=50)
OUTPUT_ONLY = ModelPrice(
    input_usd_per_mtok=0,
    output_usd_per_mtok=1,
    cache_read_usd_per_mtok=0,
    cache_write_usd_per_mtok=0,
)


async def no_sleep(seconds):
    pass


def counting():
    """Answers that differ, as a sampled model's do."""
    number = 0

    def answer(params):
        nonlocal number
        number += 1
        return f"  answer {number} to {params['messages'][-1]['content']}\n"

    return answer


def claude(fake, **options):
    options = {"max_usd": 10.0, "sleep": no_sleep, "client": fake.client()} | options
    return AnthropicSampler("claude-sonnet-5-5", **options)


class Server(FakeOpenAI):
    """A server of one's own, which knows more fields than OpenAI's."""

    def complaint(self, params):
        return None


def server(fake, **options):
    return OpenAISampler("some-model", client=fake.client(), sleep=no_sleep, **options)


def sample(sampler, prompts=PROMPTS, **options):
    options = {"k": 2, "settings": SETTINGS, "progress": False} | options
    return sample_candidates(prompts, sampler, **options)


def test_claude_answers_every_prompt_k_times_and_is_sent_what_it_takes(caplog):
    fake = FakeAnthropic(counting())
    with caplog.at_level(logging.WARNING):
        found = sample(claude(fake))
    assert [c.prompt for c in found] == [p for p in PROMPTS for _ in range(2)]
    assert [c.sample_index for c in found] == [0, 1] * 3
    assert {c.model for c in found} == {"anthropic:claude-sonnet-5-5"}
    assert {c.finish_reason for c in found} == {"stop"}
    assert len({c.text for c in found}) == 6
    assert all(c.text.startswith("answer") and c.text.endswith(c.prompt.text) for c in found)
    asked = next(r for r in fake.requests if r["messages"][-1]["content"] == "And why?")
    assert asked == {
        "model": "claude-sonnet-5-5",
        "max_tokens": 50 + 2_048,
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi!"},
            {"role": "user", "content": "And why?"},
        ],
        "output_config": {"effort": "low"},
    }
    assert "paid for its answers: 6 calls" in caplog.text


def test_an_answer_that_was_paid_is_never_asked_for_again(tmp_path):
    fake = FakeAnthropic(counting())
    partial = tmp_path / "partial"
    found = sample(claude(fake), partial=partial)
    assert sample(claude(fake), partial=partial) == found
    assert fake.n_billed == 6
    # Two answers more are two calls a prompt more, and another seed is another answer.
    assert sample(claude(fake), partial=partial, k=3)[:2] == found[:2]
    assert fake.n_billed == 9
    sample(claude(fake), partial=partial, seed=1)
    assert fake.n_billed == 15


class Killed(BaseException):
    pass


def test_a_killed_call_goes_on_and_pays_for_what_is_missing(tmp_path):
    fake = FakeAnthropic(counting())
    sampler = claude(fake, concurrency=1)
    seen = []

    def killed_at_the_third(n):
        seen.append(n)
        if sum(seen) >= 3:
            raise Killed

    options = {"k": 2, "settings": SETTINGS, "seed": 0, "partial": tmp_path / "partial"}
    with pytest.raises(Killed):
        sampler.answers(PROMPTS, told=killed_at_the_third, **options)
    before = fake.n_billed
    assert before == 3
    found = claude(fake).answers(PROMPTS, told=seen.append, **options)
    assert fake.n_billed == 6
    assert seen[-4:] == [3, 1, 1, 1]  # those of the first call are there at once
    with AnswerLedger(f"{options['partial']}.sqlite") as book:
        money = book.money()
    assert money.spent_usd > 0
    assert money.unknown_usd == 0
    assert abs(money.reserved_usd) < 1e-12
    assert [[c.sample_index for c in answers] for answers in found] == [[0, 1]] * 3


def test_the_limit_stops_before_it_is_broken_and_a_higher_one_goes_on(tmp_path):
    fake = FakeAnthropic(lambda params: {"text": "word " * 40})
    # 2,098 tokens at worst are $0.002098; a real answer costs far less.
    limits = {"prices": OUTPUT_ONLY, "concurrency": 1}
    with pytest.raises(BudgetExceeded, match="higher max_usd"):
        sample(claude(fake, max_usd=0.00225, **limits), partial=tmp_path / "p")
    bought = fake.n_billed
    assert 1 <= bought < 6
    sample(claude(fake, max_usd=1.0, **limits), partial=tmp_path / "p")
    assert fake.n_billed == 6


def test_what_was_refused_is_named_and_the_rest_is_kept(tmp_path):
    def answer(params):
        fox = "fox" in params["messages"][-1]["content"]
        return {"text": "", "stop_reason": "refusal"} if fox else "fine"

    fake = FakeAnthropic(answer)
    with pytest.raises(ModelError, match=r"gave 4 of 6 answers(.|\n)*fox(.|\n)*refused"):
        sample(claude(fake), partial=tmp_path / "p")
    fake.answer = lambda params: "fine now"
    found = sample(claude(fake), partial=tmp_path / "p")
    assert [c.text for c in found] == ["fine now"] * 2 + ["fine"] * 4
    assert fake.n_calls == 8


def test_busy_services_are_tried_again_and_wrong_keys_are_told():
    fake = FakeAnthropic(counting())
    fake.faults = [status_fault(529), status_fault(429), None, status_fault(500)]
    assert len({c.text for c in sample(claude(fake))}) == 6
    fake.faults = [status_fault(401)] * 50
    with pytest.raises(ModelError, match="rejected the credentials"):
        sample(claude(fake))


def test_claude_needs_a_limit_and_a_price():
    with pytest.raises(ValueError, match="max_usd"):
        claude(FakeAnthropic(counting()), max_usd=None)
    with pytest.raises(ValueError, match="no price"):
        AnthropicSampler("claude-unknown", max_usd=1.0)


def test_a_server_gets_the_settings_and_a_seed_for_every_answer(tmp_path):
    fake = Server(counting())
    found = sample(server(fake), partial=tmp_path / "p")
    assert {c.model for c in found} == {"openai:some-model"}
    assert len(fake.requests) == 6
    for request in fake.requests:
        assert {n: v for n, v in request.items() if n not in ("messages", "seed")} == {
            "model": "some-model", "max_tokens": 50, "temperature": 0.9, "top_p": 0.8, "top_k": 40,
            "min_p": 0.1,
        }  # fmt: skip
    seeds = {(json.dumps(r["messages"]), r["seed"]) for r in fake.requests}
    assert len({seed for _, seed in seeds}) == 6
    assert all(0 <= seed < 2**31 for _, seed in seeds)
    again = Server(counting())
    sample(server(again), PROMPTS[::-1])
    assert {(json.dumps(r["messages"]), r["seed"]) for r in again.requests} == seeds
    assert sample(server(fake), partial=tmp_path / "p") == found
    assert len(fake.requests) == 6


def test_an_answer_at_the_limit_is_marked_as_cut_off():
    fake = Server(lambda params: {"content": "and so", "finish_reason": "length"})
    assert {c.finish_reason for c in sample(server(fake))} == {"length"}
    plain = Server(counting())
    sample(server(plain), settings=SamplingSettings(temperature=0.5, top_p=1.0))
    assert not {"top_p", "top_k", "min_p"} & plain.requests[0].keys()


def test_tool_messages_and_empty_answers_are_told():
    tool = Prompt.from_messages(
        [{"role": "user", "content": "Weather?"}, {"role": "tool", "content": "rain"}]
    )
    with pytest.raises(DataError, match="tool's message"):
        sample(server(Server(counting())), [tool])
    with pytest.raises(ModelError, match="gave 0 of 6"):
        sample(server(Server(lambda params: ""), max_attempts=2))


def test_samplers_are_made_from_a_text(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test-key")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert (
        load_sampler("anthropic:claude-haiku-5-5", max_usd=1).name == "anthropic:claude-haiku-5-5"
    )
    local = load_sampler("openai:a@b@http://localhost:8000/v1", max_usd=1)
    assert local.name == "openai:a@b"
    with pytest.raises(ValueError, match=r"begins with http"):
        load_sampler("openai:model@localhost:8000/v1")
    with pytest.raises(ValueError, match="cannot be given an adapter"):
        load_sampler("openai:a@http://localhost/v1", adapter="folder")
    with pytest.raises(ModelError, match="no model in folder"):
        load_sampler("./nowhere")
