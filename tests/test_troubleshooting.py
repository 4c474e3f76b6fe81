"""docs/troubleshooting.md is true: its messages are prefopt's, and the tests that it names exist.

Each `<!-- message: name -->` of the page stands before a block that the function of that name makes
here, by the fault that it is about. Numbers may differ.
"""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from prefopt import DPOTrainer
from prefopt.chat import tokenize_prompt
from prefopt.data.preflight import preflight
from prefopt.errors import BudgetExceeded, ModelError, TrainingError
from prefopt.judges import Judge
from prefopt.judges.asking import judge_comparisons
from prefopt.judges.label_report import label_report
from prefopt.preferences import build_preferences
from prefopt.testing import FakeAnthropic, verdict_reply
from prefopt.training.health import TrainingPoint, diagnose
from prefopt.training.ppo_health import GoldPoint, PPOPoint, diagnose_ppo
from prefopt.types import Candidate, Comparison, Preference, PreferenceGroup, Prompt, Verdict
from tests.tiny_models import tiny_tokenizer
from tests.training.dpo_cases import LORA, make_trainer, pair_rows, tiny_policy, trained, weights

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = dict(re.findall(r"<!-- message: (\w+) -->\n```text\n(.*?)\n```", PAGE, re.DOTALL))
PROMPT = Prompt.from_text("Why is the sky blue?")


def plain(message):
    """Without numbers and line breaks."""
    return re.sub(r"\d[\d.,e+-]*\d|\d", "#", " ".join(message.split()))


# --- The faults -----------------------------------------------------------------------------------


def reference_differs(folder):
    started = LoraConfig(**{**LORA.to_dict(), "init_lora_weights": False})
    with pytest.raises(TrainingError) as error:
        trained(folder, pair_rows(4), peft_config=started)
    return str(error.value)


class ShortOfMemory(DPOTrainer):
    """Whose micro-batches of more than 30 tokens fail as they do in torch."""

    def _micro_batch_loss(self, model, micro_batch, step, mode):
        if sum(tree.n_tokens for tree in micro_batch.trees) > 30:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            )
        return super()._micro_batch_loss(model, micro_batch, step, mode)


def out_of_memory(folder):
    trainer = make_trainer(folder, pair_rows(8), kind=ShortOfMemory, micro_batch_tokens=64)
    with pytest.raises(TrainingError) as error:
        trainer.train()
    return str(error.value)


def found_before_training(check, chosen, rejected, *, prompt=PROMPT, max_length=None):
    """The finding as `prefopt train dpo` prints it."""
    answers = tuple(Candidate(prompt=prompt, text=t, model="m") for t in (chosen, rejected))
    preference = Preference(chosen=0, rejected=1, p_chosen=0.9)
    group = PreferenceGroup(prompt=prompt, answers=answers, preferences=(preference,))
    # A template writes its own boundary; only without one can tokens merge across it.
    tokenizer = tiny_tokenizer("plain" if check == "boundary_merge" else "chatml")
    text = preflight([group], tokenizer, max_length=max_length).to_text()
    return re.search(rf"^\w+ +{check} (?:.*\n?)(?:^ {{9}}.*\n?)*", text, re.MULTILINE)[0]


def tokens_merge(_):
    prompt = Prompt.from_text("The sky is blue.\n")
    return found_before_training("boundary_merge", "\n\nYours", "Hello", prompt=prompt)


def end_inside(_):
    return found_before_training("eos_inside", "Air.<|im_end|> Light.", "No idea.")


def truncated(_):
    room = len(tokenize_prompt(tiny_tokenizer("chatml"), PROMPT)) + 20
    return found_before_training("truncation", "The sky is blue " * 9, "No.", max_length=room)


def prompt_too_long(_):
    return found_before_training("prompt_fills_max_length", "Air.", "No idea.", max_length=4)


def identical(_):
    return found_before_training("identical", "Air.", "Air.")


def broken_cache(folder):
    (folder / "cache").mkdir()
    (folder / "cache" / "reference.sqlite").write_bytes(b"this is no database, of course")
    with pytest.raises(TrainingError) as error:
        make_trainer(folder, pair_rows(4), reference_cache=str(folder / "cache"))
    return str(error.value).replace(str(folder), "out")


def points(n=20, **changes):
    healthy = {
        "loss": 0.5, "margin": 1.0, "accuracy": 0.8, "chosen_reward": 0.0, "rejected_reward": -1.0,
        "chosen_logp": -50.0, "rejected_logp": -60.0, "learning_rate": 1e-5, "grad_norm": 1.0,
    }  # fmt: skip
    return [TrainingPoint(step=i + 1, epoch=i / n, **{**healthy, **changes}) for i in range(n)]


def note(notes, check):
    return next(n.message for n in notes if n.check == check)


