from triton_diffusion.triton import StageModel


class TritonPythonModel(StageModel):
    """Samples the prior of a request: one tick for it."""

    stage = "prior_generation"
