"""Random faults over the whole flow: what happened, told or survived, and was anything lost?

    python -m tests.faults.flow_campaign --faults 1000 --seed 1 --out benchmarks/results

One fault after another hits one run folder, each in a process of its own, until the flow gets through;
then everything is compared with a run that was never disturbed, and the ledger with the bills of the
server, which lives outside of what is killed. What must hold after every fault:

    a process that could not go on said why: which file, and what to do next;
    no verdict and no attempt that was in the ledger has gone from it;
and at the end of every folder:

    every artefact has the bytes of the undisturbed run;
    a question was billed once, and once more at most for each time it was under way at a fault;
    what the server billed lies between what the ledger says was spent and was possibly spent;
    nothing unfinished is left lying about.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.testing.billing import Bill, read_bills, request_hash
from tests.faults.faulty_calls import preloaded_environment
from tests.faults.flow_zygote import UNTOLD

STAGES = (
    "train_prompts", "held_out_prompts", "candidates", "judged", "preferences", "left_out",
    "dataset", "adapter", "answers_tuned", "answers_base", "judged_held_out", "report",
)  # fmt: skip
_NOT_COMPARED = ("manifest.json", "run.json", ".lock")
_CALLS = 22  # what the flow asks its judge: both orders of each comparison


class Fault(NamedTuple):
    """One fault of the campaign: its kind and what it does to a job."""

    kind: str
    job: dict[str, Any]


class Hit(NamedTuple):
    """What a fault did. `outcome` is "killed", "told", "survived" or "went on"."""

    kind: str
    stage: str
    outcome: str
    cpu_s: float


class Broken(AssertionError):
    """Something that must hold does not."""


class World:
    """A paid server, a process to fork flows from, a model and prompts; and the undisturbed run.

    Args:
        folder: for everything; bills are kept in `bills.jsonl`.
        fault_share: of the server's answers that fail.
        seed: of the server's faults.
    """

    def __init__(self, folder: Path, *, fault_share: float = 0.0, seed: int = 0) -> None:
        from tests.tiny_models import save_tiny_model

        environment = preloaded_environment()
        if environment is None:
            raise RuntimeError("the campaign needs a C compiler and /proc")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "bills.jsonl"
        self.model = save_tiny_model(folder / "model", context=96)
        self.prompts = folder / "prompts.jsonl"
        lines = [json.dumps({"prompt": f"Question {i}: what is {i}?"}) for i in range(5)]
        self.prompts.write_text("\n".join(lines), encoding="utf-8")
        self._stack = contextlib.ExitStack()
        try:
            self._start(environment, fault_share, seed)
        except BaseException:
            self._stack.close()
            raise

    def _start(self, environment: dict[str, str], fault_share: float, seed: int) -> None:
        self.url = self._serve("calm", 0.0, seed)
        self._hostile = fault_share, seed
        quiet = {
            "ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_API_KEY": "not-a-real-key",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self._zygote = self._started(
            [sys.executable, "-m", "tests.faults.flow_zygote"],
            env={**environment, **quiet},
            stdin=subprocess.PIPE,
            stderr=self._stack.enter_context((self.folder / "zygote.log").open("w")),
        )
        self.undisturbed = self.folder / "undisturbed"
        if self._ask({"start": self.job(self.undisturbed)}) != 0:
            raise Broken(
                f"the undisturbed run failed: {(self.folder / 'zygote.log').read_text()[-3000:]}"
            )
        self.expected = artefacts(self.undisturbed)
        self._key_of = _keys_by_request(self.undisturbed)

    @functools.cached_property
    def hostile_url(self) -> str:
        """Of a server that fails a share of its answers; it is started when it is first needed."""
        return self._serve("hostile", *self._hostile)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self._zygote.stdin.close()
        self._zygote.wait()
        self._stack.close()

    def _started(self, command: list[str], **options: Any) -> Any:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], **options
        )

        def stop() -> None:
            process.terminate()
            process.wait()
            process.stdout.close()

        self._stack.callback(stop)
        return process

    def _serve(self, name: str, fault_share: float, seed: int) -> str:
        server = self._started(
            [
                *(sys.executable, "-m", "prefopt.testing.serve", "--port", "0"),
                *("--log", str(self.log), "--latency_s", "0.003", "--answer", "hash"),
                *("--fault_share", str(fault_share), "--seed", str(seed)),
                *("--fault_kinds", *_PASSING),
            ],
        )
        return str(server.stdout.readline().split()[-1])

    def _ask(self, command: dict[str, Any]) -> Any:
        self._zygote.stdin.write(json.dumps(command) + "\n")
        self._zygote.stdin.flush()
        while line := self._zygote.stdout.readline():
            with contextlib.suppress(ValueError):  # what the undisturbed run prints
                return json.loads(line)
        raise Broken(f"no answer: {(self.folder / 'zygote.log').read_text()[-3000:]}")

    def job(self, out: Path, **fault: Any) -> dict[str, Any]:
        """One run of the flow in `out`."""
        said = str(out.with_name(out.name + ".said"))
        return {
            "out": str(out), "model": self.model, "prompts": str(self.prompts), "said": said, **fault
        }  # fmt: skip

    def start(self, job: dict[str, Any]) -> int:
        """The process id of a run."""
        return int(self._ask({"start": job}))

    def wait(self, pid: int) -> tuple[int, float]:
        """A run's exit status, negative for a signal, and its CPU seconds."""
        status, cpu_s = self._ask({"wait": pid})
        return os.waitstatus_to_exitcode(status), cpu_s

    def run(self, job: dict[str, Any]) -> tuple[int, float, str]:
        """Run to the end: status, CPU seconds, and what it said."""
        status, cpu_s = self.wait(self.start(job))
        return status, cpu_s, Path(job["said"]).read_text(errors="replace")

    # --- What must hold ---------------------------------------------------------------------------

    def check_result(self, out: Path) -> None:
        """A finished run's artefacts are the undisturbed run's, and nothing else is there."""
        found = artefacts(out)
        different = sorted(
            name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name)
        )
        if different:
            raise Broken(f"{out}: other bytes than without a fault: {different}")

    def check_bills(self, out: Path, bills: list[Bill], *, asked_again: int = 0) -> int:
        """What was billed for a run against its ledger; returns how many bills were above one.

        `asked_again` is how many verdicts were lost for a reason that was told.
        """
        from prefopt.judges.prices import PRICES

        price = PRICES["claude-opus-4-6"]
        billed = Counter(self._key_of[bill.request_hash] for bill in bills)
        if set(billed) != set(self._key_of.values()):
            raise Broken(f"{out}: {len(billed)} questions billed of {len(self._key_of)}")
        with read_ledger(out) as book:
            possible = dict(
                book.execute(
                    "SELECT key, COUNT(*) FROM attempts WHERE outcome IN "
                    "('lost', 'failed', 'empty', 'truncated') GROUP BY key"
                )
            )
            spent, unknown, reserved = book.execute(
                "SELECT spent_usd, unknown_usd, reserved_usd FROM money"
            ).fetchone()
        more = {key: n - 1 - possible.get(key, 0) for key, n in billed.items()}
        beyond = sum(n for n in more.values() if n > 0)
        if beyond > asked_again:
            raise Broken(f"{out}: {beyond} finished questions were asked and billed again")
        cost = sum(
            price.cost_usd(
                input_tokens=b.input_tokens,
                output_tokens=b.output_tokens,
                cache_read_tokens=b.cache_read_input_tokens,
                cache_write_tokens=b.cache_creation_input_tokens,
            )
            for b in bills
        )
        if not asked_again and not spent - 1e-9 <= cost <= spent + unknown + 1e-9:
            raise Broken(f"{out}: billed ${cost}, the ledger says ${spent} to ${spent + unknown}")
        if abs(reserved) > 1e-9:
            raise Broken(f"{out}: ${reserved} still set aside")
        return sum(billed.values()) - len(billed)


