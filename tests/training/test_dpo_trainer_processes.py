"""Two processes that add up their gradients give what one process gives."""

import json

import pytest
import torch

from tests.training.dpo_cases import metrics, pair_rows, trained, weights
from tests.training.processes import run_cases

ROWS = pair_rows(14)


def assert_same_training(folder, settings):
    """Two processes against one with the rows of both."""
    settings = {"train_sampling_strategy": "sequential", "max_steps": 3, **settings}
    two = {"per_device_train_batch_size": 2, **settings}
    run_cases("tests.training.dpo_cases", folder, {"two": two})
    found = torch.load(folder / "two" / "weights.pt")
    logged = json.loads((folder / "two" / "metrics.json").read_text())
    alone = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    one = trained(folder / "one", ROWS, **{**settings, **alone})
    expected = weights(one)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * max(value.norm(), 1e-3), name
    assert len(logged) == len(metrics(one))
    for own, other in zip(logged, metrics(one), strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            same = own[name] == pytest.approx(value, rel=1e-4, abs=1e-5)
            assert same or name == "epoch", name  # which counts batches


@pytest.mark.slow
def test_general_rows_are_shared_out_over_two_processes(tmp_path):
    """Three rows a step, which two processes cannot share evenly; and one, which only one has."""
    rows = [f"The sky over {i} towns is blue{' and green' * i}." for i in range(5)]
    for share in (0.43, 0.2):
        settings = {"replay_dataset": rows, "replay_share": share, "micro_batch_tokens": 20}
        assert_same_training(tmp_path / str(share), settings)


def test_two_processes_are_one(tmp_path):
    """Token means, accumulation, and unlike numbers of micro-batches, in some calls none."""
    settings = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "micro_batch_tokens": 20,
        "loss_type": ["sigmoid", "sft"],
    }
    assert_same_training(tmp_path, settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_tokens": 12},
        {"micro_batch_tokens": 20, "precompute_ref_log_probs": True},
        {"use_weighting": True, "ld_alpha": 0.5},
    ],
    ids=str,
)
def test_two_processes_are_one_in_further_settings(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    assert_same_training(tmp_path, settings)
