"""The forgetting flow on a tiny model: it finishes, goes on where it was stopped, and compares."""

import json
from dataclasses import replace

import pytest

from prefopt import forgetting_flow as module
from prefopt.data.records import read_records, write_bytes
from prefopt.data.reviews import (
    Review,
    label_scores,
    load_reviews,
    review_preferences,
    split_reviews,
)
from prefopt.errors import DataError
from prefopt.evaluation.capability_report import compare_items
from prefopt.evaluation.capability_scores import ItemScore, TaskScores
from prefopt.evaluation.forgetting import (
    MitigationOutcome,
    compare_scores,
    forgetting_figure,
    forgetting_table,
)
from prefopt.forgetting_flow import ForgettingConfig, run_forgetting_flow, ways
from prefopt.models import LoRASettings
from prefopt.training.dpo import DPOSettings, load_training_log
from prefopt.types import Candidate
from tests.tiny_models import save_tiny_model


def config(out, model, **changes):
    values = {
        "out": str(out),
        "model": model,
        "n_train": 8,
        "n_held_out": 10,
        "lora": LoRASettings(r=8),
        "dpo": DPOSettings(learning_rate=0.02, batch_size=8, max_length=160, checkpoint_every=1),
        "tasks": ["prefopt_reasoning", "prefopt_plain_text"],
        "task_limit": 2,
        **changes,
    }
    return ForgettingConfig(**values)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), context=1024)


