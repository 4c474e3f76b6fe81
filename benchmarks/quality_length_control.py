"""prefopt's length-controlled win rates against AlpacaEval 2's published ones, model by model.

    git clone https://github.com/tatsu-lab/alpaca_eval
    PREFOPT_ALPACA_EVAL=alpaca_eval python benchmarks/quality_length_control.py    # a minute

Reads AlpacaEval's judgements, answers, published weights and leaderboard from that folder; none of
them is part of this repository. Models whose judgements are not there are skipped and counted.
Writes benchmarks/results/quality_length_control.{json,md}.

Two inputs of AlpacaEval's are not in its repository, and are worked out of what is:
- the difficulty of the 805 instructions, from the regression's predictions for one model
  (`glm_preference`) and that model's published weights: x = (logit p - m) / e. A second model's file
  must give the same.
- the judgements of its two anchors (the baseline told to be verbose and concise). Their answers are
  there, so their lengths are; of their scores the likelihood needs two sums only, and those follow
  from the published weights of ONE model, at which the gradient must vanish. Every other model is
  then a test.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import root
from scipy.special import expit, logit

from prefopt.evaluation.eval_report import installed_versions
from prefopt.evaluation.length_control import (
    Anchors,
    fit_length_control,
    length_imbalance,
    length_notes,
    predicted_win_rate,
)

Floats = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results"
JUDGE = "weighted_alpaca_eval_gpt4_turbo"
BASELINE = "gpt4_1106_preview"
WEIGHTS = f"src/alpaca_eval/metrics/weights/{JUDGE}/length_controlled_v1/baseline_{BASELINE}.csv"
LEADERBOARD = f"src/alpaca_eval/leaderboards/data_AlpacaEval_2/{JUDGE}_leaderboard.csv"
EFFECTS = ("not_gamed_baseline.astype(float)", "np.tanh(std_delta_len)", "instruction_difficulty")
SOLVED_FROM = ("vicuna-13b-v1.5", "vicuna-7b-v1.5")
"""The models whose files hold the regression's predictions; the first gives difficulty and sums."""


class Judged(NamedTuple):
    """One model against the baseline: scores (NaN where AlpacaEval has none), characters more."""

    scores: Floats
    longer_by: Floats


