"""The frozen text types that flow through prefopt, one per box of the flow.

    Prompt -> Candidate -> Comparison -> JudgedComparison -> PreferenceGroup

Every type is a frozen `msgspec.Struct`: it validates on the way in, refuses unknown fields, and
carries a `schema` tag, so one line of JSONL says by itself what it is. This module knows nothing of
files, judges or tensors. Before judging, two answers are `a` and `b`; after it, chosen and rejected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "unknown"]
"""Why an answer ended: an end token, the token limit, or not known (answers from elsewhere)."""

Winner = Literal["a", "b", "tie"]

PSource = Literal["prior", "inferred", "calibrated", "human", "given"]
"""Where a probability came from; only the last three have seen a person or the data's own label."""

VerdictFailure = Literal[
    "refused",
    "truncated",
    "malformed",
    "api_error",
    "empty",
    "too_long",
    "unavailable",
    "expired",
    "canceled",
    "not_finite",
]
"""Why a judge gave no verdict. A failure is never a tie and never a zero."""

LeftOutReason = Literal[
    "tie",
    "flipped",
    "judges_disagree",
    "weak",
    "uncertain",
    "judge_failed",
    "identical_answers",
    "empty_answer",
    "not_selected",
]
"""Why a comparison became no preference."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation, as chat templates take it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Prompt(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.prompt/1",
):
    """What a model is asked: a conversation whose last turn is not the assistant's.

    `prompt_id` is derived from the messages, so the same prompt has the same id in every file.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    category: str = ""

    @classmethod
    def from_messages(
        cls, messages: Iterable[Message | Mapping[str, str]], category: str = ""
    ) -> Prompt:
        """Build a prompt from `{"role", "content"}` turns; raises ValueError when it is unusable."""
        turns = tuple(
            m if isinstance(m, Message) else msgspec.convert(m, Message) for m in messages
        )
        if not turns:
            raise ValueError("a prompt needs at least one message, got none.")
        if turns[-1].role == "assistant":
            raise ValueError(
                "a prompt must end with a user (or tool) message, got an assistant message last. "
                "Pass the assistant's turn as an answer, not as part of the prompt."
            )
        if not any(m.content.strip() for m in turns):
            raise ValueError("a prompt needs some text, got only empty messages.")
        digest = content_hash([[m.role, m.content] for m in turns])
        return cls(prompt_id=digest[:16], messages=turns, category=category)

    @classmethod
    def from_text(cls, text: str, category: str = "") -> Prompt:
        """Build a single-turn prompt: one user message holding `text`."""
        return cls.from_messages([Message("user", text)], category)

    @property
    def text(self) -> str:
        """The last message's text: what a person would recognise the prompt by."""
        return self.messages[-1].content


class Candidate(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.candidate/1",
):
    """One answer to a prompt and where it came from.

    `finish_reason == "length"` marks an answer that was cut off: training must not teach the model
    that such an answer ends there.
    """

    prompt: Prompt
    text: str
    model: str
    sample_index: int = 0
    finish_reason: FinishReason = "unknown"
    n_tokens: int | None = None

    @property
    def candidate_id(self) -> str:
        """A content hash: the same answer by the same model to the same prompt has the same id."""
        return content_hash([self.prompt.prompt_id, self.model, self.sample_index, self.text])[:16]


class Comparison(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.comparison/1",
):
    """Two answers to one prompt, in the order in which a judge is shown them first."""

    a: Candidate
    b: Candidate

    def __post_init__(self) -> None:
        if self.a.prompt.prompt_id != self.b.prompt.prompt_id:
            raise ValueError(
                "a comparison needs two answers to the same prompt, got answers to "
                f"{self.a.prompt.prompt_id} and {self.b.prompt.prompt_id}."
            )

    @property
    def prompt(self) -> Prompt:
        """The prompt both answers reply to."""
        return self.a.prompt

    @property
    def comparison_id(self) -> str:
        """A content hash that does not depend on which answer is shown first."""
        return content_hash(sorted([self.a.candidate_id, self.b.candidate_id]))[:16]

    def swapped(self) -> Comparison:
        """The same comparison shown in the other order."""
        return Comparison(a=self.b, b=self.a)


