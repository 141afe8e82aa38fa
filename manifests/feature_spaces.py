"""Feature spaces by name, in which sets of images are compared besides that of the main extractor."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

SpaceName = Literal["convnextv2-b", "dinov2-l", "mae-l", "siglip-so400m", "clip-l"]
NAMES: tuple[SpaceName, ...] = get_args(SpaceName)


class Space(NamedTuple):
    """A timm model with its tag, and the pixels per side that images are resized to (bicubic, antialiased).

    Features are what timm gives to its classifier: the class token of DINOv2, MAE and CLIP (before CLIP's projection),
    attention pooling of SigLIP, and the mean of the last map of ConvNeXt, after their norms.
    """

    model: str
    input_size: int = 224


SPACES: dict[SpaceName, Space] = {
    "convnextv2-b": Space("convnextv2_base.fcmae_ft_in22k_in1k"),
    # Source: edm2 calculate_metrics.py, DINOv2Detector.
    "dinov2-l": Space("vit_large_patch14_dinov2.lvd142m"),
    "mae-l": Space("vit_large_patch16_224.mae"),
    "siglip-so400m": Space("vit_so400m_patch14_siglip_224.webli"),
    "clip-l": Space("vit_large_patch14_clip_224.openai"),
}
