"""The request scheduler, with a clock that stands still until it is moved."""

from __future__ import annotations

from typing import Any

import pytest

from checkpoints.timing import Clock
from triton_diffusion.errors import QueueFullError
from triton_diffusion.scheduler import CostModel, RowId, Scheduler, Tick, Work


def make_scheduler(**values: Any) -> Scheduler:
    defaults: dict[str, Any] = {
        "num_replicas": 1,
        "max_queue_size": 100,
        "max_batch_tokens": 4,
        "step_batching": True,
        "clock": Clock(),
    }
    return Scheduler(**defaults | values)


def work(request_id: str, *, rows: int = 1, steps: int = 1, key: str = "k", tokens: int = 1, **values: Any) -> Work:
    return Work(request_id=request_id, batch_key=key, num_rows=rows, num_steps=steps, tokens=tokens, **values)


def rows_of(scheduler: Scheduler, replica: int = 0) -> list[RowId]:
    """The rows of the next tick, which then comes back at once; requests that end are removed."""
    tick = scheduler.next_tick(replica)
    if tick is None:
        return []
    finish(scheduler, tick)
    return list(tick.rows)


def finish(scheduler: Scheduler, tick: Tick | None, duration_s: float = 1.0) -> list[str]:
    """Bring a tick back and remove the requests that end with it."""
    assert tick is not None
    ended = scheduler.finish_tick(tick.tick_id, duration_s)
    for request_id in ended:
        scheduler.remove(request_id)
    return ended


def row_names(rows: list[RowId] | tuple[RowId, ...]) -> str:
    return " ".join(f"{request_id}{index}" for request_id, index in rows)


# Batches.


def test_an_empty_scheduler_has_no_tick() -> None:
    assert make_scheduler().next_tick(0) is None


def test_requests_run_first_come_first_served() -> None:
    scheduler = make_scheduler(max_batch_tokens=1)
    for name in "cab":
        scheduler.submit(work(name))
    assert [row_names(rows_of(scheduler)) for _ in range(3)] == ["c0", "a0", "b0"]


def test_a_batch_holds_the_rows_of_several_requests() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", rows=2))
    scheduler.submit(work("b"))
    assert row_names(rows_of(scheduler)) == "a0 a1 b0"


def test_a_batch_of_rows_of_one_token_has_as_many_rows_as_tokens() -> None:
    scheduler = make_scheduler(max_batch_tokens=3)
    for name in "abcde":
        scheduler.submit(work(name))
    assert row_names(rows_of(scheduler)) == "a0 b0 c0"
    assert row_names(rows_of(scheduler)) == "d0 e0"


def test_a_batch_has_at_most_max_batch_tokens() -> None:
    scheduler = make_scheduler(max_batch_tokens=100)
    for name, tokens in (("a", 40), ("guided", 80), ("b", 40)):
        scheduler.submit(work(name, tokens=tokens))
    tick = scheduler.next_tick(0)
    assert tick is not None
    assert (row_names(tick.rows), tick.tokens) == ("a0 b0", 80)
    assert row_names(rows_of(scheduler)) == "guided0"


def test_a_row_of_more_tokens_than_a_batch_may_have_runs_alone() -> None:
    scheduler = make_scheduler(max_batch_tokens=100)
    scheduler.submit(work("large", tokens=500))
    scheduler.submit(work("small", tokens=20))
    assert [row_names(rows_of(scheduler)) for _ in range(2)] == ["large0", "small0"]


def test_only_rows_of_equal_batch_key_share_a_tick() -> None:
    scheduler = make_scheduler()
    for name, key in (("a", "x"), ("b", "y"), ("c", "x")):
        scheduler.submit(work(name, key=key))
    assert row_names(rows_of(scheduler)) == "a0 c0"
    assert row_names(rows_of(scheduler)) == "b0"


def test_a_request_joins_at_the_next_tick_and_rows_at_different_steps_share_it() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", steps=3))
    assert row_names(rows_of(scheduler)) == "a0"
    scheduler.submit(work("b", steps=3))
    assert row_names(rows_of(scheduler)) == "a0 b0"
    assert scheduler.entry("a").step == 2
    assert scheduler.entry("b").step == 1


