"""How many requests are under way: up while all is well, down at once when the service objects."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.judges.concurrency import AdaptiveLimit


def run(coroutine):
    return asyncio.run(coroutine)


def test_it_doubles_a_round_until_the_first_objection():
    limit = AdaptiveLimit(64)
    assert limit.limit == 8
    for expected in (16, 32, 64, 64):
        for _ in range(limit.limit):
            limit.succeeded()
        assert limit.limit == expected


def test_an_objection_halves_it_once_a_round_and_growth_is_slow_after_that():
    async def main():
        limit = AdaptiveLimit(64, start=32)
        epochs = [await limit.acquire() for _ in range(10)]
        for epoch in epochs:
            limit.congested(epoch)
        assert limit.limit == 16  # ten objections to one round are one objection
        for _ in range(16):
            limit.succeeded()
        assert limit.limit == 17
        limit.congested(await limit.acquire() if limit.under_way < limit.limit else 1)
        assert limit.limit == 8

    run(main())


@pytest.mark.parametrize("turns", [0, 1])
def test_a_pause_cut_off_with_its_event_loop_does_not_hold_up_the_next(turns):
    """As when a run of a judge is interrupted and the judge is asked again."""
    limit = AdaptiveLimit(4)

    async def interrupted():
        limit.pause(1000.0)
        for _ in range(turns):  # the pause has not begun, or has
            await asyncio.sleep(0)

    async def again():
        await asyncio.wait_for(limit.acquire(), 5)

    run(interrupted())
    run(again())
    assert limit.under_way == 1


def test_a_pause_that_fails_lets_everybody_go_on():
    async def main():
        async def sleep(seconds):
            raise OSError("no clock")

        limit = AdaptiveLimit(4, sleep=sleep)
        limit.pause(1.0)
        pausing = limit._pausing
        await asyncio.wait_for(limit.acquire(), 5)
        assert isinstance(pausing.exception(), OSError)

    run(main())


def test_nobody_starts_during_a_pause_and_everybody_after_it():
    async def main():
        gate = asyncio.Event()
        asked = []

        async def sleep(seconds):
            asked.append(seconds)
            await gate.wait()

        limit = AdaptiveLimit(4, sleep=sleep)
        limit.pause(17.0)
        waiting = [asyncio.create_task(limit.acquire()) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert asked == [17.0]
        assert not any(task.done() for task in waiting)
        gate.set()
        await asyncio.gather(*waiting)
        assert limit.under_way == 3

    run(main())


def test_the_service_can_lower_it_by_saying_how_many_it_takes():
    limit = AdaptiveLimit(64, start=40)
    limit.at_most(5)
    assert limit.limit == 5
    limit.at_most(0)
    assert limit.limit == 1  # one must go, or nothing would ever be known
    limit.at_most(50)
    assert limit.limit == 1


@given(st.lists(st.sampled_from(["ok", "congested", "few"]), max_size=60), st.integers(1, 64))
def test_it_never_leaves_its_bounds_and_never_lets_too_many_through(events, most):
    async def main():
        limit = AdaptiveLimit(most)
        for event in events:
            epoch = await limit.acquire()
            assert limit.under_way <= limit.limit
            if event == "ok":
                limit.succeeded()
            elif event == "congested":
                limit.congested(epoch)
            else:
                limit.at_most(3)
            limit.release()
            assert 1 <= limit.limit <= most

    run(main())
