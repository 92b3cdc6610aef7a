"""The load, with and without faults."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.examiner import Examiner
from benchmarks.faults.ranks import Fault, Injector
from benchmarks.faults.recovery import ServerLog
from benchmarks.picture import PictureRequest
from benchmarks.serving.load import Planned, Sent, closed_loop, counted
from benchmarks.serving.schedule import draw_prompt, even_mix

FEWEST_STEPS, MOST_STEPS = 8, 32
# So long do the clients go on behind the last fault, for a rank that is stopped is noticed when it is needed.
_SETTLING_TIMEOUT_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of one load."""

    examiner: Examiner
    begin_s: float
    duration_s: float
    sent: Sequence[Sent]
    """All that were asked for, those that were answered after the end, too."""
    faults: Sequence[Fault] = ()
    recoveries_s: Sequence[float | None] = ()
    """Seconds until the group was ready again, by fault; None: it was not."""

    @property
    def pictures_per_s(self) -> float:
        """Answers between the begin and the end."""
        end_s = self.begin_s + self.duration_s
        return sum(each.ended_s <= end_s for each in self.sent) / self.duration_s

    @property
    def hit_latencies_s(self) -> list[float]:
        """Of the requests that were under way at a fault, anywhere in the server."""
        return [
            each.latency_s
            for each in self.sent
            if any(each.sent_s <= fault.at_s <= each.ended_s for fault in self.faults)
        ]


def different_requests(count: int, max_sequence_length: int) -> list[PictureRequest]:
    """Pictures with prompts, seeds and step counts of their own."""
    first = PictureRequest(
        seed=0, height=128, width=128, num_inference_steps=1, max_sequence_length=max_sequence_length
    )
    return [
        dataclasses.replace(first, seed=seed, prompt=draw_prompt(seed), num_inference_steps=steps)
        for seed, steps in enumerate(even_mix(FEWEST_STEPS, MOST_STEPS, count, seed=0))
    ]


async def undisturbed_trial(
    examiner: Examiner, requests: Sequence[PictureRequest], *, clients: int, duration_s: float
) -> Trial:
    """The clients alone."""
    begin_s = time.time()
    plan = counted(_plan(requests, lambda: time.time() < begin_s + duration_s), "without faults", duration_s)
    sent = await closed_loop(examiner.ask, plan, clients=clients, check=_take_any)
    return Trial(examiner=examiner, begin_s=begin_s, duration_s=duration_s, sent=sent)


async def disturbed_trial(
    examiner: Examiner,
    requests: Sequence[PictureRequest],
    injector: Injector,
    *,
    clients: int,
    duration_s: float,
    every_s: float,
    log_path: Path,
) -> Trial:
    """The clients, and a fault every `every_s` seconds."""
    log = ServerLog(log_path)
    begin_s = time.time()
    end_s = begin_s + duration_s

    async def disturb() -> None:
        await injector.run(every_s=every_s, until_s=end_s)
        await asyncio.sleep(end_s - time.time())
        await log.wait_until_recovered(injector.faults, _SETTLING_TIMEOUT_S)

    disturbing = asyncio.create_task(disturb())
    plan = counted(_plan(requests, lambda: not disturbing.done()), "with faults", duration_s)
    sent = await closed_loop(examiner.ask, plan, clients=clients, check=_take_any)
    await disturbing
    return Trial(
        examiner=examiner,
        begin_s=begin_s,
        duration_s=duration_s,
        sent=sent,
        faults=injector.faults,
        recoveries_s=log.recovery_times(injector.faults),
    )


def _plan(requests: Sequence[PictureRequest], goes_on: Callable[[], bool]) -> Iterator[Planned]:
    """The requests in a random order, again and again."""
    shuffled = random.Random(0).sample(requests, len(requests))
    return (Planned(request=request) for request in itertools.takewhile(lambda _: goes_on(), itertools.cycle(shuffled)))


def _take_any(_answer: bytes) -> None:
    """The examiner has looked at it."""
