"""Classic RLHF against the exact optimum: DPO, reward models and PPO where nothing is estimated.

    python benchmarks/quality_rlhf.py --seeds 0 1 2 3 4 --workers 2      # all parts, writes results/
    python benchmarks/quality_rlhf.py --parts exact --seeds 0

Parts:
    exact      regret of each trainer in `exact_world`, and of deliberately faulty PPO, which must fail
    overopt    true against learned reward by KL, for reward models of 128 to 8,192 labels
    frontier   reward against KL on a real language model (`rlhf_frontier.py` writes its report)

All training is prefopt's own: `DPOTrainer`, `RewardTrainer`, `PPOTrainer`; all evaluation is by
enumeration with the model's own forward. Each measurement of a seed is kept in a folder (`--cache`),
so that an interrupted run goes on where it was; `--fresh` measures anew. Targets hold for every seed
unless the table says otherwise, intervals are Student's t at 95 % over the seeds. The exit code is 1
where a target is missed or a deliberate fault goes unnoticed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

import datasets
import torch
import transformers
from scipy import stats
from torch import Tensor

from benchmarks.exact_world import World, calibration
from prefopt.advantages import kl_k3
from prefopt.trees import AnswerTree

Figures = dict[str, Any]

BETA = 0.5
LABELS = 16384
ROUNDS = 4  # of iterative DPO
BATCH = 256
PARTS = ("exact", "overopt", "frontier")
# Everything fits into one micro-batch: answers of five symbols.
AT_ONCE = 1 << 20
RM_LABELS = (128, 512, 2048, 8192)
FEW_LABELS = (128, 512)
DRAWS = 4
RM_EPOCHS = {128: 12, 512: 6, 2048: 4, 8192: 3, LABELS: 3}
PPO_STEPS = 100
FLOOR_STEPS = 400
LORA_RATES = {"learning_rate": 1e-2, "value_learning_rate": 1e-2}
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
OVEROPT_LABELS = 512  # of the reward model that PPO over-optimises
OVEROPT_BETAS = (0.5, 0.1, 0.03)
BEST_OF = (1, 4, 16, 64, 256, 1024, 4096)
IDEAL_BETAS = (2, 1, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)


# --- Training, by prefopt's trainers ------------------------------------------------------------


def common(seed: int, folder: str, **more: Any) -> dict[str, Any]:
    """Settings that all trainers share here."""
    return {
        "output_dir": folder,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


def quiet(trainer: Any) -> Any:
    """The trainer without a summary on the terminal."""
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def run_dpo(world: World, rows: list[dict[str, Any]], policy: Any = None, **more: Any) -> Any:
    """A policy trained by `DPOTrainer` on rows of pairs; the reference is the world's."""
    from prefopt import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "beta": BETA,
            "num_train_epochs": 3,
            "per_device_train_batch_size": BATCH,
            "warmup_steps": 20,
            "micro_batch_tokens": AT_ONCE,
            "group_by_prompt": False,  # four prompts of one token: there is nothing to share
        }
        trainer = DPOTrainer(
            copy.deepcopy(policy or world.reference),
            copy.deepcopy(world.reference) if policy is not None else None,
            DPOConfig(**common(world.seed, folder, **(settings | more))),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=world.tokenizer(),
        )
        quiet(trainer).train()
    return trainer.model


