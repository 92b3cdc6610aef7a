"""One rank of a group of two, for test_parallelism: reads a scenario's name a line, answers with a line of JSON.

Not a test module: it is run as a program, once a rank.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from checkpoints.requests import make_request
from triton_diffusion.config import ParallelConfig
from triton_diffusion.distributed.cfg import cfg_share, run_cfg_parallel
from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.errors import InvalidRequestError, ResourceExhaustedError, to_wire
from triton_diffusion.stages.base import PipelineStage, StageParallelism, StageRequest
from triton_diffusion.stages.executor import run_stage


class MarkingStage(PipelineStage[StageRequest]):
    """Leaves its rank and a random number, so that it shows where it ran and whose result an item has."""

    name = "marking"

    def __init__(self, rank: int, fails_on: int | None = None) -> None:
        self.runs = 0
        self._rank = rank
        self._fails_on = fails_on

    def forward(self, batch: Sequence[StageRequest]) -> None:
        self.runs += 1
        if self._fails_on == self._rank:
            raise InvalidRequestError(f"refused by {self._rank}")
        for item in batch:
            item.outputs["rank"] = torch.tensor([self._rank])
            item.outputs["sampled.tokens"] = torch.randint(2**40, (5,))
            item.outputs["half"] = torch.randn(2, 3).bfloat16().t()


class Replicated(MarkingStage):
    parallelism: ClassVar = StageParallelism.REPLICATED


class MainRankOnly(MarkingStage):
    parallelism: ClassVar = StageParallelism.MAIN_RANK_ONLY


class SendToOthers(MarkingStage):
    parallelism: ClassVar = StageParallelism.MAIN_RANK_ONLY_AND_SEND_TO_OTHERS


class Guided(PipelineStage[StageRequest]):
    """Makes a conditional and, behind all of those, an unconditional prediction of every item.

    Each has the number of the prediction and the rank that made it.
    """

    name = "guided"
    parallelism: ClassVar = StageParallelism.CFG_PARALLEL

    def __init__(self, group: RankGroup, fails_on: int | None, is_guided: bool) -> None:
        self.runs = 0
        self._group = group
        self._fails_on = fails_on
        self._is_guided = is_guided

    def forward(self, batch: Sequence[StageRequest]) -> None:
        kinds = ["conditional", "unconditional"] if self._is_guided else ["conditional"]
        numbers = torch.arange(len(kinds) * len(batch))
        own = numbers[cfg_share(self._group, len(numbers))]
        predictions = run_cfg_parallel(self._group, len(numbers), lambda: self._predict(own))
        if predictions is None:
            return
        for index, prediction in enumerate(predictions):
            batch[index % len(batch)].outputs[kinds[index // len(batch)]] = prediction

    def _predict(self, numbers: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        if self._fails_on == self._group.rank:
            raise InvalidRequestError(f"refused by {self._group.rank}")
        return torch.stack([numbers, torch.full_like(numbers, self._group.rank)], 1)


STAGES = {stage.parallelism.value: stage for stage in (Replicated, MainRankOnly, SendToOthers)}
SCENARIOS: dict[str, Callable[..., Any]] = {}


def scenario(function: Callable[..., Any]) -> Callable[..., Any]:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def stage(group: RankGroup, parallelism: str, fails_on: int | None) -> dict[str, Any]:
    """Run a stage on two requests, and have the ranks agree on who failed."""
    return _run(STAGES[parallelism](group.rank, fails_on), ("a", "b"), group)


@scenario
def cfg_stage(group: RankGroup, names: list[str], is_guided: bool, fails_on: int | None) -> dict[str, Any]:
    """The same with predictions that the ranks of the cfg axis share."""
    return _run(Guided(group, fails_on, is_guided), names, group)


def _run(one: MarkingStage | Guided, names: Sequence[str], group: RankGroup) -> dict[str, Any]:
    batch = [StageRequest(name, make_request(), inputs={}) for name in names]
    failures: dict[str, BaseException] = {}
    try:
        run_stage(one, batch, group)
    except InvalidRequestError as error:
        failures = {item.request_id: error for item in batch}
    agreed = group.agree(failures)
    return {
        "runs": one.runs,
        "raised": bool(failures),
        "agreed": {request_id: to_wire(error) for request_id, error in agreed.items()},
        "outputs": [{name: tensor.tolist() for name, tensor in item.outputs.items()} for item in batch],
        "dtypes": [{name: str(tensor.dtype) for name, tensor in item.outputs.items()} for item in batch],
    }


@scenario
def broadcast(group: RankGroup, size_bytes: int) -> dict[str, Any]:
    """Rank 0's bytes, as they arrive."""
    data = torch.randint(256, (size_bytes,), dtype=torch.uint8).numpy().tobytes() if group.is_main else None
    received = group.broadcast_bytes(data)
    return {"length": len(received), "hash": hashlib.sha256(received).hexdigest(), "intact": data in (None, received)}


@scenario
def agree(group: RankGroup, own: list[dict[str, str]]) -> dict[str, Any]:
    """The ranks agree on the failures that each has of its own."""
    failures = {
        request_id: ResourceExhaustedError(text) if text == "out of memory" else RuntimeError(text)
        for request_id, text in own[group.rank].items()
    }
    return {request_id: to_wire(error) for request_id, error in group.agree(failures).items()}


def main() -> None:
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        print(store.port, flush=True)
    else:
        store = dist.TCPStore("127.0.0.1", int(sys.stdin.readline()), 2, is_master=False)
    group = RankGroup(rank=rank, size=2, device=torch.device("cpu"), store=store, parallel=ParallelConfig(cfg=2))
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(SCENARIOS[name](group, **arguments)), flush=True)
    group.close()


if __name__ == "__main__":
    main()
