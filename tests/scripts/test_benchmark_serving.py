"""scripts/benchmark serving: what is computed there, without a server."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.picture import PictureRequest
from benchmarks.serving.cancel_storm import Departures, cancelling_plan, departures
from benchmarks.serving.closed_loop import ClosedLoopResult, figures
from benchmarks.serving.load import Planned, Sent, closed_loop, open_loop, steady_window
from benchmarks.serving.metrics_page import parse_metrics
from benchmarks.serving.schedule import Arrival, draw_prompt, even_mix, poisson_arrivals
from benchmarks.serving.server_log import EndedRequest, read_ended_requests
from benchmarks.serving.summary import LoneLatency, percentile, ratio_figures, spread_figures
from benchmarks.serving.turns import take_turns

PICTURE = PictureRequest(seed=0, height=128, width=128, num_inference_steps=20, max_sequence_length=32)
PNG = b"\x89PNG\r\n\x1a\n..."


def make_sent(ended_s: float, *, steps: int = 20, cancelled: bool = False) -> Sent:
    request = dataclasses.replace(PICTURE, num_inference_steps=steps)
    return Sent(request=request, sent_s=0.0, ended_s=ended_s, cancelled=cancelled)


# What is asked for, and when.


def test_arrivals_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    first, again, other = (
        poisson_arrivals(rate_per_s=2.0, num_inference_steps=[4, 5, 6], seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert [each.num_inference_steps for each in first] == [4, 5, 6]


def test_gaps_between_arrivals_have_the_mean_and_the_deviation_of_a_poisson_process() -> None:
    arrivals = poisson_arrivals(rate_per_s=4.0, num_inference_steps=[1] * 20_000, seed=0)
    times_s = [0.0, *(each.at_s for each in arrivals)]
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    assert statistics.mean(gaps_s) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps_s) == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("count", [8, 24, 200])
def test_a_mix_of_step_counts_has_the_mean_of_the_range_whatever_its_length(count: int) -> None:
    mix = even_mix(4, 50, count, seed=3)
    assert len(mix) == count
    assert min(mix) >= 4
    assert max(mix) <= 50
    assert statistics.mean(mix) == pytest.approx(27, abs=0.51)
    assert mix != sorted(mix)


def test_prompts_hardly_repeat() -> None:
    assert len({draw_prompt(seed) for seed in range(1000)}) > 980


# Values to figures.


def test_a_percentile_lies_between_the_two_values_next_to_it() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert percentile([7.0], 99) == 7.0


def test_a_lone_latency_is_interpolated_between_the_measured_step_counts() -> None:
    lone = LoneLatency({50: 1.0, 4: 0.1, 20: 0.4})
    assert lone.at(4) == 0.1
    assert lone.at(12) == pytest.approx(0.25)
    assert lone.at(35) == pytest.approx(0.7)
    assert (lone.at(1), lone.at(80)) == (0.1, 1.0)


def test_the_goal_is_held_against_the_ratio_of_the_medians_and_the_rounds_show_the_spread() -> None:
    ratio, lowest, highest = ratio_figures("ratio", [2.0, 4.0, 9.0], [1.0, 2.0, 3.0], at_least=2.1)
    assert (ratio.value, ratio.goal, ratio.holds) == (2.0, ">= 2.1", False)
    assert (lowest.value, lowest.goal) == (2.0, None)
    assert (highest.value, highest.goal) == (3.0, None)


def test_the_spread_is_the_median_and_both_ends() -> None:
    assert [each.value for each in spread_figures("rate", [3.0, 1.0, 2.0])] == [2.0, 1.0, 3.0]


def test_goals_of_the_closed_loop_are_held_against_the_sides_that_they_name() -> None:
    one = {"ours": [3.0], "monolith": [2.0], "fastapi": [3.5], "litserve": [4.0]}
    sixteen = {"ours": [6.0], "monolith": [3.0], "litserve": [4.0], "limit": [6.5]}
    made = {each.name: each for each in figures(ClosedLoopResult(rates={1: one, 16: sixteen})) if each.goal}
    assert {name: each.goal for name, each in made.items()} == {
        "closed loop, 1 client: ours over fastapi": ">= 0.95",
        "closed loop, 16 clients: ours over monolith": ">= 2.2",
        "closed loop, 16 clients: ours over limit": ">= 0.9",
    }
    assert made["closed loop, 16 clients: ours over monolith"].value == 2.0


# The load.


class FakeSide:
    """Answers every request after a moment, and counts how many it has at a time."""

    def __init__(self, answer: bytes = PNG) -> None:
        self.answer = answer
        self.now = self.most = self.cancelled = 0

    async def ask(self, request: PictureRequest) -> bytes:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1
        return self.answer


def test_a_closed_loop_has_as_many_requests_under_way_as_clients_and_ends_with_none() -> None:
    side = FakeSide()
    plan = (Planned(request=PICTURE) for _ in itertools.count())
    sent = asyncio.run(closed_loop(side.ask, plan, clients=3, num_answers=7))
    assert side.most == 3
    assert side.now == 0
    assert 7 <= len(sent) <= 9


def test_a_closed_loop_cancels_what_is_planned_so_and_answers_alone_count() -> None:
    side = FakeSide()
    plan = (Planned(request=PICTURE, cancel_after_s=0.001 if index % 3 == 2 else None) for index in itertools.count())
    sent = asyncio.run(closed_loop(side.ask, plan, clients=1, num_answers=4))
    assert [each.cancelled for each in sent] == [False, False, True, False, False]
    assert side.cancelled == 1


def test_an_answer_that_is_no_png_file_ends_the_load() -> None:
    with pytest.raises(ValueError, match="no PNG file"):
        asyncio.run(closed_loop(FakeSide(b"error").ask, iter([Planned(request=PICTURE)]), clients=1))


def test_latencies_of_an_open_loop_count_from_the_moment_of_arrival() -> None:
    side = FakeSide()
    arrivals = [Arrival(at_s=at_s, num_inference_steps=20) for at_s in (0.0, 0.001, 0.002, 0.05)]
    sent = asyncio.run(open_loop(side.ask, arrivals, [PICTURE] * 4))
    assert side.most == 3
    assert [round(each.sent_s - sent[0].sent_s, 3) for each in sent] == [0.0, 0.001, 0.002, 0.05]
    assert all(each.latency_s >= 0.0099 for each in sent)


def test_the_steady_window_lies_between_the_ends_of_batches() -> None:
    ended_s: list[float] = [1.0] * 4 + [2.0] * 4 + [3.0] * 4 + [4.0] * 4
    sent = [make_sent(each) for each in ended_s] + [make_sent(0.5, cancelled=True)]
    assert steady_window(sent, clients=4, num_pictures=8) == (1.0, 3.0)


def test_the_order_of_the_turns_rotates() -> None:
    played: list[tuple[int, str]] = []

    def play(name: str, index: int) -> int:
        played.append((index, name))
        return index

    assert take_turns("title", ["a", "b", "c"], 2, play) == {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
    assert played == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]


# What the server tells.


def test_metrics_are_read_by_name_and_model() -> None:
    page = """# TYPE diffusion_ticks_total counter