def no_gradient(_):
    return note(diagnose(points(grad_norm=0.0, loss=0.6931), beta=0.1), "gradient_zero")


def chosen_falls(_):
    return note(diagnose(points(chosen_reward=-1.1), beta=0.1), "chosen")


def not_finite(folder):
    bad = tiny_tokenizer()("The sky")["input_ids"]
    rows = [*pair_rows()[:3], {**pair_rows()[3], "prompt_ids": bad}]
    rare = next(i for i in bad if not any(i in ids for r in rows[:3] for ids in r.values()))
    model = tiny_policy()
    trainer = make_trainer(folder, rows, model=model)
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = float("nan")
    with pytest.raises(TrainingError) as error:
        trainer.train()
    return str(error.value)


def ppo_points(**changes):
    healthy = {
        "score": lambda t: t, "kl": lambda t: 5 * t, "length": lambda t: 20.0,
        "entropy": lambda t: 2.0 - 0.5 * t, "rlhf_reward": lambda t: 0.8 * t,
    }  # fmt: skip
    made = {**healthy, **changes}
    return [PPOPoint(step=4 * i, **{k: f(i / 19) for k, f in made.items()}) for i in range(20)]


def kl_runs_away(_):
    return note(diagnose_ppo(ppo_points(kl=lambda t: 60 * t)), "kl")


def reward_exploited(_):
    gold = [GoldPoint(step=s, value=v) for s, v in ((20, 0.6), (40, 0.7), (60, 0.5), (76, 0.4))]
    return note(diagnose_ppo(ppo_points(), gold=gold), "hacking")


def no_reward_model(folder):
    from prefopt import RewardModel

    with pytest.raises(ModelError) as error:
        RewardModel.load(folder)
    return str(error.value).replace(str(folder), "reward-model")


def comparisons(n):
    return [
        Comparison(
            a=Candidate(prompt=Prompt.from_text(f"Question {i}"), text="Yes, it is.", model="m"),
            b=Candidate(prompt=Prompt.from_text(f"Question {i}"), text="No, not it.", model="m"),
        )
        for i in range(n)
    ]


def claude(max_usd):
    from prefopt.judges.anthropic import AnthropicJudge

    usage = {"input_tokens": 5, "output_tokens": 500}
    fake = FakeAnthropic(lambda params: {"text": verdict_reply("first"), "usage": usage})
    return AnthropicJudge("claude-sonnet-5-5", max_usd=max_usd, client=fake.client(), concurrency=1)


def no_limit(_):
    with pytest.raises(ValueError, match="max_usd") as error:
        claude(None)
    return str(error.value)


def limit_reached(_):
    with pytest.raises(BudgetExceeded) as error:
        list(claude(0.05).verdicts(comparisons(9)))
    return str(error.value)


class FirstPlace(Judge):
    """Names the answer that is shown first, in every second question."""

    name = "first"

    def verdicts(self, asked):
        for index, c in enumerate(asked):
            first = int(c.a.prompt.text.split()[-1]) % 2 or c.a.text < c.b.text
            yield index, Verdict(judge=self.name, preferred="a" if first else "b", strength=1)


def many_flips(_):
    judged = list(judge_comparisons(comparisons(60), FirstPlace(), progress=False))
    report = label_report(
        judged, judge="first", rubric=FirstPlace().rubric, preferences=build_preferences(judged)
    )
    return next(text for text in report.warnings if "changed with the order" in text)


# --- The page -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_of_the_page_is_the_one_that_the_fault_makes(name, tmp_path):
    assert plain(globals()[name](tmp_path)) == plain(MESSAGES[name])


def test_every_fault_is_on_the_page():
    assert len(MESSAGES) == PAGE.count("<!-- message:") == PAGE.count("```text")


def test_every_test_named_on_the_page_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 40
    for file in {file for file, _ in named}:
        there = set(
            re.findall(r"^def (test_\w+)\(", (ROOT / file).read_text("utf-8"), re.MULTILINE)
        )
        missing = {test for where, test in named if where == file} - there
        assert not missing, file


def test_every_complaint_has_its_tests():
    for entry in PAGE.split("\n## ")[1:]:
        assert "<summary>Tests</summary>\n\n- `tests/" in entry, entry.splitlines()[0]


# --- What no other test holds -----------------------------------------------------------------------


def test_padding_free_changes_nothing(tmp_path):
    """Accepted as TRL's scripts have it, without a warning (warnings are errors here)."""
    rows = pair_rows(4)
    free = weights(trained(tmp_path / "a", rows, max_steps=1, padding_free=True))
    usual = weights(trained(tmp_path / "b", rows, max_steps=1))
    assert all(torch.equal(free[name], value) for name, value in usual.items())
