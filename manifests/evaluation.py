"""What an evaluation leaves: latents, decoded images, features, and one report whose every number can be traced.

images/SET/shard-*.tar      decoded images (PNG) as WebDataset tars with the usual index
report.json, report.schema.json, report.html

Beside it, shared by all evaluations there:

latents/SETTING_DIGEST/     generated latents, a Zarr group in the feature cache's own format
features/SET-DIGEST.safetensors    what distances are computed from; the digest is of the images and the extractor
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from svgpipe.manifests.figure import Figure, Record
from svgpipe.manifests.manifest import Json, Manifest
from svgpipe.manifests.paper import PAPER_ROWS, PaperRow
from svgpipe.manifests.report_file import WrittenReport


class Measured(Record):
    """One set of images, measured against the reference."""

    name: str = Field(description="Folder of the images; of real ones, heldout.")
    role: Literal["samples", "heldout", "reconstructions", "decoded-noise"] = Field(
        description="samples; or a line to read them by: held-out real images (the floor), reconstructions, or decoded "
        "noise (the ceiling)."
    )
    num_images: int = Field(description="In the set.")
    frechet_distance: Figure = Field(description="Against the reference; FID only where the metric is named so.")
    kernel_distance: Figure | None = Field(
        description="Polynomial MMD², mean over 50 subsets of at most 1000 (KID for Inception); the interval is over "
        "the images, to first order."
    )
    inception_score: Figure | None = Field(description="Inception only.")
    precision: Figure | None = Field(
        description="Share of the images that lie within the reference, of which 50,000 count, evenly spread."
    )
    recall: Figure | None = Field(
        description="Share of the reference that lies within the images, over at most 50,000 of either."
    )
    class_accuracy: Figure | None = Field(
        description="Share whose nearest class mean of the reference, in this feature space, is their own class."
    )
    psnr: Figure | None = Field(None, description="dB against the originals; reconstructions only.")
    sampler: Json | None = Field(
        None,
        description="Everything that decides a sample; samples only: steps, guidance and guidance_mode, solver, "
        "time_shift, seed (of noise and drawn labels), precision (dtype of the products), weights (which average), "
        "labels (equal per class, or drawn), guide (the worse model of autoguidance, or null).",
    )


class Report(WrittenReport):
    """`report.json` of `svgpipe sample-and-eval`."""

    NOUN: ClassVar[str] = "a report of samples"

    schema_version: int = Field(3, description="Of this layout; raised when a field changes its meaning.")
    metric: str = Field(description="What frechet_distance is: FID, or a Fréchet distance in a named space.")
    extractor: Json = Field(
        description="What made the features: kind, name, hash of the weights, and input size in pixels a side."
    )
    reference: Json = Field(description="What distances are measured against: how many images, and their digest.")
    image_size: int = Field(description="Pixels a side of all images.")
    class_names: list[str] = Field(description="Of the diffusion model, in the order of its labels.")
    results: list[Measured] = Field(description="The sweep's settings in order, then the lines to read them by.")
    not_measured: list[str] = Field(default_factory=list, description="What is missing, and why.")
    paper: list[PaperRow] = Field(
        default_factory=PAPER_ROWS.copy,
        description="The paper's numbers, not ours: other data, extractors and numbers of images do not compare.",
    )


class LatentsRef(Record):
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
