"""PPO in two processes, each with its share of the prompts, trains as one process with all of them.

In shares too, started with the very files of recipes/accelerate (see `processes`).
"""

import importlib.util
import json

import pytest
import torch

from tests.training.processes import run_cases

MODULE = "tests.training.ppo_cases"
SETTINGS = {
    "num_rollouts": 3, "num_mini_batches": 1, "kl_target": 1.0, "kl_horizon": 50.0,
    "micro_batch_tokens": 16, "learning_rate": 0.01, "lr_scheduler_type": "linear",
    "optim": "adamw_torch", "max_grad_norm": 0.5, "value_max_grad_norm": 0.1,
    "value_learning_rate": 0.02, "weight_decay": 0.1, "cliprange_value": None,
    "save_strategy": "steps", "save_steps": 2,
    # Steps of Adam divide by the gradient's size: of one near 0 they would show the rounding.
    "adam_epsilon": 1e-3,
}  # fmt: skip
SHARDED = ("fsdp2", "zero3")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs pip install 'prefopt[deepspeed]'"
)


def settings_of(tune, recipe, **more):
    """Two processes with three prompts each, or one with six."""
    said = SETTINGS | {"tune": tune} | more
    if recipe is None:
        return said | {"processes": 1, "per_device_train_batch_size": 6}
    said |= {"recipe": recipe, "per_device_train_batch_size": 3, "use_cpu": recipe == "ddp"}
    return said | {"sharded": recipe in SHARDED}


def read(folder, name):
    weights = torch.load(folder / name / "weights.pt")
    lines = json.loads((folder / name / "logged.json").read_text())
    return weights, lines, json.loads((folder / name / "sampled.json").read_text())


def assert_same(folder, name, other="one"):
    """The same weights, whatever was logged, and the same answers by the policy in the end."""
    (found, lines, sampled), (expected, others, answers) = read(folder, name), read(folder, other)
    assert found.keys() == expected.keys()
    for weight, value in expected.items():
        off = (found[weight] - value).norm() / max(float(value.norm()), 1e-3)
        assert off <= 1e-5, (name, weight, off)
    assert len(lines) == len(others)
    for line, same in zip(lines, others, strict=True):
        assert line.keys() == same.keys()
        for key, value in same.items():
            if key not in ("epoch", "train_loss"):  # the mean since it was resumed
                assert line[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert sampled[0] == answers[0]
    assert sampled[1] == pytest.approx(answers[1], rel=1e-4)


def assert_saved_once(folder, tune):
    """The same files as one process writes, and of the same weights the same bytes."""
    for place in ("run/checkpoint-2", "run/checkpoint-2/value", "saved", "saved/value"):
        files = [
            {f.name for f in (folder / name / place).iterdir() if "rng" not in f.name}
            for name in ("one", "two")
        ]
        assert files[0] == files[1]
    weights = "adapter_model.safetensors" if tune == "lora" else "model.safetensors"
    one, two = (folder / f"{name}, still" / "saved" for name in ("one", "two"))
    for file in (weights, f"value/{weights}", "value/heads.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    run_cases(
        MODULE,
        tmp_path,
        {"one": settings_of("full", None), "two": settings_of("full", "ddp")},
    )
    assert_same(tmp_path, "two")


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(
    "recipe",
    ["ddp", "fsdp2", *(pytest.param(r, marks=needs_deepspeed) for r in ("zero2", "zero3"))],
)
def test_every_arrangement_is_one_process(tune, recipe, tmp_path):
    """Each goes on from the other's checkpoint, too."""
    one, two = settings_of(tune, None), settings_of(tune, recipe)
    # Steps of nothing, so that both save the same weights.
    still = {"learning_rate": 1e-300, "value_learning_rate": 1e-300, "weight_decay": 0.0}
    checkpoints = {n: str(tmp_path / n / "run" / "checkpoint-2") for n in ("one", "two")}
    cases = {
        "one": one,
        "two": two,
        "two from one": two | {"resume": checkpoints["one"]},
        "one from two": one | {"resume": checkpoints["two"]},
        "one, still": one | still | {"num_rollouts": 1},
        "two, still": two | still | {"num_rollouts": 1},
    }
    run_cases(MODULE, tmp_path, cases, timeout=600)
    for name in ("two", "two from one", "one from two"):
        assert_same(tmp_path, name)
    assert_saved_once(tmp_path, tune)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["fsdp2", *(pytest.param(r, marks=needs_deepspeed) for r in ("zero2", "zero3"))]
)
def test_in_the_recipes_own_bfloat16(recipe, tmp_path):
    """Adapters, whose whole copy multiplies in bfloat16 too: near to one process in float32."""
    short = {"num_rollouts": 1, "save_strategy": "no"}
    cases = {
        "one": settings_of("lora", None, **short),
        "two": settings_of("lora", recipe, mixed_precision="bf16", **short),
    }
    run_cases(MODULE, tmp_path, cases)
    (_, lines, _), (_, others, _) = read(tmp_path, "two"), read(tmp_path, "one")
    assert lines[0]["policy/ratio"] == pytest.approx(1.0, abs=0.01)
    for name in ("objective/scores", "objective/entropy", "loss/value", "grad_norm", "replay/nll"):
        assert lines[0][name] == pytest.approx(others[0][name], rel=0.05, abs=0.01), name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_the_training_function_in_two_processes(recipe, tiny_model, tmp_path):
    """The same files as in one, told and drawn once; both know the result."""
    one = {"model": str(tiny_model), "processes": 1}
    two = {"model": str(tiny_model), "recipe": recipe}
    run_cases(MODULE, tmp_path, {"one": one, "two": two})
    for place in ("adapter", "adapter/value"):
        one, two = ({f.name for f in (tmp_path / n / place).iterdir()} for n in ("one", "two"))
        assert one == two
    assert not (tmp_path / "two" / "adapter.checkpoints").exists()
    points = [(tmp_path / "two" / f"points{rank}.json").read_text() for rank in (0, 1)]
    assert points[0] == points[1]
    assert len(json.loads(points[0])) == 2
    assert "training (PPO)" in (tmp_path / "two" / "said0.txt").read_text()
    assert "training (PPO)" not in (tmp_path / "two" / "said1.txt").read_text()
