"""docs/evaluation-statistics.md runs as written."""

from __future__ import annotations

import re
from pathlib import Path

from prefopt.data.records import write_records
from prefopt.types import Candidate, Prompt

PAGE = Path(__file__).parents[2] / "docs" / "evaluation-statistics.md"


def test_the_page_runs_as_written(tmp_path, monkeypatch, capsys) -> None:
    """With an offline judge, on answers of which the tuned ones are the shorter in two of three."""
    monkeypatch.chdir(tmp_path)
    prompts = [Prompt.from_text(f"Question {i}") for i in range(90)]
    for name, length in (("tuned", lambda i: 4 + i % 5), ("base", lambda i: 4 + i % 7)):
        write_records(
            tmp_path / f"{name}.jsonl",
            [
                Candidate(prompt=p, text="**word** " * length(i), model=name)
                for i, p in enumerate(prompts)
            ],
        )
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
    code = code.replace("anthropic:claude-sonnet-5-5", "scripted:shortest")
    code = code.replace("max_usd=5.0,", "progress=False,")
    names: dict[str, object] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    assert names["report"].stopping is not None
    printed = capsys.readouterr().out
    assert "without a verdict" in printed
    assert "->" in printed


def test_the_figures_of_the_page_are_what_the_functions_give() -> None:
    from prefopt.evaluation.win_rate import mde_points

    text = PAGE.read_text("utf-8")
    assert "240 prompts show a difference of\n9 points" in text
    assert round(mde_points(240)) == 9
    assert "56 % are ties, 6 points" in text
    assert round(mde_points(240, spread=(1 - 0.56) ** 0.5 / 2)) == 6
