"""The PPO trainer: a gradient by hand, one for every split, roles apart, resuming, faults."""

import copy
import json
import math

import pytest
import torch

from prefopt import PPOConfig, PPOTrainer, RewardModel
from prefopt.advantages import kl_k1, kl_k3
from prefopt.errors import DataError, TrainingError
from prefopt.training.ppo_trainer import _with_spreads
from prefopt.training.rollouts import SampledIds
from tests.training.ppo_cases import (
    END,
    GENERAL,
    LORA,
    PROMPTS,
    ByPrompt,
    logged,
    make_trainer,
    ones,
    tiny_policy,
    trained,
    weights,
)

KINDS = {"full": {}, "lora": {"peft_config": LORA}}
each_kind = pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)


def assert_same(one, two, tolerance=0.0):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert (a - b).norm() <= tolerance * max(float(b.norm()), 1e-3)


def scores(trainer):
    found = (line.get("objective/scores") for line in trainer.state.log_history)
    return [score for score in found if score is not None]


# --- It learns ----------------------------------------------------------------------------------


@each_kind
def test_the_policy_earns_more(tmp_path, how):
    trainer = trained(
        tmp_path, num_rollouts=8, num_generations=16, kl_coef=0.01, missing_eos_penalty=None, **how
    )
    found = scores(trainer)
    assert found[-1] > found[0] + 0.15
    last = trainer.state.log_history[-3]
    assert last["objective/kl"] > 0
    assert last["episodes"] == 8 * 3 * 16


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_groups_need_no_value(tmp_path, estimator):
    trainer = trained(
        tmp_path,
        num_rollouts=8,
        num_generations=16,
        kl_coef=0.01,
        advantage_estimator=estimator,
        missing_eos_penalty=None,
    )
    assert trainer.roles.value is None
    found = scores(trainer)
    assert found[-1] > found[0] + 0.1
    assert "loss/value" not in trainer.state.log_history[0]


# --- The gradient -------------------------------------------------------------------------------


