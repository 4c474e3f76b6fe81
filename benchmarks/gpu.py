"""Prefopt on a GPU: are its trainers right there, how fast is DPO beside TRL, PPO, sampling, the plan.

    python benchmarks/gpu.py                                 # all of it on one CUDA device
    python benchmarks/gpu.py --only correctness              # or in parts: results are merged
    python benchmarks/gpu.py --only speed --lengths hh
    python benchmarks/gpu.py --only profile --shape 1b
    python benchmarks/gpu.py --device cpu --shape tiny --out somewhere     # the script itself

No network, no weights: models are made from a configuration, with random weights in bfloat16.

1. Correctness: log-probabilities and gradients of tiny families, by trees through FlexAttention, by
   trees through a dense mask, by padded rows and by segments. In float32 against the model's own
   logits. In bfloat16 against the same weights in float32; the model's own bfloat16 logits are the
   yardstick. Then a short LoRA training against `trl.DPOTrainer`: the same losses.
2. Speed: LoRA r = 16 on all linear layers, bfloat16, the same rows in the same steps. Of several
   `per_device_train_batch_size` of TRL, and of several `micro_batch_tokens` of prefopt, the fastest
   that fits in memory is compared, in turns (A B A B), in one process, on one copy of the base model.
   Also TRL with the rows of each step sorted by length, which is no setting of its own, once.
   Steps that warm up, and so compile, are left out and told apart.
3. Profile: the kernels of one prefopt step by the time they take.
4. Trainers: SFT, reward, DPO and PPO against themselves on a CPU (`gpu_trainers.py`).
5. Plan: what `prefopt plan` predicts against such a training (`gpu_plan.py`).
6. Sampling: against transformers' `generate` (`gpu_sampling.py`).
7. PPO: one base model with adapters beside four models (`gpu_ppo.py`).

Lengths are seeded log-normal draws, calibrated after clipping. `hh`: prompts of mean 164 and median
123 tokens, answers of mean 54 and 300 at most, as in Anthropic's helpful and harmless data; the
spread of the answers is an assumption. `ultrafeedback`: prompts of mean 150, answers of mean 350,
together 1,024 at most: an assumption, from prompts of 0.42 of a completion. `k4` and `k4_hh`: groups
of four answers of those lengths (k4: UltraFeedback's), all six pairs; TRL is given the pairs as rows.

FLOPs are those of the matrix products that the method needs: a token fed costs 4 N for the policy,
whose weights are frozen, and 2 N for the reference; N counts the weights of the linear layers. The
output head counts for answer tokens only. Attention, padding and recomputation count nothing.

On a CPU nothing is written without --out, and every figure is labelled.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib.metadata
import json
import logging
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import torch
import transformers
import trl
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import gpu_plan, gpu_ppo, gpu_sampling, gpu_trainers
from prefopt.training.dpo_trainer import DPOConfig, DPOTrainer
from prefopt.training.tree_model import Scoring, choose_scoring, score_answers, tree_attention
from prefopt.trees import AnswerTree

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("correctness", "trainers", "speed", "profile", "plan", "sampling", "ppo")
LENGTH_NAMES = ("hh", "ultrafeedback", "k4", "k4_hh")
TARGETS = {"hh": 1.4, "ultrafeedback": 1.2, "k4": 4.0, "k4_hh": 4.0}
TARGET_MFU = 0.45
TARGET_MEMORY = 0.7
# Dense bfloat16 TFLOP/s from the makers' data sheets; the first name that occurs counts.
PEAK_TFLOPS = {"H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0}
WORDS = 500


# --- Models and data ------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "smol": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True, "rope_theta": 500000.0,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
}  # fmt: skip


def make_model(shape: str, device: str) -> Any:
    """A Llama of that shape with random weights, in bfloat16, made on the device."""
    config = transformers.LlamaConfig(max_position_embeddings=8192, **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def make_tokenizer() -> Any:
    """A tokenizer in which a word is a token, so that lengths are what they were drawn to be."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"
    )


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens: the mean after clipping, and the spread of the logarithm."""

    prompt_mean: float
    prompt_sigma: float
    answer_mean: float
    answer_sigma: float
    longest_answer: int
    longest: int = 1024
    k: int = 2


# A log-normal of mean 164 and median 123 has sigma = sqrt(2 ln(164 / 123)).
_HH = Lengths(164.0, math.sqrt(2 * math.log(164 / 123)), 54.0, 0.9, 300)
_ULTRA = Lengths(150.0, 0.8, 350.0, 0.7, 1000)
LENGTHS = {
    "hh": _HH,
    "ultrafeedback": _ULTRA,
    "k4": dataclasses.replace(_ULTRA, k=4),
    "k4_hh": dataclasses.replace(_HH, k=4),
}


def draw_lengths(
    draw: random.Random, n: int, mean: float, sigma: float, low: int, high: int
) -> list[int]:
    """n log-normal lengths in [low, high] whose mean is `mean` (to a hundredth) once clipped."""
    z = [draw.gauss(0.0, 1.0) for _ in range(n)]

    def at(mu: float) -> list[int]:
        return [min(max(round(math.exp(mu + sigma * x)), low), high) for x in z]

    below, above = math.log(low), math.log(high)
    for _ in range(60):
        middle = (below + above) / 2
        if statistics.fmean(at(middle)) < mean:
            below = middle
        else:
            above = middle
    return at(above)


@dataclass(frozen=True)
class Row:
    """A prompt and K answers, the best first, as numbers of words."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs (better, worse)."""
        k = len(self.answers)
        return [(i, j) for i in range(k) for j in range(i + 1, k)]


