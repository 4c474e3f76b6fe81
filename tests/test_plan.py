"""Plans: what they are made of, what they recommend, what they refuse, and the command."""

import functools
import json
from dataclasses import replace

import msgspec
import pytest

from prefopt.cli import main
from prefopt.errors import DataError, ModelError
from prefopt.models import LoRASettings
from prefopt.plan import plan_training as plan_anew
from prefopt.plan_config import PlanConfig
from prefopt.plan_hardware import parse_devices
from prefopt.plan_model import ModelShape
from prefopt.plan_result import Plan
from prefopt.plan_time import UTILISATION, assumed_rates
from tests.tiny_models import save_tiny_model

SHAPE = ModelShape("3M", layers=1, hidden_size=128, heads=4, kv_heads=2, vocab_size=1000)
SMALL = PlanConfig(
    shape=SHAPE,
    gpus="H100-80GB",
    rows=100,
    prompt_tokens=50,
    answer_tokens=30,
    batch_size=8,
    suggest=False,
)


plan_training = functools.cache(plan_anew)  # configurations and plans never change


def parts(plan):
    return {part.name: part.n_bytes for part in plan.memory}


@pytest.fixture(scope="module")
def small():
    return plan_training(SMALL)


def test_the_parts_add_up_to_the_peak(small):
    assert sum(parts(small).values()) == pytest.approx(small.peak_bytes)
    assert small.fits
    assert small.changes == ()
    assert parts(small)["weights"] == pytest.approx(2 * small.n_parameters, rel=1e-3)
    assert parts(small)["adapters"] == 4 * small.n_trained  # float32 beside bfloat16 weights
    assert parts(small)["optimiser"] == 8 * small.n_trained


def test_the_largest_micro_batch_that_is_said_to_fit_does(small):
    memory = 2e9
    tight = replace(SMALL, gpus="2GB", rows=1000, batch_size=1000, answer_tokens=300)
    asked = replace(tight, micro_batch_tokens=1000, suggest=True)
    most = plan_training(asked).largest_micro_batch_tokens
    at = plan_training(replace(tight, micro_batch_tokens=most))
    above = plan_training(replace(tight, micro_batch_tokens=round(1.1 * most)))
    assert at.peak_bytes <= memory < above.peak_bytes
    assert small.largest_micro_batch_tokens is None


@pytest.mark.slow
def test_what_does_not_fit_comes_with_what_would_help():
    shape = replace(SHAPE, layers=3)
    asked = replace(SMALL, shape=shape, gpus="1GB", batch_size=100, tune="full", suggest=True)
    plan = plan_training(asked)
    assert not plan.fits
    changed = {change.setting: change for change in plan.changes}
    assert {"gradient_checkpointing=true", "tune=lora", "optimizer=adamw_8bit"} <= set(changed)
    for change in plan.changes:
        assert change.saves_bytes > 0
        assert change.peak_bytes + change.saves_bytes == pytest.approx(plan.peak_bytes)
        assert change.fits == (change.peak_bytes <= 1e9)
    # The promise is that of a plan with that setting.
    again = plan_training(replace(asked, suggest=False, gradient_checkpointing=True))
    assert again.peak_bytes == changed["gradient_checkpointing=true"].peak_bytes
    assert "DOES NOT FIT" in plan.to_text()


def test_strategies_share_what_they_say():
    whole = replace(SMALL, tune="full", dtype="float32", gpus="4xH100-80GB")
    ddp, fsdp2, zero2 = (
        parts(plan_training(replace(whole, strategy=s))) for s in ("ddp", "fsdp2", "zero2")
    )
    n = plan_training(whole).n_trained
    assert ddp["weights"] == pytest.approx(4 * n, rel=1e-3)
    assert fsdp2["weights"] == pytest.approx(ddp["weights"] / 4)
    assert zero2["weights"] == ddp["weights"]
    assert ddp["optimiser"] == 8 * n
    assert fsdp2["optimiser"] == zero2["optimiser"] == 2 * n
    assert ddp["exchange"] == 4 * n
    assert fsdp2["further models"] == fsdp2["weights"]  # DPO's reference


