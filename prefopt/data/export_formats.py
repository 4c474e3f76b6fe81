"""How a preference is written for each training stack: its row, its rules, its limits.

A row is a strict type of its own for every stack, made from a prompt and two answers, and read back
into a conversation, on which the stack's rules are checked: roles, order, empty texts, reserved
words. `Format.source` names the documentation that each was written from. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from prefopt.types import Message

FormatName = Literal[
    "sft", "trl", "trl-text", "axolotl", "llama-factory", "openai-sft", "openai-preference",
    "bedrock-claude", "bedrock-llama", "bedrock-nova", "nova-preference",
]  # fmt: skip
"""The names of the formats."""


class Conversation(NamedTuple):
    """What a row says: the turns of the prompt, and the answers to it, the preferred one first."""

    turns: tuple[Message, ...]
    answers: tuple[Message, ...]


class Format(NamedTuple):
    """One stack's form of a preference, or of an example to imitate.

    `make(turns, chosen, rejected)` gives a row, or raises ValueError where the stack has no form for
    it; `read` is its inverse. Sizes are those that the stack states; None where it states none.
    `max_characters` counts a row's texts together. `alternates`: after one system message at most,
    user and assistant take turns.
    """

    name: str
    kind: Literal["preference", "sft"]
    row: type[msgspec.Struct]
    make: Callable[[tuple[Message, ...], str, str], msgspec.Struct]
    read: Callable[[Any], Conversation]
    source: str
    roles: tuple[str, ...] = ("system", "user", "assistant")
    alternates: bool = False
    empty_texts: bool = False
    reserved: tuple[str, ...] = ()
    min_rows: int = 1
    max_rows: int | None = None
    max_file_bytes: int | None = None
    max_characters: int | None = None


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


def _assistant(text: str) -> Message:
    return Message("assistant", text)


# --- Chat messages, TRL, Axolotl -------------------------------------------------------------------


class ChatRow(_Row, frozen=True):
    """An example to imitate: a conversation that ends with the answer."""

    messages: tuple[Message, ...]


class TRLRow(_Row, frozen=True):
    """TRL's conversational preference format with an explicit prompt."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


class TRLTextRow(_Row, frozen=True):
    """TRL's standard preference format: three texts."""

    prompt: str
    chosen: str
    rejected: str


class AxolotlRow(_Row, frozen=True):
    """What Axolotl's `chat_template.default` reads with its default field names."""

    messages: tuple[Message, ...]
    chosen: Message
    rejected: Message


def _make_chat(turns: tuple[Message, ...], chosen: str, rejected: str) -> ChatRow:
    return ChatRow((*turns, _assistant(chosen)))


def _read_chat(row: ChatRow) -> Conversation:
    return Conversation(row.messages[:-1], row.messages[-1:])


def _make_trl(turns: tuple[Message, ...], chosen: str, rejected: str) -> TRLRow:
    return TRLRow(turns, (_assistant(chosen),), (_assistant(rejected),))


def _read_trl(row: TRLRow) -> Conversation:
    return Conversation(row.prompt, (*row.chosen, *row.rejected))


def _make_trl_text(turns: tuple[Message, ...], chosen: str, rejected: str) -> TRLTextRow:
    if len(turns) != 1 or turns[0].role != "user":
        roles = ", ".join(turn.role for turn in turns)
        raise ValueError(f"a plain text has no roles, and the prompt has {roles}; use trl")
    return TRLTextRow(turns[0].content, chosen, rejected)


def _read_trl_text(row: TRLTextRow) -> Conversation:
    return Conversation(
        (Message("user", row.prompt),), (_assistant(row.chosen), _assistant(row.rejected))
    )


def _make_axolotl(turns: tuple[Message, ...], chosen: str, rejected: str) -> AxolotlRow:
    return AxolotlRow(turns, _assistant(chosen), _assistant(rejected))


def _read_axolotl(row: AxolotlRow) -> Conversation:
    return Conversation(row.messages, (row.chosen, row.rejected))


# --- LLaMA-Factory -----------------------------------------------------------------------------------


class SharegptTurn(_Row, frozen=True):
    """A turn in sharegpt's words."""

    speaker: Literal["system", "human", "gpt"] = msgspec.field(name="from")
    value: str


class SharegptRow(_Row, frozen=True):
    """LLaMA-Factory's preference row in sharegpt form."""

    conversations: tuple[SharegptTurn, ...]
    chosen: SharegptTurn
    rejected: SharegptTurn


_TO_SHAREGPT: dict[str, Literal["system", "human", "gpt"]] = {
    "system": "system",
    "user": "human",
    "assistant": "gpt",
}
_FROM_SHAREGPT: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
}


