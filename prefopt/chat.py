"""Conversations -> token ids: the only place that knows chat templates, boundaries, BOS and EOS.

In: a tokenizer, a `Prompt` and an answer's text. Out: the ids a model sees (`prompt_ids`) and the
ids it is trained to say (`answer_ids`); together they are always one tokenization of one text.
Imports no torch; knows nothing of padding, masks, batches or truncation.

A tokenizer without a chat template is a plain text model: its prompt is the texts of the messages
joined by line breaks (for one message, just its text), and the answer follows without anything
between, so a completion brings its own leading space.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from prefopt.errors import DataError, ModelError
from prefopt.types import Candidate, Message, Prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# Stands in for an answer to learn what a template writes after one. No whitespace, so that
# templates that trim it leave it alone.
_PROBE = "prefopt-probe-answer"

# Some templates write today's date. With another every day a run that was stopped would not go on with
# the same tokens tomorrow, so they get one day always: that of Llama 3's own default.
_DAY = datetime.datetime(2024, 7, 26)
_TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")


class TokenizedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer as a model is trained on it.

    `prompt_ids + answer_ids` is the tokenization of the whole. `boundary_merged` says that the
    prompt alone tokenizes differently at its end (a token spans the boundary, or the template
    writes the prompt differently once it is answered); the answer then starts where they diverge.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    boundary_merged: bool


class TokenizedPreference(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and two answers, tokenized so that both follow exactly the same `prompt_ids`."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    boundary_merged: bool


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The ids after which a model's answer begins, generation prompt included.

    Raises:
        DataError: the chat template refuses the conversation (for example a system message), or
            leaves a message out.
    """
    return _encode(tokenizer, _prompt_text(tokenizer, prompt))


