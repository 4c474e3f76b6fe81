"""Judges the same pairs again and again, each time in a process forked for it, to be killed at will.

Reads one JSON job a line from stdin, forks, prints the child's process id, and after one more line
the child's exit status. Forking after the imports makes a kill cost milliseconds instead of seconds;
there are no threads here, so a fork is safe.
"""

import json
import os
import sys
import traceback

import anthropic  # noqa: F401  so that no child has to import it

from prefopt.data.preference_data import save_preferences
from prefopt.data.records import write_records
from prefopt.judges import judge_comparisons
from prefopt.judges.anthropic import AnthropicJudge
from prefopt.preferences import build_preferences
from prefopt.testing.serving import socket_client
from prefopt.types import Candidate, Comparison, Prompt, Usage

MODEL = "claude-sonnet-5-5"


def pairs(n):
    """n comparisons whose longer answer is the better one for the fake."""
    made = []
    for i in range(n):
        prompt = Prompt.from_text(f"Question {i}?")
        texts = [f"answer {i}", f"answer {i} " + "word " * (i % 7 + 2)]
        if i % 2:
            texts.reverse()
        a, b = (
            Candidate(prompt=prompt, text=text, model="m", sample_index=j)
            for j, text in enumerate(texts)
        )
        made.append(Comparison(a=a, b=b))
    return made


def judge(socket, transport):
    return AnthropicJudge(
        MODEL,
        max_usd=1000.0,
        client=socket_client(socket),
        transport=transport,
        batch_poll_s=0.01,
        reconcile_s=0.3,
    )


def plain(judged):
    """Without what a call cost, which depends on whose prompt was cached first."""
    import msgspec

    def free(verdict):
        return msgspec.structs.replace(verdict, usage=Usage())

    return [
        msgspec.structs.replace(j, forward=free(j.forward), backward=free(j.backward))
        for j in judged
    ]


def work(job):
    asked = judge(job["socket"], job["transport"])
    judged = judge_comparisons(pairs(job["n"]), asked, ledger=job["ledger"], progress=False)
    assert not [v.failure for j in judged for v in j.verdicts if v.failure]
    save_preferences(build_preferences(judged).groups, job["out"] + ".preferences.jsonl")
    write_records(job["out"], plain(judged))


def main():
    import logging

    logging.disable(logging.CRITICAL)
    while line := sys.stdin.readline():
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(job)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        print(pid, flush=True)
        sys.stdin.readline()  # until then a child that has ended keeps its number
        _, status = os.waitpid(pid, 0)
        print(status, flush=True)


if __name__ == "__main__":
    main()
