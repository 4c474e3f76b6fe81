"""The report: what it says, what it escapes, and the files it becomes."""

from __future__ import annotations

import struct
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from prefopt.errors import DataError
from prefopt.evaluation.advice import (
    advice_for,
    doubts_about,
    interval,
    measured_on,
    percent,
    prompts_needed,
)
from prefopt.evaluation.capability_report import (
    CapabilityReport,
    capability_report,
    compare_items,
)
from prefopt.evaluation.eval_report import (
    CurvePoint,
    EvalReport,
    LabelCounts,
    build_report,
    count_labels,
    report_html,
    report_markdown,
    write_report,
)
from prefopt.evaluation.figure import frontier_points
from prefopt.evaluation.gate import gate_failures
from prefopt.evaluation.human_labels import check_against_people
from prefopt.evaluation.model_figures import FrontierPoint, PolicyShift, mean_over_prompts
from prefopt.evaluation.ranking import rank_models
from prefopt.evaluation.report_tables import capability_rows, model_rows, ranking_rows
from prefopt.evaluation.sequential import SequentialResult
from prefopt.evaluation.win_rate import mde_points
from prefopt.judges.rubric import HOUSE_STYLE, Rubric
from prefopt.training.health import HealthNote
from prefopt.types import (
    Candidate,
    Comparison,
    JudgedComparison,
    LeftOut,
    Preference,
    PreferenceGroup,
    Prompt,
    Usage,
    Verdict,
)
from tests.evaluation.judgements import scored

HOSTILE = """<script>alert("x")</script>'"><img src=x onerror=alert(1)> {{ 7 * 7 }} ``` | $x$"""


def judged(
    index: int,
    result: str,
    *,
    before: str = "It is as it is, and then some more words.",
    after: str = "Short and good.",
    prompt: str = "Question",
    tuned: str = "tuned",
    rationale: str = "",
    both: bool = True,
) -> JudgedComparison:
    question = Prompt.from_text(f"{prompt} {index}")
    grades = {
        "win": ("a", "a"),
        "loss": ("b", "b"),
        "tie": ("tie", "tie"),
        "flip": ("a", "b"),
    }
    if result == "failed":
        forward = backward = Verdict(judge="judge", failure="refused")
    else:
        forward, backward = (
            Verdict(
                judge="judge",
                preferred=p,
                strength=int(p != "tie"),
                rationale=rationale,
                usage=Usage(cost_usd=0.01),
            )
            for p in grades[result]
        )
    return JudgedComparison(
        comparison=Comparison(
            a=Candidate(prompt=question, text=after, model=tuned),
            b=Candidate(prompt=question, text=before, model="base", finish_reason="length"),
        ),
        forward=forward,
        backward=backward if both else None,
    )


def results(**counts: int) -> list[JudgedComparison]:
    """So many of each result; lengths alternate so that no length rule explains the verdicts."""
    names = [name for name, count in counts.items() for _ in range(count)]
    return [
        judged(i, name, before="one two" if i % 2 else "one two three four five")
        for i, name in enumerate(names)
    ]


TRAINING = tuple(
    CurvePoint(
        step=10 * i,
        epoch=i / 4,
        loss=0.69 - 0.05 * i,
        margin=0.2 * i,
        accuracy=0.5 + 0.04 * i,
        chosen_logp=-80.0 - i,
        rejected_logp=-90.0 - 4 * i,
        learning_rate=5e-5,
    )
    for i in range(1, 9)
)


def full_report() -> EvalReport:
    return build_report(
        results(win=30, tie=2, flip=3, loss=4, failed=1),
        title="House style",
        rubric=HOUSE_STYLE,
        prompts_name="held-out prompts",
        perplexity_base=20.0,
        perplexity_tuned=20.24,
        training=TRAINING,
        health=[HealthNote(level="warning", message="Rejected answers fell faster than usual.")],
        labels=LabelCounts(n_prompts=90, n_pairs=120, left_out={"flipped": 9}, flip_rate=0.07),
        preflight=["120 pairs, none too long."],
        seeds={"training": 7},
        details={"Training": "DPO, beta 0.1"},
    )


