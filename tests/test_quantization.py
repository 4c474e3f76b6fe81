"""A base model in 4 bits under an adapter (QLoRA): what is quantised, what trains, what is refused."""

import math

import pytest
import torch

from prefopt.models import LoRASettings, load_model
from prefopt.training.dpo import DPOSettings
from tests.training.test_dpo import train

QLORA = LoRASettings(r=4, alpha=8, quantization="nf4")


def test_linear_layers_are_quantised_and_nothing_else_is(tiny_model):
    model = load_model(tiny_model, quantization="nf4-double").model
    packed = {n for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed == {n for n, _ in model.named_parameters() if "_proj." in n}
    assert model.get_output_embeddings().weight.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())


def test_the_reference_is_the_same_quantised_base(tiny_model, tmp_path):
    """The loss of the first step is ln 2 to the last bit, the adapter learns, and it is plain LoRA."""
    settings = DPOSettings(learning_rate=5e-3, batch_size=4, max_length=128, epochs=4)
    result = train(tiny_model, tmp_path / "adapter", settings=settings, lora=QLORA)
    assert result.points[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert result.points[0].margin == 0.0
    assert result.points[-1].margin > 0.2
    loaded = load_model(tiny_model, adapter=tmp_path / "adapter").model
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.float32}


@pytest.mark.slow
def test_two_hundred_steps_stay_finite(tiny_model, tmp_path):
    settings = DPOSettings(
        learning_rate=5e-3, batch_size=4, max_length=128, epochs=67, gradient_checkpointing=True
    )
    result = train(tiny_model, tmp_path / "adapter", settings=settings, lora=QLORA)
    assert result.points[-1].step >= 200
    assert all(math.isfinite(p.loss) and math.isfinite(p.margin) for p in result.points)
