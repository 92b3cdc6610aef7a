"""`triton-diffusion health`: whether the server serves, and how its stages are."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from triton_diffusion_client._terminal import EXIT_FAILED, EXIT_OK, Hints, client_options, print_line, run_command
from triton_diffusion_client.client import DiffusionClient
from triton_diffusion_client.errors import ModelNotFoundError
from triton_diffusion_client.health import Health, StageHealth

_HINTS: Hints = {
    ModelNotFoundError: "name the chain with --model; a server of an earlier version has no such model",
}


def health(args: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0 ready, 1 not, or not to be reached."""
    return run_command(lambda: _health(args), interrupted="nothing was changed", hints=_HINTS)


def _health(args: argparse.Namespace) -> int:
    with DiffusionClient(model=args.model, **client_options(args)) as client:
        found = client.health()
    if args.json:
        print_line(json.dumps(asdict(found)), sys.stdout)
    else:
        _print(found)
    return EXIT_OK if found.ready else EXIT_FAILED


def _print(found: Health) -> None:
    print_line("ready" if found.ready else "not ready", sys.stdout)
    width = max((len(name) for name in found.stages), default=0)
    for name, stage in found.stages.items():
        print_line(f"  {name.ljust(width)}  {_describe(stage)}", sys.stdout)


def _describe(stage: StageHealth) -> str:
    parts = [
        "ready" if stage.ready else "not ready",
        f"{stage.ready_replicas} of {stage.num_replicas} replicas",
        f"{stage.restarts_total} restarts",
    ]
    return f"{', '.join(parts)}{f': {stage.reason}' if stage.reason else ''}"
