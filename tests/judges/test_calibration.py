"""Probabilities fitted to people's labels: mirror images, honest error, one judge only."""

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.labelled import load_labelled
from prefopt.errors import DataError
from prefopt.judges import ScriptedJudge
from prefopt.judges.calibrate import CalibrationReport, calibrate_judge
from prefopt.judges.calibration import (
    Calibration,
    expected_calibration_error,
    fit_calibration,
    load_calibration,
    save_calibration,
)
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict


def judged(grade, i=0):
    prompt = Prompt.from_text(f"Question {i}?")
    if grade is None:
        said = Verdict(judge="j", failure="refused")
    else:
        preferred = "tie" if grade == 0 else "a" if grade > 0 else "b"
        said = Verdict(judge="j", preferred=preferred, strength=abs(grade))
    return JudgedComparison(
        comparison=Comparison(
            a=Candidate(prompt=prompt, text="one", model="m"),
            b=Candidate(prompt=prompt, text="two", model="m", sample_index=1),
        ),
        forward=said,
    )


def people(n, seed=0, slope=0.8):
    """Labels drawn with P(a) = 1 / (1 + exp(-slope * grade))."""
    rng = np.random.default_rng(seed)
    grades = rng.integers(-2, 3, size=n).tolist()
    labels = ["a" if rng.random() < 1 / (1 + np.exp(-slope * g)) else "b" for g in grades]
    return [judged(g, i) for i, g in enumerate(grades)], labels


def fit(items, labels, **options):
    return fit_calibration(items, labels, judge="j", rubric_hash="r", **options)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_the_true_probabilities_are_found(method):
    fitted = fit(*people(4_000), method=method)
    for grade in (-2, -1, 0, 1, 2):
        truth = 1 / (1 + np.exp(-0.8 * grade))
        assert fitted.p_a(grade) == pytest.approx(truth, abs=0.04)
    assert fitted.ece < 0.03
    assert fitted.log_loss < fitted.log_loss_uninformed


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@given(grade=st.floats(-2, 2))
def test_exchanging_the_answers_gives_exactly_the_rest(method, grade):
    fitted = FITTED[method]
    assert fitted.p_a(grade) + fitted.p_a(-grade) == pytest.approx(1.0, abs=1e-12)
    assert 0 < fitted.p_a(grade) < 1


FITTED = {m: fit(*people(300, seed=3), method=m) for m in ("platt", "isotonic")}


def test_a_judge_that_knows_nothing_gets_one_half():
    items, _ = people(400)
    labels = ["a", "b"] * 200
    fitted = fit(items, labels)
    assert abs(fitted.p_a(2) - 0.5) < 0.08


def test_failed_verdicts_are_left_out_and_say_nothing():
    items, labels = people(100)
    items = [judged(None, i) if i % 10 == 0 else item for i, item in enumerate(items)]
    fitted = fit(items, labels)
    assert fitted.n_labels == 90
    assert fitted.apply(judged(None)) == 0.5
    with pytest.raises(DataError, match="at least 20"):
        fit(items[:10], labels[:10])


def test_a_calibration_is_for_one_judge_and_one_rubric(tmp_path):
    fitted = FITTED["platt"]
    save_calibration(fitted, tmp_path / "c.json")
    back = load_calibration(tmp_path / "c.json")
    assert back == fitted
    back.check("j", "r")
    for judge, rubric in (("other", "r"), ("j", "other")):
        with pytest.raises(DataError, match="fitted for j"):
            back.check(judge, rubric)
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError, match="cannot read the calibration"):
        load_calibration(tmp_path / "c.json")
    with pytest.raises(DataError, match="prefopt judge calibrate"):
        load_calibration(tmp_path / "none.json")


