"""Sampling: K answers in prompt order, repeatable, resumable, refusing what cannot fit."""

import pytest
import torch

from prefopt.chat import tokenize_prompt
from prefopt.errors import DataError, ModelError
from prefopt.models import load_model
from prefopt.sampling.candidates import SamplingSettings, sample_candidates
from prefopt.sampling.decoding import Decoder
from prefopt.types import Prompt
from tests.tiny_models import save_tiny_model

PROMPTS = [Prompt.from_text(t) for t in ("Hi", "Why is the sky blue?", "Name a colour.", "Bye now")]
SETTINGS = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=12, batch_size=4)


def sample(model, prompts=PROMPTS, settings=SETTINGS, **options):
    options = {"k": 2, "progress": False, **options}
    return sample_candidates(prompts, model, settings=settings, **options)


def with_settings(**changed):
    return SamplingSettings(
        **{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "batch_size": 4, **changed}
    )


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_model(tiny_model)


def test_answers_come_in_prompt_order_k_at_a_time(loaded):
    found = sample(loaded, k=3)
    assert [c.prompt for c in found] == [p for p in PROMPTS for _ in range(3)]
    assert [c.sample_index for c in found] == [0, 1, 2] * 4
    assert {c.finish_reason for c in found} <= {"stop", "length"}
    assert all(c.n_tokens == 12 for c in found if c.finish_reason == "length")
    assert all(c.n_tokens < 12 for c in found if c.finish_reason == "stop")


def test_the_seed_decides_and_answers_to_one_prompt_differ(loaded):
    assert sample(loaded, seed=3) == sample(loaded, seed=3)
    assert sample(loaded, seed=3) != sample(loaded, seed=4)
    found = sample(loaded)
    assert any(a.text != b.text for a, b in zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}], ids=lambda s: next(iter(s))
)
def test_an_answer_depends_on_its_prompt_and_number_and_not_on_its_neighbours(loaded, settings):
    expected = sample(loaded, k=4, settings=with_settings(batch_size=64, **settings))
    for batch_size in (1, 3):
        assert (
            sample(loaded, k=4, settings=with_settings(batch_size=batch_size, **settings))
            == expected
        )
    assert sample(loaded, k=4, settings=with_settings(batch_tokens=90, **settings)) == expected
    backwards = sample(loaded, PROMPTS[::-1], k=4, settings=with_settings(**settings))
    assert [c for i in (12, 8, 4, 0) for c in backwards[i : i + 4]] == expected
    alone = sample(loaded, PROMPTS[2:3], k=2, settings=with_settings(**settings))
    assert alone == expected[8:10]


def test_sampling_leaves_the_caller_s_random_state_alone(loaded):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    sample(loaded)
    assert torch.equal(torch.rand(3), expected)


def test_greedy_answers_are_those_of_generate_token_by_token(loaded):
    found = sample(loaded, k=1, settings=with_settings(temperature=0))
    for prompt, candidate in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([tokenize_prompt(loaded.tokenizer, prompt)])
        with torch.no_grad():
            out = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
            )
        expected = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert candidate.text == expected.strip()


class Killed(BaseException):
    pass


