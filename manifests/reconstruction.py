"""Files of an evaluation of an autoencoder: reconstructed images, and a report.

images/reconstructions/, images/without-residual/, images/noise-*/    shard-*.tar of decoded images (PNG) with an index
report.json, report.schema.json, report.html
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .estimate import Estimate
from .manifest import FrozenModel, Manifest
from .report_file import ExtractorInfo, WrittenReport


class Reconstructed(FrozenModel):
    """Metrics of reconstructed images against their originals."""

    name: str = Field(description="Folder of the images.")
    residual: bool | None = Field(
        description="False: the mask token replaced the output of the residual encoder; null: there is none."
    )
    noise: float | None = Field(
        None, description="Deviation of the noise on the latents, in deviations of the channel; null: none."
    )
    psnr: Estimate | None = Field(description="dB, mean over images; null if all are reproduced exactly.")
    ssim: Estimate = Field(description="Mean over images; Gaussian window of 1.5 pixels (Wang 2004).")
    lpips: Estimate | None = Field(description="VGG16; lower is better.")
    colour_difference: Estimate = Field(description="CIEDE2000, mean over pixels and images; 1 is just noticeable.")
    frechet_distance: Estimate = Field(description="Distance to the originals; called FID only for Inception.")
    kernel_distance: Estimate | None = Field(description="Distance to the originals, as in the report of samples.")


class ReconstructionReport(WrittenReport):
    """`report.json` of `svgpipe eval-reconstruction`."""

    NOUN: ClassVar[str] = "a report of reconstructions"

    schema_version: int = Field(3, description="Version of this layout; raised when the meaning of a field changes.")
    metric: str = Field(description="FID, or a Fréchet distance in a named feature space.")
    extractor: ExtractorInfo = Field(description="Feature extractor of the metrics.")
    lpips_weights: str | None = Field(description="sha256 over the tensors of LPIPS and VGG16; null without LPIPS.")
    image_size: int = Field(description="Pixels per side of all images.")
    num_images: int = Field(description="Held-out images, centre-cropped.")
    images: str = Field(description="Digest of these images and of their crop.")
    results: list[Reconstructed] = Field(
        description="Plain; for kind svg without residual branch; with noise on the latents."
    )
    not_measured: list[str] = Field(
        default_factory=list, description="Metrics that were not measured, with the reason."
    )


class ReconstructionManifest(Manifest):
    """A finished evaluation of an autoencoder."""

    KIND: ClassVar[str] = "reconstruction"
    NOUN: ClassVar[str] = "an evaluation of reconstructions"
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    kind: Literal["reconstruction"] = "reconstruction"
    num_images: int
    content: str = Field(description="sha256 over the decoded images.")
    report: str = Field(description="sha256 of report.json.")
