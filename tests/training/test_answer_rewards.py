"""What becomes a score: a reward model's own ids, texts for another tokenizer, a function, a judge."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.errors import TrainingError
from prefopt.judges import Judge, load_judge
from prefopt.training.answer_rewards import SampledBatch, reward_source
from prefopt.training.reward_model import RewardModel
from prefopt.types import Prompt, Verdict
from tests.tiny_models import tiny_tokenizer

TEXTS = ["a long answer", "short", "a long answer"]


def batch(tokenizer=None, prompt=None, prompt_of=(0, 0, 0), **changes):
    tokenizer = tokenizer or tiny_tokenizer()
    prompt = prompt or Prompt.from_text("Say")
    n = max(prompt_of) + 1
    ids = [(*tokenizer(t)["input_ids"], tokenizer.eos_token_id) for t in TEXTS]
    return SampledBatch(
        **{
            "prompts": [prompt] * n, "prompt_ids": [(40, 41)] * n, "rows": [{"gold": 7}] * n,
            "prompt_of": list(prompt_of), "answer_ids": ids, "ended": [True, True, False],
            "tokenizer": tokenizer, **changes,
        }
    )  # fmt: skip


def reward_model(template="chatml"):
    tokenizer = tiny_tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return RewardModel.new(LlamaForCausalLM(config), tokenizer, seed=1)


def test_a_reward_model_reads_the_ids_that_were_sampled():
    reward, asked = reward_model(), batch(prompt_of=(0, 1, 1))
    scores = reward_source(reward, tiny_tokenizer())(asked)
    assert scores == pytest.approx(reward.score_trees(asked.trees()).tolist())
    assert scores[0] == pytest.approx(scores[2], abs=1e-6)  # the same answer to the same prompt


def test_a_reward_model_with_another_tokenizer_reads_texts():
    reward = reward_model("llama")
    scores = reward_source(reward, tiny_tokenizer())(batch())
    expected = reward.score([Prompt.from_text("Say")], [TEXTS])
    assert scores == pytest.approx(expected[0])
    with pytest.raises(TrainingError, match="token ids only"):
        reward_source(reward, tiny_tokenizer())(batch(prompts=[None]))


def test_a_function_gets_what_it_takes():
    seen = {}

    def some(prompts, answers, rows, ended):
        seen.update(prompts=prompts, answers=answers, rows=rows, ended=ended)
        return [1, None, 2.5]

    def every(prompts, answers, **known):
        seen.update(known)
        return [0.0] * 3

    assert reward_source(some, None)(batch()) == [1.0, None, 2.5]
    assert seen["answers"] == TEXTS
    assert [p.text for p in seen["prompts"]] == ["Say"] * 3
    assert seen["rows"] == [{"gold": 7}] * 3
    assert seen["ended"] == [True, True, False]
    reward_source(every, None)(batch(prompts=[None]))
    assert seen["prompt_ids"] == [(40, 41)] * 3


def test_prompts_known_as_ids_only_are_given_as_ids():
    asked = batch(prompts=[None])
    reward_source(lambda p, a: [float(p == [(40, 41)] * 3)] * 3, None)(asked)


def test_a_judges_score_is_the_share_of_comparisons_won():
    source = reward_source(load_judge("scripted:shortest"), None)
    # Equal answers are not asked about.
    assert source(batch()) == [0.25, 1.0, 0.25]


def test_a_judge_that_fails_gives_no_score():
    class Fails(Judge):
        name = "fails"

        def verdicts(self, comparisons):
            for i, _ in enumerate(comparisons):
                yield i, Verdict(preferred=None, failure="refused", judge=self.name)

    assert reward_source(Fails(), None)(batch(prompt_of=(0, 0, 1))) == [None, None, None]
    # The two equal answers tie without being asked.
    assert reward_source(Fails(), None)(batch()) == [0.5, None, 0.5]


def test_what_is_no_reward():
    with pytest.raises(TypeError, match="must be a RewardModel, a function or a Judge"):
        reward_source(3.0, None)
