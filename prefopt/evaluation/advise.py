"""Data, aim and a model -> a `TuningAdvice` in a folder.

Puts counting the data, measuring prompts and the advice in order; the rules are `tuning_advice`'s, the
measurement is `prompt_baseline`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from prefopt.data.records import write_bytes
from prefopt.errors import DataError
from prefopt.evaluation.prompt_baseline import measure_prompts, prompt_variants
from prefopt.evaluation.tuning_advice import (
    PROMPTING_IS_ENOUGH,
    Aim,
    Changes,
    TuningAdvice,
    advise_tuning,
)
from prefopt.judges import Judge, load_judge
from prefopt.judges.rubric import load_rubric
from prefopt.models import Device, load_model
from prefopt.sampling.candidates import SamplingSettings
from prefopt.types import PreferenceGroup, Prompt


def advise(
    aims: Sequence[Aim],
    out: str | Path,
    *,
    data: str | Sequence[PreferenceGroup] | None = None,
    changes: Changes = "yearly",
    prompts: str | Sequence[Prompt] | None = None,
    n_prompts: int = 100,
    model: str = "demo",
    judge: str | Judge = "rules:house_style",
    rubric: str = "house_style",
    system_prompts: Sequence[str | Path] = (),
    max_usd: float | None = None,
    prices: str | Path | None = None,
    enough: float = PROMPTING_IS_ENOUGH,
    requests_per_month: int | None = None,
    usd_per_million_input_tokens: float | None = None,
    sampling: SamplingSettings | None = None,
    seed: int = 1,
    device: Device = "auto",
    progress: bool = True,
) -> TuningAdvice:
    """Say whether prompting, retrieval or tuning fits, and measure prompting if there are prompts.

    Args:
        aims: what a tuned model is wanted for: facts, format, style, skill, cost.
        out: folder for advice.md, advice.json, and the answers and verdicts behind them.
        data: preferences at hand, a file or Hub dataset, or loaded.
        changes: how often what is wanted changes.
        prompts: questions to measure prompting with; None measures nothing. Those that `data` has
            too are left out of the measurement.
        n_prompts: how many of them are used.
        model: the model that might be tuned.
        judge: the judge that would measure the tuned model.
        rubric: what better means: a built-in name or a text file.
        system_prompts: text files with system prompts of your own to be tried as well.
        max_usd: the most a paid judge may spend, when `judge` is a text.
        prices: a file of prices, when `judge` is a text.
        enough: the win rate from which prompting alone is good enough.
        requests_per_month: for the aim "cost".
        usd_per_million_input_tokens: for the aim "cost".
        sampling: how answers are sampled.
        seed: of sampling and halves.
        device: where the model runs.
        progress: show bars.

    Raises:
        ValueError, DataError: unusable arguments or data, before anything is loaded or asked.
        ModelError, JudgeError: as sampling and judging raise them.
    """
    from prefopt.data.preference_data import load_preferences
    from prefopt.data.prompts import load_prompts

    weigh = partial(
        advise_tuning,
        aims,
        changes=changes,
        enough=enough,
        requests_per_month=requests_per_month,
        usd_per_million_input_tokens=usd_per_million_input_tokens,
    )
    weigh()  # for its checks, before any work
    groups = load_preferences(data) if isinstance(data, str) else list(data or ())
    n_examples = None if data is None else sum(len(group.preferences) for group in groups)
    baseline = None
    if prompts is not None:
        known = {group.prompt.prompt_id for group in groups}
        loaded = load_prompts(prompts) if isinstance(prompts, str) else list(prompts)
        fresh = [prompt for prompt in loaded if prompt.prompt_id not in known][:n_prompts]
        own = [(Path(file).name, _text(Path(file))) for file in system_prompts]
        asked = judge
        if not isinstance(asked, Judge):
            asked = load_judge(asked, rubric=rubric, max_usd=max_usd, prices=prices)
        baseline = measure_prompts(
            fresh,
            prompt_variants(load_rubric(rubric), groups, system_texts=own),
            load_model(model, device=device),
            asked,
            out,
            sampling=sampling,
            seed=seed,
            progress=progress,
        )
    advice = weigh(n_examples=n_examples, baseline=baseline)
    write_advice(advice, out)
    return advice


def write_advice(advice: TuningAdvice, out: str | Path) -> None:
    """advice.md for people and advice.json for programs.

    Raises:
        DataError: the folder cannot be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / "advice.md", advice.to_text().encode())
    write_bytes(out / "advice.json", msgspec.json.format(msgspec.json.encode(advice)) + b"\n")


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the system prompt {path}: {error}") from error
    if not text.strip():
        raise DataError(f"the system prompt {path} is empty.")
    return text
