"""`triton-diffusion load` and `unload`: all models of a name."""

from __future__ import annotations

import argparse
import sys
import time

from triton_diffusion_client._connection import open_connection
from triton_diffusion_client._model_control import ModelControl
from triton_diffusion_client._terminal import EXIT_OK, print_line, run_command


def load(args: argparse.Namespace) -> int:
    """Load the models and return the exit code."""
    return run_command(lambda: _load(args), interrupted="the server goes on with the model that it was loading")


def unload(args: argparse.Namespace) -> int:
    """Unload the models and return the exit code."""
    return run_command(lambda: _unload(args), interrupted="the server goes on with the model that it was unloading")


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
    return ModelControl(connection, args.timeout_s)
