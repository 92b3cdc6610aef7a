"""The scheduler against any order of arrivals, cancels, deaths and ticks, with replicas that count their steps."""

from __future__ import annotations

from collections import Counter, deque

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from triton_diffusion.config import PolicyName
from triton_diffusion.errors import DeadlineExceededError, QueueFullError
from triton_diffusion.scheduler import CostModel, DeadlineAction, RowId, Scheduler, Tick, Work

MAX_QUEUE_SIZE = 6


class CountingReplica:
    """What the ranks of a replica hold: the requests they were sent, and how many steps each row has run."""

    def __init__(self) -> None:
        self.ticks: deque[Tick] = deque()
        self.steps: dict[RowId, int] = {}
        self.admitted: set[str] = set()
        self.resumed: dict[str, list[int]] = {}
        """Requests with a checkpoint that no tick has named yet."""

    def admit(self, request_id: str, done: list[int]) -> None:
        """Take a request whose rows have done so many steps by its checkpoint."""
        assert request_id not in self.admitted, "sent twice"
        self.admitted.add(request_id)
        if any(done):
            self.resumed[request_id] = done
        self.steps |= {(request_id, index): steps for index, steps in enumerate(done)}

    def begin_anew(self, request_id: str) -> None:
        """Do without the checkpoint."""
        for index, steps in enumerate(self.resumed.pop(request_id)):
            self.steps[request_id, index] -= steps

    def done(self, request_id: str) -> list[int]:
        return [steps for (name, _), steps in sorted(self.steps.items()) if name == request_id]

    def run(self) -> Tick:
        """Run the oldest tick; rows of requests that were dropped are passed over."""
        tick = self.ticks.popleft()
        for row in tick.rows:
            self.resumed.pop(row[0], None)
            if row[0] in self.admitted:
                self.steps[row] = self.steps.get(row, 0) + tick.num_steps
        return tick

    def drop(self, request_id: str) -> None:
        self.admitted.discard(request_id)
        self.resumed.pop(request_id, None)
        self.steps = {row: steps for row, steps in self.steps.items() if row[0] != request_id}


