"""On how many threads a tick runs: those of the cores it has waited for, and of others that are idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from triton_diffusion import run_folder
from triton_diffusion.config import ParallelConfig
from triton_diffusion.runtime.messages import DropRequest, Message, RankLaunch, RunTick, encode
from triton_diffusion.runtime.rank import _ServiceChannel
from triton_diffusion.runtime.turns import Turns

Tell = Callable[[Message], int | None]


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tell]:
    """Sends a message to a rank with core 0 that would like 1 and 2 as well; returns the threads for it."""
    monkeypatch.setenv(run_folder.VARIABLE, str(tmp_path))
    endpoint = f"ipc://{tmp_path}/socket"
    with zmq.Context() as context, context.socket(zmq.PAIR) as service:
        service.bind(endpoint)
        channel = _ServiceChannel(
            RankLaunch(
                stage_model="denoising",
                model_path="demo",
                dtype="auto",
                num_threads=3,
                cores=[0],
                more_cores=[1, 2],
                rank=0,
                group_size=1,
                replica=0,
                service_started_s=0.0,
                max_batch_tokens=0,
                warmup_sizes=None,
                prompt_cache_bytes=0,
                parallel=ParallelConfig(),
                attention_backend="auto",
                pack_linears=True,
                vae_tiling="auto",
                run_dir=str(tmp_path),
                endpoint=endpoint,
            )
        )

        def send(message: Message) -> int | None:
            service.send(encode(message))
            channel.receive()
            return channel.num_threads

        yield send
        channel.end_turn()
        channel._socket.close()


def tick(*, alone: bool) -> RunTick:
    return RunTick(tick_id=1, rows=[("a", 0)], num_steps=1, alone=alone)


def test_a_tick_that_is_alone_has_the_idle_cores_too(tell: Tell, tmp_path: Path) -> None:
    assert tell(tick(alone=True)) == 3
    assert not Turns(tmp_path, [1]).are_free()
    assert not Turns(tmp_path, [2]).are_free()


def test_cores_that_another_has_are_not_waited_for(tell: Tell, tmp_path: Path) -> None:
    with Turns(tmp_path, [2]).take():
        assert tell(tick(alone=True)) == 2


def test_beside_other_replicas_a_tick_leaves_them_their_cores(tell: Tell, tmp_path: Path) -> None:
    assert tell(tick(alone=False)) == 1
    assert Turns(tmp_path, [1, 2]).are_free()


def test_what_is_no_tick_takes_no_cores(tell: Tell, tmp_path: Path) -> None:
    tell(DropRequest(request_id="a"))
    assert Turns(tmp_path, [0, 1, 2]).are_free()