def test_a_row_that_is_done_makes_room_at_once() -> None:
    scheduler = make_scheduler(max_batch_tokens=2)
    for name, steps in (("a", 2), ("b", 4), ("c", 1)):
        scheduler.submit(work(name, steps=steps))
    batches = [row_names(rows_of(scheduler)) for _ in range(4)]
    assert batches == ["a0 b0", "a0 b0", "b0 c0", "b0"]


def test_a_step_batching_tick_is_one_step() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", steps=5))
    tick = scheduler.next_tick(0)
    assert tick is not None
    assert tick.num_steps == 1


def test_a_request_with_more_rows_than_a_batch_runs_in_several() -> None:
    scheduler = make_scheduler(max_batch_tokens=2)
    scheduler.submit(work("a", rows=3, steps=2))
    batches = [row_names(rows_of(scheduler)) for _ in range(4)]
    assert batches == ["a0 a1", "a0 a1", "a2", "a2"]
    assert "a" not in scheduler


def test_a_finished_request_is_told_once() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", rows=2, steps=2))
    assert finish(scheduler, scheduler.next_tick(0)) == []
    assert finish(scheduler, scheduler.next_tick(0)) == ["a"]


def test_a_tick_names_the_requests_that_the_replica_has_not_been_sent() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", steps=3))
    first = scheduler.next_tick(0)
    scheduler.submit(work("b", steps=3))
    second = scheduler.next_tick(0)
    assert first is not None
    assert second is not None
    assert (first.admissions, second.admissions) == (("a",), ("b",))


# Several ticks out at a time.


def test_the_next_tick_can_be_had_while_earlier_ones_are_out() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", steps=2))
    first, second = scheduler.next_tick(0), scheduler.next_tick(0)
    assert scheduler.next_tick(0) is None, "both steps are planned"
    assert scheduler.entry("a").step == 0
    assert finish(scheduler, first) == []
    assert scheduler.entry("a").step == 1
    assert finish(scheduler, second) == ["a"]


def test_a_replica_is_alone_while_no_other_has_a_request() -> None:
    scheduler = make_scheduler(num_replicas=2)
    scheduler.submit(work("a"))
    assert scheduler.is_alone(0)
    scheduler.submit(work("b"))
    assert not scheduler.is_alone(0)
    assert not scheduler.is_alone(1)
    scheduler.remove("a")
    assert scheduler.is_alone(1)


def test_a_tick_that_comes_back_twice_counts_once() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", steps=2))
    tick = scheduler.next_tick(0)
    assert tick is not None
    scheduler.finish_tick(tick.tick_id, 1.0)
    assert scheduler.finish_tick(tick.tick_id, 1.0) == []
    assert scheduler.entry("a").step == 1


# The reference loop.


def test_the_reference_loop_runs_one_request_through_all_its_steps() -> None:
    scheduler = make_scheduler(step_batching=False)
    scheduler.submit(work("a", rows=2, steps=5))
    scheduler.submit(work("b", steps=3))
    first, second = scheduler.next_tick(0), scheduler.next_tick(0)
    assert first is not None
    assert second is not None
    assert (row_names(first.rows), first.num_steps) == ("a0 a1", 5)
    assert (row_names(second.rows), second.num_steps) == ("b0", 3)
    assert finish(scheduler, first) == ["a"]
    assert finish(scheduler, second) == ["b"]


def test_the_reference_loop_keeps_to_max_batch_tokens() -> None:
    """num_outputs may be larger than what fits the device in one forward pass."""
    scheduler = make_scheduler(step_batching=False, max_batch_tokens=2)
    scheduler.submit(work("a", rows=3, steps=5))
    assert row_names(rows_of(scheduler)) == "a0 a1"
    assert row_names(rows_of(scheduler)) == "a2"
    assert "a" not in scheduler


# Admission.


def test_a_full_queue_refuses_and_says_how_full_it_is() -> None:
    scheduler = make_scheduler(max_queue_size=2, cost_model=CostModel([(1, 0.5)]))
    scheduler.submit(work("a", steps=5))
    scheduler.submit(work("b"))
    with pytest.raises(QueueFullError, match=r"2 requests .* wait or run \(parameter max_queue_size=2\).*about 3\.0 s"):
        scheduler.submit(work("c"))
    assert "c" not in scheduler


