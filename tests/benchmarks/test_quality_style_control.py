"""The comparison with Arena-Hard, on a made-up copy of its repository."""

from __future__ import annotations

import json
import random
import subprocess

import numpy as np
import pytest
from scipy.special import expit, logit

from benchmarks import quality_style_control as script

QUESTIONS = [f"q{i}" for i in range(60)]


def text(rng, level):
    return "\n".join(
        ["word " * rng.randint(5, 40 + 20 * level), *["- item"] * rng.randint(0, 3 + level)]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A git repository with the files the script reads, in one commit."""
    folder, rng = tmp_path_factory.mktemp("arena"), random.Random(0)

    def write(path, rows):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    for _, path in script.V2.values():
        rows = []
        for question in QUESTIONS:
            answer = text(rng, 1) + "\u2028**bold**"  # a line break that JSONL does not end at
            counts = script.arena_counts(answer)
            meta = {
                "token_len": int(1.3 * counts[0]) + rng.randint(0, 3),
                "header_count": {"h1": int(counts[1])},
                "list_count": {"ordered": 0, "unordered": int(counts[2])},
                "bold_count": {"**": int(counts[3]), "__": 0},
            }
            rows.append(
                {
                    "uid": question,
                    "metadata": meta,
                    "messages": [{}, {"content": {"answer": answer}}],
                }
            )
        write(path, rows)
    for model in script.V1:
        rows = [
            {"question_id": q, "choices": [{"turns": [{"content": "w " * n, "token_len": n + 2}]}]}
            for q in QUESTIONS
            for n in [rng.randint(5, 50)]
        ]
        write(f"data/arena-hard-v0.1/model_answer/{model}.jsonl", rows)
    for level, model in enumerate(script.MODELS):
        answers = [
            {"question_id": q, "choices": [{"turns": [text(rng, level % 3)]}]} for q in QUESTIONS
        ]
        write(f"data/arena-bench-v1/model_answer/{model}.jsonl", answers)
        name = "gpt-4-turbo" if model == "gpt-4-1106-preview" else model
        marks = [
            {"question_id": q, "score": None if i == 0 else rng.randint(1, 8 + level % 3)}
            for i, q in enumerate(QUESTIONS)
        ]
        write(f"data/arena-bench-v1/model_judgment/{name}.jsonl", marks)
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    return folder


def test_the_whole_comparison_runs_and_is_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "V2", {m: ("HEAD", path) for m, (_, path) in script.V2.items()})
    monkeypatch.setattr(script, "V1", dict.fromkeys(script.V1, "HEAD"))
    monkeypatch.setattr(script, "FORERUNNER", "HEAD")
    monkeypatch.setattr(script, "RUNS", 1)
    monkeypatch.setattr(script, "PROMPTS", 60)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setenv("PREFOPT_ARENA_HARD", str(folder))
    script.main()
    found = json.loads((tmp_path / "quality_style_control.json").read_text())
    assert found["features"]["same_count"] == {"headers": 1.0, "lists": 1.0, "bold": 1.0}
    assert found["features"]["answers"] == 120
    assert found["real"]["battles"] == 12 * 59  # a question without a mark is left out
    for row in found["real"]["models"].values():
        assert row["prefopt_at_mean_style"] == pytest.approx(row["arena_hard"], abs=0.3)
    assert "not reproduced here" in capsys.readouterr().out


def test_without_the_repository_only_the_simulation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "RUNS", 1)
    monkeypatch.setattr(script, "PROMPTS", 40)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.delenv("PREFOPT_ARENA_HARD", raising=False)
    script.main()
    assert "nothing is written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_simulation_says_what_it_simulates():
    battles, equal, at_mean = script.simulate(0)
    features = script.arena_features(battles)
    assert len(battles) == 5 * script.PROMPTS
    assert features[:, 0].mean() > 0.05  # better models write more
    shift = features.mean(0) @ np.array([2.0, 0.0, 3.0, 1.0])
    assert logit(at_mean["model-3"]) == pytest.approx(0.5 + shift)
    assert equal["model-3"] == pytest.approx(expit(0.5))
