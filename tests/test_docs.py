"""What the documentation shows is true: its Python runs, its options exist, its files are there."""

import ast
import re
from pathlib import Path

import pytest

from prefopt.cli import build_parser
from prefopt.losses import LOSS_NAMES
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_in_the_docs_names_only_what_exists(page):
    import prefopt

    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "prefopt":
                assert hasattr(prefopt, node.attr), node.attr
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prefopt"):
                module = __import__(node.module, fromlist=["_"])
                assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("page", ["README.md", "docs/own-data.md"])
def test_the_five_calls_of_the_docs_run_as_written(page, tmp_path, monkeypatch):
    """With a tiny model and an offline judge in place of the named ones."""
    block = next(b for b in blocks(ROOT / page, "python") if "train_dpo" in b)
    tiny_model = save_tiny_model(tmp_path / "tiny", context=1024)
    prompts = "".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(12))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    monkeypatch.chdir(tmp_path)
    block = block.replace("Qwen/Qwen3-0.6B", tiny_model)
    block = block.replace("anthropic:claude-sonnet-5-5", "scripted:shortest")
    block = block.replace(", k=4)", ", k=2, settings=prefopt.SamplingSettings(max_new_tokens=8))")
    exec(compile(block, page, "exec"), {})
    assert (tmp_path / "report" / "report.html").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_judge_of_the_docs_runs_as_written(monkeypatch):
    from prefopt.types import Candidate, Comparison, Prompt

    block = next(b for b in blocks(ROOT / "docs" / "own-data.md", "python") if "FewerQuestion" in b)
    names = {}
    exec(compile(block, "docs/own-data.md", "exec"), names)
    prompt = Prompt.from_text("p")
    comparison = Comparison(
        a=Candidate(prompt=prompt, text="What? Why?", model="m"),
        b=Candidate(prompt=prompt, text="Because.", model="m"),
    )
    judge = names["FewerQuestionMarks"]()
    (judged,) = names["judge_comparisons"]([comparison], judge, progress=False)
    assert judged.mean_grade == -1


def test_the_callbacks_of_the_docs_run_as_written(tmp_path, monkeypatch):
    """With a tiny model, an offline judge, no tracker, and an evaluation after every step."""
    tiny_model = save_tiny_model(tmp_path / "tiny", context=1024)
    row = '{"prompt": "What is %d?", "chosen": " one thing", "rejected": " another"}\n'
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(row % i for i in range(4)))
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(ROOT / "docs" / "callbacks.md", "python"):
        for shown, run in {
            "Qwen/Qwen3-0.6B": tiny_model,
            "anthropic:claude-sonnet-5-5": "scripted:shortest",
            "_steps=50": "_steps=1",
            "max_usd=2.0": "max_new_tokens=4",
            "max_new_tokens=128": "max_new_tokens=4",
            'report_to="tensorboard",': 'report_to="none", use_cpu=True, bf16=False, max_steps=2,',
            "load_dataset(": "load_dataset(cache_dir='cache', path=",
        }.items():
            block = block.replace(shown, run)
        exec(compile(block, "docs/callbacks.md", "exec"), names)
    assert (tmp_path / "out" / "sampled_answers.jsonl").is_file()
    assert "eval_win_rate" in names["trainer"].evaluate()


