"""A reward model, a function or a judge -> one score for each sampled answer, or None.

None says that there is no score: the answer is then left out of training, counted and told. It never
becomes a 0, which would be a reward like any other.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import TrainingError
from prefopt.judges import Judge, judge_comparisons
from prefopt.training.reward_model import RewardModel
from prefopt.trees import AnswerTree
from prefopt.types import Candidate, Comparison, Prompt

Ids = tuple[int, ...]
Scores = list[float | None]


class SampledBatch:
    """Answers that are to be scored; answer i belongs to prompt `prompt_of[i]`.

    Args:
        prompts: as conversations; None where only token ids are known.
        prompt_ids: the same as token ids.
        rows: the dataset's rows they came from.
        prompt_of: (A,) a prompt for each answer, ascending.
        answer_ids: (A,) with their end tokens.
        ended: (A,) whether each ended by itself.
        tokenizer: to make texts of ids; None gives empty texts.
        logps: (A,) log-probabilities of each answer's tokens by what sampled them, or None.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt | None],
        prompt_ids: Sequence[Ids],
        rows: Sequence[Mapping[str, Any]],
        prompt_of: Sequence[int],
        answer_ids: Sequence[Ids],
        ended: Sequence[bool],
        tokenizer: Any,
        logps: Sequence[tuple[float, ...] | None] = (),
    ) -> None:
        self.logps = logps
        self.prompts, self.prompt_ids, self.rows = prompts, prompt_ids, rows
        self.prompt_of, self.answer_ids, self.ended = prompt_of, answer_ids, ended
        self.tokenizer = tokenizer

    @functools.cached_property
    def texts(self) -> list[str]:
        """The answers' texts, without special tokens."""
        if self.tokenizer is None:
            return ["" for _ in self.answer_ids]
        found: list[str] = self.tokenizer.batch_decode(
            [list(ids) for ids in self.answer_ids], skip_special_tokens=True
        )
        return [text.strip() for text in found]

    def trees(self) -> list[AnswerTree]:
        """The answers by prompt."""
        members: list[list[Ids]] = [[] for _ in self.prompt_ids]
        for prompt, ids in zip(self.prompt_of, self.answer_ids, strict=True):
            members[prompt].append(ids)
        return [
            AnswerTree(prompt, tuple(answers))
            for prompt, answers in zip(self.prompt_ids, members, strict=True)
            if answers
        ]

    def prompt_texts(self) -> list[Prompt]:
        """The conversation of each prompt.

        Raises:
            TrainingError: some are known as token ids only.
        """
        if any(prompt is None for prompt in self.prompts):
            raise TrainingError(
                "this reward reads texts, but the dataset has token ids only. Give it a `prompt` "
                "column."
            )
        return [prompt for prompt in self.prompts if prompt is not None]


RewardSource = Callable[[SampledBatch], Scores]


def reward_source(reward: Any, tokenizer: Any, ledger: str | Path | None = None) -> RewardSource:
    """What makes scores of a reward model, a function or a judge.

    A function is called with the prompts and the answers' texts, one of each for every answer;
    prompts are `Prompt`s, or token ids where the dataset has nothing else. It gets by name what it
    takes of `prompt_ids`, `answer_ids`, `ended` and `rows` (the dataset's).

    A judge compares the answers to a prompt with each other; an answer's score is the share of its
    comparisons that it wins, a tie counting half.

    Args:
        reward: what scores.
        tokenizer: the policy's.
        ledger: where a judge's verdicts are kept, so that a continued run asks nothing twice.

    Raises:
        TypeError: `reward` is nothing of these.
    """
    if isinstance(reward, RewardModel):
        return functools.partial(_model_scores, reward, _same_ids(reward, tokenizer))
    if isinstance(reward, Judge):
        return functools.partial(_judge_scores, reward, ledger)
    if callable(reward):
        return functools.partial(_function_scores, reward, _extras(reward))
    raise TypeError(
        f"reward must be a RewardModel, a function or a Judge, got {type(reward).__name__}."
    )


