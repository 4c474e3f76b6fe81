"""A linear layer with a low-rank update as one operation.

    y = x W^T + b + s (x A^T) B^T        (Hu et al. 2021, arXiv:2106.09685, eq. 3)

The update is accumulated into the product with the frozen weight, so neither direction makes
passes over full-size intermediates for it. Pure tensors; which layers are such layers is known to
`prefopt.models`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefopt.matrix_product import matrix_product


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """The layer's output; gradients for x, a and b. The weight and bias are taken as frozen.

    Args:
        x: (..., D).
        weight: (O, D), without gradient.
        bias: (O,) or None, without gradient.
        a: (r, D), the down-projection.
        b: (O, r), the up-projection.
        scaling: s, alpha / r in plain LoRA.

    Returns:
        (..., O), in the dtype that all operands must share.
    """
    result: Tensor = _LoraLinear.apply(x, weight, bias, a, b, scaling)
    return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (T, D)
        low = rows @ a.t()  # (T, r)
        out = matrix_product(rows, weight, bias).addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])  # (T, O)
        pulled = grad @ b  # (T, r)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (
                matrix_product(grad, weight.t())
                .addmm_(pulled, a, alpha=ctx.scaling)
                .view(ctx.shape)
            )
        d_a = d_b = None
        if ctx.needs_input_grad[3]:
            d_a = (pulled.t() @ rows).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            # (r, O), then transposed: a product with few rows is faster than one with few columns.
            d_b = (low.t() @ grad).mul_(ctx.scaling).t()
        return d_x, None, None, d_a, d_b, None
