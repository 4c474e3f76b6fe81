"""Sharded over two processes, training is that of one: losses, weights, checkpoints, what is saved.

The processes are told what `accelerate launch` with a file of recipes/accelerate tells its own, in
float32 and on the CPU: sharding is PyTorch's and DeepSpeed's own, over gloo.
"""

import importlib.util
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefopt.training.sharding import counted_once, sharding_of
from tests.training.processes import RECIPES, run_cases

MODULE = "tests.training.distributed_cases"
SHARDED = ("fsdp2", "zero3")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs pip install 'prefopt[deepspeed]'"
)


def settings_of(method, tune, recipe):
    """Two processes of two rows each, or one of four."""
    said = {"method": method, "tune": tune}
    if recipe is None:
        return said | {"processes": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    said |= {"recipe": recipe, "per_device_train_batch_size": 2, "use_cpu": recipe == "ddp"}
    return said | {"sharded": recipe in SHARDED}


def checkpoint(folder, name):
    return folder / name / "run" / "checkpoint-2"


def all_ways(folder, method, tune, recipe):
    """One process, two, and each going on from the other's checkpoint of step 2."""
    one, two = (settings_of(method, tune, said) for said in (None, recipe))
    return {
        "one": one,
        "two": two,
        "two from one": two | {"resume": str(checkpoint(folder, "one"))},
        "one from two": one | {"resume": str(checkpoint(folder, "two"))},
        # Steps that change nothing, so that both save the same weights.
        "one, still": one | {"learning_rate": 0.0, "max_steps": 1},
        "two, still": two | {"learning_rate": 0.0, "max_steps": 1},
    }


def read(folder, name):
    logged = json.loads((folder / name / "metrics.json").read_text())
    losses = [line["loss"] for line in logged if "loss" in line]
    return torch.load(folder / name / "weights.pt"), losses


def assert_same(folder, cases):
    expected, expected_losses = read(folder, "one")
    assert len(expected_losses) == 4
    for name in cases:
        found, losses = read(folder, name)
        if "still" in name:
            continue
        assert losses == pytest.approx(expected_losses, rel=1e-5), name
        assert found.keys() == expected.keys()
        for weight, value in expected.items():
            off = (found[weight] - value).norm() / max(float(value.norm()), 1e-3)
            assert off <= 1e-5, (name, weight)


def assert_saved_once(folder, tune):
    """The same files as one process writes, and of the same weights the same bytes."""
    files = {
        name: {f.name for f in checkpoint(folder, name).iterdir() if "rng" not in f.name}
        for name in ("one", "two")
    }
    assert files["one"] == files["two"]
    weights = "adapter_model.safetensors" if tune == "lora" else "model.safetensors"
    one, two = (folder / f"{name}, still" / "saved" for name in ("one", "two"))
    assert (one / weights).read_bytes() == (two / weights).read_bytes()


def assert_one_training(folder, method, tune, recipe):
    cases = all_ways(folder, method, tune, recipe)
    run_cases(MODULE, folder, cases)
    assert_same(folder, cases)
    assert_saved_once(folder, tune)


@pytest.mark.slow
def test_dpo_in_shares_is_dpo(tmp_path):
    """An adapter in FSDP2: AdamW, clipped gradients, unlike micro-batches, a last batch of two."""
    cases = all_ways(tmp_path, "dpo", "lora", "fsdp2")
    del cases["two from one"]  # among the slow ones below
    run_cases(MODULE, tmp_path, cases)
    assert_same(tmp_path, cases)
    assert_saved_once(tmp_path, "lora")


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("method", ["dpo", "sft", "reward"])
@pytest.mark.parametrize(
    "recipe",
    ["ddp", "fsdp2", *(pytest.param(r, marks=needs_deepspeed) for r in ("zero2", "zero3"))],
)
def test_every_arrangement_is_one_process(method, tune, recipe, tmp_path):
    assert_one_training(tmp_path, method, tune, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
@pytest.mark.parametrize(
    "more",
    [
        {"precompute_ref_log_probs": True},
        {"precompute_ref_log_probs": True, "tune": "full"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_dpo_in_shares_in_further_settings(more, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    one = settings_of("dpo", "lora", None) | {"tune": more.get("tune", "lora")}
    cases = {"one": one, "two": settings_of("dpo", "lora", recipe) | more}
    run_cases(MODULE, tmp_path, cases)
    assert_same(tmp_path, cases)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
@pytest.mark.parametrize(("function", "bar"), [("train_dpo", "DPO"), ("train_reward", "reward")])
def test_the_training_function_in_two_processes(function, bar, recipe, tiny_model, tmp_path):
    """The same adapter with the same files, told and drawn once; both know the result."""
    one = {"method": function, "model": str(tiny_model), "processes": 1}
    two = {"method": function, "model": str(tiny_model), "recipe": recipe}
    run_cases(MODULE, tmp_path, {"one": one, "two": two})
    folders = [tmp_path / name / "adapter" for name in ("one", "two")]
    assert {f.name for f in folders[0].iterdir()} == {f.name for f in folders[1].iterdir()}
    assert not (tmp_path / "two" / "adapter.checkpoints").exists()
    for file in folders[0].glob("*.safetensors"):
        expected, found = (load_file(folder / file.name) for folder in folders)
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * max(float(value.norm()), 1e-3), name
    points = [(tmp_path / "two" / f"points{rank}.json").read_text() for rank in (0, 1)]
    assert points[0] == points[1]
    assert f"training ({bar})" in (tmp_path / "two" / "said0.txt").read_text()
    assert f"training ({bar})" not in (tmp_path / "two" / "said1.txt").read_text()
    if function == "train_reward":  # the level of the scores, read with the weights in shares
        (alone,) = json.loads((tmp_path / "one" / "points.json").read_text())[-1:]
        assert json.loads(points[0])[-1] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("recipe", ["ddp", "fsdp2", "zero2", "zero3"])
def test_recipes_differ_in_nothing_but_their_kind(recipe):
    """One node of eight GPUs in bfloat16; weights are whole until they are sharded."""
    said = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    assert (said["num_machines"], said["num_processes"], said["mixed_precision"]) == (1, 8, "bf16")
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert said["distributed_type"] == kinds[recipe]
    if recipe == "fsdp2":
        assert said["fsdp_config"]["fsdp_version"] == 2
    if recipe.startswith("zero"):
        config = said["deepspeed_config"]
        assert config["zero_stage"] == int(recipe[-1])
        assert not config["zero3_init_flag"]


class Plugin:
    """What accelerate says of FSDP or DeepSpeed."""

    def __init__(self, **said):
        vars(self).update(said)


def accelerator(**said):
    return Plugin(state=Plugin(**said))


@pytest.mark.parametrize(
    ("said", "gradients", "parameters"),
    [
        ({}, False, False),
        ({"fsdp_plugin": Plugin(fsdp_version=2)}, True, True),
        ({"deepspeed_plugin": Plugin(zero_stage=2, zero3_init_flag=False)}, True, False),
        ({"deepspeed_plugin": Plugin(zero_stage=3, zero3_init_flag=False)}, True, True),
    ],
)
def test_what_is_shared(said, gradients, parameters):
    assert sharding_of(accelerator(**said)) == (gradients, parameters)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"fsdp_plugin": Plugin(fsdp_version=1)}, "fsdp_version: 2"),
        (
            {"deepspeed_plugin": Plugin(zero_stage=3, zero3_init_flag=True)},
            "zero3_init_flag: false",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        sharding_of(accelerator(**said))


@pytest.mark.parametrize(("process", "kept"), [(0, [0, 1]), (1, [0]), (2, [])])
def test_rows_that_fill_up_the_last_batches_do_not_count(process, kept):
    """Nine rows on three processes of two: of the last six places three are filled."""
    state = Plugin(end_of_dataloader=True, remainder=-1)
    own = Plugin(gradient_state=state, num_processes=3, process_index=process)
    assert counted_once(own, [0, 1], 2, n_rows=9) == kept
    state.end_of_dataloader = False
    assert counted_once(own, [0, 1], 2, n_rows=9) == [0, 1]