class Page(HTMLParser):
    """Collects tags, ids and text; fails on a tag closed out of turn."""

    VOID = frozenset({"meta", "br", "img", "path", "use", "rect"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        self.ids.update(value for name, value in attrs if name == "id" and value)


def test_the_headline_says_how_much_how_sure_and_what_was_forgotten() -> None:
    advice = advice_for(full_report())
    # (30 + 5 / 2) / 39 = 83.3 %; the ties make the 39 prompts worth 46.4
    # yes/no ones, and Wilson's interval 70.2 to 91.3 %.
    assert advice.headline == (
        "The tuned model is preferred on 83 % of 39 held-out prompts "
        "(95 % interval 70\u201391 %, ties count half)."
    )
    assert advice.forgetting == "It forgot little: perplexity on unrelated text rose 1.2 %."
    assert advice.level == "good"
    assert "the 4 answers below that got worse" in advice.next_steps[0]


def test_a_worse_model_is_named_worse_and_gets_a_stop() -> None:
    advice = advice_for(build_report(results(win=2, loss=18)))
    assert advice.level == "stop"
    assert advice.headline.startswith("The tuned model is worse: it is preferred on 10 % of 20")
    assert "not measured" in advice.forgetting


def test_an_unclear_result_says_how_many_prompts_would_settle_it() -> None:
    advice = advice_for(build_report(results(win=11, loss=9)))
    assert (advice.level, advice.label) == ("caution", "No difference shown")
    assert "includes 50 %" in advice.headline
    # d = 0.05: ((0.98 + 0.8416 · sqrt(0.2475)) / 0.05)² = 783.
    assert prompts_needed(0.05) == 783
    assert "use about 790." in advice.next_steps[0]


@pytest.mark.parametrize("n", [10, 60, 400])
def test_prompts_needed_inverts_the_smallest_difference(n: int) -> None:
    points = mde_points(n)
    assert points is not None
    assert prompts_needed(points / 100 + 1e-9) == n


def test_forgetting_is_graded_and_a_clear_loss_of_skill_is_a_caution() -> None:
    def advice(tuned: float) -> tuple[str, str]:
        report = build_report(results(win=20), perplexity_base=10.0, perplexity_tuned=tuned)
        found = advice_for(report)
        return found.level, found.forgetting

    assert advice(9.9) == (
        "good",
        "It forgot nothing that shows: perplexity on unrelated text fell 1.0 %.",
    )
    assert advice(10.5)[0] == "caution"
    assert advice(10.5)[1].startswith("It forgot some:")
    assert advice(13.0)[1] == "It forgot a lot: perplexity on unrelated text rose 30.0 %."


@pytest.mark.parametrize(
    ("comparisons", "words"),
    [
        (results(win=20, flip=8), "changed its mind with the order"),
        (results(win=20, failed=5), "no verdict for 5 of 25"),
        ([judged(i, "win") for i in range(20)], "counting words would give the same"),
        (
            [judged(i, "win", after="w " * 30) for i in range(20)],
            "picked the longer answer in 100 %",
        ),
        ([judged(i, "win", both=False) for i in range(20)], "in one order only"),
    ],
)
def test_a_win_with_another_explanation_is_a_caution(
    comparisons: list[JudgedComparison], words: str
) -> None:
    advice = advice_for(build_report(comparisons))
    assert advice.level == "caution"
    assert any(words in step for step in advice.next_steps)


def test_a_problem_in_the_health_notes_is_a_caution() -> None:
    note = HealthNote(level="problem", message="Loss was not a number.")
    advice = advice_for(build_report(results(win=20), health=[note]))
    assert advice.level == "caution"
    assert "name 1 problem." in advice.next_steps[0]


def test_doubts_give_the_figures_that_could_explain_the_result_away() -> None:
    rows = {d.name: d.value for d in doubts_about(full_report())}
    # Even numbers have a longer baseline: the tuned answer (3 words) is shorter in 20 of 39.
    assert rows["If the shorter answer always won"] == "51 %"
    assert rows["If the longer answer always won"] == "49 %"
    assert rows["Winner changed with the order shown"] == "3 of 39"
    assert rows["Ties"] == "5 of 39"
    assert rows["No verdict"] == "1 of 40"
    meanings = " ".join(d.meaning for d in doubts_about(full_report()))
    assert "refused: 1" in meanings


def test_percentages_never_round_to_all_or_nothing_or_onto_the_line() -> None:
    assert [percent(x) for x in (0.0, 0.0004, 0.004, 0.88, 0.996, 0.9999, 1.0)] == [
        "0 %",
        "under 0.1 %",
        "0.4 %",
        "88 %",
        "99.6 %",
        "over 99.9 %",
        "100 %",
    ]
    assert interval(0.502, 0.94) == "50.2\u201394 %"
    assert interval(0.0, 0.5) == "0\u201350 %"


def test_names_and_cost_come_from_the_judgements_when_not_given() -> None:
    report = build_report(results(win=3))
    assert (report.base_model, report.tuned_model, report.judge) == ("base", "tuned", "judge")
    assert report.cost_usd == pytest.approx(0.06)
    assert report.created_with["prefopt"]


def test_answers_keep_their_order_result_and_cut_off_marks() -> None:
    report = build_report([judged(0, "win"), judged(1, "flip"), judged(2, "failed")])
    assert [(p.result, p.flipped, p.failures) for p in report.answers] == [
        ("win", False, ()),
        ("tie", True, ()),
        ("unscored", False, ("refused", "refused")),
    ]
    assert report.answers[0].after == "Short and good."
    assert report.answers[0].before_cut_off
    assert not report.answers[0].after_cut_off


def test_an_impossible_or_lonely_perplexity_is_refused() -> None:
    with pytest.raises(ValueError, match="perplexity_tuned must be a finite number"):
        build_report(results(win=1), perplexity_base=10.0, perplexity_tuned=float("nan"))
    with pytest.raises(ValueError, match="Give both or neither"):
        build_report(results(win=1), perplexity_base=10.0)


def test_labels_are_counted_with_every_reason() -> None:
    prompt = Prompt.from_text("q")
    answers = tuple(Candidate(prompt=prompt, text=t, model="m") for t in "abc")
    group = PreferenceGroup(
        prompt=prompt,
        answers=answers,
        preferences=(
            Preference(chosen=0, rejected=1, p_chosen=0.9),
            Preference(chosen=0, rejected=2, p_chosen=0.9),
        ),
    )
    empty = PreferenceGroup(prompt=Prompt.from_text("r"), answers=(), preferences=())
    left_out = [
        LeftOut(prompt_id="r", comparison_id=str(i), reason=reason)
        for i, reason in enumerate(["tie", "flipped", "flipped"])
    ]
    counts = count_labels([group, empty], left_out, results(win=2, flip=1, failed=1))
    assert counts == LabelCounts(
        n_prompts=1, n_pairs=2, left_out={"flipped": 2, "tie": 1}, flip_rate=1 / 3
    )
    assert count_labels([group], []).flip_rate is None


def test_all_four_files_are_written_and_are_the_same_every_time(tmp_path: Path) -> None:
    report = full_report()
    paths = write_report(report, tmp_path / "one")
    assert sorted(paths) == ["html", "json", "md", "png"]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        "report.png",
    ]
    assert msgspec.json.decode(paths["json"].read_bytes(), type=EvalReport) == report
    again = write_report(report, tmp_path / "two")
    for ending, path in paths.items():
        assert path.read_bytes() == again[ending].read_bytes(), ending


def test_the_picture_is_a_png_of_the_promised_size(tmp_path: Path) -> None:
    content = write_report(full_report(), tmp_path)["png"].read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1600, 896)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        write_report(build_report(results(win=1)), tmp_path / "file")


