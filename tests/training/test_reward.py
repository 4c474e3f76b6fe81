"""Preference groups to a reward model in a folder: what it learns, resumes, leaves out, reports."""

import copy
import gzip
import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file

from prefopt import RewardModel, evaluate_reward_model
from prefopt.data.labelled import LabelledPair
from prefopt.errors import DataError
from prefopt.models import LoRASettings, load_model
from prefopt.training import reward as module
from prefopt.training.reward import RewardSettings, load_reward_log, train_reward
from prefopt.types import Candidate, Comparison, Preference, PreferenceGroup, Prompt

SETTINGS = RewardSettings(learning_rate=5e-3, batch_size=4, max_length=128, checkpoint_every=1)
LORA = LoRASettings(r=4, alpha=8)
COLOURS = ("green", "red", "blue")


def groups(n=12, k=2, p=1.0):
    """Answers that name colours, the earlier in `COLOURS` the better."""
    made = []
    for i in range(n):
        prompt = Prompt.from_text(f"What is the colour of thing {i}?")
        answers = tuple(
            Candidate(prompt=prompt, text=f"The thing is {c}.", model="m", finish_reason="stop")
            for c in COLOURS[:k]
        )
        preferences = tuple(
            Preference(chosen=i, rejected=j, p_chosen=p) for i in range(k) for j in range(i + 1, k)
        )
        made.append(PreferenceGroup(prompt=prompt, answers=answers, preferences=preferences))
    return made


def train(model, out, data=None, settings=SETTINGS, lora=LORA):
    return train_reward(data or groups(), model, out, settings=settings, lora=lora, progress=False)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "heads.safetensors")


