"""The product with a weight, by the fastest library this machine has for it.

On x86 CPUs torch's own float32 product goes to MKL, which leaves a tenth of the peak unused at the
sizes of small models and a third for an output head; oneDNN, in the same build of torch, does not.
Rounding differs in the last bits, as between any two libraries. Pure tensors.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Below this many rows there is nothing to gain.
_FEW_ROWS = 16


def matrix_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, without gradient: it is meant for inside of autograd functions.

    Args:
        x: (T, D).
        weight: (O, D); a transposed view is as good.
        bias: (O,) or None.

    Returns:
        (T, O).
    """
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if torch.compiler.is_compiling():  # the compiler has its own choice of library
        return torch.nn.functional.linear(x, weight, bias)
    if on_cpu and x.shape[0] >= _FEW_ROWS and weight.numel() and _has_onednn():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return torch.nn.functional.linear(x, weight, bias)


@cache
def _has_onednn() -> bool:
    """Whether this build of torch has the operator and it gives the right numbers."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1, 1, 20 * 3).view(20, 3)
    w = torch.linspace(-2, 3, 5 * 3).view(5, 3)
    bias = torch.arange(5.0)
    try:
        plain = torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
        turned = torch.ops.mkldnn._linear_pointwise(x, w.t().contiguous().t(), None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):  # it is not part of torch's promises
        return False
    return bool(torch.allclose(plain, x @ w.t() + bias) and torch.allclose(turned, x @ w.t()))
