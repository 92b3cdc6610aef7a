from triton_diffusion.triton import StageModel


class TritonPythonModel(StageModel):
    """Denoises latents: one tick for every step of a request; requests join and leave the batch at each."""

    stage = "denoising"