def _make_sharegpt(turns: tuple[Message, ...], chosen: str, rejected: str) -> SharegptRow:
    if any(turn.role == "tool" for turn in turns):
        raise ValueError("has a tool message, which needs the function call that it answers")
    return SharegptRow(
        tuple(SharegptTurn(_TO_SHAREGPT[turn.role], turn.content) for turn in turns),
        SharegptTurn("gpt", chosen),
        SharegptTurn("gpt", rejected),
    )


def _read_sharegpt(row: SharegptRow) -> Conversation:
    def plain(turn: SharegptTurn) -> Message:
        return Message(_FROM_SHAREGPT[turn.speaker], turn.value)

    return Conversation(
        tuple(plain(turn) for turn in row.conversations), (plain(row.chosen), plain(row.rejected))
    )


def llama_factory_entry(file_name: str) -> dict[str, Any]:
    """What `dataset_info.json` says of a file in `SharegptRow`s."""
    return {
        "file_name": file_name,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        "tags": {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "system_tag": "system",
        },
    }


# --- OpenAI ------------------------------------------------------------------------------------------


class OpenAIInput(_Row, frozen=True):
    """The prompt of a preference."""

    messages: tuple[Message, ...]


class OpenAIPreferenceRow(_Row, frozen=True):
    """A row of OpenAI's preference fine-tuning."""

    input: OpenAIInput
    preferred_output: tuple[Message, ...]
    non_preferred_output: tuple[Message, ...]


def _make_openai(turns: tuple[Message, ...], chosen: str, rejected: str) -> OpenAIPreferenceRow:
    return OpenAIPreferenceRow(OpenAIInput(turns), (_assistant(chosen),), (_assistant(rejected),))


def _read_openai(row: OpenAIPreferenceRow) -> Conversation:
    return Conversation(row.input.messages, (*row.preferred_output, *row.non_preferred_output))


# --- Amazon Bedrock and Nova -------------------------------------------------------------------------


class ClaudeRow(_Row, frozen=True, kw_only=True):
    """A row for fine-tuning Claude on Amazon Bedrock."""

    system: str | UnsetType = UNSET
    messages: tuple[Message, ...]


class ConverseText(_Row, frozen=True):
    """A block of content that is a text."""

    text: str


class ConverseTurn(_Row, frozen=True):
    """A turn as Bedrock's Converse API writes it."""

    role: Literal["user", "assistant"]
    content: tuple[ConverseText, ...]


class ConverseRow(_Row, frozen=True, kw_only=True):
    """A row for fine-tuning models that Bedrock serves by its Converse API: Nova, Llama 3.2, 3.3."""

    schemaVersion: Literal["bedrock-conversation-2024"] = "bedrock-conversation-2024"
    system: tuple[ConverseText, ...] | UnsetType = UNSET
    messages: tuple[ConverseTurn, ...]


class NovaCandidate(_Row, frozen=True):
    """One of the two answers."""

    content: tuple[ConverseText, ...]
    preferenceLabel: Literal["preferred", "non-preferred"]


class NovaTurn(_Row, frozen=True, kw_only=True):
    """A turn that has content, or the last one, which has the candidates instead."""

    role: Literal["user", "assistant"]
    content: tuple[ConverseText, ...] | UnsetType = UNSET
    candidates: tuple[NovaCandidate, ...] | UnsetType = UNSET


class NovaPreferenceRow(_Row, frozen=True, kw_only=True):
    """A row for DPO of Amazon Nova in SageMaker AI."""

    schemaVersion: Literal["bedrock-conversation-2024"] = "bedrock-conversation-2024"
    system: tuple[ConverseText, ...] | UnsetType = UNSET
    messages: tuple[NovaTurn, ...]


def _split_system(turns: tuple[Message, ...]) -> tuple[str | UnsetType, tuple[Message, ...]]:
    """The system message, which these formats keep by itself, and the turns."""
    system: str | UnsetType = UNSET
    if turns and turns[0].role == "system":
        system, turns = turns[0].content, turns[1:]
    other = sorted({turn.role for turn in turns} - {"user", "assistant"})
    if other:
        raise ValueError(
            f"has a {' and a '.join(other)} message after the first one; there is one system text "
            "before all turns, and no other role than user and assistant"
        )
    return system, turns


def _blocks(text: str) -> tuple[ConverseText, ...]:
    return (ConverseText(text),)


def _joined(blocks: Sequence[ConverseText]) -> str:
    return "".join(block.text for block in blocks)


def _make_claude(turns: tuple[Message, ...], chosen: str, rejected: str) -> ClaudeRow:
    system, turns = _split_system(turns)
    return ClaudeRow(system=system, messages=(*turns, _assistant(chosen)))


def _read_claude(row: ClaudeRow) -> Conversation:
    system = () if row.system is UNSET else (Message("system", row.system),)
    return Conversation((*system, *row.messages[:-1]), row.messages[-1:])


