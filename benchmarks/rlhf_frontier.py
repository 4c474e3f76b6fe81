"""Reward against KL on real language models: SFT, best-of-n, DPO and PPO with a known reward.

    python benchmarks/rlhf_frontier.py                          # sentences, 3 seeds; writes results/
    python benchmarks/rlhf_frontier.py --parts stories          # another model, needs PREFOPT_DATA
    python benchmarks/rlhf_frontier.py --parts smollm2          # DPO on SmolLM2-135M, LoRA
    python benchmarks/rlhf_frontier.py --parts smollm2_gpu --device cuda --seeds 10 11 12 13 14
    python benchmarks/rlhf_frontier.py --seeds 0 --quick        # writes nothing

The experiment of the DPO paper (Rafailov et al. 2023, arXiv:2305.18290, fig. 2), small enough for a
CPU: at most 15 minutes of one thread for a seed of `sentences` or `stories`.

    sentences  a Llama over whole words, trained here in half a minute on made-up stories
    stories    lm_stories260k, a Llama of 260,032 parameters over pieces of words, in the folder
               PREFOPT_DATA (default ../shared/data)
    smollm2    SmolLM2-135M-Instruct as a plain text model
    smollm2_gpu  the same with as many prompts as the small models have, and PPO; on a GPU, where seeds
               may run in processes of their own that share a --cache

The gold reward is a statistic of the answer's text with mean 0 and standard deviation 1 under the
reference, clipped at 3: known, without a judge, and real-valued, so that best-of-n hardly meets ties.

    ReadingLevel  (all but smollm2_gpu) by Coleman and Liau (1975): 0.0588 L - 0.296 S - 15.8, with L
                  letters and S sentence ends in 100 words
    Sentiment     (smollm2_gpu) the words' valences by VADER's lexicon (Hutto and Gilbert 2014; means
                  over ten people; `pip install --no-deps vaderSentiment`), their sum over the root of
                  the number of words

The reference is the model as it is. Answers have a fixed length and are sampled at temperature 1, so
KL(policy || reference) is the mean of log pi / pi_ref over the policy's own answers (k1) or of the
tokens' rho - 1 - log rho, rho = pi_ref / pi (k3); both are unbiased. Best-of-n draws its answers from
the reference; its KL is log n - (n - 1) / n (Beirami et al. 2024, arXiv:2401.01879; less with ties).

    ratio = (gold of the policy - of the reference) / (best-of-n at the same KL - of the reference)

where n is real. The best policy there is, the reference times exp(gold / beta), gains sqrt(2 KL) where
the reward is normal, a ratio of 1.1. Intervals are bootstraps at 95 % over the evaluation prompts,
which no training sees. PASS: DPO (both betas) and PPO have a ratio of at least 0.9 in the mean over
the seeds, and the smaller beta the larger KL. On SmolLM2 (LoRA) besides: reward gain above 0 with its
interval, distinct bigrams at least 0.8 of the reference's.

What was chosen on what. Trials had prompts drawn with seed 0 and training seed 0; what is reported has
prompts drawn with seed 1000 and training seeds from 10. On `sentences`: the world itself (an earlier
one with fewer words, longer answers and batches of 128, where DPO stayed just below 0.9, was given
up), 4,096 of 8,192 prompts, and DPO's rate 3e-4 of {3e-4, 1e-3}; PPO ran once. On `stories` the gold
reward was sentiment first and became the reading level, because sentiment has ties; rates 2e-4 to
5e-3, batches of 32 to 128, Adam's epsilon, LoRA, an SFT term, averaged weights, sampled labels and the
number of prompts were tried there, all on those prompts: the policies fit the training answers better
than others, so more data is what they lack. On `smollm2` sentiment with 96 prompts came first (0.17
and 0.13 of best-of-n), trials on other prompts led to the reading level, and then, on the prompts that
are reported, there were 1,536 of them (beta 0.5: 0.86) or 3,072 (0.82, and 0.81 at beta 1), in batches
of 16, and the rate 3e-4 or 1e-3 (1,536 prompts: 0.73 at beta 0.5, 0.67 at 1), evaluated on 64 prompts.
The 8,192 prompts and batches of 8 are from trials on other prompts again: by how far log-ratios
correlate with gold on answers that were not learned from, 384 prompts gave 0.58 in batches of 16, 0.61
in batches of 4 (rates 2e-4 and 3e-4; 0.58 at 1e-4, 0.52 at 1e-3), 0.56 to 0.60 with half the prompts
and eight answers each, 0.53 to 0.61 with r = 2, 0.55 with Adam's epsilon 1e-5, 0.63 at best with more
epochs (then 0.59: the training answers are learned by heart). On `smollm2_gpu` DPO's rate 3e-4 of
{3e-4, 1e-3, 2e-3}, with 2,048 of the prompts; PPO's settings are untried.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import importlib.resources
import itertools
import json
import logging
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("PREFOPT_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from scipy.special import gammaln  # noqa: E402

import prefopt  # noqa: E402
from prefopt.models import LoRASettings, load_model, lora_config  # noqa: E402
from prefopt.sampling.best_of_n import best_of_n_kl  # noqa: E402
from prefopt.training.rollouts import RolloutSettings, TransformersEngine  # noqa: E402
from prefopt.training.tree_model import choose_scoring, score_answers, tree_attention  # noqa: E402
from prefopt.trees import AnswerTree, split_by_tokens  # noqa: E402

Figures = dict[str, Any]
Ids = tuple[int, ...]


class Gold:
    """A gold reward; see the module. `calibrate` sets its scale on the reference's answers."""

    mean, std = 0.0, 1.0

    def raw(self, text: str) -> float:
        """The statistic itself."""
        raise NotImplementedError

    def __call__(self, text: str) -> float:
        """The reward of one answer's text."""
        return min(max((self.raw(text) - self.mean) / self.std, -3.0), 3.0)

    def calibrate(self, texts: Sequence[str]) -> None:
        """Mean 0 and standard deviation 1 on these texts."""
        raw = [self.raw(text) for text in texts]
        self.mean, self.std = statistics.mean(raw), statistics.pstdev(raw)