def test_the_dpo_script_of_the_docs_runs_as_written(tmp_path, monkeypatch):
    """With a tiny model, and the row of K answers that the page shows among the pairs' rows."""
    tiny_model = save_tiny_model(tmp_path / "tiny", context=1024)
    page = ROOT / "docs" / "dpo.md"
    (row,) = blocks(page, "json")
    (tmp_path / "pairs.jsonl").write_text(row * 4)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(page, "python")
    for shown, run in {
        "Qwen/Qwen3-0.6B": tiny_model,
        'output_dir="out",': 'output_dir="out", report_to="none", use_cpu=True, bf16=False,',
        "load_dataset(": "load_dataset(cache_dir='cache', path=",
    }.items():
        block = block.replace(shown, run)
    names = {}
    exec(compile(block, "docs/dpo.md", "exec"), names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert names["trainer"].scoring.way == "tree"
    assert all(f"`{name}`" in page.read_text(encoding="utf-8") for name in LOSS_NAMES)


def test_the_reward_model_of_the_docs_runs_as_written(tmp_path, monkeypatch):
    """With a tiny model in place of the named one: trained, measured, exported, trained again."""
    tiny_model = save_tiny_model(tmp_path / "tiny", context=1024)
    row = '{"prompt": "What is %d?", "chosen": " one thing", "rejected": " another"}\n'
    for name in ("pairs", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(row % i for i in range(4)))
    monkeypatch.chdir(tmp_path)
    names = {}
    for index, block in enumerate(blocks(ROOT / "docs" / "reward-model.md", "python")):
        for shown, run in {
            "Qwen/Qwen3-0.6B": tiny_model,
            'output_dir="out"': 'output_dir="out", report_to="none", use_cpu=True, bf16=False',
            "load_dataset(": "load_dataset(cache_dir='cache', path=",
        }.items():
            block = block.replace(shown, run)
        exec(compile(block, "docs/reward-model.md", "exec"), names)
        if index == 0:
            names["reward"].to_sequence_classification("folder")
        if index == 1:
            answer = names["messages"][1]["content"]
            (ours,) = names["reward"].score([names["prompt"]], [[answer]])
            assert abs(names["score"].item() - ours[0]) < 1e-3
    assert (tmp_path / "reward_too" / "heads.safetensors").is_file()


def test_the_ppo_scripts_of_the_docs_run_as_written(tmp_path, monkeypatch):
    """With a tiny model and reward model, and few and short answers."""
    from prefopt.models import LoRASettings, load_model, lora_config
    from prefopt.training.reward_model import RewardModel

    tiny_model = save_tiny_model(tmp_path / "tiny", context=1024)
    reward = RewardModel.new(load_model(tiny_model), peft_config=lora_config(LoRASettings(r=2)))
    reward.save(tmp_path / "reward-model")
    prompts = "".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(3))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    monkeypatch.chdir(tmp_path)
    call, script = blocks(ROOT / "docs" / "ppo.md", "python")
    for shown, run in {
        "Qwen/Qwen3-0.6B": tiny_model,
        "rollouts=100": "max_new_tokens=4, rollouts=2",
        "prompts_per_rollout=64": "prompts_per_rollout=2",
    }.items():
        call = call.replace(shown, run)
    exec(compile(call, "docs/ppo.md", "exec"), {})
    assert (tmp_path / "adapter" / "rollouts.jsonl").is_file()
    for shown, run in {
        "Qwen/Qwen3-0.6B": tiny_model,
        'output_dir="out", num_rollouts=100': 'output_dir="out", num_rollouts=2, max_new_tokens=4, '
        'report_to="none", use_cpu=True, per_device_train_batch_size=2',
        "load_dataset(": "load_dataset(cache_dir='cache', path=",
    }.items():
        script = script.replace(shown, run)
    names = {}
    exec(compile(script, "docs/ppo.md", "exec"), names)
    assert names["trainer"].state.global_step == 8
    assert (tmp_path / "adapter" / "value" / "heads.safetensors").is_file()


def test_the_sft_script_of_the_docs_runs_as_written(tmp_path, monkeypatch):
    """With a tiny model and rows of its own."""
    tiny_model = save_tiny_model(tmp_path / "tiny", context=1024)
    rows = '{"prompt": "What is %d?", "chosen": " one thing", "rejected": " another"}\n'
    (tmp_path / "preferences.jsonl").write_text("".join(rows % i for i in range(9)))
    (tmp_path / "general.jsonl").write_text('{"text": "The sky is blue."}\n')
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "sft.md", "python")
    names = {}
    exec(compile(block.replace("Qwen/Qwen3-0.6B", tiny_model), "docs/sft.md", "exec"), names)
    assert (names["result"].n_demonstrations, names["result"].n_replay) == (9, 1)


def test_the_replay_scripts_of_the_docs_run_as_written(tmp_path, monkeypatch):
    """With a tiny model: general rows beside preferences, by the function and by the trainer."""
    tiny_model = save_tiny_model(tmp_path / "tiny", context=1024)
    rows = '{"prompt": "What is %d?", "chosen": " one thing", "rejected": " another"}\n'
    (tmp_path / "preferences.jsonl").write_text("".join(rows % i for i in range(4)))
    (tmp_path / "general.jsonl").write_text('{"text": "The sky is blue."}\n')
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(ROOT / "docs" / "forgetting.md", "python"):
        for shown, run in {
            "Qwen/Qwen3-0.6B": tiny_model,
            'output_dir="out"': 'output_dir="out", report_to="none", use_cpu=True, bf16=False',
            "load_dataset(": "load_dataset(cache_dir='cache', path=",
        }.items():
            block = block.replace(shown, run)
        exec(compile(block, "docs/forgetting.md", "exec"), names)
    assert names["result"].n_replay == 1
    names["trainer"].train()
    assert names["trainer"]._replay.per_step == 1


def test_options_named_in_the_docs_exist():
    help_text = build_parser().format_help() + "".join(
        sub.format_help() for sub in build_parser()._subcommands_action._name_parser_map.values()
    )
    for page in PAGES:
        for block in blocks(page, "bash"):
            for option in re.findall(r"prefopt [^\n]*?(--[a-z_.]+)", block):
                assert option in help_text or option == "--print_config", f"{page.name}: {option}"


def test_the_yaml_of_the_docs_is_accepted(tmp_path):
    (block,) = blocks(ROOT / "docs" / "own-data.md", "yaml")
    (tmp_path / "my.yaml").write_text(block)
    parsed = build_parser().parse_args(["run", "--config", str(tmp_path / "my.yaml"), "--out", "x"])
    assert parsed.run.judge == "anthropic:claude-sonnet-5-5"


def test_files_linked_in_the_readme_are_in_the_repository():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_the_readme_shows_its_result_within_the_first_thirty_lines():
    head = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30]
    assert any("make quickstart" in line for line in head)
    assert any(".png" in line for line in head)
    assert any("%" in line for line in head)
