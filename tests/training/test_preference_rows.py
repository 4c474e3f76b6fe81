"""Preference rows: tokens as TRL's, pairs and their weights, and plans that lose none of them."""

import itertools
import logging
from collections import Counter

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefopt.errors import DataError
from prefopt.training import preference_rows as module
from prefopt.training.preference_rows import (
    PreferenceRow,
    PreferenceRows,
    PromptGroupSampler,
    RowCollator,
    RowPair,
    TokenSequence,
    plan_micro_batches,
    read_row,
    rows_from_padded,
    shared_length,
    tokenize_preferences,
    usable_rows,
)
from prefopt.trees import AnswerTree
from tests.tiny_models import tiny_tokenizer

quick = settings(max_examples=60, deadline=None)


def said(role, text):
    return [{"role": role, "content": text}]


PLAIN = [
    {"prompt": "The sky is", "chosen": " blue and green.", "rejected": " fine"},
    {"prompt": "Hello!", "chosen": " How are you?", "rejected": " How are"},
    {"prompt": "user\n", "chosen": "\nThank you.", "rejected": "system"},
]
CHATS = [
    {
        "prompt": [*said("system", "header"), *said("user", row["prompt"])],
        "chosen": said("assistant", row["chosen"]),
        "rejected": said("assistant", row["rejected"]),
    }
    for row in PLAIN
]


def implicit(rows):
    """The same rows with the prompt at the beginning of both answers."""
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


# --- Text to token ids --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_tokens(tiny_model, tmp_path_factory):
    """What TRL's trainer makes of rows."""

    def prepare(rows, tokenizer):
        args = trl.DPOConfig(
            str(tmp_path_factory.mktemp("trl")), report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        made = trl.DPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_model),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return made.train_dataset

    return prepare


@pytest.mark.parametrize("template", ["chatml", "llama"])
@pytest.mark.parametrize("form", ["explicit", "implicit"])
@pytest.mark.parametrize("rows", [PLAIN, CHATS], ids=["plain", "conversations"])
def test_token_ids_are_trls(rows, form, template, trl_tokens):
    rows = implicit(rows) if form == "implicit" else rows
    tokenizer = tiny_tokenizer(template)
    theirs = trl_tokens(rows, tokenizer)
    ours = tokenize_preferences(Dataset.from_list(rows), tokenizer)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(ours[name]) == list(theirs[name])
        assert all(ours[name])


def test_a_stream_is_tokenized_as_a_dataset_is():
    tokenizer = tiny_tokenizer()
    stream = IterableDataset.from_generator(lambda: iter(CHATS))
    rows = list(tokenize_preferences(stream, tokenizer))
    whole = tokenize_preferences(Dataset.from_list(CHATS), tokenizer)
    assert [r["chosen_ids"] for r in rows] == list(whole["chosen_ids"])


@pytest.mark.parametrize("as_messages", [True, False])
def test_k_answers_are_tokenized_as_pairs_are(as_messages):
    tokenizer = tiny_tokenizer()
    prompt = said("user", "The sky is")
    texts = ["blue.", "green and blue.", "fine"]
    answers = [said("assistant", t) for t in texts] if as_messages else texts
    row = {"prompt": prompt, "answers": answers, "scores": [3.0, 2.0, 1.0]}
    (k_way,) = tokenize_preferences(Dataset.from_list([row]), tokenizer)
    for i, j in ((0, 1), (1, 2)):
        pair = {
            "prompt": prompt,
            "chosen": said("assistant", texts[i]),
            "rejected": said("assistant", texts[j]),
        }
        (tokens,) = tokenize_preferences(Dataset.from_list([pair]), tokenizer)
        assert tokens["prompt_ids"] == k_way["prompt_ids"]
        assert [tokens["chosen_ids"], tokens["rejected_ids"]] == [
            k_way["answer_ids"][i],
            k_way["answer_ids"][j],
        ]
    assert k_way["scores"] == [3.0, 2.0, 1.0]


