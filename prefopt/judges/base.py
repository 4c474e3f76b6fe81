"""The one interface of all judges.

A judge sees comparisons and yields verdicts; it knows nothing of orders or datasets. How comparisons
come to it, each once and none twice, is `prefopt.judges.asking`.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from prefopt.errors import JudgeError
from prefopt.judges.ledger import Ledger, Question
from prefopt.judges.rubric import HOUSE_STYLE, Rubric
from prefopt.types import Comparison, Verdict, content_hash

_WRITE_EVERY_S = 0.2


class CostEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """What asking would cost, before anything is spent. Dollars are a range, low to high.

    `worst_usd` is what the calls cost if every reply used all its tokens; `batch_discount` is what
    the dollars are multiplied by when the calls go through message batches (1: no discount).
    """

    calls: int
    input_tokens: int
    output_tokens: int
    low_usd: float
    high_usd: float
    worst_usd: float = 0.0
    batch_discount: float = 1.0

    def __str__(self) -> str:
        text = (
            f"{self.calls:,} calls, about {self.input_tokens:,} tokens in and "
            f"{self.output_tokens:,} out, ${self.low_usd:.2f} to ${self.high_usd:.2f}"
        )
        if self.batch_discount < 1:
            low, high = self.low_usd * self.batch_discount, self.high_usd * self.batch_discount
            text += f" (in message batches ${low:.2f} to ${high:.2f})"
        return text


class Asked(NamedTuple):
    """One call: a comparison with answer a shown first, and the key of its answer in the ledger."""

    key: str
    comparison: Comparison


Told = Callable[[str, Verdict], None]
"""Is told of each outcome, by key, once it is in the ledger."""


class Judge(abc.ABC):
    """Says which of two answers is better.

    Subclasses set `name` (shown to people, e.g. "anthropic:claude-sonnet-5-5") and `rubric`, and
    implement `verdicts`.
    """

    name: str
    rubric: Rubric = HOUSE_STYLE
    window: int = 256
    """How many comparisons `verdicts` is given at once."""

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

    def estimate(self, comparisons: Iterable[Comparison]) -> CostEstimate | None:
        """What asking all of these would cost; None for judges that cost nothing."""
        return None

    def answer(self, asked: Iterator[Asked], book: Ledger, told: Told) -> int:
        """Ask everything that is not answered or claimed by others, into the ledger.

        The iterator is read as it is needed, and no further. Judges that call a service override
        this to keep many requests under way. Returns how many questions were left alone because
        another process has them under way.
        """
        left_to_others = 0
        while portion := list(itertools.islice(asked, self.window)):
            questions = [Question(key, c.comparison_id) for key, c in portion]
            claims = book.claim_all(questions, self.name)
            left_to_others += claims.count("taken")
            ours = [a for a, claim in zip(portion, claims, strict=True) if claim == "claimed"]
            if ours:
                self._answer_portion(ours, book, told)
        return left_to_others

    def _answer_portion(self, ours: Sequence[Asked], book: Ledger, told: Told) -> None:
        left = {key for key, _ in ours}
        new: list[tuple[str, str, Verdict, None]] = []
        written_at = time.monotonic()

        def write() -> None:
            nonlocal written_at
            book.record_all(new)
            for key, _, verdict, _ in new:
                told(key, verdict)
            new.clear()
            written_at = time.monotonic()

        # Closed at once on any error, so that whatever runs behind it stops.
        with contextlib.closing(self.verdicts([c for _, c in ours])) as verdicts:
            try:
                for index, verdict in verdicts:
                    key = ours[index].key
                    new.append((key, self.name, verdict, None))
                    left.discard(key)
                    # One transaction a verdict would cost more than many a verdict does.
                    if time.monotonic() - written_at > _WRITE_EVERY_S:
                        write()
            finally:
                write()
        if left:
            raise JudgeError(
                f"judge {self.name} gave no verdict for {len(left)} of {len(ours)} comparisons. "
                "A judge must yield a verdict for each, with a failure where it has none."
            )