def draw_rows(name: str, n: int, seed: int = 0, shorter: int = 1) -> list[Row]:
    """Rows of random words; every prompt is another. Mean lengths are divided by `shorter`."""
    draw, lengths = random.Random(f"{name}/{seed}"), LENGTHS[name]
    lengths = dataclasses.replace(
        lengths,
        prompt_mean=lengths.prompt_mean / shorter,
        answer_mean=lengths.answer_mean / shorter,
    )
    prompts = draw_lengths(
        draw, n, lengths.prompt_mean, lengths.prompt_sigma, 4, lengths.longest // 2
    )
    answers = draw_lengths(
        draw, n * lengths.k, lengths.answer_mean, lengths.answer_sigma, 3, lengths.longest_answer
    )

    def words(size: int) -> tuple[int, ...]:
        return tuple(draw.randrange(WORDS) for _ in range(size))

    rows = []
    for i, size in enumerate(prompts):
        room = lengths.longest - size
        # One token of each is the end token, which both trainers add.
        own = [min(a, room) - 1 for a in answers[i * lengths.k : (i + 1) * lengths.k]]
        rows.append(Row(words(size), tuple(words(a) for a in own)))
    return rows


def text(words: Sequence[int]) -> str:
    """Words as the tokenizer reads them back."""
    return " ".join(f"w{i}" for i in words)


def pair_dataset(rows: Sequence[Row]) -> Any:
    """A row a pair, as TRL takes them."""
    return datasets.Dataset.from_list(
        [
            {
                "prompt": text(r.prompt),
                "chosen": " " + text(r.answers[i]) + " <eos>",
                "rejected": " " + text(r.answers[j]) + " <eos>",
            }
            for r in rows
            for i, j in r.pairs
        ]
    )


def group_dataset(rows: Sequence[Row]) -> Any:
    """A row a prompt with its K answers and their scores."""
    return datasets.Dataset.from_list(
        [
            {
                "prompt": text(r.prompt),
                "answers": [" " + text(a) + " <eos>" for a in r.answers],
                "scores": [float(-i) for i in range(len(r.answers))],
            }
            for r in rows
        ]
    )


def tokens_of(rows: Sequence[Row]) -> dict[str, int]:
    """Tokens that each trainer must feed and score, padding left out."""
    sizes = [(len(r.prompt), [len(a) + 1 for a in r.answers], r.pairs) for r in rows]
    return {
        "prefopt_fed": sum(p + sum(a) - len(a) for p, a, _ in sizes),
        "prefopt_scored": sum(sum(a) for _, a, _ in sizes),
        "trl_fed": sum(2 * p + a[i] + a[j] for p, a, pairs in sizes for i, j in pairs),
        "trl_scored": sum(a[i] + a[j] for _, a, pairs in sizes for i, j in pairs),
    }


# --- The machine ----------------------------------------------------------------------------------


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """Device, versions and commit."""
    on_gpu = device == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        if on_gpu
        else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or git_commit(),
    }
    for package in ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit() -> str:
    """The commit that is checked out, with a plus sign when files have changed since."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "../prefopt", "gpu.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def wait(device: str) -> None:
    """Let all work on the device end."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_tflops(device: str) -> float:
    """The rate of a large bfloat16 product (float32 on a CPU), the median of ten."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[3:]) / 1e12


def peak_tflops(device: str, given: float | None) -> float | None:
    """The device's dense bfloat16 peak, if it is known."""
    if given is not None or device != "cuda":
        return given
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def free_memory(device: str) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# --- One training ---------------------------------------------------------------------------------


