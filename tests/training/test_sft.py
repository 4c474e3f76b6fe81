"""Supervised fine-tuning: which tokens are learned, how it resumes, what it refuses."""

import json
import logging
import math
import shutil
from dataclasses import replace

import datasets
import pytest
import torch
import trl
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from prefopt.data.demonstrations import Demonstration
from prefopt.data.prompts import plain_texts
from prefopt.errors import DataError, ModelError, TrainingError
from prefopt.models import LoRASettings, load_model, lora_config
from prefopt.training import sft as module
from prefopt.training.sft import (
    SFTPoint,
    SFTSettings,
    default_sft_learning_rate,
    diagnose_sft,
    load_sft_log,
    train_sft,
)
from prefopt.training.sft_trainer import SFTTrainer, token_columns
from prefopt.training.token_rows import tokenize_demonstrations
from prefopt.types import Prompt
from tests.tiny_models import TEMPLATES, save_tiny_model, tiny_tokenizer

SETTINGS = SFTSettings(learning_rate=5e-3, batch_size=4, max_length=128, checkpoint_every=1)
LORA = LoRASettings(r=4, alpha=8)

pytestmark = pytest.mark.usefixtures("light_collections")


def answers(n=12, answer="The thing is green. 🌱"):
    return [
        Demonstration(
            prompt=Prompt.from_text(f"What is the colour of thing {i}?"), text=answer, source="test"
        )
        for i in range(n)
    ]


def train(model, out, rows=None, settings=SETTINGS, lora=LORA, **options):
    return train_sft(
        rows or answers(), model, out, settings=settings, lora=lora, progress=False, **options
    )


def weights(folder, name="adapter_model"):
    return load_file(folder / f"{name}.safetensors")


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def learned_text(template, row):
    """What the labels of a row spell: the tokens that are learned."""
    tokenizer = tiny_tokenizer(template)
    (found,) = tokenize_demonstrations([row], tokenizer, max_length=256)
    columns = token_columns(found)
    kept = [label for label in columns["labels"] if label != -100]
    assert columns["input_ids"][-len(kept) :] == kept
    return tokenizer.decode(kept), kept[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_learned_tokens_are_the_answer_and_one_end_token(template):
    row = answers(1)[0]
    text, ends_in_eos = learned_text(template, row)
    ends = {"gemma": "<end_of_turn>", "two_ends": "<|end|>"}
    end = ends.get(template, tiny_tokenizer(template).eos_token)
    assert text.endswith(f"{row.text}{end}" if template != "words" else f"\n{end}")
    assert "What is" not in text
    assert text.count(end) == 1
    assert ends_in_eos == (template not in ends)
    cut_off, _ = learned_text(template, replace_text(row, complete=False))
    assert cut_off.endswith(row.text)


def replace_text(row, **changes):
    return Demonstration(**{name: getattr(row, name) for name in row.__struct_fields__} | changes)


@pytest.mark.parametrize("template", TEMPLATES)
def test_of_plain_text_everything_but_the_first_token_is_learned(template):
    tokenizer = tiny_tokenizer(template)
    row = Demonstration(prompt=None, text="The sky is blue.", complete=False, source="test")
    (found,) = tokenize_demonstrations([row], tokenizer, max_length=256)
    assert len(found.prompt_ids) == 1
    assert tokenizer.decode(found.prompt_ids + found.answer_ids).endswith("The sky is blue.")
    has_bos = template == "plain"  # the one tokenizer that puts BOS in front by itself
    assert (found.prompt_ids[0] == tokenizer.bos_token_id) == has_bos


def test_the_loss_is_that_of_the_answers_tokens_by_the_models_own_logits(tiny_model, tmp_path):
    rows = [*answers(2), *answers(1, "No."), Demonstration(prompt=None, text="a b c", source="t")]
    result = train(tiny_model, tmp_path / "out", rows, replace(SETTINGS, epochs=1, warmup=0.5))
    loaded = load_model(tiny_model)
    losses, hits = [], []
    for row in tokenize_demonstrations(rows, loaded.tokenizer, max_length=128):
        n = len(row.answer_ids)
        with torch.no_grad():
            logits = loaded.model(torch.tensor([row.prompt_ids + row.answer_ids])).logits[0]
        log_p = logits[-n - 1 : -1].log_softmax(-1)
        losses += (-log_p[range(n), list(row.answer_ids)]).tolist()
        hits += (log_p.argmax(-1) == torch.tensor(row.answer_ids)).tolist()
    (point,) = result.points
    assert point.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert point.accuracy == pytest.approx(sum(hits) / len(hits), abs=1e-6)
    assert result.n_tokens == len(losses)


def test_the_gradient_is_that_of_trls_own_step(tiny_model, tmp_path):
    """On the same token ids; our own micro-batches are of one row each."""
    loaded = load_model(tiny_model)
    rows = tokenize_demonstrations(
        answers(4, "Green.") + answers(2), loaded.tokenizer, max_length=128
    )
    gradients = []
    for ours in (True, False):
        model = load_model(tiny_model)
        settings = replace(SETTINGS, batch_size=6, micro_batch_tokens=1)
        trainer = module._make_trainer(model, rows, settings, LORA, tmp_path / "c", False)
        args = trainer.args
        if not ours:
            dataset = datasets.Dataset.from_list([token_columns(row) for row in rows])
            model = load_model(tiny_model)
            trainer = trl.SFTTrainer(
                model=model.model,
                args=args,
                train_dataset=dataset,
                processing_class=model.tokenizer,
                peft_config=lora_config(LORA),
            )
        trainer.create_optimizer_and_scheduler(num_training_steps=1)
        (batch,) = trainer.get_train_dataloader()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.training_step(trainer.model, batch)
        found = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        gradients.append((loss, found))
    (loss, ours), (other_loss, theirs) = gradients
    torch.testing.assert_close(loss, other_loss)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-6)


