"""Several processes that each hold a share of a training: what they have to do together.

    DDP                 each process has everything; gradients are added up once a step
    ZeRO-1, ZeRO-2      shares of optimiser and gradients: every backward pass is done together
    FSDP2, ZeRO-3       shares of the parameters too: so is every forward pass, and a weight is whole
                        only while its own module runs

Which micro-batches a process has follows from its rows, so some have more than others; what has to be
done together is done as often as by the process with the most. The only place that knows DTensor and
DeepSpeed. Knows no loss and no data.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Row = TypeVar("Row")


class Sharding(NamedTuple):
    """What the processes of a training hold shares of."""

    gradients: bool  # every backward pass must be done by all
    parameters: bool  # and every forward pass


def sharding_of(accelerator: Any) -> Sharding:
    """What the launcher asked for.

    Raises:
        ValueError: FSDP of version 1, or ZeRO-3 that parts weights as soon as they are loaded.
    """
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None:
        if deepspeed.zero_stage == 3 and deepspeed.zero3_init_flag:
            raise ValueError(
                "zero3_init_flag parts the weights while they are loaded, before an adapter can be "
                "put on them and a reference taken. Set zero3_init_flag: false in the accelerate "
                "config, as recipes/accelerate/zero3.yaml does."
            )
        return Sharding(gradients=deepspeed.zero_stage >= 1, parameters=deepspeed.zero_stage == 3)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is None:
        return Sharding(gradients=False, parameters=False)
    if fsdp.fsdp_version != 2:
        raise ValueError(
            "FSDP 1 flattens parameters, so that what trains and what is frozen are one. Set "
            "fsdp_version: 2 in the accelerate config, as recipes/accelerate/fsdp2.yaml does."
        )
    return Sharding(gradients=True, parameters=True)


def keep_outputs_whole(accelerator: Any) -> None:
    """Let FSDP2 multiply in half precision, but leave log-probabilities and gradients in float32."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.mixed_precision_policy is not None:
        policy = fsdp.mixed_precision_policy
        # Gradients are added up in float32 too: rounding them to bfloat16 first loses small ones.
        fsdp.mixed_precision_policy = type(policy)(
            param_dtype=policy.param_dtype,
            reduce_dtype=torch.float32,
            output_dtype=None,
            cast_forward_inputs=policy.cast_forward_inputs,
        )


def is_parted(parameter: Tensor) -> bool:
    """Whether this process holds a share of a parameter only, outside of its module's own forward."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def holds_parts(model: Any) -> bool:
    """Whether any parameter of a model is parted."""
    return any(is_parted(parameter) for parameter in model.parameters())


def n_elements(parameter: Tensor) -> int:
    """How many numbers a parameter has, wherever they are."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def n_trained(model: Any) -> int:
    """How many numbers of a model train."""
    return sum(n_elements(p) for p in model.parameters() if p.requires_grad)


def run_within(module: Any, function: Callable[[Tensor], Any], rows: Tensor) -> Any:
    """Call a function as a module's forward, whose hooks make the module's weights whole for it."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        return module(rows)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def most(accelerator: Any, n: int) -> int:
    """The largest of a number that each process has one of."""
    if accelerator.num_processes == 1:
        return n
    return int(accelerator.gather(torch.tensor([n], device=accelerator.device)).max())


def counted_once(
    accelerator: Any, rows: Sequence[Row], batch_size: int, n_rows: int | None = None
) -> Sequence[Row]:
    """A process's rows without those that fill up the last batches, so that all have as many.

    Args:
        accelerator: whose data loader the rows came from last.
        rows: of one batch.
        batch_size: of a process.
        n_rows: of the data set; accelerate's own count is off in a run that goes on from a
            checkpoint. None takes it nevertheless.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader:
        return rows
    left = state.remainder if n_rows is None else n_rows % (batch_size * accelerator.num_processes)
    if left <= 0:
        return rows
    return rows[: max(0, left - accelerator.process_index * batch_size)]


@contextlib.contextmanager
def read_whole() -> Iterator[None]:
    """Within the block transformers loads whole weights, also once it knows of a ZeRO-3 training."""
    from transformers.integrations import deepspeed

    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known


@contextlib.contextmanager
def pass_of_step(accelerator: Any, model: Any, sharding: Sharding, *, last: bool) -> Iterator[None]:
    """One of the forward and backward passes that make an optimiser step.

    Processes add up their gradients, and DeepSpeed steps, at the last one. Shares of gradients are
    added up at every pass: whole ones kept until the last would take the memory that sharding saves.
    """
    before = accelerator.sync_gradients
    wait = contextlib.nullcontext() if last or sharding.gradients else accelerator.no_sync(model)
    accelerator.sync_gradients = before and last
    try:
        with wait:
            yield
    finally:
        accelerator.sync_gradients = before


# --- Steps on several groups of parameters -------------------------------------------------------


