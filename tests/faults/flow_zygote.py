"""The whole flow, again and again, each time in a process forked for it, to be harmed at will.

Reads one JSON command a line: {"start": job} forks and answers with the child's process id;
{"wait": pid} answers with its exit status and CPU seconds. All imports are made and the flow was run
once before the first fork, so a run costs what its own work costs.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.faults import faulty_calls

UNTOLD = 70
"""The exit status of a process that ended in an error nobody explains."""


def flow_config(job: dict[str, Any]) -> Any:
    """Small, and with every stage: candidates, paid verdicts, preferences, training, report."""
    from prefopt.flow import FlowConfig
    from prefopt.models import LoRASettings
    from prefopt.sampling.candidates import SamplingSettings
    from prefopt.training.dpo import DPOSettings

    dpo = {"learning_rate": 1e-3, "batch_size": 2, "max_length": 96, "epochs": 2}
    return FlowConfig(
        out=job["out"],
        model=job["model"],
        prompts=job["prompts"],
        held_out=2,
        judge=job.get("judge", "anthropic:claude-opus-4-6"),
        max_usd=50.0,
        transport=job.get("transport", "sync"),
        k=3,
        sampling=SamplingSettings(temperature=1.0, max_new_tokens=8, batch_size=2),
        lora=LoRASettings(r=4),
        dpo=DPOSettings(**{**dpo, **job.get("dpo", {})}),
    )


def work(job: dict[str, Any]) -> int:
    """One run of the flow under a fault; the command's exit status."""
    from prefopt.exit_status import exit_status
    from prefopt.flow import run_flow

    os.environ.update(job.get("environment", {}))
    config = flow_config(job)
    call, clock = job.get("call"), job.get("clock")
    if call or job.get("trace"):
        faulty_calls.arm(job["out"], trace=job.get("trace"), **(call or {}))
    if clock:
        faulty_calls.arm_clock(**clock)
    if "room_bytes" in job:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + job["room_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    if "not_a_number" in job:
        poison(**job["not_a_number"])
    on_change = job.get("on_change", "refuse")
    return exit_status(lambda: run_flow(config, on_change=on_change, progress=False))


def poison(step: int, what: str) -> None:
    """Make the loss or the gradient of an optimiser step, counted from 1, no number."""
    from prefopt.training.dpo_trainer import DPOTrainer

    def poisoned(name: str) -> Any:
        original = getattr(DPOTrainer, name)

        def method(self: Any, *args: Any) -> Any:
            loss = original(self, *args)
            if self.state.global_step + 1 != step:
                return loss
            if what == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss

        return method

    name = {"loss": "_pair_losses", "gradient": "_micro_batch_loss"}[what]
    setattr(DPOTrainer, name, poisoned(name))


def hurry() -> None:
    """Waits between tries take a hundredth of their time."""
    import prefopt.judges

    original = prefopt.judges.load_judge

    def load(*args: Any, **options: Any) -> Any:
        judge = original(*args, **options)
        judge.sleep = lambda seconds: asyncio.sleep(seconds / 100)
        judge.timeout_s = 5.0
        return judge

    prefopt.judges.load_judge = load


def main() -> None:
    """Serve commands until the input ends."""
    import torch

    torch.set_num_threads(1)
    hurry()
    first = json.loads(sys.stdin.readline())
    print(work(first["start"]), flush=True)  # everything is imported and warm after this
    gc.collect()
    gc.freeze()  # no child looks through, and so copies, all that is there already
    while line := sys.stdin.readline():
        command = json.loads(line)
        if "wait" in command:
            _, status, usage = os.wait4(command["wait"], 0)
            print(json.dumps([status, usage.ru_utime + usage.ru_stime]), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        status = UNTOLD
        try:
            job = command["start"]
            said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(said, 1)
            os.dup2(said, 2)
            status = work(job)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


if __name__ == "__main__":
    main()