def test_plain_answers_end_with_one_end_token():
    tokenizer = tiny_tokenizer("gpt2")
    end = tokenizer.eos_token
    row = {"prompt": "The sky", "answers": [" is blue", " is blue" + end], "scores": [1.0, 0.0]}
    (tokens,) = tokenize_preferences(Dataset.from_list([row]), tokenizer)
    first, second = tokens["answer_ids"]
    assert first == second
    assert first.count(tokenizer.eos_token_id) == 1
    assert first[-1] == tokenizer.eos_token_id


def test_rows_of_tokens_are_left_as_they_are():
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "extra": "x"}]
    dataset = Dataset.from_list(rows)
    assert tokenize_preferences(dataset, None) is dataset
    groups = Dataset.from_list([{"prompt_ids": [1], "answer_ids": [[2], [3]]}])
    assert tokenize_preferences(groups, None) is groups


def test_a_prompt_whose_last_tokens_merge_with_the_answer_is_cut_and_said_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "_WARNED_OF_BOUNDARY", False)
    tokenizer = tiny_tokenizer("hinted")  # its generation prompt ends in a hint that then vanishes
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        rows = tokenize_preferences(Dataset.from_list(CHATS), tokenizer)
    assert caplog.text.count("is left out of the prompt") == 1
    assert "<think>" in caplog.text
    hint = tokenizer.convert_tokens_to_ids("<think>")
    assert not any(hint in ids for ids in rows["prompt_ids"])


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "chosen": "b"},
        {"answers": ["a", "b"], "scores": [1.0, 2.0]},
        {"prompt_ids": [1], "chosen_ids": [2]},
    ],
    ids=", ".join,
)
def test_columns_that_are_not_understood_are_listed_with_those_that_are(row):
    listed = ", ".join(sorted(row))
    words = rf"the eval dataset has the columns {listed}\. Expected: chosen and rejected"
    with pytest.raises(DataError, match=words):
        tokenize_preferences(Dataset.from_list([row]), tiny_tokenizer(), name="eval")


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="the eval dataset is empty"):
        tokenize_preferences(Dataset.from_list([]), tiny_tokenizer(), name="eval")


@pytest.mark.parametrize("kind", [Dataset.from_list, lambda rows: stream_of(rows)])
@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        (
            {"prompt": "Hello", "chosen": "a", "rejected": "b"},
            {"prompt": "Hello", "chosen": None, "rejected": "b"},
            "`chosen` must be a text or messages, got None",
        ),
        (
            {"prompt": "Hello", "chosen": "a", "rejected": "b"},
            {"prompt": None, "chosen": "a", "rejected": "b"},
            "`prompt` must be a text or messages, got None",
        ),
        (
            {"prompt": "Hello", "answers": ["a", "b"], "scores": [1.0, 0.0]},
            {"prompt": "Hello", "answers": ["a", None], "scores": [1.0, 0.0]},
            r"`answers\[1\]` must be a text or messages, got None",
        ),
        (
            {"prompt": "Hello", "answers": ["a", "b"], "scores": [1.0, 0.0]},
            {"prompt": "Hello", "answers": None, "scores": [1.0, 0.0]},
            "`answers` must be a list of answers, got None",
        ),
    ],
)
def test_a_row_that_lacks_something_is_named(kind, good, bad, words):
    with pytest.raises(DataError, match=f"row 1 of the eval dataset: {words}"):
        list(tokenize_preferences(kind([good, bad]), tiny_tokenizer(), name="eval"))


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def test_a_plain_prompt_with_messages_as_answers_is_refused():
    row = {"prompt": "Hello", "chosen": said("assistant", "a"), "rejected": said("assistant", "b")}
    with pytest.raises(DataError, match=r"row 0 of .* both as text, or both as messages"):
        tokenize_preferences(Dataset.from_list([row]), tiny_tokenizer())


def test_shared_length():
    assert shared_length([1, 2, 3], [1, 2, 4]) == 2
    assert shared_length([1, 2], [1, 2, 4]) == 2
    assert shared_length([], [1]) == 0


