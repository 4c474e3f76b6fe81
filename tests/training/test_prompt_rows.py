"""Prompts of a dataset as token ids, and the order in which they are answered."""

from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.errors import DataError
from prefopt.training.prompt_rows import PromptSet, RolloutSampler
from tests.tiny_models import tiny_tokenizer


@given(
    n=st.integers(1, 20), batch=st.integers(1, 8), repeats=st.integers(1, 4), seed=st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_batches_are_whole_repeated_and_cover_all_prompts(n, batch, repeats, seed):
    sampler = RolloutSampler(n, batch, repeats, seed)
    order = list(sampler)
    assert len(order) == len(sampler)
    chunks = [order[i : i + batch] for i in range(0, len(order), batch)]
    assert all(len(chunk) == batch for chunk in chunks)
    batches = chunks[::repeats]
    assert [chunk for each in batches for chunk in [each] * repeats] == chunks
    counts = Counter(i for each in batches for i in each)
    assert set(counts) == set(range(n))
    # No prompt is answered twice more often than another, but for the last, filled batch.
    assert max(counts.values()) - min(counts.values()) <= 1


def test_each_epoch_has_an_order_of_its_own_that_the_seed_decides():
    sampler = RolloutSampler(50, 10, 1, seed=3)
    first = list(sampler)
    assert list(sampler) == first == list(RolloutSampler(50, 10, 1, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_texts_messages_and_ids():
    tokenizer = tiny_tokenizer()
    text = PromptSet(Dataset.from_list([{"prompt": "The sky", "n": 1}]), tokenizer)
    (row,) = text.rows([0])
    assert tokenizer.decode(row.ids) == "The sky"
    assert row.prompt.text == "The sky"
    assert row.row["n"] == 1
    messages = [{"role": "user", "content": "Hello"}]
    (row,) = PromptSet(Dataset.from_list([{"prompt": messages}]), tokenizer).rows([0])
    assert tokenizer.decode(row.ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert [m.content for m in row.prompt.messages] == ["Hello"]
    ids = Dataset.from_list([{"prompt_input_ids": [5, 6]}])
    (row,) = PromptSet(ids, None).rows([0])
    assert (row.ids, row.prompt) == ((5, 6), None)


def test_a_tokenizer_that_ends_texts_does_not_end_prompts():
    tokenizer = tiny_tokenizer("plain")
    (row,) = PromptSet(Dataset.from_list([{"prompt": "The sky"}]), tokenizer).rows([0])
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.ids[-1] != tokenizer.eos_token_id


def test_rows_that_cannot_be_used():
    with pytest.raises(DataError, match="is empty"):
        PromptSet(Dataset.from_list([]), None)
    with pytest.raises(DataError, match="need a tokenizer"):
        PromptSet(Dataset.from_list([{"prompt": "a"}]), None)
    with pytest.raises(DataError, match="row 1 of the train dataset has an empty prompt"):
        PromptSet(Dataset.from_list([{"prompt_ids": [1]}, {"prompt_ids": []}]), None)
