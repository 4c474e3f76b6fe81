"""Attention over tree batches: the same result from three backends.

    segments   a kernel call a segment, and one for a tree's answers and its prompt; no masks. For CPU.
    flex       one `flex_attention` call with a block mask. For CUDA.
    dense      a (T, T) mask for any attention that takes one; `prefopt.trees.tree_mask` makes it.

Pure tensors. Scale and soft-capping are arguments; who calls this is `prefopt.training.tree_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.trees import TreeSpan

FLEX_BLOCK = 128
"""Tokens along each side of a block of the mask that FlexAttention skips, checks or takes whole."""

_MOST_GRAPHS = 64

# Below it one kernel call an answer with a mask is a tenth faster than calls without, and its memory,
# prompt times answer, does not matter yet.
_LONG_PROMPT = 128


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
    long = max((span.prompt_length for span in spans), default=0) >= _LONG_PROMPT
    if long and softcap is None and dropout == 0.0 and _has_kernel(query, value):
        result: Tensor = _SegmentAttention.apply(query, key, value, tuple(spans), scale)
        return result
    attend = partial(_attend, scale=scale, softcap=softcap, dropout=dropout)
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


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether this is what torch's CPU kernel takes whose log-sums can be had (FlashAttention)."""
    return bool(query.device.type == "cpu" and query.shape[-1] == value.shape[-1])


