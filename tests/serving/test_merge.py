"""Adapters merged into plain weights, after training on full and on 4-bit base models."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.cli import main
from prefopt.errors import ModelError
from prefopt.models import (
    LoRASettings,
    attach_adapter,
    load_model,
    lora_config,
    merge_adapter,
    wrap_with_adapter,
)

IDS = torch.arange(3, 60)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    wrapped = wrap_with_adapter(load_model(tiny_model).model, lora_config(LoRASettings(r=4)))
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("merge") / "adapter"
    wrapped.save_pretrained(folder)
    return folder


def test_a_merged_model_is_plain_and_answers_as_with_the_adapter(tiny_model, adapter, tmp_path):
    merged = merge_adapter(tiny_model, adapter, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(
        logits(plain), logits(load_model(tiny_model, adapter=adapter).model), atol=1e-4, rtol=0
    )
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template


def test_a_folder_with_something_in_it_is_left_alone(tiny_model, adapter, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    options = ["--model", tiny_model, "--adapter", str(adapter), "--out", str(tmp_path)]
    assert main(["merge", *options]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_merge_that_fails_half_way_leaves_no_model(tiny_model, adapter, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    from prefopt.errors import DataError

    with pytest.raises(DataError, match="No space left"):
        merge_adapter(tiny_model, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_bfloat16_is_written_where_it_is_asked_for(tiny_model, adapter, tmp_path):
    merged = merge_adapter(tiny_model, adapter, tmp_path / "merged", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16


def test_without_bitsandbytes_4_bit_weights_are_refused(tiny_model, adapter, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"prefopt\[qlora\]"):
        merge_adapter(tiny_model, adapter, tmp_path / "merged", quantization="nf4")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
# On a CPU bitsandbytes has no derivative of its fastest product; it is not asked for one.
@pytest.mark.filterwarnings("ignore:bitsandbytes.*autograd kernel:UserWarning")
@pytest.mark.parametrize("double", [False, True])
def test_an_adapter_trained_on_4_bits_is_merged_into_what_training_saw(tmp_path, double):
    """Trained by DPOTrainer on a 4-bit base, on the CPU; the merged model is that policy."""
    from transformers import BitsAndBytesConfig

    from prefopt.training.dpo_trainer import DPOConfig, DPOTrainer
    from tests.serving.spm_model import save_spm_model

    model = save_spm_model(tmp_path / "spm")  # bitsandbytes wants rows of 64 weights
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    rows = [{"prompt": f"What is {i}?", "chosen": " one", "rejected": " many"} for i in range(8)]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=6,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        quantization_config=quantization,
        peft_config=lora_config(LoRASettings(r=4)),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=quantization
    )
    # Not in evaluation mode: on some CPUs bitsandbytes then packs weights anew, their scales rounded
    # to bfloat16, and keeps them so.
    trained = logits(attach_adapter(base, tmp_path / "adapter").train())

    kind = "nf4-double" if double else "nf4"
    seen = merge_adapter(model, tmp_path / "adapter", tmp_path / "seen", quantization=kind)
    original = merge_adapter(model, tmp_path / "adapter", tmp_path / "original")
    off_seen = (logits(AutoModelForCausalLM.from_pretrained(seen)) - trained).abs().max()
    off_original = (logits(AutoModelForCausalLM.from_pretrained(original)) - trained).abs().max()
    assert off_seen < 1e-4
    assert off_original > 100 * off_seen  # the quantisation error
