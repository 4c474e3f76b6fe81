"""The more likely answer wins: order-free, the same numbers in any batch, failures said."""

import math

import pytest
import torch

from prefopt.chat import tokenize_answer
from prefopt.judges import judge_comparisons
from prefopt.judges.likelihood import LogLikelihoodJudge
from prefopt.judges.local import LocalJudge
from prefopt.models import load_model
from prefopt.types import Candidate, Comparison, Prompt
from tests.tiny_models import save_tiny_model


def pair(a, b, i=0):
    prompt = Prompt.from_text(f"What is {i}?")
    return Comparison(
        a=Candidate(prompt=prompt, text=a, model="m"),
        b=Candidate(prompt=prompt, text=b, model="m", sample_index=1),
    )


def test_it_is_the_models_own_mean_log_probability(tiny_model):
    import torch

    loaded = load_model(tiny_model)
    item = pair("yes it is", "no")
    (judged,) = judge_comparisons([item], LogLikelihoodJudge(tiny_model), progress=False)

    def score(answer):
        tokens = tokenize_answer(loaded.tokenizer, answer.prompt, answer.text, complete=True)
        ids = torch.tensor([[*tokens.prompt_ids, *tokens.answer_ids]])  # (1, T)
        with torch.inference_mode():
            logps = loaded.model(input_ids=ids).logits.float().log_softmax(-1)
        n = len(tokens.prompt_ids)
        own = [logps[0, t - 1, ids[0, t]].item() for t in range(n, ids.shape[1])]
        return sum(own) / len(own)

    gap = score(item.a) - score(item.b)
    assert judged.forward.p_a == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-5)
    assert judged.forward.grade == judged.backward.grade
    assert not judged.flipped


def test_batches_change_nothing(tiny_model):
    items = [pair("word " * (i % 5 + 1), "other " * (i % 3 + 1), i) for i in range(12)]
    one, many = (
        [
            verdict.p_a
            for _, verdict in sorted(
                LogLikelihoodJudge(tiny_model, batch_size=n).verdicts(items), key=lambda x: x[0]
            )
        ]
        for n in (1, 7)
    )
    assert one == pytest.approx(many, abs=1e-5)


def test_empty_and_too_long_answers_are_failures_not_losers(tiny_model):
    items = [pair("", "fine"), pair("word " * 100_000, "fine", 1)]
    found = dict(LogLikelihoodJudge(tiny_model).verdicts(items))
    assert [found[i].failure for i in range(2)] == ["empty", "too_long"]


@pytest.mark.parametrize("kind", [LogLikelihoodJudge, LocalJudge])
def test_a_model_with_broken_weights_prefers_nobody(tmp_path, kind):
    loaded = load_model(save_tiny_model(tmp_path / "tiny", context=4096))
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    (found,) = dict(kind(loaded).verdicts([pair("a b", "c")])).values()
    assert (found.failure, found.preferred) == ("not_finite", None)


@pytest.mark.parametrize("kind", [LogLikelihoodJudge, LocalJudge])
def test_the_verdicts_are_found_again_after_the_model_was_loaded(tiny_model, tmp_path, kind):
    judge = kind(tiny_model)
    before = judge.fingerprint
    first = judge_comparisons([pair("a b", "c")], judge, ledger=tmp_path / "l", progress=False)
    assert judge.fingerprint == before
    again = judge_comparisons(
        [pair("a b", "c")], kind(tiny_model), ledger=tmp_path / "l", progress=False
    )
    assert again == first
