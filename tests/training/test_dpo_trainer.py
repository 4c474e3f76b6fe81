"""The DPO trainer: one gradient for every split, losses by hand, resuming, what it refuses."""

import copy
import functools
import logging
import math
import random
from collections import Counter
from unittest.mock import Mock

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import (
    EarlyStoppingCallback,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)

from prefopt import DPOConfig, DPOTrainer
from prefopt.errors import DataError, TrainingError
from prefopt.training import dpo_trainer as module
from prefopt.training import tree_trainer
from tests.tiny_models import tiny_tokenizer
from tests.training.dpo_cases import (
    LORA,
    group_rows,
    make_trainer,
    metrics,
    pair_rows,
    perturbed,
    tiny_policy,
    trained,
    weights,
)

ROWS = pair_rows()
SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip


def assert_same_weights(one, two, tolerance=5e-6):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name, value in two.items():
        assert (one[name] - value).norm() <= tolerance * max(value.norm(), 1e-3), name


def assert_same_metrics(one, two, tolerance=1e-5):
    """All but the part of an epoch that is over, which counts batches."""
    one, two = metrics(one), metrics(two)
    assert len(one) == len(two) > 1
    for own, other in zip(one, two, strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            assert name == "epoch" or own[name] == pytest.approx(value, rel=tolerance, abs=1e-5), (
                name
            )


def assert_moved(trainer, fresh):
    before, after = weights(fresh), weights(trainer)
    assert any((after[n] - before[n]).norm() > 1e-2 * before[n].norm() for n in before)


# --- One gradient for every split ---------------------------------------------------------------

# None of them is a mean over pairs of something that one pair knows alone.
EXACT = {
    "sigmoid": {},
    "token means": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "weighted": {"use_weighting": True, "ld_alpha": 0.5},
    "sorted": {"loss_type": ["aot", "aot_unpaired"], "loss_weights": [1.0, 0.5]},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each loss the training in one piece."""
    made = functools.cache(
        lambda name: trained(
            tmp_path_factory.mktemp("whole"), ROWS, micro_batch_tokens=10_000, **EXACT[name]
        )
    )
    return made


@pytest.mark.parametrize("name", EXACT)
def test_the_step_is_the_same_for_every_split(name, whole, tmp_path):
    """Rows a device, accumulation and micro-batches of any size: the same weights and metrics."""
    splits = [(1, 4, 10_000), (4, 1, 1), (2, 2, 30)]
    assert_moved(whole(name), make_trainer(tmp_path / "fresh", ROWS))
    for rows, accumulated, tokens in splits:
        split = trained(
            tmp_path / f"{rows}-{accumulated}-{tokens}",
            ROWS,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulated,
            micro_batch_tokens=tokens,
            **EXACT[name],
        )
        assert_same_weights(split, whole(name))
        assert_same_metrics(split, whole(name))


def test_the_step_is_the_same_for_every_split_of_a_whole_model(tmp_path):
    options = {"peft_config": None, "learning_rate": 0.05, "ref_model": perturbed(tiny_policy())}
    one = trained(tmp_path / "one", ROWS, **options)
    two = trained(
        tmp_path / "two",
        ROWS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        micro_batch_tokens=20,
        **options,
    )
    assert_same_weights(one, two)
    assert_same_metrics(one, two)


def test_the_micro_batches_really_differ(tmp_path):
    def n_forwards(**settings):
        trainer = make_trainer(tmp_path / "run", ROWS, max_steps=1, **settings)
        counted = []
        original = trainer._micro_batch_loss
        trainer._micro_batch_loss = lambda *a: counted.append(1) or original(*a)
        trainer.train()
        return len(counted)

    assert n_forwards() == 1
    assert n_forwards(micro_batch_tokens=1) > 1


@pytest.mark.parametrize("name", ["sigmoid", "token means"])
def test_merging_rows_of_one_prompt_changes_nothing(name, whole, tmp_path, monkeypatch):
    apart = functools.partial(tree_trainer.plan_micro_batches, merge=False)
    monkeypatch.setattr(tree_trainer, "plan_micro_batches", apart)
    alone = trained(tmp_path, ROWS, micro_batch_tokens=10_000, **EXACT[name])
    assert_same_weights(alone, whole(name))
    assert_same_metrics(alone, whole(name))
    assert alone.state.total_flos > whole(name).state.total_flos


def test_an_unfinished_last_step_is_divided_by_its_own_rows(tmp_path):
    """Seven rows in steps of four: the second step has three, however they are split."""
    rows = ROWS[:7]
    options = {"max_steps": -1, "num_train_epochs": 1}
    one = trained(tmp_path / "one", rows, **options)
    two = trained(
        tmp_path / "two",
        rows,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **options,
    )
    assert one.state.global_step == two.state.global_step == 2
    assert_same_weights(one, two)
    assert_same_metrics(one, two)


class _Recorder(DPOTrainer):
    """Remembers which preferences went through it, in order."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.__dict__.setdefault("seen", []).append(
            [
                (trees[p.chosen], trees[p.rejected])
                for b in inputs.micro_batches
                for trees in [[(t.prompt_ids, a) for t in b.trees for a in t.answers]]
                for p in b.pairs
            ]
        )
        return super().training_step(model, inputs, num_items_in_batch)


def test_every_row_is_seen_once_an_epoch_and_rows_of_one_prompt_together(tmp_path):
    trainer = make_trainer(
        tmp_path, ROWS, kind=_Recorder, per_device_train_batch_size=3, max_steps=-1,
        num_train_epochs=2,
    )  # fmt: skip
    trainer.train()
    told = Counter()
    for row in ROWS:
        prompt, chosen, rejected = (tuple(ids) for ids in row.values())
        told[(prompt, chosen), (prompt, rejected)] += 1
    assert len(trainer.seen) == 8
    epochs = trainer.seen[:4], trainer.seen[4:]
    for epoch in epochs:
        assert Counter(pair for step in epoch for pair in step) == told
    assert epochs[0] != epochs[1]


# --- Losses by hand -----------------------------------------------------------------------------


@torch.no_grad()
def logp(model, prompt, answer):
    """Sum of an answer's log-probabilities from plain logits."""
    ids = torch.tensor([[*prompt, *answer]])
    log_p = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_p[range(len(answer)), list(answer)].sum().item()


POLICY, REFERENCE, BETA = tiny_policy(), perturbed(tiny_policy()), 0.7


def reward(prompt, answer):
    return BETA * (logp(POLICY, prompt, answer) - logp(REFERENCE, prompt, answer))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def eval_loss(folder, rows, **settings):
    trainer = make_trainer(
        folder,
        rows,
        model=copy.deepcopy(POLICY),
        ref_model=REFERENCE,
        peft_config=None,
        eval_rows=rows,
        beta=BETA,
        **settings,
    )
    return trainer.evaluate()


def test_metrics_of_pairs_by_hand(tmp_path):
    found = eval_loss(tmp_path, ROWS)
    chosen = [reward(r["prompt_ids"], r["chosen_ids"]) for r in ROWS]
    rejected = [reward(r["prompt_ids"], r["rejected_ids"]) for r in ROWS]
    n, both = len(ROWS), list(zip(chosen, rejected, strict=True))
    expected = {
        "eval_loss": -sum(log_sigmoid(c - r) for c, r in both) / n,
        "eval_rewards/chosen": sum(chosen) / n,
        "eval_rewards/rejected": sum(rejected) / n,
        "eval_rewards/margins": sum(c - r for c, r in both) / n,
        "eval_rewards/accuracies": sum(c > r for c, r in both) / n,
        "eval_logps/chosen": sum(logp(POLICY, r["prompt_ids"], r["chosen_ids"]) for r in ROWS) / n,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert 0 < found["eval_rewards/accuracies"] < 1


GROUPS = group_rows()


def pairs_of(row):
    k = range(len(row["answer_ids"]))
    return [(i, j) for i in k for j in k if row["scores"][i] > row["scores"][j]]


def rewards_of(row):
    return [reward(row["prompt_ids"], answer) for answer in row["answer_ids"]]


def test_all_pairs_of_a_group_weigh_as_one_row(tmp_path):
    """Ouyang et al. 2022, eq. 1: the mean over the pairs of a prompt, then over the prompts."""
    per_row = []
    for row in GROUPS:
        r, pairs = rewards_of(row), pairs_of(row)
        per_row.append(-sum(log_sigmoid(r[i] - r[j]) for i, j in pairs) / len(pairs))
    found = eval_loss(tmp_path, GROUPS)
    assert found["eval_loss"] == pytest.approx(sum(per_row) / len(per_row), rel=1e-5)
    accuracy = [
        sum(rewards_of(row)[i] > rewards_of(row)[j] for i, j in pairs_of(row)) / len(pairs_of(row))
        for row in GROUPS
    ]
    assert found["eval_rewards/accuracies"] == pytest.approx(sum(accuracy) / len(accuracy))


def test_best_against_worst(tmp_path):
    losses = [-log_sigmoid(rewards_of(r)[0] - rewards_of(r)[-1]) for r in GROUPS]
    found = eval_loss(tmp_path, GROUPS, group_pairs="best_worst")
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def softmax(values):
    top = max(values)
    return [math.exp(v - top) / sum(math.exp(w - top) for w in values) for v in values]


def plackett_luce(row):
    order = sorted(range(len(row["scores"])), key=lambda i: -row["scores"][i])
    r = [rewards_of(row)[i] for i in order]
    return -sum(math.log(softmax(r[i:])[0]) for i in range(len(r)))


def infonca(row):
    targets = softmax([s / 0.5 for s in row["scores"]])
    return -sum(t * math.log(p) for t, p in zip(targets, softmax(rewards_of(row)), strict=True))


def nca(row):
    targets, r = softmax([s / 0.5 for s in row["scores"]]), rewards_of(row)
    return -sum(
        t * log_sigmoid(x) + log_sigmoid(-x) / len(r) for t, x in zip(targets, r, strict=True)
    )


@pytest.mark.parametrize("by_hand", [plackett_luce, infonca, nca], ids=lambda f: f.__name__)
def test_losses_of_whole_groups_by_hand(by_hand, tmp_path):
    found = eval_loss(tmp_path, GROUPS, loss_type=by_hand.__name__, infonca_temperature=0.5)
    expected = sum(map(by_hand, GROUPS)) / len(GROUPS)
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_pair_is_a_group_of_two(tmp_path):
    found = eval_loss(tmp_path / "a", ROWS, loss_type="plackett_luce")
    plain = eval_loss(tmp_path / "b", ROWS)
    assert found["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


def test_losses_of_pairs_and_of_groups_add_up(tmp_path):
    found = eval_loss(
        tmp_path, GROUPS, loss_type=["sigmoid", "plackett_luce"], loss_weights=[0.5, 2.0]
    )
    of_pairs = eval_loss(tmp_path, GROUPS, loss_type="sigmoid")["eval_loss"]
    of_groups = eval_loss(tmp_path, GROUPS, loss_type="plackett_luce")["eval_loss"]
    assert found["eval_loss"] == pytest.approx(0.5 * of_pairs + 2.0 * of_groups, rel=1e-5)


def test_groups_without_scores_weigh_their_given_pairs_in_losses_of_groups_too(tmp_path):
    """Three given pairs of one row are three groups of two that share the row's weight."""
    row = {
        "prompt_ids": [11, 12],
        "answer_ids": [[20, 21], [22], [23, 24, 25]],
        "preferences": [[0, 1], [0, 2], [2, 1]],
    }
    r = [reward(row["prompt_ids"], answer) for answer in row["answer_ids"]]
    expected = -sum(log_sigmoid(r[i] - r[j]) for i, j in row["preferences"]) / 3
    for name in ("sigmoid", "plackett_luce"):
        found = eval_loss(tmp_path, [row], loss_type=name)
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-5), name


def test_soft_labels_by_hand(tmp_path):
    draw = random.Random(0)
    rows = [{**row, "p_chosen": draw.random()} for row in ROWS]
    expected = {"expected": 0.0, "geometric": 0.0, "ignore": 0.0}
    for row in rows:
        h = reward(row["prompt_ids"], row["chosen_ids"]) - reward(
            row["prompt_ids"], row["rejected_ids"]
        )
        p = row["p_chosen"]
        expected["expected"] -= (p * log_sigmoid(h) + (1 - p) * log_sigmoid(-h)) / len(rows)
        expected["geometric"] -= log_sigmoid((2 * p - 1) * h) / len(rows)
        expected["ignore"] -= log_sigmoid(h) / len(rows)
    for name, value in expected.items():
        found = eval_loss(tmp_path, rows, soft_labels=name)
        assert found["eval_loss"] == pytest.approx(value, rel=1e-5), name


def test_a_group_trains_as_its_pairs_do(tmp_path):
    """A step on one row of three answers is a step on its three pairs as rows of their own."""
    prompt, answers = [11, 12, 13], [[20], [21, 22], [23]]
    group = {"prompt_ids": prompt, "answer_ids": answers, "scores": [2.0, 1.0, 0.0]}
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": answers[i], "rejected_ids": answers[j]}
        for i, j in pairs_of(group)
    ]
    one = trained(tmp_path / "one", [group], per_device_train_batch_size=1)
    two = trained(tmp_path / "two", pairs, per_device_train_batch_size=3)
    assert_same_weights(one, two)


@pytest.mark.parametrize("micro_batch_tokens", [1, 10_000])
def test_a_balancing_loss_counts_once_a_step(micro_batch_tokens, tmp_path):
    """The first step's loss is ln 2 and the weighted mean balancing loss, however it is split."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            **{k: getattr(tiny_policy().config, k) for k in SHAPE}, num_local_experts=4,
            num_experts_per_tok=2,
        )
    )  # fmt: skip
    trainer = trained(
        tmp_path, ROWS, model=model, peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        router_aux_loss_coef=0.5, max_steps=1, micro_batch_tokens=micro_batch_tokens,
    )  # fmt: skip
    line = trainer.state.log_history[0]
    assert line["aux_loss"] > 1
    assert line["loss"] == pytest.approx(math.log(2) + 0.5 * line["aux_loss"], rel=1e-5)


# --- Evaluation ---------------------------------------------------------------------------------


def test_means_are_over_the_true_counts(tmp_path):
    """Twelve rows in batches of five leave two; token means count tokens, not batches."""
    parts = eval_loss(tmp_path, ROWS, per_device_eval_batch_size=5)
    whole = eval_loss(tmp_path, ROWS, per_device_eval_batch_size=12)
    assert parts.keys() == whole.keys()
    names = [
        n for n in whole if not any(part in n for part in ("runtime", "second", "preparation"))
    ]
    assert len(names) > 10
    for name in names:
        assert parts[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name


def test_training_stops_early_on_a_metric_of_preferences(tmp_path):
    """With a learning rate of 0 nothing gets better, so patience ends after two evaluations more."""
    trainer = make_trainer(
        tmp_path, ROWS, eval_rows=ROWS[:5], learning_rate=0.0, max_steps=20, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/accuracies", greater_is_better=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_metric == 0.0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")


def test_several_evaluation_sets_have_names(tmp_path):
    trainer = make_trainer(tmp_path, ROWS)
    found = trainer.evaluate({"a": Dataset.from_list(ROWS[:3]), "b": Dataset.from_list(GROUPS)})
    assert {"eval_a_loss", "eval_b_loss", "eval_b_rewards/margins"} <= set(found)


def test_compute_metrics_gets_the_logits_of_chosen_then_rejected(tmp_path):
    seen = []

    def measure(prediction):
        seen.append(prediction)
        return {"n": len(prediction.predictions)}

    trainer = make_trainer(tmp_path, ROWS, eval_rows=ROWS[:2], per_device_eval_batch_size=2)
    trainer.compute_metrics = measure
    found = trainer.evaluate()
    assert found["eval_n"] == 4
    sides = [[*r["prompt_ids"], *r[s]] for s in ("chosen_ids", "rejected_ids") for r in ROWS[:2]]
    width = max(map(len, sides))
    assert seen[0].predictions.shape == (4, width, len(tiny_tokenizer()))
    for given, ids in zip(seen[0].label_ids.tolist(), sides, strict=True):
        assert given[: len(ids)] == ids


# --- Interruption -------------------------------------------------------------------------------


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["LoRA", "full"])
def test_a_resumed_training_is_the_uninterrupted_one(peft_config, tmp_path):
    """Six steps over two epochs, interrupted after the second step, within the first epoch."""
    options = {
        "kind": _Recorder, "max_steps": 6, "peft_config": peft_config, "optim": "adamw_torch",
        "learning_rate": 1e-2, "lr_scheduler_type": "linear", "save_strategy": "steps",
        "save_steps": 2,
    }  # fmt: skip
    whole = trained(tmp_path / "run", ROWS, **options)
    resumed = make_trainer(tmp_path / "run", ROWS, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.seen == whole.seen[2:]
    one, two = weights(resumed), weights(whole)
    for name, value in two.items():
        assert torch.equal(one[name], value), name
    own, other = metrics(resumed), metrics(whole)
    assert own[:-1] == other[:-1]  # the last line sums up what this process did itself
    assert len(own) == 7


# --- What stops a training ----------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "plackett_luce"])
def test_a_loss_that_is_not_finite_stops_and_names_the_prompt(loss, tmp_path):
    """One token's embedding is NaN; only one prompt has it."""
    tokenizer = tiny_tokenizer()
    bad = tokenizer("The sky")["input_ids"]
    rows = [*ROWS[:3], {**ROWS[3], "prompt_ids": bad}]
    rare = next(i for i in bad if not any(i in ids for r in ROWS[:3] for ids in r.values()))
    model = tiny_policy()
    trainer = make_trainer(tmp_path, rows, model=model, loss_type=loss)
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = float("nan")
    before = weights(trainer)
    with pytest.raises(TrainingError, match="the loss is not finite at step 1") as error:
        trainer.train()
    assert "prompt 'The sky'" in str(error.value)
    assert str(error.value).count("prompt '") == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_weights_that_explode_stop_the_training_at_the_next_step(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, learning_rate=1e30, max_steps=5)
    with pytest.raises(TrainingError, match=r"not finite at step 2; .* after step 1\. Lower the"):
        trainer.train()


def test_an_adapter_that_does_not_begin_at_zero_is_refused(tmp_path):
    started = LoraConfig(**{**LORA.to_dict(), "init_lora_weights": False})
    for config in (started, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")):
        with pytest.raises(
            TrainingError, match="before the first step policy and reference differ"
        ):
            trained(tmp_path, ROWS, peft_config=config)
    trained(tmp_path, ROWS, peft_config=started, ref_model=tiny_policy())  # it was asked for


def test_dropout_that_is_on_is_seen_before_the_first_step(tmp_path):
    dropped = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
    model = tiny_policy()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(TrainingError, match="or dropout that is on"):
        trained(tmp_path, ROWS, model=model, disable_dropout=False, peft_config=dropped)


# --- The reference ------------------------------------------------------------------------------


def adapted(seed=3):
    torch.manual_seed(seed)
    model = get_peft_model(tiny_policy(), copy.deepcopy(LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("adapter off", {}, "the base model (adapter off)"),
        ("adapter copy", {"adapted": True}, "a frozen copy of the adapter as it is now"),
        (
            "base model",
            {"adapted": True, "adapter_reference": "base"},
            "the base model, from which the continued adapter has moved already",
        ),
        ("model copy", {"peft_config": None}, "a frozen copy of the model as it is now"),
        ("given model", {"ref_model": REFERENCE}, "the model given as ref_model"),
        ("none", {"loss_type": "simpo", "beta": 2.0}, "not used by these losses"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_reference_is_stated_and_does_not_move(kind, options, said, tmp_path, caplog):
    options = dict(options)
    if options.pop("adapted", False):
        options |= {"model": adapted(), "peft_config": None}
    with caplog.at_level(logging.INFO, logger="prefopt"):
        trainer = make_trainer(tmp_path, ROWS, **options)
    assert f"the reference is {said}" in caplog.text
    assert trainer.reference.reference.kind == kind
    if kind == "none":
        trainer.train()
        assert trainer.reference.n_computed == 0
        return
    trees = module.plan_micro_batches(module.RowCollator()(ROWS).rows, 10_000)[0].trees

    def reference():
        trainer.reference.cache._memory.clear()
        return trainer.reference.token_logps(trees, torch.device("cpu"))

    before = reference()
    names = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert torch.equal(reference(), before)
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == names
    with trainer.reference.reference.active() as model:
        assert not any(m.training for m in model.modules())
    first = trainer.state.log_history[0]
    if kind in ("given model", "base model"):
        assert abs(first["rewards/margins"]) > 1e-3
    else:
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_losses_without_a_reference_do_not_run_one(tmp_path):
    """SimPO on the mean log-probabilities alone, by hand."""
    found = eval_loss(tmp_path, ROWS, loss_type="simpo", simpo_gamma=0.3)
    losses = []
    for row in ROWS:
        mean = [
            logp(POLICY, row["prompt_ids"], row[side]) / len(row[side])
            for side in ("chosen_ids", "rejected_ids")
        ]
        losses.append(-log_sigmoid(BETA * (mean[0] - mean[1]) - 0.3))
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_moving_reference_moves(tmp_path):
    trainer = make_trainer(
        tmp_path, ROWS, peft_config=None, sync_ref_model=True, ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0, learning_rate=0.05, max_steps=6,
    )  # fmt: skip
    trainer.train()
    policy = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    for name, value in trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters():
        assert torch.equal(value, policy[name])
    # With the reference set to the policy after every step, every step begins at margin 0.
    margins = [line["rewards/margins"] for line in trainer.state.log_history if "loss" in line]
    assert margins == pytest.approx([0.0] * 6, abs=1e-5)


@pytest.mark.parametrize(("peft_config", "library"), [(LORA, "peft"), (None, "transformers")])
def test_the_pushed_folder_has_a_card_that_names_the_data(
    peft_config, library, tmp_path, monkeypatch
):
    """With the arguments that TRL's scripts push with, and the Hub replaced."""
    hub = Mock()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer = make_trainer(
        tmp_path, ROWS, peft_config=peft_config, hub_model_id="me/tuned", max_steps=1,
        save_strategy="steps", save_steps=1, loss_type=["sigmoid", "sft"],
    )  # fmt: skip
    trainer.hub_model_id = "me/tuned"
    trainer.train()
    card = ModelCard.load(tmp_path / "README.md")  # it comes with the checkpoint
    assert card.data.tags == ["prefopt", "dpo"]
    trainer.push_to_hub(dataset_name="me/pairs", tags="colours")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == "me/pairs"
    assert card.data.tags == ["prefopt", "dpo", "colours"]
    assert card.data.library_name == library
    assert "# tuned\n" in card.text
    assert "loss sigmoid, sft, beta 0.1" in card.text
    assert hub.upload_folder.call_args.kwargs["folder_path"] == str(tmp_path)


def test_a_script_reads_the_settings_from_its_arguments_as_trl_does():
    parser = trl.TrlParser((DPOConfig,))
    given = ["--output_dir", "out", "--use_cpu", "--loss_type", "sigmoid", "simpo"]
    (config,) = parser.parse_args_and_config([*given, "--soft_labels", "robust"])
    assert (config.loss_type, config.soft_labels) == (["sigmoid", "simpo"], "robust")
    with pytest.raises(SystemExit):
        parser.parse_args_and_config([*given, "--soft_labels", "gold"])


# --- What is refused ----------------------------------------------------------------------------


def test_all_faults_of_a_configuration_are_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="DPOConfig: ") as error:
        DPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, loss_type=["sigmoud", "ipo"], beta=-1.0,
            micro_batch_tokens=0, group_pairs="some", max_length=1, ld_alpha=2.0,
            soft_labels="gold",
        )  # fmt: skip
    for words in ("unknown loss 'sigmoud': try sigmoid", "beta must be positive, got -1.0",
                  "micro_batch_tokens must be positive, got 0", "group_pairs must be all or best",
                  "max_length must be at least 2, got 1", "ld_alpha must be in [0, 1], got 2.0",
                  "soft_labels must be one of"):  # fmt: skip
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": ["infonca"], "infonca_temperature": 0.0}, "infonca_temperature must be pos"),
        ({"loss_type": ["plackett_luce"], "beta": 0.0}, "beta must be positive"),
        ({"loss_type": ["nca"], "f_divergence_type": "forward_kl"}, "nca supports no f_divergence"),
        ({"loss_type": ["aot"], "use_weighting": True}, "aot sorts the batch"),
        ({"loss_type": ["nca"], "use_weighting": True}, "nca takes no use_weighting"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_that_a_loss_cannot_take(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        DPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def build(tmp_path, dataset, **options):
    settings = options.pop("settings", {})
    args = DPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        **settings,
    )
    model = options.pop("model", None) or tiny_policy()
    return DPOTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
        **options,
    )


def test_arguments_that_exclude_each_other_are_all_named(tmp_path):
    model = adapted()
    settings = {
        "sync_ref_model": True,
        "precompute_ref_log_probs": True,
        "reference_cache": str(tmp_path),
        "neftune_noise_alpha": 5.0,
    }
    with pytest.raises(ValueError, match="`train_dataset` is required") as error:
        build(tmp_path, None, model=model, ref_model=model, peft_config=LORA, settings=settings)
    for words in (
        "must not be the same object",
        "has an adapter already",
        "sync_ref_model needs a reference model of its own",
        "cannot be precomputed",
        "no reference_cache can keep it",
        "neftune_noise_alpha is not supported",
    ):
        assert words in str(error.value)


def test_datasets_that_are_none(tmp_path):
    with pytest.raises(
        TypeError, match=r"must be a datasets\.Dataset or IterableDataset, got list"
    ):
        build(tmp_path, ROWS)
    with pytest.raises(DataError, match="the train dataset is empty"):
        build(tmp_path, Dataset.from_list([]))
    with pytest.raises(DataError, match="the train dataset has the columns text"):
        build(tmp_path, Dataset.from_list([{"text": "a"}]))
    with pytest.raises(ValueError, match="vision-related"):
        build(tmp_path, Dataset.from_list([{"image": "a", "chosen": "b", "rejected": "c"}]))
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        build(tmp_path, stream, settings={"precompute_ref_log_probs": True, "max_steps": 1})


def test_other_arguments_of_wrong_kinds(tmp_path):
    dataset = Dataset.from_list(ROWS)
    with pytest.raises(TypeError, match="args must be a DPOConfig, got dict"):
        DPOTrainer(model=tiny_policy(), args={}, train_dataset=dataset)
    with pytest.raises(TypeError, match="processing_class must be a tokenizer, got str"):
        DPOTrainer(
            model=tiny_policy(),
            args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=dataset,
            processing_class="tokenizer",
        )
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.1 needs a mixture-of-experts"):
        build(tmp_path, dataset, settings={"router_aux_loss_coef": 0.1})


def test_trls_own_configuration_is_taken(tmp_path):
    args = trl.DPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        max_steps=1, disable_tqdm=True, save_strategy="no", learning_rate=0.1, logging_steps=1,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=tiny_policy(),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
    )
    assert trainer.args.soft_labels == "expected"
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_stream_is_trained_on(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True, "optim": "sgd",
        "save_strategy": "no", "learning_rate": 0.5, "lr_scheduler_type": "constant", "seed": 1,
        "logging_steps": 1,
    }  # fmt: skip
    streamed = build(tmp_path / "a", stream, peft_config=copy.deepcopy(LORA), settings=settings)
    streamed.train()
    listed = trained(tmp_path / "b", ROWS, train_sampling_strategy="sequential")
    assert_same_weights(streamed, listed)


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = True


def test_a_second_trainer_on_a_model_that_was_trained_has_the_trained_one_as_reference(tmp_path):
    """Its copy is made of a model that already scores answers."""
    first = trained(tmp_path / "a", ROWS, peft_config=None, learning_rate=0.05, callbacks=[_Stop()])
    second = trained(tmp_path / "b", ROWS, model=first.model, peft_config=None, learning_rate=0.05)
    lines = [line for line in second.state.log_history if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(lines[1]["rewards/margins"]) > 1e-3  # the reference stayed behind
