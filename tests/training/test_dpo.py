"""DPO training: where it starts, what it learns, how it resumes, what it refuses."""

import json
import logging
import math
import shutil
from dataclasses import replace
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from prefopt.errors import DataError, ModelError, TrainingError
from prefopt.losses import LOSS_NAMES
from prefopt.models import LoRASettings, load_model, merge_adapter
from prefopt.training import dpo as module
from prefopt.training.dpo import DPOSettings, load_training_log, train_dpo
from prefopt.types import Candidate, Preference, PreferenceGroup, Prompt

SETTINGS = DPOSettings(learning_rate=5e-3, batch_size=4, max_length=128, checkpoint_every=1)
LORA = LoRASettings(r=4, alpha=8)


def groups(n=12, flip=False):
    """Pairs in which the answer "green" is always preferred to the answer "blue"."""
    made = []
    for i in range(n):
        prompt = Prompt.from_text(f"What is the colour of thing {i}?")
        answers = tuple(
            Candidate(prompt=prompt, text=f"The thing is {c}.", model="m", finish_reason="stop")
            for c in ("green", "blue")
        )
        chosen = int(flip)
        made.append(
            PreferenceGroup(
                prompt=prompt,
                answers=answers,
                preferences=(Preference(chosen=chosen, rejected=1 - chosen, p_chosen=0.9),),
            )
        )
    return made


