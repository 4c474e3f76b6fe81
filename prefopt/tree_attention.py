"""Attention over tree batches: the same result from three backends.

    segments   one call of `scaled_dot_product_attention` a segment; no work on masked pairs. For CPU.
    flex       one `flex_attention` call with a block mask. For CUDA.
    dense      a (T, T) mask for any attention that takes one; `prefopt.trees.tree_mask` makes it.

Pure tensors. Scale and soft-capping are arguments; who calls this is `prefopt.training.tree_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.trees import TreeSpan, tree_segments


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[TreeSpan],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each prompt, and from each answer to its prompt and itself.

    Args:
        query: (1, H, T, D).
        key: (1, H_kv, T, D); H must be a multiple of H_kv.
        value: (1, H_kv, T, D_v).
        spans: where the trees lie in the T tokens.
        scale: factor of the scores; None is 1 / sqrt(D).
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2).
        dropout: probability with which an attention weight is dropped.

    Returns:
        (1, H, T, D_v).
    """
    attend = partial(_attend, scale=scale, softcap=softcap, dropout=dropout)
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    outputs = []
    for start, prompt_length, answer_lengths, end in ((*span, span.end) for span in spans):
        sizes = (prompt_length, *answer_lengths)
        # One split an operand: slicing it for every segment would cost a full-size zero gradient each.
        queries = query[:, :, start:end].split(sizes, dim=2)
        keys = key[:, :, start:end].split(sizes, dim=2)
        values = value[:, :, start:end].split(sizes, dim=2)
        outputs.append(attend(queries[0], keys[0], values[0]))
        for q, k, v in zip(queries[1:], keys[1:], values[1:], strict=True):
            if q.shape[2] == 0:  # an answer of one token, which the prompt predicts
                continue
            outputs.append(attend(q, torch.cat((keys[0], k), 2), torch.cat((values[0], v), 2)))
    return torch.cat(outputs, dim=2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention of the last S of L tokens to all L, causally. query (1, H, S, D), key (1, H, L, D)."""
    s, length = query.shape[2], key.shape[2]
    seen = torch.ones(s, length, dtype=torch.bool, device=query.device).tril(length - s)
    if softcap is None:
        mask = None if s == length else seen  # is_causal spares the masked half
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scale
        )
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(value.dtype), dropout) @ value


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any,
    *,
    scale: float | None,
    softcap: float | None = None,
) -> Tensor:
    """The same through FlexAttention (Dong et al. 2024, arXiv:2412.05496), compiled on CUDA.

    Args:
        query: (1, H, T, D).
        key: (1, H_kv, T, D).
        value: (1, H_kv, T, D).
        block_mask: what `flex_block_mask` returned for these trees.
        scale: factor of the scores; None is 1 / sqrt(D).
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2).

    Returns:
        (1, H, T, D).
    """
    result: Tensor = _flex(query.device.type == "cuda")(
        query,
        key,
        value,
        score_mod=None if softcap is None else _softcap(softcap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result


def flex_block_mask(spans: Sequence[TreeSpan], device: torch.device | str) -> Any:
    """The block mask of a tree batch; made once a batch and used by every layer."""
    from torch.nn.attention.flex_attention import create_block_mask

    tree, segment, in_prompt = tree_segments(spans, device)

    def allowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = segment[q] == segment[k]
        return (q >= k) & (own | ((tree[q] == tree[k]) & in_prompt[k]))

    length = tree.numel()
    return create_block_mask(allowed, None, None, length, length, device=str(device))


@cache
def _flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention import flex_attention as flex

    plain: Callable[..., Tensor] = flex.flex_attention
    # Every batch has another length; without `dynamic` each would be compiled anew.
    on_gpu: Callable[..., Tensor] = torch.compile(plain, dynamic=True)
    return on_gpu if compiled else plain


@cache
def _softcap(cap: float) -> Callable[..., Tensor]:
    def soft(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return soft
