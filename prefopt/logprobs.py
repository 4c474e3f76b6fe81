"""Hidden states -> log-probabilities of answer tokens, without the logits ever being there at once.

    log p(t | h) = z_t - logsumexp(z),   z = cap(scale * (W h + b))

Positions go through the output head in chunks; a chunk's logits are reduced and forgotten. Pure
tensors: knows nothing of models, batches or losses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.matrix_product import matrix_product

# Positions a chunk of logits. On a CPU 128 x 50k floats are 25 MB, below what allocators hand back at
# once. A GPU would read the whole head for every 128 rows and wait for memory, so there a chunk has as
# many as make half a gigabyte.
_CHUNK = 128
_GPU_LOGITS = 2**27


class OutputHead(NamedTuple):
    """How a model turns a hidden state into logits."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None


class TokenScores(NamedTuple):
    """What is known of each scored token. Only `logprobs` carries a gradient."""

    logprobs: Tensor  # (R,) nats
    entropy: Tensor  # (R,) of the predicted distribution, nats
    mean_logit: Tensor  # (R,) over the vocabulary
    is_top1: Tensor  # (R,) bool: the token is the most likely one
    log_sum_sq: Tensor  # (R,) log of the sum of squared probabilities; zeros unless asked for


def score_tokens(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    *,
    statistics: bool = True,
    log_sum_sq: bool = False,
    chunk_rows: int | None = None,
) -> TokenScores:
    """Log-probabilities of tokens given the hidden states that predict them, in float32.

    Args:
        hidden: (R, D).
        head: the output head; when its weight is frozen, the gradient with respect to `hidden` is
            worked out in the forward pass, and nothing is computed twice.
        targets: (R,) token ids.
        statistics: whether to work out entropy, mean logit and top-1 as well; zeros otherwise.
        log_sum_sq: whether to work out log sum_v p_v^2 as well (WPO needs it).
        chunk_rows: positions that go through the head together; None takes what suits the device.
    """
    chunk_rows = chunk_rows or head_chunk_rows(hidden.device.type, head.weight.shape[0])
    wanted = _Wanted(statistics, log_sum_sq, chunk_rows)
    out = _ScoreTokens.apply(
        hidden, head.weight, head.bias, targets, head.scale, head.softcap, wanted
    )
    return TokenScores(*out)


