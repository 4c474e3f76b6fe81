"""What known families' chat templates do, and that answers begin and end where they should.

The templates are the families' own, shortened by what needs tools or images.
"""

import copy
import datetime
from pathlib import Path

import pytest

from prefopt.chat import end_token_ids, tokenize_answer, tokenize_preference, tokenize_prompt
from prefopt.errors import DataError, ModelError
from prefopt.types import Candidate, Message, Prompt
from tests.tiny_models import tiny_tokenizer

TEMPLATES = Path(__file__).parent / "templates"

# name: (BOS, end of a turn, other special tokens)
FAMILIES = {
    "qwen3": (None, "<|im_end|>", ["<|im_start|>", "<think>", "</think>"]),
    "llama3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
    ),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
    "gemma2": ("<bos>", "<end_of_turn>", ["<start_of_turn>"]),
    "gemma3": ("<bos>", "<end_of_turn>", ["<start_of_turn>"]),
    "phi3": (None, "<|end|>", ["<|user|>", "<|assistant|>", "<|system|>"]),
    "deepseek-r1": ("<|bos|>", "<|eos|>", ["<|User|>", "<|Assistant|>"]),
    "olmo": (None, "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|system|>"]),
}
USER, SYSTEM = Message("user", "How are you?"), Message("system", "Be kind.")
TURNS = [USER, Message("assistant", "I am fine."), Message("user", "And the sea?")]
TOOL = [USER, Message("assistant", "Let me look."), Message("tool", 'It says "fine".')]
CONVERSATIONS = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "several turns": TURNS,
    "system, several turns": [SYSTEM, *TURNS],
    "tool": TOOL,
    "two users": [USER, USER],
}
ALTERNATES, LEFT_OUT = "roles must alternate", "leaves message 3 .* out, a tool message"
SYSTEM_LOST = "differently once it is answered"
# What is refused, and with which words; all else is taken.
REFUSED = {
    ("mistral", "two users"): (DataError, ALTERNATES),
    ("mistral", "tool"): (DataError, "Tool call IDs"),
    # It writes the system message before the last message if that is the user's, and never else.
    ("mistral", "system"): (ModelError, SYSTEM_LOST),
    ("mistral", "system, several turns"): (ModelError, SYSTEM_LOST),
    ("gemma2", "system"): (DataError, "System role not supported"),
    ("gemma2", "system, several turns"): (DataError, "System role not supported"),
    ("gemma2", "tool"): (DataError, ALTERNATES),
    ("gemma2", "two users"): (DataError, ALTERNATES),
    ("gemma3", "tool"): (DataError, ALTERNATES),
    ("gemma3", "two users"): (DataError, ALTERNATES),
    ("phi3", "tool"): (DataError, LEFT_OUT),
    ("deepseek-r1", "tool"): (DataError, LEFT_OUT),
    ("olmo", "tool"): (DataError, LEFT_OUT),
}


def family_tokenizer(name):
    bos, end, others = FAMILIES[name]
    tokenizer = tiny_tokenizer.__wrapped__("llama")  # splits text at line breaks, as most do
    tokenizer.add_special_tokens({"additional_special_tokens": [*others, end]})
    tokenizer.add_special_tokens({"bos_token": bos} if bos else {})
    tokenizer.bos_token = bos
    tokenizer.eos_token = end if name not in ("gemma2", "gemma3", "phi3") else "<|pad|>"
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


