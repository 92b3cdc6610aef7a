"""Run perf_analyzer against both chain models; scripts/perf_analyzer sets up what this needs."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from triton_diffusion.commands import ProgressLine
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.repository import find_model_repository
from triton_diffusion.server import TritonServer

# By option of perf_analyzer, which would only say that a key is missing.
_IMPOSSIBLE = {
    "--shared-memory": "perf_analyzer has it for models without optional inputs only",
    "--trace": "perf_analyzer cannot show the key that opens the server's trace settings; "
    "trace by 'triton-diffusion serve -- --trace-config=level=TIMESTAMPS --trace-config=rate=1 "
    "--trace-config=triton,file=FILE'",
}


def main() -> int:
    args = parse_arguments()
    try:
        with (
            running_server(args) as (http_address, grpc_address),
            tempfile.TemporaryDirectory(prefix="triton-diffusion-") as folder,
        ):
            input_data = Path(folder) / "input.json"
            input_data.write_text(json.dumps({"data": requests(args)}))
            http, grpc = ["-i", "http", "-u", http_address], ["-i", "grpc", "-u", grpc_address]
            exit_codes = [
                measure("diffusion over HTTP", ["-m", "diffusion", *http], input_data, args),
                measure("diffusion over gRPC", ["-m", "diffusion", *grpc], input_data, args),
                measure(
                    "diffusion_stream over a gRPC stream; latency is that of the last response",
                    ["-m", "diffusion_stream", *grpc, "--async", "--streaming"],
                    input_data,
                    args,
                ),
            ]
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        '\nThe tables\' "Server" lines count only the time until an instance takes a request in: our instances answer '
        "later. The server's own account of stages, steps and queues is on its metrics page."
    )
    return max(exit_codes)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/perf_analyzer", description=__doc__)
    parser.add_argument("--perf-analyzer", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--url", help="HTTP address of a running server, host:port (default: start one)")
    parser.add_argument("--grpc-url", help="gRPC address of that server, host:port")
    parser.add_argument("--concurrency", default="4", help="requests at once: N, or START:END:STEP (default: 4)")
    parser.add_argument("--request-count", type=int, default=24, help="requests a measurement (default: 24)")
    parser.add_argument("--prompt", default="a large red circle above a small blue star on a gray background")
    parser.add_argument("--num-inference-steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--height", type=int, help="default: the checkpoint's")
    parser.add_argument("--width", type=int, help="default: the checkpoint's")
    parser.add_argument("perf_analyzer_arguments", nargs="*", metavar="-- ARGUMENT", help="passed on, after --")
    args = parser.parse_args()
    if (args.url is None) != (args.grpc_url is None):
        parser.error("--url and --grpc-url belong together")
    for argument in args.perf_analyzer_arguments:
        for option, why in _IMPOSSIBLE.items():
            if argument.startswith(option):
                parser.error(f"{argument} does not work: {why}")
    return args


def requests(args: argparse.Namespace) -> list[dict[str, list[object]]]:
    """The requests that perf_analyzer goes through in turn; they differ in their seed: none can be cached."""
    given = {name: getattr(args, name) for name in ("num_inference_steps", "height", "width")}
    shared: dict[str, list[object]] = {name: [value] for name, value in given.items() if value is not None}
    return [{"prompt": [args.prompt], "seed": [seed], **shared} for seed in range(16)]


@contextlib.contextmanager
def running_server(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The addresses (HTTP, gRPC) of the given server, or of one that lives as long as the context."""
    if args.url is not None:
        yield args.url, args.grpc_url
        return
    log_file = Path(__file__).resolve().parents[1] / "outputs" / "tritonserver.log"
    with TritonServer(
        find_model_repository(),
        log_file=log_file,
        exit_timeout_s=30,
        extra_arguments=["--disable-auto-complete-config"],
    ) as server:
        progress = ProgressLine(is_alone=True)
        server.wait_until_ready(on_progress=progress.show)
        progress.end()
        yield server.http_address, server.grpc_address


def measure(title: str, arguments: list[str], input_data: Path, args: argparse.Namespace) -> int:
    """Run perf_analyzer once, its tables on our stdout; returns its exit code."""
    command = [
        args.perf_analyzer,
        *arguments,
        *("--input-data", str(input_data)),
        *("--concurrency-range", args.concurrency),
        *("--request-count", str(args.request_count)),
        # A generation takes long and its time varies little: one window is enough.
        *("--stability-percentage", "999"),
        *args.perf_analyzer_arguments,
    ]
    print(f"\n=== {title}\n$ {shlex.join(['perf_analyzer', *command[1:]])}", flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
