"""What the documentation shows is true: its Python runs, its commands exist, its links lead somewhere.

Every Python block of a page is executed, all blocks of a page in one namespace and folder, with a tiny
model and an offline judge in place of the named ones. Pages whose blocks need more than the files
below have a test of their own, which `OWN_TEST` names.
"""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from prefopt.cli import build_parser
from prefopt.losses import LOSS_NAMES
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

OWN_TEST = {
    "README.md": "tests/test_docs.py::test_the_readme_runs_as_written",
    "own-data.md": "tests/test_docs.py::test_the_judge_of_the_docs_runs_as_written",
    "callbacks.md": "tests/test_docs.py::test_the_callbacks_of_the_docs_run_as_written",
    "dpo.md": "tests/test_docs.py::test_the_dpo_script_of_the_docs_runs_as_written",
    "reward-model.md": "tests/test_docs.py::test_the_reward_model_of_the_docs_runs_as_written",
    "ppo.md": "tests/test_docs.py::test_the_ppo_scripts_of_the_docs_run_as_written",
    "sft.md": "tests/test_docs.py::test_the_sft_script_of_the_docs_runs_as_written",
    "forgetting.md": "tests/test_docs.py::test_the_replay_scripts_of_the_docs_run_as_written",
    "online.md": "tests/test_docs.py::test_the_online_scripts_of_the_docs_run_as_written",
    "history.md": "tests/test_docs.py::test_the_history_of_the_docs_runs_as_written",
    "advise.md": "tests/test_docs.py::test_the_advice_of_the_docs_runs_as_written",
    "serving.md": "tests/test_docs.py::test_an_adapter_loads_as_the_docs_say",
    "tutorial.md": "tests/test_tutorial.py::test_the_tutorial_runs_as_written",
    "capabilities.md": "tests/evaluation/test_capabilities.py::"
    "test_the_code_of_the_docs_runs_as_written",
    "evaluation-statistics.md": "tests/evaluation/test_statistics_page.py::"
    "test_the_page_runs_as_written",
    "sampling.md": "tests/sampling/test_command.py::test_the_docs_run_as_written",
}


