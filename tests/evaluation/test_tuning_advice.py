"""Prompting, retrieval or tuning: the rules as a table, and an advice a reader can act on."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.errors import DataError
from prefopt.evaluation.advise import advise
from prefopt.evaluation.prompt_baseline import PromptBaseline, PromptVariant, VariantResult
from prefopt.evaluation.tuning_advice import TuningAdvice, advise_tuning
from prefopt.evaluation.win_rate import win_rate
from prefopt.judges.scripted import ScriptedJudge
from prefopt.sampling.candidates import SamplingSettings
from prefopt.types import Candidate, Preference, PreferenceGroup, Prompt
from tests.evaluation.test_win_rate import judged

AIMS = ["facts", "format", "style", "skill", "cost"]


def rate(wins, losses):
    return win_rate(
        [judged(1, 1, prompt=f"w{i}") for i in range(wins)]
        + [judged(-1, -1, prompt=f"l{i}") for i in range(losses)]
    )


def baseline(wins, losses, *, extra=400):
    """What prompting did: better than plain asking if it won more often than not."""
    found, better = rate(wins, losses), wins > losses
    return PromptBaseline(
        judge="j",
        rubric="r",
        model="m",
        variants=(
            VariantResult(name="rules", win_rate=found),
            VariantResult(name="examples", win_rate=None, problem="no\nroom"),
        ),
        best=PromptVariant(name="rules", system="x" * extra) if better else None,
        confirmed=found if better else None,
        n_extra_characters=extra if better else 0,
    )


WEAK, STRONG, NONE = baseline(55, 45), baseline(95, 5), baseline(30, 70)


@pytest.mark.parametrize(
    ("aims", "n", "changes", "measured", "expected"),
    [
        (["facts"], 5_000, "never", STRONG, "retrieval"),
        (["facts"], None, "daily", None, "retrieval"),
        (["style"], 500, "yearly", None, "measure prompting"),
        (["style"], 500, "yearly", STRONG, "prompting"),
        (["style"], 500, "yearly", WEAK, "tuning"),
        (["style"], 500, "yearly", NONE, "tuning"),
        (["style"], 99, "yearly", WEAK, "collect data"),
        (["style"], 500, "weekly", WEAK, "prompting"),
        (["facts", "style"], 500, "monthly", WEAK, "retrieval and tuning"),
        (["facts", "style"], 500, "monthly", STRONG, "retrieval"),
        (["facts", "style"], 500, "daily", WEAK, "retrieval"),
        (["facts", "format"], 10, "monthly", NONE, "collect data"),
    ],
)
def test_the_rules(aims, n, changes, measured, expected):
    advice = advise_tuning(aims, n_examples=n, changes=changes, baseline=measured)
    assert advice.recommendation == expected
    assert advice.headline
    assert advice.next_steps


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(AIMS), min_size=1),
    st.one_of(st.none(), st.integers(0, 10**6)),
    st.sampled_from(["never", "yearly", "monthly", "weekly", "daily"]),
    st.sampled_from([None, WEAK, STRONG, NONE]),
)
def test_tuning_is_never_advised_unmeasured_for_facts_alone_or_for_what_changes_often(
    aims, n, changes, measured
):
    advice = advise_tuning(aims, n_examples=n, changes=changes, baseline=measured)
    if "tuning" in advice.recommendation:
        assert measured is not None
        assert set(aims) != {"facts"}
        assert changes not in ("weekly", "daily")
        assert n is None or n >= 100
    if "facts" in aims:
        assert any("retrieval" in reason for reason in advice.reasons)


def test_an_uncertain_baseline_says_how_many_prompts_would_settle_it():
    advice = advise_tuning(["style"], n_examples=500, baseline=baseline(78, 22))
    assert advice.recommendation == "prompting"
    assert any("either may be true" in reason for reason in advice.reasons)
    assert any("prompts would tell 78 % from 75 %" in item for item in advice.missing)


def test_the_cost_of_a_long_prompt_is_told():
    asked = {"n_examples": 500, "baseline": STRONG}
    advice = advise_tuning(
        ["cost"], requests_per_month=1_000_000, usd_per_million_input_tokens=3.0, **asked
    )
    # 400 characters are about 100 tokens: 100 x 1,000,000 x 3 $ / 1,000,000
    assert any("100 tokens" in r and "$300.00 a month" in r for r in advice.reasons)
    assert any("requests_per_month" in item for item in advise_tuning(["cost"], **asked).missing)


def test_the_text_holds_the_measured_table_and_what_could_not_be_scored():
    text = advise_tuning(["style"], n_examples=500, baseline=STRONG).to_text()
    assert text.startswith("# Do not tune: prompting is enough\n")
    assert "| rules | 95 % |" in text
    assert "**rules, on other prompts**" in text
    assert "| examples | not scored: no room |" in text


def test_all_faults_are_told_at_once():
    with pytest.raises(ValueError, match="aims must be among") as raised:
        advise_tuning(["truth"], n_examples=-1, changes="hourly", enough=0.4)
    for words in ("'truth'", "n_examples must not be negative", "'hourly'", "enough must be"):
        assert words in str(raised.value)
    with pytest.raises(ValueError, match="at least one aim"):
        advise_tuning([])


def test_from_data_and_prompts_to_a_folder(tiny_model, tmp_path):
    prompts = [Prompt.from_text(f"Say {i}!") for i in range(30)]
    groups = [
        PreferenceGroup(
            prompt=prompt,
            answers=(
                Candidate(prompt=prompt, text="yes", model="m"),
                Candidate(prompt=prompt, text="no", model="m"),
            ),
            preferences=(Preference(chosen=0, rejected=1, p_chosen=1.0, p_source="given"),),
        )
        for prompt in prompts[:5]
    ]
    asked = set()

    def decide(comparison):
        asked.add(comparison.a.prompt.prompt_id)
        return "b"

    own = tmp_path / "own.txt"
    own.write_text("Antworte höflich.", encoding="utf-8")
    advice = advise(
        ["style"],
        tmp_path / "advice",
        data=groups,
        prompts=prompts,
        n_prompts=22,
        model=str(tiny_model),
        judge=ScriptedJudge(decide),
        system_prompts=[own],
        sampling=SamplingSettings(max_new_tokens=3, batch_size=32),
        progress=False,
    )
    assert advice.recommendation == "collect data"
    assert advice.n_examples == 5
    assert asked == {p.prompt_id for p in prompts[5:27]} & asked
    assert advice.baseline is not None
    assert len(advice.baseline.variants) == 4
    kept = (tmp_path / "advice" / "advice.json").read_bytes()
    assert msgspec.json.decode(kept, type=TuningAdvice) == advice
    assert (tmp_path / "advice" / "advice.md").read_text(encoding="utf-8") == advice.to_text()


def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="enough"):
        advise(["style"], tmp_path, enough=7, model="no such model", prompts="everyday")
    with pytest.raises(DataError, match="cannot read the system prompt"):
        advise(["style"], tmp_path, prompts="everyday", model="no such model",
               system_prompts=[tmp_path / "missing.txt"])  # fmt: skip
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="is empty"):
        advise(["style"], tmp_path, prompts="everyday", model="no such model",
               system_prompts=[tmp_path / "empty.txt"])  # fmt: skip