class ReadingLevel(Gold):
    """The Coleman-Liau index."""

    def raw(self, text: str) -> float:
        """Longer words and longer sentences are harder to read."""
        words = re.findall(r"[a-z']+", text.lower())
        n = max(1, len(words))
        ends = len(re.findall(r"[.!?]", text))
        return 5.88 * sum(map(len, words)) / n - 29.6 * ends / n - 15.8


class Sentiment(Gold):
    """The words' valences by VADER's lexicon."""

    def __init__(self) -> None:
        try:
            lexicon = importlib.resources.files("vaderSentiment") / "vader_lexicon.txt"
        except ModuleNotFoundError:
            raise SystemExit("the reward needs a lexicon: pip install vaderSentiment") from None
        lines = (line.split("\t") for line in lexicon.read_text(encoding="utf-8").splitlines())
        self.valence = {word: float(value) for word, value, *_ in lines}

    def raw(self, text: str) -> float:
        """The root keeps one happy word from being as good as a happy answer."""
        words = re.findall(r"[a-z']+", text.lower())
        return sum(self.valence.get(w, 0.0) for w in words) / math.sqrt(max(1, len(words)))


@dataclass(frozen=True)
class Setting:
    """How much of everything one part of the benchmark takes."""

    prompts_seed: int  # draws the prompts
    opening: int  # tokens of a prompt
    length: int  # tokens of an answer
    train: int  # prompts that are labelled
    test: int  # prompts that are evaluated
    drawn: int  # answers a policy gives to each of those
    pool: int  # answers of the reference to each, for best-of-n
    at_once: int  # answers sampled at once
    k: int  # labelled answers a prompt
    betas: tuple[float, ...]
    dpo: Figures  # settings of `DPOConfig`
    target: float  # of the ratio to best-of-n
    gold: type[Gold]
    ppo: Figures | None = None  # settings of `PPOConfig`
    sft: bool = True  # whether a policy learns from the better answers alone
    lora: bool = False


SETTINGS = {
    "sentences": Setting(
        prompts_seed=1000,
        opening=8,
        length=12,
        train=4096,
        test=128,
        drawn=16,
        pool=128,
        at_once=1024,
        k=4,
        betas=(0.5, 1.0),
        dpo={
            "learning_rate": 3e-4,
            "per_device_train_batch_size": 64,
            "micro_batch_tokens": 4096,
            "lr_scheduler_type": "cosine",
        },
        target=0.9,
        gold=ReadingLevel,
        ppo={
            "kl_coef": 0.5,
            "learning_rate": 6e-4,
            "value_learning_rate": 2e-3,
            "per_device_train_batch_size": 128,
            "num_generations": 4,
            "num_rollouts": 40,
            "num_ppo_epochs": 2,
            "micro_batch_tokens": 4096,
            "generation_batch_size": 1024,
        },
    ),
    "stories": Setting(
        prompts_seed=1000,
        opening=16,
        length=16,
        train=8192,
        test=128,
        drawn=16,
        pool=128,
        at_once=1024,
        k=4,
        betas=(0.5, 1.0),
        dpo={
            "learning_rate": 3e-4,
            "per_device_train_batch_size": 128,
            "micro_batch_tokens": 16384,
            "lr_scheduler_type": "cosine",
        },
        target=0.9,
        gold=ReadingLevel,
        ppo={
            "kl_coef": 0.5,
            "learning_rate": 2e-4,
            "value_learning_rate": 1e-3,
            "per_device_train_batch_size": 128,
            "num_generations": 4,
            "num_rollouts": 40,
            "num_ppo_epochs": 2,
            "micro_batch_tokens": 16384,
            "generation_batch_size": 1024,
        },
    ),
    "smollm2": Setting(
        prompts_seed=1000,
        opening=8,
        length=12,
        train=8192,
        test=128,
        drawn=16,
        pool=64,
        at_once=512,
        k=4,
        betas=(0.5, 1.0),
        dpo={
            "learning_rate": 3e-4,
            "per_device_train_batch_size": 8,
            "micro_batch_tokens": 512,
            "lr_scheduler_type": "cosine",
        },
        target=0.9,
        gold=ReadingLevel,
        sft=False,
        lora=True,
    ),
}


