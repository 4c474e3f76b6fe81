"""The ledger: one answer a question, one process a question, one limit for all of them."""

import multiprocessing
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.errors import DataError
from prefopt.judges.ledger import Attempt, Ledger, Question
from prefopt.types import Usage, Verdict


def question(key="k", shown="shown"):
    return Question(key, "c", shown)


def said(preferred="a", cost_usd=0.0):
    return Verdict(judge="j", preferred=preferred, strength=1, usage=Usage(cost_usd=cost_usd))


def paid(cost_usd):
    return Attempt(outcome="answered", cost_usd=cost_usd)


FAILED = Verdict(judge="j", failure="refused")


def test_a_question_is_claimed_once_and_answered_once(tmp_path):
    with Ledger(tmp_path / "l") as one, Ledger(tmp_path / "l") as two:
        assert one.claim(question(), "j") == "claimed"
        assert two.claim(question(), "j") == "taken"
        assert one.claim(question(), "j") == "ours"
        one.record("k", "j", said(), [])
        assert two.claim(question(), "j") == "answered"
        assert two.verdicts(["k"]) == {"k": said()}


def test_a_failure_is_kept_but_answers_nothing(tmp_path):
    with Ledger(tmp_path / "l") as one:
        one.claim(question(), "j")
        one.record("k", "j", FAILED, [])
        assert one.verdicts(["k"]) == {}
        assert one.outcomes(["k"]) == {"k": FAILED}
        assert one.failed_here(["k"]) == {"k"}
    with Ledger(tmp_path / "l") as two:
        assert two.outcomes(["k"]) == {}  # another process's failure is no outcome of this one
        assert two.claim(question(), "j") == "claimed"


def test_the_same_result_read_twice_counts_once(tmp_path):
    with Ledger(tmp_path / "l") as book:
        for _ in range(2):
            book.record("k", "j", said(), [paid(0.25)])
        assert book.spent_usd() == 0.25
        assert book.count("SELECT COUNT(*) FROM verdicts") == [(1,)]


def test_the_limit_holds_for_all_processes_together(tmp_path):
    with Ledger(tmp_path / "l") as one, Ledger(tmp_path / "l") as two:
        assert one.claim(question("a"), "j", worst_usd=0.6, max_usd=1.0) == "claimed"
        assert two.claim(question("b"), "j", worst_usd=0.6, max_usd=1.0) == "no_money"
        one.record("a", "j", said(), [paid(0.3)])
        assert two.claim(question("b"), "j", worst_usd=0.6, max_usd=1.0) == "claimed"
        assert two.money() == pytest.approx((0.3, 0.0, 0.6))
        assert not one.fits(0.2, 1.0)


def test_a_failed_try_gives_its_money_back_and_the_next_needs_its_own(tmp_path):
    with Ledger(tmp_path / "l") as book:
        book.claim(question(), "j", worst_usd=0.5, max_usd=1.0)
        book.attempt("k", Attempt(outcome="failed", cost_usd=None, unknown_usd=0.5))
        assert book.money() == pytest.approx((0.0, 0.5, 0.0))
        assert not book.reserve("k", 0.6, 1.0)
        assert book.reserve("k", 0.5, 1.0)


def hold(path, ready, kill):
    book = Ledger(path)
    book.claim(question("dead"), "j", worst_usd=0.5)
    ready.set()
    kill.wait()


def test_the_questions_of_a_killed_process_are_free_again_and_their_money_is_not_forgotten(
    tmp_path,
):
    context = multiprocessing.get_context("spawn")
    ready, kill = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "l", ready, kill))
    process.start()
    assert ready.wait(60)
    with Ledger(tmp_path / "l") as book:
        assert book.claim(question("dead"), "j") == "taken"
        assert book.bury_the_dead() == 0
        process.kill()
        process.join()
        assert book.bury_the_dead() == 1
        assert book.claim(question("dead"), "j") == "claimed"
        assert book.money().unknown_usd == 0.5
        assert book.count("SELECT outcome FROM attempts") == [("lost",)]
    process.close()
    assert [p.name for p in tmp_path.iterdir()] == ["l"]  # no sign of life is left behind


def test_closing_gives_back_what_is_under_way(tmp_path):
    with Ledger(tmp_path / "l") as book:
        book.claim(question("a"), "j", worst_usd=0.5)
        book.claim(question("b"), "j")
    with Ledger(tmp_path / "l") as book:
        assert book.money() == pytest.approx((0.0, 0.5, 0.0))  # it may have been sent
        assert book.claim(question("a"), "j") == "claimed"
        assert book.claim(question("b"), "j") == "claimed"