def test_the_page_is_well_formed_needs_nothing_from_outside_and_runs_nothing() -> None:
    html = report_html(full_report())
    page = Page(html)
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    assert "http://" not in html.replace("http://www.w3.org/", "")
    assert "https://" not in html
    assert page.tags["svg"] == 6
    assert "prefers-color-scheme: dark" in html
    for heading in ("Do not be fooled", "Training", "Health of the run", "Labels trained on"):
        assert heading in page.text


def test_drawings_take_all_their_colours_from_the_page() -> None:
    html = report_html(full_report())
    drawings = html[html.index("<svg") : html.rindex("</svg>")].split("<svg")
    for drawing in drawings[1:]:
        inside = drawing[: drawing.find("</svg>")]
        assert "var(--ink)" in inside or "var(--muted)" in inside
        assert "fill: #" not in inside
        assert "stroke: #" not in inside


def test_whatever_a_model_or_person_wrote_is_shown_as_text() -> None:
    report = build_report(
        [
            judged(
                0,
                "win",
                before=HOSTILE,
                after=HOSTILE,
                prompt=HOSTILE,
                tuned=HOSTILE,
                rationale=HOSTILE,
            )
        ],
        title=HOSTILE,
        base_model=HOSTILE,
        judge=HOSTILE,
        judge_note=HOSTILE,
        rubric=Rubric(name=HOSTILE, text=HOSTILE),
        prompts_name=HOSTILE,
        perplexity_base=2.0,
        perplexity_tuned=2.0,
        perplexity_text=HOSTILE,
        health=[HealthNote(level="ok", message=HOSTILE)],
        labels=LabelCounts(n_prompts=1, n_pairs=1, left_out={HOSTILE: 1}),
        preflight=[HOSTILE],
        seeds={HOSTILE: 1},
        details={HOSTILE: HOSTILE},
        created_at=HOSTILE,
        ranking=rank_models(
            [
                scored(float(i % 2), prompt=f"q{i}", a=f"{HOSTILE} {a}", b=f"{HOSTILE} {b}")
                for a, b in (("1", "2"), ("2", "3"), ("1", "3"))
                for i in range(9)
            ]
        ),
        shift=PolicyShift(
            kl=mean_over_prompts([1.0, 2.0], ["a", "b"]), kl_per_token=1.0,
            on_base_answers=mean_over_prompts([1.0, 2.0], ["a", "b"]), beta=0.1, sampled=HOSTILE,
            n_answers=2, n_too_long=0,
        ),
        frontier=[
            FrontierPoint(
                name=HOSTILE, kl=mean_over_prompts([1.0], ["a"]), win_rate=0.5, low=0.4, high=0.6
            )
        ],
        capabilities=capability_report(
            [compare_items(HOSTILE, HOSTILE, HOSTILE, [1.0, 0.0], [1.0, 1.0])],
            engine=HOSTILE, base_model=HOSTILE, tuned_model=HOSTILE, left_out=[HOSTILE],
        ),
    )  # fmt: skip
    html = report_html(report)
    page = Page(html)
    assert page.tags["script"] == page.tags["img"] == 0
    assert page.attributes["onerror"] == 0
    assert html.count("&lt;script&gt;") >= 17
    assert page.text.count(HOSTILE) >= 15
    assert page.tags == Page(report_html(msgspec.structs.replace(report, title="t"))).tags


