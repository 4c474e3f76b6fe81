"""Asks a judge about comparisons, in both orders, through a ledger.

This module swaps, names each call by a key, asks what the ledger lacks, counts and shows progress.
It knows nothing of how a verdict is reached, nor what becomes of it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Literal

from prefopt.errors import JudgeError
from prefopt.judges.base import Asked, CostEstimate, Judge
from prefopt.judges.ledger import Ledger
from prefopt.progress import progress_bar
from prefopt.types import Comparison, JudgedComparison, Verdict, content_hash

logger = logging.getLogger(__name__)

Orders = Literal["both", "one"]

_LOOK_AHEAD = 250
_TURN_S = 0.5


def judge_comparisons(
    comparisons: Sequence[Comparison],
    judge: Judge,
    *,
    orders: Orders = "both",
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
            again. Several processes may share a ledger; no question is asked by two of them.
        progress: show a bar with rate, time left and money spent.

    Raises:
        JudgeError: when asking cannot go on (credentials, budget). Verdicts so far are in the
            ledger.
    """
    return list(judge_stream(comparisons, judge, orders=orders, ledger=ledger, progress=progress))


def judge_stream(
    comparisons: Iterable[Comparison],
    judge: Judge,
    *,
    orders: Orders = "both",
    ledger: str | Path | None = None,
    progress: bool = True,
) -> Iterator[JudgedComparison]:
    """`judge_comparisons` for more pairs than fit the memory: yields them in order once all is asked.

    Args:
        comparisons: is read twice or more, so it must start anew with each `iter()`: a list, or a
            reader of a file. The other arguments are those of `judge_comparisons`.

    Raises:
        TypeError: `comparisons` is an iterator, which can be read once only.
        JudgeError: as in `judge_comparisons`.
    """
    if isinstance(comparisons, Iterator):
        raise TypeError(
            "comparisons must be readable more than once, got an iterator. Pass a list, or an object "
            "whose __iter__ opens its source again."
        )
    with Ledger(ledger) as book:
        book.check()
        n = len(comparisons) * (1 + (orders == "both")) if isinstance(comparisons, Sized) else None
        ask_missing(_Shown(comparisons, orders), judge, book, total=n, progress=progress)
        yield from collect_judged(comparisons, judge, book, orders)


def estimate_missing(
    comparisons: Iterable[Comparison],
    judge: Judge,
    *,
    orders: Orders = "both",
    ledger: str | Path | None = None,
) -> CostEstimate | None:
    """What judging these would cost beyond what the ledger holds; None for a judge that is free.

    Asks nothing and writes nothing.
    """
    shown = _Shown(comparisons, orders)
    if ledger is None or not Path(ledger).exists():
        return judge.estimate(c for c in shown if c.a.text != c.b.text)
    with Ledger(ledger) as book:
        return judge.estimate(item.comparison for item in _missing(shown, judge.fingerprint, book))


def ask_missing(
    shown: Iterable[Comparison],
    judge: Judge,
    book: Ledger,
    *,
    total: int | None = None,
    progress: bool = True,
    announce: bool = True,
) -> None:
    """Ask `judge` every comparison as shown, but for those the ledger answers.

    `shown` is read again until nothing is left that another process has under way, so it must start
    anew with each `iter()`. What this process asked in vain is not asked again by it. `announce` says
    beforehand what a paid judge will cost.
    """
    fingerprint = judge.fingerprint  # once: for a local model it reads the weights
    if announce:
        cost = judge.estimate(item.comparison for item in _missing(shown, fingerprint, book))
        if cost is not None and cost.calls:
            logger.warning("%s is a paid judge: %s.", judge.name, cost)
    spent_usd = 0.0
    with contextlib.ExitStack() as stack:
        bar: Any = None
        there = _Count()

        def told(key: str, verdict: Verdict) -> None:
            nonlocal bar, spent_usd
            if bar is None:  # with nothing to ask there is nothing to show
                bar = stack.enter_context(
                    progress_bar(
                        total=total,
                        initial=there.known,
                        description=f"judging ({judge.name})",
                        unit="verdict",
                        show=progress,
                    )
                )
            if total is not None:
                bar.total = total - there.identical
            spent_usd += verdict.usage.cost_usd
            if spent_usd:
                bar.set_postfix_str(f"${spent_usd:.4f}", refresh=False)
            bar.update(1)

        while judge.answer(_missing(shown, fingerprint, book, there), book, told):
            # The rest is under way in another process, which may end or die.
            logger.info("waiting for verdicts that another process is asking for")
            time.sleep(_TURN_S)
            book.bury_the_dead()
        if bar is not None and total is not None:
            bar.total = bar.n  # what was asked twice or by another process is done as well
            bar.refresh()


class _Count:
    """What a pass found that needs no asking: calls answered already, and identical answers."""

    known = 0
    identical = 0


class _Shown:
    """Comparisons as a judge is shown them: both orders of each, or one."""

    def __init__(self, comparisons: Iterable[Comparison], orders: Orders) -> None:
        self._comparisons, self._orders = comparisons, orders

    def __iter__(self) -> Iterator[Comparison]:
        for comparison in self._comparisons:
            yield comparison
            if self._orders == "both":
                yield comparison.swapped()


def _missing(
    shown: Iterable[Comparison], fingerprint: str, book: Ledger, count: _Count | None = None
) -> Iterator[Asked]:
    """What has no answer yet and was not asked in vain by this process, read lazily."""
    count = count or _Count()
    count.identical = 0
    rest = iter(shown)
    while portion := list(itertools.islice(rest, _LOOK_AHEAD)):
        different = [c for c in portion if c.a.text != c.b.text]
        count.identical += len(portion) - len(different)
        asked = {verdict_key(fingerprint, c): c for c in different}
        known = book.answered(asked)
        known |= book.failed_here(key for key in asked if key not in known)
        count.known += len(known)
        for key, comparison in asked.items():
            if key not in known:
                yield Asked(key, comparison)


def collect_judged(
    comparisons: Iterable[Comparison], judge: Judge, book: Ledger, orders: Orders = "both"
) -> Iterator[JudgedComparison]:
    """What the ledger holds about comparisons, in their order; asks nothing.

    Raises:
        JudgeError: a comparison was never asked about.
    """
    fingerprint = judge.fingerprint
    rest = iter(comparisons)
    while portion := list(itertools.islice(rest, _LOOK_AHEAD)):
        keyed = []
        for c in portion:
            keys = [verdict_key(fingerprint, c)]
            if orders == "both":
                keys.append(verdict_key(fingerprint, c.swapped()))
            keyed.append((c, keys))
        known = book.outcomes(key for _, keys in keyed for key in keys)
        for c, keys in keyed:
            if c.a.text == c.b.text:
                tie = Verdict(
                    judge=judge.name, preferred="tie", rationale="The answers are identical."
                )
                found = [tie] * len(keys)
            else:
                try:
                    found = [known[key] for key in keys]
                except KeyError:
                    raise JudgeError(
                        f"the ledger {book.path} has no verdict by {judge.name} about a comparison "
                        f"for {c.prompt.text[:60]!r}. Ask first."
                    ) from None
            yield JudgedComparison(
                comparison=c,
                forward=found[0],
                backward=found[1].swapped() if orders == "both" else None,
            )


def verdict_key(fingerprint: str, shown: Comparison, sample: int = 0) -> str:
    """The ledger's key of one call: the judge, the conversation, both answers in the order shown.

    `sample` tells repeated calls about the same thing apart.
    """
    messages = [[m.role, m.content] for m in shown.prompt.messages]
    return content_hash([fingerprint, messages, shown.a.text, shown.b.text, sample])
