"""Inputs: changes of known ones, from a seeded random generator alone, and trees for hypothesis."""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import strategies as st

_WORDS = (
    b'"', b"{", b"}", b"[", b"]", b":", b",", b"null", b"NaN", b"1e999", b"-0", b"true", b"\\ud800",
    b"\\u0000", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\xe2\x80\xa8",
    b"\xf0\x9f\x98\x80",
    b"9" * 25, b"9" * 4400, b"[" * 600, b'{"a":' * 600, b"prompt", b"chosen", b"rejected", b"messages",
    b"role", b"content", b"assistant", b"schema", b"prefopt.prompt/1", b"verdict", b"rationale",
    b"first",
    b"../../", b"<script>", b"```", b"\x1f", b"&a", b"*a", b"<<: ", b"!!python/name:os.system", b"{{",
    b"%}",
    b"<|im_end|>", b"@http://", b"\xed\xa0\x80",
)  # fmt: skip


_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 1e308, float("nan"), "", "x", "\ud800", "a\x00b", [], {}, [[]], [None],
    "user",
    "assistant", "first", "tie", "A", 0.5, "../../x", {"a": 1}, ["a", 1], "2020-01-01", "x" * 300,
)  # fmt: skip


def changed(seed: bytes, others: tuple[bytes, ...], draw: random.Random) -> bytes:
    """A seed with one to five changes.

    Where it is JSON, half of the time of a value or a name in it, so that it stays JSON; else bytes,
    words, parts doubled, dropped or taken from another.
    """
    if draw.random() < 0.5:
        try:
            tree = json.loads(seed)
        except (ValueError, RecursionError):
            pass
        else:
            for _ in range(draw.choice((1, 1, 2, 3))):
                tree = _changed_tree(tree, draw)
            return json.dumps(tree).encode()
    data = bytearray(seed)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 5))):
        at = draw.randrange(len(data) + 1)
        to = min(len(data), at + draw.choice((1, 1, 2, 4, 16, 64)))
        kind = draw.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] = draw.randrange(256)
        elif kind == 1:
            data[at:at] = draw.choice(_WORDS)
        elif kind == 2:
            data[at:to] = draw.choice(_WORDS)
        elif kind == 3:
            del data[at:to]
        elif kind == 4:
            data[at:at] = data[at:to] * draw.choice((1, 2, 50))
        elif kind == 5 and others:
            other = draw.choice(others)
            begin = draw.randrange(len(other) + 1)
            data[at:to] = other[begin : begin + draw.choice((4, 16, 64, 256))]
        elif kind == 6:
            del data[at:]
        if len(data) > 4_000:
            del data[4_000:]
    return bytes(data)


def _changed_tree(tree: Any, draw: random.Random) -> Any:
    """The same tree with one value replaced, dropped, doubled or renamed."""
    if not isinstance(tree, dict | list) or not tree or draw.random() < 0.1:
        return draw.choice(_VALUES)
    if isinstance(tree, list):
        at = draw.randrange(len(tree))
        kind = draw.random()
        if kind < 0.1:
            return tree[:at] + tree[at + 1 :]
        if kind < 0.2:
            return tree[: at + 1] + tree[at:]
        return [_changed_tree(x, draw) if i == at else x for i, x in enumerate(tree)]
    name = draw.choice(list(tree))
    kind = draw.random()
    if kind < 0.1:
        return {key: value for key, value in tree.items() if key != name}
    if kind < 0.2:
        other = draw.choice(("prompt", "x", "schema", "content", "", name.upper()))
        return {other if key == name else key: value for key, value in tree.items()}
    return {key: _changed_tree(x, draw) if key == name else x for key, x in tree.items()}


_NAMES = st.sampled_from(
    [
        "prompt",
        "chosen",
        "rejected",
        "messages",
        "role",
        "content",
        "category",
        "schema",
        "text",
        "completion",
        "verdict",
        "rationale",
        "p_chosen",
        "margin",
        "label",
        "response_a",
        "response_b",
        "annotators",
        "instruction",
        "prompt_id",
        "answers",
        "preferences",
        "model",
        "dpo",
        "lora",
        "r",
        "lora_alpha",
        "seed",
        "stages",
        "versions",
        "out",
    ]
)
_LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), _NAMES,
    st.sampled_from(["user", "assistant", "first", "tie", "A", "prefopt.prompt/1"]),
    st.just("prefopt.candidate/1"),
)  # fmt: skip
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_NAMES, inner, max_size=6),
    max_leaves=12,
)

INPUTS: st.SearchStrategy[bytes] = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")),
    _TREES.map(lambda tree: json.dumps(tree).encode()),
    st.lists(_TREES, max_size=3).map(
        lambda rows: b"\n".join(json.dumps(row).encode() for row in rows)
    ),
)
"""For hypothesis: bytes, texts, and JSON of the names that the parsers know."""