def test_markdown_keeps_hostile_text_inside_its_fence() -> None:
    report = build_report([judged(0, "win", after=f"before\n{HOSTILE}\n# after")], title=HOSTILE)
    lines = report_markdown(report).splitlines()
    fences = [i for i, line in enumerate(lines) if line.startswith("````")]
    assert len(fences) == 2
    inside = lines[fences[0] + 1 : fences[1]]
    assert inside == ["before", HOSTILE, "# after"]
    outside = "\n".join(lines[: fences[0]])
    assert "\\<script\\>" in outside
    assert "<script>" not in outside.replace("\\<script\\>", "")


def test_a_partial_report_leaves_out_what_it_does_not_know(tmp_path: Path) -> None:
    report = build_report(results(win=5, loss=1))
    paths = write_report(report, tmp_path)
    page = Page(paths["html"].read_text())
    assert "Whether it forgot anything was not measured." in page.text
    for absent in (
        "Training",
        "Health of the run",
        "Labels trained on",
        "Ranking",
        "could do before",
    ):
        assert absent not in page.text
        assert absent not in paths["md"].read_text()
    rows = {row.name: row for row in model_rows(report)}
    for name in (
        "KL to the base model (nats an answer)",
        "Implicit reward",
        "Margin, chosen over rejected",
        "Perplexity",
    ):
        assert (rows[name].before, rows[name].after) == ("not measured", "not measured")
        assert rows[name].meaning
    people = [d for d in doubts_about(report) if d.name == "By people's standard"]
    assert people[0].value == "not measured"
    assert page.tags["svg"] == 2


def capabilities() -> CapabilityReport:
    """Arithmetic is lost, reasoning is not shown to change, and one task could not run."""
    return capability_report(
        [
            compare_items("arithmetic", "Arithmetic", "exact_match", [1.0] * 60 + [0.0] * 40,
                          [1.0] * 40 + [0.0] * 60, n_tasks=2),
            compare_items("reasoning", "Reasoning", "exact_match", [1.0, 0.0] * 20, [1.0, 0.0] * 20,
                          n_tasks=2),
        ],
        engine="lm-eval 0.4.13", base_model="base", tuned_model="tuned", left_out=["arc: no hub"],
    )  # fmt: skip


