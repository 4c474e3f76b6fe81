"""A history of two evaluations with many judged pairs: adding them, and every page of its dashboard.

    python benchmarks/speed_history.py                  # 100,000 pairs each; prints, writes results/
    python benchmarks/speed_history.py --pairs 2000

Questions of 15 words, answers of 80 words a side, and a judge's reasons in both orders, of made-up
words as frequent as a language's (Zipf). The two evaluations ask the same prompts in another order.
A page is asked for as a browser asks, all of it made anew: the seconds are those of the process (CPU),
the middle of three, and the wall time of the same three. Targets: 60 s for adding, 0.5 s for a page.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import random
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from starlette.testclient import TestClient

from prefopt.data.records import write_records
from prefopt.evaluation.dashboard import dashboard
from prefopt.evaluation.eval_report import answer_pair, build_report
from prefopt.evaluation.history import History
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ADD_TARGET_S, PAGE_TARGET_S = 60.0, 0.5


class Measured(NamedTuple):
    """What was done, in CPU and wall seconds."""

    what: str
    cpu_s: float
    wall_s: float


def texts(seed: int) -> Callable[[int], str]:
    """Draws texts of so many words out of one long text."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    known = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20_000)]
    frequent = list(itertools.accumulate(1 / (i + 1) for i in range(len(known))))
    words = rng.choices(known, cum_weights=frequent, k=100_000)
    text = " ".join(words)
    starts = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))

    def draw(n: int) -> str:
        first = rng.randrange(len(words) - n)
        return text[starts[first] : starts[first + n] - 1]

    return draw


def judged_pairs(n: int, seed: int) -> Iterator[JudgedComparison]:
    """Pairs whose questions are the same for every seed, and whose answers and verdicts are not."""
    asked, said, rng = texts(0), texts(seed), random.Random(seed)
    for i in range(n):
        prompt = Prompt.from_text(f"{asked(15)} {i}?", f"topic {i % 8}")
        forward, backward = rng.choices(("a", "b", "tie"), weights=(5, 3, 2), k=2)
        yield JudgedComparison(
            comparison=Comparison(
                a=Candidate(prompt=prompt, text=said(80), model="tuned"),
                b=Candidate(prompt=prompt, text=said(80), model="base"),
            ),
            forward=_verdict(forward, "a", said(25)),
            backward=_verdict(backward, "b", said(25)),
        )


def _verdict(preferred: Any, first: Any, rationale: str) -> Verdict:
    return Verdict(
        judge="a judge",
        preferred=preferred,
        strength=0 if preferred == "tie" else 1,
        shown_first=first,
        rationale=rationale,
    )


def make_evaluation(folder: Path, n: int, seed: int) -> Path:
    """A folder as `prefopt evaluate` leaves it; the figures of its report are of 100 pairs."""
    judged = list(judged_pairs(n, seed))
    random.Random(seed).shuffle(judged)
    write_records(folder / "judged.jsonl", judged)
    report = msgspec.structs.replace(
        build_report(judged[:100]), answers=tuple(map(answer_pair, judged))
    )
    (folder / "report.json").write_bytes(msgspec.json.encode(report))
    return folder


def timed(what: str, work: Callable[[], Any], rounds: int = 1) -> Measured:
    """The middle of some rounds."""
    taken = []
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        taken.append((time.process_time() - cpu, time.perf_counter() - wall))
    return Measured(what, *(statistics.median(column) for column in zip(*taken, strict=True)))


def pages(n: int, rare: str, common: str) -> dict[str, str]:
    """Every kind of page, filter and search, with its address."""
    last = -(-n // 50)
    return {
        "all evaluations": "/",
        "an evaluation": "/evaluations/1",
        "its last page": f"/evaluations/1?page={last}",
        "result": "/evaluations/1?result=loss",
        "category": "/evaluations/1?category=topic+3",
        "the order decided": "/evaluations/1?flipped=on",
        "all three": "/evaluations/1?result=tie&category=topic+3&flipped=on",
        "search, a word in few pairs": f"/evaluations/1?text={rare}",
        "search, a word in most pairs": f"/evaluations/1?text={common}",
        "search, two letters": "/evaluations/1?text=zz",
        "search, capitals that are not ASCII": "/evaluations/1?text=%C3%84rger",
        "search and filter": f"/evaluations/1?text={rare}&result=win",
        "a pair": f"/evaluations/1/pairs/{n}",
        "answers side by side": "/changes/1/2",
        "the worse ones": "/changes/1/2?which=worse&page=7",
        "no such page": "/evaluations/3",
    }


def measure(n: int, folder: Path) -> tuple[list[Measured], int]:
    """All of it, and the file's size in bytes."""
    found = []
    with History(folder / "history.sqlite") as history:
        for seed, name in ((1, "first"), (2, "second")):
            made = make_evaluation(folder / name, n, seed)
            work = functools.partial(history.add, made, series="bot")
            found.append(timed(f"add the {name} evaluation", work))
        client = TestClient(dashboard(history), base_url="http://localhost")
        words = history.pair(1, 1)[0].after.split()
        rare, common = max(words, key=len), min(words, key=len)
        for what, address in pages(n, rare, common).items():
            found.append(timed(what, lambda address=address: client.get(address), 3))
    return found, (folder / "history.sqlite").stat().st_size


def missed(found: list[Measured]) -> list[str]:
    """What took longer than it may, in CPU seconds: other programs' work is not counted."""
    return [
        m.what
        for m in found
        if m.cpu_s > (ADD_TARGET_S if m.what.startswith("add the") else PAGE_TARGET_S)
    ]


def to_markdown(n: int, found: list[Measured], size: int, command: str) -> str:
    """The table, and what missed its target."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    rows = "".join(f"| {m.what} | {m.cpu_s:.2f} | {m.wall_s:.2f} |\n" for m in found)
    return (
        f"# A history of two evaluations of {n:,} judged pairs\n\n"
        f"`{command}` at {commit}: {platform.machine()}, Python {platform.python_version()}, SQLite "
        f"{sqlite3.sqlite_version}. The file holds {size / 1e6:,.0f} MB.\n\n"
        f"| what | CPU seconds | wall seconds |\n|---|---|---|\n{rows}\n"
        f"Missed ({ADD_TARGET_S:.0f} s for adding, {PAGE_TARGET_S} s for a page, CPU): "
        f"{', '.join(missed(found)) or 'nothing'}.\n"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, size = measure(options.pairs, Path(folder))
    command = f"python benchmarks/speed_history.py --pairs {options.pairs}"
    text = to_markdown(options.pairs, found, size, command)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "speed_history.md").write_text(text)
    (options.out / "speed_history.json").write_text(
        json.dumps(
            {
                "pairs": options.pairs,
                "file_bytes": size,
                "measured": [m._asdict() for m in found],
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
