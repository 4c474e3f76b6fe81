"""A judge that does what a function says: for tests, baselines and dry runs. Costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from prefopt.judges.base import Judge
from prefopt.types import Comparison, Verdict, Winner

Decision = Callable[[Comparison], Winner | Verdict]


class ScriptedJudge(Judge):
    """Asks `decide(comparison)`, which returns "a", "b", "tie" or a whole `Verdict`."""

    def __init__(self, decide: Decision, name: str = "scripted") -> None:
        self.decide = decide
        self.name = name

    def verdicts(
        self, comparisons: Sequence[Comparison]
    ) -> Generator[tuple[int, Verdict], None, None]:
        """Yield the function's decisions in order."""
        for index, comparison in enumerate(comparisons):
            decision = self.decide(comparison)
            if not isinstance(decision, Verdict):
                strength = 0 if decision == "tie" else 1
                decision = Verdict(judge=self.name, preferred=decision, strength=strength)
            yield index, decision


def shortest_wins() -> ScriptedJudge:
    """The baseline judge that looks at nothing but length, in words: the shorter answer wins."""

    def decide(comparison: Comparison) -> Winner:
        a, b = len(comparison.a.text.split()), len(comparison.b.text.split())
        return "tie" if a == b else "a" if a < b else "b"

    return ScriptedJudge(decide, name="scripted:shortest")


def longest_wins() -> ScriptedJudge:
    """The baseline judge that looks at nothing but length, in words: the longer answer wins."""

    def decide(comparison: Comparison) -> Winner:
        a, b = len(comparison.a.text.split()), len(comparison.b.text.split())
        return "tie" if a == b else "a" if a > b else "b"

    return ScriptedJudge(decide, name="scripted:longest")
