"""Who goes first: priority, deadlines, turns of the sizes, short before long. A tick of n tokens takes n x 10 ms."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from triton_diffusion.config import PolicyName
from triton_diffusion.errors import DeadlineExceededError
from triton_diffusion.scheduler import CostModel, Scheduler, Tick, Work

SECONDS_PER_TOKEN = 0.01
AGEING_S = 10.0


class Replica:
    """A scheduler with one replica that runs its ticks on a clock of its own."""

    def __init__(self, **values: Any) -> None:
        self.now_s = 100.0
        self.ended_s: dict[str, float] = {}
        self.scheduler = Scheduler(
            num_replicas=1,
            max_queue_size=1000,
            clock=lambda: self.now_s,
            ageing_s=AGEING_S,
            cost_model=CostModel([(1, SECONDS_PER_TOKEN)]),
            **{"max_batch_tokens": 4, **values},
        )

    def submit(
        self, name: str, *, key: str = "k", steps: int = 1, tokens: int = 1, rows: int = 1, **values: Any
    ) -> None:
        if "deadline_s" in values:
            values["deadline_s"] += self.now_s
        work = Work(request_id=name, batch_key=key, num_rows=rows, num_steps=steps, tokens=tokens, **values)
        self.scheduler.submit(work)

    def run_tick(self) -> Tick:
        tick = self.scheduler.next_tick(0)
        assert tick is not None, "there is nothing to do"
        self.now_s += tick.tokens * SECONDS_PER_TOKEN
        for name in self.scheduler.finish_tick(tick.tick_id, tick.tokens * SECONDS_PER_TOKEN):
            self.scheduler.remove(name)
            self.ended_s[name] = self.now_s
        return tick

    def ran(self) -> str:
        """The requests of the next tick."""
        return " ".join(dict.fromkeys(name for name, _ in self.run_tick().rows))

    def run_until_empty(self) -> None:
        while len(self.scheduler):
            self.run_tick()


# Priority.


def test_a_higher_priority_goes_first() -> None:
    replica = Replica(max_batch_tokens=1)
    for name, priority in (("low", 0), ("middle", 5), ("high", 9)):
        replica.submit(name, priority=priority)
    assert [replica.ran() for _ in range(3)] == ["high", "middle", "low"]


def test_a_higher_priority_of_another_size_interrupts_at_the_next_step() -> None:
    replica = Replica()
    replica.submit("video", key="video", steps=50, tokens=4)
    replica.run_tick()
    replica.submit("urgent", key="image", steps=2, priority=9)
    assert [replica.ran() for _ in range(3)] == ["urgent", "urgent", "video"]


def test_room_in_the_batch_of_a_high_priority_is_used_by_lower_ones() -> None:
    replica = Replica()
    replica.submit("high", priority=9)
    replica.submit("low", priority=0)
    assert replica.ran() == "high low"


def test_a_low_priority_is_served_in_the_end_however_many_high_ones_come() -> None:
    replica = Replica(max_batch_tokens=1)
    replica.submit("low", priority=0, steps=3)
    for number in range(40_000):
        replica.submit(f"high-{number}", priority=9)
        replica.run_tick()
        if "low" in replica.ended_s:
            break
    waited_s = replica.ended_s["low"] - 100
    assert 9 * AGEING_S <= waited_s <= 10 * AGEING_S


# Short and long of one size.


def test_a_short_request_is_not_stuck_behind_long_ones_of_its_size() -> None:
    replica = Replica(max_batch_tokens=2)
    for number in range(6):
        replica.submit(f"long-{number}", steps=50)
    for _ in range(5):
        replica.run_tick()
    replica.submit("short", steps=4)
    arrived_s = replica.now_s
    replica.run_until_empty()
    assert replica.ended_s["short"] - arrived_s == pytest.approx(4 * 2 * SECONDS_PER_TOKEN)


def test_equal_requests_end_one_after_the_other_not_all_at_last() -> None:
    replica = Replica(max_batch_tokens=1)
    for name in "abc":
        replica.submit(name, steps=10)
    replica.run_until_empty()
    ends_s = [replica.ended_s[name] - 100 for name in "abc"]
    assert sum(ends_s) / 3 <= 1.35 * 0.2, "finished one by one the mean is 20 steps, taking turns it is nearly 30"


def test_a_long_request_is_not_passed_over_for_ever_by_short_ones_of_its_size() -> None:
    replica = Replica(max_batch_tokens=1)
    replica.submit("long", steps=50)
    for number in range(2000):
        replica.submit(f"short-{number}", steps=1)
        replica.run_tick()
        if "long" in replica.ended_s:
            break
    alone_s = 50 * SECONDS_PER_TOKEN
    assert replica.ended_s["long"] - 100 <= 6 * alone_s, "due after 5 times, and then it runs"


# Several sizes.


def test_a_long_video_yields_to_a_short_image_at_its_next_step_and_loses_nothing() -> None:
    replica = Replica()
    replica.submit("video", key="video", steps=5, tokens=100)
    replica.run_tick()
    replica.submit("image", key="image", steps=3, tokens=4)
    assert [replica.ran() for _ in range(4)] == ["image", "image", "image", "video"]
    replica.run_until_empty()
    assert replica.ended_s["video"] - 100 == pytest.approx((5 * 100 + 3 * 4) * SECONDS_PER_TOKEN)


def test_all_sizes_are_slowed_down_alike() -> None:
    """Short ones of one size and long ones of another, all there at once: each waits in proportion to its length."""
    replica = Replica(max_batch_tokens=1)
    for number in range(10):
        replica.submit(f"short-{number}", key="small", steps=4)
        replica.submit(f"long-{number}", key="large", steps=40)
    replica.run_until_empty()
    shorts = [replica.ended_s[f"short-{number}"] for number in range(10)]
    longs = [replica.ended_s[f"long-{number}"] for number in range(10)]
    assert max(shorts) < min(longs)


def test_a_size_whose_requests_are_due_later_is_not_mixed_in_at_every_step() -> None:
    """Sizes that take turns at every step would all end late."""
    replica = Replica()
    for name, key in (("a", "x"), ("b", "y")):
        replica.submit(name, key=key, steps=5)
        replica.now_s += 0.001
    assert [replica.ran() for _ in range(10)] == ["a"] * 5 + ["b"] * 5


def test_an_overdue_video_leaves_half_of_the_time_to_short_images() -> None:
    """Else an image that comes now would wait until the whole video is through."""
    replica = Replica(max_batch_tokens=40)
    replica.submit("video", key="video", steps=50, tokens=40)
    replica.now_s += 1000
    spent: Counter[str] = Counter()
    for number in range(900):
        replica.submit(f"image-{number}", key="image", tokens=4)
        tick = replica.run_tick()
        spent[tick.batch_key] += tick.tokens
        if "video" in replica.ended_s:
            break
    assert spent["video"] == 50 * 40
    assert 0.8 <= spent["image"] / spent["video"] <= 1.0
    waits_s = [replica.ended_s.get(f"image-{number}", 0.0) for number in range(100)]
    assert min(waits_s) > 0, "none of the first hundred images still waits"


def test_an_overdue_request_does_not_yield_to_what_is_hardly_shorter() -> None:
    replica = Replica(max_batch_tokens=1)
    replica.submit("overdue", key="a", steps=10)
    replica.now_s += 10
    replica.submit("newer", key="b", steps=5)
    assert [replica.ran() for _ in range(10)] == ["overdue"] * 10


@pytest.mark.parametrize("policy", ["fair", "drr"])
def test_a_size_is_served_whatever_comes_in_another_one(policy: PolicyName) -> None:
    replica = Replica(policy=policy)
    replica.submit("video", key="video", steps=10, tokens=40)
    alone_s = 10 * 40 * SECONDS_PER_TOKEN
    for number in range(5000):
        replica.submit(f"image-{number}", key="image", tokens=4)
        replica.run_tick()
        if "video" in replica.ended_s:
            break
    assert replica.ended_s["video"] - 100 <= 8 * alone_s


# Sizes take turns by deficit round robin.


def test_two_sizes_with_a_request_each_share_the_time_equally() -> None:
    replica = Replica(policy="drr")
    replica.submit("small", key="small", steps=1000, tokens=4)
    replica.submit("large", key="large", steps=1000, tokens=20)
    spent: Counter[str] = Counter()
    for _ in range(300):
        tick = replica.run_tick()
        spent[tick.batch_key] += tick.tokens
    assert spent["small"] / spent["large"] == pytest.approx(1, abs=0.2)


def test_a_size_with_more_requests_has_more_of_the_time() -> None:
    replica = Replica(max_batch_tokens=1, policy="drr")
    for number in range(3):
        replica.submit(f"many-{number}", key="many", steps=10_000)
    replica.submit("one", key="one", steps=10_000)
    spent = Counter(replica.run_tick().batch_key for _ in range(400))
    assert spent["many"] / spent["one"] == pytest.approx(3, abs=0.3)


# Deadlines.


def test_the_earliest_deadline_that_is_near_goes_first_within_a_priority() -> None:
    replica = Replica(max_batch_tokens=1)
    replica.submit("none", key="a", steps=10)
    replica.submit("later", key="b", steps=10, deadline_s=0.19, deadline_action="drop")
    replica.submit("sooner", key="c", steps=10, deadline_s=0.15, deadline_action="drop")
    replica.submit("higher", key="d", steps=1, priority=6)
    assert [replica.ran() for _ in range(2)] == ["higher", "sooner"]


def test_a_deadline_that_is_far_away_gives_no_right_of_way() -> None:
    replica = Replica(max_batch_tokens=1)
    replica.submit("relaxed", steps=50, deadline_s=3600.0)
    replica.submit("short", steps=2)
    assert replica.ran() == "short"


def test_a_request_that_cannot_meet_its_deadline_is_refused_with_the_estimate() -> None:
    replica = Replica()
    with pytest.raises(DeadlineExceededError, match=r"0\.50 s are left of it, and about 1\.00 s are needed"):
        replica.submit("hasty", steps=100, deadline_s=0.5)
    replica.submit("patient", steps=100, deadline_s=1.1)


def test_a_request_is_refused_for_what_goes_before_it_and_not_for_what_it_may_pass() -> None:
    replica = Replica(max_batch_tokens=1)
    replica.submit("before", key="a", steps=100, priority=9)
    replica.submit("behind", key="b", steps=100, priority=1)
    with pytest.raises(DeadlineExceededError, match=r"1\.00 s of them behind 1 requests"):
        replica.submit("late", key="c", steps=10, deadline_s=1.0)
    replica.submit("in-time", key="c", steps=10, deadline_s=1.2)


def test_what_shares_its_batch_is_not_waited_for() -> None:
    replica = Replica(max_batch_tokens=2)
    replica.submit("a-mate", steps=100, priority=9)
    replica.submit("joins", steps=10, deadline_s=0.3)
    assert replica.ran() == "a-mate joins"


def test_drop_and_continue_are_not_refused() -> None:
    replica = Replica()
    for action in ("drop", "continue"):
        replica.submit(action, steps=100, deadline_s=0.01, deadline_action=action)
    assert len(replica.scheduler) == 2


def test_a_request_is_late_as_soon_as_its_deadline_cannot_be_met_any_more() -> None:
    replica = Replica(max_batch_tokens=1)
    replica.submit("tight", steps=10, deadline_s=0.105)
    assert replica.scheduler.late_requests(0) == []
    replica.now_s += 0.01
    assert replica.scheduler.late_requests(0) == ["tight"]


def test_a_request_that_wants_to_be_finished_late_is_never_given_up() -> None:
    replica = Replica(max_batch_tokens=1)
    replica.submit("late", steps=10, deadline_s=0.01, deadline_action="continue")
    replica.now_s += 100
    assert replica.scheduler.late_requests(0) == []
    replica.run_until_empty()
    assert "late" in replica.ended_s


def test_a_missed_deadline_presses_no_more() -> None:
    replica = Replica(max_batch_tokens=1)
    replica.submit("missed", key="a", steps=50, deadline_s=0.02, deadline_action="continue")
    replica.submit("pressing", key="b", steps=10, deadline_s=0.15)
    assert replica.ran() == "pressing"


# First come, first served, to compare with.


def test_fifo_serves_in_the_order_of_arrival() -> None:
    replica = Replica(max_batch_tokens=1, policy="fifo")
    replica.submit("long", steps=3)
    replica.submit("short", steps=1, priority=9)
    assert [replica.ran() for _ in range(4)] == ["long", "long", "long", "short"]


def test_fifo_takes_along_what_is_of_the_first_ones_size() -> None:
    replica = Replica(policy="fifo")
    for name, key in (("a", "x"), ("b", "y"), ("c", "x")):
        replica.submit(name, key=key)
    assert [replica.ran() for _ in range(2)] == ["a c", "b"]
