"""Run the fake Anthropic API as a process of its own, on a socket of this machine.

    python -m prefopt.testing.serve --unix fake.sock --log bills.jsonl --answer longer
    python -m prefopt.testing.serve --port 8080 --latency_s 0.2 --fault_share 0.3 --seed 7

Once it listens it prints one line, "listening on ...", and it runs until it gets SIGTERM or SIGINT.
It answers judges' requests by a rule and knows no other requests.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Sequence

from prefopt.testing.answers import ANSWERS
from prefopt.testing.fake_anthropic import FakeAnthropic
from prefopt.testing.faults import FAULT_KINDS, random_faults
from prefopt.testing.serving import serve


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prefopt.testing.serve",
        description="A fake Anthropic API for tests: nothing leaves this machine, nothing costs.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--unix", metavar="PATH", help="listen on a Unix socket")
    where.add_argument("--port", type=int, help="listen on 127.0.0.1; 0 takes any free port")
    rules = "; ".join(f"{k}: {(v.__doc__ or '').splitlines()[0]}" for k, v in ANSWERS.items())
    parser.add_argument("--answer", choices=list(ANSWERS), default="longer", help=rules)
    parser.add_argument("--log", metavar="FILE", help="append a line for every billed answer")
    parser.add_argument("--latency_s", type=float, default=0.0, help="how long an answer takes")
    parser.add_argument("--seed", type=int, default=0, help="of batch results' order and of faults")
    parser.add_argument("--fault_share", type=float, default=0.0, help="share of failing requests")
    parser.add_argument(
        "--fault_kinds",
        nargs="+",
        choices=list(FAULT_KINDS),
        metavar="KIND",
        help="default: all that a run survives and no client has to wait out. Any of "
        + ", ".join(FAULT_KINDS),
    )
    parser.add_argument("--batch_polls", type=int, default=2, help="a batch ends at this retrieval")
    parser.add_argument("--batch_time_s", type=float, help="or this long after it was made")
    parser.add_argument("--requests_per_minute", type=float, help="429 beyond that")
    return parser


def fake_from_arguments(arguments: Sequence[str] | None = None) -> tuple[FakeAnthropic, str, int]:
    """The fake of a command line, the path of its Unix socket or "", and its port otherwise."""
    args = _parser().parse_args(arguments)
    fake = FakeAnthropic(
        ANSWERS[args.answer],
        seed=args.seed,
        latency_s=args.latency_s,
        batch_polls=args.batch_polls,
        batch_time_s=args.batch_time_s,
        requests_per_minute=args.requests_per_minute,
        log=args.log,
        keep=False,
    )
    kinds = args.fault_kinds or [
        name for name, kind in FAULT_KINDS.items() if kind.effect != "run" and not kind.hangs
    ]
    fake.faults = random_faults(args.fault_share, seed=args.seed, kinds=kinds)
    return fake, args.unix or "", args.port or 0


async def _run(fake: FakeAnthropic, unix_path: str, port: int) -> None:
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    address = {"unix_path": unix_path} if unix_path else {"port": port}
    async with serve(fake.respond, **address) as base_url:
        print(f"listening on {unix_path or base_url}", flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(_run(*fake_from_arguments()))
