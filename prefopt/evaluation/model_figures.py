"""What two models' answers are like, whoever finds them better: variety, refusals, distance.

In: judged comparisons with the tuned model's answer as `a`, or log-probabilities of answers. Out:
`AnswerFigures` and `PolicyShift`, with what each was taken over. Text and arithmetic only: the
log-probabilities are worked out in `prefopt.evaluation.policy_shift`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

import msgspec

from prefopt.types import JudgedComparison

REFUSAL_WORDS = 60
"""A refusal says so at once; what comes later is a caveat."""

_SORRY = (
    r"(?:i\s*(?:'m|\s+am)\s+(?:very\s+|so\s+|really\s+)?sorry|sorry|i\s+apologi[sz]e|apologies|"
    r"unfortunately)"
)
_CANNOT = (
    r"(?:i|we)\s*(?:\s+(?:can\s*not|can't|won't|will\s+not|could\s+not|couldn't|must\s+decline|"
    r"have\s+to\s+decline|refuse)|(?:'m|\s+am|'re|\s+are)\s+(?:unable|not\s+able|not\s+allowed|"
    r"not\s+comfortable|not\s+permitted|not\s+programmed|not\s+designed))"
)
# "I can't wait to tell you" refuses nothing.
_NO_FIGURE = r"(?!\s+(?:wait|believe|imagine|stress|emphasi[sz]e|thank)\b)"
_HELP = (
    r"(?:assist|help|provide|offer|give|support|answer|fulfil+|comply|complete|continue|create|"
    r"generate|write|discuss|share|do\s+that|do\s+this|engage|participate|respond|advise|"
    r"instruct|explain|tell|produce|make)"
)
# The two parts of one sentence: at most a dozen words of adverbs and objects between them.
_REFUSAL = re.compile(
    rf"^\W*(?:{_SORRY}\W+(?:[\w',-]+\s+){{0,8}}?)?{_CANNOT}\b{_NO_FIGURE}(?:\s+[\w',-]+){{0,6}}?\s+{_HELP}\b"
    rf"|^\W*{_SORRY}\b[^.!?\n]{{0,40}}\b{_CANNOT}\b"
    rf"|^\W*as\s+an?\s+(?:\w+\s+){{0,2}}?(?:ai|language\s+model|assistant)\b[^.!?\n]{{0,60}}\b"
    rf"(?:{_CANNOT}|i\s+(?:don't|do\s+not)\s+have)\b"
    rf"|^\W*(?:i\s+must\s+decline|i\s+(?:have\s+to|need\s+to)\s+(?:decline|refuse)|i\s+refuse\s+to|"
    rf"i\s*(?:'d|\s+would)\s+rather\s+not)\b",
    re.IGNORECASE,
)


class AnswerFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Figures of both sides' answers, the same prompts on both; every answer counts, judged or not.

    Fields:
        n: answers a side; n_prompts: their prompts.
        refused_before, refused_after: answers that `is_refusal` names, of n.
        refused_p: exact McNemar test that refusals are as likely before as after.
        empty_before, empty_after: answers without any word.
        distinct_1_before, ..., distinct_2_after: see `distinct_share`; None without enough words.
        n_words_compared: words a side behind the distinct shares.
    """

    n: int
    n_prompts: int
    refused_before: int
    refused_after: int
    refused_p: float
    empty_before: int
    empty_after: int
    distinct_1_before: float | None
    distinct_1_after: float | None
    distinct_2_before: float | None
    distinct_2_after: float | None
    n_words_compared: int


