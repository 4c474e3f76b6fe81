import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.chat import tokenize_answer, tokenize_preference, tokenize_prompt
from prefopt.data.preflight import preflight
from prefopt.errors import DataError
from prefopt.types import Candidate, Message, Preference, PreferenceGroup, Prompt
from tests.tiny_models import tiny_tokenizer

CHATML = tiny_tokenizer("chatml")


def pair(prompt, chosen, rejected, *, p=0.9, finish=("stop", "stop")):
    if isinstance(prompt, str):
        prompt = Prompt.from_text(prompt)
    answers = tuple(
        Candidate(prompt=prompt, text=text, model="m", finish_reason=reason)
        for text, reason in zip((chosen, rejected), finish, strict=True)
    )
    preference = Preference(chosen=0, rejected=1, p_chosen=p)
    return PreferenceGroup(prompt=prompt, answers=answers, preferences=(preference,))


def balanced(n=100):
    """Pairs with nothing to find: the longer answer is chosen in half of them."""
    answers = [("Yes, it is.", "No."), ("Yes.", "No, it is not.")]
    return [pair(f"Question {i}?", *answers[i % 2]) for i in range(n)]


def check(groups, name, *, tokenizer=CHATML, max_length=None, held_out=None):
    report = preflight(groups, tokenizer, max_length=max_length, held_out=held_out)
    found = [f for f in report.findings if f.check == name]
    assert len(found) <= 1
    return found[0] if found else None


def test_sound_data_passes_with_nothing_found():
    report = preflight(balanced(), CHATML, max_length=200, held_out=[Prompt.from_text("Other?")])
    assert report.findings == ()
    assert (report.n_pairs, report.n_prompts) == (100, 100)
    assert (report.longest_wins_share, report.shortest_wins_share) == (0.5, 0.5)
    assert (report.n_chosen_truncated, report.n_rejected_truncated) == (0, 0)
    report.raise_for_errors()
    assert report.to_text().endswith("nothing found")


def test_the_means_are_those_of_the_ids_that_are_trained_on():
    groups = [pair("Hello!", "It is.", "No."), pair("How are you?", "Yes.", "No it is not.")]
    report = preflight(groups, CHATML, max_length=None)
    tokens = [tokenize_preference(CHATML, *g.answers) for g in groups]
    assert report.mean_length_prompt == sum(len(t.prompt_ids) for t in tokens) / 2
    assert report.mean_length_chosen == sum(len(t.chosen_ids) for t in tokens) / 2
    assert report.mean_length_rejected == sum(len(t.rejected_ids) for t in tokens) / 2


def test_no_pairs_is_an_error_and_no_figure_is_made_up():
    lonely = msgspec.structs.replace(balanced(1)[0], preferences=())
    for groups in ([], [lonely]):
        report = preflight(groups, CHATML, max_length=10)
        assert [f.check for f in report.errors] == ["no_pairs"]
        assert report.longest_wins_share is None
        assert report.mean_length_chosen is None
        assert "chosen in -" in report.to_text()


def test_fewer_than_a_hundred_pairs_is_a_warning():
    assert check(balanced(100), "few_pairs") is None
    found = check(balanced(99), "few_pairs")
    assert found.severity == "warning"
    assert "99 pairs" in found.message


def test_identical_answers_are_an_error_also_when_only_their_tokens_are_equal():
    groups = [*balanced(3), pair("a?", "Yes.", "Yes."), pair("b?", "Yes. ", "Yes.")]
    found = check(groups, "identical")
    assert (found.severity, found.rows, found.n_rows) == ("error", (3,), 1)
    trims = tiny_tokenizer("llama")
    assert check(groups, "identical", tokenizer=trims).rows == (3, 4)


def test_an_empty_chosen_answer_is_an_error_and_an_empty_rejected_one_a_warning():
    groups = [pair("a?", " \n", "Yes."), pair("b?", "Yes.", ""), *balanced(2)]
    assert check(groups, "empty_chosen").severity == "error"
    assert check(groups, "empty_chosen").rows == (0,)
    assert check(groups, "empty_rejected").severity == "warning"
    assert check(groups, "empty_rejected").rows == (1,)