def forget_gradients(accelerator: Any) -> None:
    """Let what has no gradient of this step yet begin at 0; call it before the backward pass.

    ZeRO-3 does so at a step's first backward pass only, which is not every parameter's first
    (DeepSpeed 0.19).
    """
    optimizer = _zero_optimizer(accelerator)
    if optimizer is not None and hasattr(optimizer, "micro_step_id"):
        optimizer.micro_step_id = 0


@contextlib.contextmanager
def clipped_by_group(accelerator: Any, limits: Sequence[float]) -> Iterator[list[Tensor]]:
    """Within the block DeepSpeed's step clips each of the optimiser's groups by itself.

    Args:
        accelerator: which may use anything else: then nothing happens.
        limits: the largest norm of each group's gradient.

    Yields:
        a list that holds the groups' norms after the step.
    """
    norms: list[Tensor] = []
    optimizer = _zero_optimizer(accelerator)
    if optimizer is None:
        yield norms
        return
    engine = accelerator.deepspeed_engine_wrapped.engine
    own, clip = engine.step, optimizer.clip_grad

    def step(*args: Any, **kwargs: Any) -> None:
        norms.extend(_clip_groups(accelerator, optimizer, limits))
        optimizer.clip_grad = 0.0
        own(*args, **kwargs)

    engine.step = step
    try:
        yield norms
    finally:
        del engine.step
        optimizer.clip_grad = clip


def _clip_groups(accelerator: Any, optimizer: Any, limits: Sequence[float]) -> Tensor:
    """Scale this process's shares of the gradients; returns the groups' norms."""
    of = getattr(optimizer, "sub_group_to_group_id", None)  # ZeRO-3 parts groups further
    shares: list[list[Tensor]] = [[] for _ in limits]
    for i in range(len(optimizer.bit16_groups if of is None else optimizer.fp16_groups)):
        shares[i if of is None else of[i]] += optimizer.averaged_gradients[i]
    squares = torch.stack(
        [torch.stack([g.double().square().sum() for g in share]).sum() for share in shares]
    )
    norms: Tensor = accelerator.reduce(squares, reduction="sum").sqrt()
    for share, norm, limit in zip(shares, norms, limits, strict=True):
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for gradient in share:
            gradient.mul_(factor.to(gradient.dtype))
    return norms


def _zero_optimizer(accelerator: Any) -> Any:
    engine = getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)
    return None if engine is None else engine.optimizer


# --- Whole weights and optimiser states ----------------------------------------------------------


class WholeCopy:
    """A model's structure, whose weights are there, whole, while `filled` says so.

    What shards cannot do, such as generating a token at a time, is done on it: weights are gathered
    once, and not with every forward pass.

    Args:
        model: before it is sharded.
    """

    def __init__(self, model: Any) -> None:
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
            for p in model.parameters()
        }
        self._empty = {name: memo[id(p)] for name, p in model.named_parameters()}
        self.model = copy.deepcopy(model, memo)
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                # A tied weight is in several places.
                self._places.setdefault(id(parameter), []).append((module, name))

    @contextlib.contextmanager
    def filled(self, model: Any, accelerator: Any) -> Iterator[Any]:
        """Within the block the copy has the model's weights; all processes must enter it together.

        Args:
            model: the sharded one.
            accelerator: that sharded it, and says on which device and in which precision it computes.
        """
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(accelerator.device))
        dtype = _multiplied_in(accelerator)
        try:
            for name, parameter in model.named_parameters():
                whole = _gathered(parameter).to(accelerator.device, dtype or parameter.dtype)
                self._put(name, nn.Parameter(whole, requires_grad=False))
            yield self.model
        finally:
            for name, empty in self._empty.items():
                self._put(name, empty)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        for module, own in self._places[id(self._empty[name])]:
            setattr(module, own, parameter)


def _gathered(parameter: Any) -> Tensor:
    """A parameter whole, as it is multiplied; all processes must call it."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            whole: Tensor = parameter.detach().clone()
            return whole
    found: Tensor = unsharded(parameter.detach())
    return found


def _multiplied_in(accelerator: Any) -> Any:
    """The dtype to which FSDP2 casts weights for a forward pass, if it does."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    return getattr(getattr(fsdp, "mixed_precision_policy", None), "param_dtype", None)


