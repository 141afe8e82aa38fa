"""Results of the paper (arXiv 2510.15301), shown next to measured ones."""

from __future__ import annotations

from pydantic import Field

from .manifest import FrozenModel


class PaperRow(FrozenModel):
    """FID of three models in one setting, on ImageNet at 256 pixels with 50,000 samples."""

    setting: str = Field(description="Steps, or training epochs, as named in the paper.")
    guided: bool = Field(description="With classifier-free guidance.")
    svg: float = Field(description="SVG-XL.")
    sd_vae: float | None = Field(None, description="SiT-XL on SD-VAE latents; null: not in the paper.")
    va_vae: float | None = Field(None, description="SiT-XL on VA-VAE latents; null: not in the paper.")


PAPER_ROWS = [
    PaperRow(setting=setting, guided=guided, svg=svg, sd_vae=sd_vae, va_vae=va_vae)
    for setting, guided, svg, sd_vae, va_vae in (
        ("5 steps", False, 12.26, 69.38, 74.46),
        ("5 steps", True, 9.03, 29.48, 35.94),
        ("10 steps", False, 9.39, 32.81, None),
        ("10 steps", True, 6.49, 10.26, None),
        ("25 steps, 80 epochs", False, 6.57, 22.58, 7.29),
        ("25 steps, 80 epochs", True, 3.54, 6.06, 4.13),
        ("500 epochs", False, 3.94, None, None),
        ("500 epochs", True, 2.10, None, None),
        ("1400 epochs", False, 3.36, None, None),
        ("1400 epochs", True, 1.92, None, None),
    )
]


class PaperProbe(FrozenModel):
    """Top-1 accuracy of a linear probe on ImageNet at 256 pixels, by the paper's protocol.

    Source: Table 4 of arXiv 2510.15301v4.
    """

    features: str = Field(description="Features that were probed.")
    top1: float = Field(description="In %.")


PAPER_PROBES = [PaperProbe(features="raw DINOv3", top1=81.7), PaperProbe(features="SVG", top1=81.8)]


class PaperDense(FrozenModel):
    """A dense probe of the paper, by its protocol: Table 4 of arXiv 2510.15301v4."""

    features: str = Field(description="Features that were probed.")
    mean_iou: float = Field(description="ADE20K, in %.")
    rmse: float = Field(description="NYUv2, in metres.")


PAPER_DENSE = [
    PaperDense(features="raw DINOv3", mean_iou=46.37, rmse=0.362),
    PaperDense(features="SVG", mean_iou=46.51, rmse=0.361),
]


class PaperModel(FrozenModel):
    """A row of the paper's Table 1 (v4): FID on ImageNet at 256 pixels with 50,000 samples."""

    model: str
    reconstruction: float = Field(description="FID of reconstructions.")
    epochs: int = Field(description="Training epochs.")
    steps: int = Field(description="Sampling steps.")
    plain: float = Field(description="Without guidance.")
    guided: float = Field(description="With guidance.")


PAPER_MODELS = [
    PaperModel(model=model, reconstruction=rebuilt, epochs=epochs, steps=steps, plain=plain, guided=guided)
    for model, rebuilt, epochs, steps, plain, guided in (
        ("DiT-XL, SD-VAE", 0.61, 1400, 250, 9.62, 2.27),
        ("SiT-XL, SD-VAE", 0.61, 1400, 250, 9.35, 2.15),
        ("REPA-XL, SD-VAE", 0.61, 80, 250, 7.90, 2.65),
        ("REPA-XL, SD-VAE", 0.61, 800, 250, 5.90, 1.42),
        ("SiT-XL, VA-VAE", 0.26, 80, 250, 5.96, 3.63),
        ("SiT-XL, SD-VAE", 0.61, 80, 25, 22.58, 6.06),
        ("SiT-XL, VA-VAE", 0.26, 80, 25, 7.29, 4.13),
        ("SVG-XL", 0.65, 80, 25, 6.57, 3.54),
        ("SVG-XL", 0.65, 500, 25, 3.94, 2.10),
        ("SVG-XL", 0.65, 1400, 25, 3.36, 1.92),
    )
]
