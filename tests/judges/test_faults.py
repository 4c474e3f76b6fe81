"""An API of which 30 % of the calls fail: no wrong label, no crash, every pair accounted for."""

import pytest

from prefopt.judges import judge_comparisons
from prefopt.judges.anthropic import AnthropicJudge
from prefopt.judges.ledger import Ledger
from prefopt.preferences import build_preferences
from prefopt.testing import FakeAnthropic, random_faults, socket_client
from prefopt.testing.answers import prefer_longer
from prefopt.types import Candidate, Comparison, Prompt


def pairs(n):
    made = []
    for i in range(n):
        prompt = Prompt.from_text(f"Question {i}?")
        texts = ["short", "a much longer answer"] if i % 2 else ["a much longer answer", "short"]
        a, b = (
            Candidate(prompt=prompt, text=f"{text} {i}", model="m", sample_index=j)
            for j, text in enumerate(texts)
        )
        made.append(Comparison(a=a, b=b))
    return made


def judge(client, **options):
    async def sleep(seconds):
        pass

    return AnthropicJudge(
        "claude-sonnet-5-5",
        max_usd=1000.0,
        client=client,
        sleep=sleep,
        reconcile_s=0.0,
        timeout_s=5.0,
        **options,
    )


def check(judged, fake, ledger):
    for item in judged:
        longer = "a" if len(item.comparison.a.text) > len(item.comparison.b.text) else "b"
        for verdict in item.verdicts:
            assert verdict.failure is not None or verdict.preferred == longer
    found = build_preferences(judged)
    assert found.n_preferences + len(found.left_out) == len(judged)
    assert set(found.reasons()) <= {"judge_failed"}
    with Ledger(ledger) as book:
        assert book.money().reserved_usd == pytest.approx(0)
        answered = book.count("SELECT COUNT(DISTINCT key) FROM verdicts")[0][0]
    assert answered == 2 * len(judged)
    return len(found.left_out)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("transport", ["sync", "batch"])
def test_with_30_percent_faults_no_label_is_wrong_and_every_pair_is_accounted_for(
    tmp_path, transport, seed
):
    fake = FakeAnthropic(prefer_longer, seed=seed)
    fake.faults = random_faults(share=0.3, seed=seed)
    judged = judge_comparisons(
        pairs(60), judge(fake.client(), transport=transport), ledger=tmp_path / "l", progress=False
    )
    check(judged, fake, tmp_path / "l")


@pytest.mark.slow
def test_over_a_real_socket_it_is_the_same(tmp_path):
    fake = FakeAnthropic(prefer_longer)
    fake.faults = random_faults(share=0.3, seed=5)
    with fake.serve(unix_path=tmp_path / "api.sock"):
        judged = judge_comparisons(
            pairs(40),
            judge(socket_client(tmp_path / "api.sock"), transport="sync"),
            ledger=tmp_path / "l",
            progress=False,
        )
    check(judged, fake, tmp_path / "l")


def test_a_second_run_heals_what_the_first_could_not(tmp_path):
    fake = FakeAnthropic(prefer_longer)
    fake.faults = random_faults(share=0.5, seed=1)
    first = judge_comparisons(
        pairs(40),
        judge(fake.client(), transport="sync", max_attempts=2),
        ledger=tmp_path / "l",
        progress=False,
    )
    n_left_out = check(first, fake, tmp_path / "l")
    assert n_left_out > 0
    fake.faults = []
    n_asked = len(fake.requests)
    healed = judge_comparisons(
        pairs(40), judge(fake.client(), transport="sync"), ledger=tmp_path / "l", progress=False
    )
    assert build_preferences(healed).n_preferences == 40
    n_failed = sum(v.failure is not None for j in first for v in j.verdicts)
    assert len(fake.requests) - n_asked == n_failed
