"""The fake over a real socket: in a thread, and as a process of its own that outlives its client."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import anthropic
import httpx2
import pytest

from prefopt.testing import (
    FAULT_KINDS,
    FakeAnthropic,
    broken_json,
    broken_off,
    dropped_connection,
    html_200,
    no_answer,
    processed_then_dropped,
    processed_then_timeout,
    read_bills,
    refused_connection,
    socket_client,
    status_fault,
    timeout_fault,
    verdict_reply,
)
from prefopt.testing.serve import fake_from_arguments
from prefopt.testing.serving import serve, serve_in_thread

REQUEST = {
    "model": "claude-sonnet-5-5",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello?"}],
}
SHOWN = "<response_1>\n{}\n</response_1>\n<response_2>\n{}\n</response_2>"


@pytest.fixture
def path():
    """A short path, as that of a Unix socket may only have about a hundred characters."""
    with tempfile.TemporaryDirectory(prefix="prefopt-") as folder:
        yield Path(folder) / "socket"


def talk(path, conversation, **options):
    async def main():
        async with socket_client(path, **{"max_retries": 0} | options) as client:
            return await conversation(client)

    return asyncio.run(main())


def ask(path, **options):
    return talk(path, lambda c: c.messages.create(**REQUEST), **options)


def test_a_client_on_a_unix_socket_gets_the_same_answer_as_in_process(path):
    fake = FakeAnthropic(lambda params: "x" * 40)
    with fake.serve(unix_path=path) as base_url:
        assert base_url == "http://localhost"
        message = ask(path)
        assert path.exists()
    assert not path.exists()
    assert message.content[1].text == "x" * 40
    assert fake.requests == [REQUEST]

    async def in_process():
        async with fake.client() as client:
            return await client.messages.create(**REQUEST)

    same = asyncio.run(in_process())
    assert message.model_dump(exclude={"id"}) == same.model_dump(exclude={"id"})


def test_the_socket_is_free_again_after_the_block_even_after_an_error(path):
    fake = FakeAnthropic(lambda params: "x")
    with pytest.raises(ZeroDivisionError), fake.serve(unix_path=path):
        raise ZeroDivisionError
    with fake.serve(unix_path=path):
        assert ask(path).content
    with pytest.raises(anthropic.APIConnectionError):
        ask(path)


@pytest.mark.parametrize("address", [{}, {"unix_path": "x", "port": 0}])
def test_one_address_is_needed(address):
    with (
        pytest.raises(ValueError, match="give either unix_path or port"),
        FakeAnthropic(lambda params: "x").serve(**address),
    ):
        pass


def test_a_socket_that_cannot_be_opened_is_an_error_at_once():
    with (
        pytest.raises(OSError, match="No such file"),
        FakeAnthropic(lambda params: "x").serve(unix_path="/no/such/folder/socket"),
    ):
        pass


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_port_of_this_machine_will_do_as_well():
    fake = FakeAnthropic(lambda params: "x")

    async def call(base_url):
        async with anthropic.AsyncAnthropic(api_key="k", base_url=base_url) as client:
            return await client.messages.create(**REQUEST)

    with fake.serve(port=0) as base_url:
        assert base_url.startswith("http://127.0.0.1:")
        assert asyncio.run(call(base_url)).content[1].text == "x"


def test_another_event_loop_will_do_as_well(path):
    """Other servers of a process may have made it uvloop's, whose transports are no asyncio ones."""
    uvloop = pytest.importorskip("uvloop")
    fake = FakeAnthropic(lambda params: "x")

    async def main():
        client = socket_client(path, max_retries=0, timeout=5.0)
        async with serve(fake.respond, unix_path=path), client:
            return await client.messages.create(**REQUEST)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()).content[1].text == "x"


def test_many_requests_at_once_and_one_connection_after_another(path):
    fake = FakeAnthropic(lambda params: params["messages"][0]["content"], latency_s=0.01)

    async def many(client):
        async def one(i):
            messages = [{"role": "user", "content": f"{i} " + "long " * 5_000}]
            message = await client.messages.create(**REQUEST | {"messages": messages})
            return message.content[1].text.split()[0]

        return await asyncio.gather(*(one(i) for i in range(40)))

    with fake.serve(unix_path=path):
        assert talk(path, many) == [str(i) for i in range(40)]
        assert talk(path, many) == [str(i) for i in range(40)]


