"""A model's configuration and its counts, against what is published and what a real model has."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
)

from prefopt.errors import ModelError
from prefopt.plan_model import ModelShape, count_model, layer_of, read_config, with_layers
from tests.tiny_models import save_tiny_model

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
PUBLISHED = {  # parameters as the model cards' safetensors have them
    "llama 3 8B": (LLAMA_8B, 8_030_261_248),
    "gpt2": (GPT2Config(), 124_439_808),
    "qwen3 0.6B": (
        Qwen3Config(
            hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
        ),
        596_049_920,
    ),
    "mistral 7B": (
        MistralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False,
        ),
        7_241_732_096,
    ),
    "gemma 2 2B": (
        Gemma2Config(
            hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, vocab_size=256000,
        ),
        2_614_341_888,
    ),
    "phi 3 mini": (
        Phi3Config(
            hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, vocab_size=32064, tie_word_embeddings=False,
        ),
        3_821_079_552,
    ),
    "mixtral 8x7B": (
        MixtralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2,
            tie_word_embeddings=False,
        ),
        46_702_792_704,
    ),
}  # fmt: skip

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
SMALL_CONFIGS = [
    LlamaConfig(**SMALL, tie_word_embeddings=False),
    Qwen3Config(**SMALL, head_dim=8),
    Gemma2Config(**SMALL, head_dim=8),
    MistralConfig(**SMALL),
    Phi3Config(**SMALL),
    Olmo2Config(**SMALL),
    MixtralConfig(**SMALL, num_local_experts=4),
    GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name):
    config, expected = PUBLISHED[name]
    assert count_model(config).n_parameters == expected


@pytest.mark.parametrize("config", SMALL_CONFIGS, ids=lambda c: c.model_type)
def test_counts_are_those_of_a_model_with_weights(config):
    facts, model = count_model(config), AutoModelForCausalLM.from_config(config)
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert facts.n_parameters == sum(p.numel() for p in model.parameters())
    assert facts.n_input == inputs.numel()
    assert facts.n_head == (0 if head is inputs else head.numel())
    assert facts.n_layers == 3
    assert (facts.n_heads, facts.head_dim) == (4, 8)
    in_layers = [p for n, p in model.named_parameters() if layer_of(n) is not None]
    assert facts.n_linear == sum(p.numel() for p in in_layers if p.dim() == 2)


def test_a_token_visits_two_experts_of_four():
    few, all_of_them = (
        count_model(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=n))
        for n in (2, 4)
    )
    experts = 3 * 4 * (3 * 32 * 48)  # layers, experts, three matrices each
    assert all_of_them.n_matrices - few.n_matrices == experts / 2
    assert all_of_them.n_matrices == few.n_linear + experts


def test_fewer_layers_have_as_many_entries_in_what_is_said_layer_by_layer():
    config = Gemma2Config(**{**SMALL, "num_hidden_layers": 6})
    shorter = with_layers(config, 3)
    assert len(shorter.layer_types) == shorter.num_hidden_layers == 3
    assert len(config.layer_types) == 6
    assert count_model(shorter).n_layers == 3


@pytest.mark.parametrize("params", ["135M", "1.5B", "8B", "13b", "70B"])
def test_a_shape_has_about_as_many_parameters_as_it_says(params):
    wanted = float(params[:-1]) * {"M": 1e6, "B": 1e9}[params[-1].upper()]
    assert count_model(read_config(ModelShape(params))).n_parameters == pytest.approx(
        wanted, rel=0.02
    )


def test_a_shape_takes_what_is_said_of_it():
    config = read_config(
        ModelShape("1B", layers=10, hidden_size=1024, heads=8, kv_heads=2, vocab_size=1000)
    )
    facts = count_model(config)
    assert (facts.n_layers, facts.hidden_size, facts.n_heads, facts.n_kv_heads) == (10, 1024, 8, 2)
    assert facts.vocab_size == 1000
    assert facts.n_parameters == pytest.approx(1e9, rel=0.02)


def test_all_faults_of_a_shape_are_said_at_once():
    with pytest.raises(ValueError, match=r"8 billion.*layers must be at least 1.*heads"):
        ModelShape("8 billion", layers=0, heads=-1)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (ModelShape("8B", hidden_size=100, heads=7), "7 heads must divide the hidden size 100"),
        (ModelShape("10M", layers=30, hidden_size=4096), "too few for 30 layers"),
    ],
)
def test_a_shape_that_no_model_has_is_refused(shape, said):
    with pytest.raises(ModelError, match=said):
        read_config(shape)


def test_of_a_folder_only_the_configuration_is_read(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny")
    for file in (tmp_path / "tiny").glob("*.safetensors"):
        file.unlink()
    facts = count_model(read_config(folder))
    assert (facts.family, facts.n_layers, facts.max_positions) == ("llama", 2, 256)
    assert facts.n_head == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "cannot read the configuration"), ('{"model_type": "nothing"}', "cannot read")],
)
def test_a_broken_configuration_is_named(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        read_config(str(tmp_path))


def test_what_is_no_language_model_is_refused():
    from transformers import ViTConfig

    with pytest.raises(ModelError, match="no causal language model"):
        count_model(ViTConfig())


def test_counting_takes_no_memory():
    config = PUBLISHED["mixtral 8x7B"][0]
    assert count_model(config).n_parameters * torch.float32.itemsize > 180e9
