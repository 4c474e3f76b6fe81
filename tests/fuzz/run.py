"""Give each parser many inputs and count what it makes of them.

    python -m tests.fuzz.run --inputs 1000000            # all parsers, half an hour on one core
    python -m tests.fuzz.run --inputs 20000 --targets verdict export
    python -m tests.fuzz.run --inputs 1000000 --write    # benchmarks/results/fuzz.{json,md}

Inputs come from three sources: changes of known inputs drawn by a seeded generator, hypothesis's
trees, and atheris (libFuzzer), which keeps the inputs that reach new lines of prefopt. Without atheris
(`pip install 'prefopt[fuzz]'`) its share goes to the first. A fault is an error that the parser's
documentation does not name, or an input that takes longer than the time limit; each kind is shown
once, with the input that showed it. The exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import importlib.util
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
HYPOTHESIS_SHARE = 0.05
ATHERIS_SHARE = 0.45
_MAX_LENGTH = 4096
_FEWEST_FOR_ATHERIS = 1000
_HANGS_S = 300.0


class Outcome:
    """Counts for one parser: inputs taken, refused with which error, faults by where they arose."""

    def __init__(self) -> None:
        self.taken = 0
        self.refused: collections.Counter[str] = collections.Counter()
        self.faults: dict[str, str] = {}
        self.slowest_s = 0.0

    @property
    def n(self) -> int:
        """Inputs so far; those of a fault that was seen before are counted with the refused ones."""
        return self.taken + sum(self.refused.values())

    def give(self, target: Any, data: bytes) -> None:
        """Run one input."""
        from tests.fuzz.targets import TIME_LIMIT_S, is_fault

        # Processor time: on a busy machine an input may wait for seconds. What never comes back ends
        # the run, and says where it was.
        faulthandler.dump_traceback_later(_HANGS_S, exit=True)
        start = time.process_time()
        try:
            target.run(data)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            name = type(error).__name__
            if is_fault(target, error):
                last = traceback.extract_tb(error.__traceback__)
                own = [f for f in last if "prefopt" in f.filename and "tests" not in f.filename]
                frame = (own or last)[-1]
                where = f"{Path(frame.filename).name}, in {frame.name}"
                key = f"{name} in {where}"
                self.faults.setdefault(key, f"{data[:300]!r} -> {str(error)[:200]}")
                name = f"FAULT {name}"
            self.refused[name] += 1
        else:
            self.taken += 1
        took = time.process_time() - start
        faulthandler.cancel_dump_traceback_later()
        self.slowest_s = max(self.slowest_s, took)
        if took > TIME_LIMIT_S:
            self.faults.setdefault("longer than the time limit", f"{took:.1f} s: {data[:300]!r}")

    def add(self, other: dict[str, Any]) -> None:
        """What a process of its own found."""
        self.taken += other["taken"]
        self.refused.update(other["refused"])
        self.faults = {**other["faults"], **self.faults}
        self.slowest_s = max(self.slowest_s, other["slowest_s"])

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "inputs": self.n,
            "taken": self.taken,
            "refused": dict(self.refused.most_common()),
            "faults": self.faults,
            "slowest_s": round(self.slowest_s, 3),
        }


def by_changes(name: str, n: int, seed: int, outcome: Outcome) -> None:
    """The seeds themselves, then changed ones; the same seed gives the same inputs."""
    from tests.fuzz.generate import changed
    from tests.fuzz.targets import target_named

    target = target_named(name)
    draw = random.Random(f"{name} {seed}")
    pool = list(target.seeds) or [b""]
    for data in pool:
        with contextlib.suppress(BaseException):
            target.run(data)  # what is imported at first use is no parser's time
    for i in range(n):
        if i < len(target.seeds):
            data = target.seeds[i]
        else:
            data = changed(draw.choice(pool), target.seeds, draw)
            if draw.random() < 0.05 and len(pool) < 500:
                pool.append(data)  # changes of changes
        outcome.give(target, data)


def by_hypothesis(name: str, n: int, outcome: Outcome) -> None:
    """Trees of the names that the parsers know."""
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.fuzz.generate import INPUTS
    from tests.fuzz.targets import target_named

    target = target_named(name)

    @settings(
        max_examples=n, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(INPUTS)
    def run(data: bytes) -> None:
        outcome.give(target, data)

    run()


def by_atheris(name: str, n: int, seed: int, outcome: Outcome) -> None:
    """In a process of its own: libFuzzer ends the one it runs in."""
    from tests.fuzz.targets import FOLDER

    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "tests.fuzz.run", "--atheris", name, str(n), str(seed)]
        done = subprocess.run(
            [*command, str(result)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, FOLDER: folder},
        )
        if result.is_file():
            outcome.add(json.loads(result.read_text()))
        if not result.is_file() or "ERROR: libFuzzer" in done.stderr:
            outcome.faults["the process ended"] = done.stderr[-500:]


def _atheris(name: str, n: int, seed: int, result: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["prefopt"], enable_loader_override=False):
        from tests.fuzz.targets import target_named
    target = target_named(name)
    outcome = Outcome()
    with contextlib.suppress(BaseException):
        target.run(target.seeds[0])

    def one(data: bytes) -> None:
        if outcome.n < n:
            outcome.give(target, data)
            if outcome.n in (n, 1) or outcome.n % 1000 == 0:
                result.write_text(json.dumps(outcome.plain()))

    corpus = result.parent / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(data)
    atheris.Setup(
        [sys.argv[0], str(corpus), f"-runs={n + 1}", f"-seed={seed + 1}", f"-max_len={_MAX_LENGTH}",
         "-timeout=60", "-rss_limit_mb=4096", "-verbosity=0", "-print_final_stats=0"],
        one,
    )  # fmt: skip
    atheris.Fuzz()


def shares(names: list[str], inputs: int) -> dict[str, int]:
    """How many inputs each parser gets, by weight."""
    from tests.fuzz.targets import TARGETS

    total = sum(TARGETS[name].weight for name in names) or 1.0
    return {name: max(50, round(inputs * TARGETS[name].weight / total)) for name in names}


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    logging.disable(logging.CRITICAL)
    if given[:1] == ["--atheris"]:
        _atheris(given[1], int(given[2]), int(given[3]), Path(given[4]))
        return 0
    from tests.fuzz.targets import TARGETS, clean_up

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1_000_000, help="over all parsers")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/")
    parser.add_argument("--no_atheris", action="store_true", help="though it is installed")
    options = parser.parse_args(given)
    with_atheris = importlib.util.find_spec("atheris") is not None and not options.no_atheris
    start = time.perf_counter()
    engines = ["changed inputs", "hypothesis", *(["atheris"] if with_atheris else [])]
    found: dict[str, Outcome] = {}
    seconds: dict[str, float] = {}
    lines = [
        "| parser | inputs | inputs/s | taken | refused | slowest | faults |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    try:
        for name, n in shares(options.targets, options.inputs).items():
            begun, outcome = time.perf_counter(), Outcome()
            of_atheris = int(n * ATHERIS_SHARE) if with_atheris and n >= _FEWEST_FOR_ATHERIS else 0
            of_trees = int(n * HYPOTHESIS_SHARE)
            by_changes(name, n - of_atheris - of_trees, options.seed, outcome)
            if of_trees:
                by_hypothesis(name, of_trees, outcome)
            if of_atheris:
                by_atheris(name, of_atheris, options.seed, outcome)
            found[name] = outcome
            seconds[name] = time.perf_counter() - begun
            rate = outcome.n / seconds[name]
            lines.append(
                f"| {name} | {outcome.n:,} | {rate:,.0f} | {outcome.taken:,} | "
                f"{sum(outcome.refused.values()):,} | {outcome.slowest_s:.2f} s | "
                f"{len(outcome.faults)} |"
            )
            print(lines[-1], flush=True)
            for kind, shown in outcome.faults.items():
                print(f"    FAULT {kind}: {shown}", flush=True)
            if options.write:
                _write(found, seconds, engines)
    finally:
        clean_up()
    said = _sum(found, start)
    print(said)
    return 1 if any(outcome.faults for outcome in found.values()) else 0


def _sum(found: dict[str, Outcome], start: float) -> str:
    total = sum(outcome.n for outcome in found.values())
    took = time.perf_counter() - start
    n_faults = sum(len(outcome.faults) for outcome in found.values())
    speed = f"{total:,} inputs in {took:,.0f} s ({total / took:,.0f} a second)"
    return f"{speed}, {n_faults} kinds of faults"


def _write(found: dict[str, Outcome], seconds: dict[str, float], engines: list[str]) -> None:
    """Into the results, beside what they have of other parsers."""
    from prefopt.evaluation.eval_report import installed_versions
    from tests.fuzz.targets import TARGETS

    path = RESULTS / "fuzz.json"
    kept = json.loads(path.read_text())["parsers"] if path.is_file() else {}
    for name, outcome in found.items():
        kept[name] = {**outcome.plain(), "seconds": round(seconds[name], 1), "engines": engines}
    kept = {name: kept[name] for name in TARGETS if name in kept}
    rows = [
        "| parser | inputs | inputs/s | taken | refused | slowest | faults |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in kept.items():
        refused = sum(one["refused"].values())
        rows.append(
            f"| {name} | {one['inputs']:,} | {one['inputs'] / one['seconds']:,.0f} | "
            f"{one['taken']:,} | {refused:,} | {one['slowest_s']:.2f} s | {len(one['faults'])} |"
        )
    total = sum(one["inputs"] for one in kept.values())
    took = sum(one["seconds"] for one in kept.values())
    n_faults = sum(len(one["faults"]) for one in kept.values())
    used = sorted({engine for one in kept.values() for engine in one["engines"]})
    text = (
        "# Parsers under random inputs\n\nPrinted by `python -m tests.fuzz.run --inputs 1000000 "
        f"--write` (one process; {', '.join(used)}; with `--targets`, some of the parsers are given "
        f"new inputs and the others' rows stay).\n\n{total:,} inputs in {took:,.0f} s "
        f"({total / took:,.0f} a second), {n_faults} kinds of faults.\n\nTaken: the parser made "
        "something of the input. Refused: with an error that its documentation names. A fault is any "
        "other error, or an input that takes more than 5 s of processor time. The speed is that of a "
        "machine with other work.\n\n" + "\n".join(rows) + "\n"
    )
    content = json.dumps({"versions": installed_versions(), "parsers": kept}, indent=1)
    path.write_text(content + "\n")
    path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
