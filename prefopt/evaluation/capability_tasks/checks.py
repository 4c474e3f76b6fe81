"""Whether an answer has the form that was asked for: code decides, as in IFEval.

In: an item of format.jsonl with the name of a check and its argument, and the model's answer. Out: 1
or 0. Zhou et al. 2023 (arXiv:2311.07911) had the idea; prompts and checks here are prefopt's own. An
answer without a word fulfils nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_BULLET = re.compile(r"^\s*[-*•]\s+\S")
_NUMBERED = re.compile(r"^\s*\d+[.)]\s+\S")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """What lm-eval calls with one item and the model's answer."""
    return {"followed": float(follows(doc["kind"], doc["argument"], results[0]))}


def follows(check: str, argument: str, answer: str) -> bool:
    """Whether `answer` passes the named check; `argument` is a text, or JSON for lists and numbers.

    Raises:
        KeyError: no such check.
    """
    text = answer.strip()
    return bool(re.search(r"\w", text)) and CHECKS[check](text, argument)


def words(text: str) -> list[str]:
    """Words without the punctuation around them."""
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _is_json_with(text: str, argument: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(json.loads(argument)) <= set(value)


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "upper_case": lambda t, _: t == t.upper() and t != t.lower(),
    "lower_case": lambda t, _: t == t.lower() and t != t.upper(),
    "starts_with": lambda t, a: t.lower().startswith(a.lower()),
    "ends_with": lambda t, a: t.lower().rstrip(" .!?\"'*").endswith(a.lower().rstrip(" .!?")),
    "contains": lambda t, a: all(
        re.search(rf"\b{re.escape(word)}\b", t, re.IGNORECASE) for word in json.loads(a)
    ),
    "avoids": lambda t, a: a.lower() not in t.lower(),
    "bullets": lambda t, a: sum(bool(_BULLET.match(line)) for line in _lines(t)) == int(a),
    "numbered": lambda t, a: sum(bool(_NUMBERED.match(line)) for line in _lines(t)) == int(a),
    "comma_list": lambda t, a: (
        len(_lines(t)) == 1 and len([p for p in t.split(",") if p.strip()]) == int(a)
    ),
    "json_object": _is_json_with,
    "one_word": lambda t, _: len(words(t)) == 1,
    "at_most_words": lambda t, a: len(words(t)) <= int(a),
    "one_sentence": lambda t, _: len(_SENTENCE_END.findall(t)) == 1 and len(words(t)) >= 3,
    "quoted": lambda t, _: len(t) > 2 and t[0] in '"“' and t[-1] in '"”',
    "yes_or_no": lambda t, _: [w.lower() for w in words(t)] in (["yes"], ["no"]),
    "question": lambda t, _: t.endswith("?"),
    "number_only": lambda t, _: bool(re.fullmatch(r"-?\d[\d,.]*", t)),
}
"""Every check by name; each gets the stripped answer, which has a word in it, and the argument."""
