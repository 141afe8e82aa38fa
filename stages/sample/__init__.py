"""`svgpipe sample`: images from a finished diffusion model. In Python: `load(MODEL).sample(labels)`."""

from .image_sampler import ImageSampler, load

__all__ = ["ImageSampler", "load"]