def blocks(page, language):
    """The fenced blocks of a language, also those that stand in a list, as they are meant."""
    found = re.finditer(
        rf"^( *)```{language}\n(.*?)^ *```",
        page.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    return [re.sub(rf"^{m[1]}", "", m[2], flags=re.MULTILINE) for m in found]


def page_id(page):
    return page.relative_to(ROOT).as_posix()


def run_block(block, name, names, **shown_and_run):
    for shown, run in shown_and_run.items():
        block = block.replace(shown, run)
    exec(compile(block, name, "exec"), names)
    return names


def fast(tiny_model, **more):
    """What stands in the docs -> what the tests run instead."""
    return {
        "Qwen/Qwen3-0.6B": tiny_model,
        "anthropic:claude-sonnet-5-5": "scripted:shortest",
        'output_dir="out"': 'output_dir="out", report_to="none", use_cpu=True, bf16=False',
        "load_dataset(": "load_dataset(cache_dir='cache', path=",
        **more,
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the docs' user stands: a tiny model, and files of the names that the pages use."""
    save_tiny_model(tmp_path / "tiny", context=1024)
    rows = '{"prompt": "What is %d?", "chosen": " one thing", "rejected": " another"}\n'
    for name in ("preferences", "pairs", "train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows % i for i in range(4)))
    (tmp_path / "general.jsonl").write_text('{"text": "The sky is blue."}\n')
    prompts = "".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(12))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "preferences.jsonl").write_text("".join(rows % i for i in range(12)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Python -------------------------------------------------------------------------------------


PLAIN = [p for p in PAGES if p.name not in OWN_TEST and blocks(p, "python")]


@pytest.mark.parametrize("page", PLAIN, ids=page_id)
def test_the_python_of_a_page_runs_as_written(page, folder, capsys):
    """And prints what stands behind `print(...)  # `, up to a colon, and the rows of a table."""
    names = {}
    for block in blocks(page, "python"):
        run_block(block, page.name, names, **fast(str(folder / "tiny"), **{'"demo"': '"tiny"'}))
        printed = capsys.readouterr().out
        for shown in re.findall(r"^print\(.*\)  # (.*?)(?:: .*)?$", block, re.MULTILINE):
            assert shown in printed
        rows = [line for line in printed.splitlines() if line.startswith("| ")]
        assert all(row in page.read_text(encoding="utf-8") for row in rows)


@pytest.mark.parametrize("name", OWN_TEST)
def test_a_page_with_a_test_of_its_own_really_has_it(name):
    file, test = OWN_TEST[name].split("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {test}\(", text, re.MULTILINE)
    assert name in text
    assert any(page.name == name and blocks(page, "python") for page in PAGES), "nothing to run"


def test_the_readme_runs_as_written(folder):
    """README.md: the five calls, which stand in docs/own-data.md too, and the classic path."""
    five, classic = blocks(ROOT / "README.md", "python")
    assert five in blocks(DOCS / "own-data.md", "python")
    tiny = {
        ", k=4)": ", k=2, settings=prefopt.SamplingSettings(max_new_tokens=8))",
        'reward="reward-model", out="adapter")': 'reward="reward-model", out="adapter2", settings='
        "prefopt.PPOSettings(rollouts=1, prompts_per_rollout=2, max_new_tokens=4))",
    }
    for block in (five, classic):
        run_block(block, "README.md", {}, **fast(str(folder / "tiny"), **tiny))
    assert (folder / "report" / "report.html").is_file()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "adapter2" / "adapter_model.safetensors").is_file()


def test_the_judge_of_the_docs_runs_as_written():
    from prefopt.types import Candidate, Comparison, Prompt

    _, block = blocks(DOCS / "own-data.md", "python")
    names = run_block(block, "own-data.md", {})
    prompt = Prompt.from_text("p")
    comparison = Comparison(
        a=Candidate(prompt=prompt, text="What? Why?", model="m"),
        b=Candidate(prompt=prompt, text="Because.", model="m"),
    )
    judge = names["FewerQuestionMarks"]()
    (judged,) = names["judge_comparisons"]([comparison], judge, progress=False)
    assert judged.mean_grade == -1


def test_the_callbacks_of_the_docs_run_as_written(folder):
    """With no tracker, and an evaluation after every step."""
    more = {
        "_steps=50": "_steps=1",
        "max_usd=2.0": "max_new_tokens=4",
        "max_new_tokens=128": "max_new_tokens=4",
        'report_to="tensorboard",': 'report_to="none", use_cpu=True, bf16=False, max_steps=2,',
        'output_dir="out"': 'output_dir="out"',
    }
    names = {}
    for block in blocks(DOCS / "callbacks.md", "python"):
        run_block(block, "callbacks.md", names, **fast(str(folder / "tiny"), **more))
    assert (folder / "out" / "sampled_answers.jsonl").is_file()
    assert "eval_win_rate" in names["trainer"].evaluate()


def test_the_dpo_script_of_the_docs_runs_as_written(folder):
    """On the row of K answers that the page shows among the pairs' rows."""
    page = DOCS / "dpo.md"
    (row,) = blocks(page, "json")
    (folder / "pairs.jsonl").write_text(row * 4)
    (block,) = blocks(page, "python")
    names = run_block(block, "dpo.md", {}, **fast(str(folder / "tiny")))
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert names["trainer"].scoring.way == "tree"
    assert all(f"`{name}`" in page.read_text(encoding="utf-8") for name in LOSS_NAMES)


def test_the_reward_model_of_the_docs_runs_as_written(folder):
    """Trained, measured, exported, trained again."""
    names = {}
    for index, block in enumerate(blocks(DOCS / "reward-model.md", "python")):
        run_block(block, "reward-model.md", names, **fast(str(folder / "tiny")))
        if index == 0:
            names["reward"].to_sequence_classification("folder")
        if index == 1:
            answer = names["messages"][1]["content"]
            (ours,) = names["reward"].score([names["prompt"]], [[answer]])
            assert abs(names["score"].item() - ours[0]) < 1e-3
    assert (folder / "reward_too" / "heads.safetensors").is_file()


def test_the_ppo_scripts_of_the_docs_run_as_written(folder):
    """With a tiny reward model, and few and short answers."""
    from prefopt.models import LoRASettings, load_model, lora_config
    from prefopt.training.reward_model import RewardModel

    model = load_model(str(folder / "tiny"))
    reward = RewardModel.new(model, peft_config=lora_config(LoRASettings(r=2)))
    reward.save(folder / "reward-model")
    (folder / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(3))
    )
    call, script = blocks(DOCS / "ppo.md", "python")
    run_block(call, "ppo.md", {}, **fast(str(folder / "tiny"), **{
        "rollouts=100": "max_new_tokens=4, rollouts=2",
        "prompts_per_rollout=64": "prompts_per_rollout=2",
    }))  # fmt: skip
    assert (folder / "adapter" / "rollouts.jsonl").is_file()
    names = run_block(script, "ppo.md", {}, **fast(str(folder / "tiny"), **{
        "num_rollouts=100": "num_rollouts=2, max_new_tokens=4, per_device_train_batch_size=2",
    }))  # fmt: skip
    assert names["trainer"].state.global_step == 8
    assert (folder / "adapter" / "value" / "heads.safetensors").is_file()


def test_the_sft_script_of_the_docs_runs_as_written(folder):
    rows = (folder / "labels" / "preferences.jsonl").read_text().splitlines(keepends=True)
    (folder / "preferences.jsonl").write_text("".join(rows[:9]))
    (block,) = blocks(DOCS / "sft.md", "python")
    result = run_block(block, "sft.md", {}, **fast(str(folder / "tiny")))["result"]
    assert (result.n_demonstrations, result.n_replay) == (9, 1)


def test_the_replay_scripts_of_the_docs_run_as_written(folder):
    """General rows beside preferences, by the function and by the trainer."""
    names = {}
    for block in blocks(DOCS / "forgetting.md", "python"):
        run_block(block, "forgetting.md", names, **fast(str(folder / "tiny")))
    assert names["result"].n_replay == 1
    names["trainer"].train()
    assert names["trainer"]._replay.per_step == 1


def test_the_online_scripts_of_the_docs_run_as_written(folder):
    """The configuration is accepted; the trainer makes one step."""
    from datasets import Dataset

    more = {"num_rollouts=200": 'num_rollouts=1, report_to="none", use_cpu=True, max_new_tokens=8'}
    names = {}
    for block in blocks(DOCS / "online.md", "python"):
        run_block(block, "online.md", names, **fast(str(folder / "tiny"), **more))
    assert names["config"].rounds == 2
    names["OnlineDPOConfig"] = _small_batches(names["OnlineDPOConfig"])
    names["train"]("tiny", Dataset.from_list([{"prompt": f"What is {i}?"} for i in range(2)]))
    assert (folder / "runs" / "online_dpo").is_dir()


def _small_batches(config):
    return lambda *given, **options: config(*given, per_device_train_batch_size=2, **options)


def test_the_history_of_the_docs_runs_as_written(folder):
    from prefopt import Candidate, Prompt, evaluate_answers, write_records

    prompts = [Prompt.from_text(f"Question {i}") for i in range(4)]
    for name, n in (("tuned", 3), ("base", 5)):
        answers = [Candidate(prompt=p, text="word " * n, model=name) for p in prompts]
        write_records(f"{name}.jsonl", answers)
    evaluate_answers(
        "tuned.jsonl", "base.jsonl", "report", judge="scripted:longest", progress=False
    )
    (block,) = blocks(DOCS / "history.md", "python")
    names = run_block(block, "history.md", {})
    assert names["latest"].number == 1
    assert names["n_lost"] == len(names["lost"]) == 4


def test_the_advice_of_the_docs_runs_as_written(folder, capsys):
    (folder / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(20))
    )
    (block,) = blocks(DOCS / "advise.md", "python")
    run_block(block, "advise.md", {}, **{
        'prompts="everyday"': 'prompts="prompts.jsonl", progress=False, sampling=_sampling',
        'model="demo"': 'model="tiny"',
        "from prefopt": "import prefopt\n_sampling = prefopt.SamplingSettings(max_new_tokens=4)\n"
        "from prefopt",
    })  # fmt: skip
    assert (folder / "advice" / "advice.md").is_file()
    assert capsys.readouterr().out.strip()