def test_trl_itself_would_teach_other_tokens():
    """Why rows are tokenized here: what follows the end token, and no end where none is written."""
    taught = {}
    for template in ("chatml", "words"):
        tokenizer = tiny_tokenizer(template)
        row = {
            "prompt": [{"role": "user", "content": "What?"}],
            "completion": [{"role": "assistant", "content": "Green."}],
        }
        trainer = object.__new__(trl.SFTTrainer)
        trainer.completion_only_loss, trainer.chat_template = True, None
        trainer._tokenizer = tokenizer
        prepared = trainer._prepare_dataset(
            datasets.Dataset.from_list([row]), tokenizer,
            trl.SFTConfig(use_cpu=True, bf16=False, report_to="none"), False, None, "train",
        )  # fmt: skip
        labels = [token for token in prepared[0]["labels"] if token != -100]
        taught[template] = tokenizer.decode(labels)
    assert taught == {"chatml": "Green.<|im_end|>\n", "words": "Green.\n"}


def test_it_learns_and_the_general_rows_are_a_tenth_of_all(tiny_model, tmp_path):
    replay = tmp_path / "general.txt"
    replay.write_text("".join(f"The sky is blue and the sea is {i}.\n" for i in range(40)))
    settings = replace(SETTINGS, epochs=6, batch_size=10, checkpoint_every=None)
    result = train(tiny_model, tmp_path / "out", answers(18), settings, replay=str(replay))
    assert (result.n_demonstrations, result.n_replay) == (18, 2)
    assert 0.05 < result.replay_token_share < 0.3
    assert result.points[-1].loss < 0.8 * result.points[0].loss
    assert result.points[-1].accuracy > result.points[0].accuracy
    assert load_sft_log(result.folder) == result.points
    card = (result.folder / "README.md").read_text()
    assert "18 demonstrations\nand 2 rows of general data" in card
    assert [note.check for note in result.health] == ["learned"]


