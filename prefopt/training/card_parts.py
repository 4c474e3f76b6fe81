"""What the cards of all trainings have alike: the Hub's metadata, general rows, the log. Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.models import is_hub_id
from prefopt.training.health import HealthNote


def front_matter(base: str, *, library: str, task: str, tags: Sequence[str]) -> str:
    """The metadata that the Hub reads; the base model is named where it can be one of the Hub's."""
    base_model = f"base_model: {base}\n" if is_hub_id(base) else ""
    return f"""---
{base_model}library_name: {library}
pipeline_tag: {task}
tags: [{", ".join(tags)}]
---"""


def general_data(n_rows: int, share: float, weight: float) -> str:
    """What was replayed: rows in all, their share of a step's rows, the weight of their loss."""
    return f"{n_rows} rows, {share:.0%} of a step, weight {weight:g}" if n_rows else "none"


def notes_list(health: Sequence[HealthNote]) -> str:
    """What the log says, a line each."""
    return "\n".join(f"- {note.level}: {note.message}" for note in health)
