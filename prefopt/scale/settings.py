"""How a job over shards is cut and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScaleSettings:
    """How a job is cut into shards, and where they are worked on.

    Only `shard_size` has a part in what comes out, and a small one: models read shards in batches, so
    another size moves roundings.

    Args:
        shard_size: prompts a shard: what a worker holds in memory, and loses when it dies.
        engine: "local" does one shard after another in this process; "ray" many at once.
        address: of a Ray cluster that is running, such as "auto"; without it Ray starts on this
            machine. All nodes must see the same folders.
        workers: shards worked on at once by Ray; without it as many as its CPUs and GPUs allow.
        cpus: Ray's CPUs a worker.
        gpus: Ray's GPUs a worker.
    """

    shard_size: int = 1000
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.shard_size < 1:
            problems.append(f"shard_size must be at least 1, got {self.shard_size}")
        if self.engine not in ("local", "ray"):
            problems.append(f"engine must be local or ray, got {self.engine!r}")
        if self.workers is not None and self.workers < 1:
            problems.append(f"workers must be at least 1, got {self.workers}")
        if not (self.cpus > 0 and self.gpus >= 0):
            problems.append(
                f"cpus must be above 0 and gpus 0 or more, got {self.cpus} and {self.gpus}"
            )
        if self.engine == "local" and (self.address is not None or self.workers is not None):
            problems.append("address and workers are for engine ray")
        if problems:
            raise ValueError("scale settings: " + "; ".join(problems) + ".")