def by_hand(trainer, policy, reference, temperature):
    """Losses of the first step from padded logits and loops; gradients of the policy's weights."""
    args, experience = trainer.args, trainer._experience
    logps, refs = [], []
    for prompt, ids in zip(experience.prompt_of, experience.answer_ids, strict=True):
        whole = torch.tensor([[*experience.prompt_ids[prompt], *ids]])
        place = slice(len(experience.prompt_ids[prompt]) - 1, -1)
        for model, found in ((policy, logps), (reference, refs)):
            log_p = (model(input_ids=whole).logits[0, place] / temperature).log_softmax(-1)
            found.append(log_p.gather(-1, torch.tensor(ids)[:, None])[:, 0])
    advantages, per_answer = [], [len(ids) for ids in experience.answer_ids]
    for i, ids in enumerate(experience.answer_ids):
        score = ones(None, None, [ids])[0] - (0.0 if ids[-1] == END else 1.0)
        rewards = -args.kl_coef * (logps[i] - refs[i]).detach()
        rewards[-1] += score
        later = torch.zeros(len(ids))  # the value is 0 before the first step
        carry = 0.0
        for t in reversed(range(len(ids))):
            carry = float(rewards[t]) + args.lam * carry
            later[t] = carry
        advantages.append(later)
    flat = torch.cat(advantages)
    white = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    loss = -(white * (torch.cat(logps) - torch.cat(logps).detach()).exp()).sum() / sum(per_answer)
    return (
        loss,
        flat,
        torch.autograd.grad(loss, [p for p in policy.parameters()], allow_unused=True),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_first_step_by_hand(tmp_path, temperature):
    policy = tiny_policy()
    other = tiny_policy(seed=3)
    trainer = make_trainer(
        tmp_path, model=copy.deepcopy(policy), ref_model=copy.deepcopy(other), optim="sgd",
        learning_rate=1.0, max_grad_norm=1e9, num_rollouts=1, num_ppo_epochs=1, kl_coef=0.3,
        temperature=temperature, value_learning_rate=1e-9,
    )  # fmt: skip
    trainer.train()
    _, returns, gradients = by_hand(trainer, policy, other, temperature)
    torch.testing.assert_close(trainer._experience.returns, returns, atol=2e-5, rtol=2e-5)
    moved = dict(trainer.model.named_parameters())
    for (name, before), gradient in zip(policy.named_parameters(), gradients, strict=True):
        step = before.detach() - moved[name].detach()
        assert (step - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("split", [{}, {"micro_batch_tokens": 8}], ids=["whole", "split"])
def test_general_rows_add_their_nll(tmp_path, split):
    """InstructGPT's eq. 2: PPO's gradient + weight x that of the NLL a token, at temperature 1."""
    common = {
        "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "num_rollouts": 1,
        "num_ppo_epochs": 1, "engine": ByPrompt(), "temperature": 0.6, "replay_weight": 0.7,
        "replay_share": 0.2, **split,
    }  # fmt: skip
    plain = trained(tmp_path / "a", **common)
    with_rows = trained(tmp_path / "b", replay=GENERAL, **common)
    rows = with_rows._replay.at(0)
    assert len(rows) == 3  # a fifth of the step's 15
    policy = tiny_policy()
    logps = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
        log_p = policy(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        logps.append(log_p.gather(-1, torch.tensor(row.answer_ids)[:, None])[:, 0])
    nll = -torch.cat(logps).mean()
    nll.backward()
    nll = float(nll.detach())
    moved = [dict(t.model.named_parameters()) for t in (plain, with_rows)]
    for name, parameter in policy.named_parameters():
        step = (moved[0][name] - moved[1][name]).detach()
        assert (step - 0.7 * parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-6, name
    logged_nll = with_rows.state.log_history[0]["replay/nll"]
    assert logged_nll == pytest.approx(nll, rel=1e-5)
    n = len(plain.roles.policy_parameters())  # the value has nothing to do with it
    assert_same(weights(with_rows)[n:], weights(plain)[n:])


def test_general_texts_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(DataError, match="general data as texts needs a tokenizer"):
        make_trainer(tmp_path, replay=[{"text": "Once upon a time"}])


def test_general_rows_without_weight_are_not_read(tmp_path):
    trainer = make_trainer(tmp_path, replay=["no rows at all"], replay_weight=0.0)
    assert trainer._replay is None


SPLITS = {
    "micro-batches": {"micro_batch_tokens": 16},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize(
    ("how", "split"),
    [
        pytest.param(KINDS["lora"], SPLITS["micro-batches"], id="lora-micro-batches"),
        pytest.param(KINDS["full"], SPLITS["accumulation"], id="full-accumulation"),
        pytest.param(KINDS["full"], SPLITS["micro-batches"], marks=pytest.mark.slow),
        pytest.param(KINDS["lora"], SPLITS["accumulation"], marks=pytest.mark.slow),
    ],
)
def test_one_gradient_for_every_split(tmp_path, how, split):
    # Steps of Adam divide by the gradient's size, so rounding could show; these do not.
    common = {
        "optim": "sgd", "engine": ByPrompt(), "num_mini_batches": 2, "replay": GENERAL, **how,
    }  # fmt: skip
    whole = trained(tmp_path / "a", **common)
    parts = trained(tmp_path / "b", **common, **split)
    assert_same(weights(parts), weights(whole), 1e-5)
    for a, b in zip(logged(parts), logged(whole), strict=True):
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_the_value_learns_by_its_own_rate_and_is_clipped_by_itself(tmp_path):
    still = make_trainer(tmp_path, value_learning_rate=1e-12)
    before = weights(still)
    still.train()
    n = len(still.roles.policy_parameters())
    moved = [float((a - b).norm()) for a, b in zip(weights(still), before, strict=True)]
    assert max(moved[n:]) < 1e-9 < max(moved[:n])
    assert still.state.log_history[0]["value/grad_norm"] > 0


# --- Roles --------------------------------------------------------------------------------------


def test_roles_on_one_base_stay_apart(tmp_path):
    base = tiny_policy()
    kept = {n: p.detach().clone() for n, p in base.named_parameters()}
    trainer = make_trainer(tmp_path, model=base, peft_config=LORA)
    ids = torch.tensor([[8, 1, 2, 3]])
    with torch.no_grad():
        expected = tiny_policy()(input_ids=ids).logits
    trainer.train()
    names = {n: p for n, p in trainer.model.named_parameters()}
    for name, weight in kept.items():
        now = names["base_model.model." + name.replace("proj.weight", "proj.base_layer.weight")]
        assert torch.equal(now, weight)
    with torch.no_grad(), trainer.roles.as_reference() as reference:
        assert torch.equal(reference(input_ids=ids).logits, expected)
    trains = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trains == {n for n in names if ".default." in n or ".value." in n}
    for adapter in ("default", "value"):
        assert any(p.abs().max() > 0 for n, p in names.items() if f"lora_B.{adapter}." in n)


@each_kind
def test_the_reward_models_scores_do_not_change(tmp_path, how):
    start = tiny_policy()
    # lora: an adapter on a copy of the policy's base.
    reward = RewardModel.new(
        copy.deepcopy(start), None, copy.deepcopy(how.get("peft_config")), seed=3
    )
    with torch.no_grad():
        for name, p in reward.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    from prefopt.trees import AnswerTree

    reward.bias = 0.25
    trees = [AnswerTree((8, 9), ((1, 2, END), (3,)))]
    before = reward.score_trees(trees)
    trainer = make_trainer(tmp_path, model=start, reward=reward, num_rollouts=1, **how)
    if how:
        assert trainer.reward.model is trainer.model  # moved to the policy's base
        assert set(trainer.model.peft_config) == {"default", "reward", "value"}
    # The value begins as the centred score at each token.
    from prefopt.training.tree_model import answer_states, tree_attention
    from prefopt.trees import pack_trees

    batch = pack_trees(trees, feed_last=True)
    value = trainer.roles.value
    with torch.no_grad(), trainer.roles.as_value(), tree_attention(value.model, value.scoring):
        at_ends = answer_states(value, batch, value.scoring, batch.ends)
    torch.testing.assert_close(at_ends, before, atol=1e-5, rtol=1e-5)
    trainer.train()
    assert torch.equal(trainer.reward.score_trees(trees), before)


def test_a_reward_model_loaded_onto_the_policys_base(tmp_path):
    made = RewardModel.new(tiny_policy(), None, copy.deepcopy(LORA), seed=3)
    made.base = "tiny"
    made.save(tmp_path / "reward")
    base = tiny_policy()
    reward = RewardModel.load(tmp_path / "reward", base=base)
    trainer = trained(tmp_path / "run", model=base, reward=reward, peft_config=LORA, num_rollouts=1)
    assert trainer.reward is reward
    assert trainer.model is reward.model
    trains = {n.split(".")[-2] for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trains == {"default", "value"}


def test_a_given_adapter_is_trained_further_and_is_its_own_reference(tmp_path):
    from peft import get_peft_model

    model = get_peft_model(tiny_policy(), copy.deepcopy(LORA))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    trainer = trained(tmp_path, model=model, num_rollouts=1)
    first = trainer.state.log_history[0]
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert set(trainer.model.peft_config) == {"default", "ref", "value"}


# --- Rewards ------------------------------------------------------------------------------------


def test_an_answer_without_a_score_is_left_out_and_told(tmp_path, caplog):
    def some(prompts, answers, answer_ids):
        found = ones(prompts, answers, answer_ids)
        return [None, *found[1:]]

    trainer = trained(tmp_path, reward=some, num_rollouts=1)
    assert "1 of 12 answers before step 1 got no score and are left out" in caplog.text
    assert len(trainer._experience.answer_ids) == 11
    assert trainer.state.log_history[0]["rollout/failed"] == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, a: [None] * len(a), "none of 12 answers"),
        (lambda p, a: [1.0], "returned 1 scores for 12 answers"),
        (lambda p, a: [math.nan] * len(a), "returned nan for the answer"),
    ],
)
def test_rewards_that_cannot_be_used(tmp_path, reward, message):
    with pytest.raises(TrainingError, match=message):
        trained(tmp_path, reward=reward)


def test_the_end_token_is_an_action_and_a_missing_one_costs(tmp_path):
    # Padding and end token are the same id here; only positions tell them apart.
    class Fixed:
        def sample(self, prompts, k, seed):
            return [[SampledIds((1, 2, END), True), SampledIds((1, 2, 3), False)]] * len(prompts)

    trainer = trained(
        tmp_path, engine=Fixed(), reward=lambda p, a: [2.0] * len(a), num_generations=2,
        num_rollouts=1, num_ppo_epochs=1, kl_coef=0.0, missing_eos_penalty=1.5, gamma=1.0, lam=1.0,
    )  # fmt: skip
    held = trainer._experience
    assert held.lengths.tolist() == [3] * 6
    assert held.returns.tolist() == pytest.approx([2.0, 2.0, 2.0, 0.5, 0.5, 0.5] * 3)
    assert trainer.state.log_history[0]["rollout/ended"] == 0.5


def test_answers_of_a_fixed_length_are_never_cut_off(tmp_path):
    trainer = trained(
        tmp_path, stop_token_ids=[], reward=lambda p, a: [2.0] * len(a), kl_coef=0.0, num_rollouts=1
    )
    assert trainer._experience.lengths.tolist() == [5] * 12
    assert trainer.state.log_history[0]["objective/rlhf_reward"] == pytest.approx(2.0)


def test_symbols_that_the_head_rules_out_make_no_nan(tmp_path):
    def ruled(bias):
        model = tiny_policy()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(12), requires_grad=False)
        model.lm_head.bias[6:] = bias
        return model

    found = [
        trained(tmp_path / str(bias), model=ruled(bias), stop_token_ids=[])
        for bias in (-math.inf, -1e9)
    ]
    assert_same(weights(found[0]), weights(found[1]), 1e-6)
    assert all(token < 6 for ids in found[0]._experience.answer_ids for token in ids)
    for line in logged(found[0]):
        assert all(math.isfinite(value) for value in line.values())


# --- KL -----------------------------------------------------------------------------------------


def test_the_kl_coefficient_is_adapted_after_each_rollout_batch(tmp_path):
    trainer = trained(tmp_path, kl_target=100.0, kl_horizon=60.0, num_rollouts=3, kl_coef=0.5)
    factor = 1 - 0.2 * 12 / 60
    used = [line["kl_coef"] for line in trainer.state.log_history if line.get("kl_coef")]
    assert used == pytest.approx([0.5, 0.5 * factor, 0.5 * factor**2])
    assert trainer.kl_coef == pytest.approx(0.5 * factor**3)


def test_another_penalty_is_a_subclass(tmp_path):
    class Wrong(PPOTrainer):
        def kl_penalties(self, logps, ref_logps):
            return kl_k3(logps, ref_logps)

    found = {
        kind: trained(tmp_path, kind=kind, ref_model=tiny_policy(3), num_rollouts=1)
        for kind in (PPOTrainer, Wrong)
    }
    assert found[Wrong].state.log_history[0]["objective/non_score_reward"] < 0
    assert PPOTrainer.kl_penalties(None, torch.ones(1), torch.zeros(1)) == kl_k1(
        torch.ones(1), torch.zeros(1)
    )


# --- Stops --------------------------------------------------------------------------------------


def test_a_ratio_that_is_not_1_before_the_first_step_stops(tmp_path):
    class Off(PPOTrainer):
        def _score_experience(self, experience):
            found = super()._score_experience(experience)
            experience.logps += 0.01
            return found

    with pytest.raises(TrainingError, match="off 1 by up to"):
        trained(tmp_path, kind=Off, ref_model=tiny_policy(3))


def test_an_adapter_that_is_not_the_reference_to_begin_with_stops(tmp_path):
    lora = copy.deepcopy(LORA)
    lora.init_lora_weights = False  # B is random
    with pytest.raises(TrainingError, match="policy and reference differ by up to"):
        trained(tmp_path, peft_config=lora)


def test_dropout_is_off_everywhere(tmp_path):
    model = tiny_policy(attention_dropout=0.5)
    lora = copy.deepcopy(LORA)
    lora.lora_dropout = 0.5
    trained(tmp_path, model=model, peft_config=lora)  # or the ratio would not be 1


def test_a_loss_that_is_not_finite_stops_with_the_row(tmp_path):
    class Broken(PPOTrainer):
        def _set_advantages(self, experience, *more):
            super()._set_advantages(experience, *more)
            experience.advantages[int(experience.lengths[:2].sum())] = math.nan

    with pytest.raises(
        TrainingError, match=r"not finite at step 1.*\n  - prompt '8'.*loss nan"
    ) as e:
        trained(tmp_path, kind=Broken, engine=ByPrompt(), rows=[{"prompt_ids": [8]}])
    assert str(e.value).count("\n") == 1


@each_kind
def test_gradient_checkpointing_changes_no_gradient(tmp_path, how):
    common = {"engine": ByPrompt(), "optim": "sgd", "num_rollouts": 1, **how}
    found = [
        trained(tmp_path / str(on), gradient_checkpointing=on, **common) for on in (False, True)
    ]
    assert_same(weights(found[1]), weights(found[0]), 1e-5)


@each_kind
def test_bf16_autocast_in_all_passes(tmp_path, how):
    trainer = trained(tmp_path, bf16=True, num_rollouts=1, num_ppo_epochs=1, **how)
    first = trainer.state.log_history[0]
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-3)
    assert all(p.dtype == torch.float32 for p in weights(trainer))


def test_adapters_on_a_base_in_bf16(tmp_path):
    trainer = trained(
        tmp_path, model=tiny_policy().to(torch.bfloat16), peft_config=LORA, num_rollouts=1
    )
    assert {p.dtype for p in weights(trainer)} == {torch.float32}
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=0.05)