_PASSING = (
    "rate_limited", "rate_limited_without_wait", "overloaded", "server_error", "bad_gateway",
    "unavailable", "gateway_timeout", "request_timeout", "dropped_connection",
    "processed_then_dropped", "html_200", "broken_json", "not_a_message", "broken_off",
)  # fmt: skip


@contextlib.contextmanager
def read_ledger(out: Path) -> Iterator[sqlite3.Connection]:
    """A copy of a run's ledger, so that looking at it changes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        for file in out.glob("judgements.sqlite*"):
            if file.suffix != ".alive" and not file.name.endswith("-shm"):
                shutil.copy(file, folder)
        connection = sqlite3.connect(Path(folder) / "judgements.sqlite")
        try:
            yield connection
        finally:
            connection.close()


def artefacts(out: Path) -> dict[str, str]:
    """The hash of every file of a finished run but for times and the ledger's own files."""
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file()
        and file.relative_to(out).parts[0] != "superseded"
        and not file.name.startswith("judgements.sqlite")
        and str(file.relative_to(out)) not in _NOT_COMPARED
    }


def _keys_by_request(out: Path) -> dict[str, str]:
    """The ledger's key of each question the flow asks, by what the server calls the question."""
    from prefopt.data.records import read_records
    from prefopt.judges.anthropic import AnthropicJudge
    from prefopt.judges.asking import verdict_key
    from prefopt.testing.serving import socket_client
    from prefopt.types import JudgedComparison

    judge = AnthropicJudge("claude-opus-4-6", max_usd=50.0, client=socket_client("unused.sock"))
    found = {}
    for name in ("judged.jsonl", "judged_held_out.jsonl"):
        for item in read_records(out / name, JudgedComparison):
            for shown in (item.comparison, item.comparison.swapped()):
                if shown.a.text != shown.b.text:
                    asked = request_hash(judge.request(shown).params)
                    found[asked] = verdict_key(judge.fingerprint, shown)
    return found