def run_reward(world: World, n: int, draw: int = 0) -> Any:
    """A reward model trained by `RewardTrainer` on n pairs; each `draw` has other pairs."""
    from prefopt.training.reward_model import RewardModel
    from prefopt.training.reward_trainer import RewardConfig, RewardTrainer

    pairs = world.pairs(n, torch.Generator().manual_seed(2000 + world.seed + 100 * draw))
    with tempfile.TemporaryDirectory() as temporary:
        trainer = RewardTrainer(
            RewardModel.new(copy.deepcopy(world.reference), world.tokenizer(), seed=world.seed),
            args=RewardConfig(
                **common(
                    world.seed,
                    temporary,
                    num_train_epochs=RM_EPOCHS[n],
                    per_device_train_batch_size=min(BATCH, n // 4),
                    micro_batch_tokens=AT_ONCE,
                    group_by_prompt=False,
                )
            ),
            train_dataset=datasets.Dataset.from_list(world.rows(pairs)),
            processing_class=world.tokenizer(),
        )
        quiet(trainer).train()
    return trainer.reward


def run_ppo(
    world: World, reward: Any, *, adapter: Any = None, fault: str | None = None, **more: Any
) -> Any:
    """A policy trained by `PPOTrainer`, each rollout batch on all prompts alike."""
    from prefopt.training.ppo_trainer import PPOConfig, PPOTrainer

    class K3InTheReward(PPOTrainer):
        """The estimator with less variance and another gradient: the wrong objective."""

        def kl_penalties(self, logps: Tensor, reference: Tensor) -> Tensor:
            return kl_k3(logps, reference)

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "kl_coef": BETA,
            "num_rollouts": PPO_STEPS,
            "per_device_train_batch_size": world.n_prompts,
            "num_generations": BATCH // world.n_prompts,
            "max_new_tokens": world.length,
            "stop_token_ids": [],
            "value_learning_rate": 3e-3,
            "cliprange_value": None,
            "micro_batch_tokens": AT_ONCE,
            "num_logged_answers": 0,
        }
        prompts = [{"prompt_ids": world.prompt_ids(k)} for k in range(world.n_prompts)]
        trainer = (K3InTheReward if fault == "k3" else PPOTrainer)(
            copy.deepcopy(world.reference),
            reward,
            PPOConfig(**common(world.seed, folder, **(settings | more))),
            datasets.Dataset.from_list(prompts),
            processing_class=world.tokenizer(),
            peft_config=adapter,
        )
        quiet(trainer).train()
    return trainer.model


def callable_reward(score: Callable[[Tensor, Tensor], Tensor], n_symbols: int) -> Any:
    """A function of ids as the kind of reward that `PPOTrainer` takes."""

    def reward(
        prompts: Any, answers: Any, prompt_ids: Any = None, answer_ids: Any = None
    ) -> list[float]:
        prompt = torch.tensor([ids[0] for ids in prompt_ids]) - n_symbols
        return score(prompt, torch.tensor(answer_ids)).tolist()

    return reward


