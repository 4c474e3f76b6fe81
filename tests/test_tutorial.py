"""docs/tutorial.md, command by command: the shell's through `prefopt.cli.main`, Python's by `exec`."""

import re
import shlex
from pathlib import Path

import pytest

from prefopt.cli import main
from tests.tiny_models import save_tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"


def steps():
    """(language, block) in the page's order."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```(python|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def shown_outputs():
    """What the page says that the commands print."""
    return re.findall(r"^```text\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("model", ["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def test_the_tutorial_runs_as_written(model, tmp_path, monkeypatch, capsys):
    """With a tiny model on a few prompts; or (slow) with the model and the prompts of the page.

    Then what is printed is what the page shows, but for numbers: they hold on the machine of its run.
    """
    monkeypatch.chdir(tmp_path)
    if model == "tiny":
        save_tiny_model(tmp_path / "tiny", context=1024)
    printed = ""
    for language, block in steps():
        if language == "python":
            if model == "tiny":
                block = block.replace('load_prompts("everyday")', 'load_prompts("everyday")[:16]')
                block = block.replace("held_out=60", "held_out=4")
            exec(compile(block, PAGE.name, "exec"), {})
        for command in block.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True) if language == "bash" else []
            if words[:1] == ["prefopt"]:
                words = ["tiny" if word == "demo" else word for word in words]
                if model == "demo":
                    words = ["demo" if word == "tiny" else word for word in words]
                else:
                    words = ["6" if word == "64" else word for word in words]
                assert main(words[1:]) == 0, command
        told = capsys.readouterr()
        printed += told.out + told.err
    for name in (
        "labels/preferences.jsonl",
        "labels/report/label_report.html",
        "report/report.html",
    ):
        assert (tmp_path / name).is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    if model == "demo":
        lines = {plain(line) for line in printed.splitlines()}
        shown = [line for output in shown_outputs() for line in output.splitlines()]
        # An answer's words are those of one machine, and so may be what is found in the figures.
        words = re.compile(r" *(before|after) |          | *…$")
        kept = [line for line in shown if line.strip() and not words.match(line)]
        missing = [line for line in kept if plain(line) not in lines]
        assert len(kept) > 25
        assert len(missing) <= 3, missing


def plain(line):
    return re.sub(r"[\d.,]*\d%?|#+ *$", "#", " ".join(line.split()))
