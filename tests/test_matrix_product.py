"""The product with a weight against torch's own: values, shapes, layouts, and when it falls back."""

import pytest
import torch
from torch.nn.functional import linear

from prefopt import matrix_product as module
from prefopt.matrix_product import matrix_product


@pytest.fixture(autouse=True)
def asked_anew():
    """What this machine can do is remembered; a test that changes it must not be."""
    module._has_onednn.cache_clear()
    yield
    module._has_onednn.cache_clear()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Operator:
    """Stands in for the operator; counts its calls and returns what `answer` says."""

    def __init__(self, answer=lambda x, w, b, *how: linear(x, w, b)):
        self.calls, self.answer = 0, answer

    def __call__(self, *args):
        self.calls += 1
        return self.answer(*args)


def put(monkeypatch, operator):
    monkeypatch.setattr(torch.ops, "mkldnn", type("Library", (), {"_linear_pointwise": operator}))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    return operator


def assert_equal_to_torch(x, weight, bias=None):
    found = matrix_product(x, weight, bias)
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == exact.shape
    assert found.dtype == x.dtype
    # The rounding of a sum grows with its summands, not with what is left when they cancel.
    size = linear(
        x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs()
    )
    assert ((found.double() - exact).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 70])
@pytest.mark.parametrize(("d", "o"), [(1, 1), (8, 5), (33, 64), (128, 7)])
def test_it_is_the_product_for_every_shape(n, d, o, turned, bias):
    weight = normal(d, o).t() if turned else normal(o, d)
    assert weight.is_contiguous() != turned or 1 in (d, o)
    assert_equal_to_torch(normal(n, d, seed=1), weight, normal(o, seed=2) if bias else None)


@pytest.mark.parametrize("n", [3, 40])
def test_rows_may_lie_in_memory_in_any_way(n):
    weight, bias = normal(5, 6), normal(5, seed=2)
    layouts = {
        "turned": normal(6, n, seed=1).t(),
        "every second row": normal(2 * n, 6, seed=1)[::2],
        "a part of each row": normal(n, 9, seed=1)[:, 2:8],
        "one row again and again": normal(1, 6, seed=1).expand(n, 6),
    }
    for x in layouts.values():
        assert not x.is_contiguous()
        assert_equal_to_torch(x, weight, bias)
    assert_equal_to_torch(normal(n, 6, seed=1), normal(10, 6)[::2], normal(10, seed=2)[::2])


def test_a_sum_of_nothing_is_the_bias():
    bias = normal(3)
    assert torch.equal(matrix_product(torch.zeros(20, 0), torch.zeros(3, 0)), torch.zeros(20, 3))
    found = matrix_product(torch.zeros(20, 0), torch.zeros(3, 0), bias)
    assert torch.equal(found, bias.expand(20, 3))
    assert matrix_product(normal(20, 4), torch.zeros(0, 4)).shape == (20, 0)


def test_what_is_not_finite_stays_so():
    x, weight = normal(20, 4), normal(3, 4)
    x[2, 1], x[5, 0] = float("nan"), float("inf")
    found, expected = matrix_product(x, weight), linear(x, weight)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[2].isnan().all()
    assert found[5].isinf().all()


def test_the_operator_is_asked_from_sixteen_rows_on(monkeypatch):
    operator = put(monkeypatch, Operator())
    weight = normal(5, 8)
    assert torch.equal(matrix_product(normal(15, 8), weight), linear(normal(15, 8), weight))
    assert operator.calls == 0
    matrix_product(normal(16, 8), weight)
    assert operator.calls == 3  # it was tried twice before
    matrix_product(normal(16, 8), weight)
    assert operator.calls == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_types_take_torchs_own(dtype, monkeypatch):
    operator = put(monkeypatch, Operator())
    x, weight, bias = normal(20, 8, dtype=dtype), normal(5, 8, dtype=dtype), normal(5, dtype=dtype)
    assert torch.equal(matrix_product(x, weight, bias), linear(x, weight, bias))
    assert operator.calls == 0


def test_mixed_types_are_refused_as_by_torch():
    with pytest.raises(RuntimeError, match="dtype"):
        matrix_product(normal(20, 8), normal(5, 8, dtype=torch.float64))


def raises(error):
    def answer(*args):
        raise error("no such thing")

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        raises(AttributeError),
        raises(RuntimeError),
        raises(TypeError),
        lambda x, w, b, *how: linear(x, w),  # forgets the bias
        lambda x, w, b, *how: linear(x, w.as_strided(w.shape, (w.shape[1], 1)), b),
        lambda x, w, b, *how: linear(x, w, b) * 1.001,
        lambda x, w, b, *how: linear(x, w, b) * float("nan"),
    ],
    ids=[
        "missing",
        "refuses",
        "other arguments",
        "no bias",
        "ignores the layout",
        "inexact",
        "NaN",
    ],
)
def test_an_operator_that_is_missing_or_wrong_is_not_used(answer, monkeypatch):
    operator = put(monkeypatch, Operator(answer))
    x, weight, bias = normal(20, 8), normal(5, 8), normal(5)
    assert torch.equal(matrix_product(x, weight, bias), linear(x, weight, bias))
    tried = operator.calls
    assert tried in (1, 2)
    matrix_product(x, weight, bias)
    assert operator.calls == tried  # found out once


def test_a_build_without_the_library_takes_torchs_own(monkeypatch):
    operator = put(monkeypatch, Operator())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, weight = normal(20, 8), normal(5, 8)
    assert torch.equal(matrix_product(x, weight), linear(x, weight))
    assert operator.calls == 0
