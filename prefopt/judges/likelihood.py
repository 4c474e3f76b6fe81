"""A language model as a judge without a question: the answer it finds more likely wins.

Each answer is scored by the mean log-probability of its tokens after the prompt. That is no opinion
about quality, and it favours what the model itself would write; measure it against people's labels
before trusting it. No rubric is read and no order is shown, so both orders agree exactly.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

from prefopt.chat import tokenize_answer
from prefopt.judges.base import Judge
from prefopt.judges.rubric import Rubric
from prefopt.models import Device, DType, LanguageModel, load_model, model_fingerprint
from prefopt.types import Candidate, Comparison, Verdict, VerdictFailure, Winner, content_hash


class LogLikelihoodJudge(Judge):
    """Prefers the answer with the higher mean log-probability per token.

    Args:
        model: a name ("demo", a folder, a Hub id) or a loaded model.
        tie_nats: a difference below this, in nats a token, is a tie.
        strong_nats: from this on it is "much better" (strength 2).
        batch_size: answers a forward pass.
        device: where to load `model` when it is a name.
        dtype: of its weights.

    `p_a` is 1 / (1 + exp(-difference)), an uncalibrated number.
    """

    rubric = Rubric(name="none", text="No rubric is read: the more likely answer wins.")

    def __init__(
        self,
        model: str | LanguageModel,
        *,
        tie_nats: float = 0.01,
        strong_nats: float = 0.5,
        batch_size: int = 8,
        device: Device = "auto",
        dtype: DType = "auto",
    ) -> None:
        self._model = model
        self._weights: str | None = None
        model_name = model if isinstance(model, str) else model.name
        self.name = f"likelihood:{model_name}"
        self.tie_nats, self.strong_nats = tie_nats, strong_nats
        self.batch_size = batch_size
        self._device, self._dtype = device, dtype

    @property
    def fingerprint(self) -> str:
        """Covers the model's weights and the thresholds."""
        if self._weights is None:  # once: the name gives way to the loaded model later
            model = self._model
            self._weights = model_fingerprint(model) if isinstance(model, str) else model.name
        weights = self._weights
        return content_hash([weights, "likelihood/1", self.tie_nats, self.strong_nats])

    def verdicts(
        self, comparisons: Sequence[Comparison]
    ) -> Generator[tuple[int, Verdict], None, None]:
        """Score every different answer once, then compare."""
        if isinstance(self._model, str):
            self._model = load_model(self._model, device=self._device, dtype=self._dtype)
        answers = {_key(c): c for item in comparisons for c in (item.a, item.b)}
        scores = dict(zip(answers, self._scores(list(answers.values())), strict=True))
        for index, comparison in enumerate(comparisons):
            yield index, self._verdict(scores[_key(comparison.a)], scores[_key(comparison.b)])

    def _verdict(self, a: float | str, b: float | str) -> Verdict:
        if isinstance(a, str) or isinstance(b, str):
            problem = a if isinstance(a, str) else b
            failure: VerdictFailure = "empty" if problem == "empty" else "too_long"
            return Verdict(judge=self.name, failure=failure, rationale=f"an answer is {problem}")
        if not (math.isfinite(a) and math.isfinite(b)):
            return Verdict(
                judge=self.name, failure="not_finite", rationale=f"{a} against {b} nats a token"
            )
        gap = a - b
        preferred: Winner = "a" if gap > 0 else "b"
        if abs(gap) < self.tie_nats:
            preferred = "tie"
        strength = 0 if preferred == "tie" else 2 if abs(gap) >= self.strong_nats else 1
        return Verdict(
            judge=self.name,
            preferred=preferred,
            strength=strength,
            p_a=1 / (1 + math.exp(-max(min(gap, 500.0), -500.0))),
            rationale=f"{a:.3f} against {b:.3f} nats a token",
        )

    def _scores(self, answers: Sequence[Candidate]) -> list[float | str]:
        """Mean log p(token | what stands before) of each answer, or what keeps it from having one."""
        import torch

        loaded = self._model
        assert isinstance(loaded, LanguageModel)
        context = getattr(loaded.model.config, "max_position_embeddings", None) or 10**9
        scores: list[float | str] = ["empty"] * len(answers)
        rows: list[tuple[int, list[int], int]] = []
        for i, answer in enumerate(answers):
            if not answer.text.strip():
                continue
            tokens = tokenize_answer(loaded.tokenizer, answer.prompt, answer.text, complete=True)
            ids = [*tokens.prompt_ids, *tokens.answer_ids]
            if len(ids) > context:
                scores[i] = (
                    f"too long: {len(ids)} tokens with its prompt, the model reads {context}"
                )
            else:
                rows.append((i, ids, len(tokens.prompt_ids)))
        rows.sort(key=lambda row: len(row[1]))
        pad = loaded.tokenizer.pad_token_id or 0
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            width = max(len(ids) for _, ids, _ in batch)
            # Padded on the right: no position before the padding sees it.
            input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for _, ids, _ in batch])
            mask = torch.tensor([[1] * len(r[1]) + [0] * (width - len(r[1])) for r in batch])
            with torch.inference_mode():
                hidden = loaded.model(
                    input_ids=input_ids.to(loaded.device), attention_mask=mask.to(loaded.device)
                ).logits  # (B, T, V)
            for (i, ids, n_prompt), logits in zip(batch, hidden, strict=True):
                targets = torch.tensor(ids[n_prompt:], device=logits.device)
                before = logits[n_prompt - 1 : len(ids) - 1].float()
                scores[i] = -float(torch.nn.functional.cross_entropy(before, targets))
        return scores


def _key(answer: Candidate) -> tuple[str, str]:
    return answer.prompt.prompt_id, answer.text
