"""The report on verdicts: every count by hand, nothing lost, a page that shows no user's text raw."""

from html.parser import HTMLParser

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.judges import HOUSE_STYLE
from prefopt.judges.canaries import CanaryResult
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
    # Of pairs: a, the longer, by 2/1; b by -1/-2; the flip has mean 0, one verdict of 4 failed.
    assert (report.longer_wins.k, report.longer_wins.n) == (1, 2)
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


@settings(max_examples=20, deadline=None)
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


def test_one_order_says_nothing_of_a_place():
    report = report_on([judged(1, "none", i) for i in range(40)])
    assert report.first_place is None
    mixed = report_on([*[judged(1, "none", i) for i in range(40)], judged(1, 1, 40)])
    assert (mixed.first_place.k, mixed.first_place.n) == (1, 2)


def test_a_pair_counts_once_for_length_however_often_it_was_asked():
    items = [judged(1, 1, i) for i in range(6)] + [judged(-1, -1, i) for i in range(6, 10)]
    repeated = [msgspec.structs.replace(j, more=(j.forward, j.forward, j.backward)) for j in items]
    once = report_on(items).longer_wins
    assert (once.k, once.n) == (6, 10)
    assert report_on(repeated).longer_wins == once


def test_labels_made_of_other_comparisons_are_refused():
    other = build_preferences([judged(0, 0, i) for i in range(5)])
    with pytest.raises(ValueError, match=r"5 comparisons, but 1 judged"):
        label_report([judged(1, 1, 0)], judge="j", rubric=HOUSE_STYLE, preferences=other)


@pytest.mark.parametrize(
    ("p", "place"),
    [(0.5, 0), (0.55, 1), (0.6, 2), (0.65, 3), (0.7, 4), (0.8, 6), (0.95, 9), (1.0, 9)],
)
def test_a_probability_on_the_edge_of_a_bin_is_counted_in_the_upper_one(p, place):
    found = build_preferences([judged(2, 2, 0)], calibrated_p_a=lambda j: max(p, 0.5000001))
    report = label_report([judged(2, 2, 0)], judge="j", rubric=HOUSE_STYLE, preferences=found)
    assert [i for i, n in enumerate(report.p_chosen) if n] == [place]


def test_categories_and_the_whole_count_the_same_flips():
    disagree = msgspec.structs.replace(judged(1, 1, 0), more=(verdict(-1), verdict(-1, "b")))
    report = report_on([disagree, judged(1, -1, 1, category="x"), judged(1, 1, 2, category="x")])
    assert sum(row.n_flipped for row in report.categories) == report.flips.k == 1


def test_a_name_cannot_steer_the_terminal():
    named = judged(1, None, 0, category="x\x1b[31m\nLook at\rthis", why="category: \x1b[2Jbio.")
    text = report_on([named, judged(1, 1, 1, category="\u6f22\u5b57 \U0001f600")]).to_text()
    assert all(c.isprintable() for c in text.replace("\n", ""))
    assert "x?[31m Look at this" in text


def test_no_word_of_an_answer_is_kept_however_large_or_strange():
    huge = "SECRET<script>\u202e\U0001f600 " * 50_000
    report = report_on([judged(1, 1, 0, a=huge, b="SECRET short")])
    for shown in (report.to_text(), report.to_html(), msgspec.json.encode(report).decode()):
        assert "SECRET" not in shown
    assert report.longer_wins.k == 1


class _Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.seen = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.add((tag, *sorted(name for name, _ in attrs)))


def tags_of_a_page_with(name):
    items = [judged(1, None, 0, category=name, why=f"category: {name}."), judged(1, 1, 1)]
    return _Tags(report_on(items).to_html()).seen


@pytest.fixture(scope="module")
def calm_tags():
    return tags_of_a_page_with("calm")


@settings(max_examples=15, deadline=None)
@given(text=st.text(max_size=30))
def test_names_add_no_element_to_the_page(calm_tags, text):
    hostile = f'"><img src=x onerror=1>{text}</td><script>'
    assert tags_of_a_page_with(hostile) == calm_tags


def canary(kind="constant", n=8, fooled=0, tie=0, failed=0):
    return CanaryResult(kind=kind, n_verdicts=n, n_fooled=fooled, n_tie=tie, n_failed=failed)


@pytest.mark.parametrize(
    ("result", "warned"),
    [
        (
            canary(kind="instruction", fooled=6, failed=2),
            "fell for the canary 'instruction' in 6 of 6",
        ),
        (canary(failed=8), "not known whether the judge can be fooled"),
        (canary(tie=3, failed=1), "as good as a real answer in 3 of 7"),
    ],
)
def test_each_way_a_canary_can_go_wrong_is_said_first(result, warned):
    report = report_on([judged(1, 1, i) for i in range(40)], canaries=[result])
    assert warned in report.warnings[0]


def test_a_sound_judge_gets_no_warning_about_canaries():
    report = report_on([judged(1, 1, i) for i in range(40)], canaries=[canary()])
    assert not any("canary" in warning for warning in report.warnings)
    assert "0.0% to 32.4%, 0 of 8" in report.to_text()
    assert "0–32%" in report.to_html()


@pytest.mark.parametrize(("n_malformed", "said"), [(3, True), (1, False)])
def test_replies_that_are_mostly_malformed_are_no_case_for_asking_again(n_malformed, said):
    bad = Verdict(judge="j", failure="malformed", reply="The first one.")
    items = [
        msgspec.structs.replace(
            judged(1, 1, i), **({"forward": bad, "backward": bad} if i < n_malformed else {})
        )
        for i in range(4)
    ]
    warnings = " ".join(report_on(items).warnings)
    assert ("asking again will hardly help" in warnings) is said
    assert ("Run again with the same ledger" in warnings) is not said
