"""The sides take turns, so that a slow moment of the machine hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

_T = TypeVar("_T")


def take_turns(title: str, names: Sequence[str], rounds: int, play: Callable[[str, int], _T]) -> dict[str, list[_T]]:
    """`play(name, round)` once a round for each side, in an order that rotates; the results of each side by round."""
    results: dict[str, list[_T]] = {name: [] for name in names}
    with tqdm(total=rounds * len(names), desc=title, unit="turn") as progress:
        for index in range(rounds):
            first = index % len(names)
            for name in [*names[first:], *names[:first]]:
                progress.set_postfix_str(name)
                results[name].append(play(name, index))
                progress.update()
    return results
