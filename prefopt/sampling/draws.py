"""Logits and one uniform number a row -> the next token of each row. Pure tensors.

A token is drawn by inverting the distribution function: with p the probabilities in the order of the
vocabulary and u uniform in [0, 1),

    token = min { v : p_0 + ... + p_v > u }

so that one number a row decides, wherever the row stands and whatever stands beside it. (torch's own
`multinomial` spends as many random numbers as there are tokens, and which ones depends on the batch.)
Temperature, top-k, top-p and min-p are those of transformers' warpers, in their order; here nothing
sorts a vocabulary unless it must, which on a CPU takes as long as a small model's whole forward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefopt.errors import ModelError

# torch's top-k is fast as long as k is below about a hundredth of the vocabulary.
_FIRST_LOOK = 96

_BLOCK = 512


def draw_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """One token for each row.

    Args:
        logits: (B, V).
        uniforms: (B,) float64 in [0, 1), one independent number a row; not read at temperature 0.
        temperature: logits are divided by it; 0 takes the largest.
        top_k: keep this many most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities sum to this; 1 keeps all.
        min_p: keep tokens at least this share as likely as the most likely one; 0 keeps all.

    Returns:
        (B,) int64.

    Raises:
        ModelError: a row's logits are NaN or infinite.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / temperature
    if top_k == 0 and top_p >= 1.0 and min_p <= 0.0:
        return _invert(scores.softmax(-1), uniforms)
    n_tokens = scores.shape[-1]
    if top_k:
        kept, tokens = _kept(scores, min(top_k, n_tokens), top_p, min_p, within=True)
        return _draw(kept, tokens, uniforms)
    # The tokens that are kept are nearly always among the first few hundred.
    width = min(n_tokens, max(64, n_tokens // _FIRST_LOOK))
    kept, tokens = _kept(scores, width, top_p, min_p)
    drawn = _draw(kept, tokens, uniforms)
    if width < n_tokens:
        rest = (kept[:, -1] > 0).nonzero()[:, 0]  # where the last one seen is kept, others may be
        if rest.numel():
            kept, tokens = _kept(scores[rest], n_tokens, top_p, min_p)
            drawn[rest] = _draw(kept, tokens, uniforms[rest])
    return drawn


def _kept(
    scores: Tensor, width: int, top_p: float, min_p: float, *, within: bool = False
) -> tuple[Tensor, Tensor]:
    """Probabilities (B, width) of the most likely tokens, 0 where left out, and which they are.

    They are shares of the whole vocabulary, or `within` the `width` tokens.
    """
    if width == scores.shape[-1]:
        top, tokens = scores.sort(dim=-1, descending=True)
    else:
        top, tokens = scores.topk(width, dim=-1)
    total = (top if within else scores).logsumexp(-1, keepdim=True)
    p = (top - total).exp()
    keep = torch.ones_like(p, dtype=torch.bool)
    if top_p < 1.0:
        # A token stays while those above it do not make up top_p yet, so the first always does.
        keep &= p.cumsum(-1, dtype=torch.float64) - p < top_p
    if min_p > 0.0:
        keep &= top >= top[:, :1] + math.log(min_p)
    return p * keep, tokens


def _draw(kept: Tensor, tokens: Tensor, uniforms: Tensor) -> Tensor:
    # In the vocabulary's order: two tokens of nearly the same probability would change places with the
    # rounding of another batch, and a draw between them with it.
    tokens, order = tokens.sort(dim=-1)
    place = _invert(kept.gather(-1, order), uniforms)
    return tokens.gather(-1, place[:, None])[:, 0]


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first place (B,) whose running sum of `weights` (B, N) exceeds u times the whole sum.

    First the block, then the place in it: running sums of whole vocabularies in float64 would take
    longer than the softmax, and in float32 lose the small ones.
    """
    over = -weights.shape[-1] % _BLOCK
    if weights.shape[-1] <= _BLOCK:
        return _place(weights, uniforms)[0]
    padded = torch.nn.functional.pad(weights, (0, over)) if over else weights
    blocks = padded.unflatten(-1, (-1, _BLOCK))
    block, inside = _place(blocks.sum(-1), uniforms)
    rows = torch.arange(len(block), device=block.device)
    return block * _BLOCK + _place(blocks[rows, block], inside)[0]


def _place(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The place (B,), and how far through its own weight u lies there, in [0, 1]."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    whole = sums[:, -1:]
    if not torch.isfinite(whole).all():
        raise ModelError(
            "the model's logits are not numbers (NaN or infinite), so no token can be drawn. Check "
            "its weights, or load it in another dtype: float16 overflows where float32 does not."
        )
    # Rounding up to the whole would point behind the last token.
    below = torch.minimum(
        uniforms[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole))
    )
    place = torch.searchsorted(sums, below, right=True)
    width = weights.gather(-1, place).double()
    inside = (below - (sums.gather(-1, place) - width)) / width
    return place[:, 0], inside[:, 0].clamp(0.0, 1.0)
