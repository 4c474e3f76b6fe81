"""PPO from prompts to an adapter in a folder: what it learns, saves, resumes and refuses."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from prefopt.errors import DataError, TrainingError
from prefopt.models import LoRASettings, load_model
from prefopt.training.ppo import PPOSettings, load_ppo_log, train_ppo
from prefopt.training.reward_model import RewardModel
from prefopt.types import Prompt

SETTINGS = PPOSettings(
    rollouts=3, prompts_per_rollout=4, answers_per_prompt=2, max_new_tokens=6, epochs=2,
    learning_rate=5e-3, checkpoint_every=1, kl_target=1.0,
)  # fmt: skip
LORA = LoRASettings(r=4, alpha=8)
PROMPTS = [Prompt.from_text(f"What is thing {i}?") for i in range(5)]


def vowels(prompts, answers):
    assert all(isinstance(p, Prompt) for p in prompts)
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in answers]


def train(model, out, reward=vowels, settings=SETTINGS, **more):
    return train_ppo(
        PROMPTS, model, reward, out, settings=settings, lora=LORA, progress=False, **more
    )


def test_from_prompts_to_an_adapter(tiny_model, tmp_path):
    texts = [f"The sea is green and thing {i} is not." for i in range(5)]
    result = train(tiny_model, tmp_path / "out", held_out=PROMPTS[:2], replay=texts)
    assert result.adapter == tmp_path / "out"
    assert result.reference == "the base model (adapter off)"
    assert (result.n_prompts, result.n_answers, len(result.points)) == (5, 24, 3)
    assert result.points[0].kl == pytest.approx(0.0, abs=1e-4)
    assert result.health
    assert load_ppo_log(result.adapter) == result.points
    card = (result.adapter / "README.md").read_text()
    assert "the base model (adapter off)" in card
    assert result.n_replay == 5
    assert "| general data | 5 rows, 10% of a step, weight 1 |" in card
    lines = [json.loads(x) for x in (result.adapter / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 4 + [2] * 4 + [4] * 4
    assert not (tmp_path / "out.checkpoints").exists()
    # It is an ordinary adapter, and the value lies beside it.
    loaded = load_model(tiny_model, adapter=result.adapter)
    assert any(p.abs().max() > 0 for n, p in loaded.model.named_parameters() if "lora_B" in n)
    assert RewardModel.load(result.adapter / "value", base=load_model(tiny_model)).adapter


def test_a_killed_run_goes_on_and_ends_the_same(tiny_model, tmp_path):
    settings = replace(SETTINGS, rollouts=4, checkpoint_every=2)
    whole = train(tiny_model, tmp_path / "whole", settings=settings)
    calls = []

    def dies(prompts, answers):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return vowels(prompts, answers)

    # A reward is known by its name.
    dies.__qualname__, dies.__module__ = vowels.__qualname__, vowels.__module__
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path / "out", reward=dies, settings=settings)
    assert (tmp_path / "out.checkpoints" / "checkpoint-4").is_dir()
    resumed = train(tiny_model, tmp_path / "out", settings=settings)
    assert resumed.points == whole.points
    for file in ("adapter_model.safetensors", "value/adapter_model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("out", "whole"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[n], two[n]) for n in one)
    answers = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("out", "whole")]
    assert answers[0] == answers[1]


def test_a_reward_models_folder_is_put_on_the_policys_base(tiny_model, tmp_path):
    from prefopt.models import lora_config

    made = RewardModel.new(load_model(tiny_model), peft_config=lora_config(LORA), seed=1)
    made.save(tmp_path / "reward")
    loaded = load_model(tiny_model)
    settings = replace(SETTINGS, rollouts=1)
    result = train(loaded, tmp_path / "out", reward=tmp_path / "reward", settings=settings)
    assert {"reward", "default", "value"} <= {
        part for n, _ in loaded.model.named_parameters() for part in n.split(".")
    }
    assert result.points[-1].step == 2


def test_an_adapter_is_trained_further_and_is_the_reference(tiny_model, tmp_path):
    settings = replace(SETTINGS, rollouts=1)
    first = train(tiny_model, tmp_path / "first", settings=settings)
    result = train_ppo(
        PROMPTS, tiny_model, vowels, tmp_path / "second", settings=settings, progress=False,
        lora=LoRASettings(continue_from=str(first.adapter)),
    )  # fmt: skip
    assert result.reference == "a frozen copy of the adapter as it is now"
    assert result.points[0].kl == pytest.approx(0.0, abs=1e-4)


def test_what_cannot_be(tiny_model, tmp_path):
    with pytest.raises(DataError, match="no prompts"):
        train_ppo([], tiny_model, vowels, tmp_path / "out")
    with pytest.raises(ValueError, match=r"rollouts must be at least 1.*rloo needs"):
        PPOSettings(rollouts=0, advantage="rloo", answers_per_prompt=1)
    with pytest.raises(TrainingError, match="none of 8 answers"):
        train(tiny_model, tmp_path / "out", reward=lambda p, a: [None] * len(a))
