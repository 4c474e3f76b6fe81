"""The plan beside what was measured on a GPU."""

import copy

import pytest

from benchmarks import gpu, quality_plan_gpu
from prefopt.plan_time import UTILISATION

H200 = {"device": "NVIDIA H200"}


def speed_entry():
    rows = gpu.draw_rows("hh", 3 * 6, shorter=8)[2 * 6 :]
    return {
        "environment": H200, "shape": "tiny", "lengths": "hh", "checkpointing": "off",
        "pairs_a_step": 6, "tokens": gpu.tokens_of(rows), "prefopt": {"size": 512, "seconds": 2.0},
    }  # fmt: skip


@pytest.fixture
def results(monkeypatch):
    plans = {"tiny": gpu.Plan(6, (3,), (512,), 1, 2, 1, shorter=8)}
    monkeypatch.setattr(gpu, "PLANS", plans)
    case = {"tokens": 500, "seconds": 4.0, "measured_s": 5.0}
    return {
        "speed": {"tiny/hh/checkpointing off": speed_entry()},
        "plan": {"tiny/checkpointing off": {"environment": H200, "cases": [case]}},
    }


def test_the_longer_of_both_times_counts(results):
    drawn, planned = quality_plan_gpu.measured(results)
    assert drawn.error == pytest.approx(drawn.planned_s / 2.0 - 1)
    assert 0 < planned.assumed_s < 1
    assert planned.error == pytest.approx(4.0 / 5.0 - 1)
    text = quality_plan_gpu.markdown([drawn, planned])
    assert "| tiny, one length | 500 | 4.00 | 5.00 | -20% | -20% |" in text
    assert f"{UTILISATION:.0%} of the vendor's figure" in text
    assert "**Missed**" in text
    assert "Met" in quality_plan_gpu.markdown([planned._replace(moment_s=5.0)])


def test_other_devices_and_other_rows_are_not_held_against_it(results):
    elsewhere = copy.deepcopy(results)
    for section in elsewhere.values():
        for entry in section.values():
            entry["environment"] = {"device": "NVIDIA A10"}
    assert not list(quality_plan_gpu.measured(elsewhere))
    results["speed"]["tiny/hh/checkpointing off"]["tokens"]["prefopt_fed"] += 1
    with pytest.raises(SystemExit, match="other rows were measured"):
        list(quality_plan_gpu.measured(results))
