"""DPO in rounds on a tiny model: what each round learns from, what is asked, when it stops."""

import json
from dataclasses import replace

import msgspec
import pytest

from prefopt.errors import DataError, JudgeUnavailable
from prefopt.evaluation.model_figures import Mean, PolicyShift
from prefopt.evaluation.win_rate import win_rate
from prefopt.models import LoRASettings
from prefopt.online_flow import (
    OnlineConfig,
    RoundResult,
    best_round,
    rounds_learned,
    run_online_flow,
    why_stop,
    widest_pairs,
)
from prefopt.sampling.candidates import SamplingSettings
from prefopt.training.dpo import DPOSettings
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict


def config(out, model, prompts, **changes):
    values = {
        "out": str(out),
        "model": model,
        "prompts": str(prompts),
        "held_out": 4,
        "judge": "scripted:shortest",
        "k": 3,
        "rounds": 2,
        "stop": "never",
        "sampling": SamplingSettings(temperature=1.0, max_new_tokens=10, batch_size=9),
        "lora": LoRASettings(r=4),
        "dpo": DPOSettings(learning_rate=1e-3, batch_size=2, max_length=128, reference="base"),
        **changes,
    }
    return OnlineConfig(**values)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"Question {i}: what is {i}?"}) for i in range(10)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, prompt_file):
    out = tmp_path_factory.mktemp("online") / "run"
    asked = config(out, tiny_model, prompt_file, pairing="confident")
    return asked, out, run_online_flow(asked, progress=False)


def records(path, kind):
    return [msgspec.json.decode(line, type=kind) for line in path.read_bytes().splitlines()]


def test_each_round_answers_with_the_policy_of_the_round_before(finished):
    _, out, report = finished
    first, second = (records(out / f"round{i}_candidates.jsonl", Candidate) for i in (1, 2))
    assert len(first) == len(second) == 18  # six prompts, three answers
    assert {c.candidate_id for c in first} != {c.candidate_id for c in second}
    # All three pairs a prompt without an adapter, then the one that its rewards choose.
    assert len((out / "round1_judged.jsonl").read_text().splitlines()) == 18
    assert len((out / "round2_judged.jsonl").read_text().splitlines()) == 6
    assert "round 1" in report.details
    assert "round 2" in report.details


def test_the_second_round_goes_on_from_the_first_against_the_base_model(finished):
    _, out, _ = finished
    logs = [
        json.loads((out / f"round{i}_adapter" / "training_log.jsonl").read_text().splitlines()[0])
        for i in (1, 2)
    ]
    assert logs[0]["margin"] == 0.0
    assert logs[1]["margin"] != 0.0
    card = (out / "round2_adapter" / "README.md").read_text()
    assert "the base model (adapter off)" in card
    assert "round1_adapter" in card


def test_rounds_are_replayed_and_counted(finished):
    _, out, _ = finished
    (one,), (two,) = (records(out / f"round{i}_result.jsonl", RoundResult) for i in (1, 2))
    assert one.n_pairs == one.n_new_pairs
    assert two.n_pairs == one.n_new_pairs + two.n_new_pairs
    assert one.over_last is None
    assert two.over_last is not None
    assert two.stopped == "all rounds done"
    assert two.shift is not None


def test_the_result_is_the_last_round_s_adapter(finished):
    _, out, report = finished
    weights = "adapter_model.safetensors"
    assert (out / "adapter" / weights).read_bytes() == (
        out / "round2_adapter" / weights
    ).read_bytes()
    assert report.tuned_model.endswith("round 2)")
    assert [point.name for point in report.frontier] == ["round 1"]


def test_a_finished_run_does_nothing_again(finished):
    asked, out, report = finished
    before = {p: p.stat().st_mtime_ns for p in out.glob("round*")}
    again = run_online_flow(asked, progress=False)
    assert again == report
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("round*")}


