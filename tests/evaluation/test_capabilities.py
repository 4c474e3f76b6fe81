"""lm-eval over one loaded model: a tiny random one with a random adapter, no network anywhere."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefopt.data.prompts import plain_texts
from prefopt.data.records import read_records
from prefopt.errors import DataError, ModelError, PrefoptError
from prefopt.evaluation import capability_tasks
from prefopt.evaluation.capabilities import compare_capabilities, measure_capabilities
from prefopt.evaluation.capability_engine import OFFLINE, WRITING
from prefopt.evaluation.capability_scores import SCORES_FILE, TaskScores, weights_hash
from prefopt.judges.scripted import shortest_wins
from prefopt.models import (
    LanguageModel,
    LoRASettings,
    load_model,
    lora_config,
    wrap_with_adapter,
)
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=1024)


def with_adapter(folder, *, scale=0.3, seed=0):
    """The tiny model with an adapter of random weights; scale 0 changes nothing."""
    base = load_model(str(folder))
    torch.manual_seed(seed)
    model = wrap_with_adapter(base.model, lora_config(LoRASettings(r=4)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return LanguageModel("tiny+adapter", model.eval(), base.tokenizer, "tiny")


@pytest.fixture(scope="module")
def tuned(folder):
    return with_adapter(folder)


def measure(tuned, **options):
    return measure_capabilities(tuned, progress=False, **options)


def scores_in(out):
    return {(s.side, s.task): s for s in read_records(out / SCORES_FILE, TaskScores)}


class Forwards:
    """Counts a model's forward passes."""

    def __init__(self, model):
        self.count = 0
        # Some versions of PEFT call the model's `forward` itself, past any hook of the model.
        self._handle = model.get_input_embeddings().register_forward_pre_hook(self._add)

    def _add(self, *_):
        self.count += 1

    def taken(self):
        count, self.count = self.count, 0
        return count


@pytest.fixture
def forwards(tuned):
    # The innermost model runs whether PEFT's wrapper is called or `generate`.
    counter = Forwards(tuned.model.get_base_model())
    yield counter
    counter._handle.remove()


def user_task(folder, name="pets", *, rows=None, text="doc_to_text: question\n", extra=""):
    """A folder with one multiple-choice task, as a user would write it."""
    folder.mkdir(exist_ok=True)
    rows = rows or [{"question": f"Item {i}?", "choices": ["a", "b"], "answer": i % 2}
                    for i in range(4)]  # fmt: skip
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ntask_alias: Pets at home\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {name}.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\n"
        f"{text}doc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n" + extra
    )
    return folder


@pytest.fixture(autouse=True)
def no_dataset_cache(monkeypatch, tmp_path):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


# The numbers are right.


def test_the_engine_agrees_with_our_own_perplexity_on_both_sides(tuned, tmp_path):
    report = measure(tuned, tasks="prefopt_plain_text", limit=5, out=tmp_path)
    by_hand = {}
    for side in ("tuned", "base"):
        losses = []
        for text in plain_texts()[:5]:
            ids = tuned.tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = torch.tensor([[tuned.tokenizer.bos_token_id, *ids]])
            with torch.no_grad():
                if side == "base":
                    with tuned.adapter_off():
                        logits = tuned.model(tokens).logits
                else:
                    logits = tuned.model(tokens).logits
            nll = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
            losses.append(nll.item() / len(text.encode()))
        by_hand[side] = losses
    found = scores_in(tmp_path)
    for side, losses in by_hand.items():
        ours = [item.score for item in found[side, "prefopt_plain_text"].items]
        assert ours == pytest.approx(losses, rel=1e-4)
    (task,) = report.tasks
    assert task.base == pytest.approx(sum(by_hand["base"]) / 5, rel=1e-4)
    assert task.change == pytest.approx(
        (sum(by_hand["tuned"]) - sum(by_hand["base"])) / 5, rel=1e-3
    )
    assert (task.metric, task.higher_is_better) == ("nll_per_byte", False)
    assert abs(task.change) > 0.01  # the adapter was on, and off