def finished_stages(out: Path) -> list[str]:
    """The stages that the manifest of a run says are finished."""
    try:
        return list(json.loads((out / "manifest.json").read_bytes())["stages"])
    except (OSError, ValueError, KeyError):
        return []


def stage_of(out: Path) -> str:
    """The first stage that is not finished."""
    done = finished_stages(out)
    return next((name for name in STAGES if name not in done), "finished")


# --- Faults ---------------------------------------------------------------------------------------


def call_fault(effect: str) -> Callable[[random.Random], dict[str, Any]]:
    """A fault at a random one of the next calls to the operating system that change the folder."""

    def draw(rng: random.Random) -> dict[str, Any]:
        return {"call": {"nth": int(2 ** rng.uniform(2, 7.6)), "effect": effect}}

    return draw


def _clock(rng: random.Random) -> dict[str, Any]:
    jump_s = rng.choice([-1, 1]) * 10 ** rng.uniform(0, 9)  # a second to thirty years
    return {"clock": {"nth": rng.randint(1, 400), "jump_s": jump_s}, **call_fault("kill")(rng)}


def _hostile(rng: random.Random) -> dict[str, Any]:
    # Late enough for the first answers to have come.
    return {"hostile": True, "call": {"nth": int(2 ** rng.uniform(7, 9.5)), "effect": "kill"}}


def _not_a_number(rng: random.Random) -> dict[str, Any]:
    return {"not_a_number": {"step": rng.randint(1, 6), "what": rng.choice(["loss", "gradient"])}}


DAMAGE = "damaged file"

