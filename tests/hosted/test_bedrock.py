"""Customization jobs against moto's server over a socket; refusals it cannot make, by a Stubber."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import msgspec
import pytest
from botocore.exceptions import ClientError
from botocore.loaders import JSONFileLoader
from botocore.stub import Stubber

from prefopt.cli import main
from prefopt.errors import DataError, HostedError, RunError
from prefopt.folder_lock import locked_folder
from prefopt.hosted import bedrock
from prefopt.hosted.bedrock import (
    create_job,
    follow_job,
    job_status,
    list_jobs,
    plan_job,
    resume_job,
    stop_job,
    tunable_models,
)
from tests.hosted.aws_server import HAIKU, AWSServer

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

ROLE = "arn:aws:iam::123456789012:role/Tuning"
REGION = "us-west-2"
AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": REGION,
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nowhere/config",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere/credentials",
    "AWS_MAX_ATTEMPTS": "2",
}


@pytest.fixture(scope="module", autouse=True)
def descriptions_are_read_once():
    """Every session reads megabytes of JSON about AWS's services anew, though they do not change."""
    read = functools.cache(JSONFileLoader().load_file)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(JSONFileLoader, "load_file", lambda self, path: read(path))
        yield


@pytest.fixture(scope="module")
def server():
    with AWSServer() as running:
        yield running