def test_the_engine_agrees_with_our_own_multiple_choice(tuned, tmp_path):
    """The most likely end of the begun answer, one forward pass a choice."""
    measure(tuned, tasks="prefopt_reasoning", limit=12, out=tmp_path)
    path = Path(capability_tasks.__file__).with_name("reasoning.jsonl")
    expected = []
    for line in path.read_text().splitlines()[:12]:
        row = json.loads(line)
        prompt = tuned.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        prompt += row["stem"]
        n = len(tuned.tokenizer.encode(prompt, add_special_tokens=False))
        likelihoods = []
        for choice in row["choices"]:
            text = f"{prompt} {choice}"
            ids = torch.tensor([tuned.tokenizer.encode(text, add_special_tokens=False)])
            with torch.no_grad():
                logps = tuned.model(ids).logits[0, n - 1 : -1].log_softmax(-1)
            likelihoods.append(logps.gather(1, ids[0, n:, None]).sum().item())
        expected.append(float(likelihoods.index(max(likelihoods)) == row["answer"]))
    found = [item.score for item in scores_in(tmp_path)["tuned", "prefopt_reasoning"].items]
    assert found == expected
    assert 0 < sum(expected) < 12


def test_written_answers_are_those_of_our_own_greedy_decoding(tuned, tmp_path):
    measure(tuned, tasks="prefopt_format", limit=3, out=tmp_path)
    path = Path(capability_tasks.__file__).with_name("format.jsonl")
    answers = [item.answer for item in scores_in(tmp_path)["base", "prefopt_format"].items]
    for line, answer in zip(path.read_text().splitlines(), answers, strict=False):
        ids = tuned.tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["question"]}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )["input_ids"]  # fmt: skip
        with tuned.adapter_off(), torch.no_grad():
            out = tuned.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=48,
                do_sample=False, pad_token_id=tuned.tokenizer.pad_token_id,
            )  # fmt: skip
        assert answer == tuned.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_base_is_the_model_without_an_adapter(tuned, folder, tmp_path):
    """Scores with the adapter off are those of the model that was never wrapped."""
    names = ["prefopt_reasoning", "prefopt_plain_text"]
    measure(tuned, tasks=names, limit=6, out=tmp_path / "a")
    plain = load_model(str(folder))
    report = compare_capabilities(
        plain, plain, tasks=names, limit=6, out=tmp_path / "b", progress=False
    )
    assert all(t.change == 0 and t.verdict == "no change shown" for t in report.tasks)
    one, two = scores_in(tmp_path / "a"), scores_in(tmp_path / "b")
    for name in names:
        assert one["base", name].items == two["base", name].items
    assert one["tuned", names[1]].items != one["base", names[1]].items


# What is called a drop.


def test_a_worse_model_is_called_so_and_fails_the_gate(folder):
    """Logits four times as large: surely wrong where the model was vaguely wrong."""
    base, worse = load_model(str(folder)), load_model(str(folder))
    with torch.no_grad():
        worse.model.model.norm.weight *= 4
    report = compare_capabilities(
        replace(base, name="before"), replace(worse, name="after"),
        tasks=["prefopt_reasoning", "prefopt_plain_text"], limit=16, progress=False,
    )  # fmt: skip
    reasoning, prose = report.tasks
    assert reasoning.verdict == "no change shown"  # a larger scale keeps the order of the choices
    assert (prose.verdict, prose.n_worse) == ("dropped", 16)
    assert not report.passed
    assert (report.base_model, report.tuned_model) == ("before", "after")
    assert report.engine.startswith("lm-eval 0.")
    assert "Plain text" in report.to_text()


def test_an_adapter_that_does_nothing_changes_nothing(folder):
    report = measure(with_adapter(folder, scale=0.0), limit=8)
    assert [t.task for t in report.tasks] == list(OFFLINE)
    assert all(t.change == 0 and t.n == 8 for t in report.tasks)
    assert all(t.n_worse == t.n_better == 0 for t in report.tasks)  # each item beside itself
    assert report.passed


# What is kept, and for whom.


