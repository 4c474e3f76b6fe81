"""A transformers model as a judge: it reads the rubric and both answers and names the better one.

The verdict comes from the probabilities of the tokens "1" and "2" after the question, so every
reply is a verdict and nothing has to be parsed. Small models are weak judges: measure one against
human labels before trusting it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

from prefopt.errors import ModelError
from prefopt.judges.base import Judge
from prefopt.judges.rubric import HOUSE_STYLE, Rubric
from prefopt.models import Device, DType, LanguageModel, load_model, model_fingerprint
from prefopt.types import Comparison, Message, Prompt, Verdict, Winner, content_hash


class LocalJudge(Judge):
    """Asks a local causal language model.

    Args:
        model: a name ("demo", a folder, a Hub id) or a loaded model.
        rubric: what better means.
        tie_band: |p - 0.5| below this is a tie.
        strong_band: |p - 0.5| from this on is "much better" (strength 2).
        batch_size: comparisons a forward pass.
        device: where to load `model` when it is a name.
        dtype: of its weights.
    """

    def __init__(
        self,
        model: str | LanguageModel,
        *,
        rubric: Rubric = HOUSE_STYLE,
        tie_band: float = 0.02,
        strong_band: float = 0.3,
        batch_size: int = 8,
        device: Device = "auto",
        dtype: DType = "auto",
    ) -> None:
        self._model = model
        self._weights: str | None = None
        model_name = model if isinstance(model, str) else model.name
        self.name = f"local:{model_name}"
        self.rubric = rubric
        self.tie_band, self.strong_band = tie_band, strong_band
        self.batch_size = batch_size
        self._device, self._dtype = device, dtype

    @property
    def fingerprint(self) -> str:
        """Covers the model's weights, the rubric, the bands and the wording of the question."""
        if self._weights is None:  # once: the name gives way to the loaded model later
            model = self._model
            self._weights = model_fingerprint(model) if isinstance(model, str) else model.name
        weights = self._weights
        asked = [_question("{conversation}", "{first}", "{second}", self.rubric), "local/2"]
        return content_hash(
            [weights, self.rubric.rubric_hash, self.tie_band, self.strong_band, asked]
        )

    def verdicts(
        self, comparisons: Sequence[Comparison]
    ) -> Generator[tuple[int, Verdict], None, None]:
        """Yield verdicts batch by batch, shortest questions first."""
        if not comparisons:
            return
        if isinstance(self._model, str):
            self._model = load_model(self._model, device=self._device, dtype=self._dtype)
        loaded = self._model
        from prefopt.chat import tokenize_prompt

        labels = [_label_token(loaded.tokenizer, label) for label in ("1", "2")]
        special = _special_texts(loaded.tokenizer)
        questions = [tokenize_prompt(loaded.tokenizer, self._ask(c, special)) for c in comparisons]
        context = getattr(loaded.model.config, "max_position_embeddings", None) or 10**9
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        fitting = [i for i in order if len(questions[i]) <= context]
        for start in range(0, len(fitting), self.batch_size):
            batch = fitting[start : start + self.batch_size]
            for index, p_first in zip(
                batch, _p_first([questions[i] for i in batch], loaded, labels), strict=True
            ):
                yield index, self._verdict(p_first)
        for index in order[len(fitting) :]:
            yield (
                index,
                Verdict(
                    judge=self.name,
                    failure="too_long",
                    rationale=f"{len(questions[index])} tokens, the model reads {context}",
                ),
            )

    def _ask(self, comparison: Comparison, special: Sequence[str]) -> Prompt:
        conversation = "\n\n".join(f"{m.role}: {m.content}" for m in comparison.prompt.messages)
        first, second = (_as_text(c.text, special) for c in (comparison.a, comparison.b))
        text = _question(_as_text(conversation, special), first, second, self.rubric)
        return Prompt.from_messages([Message("user", text)])

    def _verdict(self, p_first: float) -> Verdict:
        if not math.isfinite(p_first):
            said = f"P(first) is {p_first}: the model's weights or activations overflow"
            return Verdict(judge=self.name, failure="not_finite", rationale=said)
        distance = abs(p_first - 0.5)
        preferred: Winner = "a" if p_first > 0.5 else "b"
        if distance < self.tie_band:
            preferred = "tie"
        strength = 0 if preferred == "tie" else 2 if distance >= self.strong_band else 1
        return Verdict(judge=self.name, preferred=preferred, strength=strength, p_a=p_first)


def _special_texts(tokenizer: Any) -> list[str]:
    """How the tokenizer's special tokens are written, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)


def _as_text(text: str, special: Sequence[str]) -> str:
    """The text with special tokens broken in two: an answer could end its turn and begin another."""
    for token in special:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _question(conversation: str, first: str, second: str, rubric: Rubric) -> str:
    # Joined, never formatted: braces in a user's text are text.
    return "".join(
        [
            rubric.text,
            "\n\nThe conversation:\n\n",
            conversation,
            "\n\nAnswer 1:\n\n",
            first,
            "\n\nAnswer 2:\n\n",
            second,
            "\n\nWhich answer is better? Reply with the number only: 1 or 2.",
        ]
    )


def _label_token(tokenizer: Any, label: str) -> int:
    ids = tokenizer.encode(label, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(
            f"the tokenizer writes {label!r} as {len(ids)} tokens; a local judge needs one. Use "
            "another model as judge."
        )
    return int(ids[0])


def _p_first(questions: list[list[int]], loaded: LanguageModel, labels: list[int]) -> list[float]:
    """P("1") / (P("1") + P("2")) as the next token, for each question."""
    import torch

    width = max(len(ids) for ids in questions)
    pad = loaded.tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in questions])  # (B, T) left
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in questions])  # (B, T)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
    with torch.inference_mode():
        logits = loaded.model(
            input_ids=input_ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            position_ids=positions.to(loaded.device),
            logits_to_keep=1,
        ).logits[:, -1, labels]  # (B, 2)
    return [float(p) for p in logits.float().softmax(-1)[:, 0]]