class StepClock(transformers.TrainerCallback):
    """Seconds from the end of one optimiser step to the end of the next, data included."""

    def __init__(self, device: str, n_warmup: int, profiler: Any = None) -> None:
        self.device, self.n_warmup, self.profiler = device, n_warmup, profiler
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        wait(self.device)
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Read the clock; after warming up, peaks and the profile begin."""
        wait(self.device)
        if len(self.ends) == self.n_warmup:
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if self.profiler is not None:
                self.profiler.start()
        elif len(self.ends) == self.n_warmup + 1 and self.profiler is not None:
            self.profiler.stop()
        self.ends.append(time.perf_counter())

    @property
    def warmup(self) -> list[float]:
        """Seconds of the steps that warm up."""
        return self._seconds[: self.n_warmup]

    @property
    def measured(self) -> list[float]:
        """Seconds of the steps that count."""
        return self._seconds[self.n_warmup :]

    @property
    def _seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


@dataclass(frozen=True)
class Job:
    """What is trained, the same for both trainers."""

    rows: tuple[Row, ...]
    rows_a_step: int
    k: int
    checkpointing: bool
    device: str
    bf16: bool = True
    learning_rate: float = 1e-5
    logging: bool = False


def shared_arguments(job: Job, folder: str) -> dict[str, Any]:
    """Settings of either trainer."""
    return {
        "output_dir": folder,
        "bf16": job.bf16,
        "gradient_checkpointing": job.checkpointing,
        "learning_rate": job.learning_rate,
        "max_length": None,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",  # the same rows in the same step
        "logging_strategy": "steps" if job.logging else "no",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": job.device == "cuda",
        "seed": 0,
    }


def make_trainer(which: str, base: Any, job: Job, size: int, folder: str) -> Any:
    """A trainer; `size` is TRL's rows a batch or prefopt's tokens a micro-batch."""
    shared = shared_arguments(job, folder)
    peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = make_tokenizer()
    if which == "prefopt":
        args = DPOConfig(
            **shared, per_device_train_batch_size=job.rows_a_step, micro_batch_tokens=size
        )
        data = pair_dataset(job.rows) if job.k == 2 else group_dataset(job.rows)
        maker: Any = DPOTrainer
    else:
        n_pairs = job.rows_a_step * len(job.rows[0].pairs)
        args = trl.DPOConfig(
            **shared,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=n_pairs // size,
        )
        data = pair_dataset(job.rows)
        maker = trl.DPOTrainer
    trainer = maker(
        base, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(
    which: str, base: Any, job: Job, size: int, n_warmup: int, profiler: Any = None
) -> dict[str, Any] | None:
    """Train one adapter on the base model and take it off again; None when memory does not suffice."""
    free_memory(job.device)  # of a training that ran out of it
    known = set(vars(base))
    clock = StepClock(job.device, n_warmup, profiler)
    wrapped = trainer = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            trainer = make_trainer(which, base, job, size, folder)
            wrapped = trainer.model
            trainer.add_callback(clock)
            setup_s = time.perf_counter() - start
            trainer.train()
            outcome = {
                "size": size,
                "setup_s": setup_s,
                "warmup_s": clock.warmup,
                "steps_s": clock.measured,
                "peak_gb": torch.cuda.max_memory_allocated() / 2**30
                if job.device == "cuda"
                else None,
            }
            if which == "prefopt":
                outcome["scoring"] = f"{trainer.scoring.way}/{trainer.scoring.backend}"
            if job.logging:
                outcome["losses"] = [h["loss"] for h in trainer.state.log_history if "loss" in h]
                outcome["trained"] = [
                    p.detach().float().cpu().clone()
                    for p in wrapped.parameters()
                    if p.requires_grad
                ]
            return outcome
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        bare(base, wrapped, known)
        del trainer, wrapped
        free_memory(job.device)


def bare(base: Any, wrapped: Any, known: set[str]) -> None:
    """Leave the base model as it was: no adapter, no patched forward, no hooks."""
    if wrapped is not None:
        wrapped.unload()
    base.gradient_checkpointing_disable()
    with contextlib.suppress(AttributeError, KeyError):
        base.disable_input_require_grads()
    for name in set(vars(base)) - known:
        delattr(base, name)
    base.requires_grad_(False)
    base.zero_grad(set_to_none=True)


# --- 1. Correctness -------------------------------------------------------------------------------

_FAMILY = {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.1,
    "max_position_embeddings": 2048,
}  # fmt: skip


def families() -> dict[str, Any]:
    """Configurations that differ in what attention and the output head do."""
    return {
        "llama (grouped heads)": transformers.LlamaConfig(**_FAMILY),
        "qwen3 (norms of q and k)": transformers.Qwen3Config(**_FAMILY),
        "qwen2 (biases)": transformers.Qwen2Config(**{**_FAMILY, "head_dim": 16}),
        "gemma2 (soft caps, a window)": transformers.Gemma2Config(
            **_FAMILY, sliding_window=1500, query_pre_attn_scalar=32
        ),
        "granite (scaled logits)": transformers.GraniteConfig(
            **{**_FAMILY, "head_dim": 16}, logits_scaling=2.0, attention_multiplier=0.2
        ),
        "mixtral (experts)": transformers.MixtralConfig(
            **_FAMILY, num_local_experts=4, num_experts_per_tok=2
        ),
    }


def probe_trees(seed: int, longest: int) -> list[AnswerTree]:
    """Four prompts with one to four answers; some segments cross blocks of 128."""
    draw = random.Random(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(211) for _ in range(draw.randint(1, most)))

    return [
        AnswerTree(ids(longest), tuple(ids(longest) for _ in range(n_answers)))
        for n_answers in (1, 2, 3, 4)
    ]


WAYS = {
    "trees, flex": Scoring("tree", "flex"),
    "trees, dense mask": Scoring("tree", "dense"),
    "trees, segments": Scoring("tree", "segments"),
    "padded": Scoring("padded"),
    "own logits": Scoring("logits"),
}


def scores_and_gradient(
    model: Any, trees: Sequence[AnswerTree], scoring: Scoring, device: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities (R,) and the gradient of a weighted sum of them, flattened."""
    parameters = list(model.parameters())
    differentiable = device == "cuda" or scoring.backend != "flex"
    with tree_attention(model, scoring), torch.set_grad_enabled(differentiable):
        batch = scoring.batch(trees, 0).to(device)
        found = score_answers(model, batch, scoring).tokens.logprobs
        if not differentiable:
            return found.double(), None
        weights = torch.linspace(-1.0, 1.0, found.numel(), device=device)
        grads = torch.autograd.grad((found * weights).sum(), parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return found.detach().double(), torch.cat([g.double().flatten() for g in flat])


def relative(found: torch.Tensor | None, exact: torch.Tensor) -> float | None:
    """Norm of the difference over the norm; NaN stays NaN."""
    return None if found is None else float((found - exact).norm() / exact.norm())


def check_families(device: str, longest: int) -> list[dict[str, Any]]:
    """Every way of scoring in both dtypes against the model's own logits."""
    results = []
    chosen_families = families()
    if device == "cpu":  # the script itself is what a CPU tries out
        chosen_families = {n: c for n, c in chosen_families.items() if n[:5] in ("llama", "gemma")}
    for name, config in chosen_families.items():
        trees = probe_trees(7, longest)
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=dtype,
                # Some versions of transformers run SDPA for a model with soft caps and drop the caps.
                attn_implementation="eager" if "soft caps" in name else "sdpa",
            )
            model = model.to(device).eval()
            chosen = choose_scoring(model)
            exact_model = copy.deepcopy(model).float()
            vars(exact_model).pop("forward", None)
            vars(exact_model).pop("_prefopt_scores_answers", None)
            choose_scoring(exact_model)
            exact = scores_and_gradient(exact_model, trees, WAYS["own logits"], device)
            yardstick = None
            for way, scoring in reversed(WAYS.items()):
                logps, gradient = scores_and_gradient(model, trees, scoring, device)
                error = relative(logps, exact[0])
                gradient_error = relative(gradient, exact[1])
                yardstick = yardstick or (error, gradient_error)
                if dtype == torch.float32:
                    allowed = (1e-5, 1e-4)
                else:  # rounding may send a token to another expert
                    factor = 5.0 if "experts" in name else 2.0
                    allowed = tuple(factor * y for y in yardstick)
                results.append(
                    {
                        "family": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "way": way,
                        "chosen": f"{chosen.way}/{chosen.backend}",
                        "logps": error,
                        "gradient": gradient_error,
                        "right": bool(
                            error <= allowed[0]
                            and (gradient_error is None or gradient_error <= allowed[1])
                        ),
                    }
                )
    return results


