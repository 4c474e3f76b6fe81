"""The stages that the flows share: answers, verdicts and labels as stages of a run folder.

What a stage is called and depends on is decided here, so a folder means the same to every flow.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prefopt.models import LanguageModel
from prefopt.sampling.candidates import SamplingSettings

if TYPE_CHECKING:
    from prefopt.judges import Judge
    from prefopt.preferences import Preferences
    from prefopt.runs import Run
    from prefopt.types import Candidate, JudgedComparison, Prompt

logger = logging.getLogger(__name__)

LEDGER = "judgements.sqlite"
"""The file of a run that keeps every verdict ever asked for."""


class LabelledByJudge(Protocol):
    """What the stages read of a flow's configuration, and its `out`."""

    @property
    def k(self) -> int:
        """Answers sampled a prompt."""

    @property
    def pairs_per_prompt(self) -> int | None:
        """Preferences kept a prompt."""

    @property
    def min_margin(self) -> float:
        """The least mean grade that counts as a preference."""

    @property
    def sampling(self) -> SamplingSettings:
        """How answers are sampled."""

    @property
    def seed(self) -> int:
        """Of the sampling."""


def preference_stages(
    run: Run,
    config: LabelledByJudge,
    prompts: Sequence[Prompt],
    judge: Judge,
    base: Lazy,
    weights: str,
    *,
    progress: bool,
) -> tuple[list[JudgedComparison], Preferences]:
    """The stages `candidates`, `judged`, `preferences` and `left_out` of a run.

    Args:
        run: with the finished stage `train_prompts`.
        config: how many answers, how sampled, and what counts as a preference.
        prompts: the training prompts.
        judge: compares the answers.
        base: the model that answers.
        weights: its fingerprint.
        progress: show bars.
    """
    from prefopt.judges import judge_comparisons
    from prefopt.preferences import build_preferences, pair_candidates
    from prefopt.sampling.candidates import sample_candidates
    from prefopt.types import Candidate, JudgedComparison, LeftOut, PreferenceGroup

    candidates = run.records(
        "candidates",
        Candidate,
        lambda partial: sample_candidates(
            prompts, base(), k=config.k, settings=config.sampling, seed=config.seed,
            partial=partial, progress=progress,
        ),
        depends_on={
            "model": weights,
            "settings": config.sampling,
            "seed": config.seed,
            "k": config.k,
            "prompts": run.sha256_of("train_prompts"),
        },
    )  # fmt: skip
    judged = run.records(
        "judged",
        JudgedComparison,
        lambda _: judge_comparisons(
            pair_candidates(candidates), judge, ledger=run.folder / LEDGER, progress=progress
        ),
        depends_on={"judge": judge.fingerprint, "candidates": run.sha256_of("candidates")},
    )
    preferences = build_preferences(
        judged, min_margin=config.min_margin, pairs_per_prompt=config.pairs_per_prompt
    )
    labels = {
        "judged": run.sha256_of("judged"),
        "pairs_per_prompt": config.pairs_per_prompt,
        "min_margin": config.min_margin,
    }
    run.records("preferences", PreferenceGroup, lambda _: preferences.groups, depends_on=labels)
    run.records("left_out", LeftOut, lambda _: preferences.left_out, depends_on=labels)
    logger.info("%s", preferences)
    return judged, preferences


def answer_stage(
    run: Run,
    config: LabelledByJudge,
    stage: str,
    prompts: Sequence[Prompt],
    model: Lazy | AdapterOff,
    weights: str,
    *,
    progress: bool,
    description: str,
    depends_on: dict[str, Any] | None = None,
) -> list[Candidate]:
    """A model's answers to the held-out prompts, one each, as the stage `stage`."""
    from prefopt.sampling.candidates import sample_candidates
    from prefopt.types import Candidate

    def sample(partial: Path) -> list[Candidate]:
        with model.ready() as loaded:
            return sample_candidates(
                prompts, loaded, k=1, settings=config.sampling, seed=config.seed + 1,
                partial=partial, progress=progress, description=description,
            )  # fmt: skip

    asked = {
        "model": weights,
        "settings": config.sampling,
        "seed": config.seed,
        "prompts": run.sha256_of("held_out_prompts"),
    }
    return run.records(stage, Candidate, sample, depends_on={**asked, **(depends_on or {})})


def comparison_stage(
    run: Run,
    stage: str,
    tuned: Sequence[Candidate],
    base: Sequence[Candidate],
    judge: Judge,
    *,
    progress: bool,
    sources: tuple[str, str] = ("answers_tuned", "answers_base"),
) -> list[JudgedComparison]:
    """The answers of two stages compared prompt by prompt, as the stage `stage`."""
    from prefopt.evaluation.evaluate import compare_answers
    from prefopt.judges import judge_comparisons
    from prefopt.types import JudgedComparison

    return run.records(
        stage,
        JudgedComparison,
        lambda _: judge_comparisons(
            compare_answers(tuned, base), judge, ledger=run.folder / LEDGER, progress=progress
        ),
        depends_on={
            "judge": judge.fingerprint,
            "tuned": run.sha256_of(sources[0]),
            "base": run.sha256_of(sources[1]),
        },
    )


class Lazy:
    """A model that is loaded when it is first needed: a finished stage needs none."""

    def __init__(self, load: Callable[[], LanguageModel]) -> None:
        self._load = load
        self._loaded: LanguageModel | None = None

    def __call__(self) -> LanguageModel:
        """The model."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @contextlib.contextmanager
    def ready(self) -> Iterator[LanguageModel]:
        """The model, for as long as the block lasts."""
        yield self()

    def forget(self) -> None:
        """Free the memory; the next call loads again."""
        self._loaded = None


class AdapterOff:
    """The base model inside a tuned one, under its own name."""

    def __init__(self, tuned: Lazy, name: str) -> None:
        self._tuned, self._name = tuned, name

    @contextlib.contextmanager
    def ready(self) -> Iterator[LanguageModel]:
        """The model with its adapter off, for as long as the block lasts."""
        with self._tuned().adapter_off() as model:
            yield replace(model, name=self._name)


def spent_usd(ledger: Path) -> float:
    """What the verdicts in a ledger cost."""
    from prefopt.judges.ledger import Ledger

    with Ledger(ledger) as book:
        return book.spent_usd()