@pytest.mark.slow
def test_a_run_that_was_stopped_between_rounds_goes_on(finished, tiny_model, prompt_file, tmp_path):
    """The same files, and nothing asked twice: round 2's judging fails once."""
    asked, out, report = finished
    from prefopt import online_flow

    here = replace(asked, out=str(tmp_path / "run"))
    original = online_flow.widest_pairs

    def fail(*arguments):
        raise JudgeUnavailable("stopped here")

    online_flow.widest_pairs = fail
    try:
        with pytest.raises(JudgeUnavailable):
            run_online_flow(here, progress=False)
    finally:
        online_flow.widest_pairs = original
    first = (tmp_path / "run" / "round1_adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert run_online_flow(here, progress=False).win_rate == report.win_rate
    for name in ("round2_judged.jsonl", "round2_adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (out / name).read_bytes(), name
    second = (tmp_path / "run" / "round1_adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert first == second


# --- Choices, by hand ------------------------------------------------------------------------


def answer(text, prompt="p", model="m"):
    return Candidate(prompt=Prompt.from_text(prompt), text=text, model=model)


ANSWERS = [answer(text) for text in ("a", "b", "c")]


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ("confident", [{"a", "c"}]),
        ("uncertain", [{"a", "b"}]),
        ("all", [{"a", "b"}, {"a", "c"}, {"b", "c"}]),
    ],
)
def test_pairs_chosen_by_rewards(pairing, expected):
    found = widest_pairs(ANSWERS, [0.0, 0.5, 2.0], pairing)
    assert [{c.a.text, c.b.text} for c in found] == expected


def test_answers_without_a_reward_are_not_chosen_and_equal_texts_only_where_nothing_else_is():
    found = widest_pairs(ANSWERS, [0.0, 0.5, None], "confident")
    assert [{c.a.text, c.b.text} for c in found] == [{"a", "b"}]
    assert len(widest_pairs(ANSWERS, [None, None, None], "confident")) == 3
    twins = [answer("a"), answer("a", model="n"), answer("b")]
    (pair,) = widest_pairs(twins, [0.0, 9.0, 1.0], "uncertain")
    assert {pair.a.text, pair.b.text} == {"a", "b"}


@pytest.mark.parametrize(
    ("number", "replay", "expected"),
    [(1, None, [1]), (3, None, [1, 2, 3]), (3, 0, [3]), (3, 1, [2, 3]), (3, 9, [1, 2, 3])],
)
def test_which_rounds_are_learned_from(number, replay, expected):
    assert list(rounds_learned(number, replay)) == expected


def rate(n_win, n):
    judged = []
    for i in range(n):
        won = "a" if i < n_win else "b"
        judged.append(
            JudgedComparison(
                comparison=Comparison(a=answer("a", f"p{i}"), b=answer("b", f"p{i}")),
                forward=Verdict(judge="j", preferred=won, strength=1),
                backward=Verdict(judge="j", preferred=won, strength=1, shown_first="b"),
            )
        )
    return win_rate(judged)


def result(number, over_last, kl=1.0):
    mean = Mean(value=kl, low=None, high=None, n_prompts=1)
    shift = PolicyShift(
        kl=mean, kl_per_token=0.1, on_base_answers=mean, beta=0.1, sampled="", n_answers=1,
        n_too_long=0,
    )  # fmt: skip
    return RoundResult(
        round=number, n_new_pairs=1, n_pairs=1, over_base=rate(3, 4), over_last=over_last,
        shift=shift, stopped="",
    )  # fmt: skip


def test_when_it_stops():
    asked = OnlineConfig(out="x", rounds=3, max_kl=5.0)
    assert why_stop(result(1, None), asked) == ""
    assert why_stop(result(2, rate(3, 4)), asked) == ""
    assert why_stop(result(3, rate(3, 4)), asked) == "all rounds done"
    assert why_stop(result(2, rate(2, 4)), asked).startswith("no gain over the round before: 50%")
    assert "above max_kl=5" in why_stop(result(2, rate(3, 4), kl=6.0), asked)
    assert why_stop(result(2, rate(0, 4)), replace(asked, stop="never")) == ""


def test_which_round_is_the_result():
    def ended(number, why):
        return msgspec.structs.replace(result(number, None), stopped=why)

    assert best_round([ended(1, ""), ended(2, "all rounds done")]) == 2
    assert best_round([ended(1, ""), ended(2, "no gain over the round before: 40%")]) == 1
    assert best_round([ended(1, "no gain over the round before: 40%")]) == 1


@pytest.mark.slow
def test_tasks_to_be_kept_are_measured_or_refused_before_work(tiny_model, prompt_file, tmp_path):
    asked = config(
        tmp_path / "run", tiny_model, prompt_file, rounds=1, capabilities="prefopt_plain_text"
    )
    report = run_online_flow(asked, progress=False)
    assert [task.task for task in report.capabilities.tasks] == ["prefopt_plain_text"]
    with pytest.raises(DataError, match="prefopt_plain"):
        run_online_flow(
            replace(asked, out=str(tmp_path / "other"), capabilities="prefopt_plain_tex"),
            progress=False,
        )
    assert not (tmp_path / "other").exists()


def test_bad_settings_are_told_all_at_once():
    with pytest.raises(ValueError, match="online settings") as told:
        OnlineConfig(
            out="x",
            k=1,
            rounds=0,
            replay_rounds=-1,
            max_kl=0.0,
            lora=LoRASettings(continue_from="y"),
        )
    for name in ("k must", "rounds", "replay_rounds", "max_kl", "continue_from"):
        assert name in str(told.value)
