"""Pictures and videos to bytes and back: numpy, Pillow and PyAV; no torch, no files, nothing opened by address."""

from triton_diffusion.media.inputs import decode_image
from triton_diffusion.media.pictures import encode_picture
from triton_diffusion.media.videos import encode_video

__all__ = ["decode_image", "encode_picture", "encode_video"]
