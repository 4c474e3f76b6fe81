"""`prefopt.DPOTrainer` against TRL's: whole trainings of a few steps on the same rows in one order.

Every number that either logs, in training and in evaluation, and all weights at the end.
"""

import copy
import random

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import prefopt

# Not the same by nature: the clock, and an estimate of the work that trees spare.
NOT_COMPARED = ("runtime", "per_second", "preparation_time", "total_flos")
# Means over tokens. TRL averages the means of the batches, we average over all tokens: over one
# batch that is the same, over several it is not.
TOKEN_MEANS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def conversations():
    """Twelve rows over five prompts, their answers of unlike lengths."""
    draw = random.Random(0)
    words = ("the", "sky", "is", "blue", "and", "sea", "green", "hello", "how", "fine", "thank")

    def text(most):
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, most)))

    prompts = [text(9) for _ in range(5)]
    return [
        {
            "prompt": [{"role": "user", "content": prompts[i % 5]}],
            "chosen": [{"role": "assistant", "content": text(9)}],
            "rejected": [{"role": "assistant", "content": text(9)}],
        }
        for i in range(12)
    ]


ROWS = conversations()


@pytest.fixture(scope="module")
def start(tiny_model):
    """Policy weights whose norms are not all 1, and a tokenizer; copied for every run."""
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tiny_model)


def perturbed(model, seed, scale=0.02):
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=noise)
    return model


def train(library, start, folder, *, peft_config=None, make_model=None, make_ref=None, **settings):
    model, tokenizer = start
    model = copy.deepcopy(model) if make_model is None else make_model(copy.deepcopy(model))
    arguments = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "num_train_epochs": 1,
        "logging_steps": 1, "learning_rate": 1e-2, "max_length": 64, "seed": 1, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
        "eval_strategy": "epoch", "disable_tqdm": True, "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential", "lr_scheduler_type": "linear", **settings,
    }  # fmt: skip
    trainer = library.DPOTrainer(
        model=model,
        ref_model=None if make_ref is None else make_ref(copy.deepcopy(start[0])),
        args=library.DPOConfig(str(folder / library.__name__), **arguments),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:8]),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft_config),
    )
    trainer.train()
    return trainer


def assert_same_training(start, folder, *, tolerance=1e-4, but=(), **settings):
    theirs = train(trl, start, folder, **settings)
    ours = train(prefopt, start, folder, **settings)
    assert len(ours.state.log_history) == len(theirs.state.log_history) >= 4
    compared = 0
    for own, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            if any(part in name for part in NOT_COMPARED) or name in but:
                continue
            # Some metrics are 0 but for rounding, such as rewards before the first step.
            assert own[name] == pytest.approx(value, rel=tolerance, abs=2e-5), (name, own["step"])
            compared += 1
    assert compared > 50
    assert_same_weights(ours.model, theirs.model, start[0], tolerance)
    return ours, theirs


