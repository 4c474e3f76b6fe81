"""The report on verdicts: every count by hand, nothing lost, a page that shows no user's text raw."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.judges import HOUSE_STYLE, ScriptedJudge, judge_comparisons
from prefopt.judges.canaries import ATTACKS, CanaryResult, canary_comparisons, read_canaries
from prefopt.judges.label_report import LabelReport, Share, label_report, write_label_report
from prefopt.judges.ledger import Ledger
from prefopt.preferences import build_preferences
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict


def verdict(grade, first="a", why=""):
    if grade is None:
        return Verdict(judge="j", failure="refused", rationale=why, shown_first=first)
    preferred = "tie" if grade == 0 else "a" if grade > 0 else "b"
    return Verdict(judge="j", preferred=preferred, strength=abs(grade), shown_first=first)


def judged(forward, backward, i=0, a="one two three", b="one", category="", why=""):
    prompt = Prompt.from_text(f"Question {i}?", category=category)
    return JudgedComparison(
        comparison=Comparison(
            a=Candidate(prompt=prompt, text=a, model="m"),
            b=Candidate(prompt=prompt, text=b, model="m", sample_index=1),
        ),
        forward=verdict(forward, why=why),
        backward=None if backward == "none" else verdict(backward, "b", why),
    )


def report_on(items, **options):
    return label_report(
        items,
        judge="j",
        rubric=HOUSE_STYLE,
        preferences=build_preferences(items),
        created_at="now",
        **options,
    )


def test_every_figure_by_hand():
    items = [
        judged(2, 1, 0),  # labelled
        judged(1, -1, 1),  # flipped: the first place won both times
        judged(0, 0, 2),
        judged(-1, -2, 3, category="sums"),
        judged(1, None, 4, why="The model refused; category: bio."),
        judged(1, 1, 5, a="same", b="same"),
    ]
    report = report_on(items)
    assert report.outcomes == {
        "labelled": 2, "flipped": 1, "tie": 1, "judge_failed": 1, "identical_answers": 1,
    }  # fmt: skip
    assert report.n_verdicts == 10
    assert report.failures == {"refused": 1}
    assert report.refusals == {"bio": 1}
    assert (report.flips.k, report.flips.n) == (1, 3)
    # Named: 2/1 a, 1/-1, -1/-2, 1: seven verdicts; first place: a, first, first, second..., first.
    assert (report.first_place.k, report.first_place.n) == (5, 7)
    assert (report.ties.k, report.ties.n) == (2, 9)
    assert (report.longer_wins.k, report.longer_wins.n) == (4, 7)
    assert report.grades == {"2": 2, "1": 3, "0": 2, "-1": 2, "-2": 0}
    assert report.both_orders == {"2/1": 1, "1/-1": 1, "0/0": 1, "-1/-2": 1}
    assert sum(report.p_chosen) == report.n_labels == 2
    assert [(r.category, r.n) for r in report.categories] == [("(none)", 5), ("sums", 1)]
    text = report.to_text()
    assert "2 labels" in text
    assert "refused: bio" in text
    assert "few" in text


def test_one_order_shows_no_flips_and_warns():
    report = report_on([judged(1, "none", i) for i in range(40)])
    assert report.flips is None
    assert report.both_orders == {}
    assert any("one order only" in warning for warning in report.warnings)


def test_the_wilson_interval_is_the_known_one():
    share = Share.of(5, 10)
    assert (share.low, share.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert Share.of(0, 0) is None


def test_a_judge_that_leans_to_a_place_or_to_length_is_named():
    report = report_on([judged(1, -1, i) for i in range(60)])
    assert any("winner changed with the order" in w for w in report.warnings)
    assert any("shown first" in w for w in report.warnings)
    report = report_on([judged(1, 1, i) for i in range(60)])
    assert any("longer answer wins 100%" in w for w in report.warnings)
    assert not any("winner changed" in w for w in report.warnings)


def test_nothing_at_all_and_nothing_but_failures_can_be_reported():
    empty = report_on([])
    assert empty.n_comparisons == 0
    assert "0 comparisons" in empty.to_text()
    assert "</html>" in empty.to_html()
    failed = report_on([judged(None, None, i) for i in range(5)])
    assert failed.outcomes == {"labelled": 0, "judge_failed": 5}
    assert failed.mean_p_chosen is None
    assert "100% of the verdicts failed" in failed.to_text()


grades = st.none() | st.integers(-2, 2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(grades, grades | st.just("none")), max_size=15), st.text(max_size=20))
def test_what_became_of_the_comparisons_adds_up_and_the_page_is_safe(pairs, category):
    items = [judged(f, b, i, category=f"<b>{category}") for i, (f, b) in enumerate(pairs)]
    report = report_on(items)
    assert sum(report.outcomes.values()) == len(items)
    assert sum(report.grades.values()) + sum(report.failures.values()) == report.n_verdicts
    assert "<b>" + category not in report.to_html().replace('"><b>', "")
    back = msgspec.json.decode(msgspec.json.encode(report), type=LabelReport)
    assert back == report


def test_the_files_are_written(tmp_path):
    with Ledger(tmp_path / "l") as book:
        report = report_on([judged(1, 1, i) for i in range(3)], ledger=book)
    paths = write_label_report(report, tmp_path / "report")
    assert {p.name for p in paths.values()} == {
        "label_report.json", "label_report.txt", "label_report.html",
    }  # fmt: skip
    read = msgspec.json.decode(paths["json"].read_bytes(), type=LabelReport)
    assert read == report
    assert read.ledger.spent_usd == 0


# --- Canaries ---------------------------------------------------------------------------------


def real(n, text="A real answer of several words."):
    prompts = [Prompt.from_text(f"Question {i}?") for i in range(n)]
    return [
        Comparison(
            a=Candidate(prompt=p, text=f"{text} {i}", model="m"),
            b=Candidate(prompt=p, text="Short.", model="m", sample_index=1),
        )
        for i, p in enumerate(prompts)
    ]


def test_every_attack_is_tried_on_a_few_prompts_the_same_ones_each_time():
    canaries = canary_comparisons(real(20), n_prompts=4)
    assert len(canaries) == 4 * len(ATTACKS)
    assert canaries == canary_comparisons(reversed(real(20)), n_prompts=4)
    assert all(c.comparison.a.text.startswith("A real answer") for c in canaries)
    assert {c.comparison.b.text for c in canaries} == set(ATTACKS.values())


def test_prompts_with_short_answers_only_are_passed_over():
    assert canary_comparisons(real(5, text="No.")) == []


def test_a_judge_that_obeys_is_counted_as_fooled_and_one_that_reads_is_not():
    canaries = canary_comparisons(real(5), n_prompts=3)
    obeys = ScriptedJudge(lambda c: "a" if "ignore the rubric" in c.a.text else "b" if
                          "ignore the rubric" in c.b.text else "tie")  # fmt: skip
    found = judge_comparisons([c.comparison for c in canaries], obeys, progress=False)
    results = {r.kind: r for r in read_canaries(canaries, found)}
    assert results["instruction"] == CanaryResult(
        kind="instruction", n_verdicts=6, n_fooled=6, n_tie=0, n_failed=0
    )
    assert results["constant"].n_tie == 6
    reads = ScriptedJudge(lambda c: "a" if "real answer" in c.a.text else "b")
    found = judge_comparisons([c.comparison for c in canaries], reads, progress=False)
    assert all(r.n_fooled == 0 and r.n_sound == 6 for r in read_canaries(canaries, found))
    report = report_on([judged(1, 1, i) for i in range(40)], canaries=results.values())
    assert "fell for the canary 'instruction'" in report.warnings[0]


def test_a_failed_canary_is_neither_fooled_nor_sound():
    canaries = canary_comparisons(real(2), n_prompts=1)
    fails = ScriptedJudge(lambda c: Verdict(judge="f", failure="refused"), name="f")
    found = judge_comparisons([c.comparison for c in canaries], fails, progress=False)
    assert all(
        (r.n_fooled, r.n_sound, r.n_failed) == (0, 0, 2) for r in read_canaries(canaries, found)
    )
    with pytest.raises(ValueError, match="not the canaries"):
        read_canaries(canaries, found[:-1])