def _same_ids(reward: RewardModel, tokenizer: Any) -> bool:
    """Whether the reward model may read the policy's own token ids."""
    if reward.reads_at != "end_token":
        return False
    own = reward.tokenizer
    if own is None or tokenizer is None or own is tokenizer:
        return True
    return bool(
        own.get_vocab() == tokenizer.get_vocab() and own.chat_template == tokenizer.chat_template
    )


def _model_scores(reward: RewardModel, same_ids: bool, batch: SampledBatch) -> Scores:
    if same_ids:
        scores: Scores = list(reward.score_trees(batch.trees()).tolist())
        return scores
    prompts = batch.prompt_texts()
    answers: list[list[str]] = [[] for _ in prompts]
    for prompt, text in zip(batch.prompt_of, batch.texts, strict=True):
        answers[prompt].append(text)
    return [score for scores in reward.score(prompts, answers) for score in scores]


_EXTRAS = ("prompt_ids", "answer_ids", "ended", "rows")


def _extras(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin says nothing of what it takes
        return ()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return _EXTRAS
    return tuple(name for name in _EXTRAS if name in parameters)


def _function_scores(
    function: Callable[..., Any], extras: tuple[str, ...], batch: SampledBatch
) -> Scores:
    of = batch.prompt_of
    known: dict[str, list[Any]] = {
        "prompt_ids": [batch.prompt_ids[i] for i in of],
        "answer_ids": list(batch.answer_ids),
        "ended": list(batch.ended),
        "rows": [batch.rows[i] for i in of],
    }
    prompts = [batch.prompts[i] or batch.prompt_ids[i] for i in of]
    found = function(prompts, batch.texts, **{name: known[name] for name in extras})
    scores = found.tolist() if hasattr(found, "tolist") else list(found)
    if len(scores) != len(of):
        raise TrainingError(
            f"the reward function returned {len(scores)} scores for {len(of)} answers. It must "
            "return one for each, None where there is none."
        )
    for index, score in enumerate(scores):
        if score is not None and not math.isfinite(score):
            raise TrainingError(
                f"the reward function returned {score} for the answer {batch.texts[index]!r:.200} "
                f"(token ids {list(batch.answer_ids[index])[:20]}). Return None where there is none."
            )
    return [None if score is None else float(score) for score in scores]


def _judge_scores(judge: Judge, ledger: str | Path | None, batch: SampledBatch) -> Scores:
    prompts = batch.prompt_texts()
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(batch.prompt_of):
        groups.setdefault(prompt, []).append(index)
    comparisons, sides = [], []
    wins: list[list[float]] = [[] for _ in batch.answer_ids]
    for prompt, members in groups.items():
        candidates = {
            i: Candidate(
                prompt=prompts[prompt],
                text=batch.texts[i],
                model="policy",
                sample_index=place,
                finish_reason="stop" if batch.ended[i] else "length",
            )
            for place, i in enumerate(members)
        }
        for place, i in enumerate(members):
            for j in members[place + 1 :]:
                if batch.texts[i] == batch.texts[j]:
                    wins[i].append(0.5)  # nothing to ask
                    wins[j].append(0.5)
                    continue
                comparisons.append(Comparison(a=candidates[i], b=candidates[j]))
                sides.append((i, j))
    judged = (
        judge_comparisons(comparisons, judge, ledger=ledger, progress=False) if comparisons else []
    )
    for (i, j), verdict in zip(sides, judged, strict=True):
        grade = verdict.mean_grade  # None where the judge failed
        if grade is not None:
            share = 0.5 + 0.5 * ((grade > 0) - (grade < 0))
            wins[i].append(share)
            wins[j].append(1.0 - share)
    return [sum(won) / len(won) if won else None for won in wins]
