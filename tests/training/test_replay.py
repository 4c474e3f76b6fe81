"""General rows beside preferences: the loss by hand, one gradient for every split, which rows when."""

import logging
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from prefopt import DPOConfig, DPOTrainer
from prefopt.data.demonstrations import Demonstration
from prefopt.errors import DataError, TrainingError
from prefopt.models import load_model
from prefopt.training import dpo as module
from prefopt.training.dpo import DPOSettings, load_training_log, train_dpo
from prefopt.training.health import TrainingPoint, diagnose
from prefopt.training.replay import (
    ReplayStream,
    own_answers,
    replay_batches,
    replay_rows,
    rows_per_step,
)
from prefopt.training.token_rows import TokenRow
from prefopt.types import Prompt
from tests.tiny_models import tiny_tokenizer
from tests.training.dpo_cases import LORA, make_trainer, metrics, pair_rows, tiny_policy, weights
from tests.training.test_dpo import LORA as SMALL
from tests.training.test_dpo import SETTINGS, groups

ROWS = pair_rows()


def general_rows(n=9, seed=3):
    """Texts behind one token and answers behind several, of one to nine learned tokens."""
    draw = random.Random(seed)

    def ids(n):
        return tuple(draw.randrange(10, 300) for _ in range(n))

    return [TokenRow(ids(1 if i % 2 else 4), ids(1 + i), False) for i in range(n)]


GENERAL = general_rows()


def replaying(folder, general=GENERAL, **settings):
    """A trainer with SGD at rate 1 and no clipping, so that a step is the gradient itself."""
    base = {
        "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "seed": 1,
        "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, "max_length": 32,
        "max_grad_norm": 1e9, "replay_share": 0.5,
    } | settings  # fmt: skip
    from datasets import Dataset

    return DPOTrainer(
        model=tiny_policy(),
        args=DPOConfig(str(folder), **base),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        replay_dataset=general,
    )


def trained(*args, **options):
    trainer = replaying(*args, **options)
    trainer.train()
    return trainer


def plain_nll(model, rows):
    """Cross-entropy of the rows' learned tokens, one row at a time through the model's own logits."""
    losses = []
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(row.answer_ids), reduction="none"))
    return torch.cat(losses).mean()


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("without"), general=None)


@pytest.fixture(scope="module")
def with_replay(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("with"), replay_weight=0.7)