def check_training(device: str) -> list[dict[str, Any]]:
    """Losses and weights of a short LoRA training, ours beside TRL's, from the same start."""
    results = []
    base = make_model("tiny", device)
    rows = tuple(draw_rows("hh", 32, seed=1, shorter=1 if device == "cuda" else 4))
    for bf16 in (False, True):
        model = copy.deepcopy(base) if bf16 else copy.deepcopy(base).float()
        job = Job(rows, 8, 2, False, device, bf16=bf16, learning_rate=5e-3, logging=True)
        own = train("prefopt", model, job, 2048, 1)
        other = train("trl", model, job, 8, 1)
        apart = max(abs(a - b) for a, b in zip(own["losses"], other["losses"], strict=True))
        # Kernels sum in another order, and Adam divides small differences by small numbers.
        allowed = 0.02 if bf16 else 1e-4 if device == "cpu" else 1e-3
        pairs = list(zip(own["trained"], other["trained"], strict=True))
        moved = sum(float((a - b).norm() ** 2) for a, b in pairs) ** 0.5
        size = sum(float(b.norm() ** 2) for _, b in pairs) ** 0.5
        results.append(
            {
                "precision": "bfloat16" if bf16 else "float32",
                "scoring": own["scoring"],
                "prefopt_losses": own["losses"],
                "trl_losses": other["losses"],
                "largest_difference": apart,
                "allowed": allowed,
                "weights_apart": moved / size,
                # Four steps on random words need not lower the loss; that it changes shows training.
                "right": apart <= allowed and abs(other["losses"][-1] - math.log(2)) > 1e-4,
            }
        )
    return results


def correctness(args: argparse.Namespace) -> dict[str, Any]:
    """The section's results."""
    longest = 200 if args.device == "cuda" else 60
    say("correctness of scores and gradients")
    found = check_families(args.device, longest)
    say("training beside TRL")
    return {"scores": found, "training": check_training(args.device)}


# --- 2. Speed -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    pairs_a_step: int
    trl_sizes: tuple[int, ...]
    prefopt_sizes: tuple[int, ...]
    n_search: int  # measured steps of each candidate
    n_warmup: int
    n_steps: int
    shorter: int = 1  # lengths are divided by it


PLANS = {
    "tiny": Plan(6, (3, 6), (512, 2048), 1, 1, 1, shorter=8),
    "smol": Plan(96, (8, 16, 32), (8192, 16384), 2, 2, 6),
    "1b": Plan(96, (4, 8, 16, 32), (8192, 16384), 2, 2, 4),
    "8b": Plan(48, (2, 4, 8, 16), (4096, 8192, 16384), 1, 2, 3),
}


