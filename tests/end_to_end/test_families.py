"""Every family through the real server: served under names of their own, loaded and unloaded while others work."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.end_to_end.conftest import RunningServer, shared_memory

from checkpoints.families import CASES, HUNYUAN_FROM_PICTURE, LTX_CONDITION, QWEN_EDIT, SMALL
from checkpoints.stages import InProcessStages
from triton_diffusion.config import ChainConfig
from triton_diffusion.families.registry import FAMILIES, find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.media import encode_picture
from triton_diffusion.repository import build_repository
from triton_diffusion.server import TritonServer
from triton_diffusion.stages.input_validation import IncomingRequest, InputValidationStage
from triton_diffusion_client import DiffusionClient, ModelNotFoundError, ServerUnavailableError
from triton_diffusion_client._connection import Connection
from triton_diffusion_client._model_control import ModelControl

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(240)]

STAYS = "stays"
"""The name of a checkpoint that is served all the time."""
PROMPT = "a red circle 'on' a blue star"
PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


CASES_HERE = CASES | {
    "qwen_edit": QWEN_EDIT,
    "ltx_condition": LTX_CONDITION,
    "hunyuan_from_picture": HUNYUAN_FROM_PICTURE,
}
QUICKLY = ("flux", "wan")
"""Asked in every run: a picture to start from, and videos of two experts; a test of its own asks an autoregressive
prior. It takes half a minute to load a family on two cores, so that the others wait for `scripts/test -m slow`."""
LONG_PRIOR = {"height": 256, "width": 256}
"""Some hundred tokens that are sampled one after the other."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: case.build(folder / name) for name, case in CASES_HERE.items()}


@pytest.fixture(scope="module")
def families(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with the models of all families in its repository, of which only one is loaded at the start."""
    folder = tmp_path_factory.mktemp("families")
    common = {
        "dtype": "float32",
        "warmup_resolutions": "none",
        "max_batch_tokens": "1000",
        "num_threads": "1",
        "spare_ranks": "false",
    }
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
    with (
        Neighbour(families) as neighbour,
        loaded(families, name),
        DiffusionClient(families.grpc_url, model=name) as client,
    ):
        (family,) = client.families()
        served = find_family(open_checkpoint(str(folders[name])))
        assert family.family == served.name
        assert set(family.tasks) <= set(served.tasks)
        drawn = draw(client, name)
    assert neighbour.pictures > 0
    assert_same(drawn, draw_in_process(folders[name], name))
    assert drawn.std() > 5


def test_what_was_unloaded_is_unavailable(families: RunningServer) -> None:
    """It may be on its way back, so a client that is not told otherwise asks again."""
    with (
        DiffusionClient(families.grpc_url, model="wan", retries=0) as client,
        pytest.raises((ServerUnavailableError, ModelNotFoundError), match="Request for unknown model: 'wan'"),
    ):
        client.generate("a cat")


def test_a_picture_survives_the_death_of_the_rank_that_encodes_what_it_starts_from(families: RunningServer) -> None:
    stage = f"{STAYS}_image_encoding"
    (rank,) = families.ranks(stage)
    with DiffusionClient(families.grpc_url, model=STAYS) as client, ThreadPoolExecutor(1) as pool:
        undisturbed = draw(client, "flux")
        # It is done in no time: so that the picture is surely in its hands when it dies.
        rank.send_signal(signal.SIGSTOP)
        disturbed = pool.submit(draw, client, "flux", "image")
        families.wait_until_running(stage)
        rank.send_signal(signal.SIGKILL)
        assert_same(disturbed.result(timeout=120), undisturbed)
    assert_died_with(families, stage, "image")


def test_a_picture_survives_the_death_of_the_rank_that_samples_its_prior(
    families: RunningServer, folders: dict[str, Path]
) -> None:
    """What was sampled dies with the rank; the one that follows samples the same."""
    stage = "glm_image_prior_generation"
    with (
        loaded(families, "glm_image"),
        DiffusionClient(families.grpc_url, model="glm_image") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        (rank,) = families.ranks(stage)
        idle_s = rank.cpu_times().user
        drawn = pool.submit(draw, client, "glm_image", "prior", **LONG_PRIOR)
        # All of it takes a tenth of a second or two; the clock of a process ticks every hundredth.
        while rank.cpu_times().user < idle_s + 0.03:
            assert not drawn.done(), "it was drawn before its rank could die"
            time.sleep(0.002)
        rank.send_signal(signal.SIGKILL)
        assert_same(drawn.result(timeout=120), draw_in_process(folders["glm_image"], "glm_image", **LONG_PRIOR))
    assert_died_with(families, stage, "prior")


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


@contextmanager
def loaded(server: RunningServer, name: str) -> Iterator[None]:
    """Within, a family is served."""
    connection = Connection(protocol="grpc", address=server.grpc_url).with_admin_key(server.process.admin_key)
    with ModelControl(connection, timeout_s=120.0) as control:
        models = list(control.load(name))
        assert models[-1] == name
        yield
        assert list(control.unload(name)) == models[::-1]


def draw(client: DiffusionClient, name: str, request_id: str | None = None, **options: Any) -> NDArray[np.uint8]:
    """What a family is asked for here."""
    images = [encode_picture(image, "png", 90) for image in images_of(name)] or None
    options = SMALL | CASES_HERE[name].options | options
    return client.generate(PROMPT, image=images, request_id=request_id, output_format="raw", **options).arrays


def draw_in_process(folder: Path, name: str, **options: Any) -> NDArray[np.uint8]:
    checkpoint = open_checkpoint(str(folder))
    family = find_family(checkpoint)
    given = {"prompt": PROMPT, "output_format": "raw", **SMALL, **CASES_HERE[name].options, **options}
    incoming = IncomingRequest(given, images_of(name))
    InputValidationStage(family, family.defaults(checkpoint), ChainConfig())([incoming])
    assert incoming.request is not None
    with torch.inference_mode():
        return InProcessStages(folder).pictures(incoming.request, images_of(name)).numpy()


def images_of(name: str) -> list[NDArray[np.uint8]]:
    return [PICTURE] * CASES_HERE[name].num_images


def assert_same(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def assert_died_with(server: RunningServer, stage: str, request_id: str) -> None:
    """A rank of the stage died while it had the request in its hands."""
    lines = [line for line in server.log_file.read_text().splitlines() if "signal 9" in line and stage in line]
    assert any(request_id in line for line in lines), lines
