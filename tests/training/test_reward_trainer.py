"""The reward trainer: its losses are the functions', whatever the split; resuming changes nothing."""

import copy
import itertools
import math

import pytest
import torch
from datasets import Dataset

from prefopt import RewardConfig, RewardModel, RewardTrainer
from prefopt.errors import DataError, TrainingError
from prefopt.losses import plackett_luce_loss
from prefopt.reward_losses import (
    bradley_terry_loss,
    centering_penalty,
    davidson_reward_loss,
    rao_kupper_reward_loss,
)
from prefopt.training.preference_rows import RowCollator
from prefopt.trees import AnswerTree
from tests.tiny_models import tiny_tokenizer
from tests.training.dpo_cases import LORA, group_rows, pair_rows, tiny_policy

PAIRS = [{**row, "p_chosen": p} for row, p in zip(pair_rows(), [1.0, 0.8, 0.5] * 4, strict=True)]
GROUPS = group_rows()


def make_trainer(folder, rows, *, model=None, eval_rows=None, peft_config=LORA, **settings):
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "seed": 1,
        "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, "max_length": 32,
        "per_device_eval_batch_size": 4, "max_grad_norm": 100.0, **settings,
    }  # fmt: skip
    return RewardTrainer(
        model=tiny_policy() if model is None else model,
        args=RewardConfig(str(folder), **arguments),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tiny_tokenizer(),
        peft_config=None if isinstance(model, RewardModel) else copy.deepcopy(peft_config),
    )


def trained(*args, **options):
    trainer = make_trainer(*args, **options)
    trainer.train()
    return trainer


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def close(one, two, tolerance=1e-5):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=tolerance, atol=tolerance)


def scores_of(trainer, row):
    """The raw scores of a row's answers, each alone in its batch."""
    trees = [AnswerTree(s.prompt_ids, (s.answer_ids,)) for s in row.sequences]
    return torch.stack([trainer.reward.score_trees([tree])[0] for tree in trees])


def test_equal_scores_cost_ln_2(tmp_path):
    reward = RewardModel.new(tiny_policy(), peft_config=copy.deepcopy(LORA))
    torch.nn.init.zeros_(reward.head.weight)
    for rows in (PAIRS, GROUPS):
        trainer = make_trainer(tmp_path, rows, model=copy.deepcopy(reward), eval_rows=rows)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