def say(message: str) -> None:
    """Progress, to stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def matrix_weights(base: Any) -> tuple[int, int]:
    """Weights of the linear layers without the output head, and of the head."""
    head = base.get_output_embeddings().weight
    linear = (m.weight for m in base.modules() if isinstance(m, torch.nn.Linear))
    return sum(w.numel() for w in linear if w is not head), head.numel()


def flops_of(base: Any, fed: int, scored: int) -> float:
    """FLOPs that policy and reference need for these tokens: 4 N + 2 N."""
    body, head = matrix_weights(base)
    return 6.0 * (body * fed + head * scored)


def search(
    which: str, base: Any, job: Job, sizes: Sequence[int], n_warmup: int
) -> tuple[int, list[dict[str, Any]]]:
    """The size with the fastest steps, and what each did."""
    tried = []
    for size in sizes:
        found = train(which, base, job, size, n_warmup)
        seconds = None if found is None else statistics.median(found["steps_s"])
        tried.append(
            {
                "size": size,
                "step_s": seconds,
                "peak_gb": None if found is None else found["peak_gb"],
                "first_s": None if found is None else found["setup_s"] + found["warmup_s"][0],
            }
        )
        say(f"  {which} {size}: {'out of memory' if seconds is None else f'{seconds:.3f} s'}")
    fitting = [t for t in tried if t["step_s"] is not None]
    if not fitting:
        raise SystemExit(
            f"{which} ran out of memory at every size ({', '.join(map(str, sizes))}). Use "
            "--checkpointing on, a smaller --shape, or smaller sizes."
        )
    return min(fitting, key=lambda t: t["step_s"])["size"], tried


def speed_of(name: str, base: Any, plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """One comparison: the search for each trainer's best setting, then turns."""
    lengths = LENGTHS[name]
    rows_a_step = plan.pairs_a_step // (lengths.k * (lengths.k - 1) // 2)
    n_steps = plan.n_warmup + plan.n_steps
    rows = draw_rows(name, n_steps * rows_a_step, shorter=plan.shorter)
    device, checkpointing = args.device, args.checkpointing == "on"

    def job(n: int, chosen: Sequence[Row] = rows) -> Job:
        return Job(tuple(chosen[: n * rows_a_step]), rows_a_step, lengths.k, checkpointing, device)

    say(f"{args.shape}, {name}: looking for the fastest settings")
    short = job(1 + plan.n_search)
    best_own, own_tried = search(
        "prefopt", base, short, args.prefopt_sizes or plan.prefopt_sizes, 1
    )
    best_trl, trl_tried = search("trl", base, short, args.trl_sizes or plan.trl_sizes, 1)
    turns: dict[str, list[dict[str, Any]]] = {"prefopt": [], "trl": []}
    for turn in range(args.turns):
        for which, size in (("prefopt", best_own), ("trl", best_trl)):
            found = train(which, base, job(n_steps), size, plan.n_warmup)
            if found is None:
                raise SystemExit(f"{which} ran out of memory at size {size}, which had fitted.")
            turns[which].append(found)
            say(f"  turn {turn + 1}, {which}: {statistics.median(found['steps_s']):.3f} s a step")
    by_length = [
        row
        for step in range(n_steps)
        for row in sorted(
            rows[step * rows_a_step : (step + 1) * rows_a_step],
            key=lambda r: len(r.prompt) + max(map(len, r.answers)),
        )
    ]
    sorted_run = None
    if not args.no_sorted:
        sorted_run = train("trl", base, job(n_steps, by_length), best_trl, plan.n_warmup)

    counted = rows[plan.n_warmup * rows_a_step : n_steps * rows_a_step]
    tokens = tokens_of(counted)
    n_pairs = sum(len(r.pairs) for r in counted)
    gemm, peak = matmul_tflops(device), peak_tflops(device, args.peak_tflops)
    result: dict[str, Any] = {
        "shape": args.shape,
        "lengths": name,
        "checkpointing": args.checkpointing,
        "pairs_a_step": rows_a_step * len(rows[0].pairs),
        "steps_measured": plan.n_steps * args.turns,
        "mean_prompt": statistics.fmean(len(r.prompt) for r in rows),
        "mean_answer": statistics.fmean(len(a) + 1 for r in rows for a in r.answers),
        "tokens": tokens,
        "matmul_tflops": gemm,
        "peak_tflops": peak,
        "searched": {"prefopt": own_tried, "trl": trl_tried},
        "scoring": turns["prefopt"][0]["scoring"],
    }
    for which, runs in turns.items():
        seconds = sum(sum(r["steps_s"]) for r in runs) / args.turns
        flops = flops_of(base, tokens[f"{which}_fed"], tokens[f"{which}_scored"])
        peaks = [r["peak_gb"] for r in runs if r["peak_gb"] is not None]
        result[which] = {
            "size": runs[0]["size"],
            "seconds": seconds,
            "turns_s": [r["steps_s"] for r in runs],
            "warmup_s": [r["warmup_s"] for r in runs],
            "setup_s": [r["setup_s"] for r in runs],
            "pairs_a_s": n_pairs / seconds,
            "tokens_a_s": tokens[f"{which}_fed"] / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": None if peak is None else flops / seconds / 1e12 / peak,
            "of_matmul": flops / seconds / 1e12 / gemm,
            "peak_gb": max(peaks, default=None),
        }
    own, other = result["prefopt"], result["trl"]
    # Setting up tries the ways of scoring, which compiles already.
    first, later = (
        own_tried[0]["first_s"],
        own["setup_s"][-1] + statistics.median(own["turns_s"][-1]),
    )
    result["compile_s"] = None if first is None else max(0.0, first - later)
    result["ratio"] = own["pairs_a_s"] / other["pairs_a_s"]
    result["ratio_a_turn"] = [
        sum(b["steps_s"]) / sum(a["steps_s"])
        for a, b in zip(turns["prefopt"], turns["trl"], strict=True)
    ]
    if sorted_run is not None:
        seconds = sum(sorted_run["steps_s"])
        result["ratio_to_sorted_trl"] = seconds / own["seconds"]
    if own["peak_gb"] is not None and other["peak_gb"] is not None:
        result["memory_ratio"] = own["peak_gb"] / other["peak_gb"]
    return result


