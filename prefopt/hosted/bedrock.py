"""Fine-tuning Claude, and what else Amazon Bedrock fine-tunes, by its model customization jobs.

    jobs/mine/job.json   the whole job, written down before Bedrock hears of it

A job costs money and takes hours, so it must not be made twice. Its name and its client request
token are on disk before the first call; whoever finds them there first asks Bedrock for a job of
that name, and only if there is none sends the same request with the same token again, which Bedrock
takes for the same request. This file alone knows boto3.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from prefopt.data.export import check_export
from prefopt.data.export_formats import CHARACTERS_A_TOKEN, FORMATS, Format
from prefopt.data.records import write_bytes
from prefopt.errors import DataError, HostedError, RunError
from prefopt.folder_lock import locked_folder

logger = logging.getLogger(__name__)

PRICES = "https://aws.amazon.com/bedrock/pricing/"

_FORMATS = {
    "anthropic.claude": FORMATS["bedrock-claude"],
    "amazon.nova": FORMATS["bedrock-nova"],
    "meta.llama3-2": FORMATS["bedrock-llama"],
    "meta.llama3-3": FORMATS["bedrock-llama"],
}

# docs.aws.amazon.com/bedrock/latest/userguide/cm-hp-anth-claude-3.html
_CLAUDE_RANGES: dict[str, tuple[type[int] | type[float], float, float]] = {
    "epochCount": (int, 1, 10),
    "batchSize": (int, 4, 256),
    "learningRateMultiplier": (float, 0.1, 2),
    "earlyStoppingThreshold": (float, 0, 0.1),
    "earlyStoppingPatience": (int, 1, 10),
}
_CLAUDE_EPOCHS = 2
"""Bedrock's own default for Claude, used only to say what a job would cost."""

# What the CreateModelCustomizationJob API takes; boto3 itself checks lengths only.
_NAME = re.compile(r"(?=.{1,63}$)[0-9a-zA-Z](-?[0-9a-zA-Z])*")  # of a job and of a model
_ROLE = re.compile(r"arn:aws(-[^:]+)?:iam::[0-9]{12}:role/.+")
_S3 = re.compile(r"s3://[a-z0-9][-.a-z0-9]{1,61}[a-z0-9](/[-!_*'().a-zA-Z0-9]+)*/?")

_OVER = ("Completed", "Failed", "Stopped")


class JobRecord(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.bedrock_job/1",
):
    """A job as it is kept on disk.

    `state` is "intended" from before the first call until Bedrock has said that it has the job,
    "submitted" from then on. `status` and what follows are what Bedrock last said.
    """

    name: str
    model_name: str
    base_model: str
    role: str
    region: str
    train: str
    train_sha256: str
    train_uri: str
    validation: str | None = None
    validation_sha256: str | None = None
    validation_uri: str | None = None
    output_uri: str
    hyperparameters: dict[str, str]
    token: str
    state: Literal["intended", "submitted"] = "intended"
    arn: str | None = None
    status: str | None = None
    model_arn: str | None = None
    failure: str | None = None

    @property
    def over(self) -> bool:
        """Whether Bedrock will do no more for this job."""
        return self.status in _OVER


