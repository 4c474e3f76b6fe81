"""A step that does not fit the memory: the setting named does fit, and training goes on with it."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefopt.errors import TrainingError
from prefopt.out_of_memory import is_out_of_memory, memory_words, without_memory_settings
from prefopt.training.dpo import train_dpo
from prefopt.training.dpo_trainer import DPOTrainer
from tests.training.test_dpo import LORA, SETTINGS, groups

TORCH_SAYS = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 8192 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError(TORCH_SAYS),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
    ],
)
def test_every_librarys_words_for_it_are_known(error):
    assert is_out_of_memory(error)
    assert len(memory_words(error)) <= 160
    assert memory_words(error)
    assert "enforce" not in memory_words(error)


def test_other_errors_are_none():
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))
    assert not is_out_of_memory(KeyboardInterrupt("out of memory"))


def test_memory_settings_are_no_part_of_what_a_result_depends_on():
    one = {"dpo": {"micro_batch_tokens": 64, "gradient_checkpointing": True, "beta": 0.1}}
    other = {"dpo": {"micro_batch_tokens": None, "gradient_checkpointing": False, "beta": 0.1}}
    assert without_memory_settings(one) == without_memory_settings(other)
    other["dpo"]["beta"] = 0.2
    assert without_memory_settings(one) != without_memory_settings(other)


def room_for(monkeypatch, n_tokens, *, at_step=2):
    """Have micro-batches of more tokens fail from a step on, in torch's words."""
    original = DPOTrainer._micro_batch_loss

    def limited(self, model, micro_batch, step, mode):
        size = sum(tree.n_tokens for tree in micro_batch.trees)
        if self.state.global_step + 1 >= at_step and size > n_tokens:
            raise RuntimeError(TORCH_SAYS)
        return original(self, model, micro_batch, step, mode)

    monkeypatch.setattr(DPOTrainer, "_micro_batch_loss", limited)


def test_the_setting_that_is_named_fits_and_training_goes_on_with_it(
    tiny_model, tmp_path, monkeypatch
):
    whole = train_dpo(
        groups(), tiny_model, tmp_path / "whole", settings=SETTINGS, lora=LORA, progress=False
    )
    room_for(monkeypatch, 80)
    out = tmp_path / "adapter"
    with pytest.raises(TrainingError, match="out of memory at step 2") as error:
        train_dpo(groups(), tiny_model, out, settings=SETTINGS, lora=LORA, progress=False)
    fits = int(
        re.search(r"Measured: this step fits with micro_batch_tokens (\d+)", str(error.value))[1]
    )
    assert fits <= 80
    seen = []
    original = DPOTrainer.training_step

    def count(self, *args):
        seen.append(self.state.global_step)
        return original(self, *args)

    monkeypatch.setattr(DPOTrainer, "training_step", count)
    smaller = replace(SETTINGS, micro_batch_tokens=fits)
    found = train_dpo(groups(), tiny_model, out, settings=smaller, lora=LORA, progress=False)
    assert seen[0] == 1  # from the checkpoint of the step before
    assert found.points[-1].loss == pytest.approx(whole.points[-1].loss, abs=1e-5)


def test_where_one_row_is_too_long_that_is_said(tiny_model, tmp_path, monkeypatch):
    room_for(monkeypatch, 5)
    with pytest.raises(TrainingError, match=r"Nothing smaller fits, its longest row.*max_length"):
        train_dpo(
            groups(), tiny_model, tmp_path / "a", settings=SETTINGS, lora=LORA, progress=False
        )


_LIMITED = """
import re, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from prefopt.errors import TrainingError
from prefopt.models import LanguageModel, LoRASettings
from prefopt.training import dpo
from tests.tiny_models import tiny_tokenizer
from tests.training.test_dpo import groups

tokenizer = tiny_tokenizer("chatml")
folder = Path(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256)
LlamaForCausalLM(config).save_pretrained(folder / "model")
tokenizer.save_pretrained(folder / "model")


class Limit(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + int(sys.argv[2]) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    def on_step_end(self, args, state, control, **_):
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

original = dpo._make_trainer
def make(*a, **k):
    trainer = original(*a, **k)
    trainer.add_callback(Limit())
    return trainer
dpo._make_trainer = make

def train(tokens):
    settings = dpo.DPOSettings(batch_size=96, micro_batch_tokens=tokens, max_length=128)
    return dpo.train_dpo(groups(96), str(folder / "model"), folder / f"adapter{tokens}",
        settings=settings, lora=LoRASettings(r=4), progress=False)

try:
    train(1_000_000)
    print("fits")
except TrainingError as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(error)
    train(int(re.search(r"with micro_batch_tokens (\\d+)[.]", str(error))[1]))
    print("and it does")
"""


@pytest.mark.slow
@pytest.mark.parametrize("room_mib", [64, 160])
def test_a_real_limit_on_memory_is_kept_with_the_setting_that_is_named(tmp_path, room_mib):
    """The system refuses memory beyond the limit, as a full machine does.

    The limit is one of addresses, and malloc keeps those of what was freed for later. A full machine
    lacks pages instead; so here whatever is larger than 1 MiB is given back at once.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path), str(room_mib)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    assert "Measured: this step fits with micro_batch_tokens" in done.stdout
    assert done.stdout.rstrip().endswith("and it does")
