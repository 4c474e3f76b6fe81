"""A history: what goes in comes out, changes are tested, nothing is half written; and its pages."""

import re
import sqlite3

import msgspec
import pytest
from starlette.testclient import TestClient

from benchmarks import speed_history
from prefopt.cli import main
from prefopt.data.records import write_records
from prefopt.errors import DataError, PrefoptError
from prefopt.evaluation import history as history_module
from prefopt.evaluation.capability_report import capability_report, compare_items
from prefopt.evaluation.capability_scores import ItemScore, TaskScores
from prefopt.evaluation.dashboard import dashboard, serve_dashboard, word_changes
from prefopt.evaluation.eval_report import EvalReport, build_report
from prefopt.evaluation.history import History, PairFilter
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict

EVIL = "<script>alert('x')</script> & \"quotes\" 100%_done"


def verdict(grade, shown_first):
    if isinstance(grade, str):
        return Verdict(judge="judge-1", failure=grade, shown_first=shown_first)
    preferred = "tie" if grade == 0 else "a" if grade > 0 else "b"
    return Verdict(
        judge="judge-1",
        preferred=preferred,
        strength=abs(grade),
        shown_first=shown_first,
        rationale=f"because {grade} with {shown_first} first",
    )


def judged(number, forward, backward=None, *, after="after", category=""):
    prompt = Prompt.from_text(f"question {number}", category)
    return JudgedComparison(
        comparison=Comparison(
            a=Candidate(prompt=prompt, text=after, model="tuned"),
            b=Candidate(prompt=prompt, text=f"before {number}", model="base"),
        ),
        forward=verdict(forward, "a"),
        backward=verdict(forward if backward is None else backward, "b"),
    )


def evaluation(folder, pairs, **about):
    write_records(folder / "judged.jsonl", pairs)
    (folder / "report.json").write_bytes(msgspec.json.encode(build_report(pairs, **about)))
    return folder


@pytest.fixture
def folder(tmp_path):
    pairs = [
        judged(1, 2, after="It is blue.", category="colours"),
        judged(2, -1, after=EVIL, category="other"),
        judged(3, 1, -1, after="It is blue too."),
        judged(4, "refused", after="ÄRGER, Привет! 色"),
    ]
    return evaluation(tmp_path / "first", pairs, title="First")


@pytest.fixture
def history(tmp_path):
    with History(tmp_path / "deep" / "h.sqlite") as kept:
        yield kept


def test_what_goes_in_comes_out_and_only_once(history, folder):
    found = history.add(folder, series="bot")
    assert history.add(folder, series="bot") == found
    assert history.evaluations() == history.evaluations("bot") == [found]
    assert history.evaluations("other") == []
    assert (found.title, found.n, found.n_unscored, found.source) == ("First", 3, 1, "first")
    assert (found.tuned_model, found.base_model, found.judge) == ("tuned", "base", "judge-1")
    assert found.win_rate == pytest.approx(0.5)
    pairs, total = history.pairs(found.number)
    assert total == 4
    assert [p.result for p in pairs] == ["win", "loss", "tie", "unscored"]
    assert [p.flipped for p in pairs] == [False, False, True, False]
    pair, both = history.pair(found.number, 3)
    report = msgspec.json.decode((folder / "report.json").read_bytes(), type=EvalReport)
    assert pair == report.answers[2]
    assert pair.after == "It is blue too."
    reasons = [v.rationale for v in both.verdicts]
    assert reasons == ["because 1 with a first", "because -1 with b first"]
    assert history.report(found.number).answers == ()
    # Another series is another entry; removing one leaves the other whole.
    second = history.add(folder, series="copy")
    history.remove(found.number)
    assert history.evaluations() == [second]
    assert history.pairs(second.number)[1] == 4
    with pytest.raises(DataError, match="no evaluation 1"):
        history.evaluation(1)


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        (PairFilter(text="BLUE"), [1, 3]),
        (PairFilter(text="100%_done"), [2]),  # signs of LIKE are plain text
        (PairFilter(text="before 4"), [4]),
        (PairFilter(text="question", result="win"), [1]),
        (PairFilter(result="unscored"), [4]),
        (PairFilter(category="other"), [2]),
        (PairFilter(flipped=True), [3]),
        (PairFilter(text="'; DROP TABLE pairs; --"), []),
        (PairFilter(text="ärger"), [4]),  # another case, outside of ASCII too
        (PairFilter(text="ПРИВЕТ"), [4]),
        (PairFilter(text="色"), [4]),
    ],
)
def test_pairs_are_found(history, folder, wanted, places):
    number = history.add(folder).number
    found, total = history.pairs(number, wanted)
    assert [p.number for p in found] == places
    assert total == len(places)
    assert [p.number for p in history.pairs(number, wanted, offset=1, limit=1)[0]] == places[1:2]


