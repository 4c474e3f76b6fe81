"""The classic path on a tiny model: it finishes, reuses, refuses, and survives being stopped."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.trainer_callback import CallbackHandler

from prefopt.classic_flow import ClassicConfig, run_classic_flow
from prefopt.data.records import read_records
from prefopt.errors import DataError, ModelError, RunError
from prefopt.models import LoRASettings
from prefopt.sampling.candidates import SamplingSettings
from prefopt.training.ppo import PPOSettings
from prefopt.training.reward import RewardSettings
from prefopt.training.reward_report import RewardReport
from prefopt.training.sft import SFTSettings
from prefopt.types import Candidate

FILES = (
    "train_prompts.jsonl",
    "held_out_prompts.jsonl",
    "preferences.jsonl",
    "demonstrations.jsonl",
    "sft/model.safetensors",
    "reward/adapter_model.safetensors",
    "reward/heads.safetensors",
    "reward_report.jsonl",
    "ppo/adapter_model.safetensors",
    "answers_base.jsonl",
    "answers_sft.jsonl",
    "answers_tuned.jsonl",
    "judged_held_out.jsonl",
    "judged_sft.jsonl",
    "judged_ppo.jsonl",
    "report/report.json",
)
LABELS = ("candidates.jsonl", "judged.jsonl", "left_out.jsonl")
LORA = LoRASettings(r=4)


def config(out, model, prompts, **changes):
    values = {
        "out": str(out),
        "model": model,
        "prompts": str(prompts),
        "held_out": 4,
        "judge": "scripted:shortest",
        "k": 3,
        "cut_off": "keep",
        "sampling": SamplingSettings(temperature=1.0, max_new_tokens=8, batch_size=9),
        "sft": SFTSettings(learning_rate=1e-3, batch_size=2, max_length=128, checkpoint_every=1),
        "sft_lora": LORA,
        "reward": RewardSettings(
            learning_rate=1e-3, batch_size=2, max_length=128, checkpoint_every=1
        ),
        "reward_lora": LORA,
        "ppo": PPOSettings(
            rollouts=3,
            prompts_per_rollout=2,
            answers_per_prompt=2,
            max_new_tokens=6,
            learning_rate=1e-3,
            epochs=2,
            checkpoint_every=1,
        ),
        "ppo_lora": LORA,
        **changes,
    }
    return ClassicConfig(**values)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "Fragen 🌱.jsonl"
    lines = [json.dumps({"prompt": f"Frage {i}: Wie groß ist „{i}“? 🌱"}) for i in range(12)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, prompt_file):
    out = tmp_path_factory.mktemp("classic") / "Läufe 🌱"
    return out, run_classic_flow(config(out, tiny_model, prompt_file), progress=False)


def hashes(folder, names=FILES):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_the_whole_way_leaves_every_file_and_says_what_each_stage_brought(finished, tiny_model):
    out, report = finished
    assert all((out / name).is_file() for name in (*FILES, *LABELS))
    assert report.win_rate.n == 4
    assert report.perplexity_base > 1
    assert report.perplexity_tuned != report.perplexity_base
    (sft,) = report.frontier
    assert sft.name == "SFT"
    assert sft.kl.value != 0
    assert report.shift.kl.value != sft.kl.value
    assert report.shift.beta is None  # PPO's reference is the SFT model, not the base
    assert set(report.details) == {
        "SFT against the base model",
        "PPO against SFT",
        "PPO",
        "perplexity after SFT",
        "demonstrations",
        "reward model",
    }
    assert "of 4 comparisons" in report.details["PPO against SFT"]
    (quality,) = read_records(out / "reward_report.jsonl", RewardReport)
    assert quality.n > 0
    models = {
        side: {answer.model for answer in read_records(out / f"answers_{side}.jsonl", Candidate)}
        for side in ("base", "sft", "tuned")
    }
    assert models == {
        "base": {tiny_model},
        "sft": {f"{tiny_model}+SFT"},
        "tuned": {f"{tiny_model}+SFT+PPO"},
    }


def test_running_again_makes_nothing_again(finished, tiny_model, prompt_file, monkeypatch):
    out, report = finished
    before = hashes(out)

    def never(*_, **__):
        raise AssertionError("a finished run trains nothing")

    for name in ("sft.train_sft", "reward.train_reward", "ppo.train_ppo"):
        monkeypatch.setattr(f"prefopt.training.{name}", never)
    assert run_classic_flow(config(out, tiny_model, prompt_file), progress=False) == report
    assert hashes(out) == before


@pytest.mark.slow
def test_stopped_inside_every_training_it_ends_with_the_same_bytes(
    finished, tiny_model, prompt_file, tmp_path, monkeypatch
):
    out, report = finished
    settings = config(tmp_path / "run", tiny_model, prompt_file)
    stops: list[str] = []
    original = CallbackHandler.on_step_end

    def stop_at_step_3(self, args, state, control):
        stage = Path(args.output_dir).name
        if state.global_step == 3 and stage not in stops:
            stops.append(stage)
            raise KeyboardInterrupt
        return original(self, args, state, control)

    monkeypatch.setattr(CallbackHandler, "on_step_end", stop_at_step_3)
    for expected in (["sft"], ["sft", "reward"], ["sft", "reward", "ppo"]):
        with pytest.raises(KeyboardInterrupt):
            run_classic_flow(settings, progress=False)
        assert stops == expected
        assert list((tmp_path / "run" / ".partial" / stops[-1]).glob("checkpoint-*"))
    assert run_classic_flow(settings, progress=False) == report
    assert hashes(tmp_path / "run") == hashes(out)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(finished, tiny_model, prompt_file, tmp_path):
    """kill -9 at random moments of the whole path, by its command; then identical bytes."""
    out, _ = finished
    folder = tmp_path / "run"
    arguments = [
        sys.executable, "-m", "prefopt.cli", "classic", "--out", str(folder), "--model", tiny_model,
        "--prompts", str(prompt_file), "--held_out", "4", "--judge", "scripted:shortest",
        "--k", "3", "--cut_off", "keep", "--sampling.temperature", "1.0",
        "--sampling.max_new_tokens", "8", "--sampling.batch_size", "9", "--sft_lora.r", "4",
        "--reward_lora.r", "4", "--ppo_lora.r", "4", "--ppo.rollouts", "3",
        "--ppo.prompts_per_rollout", "2", "--ppo.answers_per_prompt", "2",
        "--ppo.max_new_tokens", "6", "--ppo.learning_rate", "1e-3", "--ppo.epochs", "2",
        "--ppo.checkpoint_every", "1",
    ]  # fmt: skip
    for name in ("sft", "reward"):
        arguments += [f"--{name}.learning_rate", "1e-3", f"--{name}.batch_size", "2"]
        arguments += [f"--{name}.max_length", "128", f"--{name}.checkpoint_every", "1"]
    generator = random.Random(int(os.environ.get("PREFOPT_KILL_SEED", "0")))
    killed = 0
    for _ in range(int(os.environ.get("PREFOPT_KILL_ROUNDS", "10"))):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(generator.uniform(5.0, 20.0))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    last = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr[-2000:]
    print(f"{killed} kills, all files identical")
    assert killed
    assert hashes(folder) == hashes(out)


@pytest.mark.slow
def test_a_changed_setting_is_refused_until_redo_is_asked_for(
    finished, tiny_model, prompt_file, tmp_path
):
    import shutil

    out, _ = finished
    folder = tmp_path / "run"
    shutil.copytree(out, folder)
    kept = hashes(folder, (*FILES, *LABELS))
    same = config(folder, tiny_model, prompt_file)
    changed = replace(same, ppo=replace(same.ppo, learning_rate=2e-3))
    with pytest.raises(RunError, match=r"ppo\.learning_rate: 0\.001 -> 0\.002"):
        run_classic_flow(changed, progress=False)
    run_classic_flow(changed, on_change="redo", progress=False)
    now = hashes(folder, (*FILES, *LABELS))
    again = {name for name in kept if now[name] != kept[name]}
    assert "ppo/adapter_model.safetensors" in again
    assert not again & {*LABELS, "sft/model.safetensors", "reward/heads.safetensors"}


@pytest.mark.slow
def test_preferences_of_ones_own_are_learned_without_asking_a_judge(
    finished, tiny_model, prompt_file, tmp_path
):
    out, _ = finished
    own = config(
        tmp_path / "run", tiny_model, prompt_file,
        preferences=str(out / "preferences.jsonl"), sft=SFTSettings(
            tune="full", learning_rate=1e-4, batch_size=2, max_length=128
        ),
    )  # fmt: skip
    report = run_classic_flow(own, progress=False)
    assert report.win_rate.n == 4
    assert not (tmp_path / "run" / "candidates.jsonl").exists()
    assert not (tmp_path / "run" / "sft_adapter").exists()


def test_bad_input_is_refused_before_the_folder_is_made(tmp_path, tiny_model, prompt_file):
    out = tmp_path / "run"
    with pytest.raises(ModelError, match="no model in folder"):
        run_classic_flow(config(out, str(tmp_path / "nowhere"), prompt_file))
    with pytest.raises(DataError, match="cannot read"):
        run_classic_flow(config(out, tiny_model, prompt_file, replay=str(tmp_path / "no.jsonl")))
    with pytest.raises(ValueError, match=r"k must be.*held_out must.*reward_held_out.*ppo_lora"):
        config(
            out, tiny_model, prompt_file,
            k=1, held_out=0, reward_held_out=1.0, ppo_lora=LoRASettings(continue_from="x"),
        )  # fmt: skip
    assert not out.exists()