def assert_same_weights(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_it_learns_the_order_of_k_answers_and_centres_their_scores(tiny_model, tmp_path):
    settings = RewardSettings(learning_rate=1e-2, batch_size=4, max_length=128, epochs=4)
    result = train(tiny_model, tmp_path / "reward", data=groups(k=3), settings=settings)
    assert result.n_prompts == 12
    assert result.n_pairs == 36
    assert result.points[-1].loss < 0.3
    assert load_reward_log(result.folder) == result.points
    reward = RewardModel.load(result.folder)
    assert reward.bias == result.bias
    asked = [group.prompt for group in groups()]
    texts = [f"The thing is {c}." for c in COLOURS]
    scores = torch.tensor(reward.score(asked, [texts] * 12))
    assert (scores[:, 0] > scores[:, 1]).all()
    assert (scores[:, 1] > scores[:, 2]).all()
    assert abs(scores.mean().item()) < 1e-5
    card = (result.folder / "README.md").read_text()
    assert "36 preferences among the" in card
    assert f"| bias | {result.bias:.6g}" in card


def test_a_killed_training_ends_with_the_same_model(tiny_model, tmp_path, monkeypatch):
    undisturbed = train(tiny_model, tmp_path / "whole")
    original = module._make_trainer

    def killed_at_step_2(*arguments):
        from transformers import TrainerCallback

        class Kill(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == 2:
                    raise KeyboardInterrupt

        trainer = original(*arguments)
        trainer.add_callback(Kill())
        return trainer

    monkeypatch.setattr(module, "_make_trainer", killed_at_step_2)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path / "resumed")
    monkeypatch.setattr(module, "_make_trainer", original)
    assert not (tmp_path / "resumed").exists()
    assert (tmp_path / "resumed.checkpoints" / "checkpoint-2").exists()
    resumed = train(tiny_model, tmp_path / "resumed")
    assert_same_weights(undisturbed.folder, resumed.folder)
    assert resumed.bias == undisturbed.bias
    assert resumed.points == undisturbed.points
    assert not (tmp_path / "resumed.checkpoints").exists()


def test_another_training_does_not_go_on_from_its_checkpoints(tiny_model, tmp_path, caplog):
    stale = tmp_path / "reward.checkpoints" / "checkpoint-3"
    stale.mkdir(parents=True)
    (stale / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    with caplog.at_level(logging.WARNING):
        result = train(tiny_model, tmp_path / "reward")
    assert "different training" in caplog.text
    assert len(result.points) == 3


def test_a_reward_model_can_be_trained_further(tiny_model, tmp_path):
    first = train(tiny_model, tmp_path / "first")
    lora = LoRASettings(continue_from=str(first.folder))
    second = train(tiny_model, tmp_path / "second", lora=lora)
    assert second.points[0].loss < first.points[0].loss
    assert second.n_parameters_trained == first.n_parameters_trained


def test_prompts_with_a_longer_answer_are_left_out_and_counted(tiny_model, tmp_path, caplog):
    data = groups(5)
    long = Candidate(prompt=data[0].prompt, text="word " * 100, model="m", finish_reason="stop")
    data[0] = PreferenceGroup(
        prompt=data[0].prompt, answers=(data[0].answers[0], long), preferences=data[0].preferences
    )
    with caplog.at_level(logging.WARNING):
        result = train(tiny_model, tmp_path / "reward", data=data)
    assert (result.n_prompts, result.n_left_out) == (4, 1)
    assert "1 of 5 prompts are left out" in caplog.text
    with pytest.raises(DataError, match="no preferences to train on"):
        train(tiny_model, tmp_path / "none", data=data[:1])


@pytest.mark.slow
def test_a_soft_label_is_what_its_probability_says(tiny_model, tmp_path):
    """Trained to the end on p = 0.8, the score difference is log 4."""
    settings = RewardSettings(
        learning_rate=2e-2, batch_size=12, max_length=128, epochs=40, warmup=0.0
    )
    result = train(tiny_model, tmp_path / "reward", data=groups(p=0.8), settings=settings)
    report = evaluate_reward_model(result.folder, groups(p=0.8), progress=False)
    assert report.ece.value < 0.03
    least = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert report.log_loss.value == pytest.approx(least, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin_weight": float("nan")}, "margin_weight"),
        ({"epochs": 0, "batch_size": 0}, "epochs.*batch_size"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"centre_on": -1, "warmup": 1.0}, "warmup.*centre_on"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardSettings(**settings)


# --- Evaluation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward(tiny_model):
    torch.manual_seed(0)
    model = RewardModel.new(load_model(tiny_model), seed=1)
    torch.nn.init.normal_(model.head.weight)
    return model


def labelled(reward, n=20):
    """Pairs whose label is what the model itself says, ties among them."""
    made = []
    for i in range(n):
        prompt = Prompt.from_text(f"What is {i}?", category="even" if i % 2 == 0 else "odd")
        a, b = (
            Candidate(prompt=prompt, text=text, model="m") for text in (f"It is {i}.", "No idea.")
        )
        (scores,) = reward.score([prompt], [[a.text, b.text]])
        label = "tie" if i % 5 == 0 else "a" if scores[0] > scores[1] else "b"
        made.append(LabelledPair(comparison=Comparison(a=a, b=b), label=label))
    return made


def test_a_model_that_made_the_labels_is_always_right(reward):
    report = evaluate_reward_model(reward, labelled(reward), name="own", progress=False)
    assert (report.n, report.n_ties) == (20, 4)
    assert report.accuracy.value == 1.0
    assert set(report.categories) == {"even", "odd"}
    assert "own: 20 pairs, 4 ties" in report.to_text()
    assert any("few" in note for note in report.notes)


def test_files_of_either_kind_are_read(reward, tmp_path):
    folder = tmp_path / "my_set"
    folder.mkdir()
    rows = [{"instruction": "Why?", "response_a": "So.", "response_b": "No.", "label": "B"}]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluate_reward_model(reward, folder / "dev.jsonl", progress=False)
    assert (report.name, report.n) == ("my_set", 1)
    pairs = [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}]
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in pairs))
    other = evaluate_reward_model(reward, folder / "train.jsonl.gz", progress=False)
    assert other.name == "my_set"
    assert other.accuracy.value == 1.0 - report.accuracy.value
    (folder / "torn.jsonl.gz").write_bytes((folder / "train.jsonl.gz").read_bytes()[:20])
    with pytest.raises(DataError, match="cannot read"):
        evaluate_reward_model(reward, folder / "torn.jsonl.gz", progress=False)


def test_a_sample_is_the_same_for_a_seed(reward):
    pairs = labelled(reward)
    one, two = (
        evaluate_reward_model(reward, copy.copy(pairs), max_pairs=7, progress=False)
        for _ in range(2)
    )
    assert one == two
    assert one.n == 7
    with pytest.raises(DataError, match="no labelled pairs"):
        evaluate_reward_model(reward, [], progress=False)