FAULTS: dict[str, tuple[float, Callable[[random.Random], dict[str, Any]]]] = {
    "SIGKILL before a call": (12, call_fault("kill")),
    "SIGKILL after a call": (12, call_fault("kill_after")),
    "SIGKILL within a write": (12, call_fault("kill_torn")),
    "SIGKILL at a random moment": (6, lambda rng: {"kill_after_s": rng.uniform(0, 2)}),
    "SIGTERM": (10, call_fault("terminate")),
    "disk full": (12, call_fault("full")),
    "I/O error": (12, call_fault("input_output")),
    "read-only": (8, call_fault("read_only")),
    "clock jumps, then SIGKILL": (6, _clock),
    "API fails, then SIGKILL": (4, _hostile),
    "NaN in loss or gradient": (3, _not_a_number),
    "out of memory": (4, lambda rng: {"room_bytes": int(2 ** rng.uniform(16, 23))}),
    "two processes": (3, lambda rng: {"second": True}),
    DAMAGE: (3, lambda rng: {"damage": True}),
}
"""Each kind with how often it comes, and what it draws."""


def damage(out: Path, rng: random.Random) -> tuple[Path, str] | None:
    """Cut, flip, blank or delete one file of a run; which, and how."""
    files = [
        file
        for file in sorted(out.rglob("*"))
        if file.is_file()
        and file.name != ".lock"
        and file.suffix != ".alive"
        and "superseded" not in file.parts
        and not file.name.endswith(("-shm", ".tmp"))
        and file.stat().st_size
    ]
    if not files:
        return None
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    how = rng.choice(["cut", "flip", "blank", "empty", "delete"])
    at = rng.randrange(len(content))
    match how:
        case "cut":
            del content[at:]
        case "flip":
            content[at] ^= 1 << rng.randrange(8)
        case "blank":
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        case "empty":
            content.clear()
    if how == "delete":
        file.unlink()
    else:
        file.write_bytes(content)
    return file, how


