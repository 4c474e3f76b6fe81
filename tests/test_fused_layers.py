"""The fused elementwise operations against the plain formulas: values, gradients, what is kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from prefopt.fused_layers import rms_norm, rotate, swiglu

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_swiglu(gate, up):
    return gate * torch.sigmoid(gate) * up


def plain_norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def plain_rotation(x, cos, sin):
    first, second = x.split(x.shape[-1] // 2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def assert_same(ours, plain, tensors, tolerance=1e-12):
    """Output and gradients for all tensors, the difference against the largest number there."""
    results = []
    for function in (ours, plain):
        given = [t.detach().clone().requires_grad_() for t in tensors]
        out = function(*given)
        weights = normal(*out.shape, seed=9).to(out.dtype)
        results.append((out, *torch.autograd.grad((out * weights).sum(), given)))
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    return results[0]


def kept(function):
    """What one call keeps for its backward pass, in bytes of distinct memory."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(sizes.values())


# --- By hand and by finite differences ----------------------------------------------------------


def test_swiglu_by_hand():
    """silu(0) = 0 with slope 1/2; up = 3."""
    gate = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    up = torch.full((1,), 3.0, dtype=torch.float64, requires_grad=True)
    out = swiglu(gate, up)
    out.backward(torch.full((1,), 2.0, dtype=torch.float64))
    assert (out.item(), gate.grad.item(), up.grad.item()) == (0.0, 3.0, 0.0)


def test_rms_norm_by_hand():
    """The root mean square of (1, 7) is 5."""
    x = torch.tensor([1.0, 7.0], dtype=torch.float64)
    weight = torch.tensor([10.0, 1.0], dtype=torch.float64)
    assert rms_norm(x, weight, 0.0).tolist() == pytest.approx([2.0, 1.4])


