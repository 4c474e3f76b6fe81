"""Operations by hand, and speeds that are assumed or measured."""

import pytest
from transformers import LlamaConfig

from prefopt.models import LoRASettings
from prefopt.plan_hardware import KNOWN_GPUS, parse_devices
from prefopt.plan_memory import StepSettings
from prefopt.plan_model import count_model
from prefopt.plan_time import (
    Operations,
    Work,
    adapter_size,
    assumed_rates,
    measure_rates,
    scoring_operations,
    seconds,
    training_operations,
    work_of,
)
from prefopt.trees import AnswerTree

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip
FACTS = count_model(CONFIG)
MATRICES = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)


def test_rows_are_counted_as_tree_batches_feed_them():
    # A prompt of 3 with answers of 2 and 1: fed are the prompt and the first token of the first
    # answer, which attends to the prompt and itself.
    assert work_of([(3, (2, 1))]) == Work(rows=1, fed=4, scored=3, pairs=6 + 4)
    assert work_of([(3, (2, 1))] * 2) == work_of([(3, (2, 1))]).times(2)


def test_operations_of_an_adapter_by_hand():
    work, n = Work(rows=1, fed=10, scored=5, pairs=50), 100
    done = training_operations(FACTS, work, StepSettings(lora=LoRASettings()), n, "logprobs")
    dense, low, attention = 2 * MATRICES * 10, 2 * n * 10, 4 * 4 * 8 * 50 * 2
    assert done.layers == 2 * dense + 3 * low + 3.5 * attention
    assert done.head == 2 * (2 * 32 * 96 * 5)
    again = StepSettings(lora=LoRASettings(), gradient_checkpointing=True)
    more = training_operations(FACTS, work, again, n, "logprobs")
    assert more.layers - done.layers == dense + low + attention


def test_operations_of_all_weights_and_of_scoring_by_hand():
    work = Work(rows=1, fed=10, scored=5, pairs=50)
    dense, attention, head = 2 * MATRICES * 10, 4 * 4 * 8 * 50 * 2, 2 * 32 * 96 * 5
    done = training_operations(FACTS, work, StepSettings(), 0, "logprobs")
    assert done == Operations(3 * dense + 3.5 * attention, 4 * head)
    assert training_operations(FACTS, work, StepSettings(), 0, "scores").head == 0
    assert scoring_operations(FACTS, work) == Operations(dense + attention, head)


def test_the_adapter_is_counted_on_the_whole_model():
    expected = 4 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert adapter_size(CONFIG, StepSettings(lora=LoRASettings(r=4))) == expected
    assert adapter_size(CONFIG, StepSettings()) == 0


def test_an_assumed_speed_is_a_share_of_the_vendors_and_says_so():
    rates = assumed_rates(parse_devices("8xH100-80GB"), 0.5)
    assert rates.training == rates.scoring == Operations(0.5 * 989e12, 0.5 * 989e12)
    assert rates.is_assumed
    assert "assumed: 50% of the 989 TFLOP/s" in rates.source
    assert assumed_rates(parse_devices("4x48GB")) is None


def test_seconds_are_operations_by_rate():
    assert seconds(Operations(6.0, 8.0), Operations(2.0, 4.0)) == 5.0
    assert seconds(Operations(6.0, 0.0), Operations(2.0, float("inf"))) == 3.0


def test_a_speed_is_measured_on_a_few_layers():
    trees = [AnswerTree((1,) * 8, ((2,) * 6, (3,) * 6))]
    settings = StepSettings(lora=LoRASettings(r=4))
    rates = measure_rates(CONFIG, FACTS, trees, settings, "logprobs", repeats=1)
    assert not rates.is_assumed
    assert "measured on this machine with 1 and 2 layers" in rates.source
    assert rates.optimizer > 0
    assert min(*rates.training, *rates.scoring) > 0


def test_a_clock_of_layers_and_head_is_taken_apart(monkeypatch):
    """A step that takes 5 ms a layer and 3 ms beside them is found to."""
    import prefopt.plan_time

    def took(steps, repeats, clock):
        of = {"training": (0.005, 0.003), "scoring": (0.002, 0.001), "optimizer": (0, 0.01)}
        return {key: of[key[0]][0] * key[1] + of[key[0]][1] for key in steps}

    monkeypatch.setattr(prefopt.plan_time, "_turn_about", took)
    trees, settings = [AnswerTree((1,) * 8, ((2,) * 6,))], StepSettings(lora=LoRASettings(r=4))
    rates = measure_rates(CONFIG, FACTS, trees, settings, "logprobs")
    done = training_operations(
        FACTS, work_of([(8, (6,))]), settings, adapter_size(CONFIG, settings), "logprobs"
    )
    assert done.layers / rates.training.layers == pytest.approx(2 * 0.005)
    assert done.head / rates.training.head == pytest.approx(0.003)
    assert rates.optimizer == pytest.approx(2**22 / 0.01)


@pytest.mark.parametrize(
    ("text", "name", "count", "gb"),
    [
        ("8xH100-80GB", "H100-80GB", 8, 80),
        ("h200", "H200-141GB", 1, 141),
        ("2 x A100-40GB", "A100-40GB", 2, 40),
        ("4×48GB", "a GPU of 48 GB", 4, 48),
        ("cpu-64GB", "CPU, 64 GB", 1, 64),
    ],
)
def test_devices_are_read(text, name, count, gb):
    found = parse_devices(text)
    assert (found.name, found.count, found.memory_bytes) == (name, count, gb * 1e9)
    assert found.is_gpu == (not text.startswith("cpu"))
    assert not found.here


def test_this_machine_has_memory():
    here = parse_devices("cpu")
    assert here.here
    assert not here.is_gpu
    assert here.memory_bytes > 1e8


@pytest.mark.parametrize(
    "text", ["", "8x", "0xH100", "TPU", "H100-80", "xH100", "-1xH100", "8xß", "0GB"]
)
def test_what_is_no_device_is_refused_with_those_that_are_known(text):
    with pytest.raises(ValueError, match="Known by name: B200-180GB"):
        parse_devices(text)


def test_known_gpus_have_sizes_in_their_names():
    for name, gpu in KNOWN_GPUS.items():
        assert name.endswith(f"-{gpu.memory_gb:g}GB")
        assert gpu.tflops > 50
        assert gpu.gb_per_s > 250
