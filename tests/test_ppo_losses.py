"""PPO's losses by hand, and their gradients."""

import math

import pytest
import torch

from prefopt.ppo_losses import clipped_policy_losses, clipped_value_losses


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def test_the_first_step_is_the_policy_gradient():
    logps = tensor(-1.0, -2.0, -3.0, grad=True)
    advantages = tensor(2.0, -1.0, 0.5)
    found = clipped_policy_losses(logps, logps.detach(), advantages, clip=0.2)
    assert found.losses.tolist() == [-2.0, 1.0, -0.5]
    assert found.ratio.tolist() == [1.0, 1.0, 1.0]
    assert found.approx_kl.tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(found.losses.sum(), logps)
    assert gradient.tolist() == [-2.0, 1.0, -0.5]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 1.0, -1.2, True),  # far enough in the good direction
        (1.5, -1.0, 1.5, False),  # in the bad direction there is no bound
        (0.5, -1.0, 0.8, True),
        (0.5, 1.0, -0.5, False),
        (1.1, 1.0, -1.1, False),
    ],
)
def test_the_clipped_loss_by_hand(ratio, advantage, loss, clipped):
    logps = tensor(math.log(ratio), grad=True)
    found = clipped_policy_losses(logps, tensor(0.0), tensor(advantage), clip=0.2)
    assert found.losses.item() == pytest.approx(loss)
    assert found.clipped.item() is clipped
    assert found.approx_kl.item() == pytest.approx(ratio - 1 - math.log(ratio))
    (gradient,) = torch.autograd.grad(found.losses.sum(), logps)
    assert (gradient.item() == 0.0) is clipped


def test_a_ratio_out_of_bounds_is_still_a_number():
    logps = tensor(0.0, -900.0, grad=True)
    found = clipped_policy_losses(logps, tensor(-800.0, 0.0), tensor(-1.0, -1.0), clip=0.2)
    assert torch.isfinite(found.losses).all()
    (gradient,) = torch.autograd.grad(found.losses.sum(), logps)
    assert torch.isfinite(gradient).all()


def test_the_value_loss_by_hand():
    old, returns = tensor(1.0, 1.0, 1.0), tensor(3.0, 3.0, 0.0)
    values = tensor(2.0, 1.1, 1.5, grad=True)
    found = clipped_value_losses(values, old, returns, clip=0.2)
    # Moved too far towards the return: the bounded error counts, and gives no gradient. Moved away
    # from it: the plain error is the larger one.
    assert found.losses.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 1.9**2, 0.5 * 1.5**2])
    assert found.clipped.tolist() == [True, False, False]
    (gradient,) = torch.autograd.grad(found.losses.sum(), values)
    assert gradient.tolist() == pytest.approx([0.0, -1.9, 1.5])
    free = clipped_value_losses(values, old, returns, clip=None)
    assert free.losses.tolist() == pytest.approx([0.5, 0.5 * 1.9**2, 0.5 * 1.5**2])
