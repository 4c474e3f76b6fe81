"""The forgetting flow on a tiny model: it finishes, goes on where it was stopped, and compares."""

from dataclasses import replace

import pytest

from prefopt import forgetting_flow as module
from prefopt.data.records import read_records
from prefopt.errors import DataError
from prefopt.evaluation.capabilities import ItemScore, TaskScores
from prefopt.evaluation.forgetting import (
    MitigationOutcome,
    compare_scores,
    forgetting_figure,
    forgetting_table,
)
from prefopt.evaluation.win_rate import win_rate
from prefopt.forgetting_flow import ForgettingConfig, run_forgetting_flow, ways
from prefopt.models import LoRASettings
from prefopt.sampling.candidates import SamplingSettings
from prefopt.training.dpo import DPOSettings
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict
from tests.tiny_models import save_tiny_model


def config(out, model, prompts, **changes):
    values = {
        "out": str(out),
        "model": model,
        "prompts": str(prompts),
        "held_out": 3,
        "judge": "scripted:shortest",
        "k": 2,
        "sampling": SamplingSettings(temperature=1.0, max_new_tokens=6, batch_size=9),
        "lora": LoRASettings(r=8),
        "dpo": DPOSettings(learning_rate=0.02, batch_size=2, max_length=96, checkpoint_every=1),
        "tasks": ["prefopt_reasoning", "prefopt_plain_text"],
        "task_limit": 3,
        **changes,
    }
    return ForgettingConfig(**values)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(9)), encoding="utf-8"
    )
    return save_tiny_model(folder / "model", context=1024), folder / "prompts.jsonl"


def test_it_finishes_and_goes_on_where_it_was_stopped(tiny, tmp_path, monkeypatch):
    original = module._task_scores
    three = [way for way in ways(config(tmp_path, *tiny)) if way.key in ("none", "replay20", "nll")]
    monkeypatch.setattr(module, "ways", lambda _: three)

    def stop_at_the_second(tuned, *arguments):
        if "20 %" in tuned.name:
            raise KeyboardInterrupt
        return original(tuned, *arguments)

    monkeypatch.setattr(module, "_task_scores", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_forgetting_flow(config(tmp_path / "run", *tiny), progress=False)
    first = (tmp_path / "run" / "scores_none.jsonl").read_bytes()
    monkeypatch.setattr(module, "_task_scores", original)
    outcomes = run_forgetting_flow(config(tmp_path / "run", *tiny), progress=False)
    assert (tmp_path / "run" / "scores_none.jsonl").read_bytes() == first
    assert [o.name for o in outcomes] == [way.name for way in three]
    assert outcomes[0].against_none == ()
    assert all([c.n for c in o.changes] == [3, 3] for o in outcomes)
    assert all([c.n for c in o.against_none] == [3, 3] for o in outcomes[1:])
    assert len({o.perplexity_base for o in outcomes}) == 1
    assert len({o.perplexity_tuned for o in outcomes}) == len(outcomes)
    text = (tmp_path / "run" / "forgetting.md").read_text(encoding="utf-8")
    assert text.strip() == forgetting_table(outcomes)
    assert (tmp_path / "run" / "forgetting.png").stat().st_size > 10_000
    monkeypatch.setattr(module, "_measured", None)  # nothing is left to do but to read
    read = read_records(tmp_path / "run" / "outcome_replay20.jsonl", MitigationOutcome)
    assert read == [outcomes[1]]


def test_each_way_changes_one_thing(tiny, tmp_path):
    first, *others = ways(config(tmp_path, *tiny))
    assert (first.dpo.loss, first.lora.r) == (["sigmoid"], 8)
    for way in others:
        changed = [
            name
            for part, start in ((way.dpo, first.dpo), (way.lora, first.lora))
            for name in vars(part)
            if vars(part)[name] != vars(start)[name]
        ]
        allowed = {"nll": {"loss", "loss_weights"}, "rank": {"r", "alpha"}}
        assert set(changed) <= allowed.get(way.key, {"learning_rate", "epochs", "replay_share"})
        assert changed or way.key == "replay10"  # its share is the default


def test_what_cannot_be_is_refused_before_work(tiny, tmp_path):
    start = config(tmp_path / "run", *tiny)
    for changes, words in (
        ({"dpo": replace(start.dpo, replay="a.txt")}, "without mitigation"),
        ({"dpo": replace(start.dpo, learning_rate=None)}, "learning_rate must be given"),
        ({"lower_rate": 1.0}, "lower_rate"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(start, **changes)
    with pytest.raises(DataError, match=r"no\.jsonl"):
        run_forgetting_flow(replace(start, replay="no.jsonl"), progress=False)
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
    prompts = [Prompt.from_text(f"p{i}") for i in range(10)]
    judged = [
        JudgedComparison(
            comparison=Comparison(
                a=Candidate(prompt=p, text="one", model="t"),
                b=Candidate(prompt=p, text="two three", model="b"),
            ),
            forward=Verdict(judge="j", preferred="a" if i else "b", strength=1),
        )
        for i, p in enumerate(prompts)
    ]
    base = {"t": scores("base", [1.0] * 40)}
    none, kept = [1.0] * 20 + [0.0] * 20, [1.0] * 38 + [0.0] * 2

    def outcome(name, values, against, perplexity):
        return MitigationOutcome(
            name=name, n_steps=9, learning_rate=0.004, win_rate=win_rate(judged),
            perplexity_base=10.0, perplexity_tuned=perplexity,
            changes=compare_scores(base, {"t": scores("tuned", values)}),
            against_none=compare_scores(against, {"t": scores("tuned", values)}),
        )  # fmt: skip

    outcomes = [
        outcome("no mitigation", none, {}, 15.0),
        outcome("replay", kept, {"t": scores("tuned", none)}, 10.5),
        outcome("worse", [0.0] * 40, {"t": scores("tuned", none)}, 20.0),
    ]
    assert [o.helped("t") for o in outcomes] == [
        "no difference shown", "less forgotten", "more forgotten",
    ]  # fmt: skip
    header, _, first, second, third = forgetting_table(outcomes).splitlines()
    assert header == "|  | steps | rate | win rate (95 %) | perplexity | Task (100%) |"
    assert first.startswith("| no mitigation | 9 | 0.004 | 90% (")
    assert first.endswith("| +50.0% | 50% ↓ |")
    assert second.endswith("| +5.0% | 95%, helps |")
    assert third.endswith("| +100.0% | 0% ↓, hurts |")
    drawn = [text.get_text() for ax in forgetting_figure(outcomes).axes for text in ax.texts]
    assert drawn == ["no mitigation", "replay", "worse"] * 2
