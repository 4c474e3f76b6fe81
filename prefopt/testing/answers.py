"""What a stand-in for a judge model says: texts of replies, and rules that need no model.

In: the body of a request made by `AnthropicJudge`. Out: the text of the reply. It knows the wording
of such a request, and nothing of how it came or how the reply is sent.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Answer = Callable[[dict[str, Any]], "str | Mapping[str, Any]"]
"""From the request's body to the text of the reply, or to fields of the message that replace the
default ones; "text" among them stands for the text block."""

_CODE = re.compile(r"The code of this message is (\w+)\.")


def verdict_reply(verdict: str, rationale: str = "It follows the rubric better.") -> str:
    """The text of a well-formed judge's reply: "first_much", "first", "tie", "second", ..."""
    return json.dumps({"rationale": rationale, "verdict": verdict})


def shown_responses(params: Mapping[str, Any]) -> tuple[str, str]:
    """The texts of response_1 and response_2 in a request made by `AnthropicJudge`.

    Raises:
        ValueError: the request shows no such responses, or shows them ambiguously.
    """
    content = params["messages"][-1]["content"]
    code = _CODE.match(content)
    first, second = (
        _fenced(f"\n{content}\n", f"{name}-{code[1]}" if code else name)
        for name in ("response_1", "response_2")
    )
    return first, second


def _fenced(content: str, tag: str) -> str:
    opening, closing = f"\n<{tag}>\n", f"\n</{tag}>\n"
    start = content.find(opening) + len(opening)
    end = content.find(closing, start - 1)
    found = min(content.count(opening), content.count(closing))
    if found != 1 or content.count(opening) != 1 or end < start:
        raise ValueError(f"expected one <{tag}> in the request, found {found}.")
    return content[start:end]


def without_fence_code(content: str) -> str:
    """A judge's message without the code that differs from one judge object to the next."""
    code = _CODE.match(content)
    return content.replace(code[1], "") if code else content


# --- Rules --------------------------------------------------------------------------------------


def prefer_longer(params: Mapping[str, Any]) -> str:
    """Prefers the response with more characters: "much" from twice as many, a tie at as many."""
    first, second = (len(text) for text in shown_responses(params))
    return _verdict_by_size(first, second, f"{first} characters against {second}.")


def prefer_shorter(params: Mapping[str, Any]) -> str:
    """Prefers the response with fewer characters: "much" at half as many, a tie at as many."""
    first, second = (len(text) for text in shown_responses(params))
    return _verdict_by_size(second, first, f"{first} characters against {second}.")


def prefer_first(params: Mapping[str, Any]) -> str:
    """Prefers the response shown first, whatever it says: a judge that has only a position bias."""
    shown_responses(params)
    return verdict_reply("first", "It comes first.")


def prefer_by_hash(params: Mapping[str, Any]) -> str:
    """Prefers the response whose SHA-256 is greater: arbitrary, but the same in either order."""
    first, second = (
        int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])
        for text in shown_responses(params)
    )
    return _verdict_by_size(first, second, f"{first:x} against {second:x}.")


def _verdict_by_size(first: int, second: int, rationale: str) -> str:
    if first == second:
        return verdict_reply("tie", rationale)
    winner = "first" if first > second else "second"
    much = max(first, second) >= 2 * min(first, second)
    return verdict_reply(f"{winner}_much" if much else winner, rationale)


ANSWERS: dict[str, Answer] = {
    "longer": prefer_longer,
    "shorter": prefer_shorter,
    "first": prefer_first,
    "hash": prefer_by_hash,
}
"""The rules by name, as `python -m prefopt.testing.serve --answer` takes them."""
