"""Reward against KL: best-of-n by hand, the ratio where it is known, and one tiny whole run."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import rlhf_frontier as frontier
from prefopt.sampling.best_of_n import best_of_n_kl, expected_best_of_n


def test_best_of_n_by_hand_and_at_its_own_kl():
    best = frontier.BestOf(np.array([[3.0, 0.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]]))
    assert best.reward(1) == pytest.approx([1.5, 1.0])
    # The larger of two different ones: 1, 2 and 3 of the six pairs.
    assert best.reward(2) == pytest.approx([(1 * 1 + 2 * 2 + 3 * 3) / 6, 1.0])
    assert best.reward(4) == pytest.approx([3.0, 1.0])
    assert best.reward(1000.0) == pytest.approx([3.0, 1.0])
    scores = np.random.default_rng(1).normal(size=(3, 40))
    best = frontier.BestOf(scores)
    for n in (1, 2, 5, 39):
        expected = [expected_best_of_n(row, n) for row in scores.tolist()]
        assert best.reward(n) == pytest.approx(expected)
    between = np.array([best.reward(n) for n in np.linspace(1, 40, 157)])
    assert (np.diff(between, axis=0) > 0).all()
    for n in (1, 2, 7.5, 30.2):
        kl = math.log(n) - (n - 1) / n
        assert best.at_kl(kl) == pytest.approx(best.reward(n), abs=1e-6)
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 3 / 4)


def policy_like_best_of(n, best, scale=1.0):
    """What a policy would measure that is best-of-n with `scale` of its gain."""
    start = best.reward(1)
    gold = start + scale * (best.reward(n) - start)
    kl = [best_of_n_kl(n)] * len(gold)
    return {
        "gold": gold.tolist(), "k1": kl, "k3": kl, "distinct_bigrams": 0.5, "cpu_s": 1.0,
        "sample": "",
    }  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, 0.85, 1.0, 1.1])
def test_the_ratio_is_the_share_of_best_of_ns_gain_at_equal_kl(scale):
    scores = np.random.default_rng(0).normal(size=(40, 64)) + np.arange(40)[:, None]
    best = frontier.BestOf(scores)
    runs = [policy_like_best_of(n, best, scale) for n in (2, 4)]
    found = frontier.summary(runs, best)
    assert found["ratio"]["mean"] == pytest.approx(scale, abs=1e-6)
    assert found["ratio"]["by_seed"] == pytest.approx([scale, scale], abs=1e-6)
    low, high = found["ratio"]["interval"]
    assert low - 1e-6 <= scale <= high + 1e-6
    # Prompts differ by far more than answers; the gain is compared within them.
    assert found["gain"]["interval"][1] - found["gain"]["interval"][0] < 0.5


def test_the_reading_level_by_hand_and_calibrated():
    gold = frontier.ReadingLevel()
    # 12 letters and one end in three words.
    assert gold.raw("Cats like milk .") == pytest.approx(5.88 * 4 - 29.6 / 3 - 15.8)
    assert gold.raw("") == pytest.approx(-15.8)
    texts = ["a big cat .", "enormous strawberry", "it is . it is .", "Tom found shells ."]
    gold.calibrate(texts)
    found = [gold(text) for text in texts]
    assert np.mean(found) == pytest.approx(0, abs=1e-6)
    assert np.std(found) == pytest.approx(1, abs=1e-6)
    assert gold("a" + "." * 9) == -3.0


def test_a_check_that_is_missed_says_so():
    setting = frontier.SETTINGS["sentences"]
    policies = {
        name: {"ratio": {"mean": ratio}, "kl_k1": {"mean": kl}}
        for name, ratio, kl in (
            ("sft", 0.1, 0.1), ("dpo 0.5", 0.89, 1.0), ("dpo 1", 0.95, 0.4), ("ppo", 0.9, 1.0),
        )
    }  # fmt: skip
    found = {c["what"]: c["holds"] for c in frontier.checks(setting, policies, 0.5, 15.1)}
    assert [holds for what, holds in found.items() if "gain" in what] == [False, True, True]
    assert found["KL of the smaller beta / of the larger"]
    assert not found["CPU minutes of a seed, at most"]


@pytest.fixture
def tiny(monkeypatch):
    """Four words an answer, a model of three steps, a few steps of each training."""
    sizes = {"train": 6, "test": 4, "drawn": 2, "pool": 8, "at_once": 16, "opening": 3, "length": 4}
    setting = frontier.SETTINGS["sentences"]
    dpo = setting.dpo | {"per_device_train_batch_size": 2, "learning_rate": 1e-2}
    ppo = setting.ppo | {"per_device_train_batch_size": 4, "num_rollouts": 1}
    tiny = dataclasses.replace(setting, **sizes, dpo=dpo, ppo=ppo)
    monkeypatch.setitem(frontier.SETTINGS, "sentences", tiny)
    model = frontier.sentences(steps=3, n_stories=80)
    monkeypatch.setitem(frontier.MODELS, "sentences", lambda: model)
    return model


def test_the_reference_itself_has_no_kl_and_sampling_follows_its_probabilities(tiny):
    model, tokenizer, first, _ = tiny
    world = frontier.World(model, tokenizer, frontier.SETTINGS["sentences"], first)
    prompts = world.openings(4, 5)
    assert len(set(prompts)) == 4
    assert {len(p) for p in prompts} == {3}
    world.setting = dataclasses.replace(world.setting, opening=2)  # one word after the first token
    with pytest.raises(ValueError, match="1000 different openings of 2 tokens"):
        world.openings(1000, 5)
    found = frontier.evaluate(world, model, prompts, 0)
    assert np.abs(found["k1"]).max() < 1e-4
    (tree,) = world.sample(model, prompts[:1], 1, 0)
    with torch.no_grad():
        ids = torch.tensor([[*tree.prompt_ids, *tree.answers[0]]])
        logps = model(ids).logits.log_softmax(-1)[0, 2:-1]
    expected = [float(logps[i, token]) for i, token in enumerate(tree.answers[0])]
    assert frontier.token_logps(model, [tree])[0, 0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_the_whole_course_its_report_and_what_is_kept(tiny, tmp_path):
    said = []
    parts = frontier.run_frontier([0], tmp_path / "kept", ["sentences"], said.append)
    part = parts["sentences"]
    assert list(part["policies"]) == ["sft", "dpo 0.5", "dpo 1", "ppo"]
    assert all(math.isfinite(p["kl_k1"]["mean"]) for p in part["policies"].values())
    assert all(p["kl_k3"]["mean"] > 1e-4 for p in part["policies"].values())
    assert "CPU minutes for the slowest seed" in said[-1]
    # Nothing is trained again.
    again: list[str] = []
    kept = frontier.run_frontier([0], tmp_path / "kept", ["sentences"], again.append)
    assert kept["sentences"]["policies"] == part["policies"]
    assert len(again) == 1
    part |= {"commit": "c", "machine": "m", "versions": "v"}
    frontier.write(parts, tmp_path / "results")
    # A part that is measured later stands beside it, and one that is measured again takes its place.
    frontier.write({"smollm2": part | {"model": "another"}}, tmp_path / "results")
    frontier.write({"smollm2": part | {"model": "a third"}}, tmp_path / "results")
    found = json.loads((tmp_path / "results/rlhf_frontier.json").read_text())["parts"]
    assert [p["model"] for p in found.values()] == [part["model"], "a third"]
    text = (tmp_path / "results/rlhf_frontier.md").read_text()
    assert text.count("| ppo |") == 2
    assert "--parts smollm2 --seeds 0` at c" in text
    assert b"<svg" in (tmp_path / "results/rlhf_frontier.svg").read_bytes()[:400]


def test_adapters_leave_the_reference_as_it_was(tiny, tmp_path, monkeypatch):
    """The course of SmolLM2: LoRA on one model, no SFT, no PPO."""
    setting = dataclasses.replace(frontier.SETTINGS["sentences"], lora=True, sft=False, ppo=None)
    monkeypatch.setitem(frontier.SETTINGS, "sentences", setting)
    model = tiny[0]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    # Two calls that share what they keep: the first has one policy only, so nothing to report.
    said = []
    assert not frontier.run_frontier([0], tmp_path, ["sentences"], said.append, only=["dpo 0.5"])
    assert said[-1] == "sentences: not measured yet: dpo 1"
    parts = frontier.run_frontier([0], tmp_path, ["sentences"], said.append, only=["dpo 1"])
    assert list(parts["sentences"]["policies"]) == ["dpo 0.5", "dpo 1"]
    assert len([line for line in said if "gold" in line]) == 2
    assert parts["sentences"]["labelling_cpu_s"] > 0
    assert all(p["kl_k3"]["mean"] > 1e-4 for p in parts["sentences"]["policies"].values())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    asked = [check["what"] for check in parts["sentences"]["checks"]]
    assert "dpo 1: distinct bigrams / the reference's" in asked