class JobPlan(NamedTuple):
    """A job that was checked and may be sent, and what is known of its cost.

    `tokens` an epoch are AWS's planning figure (six characters a token); text with shorter words,
    code and other scripts have more.
    """

    record: JobRecord
    n_rows: int
    tokens: int
    epochs: int | None
    usd_per_million_tokens: float | None

    def __str__(self) -> str:
        """What would be made and what it would cost, to be read before consenting."""
        job = self.record
        epochs = f"{self.epochs} epochs" if self.epochs else "the model's default number of epochs"
        lines = [
            f"Fine-tuning {job.base_model} in {job.region}, as job {job.name}",
            f"  data    {self.n_rows:,} rows of {job.train}, uploaded to {job.train_uri}",
            *([f"  checked on {job.validation}"] if job.validation else []),
            f"  tokens  about {self.tokens:,} an epoch at {CHARACTERS_A_TOKEN} characters a token, "
            f"perhaps half as many again or twice; {epochs}",
        ]
        if self.usd_per_million_tokens is None or self.epochs is None:
            lines.append(
                f"  cost    not known: Bedrock charges for every token trained on, every epoch; see "
                f"{PRICES}"
            )
        else:
            usd = self.tokens * self.epochs * self.usd_per_million_tokens / 1e6
            lines.append(
                f"  cost    about ${usd:,.2f} to ${2 * usd:,.2f} for training, at the price given"
            )
        lines.append(
            "  later   Bedrock charges for keeping the model by the month, and for the capacity "
            "that serves it by the hour"
        )
        return "\n".join(lines)


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What Bedrock says of a job. `steps` are the states of validation, data and training."""

    name: str
    arn: str
    status: str
    created: str
    base_model: str = ""
    model_arn: str | None = None
    steps: dict[str, str] = {}
    failure: str | None = None
    training_loss: float | None = None
    validation_losses: tuple[float, ...] = ()

    def __str__(self) -> str:
        steps = ", ".join(f"{name} {state}" for name, state in self.steps.items())
        lines = [f"{self.name}: {self.status}{f' ({steps})' if steps else ''}"]
        if self.status == "Completed":
            if self.training_loss is not None:
                lines.append(f"  training loss {self.training_loss:.4g}")
            lines += [f"  validation loss {loss:.4g}" for loss in self.validation_losses]
            lines.append(f"  model {self.model_arn or 'in the Bedrock console'}")
        if self.status == "Failed" and self.failure:
            lines.append(f"  {self.failure}")
        return "\n".join(lines)


class TunableModel(NamedTuple):
    """A model that Bedrock fine-tunes in a region, and how long it will be there."""

    model_id: str
    provider: str
    lifecycle: str


# --- Planning ----------------------------------------------------------------------------------------


def plan_job(
    train: str,
    *,
    base_model: str,
    role: str,
    s3: str,
    validation: str | None = None,
    name: str | None = None,
    region: str | None = None,
    hyperparameters: Mapping[str, int | float | str] | None = None,
    usd_per_million_tokens: float | None = None,
) -> JobPlan:
    """Check everything that can be checked here, and say what a job would be. Nothing is sent.

    Args:
        train: the .jsonl file, as `prefopt export` writes it: "bedrock-claude" for Claude,
            "bedrock-nova" for Nova, "bedrock-llama" for Llama.
        base_model: the id of a model that Bedrock fine-tunes in the region; see `tunable_models`.
        role: the ARN of the IAM role by which Bedrock reads the data and writes the results.
        s3: "s3://bucket/prefix" for both, in the same region.
        validation: a second such file, to measure the loss on.
        name: the job's and the model's name, letters, digits and hyphens; made up if None.
        region: the AWS region; that of the environment or the AWS configuration if None.
        hyperparameters: by Bedrock's names, such as epochCount; its defaults where not given.
        usd_per_million_tokens: the price of training from AWS's list, to work out the cost.

    Raises:
        DataError: anything that cannot work, all at once.
    """
    problems: list[str] = []
    token = secrets.token_hex(16)
    name = name or f"prefopt-{token[:12]}"
    region = region or _default_region()
    if region is None:
        problems.append(
            "no AWS region: give region, set AWS_REGION, or put one into the AWS configuration"
        )
    form = next((f for start, f in _FORMATS.items() if base_model.startswith(start)), None)
    if form is None:
        problems.append(
            f"base_model: expected an id that begins with {', '.join(_FORMATS)}, got {base_model!r}; "
            "`prefopt bedrock models` lists what can be fine-tuned"
        )
    for what, value, pattern, example in (
        ("name", name, _NAME, "letters, digits and single hyphens between them, at most 63"),
        ("role", role, _ROLE, "arn:aws:iam::123456789012:role/NAME"),
        ("s3", s3, _S3, "s3://bucket/prefix"),
    ):
        if not pattern.fullmatch(value):
            problems.append(f"{what}: expected {example}, got {value!r}")
    chosen, epochs = _hyperparameters(base_model, hyperparameters or {}, problems)
    if usd_per_million_tokens is not None and not 0 <= usd_per_million_tokens < math.inf:
        problems.append(
            f"usd_per_million_tokens must be a price of 0 or more, got {usd_per_million_tokens}"
        )
    n_rows, hashes = _checked_files(train, validation, form, problems)
    if problems:
        raise DataError("the job cannot be made; nothing was sent.", problems)
    assert region is not None
    folder = f"{s3.rstrip('/')}/{name}"
    record = JobRecord(
        name=name,
        model_name=name,
        base_model=base_model,
        role=role,
        region=region,
        train=str(train),
        train_sha256=hashes[train],
        train_uri=f"{folder}/train-{hashes[train][:12]}.jsonl",
        validation=None if validation is None else str(validation),
        validation_sha256=None if validation is None else hashes[validation],
        validation_uri=(
            None if validation is None else f"{folder}/validation-{hashes[validation][:12]}.jsonl"
        ),
        output_uri=f"{folder}/output/",
        hyperparameters=chosen,
        token=token,
    )
    with Path(train).open(encoding="utf-8") as file:
        characters = sum(len(line) for line in file)
    return JobPlan(
        record, n_rows, math.ceil(characters / CHARACTERS_A_TOKEN), epochs, usd_per_million_tokens
    )


def _checked_files(
    train: str, validation: str | None, form: Format | None, problems: list[str]
) -> tuple[int, dict[str, str]]:
    """The rows to train on and the files' content hashes; what is wrong is added to `problems`."""
    rows, hashes = {train: 0}, {}
    wanted = {train: form}
    if validation is not None:
        # Of a validation set, AWS states limits for Claude only, and no least number of rows.
        is_claude = form is not None and form.name == "bedrock-claude"
        most = 1_000 if is_claude else None
        wanted[validation] = form and form._replace(min_rows=1, max_rows=most)
    for file, rules in wanted.items():
        try:
            with Path(file).open("rb") as handle:
                hashes[file] = hashlib.file_digest(handle, "sha256").hexdigest()
            rows[file] = 0 if rules is None else check_export(file, format=rules)
        except OSError as error:
            problems.append(f"cannot read {file}: {error.strerror or error}")
        except DataError as error:
            problems += [f"{file}: {problem}" for problem in error.problems or [str(error)]]
    if validation is not None and hashes.get(validation) == hashes.get(train, ""):
        problems.append(f"{validation} is the same data as {train}, so its loss would say nothing")
    most = None if form is None else form.max_rows
    if most is not None and max(rows.values()) <= most < sum(rows.values()):
        problems.append(
            f"{train} and {validation} have {sum(rows.values()):,} rows together, at most {most:,} "
            "are taken"
        )
    return rows[train], hashes


