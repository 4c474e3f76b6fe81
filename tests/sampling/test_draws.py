"""Draws: transformers' warpers and the inverse of the distribution function, to the token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefopt.errors import ModelError
from prefopt.sampling.draws import draw_tokens


def warped(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The probabilities that `generate` would draw from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, logits.clone()).softmax(-1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_tokens=st.sampled_from([2, 7, 300, 2_000]),
    spread=st.sampled_from([0.1, 2.0, 8.0]),  # flat ones keep more tokens than are looked at first
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 10_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_draws_are_those_of_transformers_warpers(seed, n_tokens, spread, **how):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, n_tokens, generator=generator) * spread
    uniforms = torch.rand(6, generator=generator, dtype=torch.float64)
    expected = warped(logits, **how).double()
    drawn = draw_tokens(logits, uniforms, **how)
    sums = expected.cumsum(-1)
    below = sums.gather(-1, drawn[:, None])[:, 0]
    above = below - expected.gather(-1, drawn[:, None])[:, 0]
    assert (expected.gather(-1, drawn[:, None]) > 0).all()
    # Rounding moves a boundary by some millionths, a token's width is the rest.
    assert ((above - 1e-5 <= uniforms) & (uniforms <= below + 1e-5)).all()


@pytest.mark.parametrize(
    "how", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.5, "top_p": 0.9}]
)
def test_frequencies_are_the_probabilities(how):
    logits = torch.linspace(-2, 2, 12)[
        torch.randperm(12, generator=torch.Generator().manual_seed(1))
    ]
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw_tokens(logits.expand(20_000, -1), uniforms, **how)
    expected = warped(logits[None], **how)[0].double()
    counts = torch.bincount(drawn, minlength=12)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    shares = expected[possible] / expected[possible].sum()
    assert chisquare(counts[possible].numpy(), (shares * 20_000).numpy()).pvalue > 1e-3


def test_temperature_zero_takes_the_largest():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 0.0]])
    assert draw_tokens(logits, torch.empty(0), temperature=0).tolist() == [1, 0]


@pytest.mark.parametrize("how", [{}, {"top_k": 3}, {"top_p": 0.99}])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_tokens_that_can_be_drawn(how, u):
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [10, 20]] = 0.0
    expected = 10 if u == 0 else 20
    assert draw_tokens(logits, torch.tensor([u], dtype=torch.float64), **how).tolist() == [expected]


@pytest.mark.parametrize("n_tokens", [511, 512, 513, 5_000])
def test_large_vocabularies_are_drawn_from_by_blocks(n_tokens):
    """Every token of a large vocabulary comes up where its own part of the interval lies."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(n_tokens, generator=generator, dtype=torch.float64)
    p[::7] = 0
    p /= p.sum()
    tokens = p.nonzero()[:, 0]
    uniforms = (p.cumsum(0) - p / 2)[tokens]  # the middle of each
    logits = p.log().float().expand(len(tokens), -1)
    assert torch.equal(draw_tokens(logits, uniforms), tokens)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_logits_that_are_no_numbers_are_told(bad, how):
    logits = torch.zeros(2, 50)
    logits[1, 3] = bad
    with pytest.raises(ModelError, match="not numbers"):
        draw_tokens(logits, torch.zeros(2, dtype=torch.float64), **how)
