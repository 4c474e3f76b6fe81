"""A PPO step against TRL's: the same model, adapter, prompts, lengths and epochs, on the CPU.

    python benchmarks/speed_ppo.py --make_env           # once: TRL 0.29.1 in an environment of its own
    python benchmarks/speed_ppo.py                      # every case; prints and writes results/
    python benchmarks/speed_ppo.py --only chat --trl_batches 1 4 --quick

TRL's PPO is that of 0.29.1 (`trl.experimental.ppo`; 1.16 has none). It does not install beside the
TRL that prefopt needs, so each run is a process of its own, and they alternate: prefopt, TRL,
prefopt, TRL.
Both train SmolLM2-135M with LoRA on all linear layers in fp32, 8 answers of exactly 53 tokens (TRL's
default `response_length`; the end token does not stop them), 4 epochs of 1 mini-batch, k1 in the
reward, a learned reward model. TRL's reward and value models are full models beside the policy, as
in its own example; prefopt's are adapters on the policy's base. No checkpointing, no bf16, which are
slower on a CPU; micro-batch sizes are tried for TRL and its fastest counts.

Cases: `equal` has 8 prompts of 64 tokens, where nobody pads; `chat` has 8 conversations as they
come (TRL pads them to the longest); `groups` has 4 answers to each of 2 conversations. Times are
process CPU seconds a step, split into generation, scoring and update; memory is the process's peak
(VmHWM), loading included. Rows come from the folder PREFOPT_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ENV = Path(os.environ.get("PREFOPT_TRL_ENV", Path.home() / ".cache" / "prefopt" / "trl-0.29.1"))
TORCH = "torch==2.13.0"
PACKAGES = ["trl==0.29.1", "transformers==5.24.0", "peft==0.21.2", "accelerate==1.15.0"]
CASES = ("equal", "chat", "groups")
BATCH, ANSWER, EPOCHS, SEED = 8, 53, 4, 0
SPEED_TARGET, MEMORY_TARGET = 1.5, 0.6
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PARTS = ("generation", "scoring", "update")


def make_env(folder: Path) -> None:
    """TRL 0.29.1 and what it needs. Torch comes first: its CPU build, so that nothing larger does."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for packages in ([TORCH], PACKAGES):
        subprocess.run([folder / "bin" / "pip", "install", "-q", *packages], check=True)


