"""The command line `triton-diffusion`. Serving needs more installed than asking: imported only when called."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import get_args

from triton_diffusion_client._connection import DEFAULT_URLS
from triton_diffusion_client._protocol import DeadlineAction

_SERVER_COMMANDS = {
    "serve": "serve a checkpoint with Triton",
    "build-repository": "write a Triton model repository for a checkpoint, without serving it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done, 1 failed (or nothing to cancel), 2 wrong usage or invalid request, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in _SERVER_COMMANDS:
        return _run_server_command(argv[0], argv[1:])
    args = _build_parser().parse_args(argv)
    if args.command in _SERVER_COMMANDS:  # behind a "--"
        return _run_server_command(args.command, [])
    if args.command == "cancel":
        from triton_diffusion_client import _cancel_command

        return _cancel_command.cancel(args)
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
        prog="triton-diffusion", description="Serve diffusion models from Triton, and ask such a server for pictures."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    summary = "ask a running server for pictures"
    _add_generate_arguments(commands.add_parser("generate", help=summary, description=_sentence(summary)))
    summary = "take back a request that waits or runs"
    _add_cancel_arguments(commands.add_parser("cancel", help=summary, description=_sentence(summary)))
    for command, summary in _SERVER_COMMANDS.items():
        commands.add_parser(command, help=summary)
    return parser


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    picture = parser.add_argument_group("the picture (the server's defaults apply to what is not given)")
    picture.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="what to show; repeat it for several requests at the same time",
    )
    picture.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    picture.add_argument("--height", type=int, metavar="PIXELS")
    picture.add_argument("--width", type=int, metavar="PIXELS")
    picture.add_argument("--num-inference-steps", type=int, metavar="N", help="denoising steps")
    picture.add_argument("--guidance-scale", type=float, metavar="X", help="classifier-free guidance")
    picture.add_argument(
        "--embedded-guidance-scale", type=float, metavar="X", help="guidance of a distilled model, such as FLUX.1-dev"
    )
    picture.add_argument("--seed", type=int, metavar="N", help="of the first picture; without it the server draws one")
    picture.add_argument("--num-images-per-prompt", type=int, metavar="N")
    picture.add_argument("--max-sequence-length", type=int, metavar="N", help="tokens of the prompt that count")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        default="outputs/",
        metavar="PATH",
        help="folder, or file for a single picture (default: %(default)s)",
    )
    output.add_argument("--output-format", choices=["png", "jpeg", "webp"], help="default: as --output ends, or png")
    output.add_argument("--output-quality", type=int, metavar="N", help="1 to 100, for jpeg and webp")
    output.add_argument("--preview-interval", type=int, metavar="N", help="also save a preview every N steps")
    output.add_argument("--json", action="store_true", help="one line of JSON for each picture")
    output.add_argument("--quiet", action="store_true", help="no progress bar; only the paths, and errors")

    queue = parser.add_argument_group("the queue")
    queue.add_argument("--priority", type=int, metavar="N", help="0 to 9: 9 goes first (the server's default: 5)")
    queue.add_argument(
        "--deadline-s", type=float, metavar="S", help="the picture is wanted within S seconds after the server has it"
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
    server.add_argument("--stream-model", default="diffusion_stream", metavar="NAME", help="default: %(default)s")
    server.add_argument(
        "--model", default="diffusion", metavar="NAME", help="used with --no-stream (default: %(default)s)"
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
    server.add_argument("--cancellation-model", default="cancellation", metavar="NAME", help="default: %(default)s")


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