# --- Token ids to rows --------------------------------------------------------------------------

TEN = {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7, 8], "rejected_ids": [9]}


def read(row, **how):
    return read_row(row, **{"max_length": None, **how})


def test_a_pair_by_hand():
    row = read(TEN)
    prompt = (1, 2, 3, 4)
    assert row.sequences == (TokenSequence(prompt, (5, 6, 7, 8)), TokenSequence(prompt, (9,)))
    assert row.pairs == (RowPair(0, 1, 1.0, 1.0),)
    assert row.scores is None
    assert row.n_tokens == 8 + 5
    assert read({**TEN, "p_chosen": 0.25}).pairs == (RowPair(0, 1, 0.25, 1.0),)


def test_truncation_by_hand():
    start = read(TEN, max_length=6)
    assert start.sequences[0] == TokenSequence((1, 2, 3, 4), (5, 6))
    assert start.sequences[1] == TokenSequence((1, 2, 3, 4), (9,))
    end = read(TEN, max_length=6, truncation="keep_end")
    assert end.sequences[0] == TokenSequence((3, 4), (5, 6, 7, 8))
    assert end.sequences[1] == TokenSequence((1, 2, 3, 4), (9,))
    # Nothing of the prompt is left: the first token cannot be predicted, so it stands in for it.
    assert read(TEN, max_length=3, truncation="keep_end").sequences[0] == TokenSequence(
        (6,), (7, 8)
    )
    no_prompt = {"prompt_ids": [], "chosen_ids": [5, 6], "rejected_ids": [7, 8, 9]}
    assert read(no_prompt).sequences[1] == TokenSequence((7,), (8, 9))


@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6), st.integers(2, 12), st.booleans())
@quick
def test_truncation_is_trls(prompt, chosen, rejected, max_length, keep_start):
    """Row by row what TRL's collator leaves, but for rows that it leaves without a scored token."""
    truncation = "keep_start" if keep_start else "keep_end"
    ids = list(range(1, 1 + prompt + chosen + rejected))
    example = {
        "prompt_ids": ids[:prompt],
        "chosen_ids": ids[prompt : prompt + chosen],
        "rejected_ids": ids[prompt + chosen :],
    }
    collator = DataCollatorForPreference(
        pad_token_id=0, max_length=max_length, truncation_mode=truncation
    )
    batch = collator([example])
    row = read(example, max_length=max_length, truncation=truncation)
    # The first token of a row is fed and never scored, there as here.
    scored = (batch["completion_mask"][:, 1:] * batch["attention_mask"][:, 1:]).sum(1)
    if (scored == 0).any():
        assert isinstance(row, str)
        with pytest.raises(DataError, match="without completion tokens"):
            rows_from_padded(batch)
        return
    assert rows_from_padded(batch) == PreferenceRows((row,))
    for i, sequence in enumerate(row.sequences):
        kept = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
        assert [*sequence.prompt_ids, *sequence.answer_ids] == kept
        assert len(sequence.answer_ids) == scored[i]


def test_all_pairs_of_k_answers_share_a_weight_of_one():
    row = read({"prompt_ids": [1], "answer_ids": [[2], [3], [4], [5]], "scores": [0.5, 2, 0.5, 1]})
    assert {p[:2] for p in row.pairs} == {(1, 0), (1, 2), (1, 3), (3, 0), (3, 2)}  # 0 and 2 tie
    assert all(p.weight == pytest.approx(1 / 5) and p.p_chosen == 1 for p in row.pairs)
    assert row.scores == (0.5, 2.0, 0.5, 1.0)


def test_best_against_worst():
    tokens = {"prompt_ids": [1], "answer_ids": [[2], [3], [4]], "scores": [0.5, 2, -1]}
    assert read(tokens, pair_choice="best_worst").pairs == (RowPair(1, 2, 1.0, 1.0),)