def _hyperparameters(
    base_model: str, given: Mapping[str, int | float | str], problems: list[str]
) -> tuple[dict[str, str], int | None]:
    """As Bedrock takes them, and the number of epochs where it is known."""
    is_claude = base_model.startswith("anthropic.")
    for key, value in given.items():
        if not is_claude:
            continue
        if key not in _CLAUDE_RANGES:
            problems.append(
                f"hyperparameters: Claude has no {key!r}; it has {', '.join(_CLAUDE_RANGES)}"
            )
            continue
        kind, low, high = _CLAUDE_RANGES[key]
        try:
            number = kind(str(value))
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            what = "a whole number" if kind is int else "a number"
            problems.append(
                f"hyperparameters: {key} must be {what} in [{low:g}, {high:g}], got {value}"
            )
    chosen = {key: str(value) for key, value in given.items()}
    epochs = chosen.get("epochCount", str(_CLAUDE_EPOCHS) if is_claude else "")
    return chosen, int(epochs) if epochs.isdecimal() else None


# --- Making ------------------------------------------------------------------------------------------


def create_job(plan: JobPlan, folder: str | Path) -> JobRecord:
    """Make the job, or go on making the same one; returns it once Bedrock has it.

    The caller must have been told the cost. What is needed to find the job again is in `folder`
    before Bedrock hears of it, so whoever is killed here calls again, or `resume_job`.

    Raises:
        RunError: the folder holds another job.
        HostedError: AWS refuses or cannot be reached. Nothing was made, unless the message says so.
    """
    with locked_folder(Path(folder)):
        if (Path(folder) / "job.json").exists():
            known = _read(folder)
            differences = _differences(known, plan.record)
            if differences:
                raise RunError(
                    f"{folder} holds another job, {known.name}:\n"
                    + "\n".join(f"  - {line}" for line in differences)
                    + "\nChoose another folder for a new job."
                )
            return _submit(known, folder)
        bedrock = _client("bedrock", plan.record.region)
        _require_tunable(bedrock, plan.record)
        _write(plan.record, folder)
        return _submit(plan.record, folder, bedrock)


