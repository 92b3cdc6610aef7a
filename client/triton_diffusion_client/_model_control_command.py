"""`triton-diffusion load` and `unload`: all models of a name."""

from __future__ import annotations

import argparse
import os
import sys
import time

from triton_diffusion_client._connection import open_connection
from triton_diffusion_client._model_control import ModelControl
from triton_diffusion_client._terminal import EXIT_OK, Hints, print_line, run_command
from triton_diffusion_client.errors import AccessDeniedError

ADMIN_KEY_VARIABLE = "TRITON_DIFFUSION_ADMIN_KEY"
_HINTS: Hints = {
    AccessDeniedError: f"give the key that the server was started with, as --admin-key or in {ADMIN_KEY_VARIABLE}"
}


def load(args: argparse.Namespace) -> int:
    """Load the models and return the exit code."""
    interrupted = "the server goes on with the model that it was loading"
    return run_command(lambda: _load(args), interrupted=interrupted, hints=_HINTS)


def unload(args: argparse.Namespace) -> int:
    """Unload the models and return the exit code."""
    interrupted = "the server goes on with the model that it was unloading"
    return run_command(lambda: _unload(args), interrupted=interrupted, hints=_HINTS)


def _load(args: argparse.Namespace) -> int:
    started_s = time.monotonic()
    with _open_control(args) as control:
        for model in control.load(args.name):
            print_line(f"loaded {model} after {time.monotonic() - started_s:.1f} s", sys.stdout)
    return EXIT_OK


def _unload(args: argparse.Namespace) -> int:
    num_unloaded = 0
    with _open_control(args) as control:
        for model in control.unload(args.name):
            num_unloaded += 1
            print_line(f"unloaded {model}", sys.stdout)
    if not num_unloaded:
        print_line(f"no model of the name {args.name} was loaded", sys.stderr)
    return EXIT_OK


def _open_control(args: argparse.Namespace) -> ModelControl:
    connection = open_connection(url=args.url, protocol=args.protocol, headers=dict(args.header), ssl=args.ssl)
    key = args.admin_key or os.environ.get(ADMIN_KEY_VARIABLE)
    return ModelControl(connection.with_admin_key(key) if key else connection, args.timeout_s)
