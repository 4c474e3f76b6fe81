"""What a process knows of its launcher (`accelerate launch`, torchrun) before anything is set up."""

from __future__ import annotations

import os
from typing import Any


def n_processes() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the one that writes files and tells people."""
    return os.environ.get("RANK", "0") == "0"


def shards() -> bool:
    """Whether the launcher asked for FSDP or DeepSpeed, which place a model's weights themselves."""
    return any(
        os.environ.get(name, "false").lower() == "true"
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    )


def trains_in_bfloat16(model: Any) -> bool:
    """Whether training multiplies in bfloat16, under autocast.

    It does where the launcher says so of shares, and on a GPU whose base weights are bfloat16. There
    the adapter's float32 weights would otherwise pull the activations that are kept for the backward
    pass up to float32, twice the memory.
    """
    if shards():
        return os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    weight = next(model.parameters())
    return str(weight.dtype) == "torch.bfloat16" and weight.device.type == "cuda"


def rows_of_each(batch_size: int) -> int:
    """A process's share of the rows of an optimiser step, so that the step is what it is alone.

    Raises:
        ValueError: the processes cannot share them evenly.
    """
    n = n_processes()
    if batch_size % n:
        raise ValueError(
            f"{n} processes cannot share a step of batch_size={batch_size} evenly. Give a multiple of "
            f"{n}, such as {-(-batch_size // n) * n}, or launch another number of processes."
        )
    return batch_size // n


def refuse_processes(what: str, instead: str) -> None:
    """Raise ValueError where several processes were launched for what one does."""
    if n_processes() > 1:
        raise ValueError(
            f"{what} runs in one process, and {n_processes()} were launched. Start it without a "
            f"launcher, or {instead}."
        )
