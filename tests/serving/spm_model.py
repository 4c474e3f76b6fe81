"""A tiny Llama with a SentencePiece tokenizer: the kind whose GGUF form needs no known vocabulary.

llama.cpp's converter takes a byte-level tokenizer only if its splitting is one that it knows, which no
tokenizer made in a test can be.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

SENTENCES = [
    "The sky is blue and the sea is green, as far as the eye can see.",
    "Hello! How are you? I am fine, thank you, and so are the others.",
    "Most of the work was done before the rain came down from the hills.",
    "A machine that was built to press olives turned with the river.",
]
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def spm_tokenizer(folder: Path) -> Any:
    """A tokenizer of 330 pieces in the folder, as tokenizer.model and as transformers' own files."""
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 8),
        model_writer=trained,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    read = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    pieces = {read.id_to_piece(i): i for i in range(read.get_piece_size())}
    score = {piece: read.get_score(i) for piece, i in pieces.items()}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda piece: (-score[piece], pieces[piece]))
        if not piece.startswith("<")
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    core = Tokenizer(
        models.BPE(
            vocab=pieces, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=TEMPLATE,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


def save_spm_model(folder: Path, *, seed: int = 0, **changes: Any) -> str:
    """A random Llama of 100,000 parameters with that tokenizer, saved as any checkpoint is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = spm_tokenizer(folder)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    }
    LlamaForCausalLM(LlamaConfig(**settings | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return str(folder)
