"""kill -9 at random moments: nothing is lost, no finished call paid twice, the data the same.

A real server on a Unix socket, in a process of its own, writes down every answer it bills. The
judging process is killed again and again and started again until it comes to its end.
`PREFOPT_KILLS=200` sets how many kills the slow tests make.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from prefopt.judges.asking import verdict_key
from prefopt.judges.ledger import Ledger
from prefopt.testing.billing import read_bills, request_hash
from tests.faults import judging_zygote

N_PAIRS = 30


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A fake API in a process of its own: (socket, bills)."""
    folder = tmp_path_factory.mktemp("server")
    socket, log = folder / "api.sock", folder / "bills.jsonl"
    command = [sys.executable, "-m", "prefopt.testing.serve", "--unix", str(socket)]
    options = ["--log", str(log), "--latency_s", "0.02", "--batch_polls", "3"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert "listening" in process.stdout.readline()
        yield socket, log
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def started_zygote():
    """What forks judging processes, one at a time."""
    command = [sys.executable, "-m", "tests.faults.judging_zygote"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def zygote():
    with started_zygote() as process:
        yield process


def start(zygote, job):
    """The id of a judging process."""
    zygote.stdin.write(json.dumps(job) + "\n")
    zygote.stdin.flush()
    return int(zygote.stdout.readline())


def run(zygote, job, kill_after_s=None):
    """One judging process; killed after a while, or let run. Whether it came to its end."""
    pid = start(zygote, job)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    return has_ended(zygote)


def has_ended(zygote):
    """Wait for the judging process; whether it came to its end, not to be killed."""
    zygote.stdin.write("\n")
    zygote.stdin.flush()
    status = int(zygote.stdout.readline())
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the judging process failed"
    return not os.WIFSIGNALED(status)


def kill_until(zygote, server, folder, transport, n_kills, seed):
    """Rounds of judging, each killed until it gets through, until n_kills were made."""
    socket, log = server
    rng = random.Random(seed)
    job = {"socket": str(socket), "transport": transport, "n": N_PAIRS}
    undisturbed = {**job, "ledger": str(folder / "u.sqlite"), "out": str(folder / "u.jsonl")}
    assert run(zygote, undisturbed)
    started = time.monotonic()
    assert run(zygote, {**job, "ledger": str(folder / "t.sqlite"), "out": str(folder / "t.jsonl")})
    whole_s = time.monotonic() - started
    bills_before = len(read_bills(log))
    killed = rounds = 0
    while killed < n_kills:
        rounds += 1
        name = folder / f"round{rounds}"
        disturbed = {**job, "ledger": f"{name}.sqlite", "out": f"{name}.jsonl"}
        kills_here = 0
        while True:
            wait_s = rng.uniform(0, whole_s) if killed < n_kills else None
            if run(zygote, disturbed, wait_s):
                break
            killed += 1
            kills_here += 1
        check(f"{name}.sqlite", read_bills(log)[bills_before:], transport, kills_here)
        for ending in ("", ".preferences.jsonl"):
            expected = Path(undisturbed["out"] + ending).read_bytes()
            assert Path(disturbed["out"] + ending).read_bytes() == expected
        bills_before = len(read_bills(log))
    return killed


def check(ledger, bills, transport, n_kills):
    judge = judging_zygote.judge("unused.sock", transport)
    key_of = {}
    for c in judging_zygote.pairs(N_PAIRS):
        for shown in (c, c.swapped()):
            key = verdict_key(judge.fingerprint, shown)
            key_of[request_hash(judge.request(shown).params)] = key
    assert {bill.request_hash for bill in bills} == set(key_of)  # all were asked, nothing else
    with Ledger(ledger) as book:
        recorded_at = dict(
            book.count("SELECT key, recorded_at FROM verdicts WHERE failure IS NULL")
        )
        lost = Counter(
            key for (key,) in book.count("SELECT key FROM attempts WHERE outcome = 'lost'")
        )
        answered = dict(
            book.count("SELECT key, COUNT(*) FROM attempts WHERE outcome = 'answered' GROUP BY key")
        )
        spent, unknown, reserved = book.money()
    assert set(recorded_at) == set(key_of.values())
    assert set(answered.values()) == {1}  # no finished call is there twice
    assert reserved == pytest.approx(0)
    billed = Counter(key_of[bill.request_hash] for bill in bills)
    for bill in bills:
        key = key_of[bill.request_hash]
        assert bill.time_s <= recorded_at[key], "a finished call was asked again"
    for key, n in billed.items():
        # More than one bill: only for what was under way at a kill, and the ledger says so.
        assert n <= 1 + lost[key]
    price = judge.price
    cost = sum(
        price.cost_usd(
            input_tokens=b.input_tokens,
            output_tokens=b.output_tokens,
            cache_read_tokens=b.cache_read_input_tokens,
            cache_write_tokens=b.cache_creation_input_tokens,
        )
        * (0.5 if b.batch_id else 1.0)
        for b in bills
    )
    assert spent - 1e-9 <= cost <= spent + unknown + 1e-9
    if transport == "batch":
        # One request goes by itself, as a trial; nothing that went in a batch is billed twice.
        in_batches = Counter(key_of[b.request_hash] for b in bills if b.batch_id)
        assert max(in_batches.values()) == 1
        assert len(bills) - len(key_of) <= n_kills
    else:
        assert sum(lost.values()) <= n_kills * judge.concurrency


@pytest.mark.parametrize("transport", ["sync", pytest.param("batch", marks=pytest.mark.slow)])
def test_a_few_kills_lose_nothing_and_pay_for_no_finished_call_twice(
    server, zygote, tmp_path, transport
):
    assert kill_until(zygote, server, tmp_path, transport, n_kills=4, seed=1) == 4


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["sync", "batch"])
def test_many_kills_lose_nothing_and_pay_for_no_finished_call_twice(
    server, zygote, tmp_path, transport
):
    n_kills = int(os.environ.get("PREFOPT_KILLS", "100"))
    assert kill_until(zygote, server, tmp_path, transport, n_kills=n_kills, seed=2) == n_kills


@pytest.mark.slow
def test_two_processes_on_one_ledger_ask_nothing_twice(server, zygote, tmp_path):
    socket, log = server
    bills_before = len(read_bills(log)) if log.exists() else 0
    jobs = [
        {
            "socket": str(socket),
            "transport": "sync",
            "n": N_PAIRS,
            "ledger": str(tmp_path / "both.sqlite"),
            "out": str(tmp_path / f"out{i}.jsonl"),
        }
        for i in range(2)
    ]
    with started_zygote() as second:
        both = (zygote, second)
        for parent, job in zip(both, jobs, strict=True):
            start(parent, job)
        assert [has_ended(parent) for parent in both] == [True, True]
    assert Path(jobs[0]["out"]).read_bytes() == Path(jobs[1]["out"]).read_bytes()
    bills = Counter(bill.request_hash for bill in read_bills(log)[bills_before:])
    assert len(bills) == 2 * N_PAIRS
    assert set(bills.values()) == {1}
    with Ledger(jobs[0]["ledger"]) as book:
        owners = book.count("SELECT owner, COUNT(*) FROM verdicts GROUP BY owner")
    assert sum(n for _, n in owners) == 2 * N_PAIRS
