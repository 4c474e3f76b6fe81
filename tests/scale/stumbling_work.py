"""Work that never ends on one of the machines, so that this can be killed in the middle of a shard."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.scale.shard_map import Made, Work

VICTIM = "PREFOPT_TEST_VICTIM"
"""An environment variable that the machine to be killed has."""


@dataclass(frozen=True)
class StumblingWork:
    """Does `work`; on the victim it does one shard, and says in a file that it began the second."""

    work: Work
    inside: Path

    def open(self) -> Callable[[list[Any]], Mapping[str, Made]]:
        inner = self.work.open()
        done = []

        def stumble(records: list[Any]) -> Mapping[str, Made]:
            if os.environ.get(VICTIM) and done:
                self.inside.touch()
                while True:  # until the machine is killed
                    time.sleep(0.05)
            done.append(1)
            return inner(records)

        return stumble
