from triton_diffusion.triton import ChainModel


class TritonPythonModel(ChainModel):
    """Runs the stages for a request, and reports every step as it goes."""

    stream = True
