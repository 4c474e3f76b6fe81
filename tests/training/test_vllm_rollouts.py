"""PPO's rollouts through vLLM: against a stand-in for its classes, since it needs a GPU.

The stand-in samples for real, with PEFT, from the base model's folder and the adapter that it is
told: so what is trained is what was sampled from, or the log shows that it is not. Nothing is shown
about vLLM itself.
"""

import copy
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prefopt.errors import ModelError, TrainingError
from prefopt.training.rollouts import ScoredIds
from tests.training.ppo_cases import END, LORA, PROMPTS, ByPrompt, make_trainer, tiny_policy


@pytest.fixture
def vllm(monkeypatch):
    """The recorded calls; `vllm` is importable meanwhile. `stale` goes on with the first adapter."""
    calls = SimpleNamespace(llm=[], generate=[], folders=[], stale=False, models=[])

    class LLM:
        def __init__(self, model, **options):
            calls.llm.append({"model": model, **options})
            self.base = AutoModelForCausalLM.from_pretrained(model)

        def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
            calls.generate.append((prompts, sampling_params, lora_request))
            folder = lora_request[2]
            calls.folders.append(sorted(f.name for f in Path(folder).parent.iterdir()))
            policy = PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()
            calls.models.append(policy)
            policy = calls.models[0] if calls.stale else policy
            return [
                SimpleNamespace(outputs=[answer(policy, prompt["prompt_token_ids"], params)])
                for prompt, params in zip(prompts, sampling_params, strict=True)
            ]

    @torch.no_grad()
    def answer(policy, prompt, params):
        draw, ids, logprobs = torch.Generator().manual_seed(params.seed), [], []
        while len(ids) < params.max_tokens and not set(ids) & set(params.stop_token_ids):
            logits = policy(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1]
            log_p = (logits / params.temperature).log_softmax(-1)
            token = int(torch.multinomial(log_p.exp(), 1, generator=draw))
            ids.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(log_p[token]))})
        stopped = ids[-1] in params.stop_token_ids
        reason = "stop" if stopped else "length"
        return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **fields: SimpleNamespace(**fields)
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: (name, number, path)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.lora", types.ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    return calls


@pytest.fixture
def base(tmp_path):
    """The tiny policy, read from a folder, so that it has a name."""
    tiny_policy().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def run(folder, base, **settings):
    trainer = make_trainer(
        folder,
        model=base,
        peft_config=LORA,
        rollout_engine="vllm",
        temperature=0.7,
        num_ppo_epochs=1,
        **settings,
    )
    trainer.train()
    return trainer


def gaps(trainer):
    found = (line.get("rollout/engine_gap") for line in trainer.state.log_history)
    return [gap for gap in found if gap is not None]


def test_each_rollout_batch_is_sampled_from_the_policy_of_that_moment(base, vllm, tmp_path):
    trainer = run(tmp_path / "run", base, num_rollouts=2)
    assert vllm.llm == [
        {
            "model": str(tmp_path / "base"), "enable_lora": True, "max_lora_rank": 8,
            "generation_config": "vllm", "enable_prefix_caching": True, "dtype": "float32",
            "logprobs_mode": "processed_logprobs", "gpu_memory_utilization": 0.3,
        }
    ]  # fmt: skip
    assert max(gaps(trainer)) < 1e-5
    # Its kl is a mean of differences, whose absolute values these are.
    assert all(abs(line.get("rollout/engine_kl", 0)) < 1e-5 for line in trainer.state.log_history)
    assert [call[2][:2] for call in vllm.generate] == [(f"adapter-{i}", i) for i in (1, 2)]
    assert vllm.folders == [["1"], ["2"]]  # none is left behind
    prompts, params, _ = vllm.generate[0]
    assert len(prompts) == 12
    assert prompts[0] == prompts[3]
    assert {tuple(p["prompt_token_ids"]) for p in prompts} <= {
        tuple(row["prompt_ids"]) for row in PROMPTS
    }
    assert len({p.seed for p in params}) == 12
    assert {k: v for k, v in vars(params[0]).items() if k != "seed"} == {
        "n": 1, "temperature": 0.7, "max_tokens": 5, "stop_token_ids": [END], "ignore_eos": True,
        "logprobs": 0, "detokenize": False,
    }  # fmt: skip
    held = trainer._experience
    assert all(ids[-1] == END or len(ids) == 5 for ids in held.answer_ids)


@pytest.mark.slow
def test_an_engine_that_keeps_an_old_adapter_shows(base, vllm, tmp_path):
    vllm.stale = True
    first, *later = gaps(run(tmp_path / "run", base, num_rollouts=3))
    assert first < 1e-5
    assert min(later) > 1e-3


@pytest.mark.slow
def test_answers_of_a_fixed_length(base, vllm, tmp_path):
    trainer = run(tmp_path / "run", base, num_rollouts=1, stop_token_ids=[])
    assert {len(ids) for ids in trainer._experience.answer_ids} == {5}


def test_without_vllm_it_is_said_how_to_get_it(base, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"prefopt\[vllm\]"):
        run(tmp_path / "run", base)


def test_what_vllm_cannot_sample_from_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"only adapters are swapped.*has no name"):
        make_trainer(tmp_path, rollout_engine="vllm")
    with pytest.raises(ValueError, match=r"rollout_engine must be one of .*, got 'sglang'"):
        make_trainer(tmp_path, rollout_engine="sglang")
    with pytest.raises(ValueError, match=r"vllm_gpu_memory_utilization must be in \(0, 1\), got 2"):
        make_trainer(tmp_path, vllm_gpu_memory_utilization=2)


def test_log_probabilities_for_some_tokens_only_are_refused(tmp_path):
    class Short(ByPrompt):
        def sample(self, *asked):
            return [
                [ScoredIds(ids, ended, (0.0,) * (len(ids) - 1)) for ids, ended in group]
                for group in super().sample(*asked)
            ]

    with pytest.raises(TrainingError, match="must give one for each"):
        make_trainer(tmp_path, engine=Short()).train()