def tokenize_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer_text: str, *, complete: bool
) -> TokenizedAnswer:
    """Tokenize the conversation with its answer and split it where the prompt ends.

    Method. The template is rendered with the answer, and once more with a probe in its place; what
    follows the probe is the text the template writes after any answer. Without that ending the
    conversation is tokenized to the *body*, with it to the *whole*; the ids of the whole after
    their common beginning are the ending's. No token id is searched for in the answer itself, so
    an answer that spells a special token is not cut there.

    The end token is the first of the ending's ids that is EOS or another special token (Gemma ends
    a turn with <end_of_turn>, not with its EOS): what follows it, such as the line break ChatML
    templates write, comes after generation would have stopped and is left out.

    Args:
        tokenizer: any `transformers` tokenizer, with or without a chat template.
        prompt: the conversation so far.
        answer_text: the assistant's turn.
        complete: whether the answer ends here. If so the ids end in exactly one end token (EOS is
            appended where the template writes none). If not (`finish_reason == "length"`) they end
            in none, so that training never teaches that a cut answer is finished.

    Raises:
        DataError: the chat template refuses the conversation.
        ModelError: the template does not show the answer, leaves out a part of it, or writes what is
            before it differently once it is there; or there is no end token at all.
    """
    prompt_text = _prompt_text(tokenizer, prompt)
    prompt_ids = _encode(tokenizer, prompt_text)
    body_text, ending_text = _render_answer(tokenizer, prompt, answer_text)
    _check_prompt_stays(tokenizer, prompt, prompt_text, body_text)
    body = _encode(tokenizer, body_text)
    whole = _encode(tokenizer, body_text + ending_text)
    ending = whole[_shared_length(body, whole) :]
    ends = _end_tokens(tokenizer, ending)
    if complete:
        if not ends:
            raise ModelError(_NO_END)
        stop = next((i for i, token in enumerate(ending, start=1) if token in ends), None)
        body_length = len(whole) - len(ending)
        ids = [*whole, _eos(tokenizer)] if stop is None else whole[: body_length + stop]
    else:
        ids = body
    boundary = _shared_length(prompt_ids, ids)
    answer = ids[boundary:]
    # An answer may itself spell the end token, as data sets made from rendered text do.
    trailing = 0
    while trailing < len(answer) and answer[-1 - trailing] in ends:
        trailing += 1
    surplus = trailing - (1 if complete else 0)
    if surplus > 0:
        answer = answer[:-surplus]
    return TokenizedAnswer(
        prompt_ids=tuple(ids[:boundary]),
        answer_ids=tuple(answer),
        boundary_merged=boundary < len(prompt_ids),
    )


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenizedAnswer:
    """Tokenize plain text outside any conversation, all of it to be learned but its first token.

    `prompt_ids` is that token, since nothing is before it that would predict it: BOS where the
    tokenizer puts one in front of texts. No end token is added: a text is an excerpt.

    Raises:
        DataError: the text has no token that could be predicted.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids = _with_bos(tokenizer, ids)
    if len(ids) < 2:
        raise DataError(f"the text {text!r:.40} has no token that could be predicted.")
    return TokenizedAnswer(prompt_ids=(ids[0],), answer_ids=tuple(ids[1:]), boundary_merged=False)


def tokenize_candidate(tokenizer: PreTrainedTokenizerBase, candidate: Candidate) -> TokenizedAnswer:
    """`tokenize_answer` for a candidate; one that ended for an unknown reason counts as complete.

    Raises DataError and ModelError as `tokenize_answer` does.
    """
    return tokenize_answer(
        tokenizer,
        candidate.prompt,
        candidate.text,
        complete=candidate.finish_reason != "length",
    )


def join_answers(chosen: TokenizedAnswer, rejected: TokenizedAnswer) -> TokenizedPreference:
    """Put two answers to the same prompt behind the beginning that their `prompt_ids` share.

    Raises ValueError when they answer different prompts.
    """
    shorter, longer = sorted((chosen.prompt_ids, rejected.prompt_ids), key=len)
    if longer[: len(shorter)] != shorter:
        raise ValueError("the two answers must be to the same prompt; their prompt_ids differ.")
    n = len(shorter)
    return TokenizedPreference(
        prompt_ids=shorter,
        chosen_ids=chosen.prompt_ids[n:] + chosen.answer_ids,
        rejected_ids=rejected.prompt_ids[n:] + rejected.answer_ids,
        boundary_merged=chosen.boundary_merged or rejected.boundary_merged,
    )


def tokenize_preference(
    tokenizer: PreTrainedTokenizerBase, chosen: Candidate, rejected: Candidate
) -> TokenizedPreference:
    """Tokenize two candidates for one prompt; raises as `tokenize_answer` does."""
    return join_answers(
        tokenize_candidate(tokenizer, chosen), tokenize_candidate(tokenizer, rejected)
    )


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, model_generation_config: GenerationConfig | None = None
) -> set[int]:
    """The ids at which generation must stop.

    They are the tokenizer's EOS, the model's own end ids (`generation_config.eos_token_id`, one or
    several) and the token with which the chat template ends an assistant's turn: the one that
    `tokenize_answer` teaches.

    Raises:
        ModelError: there is none.
    """
    configured = getattr(model_generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple | set) else [configured]
    ends = {int(token) for token in several if token is not None}
    ending: list[int] = []
    if _has_template(tokenizer):
        ending = _encode(tokenizer, _ending_text(tokenizer, Prompt.from_text("Hello")))
    ends |= _end_tokens(tokenizer, ending)
    if not ends:
        raise ModelError(_NO_END)
    return ends


def ids_after_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a chat template writes after an answer's end token, such as ChatML's line break."""
    if not _has_template(tokenizer):
        return []
    ending = _encode(tokenizer, _ending_text(tokenizer, Prompt.from_text("Hello")))
    ends = _end_tokens(tokenizer, ending)
    stop = next((i for i, token in enumerate(ending, start=1) if token in ends), len(ending))
    return ending[stop:]


_NO_END = (
    "the tokenizer has no EOS token and its chat template ends a turn with no special token, so a "
    "model could not be taught to stop. Set `tokenizer.eos_token`."
)


def _has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _plain_text(prompt: Prompt) -> str:
    return "\n".join(message.content for message in prompt.messages)


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """What a model reads before it answers."""
    if not _has_template(tokenizer):
        return _plain_text(prompt)
    text = _render(tokenizer, prompt, prompt.messages, add_generation_prompt=True)
    written = _squeezed(text)
    for number, message in enumerate(prompt.messages):
        if message.role == "assistant" or _squeezed(message.content) in written:
            continue
        # Not there word for word: perhaps quoted, perhaps not at all.
        other = [*prompt.messages]
        other[number] = Message(message.role, _PROBE)
        if _render(tokenizer, prompt, other, add_generation_prompt=True) == text:
            raise DataError(
                f"the chat template leaves message {number + 1} of prompt {prompt.prompt_id} out, a "
                f"{message.role} message: {message.content!r:.60}. The model would never see it. Put "
                "its text into a user message."
            )
    return text


