"""Rows of tokens -> operations -> seconds.

Operations are counted for each weight, pair of attending tokens and entry of the output head. How
many a second a device does is measured where it is at hand, on a few layers of the very model with
random weights, or else assumed to be a share of what its vendor says. The plan takes the slower.

    forward    2 N T + 4 H d P L       N weights of the layers, T tokens, P pairs of tokens that attend
    backward   the same for what is frozen, twice that for what trains; 2.5 times for attention, whose
               scores are computed again (Dao 2023, arXiv:2307.08691, section 3.1)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from prefopt.errors import ModelError
from prefopt.plan_hardware import Devices
from prefopt.plan_memory import Pass, StepSettings
from prefopt.plan_model import ModelFacts, with_layers
from prefopt.trees import AnswerTree

UTILISATION = 0.42
"""Share of the vendor's figure that training is assumed to reach. Ours reached 37 to 47 % on an H200
(`benchmarks/quality_plan_gpu.py`), Llama 3 38 to 43 % on H100s (Grattafiori et al. 2024,
arXiv:2407.21783, table 4)."""

RowSize = tuple[int, tuple[int, ...]]
"""Tokens of a prompt and of each of its answers."""

_DEPTHS = (1, 4)


class Work(NamedTuple):
    """What rows feed to a model: numbers of tokens, and of pairs of tokens that attend."""

    rows: float
    fed: float
    scored: float
    pairs: float

    def times(self, factor: float) -> Work:
        """So many times that."""
        return Work(*(factor * x for x in self))


def work_of(rows: Sequence[RowSize]) -> Work:
    """Count rows as tree batches feed them: the prompt once, no answer's last token."""
    fed = scored = pairs = 0.0
    for prompt, answers in rows:
        fed += prompt + sum(a - 1 for a in answers)
        scored += sum(answers)
        pairs += prompt * (prompt + 1) / 2
        pairs += sum((a - 1) * prompt + (a - 1) * a / 2 for a in answers)
    return Work(len(rows), fed, scored, pairs)


class Operations(NamedTuple):
    """Operations in the layers and in the output head."""

    layers: float
    head: float


def training_operations(
    facts: ModelFacts, work: Work, settings: StepSettings, n_adapter: int, passes: Pass
) -> Operations:
    """Of forward and backward passes.

    Args:
        facts: of the model.
        work: what goes through it.
        settings: whether there is an adapter, and whether activations are computed again.
        n_adapter: the adapter's parameters.
        passes: as for `step_memory`.
    """
    forward = _forward(facts, work, n_adapter)
    dense, low = 2 * facts.n_matrices * work.fed, 2 * n_adapter * work.fed
    attention = forward - dense - low
    trains = settings.lora is None
    backward = dense * (2 if trains else 1) + 2 * low + 2.5 * attention
    again = forward if settings.gradient_checkpointing else 0.0
    one = 2 * facts.hidden_size * facts.vocab_size * work.scored
    head = 0.0 if passes != "logprobs" else one * (4 if trains else 2)
    return Operations(forward + backward + again, head)


def scoring_operations(
    facts: ModelFacts, work: Work, n_adapter: int = 0, *, head: bool = True
) -> Operations:
    """Of forward passes without gradient, through the output head or not."""
    one = 2 * facts.hidden_size * facts.vocab_size * work.scored
    return Operations(_forward(facts, work, n_adapter), one if head else 0.0)


def _forward(facts: ModelFacts, work: Work, n_adapter: int) -> float:
    attention = 4 * facts.n_heads * facts.head_dim * work.pairs * facts.n_layers
    return 2 * (facts.n_matrices + n_adapter) * work.fed + attention


class Rates(NamedTuple):
    """Operations a second of one device, in the passes of training and in those without gradient.

    `optimizer` is in parameters a second, `tokens` in sampled tokens a second for methods that sample.
    `source` says where the numbers are from.
    """

    training: Operations
    scoring: Operations
    optimizer: float
    tokens: float | None
    source: str
    is_assumed: bool


def seconds(work: Operations, rate: Operations) -> float:
    """How long operations take at a rate."""
    return sum(w / r for w, r in zip(work, rate, strict=True) if w)


def assumed_rates(devices: Devices, utilisation: float | None = None) -> Rates | None:
    """A share of what the vendor says; None where nothing is known of the device."""
    if devices.tflops is None or devices.gb_per_s is None:
        return None
    share = UTILISATION if utilisation is None else utilisation
    rate = share * devices.tflops * 1e12
    both = Operations(rate, rate)
    source = (
        f"assumed: {share:.0%} of the {devices.tflops:,.0f} TFLOP/s that the vendor of one "
        f"{devices.name} states"
    )
    # AdamW reads and writes weight, gradient and two moments, 28 bytes a parameter in float32.
    return Rates(both, both, devices.gb_per_s * 1e9 / 28, None, source, True)


