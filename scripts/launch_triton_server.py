#!/usr/bin/env python3
"""Start tritonserver with a diffusion model; the same as `triton-diffusion serve`."""

import argparse
import sys

from triton_diffusion import commands


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands.add_serve_arguments(parser)
    return commands.serve(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
