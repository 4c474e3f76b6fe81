"""prefopt's style control against Arena-Hard's: on Arena-Hard's data, and on known style effects.

    git clone https://github.com/lmarena/arena-hard-auto       # with its history
    PREFOPT_ARENA_HARD=arena-hard-auto python benchmarks/quality_style_control.py      # a minute

Without PREFOPT_ARENA_HARD only the simulation runs. Nothing of that repository is part of this one.
Writes benchmarks/results/quality_style_control.{json,md}.

What can be had of Arena-Hard's data there, and what not: its answers with their published style
counts (two models of v2.0), answers with their token counts (three of v0.1), and, in the history, the
300 questions of its forerunner with the answers of 13 models and GPT-4's marks from 1 to 10. The
pairwise judgements behind the published leaderboards are on the Hugging Face Hub alone, so the
published scores themselves are NOT checked here.

1. Features: prefopt's counts against the published ones, words against their tokens.
2. The regression, on the forerunner's answers; a comparison is won by the higher mark. Arena-Hard's
   published method (features centred and scaled, maximum likelihood) is written down here anew, from
   its description and source. prefopt's differs in that features are not centred: strengths are
   compared at equal style, not at the mean difference from the baseline's. Moved to that mean, it
   must give the same scores.
3. Simulated models of known strength whose answers' style moves a judge in a known way: how far each
   figure is from the win rate at equal style, and how often the interval holds it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from prefopt.evaluation.eval_report import installed_versions
from prefopt.evaluation.ranking import Ranking, rank_models
from prefopt.evaluation.style import STYLE_FEATURES, style_difference, text_style
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict, Winner

Floats = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results"
V2 = {
    "o3-mini-2025-01-31": ("HEAD", "data/arena-hard-v2.0/model_answer/o3-mini-2025-01-31.jsonl"),
    "sky-t1-32b": (
        "26781f8457dfd69a6eb29ab514b03af2ca08d62c",
        "data/arena-hard-v2.0/model_answer/sky-t1-32b.jsonl",
    ),
}
V1 = {
    "gpt-3.5-turbo-0125": "e0a8ea1df42c1df76451a6cd04b14e31ff992b87",
    "gpt-4-0314": "e0a8ea1df42c1df76451a6cd04b14e31ff992b87",
    "gpt-4-0613": "6c82720015d5da7b8795b809b91f63ef74abbf6a",
}
FORERUNNER = "ac4ad9a93a452cb256e83fe6d89957676c64f19b"
BASELINE = "gpt-3.5-turbo-1106"
MODELS = (
    "Llama-2-70b-chat", "Mistral-7B-Instruct-v0.1", "Mixtral-8x7B-Instruct-v0.1",
    "Starling-LM-7B-alpha", "claude-1", "claude-2.1", "claude-instant-1", "gpt-3.5-turbo-1106",
    "gpt-4-0314", "gpt-4-1106-preview", "openchat_3.5", "palm-2-chat-bison-001",
    "vicuna-33b-v1.3",
)  # fmt: skip
RUNS, PROMPTS = 40, 300


class Battle(NamedTuple):
    """One comparison with the baseline: the model's score for it, and both texts."""

    question: str
    model: str
    score: float
    text: str
    baseline_text: str


# --- Arena-Hard's method, written down anew ------------------------------------------------------


class ArenaFit(NamedTuple):
    """Coefficients in logits; `means` and `spreads` are those of the features, (4,)."""

    strengths: dict[str, float]
    effects: Floats
    means: Floats
    spreads: Floats

    def win_rate(self, model: str, baseline: str) -> float:
        """The score of the leaderboard, a fraction."""
        return float(expit(self.strengths[model] - self.strengths[baseline]))


def arena_counts(text: str) -> Floats:
    """Words (for its tokens), headers, list items and bold passages outside of fenced code."""
    prose = text
    for block in re.findall(r"```([^`]*)```", text):
        prose = prose.replace(block, "")
    headers = len(re.findall(r"^#{1,6}\s", prose, re.MULTILINE))
    lists = len(re.findall(r"^\s*(?:\d+\.|[-*+])\s", prose, re.MULTILINE))
    bold = len(re.findall(r"\*\*[^*\n]+\*\*|__[^_\n]+__", prose))
    return np.array([len(text.split()), headers, lists, bold], dtype=np.float64)


