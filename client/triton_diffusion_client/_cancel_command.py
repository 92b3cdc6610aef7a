"""`triton-diffusion cancel`: take back a request that another process sent."""

from __future__ import annotations

import argparse
import sys

from triton_diffusion_client._terminal import EXIT_FAILED, EXIT_OK, Hints, client_options, print_line, run_command
from triton_diffusion_client.client import DiffusionClient
from triton_diffusion_client.errors import ModelNotFoundError

_HINTS: Hints = {ModelNotFoundError: "name the chain with --model, or the model that cancels with --cancellation-model"}


def cancel(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _cancel(args), interrupted="the request may be cancelled or not", hints=_HINTS)


def _cancel(args: argparse.Namespace) -> int:
    with DiffusionClient(
        model=args.model,
        cancellation_model=args.cancellation_model,
        cancel_scope=args.cancel_scope,
        **client_options(args),
    ) as client:
        cancelled = client.cancel(args.request_id)
    if not cancelled:
        print_line(f"no request {args.request_id} is waiting or running under this scope", sys.stderr)
        return EXIT_FAILED
    print_line(f"cancelled {args.request_id}", sys.stdout)
    return EXIT_OK
