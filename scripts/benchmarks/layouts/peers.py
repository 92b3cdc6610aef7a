"""A rank whose transformer others have parallelised: as program.py, with the name of the peer as argument.

The steps around the transformer, and so the cost of everything else, are ours on all sides.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch._C._distributed_c10d import FileStore

from benchmarks.layouts.messages import DenoiseJob
from benchmarks.layouts.program import Loaded, main
from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.loading.components import load_components
from triton_diffusion.runtime.rank_executor import RankExecutor
from triton_diffusion.stages.plan import make_plan


def _diffusers_ulysses(transformer: Any, degree: int) -> None:
    """Context parallelism of diffusers."""
    from diffusers import ContextParallelConfig

    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree))


def _diffusers_tp(transformer: Any, degree: int) -> None:
    """Tensor parallelism of diffusers, by the ColwiseParallel and RowwiseParallel of torch: DTensor weights."""
    from diffusers.hooks import tensor_parallel
    from diffusers.models._modeling_parallel import TensorParallelConfig

    # It takes a model that was loaded straight to its device for an offloaded one.
    remove_hook_from_submodules(transformer)
    transformer.hf_device_map = None
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)  # type: ignore[assignment]
    transformer.enable_parallelism(config=TensorParallelConfig(tp_degree=degree))
    # As diffusers' pipelines do. Our steps run in inference mode, in which every layer of a DTensor takes milliseconds.
    transformer.forward = torch.no_grad()(torch.inference_mode(False)(transformer.forward))


def _cache_dit_ulysses(transformer: Any, degree: int) -> None:
    """Context parallelism of cache-dit, without its caches."""
    # Not among our dependencies; see --path.
    cache_dit: Any = importlib.import_module("cache_dit")
    cache_dit.enable_cache(transformer, parallelism_config=cache_dit.ParallelismConfig(ulysses_size=degree))


PEERS = {
    "diffusers-ulysses": _diffusers_ulysses,
    "diffusers-tp": _diffusers_tp,
    "cache-dit-ulysses": _cache_dit_ulysses,
}


def _load(job: DenoiseJob, peer: str) -> Loaded:
    _pretend_the_cpu_is_an_accelerator()
    size = job.parallel.num_ranks
    store = FileStore(job.store, size)
    # No axis of ours: to the stage every rank does all of the work, and the transformer shares it out on its own.
    group = RankGroup(rank=job.rank, size=size, device=torch.device("cpu"), store=store)
    checkpoint = open_checkpoint(job.checkpoint)
    family = find_family(checkpoint)
    dtype = getattr(torch, job.dtype)
    names = family.stage_components(checkpoint)["denoising"]
    components = load_components(checkpoint, names, dtype=dtype, device=group.device)
    PEERS[peer](components["transformer"], size)
    stages = make_plan("denoising", family, components, group)
    return Loaded(group, components, RankExecutor(stages, group))


def _pretend_the_cpu_is_an_accelerator() -> None:
    """The peers divide by the number of accelerators, and work on gloo once there is one."""
    accelerator = torch.device("cpu")
    torch._C._get_accelerator = lambda *_: accelerator
    torch.accelerator.current_accelerator = lambda *_: accelerator
    torch.accelerator.device_count = lambda: 1


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--path", help="folder to import packages from that are not installed")
    return parser.parse_args()


if __name__ == "__main__":
    args = _parse_arguments()
    if args.path is not None:
        sys.path.append(args.path)
    sys.exit(main(lambda job: _load(job, args.peer)))
