"""Nothing that we read may run code: what the sources of the server and the client must not contain."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("python_backend", "client", "model_repository") for path in (ROOT / folder).rglob("*.py")
)
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "os.system"}
FORBIDDEN_ARGUMENTS = {"trust_remote_code", "allow_pickle", "shell"}
FORBIDDEN_METHODS = {"send_pyobj", "recv_pyobj", "broadcast_object_list", "all_gather_object", "scatter_object_list"}
"""Of ZMQ and torch.distributed: these pickle."""


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_there_are_sources() -> None:
    assert len(SOURCES) > 80


def test_nothing_that_is_read_can_run_code() -> None:
    for path in SOURCES:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
        assert not imported & FORBIDDEN_MODULES, path
        for name, call in _calls(path):
            assert name not in FORBIDDEN_CALLS, path
            assert name.rpartition(".")[2] not in FORBIDDEN_METHODS, path
            assert not {keyword.arg for keyword in call.keywords} & FORBIDDEN_ARGUMENTS, path


def test_components_are_loaded_from_the_checkpoint_folder_alone_and_their_weights_from_safetensors() -> None:
    """What is given a type or a device has weights; the rest are configurations and tokenizers."""
    found = [
        (path, {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords})
        for path in SOURCES
        for name, call in _calls(path)
        if name.rpartition(".")[2] == "from_pretrained"
    ]
    assert len(found) > 3
    for path, given in found:
        assert given.get("local_files_only") == "True", path
        if "device_map" in given or "dtype" in given:
            assert given.get("use_safetensors") == "True", path


def test_no_address_or_path_of_a_caller_is_opened() -> None:
    """What decides what a request means, and what decodes its files, opens nothing at all."""
    package = ROOT / "python_backend" / "triton_diffusion"
    opening = {"open", "urlopen", "read_bytes", "read_text", "get", "urlretrieve"}
    for path in (*(package / "media").glob("*.py"), package / "request.py", package / "triton" / "conversion.py"):
        # Of these names, `get` is that of dictionaries, and `av.open` writes into memory.
        found = {name for name, _ in _calls(path) if name.rpartition(".")[2] in opening}
        assert {name for name in found if not name.endswith(".get")} <= {"av.open"}
        imports = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert not imports & {"urllib.request", "requests", "httpx", "http.client", "socket"}
