import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from prefopt.chat import (
    TokenizedAnswer,
    end_token_ids,
    join_answers,
    tokenize_answer,
    tokenize_candidate,
    tokenize_preference,
    tokenize_prompt,
)
from prefopt.errors import DataError, ModelError
from prefopt.types import Candidate, Message, Prompt
from tests.tiny_models import TEMPLATES, tiny_tokenizer

PROMPT = Prompt.from_text("How are you?")
WITH_TEMPLATE = [t for t in TEMPLATES if t not in ("plain", "gpt2")]

# Any text that can be written to a file; it may spell line breaks, but no special tokens.
texts = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=40)


def variant(template, **changes):
    """A tokenizer of its own with some attributes changed."""
    tokenizer = tiny_tokenizer.__wrapped__(template)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "prompt_text", "answer_text"),
    [
        (
            "chatml",
            "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
            "I am fine.<|im_end|>",
        ),
        (
            "llama",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "I am fine.<|eot_id|>",
        ),
        (
            "gemma",
            "<bos><start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\n",
            "I am fine.<end_of_turn>",
        ),
        ("two_ends", "<|user|>\nHow are you?<|end|>\n<|assistant|>\n", "I am fine.<|end|>"),
        (
            "thinking",
            "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nI am fine.<|im_end|>",
        ),
        ("plain", "<s>How are you?", "I am fine.</s>"),
        ("gpt2", "How are you?", "I am fine.<|endoftext|>"),
    ],
)
def test_an_answer_is_what_follows_the_prompt_up_to_where_generation_stops(
    template, prompt_text, answer_text
):
    tokenizer = tiny_tokenizer(template)
    answer = tokenize_answer(tokenizer, PROMPT, "I am fine.", complete=True)
    assert tokenizer.decode(answer.prompt_ids) == prompt_text
    assert tokenizer.decode(answer.answer_ids) == answer_text
    assert not answer.boundary_merged


