"""What an evaluation leaves: latents, decoded images, features, and one report whose every number can be traced.

images/SET/shard-*.tar      decoded images (PNG) as WebDataset tars with the usual index
report.json, report.schema.json, report.html

Beside it, shared by all evaluations there:

latents/SETTING_DIGEST/     generated latents, a Zarr group in the feature cache's own format
features/DIGEST.safetensors, .json    what distances are computed from, by the images and the extractor; its hash
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .estimate import Estimate
from .manifest import FrozenModel, Manifest
from .paper import PAPER_ROWS, PaperRow
from .report_file import ExtractorInfo, WrittenReport


class SamplerInfo(FrozenModel):
    """Everything that decides a sample, besides the model."""

    steps: int = Field(description="Of the time grid.")
    guidance: float = Field(description="Scale; 1 is none.")
    solver: str = Field(description="euler, heun (two evaluations a step) or multistep.")
    guidance_mode: str = Field(description="Where on the path guidance acts.")
    time_shift: float = Field(description="Of the time grid; 1 is none, less dwells near the noise.")
    seed: int = Field(description="Of the noise, and of labels that are drawn.")
    precision: str = Field(description="dtype of products.")
    weights: str = Field(description="Which average of the model's weights, or raw.")
    labels: str = Field(description="equal (per class), or drawn.")
    guide: str | None = Field(description="Weights, step and hash of the worse model of autoguidance, or null.")


class ReferenceInfo(FrozenModel):
    """Real images, or statistics of such."""

    kind: str = Field(description="shards, folder or statistics.")
    description: str = Field(description="In words.")
    num_images: int | None = Field(description="Null of statistics, which do not say.")
    content: str = Field(description="sha256 over the images and how they are cropped; of statistics, over the file.")


class ModelInfo(FrozenModel):
    """The diffusion model that was sampled from."""

    steps: int = Field(description="Of its training; 0 of an imported one, whose file does not say.")
    num_parameters: int = Field(description="All of them.")
    weights_sha256: str = Field(description="Of the file of the weights that were used.")


class Measured(FrozenModel):
    """One set of images, measured against the reference."""

    name: str = Field(description="Folder of the images; of real ones, heldout.")
    role: Literal["samples", "heldout", "reconstructions", "decoded-noise"] = Field(
        description="samples; or a line to read them by: held-out real images (the floor), reconstructions, or decoded "
        "noise (the ceiling)."
    )
    num_images: int = Field(description="In the set.")
    frechet_distance: Estimate = Field(description="Against the reference; FID only where the metric is named so.")
    kernel_distance: Estimate | None = Field(
        description="Polynomial MMD², mean over 50 subsets of at most 1000 (KID for Inception); the interval is over "
        "the images, to first order."
    )
    inception_score: Estimate | None = Field(description="Inception only.")
    precision: Estimate | None = Field(
        description="Share of the images that lie within the reference, of which 50,000 count, evenly spread."
    )
    recall: Estimate | None = Field(
        description="Share of the reference that lies within the images, over at most 50,000 of either; the interval "
        "is over the reference's, of these images."
    )
    class_accuracy: Estimate | None = Field(
        description="Share whose nearest class mean of the reference, in this feature space, is their own class."
    )
    psnr: Estimate | None = Field(None, description="dB against the originals; reconstructions only.")
    sampler: SamplerInfo | None = Field(None, description="Everything that decides a sample; samples only.")


class Report(WrittenReport):
    """`report.json` of `svgpipe sample-and-eval`."""

    NOUN: ClassVar[str] = "a report of samples"

    schema_version: int = Field(4, description="Of this layout; raised when a field changes its meaning.")
    metric: str = Field(description="What frechet_distance is: FID, or a Fréchet distance in a named space.")
    extractor: ExtractorInfo = Field(description="What made the features.")
    reference: ReferenceInfo = Field(description="What distances are measured against.")
    diffusion: ModelInfo = Field(description="What was sampled from.")
    num_samples: int = Field(description="Of every setting.")
    image_size: int = Field(description="Pixels a side of all images.")
    class_names: list[str] = Field(description="Of the diffusion model, in the order of its labels.")
    results: list[Measured] = Field(description="The sweep's settings in order, then the lines to read them by.")
    not_measured: list[str] = Field(default_factory=list, description="What is missing, and why.")
    paper: list[PaperRow] = Field(
        default_factory=PAPER_ROWS.copy,
        description="The paper's numbers, not ours: other data, extractors and numbers of images do not compare.",
    )


class LatentsRef(FrozenModel):
    """Where the latents of one setting were drawn to, for other sweeps to find."""

    path: str = Field(description="From the evaluation's directory; for people, as latents may be deleted or moved.")
    content: str = Field(description="sha256 over the outer shards that were used.")


class EvaluationManifest(Manifest):
    """A finished evaluation."""

    KIND: ClassVar[str] = "evaluation"
    NOUN: ClassVar[str] = "an evaluation"
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset({"latents"})
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"batch_size", "compile"})

    kind: Literal["evaluation"] = "evaluation"
    num_samples: int
    settings: list[str] = Field(description="Folder names of the points of the sweep.")
    latents: dict[str, LatentsRef] = Field(description="Of every setting.")
    content: str = Field(description="sha256 over latents and decoded images.")
    report: str = Field(description="sha256 of report.json.")