def read_csv(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a CSV file by its first column."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row[""]: row for row in csv.DictReader(file)}


def read_judged(path: Path) -> Judged:
    """AlpacaEval's preferences (1 baseline .. 2 model, 0 a tie) as scores in [0, 1]."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    given = [row["preference"] for row in rows]
    scores = [np.nan if p is None else 0.5 if p == 0 else p - 1 for p in given]
    longer = [len(row["output_2"]) - len(row["output_1"]) for row in rows]
    return Judged(np.array(scores, dtype=np.float64), np.array(longer, dtype=np.float64))


def read_difficulty(folder: Path, weights: dict[str, dict[str, str]], model: str) -> Floats:
    """The difficulty of the instructions, from one model's predictions and weights."""
    path = folder / "results" / model / JUDGE / JUDGE / "annotations.json"
    p = np.array([row["glm_preference"] for row in json.loads(path.read_text(encoding="utf-8"))])
    m, _, e = (float(weights[model][name]) for name in EFFECTS)
    found: Floats = (logit(p) - m) / e
    return found


def anchor_lengths(folder: Path) -> Floats:
    """tanh of the scaled length differences of the verbose and the concise baseline's answers."""
    lengths = {
        name: np.array(
            [
                len(row["output"])
                for row in json.loads(
                    (folder / "results" / name / "model_outputs.json").read_text()
                )
            ]
        )
        for name in (BASELINE, f"{BASELINE}_verbose", f"{BASELINE}_concise")
    }
    parts = []
    for name in (f"{BASELINE}_verbose", f"{BASELINE}_concise"):
        difference = lengths[name] - lengths[BASELINE]
        parts.append(np.tanh(difference / difference.std(ddof=1)))
    return np.concatenate(parts)


def solve_anchors(judged: Judged, effects: Floats, difficulty: Floats, lengths: Floats) -> Anchors:
    """Anchors whose likelihood is that of AlpacaEval's, from one model's published effects.

    At the optimum own gradient + 0.1·(S - X' p) = sign / C, and sign / C is what is left of the model
    effect's gradient, where the anchors play no part. Scores X b with X' expit(X b) = S then have
    the same likelihood as the true ones, up to a constant.
    """
    scaled = np.tanh(judged.longer_by / judged.longer_by.std(ddof=1))
    own = np.column_stack([np.ones(len(scaled)), scaled, difficulty])
    gradient = own.T @ (judged.scores - expit(own @ effects))
    penalty = abs(gradient[0]) * np.sign(effects[1:])
    x = np.column_stack([lengths, np.tile(difficulty, 2)])
    sums = (penalty - gradient[1:]) / Anchors._field_defaults["weight"] + x.T @ expit(
        x @ effects[1:]
    )
    b = root(lambda b: x.T @ expit(x @ b) - sums, effects[1:]).x
    return Anchors(scores=expit(x @ b), lengths=x[:, 0], difficulty=x[:, 1])


def main() -> None:
    """Compare, print and write."""
    folder = Path(os.environ.get("PREFOPT_ALPACA_EVAL", ""))
    if not (folder / WEIGHTS).is_file():
        sys.exit(
            "set PREFOPT_ALPACA_EVAL to a copy of https://github.com/tatsu-lab/alpaca_eval; "
            f"{folder / WEIGHTS} is not there."
        )
    weights, board = read_csv(folder / WEIGHTS), read_csv(folder / LEADERBOARD)
    effects = {m: np.array([float(row[name]) for name in EFFECTS]) for m, row in weights.items()}
    for row in effects.values():
        row[1] *= -1  # AlpacaEval counts the baseline's length minus the model's
    difficulty, again = (read_difficulty(folder, weights, model) for model in SOLVED_FROM)
    if (apart := float(np.abs(difficulty - again).max())) > 1e-6:
        sys.exit(f"the two files give difficulties that are {apart:.1e} apart.")

    published = {m: float(row["length_controlled_winrate"]) for m, row in board.items()}
    formula = [
        abs(100 * predicted_win_rate(effects[m][0], effects[m][2], difficulty) - published[m])
        for m in published
        if m in effects
    ]

    found: dict[str, dict[str, float]] = {}
    skipped = {"judgements not in the folder": 0, "not all 805 judged": 0, "no weights": 0}
    anchors = None
    names = [SOLVED_FROM[0], *sorted(set(published) - {SOLVED_FROM[0], BASELINE})]
    for name in names:
        path = folder / "results" / name / JUDGE / "annotations.json"
        if not path.is_file():
            skipped["judgements not in the folder"] += 1
            continue
        judged = read_judged(path)
        if len(judged.scores) != len(difficulty) or np.isnan(judged.scores).any():
            skipped["not all 805 judged"] += 1
            continue
        if name not in effects:
            skipped["no weights"] += 1
            continue
        if anchors is None:
            anchors = solve_anchors(judged, effects[name], difficulty, anchor_lengths(folder))
        prompts = np.arange(len(judged.scores))
        whole = fit_length_control(
            judged.scores, judged.longer_by, prompts, difficulty=difficulty, anchors=anchors
        )
        bare = fit_length_control(judged.scores, judged.longer_by, prompts)
        found[name] = {
            "win_rate": 100 * float(judged.scores.mean()),
            "win_rate_published": float(board[name]["win_rate"]),
            "published": published[name],
            "prefopt": 100 * whole.win_rate,
            "low": 100 * whole.low,
            "high": 100 * whole.high,
            "lengths_only": 100 * bare.win_rate,
            "notes": len(
                length_notes(
                    bare,
                    float(judged.scores.mean()),
                    length_imbalance(judged.longer_by),
                    len(prompts),
                )
            ),
        }
    tests = {name: row for name, row in found.items() if name != SOLVED_FROM[0]}

    def errors(key: str) -> Floats:
        return np.array([abs(row[key] - row["published"]) for row in tests.values()])

    def rank_agreement(key: str) -> float:
        from scipy.stats import spearmanr

        return float(
            spearmanr([r[key] for r in tests.values()], [r["published"] for r in tests.values()])[0]
        )

    full, bare_errors = errors("prefopt"), errors("lengths_only")
    quiet = np.array([row["notes"] == 0 for row in tests.values()])
    raw = max(abs(row["win_rate"] - row["win_rate_published"]) for row in found.values())
    summary = [
        "| compared with AlpacaEval's published figures | models | mean apart | largest apart |",
        "|---|---|---|---|",
        "| prediction from the published weights "
        f"({sum(e < 1e-4 for e in formula)} within 0.0001) | {len(formula)} | "
        f"{np.mean(formula):.3f} | {max(formula):.3f} |",
        f"| win rate | {len(found)} | | {raw:.4f} |",
        f"| length-controlled, fitted by prefopt | {len(tests)} | {full.mean():.3f} | "
        f"{full.max():.3f} |",
        f"| the same with lengths alone | {len(tests)} | {bare_errors.mean():.3f} | "
        f"{bare_errors.max():.3f} |",
        f"| ... where prefopt gives no warning | {quiet.sum()} | {bare_errors[quiet].mean():.3f} | "
        f"{bare_errors[quiet].max():.3f} |",
        f"| the win rate as judged | {len(tests)} | {errors('win_rate').mean():.3f} | "
        f"{errors('win_rate').max():.3f} |",
    ]
    table = [
        "| model | win rate | published LC | prefopt LC (95 % interval) | lengths alone |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {row['win_rate']:.2f} | {row['published']:.2f} | {row['prefopt']:.2f} "
            f"({row['low']:.1f}–{row['high']:.1f}) | {row['lengths_only']:.2f}"
            f"{' (warned)' if row['notes'] else ''} |"
            for name, row in sorted(tests.items(), key=lambda item: -item[1]["published"])
        ),
    ]
    print("\n".join([*summary, "", *table]))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality_length_control.json").write_text(
        json.dumps(
            {"versions": installed_versions(), "skipped": skipped, "models": found}, indent=1
        )
        + "\n"
    )
    text = [
        "# Length control against AlpacaEval 2's published figures",
        "",
        "Printed by `python benchmarks/quality_length_control.py` over a copy of AlpacaEval's",
        "repository (`PREFOPT_ALPACA_EVAL`). Percentage points. Skipped: "
        + ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count)
        + ".",
        "",
        *summary,
        "",
        f"The difficulties and two sums over the anchors' scores are solved from {SOLVED_FROM[0]},",
        "which is no test; how, the script says. Fitted with a prior of standard deviation 10 instead",
        "of AlpacaEval's L1 penalty chosen by cross-validation.",
        "",
        "On other prompts neither difficulty nor anchors are known, and `prefopt evaluate` has",
        "lengths alone. Where the two sides' lengths overlap that makes little difference; where one",
        "side is longer nearly everywhere it reaches beyond the data, is warned of, and is no better",
        "than the",
        f"win rate as judged (rank correlation with the published order "
        f"{rank_agreement('lengths_only'):.3f} and {rank_agreement('win_rate'):.3f}).",
        "",
        "AlpacaEval's own standard error leaves out the error of the fit; these intervals hold it.",
        "",
        *table,
    ]
    (RESULTS / "quality_length_control.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
