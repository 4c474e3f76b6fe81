"""How surprised a model is by plain text: the check that tuning did not make it forget.

In: a causal language model, its tokenizer, texts. Out: one number, compared before and after
tuning on text that has nothing to do with it. It knows no preferences and no reports.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from prefopt.errors import ModelError

logger = logging.getLogger(__name__)


def perplexity(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int = 512, batch_size: int = 4
) -> float:
    """The perplexity of `model` on `texts`: exp(-sum of log p(token | tokens before) / tokens).

    The sum runs over all tokens of all texts together, so long texts weigh more. A sequence's
    first token has nothing before it and is not counted; where the tokenizer normally puts a BOS
    token in front, that is the first one. Batch size and padding do not change the result beyond
    rounding. The model is put into evaluation mode meanwhile.

    Args:
        model: a Hugging Face causal language model, on any device.
        tokenizer: the model's tokenizer.
        texts: plain texts, no chat template.
        max_length: tokens per text, BOS included; what is longer is cut, with a logged warning.
        batch_size: texts per forward pass.

    Returns:
        The perplexity, 1 or more; lower is less surprised. Only comparable between models that
        share a tokenizer.

    Raises:
        ValueError: when there are no texts, or some have no token that can be predicted.
        ModelError: when the model's probabilities are not numbers.
    """
    if not texts:
        raise ValueError("perplexity needs at least one text, got none.")
    if max_length < 2 or batch_size < 1:
        raise ValueError(
            "perplexity needs max_length of at least 2 tokens and batch_size of at least 1, "
            f"got {max_length} and {batch_size}."
        )
    sequences = _encode(tokenizer, texts, max_length)

    import torch

    pad_id = tokenizer.pad_token_id or 0  # masked out, so any id in the vocabulary will do
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.inference_mode():
            # Texts of like length share a batch, so little is spent on padding.
            ordered = sorted(sequences, key=len)
            for start in range(0, len(ordered), batch_size):
                rows = ordered[start : start + batch_size]
                width = max(map(len, rows))
                ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
                logits = model(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    use_cache=False,
                ).logits
                # One text at a time in float32: a batch of full vocabularies would not fit twice.
                for row, row_logits in zip(rows, logits, strict=True):
                    total += torch.nn.functional.cross_entropy(
                        row_logits[: len(row) - 1].float(),
                        torch.tensor(row[1:], device=row_logits.device),
                        reduction="sum",
                    ).item()
                    count += len(row) - 1
    finally:
        model.train(was_training)
    if not math.isfinite(total):
        raise ModelError(
            f"the model's log-probabilities on {len(texts)} texts are not finite, so it has no "
            "perplexity. Its weights hold NaN or overflow their number type; load it in float32 to "
            "see which, and lower the learning rate if training made them so."
        )
    return math.exp(total / count)


def _encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids per text, with BOS in front if the tokenizer normally adds it, cut to length."""
    bos = tokenizer.bos_token_id
    n_long, too_short, sequences = 0, [], []
    for index, text in enumerate(texts):
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        with_specials = tokenizer(text, add_special_tokens=True)["input_ids"]
        if bos is not None and list(with_specials[:1]) == [bos] and ids[:1] != [bos]:
            ids.insert(0, bos)
        if len(ids) < 2:
            too_short.append(index)
        n_long += len(ids) > max_length
        sequences.append(ids[:max_length])
    if too_short:
        shown = ", ".join(map(str, too_short[:20])) + (" …" if len(too_short) > 20 else "")
        raise ValueError(
            f"perplexity needs texts with a token to predict; {len(too_short)} of {len(texts)} "
            f"have none (numbers {shown}, counting from 0). Remove them or give longer ones."
        )
    if n_long:
        logger.warning(
            "%d of %d texts are longer than %d tokens; only their first %d tokens are counted.",
            n_long,
            len(texts),
            max_length,
            max_length,
        )
    return sequences
