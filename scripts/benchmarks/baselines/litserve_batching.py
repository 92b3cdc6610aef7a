"""LitServe around the pipeline, with its batching: requests that wait together are drawn together."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import litserve
from fastapi import Response

from benchmarks.baselines.drawing import draw, load_pipeline_of_benchmark, shared_arguments


class PictureAPI(litserve.LitAPI):
    """One call of the pipeline for all requests of a batch that ask for the same size and number of steps."""

    def setup(self, device: str) -> None:
        """Load; called in the worker's process."""
        self._pipeline = load_pipeline_of_benchmark()

    def batch(self, inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Requests as they are: they need not be alike."""
        return list(inputs)

    def predict(self, x: Sequence[dict[str, Any]]) -> list[bytes]:
        """PNG files, in the order of the requests."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, asked in enumerate(x):
            groups[tuple(sorted(shared_arguments(asked).items()))].append(index)
        files = [b""] * len(x)
        for indices in groups.values():
            for index, data in zip(indices, draw(self._pipeline, [x[index] for index in indices]), strict=True):
                files[index] = data
        return files

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """One answer a request."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """The file as it is."""
        return Response(output, media_type="image/png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--batch-timeout", type=float, default=0.02, metavar="SECONDS")
    args = parser.parse_args()
    api = PictureAPI(max_batch_size=args.max_batch_size, batch_timeout=args.batch_timeout)
    server = litserve.LitServer(api, accelerator="auto", devices=1, timeout=False)
    server.run(
        host="127.0.0.1",
        port=args.port,
        log_level="warning",
        generate_client_file=False,
        timeout_keep_alive=3600,
    )


if __name__ == "__main__":
    main()