def test_methods_hold_the_models_they_need():
    def of(**options):
        return parts(plan_training(replace(SMALL, **options)))

    dpo, reward = of(), of(method="reward")
    assert "further models" not in dpo
    assert reward["adapters"] == dpo["adapters"]
    assert of(method="ppo")["adapters"] == 3 * dpo["adapters"]
    assert of(method="ppo")["optimiser"] == 2 * dpo["optimiser"]
    full = of(method="ppo", tune="full")
    assert full["further models"] == 3 * full["weights"]
    assert "further models" not in of(method="sft", tune="full")


def test_four_bits_are_counted_for_linear_layers_only():
    full, quantised = (
        parts(plan_training(replace(SMALL, lora=replace(SMALL.lora, quantization=q))))["weights"]
        for q in ("none", "nf4")
    )
    layers = 1 * (2 * 128 * 128 + 2 * 128 * 64)
    saved_of_attention = layers * (2 - 0.5625)
    assert full - quantised > saved_of_attention
    embeddings = 2 * 1000 * 128
    assert quantised > embeddings + 0.5625 * layers


def test_ppo_in_shares_gathers_the_whole_model_to_sample_from_it():
    shape = ModelShape("50M", layers=1, hidden_size=2048, heads=8, kv_heads=2, vocab_size=100)
    config = replace(SMALL, shape=shape, method="ppo", gpus="2xH100-80GB", batch_size=2)
    whole, shared = (parts(plan_training(replace(config, strategy=s))) for s in ("zero2", "fsdp2"))
    gained = shared["sampling beyond that"] - whole.get("sampling beyond that", 0)
    assert shared["weights"] == whole["weights"] / 2
    assert 0 < gained <= whole["weights"]


def test_other_optimisers_hold_less():
    def states(name):
        return parts(plan_training(replace(SMALL, optimizer=name)))["optimiser"]

    assert states("adamw_8bit") == pytest.approx(states("adamw") / 8 * (2 + 8 / 256))
    assert states("sgd") == states("paged_adamw_8bit") == 0


def test_the_longest_row_counts_where_it_is_alone():
    plan = plan_training(replace(SMALL, longest_tokens=3000, micro_batch_tokens=500))
    assert plan.fullest_micro_batch == pytest.approx(3000, rel=0.01)
    assert any("more than micro_batch_tokens=500" in remark for remark in plan.remarks)
    cut = plan_training(replace(SMALL, longest_tokens=3000, micro_batch_tokens=500, max_length=100))
    assert cut.fullest_micro_batch <= 500


def test_time_and_price_by_hand():
    plan = plan_training(replace(SMALL, usd_per_gpu_hour=3.6, utilisation=0.5, epochs=2))
    assert plan.time.is_assumed
    assert plan.time.optimizer_steps == 2 * 13  # 100 rows, 8 a step
    assert plan.time.usd == pytest.approx(plan.time.seconds * 3.6 / 3600)
    assert plan.time.tokens_fed == 2 * 100 * (50 + 2 * 29)
    two = plan_training(replace(SMALL, usd_per_gpu_hour=3.6, utilisation=0.5, gpus="2xH100"))
    one = plan_training(replace(SMALL, usd_per_gpu_hour=3.6, utilisation=0.5))
    assert two.time.seconds == pytest.approx(one.time.seconds / 2)
    assert two.time.usd == pytest.approx(one.time.usd)


