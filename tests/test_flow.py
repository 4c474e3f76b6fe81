"""The whole way on a tiny model: it finishes, reuses, refuses, and survives being killed."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from prefopt.errors import DataError, JudgeUnavailable, ModelError, RunError
from prefopt.flow import FlowConfig, run_flow
from prefopt.models import LoRASettings
from prefopt.sampling.candidates import SamplingSettings
from prefopt.training.dpo import DPOSettings

DATA_FILES = (
    "train_prompts.jsonl",
    "held_out_prompts.jsonl",
    "candidates.jsonl",
    "judged.jsonl",
    "preferences.jsonl",
    "left_out.jsonl",
    "dataset/train.jsonl",
    "adapter/adapter_model.safetensors",
    "answers_tuned.jsonl",
    "answers_base.jsonl",
    "judged_held_out.jsonl",
    "report/report.json",
)


def config(out, model, prompts, **changes):
    values = {
        "out": str(out),
        "model": model,
        "prompts": str(prompts),
        "held_out": 4,
        "judge": "scripted:shortest",
        "k": 3,
        "sampling": SamplingSettings(temperature=1.0, max_new_tokens=10, batch_size=9),
        "lora": LoRASettings(r=4),
        "dpo": DPOSettings(learning_rate=1e-3, batch_size=2, max_length=128, epochs=2),
        **changes,
    }
    return FlowConfig(**values)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"Question {i}: what is {i}?"}) for i in range(14)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, prompt_file):
    out = tmp_path_factory.mktemp("flow") / "run"
    return out, run_flow(config(out, tiny_model, prompt_file), progress=False)


def hashes(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in DATA_FILES}


def test_the_whole_way_leaves_every_file_and_accounts_for_every_comparison(finished):
    out, report = finished
    assert all((out / name).is_file() for name in DATA_FILES)
    assert (out / "report" / "report.html").is_file()
    judged = (out / "judged.jsonl").read_text().splitlines()
    preferences = [
        json.loads(line) for line in (out / "preferences.jsonl").read_text().splitlines()
    ]
    left_out = (out / "left_out.jsonl").read_text().splitlines()
    assert len(judged) == 10 * 3
    assert sum(len(g["preferences"]) for g in preferences) + len(left_out) == 30
    assert report.win_rate.n == 4
    assert report.labels.n_pairs == sum(len(g["preferences"]) for g in preferences)
    assert report.perplexity_base > 1
    assert report.shift.kl.n_prompts == 4
    assert report.shift.reward == report.shift.beta * report.shift.kl.value
    assert report.capabilities is None


def test_held_out_prompts_are_not_trained_on(finished):
    out, _ = finished
    train, held_out = (
        {
            json.loads(line)["prompt_id"]
            for line in (out / f"{name}_prompts.jsonl").read_text().splitlines()
        }
        for name in ("train", "held_out")
    )
    assert len(train) == 10
    assert len(held_out) == 4
    assert not train & held_out


def test_running_again_makes_nothing_again(finished, tiny_model, prompt_file, monkeypatch):
    out, report = finished
    before = hashes(out)

    def never(*_, **__):
        raise AssertionError("a finished run loads no model")

    monkeypatch.setattr("prefopt.training.dpo.train_dpo", never)
    assert run_flow(config(out, tiny_model, prompt_file), progress=False) == report
    assert hashes(out) == before


@pytest.mark.slow
def test_the_same_configuration_elsewhere_gives_the_same_bytes(
    finished, tiny_model, prompt_file, tmp_path
):
    out, _ = finished
    run_flow(config(tmp_path / "again", tiny_model, prompt_file), progress=False)
    assert hashes(tmp_path / "again") == hashes(out)


def test_a_changed_setting_is_refused_until_redo_is_asked_for(
    finished, tiny_model, prompt_file, tmp_path
):
    shutil.copytree(finished[0], tmp_path / "run")
    kept = hashes(tmp_path / "run")
    changed = config(tmp_path / "run", tiny_model, prompt_file, lora=LoRASettings(r=2))
    with pytest.raises(RunError, match=r"lora\.r: 4 -> 2"):
        run_flow(changed, progress=False)
    run_flow(changed, on_change="redo", progress=False)
    now = hashes(tmp_path / "run")
    assert now["judged.jsonl"] == kept["judged.jsonl"]
    assert now["answers_base.jsonl"] == kept["answers_base.jsonl"]
    assert now["adapter/adapter_model.safetensors"] != kept["adapter/adapter_model.safetensors"]


def test_bad_input_is_refused_before_the_folder_is_made(
    tmp_path, tiny_model, prompt_file, monkeypatch
):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
    out = tmp_path / "run"
    with pytest.raises(JudgeUnavailable, match="ANTHROPIC_API_KEY"):
        run_flow(
            config(out, tiny_model, prompt_file, judge="anthropic:claude-sonnet-5-5", max_usd=1.0)
        )
    with pytest.raises(ModelError, match="no model in folder"):
        run_flow(config(out, str(tmp_path / "nowhere"), prompt_file))
    with pytest.raises(ModelError, match="Available here: cpu"):
        run_flow(config(out, tiny_model, prompt_file, device="cuda"))
    with pytest.raises(ValueError, match="k must be at least 2"):
        config(out, tiny_model, prompt_file, k=1)
    assert not out.exists()


def run_until_done(out, model, prompts, generator, longest_s, kills):
    """Start the flow in a new process, kill it at random moments, then let it finish."""
    arguments = [
        sys.executable, "-m", "prefopt.cli", "run", "--out", str(out), "--model", model,
        "--prompts", str(prompts), "--held_out", "4", "--judge", "scripted:shortest", "--k", "3",
        "--sampling.temperature", "1.0", "--sampling.max_new_tokens", "10",
        "--sampling.batch_size", "9", "--lora.r", "4", "--dpo.learning_rate", "1e-3",
        "--dpo.batch_size", "2", "--dpo.max_length", "128",
        "--dpo.epochs", "2",
    ]  # fmt: skip
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(generator.uniform(0.0, longest_s))
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    last = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr[-2000:]
    return killed


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(finished, tiny_model, prompt_file, tmp_path):
    """kill -9 at random moments of the whole flow, training included; then identical bytes."""
    out, _ = finished
    seed = int(os.environ.get("PREFOPT_KILL_SEED", "0"))
    rounds = int(os.environ.get("PREFOPT_KILL_ROUNDS", "10"))
    generator = random.Random(seed)
    started = time.monotonic()
    run_until_done(tmp_path / "timing", tiny_model, prompt_file, generator, 1.0, 0)
    longest_s = time.monotonic() - started
    assert hashes(tmp_path / "timing") == hashes(out)
    killed = 0
    for number in range(rounds):
        folder = tmp_path / f"run{number}"
        killed += run_until_done(folder, tiny_model, prompt_file, generator, longest_s, 3)
        assert hashes(folder) == hashes(out)
    print(f"{killed} kills in {rounds} runs, all files identical")
    assert killed >= rounds


def test_the_same_flow_with_claude_as_judge_pays_once(
    tiny_model, prompt_file, tmp_path, monkeypatch
):
    """The whole way with an Anthropic judge against the offline fake of the API."""
    import prefopt.judges
    from prefopt.errors import BudgetExceeded
    from prefopt.judges.anthropic import AnthropicJudge
    from prefopt.judges.ledger import Ledger
    from prefopt.judges.rubric import HOUSE_STYLE
    from prefopt.testing import FakeAnthropic, verdict_reply
    from prefopt.testing.fake_anthropic import shown_responses

    def answer(params):
        first, second = shown_responses(params)
        shorter = "first_much" if len(first) < len(second) else "second_much"
        return verdict_reply("tie" if len(first) == len(second) else shorter)

    fake = FakeAnthropic(answer)
    original = prefopt.judges.load_judge

    def with_fake(spec, *, rubric, max_usd, transport, prices):
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret-key")
        real = original(spec, rubric=rubric, max_usd=max_usd)
        client = fake.client(api_key="sk-secret-key")
        return AnthropicJudge(
            "claude-sonnet-5-5", rubric=real.rubric, max_usd=max_usd, client=client
        )

    monkeypatch.setattr(prefopt.judges, "load_judge", with_fake)
    out = tmp_path / "run"

    def go(max_usd):
        claude = {"judge": "anthropic:claude-sonnet-5-5", "max_usd": max_usd}
        return run_flow(config(out, tiny_model, prompt_file, **claude), progress=False)

    with pytest.raises(BudgetExceeded, match="max_usd"):
        go(0.06)
    bought = len(fake.messages)
    assert bought > 0
    with Ledger(out / "judgements.sqlite") as book:
        assert 0 < book.spent_usd() <= 0.06
    with pytest.raises(BudgetExceeded, match="max_usd"):
        go(0.06)  # the limit is the run's: a second start does not open a second purse
    with Ledger(out / "judgements.sqlite") as book:
        assert book.spent_usd() <= 0.06
    report = go(50.0)
    assert report.cost_usd > 0
    asked = [json.dumps(request["messages"]) for request in fake.requests]
    assert len(asked) == len(set(asked))  # no question was paid for twice
    assert any(HOUSE_STYLE.text in block["text"] for block in fake.requests[0]["system"])
    calls = len(fake.messages)
    assert go(50.0) == report
    assert len(fake.messages) == calls
    for path in out.rglob("*"):
        if path.is_file():
            assert b"sk-secret-key" not in path.read_bytes(), path


@pytest.mark.slow
def test_capabilities_are_checked_first_and_change_the_report_alone(
    finished, tiny_model, prompt_file, tmp_path
):
    with pytest.raises(DataError, match="did you mean prefopt_plain_text"):
        run_flow(
            config(tmp_path / "no", tiny_model, prompt_file, capabilities="prefopt_plane_text"),
            progress=False,
        )
    assert not (tmp_path / "no").exists()
    shutil.copytree(finished[0], tmp_path / "run")
    kept = hashes(tmp_path / "run")
    more = config(tmp_path / "run", tiny_model, prompt_file, capabilities="prefopt_plain_text")
    report = run_flow(more, on_change="redo", progress=False)
    assert [t.task for t in report.capabilities.tasks] == ["prefopt_plain_text"]
    now = hashes(tmp_path / "run")
    assert {name for name in kept if now[name] != kept[name]} == {"report/report.json"}


def test_a_ledger_that_began_anew_does_not_make_verdicts_free(tmp_path):
    from prefopt.flow_stages import spent_usd
    from prefopt.judges.ledger import Attempt, Ledger
    from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Usage, Verdict

    a, b = (Candidate(prompt=Prompt.from_text("p"), text=t, model="m") for t in "ab")
    verdict = Verdict(judge="j", preferred="a", strength=1, usage=Usage(cost_usd=0.1))
    judged = [JudgedComparison(comparison=Comparison(a=a, b=b), forward=verdict, backward=verdict)]
    assert spent_usd(tmp_path / "l") == 0.0
    assert spent_usd(tmp_path / "l", judged) == 0.2
    with Ledger(tmp_path / "l") as book:  # with answers that brought no verdict
        book.record("k", "j", verdict, [Attempt(outcome="answered", cost_usd=0.3)])
    assert spent_usd(tmp_path / "l", judged) == 0.3
