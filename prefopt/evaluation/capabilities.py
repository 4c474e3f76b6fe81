"""Base and tuned model on tasks that were not tuning's aim -> a `CapabilityReport`.

    tasks ──lm-eval──▶ a score an item, adapter on ┐
                       a score an item, adapter off ┴─paired test─▶ TaskChange a task ─▶ report, gate

EleutherAI's lm-eval asks and scores; this is the only module that knows it. One loaded model answers
both times. prefopt's own tasks (`capability_tasks/`) need no network; lm-eval's standard tasks do,
unless their data are in the cache. What cannot run is named with its reason, never dropped.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from prefopt.data.records import read_records, write_records
from prefopt.errors import DataError, ModelError, PrefoptError
from prefopt.evaluation.capability_report import (
    CapabilityReport,
    capability_report,
    compare_items,
)
from prefopt.models import LanguageModel
from prefopt.progress import progress_bar
from prefopt.types import Comparison, Prompt, content_hash

if TYPE_CHECKING:
    from prefopt.judges import Judge

logger = logging.getLogger(__name__)

OFFLINE = (
    "prefopt_arithmetic",
    "prefopt_reasoning",
    "prefopt_format",
    "prefopt_plain_text",
)
"""prefopt's own tasks, in the order of the report; `tasks="offline"` means these."""

WRITING = "prefopt_writing"
"""Open prompts, answered by both models and compared by a judge; part of "offline" with a judge."""

SCORES_FILE = "capabilities.jsonl"

_OWN_TASKS = Path(__file__).parent / "capability_tasks"
_WRITING_TOKENS = 96
_HUB_WAIT_SECONDS = 5.0


class ItemScore(msgspec.Struct, frozen=True, array_like=True):
    """One item: its place and a hash of its content, its score, and the answer where it is text."""

    item: str
    score: float
    answer: str = ""


class TaskScores(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.task_scores/1",
):
    """One model's scores on one task: a line of `capabilities.jsonl`.

    `key` is a hash of everything they depend on: weights, prompts, settings, the engine's version.
    """

    key: str
    side: Literal["tuned", "base"]
    model: str
    task: str
    title: str
    metric: str
    higher_is_better: bool
    items: tuple[ItemScore, ...]
    seconds: float


class _Side(NamedTuple):
    """One of the two models: how it is called, where it is, and how to make it answer."""

    side: Literal["tuned", "base"]
    name: str
    loaded: LanguageModel
    active: Callable[[], AbstractContextManager[Any]]
    has_adapter: bool


class _Settings(NamedTuple):
    limit: int | None
    seed: int
    batch_size: int
    progress: bool


class _DoesNotFitError(Exception):
    """Prompts that the model's context cannot hold."""


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
            task and model where it was. Results of other weights or settings are not taken over.

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
        _Side("tuned", tuned.name, tuned, contextlib.nullcontext, True),
        _Side("base", tuned.base, tuned, tuned.adapter_off, False),
    )
    settings = _Settings(limit, seed, batch_size, progress)
    return _measure(sides, tasks, judge, settings, alpha, max_drop, out)


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
        _Side("tuned", tuned.name, tuned, contextlib.nullcontext, True),
        _Side("base", base.name, base, contextlib.nullcontext, True),
    )
    settings = _Settings(limit, seed, batch_size, progress)
    return _measure(sides, tasks, judge, settings, alpha, max_drop, out)


