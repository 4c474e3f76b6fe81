"""The reference and its cache: never stale, computed once, shared, and clear when it is broken.

Regression tests of two faults of caches that are keyed by the wrong things: sums that were kept
under another truncation, and sums that were kept under another LD-DPO discount.
"""

import copy
import shutil
import sqlite3
import threading
import time

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from prefopt.errors import TrainingError
from prefopt.training.reference import (
    Reference,
    ReferenceCache,
    copy_adapter,
    sequence_key,
    weights_fingerprint,
)
from tests.training.dpo_cases import (
    LORA,
    make_trainer,
    metrics,
    pair_rows,
    perturbed,
    tiny_policy,
    trained,
)

ROWS = pair_rows()
# Distinct (prompt, answer): the rows' answers repeat.
N = len(
    {(tuple(r["prompt_ids"]), tuple(r[s])) for r in ROWS for s in ("chosen_ids", "rejected_ids")}
)
# TRL says that it will take it away; until then it is computed as TRL does.
KEEP_END = "ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning"


def cached(folder, rows=ROWS, *, name="run", **options):
    """A trainer whose reference is precomputed in `folder`."""
    settings = {"precompute_ref_log_probs": True, "reference_cache": str(folder / "cache")}
    return make_trainer(folder / name, rows, **settings, **options)


def n_computed(trainer):
    return trainer.reference.n_computed


# --- What must be computed again, and what must not ----------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 0.01, "beta": 0.7},
        {"loss_type": ["ipo", "sft"]},
        {"ld_alpha": 0.3},
        {"use_weighting": True},
        {"max_length": None},  # no row is longer than before
        {"per_device_train_batch_size": 2, "micro_batch_tokens": 20},
    ],
    ids=str,
)
def test_another_run_of_a_sweep_computes_nothing_and_is_right(changed, tmp_path):
    assert n_computed(cached(tmp_path)) == N
    again = cached(tmp_path, **changed)
    assert n_computed(again) == 0
    again.train()
    assert n_computed(again) == 0
    plain = trained(tmp_path / "plain", ROWS, **changed)
    assert_same_run(again, plain)


def assert_same_run(one, two):
    one, two = metrics(one), metrics(two)
    assert len(one) == len(two)
    for own, other in zip(one, two, strict=True):
        assert own == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.filterwarnings(KEEP_END)
@pytest.mark.parametrize(
    "changed", [{"max_length": 8}, {"max_length": 8, "truncation_mode": "keep_end"}], ids=str
)
def test_another_truncation_computes_what_it_changed_and_is_right(changed, tmp_path):
    cached(tmp_path)
    again = cached(tmp_path, **changed)
    assert 0 < n_computed(again) < N  # the short rows are as before
    again.train()
    assert_same_run(again, trained(tmp_path / "plain", ROWS, **changed))
    assert n_computed(cached(tmp_path)) == 0  # and the first run's are still there
    assert n_computed(cached(tmp_path, **changed)) == 0


def test_the_columns_are_sums_over_whole_answers_whatever_the_discount(tmp_path):
    plain = cached(tmp_path / "a").train_dataset
    discounted = cached(tmp_path / "b", ld_alpha=0.1).train_dataset
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert list(plain[name]) == list(discounted[name])
    with torch.no_grad():
        ids = torch.tensor([ROWS[0]["prompt_ids"] + ROWS[0]["chosen_ids"]])
        n = len(ROWS[0]["chosen_ids"])
        log_p = tiny_policy()(input_ids=ids).logits[0, -n - 1 : -1].log_softmax(-1)
        expected = log_p.gather(-1, ids[0, -n:, None]).sum().item()
    assert plain["ref_chosen_logps"][0] == pytest.approx(expected, rel=1e-5)