def resume_job(folder: str | Path) -> JobRecord:
    """Go on with making a job after a crash; for one that Bedrock has already, nothing is sent.

    Raises:
        RunError: there is no job in the folder.
        DataError: the data changed since the job was begun.
        HostedError: AWS refuses or cannot be reached.
    """
    with locked_folder(Path(folder)):
        return _submit(_read(folder), folder)


def _submit(record: JobRecord, folder: str | Path, bedrock: Any = None) -> JobRecord:
    if record.state == "submitted":
        return record
    bedrock = bedrock or _client("bedrock", record.region)
    found = _find(bedrock, record)
    if found is None:
        _upload(record)
        logger.info("asking Bedrock for job %s", record.name)
        request: dict[str, Any] = {
            "jobName": record.name,
            "customModelName": record.model_name,
            "roleArn": record.role,
            "clientRequestToken": record.token,
            "baseModelIdentifier": record.base_model,
            "customizationType": "FINE_TUNING",
            "trainingDataConfig": {"s3Uri": record.train_uri},
            "outputDataConfig": {"s3Uri": record.output_uri},
            "hyperParameters": record.hyperparameters,
        }
        if record.validation_uri is not None:
            request["validationDataConfig"] = {"validators": [{"s3Uri": record.validation_uri}]}
        with _told(f"cannot make job {record.name}", bedrock):
            try:
                arn = bedrock.create_model_customization_job(**request)["jobArn"]
            except bedrock.exceptions.ClientError:
                # Made by an earlier call whose reply was lost, and not listed a moment ago?
                found = _find(bedrock, record)
                if found is None:
                    raise
                arn = found
    else:
        logger.info("Bedrock has job %s already", record.name)
        arn = found
    record = msgspec.structs.replace(record, state="submitted", arn=arn)
    _write(record, folder)
    return record


def _find(bedrock: Any, record: JobRecord) -> str | None:
    """The ARN of the job that this record made; None if there is none of its name."""
    with _told(f"cannot look for job {record.name}", bedrock):
        try:
            found = bedrock.get_model_customization_job(jobIdentifier=record.name)
        except bedrock.exceptions.ResourceNotFoundException:
            return None
    token = found.get("clientRequestToken")
    ours = (
        token == record.token
        if token is not None
        else found["trainingDataConfig"].get("s3Uri") == record.train_uri
    )
    if not ours:
        raise HostedError(
            f"there is another job called {record.name} in {record.region}; nothing was made. Choose "
            "another name, in another folder."
        )
    return str(found["jobArn"])


