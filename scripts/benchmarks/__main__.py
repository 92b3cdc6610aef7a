"""Measure what serving costs, and check that it changes no picture."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks import faults, footprint, hostile, overhead, parity, scaling, serving, soak
from benchmarks.report import print_report, write_json
from triton_diffusion.errors import ConfigurationError

_BENCHMARKS = {
    "overhead": overhead,
    "footprint": footprint,
    "parity": parity,
    "scaling": scaling,
    "serving": serving,
    "faults": faults,
    "hostile": hostile,
    "soak": soak,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code, 1 where something was measured that must not be."""
    # Told to end, we end as after Ctrl-C: every server and process of ours goes first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = _parse_arguments(arguments)
    try:
        report = _BENCHMARKS[args.benchmark].measure(args)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was left running", file=sys.stderr)
        return 130
    print_report(report)
    if args.json is not None:
        write_json(args.json, report)
    return 1 if report.has_failed else 0


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in _BENCHMARKS.items():
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
        command.add_argument(
            "--model-path",
            default="demo",
            help='FLUX checkpoint: folder, hub id, or "demo" for the built-in one (default: %(default)s)',
        )
        module.add_arguments(command)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
