"""EleutherAI's lm-eval: task names -> task objects -> one model's score on each item.

The only module that knows lm-eval. It compares nothing and decides nothing; what cannot run here is an
error or a reason, never an empty result. Nothing is fetched for prefopt's own tasks.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.errors import DataError, ModelError, PrefoptError
from prefopt.evaluation.capability_scores import (
    AskSettings,
    ItemScore,
    ScoreStore,
    Side,
    TaskScores,
)
from prefopt.models import LanguageModel
from prefopt.progress import progress_bar

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

OWN_TASKS = Path(__file__).parent / "capability_tasks"

_HUB_WAIT_SECONDS = 5.0
_LOGITS_BYTES = 2 << 30
"""The most that a batch's logits and their log-probabilities, both in float32, may take."""


class DoesNotFitError(Exception):
    """Prompts that the model's context cannot hold."""


def engine_version() -> str:
    """The engine's name with its version; PrefoptError with the command that installs it."""
    from importlib import metadata

    try:
        return f"lm-eval {metadata.version('lm-eval')}"
    except metadata.PackageNotFoundError as error:
        raise PrefoptError(
            "measuring capabilities needs EleutherAI's lm-eval, which is not installed: "
            "pip install 'prefopt[forgetting]'"
        ) from error


# Names.


class WantedTasks(NamedTuple):
    """Task names in the order asked for, the folders they come from, and lm-eval's own names."""

    names: list[str]
    folders: list[Path]
    standard: dict[str, Path | None]  # name: its folder, or None for a group or tag


def tasks_in(folder: Path) -> tuple[list[str], list[str]]:
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


def standard_names() -> dict[str, Path | None]:
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


# Loading.


def load_tasks(wanted: WantedTasks) -> tuple[dict[str, Any], list[str]]:
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
        loaded |= TaskManager(include_path=OWN_TASKS, include_defaults=False).load(own)["tasks"]
    for folder in wanted.folders:
        manager = TaskManager(include_path=folder, include_defaults=False)
        for name in manager.all_subtasks:
            try:
                # Paths of data files are meant from where the YAML lies.
                with contextlib.chdir(folder):
                    loaded |= _fit(manager.load([name])["tasks"])
            except Exception as error:  # whatever a user's YAML and functions can raise
                problems.append(f"{folder}: task {name}: {told(error)}")
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
                    left_out.append(f"{name}: {told(error)}{why}")
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


def told(error: BaseException) -> str:
    """An error's class and the first line of its message."""
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
def quiet_engine(progress: bool) -> Iterator[None]:
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


def score_task(
    name: str, task: Any, side: Side, settings: AskSettings, store: ScoreStore
) -> TaskScores:
    """One model's scores on one task, from the store or from asking.

    Raises:
        ModelError: scores that are not numbers.
    """
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
    scores = TaskScores(
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
    store.add(scores)
    return scores


def _ask(
    name: str, title: str, task: Any, side: Side, settings: AskSettings
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


def _language_model(loaded: LanguageModel, label: str, settings: AskSettings) -> Any:
    """The engine's view of a loaded model, with one bar for the requests of a task."""
    from lm_eval.api.model import CacheHook
    from lm_eval.models.huggingface import HFLM

    # lm-eval's classes are Any to mypy.
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
                raise DoesNotFitError(
                    f"{n_long} of {len(lengths)} requests are longer than the model's context of "
                    f"{self.max_length} tokens (the longest needs {max(lengths)})"
                )

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            lengths = [len(self.tok_encode("".join(r.args[:2]))) for r in requests]
            self.refuse_too_long(lengths)
            self.batch_size_per_gpu = logits_batch(max(lengths))
            with self.counted(requests):
                return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            longest = max(len(self.tok_encode(r.args[0])) for r in requests)
            self.batch_size_per_gpu = logits_batch(min(longest, self.max_length))
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

    def logits_batch(longest: int) -> int:
        """Prompts a batch; fewer where the scores of all tokens would fill the memory."""
        return max(1, min(settings.batch_size, _LOGITS_BYTES // (8 * longest * len(tokenizer))))

    # The engine changes the tokenizer's padding; the user's stays as it is.
    tokenizer = copy.deepcopy(loaded.tokenizer)
    return CountedLM(
        pretrained=loaded.model,
        tokenizer=tokenizer,
        batch_size=settings.batch_size,
        # Templates of reasoning models leave room for thoughts, which would fill a short answer.
        chat_template_args={"enable_thinking": False},
    )


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