class Campaign:
    """Faults on run folders of a world, one after another.

    Args:
        world: where they happen.
        seed: of everything that is drawn.
        kinds: which of `FAULTS`; None takes all.
    """

    def __init__(self, world: World, *, seed: int, kinds: list[str] | None = None) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.kinds = list(FAULTS) if kinds is None else kinds
        self.hits: list[Hit] = []
        self.cpu_s = 0.0
        self.folders = self.above_one_bill = self.undone = 0
        self.broken: list[str] = []

    @property
    def n_faults(self) -> int:
        """How many faults there were; a run that was through before its fault came is none."""
        return sum(hit.outcome != "done" for hit in self.hits)

    def run(self, n_faults: int, *, keep_going: bool = False, seconds: float = math.inf) -> None:
        """Make faults until there were `n_faults`; folder after folder, each run to its end.

        After so many `seconds` no new folder is begun.

        Raises:
            Broken: something that must hold does not.
        """
        stop_at = time.monotonic() + seconds
        while self.n_faults < n_faults and time.monotonic() < stop_at:
            self.folders += 1
            out = self.world.folder / f"run{self.folders}"
            try:
                self._folder(out, n_faults)
            except Broken as error:
                if not keep_going:
                    raise
                self.broken.append(str(error))
                print(f"BROKEN {error}", flush=True)
                continue
            shutil.rmtree(out)
            shutil.rmtree(out.with_name(out.name + ".said"), ignore_errors=True)
            print(f"{self.n_faults} faults, {self.cpu_s:.0f} CPU s", flush=True)

    def _folder(self, out: Path, n_faults: int) -> None:
        bills_before = len(read_bills(self.world.log))
        self.asked_again = 0
        hits_here = 0
        while self.n_faults < n_faults and hits_here < 60:
            kind = self.rng.choices(self.kinds, [FAULTS[k][0] for k in self.kinds])[0]
            fault = FAULTS[kind][1](self.rng)
            before = _ledger_rows(out)
            hits = self._harm(out, kind, fault)
            self.hits += hits
            hits_here += len(hits)
            if not self.asked_again:
                _nothing_gone(out, before, _ledger_rows(out))
            if hits and hits[-1].outcome == "done":
                break
        status, cpu_s, said = self.world.run(self.world.job(out))
        self.cpu_s += cpu_s
        if status != 0:
            raise Broken(f"{out}: not finished without a fault (status {status}): {said[-2000:]}")
        self.world.check_result(out)
        if DAMAGE in self.kinds:
            for _ in range(self.rng.choice([1, 2, 3])):
                if self.n_faults < n_faults:  # of what is finished
                    self.hits += self._damaged(out, DAMAGE)
                    self.world.check_result(out)
        bills = read_bills(self.world.log)[bills_before:]
        self.above_one_bill += self.world.check_bills(out, bills, asked_again=self.asked_again)

    def _harm(self, out: Path, kind: str, fault: dict[str, Any]) -> list[Hit]:
        """One fault; where nothing came of it (the flow was through before) the hit says "done"."""
        stage = stage_of(out)
        if "damage" in fault:
            return self._damaged(out, kind)
        if fault.pop("second", False):
            return self._two_processes(out, kind)
        job = self.world.job(out, **fault)
        failed_before = _failed_tries(out) if fault.get("hostile") else 0
        if fault.get("hostile"):
            job["environment"] = {"ANTHROPIC_BASE_URL": self.world.hostile_url}
        kill_after_s = fault.pop("kill_after_s", None)
        pid = self.world.start(job)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(pid, signal.SIGKILL)
        status, cpu_s = self.world.wait(pid)
        said = Path(job["said"]).read_text(errors="replace")
        self.cpu_s += cpu_s
        stage = stage_of(out) if status else "finished"
        hits = []
        if fault.get("hostile"):
            n = _failed_tries(out) - failed_before
            hits = [Hit("API fails", "judged", "asked again", 0.0)] * n
        if status == 0:
            return [*hits, Hit(kind, stage, "done", cpu_s)]
        if status == -signal.SIGKILL:
            return [*hits, Hit(kind, stage, "killed", cpu_s)]
        self._must_be_told(out, kind, fault, status, said)
        return [Hit(kind, stage, "told", cpu_s)]

    def _must_be_told(
        self, out: Path, kind: str, fault: dict[str, Any], status: int, said: str
    ) -> None:
        expected = 143 if kind == "SIGTERM" else 1
        last = said[said.rfind("prefopt:") :]
        if status != expected or "prefopt:" not in said or status == UNTOLD:
            raise Broken(f"{out}: {kind} {fault} was not told (status {status}): {said[-3000:]}")
        wanted = {
            "disk full": ("No space left on device", str(out), "free"),
            "I/O error": ("Input/output error", str(out)),
            "read-only": ("Read-only file system", str(out), "writable"),
            "NaN in loss or gradient": ("not finite", "step", "learning rate"),
            "out of memory": ("memory",),
            "SIGTERM": ("same command",),
        }.get(kind, ())
        if "judgement ledger" in last and kind in ("disk full", "I/O error", "read-only"):
            wanted = (str(out), "space", "writable")  # SQLite does not say which it was
        if "the disk is full, read-only or broken" in last and wanted:
            wanted = (str(out), "free space", "writable")  # nor does torch
        missing = [word for word in wanted if word not in last]
        if missing:
            raise Broken(f"{out}: {kind} {fault} does not tell {missing}: {said[-3000:]}")

    def _two_processes(self, out: Path, kind: str) -> list[Hit]:
        jobs = [self.world.job(out, said=str(out.with_name(f"{out.name}.said{i}"))) for i in (0, 1)]
        nth = int(2 ** self.rng.uniform(4, 8.5))
        jobs[0] |= {"call": {"nth": nth, "effect": "kill"}}
        pids = [self.world.start(job) for job in jobs]
        ends = [self.world.wait(pid) for pid in pids]
        self.cpu_s += sum(cpu_s for _, cpu_s in ends)
        hits = []
        for (status, cpu_s), job in zip(ends, jobs, strict=True):
            said = Path(job["said"]).read_text(errors="replace")
            if status == 1 and "another process" in said:
                hits.append(Hit(kind, stage_of(out), "told", cpu_s))
            elif status not in (0, -signal.SIGKILL):
                raise Broken(f"{out}: two processes, one ended with {status}: {said[-2000:]}")
        done = [s for s, _ in ends].count(0)
        return hits or ([Hit(kind, "finished", "done", 0.0)] if done else [])

    def _damaged(self, out: Path, kind: str) -> list[Hit]:
        stage = stage_of(out)
        done = damage(out, self.rng)
        if done is None:
            return []
        file, how = done
        name = f"{kind} ({how})"
        status, cpu_s, said = self.world.run(self.world.job(out))
        self.cpu_s += cpu_s
        if status == 0:
            self._count_undone(file, said)
            return [Hit(name, stage, "repaired", cpu_s), Hit(kind, "finished", "done", 0.0)]
        last = said[said.rfind("prefopt:") :]
        where = file.relative_to(out).parts[0]
        if status != 1 or where.split("-")[0].split(".")[0] not in last or "prefopt:" not in said:
            raise Broken(f"{out}: {how} {file} was not told (status {status}): {said[-3000:]}")
        again = self.world.job(out, on_change="redo")
        if "judgements.sqlite" in where:
            # The ledger is never thrown away by a command: as the message says, move it away.
            if "move it away" not in last and "on_change=redo" not in last:
                raise Broken(f"{out}: {how} {file}: no way out is told: {last}")
            self.asked_again += _CALLS
            for part in out.glob("judgements.sqlite*"):
                part.unlink()
        status, cpu_s, said = self.world.run(again)
        self.cpu_s += cpu_s
        if status != 0:
            raise Broken(f"{out}: {how} {file}: the way out fails ({status}): {said[-3000:]}")
        self._count_undone(file, said)
        return [Hit(name, stage, "told, made again", cpu_s), Hit(kind, "finished", "done", 0.0)]

    def _count_undone(self, file: Path, said: str) -> None:
        """Verdicts that the damage took from the ledger, which are asked again."""
        if file.name.startswith("judgements.sqlite"):
            self.asked_again += _CALLS
            self.undone += 1


