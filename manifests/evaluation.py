"""What an evaluation leaves: latents, decoded images, features, and one report whose every number can be traced.

images/SET/shard-*.tar      decoded images (PNG) as WebDataset tars with the usual index
report.json, report.html

Beside it, shared by all evaluations there:

latents/SETTING_DIGEST/     generated latents, a Zarr group in the feature cache's own format
features/SET-DIGEST.safetensors    what distances are computed from; the digest is of the images and the extractor
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationError

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.figure import Figure, Record
from svgpipe.manifests.manifest import Json, Manifest, read_json, summarise, write_json
from svgpipe.manifests.storage import Location

REPORT_NAME = "report.json"


class Measured(Record):
    """One set of images, measured against the reference."""

    name: str
    role: Literal["samples", "heldout", "reconstructions", "decoded-noise"]
    num_images: int
    frechet_distance: Figure = Field(description="Against the reference; FID only where the metric is named so.")
    kernel_distance: Figure = Field(
        description="Polynomial MMD², mean over subsets (KID for Inception); the interval is over the subsets."
    )
    inception_score: Figure | None = Field(description="Inception only.")
    precision: Figure | None = Field(description="Share of the images that lie within the reference.")
    recall: Figure | None = Field(description="Share of the reference that lies within the images; over the former.")
    class_accuracy: Figure | None = Field(
        description="Share whose nearest class mean of the reference, in this feature space, is their own class."
    )
    psnr: Figure | None = Field(None, description="dB against the originals; reconstructions only.")
    sampler: Json | None = Field(None, description="Everything that decides a sample; samples only.")


class Report(Record):
    """`report.json`."""

    schema_version: int = 2
    metric: str = Field(description="What frechet_distance is: FID, or a Fréchet distance in a named space.")
    extractor: Json
    reference: Json
    image_size: int
    class_names: list[str]
    results: list[Measured]
    not_measured: list[str] = Field(default_factory=list, description="What is missing, and why.")

    def write(self, directory: Location) -> None:
        """Write report.json atomically."""
        write_json(directory / REPORT_NAME, self.model_dump(mode="json"))

    @classmethod
    def read(cls, directory: Location) -> Report:
        """Parse report.json. Raises ArtifactError if it is missing or not a report."""
        path = directory / REPORT_NAME
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise ArtifactError(f"{path}: not a report: {summarise(error)}") from error


class LatentsRef(Record):
    """Where the latents of one setting were drawn to, for other sweeps to find."""

    path: str = Field(description="From the evaluation's directory; for people, as latents may be deleted or moved.")
    content: str = Field(description="sha256 over the outer shards that were used.")


class EvaluationManifest(Manifest):
    """A finished evaluation."""

    KIND: ClassVar[str] = "evaluation"
    NOUN: ClassVar[str] = "an evaluation"
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset({"latents"})

    kind: Literal["evaluation"] = "evaluation"
    num_samples: int
    settings: list[str] = Field(description="Folder names of the points of the sweep.")
    latents: dict[str, LatentsRef] = Field(description="Of every setting.")
    content: str = Field(description="sha256 over latents and decoded images.")
    report: str = Field(description="sha256 of report.json.")
