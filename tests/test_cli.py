"""The command line: it teaches, refuses what it does not know, and does what the library does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from prefopt.cli import build_parser, main, run_recipe
from prefopt.exit_status import exit_status
from prefopt.flow import FlowConfig


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["sample"],
        ["train", "dpo"],
        ["train", "sft"],
        ["evaluate"],
        ["quickstart"],
        ["run"],
        ["classic"],
        ["online"],
        ["merge"],
    ]
    + [["judge", s] for s in ("estimate", "label", "resume", "report", "calibrate", "export")],
)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "Example: prefopt" in text or "  prefopt quickstart  " in text or "METHOD" in text
    for line in text.splitlines():
        if line.strip().startswith("--") and line.strip().count(" ") == 1 and "," not in line:
            name = line.strip().split()[0]
            after = text.split(line, 1)[1].splitlines()[1]
            assert after.strip(), f"{name} has no explanation"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--out", "x", "--betta", "1"],
        ["run", "--out", "x", "--dpo.betta", "1"],
        ["sample", "--out", "x", "--sampling.temprature", "1"],
    ],
)
def test_unknown_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "bett" in (err := capsys.readouterr().err) or "temprature" in err


def test_an_unknown_key_in_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("out: x\ndpo:\n  beta: 0.2\n  learning_rat: 1\n")
    with pytest.raises(SystemExit):
        main(["run", "--config", str(tmp_path / "c.yaml")])
    assert "learning_rat" in capsys.readouterr().err


def test_flags_and_a_file_give_the_same_configuration(tmp_path):
    parser = build_parser()
    (tmp_path / "c.yaml").write_text(
        "out: somewhere\nk: 3\ndpo:\n  beta: 0.2\n  loss: [sigmoid, sft]\nlora: {r: 8}\n"
    )
    from_file = parser.parse_args(["run", "--config", str(tmp_path / "c.yaml")]).run
    from_flags = parser.parse_args(
        ["run", "--out", "somewhere", "--k", "3", "--dpo.beta", "0.2",
         "--dpo.loss", "[sigmoid, sft]", "--lora.r", "8"]
    ).run  # fmt: skip
    assert from_file.dpo == from_flags.dpo
    assert from_file.lora == from_flags.lora
    assert (from_file.out, from_file.k) == ("somewhere", 3)


def test_a_wrong_value_is_told_on_one_page_with_exit_code_1(capsys, tmp_path):
    assert main(["run", "--out", str(tmp_path / "r"), "--k", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("prefopt: flow settings: k must be at least 2")
    assert "Traceback" not in error


def test_a_recipe_has_its_own_defaults_and_the_command_s_options(capsys, tmp_path):
    class Recipe(FlowConfig):
        """A recipe."""

    assert run_recipe(Recipe, ["--out", str(tmp_path / "r"), "--k", "1"]) == 1
    assert "k must be at least 2" in capsys.readouterr().err


def test_the_recipe_of_dpo_in_rounds_is_short_and_takes_the_flow_s_options(capsys, monkeypatch):
    import importlib

    from prefopt.online_flow import OnlineConfig

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes"))
    recipe = importlib.import_module("online_dpo")
    assert len(Path(recipe.__file__).read_text().splitlines()) <= 60
    assert issubclass(recipe.Online, OnlineConfig)
    assert run_recipe(recipe.Online, ["--rounds", "0"]) == 1
    assert "rounds must be at least 1" in capsys.readouterr().err


def test_the_recipe_of_the_classic_path_is_short_and_takes_the_flow_s_options(capsys, monkeypatch):
    import importlib

    from prefopt.classic_flow import ClassicConfig

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes"))
    recipe = importlib.import_module("classic_rlhf")
    assert len(Path(recipe.__file__).read_text().splitlines()) <= 60
    assert issubclass(recipe.Classic, ClassicConfig)
    assert run_recipe(recipe.Classic, ["--reward_held_out", "2"]) == 1
    assert "reward_held_out must be in (0, 1)" in capsys.readouterr().err


def test_the_steps_one_by_one(tiny_model, tmp_path, capsys):
    """sample -> judge -> train dpo -> evaluate, each reading what the last one wrote."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(6)))
    at = {name: str(tmp_path / name) for name in ("c.jsonl", "labels", "ad", "rep")}
    short = ["--sampling.max_new_tokens", "8", "--sampling.temperature", "1.0"]
    assert main(["sample", "--prompts", str(prompts), "--model", tiny_model, "--k", "3",
                 "--out", at["c.jsonl"], *short]) == 0  # fmt: skip
    assert main(["judge", "label", "--candidates", at["c.jsonl"], "--judge", "scripted:shortest",
                 "--out", at["labels"]]) == 0  # fmt: skip
    assert main(["train", "dpo", "--preferences", at["labels"] + "/preferences.jsonl",
                 "--model", tiny_model, "--out", at["ad"],
                 "--dpo.max_length", "128"]) == 0  # fmt: skip
    assert main(["evaluate", "--prompts", str(prompts), "--model", tiny_model,
                 "--adapter", at["ad"], "--judge", "scripted:shortest", "--out", at["rep"],
                 *short]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "18 answers to 6 prompts" in printed
    assert "preferences over" in printed
    assert "the reference was the base model" in printed
    assert "of 6 prompts" in printed
    assert (tmp_path / "rep" / "report.html").is_file()
    assert main(["evaluate", "--tuned_answers", str(tmp_path / "rep" / "answers_tuned.jsonl"),
                 "--base_answers", str(tmp_path / "rep" / "answers_base.jsonl"),
                 "--judge", "scripted:longest", "--out", str(tmp_path / "rep2")]) == 0  # fmt: skip
    assert main(["evaluate", "--prompts", str(prompts), "--out", at["rep"]]) == 1
    assert "needs the tuned adapter" in capsys.readouterr().err


def test_train_sft_takes_demonstrations_or_preferences(tiny_model, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text('{"prompt": "What?", "completion": "That."}\n' * 2)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Q", "chosen": "Ä", "rejected": "B"}\n')
    (tmp_path / "g.txt").write_text("The sky is blue.\n")
    common = ["train", "sft", "--model", tiny_model, "--sft.max_length", "64"]
    assert main([*common, "--data", str(tmp_path / "d.jsonl"), "--replay", str(tmp_path / "g.txt"),
                 "--sft.replay_share", "0.4", "--lora.r", "2",
                 "--out", str(tmp_path / "a")]) == 0  # fmt: skip
    assert "2 demonstrations and 1 general rows" in capsys.readouterr().out
    assert '"r": 2' in (tmp_path / "a" / "adapter_config.json").read_text()
    assert main([*common, "--preferences", str(tmp_path / "p.jsonl"), "--sft.tune", "full",
                 "--out", str(tmp_path / "b")]) == 0  # fmt: skip
    assert "1 demonstrations; left out: none" in capsys.readouterr().out
    assert (tmp_path / "b" / "model.safetensors").is_file()
    assert main([*common, "--out", str(tmp_path / "c")]) == 1
    assert "either --data or --preferences" in capsys.readouterr().err


def test_train_reward_and_then_ppo_on_it(tiny_model, tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "chosen": "Ä", "rejected": "rather long"} for i in range(4)]
    pairs, held_out = tmp_path / "p.jsonl", tmp_path / "held_out.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    held_out.write_text(json.dumps(rows[3]) + "\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    reward, common = str(tmp_path / "reward"), ["--model", tiny_model, "--lora.r", "2"]
    learn = ["train", "reward", "--preferences", str(pairs), "--out", reward, *common]
    assert main([*learn, "--held_out", str(tmp_path / "nowhere.jsonl")]) == 1
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "reward").exists()
    assert main([*learn, "--held_out", str(held_out), "--reward.max_length", "64"]) == 0
    printed = capsys.readouterr().out
    assert "learned from 3 pairs of 3 prompts (0 prompts left out" in printed
    assert "accuracy" in printed
    assert (tmp_path / "reward" / "reward_model.json").is_file()
    ppo = ["train", "ppo", "--prompts", str(prompts), *common, "--ppo.rollouts", "1",
           "--ppo.prompts_per_rollout", "2", "--ppo.max_new_tokens", "4"]  # fmt: skip
    for name, given in (("a", reward), ("b", "scripted:shortest")):
        out = tmp_path / name
        assert main([*ppo, "--reward", given, "--held_out", str(prompts), "--out", str(out)]) == 0
        assert (out / "adapter_model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert printed.count("8 answers to 2 prompts learned from") == 2
    assert "scripted:shortest is asked up to 24 questions" in printed
    out = str(tmp_path / "c")
    assert main([*ppo, "--reward", str(tmp_path), "--out", out]) == 1
    assert "holds no reward model" in capsys.readouterr().err
    assert main([*ppo, "--reward", "anthropic:claude-sonnet-5-5", "--out", out]) == 1
    assert "max_usd" in capsys.readouterr().err
    one = ["--ppo.answers_per_prompt", "1", "--reward", "scripted:shortest", "--out", out]
    assert main([*ppo, *one]) == 1
    assert "num_generations must be 2 or more" in capsys.readouterr().err


def test_the_help_is_there_at_once():
    """Nothing heavy is imported before there is work to do."""
    code = "import sys, prefopt.cli as c; c.build_parser(); print([m for m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "transformers", "trl", "peft", "datasets", "anthropic", "matplotlib"):
        assert f"'{heavy}'" not in out.stdout


@pytest.mark.parametrize("command", [["--help"], ["history", "list"]])
def test_output_that_nobody_reads_to_its_end_is_no_error(command, tmp_path):
    """As `prefopt history list | head -1`: no traceback, and the shells' code for a closed pipe."""
    from prefopt.evaluation.eval_report import build_report
    from prefopt.evaluation.history import History
    from tests.evaluation.judgements import scored

    report = build_report([scored(1.0)])
    (tmp_path / "report.json").write_bytes(msgspec.json.encode(report))
    with History(tmp_path / "h.sqlite") as history:
        history.add(tmp_path)
    options = ["--history", str(tmp_path / "h.sqlite")] if command == ["history", "list"] else []
    code = (
        "import sys\n"
        "from prefopt.cli import main\n"
        "sys.stdin.readline()\n"  # waits until the reader is gone
        "sys.exit(main(sys.argv[1:]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *command, *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    ) as process:  # fmt: skip
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.close()
        said = process.stderr.read()
    assert said == ""
    assert process.returncode == 141


def test_another_broken_pipe_is_not_hidden(monkeypatch):
    def fails():
        raise BrokenPipeError("a server went away")

    monkeypatch.setattr("prefopt.exit_status._nobody_reads", lambda: False)
    with pytest.raises(BrokenPipeError, match="server"):
        exit_status(fails)


def test_sigterm_is_told_and_undoes_what_a_block_undoes(capsys):
    import signal

    undone = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            undone.append(True)

    assert exit_status(work) == 143
    assert undone
    assert "stopped by SIGTERM; the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_is_no_traceback(capsys, tmp_path):
    def work():
        raise OSError(28, "No space left on device", str(tmp_path / "file"))

    assert exit_status(work) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "free space" in said
    assert str(tmp_path / "file") in said


def test_the_quickstart_has_its_own_settings_and_takes_others(capsys):
    """The pages name it first, so it shows what the tool can do, not `run`'s general defaults."""
    parser = build_parser()
    plain = parser.instantiate(parser.parse_args(["quickstart"])).quickstart
    assert (plain.out, plain.dpo.learning_rate, plain.sampling.top_k) == (
        "runs/quickstart", 1.55e-3, 40,
    )  # fmt: skip
    changed = parser.instantiate(
        parser.parse_args(["quickstart", "--seed", "2", "--dpo.beta", "0.5", "--out", "x"])
    ).quickstart
    assert (changed.seed, changed.dpo.beta, changed.dpo.learning_rate, changed.out) == (
        2, 0.5, 1.55e-3, "x",
    )  # fmt: skip
    assert main(["quickstart", "--k", "1", "--out", "y"]) == 1
    assert "k must be" in capsys.readouterr().err
