"""How each side is asked for a picture; every function here answers with the file as the side sent it."""

from __future__ import annotations

from typing import Any

import aiohttp
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

from benchmarks.picture import PictureRequest
from triton_diffusion_client import AsyncDiffusionClient

_MONOLITH_INPUTS: dict[str, tuple[str, type]] = {
    "prompt": ("BYTES", np.object_),
    "height": ("INT32", np.int32),
    "width": ("INT32", np.int32),
    "num_inference_steps": ("INT32", np.int32),
    "max_sequence_length": ("INT32", np.int32),
    "guidance_scale": ("FP32", np.float32),
    "seed": ("INT64", np.int64),
}


async def ask_ours(client: AsyncDiffusionClient, request: PictureRequest) -> bytes:
    """Over gRPC, with the project's client."""
    result = await client.generate(request.prompt, **request.client_options())
    return result.outputs[0].data


async def ask_monolith(client: InferenceServerClient, request: PictureRequest) -> bytes:
    """Over gRPC, with Triton's client."""
    asked = _arguments(request)
    inputs = []
    for name, (datatype, dtype) in _MONOLITH_INPUTS.items():
        value = asked[name].encode() if datatype == "BYTES" else asked[name]
        tensor = InferInput(name, [1], datatype)
        tensor.set_data_from_numpy(np.array([value], dtype=dtype))
        inputs.append(tensor)
    result = await client.infer("monolith", inputs)
    data: bytes = result.as_numpy("image")[0]
    return data


async def ask_http(session: aiohttp.ClientSession, url: str, request: PictureRequest) -> bytes:
    """JSON to the HTTP servers, over connections that stay open."""
    async with session.post(url, json=_arguments(request)) as response:
        response.raise_for_status()
        return await response.read()


def _arguments(request: PictureRequest) -> dict[str, Any]:
    return request.pipeline_arguments() | {"seed": request.seed}
