"""DPO training against TRL's: the same rows, model, adapter and step, in one process on the CPU.

    python benchmarks/speed_dpo.py                     # all cases; prints and writes results/
    python benchmarks/speed_dpo.py --only hh_helpful --trl_batches 1 --quick

SmolLM2-135M, LoRA on all linear layers, fp32, no checkpointing, 8 pairs an optimiser step. TRL runs
with each micro-batch size of `--trl_batches` that fits the memory, and prefopt before, between and
after (P T P T P), so that a machine whose speed drifts favours neither. Times are process CPU seconds
of `train()`; tokenization and loading are left out. The compared TRL is its fastest setting; the
ratios to all of them are printed. Rows come from the folder PREFOPT_DATA (default ../shared/data).

Also: the peak memory of each run, tokens a second beside the floor of 4N FLOPs a token (6N with the
reference) at this machine's own matrix-product rate, a profile of one step, a second epoch, and a
second run with another beta, neither of which may pay for the reference again.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import logging
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("PREFOPT_DATA", ROOT.parent / "shared" / "data"))
BATCH, MAX_LENGTH = 8, 1024
TARGETS = {"hh_helpful": 3.2, "qa_feedback": 3.5, "long_answers": 1.8, "k4": 8.0}
MEMORY_TARGET = 0.5
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def read(name: str) -> list[dict[str, Any]]:
    """The training rows of one of the data folders."""
    folder = DATA / name
    for file, opened in (("train.jsonl.gz", gzip.open), ("train.jsonl", open)):
        if (folder / file).exists():
            with opened(folder / file, "rt", encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]
    raise SystemExit(f"no {name} in {DATA}: set PREFOPT_DATA to the folder with the data.")


def pairs_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Only the columns that both trainers read."""
    return [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]


def n_words(messages: list[dict[str, str]]) -> int:
    """Words of a conversation, to choose rows by length."""
    return sum(len(m["content"].split()) for m in messages)


def long_answers(n: int) -> list[dict[str, Any]]:
    """Pairs whose prompt has at most 40 words and whose answers both have at least 100."""
    found = [
        row
        for row in read("oasst_ranked")
        if n_words(row["prompt"]) <= 40
        and min(n_words(row["chosen"]), n_words(row["rejected"])) >= 100
    ]
    return found[:n]


def ranked_groups(n: int) -> list[dict[str, Any]]:
    """Prompts with four ranked answers that each fit; `scores` are the ranks, turned round."""
    prompts: dict[str, dict[str, Any]] = {}
    for row in read("oasst_ranked"):
        group = prompts.setdefault(json.dumps(row["prompt"]), {"prompt": row["prompt"], "of": {}})
        for side in ("chosen", "rejected"):
            group["of"][row[f"rank_{side}"]] = row[side]
    groups = []
    for group in prompts.values():
        ranks = sorted(group["of"])[:4]
        if len(ranks) == 4 and n_words(group["prompt"]) <= 250:
            answers = [group["of"][rank] for rank in ranks]
            scores = [-float(rank) for rank in ranks]
            groups.append({"prompt": group["prompt"], "answers": answers, "scores": scores})
    return groups[:n]


