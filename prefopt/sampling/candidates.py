"""Prompts -> candidate answers of one model or of several, resumable.

Which engine answers is `prefopt.sampling.sampler`'s; this file puts the answers of all models into one
pool, in prompt order. Knows nothing of judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefopt.errors import DataError
from prefopt.models import Device, LanguageModel
from prefopt.progress import progress_bar
from prefopt.sampling.sampler import Sampler, is_remote, load_sampler
from prefopt.sampling.settings import SamplingSettings as SamplingSettings
from prefopt.types import Candidate, Prompt

AnyModel = str | LanguageModel | Sampler


def sample_candidates(
    prompts: Sequence[Prompt],
    model: AnyModel | Sequence[AnyModel],
    *,
    k: int = 4,
    settings: SamplingSettings | None = None,
    seed: int = 0,
    adapter: str | Path | None = None,
    device: Device = "auto",
    max_usd: float | None = None,
    prices: str | Path | None = None,
    partial: str | Path | None = None,
    progress: bool = True,
    description: str = "sampling",
) -> list[Candidate]:
    """Sample K answers to each prompt; returns them in prompt order, K consecutive a prompt.

    Args:
        prompts: what to answer.
        model: a name ("demo", a folder, a Hub id, or another that `load_sampler` knows, such as
            "openai:<model>@<base_url>"), an already loaded model, or a sampler; or several of them for
            one pool, in which each answers every prompt K times. A prompt's answers then stand
            together, in the order of the models.
        k: answers a prompt and model. Two or more are needed to compare them.
        settings: see `SamplingSettings`.
        seed: the same seed, prompts, settings and machine give the same answers. An answer depends on
            the seed, its prompt and its number among the K, not on the other prompts or the batch size
            (but for rounding, which may turn a token in some hundred thousand).
        adapter: a LoRA adapter to sample with (only when `model` is one name).
        device: where a model is loaded that is named; "auto" takes a GPU where there is one.
        max_usd: the most that the answers of paid models may cost together, in US dollars.
        prices: a file of prices for models whose prices are not built in.
        partial: a file that keeps what is finished, so that a killed call can go on. Answers of an API
            are kept in a ledger beside it, `<partial>.sqlite`, which is never removed.
        progress: show a bar with answers a second and time left.
        description: the bar's label.

    Raises:
        DataError: no prompts, or prompts that leave no room for an answer in the model's context
            (all of them at once, before anything is sampled).
        ModelError: the model, adapter or device cannot be used.
        ValueError: a number out of range, an adapter for several models, or two of the same name.
    """
    settings = settings or SamplingSettings()
    if not prompts:
        raise DataError("there are no prompts to sample answers for.")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if k > 1 and settings.temperature == 0:
        raise ValueError(
            f"k={k} greedy answers to a prompt would all be the same; set a temperature above 0."
        )
    models: list[AnyModel] = (
        [model] if isinstance(model, (str, LanguageModel, Sampler)) else list(model)
    )
    if not models:
        raise ValueError("give at least one model to sample from.")
    if len(models) > 1 and adapter is not None:
        raise ValueError("an adapter goes with one model; give loaded models for a pool.")
    names = [one if isinstance(one, str) else one.name for one in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"several models of the pool are called {', '.join(twice)}, so their answers could not be "
            "told apart. Give loaded models with names of their own."
        )

    def sampler(one: AnyModel) -> Sampler:
        if isinstance(one, str):
            return load_sampler(one, adapter=adapter, device=device, max_usd=max_usd, prices=prices)
        if isinstance(one, LanguageModel):
            from prefopt.sampling.transformers_sampler import TransformersSampler

            return TransformersSampler(one)
        return one

    # A missing key shows before hours of sampling; a local model is loaded when its turn comes.
    models = [sampler(m) if isinstance(m, str) and is_remote(m) else m for m in models]
    pool: list[list[Candidate]] = [[] for _ in prompts]
    with progress_bar(
        total=len(prompts) * k * len(models), description=description, unit="answer", show=progress
    ) as bar:
        for one in models:
            found = sampler(one).answers(
                prompts,
                k=k,
                settings=settings,
                seed=seed,
                partial=None if partial is None else Path(partial),
                told=bar.update,
            )
            for answers, more in zip(pool, found, strict=True):
                answers += more
    return [candidate for answers in pool for candidate in answers]
