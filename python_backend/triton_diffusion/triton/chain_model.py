"""ChainModel: the BLS model that takes a request through the stages and answers its caller."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, ClassVar

import numpy as np
import triton_python_backend_utils as pb_utils

from triton_diffusion.config import ChainConfig
from triton_diffusion.errors import (
    DiffusionError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    ShuttingDownError,
    WorkerGroupError,
)
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.request import INPUT_NAMES, PICTURE_FORMATS, GenerationRequest, check_num_images
from triton_diffusion.run_folder import ChainFolder
from triton_diffusion.runtime.estimates import DecodingTime, EndRate
from triton_diffusion.stages.input_validation import IncomingRequest, InputValidationStage
from triton_diffusion.state import (
    IMAGE,
    CancelOrder,
    Progress,
    ProgressQuery,
    RequestState,
    StageTimings,
    make_cancel_key,
    merge_tensors,
    read_progress,
    read_state,
    read_tensors,
    replace_metadata,
    write_cancel_order,
    write_progress_query,
    write_state,
)
from triton_diffusion.triton.conversion import (
    bytes_tensor,
    decode_images,
    json_tensor,
    read_cancel_scope,
    read_image_files,
    read_inputs,
    read_parameters,
    send_final,
    set_up_logging,
    triton_error,
    uses_response_cache,
)
from triton_diffusion.triton.stage_calls import Stage, StageCalls
from triton_diffusion.triton.threads import in_thread, start_thread

logger = logging.getLogger(__name__)

# How soon a caller that went away is noticed; and the pause at least, as a multiple of the processor time that asking
# takes: on busy cores most of the time is waiting for them, which costs nobody anything.
_CANCEL_POLL_S = 0.02
_CANCEL_POLL_SHARE = 25
# A stream is never silent for longer.
_KEEP_ALIVE_S = 1.0
# How soon an order to drain is noticed while there are no requests.
_IDLE_POLL_S = 0.2
# Lost calls after which this process asks to be replaced: as soon as it has no requests, and in any case when as many
# are lost as this share of the requests that it takes at a time.
_FEW_LOST = 8
_MANY_LOST_SHARE = 0.5


class ChainModel:
    """Each request runs in a thread of its own, which calls one stage after the other by blocking BLS.

    The stages cannot see that a caller went away; a watching thread sees it here and tells the stage in band. The same
    thread answers the callers of requests whose stage has died: Triton never ends a call to a model whose process is
    gone, so the thread that made the call is given up (and so all threads are daemons, which nothing waits for). When
    many calls were lost in this way, the supervisor is asked for a new process in the place of this one.
    """

    stream: ClassVar[bool]
    """Whether progress and previews are sent before the result; needs a decoupled model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the checkpoint's configuration; the weights are the stages' business."""
        set_up_logging(args["model_name"])
        try:
            self._config = ChainConfig.from_parameters(read_parameters(args))
            self._checkpoint = open_checkpoint(self._config.model_path)
            self._family = find_family(self._checkpoint)
            self._defaults = self._family.request_defaults(
                self._checkpoint, takes_images=bool(self._config.image_encoding_model)
            )
        except DiffusionError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._validation = InputValidationStage(self._family, self._defaults, self._config)
        self._needs_seed = uses_response_cache(args)
        self._decoding_time = DecodingTime()
        self._end_rate = EndRate()
        self._jobs: dict[str, _Job] = {}
        self._num_unanswered = 0
        self._jobs_lock = threading.Lock()
        self._has_jobs = threading.Event()
        self._all_answered = threading.Event()
        self._all_answered.set()
        self._calls = StageCalls()
        self._cancelling: set[Stage] = set()
        self._is_worn = False
        self._run_folder = ChainFolder()
        self._scope = uuid.uuid4().hex
        self._counter = itertools.count()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> None:
        """Start a thread for every request; the answer goes out through the response sender."""
        for request in requests:
            try:
                self._accept(request, request.get_response_sender())
            except Exception:
                # The others of the batch are not to be lost with it.
                logger.exception("a request could not be answered")

    def finalize(self) -> None:
        """Wait for the requests that run; Triton sends no new ones."""
        self._all_answered.wait()
        self._stopping.set()
        self._has_jobs.set()
        self._watcher.join()
        self._run_folder.end_beats()

    def _accept(self, request: Any, sender: Any) -> None:
        try:
            job = _Job(f"{self._scope}-{next(self._counter)}", request, sender)
        except Exception as error:
            logger.exception("a request could not be read")
            send_final(sender, pb_utils.InferenceResponse(error=triton_error(error)))
            return
        try:
            self._register(job)
            job.read_parameters(request)
            given = read_inputs(request, INPUT_NAMES)
            start_thread(self._run, job, given, read_image_files(request))
        except Exception as error:
            self._finish(job, pb_utils.InferenceResponse(error=triton_error(error)))

    def _register(self, job: _Job) -> None:
        with self._jobs_lock:
            full = len(self._jobs) >= self._config.max_concurrent_requests
            self._jobs[job.request_id] = job
            self._num_unanswered += 1
            self._all_answered.clear()
            self._has_jobs.set()
        # Asked once the request counts, so that nobody takes us for drained while it comes in.
        if self._run_folder.is_draining():
            raise ShuttingDownError("this server is shutting down and takes no new requests; try again at another one")
        if full:
            limit = self._config.max_concurrent_requests
            wait_s = self._end_rate.expected_s(limit)
            need = "" if wait_s is None else f"they need about {wait_s:.1f} s at the present rate; "
            raise QueueFullError(
                f"{limit} requests wait or run already (parameter max_concurrent_requests); {need}try again later"
            )

    def _finish(self, job: _Job, response: Any) -> None:
        """The one place where a request ends; a request that was ended already, because its stage died, stays so."""
        with self._jobs_lock:
            if self._jobs.pop(job.request_id, None) is None:
                return
            if not self._jobs:
                self._has_jobs.clear()
        try:
            job.finish(response)
        finally:
            with self._jobs_lock:
                self._num_unanswered -= 1
                if not self._num_unanswered:
                    self._all_answered.set()

    def _run(self, job: _Job, given: dict[str, Any], image_files: list[bytes]) -> None:
        try:
            # Before they are decoded: each may be large.
            check_num_images(len(image_files), self._defaults)
            incoming = IncomingRequest(given, decode_images(image_files, self._config))
            response = pb_utils.InferenceResponse(output_tensors=self._generate(job, incoming))
            self._end_rate.note_end()
        except Exception as error:
            if not isinstance(error, DiffusionError):
                logger.exception("request %s failed", job.request_id)
            response = pb_utils.InferenceResponse(error=triton_error(error))
        self._finish(job, response)

    def _generate(self, job: _Job, incoming: IncomingRequest) -> list[Any]:
        """Take a request through all stages; returns the output tensors."""
        if self._needs_seed and "seed" not in incoming.given:
            raise InvalidRequestError(
                "seed is missing: this server answers equal requests from its response cache, and so would draw the "
                "same picture again and again; send a seed, another one for each picture"
            )
        self._validation([incoming])
        assert incoming.request is not None
        num_steps = self._family.num_steps(incoming.request, self._checkpoint)
        job.progress = Progress(0, num_steps, 0.0, None)
        validation = StageTimings(run_s=time.monotonic() - job.arrived_s)
        state = RequestState(
            job.request_id,
            incoming.request,
            {self._validation.name: validation},
            incoming.warnings,
            cancel_key=job.cancel_key,
            deadlines_s=self._deadlines_s(job, incoming.request),
        )
        blob = self._encode(job, write_state(state, incoming.images), incoming.request)
        blob = self._denoise_in_view(job, blob, num_steps) if self.stream else self._denoise(job, blob)
        blob = self._call(job, self._config.decoding_model, blob)
        state = read_state(blob)
        self._decoding_time.observe(incoming.request, state.timings["decoding"].run_s)
        return _output_tensors(job, state, read_tensors(blob))

    def _deadlines_s(self, job: _Job, request: GenerationRequest) -> dict[str, float]:
        """When each stage must be through: what comes behind it needs its time, too."""
        if request.deadline_s is None:
            return {}
        end_s = job.arrived_s + request.deadline_s
        before_decoding_s = end_s - self._decoding_time.estimate_s(request)
        return dict.fromkeys((*self._family.encoders(request), "denoising"), before_decoding_s) | {"decoding": end_s}

    def _encode(self, job: _Job, blob: bytes, request: GenerationRequest) -> bytes:
        """Through the stages before denoising: each sees what those before have left, and adds to it."""
        stages = self._family.encoders(request)
        for stage in stages:
            outcome = self._call(job, self._config.model_of(stage), blob)
            # The caller's pictures end here.
            blob = merge_tensors(blob, outcome, drop=IMAGE if stage == stages[-1] else "")
        return blob

    def _denoise(self, job: _Job, blob: bytes) -> bytes:
        return self._call(job, self._config.denoising_model, blob)

    def _denoise_in_view(self, job: _Job, blob: bytes, num_steps: int) -> bytes:
        """Denoise, and meanwhile send the caller a message for every step."""
        started_s = time.monotonic()
        result = in_thread(lambda: self._denoise(job, blob))
        previews: list[Future[None]] = []
        try:
            last = self._follow(job, result, previews)
            denoised = result.result()
        except BaseException:
            # Nobody waits for these steps any more.
            job.cancel_reason = job.cancel_reason or "its stream broke"
            self._cancel(self._calls.find(self._config.denoising_model), [job.request_id])
            raise
        finally:
            wait([result])
            wait(previews)
        # The last steps, if the result came before the answer to the question about them.
        end = Progress(num_steps, num_steps, time.monotonic() - started_s, 0.0, restarts=last.restarts)
        self._send_progress(job, last, end)
        return denoised

    def _follow(self, job: _Job, result: Future[bytes], previews: list[Future[None]]) -> Progress:
        """Send progress until there is a result; returns what was told last."""
        last = Progress(0, 0, 0.0, None)
        while not result.done():
            progress, preview = self._ask_progress(job, last)
            if progress.ended:
                # The stage has not heard of the request yet, or has just answered it.
                wait([result], timeout=0.005)
                continue
            self._send_progress(job, last, progress)
            if preview is not None:
                previews.append(in_thread(partial(self._send_preview, job, preview, progress)))
            last = progress
        return last

    def _send_progress(self, job: _Job, last: Progress, progress: Progress) -> None:
        """One message for each step since `last`; after a restart, one with the step that the request is at now."""
        first = last.step + 1 if progress.restarts == last.restarts else progress.step
        for step in range(first, progress.step + 1):
            job.send_progress(dataclasses.replace(progress, step=step))

    def _ask_progress(self, job: _Job, last: Progress) -> tuple[Progress, bytes | None]:
        query = write_progress_query(ProgressQuery(job.request_id, last.step, last.restarts))
        return read_progress(self._calls.call(self._calls.find(self._config.denoising_model), query))

    def _send_preview(self, job: _Job, preview: bytes, progress: Progress) -> None:
        """Have the estimate of the clean picture decoded, and send it under the step that it shows."""
        state = read_state(preview)
        given = state.request.output_format
        output_format = given if given in PICTURE_FORMATS and given != "raw" else "png"
        if given.startswith("b64_") and output_format == "png":
            output_format = "b64_png"
        # Of a video, the latents of a preview are those of its first picture.
        state.request = dataclasses.replace(state.request, output_format=output_format, num_frames=1)
        state.request_id = f"{job.request_id}-preview-{progress.step}"
        state.cancel_key, state.deadlines_s = "", {}
        try:
            stage = self._calls.find(self._config.decoding_model)
            decoded = self._calls.call(stage, replace_metadata(preview, state.metadata()))
        except DiffusionError as error:
            # The picture itself does not depend on it.
            logger.warning("request %s goes without a preview of step %d: %s", job.request_id, progress.step, error)
            return
        job.send([_progress_tensor(progress), bytes_tensor("preview_image", _media(read_tensors(decoded)))])

    def _call(self, job: _Job, model: str, blob: bytes) -> bytes:
        """Run a stage for a job, which can be cancelled meanwhile."""
        job.stage = stage = self._calls.find(model)
        try:
            if job.cancelled:
                raise RequestCancelledError(f"cancelled before {model}")
            return self._calls.call(stage, blob)
        except RequestCancelledError as error:
            raise RequestCancelledError(f"{job.cancel_reason or 'by its request id'}: {error}") from error
        finally:
            job.stage = None

    def _watch(self) -> None:
        pause_s = _CANCEL_POLL_S
        while not self._stopping.wait(pause_s):
            started_s = time.thread_time()
            try:
                # Here, since all requests depend on this thread.
                self._run_folder.beat()
                if self._has_jobs.wait(_IDLE_POLL_S):
                    self._watch_jobs()
                else:
                    self._watch_idle()
            except Exception:
                logger.exception("the look after callers that went away and stages that died failed")
            # Every question about a caller goes to the server's process: with many requests, ask less often.
            pause_s = max(_CANCEL_POLL_S, _CANCEL_POLL_SHARE * (time.thread_time() - started_s))

    def _watch_idle(self) -> None:
        if not self._all_answered.is_set():
            return
        if self._run_folder.is_draining():
            self._run_folder.tell_drained()
        if self._run_folder.is_retired():
            logger.info("another process takes the requests now, and this one has answered its own: it ends")
            self._run_folder.end_beats()
            # Not in order: Triton would wait for the lost calls.
            os._exit(0)
        self._ask_for_replacement(self._calls.dead()[1], _FEW_LOST)

    def _watch_jobs(self) -> None:
        with self._jobs_lock:
            jobs = list(self._jobs.values())
        dead, num_lost = self._calls.dead()
        self._end_lost(jobs, dead)
        self._cancel_abandoned(jobs, dead)
        self._ask_for_replacement(num_lost, round(_MANY_LOST_SHARE * self._config.max_concurrent_requests))

    def _ask_for_replacement(self, num_lost: int, limit: int) -> None:
        """Lost calls take threads from Triton's pool until no call can be made: a new process has a new pool."""
        if not self._is_worn and num_lost >= max(limit, _FEW_LOST):
            self._is_worn = True
            logger.warning("%d calls to stages whose process died are lost: a new process is asked for", num_lost)
            self._run_folder.tell_worn()

    def _end_lost(self, jobs: Sequence[_Job], dead: set[int]) -> None:
        """Answer the callers of requests that were in a process which has ended."""
        for job in jobs:
            stage = job.stage
            if stage is not None and stage.pid in dead:
                logger.error(
                    "request %s was in %s when its process (pid %d) died: answered UNAVAILABLE", job.request_id, *stage
                )
                error = WorkerGroupError(f"the process of {stage.model} died while it ran this request; try again")
                job.cancel_reason = "its stage died"
                self._finish(job, pb_utils.InferenceResponse(error=triton_error(error)))

    def _cancel_abandoned(self, jobs: Sequence[_Job], dead: set[int]) -> None:
        """Tell the stages; again at every turn until the call returns, since it may not have reached the stage yet.

        In other threads: a stage that hangs, or dies meanwhile, does not answer.
        """
        by_stage: defaultdict[Stage, list[str]] = defaultdict(list)
        for job in jobs:
            if self.stream:
                job.keep_alive()
            stage = job.stage
            if not job.notice_cancel() or stage is None:
                continue
            if stage not in self._cancelling and stage.pid not in dead:
                by_stage[stage].append(job.request_id)
        for stage, request_ids in by_stage.items():
            self._cancelling.add(stage)
            start_thread(self._cancel_apart, stage, request_ids)

    def _cancel_apart(self, stage: Stage, request_ids: list[str]) -> None:
        try:
            self._cancel(stage, request_ids)
        finally:
            self._cancelling.discard(stage)

    def _cancel(self, stage: Stage, request_ids: list[str]) -> None:
        try:
            self._calls.call(stage, write_cancel_order(CancelOrder(request_ids)))
        except DiffusionError as error:
            logger.warning("requests %s could not be cancelled in %s: %s", ", ".join(request_ids), stage.model, error)