def arena_features(battles: Sequence[Battle]) -> Floats:
    """(N, 4): relative length difference, and differences of densities over their sum plus one."""
    a = np.array([arena_counts(b.text) for b in battles])
    b = np.array([arena_counts(b.baseline_text) for b in battles])
    found = np.zeros_like(a)
    found[:, 0] = (a[:, 0] - b[:, 0]) / np.maximum(a[:, 0] + b[:, 0], 1)
    dense_a, dense_b = a[:, 1:] / (a[:, :1] + 1), b[:, 1:] / (b[:, :1] + 1)
    found[:, 1:] = (dense_a - dense_b) / (dense_a + dense_b + 1)
    return found


def arena_fit(battles: Sequence[Battle], baseline: str, *, style: bool = True) -> ArenaFit:
    """Bradley-Terry against one baseline with centred, scaled features, by maximum likelihood."""
    names = sorted({b.model for b in battles} | {baseline})
    rows = np.zeros((len(battles), len(names)))
    for i, battle in enumerate(battles):
        rows[i, names.index(battle.model)] = 1
        rows[i, names.index(baseline)] -= 1
    features = arena_features(battles)
    means, spreads = features.mean(0), features.std(0, ddof=1)
    scaled = (features - means) / np.where(spreads > 0, spreads, 1)
    x = np.hstack([rows, scaled]) if style else rows
    y = np.array([b.score for b in battles])

    def loss(c: Floats) -> tuple[float, Floats]:
        eta = x @ c
        return float((np.logaddexp(0, eta) - y * eta).sum()), x.T @ (expit(eta) - y)

    found = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B",
                     options={"maxiter": 5_000, "ftol": 1e-14, "gtol": 1e-9}).x  # fmt: skip
    return ArenaFit(
        dict(zip(names, found[: len(names)].tolist(), strict=True)),
        found[len(names) :], means, spreads,
    )  # fmt: skip


# --- prefopt's ------------------------------------------------------------------------------------


def judged(battle: Battle, baseline: str) -> JudgedComparison:
    """The same as prefopt keeps it, both orders agreeing."""
    prompt = Prompt.from_text(battle.question)
    winner: Winner = "a" if battle.score == 1 else "b" if battle.score == 0 else "tie"
    forward, backward = (
        Verdict(judge="j", preferred=winner, strength=int(winner != "tie"), shown_first=first)
        for first in ("a", "b")
    )
    return JudgedComparison(
        comparison=Comparison(
            a=Candidate(prompt=prompt, text=battle.text, model=battle.model),
            b=Candidate(prompt=prompt, text=battle.baseline_text, model=baseline),
        ),
        forward=forward,
        backward=backward,
    )


def ours(battles: Sequence[Battle], baseline: str) -> Ranking:
    """`rank_models` with all style features held equal."""
    return rank_models([judged(b, baseline) for b in battles], control=STYLE_FEATURES)


def moved_to_mean(ranking: Ranking, battles: Sequence[Battle]) -> float:
    """By how many logits the mean style difference moves every model against the baseline."""
    looks = [style_difference(b.text, b.baseline_text) for b in battles]
    return sum(
        effect.effect * float(np.mean([look[effect.feature] for look in looks])) / effect.deviation
        for effect in ranking.style
    )


# --- Arena-Hard's data ----------------------------------------------------------------------------