def _failed_tries(out: Path) -> int:
    """How many requests of a run the server failed."""
    if not (out / "judgements.sqlite").exists():
        return 0
    with read_ledger(out) as book:
        known = book.execute(
            "SELECT COUNT(*) FROM sqlite_master WHERE name = 'attempts'"
        ).fetchone()
        if not known[0]:
            return 0
        outcomes = "('failed', 'empty', 'truncated')"
        sql = f"SELECT COUNT(*) FROM attempts WHERE outcome IN {outcomes}"
        return int(book.execute(sql).fetchone()[0])


def _ledger_rows(out: Path) -> tuple[set[int], set[int]]:
    """The ids of all verdicts and attempts of a run's ledger."""
    if not (out / "judgements.sqlite").exists():
        return set(), set()
    with read_ledger(out) as book:
        try:
            return (
                {row for (row,) in book.execute("SELECT id FROM verdicts")},
                {row for (row,) in book.execute("SELECT id FROM attempts")},
            )
        except sqlite3.DatabaseError:
            return set(), set()


def _nothing_gone(
    out: Path, before: tuple[set[int], set[int]], after: tuple[set[int], set[int]]
) -> None:
    for name, old, new in zip(("verdicts", "attempts"), before, after, strict=True):
        if old - new:
            raise Broken(f"{out}: {len(old - new)} {name} have gone from the ledger")


def table(hits: list[Hit]) -> str:
    """How many faults by kind and stage, and what came of them."""
    real = [hit for hit in hits if hit.outcome != "done"]
    stages = [s for s in (*STAGES, "finished") if any(hit.stage == s for hit in real)]
    outcomes = sorted({hit.outcome for hit in real})
    rows = [
        f"| fault | {' | '.join(stages)} | all | {' | '.join(outcomes)} |",
        f"|---|{'---:|' * (len(stages) + 1 + len(outcomes))}",
    ]
    for kind in [*dict.fromkeys(sorted(hit.kind for hit in real)), None]:
        mine = [hit for hit in real if kind in (None, hit.kind)]
        cells = [sum(hit.stage == s for hit in mine) for s in stages]
        ends = [sum(hit.outcome == o for hit in mine) for o in outcomes]
        rows.append(
            f"| {kind or '**all**'} | {' | '.join(str(c) for c in [*cells, len(mine), *ends])} |"
        )
    return "\n".join(rows)