def test_a_damaged_verdict_is_told_and_asked_again(tmp_path, caplog):
    path = tmp_path / "l"
    with Ledger(path) as book:
        for key in ("good", "bad"):
            book.record(key, "j", said("a"), [paid(0.25)])
    raw = sqlite3.connect(path)
    text = raw.execute("SELECT verdict FROM verdicts WHERE key = 'bad'").fetchone()[0]
    assert '"preferred":"a"' in text
    changed = text.replace('"preferred":"a"', '"preferred":"b"')
    raw.execute("UPDATE verdicts SET verdict = ? WHERE key = 'bad'", (changed,))
    raw.commit()
    raw.close()
    with Ledger(path) as book:
        assert book.check() == 1
        assert "1 verdict(s)" in caplog.text
        assert str(path) in caplog.text
        assert book.verdicts(["good", "bad"]) == {"good": said("a")}
        assert book.claim(question("bad"), "j") == "claimed"
        book.record("bad", "j", said("a"), [paid(0.25)])
        assert book.check() == 0
        assert book.verdicts(["bad"]) == {"bad": said("a")}
        assert book.spent_usd() == 0.75


def test_a_ledger_with_broken_pages_is_told_with_a_way_out(tmp_path):
    path = tmp_path / "l"
    with Ledger(path) as book:
        for i in range(200):
            book.record(f"k{i}", "j", said(), [paid(0.1)])
    content = bytearray(path.read_bytes())
    for at in range(4096, len(content), 4096):
        content[at : at + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(DataError, match="move it away") as error, Ledger(path) as book:
        book.check()
    assert str(path) in str(error.value)


def test_a_ledger_of_the_version_before_goes_on(tmp_path):
    path = tmp_path / "l"
    with Ledger(path) as book:
        book.record("k", "j", said(), [paid(0.25)])
    raw = sqlite3.connect(path)
    raw.execute("ALTER TABLE verdicts DROP COLUMN checksum")
    raw.execute("ALTER TABLE attempts DROP COLUMN model")
    raw.execute("PRAGMA user_version = 2")
    raw.commit()
    raw.close()
    with Ledger(path) as book:
        assert book.check() == 0
        assert book.verdicts(["k"]) == {"k": said()}
        book.record("k2", "j", said(), [paid(0.25)])
    with Ledger(path) as book:
        assert book.check() == 0
        assert set(book.verdicts(["k", "k2"])) == {"k", "k2"}


def test_a_new_ledger_is_never_an_empty_file(tmp_path):
    book = Ledger(tmp_path / "l")
    assert (tmp_path / "l").stat().st_size > 0  # before it is closed, as after a kill
    book.close()


def test_everything_about_a_question_can_be_looked_up(tmp_path):
    with Ledger(tmp_path / "l") as book:
        book.claim(question("k"), "j")
        attempt = Attempt(
            outcome="answered", request="what was shown", reply="{}",
            request_id="req_1", stop_reason="end_turn",
            input_tokens=7, output_tokens=3, cost_usd=0.1,
        )  # fmt: skip
        book.record("k", "j", said(), [attempt])
    db = sqlite3.connect(tmp_path / "l")
    row = db.execute(
        "SELECT request, reply, request_id, input_tokens, cost_usd FROM attempts"
    ).fetchone()
    db.close()
    assert row == ("what was shown", "{}", "req_1", 7, 0.1)


@pytest.mark.parametrize("kind", ["folder", "text", "other"])
def test_a_file_that_is_no_ledger_is_refused_untouched(tmp_path, kind):
    path = tmp_path / "l"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("not a database at all, " * 100)
    else:
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE mine (x)")
        db.commit()
        db.close()
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(DataError, match=r"ledger|database"):
        Ledger(path)
    assert before is None or path.read_bytes() == before


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["ok", "fail", "lost", "drop"])),
        max_size=25,
    )
)
def test_whatever_happens_the_money_adds_up(events):
    with Ledger(None) as book:
        spent = unknown = 0.0
        done = set()
        for key, event in events:
            claimed = book.claim(question(key), "j", worst_usd=0.5, max_usd=100.0)
            assert (claimed == "answered") == (key in done)
            if claimed != "claimed":
                continue
            if event == "ok":
                book.record(key, "j", said(), [paid(0.1)])
                spent += 0.1
                done.add(key)
            elif event == "fail":
                book.record(key, "j", FAILED, [paid(0.2)])
                spent += 0.2
            elif event == "lost":
                lost = Attempt(outcome="lost", cost_usd=None, unknown_usd=0.5)
                book.record(key, "j", FAILED, [lost])
                unknown += 0.5
            else:
                book.unclaim(key)
            assert book.money() == pytest.approx((spent, unknown, 0.0))
