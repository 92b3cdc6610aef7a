"""The command line `triton-diffusion`. Serving needs more installed than asking: imported only when called."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import get_args

from triton_diffusion_client._connection import DEFAULT_URLS
from triton_diffusion_client._model_names import DEFAULT_NAME
from triton_diffusion_client._protocol import DeadlineAction, OutputFormat
from triton_diffusion_client._retries import DEFAULT_RETRIES, DEFAULT_RETRY_TIMEOUT_S

# Whoever mistyped an address should not have to wait for a server that never was.
_CONNECT_TIMEOUT_S = 5.0
_SERVER_COMMANDS = {
    "serve": "serve a checkpoint with Triton",
    "build-repository": "write a Triton model repository for a checkpoint, without serving it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done, 1 failed (or nothing to cancel, or not ready), 2 wrong usage or invalid request, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in _SERVER_COMMANDS:
        return _run_server_command(argv[0], argv[1:])
    args = _build_parser().parse_args(argv)
    if args.command in _SERVER_COMMANDS:  # behind a "--"
        return _run_server_command(args.command, [])
    return _run_client_command(args)


def _run_client_command(args: argparse.Namespace) -> int:
    match args.command:
        case "cancel":
            from triton_diffusion_client import _cancel_command

            return _cancel_command.cancel(args)
        case "families":
            from triton_diffusion_client import _families_command

            return _families_command.families(args)
        case "health":
            from triton_diffusion_client import _health_command

            return _health_command.health(args)
        case "load":
            from triton_diffusion_client import _model_control_command

            return _model_control_command.load(args)
        case "unload":
            from triton_diffusion_client import _model_control_command

            return _model_control_command.unload(args)
        case _:
            from triton_diffusion_client import _generate_command

            return _generate_command.generate(args)


def _run_server_command(command: str, argv: Sequence[str]) -> int:
    try:
        from triton_diffusion import commands
    except ImportError as error:
        missing = error.name or str(error)
        print(
            f"error: '{command}' needs {missing}, which is not installed; "
            'run: pip install "triton-diffusion[server]"',
            file=sys.stderr,
        )
        return 1
    parser = argparse.ArgumentParser(
        prog=f"triton-diffusion {command}", description=_sentence(_SERVER_COMMANDS[command])
    )
    if command == "serve":
        commands.add_serve_arguments(parser)
        return commands.serve(parser.parse_args(argv))
    commands.add_build_repository_arguments(parser)
    return commands.build_repository(parser.parse_args(argv))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="triton-diffusion",
        description="Serve diffusion models from Triton, and ask such a server for pictures and videos.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (add_arguments, summary) in _CLIENT_COMMANDS.items():
        add_arguments(commands.add_parser(command, help=summary, description=_sentence(summary)))
    for command, summary in _SERVER_COMMANDS.items():
        commands.add_parser(command, help=summary)
    return parser


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    picture = parser.add_argument_group("the picture or video (the server's defaults apply to what is not given)")
    picture.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="what to show; repeat it for several requests at the same time",
    )
    picture.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    picture.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture to start from; repeat it for a model that takes several",
    )
    picture.add_argument("--strength", type=float, metavar="X", help="how far --image is changed: above 0, at most 1")
    picture.add_argument("--height", type=int, metavar="PIXELS")
    picture.add_argument("--width", type=int, metavar="PIXELS")
    picture.add_argument("--num-frames", type=int, metavar="N", help="pictures of a video")
    picture.add_argument("--fps", type=float, metavar="X", help="frames a second of a video")
    picture.add_argument("--num-inference-steps", type=int, metavar="N", help="denoising steps")
    picture.add_argument("--guidance-scale", type=float, metavar="X", help="classifier-free guidance")
    picture.add_argument(
        "--guidance-scale-2",
        type=float,
        metavar="X",
        help="that of the steps of low noise, where a second transformer makes those, as in Wan 2.2",
    )
    picture.add_argument(
        "--embedded-guidance-scale", type=float, metavar="X", help="guidance of a distilled model, such as FLUX.1-dev"
    )
    picture.add_argument(
        "--flow-shift", type=float, metavar="X", help="shift of a flow-matching schedule: higher, longer at high noise"
    )
    picture.add_argument("--seed", type=int, metavar="N", help="of the first output; without it a random one")
    picture.add_argument("--num-images-per-prompt", type=int, metavar="N", help="pictures, or videos")
    picture.add_argument("--max-sequence-length", type=int, metavar="N", help="tokens of the prompt that count")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        default="outputs/",
        metavar="PATH",
        help="folder, or file for a single picture or video: what it holds is replaced (default: %(default)s)",
    )
    output.add_argument(
        "--output-format",
        choices=[name for name in get_args(OutputFormat) if name != "raw"],
        help="default: as --output ends, or the server's: png for pictures, mp4 for videos",
    )
    output.add_argument("--output-quality", type=int, metavar="N", help="1 to 100, for jpeg and webp")
    output.add_argument("--preview-interval", type=int, metavar="N", help="also save a preview every N steps")
    output.add_argument("--json", action="store_true", help="one line of JSON for each picture or video")
    output.add_argument("--quiet", action="store_true", help="no progress bar; only the paths, and errors")

    queue = parser.add_argument_group("the queue")
    queue.add_argument("--priority", type=int, metavar="N", help="0 to 9: 9 goes first (the server's default: 5)")
    queue.add_argument(
        "--deadline-s",
        type=float,
        metavar="S",
        help="the result is wanted within S seconds after it is first asked for",
    )
    queue.add_argument(
        "--deadline-action",
        choices=get_args(DeadlineAction),
        help="what becomes of a request that cannot meet its deadline: refuse it at once, or drop it later (the "
        "server's default); drop: try, and drop it later; continue: finish it late",
    )
    queue.add_argument(
        "--request-id",
        metavar="ID",
        help="by which 'triton-diffusion cancel' and the server's log know the request; for a single --prompt",
    )
    _add_cancel_scope_argument(queue)

    server = parser.add_argument_group("server")
    _add_connection_arguments(server)
    _add_retry_arguments(server)
    _add_model_argument(server)
    server.add_argument(
        "--stream-model", metavar="NAME", help="the model that sends progress (default: that of --model, MODEL_stream)"
    )
    server.add_argument("--no-stream", action="store_true", help="ask for one answer, without progress")
    server.add_argument(
        "--concurrency", type=_at_least_one, default=8, metavar="N", help="requests at a time (default: %(default)s)"
    )


def _add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID", help="as named by --request-id, or by any other client")
    _add_cancel_scope_argument(parser)
    server = parser.add_argument_group("server")
    _add_connection_arguments(server)
    _add_model_argument(server)
    server.add_argument(
        "--cancellation-model", metavar="NAME", help="default: that of --model, cancellation or MODEL_cancellation"
    )


def _add_families_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="FAMILY", help="only this family (default: all that are served)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    server = parser.add_argument_group("server")
    _add_connection_arguments(server)
    _add_retry_arguments(server)
    _add_model_argument(server)


def _add_health_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of text")
    server = parser.add_argument_group("server")
    _add_connection_arguments(server)
    _add_model_argument(server)


def _add_model_control_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        help=f"of the chain, such as {DEFAULT_NAME}; all models named after it come with it",
    )
    server = parser.add_argument_group(
        "server (in --model-control-mode=explicit, as that of 'triton-diffusion serve' is)"
    )
    _add_connection_arguments(server)
    server.add_argument(
        "--admin-key",
        metavar="KEY",
        help="what the server was started with, without which it lets nobody load and unload (default: the environment "
        "variable TRITON_DIFFUSION_ADMIN_KEY, which other users of this machine cannot read)",
    )


def _add_model_argument(server: argparse._ActionsContainer) -> None:
    server.add_argument(
        "--model", default=DEFAULT_NAME, metavar="NAME", help="the server's chain of stages (default: %(default)s)"
    )


def _add_cancel_scope_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--cancel-scope",
        default="",
        metavar="SCOPE",
        help="a cancel finds only requests of the same scope (default: empty, as for all who name none; the request's "
        "id is then the only secret)",
    )


def _add_connection_arguments(server: argparse._ActionsContainer) -> None:
    server.add_argument(
        "--url",
        metavar="HOST:PORT",
        help=f"default: {DEFAULT_URLS['grpc']}, with --protocol http {DEFAULT_URLS['http']}",
    )
    server.add_argument("--protocol", choices=list(DEFAULT_URLS), default="grpc", help="default: %(default)s")
    server.add_argument("--timeout-s", type=float, metavar="S", help="give up on a request after S seconds")
    server.add_argument("--ssl", action="store_true", help="encrypt the connection")
    server.add_argument(
        "--header",
        type=_header,
        action="append",
        default=[],
        metavar="NAME:VALUE",
        help="sent with each request; may be repeated",
    )


def _add_retry_arguments(server: argparse._ActionsContainer) -> None:
    server.add_argument(
        "--retries",
        type=int,
        default=DEFAULT_RETRIES,
        metavar="N",
        help="how often a request is sent again while the server is starting, restarting, full or out of reach "
        "(default: %(default)s; 0: fail at once)",
    )
    server.add_argument(
        "--retry-timeout-s",
        type=float,
        default=DEFAULT_RETRY_TIMEOUT_S,
        metavar="S",
        help="seconds of waiting between the attempts of a request in all (default: %(default)g)",
    )
    server.add_argument(
        "--connect-timeout-s",
        type=float,
        default=_CONNECT_TIMEOUT_S,
        metavar="S",
        help="seconds after which a command gives up that has never been connected to a server; give more for one that "
        "is starting (default: %(default)g)",
    )


_CLIENT_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "generate": (_add_generate_arguments, "ask a running server for pictures or videos"),
    "cancel": (_add_cancel_arguments, "take back a request that waits or runs"),
    "families": (_add_families_arguments, "tell what the served checkpoint takes"),
    "health": (
        _add_health_arguments,
        "tell how a server and its stages are; exit code 0: ready, 1: not",
    ),
    "load": (_add_model_control_arguments, "load the models of a name into a running server"),
    "unload": (_add_model_control_arguments, "unload the models of a name, once their requests are done"),
}


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; give 1 or more")
    return number


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition(":")
    if not separator or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no header; give NAME:VALUE")
    return name.strip(), value.strip()


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _version() -> str:
    try:
        return importlib.metadata.version("triton-diffusion")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
