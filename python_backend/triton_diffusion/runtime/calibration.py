"""What a rank does between loading and ready: run the sizes that are expected, and find out how large a batch pays.

max_batch_tokens is where a larger batch gains no speed any more. It is measured once for a stage, a model and a device
(again, if other work disturbed it), and kept in a file under the user's cache folder ($TRITON_DIFFUSION_CACHE). On a
CPU so is how many threads a small batch keeps busy: those that it does not are left to the server and other stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.errors import DiffusionError, InvalidRequestError, from_wire
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest, example_request
from triton_diffusion.runtime.faults import VARIABLE as FAULTS_VARIABLE
from triton_diffusion.runtime.messages import AdmitRequest, RunTick
from triton_diffusion.runtime.rank_executor import RankExecutor
from triton_diffusion.runtime.work import rows_and_steps, tokens_per_row
from triton_diffusion.stages.packing import pack_tensors
from triton_diffusion.state import RequestState

logger = logging.getLogger(__name__)

# Runs of each batch size, short ones up to the larger number; the first does not count, it prepares what later ones
# reuse, and the fastest of the others does: what else the machine does only makes them slower.
_MIN_RUNS, _MAX_RUNS = 4, 12
_LONG_ENOUGH_S = 0.4
_WARM_UP_RUNS = 2
_MAX_ROWS = 64
_MAX_SECONDS = 30.0
# A batch must be faster a token by this factor than all before; after two that are not, the search ends.
_WORTHWHILE = 1.03
# The smallest batch with this share of the best speed is the one: a smaller batch is a faster step for all in it.
_GOOD_ENOUGH = 0.97
# Cores count as quiet when others use less than so much of one for so long; it is not waited for longer than so many
# seconds.
_QUIET_CORES, _QUIET_INTERVAL_S, _QUIET_TIMEOUT_S = 0.3, 0.3, 10.0
# With more than this of a core at work for others meanwhile, what was measured holds for this start only: a step ends
# when the slowest thread does, on however many cores.
_DISTURBED_CORES = 0.5
# Half of the threads are enough for a batch that takes at most so many times as long with them.
_AS_FAST = 1.02


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured on a device; this is also the content of its file."""

    device: str
    max_batch_tokens: int
    """0: not measured."""
    measurements: list[tuple[int, float]]
    """(tokens in the batch, seconds of the tick)."""
    threads_by_tokens: list[tuple[int, int]]
    """(tokens, threads) in rising order: a batch of at most so many tokens keeps no more threads busy. Larger ones use
    all that there are.
    """
    memory_limit: int = 0
    """Tokens of a batch, learnt from larger ones that ran out of memory while requests were served; 0: none did."""
    others_cores: float = 0.0
    """On the CPU: how many of its cores others used while it was measured, in the mean."""

    @property
    def holds_for_later(self) -> bool:
        """Whether a later start can use it; on a busy machine a batch needs other threads than on a quiet one."""
        return self.max_batch_tokens > 0 and self.others_cores <= _DISTURBED_CORES


def uncalibrated(device: str, max_batch_tokens: int = 0, *, memory_limit: int = 0) -> Calibration:
    """What is known of a device where nothing was measured."""
    return Calibration(
        device=device,
        max_batch_tokens=max_batch_tokens,
        measurements=[],
        threads_by_tokens=[],
        memory_limit=memory_limit,
    )