class _Job:
    """A request of a caller, from its arrival to its last response."""

    def __init__(self, request_id: str, request: Any, sender: Any) -> None:
        self.request_id = request_id
        self.caller_id: str = request.request_id()
        self.cancel_key = ""
        self.arrived_s = time.monotonic()
        self.stage: Stage | None = None
        """Where it is."""
        self.cancel_reason: str | None = None
        self.progress = Progress(0, 0, 0.0, None)
        """What the caller of a stream was told last."""
        self._last_sent_s = self.arrived_s
        # Microseconds, 0 for none: the `timeout` parameter of the request.
        self._timeout_s = request.timeout() / 1e6
        self._sender = sender
        self._finished = False
        # A response sender must not be asked anything once the last response is out.
        self._lock = threading.Lock()

    def read_parameters(self, request: Any) -> None:
        """What the request carries beside its tensors."""
        self.cancel_key = make_cancel_key(read_cancel_scope(request), self.caller_id)

    @property
    def cancelled(self) -> bool:
        """Whether the request shall not be finished."""
        return self.cancel_reason is not None

    def notice_cancel(self) -> bool:
        """Whether the caller went away or cancelled, or its time-out is over."""
        with self._lock:
            if not self._finished and not self.cancelled:
                if self._sender.is_cancelled():
                    self.cancel_reason = "by its caller"
                elif 0 < self._timeout_s < time.monotonic() - self.arrived_s:
                    self.cancel_reason = f"its timeout of {self._timeout_s:g} s is over"
            return self.cancelled

    def send(self, tensors: list[Any]) -> None:
        """Send a response that is not the last."""
        with self._lock:
            if not self._finished and not self.cancelled:
                self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors))
                self._last_sent_s = time.monotonic()

    def send_progress(self, progress: Progress) -> None:
        """Tell the caller of a stream where its request is."""
        self.progress = progress
        self.send([_progress_tensor(progress)])

    def keep_alive(self) -> None:
        """Say again where the request is if nothing was said for long: a caller that reads HTTP and went away is
        noticed only when something is sent to it, also while the request waits.
        """
        now_s = time.monotonic()
        if now_s - self._last_sent_s > _KEEP_ALIVE_S:
            self.send([_progress_tensor(self.progress)])

    def finish(self, response: Any) -> None:
        """Send the last response."""
        with self._lock:
            self._finished = True
        send_final(self._sender, response)