@pytest.mark.parametrize("faster", [0.5, 2.0])
def test_a_gpu_at_hand_is_not_taken_to_keep_up_more_than_others_keep_up(monkeypatch, faster):
    """What a moment's measurement gives counts where it is the slower of the two."""
    vendor = plan_anew(SMALL).time
    devices = parse_devices("H100-80GB")
    here = replace(devices, here=True)
    monkeypatch.setattr("prefopt.plan.parse_devices", lambda text: here)

    def measured(*args):
        rates = assumed_rates(devices, faster * UTILISATION)
        return rates._replace(source="measured for a moment", is_assumed=False)

    monkeypatch.setattr("prefopt.plan_time.measure_rates", measured)
    found = plan_anew(SMALL).time
    assert found.is_assumed == (faster > 1)
    if faster > 1:
        assert found.seconds == vendor.seconds
        assert found.source.startswith("assumed: 42%")
        assert found.source.endswith("at the rate measured for a moment")
    else:
        assert found.seconds > 1.5 * vendor.seconds
        assert found.source == "measured for a moment"
    assert not plan_anew(replace(SMALL, utilisation=1.0)).time.is_assumed


def test_nobody_knows_how_fast_an_unknown_gpu_is():
    plan = plan_training(replace(SMALL, gpus="48GB"))
    assert plan.time is None
    assert any("no time" in remark for remark in plan.remarks)


def test_lengths_come_from_a_file(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny", context=256)
    rows = [
        {"prompt": f"What is {i}?", "chosen": " one thing" * (1 + i), "rejected": " another"}
        for i in range(8)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PlanConfig(model=folder, data=str(data), gpus="cpu-2GB", batch_size=4, suggest=False)
    plan = plan_training(config)
    assert plan.time is None
    assert plan.fullest_micro_batch > 50
    # Without a tokenizer a token is four bytes.
    by_bytes = plan_training(replace(config, shape=SHAPE))
    assert any("four bytes" in remark for remark in by_bytes.remarks)
    with pytest.raises(DataError):
        plan_training(replace(config, data=str(tmp_path / "none.jsonl")))


def test_demonstrations_are_read_for_sft(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny", context=256)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "Wie heißt du? 名前は", "completion": " Ich heiße Anna."}\n' * 3)
    plan = plan_training(
        PlanConfig(model=folder, method="sft", data=str(data), gpus="cpu-2GB", suggest=False)
    )
    assert plan.fullest_micro_batch > 10


def test_longer_than_the_model_was_made_for_is_said(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny", context=64)
    plan = plan_training(PlanConfig(model=folder, gpus="cpu-2GB", suggest=False))
    assert any("made for 64" in remark for remark in plan.remarks)


def test_all_faults_are_said_at_once():
    with pytest.raises(ValueError, match=r"rows must be.*epochs must be.*4-bit.*gpus must be like"):
        PlanConfig(
            rows=0, epochs=-1, tune="full", lora=LoRASettings(quantization="nf4"), gpus="TPU"
        )
    with pytest.raises(ValueError, match="and H100 is one"):
        PlanConfig(strategy="zero3", gpus="H100")
    with pytest.raises(ValueError, match="one answer a prompt"):
        PlanConfig(method="sft", answers=3)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ModelError, match=r"no model in folder './nowhere'"):
        plan_training(PlanConfig(model="./nowhere", gpus="H100"))


def test_max_length_must_leave_room():
    with pytest.raises(DataError, match="max_length=20"):
        plan_training(replace(SMALL, max_length=20))


@pytest.mark.slow
def test_the_command_prints_a_table_and_json(capsys):
    options = ["plan", "--shape.params", "3M", "--shape.layers", "1", "--shape.vocab_size", "1000",
               "--shape.hidden_size", "128", "--gpus", "2xA100-40GB", "--lora.r", "8"]  # fmt: skip
    assert main(options) == 0
    text = capsys.readouterr().out
    assert "at its fullest" in text
    assert "fits" in text
    assert main([*options, "--json"]) == 0
    said = capsys.readouterr().out
    found = msgspec.json.decode(said, type=Plan)
    assert found.n_devices == 2
    assert json.loads(said)["peak_bytes"] <= json.loads(said)["capacity_bytes"]


def test_the_command_refuses_in_one_line(capsys):
    assert main(["plan", "--gpus", "2xFOO"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("prefopt: plan: gpus must be like")


def test_an_adapter_of_chosen_layers_is_smaller(small):
    one = plan_anew(replace(SMALL, lora=LoRASettings(target_modules=["q_proj"])))
    assert one.n_trained < small.n_trained / 4
