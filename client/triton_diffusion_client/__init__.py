"""Clients for triton-diffusion, and the command line `triton-diffusion`.

Needs neither torch nor a GPU.
"""

from triton_diffusion_client._input_images import InputImage
from triton_diffusion_client._protocol import GenerationOptions, StreamOptions
from triton_diffusion_client.async_client import AsyncDiffusionClient
from triton_diffusion_client.client import DiffusionClient
from triton_diffusion_client.errors import (
    AccessDeniedError,
    DeadlineExceededError,
    DiffusionClientError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    RequestTimeoutError,
    ResourceExhaustedError,
    ServerError,
    ServerUnavailableError,
)
from triton_diffusion_client.families import Family, Parameter
from triton_diffusion_client.health import Health, StageHealth
from triton_diffusion_client.results import (
    Event,
    GeneratedImage,
    GeneratedVideo,
    GenerationResult,
    Preview,
    Progress,
    Timings,
)

__all__ = [
    "AccessDeniedError",
    "AsyncDiffusionClient",
    "DeadlineExceededError",
    "DiffusionClient",
    "DiffusionClientError",
    "Event",
    "Family",
    "GeneratedImage",
    "GeneratedVideo",
    "GenerationOptions",
    "GenerationResult",
    "Health",
    "InputImage",
    "InvalidRequestError",
    "ModelNotFoundError",
    "Parameter",
    "Preview",
    "Progress",
    "RequestCancelledError",
    "RequestTimeoutError",
    "ResourceExhaustedError",
    "ServerError",
    "ServerUnavailableError",
    "StageHealth",
    "StreamOptions",
    "Timings",
]
