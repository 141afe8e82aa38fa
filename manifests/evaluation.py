"""Files of an evaluation: latents, decoded images, features, and a report.

images/SET/shard-*.tar      decoded images (PNG) as WebDataset tars with an index
report.json, report.schema.json, report.html

Next to the evaluation, shared by all evaluations there:

latents/SETTING_DIGEST/     sampled latents, a Zarr group in the format of the feature cache
features/DIGEST.safetensors, .json    features for the metrics, by content of images and extractor; their hash
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .estimate import Estimate
from .evaluation_section import SDESection
from .manifest import FrozenModel, Manifest
from .nearest_images import NearestImages
from .paper import PAPER_ROWS, PaperRow
from .report_file import ExtractorInfo, WrittenReport


class SamplerInfo(FrozenModel):
    """All settings that determine a sample, besides the model."""

    steps: int = Field(description="Number of steps; of dopri5, which chooses its steps, only a name.")
    guidance: float = Field(description="Guidance scale; 1: no guidance.")
    solver: str = Field(description="euler, heun (two evaluations per step), multistep, sde, dopri5, ddpm or ddim.")
    guidance_mode: str = Field(description="Where on the path guidance acts.")
    time_shift: float = Field(description="Shift of the time grid; 1: none, below 1: more steps near the noise.")
    seed: int = Field(description="Seed of the noise, and of drawn labels.")
    precision: str = Field(description="dtype of matrix products.")
    weights: str = Field(description="ema-DECAY or raw.")
    labels: str = Field(description="equal (same number per class) or drawn.")
    guide: str | None = Field(description="Autoguidance: weights, step and hash of the worse model; null: none.")
    classes: list[int] | None = Field(None, description="Class indexes that are sampled; null: all.")
    guidance_channels: int | None = Field(None, description="Number of channels that are guided; null: all.")
    ddim_eta: float | None = Field(None, description="ddim: share of noise in the steps; null: 0.")
    sde: SDESection | None = Field(None, description="Settings of the solver sde; null: those of SiT and REPA.")
    internal: bool | None = Field(None, description="Guided by the model's own auxiliary head; null: not.")
    repeat: int = Field(0, description="Number of the seed among those of the sweep; 0: the first.")

    @property
    def named_steps(self) -> str:
        """Return the steps for a sentence: `1 step`, `25 steps`, `adaptive steps`."""
        if self.solver == "dopri5":
            return "adaptive steps"
        return f"{self.steps} step{'s' if self.steps > 1 else ''}"


class SeedSpread(FrozenModel):
    """A distance of one setting over the seeds of the sweep."""

    steps: int = Field(description="Number of steps.")
    guidance: float = Field(description="Guidance scale.")
    space: str = Field(description="Feature space: that of the extractor, or a name of `spaces`.")
    seeds: list[int] = Field(description="The seeds.")
    minimum: float = Field(description="Smallest of the distances.")
    mean: float = Field(description="Their mean.")
    deviation: float = Field(description="Their standard deviation, unbiased.")


class ReferenceInfo(FrozenModel):
    """The reference: real images, or statistics of real images."""

    kind: str = Field(description="shards, folder, statistics, or npz: images of an .npz, perhaps with statistics.")
    description: str = Field(description="In words.")
    num_images: int | None = Field(description="Number of images; null for statistics.")
    content: str = Field(description="sha256 over the images and their crop; for statistics, of the file.")


class ModelInfo(FrozenModel):
    """The diffusion model."""

    steps: int = Field(description="Training steps; 0 for an imported model.")
    num_parameters: int = Field(description="Number of parameters.")
    weights_sha256: str = Field(description="sha256 of the file of the weights.")


class Measured(FrozenModel):
    """Metrics of one set of images against the reference."""

    name: str = Field(description="Folder of the images; heldout for real images.")
    role: Literal["samples", "heldout", "reconstructions", "decoded-noise"] = Field(
        description="samples; or a reference line: heldout (real images, the floor), reconstructions, or decoded-noise "
        "(the ceiling)."
    )
    num_images: int = Field(description="Number of images.")
    frechet_distance: Estimate = Field(description="Fréchet distance to the reference; called FID only for Inception.")
    spatial_distance: Estimate | None = Field(
        None, description="sFID: the same of Inception's spatial features, as ADM takes them."
    )
    spaces: dict[str, Estimate] = Field(
        default_factory=dict, description="Fréchet distance in the other feature spaces, by name."
    )
    distance_ratio: float | None = Field(
        None,
        description="FDr: mean over the feature spaces of the distance over that of the held-out images; null: no "
        "other spaces, or no held-out images.",
    )
    kernel_distance: Estimate | None = Field(
        description="Polynomial MMD², mean over 50 subsets of at most 1000 images (KID for Inception). The interval "
        "is over the images, to first order."
    )
    inception_score: Estimate | None = Field(description="Inception only.")
    precision: Estimate | None = Field(
        description="Fraction of the images inside the manifold of the reference (3-neighbour balls of at most 50,000 "
        "images of it)."
    )
    recall: Estimate | None = Field(
        description="Fraction of the reference inside the manifold of the images (at most 50,000 of each). The "
        "interval is over the images of the reference."
    )
    density: Estimate | None = Field(
        None, description="Mean number of 5-neighbour balls of the reference that hold an image, over 5."
    )
    coverage: Estimate | None = Field(
        None,
        description="Fraction of the reference with an image in its 5-neighbour ball. The interval is over the images "
        "of the reference.",
    )
    nearest: NearestImages | None = Field(None, description="Distances to the nearest images of the reference.")
    class_accuracy: Estimate | None = Field(
        description="Fraction of images whose nearest class mean of the reference, in feature space, is their class."
    )
    psnr: Estimate | None = Field(None, description="dB to the originals; reconstructions only.")
    sampler: SamplerInfo | None = Field(None, description="Sampler settings; samples only.")


class Report(WrittenReport):
    """`report.json` of `svgpipe sample-and-eval`."""

    NOUN: ClassVar[str] = "a report of samples"

    schema_version: int = Field(4, description="Version of this layout; raised when the meaning of a field changes.")
    metric: str = Field(description="FID, or a Fréchet distance in a named feature space.")
    extractor: ExtractorInfo = Field(description="Feature extractor of the metrics.")
    reference: ReferenceInfo = Field(description="Images or statistics that distances are measured to.")
    diffusion: ModelInfo = Field(description="The model that was sampled.")
    num_samples: int = Field(description="Number of samples per setting.")
    image_size: int = Field(description="Pixels per side of all images.")
    class_names: list[str] = Field(description="Class names of the diffusion model, in label order.")
    preset: str | None = Field(None, description="Named settings of a published number; null: none.")
    protocol: str | None = Field(None, description="Named protocol of the measurement; null: custom.")
    deviations: list[str] = Field(
        default_factory=list, description="What differs from the preset and from the protocol."
    )
    spaces: dict[str, ExtractorInfo] = Field(
        default_factory=dict, description="Networks of the other feature spaces, by name."
    )
    seeds: list[SeedSpread] = Field(
        default_factory=list, description="Distances of every setting over the seeds; empty: one seed."
    )
    results: list[Measured] = Field(description="The settings of the sweep in order, then the reference lines.")
    not_measured: list[str] = Field(
        default_factory=list, description="Metrics that were not measured, with the reason."
    )
    paper: list[PaperRow] = Field(
        default_factory=PAPER_ROWS.copy,
        description="FID of the paper. Not comparable with other data, extractors or numbers of images.",
    )


class LatentsRef(FrozenModel):
    """Location of the latents of one setting."""

    path: str = Field(description="Relative to the evaluation; not part of its identity, as latents may be moved.")
    content: str = Field(description="sha256 over the outer shards that were used.")


class EvaluationManifest(Manifest):
    """A finished evaluation."""

    KIND: ClassVar[str] = "evaluation"
    NOUN: ClassVar[str] = "an evaluation"
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset({"latents"})
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"batch_size", "compile"})
    HINT: ClassVar[str] = "`svgpipe sample-and-eval --out ANOTHER` measures other settings of the same model."

    kind: Literal["evaluation"] = "evaluation"
    num_samples: int
    settings: list[str] = Field(description="Folder names of the settings.")
    latents: dict[str, LatentsRef] = Field(description="Latents of each setting.")
    content: str = Field(description="sha256 over latents and decoded images.")
    report: str = Field(description="sha256 of report.json.")
