"""Item files -> the split that lm-eval asks for, without a hub and without a cache on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from prefopt.data.prompts import plain_texts
from prefopt.data.rows import read_rows


def load_task_items(*, file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The rows of an item file beside this module, as the split "test".

    lm-eval also hands over the task's metadata, which is not needed.
    """
    rows = read_rows(Path(__file__).with_name(file)).rows
    return {"test": datasets.Dataset.from_list([row.value for row in rows])}


def load_plain_texts(**_: Any) -> dict[str, datasets.Dataset]:
    """prefopt's built-in prose, one text an item."""
    return {"test": datasets.Dataset.from_list([{"text": text} for text in plain_texts()])}
