"""A reward model as a judge, and best-of-n by it."""

import math

import pytest
import torch

from prefopt import RewardModel, judge_comparisons, load_judge
from prefopt.judges.reward_model import RewardModelJudge
from prefopt.models import load_model
from prefopt.types import Candidate, Comparison, Prompt


@pytest.fixture(scope="module")
def reward(tiny_model):
    model = RewardModel.new(load_model(tiny_model), seed=1)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture(scope="module")
def folder(reward, tmp_path_factory):
    return reward.save(tmp_path_factory.mktemp("judges") / "reward")


def comparison(a, b, prompt="What is blue?"):
    asked = Prompt.from_text(prompt)
    return Comparison(
        a=Candidate(prompt=asked, text=a, model="m"), b=Candidate(prompt=asked, text=b, model="m")
    )


ITEMS = [
    comparison("The sky.", "The sea is green."),
    comparison("Fine.", "Thank you.", "Hello!"),
    comparison("same", "same"),
]


def test_the_higher_score_wins_with_the_probability_of_the_difference(reward):
    judge = RewardModelJudge(reward)
    for index, verdict in judge.verdicts(ITEMS):
        item = ITEMS[index]
        ((a, b),) = reward.score([item.prompt], [[item.a.text, item.b.text]])
        assert verdict.p_a == pytest.approx(1 / (1 + math.exp(b - a)), abs=1e-5)
        if index == 2:
            assert (verdict.preferred, verdict.strength, verdict.p_a) == ("tie", 0, 0.5)
        else:
            assert verdict.preferred == ("a" if a > b else "b")


def test_thresholds_make_ties_and_strength(reward):
    always_strong = RewardModelJudge(reward, tie_below=0.5, strong_from=0.5)
    never_decides = RewardModelJudge(reward, tie_below=1.0, strong_from=1.0)
    assert [v.strength for _, v in always_strong.verdicts(ITEMS[:2])] == [2, 2]
    assert {v.preferred for _, v in never_decides.verdicts(ITEMS)} == {"tie"}
    with pytest.raises(ValueError, match="must hold"):
        RewardModelJudge(reward, tie_below=0.9, strong_from=0.6)


def test_both_orders_agree(reward):
    judged = judge_comparisons(ITEMS, RewardModelJudge(reward), progress=False)
    assert not any(item.flipped for item in judged)
    assert not any(item.failures for item in judged)


def test_an_answer_without_a_score_is_a_failure_and_no_tie(reward):
    items = [comparison("", "The sky."), comparison("The sky.", "word " * 300), ITEMS[0]]
    verdicts = dict(RewardModelJudge(reward).verdicts(items))
    assert verdicts[0].failure == "empty"
    assert verdicts[1].failure == "too_long"
    assert verdicts[2].failure is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_a_failure_and_nobody_wins(reward, monkeypatch, broken):
    def scores(tokenized):
        return [[broken, *[0.5] * (len(row) - 1)] for row in tokenized]

    monkeypatch.setattr(reward, "score_ids", scores)
    verdicts = dict(RewardModelJudge(reward).verdicts(ITEMS[:2]))
    assert [(v.failure, v.preferred) for v in verdicts.values()] == [("not_finite", None)] * 2


def test_it_is_named_by_its_folder(folder, reward):
    judge = load_judge(f"reward:{folder}")
    assert judge.name == f"reward:{folder}"
    loaded = dict(judge.verdicts(ITEMS))
    given = dict(RewardModelJudge(reward).verdicts(ITEMS))
    assert [loaded[i].p_a for i in loaded] == [given[i].p_a for i in given]


def test_the_fingerprint_follows_weights_and_thresholds(folder, reward, tmp_path):
    assert load_judge(f"reward:{folder}").fingerprint == load_judge(f"reward:{folder}").fingerprint
    reward.bias += 1.0
    other = reward.save(tmp_path / "other")
    changed = RewardModelJudge(reward).fingerprint
    reward.bias -= 1.0
    prints = {
        load_judge(f"reward:{folder}").fingerprint,
        load_judge(f"reward:{other}").fingerprint,
        RewardModelJudge(folder, tie_below=0.6).fingerprint,
        RewardModelJudge(reward).fingerprint,
        changed,
    }
    assert len(prints) == 5


def test_it_sits_on_a_panel_beside_another_judge(folder, tmp_path):
    """A labelling job with two judges, one of them a reward model."""
    from prefopt.data.records import write_records
    from prefopt.label_job import LabelConfig, label_candidates

    candidates = [
        Candidate(prompt=Prompt.from_text(f"What is {i}?"), text=text, model="m", sample_index=j)
        for i in range(4)
        for j, text in enumerate((f"It is {i}.", "No idea at all, sorry."))
    ]
    write_records(tmp_path / "candidates.jsonl", candidates)
    config = LabelConfig(
        candidates=str(tmp_path / "candidates.jsonl"), out=str(tmp_path / "job"),
        judge="scripted:shortest", second_judge=f"reward:{folder}",
    )  # fmt: skip
    label_candidates(config, progress=False)
    judged = (tmp_path / "job" / "judged.jsonl").read_text()
    assert "scripted:shortest" in judged
    assert f"reward:{folder}" in judged
