"""The stages that the flows share: answers, verdicts and labels as stages of a run folder.

What a stage is called and depends on is decided here, so a folder means the same to every flow.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import msgspec

from prefopt.models import Device, LanguageModel
from prefopt.out_of_memory import without_memory_settings
from prefopt.sampling.candidates import SamplingSettings

if TYPE_CHECKING:
    from prefopt.judges import Judge
    from prefopt.preferences import Preferences
    from prefopt.runs import Run
    from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt

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


class FlowSettings(LabelledByJudge, Protocol):
    """What every flow's configuration says about prompts, model and judge."""

    @property
    def out(self) -> str:
        """The run's folder."""

    @property
    def prompts(self) -> str:
        """A name that `load_prompts` takes."""

    @property
    def held_out(self) -> float:
        """Prompts kept for the report: a number, or a share below 1."""

    @property
    def model(self) -> str:
        """The base model's name."""

    @property
    def judge(self) -> str:
        """A name that `load_judge` takes."""

    @property
    def rubric(self) -> str:
        """What better means."""

    @property
    def max_usd(self) -> float | None:
        """The most that a paid judge may spend."""

    @property
    def prices(self) -> str | None:
        """A file of prices."""

    @property
    def transport(self) -> Literal["auto", "sync", "batch"]:
        """How Anthropic is asked."""

    @property
    def device(self) -> Device:
        """Where models run."""


def flow_problems(config: FlowSettings) -> list[str]:
    """What is wrong with the numbers that every flow takes."""
    problems = []
    if config.k < 2:
        problems.append(
            f"k must be at least 2, got {config.k}: with one answer a prompt there is nothing to "
            "compare"
        )
    if config.pairs_per_prompt is not None and config.pairs_per_prompt < 1:
        problems.append(f"pairs_per_prompt must be at least 1, got {config.pairs_per_prompt}")
    if config.held_out <= 0:
        problems.append(f"held_out must be positive, got {config.held_out}")
    return problems


class Inputs(NamedTuple):
    """What a flow starts from; `weights` is the base model's fingerprint."""

    judge: Judge
    train: list[Prompt]
    held_out: list[Prompt]
    weights: str


def checked_inputs(config: FlowSettings) -> Inputs:
    """Find judge, prompts, device and model, so that what is wrong with them is said first.

    Raises:
        DataError, ModelError, JudgeError: as the loaders raise them. No folder is made by then.
    """
    from prefopt.data.prompts import load_prompts, split_by_prompt
    from prefopt.judges import load_judge
    from prefopt.models import model_fingerprint, resolve_device

    judge = load_judge(
        config.judge,
        rubric=config.rubric,
        max_usd=config.max_usd,
        transport=config.transport,
        prices=config.prices,
    )
    prompts = load_prompts(config.prompts)
    share_or_count = config.held_out if config.held_out < 1 else int(config.held_out)
    train, held_out = split_by_prompt(prompts, held_out=share_or_count, seed=config.seed)
    resolve_device(config.device)
    return Inputs(judge, train, held_out, model_fingerprint(config.model))


@contextlib.contextmanager
def opened_run(
    config: FlowSettings,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    on_change: Literal["refuse", "redo"],
) -> Iterator[Run]:
    """The run's folder with the stages `train_prompts` and `held_out_prompts`, for a block.

    Raises:
        RunError: the folder holds another run, is in use, or was changed from outside.
    """
    from prefopt.runs import Run
    from prefopt.types import Prompt

    plain = msgspec.to_builtins(config)
    plain.pop("out")
    # Another limit, other prices or another way to ask continue the run.
    for free in ("max_usd", "prices", "transport"):
        plain.pop(free)
    plain.pop("capabilities", None)  # the report depends on them, no other stage does
    plain = without_memory_settings(plain)
    with Run(config.out, plain, on_change=on_change) as run:
        run.records("train_prompts", Prompt, lambda _: train, depends_on={"prompts": train})
        run.records(
            "held_out_prompts", Prompt, lambda _: held_out, depends_on={"prompts": held_out}
        )
        yield run