def rich_report(**changes: Any) -> EvalReport:
    """Everything that can be measured, and was."""
    judged_pairs = results(win=30, tie=2, loss=8)
    rows = [
        {
            "prompt": pair.comparison.prompt.text,
            "response_a": pair.comparison.a.text,
            "response_b": pair.comparison.b.text,
            "label": "A",
        }
        for pair in judged_pairs[::2]
    ]
    ids = [str(i) for i in range(40)]
    shift = PolicyShift(
        kl=mean_over_prompts([float(i % 5) for i in range(40)], ids), kl_per_token=0.2,
        on_base_answers=mean_over_prompts([-float(i % 3) for i in range(40)], ids), beta=0.1,
        sampled="at temperature 0.7", n_answers=40, n_too_long=0,
    )  # fmt: skip
    given: dict[str, Any] = {
        "human": check_against_people(judged_pairs, rows),
        "shift": shift,
        "frontier": [
            FrontierPoint(name="SFT", kl=shift.on_base_answers, win_rate=0.6, low=0.5, high=0.7)
        ],
        "capabilities": capabilities(),
        "training": TRAINING,
        "perplexity_base": 20.0,
        "perplexity_tuned": 20.1,
    }
    return build_report(judged_pairs, **{**given, **changes})


def test_a_lost_skill_is_named_with_both_figures_and_what_to_do() -> None:
    report = rich_report()
    advice = advice_for(report)
    assert advice.level == "caution"
    assert advice.forgetting.startswith("It lost arithmetic (60 % to 40 %). 1 other task shows no")
    (step,) = [s for s in advice.next_steps if "arithmetic" in s]
    assert "replay" in step
    assert "docs/forgetting.md" in step
    first, second = capability_rows(report)
    assert (first.title, first.verdict, first.level) == ("Arithmetic", "dropped", "problem")
    assert first.change == "\u221220.0 (\u221227.8 to \u221211.4)"  # Bonett and Price
    assert "40 items can show" in second.verdict
    losses = [0.9, 1.0, 1.1, 1.0] * 5
    prose = compare_items(
        "prose", "Prose", "nll_per_byte", losses, [x + 0.05 * (i % 2) for i, x in enumerate(losses)],
        higher_is_better=False,
    )  # fmt: skip
    (row,) = capability_rows(
        msgspec.structs.replace(report, capabilities=capability_report(
            [prose], engine="e", base_model="b", tuned_model="t"
        ))
    )  # fmt: skip
    assert (row.before, row.after) == ("1", "1.025")
    assert row.change.startswith("+2.5 % (+1.3 % to ")
    page = Page(report_html(report))
    assert "Left out: arc: no hub" in page.text
    assert "The gate fails" in page.text
    assert "Arithmetic" in report_markdown(report)
    kept = msgspec.structs.replace(report.capabilities, tasks=report.capabilities.tasks[1:])
    fine = advice_for(msgspec.structs.replace(report, capabilities=kept))
    assert fine.forgetting.startswith("No loss shown on 1 task")


def test_power_is_said_in_words() -> None:
    # 240 prompts, 56 % of them ties: see docs/evaluation-statistics.md.
    report = build_report(results(win=53, loss=53, tie=134))
    assert advice_for(report).power.startswith(
        "240 prompts can show 7 points: a win rate of 43 % or less, or 57 % or more"
    )
    assert advice_for(build_report(results(win=1))).power == (
        "1 prompt can show no difference at all."
    )


def test_every_figure_says_what_it_was_measured_on() -> None:
    basis = measured_on(rich_report())
    assert basis.startswith("40 prompts, judged in both orders")
    assert "the order decided in 0 %" in basis
    assert "judge right on 78 %" in basis
    assert "of 20 human labels" in basis
    assert basis.endswith("80 verdicts, $0.80")
    page = report_html(rich_report())
    assert page.count("of 20 human labels") >= 4  # headline, two drawings, doubts
    assert "judge not checked against people here" in measured_on(full_report())


def test_people_overrule_the_judge() -> None:
    pairs = results(win=34, loss=6)
    rows = [
        {
            "prompt": p.comparison.prompt.text,
            "response_a": p.comparison.a.text,
            "response_b": p.comparison.b.text,
            "label": "AB"[i % 2],
        }
        for i, p in enumerate(pairs[:30])
    ]
    report = build_report(pairs, human=check_against_people(pairs, rows))
    advice = advice_for(report)
    assert advice.level == "caution"
    assert any(
        s.startswith("By people's standard no difference is shown") for s in advice.next_steps
    )
    assert any("not shown to be better than a coin" in s for s in advice.next_steps)


