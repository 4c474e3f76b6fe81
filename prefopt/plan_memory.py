"""A training step -> the memory it takes, by running the step without numbers.

The training code itself runs on torch's fake tensors, which have shapes and no memory, and every
tensor that it makes and lets go is counted. So nothing is modelled: what autograd keeps for which
layer, what gradient checkpointing spares, what the output head needs, are those of the model's own
code and of ours. A model of many layers is run with three and with five, and what a layer adds is
added up: the same for all that are alike.

What no tensor of the step is (allocators, libraries, the optimiser's states, other processes) is
`prefopt.plan`'s.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prefopt.errors import ModelError
from prefopt.logprobs import head_chunk_rows, score_tokens
from prefopt.matrix_product import matrix_product
from prefopt.models import LoRASettings, lora_config, wrap_with_adapter
from prefopt.plan_model import layer_of, meta_model, with_layers
from prefopt.training.fused_model import NOTHING_FUSED, FusedPlan, plan_fused_layers
from prefopt.training.tree_model import (
    Scoring,
    add_answer_scoring,
    answer_states,
    base_model,
    output_head,
    register_attention,
    tree_attention,
)
from prefopt.trees import AnswerTree, TreeBatch, pack_trees

Pass = Literal["logprobs", "scores", "values"]
"""What a step computes: log-probabilities of answers (DPO, SFT, PPO's policy), a score at each
answer's end (reward models), or a value at each answer token (PPO's value)."""

Bytes = Mapping[str, float]
"""Bytes by part: "weights", "adapter", "cast weights", "gradients", "attention", "MLP", "norms",
"other", "head", "backward"."""

_SHALLOW, _DEEP = 3, 5


@dataclass(frozen=True)
class StepSettings:
    """What of a configuration decides about a step's tensors.

    Args:
        dtype: of the base weights, "float32", "bfloat16" or "float16".
        autocast: whether the step runs under bfloat16 autocast.
        lora: the adapter that trains; None trains all weights.
        gradient_checkpointing: recompute activations layer by layer.
        activation_offloading: keep activations in the host's memory.
        quantised: whether linear layers are kept in 4 bits.
        on_gpu: whether the step runs on a GPU, which has other kernels.
        accumulates: whether gradients of earlier micro-batches are there already.
    """

    dtype: str = "float32"
    autocast: bool = False
    lora: LoRASettings | None = None
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    quantised: bool = False
    on_gpu: bool = False
    accumulates: bool = True


class StepMemory(NamedTuple):
    """What a step holds at its fullest moment, weights included, and what the forward pass keeps."""

    peak: Bytes
    kept: Bytes
    n_trained: int

    @property
    def peak_bytes(self) -> float:
        """All parts together."""
        return sum(self.peak.values())


def step_memory(
    config: Any, trees: Sequence[AnswerTree], settings: StepSettings, passes: Pass = "logprobs"
) -> StepMemory:
    """The memory of one micro-batch's forward and backward pass.

    Args:
        config: of the model, as `read_config` returns it.
        trees: the micro-batch.
        settings: see `StepSettings`.
        passes: what is computed.

    Raises:
        ModelError: the model's own code looks at numbers, or it cannot attend along trees.
    """
    n = int(config.get_text_config().num_hidden_layers)
    if n <= _DEEP:
        traces = [(n, _trace(config, trees, settings, passes))]
    else:
        traces = [
            (d, _trace(with_layers(config, d), trees, settings, passes)) for d in (_SHALLOW, _DEEP)
        ]
    moments = {
        name: _at_depth(n, [(d, t.moments.get(name, {})) for d, t in traces])
        for name in traces[0][1].moments
    }
    peak = max(moments.values(), key=lambda parts: sum(parts.values()))
    kept = _at_depth(n, [(d, t.kept) for d, t in traces])
    trained = _at_depth(n, [(d, {"n": float(t.n_trained)}) for d, t in traces])["n"]
    return StepMemory(peak, kept, round(trained))


def _at_depth(n: int, found: Sequence[tuple[int, Bytes]]) -> Bytes:
    """Bytes by part at n layers, on the line through what was found at other depths."""
    if len(found) == 1:
        return dict(found[0][1])
    (low, few), (high, many) = found
    parts = [*few, *(p for p in many if p not in few)]
    line = {}
    for part in parts:
        a, b = few.get(part, 0.0), many.get(part, 0.0)
        line[part] = max(0.0, a + (b - a) * (n - low) / (high - low))
    return line


class _Trace(NamedTuple):
    moments: dict[str, Bytes]  # the fullest moment of each stretch of the step
    kept: Bytes  # what the backward pass finds
    n_trained: int


def _trace(
    config: Any, trees: Sequence[AnswerTree], settings: StepSettings, passes: Pass
) -> _Trace:
    """Run the step on fake tensors and count."""
    register_attention()
    matrix_product(torch.zeros(16, 2), torch.zeros(2, 2))  # tries its library once, with numbers
    fused = NOTHING_FUSED
    if settings.on_gpu or settings.dtype == "float32":
        fused = _fused_kinds(config)._replace(any_dtype=settings.on_gpu)
    model = meta_model(config, getattr(torch, settings.dtype))
    if settings.lora is not None:
        model = wrap_with_adapter(model, lora_config(settings.lora))
    elif passes != "logprobs":
        model.get_output_embeddings().requires_grad_(False)
    model.train()
    if settings.gradient_checkpointing:
        if settings.lora is not None:
            model.enable_input_require_grads()
        base_model(model).gradient_checkpointing_enable()
    batch = pack_trees(trees, feed_last=passes == "scores")
    fake = FakeTensorMode()
    try:
        with fake:
            _give_fake_memory(model)
            on_fake = (fake.from_tensor(x) if isinstance(x, Tensor) else x for x in batch)
            return _run(model, TreeBatch(*on_fake), settings, passes, fused)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"{type(base_model(model)).__name__} decides by numbers what it computes "
            f"({type(error).__name__}: {error}), so its memory cannot be planned without them."
        ) from error
    except (RuntimeError, TypeError, NotImplementedError) as error:  # it is somebody else's code
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(
            f"the step of {type(base_model(model)).__name__} in {settings.dtype} does not run without "
            f"numbers: {first}. Another dtype may."
        ) from error


def _give_fake_memory(model: Any) -> None:
    """Fake tensors in place of those on the meta device; what was shared stays so."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _run(
    model: Any, batch: TreeBatch, settings: StepSettings, passes: Pass, kinds: FusedPlan
) -> _Trace:
    base = base_model(model)
    add_answer_scoring(base)
    scoring = Scoring("tree", fused=_fused_modules(model, kinds))
    count = _LiveBytes()
    n_layers = base.config.get_text_config().num_hidden_layers
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    adapter = settings.lora is not None
    for parameter in model.parameters():
        count.hold(parameter, "adapter" if adapter and parameter.requires_grad else "weights")
    for buffer in model.buffers():
        count.hold(buffer, "weights")
    for name, parameter in trained:
        if settings.accumulates:
            parameter.grad = torch.empty_like(parameter)
            count.hold(parameter.grad, "gradients")
        parameter.register_post_accumulate_grad_hook(count.at_gradient(layer_of(name), n_layers))
    if settings.quantised:
        _dequantise_in_passes(model)
    for name, module in model.named_modules():
        part = _part_of(name)
        if part is not None:
            module.register_forward_pre_hook(count.enter(part))
            module.register_forward_hook(count.leave, always_call=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast)
    attention = _kernel_attention(base) if settings.on_gpu else contextlib.nullcontext()
    offload = _offloaded(model) if settings.activation_offloading else contextlib.nullcontext()
    with count, tree_attention(model, scoring), attention, offload:
        with autocast:
            index = batch.ends if passes == "scores" else batch.predictor
            hidden = answer_states(model, batch, scoring, index)
            count.part = "head"
            if passes == "logprobs":
                head = output_head(base)
                rows = head_chunk_rows("cuda" if settings.on_gpu else "cpu", head.weight.shape[0])
                loss = score_tokens(hidden, head, batch.targets, chunk_rows=rows).logprobs.sum()
            else:
                loss = hidden.float().mean()
        del hidden
        kept = dict(count.live)
        count.stretch, count.backward = "top", True
        loss.backward()
    return _Trace(count.fullest, kept, sum(p.numel() for _, p in trained))


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, by the part of the step that made them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, float] = {}
        self.fullest: dict[str, Bytes] = {}
        self.part, self.stretch, self.backward = "other", "forward", False
        self._total = 0.0
        self._highest: dict[str, float] = {}
        self._outer: list[str] = []
        self._held: dict[int, tuple[str, int]] = {}
        self._watched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for at every turn, and known
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        part = "backward" if self.backward else self.part
        if func is torch.ops.aten._to_copy.default:
            source = self._held.get(args[0].untyped_storage()._cdata)
            if source is not None and source[0] in ("weights", "adapter"):
                part = "cast weights"
        for made in tree_iter(out):
            if isinstance(made, Tensor):
                self.hold(made, part)
        if self._total > self._highest.get(self.stretch, -1.0):
            self._highest[self.stretch] = self._total
            self.fullest[self.stretch] = dict(self.live)
        return out

    def hold(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's memory, once for all its views, until it is let go."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or not size:
            return
        self._held[key] = (part, size)
        self._add(part, size)
        self._watched[key] = weakref.ref(storage, functools.partial(self._let_go, key))

    def _let_go(self, key: int, _: Any) -> None:
        del self._watched[key]
        part, size = self._held.pop(key)
        self._add(part, -size)

    def _add(self, part: str, size: int) -> None:
        self.live[part] = self.live.get(part, 0.0) + size
        self._total += size

    def at_gradient(self, layer: int | None, n_layers: int) -> Callable[[Tensor], None]:
        """A hook for a parameter of that layer: its gradient is there, so far has the pass come."""

        def hook(parameter: Tensor) -> None:
            if layer is not None:
                last = layer == n_layers - 1
                self.stretch = "top" if last else "bottom" if layer <= 1 else "middle"
            if parameter.grad is None:
                return
            key = parameter.grad.untyped_storage()._cdata
            part, size = self._held.get(key, ("gradients", 0))
            if part != "gradients":
                self._held[key] = ("gradients", size)
                self._add(part, -size)
                self._add("gradients", size)

        return hook

    def enter(self, part: str) -> Callable[..., None]:
        """A hook before a module: what is made from now on belongs to that part."""

        def hook(*_: Any) -> None:
            self._outer.append(self.part)
            self.part = part

        return hook

    def leave(self, *_: Any) -> None:
        """A hook after it."""
        self.part = self._outer.pop()


def _part_of(module_name: str) -> str | None:
    last = module_name.rpartition(".")[2].lower()
    if "norm" in last or last.startswith("ln_"):
        return "norms"
    if last in ("attn", "self_attn", "attention", "self_attention"):
        return "attention"
    if last in ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "experts"):
        return "MLP"
    return None


