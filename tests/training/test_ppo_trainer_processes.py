"""PPO in two processes, each with its share of the prompts, trains as one process with all of them.

`ppo_cases` is what they run.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.training.ppo_cases import ByPrompt, logged, trained, weights
from tests.training.test_dpo_trainer_processes import free_port

SETTINGS = {
    "optim": "sgd", "num_rollouts": 2, "num_mini_batches": 1, "kl_target": 1.0, "kl_horizon": 50.0,
    "micro_batch_tokens": 16,
}  # fmt: skip


def in_two_processes(folder, settings):
    """Train there; returns the first process's weights and log."""
    environment = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-W", "ignore", "-m", "tests.training.ppo_cases", str(folder),
        json.dumps(settings),
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # both of them
    assert process.returncode == 0, said
    return torch.load(folder / "weights.pt"), json.loads((folder / "logged.json").read_text())


def test_two_processes_are_one(tmp_path):
    found, lines = in_two_processes(tmp_path, {**SETTINGS, "per_device_train_batch_size": 3})
    one = trained(tmp_path / "one", engine=ByPrompt(), per_device_train_batch_size=6, **SETTINGS)
    for a, b in zip(found, weights(one), strict=True):
        assert (a - b).norm() <= 1e-5 * max(float(b.norm()), 1e-3)
    expected = logged(one)
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            assert name == "epoch" or line[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
