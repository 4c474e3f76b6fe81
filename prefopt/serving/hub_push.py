"""A finished folder -> a repository on the Hub, with its card; the only place that uploads models.

`plan_push` reads and checks everything without a network and says what would go where; `push` asks
the Hub whether it would take it and uploads then, one commit a repository. What is there already is
not sent again, so a push that was stopped is called once more and ends the same.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from prefopt.demo_model import DEMO_MODEL, DEMO_ON_THE_HUB
from prefopt.errors import DataError, HostedError
from prefopt.models import is_hub_id
from prefopt.serving.adapter_check import AdapterCheck, check_adapter
from prefopt.serving.model_card import (
    Kind,
    Provenance,
    model_card,
    read_provenance,
    shown,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

RepoType = Literal["model", "dataset"]

_CARRIED = re.compile(
    r"^(adapter_config\.json|adapter_model\.safetensors|config\.json|generation_config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer.*\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|chat_template\.(jinja|json)|training_log\.jsonl|[^/]+\.gguf|LICENSE.*|NOTICE.*)$"
)
"""What belongs into a model's repository. Anything else in the folder stays here and is named."""

_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "an Anthropic key": re.compile(r"\bsk-ant-[A-Za-z0-9_-]{20,}"),
    "an OpenAI key": re.compile(r"\bsk-(?!ant-)[A-Za-z0-9_-]{32,}"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_TEXT = (".json", ".jsonl", ".jinja", ".md", ".txt")


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """One repository and what it will hold: by name, the bytes, or the file they are read from."""

    repo_id: str
    repo_type: RepoType
    files: dict[str, bytes | Path]

    @property
    def card(self) -> str:
        """The README."""
        content = self.files["README.md"]
        return content.decode() if isinstance(content, bytes) else content.read_text("utf-8")

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(
            len(item) if isinstance(item, bytes) else item.stat().st_size
            for item in self.files.values()
        )


class PushPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a push would send, checked; `notes` are for whoever sends it."""

    uploads: tuple[Upload, ...]
    private: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for upload in self.uploads:
            seen = "private" if self.private else "public"
            lines.append(
                f"{upload.repo_type} {upload.repo_id} ({seen}): {len(upload.files)} files, "
                f"{upload.n_bytes / 1e6:.1f} MB"
            )
            lines += [f"  {name}" for name in sorted(upload.files)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def plan_push(
    repo: str,
    folder: str | Path,
    *,
    private: bool = True,
    run: str | Path | None = None,
    report: str | Path | None = None,
    labels: str | Path | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> PushPlan:
    """Read and check all that a push would send; sends nothing and needs no network.

    Args:
        repo: the model's "organisation/name".
        folder: an adapter, whole weights, GGUF files, or a run with an adapter in it.
        private: make private repositories, and refuse public ones.
        run: the run that made it, for the card; by default `folder` itself or the folder it lies in.
        report: folder of `prefopt evaluate`, for an evaluation outside the run.
        labels: folder of `prefopt judge label`, where the preferences came from one.
        dataset: "organisation/name" to push the run's preferences to as well.
        base_model: the base model's name on the Hub, where the run names a folder.
        license: the model's licence by the Hub's short name ("apache-2.0").

    Raises:
        DataError: anything that keeps it from being sent, all at once: names, missing or broken
            files, pickles, an adapter whose base model nobody else can load, keys in a file.
    """
    problems: list[str] = []
    given = Path(folder)
    run_folder = Path(run) if run is not None else _run_of(given)
    source = _what_to_push(given, problems)
    for name in [repo, *([dataset] if dataset else [])]:
        problems += _repo_problems(name)
    if dataset is not None and dataset == repo:
        problems.append("the model and the dataset need names of their own")

    provenance, adapter = Provenance(), None
    kind: Kind = "adapter"
    notes: list[str] = []
    files: dict[str, bytes | Path] = {}
    try:
        provenance = read_provenance(run_folder, report=report, labels=labels)
    except DataError as error:
        problems += error.problems or [str(error)]
    if source is not None:
        try:
            kind, files, adapter = _model_files(source, notes)
        except DataError as error:
            problems += [f"{source}: {text}" for text in error.problems or [str(error)]]
    base = _base_on_hub(base_model, provenance, adapter)
    if adapter is not None and base is None:
        problems.append(
            f"its base model is {adapter.base_model!r}, which nobody else has. Name the base model on "
            "the Hub (base_model), or merge the adapter first: prefopt merge"
        )
    if adapter is not None and base is not None and source is not None:
        files["adapter_config.json"] = _portable_config(source, base)
        adapter = msgspec.structs.replace(adapter, base_model=base)
    if license is None and base == DEMO_ON_THE_HUB:
        license = "apache-2.0"
    if license is None:
        notes.append("no licence is stated (license)")
    if provenance.report is None:
        notes.append("the card says that it was not evaluated (run or report)")

    uploads = []
    if dataset is not None:
        held = _dataset_files(run_folder, provenance.base_model, problems)
        uploads.append(Upload(repo_id=dataset, repo_type="dataset", files=held))
    if files and not problems:
        try:
            card = model_card(
                provenance, repo, kind=kind, base_model=base, license=license, dataset=dataset,
                adapter=adapter,
            )  # fmt: skip
        except ValueError as error:
            problems.append(f"the card's metadata: {error}")
        else:
            files["README.md"] = card.encode()
            uploads.append(Upload(repo_id=repo, repo_type="model", files=files))
    for upload in uploads:
        problems += _secrets_in(upload.files)
    if problems:
        raise DataError(f"{folder} cannot be pushed. Nothing was sent.", problems)
    return PushPlan(uploads=tuple(uploads), private=private, notes=tuple(notes))


def push(plan: PushPlan) -> list[str]:
    """Send what was planned; returns the repositories' addresses.

    Before the first byte is sent, the Hub is asked who is logged in, whether the cards are valid,
    and whether repositories that exist are private where that was asked for. The dataset goes first,
    as the model's card points to it.

    Raises:
        HostedError: nobody is logged in, or the Hub refuses or cannot be reached; says what was sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    api = HfApi()
    sent: list[str] = []
    try:
        api.whoami()
        _ask_before(api, plan)
        for upload in plan.uploads:
            api.create_repo(
                upload.repo_id, repo_type=upload.repo_type, private=plan.private, exist_ok=True
            )
            if plan.private:
                _must_be_private(api, upload)
            what = "preferences" if upload.repo_type == "dataset" else "model"
            api.create_commit(
                upload.repo_id,
                [
                    CommitOperationAdd(path_in_repo=name, path_or_fileobj=item)
                    for name, item in sorted(upload.files.items())
                ],
                commit_message=f"The {what}, by prefopt",
                repo_type=upload.repo_type,
            )
            kind = "datasets/" if upload.repo_type == "dataset" else ""
            sent.append(f"{api.endpoint}/{kind}{upload.repo_id}")
    except (HTTPError, LocalTokenNotFoundError, OSError, ValueError, RuntimeError) as error:
        done = (
            f"Sent before that: {', '.join(sent)}. "
            if sent
            else "Nothing was committed, as far as is known. "
        )
        raise HostedError(
            f"the Hub does not take it: {_first_lines(error)} {done}Check the name and the "
            "connection, and log in with `hf auth login` using a token that may write; the same "
            "command then goes on, and sends nothing twice."
        ) from error
    return sent


def _ask_before(api: HfApi, plan: PushPlan) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    for upload in plan.uploads:
        _check_card(upload)
        if plan.private:
            try:
                _must_be_private(api, upload)
            except RepositoryNotFoundError:
                continue


def _check_card(upload: Upload) -> None:
    """Ask the Hub that is set; huggingface_hub's own question went to huggingface.co before 2.2."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status

    response = get_session().post(
        f"{constants.ENDPOINT}/api/validate-yaml",
        json={"repoType": upload.repo_type, "content": upload.card},
        headers={"Accept": "text/plain"},
    )
    if response.status_code == 400:
        raise ValueError(response.text)
    hf_raise_for_status(response)


def _must_be_private(api: HfApi, upload: Upload) -> None:
    if not api.repo_info(upload.repo_id, repo_type=upload.repo_type).private:
        raise HostedError(
            f"the Hub's {upload.repo_type} {upload.repo_id} exists and is public, and private was "
            "asked for. Nothing was sent to it; make it private, or pass --private false."
        )


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__


def _run_of(folder: Path) -> Path | None:
    for place in (folder, folder.absolute().parent):
        if (place / "run.json").is_file():
            return place
    return None


def _what_to_push(folder: Path, problems: list[str]) -> Path | None:
    """The folder with the weights: itself, or the adapter of a run."""
    if not folder.is_dir():
        problems.append(f"there is no folder {str(folder)!r}")
        return None
    if not (folder / "run.json").is_file():
        return folder
    if (folder / "adapter").is_dir():
        return folder / "adapter"
    if (folder / "ppo").is_dir():
        problems.append(
            f"{folder} is a classic run: its adapter belongs to the SFT model beside it, which nobody "
            f"else has. Merge them first: prefopt merge --model {folder}/sft --adapter {folder}/ppo "
            f"--out merged, then push --folder merged --run {folder}"
        )
        return None
    problems.append(f"the run in {folder} has no adapter yet; let it finish")
    return None


def _model_files(
    source: Path, notes: list[str]
) -> tuple[Kind, dict[str, bytes | Path], AdapterCheck | None]:
    """Everything of a model's folder that belongs into its repository.

    Raises:
        DataError: it holds no weights, or ones that cannot be read.
    """
    files: dict[str, bytes | Path] = {}
    stays = []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name == "README.md":
            continue  # the card is written anew
        if path.is_file() and _CARRIED.match(path.name):
            files[path.name] = path
        else:
            stays.append(path.name + ("/" if path.is_dir() else ""))
    if stays:
        notes.append(f"stays here: {', '.join(stays[:8])}{' …' if len(stays) > 8 else ''}")
    adapter = None
    kind: Kind
    if "adapter_config.json" in files or "adapter_model.safetensors" in files:
        adapter = check_adapter(source)
        kind = "adapter"
        if adapter.peft:
            raise DataError("", list(adapter.peft))
        notes += [f"vLLM: {problem}" for problem in adapter.vllm]
    elif "config.json" in files and any(name.endswith(".safetensors") for name in files):
        kind = "model"
    elif any(name.endswith(".gguf") for name in files):
        kind = "gguf"
    else:
        raise DataError(
            "",
            [
                "there are no weights: it needs adapter_config.json and adapter_model.safetensors, "
                "config.json and model*.safetensors, or .gguf files"
            ],
        )
    _readable(files)
    if kind != "gguf" and not any(name.startswith("tokenizer") for name in files):
        notes.append("there is no tokenizer in the folder; users take the base model's")
    return kind, files, adapter


def _readable(files: dict[str, bytes | Path]) -> None:
    from safetensors import SafetensorError, safe_open

    problems = []
    for name, path in files.items():
        if isinstance(path, bytes):
            continue
        try:
            if name.endswith(".safetensors"):
                with safe_open(path, framework="numpy"):
                    pass
            elif name.endswith(".gguf"):
                with path.open("rb") as file:
                    if file.read(4) != b"GGUF":
                        problems.append(f"{name} is no GGUF file")
            elif name.endswith(".json"):
                json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            problems.append(f"{name} cannot be read: {error}")
    index = files.get("model.safetensors.index.json")
    if isinstance(index, Path) and not problems:
        shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        problems += [f"{shard} is missing" for shard in sorted(shards - set(files))]
    if problems:
        raise DataError("", problems)


def _portable_config(source: Path, base: str) -> bytes:
    """The adapter's settings with a base model that others can load, and no folder of this machine."""
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _base_on_hub(
    named: str | None, provenance: Provenance, adapter: AdapterCheck | None
) -> str | None:
    for name in (named, provenance.base_model, adapter.base_model if adapter else None):
        if name == DEMO_MODEL or (name and "smollm2-135m-instruct-" in Path(name).name):
            return DEMO_ON_THE_HUB
        if name and is_hub_id(name):
            return name
    return None


def _dataset_files(
    run: Path | None, base_model: str, problems: list[str]
) -> dict[str, bytes | Path]:
    """A run's preferences and their card, without the folders that models have on this machine."""
    from prefopt.data.preference_data import load_preferences

    if run is None or not (run / "dataset" / "train.jsonl").is_file():
        problems.append(
            "there is no dataset to push: give the run that made it (run), or use "
            "prefopt.push_preferences"
        )
        return {"README.md": b""}
    files: dict[str, bytes | Path] = {}
    models = {base_model}
    try:
        groups = load_preferences(str(run / "dataset" / "train.jsonl"))
        models |= {answer.model for group in groups for answer in group.answers}
    except DataError as error:
        problems += error.problems or [str(error)]
    told = {name: shown(name) for name in sorted(models, key=len, reverse=True)}
    private = {name: short for name, short in told.items() if name != short}
    for name in ("train.jsonl", "README.md"):
        path = run / "dataset" / name
        if not path.is_file():
            problems.append(f"there is no {name} in {path.parent}")
            return {"README.md": b""}
        files[name] = path
        if private:
            text = path.read_text(encoding="utf-8")
            for long, short in private.items():
                for written in (long, json.dumps(long)[1:-1]):  # as in Markdown and as in JSON
                    text = text.replace(written, short)
            files[name] = text.encode()
    return files


def _repo_problems(name: str) -> list[str]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name != name.strip():
        return [f"{name!r} is no name on the Hub: it begins or ends with white space"]
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return [f"{name!r} is no name on the Hub: {error}"]
    return [] if "/" in name else [f"{name!r} lacks its owner: organisation/{name}"]


def _secrets_in(files: dict[str, bytes | Path]) -> Iterator[str]:
    for name, item in sorted(files.items()):
        if not name.endswith(_TEXT):
            continue
        with io.BytesIO(item) if isinstance(item, bytes) else item.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8", errors="replace")
                for kind, pattern in _SECRETS.items():
                    if pattern.search(text):
                        yield f"{name}, line {number} holds what looks like {kind}"