def all_pairs(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The six pairs of each group of four, as a pairwise trainer needs them."""
    return [
        {"prompt": g["prompt"], "chosen": g["answers"][i], "rejected": g["answers"][j]}
        for g in groups
        for i in range(4)
        for j in range(i + 1, 4)
    ]


class Peak(threading.Thread):
    """The largest resident memory of this process while the block runs, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mb, self._done = 0.0, threading.Event()

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        """Look at it fifty times a second."""
        page = os.sysconf("SC_PAGE_SIZE") / 2**20
        while not self._done.wait(0.02):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            self.mb = max(self.mb, resident)


class Bench:
    """One base model that every run wraps in a fresh adapter."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from prefopt.demo_model import demo_model_path

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        path = demo_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.folder = tempfile.mkdtemp()

    def run(
        self, library: str, rows: list[dict[str, Any]], micro_batch: int = BATCH, **settings: Any
    ) -> dict[str, Any]:
        """Train one epoch; CPU seconds, peak memory and what the log says."""
        import peft
        import trl
        from datasets import Dataset

        import prefopt

        module = {"trl": trl, "prefopt": prefopt}[library]
        args = module.DPOConfig(
            self.folder,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=BATCH // micro_batch,
            max_length=MAX_LENGTH,
            learning_rate=1e-5,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **{"num_train_epochs": 1, **settings},
        )
        trainer = module.DPOTrainer(
            self.model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            peft_config=peft.LoraConfig(**ADAPTER),
        )
        _let_go()
        with Peak() as peak:
            cpu, wall = time.process_time(), time.perf_counter()
            trainer.train()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "cpu_s": cpu,
            "wall_s": wall,
            "peak_mb": peak.mb,
            "losses": [entry["loss"] for entry in logs],
            "n_rows": len(trainer.train_dataset),
        }
        if library == "prefopt":
            result["n_computed"] = trainer.reference.n_computed
            result["counts"] = token_counts(trainer)
        self.model = trainer.model.unload()
        vars(self.model).pop("peft_config", None)
        vars(self.model).pop("forward", None)
        vars(self.model).pop("_prefopt_scores_answers", None)
        del trainer
        _let_go()
        return result


def _let_go() -> None:
    """Give freed memory back, so that one run's peak is not another's."""
    import ctypes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def token_counts(trainer: Any) -> dict[str, int]:
    """Tokens that prefopt feeds and scores in one epoch, and those that pairs would take."""
    from prefopt.training.preference_rows import plan_micro_batches, read_row

    rows = [read_row(row, max_length=MAX_LENGTH) for row in trainer.train_dataset]
    fed = scored = 0
    for start in range(0, len(rows), BATCH):
        for batch in plan_micro_batches(rows[start : start + BATCH], 10**9):
            fed += sum(tree.n_tokens for tree in batch.trees)
            scored += sum(len(a) for tree in batch.trees for a in tree.answers)
    return {"fed": fed, "scored": scored, "in_pairs": sum(row.n_tokens for row in rows)}


def product_rate() -> float:
    """GFLOP/s of this machine's float32 matrix product at the sizes of this model."""
    import torch

    x, w = torch.randn(540, 576), torch.randn(1536, 576)
    times = []
    for _ in range(40):
        start = time.process_time()
        for _ in range(5):
            x @ w.t()
        times.append((time.process_time() - start) / 5)
    return 2 * 540 * 576 * 1536 / statistics.median(times) / 1e9


def floor_s(model: Any, counts: dict[str, int], rate: float) -> float:
    """CPU seconds of the matrix products alone: 4N a fed token for the policy, 2N for the reference.

    N counts the layers; the output head is on top, for scored tokens only.
    """
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for name, p in model.named_parameters() if "layers." in name)
    return 6 * (layers * counts["fed"] + head * counts["scored"]) / (rate * 1e9)


