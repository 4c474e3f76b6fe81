"""The one interface of all judges, and the loop that asks them in both orders.

A judge sees comparisons and yields verdicts; it knows nothing of orders, ledgers or datasets. This
module swaps, caches, counts and shows progress; it knows nothing of how a verdict is reached.
"""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from prefopt.errors import JudgeError
from prefopt.judges.ledger import Ledger
from prefopt.judges.rubric import HOUSE_STYLE, Rubric
from prefopt.progress import progress_bar
from prefopt.types import Comparison, JudgedComparison, Verdict, content_hash

logger = logging.getLogger(__name__)


class CostEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """What asking would cost, before anything is spent. Dollars are a range, low to high."""

    calls: int
    input_tokens: int
    output_tokens: int
    low_usd: float
    high_usd: float

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls, about {self.input_tokens:,} tokens in and "
            f"{self.output_tokens:,} out, ${self.low_usd:.2f} to ${self.high_usd:.2f}"
        )


class Judge(abc.ABC):
    """Says which of two answers is better.

    Subclasses set `name` (shown to people, e.g. "anthropic:claude-sonnet-5-5") and `rubric`, and
    implement `verdicts`.
    """

    name: str
    rubric: Rubric = HOUSE_STYLE

    @property
    def fingerprint(self) -> str:
        """Changes with everything that can change a verdict: model, rubric, settings, code."""
        return content_hash([self.name, self.rubric.rubric_hash])

    @abc.abstractmethod
    def verdicts(
        self, comparisons: Sequence[Comparison]
    ) -> Generator[tuple[int, Verdict], None, None]:
        """Yield (index, verdict) for every comparison, in any order, as soon as each is known.

        Answer `a` is shown first. What goes wrong with one comparison is a `Verdict` with a
        `failure`; what makes the rest pointless (no key, budget spent) is a JudgeError.
        """

    def estimate(self, comparisons: Sequence[Comparison]) -> CostEstimate | None:
        """What asking all of these would cost; None for judges that cost nothing."""
        return None


def judge_comparisons(
    comparisons: Sequence[Comparison],
    judge: Judge,
    *,
    orders: Literal["both", "one"] = "both",
    ledger: str | Path | None = None,
    progress: bool = True,
) -> list[JudgedComparison]:
    """Ask `judge` about every comparison and return them with their verdicts, in the same order.

    Args:
        comparisons: what to judge. Two answers with the same text are a tie and are not asked.
        judge: any `Judge`.
        orders: "both" asks twice with the answers exchanged, so that a preference for a position
            cannot pass for a preference for an answer; "one" asks once, as given.
        ledger: an SQLite file that keeps every verdict as it comes. A later call with the same
            ledger asks only for what is missing. Failed verdicts are kept for the record but asked
            again.
        progress: show a bar with rate, time left and money spent.

    Raises:
        JudgeError: when asking cannot go on (credentials, budget). Verdicts so far are in the
            ledger.
    """
    asked: dict[str, Comparison] = {}
    plan: list[list[str]] = []
    known: dict[str, Verdict] = {}
    fingerprint = judge.fingerprint  # once: for a local model it reads the weights
    for comparison in comparisons:
        shown = [comparison, comparison.swapped()] if orders == "both" else [comparison]
        keys = [_verdict_key(fingerprint, c) for c in shown]
        plan.append(keys)
        for key, c in zip(keys, shown, strict=True):
            if c.a.text == c.b.text:
                known[key] = Verdict(
                    judge=judge.name, preferred="tie", rationale="The answers are identical."
                )
            else:
                asked[key] = c

    with Ledger(ledger) as book:
        known.update(book.verdicts(asked))
        missing = [key for key in asked if key not in known]
        if missing:
            cost = judge.estimate([asked[key] for key in missing])
            if cost is not None:
                logger.warning("%s is a paid judge: %s.", judge.name, cost)
        spent = 0.0
        bar = progress_bar(
            total=len(asked),
            initial=len(asked) - len(missing),
            description=f"judging ({judge.name})",
            unit="verdict",
            show=progress and bool(missing),
        )
        # Closed at once on any error, so that a judge with requests under way stops sending.
        asking = contextlib.closing(judge.verdicts([asked[key] for key in missing]))
        with bar, asking as verdicts:
            for index, verdict in verdicts:
                key = missing[index]
                known[key] = verdict
                book.record(key, judge.name, verdict)
                spent += verdict.usage.cost_usd
                if spent:
                    bar.set_postfix_str(f"${spent:.4f}")
                bar.update(1)

    unanswered = [key for key in asked if key not in known]
    if unanswered:
        raise JudgeError(
            f"judge {judge.name} gave no verdict for {len(unanswered)} of {len(asked)} comparisons. "
            "A judge must yield a verdict for each, with a failure where it has none."
        )
    judged = []
    for comparison, keys in zip(comparisons, plan, strict=True):
        backward = known[keys[1]].swapped() if orders == "both" else None
        judged.append(
            JudgedComparison(comparison=comparison, forward=known[keys[0]], backward=backward)
        )
    return judged


def _verdict_key(fingerprint: str, comparison: Comparison) -> str:
    messages = [[m.role, m.content] for m in comparison.prompt.messages]
    return content_hash([fingerprint, messages, comparison.a.text, comparison.b.text])