def test_ties_and_labels_below_one_half_are_warnings():
    groups = [pair(f"{p}?", "Yes.", "No.", p=p) for p in (0.5, 0.49, 0.51)]
    assert check(groups, "ties").rows == (0,)
    assert check(groups, "p_below_half").rows == (1,)
    assert {check(groups, name).severity for name in ("ties", "p_below_half")} == {"warning"}


def test_contradictions_are_a_warning_until_there_is_nothing_else():
    both = [pair("a?", "Yes.", "No."), pair("a?", "No.", "Yes.")]
    found = check([*both, *balanced(1)], "conflicts")
    assert (found.severity, found.rows) == ("warning", (0, 1))
    found = check(both, "conflicts")
    assert found.severity == "error"
    assert "nothing consistent" in found.message
    assert check([both[0], pair("b?", "No.", "Yes.")], "conflicts") is None


def test_contradictions_inside_one_group_are_found():
    group = pair("a?", "Yes.", "No.")
    back = Preference(chosen=1, rejected=0, p_chosen=0.9)
    group = msgspec.structs.replace(group, preferences=(*group.preferences, back))
    assert check([*balanced(2), group], "conflicts").rows == (2, 3)


def test_repeated_pairs_are_a_warning_that_names_the_repeats():
    groups = [pair("a?", "Yes.", "No."), *balanced(2), pair("a?", "Yes.", "No.")]
    found = check(groups, "duplicates")
    assert (found.severity, found.rows) == ("warning", (3,))


def test_held_out_prompts_among_the_training_prompts_are_an_error():
    groups = balanced(5)
    found = check(groups, "held_out_overlap", held_out=[groups[3].prompt, groups[1].prompt])
    assert (found.severity, found.rows) == ("error", (1, 3))


def test_a_prompt_that_fills_the_maximum_length_is_an_error_at_exactly_its_length():
    group = pair("Hello!", "Yes.", "No.")
    n = len(tokenize_prompt(CHATML, group.prompt))
    found = check([group], "prompt_fills_max_length", max_length=n)
    assert (found.severity, found.rows) == ("error", (0,))
    assert check([group], "truncation", max_length=n) is None
    assert check([group], "prompt_fills_max_length", max_length=n + 1) is None
    assert check([group], "truncation", max_length=n + 1).rows == (0,)


def test_truncation_is_counted_for_each_side_and_begins_one_token_below_the_whole():
    group = pair("Hello!", "Yes, the sky is blue.", "No.")
    tokens = tokenize_preference(CHATML, *group.answers)
    whole = len(tokens.prompt_ids) + len(tokens.chosen_ids)
    report = preflight([group, pair("a?", "No.", "Yes.")], CHATML, max_length=whole)
    assert (report.n_chosen_truncated, report.n_rejected_truncated) == (0, 0)
    report = preflight([group, pair("a?", "No.", "Yes.")], CHATML, max_length=whole - 1)
    assert (report.n_chosen_truncated, report.n_rejected_truncated) == (1, 0)
    (found,) = [f for f in report.findings if f.check == "truncation"]
    assert (found.severity, found.rows) == ("warning", (0,))
    assert "1 chosen and 0 rejected" in found.message
    report = preflight([group], CHATML, max_length=len(tokens.prompt_ids) + 1)
    assert (report.n_chosen_truncated, report.n_rejected_truncated) == (1, 1)


def test_answers_that_differ_only_beyond_the_maximum_length_are_an_error():
    group = pair("Hello!", "Yes, blue.", "Yes, green.")
    tokens = tokenize_preference(CHATML, *group.answers)
    both = zip(tokens.chosen_ids, tokens.rejected_ids, strict=False)
    first_difference = next(i for i, (c, r) in enumerate(both) if c != r)
    n = len(tokens.prompt_ids) + first_difference
    found = check([group], "identical_when_truncated", max_length=n)
    assert (found.severity, found.rows) == ("error", (0,))
    assert check([group], "identical_when_truncated", max_length=n + 1) is None
    same = pair("Hello!", "Yes, blue.", "Yes, blue.")
    assert check([same], "identical_when_truncated", max_length=n) is None


