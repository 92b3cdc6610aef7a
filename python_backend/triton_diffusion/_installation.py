"""Find a tritonserver and say how to run it.

NVIDIA's image has one at /opt/tritonserver. Without the image, the wheel of nvidia-pytriton carries the same
server; its files only have to be laid out as the server expects them, and none of the wheel's Python code is
used.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from triton_diffusion.errors import ConfigurationError

_IMAGE_ROOT = Path("/opt/tritonserver")
_WHEEL = "nvidia-pytriton"


@dataclass(frozen=True, kw_only=True)
class TritonInstallation:
    """A tritonserver on this machine."""

    executable: Path
    """The server."""
    python_backend_files: tuple[Path, ...] = ()
    """The files of the Python backend, to be linked into a backend directory; empty if the server finds its own."""
    library_folders: tuple[Path, ...] = ()
    """What the server's own libraries need on LD_LIBRARY_PATH."""
    cache_folder: Path | None = None
    """Where the server finds its response caches; None if it finds them itself."""

    def prepare_backend_directory(self, folder: Path) -> list[str]:
        """Lay out the backend directory below `folder`, if one is needed; return the server's arguments for it."""
        if not self.python_backend_files:
            return []
        python_backend = folder / "python"
        python_backend.mkdir(parents=True)
        for file in self.python_backend_files:
            (python_backend / file.name).symlink_to(file)
        return [f"--backend-directory={folder}"]

    def response_cache_arguments(self, size_bytes: int) -> list[str]:
        """The server's arguments for a response cache in main memory."""
        folder = [f"--cache-directory={self.cache_folder}"] if self.cache_folder else []
        return [f"--cache-config=local,size={size_bytes}", *folder]

    def environment(self) -> dict[str, str]:
        """The environment for the server: ours, with its libraries and the running Python in front."""
        environment = dict(os.environ)
        # The stub takes the `python3` that comes first on PATH, and with it that environment's packages.
        environment["PATH"] = _join_paths(Path(sys.executable).parent, environment.get("PATH"))
        # Without LIBDIR the stub would take the system's libpython of the same minor version.
        environment["LD_LIBRARY_PATH"] = _join_paths(
            *self.library_folders, environment.get("LD_LIBRARY_PATH"), sysconfig.get_config_var("LIBDIR")
        )
        # Log lines of the models reach us when they are written, in the order of the server's own.
        environment["PYTHONUNBUFFERED"] = "1"
        # By default glibc gives every thread a heap of its own, up to 8 a core, each of which stays as large as it once
        # was: measured over 1,000 mixed requests, a third of them cancelled, a chain model grows from 26 to 33 MiB, and
        # tritonserver from 51 to 77; with two heaps to 28, where it stays, and to 72.
        environment.setdefault("MALLOC_ARENA_MAX", "2")
        return environment


def find_triton(executable: str | Path | None = None) -> TritonInstallation:
    """The tritonserver to run: `executable`, $TRITONSERVER, PATH, NVIDIA's image, or the wheel, in this
    order.

    Raises ConfigurationError if there is none, or if its Python backend was built for another Python than the
    running one.
    """
    named = executable or os.environ.get("TRITONSERVER")
    if named:
        found = shutil.which(named)
        if found is None:
            raise ConfigurationError(
                f"tritonserver={str(named)!r} is not an executable file; name the server's program"
            )
        return _checked(_installed_at(Path(found)))
    on_path = shutil.which("tritonserver") or shutil.which("tritonserver", path=str(_IMAGE_ROOT / "bin"))
    if on_path:
        return _checked(_installed_at(Path(on_path)))
    return _checked(_from_wheel())


def _installed_at(executable: Path) -> TritonInstallation:
    """The installation of `executable`, in the wheel's layout or one that finds its backends by itself."""
    if _wheel_root(executable).joinpath("python_backend_stubs").is_dir():
        return _in_wheel_layout(_wheel_root(executable))
    return TritonInstallation(executable=executable)


def _from_wheel() -> TritonInstallation:
    try:
        distribution = importlib.metadata.distribution(_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigurationError(
            "no tritonserver found: none named by --tritonserver or $TRITONSERVER, none on PATH, none in "
            f"{_IMAGE_ROOT / 'bin'}, and {_WHEEL} is not installed; run in NVIDIA's tritonserver image, or "
            f"pip install --no-deps {_WHEEL}==0.5.13"
        ) from None
    return _in_wheel_layout(Path(str(distribution.locate_file("pytriton/tritonserver"))))


def _in_wheel_layout(root: Path) -> TritonInstallation:
    backend = root / "backends" / "python"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        available = ", ".join(sorted((path.name for path in stub.parent.parent.iterdir()), key=_version_key))
        raise ConfigurationError(
            f"the tritonserver in {root} has no Python backend for Python {version}; run it with one of {available}"
        )
    return TritonInstallation(
        executable=root / "bin" / "tritonserver",
        python_backend_files=(
            backend / "libtriton_python.so",
            backend / "triton_python_backend_utils.py",
            stub,
        ),
        library_folders=(root.parent.parent / "nvidia_pytriton.libs",),
        cache_folder=root / "caches",
    )


def _checked(installation: TritonInstallation) -> TritonInstallation:
    """Refuse a Python backend of another Python version: its instances would fail on their first import."""
    stub = next(
        (file for file in installation.python_backend_files if file.name == "triton_python_backend_stub"),
        installation.executable.resolve().parent.parent / "backends" / "python" / "triton_python_backend_stub",
    )
    wanted = re.search(rb"libpython(\d+\.\d+)\.so", stub.read_bytes()) if stub.is_file() else None
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if wanted and wanted[1].decode() != running:
        raise ConfigurationError(
            f"the Python backend {stub} is built for Python {wanted[1].decode()}, but triton-diffusion runs "
            f"on {running}; install triton-diffusion for Python {wanted[1].decode()}"
        )
    return installation


def _wheel_root(executable: Path) -> Path:
    return executable.resolve().parent.parent


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _join_paths(*parts: str | Path | None) -> str:
    return os.pathsep.join(str(part) for part in parts if part)
