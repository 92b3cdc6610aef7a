"""A closed loop in which a third of the requests are cancelled at a random moment.

How soon a request leaves the running batch is taken from the server's own account. The log tells when the scheduler
dropped it, and after how many steps; the metrics tell how many rows were computed in all, so that those in excess of
the steps told were computed for requests that had been dropped.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.picture import PictureRequest
from benchmarks.report import Figure
from benchmarks.running import LOG_FILE
from benchmarks.serving.bench import MOST_CLIENTS, Bench, planned
from benchmarks.serving.load import Ask, Planned, Sent, closed_loop, steady_window
from benchmarks.serving.metrics_page import PUBLISHED_AFTER_S, fetch_metrics
from benchmarks.serving.server_log import EndedRequest, read_ended_requests
from benchmarks.serving.sides import Ours, Side
from benchmarks.serving.summary import percentile, spread_figures
from benchmarks.serving.turns import take_turns

_GOAL_STEPS = 1.0
_CANCELLED_OF = 3
"""One of so many is cancelled."""
# tritonserver 24.10 aborts sooner or later when a model answers a caller that has cancelled (std::length_error in
# TRITONBACKEND_OutputBuffer), as the monolith does every time.
_SIDES = ("ours", "fastapi")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Departures:
    """How cancelled requests of one turn left our denoising stage."""

    drops_s: Sequence[float]
    """From each cancel until the scheduler had dropped the request."""
    step_s: float
    """The median step."""
    rows_after_drop: float
    """Rows computed for a dropped request, the one under way included; in the mean of the cancelled requests."""

    @property
    def drop_steps(self) -> list[float]:
        """The times until the drop, in steps."""
        return [drop_s / self.step_s for drop_s in self.drops_s]

    @property
    def mean_steps(self) -> float:
        """From the cancel until the row has left the batch, in steps.

        Of the step that is under way at the drop, half is still to come in the mean.
        """
        still_to_come = self.rows_after_drop - min(1.0, self.rows_after_drop) / 2
        return statistics.mean(self.drop_steps) + still_to_come


@dataclasses.dataclass(frozen=True, kw_only=True)
class StormTurn:
    """One turn of one side."""

    pictures_per_s: float
    """Of the requests that were not cancelled."""
    num_cancelled: int
    departures: Departures | None = None


def measure(bench: Bench) -> Mapping[str, Sequence[StormTurn]]:
    """Our side and the one over HTTP, by round."""
    names = [name for name in bench.names if name in _SIDES]
    if not names:
        return {}

    def play(name: str, index: int) -> StormTurn:
        async def load(side: Side) -> StormTurn:
            return await _turn(bench, side, seed=index)

        return bench.take_turn(name, load)

    return take_turns("cancel storm", names, bench.scale.rounds, play)


async def _turn(bench: Bench, side: Side, *, seed: int) -> StormTurn:
    plain = await closed_loop(side.ask, map(planned, bench.pictures()), clients=MOST_CLIENTS, num_answers=MOST_CLIENTS)
    latency_s = statistics.median(sent.latency_s for sent in plain)
    plan = cancelling_plan(bench.pictures(), within_s=latency_s, seed=seed)
    if isinstance(side, Ours):
        sent, departures = await _observed(bench, side, plan)
    else:
        sent, departures = await _storm(bench, side.ask, plan), None
    num_pictures = bench.scale.storm_pictures
    begin_s, end_s = steady_window(sent, clients=MOST_CLIENTS, num_pictures=num_pictures)
    return StormTurn(
        pictures_per_s=num_pictures / (end_s - begin_s),
        num_cancelled=sum(each.cancelled for each in sent),
        departures=departures,
    )


async def _storm(bench: Bench, ask: Ask, plan: Iterator[Planned]) -> list[Sent]:
    num_answers = MOST_CLIENTS + bench.scale.storm_pictures
    return await closed_loop(ask, plan, clients=MOST_CLIENTS, num_answers=num_answers)


def cancelling_plan(pictures: Iterator[PictureRequest], *, within_s: float, seed: int) -> Iterator[Planned]:
    """The requests, a third of which are cancelled at a random moment of the first `within_s` seconds.

    Each of those asks for a number of steps of its own: the log tells it, and so which of them it speaks of.
    """
    generator = random.Random(seed)
    num_cancelled = 0
    for index, picture in enumerate(pictures):
        if index % _CANCELLED_OF == _CANCELLED_OF - 1:
            num_cancelled += 1
            longer = dataclasses.replace(picture, num_inference_steps=picture.num_inference_steps + num_cancelled)
            yield Planned(request=longer, cancel_after_s=generator.uniform(0, within_s))
        else:
            yield planned(picture)


async def _observed(bench: Bench, side: Ours, plan: Iterator[Planned]) -> tuple[list[Sent], Departures]:
    steps_s: list[float] = []

    async def ask(request: PictureRequest) -> bytes:
        result = await side.client.generate(request.prompt, **request.client_options())
        steps_s.extend(result.timings.steps_s)
        return result.outputs[0].data

    await asyncio.sleep(PUBLISHED_AFTER_S)
    rows_before = _rows(side)
    log_begin = LOG_FILE.stat().st_size
    sent = await _storm(bench, ask, plan)
    await asyncio.sleep(PUBLISHED_AFTER_S)
    with LOG_FILE.open("rb") as log:
        log.seek(log_begin)
        ended = list(read_ended_requests(log.read().decode(errors="replace")))
    return sent, departures(sent, ended, num_rows=_rows(side) - rows_before, step_s=statistics.median(steps_s))


def _rows(side: Ours) -> float:
    return fetch_metrics(side.server.metrics_url)["batch_rows_total", "denoising"]


def departures(sent: Sequence[Sent], ended: Sequence[EndedRequest], *, num_rows: float, step_s: float) -> Departures:
    """Bring together what the callers did, what the log tells, and how many rows were computed."""
    cancelled_s = {each.request.num_inference_steps: each.ended_s for each in sent if each.cancelled}
    in_batch = [each for each in ended if each.cancelled and each.steps_done and each.num_steps in cancelled_s]
    rows_after_drops = num_rows - sum(each.steps_done for each in ended)
    return Departures(
        # The log's clock counts milliseconds.
        drops_s=[max(0.0, each.ended_s - cancelled_s[each.num_steps]) for each in in_batch],
        step_s=step_s,
        rows_after_drop=max(0.0, rows_after_drops) / max(1, sum(each.cancelled for each in ended)),
    )


def figures(turns: Mapping[str, Sequence[StormTurn]]) -> list[Figure]:
    """Throughput of those that stayed, and how soon the others were gone."""
    title = f"cancel storm, {MOST_CLIENTS} clients, one of {_CANCELLED_OF} cancelled"
    made = []
    for name, by_round in turns.items():
        made += spread_figures(f"{title}: {name}, the others", [each.pictures_per_s for each in by_round], "pictures/s")
        made.append(Figure(name=f"{title}: {name}, cancelled", value=sum(each.num_cancelled for each in by_round)))
    seen = [each.departures for each in turns.get("ours", ()) if each.departures and each.departures.drops_s]
    return made + (_departure_figures(title, seen) if seen else [])


def _departure_figures(title: str, seen: Sequence[Departures]) -> list[Figure]:
    drops_ms = [1000 * drop_s for each in seen for drop_s in each.drops_s]
    drop_steps = [steps for each in seen for steps in each.drop_steps]
    by_round = [each.mean_steps for each in seen]
    return [
        Figure(name=f"{title}: step, median", value=1000 * statistics.median(each.step_s for each in seen), unit="ms"),
        Figure(name=f"{title}: cancel to drop, p50", value=percentile(drops_ms, 50), unit="ms"),
        Figure(name=f"{title}: cancel to drop, p99", value=percentile(drops_ms, 99), unit="ms"),
        Figure(name=f"{title}: cancel to drop, p99", value=percentile(drop_steps, 99), unit="steps"),
        Figure(
            name=f"{title}: rows of a dropped request, mean",
            value=statistics.mean(each.rows_after_drop for each in seen),
        ),
        Figure(
            name=f"{title}: cancel until the row has left the batch, mean",
            value=statistics.median(by_round),
            unit="steps",
            at_most=_GOAL_STEPS,
        ),
        *spread_figures(f"{title}: cancel until the row has left the batch, mean", by_round, "steps")[1:],
    ]
