"""Log-probabilities of answers and the distance tuning moved a model, on a tiny random Llama."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from prefopt.chat import tokenize_candidate
from prefopt.errors import ModelError
from prefopt.evaluation.policy_shift import AnswerLogp, answer_logps, measure_shift, shift_of
from prefopt.models import (
    LanguageModel,
    LoRASettings,
    load_model,
    lora_config,
    wrap_with_adapter,
)
from prefopt.sampling.candidates import SamplingSettings
from prefopt.types import Candidate, FinishReason, Prompt
from tests.tiny_models import save_tiny_model


def answer(i: int, text: str, finish: FinishReason = "stop") -> Candidate:
    return Candidate(
        prompt=Prompt.from_text(f"Question {i}?"), text=text, model="m", finish_reason=finish
    )


ANSWERS = [
    answer(0, "The sky is blue."),
    answer(1, "Yes", "length"),
    answer(2, ""),
    answer(3, "", "length"),
    answer(4, "Hello! How are you? I am fine.\n\nThank you. " * 4),
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny model with a LoRA adapter that does something."""
    loaded = load_model(save_tiny_model(tmp_path_factory.mktemp("tiny")), device="cpu")
    torch.manual_seed(1)
    model = wrap_with_adapter(loaded.model, lora_config(LoRASettings(r=4)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return LanguageModel(name="tuned", model=model.eval(), tokenizer=loaded.tokenizer, base="tiny")


def by_hand(loaded: LanguageModel, candidate: Candidate) -> float:
    tokens = tokenize_candidate(loaded.tokenizer, candidate)
    ids = torch.tensor([[*tokens.prompt_ids, *tokens.answer_ids]])
    with torch.inference_mode():
        log_p = torch.log_softmax(loaded.model(input_ids=ids).logits[0].double(), -1)
    start = len(tokens.prompt_ids)
    return sum(float(log_p[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def test_a_batch_gives_what_one_answer_at_a_time_does(tuned: LanguageModel) -> None:
    found = answer_logps(tuned, ANSWERS)
    for candidate, logp in zip(ANSWERS, found, strict=True):
        assert logp is not None
        assert logp.nats == pytest.approx(by_hand(tuned, candidate), abs=1e-4)
    assert found[3] == AnswerLogp(0.0, 0)  # cut off before its first token
    assert found[2] is not None
    assert found[2].n_tokens == 1  # the end token


def test_the_end_token_counts_only_where_the_answer_ended(tuned: LanguageModel) -> None:
    whole, cut = answer_logps(tuned, [answer(1, "Yes"), answer(1, "Yes", "length")])
    assert whole is not None
    assert cut is not None
    assert whole.n_tokens == cut.n_tokens + 1
    assert whole.nats < cut.nats


def test_an_answer_longer_than_the_context_is_named_not_guessed(tuned: LanguageModel) -> None:
    long = answer(5, "word " * 400)
    assert answer_logps(tuned, [long, ANSWERS[0]])[0] is None
    shift = measure_shift(tuned, [long, ANSWERS[0]], [ANSWERS[0], ANSWERS[4]])
    assert shift is not None
    assert shift.n_too_long == 1
    assert shift.kl.n_prompts == 1
    assert measure_shift(tuned, [long], [long]) is None


def test_the_shift_is_the_log_ratio_with_the_adapter_on_and_off(tuned: LanguageModel) -> None:
    own, other = ANSWERS[:2], [answer(0, "No."), answer(1, "No.")]
    shift = measure_shift(
        tuned, own, other, beta=0.5, sampling=SamplingSettings(temperature=1.0, top_p=1.0)
    )
    assert shift is not None
    with tuned.adapter_off() as base:
        off = {id(c): by_hand(base, c) for c in [*own, *other]}
    ratio = {id(c): by_hand(tuned, c) - off[id(c)] for c in [*own, *other]}
    assert any(abs(r) > 0.01 for r in ratio.values())
    assert shift.kl.value == pytest.approx(sum(ratio[id(c)] for c in own) / 2, abs=1e-4)
    assert shift.on_base_answers is not None
    assert shift.on_base_answers.value == pytest.approx(
        sum(ratio[id(c)] for c in other) / 2, abs=1e-4
    )
    n_tokens = sum(len(tokenize_candidate(tuned.tokenizer, c).answer_ids) for c in own)
    assert shift.kl_per_token == pytest.approx(2 * shift.kl.value / n_tokens)
    assert shift.reward == pytest.approx(0.5 * shift.kl.value)
    assert shift.sampled == "at temperature 1, up to 256 tokens"
    alone = measure_shift(tuned, own, beta=0.5)
    assert alone is not None
    assert alone.kl.value == pytest.approx(shift.kl.value, abs=1e-4)
    assert alone.reward_on_base_answers is None


def test_k1_over_sampled_answers_is_the_true_divergence() -> None:
    """Two known distributions over two answers a prompt."""
    torch.manual_seed(0)
    p, q = 0.8, 0.3
    draws = (torch.rand(40_000) < p).tolist()
    on = [AnswerLogp(math.log(p if hit else 1 - p), 1) for hit in draws]
    off = [AnswerLogp(math.log(q if hit else 1 - q), 1) for hit in draws]
    ids = [str(i) for i in range(len(draws))]
    shift = shift_of(on, off, ids, on[:2], off[:2], ids[:2])
    truth = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert shift is not None
    assert shift.kl.low is not None
    assert shift.kl.high is not None
    assert shift.kl.low < truth < shift.kl.high
    assert shift.kl.high - shift.kl.low < 0.05


def test_weights_that_are_no_numbers_are_an_error_and_no_adapter_too(tmp_path: Path) -> None:
    loaded = load_model(save_tiny_model(tmp_path / "tiny"), device="cpu")
    with pytest.raises(ModelError, match="no adapter"):
        measure_shift(loaded, ANSWERS[:1], ANSWERS[:1])
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        answer_logps(loaded, ANSWERS[:1])
