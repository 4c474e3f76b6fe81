"""The best that prompting alone does, measured by the judge that will measure the tuned model.

    plain answers  <- the same prompts with instructions, with examples, with both ->  judge

One half of the prompts chooses the best way of asking; the other half, which it has not seen, says
how good that one is, so the best of several lucky draws is not taken for an improvement. Answers are
compared without showing the judge what the model was told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from prefopt.chat import tokenize_prompt
from prefopt.errors import DataError, PrefoptError
from prefopt.evaluation.win_rate import WinRate, win_rate
from prefopt.types import Candidate, Comparison, Message, PreferenceGroup, Prompt, content_hash

if TYPE_CHECKING:
    from prefopt.judges import Judge, Rubric
    from prefopt.models import LanguageModel
    from prefopt.sampling.candidates import SamplingSettings

FEWEST_PROMPTS = 20
"""Below this, halves of ten prompts each could not tell one way of asking from another."""


class PromptVariant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A way of asking: a system text, and turns of example questions with their answers."""

    name: str
    system: str = ""
    examples: tuple[Message, ...] = ()

    def apply(self, prompt: Prompt, *, system_role: bool = True) -> Prompt:
        """The same question asked this way; a system text of its own comes after the variant's.

        Without a system role, as in Gemma's chat template, that text begins the first user turn.
        """
        own = [m.content for m in prompt.messages if m.role == "system"]
        turns = [*self.examples, *(m for m in prompt.messages if m.role != "system")]
        system = "\n\n".join(text for text in (self.system, *own) if text.strip())
        if system and system_role:
            turns.insert(0, Message("system", system))
        elif system:
            turns[0] = Message(turns[0].role, f"{system}\n\n{turns[0].content}")
        return Prompt.from_messages(turns, prompt.category)


class VariantResult(msgspec.Struct, frozen=True, kw_only=True):
    """How one way of asking did against plain asking, on the half that chooses."""

    name: str
    win_rate: WinRate | None
    problem: str = ""


class PromptBaseline(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="prefopt.prompt_baseline/1"
):
    """What prompting alone reaches.

    `best` is the way of asking that did best on the choosing half, None where none did better than
    plain asking there. `confirmed` is its win rate over plain asking on the other half.
    """

    judge: str
    rubric: str
    model: str
    variants: tuple[VariantResult, ...]
    best: PromptVariant | None
    confirmed: WinRate | None
    n_extra_characters: int = 0


def prompt_variants(
    rubric: Rubric,
    groups: Sequence[PreferenceGroup] = (),
    *,
    system_texts: Sequence[tuple[str, str]] = (),
    n_examples: int = 3,
) -> list[PromptVariant]:
    """The ways of asking worth a try: the rubric as instructions, good answers as examples, both.

    Args:
        rubric: what better means.
        groups: preferences whose chosen answers can be shown as examples; the shortest single-turn
            ones, which cost the fewest tokens.
        system_texts: the user's own, as (name, text).
        n_examples: how many examples are shown.
    """
    rules = (
        "Your answers will be compared by the following rules. Follow them, and do not mention "
        f"them.\n\n{rubric.text}"
    )
    found = [PromptVariant(name=name, system=text) for name, text in system_texts]
    found.append(PromptVariant(name="rubric as instructions", system=rules))
    examples = _examples(groups, n_examples)
    if examples:
        found.append(PromptVariant(name="examples", examples=examples))
        found.append(
            PromptVariant(name="instructions and examples", system=rules, examples=examples)
        )
    return found


