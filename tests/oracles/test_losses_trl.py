"""`prefopt.losses` against TRL's `DPOTrainer`: its loss and every parameter's gradient.

A random Llama is the policy, the same with perturbed weights the reference. TRL gets a collated
batch; here the log-probabilities come from the model's plain logits and go through `pair_losses`.
"""

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM

from prefopt.losses import (
    PAIR_LOSSES,
    LossSettings,
    PairBatch,
    check_losses,
    pair_losses,
    wpo_weights,
)

TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
WITH_DIVERGENCE = (
    "sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
# DiscoPOP's usual temperature of 0.05 magnifies the rounding of the two ways to a log-probability
# twentyfold; it has a test of its own.
SETTINGS = LossSettings(beta=0.3, label_smoothing=0.1, discopop_tau=0.5)


def rows():
    """Five pairs of token ids, their answers of unlike lengths; in one the chosen is shorter."""
    draw = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(5, 300, (n,), generator=draw).tolist()

    lengths = [(4, 6, 3), (7, 2, 9), (3, 5, 5), (2, 8, 1), (6, 4, 7)]
    return [
        {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)} for p, c, r in lengths
    ]


class TokenRowsTrainer(trl.DPOTrainer):
    """TRL's trainer on rows that are token ids already."""

    def _prepare_dataset(self, dataset, *_, **__):
        return dataset


@pytest.fixture(scope="module")
def trainer(tiny_model, tmp_path_factory):
    policy = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    reference = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=noise)
    args = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        use_weighting=True,  # makes TRL's head return what the weights need; off again below
    )
    made = TokenRowsTrainer(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows()),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    made.model.eval()
    return made


@pytest.fixture(scope="module")
def inputs(trainer):
    return trainer.data_collator(rows())


class Tokens(NamedTuple):
    """What both models say of each next token, zero outside the answers; (2N, T - 1) each."""

    policy: torch.Tensor  # with its graph, which all tests share
    log_collision: torch.Tensor  # log sum over v of pi(v)^2
    reference: torch.Tensor


@pytest.fixture(scope="module")
def tokens(trainer, inputs):
    policy, log_collision = token_logps(trainer.model, inputs)
    with torch.no_grad():
        reference, _ = token_logps(trainer.ref_model, inputs)
    return Tokens(policy, log_collision, reference)


