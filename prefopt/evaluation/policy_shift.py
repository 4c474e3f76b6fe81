"""How likely a model finds answers, with its adapter on and off: the distance tuning moved it.

In: a loaded model with an adapter, both sides' answers. Out: a `PolicyShift`. One forward pass an
answer and side; nothing is sampled and nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from prefopt.chat import tokenize_candidate
from prefopt.errors import ModelError
from prefopt.evaluation.model_figures import PolicyShift, mean_over_prompts
from prefopt.models import LanguageModel
from prefopt.progress import progress_bar
from prefopt.sampling.candidates import SamplingSettings
from prefopt.types import Candidate

_LOGITS_AT_ONCE = 2**26
"""Half a gigabyte in float32 with the copy that softmax makes."""


class AnswerLogp(NamedTuple):
    """log p(answer | prompt) in nats, summed over its tokens, the end token among them."""

    nats: float
    n_tokens: int


def answer_logps(
    model: LanguageModel,
    answers: Sequence[Candidate],
    *,
    progress: bool = False,
    description: str = "log-probabilities",
) -> list[AnswerLogp | None]:
    """The log-probability of each answer under a model as it is now, at temperature 1.

    The end token counts where the answer ended by itself, and does not where it was cut off. None
    stands for an answer that does not fit the model's context with its prompt.

    Args:
        model: a loaded model; its active adapter counts.
        answers: any answers; they need not be the model's own.
        progress: show a bar.
        description: the bar's label.

    Raises:
        ModelError: log-probabilities that are no numbers, or no end token where one is needed.
        DataError: a conversation that the chat template refuses.
    """
    import torch

    context = getattr(model.model.config, "max_position_embeddings", None) or 10**9
    vocabulary = int(model.model.config.get_text_config().vocab_size)
    most_tokens = max(1, _LOGITS_AT_ONCE // vocabulary)
    found: list[AnswerLogp | None] = [None] * len(answers)
    rows: list[tuple[int, tuple[int, ...], int]] = []
    for i, answer in enumerate(answers):
        tokens = tokenize_candidate(model.tokenizer, answer)
        if not tokens.answer_ids:
            found[i] = AnswerLogp(0.0, 0)
        elif len(tokens.prompt_ids) + len(tokens.answer_ids) <= context:
            ids = (*tokens.prompt_ids, *tokens.answer_ids)
            rows.append((i, ids, len(tokens.prompt_ids)))
    rows.sort(key=lambda row: len(row[1]))
    pad = model.tokenizer.pad_token_id or 0
    was_training = model.model.training
    model.model.eval()
    try:
        with (
            torch.inference_mode(),
            progress_bar(
                total=len(rows), description=description, unit="answer", show=progress
            ) as bar,
        ):
            start = 0
            while start < len(rows):
                end = start + 1
                while end < len(rows) and (end + 1 - start) * len(rows[end][1]) <= most_tokens:
                    end += 1
                batch, start = rows[start:end], end
                width = len(batch[-1][1])
                # Padded on the right: no position before the padding sees it.
                ids = torch.tensor([[*r[1], *[pad] * (width - len(r[1]))] for r in batch])
                mask = torch.tensor([[1] * len(r[1]) + [0] * (width - len(r[1])) for r in batch])
                logits = model.model(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    use_cache=False,
                ).logits  # (B, T, V)
                for (i, row, n_prompt), z in zip(batch, logits, strict=True):
                    targets = torch.tensor(row[n_prompt:], device=z.device)
                    nats = -torch.nn.functional.cross_entropy(
                        z[n_prompt - 1 : len(row) - 1].float(), targets, reduction="sum"
                    ).item()
                    found[i] = AnswerLogp(nats, len(row) - n_prompt)
                bar.update(len(batch))
    finally:
        model.model.train(was_training)
    if bad := sum(logp is not None and not math.isfinite(logp.nats) for logp in found):
        raise ModelError(
            f"{bad} of {len(found)} log-probabilities of {model.name} are not finite. Its weights "
            "hold NaN or overflow their number type; load it in float32 to see which."
        )
    return found


def measure_shift(
    tuned: LanguageModel,
    tuned_answers: Sequence[Candidate],
    base_answers: Sequence[Candidate] = (),
    *,
    beta: float | None = None,
    sampling: SamplingSettings | None = None,
    progress: bool = False,
) -> PolicyShift | None:
    """KL to the reference and implicit rewards, with the adapter on and off over one loaded model.

    Args:
        tuned: the base model with the tuned adapter. The adapter off must be the reference: it is
            not where training went on from another adapter.
        tuned_answers: the tuned model's own answers.
        base_answers: the base model's answers to the same prompts; none saves half of the time and
            leaves their reward unmeasured.
        beta: of DPO or PPO, for implicit rewards; None where it is not known.
        sampling: how both were sampled, to be said beside the figures.
        progress: show bars.

    Returns:
        None where none of the tuned model's answers fits the model's context.

    Raises:
        ModelError, DataError: as `answer_logps` raises them; ModelError without an adapter.
    """
    answers = [*tuned_answers, *base_answers]
    on = answer_logps(tuned, answers, progress=progress, description="log-probabilities (tuned)")
    with tuned.adapter_off() as base:
        off = answer_logps(base, answers, progress=progress, description="log-probabilities (base)")
    return shift_of(
        on[: len(tuned_answers)],
        off[: len(tuned_answers)],
        [c.prompt.prompt_id for c in tuned_answers],
        on[len(tuned_answers) :],
        off[len(tuned_answers) :],
        [c.prompt.prompt_id for c in base_answers],
        beta=beta,
        sampling=sampling,
    )


def shift_of(
    tuned_on: Sequence[AnswerLogp | None],
    tuned_off: Sequence[AnswerLogp | None],
    tuned_prompts: Sequence[str],
    base_on: Sequence[AnswerLogp | None] = (),
    base_off: Sequence[AnswerLogp | None] = (),
    base_prompts: Sequence[str] = (),
    *,
    beta: float | None = None,
    sampling: SamplingSettings | None = None,
) -> PolicyShift | None:
    """Log-probabilities -> a `PolicyShift`; `on` is the tuned model's, `off` the reference's.

    The first three are of the tuned model's answers, the next three of the base model's.
    """
    ratios = [
        [
            (x.nats - y.nats, x.n_tokens, prompt)
            for x, y, prompt in zip(on, off, prompts, strict=True)
            if x is not None and y is not None
        ]
        for on, off, prompts in (
            (tuned_on, tuned_off, tuned_prompts),
            (base_on, base_off, base_prompts),
        )
    ]
    own, others = ratios
    if not own:
        return None
    n_tokens = sum(n for _, n, _ in own)
    return PolicyShift(
        kl=mean_over_prompts([r for r, _, _ in own], [p for _, _, p in own]),
        kl_per_token=sum(r for r, _, _ in own) / n_tokens if n_tokens else 0.0,
        on_base_answers=mean_over_prompts([r for r, _, _ in others], [p for _, _, p in others])
        if others
        else None,
        beta=beta,
        sampled="" if sampling is None else _in_words(sampling),
        n_answers=len(tuned_prompts),
        n_too_long=len(tuned_prompts) - len(own),
    )


def _in_words(sampling: SamplingSettings) -> str:
    if sampling.temperature == 0:
        return "greedily"
    bounds = [f"temperature {sampling.temperature:g}"]
    if sampling.top_p < 1:
        bounds.append(f"top-p {sampling.top_p:g}")
    if sampling.top_k:
        bounds.append(f"top-k {sampling.top_k}")
    return f"at {', '.join(bounds)}, up to {sampling.max_new_tokens} tokens"
