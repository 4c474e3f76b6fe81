"""The comparison with AlpacaEval, on a made-up copy of its repository."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from benchmarks import quality_length_control as script

N = 805
MODELS = ("vicuna-13b-v1.5", "vicuna-7b-v1.5", "other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models judged at random, and what AlpacaEval's regression would have published of them."""
    root = tmp_path_factory.mktemp("alpaca")
    rng = np.random.default_rng(0)
    lengths = {
        name: rng.integers(200, 2000, N)
        for name in (script.BASELINE, f"{script.BASELINE}_verbose", f"{script.BASELINE}_concise")
    }
    for name, counts in lengths.items():
        path = root / "results" / name / "model_outputs.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([{"output": "x" * int(n)} for n in counts]))
    difficulty = rng.normal(size=N)
    gamed = np.column_stack([np.zeros(2 * N), script.anchor_lengths(root), np.tile(difficulty, 2)])
    gamed_scores = rng.random(2 * N)
    weights, board = [], []
    for i, name in enumerate(MODELS):
        base, own = rng.integers(200, 2000, N), rng.integers(100, 1500, N)
        scaled = np.tanh((own - base) / np.std(own - base, ddof=1))
        rows = np.column_stack([np.ones(N), scaled, difficulty])
        y = np.round(expit(rows @ [i - 1, 1, 1] + rng.normal(size=N)), 6)
        x, t = np.vstack([rows, gamed]), np.concatenate([y, gamed_scores])
        w = np.concatenate([np.ones(N), np.full(2 * N, 0.1)])

        def loss(b, x=x, t=t, w=w):
            return w @ (np.logaddexp(0, x @ b) - t * (x @ b)) / N

        def slope(b, x=x, t=t, w=w):
            return x.T @ (w * (expit(x @ b) - t)) / N

        m, c, e = minimize(loss, np.zeros(3), jac=slope, options={"gtol": 1e-10}).x
        p = expit(m + e * difficulty)
        rows = [
            {"output_1": "x" * int(k), "output_2": "y" * int(n), "preference": 1 + s,
             "glm_preference": q}
            for k, n, s, q in zip(base, own, y.tolist(), p.tolist(), strict=True)
        ]  # fmt: skip
        path = root / "results" / name / script.JUDGE / script.JUDGE / "annotations.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
        (path.parents[1] / "annotations.json").write_text(json.dumps(rows))
        weights.append(dict(zip(["", *script.EFFECTS], [name, m, -c, e], strict=True)))
        board.append(
            {"": name, "win_rate": 100 * y.mean(), "length_controlled_winrate": 100 * p.mean()}
        )
    board.append({"": "never judged", "win_rate": 50, "length_controlled_winrate": 50})
    for name, table in ((script.WEIGHTS, weights), (script.LEADERBOARD, board)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    return root


def test_published_figures_are_met_with_anchors_solved_from_one_model(
    folder, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("PREFOPT_ALPACA_EVAL", str(folder))
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    script.main()
    found = json.loads((tmp_path / "quality_length_control.json").read_text())
    assert set(found["models"]) == set(MODELS)
    assert found["skipped"]["judgements not in the folder"] == 1
    for row in found["models"].values():
        assert row["prefopt"] == pytest.approx(row["published"], abs=0.01)
        assert row["win_rate"] == pytest.approx(row["win_rate_published"])
        assert row["low"] < row["prefopt"] < row["high"]
    assert "| length-controlled, fitted by prefopt | 2 |" in capsys.readouterr().out


def test_without_the_folder_it_says_what_is_missing(monkeypatch) -> None:
    monkeypatch.delenv("PREFOPT_ALPACA_EVAL", raising=False)
    with pytest.raises(SystemExit, match="PREFOPT_ALPACA_EVAL"):
        script.main()
