"""A run folder and its report -> the model card: where the model comes from and what is known of it.

In: what `prefopt run`, `classic`, `judge label` and `evaluate` left behind. Out: `Provenance`, and the
card in Markdown with the Hub's metadata. Every figure is read from those files or counted from them;
what they do not say, the card says is not known. Folders of this machine are named by their last part.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from prefopt.data.dataset_card import inert
from prefopt.data.records import iter_records, read_records
from prefopt.errors import DataError
from prefopt.evaluation.advice import interval, percent, signed_percent
from prefopt.evaluation.eval_report import EvalReport, installed_versions
from prefopt.judges.label_report import LabelReport, label_report
from prefopt.judges.rubric import Rubric
from prefopt.models import is_hub_id
from prefopt.preferences import Preferences
from prefopt.types import Candidate, JudgedComparison, LeftOut, PreferenceGroup

if TYPE_CHECKING:
    from prefopt.serving.adapter_check import AdapterCheck

Kind = Literal["adapter", "model", "gguf"]
"""What is in the repository: a LoRA adapter, whole weights, or GGUF files alone."""

_METHOD = {"dpo": "DPO", "ppo": "SFT, a reward model and PPO"}
_SETTINGS = (
    "dpo",
    "lora",
    "sft",
    "sft_lora",
    "reward",
    "reward_lora",
    "ppo",
    "ppo_lora",
    "sampling",
)


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of how a model came to be. None, "" and empty mean: the files do not say.

    Fields:
        method: how it was trained, in words.
        base_model: as the run was given it ("demo", a Hub id, a folder).
        prompts: where they come from; n_prompts of them were trained on.
        answered_by: answers that were judged, by the model that wrote them.
        judge, rubric: who compared the answers, and by what.
        labels: what the verdicts are worth, where the run judged.
        n_pairs: preferences that were trained on.
        left_out: comparisons that became no preference, by reason.
        spent_usd: US dollars for judging, in training and evaluation together.
        settings: of each part of the training, by name.
        report: the evaluation.
        versions: of what it was made with.
    """

    method: str = ""
    base_model: str = ""
    prompts: str = ""
    n_prompts: int | None = None
    answered_by: dict[str, int] = {}
    judge: str = ""
    rubric: Rubric | None = None
    labels: LabelReport | None = None
    n_pairs: int | None = None
    left_out: dict[str, int] = {}
    spent_usd: float | None = None
    settings: dict[str, dict[str, Any]] = {}
    report: EvalReport | None = None
    versions: dict[str, str] = {}


def shown(name: str) -> str:
    """A name as strangers may read it: of a folder or file only the last part."""
    if is_hub_id(name) or ("/" not in name and "\\" not in name):
        return name
    return Path(name.replace("\\", "/")).name


def read_provenance(
    run: str | Path | None = None,
    *,
    report: str | Path | None = None,
    labels: str | Path | None = None,
) -> Provenance:
    """Gather what the folders of a tuning say.

    Args:
        run: folder of `prefopt run` or `prefopt classic`.
        report: folder of `prefopt evaluate`, instead of the run's own report.
        labels: folder of `prefopt judge label`, where the preferences come from one.

    Raises:
        DataError: a folder holds none of what it should, or a file cannot be read; all at once.
    """
    problems: list[str] = []
    evaluation = _report(Path(report), problems) if report is not None else None
    job = _job(Path(labels), problems) if labels is not None else {}
    if run is None:
        _stop_at(problems)
        return Provenance(
            **_of_report(evaluation), **job, report=evaluation, versions=installed_versions()
        )
    folder = Path(run)
    config = _json(folder / "run.json", problems)
    manifest = _json(folder / "manifest.json", problems)
    if evaluation is None and report is None and (folder / "report" / "report.json").is_file():
        evaluation = _report(folder / "report", problems)
    for path, read, names in (
        (folder / "run.json", config, _SETTINGS),
        (folder / "manifest.json", manifest, ("versions",)),
    ):
        wrong = [name for name in names if not isinstance(read.get(name) or {}, dict)]
        problems += [f"{path} holds no {name} by name" for name in wrong]
    _stop_at(problems)
    method = next((text for key, text in _METHOD.items() if key in config), "")
    losses = (config.get("dpo") or {}).get("loss")
    if losses:
        method += f" ({', '.join(map(str, losses)) if isinstance(losses, list) else losses})"
    values: dict[str, Any] = {
        "method": method,
        "base_model": str(config.get("model", "")),
        "prompts": _prompts(str(config.get("preferences") or config.get("prompts", ""))),
        "settings": {
            name: {key: value for key, value in config[name].items() if value not in (None, [], {})}
            for name in _SETTINGS
            if isinstance(config.get(name), dict)
        },
        "versions": manifest.get("versions") or {},
        "report": evaluation,
        **_of_report(evaluation),
        **_counted(folder, evaluation),
        **job,
    }
    return Provenance(**values)


