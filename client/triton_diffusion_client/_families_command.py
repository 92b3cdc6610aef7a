"""`triton-diffusion families`: what the served checkpoint takes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from triton_diffusion_client._terminal import EXIT_OK, Hints, client_options, print_line, retry_options, run_command
from triton_diffusion_client.client import DiffusionClient
from triton_diffusion_client.errors import ModelNotFoundError
from triton_diffusion_client.families import Family, Parameter

_HEAD = ("parameter", "default", "allowed", "meaning")


def families(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    hints: Hints = {ModelNotFoundError: "name the chain with --model"}
    return run_command(lambda: _families(args), interrupted="nothing was changed", hints=hints)


def _families(args: argparse.Namespace) -> int:
    with DiffusionClient(model=args.model, **client_options(args), **retry_options(args)) as client:
        found = client.families(args.name)
    if args.json:
        print_line(json.dumps([asdict(family) for family in found], ensure_ascii=False, indent=2), sys.stdout)
    else:
        for line in _describe(found):
            print_line(line, sys.stdout)
    return EXIT_OK


def _describe(found: Sequence[Family]) -> Iterator[str]:
    for number, family in enumerate(found):
        if number:
            yield ""
        yield f"{family.family} ({family.pipeline_class}): {', '.join(family.tasks)}"
        rows = [_HEAD, *(_row(name, parameter) for name, parameter in family.parameters.items())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
        for row in rows:
            yield "  ".join(["", *(cell.ljust(width) for cell, width in zip(row, widths, strict=True))]).rstrip()


def _row(name: str, parameter: Parameter) -> tuple[str, str, str, str]:
    default = "" if parameter.default is None else _show(parameter.default)
    return name, default, _allowed(parameter), parameter.description


def _allowed(parameter: Parameter) -> str:
    if parameter.choices:
        return ", ".join(map(_show, parameter.choices))
    if parameter.min is not None and parameter.max is not None:
        return f"{_show(parameter.min)} to {_show(parameter.max)}"
    if parameter.min is not None:
        return f"at least {_show(parameter.min)}"
    return "" if parameter.max is None else f"at most {_show(parameter.max)}"


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
