"""Measuring prompts: what is asked, who chooses, who confirms, and that nothing is asked twice."""

import msgspec
import pytest

from prefopt.errors import DataError
from prefopt.evaluation.prompt_baseline import (
    PromptVariant,
    measure_prompts,
    prompt_variants,
)
from prefopt.judges.rubric import HOUSE_STYLE
from prefopt.judges.scripted import ScriptedJudge
from prefopt.models import load_model
from prefopt.sampling.candidates import SamplingSettings
from prefopt.types import Candidate, Message, Preference, PreferenceGroup, Prompt, Verdict

PROMPTS = [Prompt.from_text(f"What is {i} and {i}?") for i in range(24)]
SETTINGS = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=4, batch_size=16)
GOOD = PromptVariant(name="good", system="Be good.")
BAD = PromptVariant(name="bad", system="Be bad.")


def prefers_good(comparison):
    """The answer that was asked for well wins, and the plain one beats any other."""
    order = ("(good)", "(plain)", "(bad)")
    a, b = (next(i for i, name in enumerate(order) if name in c.model)
            for c in (comparison.a, comparison.b))  # fmt: skip
    return "a" if a < b else "b"


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_model(tiny_model)


def measure(loaded, out, decide=prefers_good, variants=(BAD, GOOD), prompts=PROMPTS):
    judge = ScriptedJudge(decide)
    return measure_prompts(
        prompts, variants, loaded, judge, out, sampling=SETTINGS, progress=False
    )  # fmt: skip


def group(prompt, chosen, p=1.0):
    prompt = prompt if isinstance(prompt, Prompt) else Prompt.from_text(prompt)
    answers = tuple(Candidate(prompt=prompt, text=t, model="m") for t in (chosen, "worse"))
    given = Preference(chosen=0, rejected=1, p_chosen=p, p_source="given")
    return PreferenceGroup(prompt=prompt, answers=answers, preferences=(given,))


def test_the_best_way_of_asking_is_confirmed_on_prompts_that_did_not_choose_it(loaded, tmp_path):
    seen = []

    def decide(comparison):
        seen.append(comparison)
        return prefers_good(comparison)

    baseline = measure(loaded, tmp_path, decide)
    assert baseline.best == GOOD
    assert [v.name for v in baseline.variants] == ["bad", "good"]
    assert [v.win_rate.win_rate for v in baseline.variants] == [0.0, 1.0]
    assert (baseline.confirmed.win_rate, baseline.confirmed.n_prompts) == (1.0, 12)
    asked = {
        name: {c.a.prompt.prompt_id for c in seen if f"({name})" in c.a.model + c.b.model}
        for name in ("bad", "good", "plain")
    }
    assert len(asked["bad"]) == 12  # the half that chooses
    assert asked["good"] == {p.prompt_id for p in PROMPTS}  # both
    # The judge reads the question as it was asked, not what the model was told.
    assert all(c.a.prompt in PROMPTS and c.b.prompt == c.a.prompt for c in seen)
    assert asked["plain"] == asked["good"]


def test_nothing_is_confirmed_where_no_way_of_asking_did_better(loaded, tmp_path):
    baseline = measure(loaded, tmp_path, lambda c: "a" if "(plain)" in c.a.model else "b")
    assert (baseline.best, baseline.confirmed, baseline.n_extra_characters) == (None, None, 0)
    assert measure(loaded, tmp_path / "ties", lambda _: "tie").best is None


def test_a_second_call_asks_nobody_again(loaded, tmp_path):
    calls = []

    def decide(comparison):
        calls.append(comparison)
        return prefers_good(comparison)

    first = measure(loaded, tmp_path, decide)
    n_calls = len(calls)
    assert measure(loaded, tmp_path, decide) == first
    assert len(calls) == n_calls > 0


def test_a_judge_that_fails_is_a_reason_and_not_a_tie(loaded, tmp_path):
    def decide(comparison):
        if "(bad)" in comparison.a.model + comparison.b.model:
            return Verdict(judge="scripted", failure="malformed")
        return prefers_good(comparison)

    baseline = measure(loaded, tmp_path, decide)
    bad = baseline.variants[0]
    assert bad.win_rate is None
    assert bad.problem
    assert baseline.best == GOOD


def test_too_few_prompts_and_repeated_names_are_refused_together(loaded, tmp_path):
    with pytest.raises(DataError) as raised:
        measure(loaded, tmp_path, variants=(GOOD, GOOD), prompts=PROMPTS[:3] * 9)
    assert "3 different prompts; at least 20" in str(raised.value)
    assert "two ways of asking are called 'good'" in str(raised.value)
    with pytest.raises(DataError, match="no way of asking"):
        measure(loaded, tmp_path, variants=())


def test_variants_show_the_shortest_certain_single_turn_examples():
    turns = Prompt.from_messages([Message("system", "s"), Message("user", "q")])
    groups = [
        group("long question, much longer", "and a long answer"),
        group("short", "yes"),
        group("unsure", "no", p=0.5),
        group(turns, "x"),
        group("é", "ü"),
    ]
    found = prompt_variants(HOUSE_STYLE, groups, system_texts=[("own.txt", "Be me.")], n_examples=2)
    assert [v.name for v in found] == [
        "own.txt", "rubric as instructions", "examples", "instructions and examples"
    ]  # fmt: skip
    assert found[0].system == "Be me."
    assert HOUSE_STYLE.text in found[1].system
    assert [m.content for m in found[2].examples] == ["é", "ü", "short", "yes"]
    assert found[3].examples == found[2].examples
    assert [v.name for v in prompt_variants(HOUSE_STYLE)] == ["rubric as instructions"]


def test_a_variant_comes_before_the_prompts_own_system_text():
    example = (Message("user", "q"), Message("assistant", "a"))
    variant = PromptVariant(name="v", system="A", examples=example)
    prompt = Prompt.from_messages([Message("system", "B"), Message("user", "hi")], "c")
    asked = variant.apply(prompt)
    assert [(m.role, m.content) for m in asked.messages] == [
        ("system", "A\n\nB"), ("user", "q"), ("assistant", "a"), ("user", "hi")
    ]  # fmt: skip
    assert asked.category == "c"
    folded = variant.apply(prompt, system_role=False)
    assert [(m.role, m.content) for m in folded.messages] == [
        ("user", "A\n\nB\n\nq"), ("assistant", "a"), ("user", "hi")
    ]  # fmt: skip
    plain = PromptVariant(name="plain")
    assert plain.apply(Prompt.from_text("hi")) == Prompt.from_text("hi")


def test_a_baseline_survives_the_disk(loaded, tmp_path):
    baseline = measure(loaded, tmp_path)
    assert msgspec.json.decode(msgspec.json.encode(baseline), type=type(baseline)) == baseline