def _report(folder: Path, problems: list[str]) -> EvalReport | None:
    path = folder / "report.json" if folder.is_dir() else folder
    try:
        return msgspec.json.decode(path.read_bytes(), type=EvalReport)
    except FileNotFoundError:
        problems.append(f"there is no report.json in {folder}")
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        problems.append(f"{path} cannot be read: {error}")
    return None


def _job(folder: Path, problems: list[str]) -> dict[str, Any]:
    """What a labelling job says of its labels."""
    path = folder / "report" / "label_report.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=LabelReport)
    except FileNotFoundError:
        problems.append(f"there is no report/label_report.json in {folder}: not a labelling job's")
        return {}
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return {}
    return {
        "labels": found,
        "n_pairs": found.n_labels,
        "left_out": {name: n for name, n in found.outcomes.items() if name != "labelled"},
    }


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(read, dict):
            return read
        problems.append(f"{path} holds no settings by name")
    except FileNotFoundError:
        problems.append(f"there is no {path.name} in {path.parent}: not a run's folder")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} cannot be read: {error}")
    return {}


def _stop_at(problems: list[str]) -> None:
    if problems:
        raise DataError("where the model comes from cannot be told:", problems)


def _of_report(report: EvalReport | None) -> dict[str, Any]:
    if report is None:
        return {}
    rubric = (
        Rubric(name=report.rubric_name, text=report.rubric_text) if report.rubric_text else None
    )
    return {"judge": report.judge, "rubric": rubric, "spent_usd": report.cost_usd}


def _prompts(named: str) -> str:
    return "prefopt's built-in everyday prompts" if named == "everyday" else shown(named)


def _counted(folder: Path, report: EvalReport | None) -> dict[str, Any]:
    """What the run's own files add up to."""
    found: dict[str, Any] = {}
    paths = {name: folder / f"{name}.jsonl" for name in
             ("train_prompts", "candidates", "preferences", "left_out", "judged")}  # fmt: skip
    if paths["train_prompts"].is_file():
        with paths["train_prompts"].open("rb") as file:
            found["n_prompts"] = sum(bool(line.strip()) for line in file)
    if paths["candidates"].is_file():
        models = Counter(c.model for c in iter_records(paths["candidates"], Candidate))
        found["answered_by"] = dict(models.most_common())
    if not paths["preferences"].is_file():
        return found
    groups = tuple(read_records(paths["preferences"], PreferenceGroup))
    found["n_pairs"] = sum(len(group.preferences) for group in groups)
    if not paths["left_out"].is_file():
        return found
    left_out = tuple(read_records(paths["left_out"], LeftOut))
    found["left_out"] = dict(Counter(item.reason for item in left_out).most_common())
    if paths["judged"].is_file() and report is not None and report.rubric_text:
        judged = read_records(paths["judged"], JudgedComparison)
        found["labels"] = label_report(
            judged,
            judge=report.judge,
            rubric=Rubric(name=report.rubric_name, text=report.rubric_text),
            preferences=Preferences(
                groups=groups,
                left_out=left_out,
                n_comparisons=len(judged),
                n_flipped=sum(item.flipped for item in judged),
            ),
            created_at="",
        )
    return found


