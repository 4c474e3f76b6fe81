"""The operating system made to fail at a chosen call: builds `faulty_calls.c`, and arms a process.

A process started with `preloaded_environment` counts its calls that change something under a folder,
whichever library makes them, and can be told at which of them to be killed or to get an error.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

Effect = Literal[
    "kill", "kill_after", "kill_torn", "terminate", "full", "input_output", "read_only"
]
"""What happens at the chosen call: SIGKILL before it, after it, or after half of a write; SIGTERM; or
an error: no space left or read-only from then on, or one failure of the disk."""

# As the C file numbers them; the error number for those that fail.
_EFFECTS: dict[Effect, tuple[int, int]] = {
    "kill": (0, 0),
    "kill_after": (1, 0),
    "kill_torn": (2, 0),
    "terminate": (5, 0),
    "full": (4, errno.ENOSPC),
    "input_output": (3, errno.EIO),
    "read_only": (4, errno.EROFS),
}

_SOURCE = Path(__file__).with_suffix(".c")


def preloaded_environment() -> dict[str, str] | None:
    """The environment of a process that can be armed; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not os.path.isdir("/proc/self/fd"):
        return None
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"prefopt-faulty-calls-{os.getuid()}-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / "built.so"
            command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(built), str(_SOURCE)]
            if subprocess.run([*command, "-ldl"], capture_output=True, check=False).returncode:
                return None
            os.replace(built, library)
    return {**os.environ, "LD_PRELOAD": str(library)}


def arm(
    folder: str,
    *,
    nth: int = 0,
    effect: Effect = "kill",
    trace: str | None = None,
    only: str | None = None,
) -> None:
    """From now on count this process's calls under `folder`; the nth (from 1) has the effect.

    With `nth=0` nothing ever happens. `trace` is a file that gets a line for every call. `only` is a
    regular expression (POSIX, extended): calls whose path in the folder it does not find are not
    counted.
    """
    library = ctypes.CDLL(None)
    number, error = _EFFECTS[effect]
    to = -1 if trace is None else os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    library.fault_arm(
        folder.encode(), ctypes.c_long(nth), number, error, to, only and only.encode()
    )


def arm_clock(*, nth: int, jump_s: float) -> None:
    """From the nth look at the wall clock on, it is wrong by `jump_s` seconds."""
    ctypes.CDLL(None).clock_arm(ctypes.c_long(nth), ctypes.c_double(jump_s))