def test_a_run_that_stopped_goes_on_with_the_task_and_side_where_it_was(tuned, forwards, tmp_path):
    flag = tmp_path / "stop"
    flag.touch()
    mine = user_task(tmp_path / "mine", extra="process_results: !function stop.process_results\n")
    (mine / "stop.py").write_text(
        "from pathlib import Path\n"
        "def process_results(doc, results):\n"
        f"    if Path({str(flag)!r}).exists(): raise KeyboardInterrupt\n"
        "    return {'acc': float(results[0][0] > results[1][0])}\n"
    )
    tasks, out = ["prefopt_plain_text", str(mine)], tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        measure(tuned, tasks=tasks, limit=4, out=out)
    assert set(scores_in(out)) == {("tuned", "prefopt_plain_text"), ("base", "prefopt_plain_text")}
    assert tuned.model.training is False
    forwards.taken()
    flag.unlink()
    report = measure(tuned, tasks=tasks, limit=4, out=out)
    after_stop = forwards.taken()
    assert report == measure(tuned, tasks=tasks, limit=4)
    assert after_stop < forwards.taken()
    assert report == measure(tuned, tasks=tasks, limit=4, out=out)
    assert forwards.taken() == 0


def test_other_weights_and_settings_are_not_taken_over(folder, tmp_path):
    first, second = with_adapter(folder), with_adapter(folder, seed=1)
    assert first.name == second.name
    options = {"tasks": "prefopt_plain_text", "limit": 3}
    measure(first, **options, out=tmp_path)
    counter = Forwards(second.model.get_base_model())
    report = measure(second, **options, out=tmp_path)
    assert counter.taken() == 1  # the base is the same model, and was measured before
    assert report == measure(second, **options)
    counter.taken()
    measure(second, **{**options, "limit": 2}, out=tmp_path)
    assert counter.taken() == 2
    measure(second, **{**options, "limit": 2}, seed=1, out=tmp_path)
    assert counter.taken() == 2
    assert report == measure(second, **options, out=tmp_path)  # nothing was lost meanwhile
    assert counter.taken() == 0
    last = scores_in(tmp_path)["tuned", "prefopt_plain_text"]
    assert sum(item.score for item in last.items) / 3 == pytest.approx(report.tasks[0].tuned)


def test_a_folder_that_cannot_be_written_to_is_found_before_work(tuned, forwards, locked_folder):
    with pytest.raises(DataError, match=r"cannot write .*capabilities\.jsonl"):
        measure(tuned, tasks="prefopt_plain_text", out=locked_folder)
    assert forwards.taken() == 0


def test_the_hash_is_of_the_weights_and_the_adapter_alone(folder):
    one, same, other = (with_adapter(folder, seed=seed).model for seed in (0, 0, 1))
    assert weights_hash(one) == weights_hash(same) != weights_hash(other)
    base = weights_hash(one, with_adapter=False)
    assert base == weights_hash(other, with_adapter=False) != weights_hash(one)
    for module in same.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    assert weights_hash(one) != weights_hash(same)


def test_a_file_that_was_cut_is_named(tuned, tmp_path):
    options = {"tasks": "prefopt_plain_text", "limit": 2, "out": tmp_path}
    measure(tuned, **options)
    path = tmp_path / SCORES_FILE
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"capabilities\.jsonl holds 1 line"):
        measure(tuned, **options)


def test_nothing_of_the_users_is_changed(tuned):
    tuned.model.train()
    side = tuned.tokenizer.padding_side
    level = logging.getLogger("lm_eval").level
    measure(tuned, tasks="prefopt_arithmetic", limit=2)
    assert tuned.model.training
    tuned.model.eval()
    assert tuned.tokenizer.padding_side == side
    assert logging.getLogger("lm_eval").level == level
    assert tuned.model.active_adapters == ["default"]


# Tasks.