class Found(NamedTuple):
    """What a campaign found: its faults, and counts over all its runs."""

    hits: list[Hit]
    runs: int
    bills: int
    bills_above_one_a_question: int
    ledgers_damaged: int
    cpu_s: float
    broken: list[str]

    @classmethod
    def together(cls, parts: list[Found]) -> Found:
        """Campaigns in worlds of their own as one."""
        return cls(*(sum(values, start=type(values[0])()) for values in zip(*parts, strict=True)))


def run_campaign(args: argparse.Namespace, worker: int) -> Found:
    """One worker's share of a campaign, in a world of its own."""
    seed = args.seed + 1000 * worker
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.work:
            work = (args.work / str(worker)).resolve()
        world = stack.enter_context(World(work, fault_share=0.3, seed=seed))
        campaign = Campaign(world, seed=seed, kinds=args.kinds)
        share = math.ceil(args.faults / args.workers)
        campaign.run(share, keep_going=args.keep_going, seconds=60 * args.minutes)
        return Found(
            hits=[hit for hit in campaign.hits if hit.outcome != "done"],
            runs=campaign.folders,
            bills=len(read_bills(world.log)),
            bills_above_one_a_question=campaign.above_one_bill,
            ledgers_damaged=campaign.undone,
            cpu_s=campaign.cpu_s,
            broken=campaign.broken,
        )


def main() -> None:
    """Run a campaign and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="that share the faults")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after that")
    parser.add_argument("--kinds", nargs="+", choices=list(FAULTS))
    parser.add_argument(
        "--keep_going", action="store_true", help="report what is broken at the end"
    )
    parser.add_argument("--out", type=Path, help="folder for faults.json and faults.md")
    parser.add_argument("--work", type=Path, help="folder to work in, kept; a temporary one if not")
    args = parser.parse_args()
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        parts = pool.map(lambda worker: run_campaign(args, worker), range(args.workers))
        found = Found.together(list(parts))
    print(table(found.hits))
    print(sentence(found))
    if found.broken:
        raise SystemExit(f"{len(found.broken)} broken: " + "\n".join(found.broken))
    if args.out:
        write_summary(found, args)


def sentence(found: Found) -> str:
    """What a campaign found, in words."""
    outcomes = Counter(hit.outcome for hit in found.hits).most_common()
    return (
        f"{len(found.hits):,} faults in {found.runs:,} runs: "
        f"{', '.join(f'{n:,} {outcome}' for outcome, n in outcomes)}. All runs ended with the bytes "
        f"of the undisturbed one. Of {found.bills:,} bills {found.bills_above_one_a_question} were "
        "above one a question, each for a request that was under way at a fault, that the API failed "
        f"after billing it, or that was in one of {found.ledgers_damaged} ledgers damaged on purpose. "
        f"{found.cpu_s:.0f} CPU seconds."
    )


def write_summary(found: Found, args: argparse.Namespace) -> None:
    """faults.json and faults.md."""
    from prefopt.evaluation.eval_report import installed_versions

    command = f"python -m tests.faults.flow_campaign --faults {args.faults} --seed {args.seed}"
    command += f" --workers {args.workers}" if args.workers > 1 else ""
    hits = Counter(f"{hit.kind} | {hit.stage} | {hit.outcome}" for hit in found.hits)
    kept = {
        "versions": installed_versions(),
        "command": command,
        "faults": len(found.hits),
        **found._asdict(),
        "hits": dict(sorted(hits.items())),
    }
    (args.out / "faults.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    text = (
        "# Faults over the whole flow\n\n"
        "Columns are the stage that was under way. What each kind is and what must hold after it: "
        f"[docs/faults.md](../../docs/faults.md).\n\n{table(found.hits)}\n\n{sentence(found)}\n\n"
        f"Printed by `{command} --out benchmarks/results`.\n"
    )
    (args.out / "faults.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