def methods(setting: Setting) -> dict[str, Figures | None]:
    """The policies of a part with their settings of `DPOConfig`; None is PPO."""
    found: dict[str, Figures | None] = {"sft": {"loss_type": ["sft"]}} if setting.sft else {}
    found |= {f"dpo {beta:g}": {"beta": beta} for beta in setting.betas}
    return found | ({"ppo": None} if setting.ppo else {})


@dataclass
class World:
    """A reference model, its openings as prompts, and the gold reward."""

    model: Any
    tokenizer: Any
    setting: Setting
    first: int  # the token that every opening begins with
    gold: Gold = field(init=False)

    @property
    def on_cpu(self) -> bool:
        """Whether the model is on a CPU, where trainings shall stay too."""
        return bool(self.model.device.type == "cpu")

    def __post_init__(self) -> None:
        self.gold = self.setting.gold()

    def sample(
        self, model: Any, prompts: Sequence[Ids], k: int, seed: int, length: int | None = None
    ) -> list[AnswerTree]:
        """K answers of exactly `length` tokens to each prompt, at temperature 1."""
        settings = RolloutSettings(
            max_new_tokens=length or self.setting.length,
            temperature=1.0,
            stop_token_ids=(),
            pad_token_id=0,
            batch_size=self.setting.at_once,
        )
        found = TransformersEngine(model, settings).sample(prompts, k, seed)
        return [
            AnswerTree(prompt, tuple(answer.ids for answer in answers))
            for prompt, answers in zip(prompts, found, strict=True)
        ]

    def openings(self, n: int, seed: int) -> list[Ids]:
        """Different beginnings that the reference writes by itself."""
        found: dict[Ids, None] = {}
        while len(found) < n:
            size = self.setting.opening - 1
            (tree,) = self.sample(self.model, [(self.first,)], self.setting.at_once, seed, size)
            before = len(found)
            found |= dict.fromkeys((self.first, *answer) for answer in tree.answers)
            if len(found) == before:
                raise ValueError(
                    f"{n} different openings of {self.setting.opening} tokens were asked for, and the "
                    f"model seems to write {before} only: ask for fewer prompts or longer openings."
                )
            seed += 1
        return list(found)[:n]

    def rewards(self, trees: Sequence[AnswerTree]) -> np.ndarray:
        """The gold reward of each tree's answers (N, K)."""
        return np.array(
            [[self.gold(text) for text in self.tokenizer.batch_decode(t.answers)] for t in trees]
        )


SETTINGS["smollm2_gpu"] = dataclasses.replace(
    SETTINGS["smollm2"],
    length=16,
    pool=128,
    at_once=4096,
    gold=Sentiment,
    dpo={
        "learning_rate": 3e-4,
        "per_device_train_batch_size": 64,
        "micro_batch_tokens": 8192,
        "lr_scheduler_type": "cosine",
    },
    ppo={
        "kl_coef": 0.5,
        "learning_rate": 3e-4,
        "value_learning_rate": 1e-3,
        "per_device_train_batch_size": 128,
        "num_generations": 4,
        "num_rollouts": 60,
        "num_ppo_epochs": 2,
        "micro_batch_tokens": 65536,
        "generation_batch_size": 1024,
    },
)

# --- Measuring ------------------------------------------------------------------------------------


def token_logps(model: Any, trees: Sequence[AnswerTree]) -> np.ndarray:
    """Log-probabilities (N, K, L) of the tokens of N trees with K answers of L tokens each."""
    k, length = len(trees[0].answers), len(trees[0].answers[0])
    found = np.empty((len(trees), k, length), dtype=np.float32)
    scoring = choose_scoring(model)
    with torch.no_grad(), tree_attention(model, scoring):
        for part in split_by_tokens([tree.n_tokens for tree in trees], 4096):
            batch = scoring.batch([trees[i] for i in part], 0).to(model.device)
            scores = score_answers(model, batch, scoring, statistics=False).tokens.logprobs
            found[part] = scores.view(len(part), k, length).cpu().numpy()
    return found


def bootstrap(measure: Callable[[np.ndarray], float], n: int, draws: int = 1000) -> list[float]:
    """The 95 % interval of a figure of n prompts; `measure` takes which prompts were drawn."""
    rng = np.random.default_rng(0)
    found = [measure(rng.integers(n, size=n)) for _ in range(draws)]
    return [float(x) for x in np.quantile(found, (0.025, 0.975))]


