"""The progress bar of every long stage: rate, time left, and a note such as money spent."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def progress_bar(
    *, total: int | None, description: str, unit: str, initial: int = 0, show: bool = True
) -> Any:
    """A tqdm bar; with `show=False` it counts silently."""
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        disable=not show,
        dynamic_ncols=True,
        smoothing=0.1,
    )


def print_above_bars(text: str) -> None:
    """Print lines without breaking the bars that are shown."""
    tqdm.write(text)