def test_given_preferences_count_before_scores():
    tokens = {"prompt_ids": [1], "answer_ids": [[2], [3], [4]], "scores": [3, 2, 1]}
    row = read({**tokens, "preferences": [[2, 0], [1, 0, 0.75]]})
    assert row.pairs == (RowPair(2, 0, 1.0, 0.5), RowPair(1, 0, 0.75, 0.5))
    named = [
        {"chosen": 2, "rejected": 0, "p_chosen": None},
        {"chosen": 1, "rejected": 0, "p_chosen": 0.75},
    ]
    assert read({**tokens, "preferences": named}).pairs == row.pairs
    assert read({**tokens, "scores": None, "preferences": named}).scores is None


USELESS = {
    "no answer token is left within max_length": {
        "prompt_ids": [1, 2, 3, 4, 5, 6, 7, 8], "chosen_ids": [5], "rejected_ids": [6],
    },
    "p_chosen must be in [0, 1], got 1.5": {**TEN, "p_chosen": 1.5},
    "p_chosen must be in [0, 1], got nan": {**TEN, "p_chosen": float("nan")},
    "2 answers have 3 scores": {
        "prompt_ids": [1], "answer_ids": [[2], [3]], "scores": [1.0, 2.0, 3.0],
    },
    "neither scores nor preferences say which answer is better": {
        "prompt_ids": [1], "answer_ids": [[2], [3]],
    },
    "no answer is better than another": {
        "prompt_ids": [1], "answer_ids": [[2], [3]], "scores": [1.0, 1.0],
    },
    "a score is missing or not a number": {
        "prompt_ids": [1], "answer_ids": [[2], [3], [4]], "scores": [1.0, float("nan"), 2.0],
    },
    "preference {'chosen': 0, 'p_chosen': 1.0, 'rejected': 2} does not name two of 2 answers": {
        "prompt_ids": [1], "answer_ids": [[2], [3]],
        "preferences": [{"chosen": 0, "p_chosen": 1.0, "rejected": 2}],
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", USELESS)
def test_every_reason_for_leaving_a_row_out_is_said_with_its_count(reason, caplog):
    columns = {"p_chosen", "answer_ids", "scores", "preferences", *TEN}
    fill = dict.fromkeys(columns)
    rows = [{**fill, **TEN}, {**fill, **USELESS[reason]}, {**fill, **USELESS[reason]}]
    how = {"max_length": 8, "truncation": "keep_start", "pair_choice": "all"}
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        kept = usable_rows(Dataset.from_list(rows), name="train", **how)
    assert len(kept) == 1
    assert "2 of 3 rows of the train dataset are left out" in caplog.text
    assert reason in caplog.text
    assert "(2)" in caplog.text
    caplog.clear()
    with pytest.raises(DataError, match="no row of the eval dataset can be used") as error:
        usable_rows(Dataset.from_list(rows[1:]), name="eval", **how)
    assert reason in str(error.value)
    with pytest.raises(DataError) as error:
        RowCollator(**how)([rows[1]])
    assert reason in str(error.value)


def test_an_empty_sequence_says_so():
    empty = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [1, 2]}
    assert read(empty) == "an answer is empty"


def test_a_dataset_of_which_all_rows_are_usable_is_returned_as_it_is(caplog):
    dataset = Dataset.from_list([TEN, TEN])
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        assert usable_rows(dataset, max_length=None) is dataset
    assert caplog.text == ""


def test_useless_rows_of_a_stream_are_left_out_and_each_reason_is_said_once(caplog):
    useless = USELESS["no answer token is left within max_length"]
    stream = IterableDataset.from_generator(lambda: iter([TEN, useless, TEN, useless]))
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        assert len(list(usable_rows(stream, name="eval", max_length=8))) == 2
    assert caplog.text.count("a row of the eval dataset is left out: no answer token is left") == 1


def test_a_missing_score_is_a_reason_too():
    group = {"prompt_ids": [1], "answer_ids": [[2], [3]], "scores": [1.0, None]}
    assert read(group) == "a score is missing or not a number"


def test_the_collator_reads_rows_as_it_is_told_to():
    group = {"prompt_ids": [1, 2], "answer_ids": [[3, 4], [5], [6]], "scores": [1.0, 3.0, 2.0]}
    how = {"max_length": 3, "truncation": "keep_end", "pair_choice": "best_worst"}
    rows = RowCollator(**how)([TEN, group])
    assert rows == PreferenceRows((read_row(TEN, **how), read_row(group, **how)))
    assert rows.rows[1].pairs == (RowPair(1, 0, 1.0, 1.0),)


# --- Rows to trees ------------------------------------------------------------------------------

few_ids = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)


