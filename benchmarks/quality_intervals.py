"""Do the 95 % intervals of prefopt.evaluation hold the truth so often, and what does stopping save?

    python benchmarks/quality_intervals.py            # 400 simulated evaluations a row, two minutes
    python benchmarks/quality_intervals.py --runs 100

Every row simulates evaluations whose truth is known and counts how often the interval holds it. The
sampling error of a share of 95 % over 400 runs is 1 point. Writes
benchmarks/results/quality_intervals.{json,md}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import expit, roots_hermite

from prefopt.evaluation.eval_report import installed_versions
from prefopt.evaluation.human_correction import human_corrected_win_rate
from prefopt.evaluation.length_control import fit_length_control
from prefopt.evaluation.ranking import rank_models
from prefopt.evaluation.sequential import ConfidenceSequence, decide
from prefopt.evaluation.win_rate import clustered_wilson_interval, wilson_interval, win_rate
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict, Winner

RESULTS = Path(__file__).parent / "results"
WINNERS: dict[float, Winner] = {1.0: "a", 0.5: "tie", 0.0: "b"}
WAVE = 16


def judged(
    prompt: Prompt, score: float, *, a: str = "tuned", b: str = "base", index: int = 0
) -> JudgedComparison:
    """A comparison whose judge gives this score in both orders."""
    preferred = WINNERS[score]
    verdicts = [
        Verdict(judge="sim", preferred=preferred, strength=int(score != 0.5), shown_first=first)
        for first in ("a", "b")
    ]
    return JudgedComparison(
        comparison=Comparison(
            a=Candidate(prompt=prompt, text=f"x {index}", model=a, sample_index=index),
            b=Candidate(prompt=prompt, text="y", model=b, sample_index=index),
        ),
        forward=verdicts[0],
        backward=verdicts[1],
    )


def prompts(n: int) -> list[Prompt]:
    """So many different prompts."""
    return [Prompt.from_text(str(i)) for i in range(n)]


def draw_scores(
    rng: np.random.Generator, rate: float, ties: float, spread: float, shape: tuple[int, int]
) -> np.ndarray:
    """Scores (prompts, answers) whose mean is `rate`; a prompt's answers share a normal logit.

    The share of ties is `ties` everywhere; `spread` is the standard deviation of the shared logit.
    """
    nodes, weights = roots_hermite(40)
    shared = np.sqrt(2) * spread * nodes
    win = (rate - ties / 2) / (1 - ties)  # among decided ones
    low, high = -20.0, 20.0
    while high - low > 1e-10:  # the mean logit with which the shares average to `win`
        middle = (low + high) / 2
        mean = weights @ expit(middle + shared) / np.sqrt(np.pi)
        low, high = (middle, high) if mean < win else (low, middle)
    p = expit(low + spread * rng.standard_normal((shape[0], 1)))
    wins = (rng.random(shape) < p).astype(float)
    return np.where(rng.random(shape) < ties, 0.5, wins)


def win_rates(rng: np.random.Generator, runs: int) -> list[list[str]]:
    """Coverage and width of the win rate's intervals; the naive one counts answers as prompts."""
    rows = []
    for n, k, rate, ties in [
        (40, 1, 0.7, 0.0), (100, 1, 0.6, 0.4), (100, 1, 0.95, 0.0), (60, 4, 0.6, 0.2),
        (240, 1, 0.6, 0.3),
    ]:  # fmt: skip
        questions = prompts(n)
        hits, widths = np.zeros((runs, 3)), np.zeros((runs, 3))
        for run in range(runs):
            scores = draw_scores(rng, rate, ties, 1.5, (n, k))
            found = win_rate(
                [
                    judged(q, float(s), index=i)
                    for q, row in zip(questions, scores, strict=True)
                    for i, s in enumerate(row)
                ],
                seed=run,
            )
            intervals = [
                (found.wilson_low, found.wilson_high),
                (found.bootstrap_low or 0.0, found.bootstrap_high or 1.0),
                wilson_interval(float(scores.mean()), n * k),
            ]
            hits[run] = [low <= rate <= high for low, high in intervals]
            widths[run] = [100 * (high - low) for low, high in intervals]
        cells = [f"{h:.1%} ({w:.0f})" for h, w in zip(hits.mean(0), widths.mean(0), strict=True)]
        rows.append([f"{n} prompts x {k}", f"{rate:.0%}", f"{ties:.0%}", *cells])
    return rows


