"""Families of models, tiny and random: from preferences to an adapter, its merge, and PPO.

That their answers are scored as their own logits say is tested in tests/training/test_tree_model.py,
whose models these are, and that they generate what `generate` does in tests/sampling/test_decoding.py.
"""

import copy
import logging
import math

import pytest
import torch
from peft import LoraConfig

from prefopt.chat import end_token_ids, tokenize_prompt
from prefopt.errors import ModelError
from prefopt.models import LoRASettings, load_model, merge_adapter
from prefopt.sampling.candidates import SamplingSettings, sample_candidates
from prefopt.training.dpo import DPOSettings, train_dpo
from prefopt.training.policy_setup import disable_dropout
from prefopt.training.ppo import PPOSettings, train_ppo
from prefopt.training.reward import RewardSettings, train_reward
from prefopt.training.tree_model import choose_scoring
from prefopt.types import Candidate, Preference, PreferenceGroup, Prompt
from tests.tiny_models import tiny_tokenizer
from tests.training import dpo_cases, ppo_cases
from tests.training.test_tree_model import COMMON, FAMILIES, OTHER, assert_right, family

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MORE = {
    "Qwen2Moe": ("Qwen2MoeConfig", {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3Moe": ("Qwen3MoeConfig", {**COMMON, **EXPERTS, "head_dim": 8}),
    "Olmo": ("OlmoConfig", COMMON),
    "Olmo3": ("Olmo3Config", {**COMMON, "sliding_window": 32}),
    "Olmoe": ("OlmoeConfig", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2}),
    "StableLm": ("StableLmConfig", COMMON),
    "Glm4": ("Glm4Config", {**COMMON, "head_dim": 8}),
    "GPTJ": (
        "GPTJConfig",
        {**OTHER, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
    ),
    "DeepseekV3": (
        "DeepseekV3Config",
        {**COMMON, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "q_lora_rank": 16,
         "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
         "first_k_dense_replace": 1},
    ),
    "Falcon": (
        "FalconConfig",
        {**OTHER, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "Falcon, ALiBi": (
        "FalconConfig",
        {**OTHER, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "alibi": True},
    ),
    "Llama4": (
        "Llama4TextConfig",
        {**COMMON, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8},
    ),
    "MPT": ("MptConfig", {**OTHER, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
}  # fmt: skip
EVERY = {**FAMILIES, **MORE}
OWN = "attention of its own"
WITHOUT_TREES = {"Falcon": OWN, "Falcon, ALiBi": OWN, "GPTJ": OWN, "StableLm": OWN,
                 "MPT": "takes no position_ids"}  # fmt: skip
MIXTURES = {"Mixtral", "GptOss", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV3", "Llama4"}
# PEFT refuses Mamba's, and its wrapper of Llama 4's router breaks it: their layers have to be named.
WITHOUT_ALL_LINEAR = {"Mamba": ["in_proj", "x_proj"], "Llama4": ["q_proj", "v_proj"]}
# Those that differ most from each other; the others are among the slow tests.
FAST = ("Qwen3", "GPT2", "Mixtral")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

pytestmark = [
    # PEFT says what it does about GPT-2's transposed weights, and about experts.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]


def in_tiers(names):
    return [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow, id=name)
        for name in names
    ]


@pytest.mark.parametrize("name", in_tiers(EVERY))
def test_dpo_starts_at_ln_2_and_ppo_at_a_ratio_of_1(name, tmp_path):
    """By the trainers, with LoRA on the layers that "all-linear" finds."""
    lora = copy.deepcopy(LORA)
    lora.target_modules = WITHOUT_ALL_LINEAR.get(name, "all-linear")
    without_balance = {"router_aux_loss_coef": 0.0} if name in MIXTURES else {}
    dpo = dpo_cases.trained(
        tmp_path / "dpo", dpo_cases.pair_rows(), peft_config=lora, max_steps=3,
        model=family(name, EVERY, vocab_size=len(tiny_tokenizer())),
        per_device_train_batch_size=12, **without_balance,
    )  # fmt: skip
    losses = [line["loss"] for line in dpo.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[0] > losses[1] > losses[2]
    # It stops by itself where the ratio is off 1 before the first step.
    ppo = ppo_cases.trained(
        tmp_path / "ppo", model=family(name, EVERY, vocab_size=12), peft_config=lora,
        num_rollouts=1, num_ppo_epochs=1,
    )  # fmt: skip
    assert ppo.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    trained = [p for n, p in ppo.roles.policy.named_parameters() if "lora_B.default" in n]
    assert any(p.abs().max() > 0 for p in trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_families_are_scored_as_their_own_logits_say(name, caplog):
    model = family(name, EVERY)
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        scoring = choose_scoring(model)
    assert scoring.way == ("padded" if name in WITHOUT_TREES else "tree")
    assert WITHOUT_TREES.get(name, "") in scoring.reason
    assert bool(caplog.text) == (name in WITHOUT_TREES)
    assert_right(model, scoring, tolerance=1e-4 if name in MIXTURES else 1e-5)


PROMPTS = [Prompt.from_text(text) for text in ("How are you?", "Hello!", "Is the sea green?")]


def preference_groups():
    texts = ("Yes, the sky is blue.", "no.", "Thank you. I am fine")
    groups = []
    for prompt in PROMPTS:
        answers = tuple(
            Candidate(prompt=prompt, text=text, model="m", finish_reason="stop", sample_index=i)
            for i, text in enumerate(texts)
        )
        preferences = tuple(Preference(chosen=0, rejected=i, p_chosen=1.0) for i in (1, 2))
        groups.append(PreferenceGroup(prompt=prompt, answers=answers, preferences=preferences))
    return groups


def saved(name, folder):
    """A checkpoint as any other, with a tokenizer and room for its prompts."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = "<|endoftext|>"
    room = ("max_position_embeddings", "n_positions", "max_seq_len")
    changes = {n: 256 for n in room if n in EVERY[name][1]}
    special = {n: getattr(tokenizer, n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    family(name, EVERY, vocab_size=len(tokenizer), **changes, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EVERY if n not in WITHOUT_ALL_LINEAR])
def test_from_preferences_to_a_merged_model_and_from_a_reward_model_to_ppo(name, tmp_path):
    model = saved(name, tmp_path / "model")
    lora = LoRASettings(r=4, alpha=8)
    settings = DPOSettings(epochs=6, batch_size=6, learning_rate=1e-2)
    tuned = train_dpo(
        preference_groups(), model, tmp_path / "adapter", settings=settings, lora=lora,
        progress=False,
    )  # fmt: skip
    losses = [point.loss for point in tuned.points]
    balance = 0.05 if name in MIXTURES else 1e-4  # whose loss is added
    assert losses[0] == pytest.approx(math.log(2), abs=balance)
    assert losses[-1] < losses[0] - 0.02

    with_adapter = load_model(model, adapter=tuned.adapter)
    merged = load_model(str(merge_adapter(model, tuned.adapter, tmp_path / "merged")))
    ids = torch.tensor([[5, 9, 40, 77, 12]])
    with torch.no_grad():
        logits = [m.model(input_ids=ids).logits for m in (with_adapter, merged)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
        base = load_model(model).model(input_ids=ids).logits
    assert (base - logits[0]).abs().max() > 1e-3

    greedy = SamplingSettings(temperature=0.0, max_new_tokens=8)
    found = sample_candidates(PROMPTS, model, k=1, settings=greedy, adapter=tuned.adapter)
    tokenizer = with_adapter.tokenizer
    ends = list(end_token_ids(tokenizer, with_adapter.model.generation_config))
    for prompt, candidate in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([tokenize_prompt(tokenizer, prompt)])
        out = with_adapter.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=8, eos_token_id=ends,
        )  # fmt: skip
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert candidate.text == text.strip()

    reward = train_reward(
        preference_groups(), model, tmp_path / "reward", lora=lora, progress=False,
        settings=RewardSettings(epochs=2, batch_size=3),
    )  # fmt: skip
    assert math.isfinite(reward.points[-1].loss)
    rlhf = train_ppo(
        PROMPTS, model, str(tmp_path / "reward"), tmp_path / "ppo", lora=lora, progress=False,
        settings=PPOSettings(
            rollouts=2, prompts_per_rollout=2, answers_per_prompt=2, max_new_tokens=5, epochs=1
        ),
    )  # fmt: skip
    assert rlhf.points[0].kl == pytest.approx(0.0, abs=1e-4)
    assert rlhf.reference == "the base model (adapter off)"


def test_dropout_that_layers_hand_to_a_function_is_switched_off():
    """OPT's has a probability of 0.1 by default, in plain attributes."""
    model = family("OPT").train()
    ids = torch.tensor([[5, 9, 40, 77, 12]])
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        disable_dropout(model)
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_family_without_layers_for_the_adapter_is_refused_by_name():
    from prefopt.models import lora_config, wrap_with_adapter

    with pytest.raises(ModelError, match=r"adapter on MambaForCausalLM: .*lora\.target_modules"):
        wrap_with_adapter(family("Mamba"), lora_config(LoRASettings()))
