"""The checkable part of the house style, decided without any model: free, offline, repeatable.

`house_style_faults` lists what is wrong with one answer and what each fault weighs; `RuleJudge`
prefers the answer whose faults weigh less. It reads English surface text only. It cannot tell a true
statement from a false one, and says so wherever it is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence

import msgspec

from prefopt.judges.base import Judge
from prefopt.judges.rubric import HOUSE_STYLE
from prefopt.types import Comparison, Prompt, Verdict, Winner, content_hash


class Fault(msgspec.Struct, frozen=True):
    """One thing wrong with an answer, in words, and how much it weighs."""

    name: str
    weight: float


_PREAMBLE = re.compile(
    r"\W*(sure|certainly|of course|absolutely|definitely|totally|great|good|excellent|what a|wow"
    r"|thank|thanks|hello|hi|hey|dear user|kudos|congratulations|okay|ok|well|i'?d (be|love)"
    r"|i'?m (happy|glad|thrilled|excited|sorry|here|so)|i (can|will|would) (help|be)"
    r"|i understand|let me|let'?s|here (is|are)|here'?s|to answer|the answer (to|is|lies)"
    r"|imagine|when it comes to|in (this|today'?s) )\b",
    re.IGNORECASE,
)
_SELF_TALK = re.compile(
    r"\b(as an? (ai|language model|assistant|chatbot)|i don'?t have personal|my training"
    r"|i'?m (just )?an? (ai|language model|assistant|chatbot)|i can help)\b",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"\b(let me know|feel free|(i )?hope (this|that|it) helps|happy to help|in conclusion"
    r"|in summary|to summarize|to sum up|overall,|it'?s (important|worth|essential) (to|noting)"
    r"|it is (important|worth|essential) (to|noting)|keep in mind|remember(,| that)|don'?t hesitate"
    r"|at the end of the day|needless to say|as (i|we) mentioned)",
    re.IGNORECASE,
)
_FINISHED = re.compile(r"[.!?…][\"')\]*_”’]*$|[\"”’]$")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_STOP_WORDS = frozenset(
    [
        "a",
        "about",
        "after",
        "all",
        "also",
        "am",
        "an",
        "and",
        "any",
        "are",
        "as",
        "ask",
        "at",
        "be",
        "because",
        "been",
        "before",
        "best",
        "better",
        "but",
        "by",
        "can",
        "change",
        "could",
        "did",
        "do",
        "does",
        "doing",
        "done",
        "down",
        "each",
        "for",
        "from",
        "get",
        "give",
        "had",
        "has",
        "have",
        "having",
        "he",
        "her",
        "here",
        "him",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "just",
        "keep",
        "like",
        "make",
        "many",
        "me",
        "more",
        "most",
        "much",
        "my",
        "name",
        "need",
        "no",
        "not",
        "of",
        "off",
        "on",
        "one",
        "only",
        "or",
        "other",
        "our",
        "out",
        "over",
        "own",
        "people",
        "please",
        "quick",
        "really",
        "rewrite",
        "same",
        "she",
        "short",
        "should",
        "so",
        "some",
        "something",
        "such",
        "suggest",
        "tell",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "three",
        "through",
        "to",
        "too",
        "two",
        "under",
        "up",
        "us",
        "use",
        "very",
        "was",
        "way",
        "ways",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "why",
        "will",
        "with",
        "without",
        "word",
        "words",
        "work",
        "would",
        "write",
        "you",
        "your",
    ]
)

MIN_WORDS, SHORT_WORDS, MAX_WORDS = 3, 6, 35


def house_style_faults(prompt: Prompt, answer: str) -> list[Fault]:
    """What is wrong with `answer` under the house style, heaviest kind first.

    The weights follow the rubric's order of importance: not on the request (4 to 10), not complete
    (4), not at once (2), filler (1, 2 for repetition), not concise (1 below 6 words,
    up to 3 above 35).
    """
    text = answer.strip()
    if not text:
        return [Fault("empty", 10.0)]
    faults = []
    words = _WORD.findall(text.casefold())
    if len(words) < MIN_WORDS:
        faults.append(Fault(f"fewer than {MIN_WORDS} words", 5.0))
    elif len(words) < SHORT_WORDS:
        faults.append(Fault(f"fewer than {SHORT_WORDS} words", 1.0))
    topic = _stems(_WORD.findall(prompt.text.casefold()))
    if topic and not topic & _stems(words):
        faults.append(Fault("shares no content word with the request", 4.0))
    if not _FINISHED.search(text):
        faults.append(Fault("cut off before the end of a sentence", 4.0))
    if _PREAMBLE.match(text):
        faults.append(Fault("begins with a preamble", 2.0))
    if _restates(prompt, text):
        faults.append(Fault("restates the request", 2.0))
    if _SELF_TALK.search(text):
        faults.append(Fault("talks about the assistant", 2.0))
    if _FILLER.search(text):
        faults.append(Fault("contains a filler phrase", 1.0))
    if _repeated_share(words) > 0.1:
        faults.append(Fault("repeats itself", 2.0))
    if len(words) > MAX_WORDS:
        over = len(words) - MAX_WORDS
        faults.append(Fault(f"{over} words over {MAX_WORDS}", min(3.0, over / 10)))
    return faults


def _stems(words: list[str]) -> set[str]:
    """Content words cut to five letters, so that "boiling" meets "boiled"."""
    return {w[:5] for w in words if len(w) > 2 and w not in _STOP_WORDS}


def _restates(prompt: Prompt, text: str) -> bool:
    """Whether the answer opens by asking the request back, or holds it word for word."""
    request = prompt.text.strip().casefold()
    first = re.split(r"(?<=[.!?:\n])", text.casefold(), maxsplit=1)[0]
    asked = _stems(_WORD.findall(request))
    asks_back = first.rstrip().endswith("?") and len(asked & _stems(_WORD.findall(first))) >= 2
    return asks_back or (len(request.split()) > 4 and request.rstrip("?.!") in text.casefold())


def _repeated_share(words: list[str]) -> float:
    """The share of three-word sequences that occurred before in the same answer."""
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1.0 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


class RuleJudge(Judge):
    """Prefers the answer with the lighter faults; less than 0.5 apart is a tie.

    A difference of 3 or more is "much better" (strength 2). The order in which answers are shown
    has no influence.
    """

    name = "rules:house_style"
    rubric = HOUSE_STYLE

    def __init__(self, faults: Callable[[Prompt, str], list[Fault]] = house_style_faults) -> None:
        self._faults = faults

    @property
    def fingerprint(self) -> str:
        """Changes with the rules' patterns and weights, not only with the rubric's words."""
        patterns = [p.pattern for p in (_PREAMBLE, _SELF_TALK, _FILLER, _FINISHED)]
        return content_hash([self.name, self.rubric.rubric_hash, patterns, "weights/3"])

    def verdicts(
        self, comparisons: Sequence[Comparison]
    ) -> Generator[tuple[int, Verdict], None, None]:
        """Decide every comparison at once, in order."""
        for index, comparison in enumerate(comparisons):
            faults_a = self._faults(comparison.prompt, comparison.a.text)
            faults_b = self._faults(comparison.prompt, comparison.b.text)
            difference = sum(f.weight for f in faults_b) - sum(f.weight for f in faults_a)
            preferred: Winner = "tie"
            strength = 0
            if abs(difference) >= 0.5:
                preferred = "a" if difference > 0 else "b"
                strength = 2 if abs(difference) >= 3 else 1
            yield (
                index,
                Verdict(
                    judge=self.name,
                    preferred=preferred,
                    strength=strength,
                    rationale=f"First: {_describe(faults_a)}. Second: {_describe(faults_b)}.",
                ),
            )


def _describe(faults: list[Fault]) -> str:
    return ", ".join(f.name for f in faults) or "no fault found"