class Clock:
    """CPU seconds of this process by part of a step; one part runs at a time."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._part: str | None = None
        self._since = 0.0

    def enter(self, part: str | None) -> None:
        """End the part that runs and begin another; `None` ends the step."""
        now = time.process_time()
        if self._part is not None:
            self.steps[-1][self._part] += now - self._since
        elif part is not None:
            self.steps.append(dict.fromkeys(PARTS, 0.0))
        self._part, self._since = part, now


def peak_mb() -> float:
    """The largest resident memory this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """TRL 0.29.1's PPOTrainer. Runs in its own environment, without prefopt."""
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    transformers.logging.set_verbosity_error()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(
            job["model"], dtype=torch.float32, num_labels=1
        )
        for _ in range(2)
    )
    size = job["micro_batch"]
    rows = Dataset.from_dict({"input_ids": job["prompts"]})
    trainer = PPOTrainer(
        args=PPOConfig(
            job["folder"],
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=BATCH // size,
            local_rollout_forward_batch_size=job["rollout_batch"],
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            total_episodes=BATCH * job["steps"],
            response_length=ANSWER,
            temperature=1.0,
            num_sample_generations=0,
            learning_rate=3e-5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=SEED,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=peft.LoraConfig(**ADAPTER),
    )
    clock = Clock()
    generate, permute = ppo_trainer.batch_generation, ppo_trainer.np.random.permutation
    advance, log = trainer.lr_scheduler.step, trainer.log
    logs: list[dict[str, float]] = []

    def timed_generation(*args: Any) -> Any:
        clock.enter("generation")
        result = generate(*args)
        clock.enter("scoring")
        return result

    def timed_permutation(n: int) -> Any:  # the first thing of every epoch of the update
        clock.enter("update")
        return permute(n)

    def timed_advance() -> None:  # the last thing of a step
        advance()
        clock.enter(None)

    def kept_log(entry: dict[str, float], *args: Any) -> None:
        logs.append(dict(entry))
        log(entry, *args)

    ppo_trainer.batch_generation = timed_generation
    ppo_trainer.np.random.permutation = timed_permutation
    trainer.lr_scheduler.step = timed_advance
    trainer.log = kept_log
    trainer.train()
    return {
        "steps": clock.steps,
        "peak_mb": peak_mb(),
        "kl": [entry["objective/kl"] for entry in logs],
        "versions": f"trl {trl.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
    }


def run_prefopt(job: dict[str, Any]) -> dict[str, Any]:
    """Our PPOTrainer: policy, value and reward as adapters of one base."""
    import peft
    import torch
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import prefopt

    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    reward = prefopt.RewardModel.new(
        peft.get_peft_model(model, peft.LoraConfig(**ADAPTER), adapter_name="reward"),
        tokenizer,
        seed=SEED,
    )
    k = job["answers"]
    clock = Clock()

    class StepEnd(transformers.TrainerCallback):
        """Ends the clock's step where the rollout batch is used up."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % EPOCHS == 0:
                clock.enter(None)

    trainer = prefopt.PPOTrainer(
        model,
        reward,
        prefopt.PPOConfig(
            job["folder"],
            bf16=False,
            use_cpu=True,
            per_device_train_batch_size=BATCH // k,
            num_generations=k,
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            num_rollouts=job["steps"],
            max_new_tokens=ANSWER,
            stop_token_ids=[],
            temperature=1.0,
            learning_rate=3e-5,
            micro_batch_tokens=job["micro_batch_tokens"],
            logging_steps=EPOCHS,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=SEED,
        ),
        Dataset.from_dict({"prompt_ids": job["prompts"][::k]}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**ADAPTER),
        callbacks=[StepEnd()],
    )
    sample, step = trainer.engine.sample, trainer.training_step

    def timed_sample(*args: Any) -> Any:
        clock.enter("generation")
        result = sample(*args)
        clock.enter("scoring")
        return result

    def timed_step(*args: Any) -> Any:
        clock.enter("update")
        return step(*args)

    trainer.engine.sample, trainer.training_step = timed_sample, timed_step
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    return {
        "steps": clock.steps,
        "peak_mb": peak_mb(),
        "kl": [entry["objective/kl"] for entry in logs],
        "way": f"{trainer.roles.scoring.way}, {trainer.roles.scoring.backend}",
        "one_base": trainer.roles.one_base and trainer.reward.model is trainer.roles.policy,
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }


def work(job_file: str) -> None:
    """One run, in the process that the parent started."""
    job = json.loads(Path(job_file).read_text())
    import torch

    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:
        job["folder"] = folder
        result = run_trl(job) if job["library"] == "trl" else run_prefopt(job)
    result["cpu_s"] = [sum(step.values()) for step in result["steps"]]
    Path(job["result"]).write_text(json.dumps(result))


class Bench:
    """Starts the runs, each a process of its own."""

    def __init__(self, env: Path, steps: int) -> None:
        from prefopt.demo_model import demo_model_path

        self.python = {"prefopt": sys.executable, "trl": str(env / "bin" / "python")}
        self.model, self.steps = str(demo_model_path()), steps

    def run(self, library: str, prompts: list[list[int]], **settings: Any) -> dict[str, Any]:
        """One run's figures."""
        with tempfile.TemporaryDirectory() as folder:
            job, result = Path(folder) / "job.json", Path(folder) / "result.json"
            fixed = {"library": library, "model": self.model, "steps": self.steps}
            job.write_text(
                json.dumps(
                    fixed | {"prompts": prompts, "threads": 1, "result": str(result)} | settings
                )
            )
            env = os.environ | {
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": str(ROOT) if library == "prefopt" else "",
            }
            done = subprocess.run(
                [self.python[library], __file__, "--work", str(job)],
                env=env,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"the run of {library} failed:\n{done.stderr[-3000:]}")
            found: dict[str, Any] = json.loads(result.read_text())
            return found


def cases() -> dict[str, tuple[list[list[int]], int]]:
    """The prompts of each case, one an answer, and how many answers share one."""
    from transformers import AutoTokenizer

    from benchmarks.speed_dpo import read
    from prefopt.demo_model import demo_model_path

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    ids = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for row in read("hh_helpful")[:64]
    ]
    chats = [prompt for prompt in ids if len(prompt) <= 128]
    long = [prompt for prompt in ids if len(prompt) >= 96]
    return {
        "equal": ([prompt[:64] for prompt in ids if len(prompt) >= 64][:BATCH], 1),
        "chat": (chats[:BATCH], 1),
        "groups": ([prompt for prompt in long[: BATCH // 4] for _ in range(4)], 4),
    }


def compare(
    bench: Bench, case: str, trl_batches: list[int], rounds: int, say: Any
) -> dict[str, Any]:
    """Prefopt and TRL in turn; TRL's settings once each, its fastest again in the later rounds."""
    prompts, k = cases()[case]
    ours_settings = {"answers": k, "micro_batch_tokens": None}
    ours: list[dict[str, Any]] = []
    theirs: dict[int, list[dict[str, Any]]] = {}

    def theirs_at(size: int) -> None:
        ours.append(bench.run("prefopt", prompts, **ours_settings))
        found = bench.run("trl", prompts, micro_batch=size, rollout_batch=BATCH)
        theirs.setdefault(size, []).append(found)
        say(
            f"{case}: prefopt {mean_step(ours[-1:]):.1f} s, {ours[-1]['peak_mb']:,.0f} MB; "
            f"TRL by {size} {mean_step([found]):.1f} s, {found['peak_mb']:,.0f} MB"
        )

    for size in trl_batches:
        theirs_at(size)
    fastest = min(theirs, key=lambda size: mean_step(theirs[size]))
    for _ in range(rounds - 1):
        theirs_at(fastest)
    leanest = min(theirs, key=lambda size: theirs[size][0]["peak_mb"])
    peak = statistics.median(run["peak_mb"] for run in ours)
    return {
        "case": case,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "answers_a_prompt": k,
        "prefopt": ours,
        "trl": {str(size): runs for size, runs in theirs.items()},
        "fastest_trl": fastest,
        "leanest_trl": leanest,
        "ratio": mean_step(theirs[fastest]) / mean_step(ours),
        "ratio_by_part": {
            part: mean_step(theirs[fastest], part) / mean_step(ours, part) for part in PARTS
        },
        "memory_ratio": peak / theirs[fastest][0]["peak_mb"],
        "memory_ratio_to_leanest": peak / theirs[leanest][0]["peak_mb"],
    }


def mean_step(runs: list[dict[str, Any]], part: str | None = None) -> float:
    """CPU seconds of a step, or of a part of it."""
    steps = [step for run in runs for step in run["steps"]]
    return statistics.mean(sum(step.values()) if part is None else step[part] for step in steps)


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# PPO against TRL 0.29.1 on this CPU",
        "",
        f"`python benchmarks/speed_ppo.py` at {result['commit']}: {result['machine']}, 1 thread. "
        f"prefopt: {result['versions']['prefopt']}; TRL: {result['versions']['trl']}. SmolLM2-135M, "
        f"LoRA r=16 on all linear layers, fp32, {BATCH} answers of {ANSWER} tokens a step, {EPOCHS} "
        "epochs of 1 mini-batch. Process CPU seconds a step; each TRL run after a prefopt run.",
        "",
        f"| prompts | prefopt, s | TRL by micro-batch size, s | ratio to its fastest (target "
        f"{SPEED_TARGET}) | peak MB, prefopt / that TRL | memory (target {MEMORY_TARGET}) | memory "
        "against the leanest of these |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        by_size = ", ".join(f"{size}: {mean_step(runs):.0f}" for size, runs in case["trl"].items())
        fastest = case["trl"][str(case["fastest_trl"])]
        peak = statistics.median(run["peak_mb"] for run in case["prefopt"])
        lines.append(
            f"| {case['case']} | {mean_step(case['prefopt']):.0f} | {by_size} | "
            f"**{case['ratio']:.2f}** | {peak:,.0f} / {fastest[0]['peak_mb']:,.0f} | "
            f"**{case['memory_ratio']:.2f}** | {case['memory_ratio_to_leanest']:.2f} |"
        )
    lines += [
        "",
        "By part, prefopt / TRL's fastest, s (ratio):",
        "",
        "| prompts | generation | scoring | update |",
        "|---|---|---|---|",
    ]
    for case in result["cases"]:
        fastest = case["trl"][str(case["fastest_trl"])]
        cells = " | ".join(
            f"{mean_step(case['prefopt'], part):.1f} / {mean_step(fastest, part):.1f} "
            f"({case['ratio_by_part'][part]:.2f})"
            for part in PARTS
        )
        lines.append(f"| {case['case']} | {cells} |")
    lines += [
        "",
        "`equal`: 8 prompts of 64 tokens; `chat`: 8 conversations of 38 to 124 tokens; `groups`: 4 "
        "answers to each of 2 conversations. TRL's memory grows with its micro-batch and its time "
        "falls, so its fastest setting is not its leanest. TRL's value and reward are whole models; "
        "prefopt's are adapters on the policy's base.",
    ]
    missed = [
        f"{c['case']} {name} {c[key]:.2f}"
        for c in result["cases"]
        for name, key, bad in (
            ("speed", "ratio", c["ratio"] < SPEED_TARGET),
            ("memory", "memory_ratio", c["memory_ratio"] > MEMORY_TARGET),
        )
        if bad
    ]
    lines += ["", f"Missed: {'; '.join(missed)}." if missed else "Every target was reached."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make_env", action="store_true", help="make TRL's environment and stop")
    parser.add_argument("--env", type=Path, default=ENV, help="its folder (PREFOPT_TRL_ENV)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--trl_batches", nargs="+", type=int, default=[4, 8, 1], help="TRL's micro-batch sizes"
    )
    parser.add_argument("--steps", type=int, default=1, help="PPO steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of TRL's fastest setting")
    parser.add_argument("--quick", action="store_true", help="no files")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    if options.make_env:
        make_env(options.env)
        return
    if not (options.env / "bin" / "python").exists():
        raise SystemExit(f"no TRL environment in {options.env}: run this with --make_env first.")
    sys.path.insert(0, str(ROOT))
    bench = Bench(options.env, options.steps)
    result: dict[str, Any] = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "cases": [
            compare(bench, case, options.trl_batches, options.rounds, print)
            for case in options.only
        ],
    }
    last = result["cases"][-1]
    result["versions"] = {
        "prefopt": last["prefopt"][0]["versions"],
        "trl": last["trl"][str(last["fastest_trl"])][0]["versions"],
    }
    text = table(result)
    print(text)
    if not options.quick and set(options.only) == set(CASES):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "speed_ppo.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "speed_ppo.md").write_text(text)


if __name__ == "__main__":
    main()
