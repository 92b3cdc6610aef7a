from triton_diffusion.triton import StageModel


class TritonPythonModel(StageModel):
    """Decodes latents to pictures, and encodes those as PNG, JPEG or WebP."""

    stage = "decoding"
