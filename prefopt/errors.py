"""The few errors a caller can act on.

    PrefoptError
    ├── DataError          input that cannot be used: where it is, what was expected, what to do
    ├── ModelError         a model or device that is not there or does not fit the request
    ├── JudgeError         a judge that cannot work
    │   ├── JudgeUnavailable   no key, unknown model, rejected credentials, or a lasting outage
    │   └── BudgetExceeded     the money limit was reached; what was bought is kept
    ├── TrainingError      training that must not start or must not go on
    ├── HostedError        a hosted service that refuses or cannot be reached
    ├── GateFailed         an evaluation that does not pass the gate that was set
    └── RunError           a run folder that does not match what is asked of it

Wrong arguments to a function raise ValueError. Messages say what was expected, what came, where,
and what to do next.
"""


class PrefoptError(Exception):
    """Base of all errors prefopt raises on purpose."""


class DataError(PrefoptError):
    """Input that cannot be used."""

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        self.problems = problems or []
        shown = self.problems[:20]
        more = len(self.problems) - len(shown)
        lines = [message, *(f"  - {p}" for p in shown)]
        if more:
            lines.append(f"  … and {more} more")
        super().__init__("\n".join(lines))


class ModelError(PrefoptError):
    """A model, tokenizer or device that is missing or unfit."""


class JudgeError(PrefoptError):
    """A judge that cannot work."""


class JudgeUnavailable(JudgeError):
    """The judge cannot be reached or refuses the request. What was bought before is kept."""


class BudgetExceeded(JudgeError):
    """The spending limit was reached. Finished judgements are kept; run again to go on."""


class TrainingError(PrefoptError):
    """Training that must not start, or must not go on."""


class HostedError(PrefoptError):
    """A hosted training service refuses, fails or cannot be reached."""


class GateFailed(PrefoptError):
    """An evaluation that does not pass the gate that was set for it."""


class RunError(PrefoptError):
    """A run folder that does not match what is asked of it."""
