"""The beta that an adapter was trained with, from what prefopt's training left beside it.

In: an adapter's folder. Out: a `TrainedBeta`. Read are the model card in the folder, which travels
with the adapter, and `run.json` of the run that holds it. Nothing is guessed: without a record, or
where beta times a log-ratio to the base model is not what was trained, there is none, and why is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_CARD = "README.md"
_OURS = "Trained with [prefopt]"
_BASE = "the base model"
_FOLDERS_UP = 3
"""A checkpoint lies in `<run>/.partial/checkpoints/checkpoint-10`."""


class TrainedBeta(NamedTuple):
    """Beta where it is known, and where from; or None, and why not (a sentence without its stop)."""

    beta: float | None
    reason: str


def trained_beta(adapter: str | Path) -> TrainedBeta:
    """What `train_dpo` or `train_ppo` was told, for implicit rewards against the base model.

    Never an error: an adapter that prefopt did not train, or from the Hub, has no record here.
    """
    folder = Path(adapter).expanduser()
    for place in (folder, *folder.absolute().parents[:_FOLDERS_UP]):
        for found in (_in_card(place / _CARD), _in_run(place / "run.json")):
            if found is not None:
                return found
    return TrainedBeta(None, f"no record of its training lies with {adapter}")


def _in_card(path: Path) -> TrainedBeta | None:
    """DPO's card says "| loss | sigmoid, beta 0.1 |", PPO's "| beta | 0.05 |"."""
    text = _read(path)
    if _OURS not in text:
        return None
    rows = dict(re.findall(r"^\| (reference|loss|beta) \| (.+?) \|", text, re.MULTILINE))
    said = rows.get("beta") or rows.get("loss", "").rpartition("beta ")[2]
    if not said:
        return None  # another training's card
    return _checked(said, rows.get("reference", ""), path)


def _in_run(path: Path) -> TrainedBeta | None:
    try:
        config: Any = json.loads(_read(path) or "null")
    except ValueError:
        return None
    for section, name in (("dpo", "beta"), ("ppo", "kl_coef")):
        part = config.get(section) if isinstance(config, dict) else None
        if not isinstance(part, dict) or name not in part:
            continue
        start = next(_values(config, "continue_from"), None)
        reference = f"the adapter {start}" if start and part.get("reference") != "base" else _BASE
        adapted = ", adapted" if part.get("kl_target") is not None else ""
        return _checked(f"{part[name]}{adapted}", reference, path)
    return None


def _values(config: dict[str, Any], name: str) -> Iterator[Any]:
    for part in config.values():
        if isinstance(part, dict) and part.get(name):
            yield part[name]


def _checked(said: str, reference: str, path: Path) -> TrainedBeta:
    if not reference.startswith(_BASE):
        return TrainedBeta(None, f"{path} says that the reference was {reference}, not {_BASE}")
    try:
        beta = float(said)
    except ValueError:  # "0.05, adapted to a KL of 6 nats"
        return TrainedBeta(None, f"{path} says that beta was {said}")
    if not 0 < beta < float("inf"):
        return TrainedBeta(None, f"{path} says that beta was {said}")
    return TrainedBeta(beta, f"{path}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