def _make_converse(turns: tuple[Message, ...], chosen: str, rejected: str) -> ConverseRow:
    system, turns = _split_system(turns)
    return ConverseRow(
        system=UNSET if system is UNSET else _blocks(system),
        messages=tuple(
            ConverseTurn("assistant" if turn.role == "assistant" else "user", _blocks(turn.content))
            for turn in (*turns, _assistant(chosen))
        ),
    )


def _read_converse(row: ConverseRow) -> Conversation:
    system = () if row.system is UNSET else (Message("system", _joined(row.system)),)
    turns = tuple(Message(turn.role, _joined(turn.content)) for turn in row.messages)
    return Conversation((*system, *turns[:-1]), turns[-1:])


def _make_nova(turns: tuple[Message, ...], chosen: str, rejected: str) -> NovaPreferenceRow:
    system, turns = _split_system(turns)
    said = tuple(
        NovaTurn(
            role="assistant" if turn.role == "assistant" else "user", content=_blocks(turn.content)
        )
        for turn in turns
    )
    choice = NovaTurn(
        role="assistant",
        candidates=(
            NovaCandidate(_blocks(chosen), "preferred"),
            NovaCandidate(_blocks(rejected), "non-preferred"),
        ),
    )
    return NovaPreferenceRow(
        system=UNSET if system is UNSET else _blocks(system), messages=(*said, choice)
    )


def _read_nova(row: NovaPreferenceRow) -> Conversation:
    system = () if row.system is UNSET else (Message("system", _joined(row.system)),)
    *said, choice = row.messages
    if any(turn.content is UNSET for turn in said) or choice.candidates is UNSET:
        raise ValueError("expected content in every turn but the last, and candidates in that one")
    ordered = sorted(choice.candidates, key=lambda c: c.preferenceLabel != "preferred")
    labels = [candidate.preferenceLabel for candidate in ordered]
    if labels != ["preferred", "non-preferred"]:
        raise ValueError(f"expected one preferred and one non-preferred candidate, got {labels}")
    turns = tuple(
        Message(turn.role, _joined(turn.content)) for turn in said if turn.content is not UNSET
    )
    return Conversation((*system, *turns), tuple(_assistant(_joined(c.content)) for c in ordered))


# --- All of them -------------------------------------------------------------------------------------

CHARACTERS_A_TOKEN = 6
"""AWS's own figure for planning a data set's size, used where a limit is in tokens.

Most text has fewer characters a token, so what is refused by it is too long for certain."""

_NOVA_RESERVED = (
    "System:", "SYSTEM:", "User:", "USER:", "Bot:", "BOT:", "Assistant:", "ASSISTANT:", "Thought:",
    "[EOS]", "<image>", "<video>", "<unk>",
)  # fmt: skip
_BEDROCK_DATA = "docs.aws.amazon.com/bedrock/latest/userguide/model-customization-prepare.html"
_NOVA_DATA = (
    "docs.aws.amazon.com/nova/latest/userguide/fine-tune-prepare-data-understanding.html and "
    "github.com/aws-samples/amazon-nova-samples (dataset_validation)"
)
_ALL_ROLES = ("system", "user", "assistant", "tool")

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(
            "sft", "sft", ChatRow, _make_chat, _read_chat,
            source="huggingface.co/docs/trl/dataset_formats (language modeling, conversational)",
            roles=_ALL_ROLES,
        ),
        Format(
            "trl", "preference", TRLRow, _make_trl, _read_trl,
            source="huggingface.co/docs/trl/dataset_formats (preference, conversational)",
            roles=_ALL_ROLES, empty_texts=True,
        ),
        Format(
            "trl-text", "preference", TRLTextRow, _make_trl_text, _read_trl_text,
            source="huggingface.co/docs/trl/dataset_formats (preference, standard)",
            empty_texts=True,
        ),
        Format(
            "axolotl", "preference", AxolotlRow, _make_axolotl, _read_axolotl,
            source="docs.axolotl.ai/docs/rlhf.html (chat_template.default)",
            roles=_ALL_ROLES,
        ),
        Format(
            "llama-factory", "preference", SharegptRow, _make_sharegpt, _read_sharegpt,
            source="github.com/hiyouga/LLaMA-Factory data/README.md (sharegpt, preference dataset)",
            alternates=True,
        ),
        Format(
            "openai-sft", "sft", ChatRow, _make_chat, _read_chat,
            source="developers.openai.com/api/docs/guides/supervised-fine-tuning",
            min_rows=10, max_file_bytes=512_000_000,
        ),
        Format(
            "openai-preference", "preference", OpenAIPreferenceRow, _make_openai, _read_openai,
            source="developers.openai.com/api/docs/guides/direct-preference-optimization",
            min_rows=10, max_file_bytes=512_000_000,
        ),
        Format(
            "bedrock-claude", "sft", ClaudeRow, _make_claude, _read_claude,
            source=f"{_BEDROCK_DATA} (Anthropic Claude 3 Haiku)",
            alternates=True, min_rows=32, max_rows=10_000, max_file_bytes=10_000_000_000,
            max_characters=32_000 * CHARACTERS_A_TOKEN,
        ),
        Format(
            "bedrock-llama", "sft", ConverseRow, _make_converse, _read_converse,
            source=f"{_BEDROCK_DATA} (Converse API format; Meta Llama 3.2 and 3.3)",
            alternates=True, min_rows=100, max_rows=10_000,
            max_characters=16_000 * CHARACTERS_A_TOKEN,
        ),
        Format(
            "bedrock-nova", "sft", ConverseRow, _make_converse, _read_converse,
            source=_NOVA_DATA, alternates=True, reserved=_NOVA_RESERVED, min_rows=8, max_rows=20_000,
        ),
        Format(
            "nova-preference", "preference", NovaPreferenceRow, _make_nova, _read_nova,
            source=f"docs.aws.amazon.com/nova/latest/userguide/nova-fine-tune-1.html and {_NOVA_DATA}",
            alternates=True, reserved=_NOVA_RESERVED,
        ),
    )
}  # fmt: skip
"""The formats by name."""