class Mean(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mean over prompts with its 95 % interval (Student's t over prompts' means); None for one."""

    value: float
    low: float | None
    high: float | None
    n_prompts: int


class PolicyShift(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far tuning moved the model, in nats an answer.

    Fields:
        kl: mean of log p_tuned(y|x) - log p_base(y|x) over the tuned model's own answers y: the k1
            estimate of KL(tuned || base) where those were drawn at temperature 1 with nothing cut
            off; elsewhere the same mean over the answers that users see.
        kl_per_token: the sum of those log-ratios over the number of their tokens.
        on_base_answers: the same mean over the base model's answers; below 0 where tuning turned
            away from them. None where that was not measured.
        beta: of DPO or PPO, by which log-ratios become rewards; None where it is not known.
        sampled: how the answers were sampled, in words; empty where it is not known.
        n_answers: answers a side, n_too_long of them left out for lack of context.
    """

    kl: Mean
    kl_per_token: float
    on_base_answers: Mean | None
    beta: float | None
    sampled: str
    n_answers: int
    n_too_long: int

    @property
    def reward(self) -> float | None:
        """Mean implicit reward of the tuned model's answers, beta · log-ratio; None without beta."""
        return None if self.beta is None else self.beta * self.kl.value

    @property
    def reward_on_base_answers(self) -> float | None:
        """The same of the base model's answers."""
        if self.beta is None or self.on_base_answers is None:
            return None
        return self.beta * self.on_base_answers.value


class FrontierPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model in the picture of reward against KL: nats an answer, win rate over the base."""

    name: str
    kl: Mean
    win_rate: float
    low: float
    high: float


def is_refusal(text: str) -> bool:
    """Whether an answer begins by refusing, by a rule for English that anyone can check.

    Within its first `REFUSAL_WORDS` words' first sentence it says in the first person that it cannot,
    will not or may not help, provide, answer or the like ("I'm sorry, but I can't assist with that",
    "As an AI language model, I cannot ...", "I must decline"). An answer that helps and warns later is
    none, neither is an empty one.
    """
    start = " ".join(text.replace("\u2019", "'").split()[:REFUSAL_WORDS])
    return _REFUSAL.search(start) is not None


def distinct_share(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words over all n-grams (distinct-n; Li et al. 2016, arXiv 1510.03055).

    Words are lower-cased and split at white space; n-grams do not cross texts. It falls with the
    amount of text, so only sides of equal length can be compared. None where no text has n words.
    """
    total, seen = 0, set()
    for text in texts:
        words = text.lower().split()
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        total += len(grams)
        seen.update(grams)
    return len(seen) / total if total else None


def answer_figures(judged: Sequence[JudgedComparison]) -> AnswerFigures:
    """Refusals and variety of both sides.

    For the distinct shares each pair of answers is cut to the length of the shorter one.

    Raises:
        ValueError: no comparisons.
    """
    from prefopt.evaluation.capability_report import mcnemar_p

    if not judged:
        raise ValueError("figures of answers need at least one comparison, got none.")
    after = [j.comparison.a.text for j in judged]
    before = [j.comparison.b.text for j in judged]
    refused_after, refused_before = ([is_refusal(t) for t in side] for side in (after, before))
    differ = list(zip(refused_before, refused_after, strict=True))
    cut_before, cut_after, n_words = [], [], 0
    for x, y in zip(before, after, strict=True):
        words_x, words_y = x.split(), y.split()
        length = min(len(words_x), len(words_y))
        cut_before.append(" ".join(words_x[:length]))
        cut_after.append(" ".join(words_y[:length]))
        n_words += length
    return AnswerFigures(
        n=len(judged),
        n_prompts=len({j.comparison.prompt.prompt_id for j in judged}),
        refused_before=sum(refused_before),
        refused_after=sum(refused_after),
        refused_p=mcnemar_p(differ.count((False, True)), differ.count((True, False))),
        empty_before=sum(not t.strip() for t in before),
        empty_after=sum(not t.strip() for t in after),
        distinct_1_before=distinct_share(cut_before, 1),
        distinct_1_after=distinct_share(cut_after, 1),
        distinct_2_before=distinct_share(cut_before, 2),
        distinct_2_after=distinct_share(cut_after, 2),
        n_words_compared=n_words,
    )


def mean_over_prompts(values: Sequence[float], prompt_ids: Sequence[str]) -> Mean:
    """The mean of the prompts' means.

    Raises:
        ValueError: no values, or not one prompt a value.
    """
    import numpy as np

    from prefopt.evaluation.logistic import interval

    if not values or len(values) != len(prompt_ids):
        raise ValueError(
            f"a mean needs values and a prompt for each, got {len(values)} and {len(prompt_ids)}."
        )
    by_prompt: dict[str, list[float]] = {}
    for value, prompt_id in zip(values, prompt_ids, strict=True):
        by_prompt.setdefault(prompt_id, []).append(value)
    means = np.array([fmean(v) for v in by_prompt.values()])
    mean, n = float(means.mean()), len(means)
    if n < 2:
        return Mean(value=mean, low=None, high=None, n_prompts=n)
    low, high = interval(mean, float(means.std(ddof=1) / np.sqrt(n)), n)
    return Mean(value=mean, low=low, high=high, n_prompts=n)
