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
    reviews: Sequence[Review], *, n_train: int, n_held_out: int, seed: int
) -> tuple[list[Review], list[Review]]:
    """Draw reviews to learn from and others to be measured on, with as many of each label.

    Raises:
        DataError: there are too few for both.
    """
    if min(n_train, n_held_out) < 1 or n_train + n_held_out > len(reviews):
        raise DataError(
            f"{n_train} reviews to learn from and {n_held_out} held out cannot be drawn from "
            f"{len(reviews)}: both must be at least 1, and no more in sum."
        )

    def drawn(pool: Sequence[Review], n: int) -> list[Review]:
        if n == len(pool):
            return list(pool)
        _, chosen = split_by_prompt([r.prompt() for r in pool], held_out=n, seed=seed)
        ids = {prompt.prompt_id for prompt in chosen}
        return [review for review in pool if review.prompt().prompt_id in ids]

    measured = drawn(reviews, n_held_out)
    return drawn([r for r in reviews if r not in measured], n_train), measured


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
