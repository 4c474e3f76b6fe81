"""What `prefopt plan` predicts against what is measured: peak memory and time, on this machine.

    python benchmarks/quality_plan.py        # all cases; prints and writes results/quality_plan.*
    python benchmarks/quality_plan.py --only dpo_lora_512 long_32k

Each case is trained by its real trainer in a process of its own, forked from one that has trained
something small: libraries are loaded, no model is. There the model is loaded, its weights are touched,
and the peak of the process's memory above that is what training needs: adapters, gradients, optimiser
states and activations. On CUDA it is `torch.cuda.max_memory_allocated` instead.

On a CPU glibc keeps pieces of what is freed. Cases with `tight` tell it to give large pieces back at
once (mallopt), so that the peak is that of the tensors: it is compared with what the plan counts. The
others run as users do, and are compared with that and what the plan assumes for the allocator.

Times are process CPU seconds of `train()`, or the wall's on CUDA. The speed from which they are
predicted is measured before and after.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGET = 0.15
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt

# What differs from case to case, in `PlanConfig`'s names; "model" also "small" and "tiny", random
# weights made here. `timed` cases are compared in time too.
DPO = {"method": "dpo", "prompt_tokens": 96, "answer_tokens": 80}
LONG = {"method": "dpo", "batch_size": 1, "micro_batch_tokens": 512}
CASES: dict[str, dict[str, Any]] = {
    "dpo_lora_512": {**DPO, "rows": 8, "batch_size": 4, "micro_batch_tokens": 512, "timed": True},
    "dpo_lora_1024_checkpointing": {
        **DPO, "rows": 8, "batch_size": 4, "micro_batch_tokens": 1024,
        "gradient_checkpointing": True, "tight": True,
    },
    "dpo_lora_1024": {**DPO, "rows": 8, "batch_size": 4, "micro_batch_tokens": 1024},
    "dpo_full_512": {
        **DPO, "tune": "full", "rows": 4, "batch_size": 2, "micro_batch_tokens": 512, "tight": True,
    },
    "reward_lora_1024": {
        "method": "reward", "prompt_tokens": 96, "answer_tokens": 80, "rows": 8, "batch_size": 4,
        "micro_batch_tokens": 1024, "timed": True,
    },
    "reward_lora_512": {
        "method": "reward", "prompt_tokens": 96, "answer_tokens": 80, "rows": 8, "batch_size": 4,
        "micro_batch_tokens": 512,
    },
    "sft_lora_2048": {
        "model": "small", "method": "sft", "prompt_tokens": 200, "answer_tokens": 300, "rows": 24,
        "batch_size": 8, "micro_batch_tokens": 2048, "timed": True,
    },
    "sft_full_2048": {
        "model": "small", "method": "sft", "tune": "full", "prompt_tokens": 200,
        "answer_tokens": 300, "rows": 16, "batch_size": 8, "micro_batch_tokens": 2048, "tight": True,
    },
    "ppo_lora_2048": {
        "model": "small", "method": "ppo", "prompt_tokens": 200, "answer_tokens": 64, "answers": 4,
        "rows": 16, "batch_size": 16, "micro_batch_tokens": 2048, "rollouts": 1, "epochs": 2,
        "tight": True,
    },
    "long_4k": {
        "model": "small", **LONG, "prompt_tokens": 3500, "answer_tokens": 300, "rows": 2,
        "timed": True,
    },
    "long_8k_checkpointing": {
        "model": "small", **LONG, "prompt_tokens": 7200, "answer_tokens": 500, "rows": 2,
        "gradient_checkpointing": True, "tight": True,
    },
    "long_32k": {
        "model": "tiny", **LONG, "prompt_tokens": 31000, "answer_tokens": 900, "rows": 1,
        "tight": True,
    },
    "long_32k_checkpointing": {
        "model": "tiny", **LONG, "prompt_tokens": 31000, "answer_tokens": 900, "rows": 1,
        "gradient_checkpointing": True, "tight": True,
    },
}  # fmt: skip


def model_folder(name: str, work: Path) -> str:
    """Where a case's model lies; "small" and "tiny" are made there, with random weights."""
    from prefopt.demo_model import demo_model_path

    if name == "demo":
        return str(demo_model_path())
    folder = work / name
    if not (folder / "config.json").exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        layers, width, heads = {"small": (8, 256, 8), "tiny": (2, 64, 2)}[name]
        shape = LlamaConfig(
            vocab_size=49152, hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
            max_position_embeddings=65536, tie_word_embeddings=True, pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(shape).save_pretrained(folder)
        AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(folder)
    return str(folder)


def plan_config(case: dict[str, Any], folder: str, **more: Any) -> Any:
    """The case as `prefopt plan` takes it."""
    from prefopt import PlanConfig

    options = {k: v for k, v in case.items() if k not in ("timed", "tight", "model")}
    return PlanConfig(model=folder, gpus="auto", **{**options, **more})


# --- One case, in a process of its own -----------------------------------------------------------


def token_rows(case: dict[str, Any], vocabulary: int) -> list[dict[str, Any]]:
    """Rows of random tokens of exactly the planned lengths."""
    import random

    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(20, vocabulary) for _ in range(n)]

    return [
        {
            "prompt_ids": ids(case["prompt_tokens"]),
            "chosen_ids": ids(case["answer_tokens"]),
            "rejected_ids": ids(case["answer_tokens"]),
        }
        for _ in range(case["rows"])
    ]