CASES = {
    "bradley_terry": (PAIRS, {}, lambda c, r, p, m: bradley_terry_loss(c, r, p)),
    "ignore": (PAIRS, {"soft_labels": "ignore"}, lambda c, r, p, m: bradley_terry_loss(c, r)),
    "margins": (
        [{**row, "margin": 0.1 * i} for i, row in enumerate(PAIRS)],
        {"margin_weight": 2.0},
        lambda c, r, p, m: bradley_terry_loss(c, r, p, 2.0 * m),
    ),
    "margins unread": (
        [{**row, "margin": 0.1 * i} for i, row in enumerate(PAIRS)],
        {"margin_weight": 0.0},
        lambda c, r, p, m: bradley_terry_loss(c, r, p),
    ),
    "centred": (
        PAIRS,
        {"center_rewards_coefficient": 0.3},
        lambda c, r, p, m: bradley_terry_loss(c, r, p) + 0.3 * centering_penalty(c, r),
    ),
    "rao_kupper": (
        PAIRS,
        {"loss_type": "rao_kupper", "rao_kupper_nu": 2.0},
        lambda c, r, p, m: rao_kupper_reward_loss(c, r, p, nu=2.0),
    ),
    "davidson": (
        PAIRS,
        {"loss_type": "davidson"},
        lambda c, r, p, m: davidson_reward_loss(c, r, p, nu=1.0),
    ),
    "groups": (GROUPS, {}, lambda c, r, p, m: bradley_terry_loss(c, r, p)),
    "best_worst": (
        GROUPS, {"group_pairs": "best_worst"}, lambda c, r, p, m: bradley_terry_loss(c, r, p)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_mean_over_rows_of_the_weighted_pairs(name, tmp_path):
    rows, options, of_pair = CASES[name]
    trainer = make_trainer(tmp_path, rows, eval_rows=rows, **options)
    how = {"pair_choice": options.get("group_pairs", "all")}
    expected, right, decided = 0.0, 0.0, 0.0
    read = RowCollator(max_length=32, **how)(rows).rows
    for row in read:
        scores = scores_of(trainer, row)
        for pair in row.pairs:
            c, r = scores[pair.chosen], scores[pair.rejected]
            p, m = torch.tensor(pair.p_chosen), torch.tensor(pair.margin)
            expected += pair.weight * of_pair(c[None], r[None], p[None], m[None]).item()
            if pair.p_chosen != 0.5:
                decided += pair.weight
                right += pair.weight * float(c > r)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected / len(read), abs=1e-5)
    assert found["eval_accuracy"] == pytest.approx(right / decided)


def test_rankings_by_plackett_and_luce_pairs_beside_them_by_bradley_and_terry(tmp_path):
    rows = [
        *({**row, "chosen_ids": None, "rejected_ids": None, "p_chosen": None} for row in GROUPS),
        *({**row, "answer_ids": None, "scores": None} for row in PAIRS),
    ]
    trainer = make_trainer(tmp_path, rows, eval_rows=rows, loss_type="plackett_luce")
    expected = 0.0
    for row in RowCollator(max_length=32)(rows).rows:
        scores = scores_of(trainer, row)
        if row.scores is None:
            p = torch.tensor([row.pairs[0].p_chosen])
            expected += bradley_terry_loss(scores[:1], scores[1:], p).item()
        else:
            order = sorted(range(len(scores)), key=lambda i: -row.scores[i])
            ranked = scores[order][None]
            expected += plackett_luce_loss(ranked, torch.ones_like(ranked).bool()).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected / len(rows), abs=1e-5)


def test_k_answers_learn_what_their_pairs_learn_one_by_one(tmp_path):
    """A row of three answers with all its pairs, against three rows that share one row's weight."""
    row = {"prompt_ids": [1, 2], "answer_ids": [[3, 4], [5], [6, 7, 8]], "scores": [2.0, 1.0, 0.0]}
    pairs = [
        {"prompt_ids": [1, 2], "chosen_ids": better, "rejected_ids": worse}
        for better, worse in itertools.combinations(row["answer_ids"], 2)
    ]
    options = {"max_steps": 3, "per_device_train_batch_size": 3}
    together = trained(tmp_path / "k", [row], **options)
    apart = trained(tmp_path / "pairs", pairs, **options)
    close(together, apart)
    assert together.state.log_history[0]["loss"] == pytest.approx(
        apart.state.log_history[0]["loss"], abs=1e-6
    )