def speed(args: argparse.Namespace, base: Any) -> dict[str, Any]:
    """The comparisons that were asked for, by shape and lengths."""
    plan = PLANS[args.shape]
    return {
        f"{args.shape}/{name}/checkpointing {args.checkpointing}": speed_of(name, base, plan, args)
        for name in args.lengths
    }


# --- 3. Profile -----------------------------------------------------------------------------------

_KINDS = (
    ("attention", ("flex_attention", "flash", "fmha", "sdpa", "triton_tem", "attention")),
    ("matrix products", ("gemm", "matmul", "cutlass", "nvjet", "::mm", "addmm", "bmm", "xmma")),
    ("copies", ("memcpy", "memset", "copy_")),
    ("reductions", ("reduce", "softmax", "argmax", "::max", "::sum", "logsumexp", "mean")),
    ("elementwise", ("elementwise", "::mul", "::add", "::exp", "triton_poi", "silu", "sub_")),
)


def kind_of(kernel: str) -> str:
    """A coarse class of a kernel by its name."""
    low = kernel.lower()
    return next((kind for kind, parts in _KINDS if any(p in low for p in parts)), "other")


def profile(args: argparse.Namespace, base: Any) -> dict[str, Any]:
    """Where one optimiser step of prefopt spends its time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as make_profile

    on_gpu, plan = args.device == "cuda", PLANS[args.shape]
    name = args.lengths[0]
    k = LENGTHS[name].k
    rows_a_step = plan.pairs_a_step // (k * (k - 1) // 2)
    job = Job(
        tuple(draw_rows(name, 3 * rows_a_step, shorter=plan.shorter)),
        rows_a_step,
        k,
        args.checkpointing == "on",
        args.device,
    )
    say(f"{args.shape}, {name}: profile of one step")
    sizes = args.prefopt_sizes or plan.prefopt_sizes
    found = None
    for size in sorted(sizes, reverse=True):
        profiler = make_profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        )
        found = train("prefopt", base, job, size, 2, profiler)
        if found is not None:
            break
    if found is None:
        raise SystemExit("prefopt ran out of memory at every size; see --checkpointing.")
    rows = []
    for event in profiler.key_averages():
        if on_gpu:  # kernels themselves, not the operators that launched them
            own_us = event.self_device_time_total if "CUDA" in str(event.device_type) else 0.0
        else:
            own_us = event.self_cpu_time_total
        if own_us > 0:
            rows.append({"name": event.key, "calls": event.count, "ms": own_us / 1e3})
    rows.sort(key=lambda r: -r["ms"])
    total = sum(r["ms"] for r in rows)
    kinds: dict[str, float] = {}
    for row in rows:
        row["share"] = row["ms"] / total
        kinds[kind_of(row["name"])] = kinds.get(kind_of(row["name"]), 0.0) + row["share"]
    return {
        f"{args.shape}/{name}/checkpointing {args.checkpointing}": {
            "size": found["size"],
            "scoring": found["scoring"],
            "step_s": found["steps_s"][0],
            "busy_s": total / 1e3,
            "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
            "top": rows[:25],
        }
    }


# --- 4 to 7 ---------------------------------------------------------------------------------------


def trainers(args: argparse.Namespace) -> dict[str, Any]:
    """Every trainer against itself on a CPU."""
    say("every trainer here and on a CPU")
    return {"trainers": gpu_trainers.check(args.device, make_tokenizer())}


def plan(args: argparse.Namespace, base: Any) -> dict[str, Any]:
    """Predictions for trainings on rows of one length, and the trainings."""
    found, plan_of = [], PLANS[args.shape]
    n_warmup, n_steps = gpu_plan.N_WARMUP, gpu_plan.N_STEPS
    prompt = gpu_plan.PROMPT_TOKENS // plan_of.shorter
    answer = gpu_plan.ANSWER_TOKENS // plan_of.shorter
    draw = random.Random(0)

    def words(size: int) -> tuple[int, ...]:
        return tuple(draw.randrange(WORDS) for _ in range(size))

    batch = plan_of.pairs_a_step
    rows = tuple(
        Row(words(prompt), (words(answer - 1), words(answer - 1)))
        for _ in range(batch * (n_warmup + n_steps))
    )
    checkpointing = args.checkpointing == "on"
    job = Job(rows, batch, 2, checkpointing, args.device)
    say(f"{args.shape}: what `prefopt plan` predicts, and what is measured")
    for size in (args.prefopt_sizes or plan_of.prefopt_sizes)[:2]:
        measured = train("prefopt", base, job, size, n_warmup)
        if measured is None:
            say(f"  {size} tokens: out of memory")
            continue
        predicted = gpu_plan.predict(
            copy.deepcopy(base.config), size, prompt, answer, batch * n_steps, batch, checkpointing
        )
        free_memory(args.device)
        found.append(
            gpu_plan.compare(predicted, measured["peak_gb"], sum(measured["steps_s"]), say)
        )
    return {f"{args.shape}/checkpointing {args.checkpointing}": {"cases": found}}


def sampling(args: argparse.Namespace, base: Any) -> dict[str, Any]:
    """Tokens a second of each way."""
    prompts = [row.prompt for row in draw_rows("hh", 128, shorter=PLANS[args.shape].shorter)]
    return {args.shape: gpu_sampling.compare(args.shape, base, prompts, args.device, say)}


def ppo(args: argparse.Namespace) -> dict[str, Any]:
    """PPO's arrangements."""

    def make() -> Any:
        return make_model(args.shape, args.device)

    return {args.shape: gpu_ppo.compare(args.shape, make, make_tokenizer(), args.device, say)}


