"""Work that dies in the middle of a shard: its process at once, or the machine that it waits on."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.scale.shard_map import Made, Work

VICTIM = "PREFOPT_TEST_VICTIM"
"""An environment variable that a machine which is to be killed has."""


@dataclass(frozen=True)
class StumblingWork:
    """Does `work`, but for the second shard of one process.

    On a machine that is a victim this makes the file `inside` and waits to be killed. Otherwise the
    first process that finds no such file makes it and kills itself.
    """

    work: Work
    inside: Path
    by_machine: bool

    def open(self) -> Callable[[list[Any]], Mapping[str, Made]]:
        inner = self.work.open()
        done = []

        def stumble(records: list[Any]) -> Mapping[str, Made]:
            if done and self.by_machine and os.environ.get(VICTIM):
                self.inside.touch()
                while True:
                    time.sleep(0.05)
            while done and self.by_machine and not self.inside.exists():
                time.sleep(0.05)  # the others leave it its second shard
            if done and not self.by_machine and not self.inside.exists():
                self.inside.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(1)
            return inner(records)

        return stumble
