"""The enumerable world that quality is measured in, and prefopt's trainers in a tiny one."""

import pytest
import torch

from benchmarks import quality_rlhf
from benchmarks.exact_world import World, calibration

BETA = 0.5


@pytest.fixture(scope="module")
def world():
    """Two prompts, 3^3 answers, a model of 10,000 parameters."""
    return World(seed=0, n_symbols=3, length=3, n_prompts=2, width=32, sft_steps=60)


def test_the_reference_is_a_distribution_with_rewards_of_mean_0_and_deviation_1(world):
    p = world.ref_logps.exp()
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    mean = (p * world.rewards).sum(1)
    torch.testing.assert_close(mean.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    variance = ((p * world.rewards.square()).sum(1) - mean.square()).mean()
    torch.testing.assert_close(variance, torch.tensor(1.0))


def test_all_log_probabilities_are_those_of_one_answer_after_the_other(world):
    prompt = torch.full((27,), 1)
    with torch.no_grad():
        one_by_one = world.token_logps(world.reference, prompt, world.answers).sum(1)
    torch.testing.assert_close(world.ref_logps[1], one_by_one, atol=1e-4, rtol=0)
    torch.testing.assert_close(world.reward(prompt, world.answers), world.rewards[1])
    assert world.index(world.answers).tolist() == list(range(27))


def test_regret_is_0_for_the_optimum_and_1_for_the_reference(world):
    best = world.optimum(BETA)
    assert world.regret(best, BETA) == pytest.approx(0, abs=1e-6)
    assert world.regret(world.ref_logps, BETA) == pytest.approx(1, abs=1e-6)
    # Every other policy is worse, to either side.
    assert world.regret(world.optimum(2 * BETA), BETA) > 0.01
    assert world.regret(world.optimum(BETA / 2), BETA) > 0.01


def test_the_optimum_beats_best_of_n_at_its_kl(world):
    assert world.value(world.best_of(1)).reward == pytest.approx(0, abs=1e-5)
    best_of_four = world.value(world.best_of(4))
    optimum = world.value(world.optimum_at_kl(best_of_four.kl))
    assert optimum.kl == pytest.approx(best_of_four.kl, abs=1e-4)
    assert 0 < best_of_four.reward < optimum.reward


def test_best_of_two_by_hand(world):
    """P(best of 2 = y) = F(y)^2 - F(y-)^2 for the cumulative F in the order of the scores."""
    p = world.ref_logps[0].double().exp()
    top = int(world.rewards[0].argmax())
    chance = float(world.best_of(2)[0, top].exp())
    assert chance == pytest.approx(float(1 - (1 - p[top]) ** 2), abs=1e-6)


def test_pairs_follow_bradley_terry(world):
    pairs = world.pairs(20000, torch.Generator().manual_seed(0))
    margin = world.rewards[pairs.prompt, pairs.chosen] - world.rewards[pairs.prompt, pairs.rejected]
    margin = margin[margin != 0]  # two of the same answer
    # The chosen of two is the better one with probability sigmoid(|margin|).
    assert calibration(margin.abs().sigmoid(), (margin > 0).double()) < 0.03
    assert len(world.rows(pairs)[0]["chosen_ids"]) == 3


def test_calibration_by_hand():
    said = torch.tensor([0.05, 0.05, 0.95, 0.95])
    assert calibration(said, torch.tensor([0.0, 0.0, 1.0, 0.0])) == pytest.approx(0.25)


def test_dpo_comes_near_the_optimum(world):
    rows = world.rows(world.pairs(2048, torch.Generator().manual_seed(0)))
    policy = quality_rlhf.run_dpo(
        world, rows, per_device_train_batch_size=128, num_train_epochs=2, warmup_steps=2
    )
    assert world.regret(world.logps(policy), BETA) < 0.25


PPO = {
    "num_rollouts": 15, "num_generations": 64, "learning_rate": 3e-3, "value_learning_rate": 1e-2,
}  # fmt: skip


def test_ppo_comes_near_the_optimum(world):
    reward = quality_rlhf.callable_reward(world.reward, world.n_symbols)
    policy = quality_rlhf.run_ppo(world, reward, **PPO)
    assert world.regret(world.logps(policy), BETA) < 0.06


@pytest.mark.slow
def test_ppo_with_another_penalty_does_not(world):
    """So the bound above says something: k3 in the reward is a fault that has been shipped."""
    reward = quality_rlhf.callable_reward(world.reward, world.n_symbols)
    policy = quality_rlhf.run_ppo(world, reward, fault="k3", **PPO)
    assert world.regret(world.logps(policy), BETA) > 0.2