class BestOf:
    """Best-of-n of the reference, with the gold reward, for any real n from 1 to the pool's size.

    For whole n this is `expected_best_of_n`, which is unbiased: of K answers in order, the chance
    that n different ones are all among the first k is C(k, n) / C(K, n); gamma functions make n real.
    Beyond n = K it stays at the pool's best, so a policy's ratio at such a KL is an upper bound.
    """

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = np.sort(scores, axis=1)  # (prompts, pool)

    def reward(self, n: float) -> np.ndarray:
        """The mean of the largest of n, for each prompt."""
        pool = self.scores.shape[1]
        n = min(n, float(pool))
        first = np.arange(pool + 1.0)
        log_chance = (
            gammaln(first + 1) - gammaln(np.maximum(first - n + 1, 1e-9))
            + gammaln(pool - n + 1) - gammaln(pool + 1.0)
        )  # fmt: skip
        chance = np.where(first > n - 1, np.exp(log_chance), 0.0)
        return np.asarray(self.scores @ np.diff(chance))

    def at_kl(self, kl: float) -> np.ndarray:
        """The reward of each prompt where log n - (n - 1) / n is this KL."""
        low, high = 0.0, 20.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            n = math.exp(middle)
            low, high = (middle, high) if middle - (n - 1) / n < kl else (low, middle)
        return self.reward(math.exp(low))


def distinct_bigrams(trees: Sequence[AnswerTree]) -> float:
    """Different pairs of neighbouring tokens, as a share of all."""
    pairs = [pair for tree in trees for a in tree.answers for pair in itertools.pairwise(a)]
    return len(set(pairs)) / len(pairs)


def evaluate(world: World, model: Any, test: Sequence[Ids], seed: int) -> Figures:
    """Gold reward and log-ratios of a policy's answers, for each prompt."""
    trees = world.sample(model, test, world.setting.drawn, 7000 + seed)
    log_ratio = token_logps(model, trees)
    with reference_of(model, world.model) as reference:
        log_ratio -= token_logps(reference, trees)
    k3 = np.exp(-log_ratio) - 1 + log_ratio
    return {
        "gold": world.rewards(trees).mean(1).tolist(),
        "k1": log_ratio.sum(2).mean(1).astype(float).tolist(),
        "k3": k3.sum(2).mean(1).astype(float).tolist(),
        "distinct_bigrams": distinct_bigrams(trees),
        "sample": world.tokenizer.decode([*trees[0].prompt_ids, *trees[0].answers[0]]),
    }


def summary(runs: Sequence[Figures], best: BestOf) -> Figures:
    """Means over the seeds with intervals over the prompts, which all seeds share."""
    gold, k1, k3 = (np.array([run[name] for run in runs]) for name in ("gold", "k1", "k3"))
    start = best.reward(1.0)

    def ratio(picked: np.ndarray, of: slice = slice(None)) -> float:
        found = []
        for rewards, nats in zip(gold[of], k1[of], strict=True):
            kl = max(float(nats[picked].mean()), 1e-6)
            gained = best.at_kl(kl)[picked].mean() - start[picked].mean()
            found.append(float((rewards[picked].mean() - start[picked].mean()) / gained))
        return statistics.mean(found)

    def with_interval(values: np.ndarray) -> Figures:
        by_prompt = values.mean(0)
        interval = bootstrap(lambda i: float(by_prompt[i].mean()), len(by_prompt))
        return {"mean": float(by_prompt.mean()), "interval": interval}

    n = gold.shape[1]
    return {
        "gold": with_interval(gold),
        "gain": with_interval(gold - start),
        "kl_k1": with_interval(k1),
        "kl_k3": with_interval(k3),
        "ratio": {
            "mean": ratio(np.arange(n)),
            "interval": bootstrap(ratio, n, 200),
            "by_seed": [ratio(np.arange(n), slice(i, i + 1)) for i in range(len(runs))],
        },
        "points": [[float(k.mean()), float(g.mean())] for k, g in zip(k1, gold, strict=True)],
        "distinct_bigrams": statistics.mean(run["distinct_bigrams"] for run in runs),
        "cpu_s": statistics.mean(run["cpu_s"] for run in runs),
        "sample": runs[0]["sample"],
    }


@contextlib.contextmanager
def reference_of(policy: Any, model: Any) -> Iterator[Any]:
    """The reference: the policy's base where it is an adapter, else the model that was copied."""
    if hasattr(policy, "disable_adapter"):
        with policy.disable_adapter():
            yield policy
    else:
        yield model


class Kept(NamedTuple):
    """Sampled answers, and the CPU seconds that they took, maybe in an earlier call."""

    trees: list[AnswerTree]
    cpu_s: float