def whole_weights(
    model: Any, wanted: Callable[[str, Tensor], bool] = lambda *_: True, *, keep: bool = True
) -> dict[str, Tensor]:
    """Parameters and saved buffers, whole and on the CPU; all processes must call it.

    What DeepSpeed trains is taken from its float32 copy, which is what the next step starts from.

    Args:
        model: perhaps parted.
        wanted: whether a parameter is, by its name.
        keep: False only helps the other processes and returns nothing.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if wanted(name, parameter):
            whole = _whole(parameter)
            if keep:
                found[name] = whole.detach().to("cpu", copy=True)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if keep and name in saved and wanted(name, buffer):
            found[name] = buffer.detach().to("cpu", copy=True)
    return found


def _whole(parameter: Any) -> Tensor:
    if parameter.requires_grad and (hasattr(parameter, "_z3_optimizer") or _in_float32(parameter)):
        from deepspeed.utils import safe_get_full_fp32_param

        whole: Tensor = safe_get_full_fp32_param(parameter)
        return whole.view(getattr(parameter, "ds_shape", parameter.shape))
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return unsharded(parameter)


def _in_float32(parameter: Any) -> bool:
    """Whether ZeRO-1 or ZeRO-2 holds shares of a float32 copy of a parameter."""
    return getattr(parameter, "_dp_group", None) is not None


def unsharded(value: Any) -> Any:
    """A tensor, of a DTensor the whole of it; all processes must call it."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_optimizer_state(optimizer: Any, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An optimiser's state as one process alone would save it; all processes must call it.

    Args:
        optimizer: as accelerate prepared it.
        groups: its parameter groups as they were made.
    """
    inner = optimizer.optimizer
    if not _is_zero(inner):
        state = inner.state_dict()
        whole = {
            i: {name: _on_cpu(unsharded(value)) for name, value in of.items()}
            for i, of in state["state"].items()
        }
        return {"state": whole, "param_groups": state["param_groups"]}
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_states(inner)
    states = {}
    for i, parameter in enumerate(p for group in groups for p in group["params"]):
        flat = _flat_of(inner, parameter)
        held = {}
        for name, value in inner.optimizer.state.get(flat, {}).items():
            if isinstance(value, Tensor) and value.shape == flat.shape:
                value = safe_get_full_optimizer_state(parameter, name)
                value = value.view(getattr(parameter, "ds_shape", parameter.shape))
            held[name] = _on_cpu(value)
        states[i] = held
    current, start, said = iter(inner.optimizer.param_groups), 0, []
    for group in groups:
        n = len(group["params"])  # ZeRO leaves groups of nothing out
        options = {k: v for k, v in (next(current) if n else group).items() if k != "params"}
        said.append(options | {"params": list(range(start, start + n))})
        start += n
    return {"state": states, "param_groups": said}


def load_optimizer_state(
    optimizer: Any, state: dict[str, Any], groups: Sequence[dict[str, Any]]
) -> None:
    """Give each process its share of what `whole_optimizer_state` returned; all must call it."""
    inner = optimizer.optimizer
    if not _is_zero(inner):
        held = [p for group in inner.param_groups for p in group["params"]]
        shares = {
            i: {name: _share(value, held[i]) for name, value in of.items()}
            for i, of in state["state"].items()
        }
        inner.load_state_dict({"state": shares, "param_groups": state["param_groups"]})
        return
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    base = inner.optimizer
    by_element = []
    for i, parameter in enumerate(p for group in groups for p in group["params"]):
        flat = _flat_of(inner, parameter)
        for name, value in state["state"].get(i, {}).items():
            if isinstance(value, Tensor) and value.dim():
                base.state[flat].setdefault(name, torch.zeros_like(flat))
                by_element.append((parameter, value.to(flat.device), name))
            else:
                base.state[flat][name] = _on_cpu(value)
    _link_states(inner)
    for parameter, value, name in by_element:
        if hasattr(parameter, "ds_id"):
            # Of a parameter that processes cannot share evenly DeepSpeed 0.19 sets no whole state.
            safe_set_local_optimizer_state(parameter, _zero3_share(parameter, value), name)
        else:
            safe_set_full_optimizer_state(parameter, value, name)
    filled = [group for group in state["param_groups"] if group["params"]]
    for group, saved in zip(base.param_groups, filled, strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})


def _zero3_share(parameter: Any, value: Tensor) -> Tensor:
    """This process's share of a tensor like a parameter, filled up with zeros at the end."""
    n, process = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
    share = value.new_zeros(n)
    own = value.flatten()[n * process : n * (process + 1)]
    share[: own.numel()] = own
    return share


def _is_zero(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.")


def _link_states(optimizer: Any) -> None:
    """Let ZeRO-1 and ZeRO-2 find every parameter's share of the states.

    They do it once, after the first step of the first group, when the others have none yet (DeepSpeed
    0.19).
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _flat_of(optimizer: Any, parameter: Any) -> Tensor:
    """The share of a ZeRO optimiser's flat float32 weights in which a parameter lies."""
    if hasattr(parameter, "ds_id"):
        group = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
        flat: Tensor = optimizer.fp32_partitioned_groups_flat[group]
        return flat
    for group, members in enumerate(optimizer.bit16_groups):
        if any(member is parameter for member in members):
            part: Tensor = optimizer.single_partition_of_fp32_groups[group]
            return part
    raise ValueError("a parameter that trains is not among those of the optimiser.")


def _on_cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _share(value: Any, parameter: Any) -> Any:
    """This process's share of a tensor that is parted as a parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