class Usage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one judgement consumed; zero cost for local judges."""

    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0


class Verdict(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.verdict/1",
):
    """What a judge said about one comparison in one order.

    Exactly one of `preferred` and `failure` is set. `strength` is 2 for "much better", 1 for
    "better", 0 for a tie. `shown_first` is the answer that the judge saw first. `p_a` is the judge's
    own probability that a is preferred, where it gives one (a local model's token probabilities); it
    is not calibrated.
    """

    judge: str
    shown_first: Literal["a", "b"] = "a"
    preferred: Winner | None = None
    strength: int = 0
    failure: VerdictFailure | None = None
    rationale: str = ""
    reply: str = ""
    p_a: float | None = None
    usage: Usage = Usage()

    def __post_init__(self) -> None:
        if (self.preferred is None) == (self.failure is None):
            raise ValueError(
                "a verdict has either a preference or a failure, got "
                f"preferred={self.preferred!r} and failure={self.failure!r}."
            )
        if not 0 <= self.strength <= 2:
            raise ValueError(f"strength must be 0, 1 or 2, got {self.strength}.")
        if self.p_a is not None and not 0.0 <= self.p_a <= 1.0:  # NaN is not either
            raise ValueError(f"p_a must be in [0, 1], got {self.p_a}.")

    @property
    def grade(self) -> int | None:
        """Signed strength in favour of a: -2 .. 2, 0 for a tie, None for a failure."""
        if self.preferred is None:
            return None
        sign = {"a": 1, "b": -1, "tie": 0}[self.preferred]
        return sign * max(self.strength, 1)

    def swapped(self) -> Verdict:
        """The same verdict with the names a and b exchanged."""
        other: dict[Winner | None, Winner | None] = {"a": "b", "b": "a"}
        return msgspec.structs.replace(
            self,
            preferred=other.get(self.preferred, self.preferred),
            shown_first="b" if self.shown_first == "a" else "a",
            p_a=None if self.p_a is None else 1.0 - self.p_a,
        )


class JudgedComparison(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.judged_comparison/1",
):
    """A comparison with its verdicts, both in the comparison's own names a and b.

    `forward` was given with a shown first, `backward` with b shown first (None when only one order
    was asked for). `more` are further verdicts, of other judges or of repeated questions.
    """

    comparison: Comparison
    forward: Verdict
    backward: Verdict | None = None
    more: tuple[Verdict, ...] = ()

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdicts that were asked for, failures included."""
        return (self.forward, *(() if self.backward is None else (self.backward,)), *self.more)

    @property
    def failures(self) -> tuple[VerdictFailure, ...]:
        """The failures among the verdicts, in order."""
        return tuple(v.failure for v in self.verdicts if v.failure is not None)

    @property
    def mean_grade(self) -> float | None:
        """The mean of the signed grades in favour of a, or None when any verdict failed."""
        grades = [v.grade for v in self.verdicts]
        if any(g is None for g in grades):
            return None
        return sum(g for g in grades if g is not None) / len(grades)

    @property
    def flipped(self) -> bool:
        """Whether two verdicts name opposite winners.

        Those of one judge do where the position decided, not the quality; see `judges_disagree`.
        """
        names = {v.preferred for v in self.verdicts}
        return names >= {"a", "b"}

    @property
    def judges_disagree(self) -> bool:
        """Whether verdicts name opposite winners though every judge agrees with itself."""
        named = {(v.judge, v.preferred) for v in self.verdicts}
        itself = any({(judge, "a"), (judge, "b")} <= named for judge, _ in named)
        return self.flipped and not itself


class Preference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One preference inside a group: answer `chosen` is preferred to answer `rejected`.

    Both are indices into the group's `answers`. `p_chosen` is the probability that the preference
    is right, with `p_source` saying where it came from: "prior" is an uncalibrated default,
    "inferred" was worked out from all verdicts of the run, "calibrated" was fitted to human labels.
    `margin` is the mean signed grade, in (0, 2].
    """

    chosen: int
    rejected: int
    p_chosen: float
    p_source: PSource = "prior"
    margin: float = 1.0


class PreferenceGroup(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.preference_group/1",
):
    """One prompt, K answers, and the preferences among them. A pair is K = 2."""

    prompt: Prompt
    answers: tuple[Candidate, ...]
    preferences: tuple[Preference, ...]

    def __post_init__(self) -> None:
        k = len(self.answers)
        for preference in self.preferences:
            pair = (preference.chosen, preference.rejected)
            if not all(0 <= index < k for index in pair) or pair[0] == pair[1]:
                raise ValueError(
                    f"a preference must name two different answers of the {k} in its group, "
                    f"got chosen={pair[0]} and rejected={pair[1]}."
                )
            if not 0.0 <= preference.p_chosen <= 1.0:
                raise ValueError(f"p_chosen must be in [0, 1], got {preference.p_chosen}.")

    def pairs(self) -> list[tuple[Candidate, Candidate, Preference]]:
        """The preferences as (chosen answer, rejected answer, preference)."""
        return [(self.answers[p.chosen], self.answers[p.rejected], p) for p in self.preferences]


class LeftOut(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.left_out/1",
):
    """A comparison that became no preference, and why. Nothing is dropped without one of these."""

    prompt_id: str
    comparison_id: str
    reason: LeftOutReason
    detail: str = ""


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable value, stable across processes and platforms."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def group_by_prompt(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates by prompt id, in order of first appearance."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.prompt.prompt_id, []).append(candidate)
    return groups
