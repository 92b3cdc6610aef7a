"""The configuration of a stage model and of the chain, read once from the parameters of their config.pbtxt."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from triton_diffusion.errors import ConfigurationError, nearest_name_hint

PolicyName = Literal["fair", "drr", "fifo"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
DenoisingLoop = Literal["step_batching", "reference"]
VaeTiling = Literal["auto", "on", "off"]

_BOOLS = {"true": True, "1": True, "false": False, "0": False}

# What the ranks of a group can share, for messages.
_AXES = {
    "text_encoding": "tp_size",
    "decoding": "tiles, by the number of its ranks (num_gpus / dp_size)",
    "image_encoding": "tiles, by the number of its ranks (num_gpus / dp_size)",
    "prior_generation": "one rank a replica",
}

# How the ranks of a group share a model.
DEGREES = ("tp_size", "ulysses_degree", "ring_degree", "enable_cfg_parallel")
# What says how many processes a stage has, and where and on how many threads they run.
_PLACING = ("num_gpus", "dp_size", "gpu_device_ids", *DEGREES, "num_threads", "num_cores")

# Above these a request is surely a mistake, whatever the deployment allows.
HIGHEST = {
    "height": 65_536,
    "width": 65_536,
    "num_inference_steps": 1_000_000,
    "num_outputs": 1000,
    "num_frames": 100_000,
    "max_sequence_length": 65_536,
}

_Config = TypeVar("_Config", "StageConfig", "ChainConfig", "CancellationConfig", "FamiliesConfig", "HealthConfig")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks of one worker group share a model: the degree of each mesh axis, slowest links first."""

    cfg: int = 1
    """Parts of a batch on different ranks: the conditional and the unconditional predictions of guidance."""
    ring: int = 1
    """Parts of the sequence; keys and values go round."""
    ulysses: int = 1
    """Parts of the sequence, exchanged for parts of the attention heads."""
    tp: int = 1
    """Parts of the weight matrices."""

    @property
    def num_ranks(self) -> int:
        """Ranks of one worker group."""
        return self.cfg * self.ring * self.ulysses * self.tp

    @property
    def sequence(self) -> int:
        """Parts of the sequence in all."""
        return self.ring * self.ulysses

    def __str__(self) -> str:
        degrees = {"cfg": self.cfg, "r": self.ring, "u": self.ulysses, "tp": self.tp}
        return ".".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1) or "one"


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage model: its checkpoint, its processes, its queue."""

    model_path: str = "demo"
    """Checkpoint folder in diffusers layout, a hub id, or "demo" for the built-in demo checkpoint."""
    dtype: Dtype = "auto"
    """Compute type of the weights; "auto" is bfloat16 where the processor or GPU computes in it, else float32."""
    num_gpus: int = 0
    """Ranks of this stage in all, one a GPU; without a GPU, processes on the CPU. 0: one for each of gpu_device_ids."""
    dp_size: int = 0
    """Replicas (worker groups) under one scheduler; 0: as gpu_device_ids lists them, else every rank is one."""
    gpu_device_ids: str = ""
    """The GPUs of each replica, "0,1;2,3"; empty takes 0 .. num_gpus - 1 in order."""
    tp_size: int = 1
    """Tensor parallelism: ranks that share every weight matrix (denoising: transformer; text_encoding: T5)."""
    ulysses_degree: int = 0
    """denoising: ranks that share the sequence and swap it for attention heads; 0: what the other degrees leave over
    of the ranks of a replica."""
    ring_degree: int = 1
    """denoising: ranks that share the sequence and pass keys and values round."""
    enable_cfg_parallel: bool = False
    """denoising: two halves of the ranks, for the conditional and the unconditional predictions of guidance."""
    attention_backend: str = "auto"
    """denoising: what computes attention (see attention/choice.py); "auto" chooses by device and head size."""
    pack_linears: bool = True
    """denoising in bfloat16 on the CPU: linear layers in the layout of oneDNN, with their GELU (see
    loading/packed_linears.py); without, a picture has the bits that it has in diffusers."""
    vae_tiling: VaeTiling = "auto"
    """decoding and image_encoding: whether pictures go through the autoencoder in overlapping tiles; "auto": where
    several ranks can share them."""
    num_threads: int = 0
    """Torch threads of a rank on the CPU; 0 divides the cores by the ranks of this stage."""
    num_cores: int = 0
    """On the CPU, for replicas of one rank: cores that a batch waits for; of its further threads as many run as there
    are idle cores when it starts. 0: a core for each thread."""
    take_turns: bool = True
    """On the CPU: ticks of the stages that have the same cores run one behind the other, not at once."""
    max_queue_size: int = 256
    """Requests that may wait or run in this stage; one more is refused as UNAVAILABLE."""
    max_queue_cost: int = 0
    """Tokens x steps that may wait or run in this stage; 0: four times those of max_queue_size default requests."""
    max_batch_tokens: int = 0
    """Tokens (rows x sequence length) in one forward pass at most; 0: where more gains no speed, measured at start."""
    scheduling_policy: PolicyName = "fair"
    """"fair" chooses anew at every step, by priority and by when a request is due; with "drr" sizes take turns (deficit
    round robin); "fifo" is first come, first served."""
    slowdown: float = 5.0
    """A request without a deadline is due after so many times the time that it needs alone: at 1 in the order of
    arrival but for what each needs, the higher the more do short requests pass long ones."""
    priority_ageing_s: float = 30.0
    """Seconds that a request is overdue which raise its priority by 1."""
    warmup_resolutions: str = ""
    """Sizes that are run before the model is ready, "1024x1024,512x768" (width x height); empty: the default size of
    the checkpoint; "none": none."""
    prompt_cache_bytes: int = 268_435_456
    """text_encoding: bytes of embeddings kept in the main memory of each rank for prompts that come again; 0: none."""
    denoising_loop: DenoisingLoop = "step_batching"
    """"step_batching" forms a batch anew at every step; "reference" runs one request through all its steps."""
    startup_timeout_s: float = 1800.0
    """Seconds that the ranks may take to load before the start is given up."""
    checkpoint_steps: int = 5
    """denoising: steps between two copies of a request's latents in the instance, from which it goes on when its worker
    group has died; 0: none, it goes on from its first step."""
    spare_ranks: bool = True
    """Keep for each rank a process that has imported torch and diffusers, which takes the place of one that dies."""
    watchdog_factor: float = 10.0
    """A batch may take so many times what such batches take by running mean before its ranks count as stuck, and are
    killed."""
    watchdog_floor_s: float = 10.0
    """But it always has so many seconds; a rank that was stopped (SIGSTOP) for as long is stuck in any case."""
    watchdog_ceiling_s: float = 600.0
    """And never more than so many, unless it takes half of that by running mean; the first batch of a kind may take all
    of them, since it may compile. 0: no watchdog."""
    crash_loop_restarts: int = 5
    """A worker group that dies so many times in a row, each before it has finished a batch, is in a crash loop. When no
    other replica is up, the stage is then not ready and refuses requests until one has started again."""
    crash_loop_window_s: float = 120.0
    """Such a death counts for a crash loop if it comes within so many seconds of a successful start."""

    def __post_init__(self) -> None:
        positive = (
            *("max_queue_size", "startup_timeout_s", "priority_ageing_s", "slowdown"),
            *("watchdog_factor", "watchdog_floor_s", "crash_loop_restarts", "crash_loop_window_s"),
        )
        for name in positive:
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be greater than 0")
        for name in ("checkpoint_steps", "watchdog_ceiling_s"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative; 0 switches it off")
        chosen_by_zero = (
            *("num_gpus", "dp_size", "ulysses_degree", "num_threads", "num_cores"),
            *("max_queue_cost", "max_batch_tokens"),
        )
        for name in chosen_by_zero:
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative; 0 chooses it")
        for name in ("tp_size", "ring_degree"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be 1 (off) or more")
        _require(
            self.prompt_cache_bytes >= 0,
            f"prompt_cache_bytes={self.prompt_cache_bytes} must not be negative; 0 keeps nothing",
        )
        self.device_ids()
        self.warmup_sizes()
        _require(
            self.num_cores <= (self.num_threads or self.num_cores),
            f"num_cores={self.num_cores} must be at most num_threads={self.num_threads}, a thread for each",
        )
        _require(
            not self.num_cores or self.ranks_per_replica == 1,
            f"num_cores={self.num_cores} is for replicas of one rank, not {self.ranks_per_replica}; leave it out, or "
            "change num_gpus or dp_size",
        )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> StageConfig:
        """Read the `parameters` of a stage model's config.pbtxt; raises ConfigurationError."""
        return _from_parameters(cls, parameters)

    @property
    def num_ranks(self) -> int:
        """How many rank processes this stage has."""
        return self.num_gpus or sum(map(len, self._listed_ids())) or max(1, self.dp_size) * self._given.num_ranks

    @property
    def num_replicas(self) -> int:
        """How many worker groups this stage has."""
        return self.dp_size or len(self._listed_ids()) or max(1, self.num_ranks // self._given.num_ranks)

    @property
    def ranks_per_replica(self) -> int:
        """How many ranks a worker group has."""
        return self.num_ranks // self.num_replicas

    @property
    def _given(self) -> ParallelConfig:
        """The degrees as they are given, Ulysses 1 where it is left open."""
        cfg = 2 if self.enable_cfg_parallel else 1
        return ParallelConfig(cfg=cfg, ring=self.ring_degree, ulysses=max(1, self.ulysses_degree), tp=self.tp_size)

    def parallel(self, stage_model: str) -> ParallelConfig:
        """How the ranks of a group of `stage_model` share its model.

        Ranks that no degree names are for the sequence (Ulysses) in denoising and for the matrices in text_encoding;
        those of decoding and image_encoding share tiles, which is no axis.

        Raises:
            ConfigurationError: the degrees do not make up the ranks, or the stage has no such axis.
        """
        size, given = self.ranks_per_replica, self._given
        if stage_model != "denoising":
            idle = [
                f"{name}={getattr(self, name)}"
                for name, off in (("ulysses_degree", (0, 1)), ("ring_degree", (1,)), ("enable_cfg_parallel", (False,)))
                if getattr(self, name) not in off
            ]
            _require(not idle, f"{', '.join(idle)} is for denoising; {stage_model} has {_AXES[stage_model]}")
        if stage_model not in ("denoising", "text_encoding"):
            _require(self.tp_size == 1, f"tp_size={self.tp_size}: {stage_model} has {_AXES[stage_model]}")
            is_alone = stage_model in ("decoding", "image_encoding") or size == 1
            _require(is_alone, f"{stage_model} has {_AXES[stage_model]}, and not {size}; change num_gpus or dp_size")
            return ParallelConfig()
        if stage_model == "text_encoding":
            tp = self.tp_size if self.tp_size > 1 else size
            _require(tp == size, self._mismatch(f"tp_size={self.tp_size}"))
            return ParallelConfig(tp=tp)
        if not self.ulysses_degree:
            return dataclasses.replace(given, ulysses=size // given.num_ranks)
        _require(given.num_ranks == size, self._mismatch(_degrees(given)))
        return given

    def _mismatch(self, degrees: str) -> str:
        return (
            f"num_gpus={self.num_ranks} must be dp x cfg x ring x ulysses x tp, and is not dp={self.num_replicas} x "
            f"{degrees}; change num_gpus, dp_size or a degree"
        )

    @property
    def threads_per_rank(self) -> int:
        """Torch threads of one rank."""
        return self.num_threads or max(1, len(os.sched_getaffinity(0)) // self.num_ranks)

    @property
    def cores_per_rank(self) -> int:
        """Cores that a batch of one rank waits for, on the CPU."""
        return min(self.num_cores or self.threads_per_rank, self.threads_per_rank)

    @property
    def is_placed(self) -> bool:
        """Whether it says anything of ranks, threads or cores."""
        return any(getattr(self, name) != getattr(StageConfig, name) for name in _PLACING)

    def device_ids(self) -> list[list[str]]:
        """The GPU ids of each replica, one inner list a replica, one id a rank."""
        _require(
            self.num_ranks % self.num_replicas == 0,
            f"dp_size={self.dp_size} does not divide num_gpus={self.num_gpus}; "
            "num_gpus is dp_size times the ranks of a replica",
        )
        fits = self.ranks_per_replica > 0 and self.ranks_per_replica % self._given.num_ranks == 0
        _require(fits, self._mismatch(_degrees(self._given)))
        replicas = self._listed_ids()
        if not replicas:
            ids = [str(index) for index in range(self.num_ranks)]
            size = self.ranks_per_replica
            return [ids[start : start + size] for start in range(0, self.num_ranks, size)]
        _require(
            len(replicas) == self.num_replicas
            and all(len(replica) == self.ranks_per_replica and all(replica) for replica in replicas),
            f"gpu_device_ids={self.gpu_device_ids!r} must list {self.num_replicas} replicas, separated by ';', of "
            f"{self.ranks_per_replica} ids each, separated by ','; or leave out num_gpus and dp_size, it says both",
        )
        return replicas

    def _listed_ids(self) -> list[list[str]]:
        if not self.gpu_device_ids:
            return []
        return [[item.strip() for item in part.split(",")] for part in self.gpu_device_ids.split(";")]

    def warmup_sizes(self) -> list[tuple[int, int]] | None:
        """(height, width) of each size to run before the model is ready; None for the checkpoint's default size."""
        if not self.warmup_resolutions:
            return None
        if self.warmup_resolutions == "none":
            return []
        sizes = []
        for item in self.warmup_resolutions.split(","):
            match = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", item)
            if match is None:
                raise ConfigurationError(
                    f"warmup_resolutions={self.warmup_resolutions!r}: {item!r} must be WIDTHxHEIGHT in pixels; "
                    "give several separated by ',', or none"
                )
            sizes.append((int(match[2]), int(match[1])))
        return sizes


@dataclass(frozen=True, kw_only=True)
class StageNames:
    """Which Triton model each stage is; empty where there is none."""

    prior_generation_model: str = "prior_generation"
    """Name of the Triton model that samples an autoregressive prior."""
    image_encoding_model: str = "image_encoding"
    """Name of the Triton model that encodes the pictures of a request; empty: requests can bring none."""
    text_encoding_model: str = "text_encoding"
    """Name of the Triton model that encodes prompts."""
    denoising_model: str = "denoising"
    """Name of the Triton model that denoises."""
    decoding_model: str = "decoding"
    """Name of the Triton model that decodes latents and encodes pictures and videos."""

    def model_of(self, stage: str) -> str:
        """The Triton model that is a stage."""
        name: str = getattr(self, f"{stage}_model")
        return name

    @property
    def all_models(self) -> list[str]:
        """Those that there are."""
        names = [getattr(self, field.name) for field in dataclasses.fields(StageNames)]
        return [name for name in names if name]


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What a request may ask at most."""

    max_pixels: int = 4_194_304
    """height x width of one picture or frame at most."""
    max_num_frames: int = 1025
    """Frames of a video at most."""
    max_num_inference_steps: int = 200
    """Denoising steps of one request at most."""
    max_num_outputs: int = 8
    """Pictures or videos of one request at most."""
    max_pixel_steps: int = 50_000_000_000
    """height x width x frames x outputs x steps of one request at most: what it can cost in all."""
    max_prompt_bytes: int = 16_384
    """Length of a prompt in UTF-8 bytes at most, and of a negative prompt."""
    max_image_bytes: int = 33_554_432
    """Size of a picture that a request brings, encoded, at most."""
    max_image_pixels: int = 16_777_216
    """height x width of all pictures together that a request brings, at most."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool):
                _require(value > 0, f"{field.name}={value} must be greater than 0")
                highest = HIGHEST.get(field.name.removeprefix("max_"), value)
                _require(value <= highest, f"{field.name}={value} must be at most {highest}")


@dataclass(frozen=True, kw_only=True)
class ChainConfig(StageNames, RequestLimits):
    """The chain model: the stages it calls and what a request may ask at most."""

    model_path: str = "demo"
    """The same checkpoint as that of the stages; the chain reads its configuration files only."""
    max_concurrent_requests: int = 128
    """Requests in the chain at a time; one more is refused as UNAVAILABLE."""

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ChainConfig:
        """Read the `parameters` of the chain's config.pbtxt; raises ConfigurationError."""
        return _from_parameters(cls, parameters)


@dataclass(frozen=True, kw_only=True)
class CancellationConfig(StageNames):
    """The model that cancels requests by their ids."""

    max_concurrent_cancels: int = 8
    """Cancels under way at once; others wait."""

    def __post_init__(self) -> None:
        _require(
            self.max_concurrent_cancels > 0,
            f"max_concurrent_cancels={self.max_concurrent_cancels} must be greater than 0",
        )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> CancellationConfig:
        """Read the `parameters` of the model's config.pbtxt; raises ConfigurationError."""
        return _from_parameters(cls, parameters)


@dataclass(frozen=True, kw_only=True)
class HealthConfig(StageNames):
    """The model that says whether requests are taken."""

    max_concurrent_questions: int = 4
    """Questions that are answered at once; others wait."""

    def __post_init__(self) -> None:
        _require(
            self.max_concurrent_questions > 0,
            f"max_concurrent_questions={self.max_concurrent_questions} must be greater than 0",
        )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> HealthConfig:
        """Read the `parameters` of the model's config.pbtxt; raises ConfigurationError."""
        return _from_parameters(cls, parameters)


@dataclass(frozen=True, kw_only=True)
class FamiliesConfig(RequestLimits):
    """The model that says what requests can be."""

    model_path: str = "demo"
    """The same checkpoint as that of the chain."""
    image_encoding_model: str = "image_encoding"
    """Empty: requests can bring no pictures."""

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> FamiliesConfig:
        """Read the `parameters` of the model's config.pbtxt; raises ConfigurationError."""
        return _from_parameters(cls, parameters)


def _from_parameters(config_class: type[_Config], parameters: Mapping[str, str]) -> _Config:
    types = get_type_hints(config_class)
    values: dict[str, Any] = {}
    for name, text in parameters.items():
        if name not in types:
            known = ", ".join(types)
            hint = nearest_name_hint(name, types)
            raise ConfigurationError(f"parameter {name!r} is not known{hint}; known ones are {known}")
        values[name] = _parse(name, text, types[name])
    return config_class(**values)


def _parse(name: str, text: str, expected: Any) -> Any:
    choices = get_args(expected)
    if choices:
        _require(text in choices, f"{name}={text!r} must be one of {', '.join(choices)}")
        return text
    if expected is bool:
        _require(text.lower() in _BOOLS, f"{name}={text!r} must be true or false")
        return _BOOLS[text.lower()]
    try:
        return expected(text)
    except ValueError:
        raise ConfigurationError(f"{name}={text!r} must be {expected.__name__}") from None


def _degrees(parallel: ParallelConfig) -> str:
    return f"cfg={parallel.cfg} x ring={parallel.ring} x ulysses={parallel.ulysses} x tp={parallel.tp}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)