def length_control(rng: np.random.Generator, runs: int) -> list[list[str]]:
    """Coverage of the length-controlled rate, when longer answers win and the tuned are longer."""
    rows = []
    for n, k, effect, shift in [(100, 1, 1.0, 0.3), (300, 1, 1.0, 0.3), (80, 3, 1.5, 0.0)]:
        truth, held, raw = expit(0.4), [], []
        for _ in range(runs):
            d = np.repeat(shift, n * k) + rng.standard_normal(n * k)
            p = expit(0.4 + effect * np.tanh(d))
            scores = np.where(rng.random(n * k) < 0.2, 0.5, (rng.random(n * k) < p).astype(float))
            # Ties at random pull the score towards a half; the truth at d = 0 moves with them.
            fit = fit_length_control(scores, d, np.repeat(np.arange(n), k))
            target = 0.8 * truth + 0.2 * 0.5
            held.append(fit.low <= target <= fit.high)
            raw.append(scores.mean())
        rows.append(
            [f"{n} prompts x {k}", f"{effect}", f"{shift}", f"{0.8 * truth + 0.1:.1%}",
             f"{np.mean(raw):.1%}", f"{np.mean(held):.1%}"]
        )  # fmt: skip
    return rows


def rankings(rng: np.random.Generator, runs: int) -> list[list[str]]:
    """Coverage of the pairwise rates, and how often a rank range holds the true rank."""
    rows = []
    for n, names in [(60, ("m0", "m1", "m2")), (100, ("m0", "m1", "m2", "m3", "m4"))]:
        strength = np.linspace(-0.6, 0.6, len(names))
        questions = prompts(n)
        pair_hits, rank_hits = [], []
        for _ in range(runs):
            items = []
            for q in questions:
                shared = 0.7 * rng.standard_normal(len(names))  # a prompt suits some models better
                i, j, k = rng.permutation(len(names))[:3]
                for x, y in ((i, j), (j, k)):
                    p = expit(strength[x] - strength[y] + shared[x] - shared[y])
                    items.append(judged(q, float(rng.random() < p), a=names[x], b=names[y]))
            found = rank_models(items)
            # What a judge's rate estimates is the average over prompts, a little nearer to one half.
            grid = roots_hermite(40)
            truth = {
                (x, y): float(
                    grid[1]
                    @ expit(strength[x] - strength[y] + np.sqrt(2) * 0.7 * np.sqrt(2) * grid[0])
                    / np.sqrt(np.pi)
                )
                for x in range(len(names))
                for y in range(len(names))
            }
            for pair in found.pairs:
                x, y = names.index(pair.a), names.index(pair.b)
                pair_hits.append(pair.low <= truth[x, y] <= pair.high)
            for m in found.models:
                rank = len(names) - names.index(m.model)
                rank_hits.append(m.rank_low <= rank <= m.rank_high)
        rows.append(
            [f"{len(names)} models, {n} prompts x 2", f"{np.mean(pair_hits):.1%}",
             f"{np.mean(rank_hits):.1%}"]
        )  # fmt: skip
    return rows


def stopping(rng: np.random.Generator, runs: int) -> list[list[str]]:
    """What looking after every 16 prompts does to error rates, and what stopping saves, of 240."""
    rows = []
    for rate in (0.5, 0.55, 0.6, 0.7, 0.8):
        wrong = naive_wrong = planned = 0
        stops, missed, decisions = [], [], []
        for _ in range(runs):
            scores = draw_scores(rng, rate, 0.3, 0.0, (240, 1))[:, 0]
            sequence, stop, peeked = ConfidenceSequence(horizon=240), None, False
            for t, score in enumerate(scores, start=1):
                sequence.add(float(score))
                if t % WAVE or stop is not None:
                    continue
                low, high = clustered_wilson_interval(scores[:t].tolist())
                peeked = peeked or not low <= 0.5 <= high
                decision = decide(*sequence.interval, 0.05)
                if decision != "undecided" or t == 240:
                    stop = t
                    decisions.append(decision)
                    low, high = sequence.interval
                    missed.append(not low <= rate <= high)
                    wrong += (
                        decision in ("better", "worse")
                        if rate == 0.5
                        else decision in ("worse", "equivalent")
                    )
            naive_wrong += peeked
            planned += clustered_wilson_interval(scores.tolist())[0] > 0.5
            stops.append(stop or 240)
        better = np.mean([d == "better" for d in decisions])
        rows.append(
            [f"{rate:.0%}", f"{np.mean(stops):.0f}", f"{better:.0%}",
             f"{planned / runs:.0%}",
             f"{wrong / runs:.1%}", f"{np.mean(missed):.1%}",
             f"{naive_wrong / runs:.1%}" if rate == 0.5 else "–"]
        )  # fmt: skip
    return rows