# --- Results --------------------------------------------------------------------------------------


def verdicts(entry: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Target, value, bound and whether it was met, for one comparison."""
    found = []
    wanted = TARGETS[entry["lengths"]]
    per = "a pair" if entry["lengths"].startswith("k4") else "TRL's speed"
    found.append((f"at least {wanted} x {per}", entry["ratio"], wanted, entry["ratio"] >= wanted))
    mfu = entry["prefopt"]["mfu"]
    if mfu is not None:
        found.append((f"MFU at least {TARGET_MFU:.0%}", mfu, TARGET_MFU, mfu >= TARGET_MFU))
    memory = entry.get("memory_ratio")
    if memory is not None:
        found.append(
            (
                f"peak memory at most {TARGET_MEMORY} x",
                memory,
                TARGET_MEMORY,
                memory <= TARGET_MEMORY,
            )
        )
    return found


def number(value: float | None, pattern: str = ".3g") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else format(value, pattern)


def machine_line(found: dict[str, Any]) -> str:
    """The machine of some results in one line."""
    shown = [f"{k} {v}" for k, v in found.items() if k not in ("device", "memory_gb") and v]
    memory = "" if found["memory_gb"] is None else f", {found['memory_gb']} GB"
    return f"{found['device']}{memory}; {', '.join(shown)}"


def markdown(results: dict[str, Any]) -> str:
    """All results as a page."""
    lines = ["# On one device", "", "Printed by `python benchmarks/gpu.py`.", ""]
    if any(s["environment"]["memory_gb"] is None for s in each_environment(results)):
        lines += ["**Figures of a CPU are among these: they say nothing about a GPU.**", ""]
    if "correctness" in results:
        lines += correctness_lines(results["correctness"])
    for key, entry in results.get("speed", {}).items():
        lines += speed_lines(key, entry)
    for key, entry in results.get("profile", {}).items():
        lines += profile_lines(key, entry)
    if "trainers" in results:
        entry = results["trainers"]
        lines += gpu_trainers.lines(entry, machine_line(entry["environment"]))
    for section, room in (("plan", gpu_plan), ("sampling", gpu_sampling), ("ppo", gpu_ppo)):
        for key, entry in results.get(section, {}).items():
            lines += room.lines(key, machine_line(entry["environment"]), entry)
    return "\n".join(lines).rstrip() + "\n"


def each_environment(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Everything that carries an environment of its own."""
    for section in ("correctness", "trainers"):
        if section in results:
            yield results[section]
    for section in ("speed", "profile", "plan", "sampling", "ppo"):
        yield from results.get(section, {}).values()


def correctness_lines(entry: dict[str, Any]) -> list[str]:
    """The section on correctness."""
    lines = [
        "## Correctness", "", machine_line(entry["environment"]), "",
        "Relative errors: float32 against the model's own logits, bfloat16 against the same weights",
        "in float32. Allowed are 1e-5 (scores) and 1e-4 (gradients) in float32, and in bfloat16 twice",
        "the error of the model's own logits, five times where rounding may choose another expert.",
        "",
        "| family | dtype | way | log-probabilities | gradient | right |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for r in entry["scores"]:
        gradient = "not on a CPU" if r["gradient"] is None else number(r["gradient"], ".1e")
        lines.append(
            f"| {r['family']} | {r['dtype']} | {r['way']} | {number(r['logps'], '.1e')} | {gradient} "
            f"| {'yes' if r['right'] else '**no**'} |"
        )
    lines += [
        "", "A short LoRA training beside `trl.DPOTrainer`, from the same start:", "",
        "| precision | scored by | losses of prefopt | losses of TRL | largest difference | right |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for r in entry["training"]:
        own, other = (" ".join(f"{x:.4f}" for x in r[k]) for k in ("prefopt_losses", "trl_losses"))
        lines.append(
            f"| {r['precision']} | {r['scoring']} | {own} | {other} | {r['largest_difference']:.1e} "
            f"| {'yes' if r['right'] else '**no**'} |"
        )
    return [*lines, ""]


def speed_lines(key: str, e: dict[str, Any]) -> list[str]:
    """One comparison."""
    lines = [
        f"## Speed: {key}", "", machine_line(e["environment"]), "",
        f"{e['pairs_a_step']} pairs a step, {e['steps_measured']} steps of each in turns; prompts of "
        f"{e['mean_prompt']:.0f} and answers of {e['mean_answer']:.0f} tokens on average. Scored by "
        f"{e['scoring']}; setting up and the first step took {number(e['compile_s'])} s longer the "
        "first time, to compile and to load. A large "
        f"matrix product runs at {e['matmul_tflops']:.3g} TFLOP/s here.", "",
        "| | rows or tokens at once | pairs/s | tokens/s | TFLOP/s | MFU | of the matrix product "
        "| peak GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for which in ("prefopt", "trl"):
        r = e[which]
        unit = "tokens" if which == "prefopt" else "rows"
        lines.append(
            f"| {which} | {r['size']} {unit} | {number(r['pairs_a_s'])} | {number(r['tokens_a_s'])} | "
            f"{number(r['tflops'])} | {number(r['mfu'], '.1%')} | {number(r['of_matmul'], '.1%')} | "
            f"{number(r['peak_gb'])} |"
        )
    turns = ", ".join(f"{x:.2f}" for x in e["ratio_a_turn"])
    lines += ["", f"Ratio **{e['ratio']:.2f}** (turn by turn {turns}"]
    if e.get("ratio_to_sorted_trl") is not None:
        lines[-1] += (
            f"; {e['ratio_to_sorted_trl']:.2f} to TRL with each step's rows sorted by length"
        )
    lines[-1] += "). Tokens fed by each do not count padding."
    lines += ["", "| target | measured | met |", "| --- | --- | --- |"]
    on_cpu = e["environment"]["memory_gb"] is None
    for name, value, _, met in verdicts(e):
        shown = "no GPU, no answer" if on_cpu else "yes" if met else "**no**"
        lines.append(f"| {name} | {value:.2f} | {shown} |")
    lines += ["", "| tried | size | s a step | peak GB |", "| --- | --- | --- | --- |"]
    for which, tried in e["searched"].items():
        for t in tried:
            seconds = "out of memory" if t["step_s"] is None else number(t["step_s"])
            lines.append(f"| {which} | {t['size']} | {seconds} | {number(t['peak_gb'])} |")
    return [*lines, ""]


def profile_lines(key: str, e: dict[str, Any]) -> list[str]:
    """One profile."""
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in e["kinds"].items())
    lines = [
        f"## Profile: {key}", "", machine_line(e["environment"]), "",
        f"One step of prefopt, {e['size']} tokens at once, scored by {e['scoring']}: "
        f"{e['step_s']:.3f} s, of which kernels {e['busy_s']:.3f} s. {kinds}.", "",
        "| kernel | calls | ms | share |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for r in e["top"]:
        name = r["name"].replace("|", "/")
        name = name if len(name) <= 90 else name[:87] + "..."
        lines.append(f"| `{name}` | {r['calls']} | {r['ms']:.2f} | {r['share']:.1%} |")
    return [*lines, ""]


def merged(
    path: Path, section: str, found: dict[str, Any], machine: dict[str, Any]
) -> dict[str, Any]:
    """What the file held with a section's results put in; every result keeps its machine."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if section in ("correctness", "trainers"):
        results[section] = {"environment": machine, **found}
    else:
        for key, entry in found.items():
            results.setdefault(section, {})[key] = {"environment": machine, **entry}
    return results


def save(out: Path, results: dict[str, Any]) -> None:
    """Write both files."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(markdown(results), encoding="utf-8")


def quiet() -> None:
    """Only what this script says, and errors."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--lengths", choices=LENGTH_NAMES, nargs="+", default=list(LENGTH_NAMES))
    parser.add_argument("--checkpointing", choices=["on", "off"], default="off")
    parser.add_argument("--trl-sizes", type=int, nargs="+", help="rows a batch to try for TRL")
    parser.add_argument("--prefopt-sizes", type=int, nargs="+", help="tokens a micro-batch to try")
    parser.add_argument("--turns", type=int, default=2, help="times that both trainers take a turn")
    parser.add_argument("--no-sorted", action="store_true", help="no run of TRL on sorted rows")
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bfloat16")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--out", type=Path, help="folder; on a GPU benchmarks/results by default")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device. --device cpu --shape tiny runs the script itself.")
    pairs = PLANS[args.shape].pairs_a_step
    if bad := [s for s in args.trl_sizes or () if pairs % s]:
        parser.error(f"--trl-sizes must divide {pairs}, the pairs of a step; {bad} do not.")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 when something came out wrong."""
    args = parse(arguments)
    quiet()
    out = args.out or (RESULTS if args.device == "cuda" else None)
    machine = environment(args.device, args.commit)
    say(machine_line(machine))
    results: dict[str, Any] = {}
    base: Any = None
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "correctness": lambda: correctness(args),
        "speed": lambda: speed(args, base),
        "profile": lambda: profile(args, base),
        "trainers": lambda: trainers(args),
        "plan": lambda: plan(args, base),
        "sampling": lambda: sampling(args, base),
        "ppo": lambda: ppo(args),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        for section in [s for s in SECTIONS if s in args.only]:
            if section == "ppo":  # makes its own
                base = None
                free_memory(args.device)
            elif section not in ("correctness", "trainers") and base is None:
                start = time.perf_counter()
                base = make_model(args.shape, args.device)
                base.requires_grad_(False)
                say(f"{args.shape}: model made in {time.perf_counter() - start:.1f} s")
            results = merged(folder / "gpu.json", section, sections[section](), machine)
            save(folder, results)  # a later section may run into a time limit
        print(markdown(results))
    if out is None:
        say("nothing was written: these are figures of a CPU, and --out was not given.")
    wrong = [
        r
        for section, part in (
            ("correctness", "scores"), ("correctness", "training"), ("trainers", "trainers")
        )
        for r in (results.get(section, {}).get(part, ()) if section in args.only else ())
        if not r["right"]
    ]  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
