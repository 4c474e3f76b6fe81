"""Tokenizers small enough to build in a test: a byte-level BPE over a few sentences.

Each has one of the chat templates' typical shapes. Byte-level, so every text survives; trained on
text with runs of spaces and line breaks, so tokens merge across boundaries as real ones do.
"""

from __future__ import annotations

import copy
import functools

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_SENTENCES = [
    "The sky is blue and the sea is green.",
    "Hello! How are you? I am fine.\n\nThank you.\n\n\nYours",
    "user assistant system model header\nuser\nassistant\n\n",
    "Assistant: yes.\n  indented text\n    more\n  and again\n",
] * 4

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_WORDS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Writes the end of the turn and then EOS for the end of the text, as some families do.
_TWO_ENDS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)
# Opens the answer with an empty thought only once it is there, as reasoning models' templates do.
_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
    "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Leaves a hint in the generation prompt that disappears once the answer is there.
_HINTED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)

_CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
_CHATML_ROLES = {
    "unk_token": "<|endoftext|>",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
}

# name: (chat template, special tokens, the tokenizer's named tokens)
_SHAPES: dict[str, tuple[str | None, list[str], dict[str, str]]] = {
    "chatml": (_CHATML, _CHATML_TOKENS, _CHATML_ROLES),
    "thinking": (_THINKING, _CHATML_TOKENS, _CHATML_ROLES),
    "hinted": (_HINTED, _CHATML_TOKENS, _CHATML_ROLES),
    "llama": (
        _LLAMA,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"},
    ),
    "gemma": (
        _GEMMA,
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    ),
    "two_ends": (
        _TWO_ENDS,
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
    "words": (_WORDS, ["<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}),
    "plain": (None, ["<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}),
    "gpt2": (
        None,
        ["<|endoftext|>"],
        dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    ),
}

TEMPLATES = tuple(_SHAPES)


@functools.cache
def tiny_tokenizer(template: str = "chatml") -> PreTrainedTokenizerFast:
    """A tokenizer with fewer than 400 tokens; treat it as read-only, it is shared.

    "chatml" has BOS <|im_start|>, pad = EOS = <|im_end|> and a trailing line break; "llama" a BOS
    of its own; "gemma" no system role and a turn end that is not EOS; "two_ends" both; "words" only
    words; "plain" and "gpt2" no template, the latter BOS = EOS; "thinking" and "hinted" write the
    beginning of an answer differently once it is there.
    """
    chat_template, special, named = _SHAPES[template]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if template == "llama":
        # Splits after line breaks, as its family does: "\n\n" is one token whatever follows.
        lines = pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?\S+|\s+"), "isolated")
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_SENTENCES, trainer)
    if template == "plain":
        from tokenizers.processors import TemplateProcessing

        # Like a tokenizer that puts BOS before and EOS after every text it is given.
        core.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **named)


def save_tiny_model(folder, template: str = "chatml", *, seed: int = 0, context: int = 256) -> str:
    """A random Llama of 60,000 parameters with its tokenizer, saved as any checkpoint is.

    Its padding token differs from its end token, as the demo model's does.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = copy.deepcopy(tiny_tokenizer(template))
    if tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.pad_token = "<|endoftext|>"
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