def test_what_the_model_answers_itself_is_general_data_too(tiny_model, tmp_path):
    settings = replace(SETTINGS, replay_share=0.4)
    result = train(tiny_model, tmp_path / "out", answers(6), settings, replay="own_answers")
    assert (result.n_demonstrations, result.n_replay) == (6, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(DataError, match="forgetting is measured"):
        train(tiny_model, tmp_path / "other", answers(6), settings, replay=plain_texts())


def test_a_killed_training_ends_with_the_same_weights(tiny_model, tmp_path, monkeypatch):
    lora = LoRASettings(r=4, alpha=8, dropout=0.1)  # the state of the generators counts
    undisturbed = train(tiny_model, tmp_path / "whole", lora=lora)
    original = module._make_trainer

    def killed_at_step_2(*arguments, **options):
        class Kill(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == 2:
                    raise KeyboardInterrupt

        trainer = original(*arguments, **options)
        trainer.add_callback(Kill())
        return trainer

    monkeypatch.setattr(module, "_make_trainer", killed_at_step_2)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path / "resumed", lora=lora)
    monkeypatch.setattr(module, "_make_trainer", original)
    checkpoints = tmp_path / "resumed.checkpoints"
    # A kill while a checkpoint is written leaves one without a readable state file.
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-3")
    (checkpoints / "checkpoint-3" / "trainer_state.json").write_text('{"global_st')
    resumed = train(tiny_model, tmp_path / "resumed", lora=lora)
    assert_same_weights(weights(undisturbed.folder), weights(resumed.folder))
    assert resumed.points == undisturbed.points
    assert not checkpoints.exists()


def test_full_fine_tuning_saves_a_whole_model_and_resumes_too(tiny_model, tmp_path, monkeypatch):
    settings = replace(SETTINGS, tune="full", learning_rate=1e-3)
    whole = train(tiny_model, tmp_path / "whole", settings=settings, lora=None)
    assert whole.n_parameters_trained == sum(
        p.numel() for p in load_model(str(whole.folder)).model.parameters()
    )
    stopped = tmp_path / "resumed.checkpoints"
    original = SFTTrainer.training_step

    def broken(self, *arguments, **options):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(SFTTrainer, "training_step", broken)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path / "resumed", settings=settings, lora=None)
    assert (stopped / "checkpoint-1").exists()
    monkeypatch.setattr(SFTTrainer, "training_step", original)
    resumed = train(tiny_model, tmp_path / "resumed", settings=settings, lora=None)
    assert_same_weights(weights(whole.folder, "model"), weights(resumed.folder, "model"))
    assert resumed.points == whole.points


