"""A judge that changes half way is told; one that does not, is not."""

import random

import pytest

from prefopt.judges import judge_comparisons
from prefopt.judges.anthropic import AnthropicJudge
from prefopt.judges.drift import change_point, drift_findings
from prefopt.judges.label_report import label_report
from prefopt.judges.ledger import Ledger
from prefopt.judges.rubric import HOUSE_STYLE
from prefopt.preferences import build_preferences
from prefopt.testing import FakeAnthropic, prefer_by_hash, prefer_first, verdict_reply
from prefopt.types import Candidate, Comparison, Prompt


def comparisons(n=60):
    made = []
    for i in range(n):
        prompt = Prompt.from_text(f"Question {i}?")
        a, b = (Candidate(prompt=prompt, text=f"answer {i} {x}", model="m") for x in "ab")
        made.append(Comparison(a=a, b=b))
    return made


def judged_by(answer, ledger):
    fake = FakeAnthropic(answer)
    judge = AnthropicJudge(
        "claude-opus-4-6", max_usd=10.0, client=fake.client(), concurrency=4, transport="sync"
    )
    return judge_comparisons(comparisons(), judge, ledger=ledger, progress=False)


def changing(before, after, at=60):
    n = 0

    def answer(params):
        nonlocal n
        n += 1
        return (before if n <= at else after)(params)

    return answer


def other_model(params):
    return {"text": prefer_by_hash(params), "model": "claude-other-1"}


def test_a_judge_that_stays_the_same_gives_no_finding(tmp_path):
    judged_by(prefer_by_hash, tmp_path / "l")
    with Ledger(tmp_path / "l") as book:
        assert drift_findings(book) == ()


def test_one_that_begins_to_take_the_first_is_told_in_the_label_report(tmp_path):
    judged = judged_by(changing(prefer_by_hash, prefer_first), tmp_path / "l")
    with Ledger(tmp_path / "l") as book:
        report = label_report(
            judged,
            judge="j",
            rubric=HOUSE_STYLE,
            preferences=build_preferences(judged),
            ledger=book,
        )
    (told,) = [w for w in report.warnings if "name the answer shown first" in w]
    assert "changed while it was asked" in told
    assert "100% of the 60 since" in told
    assert "changed while it was asked" in " ".join(report.to_text().split())


def test_pairs_of_another_kind_are_no_change_of_the_judge(tmp_path):
    """Ties among the later pairs, as after training: told of a job of one kind, not of a whole run."""
    judged_by(changing(prefer_by_hash, lambda _: verdict_reply("tie", "Alike.")), tmp_path / "l")
    with Ledger(tmp_path / "l") as book:
        (told,) = drift_findings(book)
        assert "are ties" in told
        assert drift_findings(book, one_kind=False) == ()


def test_another_model_behind_the_name_is_told(tmp_path):
    judged_by(changing(prefer_by_hash, other_model), tmp_path / "l")
    with Ledger(tmp_path / "l") as book:
        (told,) = drift_findings(book)
    assert "claude-opus-4-6 (60 verdicts" in told
    assert "then claude-other-1 (60 verdicts" in told


@pytest.mark.parametrize("n", [0, 1, 39, 100, 1000])
def test_of_chance_alone_hardly_anything_is_found(n):
    rng = random.Random(n)
    found = [change_point([rng.random() < 0.5 for _ in range(n)]) for _ in range(200)]
    assert sum(f is not None for f in found) <= 1


def test_a_real_change_is_found_near_its_place():
    rng = random.Random(0)
    values = [rng.random() < (0.5 if i < 300 else 0.75) for i in range(500)]
    assert abs(change_point(values) - 300) <= 50
    assert change_point([True] * 100) is None
    assert change_point([False] * 50 + [True] * 50) == 50
