"""A world small enough to enumerate: every answer, its reward, and any policy's distribution, exactly.

A few prompts, answers of a fixed number of symbols, and a language model over them. So expected
reward, KL, the optimum of `E r - beta KL` and best-of-n have no sampling noise and need no judge:

    regret(pi) = (J* - J(pi)) / (J* - J(ref)),  J = E r - beta KL(pi || ref),  pi* ~ ref exp(r / beta)

is 0 for the optimum and 1 for the reference. Nothing here trains by preferences; that is what is
measured. The padding token is an answer symbol and the end token a prompt: whoever makes masks from
token ids instead of positions fails.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Low enough for no probability, high enough that sums of logits stay numbers.
_NEVER = -100.0


class WorldModel(LlamaForCausalLM):
    """A Llama that only ever answers with answer symbols: a frozen bias rules the prompts out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        bias = torch.zeros(config.vocab_size)
        bias[config.n_symbols :] = _NEVER
        self.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)


class Value(NamedTuple):
    """A policy's exact figures, means over the prompts."""

    reward: float
    kl: float
    objective: float


class Pairs(NamedTuple):
    """Preference pairs, as indices into the prompts and the answers."""

    prompt: Tensor  # (N,)
    chosen: Tensor  # (N,)
    rejected: Tensor  # (N,)


