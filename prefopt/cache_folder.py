"""Where files are kept that can be made again at any time, between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder that `PREFOPT_CACHE` names, or `~/.cache/prefopt`; it need not exist yet."""
    return Path(os.environ.get("PREFOPT_CACHE", Path.home() / ".cache" / "prefopt"))
