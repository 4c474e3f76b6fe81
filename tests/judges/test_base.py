"""The judging loop: both orders, one ledger, nothing asked twice, no failure kept as an answer."""

import pytest

from prefopt.errors import DataError, JudgeError
from prefopt.judges import ScriptedJudge, judge_comparisons, longest_wins, shortest_wins
from prefopt.judges.ledger import Ledger
from prefopt.types import Candidate, Comparison, Prompt, Usage, Verdict


def comparison(a, b, prompt="Name a colour."):
    asked = Prompt.from_text(prompt)
    return Comparison(
        a=Candidate(prompt=asked, text=a, model="m", sample_index=0),
        b=Candidate(prompt=asked, text=b, model="m", sample_index=1),
    )


class Counting(ScriptedJudge):
    """A scripted judge that remembers what it was asked."""

    def __init__(self, decide):
        super().__init__(decide)
        self.asked = []

    def verdicts(self, comparisons):
        for index, verdict in super().verdicts(comparisons):
            self.asked.append((comparisons[index].a.text, comparisons[index].b.text))
            yield index, verdict


def test_a_judge_that_reads_is_consistent_and_one_that_picks_the_first_flips():
    items = [comparison("red", "a very long answer")]
    (short,) = judge_comparisons(items, shortest_wins(), progress=False)
    assert short.mean_grade == 1
    assert not short.flipped
    (long,) = judge_comparisons(items, longest_wins(), progress=False)
    assert long.mean_grade == -1
    (first,) = judge_comparisons(items, ScriptedJudge(lambda c: "a"), progress=False)
    assert first.flipped
    assert first.mean_grade == 0


def test_one_order_asks_once_and_has_no_backward_verdict():
    judge = Counting(lambda c: "a")
    (item,) = judge_comparisons([comparison("x", "y")], judge, orders="one", progress=False)
    assert judge.asked == [("x", "y")]
    assert item.backward is None
    assert item.mean_grade == 1


def test_identical_answers_are_a_tie_and_are_not_asked():
    judge = Counting(lambda c: "a")
    (item,) = judge_comparisons([comparison("same", "same")], judge, progress=False)
    assert judge.asked == []
    assert item.mean_grade == 0


def test_the_same_question_is_asked_once_however_often_it_occurs():
    judge = Counting(lambda c: "a")
    judge_comparisons([comparison("x", "y"), comparison("y", "x")], judge, progress=False)
    assert sorted(judge.asked) == [("x", "y"), ("y", "x")]


def test_a_second_run_with_the_ledger_asks_nothing(tmp_path):
    items = [comparison(f"x{i}", f"y{i}") for i in range(5)]
    first, second = Counting(lambda c: "a"), Counting(lambda c: "b")
    one = judge_comparisons(items, first, ledger=tmp_path / "l.sqlite", progress=False)
    two = judge_comparisons(items, second, ledger=tmp_path / "l.sqlite", progress=False)
    assert one == two
    assert second.asked == []


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    items = [comparison(f"x{i}", f"y{i}") for i in range(10)]
    asked = []

    def decide(c):
        asked.append((c.a.text, c.b.text))
        if len(asked) == 8:
            raise KeyboardInterrupt
        return "a"

    with pytest.raises(KeyboardInterrupt):
        judge_comparisons(items, ScriptedJudge(decide), ledger=tmp_path / "l", progress=False)
    judge_comparisons(items, ScriptedJudge(decide), ledger=tmp_path / "l", progress=False)
    assert len(asked) == 21  # 20 questions; only the one that was never answered is asked again
    assert len(set(asked)) == 20


def test_failures_are_recorded_but_asked_again(tmp_path):
    replies = iter(["refused", None, None, None])

    def decide(c):
        failure = next(replies)
        if failure:
            return Verdict(judge="scripted", failure=failure, usage=Usage(cost_usd=0.25))
        return "a"

    ledger = tmp_path / "l.sqlite"
    (before,) = judge_comparisons(
        [comparison("x", "y")], ScriptedJudge(decide), ledger=ledger, progress=False
    )
    assert before.failures == ("refused",)
    (after,) = judge_comparisons(
        [comparison("x", "y")], ScriptedJudge(decide), ledger=ledger, progress=False
    )
    assert after.failures == ()
    with Ledger(ledger) as book:
        assert book.spent_usd() == 0.25


def test_the_key_covers_the_rubric_and_the_whole_conversation(tmp_path):
    judge = Counting(lambda c: "a")
    ledger = tmp_path / "l.sqlite"
    for prompt in ("one", "two"):
        judge_comparisons([comparison("x", "y", prompt)], judge, ledger=ledger, progress=False)
    judge.name = "another"
    judge_comparisons([comparison("x", "y", "two")], judge, ledger=ledger, progress=False)
    assert len(judge.asked) == 6


def test_a_judge_that_leaves_something_out_is_an_error():
    class Lazy(ScriptedJudge):
        def verdicts(self, comparisons):
            yield from list(super().verdicts(comparisons))[:-1]

    with pytest.raises(JudgeError, match="no verdict for 1 of 2"):
        judge_comparisons([comparison("x", "y")], Lazy(lambda c: "a"), progress=False)


def test_a_ledger_that_cannot_be_opened_is_refused_before_anything_is_asked(tmp_path):
    judge = Counting(lambda c: "a")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match="ledger"):
        judge_comparisons([comparison("x", "y")], judge, ledger=tmp_path / "taken" / "l")
    assert judge.asked == []


def test_a_question_that_comes_again_while_under_way_is_waited_for_by_nobody(monkeypatch, tmp_path):
    def no_sleep(seconds):
        raise AssertionError("waited for itself")

    monkeypatch.setattr("prefopt.judges.asking.time.sleep", no_sleep)
    judge = Counting(lambda c: "a" if c.a.text == "red" else "b")
    items = [comparison("red", "blue")] * 300
    judged = judge_comparisons(items, judge, ledger=tmp_path / "ledger", progress=False)
    assert [j.mean_grade for j in judged] == [1] * 300
    assert judge.asked == [("red", "blue"), ("blue", "red")]


def test_the_bar_ends_full_whatever_needed_no_asking(capsys):
    items = [comparison("same", "same"), *[comparison("red", "blue")] * 300]
    judge_comparisons(items, ScriptedJudge(lambda c: "a"))
    last = capsys.readouterr().err.rstrip().split("\r")[-1]
    assert "100%" in last
    assert "2/2" in last