@st.composite
def row_lists(draw):
    """Rows of few different ids, so that prompts and answers are often the same."""
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        k = draw(st.integers(2, 4))
        # Mostly one prompt a row; cut sequences of one row may have several.
        prompts = (
            [draw(few_ids)] * k if draw(st.integers(0, 3)) else [draw(few_ids) for _ in range(k)]
        )
        sequences = tuple(TokenSequence(p, draw(few_ids)) for p in prompts)
        n = draw(st.integers(1, 4))
        pairs = tuple(
            RowPair(*draw(st.permutations(range(k)))[:2], draw(st.floats(0, 1)), 1 / n)
            for _ in range(n)
        )
        scores = tuple(float(i) for i in range(k)) if draw(st.booleans()) else None
        rows.append(PreferenceRow(sequences, pairs, scores))
    return rows


def told(rows):
    """Every preference spelled out: both sequences, probability, weight, and which row said it."""
    return Counter(
        (row.sequences[p.chosen], row.sequences[p.rejected], p.p_chosen, p.weight, index, p.margin)
        for index, row in enumerate(rows)
        for p in row.pairs
    )


def planned(plan):
    """The same, read off the micro-batches."""
    found = Counter()
    for batch in plan:
        answers = [TokenSequence(t.prompt_ids, a) for t in batch.trees for a in t.answers]
        for pair in batch.pairs:
            found[answers[pair.chosen], answers[pair.rejected], *pair[2:]] += 1
    return found


@given(row_lists(), st.integers(1, 40), st.booleans())
@quick
def test_a_plan_keeps_every_preference_exactly_once(rows, max_tokens, merge):
    plan = plan_micro_batches(rows, max_tokens, merge=merge)
    assert planned(plan) == told(rows)
    groups = {}
    for batch in plan:
        answers = [TokenSequence(t.prompt_ids, a) for t in batch.trees for a in t.answers]
        for group in batch.groups:
            assert group.row not in groups
            groups[group.row] = (tuple(answers[i] for i in group.answers), group.scores)
    assert groups == {
        i: (row.sequences, row.scores) for i, row in enumerate(rows) if row.scores is not None
    }


@given(row_lists(), st.integers(1, 40), st.booleans())
@quick
def test_a_plan_feeds_no_answer_twice_and_keeps_the_budget(rows, max_tokens, merge):
    plan = plan_micro_batches(rows, max_tokens, merge=merge)
    for batch in plan:
        for tree in batch.trees:
            assert len(set(tree.answers)) == len(tree.answers)
        rows_here = {p.row for p in batch.pairs}
        fed = Counter(TokenSequence(t.prompt_ids, a) for t in batch.trees for a in t.answers)
        assert set(fed) == {s for i in rows_here for s in rows[i].sequences}
        if merge:  # cut rows of several prompts stay alone, and may repeat another row's answer
            alone = [i for i in rows_here if len({s.prompt_ids for s in rows[i].sequences}) > 1]
            assert max(fed.values()) <= 1 + len(alone)
        prompts = {s.prompt_ids for i in rows_here for s in rows[i].sequences}
        if sum(tree.n_tokens for tree in batch.trees) > max_tokens:
            # Only what has to stay together may be too large: rows of one prompt, or one row.
            assert len(prompts) == 1 or len(rows_here) == 1
    if merge and all(len({s.prompt_ids for s in row.sequences}) == 1 for row in rows):
        trees = [tree.prompt_ids for batch in plan for tree in batch.trees]
        assert sorted(trees) == sorted({row.sequences[0].prompt_ids for row in rows})