def _progress_tensor(progress: Progress) -> Any:
    remaining_s = None if progress.remaining_s is None else round(progress.remaining_s, 4)
    return json_tensor(
        "progress",
        {
            "stage": "denoising",
            "step": progress.step,
            "total": progress.total,
            "elapsed_s": round(progress.elapsed_s, 4),
            "remaining_s": remaining_s,
            "restarts": progress.restarts,
        },
    )


def _output_tensors(job: _Job, state: RequestState, tensors: dict[str, bytes]) -> list[Any]:
    request = state.request
    outputs = [
        pb_utils.Tensor("seed", np.array(request.output_seeds, dtype=np.int64)),
        json_tensor("timings", _timings(job, state)),
    ]
    if request.output_format == "raw":
        (name,) = tensors
        pixels = np.frombuffer(tensors[name], np.uint8).reshape(state.tensor_infos[name].shape)
        outputs.append(pb_utils.Tensor("raw_video" if name == "videos" else "raw_image", pixels))
    else:
        outputs.append(bytes_tensor(_OUTPUT[request.num_frames > 1], _media(tensors)))
    return outputs


_OUTPUT = {False: "generated_image", True: "generated_video"}


def _media(tensors: dict[str, bytes]) -> list[bytes]:
    return [tensors[f"media.{index}"] for index in range(len(tensors))]


def _timings(job: _Job, state: RequestState) -> dict[str, Any]:
    stages = state.timings
    return {
        "request_id": job.caller_id or job.request_id,
        "total_s": time.monotonic() - job.arrived_s,
        "queue_s": sum(timing.queue_s for timing in stages.values()),
        "stages_s": {stage: timing.run_s for stage, timing in stages.items()},
        "steps_s": [step_s for timing in stages.values() for step_s in timing.steps_s],
        "warnings": state.warnings,
    }
