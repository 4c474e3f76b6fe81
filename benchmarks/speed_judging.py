"""How much the judging pipeline costs beside the API: CPU a call, time against the ideal, memory.

    python benchmarks/speed_judging.py            # all of it, about nine minutes
    python benchmarks/speed_judging.py --quick    # small numbers, for a look

1. CPU: process time a call, with the offline fake answering at once, everything counted: the fake,
   the HTTP client, the ledger. Beside it the same requests sent in a bare loop by the SDK's own
   `messages.create`, with no ledger, no retries and no verdicts.
2. Time: 10,000 pairs in both orders through the fake with 50 ms of latency at concurrency 64, three
   times; the ideal is calls x latency / concurrency, and the run begins at 8 requests at once like
   any other. Beside it the same requests through the SDK's `messages.create`, 64 at once from the
   start.
3. Memory: pairs streamed in a process of its own, started anew: the peak that the kernel notes for
   that program (VmHWM of /proc/self/status, which begins at zero with it). 1,000,000 pairs against
   10,000 with a judge that costs nothing, and 20,000 against 2,000 through the API judge and the fake.

The other load of the machine is noted: the load average over the minute before each part.

Writes benchmarks/results/speed_judging.{json,md}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from prefopt.evaluation.eval_report import installed_versions
from prefopt.judges import Judge, judge_stream, shortest_wins
from prefopt.judges.anthropic import AnthropicJudge
from prefopt.judges.api_judge import Request
from prefopt.testing import FakeAnthropic, verdict_reply
from prefopt.types import Candidate, Comparison, Prompt

RESULTS = Path(__file__).parent / "results"
MODEL = "claude-sonnet-5-5"
CONCURRENCY = 64
LATENCY_S = 0.05


class Pairs:
    """n made-up comparisons of about 400 words together, the same at every reading."""

    def __init__(self, n: int, words: int = 200) -> None:
        self.n, self.words = n, words

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Comparison]:
        text = "an answer of some length " * (self.words // 5)
        for i in range(self.n):
            prompt = Prompt.from_text(f"Question {i}: what does a fox eat?")
            a = Candidate(prompt=prompt, text=f"{text} a{i}", model="m", sample_index=0)
            b = Candidate(prompt=prompt, text=f"{text} longer b{i}", model="m", sample_index=1)
            yield Comparison(a=a, b=b)


def fake(latency_s: float = 0.0) -> FakeAnthropic:
    """A fake API that always says the same and keeps nothing."""
    reply = verdict_reply("second", "It is clearer about what was asked. " * 5)
    return FakeAnthropic(lambda params: reply, latency_s=latency_s, keep=False)


def cpu_per_call(n_pairs: int) -> dict[str, float]:
    """Process time a call, in milliseconds: the pipeline, and a bare loop over the same requests."""
    pairs = list(Pairs(n_pairs))

    def bare() -> float:
        judge = AnthropicJudge(MODEL, max_usd=1e6, client=fake().client(), transport="sync")
        requests: list[Request] = []
        for c in pairs:
            requests += [judge.request(c), judge.request(c.swapped())]

        async def send_all() -> None:
            async with judge.open_client() as client:
                for request in requests:
                    await client.messages.create(**request.params)

        start = time.process_time()
        asyncio.run(send_all())
        return (time.process_time() - start) / len(requests) * 1e3

    def whole() -> float:
        judge = AnthropicJudge(MODEL, max_usd=1e6, client=fake().client(), transport="sync")
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            for _ in judge_stream(pairs, judge, ledger=f"{folder}/l.sqlite", progress=False):
                pass
            return (time.process_time() - start) / (2 * n_pairs) * 1e3

    bare(), whole()
    runs = [(bare(), whole()) for _ in range(3)]
    return {"whole_ms": min(r[1] for r in runs), "bare_sdk_and_fake_ms": min(r[0] for r in runs)}


def time_against_ideal(n_pairs: int, n_runs: int) -> dict[str, Any]:
    """Wall time of judging in both orders, against calls x latency / concurrency."""
    pairs = list(Pairs(n_pairs))  # making them up is not part of judging them
    ideal_s = 2 * n_pairs * LATENCY_S / CONCURRENCY
    judge = AnthropicJudge(
        MODEL,
        max_usd=1e6,
        client=fake(LATENCY_S).client(),
        transport="sync",
        concurrency=CONCURRENCY,
    )
    requests = [r for c in pairs for r in (judge.request(c), judge.request(c.swapped()))]

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            judging = judge_stream(pairs, judge, ledger=f"{folder}/l.sqlite", progress=False)
            start = time.perf_counter()
            n = sum(1 for _ in judging)
            wall_s = time.perf_counter() - start
        assert n == n_pairs
        return wall_s

    async def bare() -> None:
        left = iter(requests)

        async def work(client: Any) -> None:
            for request in left:
                await client.messages.create(**request.params)

        async with judge.open_client() as client:
            await asyncio.gather(*(work(client) for _ in range(CONCURRENCY)))

    walls = []
    bares = []
    for _ in range(n_runs):
        walls.append(ours())
        start = time.perf_counter()
        asyncio.run(bare())
        bares.append(time.perf_counter() - start)
    return {
        "calls": 2 * n_pairs,
        "ideal_s": ideal_s,
        "wall_s": walls,
        "ratio": statistics.median(walls) / ideal_s,
        "bare_sdk_wall_s": bares,
        "bare_sdk_ratio": statistics.median(bares) / ideal_s,
    }


def peak_memory_mb(n_pairs: int, judge: Literal["free", "api"]) -> dict[str, float]:
    """Peak resident memory of a process that judges this many pairs, and how long it took."""
    command = [sys.executable, __file__, "--memory-of", str(n_pairs), "--memory-judge", judge]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(out))


def _memory_child(n_pairs: int, kind: str) -> None:
    judge: Judge = shortest_wins()
    if kind == "api":
        judge = AnthropicJudge(MODEL, max_usd=1e6, client=fake().client(), transport="sync")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        n = sum(
            1
            for _ in judge_stream(
                Pairs(n_pairs, 50),
                judge,
                ledger=f"{folder}/l.sqlite",
                progress=False,
            )
        )
    assert n == n_pairs
    # Not getrusage: its figure is kept over exec and so includes the parent's at the fork.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({"n": n, "peak_mb": peak, "seconds": time.perf_counter() - start}))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small numbers; writes nothing")
    parser.add_argument("--only", choices=["cpu", "time", "memory"])
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory-judge", default="free", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _memory_child(options.memory_of, options.memory_judge)
        return
    os.environ.setdefault("ANTHROPIC_API_KEY", "none-is-used")
    logging.getLogger("prefopt").setLevel(logging.ERROR)  # the price announced for every run
    found: dict[str, Any] = {"versions": installed_versions(), "cpus": os.cpu_count(), "load": {}}
    lines = ["# Speed of the judging pipeline", "", "| what | measured | target |", "|---|---|---|"]

    def wanted(part: str) -> bool:
        found["load"][part] = os.getloadavg()[0]
        return options.only in (None, part)

    if wanted("cpu"):
        cpu = found["cpu"] = cpu_per_call(200 if options.quick else 1000)
        lines.append(
            f"| CPU a call, all included | {cpu['whole_ms']:.2f} ms (the SDK's `messages.create` and "
            f"the fake, in a bare loop: {cpu['bare_sdk_and_fake_ms']:.2f} ms) | 3 ms |"
        )
        print(lines[-1], flush=True)
    if wanted("time"):
        took = found["time"] = time_against_ideal(*((500, 1) if options.quick else (10_000, 3)))
        runs = ", ".join(f"{wall_s:.1f}" for wall_s in took["wall_s"])
        lines.append(
            f"| {took['calls']:,} calls, 50 ms latency, concurrency 64 | {runs} s: "
            f"{took['ratio']:.2f} x the ideal {took['ideal_s']:.1f} s (median; the SDK alone "
            f"{took['bare_sdk_ratio']:.2f} x) | 1.3 x |"
        )
        print(lines[-1], flush=True)
    if wanted("memory"):
        found["memory"] = {}
        sizes: dict[Literal["free", "api"], tuple[int, int]] = {
            "free": (10_000, 30_000 if options.quick else 1_000_000),
            "api": (500, 1_000) if options.quick else (2_000, 20_000),
        }
        for kind, (few, many) in sizes.items():
            small, large = peak_memory_mb(few, kind), peak_memory_mb(many, kind)
            found["memory"][kind] = {"small": small, "large": large}
            lines.append(
                f"| peak memory, {'a judge that is free' if kind == 'free' else 'the API judge'}: "
                f"{large['n']:,} pairs against {small['n']:,} | {large['peak_mb']:.1f} MB against "
                f"{small['peak_mb']:.1f} MB ({large['seconds']:.0f} s) | flat |"
            )
            print(lines[-1], flush=True)
    if not options.quick and options.only is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "speed_judging.json").write_text(json.dumps(found, indent=2) + "\n")
        loads = ", ".join(f"{load:.1f} before {part}" for part, load in found["load"].items())
        lines += [
            "",
            f"Printed by `python benchmarks/speed_judging.py` on {found['cpus']} CPUs, used by others "
            f"too (load average {loads}). Of the time beyond the ideal most is CPU time: 20,000 calls "
            "are handled on one core by one event loop.",
        ]
        (RESULTS / "speed_judging.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
