"""Fixtures for all tests: tiny checkpoints, each built once a session."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

# The rank processes of several tests share few cores: threads that wait must not spin. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing here may depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What servers and ranks measure at their start is kept for this run alone.
_CACHE = tempfile.TemporaryDirectory(prefix="triton-diffusion-test-cache-")
os.environ["TRITON_DIFFUSION_CACHE"] = _CACHE.name
# So that tests find the helper package `checkpoints`.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def flux_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX without guidance embedding, its schedule shifted by the size of the picture."""
    from checkpoints.flux import build_flux_checkpoint

    return build_flux_checkpoint(tmp_path_factory.mktemp("flux"), guidance_embeds=False, dynamic_shift=True)


@pytest.fixture(scope="session")
def flux_dev_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX with guidance embedding, its schedule shifted by the size of the picture."""
    from checkpoints.flux import build_flux_checkpoint

    return build_flux_checkpoint(tmp_path_factory.mktemp("flux-dev"), guidance_embeds=True, dynamic_shift=True)


@pytest.fixture(scope="session")
def flux_schnell_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX without guidance embedding, its schedule shifted by a fixed factor."""
    from checkpoints.flux import build_flux_checkpoint

    return build_flux_checkpoint(tmp_path_factory.mktemp("flux-schnell"), guidance_embeds=False, dynamic_shift=False)
