"""Start a Triton server with the built-in demo checkpoint and draw pictures through the client."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import textwrap
import time
from pathlib import Path

from tqdm import tqdm

from triton_diffusion.commands import ProgressLine
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.repository import find_model_repository
from triton_diffusion.server import TritonServer
from triton_diffusion_client import DiffusionClient, DiffusionClientError, GenerationResult, Progress, Timings

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPTS = (
    "a large red circle on a gray background",
    "a small blue star",
    "a green heart on a black background",
)


def main() -> int:
    args = parse_arguments()
    # Not the default, which would leave the server to its guard.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run(args)
    except (ConfigurationError, DiffusionClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="PROMPT", help="default: three examples")
    parser.add_argument("--keep", action="store_true", help="leave the server up until Ctrl-C, and say how to call it")
    parser.add_argument("--seed", type=int, default=0, help="of each picture (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, metavar="N", help="default: the checkpoint's")
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "outputs", metavar="FOLDER", help="default: outputs/"
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    log_file = args.output / "tritonserver.log"
    log_file.unlink(missing_ok=True)
    # Our own models are complete: without --disable-auto-complete-config each would be started twice.
    server = TritonServer(
        find_model_repository(),
        log_file=log_file,
        exit_timeout_s=30,
        extra_arguments=["--disable-auto-complete-config"],
    )
    with server:
        started = time.monotonic()
        wait_until_ready(server)
        print(
            f"tritonserver is up after {time.monotonic() - started:.1f} s; its log is {shown(log_file)}\n", flush=True
        )
        with DiffusionClient(server.grpc_address) as client:
            for prompt in args.prompts:
                result = draw(client, prompt, args)
                print_result(prompt, result, args)
        if args.keep:
            print(how_to_call(server), flush=True)
            with server.forwarding_signals():
                server.wait()
        print("stopping tritonserver", flush=True)


def wait_until_ready(server: TritonServer) -> None:
    progress = ProgressLine(is_alone=True)
    try:
        server.wait_until_ready(on_progress=progress.show)
    finally:
        progress.end()


def draw(client: DiffusionClient, prompt: str, args: argparse.Namespace) -> GenerationResult:
    """One request, with a bar that follows its denoising steps."""
    # Without a terminal the bar is written at its beginning and its end only.
    with tqdm(desc=prompt, unit=" steps", mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
        for event in client.stream(prompt, seed=args.seed, num_inference_steps=args.num_inference_steps):
            if isinstance(event, GenerationResult):
                bar.update((bar.total or 0) - bar.n)
                return event
            if isinstance(event, Progress) and event.stage == "denoising":
                bar.total = event.total
                bar.update(event.step - bar.n)
    raise AssertionError("a stream ends with its result")


def print_result(prompt: str, result: GenerationResult, args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    for output in result.outputs:
        name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:100] or "picture"
        path = output.save(args.output / f"{name}-seed-{output.seed}.{output.format}")
        print(shown(path))
    timings = result.timings
    print(f"  {timings.total_s:.3f} s in all, {timings.queue_s:.3f} s of it in queues")
    for stage, seconds in timings.stages_s.items():
        print(f"  {seconds:.3f} s {stage.replace('_', ' ')}{of_steps(timings) if stage == 'denoising' else ''}")
    for warning in result.warnings:
        print(f"  warning: {warning}")
    print(flush=True)


def of_steps(timings: Timings) -> str:
    if not timings.steps_s:
        return ""
    return f", {len(timings.steps_s)} steps of {1000 * sum(timings.steps_s) / len(timings.steps_s):.1f} ms"


def how_to_call(server: TritonServer) -> str:
    prompt = "a large red circle"
    program = shown(Path(sys.executable).parent / "triton-diffusion")
    return textwrap.dedent(f"""\
        The server runs until Ctrl-C. From another terminal:

        curl
          curl -s http://{server.http_address}/v2/models/diffusion/generate -d '{{"prompt": "{prompt}"}}' \\
            | python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["generated_image"]))' \\
            > circle.png

        Python ({shown(Path(sys.executable))})
          from triton_diffusion_client import DiffusionClient
          with DiffusionClient("{server.grpc_address}") as client:
              client.generate("{prompt}").images[0].save("circle.png")

        command line
          {program} generate --prompt "{prompt}" --url {server.grpc_address} --output circle.png

        metrics
          curl -s {server.metrics_url}
        """)  # noqa: E501  one line, so that it can be copied


def shown(path: Path) -> str:
    """A path as short as it can be from here."""
    path, here = path.absolute(), Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)


if __name__ == "__main__":
    sys.exit(main())