def model_card(
    provenance: Provenance,
    repo_id: str,
    *,
    kind: Kind,
    base_model: str | None,
    license: str | None = None,
    dataset: str | None = None,
    adapter: AdapterCheck | None = None,
) -> str:
    """The README of a tuned model, with the metadata that the Hub reads.

    Args:
        provenance: what is known of it.
        repo_id: "organisation/name" that it will have.
        kind: what is in the repository.
        base_model: its base model's name on the Hub; None where it has none there.
        license: its licence by the Hub's short name; None where it is not stated.
        dataset: the Hub's name of the preferences it was trained on.
        adapter: what was found in the adapter's folder, for a `kind` of "adapter".

    Raises:
        ValueError: the metadata are none that the Hub takes.
    """
    from huggingface_hub import ModelCardData

    rubric_hash = provenance.rubric.rubric_hash if provenance.rubric else ""
    base = base_model or shown(provenance.base_model) or "a base model that is not named"
    trained, answered_by = provenance.base_model, provenance.answered_by
    settings = provenance.settings

    def said(name: str) -> str:
        """A model's name, of the base model the one that others know."""
        return base if name == trained else shown(name)

    results = _results(provenance.report, said)
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=(
            {"adapter": "adapter", "model": "finetune", "gguf": "quantized"}[kind]
            if base_model
            else None
        ),
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
        library_name={"adapter": "peft", "model": "transformers", "gguf": "llama.cpp"}[kind],
        license=license,
        model_name=repo_id.rpartition("/")[2] if results else None,
        pipeline_tag="text-generation",
        tags=[
            "prefopt",
            *(["lora"] if kind == "adapter" else []),
            *_method_tags(provenance.method),
        ],
    )
    # From here on it is Markdown, and its words are other people's.
    answers = ", ".join(f"{n:,} by {inert(said(name))}" for name, n in answered_by.items())
    tuned_from = "" if provenance.report is None else provenance.report.base_model
    if provenance.report is not None:
        report = msgspec.structs.replace(provenance.report, answers=())
        provenance = msgspec.structs.replace(provenance, report=report)
    provenance = inert(provenance)
    method = provenance.method or "preferences"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        f"{_article(kind)} {inert(base)}, tuned with {method} by "
        "[prefopt](https://pypi.org/project/prefopt/).",
        "## Use",
        _use(kind, repo_id, base, adapter),
        "## Is it better?",
        _better(provenance.report, inert(said(tuned_from))),
        *_forgotten(provenance.report),
        "## Where the data come from",
        _data(provenance, dataset, answers, rubric_hash),
        "## What the judge is worth",
        _judge_quality(provenance),
        "## What it cost",
        "Judging: not known."
        if provenance.spent_usd is None
        else f"Judging cost ${provenance.spent_usd:.2f}, training data and evaluation together.",
        "## How it was trained",
        _training(settings, provenance.versions),
        "## Licence and limits",
        _limits(inert(license), inert(base), provenance),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _article(kind: Kind) -> str:
    return {
        "adapter": "A LoRA adapter for",
        "model": "The whole weights of",
        "gguf": "GGUF files, for llama.cpp and Ollama, of",
    }[kind]


def _method_tags(method: str) -> list[str]:
    return [tag for tag in ("dpo", "ppo", "sft") if tag in method.lower()]