def test_a_finished_answer_that_loses_its_end_is_a_warning_and_a_cut_one_is_not():
    text = "Yes, the sky is blue."
    finished = pair("Hello!", text, "No.")
    cut = pair("How are you?", text, "No.", finish=("length", "stop"))
    answer = tokenize_answer(CHATML, finished.prompt, text, complete=True)
    room = len(answer.prompt_ids) + len(answer.answer_ids)
    assert check([finished], "missing_eos", max_length=room) is None
    found = check([finished], "missing_eos", max_length=room - 1)
    assert (found.severity, found.rows) == ("warning", (0,))
    prompt_ids = tokenize_prompt(CHATML, cut.prompt)
    assert check([cut], "missing_eos", max_length=len(prompt_ids) + 4) is None
    assert check([cut], "cut_answers").severity == "info"


def test_answers_of_unknown_end_are_counted():
    groups = [pair("a?", "Yes.", "No.", finish=("unknown", "stop")), *balanced(1)]
    found = check(groups, "unknown_finish")
    assert (found.severity, found.rows) == ("info", (0,))


def test_special_tokens_inside_an_answer_are_warnings():
    groups = [
        pair("a?", "Yes.<|im_end|>\nMore.", "No."),
        pair("b?", "Yes.", "<|im_start|>No."),
        pair("c?", "Yes.<|im_end|>", "No."),
    ]
    assert check(groups, "eos_inside").rows == (0,)
    assert check(groups, "doubled_bos").rows == (1,)
    plain = tiny_tokenizer("plain")
    groups = [pair("a?", "<s>Yes.", "No."), pair("<s>b?", "Yes.", "No.")]
    assert check(groups, "doubled_bos", tokenizer=plain).rows == (0,)
    same = tiny_tokenizer("gpt2")
    groups = [pair("a?", "<|endoftext|>Yes.", "No."), pair("b?", "Yes.", "No.")]
    assert check(groups, "eos_inside", tokenizer=same).rows == (0,)
    assert check(groups, "doubled_bos", tokenizer=same) is None


def test_tokens_merged_across_the_boundary_are_a_warning():
    groups = [pair("a?", "Yes.", "\n\nThank you."), *balanced(2)]
    found = check(groups, "boundary_merge")
    assert (found.severity, found.rows) == ("warning", (0,))


def test_a_refused_conversation_is_an_error_and_the_rest_is_still_checked():
    prompt = Prompt.from_messages([Message("system", "Be kind."), Message("user", "Hello!")])
    groups = [pair(prompt, "Yes.", "No."), pair("a?", "Yes.", "Yes."), *balanced(2)]
    report = preflight(groups, tiny_tokenizer("gemma"), max_length=50)
    assert [(f.check, f.rows) for f in report.errors] == [("template", (0,)), ("identical", (1,))]
    assert "System role not supported" in report.errors[0].message
    # Of the three tokenized pairs, one has equal answers and one each the longer or shorter one.
    assert (report.longest_wins_share, report.shortest_wins_share) == (1 / 3, 1 / 3)


@pytest.mark.parametrize(("n_longer", "n_equal", "warned"), [(8, 0, True), (7, 1, False)])
def test_length_that_decides_four_pairs_of_five_is_a_warning(n_longer, n_equal, warned):
    longer, shorter = "Yes, it is.", "No."
    n_shorter = 10 - n_longer - n_equal
    groups = [pair(f"{i}?", longer, shorter) for i in range(n_longer)]
    groups += [pair(f"e{i}?", "one", "two") for i in range(n_equal)]
    groups += [pair(f"s{i}?", shorter, longer) for i in range(n_shorter)]
    equal_ids = tokenize_preference(CHATML, *pair("e", "one", "two").answers)
    assert len(equal_ids.chosen_ids) == len(equal_ids.rejected_ids)
    report = preflight(groups, CHATML, max_length=None)
    assert report.longest_wins_share == n_longer / 10
    assert report.shortest_wins_share == n_shorter / 10
    assert (check(groups, "longest_wins") is not None) == warned
    assert check(groups, "shortest_wins") is None
    mirrored = [pair(g.prompt, g.answers[1].text, g.answers[0].text) for g in groups]
    assert (check(mirrored, "shortest_wins") is not None) == warned


