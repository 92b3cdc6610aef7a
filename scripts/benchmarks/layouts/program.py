"""One rank: reads jobs from standard input, a line each, and answers each with a line. Run by RankPool."""

from __future__ import annotations

import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
from torch._C._distributed_c10d import FileStore

from benchmarks.layouts.messages import Denoised, DenoiseJob, Failed, Row
from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest, example_request
from triton_diffusion.runtime.messages import AdmitRequest, RunTick
from triton_diffusion.runtime.rank_executor import RankExecutor
from triton_diffusion.runtime.stage_loading import load_stage
from triton_diffusion.stages.packing import pack_tensors
from triton_diffusion.state import RequestState

_TEXT_TOKENS = 48


@dataclass
class Loaded:
    """What a rank holds between jobs."""

    group: RankGroup
    components: Components
    executor: RankExecutor


def main(load: Callable[[DenoiseJob], Loaded] | None = None) -> int:
    """Answer jobs until the input ends; `load` makes the model ready, unless it is to be parallelised by us."""
    load = load or _load
    # Libraries print, and standard output is for answers alone.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    loaded: Loaded | None = None
    for line in sys.stdin.buffer:
        answer: Denoised | Failed
        try:
            job = msgspec.json.decode(line, type=DenoiseJob)
            loaded = loaded or load(job)
            answer = _denoise(job, loaded)
            if not job.keep_open:
                loaded.group.close()
                loaded = None
        except Exception as error:
            traceback.print_exc()
            answer = Failed(error=f"{type(error).__name__}: {error}")
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()
    return 0


def _load(job: DenoiseJob) -> Loaded:
    size = job.parallel.num_ranks
    store = FileStore(job.store, size) if size > 1 else None
    group = RankGroup(rank=job.rank, size=size, device=torch.device("cpu"), store=store, parallel=job.parallel)
    dtype = getattr(torch, job.dtype)
    stage = load_stage("denoising", job.checkpoint, group, dtype=dtype, attention_backend=job.attention_backend)
    return Loaded(group, stage.components, stage.executor)


def _denoise(job: DenoiseJob, loaded: Loaded) -> Denoised:
    executor, group, components = loaded.executor, loaded.group, loaded.components
    for index, row in enumerate(job.rows):
        executor.admit(AdmitRequest(request_id=str(index), state=_blob(job, row, index, components)))
    tick_s = []
    latents: dict[int, torch.Tensor] = {}
    sent: dict[str, int] = {}
    for tick in range(job.num_ticks):
        rows = [
            (str(index), 0)
            for index, row in enumerate(job.rows)
            if row.joins_at <= tick < row.joins_at + row.num_inference_steps
        ]
        before = {name: axis.traffic.sent_bytes for name, axis in group.mesh.axes.items()}
        held = {int(name): executor._held[name] for name, _ in rows}
        started = time.perf_counter()
        done = executor.run(RunTick(tick_id=tick, rows=rows, num_steps=1))
        if tick >= job.warm_up_ticks:
            tick_s.append(time.perf_counter() - started)
        sent = {name: axis.traffic.sent_bytes - before[name] for name, axis in group.mesh.axes.items()}
        if done.failed:
            raise RuntimeError(str(done.failed))
        for index, one in held.items():
            assert one.work is not None
            latents[index] = one.work.rows[0].latents
    for index in range(len(job.rows)):
        executor.drop(str(index))
    executor.forget()
    return Denoised(
        latents=[latents[index][0].float().numpy().tobytes() for index in sorted(latents)],
        weight_bytes=sum(each.numel() * each.element_size() for each in components["transformer"].parameters()),
        peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        tick_s=tick_s,
        sent_bytes=sent,
    )


def _blob(job: DenoiseJob, row: Row, index: int, components: Components) -> bytes:
    """A request with embeddings of its own, equal on all ranks."""
    family = find_family(components.checkpoint)
    request: GenerationRequest = example_request(
        family.defaults(components.checkpoint),
        height=job.height,
        width=job.width,
        num_inference_steps=row.num_inference_steps,
        seed=row.seed,
        guidance_scale=row.guidance_scale,
        max_sequence_length=_TEXT_TOKENS,
    )
    generator = torch.Generator().manual_seed(row.seed)
    tensors = {}
    for prefix in ("", "negative.") if family.uses_guidance(request, components.checkpoint) else ("",):
        for name, like in family.denoise.example_inputs(components, request).items():
            tensors[prefix + name] = torch.randn(like.shape, generator=generator)
    return pack_tensors(tensors, RequestState(str(index), request).metadata())


if __name__ == "__main__":
    sys.exit(main())
