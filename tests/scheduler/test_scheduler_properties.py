"""The scheduler against any order of arrivals, cancels, deaths and ticks, with replicas that count their steps."""

from __future__ import annotations

from collections import Counter, deque

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from triton_diffusion.errors import QueueFullError
from triton_diffusion.scheduler import RowId, Scheduler, Tick, Work

MAX_QUEUE_SIZE = 6


class CountingReplica:
    """What the ranks of a replica hold: the requests they were sent, and how many steps each row has run."""

    def __init__(self) -> None:
        self.ticks: deque[Tick] = deque()
        self.steps: dict[RowId, int] = {}
        self.admitted: set[str] = set()

    def run(self) -> Tick:
        """Run the oldest tick; rows of requests that were dropped are passed over."""
        tick = self.ticks.popleft()
        for row in tick.rows:
            if row[0] in self.admitted:
                self.steps[row] = self.steps.get(row, 0) + tick.num_steps
        return tick

    def drop(self, request_id: str) -> None:
        self.admitted.discard(request_id)
        self.steps = {row: steps for row, steps in self.steps.items() if row[0] != request_id}


class SchedulerMachine(RuleBasedStateMachine):
    """Every rule does one thing that the service does, on a scheduler of any size."""

    @initialize(num_replicas=st.integers(1, 3), max_batch_size=st.integers(1, 4), step_batching=st.booleans())
    def start(self, num_replicas: int, max_batch_size: int, step_batching: bool) -> None:
        self.now_s = 0.0
        self.max_batch_size = max_batch_size
        self.scheduler = Scheduler(
            num_replicas=num_replicas,
            max_queue_size=MAX_QUEUE_SIZE,
            max_batch_size=max_batch_size,
            step_batching=step_batching,
            clock=lambda: self.now_s,
        )
        self.replicas = [CountingReplica() for _ in range(num_replicas)]
        self.works: dict[str, Work] = {}
        self.ends: Counter[str] = Counter()
        self.numbers = 0

    @rule(rows=st.integers(1, 5), steps=st.integers(1, 4), key=st.sampled_from("xy"), tokens=st.integers(1, 9))
    def submit(self, rows: int, steps: int, key: str, tokens: int) -> None:
        self.numbers += 1
        work = Work(request_id=f"r{self.numbers}", batch_key=key, num_rows=rows, num_steps=steps, tokens=tokens)
        here = len(self.scheduler)
        try:
            self.scheduler.submit(work)
        except QueueFullError:
            assert here == MAX_QUEUE_SIZE
        else:
            assert here < MAX_QUEUE_SIZE
            self.works[work.request_id] = work

    @rule(data=st.data())
    def plan(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.replicas) - 1))
        replica, tick = self.replicas[number], self.scheduler.next_tick(number)
        if tick is None:
            return
        self.check_tick(tick, number)
        for request_id in tick.admissions:
            assert request_id not in replica.admitted, "sent twice"
            replica.admitted.add(request_id)
        replica.ticks.append(tick)

    def check_tick(self, tick: Tick, number: int) -> None:
        assert tick.replica == number
        assert 0 < len(tick.rows) <= self.max_batch_size
        assert len(set(tick.rows)) == len(tick.rows)
        assert len({self.works[request_id].batch_key for request_id, _ in tick.rows}) == 1
        for request_id, index in tick.rows:
            assert request_id in self.scheduler
            assert 0 <= index < self.works[request_id].num_rows
            assert request_id in self.replicas[number].admitted or request_id in tick.admissions

    @precondition(lambda self: any(replica.ticks for replica in self.replicas))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        busy = [number for number, replica in enumerate(self.replicas) if replica.ticks]
        replica = self.replicas[data.draw(st.sampled_from(busy))]
        tick = replica.run()
        self.now_s += 1
        for request_id in self.scheduler.finish_tick(tick.tick_id, 1.0):
            work = self.works[request_id]
            steps = [replica.steps[request_id, index] for index in range(work.num_rows)]
            assert steps == [work.num_steps] * work.num_rows, "a row ran a step twice or skipped one"
            self.end(request_id)
            replica.drop(request_id)

    @precondition(lambda self: len(self.scheduler))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([name for name in self.works if name in self.scheduler]))
        self.end(request_id)
        for replica in self.replicas:
            replica.drop(request_id)

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.replicas) - 1))
        started = {name for name in self.replicas[number].admitted if name in self.scheduler}
        assert set(self.scheduler.reset_replica(number)) == started
        self.replicas[number] = CountingReplica()

    def end(self, request_id: str) -> None:
        self.scheduler.remove(request_id)
        self.ends[request_id] += 1

    @invariant()
    def no_row_has_run_more_steps_than_it_has(self) -> None:
        for replica in self.replicas:
            for (request_id, _), steps in replica.steps.items():
                assert steps <= self.works[request_id].num_steps

    @invariant()
    def the_scheduler_holds_what_has_not_ended(self) -> None:
        assert {name for name in self.works if name in self.scheduler} == set(self.works) - set(self.ends)

    def teardown(self) -> None:
        """Every admitted request ends exactly once: those that are left now run to their end."""
        if not hasattr(self, "scheduler"):
            return
        for number, replica in enumerate(self.replicas):
            for _ in range(10_000):
                if (tick := self.scheduler.next_tick(number)) is not None:
                    self.check_tick(tick, number)
                    replica.admitted.update(tick.admissions)
                    replica.ticks.append(tick)
                if not replica.ticks:
                    break
                done = replica.run()
                for request_id in self.scheduler.finish_tick(done.tick_id, 1.0):
                    self.end(request_id)
        assert len(self.scheduler) == 0
        assert self.ends == Counter(dict.fromkeys(self.works, 1))


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