def test_an_adapter_loads_as_the_docs_say(folder):
    """serving.md: with PEFT and transformers alone."""
    from peft import PeftModel

    from prefopt.models import LoRASettings, load_model, lora_config, wrap_with_adapter

    model = wrap_with_adapter(load_model("tiny").model, lora_config(LoRASettings(r=2)))
    model.save_pretrained("runs/first/adapter")
    (block,) = blocks(DOCS / "serving.md", "python")
    assert isinstance(
        run_block(block, "serving.md", {}, **fast(str(folder / "tiny")))["model"], PeftModel
    )


# --- Commands, files and links ------------------------------------------------------------------


def shown_commands(page):
    """`prefopt ...` in fenced and in indented blocks, each in one line, without what a shell adds."""
    text = "\n".join([*blocks(page, "bash"), *blocks(page, "sh")])
    text += "\n" + "\n".join(
        re.findall(r"^(?:    |- run: )(prefopt .*)$", page.read_text("utf-8"), re.MULTILINE)
    )
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|(?!\|)", line):
            found = re.match(
                r"\s*(?:accelerate launch .*-m )?prefopt(?: (.*))?$", part.replace("…", "")
            )
            if found:
                words = shlex.split(found[1] or "--help", comments=True)
                words = words[: words.index(">")] if ">" in words else words
                # "…" stands for what the page has shown before.
                yield [*words, "--out", "x"] if "…" in part and "--out" not in words else words