def test_a_run_folder_and_a_report_alone_are_read(history, folder, tmp_path):
    run = tmp_path / "run"
    (run / "report").mkdir(parents=True)
    (folder / "report.json").rename(run / "report" / "report.json")
    (folder / "judged.jsonl").rename(run / "judged_held_out.jsonl")
    number = history.add(run).number
    assert history.pair(number, 1)[1] is not None
    (run / "judged_held_out.jsonl").unlink()
    number = history.add(run, series="without verdicts").number
    pair, both = history.pair(number, 1)
    assert both is None
    assert pair.rationales


def test_what_does_not_belong_together_is_refused_and_leaves_no_trace(history, folder):
    lines = (folder / "judged.jsonl").read_bytes().splitlines(keepends=True)
    for content in (lines[:3], [*lines, lines[0]], [lines[1], lines[0], *lines[2:]]):
        (folder / "judged.jsonl").write_bytes(b"".join(content))
        with pytest.raises(DataError, match="does not hold the pairs of the report"):
            history.add(folder)
    assert history.evaluations() == []
    with pytest.raises(DataError, match="holds no evaluation"):
        history.add(folder.parent / "nowhere")
    (folder / "report.json").write_text('{"schema": "something else"}')
    with pytest.raises(DataError, match="is no report of an evaluation"):
        history.add(folder)


