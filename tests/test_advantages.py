"""Rewards and advantages by hand, and what holds for any numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.advantages import (
    adapted_kl_coef,
    generalised_advantages,
    kl_k1,
    kl_k3,
    leave_one_out_advantages,
    moments,
    normalised_group_advantages,
    online_dpo_pairs,
    token_rewards,
    whiten,
)
from prefopt.logprobs import by_answer

quick = settings(max_examples=30, deadline=None)
numbers = st.floats(-5, 5, allow_nan=False, width=32)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_kl_estimators_by_hand():
    logps, ref = tensor(-1.0, -2.0), tensor(-1.5, -1.0)
    assert kl_k1(logps, ref).tolist() == [0.5, -1.0]
    expected = [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]
    assert kl_k3(logps, ref).tolist() == pytest.approx(expected)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    policy, ref = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    kl = float((policy * (policy / ref).log()).sum())

    def expectation(estimate):
        return float((policy * estimate(policy.log(), ref.log())).sum())

    assert expectation(kl_k1) == pytest.approx(kl)
    assert expectation(kl_k3) == pytest.approx(kl)


def test_k3_stays_finite_where_the_reference_has_no_probability():
    assert torch.isfinite(kl_k3(tensor(-1.0), tensor(1e6))).all()


def test_a_score_comes_at_the_last_token_of_its_answer():
    rewards = token_rewards(tensor(0.1, 0.2, 0.3), tensor(5.0, 7.0), torch.tensor([2, 1]))
    assert rewards.tolist() == pytest.approx([-0.1, 4.8, 6.7])


def test_generalised_advantages_by_hand():
    # delta: 1 + .5*2 - 1 = 1, and 3 - 2 = 1; A_1 = 1, A_0 = 1 + .5*.8*1.
    found = generalised_advantages(
        tensor([1.0, 3.0], [4.0, 99.0]),
        tensor([1.0, 2.0], [1.5, 99.0]),
        torch.tensor([2, 1]),
        gamma=0.5,
        lam=0.8,
    )
    assert found.tolist() == [pytest.approx([1.4, 1.0]), pytest.approx([2.5, 0.0])]


@given(
    st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6), min_size=1, max_size=4)
)
@quick
def test_with_lambda_1_a_return_is_the_sum_of_the_rewards_that_follow(answers):
    lengths = torch.tensor([len(a) for a in answers])
    rewards = torch.full((len(answers), int(lengths.max())), 77.0, dtype=torch.float64)
    values = rewards.clone()
    for row, answer in enumerate(answers):
        rewards[row, : len(answer)] = torch.tensor([r for r, _ in answer], dtype=torch.float64)
        values[row, : len(answer)] = torch.tensor([v for _, v in answer], dtype=torch.float64)
    found = generalised_advantages(rewards, values, lengths, gamma=1.0, lam=1.0)
    for row, answer in enumerate(answers):
        for t in range(len(answer)):
            after = sum(r for r, _ in answer[t:])
            assert float(found[row, t] + values[row, t]) == pytest.approx(after, abs=1e-9)
    assert (found[torch.arange(found.shape[1]) >= lengths[:, None]] == 0).all()


@given(st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=4))
@quick
def test_advantages_of_an_answer_do_not_depend_on_the_others(answers):
    flat = torch.tensor([r for a in answers for r in a], dtype=torch.float64)
    lengths = torch.tensor([len(a) for a in answers])
    answer_of = torch.repeat_interleave(torch.arange(len(answers)), lengths)
    rows = by_answer(flat, answer_of, lengths)
    together = generalised_advantages(rows, 0.5 * rows, lengths, gamma=1.0, lam=0.9)
    for row, answer in enumerate(answers):
        alone = torch.tensor([answer], dtype=torch.float64)
        one = generalised_advantages(
            alone, 0.5 * alone, torch.tensor([len(answer)]), gamma=1.0, lam=0.9
        )
        torch.testing.assert_close(together[row, : len(answer)], one[0])


def test_whitening_by_hand():
    white = whiten(tensor(1.0, 2.0, 3.0))  # mean 2, variance 1 with n - 1
    assert white.tolist() == pytest.approx([-1.0, 0.0, 1.0])
    kept = whiten(tensor(1.0, 2.0, 3.0) * 2, shift_mean=False)
    assert kept.tolist() == pytest.approx([3.0, 4.0, 5.0])


def test_whitening_over_processes_is_whitening_of_all():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double() * 3 + 7
    total = moments(values[:20]) + moments(values[20:])
    parts = [whiten(part, total) for part in (values[:20], values[20:])]
    torch.testing.assert_close(torch.cat(parts), whiten(values))
    assert float(whiten(values).var()) == pytest.approx(1.0)


def test_whitening_of_equal_values_gives_zeros_and_of_one_value_too():
    assert whiten(tensor(4.0, 4.0, 4.0)).abs().max() < 1e-3
    assert whiten(tensor(4.0)).tolist() == [0.0]


def test_leave_one_out_by_hand():
    # Group 0: 1, 2, 6; group 1: an answer alone.
    found = leave_one_out_advantages(tensor(1.0, 9.0, 2.0, 6.0), torch.tensor([0, 1, 0, 0]))
    assert found.tolist() == pytest.approx([1 - 4.0, 0.0, 2 - 3.5, 6 - 1.5])


def test_group_normalisation_by_hand():
    found = normalised_group_advantages(tensor(1.0, 3.0, 5.0), torch.tensor([0, 0, 1]))
    spread = math.sqrt(2.0) + 1e-4
    assert found.tolist() == pytest.approx([-1 / spread, 1 / spread, 0.0])


@given(st.lists(numbers, min_size=2, max_size=8), st.floats(-3, 3))
@quick
def test_group_advantages_do_not_see_a_shift_and_sum_to_zero(scores, shift):
    values, group = tensor(*scores), torch.zeros(len(scores), dtype=torch.long)
    for estimate in (leave_one_out_advantages, normalised_group_advantages):
        found = estimate(values, group)
        torch.testing.assert_close(found, estimate(values + shift, group), atol=1e-6, rtol=1e-6)
        assert float(found.sum()) == pytest.approx(0.0, abs=1e-6)


def test_the_kl_coefficient_follows_its_target():
    how = {"target": 6.0, "horizon": 1000.0, "n_answers": 100}
    assert adapted_kl_coef(0.1, 6.0, **how) == pytest.approx(0.1)
    assert adapted_kl_coef(0.1, 6.6, **how) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapted_kl_coef(0.1, 600.0, **how) == pytest.approx(0.1 * 1.02)  # the error is clipped
    assert adapted_kl_coef(0.1, -3.0, **how) == pytest.approx(0.1 * 0.98)
    assert adapted_kl_coef(0.1, 0.0, target=6.0, horizon=1.0, n_answers=100) == 0.0


def test_online_dpo_pairs_by_hand():
    """Best against worst of each group; a group without a difference has none."""
    found = online_dpo_pairs(
        torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0]),
        torch.tensor([0.5, 2.5, 9.0, 1.0, 2.0]),
        torch.tensor([0, 0, 0, 1, 1]),
        beta=0.5,
    )
    pull = 0.5 / (1 + math.exp(1.0))  # margin 0.5 (2.5 - 0.5) = 1
    torch.testing.assert_close(found.margins, torch.tensor([1.0]))
    torch.testing.assert_close(found.losses, torch.tensor([math.log1p(math.exp(-1.0))]))
    torch.testing.assert_close(found.weights, torch.tensor([-pull, pull, 0.0, 0.0, 0.0]))


def test_online_dpo_weights_are_the_gradient():
    torch.manual_seed(0)
    ratios = torch.randn(12, dtype=torch.float64, requires_grad=True)
    group = torch.arange(12) // 3
    found = online_dpo_pairs(torch.randn(12), ratios, group, beta=0.3)
    (gradient,) = torch.autograd.grad(found.losses.sum(), ratios)
    torch.testing.assert_close(gradient, -found.weights.detach())