COMMANDS = [(page, words) for page in PAGES for words in shown_commands(page)]


def test_every_command_of_the_docs_is_accepted_with_all_its_options(folder, capsys):
    """By the real parser, which checks names, types, choices, and that nothing needed is missing."""
    from prefopt.cli import _several_models

    (folder / "my.yaml").write_text(blocks(DOCS / "own-data.md", "yaml")[0])
    refused = []
    for page, words in COMMANDS:
        try:
            build_parser().parse_args(_several_models(words))
        except SystemExit as end:
            if end.code != 0:  # --help and --print_config end with 0
                said = capsys.readouterr().err.strip().splitlines()[-1:]
                refused.append(f"{page.name}: prefopt {' '.join(words)}: {said}")
    assert len(COMMANDS) > 45
    assert not refused, "\n".join(refused)


def test_commands_named_in_the_text_exist():
    """`prefopt judge label` in a sentence, without options."""

    def names_below(commands):
        below = getattr(commands, "_subcommands_action", None)
        return {} if below is None else below._name_parser_map

    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for found in re.findall(r"`prefopt ((?:[a-z][a-z_-]*)(?: [a-z_-]+)?)", text):
            known = names_below(build_parser())
            for word in found.split():
                if known:
                    assert word in known, f"{page.name}: prefopt {found}"
                    known = names_below(known[word])


def test_the_yaml_of_the_docs_is_accepted(tmp_path):
    (block,) = blocks(DOCS / "own-data.md", "yaml")
    (tmp_path / "my.yaml").write_text(block)
    parsed = build_parser().parse_args(["run", "--config", str(tmp_path / "my.yaml"), "--out", "x"])
    assert parsed.run.judge == "anthropic:claude-sonnet-5-5"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files_and_headings_that_are_there(page):
    """`mkdocs build --strict` checks more; this runs without it."""
    for target in re.findall(r"\]\((?!http|#)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        there = page.parent / file
        assert there.exists(), target
        if heading and not heading.startswith("prefopt."):
            text = there.read_text(encoding="utf-8")
            slugs = {
                re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip())
                for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            }
            assert heading in slugs, target