def test_the_length_baseline_counts_equal_lengths_as_a_coin_flip():
    groups = [pair(f"{i}?", "Yes, it is.", "No.") for i in range(8)]
    groups += [pair(f"e{i}?", "one", "two") for i in range(2)]
    assert "80% of the pairs" in check(groups, "longest_wins").message
    assert "would score 90%" in check(groups, "longest_wins").message


def test_rows_number_the_pairs_through_all_groups_and_only_twenty_are_named():
    prompt = Prompt.from_text("many?")
    answers = tuple(Candidate(prompt=prompt, text=t, model="m") for t in ("a", "a", "b"))
    group = PreferenceGroup(
        prompt=prompt,
        answers=answers,
        preferences=(
            Preference(chosen=0, rejected=2, p_chosen=0.9),
            Preference(chosen=0, rejected=1, p_chosen=0.9),
        ),
    )
    found = check([*balanced(2), group], "identical")
    assert found.rows == (3,)
    same = [pair(f"{i}?", "Yes.", "Yes.") for i in range(25)]
    found = check(same, "identical")
    assert found.n_rows == 25
    assert found.rows == tuple(range(20))
    assert "25 pairs" in found.message


def test_all_errors_are_raised_at_once_with_what_to_do():
    groups = [pair("a?", "Yes.", "Yes."), pair("b?", "", "Yes.")]
    report = preflight(groups, CHATML, max_length=None, held_out=[groups[1].prompt])
    with pytest.raises(DataError) as caught:
        report.raise_for_errors()
    assert [p.split(":")[0] for p in caught.value.problems] == [
        "identical",
        "empty_chosen",
        "held_out_overlap",
    ]
    assert "(pairs 0)" in caught.value.problems[0]
    assert "Leave them out" in caught.value.problems[0]


def test_the_text_names_every_finding_worst_first():
    groups = [pair("a?", "Yes.", "Yes."), pair("b?", "Yes, it is.", "No.", finish=("length",) * 2)]
    report = preflight(groups, CHATML, max_length=300)
    text = report.to_text()
    assert text.startswith("2 pairs, 2 prompts, maximum length 300 tokens\n")
    first_words = [line.split()[:2] for line in text.splitlines()[5:] if not line.startswith(" ")]
    assert first_words == [
        ["error", "identical"],
        ["warning", "few_pairs"],
        ["info", "cut_answers"],
    ]
    assert report.warnings == tuple(f for f in report.findings if f.severity == "warning")


def test_a_report_can_be_written_and_read():
    report = preflight(balanced(3), CHATML, max_length=20)
    assert msgspec.json.decode(msgspec.json.encode(report), type=type(report)) == report


answers = st.sampled_from(["", "Yes.", "No.", "\n\nThank you.", "Yes<|im_end|>", "é日本"])


@given(
    drawn=st.lists(
        st.tuples(st.sampled_from(["a?", "b?"]), answers, answers, st.sampled_from([0.5, 0.9])),
        max_size=6,
    ),
    max_length=st.none() | st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_any_data_gets_a_report_whose_figures_agree(drawn, max_length):
    groups = [pair(q, c, r, p=p) for q, c, r, p in drawn]
    report = preflight(groups, CHATML, max_length=max_length)
    assert report.n_pairs == len(groups)
    for finding in report.findings:
        assert finding.rows == tuple(sorted(set(finding.rows)))
        assert len(finding.rows) == min(finding.n_rows, 20)
        assert all(0 <= row < len(groups) for row in finding.rows)
        assert finding.check in report.to_text()
    empty = {i for i, (_, c, _, _) in enumerate(drawn) if not c.strip()}
    reported = {row for f in report.findings if f.check == "empty_chosen" for row in f.rows}
    assert reported == empty
    if groups:
        assert report.longest_wins_share + report.shortest_wins_share <= 1
