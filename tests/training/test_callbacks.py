"""What is shown, measured and watched during training: by our trainer, by TRL's, by transformers'."""

import json
import logging
import math
import os
import random
import re
import socket
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers.integrations import TensorBoardCallback, integration_utils

import prefopt
from prefopt.errors import BudgetExceeded, DataError, JudgeUnavailable, TrainingError
from prefopt.judges import ScriptedJudge
from prefopt.training.health_watch import HealthWatch
from prefopt.training.judge_win_rate import JudgeWinRate, WinRateAtStep
from prefopt.training.progress_bar import ProgressBar
from prefopt.training.sampled_answers import SampledAnswer, SampledAnswers, distinct_n
from prefopt.types import Candidate, Prompt, Verdict

PROMPTS = ["What is the colour of the sky?", "Hello! How are you?", "the sea"]
TRAINERS = {
    "prefopt": (prefopt.DPOTrainer, prefopt.DPOConfig),
    "trl": (trl.DPOTrainer, trl.DPOConfig),
}


def rows(n=8, chosen="green", rejected="blue"):
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is thing {i}?"}],
                "chosen": [{"role": "assistant", "content": f"The thing is {chosen}."}],
                "rejected": [{"role": "assistant", "content": f"The thing is {rejected}."}],
            }
            for i in range(n)
        ]
    )


def make_trainer(
    folder, model, callbacks=(), *, kind="prefopt", lora=True, dropout=0.0, dataset=None, **options
):
    """A trainer on eight pairs, two an optimiser step, evaluated every second step."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "max_length": 128,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer_class, config_class = TRAINERS[kind]
    trainer = trainer_class(
        model=transformers.AutoModelForCausalLM.from_pretrained(model),
        args=config_class(**(settings | options)),
        train_dataset=dataset if dataset is not None else rows(),
        eval_dataset=rows(2),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
        if lora
        else None,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def quick(cls, *args, **options):
    """A callback with answers short enough for a test."""
    if cls is SampledAnswers:
        options.setdefault("show", None)
    return cls(PROMPTS, *args, max_new_tokens=6, **options)


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def evaluations(trainer):
    return [
        entry
        for entry in trainer.state.log_history
        if any(k.startswith("eval_") and k.endswith("_runtime") for k in entry)
    ]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Seen(transformers.TrainerCallback):
    """Stands where a tracker stands: what it is given is what a tracker would log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append({"step": state.global_step, **logs})


# --- The bar ------------------------------------------------------------------------------------


class Bar:
    """Records what a bar is told."""

    made = ()

    def __init__(self, *, total, initial, description, unit, show):
        self.total, self.n, self.show, self.open = total, initial, show, True
        self.initial, self.description, self.unit, self.notes = initial, description, unit, []
        Bar.made = (*Bar.made, self)

    def update(self, n):
        self.n += n

    def set_postfix_str(self, text):
        self.notes.append(text)

    def close(self):
        self.open = False


@pytest.fixture
def bars(monkeypatch):
    Bar.made = ()
    monkeypatch.setattr("prefopt.training.progress_bar.progress_bar", Bar)
    return lambda: Bar.made


def test_the_bar_counts_rows_and_shows_loss_margin_and_held_out_accuracy(
    tiny_model, tmp_path, bars
):
    make_trainer(tmp_path, tiny_model, [ProgressBar()]).train()
    (bar,) = bars()
    assert (bar.total, bar.initial, bar.n, bar.unit) == (8, 0, 8, "pair")
    assert bar.notes[0] == "loss 0.693, margin 0.00"
    assert re.fullmatch(r"loss \d\.\d{3}, margin -?\d+\.\d\d, held-out \d+%", bar.notes[-1])
    assert bar.show
    assert not bar.open


@pytest.mark.parametrize(("n", "options", "total"), [
    (7, {"max_steps": -1, "num_train_epochs": 2}, 14),
    (8, {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2}, 8),
    (8, {"max_steps": 3}, 6),
])  # fmt: skip
def test_the_bar_ends_at_the_rows_of_the_run(tiny_model, tmp_path, bars, n, options, total):
    options = {"eval_strategy": "no", **options}
    make_trainer(tmp_path, tiny_model, [ProgressBar()], dataset=rows(n), **options).train()
    (bar,) = bars()
    assert (bar.total, bar.n) == (total, total)