@pytest.mark.parametrize(
    "split",
    [
        {"micro_batch_tokens": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"group_by_prompt": True, "micro_batch_tokens": 30},
    ],
)
@pytest.mark.parametrize("rows", [PAIRS, GROUPS], ids=["pairs", "groups"])
def test_no_split_changes_what_is_learned(split, rows, tmp_path):
    settings = {"loss_type": "bradley_terry", "center_rewards_coefficient": 0.01}
    whole = trained(tmp_path / "whole", rows, **settings)
    close(whole, trained(tmp_path / "split", rows, **settings, **split))


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "full"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(peft_config, tmp_path):
    options = {
        "peft_config": peft_config, "max_steps": 5, "save_strategy": "steps", "save_steps": 2,
        "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear",
        "center_rewards_coefficient": 0.01,
    }  # fmt: skip
    whole = trained(tmp_path / "run", PAIRS, **options)
    resumed = make_trainer(tmp_path / "run", PAIRS, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    one, two = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for a, b in zip(whole.state.log_history[:5], resumed.state.log_history[:5], strict=True):
        assert a == b
    loaded = RewardModel.load(tmp_path / "run" / "checkpoint-5", base=peft_config and tiny_policy())
    trees = [AnswerTree((1, 2), ((3, 4), (5,)))]
    assert torch.equal(loaded.score_trees(trees), whole.reward.score_trees(trees))


def test_the_best_checkpoint_can_be_taken_at_the_end(tmp_path):
    trainer = trained(
        tmp_path, PAIRS, eval_rows=PAIRS, max_steps=4, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=1.0,
        metric_for_best_model="eval_loss",
    )  # fmt: skip
    best = min(line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)


def test_the_level_of_scores_moves_only_where_something_sets_it(tmp_path):
    options = {"optim": "adamw_torch", "max_steps": 3}
    free = trained(tmp_path / "free", PAIRS, **options)
    assert free.reward.head.bias.item() == 0.0
    held = trained(tmp_path / "held", PAIRS, center_rewards_coefficient=0.1, **options)
    assert held.reward.head.bias.item() != 0.0


def test_text_rows_end_at_the_end_token(tmp_path):
    """ChatML writes a line break after it, which a policy that stops there never says."""
    tokenizer = tiny_tokenizer()
    rows = [
        {
            "prompt": [{"role": "user", "content": "What is blue?"}],
            "chosen": [{"role": "assistant", "content": "The sky."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
    ]
    trainer = make_trainer(tmp_path, rows, max_length=None)
    row = trainer.train_dataset[0]
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer.eos_token_id
    from prefopt.types import Prompt

    prompt_ids, answer_ids = trainer.reward.tokenize(Prompt.from_text("What is blue?"), "The sky.")
    assert (tuple(row["prompt_ids"]), tuple(row["chosen_ids"])) == (prompt_ids, answer_ids)


def test_long_rows_are_left_out_and_told(tmp_path, caplog):
    rows = [
        *PAIRS,
        {"prompt_ids": [1] * 40, "chosen_ids": [2], "rejected_ids": [3], "p_chosen": 1.0},
    ]
    trainer = make_trainer(tmp_path, rows)
    assert len(trainer.train_dataset) == len(PAIRS)
    assert "longer than max_length (1)" in caplog.text
    cut = make_trainer(tmp_path, rows, truncation_mode="keep_end")
    assert len(cut.train_dataset) == len(rows)
    with pytest.raises(DataError, match="no row"):
        make_trainer(tmp_path, rows[-1:])


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = trained(tmp_path / "plain", PAIRS)
    close(plain, trained(tmp_path / "checkpointed", PAIRS, gradient_checkpointing=True))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, PAIRS)
    with torch.no_grad():
        trainer.reward.head.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="not finite at step 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "elo"}, "loss_type must be one of"),
        ({"margin_weight": -1.0, "micro_batch_tokens": 0}, "micro_batch_tokens.*margin_weight"),
        ({"center_rewards_coefficient": -0.1}, "must not be negative"),
        ({"rao_kupper_nu": 1.0}, "above 1"),
        ({"truncation_mode": "middle"}, "truncation_mode"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RewardConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_arguments_that_exclude_each_other_are_refused(tmp_path):
    reward = RewardModel.new(tiny_policy())
    noisy = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="neftune_noise_alpha is not supported"):
        RewardTrainer(reward, args=noisy, train_dataset=Dataset.from_list(PAIRS))
    arguments = {"args": RewardConfig(str(tmp_path), use_cpu=True, bf16=False)}
    with pytest.raises(ValueError, match=r"`train_dataset` is required.*peft_config was given"):
        RewardTrainer(reward, peft_config=LORA, **arguments)
    with pytest.raises(TypeError, match="must be a RewardConfig"):
        RewardTrainer(reward, args=3, train_dataset=Dataset.from_list(PAIRS))