def test_files_that_are_no_history_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no history"):
        History(tmp_path / "none", create=False)
    (tmp_path / "text").write_text("not a database " * 100)
    with pytest.raises(DataError, match="as a history"):
        History(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE t (x)")
    other.commit()
    other.close()
    with pytest.raises(DataError, match="no history of prefopt's"):
        History(tmp_path / "other.sqlite")
    with History(tmp_path / "h") as kept:
        kept._db.execute("PRAGMA user_version = 99")
    with pytest.raises(DataError, match="newer prefopt"):
        History(tmp_path / "h")


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


def test_a_stop_half_way_leaves_the_file_as_it_was(history, folder, monkeypatch):
    number = history.add(folder, series="one").number

    def rows(*_):
        yield from whole(*_)
        raise Killed

    whole = history_module._rows
    monkeypatch.setattr(history_module, "_rows", rows)
    with pytest.raises(Killed):
        history.add(folder, series="two")
    assert [e.number for e in history.evaluations()] == [number]
    for table in ("pairs", "texts", "verdicts"):
        assert history._one(f"SELECT count(*) FROM {table}") == (4,)


# The tables of the first form, and how it kept a pair.
VERSION_1 = """
CREATE TABLE evaluations (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, series TEXT NOT NULL, added_at TEXT NOT NULL,
    source TEXT NOT NULL, title TEXT NOT NULL, base_model TEXT NOT NULL, tuned_model TEXT NOT NULL,
    judge TEXT NOT NULL, rubric TEXT NOT NULL, rubric_hash TEXT NOT NULL, n_prompts INTEGER NOT NULL,
    n INTEGER NOT NULL, n_unscored INTEGER NOT NULL, win_rate REAL NOT NULL, low REAL NOT NULL,
    high REAL NOT NULL, perplexity_change REAL, cost_usd REAL, report BLOB NOT NULL
);
CREATE TABLE pairs (
    evaluation INTEGER NOT NULL, number INTEGER NOT NULL, prompt_id TEXT NOT NULL,
    category TEXT NOT NULL, result TEXT NOT NULL, points REAL, flipped INTEGER NOT NULL,
    prompt TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL, pair BLOB NOT NULL, judged BLOB,
    PRIMARY KEY (evaluation, number)
);
CREATE INDEX pairs_by_prompt ON pairs (evaluation, prompt_id, points);
ATTACH '{new}' AS new;
INSERT INTO evaluations SELECT * FROM new.evaluations;
INSERT INTO pairs SELECT evaluation, number, prompt_id, category, result, points, flipped, prompt,
    before, after, '{{}}', judged
    FROM new.pairs JOIN new.texts USING (evaluation, number)
    JOIN new.verdicts USING (evaluation, number);
PRAGMA user_version = 1;
"""


def test_a_history_of_the_first_form_is_taken_over(history, folder, tmp_path):
    history.add(folder, series="s")
    grades(history, tmp_path, "two", {1: -1, 2: 1, 3: 1})
    old = sqlite3.connect(tmp_path / "old.sqlite")
    old.executescript(VERSION_1.format(new=history.path))
    old.close()
    with History(tmp_path / "old.sqlite", create=False) as taken:
        assert taken.evaluations() == history.evaluations()
        assert taken.pairs(1) == history.pairs(1)
        assert taken.pair(1, 2) == history.pair(1, 2)
        assert taken.changes("s") == history.changes("s")
        assert taken.answer_changes(1, 2) == history.answer_changes(1, 2)
        assert not taken._all(
            "SELECT 1 FROM sqlite_master WHERE name IN ('pairs_1', 'evaluations_1')"
        )


def grades(history, tmp_path, name, given, **about):
    pairs = [judged(i, grade, after=f"{name} {i}") for i, grade in given.items()]
    return history.add(evaluation(tmp_path / name, pairs, title=name, **about), series="s").number


def test_a_change_is_a_sign_test_over_shared_prompts(history, tmp_path):
    first = grades(history, tmp_path, "one", {i: 1 if i < 10 else -1 for i in range(20)})
    # Prompts 0 to 7 fell from won to lost; 100 and up are new and count for nothing.
    fallen = {i: 1 if 8 <= i < 10 else -1 for i in range(20)} | {i: 1 for i in range(100, 140)}
    second = grades(history, tmp_path, "two", fallen)
    change = history.change(first, second)
    assert (change.verdict, change.n_shared, change.n_better, change.n_worse) == ("worse", 20, 0, 8)
    assert change.p_value == pytest.approx(2 * 0.5**8)
    assert change.difference == pytest.approx(-8 / 20)
    back = history.change(second, first)
    assert (back.verdict, back.n_better, back.p_value) == ("better", 8, change.p_value)
    same = history.change(first, first)
    assert (same.verdict, same.p_value) == ("unclear", 1.0)
    assert history.changes("s") == {second: change}


def with_tasks(folder, right, *, engine="lm-eval 1", base_model="base", n=40):
    """An evaluation whose tuned model has so many of a task's 40 items right, the base 30."""
    tasks = []
    for task, n_right in right.items():
        sides = {
            "base": [1.0] * 30 + [0.0] * (n - 30),
            "tuned": [1.0] * n_right + [0.0] * (n - n_right),
        }
        tasks.append((task, sides))
    write_records(
        folder / "capabilities" / "capabilities.jsonl",
        [
            TaskScores(
                key=side, side=side, model=side, task=task, title=task.title(), metric="acc",
                higher_is_better=True, seconds=1.0,
                items=tuple(ItemScore(f"item {i}", score, "said") for i, score in enumerate(scores)),
            )
            for task, sides in tasks
            for side, scores in sides.items()
        ],
    )  # fmt: skip
    report = capability_report(
        [compare_items(t, t.title(), "acc", s["base"], s["tuned"]) for t, s in tasks],
        engine=engine, base_model=base_model, tuned_model="tuned",
    )  # fmt: skip
    return evaluation(folder, [judged(1, 1)], capabilities=report, title=folder.name)


def test_a_skill_lost_since_the_evaluation_before_is_shown(history, tmp_path):
    for name, right in (
        ("a", {"sums": 38, "rhymes": 30}),
        ("b", {"sums": 36, "rhymes": 31, "maps": 9}),
        ("c", {"sums": 20, "rhymes": 31}),
    ):
        history.add(with_tasks(tmp_path / name, right), series="s")
    changes = history.capability_changes("s")
    assert list(changes) == [(1, 2), (2, 3)]
    little, much = changes.values()
    assert little.dropped == ()
    assert little.not_compared == {"maps": "not measured in the earlier evaluation"}
    assert much.not_compared == {"maps": "not measured in the later evaluation"}
    assert [t.title for t in much.dropped] == ["Sums"]
    lost = much.dropped[0]
    # 16 items lost and none won, with the better of two p-values doubled (Holm).
    assert (lost.n_worse, lost.n_better, lost.p_value) == (16, 0, pytest.approx(2 * 2 * 0.5**16))
    assert (lost.base, lost.tuned) == (36 / 40, 20 / 40)
    # One without capabilities in between is passed over.
    grades(history, tmp_path, "none", {1: 1})
    history.add(with_tasks(tmp_path / "d", {"sums": 36}), series="s")
    assert list(history.capability_changes("s")) == [(1, 2), (2, 3), (3, 5)]
    history.remove(3)
    assert list(history.capability_changes("s")) == [(1, 2), (2, 5)]


def test_tasks_that_cannot_be_compared_say_why(history, tmp_path):
    first = history.add(with_tasks(tmp_path / "a", {"sums": 38})).number
    engine = history.add(with_tasks(tmp_path / "b", {"sums": 20}, engine="lm-eval 2")).number
    bare = with_tasks(tmp_path / "c", {"sums": 20})
    (bare / "capabilities" / "capabilities.jsonl").unlink()
    bare = history.add(bare).number
    assert history.capability_change(first, engine).not_compared == {
        "sums": "asked by lm-eval 1, then by lm-eval 2"
    }
    assert (
        "were not kept in the later" in history.capability_change(first, bare).not_compared["sums"]
    )
    other = with_tasks(tmp_path / "d", {"sums": 20})
    (with_tasks(tmp_path / "e", {"sums": 21}) / "capabilities").rename(tmp_path / "x")
    (other / "capabilities").rename(tmp_path / "y")
    (tmp_path / "x").rename(other / "capabilities")
    with pytest.raises(DataError, match="does not hold the scores of Sums"):
        history.add(other)


def test_what_cannot_be_compared_says_why(history, tmp_path):
    first = grades(history, tmp_path, "one", {1: 1, 2: 1})
    other_judge = grades(history, tmp_path, "two", {1: 1, 2: -1}, judge="judge-2")
    other_base = grades(history, tmp_path, "three", {1: 1, 2: -1}, base_model="another")
    other_prompts = grades(history, tmp_path, "four", {8: 1, 9: -1})
    assert history.change(first, other_judge).reason == "another judge"
    assert history.change(first, other_base).reason == "another baseline"
    assert history.change(first, other_prompts).reason == "no prompt was scored in both"


def test_answers_that_got_worse_come_first(history, tmp_path):
    first = grades(history, tmp_path, "one", {1: 1, 2: 0, 3: -1, 4: "refused"})
    second = grades(history, tmp_path, "two", {1: -1, 2: 0, 3: 1, 4: 1, 5: 1})
    found, total = history.answer_changes(first, second)
    assert total == 4
    assert [a.prompt for a in found] == ["question 1", "question 2", "question 3", "question 4"]
    assert (found[0].earlier, found[0].later) == ("one 1", "two 1")
    assert (found[3].earlier_points, found[3].later_points) == (None, 1.0)
    worse, n = history.answer_changes(first, second, which="worse")
    assert ([a.prompt for a in worse], n) == (["question 1"], 1)
    assert history.answer_changes(first, second, which="better")[0][0].prompt == "question 3"


def test_word_changes_put_together_are_both_texts():
    earlier, later = "The sky is blue, mostly.", "The sky was blue,  mostly so."
    pieces = word_changes(earlier, later)
    assert "".join(p.text for p in pieces if p.change != "added") == earlier
    assert "".join(p.text for p in pieces if p.change != "removed") == later
    assert word_changes("same", "same") == [("same", "same")]
    assert word_changes("", "") == []


@pytest.fixture
def client(history, folder, tmp_path):
    history.add(folder, series=EVIL)
    grades(history, tmp_path, "one", {i: 1 for i in range(60)})
    grades(history, tmp_path, "two", {i: -1 for i in range(60)})
    return TestClient(dashboard(history), base_url="http://localhost")


def test_every_page_is_there_and_what_models_wrote_is_escaped(client):
    pages = [
        "/", "/evaluations/1", "/evaluations/1/pairs/2", "/evaluations/1/pairs/4", "/changes/2/3",
        "/changes/2/3?which=worse&page=3", "/evaluations/2?page=2", "/evaluations/2?page=-1",
        "/evaluations/1?text=%3Cscript%3E&result=loss", "/evaluations/1?result=nonsense",
    ]  # fmt: skip
    for page in pages:
        answer = client.get(page)
        assert answer.status_code == 200, page
        assert "<script" not in answer.text, page
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert not re.findall(r'(?:src|href)="(?!/|\?|#)', answer.text), page  # loads nothing
    assert "▼ Worse" in client.get("/").text
    assert "&lt;script&gt;" in client.get("/evaluations/1/pairs/2").text
    assert "Before shown first: before is better" in client.get("/evaluations/1/pairs/2").text
    assert "no verdict: refused" in client.get("/evaluations/1/pairs/4").text
    assert "<del>one</del><ins>two</ins>" in client.get("/changes/2/3").text


@pytest.mark.slow
def test_links_lead_on_from_every_page(client):
    seen, todo = set(), ["/"]
    while todo:
        page = todo.pop()
        if page in seen or len(seen) > 300:
            continue
        seen.add(page)
        answer = client.get(page)
        assert answer.status_code == 200, page
        path = page.split("?")[0]
        for link in re.findall(r'href="([^"#]+)', answer.text):
            link = link.split("?")[0] if "/pairs/" in link else link.replace("&amp;", "&")
            todo.append(path + link if link.startswith("?") else link)
    assert {"/evaluations/3/pairs/60", "/changes/2/3", "/evaluations/3?page=2"} <= seen


def test_pages_and_list_show_what_was_lost_and_when(history, tmp_path, capsys):
    for name, right in (("a", {EVIL: 36, "maps": 31}), ("b", {EVIL: 20, "maps": 30})):
        history.add(with_tasks(tmp_path / name, right), series="s")
    history.add(evaluation(tmp_path / "c", [judged(1, 1)]), series="without")
    client = TestClient(dashboard(history), base_url="http://localhost")
    overview, later = client.get("/").text, client.get("/evaluations/2").text
    assert "<script" not in overview + later
    assert "Evaluation 2: fell from 90 % to 50 % since evaluation 1 (p under 0.001)." in overview
    assert overview.count("▼ Dropped") == 2  # the base model had 75 % right, the one before 90 %
    assert overview.count('id="task-trend-') > 0
    assert "−25.0 (" in later  # against the base model
    assert "−40.0 (" in later  # since the evaluation before
    assert "What else it can do" not in client.get("/evaluations/3").text
    assert main(["history", "list", "--history", str(history.path), "--series", "s"]) == 0
    said = capsys.readouterr().out
    assert "90 % to 50 % (16 of 40 items worse, 0 better, p under 0.001)" in said
    assert said.count("DROPPED since 1") == 1
    assert main(["history", "list", "--history", str(history.path), "--series", "x"]) == 1
    assert "no series 'x'; it has 'without', 's'" in capsys.readouterr().err


def test_of_many_evaluations_the_older_ones_are_folded(history, folder):
    report = msgspec.json.decode((folder / "report.json").read_bytes(), type=EvalReport)
    for number in range(1, 15):
        later = msgspec.structs.replace(report, title=f"number {number}")
        (folder / "report.json").write_bytes(msgspec.json.encode(later))
        history.add(folder, series="s")
    page = TestClient(dashboard(history), base_url="http://localhost").get("/").text
    shown, folded = page.split("<summary>2 older evaluations</summary>")
    assert re.findall(r"/evaluations/(\d+)\"", shown) == [str(n) for n in range(14, 2, -1)]
    assert re.findall(r"/evaluations/(\d+)\"", folded) == ["2", "1"]


def test_a_pair_leads_back_to_the_pairs_that_were_found(client):
    found = client.get("/evaluations/1?text=%3Cscript%3E&result=loss&page=1&x=y").text
    (link,) = re.findall(r'href="(/evaluations/1/pairs/2[^"]*)"', found)
    back = "?text=%3Cscript%3E&amp;result=loss&amp;page=1"
    assert link == f"/evaluations/1/pairs/2{back}"
    assert f'href="/evaluations/1{back}#found"' in client.get(link.replace("&amp;", "&")).text


def test_what_is_not_there_is_said_in_words(client):
    for page, words in (
        ("/evaluations/9", "no evaluation 9"), ("/evaluations/1/pairs/9", "no pair 9"),
        ("/changes/1/9", "no evaluation 9"), ("/nonsense", "no such page"),
        (f"/evaluations/{2**64}", "so large a number"),
        (f"/evaluations/1/pairs/{2**64}", "so large a number"),
    ):  # fmt: skip
        answer = client.get(page)
        assert answer.status_code == 404
        assert words in answer.text


def test_another_sites_name_for_this_machine_is_refused(history):
    client = TestClient(dashboard(history), base_url="http://evil.example")
    assert client.get("/").status_code == 400


def test_a_history_without_evaluations_says_how_to_begin(history):
    client = TestClient(dashboard(history), base_url="http://localhost")
    assert "prefopt history add" in client.get("/").text


def test_a_taken_port_is_said_in_words(history, monkeypatch):
    import uvicorn

    def taken(*_, **__):
        raise SystemExit(1)

    monkeypatch.setattr(uvicorn, "run", taken)
    with pytest.raises(PrefoptError, match="is the port taken"):
        serve_dashboard(history)
    for port in (0, -1, 65536):
        with pytest.raises(ValueError, match=f"from 1 to 65535, got {port}"):
            serve_dashboard(history, port=port)


def test_the_commands(folder, tmp_path, capsys):
    file = str(tmp_path / "cli.sqlite")
    assert main(["history", "list", "--history", file]) == 1
    assert "there is no history" in capsys.readouterr().err
    add = ["history", "add", "--history", file, "--series", "bot", "--folders"]
    assert main([*add, f"[{folder}, {tmp_path / 'gone'}, {tmp_path}]"]) == 1
    said = capsys.readouterr().err
    assert "gone is not there" in said
    assert f"{tmp_path} holds no report" in said
    assert not (tmp_path / "cli.sqlite").exists()
    assert main([*add, str(folder)]) == 0
    second = evaluation(tmp_path / "second", [judged(i, -1) for i in (1, 2, 3)])
    assert main([*add, f"[{folder}, {second}]"]) == 0
    capsys.readouterr()
    assert main(["history", "list", "--history", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # two evaluations and the change between them
    assert "no change shown: 0 of 3 shared prompts better, 2 worse (p = 0.5)" in lines[2]


@pytest.mark.slow
def test_a_hundred_thousand_pairs_are_added_in_a_minute_and_shown_at_once(tmp_path):
    found, _ = speed_history.measure(100_000, tmp_path)
    for done in found:
        print(f"{done.what}: {done.cpu_s:.2f} s")
    assert not speed_history.missed(found)
