"""Load, latency, cancelling and memory of the server, beside other ways to serve the same pipeline.

All sides are up at the same time and take turns in short stretches; those that do not have their turn are stopped.
The sides: ours (the server at its default settings), monolith (one Triton Python model around FluxPipeline), fastapi
(FastAPI, one request at a time), litserve (LitServe with its batching), and limit (FluxPipeline in a process, with the
batch size that is best). The workloads: see --workloads.
"""

from benchmarks.serving.command import add_arguments, measure

__all__ = ["add_arguments", "measure"]
