"""Evaluating a model, or the answers of two or more: until sure, with people's labels, with a gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from prefopt.data.records import read_records, write_records
from prefopt.errors import DataError
from prefopt.evaluation.evaluate import compare_models, evaluate_answers, evaluate_model
from prefopt.evaluation.frontier import find_checkpoints
from prefopt.evaluation.history import History
from prefopt.judges.scripted import shortest_wins
from prefopt.sampling.candidates import SamplingSettings
from prefopt.training.health import TrainingPoint
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


def three_models(n: int) -> dict[str, list[Candidate]]:
    """Each shorter than the one before; all answers under one name, as files often have them."""
    prompts = [Prompt.from_text(f"Question {i}", category="ab"[i % 2]) for i in range(n)]
    return {
        name: [
            Candidate(prompt=p, text=f"{name} " + "word " * (length + (i * 7) % 5), model="?")
            for i, p in enumerate(prompts)
        ]
        for name, length in (("base", 6), ("sft", 5), ("dpo", 4))
    }


def test_three_models_are_ranked_and_the_report_is_about_one_pair(tmp_path, caplog) -> None:
    with caplog.at_level("INFO"):
        report = compare_models(
            three_models(30), tmp_path, judge=shortest_wins(), progress=False, to_label=5
        )
    assert "3 models, 3 pairs, 30 prompts: 180 verdicts in both orders" in caplog.text
    assert (report.base_model, report.tuned_model) == ("base", "dpo")
    assert report.win_rate.n == 30
    assert report.ranking is not None
    assert report.ranking.n == 90
    assert {m.model for m in report.ranking.models} == {"base", "sft", "dpo"}
    assert report.ranking_at_equal_style is not None
    assert report.title == "dpo against base, and 3 models ranked"
    assert set(report.win_rate.by_category) == {"a", "b"}
    assert len(read_records(tmp_path / "judged_all.jsonl", JudgedComparison)) == 90
    assert len(read_records(tmp_path / "judged.jsonl", JudgedComparison)) == 30
    assert len((tmp_path / "to_label.jsonl").read_text().splitlines()) == 5
    html = (tmp_path / "report.html").read_text()
    assert "Ranking of 3 models" in html
    # A history takes the pair that the report is about.
    with History(tmp_path / "h.sqlite") as history:
        assert history.add(tmp_path).n == 30


def test_models_can_be_held_against_one_baseline_only(tmp_path) -> None:
    report = compare_models(
        three_models(20), tmp_path, judge=shortest_wins(), progress=False, pairs="baseline",
        baseline="sft", tuned="base",
    )  # fmt: skip
    assert (report.base_model, report.tuned_model) == ("sft", "base")
    assert report.ranking is not None
    assert report.ranking.n == 40
    pair = report.ranking.win_rate_of("dpo", "base")
    assert pair.n == 0  # never compared, ranked through the baseline
    assert pair.win_rate > 0.5


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["base"], {}, "at least two models"),
        (["base", "dpo"], {"baseline": "gpt"}, "baseline 'gpt' is none of"),
        (["base", "dpo", "sft"], {"stop": "decided"}, "for two models"),
        (["base", "dpo"], {"baseline": "dpo", "tuned": "dpo"}, "both 'dpo'"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(names, options, words, tmp_path) -> None:
    models = three_models(3)
    with pytest.raises(ValueError, match=words):
        compare_models(
            {name: models[name] for name in names}, tmp_path, judge=shortest_wins(), **options
        )
    assert not list(tmp_path.iterdir())


def test_models_with_other_prompts_are_refused_by_name(tmp_path) -> None:
    models = three_models(3)
    models["sft"] = models["sft"][:2]
    with pytest.raises(DataError, match="0 sft and 1 base"):
        compare_models(models, tmp_path, judge=shortest_wins(), progress=False)


def answer_files(folder: Path, n: int = 60) -> dict[str, str]:
    """The three models' answers as files."""
    paths = {}
    for name, answers in three_models(n).items():
        paths[name] = str(folder / f"{name}.jsonl")
        write_records(paths[name], answers)
    return paths


