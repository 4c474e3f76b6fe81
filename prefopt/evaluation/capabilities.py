"""Base and tuned model on tasks that were not tuning's aim -> a `CapabilityReport`.

    tasks ──lm-eval──▶ a score an item, adapter on ┐
                       a score an item, adapter off ┴─paired test─▶ TaskChange a task ─▶ report, gate

One loaded model answers both times. prefopt's own tasks (`capability_tasks/`) need no network;
lm-eval's standard tasks do, unless their data are in the cache. What cannot run is named with its
reason, never dropped.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.errors import DataError, ModelError, PrefoptError
from prefopt.evaluation.capability_engine import (
    OFFLINE,
    OWN_TASKS,
    WRITING,
    DoesNotFitError,
    WantedTasks,
    engine_version,
    load_tasks,
    quiet_engine,
    score_task,
    standard_names,
    tasks_in,
    told,
)
from prefopt.evaluation.capability_report import (
    CapabilityReport,
    TaskChange,
    capability_report,
    compare_items,
)
from prefopt.evaluation.capability_scores import (
    AskSettings,
    ItemScore,
    ScoreStore,
    Side,
    TaskScores,
)
from prefopt.models import LanguageModel
from prefopt.types import Comparison, Prompt

if TYPE_CHECKING:
    from prefopt.judges import Judge

_WRITING_TOKENS = 96


def measure_capabilities(
    tuned: LanguageModel,
    *,
    tasks: str | Sequence[str] = "offline",
    limit: int | None = None,
    judge: Judge | None = None,
    alpha: float = 0.05,
    max_drop: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    out: str | Path | None = None,
) -> CapabilityReport:
    """What the adapter did to the model's abilities: each task with the adapter on and off.

    Args:
        tuned: a model with an adapter; the base is the same model with the adapter off.
        tasks: "offline" for prefopt's own; names of lm-eval tasks, groups or tags; folders with
            lm-eval YAMLs. A list, or one text with commas. See docs/capabilities.md.
        limit: the first so many items of each task; None takes all.
        judge: compares open answers (the task "prefopt_writing"); without one they are not asked.
        alpha: the chance to call a drop or gain anywhere where nothing changed.
        max_drop: the worsening that the gate lets pass, as a share: 0.02 is two points of accuracy.
        seed: of few-shot examples, judged answers and resampling.
        batch_size: prompts in one forward pass.
        progress: show bars.
        out: a folder that keeps each item's score, so that a run that was killed goes on with the
            task and model where it was. Results of other weights or settings are not taken over, and
            stay in the file.

    Raises:
        DataError: unknown task names, unusable folders, or no task that could run; before work.
        ModelError: no adapter, or a model whose scores are not numbers.
        JudgeError: as judging raises it.
        PrefoptError: lm-eval is not installed.
        ValueError: numbers out of range.
    """
    if not hasattr(tuned.model, "disable_adapter"):
        raise ModelError(
            f"{tuned.name} has no adapter to switch off. To compare two models, as after a full "
            "fine-tune, use compare_capabilities(base, tuned)."
        )
    sides = (
        Side("tuned", tuned.name, tuned, contextlib.nullcontext, True),
        Side("base", tuned.base, tuned, tuned.adapter_off, False),
    )
    settings = AskSettings(limit, seed, batch_size, progress)
    return _measure(sides, tasks, judge, settings, alpha, max_drop, out)


def check_tasks(tasks: str | Sequence[str], judge: Judge | None = None) -> None:
    """Raise now what `measure_capabilities` would raise for these tasks after an hour of other work.

    Whether a task's data can be had is not asked.

    Raises:
        DataError: unknown task names, or unusable folders.
        PrefoptError: lm-eval is not installed.
    """
    engine_version()
    _find_tasks(tasks, judge)


def compare_capabilities(
    base: LanguageModel,
    tuned: LanguageModel,
    *,
    tasks: str | Sequence[str] = "offline",
    limit: int | None = None,
    judge: Judge | None = None,
    alpha: float = 0.05,
    max_drop: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    out: str | Path | None = None,
) -> CapabilityReport:
    """`measure_capabilities` for two loaded models, such as a base and its full fine-tune.

    Each model is asked through its own tokenizer and chat template. Items whose prompts differ for
    that reason are compared all the same, as it is the same question; texts are measured per byte.

    Args:
        base: the model before.
        tuned: the model after.
        tasks, limit, judge, alpha, max_drop, seed, batch_size, progress, out: as there.

    Raises:
        DataError, ModelError, JudgeError, PrefoptError, ValueError: as there.
    """
    sides = (
        Side("tuned", tuned.name, tuned, contextlib.nullcontext, True),
        Side("base", base.name, base, contextlib.nullcontext, True),
    )
    settings = AskSettings(limit, seed, batch_size, progress)
    return _measure(sides, tasks, judge, settings, alpha, max_drop, out)


def _measure(
    sides: tuple[Side, Side],
    tasks: str | Sequence[str],
    judge: Judge | None,
    settings: AskSettings,
    alpha: float,
    max_drop: float,
    out: str | Path | None,
) -> CapabilityReport:
    _check_numbers(settings, alpha, max_drop)
    engine = engine_version()
    with quiet_engine(settings.progress):
        wanted = _find_tasks(tasks, judge)
        loaded, left_out = load_tasks(wanted)
        n_tasks = len(loaded) + (WRITING in wanted.names)
        if not n_tasks:
            raise DataError("no task can run.", left_out)
        store = ScoreStore(sides, engine, settings, out)
        pairs = []
        for name, task in loaded.items():
            try:
                pairs.append([score_task(name, task, side, settings, store) for side in sides])
            except DoesNotFitError as error:
                left_out.append(f"{name}: {error}")
            except (PrefoptError, RuntimeError):  # ours, and torch's, such as memory that ran out
                raise
            except Exception as error:  # whatever a task's own functions can raise
                raise DataError(
                    f"lm-eval failed on the task {name}: {told(error)}. Mend the task or leave it "
                    "out. Tasks that were finished are kept where a folder was given."
                ) from error
    if WRITING in wanted.names:
        assert judge is not None  # _find_tasks has made sure
        written = _compare_writing(sides, judge, settings, store)
        if isinstance(written, str):
            left_out.append(written)
        else:
            pairs.append(written)
    if not pairs:
        raise DataError("no task could run.", left_out)
    return capability_report(
        [
            _compare(tuned, base, alpha=alpha, n_tasks=len(pairs), seed=settings.seed)
            for tuned, base in pairs
        ],
        engine=engine,
        base_model=sides[1].name,
        tuned_model=sides[0].name,
        alpha=alpha,
        max_drop=max_drop,
        left_out=left_out,
    )


def _check_numbers(settings: AskSettings, alpha: float, max_drop: float) -> None:
    problems = []
    if settings.limit is not None and settings.limit < 1:
        problems.append(f"limit must be at least 1 item, got {settings.limit}")
    if settings.batch_size < 1:
        problems.append(f"batch_size must be at least 1, got {settings.batch_size}")
    if not 0 < alpha < 1:
        problems.append(f"alpha must be between 0 and 1, got {alpha}")
    if not 0 <= max_drop < math.inf:
        problems.append(f"max_drop must be a share of at least 0, such as 0.02, got {max_drop}")
    if problems:
        raise ValueError("capabilities: " + "; ".join(problems) + ".")


def _find_tasks(tasks: str | Sequence[str], judge: Judge | None) -> WantedTasks:
    """Turn what the user wrote into task names; all that cannot be meant is refused at once."""
    asked = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    asked = [name.strip() for name in asked if name.strip()]
    own = (*OFFLINE, WRITING)
    names: list[str] = []
    folders: list[Path] = []
    standard: dict[str, Path | None] = {}
    problems: list[str] = []
    registry: dict[str, Path | None] | None = None
    for name in asked:
        if name == "offline":
            names += OFFLINE if judge is None else own
        elif name in own:
            names.append(name)
        elif Path(name).expanduser().is_dir():
            folder = Path(name).expanduser().resolve()
            found, faults = tasks_in(folder)
            names += found
            problems += faults
            folders.append(folder)
        else:
            if registry is None:
                registry = standard_names()
            if name in registry:
                names.append(name)
                standard[name] = registry[name]
            else:
                problems.append(_unknown(name, [*own, "offline", *registry]))
    if not asked:
        problems.append("no task is named")
    if WRITING in names and judge is None:
        problems.append(f"{WRITING} needs a judge that compares the answers; none was given")
    if problems:
        raise DataError(
            "capabilities cannot be measured. Tasks are 'offline', names of lm-eval tasks such as "
            "arc_easy, or folders with lm-eval YAMLs.",
            problems,
        )
    return WantedTasks(list(dict.fromkeys(names)), folders, standard)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if "/" in name or "\\" in name or name.endswith((".yaml", ".yml")):
        hint += " There is no such folder; name the folder that holds the YAML files."
    return f"unknown task {name!r}{hint}"


def _compare(
    tuned: TaskScores, base: TaskScores, *, alpha: float, n_tasks: int, seed: int
) -> TaskChange:
    """The paired comparison over the items that both models answered."""
    by_item = {item.item: item.score for item in base.items}
    both = [item for item in tuned.items if item.item in by_item]
    return compare_items(
        tuned.task,
        tuned.title,
        tuned.metric,
        [by_item[item.item] for item in both],
        [item.score for item in both],
        higher_is_better=tuned.higher_is_better,
        alpha=alpha,
        n_tasks=n_tasks,
        seed=seed,
    )


def _compare_writing(
    sides: tuple[Side, Side], judge: Judge, settings: AskSettings, store: ScoreStore
) -> list[TaskScores] | str:
    """Both models' open answers, compared by the judge in both orders; or why they could not be.

    An item's score is 1 for the model whose answer is preferred, 1/2 for both in a tie.
    """
    from prefopt.data.rows import read_rows
    from prefopt.evaluation.win_rate import score_comparisons
    from prefopt.judges import judge_comparisons
    from prefopt.sampling.candidates import SamplingSettings, sample_candidates

    started = time.monotonic()
    rows = read_rows(OWN_TASKS / "writing.jsonl").rows[: settings.limit]
    prompts = [Prompt.from_text(row.value["question"], "writing") for row in rows]
    sampling = SamplingSettings(temperature=0.0, top_p=1.0, max_new_tokens=_WRITING_TOKENS)
    asked = {side.side: store.key(side, WRITING, [p.prompt_id for p in prompts]) for side in sides}
    # A preference depends on both models and on the judge.
    keys = {side.side: store.key(side, WRITING, judge.fingerprint, asked) for side in sides}
    kept = [store.find(side, keys[side.side]) for side in sides]
    if all(kept):
        return [scores for scores in kept if scores is not None]

    def partial_of(side: Side) -> Path | None:
        name = f".writing_{side.side}.{asked[side.side]}.partial"
        return None if store.folder is None else store.folder / name

    answers = {}
    for side in sides:
        with side.active():
            answers[side.side] = sample_candidates(
                prompts,
                replace(side.loaded, name=side.name),
                k=1,
                settings=sampling,
                seed=settings.seed,
                partial=partial_of(side),
                progress=settings.progress,
                description=f"Writing ({side.side})",
            )
    judged = judge_comparisons(
        [Comparison(a=a, b=b) for a, b in zip(answers["tuned"], answers["base"], strict=True)],
        judge,
        ledger=store.folder / "judgements.sqlite" if store.folder else None,
        progress=settings.progress,
    )
    try:
        scored = score_comparisons(judged)
    except ValueError as error:
        return f"{WRITING}: {error}"
    found = [
        TaskScores(
            key=keys[side.side],
            side=side.side,
            model=side.name,
            task=WRITING,
            title=f"Writing (judged by {judge.name})",
            metric="preferred",
            higher_is_better=True,
            items=tuple(
                ItemScore(
                    item=judged.comparison.prompt.prompt_id,
                    score=points if side.side == "tuned" else 1 - points,
                    answer=getattr(judged.comparison, "a" if side.side == "tuned" else "b").text,
                )
                for judged, points in zip(scored.comparisons, scored.points, strict=True)
            ),
            seconds=time.monotonic() - started,
        )
        for side in sides
    ]
    if not scored.n_unscored:  # else the next call asks again for what is missing
        for side, scores in zip(sides, found, strict=True):
            store.add(scores)
            if (partial := partial_of(side)) is not None:
                partial.unlink(missing_ok=True)
    return found
