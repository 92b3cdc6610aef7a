from triton_diffusion.triton import HealthModel


class TritonPythonModel(HealthModel):
    """Says whether requests are taken, and how each stage is."""