def test_weights_that_were_overwritten_in_their_folder_are_noticed(tmp_path):
    home = tmp_path / "model"
    tiny_policy(seed=0).save_pretrained(home)
    cached(tmp_path, model=LlamaForCausalLM.from_pretrained(home))
    assert n_computed(cached(tmp_path, model=LlamaForCausalLM.from_pretrained(home))) == 0
    tiny_policy(seed=1).save_pretrained(home)
    assert n_computed(cached(tmp_path, model=LlamaForCausalLM.from_pretrained(home))) == N


def test_a_copy_elsewhere_is_recognised_and_a_single_changed_weight_too(tmp_path):
    tiny_policy().save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere")
    cached(tmp_path, model=LlamaForCausalLM.from_pretrained(tmp_path / "here"))
    moved = LlamaForCausalLM.from_pretrained(tmp_path / "elsewhere")
    assert n_computed(cached(tmp_path, model=moved)) == 0
    changed = LlamaForCausalLM.from_pretrained(tmp_path / "here")
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    assert n_computed(cached(tmp_path, model=changed)) == N


def test_every_kind_of_reference_is_shared_between_runs(tmp_path):
    assert n_computed(cached(tmp_path, peft_config=None)) == N  # the policy's own copy
    assert n_computed(cached(tmp_path, peft_config=None)) == 0
    cached(tmp_path, peft_config=None, ref_model=tiny_policy())
    assert n_computed(cached(tmp_path, ref_model=tiny_policy())) == 0
    assert n_computed(cached(tmp_path, ref_model=perturbed(tiny_policy()))) == N


def adapted(seed):
    model = get_peft_model(tiny_policy(), copy.deepcopy(LORA))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model


def test_references_that_differ_in_their_adapter_only_are_told_apart(tmp_path):
    for options in (
        lambda seed: {"model": adapted(seed), "peft_config": None},  # copied
        lambda seed: {"ref_model": adapted(seed)},  # given
    ):
        home = tmp_path / str(len(list(tmp_path.iterdir())))
        assert n_computed(cached(home, **options(1))) == N
        assert n_computed(cached(home, **options(1))) == 0
        assert n_computed(cached(home, **options(2))) == N


def test_the_scale_of_an_adapter_is_part_of_it():
    fingerprints = set()
    for alpha in (4, 8):
        torch.manual_seed(0)
        model = get_peft_model(tiny_policy(), LoraConfig(**{**LORA.to_dict(), "lora_alpha": alpha}))
        fingerprints.add(weights_fingerprint(Reference("given model", model)))
        copy_adapter(model)
        fingerprints.add(weights_fingerprint(Reference("adapter copy", model)))
    assert len(fingerprints) == 4


class _Backwards(set):
    """A set that is walked through in another order, as the next process might."""

    def __iter__(self):
        return reversed(sorted(super().__iter__()))


def test_a_fingerprint_does_not_depend_on_the_order_of_sets_nor_on_names():
    def fingerprint(change):
        model = adapted(1)
        copy_adapter(model)
        for config in model.peft_config.values():
            change(config)
        return weights_fingerprint(Reference("adapter copy", model))

    def backwards(config):
        config.target_modules = _Backwards(config.target_modules)
        assert len(config.target_modules) > 3

    def renamed(config):
        config.base_model_name_or_path = "somewhere/else"

    assert fingerprint(backwards) == fingerprint(renamed) == fingerprint(lambda _: None)


def test_the_precision_is_part_of_the_fingerprint():
    reference = Reference("model copy", tiny_policy())
    plain = weights_fingerprint(reference)
    assert plain == weights_fingerprint(reference)
    assert plain != weights_fingerprint(reference, autocast="bf16")
    assert plain != weights_fingerprint(Reference("model copy", tiny_policy().bfloat16()))


def test_what_the_policy_learns_does_not_change_the_fingerprint_of_its_base(tmp_path):
    trainer = make_trainer(tmp_path, ROWS[:4])
    before = weights_fingerprint(trainer.reference.reference)
    trainer.train()
    assert weights_fingerprint(trainer.reference.reference) == before


