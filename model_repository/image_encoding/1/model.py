from triton_diffusion.triton import StageModel


class TritonPythonModel(StageModel):
    """Encodes the pictures that a request brings: by the autoencoder, or an image encoder."""

    stage = "image_encoding"