class WarmUp:
    """Runs requests of zeros through the executor, by the way that real ones take. Every rank must do the same."""

    def __init__(
        self,
        stage_model: str,
        executor: RankExecutor,
        family: ModelFamily,
        components: Components,
        group: RankGroup,
        cores: Sequence[int] = (),
    ) -> None:
        """cores: those that the group shares with others; none: all that there are."""
        self._stage_model = stage_model
        self._executor = executor
        self._family = family
        self._components = components
        self._group = group
        self._defaults = family.defaults(components.checkpoint)
        self._cores = cores
        self._num_requests = 0

    @property
    def can_run(self) -> bool:
        """Whether there are inputs without content for the stage; not of pictures, which a request may not have."""
        if self._stage_model in ("text_encoding", "denoising"):
            return not self._defaults.min_images
        return self._stage_model == "decoding"

    def calibrate(self, device_name: str) -> Calibration:
        """Measure ever larger batches of the default size until they gain no speed, or do not fit."""
        request = self._request(self._defaults.height, self._defaults.width)
        tokens = self._tokens(request)
        measured: list[tuple[int, float]] = []
        threads_by_tokens: list[tuple[int, int]] = []
        all_threads = self._executor.num_threads
        may_need_fewer = is_cpu = self._group.device.type == "cpu"
        started, others = time.monotonic(), _OtherWork(self._group.size, self._cores)
        rows, idle_doublings = 1, 0
        while rows <= _MAX_ROWS and idle_doublings < 2 and self._agreed(time.monotonic() - started) < _MAX_SECONDS:
            try:
                threads, seconds = all_threads, self._fastest_s(request, rows, all_threads)
                if may_need_fewer:
                    threads, seconds = self._with_fewer_threads(request, rows, seconds)
            except DiffusionError as error:
                if not measured:
                    raise
                logger.info("a batch of %d rows does not run, the limit is below it: %s", rows, error)
                break
            if self._executor.fitting(rows * tokens) < rows * tokens and measured:
                logger.info("a batch of %d rows does not fit in memory, the limit is below it", rows)
                break
            best = max(map(_speed, measured), default=0.0)
            measured.append((rows * tokens, seconds))
            may_need_fewer = threads < all_threads
            if may_need_fewer:
                threads_by_tokens.append((rows * tokens, threads))
            idle_doublings = 0 if _speed(measured[-1]) > _WORTHWHILE * best else idle_doublings + 1
            rows *= 2
        best = max(map(_speed, measured))
        limit = next(each[0] for each in measured if _speed(each) >= _GOOD_ENOUGH * best)
        return Calibration(
            device=device_name,
            max_batch_tokens=limit,
            measurements=measured,
            threads_by_tokens=threads_by_tokens,
            memory_limit=self._executor.memory_limit,
            others_cores=round(self._agreed(others.num_cores()), 2) if is_cpu else 0.0,
        )

    def warm_up(self, sizes: Sequence[tuple[int, int]] | None, max_batch_tokens: int) -> list[tuple[int, float]]:
        """Run each (height, width), alone and in as large a batch as there can be; returns what the first one took.

        Raises:
            InvalidRequestError: a size is not one of this model.
            DiffusionError: a stage failed.
        """
        took: list[tuple[int, float]] = []
        for height, width in [(self._defaults.height, self._defaults.width)] if sizes is None else sizes:
            multiple = self._defaults.size_multiple
            if not height or not width or height % multiple or width % multiple:
                raise InvalidRequestError(
                    f"warmup_resolutions: {width}x{height} must be multiples of {multiple} for this model"
                )
            request = self._request(height, width)
            started = time.monotonic()
            measured = [
                (rows * self._tokens(request), self._durations_s(request, rows, _WARM_UP_RUNS)[-1])
                for rows in sorted({1, max(1, max_batch_tokens // self._tokens(request))})
            ]
            took = took or measured
            logger.info("warm-up of %dx%d took %.1f s", width, height, time.monotonic() - started)
        return took

    def _request(self, height: int, width: int) -> GenerationRequest:
        # One step more than runs: a request that ends would leave out the cost of a step in the middle. Without
        # guidance, whatever the default: there are no examples of what a negative prompt leaves.
        return example_request(
            self._defaults, height=height, width=width, num_inference_steps=_MAX_RUNS + 1, guidance_scale=0.0
        )

    def tokens_of_default(self) -> int:
        """Tokens of a request of the checkpoint's default size."""
        return self._tokens(self._request(self._defaults.height, self._defaults.width))

    def _tokens(self, request: GenerationRequest) -> int:
        return tokens_per_row(self._stage_model, self._family, self._components.checkpoint, request)

    def _fastest_s(self, request: GenerationRequest, rows: int, threads: int) -> float:
        """Seconds of the fastest tick of `rows` requests on so many threads."""
        self._executor.limit_threads([(rows * self._tokens(request), threads)])
        return self._agreed(min(self._durations_s(request, rows, _MAX_RUNS)[1:]))

    def _with_fewer_threads(self, request: GenerationRequest, rows: int, seconds: float) -> tuple[int, float]:
        """The fewest threads with which a batch is as fast as with all of them, and what it takes; found by halving.

        seconds: what it takes with all.
        """
        threads, allowed_s = self._executor.num_threads, _AS_FAST * seconds
        while threads > 1 and (slower_s := self._fastest_s(request, rows, threads // 2)) <= allowed_s:
            threads, seconds = threads // 2, slower_s
        return threads, seconds

    def _durations_s(self, request: GenerationRequest, rows: int, max_runs: int) -> list[float]:
        """Seconds of each of some ticks of `rows` requests."""
        checkpoint = self._components.checkpoint
        _, num_steps = rows_and_steps(self._stage_model, self._family, checkpoint, request)
        durations_s: list[float] = []
        names: list[str] = []
        while len(durations_s) < max_runs and (
            len(durations_s) < min(_MIN_RUNS, max_runs) or self._agreed(sum(durations_s)) < _LONG_ENOUGH_S
        ):
            if num_steps == 1 or not names:
                names = [self._admit(request) for _ in range(rows)]
            done = self._executor.run(RunTick(tick_id=0, rows=[(name, 0) for name in names], num_steps=1))
            durations_s.append(done.duration_s)
            if done.failed:
                self._drop(names)
                raise from_wire(*next(iter(done.failed.values())))
        self._drop(names)
        return durations_s

    def _admit(self, request: GenerationRequest) -> str:
        # Every prompt is another one: one that is known needs no encoder.
        self._num_requests += 1
        name = f"warm-up {self._num_requests}"
        request = dataclasses.replace(request, prompt=name, seed=self._num_requests)
        blob = pack_tensors(self._inputs(request), RequestState(name, request).metadata())
        self._executor.admit(AdmitRequest(request_id=name, state=blob))
        return name

    def _inputs(self, request: GenerationRequest) -> dict[str, torch.Tensor]:
        match self._stage_model:
            case "denoising":
                return self._family.denoise.example_inputs(self._components, request)
            case "decoding":
                return self._family.decode.example_inputs(self._components, request)
            case _:
                return {}

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            self._executor.drop(name)

    def _agreed(self, number: float) -> float:
        """Rank 0's number on every rank: they must come to the same decisions."""
        data = json.dumps(number).encode() if self._group.is_main else None
        answer: float = json.loads(self._group.broadcast_bytes(data))
        return answer


def _speed(measurement: tuple[int, float]) -> float:
    """Tokens a second."""
    return measurement[0] / measurement[1]


# The file.


def cache_path(stage_model: str, components: Components, *, num_threads: int, layout: str) -> Path:
    """Where the calibration of a stage is kept: the name changes with all that its speed depends on."""
    checkpoint = components.checkpoint
    modules = {name: part for name, part in components.loaded.items() if isinstance(part, torch.nn.Module)}
    facts = {
        "stage": stage_model,
        "pipeline": checkpoint.pipeline_class,
        "configs": {name: checkpoint.config(name) for name in modules},
        "dtype": str(components.dtype),
        "device": device_name(components.device),
        "threads": num_threads if components.device.type == "cpu" else 0,
        "layout": layout,
        # A device that is made to look small is another one.
        "faults": os.environ.get(FAULTS_VARIABLE, ""),
        "versions": [version(name) for name in ("torch", "diffusers", "transformers")],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return _cache_folder() / "calibration" / f"{stage_model}-{digest[:16]}.json"


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the model of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "cpu"


def read_calibration(path: Path, *, since_s: float = 0.0) -> Calibration | None:
    """The calibration in a file; None if there is none that can be read.

    since_s: of measurements that other work has disturbed nothing counts but the memory limit, unless they are of
        after this time.time(): a rank that takes another's place must not measure while the others serve.
    """
    try:
        known = msgspec.json.decode(path.read_bytes(), type=Calibration)
        if known.holds_for_later or path.stat().st_mtime >= since_s:
            return known
        return uncalibrated(known.device, memory_limit=known.memory_limit)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning("%s is passed over: %s", path, error)
        return None


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Keep a calibration for the next start; a folder that cannot be written costs no more than measuring again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(msgspec.json.format(msgspec.json.encode(calibration)))
        # Several ranks may write it: the file is never half of one.
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s); the next start will measure again", path, error)


def keep_memory_limit(path: Path, device: str, limit: int) -> None:
    """Add to a calibration, or to the place of one, that batches of more than `limit` tokens ran out of memory."""
    known = read_calibration(path) or uncalibrated(device)
    if not known.memory_limit or limit < known.memory_limit:
        write_calibration(path, msgspec.structs.replace(known, memory_limit=limit))


@contextlib.contextmanager
def alone_on_this_machine(path: Path, cores: Sequence[int] = ()) -> Iterator[None]:
    """Wait until no other stage measures: they start at the same time and often share a device. And for a moment until
    they have loaded, too, for then they come to wait here, and leave the `cores` alone; none: all that there are.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((path.parent / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        _wait_for_quiet(cores)
        yield


def _wait_for_quiet(cores: Sequence[int]) -> None:
    give_up_s = time.monotonic() + _QUIET_TIMEOUT_S
    while time.monotonic() < give_up_s:
        others = _OtherWork(0, cores)
        time.sleep(_QUIET_INTERVAL_S)
        if others.num_cores() <= _QUIET_CORES:
            return


class _OtherWork:
    """Looks at how much of some cores others use, from its making on."""

    def __init__(self, num_ranks: int, cores: Sequence[int] = ()) -> None:
        """num_ranks: of ours, which work as much as this one does; 0 if it does nothing. cores: none for all."""
        self._num_ranks = num_ranks
        self._cores = cores
        self._before = self._read()

    def num_cores(self) -> float:
        """How many of these cores processes other than our ranks used, and other virtual machines, in the mean."""
        now_s, busy_s, own_s = (after - before for after, before in zip(self._read(), self._before, strict=True))
        return max(0.0, (busy_s - self._num_ranks * own_s) / now_s) if now_s else 0.0

    def _read(self) -> tuple[float, float, float]:
        """Seconds on the clock; for which these cores were busy; for which this process was on a core."""
        by_core = psutil.cpu_times(percpu=True)
        busy_s = sum(_busy_s(times) for core, times in enumerate(by_core) if core in self._cores or not self._cores)
        return time.monotonic(), busy_s, time.process_time()


def _busy_s(times: Any) -> float:
    """Of a core's times by psutil; guests are part of user."""
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _cache_folder() -> Path:
    given = os.environ.get("TRITON_DIFFUSION_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triton-diffusion"