def _render_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer_text: str
) -> tuple[str, str]:
    """The conversation up to the answer's last character, and what the template writes after."""
    if not _has_template(tokenizer):
        return _plain_text(prompt) + answer_text, ""
    ending = _ending_text(tokenizer, prompt)
    turns = [*prompt.messages, Message("assistant", answer_text)]
    whole = _render(tokenizer, prompt, turns)
    if not whole.endswith(ending):
        raise ModelError(
            f"the chat template ends the answer {answer_text!r:.60} to prompt {prompt.prompt_id} "
            f"with {whole[-30:]!r}, but others with {ending!r}, so the answer's end cannot be "
            "found. Set `tokenizer.chat_template` to one that ends all answers alike."
        )
    body = whole.removesuffix(ending)
    if not _squeezed(body).endswith(_squeezed(answer_text)):
        raise ModelError(
            f"the chat template writes the answer {answer_text!r:.60} to prompt {prompt.prompt_id} as "
            f"{body[-60:]!r}: it leaves a part out, such as a thought, so another answer would be "
            "trained than was judged. Take that part out of the answers, or set "
            "`tokenizer.chat_template` to one that keeps it."
        )
    return body, ending


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim and add."""
    return "".join(text.split())


def _check_prompt_stays(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, asked: str, answered: str
) -> None:
    """Raise ModelError if the conversation before the answer is another once there is an answer.

    What a generation prompt adds may go; what was said before may not, since all from the first
    difference on counts as the answer.
    """
    shared = _shared_length(asked, answered)
    if shared == len(asked):
        return
    said = _render(tokenizer, prompt, prompt.messages)
    until = _shared_length(asked, said)  # where the generation prompt begins
    if asked[shared:until].strip():
        raise ModelError(
            f"the chat template writes prompt {prompt.prompt_id} differently once it is answered, "
            f"from {asked[shared : shared + 40]!r} on, so what was said before would be trained as "
            "part of the answer. Put a system message's text into the first user message, or set "
            "`tokenizer.chat_template` to one that leaves the conversation as it is."
        )


def _ending_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    probe = _render(tokenizer, prompt, [*prompt.messages, Message("assistant", _PROBE)])
    _, found, ending = probe.rpartition(_PROBE)
    if not found:
        raise ModelError(
            "the chat template does not write the assistant's answer into the conversation; it "
            "cannot be used for training. Set `tokenizer.chat_template` to one that does."
        )
    return ending


def _render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            turns,
            chat_template=_on_one_day(tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    # A template is a program: it may add a text to a list, or call itself without end.
    except (
        TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
        ValueError,
    ) as error:  # fmt: skip
        raise DataError(
            f"the chat template refuses prompt {prompt.prompt_id} with the roles "
            f"{', '.join(m.role for m in messages)}: {error}. Change the messages to fit the model "
            "(for a refused system message: put its text into the first user message)."
        ) from error
    return text


@functools.cache
def _on_one_day(template: str) -> str:
    """The template with the day in place of the function that tells today's."""
    return _TODAY.sub(lambda match: repr(_DAY.strftime(match[2])), template)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with at most one BOS in front.

    A chat template writes its own BOS, so none is added there; plain text gets the one that the
    tokenizer would add, which is asked for with an empty text so that no EOS comes along.
    """
    ids: list[int] = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not _has_template(tokenizer):
        ids = _with_bos(tokenizer, ids)
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids with the BOS that the tokenizer would put in front of them, if it would."""
    bos = tokenizer.bos_token_id
    added = tokenizer("", add_special_tokens=True)["input_ids"]
    return [bos, *ids] if bos is not None and added[:1] == [bos] else ids


def _end_tokens(tokenizer: PreTrainedTokenizerBase, ending: Sequence[int]) -> set[int]:
    """EOS and the first special token of what a template writes after an answer."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    # An unknown token is no ending, nor is a BOS that opens the next turn.
    special -= {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    eos: set[Any] = {tokenizer.eos_token_id} - {None}
    special |= eos
    first = next((token for token in ending if token in special), None)
    return eos if first is None else eos | {first}


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.eos_token_id)


def _shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many ids or characters two sequences share from the beginning."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