def test_the_calibration_error_of_known_numbers():
    p, wins = np.array([0.9, 0.9, 0.1, 0.6]), np.array([1.0, 0.0, 0.0, 1.0])
    # The first three are "0.9 sure": two of three right. The last is 0.6 sure and right.
    assert expected_calibration_error(p, wins) == pytest.approx(
        (3 * abs(0.9 - 2 / 3) + abs(0.6 - 1)) / 4
    )


# --- Labelled data ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"instruction": "q", "response_a": "x", "response_b": "", "label": "A"}, "a"),
        ({"prompt": "q", "response_a": "x", "response_b": "y", "label": 2}, "b"),
        ({"prompt": [{"role": "user", "content": "q"}], "answer_a": "x", "answer_b": "y",
          "label": "Tie"}, "tie"),
        ({"prompt": "q", "chosen": "x", "rejected": "y"}, "a"),
    ],
)  # fmt: skip
def test_the_usual_spellings_are_understood(row, label):
    (pair,) = load_labelled([row])
    assert pair.label == label


def test_rows_that_cannot_be_used_are_all_named():
    rows = [
        {"prompt": "q", "response_a": "x", "response_b": "y", "label": "C3"},
        {"prompt": "q", "response_a": "x", "label": "A"},
        {"response_a": "x", "response_b": "y", "label": "A"},
        {"prompt": "q", "response_a": None, "response_b": "y", "label": "A"},
        {"prompt": "q", "response_a": "x", "response_b": "y", "label": True},
        {"prompt": "q", "response_a": "x", "response_b": "y"},
        "text",
    ]
    with pytest.raises(DataError) as caught:
        load_labelled(rows)
    assert len(caught.value.problems) == len(rows)
    assert "row 3" in str(caught.value)


def test_the_whole_way_in_one_call(tmp_path):
    rows = [
        {
            "prompt": f"Question {i}?",
            "response_a": "a long answer indeed",
            "response_b": "short",
            "label": "A" if i % 3 else "B",
            "subset": "x<b>" if i % 2 else "y",
            "annotators": [1, 1, 2],
        }
        for i in range(60)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = ScriptedJudge(lambda c: "a" if len(c.a.text) > len(c.b.text) else "b", name="longer")
    report = calibrate_judge(
        [path], judge, out=tmp_path / "out", ledger=tmp_path / "l", progress=False
    )
    assert report.overall.accuracy.value == pytest.approx(2 / 3)
    assert report.calibration.p_a(1) == pytest.approx(2 / 3, abs=0.05)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "calibration.json", "calibration_report.json", "calibration_report.txt",
        "calibration_report.html",
    }  # fmt: skip
    html = (tmp_path / "out" / "calibration_report.html").read_text()
    assert "x&lt;b&gt;" in html
    assert "<svg" in html
    read = (tmp_path / "out" / "calibration_report.json").read_bytes()
    assert msgspec.json.decode(read, type=CalibrationReport) == report
    assert isinstance(load_calibration(tmp_path / "out" / "calibration.json"), Calibration)
    sampled = calibrate_judge([path, path], judge, max_rows=20, progress=False)
    assert [s.n for s in sampled.sets] == [20, 20]
    assert {c.category: c.n for c in sampled.sets[0].categories} == {"x<b>": 10, "y": 10}
    assert "mine: 20 pairs" in sampled.to_text()


def test_a_fit_that_is_no_better_than_one_half_is_called_that(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"q {i}", "response_a": "a b c", "response_b": "a", "label": label}
        for i, label in enumerate(rng.permutation(["A", "B"] * 30).tolist())
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lost = calibrate_judge(
        path, ScriptedJudge(lambda c: "a" if len(c.a.text) > 1 else "b"), progress=False
    )
    for row in rows:
        row["label"] = "A"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = calibrate_judge(
        path, ScriptedJudge(lambda c: "a" if len(c.a.text) > 1 else "b"), progress=False
    )
    assert not lost.calibration.informative
    assert good.calibration.informative
    for report, said in ((lost, True), (good, False)):
        for shown in (report.to_text(), report.to_html()):
            assert ("no better than one half" in shown) is said
