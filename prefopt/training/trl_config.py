"""TRL's own settings object -> ours with the same values, so that a script may go on using TRL's.

Knows nothing of what the settings mean.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

Config = TypeVar("Config")


def with_own_fields(args: Any, own: type[Config], theirs: type[Any]) -> Config:
    """`args` as an `own`: as it is, or with the fields that TRL lacks at their defaults.

    Args:
        args: an `own` or a `theirs`.
        own: a dataclass that extends `theirs`.
        theirs: TRL's.

    Raises:
        TypeError: `args` is neither.
    """
    if isinstance(args, own):
        return args
    if not isinstance(args, theirs):
        raise TypeError(f"args must be a {own.__name__}, got {type(args).__name__}.")
    copied = copy.copy(args)
    copied.__class__ = own
    for name, spec in own.__dataclass_fields__.items():  # type: ignore[attr-defined]  # a dataclass
        if not hasattr(copied, name):
            setattr(copied, name, spec.default)
    return copied  # type: ignore[no-any-return]  # of the class it was just given
