"""FastAPI around the pipeline: one request after the other, under a lock."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

from benchmarks.baselines.drawing import draw, load_pipeline_of_benchmark


class PictureArguments(BaseModel):
    """The body of a request."""

    prompt: str
    seed: int
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    guidance_scale: float = 3.5
    height: int
    width: int
    num_inference_steps: int
    max_sequence_length: int


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    # Always the same thread: OpenMP starts a team of threads for each one that calls it.
    with ThreadPoolExecutor(1) as thread:
        app.state.thread = thread
        app.state.lock = asyncio.Lock()
        app.state.pipeline = await asyncio.get_running_loop().run_in_executor(thread, load_pipeline_of_benchmark)
        yield


app = FastAPI(lifespan=_lifespan)


@app.get("/health")
async def health() -> str:
    """Answered as soon as the pipeline is loaded."""
    return "ok"


@app.post("/predict")
async def predict(arguments: PictureArguments) -> Response:
    """One PNG file."""
    async with app.state.lock:
        loop = asyncio.get_running_loop()
        (data,) = await loop.run_in_executor(app.state.thread, draw, app.state.pipeline, [arguments.model_dump()])
    return Response(data, media_type="image/png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(app, port=parser.parse_args().port, log_level="warning", timeout_keep_alive=3600)


if __name__ == "__main__":
    main()
