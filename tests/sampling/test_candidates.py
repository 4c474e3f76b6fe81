"""Sampling: K answers in prompt order, repeatable, resumable, refusing what cannot fit."""

import pytest
import torch

from prefopt.chat import tokenize_prompt
from prefopt.errors import DataError
from prefopt.models import load_model
from prefopt.sampling.candidates import SamplingSettings, sample_candidates
from prefopt.types import Prompt

PROMPTS = [Prompt.from_text(t) for t in ("Hi", "Why is the sky blue?", "Name a colour.", "Bye now")]
SETTINGS = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=12, batch_size=4)


def sample(model, prompts=PROMPTS, settings=SETTINGS, **options):
    options = {"k": 2, "progress": False, **options}
    return sample_candidates(prompts, model, settings=settings, **options)


def test_answers_come_in_prompt_order_k_at_a_time(tiny_model):
    found = sample(tiny_model, k=3)
    assert [c.prompt for c in found] == [p for p in PROMPTS for _ in range(3)]
    assert [c.sample_index for c in found] == [0, 1, 2] * 4
    assert {c.finish_reason for c in found} <= {"stop", "length"}
    assert all(c.n_tokens == 12 for c in found if c.finish_reason == "length")
    assert all(c.n_tokens < 12 for c in found if c.finish_reason == "stop")


def test_the_seed_decides_and_answers_to_one_prompt_differ(tiny_model):
    assert sample(tiny_model, seed=3) == sample(tiny_model, seed=3)
    assert sample(tiny_model, seed=3) != sample(tiny_model, seed=4)
    found = sample(tiny_model)
    assert any(a.text != b.text for a, b in zip(found[::2], found[1::2], strict=True))


def test_sampling_leaves_the_caller_s_random_state_alone(tiny_model):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    sample(tiny_model)
    assert torch.equal(torch.rand(3), expected)


def test_sharing_the_prompt_s_cache_and_padding_changes_no_answer(tiny_model):
    """Greedy answers in a padded batch with a shared prompt = the model's own, prompt by prompt."""
    loaded = load_model(tiny_model)
    greedy = SamplingSettings(temperature=1e-4, top_p=1.0, max_new_tokens=12, batch_size=8)
    found = sample(loaded, settings=greedy)
    for prompt, pair in zip(PROMPTS, zip(found[::2], found[1::2], strict=True), strict=True):
        ids = torch.tensor([tokenize_prompt(loaded.tokenizer, prompt)])
        with torch.no_grad():
            out = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
            )
        expected = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert [c.text for c in pair] == [expected.strip()] * 2


def test_a_killed_call_goes_on_and_ends_with_the_same_answers(tiny_model, tmp_path, monkeypatch):
    partial = tmp_path / "partial"
    undisturbed = sample(tiny_model)
    from prefopt.sampling import candidates as module

    original, calls = module._sample_chunk, []

    def killed_in_the_second_chunk(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "_sample_chunk", killed_in_the_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        sample(tiny_model, partial=partial)
    with partial.open("ab") as file:
        file.write(b'{"key": "torn in the mid')  # as a kill inside a write leaves it
    assert sample(tiny_model, partial=partial) == undisturbed
    assert len(calls) == 3  # two chunks in all: one kept, one torn, one made again
    assert sample(tiny_model, partial=partial) == undisturbed
    assert len(calls) == 3


def test_unfinished_work_with_other_settings_is_not_mixed_in(tiny_model, tmp_path):
    partial = tmp_path / "partial"
    sample(tiny_model, partial=partial, seed=1)
    assert sample(tiny_model, partial=partial, seed=2) == sample(tiny_model, seed=2)


def test_prompts_that_leave_no_room_are_all_named_before_anything_is_sampled(tiny_model):
    long = [Prompt.from_text(f"{name} " + "word " * 400) for name in ("first", "second")]
    with pytest.raises(DataError, match="2 prompt") as error:
        sample(tiny_model, prompts=[*PROMPTS, *long])
    assert "prompt 5 ('first" in str(error.value)
    assert "prompt 6 ('second" in str(error.value)
    assert "256 tokens" in str(error.value)


def test_no_prompts_and_greedy_copies_are_refused(tiny_model):
    with pytest.raises(DataError, match="no prompts"):
        sample(tiny_model, prompts=[])
    with pytest.raises(ValueError, match="all be the same"):
        sample(tiny_model, settings=SamplingSettings(temperature=0))


def test_bad_settings_are_told_all_at_once():
    with pytest.raises(ValueError, match=r"temperature.*top_p.*top_k.*max_new_tokens.*batch_size"):
        SamplingSettings(temperature=-1, top_p=0, top_k=-1, max_new_tokens=0, batch_size=0)
