"""What an evaluation of an autoencoder leaves: reconstructed images, and report.json.

images/reconstructions/, images/without-residual/    shard-*.tar of decoded images (PNG) with the usual index
report.json, report.schema.json, report.html
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .estimate import Estimate
from .manifest import FrozenModel, Manifest
from .report_file import ExtractorInfo, WrittenReport


class Reconstructed(FrozenModel):
    """The same images through the autoencoder, measured against themselves."""

    name: str = Field(description="Folder of the images.")
    residual: bool = Field(description="Whether the residual branch was on; off, the mask token stands in its place.")
    psnr: Estimate | None = Field(description="dB, mean over images; None where all are reproduced exactly.")
    ssim: Estimate = Field(description="Mean over images; Gaussian window of 1.5 pixels (Wang 2004).")
    lpips: Estimate | None = Field(description="VGG16, lower is better.")
    colour_difference: Estimate = Field(description="CIEDE2000, mean over pixels and images; 1 is just noticeable.")
    frechet_distance: Estimate = Field(description="To the originals; FID only where the metric is named so.")
    kernel_distance: Estimate | None = Field(description="To the originals, as in the report of samples.")


class ReconstructionReport(WrittenReport):
    """`report.json` of `svgpipe eval-reconstruction`."""

    NOUN: ClassVar[str] = "a report of reconstructions"

    schema_version: int = Field(3, description="Of this layout; raised when a field changes its meaning.")
    metric: str = Field(description="What frechet_distance is: FID, or a Fréchet distance in a named space.")
    extractor: ExtractorInfo = Field(description="What made the features.")
    lpips_weights: str | None = Field(description="sha256 over LPIPS's tensors, VGG16's among them; null without it.")
    image_size: int = Field(description="Pixels a side of all images.")
    num_images: int = Field(description="Held-out images, centre-cropped.")
    images: str = Field(description="Digest of those images and how they are cropped.")
    results: list[Reconstructed] = Field(description="With the residual branch, then without.")
    not_measured: list[str] = Field(default_factory=list, description="What is missing, and why.")


class ReconstructionManifest(Manifest):
    """A finished evaluation of an autoencoder."""

    KIND: ClassVar[str] = "reconstruction"
    NOUN: ClassVar[str] = "an evaluation of reconstructions"
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    kind: Literal["reconstruction"] = "reconstruction"
    num_images: int
    content: str = Field(description="sha256 over the decoded images.")
    report: str = Field(description="sha256 of report.json.")
