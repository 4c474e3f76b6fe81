"""How vLLM is called: against a recording of its classes, since it needs a GPU.

This shows which arguments go where and what is made of the outputs, and nothing about vLLM itself.
"""

import json
import sys
import types
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from prefopt import sample_candidates
from prefopt.chat import tokenize_prompt
from prefopt.errors import DataError, ModelError
from prefopt.sampling.candidates import SamplingSettings
from prefopt.sampling.sampler import load_sampler
from prefopt.sampling.vllm_sampler import VLLMSampler
from prefopt.types import Prompt

PROMPTS = [Prompt.from_text(t) for t in ("Hi", "Why is the sky blue?")]
SETTINGS = SamplingSettings(temperature=0.9, top_p=0.8, top_k=4, min_p=0.1, max_new_tokens=5)


@pytest.fixture
def recorded(monkeypatch):
    """The recorded calls; `vllm` is importable meanwhile."""
    calls = SimpleNamespace(llm=[], generate=[], outputs=0)

    class LLM:
        def __init__(self, model, **options):
            calls.llm.append({"model": model, **options})
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=256))

        def get_tokenizer(self):
            return self.tokenizer

        def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
            calls.generate.append((prompts, sampling_params, lora_request))
            outputs = []
            for params in sampling_params:
                calls.outputs += 1
                ended = params.seed % 2 == 0
                completion = SimpleNamespace(
                    text=f" text {params.seed}",
                    token_ids=[7, 8, 9],
                    finish_reason="stop" if ended else "length",
                )
                outputs.append(SimpleNamespace(outputs=[completion]))
            return outputs

    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **fields: SimpleNamespace(**fields)
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: (name, number, path)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora", types.ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    return calls


def sample(sampler, prompts=PROMPTS, **options):
    options = {"k": 3, "settings": SETTINGS, "progress": False} | options
    return sample_candidates(prompts, sampler, **options)


def adapter(folder, rank):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return folder


def test_every_answer_is_a_request_with_its_own_seed(tiny_model, recorded, tmp_path):
    sampler = load_sampler(f"vllm:{tiny_model}")
    assert recorded.llm == [
        {"model": tiny_model, "generation_config": "vllm", "enable_prefix_caching": True}
    ]
    found = sample(sampler, partial=tmp_path / "partial")
    ((prompts, params, lora),) = recorded.generate
    assert lora is None
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = [{"prompt_token_ids": tokenize_prompt(tokenizer, p)} for p in PROMPTS]
    assert prompts == [expected[0]] * 3 + [expected[1]] * 3
    seeds = [p.seed for p in params]
    assert len(set(seeds)) == 6
    assert {k: v for k, v in vars(params[0]).items() if k != "seed"} == {
        "n": 1, "temperature": 0.9, "top_p": 0.8, "top_k": 4, "min_p": 0.1, "max_tokens": 5,
        "stop_token_ids": [tokenizer.eos_token_id],
    }  # fmt: skip
    assert [c.prompt for c in found] == [p for p in PROMPTS for _ in range(3)]
    assert [c.text for c in found] == [f"text {seed}" for seed in seeds]
    assert [c.finish_reason for c in found] == ["length" if s % 2 else "stop" for s in seeds]
    assert [c.n_tokens for c in found] == [3 if s % 2 else 2 for s in seeds]
    # Seeds follow the prompt, not its place; and nothing is generated twice.
    sample(sampler, PROMPTS[::-1])
    assert [p.seed for p in recorded.generate[1][1]] == seeds[3:] + seeds[:3]
    assert sample(sampler, partial=tmp_path / "partial") == found
    assert len(recorded.generate) == 2


def test_adapters_are_swapped_without_loading_the_model_again(tiny_model, recorded, tmp_path):
    first, second, large = (adapter(tmp_path / n, r) for n, r in (("a", 12), ("b", 16), ("c", 64)))
    sampler = VLLMSampler(tiny_model, adapter=first, gpu_memory_utilization=0.5)
    assert recorded.llm[0] == {
        "model": tiny_model, "enable_lora": True, "max_lora_rank": 16, "generation_config": "vllm",
        "enable_prefix_caching": True, "gpu_memory_utilization": 0.5,
    }  # fmt: skip
    assert {c.model for c in sample(sampler)} == {f"{tiny_model}+adapter"}
    for folder in (second, first, None):
        sampler.use_adapter(folder)
        sample(sampler)
    assert [call[2] for call in recorded.generate] == [
        ("adapter-1", 1, str(first)),
        ("adapter-2", 2, str(second)),
        ("adapter-1", 1, str(first)),
        None,
    ]
    assert len(recorded.llm) == 1
    with pytest.raises(ModelError, match="max_lora_rank=64"):
        sampler.use_adapter(large)
    with pytest.raises(ModelError, match="no folder of a LoRA adapter"):
        sampler.use_adapter(tmp_path / "nothing")


def test_prompts_that_do_not_fit_are_told(tiny_model, recorded):
    with pytest.raises(DataError, match="1 prompt"):
        sample(VLLMSampler(tiny_model), [*PROMPTS, Prompt.from_text("word " * 400)])
    assert recorded.generate == []


def test_without_vllm_it_is_said_how_to_get_it(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"prefopt\[vllm\]"):
        load_sampler(f"vllm:{tiny_model}")
