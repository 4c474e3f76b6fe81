"""Tree batches: every token's place by hand, the mask by brute force, budgets kept by first-fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.trees import (
    AnswerTree,
    TreeSpan,
    pack_trees,
    pad_trees,
    split_by_tokens,
    tree_mask,
    tree_segments,
)

quick = settings(max_examples=50, deadline=None)

ONE = AnswerTree((1, 2, 3), ((10, 11), (20, 21, 22)))
TWO = AnswerTree((4, 5), ((30,), (40, 41)))

tokens = st.lists(st.integers(0, 50), min_size=1, max_size=6).map(tuple)
trees = st.lists(
    st.builds(AnswerTree, tokens, st.lists(tokens, min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=4,
)


def test_two_trees_by_hand():
    batch = pack_trees([ONE, TWO])
    # prompt | answer 0 and 1 but for their last tokens | prompt | (an answer of one token) | answer 3
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 20, 21, 4, 5, 40]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 2]]
    assert batch.spans == (TreeSpan(0, 3, (1, 2)), TreeSpan(6, 2, (0, 1)))
    assert [span.end for span in batch.spans] == [6, 9]
    assert batch.targets.tolist() == [10, 11, 20, 21, 22, 30, 40, 41]
    assert batch.predictor.tolist() == [2, 3, 2, 4, 5, 7, 7, 8]
    assert batch.answer_of.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert batch.lengths.tolist() == [2, 3, 1, 2]
    assert (batch.n_answers, batch.n_tokens) == (4, 9)
    assert (ONE.n_tokens, TWO.n_tokens) == (6, 3)


def test_two_trees_with_every_last_token_by_hand():
    batch = pack_trees([ONE, TWO], feed_last=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 20, 21, 22, 4, 5, 30, 40, 41]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 2, 3]]
    assert batch.spans == (TreeSpan(0, 3, (2, 3)), TreeSpan(8, 2, (1, 2)))
    assert batch.predictor.tolist() == [2, 3, 2, 5, 6, 9, 9, 11]
    assert batch.ends.tolist() == [4, 7, 10, 12]
    assert batch.targets.tolist() == pack_trees([ONE, TWO]).targets.tolist()
    assert pack_trees([ONE, TWO]).ends.tolist() == []


@quick
@given(trees)
def test_ends_hold_the_last_token_of_each_answer(given_trees):
    last = [answer[-1] for tree in given_trees for answer in tree.answers]
    for batch in (pack_trees(given_trees, feed_last=True), pad_trees(given_trees, 0)):
        assert batch.input_ids.flatten()[batch.ends].tolist() == last


def test_the_mask_by_hand():
    seen = tree_mask(pack_trees([AnswerTree((1, 2), ((3, 4, 5), (6, 7))), TWO]).spans)[0, 0]
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],  # first answer
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],  # second answer: the prompt and itself
        [0, 0, 0, 0, 0, 1, 0, 0],  # another tree
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]


def test_padded_rows_by_hand():
    batch = pad_trees([ONE, TWO], pad_token_id=99)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 10, 11, 99],
        [1, 2, 3, 20, 21, 22],
        [4, 5, 30, 99, 99, 99],
        [4, 5, 40, 41, 99, 99],
    ]
    assert batch.attention_mask.sum(1).tolist() == [5, 6, 3, 4]
    assert batch.predictor.tolist() == [2, 3, 8, 9, 10, 13, 19, 20]
    assert (batch.n_answers, batch.n_tokens) == (4, 24)


def test_an_answer_may_hold_the_padding_token():
    batch = pad_trees([AnswerTree((99, 1), ((99, 2, 99), (3,)))], pad_token_id=99)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.targets.tolist() == [99, 2, 99, 3]


@given(trees)
@quick
def test_every_answer_token_is_predicted_by_the_token_before_it(batch_of):
    """Following the mask from each answer's last fed token gives back prompt and answer in order."""
    batch = pack_trees(batch_of)
    seen = tree_mask(batch.spans)[0, 0]
    ids, positions = batch.input_ids[0], batch.position_ids[0]
    answers = [(t.prompt_ids, answer) for t in batch_of for answer in t.answers]
    assert batch.n_tokens == sum(t.n_tokens for t in batch_of) == batch.spans[-1].end
    for number, (prompt, answer) in enumerate(answers):
        places = batch.predictor[batch.answer_of == number].tolist()
        assert batch.targets[batch.answer_of == number].tolist() == list(answer)
        for i, place in enumerate(places):
            context = seen[place].nonzero()[:, 0]
            assert ids[context].tolist() == [*prompt, *answer[:i]]
            assert positions[context].tolist() == list(range(len(prompt) + i))