@pytest.fixture
def aws(server, monkeypatch, tmp_path):
    """moto with a bucket, and the environment that leads to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.chdir(tmp_path)
    server.reset()
    server.__dict__ |= {
        "created": [],
        "hidden": 0,
        "models": [HAIKU],
        "before_create": lambda: None,
        "after_create": lambda: None,
    }
    boto3.client("s3").create_bucket(
        Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION}
    )
    write_data("train.jsonl")
    return server


def write_data(path, count=40):
    row = {
        "system": "Sei kurz.",
        "messages": [
            {"role": "user", "content": "Größe? 日本"},
            {"role": "assistant", "content": "X"},
        ],
    }
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def planned(**changed):
    given = {"base_model": HAIKU, "role": ROLE, "s3": "s3://bucket/tuning", **changed}
    return plan_job(given.pop("train", "train.jsonl"), **given)


def on_disk(folder="job"):
    with open(f"{folder}/job.json", encoding="utf-8") as file:
        return json.load(file)


# --- making, following, listing, stopping ------------------------------------------------------------


def test_a_job_from_the_plan_to_its_model(aws, tmp_path):
    write_data("held_out.jsonl", 5)
    plan = planned(
        name="mine",
        validation="held_out.jsonl",
        hyperparameters={"epochCount": 3, "batchSize": "8"},
    )
    record = create_job(plan, "job")
    (sent,) = aws.created
    assert sent["clientRequestToken"] == record.token == on_disk()["token"]
    assert sent["hyperParameters"] == {"epochCount": "3", "batchSize": "8"}
    assert sent["baseModelIdentifier"] == HAIKU
    assert sent["customizationType"] == "FINE_TUNING"
    assert sent["outputDataConfig"]["s3Uri"] == "s3://bucket/tuning/mine/output/"
    s3 = boto3.client("s3")
    for name, uri in (
        ("train", sent["trainingDataConfig"]["s3Uri"]),
        ("held_out", sent["validationDataConfig"]["validators"][0]["s3Uri"]),
    ):
        kept = s3.get_object(Bucket="bucket", Key=uri.removeprefix("s3://bucket/"))["Body"].read()
        assert kept == (tmp_path / f"{name}.jsonl").read_bytes()
    assert (on_disk()["state"], on_disk()["arn"]) == ("submitted", record.arn)
    assert record.arn.endswith("model-customization-job/mine")

    told = []

    def sleep(seconds):
        assert seconds == 60.0
        if len(told) == 1:
            aws.ends("mine", "Completed")

    status = follow_job("job", told=told.append, sleep=sleep)
    assert [t.status for t in told] == ["InProgress", "Completed"]
    assert status.model_arn in str(status)
    assert "training loss" in str(status)
    assert on_disk()["model_arn"] == status.model_arn


@pytest.mark.slow
def test_jobs_are_listed_over_all_pages(aws):
    for number in range(3):
        write_data("train.jsonl", 40 + number)
        create_job(planned(name=f"job-{number}"), f"job{number}")
    backend_pages = boto3.client("bedrock").list_model_customization_jobs(maxResults=2)
    assert len(backend_pages["modelCustomizationJobSummaries"]) == 2
    assert {job.name for job in list_jobs()} == {"job-0", "job-1", "job-2"}
    assert {job.status for job in list_jobs(REGION)} == {"InProgress"}
    assert list_jobs("us-east-1") == []


def test_a_job_is_stopped_once(aws):
    create_job(planned(name="mine"), "job")
    assert stop_job("job").status == "Stopped"
    assert stop_job("job").status == "Stopped"
    assert on_disk()["status"] == "Stopped"
    assert follow_job("job").status == "Stopped"


def test_a_failed_job_is_an_error_with_bedrock_s_reason_and_advice(aws):
    create_job(planned(name="mine"), "job")
    aws.ends("mine", "Failed", "Invalid training data: record 7 has an unknown role")
    with pytest.raises(HostedError, match=r"record 7 has an unknown role.*mend the rows"):
        follow_job("job")
    assert on_disk()["failure"].startswith("Invalid training data")


def test_the_models_that_can_be_fine_tuned(aws):
    (model,) = tunable_models()
    assert model == (HAIKU, "Anthropic", "legacy, ends 2030-01-31")


def test_a_model_that_bedrock_does_not_fine_tune_is_refused_before_anything(aws):
    aws.models = ["anthropic.claude-9-v1:0"]
    with pytest.raises(HostedError, match=r"does not fine-tune .*haiku.*\n  - anthropic.claude-9"):
        create_job(planned(), "job")
    assert not os.path.exists("job/job.json")
    assert aws.created == []


# --- never twice -------------------------------------------------------------------------------------


def test_the_same_command_again_makes_no_second_job(aws):
    first = create_job(planned(), "job")
    assert create_job(planned(), "job") == first
    assert resume_job("job") == first
    assert len(aws.created) == 1


def test_another_job_in_the_same_folder_is_refused(aws):
    create_job(planned(), "job")
    write_data("train.jsonl", 41)
    with pytest.raises(RunError, match=r"(?s)holds another job.*train_sha256.*hyperparam.*s3: "):
        create_job(planned(hyperparameters={"epochCount": 1}, s3="s3://bucket/other"), "job")
    assert len(aws.created) == 1


CRASH = """
import sys
from prefopt.cli import main
sys.exit(main(["bedrock", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before_create", "after_create"])
def test_a_process_killed_in_the_call_makes_one_job_in_the_end(when, aws):
    """Killed as Bedrock gets the request, or when the job is made and its reply is under way."""
    running = []

    def kill():
        running[0].send_signal(signal.SIGKILL)
        running[0].wait()

    setattr(aws, when, kill)
    command = [sys.executable, "-c", CRASH, "create", "--out", "job", "--train", "train.jsonl"]
    command += ["--base_model", HAIKU, "--role", ROLE, "--s3", "s3://bucket/tuning", "--yes"]
    running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    running[0].communicate()
    assert running[0].returncode == -signal.SIGKILL
    assert on_disk()["state"] == "intended"
    with pytest.raises(RunError, match="bedrock resume"):
        job_status("job")

    setattr(aws, when, lambda: None)
    record = resume_job("job")
    assert list(aws.jobs) == [record.name]
    assert {sent["clientRequestToken"] for sent in aws.created} == {record.token}
    assert len(aws.created) == 1  # moto had made it already, and it was found by its name
    assert on_disk()["state"] == "submitted"


@pytest.mark.slow
def test_twenty_kills_at_random_moments_make_one_job(aws):
    chance = random.Random(0)
    command = [sys.executable, "-c", CRASH, "create", "--out", "job", "--train", "train.jsonl"]
    command += ["--base_model", HAIKU, "--role", ROLE, "--s3", "s3://bucket/tuning", "--yes"]
    began = time.monotonic()
    assert subprocess.run(command, capture_output=True).returncode == 0
    whole_s = time.monotonic() - began
    for _ in range(20):
        aws.reset()
        aws.created.clear()
        os.unlink("job/job.json")
        boto3.client("s3").create_bucket(
            Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION}
        )
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(chance.uniform(0.5, 1.0) * whole_s)
        process.kill()
        process.communicate()
        assert subprocess.run(command, capture_output=True).returncode == 0
        assert len(aws.jobs) == 1
        assert {sent["clientRequestToken"] for sent in aws.created} == {on_disk()["token"]}
        assert on_disk()["state"] == "submitted"


def test_a_job_that_is_not_visible_yet_is_asked_for_with_the_same_token_and_found(aws):
    plan = planned()
    create_job(plan, "job")
    intended = msgspec.structs.replace(plan.record, state="intended")
    bedrock._write(intended, "job")
    aws.hidden = 1
    record = resume_job("job")
    assert [sent["clientRequestToken"] for sent in aws.created] == [plan.record.token] * 2
    assert len(aws.jobs) == 1
    assert record.state == "submitted"


def test_a_crash_before_the_upload_goes_on_from_there(aws, monkeypatch, tmp_path):
    def crash(record):
        raise KeyboardInterrupt

    plan = planned()
    with monkeypatch.context() as patched:
        patched.setattr(bedrock, "_upload", crash)
        with pytest.raises(KeyboardInterrupt):
            create_job(plan, "job")
    content = (tmp_path / "train.jsonl").read_bytes()
    os.truncate("train.jsonl", 10)
    with pytest.raises(DataError, match="changed since job"):
        resume_job("job")
    os.unlink("train.jsonl")
    with pytest.raises(DataError, match="No such file"):
        resume_job("job")
    (tmp_path / "train.jsonl").write_bytes(content)
    assert resume_job("job").state == "submitted"
    assert len(aws.created) == 1


def test_somebody_else_s_job_of_the_same_name_is_never_taken_for_ours(aws):
    create_job(planned(name="mine"), "job")
    write_data("train.jsonl", 41)
    with pytest.raises(HostedError, match="another job called mine"):
        create_job(planned(name="mine"), "job2")
    with pytest.raises(HostedError, match="another job called mine"):
        resume_job("job2")
    assert len(aws.created) == 1


def test_two_processes_do_not_work_on_one_job(aws):
    with locked_folder(Path("job")), pytest.raises(RunError, match="another process"):
        create_job(planned(), "job")


def test_a_folder_without_or_with_a_broken_job(aws):
    with pytest.raises(RunError, match=r"expected job\.json"):
        job_status("nothing")
    os.mkdir("broken")
    with open("broken/job.json", "w") as file:
        file.write("{}")
    with pytest.raises(RunError, match="cannot be read"):
        resume_job("broken")


# --- what is refused before anything is sent ---------------------------------------------------------


def test_all_that_cannot_work_is_told_at_once(aws):
    write_data("short.jsonl", 3)
    with open("short.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(DataError) as refused:
        planned(
            train="short.jsonl",
            validation="missing.jsonl",
            role="Tuning",
            s3="bucket",
            name="a--b",
            hyperparameters={"epochCount": 11, "batchSize": 2.5, "lr": 1},
            usd_per_million_tokens=-1,
        )
    told = "\n".join(refused.value.problems)
    for said in (
        "role: expected arn:aws:iam::",
        "s3: expected s3://bucket/prefix, got 'bucket'",
        "name: expected letters",
        "epochCount must be a whole number in [1, 10], got 11",
        "batchSize must be a whole number in [4, 256], got 2.5",
        "Claude has no 'lr'; it has epochCount",
        "usd_per_million_tokens",
        "short.jsonl: line 4: ",
        "short.jsonl: bedrock-claude takes 32 rows or more, got 4",
        "missing.jsonl",
    ):
        assert said in told
    assert len(refused.value.problems) == 10


def test_a_model_of_an_unknown_kind_is_refused(aws):
    with pytest.raises(DataError, match=r"begins with anthropic\.claude, amazon\.nova"):
        planned(base_model="cohere.command")
    with pytest.raises(DataError, match=r"meta\.llama3-2"):
        planned(base_model="meta.llama3-1-8b-instruct-v1:0:128k")


def test_a_validation_set_may_be_smaller_than_a_training_set(aws):
    write_data("held_out.jsonl", 5)
    assert planned(validation="held_out.jsonl").record.validation_uri is not None
    with pytest.raises(DataError, match="the same data as"):
        planned(validation="train.jsonl")
    write_data("held_out.jsonl", 1_001)
    with pytest.raises(DataError, match=r"held_out.jsonl: bedrock-claude takes at most 1,000 rows"):
        planned(validation="held_out.jsonl")
    write_data("train.jsonl", 9_500)
    write_data("held_out.jsonl", 501)
    with pytest.raises(DataError, match=r"10,001 rows together, at most 10,000"):
        planned(validation="held_out.jsonl")


def test_other_models_take_their_own_hyperparameters_and_rows(aws):
    row = {"messages": [{"role": "user", "content": [{"text": "q"}]}]}
    row["messages"].append({"role": "assistant", "content": [{"text": "a"}]})
    row["schemaVersion"] = "bedrock-conversation-2024"
    with open("nova.jsonl", "w") as file:
        file.write((json.dumps(row) + "\n") * 8)
    plan = planned(
        train="nova.jsonl",
        base_model="amazon.nova-micro-v1:0:128k",
        hyperparameters={"learningRate": "1e-5"},
    )
    assert plan.record.hyperparameters == {"learningRate": "1e-5"}
    assert "default number of epochs" in str(plan)


def test_the_plan_says_what_is_known_of_the_cost(aws, tmp_path):
    assert "cost    not known" in str(planned())
    plan = planned(usd_per_million_tokens=1000, hyperparameters={"epochCount": 3})
    characters = len((tmp_path / "train.jsonl").read_text(encoding="utf-8"))
    assert plan.tokens == -(-characters // 6)
    usd = plan.tokens * 3 / 1000
    assert f"about ${usd:.2f} to ${2 * usd:.2f}" in str(plan)


# --- what AWS refuses --------------------------------------------------------------------------------


def test_no_region(aws, monkeypatch):
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(DataError, match="no AWS region"):
        planned()
    with pytest.raises(HostedError, match="no AWS region: give --region"):
        list_jobs()


def test_no_credentials_and_a_profile_that_is_not_there(aws, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(HostedError, match=r"no AWS credentials.*aws sso login"):
        create_job(planned(), "job")
    assert not os.path.exists("job/job.json")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(HostedError, match="nobody"):
        planned()


def test_aws_out_of_reach(aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(HostedError, match="bedrock in us-west-2 cannot be reached"):
        list_jobs()


def test_a_bucket_that_is_not_there_leaves_a_job_to_resume(aws):
    with pytest.raises(HostedError, match=r"NoSuchBucket.*Create the bucket"):
        create_job(planned(s3="s3://elsewhere/x"), "job")
    assert on_disk()["state"] == "intended"
    boto3.client("s3").create_bucket(
        Bucket="elsewhere", CreateBucketConfiguration={"LocationConstraint": REGION}
    )
    assert resume_job("job").state == "submitted"


def test_without_boto3_the_extra_is_named(aws, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(HostedError, match=r"pip install 'prefopt\[bedrock\]'"):
        list_jobs(REGION)


@pytest.mark.parametrize(
    ("code", "message", "advice"),
    [
        ("ServiceQuotaExceededException", "Too many jobs", "Service Quotas"),
        ("ValidationException", "Could not assume the provided role", "iam:PassRole"),
        (
            "AccessDeniedException",
            "User is not authorized to perform: iam:PassRole on ...",
            "PassRole",
        ),
        ("AccessDeniedException", "You don't have access to the model", "permission named here"),
        ("ValidationException", "Role x has no permission to read the training data", "PassRole"),
        ("ValidationException", "The training data has an invalid record", "mend the rows"),
        ("ValidationException", "The provided model identifier is invalid.", "bedrock models"),
        (
            "ResourceNotFoundException",
            "This model version has reached the end of its life.",
            "models",
        ),
        ("ThrottlingException", "Rate exceeded", "Wait a minute"),
        ("UnrecognizedClientException", "The security token is invalid.", "credentials are wrong"),
        ("ExpiredTokenException", "The security token is expired", "log in again"),
        ("InternalServerException", "Oops", ""),
    ],
)
def test_each_refusal_says_what_to_do(code, message, advice, aws, monkeypatch):
    """moto makes none of these, so botocore's Stubber answers in its place."""
    plan = planned()
    client = boto3.client("bedrock", region_name=REGION)
    stub = Stubber(client)
    known = [{"modelId": HAIKU, "modelArn": "a" * 20}]
    stub.add_response("list_foundation_models", {"modelSummaries": known})
    stub.add_client_error("get_model_customization_job", "ResourceNotFoundException", "not found")
    stub.add_client_error("create_model_customization_job", code, message)
    stub.add_client_error("get_model_customization_job", "ResourceNotFoundException", "not found")
    real = bedrock._client
    monkeypatch.setattr(
        bedrock, "_client", lambda name, region: client if name == "bedrock" else real(name, region)
    )
    with stub, pytest.raises(HostedError) as refused:
        create_job(plan, "job")
    stub.assert_no_pending_responses()
    told = str(refused.value)
    assert told.startswith(f"cannot make job {plan.record.name}: AWS bedrock in us-west-2 refused")
    assert code in told
    assert message in told
    assert advice in told
    assert isinstance(refused.value.__cause__, ClientError)
    assert on_disk()["state"] == "intended"


def test_who_may_not_list_models_may_still_make_a_job(aws, monkeypatch, caplog):
    plan = planned()
    client = boto3.client("bedrock", region_name=REGION)
    stub = Stubber(client)
    stub.add_client_error("list_foundation_models", "AccessDeniedException", "no")
    stub.add_client_error("get_model_customization_job", "ResourceNotFoundException", "not found")
    arn = f"arn:aws:bedrock:{REGION}:123456789012:model-customization-job/a.b/abcdefghijkl"
    expected = {
        "jobName": plan.record.name,
        "customModelName": plan.record.name,
        "roleArn": ROLE,
        "clientRequestToken": plan.record.token,
        "baseModelIdentifier": HAIKU,
        "customizationType": "FINE_TUNING",
        "trainingDataConfig": {"s3Uri": plan.record.train_uri},
        "outputDataConfig": {"s3Uri": plan.record.output_uri},
        "hyperParameters": {},
    }
    stub.add_response("create_model_customization_job", {"jobArn": arn}, expected)
    real = bedrock._client
    monkeypatch.setattr(
        bedrock, "_client", lambda name, region: client if name == "bedrock" else real(name, region)
    )
    with stub:
        assert create_job(plan, "job").arn == arn
    assert "not checked whether" in caplog.text


def test_steps_of_a_job_are_told_as_they_change(aws, monkeypatch):
    """moto gives no steps."""
    create_job(planned(), "job")
    client = boto3.client("bedrock", region_name=REGION)
    stub = Stubber(client)
    said = boto3.client("bedrock").get_model_customization_job(jobIdentifier=on_disk()["name"])
    said = {**said, "validationDataConfig": {"validators": []}}
    said.pop("ResponseMetadata")
    for training in ("NotStarted", "NotStarted", "InProgress"):
        details = {"trainingDetails": {"status": training}}
        stub.add_response("get_model_customization_job", {**said, "statusDetails": details})
    stub.add_response("get_model_customization_job", {**said, "status": "Completed"})
    monkeypatch.setattr(bedrock, "_client", lambda name, region: client)
    told = []
    with stub:
        follow_job("job", told=lambda status: told.append(str(status).splitlines()[0]), sleep=id)
    name = on_disk()["name"]
    assert told == [
        f"{name}: InProgress (training NotStarted)",
        f"{name}: InProgress (training InProgress)",
        f"{name}: Completed",
    ]


# --- the commands ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands(aws, capsys):
    create = ["bedrock", "create", "--out", "job", "--train", "train.jsonl", "--base_model", HAIKU]
    create += ["--role", ROLE, "--s3", "s3://bucket/tuning", "--name", "mine"]
    create += ["--hyperparameters", "{epochCount: 3}", "--usd_per_million_tokens", "8"]
    assert main(create) == 1
    printed = capsys.readouterr()
    assert "cost    about $" in printed.out
    assert "3 epochs" in printed.out
    assert "nothing was sent. With --yes" in printed.err
    assert aws.created == []
    assert main([*create, "--yes"]) == 0
    assert aws.created[0]["hyperParameters"] == {"epochCount": "3"}
    assert main(["bedrock", "resume", "--out", "job"]) == 0
    assert main(["bedrock", "list"]) == 0
    assert "InProgress  mine" in capsys.readouterr().out
    assert main(["bedrock", "models", "--region", REGION]) == 0
    assert HAIKU in capsys.readouterr().out
    assert main(["bedrock", "stop", "--out", "job"]) == 0
    assert main(["bedrock", "follow", "--out", "job"]) == 0
    assert capsys.readouterr().out.count("mine: Stopped") == 2
    assert main(["bedrock", "follow", "--out", "nothing"]) == 1


@pytest.mark.parametrize("step", ["create", "resume", "follow", "list", "stop", "models"])
def test_every_command_explains_itself(step, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bedrock", step, "--help"])
    assert stopped.value.code == 0
    assert f"Example: prefopt bedrock {step}" in capsys.readouterr().out


def test_export_and_create_fit_together(aws, tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(33)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["export", "--data", "prefs.jsonl", "--format", "bedrock-claude",
                 "--out", "train.jsonl"]) == 0  # fmt: skip
    assert "33 rows for bedrock-claude" in capsys.readouterr().out
    assert create_job(planned(), "job").state == "submitted"


def test_the_anthropic_sdk_has_no_fine_tuning():
    """What docs/bedrock.md says; if this fails, the SDK has learned it and the page is wrong."""
    import pkgutil

    import anthropic

    names = [m.name for m in pkgutil.walk_packages(anthropic.__path__, "anthropic.")]
    assert not [n for n in names if "fine_tun" in n or "finetun" in n or "customization" in n]
    client = anthropic.Anthropic(api_key="x")
    resources = [*dir(client), *dir(client.beta)]
    assert not [n for n in resources if "fine" in n or n.endswith("tuning")]
