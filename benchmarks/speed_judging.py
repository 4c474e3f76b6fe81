"""How much the judging pipeline costs beside the API: CPU a call, time against the ideal, memory.

    python benchmarks/speed_judging.py            # all three, about six minutes
    python benchmarks/speed_judging.py --quick    # small numbers, for a look

1. CPU: process time a call, with the offline fake answering at once, less what the fake and the SDK
   cost by themselves (the same requests sent in a bare loop).
2. Time: 10,000 pairs in both orders through the fake with 50 ms of latency at concurrency 64. The
   ideal is calls x latency / concurrency; the run begins at 8 requests at once like any other.
3. Memory: pairs streamed through a judge that costs nothing, in a process of its own; the peak of
   the resident memory for 1,000,000 pairs against that for 10,000.

Writes benchmarks/results/speed_judging.{json,md}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.evaluation.eval_report import installed_versions
from prefopt.judges import judge_stream, shortest_wins
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
    bare_ms = min(r[0] for r in runs)
    whole_ms = min(r[1] for r in runs)
    return {
        "whole_ms": whole_ms,
        "bare_sdk_and_fake_ms": bare_ms,
        "overhead_ms": whole_ms - bare_ms,
    }


def time_against_ideal(n_pairs: int) -> dict[str, float]:
    """Wall time of judging in both orders, against calls x latency / concurrency."""
    judge = AnthropicJudge(
        MODEL,
        max_usd=1e6,
        client=fake(LATENCY_S).client(),
        transport="sync",
        concurrency=CONCURRENCY,
    )
    pairs = list(Pairs(n_pairs))  # making them up is not part of judging them
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        n = sum(1 for _ in judge_stream(pairs, judge, ledger=f"{folder}/l.sqlite", progress=False))
        wall_s = time.perf_counter() - start
    assert n == n_pairs
    ideal_s = 2 * n_pairs * LATENCY_S / CONCURRENCY
    return {"calls": 2 * n_pairs, "wall_s": wall_s, "ideal_s": ideal_s, "ratio": wall_s / ideal_s}


def peak_memory_mb(n_pairs: int) -> dict[str, float]:
    """Peak resident memory of a process that judges this many pairs, and how long it took."""
    command = [sys.executable, __file__, "--memory-of", str(n_pairs)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(out))


def _memory_child(n_pairs: int) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        n = sum(
            1
            for _ in judge_stream(
                Pairs(n_pairs, 50),
                shortest_wins(),
                ledger=f"{folder}/l.sqlite",
                progress=False,
            )
        )
    assert n == n_pairs
    # Of this program's own memory: the usual figure would include the parent's at the fork.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({"n": n, "peak_mb": peak, "seconds": time.perf_counter() - start}))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small numbers; writes nothing")
    parser.add_argument("--only", choices=["cpu", "time", "memory"])
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _memory_child(options.memory_of)
        return
    os.environ.setdefault("ANTHROPIC_API_KEY", "none-is-used")
    found: dict[str, Any] = {"versions": installed_versions()}
    lines = ["# Speed of the judging pipeline", "", "| what | measured | target |", "|---|---|---|"]
    if options.only in (None, "cpu"):
        cpu = found["cpu"] = cpu_per_call(200 if options.quick else 1000)
        lines.append(
            f"| CPU a call | {cpu['whole_ms']:.2f} ms whole, of which the SDK and the fake alone "
            f"{cpu['bare_sdk_and_fake_ms']:.2f} ms | 3 ms |"
        )
        print(lines[-1], flush=True)
    if options.only in (None, "time"):
        took = found["time"] = time_against_ideal(500 if options.quick else 10_000)
        lines.append(
            f"| {took['calls']:,} calls, 50 ms latency, concurrency 64 | {took['wall_s']:.1f} s, "
            f"{took['ratio']:.2f} x the ideal {took['ideal_s']:.1f} s | 1.3 x |"
        )
        print(lines[-1], flush=True)
    if options.only in (None, "memory"):
        small = peak_memory_mb(10_000)
        large = peak_memory_mb(30_000 if options.quick else 1_000_000)
        found["memory"] = {"small": small, "large": large}
        lines.append(
            f"| peak memory of {large['n']:,} pairs against {small['n']:,} | "
            f"{large['peak_mb']:.1f} MB against {small['peak_mb']:.1f} MB "
            f"({large['seconds']:.0f} s) | flat |"
        )
        print(lines[-1], flush=True)
    if not options.quick and options.only is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "speed_judging.json").write_text(json.dumps(found, indent=2) + "\n")
        lines += ["", "Printed by `python benchmarks/speed_judging.py`."]
        (RESULTS / "speed_judging.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
