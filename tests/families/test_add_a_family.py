"""Follow the guide families/README.md to the letter: what it says to write works, and keeps our style."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AuraFlowTransformer2DModel
from transformers import UMT5Config, UMT5EncoderModel

import checkpoints
from checkpoints.parity import Pair, assert_close, differs
from checkpoints.requests import make_request
from triton_diffusion import families
from triton_diffusion.config import ParallelConfig
from triton_diffusion.distributed.sequence import find_modules
from triton_diffusion.distributed.tensor_parallel import shard_specs
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families import registry
from triton_diffusion.loading.components import Components
from triton_diffusion.request import example_request
from triton_diffusion.state import read_state

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "python_backend/triton_diffusion/families/README.md").read_text()
FILES = dict(re.findall(r"^`(\S+\.py)`\n\n```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))
"""By their paths in the repository, all that the guide says to write."""
FAMILY = "python_backend/triton_diffusion/families/aura_flow"
PARITY = "tests/families/test_aura_flow_parity.py"
GUIDED_TESTS = re.findall(r"^def (test_\w+)", FILES[PARITY], re.MULTILINE)
SHORT, LONG = "x", "a lighthouse at dusk, waves break on the rocks, two black cats sleep under an old wooden table"


def write_files(root: Path) -> None:
    """What a reader of the guide writes."""
    for path, text in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def patched_registry() -> ModuleType:
    """The registry with the lines that the guide adds, each behind the line that the guide shows in front of it."""
    path = ROOT / "python_backend/triton_diffusion/families/registry.py"
    (diff,) = re.findall(r"^`python_backend/\S+/registry\.py`\n\n```diff\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    source, before = path.read_text(), ""
    for line in diff.splitlines(keepends=True):
        if line.startswith("+"):
            assert source.count(before) == 1, f"the registry has no line {before!r}"
            source = source.replace(before, before + line[1:])
        before = line[1:]
    module = ModuleType("patched_registry")
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The guide's parity test as a module; the family can be imported and is registered as long as this lives."""
    root = tmp_path_factory.mktemp("guide")
    write_files(root)
    with pytest.MonkeyPatch.context() as patch:
        for package, folder in ((families, Path(FAMILY).parent), (checkpoints, Path("tests/checkpoints"))):
            patch.setattr(package, "__path__", [*package.__path__, str(root / folder)])
        patch.syspath_prepend(root / Path(PARITY).parent)
        patch.setattr(registry, "FAMILIES", patched_registry().FAMILIES)
        yield importlib.import_module(Path(PARITY).stem)
    # diffusers has modules of that name, too.
    ours = [name for name in sys.modules if "aura_flow" in name and not name.startswith("diffusers.")]
    for name in ours:
        del sys.modules[name]
    for package in (families, checkpoints):
        package.__dict__.pop("aura_flow", None)