class _SegmentAttention(torch.autograd.Function):
    """The same by kernel calls without masks: memory grows with T, whatever the prompt's length.

    An answer's attention to its prompt and to itself are two calls whose results are put together by
    their log-sums (Dao et al. 2022, arXiv:2205.14135, section 3.1), all answers of a tree reading the
    prompt in one. Given the log-sums of the whole, the kernel's backward pass gives each call's share.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: Sequence[TreeSpan],
        scale: float | None,
    ) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        of_sums = torch.promote_types(query.dtype, torch.float32)
        log_sums = query.new_empty(query.shape[:-1], dtype=of_sums)
        for queries, keys, causal in _calls(spans):
            q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            part, sums = kernel(q, k, v, 0.0, causal, scale=scale)
            own, own_sums = out[:, :, queries], log_sums[:, :, queries]
            if causal:
                own.copy_(part)
                own_sums.copy_(sums)
            else:  # these queries have attended to themselves before
                both = torch.logaddexp(sums, own_sums)
                own.mul_(own_sums.sub(both).exp_().unsqueeze(-1).to(own.dtype))
                own.addcmul_(part, sums.sub(both).exp_().unsqueeze(-1).to(own.dtype))
                own_sums.copy_(both)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sums = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        for queries, keys, causal in _calls(ctx.spans):
            at, read = (slice(None), slice(None), queries), (slice(None), slice(None), keys)
            d_q, d_k, d_v = kernel(
                grad[at],
                query[at],
                key[read],
                value[read],
                out[at],
                log_sums[at],
                0.0,
                causal,
                scale=ctx.scale,
            )
            if causal:  # each token is in one such call, which comes first
                d_query[at], d_key[read], d_value[read] = d_q, d_k, d_v
            else:
                d_query[at] += d_q
                d_key[read] += d_k
                d_value[read] += d_v
        return d_query, d_key, d_value, None, None


def _calls(spans: Sequence[TreeSpan]) -> Iterator[tuple[slice, slice, bool]]:
    """Queries, keys, and whether causal: each segment alone, then a tree's answers to its prompt."""
    for span in spans:
        answers = span.start + span.prompt_length
        at = span.start
        for size in (span.prompt_length, *span.answer_lengths):
            if size:  # an answer of one token is predicted by the prompt and not fed
                yield slice(at, at + size), slice(at, at + size), True
            at += size
        if span.end > answers and span.prompt_length:
            yield slice(answers, span.end), slice(span.start, answers), False


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention of the last S of L tokens to all L, causally. (1, H, S, D) and (1, H_kv, L, D)."""
    s, length = query.shape[2], key.shape[2]
    seen = torch.ones(s, length, dtype=torch.bool, device=query.device).tril(length - s)
    repeat = query.shape[1] // key.shape[1]
    if softcap is None:
        mask = None if s == length else seen  # is_causal spares the masked half
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=repeat > 1,  # keys and values shared by heads are not written out
        )
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
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
    # A second model's scale or soft cap would become a symbol of the graph, which FlexAttention cannot
    # take; as a constant it gets a graph of its own.
    with torch._dynamo.config.patch(specialize_float=True):
        # Under autocast a norm of q and k leaves them in float32, while v is what a product made.
        result: Tensor = _flex(query.device.type == "cuda")(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            score_mod=None if softcap is None else _softcap(softcap),
            block_mask=block_mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return result


def flex_block_mask(spans: Sequence[TreeSpan], device: torch.device | str) -> Any:
    """The block mask of a tree batch; made once a batch and used by every layer.

    Worked out from the spans in O(T * T / 128): `create_block_mask` would write the (T, T) mask to
    memory first, 268 MB at 16,384 tokens and several times over.
    """
    from torch.nn.attention.flex_attention import BlockMask

    intervals = _tree_intervals(spans).to(device, non_blocking=True)
    tree_start, prompt_end, segment_start = intervals

    # Everything that is looked up belongs to the query, so a tile loads three short vectors.
    def allowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_prompt = (k >= tree_start[q]) & (k < prompt_end[q])
        return (k <= q) & ((k >= segment_start[q]) | in_prompt)

    length = tree_start.numel()
    partial_blocks, full_blocks = _blocks_seen(tree_start, prompt_end, segment_start)
    return BlockMask.from_kv_blocks(
        *_listed(partial_blocks),
        *_listed(full_blocks),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=allowed,
        seq_lengths=(length, length),
    )


def _tree_intervals(spans: Sequence[TreeSpan]) -> Tensor:
    """What each token sees up to itself: [tree start, prompt end) and [segment start, itself].

    Returns:
        (3, T) int32: tree start, prompt end and segment start of each token.
    """
    sizes, rows = [], []
    for span in spans:
        at, prompt_end = span.start, span.start + span.prompt_length
        for size in (span.prompt_length, *span.answer_lengths):
            sizes.append(size)
            rows.append((span.start, prompt_end, at))
            at += size
    columns = torch.tensor(rows, dtype=torch.int32).t()
    return torch.repeat_interleave(columns, torch.tensor(sizes), dim=1).contiguous()


def _blocks_seen(
    tree_start: Tensor, prompt_end: Tensor, segment_start: Tensor
) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of queries sees in part, and which wholly; (N, N) bool each."""
    length, device = tree_start.numel(), tree_start.device
    n_blocks = -(-length // FLEX_BLOCK)
    place = torch.arange(n_blocks * FLEX_BLOCK, dtype=torch.int32, device=device)
    first = place[::FLEX_BLOCK]
    last = first + FLEX_BLOCK

    def overlap(start: Tensor, end: Tensor) -> Tensor:
        shared = torch.minimum(end[:, None], last) - torch.maximum(start[:, None], first)
        return shared.clamp_(min=0)

    seen = overlap(segment_start, place[:length] + 1)
    seen += overlap(tree_start, torch.minimum(prompt_end, segment_start))
    seen = F.pad(seen, (0, 0, 0, n_blocks * FLEX_BLOCK - length))
    seen = seen.view(n_blocks, FLEX_BLOCK, n_blocks)
    full = seen.amin(1) == FLEX_BLOCK
    return (seen.amax(1) > 0) & ~full, full


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A (N, N) choice of blocks as FlexAttention reads it: how many a row, and their indices."""
    indices = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32)[None, None], indices[None, None]


@cache
def _flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention import flex_attention as flex

    plain: Callable[..., Tensor] = flex.flex_attention
    if not compiled:
        return plain
    # One graph for each head shape, dtype and gradient mode that the process meets. Beyond the limit
    # dynamo would run the plain function, which writes all scores to memory; `fullgraph` forbids it.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _MOST_GRAPHS)
    # Every batch has another length; without `dynamic` each would be compiled anew.
    on_gpu: Callable[..., Tensor] = torch.compile(plain, dynamic=True, fullgraph=True)
    return on_gpu


@cache
def _softcap(cap: float) -> Callable[..., Tensor]:
    def soft(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return soft