def test_running_requests_count_for_the_queue_until_they_end() -> None:
    scheduler = make_scheduler(max_queue_size=1)
    scheduler.submit(work("a"))
    tick = scheduler.next_tick(0)
    with pytest.raises(QueueFullError):
        scheduler.submit(work("b"))
    finish(scheduler, tick)
    scheduler.submit(work("b"))
    assert len(scheduler) == 1


def test_an_id_that_is_here_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", steps=3))
    with pytest.raises(ValueError, match="'a' is here already"):
        scheduler.submit(work("a"))
    assert scheduler.entry("a").work.num_steps == 3


def test_a_queue_is_full_by_its_work_too() -> None:
    scheduler = make_scheduler(max_queue_cost=100)
    scheduler.submit(work("a", steps=10, tokens=6))
    with pytest.raises(QueueFullError, match=r"60 tokens x steps .*max_queue_cost=100.* asks for 50 more"):
        scheduler.submit(work("b", steps=10, tokens=5))
    scheduler.submit(work("c", steps=10, tokens=4))


def test_a_request_of_more_work_than_the_queue_may_hold_is_taken_when_nothing_else_is_here() -> None:
    scheduler = make_scheduler(max_queue_cost=100)
    scheduler.submit(work("large", steps=10, tokens=60))
    with pytest.raises(QueueFullError):
        scheduler.submit(work("small"))


# Removal.


def test_a_removed_request_is_in_no_later_tick() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", steps=3))
    scheduler.submit(work("b", steps=3))
    rows_of(scheduler)
    scheduler.remove("a")
    assert row_names(rows_of(scheduler)) == "b0"


def test_a_request_removed_while_its_tick_is_out_is_passed_over() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a"))
    scheduler.submit(work("b"))
    tick = scheduler.next_tick(0)
    scheduler.remove("a")
    assert finish(scheduler, tick) == ["b"]


def test_a_tick_of_a_removed_request_does_not_count_for_a_new_one_of_the_same_id() -> None:
    """Cancelled while a tick was out and sent again at once, a request would end without its last steps."""
    scheduler = make_scheduler()
    scheduler.submit(work("a"))
    old = scheduler.next_tick(0)
    scheduler.remove("a")
    scheduler.submit(work("a"))
    new = scheduler.next_tick(0)
    assert finish(scheduler, old) == []
    assert finish(scheduler, new) == ["a"]


def test_removing_a_request_that_is_not_here_is_an_error() -> None:
    with pytest.raises(KeyError):
        make_scheduler().remove("a")


# Replicas.


def test_a_request_goes_to_the_replica_with_the_least_work_left() -> None:
    scheduler = make_scheduler(num_replicas=2)
    scheduler.submit(work("long", steps=10))
    scheduler.submit(work("short", steps=2))
    scheduler.submit(work("third", steps=2))
    assert scheduler.requests_of(0) == ["long"]
    assert scheduler.requests_of(1) == ["short", "third"]


def test_work_is_tokens_times_rows_times_steps_that_are_left() -> None:
    scheduler = make_scheduler(num_replicas=2, max_batch_tokens=10)
    scheduler.submit(work("a", rows=2, steps=3, tokens=5))
    scheduler.submit(work("b", rows=1, steps=3, tokens=8))
    assert [scheduler.entry(name).work_left for name in "ab"] == [30, 24]
    rows_of(scheduler, 0)
    assert scheduler.entry("a").work_left == 20
    scheduler.submit(work("c"))
    assert scheduler.requests_of(0) == ["a", "c"]


def test_a_replica_runs_its_own_requests_only() -> None:
    scheduler = make_scheduler(num_replicas=2)
    scheduler.submit(work("a"))
    scheduler.submit(work("b"))
    assert row_names(rows_of(scheduler, 1)) == "b0"
    assert rows_of(scheduler, 1) == []
    assert row_names(rows_of(scheduler, 0)) == "a0"


