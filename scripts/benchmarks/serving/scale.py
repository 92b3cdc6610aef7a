"""How long and how often everything is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The lengths of one run."""

    rounds: int
    """Turns of each side in a workload."""
    pictures_by_clients: dict[int, int]
    """For each number of clients in a closed loop: pictures of a turn that count, a multiple of the clients."""
    lone_repeats: int
    """Pictures a turn and step count when the latency without load is measured."""
    batch_repeats: int
    """Passes over the batch sizes when the best one is looked for."""
    capacity_pictures: int
    """Pictures a turn when the capacity for mixed step counts is measured."""
    open_loop_s: float
    """Length of a turn with random arrivals."""
    num_shorts: int
    """Short requests a turn behind the long ones."""
    storm_pictures: int
    """Pictures of a turn that are not cancelled and count in the cancel storm."""
    saturation_pictures: int
    """Pictures a turn when the processor's time is looked at; enough for some seconds."""
    sweep_loads: tuple[float, ...]
    """Loads for the plot, as shares of the monolith's capacity."""
    sweep_s: float
    """Length of a side's turn at one of these loads."""


FULL = Scale(
    rounds=3,
    pictures_by_clients={1: 24, 4: 48, 16: 160},
    lone_repeats=4,
    batch_repeats=4,
    capacity_pictures=32,
    open_loop_s=14.0,
    num_shorts=12,
    storm_pictures=96,
    saturation_pictures=160,
    sweep_loads=(0.2, 0.5, 0.8, 1.0, 1.2),
    sweep_s=10.0,
)
QUICK = Scale(
    rounds=1,
    pictures_by_clients={1: 2, 4: 4, 16: 16},
    lone_repeats=1,
    batch_repeats=1,
    capacity_pictures=4,
    open_loop_s=5.0,
    num_shorts=4,
    storm_pictures=8,
    saturation_pictures=32,
    sweep_loads=(0.4, 1.2),
    sweep_s=4.0,
)