@dataclass
class World:
    """Prompts, all answers, their true reward and a reference policy; all of it follows the seed.

    The true reward is a table of symbols and of neighbouring symbols for each prompt, with mean 0
    and standard deviation 1 under the reference. The reference has learnt Markov chains.
    """

    seed: int = 0
    n_symbols: int = 6
    length: int = 5
    n_prompts: int = 4
    width: int = 64
    sft_steps: int = 300
    answers: Tensor = field(init=False)  # (S, length)
    rewards: Tensor = field(init=False)  # (P, S)
    reference: WorldModel = field(init=False)
    ref_logps: Tensor = field(init=False)  # (P, S)

    def __post_init__(self) -> None:
        v, p = self.n_symbols, self.n_prompts
        self.answers = torch.tensor(list(itertools.product(range(v), repeat=self.length)))
        draw = torch.Generator().manual_seed(self.seed)
        self._unigram = torch.randn(p, v, generator=draw)
        self._bigram = torch.randn(p, v, v, generator=draw) * 0.7
        self._chain = torch.randn(p, v + 1, v, generator=draw).softmax(-1)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            self.reference = self._fit_reference()
        self.ref_logps = self.logps(self.reference)
        raw = torch.stack([self._raw(k, self.answers) for k in range(p)])
        q = self.ref_logps.exp()
        self._mean = (q * raw).sum(1).mean()
        self._std = ((q * raw.square()).sum(1) - (q * raw).sum(1).square()).mean().sqrt()
        self.rewards = (raw - self._mean) / self._std

    def _fit_reference(self) -> WorldModel:
        config = LlamaConfig(
            vocab_size=self.n_symbols + self.n_prompts,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=16,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        config.n_symbols = self.n_symbols
        model = WorldModel(config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(self.sft_steps):
            prompt = torch.randint(self.n_prompts, (256,))
            loss = -self.token_logps(model, prompt, self._demonstrations(prompt)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()

    def _demonstrations(self, prompt: Tensor) -> Tensor:
        symbols, last = [], torch.full_like(prompt, self.n_symbols)
        for _ in range(self.length):
            last = torch.multinomial(self._chain[prompt, last], 1).squeeze(1)
            symbols.append(last)
        return torch.stack(symbols, 1)

    # --- Ids and text ----------------------------------------------------------------------------

    def prompt_ids(self, prompt: int) -> list[int]:
        """The prompt's one token."""
        return [self.n_symbols + int(prompt)]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Symbols "a b c", prompts "P0 P1"; padding is the symbol "a", the end token a prompt."""
        names = [chr(ord("a") + i) for i in range(self.n_symbols)]
        names += [f"P{k}" for k in range(self.n_prompts)]
        words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, names[0]))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token=names[0], eos_token=names[-1]
        )

    # --- The true reward -------------------------------------------------------------------------

    def _raw(self, prompt: int | Tensor, symbols: Tensor) -> Tensor:
        at = torch.as_tensor(prompt).expand(len(symbols))[:, None]
        single = self._unigram[at, symbols].sum(1)
        return single + self._bigram[at, symbols[:, :-1], symbols[:, 1:]].sum(1)

    def reward(self, prompt: Tensor, symbols: Tensor) -> Tensor:
        """The true reward of answers (N, length) to prompts (N,)."""
        return (self._raw(prompt, symbols) - self._mean) / self._std

    def blind_reward(self, prompt: Tensor, symbols: Tensor) -> Tensor:
        """A deliberate fault: the reward of the answer with its last symbol misread."""
        return self.reward(prompt, torch.cat((symbols[:, :-1], symbols[:, -2:-1]), 1))

    def index(self, symbols: Tensor) -> Tensor:
        """Where answers (N, length) stand among `answers`."""
        place = self.n_symbols ** torch.arange(self.length - 1, -1, -1)
        return (symbols * place).sum(1)

    # --- Policies --------------------------------------------------------------------------------

    def token_logps(self, model: Any, prompt: Tensor, symbols: Tensor) -> Tensor:
        """Log-probabilities (N, length), by the model's own forward and nothing of prefopt."""
        ids = torch.cat((prompt[:, None] + self.n_symbols, symbols), 1)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, symbols[..., None]).squeeze(-1)

    @torch.no_grad()
    def logps(self, model: Any) -> Tensor:
        """Exact log-probabilities (P, S) of every answer to every prompt."""
        training = model.training
        model.eval()
        # The last symbol is never fed: one row for all answers that differ in it alone.
        starts = self.answers[:: self.n_symbols, :-1]
        rows = []
        for prompt in range(self.n_prompts):
            first = torch.full((len(starts), 1), self.n_symbols + prompt)
            logits = model(input_ids=torch.cat((first, starts), 1), use_cache=False).logits
            log_p = logits.double().log_softmax(-1)
            known = log_p[:, :-1].gather(-1, starts[..., None]).sum((1, 2))
            rows.append((known[:, None] + log_p[:, -1, : self.n_symbols]).flatten())
        model.train(training)
        return torch.stack(rows).float()

    def optimum(self, beta: float, rewards: Tensor | None = None) -> Tensor:
        """Log-probabilities (P, S) of `ref exp(r / beta)`, normalised."""
        rewards = self.rewards if rewards is None else rewards
        return (self.ref_logps + rewards / beta).log_softmax(-1)

    def value(self, logps: Tensor, beta: float = 0.0, rewards: Tensor | None = None) -> Value:
        """Expected reward, KL to the reference, and `E r - beta KL`, of a policy (P, S)."""
        rewards = self.rewards if rewards is None else rewards
        p = logps.double().exp()
        reward = float((p * rewards).sum(1).mean())
        kl = float((p * (logps.double() - self.ref_logps)).sum(1).mean())
        return Value(reward, kl, reward - beta * kl)

    def regret(self, logps: Tensor, beta: float) -> float:
        """0 for the optimum, 1 for the reference, above 1 for what is worse than not training."""
        best = self.value(self.optimum(beta), beta).objective
        start = self.value(self.ref_logps, beta).objective
        return (best - self.value(logps, beta).objective) / (best - start)

    def optimum_at_kl(self, kl: float, rewards: Tensor | None = None) -> Tensor:
        """Log-probabilities (P, S) of the optimum for `rewards` whose KL to the reference is this."""
        low, high = 1e-3, 1e3
        for _ in range(40):
            beta = math.sqrt(low * high)
            logps = self.optimum(beta, rewards)
            low, high = (beta, high) if self.value(logps).kl > kl else (low, beta)
        return logps

    def best_of(self, n: int, scores: Tensor | None = None) -> Tensor:
        """Log-probabilities (P, S) of the best of n samples of the reference by `scores`."""
        scores = self.rewards if scores is None else scores
        rows = []
        for k in range(self.n_prompts):
            order = scores[k].argsort()
            q = self.ref_logps[k].double().exp()[order]
            upto = q.cumsum(0) / q.sum()
            share = upto**n - (upto - q / q.sum()).clamp(min=0) ** n
            row = torch.empty_like(share)
            row[order] = share.clamp(min=1e-300).log()
            rows.append(row)
        return torch.stack(rows)

    # --- Data ------------------------------------------------------------------------------------

    def sample(self, logps: Tensor, prompt: Tensor, draw: torch.Generator) -> Tensor:
        """Indices of answers to prompts (N,), drawn from a policy (P, S)."""
        drawn = torch.empty_like(prompt)
        for k in range(self.n_prompts):
            here = prompt == k
            p = logps[k].double().exp()
            if here.any():
                drawn[here] = torch.multinomial(p, int(here.sum()), True, generator=draw)
        return drawn

    def pairs(self, n: int, draw: torch.Generator, logps: Tensor | None = None) -> Pairs:
        """Pairs of two answers each, labelled by Bradley-Terry with the true reward."""
        logps = self.ref_logps if logps is None else logps
        prompt = torch.randint(self.n_prompts, (n,), generator=draw)
        first, second = (self.sample(logps, prompt, draw) for _ in range(2))
        margin = self.rewards[prompt, first] - self.rewards[prompt, second]
        wins = torch.rand(n, generator=draw) < margin.sigmoid()
        return Pairs(prompt, torch.where(wins, first, second), torch.where(wins, second, first))

    def rows(self, pairs: Pairs) -> list[dict[str, list[int]]]:
        """Pairs as the tokenized rows that prefopt's trainers take."""
        answers = self.answers.tolist()
        return [
            {
                "prompt_ids": self.prompt_ids(prompt),
                "chosen_ids": answers[chosen],
                "rejected_ids": answers[rejected],
            }
            for prompt, chosen, rejected in zip(*(x.tolist() for x in pairs), strict=True)
        ]


def negative_log_likelihood(world: World, model: Any, prompt: Tensor, answer: Tensor) -> Tensor:
    """The mean over answers, by the model's own forward."""
    return -world.token_logps(model, prompt, world.answers[answer]).sum(1).mean()


def calibration(p: Tensor, right: Tensor, n_bins: int = 10) -> float:
    """Expected calibration error of probabilities (N,) against outcomes (N,) of 0 and 1."""
    place = (p * n_bins).long().clamp(max=n_bins - 1)
    gaps = functional.one_hot(place, n_bins).double().T @ (p - right).double()
    return float(gaps.abs().sum() / len(p))
