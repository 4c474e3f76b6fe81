"""Perplexity on a tiny random Llama, against hand-worked values and a loop without batches."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from prefopt.errors import ModelError
from prefopt.evaluation.perplexity import perplexity

_WORDS = [f"w{i}" for i in range(90)]
TEXTS = [
    "w1 w2 w3 w4 w5 w6 w7 w8 w9",
    "w10 w11",
    "w3 w1 w4 w1 w5 w9 w2 w6 w5 w3 w5 w8 w9 w7 w9",
    "w20 w21 w22 w23",
    "w42 w17 w42",
]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=93,
        max_position_embeddings=128,
        attention_dropout=0.5,
        initializer_range=0.5,  # so that predictions differ from uniform
    )
    return LlamaForCausalLM(config)


def make_tokenizer(*, bos: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "<pad>": 1, "<unk>": 2, **{w: i + 3 for i, w in enumerate(_WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


def one_by_one(model: Any, sequences: list[list[int]]) -> float:
    """The definition: no batch, no padding, one probability at a time."""
    model.eval()
    logs = []
    with torch.no_grad():
        for ids in sequences:
            probabilities = torch.softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            logs += [math.log(probabilities[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    return math.exp(-sum(logs) / len(logs))


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) + 3 for word in text.split()]


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(model: Any) -> None:
    import copy

    blank = copy.deepcopy(model)
    torch.nn.init.zeros_(blank.lm_head.weight)
    assert perplexity(blank, make_tokenizer(bos=False), TEXTS) == pytest.approx(93, rel=1e-6)


def test_perplexity_is_token_weighted_and_leaves_out_the_first_token(model: Any) -> None:
    expected = one_by_one(model, [ids_of(t) for t in TEXTS])
    assert abs(expected - 93) > 1
    assert perplexity(model, make_tokenizer(bos=False), TEXTS) == pytest.approx(expected, rel=1e-4)


def test_bos_is_put_in_front_where_the_tokenizer_normally_does(model: Any) -> None:
    expected = one_by_one(model, [[0, *ids_of(t)] for t in TEXTS])
    without = perplexity(model, make_tokenizer(bos=False), TEXTS)
    assert expected != pytest.approx(without, rel=1e-3)
    assert perplexity(model, make_tokenizer(bos=True), TEXTS) == pytest.approx(expected, rel=1e-4)


def test_one_word_can_be_predicted_from_bos_but_not_from_nothing(model: Any) -> None:
    assert perplexity(model, make_tokenizer(bos=True), ["w5"]) > 1
    with pytest.raises(ValueError, match=r"2 of 3 have none \(numbers 0, 2"):
        perplexity(model, make_tokenizer(bos=False), ["w5", "w5 w6", ""])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_batch_size_and_padding_do_not_change_the_result(model: Any, batch_size: int) -> None:
    tokenizer = make_tokenizer(bos=True)
    alone = perplexity(model, tokenizer, TEXTS, batch_size=1)
    together = perplexity(model, tokenizer, TEXTS, batch_size=batch_size)
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_order_of_the_texts_does_not_matter(model: Any) -> None:
    tokenizer = make_tokenizer(bos=True)
    forwards = perplexity(model, tokenizer, TEXTS, batch_size=2)
    assert perplexity(model, tokenizer, TEXTS[::-1], batch_size=2) == pytest.approx(forwards)


def test_a_tokenizer_without_a_pad_token_works_too(model: Any) -> None:
    tokenizer = make_tokenizer(bos=True)
    expected = perplexity(model, tokenizer, TEXTS)
    tokenizer.pad_token = None
    assert perplexity(model, tokenizer, TEXTS) == pytest.approx(expected, rel=1e-6)


def test_dropout_is_off_meanwhile_and_training_mode_comes_back(model: Any) -> None:
    tokenizer = make_tokenizer(bos=True)
    model.eval()
    expected = perplexity(model, tokenizer, TEXTS)
    model.train()
    assert perplexity(model, tokenizer, TEXTS) == pytest.approx(expected, rel=1e-6)
    assert model.training
    model.eval()


def test_what_is_cut_off_is_announced(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = one_by_one(model, [ids_of(t)[:6] for t in TEXTS])
    with caplog.at_level(logging.WARNING):
        cut = perplexity(model, make_tokenizer(bos=False), TEXTS, max_length=6)
    assert cut == pytest.approx(expected, rel=1e-4)
    assert "2 of 5 texts are longer than 6 tokens" in caplog.text


def test_unusable_arguments_are_refused(model: Any) -> None:
    tokenizer = make_tokenizer(bos=True)
    with pytest.raises(ValueError, match="at least one text"):
        perplexity(model, tokenizer, [])
    with pytest.raises(ValueError, match="got 1 and 0"):
        perplexity(model, tokenizer, TEXTS, max_length=1, batch_size=0)


def test_a_broken_model_is_an_error_and_not_a_number(model: Any) -> None:
    import copy

    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        perplexity(broken, make_tokenizer(bos=True), TEXTS)