def kept_trees(path: Path, make: Callable[[], list[AnswerTree]]) -> Kept:
    """What `make` samples, from this file where an earlier or parallel call has left it."""
    if not path.exists():
        started = time.process_time()
        made = [[tree.prompt_ids, tree.answers] for tree in make()]
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"cpu_s": time.process_time() - started, "trees": made}))
        partial.replace(path)
    found = json.loads(path.read_text())
    trees = [AnswerTree(tuple(p), tuple(map(tuple, answers))) for p, answers in found["trees"]]
    return Kept(trees, found["cpu_s"])


# --- Training, by prefopt's trainers -------------------------------------------------------------


def common(folder: str, seed: int, more: Figures, on_cpu: bool) -> Figures:
    """Settings that the trainers share."""
    return {
        "output_dir": folder,
        "seed": seed,
        "use_cpu": on_cpu,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": [],
        "disable_tqdm": True,
        **more,
    }


def labelled(trees: Sequence[AnswerTree], rewards: np.ndarray) -> Dataset:
    """Every pair of a prompt's answers with the Bradley-Terry probability of the gold reward."""
    rows = []
    for tree, scores in zip(trees, rewards.tolist(), strict=True):
        pairs = []
        for i, j in itertools.combinations(range(len(scores)), 2):
            better, worse = (i, j) if scores[i] > scores[j] else (j, i)
            p = 1 / (1 + math.exp(scores[worse] - scores[better]))
            pairs.append({"chosen": better, "rejected": worse, "p_chosen": p})
        rows.append(
            {
                "prompt_ids": list(tree.prompt_ids),
                "answer_ids": [list(answer) for answer in tree.answers],
                "scores": scores,
                "preferences": pairs,
            }
        )
    return Dataset.from_list(rows)


def train_dpo(world: World, rows: Dataset, seed: int, folder: str, more: Figures) -> Any:
    """DPO on soft labels; with the loss "sft", only the better answers of all pairs are learned."""
    settings = common(folder, seed, world.setting.dpo, world.on_cpu) | {
        "gradient_checkpointing": False,
        "max_length": None,
        "num_train_epochs": 1,
        "warmup_steps": 0.05,
    }
    trainer = prefopt.DPOTrainer(
        world.model if world.setting.lora else copy.deepcopy(world.model),
        args=prefopt.DPOConfig(**(settings | more)),
        train_dataset=rows,
        processing_class=world.tokenizer,
        peft_config=lora_config(LoRASettings()) if world.setting.lora else None,
    )
    trainer.train()
    return trainer.model.eval()


def train_ppo(world: World, prompts: Sequence[Ids], seed: int, folder: str) -> Any:
    """PPO on the gold reward itself."""
    lora = world.setting.lora
    trainer = prefopt.PPOTrainer(
        world.model if lora else copy.deepcopy(world.model),
        lambda _, answers: [world.gold(text) for text in answers],
        prefopt.PPOConfig(
            **common(folder, seed, world.setting.ppo or {}, world.on_cpu),
            max_new_tokens=world.setting.length,
            stop_token_ids=[],
            num_logged_answers=0,
        ),
        Dataset.from_dict({"prompt_ids": [list(prompt) for prompt in prompts]}),
        processing_class=world.tokenizer,
        peft_config=lora_config(LoRASettings()) if lora else None,
    )
    trainer.train()
    return trainer.model.eval()


# --- The models ----------------------------------------------------------------------------------


NAMES = ("Tom", "Lily", "Max", "Anna", "Benjamin", "Charlotte", "Ida", "Alexander")
NOUNS = {
    "sea": ("boat", "wave", "fish", "shell", "lighthouse", "sailor"),
    "farm": ("cow", "barn", "horse", "tractor", "chicken", "vegetable"),
    "forest": ("tree", "owl", "bear", "squirrel", "path", "mushroom"),
    "kitchen": ("pan", "cake", "oven", "strawberry", "spoon", "chocolate"),
    "school": ("book", "teacher", "desk", "blackboard", "friend", "homework"),
    "town": ("shop", "bus", "policeman", "street", "market", "restaurant"),
}
ADJECTIVES = (
    "happy", "sad", "old", "big", "red", "warm", "enormous", "wonderful", "kind", "frightened",
    "quiet", "beautiful", "little", "brave", "comfortable", "new",
)  # fmt: skip
VERBS = (
    "saw", "found", "liked", "painted", "lost", "remembered", "helped", "fed", "followed",
    "discovered", "moved", "understood",
)  # fmt: skip
ADVERBS = (
    "often", "slowly", "suddenly", "once", "carefully", "unfortunately", "never", "quietly",
)  # fmt: skip