def test_more_refusals_are_a_caution() -> None:
    pairs = [
        judged(
            i, "win", after="I'm sorry, but I can't help with that." if i < 9 else f"Yes {i} a b c"
        )
        for i in range(40)
    ]
    advice = advice_for(build_report(pairs))
    assert any("It refuses more often: 9 of 40 answers, before 0" in s for s in advice.next_steps)


def test_the_models_figures_say_reward_kl_margin_and_variety() -> None:
    rows = {row.name: row for row in model_rows(rich_report())}
    kl = rows["KL to the base model (nats an answer)"]
    assert kl.after.startswith("2.0 (")
    assert "0.20 nats a token" in kl.meaning
    assert (rows["Implicit reward"].before, rows["Implicit reward"].after) == (
        "\u22120.10",
        "+0.20",
    )
    assert rows["Margin, chosen over rejected"].after == "+1.60"
    assert rows["Refusals"].after == "0 (0 %)"
    without = rich_report()
    assert without.shift is not None
    unknown = msgspec.structs.replace(
        without, shift=msgspec.structs.replace(without.shift, beta=None)
    )
    row = {r.name: r for r in model_rows(unknown)}["Implicit reward"]
    assert row.after == "not measured"
    assert "--beta" in row.meaning


def test_the_picture_of_win_rate_and_kl_starts_at_the_base_model() -> None:
    points = frontier_points(rich_report())
    assert [p.name for p in points] == ["base", "SFT", "tuned"]
    assert (points[0].kl.value, points[0].win_rate) == (0.0, 0.5)
    html = report_html(rich_report())
    assert "KL 2.0, win rate 78 %" in html
    assert frontier_points(full_report()) == []
    assert "distance from the base model" not in report_html(full_report())


def test_a_ranking_is_a_table_a_picture_and_every_pair() -> None:
    pairs = [
        scored(score, prompt=f"q{i}", a=a, b=b, text_a=f"{a} {i}", text_b=f"{b} {i} words")
        for a, b, wins in (("sft", "base", 20), ("dpo", "base", 28), ("dpo", "sft", 23))
        for i in range(40)
        for score in [float(i < wins)]
    ]
    main_pair = [
        p for p in pairs if (p.comparison.a.model, p.comparison.b.model) == ("dpo", "base")
    ]
    report = build_report(main_pair, ranking=rank_models(pairs))
    page = Page(report_html(report))
    assert "Ranking of 3 models" in page.text
    assert "How often the model of the row beats that of the column" in page.text
    assert [row.model for row in ranking_rows(report)] == ["dpo", "sft", "base"]
    assert page.tags["svg"] == 3
    assert "| dpo |" in report_markdown(report)
    # A model that won all has no limit; the picture stays readable and says so.
    always = [*pairs, *(scored(1.0, prompt=f"q{i}", a="best", b="dpo") for i in range(40))]
    unbounded = msgspec.structs.replace(report, ranking=rank_models(always))
    assert ranking_rows(unbounded)[0].elo.endswith("*")
    assert "cannot be told" in Page(report_html(unbounded)).text


def test_a_report_written_before_these_figures_still_loads() -> None:
    content = (Path(__file__).parent / "data" / "eval_report_0.1.json").read_bytes()
    old = msgspec.json.decode(content, type=EvalReport)
    assert old.capabilities is None
    assert old.answer_figures is None
    page = Page(report_html(old))
    assert "not part of this report" in page.text.lower()
    assert report_markdown(old)


def test_the_gate_fails_for_a_worse_model_a_lost_skill_and_a_rate_that_is_not_shown() -> None:
    good = build_report(results(win=30, loss=2))
    assert gate_failures(good) == []
    assert gate_failures(good, min_win_rate=0.7) == []
    (short,) = gate_failures(good, min_win_rate=0.9)
    assert "not shown to reach 90 %" in short
    (worse,) = gate_failures(build_report(results(win=2, loss=30)), min_win_rate=0.5)
    assert worse.startswith("the tuned model is worse")
    missing, lost = gate_failures(msgspec.structs.replace(good, capabilities=capabilities()))
    assert missing == "a task was not measured: arc: no hub"
    assert lost.startswith("Arithmetic dropped from 60 % to 40 % on 100 items")
    with pytest.raises(ValueError, match="between 0 and 1"):
        gate_failures(good, min_win_rate=70)


