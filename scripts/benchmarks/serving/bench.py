"""What every workload works with: the sides, and the pictures to ask for."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from benchmarks.in_process import InProcessPipeline
from benchmarks.picture import PictureRequest
from benchmarks.serving.load import Planned, closed_loop
from benchmarks.serving.scale import Scale
from benchmarks.serving.schedule import draw_prompt
from benchmarks.serving.sides import Ours, Side

_T = TypeVar("_T")

MOST_CLIENTS = 16


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All that is up."""

    sides: Mapping[str, Side]
    """By name: ours, monolith, fastapi, litserve, as far as they were asked for."""
    limit: InProcessPipeline | None
    """FluxPipeline without a server; it idles by itself while it is not asked."""
    runner: asyncio.Runner
    scale: Scale
    picture: PictureRequest
    """What is asked for, but for prompt, seed and steps."""
    _seeds: Iterator[int] = field(default_factory=itertools.count)

    @property
    def ours(self) -> Ours | None:
        """The project's own server, if it takes part."""
        side = self.sides.get("ours")
        return side if isinstance(side, Ours) else None

    @property
    def names(self) -> list[str]:
        """The sides that are served."""
        return list(self.sides)

    def take_turn(self, name: str, load: Callable[[Side], Coroutine[Any, Any, _T]]) -> _T:
        """Let one side go on, ask it for a picture that does not count, and put the load on it."""
        side = self.sides[name]

        async def turn() -> _T:
            await side.ask(dataclasses.replace(self.picture, num_inference_steps=2))
            return await load(side)

        with side.running():
            try:
                return self.runner.run(turn())
            except BaseException:
                self.runner.run(_cancel_all_tasks())
                raise

    def warm_up(self, name: str) -> None:
        """Have a side allocate and choose what it keeps: all clients at once, twice, with few steps."""

        async def load(side: Side) -> None:
            for steps in (2, 4):
                plan = map(planned, self.pictures(itertools.repeat(steps, MOST_CLIENTS)))
                await closed_loop(side.ask, plan, clients=MOST_CLIENTS)

        self.take_turn(name, load)

    def pictures(self, num_inference_steps: Iterable[int] | None = None) -> Iterator[PictureRequest]:
        """One picture after the other, each with a seed and a prompt of its own; without step counts endlessly."""
        if num_inference_steps is None:
            num_inference_steps = itertools.repeat(self.picture.num_inference_steps)
        for steps in num_inference_steps:
            seed = next(self._seeds)
            yield dataclasses.replace(self.picture, seed=seed, prompt=draw_prompt(seed), num_inference_steps=steps)


def planned(request: PictureRequest) -> Planned:
    """A request whose caller waits for its answer."""
    return Planned(request=request)


async def _cancel_all_tasks() -> None:
    """End what an error or Ctrl-C has left under way, before the clients are closed."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