def measure_rates(
    config: Any,
    facts: ModelFacts,
    trees: Sequence[AnswerTree],
    settings: StepSettings,
    passes: Pass,
    *,
    repeats: int = 3,
    clock: Callable[[], float] | None = None,
) -> Rates:
    """Time a micro-batch in a few layers of the model on the device at hand.

    What another layer costs is the difference between depths; the rest is the output head's.

    Args:
        config: of the whole model.
        facts: its counts.
        trees: a micro-batch as training will see it.
        settings: see `StepSettings`.
        passes: what is trained.
        repeats: of each measurement; the median counts.
        clock: seconds; None takes the wall's on a GPU and the process's own on a CPU.

    Raises:
        ModelError: the model takes no tree batches.
    """
    clock = clock or (time.perf_counter if settings.on_gpu else time.process_time)
    work = work_of([(len(p), tuple(map(len, answers))) for p, answers in trees])
    depths = [d for d in _DEPTHS if d < facts.n_layers] or [1]
    depths = depths if len(depths) > 1 else [1, min(2, facts.n_layers)]
    steps = {}
    for depth in dict.fromkeys(depths):
        model = _model(with_layers(config, depth), settings, passes)
        steps["training", depth] = _training_step(model, trees, settings, passes)
        steps["scoring", depth] = _scoring_step(model, trees, settings)
    optimizer, n_tried = _optimizer_step(settings)
    steps["optimizer", 0] = optimizer
    took = _turn_about(steps, repeats, clock)
    low, high = min(depths), max(depths)

    def rate(name: str, whole: Operations) -> Operations:
        layer = took[name, low]
        if high > low:
            layer = (took[name, high] - took[name, low]) / (high - low)
        rest = took[name, low] - low * layer
        of_head = whole.head / rest if rest > 0 and whole.head else float("inf")
        return Operations(whole.layers / facts.n_layers / max(layer, 1e-9), of_head)

    n_adapter = adapter_size(config, settings)
    where = "this GPU" if settings.on_gpu else "this machine"
    return Rates(
        training=rate("training", training_operations(facts, work, settings, n_adapter, passes)),
        scoring=rate("scoring", scoring_operations(facts, work)),
        optimizer=n_tried / took["optimizer", 0],
        tokens=None,
        source=f"measured on {where} with {low} and {high} layers and {work.fed:,.0f} tokens",
        is_assumed=False,
    )


def _turn_about(
    steps: dict[tuple[str, int], Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[tuple[str, int], float]:
    """Median seconds of each step, run one after the other, so that a drift favours none."""
    found: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for step in steps.values():
        step()  # libraries and allocators warm up
    for _ in range(repeats):
        for key, step in steps.items():
            start = clock()
            step()
            found[key].append(clock() - start)
    return {key: statistics.median(times) for key, times in found.items()}


def _model(config: Any, settings: StepSettings, passes: Pass) -> Any:
    """A model with random weights on the device at hand, and the adapter that trains."""
    import torch
    from transformers import AutoModelForCausalLM

    from prefopt.models import lora_config, wrap_with_adapter

    device = torch.device("cuda" if settings.on_gpu else "cpu")
    with torch.random.fork_rng(devices=[]):
        with device:  # a CPU would take longer to draw a large model's weights than all the rest
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
        if settings.lora is not None:
            model = wrap_with_adapter(model, lora_config(settings.lora))
    if settings.lora is None and passes != "logprobs":
        model.get_output_embeddings().requires_grad_(False)
    return model.train()


def adapter_size(config: Any, settings: StepSettings) -> int:
    """Parameters of the adapter on the whole model; 0 where all weights train."""
    import torch

    from prefopt.models import lora_config, wrap_with_adapter
    from prefopt.plan_model import meta_model

    if settings.lora is None:
        return 0
    model = wrap_with_adapter(meta_model(config, torch.float32), lora_config(settings.lora))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _training_step(
    model: Any, trees: Sequence[AnswerTree], settings: StepSettings, passes: Pass
) -> Callable[[], None]:
    import torch

    from prefopt.logprobs import score_tokens
    from prefopt.training.tree_model import (
        answer_states,
        base_model,
        choose_scoring,
        output_head,
        tree_attention,
    )
    from prefopt.trees import pack_trees

    scoring = choose_scoring(model)
    if scoring.way != "tree":
        raise ModelError(f"this model takes no tree batches: {scoring.reason}.")
    if settings.gradient_checkpointing:
        if settings.lora is not None:
            model.enable_input_require_grads()
        base_model(model).gradient_checkpointing_enable()
    device = next(model.parameters()).device
    batch = pack_trees(trees, feed_last=passes == "scores").to(device)
    index = batch.ends if passes == "scores" else batch.predictor

    def step() -> None:
        with tree_attention(model, scoring):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
                hidden = answer_states(model, batch, scoring, index)
                loss = hidden.float().mean()
                if passes == "logprobs":
                    head = output_head(base_model(model))
                    loss = score_tokens(hidden, head, batch.targets).logprobs.sum()
            loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _scoring_step(
    model: Any, trees: Sequence[AnswerTree], settings: StepSettings
) -> Callable[[], None]:
    import contextlib

    import torch

    from prefopt.training.tree_model import choose_scoring, score_answers, tree_attention
    from prefopt.trees import pack_trees

    scoring = choose_scoring(model)
    device = next(model.parameters()).device
    batch = pack_trees(trees).to(device)
    without = getattr(model, "disable_adapter", contextlib.nullcontext)

    def step() -> None:
        with (
            torch.no_grad(),
            without(),
            tree_attention(model, scoring),
            torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast),
        ):
            score_answers(model, batch, scoring, statistics=False)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _optimizer_step(settings: StepSettings) -> tuple[Callable[[], None], int]:
    """Clipping and AdamW on a few million parameters, and how many."""
    import torch

    n, device = 2**22, "cuda" if settings.on_gpu else "cpu"
    weight = torch.nn.Parameter(torch.zeros(n, device=device))
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer = torch.optim.AdamW([weight], lr=1e-5, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step, n