# --- Checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "mini_batches"),
    [
        pytest.param(KINDS["lora"], 2, id="lora-2"),
        pytest.param(KINDS["full"], 1, id="full-1"),
        pytest.param(KINDS["lora"], 1, marks=pytest.mark.slow),
        pytest.param(KINDS["full"], 2, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, how, mini_batches):
    common = {
        "num_rollouts": 5, "num_mini_batches": mini_batches, "kl_target": 1.0, "kl_horizon": 50.0,
        "lr_scheduler_type": "linear", "logging_steps": 2 * mini_batches, "replay": GENERAL, **how,
    }  # fmt: skip
    steps = 2 * mini_batches  # of a rollout batch; two batches are an epoch
    whole = trained(tmp_path / "a", save_strategy="steps", save_steps=3 * steps, **common)
    resumed = make_trainer(tmp_path / "b", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{3 * steps}"))
    assert_same(weights(resumed), weights(whole))
    assert resumed.kl_coef == whole.kl_coef
    assert resumed._experience.answer_ids == whole._experience.answer_ids
    assert logged(resumed)[:-1] == logged(whole)[:-1]
    states = [t.optimizer.state_dict()["state"] for t in (resumed, whole)]
    for one, two in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in two)


def test_checkpoints_wait_for_the_end_of_a_rollout_batch(tmp_path):
    trained(tmp_path, num_rollouts=2, num_ppo_epochs=4, save_strategy="steps", save_steps=3)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


def test_a_saved_policy_is_an_ordinary_adapter_beside_its_value(tmp_path):
    trainer = trained(tmp_path / "run", peft_config=LORA)
    trainer.save_model(str(tmp_path / "out"))
    from peft import PeftModel

    ids = torch.tensor([[8, 1, 2]])
    loaded = PeftModel.from_pretrained(tiny_policy(), str(tmp_path / "out"))
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    value = RewardModel.load(tmp_path / "out" / "value", base=tiny_policy(), adapter_name="value")
    assert torch.equal(value.head.weight, trainer.roles.value.head.weight)


# --- Logs ---------------------------------------------------------------------------------------


def test_sampled_answers_are_written_down(tmp_path):
    trained(tmp_path, num_logged_answers=2)
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 2, 2]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert set(lines[0]) == {
        "schema", "step", "prompt", "answer", "n_tokens", "ended", "score", "kl",
    }  # fmt: skip