def _upload(record: JobRecord) -> None:
    s3 = _client("s3", record.region)
    files = [(record.train, record.train_sha256, record.train_uri)]
    if record.validation and record.validation_sha256 and record.validation_uri:
        files.append((record.validation, record.validation_sha256, record.validation_uri))
    for file, sha256, uri in files:
        try:
            with Path(file).open("rb") as handle:
                same = hashlib.file_digest(handle, "sha256").hexdigest() == sha256
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}.") from error
        if not same:
            raise DataError(
                f"{file} changed since job {record.name} was begun. Restore it, or begin a new job in "
                "another folder."
            )
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        logger.info("uploading %s to %s", file, uri)
        with _told(f"cannot upload {file} to {uri}", s3):
            s3.upload_file(file, bucket, key)


def _require_tunable(bedrock: Any, record: JobRecord) -> None:
    try:
        models = _tunable(bedrock, record.region)
    except HostedError as error:
        if "AccessDenied" not in str(error):
            raise
        logger.warning("not checked whether %s can be fine-tuned: %s", record.base_model, error)
        return
    if record.base_model not in [model.model_id for model in models]:
        listed = "".join(f"\n  - {model.model_id} ({model.lifecycle})" for model in models)
        raise HostedError(
            f"Bedrock does not fine-tune {record.base_model} in {record.region} for this account; "
            f"nothing was sent. It fine-tunes:{listed or ' nothing.'}"
        )


# --- Following ---------------------------------------------------------------------------------------


def job_status(folder: str | Path) -> JobStatus:
    """What Bedrock says now of the folder's job, which is written down there.

    Raises:
        RunError: there is no job in the folder, or it was never finished making.
        HostedError: AWS refuses or cannot be reached.
    """
    record = _made(folder)
    return _ask(record, folder, _client("bedrock", record.region))


def _made(folder: str | Path) -> JobRecord:
    record = _read(folder)
    if record.state == "intended":
        raise RunError(
            f"job {record.name} in {folder} was begun, but it is not known whether Bedrock has it. "
            "`prefopt bedrock resume` finds out and goes on."
        )
    return record


def _ask(record: JobRecord, folder: str | Path, bedrock: Any) -> JobStatus:
    with _told(f"cannot ask for job {record.name}", bedrock):
        status = _status(bedrock.get_model_customization_job(jobIdentifier=record.name))
    said = {"status": status.status, "model_arn": status.model_arn, "failure": status.failure}
    _write(msgspec.structs.replace(record, **said), folder)
    return status


def follow_job(
    folder: str | Path,
    *,
    poll_s: float = 60.0,
    told: Callable[[JobStatus], object] = lambda status: None,
    sleep: Callable[[float], object] = time.sleep,
) -> JobStatus:
    """Wait until the job is over; returns what it came to. May be stopped and called again.

    Args:
        folder: the job's.
        poll_s: seconds between two questions.
        told: called with each status that differs from the last.
        sleep: how to wait.

    Raises:
        HostedError: the job failed (with Bedrock's reason), or AWS refuses or cannot be reached.
    """
    record = _made(folder)
    bedrock = _client("bedrock", record.region)
    last: JobStatus | None = None
    while True:
        status = _ask(record, folder, bedrock)
        if last is None or (status.status, status.steps) != (last.status, last.steps):
            told(status)
        last = status
        if status.status == "Failed":
            raise HostedError(
                f"job {status.name} failed: {status.failure or 'Bedrock gives no reason'}. "
                f"{_advice('', status.failure or '')}".strip()
            )
        if status.status in _OVER:
            return status
        sleep(poll_s)


def list_jobs(region: str | None = None) -> list[JobStatus]:
    """All customization jobs of the account in a region, the newest first.

    Raises:
        HostedError: AWS refuses or cannot be reached.
    """
    bedrock = _client("bedrock", region)
    found = []
    with _told("cannot list the jobs", bedrock):
        pages = bedrock.get_paginator("list_model_customization_jobs").paginate(
            sortBy="CreationTime", sortOrder="Descending"
        )
        for page in pages:
            found += [_status(job) for job in page["modelCustomizationJobSummaries"]]
    return found