def _measure(
    sides: tuple[_Side, _Side],
    tasks: str | Sequence[str],
    judge: Judge | None,
    settings: _Settings,
    alpha: float,
    max_drop: float,
    out: str | Path | None,
) -> CapabilityReport:
    _check_numbers(settings, alpha, max_drop)
    engine = _engine_version()
    with _quiet_engine(settings.progress):
        wanted = _find_tasks(tasks, judge)
        loaded, left_out = _load_tasks(wanted)
        n_tasks = len(loaded) + (WRITING in wanted.names)
        if not n_tasks:
            raise DataError("no task can run.", left_out)
        store = _Store(sides, engine, settings, out)
        pairs = []
        for name, task in loaded.items():
            try:
                pairs.append([_score_task(name, task, side, settings, store) for side in sides])
            except _DoesNotFitError as error:
                left_out.append(f"{name}: {error}")
            except (PrefoptError, RuntimeError):  # ours, and torch's, such as memory that ran out
                raise
            except Exception as error:  # whatever a task's own functions can raise
                raise DataError(
                    f"lm-eval failed on the task {name}: {_told(error)}. Mend the task or leave it "
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


def _check_numbers(settings: _Settings, alpha: float, max_drop: float) -> None:
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


def _engine_version() -> str:
    from importlib import metadata

    try:
        return f"lm-eval {metadata.version('lm-eval')}"
    except metadata.PackageNotFoundError as error:
        raise PrefoptError(
            "measuring capabilities needs EleutherAI's lm-eval, which is not installed: "
            "pip install 'prefopt[forgetting]'"
        ) from error


# Which tasks are meant.


class _Wanted(NamedTuple):
    """Task names in the order asked for, the folders they come from, and lm-eval's own names."""

    names: list[str]
    folders: list[Path]
    standard: dict[str, Path | None]  # name: its folder, or None for a group or tag


def _find_tasks(tasks: str | Sequence[str], judge: Judge | None) -> _Wanted:
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
            found, faults = _tasks_in(Path(name).expanduser())
            names += found
            problems += faults
            folders.append(Path(name).expanduser())
        else:
            if registry is None:
                registry = _standard_names()
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
    return _Wanted(list(dict.fromkeys(names)), folders, standard)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if "/" in name or "\\" in name or name.endswith((".yaml", ".yml")):
        hint += " There is no such folder; name the folder that holds the YAML files."
    return f"unknown task {name!r}{hint}"


def _tasks_in(folder: Path) -> tuple[list[str], list[str]]:
    """The tasks of a user's folder, and the YAML files in it that cannot be read."""
    import yaml
    from lm_eval.tasks import TaskManager

    # The engine leaves out files that it cannot read without a word.
    faults = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            faults.append(f"{path}: {' '.join(str(error).split())}")
    found = TaskManager(include_path=folder, include_defaults=False).all_subtasks
    if not found and not faults:
        faults.append(f"{folder}: no *.yaml file in it has a line 'task: NAME'")
    clash = sorted({*found} & {*OFFLINE, WRITING})
    faults += [f"{folder}: the task name {name} is prefopt's own; choose another" for name in clash]
    return found, faults


def _standard_names() -> dict[str, Path | None]:
    """Every name that lm-eval knows, with the folder of a task; None for groups and tags.

    lm-eval itself parses its 14,000 files for that, which takes a minute; names alone take a second.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    named = re.compile(r"""^["']?(task|group|tag)["']?: *["']?([^\s"'#]+)["']? *$""", re.MULTILINE)
    tag_list = re.compile(r"^tag: *\n((?: *- .*\n)+)", re.MULTILINE)
    names: dict[str, Path | None] = {}
    for path in root.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8", errors="replace")
        for kind, name in named.findall(text):
            place = root / path.relative_to(root).parts[0]
            names[name] = place if kind == "task" and names.get(name, place) else None
        for block in tag_list.findall(text):
            names |= {line.strip(" -\"'"): None for line in block.splitlines()}
    return names


# Loading them.


def _load_tasks(wanted: _Wanted) -> tuple[dict[str, Any], list[str]]:
    """The engine's task objects by name, and those left out, each with its reason.

    Raises:
        DataError: a task in a user's folder that cannot be built: that is for the user to mend.
    """
    from lm_eval.tasks import TaskManager

    loaded: dict[str, Any] = {}
    left_out: list[str] = []
    problems: list[str] = []
    own = [name for name in wanted.names if name in OFFLINE]
    if own:
        loaded |= TaskManager(include_path=_OWN_TASKS, include_defaults=False).load(own)["tasks"]
    for folder in wanted.folders:
        manager = TaskManager(include_path=folder, include_defaults=False)
        for name in manager.all_subtasks:
            try:
                # Paths of data files are meant from where the YAML lies.
                with contextlib.chdir(folder):
                    loaded |= _fit(manager.load([name])["tasks"])
            except Exception as error:  # whatever a user's YAML and functions can raise
                problems.append(f"{folder}: task {name}: {_told(error)}")
    if problems:
        raise DataError("tasks that cannot be built; nothing was run.", problems)
    if wanted.standard:
        with _offline_unless_reachable() as reachable:
            for name, place in wanted.standard.items():
                try:
                    manager = (
                        TaskManager(include_path=place, include_defaults=False)
                        if place
                        else TaskManager()
                    )
                    loaded |= _fit(manager.load([name])["tasks"])
                except Exception as error:  # the Hub, builders and tasks fail in many classes
                    why = "" if reachable else "; the hub cannot be reached from here"
                    left_out.append(f"{name}: {_told(error)}{why}")
    order = {name: i for i, name in enumerate(wanted.names)}
    return dict(sorted(loaded.items(), key=lambda pair: order.get(pair[0], len(order)))), left_out


def _fit(tasks: dict[str, Any]) -> dict[str, Any]:
    """The same tasks; ValueError where one cannot be asked or compared here."""
    for task in tasks.values():
        _item_metric(task)
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError("it runs code that the model writes, which prefopt does not")
        if getattr(task, "MULTIMODAL", False):
            raise ValueError("it shows pictures or plays sound, which a language model cannot take")
    return tasks


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


@contextlib.contextmanager
def _offline_unless_reachable() -> Iterator[bool]:
    """Within the block data come from the cache alone where no hub answers, without retries."""
    import datasets.config
    from huggingface_hub import constants, get_session

    try:
        reachable = not constants.HF_HUB_OFFLINE
        if reachable:
            get_session().head(constants.ENDPOINT, timeout=_HUB_WAIT_SECONDS)
    except Exception as error:  # of whichever HTTP library is in use
        logger.warning("%s cannot be reached (%s)", constants.ENDPOINT, type(error).__name__)
        reachable = False
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not reachable:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet_engine(progress: bool) -> Iterator[None]:
    """The engine's own log lines and bars are left out; ours say what matters."""
    import lm_eval.api.task
    import transformers

    noisy = logging.getLogger("lm_eval")
    level, bar = noisy.level, lm_eval.api.task.tqdm
    verbosity = transformers.utils.logging.get_verbosity()
    noisy.setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    # The one bar that the engine offers no switch for: it counts prompts being put together.
    lm_eval.api.task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        noisy.setLevel(level)
        transformers.utils.logging.set_verbosity(verbosity)
        lm_eval.api.task.tqdm = bar


# Asking.


class _Store:
    """Finished scores, in memory and in the user's folder."""

    def __init__(
        self,
        sides: tuple[_Side, _Side],
        engine: str,
        settings: _Settings,
        out: str | Path | None,
    ) -> None:
        self.folder = None if out is None else Path(out)
        self._sides: dict[str, str] = {}
        self._kept: list[TaskScores] = []
        if self.folder is None:
            return
        self._sides = {
            side.side: content_hash(
                [
                    engine,
                    weights_hash(side.loaded.model, with_adapter=side.has_adapter),
                    side.loaded.tokenizer.chat_template,
                    len(side.loaded.tokenizer),
                    settings.limit,
                    settings.seed,
                ]
            )
            for side in sides
        }
        path = self.folder / SCORES_FILE
        if path.exists():
            self._kept = [
                scores
                for scores in read_records(path, TaskScores)
                if scores.key.startswith(self._sides[scores.side][:16])
            ]

    def key(self, side: _Side, *task: Any) -> str:
        """What a result depends on: first the model's and the settings' part, then the task's."""
        return f"{self._sides.get(side.side, '')[:16]}-{content_hash(task)[:16]}"

    def find(self, side: _Side, key: str) -> TaskScores | None:
        """A result that was finished before."""
        return next((s for s in self._kept if (s.side, s.key) == (side.side, key)), None)

    def add(self, scores: TaskScores) -> TaskScores:
        """Keep a finished result."""
        self._kept.append(scores)
        if self.folder is not None:
            write_records(self.folder / SCORES_FILE, self._kept)
        return scores


def weights_hash(model: Any, *, with_adapter: bool = True) -> str:
    """SHA-256 over a loaded model's parameters, so that equal names cannot pass for equal models.

    Args:
        model: a torch module, perhaps in a PEFT wrapper.
        with_adapter: whether the adapter's weights and scale count; without them the hash is that
            of every model with the same base.
    """
    import torch

    adapters = set(getattr(model, "peft_config", {}))
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if adapters & set(name.split(".")) and not with_adapter:
            continue
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        data = parameter.detach().flatten().contiguous().view(torch.uint8)
        digest.update(data.cpu().numpy().data)
    if with_adapter and adapters:
        for name, module in model.named_modules():
            if isinstance(scaling := getattr(module, "scaling", None), dict):
                digest.update(f"{name} {sorted(scaling.items())}".encode())
    return digest.hexdigest()


def _score_task(
    name: str, task: Any, side: _Side, settings: _Settings, store: _Store
) -> TaskScores:
    """One model's scores on one task, from the store or from asking."""
    config = task.config.to_dict() if hasattr(task.config, "to_dict") else {}
    config.pop("metadata", None)  # says where the YAML lies
    docs = list(task.eval_docs)[: settings.limit]
    shown = list(task.fewshot_docs())[:1000] if config.get("num_fewshot") else []
    key = store.key(side, name, json.dumps([config, docs, shown], default=str, sort_keys=True))
    found = store.find(side, key)
    if found is not None:
        return found
    started = time.monotonic()
    title = str(config.get("task_alias") or name)
    samples = _ask(name, title, task, side, settings)
    metric = _item_metric(task)
    items = tuple(_item_score(task, sample, metric) for sample in samples)
    odd = sum(not math.isfinite(item.score) for item in items)
    if odd:
        raise ModelError(
            f"{odd} of {len(items)} scores of {side.name} on {name} are not numbers. Its weights "
            "hold NaN or overflow their number type; load it in float32 to see which, and lower "
            "the learning rate if training made them so."
        )
    return store.add(
        TaskScores(
            key=key,
            side=side.side,
            model=side.name,
            task=name,
            title=title,
            metric=metric.name,
            higher_is_better=metric.higher_is_better,
            items=items,
            seconds=time.monotonic() - started,
        )
    )


def _ask(
    name: str, title: str, task: Any, side: _Side, settings: _Settings
) -> list[Mapping[str, Any]]:
    """The engine's record of each item, for the first of the task's answer filters."""
    from lm_eval.evaluator import evaluate

    was_training = side.loaded.model.training
    lm = _language_model(side.loaded, f"{title} ({side.side})", settings)
    templated = side.loaded.tokenizer.chat_template is not None
    # Both models see the same examples: the engine draws them anew each time it asks.
    task.set_fewshot_seed(settings.seed)
    try:
        with side.active():
            results = evaluate(
                lm,
                {"tasks": {name: task}},
                limit=settings.limit,
                bootstrap_iters=0,
                apply_chat_template=templated,
                fewshot_as_multiturn=templated,
            )
    finally:
        side.loaded.model.train(was_training)
    samples = results["samples"][name]
    return [s for s in samples if s["filter"] == samples[0]["filter"]]


def _language_model(loaded: LanguageModel, label: str, settings: _Settings) -> Any:
    """The engine's view of a loaded model, with one bar for the requests of a task."""
    from lm_eval.api.model import CacheHook
    from lm_eval.models.huggingface import HFLM

    class Hook(CacheHook):  # type: ignore[misc]
        """Told of every answer; the engine would put it into a cache here."""

        def __init__(self, bar: Any) -> None:
            self.bar = bar

        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            self.bar.update(1)

    class CountedLM(HFLM):  # type: ignore[misc]
        """`HFLM` that counts answers, and refuses what its context cannot hold."""

        @contextlib.contextmanager
        def counted(self, requests: Sequence[Any]) -> Iterator[None]:
            with progress_bar(
                total=len(requests), description=label, unit="request", show=settings.progress
            ) as bar:
                self.set_cache_hook(Hook(bar))
                yield

        def refuse_too_long(self, lengths: Sequence[int]) -> None:
            n_long = sum(length > self.max_length for length in lengths)
            if n_long:
                raise _DoesNotFitError(
                    f"{n_long} of {len(lengths)} requests are longer than the model's context of "
                    f"{self.max_length} tokens (the longest needs {max(lengths)})"
                )

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.refuse_too_long([len(self.tok_encode("".join(r.args[:2]))) for r in requests])
            with self.counted(requests):
                return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            with self.counted(requests):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = True, **options: Any
        ) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.refuse_too_long(
                [
                    len(self.tok_encode(prompt)) + options.get("max_gen_toks", self.max_gen_toks)
                    for prompt, options in (r.args for r in requests)
                ]
            )
            with self.counted(requests):
                return super().generate_until(requests, disable_tqdm=True)

    # The engine changes the tokenizer's padding; the user's stays as it is.
    tokenizer = copy.deepcopy(loaded.tokenizer)
    return CountedLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=settings.batch_size)


# Scores an item.


class _Metric(NamedTuple):
    """What an item is scored by: the engine's name for it, ours, and which way is up."""

    source: str
    name: str
    higher_is_better: bool


# Log-likelihoods, which the engine turns into a perplexity only over all items together: its metric,
# the name of the loss an item, and what the loss is divided by beside the count beside it.
_LOSSES = {
    "perplexity": ("nll", 1.0),
    "word_perplexity": ("nll_per_word", 1.0),
    "byte_perplexity": ("nll_per_byte", 1.0),
    "bits_per_byte": ("bits_per_byte", math.log(2)),
}


def _item_metric(task: Any) -> _Metric:
    """The first of the task's metrics that is a mean over items.

    Raises:
        ValueError: it has none, such as a task with an F1 over all items; no paired test is possible.
    """
    for metric, aggregation in task.aggregation().items():
        if metric in _LOSSES:
            return _Metric(metric, _LOSSES[metric][0], False)
        if getattr(aggregation, "__name__", "") in ("mean", "nanmean"):
            return _Metric(metric, metric, bool(task.higher_is_better().get(metric, True)))
    raise ValueError(
        f"none of its metrics ({', '.join(task.aggregation())}) is a mean over items, so the two "
        "models cannot be compared item by item"
    )


def _item_score(task: Any, sample: Mapping[str, Any], metric: _Metric) -> ItemScore:
    value = sample[metric.source]
    if metric.source in _LOSSES:
        log_likelihood, count = value if isinstance(value, tuple | list) else (value, 1)
        value = -log_likelihood / (count * _LOSSES[metric.source][1])
    answer = sample["resps"][0][0] if task.OUTPUT_TYPE == "generate_until" else ""
    item = f"{sample['doc_id']}-{sample['doc_hash'][:16]}"
    return ItemScore(item=item, score=float(value), answer=str(answer))


def _compare(tuned: TaskScores, base: TaskScores, *, alpha: float, n_tasks: int, seed: int) -> Any:
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


# Writing.


def _compare_writing(
    sides: tuple[_Side, _Side], judge: Judge, settings: _Settings, store: _Store
) -> list[TaskScores] | str:
    """Both models' open answers, compared by the judge in both orders; or why they could not be.

    An item's score is 1 for the model whose answer is preferred, 1/2 for both in a tie.
    """
    from prefopt.data.rows import read_rows
    from prefopt.evaluation.win_rate import score_comparisons
    from prefopt.judges import judge_comparisons
    from prefopt.sampling.candidates import SamplingSettings, sample_candidates

    started = time.monotonic()
    rows = read_rows(_OWN_TASKS / "writing.jsonl").rows[: settings.limit]
    prompts = [Prompt.from_text(row.value["question"], "writing") for row in rows]
    sampling = SamplingSettings(temperature=0.0, top_p=1.0, max_new_tokens=_WRITING_TOKENS)
    answers = {}
    for side in sides:
        key = store.key(side, WRITING)
        partial = store.folder / f".writing_{side.side}_{key}.partial" if store.folder else None
        if partial is not None:
            partial.parent.mkdir(parents=True, exist_ok=True)
        with side.active():
            answers[side.side] = sample_candidates(
                prompts,
                replace(side.loaded, name=side.name),
                k=1,
                settings=sampling,
                seed=settings.seed,
                partial=partial,
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
    return [
        TaskScores(
            key=store.key(side, WRITING),
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
