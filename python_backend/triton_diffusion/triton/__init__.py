"""What the models of the repository are made of: the only package that imports triton_python_backend_utils."""

from triton_diffusion.triton.cancellation_model import CancellationModel
from triton_diffusion.triton.chain_model import ChainModel
from triton_diffusion.triton.families_model import FamiliesModel
from triton_diffusion.triton.health_model import HealthModel
from triton_diffusion.triton.stage_model import StageModel

__all__ = ["CancellationModel", "ChainModel", "FamiliesModel", "HealthModel", "StageModel"]
