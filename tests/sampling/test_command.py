"""`prefopt sample`: several models into one file, and what is left of a killed command."""

import json
import re
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.data.records import read_records
from prefopt.types import Candidate
from tests.tiny_models import save_tiny_model


def test_several_models_fill_one_file(tmp_path, tiny_model, capsys):
    other = save_tiny_model(tmp_path / "other", seed=1)
    (tmp_path / "prompts.txt").write_text("Hi\nWhy?\n", encoding="utf-8")
    shared = [
        "--prompts", str(tmp_path / "prompts.txt"), "--k", "2", "--sampling.max_new_tokens", "4",
    ]  # fmt: skip
    out = tmp_path / "pool.jsonl"
    given = ["--model", tiny_model, "--model", other]
    assert main(["sample", *given, *shared, "--out", str(out)]) == 0
    assert "8 answers to 2 prompts" in capsys.readouterr().out
    found = read_records(out, Candidate)
    assert [c.model for c in found] == [tiny_model, tiny_model, other, other] * 2
    assert sorted(p.name for p in tmp_path.glob("pool*")) == [
        "pool.jsonl", "pool.jsonl.settings.json",
    ]  # fmt: skip
    said = json.loads((tmp_path / "pool.jsonl.settings.json").read_text())
    assert said["model"] == [tiny_model, other]
    assert said["sampling"]["max_new_tokens"] == 4
    again = tmp_path / "again.jsonl"
    assert main(["sample", "--model", f"[{tiny_model},{other}]", *shared, "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "anthropic:claude-haiku-5-5"], "needs max_usd"),
        (["--model", "openai:m@localhost:8000"], "begins with http"),
        (["--model", "demo", "--model", "demo"], "could not be told apart"),
        (["--model", "a", "--model", "b", "--adapter", "c"], "adapter goes with one model"),
        (["--prices", "no-such-file.json", "--model", "anthropic:m"], "no-such-file.json"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_sampled(given, said, tmp_path, capsys):
    assert main(["sample", *given, "--out", str(tmp_path / "out.jsonl")]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_the_docs_run_as_written(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "sampling.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    block = block.replace("Qwen/Qwen3-0.6B", save_tiny_model(tmp_path, context=512)).replace(
        '"everyday")', '"everyday")[:2]'
    )
    names = {}
    exec(compile(block.replace(", k=4", ", k=2, progress=False"), str(page), "exec"), names)
    assert len(names["candidates"]) == 4
