"""What is counted in an answer, and what two answers' difference is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.evaluation.style import STYLE_FEATURES, style_difference, text_style

TEXT = """# Title
Some **bold** and __also bold__ words.

- one
* two
  3. three

```
# no header
- no item **not bold**
```
###No header
"""


def test_markdown_is_counted_outside_code() -> None:
    found = text_style(TEXT)
    assert (found.headers, found.lists, found.bold) == (1, 3, 2)
    assert found.words == len(TEXT.split())


def test_a_code_block_that_never_ends_is_code() -> None:
    assert text_style("```\n# x\n- y").headers == 0


def test_differences_by_hand() -> None:
    found = style_difference("one two three", "# one")
    assert found["length"] == pytest.approx((3 - 2) / 5)
    # The header's density is 1 / (2 + 1) in b, 0 in a.
    assert found["headers"] == pytest.approx(-(1 / 3) / (1 / 3 + 1))
    assert (found["lists"], found["bold"]) == (0, 0)


def test_empty_answers_do_not_differ() -> None:
    assert style_difference("", "") == dict.fromkeys(STYLE_FEATURES, 0.0)


_TEXTS = st.text(alphabet="ab #*-_1.\n`", max_size=60)


@given(_TEXTS, _TEXTS)
def test_a_difference_is_bounded_and_its_own_mirror_image(a: str, b: str) -> None:
    there, back = style_difference(a, b), style_difference(b, a)
    for name in STYLE_FEATURES:
        assert -1 <= there[name] <= 1
        assert there[name] == pytest.approx(-back[name])
