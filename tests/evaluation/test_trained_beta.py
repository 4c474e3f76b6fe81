"""Beta is read from what training itself writes, and never guessed."""

import json
from types import SimpleNamespace

import pytest

from prefopt.evaluation.trained_beta import trained_beta
from prefopt.models import LoRASettings
from prefopt.training.dpo import DPOSettings
from prefopt.training.dpo import _model_card as dpo_card
from prefopt.training.ppo import PPOSettings
from prefopt.training.ppo import _model_card as ppo_card

BASE = "the base model (adapter off)"
POINT = SimpleNamespace(step=1, loss=0.6, margin=0.1, accuracy=0.7, score=1.0, kl=0.5)


def written(folder, card):
    (folder / "README.md").write_text(card)
    return trained_beta(folder)


def dpo(reference=BASE, **settings):
    result = SimpleNamespace(
        points=[POINT], health=[], n_pairs=3, reference=reference, n_parameters_trained=4,
        learning_rate=1e-4, n_replay=0,
    )  # fmt: skip
    return dpo_card("demo", result, DPOSettings(**settings), LoRASettings())


def ppo(reference=BASE, **settings):
    result = SimpleNamespace(
        points=[POINT, POINT], health=[], n_answers=3, n_prompts=3, reference=reference,
        n_parameters_trained=4, learning_rate=1e-4, n_replay=0,
    )  # fmt: skip
    return ppo_card("demo", result, PPOSettings(**settings))


def test_the_cards_of_dpo_and_ppo_say_it(tmp_path):
    found = written(tmp_path, dpo(beta=0.3, loss=("sigmoid", "sft")))
    assert found == (0.3, str(tmp_path / "README.md"))
    assert written(tmp_path, ppo(kl_coef=0.07)).beta == 0.07
    # A checkpoint within the folder has it too.
    assert trained_beta(tmp_path / "checkpoints" / "checkpoint-10").beta == 0.07


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (
            dpo("a frozen copy of the adapter old"),
            "reference was a frozen copy of the adapter old",
        ),
        (ppo(kl_target=6.0), "adapted to a KL of 6"),
        (ppo(kl_coef=0.0), "beta was 0"),
        ("# Somebody's adapter\n| loss | x, beta 0.1 |\n", "no record of its training"),
        ("", "no record of its training"),
    ],
)
def test_without_a_constant_beta_against_the_base_model_there_is_none(tmp_path, card, words):
    folder = tmp_path / "a" / "b" / "c" / "d"
    folder.mkdir(parents=True)
    found = written(folder, card)
    assert found.beta is None
    assert words in found.reason


def test_a_run_says_it_for_what_lies_in_it(tmp_path):
    checkpoint = tmp_path / ".partial" / "checkpoints" / "checkpoint-10"
    checkpoint.mkdir(parents=True)

    def run(text):
        (tmp_path / "run.json").write_text(text)
        return trained_beta(checkpoint)

    config = {"model": "demo", "lora": {"continue_from": None}, "dpo": {"beta": 0.2}}
    assert run(json.dumps(config)).beta == 0.2
    assert run(json.dumps({"ppo": {"kl_coef": 0.05, "kl_target": None}})).beta == 0.05
    assert run(json.dumps({"ppo": {"kl_coef": 0.05, "kl_target": 6.0}})).beta is None
    config["lora"] = {"continue_from": "old"}
    assert "the adapter old" in run(json.dumps(config)).reason
    for odd in ("", "{", "[]", "null", '{"dpo": 3}', '{"dpo": {"beta": "x"}}'):
        assert run(odd).beta is None, odd
