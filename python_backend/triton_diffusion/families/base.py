"""What every model family provides: one torch-free description and four modules of plain functions.

families/<name>/family.py       FAMILY: the description, readable without torch
families/<name>/encode.py       encode_prompts(...), cache_key(...); encode_images(...) if it takes pictures
families/<name>/prior.py        generate_prior(...), if the checkpoint has an autoregressive prior
families/<name>/denoise.py      prepare_schedule(...), prepare_latents(...), predict(...); shared_inputs(...) if any are
families/<name>/decode.py       decode(...)
families/<name>/parallelize.py  tensor_plans(...), sequence_plan(...)

denoise.py and decode.py also have example_inputs(...), for warm-up. What several families share stands beside them:
schedules.py, latents.py, pictures.py, guidance in ModelFamily.mix_guidance.

Tensors travel between the stages by name, each (1, ...), or (num_outputs, ...) where every output has its own:
    negative.*   of the unconditional prediction; what has no negative counterpart is given to both predictions
    initial_*    for prepare_latents alone, such as the picture that img2img starts from
    image.N      the caller's pictures as they came in, uint8 (H, W, 3); only the encoding stages see them
    all others   arguments of predict, under their names
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from triton_diffusion.config import ParallelConfig, VaeTiling
from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

if TYPE_CHECKING:
    import torch

    from triton_diffusion.distributed.sequence import SequencePlan
    from triton_diffusion.distributed.tensor_parallel import TensorPlan
    from triton_diffusion.loading.components import Components
    from triton_diffusion.state import TensorInfo


class ModelFamily(ABC):
    """What the Triton processes know of a family; no method here imports torch."""

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    """The diffusers pipelines, as model_index.json names them, whose checkpoints this family serves."""
    tasks: ClassVar[tuple[str, ...]]
    """What its checkpoints can do, of request.TASKS."""
    denoisers: ClassVar[tuple[str, ...]] = ("transformer",)
    """The components of denoising whose attention is ours: backends and sequence parallelism. A UNet is not among them.
    """
    own_processors: ClassVar[bool] = False
    """Whether parallelize.set_attention_processors(model) must be called: diffusers' own processors of this model do
    not go through its attention dispatcher."""
    has_true_guidance: ClassVar[bool] = True
    """Whether requests can have an unconditional prediction beside the conditional one (CFG)."""
    padded: ClassVar[Mapping[str, str]] = {}
    """Arguments of predict whose length along dim 1 differs between prompts: name -> name of the mask (B, L), bool,
    that says what is no padding. Rows of several lengths are padded with zeros to the longest of their batch; the mask
    is handed to predict only where it hides something."""
    text_encoder_sees_images: ClassVar[bool] = False
    """Whether the pictures of a request are a part of its prompts (vision-language encoders)."""
    makes_videos: ClassVar[bool] = False
    """Whether decode returns frames."""

    @abstractmethod
    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """For each stage model that this checkpoint needs, the components it loads."""

    @abstractmethod
    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """What a request gets that leaves a value open, read from the checkpoint's configuration files."""

    def request_defaults(self, checkpoint: Checkpoint, *, takes_images: bool) -> RequestDefaults:
        """The defaults in a deployment; takes_images: whether it can encode pictures.

        Raises:
            ConfigurationError: the checkpoint cannot do without pictures.
        """
        threshold = self.guidance_threshold(checkpoint)
        defaults = dataclasses.replace(self.defaults(checkpoint), guidance_threshold=threshold)
        if takes_images or not defaults.max_images:
            return defaults
        if defaults.min_images:
            raise ConfigurationError(
                f"{checkpoint.pipeline_class} needs a picture in every request, so it needs the image_encoding model"
            )
        return dataclasses.replace(defaults, max_images=0, strength=None)

    @abstractmethod
    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Tokens that one picture or video is to the transformer."""

    def num_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Length of the transformer's sequence for one row: the unit of its cost."""
        return request.max_sequence_length + self.num_image_tokens(request, checkpoint)

    def num_steps(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Forward passes that a request needs: some noise schedulers take more than one a step, and a picture that
        is changed with a strength below 1 starts later in the schedule.
        """
        return num_timesteps(checkpoint, request.num_inference_steps, request.strength)

    def encoders(self, request: GenerationRequest) -> tuple[str, ...]:
        """The stage models that come before denoising, in order."""
        return ("image_encoding", "text_encoding") if request.num_images else ("text_encoding",)

    def batch_key(self, stage: str, request: GenerationRequest, tensors: Mapping[str, TensorInfo]) -> str:
        """Rows of equal key may share a forward pass of `stage`; `tensors` are what the stages before have left."""
        if stage == "text_encoding":
            return f"{request.max_sequence_length}"
        size = f"{request.height}x{request.width}x{request.num_frames}"
        if stage == "decoding":
            # A preview of a video has the latents of one picture.
            return f"{size}+{[info.shape[1:] for info in tensors.values()]}"
        # Prompts of several lengths share a batch where the family can pad them, pictures never do.
        shapes = {
            name.removeprefix("negative."): info.shape[1:]
            for name, info in tensors.items()
            if name.removeprefix("negative.") not in self.padded and not name.startswith("initial_")
        }
        return f"{size}+{request.max_sequence_length}+{sorted(shapes.items())}"

    def default_size(self, defaults: RequestDefaults, image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(height, width) where the caller leaves them open, having given pictures of `image_sizes` (height, width)."""
        return defaults.height, defaults.width

    def preview_latents(self, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
        """Of latents (B, ...), those that a preview decodes: of a video (B, C, F, H, W) its first picture."""
        return latents[:, :, :1] if self.makes_videos and latents.ndim == 5 else latents

    def guidance_threshold(self, checkpoint: Checkpoint) -> float:
        """Above this guidance_scale there is a second, unconditional prediction; infinite where there never is."""
        return 1.0

    def uses_guidance(self, request: GenerationRequest, checkpoint: Checkpoint) -> bool:
        """Whether every step of a request needs two predictions, which mix_guidance makes one of."""
        return request.guidance_scale > self.guidance_threshold(checkpoint)

    def guidance_scales(
        self, request: GenerationRequest, timesteps: torch.Tensor, checkpoint: Checkpoint
    ) -> list[float]:
        """The scale of each step; timesteps: (num_steps,), those of its schedule."""
        return [request.guidance_scale] * len(timesteps)

    def mix_guidance(self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
        """One prediction of two (1, ...): classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598)."""
        return unconditional + scale * (conditional - unconditional)

    @abstractmethod
    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """By their names in the configuration: numbers that tp_size must divide, attention heads first; empty where
        the stage's models cannot be divided.
        """

    def head_dim(self, config: Mapping[str, Any]) -> int:
        """Size of an attention head, from the transformer's configuration."""
        return int(config["attention_head_dim"])

    def check_parallel(self, stage_model: str, checkpoint: Checkpoint, parallel: ParallelConfig) -> None:
        """Raise ConfigurationError, with the degrees that work, if the checkpoint cannot be shared like this."""
        if stage_model not in ("denoising", "text_encoding"):
            return
        numbers = self.head_counts(stage_model, checkpoint)
        if not numbers and parallel.tp * parallel.sequence > 1:
            raise ConfigurationError(
                f"{parallel}: {stage_model} of {checkpoint.pipeline_class} has no tensor or sequence parallelism; "
                "use dp_size or enable_cfg_parallel for more GPUs"
            )
        check_degree("tp_size", parallel.tp, numbers)
        if parallel.ulysses > 1:
            heads, count = next(iter(numbers.items()))
            each = f"{heads} / tp_size" if parallel.tp > 1 else heads
            try:
                check_degree("ulysses_degree", parallel.ulysses, {each: count // parallel.tp})
            except ConfigurationError as error:
                raise ConfigurationError(f"{error}; or ring_degree, which needs no heads") from None

    def check_tiles(self, num_ranks: int, tiling: VaeTiling) -> None:
        """Raise ConfigurationError if so many ranks cannot share the tiles of a picture."""
        if num_ranks > 1 and tiling == "off":
            raise ConfigurationError(
                f"{num_ranks} ranks cannot share the tiles of a picture with vae_tiling=off; use vae_tiling=auto, or 1 "
                "rank a replica and dp_size for more GPUs"
            )

    def shared_inputs(
        self, components: Components, request: GenerationRequest, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Arguments of the transformer that are equal for all rows of a batch_key, such as position ids.

        They come from shared_inputs(...), with the same parameters, in families/<name>/denoise.py, if that has one.
        """
        make = getattr(self.denoise, "shared_inputs", None)
        return {} if make is None else make(components, request, inputs)

    @property
    def encode(self) -> EncodeModule:
        """families/<name>/encode.py."""
        return cast(EncodeModule, self._module("encode"))

    @property
    def prior(self) -> PriorModule:
        """families/<name>/prior.py."""
        return cast(PriorModule, self._module("prior"))

    @property
    def denoise(self) -> DenoiseModule:
        """families/<name>/denoise.py."""
        return cast(DenoiseModule, self._module("denoise"))

    @property
    def decode(self) -> DecodeModule:
        """families/<name>/decode.py."""
        return cast(DecodeModule, self._module("decode"))

    @property
    def parallelize(self) -> ParallelizeModule:
        """families/<name>/parallelize.py."""
        return cast(ParallelizeModule, self._module("parallelize"))

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"triton_diffusion.families.{self.name}.{name}")


def check_degree(name: str, degree: int, numbers: Mapping[str, int]) -> None:
    """Raise ConfigurationError, with the degrees that work, unless `degree` divides every number."""
    wrong = [f"{what}={number}" for what, number in numbers.items() if number % degree]
    if wrong:
        highest = min(numbers.values())
        working = [str(d) for d in range(1, highest + 1) if all(number % d == 0 for number in numbers.values())]
        raise ConfigurationError(f"{name}={degree} does not divide {' and '.join(wrong)}; use {', '.join(working)}")


def check_backend(family: str, attention_backend: str) -> None:
    """Raise ConfigurationError unless a model whose attention is not ours can have this backend."""
    if attention_backend not in ("auto", "torch_sdpa"):
        raise ConfigurationError(
            f"attention_backend={attention_backend}: {family} computes its attention by itself, with torch_sdpa; "
            "use auto"
        )


def num_timesteps(checkpoint: Checkpoint, num_inference_steps: int, strength: float | None) -> int:
    """How many timesteps the checkpoint's noise scheduler makes of so many steps, but for those that `strength` skips.

    As in the img2img pipelines of diffusers (get_timesteps).

    Raises:
        InvalidRequestError: the noise scheduler has no schedule of so few steps.
    """
    steps = num_inference_steps
    _, noise_scheduler = checkpoint.component_class("scheduler")
    kept = kept_steps(noise_scheduler, steps, strength)
    if noise_scheduler == "PNDMScheduler":
        if checkpoint.config("scheduler", "scheduler_config.json").get("skip_prk_steps", False):
            # The second timestep comes twice, if there is one.
            return kept + (1 if steps > 1 else 0)
        if steps < _RUNGE_KUTTA_STEPS:
            raise InvalidRequestError(
                f"num_inference_steps={steps} must be at least {_RUNGE_KUTTA_STEPS} for the noise scheduler of this "
                "checkpoint, which starts with so many of Runge and Kutta"
            )
        return kept + 9
    if noise_scheduler in _SECOND_ORDER:
        return 2 * kept - 1
    return kept


def kept_steps(noise_scheduler: str, num_inference_steps: int, strength: float | None) -> int:
    """How many of the steps `strength` leaves: the pipelines of flow matching round up, the others down."""
    if strength is None:
        return num_inference_steps
    if noise_scheduler.startswith("FlowMatch"):
        kept = num_inference_steps - int(num_inference_steps - min(num_inference_steps * strength, num_inference_steps))
    else:
        kept = min(int(num_inference_steps * strength), num_inference_steps)
    return max(1, kept)


# Their timesteps are twice the steps, but for the last.
_SECOND_ORDER = (
    "DPMSolverSDEScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)
# PNDM (Liu et al. 2022, arXiv:2202.09778) takes its first steps by the method of Runge and Kutta.
_RUNGE_KUTTA_STEPS = 4


@dataclass(frozen=True)
class Prompt:
    """What an encoder is given.

    images: uint8 (H, W, 3), where the family's text encoder sees them. is_negative: it steers away.
    """

    text: str
    is_negative: bool = False
    images: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as the transformer takes it.

    conditioning: tensors by name, each (1, ...): for FLUX prompt_embeds (1, L, D) and pooled_prompt_embeds (1, P).
    warning: what the caller should know, such as a prompt that was cut.
    """

    conditioning: dict[str, torch.Tensor]
    warning: str | None = None


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of one row.

    noise_scheduler: of diffusers, at its first step; it keeps its position inside, so every row has its own.
        One of the family's own may have begin(latents, generator), which returns the latents of the first step.
    timesteps: (num_steps,), those that are run, on the scale of the noise scheduler.
    """

    noise_scheduler: Any
    timesteps: torch.Tensor


class EncodeModule(Protocol):
    """families/<name>/encode.py."""

    def encode_prompts(
        self, components: Components, prompts: Sequence[Prompt], max_sequence_length: int
    ) -> list[EncodedPrompt]:
        """Encode a batch of prompts; the ranks that run the stage call it together."""

    def cache_key(self, components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
        """Equal for prompts with the same outcome of `encode_prompts`: the tokens that each encoder is given, and
        `is_negative` where it makes a difference. The stage adds the pictures to it.
        """

    def encode_images(
        self, components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
    ) -> dict[str, torch.Tensor]:
        """What becomes of the pictures, uint8 (H, W, 3) each, of one request: initial_* or arguments of predict."""


class PriorModule(Protocol):
    """families/<name>/prior.py."""

    def generate_prior(
        self, components: Components, request: GenerationRequest, images: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the autoregressive prior samples for one request; main rank alone."""


class DenoiseModule(Protocol):
    """families/<name>/denoise.py."""

    def prepare_schedule(self, components: Components, request: GenerationRequest) -> Schedule:
        """The schedule of one row; called once for each."""

    def prepare_latents(
        self,
        components: Components,
        request: GenerationRequest,
        inputs: Mapping[str, torch.Tensor],
        schedule: Schedule,
        generators: Sequence[torch.Generator],
    ) -> torch.Tensor:
        """Where the rows start (num_outputs, ...): noise, each row from its generator, which is on the CPU."""

    def example_inputs(self, components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
        """What the encoding stages leave for a request without guidance and pictures, all zeros."""

    def predict(
        self,
        components: Components,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """One forward pass of the transformer, every row at its own timestep.

        latents: (B, ...), scaled as the noise scheduler wants it. timesteps: (B,) as in Schedule. conditioning: each
        (B, ...), among them embedded_guidance_scale (B,) float32.
        Returns the prediction, of the shape of the latents.
        """


class DecodeModule(Protocol):
    """families/<name>/decode.py."""

    def example_inputs(self, components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
        """What the denoising leaves for a request, all zeros."""

    def decode(self, components: Components, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
        """Pictures uint8 (B, H, W, 3) of a batch of latents (B, ...), or videos (B, F, H, W, 3); on the CPU."""


class ParallelizeModule(Protocol):
    """families/<name>/parallelize.py."""

    def tensor_plans(self, checkpoint: Checkpoint) -> Mapping[str, TensorPlan]:
        """How tensor parallelism divides each component that it divides."""

    def sequence_plan(self, transformer: Any) -> SequencePlan:
        """Where the transformer's sequence is cut and put together."""

    def set_attention_processors(self, transformer: Any) -> None:
        """Give it processors that go through diffusers' attention dispatcher; see ModelFamily.own_processors."""