def train(model, out, data=None, settings=SETTINGS, lora=LORA):
    return train_dpo(data or groups(), model, out, settings=settings, lora=lora, progress=False)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_training_starts_at_ln_2_with_margin_0_and_learns_the_planted_preference(
    tiny_model, tmp_path
):
    settings = DPOSettings(learning_rate=5e-3, batch_size=4, max_length=128, epochs=6)
    result = train(tiny_model, tmp_path / "adapter", settings=settings)
    assert result.points[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert result.points[0].margin == 0.0
    assert result.points[-1].margin > 0.3
    assert result.points[-1].accuracy == 1.0
    assert result.reference == "the base model (adapter off)"
    assert load_training_log(result.adapter) == result.points
    assert "Chosen beats rejected" in (result.adapter / "README.md").read_text()


def test_exchanging_chosen_and_rejected_teaches_the_opposite(tiny_model, tmp_path):
    result = train(tiny_model, tmp_path / "adapter", data=groups(flip=True))
    assert result.points[-1].margin > 0
    loaded = load_model(tiny_model, adapter=result.adapter)
    from prefopt.chat import tokenize_preference

    group = groups()[0]
    ids = tokenize_preference(loaded.tokenizer, *group.answers)

    def logp(model, answer):
        whole = torch.tensor([[*ids.prompt_ids, *answer]])
        with torch.no_grad():
            logits = model(whole).logits[0, len(ids.prompt_ids) - 1 : -1]
        return logits.log_softmax(-1)[range(len(answer)), list(answer)].sum().item()

    tuned = logp(loaded.model, ids.rejected_ids) - logp(loaded.model, ids.chosen_ids)
    with loaded.adapter_off():
        base = logp(loaded.model, ids.rejected_ids) - logp(loaded.model, ids.chosen_ids)
    assert tuned > base  # "blue" gained on "green"


def test_a_killed_training_ends_with_the_same_weights(tiny_model, tmp_path, monkeypatch):
    undisturbed = train(tiny_model, tmp_path / "whole")
    original = module._make_trainer

    def killed_at_step_2(*arguments, **options):
        from transformers import TrainerCallback

        class Kill(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == 2:
                    raise KeyboardInterrupt

        trainer = original(*arguments, **options)
        trainer.add_callback(Kill())
        return trainer

    monkeypatch.setattr(module, "_make_trainer", killed_at_step_2)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path / "resumed")
    monkeypatch.setattr(module, "_make_trainer", original)
    checkpoints = tmp_path / "resumed.checkpoints"
    assert (checkpoints / "checkpoint-2").exists()
    # A kill while a checkpoint is written leaves one without a readable state file.
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-3")
    (checkpoints / "checkpoint-3" / "trainer_state.json").write_text('{"global_st')
    resumed = train(tiny_model, tmp_path / "resumed")
    assert_same_weights(weights(undisturbed.adapter), weights(resumed.adapter))
    assert resumed.points == undisturbed.points
    assert not checkpoints.exists()


def test_checkpoints_of_another_training_are_not_continued(tiny_model, tmp_path, caplog):
    stale = tmp_path / "adapter.checkpoints"
    (stale / "checkpoint-3").mkdir(parents=True)
    (stale / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    with caplog.at_level(logging.WARNING):
        result = train(tiny_model, tmp_path / "adapter")
    assert "different training" in caplog.text
    assert len(result.points) == 3


def test_the_split_into_micro_batches_does_not_change_the_result(tiny_model, tmp_path):
    whole, split = (
        train(
            tiny_model,
            tmp_path / f"micro{size}",
            settings=DPOSettings(
                learning_rate=1e-3, batch_size=4, micro_batch_tokens=size, max_length=128
            ),
        )
        for size in (1000, 1)
    )
    for name, value in weights(whole.adapter).items():
        torch.testing.assert_close(weights(split.adapter)[name], value, rtol=1e-3, atol=1e-5)
    for a, b in zip(whole.points, split.points, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-5)


def test_continuing_an_adapter_starts_from_it_and_keeps_it_as_reference(tiny_model, tmp_path):
    first = train(tiny_model, tmp_path / "first")
    lora = LoRASettings(continue_from=str(first.adapter))
    second = train(tiny_model, tmp_path / "second", lora=lora)
    assert str(first.adapter) in second.reference
    assert second.points[0].margin == 0.0
    assert second.points[0].chosen_logp != first.points[0].chosen_logp
    assert any(
        not torch.equal(weights(first.adapter)[n], w) for n, w in weights(second.adapter).items()
    )
    assert not (second.adapter / "ref").exists()


def test_continuing_an_adapter_with_the_base_model_as_reference(tiny_model, tmp_path):
    """The second training's first margin is the first one's last, not 0."""
    first = train(tiny_model, tmp_path / "first")
    second = train(
        tiny_model,
        tmp_path / "second",
        lora=LoRASettings(continue_from=str(first.adapter)),
        settings=replace(SETTINGS, reference="base"),
    )
    assert "base model" in second.reference
    assert second.points[0].margin > first.points[0].margin == 0.0
    assert second.points[0].loss < math.log(2)


@pytest.mark.parametrize("lora", [LoRASettings(dora=True), LoRASettings(rslora=True, r=2)])
def test_dora_and_rslora_train(tiny_model, tmp_path, lora):
    assert train(tiny_model, tmp_path / "adapter", lora=lora).points[-1].margin > 0


def test_training_refuses_to_start_when_policy_and_reference_differ(
    tiny_model, tmp_path, monkeypatch
):
    original = module.lora_config

    def not_at_zero(settings):
        config = original(settings)
        config.init_lora_weights = False  # PEFT then draws B at random: the policy is not the base
        return config

    monkeypatch.setattr(module, "lora_config", not_at_zero)
    with pytest.raises(TrainingError, match="before the first step policy and reference differ"):
        train(tiny_model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_how_sure_a_label_is_counts_unless_it_is_ignored(tiny_model, tmp_path):
    def last(soft_labels):
        settings = replace(SETTINGS, soft_labels=soft_labels)
        return train(tiny_model, tmp_path / soft_labels, settings=settings).points[-1]

    sure, soft = last("ignore"), last("expected")
    # p_chosen is .9, and .9 l(m) + .1 l(-m) = l(m) + .1 m for the sigmoid loss l of a margin m.
    assert sure.margin > 0.05
    assert soft.loss == pytest.approx(sure.loss + 0.1 * sure.margin, rel=1e-3)


def test_the_names_of_the_losses_are_those_that_there_are():
    assert get_args(module.LossName) == LOSS_NAMES


def test_a_prompt_that_fills_max_length_is_refused_before_training(tiny_model, tmp_path):
    with pytest.raises(DataError, match="the prompt alone has"):
        train(
            tiny_model,
            tmp_path / "adapter",
            settings=DPOSettings(max_length=8, batch_size=4),
        )
    with pytest.raises(DataError, match="no preference pairs"):
        train_dpo([], tiny_model, tmp_path / "adapter", progress=False)


def test_a_missing_adapter_is_named(tiny_model, tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        train(
            tiny_model, tmp_path / "a", lora=LoRASettings(continue_from=str(tmp_path / "nowhere"))
        )


def test_merging_gives_the_adapter_s_answers_without_peft(tiny_model, tmp_path):
    result = train(tiny_model, tmp_path / "adapter")
    merged = load_model(str(merge_adapter(tiny_model, result.adapter, tmp_path / "merged")))
    adapted = load_model(tiny_model, adapter=result.adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(
            merged.model(ids).logits, adapted.model(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_bad_settings_are_told_all_at_once():
    with pytest.raises(ValueError, match=r"learning_rate.*micro_batch_tokens.*beta.*loss_weights"):
        DPOSettings(beta=0, learning_rate=-1, micro_batch_tokens=0, loss_weights=[1.0, 2.0])
    wrong = ("epochs", "max_grad_norm", "warmup", "weight_decay", "beta")
    with pytest.raises(ValueError, match=r"epochs.*max_grad_norm.*warmup.*schedule.*weight_d.*be"):
        DPOSettings(**dict.fromkeys(wrong, math.nan), schedule="step")
    with pytest.raises(ValueError, match=r"r must be.*alpha.*dropout"):
        LoRASettings(r=0, alpha=0, dropout=1.5)