def test_merging_by_hand():
    rows = [
        read({"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}),
        read({"prompt_ids": [9], "chosen_ids": [3, 4], "rejected_ids": [5]}),
        read({"prompt_ids": [1, 2], "chosen_ids": [5], "rejected_ids": [6, 7], "p_chosen": 0.6,
              "margin": 0.5}),
    ]  # fmt: skip
    (batch,) = plan_micro_batches(rows, 100)
    assert batch.trees == (
        AnswerTree((1, 2), ((3, 4), (5,), (6, 7))),
        AnswerTree((9,), ((3, 4), (5,))),
    )
    assert [tuple(p) for p in batch.pairs] == [
        (0, 1, 1.0, 1.0, 0, 0.0),
        (1, 2, 0.6, 1.0, 2, 0.5),
        (3, 4, 1.0, 1.0, 1, 0.0),
    ]
    (apart,) = plan_micro_batches(rows, 100, merge=False)
    assert len(apart.trees) == 3
    assert len(plan_micro_batches(rows, 1)) == 2  # rows of one prompt are never parted


# --- Order of the rows --------------------------------------------------------------------------

PROMPTS = ["a", "b", "a", "c", "d", "b", "a", "e", "f"]


def test_rows_of_one_prompt_follow_each_other_in_an_order_that_seed_and_epoch_fix():
    sampler = PromptGroupSampler(PROMPTS, seed=3)
    orders = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(len(PROMPTS)))
        names = [PROMPTS[i] for i in order]
        changes = sum(a != b for a, b in itertools.pairwise(names))
        assert changes == len(set(PROMPTS)) - 1
        assert list(sampler) == order
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 6
    again = PromptGroupSampler(PROMPTS, seed=3)
    again.set_epoch(4)
    assert list(again) == orders[4]
    other = PromptGroupSampler(PROMPTS, seed=4)
    assert list(other) != orders[0]
    assert len(sampler) == len(PROMPTS)


def test_of_a_prompt_with_many_rows_some_follow_elsewhere():
    prompts = ["a"] * 40 + ["b"] * 40 + ["c"] * 2
    orders = []
    for seed in range(20):
        sampler = PromptGroupSampler(prompts, seed, most=10)
        order = list(sampler)
        assert sorted(order) == list(range(82))
        assert list(sampler) == order
        at = order.index(80)
        assert order[at + 1] == 81  # few rows stay together, in their order
        orders.append(order)
    # Twenty rows hold both prompts more often than not, and other rows each time.
    mixed = [len({prompts[i] for i in order[:20]}) > 1 for order in orders]
    assert sum(mixed) > 10
    assert len({tuple(sorted(order[:10])) for order in orders}) == 20


def test_without_shared_prompts_every_order_can_come():
    counts = Counter()
    for seed in range(300):
        counts[tuple(PromptGroupSampler("abc", seed))] += 1
    assert len(counts) == 6
    assert min(counts.values()) > 25  # 50 expected


# --- Batches that TRL's collator made -----------------------------------------------------------


def test_rows_from_trls_collator_are_rows_from_our_own():
    rows = tokenize_preferences(Dataset.from_list(CHATS), tiny_tokenizer())
    examples = [
        {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows
    ]
    pad = examples[0]["chosen_ids"][-1]  # the padding token occurs in the answers
    for how in ({}, {"max_length": 20, "truncation_mode": "keep_end"}, {"pad_to_multiple_of": 16}):
        batch = DataCollatorForPreference(pad_token_id=pad, **how)(examples)
        own = RowCollator(how.get("max_length"), how.get("truncation_mode", "keep_start"))
        assert rows_from_padded(batch) == own(examples)
    assert isinstance(batch["input_ids"], torch.Tensor)