def preference_stages(
    run: Run,
    config: LabelledByJudge,
    prompts: Sequence[Prompt],
    judge: Judge,
    model: Lazy,
    weights: str,
    *,
    progress: bool,
    prefix: str = "",
    seed: int | None = None,
    choose: Callable[[list[Candidate]], Sequence[Comparison]] | None = None,
    depends_on: dict[str, Any] | None = None,
) -> tuple[list[JudgedComparison], Preferences]:
    """The stages `candidates`, `judged`, `preferences` and `left_out` of a run.

    Args:
        run: with the finished stage `train_prompts`.
        config: how many answers, how sampled, and what counts as a preference.
        prompts: the training prompts.
        judge: compares the answers.
        model: the model that answers.
        weights: its fingerprint.
        progress: show bars.
        prefix: of the stages' names, for a run that goes through them more than once.
        seed: of the sampling; None takes the configuration's.
        choose: which comparisons of the candidates are judged; None judges all.
        depends_on: what else the candidates and the choice depend on.
    """
    from prefopt.judges import judge_comparisons
    from prefopt.preferences import build_preferences, pair_candidates
    from prefopt.sampling.candidates import sample_candidates
    from prefopt.types import Candidate, JudgedComparison, LeftOut, PreferenceGroup

    more = depends_on or {}
    seed = config.seed if seed is None else seed
    candidates = run.records(
        f"{prefix}candidates",
        Candidate,
        lambda partial: sample_candidates(
            prompts, model(), k=config.k, settings=config.sampling, seed=seed,
            partial=partial, progress=progress,
        ),
        depends_on={
            "model": weights,
            "settings": config.sampling,
            "seed": seed,
            "k": config.k,
            "prompts": run.sha256_of("train_prompts"),
            **more,
        },
    )  # fmt: skip
    judged = run.records(
        f"{prefix}judged",
        JudgedComparison,
        lambda _: judge_comparisons(
            (choose or pair_candidates)(candidates),
            judge,
            ledger=_ledger(run),
            progress=progress,
        ),
        depends_on={
            "judge": judge.fingerprint,
            "candidates": run.sha256_of(f"{prefix}candidates"),
            **more,
        },
    )
    preferences = build_preferences(
        judged, min_margin=config.min_margin, pairs_per_prompt=config.pairs_per_prompt
    )
    labels = {
        "judged": run.sha256_of(f"{prefix}judged"),
        "pairs_per_prompt": config.pairs_per_prompt,
        "min_margin": config.min_margin,
    }
    run.records(
        f"{prefix}preferences", PreferenceGroup, lambda _: preferences.groups, depends_on=labels
    )
    run.records(f"{prefix}left_out", LeftOut, lambda _: preferences.left_out, depends_on=labels)
    logger.info("%s", preferences)
    for line in judge_changes(run.folder / LEDGER):
        logger.warning("%s", line)
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
            compare_answers(tuned, base), judge, ledger=_ledger(run), progress=progress
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


def _ledger(run: Run) -> Path:
    """The run's ledger, made before the first question so that its loss can be told."""
    from prefopt.judges.ledger import Ledger

    with Ledger(run.folder / LEDGER):
        return run.begun(LEDGER)


def judge_changes(ledger: Path) -> tuple[str, ...]:
    """What changed about the judges while they were asked, in words; mostly nothing."""
    from prefopt.judges.drift import drift_findings
    from prefopt.judges.ledger import Ledger

    with Ledger(ledger) as book:
        return drift_findings(book, one_kind=False)  # first one model's pairs, then another's


def spent_usd(ledger: Path, judged: Sequence[JudgedComparison] = ()) -> float:
    """What the answers in a ledger cost, and never less than the verdicts at hand.

    To a billionth of a dollar: the sum's last digits hang on the order in which the answers came. A
    ledger that was lost and begun anew knows nothing of verdicts that are there.
    """
    from prefopt.judges.ledger import Ledger

    at_hand = math.fsum(verdict.usage.cost_usd for item in judged for verdict in item.verdicts)
    with Ledger(ledger) as book:
        return round(max(book.spent_usd(), at_hand), 9)