def stop_job(folder: str | Path) -> JobStatus:
    """Stop the folder's job. It cannot be resumed and gives no model; what it trained is charged.

    Raises:
        RunError: there is no job in the folder, or it was never finished making.
        HostedError: AWS refuses or cannot be reached.
    """
    record = _made(folder)
    bedrock = _client("bedrock", record.region)
    status = _ask(record, folder, bedrock)
    if status.status in (*_OVER, "Stopping"):
        return status
    with _told(f"cannot stop job {record.name}", bedrock):
        bedrock.stop_model_customization_job(jobIdentifier=record.name)
    return _ask(record, folder, bedrock)


def tunable_models(region: str | None = None) -> list[TunableModel]:
    """The models that Bedrock fine-tunes in a region, as it says itself.

    Raises:
        HostedError: AWS refuses or cannot be reached.
    """
    return _tunable(_client("bedrock", region), region or _default_region() or "")


def _tunable(bedrock: Any, region: str) -> list[TunableModel]:
    with _told(f"cannot list the models that can be fine-tuned in {region}", bedrock):
        found = bedrock.list_foundation_models(byCustomizationType="FINE_TUNING")
    models = []
    for model in found["modelSummaries"]:
        life = model.get("modelLifecycle", {})
        ends = life.get("endOfLifeTime")
        lifecycle = life.get("status", "UNKNOWN").lower()
        lifecycle += f", ends {ends:%Y-%m-%d}" if ends else ""
        models.append(TunableModel(model["modelId"], model.get("providerName", ""), lifecycle))
    return models


def _status(job: Mapping[str, Any]) -> JobStatus:
    details = job.get("statusDetails", {})
    steps = {
        name: details[f"{key}Details"]["status"]
        for name, key in (
            ("checks", "validation"),
            ("data", "dataProcessing"),
            ("training", "training"),
        )
        if details.get(f"{key}Details", {}).get("status")
    }
    return JobStatus(
        name=job["jobName"],
        arn=job["jobArn"],
        status=job["status"],
        created=f"{job['creationTime']:%Y-%m-%d %H:%M}",
        base_model=job["baseModelArn"].rpartition("/")[2],
        model_arn=job.get("outputModelArn", job.get("customModelArn")),
        steps=steps,
        failure=job.get("failureMessage") if job["status"] == "Failed" else None,
        training_loss=job.get("trainingMetrics", {}).get("trainingLoss"),
        validation_losses=tuple(m["validationLoss"] for m in job.get("validationMetrics", [])),
    )


# --- The folder --------------------------------------------------------------------------------------


def _read(folder: str | Path) -> JobRecord:
    path = Path(folder) / "job.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=JobRecord)
    except FileNotFoundError as error:
        raise RunError(
            f"there is no job in {folder}: expected job.json, which `prefopt bedrock create` writes."
        ) from error
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}). It is written whole or not at all, so it was changed "
            "from outside; `prefopt bedrock list` shows what Bedrock has."
        ) from error


def _write(record: JobRecord, folder: str | Path) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(record), indent=2)
    write_bytes(Path(folder) / "job.json", encoded + b"\n")


def _differences(known: JobRecord, asked: JobRecord) -> list[str]:
    """In what a new plan differs from the folder's job; a name that was made up does not count."""
    fields = [
        "base_model",
        "role",
        "region",
        "train_sha256",
        "validation_sha256",
        "hyperparameters",
    ]
    if asked.name != f"prefopt-{asked.token[:12]}":
        fields.append("name")
    differences = [
        f"{field}: {getattr(known, field)} -> {getattr(asked, field)}"
        for field in fields
        if getattr(known, field) != getattr(asked, field)
    ]
    here, there = (job.output_uri.removesuffix(f"/{job.name}/output/") for job in (known, asked))
    return differences if here == there else [*differences, f"s3: {here} -> {there}"]


