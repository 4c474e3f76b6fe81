"""A labelling job in its folder: estimate, label, resume, report, export, and what it refuses."""

import json
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.data.preference_data import load_preferences
from prefopt.data.records import read_records, write_records
from prefopt.errors import DataError, RunError
from prefopt.judges.calibration import Calibration, save_calibration
from prefopt.judges.rubric import HOUSE_STYLE
from prefopt.label_job import (
    LabelConfig,
    estimate_labels,
    export_labels,
    label_candidates,
    report_labels,
    resume_labels,
)
from prefopt.types import Candidate, LeftOut, Prompt


@pytest.fixture
def candidates(tmp_path):
    path = tmp_path / "candidates.jsonl"
    write_records(
        path,
        [
            Candidate(
                prompt=prompt,
                text=f"Do step {i} " + "then wait and look again " * j + ".",
                model="m",
                sample_index=j,
            )
            for i in range(12)
            for prompt in [Prompt.from_text(f"How do I do task {i}?")]
            for j in range(3)
        ],
    )
    return str(path)


@pytest.fixture
def config(candidates, tmp_path):
    return LabelConfig(
        candidates=candidates, out=str(tmp_path / "labels"), judge="scripted:shortest"
    )


def test_a_job_leaves_labels_reasons_and_a_report(config, tmp_path):
    labels = label_candidates(config, progress=False)
    assert labels.preferences.n_preferences == 36
    groups = load_preferences(f"{config.out}/preferences.jsonl")
    assert sum(len(g.preferences) for g in groups) == 36
    assert read_records(f"{config.out}/left_out.jsonl", LeftOut) == []
    assert labels.report.outcomes == {"labelled": 36}
    assert {c.kind for c in labels.report.canaries} == {"constant", "fake_template", "instruction"}
    page = (tmp_path / "labels" / "report" / "label_report.html").read_text()
    assert "scripted:shortest" in page


def test_resuming_and_reporting_again_ask_nothing_and_say_the_same(config):
    first = label_candidates(config, progress=False)
    judged = Path(config.out) / "judged.jsonl"
    before = judged.read_bytes()
    again = resume_labels(config.out, progress=False)
    assert again.preferences == first.preferences
    assert judged.read_bytes() == before
    report = report_labels(config.out)
    assert report.outcomes == first.report.outcomes
    assert report.canaries == first.report.canaries


def test_another_job_does_not_overwrite_this_one(config):
    label_candidates(config, progress=False)
    other = LabelConfig(candidates=config.candidates, out=config.out, judge="scripted:longest")
    with pytest.raises(RunError, match=r"other settings.*scripted:longest"):
        label_candidates(other, progress=False)
    with pytest.raises(RunError, match="no labelling job"):
        resume_labels(config.out + "x")


def test_export_makes_labels_anew_with_other_thresholds(config, tmp_path):
    label_candidates(config, progress=False)
    out = str(tmp_path / "one.jsonl")
    found = export_labels(config.out, out, rule="inferred", min_p=0.6, pairs_per_prompt=1)
    assert found.n_preferences == 12
    assert len(load_preferences(out)) == 12
    assert len(read_records(out + ".left_out.jsonl", LeftOut)) == len(found.left_out)


def test_a_calibration_is_used_and_refused_for_another_judge(config, tmp_path):
    label_candidates(config, progress=False)
    fields = dict(
        rubric_hash=HOUSE_STYLE.rubric_hash, method="platt", slope=1.0, n_labels=50,
        ece=0.0, brier=0.2, log_loss=0.6, log_loss_uninformed=0.69,
    )  # fmt: skip
    path, out = str(tmp_path / "c.json"), str(tmp_path / "o.jsonl")
    save_calibration(Calibration(judge="scripted:shortest", **fields), path)
    found = export_labels(config.out, out, calibration=path)
    pairs = [p for g in found.groups for p in g.preferences]
    assert {p.p_source for p in pairs} == {"calibrated"}
    assert {round(p.p_chosen, 4) for p in pairs} == {0.7311}
    save_calibration(Calibration(judge="other", **fields), path)
    with pytest.raises(DataError, match="fitted for other"):
        export_labels(config.out, out, calibration=path)


def test_an_adaptive_job_keeps_the_best_against_the_worst(candidates, tmp_path):
    config = LabelConfig(
        candidates=candidates, out=str(tmp_path / "a"), judge="scripted:shortest",
        plan="adaptive", rule="inferred", pairs_per_prompt=1,
    )  # fmt: skip
    labels = label_candidates(config, progress=False)
    assert labels.preferences.n_preferences == 12
    for group in labels.preferences.groups:
        ((chosen, rejected, _),) = group.pairs()
        assert (chosen.sample_index, rejected.sample_index) == (0, 2)


def test_two_judges_are_both_asked(candidates, tmp_path):
    config = LabelConfig(
        candidates=candidates, out=str(tmp_path / "p"), judge="scripted:shortest",
        second_judge="scripted:longest",
    )  # fmt: skip
    labels = label_candidates(config, progress=False)
    assert labels.report.n_verdicts == 36 * 4
    assert labels.preferences.n_preferences == 0  # they contradict each other everywhere


def test_an_estimate_asks_nothing_and_needs_no_limit(candidates, tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not-a-real-key")
    config = LabelConfig(
        candidates=candidates, out=str(tmp_path / "e"), judge="anthropic:claude-sonnet-5-5"
    )
    ((name, cost),) = estimate_labels(config)
    assert name == "anthropic:claude-sonnet-5-5"
    assert cost.calls == 2 * (36 + 3 * 4)
    assert 0 < cost.low_usd < cost.high_usd < cost.worst_usd
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"plan": "adaptive"}, {"min_p": 1.0}, {"min_margin": 3.0}, {"pairs_per_prompt": 0},
     {"canaries": -1}],
)  # fmt: skip
def test_wrong_settings_are_refused_before_anything_is_read(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LabelConfig(candidates="nowhere", out="nowhere", **wrong)


def test_the_commands_say_what_is_wrong_in_one_line(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"schema": "prefopt.candidate/1"}\nnot json\n')
    out = str(tmp_path / "o")
    for arguments, said in [
        (["label", "--candidates", str(tmp_path / "empty.jsonl"), "--out", out], "no candidates"),
        (["label", "--candidates", str(tmp_path / "broken.jsonl"), "--out", out], "line 2"),
        (["resume", "--out", out], "no labelling job"),
        (["report", "--out", out], "no labelling job"),
        (["export", "--out", out, "--preferences", out], "no labelling job"),
    ]:
        assert main(["judge", *arguments]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error


def test_calibrate_on_the_command_line(tmp_path, capsys):
    rows = [
        {"prompt": f"q {i}", "response_a": "short", "response_b": "rather longer", "label": "A"}
        for i in range(30)
    ]
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "c"
    assert main(["judge", "calibrate", "--data", f"[{data}]", "--out", str(out),
                 "--judge", "scripted:shortest"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "labelled: 30 pairs" in printed
    assert (out / "calibration.json").exists()
