"""The same judge through the SDK's clients for clouds and gateways; nothing leaves the process."""

import json

import httpx2
import pytest
from anthropic import AsyncAnthropic, AsyncAnthropicBedrock, AsyncAnthropicVertex

from prefopt.errors import JudgeUnavailable
from prefopt.judges import judge_comparisons
from prefopt.judges.anthropic import AnthropicJudge
from prefopt.judges.prices import ModelPrice
from prefopt.testing import FakeAnthropic
from prefopt.testing.answers import prefer_longer
from prefopt.types import Candidate, Comparison, Prompt

PRICE = ModelPrice(
    input_usd_per_mtok=2,
    output_usd_per_mtok=10,
    cache_read_usd_per_mtok=0.2,
    cache_write_usd_per_mtok=2.5,
)


def pair():
    prompt = Prompt.from_text("What does a fox eat?")
    return Comparison(
        a=Candidate(prompt=prompt, text="Mice.", model="m"),
        b=Candidate(prompt=prompt, text="Mice, voles and berries.", model="m", sample_index=1),
    )


def cloud(seen, model):
    """A cloud's transport: it takes requests at its own paths and answers like the API."""
    fake = FakeAnthropic(prefer_longer)

    async def respond(request):
        seen.append(request)
        if "/model" not in request.url.path and "models/" not in request.url.path:
            return httpx2.Response(404, json={"message": "no such operation"})
        body = json.loads(request.content)
        body.pop("anthropic_version", None)
        return fake.reply({**body, "model": "claude-sonnet-5-5"})

    return httpx2.AsyncClient(transport=httpx2.MockTransport(respond))


def bedrock(http_client):
    return AsyncAnthropicBedrock(
        api_key="bedrock-key", aws_region="eu-west-1", http_client=http_client
    )


def vertex(http_client):
    return AsyncAnthropicVertex(
        access_token="vertex-token", project_id="p", region="europe-west1", http_client=http_client
    )


@pytest.mark.parametrize(
    ("make", "model", "path"),
    [
        (
            bedrock,
            "anthropic.claude-sonnet-5-5-v1:0",
            "/model/anthropic.claude-sonnet-5-5-v1:0/invoke",
        ),
        (vertex, "claude-sonnet-5-5", "models/claude-sonnet-5-5:rawPredict"),
    ],
)
def test_a_clouds_client_is_used_as_it_is(make, model, path):
    seen = []
    judge = AnthropicJudge(model, max_usd=1.0, prices=PRICE, client=make(cloud(seen, model)))
    (judged,) = judge_comparisons([pair()], judge, progress=False)
    assert judged.mean_grade == -2
    asked = [request for request in seen if path in str(request.url)]
    assert len(asked) == 2
    body = json.loads(asked[0].content)
    assert body["output_config"]["format"]["type"] == "json_schema"


@pytest.mark.parametrize("make", [bedrock, vertex])
def test_a_cloud_without_message_batches_is_asked_one_by_one_or_says_so(make):
    model = "claude-sonnet-5-5"
    judge = AnthropicJudge(
        model, max_usd=1.0, prices=PRICE, client=make(cloud([], model)), transport="batch"
    )
    with pytest.raises(JudgeUnavailable, match="transport='sync'"):
        judge_comparisons([pair()], judge, progress=False)


def test_a_gateways_address_and_path_are_kept():
    seen = []
    fake = FakeAnthropic(prefer_longer)

    async def respond(request):
        seen.append(str(request.url))
        return await fake.respond(request)

    http_client = httpx2.AsyncClient(transport=httpx2.MockTransport(respond))
    client = AsyncAnthropic(
        api_key="gateway-key", base_url="https://gateway.example/anthropic", http_client=http_client
    )
    (judged,) = judge_comparisons(
        [pair()], AnthropicJudge("claude-sonnet-5-5", max_usd=1.0, client=client), progress=False
    )
    assert judged.mean_grade == -2
    assert "https://gateway.example/anthropic/v1/messages" in seen