def corrections(rng: np.random.Generator, runs: int) -> list[list[str]]:
    """Coverage and width with a judge that leans to the tuned model, 100 of 500 labelled."""
    rows = []
    questions = prompts(500)
    for agreement in (0.9, 0.7, 0.5):
        hits, widths = np.zeros((runs, 3)), np.zeros((runs, 3))
        judge_only = []
        for run in range(runs):
            people = (rng.random(500) < 0.6).astype(float)
            said = np.where(rng.random(500) < agreement, people, 1 - people)
            said = np.where((said == 0) & (rng.random(500) < 0.2), 1.0, said)
            items = [judged(q, float(s)) for q, s in zip(questions, said, strict=True)]
            labels = {
                items[i].comparison.comparison_id: WINNERS[float(people[i])]
                for i in rng.permutation(500)[:100]
            }
            tuned = human_corrected_win_rate(items, labels)
            plain = human_corrected_win_rate(items, labels, method="ppi")
            intervals = [
                (tuned.low, tuned.high), (plain.low, plain.high),
                (tuned.people_low, tuned.people_high),
            ]  # fmt: skip
            hits[run] = [low <= 0.6 <= high for low, high in intervals]
            widths[run] = [100 * (high - low) for low, high in intervals]
            judge_only.append(tuned.judge_only)
        cells = [f"{h:.1%} ({w:.0f})" for h, w in zip(hits.mean(0), widths.mean(0), strict=True)]
        rows.append([f"{agreement:.0%}", f"{np.mean(judge_only):.0%}", *cells])
    return rows


TABLES: list[tuple[str, list[str], Callable[[np.random.Generator, int], list[list[str]]]]] = [
    (
        "Win rate: how often the interval holds the truth (its mean width in points)",
        ["prompts x answers", "win rate", "ties", "Wilson over prompts", "bootstrap over prompts",
         "Wilson, answers as prompts (wrong)"],
        win_rates,
    ),
    (
        "Length-controlled win rate: longer answers win, the tuned model's are longer by `shift` sd",
        ["prompts x answers", "length effect", "shift", "truth at equal length", "win rate as judged",
         "interval holds the truth"],
        length_control,
    ),
    (
        "Bradley-Terry, where a prompt suits some models better than others",
        ["", "pairwise interval holds the truth", "rank range holds the true rank"],
        rankings,
    ),
    (
        "Stopping early: a look after every 16 of 240 prompts, 30 % ties, margin 5 points",
        ["win rate", "prompts judged, mean", "found better", "a usual interval over all 240 does",
         "wrong decision",
         "interval at the stop misses", "false alarms of a usual interval looked at as often"],
        stopping,
    ),
    (
        "Correction by people: 100 of 500 prompts labelled, truth 60 % (mean width in points)",
        ["judge agrees with people, before its lean", "judge alone says", "PPI++", "PPI",
         "labels alone"],
        corrections,
    ),
]  # fmt: skip


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=400, help="simulated evaluations a row")
    runs = parser.parse_args().runs
    lines: list[str] = []
    results = {}
    for number, (title, columns, simulate) in enumerate(TABLES):
        rows = simulate(np.random.default_rng(number), runs)
        results[title] = [dict(zip(columns, row, strict=True)) for row in rows]
        lines += [
            f"## {title}", "",
            f"| {' | '.join(columns)} |", "|" + "---|" * len(columns),
            *(f"| {' | '.join(row)} |" for row in rows), "",
        ]  # fmt: skip
        print("\n".join(lines[-(len(rows) + 5) :]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality_intervals.json").write_text(
        json.dumps({"versions": installed_versions(), "runs": runs, "tables": results}, indent=1)
        + "\n"
    )
    text = [
        "# Do the intervals hold?",
        "",
        f"Printed by `python benchmarks/quality_intervals.py --runs {runs}`: simulated evaluations",
        "whose truth is known. Every interval is a 95 % interval.",
        "",
        *lines[:-1],
    ]
    (RESULTS / "quality_intervals.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
