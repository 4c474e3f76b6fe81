"""A run is pushed to a Hub on a local port: what goes there, what is refused, and kills half way."""

import json
import logging
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants

from prefopt.cli import main
from prefopt.errors import DataError, HostedError
from prefopt.flow import FlowConfig, run_flow
from prefopt.models import LoRASettings, is_hub_id
from prefopt.sampling.candidates import SamplingSettings
from prefopt.serving.hub_push import plan_push, push
from prefopt.serving.model_card import shown
from prefopt.training.dpo import DPOSettings
from tests.serving.hub_server import TOKEN, HubServer

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
BASE = "someone/base"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """A finished run of the flow, on a base model that is a folder of this machine."""
    folder = tmp_path_factory.mktemp("push")
    prompts = folder / "secret-project-prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(12)))
    config = FlowConfig(
        out=str(folder / "run"),
        model=tiny_model,
        prompts=str(prompts),
        held_out=4,
        judge="scripted:shortest",
        k=2,
        sampling=SamplingSettings(temperature=1.0, max_new_tokens=6, batch_size=8),
        lora=LoRASettings(r=4),
        dpo=DPOSettings(learning_rate=1e-3, batch_size=4, max_length=128, epochs=1),
    )
    run_flow(config, progress=False)
    return folder / "run"


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def a_plan(run, **options):
    return plan_push(
        "someone/tuned", run, **{"dataset": "someone/pairs", "base_model": BASE} | options
    )


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_goes_to_the_hub_with_its_preferences_and_cards(run, hub):
    before = contents(run)
    assert push(a_plan(run)) == [f"{hub.url}/datasets/someone/pairs", f"{hub.url}/someone/tuned"]
    model, data = hub.repos["models/someone/tuned"], hub.repos["datasets/someone/pairs"]
    assert model["private"]
    assert data["private"]
    assert len(model["commits"]) == len(data["commits"]) == 1
    assert set(model["files"]) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json", "training_log.jsonl",
    }  # fmt: skip
    for name, sent in model["files"].items():
        if name not in ("README.md", "adapter_config.json"):
            assert sent == (run / "adapter" / name).read_bytes()
    rows = [json.loads(line) for line in data["files"]["train.jsonl"].splitlines()]
    kept = [json.loads(row) for row in (run / "dataset" / "train.jsonl").read_text().splitlines()]
    models = {"chosen_model": "tiny", "rejected_model": "tiny"}
    assert rows == [row | models for row in kept]
    config = json.loads(model["files"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE
    assert config["r"] == 4
    assert contents(run) == before


def test_nothing_of_this_machine_leaves_it(run, hub, tiny_model):
    push(a_plan(run))
    sent = b"".join(item for repo in hub.repos.values() for item in repo["files"].values())
    for secret in (str(run), str(run.parent), tiny_model, TOKEN, "/tmp/"):
        assert secret.encode() not in sent


def test_the_card_holds_the_figures_of_the_report_and_valid_metadata(run):
    plan = a_plan(run, license="mit")
    card = ModelCard(plan.uploads[1].card)
    report = json.loads((run / "report" / "report.json").read_text())
    assert card.data.base_model == BASE
    assert card.data.license == "mit"
    assert card.data.datasets == ["someone/pairs"]
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    results = {result.metric_type: result for result in card.data.eval_results}
    rate = report["win_rate"]
    assert results["win_rate"].metric_value == round(rate["win_rate"], 4)
    assert results["win_rate"].metric_args["low"] == round(rate["wilson_low"], 4)
    assert results["perplexity"].metric_value == round(report["perplexity_tuned"], 4)
    text = card.text
    lines = (run / "left_out.jsonl").read_text().splitlines()
    left_out = [json.loads(line)["reason"] for line in lines]
    for reason in set(left_out):
        assert f"{left_out.count(reason)} {reason}" in text
    assert "scripted:shortest" in text
    assert "win rate over someone/base" in text
    assert "by someone/base" in text
    assert f"{report['labels']['n_pairs']:,}" in text
    assert "secret-project-prompts.jsonl" in text
    assert "hash " in text
    assert "Judging cost $0.00" in text
    assert "| dpo.beta | 0.1 |" in text
    assert "| lora.r | 4 |" in text
    assert "vllm serve someone/base --enable-lora --max-lora-rank 8" in text
    flips = [row for row in text.splitlines() if "opposite winners" in row]
    assert len(flips) == 1


@pytest.mark.slow
def test_pushing_again_sends_nothing_twice(run, hub):
    push(a_plan(run))
    large = [line for line in hub.asked if line.startswith("PUT")]
    push(a_plan(run))
    assert [line for line in hub.asked if line.startswith("PUT")] == large
    assert [len(repo["commits"]) for repo in hub.repos.values()] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("point", ["PUT /storage", "models/someone/tuned/commit", "repos/create"])
def test_after_a_cut_the_same_command_goes_on(run, hub, point):
    """The Hub refuses at each kind of step; the second call completes what is missing."""
    cuts = []

    def cut(line):
        if point in line and len(cuts) < 12:  # more often than the client tries again
            cuts.append(line)
            return 403
        return 0

    hub.fails = cut
    with pytest.raises(HostedError, match=r"sends nothing twice") as told:
        push(a_plan(run))
    assert TOKEN not in str(told.value)
    if point != "repos/create":
        assert "Sent before that: http" in str(told.value)
    hub.fails = lambda _: 0
    push(a_plan(run))
    assert [len(repo["commits"]) for repo in hub.repos.values()] == [1, 1]
    assert "adapter_model.safetensors" in hub.repos["models/someone/tuned"]["files"]


@pytest.mark.slow
def test_a_commit_whose_answer_was_lost_is_not_made_again(run, hub):
    hub.loses = lambda line: "/datasets/someone/pairs/commit" in line
    with pytest.raises(HostedError, match="Nothing was committed, as far as is known"):
        push(a_plan(run))
    hub.loses = lambda _: False
    push(a_plan(run))
    assert [len(repo["commits"]) for repo in hub.repos.values()] == [1, 1]


def test_nothing_is_sent_before_the_hub_has_agreed_to_all_of_it(run, hub):
    with pytest.raises(HostedError, match='"license" must be one of'):
        push(a_plan(run, license="my-own"))
    hub.make("models/someone/tuned", private=False)
    with pytest.raises(HostedError, match="exists and is public"):
        push(a_plan(run))
    assert not [line for line in hub.asked if "create" in line or "commit" in line or "PUT" in line]
    assert push(a_plan(run, private=False))
    assert not hub.repos["datasets/someone/pairs"]["private"]


def test_a_rejected_or_missing_token_is_told_and_never_shown(run, hub, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    wrong = "hf_" + "w" * 34
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(HostedError, match="hf auth login") as told:
        push(a_plan(run))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(a_plan(run))
    assert hub.repos
    for token in (wrong, TOKEN):
        assert token not in str(told.value)
        assert token not in caplog.text


def test_every_problem_is_told_at_once_and_nothing_is_sent(run, tmp_path, hub):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (copy / "dataset" / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError) as told:
        plan_push("no owner", copy, dataset="x/y/z", license="mit")
    problems = "\n".join(told.value.problems)
    for part in ("'no owner' is no name", "'x/y/z' is no name", "cut short", "no columns"):
        assert part in problems, part
    assert hub.asked == []


def test_a_base_model_that_nobody_else_has_is_refused(run):
    with pytest.raises(DataError, match="which nobody else has"):
        a_plan(run, base_model=None)


def test_keys_in_a_file_are_found_and_not_repeated(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "dataset" / "train.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    row["chosen"][0]["content"] = f"My token is {TOKEN}."
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(
        DataError, match=r"train\.jsonl, line 1 holds .* Hugging Face token"
    ) as told:
        a_plan(copy)
    assert TOKEN not in str(told.value)


def test_what_does_not_belong_there_stays_and_is_named(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "adapter" / "optimizer.pt").write_bytes(b"pickle")
    (copy / "adapter" / "notes").mkdir()
    plan = a_plan(copy)
    assert "stays here: notes/, optimizer.pt" in str(plan)
    assert "optimizer.pt" not in plan.uploads[1].files


def test_whole_weights_and_gguf_files_are_pushed_too(run, tiny_model, tmp_path, hub):
    merged = tmp_path / "merged"
    shutil.copytree(tiny_model, merged)
    plan = plan_push("someone/whole", merged, run=run, base_model=BASE, license="mit")
    card = ModelCard(plan.uploads[0].card)
    assert card.data.library_name == "transformers"
    assert "vllm serve someone/whole" in card.text
    push(plan)
    assert "model.safetensors" in hub.repos["models/someone/whole"]["files"]

    files = tmp_path / "gguf"
    files.mkdir()
    (files / "tuned.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    card = ModelCard(plan_push("someone/g", files, base_model=BASE).uploads[0].card)
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert "Not evaluated" in card.text
    (files / "tuned.gguf").write_bytes(b"oops")
    with pytest.raises(DataError, match="is no GGUF file"):
        plan_push("someone/g", files, base_model=BASE)


def test_folders_with_nothing_to_push_are_told(run, tmp_path):
    for make, told in (
        (lambda: None, "no weights"),
        (lambda: (tmp_path / "run.json").write_text("{}"), "no adapter yet"),
        (lambda: (tmp_path / "ppo").mkdir(), "is a classic run"),
    ):
        make()
        with pytest.raises(DataError, match=told):
            a_plan(tmp_path, dataset=None)
    with pytest.raises(DataError, match="no folder 'nowhere'"):
        plan_push("a/b", "nowhere")
    with pytest.raises(DataError, match=r"no report\.json(.|\n)*not a labelling job"):
        a_plan(run / "adapter", report=tmp_path, labels=tmp_path)


def test_an_index_with_a_missing_shard_is_told(tiny_model, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(tiny_model, copy)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"model-00001-of-00002\.safetensors is missing"):
        plan_push("a/b", copy)


def test_the_command_shows_everything_and_sends_nothing_on_a_dry_run(run, hub, capsys):
    options = ["--repo", "someone/tuned", "--folder", str(run / "adapter"), "--base_model", BASE]
    assert main(["push", *options, "--dry_run", "true"]) == 0
    shown_there = capsys.readouterr().out
    assert "adapter_model.safetensors" in shown_there
    assert "## Is it better?" in shown_there  # found in the run that the adapter lies in
    assert "Nothing was sent." in shown_there
    assert hub.asked == []
    assert main(["push", *options]) == 0
    assert f"pushed: {hub.url}/someone/tuned" in capsys.readouterr().out


def test_names_are_shown_without_their_folders():
    assert shown("/home/me/secret/model-7b") == "model-7b"
    assert shown("C:\\data\\model") == "model"
    assert shown("org/name") == "org/name"
    assert shown("demo") == "demo"
    assert is_hub_id("Qwen/Qwen3-0.6B")
    assert not is_hub_id("./org/name")
    assert not is_hub_id("a/b/c")


def test_planning_needs_no_torch(run):
    code = (
        "import sys; from prefopt.serving.hub_push import plan_push;"
        f"plan_push('a/b', {str(run)!r}, base_model='a/c'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
