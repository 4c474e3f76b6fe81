"""Models and adapters from somebody else: their code does not run, and pickles stay closed."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from prefopt.errors import ModelError
from prefopt.models import (
    LoRASettings,
    attach_adapter,
    load_adapter_weights,
    load_classification_adapter,
    load_model,
    load_sequence_classifier,
    load_tokenizer,
    lora_config,
    wrap_with_adapter,
)
from prefopt.plan_model import read_config
from prefopt.training.policy_setup import load_policy


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


@pytest.fixture
def with_code(tiny_model, tmp_path, marker):
    """A model of a kind that only its own code knows."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    names = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "evil.M",
        "AutoTokenizer": ["evil.T", None],
    }
    names["AutoModelForSequenceClassification"] = "evil.S"
    for file in ("config.json", "tokenizer_config.json"):
        said = json.loads((folder / file).read_text())
        said |= {"auto_map": names, "model_type": "evil", "tokenizer_class": "EvilTokenizer"}
        (folder / file).write_text(json.dumps(said))
    return str(folder)


@pytest.mark.parametrize(
    "load",
    [
        load_model, load_tokenizer, load_sequence_classifier, read_config,
        lambda folder: load_policy(folder, {"dtype": "float32"}),
    ],
    ids=["model", "tokenizer", "reward", "plan", "trainer"],
)  # fmt: skip
def test_the_code_of_a_model_does_not_run_even_where_someone_would_say_yes(
    with_code, load, monkeypatch
):
    def asked(question=""):
        raise AssertionError(f"asked on the terminal: {question}")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises((ModelError, ValueError), match=r"custom code|trust_remote_code"):
        load(with_code)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickled_model_stays_closed(tiny_model, tmp_path, marker, sharded):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    (folder / name).write_bytes(pickle.dumps(Evil(marker)))
    if sharded:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder))
    with pytest.raises(OSError, match="safetensors"):
        load_policy(str(folder), {"dtype": "float32"})


def test_a_pickled_adapter_stays_closed(tiny_model, tmp_path, marker):
    model = load_model(tiny_model).model
    adapted = wrap_with_adapter(model, lora_config(LoRASettings(r=2)))
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    # Harmless tensors in a pickle: even what PEFT would take is not opened.
    torch.save({"x": torch.zeros(1)}, folder / "adapter_model.bin")
    weights.rename(tmp_path / "aside")
    for attempt in (
        lambda: load_model(tiny_model, adapter=folder),
        lambda: attach_adapter(load_model(tiny_model).model, folder),
        lambda: load_adapter_weights(adapted, folder, "default"),
        lambda: load_classification_adapter(str(folder)),
    ):
        with pytest.raises(ModelError, match="pickles"):
            attempt()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ModelError, match="pickles"):
        load_model(tiny_model, adapter=folder)
    shutil.copy(tmp_path / "aside", weights)
    assert load_model(tiny_model, adapter=folder).model.peft_config["default"].r == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_another_pickle_is_not_opened(tiny_model, tmp_path, marker, name):
    """Optimizer, schedule and random state are read by torch with weights_only, which runs nothing."""
    from datasets import Dataset

    from prefopt.training.dpo_config import DPOConfig
    from prefopt.training.dpo_trainer import DPOTrainer

    rows = Dataset.from_list(
        [{"prompt": f"What is {i}?", "chosen": " one", "rejected": " two"} for i in range(4)]
    )

    def trainer():
        return DPOTrainer(
            tiny_model,
            args=DPOConfig(
                output_dir=str(tmp_path / "out"), max_steps=2, save_steps=1, report_to="none",
                per_device_train_batch_size=2, use_cpu=True, bf16=False,
            ),
            train_dataset=rows,
            peft_config=lora_config(LoRASettings(r=2)),
        )  # fmt: skip

    trainer().train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported|unpickl"):
        trainer().train(resume_from_checkpoint=str(checkpoint))


def test_the_test_would_see_code_that_runs(tmp_path):
    path = Path(tmp_path / "seen")
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists()
