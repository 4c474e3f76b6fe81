"""A narrow task without a judge: call a product review positive or negative, in one word.

The built-in reviews are made up, half of them positive. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from prefopt.data.prompts import split_by_prompt
from prefopt.data.records import read_records
from prefopt.errors import DataError
from prefopt.types import Candidate, Preference, PreferenceGroup, Prompt

Label = Literal["positive", "negative"]


class Review(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A review and what it is called."""

    text: str
    label: Label

    def prompt(self) -> Prompt:
        """The request to label it."""
        return Prompt.from_text(
            f"Positive or negative? Answer with one word.\n\n{self.text}", self.label
        )


def load_reviews() -> list[Review]:
    """The 104 built-in reviews."""
    return read_records(Path(__file__).with_name("reviews.jsonl"), Review)


def split_reviews(
    reviews: Sequence[Review], *, n_train: int, seed: int
) -> tuple[list[Review], list[Review]]:
    """Split into those to learn from and those to be measured on, with as many of each label.

    Raises:
        DataError: a side would be empty.
    """
    if not 0 < n_train < len(reviews):
        raise DataError(
            f"{n_train} of {len(reviews)} reviews cannot be learned and others measured; n_train must "
            f"be from 1 to {len(reviews) - 1}."
        )
    _, held_out = split_by_prompt(
        [review.prompt() for review in reviews], held_out=len(reviews) - n_train, seed=seed
    )
    measured = {prompt.prompt_id for prompt in held_out}
    return (
        [r for r in reviews if r.prompt().prompt_id not in measured],
        [r for r in reviews if r.prompt().prompt_id in measured],
    )


def review_preferences(reviews: Sequence[Review]) -> list[PreferenceGroup]:
    """Two preferences a review: the label to the wrong one, and to the right one in a sentence."""
    groups = []
    for review in reviews:
        prompt = review.prompt()
        wrong = "negative" if review.label == "positive" else "positive"
        texts = (review.label, wrong, f"This review is {review.label}.")
        groups.append(
            PreferenceGroup(
                prompt=prompt,
                answers=tuple(
                    Candidate(prompt=prompt, text=text, model="written", finish_reason="stop")
                    for text in texts
                ),
                preferences=tuple(Preference(chosen=0, rejected=i, p_chosen=1.0) for i in (1, 2)),
            )
        )
    return groups


def label_scores(reviews: Sequence[Review], answers: Sequence[Candidate]) -> list[float]:
    """1 for each answer that is the review's label and nothing else, up to case and full stop."""
    return [
        float(answer.text.strip().rstrip(".").casefold() == review.label)
        for review, answer in zip(reviews, answers, strict=True)
    ]
