"""Checkpoints of a training -> `FrontierPoint`s: how far each moved, and how often it is preferred.

Each checkpoint answers the prompts of the evaluation, is judged against the same answers of the base
model, and its KL is measured on its own answers, as the tuned model's is. One model is loaded at a
time. What was sampled and judged is kept, so that a call that was stopped goes on.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prefopt.errors import DataError
from prefopt.evaluation.advice import interval, percent
from prefopt.evaluation.model_figures import FrontierPoint
from prefopt.evaluation.policy_shift import measure_shift
from prefopt.evaluation.win_rate import win_rate
from prefopt.judges import Judge, judge_comparisons
from prefopt.models import Device, adapter_fingerprint, load_model, model_fingerprint
from prefopt.sampling.candidates import SamplingSettings, sample_candidates
from prefopt.types import Candidate, Comparison, content_hash

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"


class Checkpoint(NamedTuple):
    """An adapter and what it is called in the picture."""

    name: str
    folder: Path


class Frontier(NamedTuple):
    """The points of the picture, for each checkpoint a line for people, and what judging cost.

    A line has the figures, or why there are none.
    """

    points: tuple[FrontierPoint, ...]
    lines: dict[str, str]
    cost_usd: float


def find_checkpoints(given: str | Path | Sequence[str | Path]) -> list[Checkpoint]:
    """The adapters that folders hold: each is one, or holds some, such as `checkpoint-10`.

    Names are the folders' own, with the parent's before it where two are the same. Those of one folder
    are in the order of the numbers in their names.

    Raises:
        DataError: folders without an adapter, or one given twice; all of them.
    """
    folders: list[Path] = []
    problems = []
    for text in [given] if isinstance(given, str | Path) else given:
        folder = Path(text).expanduser()
        if (folder / _ADAPTER).is_file():
            folders.append(folder)
            continue
        inside = sorted((file.parent for file in folder.glob(f"*/{_ADAPTER}")), key=_natural)
        if not inside:
            what = "holds no adapter" if folder.is_dir() else "is not there"
            problems.append(f"{folder} {what}")
        folders += inside
    seen = Counter(folder.resolve() for folder in folders)
    problems += [f"{folder} is given {n} times" for folder, n in seen.items() if n > 1]
    if problems or not folders:
        raise DataError(
            "checkpoints are folders with adapter_config.json and adapter_model.safetensors, or "
            "folders that hold such folders (checkpoint-10, checkpoint-20).",
            problems or ["none was given"],
        )
    return [Checkpoint(name, folder) for name, folder in zip(_names(folders), folders, strict=True)]


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def measure_frontier(
    checkpoints: Sequence[Checkpoint],
    model: str,
    base_answers: Sequence[Candidate],
    out: Path,
    judge: Judge,
    *,
    sampling: SamplingSettings | None,
    seed: int,
    device: Device,
    progress: bool,
) -> Frontier:
    """Each checkpoint's place in the picture of win rate against KL.

    Args:
        checkpoints: adapters of `model`; see `find_checkpoints`.
        model: the base model's name.
        base_answers: its answers, one a prompt, with which each checkpoint's are compared.
        out: the evaluation's folder: verdicts are in its ledger, answers in `checkpoints/`.
        judge: the evaluation's judge.
        sampling, seed, device, progress: as the evaluation's own answers are sampled.

    Raises:
        ModelError, DataError, JudgeError: as loading, sampling and judging raise them.
    """
    from prefopt.data.records import write_records

    prompts = [answer.prompt for answer in base_answers]
    points, lines, cost_usd = [], {}, 0.0
    for number, (name, folder) in enumerate(checkpoints, start=1):
        logger.info("checkpoint %d of %d: %s", number, len(checkpoints), name)
        key = content_hash([model_fingerprint(model), adapter_fingerprint(str(folder))])[:12]
        loaded = load_model(model, adapter=folder, device=device)
        answers = sample_candidates(
            prompts, loaded, k=1, settings=sampling, seed=seed, progress=progress,
            partial=out / f".answers_tuned.{key}.partial", description=f"answering ({name})",
        )  # fmt: skip
        write_records(out / "checkpoints" / f"answers_{number}_{folder.name}.jsonl", answers)
        judged = judge_comparisons(
            [Comparison(a=a, b=b) for a, b in zip(answers, base_answers, strict=True)],
            judge, ledger=out / "judgements.sqlite", progress=progress,
        )  # fmt: skip
        cost_usd += sum(v.usage.cost_usd for j in judged for v in j.verdicts)
        shift = measure_shift(loaded, answers, sampling=sampling, progress=progress)
        del loaded  # before the next one takes its place
        if shift is None:
            lines[name] = "no answer fits the model's context with its prompt"
            continue
        try:
            rate = win_rate(judged)
        except ValueError as error:
            lines[name] = f"not in the picture: {error}"
            continue
        low, high = rate.headline_interval
        points.append(
            FrontierPoint(name=name, kl=shift.kl, win_rate=rate.win_rate, low=low, high=high)
        )
        lines[name] = (
            f"KL {shift.kl.value:.2f} nats an answer, preferred on {percent(rate.win_rate)} "
            f"({interval(low, high)}) of {rate.n_prompts:,} prompts"
        )
    return Frontier(tuple(points), lines, cost_usd)