def fits(rows: list[dict[str, Any]], micro_batch: int, bench: Bench, per_token_mb: float) -> bool:
    """Whether TRL's largest padded micro-batch would fit three quarters of the free memory."""
    free_mb = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) / 1024
    widest = []
    for start in range(0, len(rows), micro_batch):
        lengths = [
            len(bench.tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"])
            for row in rows[start : start + micro_batch]
            for side in ("chosen", "rejected")
        ]
        widest.append(len(lengths) * min(max(lengths), MAX_LENGTH))
    return max(widest) * per_token_mb < 0.75 * free_mb


def compare(
    bench: Bench,
    case: str,
    rows: list[dict[str, Any]],
    trl_rows: list[dict[str, Any]],
    micro_batches: list[int],
    rate: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """P T P T P over TRL's settings; the ratio of each to the two runs beside it."""
    pairs = len(trl_rows)
    ours = [bench.run("prefopt", rows)]
    say(f"{case}: prefopt {ours[0]['cpu_s']:.1f} s, {ours[0]['peak_mb']:,.0f} MB")
    theirs: dict[int, dict[str, Any]] = {}
    left_out = []
    for size in micro_batches:
        if not fits(trl_rows, size, bench, 3.0):
            left_out.append(size)
            say(f"{case}: TRL with micro-batches of {size} does not fit the memory")
            continue
        theirs[size] = bench.run("trl", trl_rows, size)
        ours.append(bench.run("prefopt", rows))
        beside = (ours[-2]["cpu_s"] + ours[-1]["cpu_s"]) / 2
        theirs[size]["ratio"] = theirs[size]["cpu_s"] / beside
        theirs[size]["memory_ratio"] = ours[-1]["peak_mb"] / theirs[size]["peak_mb"]
        say(
            f"{case}: TRL micro-batch {size} {theirs[size]['cpu_s']:.1f} s, "
            f"{theirs[size]['peak_mb']:,.0f} MB; prefopt {ours[-1]['cpu_s']:.1f} s; "
            f"ratio {theirs[size]['ratio']:.2f}"
        )
    best = min(theirs, key=lambda size: theirs[size]["ratio"])
    seconds = statistics.median(run["cpu_s"] for run in ours)
    counts = ours[0]["counts"]
    if len(rows) == len(trl_rows):
        worst = max(
            abs(a - b) for a, b in zip(ours[0]["losses"], theirs[best]["losses"], strict=True)
        )
    else:
        worst = None  # a K-way row weighs its six pairs as one, so the batches differ
    floor = floor_s(bench.model, counts, rate)
    return {
        "case": case,
        "n_pairs": pairs,
        "prefopt_cpu_s": [run["cpu_s"] for run in ours],
        "prefopt_peak_mb": statistics.median(run["peak_mb"] for run in ours),
        "trl": {str(size): run for size, run in theirs.items()},
        "trl_left_out": left_out,
        "fastest_trl": best,
        "ratio": theirs[best]["ratio"],
        "memory_ratio": theirs[best]["memory_ratio"],
        "largest_loss_difference": worst,
        "counts": counts,
        "tokens_per_s": counts["fed"] / seconds,
        "floor_s": floor,
        "of_floor": floor / seconds,
        "target": TARGETS[case],
    }


def profile(bench: Bench, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of one epoch's time by kind of operation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as recorded:
        bench.run("prefopt", rows)
    kinds = {
        "matrix products": 0.0,
        "attention": 0.0,
        "optimiser": 0.0,
        "elementwise and rest": 0.0,
    }
    for event in recorded.key_averages():
        name, spent = event.key, event.self_cpu_time_total
        if any(part in name for part in ("aten::mm", "addmm", "bmm", "linear", "mkldnn")):
            kinds["matrix products"] += spent
        elif "scaled_dot_product" in name:
            kinds["attention"] += spent
        elif "Optimizer" in name or "adam" in name.lower():
            kinds["optimiser"] += spent
        else:
            kinds["elementwise and rest"] += spent
    total = sum(kinds.values())
    return {kind: spent / total for kind, spent in kinds.items()}


def reference_paid_once(bench: Bench, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A second epoch, and a second run with another beta on the same cache."""
    one = bench.run("prefopt", rows)
    two = bench.run("prefopt", rows, num_train_epochs=2)
    with tempfile.TemporaryDirectory() as cache:
        first = bench.run("prefopt", rows, reference_cache=cache)
        swept = bench.run("prefopt", rows, reference_cache=cache, beta=0.5)
    return {
        "epoch_1_cpu_s": one["cpu_s"],
        "epochs_2_cpu_s": two["cpu_s"],
        "second_epoch_over_first": (two["cpu_s"] - one["cpu_s"]) / one["cpu_s"],
        "answers_computed_in_2_epochs": two["n_computed"],
        "answers_computed_first_run": first["n_computed"],
        "answers_computed_other_beta": swept["n_computed"],
        "other_beta_over_first": swept["cpu_s"] / first["cpu_s"],
    }


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# DPO training against TRL on this CPU",
        "",
        f"`python benchmarks/speed_dpo.py` at {', '.join(_commits(result))}: {result['machine']}, "
        f"{result['threads']} thread(s), {result['versions']}. SmolLM2-135M, LoRA r=16 on all linear "
        f"layers, fp32, no checkpointing, {BATCH} pairs a step, max_length {MAX_LENGTH}. Process CPU "
        "seconds of one epoch; each TRL setting between two prefopt runs.",
        "",
        "| rows | pairs | prefopt, s | TRL by micro-batch size, s | ratio to TRL's fastest | target | "
        "peak MB, prefopt / that TRL | memory ratio (target 0.5) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        ours = statistics.median(case["prefopt_cpu_s"])
        by_size = ", ".join(
            f"{size}: {run['cpu_s']:.0f} ({run['ratio']:.2f}×)" for size, run in case["trl"].items()
        )
        skipped = "".join(f", {size}: does not fit" for size in case["trl_left_out"])
        fastest = case["trl"][str(case["fastest_trl"])]
        lines.append(
            f"| {case['case']} | {case['n_pairs']} | {ours:.0f} | {by_size}{skipped} | "
            f"**{case['ratio']:.2f}** | {case['target']} | {case['prefopt_peak_mb']:,.0f} / "
            f"{fastest['peak_mb']:,.0f} | {case['memory_ratio']:.2f} |"
        )
    lines += [
        "",
        f"Floor: the matrix products alone, 6N a token (4N policy, 2N reference), at the measured "
        f"{result['product_gflops']:.0f} GFLOP/s.",
        "",
        "| rows | tokens fed | of those in pairs | tokens/s | floor, s | time at the floor |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        counts = case["counts"]
        lines.append(
            f"| {case['case']} | {counts['fed']:,} | {counts['fed'] / counts['in_pairs']:.0%} | "
            f"{case['tokens_per_s']:.0f} | {case['floor_s']:.0f} | {case['of_floor']:.0%} |"
        )
    if result.get("profile"):
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in result["profile"].items())
        lines += ["", f"Where the time goes (torch profiler, hh_helpful): {shares}."]
    if result.get("reference"):
        r = result["reference"]
        lines += [
            "",
            f"A second epoch takes {r['second_epoch_over_first']:.2f} of the first; "
            f"{r['answers_computed_in_2_epochs']} answers went through the reference in both "
            f"together. Another beta on the same cache: {r['answers_computed_other_beta']} answers, "
            f"{r['other_beta_over_first']:.2f} of the time of the first run.",
        ]
    missed = [
        f"{c['case']}: {c['ratio']:.2f} of {c['target']}"
        for c in result["cases"]
        if c["ratio"] < c["target"]
    ]
    missed += [
        f"{c['case']}: memory {c['memory_ratio']:.2f}"
        for c in result["cases"]
        if c["memory_ratio"] > MEMORY_TARGET
    ]
    lines += ["", f"Missed: {'; '.join(missed)}." if missed else "Every target was reached."]
    return "\n".join(lines) + "\n"


def _commits(result: dict[str, Any]) -> list[str]:
    """Which commit each case was measured at, where they differ."""
    known = {c["case"]: c.get("commit", result["commit"]) for c in result["cases"]}
    if len(set(known.values())) == 1:
        return [next(iter(known.values()))]
    return [f"{commit} ({case})" for case, commit in known.items()]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(TARGETS),
        default=list(TARGETS),
        help="measure these again; the other cases stay in the results as they were measured",
    )
    parser.add_argument(
        "--trl_batches",
        nargs="+",
        type=int,
        default=[1],
        help="TRL's micro-batch sizes to try; 1 was its fastest",
    )
    parser.add_argument("--quick", action="store_true", help="no extras, no files")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    import transformers
    import trl

    transformers.logging.set_verbosity_error()
    logging.getLogger("prefopt").setLevel(logging.ERROR)
    bench = Bench()
    groups = ranked_groups(2)
    cases = {
        "hh_helpful": lambda: (pairs_of(read("hh_helpful")[:16]),) * 2,
        "qa_feedback": lambda: (pairs_of(read("qa_feedback")[:6]),) * 2,
        "long_answers": lambda: (pairs_of(long_answers(8)),) * 2,
        "k4": lambda: (groups, all_pairs(groups)),
    }
    rate = product_rate()
    result: dict[str, Any] = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"trl {trl.__version__}",
        "product_gflops": rate,
        "cases": [],
    }
    for case in options.only:
        rows, trl_rows = cases[case]()
        found = compare(bench, case, rows, trl_rows, options.trl_batches, rate, print)
        result["cases"].append(found | {"commit": result["commit"]})
    if not options.quick and options.only != list(TARGETS):
        before = json.loads((RESULTS / "speed_dpo.json").read_text())
        measured = {c["case"]: c for c in result["cases"]}
        result = before | {
            "cases": [
                measured.get(c["case"], {"commit": before["commit"]} | c) for c in before["cases"]
            ]
        }
    elif not options.quick:
        rows = pairs_of(read("hh_helpful")[:8])
        result["profile"] = profile(bench, rows)
        result["reference"] = reference_paid_once(bench, rows)
    text = table(result)
    print(text)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "speed_dpo.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "speed_dpo.md").write_text(text)


if __name__ == "__main__":
    main()