def test_loss_and_gradient_are_those_of_the_pairs_plus_a_plain_cross_entropy(without, with_replay):
    model = tiny_policy()
    rows = with_replay._replay.at(0)
    assert len(rows) == 4
    nll = plain_nll(model, rows)
    (0.7 * nll).backward()
    first, alone = with_replay.state.log_history[0], without.state.log_history[0]
    assert first["replay/nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert first["loss"] == pytest.approx(alone["loss"] + 0.7 * nll.item(), rel=1e-5)
    assert {k for k in alone if k.startswith("rewards/")} <= first.keys()
    before, one, two = dict(model.named_parameters()), weights(without), weights(with_replay)
    for name, weight in before.items():
        got, expected = one[name] - two[name], weight.grad
        assert (got - expected).norm() <= 1e-4 * expected.norm().clamp(min=1e-4), name


def test_the_loss_by_hand(tmp_path):
    """Where every token is as likely as any other, a token costs the logarithm of their number."""
    trainer = replaying(tmp_path, replay_weight=2.0)
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()
        trainer.ref_model.lm_head.weight.zero_()
    trainer.train()
    vocabulary = trainer.model.config.vocab_size
    log = trainer.state.log_history[0]
    assert log["replay/nll"] == pytest.approx(math.log(vocabulary), rel=1e-6)
    assert log["loss"] == pytest.approx(math.log(2) + 2 * math.log(vocabulary), rel=1e-6)


@pytest.mark.parametrize(("rows", "accumulated", "tokens"), [(1, 4, 10_000), (4, 1, 1), (2, 2, 20)])
def test_the_step_is_the_same_for_every_split(rows, accumulated, tokens, with_replay, tmp_path):
    split = trained(
        tmp_path,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        micro_batch_tokens=tokens,
        replay_weight=0.7,
    )
    one, two = weights(split), weights(with_replay)
    for name, value in two.items():
        assert (one[name] - value).norm() <= 1e-5 * value.norm(), name
    for own, other in zip(metrics(split), metrics(with_replay), strict=True):
        for key, value in other.items():
            assert own[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_weight_0_is_no_replay_bit_for_bit(without, tmp_path):
    zero = trained(tmp_path, replay_weight=0.0)
    assert metrics(zero) == metrics(without)
    for name, value in weights(without).items():
        assert torch.equal(weights(zero)[name], value), name


@given(
    n=st.integers(1, 30),
    m=st.integers(1, 9),
    budget=st.integers(1, 60),
    processes=st.integers(1, 5),
)
def test_the_processes_batches_are_all_rows_once_under_the_counts_of_the_step(
    n, m, budget, processes
):
    rows = ReplayStream(general_rows(n), m, seed=0).at(2)
    batches = [
        batch
        for process in range(processes)
        for batch in replay_batches(rows, budget, process=process, n_processes=processes)
    ]
    found = [(t.prompt_ids, t.answers[0]) for batch in batches for t in batch.trees]
    assert Counter(found) == Counter((r.prompt_ids, r.answer_ids) for r in rows)
    assert {batch.n_learned for batch in batches} == {sum(len(r.answer_ids) for r in rows)}
    assert all(len(b.trees) == 1 or sum(t.n_tokens for t in b.trees) <= budget for b in batches)


@given(n=st.integers(1, 20), m=st.integers(1, 25), seed=st.integers(0, 5))
def test_every_row_comes_once_a_pass_and_a_step_depends_on_its_number_alone(n, m, seed):
    rows = general_rows(n)
    stream = ReplayStream(rows, m, seed)
    seen = [row for step in range(2 * n) for row in stream.at(step)]
    passes = [seen[i * n : (i + 1) * n] for i in range(len(seen) // n)]
    assert len(passes) >= 2
    assert all(Counter(one) == Counter(rows) for one in passes)
    assert stream.at(1) == ReplayStream(rows, m, seed).at(1)
    if n > 12:
        assert passes[0] != passes[1]


def test_a_share_is_rounded_to_rows_and_never_to_none():
    assert [rows_per_step(s, 16) for s in (0.01, 0.1, 0.2, 0.5)] == [1, 2, 4, 16]
    for share in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="replay_share"):
            rows_per_step(share, 16)


def test_a_resumed_training_is_the_uninterrupted_one_over_two_passes(tmp_path):
    """Ten steps of four rows: nine general rows come round four times."""
    options = {"max_steps": 10, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", **options)
    trained(tmp_path / "cut", **{**options, "max_steps": 3})
    resumed = replaying(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert [m for m in metrics(resumed) if "replay/nll" in m] == [
        m for m in metrics(whole) if "replay/nll" in m
    ]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    nll = [line["replay/nll"] for line in metrics(whole) if "replay/nll" in line]
    assert len(nll) == 10
    assert nll[-1] < nll[0]


def test_a_model_that_takes_no_trees_replays_too(tmp_path, monkeypatch, with_replay):
    from prefopt.training import dpo_trainer
    from prefopt.training.tree_model import Scoring, choose_scoring

    def padded(model, **options):
        choose_scoring(model, **options)
        return Scoring("logits")

    monkeypatch.setattr(dpo_trainer, "choose_scoring", padded)
    other = trained(tmp_path, replay_weight=0.7)
    for name, value in weights(with_replay).items():
        assert (weights(other)[name] - value).norm() <= 1e-4 * value.norm(), name


def test_evaluation_is_of_the_pairs_alone(tmp_path):
    for general in (GENERAL, None):
        trainer = make_trainer(tmp_path, ROWS, eval_rows=ROWS)
        if general is not None:
            trainer._replay = ReplayStream(general, 4, 0)
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_row_whose_loss_is_not_finite_stops_the_training_and_is_named(tmp_path):
    trainer = replaying(tmp_path)
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[list(GENERAL[8].answer_ids[:1])] = math.nan
    trainer._replay = ReplayStream([GENERAL[8]], 1, 0)
    with pytest.raises(TrainingError, match="general rows is not finite at step 1"):
        trainer.train()


# --- Data ---------------------------------------------------------------------------------------


def test_texts_answers_and_messages_are_taken_and_long_ones_cut(tmp_path, caplog):
    rows = [
        "The sky is blue.",
        {"prompt": "What?", "completion": "Green."},
        {
            "messages": [
                {"role": "user", "content": "Wo?"},
                {"role": "assistant", "content": "Ä 🌱"},
            ]
        },
        "word " * 50_000,
    ]
    with caplog.at_level(logging.INFO):
        found = replay_rows(rows, tiny_tokenizer(), max_length=40, most=None, seed=0)
    assert [len(row.prompt_ids) == 1 for row in found] == [True, False, False, True]
    assert [row.is_cut for row in found] == [False, False, False, True]
    assert "1 of 4 general rows are cut at 40" in caplog.text
    end = tiny_tokenizer().eos_token_id
    assert [row.answer_ids[-1] == end for row in found] == [False, True, True, False]
    assert len(replay_rows(rows, tiny_tokenizer(), max_length=40, most=2, seed=0)) == 2


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "is empty"),
        ("missing.jsonl", "missing.jsonl"),
        ([{"prompt": "Q"}, 7, "", "good text"], "row 0.*row 1.*row 2"),
        (["a"], "has no token that could be predicted"),
    ],
)
def test_data_that_cannot_be_replayed_is_refused_before_anything_is_trained(
    source, words, tmp_path, tiny_model
):
    with pytest.raises(DataError, match=f"(?s){words}"):
        train_dpo(groups(4), tiny_model, tmp_path / "out", replay=source, progress=False)
    assert not list(tmp_path.iterdir())


def test_the_trainer_reads_general_data_by_itself(tmp_path):
    (tmp_path / "general.txt").write_text("The sky is blue.\nThe sea is green.\n", encoding="utf-8")
    trainer = trained(tmp_path / "run", general=str(tmp_path / "general.txt"))
    assert len(trainer._replay.rows) == 2
    assert trainer.state.log_history[0]["replay/nll"] > 0


def test_settings_out_of_range_are_told_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"replay_share.*replay_weight"):
        DPOSettings(replay_share=1.0, replay_weight=-1.0)
    with pytest.raises(ValueError, match=r"replay_share.*replay_weight"):
        DPOConfig(str(tmp_path), replay_share=0.0, replay_weight=math.inf, use_cpu=True, bf16=False)


# --- train_dpo ----------------------------------------------------------------------------------

TEXTS = [f"The sea is green and thing {i} is not." for i in range(5)]


def test_train_dpo_says_what_was_replayed(tiny_model, tmp_path):
    settings = replace(SETTINGS, replay_share=0.2)
    result = train_dpo(
        groups(), tiny_model, tmp_path / "out", replay=TEXTS, settings=settings, lora=SMALL,
        progress=False,
    )  # fmt: skip
    assert (result.n_replay, result.n_replay_cut) == (3, 0)  # one a step, three steps
    assert all(point.replay_nll > 0 for point in load_training_log(result.adapter))
    card = (result.adapter / "README.md").read_text()
    assert "| general data | 3 rows, 20% of a step, weight 1 |" in card
    with pytest.raises(ValueError, match="twice"):
        train_dpo(
            groups(), tiny_model, tmp_path / "other", replay=TEXTS, progress=False,
            settings=replace(settings, replay="file.txt"),
        )  # fmt: skip


@pytest.mark.slow
def test_a_killed_training_on_own_answers_ends_with_the_same_weights(
    tiny_model, tmp_path, monkeypatch
):
    """Killed once while it answers and once while it trains."""
    settings = replace(SETTINGS, replay="own_answers", replay_share=0.4)

    def train(out):
        return train_dpo(groups(), tiny_model, out, settings=settings, lora=SMALL, progress=False)

    whole = train(tmp_path / "whole")
    assert whole.n_replay == 9
    assert all(point.replay_nll > 0 for point in whole.points)
    original = module._make_trainer

    def kill(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_make_trainer", kill)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed")
    assert (tmp_path / "resumed.own_answers").exists()

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
        train(tmp_path / "resumed")
    monkeypatch.setattr(module, "_make_trainer", original)
    train(tmp_path / "resumed")
    assert not (tmp_path / "resumed.own_answers").exists()
    one = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    two = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_own_answers_are_as_many_as_needed_and_each_is_another(tiny_model, caplog):
    loaded = load_model(tiny_model)
    prompts = [Prompt.from_text("Hello!"), Prompt.from_text("What is green?")]
    few = own_answers(loaded, most=1, seed=0, prompts=prompts, max_new_tokens=4, progress=False)
    many = own_answers(loaded, most=6, seed=0, prompts=prompts, max_new_tokens=4, progress=False)
    long = [Prompt.from_text("word " * 300), *prompts]
    with caplog.at_level(logging.INFO):
        assert len(own_answers(loaded, most=9, seed=0, prompts=long, progress=False)) == 10
    assert "1 prompts are longer" in caplog.text
    with pytest.raises(DataError, match="none of 1 prompts leaves room"):
        own_answers(loaded, most=9, seed=0, prompts=long[:1], progress=False)
    assert len(few) == 1
    assert len(many) == 6
    assert len({answer.text for answer in many}) > 2


def points(values):
    return [
        TrainingPoint(
            step=i, epoch=0.0, loss=0.6, margin=0.3, accuracy=0.8, chosen_reward=0.1,
            rejected_reward=-0.1, chosen_logp=-10.0, rejected_logp=-11.0, learning_rate=1e-4,
            grad_norm=1.0, replay_nll=value,
        )
        for i, value in enumerate(values)
    ]  # fmt: skip


def test_health_says_that_the_model_forgets_and_only_then():
    def checks(values):
        return {note.check for note in diagnose(points(values), beta=0.1)}

    assert "forgetting" in checks([2.0 + 0.05 * i for i in range(20)])
    assert "forgetting" not in checks([2.0 + 0.3 * (-1) ** i for i in range(20)])
    assert "forgetting" not in checks([2.0 - 0.05 * i for i in range(20)])
    assert "forgetting" not in checks([None] * 20)


def test_a_demonstration_of_an_own_answer_that_was_cut_off_has_no_end():
    row = Demonstration(prompt=Prompt.from_text("Q"), text="A", complete=False, source="s")
    (found,) = replay_rows([row], tiny_tokenizer(), max_length=None, most=None, seed=0)
    assert found.answer_ids[-1] != tiny_tokenizer().eos_token_id


def test_the_adapter_of_a_run_with_replay_starts_where_one_without_does(tmp_path):
    """General rows take nothing from the generator that draws the adapter."""
    one = make_trainer(tmp_path / "one", ROWS, peft_config=LORA)
    two = make_trainer(
        tmp_path / "two", ROWS, peft_config=LORA, replay_dataset=["The sky is blue."]
    )
    assert two._replay is not None
    assert all(torch.equal(weights(two)[name], value) for name, value in weights(one).items())
