"""Candidates -> labels in shards: pairs, verdicts and preferences, on one machine or many.

    labels/judged/         comparisons with their verdicts
    labels/preferences/    the labels, in the columns that TRL's trainers and `prefopt train` read
    labels/left_out/       every comparison that gave none, and why
    labels/judges.json     the judge as fitted to the verdicts
    labels/labels.json     what came out, counted

The functions are those of `prefopt.label_job`, applied to one shard after another. Only the judge's
habits need more than a shard: they are fitted once, to the prompts with the smallest hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from prefopt.data.preference_data import preference_table
from prefopt.data.records import write_bytes
from prefopt.data.shards import (
    PREFERENCES,
    Shards,
    cut_into_shards,
    kind_of,
    open_shards,
    read_manifest,
    read_table,
    shard_file,
    total_counts,
)
from prefopt.errors import DataError
from prefopt.judges import Judge, judge_comparisons, load_judge
from prefopt.judges.canaries import Canary, CanaryResult, canary_comparisons, read_canaries
from prefopt.judges.rubric import Rubric
from prefopt.label_job import LabelConfig
from prefopt.preferences import FittedJudges, build_preferences, fit_judges, pair_candidates
from prefopt.scale.settings import ScaleSettings
from prefopt.scale.shard_map import (
    Engine,
    Made,
    Output,
    map_shards,
    opened_engine,
)
from prefopt.types import (
    Candidate,
    Comparison,
    JudgedComparison,
    LeftOut,
    content_hash,
)

FIT_ON = 20_000
"""Comparisons that the judge's habits are fitted to; four numbers are known well from far fewer."""

Orders = Literal["both", "one"]


