"""Rankings: by hand, by symmetry, where strengths are infinite, and on simulated judges."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from prefopt.evaluation.ranking import ELO_PER_LOGIT, Ranking, rank_models
from prefopt.evaluation.win_rate import win_rate
from prefopt.types import JudgedComparison
from tests.evaluation.judgements import exchanged, scored


def record(a: str, b: str, wins: int, ties: int, losses: int, first: int = 0) -> list:
    scores = [1.0] * wins + [0.5] * ties + [0.0] * losses
    return [scored(s, prompt=str(first + i), a=a, b=b) for i, s in enumerate(scores)]


def test_two_models_are_as_far_apart_as_their_win_rate() -> None:
    rows = record("x", "y", 60, 20, 20)
    found = rank_models(rows)
    assert [m.model for m in found.models] == ["x", "y"]
    pair = found.win_rate_of("x", "y")
    assert pair.win_rate == pytest.approx(win_rate(rows).win_rate, abs=1e-4)
    assert found.models[0].strength == pytest.approx(logit(0.7) / 2, abs=1e-3)
    assert found.models[1].strength == pytest.approx(-logit(0.7) / 2, abs=1e-3)
    # The variance of the scores is 0.6 + 0.05 - 0.49 = 0.16; the error is in logits.
    error = math.sqrt(0.16 / 99) / 0.21
    assert logit(pair.high) - logit(pair.win_rate) == pytest.approx(1.984 * error, rel=1e-2)
    best = found.models[0]
    assert (best.n, best.wins, best.ties, best.losses) == (100, 60, 20, 20)
    assert (best.rank_low, best.rank_high) == (1, 1)
    assert pytest.approx(173.7, abs=0.1) == ELO_PER_LOGIT


def test_strengths_reproduce_every_models_share_of_points() -> None:
    """The equation of maximum likelihood (Zermelo 1929): points won = sum of expected points."""
    rows = [
        *record("x", "y", 7, 2, 1),
        *record("y", "z", 5, 0, 5, 20),
        *record("z", "x", 3, 1, 6, 40),
    ]
    found = rank_models(rows)
    strength = {m.model: m.strength for m in found.models}
    for m in found.models:
        expected = sum(
            10 * expit(strength[m.model] - strength[other])
            for other in strength
            if other != m.model
        )
        assert m.wins + m.ties / 2 == pytest.approx(expected, abs=0.02)
    assert sum(strength.values()) == pytest.approx(0, abs=1e-9)


def test_the_american_league_of_1987() -> None:
    """Agresti 2002, "Categorical Data Analysis", section 10.6: strengths with Baltimore at 0."""
    teams = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
    wins = [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ]
    rows = [
        scored(1.0, prompt=f"{i} {j} {k}", a=teams[i], b=teams[j])
        for i, row in enumerate(wins)
        for j, count in enumerate(row)
        for k in range(count)
    ]
    found = rank_models(rows)
    strength = {m.model: m.strength for m in found.models}
    apart = [strength[team] - strength["Baltimore"] for team in teams]
    assert apart == pytest.approx([1.581, 1.436, 1.294, 1.248, 1.108, 0.684, 0], abs=4e-3)
    assert [m.model for m in found.models] == list(teams)
    last = found.models[-1]
    assert (last.rank_low, last.rank_high) == (7, 7)  # 0.684 with an error of 0.337, published


def test_models_never_compared_directly_are_ranked_through_others() -> None:
    rows = [*record("x", "y", 70, 0, 30), *record("y", "z", 70, 0, 30, 200)]
    pair = rank_models(rows).win_rate_of("x", "z")
    assert pair.n == 0
    assert pair.win_rate == pytest.approx(expit(2 * logit(0.7)), abs=2e-3)
    direct = rank_models(rows).win_rate_of("x", "y")
    assert logit(pair.high) - logit(pair.low) > logit(direct.high) - logit(direct.low)


def test_models_without_a_link_are_refused() -> None:
    rows = [*record("x", "y", 3, 0, 3), *record("u", "v", 3, 0, 3)]
    with pytest.raises(ValueError, match=r"u, v; x, y|x, y; u, v"):
        rank_models(rows)


def test_unbeaten_models_are_named() -> None:
    rows = [
        *record("best", "x", 20, 0, 0),
        *record("x", "y", 12, 0, 8, 50),
        *record("y", "best", 0, 0, 9),
    ]
    found = rank_models(rows)
    assert {m.model: m.unbounded for m in found.models} == {"best": True, "x": False, "y": False}
    assert "best" in found.notes[0]
    assert found.models[0].model == "best"
    both = rank_models(record("x", "y", 5, 0, 0))
    assert all(m.unbounded for m in both.models)
    assert not any(m.unbounded for m in rank_models(record("x", "y", 5, 1, 0)).models)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="against itself"):
        rank_models(record("x", "x", 1, 0, 1))
    with pytest.raises(ValueError, match="got \\['emoji'\\]"):
        rank_models(record("x", "y", 1, 0, 1), control=["emoji"])
    with pytest.raises(ValueError, match="at least one"):
        rank_models([])
    with pytest.raises(KeyError, match="no pair"):
        rank_models(record("x", "y", 1, 0, 1)).win_rate_of("x", "z")


def test_failed_verdicts_are_counted() -> None:
    found = rank_models([*record("x", "y", 5, 0, 5), scored(None, prompt="z", a="x", b="y")])
    assert (found.n, found.n_unscored, found.unscored_reasons) == (10, 1, {"refused": 1})


def test_answers_of_one_prompt_share_its_vote() -> None:
    rows = record("x", "y", 6, 0, 4)
    again = [scored(1.0, prompt="0", a="x", b="y", index=i) for i in range(1, 30)]
    one, many = rank_models(rows), rank_models(rows + again)
    assert many.win_rate_of("x", "y").win_rate == pytest.approx(one.win_rate_of("x", "y").win_rate)
    assert many.win_rate_of("x", "y").low == pytest.approx(one.win_rate_of("x", "y").low)


def test_style_control_takes_length_out() -> None:
    """x answers at length and wins by that alone: at equal length there is nothing between them."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(600):
        a, b = rng.integers(5, 60), rng.integers(1, 40)
        p = expit(4 * (a - b) / (a + b))
        rows.append(
            scored(float(rng.random() < p), prompt=str(i), a="x", b="y",
                   text_a="w " * a, text_b="w " * b)
        )  # fmt: skip
    plain, held = rank_models(rows), rank_models(rows, control=["length", "bold"])
    assert plain.win_rate_of("x", "y").low > 0.6
    pair = held.win_rate_of("x", "y")
    assert pair.low < 0.5 < pair.high
    (effect,) = held.style
    assert effect.feature == "length"
    assert effect.low / effect.deviation < 4 < effect.high / effect.deviation
    assert "bold" in held.notes[0]
    assert held.controlled == ("length", "bold")