def test_one_connection_serves_requests_one_after_another_even_when_sent_together(path):
    fake = FakeAnthropic(lambda params: "x")
    one = b"GET /v1/models/claude-opus-5 HTTP/1.1\r\nHost: h\r\nx-api-key: k\r\n"
    one += b"anthropic-version: 2026-10-21\r\n"
    with fake.serve(unix_path=path), socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(path))
        raw.sendall(one + b"\r\n" + one + b"Connection: close\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65_536), b""))
    assert answer.count(b"HTTP/1.1 200") == answer.count(b'"id": "claude-opus-5"') == 2


def test_what_is_no_http_ends_the_connection_and_nothing_else(path):
    fake = FakeAnthropic(lambda params: "x")
    with fake.serve(unix_path=path):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(b"\x00\x01 this is no request\r\n\r\n")
            assert raw.recv(100) == b""
        assert ask(path).content


def test_an_error_of_the_server_itself_is_told_and_not_hidden(path):
    async def respond(request):
        raise RuntimeError("broken")

    with (
        serve_in_thread(respond, unix_path=path),
        pytest.raises(anthropic.InternalServerError, match="RuntimeError: broken"),
    ):
        ask(path)


# --- Faults on the wire -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "n_billed"),
    [
        (status_fault(429, retry_after=7), anthropic.RateLimitError, 0),
        (status_fault(529), anthropic.OverloadedError, 0),
        (timeout_fault, anthropic.APITimeoutError, 0),
        (no_answer, anthropic.APITimeoutError, 0),
        (processed_then_timeout, anthropic.APITimeoutError, 1),
        (dropped_connection, anthropic.APIConnectionError, 0),
        (refused_connection, anthropic.APIConnectionError, 0),
        (processed_then_dropped, anthropic.APIConnectionError, 1),
        (broken_off(0.5), anthropic.APIConnectionError, 1),
        (broken_json, json.JSONDecodeError, 0),
    ],
)
def test_a_fault_happens_on_the_wire_and_the_next_request_is_answered(path, fault, error, n_billed):
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [fault]

    async def twice(client):
        with pytest.raises(error):
            await client.messages.create(**REQUEST, timeout=0.2)
        assert fake.n_billed == n_billed
        return await client.messages.create(**REQUEST)

    with fake.serve(unix_path=path):
        assert talk(path, twice).content[1].text == "x"
    assert len(fake.requests) == 2


def test_a_proxys_page_comes_over_the_wire_as_text(path):
    fake = FakeAnthropic(lambda params: "x")
    fake.faults = [html_200]
    with fake.serve(unix_path=path):
        assert "<html>" in ask(path)


def test_results_that_break_off_on_the_wire_give_the_lines_before(path):
    fake = FakeAnthropic(lambda params: "x", batch_polls=0)
    requests = [{"custom_id": str(i), "params": REQUEST} for i in range(20)]
    got = []

    async def read_on(client):
        batch = await client.messages.batches.create(requests=requests)
        fake.faults = [None, broken_off(0.5)]
        async for line in await client.messages.batches.results(batch.id):
            got.append(line.custom_id)

    with fake.serve(unix_path=path), pytest.raises(httpx2.RemoteProtocolError):
        talk(path, read_on)
    assert 5 < len(got) < 15


def test_a_whole_batch_works_over_the_wire_with_a_results_url_on_the_same_server(path):
    fake = FakeAnthropic(lambda params: params["messages"][0]["content"])
    requests = [{"custom_id": str(i), "params": REQUEST} for i in range(10)]

    async def collect(client):
        batches = client.messages.batches
        batch = await batches.create(requests=requests)
        while batch.processing_status != "ended":
            batch = await batches.retrieve(batch.id)
        assert batch.results_url.startswith("http://localhost/v1/messages/batches/")
        return {line.custom_id async for line in await batches.results(batch.id)}

    with fake.serve(unix_path=path):
        assert talk(path, collect) == {str(i) for i in range(10)}


# --- A process of its own ---------------------------------------------------------------------