# --- What a device does otherwise ----------------------------------------------------------------


def _fused_kinds(config: Any) -> FusedPlan:
    """Which layers of this architecture run fused: found on one layer with numbers."""
    from transformers import AutoModelForCausalLM

    small = with_layers(config, 1)
    text = small.get_text_config()
    # What kind of layer it is does not hang on these, and they are most of a large model's numbers.
    for name, few in (("vocab_size", 8), ("pad_token_id", None), ("intermediate_size", 64)):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, few)
    with torch.random.fork_rng(devices=[]):
        real = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    real.requires_grad_(False)
    return plan_fused_layers(real)


def _fused_modules(model: Any, kinds: FusedPlan) -> FusedPlan:
    """The same kinds of layers in another model; norms only where none trains."""
    eps = {type(module): value for module, value in kinds.norms}
    mlps = {type(module) for module in kinds.mlps}
    norms = [(m, eps[type(m)]) for m in model.modules() if type(m) in eps]
    if any(p.requires_grad for m, _ in norms for p in m.parameters()):
        norms = []
    mine = tuple(m for m in model.modules() if type(m) in mlps)
    return kinds._replace(norms=tuple(norms), mlps=mine)


@contextlib.contextmanager
def _kernel_attention(base: Any) -> Iterator[None]:
    """Within the block, attention keeps what a fused kernel on a GPU keeps, whatever its mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        out: Tensor = _Kernel.apply(query.to(value.dtype), key.to(value.dtype), value)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("prefopt_plan", attend)
    AttentionMaskInterface.register("prefopt_plan", lambda *_, **__: None)
    before = base.config._attn_implementation
    base.config._attn_implementation = "prefopt_plan"
    try:
        yield
    finally:
        base.config._attn_implementation = before


class _Kernel(torch.autograd.Function):
    """What FlashAttention and FlexAttention keep (Dao 2023, arXiv:2307.08691, algorithms 1, 2)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, log_sums = ctx.saved_tensors
        delta = torch.empty_like(log_sums)
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        del delta
        return gradients