def run_floor(world: World, adapter: Any, beta: float = BETA) -> Any:
    """The best that an adapter can be: maximum likelihood on samples of the optimum itself."""
    from peft import get_peft_model

    draw = torch.Generator().manual_seed(4000 + world.seed)
    transformers.set_seed(world.seed)
    model = get_peft_model(copy.deepcopy(world.reference), adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, FLOOR_STEPS)
    best = world.optimum(beta)
    for _ in range(FLOOR_STEPS):
        prompt = torch.randint(world.n_prompts, (512,), generator=draw)
        symbols = world.answers[world.sample(best, prompt, draw)]
        loss = -world.token_logps(model, prompt, symbols).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def all_scores(world: World, model: Any) -> Tensor:
    """A reward model's scores (P, S) of all answers."""
    answers = tuple(map(tuple, world.answers.tolist()))
    trees = [
        AnswerTree(tuple(world.prompt_ids(k)), answers[start : start + 1296])
        for k in range(world.n_prompts)
        for start in range(0, len(answers), 1296)
    ]
    return model.score_trees(trees, micro_batch_tokens=AT_ONCE // 32).view(world.n_prompts, -1)


def judged(world: World, scores: Tensor, n: int = 1 << 17) -> Figures:
    """Accuracy and calibration on fresh pairs, against the true probabilities instead of labels."""
    draw = torch.Generator().manual_seed(3000 + world.seed)
    prompt = torch.randint(world.n_prompts, (n,), generator=draw)
    first, second = (world.sample(world.ref_logps, prompt, draw) for _ in range(2))
    said = (scores[prompt, first] - scores[prompt, second]).double().sigmoid()
    true = (world.rewards[prompt, first] - world.rewards[prompt, second]).double().sigmoid()
    both = torch.stack((scores.flatten(), world.rewards.flatten()))
    return {
        "accuracy": float(torch.where(said > 0.5, true, 1 - true).mean()),
        "ceiling": float(torch.maximum(true, 1 - true).mean()),
        "ece": calibration(said, true),
        "correlation": float(torch.corrcoef(both)[0, 1]),
    }


# --- Part "exact" -------------------------------------------------------------------------------


def figures(world: World, logps: Tensor, beta: float = BETA) -> Figures:
    """A policy's exact figures; `efficiency` is its reward by the best there is at its KL."""
    value = world.value(logps, beta)
    return {
        "reward": value.reward,
        "kl": value.kl,
        "regret": world.regret(logps, beta),
        "efficiency": value.reward / world.value(world.optimum_at_kl(value.kl)).reward,
    }


def measure_dpo(world: World) -> Figures:
    """Offline DPO on a quarter of the labels and on all of them."""
    pairs = world.pairs(LABELS, torch.Generator().manual_seed(1000 + world.seed))
    few = type(pairs)(*(x[: LABELS // 4] for x in pairs))
    return {
        "dpo_4k": figures(world, world.logps(run_dpo(world, world.rows(few)))),
        "dpo_16k": figures(world, world.logps(run_dpo(world, world.rows(pairs)))),
    }


def measure_iterative(world: World) -> Figures:
    """As many labels in rounds, each on answers of the policy so far; the reference stays."""
    draw = torch.Generator().manual_seed(1000 + world.seed)
    rows: list[dict[str, Any]] = []
    policy = None
    for _ in range(ROUNDS):
        logps = None if policy is None else world.logps(policy)
        rows += world.rows(world.pairs(LABELS // ROUNDS, draw, logps))
        policy = run_dpo(world, rows, policy, num_train_epochs=2)
    return {"iterative": figures(world, world.logps(policy))}


def measure_learned(world: World) -> Figures:
    """A reward model on all labels, and PPO on it."""
    model = run_reward(world, LABELS)
    found = judged(world, all_scores(world, model))
    return {
        "reward_model": found,
        "ppo_learned": figures(world, world.logps(run_ppo(world, model))),
    }


def measure_ppo(world: World) -> Figures:
    """PPO on the true reward."""
    reward = callable_reward(world.reward, world.n_symbols)
    return {"ppo_true": figures(world, world.logps(run_ppo(world, reward)))}


def measure_faults(world: World) -> Figures:
    """PPO with a fault each; a benchmark that lets one pass would let anything pass."""
    right = callable_reward(world.reward, world.n_symbols)
    blind = callable_reward(world.blind_reward, world.n_symbols)
    policies = {
        "fault: k3 in the reward": run_ppo(world, right, fault="k3"),
        "fault: reward blind to the last symbol": run_ppo(world, blind),
        "fault: score clipped to 1": run_ppo(world, right, score_clip=1.0),
    }
    return {name: figures(world, world.logps(policy)) for name, policy in policies.items()}


def measure_lora(world: World) -> Figures:
    """PPO with adapters of policy and value on one base, and the floor of such an adapter."""
    from peft import LoraConfig

    reward = callable_reward(world.reward, world.n_symbols)
    policy = run_ppo(world, reward, adapter=LoraConfig(**ADAPTER), **LORA_RATES)
    floor = run_floor(world, LoraConfig(**ADAPTER))
    return {
        "ppo_lora": figures(world, world.logps(policy)),
        "lora_floor": figures(world, world.logps(floor)),
    }


# --- Part "overopt" -----------------------------------------------------------------------------


def measure_overopt(world: World, n: int) -> Figures:
    """Proxy and gold of best-of-n and of the ideal policies for a reward model on n labels."""
    model = run_reward(world, n)
    scores = all_scores(world, model)
    found: Figures = {"reward_model": judged(world, scores)}
    scale = float(scores_std(world, scores))
    proxy = (scores - world.value(world.ref_logps, 0.0, scores).reward) / scale

    def point(logps: Tensor) -> Figures:
        gold = world.value(logps)
        return {"kl": gold.kl, "proxy": world.value(logps, 0.0, proxy).reward, "gold": gold.reward}

    found["best_of"] = [{"n": k, **point(world.best_of(k, proxy))} for k in BEST_OF]
    found["ideal"] = [{"beta": beta, **point(world.optimum(beta, proxy))} for beta in IDEAL_BETAS]
    found["ppo"] = []
    for beta in OVEROPT_BETAS if n == OVEROPT_LABELS else ():
        # The model's own scores with a KL coefficient in their units: the same optimum.
        logps = world.logps(run_ppo(world, model, kl_coef=beta * scale))
        ended = point(logps)
        ideal = point(world.optimum_at_kl(ended["kl"], proxy))
        found["ppo"].append({"beta": beta, **ended, "ideal": ideal})
    return {f"labels_{n}": found}


def measure_draws(world: World) -> Figures:
    """Small reward models on other pairs: which 128 or 512 pairs one has is a matter of luck."""
    found: Figures = {}
    for n in FEW_LABELS:
        found[f"draws_{n}"] = []
        for draw in range(1, DRAWS):
            scores = all_scores(world, run_reward(world, n, draw))
            gold = world.value(world.best_of(16, scores)).reward
            accuracy = judged(world, scores)["accuracy"]
            found[f"draws_{n}"].append({"accuracy": accuracy, "gold_16": gold})
    return found


def scores_std(world: World, scores: Tensor) -> Tensor:
    """The standard deviation of scores under the reference, within prompts."""
    q = world.ref_logps.exp()
    mean = (q * scores).sum(1, keepdim=True)
    return (q * (scores - mean).square()).sum(1).mean().sqrt()


# --- Targets ------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval; not a number for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = (
        float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    )
    return mean, mean - half, mean + half


class Checks:
    """Targets with their figures of all seeds."""

    def __init__(self) -> None:
        self.rows: list[Figures] = []

    def add(
        self,
        what: str,
        target: str,
        values: Sequence[float],
        met: Callable[[float], bool],
        *,
        any_seed: bool = False,
    ) -> None:
        """`met` judges one seed's figure; all seeds must meet it, or any."""
        mean, low, high = interval(values)
        passed = [met(value) for value in values]
        self.rows.append(
            {
                "what": what, "target": target, "values": list(values),
                "mean": mean, "low": low, "high": high,
                "met": any(passed) if any_seed else all(passed),
                "mean_met": met(mean),
            }
        )  # fmt: skip


def exact_checks(seeds: list[Figures]) -> list[Figures]:
    """Proof 1."""
    checks = Checks()

    def regrets(name: str) -> list[float]:
        return [seed[name]["regret"] for seed in seeds]

    def ratio(a: str, b: str) -> list[float]:
        return [x / y for x, y in zip(regrets(a), regrets(b), strict=True)]

    checks.add("PPO, true reward: regret", "<= 0.03", regrets("ppo_true"), lambda x: x <= 0.03)
    checks.add("PPO, learned reward: regret", "<= 0.30", regrets("ppo_learned"), lambda x: x <= 0.3)
    checks.add("DPO, 16,384 labels: regret", "<= 0.20", regrets("dpo_16k"), lambda x: x <= 0.2)
    checks.add(
        "DPO, 16,384 against 4,096 labels: ratio of regrets", "< 1",
        ratio("dpo_16k", "dpo_4k"), lambda x: x < 1,
    )  # fmt: skip
    checks.add(
        f"iterative DPO ({ROUNDS} rounds) against offline, 16,384 labels: ratio of regrets",
        "<= 0.5", ratio("iterative", "dpo_16k"), lambda x: x <= 0.5,
    )  # fmt: skip
    models = [seed["reward_model"] for seed in seeds]
    checks.add(
        "reward model: Bayes ceiling - accuracy", "<= 0.05",
        [m["ceiling"] - m["accuracy"] for m in models], lambda x: x <= 0.05,
    )  # fmt: skip
    checks.add("reward model: ECE", "<= 0.03", [m["ece"] for m in models], lambda x: x <= 0.03)
    excess = [a - b for a, b in zip(regrets("ppo_lora"), regrets("lora_floor"), strict=True)]
    checks.add("PPO, LoRA r = 8: regret above its floor", "<= 0.03", excess, lambda x: x <= 0.03)
    for name in [name for name in seeds[0] if name.startswith("fault")]:
        checks.add(f"{name}: regret", "> 0.03", regrets(name), lambda x: x > 0.03)
    return checks.rows


def overopt_checks(seeds: list[Figures]) -> list[Figures]:
    """Proof 2."""
    checks = Checks()
    sizes = [f"labels_{n}" for n in RM_LABELS]

    def rise(figure: str) -> list[float]:
        """The smallest step from few labels to many; above 0 where all rise."""
        return [
            min(b - a for a, b in itertools.pairwise(mean_of_draws(seed, n, figure)
                                                     for n in (*FEW_LABELS, RM_LABELS[-1])))
            for seed in seeds
        ]  # fmt: skip

    labels = f"128, 512 (means of {DRAWS} draws), 8,192"
    checks.add(
        f"accuracy of the reward model rises with labels ({labels}): smallest step", "> 0",
        rise("accuracy"), lambda x: x > 0,
    )  # fmt: skip
    checks.add(
        "ECE at 8,192 labels", "<= 0.03",
        [seed["labels_8192"]["reward_model"]["ece"] for seed in seeds], lambda x: x <= 0.03,
    )  # fmt: skip
    checks.add(
        f"gold of best of 16 rises with labels ({labels}): smallest step", "> 0",
        rise("gold_16"), lambda x: x > 0,
    )  # fmt: skip
    steps = [
        min(b["proxy"] - a["proxy"] for name in sizes
            for a, b in itertools.pairwise(seed[name]["best_of"]))
        for seed in seeds
    ]  # fmt: skip
    checks.add(
        "proxy of best-of-n never falls with n: smallest step", ">= 0", steps, lambda x: x >= 0
    )
    above = [
        min(p["proxy"] - p["gold"] for name in sizes for p in seed[name]["best_of"] if p["n"] >= 64)
        for seed in seeds
    ]
    checks.add("proxy above gold from n = 64 on: smallest gap", ">= 0", above, lambda x: x >= 0)
    turns = [max(turn_over(seed[name]["best_of"]) for name in sizes) for seed in seeds]
    checks.add(
        "turn-over: gold lost from its peak to n = 4,096, most of all sizes",
        ">= 0.05 (one seed)", turns, lambda x: x >= 0.05, any_seed=True,
    )  # fmt: skip
    for i, beta in enumerate(OVEROPT_BETAS):
        ends = [seed[f"labels_{OVEROPT_LABELS}"]["ppo"][i] for seed in seeds]
        for axis in ("proxy", "gold"):
            checks.add(
                f"PPO, beta {beta:g}, {OVEROPT_LABELS} labels: {axis} from the ideal curve at its KL",
                "<= 0.1", [abs(end[axis] - end["ideal"][axis]) for end in ends],
                lambda x: x <= 0.1,
            )  # fmt: skip
    return checks.rows


def mean_of_draws(seed: Figures, n: int, figure: str) -> float:
    """Accuracy, or gold of the best of 16, of a seed's reward models on n labels."""
    found = seed[f"labels_{n}"]
    first = {
        "accuracy": found["reward_model"]["accuracy"],
        "gold_16": next(p["gold"] for p in found["best_of"] if p["n"] == 16),
    }
    return statistics.fmean(d[figure] for d in [first, *seed.get(f"draws_{n}", [])])


def turn_over(points: Sequence[Figures]) -> float:
    """How much gold is lost from the peak to the last point."""
    return max(p["gold"] for p in points) - float(points[-1]["gold"])


# --- Running, and keeping what was measured -----------------------------------------------------

MEASURES: dict[str, dict[str, Callable[[World], Figures]]] = {
    "exact": {
        "ppo": measure_ppo,
        "dpo": measure_dpo,
        "iterative": measure_iterative,
        "learned": measure_learned,
        "lora": measure_lora,
        "faults": measure_faults,
    },
    "overopt": {
        **{f"labels_{n}": functools.partial(measure_overopt, n=n) for n in RM_LABELS},
        "draws": measure_draws,
    },
}


def measure_seed(part: str, seed: int, cache: Path, only: Sequence[str] = ()) -> Figures:
    """All measurements of a part for one seed; those in the cache are not made again."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
    datasets.disable_progress_bars()
    world: World | None = None
    found: Figures = {"seed": seed, "seconds": {}, "commits": []}
    for name, measure in MEASURES[part].items():
        if only and name not in only:
            continue
        file = cache / f"{part}-{name}-{seed}.json"
        if not file.is_file():
            world = world or World(seed)
            started, commit_then = time.process_time(), commit()
            figures_now = measure(world)
            kept = {
                "figures": figures_now,
                "seconds": time.process_time() - started,
                "commit": commit_then,
            }
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(kept))
            temporary.rename(file)
            print(f"{part} {name} seed {seed}: {brief(figures_now)}", flush=True)
        kept = json.loads(file.read_text())
        found |= kept["figures"]
        found["seconds"][name] = kept["seconds"]
        found["commits"].append(kept["commit"])
    return found


def brief(found: Figures) -> str:
    """One line of what was measured."""
    parts = []
    for name, value in found.items():
        regret = value.get("regret") if isinstance(value, dict) else None
        parts.append(name if regret is None else f"{name} {regret:.3f}")
    return ", ".join(parts)


def commit() -> str:
    """The commit that is measured, with a mark when the tree differs from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def settings(seeds: Sequence[int], found: Sequence[Figures]) -> Figures:
    """What a report says of how it came about."""
    import trl

    return {
        "command": "python benchmarks/quality_rlhf.py",
        "commits": sorted({c for seed in found for c in seed["commits"]}),
        "seeds": list(seeds),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "cpu_minutes": sum(sum(seed["seconds"].values()) for seed in found) / 60,
    }


# --- Report -------------------------------------------------------------------------------------


def check_table(checks: Sequence[Figures]) -> str:
    """Targets as Markdown."""
    lines = [
        "| figure | target | mean (95 % interval) | lowest … highest seed | met |",
        "|---|---|---|---|---|",
    ]
    for row in checks:
        verdict = "yes" if row["met"] else "in the mean only" if row["mean_met"] else "**no**"
        lines.append(
            f"| {row['what']} | {row['target']} "
            f"| {row['mean']:.3f} ({row['low']:.3f} … {row['high']:.3f}) "
            f"| {min(row['values']):.3f} … {max(row['values']):.3f} | {verdict} |"
        )
    return "\n".join(lines)


def policy_table(seeds: Sequence[Figures]) -> str:
    """Every policy of the exact part as Markdown, means over the seeds."""
    lines = [
        "| policy | reward | KL | regret, each seed | reward by the best at its KL |",
        "|---|---|---|---|---|",
    ]
    for name, first in seeds[0].items():
        if not isinstance(first, dict) or "regret" not in first:
            continue
        each = [seed[name] for seed in seeds]
        mean = {k: statistics.fmean(e[k] for e in each) for k in first}
        lines.append(
            f"| {name.replace('_', ' ')} | {mean['reward']:.3f} | {mean['kl']:.3f} "
            f"| {', '.join(format(e['regret'], '.3f') for e in each)} | {mean['efficiency']:.3f} |"
        )
    return "\n".join(lines)


def overopt_table(seeds: Sequence[Figures]) -> str:
    """Reward models and best-of-n by labels as Markdown, means over the seeds."""
    lines = [
        "| labels | accuracy (ceiling) | ECE | correlation | gold (proxy) of best of "
        + " | ".join(f"{n:,}" for n in BEST_OF[1:])
        + " |",
        "|---|---|---|---|" + "---|" * (len(BEST_OF) - 1),
    ]

    def mean(read: Callable[[Figures], float], name: str) -> float:
        return statistics.fmean(read(seed[name]) for seed in seeds)

    for n in RM_LABELS:
        name = f"labels_{n}"
        cells = [
            f"{mean(lambda f, i=i: f['best_of'][i]['gold'], name):.2f} "
            f"({mean(lambda f, i=i: f['best_of'][i]['proxy'], name):.2f})"
            for i in range(1, len(BEST_OF))
        ]
        lines.append(
            f"| {n:,} | {mean(lambda f: f['reward_model']['accuracy'], name):.3f} "
            f"({mean(lambda f: f['reward_model']['ceiling'], name):.3f}) "
            f"| {mean(lambda f: f['reward_model']['ece'], name):.3f} "
            f"| {mean(lambda f: f['reward_model']['correlation'], name):.2f} | "
            + " | ".join(cells)
            + " |"
        )
    lines += [
        "",
        f"PPO on the reward model of {OVEROPT_LABELS} labels, against the ideal policy for it at the "
        "same KL:",
        "",
        "| beta | KL | proxy (ideal) | gold (ideal) |",
        "|---|---|---|---|",
    ]
    for i, beta in enumerate(OVEROPT_BETAS):
        ends = [seed[f"labels_{OVEROPT_LABELS}"]["ppo"][i] for seed in seeds]
        kl, proxy, gold = (statistics.fmean(e[k] for e in ends) for k in ("kl", "proxy", "gold"))
        ideal = [statistics.fmean(e["ideal"][k] for e in ends) for k in ("proxy", "gold")]
        lines.append(
            f"| {beta:g} | {kl:.2f} | {proxy:.2f} ({ideal[0]:.2f}) | {gold:.2f} ({ideal[1]:.2f}) |"
        )
    return "\n".join(lines)


def plot_exact(seeds: Sequence[Figures], file: Path) -> None:
    """Regret of every policy, a dot a seed, and the first seed's frontier."""
    plt = plotting()
    names = [n for n, f in seeds[0].items() if isinstance(f, dict) and "regret" in f]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    world = World(seeds[0]["seed"])
    curve = [
        world.value(world.optimum(beta)) for beta in (8, 4, 2, 1, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15)
    ]
    left.plot([v.kl for v in curve], [v.reward for v in curve], "k-", lw=1, label="optimum")
    best = [world.value(world.best_of(n)) for n in (2, 4, 8, 16, 32, 64)]
    left.plot([v.kl for v in best], [v.reward for v in best], "k:", lw=1, label="best of n")
    for name in names:
        mark = "x" if name.startswith("fault") else "o"
        at = seeds[0][name]
        left.plot(at["kl"], at["reward"], mark, ms=5, label=name.replace("_", " "))
    left.set(xlabel="KL to the reference", ylabel="true reward", title=f"seed {seeds[0]['seed']}")
    left.legend(fontsize=6)
    for place, name in enumerate(names):
        values = [max(seed[name]["regret"], 1e-3) for seed in seeds]
        right.plot(values, [place] * len(values), "x" if name.startswith("fault") else "o", ms=4)
    right.axvline(0.03, color="k", lw=0.8, ls="--")
    right.set(xscale="log", xlabel="regret; 0.03 dashed", title="all seeds")
    right.set_yticks(range(len(names)), [n.replace("_", " ") for n in names], fontsize=7)
    save(figure, file)


def plot_overopt(seeds: Sequence[Figures], file: Path) -> None:
    """Proxy and gold by KL, a panel a number of labels."""
    plt = plotting()
    figure, panels = plt.subplots(1, len(RM_LABELS), figsize=(13, 3.6), sharey=True)
    for panel, n in zip(panels, RM_LABELS, strict=True):
        for number, seed in enumerate(seeds):
            found = seed[f"labels_{n}"]
            for kind, style in (("best_of", "-"), ("ideal", ":")):
                for axis, color in (("proxy", "tab:orange"), ("gold", "tab:blue")):
                    panel.plot(
                        [max(p["kl"], 0) ** 0.5 for p in found[kind]], [p[axis] for p in found[kind]],
                        style, color=color, lw=0.9, alpha=0.8,
                        label=f"{axis}, {kind.replace('_', ' ')}" if number == 0 else None,
                    )  # fmt: skip
            for axis, color in (("proxy", "tab:orange"), ("gold", "tab:blue")):
                panel.plot(
                    [max(p["kl"], 0) ** 0.5 for p in found["ppo"]], [p[axis] for p in found["ppo"]],
                    "o", color=color, ms=4,
                    label=f"{axis}, PPO" if number == 0 and found["ppo"] else None,
                )  # fmt: skip
        panel.set(title=f"{n:,} labels", xlabel="sqrt(KL)", ylim=(-0.2, 3.4))
        panel.legend(fontsize=6)
    panels[0].set_ylabel("reward in standard deviations")
    save(figure, file)


def plotting() -> Any:
    """Matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, file: Path) -> None:
    """A PNG small enough to commit."""
    figure.tight_layout()
    figure.savefig(file, dpi=80)


REPORTS: dict[str, tuple[str, Any, Any, Any]] = {
    "exact": ("Against the exact optimum", exact_checks, policy_table, plot_exact),
    "overopt": ("Over-optimisation", overopt_checks, overopt_table, plot_overopt),
}


def report(part: str, found: list[Figures], out: Path) -> tuple[str, list[Figures]]:
    """Write a part's JSON and plot; returns its page and its checks."""
    title, judge, tabulate, plot = REPORTS[part]
    checks = judge(found)
    how = settings([seed["seed"] for seed in found], found)
    name = f"quality_rlhf_{part}"
    (out / f"{name}.json").write_text(
        json.dumps({**how, "checks": checks, "seeds_measured": found}, indent=1) + "\n"
    )
    plot(found, out / f"{name}.png")
    page = (
        f"## {title}\n\n`{how['command']} --parts {part}` at {', '.join(how['commits'])}; seeds "
        f"{', '.join(map(str, how['seeds']))}; {how['machine']}, {how['cpu_minutes']:.0f} CPU "
        f"minutes; Python {how['python']}, torch {how['torch']}, transformers {how['transformers']}, "
        f"trl {how['trl']}.\n\n{check_table(checks)}\n\n{tabulate(found)}\n\n![{title}]({name}.png)\n"
    )
    return page, checks


def main() -> int:
    """Measure, print, write `results/quality_rlhf*`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workers", type=int, default=1, help="processes, one seed each")
    parser.add_argument("--only", nargs="*", default=[], help="measure these and write no report")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "quality_rlhf")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the cache")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        for part in options.parts:
            for file in options.cache.glob(f"{part}-*.json"):
                file.unlink()
    missed: list[str] = []
    for part in options.parts:
        if part == "frontier":
            from benchmarks.rlhf_frontier import run_frontier

            for found in run_frontier(options.seeds, options.cache / "frontier").values():
                missed += [
                    f"{c['what']}: {c['value']:.2f}, target {c['target']}"
                    for c in found["checks"]
                    if not c["holds"]
                ]
            continue
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            jobs = [
                pool.submit(measure_seed, part, seed, options.cache, options.only)
                for seed in options.seeds
            ]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # say it now, not after hours
                raise
            found = [job.result() for job in jobs]
        if options.only:
            continue
        page, checks = report(part, found, options.out)
        (options.out / f"quality_rlhf_{part}.md").write_text(page, encoding="utf-8")
        print("\n" + page)
        missed += [f"{row['what']}: {row['target']}" for row in checks if not row["met"]]
    if missed:
        print("Missed:\n  " + "\n  ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
