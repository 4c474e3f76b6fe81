"""A causal language model of transformers -> log-probabilities of the answers in a tree batch.

`add_answer_scoring` teaches a model's `forward` to take answers; `score_answers` calls it, through
whatever PEFT, DDP or accelerate have wrapped around it. `choose_scoring` finds out by trying, against
the model's own logits, which of three ways a model can be scored:

    tree     one flat row, the prompt once (prefopt.trees);
    padded   a row an answer, hidden states into the chunked output head (prefopt.logprobs);
    logits   a row an answer, the model's own logits; slow, but right for any model.

Knows nothing of losses, data or the training loop.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prefopt.errors import ModelError
from prefopt.logprobs import OutputHead, TokenScores, score_tokens
from prefopt.training.fused_model import (
    AS_IT_IS,
    NOTHING_FUSED,
    FusedPlan,
    fused_layers,
    plan_fused_layers,
)
from prefopt.training.sharding import holds_parts, n_elements, run_within
from prefopt.tree_attention import (
    FLEX_BLOCK,
    flex_attention,
    flex_block_mask,
    segment_attention,
)
from prefopt.trees import (
    AnswerTree,
    PaddedAnswers,
    TreeBatch,
    TreeSpan,
    pack_trees,
    pad_trees,
    tree_mask,
)

logger = logging.getLogger(__name__)

ScoringWay = Literal["tree", "padded", "logits"]
AttentionBackend = Literal["segments", "flex", "dense"]

_ATTENTION = "prefopt_tree"

# Fewer than this are attended to in no time whatever the model.
_MANY_SEGMENTS = 64


@dataclass(frozen=True)
class Scoring:
    """How a model's answers are scored.

    Args:
        way: see the module.
        backend: the attention of way "tree".
        window: longest prompt with one answer that way "tree" can take, where attention is
            local; None is no limit. Longer ones are padded.
        reason: why it is not the fastest way; empty when it is.
        fused: layers that run as fused operations.
        segment_cost: how many tokens take as long as one more segment; where padding costs less
            than the segments of many short answers would, way "tree" pads.
        parted: whether each process holds a share of the weights only, so that a weight is whole
            only while its own module runs.
    """

    way: ScoringWay
    backend: AttentionBackend = "segments"
    window: int | None = None
    reason: str = ""
    fused: FusedPlan = NOTHING_FUSED
    segment_cost: float = 0.0
    parted: bool = False

    def batch(
        self, trees: Sequence[AnswerTree], pad_token_id: int, *, feed_last: bool = False
    ) -> TreeBatch | PaddedAnswers:
        """The trees in the form that this way takes, with each answer's last token or without."""
        if self.way != "tree":
            return pad_trees(trees, pad_token_id)
        longest = [len(t.prompt_ids) + max(map(len, t.answers)) for t in trees]
        if self.window is not None and max(longest) > self.window:
            return pad_trees(trees, pad_token_id)
        n_answers = sum(len(t.answers) for t in trees)
        n_segments = len(trees) + n_answers
        as_tree = sum(t.n_tokens for t in trees) + self.segment_cost * n_segments
        if n_segments >= _MANY_SEGMENTS and max(longest) * n_answers < as_tree:
            return pad_trees(trees, pad_token_id)
        return pack_trees(trees, feed_last=feed_last)


class AnswerScores(NamedTuple):
    """The scores of every answer token, and a mixture-of-experts model's balancing loss."""

    tokens: TokenScores
    aux_loss: Tensor | None  # () where it was asked for


class _TreeRoute(NamedTuple):
    spans: tuple[TreeSpan, ...]
    block_mask: Any


