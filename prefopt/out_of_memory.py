"""Whether an error means that memory ran out, in whichever library; and which settings are memory's.

Needs no library: Python, torch on CPU and GPU, SQLite and the system each have their own error for it.
"""

from __future__ import annotations

import errno
from typing import Any

_WORDS = (
    "out of memory",  # CUDA, SQLite
    "can't allocate memory",  # torch on a CPU
    "cannot allocate memory",  # the system
    "not enough memory",
    "alloc_failed",  # cuBLAS, cuDNN
    "could not create a primitive",  # oneDNN, torch's products on a CPU
    "could not create a memory object",
    "can't start new thread",
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of the machine or of a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower()
    return isinstance(error, Exception) and any(words in said for words in _WORDS)


def memory_words(error: BaseException) -> str:
    """What the error says, without the line of some library's source that said it and its advice."""
    said = str(error).split("DefaultCPUAllocator: ")[-1]
    lines = said.split(" Buy new RAM")[0].strip(" .").splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


_MEMORY_SETTINGS: dict[str, Any] = {"micro_batch_tokens": None, "gradient_checkpointing": False}


def without_memory_settings(plain: Any) -> Any:
    """Settings as plain data with those at their defaults that decide about memory alone.

    What is left is the same for runs that end with the same result but for rounding, so that one that
    did not fit the memory goes on where it was with a setting that does.
    """
    if isinstance(plain, dict):
        return {
            key: _MEMORY_SETTINGS[key]
            if key in _MEMORY_SETTINGS
            else without_memory_settings(value)
            for key, value in plain.items()
        }
    return plain