diffusion_ticks_total{model="denoising"} 12
diffusion_tick_seconds_total{model="denoising"} 1.5e+01
nv_inference_count{model="denoising",version="1"} 3
diffusion_ticks_total{model="decoding"} 4
"""
    assert parse_metrics(page) == {
        ("ticks_total", "denoising"): 12.0,
        ("tick_seconds_total", "denoising"): 15.0,
        ("ticks_total", "decoding"): 4.0,
    }


def test_the_log_tells_how_requests_left_the_denoising_stage() -> None:
    log = """2026-11-24 12:00:00,250 INFO denoising triton_diffusion.runtime.service: denoising: request a-1 done after 20 of 20 steps, 0.5 s
2026-11-24 12:00:01,000 INFO denoising triton_diffusion.runtime.service: denoising: request a-2 failed: cancelled in denoising after 3 steps after 3 of 21 steps, 0.100 s
2026-11-24 12:00:01,000 INFO decoding triton_diffusion.runtime.service: decoding: request a-1 done after 1 of 1 steps, 0.010 s
I1124 12:00:01.000000 17 grpc_server.cc:2558] Started GRPCInferenceService
"""  # noqa: E501
    begin_s = datetime(2026, 11, 24, 12, 0, 0).timestamp()
    assert list(read_ended_requests(log)) == [
        EndedRequest(ended_s=begin_s + 0.25, cancelled=False, steps_done=20, num_steps=20),
        EndedRequest(ended_s=begin_s + 1.0, cancelled=True, steps_done=3, num_steps=21),
    ]


# The cancel storm.


def test_one_of_three_is_cancelled_and_has_a_number_of_steps_of_its_own() -> None:
    plan = list(cancelling_plan(iter([PICTURE] * 30), within_s=2.0, seed=1))
    cancelled = [each for each in plan if each.cancel_after_s is not None]
    assert len(cancelled) == 10
    assert all(each.cancel_after_s is not None and 0 <= each.cancel_after_s <= 2.0 for each in cancelled)
    assert [each.request.num_inference_steps for each in cancelled] == list(range(21, 31))
    assert {each.request.num_inference_steps for each in plan if each.cancel_after_s is None} == {20}


def make_ended(ended_s: float, steps_done: int, num_steps: int, *, cancelled: bool = True) -> EndedRequest:
    return EndedRequest(ended_s=ended_s, cancelled=cancelled, steps_done=steps_done, num_steps=num_steps)


def seen(ended: Sequence[EndedRequest], *, num_rows: float) -> Departures:
    sent = [
        make_sent(10.0),
        make_sent(11.0, steps=21, cancelled=True),
        make_sent(12.0, steps=22, cancelled=True),
        make_sent(13.0, steps=23, cancelled=True),
    ]
    return departures(sent, ended, num_rows=num_rows, step_s=0.1)


def test_drops_are_counted_from_the_cancel_of_the_same_request() -> None:
    ended = [make_ended(12.04, 7, 22), make_ended(11.02, 3, 21), make_ended(10.0, 20, 20, cancelled=False)]
    assert seen(ended, num_rows=30).drops_s == pytest.approx([0.04, 0.02])


def test_a_request_that_was_dropped_before_its_first_step_was_in_no_batch() -> None:
    assert seen([make_ended(11.02, 0, 21)], num_rows=0).drops_s == []


def test_rows_in_excess_of_the_steps_told_belong_to_dropped_requests() -> None:
    ended = [make_ended(11.02, 3, 21), make_ended(12.04, 7, 22), make_ended(10.0, 20, 20, cancelled=False)]
    told = seen(ended, num_rows=20 + 3 + 7 + 4)
    assert told.rows_after_drop == 2.0
    # 0.3 steps until the drop in the mean, half of the step then under way, and the one after it.
    assert told.mean_steps == pytest.approx(0.3 + 0.5 + 1.0)
