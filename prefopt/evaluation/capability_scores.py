"""One model's score on each item of a task, kept in a file, and what makes two results the same.

A result depends on the weights, the prompts, the settings and the engine's version; all of them are in
its key, so a file never serves results of another model that has the same name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from prefopt.data.records import read_records, write_records
from prefopt.models import LanguageModel
from prefopt.types import content_hash

SCORES_FILE = "capabilities.jsonl"


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

    `key` is a hash of everything they depend on: weights, prompts, settings, the engine's version. A
    file may hold results of several models and settings; of each side and task the last line is that
    of the last call.
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


class Side(NamedTuple):
    """One of the two models: how it is called, where it is, and how to make it answer."""

    side: Literal["tuned", "base"]
    name: str
    loaded: LanguageModel
    active: Callable[[], AbstractContextManager[Any]]
    has_adapter: bool


class AskSettings(NamedTuple):
    """How both models are asked; see `measure_capabilities`."""

    limit: int | None
    seed: int
    batch_size: int
    progress: bool


class ScoreStore:
    """Finished scores, in memory and in the user's folder."""

    def __init__(
        self,
        sides: tuple[Side, Side],
        engine: str,
        settings: AskSettings,
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
        if os.path.exists(path):  # False, not an error, where the folder may not be looked into
            self._kept = read_records(path, TaskScores)
        write_records(path, self._kept)  # a folder that cannot be written to is found before work

    def key(self, side: Side, *task: Any) -> str:
        """What a result depends on: first the model's and the settings' part, then the task's."""
        return f"{self._sides.get(side.side, '')[:16]}-{content_hash(task)[:16]}"

    def find(self, side: Side, key: str) -> TaskScores | None:
        """A result that was finished before; it becomes the file's last."""
        found = next((s for s in self._kept if (s.side, s.key) == (side.side, key)), None)
        if found is not None:
            self._kept.remove(found)
            self.add(found)
        return found

    def add(self, scores: TaskScores) -> None:
        """Keep a finished result."""
        self._kept.append(scores)
        if self.folder is not None:
            write_records(self.folder / SCORES_FILE, self._kept)


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
