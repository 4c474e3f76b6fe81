"""Losses of a reward model by hand, by identity, and at the edges of floating point."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.losses import LossSettings, PairBatch, pair_losses, plackett_luce_loss
from prefopt.reward_losses import (
    RewardLossSettings,
    bradley_terry_loss,
    centering_penalty,
    davidson_reward_loss,
    rao_kupper_reward_loss,
    reward_pair_loss,
)

quick = settings(max_examples=30, deadline=None)
LN2 = math.log(2)
scores = st.floats(-20, 20)
shares = st.floats(0, 1)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def s(x):
    return 1 / (1 + math.exp(-x))


def test_bradley_terry_by_hand():
    """Differences 2 and -1, then labels that hold with probability .7, then a margin of .5."""
    chosen, rejected = tensor(3.0, 0.0), tensor(1.0, 1.0)
    torch.testing.assert_close(
        bradley_terry_loss(chosen, rejected), tensor(-math.log(s(2)), -math.log(s(-1)))
    )
    soft = bradley_terry_loss(chosen, rejected, tensor(0.7, 0.7))
    torch.testing.assert_close(
        soft,
        tensor(
            -0.7 * math.log(s(2)) - 0.3 * math.log(s(-2)),
            -0.7 * math.log(s(-1)) - 0.3 * math.log(s(1)),
        ),
    )
    margin = bradley_terry_loss(chosen, rejected, tensor(0.7, 1.0), tensor(0.5, 0.5))
    torch.testing.assert_close(
        margin,
        tensor(-0.7 * math.log(s(1.5)) - 0.3 * math.log(s(-2.5)), -math.log(s(-1.5))),
    )


@given(scores, shares)
@quick
def test_equal_scores_cost_ln_2_whatever_the_label(score, p):
    loss = bradley_terry_loss(tensor(score), tensor(score), tensor(p))
    assert loss.item() == pytest.approx(LN2)


@given(scores, scores, shares, st.floats(-3, 3))
@quick
def test_only_the_difference_counts_and_sides_can_be_exchanged(a, b, p, shift):
    loss = bradley_terry_loss(tensor(a), tensor(b), tensor(p))
    moved = bradley_terry_loss(tensor(a + shift), tensor(b + shift), tensor(p))
    swapped = bradley_terry_loss(tensor(b), tensor(a), tensor(1 - p))
    torch.testing.assert_close(loss, moved)
    torch.testing.assert_close(loss, swapped)


@given(st.floats(0.05, 0.95))
@quick
def test_the_loss_is_smallest_at_the_log_odds_of_the_label(p):
    difference = tensor(math.log(p / (1 - p))).requires_grad_()
    loss = bradley_terry_loss(difference, tensor(0.0), tensor(p))
    (gradient,) = torch.autograd.grad(loss.sum(), difference)
    assert abs(gradient.item()) < 1e-12


@given(scores, scores, shares)
@quick
def test_it_is_dpos_loss_of_log_ratios_at_beta_1(a, b, p):
    zero = tensor(0.0)
    batch = PairBatch(tensor(a), tensor(b), zero, zero, tensor(1), tensor(1), tensor(p), zero, 1.0)
    for name, law in (
        ("sigmoid", "bradley_terry"), ("rao_kupper", "rao_kupper"), ("davidson", "davidson"),
    ):  # fmt: skip
        theirs = pair_losses([name], None, batch, LossSettings(beta=1.0))
        ours = reward_pair_loss(
            tensor(a), tensor(b), tensor(p), None, RewardLossSettings(pair_model=law)
        )
        torch.testing.assert_close(ours, theirs)


@given(scores, scores)
@quick
def test_plackett_luce_of_two_answers_is_bradley_terry(a, b):
    pair = bradley_terry_loss(tensor(a), tensor(b))
    torch.testing.assert_close(
        plackett_luce_loss(tensor(a, b)[None], torch.ones(1, 2).bool()), pair
    )


@pytest.mark.parametrize(
    ("loss", "nu"), [(rao_kupper_reward_loss, 3.0), (davidson_reward_loss, 1.0)]
)
@given(a=scores, b=scores)
@quick
def test_win_tie_and_loss_are_all_there_is(loss, nu, a, b):
    def p(of):
        return math.exp(-loss(tensor(a), tensor(b), tensor(of), nu=nu).item())

    assert p(1.0) + p(0.5) + p(0.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("loss", "nu"), [(rao_kupper_reward_loss, 3.0), (davidson_reward_loss, 1.0)]
)
def test_equal_answers_tie_half_of_the_time_at_the_default(loss, nu):
    assert loss(tensor(1.0), tensor(1.0), tensor(0.5), nu=nu).item() == pytest.approx(LN2)


def test_the_centering_penalty_by_hand():
    torch.testing.assert_close(
        centering_penalty(tensor(3.0, 1.0), tensor(1.0, -1.0)), tensor(16, 0.0)
    )


def test_extreme_scores_stay_finite():
    a, b = tensor(1e4).requires_grad_(), tensor(-1e4)
    for p in (0.0, 0.5, 1.0):
        loss = bradley_terry_loss(a, b, tensor(p))
        (gradient,) = torch.autograd.grad(loss.sum(), a)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bradley_terry_loss(tensor(1, 2), tensor(1)), "one shape"),
        (lambda: centering_penalty(tensor(1, 2), tensor(1)), "shapes must agree"),
        (lambda: RewardLossSettings(rao_kupper_nu=1.0, davidson_nu=0.0), "above 1.*positive"),
        (lambda: RewardLossSettings(pair_model="elo"), "bradley_terry"),
        (
            lambda: reward_pair_loss(
                tensor(1.0), tensor(0.0), tensor(1.0), tensor(0.3),
                RewardLossSettings(pair_model="davidson"),
            ),
            "takes no margins",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