def read_lines(folder: Path, revision: str, path: str) -> Iterator[dict[str, Any]]:
    """A JSONL file of a revision of the repository."""
    found = subprocess.run(
        ["git", "-C", str(folder), "show", f"{revision}:{path}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return (json.loads(line) for line in found.stdout.split("\n") if line.strip())


_PUBLISHED = {"headers": "header_count", "lists": "list_count", "bold": "bold_count"}


def check_features(folder: Path) -> dict[str, Any]:
    """prefopt's counts and lengths against what Arena-Hard published of the same answers."""
    same: dict[str, list[bool]] = {"headers": [], "lists": [], "bold": []}
    tokens: dict[str, dict[str, int]] = {}
    words: dict[str, dict[str, int]] = {}
    for model, (revision, path) in V2.items():
        for row in read_lines(folder, revision, path):
            text, said = row["messages"][-1]["content"]["answer"], row["metadata"]
            found = text_style(text)
            for name, key in _PUBLISHED.items():
                same[name].append(getattr(found, name) == sum(said[key].values()))
            tokens.setdefault(model, {})[row["uid"]] = said["token_len"]
            words.setdefault(model, {})[row["uid"]] = found.words
    for model, revision in V1.items():
        path = f"data/arena-hard-v0.1/model_answer/{model}.jsonl"
        for row in read_lines(folder, revision, path):
            turn = row["choices"][0]["turns"][0]
            tokens.setdefault(model, {})[row["question_id"]] = turn["token_len"]
            words.setdefault(model, {})[row["question_id"]] = text_style(turn["content"]).words

    def relative(lengths: dict[str, dict[str, int]], a: str, b: str) -> Floats:
        shared = [q for q in lengths[a] if q in lengths[b] and tokens[a][q] + tokens[b][q] > 0]
        x, y = (np.array([lengths[m][q] for q in shared], dtype=np.float64) for m in (a, b))
        return (x - y) / np.maximum(x + y, 1)

    pairs = [(*V2,), *((model, "gpt-4-0314") for model in V1 if model != "gpt-4-0314")]
    return {
        "answers": len(same["lists"]),
        "same_count": {name: float(np.mean(values)) for name, values in same.items()},
        "length": [
            {
                "pair": f"{a} and {b}",
                "n": len(relative(words, a, b)),
                "correlation": float(
                    np.corrcoef(relative(words, a, b), relative(tokens, a, b))[0, 1]
                ),
            }
            for a, b in pairs
        ],
    }


def read_battles(folder: Path) -> list[Battle]:
    """The forerunner's models against the baseline; the higher mark wins."""
    root = "data/arena-bench-v1"
    texts, marks = {}, {}
    for model in MODELS:
        answers = read_lines(folder, FORERUNNER, f"{root}/model_answer/{model}.jsonl")
        texts[model] = {r["question_id"]: r["choices"][0]["turns"][0] for r in answers}
        name = "gpt-4-turbo" if model == "gpt-4-1106-preview" else model
        given = read_lines(folder, FORERUNNER, f"{root}/model_judgment/{name}.jsonl")
        marks[model] = {r["question_id"]: r["score"] for r in given if r["score"]}
    return [
        Battle(
            question=question,
            model=model,
            score=0.5 + 0.5 * float(np.sign(mark - marks[BASELINE][question])),
            text=texts[model][question],
            baseline_text=texts[BASELINE][question],
        )
        for model in MODELS
        if model != BASELINE
        for question, mark in marks[model].items()
        if question in marks[BASELINE] and question in texts[model]
    ]


def compare_on_real(battles: Sequence[Battle]) -> dict[str, Any]:
    """Both methods' scores of every model, in percent."""
    theirs, plain = arena_fit(battles, BASELINE), arena_fit(battles, BASELINE, style=False)
    ranking = ours(battles, BASELINE)
    shift = moved_to_mean(ranking, battles)
    rows = {}
    for model in sorted({b.model for b in battles}):
        pair = ranking.win_rate_of(model, BASELINE)
        rows[model] = {
            "uncontrolled": 100 * plain.win_rate(model, BASELINE),
            "arena_hard": 100 * theirs.win_rate(model, BASELINE),
            "prefopt": 100 * pair.win_rate,
            "low": 100 * pair.low,
            "high": 100 * pair.high,
            "prefopt_at_mean_style": 100 * float(expit(logit(pair.win_rate) + shift)),
        }
    effects = {
        e.feature: {
            "prefopt": e.effect / e.deviation,
            "arena_hard": float(theirs.effects[k] / theirs.spreads[k]),
        }
        for e in ranking.style
        for k in [STYLE_FEATURES.index(e.feature)]
    }
    with_headers = {
        "arena_hard": float((arena_features(battles)[:, 1] != 0).mean()),
        "prefopt": float(
            np.mean([style_difference(b.text, b.baseline_text)["headers"] != 0 for b in battles])
        ),
    }
    return {
        "battles": len(battles),
        "shift": shift,
        "models": rows,
        "effects": effects,
        "with_headers": with_headers,
    }


# --- Known style effects --------------------------------------------------------------------------


def simulate(seed: int) -> tuple[list[Battle], dict[str, float], dict[str, float]]:
    """Battles of five models against a baseline, and the true win rates at equal and at mean style.

    A model's answers are longer and more formatted the better it is, as in life. The judge's logit is
    the models' difference plus 2 a unit of relative length, 3 of list and 1 of bold density; headers
    do nothing.
    """
    rng = np.random.default_rng(seed)
    strengths = {f"model-{i}": 0.5 * (i - 2) for i in range(5)}
    effects = np.array([2.0, 0.0, 3.0, 1.0])

    def write(level: float) -> str:
        words = int(np.exp(rng.normal(4.6 + 0.25 * level, 0.4))) + 5
        lines = [" ".join(["word"] * words)]
        lines += ["- item"] * int(rng.poisson(3 + 2 * level))
        lines += ["# head"] * int(rng.poisson(1))
        lines += ["**bold** text"] * int(rng.poisson(2 + level))
        return "\n".join(lines)

    battles = []
    for question in range(PROMPTS):
        base_text = write(0.0)
        for model, strength in strengths.items():
            battles.append(
                Battle(f"q{question}", model, 0.5, write(0.8 + 0.4 * strength), base_text)
            )
    features = arena_features(battles)
    eta = np.array([strengths[b.model] for b in battles]) + features @ effects
    won = rng.random(len(battles)) < expit(eta)
    battles = [b._replace(score=float(w)) for b, w in zip(battles, won, strict=True)]
    shift = float(features.mean(0) @ effects)
    return (
        battles,
        {m: float(expit(s)) for m, s in strengths.items()},
        {m: float(expit(s + shift)) for m, s in strengths.items()},
    )


def check_simulated() -> dict[str, Any]:
    """Errors in percentage points over all runs and models."""
    errors: dict[str, list[float]] = {
        "as judged": [], "Arena-Hard's style control": [],
        "Arena-Hard's, against the win rate at mean style": [], "prefopt's style control": [],
    }  # fmt: skip
    held = []
    for seed in range(RUNS):
        battles, equal, at_mean = simulate(seed)
        plain, theirs = arena_fit(battles, "base", style=False), arena_fit(battles, "base")
        ranking = ours(battles, "base")
        for model, truth in equal.items():
            pair = ranking.win_rate_of(model, "base")
            errors["as judged"].append(plain.win_rate(model, "base") - truth)
            errors["Arena-Hard's style control"].append(theirs.win_rate(model, "base") - truth)
            errors["Arena-Hard's, against the win rate at mean style"].append(
                theirs.win_rate(model, "base") - at_mean[model]
            )
            errors["prefopt's style control"].append(pair.win_rate - truth)
            held.append(pair.low <= truth <= pair.high)
    return {
        "runs": RUNS,
        "prompts": PROMPTS,
        "mean_error": {name: 100 * float(np.mean(e)) for name, e in errors.items()},
        "rms_error": {
            name: 100 * float(np.sqrt(np.mean(np.square(e)))) for name, e in errors.items()
        },
        "coverage": float(np.mean(held)),
        "n": len(held),
    }


# --- Out ------------------------------------------------------------------------------------------


def feature_lines(found: dict[str, Any]) -> list[str]:
    """The first check in words."""
    same = found["same_count"]
    return [
        "## Features",
        "",
        f"Of {found['answers']:,} answers of Arena-Hard v2.0 with published counts, prefopt "
        "counts as many "
        f"headers in {100 * same['headers']:.1f} %, list items in {100 * same['lists']:.1f} % "
        "and bold "
        f"passages in {100 * same['bold']:.1f} %. (Of an answer cut off inside a code block "
        "prefopt takes "
        "the rest for code.)",
        "",
        "Length is counted in words instead of tokens. Correlation of the two relative "
        "differences:",
        "",
        "| answers of | questions | correlation |",
        "|---|---|---|",
        *(f"| {row['pair']} | {row['n']} | {row['correlation']:.3f} |" for row in found["length"]),
        "",
    ]


def real_lines(found: dict[str, Any]) -> list[str]:
    """The second check in words."""
    rows = found["models"].values()
    apart = np.array([abs(r["prefopt_at_mean_style"] - r["arena_hard"]) for r in rows])
    equal = np.array([abs(r["prefopt"] - r["arena_hard"]) for r in rows])
    moved = np.array([abs(r["uncontrolled"] - r["arena_hard"]) for r in rows])
    return [
        "## The regression, on real answers and marks",
        "",
        f"{found['battles']:,} comparisons of {len(rows)} models with {BASELINE}: 300 questions of "
        "Arena-Hard's forerunner, won by the higher of GPT-4's marks. Win rates against the "
        "baseline in "
        "percent. Arena-Hard's method is a re-implementation, with words for tokens.",
        "",
        "| compared with Arena-Hard's style control | mean apart | largest apart |",
        "|---|---|---|",
        f"| prefopt, moved to the mean style difference | {apart.mean():.3f} | {apart.max():.3f} |",
        f"| prefopt, at equal style (what it shows) | {equal.mean():.2f} | {equal.max():.2f} |",
        f"| no style control | {moved.mean():.2f} | {moved.max():.2f} |",
        "",
        f"That the second row is not 0 is on purpose: all models together are moved by "
        f"{found['shift']:+.3f} logits, the effect of the mean style difference from the baseline.",
        "",
        "| model | as judged | Arena-Hard's | prefopt at mean style | prefopt at equal style (95 "
        "%) |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {r['uncontrolled']:.1f} | {r['arena_hard']:.2f} | "
            f"{r['prefopt_at_mean_style']:.2f} | {r['prefopt']:.2f} "
            f"({r['low']:.1f}–{r['high']:.1f}) |"
            for name, r in sorted(found["models"].items(), key=lambda item: -item[1]["arena_hard"])
        ),
        "",
        "| effect in logits, of one unit | prefopt | Arena-Hard's |",
        "|---|---|---|",
        *(
            f"| {name} | {e['prefopt']:+.3f} | {e['arena_hard']:+.3f} |"
            for name, e in found["effects"].items()
        ),
        "",
        "Headers tell the two answers apart in "
        f"{100 * found['with_headers']['arena_hard']:.1f} % of the comparisons by Arena-Hard's "
        "count and "
        f"in {100 * found['with_headers']['prefopt']:.1f} % by prefopt's: in a code block that "
        "was cut "
        "off, Arena-Hard's pattern takes comments for headers. Their effect rests on little in "
        "both.",
        "",
    ]


def simulated_lines(found: dict[str, Any]) -> list[str]:
    """The third check in words."""
    return [
        "## Known style effects",
        "",
        f"{found['runs']} simulated evaluations of 5 models on {found['prompts']} prompts. Error "
        "against the "
        "win rate at equal style (but for the third row), in points:",
        "",
        "| figure | mean error | root mean square |",
        "|---|---|---|",
        *(
            f"| {name} | {found['mean_error'][name]:+.2f} | {found['rms_error'][name]:.2f} |"
            for name in found["mean_error"]
        ),
        "",
        f"prefopt's 95 % interval held the truth in {100 * found['coverage']:.1f} % of "
        f"{found['n']}.",
        "",
    ]


def main() -> None:
    """Run what can be run, print and write it."""
    folder = os.environ.get("PREFOPT_ARENA_HARD")
    found: dict[str, Any] = {"versions": installed_versions(), "simulated": check_simulated()}
    lines = [
        "# Style control against Arena-Hard's",
        "",
        "Printed by `python benchmarks/quality_style_control.py` over a clone of Arena-Hard's "
        "repository "
        "(`PREFOPT_ARENA_HARD`).",
        "",
        "The judgements behind Arena-Hard's leaderboards are not in its repository, so its "
        "published scores "
        "are not reproduced here. Checked are its published style counts, its method "
        "re-implemented on "
        "answers and marks that are there, and simulations whose truth is known.",
        "",
    ]
    if folder is None:
        print("PREFOPT_ARENA_HARD is not set: only the simulation ran; nothing is written.")
    else:
        found["features"] = check_features(Path(folder))
        found["real"] = compare_on_real(read_battles(Path(folder)))
        lines += feature_lines(found["features"]) + real_lines(found["real"])
    lines += simulated_lines(found["simulated"])
    print("\n".join(lines))
    if folder is not None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "quality_style_control.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "quality_style_control.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
