"""PPO in two processes, each with its share of the prompts, trains as one process with all of them."""

import json

import pytest
import torch

from tests.training.ppo_cases import ByPrompt, logged, trained, weights
from tests.training.processes import run_cases

SETTINGS = {
    "optim": "sgd", "num_rollouts": 2, "num_mini_batches": 1, "kl_target": 1.0, "kl_horizon": 50.0,
    "micro_batch_tokens": 16,
}  # fmt: skip


def test_two_processes_are_one(tmp_path):
    two = {**SETTINGS, "per_device_train_batch_size": 3}
    run_cases("tests.training.ppo_cases", tmp_path, {"two": two})
    found = torch.load(tmp_path / "two" / "weights.pt")
    lines = json.loads((tmp_path / "two" / "logged.json").read_text())
    one = trained(tmp_path / "one", engine=ByPrompt(), per_device_train_batch_size=6, **SETTINGS)
    for a, b in zip(found, weights(one), strict=True):
        assert (a - b).norm() <= 1e-5 * max(float(b.norm()), 1e-3)
    expected = logged(one)
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            assert name == "epoch" or line[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
