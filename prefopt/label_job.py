"""Candidates -> labels, in a folder: estimate, label, resume, report, export.

    labels/job.json            what was asked for, so that `resume_labels` needs nothing else
    labels/judgements.sqlite   every question, reply and dollar; a killed job goes on from it
    labels/judged.jsonl        the comparisons with their verdicts
    labels/preferences.jsonl   the labels, as TRL's trainers and `prefopt train` read them
    labels/left_out.jsonl      every comparison that gave none, and why
    labels/report/             what the verdicts are worth: label_report.html, .json, .txt

This module puts the judging functions in order; it decides nothing about verdicts or labels itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from prefopt.errors import DataError, RunError
from prefopt.preferences import LabelRule, Preferences, build_preferences, pair_candidates
from prefopt.types import Candidate, Comparison, JudgedComparison

if TYPE_CHECKING:
    from prefopt.judges.base import CostEstimate, Judge
    from prefopt.judges.label_report import LabelReport

logger = logging.getLogger(__name__)

Plan = Literal["both_orders", "one_order", "adaptive"]


@dataclass(frozen=True)
class LabelConfig:
    """Everything a labelling job needs to know.

    Args:
        candidates: file that `prefopt sample` wrote, or answers from elsewhere: rows with `prompt` and
            `answer`, `answers` (a list), `response_a` and `response_b`, or `chosen` and `rejected`
            (JSONL, JSON, Parquet, CSV, or a Hub dataset).
        out: the job's folder; the same folder continues the same job.
        judge: "rules:house_style", "anthropic:<model>", "local:<model>",
            "openai:<model>@<base_url>", "likelihood:<model>", "reward:<folder>",
            "scripted:shortest", "scripted:longest".
        second_judge: another judge. With plan "adaptive" it sees only what the first leaves open (give
            the cheaper one first); otherwise both see everything.
        rubric: what better means: "house_style", "helpful", or a text file.
        max_usd: the most that all paid judges of this job may cost together, in US dollars, however
            often it is continued; required for one.
        prices: JSON file with prices by model, for paid models whose prices are not built in or have
            changed: {"<model>": {"input_usd_per_mtok": ..., ...}}.
        transport: for Anthropic: "sync" (minutes), "batch" (half the price, within a day), or "auto"
            (batches from 500 calls on).
        plan: "both_orders" asks about every pair twice; "one_order" once; "adaptive" asks what is
            worth asking: pairs until they are sure enough, of more answers the best and the worst.
        pairs: which pairs of a prompt's answers, but for "adaptive": "all", or "chain" (a ring).
        rule: how verdicts become labels: "mean_grade" or "inferred". Plan "adaptive" needs "inferred".
        min_margin: for "mean_grade": the least mean grade, in (0, 2].
        min_p: the least p_chosen of a label, in [0.5, 1).
        pairs_per_prompt: keep at most this many labels a prompt, the widest apart first.
        reliability: in (0, 1], how far a judge's settled opinion is trusted in p_chosen. By default it
            is estimated where the verdicts show it (two judges, or three answers a prompt), else 1.
        canaries: on how many prompts the judge is tested with answers made to fool it (0: none).
    """

    candidates: str
    out: str
    judge: str = "rules:house_style"
    second_judge: str | None = None
    rubric: str = "house_style"
    max_usd: float | None = None
    prices: str | None = None
    transport: Literal["auto", "sync", "batch"] = "auto"
    plan: Plan = "both_orders"
    pairs: Literal["all", "chain"] = "all"
    rule: LabelRule = "mean_grade"
    min_margin: float = 1.0
    min_p: float = 0.5
    pairs_per_prompt: int | None = None
    reliability: float | None = None
    canaries: int = 4

    def __post_init__(self) -> None:
        problems = []
        if self.plan == "adaptive" and self.rule != "inferred":
            problems.append(
                "plan 'adaptive' asks too little for 'mean_grade'; give rule 'inferred'"
            )
        if self.canaries < 0:
            problems.append(f"canaries must be 0 or more, got {self.canaries}")
        if not 0.0 < self.min_margin <= 2.0:
            problems.append(f"min_margin must be in (0, 2], got {self.min_margin}")
        if not 0.5 <= self.min_p < 1.0:
            problems.append(f"min_p must be in [0.5, 1), got {self.min_p}")
        if self.reliability is not None and not 0.0 < self.reliability <= 1.0:
            problems.append(f"reliability must be in (0, 1], got {self.reliability}")
        if self.pairs_per_prompt is not None and self.pairs_per_prompt < 1:
            problems.append(f"pairs_per_prompt must be at least 1, got {self.pairs_per_prompt}")
        if problems:
            raise ValueError("label settings: " + "; ".join(problems) + ".")


class Labels(msgspec.Struct, frozen=True, kw_only=True):
    """What `label_candidates` returns."""

    preferences: Preferences
    report: LabelReport
    folder: str


def estimate_labels(config: LabelConfig) -> list[tuple[str, CostEstimate | None]]:
    """What the job would still cost, for each judge; None for one that is free. Asks nothing.

    For plan "adaptive" this is the most it can come to: every pair in both orders.

    Raises:
        DataError: the candidates cannot be used.
        JudgeUnavailable: a paid judge without a key.
    """
    from prefopt.judges.asking import estimate_missing

    candidates = _read_candidates(config)
    comparisons = _comparisons(config, candidates)
    comparisons += [c.comparison for c in _canaries(config, comparisons)]
    orders: Literal["both", "one"] = "one" if config.plan == "one_order" else "both"
    # No limit is needed to say what something would cost.
    unlimited = replace(config, max_usd=config.max_usd or math.inf)
    return [
        (
            judge.name,
            estimate_missing(comparisons, judge, orders=orders, ledger=_ledger(config)),
        )
        for judge in _judges(unlimited)
    ]


def label_candidates(config: LabelConfig, *, progress: bool = True) -> Labels:
    """Do a labelling job, or continue it. What was paid for before is not paid for again.

    Raises:
        DataError: the candidates cannot be used.
        JudgeError: asking cannot go on (credentials, budget); call again to continue.
        RunError: the folder holds a job with other settings.
    """
    from prefopt.data.records import write_records
    from prefopt.judges.asking import judge_comparisons
    from prefopt.judges.canaries import read_canaries

    candidates = _read_candidates(config)
    comparisons = _comparisons(config, candidates)
    judges = _judges(config)
    _claim_folder(config)
    folder = Path(config.out)
    canaries = _canaries(config, comparisons)
    # The canaries first: a judge that is fooled is better known before the money is spent.
    tested = judge_comparisons(
        [c.comparison for c in canaries], judges[0], ledger=_ledger(config), progress=False
    )
    judged = _judge(config, candidates, comparisons, judges, progress)
    write_records(folder / "judged.jsonl", judged)
    found = _export(config, judged, folder / "preferences.jsonl")
    report = _report(config, judged, found, judges, read_canaries(canaries, tested))
    return Labels(preferences=found, report=report, folder=config.out)


def resume_labels(out: str, *, max_usd: float | None = None, progress: bool = True) -> Labels:
    """Continue the job of a folder, with a new money limit where one is given.

    Raises:
        RunError: there is no job in the folder.
        JudgeError: as in `label_candidates`.
    """
    config = read_job(out)
    if max_usd is not None:
        config = replace(config, max_usd=max_usd)
    return label_candidates(config, progress=progress)


def report_labels(out: str) -> LabelReport:
    """Write the report of a job anew from what is in its folder. Asks nothing."""
    from prefopt.judges.asking import collect_judged
    from prefopt.judges.canaries import read_canaries
    from prefopt.judges.ledger import Ledger

    config = read_job(out)
    judged = _read_judged(out)
    found = _build(config, judged)
    judges = _judges(replace(config, max_usd=config.max_usd or math.inf))
    canaries = _canaries(config, _comparisons(config, _read_candidates(config)))
    with Ledger(_ledger(config)) as book:
        tested = list(collect_judged([c.comparison for c in canaries], judges[0], book))
    return _report(config, judged, found, judges, read_canaries(canaries, tested))


def export_labels(
    out: str,
    preferences: str,
    *,
    rule: LabelRule | None = None,
    min_margin: float | None = None,
    min_p: float | None = None,
    pairs_per_prompt: int | None = None,
    reliability: float | None = None,
    calibration: str | None = None,
) -> Preferences:
    """Make labels anew from a job's verdicts, with other thresholds. Asks nothing.

    Args:
        out: the job's folder.
        preferences: file to write (.jsonl or .parquet); what is left out goes to
            `<preferences>.left_out.jsonl`.
        rule: replaces the job's own where given.
        min_margin: likewise.
        min_p: likewise.
        pairs_per_prompt: likewise.
        reliability: likewise.
        calibration: a file that `prefopt judge calibrate` wrote for the same judge and rubric; its
            probabilities replace the inferred ones.

    Raises:
        DataError: nothing is judged yet, or the calibration is another judge's.
    """
    changes: dict[str, Any] = {
        "rule": rule,
        "min_margin": min_margin,
        "min_p": min_p,
        "pairs_per_prompt": pairs_per_prompt,
        "reliability": reliability,
    }
    config = replace(read_job(out), **{k: v for k, v in changes.items() if v is not None})
    return _export(config, _read_judged(out), Path(preferences), calibration)


def read_job(out: str) -> LabelConfig:
    """The settings of the job in a folder. Raises RunError where there is none."""
    path = Path(out) / "job.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=LabelConfig)
    except FileNotFoundError as error:
        raise RunError(
            f"there is no labelling job in {out} (no {path}). Start one with `prefopt judge label`."
        ) from error
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read as a labelling job: {error}. Restore it, or start the job in "
            "another folder."
        ) from error
    return replace(config, out=out)  # the folder may have been moved or copied


def _claim_folder(config: LabelConfig) -> None:
    from prefopt.data.records import write_bytes

    path = Path(config.out) / "job.json"
    if path.exists():
        # Raising the limit or moving the folder continues the job; anything else is another job.
        free = {"max_usd": None, "prices": None, "out": "", "transport": "auto"}
        before, now = ({**asdict(c), **free} for c in (read_job(config.out), config))
        changed = [f"{k}: {before[k]!r} -> {now[k]!r}" for k in now if before[k] != now[k]]
        if changed:
            raise RunError(
                f"{config.out} holds a labelling job with other settings ({'; '.join(changed)}). "
                "Choose another folder, or use `prefopt judge export` to change thresholds."
            )
    write_bytes(path, msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")


def _read_judged(out: str) -> list[JudgedComparison]:
    from prefopt.data.records import read_records

    path = Path(out) / "judged.jsonl"
    if not path.exists():
        raise DataError(f"there is no {path} yet: `prefopt judge resume --out {out}` makes it.")
    return read_records(path, JudgedComparison)


def _read_candidates(config: LabelConfig) -> list[Candidate]:
    from prefopt.data.candidates import load_candidates

    return load_candidates(config.candidates)


def _comparisons(config: LabelConfig, candidates: Sequence[Candidate]) -> list[Comparison]:
    scheme = "all" if config.plan == "adaptive" else config.pairs
    return pair_candidates(candidates, scheme=scheme)


def _judges(config: LabelConfig) -> list[Judge]:
    from prefopt.judges import load_judge

    specs = [config.judge, *([config.second_judge] if config.second_judge else [])]
    return [
        load_judge(
            spec,
            rubric=config.rubric,
            max_usd=config.max_usd,
            transport=config.transport,
            prices=config.prices,
        )
        for spec in specs
    ]


def _ledger(config: LabelConfig) -> Path:
    return Path(config.out) / "judgements.sqlite"


def _canaries(config: LabelConfig, comparisons: Sequence[Comparison]) -> list[Any]:
    from prefopt.judges.canaries import canary_comparisons

    if not config.canaries:
        return []
    return list(canary_comparisons(comparisons, n_prompts=config.canaries))


def _judge(
    config: LabelConfig,
    candidates: Sequence[Candidate],
    comparisons: Sequence[Comparison],
    judges: Sequence[Judge],
    progress: bool,
) -> list[JudgedComparison]:
    from prefopt.judges.asking import judge_comparisons
    from prefopt.judges.waves import judge_in_waves

    if config.plan == "adaptive":
        return judge_in_waves(candidates, judges, ledger=_ledger(config), progress=progress)
    orders: Literal["both", "one"] = "one" if config.plan == "one_order" else "both"
    first, *others = [
        judge_comparisons(
            comparisons, judge, orders=orders, ledger=_ledger(config), progress=progress
        )
        for judge in judges
    ]
    if not others:
        return first
    return [
        msgspec.structs.replace(one, more=tuple(v for other in rest for v in other.verdicts))
        for one, *rest in zip(first, *others, strict=True)
    ]


def _build(
    config: LabelConfig, judged: Sequence[JudgedComparison], calibration: str | None = None
) -> Preferences:
    fitted = None
    if calibration is not None:
        from prefopt.judges.calibration import UNINFORMATIVE, load_calibration
        from prefopt.judges.rubric import load_rubric

        fitted = load_calibration(calibration)
        if not fitted.informative:
            logger.warning("%s: %s", calibration, UNINFORMATIVE)
        for name in sorted({v.judge for j in judged for v in j.verdicts}):
            fitted.check(name, load_rubric(config.rubric).rubric_hash)
    return build_preferences(
        judged,
        rule=config.rule,
        min_margin=config.min_margin,
        min_p=config.min_p,
        pairs_per_prompt=config.pairs_per_prompt,
        reliability=config.reliability,
        calibrated_p_a=None if fitted is None else fitted.apply,
    )


def _export(
    config: LabelConfig,
    judged: Sequence[JudgedComparison],
    path: Path,
    calibration: str | None = None,
) -> Preferences:
    from prefopt.data.preference_data import save_preferences
    from prefopt.data.records import write_records

    found = _build(config, judged, calibration)
    left_out = path.parent / "left_out.jsonl"
    if path.name != "preferences.jsonl" or path.parent != Path(config.out):
        left_out = path.with_name(f"{path.name}.left_out.jsonl")
    write_records(left_out, found.left_out)
    if found.groups:
        save_preferences(found.groups, path)
    else:
        # No error: the report is yet to be written, and it says why.
        path.unlink(missing_ok=True)
        logger.warning("no comparison gave a label, so there is no %s", path)
    return found


def _report(
    config: LabelConfig,
    judged: Sequence[JudgedComparison],
    found: Preferences,
    judges: Sequence[Judge],
    canaries: Any,
) -> LabelReport:
    from prefopt.judges.label_report import label_report, write_label_report
    from prefopt.judges.ledger import Ledger

    with Ledger(_ledger(config)) as book:
        report = label_report(
            judged,
            judge=" and ".join(judge.name for judge in judges),
            rubric=judges[0].rubric,
            preferences=found,
            canaries=canaries,
            ledger=book,
        )
    write_label_report(report, Path(config.out) / "report")
    return report
