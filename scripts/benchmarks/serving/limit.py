"""The limit: FluxPipeline called in a process with batches of the best size, and nothing else to do."""

from __future__ import annotations

import itertools

from tqdm import tqdm

from benchmarks.in_process import InProcessPipeline
from benchmarks.picture import PictureRequest
from benchmarks.serving.bench import Bench

BATCH_SIZES = (1, 2, 4, 8, 16)


def find_best_batch_size(bench: Bench, pipeline: InProcessPipeline) -> tuple[int, dict[int, float]]:
    """The batch size with the most pictures a second, and these of every size."""
    seconds = dict.fromkeys(BATCH_SIZES, 0.0)
    num_pictures = max(BATCH_SIZES)
    pictures = list(itertools.islice(bench.pictures(), num_pictures))
    for size in tqdm(BATCH_SIZES, desc="batch sizes, warm-up", unit="size"):
        pipeline.generate_batch(pictures[:size])
    for _ in range(bench.scale.batch_repeats):
        for size in tqdm(BATCH_SIZES, desc="batch sizes", unit="size"):
            seconds[size] += _seconds(pipeline, pictures, size)
    rates = {size: bench.scale.batch_repeats * num_pictures / seconds[size] for size in BATCH_SIZES}
    return max(rates, key=lambda size: rates[size]), rates


def pictures_per_s(bench: Bench, pipeline: InProcessPipeline, batch_size: int) -> float:
    """One turn."""
    pictures = list(itertools.islice(bench.pictures(), 2 * max(BATCH_SIZES)))
    pipeline.generate_batch(pictures[:1])
    return len(pictures) / _seconds(pipeline, pictures, batch_size)


def _seconds(pipeline: InProcessPipeline, pictures: list[PictureRequest], batch_size: int) -> float:
    starts = range(0, len(pictures), batch_size)
    return sum(pipeline.generate_batch(pictures[start : start + batch_size]) for start in starts)