# --- Computed once --------------------------------------------------------------------------------


def test_the_second_epoch_computes_nothing(tmp_path):
    one = trained(tmp_path / "one", ROWS, max_steps=3)
    two = trained(tmp_path / "two", ROWS, max_steps=6)
    assert one.state.epoch == 1.0
    assert two.state.epoch == 2.0
    assert n_computed(two) == n_computed(one) == N


def test_a_repeated_evaluation_computes_nothing(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, eval_rows=pair_rows(seed=5))
    trainer.evaluate()
    before = n_computed(trainer)
    assert before > 0
    trainer.evaluate()
    assert n_computed(trainer) == before


def test_groups_find_what_pairs_have_kept(tmp_path):
    cached(tmp_path)
    prompt = ROWS[0]["prompt_ids"]
    of_prompt = [r for r in ROWS if r["prompt_ids"] == prompt]
    answers = [r[s] for r in of_prompt for s in ("chosen_ids", "rejected_ids")]
    known = [answer for i, answer in enumerate(answers) if answer not in answers[:i]]
    group = {
        "prompt_ids": prompt,
        "answer_ids": known,
        "scores": [float(i) for i in range(len(known))],
    }
    assert len(known) > 3
    assert n_computed(cached(tmp_path, [group])) == 0
    more = {**group, "answer_ids": [*known, [10, 11, 12, 13]], "scores": [*group["scores"], -1.0]}
    assert n_computed(cached(tmp_path, [more])) == 1
    assert n_computed(cached(tmp_path, [more])) == 0


def test_a_model_that_was_precomputed_is_let_go_and_missed_only_when_needed(tmp_path):
    trainer = cached(tmp_path, peft_config=None, ref_model=perturbed(tiny_policy()))
    trainer.train()
    assert trainer.ref_model is None
    assert trainer.reference.reference.model is None
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed"):
        trainer.evaluate(Dataset.from_list(pair_rows(seed=5)))
    trees = [tree for batch in trainer._plan(collated(pair_rows(seed=5))) for tree in batch.trees]
    with pytest.raises(TrainingError, match="were not precomputed"):
        trainer.reference.token_logps(trees, torch.device("cpu"))


def collated(rows):
    from prefopt.training.preference_rows import RowCollator

    return RowCollator()(rows).rows


def test_an_adapter_stays_at_hand_after_precomputing(tmp_path):
    trainer = cached(tmp_path)
    trainer.train()
    assert trainer.evaluate(Dataset.from_list(pair_rows(seed=5)))["eval_loss"] > 0


# --- The file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"this is no database, of course", b"\x00" * 5000], ids=str)
def test_a_broken_file_is_named_with_the_way_out(content, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "reference.sqlite").write_bytes(content)
    with pytest.raises(TrainingError, match=r"reference\.sqlite cannot be used .* delete it, or"):
        cached(tmp_path)


def test_another_programs_database_is_named_with_the_way_out(tmp_path):
    (tmp_path / "cache").mkdir()
    database = sqlite3.connect(tmp_path / "cache" / "reference.sqlite")
    database.execute("CREATE TABLE token_logps (something INTEGER)")
    database.close()
    with pytest.raises(TrainingError, match=r"reference\.sqlite cannot be used"):
        cached(tmp_path)


def test_two_trainers_share_a_folder_at_the_same_time(tmp_path):
    """Both are open before either computes; what one computed the other finds."""
    rows, others = ROWS[:6], ROWS[3:]
    options = {"reference_cache": str(tmp_path / "cache"), "max_steps": 1}
    one = make_trainer(tmp_path / "one", rows, per_device_train_batch_size=6, **options)
    two = make_trainer(tmp_path / "two", others, per_device_train_batch_size=9, **options)
    one.train()
    two.train()
    sides = ("chosen_ids", "rejected_ids")
    keys = [
        {(tuple(r["prompt_ids"]), tuple(r[s])) for r in part for s in sides}
        for part in (rows, others)
    ]
    assert n_computed(one) == len(keys[0])
    assert n_computed(two) == len(keys[1] - keys[0]) < len(keys[1])
    for name, own in (("one", one), ("two", two)):
        plain = trained(
            tmp_path / f"plain {name}", rows if name == "one" else others, max_steps=1,
            per_device_train_batch_size=6 if name == "one" else 9,
        )  # fmt: skip
        assert_same_run(own, plain)


