"""What PEFT, vLLM and llama.cpp would say to an adapter folder, and what PEFT does say."""

import json
import math
import shutil

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefopt.cli import main
from prefopt.errors import DataError
from prefopt.models import LoRASettings, load_model, lora_config, wrap_with_adapter
from prefopt.serving.adapter_check import VLLM_RANKS, check_adapter
from prefopt.training.dpo import DPOSettings, train_dpo
from prefopt.types import Candidate, Preference, PreferenceGroup, Prompt


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """An adapter as `prefopt train dpo` leaves it."""
    prompt = Prompt.from_text("What is blue?")
    answers = tuple(
        Candidate(prompt=prompt, text=text, model="m", finish_reason="stop")
        for text in ("The sky.", "The sea is what is blue.")
    )
    group = PreferenceGroup(
        prompt=prompt,
        answers=answers,
        preferences=(Preference(chosen=0, rejected=1, p_chosen=0.9),),
    )
    settings = DPOSettings(learning_rate=1e-2, batch_size=1, max_length=128, epochs=3)
    out = tmp_path_factory.mktemp("trained") / "adapter"
    return train_dpo(
        [group], tiny_model, out, settings=settings, lora=LoRASettings(r=4), progress=False
    ).adapter


def saved(model, folder, **settings):
    """A saved adapter of any PEFT settings."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    wrapped = wrap_with_adapter(AutoModelForCausalLM.from_pretrained(model), config)
    wrapped.save_pretrained(folder)
    return folder


def edited(folder, target, **changes):
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def test_a_trained_adapter_loads_in_plain_peft_and_answers_the_same(tiny_model, trained):
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), trained
    ).eval()
    ours = load_model(tiny_model, adapter=trained).model
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, ours(ids).logits)
        with ours.disable_adapter():
            assert not torch.allclose(plain(ids).logits, ours(ids).logits)


def test_a_trained_adapter_is_one_that_everybody_takes(tiny_model, trained):
    found = check_adapter(trained)
    assert found.peft == found.vllm == found.llama_cpp == ()
    assert found.rank == 4
    assert found.scale == 8.0
    assert found.n_layers == 14
    assert set(found.modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert found.base_model == tiny_model
    assert "--max-lora-rank 8 " in found.to_text()
    assert any("folder of this machine" in note for note in found.notes)


def test_rslora_keeps_its_own_scale(tiny_model, tmp_path):
    wrapped = wrap_with_adapter(
        load_model(tiny_model).model, lora_config(LoRASettings(r=4, alpha=8, rslora=True))
    )
    wrapped.save_pretrained(tmp_path / "a")
    found = check_adapter(tmp_path / "a")
    assert found.scale == 8 / math.sqrt(4)
    assert found.scale == wrapped.base_model.model.model.layers[0].mlp.up_proj.scaling["default"]
    assert not found.llama_cpp


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "modules_to_save: norm"),
        ({"bias": "lora_only"}, "biases"),
        ({"trainable_token_indices": [3, 5]}, "single tokens"),
        ({"alpha_pattern": {"q_proj": 2}}, "scales of their own"),
    ],
)
def test_what_vllm_and_llama_cpp_cannot_apply_is_named_with_what_to_do(
    tiny_model, tmp_path, settings, told
):
    found = check_adapter(saved(tiny_model, tmp_path / "a", **settings))
    assert found.peft == ()
    for problems in (found.vllm, found.llama_cpp):
        (problem,) = problems
        assert told in problem
        assert "prefopt merge" in problem
    assert "vllm serve" not in found.to_text()


def test_ranks_of_their_own_are_vllms_problem_and_not_llama_cpps(tiny_model, tmp_path):
    found = check_adapter(saved(tiny_model, tmp_path / "a", rank_pattern={"q_proj": 12}))
    assert found.rank == 12
    assert not found.peft
    assert not found.llama_cpp
    assert "ranks of their own" in found.vllm[0]


@given(st.integers(1, 700))
def test_the_rank_that_vllm_is_started_with_is_the_least_that_holds_it(rank):
    from prefopt.serving.adapter_check import AdapterCheck

    found = AdapterCheck(
        folder="f", base_model="b", rank=rank, scale=1.0, modules=("q_proj",), n_layers=1
    ).vllm_max_lora_rank
    if rank > 512:
        assert found is None
    else:
        assert found in VLLM_RANKS
        assert found >= rank
        assert all(r < rank for r in VLLM_RANKS if r < found)


def test_a_rank_above_vllms_last_is_told(tiny_model, tmp_path):
    found = check_adapter(saved(tiny_model, tmp_path / "a", r=520))
    assert "--max-lora-rank ends at 512" in found.vllm[0]
    assert not found.llama_cpp


def test_an_adapter_that_changed_its_base_model_is_told(trained, tmp_path):
    found = check_adapter(edited(trained, tmp_path / "a", init_lora_weights="pissa_niter_4"))
    assert "changes the base model's weights" in found.vllm[0]


def test_torn_and_foreign_weights_are_told(trained, tmp_path):
    half = edited(trained, tmp_path / "half")
    weights = load_file(half / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.lora_B.weight"))
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept, half / "adapter_model.safetensors")
    assert "only one of lora_A and lora_B" in check_adapter(half).peft[0]

    other_rank = edited(trained, tmp_path / "rank", r=8)
    assert "do not fit r = 8" in check_adapter(other_rank).peft[0]

    foreign = edited(trained, tmp_path / "foreign")
    save_file({**weights, "base_model.model.score.weight": torch.zeros(1, 32)},
              foreign / "adapter_model.safetensors")  # fmt: skip
    found = check_adapter(foreign)
    assert not found.peft
    assert "score.weight" in found.vllm[0]


def test_a_folder_that_is_no_adapter_is_refused_with_all_its_problems(trained, tmp_path):
    with pytest.raises(DataError) as told:
        check_adapter(tmp_path)
    assert len(told.value.problems) == 2
    for changes, problem in (
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"r": 0}, "r in adapter_config.json must be a positive number, got 0"),
        ({"lora_alpha": "much"}, "got 'much'"),
    ):
        with pytest.raises(DataError, match=problem):
            check_adapter(edited(trained, tmp_path / problem[:6].strip("'"), **changes))
    (tmp_path / "adapter_config.json").write_text('{"r": 4, ')
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(DataError, match=r"cannot be read(.|\n)*a pickle that is not opened"):
        check_adapter(tmp_path)


def test_a_file_that_was_cut_short_is_told(trained, tmp_path):
    folder = edited(trained, tmp_path / "ünïcode ☃")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="cut short"):
        check_adapter(folder)


def test_the_command_says_how_vllm_is_started(trained, capsys):
    assert main(["check-adapter", "--adapter", str(trained)]) == 0
    assert "vllm serve" in capsys.readouterr().out
    assert main(["check-adapter", "--adapter", "nowhere"]) == 1
    assert "there is no adapter_config.json" in capsys.readouterr().err