def story(rng: np.random.Generator) -> list[str]:
    """Three to six sentences, most of whose nouns belong to one place."""

    def one_of(words: Sequence[str]) -> str:
        frequency = 1 / np.sqrt(np.arange(1, len(words) + 1))
        return words[rng.choice(len(words), p=frequency / frequency.sum())]

    places = list(NOUNS)
    place = places[rng.integers(len(places))]

    def noun() -> str:
        there = place if rng.random() < 0.85 else places[rng.integers(len(places))]
        return one_of(NOUNS[there])

    found: list[str] = []
    for _ in range(rng.integers(3, 7)):
        who, adjective, verb = one_of(NAMES), one_of(ADJECTIVES), one_of(VERBS)
        sentences = (
            f"{who} was {adjective} .",
            f"{who} {verb} the {noun()} .",
            f"the {adjective} {noun()} {verb} {who} .",
            f"{who} {one_of(ADVERBS)} {verb} a {adjective} {noun()} .",
            f"{who} and {one_of(NAMES)} went to the {place} .",
            f"the {noun()} was {adjective} and {one_of(ADJECTIVES)} .",
        )
        found += sentences[rng.integers(len(sentences))].split()
    return found


def sentences(steps: int = 500, n_stories: int = 20_000) -> tuple[Any, Any, int, str]:
    """A two-layer Llama over whole words, trained on made-up stories; returns as `stories` does."""
    rng = np.random.default_rng(0)
    text = [word for _ in range(n_stories) for word in (*story(rng), "<s>")]
    vocabulary = {word: i for i, word in enumerate(["<s>", *sorted(set(text) - {"<s>"})])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<s>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<s>", pad_token="<s>"
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=2,
            num_attention_heads=8,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    ids = torch.tensor([vocabulary[word] for word in text])
    starts = (ids == 0).nonzero()[:-60, 0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(2, steps))
    for _ in range(steps):
        rows = ids[starts[torch.randint(len(starts), (32, 1))] + torch.arange(48)]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    n = sum(weight.numel() for weight in model.parameters())
    return model.eval(), tokenizer, 0, f"a model trained here on made-up stories ({n:,} parameters)"


def stories() -> tuple[Any, Any, int, str]:
    """The stories model; model, tokenizer, first token, name."""
    folder = DATA / "lm_stories260k"
    if not folder.exists():
        raise SystemExit(
            f"{folder} is not there. Set PREFOPT_DATA to the folder that has lm_stories260k, or run "
            "--parts sentences, which trains its own model."
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer, tokenizer.bos_token_id, "lm_stories260k (260,032 parameters)"


def smollm2() -> tuple[Any, Any, int, str]:
    """SmolLM2-135M-Instruct as a plain text model: its documents begin with <|endoftext|>."""
    loaded = load_model("demo", dtype="float32")
    return loaded.model, loaded.tokenizer, 0, "SmolLM2-135M-Instruct (plain text)"


MODELS = {
    "sentences": sentences, "stories": stories, "smollm2": smollm2, "smollm2_gpu": smollm2,
}  # fmt: skip


# --- The parts -----------------------------------------------------------------------------------


def run_part(
    part: str,
    seeds: Sequence[int],
    folder: Path,
    say: Callable[[str], None],
    device: str = "cpu",
    only: Sequence[str] | None = None,
) -> Figures | None:
    """All policies of one model, or None where `only` some were asked for and not all are there.

    Each that is measured is kept in `folder`, with the answers sampled for it, and not done again.
    """
    setting = SETTINGS[part]
    folder.mkdir(parents=True, exist_ok=True)
    mark = f"{part}-{hashlib.sha256(repr(setting).encode()).hexdigest()[:8]}"
    started = time.process_time()
    model, tokenizer, first, name = MODELS[part]()
    model = model.to(device)
    world = World(model, tokenizer, setting, first)
    spent = time.process_time() - started

    def draw() -> list[AnswerTree]:
        prompts = world.openings(setting.test + setting.train, setting.prompts_seed)
        test, train = prompts[: setting.test], prompts[setting.test :]
        pool = world.sample(model, test, setting.pool, 1)
        return pool + [AnswerTree(prompt, ()) for prompt in train]

    drawn, cpu_s = kept_trees(folder / f"{mark}-prompts.json", draw)
    pool, prompts = drawn[: setting.test], [tree.prompt_ids for tree in drawn]
    test, train = prompts[: setting.test], prompts[setting.test :]
    started = time.process_time()
    world.gold.calibrate([t for tree in pool for t in tokenizer.batch_decode(tree.answers)])
    scores = world.rewards(pool)
    best = BestOf(scores)
    spent += cpu_s + time.process_time() - started
    wanted = methods(setting)
    runs: dict[str, list[Figures]] = {method: [] for method in wanted}
    labelling = dict.fromkeys(seeds, 0.0)
    for seed in seeds:
        trees, labelling[seed] = kept_trees(
            folder / f"{mark}-answers-{seed}.json",
            lambda seed=seed: world.sample(model, train, setting.k, 100 + seed),
        )
        rows = labelled(trees, world.rewards(trees))
        for method, more in wanted.items():
            kept = folder / f"{mark}-{re.sub(r'[^a-z0-9.]+', '-', method)}-{seed}.json"
            if kept.exists():
                runs[method].append(json.loads(kept.read_text()))
                continue
            if only is not None and method not in only:
                continue
            started = time.process_time()
            with tempfile.TemporaryDirectory() as out:
                if more is None:
                    policy = train_ppo(world, train, seed, out)
                else:
                    policy = train_dpo(world, rows, seed, out, more)
            found = evaluate(world, policy, test, seed)
            found |= {"seed": seed, "cpu_s": time.process_time() - started}
            if setting.lora:
                world.model = policy.unload()
                vars(world.model).pop("peft_config", None)
            kept.write_text(json.dumps(found, indent=1) + "\n")
            runs[method].append(found)
            say(
                f"{part} seed {seed}, {method}: gold {statistics.mean(found['gold']):.2f}, KL "
                f"{statistics.mean(found['k1']):.2f}, "
                f"ratio {summary([found], best)['ratio']['mean']:.2f} ({found['cpu_s']:.0f} s)"
            )
    missing = [method for method, found in runs.items() if len(found) < len(seeds)]
    if missing:
        say(f"{part}: not measured yet: {', '.join(missing)}")
        return None
    curve = [
        {
            "n": n,
            "kl": best_of_n_kl(n),
            "gold": float(best.reward(n).mean()),
            "interval": bootstrap(lambda i, n=n: float(best.reward(n)[i].mean()), len(test), 300),
        }
        for n in (1, 2, 4, 8, 16, 32)
        if n <= setting.pool // 2
    ]
    distinct = distinct_bigrams(
        [AnswerTree(tree.prompt_ids, tree.answers[: setting.drawn]) for tree in pool]
    )
    policies = {method: summary(found, best) for method, found in runs.items()}
    by_seed = [
        labelling[seed] + sum(found[i]["cpu_s"] for found in runs.values())
        for i, seed in enumerate(seeds)
    ]
    minutes = (spent + max(by_seed)) / 60
    say(f"{part}: {minutes:.1f} CPU minutes for the slowest seed, all policies and best-of-n")
    return {
        "model": name,
        "setting": dataclasses.asdict(setting) | {"gold": setting.gold.__name__},
        "seeds": list(seeds),
        "best_of_n": curve,
        "best_of_n_line": [
            [math.log(n) - (n - 1) / n, float(best.reward(n).mean())]
            for n in np.geomspace(1, setting.pool / 2, 60).tolist()
        ],
        "shared_cpu_s": spent,
        "labelling_cpu_s": statistics.mean(labelling.values()),
        "cpu_minutes": minutes,
        "reference_distinct_bigrams": distinct,
        "policies": policies,
        "checks": checks(setting, policies, distinct, minutes),
    }


def checks(
    setting: Setting, policies: dict[str, Figures], distinct: float, minutes: float
) -> list[Figures]:
    """What the benchmark asks for, each with its figure and whether it holds."""
    found = []

    def check(what: str, value: float, target: float, holds: bool) -> None:
        found.append({"what": what, "value": value, "target": target, "holds": holds})

    def at_least(what: str, value: float, target: float) -> None:
        check(what, value, target, value >= target)

    for name in methods(dataclasses.replace(setting, sft=False)):
        policy = policies[name]
        at_least(f"{name}: gain / best-of-n's at its KL", policy["ratio"]["mean"], setting.target)
        if setting.lora:
            at_least(f"{name}: gain, lower end of its interval", policy["gain"]["interval"][0], 0.0)
            share = policy["distinct_bigrams"] / distinct
            at_least(f"{name}: distinct bigrams / the reference's", share, 0.8)
    low, high = (policies[f"dpo {beta:g}"]["kl_k1"]["mean"] for beta in sorted(setting.betas))
    at_least("KL of the smaller beta / of the larger", low / max(high, 1e-6), 1.0)
    if not setting.lora:
        check("CPU minutes of a seed, at most", minutes, 15.0, minutes <= 15.0)
    return found


def run_frontier(
    seeds: Sequence[int],
    folder: str | Path,
    parts: Sequence[str] = ("sentences",),
    say: Callable[[str], None] = print,
    device: str = "cpu",
    only: Sequence[str] | None = None,
) -> Figures:
    """Measure the parts; all is kept in `folder`, so that a stopped call goes on.

    `only` names policies, such as "dpo 0.5"; a part whose others are not kept yet is left out.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.getLogger("prefopt").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    found = {part: run_part(part, seeds, Path(folder), say, device, only) for part in parts}
    return {part: figures for part, figures in found.items() if figures is not None}


# --- The report ----------------------------------------------------------------------------------


def plot(result: Figures, path: Path) -> None:
    """Gold reward against KL, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = result["parts"]
    figure, axes = pyplot.subplots(1, len(parts), figsize=(6 * len(parts), 4.2), squeeze=False)
    for axis, part in zip(axes[0], parts.values(), strict=True):
        curve = part["best_of_n"]
        kl = [point["kl"] for point in curve]
        axis.plot(*zip(*part["best_of_n_line"], strict=True), "k-", linewidth=1)
        axis.plot(kl, [point["gold"] for point in curve], "ko", markersize=3, label="best-of-n")
        low, high = zip(*(point["interval"] for point in curve), strict=True)
        axis.fill_between(kl, low, high, color="k", alpha=0.1)
        for name, policy in part["policies"].items():
            x, y = zip(*policy["points"], strict=True)
            axis.plot(x, y, "o", label=name)
        axis.set_xlabel("KL to the reference, nats an answer")
        axis.set_ylabel("gold reward")
        axis.set_title(part["model"], fontsize=9)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def table(result: Figures) -> str:
    """The results as Markdown."""
    lines = [
        "# Reward against KL on real language models",
        "",
        "Gold reward: mean 0 and standard deviation 1 under the reference. Intervals: bootstrap over "
        "prompts, 95 %. What was tuned on what: `benchmarks/rlhf_frontier.py`.",
    ]

    def shown(figure: Figures) -> str:
        low, high = figure["interval"]
        return f"{figure['mean']:.2f} [{low:.2f}, {high:.2f}]"

    for name, part in result["parts"].items():
        setting = part["setting"]
        seeds = " ".join(map(str, part["seeds"]))
        lines += [
            "",
            f"## {part['model']}",
            "",
            f"`python benchmarks/rlhf_frontier.py --parts {name} --seeds {seeds}` at "
            f"{part['commit']}: {part['machine']}, 1 thread, {part['versions']}. Gold reward: "
            f"{setting['gold']}.",
            "",
            f"{setting['train']} prompts of {setting['opening']} tokens with {setting['k']} answers "
            f"of {setting['length']} tokens each; {setting['test']} other prompts with "
            f"{setting['drawn']} answers each evaluate a policy. Prompts drawn with seed "
            f"{setting['prompts_seed']}. {part['cpu_minutes']:.1f} CPU minutes for the slowest seed, "
            f"{part['shared_cpu_s']:.0f} s of which all seeds share (model, prompts, best-of-n).",
            "",
            "| policy | gold | KL, k1 | KL, k3 | gain / best-of-n's at that KL | by seed | distinct "
            "bigrams / reference's | CPU s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, policy in part["policies"].items():
            by_seed = ", ".join(f"{x:.2f}" for x in policy["ratio"]["by_seed"])
            lines.append(
                f"| {name} | {shown(policy['gold'])} | {shown(policy['kl_k1'])} | "
                f"{shown(policy['kl_k3'])} | **{shown(policy['ratio'])}** | {by_seed} | "
                f"{policy['distinct_bigrams'] / part['reference_distinct_bigrams']:.2f} | "
                f"{policy['cpu_s']:.0f} |"
            )
        lines += ["", "| best of | KL, analytic | gold |", "|---|---|---|"]
        for point in part["best_of_n"]:
            value = {"mean": point["gold"], "interval": point["interval"]}
            lines.append(f"| {point['n']} | {point['kl']:.2f} | {shown(value)} |")
        lines += ["", "| check | value | target | |", "|---|---|---|---|"]
        for check in part["checks"]:
            lines.append(
                f"| {check['what']} | {check['value']:.2f} | {check['target']} | "
                f"{'holds' if check['holds'] else 'MISSED'} |"
            )
    lines += ["", "![Gold reward against KL](rlhf_frontier.svg)"]
    return "\n".join(lines) + "\n"


def write(parts: Figures, folder: Path) -> None:
    """JSON, Markdown and picture, beside the parts that an earlier call measured."""
    folder.mkdir(exist_ok=True)
    file = folder / "rlhf_frontier.json"
    earlier = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    known = earlier["parts"] | parts
    result = {"parts": {name: known[name] for name in SETTINGS if name in known}}
    file.write_text(json.dumps(result, indent=1) + "\n")
    (folder / "rlhf_frontier.md").write_text(table(result))
    plot(result, folder / "rlhf_frontier.svg")


def main() -> int:
    """Measure, print and write; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(SETTINGS), default=["sentences"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    parser.add_argument(
        "--cache", type=Path, help="keeps samples and finished policies; None: kept nowhere"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        help="these policies, such as 'dpo 0.5', so that calls side by side can share a --cache",
    )
    parser.add_argument("--quick", action="store_true", help="no files")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        parts = run_frontier(
            options.seeds,
            options.cache or temporary,
            options.parts,
            device=options.device,
            only=options.only,
        )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    for part in parts.values():
        part["commit"] = commit
        part["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        if options.device == "cuda":
            part["machine"] = torch.cuda.get_device_name()
        part["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if not parts:
        return 0
    print(table({"parts": parts}))
    if not options.quick:
        write(parts, RESULTS)
    return 0 if all(c["holds"] for part in parts.values() for c in part["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