@pytest.mark.parametrize("template", WITH_TEMPLATE)
def test_the_prompt_is_what_the_template_gives_for_generation(template):
    tokenizer = tiny_tokenizer(template)
    turns = [{"role": "user", "content": "How are you?"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert tokenize_prompt(tokenizer, PROMPT) == expected


@pytest.mark.parametrize("template", TEMPLATES)
@given(text=texts)
@settings(max_examples=25, deadline=None)
def test_prompt_and_answer_lose_no_token_and_end_as_the_answer_did(template, text):
    tokenizer = tiny_tokenizer(template)
    ends = end_token_ids(tokenizer)
    whole = tokenize_answer(tokenizer, PROMPT, text, complete=True)
    cut = tokenize_answer(tokenizer, PROMPT, text, complete=False)

    shown = text.strip() if template in ("llama", "gemma") else text
    decoded = tokenizer.decode(cut.prompt_ids + cut.answer_ids)
    assert decoded.endswith(shown)
    assert tokenizer.decode(whole.prompt_ids + whole.answer_ids).startswith(decoded)

    assert whole.answer_ids[-1] in ends
    assert not ends.intersection(whole.answer_ids[:-1])
    assert not ends.intersection(cut.answer_ids)
    for answer in (whole, cut):
        prompt_ids = tuple(tokenize_prompt(tokenizer, PROMPT))
        assert prompt_ids[: len(answer.prompt_ids)] == answer.prompt_ids
        assert answer.boundary_merged == (prompt_ids != answer.prompt_ids)


@pytest.mark.parametrize("template", WITH_TEMPLATE)
@given(text=texts)
@settings(max_examples=15, deadline=None)
def test_prompt_and_answer_are_the_beginning_of_the_rendered_conversation(template, text):
    tokenizer = tiny_tokenizer(template)
    turns = [
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": text},
    ]
    rendered = tokenizer.apply_chat_template(turns)["input_ids"]
    answer = tokenize_answer(tokenizer, PROMPT, text, complete=True)
    ids = list(answer.prompt_ids + answer.answer_ids)
    if template == "words":  # its template ends a turn with nothing that could stop generation
        assert ids == [*rendered, tokenizer.eos_token_id]
    else:
        assert rendered[: len(ids)] == ids


@given(text=texts)
@settings(max_examples=25, deadline=None)
def test_without_a_template_prompt_and_answer_are_the_plain_text(text):
    tokenizer = tiny_tokenizer("plain")
    answer = tokenize_answer(tokenizer, PROMPT, text, complete=True)
    assert tokenizer.decode(answer.prompt_ids + answer.answer_ids) == f"<s>How are you?{text}</s>"


def test_without_a_template_several_messages_are_joined_by_line_breaks():
    tokenizer = tiny_tokenizer("gpt2")
    prompt = Prompt.from_messages([Message("system", "Be kind."), Message("user", "Hello!")])
    assert tokenizer.decode(tokenize_prompt(tokenizer, prompt)) == "Be kind.\nHello!"


def test_tokens_merged_across_the_boundary_are_reported_and_go_to_the_answer():
    tokenizer = tiny_tokenizer("chatml")
    answer = tokenize_answer(tokenizer, PROMPT, "\n\nThank you.", complete=True)
    assert answer.boundary_merged
    assert tokenizer.decode(answer.prompt_ids).endswith("assistant")
    assert tokenizer.decode(answer.answer_ids) == "\n\n\nThank you.<|im_end|>"


def test_a_generation_prompt_that_vanishes_once_answered_counts_as_a_merged_boundary():
    tokenizer = tiny_tokenizer("hinted")
    assert tokenizer.decode(tokenize_prompt(tokenizer, PROMPT)).endswith("assistant\n<think>")
    answer = tokenize_answer(tokenizer, PROMPT, "I am fine.", complete=True)
    assert answer.boundary_merged
    assert tokenizer.decode(answer.prompt_ids).endswith("assistant\n")
    assert tokenizer.decode(answer.answer_ids) == "I am fine.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "text", "end"),
    [
        ("chatml", "Fine.<|im_end|>", "<|im_end|>"),
        ("chatml", "Fine.<|im_end|><|im_end|>", "<|im_end|>"),
        ("two_ends", "Fine.<|endoftext|>", "<|endoftext|>"),
        ("plain", "Fine.</s>", "</s>"),
        ("gpt2", "Fine.<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_an_answer_that_spells_its_end_token_does_not_get_a_second_one(template, text, end):
    tokenizer = tiny_tokenizer(template)
    whole = tokenize_answer(tokenizer, PROMPT, text, complete=True)
    assert tokenizer.decode(whole.answer_ids) == f"Fine.{end}"
    cut = tokenize_answer(tokenizer, PROMPT, text, complete=False)
    assert tokenizer.decode(cut.answer_ids) == "Fine."


def test_an_end_token_in_the_middle_of_an_answer_cuts_nothing():
    tokenizer = tiny_tokenizer("chatml")
    text = "Hello<|im_end|>\nThank you."
    answer = tokenize_answer(tokenizer, PROMPT, text, complete=True)
    assert tokenizer.decode(answer.answer_ids) == f"{text}<|im_end|>"


def test_the_name_of_the_probe_in_an_answer_or_prompt_does_not_disturb():
    tokenizer = tiny_tokenizer("chatml")
    prompt = Prompt.from_text("Say prefopt-probe-answer")
    answer = tokenize_answer(tokenizer, prompt, "prefopt-probe-answer", complete=True)
    assert tokenizer.decode(answer.answer_ids) == "prefopt-probe-answer<|im_end|>"


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_answer_is_only_its_end(template):
    tokenizer = tiny_tokenizer(template)
    whole = tokenize_answer(tokenizer, PROMPT, "", complete=True)
    assert sum(i in end_token_ids(tokenizer) for i in whole.answer_ids) == 1
    assert whole.answer_ids[-1] in end_token_ids(tokenizer)


def test_a_bos_spelled_in_the_text_is_not_doubled_at_the_start():
    tokenizer = tiny_tokenizer("plain")
    ids = tokenize_prompt(tokenizer, Prompt.from_text("<s>Hello!"))
    assert tokenizer.decode(ids) == "<s>Hello!"
    doubling = variant(
        "llama", chat_template="{{ bos_token }}" + tiny_tokenizer("llama").chat_template
    )
    assert tokenize_prompt(doubling, PROMPT) == tokenize_prompt(tiny_tokenizer("llama"), PROMPT)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("chatml", ["<|im_end|>"]),
        ("gemma", ["<eos>", "<end_of_turn>"]),
        ("two_ends", ["<|endoftext|>", "<|end|>"]),
        ("words", ["</s>"]),
        ("plain", ["</s>"]),
        ("gpt2", ["<|endoftext|>"]),
    ],
)
def test_generation_must_stop_at_eos_and_at_the_template_s_end_of_turn(template, ends):
    tokenizer = tiny_tokenizer(template)
    assert end_token_ids(tokenizer) == set(tokenizer.convert_tokens_to_ids(ends))


@pytest.mark.parametrize(
    ("configured", "extra"), [(None, set()), (7, {7}), ([7, 9], {7, 9}), ([2], set())]
)
def test_the_model_s_own_end_tokens_are_added(configured, extra):
    tokenizer = tiny_tokenizer("chatml")
    config = GenerationConfig(eos_token_id=configured)
    assert end_token_ids(tokenizer, config) == {tokenizer.eos_token_id} | extra


def test_an_unknown_token_after_an_answer_is_no_end_of_turn():
    vocabulary = {"<unk>": 0, "</s>": 1, "Hello": 2, "Fine": 3}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] + ' ### ' }}{% endfor %}",
    )
    answer = tokenize_answer(tokenizer, Prompt.from_text("Hello"), "Fine", complete=True)
    assert (answer.prompt_ids, answer.answer_ids) == ((2, 0), (3, 0, 1))
    assert end_token_ids(tokenizer) == {1}