# --- AWS ---------------------------------------------------------------------------------------------


def _boto3() -> Any:
    try:
        import boto3
    except ImportError as error:
        raise HostedError(
            "Bedrock needs boto3, which is not installed: pip install 'prefopt[bedrock]'"
        ) from error
    return boto3


def _default_region() -> str | None:
    boto3 = _boto3()
    from botocore.exceptions import BotoCoreError

    try:
        region: str | None = boto3.Session().region_name
    except BotoCoreError as error:  # a profile that is not there
        raise HostedError(f"the AWS configuration cannot be used: {error}") from error
    return region


def _client(service: str, region: str | None) -> Any:
    boto3 = _boto3()
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, NoRegionError

    config = Config(
        connect_timeout=10, read_timeout=60, retries={"mode": "standard", "max_attempts": 5}
    )
    try:
        return boto3.Session().client(service, region_name=region, config=config)
    except NoRegionError as error:
        raise HostedError(
            "no AWS region: give --region, set AWS_REGION, or put one into the AWS configuration."
        ) from error
    except (BotoCoreError, ValueError) as error:
        raise HostedError(f"cannot prepare for AWS {service}: {error}") from error


@contextlib.contextmanager
def _told(what: str, client: Any) -> Iterator[None]:
    """Turn what AWS and boto3 raise into a HostedError that says what to do."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    where = f"{client.meta.service_model.service_name} in {client.meta.region_name}"
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise HostedError(
            f"{what}: no AWS credentials ({error}). Log in (`aws sso login`, `aws configure`), or set "
            "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from error
    except (ConnectionError, HTTPClientError) as error:
        raise HostedError(
            f"{what}: AWS {where} cannot be reached ({error}). Check the connection and whether the "
            "region offers the service, then run the same command again."
        ) from error
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        said = error.response.get("Error", {}).get("Message", "")
        raise HostedError(
            f"{what}: AWS {where} refused ({code}): {said} {_advice(code, said)}".rstrip()
        ) from error
    except (BotoCoreError, Boto3Error) as error:
        raise HostedError(f"{what}: {error} {_advice('', str(error))}".rstrip()) from error


_ADVICE = (
    (r"ExpiredToken|expired", "The AWS login has expired: log in again, then repeat the command."),
    (
        r"UnrecognizedClient|InvalidClientTokenId|InvalidAccessKeyId|SignatureDoesNotMatch",
        "The AWS credentials are wrong: check AWS_PROFILE or the access key.",
    ),
    (r"NoSuchBucket", "Create the bucket in the job's region, or give another with --s3."),
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|bucket.*region",
        "Bucket and job must be in the same region: check --region and --s3.",
    ),
    (r"Throttling|TooManyRequests", "Wait a minute, then repeat the command."),
    (
        r"ServiceQuotaExceeded|quota|limit",
        "Raise the quota in AWS's Service Quotas console, wait for other jobs to end, or send less.",
    ),
    (
        r"end of its life|not support|model identifier",
        "`prefopt bedrock models` lists what can be fine-tuned.",
    ),
    (
        r"PassRole|assume|trust|provided role|role.*(permission|access|invalid)|permission.*role",
        "The role must trust bedrock.amazonaws.com and may read the data and write the results in "
        "S3, and you must be allowed iam:PassRole on it.",
    ),
    (
        r"AccessDenied|Forbidden|not authorized",
        "Your AWS user or role lacks the permission named here, or access to the model was not "
        "granted in the Bedrock console.",
    ),
    (
        r"record|dataset|data set|training data|jsonl|token",
        "Bedrock refuses the data: mend the rows it names, export again, and begin a new job in "
        "another folder.",
    ),
)


def _advice(code: str, said: str) -> str:
    """What to do about a refusal, by its code or, where that says little, its words."""
    for pattern, advice in _ADVICE:
        if re.search(pattern, f"{code} {said}", re.IGNORECASE):
            return advice
    return ""