@contextlib.contextmanager
def _offloaded(model: Any) -> Iterator[None]:
    """Within the block, what is kept for the backward pass is not in the device's memory."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    def pack(x: Tensor) -> Any:
        if x.numel() < 1024 or x.untyped_storage()._cdata in own:  # as TRL's offloading
            return x
        return x.shape, x.stride(), x.dtype

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        shape, stride, dtype = kept
        return torch.empty_strided(shape, stride, dtype=dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _dequantise_in_passes(model: Any) -> None:
    """Linear layers that write their weight out for each product, as 4-bit layers do."""
    head = base_model(model).get_output_embeddings()
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, torch.nn.Linear):
            # Adapters on quantised layers run PEFT's own code.
            module.forward = types.MethodType(type(module).forward, module)
        plain = type(module) is torch.nn.Linear and module is not head
        if plain and not module.weight.requires_grad:
            module.forward = types.MethodType(_quantised_forward, module)


def _quantised_forward(module: Any, x: Tensor) -> Tensor:
    out: Tensor = _Quantised.apply(x, module.weight)
    return out if module.bias is None else out + module.bias


class _Quantised(torch.autograd.Function):
    """bitsandbytes' product: the weight in full for as long as the product takes, nothing kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(x, torch.empty_like(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ torch.empty_like(weight).to(grad.dtype), None