def _results(report: EvalReport | None, said: Callable[[str], str]) -> list[Any]:
    """The evaluation as entries of the Hub's model-index; shares are fractions."""
    from huggingface_hub import EvalResult

    if report is None:
        return []
    rate = report.win_rate

    def entry(metric: str, name: str, value: float, dataset: str, **arguments: Any) -> Any:
        return EvalResult(
            task_type="text-generation",
            dataset_type="prompts" if dataset == report.prompts_name else "tasks",
            dataset_name=dataset,
            metric_type=metric,
            metric_name=name,
            metric_value=round(float(value), 4),
            metric_args={key: item for key, item in arguments.items() if item is not None} or None,
        )

    base = said(report.base_model)
    found = [
        entry(
            "win_rate",
            f"win rate over {base}, judged by {report.judge}",
            rate.win_rate,
            report.prompts_name,
            low=round(rate.wilson_low, 4),
            high=round(rate.wilson_high, 4),
            n_prompts=rate.n_prompts,
        )
    ]
    control = report.length_control
    if control is not None and control.win_rate is not None:
        found.append(
            entry(
                "length_controlled_win_rate",
                f"win rate over {base} at equal length",
                control.win_rate,
                report.prompts_name,
                low=None if control.low is None else round(control.low, 4),
                high=None if control.high is None else round(control.high, 4),
            )
        )
    if report.perplexity_tuned is not None:
        found.append(
            entry(
                "perplexity",
                "perplexity",
                report.perplexity_tuned,
                report.perplexity_text,
                base=round(report.perplexity_base or 0.0, 4),
            )
        )
    for task in report.capabilities.tasks if report.capabilities else ():
        found.append(
            entry(
                task.metric, task.metric, task.tuned, task.title, base=round(task.base, 4), n=task.n
            )
        )
    return found


def _use(kind: Kind, repo_id: str, base: str, adapter: AdapterCheck | None) -> str:
    if kind == "gguf":
        return _fence("bash", f"llama-server -hf {repo_id}\nollama run hf.co/{repo_id}")
    if kind == "model":
        return _fence("bash", f"vllm serve {repo_id}")
    python = (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")'
    )
    if adapter is None or adapter.vllm:
        return _fence("python", python)
    rank = adapter.vllm_max_lora_rank
    vllm = (
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank} \\\n"
        f"    --lora-modules tuned={repo_id}"
    )
    return _fence("python", python) + "\n\n" + _fence("bash", vllm)