def test_unknown_names_are_refused_at_once_with_near_ones(tuned, forwards, tmp_path):
    (tmp_path / "empty").mkdir()
    asked = ["arc_esy", "prefopt_arithmetik", WRITING, str(tmp_path / "empty"), "no/such"]
    with pytest.raises(DataError) as error:
        measure(tuned, tasks=asked)
    told = str(error.value)
    assert "'arc_esy'; did you mean arc_easy" in told
    assert "prefopt_arithmetic" in told
    assert "needs a judge" in told
    assert "empty: no *.yaml file" in told
    assert "'no/such'" in told
    assert "There is no such folder" in told
    assert forwards.taken() == 0
    with pytest.raises(DataError, match="no task is named"):
        measure(tuned, tasks=" , ")


@pytest.mark.slow
def test_a_standard_task_without_a_hub_is_left_out_by_name(tuned, forwards):
    with pytest.raises(
        DataError, match=r"no task can run\.\n  - arc_easy: .*hub cannot be reached"
    ):
        measure(tuned, tasks="arc_easy")
    assert forwards.taken() == 0
    report = measure(tuned, tasks="arc_easy,prefopt_plain_text", limit=2)
    assert [t.task for t in report.tasks] == ["prefopt_plain_text"]
    assert report.left_out[0].startswith("arc_easy: ")
    assert "left out: arc_easy" in report.to_text()


def test_a_folder_of_your_own_tasks(tuned, tmp_path):
    mine = user_task(tmp_path / "mine", rows=[
        {"question": f"Où est le chat n° {i} ? 🐈", "choices": ["ici", "là-bas"], "answer": 0}
        for i in range(5)
    ])  # fmt: skip
    report = measure(tuned, tasks=[str(mine), "prefopt_plain_text"], limit=3)
    assert [(t.task, t.title, t.n) for t in report.tasks] == [
        ("pets", "Pets at home", 3),
        ("prefopt_plain_text", "Plain text", 3),
    ]


def test_faults_in_your_own_tasks_are_told_before_work(tuned, forwards, tmp_path):
    broken = user_task(tmp_path / "broken")
    (broken / "worse.yaml").write_text("task: worse\n  output_type: [\n")
    with pytest.raises(DataError, match=r"worse\.yaml: mapping values are not allowed"):
        measure(tuned, tasks=str(broken))
    (broken / "worse.yaml").unlink()
    (broken / "pets.jsonl").unlink()
    with pytest.raises(DataError, match=r"task pets: FileNotFoundError"):
        measure(tuned, tasks=[str(broken), "prefopt_plain_text"])
    clash = user_task(tmp_path / "clash", "prefopt_format")
    with pytest.raises(DataError, match="prefopt's own"):
        measure(tuned, tasks=str(clash))
    assert forwards.taken() == 0


def test_a_metric_over_all_items_together_cannot_be_paired(tuned, forwards, tmp_path):
    mine = user_task(tmp_path / "mine")
    path = mine / "pets.yaml"
    written = path.read_text()
    path.write_text(written.replace("metric: acc", "metric: f1").replace(": mean", ": f1"))
    with pytest.raises(DataError, match=r"pets: .*metrics \(f1\) is a mean over items"):
        measure(tuned, tasks=str(mine))
    assert forwards.taken() == 0
    path.write_text(written.replace("metric: acc", "metric: f1"))
    with pytest.raises(DataError, match="lm-eval failed on the task pets: TypeError"):
        measure(tuned, tasks=str(mine))


def test_prompts_that_the_context_cannot_hold_are_not_cut(tmp_path):
    small = with_adapter(save_tiny_model(tmp_path / "small", context=100))
    with pytest.raises(
        DataError, match=r"prefopt_format: \d of 4 requests .*context of 100 tokens"
    ):
        measure(small, tasks="prefopt_format", limit=4)
    report = measure(small, tasks=["prefopt_format", "prefopt_plain_text"], limit=4)
    assert [t.task for t in report.tasks] == ["prefopt_plain_text"]  # texts are read in windows
    assert report.left_out[0].startswith("prefopt_format: ")


def test_the_judge_compares_open_answers_in_both_orders(tuned, tmp_path, forwards):
    options = {"tasks": "offline", "limit": 2, "judge": shortest_wins(), "out": tmp_path}
    report = measure(tuned, **options)
    assert [t.task for t in report.tasks] == [*OFFLINE, WRITING]
    writing = report.tasks[-1]
    assert writing.title == "Writing (judged by scripted:shortest)"
    assert writing.base + writing.tuned == pytest.approx(1)
    assert writing.n == 2
    forwards.taken()
    assert measure(tuned, **options) == report
    assert forwards.taken() == 0