def assert_same_weights(model, other_model, before, tolerance):
    weights, others = dict(model.named_parameters()), dict(other_model.named_parameters())
    assert weights.keys() == others.keys()
    old = {value.norm().item() for value in before.parameters()}
    for name, value in others.items():
        # Adam divides by the size of a gradient, and so magnifies the rounding of small ones.
        assert (weights[name] - value).norm() <= 5 * tolerance * value.norm() + 1e-7, name
    assert sum(value.norm().item() not in old for value in others.values()) > 5  # they moved


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["LoRA", "full"])
def test_plain_dpo(start, tmp_path, peft_config):
    ours, _ = assert_same_training(start, tmp_path, peft_config=peft_config, num_train_epochs=2)
    assert ours.scoring.way == "tree"
    assert len(ours.state.log_history) == 6 + 2 + 1  # steps, evaluations, the summary


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"use_weighting": True, "ld_alpha": 0.5, "loss_type": ["sigmoid", "ipo"]},
        {"max_length": 26},  # every row is cut, and none to nothing
        {"precompute_ref_log_probs": True, "ld_alpha": 0.3},
    ],
    ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()),
)
def test_settings_on_a_lora(settings, start, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    assert_same_training(start, tmp_path, peft_config=LORA, **settings)


@pytest.mark.slow  # like those above, in further settings
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "ipo"},
        {"loss_type": "sigmoid_norm", "beta": 2.0},
        {"loss_type": "hinge"},
        {"loss_type": ["bco_pair", "apo_zero", "nca_pair"], "loss_weights": [0.5, 1.0, 2.0]},
        {"loss_type": "robust", "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
        {"loss_type": "aot"},
        {"loss_type": "aot_unpaired"},
        {"ld_alpha": 0.3},
        {"use_weighting": True},
        {"max_length": 16, "truncation_mode": "keep_end"},
        {"precompute_ref_log_probs": True, "num_train_epochs": 2},
        {"gradient_checkpointing": True},
    ],
    ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()),
)
# TRL says that it will take it away; until then it is computed as TRL does.
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_further_settings_on_a_lora(settings, start, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    assert_same_training(start, tmp_path, peft_config=LORA, **settings)


def test_a_reference_that_was_given(start, tmp_path):
    def reference(model):
        return perturbed(model, seed=5)

    ours, _ = assert_same_training(start, tmp_path, make_ref=reference)
    first = ours.state.log_history[0]
    assert abs(first["rewards/margins"]) > 0.01  # not the policy


@pytest.mark.slow
def test_a_given_reference_beside_a_new_adapter(start, tmp_path):
    def reference(model):
        return perturbed(model, seed=5)

    assert_same_training(start, tmp_path, make_ref=reference, peft_config=LORA)


def test_an_adapter_that_was_there_is_trained_and_its_copy_is_the_reference(start, tmp_path):
    def adapted(model):
        torch.manual_seed(3)
        model = get_peft_model(model, copy.deepcopy(LORA))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        return model

    ours, theirs = assert_same_training(start, tmp_path, make_model=adapted)
    assert abs(ours.state.log_history[0]["rewards/margins"]) < 1e-5
    assert {"default", "ref"} <= set(ours.model.peft_config)
    assert set(ours.model.peft_config) == set(theirs.model.peft_config)


@pytest.mark.parametrize(
    "peft_config", [LORA, pytest.param(None, marks=pytest.mark.slow)], ids=["LoRA", "full"]
)
def test_gradient_accumulation(start, tmp_path, peft_config):
    """Of equal batches, and of a loss without token means, TRL's accumulation is exact too."""
    assert_same_training(
        start,
        tmp_path,
        peft_config=peft_config,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        but=TOKEN_MEANS,
    )


def test_full_training_with_a_precomputed_reference(start, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    ours, theirs = assert_same_training(start, tmp_path, precompute_ref_log_probs=True)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        own, other = list(ours.train_dataset[name]), list(theirs.train_dataset[name])
        assert own == pytest.approx(other, rel=1e-5)


def test_gradient_checkpointing_of_the_whole_model(start, tmp_path):
    assert_same_training(start, tmp_path, gradient_checkpointing=True)


def test_what_trl_saved_is_what_we_save(start, tmp_path):
    """The folder of a trained adapter holds the same files, and one library's loads in the other."""
    ours, theirs = (
        train(library, start, tmp_path, peft_config=LORA, eval_strategy="no", max_steps=1)
        for library in (prefopt, trl)
    )
    for trainer in (ours, theirs):
        trainer.save_model()
    own, other = (
        {f.name for f in (tmp_path / name).iterdir() if f.is_file()} for name in ("prefopt", "trl")
    )
    assert other - own <= {"README.md"}  # TRL writes a model card
    assert {"adapter_config.json", "adapter_model.safetensors"} <= own


def test_the_balancing_loss_of_a_mixture_of_experts(start, tmp_path):
    """Weighted so little that only the metric and its mean remain to compare.

    TRL balances over padded rows, each prompt twice, and a tree batch over each token once, so the
    two agree as numbers of the same kind, not digit for digit.
    """
    tokenizer = start[1]

    def experts(model):
        torch.manual_seed(0)
        made = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        made.config._name_or_path = model.config._name_or_path
        return made

    settings = {"make_model": experts, "make_ref": experts, "router_aux_loss_coef": 1e-6}
    ours, theirs = (
        train(library, start, tmp_path, eval_strategy="no", **settings)
        for library in (prefopt, trl)
    )
    own, other = ours.state.log_history[0], theirs.state.log_history[0]
    assert own["aux_loss"] == pytest.approx(other["aux_loss"], rel=0.05)
    assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert own.keys() == other.keys()