def measure_prompts(
    prompts: Sequence[Prompt],
    variants: Sequence[PromptVariant],
    model: LanguageModel,
    judge: Judge,
    out: str | Path,
    *,
    sampling: SamplingSettings | None = None,
    seed: int = 1,
    progress: bool = True,
) -> PromptBaseline:
    """Ask in every way, choose on one half of the prompts, confirm on the other.

    A call that was stopped goes on where it was: answers and verdicts are kept in `out`.

    Args:
        prompts: questions that the examples do not come from; at least 20 different ones.
        variants: the ways of asking; names must differ.
        model: the model that may be tuned later.
        judge: the one that will judge the tuned model.
        out: folder for answers and verdicts.
        sampling: how answers are sampled, the same for every way.
        seed: of the sampling and of the halves.
        progress: show bars.

    Raises:
        DataError: fewer than 20 different prompts, or two variants with one name.
        ModelError, JudgeError: as sampling and judging raise them.
    """
    asked = list({prompt.prompt_id: prompt for prompt in prompts}.values())
    names = [variant.name for variant in variants]
    problems = []
    if len(asked) < FEWEST_PROMPTS:
        problems.append(
            f"{len(asked)} different prompts; at least {FEWEST_PROMPTS} are needed, half to choose "
            "and half to confirm"
        )
    problems += [f"two ways of asking are called {n!r}" for n in set(names) if names.count(n) > 1]
    if not variants:
        problems.append("no way of asking to measure")
    if problems:
        raise DataError("prompting cannot be measured.", problems)
    asked.sort(key=lambda prompt: content_hash([seed, prompt.prompt_id]))
    choosing, confirming = asked[::2], asked[1::2]
    run = _Run(model, judge, Path(out), sampling, seed, progress)

    plain = PromptVariant(name="plain")
    results = [run.compared(v, plain, choosing) for v in variants]
    scored = [
        (r.win_rate.win_rate, v) for r, v in zip(results, variants, strict=True) if r.win_rate
    ]
    rate, best = max(scored, key=lambda pair: pair[0], default=(0.0, plain))
    confirmed = run.compared(best, plain, confirming).win_rate if rate > 0.5 else None
    return PromptBaseline(
        judge=judge.name,
        rubric=judge.rubric.name,
        model=model.name,
        variants=tuple(results),
        best=best if confirmed is not None else None,
        confirmed=confirmed,
        n_extra_characters=len(best.system) + sum(len(m.content) for m in best.examples)
        if confirmed is not None
        else 0,
    )


def _examples(groups: Sequence[PreferenceGroup], n: int) -> tuple[Message, ...]:
    usable: dict[str, tuple[Prompt, Candidate]] = {}
    for group in groups:
        if len(group.prompt.messages) != 1:
            continue
        for chosen, _, preference in group.pairs():
            if preference.p_chosen > 0.5 and chosen.text.strip():
                usable.setdefault(group.prompt.prompt_id, (group.prompt, chosen))
    shortest = sorted(
        usable.values(), key=lambda pair: (len(pair[0].text) + len(pair[1].text), pair[0].prompt_id)
    )
    return tuple(
        message
        for prompt, chosen in shortest[:n]
        for message in (Message("user", prompt.text), Message("assistant", chosen.text))
    )


def _takes_system(tokenizer: Any) -> bool:
    """Whether the chat template accepts a system message."""
    asked = Prompt.from_messages([Message("system", "Be brief."), Message("user", "Hello")])
    try:
        tokenize_prompt(tokenizer, asked)
    except PrefoptError:
        return False
    return True


class _Run:
    """Samples and judges; what both halves and all variants share."""

    def __init__(
        self,
        model: LanguageModel,
        judge: Judge,
        out: Path,
        sampling: SamplingSettings | None,
        seed: int,
        progress: bool,
    ) -> None:
        self.model, self.judge, self.out = model, judge, out
        self.sampling, self.seed, self.progress = sampling, seed, progress
        self.system_role = _takes_system(model.tokenizer)
        out.mkdir(parents=True, exist_ok=True)

    def compared(
        self, variant: PromptVariant, plain: PromptVariant, prompts: Sequence[Prompt]
    ) -> VariantResult:
        """The variant's answers against plain ones; `a` is the variant's."""
        from prefopt.judges import judge_comparisons

        try:
            told = self._answers(variant, prompts)
        except DataError as error:  # such as examples that leave no room in a small context
            return VariantResult(name=variant.name, win_rate=None, problem=str(error))
        pairs = [
            Comparison(a=a, b=b)
            for a, b in zip(told, self._answers(plain, prompts), strict=True)
        ]  # fmt: skip
        judged = judge_comparisons(
            pairs, self.judge, ledger=self.out / "judgements.sqlite", progress=self.progress
        )
        try:
            return VariantResult(name=variant.name, win_rate=win_rate(judged, seed=self.seed))
        except ValueError as error:  # no comparison got a verdict
            return VariantResult(name=variant.name, win_rate=None, problem=str(error))

    def _answers(self, variant: PromptVariant, prompts: Sequence[Prompt]) -> list[Candidate]:
        from prefopt.sampling.candidates import sample_candidates

        key = content_hash([msgspec.to_builtins(variant)])[:12]
        found = sample_candidates(
            [variant.apply(prompt, system_role=self.system_role) for prompt in prompts],
            replace(self.model, name=f"{self.model.name} ({variant.name})"),
            k=1,
            settings=self.sampling,
            seed=self.seed,
            partial=self.out / f"answers_{key}.partial",
            progress=self.progress,
            description=f"answering ({variant.name})",
        )
        # The judge sees the question, not what the model was told about answering it.
        return [
            msgspec.structs.replace(candidate, prompt=prompt)
            for candidate, prompt in zip(found, prompts, strict=True)
        ]