def test_a_reset_replica_runs_its_started_requests_from_the_first_step() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", steps=3))
    rows_of(scheduler)
    scheduler.submit(work("waiting", key="other", priority=0))
    scheduler.next_tick(0)
    assert scheduler.reset_replica(0) == ["a"]
    assert scheduler.entry("a").step == 0
    replayed = scheduler.next_tick(0)
    assert replayed is not None
    assert replayed.admissions == ("a",)
    assert len([finish(scheduler, tick) for tick in (replayed, scheduler.next_tick(0), scheduler.next_tick(0))]) == 3
    assert "a" not in scheduler


def test_requests_that_ran_when_a_replica_died_run_alone_afterwards() -> None:
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.submit(work(name))
    tick = scheduler.next_tick(0)
    assert tick is not None
    assert row_names(tick.rows) == "a0 b0"
    scheduler.reset_replica(0)
    for name in ("c", "d"):
        scheduler.submit(work(name))
    assert [row_names(rows_of(scheduler)) for _ in range(3)] == ["a0", "b0", "c0 d0"]


def test_a_suspect_goes_before_what_came_before_it() -> None:
    scheduler = make_scheduler(num_replicas=2)
    for name in ("long", "culprit"):
        scheduler.submit(work(name, steps=50))
    scheduler.next_tick(1)
    scheduler.reset_replica(1)
    scheduler.set_available(1, False)
    assert scheduler.requests_of(0) == ["long", "culprit"]
    assert row_names(rows_of(scheduler)) == "culprit0"


def test_a_suspect_is_never_out_together_with_another_request() -> None:
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.submit(work(name, steps=2))
    scheduler.next_tick(0)
    scheduler.reset_replica(0)
    ticks = [scheduler.next_tick(0) for _ in range(3)]
    assert [tick.rows if tick else None for tick in ticks] == [(("a", 0),), (("a", 0),), None]
    assert scheduler.reset_replica(0) == ["a"]


def test_no_request_goes_to_a_replica_that_is_down_while_another_is_up() -> None:
    scheduler = make_scheduler(num_replicas=2)
    scheduler.submit(work("before"))
    scheduler.next_tick(0)
    scheduler.reset_replica(0)
    scheduler.set_available(0, False)
    for name in "abcd":
        scheduler.submit(work(name))
    assert {entry.replica for entry in scheduler.entries()} == {1}
    scheduler.set_available(0, True)
    scheduler.submit(work("after"))
    assert scheduler.entry("after").replica == 0


def test_requests_wait_where_they_are_when_every_replica_is_down() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a"))
    scheduler.set_available(0, False)
    scheduler.submit(work("b"))
    scheduler.set_available(0, True)
    assert row_names(rows_of(scheduler)) == "a0 b0"


def test_a_tick_from_before_a_reset_does_not_count() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", steps=2))
    lost = scheduler.next_tick(0)
    scheduler.reset_replica(0)
    assert finish(scheduler, lost) == []
    assert scheduler.entry("a").step == 0


def test_a_reset_leaves_other_replicas_alone() -> None:
    scheduler = make_scheduler(num_replicas=2)
    scheduler.submit(work("a", steps=2))
    scheduler.submit(work("b", steps=2))
    scheduler.next_tick(0)
    kept = scheduler.next_tick(1)
    assert scheduler.reset_replica(0) == ["a"]
    finish(scheduler, kept)
    assert scheduler.entry("b").step == 1


def test_a_request_goes_on_from_its_checkpoint_when_its_replica_is_reset() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", rows=2, steps=5))
    for _ in range(3):
        finish(scheduler, scheduler.next_tick(0))
    assert scheduler.keep("a", [2, 1])
    scheduler.next_tick(0)
    assert scheduler.reset_replica(0) == ["a"]
    entry = scheduler.entry("a")
    assert entry.planned == entry.done == [2, 1]
    assert (entry.started_s, entry.steps_left, entry.step, len(entry.steps_s)) == (None, 7, 1, 2)
    ticks = []
    while (tick := scheduler.next_tick(0)) is not None:
        ticks.append([index for _, index in tick.rows])
        finish(scheduler, tick)
    assert ticks == [[0, 1]] * 3 + [[1]]