def add_answer_scoring(model: Any) -> None:
    """Teach a causal language model's `forward` the argument `answers`; all other calls stay.

    Give the model itself, not its PEFT wrapper. Doing it twice changes nothing.
    """
    if getattr(model, "_prefopt_scores_answers", False):
        return
    original = model.forward
    own = getattr(original, "__self__", None) is model
    function = original.__func__ if own else None

    # The original signature stays visible: `generate` checks its arguments against it.
    @functools.wraps(original)
    def forward(self: Any, *args: Any, answers: Any = None, **kwargs: Any) -> Any:
        # A deep copy of the model must run its own forward, not that of the model it was copied from.
        call = original if function is None else types.MethodType(function, self)
        # PEFT's prefix tuning knows the old name only.
        if kwargs.get("past_key_values") is not None:
            kwargs[cache_name(self)] = kwargs.pop("past_key_values")
        if answers is None:
            return call(*args, **kwargs)
        return _score(self, call, answers, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    model._prefopt_scores_answers = True


def score_answers(
    model: Any,
    batch: TreeBatch | PaddedAnswers,
    scoring: Scoring,
    *,
    statistics: bool = True,
    log_sum_sq: bool = False,
    aux_loss: bool = False,
    temperature: float = 1.0,
) -> AnswerScores:
    """Score a batch's answer tokens; call it, and the backward pass, within `tree_attention`.

    Args:
        model: a model taught by `add_answer_scoring`, however it is wrapped.
        batch: what `scoring.batch` returned, on the model's device.
        scoring: what `choose_scoring` returned for the model.
        statistics: whether entropy, mean logit and top-1 are wanted too.
        log_sum_sq: whether log sum_v p_v^2 is wanted too.
        aux_loss: whether a mixture-of-experts model's balancing loss is wanted too.
        temperature: logits are divided by it, as when answers were sampled with it.
    """
    inputs = _inputs(batch, scoring)
    if aux_loss:
        inputs["output_router_logits"] = True
    scores: AnswerScores = model(
        **inputs,
        answers=_Asked(
            batch.predictor,
            batch.targets,
            scoring.way == "logits",
            statistics,
            log_sum_sq,
            batch.n_tokens,
            temperature,
            scoring.parted,
        ),
    )
    return scores


def answer_states(
    model: Any, batch: TreeBatch | PaddedAnswers, scoring: Scoring, index: Tensor
) -> Tensor:
    """Hidden states after the last norm, at chosen tokens; within `tree_attention` like the scores.

    Args:
        model: a model taught by `add_answer_scoring`, however it is wrapped.
        batch: what `scoring.batch` returned, on the model's device.
        scoring: what `choose_scoring` returned for the model.
        index: (N,) places in the flattened batch, such as its `predictor` or `ends`.

    Returns:
        (N, D), in the model's dtype.
    """
    states: Tensor = model(**_inputs(batch, scoring), answers=_States(index))
    return states


def _inputs(batch: TreeBatch | PaddedAnswers, scoring: Scoring) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if not isinstance(batch, TreeBatch):
        return inputs | {"attention_mask": batch.attention_mask}
    inputs["position_ids"] = batch.position_ids
    if scoring.backend == "dense":
        inputs["attention_mask"] = tree_mask(batch.spans, batch.input_ids.device)
    elif scoring.backend == "flex":
        inputs |= _whole_blocks(batch)
    else:
        inputs["tree_route"] = _TreeRoute(batch.spans, None)
    return inputs


def _whole_blocks(batch: TreeBatch) -> dict[str, Any]:
    """The row with a tail that nothing reads, up to whole blocks of FlexAttention.

    A ragged last block is slower, and with soft-capping the backward kernel has given NaN for it
    (pytorch issue 153799). Two blocks at least: the compiler would make another graph for one.
    """
    n_blocks = max(2, -(-batch.n_tokens // FLEX_BLOCK))
    tail = n_blocks * FLEX_BLOCK - batch.n_tokens
    ids, positions, spans = batch.input_ids, batch.position_ids, batch.spans
    if tail:
        ids = torch.nn.functional.pad(ids, (0, tail))
        after = torch.arange(tail, dtype=positions.dtype, device=positions.device)
        positions = torch.cat((positions, after[None]), dim=1)
        spans = (*spans, TreeSpan(batch.n_tokens, tail, ()))
    return {
        "input_ids": ids,
        "position_ids": positions,
        "tree_route": _TreeRoute(spans, flex_block_mask(spans, ids.device)),
    }


class _States(NamedTuple):
    index: Tensor


class _Asked(NamedTuple):
    predictor: Tensor
    targets: Tensor
    from_logits: bool
    statistics: bool
    log_sum_sq: bool
    n_tokens: int
    temperature: float
    parted: bool


def _score(
    model: Any, original: Any, asked: _Asked | _States, *args: Any, **kwargs: Any
) -> AnswerScores | Tensor:
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    kwargs.pop("return_dict", None)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 4 and model.config._attn_implementation == "eager":
        # transformers' own eager attention adds its mask to the scores.
        lowest = torch.finfo(model.dtype).min
        kwargs["attention_mask"] = torch.where(mask, 0.0, lowest).to(model.dtype)
    if isinstance(asked, _States):
        states: Tensor = _decoder(model)(*args, **kwargs).last_hidden_state
        return states.flatten(0, 1)[asked.index]
    if asked.from_logits:
        out = original(*args, **kwargs)
        rows = out.logits.flatten(0, -2) if out.logits.dim() == 3 else out.logits
        cooled = rows[asked.predictor].float() / asked.temperature
        tokens = _from_logits(cooled, asked.targets, asked.log_sum_sq)
    else:
        out = _decoder(model)(*args, **kwargs)
        hidden = out.last_hidden_state.flatten(0, 1)[asked.predictor]
        output_head(model)  # an adapter on it would be passed over

        def scored(rows: Tensor) -> TokenScores:
            return score_tokens(
                rows,
                output_head(model, asked.temperature),
                asked.targets,
                statistics=asked.statistics,
                log_sum_sq=asked.log_sum_sq,
            )

        head = model.get_output_embeddings()
        tokens = run_within(head, scored, hidden) if asked.parted else scored(hidden)
    balance = None
    if kwargs.get("output_router_logits"):
        balance = _balancing_loss(model, out, kwargs.get("attention_mask"), asked.n_tokens)
    return AnswerScores(tokens, balance)


def _decoder(model: Any) -> Any:
    """A causal language model without its head."""
    inner = model.base_model
    return model.model if inner is model else inner  # Llama 4's prefix names no attribute


def _from_logits(logits: Tensor, targets: Tensor, log_sum_sq: bool) -> TokenScores:
    log_p = logits.log_softmax(-1)
    with torch.no_grad():
        p = log_p.exp()
        # A token that the head rules out (-inf) adds nothing to the entropy.
        log_p_or_0 = log_p.masked_fill(p == 0, 0.0)
        squares = p.square().sum(-1).log() if log_sum_sq else torch.zeros_like(log_p[:, 0])
        entropy, top1 = -(p * log_p_or_0).sum(-1), logits.argmax(-1) == targets
        mean = logits.mean(-1)
    return TokenScores(log_p.gather(-1, targets[:, None])[:, 0], entropy, mean, top1, squares)


def output_head(model: Any, temperature: float = 1.0) -> OutputHead:
    """A model's output head with what its configuration does to the logits.

    Args:
        model: a causal language model.
        temperature: that all logits are divided by in the end.

    Raises:
        ModelError: the model has no output head, or one that is more than a matrix and a bias.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer") or hasattr(head, "original_module"):
        raise ModelError("the output head carries an adapter, so it is more than a matrix.")
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise ModelError(
            f"{type(model).__name__} has no output head with a weight, so it gives no token "
            "probabilities. Load it as a causal language model."
        )
    config = model.config.get_text_config()
    scale = 1.0
    for name, inverse in (
        ("logit_scale", False),
        ("output_multiplier", False),
        ("lm_head_multiplier", False),
        ("logits_scaling", config.model_type != "hyperclovax"),
    ):
        value = getattr(config, name, None)
        if value is not None:
            scale = 1.0 / value if inverse else value
            break
    softcap = getattr(config, "final_logit_softcapping", None)
    # c tanh(s z / c) / T = (c / T) tanh((s / T) z / (c / T)): the temperature goes through the cap.
    if softcap is not None:
        softcap = float(softcap) / temperature
    return OutputHead(head.weight, getattr(head, "bias", None), float(scale) / temperature, softcap)


def _balancing_loss(model: Any, out: Any, mask: Tensor | None, n_tokens: int) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    padding = mask if mask is not None and mask.dim() == 2 else None
    logits = tuple(x.flatten(0, -2)[:n_tokens] for x in out.router_logits)  # without a tail
    loss: Tensor = load_balancing_loss_func(logits, experts, config.num_experts_per_tok, padding)
    return loss


@contextlib.contextmanager
def tree_attention(model: Any, scoring: Scoring) -> Iterator[None]:
    """Within the block, `model` attends along trees and runs fused layers.

    The backward pass belongs into the block too: gradient checkpointing runs the forward again.
    """
    base = base_model(model)
    with fused_layers(model, scoring.fused):
        if scoring.way != "tree" or scoring.backend == "dense":
            yield
            return
        config = base.config
        before = config._attn_implementation
        config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before


def is_wrapped(model: Any) -> bool:
    """Whether a model is PEFT's wrapper: one that it was put around has a `peft_config` too."""
    return hasattr(model, "get_base_model")


def base_model(model: Any) -> Any:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_wrapped(model) else model


def has_virtual_tokens(model: Any) -> bool:
    """Whether a PEFT wrapper puts learnt tokens before each row, or their keys and values."""
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def cache_name(model: Any) -> str:
    """The argument that is a model's keys and values, whose name transformers 5.24 has changed."""
    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    tree_route: _TreeRoute | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer, (1, H, T, D) in and (1, T, H, D) out."""
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ModelError(f"{type(module).__name__} has attention sinks or biases that trees lack.")
    if tree_route is None:
        # A padded batch, because one of its rows is longer than the attention window.
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        padded: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return padded
    if tree_route.block_mask is not None:
        out = flex_attention(
            query, key, value, tree_route.block_mask, scale=scaling, softcap=softcap
        )
    else:
        out = segment_attention(
            query,
            key,
            value,
            tree_route.spans,
            scale=scaling,
            softcap=softcap,
            dropout=dropout if module.training else 0.0,
        )
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make tree attention known to transformers; `choose_scoring` does it too."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        # A tree batch has none, and a (T, T) mask made from its positions would not be read.
        if attention_mask is None:
            return None
        padded: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
        return padded

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, mask)


def choose_scoring(model: Any, *, compiled: bool = False, low_precision: bool = False) -> Scoring:
    """Find the fastest way in which a model gives the same log-probabilities as its own logits.

    A few made-up answers are scored each way and compared with the model's logits for each answer
    alone. The result, with its reason, is written to the log. Where weights are parted, all processes
    must call this together, and no backward pass is tried.

    Args:
        model: the model, perhaps inside a PEFT wrapper; taught to score as a side effect.
        compiled: whether the model runs under torch.compile, which needs one graph for all trees.
        low_precision: whether float32 weights are multiplied in half precision.

    Raises:
        ModelError: not even the model's own logits give the same twice.
    """
    register_attention()
    base = base_model(model)
    add_answer_scoring(base)
    training, device = model.training, next(base.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            scoring = _first_that_agrees(model, base, device, compiled, low_precision)
    finally:
        model.train(training)
    if scoring.reason:
        way = f"tree, {scoring.backend}" if scoring.way == "tree" else scoring.way
        logger.warning("answers are scored a slower way (%s): %s", way, scoring.reason)
    return scoring


def _first_that_agrees(
    model: Any, base: Any, device: torch.device, compiled: bool, low_precision: bool
) -> Scoring:
    trees = _probe_trees(base.config.get_text_config().vocab_size)
    expected = torch.cat([_alone(model, p, a, device) for p, answers in trees for a in answers])
    # Rounding moves log-probabilities by some units in the last place of the logits. A model that
    # accelerate trained under autocast stays wrapped in it, whatever the dtype of its weights.
    dtype = next(base.parameters()).dtype
    unit = {torch.float32: 3e-4, torch.float64: 1e-9}.get(dtype, 6e-2)
    if low_precision or any(hasattr(module, "_original_forward") for module in (model, base)):
        unit = max(unit, 6e-2)
    allowed = unit * (1.0 + expected.abs())
    reasons = []
    for scoring in _ways(model, base, device, compiled):
        if scoring.reason:
            reasons.append(scoring.reason)
            continue
        try:
            with tree_attention(model, scoring):
                batch = replace(scoring, segment_cost=0.0).batch(trees, 0).to(device)
                found = _tried(model, batch, scoring)
        except Exception as error:  # it is somebody else's code
            message = (str(error).splitlines() or [type(error).__name__])[0]
            reasons.append(f"{scoring.way} fails: {message[:150].rstrip('.')}")
            continue
        # Tokens that the head rules out are at -inf in both.
        if ((found == expected) | ((found - expected).abs() <= allowed)).all():
            return replace(scoring, reason="; ".join(reasons))
        worst = float((found - expected).abs().max())
        reasons.append(f"{scoring.way} differs from the model's own logits by {worst:.2g} nats")
    raise ModelError(
        f"no way of scoring answers agrees with {type(base).__name__}'s own logits: "
        f"{'; '.join(reasons)}."
    )


def _tried(model: Any, batch: TreeBatch | PaddedAnswers, scoring: Scoring) -> Tensor:
    """Log-probabilities (R,), by a way whose backward pass runs too if anything trains."""
    trained = next((p for p in model.parameters() if p.requires_grad), None)
    if scoring.parted:  # gradients go to shares, by hooks that only a whole step may set off
        trained = None
    with torch.set_grad_enabled(trained is not None):
        found = score_answers(model, batch, scoring, statistics=False).tokens.logprobs
        if trained is not None:
            torch.autograd.grad(found.sum(), trained, allow_unused=True)
    return found.detach()


def _ways(model: Any, base: Any, device: torch.device, compiled: bool) -> Iterator[Scoring]:
    # Under torch.compile the compiler fuses, and finds the modules as they were.
    parted = holds_parts(model)
    plain = AS_IT_IS if parted else NOTHING_FUSED
    fused = plain if parted or compiled else plan_fused_layers(model)
    always: dict[str, Any] = {"fused": fused, "parted": parted}
    tree = always | {"window": _attention_window(base.config.get_text_config())}
    refused = _no_trees(model, base)
    if refused:
        yield Scoring("tree", reason=refused)
    elif compiled:
        yield Scoring("tree", "dense", **tree)
    else:
        if device.type == "cuda":
            yield Scoring("tree", "flex", **tree)
        else:
            yield Scoring("tree", "segments", segment_cost=_segment_cost(base), **tree)
        yield Scoring("tree", "dense", **tree)
    yield Scoring("padded", **always)
    yield Scoring("logits", fused=plain, parted=parted)


def _segment_cost(base: Any) -> float:
    """Tokens that take as long as one more segment: its calls in each layer against 6N FLOPs."""
    layers = getattr(base.config.get_text_config(), "num_hidden_layers", 1)
    call_flops = 6e6  # about 60 microseconds, forward and backward, at 100 GFLOP/s
    return float(layers * call_flops / (6 * n_parameters(base)))


def n_parameters(base: Any) -> int:
    """How many numbers a causal language model has in its layers, embeddings left out."""
    if not holds_parts(base):
        return int(base.num_parameters(exclude_embeddings=True))
    embedded = {id(m.weight) for m in base.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(n_elements(p) for p in base.parameters() if id(p) not in embedded)


def _no_trees(model: Any, base: Any) -> str:
    """Why a model's architecture rules trees out, or nothing."""
    name = type(base).__name__
    if has_virtual_tokens(model):
        return "prompt tuning puts virtual tokens before each row"
    if getattr(base, "_is_stateful", False):
        return f"{name} carries a state from token to token"
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return f"{name} takes no position_ids, so positions cannot restart after the prompt"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{name} has an attention of its own that cannot be replaced"
    return ""


def _attention_window(config: Any) -> int | None:
    """The shortest attention window among a model's layers, if any layer is local."""
    windows = []
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    sliding = kinds is None or any("sliding" in kind for kind in kinds)
    if window is not None and sliding and getattr(config, "use_sliding_window", True):
        windows.append(int(window))
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None:
        windows.append(int(chunk))
    return min(windows, default=None)


def _probe_trees(vocabulary: int) -> list[AnswerTree]:
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    return [AnswerTree(ids(5), (ids(3), ids(4))), AnswerTree(ids(3), (ids(2), ids(1), ids(5)))]


def _alone(
    model: Any, prompt: tuple[int, ...], answer: tuple[int, ...], device: torch.device
) -> Tensor:
    """Log-probabilities (R,) of one answer from the model's own logits, alone in its row."""
    ids = torch.tensor([prompt + answer], device=device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    n = len(answer)
    log_p = logits[0, -n - 1 : -1].float().log_softmax(-1)
    return log_p.gather(-1, ids[0, -n:, None])[:, 0]