@contextlib.contextmanager
def server(path, *arguments):
    command = [sys.executable, "-m", "prefopt.testing.serve", "--unix", str(path), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == f"listening on {path}\n"
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0


def test_a_server_process_judges_by_its_rule_logs_its_bills_and_ends_when_told(path, tmp_path):
    log = tmp_path / "bills.jsonl"
    shown = [("much longer than that", "short"), ("short", "a little longer"), ("as", "is")]

    async def judge(client):
        texts = []
        for a, b in shown:
            messages = [{"role": "user", "content": SHOWN.format(a, b)}]
            message = await client.messages.create(**REQUEST | {"messages": messages})
            texts.append(json.loads(message.content[1].text)["verdict"])
        return texts

    with server(path, "--log", str(log), "--answer", "shorter"):
        assert talk(path, judge) == ["second_much", "first_much", "tie"]
        assert len(read_bills(log)) == 3
    assert not path.exists()
    assert len({bill.request_hash for bill in read_bills(log)}) == 3


@pytest.mark.slow
def test_what_a_killed_client_has_paid_for_is_in_the_log(path, tmp_path):
    """The client is killed while one answer is on its way: that one is billed, the rest not sent."""
    log = tmp_path / "bills.jsonl"
    client = f"""
import asyncio
from prefopt.testing import socket_client

async def main():
    client = socket_client({str(path)!r}, max_retries=0)
    for i in range(100):
        content = {SHOWN!r}.format(i, "x")
        await client.messages.create(
            model="claude-sonnet-5-5", max_tokens=100,
            messages=[{{"role": "user", "content": content}}],
        )
        print(i, flush=True)

asyncio.run(main())
"""
    with server(path, "--log", str(log), "--latency_s", "0.4"):
        process = subprocess.Popen([sys.executable, "-c", client], stdout=subprocess.PIPE)
        with process:
            for _ in range(2):
                process.stdout.readline()
            deadline = time.monotonic() + 10
            while len(read_bills(log)) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.5)  # an answer to nobody changes nothing
        bills = read_bills(log)
        assert ask_shown(path, "0", "x")  # the server goes on
    assert len(bills) == 3
    again = Counter(bill.request_hash for bill in read_bills(log))
    assert sorted(again.values()) == [1, 1, 2]  # the one asked again was paid for twice


def ask_shown(path, a, b):
    messages = [{"role": "user", "content": SHOWN.format(a, b)}]
    return talk(path, lambda c: c.messages.create(**REQUEST | {"messages": messages}))


def test_the_command_line_sets_up_the_fake_it_describes(tmp_path):
    arguments = "--port 0 --fault_share 1 --seed 3 --fault_kinds overloaded --batch_polls 5"
    fake, unix_path, port = fake_from_arguments(arguments.split())
    assert (unix_path, port) == ("", 0)
    assert fake.faults.draw("messages.create") is FAULT_KINDS["overloaded"].fault
    default, _, _ = fake_from_arguments(["--unix", "x", "--fault_share", "1"])
    for _ in range(500):
        default.faults.draw("messages.create")
    hanging = {name for name, kind in FAULT_KINDS.items() if kind.hangs}
    assert not hanging & set(default.faults.drawn)
    assert {"refusal", "rate_limited", "dropped_connection"} <= set(default.faults.drawn)


@pytest.mark.parametrize("arguments", ["", "--unix x --port 1", "--port 0 --answer best"])
def test_a_command_line_that_makes_no_sense_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        fake_from_arguments(arguments.split())
    assert "usage: python -m prefopt.testing.serve" in capsys.readouterr().err


def test_a_judges_verdicts_are_the_same_over_a_socket(path):
    from prefopt.judges import judge_comparisons
    from prefopt.judges.anthropic import AnthropicJudge
    from prefopt.types import Candidate, Comparison, Prompt

    prompt = Prompt.from_text("What does a fox eat?")
    pairs = [
        Comparison(
            a=Candidate(prompt=prompt, text=f"mice {i}", model="m"),
            b=Candidate(prompt=prompt, text=f"berries {i}", model="m"),
        )
        for i in range(5)
    ]
    fake = FakeAnthropic(lambda params: verdict_reply("first"))

    def verdicts(client):
        judge = AnthropicJudge("claude-sonnet-5-5", max_usd=1.0, client=client)
        judged = judge_comparisons(pairs, judge, progress=False)
        return [(j.forward.preferred, j.backward.preferred) for j in judged]

    with fake.serve(unix_path=path):
        over_a_socket = verdicts(socket_client(path))
    assert over_a_socket == verdicts(fake.client()) == [("a", "b")] * 5