@given(trees)
@quick
def test_the_mask_agrees_with_a_walk_over_all_pairs_of_tokens(batch_of):
    spans = pack_trees(batch_of).spans
    names = []  # (tree, segment in the tree) of each token
    for tree, span in enumerate(spans):
        for segment, size in enumerate((span.prompt_length, *span.answer_lengths)):
            names += [(tree, segment)] * size
    seen = tree_mask(spans)[0, 0]
    for q, (tree, segment) in enumerate(names):
        for k, (other_tree, other_segment) in enumerate(names):
            allowed = k <= q and tree == other_tree and other_segment in (0, segment)
            assert bool(seen[q, k]) == allowed
    segments = tree_segments(spans)
    assert segments.tree.tolist() == [tree for tree, _ in names]
    assert segments.in_prompt.tolist() == [segment == 0 for _, segment in names]
    places = {}
    for name, number in zip(names, segments.segment.tolist(), strict=True):
        assert places.setdefault(name, number) == number
    assert len(set(places.values())) == len(places)


@given(trees)
@quick
def test_padded_and_flat_batches_score_the_same_tokens_in_the_same_order(batch_of):
    flat, padded = pack_trees(batch_of), pad_trees(batch_of, 0)
    for name in ("targets", "answer_of", "lengths"):
        assert torch.equal(getattr(flat, name), getattr(padded, name))
    before = padded.input_ids.flatten()[padded.predictor]
    assert torch.equal(before, flat.input_ids[0][flat.predictor])
    after = padded.input_ids.flatten()[padded.predictor + 1]
    assert torch.equal(after, padded.targets)
    assert padded.attention_mask.flatten()[padded.predictor + 1].all()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ([], "at least one tree"),
        ([ONE, AnswerTree((), ((1,),))], "tree 1 needs a prompt .* prompt of 0 and answers of"),
        ([AnswerTree((1,), ())], r"tree 0 .* answers of \[\] tokens"),
        ([AnswerTree((1,), ((2,), ()))], r"tree 0 .* answers of \[1, 0\] tokens"),
    ],
    ids=["no tree", "no prompt", "no answers", "an empty answer"],
)
def test_trees_in_which_nothing_would_predict_a_token_are_refused(broken, words):
    with pytest.raises(ValueError, match=words):
        pack_trees(broken)
    with pytest.raises(ValueError, match=words):
        pad_trees(broken, 0)


def test_moving_a_batch_moves_every_tensor():
    for batch in (pack_trees([ONE]), pad_trees([ONE], 0)):
        moved = batch.to("meta")
        assert type(moved) is type(batch)
        tensors = [x for x in moved if isinstance(x, torch.Tensor)]
        assert len(tensors) == 7
        assert {x.device.type for x in tensors} == {"meta"}
    assert pack_trees([ONE]).to("meta").spans == pack_trees([ONE]).spans


def test_splitting_by_hand():
    assert split_by_tokens([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert split_by_tokens([3, 30, 3], 10) == [[0, 2], [1]]
    assert split_by_tokens([10, 10], 10) == [[0], [1]]
    assert split_by_tokens([], 10) == []


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
@quick
def test_a_split_keeps_every_tree_once_within_the_budget_and_is_nearly_as_small_as_can_be(
    sizes, budget
):
    parts = split_by_tokens(iter(sizes), budget)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in part) for part in parts]
    for part, total in zip(parts, totals, strict=True):
        assert part == sorted(part)
        assert total <= budget or len(part) == 1
    assert parts == sorted(parts) == split_by_tokens(sizes, budget)
    # First-fit never leaves two micro-batches that would have gone together.
    assert all(a + b > budget for i, a in enumerate(totals) for b in totals[:i])
