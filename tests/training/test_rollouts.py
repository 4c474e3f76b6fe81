"""Sampling for PPO: the distribution that is trained, ends by position, each prompt read once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from prefopt.training.rollouts import RolloutSettings, TransformersEngine
from tests.training.ppo_cases import END, tiny_policy


def engine(model=None, **settings):
    how = {
        "max_new_tokens": 5, "temperature": 1.0, "stop_token_ids": (END,), "pad_token_id": END,
        "batch_size": 64, **settings,
    }  # fmt: skip
    return TransformersEngine(tiny_policy() if model is None else model, RolloutSettings(**how))


PROMPTS = [(8, 9, 10), (9,), (11, 8, 8, 9, 10)]


def test_answers_end_with_their_first_end_token_or_are_cut_off():
    found = engine().sample(PROMPTS, 8, seed=0)
    assert [len(group) for group in found] == [8, 8, 8]
    answers = [a for group in found for a in group]
    assert {a.ended for a in answers} == {True, False}
    for ids, ended in answers:
        assert END not in ids[:-1]
        assert (ids[-1] == END) is ended
        assert ended or len(ids) == 5


def test_without_stop_tokens_all_answers_have_the_same_length():
    model = tiny_policy()
    assert model.generation_config.eos_token_id == END  # which must not count
    found = engine(model, stop_token_ids=()).sample(PROMPTS, 16, seed=0)
    answers = [a for group in found for a in group]
    assert {len(a.ids) for a in answers} == {5}
    assert not any(a.ended for a in answers)
    assert any(END in a.ids[:-1] for a in answers)


def test_the_same_seed_gives_the_same_and_global_generators_are_left_alone():
    sampler = engine()
    before = torch.get_rng_state()
    one, two, other = (sampler.sample(PROMPTS, 4, seed=s) for s in (1, 1, 2))
    assert one == two != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_nothing_but_temperature_bends_the_distribution(temperature):
    model = tiny_policy()
    # What a checkpoint may bring along.
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, repetition_penalty=3.0, min_new_tokens=3, max_length=7
    )
    own = model.generation_config
    n = 4000
    found = engine(
        model, temperature=temperature, max_new_tokens=1, batch_size=n, stop_token_ids=()
    ).sample([(8, 9, 10)], n, seed=0)
    counts = torch.bincount(torch.tensor([a.ids[0] for a in found[0]]), minlength=12) / n
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[8, 9, 10]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    assert (counts - expected).abs().max() < 4 * (0.25 / n) ** 0.5
    assert model.generation_config is own


def test_prompts_of_unlike_lengths_together_and_apart():
    # Greedy in all but name, so that rows cannot differ by their draws.
    together = engine(temperature=1e-4).sample(PROMPTS, 3, seed=0)
    apart = engine(temperature=1e-4, batch_size=1).sample(PROMPTS, 3, seed=0)
    assert together == apart


def test_each_prompt_is_read_once():
    model, fed = tiny_policy(), []
    engine(model).sample([(8, 9)], 1, seed=0)  # finds out, once a model, how it can be run
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    engine(model, max_new_tokens=3, stop_token_ids=()).sample([(8, 9, 10, 11)], 5, seed=0)
    assert fed == [3, 5, 5, 5]  # the prompt but for its last token, and then a token an answer


def test_the_active_adapter_samples_and_the_model_is_left_as_it_was():
    model = get_peft_model(tiny_policy(), LoraConfig(r=4, target_modules="all-linear"))
    base = engine(temperature=1e-4).sample(PROMPTS, 1, seed=0)
    model.train()
    assert engine(model, temperature=1e-4).sample(PROMPTS, 1, seed=0) == base
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=1.0)
    assert engine(model, temperature=1e-4).sample(PROMPTS, 1, seed=0) != base
    assert model.training
    assert all(m.training for m in model.modules())
