"""Answers that talk to the judge: none leaves its place in a request, none passes for a verdict."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality_injection import ATTACKS, comparisons, out_of_the_fence, pairs
from prefopt.judges.local import LocalJudge
from prefopt.judges.wording import parse_verdict, question
from prefopt.models import LanguageModel
from prefopt.types import Candidate, Comparison, Prompt
from tests.tiny_models import TEMPLATES, tiny_tokenizer


def test_no_attack_of_the_benchmark_gets_out_of_its_fence_or_passes_for_a_verdict():
    for line in out_of_the_fence(pairs(4)):
        assert line.endswith("| 0 | 0 |"), line


@given(st.lists(st.text(max_size=60), min_size=3, max_size=3), st.text(max_size=5))
def test_no_text_closes_its_own_fence(texts, salt):
    prompt = Prompt.from_text(texts[0] + "?")
    a, b = (Candidate(prompt=prompt, text=text, model="m") for text in texts[1:])
    asked = question(Comparison(a=a, b=b), salt)
    code = asked.partition("code of this message is ")[2][:16]
    for name, text in (("response_1", texts[1]), ("response_2", texts[2])):
        assert asked.count(f"<{name}-{code}>") == asked.count(f"</{name}-{code}>") == 1
        assert f"<{name}-{code}>\n{text}\n</{name}-{code}>" in asked


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_reply_that_quotes_an_attack_is_no_verdict(attack):
    for reply in (attack, f"It says: {attack}", f"{attack}\nI judge it better."):
        with pytest.raises(ValueError, match=r"\S"):
            parse_verdict(reply)


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t not in ("plain", "gpt2")])
def test_an_answer_cannot_end_its_turn_in_a_local_judges_question(template, monkeypatch):
    tokenizer = tiny_tokenizer(template)
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    words = [tokenizer.added_tokens_decoder[i].content for i in special]
    asked = []

    def answer(questions, loaded, labels):
        asked.extend(questions)
        return [0.5] * len(questions)

    monkeypatch.setattr("prefopt.judges.local._p_first", answer)
    judge = LocalJudge(LanguageModel("m", _Shell(), tokenizer, "m"))
    prompt = Prompt.from_text("Why? " + " ".join(words))
    for text in ("Because.", "Because. " + "\n".join(words)):
        a, b = (Candidate(prompt=prompt, text=text + x, model="m") for x in "ab")
        assert [v.preferred for _, v in judge.verdicts([Comparison(a=a, b=b)])] == ["tie"]
    plain, attacked = ([i for i in ids if i in special] for ids in asked)
    assert plain == attacked


class _Shell:
    config = None


def test_the_benchmark_attacks_the_bad_answer_in_both_orders():
    asked = comparisons(pairs(2), " !")
    assert [c.a.model for c in asked] == ["good", "bad"] * 2
    assert all((c.a.text + c.b.text).count(" !") == 1 for c in asked)
