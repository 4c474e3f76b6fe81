"""Judged comparisons of any score, for the tests of the statistics."""

from __future__ import annotations

from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict, Winner

_WINNERS: dict[float, Winner] = {1.0: "a", 0.5: "tie", 0.0: "b"}


def scored(
    score: float | None,
    *,
    prompt: str = "q",
    a: str = "tuned",
    b: str = "base",
    text_a: str = "one",
    text_b: str = "two",
    index: int = 0,
) -> JudgedComparison:
    """A comparison whose judge gives `a` this score in both orders; None is a failed verdict."""
    question = Prompt.from_text(prompt)
    if score is None:
        forward = backward = Verdict(judge="test", failure="refused")
    else:
        forward, backward = (
            Verdict(
                judge="test",
                preferred=_WINNERS[score],
                strength=int(score != 0.5),
                shown_first=first,
            )
            for first in ("a", "b")
        )
    return JudgedComparison(
        comparison=Comparison(
            a=Candidate(prompt=question, text=text_a, model=a, sample_index=index),
            b=Candidate(prompt=question, text=text_b, model=b, sample_index=index),
        ),
        forward=forward,
        backward=backward,
    )


def exchanged(item: JudgedComparison) -> JudgedComparison:
    """The same judgement with the names of the two answers exchanged."""
    assert item.backward is not None
    return JudgedComparison(
        comparison=item.comparison.swapped(),
        forward=item.backward.swapped(),
        backward=item.forward.swapped(),
    )
