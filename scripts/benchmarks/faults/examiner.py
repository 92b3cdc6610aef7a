"""A caller that looks at every picture it gets, and counts what it does not get."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.picture import PictureRequest
from triton_diffusion_client import AsyncDiffusionClient, DiffusionClientError, ServerUnavailableError

Pictures = Mapping[PictureRequest, NDArray[np.uint8]]

# Batches of other sizes may round otherwise.
TOLERANCE = 1
_REQUEST_TIMEOUT_S = 180.0
_TRY_AGAIN_AFTER_S = 0.5


async def draw_references(client: AsyncDiffusionClient, requests: Iterable[PictureRequest]) -> Pictures:
    """The picture of each request, which has the server to itself."""
    return {request: (await _generate(client, request))[1] for request in requests}


async def _generate(client: AsyncDiffusionClient, request: PictureRequest) -> tuple[bytes, NDArray[np.uint8]]:
    result = await client.generate(request.prompt, **request.client_options(), timeout_s=_REQUEST_TIMEOUT_S)
    return result.outputs[0].data, result.outputs[0].array


class Examiner:
    """Asks with a client that does not retry by itself; then, as a client that does, again."""

    def __init__(self, client: AsyncDiffusionClient, references: Pictures) -> None:
        self._client = client
        self._references = references
        self.num_answered = 0
        self.differences: list[int] = []
        """The largest of a pixel, of each picture."""
        self.errors: list[str] = []
        """Of each request that failed at its first try."""
        self.losses: list[str] = []
        """The last error of each request that got no picture."""

    @property
    def num_wrong(self) -> int:
        """Pictures that are not those of the undisturbed server."""
        return sum(difference > TOLERANCE for difference in self.differences)

    async def ask(self, request: PictureRequest) -> bytes:
        """The PNG file; empty when the request is lost."""
        deadline_s = time.monotonic() + _REQUEST_TIMEOUT_S
        is_first = True
        while True:
            try:
                data, picture = await _generate(self._client, request)
            except DiffusionClientError as error:
                message = f"{type(error).__name__}: {error}"
                if is_first:
                    self.errors.append(message)
                is_first = False
                if not isinstance(error, ServerUnavailableError) or time.monotonic() > deadline_s:
                    self.losses.append(message)
                    return b""
                await asyncio.sleep(_TRY_AGAIN_AFTER_S)
            else:
                self.num_answered += 1
                difference = np.abs(picture.astype(int) - self._references[request]).max()
                self.differences.append(int(difference))
                return data