def test_one_after_the_other_makes_the_file(tmp_path):
    """Several at once now and then get "database is locked" from SQLite, which does not wait here."""
    held, done = threading.Event(), []

    def hold():
        with FileLock(tmp_path / "reference.lock"):
            held.set()
            time.sleep(0.3)
            done.append(True)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    cache = ReferenceCache(tmp_path, "f")
    assert done
    other.join()
    cache.put({b"key": torch.ones(1)})
    assert cache.get([b"key"])[b"key"] == 1


def test_many_writers_lose_nothing(tmp_path):
    """Eight connections write the same and different keys at once."""
    keys = [sequence_key((i,), (i, i)) for i in range(40)]
    failed = []

    def write(offset):
        try:
            cache = ReferenceCache(tmp_path, "f", in_memory=False)
            for i in range(offset, offset + 30):
                cache.put({keys[i % 40]: torch.tensor([float(i % 40), -1.0])})
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(5 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    found = ReferenceCache(tmp_path, "f").get(keys)
    assert [found[key].tolist() for key in keys] == [[float(i), -1.0] for i in range(40)]
    assert ReferenceCache(tmp_path, "another").get(keys) == {}


# --- Keys and values ------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)


@given(ids, ids, ids, ids, st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_keys_are_the_same_for_the_same_split_of_the_same_ids_only(p, a, q, b, at):
    assert (sequence_key(p, a) == sequence_key(q, b)) == ((p, a) == (q, b))
    whole = p + a
    moved = whole[:at], whole[at:]  # the border between prompt and answer elsewhere
    assert (sequence_key(*moved) == sequence_key(p, a)) == (moved == (p, a))


def test_keys_tell_large_ids_apart():
    assert sequence_key((1,), (256,)) != sequence_key((1,), (0, 1))
    assert sequence_key((1,), (2**33,)) != sequence_key((1,), (0,))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_cache_gives_back_what_it_was_given(in_memory, on_disk, tmp_path):
    cache = ReferenceCache(tmp_path if on_disk else None, "f", in_memory=in_memory)
    values = {b"a": torch.tensor([-1.5, 1 / 3]), b"b": torch.tensor([0.0])}
    cache.put(values)
    found = cache.get([b"a", b"b", b"c"])
    if not (in_memory or on_disk):
        assert found == {}
        return
    assert found.keys() == values.keys()
    for key, value in values.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], value)
    found[b"a"] += 1  # changing what was handed out changes nothing that is kept
    assert torch.equal(cache.get([b"a"])[b"a"], values[b"a"])


def test_a_copied_adapter_is_frozen_and_equal_and_the_original_trains():
    model = adapted(1)
    x = torch.tensor([[11, 12, 13]])
    before = model(input_ids=x).logits
    copy_adapter(model)
    assert torch.equal(model(input_ids=x).logits, before)
    reference = Reference("adapter copy", model)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert all(".default." in n for n in trains)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trains:
                parameter += 0.1
    with reference.active() as active:
        assert torch.equal(active(input_ids=x).logits, before)
        assert not any(module.training for module in active.modules())
    assert not torch.allclose(model(input_ids=x).logits, before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    assert model.training


def test_its_file_is_closed_when_the_cache_goes(tmp_path):
    cache = ReferenceCache(tmp_path, "a")
    database = cache._database
    database.execute("SELECT 1")
    del cache
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        database.execute("SELECT 1")
