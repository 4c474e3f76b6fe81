"""Keys stay where they are: in no log, manifest, report, ledger or error, whatever goes wrong."""

import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import httpx2
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from prefopt.errors import PrefoptError
from prefopt.judges import judge_comparisons
from prefopt.judges.anthropic import AnthropicJudge
from prefopt.judges.openai import OpenAIJudge
from prefopt.types import Candidate, Comparison, Prompt
from tests.security.key_flow import KEYS, MODES

ROOT = Path(__file__).parents[2]
KEY = "key-of-no-known-form-0123456789"


def comparison(number):
    prompt = Prompt.from_text(f"What is {number}?")
    a, b = (Candidate(prompt=prompt, text=text, model="m") for text in ("one", "another"))
    return Comparison(a=a, b=b)


def refuse(status):
    return lambda request: httpx2.Response(status, json={"error": {"message": told(request)}})


def told(request):
    return f"your key {KEY} is wrong; you sent {dict(request.headers)}"


def broken(request):
    raise httpx2.ConnectError(f"refused for {KEY}: {dict(request.headers)}")


def half(request):
    # The key lies across the place where a quotation of the page ends.
    return httpx2.Response(200, content=b"<p>" + b"x" * 105 + KEY.encode() + b"</p>")


def message(request):
    return httpx2.Response(200, json={"content": told(request), "choices": told(request)})


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(refuse(401), id="401"),
        pytest.param(broken, id="broken"),
        pytest.param(half, id="half"),
        *(pytest.param(refuse(s), id=str(s), marks=pytest.mark.slow) for s in (400, 403, 500)),
        pytest.param(message, id="message", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("service", ["anthropic", "openai"])
def test_what_a_service_says_of_a_key_goes_nowhere(service, answer, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    http_client = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))

    async def no_wait(seconds):
        pass

    options = {"max_usd": 1.0, "max_attempts": 2, "sleep": no_wait}
    if service == "anthropic":
        client = AsyncAnthropic(api_key=KEY, http_client=http_client)
        judge = AnthropicJudge("claude-sonnet-5-5", client=client, transport="sync", **options)
    else:
        client = AsyncOpenAI(api_key=KEY, base_url="http://localhost/v1", http_client=http_client)
        del options["max_usd"]
        judge = OpenAIJudge("m", client=client, **options)
    said = ""
    ledger = tmp_path / "judgements.sqlite"
    try:
        judged = judge_comparisons(
            [comparison(i) for i in range(5)], judge, ledger=ledger, progress=False
        )
        said = repr(judged)
    except PrefoptError as error:
        said = "".join(traceback.format_exception(error))
    assert said
    # The SDKs' own debug log shows the error of a connection as it is. It would hold a key only for a
    # key that is no header's value, and such keys are refused before anything is sent.
    logged = [r.getMessage() for r in caplog.records if r.exc_info is None or answer is not broken]
    if answer is not broken:
        logged.append(caplog.text)
    found = [said, *logged, *(p.read_bytes().decode("latin-1") for p in tmp_path.iterdir())]
    for text in found:
        # Half of it is too much as well.
        assert "no-known-form" not in text
        assert "key-of-no" not in text


@pytest.mark.slow
def test_a_whole_flow_and_failing_runs_leave_no_key_behind(tiny_model, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("key_flow.py")
    subprocess.run([sys.executable, script, tmp_path, tiny_model], env=environment, check=True)
    codes = json.loads((tmp_path / "codes.json").read_text())
    assert codes.pop("run") == codes.pop("sample") == 0
    assert {codes.pop(f"answers-{name}") for name in ("anthropic", "openai")} == {0}
    assert set(codes.values()) == {1}
    assert len(codes) == 2 * (len(MODES) - 1)
    printed = (tmp_path / "printed.txt").read_text()
    assert "DEBUG:anthropic" in printed
    assert "DEBUG:openai" in printed
    assert "[hidden]" in printed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 60
    for path in files:
        content = path.read_bytes()
        assert b"SECRET" not in content, path
        assert not any(key.encode() in content for key in KEYS.values()), path


@pytest.mark.parametrize("key", [k for name, k in KEYS.items() if name[:3] not in ("AWS", "WAN")])
def test_a_file_with_a_key_in_it_is_not_pushed(key):
    from prefopt.serving.hub_push import _secrets_in

    assert list(_secrets_in({"x.json": f'{{"a": "{key}"}}'.encode()}))
    assert list(_secrets_in({"x.json": b"\n\nsk-proj-a1_b2-" + b"c3" * 30}))
    assert not list(_secrets_in({"x.json": b'"sk-learn-is-a-library", "risk-free"'}))
