from triton_diffusion.triton import CancellationModel


class TritonPythonModel(CancellationModel):
    """Cancels a request by its id, whichever stage it is in."""
