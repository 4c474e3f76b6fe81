"""A step without numbers against the same step with them: the same tensors live at the same time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

import prefopt.plan_memory
from prefopt.errors import ModelError
from prefopt.models import LoRASettings, lora_config, wrap_with_adapter
from prefopt.plan_memory import StepSettings, _fused_kinds, _LiveBytes, step_memory
from prefopt.plan_model import read_config, with_layers
from prefopt.training.tree_model import base_model
from prefopt.trees import AnswerTree, pack_trees

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA = LlamaConfig(**SHAPE, tie_word_embeddings=True)
LORA = LoRASettings(r=4)


def trees(n=2, prompt=7, answer=5):
    return [AnswerTree((1,) * prompt, ((2,) * answer, (3,) * answer))] * n


def counted_with_numbers(config, settings, passes):
    """The same count on a model that has weights."""
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    if settings.lora is not None:
        model = wrap_with_adapter(model, lora_config(settings.lora))
    elif passes != "logprobs":
        model.get_output_embeddings().requires_grad_(False)
    model.train()
    if settings.gradient_checkpointing:
        if settings.lora is not None:
            model.enable_input_require_grads()
        base_model(model).gradient_checkpointing_enable()
    batch = pack_trees(trees(), feed_last=passes == "scores")
    return prefopt.plan_memory._run(model, batch, settings, passes, _fused_kinds(config))


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (StepSettings(lora=LORA), "logprobs"),
        (StepSettings(lora=LORA, accumulates=False), "values"),
        (StepSettings(accumulates=False), "logprobs"),
        (StepSettings(), "scores"),
        (StepSettings(lora=LORA, gradient_checkpointing=True), "logprobs"),
        (StepSettings(gradient_checkpointing=True), "logprobs"),
    ],
    ids=["lora", "value", "full", "full reward", "lora checkpointing", "full checkpointing"],
)
def test_what_lives_without_numbers_is_what_lives_with_them(settings, passes):
    planned = step_memory(LLAMA, trees(), settings, passes)
    real = counted_with_numbers(LLAMA, settings, passes)
    assert planned.n_trained == real.n_trained
    assert planned.kept == real.kept
    assert planned.peak == max(real.moments.values(), key=lambda m: sum(m.values()))


def test_what_a_layer_keeps_by_hand():
    """A Llama layer with LoRA on a CPU: what each of its operations needs again."""
    tokens, width, inner, kv, r, heads = 2 * (7 + 2 * 4), 32, 48, 16, 4, 4
    one, two = (
        step_memory(with_layers(LLAMA, n), trees(), StepSettings(lora=LORA)).kept for n in (2, 3)
    )
    norms = 2 * (width + 1)  # each norm's output, which the products after it keep, and its scale
    # Rotated query and keys, values; log-sums and result, and the result in the order of tokens.
    # Answers to short prompts keep keys and values of their prompt beside their own, and a mask.
    low_rank = r * 4  # x A of the projections for query, key, value and output
    attention = sum(two[p] - one[p] for p in ("attention",)) / 4 / tokens
    assert (two["norms"] - one["norms"]) / 4 == tokens * norms
    # gate, up and their product; x A of gate, up and down.
    assert (two["MLP"] - one["MLP"]) / 4 == tokens * (3 * inner + 3 * r)
    # The residual stream after attention and after the MLP.
    assert (two["other"] - one["other"]) / 4 == tokens * 2 * width
    assert attention > 2 * width + 2 * kv + low_rank + heads


def test_weights_gradients_and_adapters_by_hand():
    found = step_memory(LLAMA, trees(), StepSettings(lora=LORA)).peak
    attention = 2 * (32 * 32) + 2 * (32 * 16)
    weights = 96 * 32 + 2 * (attention + 3 * 32 * 48 + 2 * 32) + 32
    adapter = 4 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    buffers = 2 * 8 // 2  # the inverse frequencies, and transformers' copy of them
    assert found["weights"] == 4 * (weights + buffers)
    assert found["adapter"] == found["gradients"] == 4 * adapter


@pytest.mark.slow
def test_more_layers_are_what_three_and_five_promise(monkeypatch):
    config = with_layers(LlamaConfig(**{**SHAPE, "num_hidden_layers": 7}), 7)
    for how in (StepSettings(lora=LORA), StepSettings(accumulates=False)):
        by_line = step_memory(config, trees(), how)
        with monkeypatch.context() as patch:
            patch.setattr(prefopt.plan_memory, "_DEEP", 7)
            traced = step_memory(config, trees(), how)
        assert by_line.n_trained == traced.n_trained
        assert by_line.kept == pytest.approx(traced.kept)
        assert by_line.peak_bytes == pytest.approx(traced.peak_bytes, rel=1e-3)


def peak(tokens=200, **options):
    tree = [AnswerTree((1,) * tokens, ((2,) * 40, (3,) * 40))]
    return step_memory(LLAMA, tree, StepSettings(**{"lora": LORA, **options})).peak_bytes


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(st.integers(130, 600), st.integers(1, 400))
def test_more_tokens_take_more(tokens, more):
    assert peak(tokens) < peak(tokens + more)


@pytest.mark.slow
def test_settings_that_spare_memory_do():
    usual = peak()
    assert peak(gradient_checkpointing=True) < 0.8 * usual
    assert peak(activation_offloading=True) < 0.8 * usual
    assert peak(lora=LoRASettings(r=16)) > usual
    assert peak(lora=None) > usual
    on_gpu = peak(dtype="bfloat16", on_gpu=True)
    assert peak(dtype="bfloat16", on_gpu=True, autocast=True) < on_gpu


@pytest.mark.slow
def test_long_contexts_grow_in_a_line():
    short, long = (
        step_memory(
            LLAMA, [AnswerTree((1,) * n, ((2,) * (n // 4),) * 2)], StepSettings(lora=LORA)
        ).kept["attention"]
        for n in (1000, 16000)
    )
    assert long == pytest.approx(16 * short, rel=0.01)


def test_a_gpu_keeps_no_attention_scores():
    found = [
        step_memory(
            LLAMA, [AnswerTree((1,) * n, ((2,) * n,))], StepSettings(lora=LORA, on_gpu=True)
        ).kept["attention"]
        for n in (64, 128)
    ]
    assert found[1] / found[0] == pytest.approx(255 / 127)


def test_four_bit_layers_keep_nothing_of_their_weights():
    plain = step_memory(LLAMA, trees(), StepSettings(lora=LORA, dtype="bfloat16", on_gpu=True))
    small = step_memory(
        LLAMA, trees(), StepSettings(lora=LORA, dtype="bfloat16", on_gpu=True, quantised=True)
    )
    assert small.kept["MLP"] == plain.kept["MLP"]


# PEFT says what it does about experts.
@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
def test_other_families_can_be_counted():
    config = Qwen3Config(**SHAPE, head_dim=8)
    assert step_memory(config, trees(), StepSettings(lora=LORA)).peak_bytes > 0
    experts = MixtralConfig(**SHAPE, num_local_experts=4)
    in_half = StepSettings(lora=LORA, dtype="bfloat16", on_gpu=True)
    assert step_memory(experts, trees(), in_half).kept["MLP"] > 0


def test_a_model_that_decides_by_numbers_is_named():
    config = LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM decides by numbers"):
        step_memory(config, trees(), StepSettings(lora=LORA))


def test_memory_is_counted_until_it_is_let_go():
    count = _LiveBytes()
    with count:
        a = torch.ones(100)
        view = a.view(10, 10)
        assert count.live == {"other": 400}
        del a
        assert count.live == {"other": 400}  # the view holds it
        b = view + view
        del view
        assert count.live == {"other": 400}
    assert count.fullest["forward"] == {"other": 800}
    del b


@pytest.mark.slow
def test_the_demo_model_is_counted_from_three_and_five_layers():
    config = read_config("demo")
    found = step_memory(config, trees(), StepSettings(lora=LoRASettings()))
    assert found.n_trained == 4_884_480
