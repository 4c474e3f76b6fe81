"""Sampling against transformers' `generate`: K answers to each prompt, tokens a second on the CPU.

    python benchmarks/speed_sampling.py                 # both cases; prints and writes results/
    python benchmarks/speed_sampling.py --only everyday --quick

Three ways, in one process, on one thread, one after the other and again (--rounds):

    one prompt   `generate` for one prompt at a time with num_return_sequences=K (some of the prompts:
                 each is a call of its own, so the rate does not depend on how many there are)
    padded       `generate` for a padded batch of prompts with num_return_sequences=K, as many rows at
                 once as prefopt has; prompts sorted by length, so that little is padded
    prefopt      `sample_candidates`

All with SmolLM2-135M in fp32, the same settings and end tokens. Counted are the new tokens up to and
with the end token of each answer, never padding. The rate is tokens a process CPU second; the ratio of
wall times stands beside it. Targets: at least 2 times the first, 1.3 times the second.

Cases: `everyday` are built-in prompts with the quickstart's settings (top_k=40, up to 64 tokens);
`conversations` are the longer ones of $PREFOPT_DATA/hh_helpful with the default settings
(temperature=0.7, top_p=0.95), up to 128 tokens; built-in "general" prompts where that is not there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from prefopt.chat import end_token_ids, tokenize_prompt
from prefopt.data.prompts import load_prompts
from prefopt.models import LanguageModel, load_model
from prefopt.sampling.candidates import SamplingSettings, sample_candidates
from prefopt.types import Prompt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
K = 4
TARGETS = {"one prompt": 2.0, "padded": 1.3}


class Case(NamedTuple):
    """Prompts, how they are answered, and how many of them `generate` is given one at a time."""

    name: str
    prompts: list[Prompt]
    settings: SamplingSettings
    alone: int
    source: str


class Measured(NamedTuple):
    """New tokens and the seconds they took."""

    tokens: int
    cpu_s: float
    wall_s: float


def everyday(n: int) -> Case:
    """The quickstart's prompts and settings."""
    settings = SamplingSettings(top_p=1.0, top_k=40, max_new_tokens=64, batch_size=64)
    return Case("everyday", load_prompts("everyday")[:n], settings, max(1, n // 8), "built in")


def conversations(n: int) -> Case:
    """Dialogues with the default settings."""
    path = Path(os.environ.get("PREFOPT_DATA", ROOT.parent / "shared" / "data"))
    path = path / "hh_helpful" / "train.jsonl.gz"
    settings = SamplingSettings(max_new_tokens=128, batch_size=64)
    if not path.exists():
        prompts = load_prompts("general")[:n]
        return Case("conversations", prompts, settings, max(1, n // 8), "built-in general prompts")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["prompt"] for _, line in zip(range(4 * n), file, strict=False)]
    prompts = load_prompts(rows)[:n]
    return Case("conversations", prompts, settings, max(1, n // 8), "hh_helpful")


CASES: dict[str, Callable[[int], Case]] = {"everyday": everyday, "conversations": conversations}


def measure(way: Callable[[int], int], seed: int) -> Measured:
    """One run of a way, which returns how many tokens it made."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = way(seed)
    return Measured(tokens, time.process_time() - cpu, time.perf_counter() - wall)


def by_generate(
    loaded: LanguageModel, prompts: Sequence[Prompt], settings: SamplingSettings, rows: int
) -> Callable[[int], int]:
    """transformers' own way, so many rows at once."""
    stops = end_token_ids(loaded.tokenizer, loaded.model.generation_config)
    pad = loaded.tokenizer.pad_token_id
    tokens = sorted((tokenize_prompt(loaded.tokenizer, p) for p in prompts), key=len)

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        made = 0
        for start in range(0, len(tokens), max(1, rows // K)):
            batch = tokens[start : start + max(1, rows // K)]
            width = max(map(len, batch))
            output = loaded.model.generate(
                input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in batch]),
                attention_mask=torch.tensor(
                    [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
                ),
                num_return_sequences=K,
                do_sample=True,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(stops),
            )
            for new in output[:, width:].tolist():
                end = next((i for i, token in enumerate(new) if token in stops), len(new) - 1)
                made += end + 1
        return made

    return run


def by_prefopt(
    loaded: LanguageModel, prompts: Sequence[Prompt], settings: SamplingSettings
) -> Callable[[int], int]:
    """`sample_candidates`."""

    def run(seed: int) -> int:
        found = sample_candidates(
            prompts, loaded, k=K, settings=settings, seed=seed, progress=False
        )
        return sum((c.n_tokens or 0) + (c.finish_reason == "stop") for c in found)

    return run


def compare(loaded: LanguageModel, case: Case, rounds: int) -> dict[str, Any]:
    """Every way in turn, `rounds` times."""
    settings = case.settings
    rows = settings.batch_size
    ways = {
        "one prompt": by_generate(loaded, case.prompts[: case.alone], settings, K),
        "padded": by_generate(loaded, case.prompts, settings, rows),
        "prefopt": by_prefopt(loaded, case.prompts, settings),
    }
    for way in (
        by_generate(loaded, case.prompts[:1], settings, K),
        by_prefopt(loaded, case.prompts[:1], settings),
    ):
        way(0)  # warm: what is imported and found out once
    runs: dict[str, list[Measured]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            runs[name].append(measure(way, number + 1))
            last = runs[name][-1]
            print(f"{case.name}, {name}: {last.tokens:,} tokens, {last.cpu_s:.1f} s", flush=True)
    lengths = [len(tokenize_prompt(loaded.tokenizer, p)) for p in case.prompts]
    return {
        "case": case.name,
        "source": case.source,
        "prompts": len(case.prompts),
        "alone": case.alone,
        "k": K,
        "prompt_tokens": [min(lengths), statistics.median(lengths), max(lengths)],
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": rows,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "runs": {name: [m._asdict() for m in found] for name, found in runs.items()},
    }


def rate(result: dict[str, Any], way: str, clock: str = "cpu_s") -> float:
    """Tokens a second over all rounds."""
    runs = result["runs"][way]
    return sum(r["tokens"] for r in runs) / sum(r[clock] for r in runs)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Sampling against transformers' `generate` on this CPU",
        "",
        f"`python benchmarks/speed_sampling.py --prompts {results['prompts']} --rounds "
        f"{results['rounds']}` at {results['commit']}: {results['machine']}, 1 thread, torch "
        f"{results['torch']}, transformers {results['transformers']}. SmolLM2-135M in fp32, "
        f"{K} answers a prompt. New tokens, end tokens included and padding not, a process CPU "
        "second over all rounds, which take turns; in brackets the lowest and highest round.",
        "",
        "| case | `generate`, one prompt at a time | `generate`, padded batches | prefopt | "
        "to one prompt (target 2) | to padded (target 1.3) | the same by wall time |",
        "|---|---|---|---|---|---|---|",
    ]
    missed = []
    for result in results["cases"]:
        shown = []
        for way in ("one prompt", "padded", "prefopt"):
            each = [r["tokens"] / r["cpu_s"] for r in result["runs"][way]]
            shown.append(f"{rate(result, way):.0f} ({min(each):.0f} to {max(each):.0f})")
        ratios = {w: rate(result, "prefopt") / rate(result, w) for w in TARGETS}
        wall = {w: rate(result, "prefopt", "wall_s") / rate(result, w, "wall_s") for w in TARGETS}
        missed += [
            f"{result['case']}, {w}: {ratios[w]:.2f}" for w in TARGETS if ratios[w] < TARGETS[w]
        ]
        lines.append(
            f"| {result['case']} | {' | '.join(shown)} | **{ratios['one prompt']:.2f}** | "
            f"**{ratios['padded']:.2f}** | {wall['one prompt']:.2f}, {wall['padded']:.2f} |"
        )
    lines.append("")
    for result in results["cases"]:
        low, middle, high = result["prompt_tokens"]
        kept = f"top_k={result['top_k']}" if result["top_k"] else f"top_p={result['top_p']}"
        lines.append(
            f"`{result['case']}`: {result['prompts']} prompts ({result['source']}; {low} to {high} "
            f"tokens, median {middle:.0f}), up to {result['max_new_tokens']} new tokens, temperature "
            f"{result['temperature']}, {kept}, {result['batch_size']} answers at once; one at a time "
            f"the first {result['alone']}."
        )
        lines.append("")
    lines.append("Missed: " + ("; ".join(missed) if missed else "nothing") + ".")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--prompts", type=int, default=64, help="prompts a case")
    parser.add_argument("--rounds", type=int, default=2, help="times that every way runs")
    parser.add_argument("--quick", action="store_true", help="no files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    loaded = load_model("demo", device="cpu")
    results: dict[str, Any] = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompts": options.prompts,
        "rounds": options.rounds,
        "cases": [
            compare(loaded, CASES[name](options.prompts), options.rounds) for name in options.only
        ],
    }
    text = table(results)
    print(text)
    if not options.quick and set(options.only) == set(CASES):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "speed_sampling.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "speed_sampling.md").write_text(text)


if __name__ == "__main__":
    main()
