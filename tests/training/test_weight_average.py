"""The mean of the weights over the last steps, checked against the weights of each step."""

import pytest
import torch
import transformers

from prefopt import WeightAverage
from prefopt.errors import TrainingError
from prefopt.training.weight_average import WEIGHT_AVERAGE_FILE
from tests.training.ppo_cases import LORA, make_trainer, tiny_policy


class Path(transformers.TrainerCallback):
    """The trained weights after each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.steps.append(trained(model))


def trained(model):
    return {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}


class Rows(torch.utils.data.Dataset):
    """Eight rows of five symbols."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = torch.tensor([i % 8, (i + 1) % 8, (3 * i) % 8, 5, i % 7])
        return {"input_ids": ids, "labels": ids}


def plain_trainer(folder, callbacks, **settings):
    """transformers' own trainer, four steps of two rows."""
    arguments = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 0.05, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 3,
        "dataloader_pin_memory": False, "lr_scheduler_type": "constant", **settings,
    }  # fmt: skip
    trainer = transformers.Trainer(
        model=tiny_policy(),
        args=transformers.TrainingArguments(str(folder), **arguments),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def assert_mean(found, steps):
    assert found
    for name, weight in found.items():
        mean = torch.stack([step[name] for step in steps]).mean(0)
        torch.testing.assert_close(weight, mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("share", "n"), [(0.5, 2), (1.0, 4), (0.1, 1), (0.51, 3)])
def test_the_model_becomes_the_mean_of_the_last_steps(tmp_path, share, n):
    path, average = Path(), WeightAverage(share=share)
    trainer = plain_trainer(tmp_path, [path, average])
    trainer.train()
    assert average.n_averaged == n
    assert_mean(trained(trainer.model), path.steps[-n:])
    last = path.steps[-1]
    moved = max(float((w - last[k]).abs().max()) for k, w in trained(trainer.model).items())
    assert (moved == 0) == (n == 1)


def test_training_itself_is_not_changed(tmp_path):
    with_mean, without = Path(), Path()
    plain_trainer(tmp_path, [with_mean, WeightAverage()]).train()
    plain_trainer(tmp_path, [without]).train()
    for a, b in zip(with_mean.steps, without.steps, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_of_ppos_adapters_only_what_trains_is_averaged_and_the_base_stays(tmp_path):
    path, model = Path(), tiny_policy()
    before = {n: w.clone() for n, w in model.state_dict().items()}
    trainer = make_trainer(
        tmp_path, model=model, peft_config=LORA, callbacks=[path, WeightAverage()]
    )
    trainer.train()
    assert_mean(trained(trainer.model), path.steps[-2:])
    base = trainer.model.get_base_model().state_dict()
    same = [n for n in before if n.replace(".weight", ".base_layer.weight") in base or n in base]
    assert same
    for name in same:
        found = base.get(name, base.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(found, before[name])


def test_a_resumed_run_has_the_mean_of_an_uninterrupted_one(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = plain_trainer(tmp_path / "whole", [WeightAverage(share=0.75)], **settings)
    whole.train()
    assert not (tmp_path / "whole/checkpoint-1" / WEIGHT_AVERAGE_FILE).exists()
    for step in (1, 2, 3):  # before, in and near the end of the averaged steps
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        average = WeightAverage(share=0.75)
        again = plain_trainer(tmp_path / "whole", [average], **settings)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert average.n_averaged == 3
        for name, weight in trained(again.model).items():
            torch.testing.assert_close(weight, trained(whole.model)[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fault", ["missing", "torn", "other weights"])
def test_a_mean_that_cannot_be_gone_on_from_is_refused(tmp_path, fault):
    settings = {"save_strategy": "steps", "save_steps": 3}
    plain_trainer(tmp_path, [WeightAverage()], **settings).train()
    file = tmp_path / "checkpoint-3" / WEIGHT_AVERAGE_FILE
    if fault == "missing":
        file.unlink()
    elif fault == "torn":
        file.write_bytes(file.read_bytes()[:100])
    again = plain_trainer(tmp_path, [WeightAverage()], **settings)
    if fault == "other weights":
        again.model.lm_head.weight.requires_grad_(False)
        with pytest.raises(TrainingError, match="other weights"):
            again.callback_handler.on_train_begin(again.args, state_at(3), again.control)
        return
    with pytest.raises(TrainingError, match="cannot be read"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def state_at(step):
    return transformers.TrainerState(global_step=step, max_steps=4)


def test_low_precision_weights_are_averaged_in_float32(tmp_path):
    average, model = WeightAverage(share=1.0), torch.nn.Linear(1, 1, bias=False).bfloat16()
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    average.on_train_begin(args, transformers.TrainerState(max_steps=200), None, model=model)
    for step in range(1, 201):
        model.weight.data.fill_(1.0 if step % 4 else 2.0)
        state = transformers.TrainerState(global_step=step, max_steps=200)
        average.on_step_end(args, state, None, model=model)
    average.on_train_end(args, state, None, model=model)
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == 1.25


def test_a_run_that_ends_before_the_averaged_steps_keeps_its_weights(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = True

    path = Path()
    trainer = plain_trainer(tmp_path, [path, WeightAverage(), Stop()])
    trainer.train()
    assert len(path.steps) == 1
    assert all(torch.equal(w, path.steps[0][n]) for n, w in trained(trainer.model).items())


@pytest.mark.parametrize("share", [0, -1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        WeightAverage(share=share)


def test_the_best_checkpoint_excludes_a_mean(tmp_path):
    trainer = plain_trainer(
        tmp_path, [WeightAverage()], save_strategy="steps", eval_strategy="steps", eval_steps=2,
        save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        trainer.train()
