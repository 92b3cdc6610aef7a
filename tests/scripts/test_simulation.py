"""scripts/simulate: the real scheduler under a simulated clock."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from simulation.__main__ import main
from simulation.cost_table import CostTable, load_cost_table
from simulation.report import GroupSummary, summarise
from simulation.simulator import Ended, Result, Settings, SimulatedPolicy, simulate
from simulation.workload import Kind, Workload, capacity_per_s, load_mix
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.runtime.calibration import Calibration, write_calibration
from triton_diffusion.scheduler import Scheduler

TABLE = load_cost_table("demo-cpu")
POLICIES: list[SimulatedPolicy] = ["fair", "drr", "fifo", "reference"]


def make_workload(mix: str = "short-long", load: float = 0.7, replicas: int = 1, **values: Any) -> Workload:
    kinds = load_mix(mix, TABLE)
    rate_per_s = load * replicas * capacity_per_s(kinds, TABLE, guided_share=values.get("guided_share", 0.0))
    return Workload(**{"kinds": kinds, "rate_per_s": rate_per_s, "num_requests": 400} | values)


def groups_of(result: Result, workload: Workload, policy: str) -> dict[str, GroupSummary]:
    summary = summarise(result, workload, policy=policy, num_replicas=1, load=0.7, slo_factor=3)
    return {group.group: group for group in summary.groups}


# What happens.


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
def test_every_request_ends_once_and_no_step_runs_twice(policy: SimulatedPolicy, arrivals: str) -> None:
    workload = make_workload(
        "images-videos",
        load=1.2,
        replicas=3,
        arrivals=arrivals,
        burst_s=5.0,
        guided_share=0.3,
        priorities=(2, 5, 9),
        deadline_factor=8.0,
        deadline_action="drop",
        cancel_share=0.3,
    )
    result = simulate(workload, TABLE, Settings(policy=policy, num_replicas=3, ticks_in_flight=2, max_queue_size=20))
    assert len(result.ended) == 400
    assert {Ended(each) for each in result.ended} >= {Ended.DONE, Ended.DROPPED, Ended.CANCELLED}
    assert (result.latency_s >= 0).all()


def test_the_steps_run_are_those_that_were_asked_for() -> None:
    workload = make_workload()
    result = simulate(workload, TABLE, Settings(policy="fair"))
    steps = np.array([kind.fewest_steps for kind in workload.kinds])[result.kind]
    assert (result.ended == Ended.DONE).all()
    assert (result.steps_run, result.steps_wasted) == (steps.sum(), 0)


def test_steps_of_requests_that_went_away_are_counted_as_wasted() -> None:
    for policy in POLICIES:
        workload = make_workload(cancel_share=1.0, cancel_within=1.0)
        result = simulate(workload, TABLE, Settings(policy=policy))
        assert (result.ended == Ended.CANCELLED).sum() > 200
        assert 0 < result.steps_wasted < result.steps_run


def test_a_scheduler_that_runs_a_step_too_many_is_found_out() -> None:
    again: set[str] = set()

    class Twice(Scheduler):
        def finish_tick(self, tick_id: int, duration_s: float) -> list[str]:
            ended = super().finish_tick(tick_id, duration_s)
            for request_id in ended[:1]:
                if self.entry(request_id).work.num_steps == 4 and request_id not in again:
                    again.add(request_id)
                    entry = self.entry(request_id)
                    entry.done[0] = entry.planned[0] = 3
                    entry.steps_left = entry.unplanned = 1
                    return ended[1:]
            return ended

    def make(settings: Settings, table: CostTable, clock: Any) -> Scheduler:
        return Twice(num_replicas=1, max_queue_size=500, max_batch_tokens=table.max_batch_tokens, clock=clock)

    with pytest.raises(AssertionError, match="ended as done after 5 steps"):
        simulate(make_workload(), TABLE, Settings(policy="fair"), make_scheduler=make)


def test_the_same_seed_gives_the_same_result_and_another_seed_another() -> None:
    def latencies(seed: int) -> list[float]:
        workload = make_workload("images", replicas=4, seed=seed, arrivals="bursty")
        return list(simulate(workload, TABLE, Settings(policy="fair", num_replicas=4)).latency_s)

    assert latencies(1) == latencies(1)
    assert latencies(1) != latencies(2)


def test_a_request_that_is_alone_takes_its_lone_latency() -> None:
    workload = make_workload(load=1e-6, num_requests=20)
    result = simulate(workload, TABLE, Settings(policy="fair", noise=0.0))
    np.testing.assert_allclose(result.latency_s, result.lone_s)


def test_an_overload_is_refused_and_counts_as_missed() -> None:
    workload = make_workload(load=5.0)
    result = simulate(workload, TABLE, Settings(policy="fifo", max_queue_size=10))
    everyone = groups_of(result, workload, "fifo")["all"]
    assert everyone.refused > 100
    assert everyone.slo_percent is not None
    assert everyone.slo_percent <= 100 * (1 - everyone.refused / 400)


def test_progress_is_told_of_requests_that_have_ended_not_of_those_that_have_come() -> None:
    schedulers: list[Scheduler] = []

    def make(settings: Settings, table: CostTable, clock: Any) -> Scheduler:
        schedulers.append(
            Scheduler(num_replicas=1, max_queue_size=3000, max_batch_tokens=1, clock=clock, step_batching=False)
        )
        return schedulers[0]

    told: list[tuple[int, int]] = []
    simulate(
        make_workload(load=50.0, num_requests=2500),
        TABLE,
        Settings(policy="reference"),
        on_progress=lambda number: told.append((number, len(schedulers[0]))),
        make_scheduler=make,
    )
    assert told == [(1000, 1500), (1000, 500), (500, 0)]


def test_a_thousand_replicas_share_the_requests() -> None:
    workload = make_workload(load=0.3, replicas=1000, num_requests=1200)
    result = simulate(workload, TABLE, Settings(policy="fair", num_replicas=1000))
    assert (result.ended == Ended.DONE).all()
    # There is a free one for each.
    np.testing.assert_allclose(result.latency_s, result.lone_s, rtol=0.3)


# Policies.


def test_short_requests_fare_better_with_batches_at_every_step_than_one_after_the_other() -> None:
    workload = make_workload(load=0.7, num_requests=1500)
    fair, reference = (
        groups_of(simulate(workload, TABLE, Settings(policy=policy)), workload, policy)["short"].slowdown_p99
        for policy in ("fair", "reference")
    )
    assert fair is not None
    assert reference is not None
    assert fair < reference / 5


def test_videos_are_not_starved_by_images() -> None:
    workload = make_workload("images-videos", load=0.8, num_requests=800)
    groups = groups_of(simulate(workload, TABLE, Settings(policy="fair")), workload, "fair")
    assert groups["video"].slowdown_p99 is not None
    assert groups["image"].slowdown_p99 is not None
    assert groups["video"].slowdown_p99 < 30


# Loads.


def test_the_capacity_is_that_of_full_batches_or_of_one_request_after_the_other() -> None:
    table = CostTable(device="x", max_batch_tokens=40, curves={10: ((10, 1.0), (40, 2.0))})
    kinds = (
        Kind(name="a", group="a", share=1, tokens=10, fewest_steps=2, most_steps=4),
        Kind(name="b", group="b", share=3, tokens=10, fewest_steps=1, most_steps=1, num_rows=2),
    )
    # Full batches: 0.5 s a row and step, 3 of them for a and 2 for b.
    assert capacity_per_s(kinds, table) == pytest.approx(1 / (0.25 * 3 * 0.5 + 0.75 * 2 * 0.5))
    # Alone: 1 s a step of a, and of the two rows of b 4/3 s.
    assert capacity_per_s(kinds, table, batched=False) == pytest.approx(1 / (0.25 * 3 * 1.0 + 0.75 * 4 / 3))


def test_at_a_load_far_below_and_far_above_the_capacity_replicas_are_idle_and_busy() -> None:
    busy = {}
    for load in (0.1, 2.0):
        result = simulate(make_workload(load=load), TABLE, Settings(policy="fair", max_queue_size=1000))
        busy[load] = result.busy_s / result.duration_s
    assert busy[0.1] < 0.25
    assert busy[2.0] > 0.99


@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
def test_arrivals_have_the_asked_rate_in_the_mean(arrivals: str) -> None:
    workload = make_workload(num_requests=200_000, arrivals=arrivals, burst_s=0.5)
    workload = dataclasses.replace(workload, rate_per_s=50.0)
    at_s = np.concatenate([chunk.at_s for chunk in workload.chunks(TABLE)])
    assert (np.diff(at_s) >= 0).all()
    assert len(at_s) / at_s[-1] == pytest.approx(50, rel=0.1)
    by_second = np.bincount(at_s.astype(int))
    dispersion = by_second.var() / by_second.mean()
    assert dispersion == pytest.approx(1, rel=0.1) if arrivals == "poisson" else dispersion > 10


# Files.


def test_a_cost_table_is_read_as_the_server_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "denoising.json"
    measured = [(40, 2.0), (80, 3.0), (160, 6.0)]
    kept = Calibration(device="x", max_batch_tokens=80, measurements=measured, threads_by_tokens=[(40, 1)])
    write_calibration(file, kept)
    table = load_cost_table(str(file))
    assert (table.max_batch_tokens, table.row_tokens) == (80, 40)
    assert [table.tick_s(tokens, 40) for tokens in (20, 40, 60, 160, 320)] == [1.5, 2.0, 2.5, 6.0, 12.0]
    assert load_cost_table(str(file), max_batch_tokens=7).max_batch_tokens == 7


def test_attention_makes_long_rows_dearer_than_as_many_tokens_in_short_ones() -> None:
    table = CostTable(device="x", max_batch_tokens=1, curves={10: ((10, 1.0), (20, 2.0))}, attention_tokens=10)
    assert table.tick_s(20, 10) == 2.0
    assert table.tick_s(20, 20) == pytest.approx(2.0 * 3 / 2)


def test_the_published_ratios_hold_in_the_h200_table() -> None:
    table = load_cost_table("flux-h200")
    assert 28 * table.tick_s(4608, 4608) == pytest.approx(3.82, rel=0.001)
    alone = table.tick_s(1536, 1536)
    assert 3 * alone / table.tick_s(3 * 1536, 1536) == pytest.approx(2.69, rel=0.001)
    assert 16 * alone / table.tick_s(16 * 1536, 1536) == pytest.approx(3.21, rel=0.001)


KIND: dict[str, Any] = {"name": "a", "class": "a", "share": 1, "steps": 4, "tokens": 10}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is not JSON .*; mend it"),
        ("{}", "must be a JSON list with an object for each kind"),
        ("[]", "must be a JSON list with an object for each kind"),
        ([KIND | {"stepps": 4}], r"\[0\]: 'stepps' is not known.*steps"),
        ([KIND, {"name": "b"}], r"\[1\]: 'class' is missing; give all of name, class, share, steps"),
        ([KIND | {"relative_tokens": 1}], "one of 'tokens' and 'relative_tokens' is needed; give either"),
        ([KIND | {"share": 0}], r"\.share=0 must be a number above 0; change it"),
        ([KIND | {"tokens": 1.5}], r"\.tokens=1.5 must be a whole number above 0; change it"),
        ([KIND | {"steps": [9, 3]}], r"\.steps=\[9, 3\] must be \[fewest, most\]; exchange them"),
        ([KIND | {"steps": [1, 2, 3]}], r"\.steps=\[1, 2, 3\] must be a number or \[fewest, most\]; give two"),
        ([KIND, KIND], "the names a, a must differ; rename one"),
    ],
)
def test_a_mistake_in_a_mix_file_is_said_in_full(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "mix.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigurationError, match=message):
        load_mix(str(file), TABLE)


def test_an_unknown_name_offers_the_nearest_and_all() -> None:
    with pytest.raises(ConfigurationError, match=r"mix 'image' is neither built in nor a file.*images.*short-long"):
        load_mix("image", TABLE)
    with pytest.raises(ConfigurationError, match=r"cost table 'flux-h100' is neither built in.*flux-h200"):
        load_cost_table("flux-h100")


# The command.


def test_the_command_prints_a_line_for_each_policy_replicas_and_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new folder" / "results.json"
    flags = "--requests 100 --replicas 1 2 --policies fair fifo --noise 0 --priorities 5 9 --json"
    assert main([*flags.split(), str(file)]) == 0
    printed = capsys.readouterr().out
    lines = [line.split()[:3] for line in printed.splitlines()]
    for replicas in "12":
        for policy in ("fair", "fifo"):
            assert all([replicas, policy, group] in lines for group in ("all", "short", "long", "priority"))
    content = json.loads(file.read_text())
    assert content["settings"]["seed"] == 0
    assert [(each["policy"], each["replicas"]) for each in content["simulations"]] == [
        ("fair", 1),
        ("fifo", 1),
        ("fair", 2),
        ("fifo", 2),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--load 0", "error: --load=0.0 must be a number above 0; change it"),
        ("--replicas 1 0", "error: --replicas=0 must be a whole number above 0; change it"),
        ("--cancel-share 2", "error: --cancel-share=2.0 must be a share from 0 to 1; change it"),
        ("--mix nothing.json", "error: mix 'nothing.json' is neither built in nor a file"),
    ],
)
def test_a_wrong_flag_ends_the_command_with_one_line(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags.split()) == 2
    assert capsys.readouterr().err.startswith(message)
