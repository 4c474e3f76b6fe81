"""Evaluating answer files: all of them, or until the result is sure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.data.records import read_records, write_records
from prefopt.evaluation.evaluate import evaluate_answers
from prefopt.judges.scripted import shortest_wins
from prefopt.types import Candidate, JudgedComparison, Prompt


def sides(n: int) -> tuple[list[Candidate], list[Candidate]]:
    """The tuned answers are shorter by one to three words."""
    prompts = [Prompt.from_text(f"Question {i}") for i in range(n)]
    tuned = [Candidate(prompt=p, text="word " * 3, model="tuned") for p in prompts]
    base = [
        Candidate(prompt=p, text="word " * (4 + i % 3), model="base") for i, p in enumerate(prompts)
    ]
    return tuned, base


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped")
    evaluate_answers(*sides(120), out, judge=shortest_wins(), progress=False, stop="decided")
    return out


def test_stopping_judges_part_and_says_so(stopped: Path) -> None:
    judged = read_records(stopped / "judged.jsonl", JudgedComparison)
    report = json.loads((stopped / "report.json").read_text())
    stopping = report["stopping"]
    assert stopping["decision"] == "better"
    assert len(judged) == 120 - stopping["n_not_asked"] < 60
    assert report["win_rate"]["stopped_low"] == stopping["low"] > 0.5
    assert f"{len(judged)} of 120 prompts" in (stopped / "report.md").read_text()
    assert f"{len(judged)} of 120 prompts" in (stopped / "report.html").read_text()


def test_without_stopping_all_is_judged_and_the_figure_at_equal_length_is_there(tmp_path) -> None:
    report = evaluate_answers(*sides(60), tmp_path, judge=shortest_wins(), progress=False)
    assert report.stopping is None
    assert report.win_rate.n == 60
    assert report.length_control is not None
    assert report.length_control.win_rate is None  # it won every comparison


def test_the_command_takes_the_same_option(tmp_path, capsys) -> None:
    for name, side in zip(("tuned", "base"), sides(90), strict=True):
        write_records(tmp_path / f"{name}.jsonl", side)
    done = main(
        ["evaluate", "--tuned_answers", str(tmp_path / "tuned.jsonl"), "--base_answers",
         str(tmp_path / "base.jsonl"), "--judge", "scripted:shortest", "--stop", "decided",
         "--out", str(tmp_path / "report")]
    )  # fmt: skip
    assert done == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["stopping"]["n_not_asked"] > 0