def format_named(name: str) -> Format:
    """The format called `name`; ValueError names those there are."""
    if name not in FORMATS:
        raise ValueError(f"no export format {name!r}; there are {', '.join(FORMATS)}.")
    return FORMATS[name]


def encode_row(row: msgspec.Struct) -> bytes:
    """A row as one line of JSON, without the line break; ValueError where its text is not Unicode."""
    try:
        return msgspec.json.encode(row)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has a text that is not Unicode (half of a surrogate pair at character {error.start})"
        ) from error


def row_problems(form: Format, line: bytes) -> list[str]:
    """What is wrong with one line in the eyes of the stack; nothing if it may be sent."""
    try:
        row = msgspec.json.decode(line, type=form.row)
        said = form.read(row)
    except (msgspec.DecodeError, ValueError) as error:
        return [str(error)]
    return [*_order_problems(form, said), *_text_problems(form, said)]


def size_problems(form: Format, n_rows: int, n_bytes: int) -> list[str]:
    """What is wrong with a file's size in the eyes of the stack."""
    found = []
    if n_rows < form.min_rows:
        rows = "row" if form.min_rows == 1 else "rows"
        found.append(f"{form.name} takes {form.min_rows:,} {rows} or more, got {n_rows:,}")
    if form.max_rows is not None and n_rows > form.max_rows:
        found.append(f"{form.name} takes at most {form.max_rows:,} rows, got {n_rows:,}")
    if form.max_file_bytes is not None and n_bytes > form.max_file_bytes:
        found.append(
            f"{form.name} takes a file of at most {form.max_file_bytes:,} bytes, got {n_bytes:,}"
        )
    return found


def _order_problems(form: Format, said: Conversation) -> list[str]:
    found = []
    roles = [turn.role for turn in said.turns]
    answers = 2 if form.kind == "preference" else 1
    if [answer.role for answer in said.answers] != ["assistant"] * answers:
        got = ", ".join(answer.role for answer in said.answers) or "no message"
        what = "one assistant message on each side" if answers == 2 else "an assistant message last"
        found.append(f"expected {what}, got {got}")
    unknown = sorted(set(roles) - set(form.roles))
    if unknown:
        found.append(
            f"has a {' and a '.join(unknown)} message; {form.name} takes {', '.join(form.roles)}"
        )
    if not form.alternates:
        return found
    if "system" in roles[1:]:
        found.append("has a system message after the first message")
    spoken = [role for role in roles if role != "system"]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        got = ", ".join(spoken) or "no message"
        found.append(
            "expected user and assistant in turn, from a user to a user before the answer, got "
            f"{got}"
        )
    return found


def _text_problems(form: Format, said: Conversation) -> list[str]:
    found = []
    turns = (*said.turns, *said.answers)
    for index, turn in enumerate(turns):
        where = f"message {index + 1} ({turn.role})"
        if not turn.content.strip() and not form.empty_texts:
            found.append(f"{where} is empty")
        words = [word for word in form.reserved if word in turn.content]
        if words:
            found.append(f"{where} holds {', '.join(words)}, reserved by {form.name}")
    characters = sum(len(turn.content) for turn in turns)
    if form.max_characters is not None and characters > form.max_characters:
        found.append(
            f"is {characters:,} characters long; {form.name} takes at most {form.max_characters:,} "
            f"({form.max_characters // CHARACTERS_A_TOKEN:,} tokens of {CHARACTERS_A_TOKEN})"
        )
    return found