def _fence(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _better(report: EvalReport | None, base: str) -> str:
    if report is None:
        return "Not evaluated: no report came with it."
    rate = report.win_rate
    rows: list[list[object]] = [
        [
            f"win rate over {base}",
            percent(rate.win_rate),
            interval(rate.wilson_low, rate.wilson_high),
        ]
    ]
    control = report.length_control
    if control is not None and control.win_rate is not None:
        bounds = "-"
        if control.low is not None and control.high is not None:
            bounds = interval(control.low, control.high)
        rows.append(["the same at equal length", percent(control.win_rate), bounds])
    lines = [
        _table(["", "", "95 % interval"], rows),
        f"{rate.n} comparisons of answers to {rate.n_prompts} {report.prompts_name}, asked in both "
        f"orders: {rate.n_win} won, {rate.n_tie} tied ({rate.n_flipped} because the order decided), "
        f"{rate.n_loss} lost, {rate.n_unscored} without a verdict. Judge: {report.judge}.",
        f"Answers have {rate.mean_words_tuned:.0f} words on average, the base model's "
        f'{rate.mean_words_baseline:.0f}; the rule "the shorter answer wins" would give '
        f"{percent(rate.shortest_wins_share)}.",
    ]
    if control is not None and control.win_rate is None:
        lines.append(f"At equal length it cannot be told: {'; '.join(control.notes)}")
    return "\n\n".join(lines)


def _forgotten(report: EvalReport | None) -> list[str]:
    if report is None or (report.perplexity_change is None and report.capabilities is None):
        return []
    parts = ["## What did it forget?"]
    if report.perplexity_change is not None:
        parts.append(
            f"Perplexity on {report.perplexity_text}: {report.perplexity_tuned:.2f}, the base "
            f"model's {report.perplexity_base:.2f} ({signed_percent(report.perplexity_change)})."
        )
    if report.capabilities is not None:
        rows = [
            [t.title, t.metric, f"{t.base:.3f}", f"{t.tuned:.3f}", t.n, t.verdict]
            for t in report.capabilities.tasks
        ]
        head = ["task", "metric", "base", "tuned", "items", "paired test"]
        parts.append(_table(head, rows))
        parts += [f"Not run: {reason}." for reason in report.capabilities.left_out]
    return parts


def _data(provenance: Provenance, dataset: str | None, answers: str, rubric_hash: str) -> str:
    rubric = provenance.rubric
    rows: list[list[object]] = [
        ["prompts", provenance.prompts or "not stated"],
        ["prompts trained on", _number(provenance.n_prompts)],
        ["answers", answers or "not stated"],
        ["judge", provenance.judge or "not stated"],
        ["rubric", f"{rubric.name}, hash {rubric_hash}" if rubric else "not stated"],
        ["preferences", _number(provenance.n_pairs)],
        [
            "left out",
            ", ".join(f"{n:,} {reason}" for reason, n in provenance.left_out.items())
            or "none known",
        ],
    ]
    if dataset:
        rows.append(["published as", f"[{dataset}](https://huggingface.co/datasets/{dataset})"])
    text = _table(["", ""], rows)
    if rubric:
        text += f"\n\nThe rubric:\n\n{_quoted(rubric.text)}"
    return text


def _judge_quality(provenance: Provenance) -> str:
    labels = provenance.labels
    if labels is None:
        report = provenance.report
        if report is None or report.labels is None or report.labels.flip_rate is None:
            return "Not known: the verdicts behind the labels did not come with the model."
        return f"In {percent(report.labels.flip_rate)} of the comparisons the order decided."
    rows: list[list[object]] = []
    for name, share in (
        ("the two orders named opposite winners", labels.flips),
        ("a verdict named the answer shown first", labels.first_place),
        ("verdicts that were ties", labels.ties),
        ("the longer answer won", labels.longer_wins),
    ):
        if share is not None:
            rows.append([name, percent(share.share), interval(share.low, share.high), share.n])
    failed = ", ".join(f"{n} {reason}" for reason, n in labels.failures.items()) or "none"
    note = provenance.report.judge_note if provenance.report else ""
    return "\n\n".join(
        part
        for part in (
            _table(["of the training comparisons", "share", "95 % interval", "of"], rows),
            f"{labels.n_verdicts:,} verdicts on {labels.n_comparisons:,} comparisons; "
            f"failed: {failed}.",
            "\n".join(f"- {warning}" for warning in labels.warnings),
            note or "No comparison with people's labels came with it.",
        )
        if part
    )


def _training(settings: dict[str, dict[str, Any]], versions: dict[str, str]) -> str:
    if not settings:
        return "The settings are not known."
    rows = [
        [inert(f"{part}.{name}"), inert(_plain(value))]
        for part, values in settings.items()
        for name, value in values.items()
    ]
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = (
        "<details><summary>All settings</summary>\n\n"
        + _table(["setting", "value"], rows)
        + "\n\n</details>"
    )
    return text + (f"\n\nMade with {made}." if made else "")


def _limits(license: str | None, base: str, provenance: Provenance) -> str:
    lines = [
        f"- Licence: {license}." if license else "- Licence: not stated here.",
        f"- What the licence of {base} asks holds for this model too.",
        "- It has the knowledge and the faults of its base model; preferences changed how it answers.",
    ]
    if provenance.report is not None:
        lines.append(
            "- Better means: by this judge, under this rubric, on prompts of this kind. Nothing else "
            "was measured."
        )
        lines += [
            f"- {note.level}: {note.message}"
            for note in provenance.report.health
            if note.level != "ok"
        ]
    return "\n".join(lines)


def _number(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Sequence):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _table(head: list[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        return (
            "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
        )

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
