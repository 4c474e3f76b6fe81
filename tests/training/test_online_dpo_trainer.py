"""Online DPO: one step is a step of DPO on the pairs the policy made, computed here the plain way."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid

from prefopt import OnlineDPOConfig, OnlineDPOTrainer, PPOConfig
from tests.training.ppo_cases import LORA, PROMPTS, ByPrompt, logged, ones, tiny_policy

BETA = 0.7


def make_trainer(
    folder, *, reward=ones, ref_model=None, peft_config=None, engine=ByPrompt, **settings
):
    arguments = {
        "beta": BETA, "per_device_train_batch_size": 6, "num_generations": 3, "num_rollouts": 1,
        "max_new_tokens": 5, "seed": 1, "learning_rate": 0.5, "optim": "sgd", "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1e9,
        "dataloader_pin_memory": False, "lr_scheduler_type": "constant", **settings,
    }  # fmt: skip
    return OnlineDPOTrainer(
        model=tiny_policy(),
        reward=reward,
        args=OnlineDPOConfig(str(folder), **arguments),
        train_dataset=Dataset.from_list(PROMPTS),
        ref_model=ref_model,
        peft_config=copy.deepcopy(peft_config),
        engine=engine and engine(),
    )


def answer_logp(model, prompt, answer):
    ids = torch.tensor([[*prompt, *answer]])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(logps[place, token] for place, token in zip(places, answer, strict=True))


def plain_loss(policy, reference, prompts):
    """The mean over prompts of DPO's loss on their best and worst answer."""
    losses = []
    for prompt in prompts:
        (answers,) = ByPrompt().sample([prompt], 3, 0)
        scores = ones(None, None, [a.ids for a in answers])
        # An answer that did not end costs 1.
        scores = [s - (not a.ended) for s, a in zip(scores, answers, strict=True)]
        best, worst = (answers[scores.index(pick(scores))].ids for pick in (max, min))
        if max(scores) == min(scores):
            continue
        with torch.no_grad():
            base = answer_logp(reference, prompt, best) - answer_logp(reference, prompt, worst)
        now = answer_logp(policy, prompt, best) - answer_logp(policy, prompt, worst)
        losses.append(-logsigmoid(BETA * (now - base)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("micro_batch_tokens", [8, 1000])
def test_a_step_is_a_step_of_dpo(tmp_path, micro_batch_tokens):
    reference, expected = tiny_policy(seed=5), tiny_policy()
    loss = plain_loss(expected, reference, [row["prompt_ids"] for row in PROMPTS])
    loss.backward()
    trainer = make_trainer(
        tmp_path, ref_model=tiny_policy(seed=5), micro_batch_tokens=micro_batch_tokens
    )
    trainer.train()
    found = dict(trainer.model.named_parameters())
    for name, parameter in expected.named_parameters():
        step = parameter - 0.5 * parameter.grad
        torch.testing.assert_close(found[name], step, rtol=1e-4, atol=1e-6)
    line = logged(trainer)[0]
    assert line["online_dpo/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["online_dpo/margin"] != 0.0


def test_it_starts_at_ln_2_and_learns_what_is_rewarded(tmp_path):
    trainer = make_trainer(
        tmp_path, num_rollouts=25, learning_rate=0.03, optim="adamw_torch", peft_config=LORA,
        engine=None, num_generations=4,
    )  # fmt: skip
    trainer.train()
    lines = [line for line in logged(trainer) if "online_dpo/loss" in line]
    assert lines[0]["online_dpo/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[0]["online_dpo/margin"] == pytest.approx(0.0, abs=1e-6)
    scores = [line["objective/scores"] for line in lines]
    assert sum(scores[-5:]) > sum(scores[:5]) + 0.5


def test_equal_scores_are_no_pair_and_are_told(tmp_path, caplog):
    trainer = make_trainer(
        tmp_path, reward=lambda p, a, answer_ids: [1.0] * len(answer_ids), missing_eos_penalty=None
    )
    before = copy.deepcopy(trainer.model.state_dict())
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        trainer.train()
    assert "no prompt of step 1 has a better and a worse answer" in caplog.text
    assert all(torch.equal(before[name], w) for name, w in trainer.model.state_dict().items())
    assert logged(trainer)[0]["online_dpo/tied"] == 1.0


def test_settings_that_would_not_be_dpo_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="OnlineDPOConfig") as told:
        OnlineDPOConfig(str(tmp_path), num_ppo_epochs=2, num_mini_batches=2, beta=0.0, use_cpu=True)
    for name in ("num_ppo_epochs", "num_mini_batches", "beta"):
        assert name in str(told.value)
    with pytest.raises(TypeError, match="OnlineDPOConfig"):
        OnlineDPOTrainer(tiny_policy(), ones, PPOConfig(str(tmp_path), use_cpu=True), None)
