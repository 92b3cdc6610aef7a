from triton_diffusion.triton import StageModel


class TritonPythonModel(StageModel):
    """Encodes prompts: one tick for a request."""

    stage = "text_encoding"
