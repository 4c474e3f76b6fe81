"""What a process is told by its launcher."""

import pytest

from prefopt.launched import is_first_process, refuse_processes, rows_of_each, shards


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