@pytest.mark.slow
def test_the_command_ranks_takes_labels_and_keeps_the_gate(tmp_path, capsys) -> None:
    paths = answer_files(tmp_path)
    command = ["evaluate", *(f"--answers.{n}={p}" for n, p in paths.items()),
               "--judge", "scripted:shortest", "--out", str(tmp_path / "r")]  # fmt: skip
    assert main([*command, "--to_label", "30"]) == 0
    assert "place 1" in capsys.readouterr().out
    to_label = tmp_path / "r" / "to_label.jsonl"
    rows = [json.loads(line) for line in to_label.read_text().splitlines()]
    for row in rows:
        row["label"] = "A" if row["response_a"].startswith("dpo") else "B"
    to_label.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate = ["--human_labels", str(to_label), "--gate", "--min_win_rate"]
    assert main([*command, *gate, "0.5"]) == 0
    assert "By people's standard:" in capsys.readouterr().out
    assert main([*command, *gate, "0.99"]) == 3
    assert "the gate is not passed" in capsys.readouterr().err
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["human"]["people_rate"] == 1.0
    assert report["human"]["agreement"]["n"] == 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min_win_rate", "0.5"], "add --gate"),
        (["--answers.a", "x", "--adapter", "y"], "--answers stands alone"),
        (["--baseline", "x"], "--baseline names one of --answers"),
        (["--answers.a", "x", "--answers.b", "y", "--capabilities", "offline"], "needs the model"),
        (["--answers.a", "x", "--answers.b", "y", "--checkpoints", "z"], "--checkpoints needs the"),
        (["--adapter", "y", "--checkpoints", "[here, there]"], "there is not there"),
        (["--adapter", "y", "--beta", "-1"], "beta must be positive"),
        (["--adapter", "y"], "y is not there. An adapter is a folder"),
        (["--adapter", "."], ". holds no adapter"),
        (["--answers.a", "nowhere.jsonl", "--answers.b", "y"], "nowhere.jsonl"),
        ([], "needs the tuned adapter"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_work(options, words, tmp_path, capsys) -> None:
    assert main(["evaluate", "--out", str(tmp_path / "r"), *options]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_answer_files_that_cannot_be_used_are_named(tmp_path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    write_records(good, sides(2)[0])
    bad.write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.jsonl is empty"):
        evaluate_answers(bad, good, tmp_path / "r", judge=shortest_wins())
    bad.write_bytes(good.read_bytes()[:-30] + b"\n{}\n")
    with pytest.raises(
        DataError, match=r"bad\.jsonl: 2 row\(s\) are not usable answers"
    ) as refused:
        evaluate_answers(good, bad, tmp_path / "r", judge=shortest_wins())
    assert len(refused.value.problems) == 2
    assert not (tmp_path / "r").exists()


def test_answers_from_elsewhere_are_compared(tmp_path) -> None:
    for name, answer in (("a", "short"), ("b", "rather longer")):
        rows = [{"prompt": f"p{i}", "response": f"{answer} {i}"} for i in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    report = evaluate_answers(a, b, tmp_path / "r", judge=shortest_wins())
    assert (report.win_rate.n_prompts, report.win_rate.win_rate) == (4, 1.0)


def test_missing_labels_are_noticed_before_judging(tmp_path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        evaluate_answers(
            *sides(5),
            tmp_path / "r",
            judge=shortest_wins(),
            human_labels=tmp_path / "nowhere.jsonl",
        )
    assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[Prompt]]:
    """A tiny model, an adapter of random weights with the log of a DPO training, and prompts."""
    import torch

    from prefopt.models import LoRASettings, load_model, lora_config, wrap_with_adapter
    from tests.tiny_models import save_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny_model(folder / "model", context=1024)
    torch.manual_seed(0)
    wrapped = wrap_with_adapter(load_model(model).model, lora_config(LoRASettings(r=4)))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(folder / "adapter")
    logged = TrainingPoint(
        step=1, epoch=1.0, loss=0.6, margin=0.2, accuracy=0.7, chosen_reward=0.1,
        rejected_reward=-0.1, chosen_logp=-9.0, rejected_logp=-9.0, learning_rate=1e-4,
        grad_norm=None,
    )  # fmt: skip
    write_records(folder / "adapter" / "training_log.jsonl", [logged])
    return model, folder / "adapter", [Prompt.from_text(f"What is {i}?") for i in range(6)]


def options(**more: Any) -> dict[str, Any]:
    """How the tiny model is evaluated."""
    return {
        "judge": shortest_wins(), "device": "cpu", "progress": False,
        "sampling": SamplingSettings(max_new_tokens=8), **more,
    }  # fmt: skip


def test_pairs_to_label_are_written_once_and_never_over_labels(tmp_path) -> None:
    with pytest.raises(ValueError, match="number of pairs, got -3"):
        evaluate_answers(*sides(5), tmp_path / "r", judge=shortest_wins(), to_label=-3)
    assert not (tmp_path / "r").exists()
    given = {"judge": shortest_wins(), "to_label": 3, "progress": False}
    evaluate_answers(*sides(5), tmp_path / "r", **given)
    path = tmp_path / "r" / "to_label.jsonl"
    assert len(path.read_text().splitlines()) == 3
    path.write_text("people's work")
    evaluate_answers(*sides(5), tmp_path / "r", **given)
    assert path.read_text() == "people's work"


def test_a_model_is_measured_with_its_adapter_on_and_off(tiny, tmp_path) -> None:
    """KL, implicit reward, the training log, and nothing sampled twice."""
    model, adapter, prompts = tiny
    report = evaluate_model(prompts, model, adapter, tmp_path, **options(beta=0.1))
    assert report.shift is not None
    assert report.shift.kl.n_prompts == 6
    assert report.shift.kl.value != 0.0
    assert report.shift.reward == pytest.approx(0.1 * report.shift.kl.value)
    assert report.training[-1].margin == 0.2
    assert report.answer_figures is not None
    assert report.capabilities is None
    assert "distance from the base model" in (tmp_path / "report.html").read_text()
    kept = {p.name: p.read_bytes() for p in tmp_path.glob(".answers_*.partial")}
    assert len(kept) == 2
    again = evaluate_model(prompts, model, adapter, tmp_path, **options())
    assert {p.name: p.read_bytes() for p in tmp_path.glob(".answers_*.partial")} == kept
    assert again.answers == report.answers


def test_capabilities_are_measured_on_request_and_a_folder_without_tasks_is_told_at_once(
    tiny, tmp_path
) -> None:
    model, adapter, prompts = tiny
    with pytest.raises(DataError, match=r"no \*\.yaml file"):
        evaluate_model(
            prompts, model, adapter, tmp_path / "no", **options(capabilities=str(tmp_path))
        )
    assert not (tmp_path / "no").exists()
    report = evaluate_model(
        prompts, model, adapter, tmp_path / "r",
        **options(capabilities="prefopt_plain_text", max_drop=10.0),
    )  # fmt: skip
    assert report.capabilities is not None
    assert [t.task for t in report.capabilities.tasks] == ["prefopt_plain_text"]
    assert report.capabilities.max_drop == 10.0
    assert report.capabilities.passed
    assert "could do before" in (tmp_path / "r" / "report.html").read_text()


def test_checkpoints_are_found_named_and_ordered(tmp_path) -> None:
    for name in ("run/checkpoint-9", "run/checkpoint-10", "other/checkpoint-9"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").touch()
    run, other = tmp_path / "run", tmp_path / "other" / "checkpoint-9"
    assert [c.name for c in find_checkpoints(run)] == ["checkpoint-9", "checkpoint-10"]
    assert [c.name for c in find_checkpoints([run, other])] == [
        "run/checkpoint-9", "run/checkpoint-10", "other/checkpoint-9",
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as refused:
        find_checkpoints([run, str(other.parent), other, tmp_path / "empty", tmp_path / "gone"])
    for words in ("checkpoint-9 is given 2 times", "empty holds no adapter", "gone is not there"):
        assert words in str(refused.value)
    with pytest.raises(DataError, match="none was given"):
        find_checkpoints([])


def test_checkpoints_are_in_the_picture_of_win_rate_against_kl(tiny, tmp_path, caplog) -> None:
    from safetensors.torch import load_file, save_file

    model, adapter, prompts = tiny
    start = tmp_path / "checkpoints" / "checkpoint-0"
    shutil.copytree(adapter, start)
    weights = load_file(start / "adapter_model.safetensors")
    save_file({k: 0 * v for k, v in weights.items()}, start / "adapter_model.safetensors")
    trained = tmp_path / "trained"
    shutil.copytree(adapter, trained)
    (trained / "README.md").write_text(
        "Trained with [prefopt]\n| reference | the base model |\n| loss | ipo, beta 0.25 |\n"
    )
    with caplog.at_level("INFO"):
        report = evaluate_model(
            prompts, model, trained, tmp_path / "r",
            **options(checkpoints=[start.parent, adapter]),
        )  # fmt: skip
    assert "beta 0.25, from" in caplog.text
    assert report.shift is not None
    assert report.shift.beta == 0.25
    first, last = report.frontier
    assert (first.name, last.name) == ("checkpoint-0", "adapter")
    # It has not moved, and answers as the base model does.
    assert (first.kl.value, first.win_rate, first.kl.n_prompts) == (0.0, 0.5, 6)
    # It is the tuned model under another name.
    assert last.kl.value == pytest.approx(report.shift.kl.value, rel=1e-4)  # other batches
    assert last.win_rate == report.win_rate.win_rate
    assert (
        "KL 0.00 nats an answer, preferred on 50 %" in report.details["Further model checkpoint-0"]
    )
    assert "checkpoint-0: KL 0.0" in (tmp_path / "r" / "report.html").read_text()