def make_trainer(case: dict[str, Any], model: Any, tokenizer: Any, folder: str) -> Any:
    """The real trainer of a case, on rows of the planned lengths."""
    import trl
    from datasets import Dataset

    import prefopt
    from prefopt.models import LoRASettings, lora_config
    from prefopt.training.sft_trainer import SFTTrainer

    rows = token_rows(case, model.config.vocab_size)
    adapter = None if case.get("tune") == "full" else lora_config(LoRASettings())
    on_cpu = model.device.type == "cpu"
    shared = {
        "output_dir": folder, "per_device_train_batch_size": case["batch_size"], "bf16": False,
        "gradient_checkpointing": case.get("gradient_checkpointing", False), "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu, "learning_rate": 1e-6, "logging_steps": 1000,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    budget = case["micro_batch_tokens"]
    if case["method"] == "sft":
        columns = [
            {
                "input_ids": r["prompt_ids"] + r["chosen_ids"],
                "labels": [-100] * len(r["prompt_ids"]) + r["chosen_ids"],
            }
            for r in rows
        ]
        return SFTTrainer(
            micro_batch_tokens=budget, model=model, processing_class=tokenizer, peft_config=adapter,
            args=trl.SFTConfig(max_length=None, num_train_epochs=1, **shared),
            train_dataset=Dataset.from_list(columns),
        )  # fmt: skip
    if case["method"] == "ppo":
        config = prefopt.PPOConfig(
            num_rollouts=case["rollouts"], num_ppo_epochs=int(case["epochs"]), stop_token_ids=[],
            num_generations=case["answers"], max_new_tokens=case["answer_tokens"],
            micro_batch_tokens=budget, num_logged_answers=0, **shared,
        )  # fmt: skip
        reward = prefopt.RewardModel.new(model, tokenizer, adapter)
        return prefopt.PPOTrainer(
            model=model, args=config, reward=reward, peft_config=adapter,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt_ids": r["prompt_ids"]} for r in rows]),
        )  # fmt: skip
    kind = {
        "dpo": (prefopt.DPOTrainer, prefopt.DPOConfig),
        "reward": (prefopt.RewardTrainer, prefopt.RewardConfig),
    }[case["method"]]
    config = kind[1](micro_batch_tokens=budget, max_length=None, num_train_epochs=1, **shared)
    return kind[0](
        model=model, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=adapter,
    )  # fmt: skip


class Peak:
    """The largest memory within the block, above what was there at its beginning, in bytes."""

    def __init__(self, cuda: bool) -> None:
        self._cuda, self.n_bytes = cuda, 0.0

    def __enter__(self) -> Peak:
        gc.collect()
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._before = float(torch.cuda.memory_allocated())
            return self
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak starts anew
        self._before = self._kilobytes("VmRSS") * 1024
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            import torch

            self.n_bytes = float(torch.cuda.max_memory_allocated()) - self._before
        else:
            self.n_bytes = self._kilobytes("VmHWM") * 1024 - self._before

    @staticmethod
    def _kilobytes(name: str) -> float:
        return float(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def load(folder: str) -> tuple[Any, Any]:
    """A model whose weights are in memory, not only mapped, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, AutoTokenizer.from_pretrained(folder)


def warm_up(names: Sequence[str], work: Path) -> None:
    """Load libraries, and have them allocate what they allocate once."""
    with tempfile.TemporaryDirectory() as out:
        for method in sorted({CASES[name]["method"] for name in names}):
            short = {
                "method": method, "prompt_tokens": 8, "answer_tokens": 4, "rows": 1, "epochs": 1,
                "batch_size": 1, "answers": 2, "rollouts": 1, "micro_batch_tokens": 512,
            }  # fmt: skip
            make_trainer(short, *load(model_folder("tiny", work)), out).train()


def train_case(name: str, work: Path) -> dict[str, float]:
    """Peak memory above the loaded model, and seconds of the training."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        warm_up([name], work)
    case, clock = CASES[name], time.perf_counter if cuda else time.process_time
    if case.get("tight") and not cuda:
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 2**16)
    model, tokenizer = load(model_folder(case.get("model", "demo"), work))
    with tempfile.TemporaryDirectory() as out, Peak(cuda) as peak:
        trainer = make_trainer(case, model, tokenizer, out)
        started = clock()
        trainer.train()
        took = clock() - started
    return {"peak_bytes": peak.n_bytes, "seconds": took}


def rate_case(name: str, work: Path) -> dict[str, float]:
    """The seconds that a plan predicts with a speed measured now."""
    from prefopt import plan_training

    case = CASES[name]
    found = plan_training(plan_config(case, model_folder(case.get("model", "demo"), work)))
    assert found.time is not None
    return {"seconds": found.time.seconds}


# --- All cases -----------------------------------------------------------------------------------


def in_process(part: Callable[[str, Path], dict[str, float]], name: str, work: Path) -> Any:
    """Run a part of a case in a process of its own."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start = "spawn" if torch.cuda.is_available() else "fork"
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context(start)
    ) as pool:
        return pool.submit(part, name, work).result()


def compare(name: str, work: Path) -> dict[str, Any]:
    """One case: predicted and measured."""
    from prefopt import plan_training

    case = CASES[name]
    config = plan_config(case, model_folder(case.get("model", "demo"), work), measure=False)
    planned = plan_training(config)
    parts = {part.name: part.n_bytes for part in planned.memory}
    weights = parts.pop("weights")
    del parts["runtime"]
    counted = sum(parts.values()) - parts["allocator"]
    predicted = counted if case.get("tight") or planned_on_gpu(planned) else sum(parts.values())
    timed = case.get("timed")
    rates = [in_process(rate_case, name, work)] if timed else []
    measured = in_process(train_case, name, work)
    rates += [in_process(rate_case, name, work)] if timed else []
    seconds = sum(rate["seconds"] for rate in rates) / len(rates) if rates else None
    peak = measured["peak_bytes"]
    return {
        "case": name,
        "tokens": planned.fullest_micro_batch,
        "tight": bool(case.get("tight")),
        "counted_mb": counted / 1e6,
        "predicted_mb": predicted / 1e6,
        "measured_mb": peak / 1e6,
        "memory_error": predicted / peak - 1,
        "with_weights_error": (predicted + weights) / (peak + weights) - 1,
        "predicted_s": seconds,
        "measured_s": measured["seconds"],
        "time_error": None if seconds is None else seconds / measured["seconds"] - 1,
        "commit": commit(),
    }


def planned_on_gpu(planned: Any) -> bool:
    """Whether the plan is for a GPU, whose allocator's peak is that of the tensors."""
    return "CPU" not in planned.devices


def commit() -> str:
    """Of the checkout."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# What `prefopt plan` predicts, and what is measured",
        "",
        f"`python benchmarks/quality_plan.py` on {result['machine']}, {result['versions']}. Memory is "
        "what training adds to the loaded model; time is that of `train()`, predicted from a speed "
        "measured before and after. Cases marked * let glibc give freed memory back at once and "
        "compare what is counted; the others include what the plan assumes for the allocator.",
        "",
        "| case | tokens at once | memory, MB: predicted / measured | off by | with the weights | "
        "time, s: predicted / measured | off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        seconds = "–"
        if case["predicted_s"] is not None:
            seconds = f"{case['predicted_s']:.1f} / {case['measured_s']:.1f}"
        off = "–" if case["time_error"] is None else f"{case['time_error']:+.0%}"
        lines.append(
            f"| {case['case']}{' *' if case['tight'] else ''} | {case['tokens']:,} | "
            f"{case['predicted_mb']:,.0f} / {case['measured_mb']:,.0f} | "
            f"{case['memory_error']:+.0%} | {case['with_weights_error']:+.0%} | {seconds} | {off} |"
        )
    missed = [
        f"{case['case']}: {what} {case[key]:+.0%}"
        for case in result["cases"]
        for what, key in (("memory", "memory_error"), ("time", "time_error"))
        if case[key] is not None and abs(case[key]) > TARGET
    ]
    commits = sorted({case["commit"] for case in result["cases"]})
    lines += [
        "",
        f"Target: within {TARGET:.0%}. {'Missed: ' + '; '.join(missed) if missed else 'All within'}.",
        f"Measured at {', '.join(commits)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--work", type=Path, help="folder for the models made here")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    work = options.work or Path(tempfile.mkdtemp())
    if not torch.cuda.is_available():
        warm_up(options.only, work)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    path = RESULTS / "quality_plan.json"
    before = json.loads(path.read_text())["cases"] if path.exists() else []
    cases = {case["case"]: case for case in before}
    for name in options.only:
        cases[name] = compare(name, work)
        print(json.dumps(cases[name]), flush=True)
        result = {
            "machine": f"{device}, {os.environ['OMP_NUM_THREADS']} thread(s)",
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "cases": [cases[n] for n in CASES if n in cases],
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "quality_plan.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