# Models and settings.


def test_models_that_cannot_be_measured(tuned, folder, monkeypatch):
    plain = load_model(str(folder))
    with pytest.raises(ModelError, match=r"no adapter.*compare_capabilities"):
        measure(plain)
    with pytest.raises(ValueError, match=r"limit.*0.*batch_size.*alpha.*max_drop"):
        measure(tuned, limit=0, batch_size=0, alpha=1.0, max_drop=-0.1)
    broken = with_adapter(folder, scale=1e30)
    with pytest.raises(ModelError, match=r"scores of tiny\+adapter .* are not numbers"):
        measure(broken, tasks="prefopt_plain_text", limit=2)
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(PrefoptError, match=r"pip install 'prefopt\[forgetting\]'"):
        measure(tuned)


def test_a_model_without_a_chat_template_is_asked_plainly(tmp_path):
    plain = with_adapter(save_tiny_model(tmp_path / "plain", "gpt2", context=1024))
    report = measure(plain, tasks=["prefopt_reasoning", "prefopt_arithmetic"], limit=3)
    assert [t.n for t in report.tasks] == [3, 3]


def test_a_template_without_a_system_role_is_asked_without_one(tmp_path):
    gemma = with_adapter(save_tiny_model(tmp_path / "gemma", "gemma", context=1024))
    assert measure(gemma, tasks="prefopt_arithmetic", limit=3).tasks[0].n == 3


def test_the_code_of_the_docs_runs_as_written(tuned, folder, tmp_path, monkeypatch, capsys):
    """With a tiny model in place of the named ones, and one item a task."""
    page = (Path(__file__).parents[2] / "docs" / "capabilities.md").read_text(encoding="utf-8")
    tuned.model.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        block = block.replace("Qwen/Qwen3-0.6B", folder).replace("full-fine-tune", folder)
        block = block.replace('tasks="offline"', 'limit=1, progress=False, tasks="offline"')
        exec(compile(block, "docs/capabilities.md", "exec"), names)
    assert "Arithmetic" in capsys.readouterr().out
    assert (tmp_path / "capabilities" / SCORES_FILE).is_file()
    assert [t.change for t in names["report"].tasks] == [0.0] * 4
    (tmp_path / "tasks").mkdir()
    written = next(b for b in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "task:" in b)
    (tmp_path / "tasks" / "opening_hours.yaml").write_text(written)
    (row,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "tasks" / "opening_hours.jsonl").write_text(row * 2)
    assert measure(tuned, tasks="tasks/").tasks[0].title == "Opening hours"


@pytest.mark.slow
def test_a_killed_process_goes_on(folder, tmp_path):
    """SIGKILL while the second task is being answered."""
    script = tmp_path / "run.py"
    mine = user_task(tmp_path / "mine", extra="process_results: !function stop.process_results\n")
    (mine / "stop.py").write_text(
        "import os, signal\n"
        "def process_results(doc, results):\n"
        "    if os.environ.get('KILL'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return {'acc': float(results[0][0] > results[1][0])}\n"
    )
    script.write_text(
        "import sys\n"
        "from tests.evaluation.test_capabilities import measure, with_adapter\n"
        "folder, mine, out = sys.argv[1:]\n"
        "tasks = ['prefopt_plain_text', mine]\n"
        "report = measure(with_adapter(folder), tasks=tasks, limit=4, out=out)\n"
        "print([t.n for t in report.tasks])\n"
    )
    command = [sys.executable, str(script), str(folder), str(mine), str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    killed = subprocess.run(command, env=env | {"KILL": "1"}, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    before = (tmp_path / "out" / SCORES_FILE).read_bytes()
    assert len(before.splitlines()) == 2
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[4, 4]"
    assert (tmp_path / "out" / SCORES_FILE).read_bytes().startswith(before)
