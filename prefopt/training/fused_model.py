"""A model's own layers -> the operations of `prefopt.fused_layers`, where they are the same function.

Which modules qualify is found by trying: each is called with random input, and its output and gradient
are compared with the fused operation's. What differs and norms that train keep their own forward; so
does, on a CPU, all that is not float32. Nothing is replaced outside of `fused_layers`' block.
"""

from __future__ import annotations

import contextlib
import copy
import sys
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
    lora: bool = True  # plain LoRA layers too
    any_dtype: bool = False  # as on a GPU; else in float32 outside autocast only


NOTHING_FUSED = FusedPlan((), (), ())
"""Fused LoRA layers only."""

AS_IT_IS = FusedPlan((), (), (), lora=False)
"""Every module runs itself, as it must where its weights are there only while it does."""


def plan_fused_layers(model: Any) -> FusedPlan:
    """Find the modules of a model that `fused_layers` may replace.

    In float32 on a CPU, in all dtypes but float64 on a GPU: elsewhere nothing was measured to be
    faster. If any norm trains, all are left, so that a reference with the same plan rounds as the
    policy does.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    on_gpu = device.type == "cuda"
    if dtype not in (_TOLERANCE if on_gpu else (torch.float32,)) or device.type not in (
        "cpu",
        "cuda",
    ):
        return NOTHING_FUSED
    norms, mlps, homes = [], [], {}
    norms_train = False
    for module in model.modules():
        kind = type(module)
        if "forward" in vars(module):
            continue
        if kind.__name__.endswith("RMSNorm"):
            norms_train |= any(p.requires_grad for p in module.parameters())
            eps = _norm_eps(module)
            if eps is not None:
                norms.append((module, eps))
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            if _same_mlp(module, parameter):
                mlps.append(module)
        elif "attention" in kind.__name__.lower():
            home = sys.modules[kind.__module__]
            if hasattr(home, "apply_rotary_pos_emb"):
                homes[home.__name__] = home
    rotaries = tuple(home for home in homes.values() if _same_rotation(home.apply_rotary_pos_emb))
    return FusedPlan(() if norms_train else tuple(norms), tuple(mlps), rotaries, any_dtype=on_gpu)


@contextlib.contextmanager
def fused_layers(model: Any, plan: FusedPlan) -> Iterator[None]:
    """Within the block the planned modules, and plain LoRA layers, run as fused operations.

    Calls that a stand-in was not tried for, on a CPU those under autocast too, go to the model's own.
    """
    # Blocks nest where the reference is the policy's own model: what is replaced stays so.
    norms = [
        (m, eps) for m, eps in plan.norms if "forward" not in vars(m) and not m.weight.requires_grad
    ]
    mlps = [m for m in plan.mlps if "forward" not in vars(m)]
    rotaries = [(home, home.apply_rotary_pos_emb) for home in plan.rotaries]
    with fused_lora(model) if plan.lora else contextlib.nullcontext():
        for module, eps in norms:
            fused = _norm_forward(module, eps)
            module.forward = _stand_in(fused, module.forward, 1, plan.any_dtype, module.weight)
        for module in mlps:
            module.forward = _stand_in(_mlp_forward(module), module.forward, 1, plan.any_dtype)
        for home, original in rotaries:
            home.apply_rotary_pos_emb = _rotary(original, plan.any_dtype)
        try:
            yield
        finally:
            for module in (*(m for m, _ in norms), *mlps):
                del module.forward
            for home, original in rotaries:
                home.apply_rotary_pos_emb = original


def _stand_in(
    fused: Callable[..., Any],
    original: Callable[..., Any],
    n: int,
    any_dtype: bool,
    *weights: Tensor,
) -> Callable[..., Any]:
    """`fused` where it is called with n tensors of a dtype it was tried for, else `original`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        plain = (
            len(args) == n and not kwargs and len({x.dtype for x in (*args, *weights)}) == 1
        ) and (
            args[0].dtype in _TOLERANCE
            if any_dtype
            else args[0].dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        )
        return (fused if plain else original)(*args, **kwargs)

    return forward


def _norm_forward(module: Any, eps: float) -> Callable[[Tensor], Tensor]:
    return lambda x: rms_norm(x, module.weight.detach(), eps)


def _mlp_forward(module: Any) -> Callable[[Tensor], Any]:
    return lambda x: module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))


def _rotary(original: Callable[..., Any], any_dtype: bool) -> Callable[..., Any]:
    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if not cos.shape[-1] == q.shape[-1] == k.shape[-1]:  # a part of each head only
            return original(q, k, cos, sin)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return _stand_in(fused, original, 4, any_dtype)


# How far two roundings of the same number may be apart, against the largest number of its row.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def _same(theirs: Callable[[Tensor], Any], ours: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether two functions have the same output and the same gradient at every row of x."""
    results, allowed = [], _TOLERANCE[x.dtype]
    for function in (theirs, ours):
        at = x.clone().requires_grad_()
        try:
            # Both draw the same, unless one has dropout that the other has not.
            devices = [x.device] if x.is_cuda else []
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                out = function(at)
                weights = torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)
                (gradient,) = torch.autograd.grad((out * weights).sum(), at)
        except Exception:  # it is somebody else's code
            return False
        results.append((out.detach(), gradient))
    return all(
        a.shape == b.shape
        and bool(((a - b).abs().amax(-1) <= allowed * a.abs().amax(-1)).all().item())
        for a, b in zip(*results, strict=True)
    )


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _norm_eps(module: Any) -> float | None:
    """The eps of a module that does what `rms_norm` does; None if it does not."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (isinstance(weight, Tensor) and weight.dim() == 1 and isinstance(eps, float)):
        return None
    # Only in small rows does it matter where the eps goes.
    x = _random(3, weight.numel()) * torch.tensor([[1.0], [eps**0.5], [0.0]])
    x = x.to(weight)
    if weight.device.type != "cpu":  # first in float32, where differences show
        exact = copy.deepcopy(module).float().cpu()
        if not _same(exact, _norm_forward(exact, eps), x.float().cpu()):
            return None
    return eps if _same(module, _norm_forward(module, eps), x) else None


def _same_mlp(module: Any, like: Tensor) -> bool:
    width = getattr(module.gate_proj, "in_features", None)
    if not isinstance(width, int):
        return False
    training = module.training
    module.train()
    try:
        return _same(module, _mlp_forward(module), _random(1, 3, width).to(like))
    finally:
        module.train(training)


def _same_rotation(function: Callable[..., Any]) -> bool:
    angles = _random(1, 5, 8)  # its halves differ, so nothing that reads one half only is the same
    cos, sin = angles.cos(), angles.sin()

    def both(apply: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda at: torch.cat(apply(at, at[:, :1] * 2.0, cos, sin), dim=1)

    return _same(both(function), both(_rotary(function, False)), _random(1, 2, 5, 8))
