"""People's labels: pairs to label, labels found again, the judge held against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import DataError
from prefopt.evaluation.human_labels import check_against_people, write_to_label
from prefopt.types import (
    Candidate,
    Comparison,
    JudgedComparison,
    Message,
    Prompt,
    Verdict,
)
from tests.evaluation.judgements import scored

NASTY = '<script>"quoted"\u2028 \\ \U0001f600</script>'


def evaluation(n: int = 40) -> list[JudgedComparison]:
    """The judge prefers the tuned answer on even prompts."""
    return [
        scored(float(i % 2 == 0), prompt=f"q{i}", text_a=f"tuned {i} {NASTY}", text_b=f"base {i}")
        for i in range(n)
    ]


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def fill(path: Path, label: str) -> list[dict[str, Any]]:
    """Label every pair in favour of one side, whichever place it stands in."""
    rows = written(path)
    for row in rows:
        first_is_wanted = row["response_a"].startswith(label)
        row["label"] = "A" if first_is_wanted else "B"
    return rows


def test_pairs_to_label_are_blind_random_and_found_again(tmp_path: Path) -> None:
    judged, path = evaluation(), tmp_path / "to_label.jsonl"
    assert write_to_label([j.comparison for j in judged], path, n=20) == 20
    rows = written(path)
    assert {tuple(row) for row in rows} == {("prompt", "response_a", "response_b", "label")}
    assert len({row["prompt"] for row in rows}) == 20
    first = [row["response_a"].startswith("tuned") for row in rows]
    assert 3 < sum(first) < 17  # neither side always stands first
    check = check_against_people(judged, fill(path, "tuned"))
    assert check.agreement.n == 20
    assert check.people_rate == 1.0
    assert (check.n_not_labelled, check.n_elsewhere) == (0, 0)
    # The judge prefers the tuned answer half of the time, people always.
    assert check.corrected is not None
    assert check.corrected.win_rate > 0.8 > check.corrected.judge_only
    shown = [i for i, row in enumerate(rows) if int(row["prompt"][1:]) % 2 == 0]
    assert check.agreement.accuracy is not None
    assert check.agreement.accuracy.value == pytest.approx(len(shown) / 20)


def test_rows_without_a_label_are_counted_and_others_used(tmp_path: Path) -> None:
    judged, path = evaluation(), tmp_path / "to_label.jsonl"
    write_to_label([j.comparison for j in judged], path, n=10)
    rows = fill(path, "base")
    rows[0]["label"] = rows[1]["label"] = " "
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = check_against_people(judged, path)
    assert (check.agreement.n, check.n_not_labelled) == (8, 2)
    assert check.people_rate == 0.0


def test_conversations_and_tied_labels_are_found_again(tmp_path: Path) -> None:
    prompt = Prompt.from_messages(
        [Message("system", "Be brief."), Message("user", "One?"), Message("assistant", "1"),
         Message("user", "Two?")]
    )  # fmt: skip
    verdict = Verdict(judge="j", preferred="a", strength=1)
    talk = JudgedComparison(
        comparison=Comparison(
            a=Candidate(prompt=prompt, text="2", model="t"),
            b=Candidate(prompt=prompt, text="two", model="b"),
        ),
        forward=verdict,
        backward=verdict,
    )
    judged, path = [talk, *evaluation(3)], tmp_path / "l.jsonl"
    assert write_to_label([j.comparison for j in judged], path, n=9) == 4  # no more prompts
    rows = written(path)
    for row in rows:
        row["label"] = "tie"
    check = check_against_people(judged, rows)
    assert check.agreement.n == 4
    assert check.people_rate == 0.5
    assert check.corrected is None  # nothing is left to correct
    assert "one other" in check.why_not


def test_equal_answers_are_not_given_to_people(tmp_path: Path) -> None:
    same = [scored(0.5, text_a="x", text_b="x").comparison]
    assert write_to_label(same, tmp_path / "l.jsonl", n=1) == 0
    with pytest.raises(ValueError, match="at least 1"):
        write_to_label(same, tmp_path / "other.jsonl", n=0)


def test_a_file_with_labels_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text("people's work")
    with pytest.raises(DataError, match="may hold labels"):
        write_to_label([j.comparison for j in evaluation()], path, n=5)
    assert path.read_text() == "people's work"


ROW = {"prompt": "q1", "response_a": f"tuned 1 {NASTY}", "response_b": "base 1", "label": "A"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{**ROW, "label": ""}], "none of the 1 rows has a label"),
        ([{**ROW, "label": "maybe"}], "expected A, B or tie"),
        ([{**ROW, "response_b": "base 2"}], "none of its 1 labels"),
        ([ROW, {**ROW, "label": "B"}], "two different labels"),
        ([{"prompt": "q1", "label": "A"}], "expected response_a and response_b"),
    ],
)
def test_labels_that_cannot_be_used_are_named(rows: list[dict[str, str]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_against_people(evaluation(), rows)


def test_a_pair_labelled_the_same_way_twice_counts_once() -> None:
    other = {**ROW, "response_a": ROW["response_b"], "response_b": ROW["response_a"], "label": "B"}
    check = check_against_people(evaluation(), [ROW, other])
    assert check.agreement.n == 1
    assert check.people_rate == 1.0
