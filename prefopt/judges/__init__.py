"""Judges say which of two answers is better. `load_judge` makes one from a short text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from prefopt.judges.asking import judge_comparisons, judge_stream
from prefopt.judges.base import CostEstimate, Judge
from prefopt.judges.prices import load_prices
from prefopt.judges.rubric import HELPFUL, HOUSE_STYLE, Rubric, load_rubric
from prefopt.judges.rules import RuleJudge
from prefopt.judges.scripted import ScriptedJudge, longest_wins, shortest_wins

__all__ = [
    "HELPFUL",
    "HOUSE_STYLE",
    "CostEstimate",
    "Judge",
    "Rubric",
    "RuleJudge",
    "ScriptedJudge",
    "judge_comparisons",
    "judge_stream",
    "load_judge",
    "load_rubric",
    "longest_wins",
    "shortest_wins",
]


def load_judge(
    spec: str,
    *,
    rubric: str | Rubric = "house_style",
    max_usd: float | None = None,
    transport: Literal["auto", "sync", "batch"] = "auto",
    prices: str | Path | None = None,
) -> Judge:
    """Make a judge from a text such as "anthropic:claude-sonnet-5-5".

    Args:
        spec: one of
            "rules:house_style"    the checkable part of the house style, no model, free;
            "anthropic:<model>"    Claude through the Anthropic API; needs a key and `max_usd`;
            "openai:<model>@<base_url>"    a server that speaks OpenAI's protocol (vLLM, llama.cpp,
                Ollama); one that costs money needs `prices` and `max_usd`;
            "local:<model>"        a transformers model (Hub id, folder or "demo") that is asked;
            "likelihood:<model>"   the same, comparing how likely it finds each answer;
            "reward:<folder>"      a reward model: `train_reward`'s folder, or a sequence
                classification model with one label;
            "scripted:shortest" or "scripted:longest"    length only, as a baseline.
        rubric: a built-in name, a text file, or a `Rubric`. Rules and baselines do not read it.
        max_usd: the most all questions of a ledger may cost together, in US dollars; `math.inf` for a
            judge that is only to estimate. Judges that cost nothing do not read it.
        transport: for Anthropic: one by one, in message batches, or batches from 500 calls on.
        prices: a file of prices by model (`prefopt.judges.prices.load_prices`), before the built-in
            ones.

    Raises:
        ValueError: an unknown kind, or a paid judge without `max_usd` or without prices.
        JudgeUnavailable: no key.
        DataError: the rubric file or the file of prices cannot be used.
    """
    kind, _, argument = spec.partition(":")
    text = rubric if isinstance(rubric, Rubric) else load_rubric(rubric)
    own_prices = {} if prices is None else load_prices(prices)
    if kind == "anthropic" and argument:
        from prefopt.judges.anthropic import AnthropicJudge

        return AnthropicJudge(
            argument,
            rubric=text,
            max_usd=max_usd,
            transport=transport,
            prices=own_prices.get(argument),
        )
    if kind == "openai" and argument:
        from prefopt.judges.openai import OpenAIJudge, is_local, split_address

        model, base_url = split_address(argument)
        price = own_prices.get(model)
        if price is None and (max_usd == math.inf or is_local(base_url)):
            max_usd = None  # nothing to limit: the limit is for the job's other judge
        return OpenAIJudge(model, rubric=text, base_url=base_url, max_usd=max_usd, prices=price)
    if kind == "local" and argument:
        from prefopt.judges.local import LocalJudge

        return LocalJudge(argument, rubric=text)
    if kind == "likelihood" and argument:
        from prefopt.judges.likelihood import LogLikelihoodJudge

        return LogLikelihoodJudge(argument)
    if kind == "reward" and argument:
        from prefopt.judges.reward_model import RewardModelJudge

        return RewardModelJudge(argument)
    if spec == RuleJudge.name:
        if text != HOUSE_STYLE:
            raise ValueError(
                f"{spec} decides by built-in rules for the rubric 'house_style' and cannot apply "
                f"{text.name!r}. Use a model as judge for it, for example "
                "--judge anthropic:claude-sonnet-5-5."
            )
        return RuleJudge()
    baselines = {"scripted:shortest": shortest_wins, "scripted:longest": longest_wins}
    if spec in baselines:
        return baselines[spec]()
    raise ValueError(
        f"unknown judge {spec!r}. Known: rules:house_style, anthropic:<model>, "
        "openai:<model>@<base_url>, local:<model>, likelihood:<model>, reward:<folder>, "
        "scripted:shortest, scripted:longest."
    )