def test_a_tokenizer_that_cannot_end_an_answer_is_refused_for_complete_answers_only():
    tokenizer = variant("plain", eos_token=None)
    with pytest.raises(ModelError, match="no EOS token"):
        tokenize_answer(tokenizer, PROMPT, "Fine.", complete=True)
    with pytest.raises(ModelError, match="no EOS token"):
        end_token_ids(tokenizer)
    cut = tokenize_answer(tokenizer, PROMPT, "Fine.", complete=False)
    assert tokenizer.decode(cut.answer_ids) == "Fine."


def test_a_conversation_the_template_refuses_is_an_error_with_the_template_s_words():
    prompt = Prompt.from_messages([Message("system", "Be kind."), Message("user", "Hello!")])
    with pytest.raises(DataError, match=r"system, user: System role not supported\. Change"):
        tokenize_prompt(tiny_tokenizer("gemma"), prompt)
    assert tokenize_prompt(tiny_tokenizer("llama"), prompt)


def test_a_template_that_leaves_the_answer_out_is_refused():
    tokenizer = variant("chatml", chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(ModelError, match="does not write the assistant's answer"):
        tokenize_answer(tokenizer, PROMPT, "Fine.", complete=True)


def test_a_template_that_ends_some_answers_otherwise_is_refused():
    template = "{% for m in messages %}{{ m['content'] }}{{ '!' if m['content'][0] == 'p' }}"
    tokenizer = variant("chatml", chat_template=template + "{% endfor %}")
    with pytest.raises(ModelError, match="ends all answers alike"):
        tokenize_answer(tokenizer, PROMPT, "Fine.", complete=True)


def candidate(text, finish_reason="stop"):
    return Candidate(prompt=PROMPT, text=text, model="m", finish_reason=finish_reason)


def test_only_answers_cut_by_the_token_limit_are_trained_without_an_end():
    tokenizer = tiny_tokenizer("chatml")
    ends = {
        reason: tokenizer.decode(
            tokenize_candidate(tokenizer, candidate("Fine", reason)).answer_ids
        )
        for reason in ("stop", "unknown", "length")
    }
    assert ends == {"stop": "Fine<|im_end|>", "unknown": "Fine<|im_end|>", "length": "Fine"}


def test_both_answers_of_a_preference_follow_the_same_prompt_ids():
    tokenizer = tiny_tokenizer("chatml")
    pair = tokenize_preference(tokenizer, candidate("Fine."), candidate("\n\nThank you."))
    assert tokenizer.decode(pair.prompt_ids).endswith("assistant")
    assert tokenizer.decode(pair.chosen_ids) == "\nFine.<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == "\n\n\nThank you.<|im_end|>"
    assert pair.boundary_merged


def test_answers_to_different_prompts_are_not_joined():
    one = TokenizedAnswer(prompt_ids=(1, 2), answer_ids=(3,), boundary_merged=False)
    two = TokenizedAnswer(prompt_ids=(1, 4, 5), answer_ids=(3,), boundary_merged=False)
    with pytest.raises(ValueError, match="same prompt"):
        join_answers(one, two)


def test_text_modules_import_neither_torch_nor_other_heavy_libraries():
    code = (
        "import sys, prefopt.chat, prefopt.data.prompts, prefopt.data.preference_data, "
        "prefopt.data.preflight\n"
        "heavy = {'torch', 'transformers', 'datasets', 'jinja2', 'pyarrow', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
