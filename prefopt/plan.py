"""A configuration -> the memory and time it will take, before it is run.

    plan_training(PlanConfig(model="Qwen/Qwen3-8B", gpus="8xH100-80GB", strategy="fsdp2"))

The step's tensors are counted by `prefopt.plan_memory`, operations by `prefopt.plan_time`. This module
adds what is no tensor of the step, shares it out over the devices, and says what to change where it
does not fit. Nothing of a model but its `config.json` is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from prefopt.errors import DataError, ModelError
from prefopt.plan_config import Method, PlanConfig
from prefopt.plan_hardware import Devices, parse_devices
from prefopt.plan_model import ModelFacts, count_model, read_config
from prefopt.plan_result import Change, MemoryPart, Plan, TimePlan, duration_said
from prefopt.plan_rows import sizes_of_data

if TYPE_CHECKING:
    from prefopt.plan_memory import Pass, StepMemory, StepSettings
    from prefopt.plan_time import Rates, RowSize


# Bytes of optimiser states for each trained parameter: two moments in float32 (Kingma & Ba 2015), or
# in 8 bits with a scale for each 256 (Dettmers et al. 2022, arXiv:2110.02861); paged ones lie in the
# host.
_STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 0.0, "sgd": 0.0}
# NF4 and FP4: half a byte and a float32 for each 64 weights, or that in 8 bits (Dettmers et al. 2023,
# arXiv:2305.14314, section 3).
_FOUR_BIT_BYTES = {
    False: 0.5 + 4 / 64,
    True: 0.5 + 1 / 64 + 4 / (64 * 256),
}  # by double quantisation
_GENERATED_AT_ONCE = 256  # answers, as the rollout engine does

# What a process holds beside tensors. CUDA: context, cuBLAS workspaces and compiled kernels. CPU:
# Python with torch and transformers, before a model is loaded.
_RUNTIME_BYTES = {True: 0.9e9, False: 0.75e9}
# Of what is allocated and freed during a step, how much more the allocator holds: assumed for CUDA,
# and for glibc as benchmarks/quality_plan.py measured it, where the pieces of one micro-batch lie in
# the way of the next and where there is none.
_FRAGMENTATION_ON_GPU = 0.05
_FRAGMENTATION = {True: 0.4, False: 0.05}
# Rows, the autograd graph and the trainer's own objects: so much in every case that was measured.
_BOOKKEEPING_BYTES = 52e6
_MOST_TRACED_ROWS = 32


def plan_training(config: PlanConfig) -> Plan:
    """Predict what a configuration takes.

    Raises:
        ModelError: the model's configuration cannot be read, or its step cannot be traced.
        DataError: the data cannot be read.
    """
    return _Planner(config).plan()


class _Planner:
    """One configuration, with what is worked out once for all its variants."""

    def __init__(self, config: PlanConfig) -> None:
        self.config, self.devices = config, parse_devices(config.gpus)
        self.model = read_config(config.shape or config.model)
        self.facts: ModelFacts = count_model(self.model)
        self.remarks: list[str] = []
        self.rows, self.rare, self.n_rows = self._rows()
        limit = self.facts.max_positions
        longest = max(p + max(answers) for p, answers in (*self.rows, *self.rare))
        if limit is not None and longest > limit:
            self.remarks.append(
                f"the longest prompt with an answer has {longest:,} tokens, and the model is made for "
                f"{limit:,}: set max_length, or another model"
            )

    # --- Rows ------------------------------------------------------------------------------------

    def _rows(self) -> tuple[list[RowSize], list[RowSize], float]:
        """Usual rows, longer ones too rare to count in the means, and how many rows there are."""
        config = self.config
        rare: list[RowSize] = []
        if config.data is not None:
            rows, n = sizes_of_data(config, self.remarks)
        else:
            k = config.n_answers
            usual = (config.prompt_tokens, (config.answer_tokens,) * k)
            mean = config.prompt_tokens + k * config.answer_tokens
            longest = 2 * mean if config.longest_tokens is None else config.longest_tokens
            factor = max(1.0, longest / mean)
            long = tuple(math.ceil(factor * a) for a in usual[1])
            rows = [usual] * min(config.rows, 4 * config.batch_size)
            if config.rows > len(rows):
                rare = [(max(1, longest - sum(long)), long)]
            n = float(config.rows)
        if config.max_length is not None:
            rows, rare = (_cut_all(part, config.max_length) for part in (rows, rare))
            if not rows:
                raise DataError(
                    f"no row has room for an answer within max_length={config.max_length}."
                )
        return rows, rare, n

    def _fullest(self, config: PlanConfig) -> list[RowSize]:
        """The rows of the micro-batch that feeds the most tokens."""
        from prefopt.trees import split_by_tokens

        budget, mine = _budget(config, self.devices), _rows_a_device(config, self.devices)
        best: list[RowSize] = []
        steps = [self.rows[start : start + mine] for start in range(0, len(self.rows), mine)]
        steps += [[*steps[0][: mine - 1], row] for row in self.rare]
        for step in steps:
            sizes = [_fed(row) for row in step]
            for members in split_by_tokens(sizes, budget):
                found = [step[i] for i in members]
                if sum(map(_fed, found)) > sum(map(_fed, best)):
                    best = found
        return best

    # --- Memory ----------------------------------------------------------------------------------

    def _settings(self, config: PlanConfig) -> StepSettings:
        from prefopt.plan_memory import StepSettings

        mine, budget = _rows_a_device(config, self.devices), _budget(config, self.devices)
        in_step = sum(_fed(row) for row in self.rows[:mine])
        return StepSettings(
            dtype=_dtype(config, self.devices),
            autocast=_autocast(config, self.devices),
            lora=config.lora if config.tune == "lora" else None,
            gradient_checkpointing=config.gradient_checkpointing,
            activation_offloading=config.activation_offloading,
            quantised=config.lora.quantization != "none",
            on_gpu=self.devices.is_gpu,
            accumulates=in_step > budget or config.method == "ppo",
        )

    def _step(self, config: PlanConfig, rows: Sequence[RowSize]) -> StepMemory:
        """The fullest of the method's passes."""
        from prefopt.plan_memory import step_memory

        settings = self._settings(config)
        found = [
            step_memory(self.model, _trees(rows), settings, passes)
            for passes in _passes(config.method)
        ]
        return max(found, key=lambda step: step.peak_bytes)

    def _parts(self, config: PlanConfig, rows: Sequence[RowSize]) -> list[MemoryPart]:
        """All that one device holds at its fullest moment."""
        step = self._step(config, rows)
        return list(self._composed(config, step, sum(map(_fed, rows))))

    def _composed(self, config: PlanConfig, step: StepMemory, n_fed: int) -> Iterator[MemoryPart]:
        facts, devices = self.facts, self.devices
        n, strategy = devices.count, config.strategy
        peak = dict(step.peak)
        base = peak.pop("weights", 0.0)
        width = base / facts.n_parameters  # of a weight, in bytes
        remark = f"{facts.n_parameters:,} in {_dtype(config, devices)}"
        if config.lora.quantization != "none":
            packed = _FOUR_BIT_BYTES[config.lora.quantization.endswith("-double")]
            base -= facts.n_linear * (width - packed)
            remark = f"{facts.n_linear:,} of {facts.n_parameters:,} in 4 bits"
        copies = _copies(config)
        shards_weights = n if strategy in ("fsdp2", "zero3") else 1
        shards_states = n if strategy != "ddp" else 1
        yield MemoryPart(name="weights", n_bytes=base / shards_weights, remark=remark)
        if copies.models > 1:
            yield MemoryPart(
                name="further models",
                n_bytes=(copies.models - 1) * base / shards_weights,
                remark=copies.remark,
            )
        adapter = peak.pop("adapter", 0.0)
        if adapter:
            yield MemoryPart(
                name="adapters",
                n_bytes=copies.adapters * adapter / shards_weights,
                remark=f"{copies.adapters} x {step.n_trained:,} parameters",
            )
        trained = float(step.n_trained * copies.trained)
        gradients = peak.pop("gradients", 0.0) * copies.trained
        if gradients:
            yield MemoryPart(name="gradients", n_bytes=gradients / shards_states)
        states = trained * _STATE_BYTES[config.optimizer]
        remark = config.optimizer
        if strategy in ("zero2", "zero3") and width < 4 and config.tune == "full":
            states += 4 * trained
            remark += ", and weights in float32"
        yield MemoryPart(
            name="optimiser", n_bytes=states / shards_states,
            remark=f"{remark}, {trained:,.0f} trained",
        )  # fmt: skip
        names = {
            "attention": "activations: attention",
            "MLP": "activations: MLP",
            "norms": "activations: norms",
            "other": "activations: between layers",
            "cast weights": "weights in bfloat16 (autocast)",
            "head": "output head, in chunks",
            "backward": "backward pass",
        }
        moving = 0.0
        for part, name in names.items():
            if peak.get(part, 0.0) > 0:
                yield MemoryPart(name=name, n_bytes=peak[part])
                moving += peak[part]
        if n > 1:
            yield _exchanged(config, facts, trained, width)
        if config.method == "ppo":
            sampling = self._sampling(config, width)
            remark = "keys and values of the answers that are generated at once"
            if shards_weights > 1:
                sampling += base
                remark = f"the whole model, gathered for it, and {remark}"
            if sampling > moving:
                yield MemoryPart(
                    name="sampling beyond that", n_bytes=sampling - moving, remark=remark
                )
                moving = sampling
        in_step = sum(map(_fed, self.rows[: _rows_a_device(config, devices)]))
        share = _FRAGMENTATION[in_step > n_fed or config.method == "ppo"]
        if devices.is_gpu:
            share = _FRAGMENTATION_ON_GPU
        yield MemoryPart(
            name="allocator",
            n_bytes=share * moving,
            remark=f"assumed: {share:.0%} of what comes and goes",
        )
        if not devices.is_gpu:
            yield MemoryPart(
                name="bookkeeping",
                n_bytes=_BOOKKEEPING_BYTES,
                remark="rows, graph, trainer's objects",
            )
        yield MemoryPart(
            name="runtime",
            n_bytes=_RUNTIME_BYTES[devices.is_gpu],
            remark="assumed: CUDA's context and kernels" if devices.is_gpu else "Python, libraries",
        )

    def _sampling(self, config: PlanConfig, width: float) -> float:
        """Keys and values of the answers generated at once, and the logits they are drawn from."""
        facts, k = self.facts, config.n_answers
        prompts = min(_rows_a_device(config, self.devices), max(1, _GENERATED_AT_ONCE // k))
        longest = max(p + max(a) for p, a in (*self.rows, *self.rare))
        per_token = 2 * facts.n_layers * facts.n_kv_heads * facts.head_dim * width
        cache = prompts * k * longest * per_token
        # One layer's are written anew while the old ones are there, with its heads repeated.
        in_layer = cache / facts.n_layers * (1 + facts.n_heads / facts.n_kv_heads)
        logits = (
            4 * 4 * prompts * k * facts.vocab_size
        )  # raw, cooled, probabilities, one in passing
        return cache + in_layer + logits

    # --- The plan --------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The plan, with what would help where it does not fit."""
        config, devices = self.config, self.devices
        rows = self._fullest(config)
        step = self._step(config, rows)
        parts = list(self._composed(config, step, sum(map(_fed, rows))))
        peak = sum(part.n_bytes for part in parts)
        fits = peak <= devices.memory_bytes
        budget = _budget(config, devices)
        fed = sum(map(_fed, rows))
        if fed > budget:
            self.remarks.append(
                f"the longest row feeds {fed:,} tokens, more than micro_batch_tokens={budget:,}: it "
                "goes through the model alone, and a smaller setting spares nothing; set max_length"
            )
        copies = _copies(config)
        return Plan(
            model=config.shape.params if config.shape else config.model,
            family=self.facts.family,
            n_parameters=self.facts.n_parameters,
            n_trained=round(step.n_trained * copies.trained),
            method=config.method,
            devices=devices.name,
            n_devices=devices.count,
            strategy=config.strategy,
            micro_batch_tokens=budget,
            fullest_micro_batch=fed,
            memory=tuple(parts),
            peak_bytes=peak,
            step_bytes=_above_weights(parts),
            capacity_bytes=devices.memory_bytes,
            largest_micro_batch_tokens=self._largest(config) if config.suggest else None,
            changes=() if fits or not config.suggest else tuple(self._changes(peak)),
            time=self._time(rows),
            remarks=tuple(self.remarks),
        )

    def _largest(self, config: PlanConfig) -> int:
        """Tokens of the largest micro-batch of usual rows that fits; memory is a line in pieces."""
        usual, capacity = _usual(self.rows), self.devices.memory_bytes
        fed = _fed(usual)

        def point(n: int) -> tuple[int, float]:
            return n, sum(part.n_bytes for part in self._parts(config, [usual] * n))

        # On a CPU each row is attended to by itself, so many short ones take long to trace.
        most = 10**9 if self.devices.is_gpu else _MOST_TRACED_ROWS
        few = max(1, min(round(1024 / fed), most // 4))
        points = [point(few), point(max(few + 1, min(round(4096 / fed), most)))]
        while True:
            (a, low), (b, high) = points[-2:]
            slope = (high - low) / (b - a)
            n = math.floor(b + (capacity - high) / slope) if slope > 0 else 0
            # Where the line led, its next piece is looked for, once or twice.
            if n < 1 or n in (a, b) or n > most or len(points) == 4:
                return max(0, n) * fed
            points.append(point(n))

    def _changes(self, peak: float) -> Iterator[Change]:
        """What would help, the mildest first."""
        capacity = self.devices.memory_bytes
        for setting, changed, remark in _milder(self.config, self.devices):
            try:
                parts = self._parts(changed, self._fullest(changed))
            except (ModelError, ValueError):
                continue
            after = sum(part.n_bytes for part in parts)
            if after < 0.995 * peak:
                yield Change(
                    setting=setting, peak_bytes=after, saves_bytes=peak - after,
                    fits=after <= capacity, remark=remark,
                )  # fmt: skip

    # --- Time ------------------------------------------------------------------------------------

    def _rates(self, rows: Sequence[RowSize]) -> Rates | None:
        from prefopt.plan_time import assumed_rates, measure_rates

        config, devices = self.config, self.devices
        if not (devices.here and config.measure):
            found = assumed_rates(devices, config.utilisation)
            if found is None:
                self.remarks.append(
                    f"no time: nothing is known of how fast {devices.name} is. Name a GPU that is "
                    "known, or plan on the machine itself with measure=true"
                )
            return found
        passes = _passes(config.method)[0]
        return measure_rates(self.model, self.facts, _trees(rows), self._settings(config), passes)

    def _time(self, rows: Sequence[RowSize]) -> TimePlan | None:
        from prefopt.plan_time import assumed_rates, work_of

        rates = self._rates(rows)
        if rates is None:
            return None
        config, devices = self.config, self.devices
        steps = math.ceil(self.n_rows / config.batch_size) * config.epochs
        epoch = work_of(self.rows).times(self.n_rows / len(self.rows))
        if config.method == "ppo":
            in_rollout = work_of(self.rows).times(config.batch_size / len(self.rows))
            epoch, steps = in_rollout.times(config.rollouts), config.rollouts * config.epochs
        sized = config, self.facts, epoch, steps
        took, operations = _duration(*sized, rates, self._settings(config))
        took /= devices.count
        sustained = assumed_rates(devices, config.utilisation)
        if sustained is not None and not rates.is_assumed:
            lasting, _ = _duration(*sized, sustained, self._settings(config))
            lasting /= devices.count
            # A GPU runs its first second at a clock that it does not keep up for an hour.
            if lasting > took:
                source = f"{sustained.source}; {duration_said(took)} at the rate {rates.source}"
                took, rates = lasting, sustained._replace(source=source)
        if rates.is_assumed and self.facts.n_parameters < 1e9:
            self.remarks.append(
                "a model of this size leaves a GPU waiting for its kernels to start: take the time as "
                "the least it can be"
            )
        if devices.count > 1:
            self.remarks.append("time takes several devices to lose nothing to communication")
        if config.method == "ppo" and rates.tokens is None:
            self.remarks.append("time leaves out the sampling of answers and the reward's own")
        usd = config.usd_per_gpu_hour
        return TimePlan(
            seconds=took,
            optimizer_steps=math.ceil(steps),
            operations=operations,
            tokens_fed=epoch.fed * config.epochs,
            tokens_per_s=epoch.fed * config.epochs / took,
            source=rates.source,
            is_assumed=rates.is_assumed,
            usd=None if usd is None else usd * devices.count * took / 3600,
        )


def _duration(
    config: PlanConfig,
    facts: ModelFacts,
    epoch: Any,
    steps: float,
    rates: Rates,
    settings: StepSettings,
) -> tuple[float, float]:
    """Seconds and operations of the whole training, as if on one device."""
    from prefopt.plan_time import (
        adapter_size,
        scoring_operations,
        seconds,
        training_operations,
    )

    model = read_config(config.shape or config.model)
    n_adapter = adapter_size(model, settings)
    took = operations = 0.0
    for passes in _passes(config.method):
        done = training_operations(facts, epoch.times(config.epochs), settings, n_adapter, passes)
        took, operations = took + seconds(done, rates.training), operations + sum(done)
    # The reference is computed once for each answer; PPO scores by policy, reference, value, reward.
    with_head, without = {"dpo": (1, 0), "ppo": (2, 2)}.get(config.method, (0, 0))
    for head, times in ((True, with_head), (False, without)):
        done = scoring_operations(facts, epoch.times(times), head=head)
        took, operations = took + seconds(done, rates.scoring), operations + sum(done)
    trained = n_adapter if config.tune == "lora" else facts.n_parameters
    took += steps * trained * _copies(config).trained / rates.optimizer
    return took, operations


# --- Parts of a configuration --------------------------------------------------------------------


def _dtype(config: PlanConfig, devices: Devices) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if devices.is_gpu and config.tune == "lora" else "float32"


def _autocast(config: PlanConfig, devices: Devices) -> bool:
    return devices.is_gpu if config.autocast is None else config.autocast


def _budget(config: PlanConfig, devices: Devices) -> int:
    from prefopt.trees import default_micro_batch_tokens

    default = default_micro_batch_tokens("cuda" if devices.is_gpu else "cpu")
    return config.micro_batch_tokens or default


def _rows_a_device(config: PlanConfig, devices: Devices) -> int:
    return max(1, math.ceil(config.batch_size / devices.count))


def _fed(row: RowSize) -> int:
    return row[0] + sum(a - 1 for a in row[1])


def _usual(rows: Sequence[RowSize]) -> RowSize:
    """The row whose size is the median."""
    return sorted(rows, key=_fed)[len(rows) // 2]


def _cut(prompt: int, answers: tuple[int, ...], most: int) -> RowSize | None:
    room = most - prompt
    return None if room < 1 else (prompt, tuple(min(a, room) for a in answers))


def _cut_all(rows: Sequence[RowSize], most: int) -> list[RowSize]:
    return [cut for prompt, answers in rows if (cut := _cut(prompt, answers, most)) is not None]


def _trees(rows: Sequence[RowSize]) -> list[Any]:
    from prefopt.trees import AnswerTree

    return [AnswerTree((0,) * prompt, tuple((0,) * a for a in answers)) for prompt, answers in rows]


def _passes(method: Method) -> tuple[Pass, ...]:
    passes: dict[Method, tuple[Pass, ...]] = {
        "dpo": ("logprobs",), "sft": ("logprobs",), "reward": ("scores",),
        "ppo": ("logprobs", "values"),
    }  # fmt: skip
    return passes[method]


class _Copies(msgspec.Struct, frozen=True):
    """How many whole models and adapters there are, and how many of them train."""

    models: int
    adapters: int
    trained: int
    remark: str = ""


def _copies(config: PlanConfig) -> _Copies:
    if config.method == "ppo":
        if config.tune == "lora":
            return _Copies(1, 3, 2)  # policy, value, reward on one base
        return _Copies(4, 0, 2, "reference, value and reward model")
    if config.method == "dpo" and config.tune == "full":
        return _Copies(2, 0, 1, "the reference, a copy of the model")
    return _Copies(1, 1 if config.tune == "lora" else 0, 1)


def _exchanged(config: PlanConfig, facts: ModelFacts, trained: float, width: float) -> MemoryPart:
    """What several devices hold for each other, by each engine's defaults."""
    gathered = 2 * facts.n_largest + facts.n_input + facts.n_head
    if config.strategy == "ddp":
        return MemoryPart(
            name="exchange", n_bytes=4 * trained, remark="DDP's buckets, a copy of the gradients"
        )
    if config.strategy == "fsdp2":
        largest = facts.n_largest if config.tune == "full" else 0
        return MemoryPart(
            name="exchange", n_bytes=width * gathered + 4 * largest,
            remark="two layers and the embeddings gathered, a layer's gradients scattered",
        )  # fmt: skip
    buckets = 2 * min(trained, 5e8) * width
    if config.strategy == "zero2":
        return MemoryPart(name="exchange", n_bytes=buckets, remark="DeepSpeed's two buckets")
    live = min(1e9, facts.n_parameters)
    return MemoryPart(
        name="exchange", n_bytes=width * live + buckets,
        remark="DeepSpeed's live parameters (1e9) and buckets",
    )  # fmt: skip


def _milder(config: PlanConfig, devices: Devices) -> Iterator[tuple[str, PlanConfig, str]]:
    """Configurations that take less, each one change away, and what they cost."""
    budget = _budget(config, devices)
    if not config.gradient_checkpointing:
        changed = replace(config, gradient_checkpointing=True)
        yield "gradient_checkpointing=true", changed, "about a third more time"
    for smaller in (budget // 4, budget // 16):
        if smaller >= 256:
            changed = replace(config, micro_batch_tokens=smaller)
            yield f"micro_batch_tokens={smaller}", changed, "the same gradient"
    if not config.gradient_checkpointing and budget >= 1024:
        changed = replace(config, gradient_checkpointing=True, micro_batch_tokens=budget // 4)
        yield f"gradient_checkpointing=true and micro_batch_tokens={budget // 4}", changed, ""
    if config.dtype != "bfloat16" and devices.is_gpu and config.tune == "lora":
        yield "dtype=bfloat16", replace(config, dtype="bfloat16"), ""
    elif not _autocast(config, devices) and devices.is_gpu:
        yield "autocast=true", replace(config, autocast=True), "products in bfloat16"
    if config.tune == "full":
        if config.optimizer == "adamw":
            yield "optimizer=adamw_8bit", replace(config, optimizer="adamw_8bit"), ""
        yield "tune=lora", replace(config, tune="lora"), "trains an adapter instead"
    elif config.lora.quantization == "none" and devices.is_gpu and config.strategy != "zero3":
        changed = replace(config, lora=replace(config.lora, quantization="nf4"))
        yield "lora.quantization=nf4", changed, "slower; weights lose precision"
    if devices.is_gpu and not config.activation_offloading:
        changed = replace(config, activation_offloading=True)
        yield "activation_offloading=true", changed, "activations travel to the host and back"
    if devices.count > 1 and config.strategy == "ddp":
        yield "strategy=fsdp2", replace(config, strategy="fsdp2"), "weights shared among GPUs"


def _above_weights(parts: Sequence[MemoryPart]) -> float:
    """What a step adds to a loaded model with its adapters."""
    there = ("weights", "further models", "adapters", "runtime", "allocator", "bookkeeping")
    return sum(part.n_bytes for part in parts if part.name not in there)