def test_all_answers_are_on_the_page_and_those_beyond_the_first_8_are_folded() -> None:
    html = report_html(build_report(results(win=7, loss=5)))
    page = Page(html)
    assert [f"answer-{n}" in page.ids for n in range(1, 13)] == [True] * 12
    assert "Show the other 4 answers" in page.text
    folded = html[html.index('<details class="rest">') :]
    assert 'id="answer-8"' not in folded
    assert 'id="answer-9"' in folded
    assert [html.count(f'href="#answer-{n}"') for n in (7, 8, 12)] == [0, 1, 1]
    assert "Show the other" not in report_html(build_report(results(win=8)))


@pytest.mark.parametrize(
    "comparisons",
    [
        [judged(0, "win")],
        [judged(0, "loss", after="")],
        [judged(0, "tie", before="", after="")],
        results(win=200, tie=200, loss=200),
    ],
    ids=["one win", "an empty answer", "only empty answers", "hundreds"],
)
def test_extreme_results_can_be_drawn(comparisons: list[JudgedComparison]) -> None:
    page = Page(report_html(build_report(comparisons)))
    assert page.tags["svg"] == 2


def test_gaps_in_the_training_log_are_gaps_in_the_curve_not_zeros() -> None:
    training = [
        CurvePoint(step=1, loss=0.7),
        CurvePoint(step=2, loss=float("nan"), margin=0.1),
        CurvePoint(step=3, loss=0.5),
    ]
    page = Page(report_html(build_report(results(win=2), training=training)))
    assert page.tags["svg"] == 3  # the loss has two points; the margin's single one is no curve
    one = Page(report_html(build_report(results(win=2), training=training[:1])))
    assert "too few for a curve" in one.text


def test_drawing_leaves_pyplot_and_its_settings_alone() -> None:
    import sys

    import matplotlib

    before, had_pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    report_html(full_report())
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# big", "\\# big"),
        ("1. one", "1\\. one"),
        ("- item", "\\- item"),
        ("3.11.7", "3.11.7"),
        ("a\n\n* b", "a \\* b"),
    ],
)
def test_a_title_in_markdown_stays_one_line_of_plain_text(text: str, shown: str) -> None:
    first = report_markdown(build_report(results(win=1), title=text)).splitlines()[0]
    assert first == f"# {shown}"


def test_the_win_rate_at_equal_length_stands_among_the_doubts() -> None:
    report = full_report()
    assert report.length_control is not None
    (row,) = [d for d in doubts_about(report) if d.name == "If the answers were equally long"]
    assert report.length_control.win_rate is not None
    assert row.value.startswith(percent(report.length_control.win_rate))
    assert "39 prompts are few" in row.meaning
    assert row.value in report_markdown(report)
    one_sided = build_report(results(win=12))
    (row,) = [d for d in doubts_about(one_sided) if "equally long" in d.name]
    assert row.value == "not known"
    assert "won every comparison" in row.meaning


def test_a_report_says_where_judging_stopped_and_leaves_out_what_no_longer_holds() -> None:
    stopping = SequentialResult(
        decision="better", low=0.56, high=0.98, win_rate=0.9, confidence=0.95, margin=0.05,
        n_prompts=30, n_unscored=2, n_total=240, n_not_asked=208, n_waves=2,
    )  # fmt: skip
    report = build_report(results(win=26, loss=4, failed=2), stopping=stopping)
    assert "95 % interval 56\u201398 %" in advice_for(report).headline
    rows = {row.name: row for row in doubts_about(report)}
    assert rows["Judging stopped after"].value == "32 of 240 prompts"
    assert "the difference was sure" in rows["Judging stopped after"].meaning
    assert "Smallest difference this test can show" not in rows
    assert not any("computed another way" in name for name in rows)
    assert msgspec.json.decode(msgspec.json.encode(report), type=EvalReport) == report


def test_ties_lower_the_number_of_prompts_advised() -> None:
    assert prompts_needed(0.06, spread=0.33) < 0.5 * prompts_needed(0.06)
    assert prompts_needed(0.06, spread=0.33) == pytest.approx(240, abs=5)