TOKENIZERS = {name: family_tokenizer(name) for name in FAMILIES}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_begins_and_ends_where_the_template_says_or_is_refused(name, conversation):
    tokenizer, end = TOKENIZERS[name], FAMILIES[name][1]
    prompt = Prompt.from_messages(CONVERSATIONS[conversation])
    if (name, conversation) in REFUSED:
        error, words = REFUSED[name, conversation]
        with pytest.raises(error, match=words):
            tokenize_answer(tokenizer, prompt, "The sea is green.", complete=True)
        return
    answer = tokenize_answer(tokenizer, prompt, "The sea is green.", complete=True)
    whole = tokenizer.decode(answer.prompt_ids + answer.answer_ids)
    said, learned = tokenizer.decode(answer.prompt_ids), tokenizer.decode(answer.answer_ids)
    # All that was said is in the prompt, once, and none of it in the answer.
    last = prompt.messages[-1].content
    assert (last in said) or (last.replace('"', '\\"') in said)
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    space = " " if name == "mistral" else ""
    assert learned == f"{space}{thought}The sea is green.{end}"
    assert answer.answer_ids.count(tokenizer.convert_tokens_to_ids(end)) == 1
    # The ids are those of one text, which the template itself writes so.
    turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
    turns.append({"role": "assistant", "content": "The sea is green."})
    if name != "llama3":  # whose day is today's there
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        assert rendered.startswith(whole)
    bos = tokenizer.bos_token_id
    assert bos is None or (answer.prompt_ids[0], answer.prompt_ids.count(bos)) == (bos, 1)
    # Sampling stops where training taught to stop.
    assert answer.answer_ids[-1] in end_token_ids(tokenizer)
    # What is sampled after is a continuation of what is trained after.
    asked = tokenizer.decode(tokenize_prompt(tokenizer, prompt))
    hint = "<think>\n" if name == "deepseek-r1" else ""
    assert asked == said + hint


@pytest.mark.parametrize("name", FAMILIES)
def test_both_answers_of_a_pair_follow_one_prompt(name):
    tokenizer, end = TOKENIZERS[name], FAMILIES[name][1]
    prompt = Prompt.from_messages(TURNS)
    one, two = (
        Candidate(prompt=prompt, text=text, model="m", finish_reason="stop", sample_index=i)
        for i, text in enumerate(("The sea is green.", "\n\nIt is blue."))
    )
    pair = tokenize_preference(tokenizer, one, two)
    assert tokenizer.decode(pair.chosen_ids).endswith(f"The sea is green.{end}")
    assert tokenizer.decode(pair.rejected_ids).endswith(f"It is blue.{end}")
    assert "And the sea?" in tokenizer.decode(pair.prompt_ids)


def test_a_day_that_a_template_writes_is_always_the_same():
    """Else a run that is stopped before midnight goes on with other tokens after it."""
    tokenizer = TOKENIZERS["llama3"]
    assert "Today Date: 26 Jul 2024\n" in tokenizer.decode(
        tokenize_prompt(tokenizer, Prompt.from_messages([USER]))
    )
    today = datetime.datetime.now().strftime("%d %b %Y")
    assert today in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ strftime_now( '%Y-%m-%d' ) }}" + tokenizer.chat_template
    assert tokenizer.decode(tokenize_prompt(other, Prompt.from_messages([USER]))).startswith(
        "2024-07-26"
    )


def test_a_thought_that_the_template_keeps_is_trained():
    tokenizer = TOKENIZERS["qwen3"]
    thought = "<think>\nI wonder.\n</think>\n\nThe sea is green."
    answer = tokenize_answer(tokenizer, Prompt.from_messages([USER]), thought, complete=True)
    assert tokenizer.decode(answer.answer_ids) == f"{thought}<|im_end|>"


def test_a_thought_that_the_template_drops_is_refused():
    """It was judged with the answer, and would be trained without."""
    prompt = Prompt.from_messages([USER])
    with pytest.raises(ModelError, match="leaves a part out, such as a thought"):
        tokenize_answer(
            TOKENIZERS["deepseek-r1"], prompt, "I wonder.</think>It is green.", complete=True
        )
    with pytest.raises(ModelError, match="leaves a part out"):
        tokenize_answer(TOKENIZERS["qwen3"], prompt, "<think>a</think>b</think>c", complete=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[9]['content']['x'] }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].tool_calls[0].id }}",
        "{% for m in messages",
    ],
)
def test_a_template_that_fails_by_itself_is_an_error_with_its_words(template):
    tokenizer = copy.deepcopy(TOKENIZERS["phi3"])
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="refuses prompt"):
        tokenize_prompt(tokenizer, Prompt.from_messages([USER]))