@pytest.fixture(scope="module")
def pair(guided: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    made: Pair = guided.aura_flow.__wrapped__(tmp_path_factory)
    return made


def test_the_guide_has_every_file_of_a_family() -> None:
    names = ("__init__", "family", "encode", "denoise", "decode", "parallelize")
    assert list(FILES) == [*(f"{FAMILY}/{name}.py" for name in names), "tests/checkpoints/aura_flow.py", PARITY]
    assert GUIDE.count("```python") == len(FILES), "a block without a path is followed by nobody"


def test_the_family_of_the_guide_is_not_here_already() -> None:
    """A guide to what exists would be tested against that."""
    assert not (ROOT / FAMILY).exists()
    others = [family for family in registry.FAMILIES if family.name != "aura_flow"]
    assert "AuraFlowPipeline" not in {name for family in others for name in family.pipeline_classes}


def test_links_of_the_guide_lead_to_files() -> None:
    folder = ROOT / "python_backend/triton_diffusion/families"
    prose = re.sub(r"^```.*?^```$|^`\S+`$", "", GUIDE, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", prose) + re.findall(r"`([a-z_0-9]+/[a-z_0-9/]+\.py)`", prose)
    assert len(links) > 4
    for link in links:
        assert any((near / link).exists() for near in (folder, ROOT, Path(diffusers.__file__).parents[1])), link


def test_the_guide_names_every_flag_of_a_family() -> None:
    always = ("name", "pipeline_classes", "tasks")
    flags = {name for name in families.base.ModelFamily.__annotations__ if name not in always}
    assert flags == set(re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE))


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_the_files_of_the_guide_keep_our_style(tmp_path: Path, command: list[str]) -> None:
    write_files(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # What is ours, for the order of imports, is what is beside the new files or here.
    folders = [f"{folder}/{name}" for folder in (tmp_path, ROOT) for name in ("python_backend", "tests")]
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", f"src = {json.dumps(folders)}", "."]
    done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", GUIDED_TESTS)
def test_the_tests_of_the_guide_pass(guided: ModuleType, pair: Pair, name: str) -> None:
    getattr(guided, name)(pair)


# What the guide's own tests must not lose.


@pytest.mark.parametrize("prompt", [SHORT, LONG])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_the_family_of_the_guide_draws_what_the_pipeline_draws(pair: Pair, prompt: str, guidance_scale: float) -> None:
    request = make_request(prompt=prompt, guidance_scale=guidance_scale, negative_prompt="dark", num_inference_steps=2)
    assert differs(pair.check_latents(request), pair.stages.latents(make_request(num_inference_steps=2)))
    pair.check_pictures(request)


def test_prompts_of_two_lengths_with_guidance_and_without_share_a_batch(pair: Pair) -> None:
    requests = {
        "short": make_request(prompt=SHORT, num_inference_steps=3, seed=1),
        "long": make_request(prompt=LONG, num_inference_steps=2, seed=2, guidance_scale=4.0, num_outputs=2),
    }
    states = [read_state(pair.stages.encode(name, request)) for name, request in requests.items()]
    keys = {pair.stages.family.batch_key("denoising", state.request, state.tensor_infos) for state in states}
    assert len(keys) == 1
    pair.check_batch(requests, joins={"short": 0, "long": 1})


def test_the_example_inputs_of_the_guide_have_the_shapes_of_real_ones(pair: Pair) -> None:
    stages, family = pair.stages, pair.stages.family
    request = example_request(family.defaults(stages.checkpoint), num_inference_steps=1, guidance_scale=1.0)
    encoded = read_state(stages.encode("example", request)).tensor_infos
    components = Components(stages.checkpoint, torch.device("cpu"), torch.float32, pair.pipeline.components)
    example = family.denoise.example_inputs(components, request)
    assert {name: list(tensor.shape) for name, tensor in example.items()} == {
        name: list(info.shape) for name, info in encoded.items()
    }
    latents = stages.latents(request)
    assert family.decode.example_inputs(components, request)["latents"].shape == latents.shape
    assert_close(latents, pair.reference(request))


def test_the_plans_of_the_guide_fit_the_models(pair: Pair) -> None:
    family, checkpoint = pair.stages.family, pair.stages.checkpoint
    with init_empty_weights():
        models: dict[str, torch.nn.Module] = {
            "transformer": AuraFlowTransformer2DModel.from_config(checkpoint.config("transformer")),
            "text_encoder": UMT5EncoderModel(UMT5Config.from_dict(checkpoint.config("text_encoder"))),
        }
    for name, plan in family.parallelize.tensor_plans(checkpoint).items():
        specs = shard_specs(models[name], plan, 2)
        sizes = {key: parameter.numel() for key, parameter in models[name].named_parameters() if "block" in key}
        assert sum(size for key, size in sizes.items() if key in specs) > 0.8 * sum(sizes.values())
    sequence = family.parallelize.sequence_plan(models["transformer"])
    for path in (*sequence.inputs, *sequence.outputs):
        assert find_modules(models["transformer"], path)
    family.check_parallel("denoising", checkpoint, ParallelConfig(tp=2, ulysses=2))
    with pytest.raises(ConfigurationError, match="use 1, 2, 4"):
        family.check_parallel("denoising", checkpoint, ParallelConfig(tp=3))
