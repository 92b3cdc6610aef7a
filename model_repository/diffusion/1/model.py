from triton_diffusion.triton import ChainModel


class TritonPythonModel(ChainModel):
    """Runs the stages for a request and answers once."""

    stream = False