def test_files_and_commands_of_the_repository_that_are_named_exist():
    """`benchmarks/x.py`, `benchmarks/results/x.md`, `tests/x.py`, `recipes/x.py` in any page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        pattern = r"(?:benchmarks|tests|recipes|constraints)/[\w/.-]*(?:\{[\w,]+\}[\w.]*|\w)"
        for name in re.findall(pattern, text):
            before, _, choices = name.partition("{")
            choices, _, after = choices.partition("}")
            for choice in choices.split(","):
                assert (ROOT / f"{before}{choice}{after}").exists(), f"{page.name}: {name}"


def test_options_of_benchmarks_that_are_named_exist():
    """`python benchmarks/x.py --only hh_helpful`, in the text or in a block."""
    found = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for script, rest in re.findall(r"python (benchmarks/\w+\.py)([^`#\n]*)", text):
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in re.findall(r"--[a-z_]+", rest):
                found += 1
                assert f'"{option}"' in source, f"{page.name}: {script} {option}"
    assert found > 5


def test_the_measured_ratios_of_the_comparison_are_those_of_the_results():
    """A new measurement changes README.md and docs/comparison.md too."""

    def bold(name, column):
        text = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8")
        rows = [line.split("|") for line in text.splitlines() if "**" in line and "|" in line]
        return sorted(float(re.sub(r"[^\d.]", "", row[column])) for row in rows)

    page = (DOCS / "comparison.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    dpo, ppo = bold("speed_dpo.md", 5), bold("speed_ppo.md", 4)
    for text in (page, readme):
        assert f"{dpo[0]:.1f} to {dpo[-1]:.1f} times less CPU" in " ".join(text.split())
    assert f"{ppo[0]:.1f} to {ppo[-1]:.1f} times less than TRL" in page
    assert f"{ppo[0]:.1f} to {ppo[-1]:.1f} times less CPU time" in " ".join(readme.split())
    memory, of_ppo = bold("speed_dpo.md", 8), bold("speed_ppo.md", 6)
    assert f"{memory[0]:.2f} to {memory[-1]:.2f} of its memory" in page
    assert f"{of_ppo[0]:.2f} to {of_ppo[-1]:.2f} of its memory" in page
    sampling = bold("speed_sampling.md", 6)
    assert f"{sampling[0]:.1f} and {sampling[-1]:.1f} times the tokens a second" in page


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS).as_posix()}\n" in text


def test_every_public_name_has_its_place_in_the_reference_and_says_what_it_is():
    import prefopt

    index = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"\[`(\w+)`\]\[prefopt\.([\w.]+)\]", index))
    assert set(listed) == set(prefopt.__all__) - {"__version__"}
    documented = "".join(p.read_text(encoding="utf-8") for p in (DOCS / "reference").glob("*.md"))
    modules = set(re.findall(r"^::: (prefopt[\w.]*)$", documented, re.MULTILINE))
    for name, place in listed.items():
        home = f"prefopt.{place.removesuffix(f'.{name}')}"
        assert home in modules, name
        assert getattr(import_module(home), name) is getattr(prefopt, name)
        assert (getattr(prefopt, name).__doc__ or "").strip(), name


def test_the_readme_shows_its_result_within_the_first_thirty_lines():
    head = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30]
    assert any("make quickstart" in line for line in head)
    assert any(".png" in line for line in head)
    assert any("%" in line for line in head)


# --- The site (slow: needs the docs extra) -------------------------------------------------------


@pytest.mark.slow
def test_the_pictures_are_those_that_the_script_draws(tmp_path):
    import subprocess
    import sys

    command = [sys.executable, str(DOCS / "build" / "pictures.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    drawn = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert drawn == {p.name: p.read_bytes() for p in (DOCS / "pictures").iterdir()}


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    """Scripts, styles, fonts and pictures are the site's own, and equations are MathML."""
    import subprocess
    import sys

    pytest.importorskip("mkdocs", reason="needs prefopt[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "\\(" not in re.sub(r"<(code|pre)\b.*?</\1>", "", text, flags=re.DOTALL), page
        foreign = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=\"https?:[^\"]*", text)
        foreign += [
            link
            for link in re.findall(r"<link[^>]*>", text)
            if "http" in link and 'rel="canonical"' not in link
        ]
        assert not foreign, (page, foreign)
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?https?:", style.read_text(encoding="utf-8")), style
    dpo = (tmp_path / "explain-dpo.html").read_text(encoding="utf-8")
    assert dpo.count("<math ") >= 20
    for name in json.loads((tmp_path / "search" / "search_index.json").read_text())["docs"][:1]:
        assert "location" in name
