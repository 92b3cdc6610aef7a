"""`triton-diffusion cancel`: take back a request that another process sent."""

from __future__ import annotations

import argparse
import sys

from triton_diffusion_client._terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_INVALID,
    EXIT_OK,
    print_error,
    print_line,
)
from triton_diffusion_client.client import DiffusionClient
from triton_diffusion_client.errors import (
    DiffusionClientError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestTimeoutError,
)


def cancel(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    try:
        cancelled = _cancel(args)
    except ModelNotFoundError as error:
        print_error(f"{error}; name the server's model that cancels with --cancellation-model")
        return EXIT_FAILED
    except RequestTimeoutError as error:
        print_error(f"{error}; allow more with --timeout-s")
        return EXIT_FAILED
    except (InvalidRequestError, ValueError, TypeError) as error:
        print_error(str(error))
        return EXIT_INVALID
    except (DiffusionClientError, OSError) as error:
        print_error(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        print_error("interrupted; the request may be cancelled or not")
        return EXIT_INTERRUPTED
    if not cancelled:
        print_line(f"no request {args.request_id} is waiting or running under this scope", sys.stderr)
        return EXIT_FAILED
    print_line(f"cancelled {args.request_id}", sys.stdout)
    return EXIT_OK


def _cancel(args: argparse.Namespace) -> bool:
    with DiffusionClient(
        args.url,
        args.protocol,
        cancellation_model=args.cancellation_model,
        cancel_scope=args.cancel_scope,
        timeout_s=args.timeout_s,
        headers=dict(args.header),
        ssl=args.ssl,
    ) as client:
        return client.cancel(args.request_id)
