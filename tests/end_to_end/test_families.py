"""Every family through the real server: served under names of their own, loaded and unloaded while others work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.end_to_end.conftest import RunningServer, shared_memory

from checkpoints.families import CASES, QWEN_EDIT, SMALL
from checkpoints.stages import InProcessStages
from triton_diffusion.config import ChainConfig
from triton_diffusion.families.registry import FAMILIES, find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.repository import build_repository
from triton_diffusion.server import TritonServer
from triton_diffusion.stages.input_validation import IncomingRequest, InputValidationStage
from triton_diffusion_client import DiffusionClient, ModelNotFoundError, ServerUnavailableError
from triton_diffusion_client._connection import Connection
from triton_diffusion_client._model_control import ModelControl

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(240)]

STAYS = "stays"
"""The name of a checkpoint that is served all the time."""
PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


CASES_HERE = CASES | {"qwen_edit": QWEN_EDIT}
QUICKLY = ("flux", "glm_image", "wan")
"""Asked in every run: a picture to start from, an autoregressive prior, videos of two experts. It takes half a minute
to load a family on two cores, so that the others wait for `scripts/test -m slow`."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: case.build(folder / name) for name, case in CASES_HERE.items()}


@pytest.fixture(scope="module")
def families(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with the models of all families in its repository, of which only one is loaded at the start."""
    folder = tmp_path_factory.mktemp("families")
    common = {"dtype": "float32", "warmup_resolutions": "none", "max_batch_tokens": "1000", "num_threads": "1"}
    for name, checkpoint in {STAYS: folders["flux"], **folders}.items():
        opened = open_checkpoint(str(checkpoint))
        stages = find_family(opened).stage_components(opened)
        build_repository(folder / "models", common | {"model_path": str(checkpoint)}, name=name, stages=stages)
    before = shared_memory()
    arguments = ["--model-control-mode=explicit", "--disable-auto-complete-config"]
    arguments += [f"--load-model={path.name}" for path in (folder / "models").glob(f"{STAYS}*")]
    server = TritonServer(
        folder / "models", log_file=folder / "server.log", exit_timeout_s=20, extra_arguments=arguments
    )
    with server as process:
        process.wait_until_ready(180)
        yield RunningServer(process, process.http_address, process.grpc_address, folder / "server.log")
    assert not shared_memory() - before


def test_every_family_of_the_registry_is_asked() -> None:
    assert set(CASES) == {family.name for family in FAMILIES}


@pytest.mark.parametrize(
    "name", [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in CASES_HERE]
)
def test_a_family_is_loaded_asked_and_unloaded_while_another_works(
    families: RunningServer, folders: dict[str, Path], name: str
) -> None:
    """Its pictures or frames are those that its stages draw in this process, as its parity tests have them."""
    case = CASES_HERE[name]
    options = SMALL | case.options
    connection = Connection(protocol="grpc", address=families.grpc_url)
    connection = connection.with_admin_key(families.process.admin_key)
    with Neighbour(families) as neighbour, ModelControl(connection, timeout_s=120.0) as control:
        loaded = list(control.load(name))
        assert loaded[-1] == name
        images = [PICTURE] * case.num_images
        with DiffusionClient(families.grpc_url, model=name) as client:
            (family,) = client.families()
            served = find_family(open_checkpoint(str(folders[name])))
            assert family.family == served.name
            assert set(family.tasks) <= set(served.tasks)
            result = client.generate(
                "a red circle 'on' a blue star", image=to_png(images), output_format="raw", **options
            )
        assert list(control.unload(name)) == loaded[::-1]
    assert neighbour.pictures > 0
    ours = result.arrays
    expected = draw_in_process(folders[name], options, images)
    assert ours.shape == expected.shape
    assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1
    assert ours.std() > 5


def test_what_was_unloaded_is_unavailable(families: RunningServer) -> None:
    """It may be on its way back, so a client that is not told otherwise asks again."""
    with (
        DiffusionClient(families.grpc_url, model="wan", retries=0) as client,
        pytest.raises((ServerUnavailableError, ModelNotFoundError), match="Request for unknown model: 'wan'"),
    ):
        client.generate("a cat")


class Neighbour:
    """Asks the checkpoint that stays for one picture after the other, in a thread of its own."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._error: BaseException | None = None
        self.pictures = 0

    def _ask(self) -> None:
        try:
            with DiffusionClient(self._server.grpc_url, model=STAYS) as client:
                first = client.generate("two black cats", output_format="raw", **SMALL).arrays[0]
                while not self._ended.wait(0.5):
                    again = client.generate("two black cats", output_format="raw", **SMALL).arrays[0]
                    assert np.array_equal(first, again)
                    self.pictures += 1
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)
        if self._error is not None:
            raise self._error


def to_png(images: list[NDArray[np.uint8]]) -> list[bytes] | None:
    from triton_diffusion.media import encode_picture

    return [encode_picture(image, "png", 90) for image in images] or None


def draw_in_process(folder: Path, options: dict[str, Any], images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    checkpoint = open_checkpoint(str(folder))
    family = find_family(checkpoint)
    given = {"prompt": "a red circle 'on' a blue star", "output_format": "raw", **options}
    incoming = IncomingRequest(given, images)
    InputValidationStage(family, family.defaults(checkpoint), ChainConfig())([incoming])
    assert incoming.request is not None
    with torch.inference_mode():
        return InProcessStages(folder).pictures(incoming.request, images).numpy()