def test_a_resumed_runs_bar_starts_where_the_run_does(tiny_model, tmp_path, bars):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    make_trainer(tmp_path, tiny_model, [ProgressBar()], **options).train()
    resumed = make_trainer(tmp_path, tiny_model, [ProgressBar()], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    bar = bars()[-1]
    assert (bar.total, bar.initial, bar.n) == (8, 4, 8)


def test_the_bar_takes_the_place_of_the_trainers_own(tiny_model, tmp_path):
    trainer = make_trainer(tmp_path, tiny_model, [ProgressBar()], disable_tqdm=False)
    kinds = [type(c) for c in trainer.callback_handler.callbacks]
    assert transformers.ProgressCallback not in kinds
    other = make_trainer(tmp_path, tiny_model, kind="trl", disable_tqdm=False)
    bar = ProgressBar().attach(other)
    kinds = [type(c) for c in other.callback_handler.callbacks]
    assert transformers.ProgressCallback not in kinds
    assert other.callback_handler.callbacks.count(bar) == 1


def test_other_processes_show_no_bar(bars):
    args = transformers.TrainingArguments(output_dir="x", use_cpu=True, report_to="none")
    state = transformers.TrainerState(max_steps=5, is_world_process_zero=False)
    ProgressBar().on_train_begin(args, state, None)
    (bar,) = bars()
    assert not bar.show
    assert bar.total == 40  # a stream: steps times the batch size


# --- Sampled answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
def test_answers_are_written_shown_and_logged_at_every_evaluation(tiny_model, tmp_path, kind):
    tables = []
    seen = Seen()
    sampled = quick(SampledAnswers, show=tables.append)
    trainer = make_trainer(tmp_path, tiny_model, kind=kind)
    trainer.callback_handler.callbacks.insert(0, seen)  # trackers stand before a user's callbacks
    sampled.attach(trainer)
    trainer.train()

    lines = prefopt.read_records(tmp_path / "sampled_answers.jsonl", SampledAnswer)
    assert [a.step for a in lines] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    assert [a.prompt for a in lines[:3]] == PROMPTS
    for logs in (evaluations(trainer), [x for x in seen.logs if "eval_runtime" in x]):
        assert [entry["step"] for entry in logs] == [2, 4]
        for entry in logs:
            mine = [a for a in lines if a.step == entry["step"]]
            assert entry["eval_sampled/length_tokens"] == sum(a.n_tokens for a in mine) / 3
            assert (
                entry["eval_sampled/finished"] == sum(a.finish_reason == "stop" for a in mine) / 3
            )
            assert entry["eval_sampled/distinct_2"] == pytest.approx(
                distinct_n([a.answer for a in mine], 2), nan_ok=True
            )
    assert [t.splitlines()[0] for t in tables] == [f"answers at step {s}" for s in (0, 2, 4)]
    assert len(tables[0].splitlines()) == 2 + 3
    assert "What is the colour of the sky?" in tables[0]


@pytest.mark.parametrize("options", [
    {"gradient_checkpointing": True},
    {"lora": False, "bf16": True},
    {"kind": "trl"},
], ids=str)  # fmt: skip
def test_sampling_and_judging_do_not_change_the_training(tiny_model, tmp_path, options):
    """Dropout is on, so a draw too many or a module left in another mode would show."""
    trained, modes = [], []
    for callbacks in ([], [quick(SampledAnswers), quick(JudgeWinRate, "scripted:shortest")]):
        trainer = make_trainer(
            tmp_path, tiny_model, callbacks, dropout=0.3, disable_dropout=False, **options
        )
        trainer.train()
        trained.append(weights(trainer))
        modes.append(trainer.model.config.use_cache)
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name
    assert modes[0] == modes[1]
    # The answers are the model's as it trains, not those of a frozen one.
    lines = prefopt.read_records(tmp_path / "sampled_answers.jsonl", SampledAnswer)
    assert [a.answer for a in lines[:3]] != [a.answer for a in lines[-3:]]


def test_every_generator_and_mode_is_put_back(tiny_model, tmp_path):
    trainer = make_trainer(tmp_path, tiny_model, [sampled := quick(SampledAnswers)])
    model = trainer.model.train()
    frozen = next(iter(model.modules())).get_submodule("base_model").eval()

    def draw(*_):
        return torch.rand(1).item(), random.random(), np.random.rand()

    # A model that draws itself, as some layers do.
    model.get_base_model().register_forward_hook(lambda *_: draw() and None)
    model.config.use_cache = False
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = draw()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    first = sampled.answers(trainer.args, model, trainer.processing_class)
    assert draw() == expected
    assert (model.training, frozen.training, model.config.use_cache) == (True, False, False)
    # The same seed every time, whatever the training's generators are at.
    again = sampled.answers(trainer.args, model, trainer.processing_class)
    assert [a.text for a in first] == [a.text for a in again]


def test_an_error_while_answering_puts_back_what_was_changed(tiny_model, tmp_path):
    sampled = SampledAnswers(["word " * 300], show=None)
    trainer = make_trainer(tmp_path, tiny_model, [sampled])
    trainer.model.train()
    with pytest.raises(DataError, match="do not fit"):
        trainer.train()
    assert trainer.model.training
    assert trainer.state.global_step == 0  # said before the first step


@pytest.mark.parametrize("hooked", [True, False])
def test_every_so_many_steps_without_any_evaluation(tiny_model, tmp_path, hooked):
    """The numbers come with the log of that very step, though logs are due every fourth only."""
    sampled = quick(SampledAnswers, every=3)
    trainer = make_trainer(
        tmp_path, tiny_model, kind="trl", eval_strategy="no", logging_steps=4, max_steps=6
    )
    sampled.attach(trainer) if hooked else trainer.add_callback(sampled)
    trainer.train()
    logged = [e["step"] for e in trainer.state.log_history if sampled.metric in e]
    assert logged == [3, 6]
    assert all("loss" in e for e in trainer.state.log_history if sampled.metric in e)


def test_a_resumed_run_goes_on_in_the_file_and_a_new_one_begins_it(tiny_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    path = tmp_path / "sampled_answers.jsonl"
    make_trainer(tmp_path, tiny_model, [quick(SampledAnswers)], **options).train()
    whole = path.read_text()
    resumed = make_trainer(tmp_path, tiny_model, [quick(SampledAnswers)], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert path.read_text() == whole
    make_trainer(tmp_path, tiny_model, [quick(SampledAnswers)], **options).train()
    assert path.read_text() == whole


def test_prompts_are_texts_conversations_or_prompts():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    sampled = SampledAnswers(["Hi", turns, Prompt.from_text("there")])
    assert [len(p.messages) for p in sampled.prompts] == [1, 2, 1]
    assert sampled.prompts[2].text == "there"


@pytest.mark.parametrize(("arguments", "says"), [
    (([],), "at least one prompt"),
    (("one text",), "needs a list"),
    ((["a"], {"every": 0}), "every must be"),
    ((["a"], {"every": "epoch"}), "every must be"),
    ((["a"], {"temperature": -1}), "temperature must not be negative"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(arguments, says):
    prompts, options = (*arguments, {})[:2]
    with pytest.raises(ValueError, match=says):
        SampledAnswers(prompts, **options)


def test_a_trainer_without_a_tokenizer_is_told_to_have_one(tiny_model, tmp_path):
    trainer = make_trainer(tmp_path, tiny_model, [sampled := quick(SampledAnswers)])
    with pytest.raises(ValueError, match="pass tokenizer="):
        sampled.answers(trainer.args, trainer.model, None)
    # One without a padding token is given one, in a copy.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = None
    assert len(sampled.answers(trainer.args, trainer.model, tokenizer)) == 3
    assert tokenizer.pad_token is None


def test_a_trainer_that_never_evaluates_is_told_about(tiny_model, tmp_path, caplog):
    trainer = make_trainer(tmp_path, tiny_model, [quick(SampledAnswers)], eval_strategy="no")
    trainer.train()
    assert "give `every` a number of steps" in caplog.text


@pytest.mark.parametrize(("texts", "expected"), [
    (["a b c"], 1.0),
    (["a b a b"], 2 / 3),  # a b, b a, a b
    (["a b", "a b"], 0.5),
    (["a", ""], math.nan),
])  # fmt: skip
def test_distinct_n_by_hand(texts, expected):
    assert distinct_n(texts, 2) == pytest.approx(expected, nan_ok=True)


def test_trackers_that_take_text_get_the_table_and_the_history_stays_numbers(tiny_model, tmp_path):
    class Tracker(TensorBoardCallback):
        def __init__(self):
            self.texts = {}

        def setup(self, *_, **__):
            pass

        def on_train_begin(self, *_, **__):
            pass

        def on_train_end(self, *_, **__):
            pass

        def on_log(self, args, state, control, logs=None, **_):
            for value in logs.values():
                if isinstance(value, str):
                    self.texts[state.global_step] = value

    sampled = SampledAnswers(["a | b\n<i>c</i>"], max_new_tokens=4, show=None)
    trainer = make_trainer(tmp_path, tiny_model, [tracker := Tracker(), sampled])
    trainer.train()
    assert list(tracker.texts) == [2, 4]
    assert "| a \\| b<br>&lt;i>c&lt;/i> | " in tracker.texts[2]
    values = [v for entry in trainer.state.log_history for v in entry.values()]
    assert all(isinstance(v, int | float) for v in values)


def test_tensorboard_gets_numbers_and_answers_through_report_to(tiny_model, tmp_path, monkeypatch):
    """The writer is a stand-in: tensorboard itself is none of the libraries the tests need."""
    scalars, texts = defaultdict(list), defaultdict(list)

    class SummaryWriter:
        def __init__(self, log_dir):
            pass

        def add_scalar(self, name, value, step):
            scalars[name].append(step)

        def add_text(self, name, text, step=None):
            texts[name].append(step)

        def flush(self):
            pass

        def close(self):
            pass

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    callbacks = [quick(SampledAnswers), quick(JudgeWinRate, "scripted:shortest")]
    make_trainer(tmp_path, tiny_model, callbacks, report_to="tensorboard").train()
    for name in ("eval/win_rate", "eval/sampled/length_tokens", "eval/rewards/accuracies"):
        assert scalars[name] == [2, 4]
    assert texts["eval/sampled/answers"] == [2, 4]


# --- Win rate -----------------------------------------------------------------------------------


def judge(decide, name="test"):
    return ScriptedJudge(decide, name=name)


def prefers(word):
    """A judge that prefers answers whose text has more of a word."""

    def decide(comparison):
        a, b = comparison.a.text.count(word), comparison.b.text.count(word)
        return "tie" if a == b else "a" if a > b else "b"

    return judge(decide, f"prefers {word}")


def policy_always_wins(comparison):
    return "a" if comparison.a.model != "baseline" else "b"


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_win_rate_is_logged_where_every_reader_finds_it(tiny_model, tmp_path, kind):
    seen = Seen()
    rate = quick(JudgeWinRate, judge(policy_always_wins), ledger=tmp_path / "ledger.sqlite")
    trainer = make_trainer(tmp_path, tiny_model, kind=kind)
    trainer.callback_handler.callbacks.insert(0, seen)
    rate.attach(trainer)
    trainer.train()
    lines = prefopt.read_records(tmp_path / "win_rates.jsonl", WinRateAtStep)
    assert [x.step for x in lines] == [2, 4]
    assert all(x.win_rate.n_one_order == 0 for x in lines)  # asked in both orders
    last = lines[-1].win_rate
    assert last.win_rate > 0.5
    for entry in (evaluations(trainer)[-1], [x for x in seen.logs if "eval_runtime" in x][-1]):
        assert entry["eval_win_rate"] == last.win_rate
        assert (entry["eval_win_rate_low"], entry["eval_win_rate_high"]) == last.headline_interval
        assert entry["eval_win_rate_failed"] == 0
    assert (tmp_path / "ledger.sqlite").exists()
    assert trainer.evaluate()["eval_win_rate"] == last.win_rate


def test_before_training_model_and_baseline_tie_without_a_question(tiny_model, tmp_path):
    asked = []
    rate = quick(JudgeWinRate, judge(lambda c: asked.append(c) or "a"))
    trainer = make_trainer(tmp_path, tiny_model, [rate])
    assert trainer.evaluate()["eval_win_rate"] == 0.5
    assert asked == []


@pytest.mark.parametrize(("kind", "first"), [("prefopt", True), ("prefopt", False), ("trl", True)])
def test_early_stopping_and_the_best_checkpoint_go_by_the_win_rate(
    tiny_model, tmp_path, kind, first
):
    """The model loses more and more, so the first evaluation is the best and one more is allowed.

    In our trainer the order of callbacks does not matter, and TRL's needs no `attach` for it.
    """

    def worse_every_time(comparison):
        step = comparison.a.model if comparison.a.model != "baseline" else comparison.b.model
        return policy_always_wins(comparison) if step == "step 1" else "tie"

    rate = quick(JudgeWinRate, judge(worse_every_time), baseline=["x", "y", "z"])
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    trainer = make_trainer(
        tmp_path, tiny_model, [rate, stop] if first else [stop, rate], kind=kind, max_steps=4,
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="win_rate", save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    first_rate, second_rate = [e["eval_win_rate"] for e in evaluations(trainer)]
    assert first_rate == 1.0
    assert second_rate < 1.0
    assert trainer.state.global_step == 2
    assert trainer.state.best_metric == 1.0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")


def test_of_several_evaluation_sets_the_first_carries_the_win_rate_once(tiny_model, tmp_path):
    rate = quick(JudgeWinRate, judge(policy_always_wins))
    trainer = make_trainer(tmp_path, tiny_model, [rate])
    trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
    trainer.train()
    assert [("eval_win_rate" in e, "eval_one_loss" in e) for e in evaluations(trainer)] == [
        (True, True), (False, False),
    ] * 2  # fmt: skip
    assert "eval_win_rate" in trainer.evaluate()


def test_failed_verdicts_are_no_ties_and_are_told(tiny_model, tmp_path, caplog):
    def fails_once(comparison):
        if comparison.prompt.text == PROMPTS[0]:
            return Verdict(judge="test", failure="refused")
        return policy_always_wins(comparison)

    rate = quick(JudgeWinRate, judge(fails_once), baseline=["x", "y", "z"])
    trainer = make_trainer(tmp_path, tiny_model, [rate], max_steps=2)
    trainer.train()
    (entry,) = evaluations(trainer)
    assert (entry["eval_win_rate"], entry["eval_win_rate_failed"]) == (1.0, 1)
    assert "1 of 3 comparisons at step 2 got no verdict" in caplog.text


class Broken(ScriptedJudge):
    """A judge whose service is gone."""

    def __init__(self, error):
        super().__init__(lambda c: "a", name="broken")
        self.error = error

    def verdicts(self, comparisons):
        raise self.error
        yield


@pytest.mark.parametrize("broken", [
    Broken(BudgetExceeded("the limit of $1 is reached")),
    judge(lambda c: Verdict(judge="test", failure="refused")),
], ids=["no money", "all refused"])  # fmt: skip
def test_without_a_verdict_there_is_no_win_rate_and_training_goes_on(
    tiny_model, tmp_path, caplog, broken
):
    rate = quick(JudgeWinRate, broken, baseline=["x", "y", "z"])
    trainer = make_trainer(tmp_path, tiny_model, [rate])
    trainer.train()
    assert trainer.state.global_step == 4
    for entry in evaluations(trainer):
        assert math.isnan(entry["eval_win_rate"])
        assert math.isnan(entry["eval_win_rate_low"])
        assert entry["eval_win_rate_failed"] == 3
    assert "no win rate at step 2" in caplog.text
    lines = prefopt.read_records(tmp_path / "win_rates.jsonl", WinRateAtStep)
    assert lines[0].win_rate is None
    assert lines[0].failure in caplog.text


def test_a_judge_that_cannot_go_on_ends_a_training_that_is_steered_by_it(tiny_model, tmp_path):
    broken = Broken(JudgeUnavailable("no key"))
    rate = quick(JudgeWinRate, broken, baseline=["x", "y", "z"])
    trainer = make_trainer(tmp_path, tiny_model, [rate], metric_for_best_model="win_rate")
    with pytest.raises(JudgeUnavailable, match="no key"):
        trainer.train()


def test_a_resumed_run_compares_with_the_baseline_it_began_with(tiny_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    path, baseline = tmp_path / "win_rates.jsonl", tmp_path / "win_rate_baseline.jsonl"

    def run(resume=None, **settings):
        trainer = make_trainer(
            tmp_path, tiny_model, [quick(JudgeWinRate, prefers("e"), **settings)], **options
        )
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))

    run()
    whole, answers = path.read_text(), baseline.read_text()
    run("checkpoint-2")
    assert path.read_text() == whole
    with pytest.raises(TrainingError, match="other prompts, another seed"):
        run("checkpoint-2", seed=7)
    # With the adapter off a new adapter's baseline is the same, and needs no file.
    baseline.unlink()
    with pytest.raises(TrainingError, match="is not there"):
        run("checkpoint-2")
    run("checkpoint-2", baseline="adapter_off")
    assert baseline.read_text() == answers


def test_given_baseline_answers_must_fit_the_prompts():
    with pytest.raises(ValueError, match="each of the 3 prompts"):
        quick(JudgeWinRate, "scripted:shortest", baseline=["one"])
    other = Candidate(prompt=Prompt.from_text("other"), text="x", model="m")
    with pytest.raises(ValueError, match="answer 2 is to another prompt"):
        quick(JudgeWinRate, "scripted:shortest", baseline=["x", other, "y"])
    with pytest.raises(ValueError, match="baseline must be"):
        quick(JudgeWinRate, "scripted:shortest", baseline="reference")


def test_a_paid_judge_needs_a_limit():
    with pytest.raises(ValueError, match="max_usd"):
        JudgeWinRate(PROMPTS, "anthropic:claude-sonnet-5-5")


# --- Health -------------------------------------------------------------------------------------


def feed(watch, logs, *, beta=0.1, main=True):
    """Hand a callback logs as a trainer does; returns the control it may set."""
    args = type("Args", (), {"beta": beta})()
    state = transformers.TrainerState(is_world_process_zero=main)
    control = transformers.TrainerControl()
    watch.on_train_begin(args, state, control)
    for step, entry in enumerate(logs, start=1):
        state.global_step, state.epoch = step, step / len(logs)
        watch.on_log(args, state, control, logs=entry)
        if control.should_training_stop:
            break
    return control, args, state


def entry(**changes):
    found = {"loss": 0.6, "grad_norm": 1.0, "learning_rate": 1e-5, "rewards/margins": 0.5,
             "rewards/accuracies": 0.8, "rewards/chosen": 0.2, "rewards/rejected": -0.3,
             "logps/chosen": -50.0, "logps/rejected": -60.0}  # fmt: skip
    return found | changes


def test_a_finding_is_told_once_and_again_when_it_becomes_a_problem(caplog):
    wild = {"grad_norm": math.inf}
    watch = HealthWatch()
    feed(watch, [entry(), entry(**wild), *[entry()] * 8, *[entry(**wild)] * 6])
    told = [r.getMessage() for r in caplog.records]
    assert [t.split(":")[0] for t in told] == ["step 2, warning", "step 13, problem"]
    assert [n.check for n in watch.notes] == ["gradient_not_finite"]
    assert "bfloat16" in told[0]


def test_a_sound_log_says_nothing_until_its_end(caplog):
    caplog.set_level(logging.INFO)
    watch = HealthWatch()
    control, args, state = feed(watch, [entry()] * 30)
    assert not caplog.records
    watch.on_train_end(args, state, control)
    assert {n.level for n in watch.notes} == {"ok"}
    assert {r.levelname for r in caplog.records} == {"INFO"}


def test_what_only_a_whole_run_shows_is_told_at_its_end(caplog):
    watch = HealthWatch()
    control, args, state = feed(watch, [entry(**{"rewards/margins": 0.01})] * 10)
    assert not caplog.records
    watch.on_train_end(args, state, control)
    assert "barely moved" in caplog.text


@pytest.mark.parametrize(("stop", "steps"), [(True, 5), (False, 8)])
def test_a_problem_stops_training_if_asked(stop, steps, caplog):
    watch = HealthWatch(stop_on_problem=stop)
    logs = [entry()] * 4 + [entry(loss=math.nan)] * 4
    control, _, state = feed(watch, logs)
    assert (control.should_training_stop, state.global_step) == (stop, steps)
    assert ("training stops at step 5" in caplog.text) == stop
    # A warning alone stops nothing.
    warned = HealthWatch(stop_on_problem=True)
    control, *_ = feed(warned, [entry(), entry(grad_norm=math.inf), *[entry()] * 3])
    assert warned.notes
    assert not control.should_training_stop


def test_held_out_metrics_are_watched_too(caplog):
    logs = []
    for i, accuracy in enumerate([0.8, 0.75, 0.7]):
        logs += [entry(**{"rewards/margins": 0.5 + i})] * 3
        logs.append({"eval_loss": 0.5, "eval_rewards/accuracies": accuracy})
    feed(HealthWatch(), logs)
    assert "Overfitting" in caplog.text
    caplog.clear()
    feed(HealthWatch(prefix="eval_other"), logs)
    assert not caplog.records


def test_other_processes_decide_alike_and_say_nothing(caplog):
    control, *_ = feed(HealthWatch(stop_on_problem=True), [entry(loss=math.nan)], main=False)
    assert control.should_training_stop
    assert not caplog.records


def test_the_chosen_answers_are_measured_by_the_trainers_beta(caplog):
    falling = [entry(**{"rewards/chosen": -1.0})] * 10  # 10 nats of 40 at beta 0.1
    feed(HealthWatch(), falling, beta=0.1)
    assert "became less likely" in caplog.text
    caplog.clear()
    feed(HealthWatch(), falling, beta=1.0)
    feed(HealthWatch(), falling, beta=None)
    assert not caplog.records
    feed(HealthWatch(beta=0.1), falling, beta=None)
    assert "became less likely" in caplog.text


def test_a_long_log_costs_no_more_than_its_length(monkeypatch):
    read_points = []
    monkeypatch.setattr(
        "prefopt.training.health_watch.findings_so_far",
        lambda points, **_: read_points.append(len(points)) or (),
    )
    feed(HealthWatch(), [entry()] * 4000)
    assert sum(read_points) < 4000 * 1000
    assert read_points[-1] > 3900


def test_a_resumed_run_is_judged_by_its_whole_log(tiny_model, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    make_trainer(tmp_path, tiny_model, **options).train()
    watch = HealthWatch()
    resumed = make_trainer(tmp_path, tiny_model, [watch], max_steps=8, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [p.step for p in watch._points] == list(range(1, 9))


@pytest.mark.parametrize("kind", TRAINERS)
def test_frozen_weights_stop_a_real_training(tiny_model, tmp_path, kind):
    """Pairs whose answers are the same have no gradient: the watch sees it in either trainer's log."""
    watch = HealthWatch(stop_on_problem=True)
    trainer = make_trainer(
        tmp_path, tiny_model, [watch], kind=kind, max_steps=6, eval_strategy="no",
        dataset=rows(8, chosen="blue", rejected="blue"),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    assert watch.notes[0].check == "gradient_zero"


# --- Several processes --------------------------------------------------------------------------

_WORKER = """
import json, sys
from pathlib import Path
import torch
from prefopt.errors import JudgeUnavailable
from prefopt.judges import longest_wins
from tests.training import test_callbacks as t

folder, model, fails = sys.argv[1:]
judge = t.Broken(JudgeUnavailable("no key")) if fails == "yes" else longest_wins()
callbacks = [
    t.quick(t.SampledAnswers), t.quick(t.JudgeWinRate, judge, baseline=["x y z"] * 3), t.HealthWatch(),
]
trainer = t.make_trainer(
    folder, model, callbacks, metric_for_best_model="win_rate", ddp_backend="gloo",
    ddp_find_unused_parameters=False,
)
trainer.train()
rank = trainer.args.process_index
found = [
    {k: v for k, v in e.items() if "win_rate" in k or "sampled" in k} for e in t.evaluations(trainer)
]
Path(folder, f"rank{rank}.json").write_text(json.dumps([found, trainer.state.best_metric]))
torch.distributed.destroy_process_group()
"""


def two_processes(folder, model, fails):
    """Exit codes and error texts of a training by two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip
        command = [sys.executable, "-c", _WORKER, str(folder), model, fails]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    ended = [process.communicate(timeout=240)[1] for process in started]
    return [process.returncode for process in started], ended


@pytest.mark.slow
@pytest.mark.enable_socket
def test_with_two_processes_one_answers_and_both_know(tiny_model, tmp_path):
    codes, errors = two_processes(tmp_path, tiny_model, "no")
    assert codes == [0, 0], errors
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one[1] == max(e["eval_win_rate"] for e in one[0])
    lines = prefopt.read_records(tmp_path / "sampled_answers.jsonl", SampledAnswer)
    assert [a.step for a in lines] == [0, 0, 0, 2, 2, 2, 4, 4, 4]


@pytest.mark.slow
@pytest.mark.enable_socket
def test_with_two_processes_an_error_of_one_ends_both(tiny_model, tmp_path):
    codes, (main, other) = two_processes(tmp_path, tiny_model, "yes")
    assert all(codes)
    assert "JudgeUnavailable: no key" in main
    assert "the main process stopped with JudgeUnavailable: no key" in other
