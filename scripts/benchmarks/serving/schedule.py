"""What is asked for and when: drawn from a seed, so that it is the same for every side."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_SIZES = ("large", "small")
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
_SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
_PLACES = ("above", "below", "left of", "right of")


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request of a load that does not wait for answers."""

    at_s: float
    """Seconds after the begin of the load."""
    num_inference_steps: int


def poisson_arrivals(*, rate_per_s: float, num_inference_steps: Sequence[int], seed: int) -> list[Arrival]:
    """Arrivals at random moments, `rate_per_s` in the mean: one for each of the step counts, in their order."""
    generator = random.Random(seed)
    arrivals: list[Arrival] = []
    at_s = 0.0
    for steps in num_inference_steps:
        at_s += generator.expovariate(rate_per_s)
        arrivals.append(Arrival(at_s=at_s, num_inference_steps=steps))
    return arrivals


def even_mix(lowest: int, highest: int, count: int, seed: int) -> list[int]:
    """`count` whole numbers, spread evenly from `lowest` to `highest` and shuffled.

    Drawn one by one they would make the work of a short turn differ from that of the next.
    """
    span = highest - lowest
    numbers = [lowest + round(span * (index + 0.5) / count) for index in range(count)]
    random.Random(seed).shuffle(numbers)
    return numbers


def draw_prompt(seed: int) -> str:
    """A prompt; among many there are hardly two alike, so that no side gains by remembering some."""
    choose = random.Random(seed).choice
    first, second = (f"a {choose(_SIZES)} {choose(_COLOURS)} {choose(_SHAPES)}" for _ in range(2))
    return f"{first} {choose(_PLACES)} {second} on a {choose(_COLOURS)} background"
