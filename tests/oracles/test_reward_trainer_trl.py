"""`prefopt.RewardTrainer` against TRL's: whole trainings on the same rows in one order.

Every loss and metric that both log, and all weights at the end. The chat template is one that ends an
answer at its end token: where one writes more, TRL reads the score behind that, and prefopt does not.
"""

import copy
import random

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import prefopt
from prefopt.training.reward_model import new_head
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("light_collections")
METRICS = ("loss", "accuracy", "margin", "mean_reward")


def rows(margin):
    draw = random.Random(0)
    words = ("the", "sky", "is", "blue", "and", "sea", "green", "hello", "how", "fine", "thank")

    def text():
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, 9)))

    prompts = [text() for _ in range(5)]
    made = [
        {
            "prompt": [{"role": "user", "content": prompts[i % 5]}],
            "chosen": [{"role": "assistant", "content": text()}],
            "rejected": [{"role": "assistant", "content": text()}],
        }
        for i in range(12)
    ]
    return [{**row, "margin": 0.1 * i} if margin else row for i, row in enumerate(made)]


@pytest.mark.parametrize("margin", [False, True], ids=["plain", "margins"])
@pytest.mark.parametrize("centre", [None, 0.05], ids=["free", "centred"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_both_train_the_same_model(margin, centre, lora, tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(classifier.score.weight, std=0.3)
    head = classifier.score.weight.detach().clone()
    # The base's weights train in one library and the head in both; LoRA starts at zero in both.
    config = LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=True,
        task_type="SEQ_CLS",
    ) if lora else None  # fmt: skip
    arguments = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 1,
        "learning_rate": 0.05, "max_length": 64, "seed": 1, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "optim": "sgd",
        "disable_tqdm": True, "dataloader_pin_memory": False, "max_grad_norm": 100.0,
        "train_sampling_strategy": "sequential", "center_rewards_coefficient": centre,
    }  # fmt: skip
    data = Dataset.from_list(rows(margin))
    theirs = trl.RewardTrainer(
        model=classifier, args=trl.RewardConfig(str(tmp_path / "trl"), **arguments),
        train_dataset=data, processing_class=copy.deepcopy(tokenizer), peft_config=config,
    )  # fmt: skip
    model = prefopt.load_model(folder, dtype="float32").model
    if lora:
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    reward = prefopt.RewardModel.new(model, tokenizer, config)
    with torch.no_grad():
        reward.head.weight.copy_(head)
        theirs_by_name = {
            n.replace("base_model.model.", ""): p for n, p in theirs.model.named_parameters()
        }
        for name, parameter in reward.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(theirs_by_name[name.replace("base_model.model.", "")])
    ours = prefopt.RewardTrainer(
        model=reward,
        args=prefopt.RewardConfig(str(tmp_path / "ours"), **arguments),
        train_dataset=data,
    )
    # The level of scores is the head's bias in one and nobody's in the other.
    reward.head.bias.requires_grad_(False)
    theirs.train()
    ours.train()
    for a, b in zip(theirs.state.log_history[:3], ours.state.log_history[:3], strict=True):
        for metric in METRICS:
            assert b[metric] == pytest.approx(a[metric], abs=2e-5), metric
    if not lora:
        assert new_head(model).in_features == head.shape[1]
    trained = {n.replace("base_model.model.", ""): p for n, p in theirs.model.named_parameters()}
    compared = 0
    for name, parameter in reward.model.named_parameters():
        plain = name.replace("base_model.model.", "")
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, trained[plain], rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared >= 12
    (their_head,) = (p for n, p in trained.items() if "score" in n and p.requires_grad)
    torch.testing.assert_close(reward.head.weight, their_head, rtol=1e-4, atol=1e-5)
