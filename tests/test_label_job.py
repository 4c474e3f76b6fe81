"""A labelling job in its folder: estimate, label, resume, report, export, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

import prefopt
from prefopt.cli import main
from prefopt.data.preference_data import load_preferences
from prefopt.data.records import read_records, write_records
from prefopt.errors import DataError, RunError
from prefopt.judges import load_judge
from prefopt.judges.calibration import Calibration, save_calibration
from prefopt.judges.rubric import HOUSE_STYLE
from prefopt.label_job import (
    LabelConfig,
    estimate_labels,
    export_labels,
    label_candidates,
    read_job,
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


def test_a_calibration_is_used_and_refused_for_another_judge(config, tmp_path, caplog):
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
    assert "no better than one half" not in caplog.text
    save_calibration(Calibration(judge="scripted:shortest", **fields | {"log_loss": 0.7}), path)
    export_labels(config.out, out, calibration=path)
    assert "no better than one half" in caplog.text
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
    # Neither changes its mind with the order, so none of it is a flip.
    assert labels.report.outcomes == {"labelled": 0, "judges_disagree": 36}
    assert labels.preferences.n_flipped == 0
    assert "by scripted:shortest and scripted:longest" in labels.report.to_html()


def test_the_report_says_what_inferred_probabilities_cannot_show(config, tmp_path):
    labels = label_candidates(config, progress=False)
    for shown in (labels.report.to_text(), labels.report.to_html()):
        assert "Errors that a judge repeats do not show" in shown
    fitted = msgspec.structs.replace(labels.report, p_sources={"calibrated": 36})
    for shown in (fitted.to_text(), fitted.to_html()):
        assert "Errors that a judge repeats do not show" not in shown


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
     {"canaries": -1}, {"reliability": 0.0}, {"reliability": 1.5}],
)  # fmt: skip
def test_wrong_settings_are_refused_before_anything_is_read(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LabelConfig(candidates="nowhere", out="nowhere", **wrong)


def test_the_commands_say_what_is_wrong_in_one_line(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"schema": "prefopt.candidate/1"}\nnot json\n')
    out = str(tmp_path / "o")
    for arguments, said in [
        (["label", "--candidates", str(tmp_path / "empty.jsonl"), "--out", out], "is empty"),
        (["label", "--candidates", str(tmp_path / "broken.jsonl"), "--out", out], "line 2"),
        (["label", "--candidates", "nowhere.jsonl", "--out", out], "cannot read nowhere.jsonl"),
        (["calibrate", "--data", out, "--out", out, "--max_rows", "0"], "must be 1 or more"),
        (["resume", "--out", out], "no labelling job"),
        (["report", "--out", out], "no labelling job"),
        (["export", "--out", out, "--preferences", out], "no labelling job"),
    ]:
        assert main(["judge", *arguments]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q {i}", "answers": ["short", "rather longer"]},
        {"prompt": "q {i}", "chosen": "rather longer", "rejected": "short"},
        {"question": "q {i}", "response_a": "short", "response_b": "rather longer"},
    ],
)
def test_answers_from_elsewhere_are_labelled(tmp_path, row):
    lines = [json.dumps(row).replace("{i}", str(i)) for i in range(3)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines))
    out = tmp_path / "labels"
    arguments = ["--candidates", str(file), "--out", str(out), "--judge", "scripted:shortest"]
    assert main(["judge", "label", *arguments, "--canaries", "0"]) == 0
    found = prefopt.load_preferences(out / "preferences.jsonl")
    assert [group.prompt.text for group in found] == ["q 0", "q 1", "q 2"]
    for group in found:
        (preference,) = group.preferences
        assert group.answers[preference.chosen].text == "short"


@pytest.mark.parametrize("form", ["{}", "[{}]", "[{0}, {0}]"])
def test_calibrate_on_the_command_line(tmp_path, capsys, form):
    rows = [
        {"prompt": f"q {i}", "response_a": "short", "response_b": "rather longer", "label": "A"}
        for i in range(30)
    ]
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "c"
    assert main(["judge", "calibrate", "--data", form.format(data), "--out", str(out),
                 "--judge", "scripted:shortest"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "labelled: 30 pairs" in printed
    assert (out / "calibration.json").exists()


LOCAL_SERVER = "openai:qwen3@http://localhost:8000/v1"
PRICES = {
    "gpt-x": dict(
        input_usd_per_mtok=2,
        output_usd_per_mtok=8,
        cache_read_usd_per_mtok=0.5,
        cache_write_usd_per_mtok=2,
    )
}


def test_a_server_of_ones_own_is_estimated_as_free_and_goes_with_a_paid_second_judge(
    candidates, tmp_path, monkeypatch
):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not-a-real-key")
    alone = LabelConfig(candidates=candidates, out=str(tmp_path / "e"), judge=LOCAL_SERVER)
    assert estimate_labels(alone) == [("openai:qwen3", None)]
    cascade = LabelConfig(
        candidates=candidates,
        out=str(tmp_path / "e"),
        judge=LOCAL_SERVER,
        second_judge="anthropic:claude-sonnet-5-5",
        max_usd=3.0,
    )
    free, paid = estimate_labels(cascade)
    assert free == ("openai:qwen3", None)
    assert paid[1].low_usd > 0


def test_a_file_of_prices_makes_a_paid_server_possible_from_the_command(
    candidates, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-real-key")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(PRICES))
    words = ["judge", "estimate", "--candidates", candidates, "--out", str(tmp_path / "e")]
    words += ["--judge", "openai:gpt-x"]
    assert main(words) == 1
    assert "--prices" in capsys.readouterr().err
    assert main([*words, "--prices", str(path)]) == 0
    assert "openai:gpt-x: 96 calls" in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs max_usd"):
        label_candidates(
            LabelConfig(
                candidates=candidates, out=words[5], judge="openai:gpt-x", prices=str(path)
            ),
            progress=False,
        )


def test_other_prices_continue_the_same_job(config, tmp_path):
    label_candidates(config, progress=False)
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(PRICES))
    label_candidates(replace(config, prices=str(path)), progress=False)
    assert read_job(config.out).prices == str(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read the file of prices.*No such file"),
        (b"", "no file of prices.*Expected a JSON object.*output_usd_per_mtok"),
        (b"[]", "no file of prices: Expected `object`, got `array`"),
        (b'{"m": {"input_usd_per_mtok": 1}}', "missing required field"),
        (b'{"m": {"input": 1}}', "unknown field `input`"),
        (json.dumps({"m": PRICES["gpt-x"] | {"input_usd_per_mtok": -1}}).encode(), "0 or more"),
        (b"\xff", "no file of prices"),
    ],
)
def test_a_file_of_prices_that_cannot_be_used_is_refused(config, tmp_path, content, problem):
    path = tmp_path / "prices.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        estimate_labels(replace(config, prices=str(path)))


def test_a_copied_folder_is_a_job_of_its_own(config, tmp_path):
    label_candidates(config, progress=False)
    copied = str(tmp_path / "copied")
    shutil.copytree(config.out, copied)
    shutil.rmtree(config.out)
    assert resume_labels(copied, progress=False).folder == copied
    report_labels(copied)
    assert not Path(config.out).exists()


def test_without_verdicts_report_and_export_say_how_to_get_them(config):
    label_candidates(config, progress=False)
    Path(f"{config.out}/judged.jsonl").unlink()
    for ask in (lambda: report_labels(config.out), lambda: export_labels(config.out, "x.jsonl")):
        with pytest.raises(DataError, match=r"no .*judged.jsonl yet: `prefopt judge resume"):
            ask()


@pytest.mark.parametrize("address", ["localhost:8000/v1", "10.0.0.7:11434", "localhost"])
def test_an_address_without_http_is_not_taken_for_a_part_of_the_models_name(address):
    with pytest.raises(ValueError, match="begins with http"):
        load_judge(f"openai:qwen3@{address}")


def test_less_trust_in_the_judge_is_less_certainty(config, tmp_path):
    label_candidates(config, progress=False)

    def least(name, **options):
        found = export_labels(config.out, str(tmp_path / name), **options)
        return min(p.p_chosen for g in found.groups for p in g.preferences)

    assert least("half.jsonl", reliability=0.5) < least("all.jsonl", reliability=1.0) - 0.02