def test_a_request_whose_checkpoint_is_broken_begins_anew_with_the_ticks_that_are_out() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", rows=2, steps=5))
    for _ in range(4):
        finish(scheduler, scheduler.next_tick(0))
    scheduler.keep("a", [4, 3])
    scheduler.reset_replica(0)
    out = [scheduler.next_tick(0), scheduler.next_tick(0)]
    assert [tick.rows if tick else None for tick in out] == [(("a", 0), ("a", 1)), (("a", 1),)]
    scheduler.lose_checkpoint("a")
    for tick in out:
        assert finish(scheduler, tick) == [], "it is not through, though its last steps were planned"
    assert (scheduler.entry("a").done, scheduler.entry("a").kept) == ([1, 2], [0, 0])
    ended = []
    while (tick := scheduler.next_tick(0)) is not None:
        ended.append(finish(scheduler, tick))
    assert ended == [[], [], [], ["a"]]


def test_a_checkpoint_that_is_not_of_this_request_is_refused() -> None:
    """Such as one of a request that was cancelled and sent again under its id."""
    scheduler = make_scheduler()
    scheduler.submit(work("a", rows=2, steps=5))
    for _ in range(2):
        finish(scheduler, scheduler.next_tick(0))
    for foreign in ([3, 2], [2], [2, 2, 2], []):
        assert not scheduler.keep("a", foreign)
    assert scheduler.keep("a", [2, 2])
    assert not scheduler.keep("a", [1, 2]), "older than the one that is kept"
    assert scheduler.entry("a").kept == [2, 2]


def test_a_smaller_limit_holds_from_the_next_tick_on() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", rows=4, steps=2))
    assert len(rows_of(scheduler)) == 4
    scheduler.learn_limits(2)
    scheduler.learn_limits(3)
    assert len(rows_of(scheduler)) == 2


# What is measured.


def test_waiting_and_running_are_measured_on_the_clock() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock=clock)
    scheduler.submit(work("a"))
    clock.now_s += 7
    scheduler.next_tick(0)
    entry = scheduler.remove("a")
    assert entry.submitted_s == 100
    assert entry.started_s == 107


def test_every_step_has_the_duration_of_its_tick() -> None:
    scheduler = make_scheduler()
    scheduler.submit(work("a", rows=2, steps=2))
    for duration_s in (0.5, 0.25):
        tick = scheduler.next_tick(0)
        assert tick is not None
        scheduler.finish_tick(tick.tick_id, duration_s)
    assert scheduler.remove("a").steps_s == [0.5, 0.25]


def test_the_reference_loop_shares_the_duration_between_its_steps() -> None:
    scheduler = make_scheduler(step_batching=False)
    scheduler.submit(work("a", steps=4))
    tick = scheduler.next_tick(0)
    assert tick is not None
    scheduler.finish_tick(tick.tick_id, 2.0)
    assert scheduler.remove("a").steps_s == [0.5] * 4


# Waiting for company.


def company_scheduler(**values: Any) -> Scheduler:
    """One of a stage where a row of 1 token takes 0.5 s alone and a quarter of it in the best batch."""
    return make_scheduler(cost_model=CostModel([(1, 0.5), (4, 0.5)]), **values)


def test_a_batch_that_is_not_full_gains_by_waiting() -> None:
    scheduler = company_scheduler()
    assert not scheduler.gains_by_waiting(0)
    for index in range(4):
        scheduler.submit(work(f"r{index}"))
        assert scheduler.gains_by_waiting(0) is (index < 3)


def test_where_batches_are_no_faster_nothing_waits() -> None:
    scheduler = make_scheduler(cost_model=CostModel([(1, 0.5), (4, 1.95)]))
    scheduler.submit(work("r"))
    assert not scheduler.gains_by_waiting(0)


def test_what_is_in_a_tick_waits_for_nobody() -> None:
    scheduler = company_scheduler()
    scheduler.submit(work("r"))
    scheduler.next_tick(0)
    assert not scheduler.gains_by_waiting(0)


@pytest.mark.parametrize("hurry", [{"steps": 2}, {"priority": 6}, {"deadline_s": 1000.0}])
def test_requests_of_many_steps_of_high_priority_or_with_a_deadline_do_not_wait(hurry: dict[str, Any]) -> None:
    scheduler = company_scheduler()
    scheduler.submit(work("patient", priority=0))
    assert scheduler.gains_by_waiting(0)
    scheduler.submit(work("hurried", **hurry))
    assert not scheduler.gains_by_waiting(0)