def head_chunk_rows(device_type: str, vocabulary: int) -> int:
    """Positions that go through the head together."""
    return _CHUNK if device_type == "cpu" else max(_CHUNK, _GPU_LOGITS // vocabulary)


class _Wanted(NamedTuple):
    statistics: bool
    log_sum_sq: bool
    chunk_rows: int


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits (C, V) in float32 and, with a soft cap, the slope of the cap at them."""
    z = matrix_product(hidden, weight, bias).float()
    if scale != 1.0:
        z.mul_(scale)
    if softcap is None:
        return z, None
    bent = torch.tanh_(z.div_(softcap))
    slope = 1.0 - bent.square()
    return bent.mul_(softcap), slope


class _ScoreTokens(torch.autograd.Function):
    """Forward reduces each chunk; a frozen head needs no second pass, a trained one recomputes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        wanted: _Wanted,
    ) -> tuple[Tensor, ...]:
        # What autocast would do is written out below, so that forward and backward agree.
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = hidden.to(weight.dtype)
            head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
            gradient_now = ctx.needs_input_grad[0] and not head_trains
            gradient = torch.empty_like(inputs) if gradient_now else None
            n = inputs.shape[0]
            logprobs, log_z, entropy, mean, squares = (
                torch.zeros(n, dtype=torch.float32, device=hidden.device) for _ in range(5)
            )
            top1 = torch.zeros(n, dtype=torch.bool, device=hidden.device)
            # Entropy is log Z - sum_v p_v z_v. Where z is linear in the head that sum is h . (p W),
            # and p W is needed for the gradient anyway.
            entropy_from_gradient = gradient is not None and softcap is None and bias is None
            rows = wanted.chunk_rows
            for start in range(0, n, rows):
                part = slice(start, start + rows)
                target = targets[part, None]
                z, slope = _logits(inputs[part], weight, bias, scale, softcap)
                highest = z.amax(-1, keepdim=True)
                of_target = z.gather(-1, target)
                kept = None
                if wanted.statistics:
                    mean[part] = z.mean(-1)
                    top1[part] = (of_target >= highest)[:, 0]
                    kept = None if entropy_from_gradient else z.clone()
                p = z.sub_(highest).exp_()  # but for the division by their sum
                total = p.sum(-1, keepdim=True)
                log_z[part] = (highest + total.log())[:, 0]
                logprobs[part] = of_target[:, 0] - log_z[part]
                if gradient is None and kept is None and not wanted.log_sum_sq:
                    del z, p, slope
                    continue
                if wanted.log_sum_sq:
                    squares[part] = p.square().sum(-1).log() - 2.0 * total[:, 0].log()
                if kept is not None:
                    if bias is not None:  # which may rule tokens out: 0 * -inf is not a number
                        kept.masked_fill_(p == 0, 0.0)
                    entropy[part] = log_z[part] - (kept.mul_(p).sum(-1, keepdim=True) / total)[:, 0]
                if gradient is not None:  # d log p / d z = onehot(target) - p
                    towards = weight[targets[part]]
                    if slope is not None:
                        p.mul_(slope)
                        towards = towards * slope.gather(-1, target).to(towards.dtype)
                    # Dividing (C, D) by the sum costs less than dividing (C, V).
                    pulled = matrix_product(p.to(weight.dtype), weight.t()) / total
                    if wanted.statistics and entropy_from_gradient:
                        expected = (inputs[part].float() * pulled.float()).sum(-1)
                        entropy[part] = log_z[part] - scale * expected
                    gradient[part] = (towards - pulled).mul_(scale)
                del z, p, kept, slope  # before the next chunk's logits are made
        ctx.gradient_now = gradient_now
        ctx.settings = (scale, softcap, hidden.dtype, wanted.chunk_rows)
        if gradient_now:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(inputs, weight, bias, targets, log_z)
        ctx.mark_non_differentiable(entropy, mean, top1, squares)
        return logprobs, entropy, mean, top1, squares

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scale, softcap, dtype, rows = ctx.settings
        none = (None,) * 4
        if ctx.gradient_now:
            (gradient,) = ctx.saved_tensors
            return ((gradient * grad_logprobs[:, None]).to(dtype), None, None, *none)
        inputs, weight, bias, targets, log_z = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(inputs) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        with torch.autocast(inputs.device.type, enabled=False):
            for start in range(0, inputs.shape[0], rows):
                part = slice(start, start + rows)
                z, slope = _logits(inputs[part], weight, bias, scale, softcap)
                d = z.sub_(log_z[part, None]).exp_().neg_()  # -p
                d[torch.arange(d.shape[0], device=d.device), targets[part]] += 1.0
                d.mul_(grad_logprobs[part, None] * scale)
                if slope is not None:
                    d.mul_(slope)
                low = d.to(weight.dtype)
                if d_hidden is not None:
                    d_hidden[part] = low @ weight
                if d_weight is not None:
                    d_weight += low.t() @ inputs[part]
                if d_bias is not None:
                    d_bias += d.sum(0)
                del z, d, low, slope
        return (
            None if d_hidden is None else d_hidden.to(dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *none,
        )


def sum_by_answer(values: Tensor, answer_of: Tensor, n_answers: int) -> Tensor:
    """Sum token values (R,) over the answers (A,) that they belong to."""
    return values.new_zeros(n_answers).index_add(0, answer_of, values)


def by_answer(values: Tensor, answer_of: Tensor, lengths: Tensor) -> Tensor:
    """Token values (R,) as rows (A, L), zero behind each answer's end."""
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(values.numel(), device=values.device) - starts[answer_of]
    rows = values.new_zeros(lengths.numel(), int(lengths.max()))
    return rows.index_put((answer_of, place), values)


def discounted_logps(rows: Tensor, answers: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """Sum log-probabilities with the tokens beyond a shared length weighed by alpha.

        log pi_hat(y|x) = sum_{t <= m} log p_t + alpha * sum_{t > m} log p_t

    the decomposition of LD-DPO (Liu et al. 2024, arXiv:2409.06411); m is the shorter answer's length.

    Args:
        rows: (A, L) token log-probabilities, as `by_answer` returns them.
        answers: (N,) an answer for each result.
        shared: (N,) the length m of each result.
        alpha: weight in [0, 1].

    Returns:
        (N,).
    """
    chosen = rows[answers]
    within = torch.arange(rows.shape[1], device=rows.device)[None, :] < shared[:, None]
    return (chosen * torch.where(within, 1.0, alpha)).sum(-1)