def token_logps(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    log_p = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    mask = inputs["completion_mask"][:, 1:]
    taken = log_p.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return taken * mask, torch.logsumexp(2 * log_p, dim=-1).detach() * mask


def sequence_logps(tokens, mask, ld_alpha):
    """Sums over the answers; LD-DPO scales what lies beyond the shorter answer of each pair."""
    lengths = mask.sum(1)
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    position = mask.cumsum(1)
    beyond = position > shorter[:, None]
    scale = torch.where(beyond, 1.0 if ld_alpha is None else ld_alpha, 1.0)
    return (tokens * scale).sum(1)


def own_loss(inputs, tokens, names, weights, settings, ld_alpha=None, wpo=False):
    mask = inputs["completion_mask"][:, 1:]
    chosen, rejected = sequence_logps(tokens.policy, mask, ld_alpha).chunk(2)
    ref_chosen, ref_rejected = sequence_logps(tokens.reference, mask, ld_alpha).chunk(2)
    lengths = mask.sum(1)
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    batch = PairBatch(
        chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths,
        p_chosen=torch.ones(len(chosen)),
        chosen_nll=-tokens.policy.sum(1).chunk(2)[0],
        mean_chosen_length=chosen_lengths.float().mean(),
    )  # fmt: skip
    check_losses(names, weights, settings, weighted_pairs=wpo)
    losses = pair_losses(names, weights, batch, settings)
    if wpo:
        aligned = (tokens.policy - tokens.log_collision).sum(1)
        of_chosen, of_rejected = wpo_weights(aligned, lengths).chunk(2)
        losses = losses * of_chosen * of_rejected
    return losses.mean()


def trl_loss(trainer, inputs, names, weights, settings, ld_alpha=None, wpo=False):
    trainer.loss_types = list(names)
    trainer.loss_weights = list(weights or [1.0] * len(names))
    trainer.beta, trainer.label_smoothing = settings.beta, settings.label_smoothing
    trainer.f_divergence_type = settings.f_divergence
    trainer.f_alpha_divergence_coef = settings.f_alpha
    trainer.args.discopop_tau = settings.discopop_tau
    trainer.ld_alpha, trainer.use_weighting = ld_alpha, wpo
    return trainer.compute_loss(trainer.model, dict(inputs))


def assert_agree(trainer, inputs, tokens, names, weights=None, settings=SETTINGS, **options):
    parameters = dict(trainer.model.named_parameters())
    theirs = trl_loss(trainer, inputs, names, weights, settings, **options)
    their_gradients = torch.autograd.grad(theirs, parameters.values())
    ours = own_loss(inputs, tokens, names, weights, settings, **options)
    our_gradients = torch.autograd.grad(ours, parameters.values(), retain_graph=True)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for name, own, other in zip(parameters, our_gradients, their_gradients, strict=True):
        assert other.norm() > 0, name
        assert (own - other).norm() <= 1e-5 * other.norm(), name


def test_policy_and_reference_differ_enough_to_tell_the_losses_apart(trainer, inputs, tokens):
    with torch.no_grad():
        logratios = (tokens.policy - tokens.reference).sum(1)
        values = {
            name: round(trl_loss(trainer, inputs, [name], None, SETTINGS).item(), 4)
            for name in TRL_LOSSES
        }
    assert logratios.abs().min() > 0.01
    assert logratios.abs().max() > 0.5
    assert len(set(values.values())) == len(TRL_LOSSES), values


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_every_loss_of_trl(name, trainer, inputs, tokens):
    assert_agree(trainer, inputs, tokens, [name])


def test_trl_has_no_loss_that_is_missing_here(trainer, inputs):
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trl_loss(trainer, inputs, ["none"], None, SETTINGS)
    listed = str(error.value).split("[", 1)[1].split("]")[0]
    assert {name.strip(" '") for name in listed.split(",")} == set(TRL_LOSSES)
    assert set(TRL_LOSSES) <= set(PAIR_LOSSES)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", WITH_DIVERGENCE)
def test_every_divergence_of_every_loss_that_takes_one(name, divergence, trainer, inputs, tokens):
    settings = replace(SETTINGS, f_divergence=divergence, f_alpha=0.4)
    assert_agree(trainer, inputs, tokens, [name], settings=settings)


@pytest.mark.parametrize("alpha", [1.0, 1.8, -0.5])
def test_other_orders_of_the_alpha_divergence(alpha, trainer, inputs, tokens):
    settings = replace(SETTINGS, f_divergence="alpha_divergence", f_alpha=alpha)
    assert_agree(trainer, inputs, tokens, ["sigmoid"], settings=settings)


def test_divergences_are_refused_where_trl_refuses_them(trainer):
    settings = replace(SETTINGS, f_divergence="js_divergence")
    for name in TRL_LOSSES:
        if name in WITH_DIVERGENCE:
            check_losses([name], None, settings)
        else:
            with pytest.raises(ValueError, match="no f_divergence but reverse_kl"):
                check_losses([name], None, settings)
    for name in set(TRL_LOSSES) - set(WITH_DIVERGENCE):
        args = copy.copy(trainer.args)  # a new DPOConfig would reset the trainer's own state
        args.loss_type, args.f_divergence_type = [name], "js_divergence"
        with pytest.raises(ValueError, match="only supported for the following"):
            TokenRowsTrainer(
                model=trainer.model,
                ref_model=trainer.ref_model,
                args=args,
                train_dataset=trainer.train_dataset,
                processing_class=trainer.processing_class,
            )


@pytest.mark.parametrize("smoothing", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("name", ["robust", "aot", "aot_unpaired", "exo_pair", "sigmoid"])
def test_label_smoothing(name, smoothing, trainer, inputs, tokens):
    if name == "exo_pair" and smoothing == 0:
        smoothing = 1e-3  # the paper's; 0 is refused
    settings = replace(SETTINGS, label_smoothing=smoothing)
    assert_agree(trainer, inputs, tokens, [name], settings=settings)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
        (["ipo", "apo_down", "aot"], [0.5, 2.0, -0.25]),
        (["sigmoid_norm", "sft"], None),
    ],
    ids=["mpo", "three", "unweighted"],
)
def test_several_losses_with_weights(names, weights, trainer, inputs, tokens):
    assert_agree(trainer, inputs, tokens, names, weights)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot", "sppo_hard", "sft"])
def test_length_desensitised_log_probabilities(name, ld_alpha, trainer, inputs, tokens):
    assert_agree(trainer, inputs, tokens, [name], ld_alpha=ld_alpha)


@pytest.mark.parametrize("beta", [0.01, 2.0])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "discopop", "nca_pair"])
def test_other_strengths(name, beta, trainer, inputs, tokens):
    assert_agree(trainer, inputs, tokens, [name], settings=replace(SETTINGS, beta=beta))


# With weights TRL's "sft" raises and its "hinge" cannot be differentiated (in-place products).
WEIGHTED = [n for n in TRL_LOSSES if n not in ("aot", "aot_unpaired", "sft", "hinge")]


@pytest.mark.parametrize("name", WEIGHTED)
def test_wpo_weights(name, trainer, inputs, tokens):
    assert_agree(trainer, inputs, tokens, [name], wpo=True)


def test_wpo_weights_of_the_hinge(trainer, inputs, tokens):
    with torch.no_grad():
        theirs = trl_loss(trainer, inputs, ["hinge"], None, SETTINGS, wpo=True)
        ours = own_loss(inputs, tokens, ["hinge"], None, SETTINGS, wpo=True)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_discopop_at_its_usual_temperature(trainer, inputs, tokens):
    """On TRL's own log-probabilities, so that only the losses differ."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    head = {
        "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"],
        "labels": labels, "fused_lm_head": True, "use_cache": False,
    }  # fmt: skip
    with torch.no_grad():
        reference = trainer.ref_model(**head).log_probs
    theirs = Tokens(trainer.model(**head).log_probs, tokens.log_collision, reference)
    assert_agree(
        trainer, inputs, theirs, ["discopop"], settings=replace(SETTINGS, discopop_tau=0.05)
    )