def test_checkpoints_of_another_training_are_not_continued(tiny_model, tmp_path, caplog):
    stale = tmp_path / "out.checkpoints"
    (stale / "checkpoint-3").mkdir(parents=True)
    (stale / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    with caplog.at_level(logging.WARNING):
        result = train(tiny_model, tmp_path / "out")
    assert "different training" in caplog.text
    assert len(result.points) == 3


def test_the_split_into_micro_batches_does_not_change_the_result(tiny_model, tmp_path):
    whole, split = (
        train(
            tiny_model,
            tmp_path / f"micro{size}",
            settings=replace(SETTINGS, learning_rate=1e-3, micro_batch_tokens=size),
        )
        for size in (1000, 1)
    )
    for name, value in weights(whole.folder).items():
        torch.testing.assert_close(weights(split.folder)[name], value, rtol=1e-3, atol=1e-5)
    for a, b in zip(whole.points, split.points, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-5)
        assert a.accuracy == pytest.approx(b.accuracy, abs=1e-6)


def test_an_adapter_is_trained_further(tiny_model, tmp_path):
    first = train(tiny_model, tmp_path / "first")
    lora = LoRASettings(continue_from=str(first.folder))
    second = train(tiny_model, tmp_path / "second", lora=lora)
    assert second.points[0].loss < first.points[0].loss


def test_a_model_without_a_template_is_trained(tmp_path):
    model = save_tiny_model(tmp_path / "plain", "plain")
    result = train(model, tmp_path / "out")
    assert result.points[-1].loss < result.points[0].loss
    assert not getattr(AutoTokenizer.from_pretrained(result.folder), "chat_template", None)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_rows(
    tiny_model, tmp_path, monkeypatch
):
    original = module._make_trainer

    def poisoned(*arguments, **options):
        trainer = original(*arguments, **options)
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight[:] = math.nan
        return trainer

    monkeypatch.setattr(module, "_make_trainer", poisoned)
    with pytest.raises(TrainingError, match=r"not finite at step 1.*The thing is green"):
        train(tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_with_nothing_to_learn_are_told_all_at_once(tiny_model, tmp_path):
    rows = [*answers(2), Demonstration(prompt=None, text="a", source="mine")]
    with pytest.raises(DataError) as error:
        train(tiny_model, tmp_path / "out", rows, replace(SETTINGS, max_length=8))
    assert len(error.value.problems) == 3
    assert "the prompt alone has" in error.value.problems[0]
    assert "row 3 ('a'; mine)" in error.value.problems[2]
    with pytest.raises(DataError, match="no demonstrations"):
        train_sft([], tiny_model, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_row_that_is_cut_is_counted_and_learned_without_an_end(tiny_model, tmp_path):
    (row,) = tokenize_demonstrations(answers(1), tiny_tokenizer(), max_length=34)
    assert row.is_cut
    assert len(row.prompt_ids) + len(row.answer_ids) == 34
    assert row.answer_ids[-1] != tiny_tokenizer().eos_token_id


def test_what_excludes_each_other_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="lora has no meaning"):
        train(tiny_model, tmp_path / "out", settings=SFTSettings(tune="full"))
    adapted = load_model(tiny_model, adapter=train(tiny_model, tmp_path / "a").folder)
    with pytest.raises(ModelError, match="merge it"):
        train(adapted, tmp_path / "out", settings=SFTSettings(tune="full"), lora=None)
    with pytest.raises(ModelError, match="by name"):
        train(load_model(tiny_model), tmp_path / "out", lora=LoRASettings(continue_from="x"))


def test_the_trainer_refuses_to_split_a_step_over_batches(tmp_path):
    args = trl.SFTConfig(
        output_dir=str(tmp_path), gradient_accumulation_steps=2, use_cpu=True, bf16=False
    )
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        SFTTrainer(micro_batch_tokens=None, args=args, model=None, train_dataset=None)


def test_bad_settings_are_told_all_at_once():
    with pytest.raises(
        ValueError, match=r"learning_rate.*epochs.*batch_size.*max_length.*tune.*replay_share"
    ):
        SFTSettings(
            tune="half", epochs=0, learning_rate=-1, batch_size=0, max_length=1, replay_share=1.0
        )


def test_the_rate_for_all_weights_is_a_tenth_of_that_of_an_adapter():
    assert default_sft_learning_rate(135_000_000, "lora") == 2e-4
    assert default_sft_learning_rate(7_000_000_000, "full") == pytest.approx(1e-5)


def test_health_says_what_was_learned():
    def points(losses, accuracy=0.5):
        return [
            SFTPoint(
                step=i, epoch=1, loss=loss, accuracy=accuracy, entropy=1, learning_rate=1e-3,
                grad_norm=1.0,
            )
            for i, loss in enumerate(losses)
        ]  # fmt: skip

    assert diagnose_sft(points([2.0, 1.0]))[0].check == "learned"
    assert diagnose_sft(points([2.0, 2.1]))[0].check == "not_learned"
    assert diagnose_sft(points([2.0, 0.1], accuracy=0.99))[0].check == "by_heart"
    no_gradient = [{"loss": 1.0, "step": i, "grad_norm": 0.0} for i in range(5)]
    assert diagnose_sft([], no_gradient)[0].check == "gradient_zero"
