"""A reward model as a judge: the answer with the higher score wins.

P(a preferred) = s(r_a - r_b), which is what it was trained to say (Bradley-Terry). No rubric is read
and no order is shown, so both orders agree exactly. Beside judges that are asked, it is a member of a
panel like any other.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.errors import DataError
from prefopt.judges.base import Judge
from prefopt.judges.rubric import Rubric
from prefopt.models import Device, DType, adapter_fingerprint, model_fingerprint
from prefopt.types import Candidate, Comparison, Verdict, VerdictFailure, Winner, content_hash

if TYPE_CHECKING:
    from prefopt.training.reward_model import RewardModel


class RewardModelJudge(Judge):
    """Prefers the answer with the higher score.

    Args:
        model: a reward model, its folder, or a sequence classification model with one label.
        tie_below: where neither answer is preferred with more than this probability, it is a tie.
        strong_from: from this probability on it is "much better" (strength 2).
        device: where to load a model that is named.
        dtype: of its weights.

    `p_a` is s(r_a - r_b), as good as the model's calibration on what it is asked about.
    """

    rubric = Rubric(name="none", text="No rubric is read: the answer with the higher score wins.")

    def __init__(
        self,
        model: str | Path | RewardModel,
        *,
        tie_below: float = 0.52,
        strong_from: float = 0.9,
        device: Device = "auto",
        dtype: DType = "auto",
    ) -> None:
        if not 0.5 <= tie_below <= strong_from <= 1.0:
            raise ValueError(
                f"0.5 <= tie_below <= strong_from <= 1 must hold, got {tie_below}, {strong_from}."
            )
        named = isinstance(model, str | Path)
        self.name = f"reward:{model if named else 'a loaded model'}"
        self._model = model
        self._weights: str | None = None
        self.tie_below, self.strong_from = tie_below, strong_from
        self._device, self._dtype = device, dtype

    @property
    def fingerprint(self) -> str:
        """Covers weights, head and thresholds."""
        if self._weights is None:  # once: the name gives way to the loaded model later
            self._weights = self._hash_of_weights()
        return content_hash([self._weights, "reward/1", self.tie_below, self.strong_from])

    def _hash_of_weights(self) -> str:
        if isinstance(self._model, str | Path):
            if Path(self._model).is_dir():
                return adapter_fingerprint(str(self._model))
            return model_fingerprint(str(self._model))
        import hashlib

        digest = hashlib.sha256(str(self._model.bias).encode())
        for parameter in self._model.parameters():
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def verdicts(
        self, comparisons: Sequence[Comparison]
    ) -> Generator[tuple[int, Verdict], None, None]:
        """Score every different answer once, then compare."""
        answers = {_key(x): x for item in comparisons for x in (item.a, item.b)}
        scores = self._scores(answers)
        for index, comparison in enumerate(comparisons):
            yield index, self._verdict(scores[_key(comparison.a)], scores[_key(comparison.b)])

    def _scores(
        self, answers: dict[tuple[str, str, bool], Candidate]
    ) -> dict[tuple[str, str, bool], float | VerdictFailure]:
        from prefopt.training.reward_model import RewardModel

        if not isinstance(self._model, RewardModel):
            self._model = RewardModel.load(self._model, device=self._device, dtype=self._dtype)
        found: dict[tuple[str, str, bool], float | VerdictFailure] = {}
        by_prompt: dict[str, list[tuple[str, str, bool]]] = {}
        ids = {}
        for key, answer in answers.items():
            if not answer.text.strip():
                found[key] = "empty"
                continue
            try:
                ids[key] = self._model.tokenize(answer.prompt, answer.text, complete=key[2])
            except DataError:
                found[key] = "too_long"
                continue
            by_prompt.setdefault(answer.prompt.prompt_id, []).append(key)
        groups = list(by_prompt.values())
        scored = self._model.score_ids([[ids[key] for key in keys] for keys in groups])
        for keys, scores in zip(groups, scored, strict=True):
            found |= dict(zip(keys, scores, strict=True))
        return found

    def _verdict(self, a: float | VerdictFailure, b: float | VerdictFailure) -> Verdict:
        if isinstance(a, str):
            return Verdict(judge=self.name, failure=a, rationale=f"answer a is {a}")
        if isinstance(b, str):
            return Verdict(judge=self.name, failure=b, rationale=f"answer b is {b}")
        if not (math.isfinite(a) and math.isfinite(b)):
            return Verdict(
                judge=self.name, failure="not_finite", rationale=f"scores {a} against {b}"
            )
        p_a = 1 / (1 + math.exp(-max(min(a - b, 500.0), -500.0)))
        sure = max(p_a, 1.0 - p_a)
        preferred: Winner = "tie" if sure <= self.tie_below else "a" if a > b else "b"
        strength = 0 if preferred == "tie" else 2 if sure >= self.strong_from else 1
        return Verdict(
            judge=self.name,
            preferred=preferred,
            strength=strength,
            p_a=p_a,
            rationale=f"scores {a:.3f} against {b:.3f}",
        )


def _key(answer: Candidate) -> tuple[str, str, bool]:
    return answer.prompt.prompt_id, answer.text, answer.finish_reason != "length"