class ShardedLabels(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.sharded_labels/1",
):
    """What a labelling job over shards gave; `folder` holds it."""

    folder: str
    judge: str
    n_prompts: int
    n_comparisons: int
    n_flipped: int
    n_preferences: int
    left_out: dict[str, int]
    failures: dict[str, int]
    canaries: tuple[CanaryResult, ...]
    judges: FittedJudges

    def __str__(self) -> str:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.left_out.items()) or "none"
        lines = [
            f"{self.n_preferences:,} preferences from {self.n_comparisons:,} comparisons over "
            f"{self.n_prompts:,} prompts by {self.judge}; left out: {reasons}",
            f"opposite verdicts in the two orders: {self.n_flipped:,}",
        ]
        for failure, n in self.failures.items():
            lines.append(f"verdicts that failed, {failure}: {n:,}")
        for name, fitted in zip(self.judges.names, self.judges.model.judges, strict=False):
            share = fitted.first_share_of_equals
            lines.append(f"{name} names the first of two equal answers in {share:.0%}")
        for canary in self.canaries:
            lines.append(
                f"canary {canary.kind}: {canary.n_fooled} of {canary.n_verdicts} verdicts fooled"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class JudgeWork:
    """Judges the comparisons of a shard, or of the candidates in it.

    `pairs` says which candidates of a prompt are compared; None where the shard holds comparisons.
    """

    judge: str | Judge
    rubric: str | Rubric
    pairs: Literal["all", "chain"] | None
    orders: Orders

    def open(self) -> Callable[[list[Any]], Mapping[str, Made]]:
        """Load the judge."""
        judge = self.judge
        if isinstance(judge, str):
            judge = load_judge(judge, rubric=self.rubric)

        def judged(records: list[Any]) -> Mapping[str, Made]:
            comparisons: Sequence[Comparison] = records
            if self.pairs is not None:
                comparisons = pair_candidates(records, scheme=self.pairs)
            found = judge_comparisons(comparisons, judge, orders=self.orders, progress=False)
            counts: dict[str, int] = {}
            for item in found:
                for failure in item.failures:
                    counts[failure] = counts.get(failure, 0) + 1
            return {"judged": Made(found, counts)}

        return judged


@dataclass(frozen=True)
class BuildWork:
    """Makes the labels of a shard of verdicts; the arguments are those of `build_preferences`."""

    rule: Literal["mean_grade", "inferred"]
    min_margin: float
    min_p: float
    pairs_per_prompt: int | None
    fitted: FittedJudges

    def open(self) -> Callable[[list[JudgedComparison]], Mapping[str, Made]]:
        """There is nothing to load."""

        def build(judged: list[JudgedComparison]) -> Mapping[str, Made]:
            found = build_preferences(
                judged,
                rule=self.rule,
                min_margin=self.min_margin,
                min_p=self.min_p,
                pairs_per_prompt=self.pairs_per_prompt,
                fitted=self.fitted,
            )
            counts = {
                "prompts": len({item.comparison.prompt.prompt_id for item in judged}),
                "flipped": found.n_flipped,
            }
            return {
                "preferences": Made(preference_table(found.groups), counts),
                "left_out": Made(found.left_out, found.reasons()),
            }

        return build


def label_shards(
    config: LabelConfig,
    *,
    scale: ScaleSettings | None = None,
    judge: Judge | None = None,
    progress: bool = True,
) -> ShardedLabels:
    """Do a labelling job over shards, or continue it.

    Verdicts, chosen and rejected answers, and what is left out are those of `label_candidates`; so is
    `p_chosen` up to `FIT_ON` comparisons, within 1e-3, and above them within what the judge's
    habits are known better from all verdicts.

    Args:
        config: as for `label_candidates`. `candidates` is a folder of shards of candidates or of
            comparisons, or a JSONL file of candidates, written as shards to `<out>/candidates`.
        scale: how the work is cut and where it is done.
        judge: in place of the one that `config` names; it must pickle.
        progress: show bars.

    Raises:
        ValueError: settings that are not for shards, all at once: a judge behind an API, a second
            judge, plan "adaptive".
        DataError: candidates that cannot be used, or a damaged shard, by its name.
        RunError: the folder was made with other settings, or is in use.
        ModelError: a model, or the cluster, cannot be used.
    """
    scale = scale or ScaleSettings()
    _refuse(config, judge)
    shown = judge or load_judge(config.judge, rubric=config.rubric)
    out = Path(config.out)
    source, pairs = _source(config, out, scale)
    with opened_engine(scale) as engine:
        # The canaries first, as in a job without shards; a few prompts tell as much as many.
        canaries = _canaries(source, pairs, config.canaries)
        tested: list[JudgedComparison] = []
        if canaries:
            shards = _canary_shards(canaries, out / "canaries", scale.shard_size)
            work = JudgeWork(judge or config.judge, config.rubric, None, "both")
            judged = _judged(shards, work, shown, out / "canaries_judged", engine, progress)
            by_id = {item.comparison.comparison_id: item for item in judged}
            tested = [by_id[canary.comparison.comparison_id] for canary in canaries]
        orders: Orders = "one" if config.plan == "one_order" else "both"
        work = JudgeWork(judge or config.judge, config.rubric, pairs, orders)
        judged = _judged(source, work, shown, out / "judged", engine, progress)
        fitted = _fitted(judged, config.reliability, out / "judges.json")
        built = BuildWork(
            config.rule, config.min_margin, config.min_p, config.pairs_per_prompt, fitted
        )
        made = map_shards(
            judged,
            {
                "preferences": Output(out / "preferences", PREFERENCES, None),
                "left_out": Output(out / "left_out", kind_of(LeftOut), LeftOut),
            },
            built,
            made_from=asdict(built),
            engine=engine,
            unit="comparison",
            description="labels",
            progress=progress,
        )
    counts = total_counts(made["preferences"])
    labels = ShardedLabels(
        folder=config.out,
        judge=shown.name,
        n_prompts=counts["prompts"],
        n_comparisons=judged.n_rows,
        n_flipped=counts["flipped"],
        n_preferences=sum(shard.rows for shard in made["preferences"].shards),
        left_out=_most_first(total_counts(made["left_out"])),
        failures=_most_first(total_counts(judged.manifest)),
        canaries=read_canaries(canaries, tested),
        judges=fitted,
    )
    encoded = msgspec.json.format(msgspec.json.encode(labels), indent=2)
    write_bytes(out / "labels.json", encoded + b"\n")
    return labels


def _judged(
    source: Shards[Any],
    work: JudgeWork,
    judge: Judge,
    folder: Path,
    engine: Engine,
    progress: bool,
) -> Shards[JudgedComparison]:
    map_shards(
        source,
        {"judged": Output(folder, kind_of(JudgedComparison), JudgedComparison)},
        work,
        made_from={"judge": judge.fingerprint, "pairs": work.pairs, "orders": work.orders},
        engine=engine,
        unit="comparison" if work.pairs is None else "answer",
        description=f"judging ({judge.name})",
        progress=progress,
    )
    return open_shards(folder, JudgedComparison)


def _canary_shards(canaries: Sequence[Canary], folder: Path, shard_size: int) -> Shards[Comparison]:
    return cut_into_shards(
        sorted((c.comparison for c in canaries), key=lambda c: c.prompt.prompt_id),
        folder,
        Comparison,
        shard_size=shard_size,
        made_from={"canaries": content_hash([msgspec.to_builtins(c) for c in canaries])},
    )


def _refuse(config: LabelConfig, judge: Judge | None) -> None:
    from prefopt.judges.api_judge import ApiJudge

    problems = []
    kind = config.judge.partition(":")[0]
    if (judge is None and kind in ("anthropic", "openai")) or isinstance(judge, ApiJudge):
        problems.append(
            f"{config.judge if judge is None else judge.name} is behind an API, and a shard whose "
            "worker died is judged again: its verdicts would be paid for twice. Without --scale every "
            "verdict is kept in one ledger as it comes, and paid for once"
        )
    if config.second_judge is not None:
        problems.append(
            "a second judge is not asked about shards; leave it out, or leave out --scale"
        )
    if config.plan == "adaptive":
        problems.append(
            "plan 'adaptive' weighs all prompts together and is not for shards; give 'both_orders', "
            "or leave out --scale"
        )
    if problems:
        raise ValueError("labels of shards: " + "; ".join(problems) + ".")


def _source(
    config: LabelConfig, out: Path, scale: ScaleSettings
) -> tuple[Shards[Any], Literal["all", "chain"] | None]:
    manifest = read_manifest(config.candidates)
    if manifest is not None and manifest.kind == kind_of(Comparison):
        return open_shards(config.candidates, Comparison), None
    shards = shard_file(
        config.candidates, out / "candidates", Candidate, shard_size=scale.shard_size
    )
    return shards, config.pairs


def _canaries(
    source: Shards[Any], pairs: Literal["all", "chain"] | None, n_prompts: int
) -> list[Canary]:
    if not n_prompts:
        return []
    records = source.read(source.shards[0])
    comparisons = records if pairs is None else pair_candidates(records, scheme=pairs)
    return canary_comparisons(comparisons, n_prompts=n_prompts)


class _Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    made_from: str
    judges: FittedJudges


def _fitted(
    judged: Shards[JudgedComparison], reliability: float | None, path: Path
) -> FittedJudges:
    """The judges fitted to the verdicts, kept in a file."""
    made_from = content_hash([judged.fingerprint, reliability, FIT_ON])
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
        if kept.made_from == made_from:
            return kept.judges
    except FileNotFoundError:
        pass
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Remove it to have it made again."
        ) from error
    fitted = fit_judges(_drawn(judged), reliability=reliability)
    encoded = msgspec.json.format(
        msgspec.json.encode(_Kept(made_from=made_from, judges=fitted)), indent=2
    )
    write_bytes(path, encoded + b"\n")
    return fitted


def _drawn(judged: Shards[JudgedComparison]) -> Iterator[list[JudgedComparison]]:
    """All prompts' comparisons, or those of about `FIT_ON` where there are more; shard by shard.

    A prompt is drawn by its hash, so that neither order nor shards matter.
    """
    import pyarrow.compute

    if judged.n_rows <= FIT_ON:
        for shard in judged.shards:
            yield judged.read(shard)
        return
    below = int(FIT_ON / judged.n_rows * 2**32)
    for shard in judged.shards:
        table = read_table(judged.folder, shard)
        prompt = pyarrow.compute.struct_field(
            table["comparison"].combine_chunks(), ["a", "prompt", "prompt_id"]
        )
        drawn = [int(content_hash(key)[:8], 16) < below for key in prompt.to_pylist()]
        rows = table.filter(pyarrow.array(drawn)).to_pylist()
        yield msgspec.convert(rows, list[JudgedComparison])


def _most_first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
