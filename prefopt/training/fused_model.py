"""A model's own layers -> the operations of `prefopt.fused_layers`, where they are the same function.

Which modules qualify is found by trying: a module of each class is called with random input, and its
output and gradient are compared with the fused operation's. What differs, trains, or is not float32
on a CPU keeps its own forward. Nothing is replaced outside of `fused_layers`' block.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.fused_layers import rms_norm, rotate, swiglu
from prefopt.models import fused_lora


class FusedPlan(NamedTuple):
    """Which of a model's modules and functions can be stood in for."""

    norms: tuple[tuple[Any, float], ...]  # (module, eps)
    mlps: tuple[Any, ...]
    rotaries: tuple[Any, ...]  # Python modules with an `apply_rotary_pos_emb`


NOTHING_FUSED = FusedPlan((), (), ())


def plan_fused_layers(model: Any) -> FusedPlan:
    """Find the modules of a model that `fused_layers` may replace.

    Frozen modules only, in float32 on a CPU: elsewhere nothing was measured to be faster.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return NOTHING_FUSED
    agrees: dict[Any, bool] = {}
    norms, mlps, homes = [], [], {}
    for module in model.modules():
        kind = type(module)
        if "forward" in vars(module):
            continue
        if kind.__name__.endswith("RMSNorm"):
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            weight = getattr(module, "weight", None)
            frozen = isinstance(weight, Tensor) and not weight.requires_grad and weight.dim() == 1
            if frozen and isinstance(eps, float):
                if kind not in agrees:
                    agrees[kind] = _same_norm(module, eps)
                if agrees[kind]:
                    norms.append((module, eps))
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            if kind not in agrees:
                agrees[kind] = _same_mlp(module)
            if agrees[kind]:
                mlps.append(module)
        elif "attention" in kind.__name__.lower():
            home = sys.modules[kind.__module__]
            if hasattr(home, "apply_rotary_pos_emb"):
                homes[home.__name__] = home
    rotaries = tuple(home for home in homes.values() if _same_rotation(home.apply_rotary_pos_emb))
    return FusedPlan(tuple(norms), tuple(mlps), rotaries)


@contextlib.contextmanager
def fused_layers(model: Any, plan: FusedPlan) -> Iterator[None]:
    """Within the block the planned modules, and plain LoRA layers, run as fused operations."""
    if torch.is_autocast_enabled("cpu"):
        plan = NOTHING_FUSED
    # Blocks nest where the reference is the policy's own model: what is replaced stays so.
    norms = [(m, eps) for m, eps in plan.norms if "forward" not in vars(m)]
    mlps = [m for m in plan.mlps if "forward" not in vars(m)]
    rotaries = [(home, home.apply_rotary_pos_emb) for home in plan.rotaries]
    with fused_lora(model):
        for module, eps in norms:
            module.forward = _norm_forward(module, eps)
        for module in mlps:
            module.forward = types.MethodType(_mlp_forward, module)
        for home, original in rotaries:
            home.apply_rotary_pos_emb = _rotary(original)
        try:
            yield
        finally:
            for module in (*(m for m, _ in norms), *mlps):
                del module.forward
            for home, original in rotaries:
                home.apply_rotary_pos_emb = original


def _norm_forward(module: Any, eps: float) -> Callable[[Tensor], Tensor]:
    return lambda x: rms_norm(x, module.weight, eps)


def _mlp_forward(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return out


def _rotary(original: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def apply(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **others: Any
    ) -> tuple[Tensor, Tensor]:
        if others or not cos.shape[-1] == q.shape[-1] == k.shape[-1]:  # a part of each head only
            both: tuple[Tensor, Tensor] = original(
                q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **others
            )
            return both
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return apply


def _same(theirs: Callable[[Tensor], Any], ours: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether two functions have the same output and the same gradient at x."""
    results = []
    for function in (theirs, ours):
        at = x.clone().requires_grad_()
        try:
            with torch.enable_grad():
                out = function(at)
                weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
                (gradient,) = torch.autograd.grad((out * weights).sum(), at)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
        results.append((out.detach(), gradient))
    (a, da), (b, db) = results
    return a.shape == b.shape and all(
        bool(((u - v).abs().max() <= 1e-4 * v.abs().max()).item()) for u, v in ((b, a), (db, da))
    )


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _same_norm(module: Any, eps: float) -> bool:
    x = _random(3, module.weight.numel())
    return _same(module, lambda at: rms_norm(at, module.weight.detach(), eps), x)


def _same_mlp(module: Any) -> bool:
    layer = module.gate_proj
    width = getattr(layer, "in_features", None)
    if not isinstance(width, int):
        return False
    return _same(module, lambda at: _mlp_forward(module, at), _random(1, 3, width))


def _same_rotation(function: Any) -> bool:
    angles = torch.cat((_random(1, 5, 4), _random(1, 5, 4)), dim=-1)
    cos, sin = angles.cos(), angles.sin()

    def both(apply: Any) -> Callable[[Tensor], Tensor]:
        return lambda at: torch.cat(apply(at, at[:, :1] * 2.0, cos, sin), dim=1)

    return _same(both(function), both(_rotary(function)), _random(1, 2, 5, 8))
