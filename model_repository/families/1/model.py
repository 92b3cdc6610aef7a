from triton_diffusion.triton import FamiliesModel


class TritonPythonModel(FamiliesModel):
    """Says what the checkpoint that is served can do, and what a request to it takes."""