def test_a_ranking_can_be_written_and_read() -> None:
    found = rank_models(record("x", "y", 5, 1, 2))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Ranking) == found


_ROWS = st.lists(
    st.tuples(
        st.sampled_from([1.0, 0.5, 0.0]),
        st.sampled_from([("x", "y"), ("y", "z"), ("z", "x"), ("y", "x")]),
        st.integers(0, 6),
    ),
    min_size=1,
    max_size=20,
).map(lambda rows: [scored(s, prompt=str(p), a=a, b=b) for s, (a, b), p in rows])


@settings(max_examples=40, deadline=None)
@given(_ROWS)
def test_which_answer_is_called_a_does_not_matter(rows: list[JudgedComparison]) -> None:
    found = rank_models(rows)
    mirror = rank_models([exchanged(row) for row in rows])
    for one, other in zip(found.models, mirror.models, strict=True):
        assert one.strength == pytest.approx(other.strength, abs=1e-5)
        assert one.low <= one.strength <= one.high
        assert 1 <= one.rank_low <= one.rank_high <= len(found.models)
        assert one.wins + one.ties + one.losses == one.n
    assert sum(m.n for m in found.models) == 2 * found.n
    for pair in found.pairs:
        assert 0 <= pair.low <= pair.win_rate <= pair.high <= 1
        back = found.win_rate_of(pair.b, pair.a)
        assert (back.win_rate, back.low) == (1 - pair.win_rate, 1 - pair.high)


def _coverage(runs: int) -> float:
    rng = np.random.default_rng(0)
    strength = {"x": 0.5, "y": 0.0, "z": -0.5}
    hits = []
    for _ in range(runs):
        rows = []
        for i in range(60):
            for a, b in (("x", "y"), ("y", "z")):
                p = expit(strength[a] - strength[b])
                rows.append(scored(float(rng.random() < p), prompt=str(i), a=a, b=b))
        for pair in rank_models(rows).pairs:
            hits.append(pair.low <= expit(strength[pair.a] - strength[pair.b]) <= pair.high)
    return float(np.mean(hits))


def test_pairwise_intervals_hold_the_truth() -> None:
    assert _coverage(40) > 0.89


@pytest.mark.slow
def test_pairwise_intervals_hold_the_truth_as_often_as_they_say() -> None:
    assert 0.935 < _coverage(500) < 0.965
