"""The elementwise parts of a transformer layer, each as one operation with few passes over memory.

    swiglu      silu(gate) * up                       (Shazeer 2020, arXiv:2002.05202)
    rms_norm    w x / sqrt(mean(x^2) + eps)           (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)
    rotate      x cos + rotate_half(x) sin            (Su et al. 2021, arXiv:2104.09864, eq. 34)

On a CPU such passes are a sixth of a training step's time and half of what is kept for the backward
pass. Pure tensors; `prefopt.training.fused_model` knows which modules they can stand in for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both (..., D); silu(gate) is computed again in the backward pass, not kept."""
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) over its root mean square, times a frozen weight (D,)."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of x (..., D) by angles whose cos and sin broadcast to it."""
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = torch.nn.functional.silu(gate).mul_(grad)
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return d_gate, d_up


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        # d x = s (g - x s^2 mean(g x)),  g = grad * w
        weighted = grad * weight
        along = torch.linalg.vecdot(weighted, x).unsqueeze(-1).div_(x.shape[-1])
        along.mul_(scale).mul_(scale).mul_(scale)
        return weighted.mul_(scale).addcmul_(x, along, value=-1), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _rotated(x, cos, first, second, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The halves of sin change places: it multiplies what the other half was.
        first, second = sin.chunk(2, dim=-1)
        return _rotated(grad, cos, second, first, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin_first: Tensor, sin_second: Tensor, sign: int) -> Tensor:
    out = x * cos
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    out_first.addcmul_(second, sin_first, value=-sign)
    out_second.addcmul_(first, sin_second, value=sign)
    return out