def test_a_killed_call_goes_on_and_ends_with_the_same_answers(loaded, tmp_path, monkeypatch):
    partial = tmp_path / "partial"
    prompts = [Prompt.from_text(f"Prompt {i}") for i in range(40)]
    settings = with_settings(batch_size=4, max_new_tokens=3)
    undisturbed = sample(loaded, prompts, settings)
    original, calls = Decoder.answers, []

    def killed_in_the_second_batch(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(Decoder, "answers", killed_in_the_second_batch)
    with pytest.raises(Killed):
        sample(loaded, prompts, settings, partial=partial)
    with partial.open("ab") as file:
        file.write(b'{"key": "torn in the mid')  # as a kill inside a write leaves it
    assert sample(loaded, prompts, settings, partial=partial) == undisturbed
    assert len(calls) == 4  # three batches in all: one kept, one killed and made again, one more
    assert sample(loaded, prompts, settings, partial=partial) == undisturbed
    assert len(calls) == 4


def test_unfinished_work_with_other_settings_is_not_mixed_in(loaded, tmp_path):
    partial = tmp_path / "partial"
    sample(loaded, partial=partial, seed=1)
    assert sample(loaded, partial=partial, seed=2) == sample(loaded, seed=2)


def test_a_damaged_line_of_the_partial_file_is_told_and_sampled_again(loaded, tmp_path, caplog):
    partial = tmp_path / "partial"
    undisturbed = sample(loaded, k=2, partial=partial)
    content = partial.read_bytes()
    assert b'"sample_index":1' in content
    partial.write_bytes(content.replace(b'"sample_index":1', b'"sample_index":7', 1))
    assert sample(loaded, k=2, partial=partial) == undisturbed
    assert f"{partial} was edited or damaged" in caplog.text
    assert partial.read_bytes() == content


def test_a_partial_file_that_cannot_be_kept_is_told_before_anything_is_sampled(
    loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(Decoder, "answers", None)
    for path in (tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(DataError, match=str(path)):
            sample(loaded, partial=path)


def test_several_models_fill_one_pool(loaded, tmp_path):
    other = load_model(save_tiny_model(tmp_path / "other", seed=1))
    pool = sample([loaded, other], partial=tmp_path / "partial")
    assert [c.prompt for c in pool] == [p for p in PROMPTS for _ in range(4)]
    assert [c.model for c in pool] == [loaded.name, loaded.name, other.name, other.name] * 4
    for name, model in ((loaded.name, loaded), (other.name, other)):
        assert [c for c in pool if c.model == name] == sample(model)
    with pytest.raises(ValueError, match="could not be told apart"):
        sample([loaded, loaded])
    with pytest.raises(ValueError, match="at least one model"):
        sample([])
    with pytest.raises(ValueError, match="adapter goes with one model"):
        sample([loaded, other], adapter="somewhere")


def test_prompts_that_leave_no_room_are_all_named_before_anything_is_sampled(loaded):
    long = [Prompt.from_text(f"{name} " + "word " * 400) for name in ("first", "second")]
    with pytest.raises(DataError, match="2 prompt") as error:
        sample(loaded, prompts=[*PROMPTS, *long])
    assert "prompt 5 ('first" in str(error.value)
    assert "prompt 6 ('second" in str(error.value)
    assert "256 tokens" in str(error.value)


def test_a_model_of_no_numbers_is_told(tmp_path):
    broken = load_model(save_tiny_model(tmp_path / "broken"))
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        sample(broken)


def test_what_a_checkpoint_asks_for_beside_the_settings_is_told_and_not_applied(loaded, caplog):
    expected = sample(loaded)
    loaded.model.generation_config.repetition_penalty = 5.0
    try:
        assert sample(loaded) == expected
    finally:
        loaded.model.generation_config.repetition_penalty = None
    assert "repetition_penalty=5.0" in caplog.text


def test_no_prompts_and_greedy_copies_are_refused(tiny_model):
    with pytest.raises(DataError, match="no prompts"):
        sample(tiny_model, prompts=[])
    with pytest.raises(ValueError, match="all be the same"):
        sample(tiny_model, settings=SamplingSettings(temperature=0))
    with pytest.raises(ValueError, match="at least 1"):
        sample(tiny_model, k=0)


def test_bad_settings_are_told_all_at_once():
    with pytest.raises(
        ValueError,
        match=r"temperature.*top_p.*top_k.*max_new_tokens.*batch_size.*min_p.*batch_tokens",
    ):
        SamplingSettings(
            temperature=float("nan"), top_p=0, top_k=-1, max_new_tokens=0, batch_size=0, min_p=1,
            batch_tokens=0,
        )  # fmt: skip
