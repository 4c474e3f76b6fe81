"""The chunked output head against plain log-softmax of all logits, and the sums over answers."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt.logprobs import (
    OutputHead,
    by_answer,
    discounted_logps,
    score_tokens,
    sum_by_answer,
)

V, D = 61, 16
HEADS = {
    "plain": {},
    "bias": {"with_bias": True},
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 2.5},
    "all": {"with_bias": True, "scale": 1.7, "softcap": 3.0},
}


def make(n, frozen=False, with_bias=False, dtype=torch.float32, vocabulary=V, **head):
    draw = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, D, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, D, generator=draw).to(dtype).requires_grad_(not frozen)
    bias = None
    if with_bias:
        bias = torch.randn(vocabulary, generator=draw).to(dtype).requires_grad_(not frozen)
    targets = torch.randint(vocabulary, (n,), generator=draw)
    return hidden, OutputHead(weight, bias, **head), targets


def all_logits(hidden, head):
    z = hidden @ head.weight.t()
    if head.bias is not None:
        z = z + head.bias
    z = head.scale * z
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def plain_logprobs(hidden, head, targets):
    return all_logits(hidden, head).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def gradients(logprobs, inputs):
    weights = torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype)
    return torch.autograd.grad((logprobs * weights).sum(), inputs)


def in_double(hidden, head):
    """The same operands with all the digits, to compare with."""
    double = [
        None if x is None else x.detach().double().requires_grad_()
        for x in (hidden, head.weight, head.bias)
    ]
    return double[0], OutputHead(double[1], double[2], head.scale, head.softcap)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])  # a chunk holds 128
def test_values_and_gradients_are_those_of_the_full_softmax(n, head, frozen):
    hidden, head, targets = make(n, frozen=frozen, **head)
    wide, wide_head = in_double(hidden, head)
    expected = plain_logprobs(wide, wide_head, targets)
    found = score_tokens(hidden, head, targets).logprobs
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    inputs = [hidden] if frozen else [x for x in (hidden, head.weight, head.bias) if x is not None]
    wide_inputs = [x for x in (wide, wide_head.weight, wide_head.bias) if x is not None]
    pairs = zip(inputs, gradients(found, inputs), gradients(expected, wide_inputs), strict=False)
    for operand, own, other in pairs:
        assert own.shape == operand.shape
        assert (own.double() - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_only_a_part_of_the_head_may_train(trained):
    hidden, head, targets = make(130, with_bias=True)
    parts = {"weight": head.weight, "bias": head.bias}
    for name, part in parts.items():
        part.requires_grad_(name == trained)
    hidden.requires_grad_(False)
    expected = gradients(plain_logprobs(hidden, head, targets), [parts[trained]])
    found = gradients(score_tokens(hidden, head, targets).logprobs, [parts[trained]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_statistics_are_those_of_the_full_softmax(head, frozen):
    hidden, head, targets = make(150, frozen=frozen, **head)
    logits = all_logits(hidden, head).detach()
    targets[::3] = logits.argmax(-1)[::3]  # so that some tokens are the most likely ones
    log_p = logits.log_softmax(-1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            scores = score_tokens(hidden, head, targets, log_sum_sq=True)
        entropy = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(scores.entropy, entropy, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores.mean_logit, logits.mean(-1), rtol=1e-5, atol=1e-5)
        squares = torch.logsumexp(2 * log_p, -1)
        torch.testing.assert_close(scores.log_sum_sq, squares, rtol=1e-5, atol=1e-5)
        assert torch.equal(scores.is_top1, logits.argmax(-1) == targets)
        assert 50 <= int(scores.is_top1.sum()) < 150
        assert scores.logprobs.requires_grad == grad
        assert not any(x.requires_grad for x in scores[1:])


def test_what_is_not_asked_for_is_zero_and_changes_nothing():
    hidden, head, targets = make(40)
    full = score_tokens(hidden, head, targets, log_sum_sq=True)
    bare = score_tokens(hidden, head, targets, statistics=False)
    assert torch.equal(full.logprobs, bare.logprobs)
    for values in bare[1:]:
        assert not values.any()
    assert not score_tokens(hidden, head, targets).log_sum_sq.any()
    assert score_tokens(hidden, head, targets, statistics=False, log_sum_sq=True).log_sum_sq.all()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_half_precision_is_close_and_reduced_in_float32(frozen):
    hidden, head, targets = make(200, frozen=frozen, dtype=torch.bfloat16, scale=0.5)
    wide, wide_head = in_double(hidden, head)
    expected = plain_logprobs(wide, wide_head, targets)
    found = score_tokens(hidden, head, targets)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.double(), expected, rtol=0.02, atol=0.05)
    (own,) = gradients(found.logprobs, [hidden])
    (other,) = gradients(expected, [wide])
    assert own.dtype == torch.bfloat16
    assert (own.double() - other).norm() <= 0.02 * other.norm()


def test_autocast_changes_neither_value_nor_gradient():
    hidden, head, targets = make(20)
    plain = score_tokens(hidden, head, targets).logprobs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = score_tokens(hidden, head, targets).logprobs
        (gradient,) = gradients(cast, [hidden])
    assert torch.equal(plain, cast)
    assert torch.equal(gradients(plain, [hidden])[0], gradient)


def test_likely_and_impossible_tokens_stay_finite():
    weight = torch.tensor([[1000.0], [-1000.0], [0.0]])
    hidden = torch.ones(2, 1, requires_grad=True)
    scores = score_tokens(hidden, OutputHead(weight), torch.tensor([0, 1]), log_sum_sq=True)
    assert scores.logprobs.tolist() == [0.0, -2000.0]
    assert scores.entropy.tolist() == pytest.approx([0.0, 0.0], abs=1e-3)
    assert scores.log_sum_sq.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(scores.logprobs.sum(), hidden)
    assert gradient.tolist() == [[0.0], [-2000.0]]


class _Sizes(TorchDispatchMode):
    """Remembers the most numbers that one tensor, and all living ones together, have held."""

    def __init__(self):
        super().__init__()
        self.largest = self.living = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            new = isinstance(x, torch.Tensor) and x._base is None
            if new and not any(x is given for given in args):  # neither a view nor in place
                n = x.numel()
                self.largest = max(self.largest, n)
                self.living += n
                weakref.finalize(x, self._free, n)
                self.peak = max(self.peak, self.living)
        return out

    def _free(self, n):
        self.living -= n


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_logits_are_never_there_at_once(frozen):
    n, vocabulary = 1280, 1000
    hidden, head, targets = make(n, frozen=frozen, vocabulary=vocabulary, softcap=3.0)
    with _Sizes() as sizes:
        gradients(score_tokens(hidden, head, targets, log_sum_sq=True).logprobs, [hidden])
    assert sizes.largest == 128 * vocabulary
    assert sizes.peak < 8 * 128 * vocabulary < n * vocabulary
    with _Sizes() as plain:  # what the measure says of the ordinary way
        gradients(plain_logprobs(hidden, head, targets), [hidden])
    assert plain.largest == n * vocabulary


# --- Sums over answers --------------------------------------------------------------------------

ANSWER_OF, LENGTHS = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([2, 1, 3])
VALUES = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0])


def test_sums_and_rows_by_hand():
    assert sum_by_answer(VALUES, ANSWER_OF, 3).tolist() == [-3.0, -4.0, -56.0]
    assert by_answer(VALUES, ANSWER_OF, LENGTHS).tolist() == [
        [-1.0, -2.0, 0.0],
        [-4.0, 0.0, 0.0],
        [-8.0, -16.0, -32.0],
    ]


def test_tokens_beyond_the_shorter_answer_are_discounted_by_hand():
    rows = by_answer(VALUES, ANSWER_OF, LENGTHS)
    answers, shared = torch.tensor([2, 0, 2, 1]), torch.tensor([2, 2, 1, 1])
    found = discounted_logps(rows, answers, shared, 0.25)
    assert found.tolist() == [-8 - 16 - 32 / 4, -3.0, -8 - 48 / 4, -4.0]
    assert discounted_logps(rows, answers, shared, 1.0).tolist() == [-56.0, -3.0, -56.0, -4.0]
    assert discounted_logps(rows, answers, shared, 0.0).tolist() == [-24.0, -3.0, -8.0, -4.0]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_rows_and_sums_hold_the_same_tokens_and_carry_their_gradients(lengths, seed):
    counts = torch.tensor(lengths)
    answer_of = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(len(answer_of), generator=draw, dtype=torch.float64).requires_grad_()
    rows = by_answer(values, answer_of, counts)
    expected = [part.sum().item() for part in values.split(lengths)]
    assert rows.sum(1).tolist() == pytest.approx(expected)
    assert sum_by_answer(values, answer_of, len(lengths)).tolist() == pytest.approx(expected)
    weights = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)
    for sums in (rows.sum(1), sum_by_answer(values, answer_of, len(lengths))):
        (gradient,) = torch.autograd.grad((sums * weights).sum(), values, retain_graph=True)
        assert torch.equal(gradient, weights[answer_of])