@pytest.mark.slow
def test_it_finishes_and_goes_on_where_it_was_stopped(tiny, tmp_path, monkeypatch):
    original = module._task_scores
    three = [w for w in ways(config(tmp_path, tiny)) if w.key in ("none", "replay20", "nll")]
    monkeypatch.setattr(module, "ways", lambda _: three)

    def stop_at_the_second(tuned, *arguments):
        if "20 %" in tuned.name:
            raise KeyboardInterrupt
        return original(tuned, *arguments)

    monkeypatch.setattr(module, "_task_scores", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_forgetting_flow(config(tmp_path / "run", tiny), progress=False)
    first = (tmp_path / "run" / "scores_none.jsonl").read_bytes()
    monkeypatch.setattr(module, "_task_scores", original)
    outcomes = run_forgetting_flow(config(tmp_path / "run", tiny), progress=False)
    assert (tmp_path / "run" / "scores_none.jsonl").read_bytes() == first
    assert [o.name for o in outcomes] == [way.name for way in three]
    assert outcomes[0].against_none == ()
    assert all([c.n for c in o.changes] == [2, 2] for o in outcomes)
    assert all([c.n for c in o.against_none] == [2, 2] for o in outcomes[1:])
    assert {(o.gain.n, o.gain.base) for o in outcomes} == {(10, 0.0)}
    assert len({o.changes[1].base for o in outcomes}) == 1
    assert len({o.changes[1].tuned for o in outcomes}) == 3
    assert load_training_log(tmp_path / "run" / "adapter_replay20")[0].replay_nll > 0
    assert load_training_log(tmp_path / "run" / "adapter_none")[0].replay_nll is None
    text = (tmp_path / "run" / "forgetting.md").read_text(encoding="utf-8")
    assert text.strip() == forgetting_table(outcomes)
    assert (tmp_path / "run" / "forgetting.png").stat().st_size > 10_000
    read = read_records(tmp_path / "run" / "outcome_replay20.jsonl", MitigationOutcome)
    assert read == [outcomes[1]]


def test_each_way_changes_one_thing(tiny, tmp_path):
    first, *others = ways(config(tmp_path, tiny))
    assert (first.dpo.loss, first.lora.r) == (["sigmoid"], 8)
    for way in others:
        changed = {
            name
            for part, start in ((way.dpo, first.dpo), (way.lora, first.lora))
            for name in vars(part)
            if vars(part)[name] != vars(start)[name]
        }
        allowed = {
            "nll": {"loss", "loss_weights"}, "rank": {"r", "alpha"}, "rate": {"learning_rate"},
            "steps": {"epochs"}, "replay20": {"replay_share"}, "replay10": set(),  # the default
        }  # fmt: skip
        assert changed == allowed[way.key]


def test_what_cannot_be_is_refused_before_work(tiny, tmp_path):
    start = config(tmp_path / "run", tiny)
    with pytest.raises(
        ValueError, match=r"without mitigation.*learning_rate is needed.*lower_rate"
    ):
        replace(start, dpo=DPOSettings(replay="a.txt"), lower_rate=1.0)
    with pytest.raises(DataError, match=r"no\.jsonl"):
        run_forgetting_flow(replace(start, replay="no.jsonl"), progress=False)
    with pytest.raises(DataError, match="104 reviews to learn from and 10 held out"):
        run_forgetting_flow(replace(start, n_train=104), progress=False)
    held_out = split_reviews(load_reviews(), n_train=8, n_held_out=10, seed=0)[1]
    rows = [{"prompt": held_out[0].prompt().text, "completion": "positive"}]
    write_bytes(tmp_path / "rows.json", json.dumps(rows).encode())
    with pytest.raises(DataError, match="on which forgetting is measured"):
        run_forgetting_flow(replace(start, replay=str(tmp_path / "rows.json")), progress=False)
    assert not (tmp_path / "run").exists()


def scores(side, values, task="t", higher=True):
    return TaskScores(
        key="k", side=side, model="m", task=task, title="Task", metric="acc", seconds=0.0,
        higher_is_better=higher,
        items=tuple(ItemScore(item=str(i), score=v) for i, v in enumerate(values)),
    )  # fmt: skip


def test_the_same_items_are_compared_and_the_p_values_are_holms():
    before = {"a": scores("base", [1.0] * 20 + [0.0] * 20), "b": scores("base", [1.0, 0.0] * 20)}
    after = {
        "a": scores("tuned", [0.0] * 10 + [1.0] * 10 + [0.0] * 20),
        "b": scores("tuned", [1.0, 0.0] * 19 + [0.0, 0.0]),
        "c": scores("tuned", [1.0]),
    }
    lost, same = compare_scores(before, after)
    assert (lost.n_worse, lost.n_better, lost.verdict) == (10, 0, "dropped")
    assert lost.p_value == pytest.approx(2 * 2 * 0.5**10)  # McNemar's, times two tasks
    assert (same.n_worse, same.verdict) == (1, "no change shown")


def test_table_and_figure_show_what_helped():
    base = {"t": scores("base", [1.0] * 40)}
    none, kept = [1.0] * 20 + [0.0] * 20, [1.0] * 38 + [0.0] * 2

    def outcome(name, values, against):
        return MitigationOutcome(
            key=name, name=name, n_steps=9, learning_rate=0.004,
            gain=compare_items("g", "Gain", "acc", [0.0] * 10, [1.0] * 9 + [0.0]),
            changes=compare_scores(base, {"t": scores("tuned", values)}),
            against_none=compare_scores(against, {"t": scores("tuned", values)}),
        )  # fmt: skip

    outcomes = [
        outcome("no mitigation", none, {}),
        outcome("replay", kept, {"t": scores("tuned", none)}),
        outcome("worse", [0.0] * 40, {"t": scores("tuned", none)}),
    ]
    assert [o.helped("t") for o in outcomes] == [
        "no difference shown", "less forgotten", "more forgotten",
    ]  # fmt: skip
    header, _, first, second, third = forgetting_table(outcomes).splitlines()
    assert header == "|  | steps | rate | Gain (0%) | Task (100%) |"
    assert first == "| no mitigation | 9 | 0.004 | 90% ↑ | 50% ↓ |"
    assert second == "| replay | 9 | 0.004 | 90% ↑ | 95%, helps |"
    assert third == "| worse | 9 | 0.004 | 90% ↑ | 0% ↓, hurts |"
    for runs in ([outcomes], [outcomes, outcomes]):
        drawn = [text.get_text() for ax in forgetting_figure(runs).axes for text in ax.texts]
        assert drawn == ["no mitigation", "replay", "worse"]


def test_reviews_are_split_with_as_many_of_each_label_and_labels_are_right_or_wrong():
    reviews = load_reviews()
    assert len({review.text for review in reviews}) == len(reviews) == 104
    learned, measured = split_reviews(reviews, n_train=32, n_held_out=72, seed=1)
    for side in (learned, measured):
        assert sum(review.label == "positive" for review in side) * 2 == len(side)
    assert learned != split_reviews(reviews, n_train=32, n_held_out=40, seed=2)[0]
    (group,) = review_preferences(learned[:1])
    texts = [answer.text for answer in group.answers]
    assert [texts[p.chosen] for p in group.preferences] == [learned[0].label] * 2
    said = [" Positive.", "positively", "negative", "This review is positive."]
    answers = [Candidate(prompt=learned[0].prompt(), text=text, model="m") for text in said]
    review = Review("It is good.", "positive")
    assert label_scores([review] * 4, answers) == [1.0, 0.0, 0.0, 0.0]
