"""What a process is told by its launcher."""

import pytest
import torch

from prefopt.launched import (
    is_first_process,
    refuse_processes,
    rows_of_each,
    shards,
    trains_in_bfloat16,
)


def test_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    assert is_first_process()
    assert not shards()
    assert rows_of_each(7) == 7
    refuse_processes("this", "that")


def test_among_three(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not is_first_process()
    assert shards()
    assert rows_of_each(12) == 4
    with pytest.raises(ValueError, match="such as 18"):
        rows_of_each(16)
    with pytest.raises(ValueError, match="one process, and 3 were launched"):
        refuse_processes("this", "use that")


class Weight:
    """A parameter as far as its place and kind are asked for."""

    def __init__(self, dtype, device):
        self.dtype, self.device = dtype, torch.device(device)

    def parameters(self):
        yield self


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [("bfloat16", "cuda", True), ("float32", "cuda", False), ("bfloat16", "cpu", False)],
)
def test_half_precision_on_a_gpu_follows_the_base_model(dtype, device, expected, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert trains_in_bfloat16(Weight(getattr(torch, dtype), device)) is expected


def test_half_precision_of_shares_is_the_launchers(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert trains_in_bfloat16(Weight(torch.float32, "cpu"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not trains_in_bfloat16(Weight(torch.bfloat16, "cuda"))
