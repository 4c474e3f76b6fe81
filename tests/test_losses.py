"""Losses by hand, by identity, and at the edges of floating point."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt import losses as module
from prefopt.losses import (
    LOSS_NAMES,
    PAIR_LOSSES,
    LossSettings,
    PairBatch,
    check_losses,
    f_divergence_scores,
    infonca_loss,
    nca_loss,
    pair_losses,
    plackett_luce_loss,
    sigmoid_loss,
    soft_label_loss,
    wpo_weights,
)

SETTINGS = LossSettings(beta=0.5, label_smoothing=0.1)
quick = settings(max_examples=20, deadline=None)
IMITATION = ("sft", "nll")
SORTING = ("aot", "aot_unpaired")
TIE_AWARE = ("rao_kupper", "davidson")
SOFT = tuple(n for n in LOSS_NAMES if n not in IMITATION + SORTING)
MODES = ("expected", "geometric", "robust", "ignore")
LN2 = math.log(2)


def tensor(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def logistic(x):
    return 1 / (1 + math.exp(-x))


def pairs(
    chosen=(-6.0, -4.0), rejected=(-5.0, -9.0), ref_chosen=(-8.0, -3.0), ref_rejected=(-4.0, -5.0),
    lengths=((4, 2), (5, 3)), p=None, dtype=torch.float64,
):  # fmt: skip
    """By default log-ratios 2, -1 of the chosen and -1, -4 of the rejected: both margins are 3."""
    chosen = torch.tensor(chosen, dtype=dtype)
    n = len(chosen)
    return PairBatch(
        chosen,
        torch.tensor(rejected, dtype=dtype),
        torch.tensor(ref_chosen, dtype=dtype),
        torch.tensor(ref_rejected, dtype=dtype),
        torch.tensor(lengths[0][:n]),
        torch.tensor(lengths[1][:n]),
        torch.ones(n) if p is None else torch.tensor(p, dtype=dtype),
        chosen_nll=-chosen,
        mean_chosen_length=float(sum(lengths[0][:n])) / n,
    )


def of(name, batch, config=SETTINGS):
    return PAIR_LOSSES[name](batch, config)


# Pair 1 of `pairs()`: log-ratios 2 and -1, so with beta = 0.5 rewards 1 and -0.5, margin 1.5;
# lengths 4 and 5; mean log-probabilities -6/4 = -1.5 and -5/5 = -1; label smoothing 0.1.
_D = 1.5
_LP, _LN = math.log(logistic(_D)), math.log(logistic(-_D))  # -0.2014133, -1.7014133
_ODDS_W = -1.5 - math.log(1 - math.exp(-1.5))
_ODDS_L = -1.0 - math.log(1 - math.exp(-1.0))
BY_HAND = {
    "sigmoid": 0.2014132779827524,  # ln(1 + e^-1.5)
    "hinge": 0.0,  # 1 - 1.5 < 0
    "ipo": (2 / 4 + 1 / 5 - 1) ** 2,  # margin a token 0.7, target 1 / (2 * 0.5)
    "exo_pair": logistic(_D) * (_LP - math.log(0.9)) + logistic(-_D) * (_LN - math.log(0.1)),
    # -ln s(1) - (ln s(-1) + ln s(0.5)) / 2
    "nca_pair": 0.3132616875 + 0.5 * 1.3132616875 + 0.5 * 0.4740769842,
    "robust": (-0.9 * _LP + 0.1 * _LN) / 0.8,
    "bco_pair": 0.3132616875 + 0.4740769842,  # -ln s(1) - ln s(0.5)
    "sppo_hard": (2 - 1) ** 2 + (-1 + 1) ** 2,
    "apo_zero": 1 - 0.7310585786 + 0.3775406688,  # 1 - s(1) + s(-0.5)
    "apo_down": 0.7310585786 + 1 - 0.8175744762,  # s(1) + 1 - s(1.5)
    # m = s(1.5 / 0.05) = 1 - 9e-14: the exponential alone
    "discopop": math.exp(-1.5),
    "sft": 6 / 3,  # 6 nats over a mean length of (4 + 2) / 2
    "sigmoid_norm": math.log(1 + math.exp(-0.5 * 0.7)),
    "cdpo": -0.9 * _LP - 0.1 * _LN,
    "gdpo": 0.2014132779827524,  # p = 1
    "simpo": math.log(1 + math.exp(0.5 * 0.5 + 0.5)),  # margin 0.5 (-1.5 + 1) - 0.5
    "orpo": 6 / 4 + 0.1 * math.log(1 + math.exp(_ODDS_L - _ODDS_W)),
    "dpop": 0.2014132779827524,  # the chosen answer gained likelihood: no penalty
    "rdpo": math.log(1 + math.exp(-(1.5 + 0.01 * (4 - 5)))),
    "rao_kupper": math.log(1 + 3 * math.exp(-1.5)),  # -ln s(1.5 - ln 3)
    "davidson": math.log(1 + math.exp(-1.5) + 2 * math.exp(-0.75)),
    "nll": 6 / 4,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_worked_by_hand(name):
    assert of(name, pairs())[0].item() == pytest.approx(BY_HAND[name], rel=1e-9, abs=1e-12)


def test_every_loss_but_the_sorting_ones_is_worked_by_hand():
    assert set(BY_HAND) | set(SORTING) == set(LOSS_NAMES)


def test_dpop_pays_for_what_the_chosen_answer_lost():
    # Pair 2: log-ratios -1 and -4, margin 3; penalty lambda * 1 with lambda = 2: 0.5 (3 - 2) = 0.5.
    loss = of("dpop", pairs(), replace(SETTINGS, dpop_lambda=2.0))[1].item()
    assert loss == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_aot_compares_quantiles():
    batch = pairs(chosen=(-1.0, -5.0), rejected=(-2.0, -3.0), ref_chosen=(-4.0, -4.0),
                  ref_rejected=(-4.5, -7.0))  # fmt: skip
    # policy margins 1, -2, sorted -2, 1; reference margins 0.5, 3; differences -2.5 and -2
    hard = replace(SETTINGS, label_smoothing=0.0)
    expected = [math.log(1 + math.exp(0.5 * 2.5)), math.log(1 + math.exp(0.5 * 2.0))]
    assert of("aot", batch, hard).tolist() == pytest.approx(expected)
    # log-ratios 3, -1 of the chosen and 2.5, 4 of the rejected: sorted -1 - 2.5 and 3 - 4
    expected = [math.log(1 + math.exp(0.5 * 3.5)), math.log(1 + math.exp(0.5 * 1.0))]
    assert of("aot_unpaired", batch, hard).tolist() == pytest.approx(expected)
    # label smoothing 0.1 adds 0.1 of the margin: -ln s(-x) = -ln s(x) + x
    smooth = [v - 0.1 * 0.5 * d for v, d in zip(expected, (3.5, 1.0), strict=True)]
    assert of("aot_unpaired", batch).tolist() == pytest.approx(smooth)


# While policy and reference agree, and so every log-ratio is 0.
AT_START = {
    "sigmoid": LN2, "hinge": 1.0, "ipo": 1.0, "nca_pair": 2 * LN2, "robust": LN2,
    "bco_pair": 2 * LN2, "sppo_hard": 2.0, "aot": LN2, "aot_unpaired": LN2, "apo_zero": 1.0,
    "apo_down": 1.0, "discopop": (LN2 + 1) / 2, "sigmoid_norm": LN2, "cdpo": LN2, "gdpo": LN2,
    "dpop": LN2, "rao_kupper": math.log(4), "davidson": math.log(4),
    "exo_pair": -LN2 - 0.5 * math.log(0.9 * 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_START)
def test_values_at_step_0(name):
    batch = pairs()
    same = batch._replace(
        ref_chosen_logps=batch.chosen_logps, ref_rejected_logps=batch.rejected_logps
    )
    assert of(name, same).tolist() == pytest.approx([AT_START[name]] * 2)


def test_losses_that_need_no_reference_do_not_read_it():
    batch = pairs()
    nothing = torch.full_like(batch.chosen_logps, math.nan)
    without = batch._replace(ref_chosen_logps=nothing, ref_rejected_logps=nothing)
    for name, loss in PAIR_LOSSES.items():
        assert bool(of(name, without).isfinite().all()) == (not loss.needs_reference), name


def test_only_sorting_losses_depend_on_the_other_pairs():
    batch = pairs(ref_rejected=(-9.0, -2.0))  # the reference ranks the margins the other way
    first = PairBatch(*(f[:1] if isinstance(f, torch.Tensor) else f for f in batch))
    for name, loss in PAIR_LOSSES.items():
        alone = torch.equal(of(name, batch)[:1], of(name, first))
        assert alone == (not loss.sorts_batch), name


# --- f-divergences


def test_divergence_scores_are_f_prime_of_the_ratio():
    logratios = tensor(LN2, -LN2, 0.0)  # ratios 2, 1/2, 1
    assert torch.equal(f_divergence_scores(logratios), logratios)
    assert f_divergence_scores(logratios, "forward_kl").tolist() == pytest.approx([0.5, -1.0, 0.0])
    # ln(2t / (1 + t)) = ln(4/3), ln(2/3), 0
    expected = [math.log(4 / 3), math.log(2 / 3), 0.0]
    assert f_divergence_scores(logratios, "js_divergence").tolist() == pytest.approx(expected)
    # (t^-0.5 - 1) / -0.5 = 2 - 2 / sqrt t
    expected = [2 - 2 / math.sqrt(2), 2 - 2 * math.sqrt(2), 0.0]
    assert f_divergence_scores(logratios, "alpha_divergence", 0.5).tolist() == pytest.approx(
        expected
    )


def test_alpha_divergence_holds_forward_and_reverse_kl():
    logratios = torch.linspace(-3, 3, 13, dtype=torch.float64)
    alpha_0 = f_divergence_scores(logratios, "alpha_divergence", 0.0)
    torch.testing.assert_close(alpha_0, f_divergence_scores(logratios, "forward_kl"))
    near_1 = f_divergence_scores(logratios, "alpha_divergence", 1 + 2e-6)
    torch.testing.assert_close(near_1, logratios, rtol=1e-5, atol=1e-5)
    assert torch.equal(f_divergence_scores(logratios, "alpha_divergence", 1.0), logratios)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergence_scores_survive_vanishing_ratios(divergence):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        logratios = torch.tensor([-1e4, -300.0, 300.0, 1e4], dtype=dtype, requires_grad=True)
        scores = f_divergence_scores(logratios, divergence, 0.5)
        assert scores.isfinite().all()
        assert torch.autograd.grad(scores.sum(), logratios)[0].isfinite().all()


def test_a_divergence_is_refused_by_losses_without_one():
    config = replace(SETTINGS, f_divergence="js_divergence")
    for name, loss in PAIR_LOSSES.items():
        if loss.supports_divergence:
            changed = not torch.equal(of(name, pairs(), config), of(name, pairs()))
            assert changed == (name not in IMITATION), name
        else:
            with pytest.raises(ValueError, match=f"{name} has no form under js_divergence"):
                of(name, pairs(), config)


# --- Symmetries

log_probability = st.floats(-60, 0)
probability = st.floats(0, 1)


@st.composite
def batches(draw, n=3, p=probability):
    def column(values):
        return tensor(*draw(st.lists(values, min_size=n, max_size=n)))

    chosen = column(log_probability)
    lengths = [column(st.integers(1, 50)) for _ in range(2)]
    return PairBatch(
        chosen, *(column(log_probability) for _ in range(3)), *lengths, column(p), -chosen,
        float(lengths[0].mean()),
    )  # fmt: skip


@quick
@given(batches())
def test_the_two_outcomes_of_a_pair_have_probabilities_that_sum_to_1(batch):
    config = replace(SETTINGS, soft_labels="ignore")
    for name in ("sigmoid", "sigmoid_norm", "gdpo", "rdpo"):
        total = torch.exp(-of(name, batch, config)) + torch.exp(-of(name, batch.swapped(), config))
        torch.testing.assert_close(total, torch.ones_like(total))


@quick
@given(batches())
def test_win_loss_and_tie_have_probabilities_that_sum_to_1(batch):
    c, r = batch.chosen_logratios, batch.rejected_logratios
    for name in TIE_AWARE:
        win, tie = getattr(module, f"{name}_loss"), getattr(module, f"{name}_tie_loss")
        total = sum(
            torch.exp(-f(*sides, beta=0.1, nu=2.5))
            for f, sides in ((win, (c, r)), (win, (r, c)), (tie, (c, r)))
        )
        torch.testing.assert_close(total, torch.ones_like(total))


@quick
@given(batches())
def test_swapping_sides_and_labels_changes_nothing_on_average_over_the_label(batch):
    for name in SOFT:
        if name == "orpo":  # its likelihood term is of the chosen answer
            continue
        one, other = of(name, batch), of(name, batch.swapped())
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)


def test_a_swapped_batch_exchanges_every_side_and_knows_no_likelihood():
    batch = pairs(p=(0.9, 0.2))
    swapped = batch.swapped()
    assert torch.equal(swapped.chosen_logratios, batch.rejected_logratios)
    assert torch.equal(swapped.rejected_logratios, batch.chosen_logratios)
    assert torch.equal(swapped.chosen_lengths, batch.rejected_lengths)
    assert torch.equal(swapped.rejected_lengths, batch.chosen_lengths)
    assert swapped.p_chosen.tolist() == pytest.approx([0.1, 0.8])
    for name in (*IMITATION, "orpo"):
        assert of(name, swapped).isnan().all()


# Losses that never overshoot: no target margin, no anchor, no estimate that can turn negative.
MONOTONE = ("sigmoid", "hinge", "sigmoid_norm", "bco_pair", "apo_zero", "gdpo", "simpo", "orpo",
            "dpop", "rdpo", *TIE_AWARE)  # fmt: skip


@quick
@given(batches(p=st.just(1.0)))
def test_gradients_raise_the_chosen_answer_and_lower_the_rejected(batch):
    chosen = batch.chosen_logps.clone().requires_grad_()
    rejected = batch.rejected_logps.clone().requires_grad_()
    moved = batch._replace(chosen_logps=chosen, rejected_logps=rejected)
    for name in MONOTONE:
        down, up = torch.autograd.grad(of(name, moved).sum(), (chosen, rejected))
        assert (down <= 0).all(), name
        assert (up >= 0).all(), name
        # none of them is flat, except the hinge beyond its margin and saturated sigmoids
        if name in ("sigmoid", "simpo", "rao_kupper", "davidson"):
            assert (down != 0).any() or (
                batch.chosen_logratios - batch.rejected_logratios > 50
            ).any()


# --- Soft labels


@pytest.mark.parametrize("name", sorted(set(LOSS_NAMES) - set(IMITATION)))
def test_certain_labels_give_the_plain_loss_bit_for_bit(name):
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        sides = -200 * torch.rand(4, 300, generator=draw, dtype=dtype) ** 3
        counts = torch.randint(1, 99, (2, 300), generator=draw)
        leaves = [side.requires_grad_() for side in sides[:2].clone()]
        batch = PairBatch(*leaves, *sides[2:], *counts, torch.ones(300), -sides[0], 50.0)
        plain = of(name, batch, replace(SETTINGS, soft_labels="ignore"))
        gradients = torch.autograd.grad(plain.sum(), leaves)
        for mode in MODES:
            soft = of(name, batch, replace(SETTINGS, soft_labels=mode))
            assert torch.equal(soft, plain), mode
            for one, other in zip(torch.autograd.grad(soft.sum(), leaves), gradients, strict=True):
                assert torch.equal(one, other), mode


def test_a_certain_label_never_meets_the_other_outcome_where_it_is_infinite():
    def exponential(c, r):
        return torch.exp(r - c)

    ahead, behind, sure = tensor(800.0).requires_grad_(), tensor(0.0), tensor(1.0)
    for loss in (
        soft_label_loss(exponential, ahead, behind, sure, "expected"),
        soft_label_loss(exponential, ahead, behind, sure, "robust"),
        module.tie_aware_loss(exponential, torch.sub, ahead, behind, sure),
    ):
        assert loss.item() == 0
        assert torch.autograd.grad(loss.sum(), ahead)[0].item() == 0


def test_expected_dpo_is_conservative_dpo_pair_by_pair():
    batch = pairs(p=(0.9, 0.9))
    torch.testing.assert_close(of("sigmoid", batch), of("cdpo", pairs()))  # smoothing 0.1
    # by hand: margin 1.5, -(0.7 ln s(1.5) + 0.3 ln s(-1.5)) = 0.2014133 + 0.3 * 1.5
    assert of("sigmoid", pairs(p=(0.7, 0.7)))[0].item() == pytest.approx(0.6514132780)


def test_robust_labels_are_robust_dpo_pair_by_pair():
    config = replace(SETTINGS, soft_labels="robust")
    torch.testing.assert_close(of("sigmoid", pairs(p=(0.9, 0.9)), config), of("robust", pairs()))


@quick
@given(batches(p=st.floats(0.55, 1)))
def test_the_robust_estimate_is_unbiased(batch):
    """Over labels that are right with probability p its mean is the loss of the right label."""
    robust = replace(SETTINGS, soft_labels="robust")
    p = batch.p_chosen
    for name in set(SOFT) - {"orpo", "gdpo", *TIE_AWARE}:
        kept = of(name, batch, robust)
        flipped = of(name, batch.swapped()._replace(p_chosen=p), robust)
        plain = of(name, batch, replace(robust, soft_labels="ignore"))
        torch.testing.assert_close(
            p * kept + (1 - p) * flipped, plain, rtol=1e-6, atol=1e-6, msg=name
        )


def test_geometric_labels_scale_the_margin():
    geometric = replace(SETTINGS, soft_labels="geometric")
    batch = pairs(p=(0.75, 0.75))  # the margin of 1.5 becomes 0.75
    expected = math.log(1 + math.exp(-0.75))
    assert of("sigmoid", batch, geometric)[0].item() == pytest.approx(expected)
    assert torch.equal(of("gdpo", batch), of("sigmoid", batch, geometric))
    assert torch.equal(
        of("gdpo", batch, replace(SETTINGS, soft_labels="robust")), of("gdpo", batch)
    )
    assert of("hinge", batch, geometric)[0].item() == pytest.approx(0.25)
    assert of("ipo", batch, geometric)[0].item() == pytest.approx((0.5 * 0.7 - 1) ** 2)


def margin_gradient(name, p, config, chosen=-6.0):
    batch = pairs(chosen=(chosen, -4.0), p=(p, 1.0))
    logps = batch.chosen_logps.requires_grad_()
    return torch.autograd.grad(of(name, batch, config)[0], logps)[0][0].item()


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "sigmoid_norm", "exo_pair", *TIE_AWARE])
def test_a_tie_pulls_the_margin_to_zero(name):
    # The reference gives the rejected answer a log-ratio of -1; the chosen one's is chosen + 8.
    pull_down = margin_gradient(name, 0.5, SETTINGS, chosen=-5.0)
    pull_up = margin_gradient(name, 0.5, SETTINGS, chosen=-16.0)
    assert pull_down > 0 > pull_up
    even = -9.0 if name != "sigmoid_norm" else -8.8  # the mean log-ratio of -1/5 over 4 tokens
    assert margin_gradient(name, 0.5, SETTINGS, chosen=even) == pytest.approx(0, abs=1e-12)


def test_a_geometric_tie_teaches_nothing():
    config = replace(SETTINGS, soft_labels="geometric")
    for name in ("sigmoid", "hinge", "ipo", "discopop", "sigmoid_norm", "simpo"):
        assert margin_gradient(name, 0.5, config) == 0, name


@pytest.mark.parametrize("name", TIE_AWARE)
def test_tie_aware_losses_read_p_as_a_mixture(name):
    nu = {"rao_kupper": 3.0, "davidson": 1.0}[name]
    batch = pairs(p=(0.5, 0.8))
    c, r = batch.chosen_logratios, batch.rejected_logratios
    win = getattr(module, f"{name}_loss")(c, r, beta=0.5, nu=nu)
    tie = getattr(module, f"{name}_tie_loss")(c, r, beta=0.5, nu=nu)
    loss = of(name, batch)
    assert loss[0].item() == pytest.approx(tie[0].item())
    assert loss[1].item() == pytest.approx((0.6 * win[1] + 0.4 * tie[1]).item())
    certainly_lost = of(name, pairs(p=(0.0, 0.0)))
    torch.testing.assert_close(
        certainly_lost, of(name, pairs().swapped()._replace(p_chosen=c * 0 + 1))
    )


def test_ties_by_hand():
    zero = tensor(0.0)
    # Rao-Kupper at nu = 3: 8 / 16; Davidson at nu = 1: 2 / (1 + 1 + 2). Both one half.
    for tie, nu in ((module.rao_kupper_tie_loss, 3.0), (module.davidson_tie_loss, 1.0)):
        assert tie(zero, zero, beta=1.0, nu=nu).item() == pytest.approx(LN2)
    # ln 4 ahead: strengths 4 and 1. Rao-Kupper nu = 2: 3 * 4 / ((4 + 2) (1 + 8)) = 2/9.
    ahead = tensor(math.log(4))
    loss = module.rao_kupper_tie_loss(ahead, zero, beta=1.0, nu=2.0).item()
    assert loss == pytest.approx(math.log(9 / 2))
    # Davidson nu = 1: 2 sqrt 4 / (4 + 1 + 2 sqrt 4) = 4/9.
    loss = module.davidson_tie_loss(ahead, zero, beta=1.0, nu=1.0).item()
    assert loss == pytest.approx(math.log(9 / 4))


def test_imitation_is_not_a_preference_and_reads_no_probability():
    for name in IMITATION:
        for mode in MODES:
            config = replace(SETTINGS, soft_labels=mode)
            assert torch.equal(of(name, pairs(p=(0.3, 0.5)), config), of(name, pairs()))


def test_ignored_probabilities_change_nothing():
    config = replace(SETTINGS, soft_labels="ignore")
    for name in LOSS_NAMES:
        assert torch.equal(of(name, pairs(p=(0.3, 0.5)), config), of(name, pairs(), config)), name


def test_sorting_losses_refuse_soft_labels():
    for name in SORTING:
        with pytest.raises(ValueError, match=f"{name} sorts the batch"):
            of(name, pairs(p=(1.0, 0.9)))


def test_robust_labels_refuse_ties_and_name_the_rows():
    config = replace(SETTINGS, soft_labels="robust")
    with pytest.raises(ValueError, match=r"p above 0.5, but rows \[1\] have \[0.5\]"):
        of("sigmoid", pairs(p=(0.8, 0.5)), config)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_what_is_no_probability_becomes_nan_and_spoils_its_own_row_only(p):
    for name in SOFT:
        loss = of(name, pairs(p=(p, 1.0)))
        assert loss.isnan().tolist() == [True, False], name


# --- Extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_huge_margins_keep_losses_and_gradients_finite(name, dtype):
    for p in (1.0,) if name in SORTING else (1.0, 0.7):
        for sign in (1, -1):
            batch = pairs(chosen=(-2e4 + 1e4 * sign,) * 2, rejected=(-2e4 - 1e4 * sign,) * 2,
                          ref_chosen=(-2e4,) * 2, ref_rejected=(-2e4,) * 2, p=(p, p),
                          lengths=((1, 9), (1, 9)), dtype=dtype)  # fmt: skip
            leaves = [batch.chosen_logps.requires_grad_(), batch.rejected_logps.requires_grad_()]
            loss = of(name, batch._replace(chosen_nll=-batch.chosen_logps))
            assert loss.dtype == dtype
            assert loss.isfinite().all()
            gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
            assert all(g.isfinite().all() for g in gradients if g is not None)


@pytest.mark.parametrize("name", ["exo_pair", "discopop", "orpo", *TIE_AWARE, "dpop", "sppo_hard"])
def test_gradients_are_the_slopes_of_the_losses(name):
    """Those whose gradient an implementation could get wrong: written for stability, or cut."""
    for batch in (pairs(p=(0.7, 0.9)), pairs(ref_chosen=(-5.5, -9.0), p=(0.7, 0.9))):
        assert torch.autograd.gradcheck(
            lambda c, r, batch=batch: of(name, batch._replace(chosen_logps=c, rejected_logps=r)),
            [side.clone().requires_grad_() for side in batch[:2]],
        )


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_float32_agrees_with_float64(name):
    wide, narrow = of(name, pairs()), of(name, pairs(dtype=torch.float32))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=2e-6, atol=1e-6)


def test_orpo_at_probability_1_and_0():
    logps = tensor(0.0, -1e4, -1e-12).requires_grad_()
    loss = module.odds_ratio_loss(logps, tensor(-1.0, -1.0, -1.0))
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), logps)[0].isfinite().all()
    assert loss[1].item() == pytest.approx(1e4 + _ODDS_L)


def test_answers_without_tokens_do_not_divide_by_zero():
    batch = pairs(lengths=((0, 2), (0, 3)))._replace(mean_chosen_length=1.0)
    for name in LOSS_NAMES:
        assert of(name, batch).isfinite().all(), name


# --- The entry point


def test_the_total_is_the_weighted_sum():
    batch = pairs(p=(0.9, 1.0))
    total = pair_losses(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], batch, SETTINGS)
    expected = 0.8 * of("sigmoid", batch) + 0.2 * of("bco_pair", batch) + of("sft", batch)
    torch.testing.assert_close(total, expected)
    one = pair_losses(["ipo", "nll"], None, batch, SETTINGS)
    torch.testing.assert_close(one, of("ipo", batch) + of("nll", batch))
    assert torch.equal(pair_losses(["hinge"], None, batch, SETTINGS), of("hinge", batch))


@quick
@given(batches())
def test_sft_is_the_token_mean_for_any_split(batch):
    whole = of("sft", batch).mean()
    tokens = -batch.chosen_logps.sum() / batch.chosen_lengths.sum()
    torch.testing.assert_close(whole, tokens)
    parts = [
        PairBatch(*(f[i : i + 1] if isinstance(f, torch.Tensor) else f for f in batch))
        for i in range(3)
    ]
    torch.testing.assert_close(sum(of("sft", part).sum() for part in parts) / 3, tokens)


def test_all_problems_are_reported_at_once():
    config = LossSettings(beta=-1.0, f_divergence="js_divergence", rao_kupper_nu=1.0)
    names = ["sigmod", "exo_pair", "nca_pair", "rao_kupper", "aot"]
    with pytest.raises(ValueError, match="unknown") as error:
        check_losses(names, [1.0, math.inf], config, weighted_pairs=True)
    assert str(error.value).split("\n") == [
        "each loss needs one weight, got 2 weights for 5 losses",
        "unknown loss 'sigmod': try sigmoid, simpo, sigmoid_norm",
        "weights must be finite, got inf",
        "beta must be positive, got -1.0",
        "label_smoothing of exo_pair must be in (0, 1), as 0.001, got 0.0",
        "nca_pair supports no f_divergence but reverse_kl",
        "rao_kupper_nu must be above 1, got 1.0",
        "aot supports no f_divergence but reverse_kl",
        "aot sorts the batch, so pairs cannot be weighted",
    ]


@pytest.mark.parametrize(
    ("names", "change", "problem"),
    [
        ([], {}, "at least one loss"),
        (["robust"], {"label_smoothing": 0.5}, r"in \[0, 0.5\), got 0.5"),
        (["cdpo"], {"label_smoothing": -0.1}, r"in \[0, 1\], got -0.1"),
        (["aot"], {"label_smoothing": 1.1}, r"in \[0, 1\], got 1.1"),
        (["discopop"], {"discopop_tau": 0.0}, "discopop_tau must be positive"),
        (["dpop"], {"dpop_lambda": -1.0}, "dpop_lambda must not be negative"),
        (["davidson"], {"davidson_nu": 0.0}, "davidson_nu must be positive"),
        (["rdpo"], {"beta": 0.0}, "beta must be positive"),
        (["apo_zero"], {"beta": math.nan}, "beta must be positive"),
        (["sigmoid"], {"f_divergence": "tv"}, "f_divergence must be one of"),
        (["sigmoid"], {"soft_labels": "hard"}, "soft_labels must be one of"),
        (["simpo"], {"f_divergence": "forward_kl"}, "simpo supports no f_divergence"),
    ],
    ids=str,
)
def test_each_problem_is_found_before_training(names, change, problem):
    with pytest.raises(ValueError, match=problem):
        check_losses(names, None, replace(LossSettings(), **change))


def test_every_loss_passes_with_ordinary_settings():
    for name in LOSS_NAMES:
        check_losses([name], [0.5], SETTINGS)
    check_losses(["sigmoid", "sft"], None, LossSettings(f_divergence="forward_kl"))
    check_losses(["sigmoid"], None, LossSettings(rao_kupper_nu=0.5))  # which it does not read


def test_the_entry_point_raises_on_what_it_meets():
    with pytest.raises(ValueError, match=r"unknown loss 'dop': try dpop$"):
        pair_losses(["dop"], None, pairs(), SETTINGS)
    with pytest.raises(ValueError, match="got 1 weights for 2 losses"):
        pair_losses(["sigmoid", "sft"], [1.0], pairs(), SETTINGS)
    short = pairs()._replace(
        rejected_logps=tensor(-1.0, -1.0, -1.0), ref_rejected_logps=tensor(-1.0)
    )
    with pytest.raises(ValueError, match=r"shapes must agree, got .*\(2,\).*\(3,\)"):
        pair_losses(["sigmoid"], None, short, SETTINGS)
    with pytest.raises(ValueError, match="f_divergence must be one of"):
        f_divergence_scores(tensor(0.0), "tv")
    with pytest.raises(ValueError, match="soft_labels must be one of"):
        soft_label_loss(torch.sub, tensor(0.0), tensor(0.0), tensor(1.0), "hard")


def test_public_names_exist_and_every_loss_has_its_function():
    for name in module.__all__:
        assert getattr(module, name) is not None
    for name in LOSS_NAMES:
        assert f"{name}_loss" in module.__all__


# The functions that the registry composes from others say the same as the registry.
def test_functions_with_arguments_of_their_own_agree_with_the_registry():
    batch = pairs(p=(0.8, 0.6))
    c, r, lengths = batch.chosen_logratios, batch.rejected_logratios, batch[4:6]
    hard = pairs()
    torch.testing.assert_close(module.gdpo_loss(c, r, batch.p_chosen, beta=0.5), of("gdpo", batch))
    torch.testing.assert_close(
        module.rdpo_loss(c, r, *lengths, beta=0.5, alpha=0.01), of("rdpo", hard)
    )
    torch.testing.assert_close(
        module.orpo_loss(
            batch.chosen_logps / lengths[0], batch.rejected_logps / lengths[1],
            batch.chosen_nll / lengths[0], orpo_lambda=0.1,
        ),
        of("orpo", hard),
    )  # fmt: skip


# --- Groups


def test_plackett_luce_by_hand():
    # Strengths 3, 2, 1: 3/6 * 2/3 * 1 = 1/3. The second group: 1/3 * 2/2.
    rewards = tensor([math.log(3), math.log(2), 0.0], [0.0, math.log(2), 7.0])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    expected = [math.log(3), math.log(3)]
    assert plackett_luce_loss(rewards, mask).tolist() == pytest.approx(expected)


@quick
@given(batches())
def test_plackett_luce_of_two_is_dpo(batch):
    rewards = 0.5 * torch.stack((batch.chosen_logratios, batch.rejected_logratios), dim=1)
    loss = plackett_luce_loss(rewards, torch.ones(3, 2, dtype=torch.bool))
    dpo = sigmoid_loss(batch.chosen_logratios, batch.rejected_logratios, beta=0.5)
    torch.testing.assert_close(loss, dpo)


@quick
@given(st.lists(st.floats(-20, 20), min_size=4, max_size=4))
def test_all_rankings_of_a_group_have_probabilities_that_sum_to_1(values):
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    orders = orders[(orders.sort(dim=1).values == torch.arange(4)).all(dim=1)]
    assert len(orders) == 24
    losses = plackett_luce_loss(tensor(*values)[orders], torch.ones(24, 4, dtype=torch.bool))
    assert torch.exp(-losses).sum().item() == pytest.approx(1)


def group_losses(rewards, scores, mask):
    return {
        "plackett_luce": plackett_luce_loss(rewards, mask),
        "infonca": infonca_loss(rewards, scores, mask, temperature=0.7),
        "nca": nca_loss(rewards, scores, mask, temperature=0.7),
    }


@quick
@given(st.lists(st.floats(-30, 30), min_size=3, max_size=3), st.floats(-1e4, 1e4))
def test_padding_in_any_place_changes_nothing(values, padding):
    rewards, scores = tensor(values), tensor([3.0, 1.0, 2.0])
    plain = group_losses(rewards, scores, torch.ones(1, 3, dtype=torch.bool))
    for places in ([0, 1, 2], [1, 2, 4], [0, 3, 4]):
        wide = [torch.full((1, 5), padding, dtype=torch.float64) for _ in range(2)]
        mask = torch.zeros(1, 5, dtype=torch.bool)
        wide[0][:, places], wide[1][:, places], mask[:, places] = rewards, scores, True
        leaf = wide[0].requires_grad_()
        for name, loss in group_losses(leaf, wide[1], mask).items():
            torch.testing.assert_close(loss, plain[name], msg=name)
            gradient = torch.autograd.grad(loss.sum(), leaf)[0]
            assert gradient.isfinite().all()
            assert (gradient[~mask] == 0).all()


def test_infonca_by_hand():
    # targets 3/4, 1/4 (scores ln 3, 0); policy 1/2, 1/2 and 2/3, 1/3.
    scores = tensor([math.log(3), 0.0]).repeat(2, 1)
    rewards = tensor([0.0, 0.0], [LN2, 0.0])
    mask = torch.ones(2, 2, dtype=torch.bool)
    expected = [LN2, -0.75 * math.log(2 / 3) - 0.25 * math.log(1 / 3)]
    assert infonca_loss(rewards, scores, mask).tolist() == pytest.approx(expected)
    # twice the temperature: targets sqrt 3 : 1
    share = math.sqrt(3) / (math.sqrt(3) + 1)
    expected = -share * math.log(2 / 3) - (1 - share) * math.log(1 / 3)
    assert infonca_loss(rewards, scores, mask, temperature=2.0)[1].item() == pytest.approx(expected)


def test_groups_of_two_with_one_clear_best_are_the_pairwise_losses():
    batch = pairs()
    rewards = 0.5 * torch.stack((batch.chosen_logratios, batch.rejected_logratios), dim=1)
    scores, mask = tensor([1.0, 0.0]).repeat(2, 1), torch.ones(2, 2, dtype=torch.bool)
    infonca = infonca_loss(rewards, scores, mask, temperature=1e-3)
    torch.testing.assert_close(infonca, of("sigmoid", batch))
    torch.testing.assert_close(
        nca_loss(rewards, scores, mask, temperature=1e-3), of("nca_pair", batch)
    )


def test_infonca_is_smallest_where_the_policy_has_the_targets():
    scores = tensor([2.0, 0.5, -1.0])
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = (scores / 0.5 + 3.0).requires_grad_()  # a shift of all rewards is free
    gradient = torch.autograd.grad(infonca_loss(rewards, scores, mask, temperature=0.5), rewards)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_groups_of_one_or_no_answer():
    rewards, scores = tensor([0.4, 9.0], [9.0, 9.0]), tensor([1.0, 9.0], [9.0, 9.0])
    mask = torch.tensor([[True, False], [False, False]])
    losses = group_losses(rewards, scores, mask)
    assert losses["plackett_luce"].tolist() == [0, 0]
    assert losses["infonca"].tolist() == [0, 0]
    one = -math.log(logistic(0.4)) - math.log(logistic(-0.4))
    assert losses["nca"].tolist() == pytest.approx([one, 0])


def test_groups_survive_huge_rewards():
    for dtype in (torch.float32, torch.float64):
        rewards = torch.tensor([[-1e4, 0.0, 1e4, 5.0]], dtype=dtype, requires_grad=True)
        mask = torch.tensor([[True, True, True, False]])
        for name, loss in group_losses(rewards, rewards.detach(), mask).items():
            assert loss.isfinite().all(), name
            assert torch.autograd.grad(loss.sum(), rewards)[0].isfinite().all(), name


def test_groups_refuse_what_they_cannot_read():
    rewards, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"rewards must be \(G, K\), got \(3,\)"):
        plackett_luce_loss(torch.zeros(3), mask[0])
    with pytest.raises(ValueError, match=r"mask must be bool, got torch\.float32"):
        plackett_luce_loss(rewards, mask.float())
    with pytest.raises(ValueError, match="shapes must agree"):
        infonca_loss(rewards, torch.zeros(2, 2), mask)
    with pytest.raises(ValueError, match="temperature must be positive"):
        nca_loss(rewards, rewards, mask, temperature=0.0)


# --- Weights


def test_wpo_weights_by_hand_and_without_gradient():
    # Two tokens of probability 1/2 under a uniform choice of two: log p - log sum p^2 = 0 each.
    # Second answer: p = 0.1 where sum p^2 = 0.4, over one token: 0.25. Third: no tokens.
    aligned = tensor(0.0, math.log(0.1 / 0.4), 0.0).requires_grad_()
    weights = wpo_weights(aligned, torch.tensor([2, 1, 0]))
    assert weights.tolist() == pytest.approx([1.0, 0.25, 1.0])
    assert not weights.requires_grad
    # The mean over tokens: ln 0.25 over two tokens is a weight of one half.
    assert wpo_weights(tensor(math.log(0.25)), torch.tensor([2])).item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="shapes must agree"):
        wpo_weights(aligned, torch.tensor([2, 1]))