class SchedulerMachine(RuleBasedStateMachine):
    """Every rule does one thing that the service does, on a scheduler of any size."""

    @initialize(
        num_replicas=st.integers(1, 3),
        max_batch_tokens=st.integers(1, 12),
        step_batching=st.booleans(),
        policy=st.sampled_from(["fair", "drr", "fifo"]),
    )
    def start(self, num_replicas: int, max_batch_tokens: int, step_batching: bool, policy: PolicyName) -> None:
        self.now_s = 0.0
        self.max_batch_tokens = max_batch_tokens
        self.scheduler = Scheduler(
            num_replicas=num_replicas,
            max_queue_size=MAX_QUEUE_SIZE,
            max_batch_tokens=max_batch_tokens,
            step_batching=step_batching,
            policy=policy,
            ageing_s=5.0,
            cost_model=CostModel([(1, 0.1), (10, 0.5)]),
            clock=lambda: self.now_s,
        )
        self.replicas = [CountingReplica() for _ in range(num_replicas)]
        self.works: dict[str, Work] = {}
        self.ends: Counter[str] = Counter()
        self.checkpoints: list[tuple[str, list[int]]] = []
        """On their way from the ranks."""
        self.kept: dict[str, list[int]] = {}
        self.available = set(range(num_replicas))
        self.numbers = 0

    @rule(
        rows=st.integers(1, 5),
        steps=st.integers(1, 4),
        key=st.sampled_from("xy"),
        tokens=st.integers(1, 9),
        priority=st.integers(0, 9),
        deadline_s=st.none() | st.floats(0.1, 30),
        deadline_action=st.sampled_from(["refuse", "drop", "continue"]),
    )
    def submit(
        self,
        rows: int,
        steps: int,
        key: str,
        tokens: int,
        priority: int,
        deadline_s: float | None,
        deadline_action: DeadlineAction,
    ) -> None:
        self.numbers += 1
        work = Work(
            request_id=f"r{self.numbers}",
            batch_key=key,
            num_rows=rows,
            num_steps=steps,
            tokens=tokens,
            priority=priority,
            deadline_s=None if deadline_s is None else self.now_s + deadline_s,
            deadline_action=deadline_action,
        )
        here = len(self.scheduler)
        try:
            self.scheduler.submit(work)
        except QueueFullError:
            assert here == MAX_QUEUE_SIZE
        except DeadlineExceededError:
            assert deadline_s is not None
            assert deadline_action == "refuse"
        else:
            assert here < MAX_QUEUE_SIZE
            self.works[work.request_id] = work
            self.kept[work.request_id] = [0] * rows

    @rule(data=st.data())
    def plan(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.replicas) - 1))
        if number in self.available and (tick := self.scheduler.next_tick(number)) is not None:
            self.send(tick, number)

    def send(self, tick: Tick, number: int) -> None:
        self.check_tick(tick, number)
        for request_id in tick.admissions:
            self.replicas[number].admit(request_id, self.kept[request_id])
        self.replicas[number].ticks.append(tick)

    def check_tick(self, tick: Tick, number: int) -> None:
        assert tick.replica == number
        assert tick.rows
        assert tick.tokens == sum(self.works[request_id].tokens for request_id, _ in tick.rows)
        assert tick.tokens <= self.max_batch_tokens or len(tick.rows) == 1, "more tokens than a batch may have"
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
        for request_id in sorted(replica.resumed.keys() & {name for name, _ in replica.ticks[0].rows}):
            if data.draw(st.booleans(), f"the checkpoint of {request_id} is broken"):
                replica.begin_anew(request_id)
                self.scheduler.lose_checkpoint(request_id)
                self.kept[request_id] = [0] * self.works[request_id].num_rows
        tick = replica.run()
        self.now_s += 1
        for request_id in self.scheduler.finish_tick(tick.tick_id, 1.0):
            work = self.works[request_id]
            assert replica.done(request_id) == [work.num_steps] * work.num_rows, "a step was run twice or skipped"
            self.end(request_id)
            replica.drop(request_id)

    @precondition(lambda self: any(replica.admitted for replica in self.replicas))
    @rule(data=st.data())
    def copy_checkpoint(self, data: st.DataObject) -> None:
        busy = [replica for replica in self.replicas if replica.admitted]
        replica = data.draw(st.sampled_from(busy))
        request_id = data.draw(st.sampled_from(sorted(replica.admitted)))
        self.checkpoints.append((request_id, replica.done(request_id)))

    @precondition(lambda self: self.checkpoints)
    @rule(data=st.data())
    def keep_checkpoint(self, data: st.DataObject) -> None:
        request_id, done = self.checkpoints.pop(data.draw(st.integers(0, len(self.checkpoints) - 1)))
        if request_id in self.scheduler and self.scheduler.keep(request_id, done):
            assert all(before <= now for before, now in zip(self.kept[request_id], done, strict=True))
            self.kept[request_id] = done

    @rule(tokens=st.integers(1, 12))
    def learn_limit(self, tokens: int) -> None:
        self.scheduler.learn_limits(tokens)
        self.max_batch_tokens = min(self.max_batch_tokens, tokens)

    @precondition(lambda self: len(self.scheduler))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([name for name in self.works if name in self.scheduler]))
        self.end(request_id)
        for replica in self.replicas:
            replica.drop(request_id)

    @rule()
    def drop_late(self) -> None:
        for number, replica in enumerate(self.replicas):
            for request_id in self.scheduler.late_requests(number):
                assert self.works[request_id].deadline_action != "continue"
                self.end(request_id)
                replica.drop(request_id)

    @rule(data=st.data(), comes_back=st.booleans())
    def die(self, data: st.DataObject, comes_back: bool) -> None:
        number = data.draw(st.integers(0, len(self.replicas) - 1))
        started = {name for name in self.replicas[number].admitted if name in self.scheduler}
        assert set(self.scheduler.reset_replica(number)) == started
        self.replicas[number] = CountingReplica()
        for request_id in started:
            assert self.scheduler.entry(request_id).done == self.kept[request_id], "what is kept is not lost"
        if not comes_back and number in self.available:
            self.available.discard(number)
            self.scheduler.set_available(number, False)
            assert not self.available or not self.scheduler.requests_of(number), "all of it moves"

    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.replicas) - 1))
        self.available.add(number)
        self.scheduler.set_available(number, True)

    def end(self, request_id: str) -> None:
        self.scheduler.remove(request_id)
        self.ends[request_id] += 1

    @invariant()
    def no_row_has_run_more_steps_than_it_has(self) -> None:
        for replica in self.replicas:
            for (request_id, _), steps in replica.steps.items():
                assert steps <= self.works[request_id].num_steps

    @invariant()
    def work_and_deadlines_are_counted_right(self) -> None:
        here = self.scheduler.entries()
        assert self.scheduler.num_deadlines == sum(entry.work.deadline_s is not None for entry in here)
        for number, queue in enumerate(self.scheduler._replicas):
            assert queue.work_left == sum(entry.work_left for entry in here if entry.replica == number)
            for entry in queue.entries.values():
                assert 0 <= entry.unplanned <= entry.steps_left
                assert entry.steps_left == sum(entry.work.num_steps - done for done in entry.done)
                assert entry.kept == self.kept[entry.work.request_id]
            assert all(lane.entries for lane in queue.lanes.values())

    @invariant()
    def the_scheduler_holds_what_has_not_ended(self) -> None:
        assert {name for name in self.works if name in self.scheduler} == set(self.works) - set(self.ends)

    def teardown(self) -> None:
        """Every admitted request ends exactly once: those that are left now run to their end."""
        if not hasattr(self, "scheduler"):
            return
        for number in range(len(self.replicas)):
            self.scheduler.set_available(number, True)
        for number, replica in enumerate(self.replicas):
            for _ in range(10_000):
                if (tick := self.scheduler.next_tick(number)) is not None:
                    self.send(tick, number)
                if not replica.ticks:
                    break
                done = replica.run()
                for request_id in self.scheduler.finish_tick(done.tick_id, 1.0):
                    self.end(request_id)
        assert len(self.scheduler) == 0
        assert self.ends == Counter(dict.fromkeys(self.works, 1))


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("policy", ["fair", "drr"])
@settings(max_examples=60, deadline=None)
@given(
    mix=st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from("xyz"), st.integers(1, 6), st.integers(1, 6)),
        min_size=1,
        max_size=12,
    ),
    victim=st.tuples(st.integers(0, 9), st.sampled_from("xyz"), st.integers(1, 6), st.integers(1, 6)),
)
@example(mix=[(4, "x", 6, 4)], victim=(0, "y", 4, 6))
def test_no_request_starves_under_any_mix_that_keeps_coming(
    policy: PolicyName, mix: list[tuple[int, str, int, int]], victim: tuple[int, str, int, int]
) -> None:
    """Whatever arrives anew at every tick, more than can ever be run, a request that was taken comes to its end."""
    now_s = 0.0
    scheduler = Scheduler(
        num_replicas=1,
        max_queue_size=100_000,
        max_batch_tokens=4,
        clock=lambda: now_s,
        policy=policy,
        ageing_s=2.0,
        cost_model=CostModel([(1, 0.1), (4, 0.2)]),
    )

    def submit(name: str, shape: tuple[int, str, int, int]) -> None:
        priority, key, steps, tokens = shape
        scheduler.submit(
            Work(request_id=name, batch_key=key, num_rows=1, num_steps=steps, tokens=tokens, priority=priority)
        )

    submit("victim", victim)
    for number in range(1500):
        submit(f"{number}", mix[number % len(mix)])
        tick = scheduler.next_tick(0)
        assert tick is not None
        now_s += 0.2
        for request_id in scheduler.finish_tick(tick.tick_id, 0.2):
            scheduler.remove(request_id)
        if "victim" not in scheduler:
            return
    raise AssertionError(f"not through after {now_s:.0f} s")