def test_a_quarter_turn_by_hand():
    """(a, b) turns to (-b, a); the gradient turns back."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    out = rotate(x, torch.zeros(4), torch.ones(4))
    assert out.tolist() == [-3.0, -4.0, 1.0, 2.0]
    out.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [3.0, 4.0, -1.0, -2.0]


def test_gradients_by_finite_differences():
    weight, cos, sin = normal(4, seed=2), normal(1, 2, 4, seed=3), normal(1, 2, 4, seed=4)
    x, y = normal(3, 2, 4).requires_grad_(), normal(3, 2, 4, seed=1).requires_grad_()
    assert gradcheck(swiglu, (x, y))
    assert gradcheck(lambda x: rms_norm(x, weight, 0.1), (x,))
    assert gradcheck(lambda x: rotate(x, cos, sin), (x,))


# --- Against the formulas, for every shape ------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_swiglu_is_its_formula(shape, seed):
    assert_same(swiglu, plain_swiglu, [normal(*shape, seed=seed), normal(*shape, seed=seed + 100)])


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99), eps=st.sampled_from([1e-6, 1e-2, 10.0]))
def test_rms_norm_is_its_formula(shape, seed, eps):
    weight = normal(shape[-1], seed=seed + 100)
    assert_same(
        lambda x: rms_norm(x, weight, eps),
        lambda x: plain_norm(x, weight, eps),
        [normal(*shape, seed=seed)],
        1e-7,  # the gradient of a row of one number is what is left of two that cancel
    )


@settings(max_examples=40, deadline=None)
@given(lead=SHAPES, half=st.integers(1, 4), seed=st.integers(0, 99), data=st.data())
def test_rotate_is_its_formula_however_the_angles_broadcast(lead, half, seed, data):
    ones = data.draw(st.lists(st.booleans(), min_size=len(lead), max_size=len(lead)))
    skip = data.draw(st.integers(0, len(lead)))
    angles = tuple(1 if one else n for one, n in zip(ones, lead, strict=True))[skip:]
    # Not a rotation's: cos and sin are any numbers, so no mistake hides in a symmetry.
    cos, sin = (
        normal(*angles, 2 * half, seed=seed + 100),
        normal(*angles, 2 * half, seed=seed + 200),
    )
    assert_same(
        lambda x: rotate(x, cos, sin),
        lambda x: plain_rotation(x, cos, sin),
        [normal(*lead, 2 * half, seed=seed)],
    )


def test_one_row_may_be_turned_by_many_angles():
    cos, sin = normal(3, 1, 5, 4, seed=1), normal(3, 1, 5, 4, seed=2)
    out, _ = assert_same(
        lambda x: rotate(x, cos, sin),
        lambda x: plain_rotation(x, cos, sin),
        [normal(1, 2, 5, 4)],
    )
    assert out.shape == (3, 2, 5, 4)


def test_layouts_and_gradients_without_memory_of_their_own():
    """Heads are transposed views, and the gradient of a sum is one number seen many times."""
    x, weight = normal(2, 3, 5, 4).transpose(1, 2), normal(4, seed=1)
    cos, sin = normal(3, 4, seed=2), normal(3, 4, seed=3)
    pairs = [
        (lambda x: swiglu(x, x.flip(1)), lambda x: plain_swiglu(x, x.flip(1))),
        (lambda x: rms_norm(x, weight, 0.1), lambda x: plain_norm(x, weight, 0.1)),
        (lambda x: rotate(x, cos, sin), lambda x: plain_rotation(x, cos, sin)),
    ]
    for ours, plain in pairs:
        a, b = (x.detach().requires_grad_() for _ in range(2))
        torch.testing.assert_close(ours(a), plain(b))
        ours(a).sum().backward()
        plain(b).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)


def test_nothing_is_written_into_what_was_given():
    gate, up, weight, cos, sin = (normal(4, seed=n).requires_grad_(n < 2) for n in range(5))
    before = [t.detach().clone() for t in (gate, up, weight, cos, sin)]
    grad = torch.ones(4, dtype=torch.float64)
    for out in (swiglu(gate, up), rms_norm(gate, weight, 0.1), rotate(gate, cos, sin)):
        out.backward(grad)
    assert all(torch.equal(a, b) for a, b in zip(before, (gate, up, weight, cos, sin), strict=True))
    assert torch.equal(grad, torch.ones(4, dtype=torch.float64))


# --- Numbers at the edge ------------------------------------------------------------------------


def test_a_row_of_zeros_has_a_gradient():
    weight = torch.tensor([1.0, 2.0, 3.0])
    x = torch.zeros(2, 3, requires_grad=True)
    out = rms_norm(x, weight, 1e-6)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 3))
    torch.testing.assert_close(x.grad, (1e3 * weight).expand(2, 3))


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e4, 1e15])
def test_large_and_small_numbers_in_float32(size):
    """Hidden states of some models reach tens of thousands."""
    weight = normal(16, seed=1, dtype=torch.float32)
    # In float64 the formula is right to many digits; the gradient's leading parts do not cancel.
    x = size * normal(3, 16, dtype=torch.float32)
    own, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    found, expected = rms_norm(own, weight, 1e-6), plain_norm(exact, weight.double(), 1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    weights = normal(3, 16, seed=2)
    (found * weights.float()).sum().backward()
    (expected * weights).sum().backward()
    assert (own.grad.double() - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()
    assert own.grad.abs().min() > 0


def test_a_gate_far_out_is_open_or_shut():
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    up = torch.full((4,), 2.0, requires_grad=True)
    out = swiglu(gate, up)
    out.sum().backward()
    assert out.tolist() == [0.0, pytest.approx(0.0, abs=1e-40), 200.0, 2e4]
    assert gate.grad.tolist() == [0.0, pytest.approx(0.0, abs=1e-40), 2.0, 2.0]
    assert up.grad.tolist() == [0.0, pytest.approx(0.0, abs=1e-40), 100.0, 1e4]


# --- What is kept -------------------------------------------------------------------------------


def test_less_is_kept_for_the_backward_pass():
    gate, up = (normal(64, 32, seed=n).requires_grad_() for n in range(2))
    weight, cos, sin = normal(32, seed=2), normal(1, 32, seed=3), normal(1, 32, seed=4)
    whole = gate.untyped_storage().nbytes()

    def usual_swiglu():
        return torch.nn.functional.silu(gate) * up

    assert kept(lambda: swiglu(gate, up)) == 2 * whole
    assert kept(usual_swiglu) == 3 * whole
    # The row, one number of it, and the weight.
    few = kept(lambda: rms_norm(gate, weight, 0.1))
    assert few == whole + whole // 32 + weight.untyped_storage().nbytes()
    assert few < kept(lambda: plain_norm(gate, weight, 0.1))
    # Angles only.
    assert kept(lambda: rotate(gate, cos, sin)) == 2 * whole // 64


# --- What a GPU's kernels compute, here without being compiled ------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_what_the_kernels_compute_are_the_formulas_and_their_gradients(dtype, tolerance):
    from prefopt import fused_layers as kernels

    gate, up, grad = (normal(5, 3, 8, seed=n).to(dtype) for n in range(3))
    weight, cos, sin = (
        normal(8, seed=3).to(dtype),
        *(normal(3, 8, seed=n).to(dtype) for n in (4, 5)),
    )
    exact = [x.double().requires_grad_() for x in (gate, up)]
    normed, scale = kernels.rms_norm_of(gate, weight, 0.1)
    cases = [
        (
            plain_swiglu(*exact),
            kernels.swiglu_of(gate, up),
            kernels.swiglu_gradients(grad, gate, up),
        ),
        (
            plain_norm(exact[0], weight.double(), 0.1),
            normed,
            (kernels.rms_norm_gradient(grad, gate, weight, scale),),
        ),
        (
            plain_rotation(exact[0], cos.double(), sin.double()),
            kernels.rotated_by(gate, cos, sin),
            (kernels.rotated_back(grad, cos, sin),),
        ),
    ]
    for expected, found, gradients in cases:
        wanted = torch.autograd.grad((expected * grad.double()).sum(), exact[: len(gradients)])
        for a, b in zip((found, *gradients), (expected, *wanted), strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= tolerance * b.norm()