def test_held_out_prompts_are_answered_and_scored(tmp_path):
    trainer = trained(
        tmp_path, eval_rows=PROMPTS[:3], eval_strategy="steps", eval_steps=2, num_rollouts=2
    )
    found = [line for line in trainer.state.log_history if "eval_scores" in line]
    assert [line["step"] for line in found] == [2, 4]
    assert all(0 <= line["eval_scores"] <= 1 and line["eval_failed"] == 0 for line in found)


def test_callbacks_that_let_the_policy_answer(tmp_path):
    from prefopt import SampledAnswers
    from tests.tiny_models import save_tiny_model

    folder = save_tiny_model(tmp_path / "tiny")
    trainer = make_trainer(
        tmp_path / "run", model=folder, rows=[{"prompt": "The sky"}, {"prompt": "Hello"}],
        reward=lambda p, a: [float(len(x)) for x in a], peft_config=LORA, num_rollouts=1,
        callbacks=[SampledAnswers(["The sea"], every=1, max_new_tokens=4)],
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train()
    lines = (tmp_path / "run" / "sampled_answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


# --- Settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        (
            {"advantage_estimator": "rloo", "num_generations": 1},
            "num_generations must be at least 2",
        ),
        ({"advantage_estimator": "a2c"}, "must be one of"),
        ({"kl_coef": -1.0}, "kl_coef must not be negative"),
        ({"lam": 1.5}, r"lam must be in \[0, 1\]"),
        ({"max_steps": 3, "num_ppo_epochs": 2}, "ends inside a rollout batch"),
        ({"num_mini_batches": 0}, "num_mini_batches must be at least 1"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(str(tmp_path), **settings)


def test_learning_rates_follow_from_what_is_trained(tmp_path):
    for how, rate in (({}, 3e-6), ({"peft_config": LORA}, 5e-5)):
        trainer = make_trainer(tmp_path, learning_rate=None, **how)
        trainer.create_optimizer()
        assert [g["lr"] for g in trainer.optimizer.param_groups] == [rate, rate]
        assert trainer.optimizer.defaults["eps"] == 1e-5


def test_prompts_that_leave_no_room_are_left_out(tmp_path, caplog):
    rows = [*PROMPTS, {"prompt_ids": [8] * 30}]
    trainer = make_trainer(tmp_path, rows=rows)
    assert len(trainer.train_dataset) == len(PROMPTS)
    assert "1 of 7 prompts of the train dataset are longer than 27 tokens" in caplog.text
    with pytest.raises(DataError, match="all prompts"):
        make_trainer(tmp_path, rows=rows[-1:])


def test_what_a_trainer_is_given_must_fit(tmp_path):
    policy = tiny_policy()
    with pytest.raises(ValueError, match="must not be the same object"):
        make_trainer(tmp_path, model=policy, ref_model=policy)
    with pytest.raises(TypeError, match="reward must be"):
        make_trainer(tmp_path, reward="good")
    with pytest.raises(DataError, match="Expected: prompt"):
        make_trainer(tmp_path, rows=[{"text": "x"}])
    with pytest.raises(TypeError, match=r"must be a datasets\.Dataset"):
        PPOTrainer(tiny_policy(), ones, PPOConfig(str(tmp_path), max_new_tokens=4), [1, 2])
    noisy = PPOConfig(str(tmp_path), max_new_tokens=4, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="neftune_noise_alpha is not supported"):
        PPOTrainer(tiny_policy(), ones, noisy, [1, 2])


def test_spreads_from_the_means_of_squares():
    # Scores 0 and 2; returns 1, 2, 3 with values 1, 2, 6: errors 0, 0, -3 vary by 2, returns by 2/3.
    found = _with_spreads(
        {
            "objective/scores": 1.0,
            "_score_square": 2.0,
            "_return": 2.0,
            "_return_square": 14 / 3,
            "_error": -1.0,
            "_error_square": 3.0,
        }
    )
    expected = {
        "objective/scores": 1.0,
        "objective/score_std": 1.0,
        "value/explained_variance": -2.0,
    }
    assert found == pytest.approx(expected)


def test_equal_returns_have_no_explained_variance():
    found = _with_spreads(
        {"_return": 2.0, "_return_square": 4.0, "_error": 1.0, "_error_square": 1.0}
    )
    assert found == {}
